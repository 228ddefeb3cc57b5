"""Collectives and their gradients against one process that holds every rank's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core import collectives
from helix_megatron.core.meter import measure
from helix_megatron.errors import HelixError

Local = Callable[[Tensor, ProcessGroup], Tensor]
Whole = Callable[[list[Tensor]], list[Tensor]]

# name: (shape of each rank's input for k ranks, what a rank runs, the same for all ranks in one process)
CASES: dict[str, tuple[Callable[[int], tuple[int, ...]], Local, Whole]] = {
    "gather": (
        lambda k: (3, 4),
        lambda x, group: collectives.gather(x, group, purpose="test"),
        lambda xs: [torch.stack(xs) for _ in xs],
    ),
    "gather_async": (
        lambda k: (3, 4),
        lambda x, group: collectives.gather_async(x, group, purpose="test")(),
        lambda xs: [torch.stack(xs) for _ in xs],
    ),
    "scatter_sum": (
        lambda k: (k, 3, 2),
        lambda x, group: collectives.scatter_sum(x, group, purpose="test"),
        lambda xs: [torch.stack([x[t] for x in xs]).sum(0) for t in range(len(xs))],
    ),
    "swap": (
        lambda k: (k, 3, 2),
        lambda x, group: collectives.swap(x, group, purpose="test"),
        lambda xs: [torch.stack([x[t] for x in xs]) for t in range(len(xs))],
    ),
    "all_reduce": (
        lambda k: (3, 4),
        lambda x, group: collectives.all_reduce(x, group, purpose="test"),
        lambda xs: [torch.stack(xs).sum(0) for _ in xs],
    ),
    "all_gather 0": (
        lambda k: (2, 3, 4),
        lambda x, group: collectives.all_gather(x, group, dim=0, purpose="test"),
        lambda xs: [torch.cat(xs, 0) for _ in xs],
    ),
    "all_gather -1": (
        lambda k: (2, 3, 4),
        lambda x, group: collectives.all_gather(x, group, dim=-1, purpose="test"),
        lambda xs: [torch.cat(xs, 2) for _ in xs],
    ),
}

RESULTS = ("output", "gradient", "gradient of a sum", "second derivative")


def draw(member: int, name: str, *shape: int) -> Tensor:
    seed = 1000 * member + list(CASES).index(name)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def input_of(member: int, name: str, ranks: int, transposed: bool) -> Tensor:
    """The leaf; its transpose is a non-contiguous input of the same shape."""
    x = draw(member, name, *CASES[name][0](ranks))
    return x.mT.contiguous() if transposed else x


def loss(y: Tensor, member: int) -> Tensor:
    """Different on every rank, and with a second derivative."""
    weight = torch.arange(1, y.numel() + 1, dtype=y.dtype).reshape(y.shape) + member
    return (y**3 * weight).sum()


def directions(x: Tensor, member: int) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape) + member)


def run_cases(groups: list[list[int]], transposed: bool) -> dict[str, list[Tensor]]:
    """`RESULTS` of every case on this rank's group."""
    made = [dist.new_group(ranks) for ranks in groups]
    group = next(g for ranks, g in zip(groups, made, strict=True) if dist.get_rank() in ranks)
    member, results = group.rank(), {}
    for name, (_, local, _) in CASES.items():
        leaf = input_of(member, name, group.size(), transposed).requires_grad_()
        before = leaf.detach().clone()
        x = leaf.mT if transposed else leaf
        assert x.is_contiguous() != transposed
        y = local(x, group)
        (gradient,) = torch.autograd.grad(loss(y, member), leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * directions(leaf, member)).sum(), leaf)
        # The gradient of a sum is an expanded scalar: not contiguous.
        (of_sum,) = torch.autograd.grad(local(x, group).sum(), leaf)
        assert torch.equal(leaf, before), f"{name} changed its input"
        results[name] = [t.detach() for t in (y, gradient, of_sum, second)]
    return results


def expected(name: str, ranks: int, transposed: bool) -> list[list[Tensor]]:
    """`RESULTS` of every rank, by one process that holds all inputs."""
    leaves = [input_of(t, name, ranks, transposed).requires_grad_() for t in range(ranks)]
    xs = [leaf.mT if transposed else leaf for leaf in leaves]
    ys = CASES[name][2](xs)
    total = torch.stack([loss(y, t) for t, y in enumerate(ys)]).sum()
    gradients = torch.autograd.grad(total, leaves, create_graph=True)
    along = [(g * directions(g, t)).sum() for t, g in enumerate(gradients)]
    seconds = torch.autograd.grad(torch.stack(along).sum(), leaves, retain_graph=True)
    of_sums = torch.autograd.grad(torch.stack([y.sum() for y in ys]).sum(), leaves)
    return [[t.detach() for t in row] for row in zip(ys, gradients, of_sums, seconds, strict=True)]


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize(
    "groups", [[[0, 1, 2]], [[0, 2], [1, 3]], [[0], [1]]], ids=["3", "two of 2", "two of 1"]
)
def test_collectives_and_gradients_equal_one_process(pool, groups, transposed):
    """Every primitive and every form with a dimension: output, gradient, and gradient of the gradient, for
    odd numbers of ranks, for groups that are not the world nor consecutive, and for a group of one."""
    world_size = sum(map(len, groups))
    by_rank = pool.run(run_cases, groups, transposed, world_size=world_size)
    for name in CASES:
        wanted = expected(name, len(groups[0]), transposed)
        assert any(row[3].abs().max() > 0 for row in wanted), "no second derivative: nothing tested"
        for ranks in groups:
            for member, rank in enumerate(ranks):
                for what, got, want in zip(
                    RESULTS, by_rank[rank][name], wanted[member], strict=True
                ):
                    torch.testing.assert_close(
                        got,
                        want,
                        rtol=1e-12,
                        atol=1e-12,
                        msg=lambda m: f"{name}, {what}: {m}",  # noqa: B023
                    )


