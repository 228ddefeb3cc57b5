"""What one rank found out, known to all: results, and errors that every rank raises alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from helix_megatron.errors import HelixError

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and give every rank its result, or the `HelixError` that it raised.

    Of any other exception, a fault of this package or of the machine, the other ranks raise its text: none
    waits for a rank that has left.
    """
    outcome: list[Any] = [None, None]
    fault: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except HelixError as error:
            outcome[1] = error
        except Exception as error:
            fault = error
            outcome[1] = HelixError(f"the first rank failed: {type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if fault is not None:
        raise fault
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(function: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Call `function` on every rank of a group, all when None.

    When it raises on one, all of them raise the `HelixError` of the first, or the text of any other exception
    of it: none waits for a rank that has left.
    """
    result: Any = None
    problem: HelixError | None = None
    fault: Exception | None = None
    try:
        result = function()
    except HelixError as error:
        problem = error
    except Exception as error:
        fault = error
        rank = dist.get_rank(group)
        problem = HelixError(f"rank {rank} failed: {type(error).__name__}: {error}")
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    if fault is not None:
        raise fault
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise first
    return result
