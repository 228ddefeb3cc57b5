"""What stands in for a GPU in Megatron-LM's training loop, over gloo. Installed only where there is no CUDA.

`helix_megatron.megatron.cpu_runtime` does so for megatron.core and torch; this is about megatron.training. Its
arguments' defaults become those that can run, see `_defaults`. File and line are those of core_v0.16.1.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.megatron_lm.table import HookTable, found_version

TABLE = HookTable("the CPU stand-ins")
BATCH_INVARIANT = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
HELPERS = "megatron.core.datasets.helpers_cpp"
# Defaults of arguments that cannot run without CUDA, and what can.
DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "cp_comm_type": ["all_gather"],
}
_added: list[str] = []


def install() -> bool:
    """Put the stand-ins in place, cpu_runtime's first; idempotent. False where CUDA is available.

    Raises:
        HelixError: Megatron-LM lacks what is to be replaced. Nothing is replaced then.
    """
    import torch

    from helix_megatron.megatron import cpu_runtime

    if TABLE.installed:  # asked first: the stand-ins may make torch believe in a GPU
        return True
    if torch.cuda.is_available():
        return False
    had_runtime = cpu_runtime.is_installed()
    cpu_runtime.install()
    try:
        _without_triton()
        _compiled_helpers()
        TABLE.install()
    except BaseException:
        _remove_added_modules()
        if not had_runtime:
            cpu_runtime.uninstall()
        raise
    return True


def uninstall() -> None:
    from helix_megatron.megatron import cpu_runtime

    if not TABLE.installed:
        return
    TABLE.uninstall()
    _remove_added_modules()
    cpu_runtime.uninstall()


# Modules that cannot be imported here.


def _without_triton() -> None:
    """training/initialize.py imports batch-invariant kernels, and these triton, in 0.16 whether used or not."""
    if found_version()[:2] >= (0, 17) or importlib.util.find_spec("triton") is not None:
        return

    def enable(*args: Any, **kwargs: Any) -> None:
        raise HelixError("--batch-invariant-mode needs triton and a GPU. Leave it out.")

    module = types.ModuleType(BATCH_INVARIANT)
    module.enable_batch_invariant_mode = enable  # type: ignore[attr-defined]
    module.is_batch_invariant_mode_enabled = lambda: False  # type: ignore[attr-defined]
    _add_module(module)


def _compiled_helpers() -> None:
    """datasets/helpers.py needs a compiled module, which a checkout has only after `make`.

    An installed megatron-core has it compiled; that serves a checkout of any version. Without one
    upstream's own `make` is left to run (see `_compile_helpers`).
    """
    datasets = importlib.import_module("megatron.core.datasets")
    if importlib.util.find_spec(HELPERS) is not None:
        return
    for entry in sys.path:
        folder = Path(entry or os.curdir, "megatron", "core", "datasets")
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = folder / f"helpers_cpp{suffix}"
            if not path.is_file():
                continue
            spec = importlib.util.spec_from_file_location(HELPERS, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            datasets.helpers_cpp = module  # type: ignore[attr-defined]
            _add_module(module)
            return


def _add_module(module: types.ModuleType) -> None:
    if module.__name__ not in sys.modules:
        sys.modules[module.__name__] = module
        _added.append(module.__name__)


def _remove_added_modules() -> None:
    while _added:
        sys.modules.pop(_added.pop(), None)


# Arguments.


@TABLE.hook("CPU defaults", "megatron.training.arguments:add_megatron_arguments")
def _defaults(upstream: Any) -> Callable[..., Any]:
    """Defaults that need NCCL, Transformer Engine or apex become ones that run; flags given still win.

    --distributed-backend gloo --transformer-impl local --use-cpu-initialization
    --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion --no-masked-softmax-fusion
    --cp-comm-type all_gather
    """

    @functools.wraps(upstream)
    def add_megatron_arguments(parser: Any) -> Any:
        parser = upstream(parser)
        known = {action.dest for action in parser._actions}
        parser.set_defaults(**{name: value for name, value in DEFAULTS.items() if name in known})
        return parser

    return add_megatron_arguments


@TABLE.hook("CPU device properties", "torch.cuda:get_device_properties")
def _device_properties(upstream: Any) -> Callable[..., Any]:
    """The machine passes for a recent GPU where its generation is asked for.

    training/arguments.py:928 wants CUDA_DEVICE_MAX_CONNECTIONS=1 with tensor parallelism before the tenth.
    """
    properties = types.SimpleNamespace(
        name="cpu", major=10, minor=0, total_memory=0, multi_processor_count=1
    )
    return lambda *args, **kwargs: properties


@TABLE.hook("CPU without CUDA", "megatron.training.training:initialize_megatron")
def _allow_no_cuda(upstream: Any) -> Callable[..., Any]:
    """`pretrain` may initialise without CUDA. initialize.py:62 asserts that it is there."""

    @functools.wraps(upstream)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        return upstream(*args, **{**kwargs, "allow_no_cuda": True})

    return initialize_megatron


@TABLE.hook("CPU device count", "torch.cuda:device_count")
def _device_count(upstream: Any) -> Callable[[], int]:
    """One device: initialize.py:360 makes the process groups only where there is one."""
    return lambda: 1


@TABLE.hook("CPU device", "torch.cuda:set_device")
def _set_device(upstream: Any) -> Callable[[Any], None]:
    """There is nothing to select. initialize.py:331 selects the local rank's device."""
    return lambda device: None


