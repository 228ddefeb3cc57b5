"""The host's core attention inside: what it needs is given, and what it records is understood."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
from fake_te import FakeTEDotProductAttention
from megatron.core.transformer.enums import AttnBackend
from pool import RankError
from test_self_attention import Layer, assemble, build, expected, run_layer, tensors

LAYERS = {
    "gather-kv": Layer(8, 2, 8, 4, 2, engine=True),
    "all-to-all-heads": Layer(8, 2, 8, 4, 2, engine=True, exchange="all-to-all-heads"),
    "all-to-all-batch": Layer(2, 2, 8, 4, 2, engine=True, exchange="all-to-all-batch"),
}


def test_the_fake_has_the_signature_of_the_real_one():
    """What it accepts must be what Transformer Engine's class in this megatron-core accepts, name by name."""
    source = Path(megatron.core.__file__).parent / "extensions" / "transformer_engine.py"
    (real,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    )
    for name in ("__init__", "forward"):
        (function,) = (
            node for node in real.body if isinstance(node, ast.FunctionDef) and node.name == name
        )
        assert not function.args.kwarg
        wanted = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        required = len(wanted) - len(function.args.defaults)
        fake = inspect.signature(getattr(FakeTEDotProductAttention, name)).parameters
        assert list(fake) == wanted
        assert [p.default is p.empty for p in fake.values()] == [
            place < required for place in range(len(wanted))
        ]


def fill(module: Any, values: dict[str, torch.Tensor], rank: int) -> None:
    """This rank's part of the canonical projections."""
    layout = module.layout
    with torch.no_grad():
        module.linear_qkv.weight.copy_(values["linear_qkv.weight"][layout.qkv_rows(rank)])
        module.linear_proj.weight.copy_(values["linear_proj.weight"][:, layout.proj_columns(rank)])


def packed_and_apart(layer: Layer) -> float:
    """Largest difference between packed sequences of 3, 5 and 4 tokens and each of them alone."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    module, values = build(layer), tensors(dataclasses.replace(layer, batch=1, length=12))
    fill(module, values, parallel_state.get_tensor_model_parallel_rank())
    ends = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=5, max_seqlen_kv=5
    )
    outputs = []
    for given, params in (([values["x"]], packed), (values["x"].split([3, 5, 4]), None)):
        parts = [part.clone().requires_grad_() for part in given]
        output = torch.cat([module(part, None, packed_seq_params=params)[0] for part in parts])
        output.backward(values["grad"])
        outputs.append([output.detach(), torch.cat([part.grad for part in parts])])
    return max((a - b).abs().max().item() for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", ["gather-kv", "all-to-all-heads"])
def test_packed_sequences_reach_the_hosts_attention(pool, name):
    """Their borders are the core attention's to know; tokens of different sequences must not meet."""
    assert max(pool.run(packed_and_apart, LAYERS[name], world_size=4)) <= 1e-10


