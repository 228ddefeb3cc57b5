"""Memory of a rank for large models most of whose layers have no key-value heads, as run and as planned.

python scripts/rank_memory.py          writes the table of docs/planner.md; it takes minutes, and little memory

The model of `transformers` is made at full size, of tensors without contents, cut by
`helix_megatron.huggingface` as one rank of a world whose collectives move nothing, and given to the engine of
`helix serve`: weights are counted in the model, pages in the engine's cache, states in the library's own.
Experts do not compute, since they would need contents to choose their tokens. `helix plan` counts the same from
sizes alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from helix_megatron.huggingface import make_groups, shard
from helix_megatron.inference.transformers_load import described
from helix_megatron.inference.transformers_runner import PagedModel, TransformersRunner
from helix_megatron.plan.inference_memory import inference_memory
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import spec_of_config
from helix_megatron.plan.published_sizes import CONFIGS
from helix_megatron.plan.settings import Job, Software
from helix_megatron.tables import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "planner.md"
BEGIN, END = "<!-- made by scripts/rank_memory.py -->", "<!-- end -->"
HEADER = (
    "model, ranks",
    "plain TP, planned: weights",
    "plain TP: cache",
    "m",
    "Helix, planned: weights",
    "Helix, planned: cache",
    "Helix, as run: weights",
    "Helix, as run: cache",
)
MODELS = ("qwen3.5-397b-a17b", "nemotron-3-super", "deepseek-v3")
RANKS = (8, 16)
CONTEXT, PAGE_SIZE = 131072, 16


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank in bf16: its weights, and the cache of one sequence of `CONTEXT` positions.

    segments: m, with which heads are cut.
    """

    segments: int
    weights: float
    cache: float


def as_run(settings: Mapping[str, Any], ranks: int) -> RankMemory:
    """What rank 0 of so many holds, with the fewest segments that keep each key-value head once."""
    settings = dict(settings)
    if rotated := settings.get(
        "qk_rope_head_dim"
    ):  # what transformers calls a head's dimensions there
        settings["head_dim"] = rotated
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            config = AutoConfig.for_model(**settings)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            return _of_rank(model.eval().requires_grad_(False), ranks)
    finally:
        dist.destroy_process_group()


def _of_rank(model: Any, ranks: int) -> RankMemory:
    facts = described(model)
    m = facts.segments(ranks, "auto")
    groups = make_groups(ranks, m)
    shard(model, m, tensor_group=groups.tensor, intra_head_group=groups.intra_head)
    for path in model.sharding.plan.experts:
        model.get_submodule(path).forward = lambda hidden, *args, **kwargs: hidden
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = sum(state.nbytes for state in _states(model)) if facts.recurrent else 0
    shared = groups.tensor if facts.latent_dim else groups.intra_head
    paged = PagedModel(model, list(facts.attention), facts.recurrent, groups.tensor, shared)
    layout = facts.layout(ranks, m)
    runner = TransformersRunner(
        paged,
        layout,
        cache="sequence",
        pages=CONTEXT // PAGE_SIZE // layout.segments,
        page_size=PAGE_SIZE,
        vocab_size=facts.vocab_size,
    )
    return RankMemory(layout.segments, weights, runner.cache.nbytes + states)


def _states(model: Any) -> Iterator[torch.Tensor]:
    """What the library keeps of a sequence in layers without keys."""
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        for kept in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            yield from (kept.values() if isinstance(kept, dict) else kept)


def as_planned(settings: Mapping[str, Any], ranks: int, segments: int) -> RankMemory:
    """The same from `helix plan`, experts cut for all ranks."""
    model = spec_of_config("model", settings, "")
    sizes = {"tp": ranks, "etp": ranks, "segments": segments, "query_layout": "heads"}
    layout = Layout(**sizes, cache="sequence" if segments > 1 else "heads")
    job = Job("decode", sequence=CONTEXT, global_batch=1)
    memory = inference_memory(model, layout, job, Software())
    return RankMemory(segments, memory.weights, memory.cache)


def rows() -> Iterator[tuple[str, ...]]:
    """A row for each model and number of ranks, as `HEADER` names its cells."""
    for name in MODELS:
        for ranks in RANKS:
            run = as_run(CONFIGS[name], ranks)
            latent = "kv_lora_rank" in CONFIGS[name]
            plain, cut = (
                as_planned(CONFIGS[name], ranks, 1 if latent else m) for m in (1, run.segments)
            )
            if latent:  # of which plain TP has a copy on every rank
                plain = replace(plain, cache=plain.cache * ranks)
            sizes = (plain.weights, plain.cache), (cut.weights, cut.cache), (run.weights, run.cache)
            texts = [f"{size / 1e9:.2f} GB" for pair in sizes for size in pair]
            yield f"{name}, {ranks}", *texts[:2], str(run.segments), *texts[2:]


def page() -> str:
    """docs/planner.md with the table of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown_table(HEADER, list(rows()))}\n{END}{after}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    PAGE.write_text(page())
