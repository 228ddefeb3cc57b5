"""Choosing tokens from logits: greedy, temperature, top-k, top-p.

A token depends on the logits, the sampling and (seed, number of the token), never on what else is in the batch
or on how often the sequence was computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from helix_megatron.inference.request import Sampling


def sample(
    logits_BV: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]
) -> list[int | None]:
    """One token for each row; None where a logit is infinite or no number.

    Args:
        logits_BV: the logits, [B, V].
        samplings: how the token of each row is chosen; one that is not greedy has a seed.
        indices: how many tokens each sequence has been given before.
    """
    # -inf is how a model may exclude a token.
    finite_B = (logits_BV < float("inf")).all(-1) & logits_BV.isfinite().any(-1)
    tokens_B = logits_BV.argmax(-1)
    rows = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if rows:
        chosen = [samplings[row] for row in rows]
        draws = [_draw(samplings[row].seed, indices[row]) for row in rows]
        rows_b = torch.tensor(rows, device=logits_BV.device)
        tokens_B[rows_b] = _sample(logits_BV[rows_b], chosen, draws)
    # The one thing in a step that the host waits for.
    tokens = tokens_B.where(finite_B, -1).tolist()
    return [token if token >= 0 else None for token in tokens]


def _sample(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """The inverse of the cumulative distribution at the draws, tokens in order of their probability."""

    vocabulary = logits_BV.size(1)
    settings = [
        (s.temperature, s.top_k or vocabulary, s.top_p, draw)
        for s, draw in zip(samplings, draws, strict=True)
    ]
    columns = torch.tensor(settings, dtype=torch.float64, device=logits_BV.device)
    temperature, top_k, top_p, draw_B1 = columns.split(1, dim=1)
    sorted_BV, order_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    sorted_BV = sorted_BV - sorted_BV[:, :1]  # no overflow at tiny temperatures
    weights_BV = (sorted_BV / temperature).exp()
    rank = torch.arange(vocabulary, device=logits_BV.device)
    weights_BV = weights_BV * (rank < top_k)
    weights_BV /= weights_BV.sum(-1, keepdim=True)
    before_BV = weights_BV.cumsum(-1) - weights_BV
    weights_BV = weights_BV * (before_BV < top_p)
    sums_BV = weights_BV.cumsum(-1)
    place = (sums_BV <= draw_B1 * sums_BV[:, -1:]).sum(-1, keepdim=True)
    last = (weights_BV > 0).sum(-1, keepdim=True) - 1
    # A row of no numbers has no last one; its token is not used.
    return order_BV.gather(1, torch.minimum(place, last).clamp(min=0)).squeeze(1)


def _draw(seed: int | None, index: int) -> float:
    """A number in [0, 1) that belongs to one token of one sequence."""
    assert seed is not None, "the engine gives every sequence a seed"
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())
