"""From flags to an engine: groups, weights, cache."""

from __future__ import annotations

import bisect
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist

from helix_megatron.core.caches import (
    NAMES,
    SEGMENTS,
    DecodeShape,
    cache_layout,
    choose_cache_layout,
    explain_cache_layout,
)
from helix_megatron.core.caches.paged import KeptHeads, Window
from helix_megatron.core.caches.windows import Reach
from helix_megatron.core.kernels.paged import paged_kernels
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError
from helix_megatron.hardware import MACHINES
from helix_megatron.inference.arguments import InferenceConfig, TransformersRun
from helix_megatron.inference.batching_flags import EngineOptions
from helix_megatron.inference.engine import Engine
from helix_megatron.inference.layer import layer_windows
from helix_megatron.inference.load import TORCH_DTYPES, inference_groups, load_model
from helix_megatron.inference.megatron_runner import MegatronRunner
from helix_megatron.inference.request import Capacity
from helix_megatron.inference.runner import (
    Pools,
    Runner,
    is_local,
    kept_heads,
    make_book,
    rank_layout,
)
from helix_megatron.inference.scheduler import Scheduler
from helix_megatron.run.config import RunConfig
from helix_megatron.run.outcomes import on_every_rank

# Of the memory that is free when the weights are there. The rest is for a step: on a GPU attention over pages
# copies them.
GPU_SHARE = 0.6
CPU_SHARE = 0.5  # of the memory that is available, over all ranks of the machine


def start(
    config: InferenceConfig, options: EngineOptions, *, max_waiting: int, longest: int | None = None
) -> tuple[Runner, Engine | None]:
    """Groups, model, cache and engine of this rank. Collective.

    Args:
        max_waiting: sequences that may wait.
        longest: tokens of the longest sequence, where that is known; bounds the cache.

    Returns:
        The runner; the engine on rank 0, None on the others.

    Raises:
        HelixError: no room for one sequence, or a context that the model cannot have.
    """
    by_transformers = isinstance(config.run, TransformersRun)
    served = TransformersModel(config) if by_transformers else MegatronModel(config)
    max_context = _max_context(served, options.max_context)
    served.load()
    layout, context = served.layout, min(max_context, longest or max_context)
    element = TORCH_DTYPES[config.dtype].itemsize
    machine = MACHINES["cuda" if torch.cuda.is_available() else "cpu"]
    shape = served.shape(options.max_sequences, context, element)
    local = served.local
    if local and (layout.segments == 1 or options.cache_layout == "auto"):
        cache = SEGMENTS
    else:
        cache = choose_cache_layout(shape, options.cache_layout, machine, served.caches).name
    pools = _pools(served, element, options, cache, context)
    members = 1 if local else layout.segments
    shares = served.shares and not options.no_prefix_caching
    book = make_book(cache, members, pools, options.page_size, shares=shares)
    if not book.fits(min(context, 2)):
        raise HelixError("the cache has no room for a single token. Give more --cache-memory.")

    context = _longest_that_fits(book, max_context)  # its rotary table need not be longer

    def make_runner() -> Runner:
        try:
            return served.runner(cache, pools, options.page_size, context)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise HelixError(
                f"no memory for a cache of {pools.text}. Give --cache-memory less than was taken by itself."
            ) from error

    runner = on_every_rank(make_runner)
    if dist.get_rank():
        return runner, None
    if options.explain:
        if not local:
            text = explain_cache_layout(shape, options.cache_layout, machine, served.caches)
            print(text, file=sys.stderr)
        print(
            f"Cache of a rank: {pools.text} of {options.page_size} positions, "
            f"{runner.cache.nbytes / 2**20:,.1f} MiB, {config.dtype}.",
            file=sys.stderr,
        )
        print(paged_kernels(runner.device.type).text, file=sys.stderr)
    scheduler = Scheduler(book, options.max_sequences, options.prefill_chunk)
    capacity = Capacity(config.vocab_size, context, options.max_sequences, max_waiting)
    return runner, Engine(runner, scheduler, capacity)


