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
        return (
            columns[number][len(found[number])]
            if len(found[number]) < len(columns[number])
            else None
        )

    def put(number: int, cell: Cell, y: float) -> None:
        found[number].append(y)
        free[number] = y + cell.height + GAP

    def advance() -> bool:
        moved = False
        for number in range(len(columns)):
            cell: Cell | None = head(number)
            while cell is not None:
                together = owners[cell.shared] if cell.shared is not None else {number}
                heads = {other: head(other) for other in together}
                if any(
                    h is None or h.shared != cell.shared
                    for h in heads.values()
                    if len(together) > 1
                ):
                    break
                y = max(free[other] for other in together)
                for other, its in heads.items():
                    assert its is not None
                    put(other, its, y)
                moved, cell = True, head(number)
        return moved

    while any(head(number) is not None for number in range(len(columns))):
        if not advance():
            number = next(n for n in range(len(columns)) if head(n) is not None)
            stuck = head(number)
            assert stuck is not None
            owners[stuck.shared] -= {number}
            put(number, stuck, free[number])
    return found
