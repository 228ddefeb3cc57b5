"""A layout that cannot be says what is wrong, and what would be right."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest

from helix_megatron.arguments import as_flag
from helix_megatron.core.layout import HeadLayout
from helix_megatron.deepspeed.config import in_words_of_the_block
from helix_megatron.errors import HelixError


def error_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(HelixError) as error:
        HeadLayout(*args, **kwargs)
    return error.value.worded(as_flag)


ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "heads by groups": (
        (40, 40, 96, 3, 4),
        {},
        "40 heads cannot form 3 head groups. Valid numbers of groups: 1, 2, 4, 5, 8, 10, 20, 40. "
        "With 12 ranks try --intra-head-parallel-size 3.",
    ),
    "heads and key-value heads by groups": (
        (6, 2, 8, 4, 1),
        {},
        "6 heads cannot form 4 head groups. Valid numbers of groups: 1, 2. "
        "With 4 ranks try --intra-head-parallel-size 2.",
    ),
    "key-value heads by groups": (
        (32, 8, 128, 16, 1),
        {},
        "8 key-value heads cannot form 16 head groups: a key-value head would be split among groups. "
        "Valid numbers of groups: 1, 2, 4, 8. With 16 ranks try --intra-head-parallel-size 2.",
    ),
    "no number of segments fits": (
        (4, 4, 8, 3, 1),
        {},
        "4 heads cannot form 3 head groups. Valid numbers of groups: 1, 2, 4. "
        "No number of segments makes 3 ranks fit; change the tensor parallel size.",
    ),
    "query layout heads narrows what fits": (
        (6, 6, 8, 4, 1),
        {"query_layout": "heads"},
        "6 heads cannot form 4 head groups. Valid numbers of groups: 1, 2, 3, 6. "
        "With 4 ranks try --intra-head-parallel-size 2 --helix-query-layout segments.",
    ),
    "query heads by key-value heads": (
        (6, 4, 8),
        {},
        "6 query heads cannot share 4 key-value heads evenly. "
        "Valid numbers of key-value heads: 1, 2, 3, 6.",
    ),
    "head dimensions by segments": (
        (2, 2, 10, 1, 4),
        {"rotary": "none"},
        "a head of 10 dimensions cannot be cut into 4 equal segments. "
        "Valid numbers of segments: 1, 2, 5, 10.",
    ),
    "head dimensions by segments under rotary": (
        (2, 2, 10, 1, 4),
        {},
        "a head of 10 dimensions cannot be cut into 4 equal segments. Valid numbers of segments: 1, 5.",
    ),
    "odd segment under rotary": (
        (2, 2, 6, 1, 2),
        {},
        "2 segments of a head of 6 dimensions would split a rotary pair: 3 pairs cannot be dealt evenly. "
        "Valid numbers of segments: 1, 3.",
    ),
    "odd segment under interleaved rotary": (
        (2, 2, 6, 1, 6),
        {"rotary": "interleaved"},
        "6 segments of a head of 6 dimensions would split a rotary pair: 3 pairs cannot be dealt evenly. "
        "Valid numbers of segments: 1, 3.",
    ),
    "partial rotary": (
        (2, 2, 16, 1, 4),
        {"rotary_dim": 4},
        "4 segments of a head of 16 dimensions would split a rotary pair: 2 pairs and 12 others cannot "
        "be dealt evenly. Valid numbers of segments: 1, 2.",
    ),
    "rotary dimensions beyond the head": (
        (2, 2, 8),
        {"rotary_dim": 10},
        "rotary embedding cannot rotate 10 of 8 dimensions. Valid: an even number up to 8, or rotary "
        "style none.",
    ),
    "odd rotary dimensions": (
        (2, 2, 8),
        {"rotary_dim": 3},
        "rotary embedding cannot rotate 3 of 8 dimensions. Valid: an even number up to 8, or rotary "
        "style none.",
    ),
    "fractional rotary dimensions": (
        (2, 2, 8),
        {"rotary_dim": 4.0},
        "rotary embedding cannot rotate 4.0 of 8 dimensions. Valid: an even number up to 8, or rotary "
        "style none.",
    ),
    "query layout heads": (
        (6, 2, 8, 2, 2),
        {"query_layout": "heads"},
        "query layout heads deals the 3 query heads of a head group whole to 2 ranks, which needs the number "
        "of query heads (6) to be divisible by m·n = 4. Try --helix-query-layout segments.",
    ),
    "unknown query layout": (
        (2, 2, 8),
        {"query_layout": "whole"},
        "query layout 'whole' is unknown. Valid: segments, heads.",
    ),
    "unknown rotary style": (
        (2, 2, 8),
        {"rotary": "gptj"},
        "rotary style 'gptj' is unknown. Valid: none, half, interleaved.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_values_and_valid_ones(name):
    """The text is the interface of whoever mistyped a number; it is held word for word."""
    args, kwargs, text = ERRORS[name]
    assert error_of(*args, **kwargs) == text


def test_each_host_words_an_error_in_its_own_language():
    """A Python user has no flags, a configuration file has no keywords; and a program reads the fields."""
    with pytest.raises(HelixError) as caught, in_words_of_the_block():
        HeadLayout(6, 6, 8, 4, 1, query_layout="heads")
    error = caught.value.__cause__
    assert isinstance(error, HelixError)
    assert (error.setting, error.value, error.valid) == ("head_groups", 4, (1, 2, 3, 6))
    said = (
        "6 heads cannot form 4 head groups. Valid numbers of groups: 1, 2, 3, 6. With 4 ranks try "
    )
    assert str(error) == said + 'intra_head_parallel_size=2 query_layout="segments".'
    flags = "--intra-head-parallel-size 2 --helix-query-layout segments."
    assert error.worded(as_flag) == said + flags
    keys = '"intra_head_parallel_size": 2 "query_layout": "segments".'
    assert str(caught.value) == said + keys
    assert (
        pickle.loads(pickle.dumps(error)).worded(as_flag) == said + flags
    )  # it travels between ranks


@pytest.mark.parametrize("value", [0, -2, 2.0, "4", None, True])
@pytest.mark.parametrize(
    "name", ["num_heads", "num_kv_heads", "head_dim", "head_groups", "segments"]
)
def test_sizes_must_be_positive_whole_numbers(name, value):
    """4.0 heads or zero segments must not reach the arithmetic, where they fail far from their cause."""
    sizes = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "head_groups": 1, "segments": 1}
    text = error_of(**{**sizes, name: value})
    assert text == f"{name} is {value!r}. It must be a whole number of at least 1."


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_layout_is_refused(rank):
    """Negative ranks index from the end in numpy: they would give somebody else's rows."""
    layout = HeadLayout(4, 4, 8, 2, 2)
    for ask in (layout.partition, layout.qkv_rows, layout.proj_columns, layout.kv_heads):
        with pytest.raises(HelixError) as error:
            ask(rank)
        assert str(error.value) == f"rank {rank} is not in this layout. Valid ranks: 0 to 3."