class ServedModel(ABC):
    """A model that is to be served: how long its contexts are, what a rank keeps of it, and its runner.

    Attributes:
        layout: how the heads of the cache lie on the ranks.
        local: whether each rank attends by itself, so that all cache layouts are one.
        caches: the names of the cache layouts that it can have.
        longest: the tokens of the longest sequence that it was made for; None where that is not known.
        bound: why no sequence can be longer than that, as the rest of a sentence; empty where one can.
        shares: whether pages are all that is kept of a sequence, so that another one can go on from them.
    """

    layout: HeadLayout
    local: bool
    caches: tuple[str, ...]
    longest: int | None
    bound = ""
    shares = True

    @abstractmethod
    def load(self) -> None:
        """Process groups and weights. Collective."""

    def shape(self, sequences: int, context: int, element_size: int) -> DecodeShape:
        """What a layer's attention computes and keeps in a step."""
        return DecodeShape(self.layout, sequences, context, element_size)

    @property
    @abstractmethod
    def windows(self) -> Sequence[Window]:
        """Of each layer, once the model is loaded."""

    @abstractmethod
    def kept(self, cache: str, pools: Pools) -> Sequence[KeptHeads]:
        """What a rank keeps of each layer."""

    @abstractmethod
    def runner(self, cache: str, pools: Pools, page_size: int, context: int) -> Runner:
        """With a cache of these pages, for contexts of at most so many tokens. Collective."""


class MegatronModel(ServedModel):
    """A model that megatron-core computes."""

    caches = NAMES

    def __init__(self, config: InferenceConfig) -> None:
        assert isinstance(config.run, RunConfig)
        self.config, self.run = config, config.run
        self.layout = rank_layout(self.run.layout, self.run.parallel.tensor_model_parallel_size)
        self.local = is_local(self.layout, self.run.helix.attention)
        self.longest = self.run.model.max_position_embeddings
        if self.run.model.position_embedding_type == "learned_absolute":
            self.bound = "it has learned no other positions"

    def load(self) -> None:
        inference_groups(self.config)
        self.model = load_model(self.config)

    @property
    def windows(self) -> Sequence[Window]:
        return layer_windows(self.model.config)

    def kept(self, cache: str, pools: Pools) -> Sequence[KeptHeads]:
        return kept_heads(self.layout, cache, self.local, pools, self.windows)

    def runner(self, cache: str, pools: Pools, page_size: int, context: int) -> Runner:
        return MegatronRunner(
            self.model,
            self.layout,
            cache=cache,
            pages=pools,
            page_size=page_size,
            max_context=context,
            vocab_size=self.config.vocab_size,
            attention=self.run.helix.attention,
        )


class TransformersModel(ServedModel):
    """A model that the code of `transformers` computes."""

    caches = tuple(name for name in NAMES if name != SEGMENTS)

    def __init__(self, config: InferenceConfig) -> None:
        assert isinstance(config.run, TransformersRun)
        self.config, self.run = config, config.run
        self.layout = self.run.described.layout(self.run.world_size, self.run.segments)
        self.local = self.layout.segments == 1
        self.longest = self.run.described.longest
        self.shares = not self.run.described.recurrent
        self.bound = self.run.described.bound

    def load(self) -> None:
        from helix_megatron.inference.transformers_load import load

        self.model = load(
            self.config.load_path,
            self.run.described,
            self.run.segments,
            TORCH_DTYPES[self.config.dtype],
            self.run.parallel.distributed_timeout_minutes,
            trust=self.config.trust_checkpoint,
        )

    def shape(self, sequences: int, context: int, element_size: int) -> DecodeShape:
        return self.model.shape(self.layout, sequences, context, element_size)

    @property
    def windows(self) -> Sequence[Window]:
        return [asked.scores.window for asked in self.model.asked]

    def kept(self, cache: str, pools: Pools) -> Sequence[KeptHeads]:
        return self.model.kept(pools)

    def runner(self, cache: str, pools: Pools, page_size: int, context: int) -> Runner:
        from helix_megatron.inference.transformers_runner import TransformersRunner

        return TransformersRunner(
            self.model,
            self.layout,
            cache=cache,
            pages=pools,
            page_size=page_size,
            vocab_size=self.config.vocab_size,
        )


