"""Attention of a `transformers` model in a step of the engine, in the library's own interface.

The model's own code projects, normalises, rotates and projects back. What it asks of an attention function is
answered from pages: `helix_paged` is registered as an attention function, and as a mask function that says
which window a layer has, since in a step the tokens of many sequences lie one after the other.

Latent attention (DeepSeek's, and that of others with `kv_b_proj` and `expand_kv`) is computed in absorbed form,
which is multi-query attention: the one key is the latent beside the rotated dimensions, its value the latent.

    q · (W_K c) = (W_Kᵀ q) · c        Σ p (W_V c) = W_V Σ p c        (DeepSeek-V2, arXiv 2405.04434, 2.1.2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.caches.attention import Scores, StepAttention
from helix_megatron.core.caches.paged import KeptHeads, Window
from helix_megatron.core.collectives import gather
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.attention import CHANGES_SCORES

NAME = "helix_paged"
KNOWN = ("softcap", "s_aux")  # of what changes scores
INSTEAD = "Generate with the library itself: helix_megatron.huggingface.from_pretrained, then model.generate."


@dataclass(frozen=True)
class StepMask:
    """In the place of a mask: which keys a layer's queries see, by positions."""

    window: Window


@dataclass(frozen=True, eq=False)
class Asked:
    """What a layer asked its attention function for.

    Args:
        heads: key-value heads of the head group; key_dim, value_dim: dimensions of a key and of a value.
        latent: whether the value is a part of the key.
        scores: of the layer.
    """

    heads: int
    key_dim: int
    value_dim: int
    latent: bool
    scores: Scores

    def kept(self, pages: int, kind: int) -> KeptHeads:
        """What a rank keeps of the layer."""
        return KeptHeads(pages, self.heads, self.key_dim, self.value_dim, self.latent, kind)


