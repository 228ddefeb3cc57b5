"""How the experts of a loaded model are dealt to ranks: whole where that is possible, else cut."""

from __future__ import annotations

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.inference.model_flags import deal_experts
from helix_megatron.model.description import ModelConfig

MOE = {"num_experts": 6, "moe_ffn_hidden_size": 24, "hidden_size": 32, "num_layers": 1}
MOE |= {"num_attention_heads": 4}


@pytest.mark.parametrize(
    ("flags", "ranks", "asked", "expected"),
    [
        ({}, 2, (None, None), (2, 1)),
        ({"disable_bias_linear": True}, 4, (None, None), (1, 4)),
        ({}, 4, (None, None), "Valid pairs .*: 1 and 1, 2 and 1. 2 and 1 keep the fewest copies"),
        (
            {"disable_bias_linear": True},
            16,
            (None, None),
            "24 columns do not divide by 16. Valid pairs .*2 and 8. 2 and 8 keep the fewest",
        ),
        ({}, 4, (2, None), (2, 1)),
        ({"disable_bias_linear": True}, 4, (1, None), (1, 4)),
        ({}, 4, (1, None), (1, 1)),
        ({"disable_bias_linear": True}, 4, (None, 2), (2, 2)),
        ({"disable_bias_linear": True}, 8, (None, 2), (1, 2)),
        ({}, 4, (3, 2), (3, 2)),
        ({"num_experts": None}, 4, (None, None), (1, None)),
    ],
)
def test_experts_are_dealt_whole_or_cut(flags, ranks, asked, expected):
    """Whole ones need the fewest messages; an odd number of them is cut; and biases cannot be cut."""
    model = ModelConfig.from_flags(MOE | flags)
    if isinstance(expected, str):
        with pytest.raises(HelixError, match=expected):
            deal_experts(model, ranks, *asked, note=print)
    else:
        assert deal_experts(model, ranks, *asked, note=print) == expected
