"""Gradients of a sharded Hugging Face model are those of the whole one, whether a parameter is cut or not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_transformers import relative_error, tiny_model, tokens

from helix_megatron.errors import HelixError
from helix_megatron.huggingface import (
    clip_grad_norm_,
    gather_state_dict,
    grad_norm,
    make_groups,
    plan,
    shard,
)
from helix_megatron.huggingface.attention import dropout_state

MAX_NORM = 0.5


def backward(model: Any, seed: int = 5) -> torch.Tensor:
    ids = tokens(seed=seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def grads(model: Any) -> dict[str, torch.Tensor]:
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def sharded(family: str, m: int, *, exchange: str = "auto", **changes: Any) -> Any:
    groups = make_groups(dist.get_world_size(), m)
    helix = {"intra_head_parallel_size": m, "exchange": exchange}
    return shard(tiny_model(family, **changes), helix, tensor_group=groups.tensor)


def run_backward(family: str, m: int) -> dict[str, Any]:
    model = sharded(family, m).train()
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    found: dict[str, Any] = {"loss": backward(model), "grads": grads(model)}
    found["norm"] = grad_norm(model)
    marks = {n: getattr(p, "tensor_model_parallel", False) for n, p in model.named_parameters()}
    found["marked"] = {name for name, marked in marks.items() if marked}
    found["clipped"] = (clip_grad_norm_(model, MAX_NORM), grad_norm(model))
    model.zero_grad()
    model.gradient_checkpointing_enable()
    backward(model)
    found["checkpointed"] = grads(model)
    assert objects == {name: id(parameter) for name, parameter in model.named_parameters()}
    return found


@functools.cache
def reference(family: str) -> dict[str, Any]:
    model = tiny_model(family).train()
    loss = backward(model)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return {"loss": loss, "grads": grads(model), "norm": norm, "model": model}


CASES = [
    ("llama, cut queries", 4, 2),  # query segments
    ("llama", 2, 2),  # biases
    ("qwen3", 4, 2),  # head norms, of whole and of cut heads
    ("qwen3, cut queries", 4, 4),
    ("gemma", 2, 2),  # tied, scaled embeddings, an uneven vocabulary, a padding token
    ("qwen2_moe", 4, 2),  # router, experts one by one, shared expert
    ("mixtral", 2, 2),  # grouped experts
    ("falcon_h1", 4, 2),  # one group of Mamba heads on all ranks
]


@pytest.mark.filterwarnings("ignore:each rank has", "ignore:.* stay whole on every rank")
@pytest.mark.parametrize(("family", "world_size", "m"), CASES)
def test_gradients_equal_those_of_the_whole_model(pool, family, world_size, m):
    """A missing or doubled all-reduce shows in one parameter's gradient, and in the norm that clipping uses."""
    wanted = reference(family)
    ranks = pool.run(run_backward, family, m, world_size=world_size, timeout=120)
    whole = plan(wanted["model"], m, world_size)
    assert ranks[0]["marked"] == whole.cuts.keys() & dict(wanted["model"].named_parameters()).keys()
    floor = 1e-3 * max(grad.abs().max() for grad in wanted["grads"].values())
    for kind in ("grads", "checkpointed"):
        merged = whole.merge([rank[kind] for rank in ranks])
        assert merged.keys() == wanted["grads"].keys()
        for name, grad in merged.items():
            scale = max(wanted["grads"][name].abs().max(), floor)
            assert (grad - wanted["grads"][name]).abs().max() / scale <= 1e-5, (kind, name)
    for rank in ranks:
        assert relative_error(rank["loss"], wanted["loss"]) <= 1e-6
        assert relative_error(rank["norm"], wanted["norm"]) <= 1e-5
        before, after = rank["clipped"]
        assert torch.equal(before, rank["norm"])
        assert before > MAX_NORM
        assert after.item() == pytest.approx(MAX_NORM, rel=1e-4)
        for name, grad in rank["grads"].items():
            if name not in whole.cuts:  # nothing is left to reduce
                assert torch.equal(grad, ranks[0]["grads"][name]), name


def train(model: Any, clip: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(4):
        losses.append(backward(model, seed=step).item())
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def run_training(family: str, m: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = tiny_model(family).train()
    parameters = list(model.parameters())  # what an optimizer that was made before sharding holds
    shard(model, m, tensor_group=make_groups(dist.get_world_size(), m).tensor)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return train(model, lambda model: clip_grad_norm_(model, 1.0)), gather_state_dict(model)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "falcon_h1"])
def test_training_with_clipping_follows_one_process(pool, family):
    """Adam divides by small numbers, so that wrong gradients of rarely used weights would show here."""
    model = tiny_model(family).train()
    wanted = train(model, lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    assert wanted[-1] < wanted[0]
    ranks = pool.run(run_training, family, 2, world_size=4, timeout=120)
    for losses, _ in ranks:
        assert losses == pytest.approx(wanted, rel=1e-5)
    state = ranks[0][1]
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert relative_error(state[name], value) <= 1e-3, name
    assert [other[1] for other in ranks[1:]] == [{}, {}, {}]


def run_dropout(exchange: str) -> dict[str, Any]:
    torch.manual_seed(11)
    changes = {"attention_dropout": 0.4}
    model = sharded("llama, cut queries", 2, exchange=exchange, **changes).train()
    torch.manual_seed(12)
    plain = backward(model), grads(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    torch.manual_seed(12)
    again = backward(model), grads(model)
    state = dropout_state(model.sharding, torch.device("cpu"), 0.4)
    drawn = {}
    for shared in (True, False):
        with state(shared):
            drawn[shared] = torch.rand(4)
    return {"plain": plain, "checkpointed": again, "drawn": drawn, "after": torch.rand(1).item()}


@pytest.mark.parametrize("exchange", ["score-reduce", "all-to-all-batch"])
def test_attention_dropout(pool, exchange):
    """Ranks that hold the same probabilities must drop the same ones, others their own; and recomputed
    activations must meet the dropout of the first pass."""
    ranks = pool.run(run_dropout, exchange, world_size=4, timeout=60)
    drawn = [rank["drawn"] for rank in ranks]
    assert torch.equal(drawn[0][True], drawn[1][True])
    assert torch.equal(drawn[2][True], drawn[3][True])
    assert not torch.equal(drawn[0][True], drawn[2][True])
    assert not torch.equal(drawn[0][False], drawn[1][False])
    assert len({rank["after"] for rank in ranks}) == 1  # the default state goes on alike everywhere
    whole_loss = reference("llama, cut queries")["loss"]
    for rank in ranks:
        loss, gradients = rank["plain"]
        assert abs(loss - whole_loss) > 1e-3, "dropout must do something"
        assert loss == ranks[0]["plain"][0], "every rank must have the same loss"
        assert torch.equal(loss, rank["checkpointed"][0])
        for name, grad in gradients.items():
            assert torch.equal(grad, rank["checkpointed"][1][name]), name


def test_norm_of_a_list_of_parameters_needs_the_group():
    """A list does not know over which ranks it is cut, and the norm of the parts would be too small."""
    with pytest.raises(HelixError, match="norm of a list of parameters needs tensor_group"):
        grad_norm(list(tiny_model("llama").parameters()))


def test_norm_of_a_whole_model_needs_no_group():
    """The same line of a training script must serve without sharding."""
    model = tiny_model("llama").train()
    backward(model)
    wanted = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert torch.allclose(grad_norm(model), wanted)
