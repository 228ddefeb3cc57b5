"""Nothing of Megatron's self-attention passes the replaced layer by in silence, whatever the version."""

from __future__ import annotations

import ast
import functools
import inspect
import logging
import re
import warnings
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention, dot_product_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from pool import RankError

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.megatron.context_parallel import check_communication, documents_of
from helix_megatron.megatron.core_attention import HelixCoreAttention
from helix_megatron.megatron.notices import NOTICES, hide_notices
from helix_megatron.megatron.self_attention import PARTS, HelixSelfAttention
from helix_megatron.megatron.support import REFUSED


def names(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


# Settings of TransformerConfig that the layer inherits, or that HelixCoreAttention or PartitionedNorm heeds.
HEEDED = names(
    """
    add_bias_linear add_qkv_bias attention_dropout attention_output_gate bf16 context_parallel_size fp16
    hidden_size init_method
    kv_channels layernorm_epsilon no_rope_freq num_attention_heads num_query_groups output_layer_init_method
    params_dtype perform_initialization qk_l2_norm qk_layernorm recompute_granularity recompute_modules
    rotary_interleaved sequence_parallel softmax_scale virtual_pipeline_model_parallel_size
    window_attn_skip_freq window_size qk_clip_alpha qk_clip_threshold test_mode fp8 fp4 cuda_graph_impl
    fine_grained_activation_offloading flash_attention_version
    """
)
# Settings that change nothing here: softmax is always in fp32 and unfused, a query-key scaling cancels out, and
# the last ones belong to what is refused or inherited as it is.
WITHOUT_EFFECT = names(
    """
    apply_query_key_layer_scaling attention_softmax_in_fp32 masked_softmax_fusion fp8_recipe kv_lora_rank
    cuda_graph_scope offload_modules cache_mla_latents
    """
)
# What the stock constructors store, besides PARTS: sizes, groups, and settings named above.
ATTRIBUTES = names(
    """
    _pp_layer_offset _yarn_concentration_factor attention_type attn_mask_type batch_invariant_mode
    checkpoint_core_attention config flash_attention_version hidden_size_per_attention_head key_hidden_size
    kv_projection_size layer_number linear_qkv_out_dim num_attention_heads_per_partition
    num_query_groups_per_partition offload_attn_proj offload_core_attention offload_qkv_linear pg_collection
    query_projection_size tp_group val_hidden_size world_size
    """
)


def members_of(object_name: str, tree: ast.AST, *, stored: bool = False) -> set[str]:
    """Names x in `object.x` or `self.object.x` of a source; with `stored` those that are assigned to."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in (object_name, f"self.{object_name}")
        and (not stored or isinstance(node.ctx, ast.Store))
    }


def tree_of(source: Any) -> ast.Module:
    return ast.parse(inspect.cleandoc("\n" + inspect.getsource(source)))


def test_every_setting_that_megatrons_attention_reads_is_known():
    """A later version's setting must be heeded, refused or known to change nothing before it is supported."""
    read: set[str] = set()
    for source in (attention.Attention, attention.SelfAttention, dot_product_attention):
        tree = tree_of(source)
        read |= members_of("config", tree) | members_of("tmp_config", tree)
    refused = {row.name for row in REFUSED}
    assert len(read) > 30
    assert read <= HEEDED | WITHOUT_EFFECT | refused, read - HEEDED - WITHOUT_EFFECT - refused


def test_every_attribute_of_megatrons_self_attention_is_known():
    """What the stock constructors store is either inherited as it is, or one of the parts that are cut."""
    stored: set[str] = set()
    for owner in (attention.Attention, attention.SelfAttention):
        stored |= members_of("self", tree_of(owner.__init__), stored=True)
    assert set(PARTS) <= stored
    assert stored <= ATTRIBUTES | set(PARTS), stored - ATTRIBUTES - set(PARTS)


def test_what_is_overridden_exists():
    """A method that a later Megatron renames would no longer be called."""
    for name in (
        "forward",
        "get_query_key_value_tensors",
        "_apply_output_gate",
        "sharded_state_dict",
    ):
        assert callable(getattr(SelfAttention, name)), name
    assert set(SelfAttentionSubmodules.__dataclass_fields__) == set(PARTS)


class OwnNorm(torch.nn.LayerNorm):
    """A user's norm, which says nothing about what it computes."""

    def __init__(self, hidden_size: int, config: Any, eps: float) -> None:
        super().__init__(hidden_size, eps)


def build_layer(added: str = "", norm: Any = None, **settings: Any) -> dict[str, Any]:
    """A replaced layer, on a Megatron whose constructor adds a part; kinds of its norms."""
    import dataclasses

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from helix_megatron import parallel_state
    from helix_megatron.config import HelixConfig
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.specs import helix_spec
    from helix_megatron.megatron.transformer_config import HelixTransformerConfig

    cpu_runtime.install()
    parallel_state.initialize_model_parallel(2, intra_head_parallel_size=2)
    config = HelixTransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        tensor_model_parallel_size=2,
        use_cpu_initialization=True,
        helix=HelixConfig(2),
        **settings,
    )
    spec = helix_spec(get_gpt_layer_local_spec(), config.helix).submodules.self_attention
    parts = dataclasses.replace(spec.submodules, q_layernorm=norm, k_layernorm=norm)
    spec = dataclasses.replace(spec, submodules=parts)
    stock = SelfAttention.__init__
    kinds = {
        "module": lambda: torch.nn.LayerNorm(8),
        "identity": IdentityOp,
        "parameter": lambda: torch.nn.Parameter(torch.ones(8)),
        "tensor": lambda: torch.ones(8),
        "function": lambda: torch.sigmoid,
        "none": lambda: None,
        "setting": lambda: 0.5,
    }

    def with_one_more(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        if added:
            self.v_part = kinds[added]()

    SelfAttention.__init__ = with_one_more  # type: ignore[method-assign]
    try:
        layer = build_module(spec, config=config, layer_number=1)
    finally:
        SelfAttention.__init__ = stock  # type: ignore[method-assign]
    return {name: getattr(getattr(layer, name), "kind", None) for name in PARTS[-2:]}


@pytest.mark.parametrize(
    ("added", "kind"),
    [
        ("module", "LayerNorm"),
        ("parameter", "Parameter"),
        ("tensor", "Tensor"),
        ("function", "builtin_function_or_method"),
    ],
)
def test_a_part_that_a_later_megatron_adds_is_refused(pool, added, kind):
    """A norm of values, say, would act on segments of heads, and the loss would be another without a word."""
    with pytest.raises(RankError) as error:
        pool.run(build_layer, added, world_size=2)
    assert re.search(
        rf"has v_part \({kind}\), and Helix can cut {', '.join(PARTS)} only. Try pip install 'megatron-core>=",
        str(error.value),
    )


@pytest.mark.parametrize("added", ["identity", "none", "setting"])
def test_what_does_nothing_is_no_part(pool, added):
    """Otherwise every release of Megatron would be refused for a flag."""
    assert pool.run(build_layer, added, world_size=2)[0] == dict.fromkeys(PARTS[-2:])


def test_a_norm_that_only_the_configuration_names_is_kept(pool):
    """From 0.18 on Megatron makes it of `qk_l2_norm` where the spec names none: it must not get lost."""
    makes_it = "qk_l2_norm" in inspect.getsource(SelfAttention.__init__)
    (kinds, _) = pool.run(build_layer, "", None, qk_l2_norm=True, world_size=2)
    assert kinds == dict.fromkeys(PARTS[-2:], "L2Norm" if makes_it else None)


def test_an_unknown_norm_is_refused(pool):
    """A class of the user's, even one that inherits from torch's, may compute anything."""
    with pytest.raises(
        RankError, match=r"q_layernorm of self-attention is .*OwnNorm with parameters bias"
    ):
        pool.run(build_layer, "", OwnNorm, qk_layernorm=True, world_size=2)


def test_what_a_later_megatron_gives_its_core_attention_is_refused():
    """A mask of another kind, say, that was dropped would be another result."""
    core = HelixCoreAttention.__new__(HelixCoreAttention)
    with pytest.raises(
        HelixError, match=r"gave its core attention sinks = 1, which exact Helix attention"
    ):
        core.forward(*[None] * 4, sinks=1)  # type: ignore[arg-type]


def test_only_the_notices_are_hidden(capsys):
    """Users of our scripts cannot choose another model class or writer; everything else they must see."""
    hide_notices()
    hide_notices()
    shown: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        for module, beginning in NOTICES.items():
            logger = logging.getLogger(module)
            handler = logging.Handler()
            handler.emit = lambda record: shown.append(record.getMessage())  # type: ignore[method-assign]
            logger.addHandler(handler)
            try:
                logger.warning("%s and so on", beginning)
                logger.warning("Another %s", beginning)
            finally:
                logger.removeHandler(handler)
            assert len([f for f in logger.filters if type(f).__name__ == "_Hide"]) == 1
            hide_notices()
            warnings.warn(f"{beginning} and so on", DeprecationWarning, stacklevel=1)
    assert shown == [f"Another {beginning}" for beginning in NOTICES.values()]
    assert not warned


def test_what_the_layer_is_called_with_is_refused():
    """Another way of communication, other documents, or other rotary tables would be another result."""
    ends, others = torch.tensor([0, 3, 8]), torch.tensor([0, 4, 8])
    packed = functools.partial(PackedSeqParams, cu_seqlens_q=ends)
    layer = object.__new__(HelixSelfAttention)
    torch.nn.Module.__init__(layer)
    layer.layout = HelixConfig(2).layout(2, 2, 16, 4, rotary="half", rotary_dim=16)
    for call, text in (
        (
            lambda: check_communication("p2p"),
            "by all_gather without Transformer Engine, and p2p is",
        ),
        (
            lambda: documents_of(packed(qkv_format="bshd")),
            "qkv_format bshd, and this attention takes",
        ),
        (
            lambda: documents_of(packed(qkv_format="thd", cu_seqlens_kv=others)),
            "have the borders [0, 3, 8] for queries and [0, 4, 8] for keys",
        ),
        (lambda: layer.own_rotary_tables(torch.ones(4, 1, 1, 8)), "turns 8 dimensions of a head"),
    ):
        with pytest.raises(HelixError, match=re.escape(text)):
            call()
