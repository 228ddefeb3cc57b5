"""Where things go in a picture: a column for each rank, its program downwards, collectives across columns.

A collective lies at one height for all of its ranks, below everything that they ran before it. Units are
points, y grows downwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

GAP = 22.0  # between two boxes of a column


@dataclass
class Cell:
    """What is to be placed: its height, and what it shares its place with in other columns."""

    height: float
    shared: Hashable | None = None


def heights(columns: Sequence[Sequence[Cell]], top: float = 0.0) -> list[list[float]]:
    """The upper edge of every cell.

    Cells of different columns with the same `shared` get the same one. Should columns have them in different
    orders, which a run that ends cannot, those left over are placed one by one.
    """
    owners: dict[Hashable, set[int]] = {}
    for number, column in enumerate(columns):
        for cell in column:
            if cell.shared is not None:
                owners.setdefault(cell.shared, set()).add(number)
    found: list[list[float]] = [[] for _ in columns]
    free = [top] * len(columns)

    def head(number: int) -> Cell | None:
        placed = len(found[number])
        return columns[number][placed] if placed < len(columns[number]) else None

    while True:
        heads = {number: cell for number in range(len(columns)) if (cell := head(number))}
        if not heads:
            return found
        for number, cell in heads.items():
            together = {number} if cell.shared is None else owners[cell.shared]
            if all(other in heads and heads[other].shared == cell.shared for other in together):
                break
        else:  # crossed: the first is placed alone
            number, cell = next(iter(heads.items()))
            together = {number}
            owners[cell.shared] -= together
        y = max(free[other] for other in together)
        for other in together:
            found[other].append(y)
            free[other] = y + heads[other].height + GAP
