"""The groups of intra-head parallelism beside Megatron's, in every order that Megatron accepts."""

from __future__ import annotations

import gc
import re
import time
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from pool import RankError
from torch.testing._internal.distributed.fake_pg import FakeStore

from helix_megatron import parallel_state
from helix_megatron.errors import HelixError


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def describe_groups(m: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """What this rank is told about its groups, and sums of ranks that went over them."""
    from megatron.core import parallel_state as megatron_state

    parallel_state.initialize_model_parallel(intra_head_parallel_size=m, **sizes)
    intra_head = parallel_state.get_intra_head_parallel_group()
    head_group = parallel_state.get_head_group_parallel_group()
    sums = []
    for group in (intra_head, head_group):
        total = torch.tensor([dist.get_rank()])
        dist.all_reduce(total, group=group)
        sums.append(total.item())
    return {
        "tensor": members(megatron_state.get_tensor_model_parallel_group()),
        "intra-head": parallel_state.get_intra_head_parallel_global_ranks(),
        "head group": parallel_state.get_head_group_parallel_global_ranks(),
        "same": [members(intra_head), members(head_group)],
        "place": (
            parallel_state.get_head_group_parallel_rank(),
            parallel_state.get_intra_head_parallel_rank(),
        ),
        "sizes": (
            parallel_state.get_head_group_parallel_world_size(),
            parallel_state.get_intra_head_parallel_world_size(),
        ),
        "sums": sums,
        "names": (intra_head.group_desc, head_group.group_desc),
    }


TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EP, CP = "expert_model_parallel_size", "context_parallel_size"
# name: (m, Megatron's sizes, tensor parallel groups, intra-head groups, groups of equal segments)
WORLDS: dict[str, tuple[int, dict[str, Any], list[list[int]], list[list[int]], list[list[int]]]] = {
    "TP4 m2": (2, {TP: 4}, [[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    "TP4 m1": (1, {TP: 4}, [[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
    "TP4 m4": (4, {TP: 4}, [[0, 1, 2, 3]], [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    "TP2 DP2 m2": (2, {TP: 2}, [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]),
    "TP2 EP2 m2": (2, {TP: 2, EP: 2}, [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0], [1], [2], [3]]),
    "TP4 PP2 m2": (
        2,
        {TP: 4, PP: 2},
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 2], [1, 3], [4, 6], [5, 7]],
    ),
    "TP2 PP2 DP2 m2, pp before dp": (
        2,
        {TP: 2, PP: 2, "order": "tp-cp-ep-pp-dp"},
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[rank] for rank in range(8)],
    ),
    "TP2 CP2 DP2 m2": (
        2,
        {TP: 2, CP: 2},
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[rank] for rank in range(8)],
    ),
    "TP4 CP2 m2, context ranks as neighbours": (
        2,
        {TP: 4, CP: 2, "order": "cp-tp-ep-dp-pp"},
        [[0, 2, 4, 6], [1, 3, 5, 7]],
        [[0, 2], [4, 6], [1, 3], [5, 7]],
        [[0, 4], [2, 6], [1, 5], [3, 7]],
    ),
    "TP4 PP2 m2, pipeline stages as neighbours": (
        2,
        {TP: 4, PP: 2, "order": "pp-tp-cp-ep-dp"},
        [[0, 2, 4, 6], [1, 3, 5, 7]],
        [[0, 2], [4, 6], [1, 3], [5, 7]],
        [[0, 4], [2, 6], [1, 5], [3, 7]],
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_groups(pool, name):
    """Written out by hand: segments of a group are neighbours among the tensor parallel ranks, wherever those
    lie in the world, and Megatron's tensor parallel groups stay whole."""
    m, sizes, tensor, intra_head, head_group = WORLDS[name]
    for rank, got in enumerate(
        pool.run(describe_groups, m, sizes, world_size=sum(map(len, tensor)))
    ):
        own_tensor, own, across = (
            next(ranks for ranks in groups if rank in ranks)
            for groups in (tensor, intra_head, head_group)
        )
        assert got == {
            "tensor": own_tensor,
            "intra-head": own,
            "head group": across,
            "same": [own, across],
            "place": divmod(own_tensor.index(rank), m),
            "sizes": (sizes[TP] // m, m),
            "sums": [sum(own), sum(across)],
            "names": ("INTRA_HEAD_PARALLEL_GROUP", "HEAD_GROUP_PARALLEL_GROUP"),
        }


@pytest.mark.parametrize(("rank", "own", "across"), [(0, [0, 1], [0, 2]), (5, [4, 5], [5, 7])])
def test_groups_of_the_fake_back_end(rank, own, across):
    """Graphs are traced on one process that plays a rank of eight, over torch's fake back end."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        parallel_state.initialize_model_parallel(
            4, intra_head_parallel_size=2, create_gloo_process_groups=False
        )
        assert parallel_state.get_intra_head_parallel_global_ranks() == own
        assert parallel_state.get_head_group_parallel_global_ranks() == across
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def destroy_and_make_again() -> list[Any]:
    from megatron.core import parallel_state as megatron_state

    seen: list[Any] = [parallel_state.intra_head_parallel_is_initialized()]
    parallel_state.destroy_model_parallel()  # nothing exists: nothing happens
    for m in (2, 4):
        parallel_state.initialize_model_parallel(4, intra_head_parallel_size=m)
        seen.append(parallel_state.get_intra_head_parallel_world_size())
        old = parallel_state.get_intra_head_parallel_group()
        # gloo cannot connect a rank to one that has destroyed the group already.
        dist.barrier()
        parallel_state.destroy_model_parallel()
        seen += [
            parallel_state.intra_head_parallel_is_initialized(),
            megatron_state.model_parallel_is_initialized(),
            parallel_state.get_intra_head_parallel_group(check_initialized=False),
            parallel_state.get_head_group_parallel_group(check_initialized=False),
        ]
        with pytest.raises(KeyError):  # torch does not know it any more
            members(old)
    parallel_state.initialize_model_parallel(4, intra_head_parallel_size=2)
    dist.barrier()
    parallel_state.destroy_intra_head_parallel()
    seen.append(megatron_state.model_parallel_is_initialized())
    return seen


def test_groups_can_be_destroyed_and_made_again(pool):
    """Tests, notebooks and restarts make several worlds in one process; the old groups must be freed, and the
    intra-head ones alone can be."""
    after = [False, False, None, None]
    assert (
        pool.run(destroy_and_make_again, world_size=4) == [[False, 2, *after, 4, *after, True]] * 4
    )


def left_behind(m: int | None) -> tuple[int, int]:
    """(groups, threads) more than before groups were made, used and destroyed; None: Megatron's alone."""
    from megatron.core import parallel_state as megatron_state

    def count() -> tuple[int, int]:
        gc.collect()
        return len(dist.distributed_c10d._world.pg_map), psutil.Process().num_threads()

    before = count()
    if m is None:
        megatron_state.initialize_model_parallel(4)
        megatron_state.destroy_model_parallel()
    else:
        parallel_state.initialize_model_parallel(4, intra_head_parallel_size=m)
        for group in (
            parallel_state.get_intra_head_parallel_group(),
            parallel_state.get_head_group_parallel_group(),
        ):
            dist.all_reduce(torch.ones(1), group=group)
        del group
        parallel_state.destroy_model_parallel()
    dist.barrier()
    after = count()
    return after[0] - before[0], after[1] - before[1]


@pytest.fixture(scope="module")
def left_by_megatron(pool) -> list[tuple[int, int]]:
    """What its groups alone leave behind on each rank."""
    return pool.run(left_behind, None, world_size=4)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_destroyed_groups_leave_nothing_behind(pool, left_by_megatron, m):
    """A gloo group has three threads that wake up all the time. Many worlds in one process, as in tests and
    notebooks, must not pile up more of them than Megatron's own groups do."""
    found = pool.run(left_behind, m, world_size=4)
    for ours, theirs in zip(found, left_by_megatron, strict=True):
        assert ours <= theirs


def options_of_groups(config: dict[str, Any], high_priority: list[str]) -> list[Any]:
    """What the two groups of this rank are made with; NCCL itself is not here."""
    import json
    import tempfile
    from unittest.mock import patch

    made: list[Any] = []
    new_group = dist.new_group

    def noted(*args: Any, pg_options: Any = None, **kwargs: Any) -> Any:
        made.append(pg_options)
        return new_group(*args, **kwargs)

    with (
        tempfile.NamedTemporaryFile("w", suffix=".yaml") as file,
        patch("megatron.core.parallel_state.get_nccl_options", lambda name, all_: all_.get(name)),
        patch("torch.distributed.new_group", noted),
    ):
        json.dump(config, file)  # which is YAML, too
        file.flush()
        parallel_state.initialize_model_parallel(
            2,
            intra_head_parallel_size=2,
            nccl_communicator_config_path=file.name,
            high_priority_stream_groups=high_priority,
        )
    return made[-3:]  # of one pair of neighbours, and of each of its ranks


def test_groups_take_the_nccl_options_of_megatron(pool):
    """Without them an exchange waits behind other kernels that a user has moved it in front of."""
    pytest.importorskip("yaml", reason="Megatron reads its NCCL options with PyYAML")
    asked = {"tp": {"max_ctas": 4}, "dp": {"max_ctas": 8}}
    assert pool.run(options_of_groups, asked, [], world_size=2)[0] == [{"max_ctas": 4}] * 3
    first = {"max_ctas": 4, "is_high_priority_stream": True}
    assert pool.run(options_of_groups, asked, ["tp"], world_size=2)[0] == [first] * 3
    own = asked | {"ihp": {"min_ctas": 2}}
    assert pool.run(options_of_groups, own, [], world_size=2)[0] == [{"min_ctas": 2}] * 3
    assert pool.run(options_of_groups, {}, ["dp"], world_size=2)[0] == [None] * 3


def register_after_megatron() -> list[Any]:
    from megatron.core import parallel_state as megatron_state

    megatron_state.initialize_model_parallel(4)
    parallel_state.register_intra_head_parallel(2)
    return [
        parallel_state.get_intra_head_parallel_global_ranks(),
        parallel_state.get_head_group_parallel_global_ranks(),
    ]


def test_groups_can_be_added_to_megatrons(pool):
    """Megatron-LM's scripts initialise Megatron themselves."""
    assert pool.run(register_after_megatron, world_size=4) == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[2, 3], [0, 2]],
        [[2, 3], [1, 3]],
    ]


def make_collections() -> list[bool]:
    from megatron.core import parallel_state as megatron_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    parallel_state.initialize_model_parallel(4, intra_head_parallel_size=2)
    intra_head = parallel_state.get_intra_head_parallel_group()
    head_group = parallel_state.get_head_group_parallel_group()
    tensor = megatron_state.get_tensor_model_parallel_group()

    some = parallel_state.use_mpu_process_groups(["tp"])
    every = parallel_state.use_mpu_process_groups()
    given = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
    added = parallel_state.with_intra_head_groups(given)
    own = ProcessGroupCollection.use_mpu_process_groups(["tp"])
    own.ihp = head_group  # whoever brings groups knows why
    kept = parallel_state.with_intra_head_groups(own)
    return [
        some.tp is tensor and some.ihp is intra_head,
        getattr(some, "dp", None) is None,
        every.dp is megatron_state.get_data_parallel_group() and every.ihp is intra_head,
        added.cp is given.cp and added.ihp is intra_head,
        added is not given and not hasattr(given, "ihp"),
        kept.ihp is head_group,
    ]


def test_collections_carry_the_groups(pool):
    """Megatron's modules take their groups from a collection; the caller's own must not be written to."""
    assert pool.run(make_collections, world_size=4) == [[True] * 6] * 4


def make_mistakes() -> list[str]:
    from megatron.core import parallel_state as megatron_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    texts = []

    def refused(call: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(HelixError) as error:
            call(*args, **kwargs)
        texts.append(str(error.value))

    missing = [
        parallel_state.get_intra_head_parallel_group,
        parallel_state.get_intra_head_parallel_rank,
        parallel_state.get_intra_head_parallel_world_size,
        parallel_state.get_intra_head_parallel_global_ranks,
        parallel_state.get_head_group_parallel_group,
        parallel_state.get_head_group_parallel_rank,
        parallel_state.get_head_group_parallel_world_size,
        parallel_state.get_head_group_parallel_global_ranks,
    ]
    for ask in missing:
        refused(ask)
    refused(parallel_state.with_intra_head_groups, ProcessGroupCollection())
    assert len(set(texts)) == 1, texts
    del texts[1:]

    refused(parallel_state.register_intra_head_parallel, 2)
    refused(parallel_state.initialize_model_parallel, 4, intra_head_parallel_size=3)
    assert not megatron_state.model_parallel_is_initialized(), "refused, but Megatron initialised"
    refused(parallel_state.initialize_model_parallel, 4, intra_head_parallel_size=0)

    megatron_state.initialize_model_parallel(4)
    refused(parallel_state.initialize_model_parallel, 4, intra_head_parallel_size=2)
    refused(parallel_state.register_intra_head_parallel, 3)
    parallel_state.register_intra_head_parallel(2)
    refused(parallel_state.register_intra_head_parallel, 2)
    refused(parallel_state.initialize_model_parallel, 4, intra_head_parallel_size=2)
    return texts


def test_mistakes_are_refused_in_words(pool):
    """Each is met by people who write their own training scripts; each text says what to call instead."""
    divides = (
        "intra-head parallel size 3 does not divide the tensor parallel size 4. Valid: 1, 2, 4. Or change "
        "tensor_model_parallel_size to a multiple of it."
    )
    twice = (
        "intra-head parallel groups exist already. Call "
        "helix_megatron.parallel_state.destroy_model_parallel before making others."
    )
    texts = [
        "intra-head parallel groups do not exist. Call helix_megatron.parallel_state."
        "initialize_model_parallel(..., intra_head_parallel_size=m), or register_intra_head_parallel(m) where "
        "Megatron is initialised already.",
        "Megatron's model parallel groups do not exist yet. Call "
        "helix_megatron.parallel_state.initialize_model_parallel instead, or Megatron's own first.",
        divides,
        "intra-head parallel size 0 is not a whole number of at least 1. "
        "1 is stock attention; 2 halves every head.",
        "Megatron's model parallel groups exist already. Call helix_megatron.parallel_state."
        "register_intra_head_parallel(m) to add those of intra-head parallelism.",
        divides,
        twice,
        twice,
    ]
    assert pool.run(make_mistakes, world_size=4) == [texts] * 4


def wait_for_a_rank_that_never_joins(minutes: float) -> float:
    """Seconds until rank 0's collective gave up; rank 1 waits elsewhere, alive, until it has."""
    parallel_state.initialize_model_parallel(
        2, intra_head_parallel_size=2, distributed_timeout_minutes=minutes
    )
    seconds = 0.0
    if dist.get_rank() == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|timeout"):
            dist.all_reduce(torch.ones(1), group=parallel_state.get_intra_head_parallel_group())
        seconds = time.monotonic() - start
    dist.barrier()  # on the world's group, whose timeout is the pool's
    return seconds


def test_a_rank_that_never_joins_ends_in_an_error(pool):
    """A rank that died must not let the others of its head group wait for ever: the timeout that the user
    sets is that of our groups, too."""
    for minutes in (0.03, 0.3, 3):  # a busy machine may need more than the first to make the groups
        try:
            seconds = pool.run(wait_for_a_rank_that_never_joins, minutes, world_size=2)[0]
            break
        except RankError as error:
            if minutes == 3 or not re.search("timed out", str(error), re.IGNORECASE):
                raise
    assert seconds > 50 * minutes, "less than it was told to wait"
