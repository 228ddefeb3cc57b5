"""What a Hugging Face model has beside its weights: configuration, tokenizer, texts."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

from helix_megatron.checkpoint import manifest as manifests

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")


def side_files(folder: Path) -> dict[str, bytes | Path]:
    """The files of a Hugging Face model beside its weights, by name; none that a link brings in from elsewhere.

    In a snapshot of the Hub's cache every file is a link to one of the cache's blobs.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    found: dict[str, bytes | Path] = {}
    for path in sorted(path for pattern in COPIED for path in folder.glob(pattern)):
        if path.is_file() and path.name not in (manifests.MANIFEST_NAME, manifests.CHECKSUM_NAME):
            if path.resolve().parent in inside:
                found[path.name] = path
            else:
                warnings.warn(f"{path} is a link to another folder, and is left out.", stacklevel=2)
    return found


def write_side_files(files: Mapping[str, bytes | Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
