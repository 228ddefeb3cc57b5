"""Small models with the same weights at every layout, and engines of them on the ranks of a pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.pages import Piece
from helix_megatron.inference.request import Capacity, Output, Request, Sampling

# Weights so large that the most likely token leads by far more than rounding can change.
MODEL = (
    "--num-layers 2 --hidden-size 32 --kv-channels 16 --seq-length 32 --max-position-embeddings 512 --swiglu "
    "--normalization RMSNorm --init-method-std 0.2 --disable-bias-linear --seed 11"
)
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
VOCABULARY = 256
LENGTHS = (1, 3, 17, 40, 64)
PAGE = 8


def flags(heads: int, kv_heads: int, *, ranks: int = 1, segments: int = 1, more: str = "") -> str:
    """Of the training script, for `build`."""
    return (
        f"{MODEL} --num-attention-heads {heads} --group-query-attention --num-query-groups {kv_heads} "
        f"--tensor-model-parallel-size {ranks} --intra-head-parallel-size {segments} {more}"
    )


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def build(text: str, world_size: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(arguments, GPTModel in eval mode) of this rank."""
    from training_runs import build as build_model

    args, _, model = build_model(text, world_size)
    return args, model.to(dtype).eval()


def make_engine(
    text: str,
    world_size: int,
    cache: str,
    *,
    dtype: torch.dtype = torch.float32,
    pages: Any = 400,
    page_size: int = PAGE,
    max_context: int = 512,
    max_sequences: int = 64,
    max_waiting: int = 1000,
    prefill_chunk: int = 32,
    shares: bool = True,
) -> tuple[Any, Any]:
    """(runner, engine) of this rank; the engine is None but on rank 0."""
    import torch.distributed as dist

    from helix_megatron.inference.engine import Engine
    from helix_megatron.inference.megatron_runner import MegatronRunner
    from helix_megatron.inference.runner import make_book
    from helix_megatron.inference.scheduler import Scheduler

    args, model = build(text, world_size, dtype)
    runner = MegatronRunner(
        model,
        args.layout,
        cache=cache,
        pages=pages,
        page_size=page_size,
        max_context=max_context,
        vocab_size=VOCABULARY,
        attention=args.helix.attention,
    )
    if dist.get_rank():
        return runner, None
    book = make_book(cache, runner.members, pages, page_size, shares=shares)
    scheduler = Scheduler(book, max_sequences, prefill_chunk)
    capacity = Capacity(VOCABULARY, max_context, max_sequences, max_waiting)
    return runner, Engine(runner, scheduler, capacity)


def book_of(runner: Any, pages: int) -> PageBook:
    """A book for steps that a test makes by hand; the same calls give the same pages on every rank."""
    tables = runner.tables[0]
    return PageBook(tables.members, pages, tables.page_size, dealt=tables.dealt)


def piece_of(book: PageBook, number: int, start: int, tokens: Any, wanted: int = 1) -> Piece:
    """The next tokens of a sequence, with pages for them."""
    member = number % book.members
    if number not in book:
        book.add(number, member)
    assert book.grow(number, start + len(tokens)), "the test has too few pages"
    tokens = np.asarray(tokens, dtype=np.int64)
    return Piece(number, start, tokens, member, book.tell(number), wanted)


class Collected:
    """A listener that keeps the tokens and how it ended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.output: Output | None = None
        self.ended = threading.Event()

    def __call__(self, output: Output) -> None:
        assert self.output is None, "nothing comes after the end"
        self.tokens += output.tokens
        if output.reason is not None:
            self.output = output
            self.ended.set()


def generate(
    text: str,
    world_size: int,
    cache: str,
    asked: Sequence[Sequence[int]],
    sampling: Sampling,
    **options: Any,
) -> dict[str, Any]:
    """Generate for prompts on this rank and the others: rank 0's tokens, reasons and statistics."""
    from helix_megatron.inference.engine import follow

    runner, engine = make_engine(text, world_size, cache, **options)
    if engine is None:
        follow(runner)
        return {"left": len(runner.tables[0])}
    collected = [Collected() for _ in asked]
    engine.submit(
        [
            Request(tuple(prompt), sampling, listener)
            for prompt, listener in zip(asked, collected, strict=True)
        ]
    )
    engine.stop()
    engine.run()
    return {
        "tokens": [c.tokens for c in collected],
        "reasons": [c.output.reason for c in collected if c.output],
        "left": engine.stats().pages_used,
        "stats": engine.stats(),
    }


def greedy_without_cache(text: str, asked: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The reference: stock megatron-core in one process, a full forward pass for every token."""
    _, model = build(text, 1)
    sequences = [list(prompt) for prompt in asked]
    with torch.inference_mode():
        for _ in range(count):
            longest = max(map(len, sequences))
            tokens = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
            positions = torch.arange(longest).expand(len(sequences), -1)
            logits = model(tokens, positions, None)[..., :VOCABULARY]
            for row, sequence in enumerate(sequences):
                sequence.append(int(logits[row, len(sequence) - 1].argmax()))
    return [s[len(prompt) :] for s, prompt in zip(sequences, asked, strict=True)]
