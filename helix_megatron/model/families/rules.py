"""From the tensors of a Hugging Face checkpoint to those of a canonical one, and back.

One `Rule` per canonical tensor, so that a conversion holds one of them at a time. Where a source stacks all
experts of a layer, many rules share it, and each names its expert's place there. Every transform is a
permutation of elements: going there and back gives the same bits in every dtype.

Letters, as in `helix_megatron.core.layout`: h query heads, g key-value heads, r = h/g, d dimensions of a head,
D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from helix_megatron.errors import HelixError, listed

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


class Transform(Protocol):
    """How the tensors of a rule become one, and one becomes them."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the canonical tensor."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The canonical tensor."""

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """Its inverse."""


@dataclass(frozen=True)
class Rule:
    """How one canonical tensor is made of Hugging Face tensors.

    Args:
        name: canonical name, such as `decoder.layers.3.self_attention.linear_qkv.weight`.
        sources: names of the Hugging Face tensors.
        shapes: their shapes.
        transform: what joins them.
        place: which of the experts on the first axis of its sources the tensor is of; None where the sources
            are its own.
    """

    name: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: Transform
    place: int | None = None

    @property
    def own_shapes(self) -> tuple[Shape, ...]:
        """Of what the canonical tensor has of each source."""
        return self.shapes if self.place is None else tuple(shape[1:] for shape in self.shapes)

    @property
    def shape(self) -> Shape:
        """Of the canonical tensor."""
        return self.transform.shape(self.own_shapes)

    def to_canonical(self, tensors: Sequence[Tensor]) -> Tensor:
        """The canonical tensor, of the dtype of its sources.

        Args:
            tensors: the sources, each of its shape in `own_shapes`.

        Raises:
            HelixError: a source has another shape than the configuration says, or another dtype than its
                neighbours.
        """
        for source, expected, tensor in zip(self.sources, self.own_shapes, tensors, strict=True):
            _check_shape(source, expected, tensor)
            if tensor.dtype != tensors[0].dtype:
                raise HelixError(
                    f"tensor {source} is {tensor.dtype} and {self.sources[0]} is {tensors[0].dtype}, but "
                    f"both become parts of {self.name}. Store them in one dtype."
                )
        return self.transform.join(tensors)

    def from_canonical(self, tensor: Tensor) -> list[Tensor]:
        """What the sources have of it, contiguous; the inverse of `to_canonical`, bit for bit.

        Raises:
            HelixError: the tensor has another shape than the model flags say.
        """
        _check_shape(self.name, self.shape, tensor)
        return [part.contiguous() for part in self.transform.split(tensor, self.own_shapes)]


def canonical_tensor(rule: Rule, read: Callable[[str, int | None], Tensor]) -> Tensor:
    """A canonical tensor; `read` gives a source by name, or one expert of a source that stacks them."""
    return rule.to_canonical([read(source, rule.place) for source in rule.sources])


def rules_by_source(rules: Iterable[Rule]) -> dict[str, list[Rule]]:
    """The rules that make each source: one, or those of all experts or parts that it has, in their order."""
    table: dict[str, list[Rule]] = {}
    for rule in rules:
        for source in rule.sources:
            table.setdefault(source, []).append(rule)
    return table


def source_tensors(rules: Sequence[Rule], read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The sources that one entry of `rules_by_source` makes, by name; `read` gives a canonical tensor."""
    parts = [rule.from_canonical(read(rule.name)) for rule in rules]
    import torch

    if isinstance(rules[0].transform, Part):
        blocks = torch.cat([part for (part,) in parts], 1)
        return {rules[0].sources[0]: blocks.flatten(0, 1)}
    if rules[0].place is None:
        return dict(zip(rules[0].sources, parts[0], strict=True))
    stacked = (torch.stack(experts) for experts in zip(*parts, strict=True))
    return dict(zip(rules[0].sources, stacked, strict=True))


