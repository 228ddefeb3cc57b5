"""Context parallelism: a sequence dealt to ranks, and attention that gathers keys and values of all of them.

A sequence is cut into 2c chunks for the c ranks of a context-parallel group, and rank r holds chunks r and
2c−1−r, one behind the other: Megatron's order (`megatron.core.utils.get_batch_on_this_cp_rank`). A causal query
chunk x sees x+1 chunks of keys, so every rank computes (r+1) + (2c−r) = 2c+1 pairs of chunks: the work is even.

A packed row holds several documents one behind the other, and each is dealt like a sequence of its own. To this
module a batch of sequences is a row with one document.

Shapes: L positions on this rank, S = c·L on all; B batch; H, G query and key-value heads; D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.collectives import gather
from helix_megatron.core.masks import AttentionMask
from helix_megatron.errors import HelixError, Setting

PURPOSE = "context/gather-kv"
"""Under which the meter counts the gathered keys and values, and their gradients."""

Attend = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
"""(q_LBHD, k_SBGD, v_SBGD, mask) → [L, B, H·D]: attention on one rank, or on those of a head group."""


class Document(NamedTuple):
    """A document of a packed row: where it lies in the whole row, padding included, and its real length."""

    start: int
    stop: int
    length: int


COMMUNICATION = "all_gather"
"""The one `cp_comm_type` that this is, of those that Transformer Engine's attention has."""


def check_communication(cp_comm_type: str | None) -> None:
    """Raise unless that is how keys and values travel here; None leaves the choice.

    Raises:
        HelixError: it is another way.
    """
    if cp_comm_type not in (None, COMMUNICATION):
        raise HelixError(
            f"context parallelism communicates by {COMMUNICATION} without Transformer Engine, and "
            f"{cp_comm_type} is one of its ways.",
            setting="cp_comm_type",
            value=cp_comm_type,
            remedy=("Set ", Setting("cp_comm_type", COMMUNICATION), ", or leave it out."),
        )


def chunks_of(rank: int, ranks: int) -> tuple[int, ...]:
    """The chunks of a sequence that a context-parallel rank holds, in their order there."""
    return (rank, 2 * ranks - 1 - rank) if ranks > 1 else (0,)


def own_part(x: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """A context-parallel rank's positions of a whole sequence: [.., S, ..] → [.., S/c, ..]."""
    if ranks == 1:
        return x
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([chunks[chunk] for chunk in chunks_of(rank, ranks)], dim)


def own_rows(documents: Sequence[Document], rank: int, ranks: int) -> list[int]:
    """Where the positions of a context-parallel rank lie in a whole packed row, in their order on the rank."""
    rows: list[int] = []
    for start, stop, _ in documents:
        size = (stop - start) // len(chunks_of(rank, ranks)) // ranks
        for chunk in chunks_of(rank, ranks):
            rows += range(start + chunk * size, start + (chunk + 1) * size)
    return rows


def in_order(x_cL: Tensor) -> Tensor:
    """[c, L, ...] → [c·L, ...]: the positions of a sequence in order, from what every rank holds."""
    if x_cL.size(0) == 1:
        return x_cL[0]
    halves = x_cL.unflatten(1, (2, -1))
    return torch.cat((halves[:, 0], halves[:, 1].flip(0))).flatten(0, 1)


def over_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Attend,
    *,
    mask: AttentionMask,
    group: ProcessGroup,
    documents: Sequence[Document] | None = None,
) -> Tensor:
    """Exact attention of this rank's queries to the keys of all ranks of a context-parallel group.

    Keys and values are gathered, and in the backward pass their gradients are reduced and scattered. Without
    context parallelism and documents this is `attend` alone.

    Args:
        q: [L, B, H, D].
        k, v: [L, B, G, D].
        attend: what computes attention to whole sequences; called for every chunk of every document.
        mask: causality and window; `hidden` has this rank's queries, and the keys of the whole sequence.
        group: the context-parallel group.
        documents: of a packed row, whose B is 1.

    Returns:
        [L, B, H·D]; zeros for what is padding inside a packed row.
    """
    ranks, rank = group.size(), group.rank()
    if documents is None:
        if ranks == 1:
            return attend(q, k, v, mask)
        documents = [Document(0, k.size(0) * ranks, k.size(0) * ranks)]
    _check_lengths(documents, ranks, q.size(0) * ranks)
    kv_cL = gather(torch.cat((k, v), dim=-1), group, purpose=PURPOSE)
    outputs = []
    for start, stop, length in documents:
        kv = in_order(kv_cL[:, start // ranks : stop // ranks])
        keys, values = kv[:length].split((k.size(-1), v.size(-1)), dim=-1)
        chunks = chunks_of(rank, ranks)
        size = (stop - start) // ranks // len(chunks)
        for nth, chunk in enumerate(chunks):
            row, position = start // ranks + nth * size, chunk * size
            real = min(max(0, length - position), size)
            if real:
                # The offset of row 0 that gives this chunk's first row its position.
                placed = AttentionMask(mask.causal, mask.window, mask.hidden, offset=position - row)
                part, seen = placed.block(row, row + real, q.size(0), length)
                outputs.append(attend(q[row : row + real], keys[seen], values[seen], part))
            if real < size:
                outputs.append(q.new_zeros(size - real, q.size(1), q.size(2) * q.size(3)))
    return torch.cat(outputs)


def documents_of(packed: Any) -> list[Document]:
    """The documents of Megatron's `PackedSeqParams`, with or without padding behind each.

    Raises:
        HelixError: another format than thd, or queries and keys of different documents.
    """
    if packed.qkv_format != "thd":
        raise HelixError(
            f"packed sequences have qkv_format {packed.qkv_format}, and this attention takes thd: documents "
            "one behind the other in a row, with their borders in cu_seqlens_q."
        )
    lengths, borders = (
        _borders(packed.cu_seqlens_q, packed.cu_seqlens_kv),
        _borders(packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded),
    )
    assert lengths is not None, "thd has cu_seqlens_q"
    borders = borders or lengths
    return [
        Document(borders[i], borders[i + 1], lengths[i + 1] - lengths[i])
        for i in range(len(lengths) - 1)
        if borders[i + 1] > borders[i]
    ]


def _borders(queries: Tensor | None, keys: Tensor | None) -> list[int] | None:
    if queries is None:
        return None
    if keys is not None and keys is not queries and not torch.equal(queries, keys):
        raise HelixError(
            f"packed sequences have the borders {queries.tolist()} for queries and {keys.tolist()} for keys. "
            "In self-attention they are the same documents: give both alike."
        )
    return queries.tolist()


def _check_lengths(documents: Sequence[Document], ranks: int, rows: int) -> None:
    if documents[-1].stop != rows:
        raise HelixError(
            f"the documents end at row {documents[-1].stop}, and there are {rows} rows on the {ranks} "
            "context parallel ranks together. cu_seqlens counts the rows of all of them."
        )
    unit = 2 * ranks if ranks > 1 else 1
    for start, stop, _ in documents:
        if (stop - start) % unit:
            raise HelixError(
                f"a sequence of {stop - start} positions cannot be cut into 2 chunks for each of {ranks} "
                f"context parallel ranks. Pad it to a multiple of {unit} (packed documents: "
                "cu_seqlens_q_padded)."
            )
