"""Run megatron-core without a GPU: training, checkpoints and inference over gloo.

`install()` puts stand-ins for what megatron-core takes from CUDA; `uninstall()` removes them. Where CUDA is
available nothing happens. File and line in the docstrings are those of megatron/core in 0.16.1.

Three settings remain the caller's, since they are configuration and not faults:

- `TransformerConfig(use_cpu_initialization=True)`: the same seed gives the same weights in every layout.
- Virtual pipeline stages with two pipeline stages: `overlap_p2p_comm=True, batch_p2p_comm=False`. The
  default pairs the messages of the two directions wrongly and gives another loss, silently.
- Mixture of experts with tensor parallelism: `sequence_parallel=True` (moe_layer.py:380 raises
  otherwise).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch.overrides import _get_current_function_mode_stack

from helix_megatron.errors import HelixError
from helix_megatron.megatron import cpu_devices, torch_adam
from helix_megatron.patching import PatchTable

TABLE = PatchTable("megatron-core", "the CPU runtime")
_RANDOM = "megatron.core.tensor_parallel.random"
_mode = cpu_devices.CudaMeansCpu()


def install() -> bool:
    """Make megatron-core run on the CPU; idempotent.

    Call it in the thread that trains, before anything of megatron-core allocates. Returns True when the
    stand-ins are in place, False where CUDA is available: then nothing is touched.

    Raises `HelixError`, with nothing replaced, for a megatron-core that lacks what is to be replaced.
    """
    if TABLE.installed:
        return True
    if torch.cuda.is_available():
        return False
    TABLE.install()
    try:
        torch_adam.install()
    except HelixError:
        TABLE.uninstall()
        raise
    _mode.__enter__()
    return True


def is_installed() -> bool:
    """Whether the stand-ins are in place."""
    return TABLE.installed


def uninstall() -> None:
    """Put every replaced attribute back; idempotent.

    Raises `RuntimeError` inside a torch function mode that was entered after `install`: modes are left
    in the order in which they nest.
    """
    if not TABLE.installed:
        return
    if _get_current_function_mode_stack()[-1:] != [_mode]:
        raise RuntimeError(
            "cpu_runtime.uninstall() was called inside a torch function mode that was entered after "
            "install(), or in another thread. Leave that mode first."
        )
    _mode.__exit__(None, None, None)
    torch_adam.uninstall()
    TABLE.uninstall()


# Devices.


@TABLE.replace("torch.cuda:current_device")
def _current_device(upstream: Any) -> Callable[[], torch.device]:
    """About a hundred allocations pass `device=torch.cuda.current_device()`.

    For example rotary_pos_embedding.py:162, utils.py:631 (the buffer of sequence parallelism),
    attention.py:430 (the key-value cache), tensor_parallel/layers.py:261. It raises without a GPU.
    """
    return lambda: cpu_devices.CPU


@TABLE.replace("torch:Tensor.cuda")
def _tensor_cuda(upstream: Any) -> Callable[..., torch.Tensor]:
    """`.cuda()` raises without a GPU.

    tensor_parallel/data.py:84 (broadcast of a batch), language_module.py:244 (tied embeddings),
    optimizer/grad_scaler.py:140, dist_checkpointing/exchange_utils.py:336 and 499.
    """
    return lambda self, *args, **kwargs: self


@TABLE.replace("torch:Tensor.type")
def _tensor_type(upstream: Any) -> Callable[..., Any]:
    """The optimizers tell precisions apart by names such as `torch.cuda.FloatTensor`.

    optimizer/optimizer.py:671 and 690, distrib_optimizer.py:361, 420 and 582 raise `TypeError` for a
    CPU parameter; clip_grads.py:167 asserts.
    """

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = upstream(self, *args, **kwargs)
        return cpu_devices.CpuTensorType(result) if isinstance(result, str) else result

    return tensor_type


# Streams. Pipeline: p2p_communication.py:242 and 398, pipeline_parallel/utils.py:332. Experts:
# shared_experts.py:123, token_dispatcher.py:445 and 871. Gradients: param_and_grad_buffer.py:417, 422
# and 529. Checkpoints: fully_parallel.py:272. Timers: timers.py:152. All raise without a GPU, except
# `torch.cuda.stream(...)`, which does nothing then.


@TABLE.replace("torch.cuda:Stream")
def _stream_class(upstream: Any) -> type:
    """token_dispatcher.py:445 creates one for every all-to-all dispatcher."""
    return cpu_devices.CpuStream


@TABLE.replace("torch.cuda:Event")
def _event_class(upstream: Any) -> type:
    """Overlapped schedules record them; the step timers of utils.py:1475 read them."""
    return cpu_devices.CpuEvent


@TABLE.replace("torch.cuda:current_stream", "torch.cuda:default_stream")
def _the_stream(upstream: Any) -> Callable[..., cpu_devices.CpuStream]:
    """param_and_grad_buffer.py:422 waits for the default stream."""
    return lambda device=None: cpu_devices.THE_STREAM


@TABLE.replace("torch.cuda:synchronize")
def _synchronize(upstream: Any) -> Callable[..., None]:
    """p2p_communication.py:398 waits after every batched exchange (`batch_p2p_sync`)."""
    return lambda device=None: None


# Random states.


@TABLE.replace("torch.cuda:manual_seed")
def _manual_seed(upstream: Any) -> Callable[[int], None]:
    """random.py:237 and 422 seed the generator of dropout: here the CPU's.

    Upstream queues the call until CUDA starts, which is never.
    """

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    return manual_seed


@TABLE.replace("torch.cuda:get_rng_state", f"{_RANDOM}:_get_cuda_rng_state")
def _get_rng_state(upstream: Any) -> Callable[..., torch.Tensor]:
    """random.py:55, 235 and 447: recompute keeps the state of the forward pass."""
    return lambda *args, **kwargs: torch.get_rng_state()


@TABLE.replace("torch.cuda:set_rng_state", f"{_RANDOM}:_set_cuda_rng_state")
def _set_rng_state(upstream: Any) -> Callable[..., None]:
    """random.py:514: recompute restores it; upstream queues the call until CUDA starts."""
    return lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


@TABLE.replace(f"{_RANDOM}:CudaRNGStatesTracker")
def _tracker_class(upstream: Any) -> type:
    """random.py:242: `fork` switches the CUDA generator; see `cpu_rng`."""
    from helix_megatron.megatron.cpu_rng import CpuRNGStatesTracker

    return CpuRNGStatesTracker


@TABLE.replace(f"{_RANDOM}:_CUDA_RNG_STATE_TRACKER")
def _no_tracker_yet(upstream: Any) -> None:
    """random.py:282: a tracker made before `install` is of upstream's class; make a new one."""