class Same:
    """One source, as it is."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor]


class Copies:
    """Several names of one tensor, as of tied embeddings."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        for name, tensor in zip(self.names, tensors, strict=True):
            if not tensor.equal(tensors[0]):
                raise HelixError(
                    f"tensor {name} differs from {self.names[0]}, but config.json says that they are tied "
                    "(tie_word_embeddings). Set it to false if they are not."
                )
        return tensors[0]

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        # Copies: a file format may refuse, or write only once, tensors that share their memory.
        return [tensor, *(tensor.clone() for _ in shapes[1:])]


class Transposed:
    """One matrix that the source stores as [in, out] (GPT-2's Conv1D) and Megatron as [out, in]."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0][1], shapes[0][0]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].t().contiguous()

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.t()]


class Stacked:
    """Rows of all sources, one after another: [gate; up]."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(tensors))

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(tensor.split([shape[0] for shape in shapes]))


@dataclass(frozen=True)
class Part:
    """The rows from `start` to `stop` of each of `blocks` equal blocks of a source.

    The rules of all parts of a source follow each other, in the order of these rows.
    """

    blocks: int
    start: int
    stop: int

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.blocks * (self.stop - self.start), *shapes[0][1:]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        blocks = tensors[0].unflatten(0, (self.blocks, -1))
        return blocks[:, self.start : self.stop].flatten(0, 1)

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [tensor.unflatten(0, (self.blocks, -1))]


@dataclass(frozen=True)
class QueryKeyValue:
    """Queries [h·d, ..], keys and values [g·d, ..] → rows of `linear_qkv` [g, r queries | key | value, d].

    Weights and biases alike. Hugging Face's Llama-like models pair rotated dimensions k and k + d/2, as
    Megatron does by default, so no dimension moves inside a head. With an output gate each query head has that
    of its gate behind it in the source, [h, query | gate, d], and in `linear_qkv` the gates follow all queries
    of their group, [g, r queries | r gates | key | value, d].
    """

    kv_heads: int
    head_dim: int
    gated: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        rest = tensors[0].shape[1:]
        heads = [part.reshape(self.kv_heads, -1, self.head_dim, *rest) for part in tensors]
        if self.gated:
            heads[0] = torch.cat([heads[0][:, 0::2], heads[0][:, 1::2]], 1)
        return torch.cat(heads, 1).reshape(-1, *rest)

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        rest = tensor.shape[1:]
        blocks = tensor.reshape(self.kv_heads, -1, self.head_dim, *rest)
        parts = list(blocks.split([blocks.shape[1] - 2, 1, 1], 1))
        if self.gated:
            import torch

            parts[0] = torch.stack(parts[0].chunk(2, 1), 2).flatten(1, 2)
        return [part.reshape(-1, *rest) for part in parts]


class Interleaved:
    """One matrix [in, 2·out] whose columns are of gate and up in turn, or such a bias → [gate; up]."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(reversed(shapes[0]))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        rows = _rows_first(tensors[0])
        return torch.cat([rows[0::2], rows[1::2]])

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        import torch

        return [_rows_first(torch.stack(tensor.chunk(2), 1).flatten(0, 1))]


@dataclass(frozen=True)
class FusedQueryKeyValue:
    """One matrix, or bias, of all queries [h·d], all keys [g·d], all values [g·d] → as `QueryKeyValue`.

    Its rows are these, or its columns where it is `transposed`, as GPT-2's Conv1D is.
    """

    heads: QueryKeyValue
    transposed: bool = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        return tuple(reversed(shapes[0])) if self.transposed else shapes[0]

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        rows = _rows_first(tensors[0]) if self.transposed else tensors[0]
        keys = self.heads.kv_heads * self.heads.head_dim
        return self.heads.join(rows.split([len(rows) - 2 * keys, keys, keys]))

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        import torch

        rows = torch.cat(self.heads.split(tensor, shapes))
        return [_rows_first(rows) if self.transposed else rows]


def _rows_first(tensor: Tensor) -> Tensor:
    return tensor.t() if tensor.dim() == 2 else tensor


def _check_shape(name: str, expected: Shape, tensor: Tensor) -> None:
    if tuple(tensor.shape) != expected:
        raise HelixError(
            f"tensor {name} has shape [{listed(tensor.shape)}], and the configuration makes it "
            f"[{listed(expected)}]. The configuration is another model's, or the file is damaged."
        )
