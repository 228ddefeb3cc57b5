"""The models of 2026: their sizes against published ones, and what the planner makes of their layers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from refusals import refusal
from tiny_transformers import tiny_config

from helix_megatron.core.caches import DecodeShape, cache_layout
from helix_megatron.core.layout import HeadLayout
from helix_megatron.model.families import family_of
from helix_megatron.plan.clusters import CLUSTERS, LOCAL, cluster_of
from helix_megatron.plan.command import plan_main
from helix_megatron.plan.explain import kinds_of_layers
from helix_megatron.plan.inference import decode_steps
from helix_megatron.plan.inference_memory import (
    average_cache_bytes,
    cache_bytes,
    inference_memory,
)
from helix_megatron.plan.launch_commands import caveats
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import model_of, spec_of_config, spec_of_flags
from helix_megatron.plan.operators import (
    attention_kernel,
    latent_steps,
    layer_kinds,
    linear_steps,
    mixer_steps,
)
from helix_megatron.plan.published_sizes import CONFIGS
from helix_megatron.plan.refusals import of_tensor_parallel
from helix_megatron.plan.results import Plan
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.steps import FORWARD
from helix_megatron.plan.verdict import verdict

# Model cards and papers: all parameters and those of a token, in billions, without layers that predict more
# tokens and without vision.
PUBLISHED = {
    "qwen3.5-27b": (27, 27),
    "qwen3.5-35b-a3b": (35, 3),
    "qwen3.5-122b-a10b": (122, 10),
    "qwen3.5-397b-a17b": (397, 17),
    "nemotron-3-nano": (31.6, 3.6),
    "nemotron-3-super": (120.6, 12.7),
    "nemotron-3-ultra": (550, 55),
    "gemma-4-26b-a4b": (25.2, 3.8),
    "gemma-4-31b": (30.7, 30.7),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "glm-4.5": (355, 32),
    "minimax-m2": (230, 10),
    "llama-4-scout": (109, 17),
    "deepseek-v3": (671, 37),
    "kimi-k2": (1026, 32),
}
H100 = CLUSTERS["dgx-h100"]


@pytest.mark.parametrize("name", CONFIGS)
def test_models_have_their_published_parameters(name):
    """All of them within 2 %; those of a token, which cards round and count in their way, within 1.7 B."""
    model = model_of(name)
    total, active = PUBLISHED[name]
    assert model.parameters / 1e9 == pytest.approx(total, rel=0.02)
    assert model.active_parameters / 1e9 == pytest.approx(active, abs=1.7)


def test_layers_are_of_the_kinds_that_the_model_has():
    """Every layer once: full attention in each fourth of Qwen3.5, one part a layer in Nemotron 3."""

    def kinds(name):
        model = model_of(name)
        assert sum(kind.layers for kind in layer_kinds(model)) == model.num_layers
        return {kind.name(model): kind.layers for kind in layer_kinds(model)}

    assert kinds("qwen3.5-397b-a17b") == {"MoE, gated delta net": 45, "MoE": 15}
    assert kinds("nemotron-3-nano") == {"Mamba 2": 23, "attention": 6, "MoE": 23}
    assert kinds("gemma-4-31b") == {"dense with window": 50, "dense": 10}
    assert kinds("deepseek-v3") == {"dense": 3, "MoE": 58}


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "elements"),
    [
        # Per position, two bytes each: 15 layers of 2 heads of 256, keys and values, whole heads copied.
        ("qwen3.5-397b-a17b", 1, 15 * 2 * 2 * 256),
        ("qwen3.5-397b-a17b", 8, 15 * 2 * 1 * 256),
        ("nemotron-3-super", 1, 8 * 2 * 2 * 128),
        # 61 layers of a latent of 512 and 64 rotated dimensions, once on all ranks.
        ("deepseek-v3", 1, 61 * 576),
        ("deepseek-v3", 8, 61 * 576 / 8),
        # Ten global layers of 4 heads of 512, fifty local ones of 16 of 256.
        ("gemma-4-31b", 1, 10 * 2 * 4 * 512 + 50 * 2 * 16 * 256),
    ],
)
def test_caches_hold_what_was_worked_out_by_hand(name, tensor_parallel, elements):
    """Of a sequence of 128K, on one rank; states of linear layers do not grow with it."""
    model, layout, sizes = model_of(name), Layout(tp=tensor_parallel), (131072, 65536)
    long, short = (
        inference_memory(model, layout, Job("decode", size, 1), Software()).cache for size in sizes
    )
    assert long - short == pytest.approx(2 * elements * (sizes[0] - sizes[1]))
    linear = model.special.linear
    states = 4 * linear.state + 2 * linear.channels * linear.kernel if linear else 0
    states *= model.special.linear_layers / tensor_parallel
    assert long - 2 * elements * sizes[0] == pytest.approx(states)


@pytest.mark.parametrize("tp", [1, 4])
def test_projections_are_as_many_flops_as_parameters(tp):
    """Two per weight and token, over all ranks: gated delta net, Mamba 2, and latent attention."""
    for name, steps_of in (
        ("qwen3.5-397b-a17b", linear_steps),
        ("nemotron-3-nano", linear_steps),
        ("deepseek-v3", latent_steps),
    ):
        model = model_of(name)
        scenario = Scenario(model, Job("train", 4096, 8), H100, Software())
        steps = steps_of(scenario, Layout(tp=tp, sequence_parallel=tp > 1))
        flops = sum(s.flops for s in steps if s.kind == "gemm" and s.phase == FORWARD) * tp
        if model.special.linear:
            weights = model.special.linear.parameters(model.hidden_size)
        else:
            weights = sum(model.special.latent.parameters(model.hidden_size, 128))
        assert flops == pytest.approx(2 * 4096 * weights, rel=0.01)


def found(name, task, gpus=16, sequence=8192, batch=16) -> Plan:
    return search(
        model_of(name), gpus, CLUSTERS["nvlink-16"], Job(task, sequence, batch), Software()
    )


def test_hybrid_models_are_planned_with_cut_heads():
    """Two key-value heads: beyond TP 2 layouts cut or copy them; linear layers are cut by heads."""
    plan = found("qwen3.5-397b-a17b", "decode")
    widths = {row.layout.tp for row in plan.everything if row.layout.segments > 1}
    assert widths >= {4, 8, 16}
    row = next(row for row in plan.everything if row.layout.tp == 8 and row.layout.segments > 1)
    names = {
        name: {step.name for step in steps} for name, _, steps in kinds_of_layers(plan, row.layout)
    }
    assert "state" in names["MoE, gated delta net"] and "core attention" in names["MoE"]


@pytest.mark.parametrize(
    ("cluster", "asked", "runs", "told"),
    [
        ("dgx-h200", "flash-3", "math", True),
        ("dgx-h200", "math", "math", False),
        ("dgx-h200", "auto", "math", False),
        (LOCAL, "auto", "cpu", False),
    ],
)
def test_soft_caps_have_no_fused_kernel_in_training(cluster, asked, runs, told):
    """A row says that the kernel asked for is not what it is timed with."""
    config = tiny_config("gemma2").to_dict()
    chips = cluster_of(cluster)
    model, job = spec_of_config("gemma2", config, ""), Job("train", 4096, 8)
    software = Software(kernel=asked, precision="fp32" if cluster == LOCAL else "bf16")
    plan = search(model, 1, chips, job, software)
    layout = plan.everything[0].layout
    assert attention_kernel(plan.scenario, layout, model.head_dim) == runs
    assert told == any("does not train with soft caps" in text for text in caveats(plan, layout))


SIDE_BY_SIDE = {  # the sizes of Falcon-H1-34B
    "model_type": "falcon_h1",
    "num_hidden_layers": 72,
    "hidden_size": 5120,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 21504,
    "vocab_size": 261120,
    "mamba_n_heads": 32,
    "mamba_d_head": 128,
    "mamba_n_groups": 2,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
}


@pytest.mark.parametrize(
    ("family", "sizes"), [("falcon_h1", {"mamba_d_ssm": 48}), ("falcon_h1", {}), ("bamba", {})]
)
def test_dimensions_of_mamba_heads_that_follow_from_others(family, sizes):
    """As many parameters as the model of transformers has, where a config.json leaves `mamba_expand` out."""
    own = {"falcon_h1": {"mamba_d_ssm": None}, "bamba": {"attn_layer_indices": [1]}}[family]
    own = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_n_groups": 1, **own, **sizes}
    changes = {"hidden_size": 32, "mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_head": "auto"}
    config = tiny_config(family, **own | changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    content = config.to_dict() | {"mamba_d_head": "auto"}
    del content["mamba_expand"]
    counted = spec_of_config(family, content, "").parameters
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("tp", [1, 4])
def test_attention_and_mamba_side_by_side(tp):
    """Every layer has both, behind one norm; a token keeps keys and values, a sequence a state."""
    model = spec_of_config("falcon-h1-34b", SIDE_BY_SIDE, "")
    assert model.parameters == pytest.approx(33.6e9, rel=0.01)
    (kind,) = layer_kinds(model)
    assert kind.name(model) == "dense, Mamba 2 beside attention"
    layout = Layout(tp=tp)
    steps = mixer_steps(Scenario(model, Job("train", 4096, 8), H100, Software()), layout, "beside")
    flops = sum(s.flops for s in steps if s.kind == "gemm" and s.phase == FORWARD) * tp
    assert flops == pytest.approx(2 * 4096 * model.attention_parameters(), rel=0.01)
    assert [s.name for s in steps if "norm" in s.name and s.phase == FORWARD] == ["input norm"]
    scenario = Scenario(model, Job("decode", 4096, 8), H100, Software())
    names = [step.name for step in decode_steps(scenario, layout, 4096, kind)]
    assert {"core attention", "state", "linear_in", "linear_out", "linear_proj"} <= set(names)
    both = average_cache_bytes(model, layout, 1, 4096, 2)
    channels = 4096 / tp + 2 * 256 * max(1, 2 / tp)  # two ranks have heads of one group
    states = 4 * 32 * 128 * 256 / tp + 2 * 4 * channels
    assert both == cache_bytes(model, layout, 1, 4096, 2) + states


def test_linear_layers_that_ranks_do_not_divide_are_counted_as_they_run():
    """`helix serve` keeps them whole on every rank, a row says so, and megatron-core refuses to train them."""
    plan = found("qwen3.5-397b-a17b", "decode", gpus=32, batch=32)
    row = next(row for row in plan.everything if row.layout.tp == 32)
    assert [text for text in caveats(plan, row.layout) if "32 ranks do not divide the 16" in text]
    names = {
        step.name
        for name, _, steps in kinds_of_layers(plan, row.layout)
        for step in steps
        if "delta net" in name and step.axis == "tp"
    }
    assert names == {"MLP output"}
    linear = plan.model.special.linear
    whole, cut = (linear.parameters(4096, tp) for tp in (32, 16))
    assert whole == 16 * cut
    wide = found("qwen3.5-397b-a17b", "train", gpus=32, batch=32)
    reasons = {r.reason for r in wide.rejected if r.what == "TP 32"}
    text = "gated delta net key heads 16 is not divisible by 32"
    assert [reason for reason in reasons if text in reason]


def test_a_hybrid_trains_in_layouts_that_the_run_takes():
    """Groups of Mamba heads dealt whole, no interleaved stages, no sequence cut for context parallelism."""
    plan = found("nemotron-3-nano", "train", gpus=16, batch=32)
    layouts = [row.layout for row in plan.everything]
    assert {layout.tp for layout in layouts} == {1, 2, 4, 8}
    assert {(layout.vp, layout.cp) for layout in layouts} == {(1, 1)}
    assert max(layout.pp for layout in layouts) > 1
    reasons = {r.what: r.reason for r in plan.rejected}
    assert "number of Mamba 2 groups 8 is not divisible by 16" in reasons["TP 16"]
    assert reasons["CP 2"] == "Mamba 2 trains on the whole of a sequence"
    latent = found("deepseek-v3", "train", gpus=16, batch=32)
    assert "CP 2" in {r.what for r in latent.rejected}
    wide = of_tensor_parallel(latent.model, 128, training=True)
    text = (
        "latent with its rotated part 576 is not divisible by 128; nearest that divide it: 96, 144"
    )
    assert wide == ("not divisible", text)


@pytest.mark.parametrize("groups", [1, 4])
def test_layers_of_two_letters_train_as_a_hybrid(groups):
    """Bamba: ranks share the only group, each with some of its states, or are dealt whole groups."""
    sizes = {"attn_layer_indices": [9, 18, 27], "mamba_n_groups": groups, "mamba_d_state": 16}
    model = spec_of_config("small", SIDE_BY_SIDE | sizes | {"model_type": "bamba"}, "")
    plan = search(model, 32, CLUSTERS["nvlink-16"], Job("train", 4096, 32), Software())
    layouts = [row.layout for row in plan.everything]
    assert {(layout.vp, layout.cp) for layout in layouts} == {(1, 1)}
    reasons = {row.what: row.reason for row in plan.rejected}
    wide, what = (32, "states 16") if groups == 1 else (8, "groups 4")
    assert f"number of Mamba 2 {what} is not divisible by {wide}" in reasons[f"TP {wide}"]
    assert max(layout.tp for layout in layouts) == wide // 2


def test_groups_that_ranks_do_not_fit_are_named():
    """Four ranks divide 12 heads, and not their 3 groups; each task says who then keeps them whole."""
    sizes = {"num_hidden_layers": 4, "mamba_n_heads": 12, "mamba_n_groups": 3}
    model = spec_of_config("small", SIDE_BY_SIDE | sizes, "")
    for task, who in (("train", "helix_megatron.huggingface"), ("decode", "helix serve")):
        plan = search(model, 4, CLUSTERS["nvlink-16"], Job(task, 4096, 8), Software())
        layout = next(row.layout for row in plan.everything if row.layout.tp == 4)
        text = (
            f"4 ranks do not divide the 12 Mamba 2 heads, or do not fit their 3 groups: {who} keeps"
        )
        assert [sentence for sentence in caveats(plan, layout) if text in sentence]


def test_latent_attention_is_planned_and_not_cut():
    """The sentence says why, and the verdict speaks for whole heads."""
    plan = found("deepseek-v3", "decode", gpus=16, batch=1, sequence=4096)
    assert not any(row.layout.segments > 1 for row in plan.everything)
    reasons = {rejected.what: rejected.reason for rejected in plan.rejected}
    assert "latent attention has one head of latents" in reasons["m > 1"]
    plan = search(model_of("kimi-k2"), 64, H100, Job("decode", 8192, 64), Software())
    caches = {(row.layout.tp > 1, row.layout.cache) for row in plan.everything}
    assert caches == {(True, "batch"), (True, "sequence"), (False, "heads")}
    assert "no key-value heads to cut" in verdict(plan)[1]


def test_a_config_of_a_model_with_vision_is_read_inside(tmp_path, capsys):
    """Its text_config describes the language model, for outlines and for families that are converted."""
    sizes = dict(CONFIGS["qwen3.5-27b"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_5", "text_config": sizes}))
    assert model_of(str(path)).parameters == model_of("qwen3.5-27b").parameters
    del sizes["linear_num_value_heads"]
    path.write_text(json.dumps({"model_type": "qwen3_5", "text_config": sizes}))
    wanted = "has no linear_num_value_heads, which qwen3_5_text models have"
    assert wanted in refusal(capsys, plan_main, ["--model", str(path), "--gpus", "8"])


def test_a_pattern_of_layers_is_not_planned_from_flags(capsys):
    """It would be planned as a model whose layers are attention and MLP both."""
    flags = "--num-layers 2 --hidden-size 64 --num-attention-heads 2 --hybrid-layer-pattern=M* --gpus 8 "
    flags += "--normalization RMSNorm --vocab-size 256"
    assert "--hybrid-layer-pattern is not planned" in refusal(capsys, plan_main, flags.split())


def test_commands_for_models_that_nobody_builds_are_not_printed(capsys):
    """A forecast says so in the place of a command."""
    flags = ["--model", "qwen3.5-27b", "--gpus", "16", "--rows", "1", "--sequence-length", "2048"]
    assert plan_main(flags) == 0
    text = capsys.readouterr().out
    assert "This row is a forecast" in text and "torchrun" not in text


@pytest.mark.parametrize("model", ["qwen3.5-35b-a3b", "deepseek-v3"])
def test_commands_that_serve_hybrid_and_latent_models(model, capsys):
    """The code of transformers computes them in `helix serve`, on ranks with whole query heads."""
    flags = f"--model {model} --gpus 8 --cluster dgx-b200 --rows 1 --task decode --sequence-length 2048 "
    flags += "--global-batch 8 --pipeline-model-parallel-size 1 --expert-model-parallel-size 1"
    assert plan_main(flags.split()) == 0
    text = capsys.readouterr().out
    command = text[text.index("helix serve \\\n") :].partition("\n\n")[0]
    assert "--nproc-per-node" in command and "--expert" not in command
    latent = model == "deepseek-v3"
    assert latent == ("--cache-layout batch" in command or "--cache-layout sequence" in command)


@pytest.mark.parametrize("cache", ["batch", "sequence"])
def test_latents_cost_what_the_code_that_runs_sends(cache):
    """The steps of a plan are the collectives of the shape that the engine asks for its cache layout."""
    model, layout = model_of("deepseek-v3"), Layout(tp=8, micro_batch=16, cache=cache)
    layer = HeadLayout(128, 1, 576, segments=8, query_layout="heads", rotary="none")
    shape = DecodeShape(layer, 16, 4096, 2, value_dim=512, whole_keys=True, latent=True)
    kind = layer_kinds(model)[0]
    scenario = Scenario(model, Job("decode", 4096, 16), H100, Software())
    steps = [s for s in decode_steps(scenario, layout, 4096, kind) if s.axis == "exchange"]
    asked = cache_layout(cache).collectives(shape)
    for step, collective in zip(steps, asked, strict=True):
        assert step.moved in (collective.size, collective.gathered)
    read = cache_layout(cache).read_bytes(shape)
    assert read == cache_bytes(model, layout, 16, 4096, 2) == 16 * 4096 * 576 * 2 / 8


@pytest.mark.parametrize("name", ["qwen3.5-122b-a10b", "deepseek-v3"])
def test_flags_of_other_attention_count_as_their_config(name):
    """What a converted checkpoint says is the model that its config.json was."""
    config = CONFIGS[name]
    flags = family_of(config).model_flags(config)
    by_flags, by_config = spec_of_flags("", flags, ""), spec_of_config("", config, "")
    assert by_flags.special == by_config.special
    assert by_flags.parameters == pytest.approx(by_config.parameters, rel=1e-4)
