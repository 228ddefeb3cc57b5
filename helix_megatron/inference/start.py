"""From flags to an engine: groups, weights, cache."""

from __future__ import annotations

import bisect
import socket
import sys
from typing import Any

import psutil
import torch
import torch.distributed as dist

from helix_megatron.core.caches import (
    SEGMENTS,
    DecodeShape,
    cache_layout,
    choose_cache_layout,
    explain_cache_layout,
)
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError
from helix_megatron.hardware import MACHINES
from helix_megatron.inference.arguments import InferenceConfig
from helix_megatron.inference.batching_flags import EngineOptions
from helix_megatron.inference.engine import Engine
from helix_megatron.inference.load import TORCH_DTYPES, inference_groups, load_model
from helix_megatron.inference.request import Capacity
from helix_megatron.inference.runner import Runner, is_local, kept_dims, make_book, rank_layout
from helix_megatron.inference.scheduler import Scheduler
from helix_megatron.megatron.outcomes import on_every_rank
from helix_megatron.model.description import ModelConfig

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
    run, model = config.run, config.run.model
    vocabulary = model.vocab_size
    assert vocabulary is not None
    max_context = _max_context(model, options.max_context)
    layout = rank_layout(run.layout, run.parallel.tensor_model_parallel_size)
    inference_groups(config)
    gpt = load_model(config)
    context = min(max_context, longest or max_context)
    element = TORCH_DTYPES[config.dtype].itemsize
    machine = MACHINES["cuda" if torch.cuda.is_available() else "cpu"]
    shape = DecodeShape(layout, options.max_sequences, context, element)
    local = is_local(layout, run.helix.attention)
    if local and (layout.segments == 1 or options.cache_layout == "auto"):
        cache = SEGMENTS
    else:
        cache = choose_cache_layout(shape, options.cache_layout, machine).name
    pages = _pages(config, layout, options, cache, context, local)
    members = 1 if local else layout.segments
    book = make_book(cache, members, pages, options.page_size, shares=not options.no_prefix_caching)
    if not book.fits(min(context, 2)):
        raise HelixError("the cache has no room for a single token. Give more --cache-memory.")

    context = _longest_that_fits(book, max_context)  # its rotary table need not be longer

    def make_runner() -> Runner:
        try:
            return Runner(
                gpt,
                layout,
                cache=cache,
                pages=pages,
                page_size=options.page_size,
                max_context=context,
                vocab_size=vocabulary,
                attention=run.helix.attention,
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise HelixError(
                f"no memory for a cache of {pages:,} pages. Give --cache-memory less than was taken by itself."
            ) from error

    runner = on_every_rank(make_runner)
    if dist.get_rank():
        return runner, None
    if options.explain:
        if not local:
            print(explain_cache_layout(shape, options.cache_layout, machine), file=sys.stderr)
        print(
            f"Cache of a rank: {pages:,} pages of {options.page_size} positions, "
            f"{pages * runner.cache.page_bytes / 2**20:,.1f} MiB, {config.dtype}.",
            file=sys.stderr,
        )
    scheduler = Scheduler(book, options.max_sequences, options.prefill_chunk)
    capacity = Capacity(vocabulary, context, options.max_sequences, max_waiting)
    return runner, Engine(runner, scheduler, capacity)


def _max_context(model: ModelConfig, asked: int | None) -> int:
    trained = model.max_position_embeddings
    assert trained is not None
    if asked is None:
        return trained
    if model.position_embedding_type == "learned_absolute" and asked > trained:
        raise HelixError(
            f"--max-context is {asked}, and the model has learned {trained} positions. Give at most {trained}."
        )
    if asked > trained and dist.get_rank() == 0:
        print(f"The model was trained with contexts of {trained}, not {asked}.", file=sys.stderr)
    return asked


def _pages(
    config: InferenceConfig,
    layout: HeadLayout,
    options: EngineOptions,
    cache: str,
    context: int,
    local: bool,
) -> int:
    """Pages of a rank's pool: for all sequences at their longest, as far as memory allows. Collective."""
    dims = kept_dims(layout, cache, local)
    element = TORCH_DTYPES[config.dtype].itemsize
    position = 2 * config.run.model.num_layers * layout.group_kv_heads * dims * element
    page_bytes = position * options.page_size
    blocks = -(-context // options.page_size)
    placement = cache_layout(cache).placement
    members = 1 if local or placement == "all" else layout.segments
    needed = options.max_sequences * blocks
    if placement == "one":
        needed = -(-options.max_sequences // members) * blocks
    elif placement == "dealt":
        needed = options.max_sequences * -(-blocks // members)
    memory = _memory() if options.cache_memory is None else options.cache_memory * 2**30
    if memory > (most := psutil.virtual_memory().total) and not torch.cuda.is_available():
        raise HelixError(
            f"--cache-memory is {options.cache_memory} GiB, and this machine has {most / 2**30:.1f}. Give less."
        )
    pages = torch.tensor(min(needed, int(memory // page_bytes)))
    if torch.cuda.is_available():
        pages = pages.cuda()
    dist.all_reduce(pages, op=dist.ReduceOp.MIN)
    if pages < 1:
        raise HelixError(
            f"the cache has {memory / 2**30:.2g} GiB, less than one page of {page_bytes:,} bytes. Give more "
            "--cache-memory, or a smaller --page-size."
        )
    return int(pages)


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
