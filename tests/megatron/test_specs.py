"""`helix_spec` replaces self-attention in any spec that Megatron makes, and touches nothing else."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import CrossAttention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.megatron.hybrid import HybridStack, HybridStackSubmodules
from helix_megatron.megatron.self_attention import HelixSelfAttention, SegmentLocalSelfAttention
from helix_megatron.megatron.specs import LATENT_LAYERS, helix_spec

EXACT = HelixConfig(2)
SEGMENT_LOCAL = HelixConfig(2, "segment-local")
ATTENTION = "submodules.self_attention"


class TELayerNormColumnParallelLinear(torch.nn.Module):
    """Stands in for Transformer Engine's, which cannot be imported without a GPU; so do the next ones."""


class TEColumnParallelLinear(torch.nn.Module):
    pass


class TERowParallelLinear(torch.nn.Module):
    pass


class TEDotProductAttention(torch.nn.Module):
    pass


class TENorm(torch.nn.Module):
    pass


class StandInTransformerEngine(LocalSpecProvider):
    """What `TESpecProvider` gives, from which Megatron's own function builds the layer spec."""

    def column_parallel_linear(self) -> type:
        return TEColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return TERowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return TELayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, **newer: Any) -> type:
        return TENorm

    def core_attention(self) -> type:
        return TEDotProductAttention

    def grouped_mlp_modules(self, *args: Any) -> tuple[type, Any]:
        return SequentialMLP, None


def local(**settings: Any) -> ModuleSpec:
    return gpt_layer_specs.get_gpt_layer_local_spec(**settings)


def transformer_engine(**settings: Any) -> ModuleSpec:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_layer_specs, "TESpecProvider", StandInTransformerEngine, raising=False)
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**settings)


LAYERS = {
    "local": local,
    "local, RMSNorm and QK norm": lambda: local(normalization="RMSNorm", qk_layernorm=True),
    "local, MoE": lambda: local(num_experts=4),
    "Transformer Engine": transformer_engine,
    "Transformer Engine, QK norm": lambda: transformer_engine(qk_layernorm=True),
    "Transformer Engine, MoE": lambda: transformer_engine(num_experts=4),
}


def children(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(value)}
    return {}


def differences(before: Any, after: Any, path: str = "") -> set[str]:
    """Paths of what the two do not share; what only contains differences is not listed itself."""
    if before is after:
        return set()
    left, right = children(before), children(after)
    if type(before) is not type(after) or not (left or right):
        return set() if not (left or right) and before == after else {path}
    found = {f"{path}.{name}".strip(".") for name in left.keys() ^ right.keys()}
    for name in left.keys() & right.keys():
        found |= differences(left[name], right[name], f"{path}.{name}".strip("."))
    return found


def snapshot(value: Any) -> Any:
    """Identities of everything in a spec, to see whether it was changed."""
    inside = children(value)
    if inside:
        return id(value), {name: snapshot(item) for name, item in inside.items()}
    return id(value)


@pytest.mark.parametrize("name", LAYERS)
def test_only_the_self_attention_module_is_replaced(name):
    """Whatever else the spec holds, linears and norms of either back end and experts, must be what the user
    chose: the very same objects. And the user's spec stays usable for a stock model."""
    spec = LAYERS[name]()
    attention = spec.submodules.self_attention
    assert attention.module is SelfAttention
    before = snapshot(spec)

    exact = helix_spec(spec, EXACT)
    assert exact.submodules.self_attention.module is HelixSelfAttention
    assert differences(spec, exact) == {f"{ATTENTION}.module"}

    cut = helix_spec(spec, SEGMENT_LOCAL)
    assert cut.submodules.self_attention.module is SegmentLocalSelfAttention
    assert differences(spec, cut) == {f"{ATTENTION}.module"}

    assert snapshot(spec) == before, "the given spec was changed"


