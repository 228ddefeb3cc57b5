"""Published training runs as tables: their columns, and what each row ran on which software."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError, listed
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec, model_of, spec_of_flags
from helix_megatron.plan.presets import PRESETS
from helix_megatron.plan.settings import Job, Software
from helix_megatron.plan.stages import dealings

# vTrain (arXiv 2312.12391) measured Megatron-LM of before sequence parallelism and flash attention: every layer
# recomputed ("use_checkpoint"), 1F1B, unfused attention with dropout, no overlap of all-reduces, gradients
# reduced at once after the last backward ("use_gradient_bucket": false) by 800 Gbit/s a node (its config/).
MEGATRON_2021 = Software(
    kernel="unfused",
    tp_overlap="none",
    dp_overlap=False,
    distributed_optimizer=False,
    dropout=True,
    scatter_gather=True,
)
# NeMo Framework 24.07 (NVIDIA/NeMo-Framework-Launcher, launcher_scripts/conf/training): Transformer Engine,
# sequence parallelism with tensor parallelism, its overlap by user buffers, distributed Adam overlapped.
NEMO = Software(precision="fp8", tp_overlap="full")
EMPTY = ("", "-", "–", "n/a", "na", "none", "nan")  # cells that say nothing
VOCABULARY = 51200  # vTrain's tables name none: GPT-2's, padded, as in Megatron-LM's scripts


@dataclass(frozen=True)
class Run:
    """One row: what ran, and the seconds of an iteration that were measured.

    cluster: where it ran, if not where all of the table did. memory: bytes of the fullest GPU, if they were
    measured: without what CUDA and NCCL take.
    """

    label: str
    model: ModelSpec
    layout: Layout
    job: Job
    software: Software
    seconds: float
    cluster: str = ""
    memory: float = 0.0


@dataclass(frozen=True)
class Kind:
    """A kind of table: columns that it must have and those that it may, its cluster, how a row is read, and the
    column with the number of GPUs, if it has one."""

    columns: tuple[str, ...]
    optional: tuple[str, ...]
    cluster: str
    precision: str
    read: Callable[[dict[str, str]], Run]
    gpus: str = "gpus"


def number_in(row: dict[str, str], column: str, default: int | None = None) -> int:
    """A whole number; `default` for an optional cell that is empty or whose column is missing."""
    text = (row.get(column) or "").strip()
    if default is not None and text.lower() in EMPTY:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value < 1 or value != int(value):
        raise HelixError(f"{column} is {text!r}. It must be a whole number of at least 1.")
    return int(value)


def positive_in(row: dict[str, str], column: str) -> float:
    text = (row.get(column) or "").strip().replace(",", "")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise HelixError(f"{column} is {text!r}. It must be a number above 0.")
    return value


def gpt_flags(layers: int, hidden: int, heads: int, sequence: int) -> dict[str, Any]:
    """Model flags of a GPT of the published tables, which name its sizes only."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": VOCABULARY,
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": sequence,
    }


def _read_a100(row: dict[str, str]) -> Run:
    layers, hidden, heads = (
        number_in(row, c) for c in ("layers", "hidden_size", "attention_heads")
    )
    sequence = number_in(row, "sequence_length")
    flags = gpt_flags(layers, hidden, heads, sequence)
    tp, pp = number_in(row, "tensor_parallel"), number_in(row, "pipeline_parallel")
    layout = Layout(
        tp=tp,
        pp=pp,
        dp=number_in(row, "data_parallel", max(1, number_in(row, "gpus") // (tp * pp))),
        micro_batch=number_in(row, "micro_batch"),
        recompute="full",
    )
    job = Job("train", sequence, number_in(row, "global_batch"))
    model = spec_of_flags("the table", flags, "the table")
    name = (row.get("billion_parameters") or "").strip() or f"{model.parameters / 1e9:.1f}"
    model = dataclasses.replace(model, name=f"{name}B")
    seconds = positive_in(row, "iteration_milliseconds") / 1e3
    return Run(model.name, model, layout, job, MEGATRON_2021, seconds)


def preset_of(name: str) -> str:
    """The preset of a name as NeMo writes it: `LLAMA3-70B`, `Llama 3.1 405B`, `GPT3-5B`, `Mixtral-8x7B`.

    Raises:
        HelixError: unknown.
    """

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower().replace("3.1", "3"))

    known = {plain(preset): preset for preset in PRESETS}
    # Nemotron 3 8B and Nemotron 4 15B, 22B and 340B go by their size alone.
    wanted = re.sub(r"^nemotron[34](?=\d)", "nemotron", plain(name)) if name else ""
    wanted = wanted if wanted in known else plain(name)
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, n=1)
        hint = f" Did you mean {known[close[0]]}?" if close else ""
        raise HelixError(
            f"model {name!r} is not known by name. Known: {listed(PRESETS)}.{hint} Or give the path of a "
            "config.json."
        )
    return known[wanted]


def _model_named(name: str) -> ModelSpec:
    if name.endswith(".json"):
        return model_of(name)
    return model_of(preset_of(name))


def with_ends(model: ModelSpec, layout: Layout) -> Layout:
    """The layout with fewer layers on the first and the last stage, where its stages do not divide the layers.

    Raises:
        HelixError: they cannot be dealt so either.
    """
    ways = dealings(model.num_layers, layout.pp)
    if not ways:
        raise HelixError(f"{model.num_layers} layers cannot be dealt to {layout.pp} stages.")
    return layout._replace(first=ways[0][0], last=ways[0][1])


