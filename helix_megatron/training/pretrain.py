"""The training script: check, start ranks, build, train, report."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from helix_megatron.errors import exit_on_error
from helix_megatron.exchanges.choice import MACHINES, Machine
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import (
    attention_shape,
    byte_datasets,
    ranks_of_environment,
    samples,
    validate,
)

if TYPE_CHECKING:
    from helix_megatron.meter import Meter

PROGRAM = "pretrain_gpt.py"
LEAVE_SECONDS = 60.0
# Whatever decides the losses: runs that agree in these train the same model.
MODEL_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "seq_length",
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_base",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "embedding_multiplier",
    "normalization",
    "norm_epsilon",
    "apply_layernorm_1p",
    "swiglu",
    "geglu",
    "openai_gelu",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "window_size",
    "window_attn_skip_freq",
    "padded_vocab_size",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_layer_freq",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "global_batch_size",
    "optimizer",
    "lr",
    "seed",
    "hidden_dropout",
    "text",
    "data_path",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/pretrain_gpt.py`. Wrong input prints one paragraph and exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error(PROGRAM):
        args = parse_args(arguments)
        validate(args, ranks_of_environment(args))
        if args.check or args.explain:
            print(description_of(args))
            return
        if args.nproc_per_node is not None:
            _start_ranks(args.nproc_per_node, arguments)
        _prepare_environment()
        pretrain(args)


def description_of(args: argparse.Namespace) -> str:
    """What a validated run would be, for people."""
    layout = args.layout
    lines = [
        f"{args.world_size} ranks: tensor parallel {args.tensor_model_parallel_size}, pipeline parallel "
        f"{args.pipeline_model_parallel_size}, data parallel {args.data_parallel_size}, expert parallel "
        f"{args.expert_model_parallel_size}.",
    ]
    if not args.helix.active:
        lines.append("Attention: stock Megatron (intra-head parallel size 1).")
        return "\n".join(lines)
    lines.append(
        f"Attention: {args.helix.attention}, {layout.head_groups} head groups of {layout.segments} segments, "
        f"query layout {layout.query_layout}."
    )
    if args.explain:
        for rank in range(layout.num_ranks):
            heads = layout.query_heads(rank)
            whole = (
                "whole"
                if layout.query_layout == "heads"
                else f"segment {layout.partition(rank)[1]}"
            )
            lines.append(
                f"  tensor parallel rank {rank}: query heads {heads.start}-{heads.stop - 1} ({whole}), "
                f"segment {layout.partition(rank)[1]} of key-value heads "
                f"{layout.kv_heads(rank).start}-{layout.kv_heads(rank).stop - 1}"
            )
        if args.helix.attention == "exact":
            from helix_megatron.exchanges import explain

            lines.append(explain(attention_shape(args), args.helix.exchange, _machine()))
    return "\n".join(lines)


def pretrain(args: argparse.Namespace) -> None:
    """Train on this rank. The environment is a launcher's, or that of a single process."""
    import threading

    import torch.distributed as dist

    from helix_megatron import parallel_state
    from helix_megatron.training.watchdog import watching

    asked_to_end = threading.Event() if args.exit_signal_handler else None
    with process_group(args), watching(asked_to_end):
        with _reporting(args) as (report, note):
            for metrics in training(args, asked_to_end, note):
                report(metrics)
        dist.barrier()
        parallel_state.destroy_model_parallel()


