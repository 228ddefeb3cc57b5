"""The core attention of the replaced layers: the host's or ours, on whole heads or behind an exchange."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.attention import choose_for
from helix_megatron.core.exchanges import EXACT, LocalInputs, WholeHeads
from helix_megatron.core.exchanges.gather_kv import kv_heads_attended
from helix_megatron.core.exchanges.segments import heads_first, sequence_first
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa, with_sinks
from helix_megatron.core.kernels.softcap import with_cap
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.masks import AttentionMask
from helix_megatron.errors import HelixError, Setting
from helix_megatron.megatron.context_parallel import (
    Attend,
    check_communication,
    documents_of,
    over_context,
)
from helix_megatron.megatron.norms import with_classes
from helix_megatron.megatron.notices import say_once
from helix_megatron.megatron.random import fork_head_group_state
from helix_megatron.megatron.support import (
    BATCH,
    FOREIGN,
    KERNEL,
    LEFT_CUT,
    PACKED,
    STOCK,
    check,
    problem,
    refusal,
)

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)

WITHOUT_EFFECT = ("name", "pp_layer_offset")
"""What Megatron may give a core attention to build it, and kernels of ours do not need."""

WHOLE_HEADS = {exchange.name for exchange in EXACT if isinstance(exchange, WholeHeads)}
CUT_HEADS = {exchange.name for exchange in EXACT} - WHOLE_HEADS
"""Exchanges after which any core attention can run, and those that only kernels of ours can use."""

CoreBuilder = Callable[..., Any]


class HelixCoreAttention(DotProductAttention):
    """Megatron's `DotProductAttention`, computed by a kernel of this package.

    It also knows context parallelism, where it gathers keys and values, and packed sequences. Unlike Megatron's
    it honours the mask type as well as a mask tensor: what either hides is hidden. The tensor has this rank's
    queries and the keys of the whole sequence; packed sequences have their borders instead. A query that sees
    no key gives zeros, where Megatron's gives the mean of all values. Scores have a soft cap where the
    configuration has `attn_logit_softcapping`.
    """

    notice = ""
    """Which kernel computes attention, and why; said once."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        kernel: AttentionKernel = sdpa,
        attention_dropout: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **newer: Any,
    ) -> None:
        _refuse_unknown(
            {name: value for name, value in newer.items() if name not in WITHOUT_EFFECT}
        )
        check_communication(cp_comm_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the constructor refuses others
        super().__init__(
            alone, layer_number, attn_mask_type, attention_type, pg_collection=pg_collection
        )
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        self.config, self.kernel = config, with_cap(kernel, self.softcap)
        if self.softcap is not None:
            self.notice = (
                "Attention is computed by Helix's own kernel, some queries at a time: it alone has soft caps "
                f"(attn_logit_softcapping = {self.softcap:g})."
            )
        if self.softmax_offset is not None:
            if kernel is not sdpa:
                raise HelixError(
                    f"softmax_type = {config.softmax_type} has sinks, which kernel {kernel} does not know. "
                    "Leave the kernel out."
                )
            if self.softcap is not None:
                raise HelixError(
                    f"softmax_type = {config.softmax_type} has sinks, which attention with soft caps "
                    "(attn_logit_softcapping) does not know. Leave out one of the two."
                )
            self.kernel = functools.partial(with_sinks, self.softmax_offset)
        # apply_query_key_layer_scaling divides by the layer number and multiplies back: nothing in fp32.
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, max(1, layer_number)
        )
        self.window = tuple(config.window_size) if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **newer: Any,
    ) -> Tensor:
        """[L, B, H, D], [S, B, G, D] twice → [L, B, H·D]; attention_mask is True where hidden.

        Without B where sequences are packed.
        """
        if attention_bias is not None:
            raise refusal("attention_bias", "a tensor", KERNEL)
        _refuse_unknown(newer)
        say_once(self.notice)
        packed = query.dim() == 3
        if packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        mask = self.mask(attention_mask, attn_mask_type)
        with self.dropout_state(False):
            output = self.over_context(query, key, value, self._attend, mask, packed_seq_params)
        return output.squeeze(1) if packed else output

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        o_BHLD = self.kernel(
            *(heads_first(tensor) for tensor in (q, k, v)),
            mask=mask,
            scale=self.softmax_scale,
            dropout=self.dropout if self.training else 0.0,
        )
        return sequence_first(o_BHLD).flatten(2)

    def over_context(
        self, q: Tensor, k: Tensor, v: Tensor, attend: Attend, mask: AttentionMask, packed: Any
    ) -> Tensor:
        """`context_parallel.over_context` in this layer's group; `packed` is Megatron's `PackedSeqParams`."""
        group, documents = self.pg_collection.cp, None
        if packed is not None:
            check(self.config, PACKED)
            group = packed.cp_group or group
            documents, mask = documents_of(packed), dataclasses.replace(mask, hidden=None)
        return over_context(q, k, v, attend, mask=mask, group=group, documents=documents)

    def mask(self, hidden: Tensor | None, mask_type: AttnMaskType | None) -> AttentionMask:
        """What the layer hides beside `hidden`."""
        mask_type = mask_type or self.attn_mask_type
        hidden = None if mask_type is AttnMaskType.no_mask else hidden
        return AttentionMask(causal=mask_type in CAUSAL, window=self.window, hidden=hidden)

    def dropout_state(self, shared: bool) -> AbstractContextManager[Any]:
        """Enters the random state for dropout, see `LocalInputs`."""
        if not self.training or not self.dropout:
            return nullcontext()
        if shared:
            return fork_head_group_state()
        # With sequence parallelism the whole block runs in this rank's own state already.
        return nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()


