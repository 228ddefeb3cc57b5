"""Collectives between replicated values and parts: exact against autograd on one rank, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.meter import measure
from helix_megatron.core.replicated import joined, sum_of, to_ranks


def parts(ranks: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(2, 3, generator=random, dtype=torch.float64) for _ in range(ranks)]


def of_rank(x: torch.Tensor, rank: int, own: torch.Tensor) -> torch.Tensor:
    """What a rank does with a replicated value: something else on every rank."""
    return (x * own).sin() * (rank + 1)


def reference(ranks: int) -> dict[str, torch.Tensor]:
    own = [part.requires_grad_() for part in parts(ranks)]
    x = torch.ones(2, 3, dtype=torch.float64).requires_grad_()
    total = sum(of_rank(x, rank, part) for rank, part in enumerate(own))
    whole = torch.cat([part * total for part in own], dim=-1)
    loss = (whole.square().cumsum(-1) * total.repeat(1, ranks)).sum()
    grads = torch.autograd.grad(loss, [x, *own], create_graph=True)
    return {"loss": loss.detach(), "x": grads[0].detach(), "own": torch.stack(grads[1:]).detach()}


def run_block(ranks: int) -> dict[str, torch.Tensor]:
    """A tensor parallel block: the sum over ranks of f_r(x), times each rank's own part, joined; and gradients.

    The sum enters again where every rank uses it in its own way.
    """
    rank, own = dist.get_rank(), parts(ranks)[dist.get_rank()].requires_grad_()
    x = torch.ones(2, 3, dtype=torch.float64).requires_grad_()
    group = dist.group.WORLD
    total = sum_of(of_rank(to_ranks(x, group, purpose="in"), rank, own), group, purpose="out")
    whole = joined(own * to_ranks(total, group, purpose="in"), group, dim=-1, purpose="join")
    loss = (whole.square().cumsum(-1) * total.repeat(1, ranks)).sum()
    with measure() as meter:
        grads = torch.autograd.grad(loss, [x, own], create_graph=True)
    again = torch.autograd.grad(grads[0].square().sum(), x)[0]
    return {
        "loss": loss.detach(),
        "x": grads[0].detach(),
        "own": grads[1].detach(),
        "second": again,
        "backward": torch.tensor([meter.calls(name) for name in ("in", "out", "join")]),
    }


def second_reference(ranks: int) -> torch.Tensor:
    own = parts(ranks)
    x = torch.ones(2, 3, dtype=torch.float64).requires_grad_()
    total = sum(of_rank(x, rank, part) for rank, part in enumerate(own))
    whole = torch.cat([part * total for part in own], dim=-1)
    loss = (whole.square().cumsum(-1) * total.repeat(1, ranks)).sum()
    grad = torch.autograd.grad(loss, x, create_graph=True)[0]
    return torch.autograd.grad(grad.square().sum(), x)[0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_whole_and_replicated(pool, ranks):
    """The gradient of what is replicated must be whole on every rank, of what is cut each rank's own; a factor
    of the number of ranks is the classic error."""
    wanted = reference(ranks)
    for rank, found in enumerate(pool.run(run_block, ranks, world_size=ranks)):
        assert torch.allclose(found["loss"], wanted["loss"], rtol=1e-10)
        assert torch.allclose(found["x"], wanted["x"], rtol=1e-10)
        assert torch.allclose(found["own"], wanted["own"][rank], rtol=1e-10)
        assert torch.allclose(found["second"], second_reference(ranks), rtol=1e-10)
        # One all-reduce for each value that enters; a sum and a join cost nothing backward.
        assert found["backward"].tolist() == [2, 0, 0]


def run_head_mean() -> dict[str, torch.Tensor]:
    whole = torch.arange(12, dtype=torch.float64).reshape(2, 6).requires_grad_()
    own = whole.chunk(2, -1)[dist.get_rank()].detach().requires_grad_()
    mean = head_mean(own, 6, dist.group.WORLD)
    (own * mean).square().sum().backward()
    wanted = head_mean(whole, 6, None)
    (whole * wanted).square().sum().backward()
    return {
        "mean": torch.stack([mean.detach(), wanted.detach()]),
        "grad": torch.stack([own.grad, whole.grad.chunk(2, -1)[dist.get_rank()]]),
    }


def test_mean_over_a_head_that_is_cut(pool):
    """Every rank uses the mean for its own segment, so its gradient comes from all of them."""
    for found in pool.run(run_head_mean, world_size=2):
        for pair in found.values():
            assert torch.allclose(pair[0], pair[1], rtol=1e-12)