def test_the_stand_in_has_transformer_engines_structure():
    """If Megatron built this spec from other parts, the test above would say nothing about it."""
    submodules = transformer_engine(qk_layernorm=True).submodules
    attention = submodules.self_attention.submodules
    assert attention.linear_qkv is TELayerNormColumnParallelLinear
    assert attention.core_attention is TEDotProductAttention
    assert attention.linear_proj is TERowParallelLinear
    assert attention.q_layernorm is TENorm
    assert submodules.input_layernorm is IdentityOp


def block(**settings: Any) -> TransformerBlockSubmodules:
    config = TransformerConfig(num_layers=3, hidden_size=16, num_attention_heads=2, **settings)
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, pp_rank=0
    )


def test_every_layer_of_a_block_is_replaced():
    """Dense and MoE layers in turns, as get_gpt_decoder_block_spec makes them; alone, or inside the spec of a
    whole block, which Megatron also accepts."""
    spec = block(num_moe_experts=2, moe_layer_freq=[0, 1, 0])
    before = snapshot(spec)
    replaced = helix_spec(spec, EXACT)
    wanted = {f"layer_specs.{layer}.{ATTENTION}.module" for layer in range(3)}
    assert differences(spec, replaced) == wanted

    whole = ModuleSpec(module=TransformerBlock, submodules=spec)
    inside = helix_spec(whole, EXACT)
    assert differences(whole, inside) == {f"submodules.{path}" for path in wanted}
    assert snapshot(spec) == before, "the given spec was changed"


def stack(**layers: ModuleSpec) -> ModuleSpec:
    """The spec of a hybrid stack."""
    return ModuleSpec(module=HybridStack, submodules=HybridStackSubmodules(**layers))


def test_the_attention_layer_of_a_hybrid_stack_is_replaced():
    """Its pattern says what is built: without this, stock attention under its star, and an error about
    divisors from deep inside."""
    spec = stack(attention_layer=local(), mlp_layer=local(), moe_layer=IdentityOp)
    spec.submodules.mlp_layer.submodules.self_attention = IdentityOp
    before = snapshot(spec)
    wanted = {f"submodules.attention_layer.{ATTENTION}.module"}
    replaced = helix_spec(spec, EXACT)
    assert differences(spec, replaced) == wanted
    assert (
        helix_spec(replaced, EXACT).submodules.attention_layer
        is replaced.submodules.attention_layer
    )
    assert snapshot(spec) == before, "the given spec was changed"


def test_latent_attention_of_a_hybrid_stack_is_refused_where_it_is_built():
    """Megatron's own stack specs hold every kind of layer, so the spec itself is no mistake."""
    known = {field.name for field in dataclasses.fields(stack().submodules)}
    latent = {name: local(multi_latent_attention=True) for name in LATENT_LAYERS if name in known}
    replaced = helix_spec(stack(attention_layer=local(), **latent), EXACT).submodules
    for name in latent:
        asks = re.escape(
            f"layer pattern asks for {LATENT_LAYERS[name]}. Use the attention layer (*)"
        )
        with pytest.raises(HelixError, match=asks):
            build_module(getattr(replaced, name), config=None, layer_number=1)
    others = {
        "mamba_layer",
        "gdn_layer",
        "attention_layer",
        "mlp_layer",
        "moe_layer",
        "mtp_block_spec",
    }
    assert known <= others | {*LATENT_LAYERS}, "a later Megatron has another kind of layer"


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (ModuleSpec(module=IdentityOp, submodules=[local()]), "SelfAttention"),
        (stack(attention_layer=local(), mlp_layer=local()), "SelfAttention"),
        (ModuleSpec(module=SelfAttention), "SelfAttention"),
        ([local(), local(multi_latent_attention=True)], "MLASelfAttention, SelfAttention"),
    ],
    ids=["unknown", "wrong place", "attention alone", "list"],
)
def test_attention_that_stays_is_an_error(spec, names):
    """A spec of a kind that is not known must not pass as replaced."""
    with pytest.raises(
        HelixError, match=f"^the spec holds {names} where Helix does not replace attention"
    ):
        helix_spec(spec, EXACT)


