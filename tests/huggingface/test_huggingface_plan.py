"""What would be cut, decided without a process group; and what cannot be cut is refused with a reason."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_transformers import FAMILIES, tiny_model

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.huggingface import clip_grad_norm_, from_pretrained, make_groups, plan, shard
from helix_megatron.huggingface.cuts import block_cut
from helix_megatron.huggingface.groups import neighbours_of
from helix_megatron.huggingface.plan import as_config


@pytest.mark.parametrize(("ranks", "m"), [(2, 2), (4, 2), (4, 4), (2, 1), (1, 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_has_one_owner(family, ranks, m):
    """A weight that two ranks hold gets twice its gradient; one that none holds is lost when saving."""
    model = tiny_model(family)
    what = plan(model, m, ranks)
    state = model.state_dict()
    numbered = {
        name: torch.arange(value.numel()).reshape(value.shape) for name, value in state.items()
    }
    parts = [what.split(numbered, rank) for rank in range(ranks)]
    merged = what.merge(parts)
    for name, whole in numbered.items():
        assert torch.equal(merged[name], whole), name
        if name in what.cuts:
            held = torch.cat([part[name].flatten() for part in parts])
            assert torch.equal(held.sort().values, whole.flatten()), name


def test_what_is_cut():
    """By name, so that a family whose modules were renamed cannot lose half of its cuts unseen."""
    names = {
        name.replace("model.layers.1.", "") for name in plan(tiny_model("qwen2_moe"), 2, 4).cuts
    }
    assert {name for name in names if "layers" not in name} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")),
        "self_attn.o_proj.weight",
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        *(f"mlp.shared_expert.{p}_proj.weight" for p in ("gate", "up", "down")),
    }
    dense = plan(tiny_model("llama"), 2, 4, embeddings=False).cuts
    assert "lm_head.weight" not in dense
    assert {n.split(".", 3)[3] for n in dense if "layers.0.mlp" in n} == {
        f"mlp.{p}_proj.{kind}" for p in ("gate", "up") for kind in ("weight", "bias")
    } | {"mlp.down_proj.weight"}
    assert not any("mlp" in name for name in plan(tiny_model("llama"), 2, 4, mlp=False).cuts)


def test_gate_and_up_are_cut_each():
    """A straight cut of a stacked [gate; up] would give rank 0 all of gate."""
    cut = block_cut(0, 8, 2, blocks=2)
    assert [list(index) for index in cut.indices] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert cut.even
    assert not block_cut(0, 5, 2).even


def test_the_index_is_the_layouts():
    """The rows of the projections must be what partitioned attention expects of this rank."""
    what = plan(tiny_model("qwen3, cut queries"), 2, 4)
    name = "model.layers.0.self_attn.{}_proj.weight"
    for rank in range(4):
        for projection, rows in (
            ("q", what.layout.query_rows(rank)),
            ("k", what.layout.kv_rows(rank)),
            ("v", what.layout.kv_rows(rank)),
            ("o", what.layout.proj_columns(rank)),
        ):
            cut = what.cuts[name.format(projection)]
            assert np.array_equal(cut.indices[rank], rows)
            assert cut.dim == (1 if projection == "o" else 0)


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (lambda parts: parts[:1], "1 state dictionaries were given of a model that 2 ranks hold"),
        (lambda parts: [parts[0], {}], "rank 1 lacks model.embed_tokens.weight"),
        (
            lambda parts: [parts[0], {k: v[:3] for k, v in parts[1].items()}],
            "rank 1 of 2 holds (48, 32) of a parameter of shape (96, 32), and its part has shape (3, 32)",
        ),
    ],
)
def test_parts_of_something_else_are_refused(states, said):
    """Parts of another model may fit in part; what does not fit must be named with its shape."""
    model = tiny_model("llama")
    what = plan(model, 2, 2)
    parts = [what.split(model.state_dict(), rank) for rank in range(2)]
    with pytest.raises(HelixError) as error:
        what.merge(states(parts))
    assert said in str(error.value)


REFUSED: list[tuple[dict[str, Any], Any, int, str]] = [
    ({}, 3, 4, "intra-head parallel size 3 does not divide the tensor parallel size 4"),
    ({}, {"intra_head_parallel_sise": 2}, 2, "Did you mean intra_head_parallel_size?"),
    ({}, HelixConfig(2, attention="segment-local"), 2, "Valid for Hugging Face models: exact."),
    ({}, 1, 4, "key-value head would be split among groups. Valid numbers of groups: 1, 2."),
    ({"head_dim": 2}, 2, 2, "2 segments of a head of 2 dimensions would split a rotary pair"),
    (
        {"intermediate_size": 50},
        2,
        4,
        "intermediate size 50 cannot be cut among 4 ranks. Valid numbers of ranks: 1, 2, 5, 10, 25, 50. "
        "Or leave MLPs whole with mlp=False.",
    ),
]


@pytest.mark.parametrize(("changes", "helix", "ranks", "said"), REFUSED)
def test_what_does_not_fit_is_refused(changes, helix, ranks, said):
    """Before anything is cut, with the numbers that would do."""
    with pytest.raises(HelixError) as error:
        plan(tiny_model("llama", **changes), helix, ranks)
    assert said in str(error.value)


def test_experts_that_do_not_divide():
    """Experts have a size of their own."""
    with pytest.raises(
        HelixError, match="experts' intermediate size 30 cannot be cut among 4 ranks"
    ):
        plan(tiny_model("qwen3_moe", moe_intermediate_size=30), 2, 4)


def test_other_families_are_refused():
    """With the forms that work: a wrapper's error from deep inside would tell nothing."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8)
    )
    with pytest.raises(HelixError) as error:
        plan(model, 2, 2)
    assert str(error.value).startswith(
        "attention of class GPT2Attention has none of o_proj, out_proj, dense, which Helix does not know "
        "how to cut. Known are separate projections q_proj, k_proj, v_proj,"
    )


