"""The training script: check, start ranks, build, train, report."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from helix_megatron.arguments import exit_on_error
from helix_megatron.data.text import build_tokenizer
from helix_megatron.errors import counted
from helix_megatron.hardware import MACHINES, Machine
from helix_megatron.run.config import RunConfig
from helix_megatron.run.local_ranks import end_with_parent, start_ranks
from helix_megatron.run.quiet import ignore_megatron_warnings
from helix_megatron.run.rank_environment import number_of_ranks
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import byte_datasets, validate

if TYPE_CHECKING:
    from helix_megatron.core.meter import Meter

PROGRAM = "pretrain_gpt.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `scripts/pretrain_gpt.py`. Wrong input prints one paragraph and exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error(PROGRAM):
        values = parse_args(arguments)
        looks = values["check"] or values["explain"]
        ranks = number_of_ranks(values["nproc_per_node"], starts=not looks)
        run = validate(values, ranks)
        if looks:
            print(description_of(run))
            return
        if ranks > 1 and "RANK" not in os.environ:
            command = [sys.executable, sys.argv[0], *arguments]
            sys.exit(start_ranks(ranks, command, drains=run.checkpoints.exit_signal_handler))
        _prepare_environment()
        pretrain(run)


def description_of(run: RunConfig) -> str:
    """What a validated run would be, for people."""
    layout, sizes = run.layout, run.sizes
    lines = [
        f"{counted(run.world_size, 'rank')}: tensor parallel {sizes['tp']}, pipeline parallel {sizes['pp']}, "
        f"context parallel {sizes['cp']}, data parallel {sizes['dp']}, expert parallel {sizes['ep']}."
    ]
    if not run.helix.active:
        lines.append("Attention: stock Megatron (intra-head parallel size 1).")
        return "\n".join(lines)
    lines.append(
        f"Attention: {run.helix.attention}, {counted(layout.head_groups, 'head group')} of "
        f"{counted(layout.segments, 'segment')}, query layout {layout.query_layout}."
    )
    if run.logging.explain:
        lines += layout.rank_lines()
        if run.helix.attention == "exact":
            from helix_megatron.core.exchanges import explain

            lines.append(explain(run.attention_shape, run.helix.exchange, _machine()))
    return "\n".join(lines)


def pretrain(run: RunConfig) -> None:
    """Train on this rank. The environment is a launcher's, or that of a single process."""
    import threading

    import torch.distributed as dist

    from helix_megatron import parallel_state
    from helix_megatron.megatron.process_group import process_group
    from helix_megatron.run.watchdog import watching

    end_with_parent()
    asked_to_end = threading.Event() if run.checkpoints.exit_signal_handler else None
    with process_group(run.parallel), watching(asked_to_end):
        with _reporting(run) as (report, note):
            for metrics in training(run, asked_to_end, note):
                report(metrics)
        dist.barrier()
        parallel_state.destroy_model_parallel()


def training(
    run: RunConfig,
    asked_to_end: Any = None,
    note: Callable[[str], None] = lambda text: None,
    meter: Meter | None = None,
) -> Iterator[Any]:
    """Build everything on this rank of an existing process group, and train: `IterationMetrics`, one by one.

    Args:
        run: validated.
        asked_to_end: a `threading.Event`; when it is set on any rank, the run saves and ends.
        note: where to say what was loaded and saved.
        meter: counts and times the collectives; as --log-communication-time says when not given.
    """
    import torch

    from helix_megatron.core.meter import Meter
    from helix_megatron.core.observe import observing
    from helix_megatron.training.checkpointing import Checkpointing, Progress
    from helix_megatron.training.health import Health
    from helix_megatron.training.loop import Trainer
    from helix_megatron.training.optimizer import build_optimizer

    config, chunks = build(run)
    optimizer, scheduler = build_optimizer(run, chunks)
    if meter is None:
        timing: Any = run.logging.log_communication_time
        if timing == "auto":
            timing = "off" if torch.cuda.is_available() else "total"
        meter = Meter(timing)
    with Checkpointing(run, chunks, optimizer, scheduler, note) as checkpoints:
        progress = checkpoints.load()
        batches, validation = _data(run, progress.consumed_samples)
        health = Health(run, checkpoints.described)
        with observing(meter):
            trainer = Trainer(run, config, chunks, optimizer, scheduler, meter)
            for metrics in trainer.train(batches, validation, **vars(progress)):
                yield metrics
                health.check(metrics)
                progress = Progress(metrics.iteration, metrics.consumed_samples)
                if checkpoints.after_iteration(progress, asked_to_end):
                    break
        checkpoints.save(progress)
        checkpoints.close()


