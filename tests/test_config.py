"""`HelixConfig` and its skins: what users type, and what they are told."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from helix_megatron.arguments import FLAGS, add_helix_arguments, as_flag, exit_on_error
from helix_megatron.config import (
    ATTENTIONS,
    EXCHANGES,
    KERNELS,
    QUERY_LAYOUTS,
    HelixConfig,
)
from helix_megatron.core.exchanges import EXACT
from helix_megatron.errors import HelixError

SETTINGS = [f.name for f in dataclasses.fields(HelixConfig)]


def error_of(make: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(HelixError) as error:
        make(*args, **kwargs)
    return error.value.worded(as_flag)


# ------------------------------------------------------------------------- HelixConfig


@pytest.mark.parametrize("m", [0, -1, 2.0, "2", True, None])
def test_the_number_of_segments_must_be_a_positive_whole_number(m):
    """m reaches us from JSON files, too, where 2.0, "2" and true are easily written."""
    assert error_of(HelixConfig, m) == (
        f"intra-head parallel size {m!r} is not a whole number of at least 1. "
        "1 is stock attention; 2 halves every head."
    )


UNKNOWN = {
    ("attention", "exat"): (
        "attention 'exat' is unknown. Valid: exact, segment-local. Did you mean exact?"
    ),
    ("exchange", "gather_kv"): (
        "exchange 'gather_kv' is unknown. Valid: auto, gather-kv, all-to-all, all-to-all-batch, "
        "all-to-all-sequence, all-to-all-heads, gather-qk, score-reduce. Did you mean gather-kv?"
    ),
    ("query_layout", "zzz"): "query layout 'zzz' is unknown. Valid: auto, heads, segments.",
    ("kernel", "zzz"): "kernel 'zzz' is unknown. Valid: auto, host, sdpa.",
    ("query_layout", None): "query layout None is unknown. Valid: auto, heads, segments.",
}


@pytest.mark.parametrize(("name", "value"), UNKNOWN)
def test_unknown_values_are_refused_with_the_valid_ones(name, value):
    """A mistyped exchange must not fall back to another; the nearest name is offered, if one is near."""
    assert error_of(HelixConfig, 2, **{name: value}) == UNKNOWN[name, value]


def test_segment_local_refuses_settings_without_meaning():
    """segment-local exchanges nothing and cuts queries always: a setting that says otherwise is a mistake."""
    assert error_of(HelixConfig, 2, attention="segment-local", exchange="gather-kv") == (
        "segment-local attention exchanges nothing, so exchange gather-kv has no meaning. "
        "Leave the exchange at auto, or take attention exact."
    )
    assert error_of(HelixConfig, 2, attention="segment-local", query_layout="heads") == (
        "segment-local attention cuts query heads like key-value heads, so query layout heads has no "
        "meaning. Leave the query layout at auto, or take attention exact."
    )
    assert HelixConfig(2, "segment-local", query_layout="segments").active


def test_every_exchange_that_exists_can_be_asked_for():
    """The list of names lives apart from the classes: one added there must be added here."""
    names = {exchange.name for exchange in EXACT}
    assert names == set(EXCHANGES) - {"auto", "all-to-all"}


def test_from_dict_is_the_inverse_of_to_dict():
    """Checkpoints, reports and the DeepSpeed block store the dictionary."""
    config = HelixConfig(4, "exact", "gather-qk", "segments", "host")
    assert config.to_dict() == {
        "intra_head_parallel_size": 4,
        "attention": "exact",
        "exchange": "gather-qk",
        "query_layout": "segments",
        "kernel": "host",
    }
    assert HelixConfig.from_dict(config.to_dict()) == config
    assert HelixConfig.from_dict({}) == HelixConfig()
    assert not HelixConfig().active


def test_from_dict_names_the_nearest_setting():
    """A mistyped key would otherwise leave its setting at the default without a word."""
    assert error_of(HelixConfig.from_dict, {"intra_head_parallel": 2}) == (
        "unknown Helix setting 'intra_head_parallel'. Valid: intra_head_parallel_size, attention, exchange, "
        "query_layout, kernel. Did you mean intra_head_parallel_size?"
    )
    assert error_of(HelixConfig.from_dict, {"zzz": 2}).endswith("query_layout, kernel.")
    text = error_of(HelixConfig.from_dict, {"intra_head_parallel_size": 0})
    assert text.startswith("intra-head parallel size 0 is not a whole number")


def test_settings_cannot_change_under_a_running_model():
    """Layers of one model share the object."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        HelixConfig().exchange = "gather-kv"  # type: ignore[misc]


# ------------------------------------------------------------------------------- flags


def parse(*flags: str) -> HelixConfig:
    return HelixConfig.from_args(add_helix_arguments(argparse.ArgumentParser()).parse_args(flags))


def test_no_flags_are_the_defaults():
    """Stock Megatron scripts run with the flags registered: they must get stock attention."""
    assert parse() == HelixConfig()


