"""`torch.load` for files that nobody vouches for.

`torch.load(weights_only=True)` builds nothing but tensors, containers and what it is told to allow. Megatron's
files need more: a Namespace, enumerations, NumPy's random state. They are allowed here, by name, for the one
call. NumPy's own unpickling is not memory-safe (a pickled dtype may claim that bytes are object pointers), so
arrays and dtypes are rebuilt here from checked values.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import importlib
import io
import os
import pathlib
import pickle
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helix_megatron.errors import HelixError, with_settings

TRUST = with_settings(
    "If you trust where it comes from, add <trust_checkpoint>: it may then run any program."
)
DAMAGED = "Copy the checkpoint again from where it came, or load another iteration."
ZIP_MAGIC = b"PK\x03\x04"
MOST_REPEATED = 1 << 26  # bytes that a tensor may have beyond those of the file


def load_pt(
    source: Path | str | bytes, *, name: str | None = None, trust: bool = False, mmap: bool = False
) -> Any:
    """What `torch.save` wrote, on the CPU, without executing anything in it.

    Args:
        source: a path, or the content itself.
        name: what errors call it; the path when not given.
        trust: read it as pickle would: whatever is in it may execute.
        mmap: of a path: tensors are read from the file when they are used.

    Raises:
        HelixError: names the file and what it asks for that is not allowed, or says that it is damaged.
    """
    name = name or ("a torch file" if isinstance(source, bytes) else str(source))
    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    mmap = mmap and isinstance(file, str)
    if isinstance(file, str) and os.path.exists(file) and not os.path.isfile(file):
        raise HelixError(f"{name} is no file, but a directory, a pipe or a device. {DAMAGED}")
    try:
        if trust:
            return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)
        _check_zip(file, name)
        with _only_these_globals({}):
            # A static look: nothing is built.
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        allowed = {full: _allowed(full, name) for full in wanted}
        if isinstance(file, io.BytesIO):
            file.seek(0)
        with _only_these_globals(allowed):
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        return _with_arrays(value, {})
    except HelixError:
        raise
    except pickle.UnpicklingError as error:
        raise HelixError(
            f"{name} is refused: {_first_line(error)}. Either it is damaged, or torch.save did not write it.",
            remedy=TRUST,
        ) from error
    except Exception as error:
        raise HelixError(f"{name} cannot be read: {_first_line(error)}. {DAMAGED}") from error


def _check_zip(file: str | io.BytesIO, name: str) -> None:
    """Of torch.load's formats only this one is read; the older ones hold several pickles."""
    if isinstance(file, str):
        with open(file, "rb") as stream:
            start = stream.read(len(ZIP_MAGIC))
    else:
        start = file.read(len(ZIP_MAGIC))
        file.seek(0)
    if start != ZIP_MAGIC:
        raise HelixError(
            f"{name} is refused: it is damaged, or not in torch.save's zip format. A file older than torch 1.6 "
            "can be loaded where you trust it, and saved again."
        )


_lock = threading.Lock()


@contextlib.contextmanager
def _only_these_globals(allowed: dict[str, Any]) -> Iterator[None]:
    """`torch.load` allows these, and not what other packages have added in this process."""
    with _lock:
        before = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals([(value, name) for name, value in allowed.items()])
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


# ---------------------------------------------------------------- what is allowed