def test_a_model_without_the_expected_modules_is_refused():
    """An adapter library replaces modules; cutting none of them would double nothing and sum p times."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn = torch.nn.Identity()
        layer.mlp = torch.nn.Identity()
    with pytest.raises(HelixError, match="has no attention module of a decoder"):
        plan(model, 2, 2)


def test_settings_of_all_kinds():
    """One configuration, several skins."""
    assert as_config(2) == as_config({"intra_head_parallel_size": 2}) == as_config(HelixConfig(2))


def run_refusals() -> dict[str, str]:
    """What a sharded model, or a model that cannot be sharded, says."""
    groups = make_groups(2, 2)
    ids = torch.ones(1, 4, dtype=torch.long)

    def fresh(**changes: Any) -> Any:
        return tiny_model("llama", **changes)

    def cut(**changes: Any) -> Any:
        return shard(fresh(**changes), 2, tensor_group=groups.tensor)

    def cut_queries() -> Any:
        helix = {"intra_head_parallel_size": 2, "query_layout": "segments"}
        return shard(fresh(), helix, tensor_group=groups.tensor)

    def wrong_groups() -> None:
        shard(fresh(), 1, tensor_group=groups.tensor, intra_head_group=groups.intra_head)

    def zero_3() -> None:
        model = fresh()
        model.lm_head.weight.ds_id = 0
        shard(model, 2, tensor_group=groups.tensor)

    def quantized() -> None:
        model = fresh()
        model.hf_quantizer = object()
        shard(model, 2, tensor_group=groups.tensor)

    def experts() -> None:
        model = tiny_model("mixtral")
        model.config._experts_implementation_internal = "sonicmoe"
        shard(model, 2, tensor_group=groups.tensor)

    def other_attention() -> None:
        model = cut_queries()
        model.set_attn_implementation("sdpa")
        model(ids)

    def not_sharded() -> None:
        cut_queries()  # registers the implementation
        model = fresh()
        model.set_attn_implementation("helix")
        model(ids)

    def eager_probabilities() -> None:
        shard(
            fresh(output_attentions=True, attn_implementation="eager"),
            2,
            tensor_group=groups.tensor,
        )

    attempts = {
        "twice": lambda: shard(cut(), 2, tensor_group=groups.tensor),
        "groups": wrong_groups,
        "ZeRO 3": zero_3,
        "quantized": quantized,
        "experts": experts,
        "save_pretrained": lambda: cut().save_pretrained("nowhere"),
        "resize": lambda: cut().resize_token_embeddings(200),
        "implementation": other_attention,
        "not sharded": not_sharded,
        "output_attentions": lambda: cut()(ids, output_attentions=True),
        "configured": eager_probabilities,
        "bias": lambda: cut_queries()(ids, attention_mask=torch.full((1, 1, 4, 4), 0.5)),
        "sizes": lambda: make_groups(3, 1),
        "segments": lambda: make_groups(2, 4),
        "directory": lambda: from_pretrained("nowhere", 2, tensor_group=groups.tensor),
    }
    said = {}
    for name, attempt in attempts.items():
        with pytest.raises(HelixError) as error:
            attempt()
        said[name] = str(error.value)
    return said


def test_refusals(pool):
    """Each of these would end in wrong numbers, or in a hang, without an error of its own."""
    wanted = {
        "twice": "this model is sharded already",
        "groups": "intra-head parallel size 1 needs groups of 1 neighbours of the tensor group, and rank "
        "0 of 2 was given rank 0 of 2",
        "ZeRO 3": "parameter lm_head.weight is partitioned by DeepSpeed's ZeRO 3",
        "quantized": "quantized weights cannot be cut",
        "experts": "experts implementation 'sonicmoe' has not been shown to work with experts that are cut. "
        "Valid: eager, batched_mm, grouped_mm.",
        "save_pretrained": "Call helix_megatron.huggingface.save_pretrained(model, directory) on every rank.",
        "resize": "resize_token_embeddings of a sharded model knows only this rank's part of the vocabulary",
        "implementation": "attention implementation 'sdpa' was set on a sharded model",
        "not sharded": "attention implementation 'helix' works on sharded models only, and this LlamaAttention",
        "output_attentions": "output_attentions = True does not work with Helix attention",
        "configured": "Set model.config.output_attentions = False.",
        "bias": "the attention mask adds values to scores",
        "sizes": "tensor parallel size 3 does not divide the 2 ranks of the world. Valid: 1, 2.",
        "segments": "intra-head parallel size 4 does not divide the tensor parallel size 2",
        "directory": "nowhere is no directory of a Hugging Face model: it has no config.json",
    }
    said = pool.run(run_refusals, world_size=2, timeout=60)[0]
    assert said.keys() == wanted.keys()
    for name, text in wanted.items():
        assert text in said[name], name


def test_groups_need_torch_distributed():
    """Outside a launcher the library's own error is about environment variables."""
    with pytest.raises(HelixError, match=r"Call torch\.distributed\.init_process_group first"):
        make_groups(1, 1)


