"""docs/conversion.md says of each model type what works, and a test shows each cell of its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import test_family_generation as generation
import torch
from hf_models import MODELS, config_of
from tiny_transformers import BY_FORM, tiny_config
from tiny_transformers import FAMILIES as CUT_FAMILIES

from helix_megatron.huggingface.forms import SHOWN
from helix_megatron.model.families import CUTTABLE, FAMILIES
from helix_megatron.plan.models import read_config

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import model_types


def test_the_page_has_the_table_of_today():
    """`python scripts/model_types.py` writes it."""
    assert model_types.PAGE.read_text() == model_types.page()


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
def test_every_cell_is_shown_by_a_test():
    """A type that no test of a column runs must not say yes there."""
    table = {
        row[0].strip("`"): dict(zip(model_types.HEADER, row, strict=True))
        for row in model_types.rows()
    }

    def saying(column: str, *words: str) -> set[str]:
        return {name for name, cells in table.items() if cells[column] in words}

    converted = {kind for kind, _ in MODELS.values()}
    refused = {MODELS[name][0] for name in generation.REFUSED}
    cut = {tiny_config(name).model_type for name in CUT_FAMILIES}
    assert saying("cut in place", "query heads whole or cut") == cut == set(CUTTABLE)
    assert saying("cut in place", "whole query heads") == SHOWN
    # tests/huggingface/test_huggingface_forms.py
    assert {tiny_config(name).model_type for name in BY_FORM} == SHOWN
    assert saying("convert", "yes") == converted == set(FAMILIES)
    assert saying("generate, serve", "yes") == converted - refused
    assert saying("plan", "yes") == converted  # the test below


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_the_parameters_of_transformers(tmp_path, name):
    """`helix plan --model config.json` must see every weight of the model: its memory and FLOPs follow."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    assert read_config(tmp_path / "config.json").parameters == model.num_parameters() + biases