class _Dtype:
    """Stands for a pickled `numpy.dtype` of plain numbers or text."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if not isinstance(code, str) or not re.fullmatch(
            r"b1|[iufc][0-9]{1,2}|[SU][0-9]{1,9}", code
        ):
            raise pickle.UnpicklingError(f"numpy.dtype {code!r:.40} is not one of plain numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"numpy.dtype has the byte order {order!r:.40}")
        value = self.value if order == "|" else self.value.newbyteorder(order)
        # The version, the sizes and the flags must be those that NumPy itself would write.
        if tuple(state) != value.__reduce__()[2]:
            raise pickle.UnpicklingError(f"numpy.dtype {value} has a forged state {state!r:.80}")
        self.value = value


class _Array:
    """Stands for a pickled `numpy.ndarray`."""

    def __init__(self) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, raw = state
        if version != 1 or not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
            raise pickle.UnpicklingError("numpy.ndarray has a forged state")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise pickle.UnpicklingError(f"numpy.ndarray has the shape {shape!r:.80}")
        value = np.zeros(0, dtype.value)
        if raw:
            value = np.frombuffer(bytearray(raw), dtype.value)
        self.value = value.reshape(shape, order="F" if fortran else "C")


def _reconstruct(cls: type, shape: tuple[int, ...], code: bytes) -> _Array:
    if cls is not _Array:
        raise pickle.UnpicklingError(
            "numpy's _reconstruct is asked for something else than an array"
        )
    return _Array()


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
        raise pickle.UnpicklingError("a NumPy number has a forged state")
    (value,) = np.frombuffer(raw, dtype.value)
    return value


def _no_bytes() -> bytes:
    """Protocol 2 writes empty bytes as a call of `bytes`; others go through `_codecs.encode`."""
    return b""


ALLOWED: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    "pathlib.PosixPath": pathlib.PurePosixPath,
    "pathlib.PurePosixPath": pathlib.PurePosixPath,
    "pathlib._local.PosixPath": pathlib.PurePosixPath,
    "_io.BytesIO": io.BytesIO,
    "io.BytesIO": io.BytesIO,
    "builtins.bytes": _no_bytes,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
} | {
    f"numpy.{core}.multiarray.{name}": function
    for core in ("core", "_core")
    for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
}
# Imported when a file asks for them. Of the enumerations a file gets the members, not the class.
ENUMERATIONS = re.compile(
    r"megatron\.core\.(transformer\.)?enums\.[A-Za-z0-9]+"
    r"|megatron\.core\.rerun_state_machine\.Rerun(Diagnostic|Mode|State)"
    r"|signal\.Signals"
)
CLASSES = {"megatron.core.optimizer.optimizer_config.OptimizerConfig"}


def _allowed(full_name: str, file: str) -> Any:
    """What a name in a pickle stands for."""
    if full_name in ALLOWED:
        return ALLOWED[full_name]
    if full_name in CLASSES or ENUMERATIONS.fullmatch(full_name):
        module, _, attribute = full_name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise HelixError(
                f"{file} holds {full_name}, which is not installed here ({error}). Install megatron-core."
            ) from error
        if full_name in CLASSES:
            return found
        if isinstance(found, type) and issubclass(found, enum.Enum):
            return functools.partial(found)  # gives members, and is not the class
    raise HelixError(
        f"{file} is refused: it holds {full_name}, which a checkpoint needs not and which could execute code.",
        remedy=TRUST,
    )


def _with_arrays(value: Any, memo: dict[int, tuple[Any, Any]]) -> Any:
    """The same containers with arrays instead of what stands for them."""
    if isinstance(value, _Dtype | _Array):
        return value.value
    if id(value) in memo:
        return memo[id(value)][1]
    memo[id(value)] = value, value  # keeps the original alive, so that its id stays its own
    if isinstance(value, torch.Tensor):
        _check_size(value)
    if isinstance(value, dict):
        for key in value:
            value[key] = _with_arrays(value[key], memo)
    elif isinstance(value, list):
        value[:] = [_with_arrays(item, memo) for item in value]
    elif type(value) is tuple:
        result = tuple(_with_arrays(item, memo) for item in value)
        memo[id(value)] = value, result
        return result
    elif isinstance(value, argparse.Namespace | types.SimpleNamespace):
        vars(value).update({key: _with_arrays(item, memo) for key, item in vars(value).items()})
    return value


def _check_size(tensor: torch.Tensor) -> None:
    """Refuse a few bytes that stand for a tensor of any size, which takes the memory where it is copied."""
    if tensor.layout is torch.strided and tensor.device.type == "cpu":
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > max(stored, MOST_REPEATED):
            raise pickle.UnpicklingError(
                f"a tensor of shape {tuple(tensor.shape)} repeats {stored:,} bytes"
            )


def _first_line(error: BaseException) -> str:
    """The telling part of torch's long messages."""
    text = str(error)
    if "WeightsUnpickler error: " in text:
        text = text.split("WeightsUnpickler error: ", 1)[1]
    lines = text.strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
