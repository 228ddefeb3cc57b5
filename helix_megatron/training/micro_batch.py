"""From the samples of a micro-batch to what this rank computes: its part of each sequence, or packed documents.

A sample of `data.batches.KEYS` holds one sequence. With context parallelism a rank keeps its chunks of it. With
packed documents all samples of the micro-batch become one row, [1, rows], whose borders attention and rotary
embedding get as Megatron's `PackedSeqParams`; context parallelism pads each document there, so that every rank
holds as much of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from helix_megatron.megatron.context_parallel import Document, own_part, own_rows

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class OwnBatch:
    """What this rank computes of a micro-batch.

    tensors: by the keys of the samples, each [batch, positions]. counted: tokens of the whole micro-batch whose
    losses count, on all context-parallel ranks together.
    """

    tensors: Batch
    counted: Tensor
    packed: PackedSeqParams | None = None


def own_batch(batch: Batch, *, packs: bool, unit: int = 1) -> OwnBatch:
    """This rank's part of a micro-batch.

    Args:
        batch: whole samples, equal on all context-parallel ranks.
        packs: whether samples are documents one behind the other, each of which begins at position 0.
        unit: what the rows of a packed micro-batch must divide by on a rank: the tensor parallel size under
            sequence parallelism.
    """
    rank = parallel_state.get_context_parallel_rank()
    ranks = parallel_state.get_context_parallel_world_size()
    counted = batch["loss_mask"].sum()
    if not packs:
        own = {name: own_part(x, 1, rank, ranks) for name, x in batch.items()}
        return OwnBatch(own, counted)
    documents = documents_in(batch["position_ids"], ranks, unit)
    source: list[int] = []
    begin = 0
    for document in documents:
        # A row of padding takes any token: its loss does not count, and nobody attends to it.
        source += range(begin, begin + document.length)
        source += [begin] * (document.stop - document.start - document.length)
        begin += document.length
    rows = own_rows(documents, rank, ranks)
    device = batch["tokens"].device
    index = torch.tensor([source[row] for row in rows], device=device)
    own = {name: x.flatten()[index].unsqueeze(0) for name, x in batch.items()}
    if len(source) > begin:
        real = [row - d.start < d.length for d in documents for row in range(d.start, d.stop)]
        own["loss_mask"] = own["loss_mask"] * torch.tensor(
            [real[row] for row in rows], device=device
        )
    return OwnBatch(own, counted, packed_params(documents, device))


def documents_in(position_ids: Tensor, ranks: int, unit: int) -> list[Document]:
    """The documents of a micro-batch, [samples, S], told by where positions begin at 0.

    Each is padded to a multiple of 2c for c > 1 context-parallel ranks, and the last one further, so that rows
    divide by c·unit.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
    borders = itertools.pairwise([*starts, position_ids.numel()])
    multiple = 2 * ranks if ranks > 1 else 1
    documents, end = [], 0
    for begin, stop in borders:
        length = stop - begin
        start, end = end, end + -(-length // multiple) * multiple
        documents.append(Document(start, end, length))
    whole = multiple * unit
    last = documents[-1]
    documents[-1] = last._replace(stop=-(-last.stop // whole) * whole)
    return documents


def packed_params(documents: list[Document], device: torch.device) -> PackedSeqParams:
    """Megatron's description of a packed row; borders with padding only where there is any."""

    def borders(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=device)

    lengths = [document.length for document in documents]
    sizes = [document.stop - document.start for document in documents]
    real, padded = borders(lengths), borders(sizes) if sizes != lengths else None
    longest = max(sizes)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=real,
        cu_seqlens_kv=real,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def model_inputs(own: OwnBatch) -> dict[str, Any]:
    """Keyword arguments of `GPTModel.forward`."""
    inputs: dict[str, Any] = {
        "input_ids": own.tensors["tokens"],
        "position_ids": own.tensors["position_ids"],
        "attention_mask": None,  # attention is causal by its mask type
        "labels": own.tensors["labels"],
    }
    return inputs if own.packed is None else inputs | {"packed_seq_params": own.packed}
