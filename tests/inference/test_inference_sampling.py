"""Choosing tokens, and attention over part of the keys: against definitions written out."""

from __future__ import annotations

import dataclasses

import inference_models as models
import numpy as np
import pytest
import torch

from helix_megatron.core.caches.paged import KeptHeads, LocalPiece, PagedCache, PagedWork
from helix_megatron.core.kernels.partial import fused_on_cpu, merge, partial_kernel, unfused
from helix_megatron.errors import HelixError
from helix_megatron.inference.request import Sampling
from helix_megatron.inference.sampler import Place, logprobs_of, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 4000


def frequencies(sampling: Sampling) -> np.ndarray:
    """Of the tokens that the sampler gives for `LOGITS`, one seed, many places."""
    tokens = tokens_of(LOGITS.expand(DRAWS, -1), [Place(sampling, n) for n in range(DRAWS)])
    return np.bincount(tokens, minlength=len(LOGITS)) / DRAWS


def tokens_of(logits: torch.Tensor, places: list[Place]) -> list[int | None]:
    return [None if choice is None else choice.token for choice in sample(logits, places)]


def expected(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    p = (LOGITS.double() / temperature).softmax(-1).numpy()
    if top_k:
        p[np.argsort(-p)[top_k:]] = 0
        p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.0, 2, 0.9), (1.0, 1, 1.0)],
)
def test_tokens_come_as_often_as_they_should(temperature, top_k, top_p):
    """Within four standard deviations of the distribution that the parameters define."""
    found = frequencies(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=3))
    wanted = expected(temperature, top_k, top_p)
    assert (found[wanted == 0] == 0).all()
    assert (abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1e-12).all()


def test_greedy_and_sampled_rows_together():
    """Greedy rows take the largest logit, whatever their neighbours do; no temperature overflows."""
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS * 1e4])
    greedy, cold = Sampling(temperature=0), Sampling(temperature=1e-6, seed=1)
    assert tokens_of(rows, [Place(greedy), Place(greedy, 5), Place(cold, 9)]) == [0, 5, 0]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_harm_their_own_row_only(temperature):
    """Overflow in one prompt must not end what others wait for; -inf only excludes a token."""
    rows = LOGITS.repeat(5, 1)
    rows[0, 2] = float("nan")
    rows[1, 3] = float("inf")
    rows[2, 0] = float("-inf")
    rows[3] = float("-inf")
    for logprobs in (None, 2):
        sampling = Sampling(temperature=temperature, top_k=1, seed=1, logprobs=logprobs)
        tokens = tokens_of(rows, [Place(sampling, n) for n in range(5)])
        assert tokens == [None, None, 1, None, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. It must be a whole number of at least 1."),
        ({"temperature": -1.0}, "temperature is -1.0. It must be a finite number of at least 0."),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1. It must be a whole number of at least 0."),
        ({"top_p": 1.5}, "top_p is 1.5. It must be a finite number above 0 and at most 1."),
        ({"seed": -1}, "seed is -1. It must be a whole number of at least 0."),
        ({"min_p": 2.0}, "min_p is 2.0. It must be a finite number of at least 0 and at most 1."),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0. It must be a finite number of at"),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty is 0.0. It must be a finite number above",
        ),
    ],
)
def test_wrong_sampling_is_refused(wrong, message):
    with pytest.raises(HelixError, match=message):
        Sampling(**wrong)


