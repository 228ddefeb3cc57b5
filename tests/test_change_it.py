"""The five walks of docs/change-it.md: a toy is added in one place, and users see it."""

from __future__ import annotations

import argparse
import dataclasses
import types

import pytest

from helix_megatron import hardware
from helix_megatron.arguments import as_flag
from helix_megatron.core.exchanges import AttentionShape, choice
from helix_megatron.core.exchanges.gather_qk import GatherQK
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError
from helix_megatron.flags import add_flags, check_values, setting, values_of
from helix_megatron.megatron import support
from helix_megatron.model import families
from helix_megatron.plan import roofline


class Telepathy(GatherQK):
    """An exchange that sends nothing."""

    name = "telepathy"

    def bytes(self, shape: AttentionShape) -> int:
        return 0

    def messages(self, shape: AttentionShape) -> int:
        return 0

    def flops(self, shape: AttentionShape) -> int:
        return 1


@pytest.fixture
def no_choices_kept():
    """Choices are cached by shape, not by what is registered."""
    choice.candidates.cache_clear()
    yield
    choice.candidates.cache_clear()


def test_an_exchange(monkeypatch, no_choices_kept):
    monkeypatch.setattr(choice, "EXACT", (*choice.EXACT, Telepathy()))
    shape = AttentionShape(HeadLayout(4, 2, 64, 2, 2), batch=1, query_length=64, key_length=64)
    assert choice.choose(shape).name == "telepathy"
    assert "telepathy" in choice.explain(shape)


def test_a_flag():
    @dataclasses.dataclass(frozen=True)
    class Toy:
        toy_size: int = setting(3, "how large the toy is", at_least=1)

        def __post_init__(self) -> None:
            check_values(self)

    parser = argparse.ArgumentParser()
    add_flags(parser, Toy)
    assert "how large the toy is (default: 3)" in " ".join(parser.format_help().split())
    asked = vars(parser.parse_args(["--toy-size", "5"]))
    assert Toy(**values_of(Toy, asked)).toy_size == 5
    with pytest.raises(HelixError, match=r"toy_size is 0\. It must be a whole number") as error:
        Toy(0)
    assert error.value.worded(as_flag).startswith("--toy-size is 0. ")


def test_a_family(monkeypatch):
    toy = dataclasses.replace(families.FAMILIES["qwen3"], name="toy", architecture="ToyForCausalLM")
    monkeypatch.setitem(families.FAMILIES, "toy", toy)
    monkeypatch.setitem(families.CUTTABLE, "toy", toy.modules)
    config = {
        "model_type": "toy",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    family = families.family_of(config)
    assert (family.name, family.model_flags(config)["num_query_groups"]) == ("toy", 2)
    assert families.CUTTABLE["toy"] is toy.modules
    with pytest.raises(HelixError, match="attention_bias"):
        family.model_flags(config | {"attention_bias": True})


def test_a_constant_of_the_planner():
    h100 = hardware.CHIPS["h100"]
    twice = dataclasses.replace(h100, flops={"bf16": 2 * h100.flops["bf16"]})
    now, then = (roofline.gemm_seconds(chip, 8192, 8192, 8192, "bf16") for chip in (h100, twice))
    assert then == pytest.approx(now / 2, rel=0.05)


def test_a_refusal(monkeypatch):
    where = support.EVERYWHERE
    row = support.Refused("toy_attention", False, where, "toys have no heads to cut")
    monkeypatch.setattr(support, "REFUSED", (*support.REFUSED, row))
    config = types.SimpleNamespace(toy_attention=True)
    with pytest.raises(
        HelixError, match=r"toy_attention = True .*: toys have no heads to cut"
    ) as error:
        support.check(config, where)
    assert "intra_head_parallel_size at 1" in str(error.value)
    assert "--intra-head-parallel-size at 1" in error.value.worded(as_flag)
