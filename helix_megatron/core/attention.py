"""Exact attention over the segments that the ranks of a head group hold.

    o = softmax(scale · Q Kᵀ, masked) V

for ordinary multi-head, grouped-query and multi-query attention, where this rank holds one segment of the
group's keys and values, and either one segment of its queries or some of its query heads whole (`HeadLayout`).
Forward and backward equal attention on one rank up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.exchanges import AttentionShape, Exchange, LocalInputs, choose
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.kernels.softcap import with_cap
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.masks import AttentionMask
from helix_megatron.errors import HelixError
from helix_megatron.hardware import GPU, MACHINES


def partitioned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: HeadLayout,
    group: ProcessGroup,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    exchange: str = "auto",
    dropout: float = 0.0,
    dropout_state: Callable[[bool], AbstractContextManager[object]] = lambda shared: nullcontext(),
    kernel: AttentionKernel = sdpa,
    softcap: float | None = None,
) -> Tensor:
    """This rank's part of exact attention.

    Args:
        q: [L, B, h/n, d/m] with `layout.query_layout == "segments"`, [L, B, h/p, d] with `"heads"`.
        k, v: [S, B, g/n, d/m].
        layout: whose partition (i, j) this rank is; j is its rank in `group`.
        group: the m ranks of this head group, in order of j.
        mask: a `hidden` pattern may have a dimension of heads: those of the head group.
        scale: of the scores; 1/√d when None.
        exchange: `auto` or a name of `HelixConfig.exchange`. All ranks of the group must ask alike.
        dropout: probability of dropping an attention weight.
        dropout_state: enters the random state for dropout, see `LocalInputs`.
        softcap: makes softcap · tanh(score / softcap) of each score; with the default kernel only.

    Returns:
        [L, B, h·d/p]: the columns of `layout.proj_columns`, in their order.

    Raises:
        HelixError: shapes that are not the layout's, or an exchange that does not fit.
    """
    _check_shapes(q, k, v, layout, group)
    inputs = LocalInputs(
        q=q,
        k=k,
        v=v,
        layout=layout,
        group=group,
        segment=group.rank(),
        mask=mask or AttentionMask(),
        scale=layout.head_dim**-0.5 if scale is None else scale,
        kernel=with_cap(kernel, softcap),
        dropout=dropout,
        dropout_state=dropout_state,
        softcap=softcap,
    )
    return choose_for(inputs, exchange).run(inputs).flatten(2)


def choose_for(
    inputs: LocalInputs, exchange: str, allowed: Container[str] | None = None
) -> Exchange:
    """The exchange called so, or the cheapest that fits (`auto`), see `exchanges.choose`."""
    x = inputs
    shape = AttentionShape(
        layout=x.layout,
        batch=x.q.size(1),
        query_length=x.q.size(0),
        key_length=x.k.size(0),
        element_size=x.q.element_size(),
        causal=x.mask.causal,
        window=x.mask.window,
    )
    return choose(shape, exchange, MACHINES.get(x.q.device.type, GPU), allowed)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, group: ProcessGroup) -> None:
    if group.size() != layout.segments:
        raise HelixError(
            f"the process group has {group.size()} ranks and a head is cut into {layout.segments} segments. "
            "Pass the intra-head parallel group."
        )
    batch = q.shape[1:2]
    wanted = {
        "q": (*q.shape[:1], *batch, *layout.rank_query_shape),
        "k": (*k.shape[:1], *batch, layout.group_kv_heads, layout.segment_dim),
        "v": (*k.shape[:1], *batch, layout.group_kv_heads, layout.segment_dim),
    }
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tuple(tensor.shape) != wanted[name]:
            raise HelixError(
                f"{name} has shape {tuple(tensor.shape)}; this layout needs {wanted[name]} "
                "(sequence, batch, heads, dimensions)."
            )