def run_groups() -> list[Any]:
    found = []
    for sizes in ((4, 2), (2, 1)):
        groups = make_groups(*sizes)
        found += [groups.tensor, groups.intra_head, groups.data]
    return [dist.get_process_group_ranks(group) for group in found]


def test_groups(pool):
    """The segments of a head group are neighbours, and replicas meet at equal places."""
    ranks = pool.run(run_groups, world_size=4, timeout=60)
    assert ranks[0] == [[0, 1, 2, 3], [0, 1], [0], [0, 1], [0], [0, 2]]
    assert ranks[3] == [[0, 1, 2, 3], [2, 3], [3], [2, 3], [3], [1, 3]]


def run_groups_of_neighbours() -> list[Any]:
    tensor = make_groups(4, 1).tensor
    pair = neighbours_of(tensor, 2, "PAIRS")
    assert neighbours_of(tensor, 4, "ALL") is tensor
    return [pair.group_desc, dist.get_process_group_ranks(pair)]


def test_groups_of_neighbours_have_their_own_names(pool):
    """By which dumps of hangs tell them apart."""
    pairs = [[0, 1], [0, 1], [2, 3], [2, 3]]
    found = pool.run(run_groups_of_neighbours, world_size=4, timeout=60)
    assert found == [["PAIRS", pair] for pair in pairs]


def test_the_plan_needs_no_accelerate():
    """Only the Trainer does, which is an extra of its own."""
    program = (
        "import sys, helix_megatron.huggingface; "
        "assert not {'accelerate', 'deepspeed', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr


def test_clipping_a_whole_model_is_torchs():
    """One line of a training script must serve with and without sharding."""
    found, wanted = tiny_model("llama"), tiny_model("llama")
    for model in (found, wanted):
        ids = torch.arange(8).reshape(1, 8)
        model(ids, labels=ids).loss.backward()
    norm = clip_grad_norm_(found, 0.1)
    assert torch.allclose(norm, torch.nn.utils.clip_grad_norm_(wanted.parameters(), 0.1))
    for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad)
