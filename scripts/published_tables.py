"""The tables of `scripts/published`, each in the columns of its source, in groups of rows that are alike."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helix_megatron.plan.clusters import CLUSTERS, Cluster
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.load import Load, fitting, prompt_seconds, step_seconds, token_seconds
from helix_megatron.plan.models import model_of, spec_of_flags
from helix_megatron.plan.score import predict_training
from helix_megatron.plan.settings import Job, Scenario, Software
from training_tables import KINDS, NEMO, Kind, Run, number_in, positive_in, read_table, with_ends

FOLDER = Path(__file__).parent / "published"
BRIDGE_MODELS = {
    "LLAMA3_8B": "llama-3-8b",
    "LLAMA3_70B": "llama-3-70b",
    "LLAMA3.1_405B": "llama-3-405b",
    "Qwen3_30B_a3B": "qwen3-30b-a3b",
    "Qwen3_235B_a22B": "qwen3-235b-a22b",
    "GPT OSS 120B": "gpt-oss-120b",
    "DeepSeekV3": "deepseek-v3",
}
BRIDGE_SYSTEMS = {"h100": "dgx-h100", "b200": "dgx-b200", "gb200": "nvlink-72"}
DGXC_MODELS = {
    "8b": "llama-3-8b",
    "70b": "llama-3-70b",
    "405b": "llama-3-405b",
    "15b": "nemotron-15b",
    "340b": "nemotron-340b",
    "175b": "gpt3-175b",
    "314b": "grok-1",
}
DGXC_SYSTEMS = {"H100": "dgx-h100", "GB200": "nvlink-72"}
SIMUMAX_MODELS = {
    "llama3_70b": ("llama-3-70b", 8),
    "llama3_405b": ("llama-3-405b", 16),
}  # and key-value heads


def _read_bridge(row: dict[str, str]) -> Run:
    model = model_of(BRIDGE_MODELS[row["Model"]])
    tp, pp, cp, vp, ep = (number_in(row, name) for name in ("TP", "PP", "CP", "VP", "EP"))
    gpus, batch = number_in(row, "#-GPUs"), number_in(row, "GBS")
    layout = Layout(
        tp,
        pp,
        gpus // (tp * pp * cp),
        cp,
        ep,
        vp=vp,
        micro_batch=number_in(row, "MBS"),
        sequence_parallel=tp > 1,
    )
    job = Job("train", number_in(row, "Sequence Length"), batch)
    seconds = batch * job.sequence / positive_in(row, "Tokens / sec / GPU") / gpus
    software = dataclasses.replace(NEMO, precision=row["Precision"].lower())
    where = BRIDGE_SYSTEMS[row["System"]]
    return Run(row["Model"], model, with_ends(model, layout), job, software, seconds, where)


def _read_simumax(row: dict[str, str]) -> Run:
    """Its guide: nothing overlapped, bf16, sequence parallel, distributed optimizer, no recomputation."""
    name, groups = SIMUMAX_MODELS[row["model"]]
    sizes = {"num_layers": number_in(row, "layers"), "num_query_groups": groups}
    model = spec_of_flags(row["model"], {**model_of(name).flags, **sizes}, "the table")
    tp, pp, dp, cp = (number_in(row, name) for name in ("TP", "PP", "DP", "CP"))
    layout = Layout(tp, pp, dp, cp, sequence_parallel=tp > 1)
    job = Job("train", number_in(row, "sequence"), number_in(row, "micro-batches") * dp)
    software = Software(tp_overlap="none", dp_overlap=False)
    memory = positive_in(row, "real alloc GiB") * 2**30
    seconds = positive_in(row, "real ms") / 1e3
    return Run(row["model"], model, layout, job, software, seconds, "dgx-b200", memory)


def _read_dgxc(row: dict[str, str]) -> Run:
    """Its launchers: user buffers, but not for Grok 1 before 25.05; dropout in GPT 3; proxies lack layers."""
    name, layers = DGXC_MODELS[row["Size"].partition("-")[0]], number_in(row, "Layers")
    model = spec_of_flags(name, {**model_of(name).flags, "num_layers": layers}, "the table")
    tp, pp, cp, vp, ep, etp = (number_in(row, x) for x in ("TP", "PP", "CP", "VP", "EP", "ETP"))
    dp = number_in(row, "GPUs") // (tp * pp * cp)
    batch = number_in(row, "MBS")
    layout = Layout(tp, pp, dp, cp, ep, etp, vp, micro_batch=batch, sequence_parallel=tp > 1)
    job = Job("train", number_in(row, "SeqLen"), number_in(row, "GBS"))
    software = Software(
        row["Precision"].lower(),
        tp_overlap="backward" if name == "grok-1" and row["Release"] < "25.05" else "full",
        dropout=name.startswith("gpt3"),
    )
    seconds = positive_in(row, "Training step time")
    label, where = f"{row['Workload']} {row['Size']}", DGXC_SYSTEMS[row["System"]]
    return Run(label, model, with_ends(model, layout), job, software, seconds, where)


DGXC = Kind(
    (
        *("Workload", "Size", "System", "Precision", "GPUs", "SeqLen", "Layers", "TP", "PP", "CP"),
        *("EP", "ETP", "VP", "MBS", "GBS", "Training step time"),
    ),
    ("Release",),
    "dgx-h100",
    "bf16",
    _read_dgxc,
    "GPUs",
)
BRIDGE = Kind(
    (
        "Model",
        "System",
        "#-GPUs",
        "Precision",
        "GBS",
        "MBS",
        "Sequence Length",
        "TP",
        "PP",
        "CP",
        "VP",
        "EP",
        "Tokens / sec / GPU",
    ),
    ("NeMo container",),
    "dgx-h100",
    "fp8",
    _read_bridge,
    "#-GPUs",
)
SIMUMAX = Kind(
    (
        "model",
        "layers",
        "TP",
        "PP",
        "DP",
        "CP",
        "sequence",
        "micro-batches",
        "real ms",
        "real alloc GiB",
    ),
    (),
    "dgx-b200",
    "bf16",
    _read_simumax,
    "",
)
ALL_KINDS = (*KINDS, BRIDGE, DGXC, SIMUMAX)


@dataclass(frozen=True)
class Point:
    """A measured figure and how the planner says it.

    predict: seconds with this sustained share of the peak, or None for the planner's own. work: FLOPs or
    bytes of one GPU, for the guess that all run at one rate.
    """

    label: str
    layout: Layout
    measured: float
    work: float
    predict: Callable[[float | None], float]
    run: Run | None = None


@dataclass(frozen=True)
class Group:
    """Rows of one table on one chip, of one precision and kind of model."""

    table: str
    chip: str
    precision: str
    kind: str
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return f"{self.table}: {self.chip}, {self.precision}, {self.kind}"


def groups_of(path: Path) -> list[Group]:
    """The rows of a file, dealt to groups.

    Raises:
        HelixError: it is no table of a known kind.
    """
    with path.open(encoding="utf-8-sig") as file:
        columns = next(csv.reader(file), [])
    if "silicon_tpot_ms" in columns:
        return [_decode_group(path)]
    found: dict[tuple[str, str, str], list[Point]] = {}
    table = read_table(path, ALL_KINDS)
    for run in table.runs:
        where = run.cluster or table.kind.cluster
        key = (
            CLUSTERS[where].chip.name,
            run.software.precision,
            "MoE" if run.model.experts else "dense",
        )
        found.setdefault(key, []).append(_training_point(run, where))
    return [Group(path.stem, *key, tuple(points)) for key, points in found.items()]


def with_share(cluster: Cluster, precision: str, share: float) -> Cluster:
    """The cluster with another sustained share of its chip's peak."""
    sustained = {**cluster.chip.sustained, precision: share}
    return dataclasses.replace(cluster, chip=dataclasses.replace(cluster.chip, sustained=sustained))