def training(
    args: argparse.Namespace,
    asked_to_end: Any = None,
    note: Callable[[str], None] = lambda text: None,
    meter: Meter | None = None,
) -> Iterator[Any]:
    """Build everything on this rank of an existing process group, and train: `IterationMetrics`, one by one.

    Args:
        args: validated flags.
        asked_to_end: a `threading.Event`; when it is set on any rank, the run saves and ends.
        note: where to say what was loaded and saved.
        meter: counts and times the collectives; as --log-communication-time says when not given.
    """
    import torch

    from helix_megatron.meter import Meter
    from helix_megatron.observe import observing
    from helix_megatron.training.checkpointing import Checkpointing, Progress
    from helix_megatron.training.loop import Trainer
    from helix_megatron.training.model import build_optimizer

    config, chunks = build(args)
    optimizer, scheduler = build_optimizer(args, chunks)
    checkpoints = Checkpointing(args, chunks, optimizer, scheduler, note)
    progress = checkpoints.load()
    batches, validation = _data(args, progress.consumed_samples)
    if meter is None:
        timing = args.log_communication_time
        if timing == "auto":
            timing = "off" if torch.cuda.is_available() else "total"
        meter = Meter(timing)
    with observing(meter):
        trainer = Trainer(args, config, chunks, optimizer, scheduler, meter)
        for metrics in trainer.train(batches, validation, **vars(progress)):
            yield metrics
            progress = Progress(metrics.iteration, metrics.consumed_samples)
            if checkpoints.after_iteration(progress, asked_to_end):
                break
    checkpoints.save(progress)
    checkpoints.close()


