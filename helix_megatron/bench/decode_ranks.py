"""What each rank does for `bench decode`: fill all caches alike, compare logits, time steps, count bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor

from helix_megatron.bench.contest import helix_ranks
from helix_megatron.bench.decode_case import (
    CONTESTANTS,
    STOCK,
    STOCK_PAGED,
    DecodeCase,
    Measured,
)
from helix_megatron.bench.timing import interleaved
from helix_megatron.core.caches import WHOLE_HEADS
from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.pages import Piece
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.meter import EXCHANGE, measure
from helix_megatron.core.observe import purpose
from helix_megatron.errors import HelixError
from helix_megatron.inference.megatron_runner import MegatronRunner
from helix_megatron.inference.runner import make_book
from helix_megatron.inference.step import StepPlan
from helix_megatron.megatron.gpt import build_chunk, transformer_config
from helix_megatron.megatron.initialize import initialize_weights, weights_not_drawn
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

LIMIT = 1e-4
"""Largest difference of logits, of the largest logit, that rounding in fp32 explains."""
PAGE_SIZE = 16
VOCABULARY = 256
KEY_SCALE = 4.0  # softmax then picks a few keys, and a key in the wrong place changes the logits


class Whole(NamedTuple):
    """Keys and values [S, g, d] of one layer of one sequence, dimensions in canonical order.

    k: as projected; turned: by the rotary embedding of their positions.
    """

    k: Tensor
    turned: Tensor
    v: Tensor


def measure_decode(case: DecodeCase, turns: int) -> Measured:
    """To be called on the ranks of a world that is exactly the case's.

    Raises:
        HelixError: the logits of somebody differ from stock's. Nothing has been timed then.
    """
    with helix_ranks(case.ranks, case.layout.segments):
        contestants = build_contestants(case)
        fill_caches(contestants, case)
        differences = check_equal(contestants, case)
        samples = interleaved({n: c.step for n, c in contestants.items()}, turns)
        sent = {}
        for name, contestant in contestants.items():
            with measure() as meter:
                contestant.step()
            sent[name] = _total(meter.bytes(EXCHANGE))
        kept = {name: _total(contestant.cache_bytes) for name, contestant in contestants.items()}
        return Measured(differences, samples, sent, kept)


def build_contestants(case: DecodeCase) -> dict[str, Contestant]:
    """By name; models of their own with the same canonical weights."""
    return {name: StockStatic(case) if name == STOCK else Paged(case, name) for name in CONTESTANTS}


def fill_caches(contestants: Mapping[str, Contestant], case: DecodeCase) -> None:
    """Give everybody the same keys and values at all positions but the last."""
    stock = contestants[STOCK]
    assert isinstance(stock, StockStatic)
    with torch.inference_mode():
        angles = stock.model.rotary_pos_emb(case.context - 1)
        for layer in range(case.layers):
            for sequence in range(case.sequences):
                random = torch.Generator().manual_seed(1000 * layer + sequence)
                shape = (2, case.context - 1, case.kv_heads, case.head_dim)
                k, v = torch.randn(shape, generator=random)
                k *= KEY_SCALE
                turned = apply_rotary_pos_emb(k.unsqueeze(1), angles, config=stock.model.config)
                for contestant in contestants.values():
                    contestant.fill(layer, sequence, Whole(k, turned.squeeze(1), v))


def check_equal(contestants: Mapping[str, Contestant], case: DecodeCase) -> dict[str, float]:
    """Differences of everybody's logits from stock's, of the largest.

    Raises:
        HelixError: one exceeds what rounding explains.
    """
    found = {name: contestant.step() for name, contestant in contestants.items()}
    errors = torch.zeros(len(found), dtype=torch.float64)
    wanted = found[STOCK]
    if dist.get_rank() == 0:
        assert wanted is not None
        for index, logits in enumerate(found.values()):
            assert logits is not None
            errors[index] = ((logits - wanted).abs().max() / wanted.abs().max()).item()
    dist.broadcast(errors, 0)
    differences = dict(zip(found, errors.tolist(), strict=True))
    for name, error in differences.items():
        if not error <= LIMIT:
            raise HelixError(
                f"the logits of {name} at context {case.context} differ from stock's by {error:.1e} of the "
                f"largest; rounding in fp32 explains {LIMIT:.0e}. Nothing was timed: the time of a wrong step "
                "means nothing. This is a fault of helix_megatron, please report it."
            )
    return differences


class Paged:
    """This package's engine with one of its cache layouts, or with stock's gathered QKV and whole heads.

    Like `StockStatic` it has `cache_bytes`, of keys and values on this rank; `fill`, which keeps its part of
    those before the new token; and `step`, the logits [sequences, vocabulary] after it, on rank 0 at least.
    """

    def __init__(self, case: DecodeCase, name: str) -> None:
        self.case, self.gathers = case, name == STOCK_PAGED
        self.rank = dist.get_rank()
        model = build_model(case, segments=1 if self.gathers else case.layout.segments)
        self.layout = case.layout
        if self.gathers:
            # Each rank's copy of a key-value head, as if there were one head for every rank.
            self.layout = HeadLayout(case.heads, case.ranks, case.head_dim, case.ranks)
        cache = WHOLE_HEADS if self.gathers else name
        sizes: dict[str, Any] = {
            "page_size": PAGE_SIZE,
            "max_context": case.context,
            "vocab_size": VOCABULARY,
        }
        pages = _pages_needed(case, cache, self.layout.segments)
        self.runner = MegatronRunner(model, self.layout, cache=cache, pages=pages, **sizes)
        (self.tables,) = self.runner.tables  # layers without windows
        self.me = self.runner.attentions[0].me if self.tables.members > 1 else 0
        for layer in model.decoder.layers:
            if self.gathers:
                _label_gather(layer.self_attention.inner)
        self.plan = StepPlan(pieces=tuple(map(self._piece, range(case.sequences))))
        book = _book(cache, self.layout.segments, pages, case)
        for sequence in range(case.sequences):
            self.tables.add(sequence, sequence % book.members)
            self.tables.extend(sequence, book.blocks(sequence))

    @property
    def cache_bytes(self) -> int:
        return self.runner.cache.nbytes

    def fill(self, layer: int, sequence: int, whole: Whole) -> None:
        positions = self.tables.positions(sequence, self.me, self.case.context - 1)
        if len(positions):
            slots = torch.from_numpy(self.tables.slots(sequence, self.me, positions))
            parts = (part[torch.from_numpy(positions)] for part in (whole.turned, whole.v))
            self.runner.cache.write(layer, slots, *map(self._own, parts))

    def step(self) -> Tensor | None:
        return self.runner.run(self.plan)

    def _own(self, x_SGD: Tensor) -> Tensor:
        """The heads and dimensions that this rank keeps, dimensions in its order."""
        if self.gathers:
            return x_SGD[:, [_stock_head(self.case, self.rank)]]
        layout = self.layout
        x_SGD = x_SGD[:, list(layout.kv_heads(self.rank))]
        if self.runner.cache.k[0].size(-1) == layout.segment_dim:
            return x_SGD[..., layout.segment_dims(self.rank % layout.segments)]
        if layout.query_layout == "heads":
            return x_SGD
        dims = [layout.segment_dims(member) for member in range(layout.segments)]
        return x_SGD[..., np.concatenate(dims)]

    def _piece(self, sequence: int) -> Piece:
        token, last = np.asarray([_token(sequence)]), self.case.context - 1
        return Piece(sequence, last, token, sequence % self.tables.members, wanted=1)


class StockStatic:
    """megatron-core with its static context."""

    def __init__(self, case: DecodeCase) -> None:
        self.case, self.rank = case, dist.get_rank()
        self.model = build_model(case, segments=1)
        self.context = StaticInferenceContext(case.sequences, case.context)
        self.memory = self.context.key_value_memory_dict
        shape = (case.context, case.sequences, 1, case.head_dim)
        for layer in self.model.decoder.layers:
            _label_gather(layer.self_attention)
            self.memory[layer.layer_number] = (torch.empty(shape), torch.empty(shape))
        self.context.sequence_len_offset = case.context - 1
        self.tokens = torch.tensor([[_token(sequence)] for sequence in range(case.sequences)])
        self.positions = torch.full_like(self.tokens, case.context - 1)

    @property
    def cache_bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.memory.values())

    def fill(self, layer: int, sequence: int, whole: Whole) -> None:
        head = _stock_head(self.case, self.rank)
        for pool, part in zip(self.memory[layer + 1], (whole.k, whole.v), strict=True):
            pool[:-1, sequence, 0] = part[:, head]

    @torch.inference_mode()
    def step(self) -> Tensor:
        how = {"inference_context": self.context, "runtime_gather_output": True}
        logits = self.model(self.tokens, self.positions, None, **how)
        return logits[:, -1, :VOCABULARY]


Contestant = Paged | StockStatic


def build_model(case: DecodeCase, segments: int) -> Any:
    """This rank's part of a `GPTModel` in eval mode, heads cut into so many segments."""
    flags = (
        f"--num-layers {case.layers} --hidden-size {case.hidden_size} --num-attention-heads {case.heads} "
        f"--group-query-attention --num-query-groups {case.kv_heads} --kv-channels {case.head_dim} "
        f"--seq-length {case.context} --vocab-size {VOCABULARY} --position-embedding-type rope --swiglu "
        "--normalization RMSNorm --disable-bias-linear --seed 1 "
        f"--tensor-model-parallel-size {case.ranks} --intra-head-parallel-size {segments} "
    )
    if segments > 1:
        flags += f"--helix-query-layout {case.query_layout}"
    run = validate(parse_args(flags.split()), case.ranks)
    config = transformer_config(run)
    with weights_not_drawn(config):
        model = build_chunk(run, config)
    initialize_weights(model, config, run.training.seed)
    return model.eval()


