#!/usr/bin/env python3
"""Train a tiny Hugging Face model from random weights with DeepSpeed, on the CPU by default.

    python scripts/train_deepspeed.py scripts/configs/dense.json --nproc-per-node 4

The file is a DeepSpeed configuration with two keys more: "helix", which says how attention is cut, and "model",
the transformers configuration of the model. Without "helix" it is plain DeepSpeed. It also runs under torchrun
and the deepspeed launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.deepspeed import HelixBlock, initialize, read_block
from helix_megatron.deepspeed.config import in_words_of_the_block
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import INPUT_DIRECTORY, INPUT_FILE, OUTPUT_DIRECTORY, OUTPUT_FILE, whole
from helix_megatron.run.local_ranks import end_with_parent, start_ranks
from helix_megatron.run.rank_environment import MOST_RANKS, number_of_ranks, rendezvous

PROGRAM = "train_deepspeed.py"


def main() -> None:
    arguments = sys.argv[1:]
    with exit_on_error(PROGRAM):
        args = parser().parse_args(arguments)
        config = read_config(args.config)
        ranks = number_of_ranks(args.nproc_per_node)
        block = check(config, ranks, args)
        if ranks > 1 and "RANK" not in os.environ:
            sys.exit(start_ranks(ranks, [sys.executable, sys.argv[0], *arguments]))
        end_with_parent()
        with process_group(args.device):
            train(args, config, block)


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    parser.add_argument(
        "config", type=INPUT_FILE, help='JSON file: DeepSpeed\'s keys, "helix" and "model"'
    )
    parser.add_argument(
        "--nproc-per-node", type=whole(largest=MOST_RANKS), metavar="N", help="start N ranks here"
    )
    parser.add_argument(
        "--steps",
        type=whole(largest=10**9),
        default=30,
        help="optimizer steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seq-length", type=whole(2, 10**6), default=64, help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=1234, help="of weights and order of samples"
    )
    parser.add_argument(
        "--text",
        type=INPUT_FILE,
        nargs="+",
        metavar="FILE",
        help="default: Python's language reference",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--save",
        type=OUTPUT_DIRECTORY,
        metavar="DIR",
        help="save a DeepSpeed checkpoint at the end",
    )
    parser.add_argument(
        "--load",
        type=INPUT_DIRECTORY,
        metavar="DIR",
        help="go on from the latest checkpoint in DIR",
    )
    parser.add_argument(
        "--metrics-jsonl",
        type=OUTPUT_FILE,
        metavar="FILE",
        help="one JSON object per step; run.json beside it",
    )
    parser.add_argument("--log-interval", type=whole(), default=10, metavar="K")
    parser.add_argument(
        "--local_rank", type=whole(-1, MOST_RANKS), help=argparse.SUPPRESS
    )  # the deepspeed launcher's
    return parser


# ------------------------------------------------------------------- before ranks start


def read_config(path: str) -> dict[str, Any]:
    """The file, checked to be an object with a model."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        ready = sorted(str(p) for p in Path(__file__).parent.glob("configs/*.json"))
        raise HelixError(
            f"cannot read {path}: {error.strerror}. Ready ones: {listed(ready)}."
        ) from error
    except ValueError as error:
        raise HelixError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise HelixError(
            f'{path} lacks "model", an object with the transformers configuration of the model, such as '
            '{"model_type": "llama", "hidden_size": 64}.'
        )
    return config


def check(config: dict[str, Any], ranks: int, args: argparse.Namespace) -> HelixBlock | None:
    """Find what is wrong before anything starts; the block with its sizes, None if nothing is to be cut."""
    block = read_block(config)
    if block is not None:
        block = block.for_world(ranks) if block.active else None
    replicas = ranks // (block.tensor_parallel_size or 1) if block else ranks
    size, accumulated = config.get("train_batch_size"), config.get("gradient_accumulation_steps", 1)
    if not isinstance(size, int) or size % (replicas * accumulated):
        raise HelixError(
            f'"train_batch_size" {size!r} cannot be shared by {replicas} replicas of the model in '
            f"{accumulated} micro-batches each. Give a multiple of {replicas * accumulated}."
        )
    check_deepspeed_keys(config, size // replicas, block, args)
    import torch

    with torch.device("meta"):
        model = build_model(config["model"], args)
    if block is not None:
        from helix_megatron.huggingface import plan

        assert block.tensor_parallel_size is not None
        cut = {"mlp": block.mlp, "embeddings": block.embeddings}
        with in_words_of_the_block():
            plan(model, block.helix, block.tensor_parallel_size, **cut)
    return block


def check_deepspeed_keys(
    config: dict[str, Any],
    batch_of_replica: int,
    block: HelixBlock | None,
    args: argparse.Namespace,
) -> None:
    """DeepSpeed's own checks, made for one process with its share of the batch."""
    prepare_device(args.device)
    import deepspeed

    from helix_megatron.deepspeed.support import check_settings

    settings = {name: value for name, value in config.items() if name != "model"}
    if block is not None:
        check_settings(settings)
    deepspeed.utils.logger.setLevel("ERROR")
    try:
        deepspeed.DeepSpeedConfig(settings | {"train_batch_size": batch_of_replica})
    except (ValueError, TypeError, AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise HelixError(f"DeepSpeed refuses {args.config}: {error}") from error


def build_model(settings: dict[str, Any], args: argparse.Namespace) -> Any:
    """A model with random weights, the same on all ranks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = settings.get("model_type")
    try:
        config = AutoConfig.for_model(**settings)
        torch.manual_seed(args.seed)
        model = AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError, TypeError) as error:
        raise HelixError(f'transformers refuses "model" of type {kind!r}: {error}') from error
    longest = getattr(config, "max_position_embeddings", args.seq_length + 1)
    if args.seq_length >= longest:
        raise HelixError(
            f'--seq-length {args.seq_length} is too long for "max_position_embeddings" {longest}. '
            f"Give at most {longest - 1}."
        )
    return model


def prepare_device(device: str) -> None:
    """What must be settled before DeepSpeed is imported."""
    if device == "cpu":
        from helix_megatron.deepspeed.cpu import use_cpu

        use_cpu()
        return
    import torch

    if not torch.cuda.is_available():
        raise HelixError("--device cuda: torch sees no GPU. Valid here: cpu.")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """torch.distributed, left properly: the deepspeed launcher takes it ill otherwise."""
    import torch.distributed as dist

    dist.init_process_group("gloo" if device == "cpu" else "nccl", **rendezvous())
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------- training


def train(args: argparse.Namespace, config: dict[str, Any], block: HelixBlock | None) -> None:
    """What a DeepSpeed user writes; only `initialize` is Helix's."""
    import deepspeed
    import torch.distributed as dist

    from helix_megatron.core.meter import measure

    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls two collectives by the names that they had before torch 2.13.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    model = build_model(config["model"], args)
    settings = {name: value for name, value in config.items() if name != "model"}
    engine = initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
    if args.load is not None and engine.load_checkpoint(args.load)[0] is None:
        raise HelixError(f"{args.load} holds no checkpoint.")
    first = engine.global_steps
    batches = data(args, engine, first * engine.train_batch_size())
    loss = norm = float("nan")
    with (
        measure("total" if args.device == "cpu" else "off") as meter,
        reporting(args, config, engine, block) as report,
    ):
        for step in range(first + 1, args.steps + 1):
            meter.reset()
            began = time.perf_counter()
            loss, norm = optimizer_step(engine, batches)
            report(step, loss, norm, time.perf_counter() - began, meter)
    if args.save is not None:
        engine.save_checkpoint(args.save)
    if dist.get_rank() == 0:
        print(
            f"final loss {loss:.6f}, gradient norm {norm:.6f}, after {args.steps} steps", flush=True
        )


def optimizer_step(engine: Any, batches: Iterator[Any]) -> tuple[float, float]:
    """One step: (loss, mean over the whole batch; norm of the gradient before clipping)."""
    import torch
    import torch.distributed as dist

    losses, norm = [], None
    for _ in range(engine.gradient_accumulation_steps()):
        batch = next(batches)
        # The model shifts labels itself: give it the last label as a token, too.
        ids = torch.cat([batch["tokens"], batch["labels"][:, -1:]], dim=1).to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        losses.append(loss.detach().float())
        norm = norm_without_zero(engine)
        engine.step()
    mean = torch.stack(losses).mean()
    replicas = engine.data_parallel_group
    dist.all_reduce(mean, group=replicas)
    if norm is None:
        norm = engine.get_global_grad_norm()
    return float(mean) / dist.get_world_size(replicas), float("nan") if norm is None else float(
        norm
    )


def norm_without_zero(engine: Any) -> float | None:
    """In fp32 without ZeRO, DeepSpeed clips by the norm and does not say which."""
    from helix_megatron.huggingface import grad_norm, sharding_of

    if engine.zero_optimization() or engine.fp16_enabled() or engine.bfloat16_enabled():
        return None
    sharding = sharding_of(engine.module)
    return float(grad_norm(engine.module, sharding.tensor_group if sharding else None))


def data(args: argparse.Namespace, engine: Any, consumed: int) -> Iterator[Any]:
    """This replica's micro-batches: the same on all ranks that share a model."""
    import torch.distributed as dist

    from helix_megatron.data.batches import micro_batches
    from helix_megatron.data.text import ByteDataset, default_text, read_text

    text = read_text(args.text) if args.text else default_text()
    return micro_batches(
        ByteDataset(text, args.seq_length, args.seed),
        engine.train_micro_batch_size_per_gpu(),
        dist.get_rank(engine.data_parallel_group),
        dist.get_world_size(engine.data_parallel_group),
        consumed_samples=consumed,
    )


@contextlib.contextmanager
def reporting(
    args: argparse.Namespace, config: dict[str, Any], engine: Any, block: HelixBlock | None
) -> Iterator[Any]:
    """A function that shows and writes a step: the progress line and metrics of scripts/pretrain_gpt.py."""
    import torch.distributed as dist

    from helix_megatron.core.meter import EXCHANGE
    from helix_megatron.training.metrics import (
        IterationMetrics,
        MetricsWriters,
        memory_bytes,
        write_run_description,
    )
    from helix_megatron.training.progress import ProgressLine

    if dist.get_rank() != 0:
        yield lambda *_: None
        return
    if args.metrics_jsonl:
        path = Path(args.metrics_jsonl).parent / "run.json"
        write_run_description(path, description(args, config, block))
    samples, start = engine.train_batch_size(), time.perf_counter()
    tokens = samples * args.seq_length
    writers = MetricsWriters(jsonl=args.metrics_jsonl, resume=engine.global_steps)
    with writers, ProgressLine(args.steps, log_interval=args.log_interval) as line:

        def report(step: int, loss: float, norm: float, seconds: float, meter: Any) -> None:
            inside, total = meter.bytes(EXCHANGE), meter.bytes()
            metrics = IterationMetrics(
                iteration=step,
                lm_loss=loss,
                grad_norm=norm,
                learning_rate=engine.get_lr()[0],
                tokens_per_second=tokens / seconds,
                iteration_ms=seconds * 1e3,
                comm_ms_per_token=meter.seconds() * 1e3 / tokens,
                attention_bytes_per_token=inside / tokens,
                other_bytes_per_token=(total - inside) / tokens,
                memory_bytes=memory_bytes(),
                consumed_samples=step * samples,
                consumed_tokens=step * tokens,
                elapsed_seconds=time.perf_counter() - start,
                loss_scale=float(engine._get_optimizer_loss_scale() or 1.0),
                skipped=not engine.was_step_applied(),
            )
            writers.write(metrics)
            line.update(metrics)

        yield report


def description(
    args: argparse.Namespace, config: dict[str, Any], block: HelixBlock | None
) -> dict[str, Any]:
    """run.json."""
    from helix_megatron.training.metrics import command_line, software_versions

    ranks = int(os.environ["WORLD_SIZE"])
    tensor = (block.tensor_parallel_size or 1) if block else 1
    m = block.helix.intra_head_parallel_size if block else 1
    kinds = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")]
    return {
        "label": f"{Path(args.config).stem}, {ranks} ranks",
        "ranks": ranks,
        "layout": {
            "tp": tensor,
            "pp": 1,
            "dp": ranks // tensor,
            "ep": 1,
            "m": m,
            "n": tensor // m,
            "attention": block.helix.attention if block else "stock",
            "exchange": block.helix.exchange if block else "none",
            "query_layout": block.helix.query_layout if block else "heads",
        },
        "model": config["model"]
        | {"seq_length": args.seq_length, "train_batch_size": config["train_batch_size"]}
        | {"seed": args.seed, "text": args.text, "precision": kinds[0] if kinds else "fp32"},
        "zero_stage": config.get("zero_optimization", {}).get("stage", 0),
        "versions": software_versions(),
        "command": command_line(),
    }


if __name__ == "__main__":
    main()
