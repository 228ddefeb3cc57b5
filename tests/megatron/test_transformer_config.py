"""What Megatron's configuration accepts and refuses once heads are cut."""

from __future__ import annotations

import dataclasses
import re
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from megatron.core.package_info import MINOR
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from helix_megatron.arguments import as_flag
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.megatron.support import (
    BATCH,
    CUT,
    EVERYWHERE,
    FOREIGN,
    KERNEL,
    LEFT_CUT,
    PACKED,
    REFUSED,
    check,
    problem,
    refusal,
)
from helix_megatron.megatron.transformer_config import (
    HelixTransformerConfig,
    attention_layout,
    relaxed_head_checks,
)


def error_of(make: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(HelixError) as error:
        make(*args, **kwargs)
    return error.value.worded(as_flag)


SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}


def helix_config(m: int = 2, tensor_parallel: int = 4, **settings: Any) -> HelixTransformerConfig:
    return HelixTransformerConfig(
        **{**SMALL, **settings}, tensor_model_parallel_size=tensor_parallel, helix=HelixConfig(m)
    )


def test_more_ranks_than_heads_are_accepted_where_stock_refuses():
    """The reason for the class. Stock's refusal is asserted, too: once it is gone, so is the reason."""
    with pytest.raises(ValueError, match=r"num_attention_heads \(2\) must be a multiple"):
        TransformerConfig(**SMALL, tensor_model_parallel_size=4)
    config = helix_config()
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (2, 2, 16)
    layout = attention_layout(config)
    assert (layout.head_groups, layout.segments, layout.num_heads) == (2, 2, 2)
    one_group = attention_layout(helix_config(m=4))
    assert (one_group.head_groups, one_group.segments, one_group.segment_dim) == (1, 4, 4)


def test_the_layout_is_that_of_the_models_heads():
    """Grouped queries, head size, rotary share and style, and the gate all change which rank holds what."""
    config = helix_config(
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=16,
        rotary_percent=0.5,
        rotary_interleaved=True,
        attention_output_gate=True,
    )
    assert attention_layout(config) == HelixConfig(2).layout(
        8, 2, 16, 4, rotary="interleaved", rotary_dim=8, output_gate=True
    )
    assert attention_layout(helix_config(rotary_percent=0.0)).rotary == "none"
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (8, 2, 16)


def test_everything_but_attention_stays_on_all_tensor_parallel_ranks():
    """The checks are relaxed, not the model: MLP, experts and sequence parallelism see all m·n ranks."""
    for m in (2, 4):
        config = helix_config(m, sequence_parallel=True)
        assert config.tensor_model_parallel_size == 4
        assert config.sequence_parallel is True
        assert config.expert_tensor_parallel_size == 4
    assert helix_config(expert_tensor_parallel_size=1).expert_tensor_parallel_size == 1


@pytest.mark.parametrize("m", [2, 4])
def test_settings_are_restored_even_when_construction_raises(m):
    """A configuration caught in an error, and one that hosts relax themselves, must not stay half changed."""
    before = {
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "num_attention_heads": 2,
        "num_query_groups": None,
    }
    config = types.SimpleNamespace(
        **SMALL, kv_channels=None, rotary_interleaved=False, attention_output_gate=False
    )
    vars(config).update(before)

    def settings() -> dict[str, Any]:
        return {name: getattr(config, name) for name in before}

    with pytest.raises(ZeroDivisionError), relaxed_head_checks(config, HelixConfig(m)):
        assert settings() != before  # else this test restores nothing
        raise ZeroDivisionError
    assert settings() == before
    with relaxed_head_checks(config, HelixConfig(m)):
        pass
    assert settings() == {**before, "num_query_groups": 2}  # as Megatron fills it in
    assert config.kv_channels == 16


@pytest.mark.parametrize("m", [2, 4])
def test_stocks_other_checks_still_see_all_ranks(m):
    """What stock refuses at TP 4 must be refused with cut heads, even in a single head group (m = 4)."""
    clash = {
        "sequence_parallel": True,
        "distribute_saved_activations": True,
        "recompute_granularity": "selective",
    }
    stock = {**SMALL, "num_attention_heads": 4, "tensor_model_parallel_size": 4, **clash}
    with pytest.raises(ValueError, match="distribute_saved_activations: True must be") as error:
        TransformerConfig(**stock)
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        helix_config(m, **clash)
    with pytest.raises(ValueError, match="pipeline_dtype must be specified"):
        helix_config(m, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="sequence parallelism without tensor parallelism"):
        HelixTransformerConfig(**SMALL, sequence_parallel=True)


def test_a_layout_that_does_not_fit_is_refused_in_our_words():
    """Megatron's message about its own checks would name numbers that nobody typed."""
    assert error_of(helix_config, 2, 8) == (
        "2 heads cannot form 4 head groups. Valid numbers of groups: 1, 2. "
        "With 8 ranks try --intra-head-parallel-size 4."
    )
    assert error_of(helix_config, 3, 4).startswith("intra-head parallel size 3 does not divide")
    assert error_of(helix_config, 2, 4, kv_channels=6) == (
        "2 segments of a head of 6 dimensions would split a rotary pair: 3 pairs cannot be dealt evenly. "
        "Valid numbers of segments: 1, 3."
    )