def test_every_setting_has_a_flag_that_reaches_it():
    """A flag read into the wrong setting, or not at all, would be ignored silently."""
    assert set(FLAGS) == set(SETTINGS)
    values = {
        "intra_head_parallel_size": 4,
        "attention": "exact",
        "exchange": "gather-qk",
        "query_layout": "segments",
        "kernel": "host",
    }
    assert set(values) == set(SETTINGS)
    for name, value in values.items():
        assert parse(FLAGS[name], str(value)) == HelixConfig(**{name: value})
    assert parse("--helix-attention", "segment-local").attention == "segment-local"
    every = [text for name, value in values.items() for text in (FLAGS[name], str(value))]
    assert parse(*every) == HelixConfig(**values)


@pytest.mark.parametrize("name", ["attention", "exchange", "query_layout", "kernel"])
def test_flags_accept_exactly_the_valid_values(name, capsys):
    """argparse refuses what the configuration would refuse, before torch is imported."""
    for value in HelixConfig.choices(name):
        assert getattr(parse(FLAGS[name], value), name) == value
    with pytest.raises(SystemExit):
        parse(FLAGS[name], "zzz")
    assert FLAGS[name] in capsys.readouterr().err
    assert HelixConfig.choices(name) in (ATTENTIONS, EXCHANGES, QUERY_LAYOUTS, KERNELS)


def test_help_is_the_settings_own():
    """One text per setting, whatever the skin; and the default is shown."""
    text = " ".join(add_helix_arguments(argparse.ArgumentParser()).format_help().split())
    text = text.replace("- ", "-")  # argparse breaks lines at hyphens
    for setting in dataclasses.fields(HelixConfig):
        wanted = f"{setting.metadata['help']} (default: {setting.default})"
        assert wanted.replace("- ", "-") in text
        assert FLAGS[setting.name] in text


# ----------------------------------------------------------------------- command lines


def test_command_lines_print_a_mistake_as_one_paragraph(monkeypatch, capsys):
    """A traceback of our own code says nothing to whoever mistyped a flag; and flags in the text must not be
    broken over lines, for they are copied from there."""
    flag = "--intra-head-parallel-size"
    monkeypatch.delenv("RANK", raising=False)
    for start in range(60, 90):
        with pytest.raises(SystemExit) as end, exit_on_error("helix"):
            raise HelixError("x" * start + f" {flag} 2")
        assert end.value.code == 2
        text = capsys.readouterr().err
        assert text.split() == ["helix:", "error:", "x" * start, flag, "2"]
        assert max(map(len, text.splitlines())) <= 100


def test_only_the_first_rank_prints_a_mistake(monkeypatch, capsys):
    """Eight ranks of a launcher would say the same eight times; all of them must end, though."""
    for rank, printed in (("0", "helix: error: no\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit), exit_on_error("helix"):
            raise HelixError("no")
        assert capsys.readouterr().err == printed
    with pytest.raises(ZeroDivisionError), exit_on_error("helix"):
        raise ZeroDivisionError  # a fault of ours keeps its traceback


# ------------------------------------------------------------------------------ layout


def test_head_groups_are_tensor_parallel_ranks_over_segments():
    """n = TP/m; the error says which m would do."""
    assert HelixConfig(4).head_groups(8) == 2
    assert error_of(HelixConfig(3).head_groups, 8) == (
        "intra-head parallel size 3 does not divide the tensor parallel size 8. Valid: 1, 2, 4, 8. "
        "Or change --tensor-model-parallel-size to a multiple of it."
    )


@pytest.mark.parametrize(
    ("config", "heads", "query_layout"),
    [
        (HelixConfig(2), 8, "heads"),
        (HelixConfig(2), 6, "segments"),  # 6 query heads cannot be dealt to 4 ranks
        (HelixConfig(2, exchange="gather-kv"), 8, "heads"),
        (HelixConfig(2, exchange="gather-qk"), 8, "segments"),
        (HelixConfig(2, exchange="score-reduce"), 8, "segments"),
        (HelixConfig(2, exchange="all-to-all"), 8, "segments"),
        (HelixConfig(2, exchange="all-to-all-heads"), 8, "segments"),
        (HelixConfig(2, "segment-local"), 8, "segments"),
        (HelixConfig(2, query_layout="segments"), 8, "segments"),
        (HelixConfig(2, query_layout="heads"), 8, "heads"),
    ],
)
def test_query_heads_are_dealt_whole_where_that_is_possible_and_asked_for(
    config, heads, query_layout
):
    """Cutting queries without need multiplies what crosses; an exchange of query segments needs them cut."""
    layout = config.layout(heads, 2, 16, 4, rotary="interleaved", rotary_dim=8, output_gate=True)
    assert layout.query_layout == query_layout
    assert (layout.num_heads, layout.num_kv_heads, layout.head_dim) == (heads, 2, 16)
    assert (layout.head_groups, layout.segments) == (2, 2)
    assert (layout.rotary, layout.rotary_dim, layout.output_gate) == ("interleaved", 8, True)


def test_query_layout_heads_is_refused_where_it_does_not_fit():
    """Asked for by name, a layout must not silently become another."""
    assert error_of(HelixConfig(2, query_layout="heads").layout, 6, 2, 16, 4) == (
        "query layout heads deals the 3 query heads of a head group whole to 2 ranks, which needs the number "
        "of query heads (6) to be divisible by m·n = 4. Try --helix-query-layout segments."
    )
