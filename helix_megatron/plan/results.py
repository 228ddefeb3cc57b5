"""What a search is asked for and what it finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.inference import predict_decode, predict_prefill
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.score import Prediction, predict_training
from helix_megatron.plan.settings import Job, Scenario, Software

PREDICT: dict[str, Callable[..., Prediction]] = {
    "train": predict_training,
    "prefill": predict_prefill,
    "decode": predict_decode,
}


# Kinds of rejections beside which others of the same sizes may be ranked.
SLOWER = ("slower exchange", "slower without sequence parallel")
PARTIAL = (*SLOWER, "sequence parallel")


@dataclass(frozen=True)
class Limits:
    """What the user has fixed; None leaves it free. Rivals are enumerated whatever is fixed."""

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    vp: int | None = None
    ep: int | None = None
    etp: int | None = None
    segments: int | None = None
    micro_batch: int | None = None
    exchange: str | None = None
    query_layout: str | None = None
    recompute: str | None = None
    sequence_parallel: bool | None = None
    cache: str | None = None
    first: int | None = None
    last: int | None = None
    max_tp: int | None = None

    def allow(self, layout: Layout) -> bool:
        """Whether a layout is what the user asked for."""
        return all(getattr(layout, key) == value for key, value in self.fixed)

    @functools.cached_property
    def fixed(self) -> tuple[tuple[str, Any], ...]:
        """(field of `Layout`, value) of all that is fixed."""
        own = ((field.name, getattr(self, field.name)) for field in fields(self))
        return tuple((name, value) for name, value in own if value is not None and name != "max_tp")


@dataclass(frozen=True)
class Rejected:
    """A layout, or all layouts that have something in common, and why it is not ranked.

    sizes: what they have in common, by the fields of `Layout`. needed: bytes of a GPU, of what does not fit.
    """

    what: str
    kind: str
    reason: str
    sizes: tuple[tuple[str, Any], ...] = ()
    needed: float = 0.0

    def explains(self, layout: Layout, *fields: str) -> bool:
        """Whether it is why no layout with these fields of `layout` is ranked: it states some of them, none of
        them differs, and it is no choice between several of the same sizes."""
        given = dict(self.sizes)
        shared = [name for name in fields if name in given]
        equal = all(given[name] == getattr(layout, name) for name in shared)
        return bool(shared) and equal and self.kind not in PARTIAL


@dataclass(frozen=True)
class Row:
    """A layout that fits: predicted seconds of a step and bytes of the fullest GPU."""

    layout: Layout
    seconds: float
    memory: float


@dataclass
class Plan:
    """The result. `rows`: what was asked for, from the fastest. `everything`: those and all rivals, likewise.
    `rejected`: in the order of the search."""

    model: ModelSpec
    cluster: Cluster
    job: Job
    software: Software
    gpus: int
    limits: Limits = field(default_factory=Limits)
    rows: list[Row] = field(default_factory=list)
    everything: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @functools.cached_property
    def scenario(self) -> Scenario:
        return Scenario(self.model, self.job, self.cluster, self.software)

    def predict(self, layout: Layout) -> Prediction:
        """Everything about one layout."""
        return PREDICT[self.job.task](self.scenario, layout)

    def best(self, wanted: Callable[[Layout], bool]) -> Row | None:
        """The fastest row of a family, asked for or not."""
        return next((row for row in self.everything if wanted(row.layout)), None)