class Layer:
    """One attention module's place in the engine. Until `attention` is there it only notes what is asked for.

    Args:
        module: of the model, cut or whole.
        head_group: the ranks that share the layer's key-value heads.
    """

    def __init__(self, module: Any, head_group: ProcessGroup) -> None:
        self.module, self.head_group = module, head_group
        self.latent = hasattr(module, "kv_b_proj")
        self.asked: Asked | None = None
        self.noted_key: Tensor | None = None  # which tells layers that attend to another's keys
        self.index = 0
        self.attention: StepAttention | None = None
        self.positions: Tensor | None = None  # of a step's tokens, in their sequences
        self.tuned = getattr(module, "attn_temperature_tuning", False) and not module.use_rope
        if self.tuned:
            module.attn_temperature_tuning = False  # it would count the tokens of a step
        if self.latent:
            if not hasattr(module, "expand_kv"):
                raise HelixError(
                    f"{type(module).__name__} of this release of transformers does not keep latents. Try "
                    "pip install 'transformers>=5.24'."
                )
            module.expand_kv = _latent_key

    def __call__(
        self, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, mask: Any, **asked: Any
    ) -> Tensor:
        """[1, H, T, D], [1, u, T, D], [1, u, T, E] → [1, T, H, E]."""
        if self.asked is None:
            self.noted_key = k_BGLD
        if self.tuned:
            q_BHLD = (q_BHLD * self._temperatures).to(q_BHLD.dtype)
        if self.latent:
            q_BHLD = self._absorbed(q_BHLD)
        elif heads := getattr(self.module, "heads", None):
            k_BGLD, v_BGLE = heads.all_heads(k_BGLD), heads.all_heads(v_BGLE)
        if self.asked is None:
            self.asked = self._note(q_BHLD, k_BGLD, v_BGLE, mask, **asked)
        if self.attention is None:
            o_THE = q_BHLD.new_zeros(q_BHLD.size(2), q_BHLD.size(1), v_BGLE.size(-1))
        else:
            q, k, v = (x[0].transpose(0, 1) for x in (q_BHLD, k_BGLD, v_BGLE))
            o_THE = self.attention.attend(self.index, q, k, v, self.asked.scores)
        return (self._expanded(o_THE) if self.latent else o_THE).unsqueeze(0)

    def _note(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        *,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Asked:
        name = type(self.module).__name__
        if not isinstance(mask, StepMask):
            raise HelixError(
                f"{name} was given a mask of its own ({type(mask).__name__}), and the engine knows causality "
                f"and windows only. {INSTEAD}"
            )
        if sinks is not None:
            sinks = gather(sinks.detach().flatten(), self.head_group, purpose="load").flatten()
        scale = q.size(-1) ** -0.5 if scaling is None else scaling
        scores = Scores(scale, mask.window, softcap or None, sinks)
        return Asked(k.size(1), k.size(-1), v.size(-1), self.latent, scores)

    @property
    def _temperatures(self) -> Tensor:
        """Llama 4's factor of each query without rotary embedding, [T, 1], fp32 (arXiv 2501.19399)."""
        assert self.positions is not None, "a model sets them before it runs"
        steps = ((self.positions.float() + 1) / self.module.floor_scale).floor()
        return (1 + self.module.attn_scale * steps.log1p()).unsqueeze(1)

    def _absorbed(self, q_BHLD: Tensor) -> Tensor:
        """Queries of whole keys → queries of latents, [1, H, T, rank + rotated]."""
        module = self.module
        q_plain, q_rotated = q_BHLD.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
        w_HNR = self._expansion[:, : module.qk_nope_head_dim]
        return torch.cat([torch.einsum("bhln,hnr->bhlr", q_plain, w_HNR), q_rotated], dim=-1)

    def _expanded(self, o_THR: Tensor) -> Tensor:
        """Sums of latents → sums of values, [T, H, E]."""
        w_HER = self._expansion[:, self.module.qk_nope_head_dim :]
        return torch.einsum("thr,her->the", o_THR, w_HER)

    @property
    def _expansion(self) -> Tensor:
        """Rows of this rank's heads that expand a latent, [H, keys + values, rank]."""
        module = self.module
        rows = module.qk_nope_head_dim + module.v_head_dim
        return module.kv_b_proj.weight.unflatten(0, (-1, rows))


def _latent_key(latent_B1LR: Tensor, rotated_B1LD: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of `expand_kv`: the one key and the one value of absorbed attention."""
    return torch.cat([latent_B1LR, rotated_B1LD], dim=-1), latent_B1LR


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered as `helix_paged`. See the library's for its arguments.

    Raises:
        HelixError: the module is not of an engine, or it asks for what the engine does not know.
    """
    layer = getattr(module, "step_layer", None)
    if layer is None:
        raise HelixError(
            f"attention implementation {NAME!r} is for models of the engine, and this {type(module).__name__} "
            "is of none. Choose another with model.set_attn_implementation."
        )
    for name, given in unused.items():
        if given is not None and name in CHANGES_SCORES and name not in KNOWN:
            raise HelixError(
                f"{type(module).__name__} asks its attention for {name}, which the engine does not know. "
                f"{INSTEAD}"
            )
    if is_causal is False:
        raise HelixError(f"{type(module).__name__} is not causal, and the engine's attention is.")
    output = layer(query, key, value, attention_mask, scaling=scaling, softcap=softcap, sinks=s_aux)
    return output, None


def step_mask(
    *args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> Any:
    """The mask function that is registered as `helix_paged`: causality, within a window where there is one.

    Args:
        local_size: keys that a query sees, itself included.
        use_vmap: the library's sign that the model has added a pattern of its own.
    """
    if use_vmap:
        return None  # refused by the layer, which knows its name
    return StepMask(None if local_size is None else (local_size - 1, 0))


def register() -> None:
    """Make `helix_paged` an attention implementation of `transformers`. Again is the same as once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, step_mask)
