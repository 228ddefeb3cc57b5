"""Hybrid models: their attention is cut; Mamba, delta nets, MLP and experts stay ordinary tensor parallel.

`HybridModel` is `MambaModel` before megatron-core 0.18.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
import torch.nn.functional as F
from megatron.core.package_info import MINOR
from tiers import sized
from tiny_gpt import LENGTH, VOCABULARY, Layout, Log, build, start_megatron, train_step
from torch.distributed.checkpoint import FileSystemReader

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError

STEPS = sized("training", full=20, quick=6)
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
DELTA_NET = {
    "deterministic_mode": True,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
}
MAMBA = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_state_dim": 16,
    "mamba_num_groups": 4,
}
# layer pattern: what the configuration says of its layers
PATTERNS = {"*-*E": EXPERTS, "M*M-": MAMBA, "G*G-": DELTA_NET}
FULL = pytest.mark.full("checkpoints")
SINCE_17 = pytest.mark.skipif(
    MINOR < 17, reason="stacks have gated delta nets from megatron-core 0.17 on"
)
NAMES = ["*-*E", "M*M-", pytest.param("G*G-", marks=SINCE_17)]


def pattern_name() -> str:
    """What the model calls its layer pattern; megatron-core 0.16 has another name."""
    return "hybrid_override_pattern" if MINOR < 17 else "hybrid_layer_pattern"


def started(pattern: str, m: int) -> tuple[Any, Any, Layout]:
    """(model in DDP, optimizer, layout) of one process, or of 4 tensor parallel ranks with cut heads."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron.hybrid import HybridModel, local_stack_spec
    from helix_megatron.megatron.self_attention import VirtualSelfAttention
    from helix_megatron.megatron.specs import helix_spec
    from helix_megatron.megatron.transformer_config import HelixTransformerConfig

    settings = {
        "num_layers": len(pattern),
        "num_attention_heads": 2,
        "add_bias_linear": False,
        "activation_func": F.silu,
        "qk_layernorm": True,
        "sequence_parallel": m > 1,
        "helix": HelixConfig(m),
    }
    ranks = 2 * m if m > 1 else 1
    layout = Layout(tp=ranks, etp=ranks, config=settings | PATTERNS[pattern])

    def chunk(config: Any, stage: int | None) -> Any:
        spec = helix_spec(local_stack_spec(config), config.helix)
        model = HybridModel(
            config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=True,
            **{pattern_name(): pattern},
        )
        assert any(isinstance(part, VirtualSelfAttention) for part in model.modules()) == (m > 1)
        kinds = {type(part).__name__ for part in model.modules()}
        layers = {"GatedDeltaNet": "G", "MoELayer": "E", "Mamba": "M"}
        assert all((kind in kinds) == (letter in pattern) for kind, letter in layers.items())
        return model

    start_megatron(layout)
    parallel_state.register_intra_head_parallel(m)
    chunks, optimizer = build(layout, chunk, HelixTransformerConfig)
    for group in optimizer.param_groups:
        group["lr"] = (
            2e-3  # with larger steps rounding grows tenfold every second step in delta nets
        )
    return chunks, optimizer, layout


def train(pattern: str, m: int) -> Log:
    """Loss and gradient norm of every step from the canonical weights."""
    chunks, optimizer, layout = started(pattern, m)
    return [train_step(layout, chunks, optimizer) for _ in range(STEPS)]


@pytest.mark.parametrize("pattern", NAMES)
def test_losses_are_those_of_one_process(pool, pattern):
    """Twice as many tensor parallel ranks as heads, in a stack of which only the stars are attention."""
    expected = pool.run(train, pattern, 1, world_size=1)[0]
    assert expected[-1][0] < expected[0][0] - 0.3
    for got in pool.run(train, pattern, 2, world_size=4):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def state_of(model: Any, optimizer: Any, name: str, **loading: bool) -> dict[str, Any]:
    """The sharded state dictionary of model and optimizer; the latter's under a name."""
    from helix_megatron.megatron.dist_checkpoint import sharding_metadata

    metadata = sharding_metadata()
    state = {"model": model.module.sharded_state_dict(metadata=metadata)}
    return state | {name: optimizer.sharded_state_dict(dict(state), metadata=metadata, **loading)}


def holds(model: Any, folder: Path) -> bool:
    """Whether each weight is, to the last bit, its part of the tensors in a checkpoint."""
    from helix_megatron.megatron.fill import own_part, sharded_weights

    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    plain = {key: torch.empty(e.size) for key, e in entries.items() if hasattr(e, "size")}
    torch_checkpoint.load(plain, storage_reader=FileSystemReader(folder), no_dist=True)
    return all(
        torch.equal(item.data, own_part(item, lambda key, place, shape: plain[key][place]))
        for item in sharded_weights(model)
    )


