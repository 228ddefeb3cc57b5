"""How files keep their weights in fewer bits: `quantization_config` of a `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError

KEY = "quantization_config"


@dataclass(frozen=True)
class Packing:
    """How matrices are packed in files.

    Args:
        method: `fp8`, e4m3 with a scale for each block, or `mxfp4`, e2m1 with an exponent for each 32 elements.
        block: rows and columns of a block of fp8; None where a whole matrix has one scale.
    """

    method: str
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.method != "fp8":
            return self.method
        return "fp8 with one scale" if self.block is None else "fp8 blocks"


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """What a config.json says of its weights; None where they are stored as they are.

    Raises:
        HelixError: packed in a way that is not known here; the text names it.
    """
    found, text = config.get(KEY), config.get("text_config")
    if not found and isinstance(text, Mapping):
        found = text.get(KEY)
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise HelixError(f"config.json sets {KEY} = {found!r:.80}. It must be an object.")
    method, block = found.get("quant_method"), found.get("weight_block_size", (128, 128))
    if method == "mxfp4":
        return Packing(method)
    experts = found.get("expert_dtype", method)
    if method != "fp8" or experts != "fp8":
        kind = repr(method) if experts == method else f"{method!r} with experts in {experts!r}"
        raise HelixError(
            f"config.json says that its weights are quantized by {kind:.80} ({KEY}), which cannot be read. "
            "Valid: fp8, mxfp4. Take the model's files in bfloat16, or let transformers unpack it and "
            "save_pretrained() it."
        )
    if block is None:
        return Packing(method)
    if (
        not isinstance(block, list | tuple)
        or [type(n) for n in block] != [int, int]
        or min(block) < 1
    ):
        raise HelixError(
            f"config.json sets weight_block_size = {block!r:.80} in {KEY}. It must be two whole numbers, rows "
            "and columns of a block, such as [128, 128]."
        )
    return Packing(method, (block[0], block[1]))