def _label_gather(attention: Any) -> None:
    """Let the meter know what stock gathers for its queries, keys and values."""
    original = attention.get_query_key_value_tensors

    @functools.wraps(original)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        with purpose(f"{EXCHANGE}/stock"):
            return original(*args, **kwargs)

    attention.get_query_key_value_tensors = labelled


def _pages_needed(case: DecodeCase, cache: str, members: int) -> int:
    """Pages of the fullest pool, found in books that are large enough."""
    blocks = -(-case.context // PAGE_SIZE)
    book = _book(cache, members, case.sequences * blocks, case)
    return max(pool.total - pool.free for pool in book.pools)


def _book(cache: str, members: int, pages: int, case: DecodeCase) -> PageBook:
    """With the pages of all sequences."""
    book = make_book(cache, members, pages, PAGE_SIZE)
    assert isinstance(book, PageBook)  # layers without windows
    for sequence in range(case.sequences):
        book.add(sequence, sequence % book.members, case.context)
        assert book.grow(sequence, case.context), "there are as many pages as are needed"
    return book


def _stock_head(case: DecodeCase, rank: int) -> int:
    """The key-value head of which a rank of stock Megatron keeps a copy."""
    return rank * case.kv_heads // case.ranks


def _token(sequence: int) -> int:
    return 7 * sequence % VOCABULARY


def _total(number: int) -> int:
    """Of all ranks."""
    total = torch.tensor(number)
    dist.all_reduce(total)
    return int(total)