def processed(row: torch.Tensor, sampling: Sampling, prompt: list[int], output: list[int]):
    """Probabilities by transformers' own processors; OpenAI's penalties, which it has not, by their formula."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    ids = torch.tensor([[*prompt, *output]])
    bias = [[[token], value] for token, value in sampling.logit_bias]
    before = LogitsProcessorList([SequenceBiasLogitsProcessor(bias)] if bias else [])
    before.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    scores = before(ids, row[None].clone())
    for token in range(len(row)):
        count = output.count(token)
        scores[0, token] -= count * sampling.frequency_penalty
        scores[0, token] -= (count > 0) * sampling.presence_penalty
    after = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        after.append(TopKLogitsWarper(sampling.top_k))
    after += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    return after(ids, scores).softmax(-1)[0]


PROCESSED = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.7},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": ((0, -100.0), (3, 2.5))},
    "min-p": {"min_p": 0.3},
    "all": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
        "logit_bias": ((4, 1.5), (5, 4.0)),
        "temperature": 0.8,
        "top_k": 5,
        "top_p": 0.95,
        "min_p": 0.05,
    },
}


@pytest.mark.parametrize("name", PROCESSED)
def test_logits_are_changed_as_transformers_does(name):
    """Frequencies of many draws within four standard deviations of the processors' probabilities."""
    sampling = Sampling(**{"temperature": 1.0, "seed": 5} | PROCESSED[name])
    prompt, output = [0, 2], [1, 1, 3]
    wanted = processed(LOGITS.double(), sampling, prompt, output).numpy()
    seeds = [dataclasses.replace(sampling, seed=seed) for seed in range(DRAWS)]
    places = [Place(one, len(output), [*prompt, *output]) for one in seeds]
    found = np.bincount(tokens_of(LOGITS.expand(DRAWS, -1), places), minlength=6) / DRAWS
    assert not np.allclose(wanted, LOGITS.double().softmax(-1).numpy(), atol=0.01)
    assert (found[wanted == 0] == 0).all()
    assert (abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1e-12).all()
    greedy = Place(dataclasses.replace(sampling, temperature=0), 3, [*prompt, *output])
    assert tokens_of(LOGITS[None], [greedy]) == [int(wanted.argmax())]


def test_logprobs_are_those_of_the_model():
    """Before bias, penalties and temperature; the likeliest first, only as many as each row wants."""
    rows = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    plain = Sampling(temperature=0)
    asked = dataclasses.replace(plain, logprobs=2, logit_bias=((3, 100.0),))
    own = dataclasses.replace(plain, logprobs=0)
    chosen = sample(rows, [Place(asked), Place(own), Place(plain)])
    wanted = LOGITS.double().log_softmax(-1)
    assert [choice.token for choice in chosen if choice] == [3, 5, 0]
    first, second, third = (choice.logprobs for choice in chosen if choice)
    assert third is None
    assert first.logprob == pytest.approx(wanted[3].item(), abs=1e-12)
    assert [token for token, _ in first.top] == [0, 1]
    assert [value for _, value in first.top] == pytest.approx(wanted[:2].tolist(), abs=1e-12)
    assert (second.token, second.top) == (5, ())
    (given,) = logprobs_of(LOGITS[None], [4], 1)
    assert given.logprob == pytest.approx(wanted[4].item(), abs=1e-12)
    assert given.top == ((0, pytest.approx(wanted[0].item(), abs=1e-12)),)


# ---------------------------------------------------------------------------- attention


def reference(q, k, v, bias, scale):
    """In fp64, with repeated keys and the full softmax."""
    q, k, v = (x.double() for x in (q, k, v))
    repeat = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(2, 3) * scale + bias.double()
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("kernel", [unfused, fused_on_cpu])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_partial_kernels(kernel, heads):
    """Both against the definition; what is hidden by the bias has no say."""
    torch.manual_seed(1)
    q = torch.randn(2, heads[0], 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads[1], 11, 8, dtype=torch.float64)
    bias = torch.zeros(2, 1, 5, 11, dtype=torch.float64)
    bias[0, :, :, 7:] = bias[1, :, 2, :9] = float("-inf")
    o, lse = kernel(q, k, v, bias, 0.3)
    wanted, wanted_lse = reference(q, k, v, bias, 0.3)
    torch.testing.assert_close(o, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-12)


