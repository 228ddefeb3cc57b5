"""The pool of ranks, on which all distributed tests stand, and the rule that skips say why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import RankError, RankPool

pytest_plugins = ["pytester"]


def rank_and_sum(factor: int, offset: int = 0) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank() * factor + offset, int(total)


def raise_on(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        raise ValueError(f"rank {bad_rank} has a bad day")
    dist.barrier()


def sleep_on(slow_rank: int) -> None:
    if dist.get_rank() == slow_rank:
        threading.Event().wait()
    dist.barrier()


def die_on(doomed_rank: int) -> None:
    if dist.get_rank() == doomed_rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def process_id() -> int:
    return os.getpid()


def preloaded_and_path() -> tuple[bool, bool]:
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return "deepspeed" in sys.modules, str(Path(__file__).parent) in path


def finish_late_on(late_rank: int) -> float:
    """The late rank still receives when the others have returned."""
    value = torch.full((1 << 18,), float(dist.get_rank()))
    if dist.get_rank() == late_rank:
        time.sleep(0.5)
    dist.broadcast(value, src=1 - late_rank)
    return float(value.mean())


def leave_state_behind() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    random.initialize_rng_tracker()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["HELIX_LEFT_BEHIND"] = "1"


def state_found() -> tuple[bool, bool, torch.dtype, bool, bool, float]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    return (
        parallel_state.model_parallel_is_initialized(),
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        "HELIX_LEFT_BEHIND" in os.environ,
        float(torch.rand(())),
    )


def environment_and_threads() -> tuple[str | None, str | None, int]:
    return os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 4, 2])
def test_results_come_back_in_rank_order_for_any_world_size(
    pool: RankPool, world_size: int
) -> None:
    """Every distributed test indexes the list of results by rank."""
    total = world_size * (world_size - 1) // 2
    expected = [(rank * 3 + 1, total) for rank in range(world_size)]
    assert pool.run(rank_and_sum, 3, offset=1, world_size=world_size) == expected


def test_processes_are_reused(pool: RankPool) -> None:
    """Importing torch and megatron-core anew for every test would take minutes."""
    first = pool.run(process_id, world_size=4)
    assert len(set(first)) == 4
    assert pool.run(process_id, world_size=2) == first[:2]


def test_ranks_share_what_was_imported_before_them(pool: RankPool) -> None:
    """The server of the pool says nothing where that fails. What ranks start does not find the tests."""
    assert pool.run(preloaded_and_path, world_size=1) == [(True, False)]


def test_ranks_see_their_environment_and_one_thread(pool: RankPool) -> None:
    """Host code reads RANK; several ranks share few cores."""
    assert pool.run(environment_and_threads, world_size=2) == [("0", "2", 1), ("1", "2", 1)]


@pytest.mark.parametrize("late_rank", [0, 1])
def test_a_late_rank_is_not_cut_off(pool: RankPool, late_rank: int) -> None:
    """A rank that has returned must keep its connections until all have."""
    assert pool.run(finish_late_on, late_rank, world_size=2) == [1.0 - late_rank] * 2


def test_every_run_starts_clean(pool: RankPool) -> None:
    """The order of tests must not matter."""
    before = pool.run(state_found, world_size=2)
    assert before[0][:5] == (False, False, torch.float32, True, False)
    pool.run(leave_state_behind, world_size=2)
    assert pool.run(state_found, world_size=2) == before


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_the_traceback_of_the_first_cause_is_shown(pool: RankPool, bad_rank: int) -> None:
    """The other ranks only see a closed connection, which explains nothing."""
    with pytest.raises(RankError) as caught:
        pool.run(raise_on, bad_rank, world_size=4)
    message = str(caught.value)
    assert f"Rank {bad_rank} raised:\nTraceback" in message
    assert "in raise_on" in message
    assert f"ValueError: rank {bad_rank} has a bad day" in message
    assert message.count("Traceback") == 1
    assert "did not answer" not in message, "nobody may have waited until the pool gave up"
    assert len(pool.run(process_id, world_size=4)) == 4


def test_a_hung_rank_is_named_with_its_stack(pool: RankPool) -> None:
    """A hang must end within the timeout, say where it is, and leave a usable pool."""
    for timeout in (2, 20, 200):  # on a slow machine the rank is not there yet after the first
        with pytest.raises(RankError, match=r"Ranks that did not answer: 0, 1\.") as caught:
            pool.run(sleep_on, 1, world_size=2, timeout=timeout)
        if "in sleep_on" in str(caught.value):
            break
    assert "in sleep_on" in str(caught.value)
    assert pool.run(rank_and_sum, 1, world_size=2) == [(0, 1), (1, 1)]


def test_a_killed_rank_is_noticed_at_once(pool: RankPool) -> None:
    """A crash (out of memory, a signal) must not look like a hang."""
    with pytest.raises(RankError, match=r"Rank 1 died with exit code -9\.") as caught:
        pool.run(die_on, 1, world_size=4)
    assert "did not answer" not in str(caught.value), "it was found by its end, not by its silence"
    assert pool.run(rank_and_sum, 1, world_size=4) == [(rank, 6) for rank in range(4)]


@pytest.mark.parametrize("world_size", [0, 17])
def test_world_sizes_outside_the_pool_are_refused(pool: RankPool, world_size: int) -> None:
    """A typing error must not start a thousand processes."""
    with pytest.raises(ValueError, match=f"world_size is {world_size}. Valid values: 1 to 16."):
        pool.run(process_id, world_size=world_size)


def test_results_that_cannot_be_pickled_are_an_error_of_the_rank(pool: RankPool) -> None:
    """A lambda as result is the test's mistake; the pool must survive it."""
    with pytest.raises(RankError, match="pickle"):
        pool.run(make_lambda, world_size=1)
    assert len(pool.run(process_id, world_size=1)) == 1


def make_lambda() -> object:
    return lambda: None


def test_skips_need_a_reason_and_are_listed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped tests check nothing: the summary has to say which and why."""
    for variable in ("CI", "BUILD_NUMBER"):  # under these pytest says each reason a second time
        monkeypatch.delenv(variable, raising=False)
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makepyfile(
        """
        import pytest
        def test_silent(): pytest.skip()
        @pytest.mark.skip
        def test_marked(): pass
        def test_explained(): pytest.skip("needs a GPU")
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1, errors=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED *needs a GPU"])
    assert result.stdout.str().count("this test is skipped without a reason") == 2
