"""What one step computes, as rank 0 tells it to the others: a few whole numbers, never a pickle."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from helix_megatron.core.caches.pages import Piece

if TYPE_CHECKING:
    from torch import device
    from torch.distributed import ProcessGroup

INLINE = 1024  # numbers that travel with the first message; a longer step needs a second one


@dataclass(frozen=True)
class StepPlan:
    """One step: sequences that end before it, and the tokens to compute. `last`: there will be no other."""

    drops: tuple[int, ...] = ()
    pieces: tuple[Piece, ...] = ()
    last: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.pieces)

    @property
    def ends(self) -> list[int]:
        """Behind which row of the logits those of each piece end."""
        return list(itertools.accumulate(piece.wanted for piece in self.pieces))

    def encode(self) -> np.ndarray:
        """int64, the inverse of `decode`."""
        head = [int(self.last), len(self.drops), len(self.pieces)]
        rows = [
            (p.sequence, p.start, p.member, p.wanted, len(p.pages), len(p.tokens))
            for p in self.pieces
        ]
        lists = [part for p in self.pieces for part in (p.pages, p.tokens)]
        parts = [head, self.drops, *rows, *lists]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])

    @classmethod
    def decode(cls, numbers: np.ndarray) -> StepPlan:
        """From what `encode` gave, and anything behind it."""
        last, drops, count = (int(number) for number in numbers[:3])
        end = 3 + drops
        rows = numbers[end : end + 6 * count].reshape(count, 6)
        at = end + 6 * count
        pieces = []
        for sequence, start, member, wanted, new, length in rows.tolist():
            pages, tokens = numbers[at : at + new].tolist(), numbers[at + new : at + new + length]
            pieces.append(Piece(sequence, start, tokens, member, pages, wanted))
            at += new + length
        return cls(tuple(numbers[3:end].tolist()), tuple(pieces), bool(last))


def plan_group(group: ProcessGroup, device: device) -> ProcessGroup:
    """Make a group of the same ranks over gloo, with the same timeout: plans wait for no device. Collective."""
    import torch.distributed as dist

    from helix_megatron.core.collectives import backend_of

    if group.size() == 1 or backend_of(group, device) == "gloo":
        return group
    ranks = dist.get_process_group_ranks(group)
    timeout = group._get_backend(group._device_types[0]).options._timeout
    made: Any = dist.new_group(ranks, timeout, backend="gloo", use_local_synchronization=True)
    return made


def tell(plan: StepPlan, group: ProcessGroup) -> None:
    """Give every other rank of a group over gloo the plan of a step."""
    numbers = plan.encode()
    first = np.zeros(1 + INLINE, dtype=np.int64)
    first[0] = len(numbers)
    first[1 : 1 + min(INLINE, len(numbers))] = numbers[:INLINE]
    _broadcast(first, group)
    if len(numbers) > INLINE:
        _broadcast(numbers[INLINE:], group)


def hear(group: ProcessGroup) -> StepPlan:
    """Return the plan that rank 0 of the group tells."""
    first = _broadcast(np.zeros(1 + INLINE, dtype=np.int64), group)
    length, numbers = int(first[0]), first[1:]
    if length > INLINE:
        rest = _broadcast(np.zeros(length - INLINE, dtype=np.int64), group)
        numbers = np.concatenate([numbers, rest])
    return StepPlan.decode(numbers[:length])


def _broadcast(numbers: np.ndarray, group: ProcessGroup) -> np.ndarray:
    """Give every rank the numbers of rank 0, in place."""
    import torch
    import torch.distributed as dist

    from helix_megatron.core.observe import purpose

    if group.size() > 1:
        with purpose("plan"):
            dist.broadcast(torch.from_numpy(numbers), group=group, group_src=0)
    return numbers
