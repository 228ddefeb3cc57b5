"""Attention of a sharded model, in the library's own interface.

`helix` is registered as an attention function and a mask function of `transformers`. The attention module's
forward pass is replaced as well, since queries and keys are cut differently where query heads stay whole, and
the library's own forward rotates both alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from helix_megatron.core.attention import partitioned_attention
from helix_megatron.core.masks import AttentionMask
from helix_megatron.core.replicated import to_ranks
from helix_megatron.errors import HelixError
from helix_megatron.huggingface import layers
from helix_megatron.huggingface.layers import Partitioned
from helix_megatron.huggingface.plan import NO_PROBABILITIES
from helix_megatron.huggingface.sharding import Sharding

NAME = "helix"

# What models of other families pass to attention functions, and what changes the result there. Other keywords
# are accepted: new releases of the library pass new ones, most of them for other implementations.
CHANGES_SCORES = ("softcap", "position_bias", "s_aux", "sinks", "indices", "block_indices")


class PartitionedAttention(Partitioned):
    """Rotary self-attention with grouped queries, optional head norms and the library's caches.

    Caches are given this rank's segments of keys and values, [B, g/n, S, d/m]; no head is stored twice.
    """

    config: Any
    layer_idx: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the library's own: hidden_states [B, L, D] → ([B, L, D], None), replicated.

        position_embeddings: cosine and sine [B or 1, L, d] of whole heads.
        kwargs: a cache under whatever name (`past_key_values`, `cache`), and what the library passes to
            attention functions.

        Raises:
            HelixError: the model's attention implementation was changed after sharding, or something was
                passed that does not work with cut heads.
        """
        self._check_implementation()
        cache, kwargs = _without_cache(kwargs)
        sharding, layout = self.sharding, self.sharding.plan.layout
        x = to_ranks(hidden_states, sharding.tensor_group, purpose="tensor/attention")
        kv_shape = (layout.group_kv_heads, layout.segment_dim)
        q = self.q_proj(x).unflatten(-1, layout.rank_query_shape)
        k = self.k_proj(x).unflatten(-1, kv_shape)
        v = self.v_proj(x).unflatten(-1, kv_shape)
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)

        assert position_embeddings is not None  # `shard` looked at the names
        columns = sharding.segment_index(x.device)
        cut_tables = [table.unsqueeze(2)[..., columns] for table in position_embeddings]
        q, k = _rotate(q, *cut_tables), _rotate(k, *cut_tables)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            # The static caches of transformers 5.2 write where they are told to, and else at the beginning.
            places = [{name: kwargs[name]} for name in ("cache_position",) if name in kwargs]
            k, v = cache.update(k, v, self.layer_idx, *places)

        output, _ = helix_attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), None

    def _check_implementation(self) -> None:
        asked = self.config._attn_implementation
        if asked != NAME:
            raise HelixError(
                f"attention implementation {asked!r} was set on a sharded model, whose ranks hold segments of "
                f"heads. Valid: {NAME}. Call model.set_attn_implementation({NAME!r})."
            )


