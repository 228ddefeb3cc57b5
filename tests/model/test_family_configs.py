"""config.json ⇄ model flags: what can be expressed, what is refused, and with which words.

The oracle is `transformers`, which has the classes that these files are of.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest
from hf_models import MODELS, config_of
from waiting import printed_afresh

from helix_megatron.errors import HelixError
from helix_megatron.huggingface.load import read_configuration
from helix_megatron.model.families import (
    FAMILIES,
    family_for_flags,
    family_named,
    family_of,
)
from helix_megatron.model.families.pieces import HARMLESS, HARMLESS_PREFIXES, READ
from helix_megatron.model.families.towers import text_config
from helix_megatron.plan.models import spec_of_config


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_transformers(name):
    """Published config.json files leave keys out, and mean the default of the model's class."""
    from transformers import AutoConfig

    sizes = (
        {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 99}
        if name == "gpt2"
        else {
            "num_hidden_layers": 4,
            "hidden_size": 512,
            "num_attention_heads": 128 if name == "deepseek_v3" else 32,
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "vocab_size": 99,
        }
    )
    if name == "granitemoehybrid":
        sizes["rms_norm_eps"] = 1e-5  # Megatron's Mamba layers have no other
    family = family_named(name)
    known = {key for piece in family.pieces for key in piece.keys}
    sizes = {key: size for key, size in sizes.items() if key in known}
    whole = AutoConfig.for_model(name, **sizes).to_dict()
    assert family.model_flags(sizes) == family.model_flags(whole)
    left_out = {"moe_intermediate_size", "rms_norm_eps"}
    left_out |= {"nemotron_h": {"num_hidden_layers", "intermediate_size"}}.get(name, set())
    left_out |= {"gemma3_text": {"vocab_size", "num_attention_heads"}}.get(name, set())
    for key in sizes.keys() - left_out:
        with pytest.raises(HelixError, match=f"config.json has no {key}"):
            family.model_flags({k: v for k, v in sizes.items() if k != key})


def test_older_files_spell_the_layers_of_nemotron_otherwise():
    """As one text, which stays on the way back, or by other names; transformers reads these, too."""
    config = config_of("nemotron h")
    family = family_of(config)
    flags = family.model_flags(config)
    rest = {key: value for key, value in config.items() if key != "layers_block_type"}
    older = rest | {"hybrid_override_pattern": "ME*-M*", "num_hidden_layers": 6}
    assert family.model_flags(older) == flags
    assert family.config(flags, older) == older
    names = ["mamba", "moe", "attention", "mlp", "mamba", "attention"]
    assert family.model_flags(rest | {"layers_block_type": names}) == flags


def test_bamba_turns_the_share_of_a_head_that_transformers_turns():
    """It overwrites the key beside `rope_parameters`, and reads the one among them."""
    from transformers import AutoConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    linear = rope | {"rope_type": "linear", "factor": 2.0}
    for given in (
        {"partial_rotary_factor": 0.25},
        {"rope_parameters": rope},
        {"rope_parameters": linear},
    ):
        config = {k: v for k, v in config_of("bamba").items() if k != "rope_parameters"} | given
        read = AutoConfig.for_model(**config).rope_parameters["partial_rotary_factor"]
        family = family_of(config)
        flags = family.model_flags(config)
        assert flags["rotary_percent"] == read
        assert family.config(flags, config) == config


@pytest.mark.parametrize("name", ["qwen2 with windows in some layers", "qwen2 moe"])
def test_layers_with_windows_without_a_list_of_them(name):
    """Older files have max_window_layers only, and the two families read it in opposite ways."""
    from transformers import AutoConfig

    kind, settings = MODELS[name]
    settings = settings | {"num_hidden_layers": 6, "max_window_layers": 3}
    settings |= {"use_sliding_window": True, "sliding_window": 5}
    listed = AutoConfig.for_model(kind, **settings).to_dict()
    family = family_named(kind)
    flags = family.model_flags({k: v for k, v in listed.items() if k != "layer_types"})
    assert flags == family.model_flags(listed)
    assert flags["window_size"] == 4
    expected = [1, 0, 1, 0, 0, 0] if kind == "qwen2_moe" else [0, 0, 0, 1, 1, 1]
    assert flags["window_attn_skip_freq"] == expected


