"""Pickles that create a marker file when they are read by pickle itself, for the tests of safe reading."""

from __future__ import annotations

import functools
import io
import operator
import os
import pathlib
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing  # noqa: F401 - it changes what pickle finds, see the end of `PAYLOADS`
import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata


class Call:
    """Is pickled as a call of a function. Callable, so that a call of its result can be pickled, too."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments

    def __call__(self) -> None: ...


class EvilPath(pathlib.PurePosixPath):
    """A path, as metadata may hold, that is pickled as something else."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (str(self),)


class Raw:
    """A pickle written by hand; a reader of torch files gets it as `data.pkl`."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _stack_global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _legacy_storage(marker: str) -> Call:
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), inner, _use_new_zipfile_serialization=False)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


def _globals_of_an_allowed_class(marker: str) -> Call:
    """Metadata.__init__.__globals__["os"].system: a chain that begins at a class which must be allowed."""
    namespace = Call(operator.attrgetter("__init__.__globals__"), Metadata)
    module = Call(operator.getitem, namespace, "os")
    return Call(Call(getattr, module, "system"), f"touch {marker}")


def _object_array(marker: str) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = Call(os.system, f"touch {marker}")
    return array


PAYLOADS: dict[str, Callable[[str], Any]] = {
    "os.system": lambda marker: Call(os.system, f"touch {marker}"),
    "os.system by name": lambda marker: Raw(
        b"cos\nsystem\n" + _text(f"touch {marker}") + b"\x85R."
    ),
    "eval": lambda marker: Call(eval, f"open({marker!r}, 'w').close()"),
    "exec": lambda marker: Call(exec, f"open({marker!r}, 'w').close()"),
    "open": lambda marker: Call(open, marker, "w"),
    "subprocess": lambda marker: Call(subprocess.check_call, ["touch", marker]),
    "partial": lambda marker: Call(functools.partial(os.system, f"touch {marker}")),
    "map": lambda marker: Call(list, Call(map, os.system, [f"touch {marker}"])),
    "methodcaller": lambda marker: Call(operator.methodcaller("touch"), pathlib.Path(marker)),
    "pickle in bytes": lambda marker: Call(
        pickle.loads, pickle.dumps(Call(os.system, f"touch {marker}"))
    ),
    "torch.storage._load_from_bytes": _legacy_storage,
    "globals of an allowed class": _globals_of_an_allowed_class,
    "dotted name in an allowed module": lambda marker: Raw(
        b"\x80\x04"
        + _stack_global("torch.distributed.checkpoint.metadata", "os.system")
        + _text(f"touch {marker}")
        + b"\x85R."
    ),
    "array of objects": _object_array,
    "path": lambda marker: EvilPath(f"touch {marker}"),
}
# From 0.19 on megatron-core has replaced it by a function that runs nothing.
if torch.storage._load_from_bytes.__module__ != "torch.storage":
    del PAYLOADS["torch.storage._load_from_bytes"]


def plain_pickle(payload: Any) -> bytes:
    return payload.content if isinstance(payload, Raw) else pickle.dumps(payload)


def metadata_pickle(payload: Any) -> bytes:
    """The `.metadata` of an empty checkpoint with the payload in a field that may hold anything."""
    if isinstance(payload, Raw):
        return payload.content
    return pickle.dumps(Metadata({}, planner_data={"x": payload}, storage_data={}))


def torch_file(payload: Any) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    if not isinstance(payload, Raw):
        torch.save({"args": payload, "weight": torch.ones(2)}, buffer)
        return buffer.getvalue()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", payload.content)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def directory_files(directory: Path) -> dict[str, bytes]:
    """Relative path → content, to see that reading changed nothing."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