@TABLE.replace(f"{_RANDOM}:_CUDA_RNG_STATE_TRACKER_INITIALIZED")
def _tracker_is_to_be_made(upstream: Any) -> bool:
    """random.py:283: belongs to the tracker above."""
    return False


# Mixture of experts.


@TABLE.replace("megatron.core.tensor_parallel.mappings:_gather_along_first_dim")
def _gather_unequal_parts(upstream: Any) -> Callable[..., torch.Tensor]:
    """mappings.py:150 gathers the tokens of experts that are cut by tensor parallelism.

    Their numbers differ between ranks, which gloo refuses: `invalid tensor size`. Here the parts travel
    padded to the largest. (The way back, a reduce-scatter of unequal parts, gloo does accept.)
    """

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return upstream(input_, group, output_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([whole[:size] for whole, size in zip(gathered, sizes, strict=True)])

    return gather


@TABLE.replace("megatron.core.transformer.moe.moe_utils:te_general_gemm", adds=True, before=(0, 17))
def _no_transformer_engine_gemm(upstream: Any) -> None:
    """moe_utils.py:34 imports it with Transformer Engine; without, :1192 is a `NameError`.

    None is what :1192 compares with.
    """


@TABLE.replace("megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu")
def _split_sizes_as_numpy(upstream: Any) -> Callable[..., Any]:
    """moe_utils.py:1093 converts only CUDA tensors to the numpy arrays that callers ask for.

    With expert parallelism `all_to_all_single` then gets tensors as split sizes: `TypeError`.
    """

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


# Hybrid models.


@TABLE.replace("megatron.core.models.hybrid.hybrid_block:TENorm", since=(0, 18))
@TABLE.replace("megatron.core.ssm.mamba_block:TENorm", before=(0, 18))
def _final_norm(upstream: Any) -> type:
    """hybrid_block.py:262 (0.19) takes Transformer Engine's norm for the last one, whatever the spec says."""
    from helix_megatron.megatron.norms import TorchNorm

    return TorchNorm


@TABLE.replace("megatron.core.ssm.gated_delta_net.common:HAVE_FLA", since=(0, 19))
@TABLE.replace("megatron.core.ssm.gated_delta_net:HAVE_FLA", before=(0, 19))
def _gated_delta_net_can_be_built(upstream: Any) -> bool:
    """common.py:141 (0.19) wants flash-linear-attention, which `deterministic_mode` uses for one norm only."""
    return True


@TABLE.replace("megatron.core.ssm.gated_delta_net.common:l2norm", since=(0, 19))
@TABLE.replace("megatron.core.ssm.gated_delta_net:l2norm", since=(0, 18), before=(0, 19))
@TABLE.replace("megatron.core.ssm.gated_delta_net:l2norm", adds=True, before=(0, 18))
def _l2norm(upstream: Any) -> Callable[..., torch.Tensor]:
    """That norm, of queries and keys; it is a Triton kernel, or None without flash-linear-attention."""

    def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6) -> torch.Tensor:
        return x * (x.square().sum(dim, keepdim=True) + eps).rsqrt()

    return l2norm


# Latent attention.


@TABLE.replace("megatron.core.transformer.multi_latent_attention:HAVE_TE")
def _no_transformer_engine(upstream: Any) -> bool:
    """multi_latent_attention.py:62 (0.16) takes it for installed; :185 is a `TypeError` then."""
    return False


# Compilation.


@TABLE.replace("torch._dynamo.config:disable")
def _no_compilation(upstream: Any) -> bool:
    """jit.py:23: `jit_fuser` is torch.compile, for kernels that a GPU would fuse.

    On the CPU it needs a C++ compiler and takes 17 s for the first activation function.
    """
    return True