def test_one_segment_leaves_everything_stock():
    """m = 1 is stock Megatron: same settings, same refusals, and nothing of ours is checked."""
    plain = {**SMALL, "num_attention_heads": 4, "tensor_model_parallel_size": 4}
    ours, stock = HelixTransformerConfig(**plain), TransformerConfig(**plain)
    for setting in dataclasses.fields(TransformerConfig):
        mine, theirs = getattr(ours, setting.name), getattr(stock, setting.name)
        assert mine == theirs or (callable(mine) and callable(theirs)), setting.name
    with pytest.raises(ValueError, match=r"num_attention_heads \(2\) must be a multiple"):
        HelixTransformerConfig(**SMALL, tensor_model_parallel_size=4)
    # Head sizes that no layout would have, and settings that cut heads refuse:
    config = HelixTransformerConfig(**SMALL, kv_channels=3, fused_single_qkv_rope=True)
    assert config.kv_channels == 3


# -------------------------------------------------------------------- refused settings

# A value of each refused setting that does not work, as users would set it.
BAD = {
    "multi_latent_attention": True,
    "experimental_attention_variant": "gated_delta_net",
    "fp8_param": True,
    "fp4_param": True,
    "fused_single_qkv_rope": True,
    "flash_decode": True,
    "softmax_type": "learnable",
    "qk_clip": True,
    "log_max_attention_logit": True,
    "batch_invariant_mode": True,
    "fp8_dot_product_attention": True,
    "fp8_multi_head_attention": True,
    "cuda_graph_impl": "local",
    "attn_logit_softcapping": 50.0,
}
BATCH_INVARIANT = {"flash_attention_version": 3, "attention_dropout": 0.0} if MINOR > 16 else {}
"""What later megatron-cores want with it."""
ARGUMENTS = {"inference_context", "attention_bias"}
"""What the layer gets when it runs, and no setting."""
OF_THIS_PACKAGE = {"attn_logit_softcapping"}
"""What its models set in Megatron's configuration."""


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.name} {row.where}")
def test_each_refusal_says_what_to_do(row):
    """What would train wrongly, or fail deep inside, is refused: setting, value, reason, way out."""
    value = BAD.get(row.name, "given")
    config = types.SimpleNamespace(**{row.name: value})
    if row.name not in ARGUMENTS:
        assert problem(config, row.where) is not None
    text = refusal(row.name, value, row.where).worded(as_flag)
    begin = f"{row.name} = {value} does not work {row.where}: {row.why}. "
    end = ", or leave --intra-head-parallel-size at 1, which is stock attention."
    assert text.startswith(begin)
    assert text.endswith(end)
    instead = text.removeprefix(begin).removesuffix(end)
    assert instead[0].isupper()
    assert not (row.why + instead).endswith(".")
    for works in row.works if isinstance(row.works, tuple) else (row.works,):
        assert problem(types.SimpleNamespace(**{row.name: works}), row.where) is None


def test_refused_settings_are_megatrons_and_off_by_default():
    """A renamed setting would be refused never; a wrong default would refuse every model."""
    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    named = {row.name for row in REFUSED}
    assert named - ARGUMENTS - OF_THIS_PACKAGE <= fields
    assert named - ARGUMENTS == set(BAD)
    assert len({(row.name, row.where) for row in REFUSED}) == len(REFUSED)
    config = helix_config()  # raises if a default were refused
    for where in (EVERYWHERE, CUT, KERNEL, LEFT_CUT, BATCH, PACKED, FOREIGN):
        assert problem(config, where) is None


def test_the_page_on_limits_has_every_refusal():
    """Users look there before they choose a layout: each setting under its place, and none that is gone."""
    page = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    table = page.partition("| where | setting | why |")[2].partition("Each row is shown by")[0]
    said: list[list[str]] = []
    for line in table.strip().splitlines()[1:]:
        _, where, setting, *_ = line.split("|")
        said += [[]] if where.strip() else []
        said[-1] += re.findall(r"`(\w+)`", setting)
    places = {row.where for row in REFUSED}
    refused = [sorted(row.name for row in REFUSED if row.where == place) for place in places]
    assert sorted(map(sorted, said)) == sorted(refused)


@pytest.mark.parametrize("row", [row for row in REFUSED if row.where == EVERYWHERE])
def test_construction_refuses(row):
    """The check runs when the model is configured, before Megatron says what else such a setting needs."""
    text = error_of(helix_config, **{row.name: BAD[row.name]})
    assert text.startswith(f"{row.name} = {BAD[row.name]} does not work with cut heads: ")


def test_a_layout_whose_queries_are_cut_refuses_more():
    """With whole queries a rank is an ordinary rank behind the gather, and the same setting is allowed."""
    whole = {"num_attention_heads": 4, "num_query_groups": 2, "flash_decode": True}
    assert attention_layout(helix_config(**whole)).query_layout == "heads"
    assert error_of(helix_config, flash_decode=True) == (
        "flash_decode = True does not work where queries are cut, too: its kernel rotates and keeps whole "
        "heads. Set --helix-query-layout heads where the query heads divide evenly, or leave "
        "--intra-head-parallel-size at 1, which is stock attention."
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"softmax_type": "learnable"},
        {"log_max_attention_logit": True},
        {"qk_clip": True},
        {"cuda_graph_impl": "local"},
        {"mtp_num_layers": 1},
        {"test_mode": True},
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]},
        {"batch_invariant_mode": True, "attention_backend": AttnBackend.flash, **BATCH_INVARIANT},
        {"attention_backend": AttnBackend.flash},
        {"fp8": "hybrid"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_stock_attention_can_do_is_no_longer_refused(settings):
    """Behind the gather attention is stock: these were refused, or without effect, while it was ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attention_backend")
        helix_config(num_attention_heads=8, num_query_groups=2, **settings)


def test_values_that_mean_off_are_accepted():
    """Megatron's own scripts pass 0 or an empty string where a feature is off."""
    check(types.SimpleNamespace(experimental_attention_variant=""), EVERYWHERE)
