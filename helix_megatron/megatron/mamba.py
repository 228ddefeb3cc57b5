"""Mamba-2 layers (arXiv 2405.21060): megatron-core's own, which here also run without mamba-ssm's GPU kernels.

B batch, L positions, C chunks of Q positions, H heads of P dimensions, G groups of heads with the same input
and output maps, N dimensions of a head's state. Tensor parallel ranks have H/tp heads and G/tp groups each.
Where all heads are one group, each rank has N/tp of the rows of its maps, which are gathered behind the
convolution, and the gated norm takes its mean over all ranks: so every weight is held once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from helix_megatron.core.collectives import all_gather
from helix_megatron.core.head_norm import head_mean
from helix_megatron.errors import HelixError
from helix_megatron.megatron.norms import TorchNorm
from helix_megatron.model.checks import check_mamba_groups
from helix_megatron.patching import temporarily

PURPOSE = "tensor/mamba"
TENSOR_OPS = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"


def _module_of_mixers() -> types.ModuleType:
    """megatron-core's; for inference alone 0.16's imports triton, which builds of torch for the CPU lack."""
    absent = importlib.util.find_spec("triton") is None and TENSOR_OPS not in sys.modules
    if absent:
        stub: Any = types.ModuleType(TENSOR_OPS)
        stub.tensor_get_slice_after = stub.tensor_masked_update = stub.tensor_merge = None
        sys.modules[TENSOR_OPS] = stub
    try:
        return importlib.import_module("megatron.core.ssm.mamba_mixer")
    finally:
        if absent:
            del sys.modules[TENSOR_OPS]


mixers: Any = _module_of_mixers()


def scan(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, B_BLGN: Tensor, C_BLGN: Tensor, chunk: int
) -> Tensor:
    """What a selective state space makes of x, [B, L, H, P]: a state S [P, N] of each head begins at 0, and

        S_l = exp(dt_l·A)·S_{l-1} + dt_l·x_l·B_lᵀ,    y_l = S_l·C_l.

    In chunks it is matrix products (arXiv 2405.21060, section 6): y of a position is that of the positions of
    its chunk, and that of the state with which its chunk begins.

    Args:
        x_BLHP: input.
        dt_BLH: time steps, at least 0.
        A_H: decay of each head, below 0.
        B_BLGN: input maps; C_BLGN: output maps.
        chunk: positions of a chunk; it changes the speed and not the result.
    """
    length, groups = x_BLHP.shape[1], B_BLGN.shape[2]
    chunk = min(chunk, length)

    def chunks(tensor: Tensor) -> Tensor:
        """Padded by time steps of 0, which leave the state as it is; [B, L, ..] → [B, C, Q, ..]."""
        padding = (0, 0) * (tensor.dim() - 2) + (0, -length % chunk)
        return F.pad(tensor, padding).unflatten(1, (-1, chunk))

    def by_group(tensor: Tensor, dim: int) -> Tensor:
        return tensor.unflatten(dim, (groups, -1))

    B, C = chunks(B_BLGN), chunks(C_BLGN)
    x = by_group(chunks(x_BLHP * dt_BLH[..., None]), 3)  # [B, C, Q, G, H/G, P]
    steps = chunks(dt_BLH * A_H)  # logarithms of what each position leaves of the state

    # Sums of logarithms over the positions behind one up to another; differences of sums would cancel digits.
    order = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device)
    behind = (steps[:, :, :, None] * order.tril(-1)[..., None]).cumsum(
        2
    )  # [B, C, Q up to, Q from, H]
    between = behind.masked_fill(order.triu(1)[..., None], -torch.inf).exp()
    scores = torch.einsum("bcqgn,bckgn->bcqkg", C, B)[..., None] * by_group(between, -1)
    within = torch.einsum("bcqkgr,bckgrp->bcqgrp", scores, x)

    at_end = x * by_group(between[:, :, -1], -1)[..., None]
    gained = torch.einsum("bckgn,bckgrp->bcgrpn", B, at_end)
    since_start = by_group(steps.cumsum(2).exp(), -1)
    kept = since_start[:, :, -1, ..., None, None]
    states = [torch.zeros_like(gained[:, 0])]
    for number in range(gained.shape[1] - 1):
        states.append(kept[:, number] * states[-1] + gained[:, number])
    before = torch.einsum("bcqgn,bcgrpn->bcqgrp", C, torch.stack(states, 1))
    y = within + before * since_start[..., None]
    return y.flatten(3, 4).flatten(1, 2)[:, :length]


class GatedNorm(torch.nn.Module):
    """RMSNorm of each group of dimensions, [.., D] → [.., D], with the names of mamba-ssm's.

    Each tensor parallel rank has the weights of its own heads. The layer sets `tp_group`, and `sharing` to it
    where the ranks have one group together.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.tp_group: Any = None
        self.sharing: Any = None
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        if self.sharing is None:
            return F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * self.weight
        wide = groups.to(torch.promote_types(x.dtype, torch.float32))
        size = self.group_size * self.sharing.size()
        mean = head_mean(wide.square(), size, self.sharing, purpose=PURPOSE)
        return (wide * torch.rsqrt(mean + self.eps)).flatten(-2).to(x.dtype) * self.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class Mamba(mixers.MambaMixer):
    """megatron-core's layer, [S, B, D] → [S, B, D]: by mamba-ssm's kernels on a GPU, else in plain torch.

    Ranks that have one group together compute in plain torch on a GPU, too: the kernels gather nothing.

    Raises:
        HelixError: einops is not installed; or tensor parallel ranks cannot share the groups.
    """

    def __init__(self, config: Any, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        if not mixers.HAVE_EINOPS:
            raise HelixError(
                "megatron-core's Mamba layers need einops. Try pip install 'einops>=0.8.2,<0.9'."
            )
        ranks = pg_collection.tp.size()
        check_mamba_groups(config, ranks)
        self.shares_group = config.mamba_num_groups == 1 and ranks > 1
        self.has_kernels = (
            mixers.HAVE_MAMBA_SSM and torch.cuda.is_available() and not self.shares_group
        )
        own = {} if self.has_kernels else {"HAVE_MAMBA_SSM": True, "ExtendedRMSNorm": GatedNorm}
        # As many groups as ranks with so much smaller states have the same rows, and cut them evenly.
        dealt = {"mamba_num_groups": ranks, "mamba_state_dim": config.mamba_state_dim // ranks}
        with temporarily(mixers, **own), temporarily(config, **dealt if self.shares_group else {}):
            super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        self.norm.tp_group = pg_collection.tp
        if self.shares_group:
            self.norm.sharing = pg_collection.tp

    @property
    def _wanted(self) -> str:
        """What is missing where there are no kernels."""
        return (
            "a group of Mamba heads for each rank" if self.shares_group else "mamba-ssm and a GPU"
        )

    def forward(
        self, hidden_states: Tensor, inference_context: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """As megatron-core's: [S, B, D] → [S, B, D], and a bias that is None."""
        if not self.has_kernels and (inference_context or kwargs.get("inference_params")):
            raise HelixError(
                f"Megatron's inference of Mamba layers needs {self._wanted}. Without, use helix generate or "
                "helix serve, which compute such layers by the code of transformers."
            )
        output: tuple[Tensor, Any] = super().forward(hidden_states, inference_context, **kwargs)
        return output

    def _ssm_training(self, zxBCdt: Tensor, packed_seq_params: Any = None) -> Tensor:
        """[S, B, (2·H·P + 2·G·N + H)/tp] → [S, B, H·P/tp], as megatron-core's, with autograd's backward."""
        if self.has_kernels:
            return super()._ssm_training(zxBCdt, packed_seq_params)
        if packed_seq_params is not None:
            raise HelixError(
                f"Mamba layers need {self._wanted} for packed documents. Train on unpacked ones."
            )
        own, width = self.cp, self.cp.d_inner_local_tpcp
        maps = own.ngroups_local_tpcp * self.d_state
        z, xBC, dt = zxBCdt.transpose(0, 1).split(
            [width, width + 2 * maps, own.nheads_local_tpcp], -1
        )
        weight = own.get_conv1d_weight()
        padded = F.pad(xBC.transpose(1, 2), (weight.shape[-1] - 1, 0))
        convolved = F.conv1d(padded, weight, own.get_conv1d_bias(), groups=len(weight))
        x, B, C = F.silu(convolved).transpose(1, 2).split([width, maps, maps], -1)
        if self.shares_group:
            B, C = all_gather(torch.stack([B, C]), self.tp_group, dim=-1, purpose=PURPOSE)
        # As the kernels do, in at least fp32.
        x, dt, B, C = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, dt, B, C))
        x_heads = x.unflatten(-1, (-1, self.headdim))
        y = scan(
            x_heads,
            F.softplus(dt + own.get_dt_bias().to(dt.dtype)),
            -own.get_A_log().to(dt.dtype).exp(),
            B.unflatten(-1, (own.ngroups_local_tpcp, -1)),
            C.unflatten(-1, (own.ngroups_local_tpcp, -1)),
            self.chunk_size,
        )
        y = (y + x_heads * own.get_D().to(dt.dtype)[:, None]).flatten(-2) * F.silu(z.to(dt.dtype))
        y = own.post_conv_ssm(y.to(zxBCdt.dtype).transpose(0, 1).contiguous())
        return self.norm(y)


def limit_time_steps(model: Any, least: float) -> None:
    """Raise time steps of a model's Mamba layers to `least`, as transformers does with `time_step_min`.

    max(softplus(dt + b), t) = softplus(max(dt, softplus⁻¹(t) − b) + b): so it holds for kernels, too, which
    know no such limit.
    """
    if least == 0:
        return
    lowest = least + math.log(-math.expm1(-least))

    def limit(mixer: Any, projection: Any, inputs: Any, output: Any) -> tuple[Tensor, Any]:
        steps = mixer.nheads_local_tp
        others, dt = output[0].split([output[0].shape[-1] - steps, steps], -1)
        limited = torch.maximum(dt, (lowest - mixer.dt_bias).to(dt.dtype))
        return torch.cat([others, limited], -1), output[1]

    for module in model.modules():
        if isinstance(module, mixers.MambaMixer):
            module.in_proj.register_forward_hook(functools.partial(limit, module))


class LayerNorm(TorchNorm):
    """The norm before a Mamba layer: megatron-core 0.16 does not tell it the epsilon."""

    def __init__(self, config: Any, hidden_size: int, eps: float | None = None) -> None:
        super().__init__(config, hidden_size, config.layernorm_epsilon)