def test_disjoint_parts_merge_to_the_whole():
    """Also where one part sees nothing, and where none does."""
    torch.manual_seed(2)
    q = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, 3, 12, 8, dtype=torch.float64)
    whole, _ = unfused(q, k, v, None, 1.0)
    parts = [
        unfused(q, k[:, :, part], v[:, :, part], None, 1.0) for part in (slice(5), slice(5, 12))
    ]
    o = torch.stack([part[0][0].transpose(0, 1) for part in parts])
    lse = torch.stack([part[1][0].transpose(0, 1) for part in parts])
    torch.testing.assert_close(merge(o, lse), whole[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
    nothing = torch.full_like(lse[:1], float("-inf"))
    more = merge(torch.cat([o, torch.zeros_like(o[:1])]), torch.cat([lse, nothing]))
    torch.testing.assert_close(more, whole[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
    blind = merge(torch.zeros_like(o), torch.full_like(lse, float("-inf")))
    assert (blind == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, (9, 0)])
def test_paged_attention_equals_attention_over_gathered_keys(dtype, window):
    """Runs of pages, scattered pages, sequences of every length together, chunks, and keys that are nowhere."""
    torch.manual_seed(3)
    page_size, pages, groups, heads, dims = 4, 400, 2, 6, 8
    kept = KeptHeads(pages, groups, dims, dims)
    cache = PagedCache([kept], page_size, dtype, torch.device("cpu"))
    cache.k[0].normal_()
    cache.v[0].normal_()
    random = np.random.default_rng(4)
    pieces, rows = [], 0
    free = list(random.permutation(np.arange(100, pages)))
    for queries, keys, run, every in [
        (1, 1, False, 1),
        (1, 13, False, 1),
        (1, 30, False, 1),
        (1, 32, False, 3),
        (1, 300, True, 1),
        (6, 40, False, 1),
        (7, 7, True, 1),
        (5, 21, False, 2),
    ]:
        count = -(-keys // page_size)
        own = list(range(count)) if run else [int(free.pop()) for _ in range(count)]
        positions = np.arange(keys) * every  # as where other members keep what lies between
        start = positions[-1] + 1 - queries + every // 2
        pieces.append(LocalPiece((rows, rows + queries), int(start), own, positions))
        rows += queries
    rows += 2  # queries without keys here
    q = torch.randn(rows, heads, dims).to(dtype)
    work = PagedWork(pieces, rows, page_size, dtype, torch.device("cpu"))
    o, lse = work.attend(q, cache.k[0], cache.v[0], scale=0.4, window=window)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (o.dtype, lse.dtype) == (dtype, wide)

    wanted = torch.zeros(rows, heads, dims, dtype=torch.float64)
    wanted_lse = torch.full((rows, heads), float("-inf"), dtype=torch.float64)
    for piece in pieces:
        count = len(piece.positions)
        k, v = (pool[0][list(piece.pages)].flatten(0, 1)[:count] for pool in (cache.k, cache.v))
        for row in range(*piece.rows):
            at = piece.start + row - piece.rows[0]
            seen = piece.positions <= at
            if window is not None:
                seen &= piece.positions >= at - window[0]
            if seen.any():
                bias = torch.zeros(1)
                arguments = (
                    q[None, row, :, None],
                    *(x[seen].transpose(0, 1)[None] for x in (k, v)),
                )
                one, one_lse = reference(*arguments, bias, 0.4)
                wanted[row], wanted_lse[row] = one[0, :, 0], one_lse[0, :, 0]
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert o.isfinite().all()
    assert o.abs().max() > 0.1
    torch.testing.assert_close(o.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=tolerance, atol=tolerance)


def test_devices_without_flash_attention_get_plain_torch():
    assert partial_kernel(torch.device("cuda")) is unfused
    assert partial_kernel(torch.device("cpu")) is fused_on_cpu


def sampled(text: str, world_size: int, cache: str, seed: int) -> list[list[int]] | None:
    sampling = Sampling(max_tokens=16, temperature=1.5, top_k=50, top_p=0.9, seed=seed)
    answer = models.generate(text, world_size, cache, models.prompts(), sampling)
    return answer.get("tokens")


def test_sampled_tokens_belong_to_the_seed(pool):
    """The same at every layout and whatever else is in the batch; others for another seed."""
    heads = models.HEADS["GQA"]
    alone = pool.run(sampled, models.flags(*heads), 1, "batch", 7, world_size=1)[0]
    text = models.flags(*heads, ranks=4, segments=2)
    assert pool.run(sampled, text, 4, "sequence", 7, world_size=4)[0] == alone
    assert pool.run(sampled, text, 4, "batch", 8, world_size=4)[0] != alone
