#!/usr/bin/env python3
"""Train a tiny random Llama on real text with transformers' Trainer, its attention cut m × n. See --help.

torchrun --nproc-per-node 4 scripts/train_huggingface.py --intra-head-parallel-size 2
python scripts/train_huggingface.py            # the same model and losses on one process
"""

import argparse

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.flags import INPUT, OUTPUT_DIRECTORY, whole
from helix_megatron.run.rank_environment import number_of_ranks

PROGRAM = "train_huggingface.py"


def parse_args() -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    parser.add_argument(
        "--intra-head-parallel-size",
        type=whole(largest=4096),
        default=1,
        help="segments m of a head",
    )
    parser.add_argument(
        "--heads", type=whole(largest=4096), default=2, help="query heads and key-value heads"
    )
    parser.add_argument("--steps", type=whole(largest=10**6), default=20)
    parser.add_argument(
        "--model", type=INPUT, help="directory of a model to start from, in place of a random one"
    )
    parser.add_argument(
        "--save", type=OUTPUT_DIRECTORY, help="directory for the trained weights, whole"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments, set_seed

    from helix_megatron.config import HelixConfig
    from helix_megatron.data.text import VOCAB_SIZE, ByteDataset, default_text
    from helix_megatron.huggingface import from_pretrained, make_groups, shard
    from helix_megatron.huggingface.trainer import ShardedTrainer

    ranks, m = number_of_ranks(None), args.intra_head_parallel_size
    HelixConfig(m).head_groups(ranks)  # refuses segments that there are no ranks for
    settings = TrainingArguments(
        output_dir="unused",
        use_cpu=True,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=max(args.steps // 10, 1),
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        seed=1,
    )
    groups = make_groups(ranks, m) if dist.is_initialized() else None

    set_seed(1)
    if args.model and groups:
        model = from_pretrained(
            args.model, m, tensor_group=groups.tensor, intra_head_group=groups.intra_head
        )
    elif args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            head_dim=32,
        )
        model = AutoModelForCausalLM.from_config(config)
        if groups:
            shard(model, m, tensor_group=groups.tensor, intra_head_group=groups.intra_head)

    text = ByteDataset(default_text(), sequence_length=64, seed=1)
    samples = [
        {"input_ids": text[i]["tokens"], "labels": text[i]["tokens"]} for i in range(4 * args.steps)
    ]
    trainer = ShardedTrainer(model=model, args=settings, train_dataset=samples)
    trainer.train()
    if args.save:
        trainer.save_model(args.save)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    with exit_on_error(PROGRAM):
        main(parse_args())