class ExchangedCore:
    """Mixed into a core attention, which then computes on the whole heads that an exchange gives it.

    Being of a subclass of its class, it keeps the names of its parameters, and what Megatron looks up in it.
    """

    head_layout: HeadLayout
    head_group: ProcessGroup
    exchange: str
    allowed: Container[str] | None
    own_kernels: HelixCoreAttention
    """For exchanges that leave heads cut; a core attention of ours is its own."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **newer: Any,
    ) -> Tensor:
        """[L, B, h/n, d/m], [S, B, g/n, d/m] twice → [L, B, h·d/p]; without B where sequences are packed."""
        ours: Any = getattr(self, "own_kernels", self)
        packed = query.dim() == 3
        if packed:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))

        def inputs(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> LocalInputs:
            return LocalInputs(
                q=q,
                k=k,
                v=v,
                layout=self.head_layout,
                group=self.head_group,
                segment=self.head_group.rank(),
                mask=mask,
                scale=ours.softmax_scale,
                kernel=ours.kernel,
                dropout=ours.dropout if ours.training else 0.0,
                dropout_state=ours.dropout_state,
                softcap=ours.softcap,
            )

        mask = ours.mask(attention_mask, attn_mask_type)
        x = inputs(query, key, value, mask)
        allowed = self.allowed if attention_bias is None else WHOLE_HEADS
        exchange = choose_for(x, self.exchange, allowed)
        if not isinstance(exchange, WholeHeads):

            def exchanged(*part: Any) -> Tensor:
                own = inputs(*part)
                return choose_for(own, self.exchange, allowed).run(own).flatten(2)

            output = ours.over_context(query, key, value, exchanged, mask, packed_seq_params)
            return output.squeeze(1) if packed else output
        heads: tuple[Tensor, ...] = exchange.enter(x)
        if ours is not self:  # kernels of ours take views
            heads = tuple(tensor.contiguous() for tensor in heads)
        output = super().forward(  # type: ignore[misc]
            *(tensor.squeeze(1) if packed else tensor for tensor in heads),
            exchange.own(attention_mask, x),
            attn_mask_type=attn_mask_type,
            attention_bias=exchange.own(attention_bias, x),
            packed_seq_params=packed_seq_params,
            **newer,
        )
        return exchange.leave(output.reshape(*heads[0].shape[:3], -1), x).flatten(2)


def build_exchanged(
    *,
    build: CoreBuilder,
    layout: HeadLayout,
    group: ProcessGroup,
    kernel: AttentionKernel | None,
    config: Any,
    **arguments: Any,
) -> Any:
    """A core attention on segments of queries, keys and values.

    Args:
        build: makes the core attention on whole heads that the layer spec names.
        config: counts h·m query and g·m key-value heads, h/n and g/n of them on each rank.
        arguments: what Megatron gives a core attention.
    """
    exchange = config.helix.exchange
    inner = copy.copy(config)
    inner.kv_channels = layout.head_dim
    if exchange == "all-to-all-heads":
        inner.num_attention_heads = layout.num_heads
        inner.num_query_groups = kv_heads_attended(layout) * layout.num_ranks
    of_ours = functools.partial(HelixCoreAttention, kernel=kernel or sdpa)
    if exchange not in CUT_HEADS:
        build = choose_core(build, config, kernel)
    elif config.helix.kernel == "host":
        raise HelixError(
            f"exchange {exchange} leaves heads cut, and kernel host computes on whole ones.",
            setting="kernel",
            value="host",
            remedy=("Try ", Setting("kernel", "auto"), " or ", Setting("exchange", "auto"), "."),
        )
    else:
        check(config, KERNEL)
        check(config, LEFT_CUT)
        build = of_ours
    core = build(config=inner, **arguments)
    core.__class__ = type(type(core).__name__, (ExchangedCore, type(core)), {})
    core.head_layout, core.head_group, core.exchange = layout, group, exchange
    core.allowed = None
    ours = isinstance(core, HelixCoreAttention)
    if not ours:
        plain = copy.copy(inner)
        plain.softmax_type = "vanilla"  # without parameters
        core.own_kernels = of_ours(config=plain, **arguments | {"cp_comm_type": None})
    if not ours or core.softmax_offset is not None:
        # The heads of a host's core attention, and sinks, are counted when it is built.
        core.allowed = {exchange if exchange in WHOLE_HEADS else "all-to-all-batch"}
        if problem(config, KERNEL) is None and problem(config, LEFT_CUT) is None:
            core.allowed |= CUT_HEADS
        if "all-to-all-batch" in core.allowed:
            check(config, BATCH)
    return core


def context_spec(spec: Any) -> Any:
    """A layer, block or stack spec with our core attention in place of Megatron's own `DotProductAttention`.

    For stock layers with context parallelism, packed sequences or soft caps, without Transformer Engine.
    """
    return with_classes(spec, {DotProductAttention: HelixCoreAttention})


def choose_core(build: CoreBuilder, config: Any, kernel: AttentionKernel | None) -> CoreBuilder:
    """The core attention on whole heads: what the layer spec names, or ours. Its `notice` says which, and why.

    Args:
        build: what the spec names.
        config: of the layer, with a `helix` field.
        kernel: what ours calls instead of `sdpa`; the user has chosen ours by giving it.

    Raises:
        HelixError: ours was asked for, and something else that it cannot do.
    """
    module = get_module(build) if isinstance(build, ModuleSpec) else build
    backend = getattr(config, "attention_backend", None)
    wish = config.helix.kernel if kernel is None else "sdpa"
    cannot, uncapped = problem(config, KERNEL), problem(config, FOREIGN)
    ours = wish == "sdpa"
    if wish != "auto":
        why = f"kernel {wish} was asked for"
    elif uncapped:
        ours, why = True, f"{uncapped.setting} = {uncapped.value} needs it"
    elif module is not DotProductAttention:
        why = "the layer spec names it"
    elif config.context_parallel_size > 1:
        ours, why = True, "Megatron's unfused attention has no context parallelism"
    elif backend in (AttnBackend.unfused, AttnBackend.local):
        why = f"attention_backend is {backend.name}"
    elif cannot:
        why = f"{cannot.setting} = {cannot.value} needs it"
    else:
        ours, why = True, "it is faster than Megatron's unfused attention"
    if error := cannot if ours else uncapped:
        raise error
    ours_is = "torch's scaled_dot_product_attention" if kernel is None else kernel
    name = ours_is if ours else getattr(module, "__name__", module)

    if ours:
        build = functools.partial(HelixCoreAttention, kernel=kernel or sdpa)

    def build_core(**arguments: Any) -> Any:
        core = build(**arguments)
        core.notice = getattr(core, "notice", "") or f"Attention is computed by {name}: {why}."
        return core

    return build_core


def _refuse_unknown(given: dict[str, Any]) -> None:
    """What a later Megatron gives its core attention must not be dropped in silence."""
    for name, value in given.items():
        if value is not None:
            raise HelixError(
                f"Megatron gave its core attention {name} = {value!r}, which exact Helix attention does not "
                "know.",
                remedy=("Leave it at None", *STOCK),
            )
