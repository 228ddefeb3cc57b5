"""What a query may attend to, as a description that can be sliced before it becomes a tensor."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Window = tuple[int, int] | None


FAR = 1 << 30  # beyond every position


def visible_range(query: Any, *, causal: bool, window: Window) -> tuple[Any, Any]:
    """The first and the last position that a query sees, whether there are keys or not.

    Args:
        query: its position: a number, or an array or tensor of several.
        causal: whether no key after the query is seen.
        window: (left, right), Megatron's `window_size`: at most `left` keys before the query and `right` after
            it; -1 is unlimited.
    """
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right
    return query - (left if left >= 0 else FAR), query + (right if right >= 0 else FAR)


def shown(query: Any, key: Any, *, causal: bool, window: Window) -> Any:
    """Whether queries see keys, by their positions: booleans in the shape to which both broadcast."""
    first, last = visible_range(query, causal=causal, window=window)
    return (key >= first) & (key <= last)


@dataclass(frozen=True)
class AttentionMask:
    """The keys that each query sees: the conjunction of what is given.

    causal: no key after the query.
    window: as in `visible_range`.
    hidden: bool, True where a key is hidden, broadcastable to [batch, heads, queries, keys]: padding or
        any other pattern.
    offset: position among the keys of the first query. None aligns the last query with the last key, as
        is right for cached keys.
    """

    causal: bool = False
    window: Window = None
    hidden: Tensor | None = None
    offset: int | None = None

    def first_position(self, queries: int, keys: int) -> int:
        """Position among the keys of the first of `queries` queries."""
        return keys - queries if self.offset is None else self.offset

    def is_plain_causal(self, queries: int, keys: int) -> bool:
        """Whether this is causality alone, with the last query at the last key."""
        aligned = self.first_position(queries, keys) == keys - queries
        return self.causal and aligned and self.window is None and self.hidden is None

    def hides_nothing(self, queries: int, keys: int) -> bool:
        """Whether every query sees every key."""
        sees_all = not self.causal or self.first_position(queries, keys) >= keys - 1
        return sees_all and self.window is None and self.hidden is None

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """bool [.., queries, keys], broadcastable to [batch, heads, queries, keys]."""
        import torch

        first = self.first_position(queries, keys)
        query = torch.arange(first, first + queries, device=device).unsqueeze(1)
        key = torch.arange(keys, device=device)
        seen = shown(query, key, causal=self.causal, window=self.window)
        return seen if self.hidden is None else seen & ~self.hidden

    # ------------------------------------------------------------------ slices

    def block(self, start: int, stop: int, queries: int, keys: int) -> tuple[AttentionMask, slice]:
        """The mask of queries [start, stop), and the range of keys that any of them may see."""
        first = self.first_position(queries, keys)
        low, _ = visible_range(first + start, causal=self.causal, window=self.window)
        _, high = visible_range(first + stop - 1, causal=self.causal, window=self.window)
        key_start, key_stop = min(max(0, low), keys), min(keys, high + 1)
        key_stop = max(key_start, key_stop)  # empty where all keys lie behind or ahead
        part = self._select(-2, start, stop)._select(-1, key_start, key_stop)
        block = dataclasses.replace(part, offset=first + start - key_start)
        return block, slice(key_start, key_stop)

    def _select(self, dim: int, start: int, stop: int) -> AttentionMask:
        hidden = self.hidden
        if hidden is None:
            return self
        hidden = hidden[(None,) * (4 - hidden.dim())]
        if hidden.size(dim) > 1:
            hidden = hidden.narrow(dim, start, stop - start)
        return dataclasses.replace(self, hidden=hidden)


def masked_softmax(scores_BHLS: Tensor, mask: AttentionMask) -> Tensor:
    """Softmax over the visible keys; zeros for a query that sees none."""
    queries, keys = scores_BHLS.shape[-2:]
    if mask.hides_nothing(queries, keys):
        return scores_BHLS.softmax(-1)
    visible = mask.visible(queries, keys, scores_BHLS.device)
    blind = ~visible.any(-1, keepdim=True)
    # A finite score in blind rows keeps NaN out of their gradient.
    scores_BHLS = scores_BHLS.masked_fill(~(visible | blind), float("-inf"))
    return scores_BHLS.softmax(-1).masked_fill(blind, 0.0)
