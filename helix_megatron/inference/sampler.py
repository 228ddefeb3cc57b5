"""Choosing tokens from logits: bias, penalties, greedy, temperature, top-k, top-p, min-p; log-probabilities.

A token depends on the logits, the sampling, the sequence so far and (seed, number of the token), never on what
else is in the batch or on how often the sequence was computed anew.

Letters of shapes: B rows, V tokens of the vocabulary, K alternatives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helix_megatron.core.device import on_device
from helix_megatron.inference.request import Sampling, TokenLogprobs


@dataclass(frozen=True)
class Place:
    """Where a token is to be chosen.

    Args:
        sampling: how; one that is not greedy has a seed.
        index: how many tokens the sequence has been given before.
        tokens: the sequence so far, prompt and output; only penalties look at it.
        allowed: bool [V], the tokens that may be chosen, at least one; None allows all.
    """

    sampling: Sampling
    index: int = 0
    tokens: Sequence[int] = ()
    allowed: np.ndarray | None = None


class Chosen(NamedTuple):
    """A token, and its log-probabilities where they are wanted."""

    token: int
    logprobs: TokenLogprobs | None = None


def sample(logits_BV: Tensor, places: Sequence[Place]) -> list[Chosen | None]:
    """One token for each row; None where a logit is infinite or no number.

    Args:
        logits_BV: the logits, [B, V].
        places: of each row.
    """
    # -inf is how a model may exclude a token.
    finite_B = (logits_BV < float("inf")).all(-1) & logits_BV.isfinite().any(-1)
    changed_BV = _changed(logits_BV, places)
    tokens_B = changed_BV.argmax(-1)
    rows = [row for row, place in enumerate(places) if not place.sampling.greedy]
    if rows:
        chosen = [places[row].sampling for row in rows]
        draws = [_draw(places[row].sampling.seed, places[row].index) for row in rows]
        rows_b = _index(rows, logits_BV.device)
        tokens_B[rows_b] = _sample(changed_BV[rows_b], chosen, draws)
    tokens_B = tokens_B.where(finite_B, -1)
    wanted = [(row, place.sampling.logprobs) for row, place in enumerate(places)]
    asked = {row: most for row, most in wanted if most is not None}
    if not asked:
        # The one thing in a step that the host waits for; below, it is the other branch's.
        return [Chosen(token) if token >= 0 else None for token in tokens_B.tolist()]
    rows_b = _index(list(asked), logits_BV.device)
    packed_bK = _packed_logprobs(logits_BV[rows_b], tokens_B[rows_b], max(asked.values()))
    columns = packed_bK.new_zeros(len(places), 1 + packed_bK.size(1))
    columns[:, 0] = tokens_B
    columns[rows_b, 1:] = packed_bK
    return [
        None
        if token < 0
        else Chosen(int(token), _unpacked(int(token), row, asked[i]) if i in asked else None)
        for i, (token, *row) in enumerate(columns.tolist())
    ]


def logprobs_of(logits_BV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """The log-probability of a given token in each row, and those of the `top` likeliest ones."""
    tokens_B = _index(tokens, logits_BV.device)
    packed = _packed_logprobs(logits_BV, tokens_B, top).tolist()
    return [_unpacked(token, row, top) for token, row in zip(tokens, packed, strict=True)]


def _packed_logprobs(logits_BV: Tensor, tokens_B: Tensor, top: int) -> Tensor:
    """[B, 1 + 2K] in fp64: a token's own log-probability, the likeliest tokens, and theirs."""
    logprobs_BV = logits_BV.double().log_softmax(-1)
    own_B1 = logprobs_BV.gather(1, tokens_B.clamp(min=0).unsqueeze(1))
    best_BK, order_BK = logprobs_BV.topk(min(top, logits_BV.size(1)), dim=-1)
    return torch.cat([own_B1, order_BK.double(), best_BK], dim=1)


