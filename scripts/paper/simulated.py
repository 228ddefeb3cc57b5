"""The paper's comparison at full size, simulated by the planner: layouts, links, micro-batches in flight."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from helix_megatron.plan.clusters import CLUSTERS, Cluster
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec, model_of
from helix_megatron.plan.results import PREDICT, Limits
from helix_megatron.plan.score import Prediction
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Scenario, Software
from paper import claims as c

PRESETS = {"dense": "paper-dense", "moe": "paper-moe"}
# Name in tables → cluster of 16 GPUs.
LINKS = {"inside one NVLink domain": "nvlink-16", "in two DGX nodes": "dgx-h100"}
IN_FLIGHT = (1, 2, 4, 8, 16, 64, 1024)
TASKS = {"prefill": "forward", "train": "training"}


@dataclass(frozen=True)
class Family:
    """A way to use 16 GPUs for one replica of the model: name in tables, and what is fixed."""

    name: str
    limits: Limits

    @property
    def baseline(self) -> bool:
        return self.limits.tp == 8


FAMILIES = (
    Family("TP 8 × PP 2", Limits(tp=8, pp=2, cp=1, segments=1, micro_batch=1)),
    Family("TP 16, whole heads", Limits(tp=16, pp=1, segments=1, micro_batch=1)),
    Family("TP 16 = m 2 × n 8", Limits(tp=16, pp=1, segments=2, micro_batch=1)),
    Family("TP 16 = m 4 × n 4", Limits(tp=16, pp=1, segments=4, micro_batch=1)),
)


@functools.cache
def model(kind: str) -> ModelSpec:
    """The paper's dense or MoE model."""
    return model_of(PRESETS[kind])


@functools.lru_cache(maxsize=512)
def fastest(family: Family, kind: str, task: str, batches: int, cluster: Cluster) -> Layout | None:
    """The fastest layout of a family: exchange, query layout, recomputation and expert parallelism are free."""
    job = Job(task, c.SEQUENCE, batches)
    plan = search(model(kind), c.GPUS, cluster, job, Software(), family.limits)
    return plan.rows[0].layout if plan.rows else None


@functools.lru_cache(maxsize=4096)
def predict(
    family: Family, kind: str, task: str, batches: int, cluster: Cluster
) -> Prediction | None:
    """A step of `batches` micro-batches of one sequence; None where nothing of the family fits."""
    layout = fastest(family, kind, task, batches, cluster)
    if layout is None:
        return None
    job = Job(task, c.SEQUENCE, batches)
    return PREDICT[task](Scenario(model(kind), job, cluster, Software()), layout)


def gain(
    kind: str, task: str, batches: int, cluster: Cluster, segments: int | None = None
) -> float:
    """Tokens/s of the best m × n (or of one m) relative to TP 8 × PP 2; NaN where one does not fit."""
    baseline = predict(FAMILIES[0], kind, task, batches, cluster)
    wanted = [f for f in FAMILIES if (f.limits.segments or 1) > 1]
    if segments is not None:
        wanted = [f for f in FAMILIES[1:] if f.limits.segments == segments]
    found = [predict(family, kind, task, batches, cluster) for family in wanted]
    speeds = [p.tokens_per_second for p in found if p is not None]
    if baseline is None or not speeds:
        return float("nan")
    return max(speeds) / baseline.tokens_per_second


def exposed_shares() -> dict[str, float]:
    """Share of a training step that is communication with nothing beside it, by link; m = 4."""
    shares = {}
    for name, cluster in LINKS.items():
        prediction = predict(FAMILIES[3], "dense", "train", c.BATCH, CLUSTERS[cluster])
        assert prediction is not None, "the paper's model fits on its GPUs"
        shares[name] = prediction.exposed / prediction.seconds
    return shares


@functools.cache
def with_network(bandwidth: float) -> Cluster:
    """Two DGX H100 nodes whose GPUs reach the other node at `bandwidth` byte/s each."""
    return dataclasses.replace(
        CLUSTERS["dgx-h100"], name=f"dgx-{bandwidth / 1e9:g}", network_bandwidth=bandwidth
    )