def _read_h100(row: dict[str, str]) -> Run:
    name = (row["model"] or "").strip()
    model = _model_named(name)
    tp, pp = number_in(row, "tensor_parallel"), number_in(row, "pipeline_parallel")
    cp = number_in(row, "context_parallel", 1)
    gpus, batch = number_in(row, "gpus"), number_in(row, "global_batch")
    if gpus % (tp * pp * cp):
        raise HelixError(f"{gpus} GPUs are no multiple of TP {tp} × PP {pp} × CP {cp}.")
    layout = Layout(
        tp=tp,
        pp=pp,
        cp=cp,
        dp=gpus // (tp * pp * cp),
        vp=number_in(row, "virtual_pipeline", 1),
        ep=number_in(row, "expert_parallel", 1),
        etp=tp if model.experts and number_in(row, "expert_parallel", 1) == 1 else 1,
        micro_batch=number_in(row, "micro_batch"),
        sequence_parallel=tp > 1,
    )
    layout = with_ends(model, layout)
    job = Job("train", number_in(row, "sequence_length"), batch)
    # GPT-3 is trained with dropout, the others without (the configurations' hidden_dropout).
    software = dataclasses.replace(NEMO, dropout=model.name.startswith("gpt3"))
    rate = positive_in(row, "tokens_per_second_per_gpu")
    return Run(name, model, layout, job, software, batch * job.sequence / rate / gpus)


A100_COLUMNS = (
    "billion_parameters",
    "gpus",
    "global_batch",
    "micro_batch",
    "hidden_size",
    "attention_heads",
    "layers",
    "sequence_length",
    "tensor_parallel",
    "data_parallel",
    "pipeline_parallel",
    "iteration_milliseconds",
)
A100_OPTIONAL = ("billion_parameters", "data_parallel")  # may be missing, or empty
H100_COLUMNS = (
    "model",
    "gpus",
    "global_batch",
    "micro_batch",
    "sequence_length",
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "virtual_pipeline",
    "tokens_per_second_per_gpu",
)
H100_OPTIONAL = ("context_parallel", "virtual_pipeline", "expert_parallel", "tflops_per_gpu")
KINDS = (
    Kind(A100_COLUMNS, A100_OPTIONAL, "a100-4-nics", "bf16", _read_a100),
    Kind(H100_COLUMNS, H100_OPTIONAL, "dgx-h100", "fp8", _read_h100),
)


@dataclass(frozen=True)
class Table:
    """What a file holds. refused: (line, reason) of rows that cannot be predicted; ignored: columns."""

    kind: Kind
    runs: list[Run]
    refused: list[tuple[int, str]]
    ignored: list[str]


def read_table(path: Path, kinds: Sequence[Kind] = KINDS) -> Table:
    """The runs of a table.

    Raises:
        HelixError: no such file, columns of neither kind, or no row that can be predicted.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise HelixError(f"cannot read {path}: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise HelixError(f"{path} is no CSV table: {error}.") from error
    header = [name.strip() for name in lines[0]] if lines else []
    kind = _kind_of(path, header, kinds)
    runs, refused = [], []
    for line, cells in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue
        row = dict(zip(header, cells, strict=False))
        try:
            if len(cells) > len(header):
                raise HelixError(f"it has {len(cells)} cells, and the header {len(header)}.")
            run = kind.read(row)
            _check(run, row, kind.gpus)
            runs.append(run)
        except HelixError as error:
            refused.append((line, str(error)))
    if not runs:
        reasons = "; ".join(f"line {line}: {reason}" for line, reason in refused[:3])
        raise HelixError(f"{path} has no row that can be predicted. {reasons or 'It has no rows.'}")
    known = {*kind.columns, *kind.optional}
    return Table(kind, runs, refused, [name for name in header if name and name not in known])


def _kind_of(path: Path, header: Sequence[str], kinds: Sequence[Kind]) -> Kind:
    """The kind whose columns the header has."""

    def missing(kind: Kind) -> list[str]:
        return [c for c in kind.columns if c not in header and c not in kind.optional]

    for kind in kinds:
        if not missing(kind):
            return kind
    nearest = min(kinds, key=lambda kind: len(missing(kind)))
    hints = [
        f" {name} is unknown: did you mean {close[0]}?"
        for name in header
        if name not in {*nearest.columns, *nearest.optional}
        and (close := difflib.get_close_matches(name, missing(nearest), n=1))
    ]
    raise HelixError(
        f"{path} lacks the columns {listed(missing(nearest))}.{''.join(hints)} Valid tables have "
        f"{listed(KINDS[0].columns)}; or {listed(KINDS[1].columns)}."
    )


def _check(run: Run, row: dict[str, str], column: str) -> None:
    layout = run.layout
    gpus = number_in(row, column) if column else layout.gpus
    if layout.gpus != gpus:
        raise HelixError(f"{layout.describe()} makes {layout.gpus} GPUs, and the row has {gpus}.")
    unit = layout.dp * layout.micro_batch
    if run.job.global_batch % unit:
        raise HelixError(
            f"global batch {run.job.global_batch} is no multiple of {layout.dp} replicas × micro-batch "
            f"{layout.micro_batch}."
        )
    layout.stages(run.model.num_layers)
    if run.model.num_attention_heads % layout.tp:
        raise HelixError(
            f"{run.model.num_attention_heads} heads cannot be dealt to TP {layout.tp}."
        )