def test_layers_without_self_attention_stay_as_they_are():
    """A pipeline or hybrid model may have some; there is nothing to cut."""
    bare = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules())
    assert bare.submodules.self_attention is IdentityOp
    assert helix_spec(bare, EXACT) is bare
    no_submodules = ModuleSpec(module=IdentityOp)
    assert helix_spec(no_submodules, EXACT) is no_submodules


@pytest.mark.parametrize("helix", [EXACT, SEGMENT_LOCAL], ids=lambda helix: helix.attention)
def test_replacing_twice_is_replacing_once(helix):
    """The launcher and a user's script may both do it; the user's kernel must survive."""
    once = helix_spec(local(), helix, kernel=print)
    assert helix_spec(once, helix) is once
    twice = helix_spec(helix_spec(block(), helix), helix)
    assert {layer.submodules.self_attention.module for layer in twice.layer_specs} == {
        HelixSelfAttention if helix is EXACT else SegmentLocalSelfAttention
    }


def test_a_spec_replaced_for_the_other_attention_is_refused():
    """exact and segment-local are different models: one must not silently stand for the other."""
    with pytest.raises(HelixError) as error:
        helix_spec(helix_spec(local(), EXACT), SEGMENT_LOCAL)
    assert str(error.value) == (
        "the layer's self-attention was replaced by HelixSelfAttention already, and attention segment-local "
        "needs SegmentLocalSelfAttention. Pass the spec as Megatron made it."
    )
    with pytest.raises(HelixError, match="attention exact needs HelixSelfAttention"):
        helix_spec(helix_spec(local(), SEGMENT_LOCAL), EXACT)


@pytest.mark.parametrize("spec", [local(), block()], ids=["layer", "block"])
def test_one_segment_returns_the_same_object(spec):
    """m = 1 is stock Megatron, to the last object."""
    assert helix_spec(spec, HelixConfig(1)) is spec


def test_a_kernel_reaches_the_layer():
    """FlashAttention users pass their own; nothing else would notice that it got lost."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    assert helix_spec(local(), EXACT, kernel=kernel).submodules.self_attention.params == {
        **local().submodules.self_attention.params,
        "kernel": kernel,
    }


def test_a_module_named_by_its_path_is_recognised():
    """`ModuleSpec` also takes (module, class) names, which Megatron imports when it builds."""
    spec = local()
    spec.submodules.self_attention.module = (
        "megatron.core.transformer.attention",
        "SelfAttention",
    )
    assert helix_spec(spec, EXACT).submodules.self_attention.module is HelixSelfAttention


class OwnAttention(SelfAttention):
    """A user's variant, whose changes the replacement would drop."""


@pytest.mark.parametrize("helix", [EXACT, SEGMENT_LOCAL], ids=lambda helix: helix.attention)
@pytest.mark.parametrize("module", ["MLASelfAttention", "CrossAttention", "OwnAttention"])
def test_other_attention_is_refused(module, helix):
    """Cutting what is not Megatron's SelfAttention would build another model than the one asked for."""
    spec = local(multi_latent_attention=module == "MLASelfAttention")
    if module != "MLASelfAttention":
        own = {"CrossAttention": CrossAttention, "OwnAttention": OwnAttention}[module]
        spec.submodules.self_attention.module = own
    for given in (spec, TransformerBlockSubmodules(layer_specs=[local(), spec])):
        with pytest.raises(HelixError) as error:
            helix_spec(given, helix)
        assert str(error.value) == (
            f"the layer's self-attention is {module}, and heads can be cut in Megatron's SelfAttention only. "
            "Use a GPT layer spec with ordinary self-attention, or leave intra_head_parallel_size at 1, which "
            "is stock attention."
        )
