"""The block `"helix"` of a DeepSpeed configuration: strict, and read without torch."""

from __future__ import annotations

import re
import warnings

import pytest
from waiting import printed_afresh

from helix_megatron.config import HelixConfig
from helix_megatron.deepspeed import HelixBlock, read_block
from helix_megatron.deepspeed.config import in_words_of_the_block
from helix_megatron.deepspeed.support import check_settings, enabled, zero_stage
from helix_megatron.errors import HelixError

BLOCK = {"intra_head_parallel_size": 2, "tensor_parallel_size": 4, "exchange": "gather-kv"}


def error_of(block: object) -> str:
    with pytest.raises(HelixError) as error:
        HelixBlock.from_dict(block)
    return str(error.value)


def test_a_block_is_a_configuration_and_sizes():
    """Every key of HelixConfig is a key of the block, so settings mean the same in all hosts."""
    block = HelixBlock.from_dict(BLOCK)
    assert block.helix == HelixConfig(2, exchange="gather-kv")
    assert block.tensor_parallel_size == 4
    assert (block.mlp, block.embeddings) == (True, True)
    assert set(HelixConfig().to_dict()) < set(block.to_dict())
    assert HelixBlock.from_dict(block.to_dict()) == block


def test_an_unknown_key_is_an_error_with_the_nearest_valid_one():
    """DeepSpeed ignores keys that it does not know; a misspelt layout would train another one silently."""
    assert error_of({"intra_head_paralel_size": 2}) == (
        'unknown key "intra_head_paralel_size" in the block "helix" of the DeepSpeed configuration. Valid: '
        "intra_head_parallel_size, attention, exchange, query_layout, kernel, tensor_parallel_size, mlp, "
        'embeddings. Did you mean "intra_head_parallel_size"?'
    )
    assert 'Did you mean "tensor_parallel_size"?' in error_of({"tensor_model_parallel_size": 4})
    assert "Did you mean" not in error_of({"zzz": 4})


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (2, '"helix" in the DeepSpeed configuration is 2. It must be an object such as'),
        ({"tensor_parallel_size": "4"}, "\"tensor_parallel_size\" in the block \"helix\" is '4'. It must be"),
        ({"tensor_parallel_size": 0}, "It must be a whole number of at least 1"),
        ({"tensor_parallel_size": True}, "It must be a whole number of at least 1"),
        ({"mlp": 1}, '"mlp" in the block "helix" is 1. Valid: true, false.'),
        ({"exchange": "gather_kv"}, "exchange 'gather_kv' is unknown. Valid: auto, gather-kv,"),
        (
            {"intra_head_parallel_size": 3, "tensor_parallel_size": 4},
            '"intra_head_parallel_size" 3 in the block "helix" does not divide "tensor_parallel_size" 4. '
            "Valid with 4: 1, 2, 4.",
        ),
    ],
)  # fmt: skip
def test_wrong_values_are_named(block, text):
    """Each message says what is wrong and what would be right."""
    assert text in error_of(block)


def test_sizes_are_those_of_the_world_unless_given():
    """A block without a size takes all ranks; one that cannot be is refused with those that can."""
    m_2 = HelixBlock(HelixConfig(2))
    assert m_2.for_world(4).tensor_parallel_size == 4
    assert HelixBlock(HelixConfig(2), 2).for_world(8).tensor_parallel_size == 2
    with pytest.raises(
        HelixError, match=r"4 .* does not divide the 6 ranks of the world. Valid: 2, 6\."
    ):
        HelixBlock(HelixConfig(2), 4).for_world(6)
    with pytest.raises(HelixError, match="No size fits: start a multiple of 2 ranks"):
        HelixBlock(HelixConfig(2), 4).for_world(3)
    with pytest.raises(HelixError, match="does not divide the 3 ranks that hold the model"):
        m_2.for_world(3)


@pytest.mark.parametrize(
    ("block", "active"),
    [
        ({}, False),
        ({"intra_head_parallel_size": 1}, False),
        ({"tensor_parallel_size": 1}, False),
        ({"intra_head_parallel_size": 2}, True),
        ({"intra_head_parallel_size": 1, "tensor_parallel_size": 2}, True),
    ],
)
def test_a_block_that_cuts_nothing_is_off(block, active):
    """m = 1 without a size must be DeepSpeed as it is, and not tensor parallelism over all ranks."""
    assert HelixBlock.from_dict(block).active is active


@pytest.mark.parametrize("key", ["helx", "Helix", "helix_parallel", "hellix"])
def test_a_near_miss_at_the_top_is_a_warning(key):
    """DeepSpeed says nothing to it, and the run would be one without Helix."""
    with pytest.warns(UserWarning, match=f'has a key "{key}", which DeepSpeed ignores') as caught:
        assert read_block({"train_batch_size": 4, key: BLOCK}) is None
    assert 'Did you mean "helix"?' in str(caught[0].message)


def test_deepspeeds_own_keys_give_no_warning():
    """The warning must stay rare enough to be read."""
    from deepspeed.runtime import constants

    names = [value for value in vars(constants).values() if isinstance(value, str)]
    assert len(names) > 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_block(dict.fromkeys(names)) is None
        assert read_block({"helix": BLOCK}) == HelixBlock.from_dict(BLOCK)


def test_reading_a_block_needs_neither_torch_nor_deepspeed():
    """A launcher checks the file before any rank starts."""
    program = "import helix_megatron.deepspeed as d; d.read_block({'helix': {}})"
    assert printed_afresh(program) == ["[]"]


def test_errors_speak_of_keys_and_not_of_flags():
    """A layout does not know from which skin its numbers came."""
    with pytest.raises(HelixError) as error, in_words_of_the_block():
        HelixConfig(3).head_groups(4)
    assert str(error.value).endswith('Or change "tensor_parallel_size" to a multiple of it.')


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"tensor_parallel": {"autotp_size": 4}},
            '"tensor_parallel.autotp_size": 4 .* second time',
        ),
        ({"sequence_parallel_size": 2}, '"sequence_parallel_size": 2 .* Ulysses'),
        ({"expert_parallel": {"enabled": True}}, "AutoEP refuses a tensor parallel mpu"),
        ({"hybrid_engine": {"enabled": True}}, "replaces the layers that were cut"),
        ({"compile": {"deepcompile": True}}, "DeepCompile rewrites"),
        ({"checkpoint": {"load_universal": True}}, "universal checkpoints know no segments"),
    ],
)
def test_settings_that_would_undo_the_cut_are_refused(settings, text):
    """They would fail late, or train something else."""
    with pytest.raises(HelixError, match=text) as error:
        check_settings(settings)
    assert re.search(r"(Leave it out|Save and load)", str(error.value))


def test_settings_that_are_off_are_not_refused():
    """Configurations that spell out defaults stay valid."""
    check_settings(
        {
            "tensor_parallel": {"autotp_size": 0},
            "sequence_parallel_size": 1,
            "expert_parallel": {"enabled": False},
            "compile": {},
            "checkpoint": {"load_universal": False},
        }
    )
    assert [zero_stage(s) for s in ({}, {"zero_optimization": {"stage": 2}})] == [0, 2]
    assert enabled({"bf16": {"enabled": True}}, "bf16", "fp16")
    assert not enabled({"bf16": {"enabled": False}, "fp16": {}}, "bf16", "fp16")
