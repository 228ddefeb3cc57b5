"""Which optional packages can be used here: NVIDIA's apex, Transformer Engine, flash-attn.

The package called `apex` on PyPI is a web toolkit. megatron-core takes any `apex` for NVIDIA's and fails
later, when a norm is built. So the parts that are needed are looked for, and any error on the way counts as
absence, with its reason. megatron-core picks its Adam itself, when it is imported; where what it picks
cannot work, `Backends.conflict` says so beforehand.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.distributed

from helix_megatron.core.kernels.installed import installed_kernels
from helix_megatron.errors import HelixError

APEX_SOURCE = "https://github.com/NVIDIA/apex"
_TITLES = {"torch": "torch", "apex": "apex", "transformer_engine": "Transformer Engine"}


@dataclass(frozen=True)
class Backends:
    """What serves each purpose, and why the rest does not."""

    adam: str
    """The Adam that can be used: `transformer_engine`, `apex` or `torch`."""

    norm: str
    """The layer norm outside of Transformer Engine's layers: `apex` or `torch`."""

    transformer_engine: bool
    """Whether layers of Transformer Engine can be built."""

    flash_attention: bool
    """Whether the flash-attn package can be used."""

    reasons: Mapping[str, str] = field(default_factory=dict)
    """For every package that cannot be used: why, as the rest of a sentence."""

    conflict: str = ""
    """What is installed and would make megatron-core itself fail, with the way out; else empty."""

    def summary(self) -> str:
        """One line: what is missing, and what is used instead."""
        missing = ", ".join(f"{name} {reason}" for name, reason in self.reasons.items())
        return (
            f"Optional packages: {missing or 'all found'}: "
            f"{_TITLES[self.norm]} norms and {_TITLES[self.adam]} Adam are used."
        )

    def check(self) -> None:
        """Raise `HelixError` if an installed package would make megatron-core fail later."""
        if self.conflict:
            raise HelixError(self.conflict)


@functools.cache
def available_backends() -> Backends:
    """Look for the optional packages, once per process; never raises."""
    no_apex, conflict = _probe_apex()
    no_engine = _why_not("transformer_engine.pytorch", "TransformerLayer")
    no_flash = _why_not("flash_attn", "flash_attn_func")
    if not no_engine:  # megatron-core's order: Transformer Engine, apex, torch
        adam, conflict = "transformer_engine", ""
    else:
        adam = "torch" if no_apex else "apex"
    reasons = {"apex": no_apex, "Transformer Engine": no_engine, "flash-attn": no_flash}
    return Backends(
        adam=adam,
        norm="torch" if no_apex else "apex",
        transformer_engine=not no_engine,
        flash_attention=not no_flash,
        reasons=MappingProxyType({name: reason for name, reason in reasons.items() if reason}),
        conflict=conflict,
    )


def describe(say: Callable[[str], None] = print) -> str:
    """What optional packages and kernels were found, said once per process group, by its first rank.

    Without a process group it is said once per process. Returns the text on every rank, every time.
    """
    line = f"{available_backends().summary()}\n{installed_kernels().summary()}"
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    rank = torch.distributed.get_rank() if group is not None else 0
    if _Said.last is None or _Said.last() is not group:
        _Said.last = weakref.ref(group) if group is not None else lambda: None
        if rank == 0:
            say(line)
    return line


class _Said:
    """The group for which `describe` has spoken last: a function that returns it, or None."""

    last: Callable[[], object] | None = None


def _probe_apex() -> tuple[str, str]:
    """(why NVIDIA's apex cannot be used or "", what makes megatron-core fail or "")."""
    try:
        importlib.import_module("apex")
    except (Exception, SystemExit) as error:
        reason = _import_failure("apex", error)
        if isinstance(error, ImportError):
            return reason, ""  # megatron-core goes on without it
        return reason, (
            f"The installed package apex {reason}, and megatron-core imports it. "
            "Try pip uninstall apex."
        )
    for module, name in (
        ("apex.optimizers", "FusedAdam"),
        ("apex.normalization", "FusedLayerNorm"),
    ):
        try:
            getattr(importlib.import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            return (
                f"is another package of that name (it has no {module}.{name}; pip uninstall apex, "
                f"NVIDIA's is built from {APEX_SOURCE})"
            ), ""
        except (Exception, SystemExit) as error:
            return _import_failure(module, error), ""
    reason = _why_apex_cannot_run()
    if not reason:
        return "", ""
    return reason, (
        f"NVIDIA's apex is installed but {reason}, and megatron-core would take its FusedAdam. "
        f"Try pip uninstall apex, or build it as {APEX_SOURCE} says."
    )


def _why_apex_cannot_run() -> str:
    try:
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        built = applier.available
    except (ImportError, AttributeError):
        built = True  # another version keeps it elsewhere: nothing says that it is not built
    if not built:
        return "was built without its CUDA extensions"
    return "" if torch.cuda.is_available() else "needs a CUDA device"


def _why_not(module: str, name: str) -> str:
    """Why `module.name` cannot be used here, or ""."""
    try:
        getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        return _import_failure(module, error)
    return "" if torch.cuda.is_available() else "needs a CUDA device"


def _import_failure(module: str, error: BaseException) -> str:
    package = module.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return "not found"
    return f"cannot be imported ({type(error).__name__}: {error})"
