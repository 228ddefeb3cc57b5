"""The meter counts what really ran, whoever issued it, and leaves no trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from helix_megatron.core import collectives
from helix_megatron.core.meter import Meter, Timing, measure
from helix_megatron.core.observe import (
    METHODS,
    Call,
    add_observer,
    observing,
    purpose,
    remove_observer,
)


def everything() -> dict[str, tuple[Callable[[], Any], tuple[str, int, int]]]:
    """name: (call, (collective, calls, bytes that this rank sends)); 8 fp32 elements on two ranks."""
    rank, other = dist.get_rank(), 1 - dist.get_rank()
    x, double = torch.ones(8), torch.empty(16)
    splits = [[3, 5], [1, 7]]

    def exchange() -> None:
        receive, send = dist.irecv, dist.isend
        for work in dist.batch_isend_irecv(
            [dist.P2POp(send, x, other), dist.P2POp(receive, x.clone(), other)]
        ):
            work.wait()

    def coalesced() -> None:
        with dist._coalescing_manager():
            dist.all_reduce(x.clone())
            dist.all_reduce(x.clone())

    from_root = 32 // 2 if rank == 0 else 0
    return {
        "all_reduce": (lambda: dist.all_reduce(x.clone()), ("all-reduce", 1, 32)),
        "coalesced all_reduce": (coalesced, ("all-reduce", 1, 64)),
        "all_reduce, async": (
            lambda: dist.all_reduce(x.clone(), async_op=True).wait(),
            ("all-reduce", 1, 32),
        ),
        "reduce": (lambda: dist.reduce(x.clone(), 0), ("reduce", 1, 16)),
        "all_gather": (lambda: dist.all_gather(list(double.chunk(2)), x), ("all-gather", 1, 32)),
        "all_gather_into_tensor": (
            lambda: dist.all_gather_into_tensor(double, x),
            ("all-gather", 1, 32),
        ),
        "reduce_scatter": (
            lambda: dist.reduce_scatter(torch.empty(4), list(x.chunk(2))),
            ("reduce-scatter", 1, 16),
        ),
        "reduce_scatter_tensor": (
            lambda: dist.reduce_scatter_tensor(torch.empty(4), x),
            ("reduce-scatter", 1, 16),
        ),
        "all_to_all_single": (
            lambda: dist.all_to_all_single(torch.empty(8), x),
            ("all-to-all", 1, 16),
        ),
        "all_to_all_single, uneven": (  # rank 0 sends 5 elements, rank 1 one: as MoE's dispatcher
            lambda: dist.all_to_all_single(
                torch.empty(splits[0][rank] + splits[1][rank]),
                x,
                [splits[0][rank], splits[1][rank]],
                splits[rank],
            ),
            ("all-to-all", 1, [20, 4][rank]),
        ),
        "all_to_all": (
            lambda: dist.all_to_all(list(double.chunk(2)), [x.clone(), x.clone()]),
            ("all-to-all", 1, 32),
        ),
        "broadcast": (lambda: dist.broadcast(x.clone(), 0), ("broadcast", 1, 16)),
        "gather": (
            lambda: dist.gather(x, list(double.chunk(2)) if rank == 0 else None, 0),
            ("gather", 1, 16),
        ),
        "scatter": (
            lambda: dist.scatter(torch.empty(4), list(x.chunk(2)) if rank == 0 else None, 0),
            ("scatter", 1, from_root),
        ),
        "send and recv": (
            lambda: dist.send(x, 1) if rank == 0 else dist.recv(x.clone(), 0),
            ("send", 1, 32) if rank == 0 else ("receive", 1, 0),
        ),
        "recv from anyone": (
            lambda: dist.send(x, 1) if rank == 0 else dist.recv(x.clone()),
            ("send", 1, 32) if rank == 0 else ("receive", 1, 0),
        ),
        "batch_isend_irecv": (exchange, ("send", 1, 32)),
        "barrier": (dist.barrier, ("barrier", 1, 0)),
    }


def run_everything(timing: Timing) -> list[str]:
    wrong = []
    for name, (call, (collective, calls, sent)) in everything().items():
        with measure(timing) as meter:
            call()
        traffic = {key[1]: value for key, value in meter.traffic.items()}
        got = traffic[collective]
        others = set(traffic) - {collective, *(["receive"] if "batch" in name else [])}
        if (got.calls, got.bytes) != (calls, sent) or others or meter.bytes() != sent:
            wrong.append(f"{name}: {meter.traffic}")
        timed = timing != "off"
        if (got.seconds > 0) != timed or (meter.seconds() > 0) != timed:
            wrong.append(f"{name} took {got.seconds} s")
    return wrong


@pytest.mark.parametrize("timing", get_args(Timing))
def test_the_meter_sees_every_collective_of_torch(pool, timing):
    """Reports, cost formulas and the graph rest on these counts: each collective once, with the bytes that
    this rank sends, whichever function of torch.distributed was called; and seconds if asked for."""
    assert pool.run(run_everything, timing, world_size=2) == [[], []]


def run_megatron() -> dict[tuple[str, str], tuple[int, int]]:
    from megatron.core import parallel_state, tensor_parallel

    from helix_megatron.megatron import cpu_runtime

    cpu_runtime.install()
    parallel_state.initialize_model_parallel(2)
    x = torch.ones(4, 2, requires_grad=True)
    with measure() as meter:
        y = tensor_parallel.gather_from_sequence_parallel_region(x)  # backward: reduce-scatter
        y = tensor_parallel.reduce_from_tensor_model_parallel_region(y)
        tensor_parallel.copy_to_tensor_model_parallel_region(y).sum().backward()  # all-reduce
        with purpose("checkpoint"):
            dist.barrier()
    return {key: (traffic.calls, traffic.bytes) for key, traffic in meter.traffic.items()}


def test_the_meter_sees_megatrons_own_collectives(pool):
    """Megatron imported its functions before the meter came: it must be seen below them, in backward, too,
    and be told apart by its group."""
    tensor = "TENSOR_MODEL_PARALLEL_GROUP"
    wanted = {
        (tensor, "all-gather"): (1, 32),
        (tensor, "all-reduce"): (2, 128),
        (tensor, "reduce-scatter"): (1, 32),
        ("checkpoint", "barrier"): (1, 0),
    }
    assert pool.run(run_megatron, world_size=2) == [wanted, wanted]


def run_purposes() -> list[Any]:
    group = dist.group.WORLD
    x = torch.ones(2, 2, requires_grad=True)
    with measure() as meter:
        y = collectives.gather(x, group, purpose="exchange/a")
        forward = (meter.calls("exchange/a"), meter.bytes("exchange/a"))
        with purpose("outer"):
            dist.all_reduce(torch.ones(2))
            with purpose("outer/inner"):
                dist.all_reduce(torch.ones(2))
            dist.all_reduce(torch.ones(2))
        counts = [meter.calls("outer"), meter.calls("outer/inner"), meter.calls("outer/in")]
        y.sum().backward()  # outside of every block: counted under the purpose of its forward
        both = (meter.calls("exchange"), meter.bytes("exchange"))
        meter.reset()
        after = [meter.calls(), meter.bytes(), meter.seconds()]
        dist.all_reduce(torch.ones(2))
        named = list(meter.traffic)
    return [forward, counts, both, after, named]


def test_purposes_nest_and_backward_keeps_its_own(pool):
    """`bytes("exchange")` is the claim of the whole project: it must hold all of the exchanges, forward and
    backward, and nothing else."""
    wanted = [(1, 16), [3, 1, 0], (2, 32), [0, 0, 0.0], [("default_pg", "all-reduce")]]
    assert pool.run(run_purposes, world_size=2) == [wanted, wanted]


def test_purposes_are_paths():
    """A purpose counts what is below it, not what happens to begin with the same letters."""
    meter = Meter()
    for name, sent in (("exchange", 1), ("exchange/a", 2), ("exchange-like", 4), ("other", 8)):
        call = Call("all-gather", name, group=None, sent_bytes=sent, device=None)  # type: ignore[arg-type]
        assert meter.around(call, lambda: "work") == "work"
    assert (meter.bytes("exchange"), meter.bytes("exchange/a"), meter.bytes()) == (3, 2, 15)
    assert (meter.calls("exchange"), meter.calls()) == (2, 4)


def methods() -> dict[str, Any]:
    return {name: vars(ProcessGroup)[name] for name in METHODS if name in vars(ProcessGroup)}


def test_process_groups_are_as_before_when_the_last_observer_leaves():
    """A wrapper left behind would slow and confuse every later collective of the process."""
    before = methods()
    assert len(before) > 15
    first, second = Meter(), Meter()
    add_observer(first)
    inside = methods()
    assert all(inside[name] is not before[name] for name in before)
    add_observer(second)
    assert methods() == inside, "a second observer must not wrap the wrappers"
    remove_observer(first)  # not the last one that came
    assert methods() == inside
    remove_observer(second)
    assert methods() == before
    with pytest.raises(ZeroDivisionError), measure():
        raise ZeroDivisionError
    assert methods() == before


class Recorder:
    """Notes when it is entered and left, and may refuse to run the collective."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        self.log.append(f"{self.name} enters {call.collective} on {call.device}")
        try:
            return run()
        finally:
            self.log.append(f"{self.name} leaves")