def _training_point(run: Run, where: str) -> Point:
    gpus, cluster = run.layout.gpus, CLUSTERS[where]
    cluster = dataclasses.replace(cluster, gpus=gpus, domain=cluster.used_domain(gpus))

    def predict(share: float | None) -> float:
        precision = run.software.precision
        chosen = cluster if share is None else with_share(cluster, precision, share)
        scenario = Scenario(run.model, run.job, chosen, run.software)
        return predict_training(scenario, run.layout).seconds

    tokens = run.job.global_batch * run.job.sequence
    work = run.model.flops_per_token(run.job.sequence) * tokens / run.layout.gpus
    return Point(run.label, run.layout, run.seconds, work, predict, run)


def _decode_group(path: Path) -> Group:
    points: list[Point] = []
    with path.open(encoding="utf-8-sig") as file:
        for row in csv.DictReader(file):
            points.append(_decode_point(row))
    return Group(path.stem, "h100", "bf16", "decode", tuple(points))


def _decode_point(row: dict[str, str]) -> Point:
    model, tp, batch = (
        model_of(row["model"]),
        number_in(row, "tp_size"),
        number_in(row, "batch_size"),
    )
    load = Load(1.0, number_in(row, "isl"), number_in(row, "osl"))
    scenario = Scenario(model, Job("decode", 1, 1), CLUSTERS["dgx-h100"], Software())
    layout = Layout(tp=tp)

    # What does not fit waits in the queue.
    batch = max(1, min(batch, fitting(scenario, layout, load)))

    def predict(share: float | None) -> float:
        if row["backend"] != "sglang":
            return token_seconds(scenario, layout, batch, load)
        # As many requests as run at once, all sent together: on average half of the prompts come between.
        context = load.prompt + load.output // 2
        between = batch / load.output * prompt_seconds(scenario, layout, load.prompt) / 2
        return step_seconds(scenario, layout, batch, context) + between

    cache = 2 * batch * (load.prompt + load.output / 2) * model.num_query_groups * model.head_dim
    work = 2 * (model.parameters + cache * model.num_layers) / tp
    label = f"{row['backend']} {row['model']}, {row['batch_size']} at once, {load.prompt} + {load.output}"
    return Point(label, layout, positive_in(row, "silicon_tpot_ms") / 1e3, work, predict)


def published() -> Sequence[Path]:
    """The tables of this repository."""
    return sorted(FOLDER.glob("*.csv"))
