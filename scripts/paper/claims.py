"""What the paper and its deployment plan state, as they state it."""

from __future__ import annotations

from dataclasses import dataclass

GPUS = 16
BATCH = 1024
SEQUENCE = 10000
HIDDEN = 8192
HEADS = 16
HEAD_DIM = 512
FFN = 32768
LAYERS = 4
EXPERTS = 8
EXPERTS_PER_TOKEN = 2  # the paper does not say; Mixtral's number
SEGMENTS = 4  # m of the deployment plan; the paper also names m = 2, n = 8


@dataclass(frozen=True)
class Claim:
    """A row of the paper's table: tokens/s on 16 H100, and the time per output token in milliseconds, which
    it defines as the average synchronization and communication overhead per token."""

    model: str
    method: str
    tokens_per_second: float
    tpot_ms: float


BASELINE, PROPOSED = "Baseline (TP=8, PP=2)", "Proposed (m×n=16)"
CLAIMS = (
    Claim("dense", BASELINE, 1.20e6, 0.35),
    Claim("dense", PROPOSED, 1.58e6, 0.22),
    Claim("moe", BASELINE, 0.85e6, 0.45),
    Claim("moe", PROPOSED, 1.15e6, 0.30),
)
# (model, improvement of tokens/s, reduction of the overhead), as the paper prints them.
IMPROVEMENTS = (("dense", 0.317, 0.371), ("moe", 0.353, 0.333))


def claim(model: str, method: str) -> Claim:
    """The row of a model and method."""
    return next(row for row in CLAIMS if (row.model, row.method) == (model, method))