def helix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    output_attentions: bool = False,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered as `helix`.

    Args:
        module: an attention module of a sharded model.
        query: [B, h/n, L, d/m], or [B, h/p, L, d] of whole heads.
        key, value: [B, g/n, S, d/m].
        attention_mask: [B or 1, 1, L, S], True (or 0.0) where a key is seen; None is causality alone.

    Returns:
        ([B, L, heads, dimensions], None), in the shape of the queries; no probabilities.

    Raises:
        HelixError: the module is not sharded, or something is asked for that does not work with cut heads.
    """
    sharding = getattr(module, "sharding", None)
    if sharding is None:
        raise HelixError(
            f"attention implementation {NAME!r} works on sharded models only, and this "
            f"{type(module).__name__} is not. Call helix_megatron.huggingface.shard(model, ...) or set another."
        )
    if output_attentions:
        raise HelixError(NO_PROBABILITIES)
    for name, given in unused.items():
        if given is not None and (name in CHANGES_SCORES or _stores_keys(given)):
            raise HelixError(
                f"{name}, a {type(given).__name__}, does not work with Helix attention, which has plain scores "
                f"and the library's own caches (transformers.Cache). Leave {name} at None."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, keys = query.size(2), key.size(2)
    if attention_mask is not None:
        mask = AttentionMask(hidden=_hidden(attention_mask[..., :keys]))
    else:
        # The library leaves the mask out where it would show a single query every key, and for whole
        # sequences; a static cache is then longer than what it holds.
        mask = AttentionMask(causal=causal and queries > 1)
        if mask.causal and keys > queries:
            key, value = key[:, :, :queries], value[:, :, :queries]
    output_LBX = partitioned_attention(
        *(t.permute(2, 0, 1, 3) for t in (query, key, value)),
        layout=sharding.plan.layout,
        group=sharding.intra_head_group,
        mask=mask,
        scale=scaling,
        exchange=sharding.plan.helix.exchange,
        dropout=dropout,
        dropout_state=dropout_state(sharding, query.device, dropout),
        kernel=sharding.kernel,
    )
    return output_LBX.transpose(0, 1).unflatten(-1, sharding.plan.layout.rank_query_shape), None


def replace_attention(module: Any, sharding: Sharding) -> None:
    """Give an attention module this rank's segments of heads, before its parameters are cut."""
    for name in ("q_norm", "k_norm"):
        if getattr(module, name, None) is not None:
            layers.replace(getattr(module, name), layers.PartitionedHeadNorm, sharding=sharding)
    layers.replace(module.o_proj, layers.RowParallelLinear, sharding=sharding)
    layers.replace(module, PartitionedAttention, sharding=sharding)


def register() -> None:
    """Make `helix` an attention implementation of `transformers`. Again is the same as once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, helix_attention)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def _without_cache(kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the library's cache among keywords or None, the other keywords): releases give it different names."""
    from transformers import Cache

    rest = {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}
    return next((kwargs[name] for name in kwargs if name not in rest), None), rest


def _stores_keys(value: object) -> bool:
    """Whether something is a cache of another kind, whose keys would be left out in silence."""
    return hasattr(value, "update") and not isinstance(value, (Mapping, Set))


def _rotate(x_BLHD: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of pairs (k, k + half); half a segment is its part of each half of the head."""
    first, second = x_BLHD.chunk(2, dim=-1)
    return x_BLHD * cosine + torch.cat([-second, first], dim=-1) * sine


def _hidden(mask: Tensor) -> Tensor:
    """True where a key is hidden, from the library's boolean mask or a caller's additive one."""
    if mask.dtype == torch.bool:
        return ~mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool(((mask != 0) & ~hidden).any()):
        raise HelixError(
            "the attention mask adds values to scores; Helix attention takes a mask that hides or shows. "
            f"Valid values: 0, {torch.finfo(mask.dtype).min:.4g}, -inf. Or pass a boolean mask."
        )
    return hidden


# ---------------------------------------------------------------------------- dropout


def dropout_state(
    sharding: Sharding, device: torch.device, dropout: float
) -> Callable[[bool], AbstractContextManager[object]]:
    """Enters the random state for dropout of attention weights, see `LocalInputs.dropout_state`.

    Each state comes from a number that the default generator gives, so that gradient checkpointing, which
    restores that generator, recomputes with the same one. Rank 0 of the head group tells it to the others.
    """

    @contextmanager
    def state(shared: bool) -> Iterator[None]:
        if not dropout:
            yield
            return
        group = sharding.intra_head_group
        drawn = torch.randint(2**62, (1,), device=device)
        if group.size() > 1:
            dist.broadcast(drawn, group=group, group_src=0)
        tensor_rank = sharding.tensor_group.rank()
        holder = tensor_rank // group.size() if shared else tensor_rank
        seed = hashlib.blake2b(f"{int(drawn)} {shared} {holder}".encode(), digest_size=7)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int.from_bytes(seed.digest(), "big"))
            yield

    return state