def run_alone() -> tuple[int, list[str]]:
    groups = [dist.new_group([rank]) for rank in range(2)]
    group, wrong = groups[dist.get_rank()], []
    with measure() as meter:
        for name, (shape, local, whole) in CASES.items():
            x = draw(0, name, *shape(1)).requires_grad_()
            y = local(x, group)
            y.sum().backward()
            if not torch.equal(y, whole([x])[0]):
                wrong.append(name)
    return meter.calls(), wrong


def test_a_group_of_one_runs_nothing(pool):
    """With m = 1, or one rank, the same code must cost nothing: not even a collective with itself."""
    assert pool.run(run_alone, world_size=2) == [(0, [])] * 2


def run_large() -> list[float]:
    x = torch.full((1 << 20,), float(dist.get_rank() + 1), requires_grad=True)
    y = collectives.gather(x, dist.group.WORLD, purpose="test")
    (y * torch.tensor([[1.0], [10.0]])).sum().backward()
    assert y.shape == (2, 1 << 20)
    return [
        y[0].min().item(),
        y[0].max().item(),
        y[1].min().item(),
        y[1].max().item(),
        x.grad.max().item(),
    ]


def test_large_tensors_are_gathered_as_small_ones_are(pool):
    """4 MiB, where the small tensors of the other tests may take another way than a model's."""
    by_rank = pool.run(run_large, world_size=2)
    assert by_rank == [[1.0, 1.0, 2.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0, 20.0]]


def run_asynchronously() -> bool:
    """Rank 1 takes part only when it hears that rank 0's calls have returned."""
    group, rank = dist.new_group([0, 1]), dist.get_rank()
    x = torch.arange(4.0).reshape(2, 2) + 10 * rank
    token = torch.zeros(1)
    if rank == 1:
        dist.recv(token, 0)
    first = collectives.gather_async(x, group, purpose="test")
    if rank == 0:
        dist.send(token, 1)
    gathered = first()
    assert gathered[1 - rank].equal(x + 10 * (1 - 2 * rank))
    assert first() is gathered
    return True


def test_the_asynchronous_gather_returns_before_the_others_join(pool):
    """Else nothing overlaps. And it may be awaited again."""
    assert pool.run(run_asynchronously, world_size=2) == [True, True]


def run_half_precision() -> list[float]:
    x = torch.tensor([256.0 if dist.get_rank() == 0 else 1.0], dtype=torch.bfloat16)
    spread = x.expand(4, 1)
    total = collectives.scatter_sum(spread, dist.group.WORLD, purpose="test")
    assert total.dtype == torch.bfloat16
    leaf = x.clone().requires_grad_()
    collectives.gather(leaf, dist.group.WORLD, purpose="test").backward(spread)
    # 1, 4 and 6 elements: what 4 ranks share out evenly, and what they do not.
    totals = [
        collectives.all_reduce(x.expand(*shape), dist.group.WORLD, purpose="test")
        for shape in ((1,), (4,), (2, 3))
    ]
    assert [tuple(total.shape) for total in totals] == [(1,), (4,), (2, 3)]
    return [total.item(), leaf.grad.item(), *torch.cat([t.flatten() for t in totals]).tolist()]


def test_half_precision_parts_are_summed_in_fp32(pool):
    """In bf16, 256 + 1 is 256: a running sum of four ranks' parts would lose three of them. So would the
    gradient of gathered keys."""
    assert pool.run(run_half_precision, world_size=4) == [[260.0] * (2 + 1 + 4 + 6)] * 4


def run_mixed() -> list[str]:
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the back end)

    mixed = dist.new_group([0, 1], backend="cpu:gloo,cuda:fake")
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    return [dist.get_backend(mixed), *(collectives.backend_of(mixed, each) for each in devices)]


def test_the_back_end_is_that_of_the_device(pool):
    """A mixed group has a name of its own, which told nothing: ours took NCCL for gloo, or gloo for NCCL."""
    name, *backends = pool.run(run_mixed, world_size=2)[0]
    assert name not in ("gloo", "fake")
    assert backends == ["gloo", "fake"]


def run_wrong_shapes() -> list[str]:
    group, texts = dist.group.WORLD, []
    wrong: list[Callable[[], Any]] = [
        lambda: collectives.scatter_sum(torch.zeros(3, 4), group, purpose="test"),
        lambda: collectives.swap(torch.zeros(()), group, purpose="test"),
    ]
    for call in wrong:
        with pytest.raises(HelixError) as error:
            call()
        texts.append(str(error.value))
    return texts


def test_shapes_that_do_not_divide_are_refused(pool):
    """gloo would hang or send rubbish; the error says what was needed."""
    leading = (
        "needs a leading axis of 2, one entry for each rank of the group, and got a tensor of shape"
    )
    texts = [
        f"scatter_sum {leading} (3, 4).",
        f"swap {leading} ().",
    ]
    assert pool.run(run_wrong_shapes, world_size=2) == [texts, texts]