def save(pattern: str, m: int, folder: Path) -> tuple[bool, Log]:
    """Train, save, and go on: (whether the checkpoint has the model, the steps after it)."""
    from megatron.core import dist_checkpointing

    from helix_megatron.megatron.dist_checkpoint import WRITER

    (model,), optimizer, layout = started(pattern, m)
    train_step(layout, [model], optimizer)
    dist_checkpointing.save(state_of(model, optimizer, "optimizer"), str(folder), **WRITER)
    return holds(model.module, folder), [train_step(layout, [model], optimizer) for _ in range(3)]


def resume(pattern: str, m: int, folder: Path) -> tuple[bool, Log]:
    """Load it at another layout: (whether the model is that of the checkpoint, the next steps)."""
    from megatron.core import dist_checkpointing

    from helix_megatron.megatron.optimizer_state import PARTS, load_optimizer

    (model,), optimizer, layout = started(pattern, m)
    state = state_of(model, optimizer, PARTS, is_loading=True)
    read = dist_checkpointing.load(state, str(folder))
    model.module.load_state_dict(read["model"])
    load_optimizer(optimizer, read[PARTS], read["optimizer"])
    return holds(model.module, folder), [train_step(layout, [model], optimizer) for _ in range(3)]


@pytest.mark.parametrize(
    ("pattern", "m"),
    [
        ("*-*E", 1),
        ("*-*E", 2),
        pytest.param("M*M-", 1, marks=FULL),
        ("M*M-", 2),
        pytest.param("G*G-", 1, marks=[FULL, SINCE_17]),
        pytest.param("G*G-", 2, marks=SINCE_17),
    ],
)
def test_a_checkpoint_of_one_layout_is_loaded_at_the_other(pool, tmp_path, pattern, m):
    """Weights are equal to the last bit, and training goes on with the optimizer's state."""
    tmp_path /= "checkpoint"
    tmp_path.mkdir()
    ranks = {1: 1, 2: 4}
    written = pool.run(save, pattern, m, tmp_path, world_size=ranks[m])
    read = pool.run(resume, pattern, 3 - m, tmp_path, world_size=ranks[3 - m])
    assert all(equal for equal, _ in [*written, *read])
    for _, log in read:
        torch.testing.assert_close(log, written[0][1], rtol=0, atol=1e-4)


def stack_of_megatron(config: Any) -> Any:
    """Megatron's own spec, of Transformer Engine's layers; in 0.16 importing it needs triton."""
    if MINOR >= 18:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    elif MINOR == 17:
        from megatron.core.models.mamba.mamba_layer_specs import (
            mamba_stack_spec as hybrid_stack_spec,
        )
    else:
        from helix_megatron.megatron.hybrid import local_stack_spec

        hybrid_stack_spec = local_stack_spec(config)
    return hybrid_stack_spec


def built_by_the_host(folder: str) -> set[str]:
    """Classes of a model that Megatron's own stack is given for, with Helix's hooks in place."""
    import mini_megatron_lm
    from megatron.core import parallel_state as megatron_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from helix_megatron import megatron_lm, parallel_state
    from helix_megatron.megatron.hybrid import HybridModel
    from helix_megatron.megatron_lm import settings

    with mini_megatron_lm.on_path(Path(folder)):
        megatron_lm.install()
        try:
            settings.record(settings.Settings(helix=HelixConfig(2), rotary_percent=1.0))
            megatron_state.initialize_model_parallel(4)
            model_parallel_cuda_manual_seed(1)
            config = TransformerConfig(
                num_layers=2,
                hidden_size=32,
                num_attention_heads=2,
                tensor_model_parallel_size=4,
                use_cpu_initialization=True,
            )
            spec = stack_of_megatron(config)
            model = HybridModel(config, spec, VOCABULARY, LENGTH, **{pattern_name(): "*-"})
            return {type(part).__name__ for part in model.modules()}
        finally:
            settings._recorded.clear()
            megatron_lm.uninstall()
            parallel_state.destroy_model_parallel()


def test_the_hooks_of_megatron_lm_know_hybrid_models(pool, tmp_path):
    """pretrain_hybrid.py: heads are cut in Megatron's own stack, and without a GPU its layers can be built."""
    import mini_megatron_lm

    mini_megatron_lm.write(tmp_path)
    for kinds in pool.run(built_by_the_host, str(tmp_path), world_size=4):
        assert {"WholeHeadsSelfAttention", "CutHeadsSelfAttention"} & kinds
        assert {"MLPLayer", "TorchNorm"} <= kinds
        assert "SelfAttention" not in kinds


@pytest.mark.skipif(MINOR >= 18, reason="stacks recompute layers from megatron-core 0.18 on")
def test_whole_layers_are_not_recomputed():
    """megatron-core would leave it out without a word, and run out of memory."""
    from helix_megatron.megatron.hybrid import build_hybrid

    config = SimpleNamespace(recompute_granularity="full")
    with pytest.raises(HelixError, match="recompute_granularity full has no effect"):
        build_hybrid(None, config, use_engine=False)