def run_nested() -> list[Any]:
    log: list[str] = []
    with observing(Recorder("outer", log)), observing(Recorder("inner", log)):
        dist.all_reduce(torch.ones(1))
        dist.barrier()
    with measure() as outer:
        dist.all_reduce(torch.ones(2))
        with measure() as inner:
            dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(2))
    with measure("total"):
        work = dist.all_reduce(torch.ones(2), async_op=True)
        done = work.is_completed()
    return [log, outer.calls(), inner.calls(), done]


def run_late(delay: float) -> list[float]:
    """Seconds of an all-reduce for which rank 1 comes `delay` late: hidden, exposed and in total."""
    seconds = []
    for hidden, timing in ((True, "exposed"), (False, "exposed"), (False, "total")):
        dist.barrier()
        with measure(timing) as meter:
            if dist.get_rank() == 1:
                time.sleep(delay)
            work = dist.all_reduce(torch.ones(2), async_op=True)
            while hidden and not work.is_completed():
                time.sleep(0.01)  # for work of this rank's own
            work.wait()
        seconds.append(meter.seconds())
    return seconds


def test_exposed_is_what_no_work_hides(pool):
    """An all-reduce that is over before anybody waits for it costs next to nothing."""
    for delay in (0.5, 5, 30):  # a busy machine adds to all three; a longer delay to two of them
        hidden, exposed, total = pool.run(run_late, delay, world_size=2)[0]
        if hidden < min(exposed, total) / 2:
            break
    assert hidden < min(exposed, total) / 2


def test_observers_nest(pool):
    """The watchdog and the meter watch the same collectives: each sees each once, the first outermost."""
    log = [
        "outer enters all-reduce on cpu",
        "inner enters all-reduce on cpu",
        "inner leaves",
        "outer leaves",
        "outer enters barrier on None",
        "inner enters barrier on None",
        "inner leaves",
        "outer leaves",
    ]
    assert pool.run(run_nested, world_size=2) == [[log, 3, 1, True]] * 2