@TABLE.hook("CPU helpers", "megatron.core.datasets.utils:compile_helpers")
def _compile_helpers(upstream: Any) -> Callable[[], None]:
    """What is compiled already is not compiled again. initialize.py:189 runs `make` in the checkout."""

    def compile_helpers() -> None:
        if HELPERS not in sys.modules and importlib.util.find_spec(HELPERS) is None:
            upstream()

    return compile_helpers


@TABLE.hook("CPU fused kernels", "megatron.legacy.fused_kernels:load", before=(0, 17))
def _fused_kernels(upstream: Any) -> Callable[[Any], None]:
    """Nothing is compiled for a GPU. initialize.py:224 asks nvcc for its version."""
    return lambda args: None


# Norms.


@TABLE.hook("CPU norms", "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__")
def _norms(upstream: Any) -> Any:
    """Norms of plain torch work with sequence parallelism and zero-centred weights.

    Without Transformer Engine and apex these are all that there is, and torch_norm.py:32 refuses both.
    """

    def __new__(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        from helix_megatron.megatron.norms import TorchNorm

        return TorchNorm(config, hidden_size, eps, **kwargs)

    return staticmethod(__new__)


# Layers.


@TABLE.hook(
    "CPU hybrid stack",
    "megatron.core.models.hybrid.hybrid_block:HybridStack.__init__",
    since=(0, 18),
)
@TABLE.hook("CPU hybrid stack", "megatron.core.ssm.mamba_block:MambaStack.__init__", before=(0, 18))
def _hybrid_stack(upstream: Any) -> Callable[..., None]:
    """Hybrid stacks are built of megatron-core's own layers, in place of Transformer Engine's.

    hybrid_layer_specs.py has no other, and no layer of these can be built here.
    """

    @functools.wraps(upstream)
    def __init__(self: Any, config: Any, submodules: Any, *args: Any, **kwargs: Any) -> None:
        if ".transformer_engine." in repr(submodules):  # names the module of every class in it
            from helix_megatron.config import HelixConfig
            from helix_megatron.megatron.hybrid import local_stack_spec
            from helix_megatron.megatron.specs import helix_spec

            helix = getattr(config, "helix", HelixConfig())
            submodules = helix_spec(local_stack_spec(config), helix).submodules
        upstream(self, config, submodules, *args, **kwargs)

    return __init__