def test_older_spellings_of_config():
    """Before transformers 5 files say rope_theta and rope_scaling; early Gemma says gelu and means tanh."""
    config = config_of("llama 3")
    rope = config.pop("rope_parameters")
    old = config | {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": {("type" if key == "rope_type" else key): v for key, v in rope.items()},
        "torch_dtype": "float16",
    }
    llama = family_named("llama")
    flags = llama.model_flags(old)
    assert flags == llama.model_flags(config_of("llama 3"))
    assert llama.config(flags, old) == old
    moved = llama.config(flags | {"rotary_base": 20000}, old)
    assert moved["rope_theta"] == moved["rope_parameters"]["rope_theta"] == 20000.0
    assert moved["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert moved["torch_dtype"] == "float16"

    gemma = config_of("gemma") | {"hidden_act": "gelu", "hidden_activation": None}
    assert family_of(gemma).model_flags(gemma)["geglu"]

    olmo = config_of("olmo3")
    beside = {"rope_type": "default", "rope_theta": 10000.0}  # as transformers 5.2 writes
    mixed = olmo | {"rope_parameters": olmo["rope_parameters"] | beside}
    assert family_of(mixed).model_flags(mixed) == family_of(olmo).model_flags(olmo)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama 3", {"rotary_base": 500000, "use_rope_scaling": True, "rope_scaling_factor": 4.0}),
        ("llama 2", {"rotary_base": 500000}),
        ("mistral", {"rotary_seq_len_interpolation_factor": 4.0}),
        ("qwen3 moe", {"rotary_base": 20000}),
        ("mixtral", {}),
    ],
)
def test_both_spellings_are_written(tmp_path, name, changed):
    """transformers 4 reads rope_theta, rope_scaling and num_experts only; 5 must find the same as without."""
    from transformers import AutoConfig

    family = family_of(config_of(name))
    flags = family.model_flags(config_of(name)) | changed
    written = family.config(flags)
    old = {k: v for k, v in written.items() if k not in ("rope_parameters", "num_local_experts")}
    if name == "mixtral":
        old["num_local_experts"] = written["num_local_experts"]
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling")}
    assert old["rope_theta"] == flags["rotary_base"]
    loaded = []
    for config in (written, old, new):
        assert family.model_flags(config) == family.model_flags(written)
        (tmp_path / "config.json").write_text(json.dumps(config))
        loaded.append(AutoConfig.from_pretrained(tmp_path).to_dict())
    assert loaded[0] == loaded[1] == loaded[2]
    assert loaded[0]["rope_parameters"] == written["rope_parameters"]


NUMBERS = [
    (name, key, value)
    for name, key, values in (
        ("llama 2", "num_hidden_layers", (10**6, 10**12, 10**400, "2", 2.0, True, -1, 0, [2])),
        ("llama 2", "head_dim", (0, "16", [], 10**30)),
        ("llama 2", "vocab_size", (10**12, 0, {})),
        ("llama 2", "num_key_value_heads", (0, -2)),
        ("llama 2", "rms_norm_eps", (math.nan, math.inf, 0, "1e-5", 10**400)),
        ("llama 2", "rope_theta", ([1e4], math.nan, math.inf, "10000", 0, True, 1e200, -5)),
        ("llama 2", "tie_word_embeddings", ("false", 1)),
        ("llama 2", "hidden_act", (["silu"], 1)),
        ("llama 2", "rope_scaling", ([1], "linear")),
        ("mistral", "sliding_window", ([1], "7", -1, 1.5, True)),
        ("qwen2", "layer_types", ("full_attention", [[1]])),
        ("qwen2", "max_window_layers", ("1", -1)),
        ("mixtral", "num_local_experts", (10**9, "4")),
        ("qwen3 moe", "decoder_sparse_step", (0, 1.0)),
        ("qwen3 moe", "mlp_only_layers", (1, ["0"], [0.5])),
        ("gpt2", "n_layer", (10**12, "2")),
        ("gpt2", "attn_pdrop", (1.0, math.nan, [])),
    )
    for value in values
]


@pytest.mark.parametrize(("name", "key", "value"), NUMBERS)
def test_every_number_has_a_type_and_a_range(name, key, value):
    """A foreign file must neither hang the program nor fill the memory, and its errors name the key."""
    config = config_of(name) | {key: value}
    if key == "rope_theta":
        del config["rope_parameters"]
    with pytest.raises(HelixError, match=rf"config\.json (sets|has) .*{key} = "):
        family_of(config).model_flags(config)


def test_numbers_of_scaling_have_a_range():
    """The factor divides frequencies."""
    for factor in (0, "8", [8], math.nan, 10**400):
        config = config_of("llama 3")
        config["rope_parameters"]["factor"] = factor
        with pytest.raises(HelixError, match="factor = "):
            family_of(config).model_flags(config)


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_a_theta_of_null_is_the_default(spelling):
    """Some tools write null for what they were not told."""
    config = config_of("mixtral") | {"rope_parameters": None}
    config[spelling] = None if spelling == "rope_theta" else {"rope_theta": None}
    assert family_named("mixtral").model_flags(config)["rotary_base"] == 1000000


