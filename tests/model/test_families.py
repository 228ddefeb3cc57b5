"""Hugging Face models become canonical tensors that give the same logits at every layout, and back, exactly.

The oracle is `transformers`: it makes the models, saves them, computes the logits and reads config.json.
"""

from __future__ import annotations

import functools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import MODELS, load, read_config, save, tokens
from safetensors.torch import load_file, save_file
from tiny_checkpoints import run_of

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families import family_for_flags, family_of
from helix_megatron.model.families.rules import (
    canonical_tensor,
    rules_by_source,
    source_tensors,
)
from helix_megatron.model.families.towers import is_tower, text_config
from helix_megatron.versions import numbers

TOLERANCE = 1e-5
LAYOUTS = {
    "1 rank": {},
    "2 ranks, m 2": {"tensor_model_parallel_size": 2, "intra_head_parallel_size": 2},
    "4 ranks, m 2": {"tensor_model_parallel_size": 4, "intra_head_parallel_size": 2},
}
# Families whose options are tested one by one on one rank; the quick tier has one layout of them.
OPTIONS = (
    *("ministral", "smollm3", "granite", "ernie4 5", "phi3", "starcoder2", "gpt oss", "glm4 moe"),
    *("llama4", "gemma2", "gemma3", "exaone4", "minimax m2", "olmo3"),
    *("qwen3 next", "qwen3 5", "qwen3 5 moe", "deepseek v2", "deepseek v3", "nemotron h"),
    *("hunyuan", "granite 4", "bamba"),
    "granite 4 with attention alone",
)
ON_FOUR_RANKS = (
    *("gemma2", "ernie4 5", "phi3", "gpt oss", "exaone4", "qwen3 next", "qwen3 5"),
    *("deepseek v3", "nemotron h", "granite 4", "bamba"),
)
# Of these transformers 5.2 computes other logits from the same files than 5.24, or it lacks them.
COMPUTED_SINCE_5_24 = (
    *("gpt oss", "minimax m2", "glm4 moe", "olmo3", "deepseek v2 with groups"),
    *("nemotron h", "nemotron h with a latent of experts"),
    *("granite 4", "bamba"),  # 5.2: no groups in the norm of Mamba; rotary embedding of whole heads
)
TWO_STAGES = {**LAYOUTS["2 ranks, m 2"], "pipeline_model_parallel_size": 2}
QUARTERED = {"tensor_model_parallel_size": 4, "intra_head_parallel_size": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(name)`: (directory, logits of transformers), made once."""

    @functools.cache
    def make(name: str) -> tuple[Path, torch.Tensor]:
        directory = tmp_path_factory.mktemp("model")
        return directory, save(name, directory)

    return make


def canonical(directory: Path, changed: dict[str, Any] | None = None) -> tuple[dict, dict]:
    """(model flags, canonical tensors) of a directory."""
    config, tensors = read_config(directory), load_file(directory / "model.safetensors")
    text = text_config(config)
    family = family_of(text)
    flags = family.model_flags(text)
    rules = family.rules(flags, tensors, tower=is_tower(config))
    made = {rule.name: canonical_tensor(rule, reader(tensors)) for rule in rules}
    return flags | (changed or {}), made


def reader(tensors: dict[str, torch.Tensor]):
    """Reads tensors, or one expert's part of them."""
    return lambda name, place: tensors[name] if place is None else tensors[name][place]


def logits_of_rank(
    directory: str, changed: dict[str, Any], parallel: dict[str, Any]
) -> torch.Tensor | None:
    """Logits [2, s, V] of the model in `directory` on these ranks; None on all but the last stage."""
    import torch.distributed as dist
    from megatron.core import parallel_state as megatron_state

    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.fill import fill_weights
    from helix_megatron.megatron.gpt import build_chunk, transformer_config
    from helix_megatron.megatron.initialize import weights_not_drawn
    from helix_megatron.megatron.random import seed_model_parallel

    cpu_runtime.install()
    flags, tensors = canonical(Path(directory), changed)
    size = parallel.get("tensor_model_parallel_size", 1)
    sequence_parallel = flags["num_experts"] is not None and size > 1
    settings = {"seq_length": 24, "sequence_parallel": sequence_parallel} | parallel
    run = run_of(flags, world_size=dist.get_world_size(), **settings)
    parallel_state.initialize_model_parallel(
        size,
        run.parallel.pipeline_model_parallel_size,
        intra_head_parallel_size=run.helix.intra_head_parallel_size,
        expert_model_parallel_size=run.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=run.parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=10,
    )
    seed_model_parallel(1)
    config = transformer_config(run)
    with weights_not_drawn(config):
        model = build_chunk(run, config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # what is not filled shows
    asked = set()

    def source(canonical_name: str) -> torch.Tensor:
        asked.add(canonical_name)
        return tensors[canonical_name]

    fill_weights(model, source)
    assert dist.get_world_size() > 1 or asked == tensors.keys(), (
        "a tensor has no place in the model"
    )
    model.eval()
    ids = tokens()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    stages, stage = (
        run.parallel.pipeline_model_parallel_size,
        megatron_state.get_pipeline_model_parallel_rank(),
    )
    with torch.no_grad():
        if stage > 0:
            rows = ids.shape[1] // (size if run.parallel.sequence_parallel else 1)
            hidden = torch.empty(rows, ids.shape[0], run.model.hidden_size)
            dist.recv(hidden, megatron_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(ids, positions, None, runtime_gather_output=True)
        if stage < stages - 1:
            dist.send(output, megatron_state.get_pipeline_model_parallel_next_rank())
            return None
    return output[..., : flags["vocab_size"]]


def relative_error(
    pool, models, name: str, parallel: dict[str, Any], changed: dict[str, Any] | None = None
) -> float:
    """Largest difference of logits over the largest logit, of all ranks that have logits."""
    directory, expected = models(name)
    ranks = parallel.get("tensor_model_parallel_size", 1)
    ranks *= parallel.get("pipeline_model_parallel_size", 1)
    found = pool.run(logits_of_rank, str(directory), changed or {}, parallel, world_size=ranks)
    have = [logits for logits in found if logits is not None]
    assert have and all(logits.shape == expected.shape for logits in have)
    assert expected.abs().max() > 1 and expected.isfinite().all()
    worst = max((logits - expected).abs().max() for logits in have) / expected.abs().max()
    assert worst.isfinite()
    print(f"{name}, {parallel}: {worst:.1e}")
    return worst.item()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name,
            layout,
            # 4 ranks with 2 head groups have all that 2 ranks have.
            marks=[pytest.mark.full("conversion")]
            * {
                "1 rank": name in ON_FOUR_RANKS,
                "2 ranks, m 2": name not in {"llama 3", "qwen2 moe"},
                "4 ranks, m 2": name in OPTIONS and name not in ON_FOUR_RANKS,
            }[layout],
        )
        for name in MODELS
        for layout in LAYOUTS
        if " with " not in name or layout == "4 ranks, m 2"  # variants of a family
    ],
)
def test_logits_are_those_of_transformers(pool, models, name, layout):
    """A converted model that computes something else is worse than none."""
    parallel = LAYOUTS[layout]
    if name == "gemma" and layout == "4 ranks, m 2":
        parallel = QUARTERED  # it has one key-value head, so one head group
    if name.startswith("deepseek"):  # latents cannot be cut
        parallel = {size: n for size, n in parallel.items() if size != "intra_head_parallel_size"}
    if name == "gpt oss":  # Megatron cannot cut experts with biases
        ranks = parallel.get("tensor_model_parallel_size", 1)
        parallel = parallel | {"expert_model_parallel_size": ranks}
    if name in COMPUTED_SINCE_5_24 and numbers(version("transformers")) < (5, 24):
        pytest.skip("this transformers has no such model, or computes another")
    assert relative_error(pool, models, name, parallel) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("llama 3", QUARTERED),
        ("olmo2", QUARTERED),
        ("olmo2", {"tensor_model_parallel_size": 2}),
        ("olmo2", {**QUARTERED, "helix_query_layout": "segments"}),
        ("hunyuan", {**QUARTERED, "helix_query_layout": "segments"}),
        ("gpt oss", {**QUARTERED, "expert_model_parallel_size": 4}),
        ("deepseek v3", {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3}),
        ("granite", TWO_STAGES),
        ("nemotron h", TWO_STAGES),
        pytest.param("granite 4", TWO_STAGES, marks=pytest.mark.full("conversion")),
        ("gemma", TWO_STAGES),
        ("gemma", {**TWO_STAGES, "sequence_parallel": True}),
        *(
            ("gemma2", {**LAYOUTS["2 ranks, m 2"], "helix_query_layout": "segments", **exchange})
            for exchange in (
                {},
                {"helix_exchange": "score-reduce"},
                {"pipeline_model_parallel_size": 3, "sequence_parallel": True},
            )
        ),
        ("gpt2", {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
        ("qwen3 moe", {**LAYOUTS["4 ranks, m 2"], "expert_model_parallel_size": 2}),
    ],
)
def test_logits_with_other_parallelism(pool, models, name, parallel):
    """Options such as the embedding multiplier must know nothing of stages, sequence parts or expert ranks."""
    assert relative_error(pool, models, name, parallel) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("mistral", {"window_size": None}),
        ("mistral", {"window_size": 7}),  # Megatron does not count the query itself
        ("qwen2 with windows in some layers", {"window_attn_skip_freq": None}),
        ("llama 3", {"use_rope_scaling": False}),
        ("llama 3", {"rope_scaling_factor": 4.0}),
        ("llama with linear scaling", {"rotary_seq_len_interpolation_factor": None}),
        ("gemma", {"embedding_multiplier": 1.0}),
        ("gemma", {"apply_layernorm_1p": False}),
        ("gemma", {"geglu": False, "swiglu": True}),
        ("gpt2", {"openai_gelu": False}),
        ("qwen2 moe", {"moe_router_pre_softmax": False}),
        ("qwen2", {"rotary_base": 10000}),
        ("llama with yarn", {"yarn_mscale_all_dim": 1.0}),
        ("gpt oss", {"yarn_beta_fast": 8.0}),
        ("gpt oss", {"yarn_correction_range_round_to_int": True}),
        ("smollm3", {"no_rope_freq": None}),
        ("ministral", {"window_attn_skip_freq": [0, 1]}),
        ("ernie4 5", {"rotary_interleaved": False}),
        ("phi3", {"rotary_percent": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"logits_scaling": 1.0}),
        ("granite", {"softmax_scale": None}),
        ("starcoder2", {"openai_gelu": False}),
        ("gpt oss", {"activation_func_clamp_value": None}),
        ("gpt oss", {"glu_linear_offset": 0.0}),
        ("gpt oss", {"quick_geglu": False, "swiglu": True}),
        ("glm4 moe", {"moe_router_topk_scaling_factor": None}),
        ("glm4 moe", {"moe_router_num_groups": None, "moe_router_group_topk": None}),
        ("gemma3", {"rotary_base_windowed": None}),
        ("minimax m2", {"rotary_percent": 1.0}),
        ("olmo3", {"rotary_base_windowed": None}),
        ("gemma3", {"softmax_scale": None}),
        ("gemma3", {"final_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"softmax_scale": None}),
        ("exaone4", {"no_rope_freq": None}),
        ("llama4", {"moe_apply_probs_on_input": False}),
        ("llama4", {"qk_l2_norm": False}),
        ("hunyuan", {"qk_norm_behind_rotary": False}),
        ("llama4", {"no_rope_freq": None}),
        ("qwen3 5", {"rotary_percent": 1.0}),
        ("qwen3 5", {"apply_layernorm_1p": False}),
        ("qwen3 next", {"moe_router_pre_softmax": True}),
        ("deepseek v2", {"moe_router_pre_softmax": False}),
        ("deepseek v2 with groups", {"moe_router_groups_by_best": False}),
        ("deepseek v3", {"yarn_mscale": 1.0}),
        ("deepseek v3 with whole queries", {"latent_norm_epsilon": None}),
        ("deepseek v3", {"yarn_rotary_scaling_factor": 20.0}),
        ("deepseek v3", {"yarn_original_max_position_embeddings": 4096}),
        ("nemotron h", {"mamba_time_step_min": 0.0}),
        ("nemotron h", {"squared_relu": False}),
        ("granite 4", {"embedding_multiplier": 1.0}),
        ("granite 4", {"residual_multiplier": 1.0}),
        ("granite 4", {"logits_scaling": 1.0}),
        ("bamba", {"rotary_percent": 1.0}),
    ],
)
def test_every_option_matters(pool, models, name, dropped):
    """Were an option without effect on these models, the agreement above would not show that it is right."""
    assert relative_error(pool, models, name, {}, dropped) > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_exact(models, name, dtype):
    """Same names, shapes, dtypes and bits: a checkpoint loses nothing by passing through."""
    directory, _ = models(name)
    tensors = {k: t.to(dtype) for k, t in load_file(directory / "model.safetensors").items()}
    config = read_config(directory)
    family = family_of(config)
    flags = family.model_flags(config)
    back: dict[str, torch.Tensor] = {}
    moved = 0
    rules = family.rules(flags, tensors)
    made = {}
    for rule in rules:
        made[rule.name] = whole = canonical_tensor(rule, reader(tensors))
        assert tuple(whole.shape) == rule.shape and whole.dtype == dtype
        moved += not torch.equal(whole, tensors[rule.sources[0]])
    for source, makers in rules_by_source(rules).items():
        back[source] = source_tensors(makers, made.__getitem__)[source]
    assert moved >= flags["num_layers"], "linear_qkv at least is no plain copy"
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert back[key].is_contiguous() and back[key].dtype == dtype
        assert torch.equal(back[key], tensor), key
    assert family.config(flags, config) == config
    assert json.loads(json.dumps(flags)) == flags


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_a_fresh_configuration(models, name, tmp_path):
    """A model that was trained here has no original config.json; the one made from its flags must do."""
    directory, expected = models(name)
    config = read_config(directory)
    flags, tensors = canonical(directory)
    family = family_of(config)
    fresh = family.config(flags)
    others = {"dtype": "float32", "pad_token_id": None}  # that of some families is beyond 91 tokens
    (tmp_path / "config.json").write_text(json.dumps(fresh | others))
    made: dict[str, torch.Tensor] = {}
    for makers in rules_by_source(family.rules(flags)).values():
        made |= source_tensors(makers, tensors.__getitem__)
    save_file(made, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens(), use_cache=False).logits, expected)
    assert family_of(fresh) is family
    assert (
        ModelConfig.from_flags(family.model_flags(fresh)).function
        == ModelConfig.from_flags(flags).function
    )
    assert family_for_flags(flags).differences(flags) == []


def test_names_in_a_directory(models):
    """Old spellings are read, and written again; missing or foreign tensors are named."""
    directory, _ = models("gpt2")
    config, tensors = read_config(directory), load_file(directory / "model.safetensors")
    family = family_of(config)
    flags = family.model_flags(config)
    bare = {name.removeprefix("transformer.") for name in tensors}
    rules = family.rules(flags, bare | {"h.0.attn.bias", "h.0.attn.masked_bias"})
    assert {source for rule in rules for source in rule.sources} == bare

    tied = family.rules(flags, [*tensors, "lm_head.weight"])[0]
    assert tied.sources == ("transformer.wte.weight", "lm_head.weight")
    words = tensors["transformer.wte.weight"]
    assert torch.equal(tied.to_canonical([words, words.clone()]), words)
    assert all(torch.equal(part, words) for part in tied.from_canonical(words))
    with pytest.raises(HelixError, match=r"lm_head.weight differs from transformer.wte.weight"):
        tied.to_canonical([words, words + 1])

    less = set(tensors) - {"transformer.h.1.ln_1.weight"}
    with pytest.raises(HelixError, match=r"1 tensors .* missing: transformer.h.1.ln_1.weight."):
        family.rules(flags, less)
    with pytest.raises(HelixError, match=r"There is transformer.h.1.ln_1.weight_new"):
        family.rules(flags, less | {"transformer.h.1.ln_1.weight_new"})
    with pytest.raises(HelixError, match=r"1 tensors do not belong to a gpt2 .*: score.weight."):
        family.rules(flags, {*tensors, "score.weight"})


def test_layers_of_multi_token_prediction_are_left_out(models):
    """GLM-4.5 is published with a layer behind the last, which transformers does not load either."""
    directory, _ = models("glm4 moe")
    config, tensors = read_config(directory), load_file(directory / "model.safetensors")
    family = family_of(config)
    flags = family.model_flags(config)
    with pytest.warns(UserWarning, match=r"1 tensors of multi-token .*: model.layers.3.eh_proj"):
        rules = family.rules(flags, {*tensors, "model.layers.3.eh_proj.weight"})
    assert [rule.sources for rule in rules] == [r.sources for r in family.rules(flags, tensors)]
    with pytest.raises(HelixError, match=r"do not belong to a glm4_moe .*layers.2.eh_proj"):
        family.rules(flags, {*tensors, "model.layers.2.eh_proj.weight"})


def test_files_that_stack_all_experts_of_a_layer(models):
    """Qwen3.5's may: the same model, and the same names on the way back."""
    directory, _ = models("qwen3 5 moe")
    config, tensors = read_config(directory), load_file(directory / "model.safetensors")
    _, wanted = canonical(directory)
    for layer in range(config["num_hidden_layers"]):
        experts = f"model.layers.{layer}.mlp.experts."
        each = [
            {p: tensors.pop(f"{experts}{e}.{p}_proj.weight") for p in ("gate", "up", "down")}
            for e in range(config["num_experts"])
        ]
        fused = [torch.cat([own["gate"], own["up"]]) for own in each]
        tensors[f"{experts}gate_up_proj"] = torch.stack(fused)
        tensors[f"{experts}down_proj"] = torch.stack([own["down"] for own in each])
    family = family_of(config)
    rules = family.rules(family.model_flags(config), tensors)
    made = {rule.name: canonical_tensor(rule, reader(tensors)) for rule in rules}
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in made)
    for source, makers in rules_by_source(rules).items():
        assert torch.equal(source_tensors(makers, made.__getitem__)[source], tensors[source])


def test_tensors_of_another_shape_are_named(models):
    """A configuration of another size must be found out before anything is written."""
    directory, _ = models("llama 2")
    config, tensors = read_config(directory), load_file(directory / "model.safetensors")
    family = family_of(config)
    flags = family.model_flags(config)
    rule = next(r for r in family.rules(flags) if r.name.endswith("0.mlp.linear_fc1.weight"))
    gate, up = (tensors[source] for source in rule.sources)
    with pytest.raises(
        HelixError, match=r"up_proj.weight has shape \[47, 32\].*makes it \[48, 32\]"
    ):
        rule.to_canonical([gate, up[1:]])
    with pytest.raises(HelixError, match=r"up_proj.weight is torch.bfloat16 and .*gate_proj"):
        rule.to_canonical([gate, up.bfloat16()])
    with pytest.raises(HelixError, match=r"linear_fc1.weight has shape \[48, 32\].*\[96, 32\]"):
        rule.from_canonical(gate)