def build(run: RunConfig) -> tuple[Any, list[Any]]:
    """Groups, random states and the model of this rank: its configuration and its chunks, in DDP."""
    from helix_megatron.megatron.gpt import build_model, transformer_config
    from helix_megatron.megatron.optional import available_backends, describe
    from helix_megatron.megatron.process_group import initialize_groups
    from helix_megatron.megatron.random import seed_model_parallel

    available_backends().check()
    initialize_groups(run)
    seed_model_parallel(run.training.seed)
    describe()
    config = transformer_config(run)
    return config, build_model(run, config)


@contextlib.contextmanager
def _reporting(run: RunConfig) -> Iterator[tuple[Callable[[Any], None], Callable[[str], None]]]:
    """Where metrics and notes go: files, services and the terminal on rank 0, nowhere on others."""
    import torch.distributed as dist

    from helix_megatron.training.metrics import MetricsWriters, write_run_description
    from helix_megatron.training.progress import ProgressLine

    if dist.get_rank() != 0:
        yield lambda metrics: None, lambda text: None
        return
    description, logging = run_description(run), run.logging
    if logging.metrics_jsonl:
        path = os.path.join(os.path.dirname(logging.metrics_jsonl), "run.json")
        write_run_description(path, description)
    writers = MetricsWriters(
        jsonl=logging.metrics_jsonl,
        tensorboard_dir=logging.tensorboard_dir,
        wandb_project=logging.wandb_project,
        run_name=logging.run_name,
        config=description,
        resume=run.checkpoints.load_iteration,
    )
    label = logging.run_name or ""
    with (
        writers,
        ProgressLine(
            run.training.train_iters, log_interval=logging.log_interval, label=label
        ) as line,
    ):

        def report(metrics: Any) -> None:
            writers.write(metrics)
            line.update(metrics)

        yield report, line.note


def run_description(run: RunConfig) -> dict[str, Any]:
    """`run.json`: label, layout, model and how to run it again."""
    from helix_megatron.training.metrics import command_line, software_versions

    return {
        "label": run.logging.run_name or counted(run.world_size, "rank"),
        "ranks": run.world_size,
        "layout": run.sizes
        | {
            "attention": run.helix.attention if run.helix.active else "stock",
            "exchange": _exchange_name(run),
            "query_layout": run.layout.query_layout if run.helix.active else "heads",
        },
        "model": run.decides_losses,
        "micro_batch_size": run.training.micro_batch_size,
        "sequence_parallel": run.parallel.sequence_parallel,
        "distributed_optimizer": run.parallel.use_distributed_optimizer,
        "versions": software_versions(),
        "command": command_line(),
    }


def _exchange_name(run: RunConfig) -> str:
    if not run.helix.active or run.helix.attention == "segment-local":
        return "none"
    from helix_megatron.core.exchanges import choose

    return choose(run.attention_shape, run.helix.exchange, _machine()).name


def _machine() -> Machine:
    """What the cost model takes this machine for, as attention does from the tensors' device."""
    import torch

    return MACHINES["cuda" if torch.cuda.is_available() else "cpu"]


def _data(
    run: RunConfig, consumed_samples: int
) -> tuple[Iterator[Any], Callable[[], Iterator[Any]] | None]:
    """This rank's training micro-batches from where it stopped, and a maker of validation ones."""
    from megatron.core import parallel_state as megatron_state

    from helix_megatron.data.batches import micro_batches

    train: Any
    valid: Any
    data = run.data
    if data.data_path:
        from helix_megatron.data.megatron_datasets import build_megatron_datasets

        train, valid, _ = build_megatron_datasets(
            data.data_path,
            build_tokenizer(data.tokenizer_type, data.tokenizer_model),
            run.model.seq_length,
            run.samples,
            seed=run.training.seed,
            split=data.split,
            data_cache_path=data.data_cache_path,
            separates=data.packed_documents,
        )
    else:
        train, valid = byte_datasets(run)

    def batches_of(dataset: Any, consumed: int = 0) -> Iterator[Any]:
        return micro_batches(
            dataset,
            run.training.micro_batch_size,
            megatron_state.get_data_parallel_rank(),
            megatron_state.get_data_parallel_world_size(),
            consumed_samples=consumed,
        )

    return batches_of(train, consumed_samples), None if valid is None else lambda: batches_of(valid)


def _prepare_environment() -> None:
    """What must be set before torch and Megatron are imported; every rank would print their warnings."""
    ignore_megatron_warnings()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron needs it with TP