def test_original_configuration_is_kept_where_flags_do_not_speak():
    """Token ids and the like must survive; what training changed must not be lost."""
    config = config_of("qwen2") | {"eos_token_id": 7, "_name_or_path": "somewhere"}
    family = family_of(config)
    flags = family.model_flags(config)
    assert family.config(flags, config) == config
    longer = family.config(flags | {"max_position_embeddings": 128}, config)
    assert longer == config | {"max_position_embeddings": 128}
    assert family.config(flags | {"padded_vocab_size": 128}, config) == config


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("llama 2", "is_llama_config", True), ("gemma", "attn_logit_softcapping", 50.0)],
)
def test_what_transformers_does_not_read_is_noted(name, key, value):
    """Files of the Hub carry keys of other programs, SmolLM's is_llama_config among them."""
    config = config_of(name)
    family = family_of(config)
    with pytest.warns(
        UserWarning, match=rf"{key} = {value}, which {family.name} models .* ignored"
    ):
        assert family.model_flags(config | {key: value}) == family.model_flags(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_that_transformers_reads_is_known(name):
    """One that is not would be ignored here and change the model there."""
    from transformers import AutoConfig

    config, family = AutoConfig.for_model(name), FAMILIES[name]
    read = {*config.to_dict(), *inspect.signature(type(config).__init__).parameters} - {"self"}
    known = {key for piece in family.pieces for key in piece.keys} | HARMLESS | READ
    assert config.attribute_map.keys() <= known | family.aliases
    assert {key for key in read if not key.startswith(HARMLESS_PREFIXES)} <= known
    assert family.aliases <= config.attribute_map.keys()


def test_unknown_families_are_listed():
    """A user with another model learns which ones there are."""
    with pytest.raises(HelixError, match=r"'gemma1' is unknown. Valid: llama, .*mean gemma?"):
        family_of({"model_type": "gemma1"})
    with pytest.raises(HelixError, match=r"has no model_type.*LlamaForCausalLM"):
        family_of({})
    assert family_of({"architectures": ["MixtralForCausalLM"]}).name == "mixtral"


def test_a_family_for_a_model_trained_here():
    """The way back needs no config.json where a family fits, and says what is in the way where none does."""
    llama = family_named("llama").model_flags(config_of("llama 2"))
    assert family_for_flags(llama).name == "llama"
    assert family_for_flags(llama | {"window_size": 10}).name == "mistral"
    assert family_for_flags(llama | {"add_qkv_bias": True}).name == "qwen2"
    assert family_for_flags(llama | {"qk_layernorm": True}).name == "qwen3"
    trained = llama | {"seq_length": 16, "attention_dropout": 0.1, "moe_aux_loss_coeff": 0.5}
    assert family_for_flags(trained).name == "llama"
    granite = family_named("granitemoehybrid").model_flags(config_of("granite 4"))
    assert family_for_flags(granite | {"ffn_hidden_size": 96}).name == "granitemoehybrid"
    with pytest.raises(HelixError) as error:
        family_for_flags(llama | {"attention_output_gate": True, "qk_l2_norm": True})
    assert (
        "Nearest is llama, which cannot have --qk-l2-norm = True (here: False), --attention-output-gate = True "
        "(here: False)." in str(error.value)
    )
    with pytest.raises(
        HelixError, match=r"Nearest is bamba, which cannot have --residual-multiplier ="
    ):
        bamba = family_named("bamba").model_flags(config_of("bamba"))
        family_for_flags(bamba | {"residual_multiplier": 0.5})
    with pytest.raises(HelixError, match=r"gpt2 models .* cannot have --position-embedding-type"):
        family_named("gpt2").config(llama)


def test_maps_are_made_without_heavy_imports():
    """A dry run of a conversion must answer at once, and needs no package that made the model."""
    program = """
from helix_megatron.model.families import FAMILIES
config = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=8, vocab_size=9)
family = FAMILIES["llama"]
print(len(family.rules(family.model_flags(config))))
"""
    assert printed_afresh(program) == ["15", "[]"]


# Of published models: parameters in millions, of the text, and config.json with the keys that their files have.
PUBLISHED = json.loads((Path(__file__).parents[1] / "published_configs.json").read_text())


@pytest.mark.filterwarnings("ignore:.* sequences of more than", "ignore:.*which is not run")
@pytest.mark.filterwarnings("ignore:config.json says that files keep its weights")
@pytest.mark.filterwarnings("error:.*models of transformers do not read")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(tmp_path, name):
    """Real files must not stumble over keys that mean nothing, and give as many parameters as is known."""
    millions, config = PUBLISHED[name]
    text = text_config(config)
    family = family_of(text)
    flags = family.model_flags(text)
    assert round(sum(math.prod(rule.shape) for rule in family.rules(flags)) / 1e6) == millions
    assert spec_of_config(name, config, "").parameters / 1e6 == pytest.approx(
        millions, rel=1e-5, abs=1
    )
    plain = {key: value for key, value in text.items() if key != "quantization_config"}
    assert family.config(flags, text) == plain
    nearest = family_for_flags(flags)
    assert nearest is family or not nearest.differences(flags)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_configuration(tmp_path)  # and the library takes it, for cutting and serving


def test_code_of_a_publisher_is_not_run():
    """Published files name code of their own for models that transformers has: they are taken for these."""
    config = config_of("qwen2") | {"auto_map": {"AutoModel": "x.Y"}}
    with pytest.warns(
        UserWarning, match="which is not run: the model is taken for what transformers calls qwen2"
    ):
        flags = family_of(config).model_flags(config)
    assert flags == family_of(config).model_flags(config_of("qwen2"))