def clipped(layer: Layer) -> dict[str, Any]:
    """Rows of the projection after clipping, and the largest scores of this rank's heads."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank
    values = tensors(layer)
    module = build(layer, qk_clip=True, qk_clip_threshold=30.0, qk_clip_alpha=0.25)
    fill(module, values, rank())
    module(values["x"], None)
    largest = module.core_attention.current_max_attn_logits
    module.clip_qk()
    assert module.core_attention.current_max_attn_logits is None
    rows = module.layout.qkv_rows(rank())
    return {"rows": rows, "weight": module.linear_qkv.weight.detach(), "largest": largest}


@pytest.mark.parametrize("name", LAYERS)
def test_qk_clip_scales_as_for_whole_heads(pool, name):
    """Heads whose largest score exceeds the threshold shrink on every rank that has a part of them, and by the
    factor that one process finds; others stay."""
    layer = LAYERS[name]
    values = tensors(layer)
    weight, share = values["linear_qkv.weight"], layer.heads // layer.kv_heads
    blocks = (values["x"] @ weight.T).unflatten(-1, (layer.kv_heads, share + 2, layer.dim))
    scores = torch.einsum("qbgrd,kbgd->bgrqk", blocks[..., :share, :], blocks[..., -2, :])
    seen = torch.ones(layer.length, layer.length, dtype=torch.bool).tril()
    largest = (scores * layer.dim**-0.5).masked_fill(~seen, -torch.inf).amax((0, 2, 3, 4))
    shrink = (30.0 / largest).clamp(max=1.0)
    assert (shrink < 1).any()
    wanted = weight.unflatten(0, (layer.kv_heads, share + 2, layer.dim)).clone()
    wanted[:, :share] *= (shrink**0.25).view(-1, 1, 1, 1)
    wanted[:, -2] *= (shrink**0.75).view(-1, 1, 1)
    wanted = wanted.flatten(0, 2)
    for found in pool.run(clipped, layer, world_size=layer.tensor_parallel):
        torch.testing.assert_close(found["weight"], wanted[found["rows"]], rtol=1e-6, atol=1e-9)


def masked(layer: Layer) -> dict[str, bool]:
    """Whether a mask changes the output, by its shape and by what the configuration says of masks."""
    from megatron.core import parallel_state

    values, hidden = tensors(layer), {}
    future = torch.ones(1, 1, layer.length, layer.length, dtype=torch.bool).triu(-2)
    future[..., 0] = False  # hides more than the future, so that heeding it shows
    masks = {"dense": future, "padding": future[:, :, :1]}
    for only_causal in (False, True):
        module = build(layer, causal_masks_only=only_causal)
        fill(module, values, parallel_state.get_tensor_model_parallel_rank())
        plain = module(values["x"], None)[0]
        for name, mask in masks.items():
            output = module(values["x"], mask)[0]
            hidden[f"{name}, {only_causal}"] = not torch.equal(output, plain)
    return hidden


def test_dense_masks_that_only_say_causal_are_dropped(pool):
    """Megatron's data loader makes one for every batch, and it costs torch's kernels their fast paths."""
    for found in pool.run(masked, Layer(8, 2, 8, 4, 2), world_size=4):
        assert found == {
            "dense, False": True,
            "padding, False": True,
            "dense, True": False,
            "padding, True": True,
        }


def test_exchanges_that_leave_heads_cut_refuse_the_hosts_kernel(pool):
    """A kernel that was asked for and is not taken would be a setting without effect."""
    layer = Layer(4, 2, 8, 4, 2, engine=True, kernel="host", exchange="gather-qk")
    with pytest.raises(RankError, match="exchange gather-qk leaves heads cut, and kernel host"):
        pool.run(build, layer, world_size=4)


def test_learnable_sinks_are_refused_where_ranks_share_the_batch(pool):
    """Their gradient would be that of a part of the batch."""
    layer = Layer(2, 2, 8, 4, 2, engine=True, softmax="learnable", exchange="all-to-all-batch")
    with pytest.raises(RankError, match="softmax_type = learnable does not work with exchange all"):
        pool.run(build, layer, world_size=4)


def notices(layer: Layer) -> list[str]:
    kernels = {"auto": layer, "host": dataclasses.replace(layer, kernel="host")}
    asked = {"unfused": build(layer, attention_backend=AttnBackend.unfused)}
    asked["capped"] = build(dataclasses.replace(layer, softcap=50.0))
    built = {name: build(each) for name, each in kernels.items()} | asked
    return [module.core_attention.notice for module in built.values()]


def test_the_run_says_what_computes_attention_and_why(pool):
    """Users must be able to tell which kernel their figures are of."""
    (found, *_) = pool.run(notices, Layer(8, 2, 8, 4, 2), world_size=4)
    assert found == [
        "Attention is computed by torch's scaled_dot_product_attention: it is faster than Megatron's unfused "
        "attention.",
        "Attention is computed by DotProductAttention: kernel host was asked for.",
        "Attention is computed by DotProductAttention: attention_backend is unfused.",
        "Attention is computed by Helix's own kernel, some queries at a time: it alone has soft caps "
        "(attn_logit_softcapping = 50).",
    ]


@pytest.mark.parametrize("engine", [False, True])
def test_the_hosts_attention_would_drop_a_soft_cap(pool, engine):
    """And the model would be another."""
    layer = Layer(8, 2, 8, 4, 2, engine=engine, kernel="host", softcap=50.0)
    with pytest.raises(RankError, match=r"attn_logit_softcapping = 50.0 does not work with a core"):
        pool.run(build, layer, world_size=4)


def place_of_sinks(layer: Layer) -> tuple[Any, ...]:
    """Key, global shape and offset of this rank's sinks in a checkpoint, and its canonical heads."""
    from megatron.core import parallel_state

    module = build(layer)
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    item = module.sharded_state_dict(metadata=groups)["core_attention.softmax_offset"]
    group, member = module.layout.partition(parallel_state.get_tensor_model_parallel_rank())
    return item.key, item.global_shape, item.global_offset, module.layout.dealt_heads(group, member)


@pytest.mark.parametrize("name", ["gather-kv", "all-to-all-heads"])
def test_sinks_are_saved_in_the_order_of_heads(pool, name):
    """A checkpoint knows nothing of m and n: any other layout, and stock Megatron, must find its sinks."""
    layer = dataclasses.replace(LAYERS[name], softmax="learnable")
    for key, shape, offset, heads in pool.run(place_of_sinks, layer, world_size=4):
        assert (key, shape, offset) == ("core_attention.softmax_offset", (8,), (heads.start,))
        assert len(heads) == 2