def _unpacked(token: int, row: Sequence[float], top: int) -> TokenLogprobs:
    own, *rest = row
    most = len(rest) // 2
    pairs = zip(map(int, rest[:most]), rest[most:], strict=True)
    return TokenLogprobs(token, own, tuple(pairs)[:top])


def _changed(logits_BV: Tensor, places: Sequence[Place]) -> Tensor:
    """The logits after biases, penalties and what is not allowed; the same tensor where there is none of it."""
    masks = {row: place.allowed for row, place in enumerate(places) if place.allowed is not None}
    if masks:
        hidden_bV = on_device(~np.stack(list(masks.values())), logits_BV.device)
        rows_b = _index(list(masks), logits_BV.device)
        allowed_bV = logits_BV[rows_b].masked_fill(hidden_bV, float("-inf"))
        logits_BV = logits_BV.index_put((rows_b,), allowed_bV)
    changes: list[tuple[float, ...]] = []  # row, token, bias, repetition penalty, what is taken off
    for row, place in enumerate(places):
        sampling = place.sampling
        if not sampling.changes_logits:
            continue
        bias = dict(sampling.logit_bias)
        given = Counter(place.tokens[len(place.tokens) - place.index :])
        seen = set(place.tokens) if sampling.repetition_penalty != 1 else set()
        for token in sorted(bias.keys() | given.keys() | seen):
            count = given[token]
            taken = count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
            factor = sampling.repetition_penalty if token in seen else 1.0
            changes.append((row, token, bias.get(token, 0.0), factor, taken))
    if not changes:
        return logits_BV
    table = on_device(np.asarray(changes, dtype=np.float64).T, logits_BV.device)
    rows, tokens = table[0].long(), table[1].long()
    bias_N, factor_N, taken_N = table[2:]
    values_N = logits_BV[rows, tokens].double() + bias_N
    values_N = torch.where(values_N < 0, values_N * factor_N, values_N / factor_N) - taken_N
    return logits_BV.index_put((rows, tokens), values_N.to(logits_BV.dtype))


def _sample(logits_BV: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """The inverse of the cumulative distribution at the draws, tokens in order of their probability."""
    vocabulary = logits_BV.size(1)
    settings = [
        (s.temperature, s.top_k or vocabulary, s.top_p, s.min_p, draw)
        for s, draw in zip(samplings, draws, strict=True)
    ]
    columns = on_device(np.asarray(settings, dtype=np.float64), logits_BV.device)
    temperature, top_k, top_p, min_p, draw_B1 = columns.split(1, dim=1)
    sorted_BV, order_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    sorted_BV = sorted_BV - sorted_BV[:, :1]  # no overflow at tiny temperatures
    weights_BV = (sorted_BV / temperature).exp()
    rank = torch.arange(vocabulary, device=logits_BV.device)
    weights_BV = weights_BV * (rank < top_k)
    weights_BV /= weights_BV.sum(-1, keepdim=True)
    before_BV = weights_BV.cumsum(-1) - weights_BV
    weights_BV = weights_BV * (before_BV < top_p)
    weights_BV = weights_BV * (weights_BV >= min_p * weights_BV[:, :1])
    sums_BV = weights_BV.cumsum(-1)
    place = (sums_BV <= draw_B1 * sums_BV[:, -1:]).sum(-1, keepdim=True)
    last = (weights_BV > 0).sum(-1, keepdim=True) - 1
    # A row of no numbers has no last one; its token is not used.
    return order_BV.gather(1, torch.minimum(place, last).clamp(min=0)).squeeze(1)


def _draw(seed: int | None, index: int) -> float:
    """A number in [0, 1) that belongs to one token of one sequence."""
    assert seed is not None, "the engine gives every sequence a seed"
    return float(np.random.Generator(np.random.Philox(key=seed, counter=index)).random())


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return on_device(np.asarray(values, dtype=np.int64), device)