def build(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Groups, random states and the model of this rank: its configuration and its chunks, in DDP.

    Args:
        args: validated flags. torch.distributed is initialised.
    """
    from helix_megatron import parallel_state
    from helix_megatron.megatron.optional import available_backends, describe
    from helix_megatron.megatron.random import seed_model_parallel
    from helix_megatron.training.model import build_model, transformer_config

    available_backends().check()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        intra_head_parallel_size=args.intra_head_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    seed_model_parallel(args.seed)
    describe()
    config = transformer_config(args)
    return config, build_model(args, config)


@contextlib.contextmanager
def _reporting(
    args: argparse.Namespace,
) -> Iterator[tuple[Callable[[Any], None], Callable[[str], None]]]:
    """Where metrics and notes go: files, services and the terminal on rank 0, nowhere on others."""
    import torch.distributed as dist

    from helix_megatron.training.metrics import MetricsWriters, write_run_description
    from helix_megatron.training.progress import ProgressLine

    if dist.get_rank() != 0:
        yield lambda metrics: None, lambda text: None
        return
    description = run_description(args)
    if args.metrics_jsonl:
        path = os.path.join(os.path.dirname(args.metrics_jsonl), "run.json")
        write_run_description(path, description)
    writers = MetricsWriters(
        jsonl=args.metrics_jsonl,
        tensorboard_dir=args.tensorboard_dir,
        wandb_project=args.wandb_project,
        run_name=args.run_name,
        config=description,
        resume=args.load_iteration,
    )
    label = args.run_name or ""
    with (
        writers,
        ProgressLine(args.train_iters, log_interval=args.log_interval, label=label) as line,
    ):

        def report(metrics: Any) -> None:
            writers.write(metrics)
            line.update(metrics)

        yield report, line.note


def run_description(args: argparse.Namespace) -> dict[str, Any]:
    """`run.json`: label, layout, model and how to run it again."""
    from helix_megatron.training.metrics import command_line, software_versions

    model = {name: getattr(args, name) for name in MODEL_FLAGS}
    if args.helix.attention == "segment-local" and args.helix.active:
        model["segments"] = args.intra_head_parallel_size
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return {
        "label": args.run_name or f"{args.world_size} ranks",
        "ranks": args.world_size,
        "layout": {
            "tp": args.tensor_model_parallel_size,
            "pp": args.pipeline_model_parallel_size,
            "dp": args.data_parallel_size,
            "ep": args.expert_model_parallel_size,
            "m": args.intra_head_parallel_size,
            "n": args.tensor_model_parallel_size // args.intra_head_parallel_size,
            "attention": args.helix.attention if args.helix.active else "stock",
            "exchange": _exchange_name(args),
            "query_layout": args.layout.query_layout if args.helix.active else "heads",
        },
        "model": model | {"precision": precision},
        "micro_batch_size": args.micro_batch_size,
        "sequence_parallel": args.sequence_parallel,
        "distributed_optimizer": args.use_distributed_optimizer,
        "versions": software_versions(),
        "command": command_line(),
    }


def _exchange_name(args: argparse.Namespace) -> str:
    if not args.helix.active or args.helix.attention == "segment-local":
        return "none"
    from helix_megatron.exchanges import choose

    return choose(attention_shape(args), args.helix.exchange, _machine()).name


def _machine() -> Machine:
    """What the cost model takes this machine for, as attention does from the tensors' device."""
    import torch

    return MACHINES["cuda" if torch.cuda.is_available() else "cpu"]


def _data(
    args: argparse.Namespace, consumed_samples: int
) -> tuple[Iterator[Any], Callable[[], Iterator[Any]] | None]:
    """This rank's training micro-batches from where it stopped, and a maker of validation ones."""
    from megatron.core import parallel_state as megatron_state

    from helix_megatron.data.batches import micro_batches

    train: Any
    valid: Any
    if args.data_path:
        from helix_megatron.data.megatron_datasets import build_megatron_datasets

        train, valid, _ = build_megatron_datasets(
            args.data_path,
            args.tokenizer,
            args.seq_length,
            samples(args),
            seed=args.seed,
            split=args.split,
            data_cache_path=args.data_cache_path,
        )
    else:
        train, valid = byte_datasets(args)

    def batches_of(dataset: Any, consumed: int = 0) -> Iterator[Any]:
        return micro_batches(
            dataset,
            args.micro_batch_size,
            args.global_batch_size,
            megatron_state.get_data_parallel_rank(),
            megatron_state.get_data_parallel_world_size(),
            consumed_samples=consumed,
        )

    return batches_of(train, consumed_samples), None if valid is None else lambda: batches_of(valid)


@contextlib.contextmanager
def process_group(args: argparse.Namespace) -> Iterator[None]:
    """torch.distributed for the run, with its timeout on every group."""
    import torch
    import torch.distributed as dist

    from helix_megatron.megatron import cpu_runtime

    cpu_runtime.install()
    on_gpu = torch.cuda.is_available() and args.distributed_backend != "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = args.distributed_backend
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    if "RANK" not in os.environ:  # a single process needs no launcher
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        store: Any = dist.HashStore()
        arguments = {"store": store, "rank": 0, "world_size": 1}
    else:
        arguments = {}
    timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, **arguments)
    try:
        yield
        _leave_together(dist)
    finally:
        dist.destroy_process_group()


def _leave_together(dist: Any) -> None:
    """Wait until all ranks are here: who closes its connections first fails a barrier that others are still in.

    Through the store, which has no such connections. The first rank may keep it, and goes last.
    """
    store = dist.distributed_c10d._get_default_store()
    rank, ranks = dist.get_rank(), range(1, dist.get_world_size())
    timeout = datetime.timedelta(seconds=LEAVE_SECONDS)
    with contextlib.suppress(RuntimeError):  # somebody else has failed: its message is enough
        store.set(f"helix/done/{rank}", "")
        store.wait([f"helix/done/{other}" for other in (0, *ranks)], timeout)
        if rank == 0 and ranks:
            store.wait([f"helix/left/{other}" for other in ranks], timeout)
        else:
            store.set(f"helix/left/{rank}", "")


def _prepare_environment() -> None:
    """What must be set before torch and Megatron are imported."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron needs it with TP


def _start_ranks(number: int, arguments: list[str]) -> None:
    """Become torchrun, which runs this script on `number` ranks of this machine."""
    kept = _without_option(arguments, "--nproc-per-node")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // number)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), sys.argv[0], *kept]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def _without_option(arguments: list[str], option: str) -> list[str]:
    kept = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(option + "="):
            kept.append(argument)
    return kept