class OffloadToHost:
    """What Megatron's fine-grained offloading does, without a GPU's streams: it copies what is saved for the
    backward pass of a part, and then frees the storages of the part's inputs."""

    def __init__(self, offload: bool, tensor: torch.Tensor, name: str) -> None:
        self.offload, self.tensor = offload, tensor

    def __enter__(self) -> torch.Tensor:
        if self.offload:
            self.hooks = torch.autograd.graph.saved_tensors_hooks(
                torch.clone, lambda copied: copied
            )
            self.hooks.__enter__()
        return self.tensor

    def __exit__(self, *error: Any) -> None:
        if self.offload:
            self.hooks.__exit__(*error)

    @staticmethod
    def group_commit(tensor: Any, name: str, forced_released_tensors: Any = ()) -> Any:
        for freed in forced_released_tensors:
            freed.untyped_storage().resize_(0)
        return tensor

    def group_offload(self, tensor: Any, forced_released_tensors: Any = ()) -> Any:
        return self.group_commit(tensor, "", forced_released_tensors if self.offload else ())


def with_offloading(layer: Layer) -> dict[str, Any]:
    from megatron.core.transformer import attention

    before, attention.off_interface = attention.off_interface, OffloadToHost
    parts = ["qkv_linear", "core_attn", "attn_proj"]
    try:
        return run_layer(layer, fine_grained_activation_offloading=True, offload_modules=parts)
    finally:
        attention.off_interface = before


OFFLOADED = LAYERS | {
    "gather-kv, gate": Layer(8, 2, 8, 4, 2, gate=True, norm="RMSNorm"),
    "gather-kv, gate, no rotary": Layer(8, 1, 16, 4, 4, gate=True, rotary=None),
    "gather-kv, stock core": Layer(8, 8, 8, 4, 2, kernel="host", bias=True),
    "all-to-all-sequence": Layer(4, 2, 8, 4, 2, exchange="all-to-all-sequence"),
    "gather-qk, gate": Layer(4, 2, 8, 4, 2, exchange="gather-qk", gate=True),
    "score-reduce": Layer(4, 2, 8, 4, 2, exchange="score-reduce"),
}


QUICKLY = ("gather-kv", "gather-kv, gate, no rotary", "gather-qk, gate")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.full("attention")] * (name not in QUICKLY))
        for name in OFFLOADED
    ],
)
def test_offloading_frees_nothing_that_is_needed(pool, name):
    """The exchange, the gate and the backward pass must not read queries, keys or values that were freed."""
    layer = OFFLOADED[name]
    wanted = expected(layer)
    for key, value in assemble(layer, pool.run(with_offloading, layer, world_size=4)).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-10, msg=key)


def consistency(layer: Layer) -> list[str]:
    """What Megatron's check of norms finds, before and after a rank's key norm has changed."""
    from megatron.core import parallel_state

    module, found = build(layer, test_mode=True), []
    x = tensors(layer)["x"]
    for change in (0.0, 1.0):
        with torch.no_grad():
            if parallel_state.get_tensor_model_parallel_rank() == 2:
                module.k_layernorm.weight[0] += change
        try:
            module(x, None)
            found.append("alike")
        except AssertionError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("heads", [8, 2])
def test_test_mode_compares_the_norms_of_all_ranks(pool, heads):
    """Megatron's check reads whole norms, which every rank keeps, whether it has whole heads or segments."""
    layer = Layer(heads, 2, 8, 4, 2, norm="LayerNorm")
    for before, after in pool.run(consistency, layer, world_size=4):
        assert before == "alike"
        assert after.startswith("Discrepancy between k_w in TP ranks")


def paged(layer: Layer, heads: int) -> None:
    """Megatron's dynamic context has pages for so many key-value heads on a rank."""
    context = types.SimpleNamespace(
        is_static_batching=lambda: False, num_attention_heads_per_partition=heads
    )
    build(layer)._check_inference(context)


def test_dynamic_context_has_pages_for_the_heads_of_a_rank(pool):
    """It counts heads by the model's configuration, and a rank may attend with copies of them; without
    a word it would write past its pages."""
    uneven = Layer(12, 3, 8, 4, 4)
    pool.run(paged, Layer(8, 2, 8, 4, 2), 1, world_size=4)
    pool.run(paged, uneven, 3, world_size=4)
    with pytest.raises(RankError, match=r"pages for 1 key-value heads .* attends with 3\. .* = 12"):
        pool.run(paged, uneven, 1, world_size=4)
    with pytest.raises(RankError, match=r"inference_context = dynamic does not work where queries"):
        pool.run(paged, Layer(2, 2, 8, 4, 2), 1, world_size=4)


def captured(layer: Layer) -> None:
    """A layer for CUDA graphs is built, and is given packed sequences."""
    build(layer, cuda_graph_impl="local").core_attention.over_context(*[None] * 5, packed=object())


@pytest.mark.parametrize("exchange", ["gather-kv", "all-to-all-heads", "gather-qk"])
def test_cuda_graphs_are_refused_with_packed_sequences_alone(pool, exchange):
    """Our kernels read the borders of documents on the host, which a graph cannot capture; all else it can
    (tests/megatron/test_fake_cuda.py)."""
    layout = "heads" if exchange == "gather-kv" else "segments"
    layer = Layer(8, 2, 8, 4, 2, exchange=exchange, query_layout=layout)
    with pytest.raises(RankError, match="cuda_graph_impl = local does not work with packed seq"):
        pool.run(captured, layer, world_size=4)