def refused(**sizes: Any) -> str:
    """Why this layout cannot be; empty if it can."""
    try:
        HeadLayout(**sizes)
    except HelixError as error:
        return error.worded(as_flag)
    return ""


def small_layouts() -> Iterator[dict[str, Any]]:
    """Legal and illegal ones, of every kind of rotary embedding and both query layouts."""
    rotary: list[dict[str, Any]] = [
        {"head_dim": 6, "rotary": "none"},
        {"head_dim": 12},
        {"head_dim": 8, "rotary": "interleaved"},
        {"head_dim": 12, "rotary_dim": 4},
        {"head_dim": 8, "rotary_dim": 3},
    ]
    for kv_heads, share, groups, segments, query_layout, head in itertools.product(
        range(1, 9), (1, 2, 3), range(1, 9), (1, 2, 3, 4), ("segments", "heads"), rotary
    ):
        yield {
            "num_heads": kv_heads * share,
            "num_kv_heads": kv_heads,
            "head_groups": groups,
            "segments": segments,
            "query_layout": query_layout,
            **head,
        }


def test_a_suggested_number_of_segments_is_legal():
    """Whoever follows the advice must not meet the next error; whoever gets none must not have missed any."""
    advised = hopeless = 0
    for sizes in small_layouts():
        text, ranks = refused(**sizes), sizes["head_groups"] * sizes["segments"]
        advice = re.search(
            r"With (\d+) ranks try --intra-head-parallel-size (\d+)"
            r"(?: --helix-query-layout (segments))?\.",
            text,
        )
        if advice:
            m, query_layout = int(advice[2]), advice[3] or sizes["query_layout"]
            assert int(advice[1]) == ranks
            assert ranks % m == 0
            taken = {"head_groups": ranks // m, "segments": m, "query_layout": query_layout}
            assert not refused(**{**sizes, **taken}), (sizes, text)
            if advice[3]:  # the layout that was asked for must be out of reach
                assert refused(**{**sizes, **taken, "query_layout": "heads"})
            advised += 1
        elif "No number of segments" in text:
            for m in range(1, ranks + 1):
                if ranks % m == 0:
                    other = {**sizes, "head_groups": ranks // m, "segments": m}
                    assert refused(**{**other, "query_layout": "segments"}), (sizes, text)
            hopeless += 1
    assert advised > 100
    assert hopeless > 100


def test_valid_numbers_in_errors_are_exactly_the_legal_ones():
    """A listed number that fails, or a missing one that works, sends people the wrong way."""
    seen = 0
    for head_dim, m, rotary in itertools.product(
        range(1, 25), range(1, 13), ("none", "half", "interleaved")
    ):
        for rotary_dim in (None, 2, 4, 6, 12):
            head = {"head_dim": head_dim, "rotary": rotary, "rotary_dim": rotary_dim}
            text = refused(num_heads=1, num_kv_heads=1, segments=m, **head)
            listed = re.search(r"Valid numbers of segments: ([\d, ]+)\.", text)
            if listed:
                legal = [
                    str(k)
                    for k in range(1, head_dim + 1)
                    if not refused(num_heads=1, num_kv_heads=1, segments=k, **head)
                ]
                assert listed[1] == ", ".join(legal), text
                seen += 1
    assert seen > 100
