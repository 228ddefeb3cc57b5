"""docs/conversion.md says of each model type what works, and a test shows each cell of its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hf_models import MODELS, config_of
from tiny_transformers import BY_FORM, tiny_config
from tiny_transformers import FAMILIES as CUT_FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from helix_megatron.errors import HelixError
from helix_megatron.huggingface.forms import SHOWN, delta_net_cuts, mamba_cuts
from helix_megatron.model.families import CUTTABLE, FAMILIES, READ_AS
from helix_megatron.plan.models import read_config
from helix_megatron.plan.outlines import OUTLINES

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import model_types

PLANNED = set(OUTLINES) & SHOWN


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

    for name, other in READ_AS.items():  # tests/model/test_kimi.py
        assert table.pop(name) == table[other] | {"model type": f"`{name}`"}

    def saying(column: str, *words: str) -> set[str]:
        return {name for name, cells in table.items() if cells[column] in words}

    converted = {kind for kind, _ in MODELS.values()}
    cut = {tiny_config(name).model_type for name in CUT_FAMILIES}
    assert saying("cut in place", "query heads whole or cut") == cut == set(CUTTABLE)
    assert saying("cut in place", "whole query heads") == SHOWN
    # tests/huggingface/test_huggingface_forms.py
    assert {tiny_config(name).model_type for name in BY_FORM} == SHOWN
    assert saying("convert", "yes") == converted == set(FAMILIES)
    # tests/model/test_family_generation.py
    engine = {name for name in converted if FAMILIES[name].runs_in_engine}
    assert saying("generate, serve", "megatron-core") == engine
    # tests/inference/test_inference_transformers.py runs all of BY_FORM, from files; of those that convert
    # tests/model/test_family_generation.py the checkpoints
    assert saying("generate, serve", "transformers") == SHOWN - engine
    assert saying("plan", "yes") == converted | PLANNED  # the tests below


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
@pytest.mark.parametrize("name", MODELS)
def test_the_planner_counts_the_parameters_of_transformers(tmp_path, name):
    """`helix plan --model config.json` must see every weight of the model: its memory and FLOPs follow."""
    kind, settings = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    found = read_config(tmp_path / "config.json").parameters
    outlined = kind in OUTLINES  # which know nothing of the small tensors
    assert found == pytest.approx(model.num_parameters() + biases, rel=5e-3 if outlined else 0)


@pytest.mark.parametrize("name", sorted(BY_FORM))
def test_the_planner_reads_what_transformers_writes(tmp_path, name):
    """Sizes of models that no conversion knows, from the config.json of today's transformers."""
    config = tiny_config(name)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    known, shared = config.model_type in set(FAMILIES) | PLANNED, name == "gemma4, shared keys"
    if not known or shared:
        with pytest.raises(HelixError, match="num_kv_shared_layers" if known else "models of type"):
            read_config(tmp_path / "config.json")
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = read_config(tmp_path / "config.json").parameters
    small = sum(p.numel() for p in model.parameters() if p.dim() < 2)  # of which outlines know few
    assert found == pytest.approx(model.num_parameters(), abs=small)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_5", {"linear_num_key_heads": 8, "linear_num_value_heads": 8}),
        ("nemotron_h", {"n_groups": 4, "mamba_num_heads": 24}),
        ("falcon_h1", {"mamba_d_state": 12, "mamba_d_ssm": 192, "mamba_n_heads": 24}),
    ],
)
def test_the_planner_deals_linear_layers_as_the_host_does(tmp_path, name, changes):
    """On which numbers of ranks a rank has some of a layer's heads, and on which it has all."""
    config = tiny_config(name, **changes)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = read_config(tmp_path / "config.json").special.linear
    layer = next(part for part in model.modules() if hasattr(part, "A_log"))
    for ranks in range(2, 25):
        cuts = dict(delta_net_cuts(layer, ranks)) or dict(mamba_cuts(layer, ranks))
        assert linear.ranks(ranks) == (ranks if cuts else 1), ranks