def _max_context(model: ServedModel, asked: int | None) -> int:
    trained = model.longest
    if trained is None and asked is None:
        raise HelixError(
            "the model's config.json does not say how long its contexts are. Give --max-context."
        )
    if asked is None or trained is None:
        return asked or trained or 0
    if model.bound and asked > trained:
        raise HelixError(
            f"--max-context is {asked}, and the longest of this model is {trained}: {model.bound}. Give at "
            f"most {trained}."
        )
    if asked > trained and dist.get_rank() == 0:
        print(f"The model was trained with contexts of {trained}, not {asked}.", file=sys.stderr)
    return asked


def _pools(
    model: ServedModel, element: int, options: EngineOptions, cache: str, context: int
) -> Pools:
    """Pages of a rank's pools: for all sequences at their longest, as far as memory allows. Collective."""
    size, placement = options.page_size, cache_layout(cache).placement
    members = 1 if model.local or placement == "all" else model.layout.segments
    sequences, parts = options.max_sequences, 1
    if placement == "one":
        sequences = -(-sequences // members)
    elif placement == "dealt":
        parts = members
    blocks = -(-context // size)
    seeing_all, widest = _windows(model, cache, context)
    every = sequences * -(-blocks // parts) if seeing_all else 0
    windowed, reach = 0, None
    if widest is not None:
        reach = Reach(widest, options.prefill_chunk)
        at_once = min(blocks, -(-widest // size) + 2)
        chunks = -(-options.prefill_chunk // size)
        windowed = sequences * -(-at_once // parts) + -(-chunks // parts)
    wanted = Pools(every, windowed, reach)
    kept = model.kept(cache, Pools(min(1, every), min(1, windowed), reach))
    page_bytes = [
        sum(own.position_size for own in kept if own.kind == kind) * element * size
        for kind in range(1 + max(own.kind for own in kept))
    ]
    memory = _memory() if options.cache_memory is None else options.cache_memory * 2**30
    if memory > (most := psutil.virtual_memory().total) and not torch.cuda.is_available():
        raise HelixError(
            f"--cache-memory is {options.cache_memory} GiB, and this machine has {most / 2**30:.1f}. Give less."
        )
    counts = [count for count in (every, windowed) if count]
    total = sum(count * nbytes for count, nbytes in zip(counts, page_bytes, strict=True))
    fitting = torch.tensor([int(count * min(1.0, memory / total)) for count in counts])
    if torch.cuda.is_available():
        fitting = fitting.cuda()
    dist.all_reduce(fitting, op=dist.ReduceOp.MIN)
    counts = fitting.tolist()
    if min(counts) < 1:
        raise HelixError(
            f"the cache has {memory / 2**30:.2g} GiB, less than one page of {sum(page_bytes):,} bytes. Give "
            "more --cache-memory, or a smaller --page-size."
        )
    return Pools(counts[0] if every else 0, counts[-1] if windowed else 0, wanted.reach)


def _windows(model: ServedModel, cache: str, context: int) -> tuple[bool, int | None]:
    """Whether a layer keeps all positions, and the widest window of the others; None where there are none.

    Where all ranks keep segments of every position (`segment`), nothing is freed.
    """
    if not model.local and cache == SEGMENTS:
        return True, None
    backs = [w[0] for w in model.windows if w is not None and 0 <= w[0] < context]
    return len(backs) < len(model.windows), max(backs, default=None)


def _memory() -> float:
    """Bytes that a rank may take for its cache. Collective."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    ranks = hosts.count(socket.gethostname())
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] * GPU_SHARE / -(-ranks // torch.cuda.device_count())
    return psutil.virtual_memory().available * CPU_SHARE / ranks


def _longest_that_fits(book: Any, context: int) -> int:
    """Tokens of the longest sequence that has room in an empty cache."""
    lengths = range(1, context)
    return 1 + bisect.bisect_left(lengths, True, key=lambda length: not book.fits(length + 1))
