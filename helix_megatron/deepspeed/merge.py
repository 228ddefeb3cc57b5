"""Whole Hugging Face weights from a DeepSpeed checkpoint of a cut model.

    python -m helix_megatron.deepspeed.merge CHECKPOINT_DIR model.safetensors [--tag TAG] [--prefix PREFIX]

Neither ranks nor the model are needed: `helix_parts.json` in the checkpoint says where each part belongs.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.checkpoint.safe import load_pt
from helix_megatron.deepspeed.checkpoints import FILE, find_checkpoint, indices_of, read_manifest
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import INPUT_DIRECTORY, OUTPUT_FILE, one_line
from helix_megatron.outputs import check_file, check_free

PROGRAM = "python -m helix_megatron.deepspeed.merge"


def merge_checkpoint(
    directory: str | os.PathLike[str],
    tag: str | None = None,
    *,
    prefix: str = "",
    trust: bool = False,
) -> dict[str, Any]:
    """The whole model's state dictionary, in the dtype of training (bf16, fp16 or fp32), on the CPU.

    Parameters and buffers, tied weights under all their names, as `model.state_dict()` has them: plain
    `transformers` loads it.

    Args:
        directory: as passed to `engine.save_checkpoint`.
        tag: which checkpoint; the one that `latest` names when None.
        prefix: keep only names that begin with it, and take it away: of the model inside a module of one's own.
        trust: read the files as pickle would: whatever is in them may run.

    Raises:
        HelixError: no checkpoint of a Hugging Face model that is cut, or one of ZeRO 3, whose model files hold
            no weights, or a file that holds what could run code.
    """
    import torch

    checkpoint = find_checkpoint(directory, tag)
    manifest = read_manifest(checkpoint)
    if manifest["host"] != "Hugging Face":
        raise HelixError(
            f"{checkpoint} is of a {manifest['host']} model, which this does not merge. Convert it with "
            "scripts/convert_checkpoint.py."
        )
    if any(checkpoint.glob("layer_*_expert_*_model_states.pt")):
        raise HelixError(
            f"{checkpoint} has experts of DeepSpeed's own MoE layer, which no Hugging Face model has. "
            "Load it into an engine with the same block."
        )
    ranks = manifest["block"]["tensor_parallel_size"]
    states = [_module_state(checkpoint, rank, trust) for rank in range(ranks)]
    whole: dict[str, Any] = {}
    joined: dict[tuple[int, ...], Any] = {}  # tied weights stay one tensor
    for name, first in states[0].items():
        if not name.startswith(prefix) or not isinstance(first, torch.Tensor):
            continue
        number = manifest["parameters"].get(name)
        if number is None:
            whole[name.removeprefix(prefix)] = first
            continue
        parts: list[Any] = [state.get(name) for state in states]
        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise HelixError(f"a file of {checkpoint} lacks {name}: they are of different models.")
        key = (number, *(part.data_ptr() for part in parts))
        if key not in joined:
            joined[key] = _joined(manifest["cuts"][number], parts, f"{name} of {checkpoint}")
        whole[name.removeprefix(prefix)] = joined[key]
    if not whole:
        raise HelixError(f"{checkpoint} has no weight whose name begins with {prefix!r}.")
    return whole


def _joined(cut: dict[str, Any], parts: Sequence[Any], name: str) -> Any:
    """A whole weight; a manifest of larger parts than there are would ask for any amount of memory."""
    from helix_megatron.huggingface import Cut

    dim, sizes = cut["dim"], [sum(length for _, length in runs) for runs in cut["runs"]]
    if any(
        part.dim() <= dim or part.size(dim) != size for part, size in zip(parts, sizes, strict=True)
    ):
        raise HelixError(
            f"the parts of {name} have the shapes {listed(tuple(part.shape) for part in parts)}, and {FILE} "
            f"deals {listed(sizes)} positions of dimension {dim}. They are of different checkpoints."
        )
    return Cut(dim, indices_of(cut)).join(parts)


def _module_state(checkpoint: Path, rank: int, trust: bool) -> dict[str, Any]:
    path = checkpoint / f"mp_rank_{rank:02d}_model_states.pt"
    if not path.is_file():
        if any(checkpoint.glob("zero_pp_rank_*_model_states.pt")):
            raise HelixError(
                f"{checkpoint} was saved with ZeRO 3, whose model files hold no whole parts. Load it into the "
                "engine and call helix_megatron.huggingface.save_pretrained inside "
                "deepspeed.zero.GatheredParameters, or save with ZeRO 0, 1 or 2."
            )
        raise HelixError(f"{checkpoint} lacks {path.name}: the checkpoint is incomplete.")
    state = load_pt(path, mmap=True, trust=trust)
    module = state.get("module") if isinstance(state, dict) else None
    if not isinstance(module, dict) or not all(isinstance(name, str) for name in module):
        raise HelixError(f"{path} has no 'module': DeepSpeed did not write it.")
    return module


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Wrong input prints one paragraph and exits with 2."""
    parser = Parser(
        prog=PROGRAM,
        description="Whole Hugging Face weights from a DeepSpeed checkpoint of a cut model.",
    )
    parser.add_argument(
        "directory", type=INPUT_DIRECTORY, help="what was passed to engine.save_checkpoint"
    )
    parser.add_argument("output", type=OUTPUT_FILE, help="the safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument(
        "--tag",
        type=one_line,
        help="which checkpoint (default: the one that DIRECTORY/latest names)",
    )
    parser.add_argument(
        "--prefix",
        type=one_line,
        help="of the model's names inside a module of your own",
    )
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="read pickles that could run code of whoever wrote them; only for files that are your own",
    )
    with exit_on_error(PROGRAM):
        args = parser.parse_args(argv)
        check_file("output", args.output)
        check_free([Path(args.output)], overwrite=args.overwrite)
        whole = merge_checkpoint(
            args.directory, args.tag, prefix=args.prefix or "", trust=args.trust_checkpoint
        )
        _write(whole, args.output)
        print(f"{len(whole)} tensors written to {args.output}")


def _write(whole: dict[str, Any], output: str) -> None:
    """safetensors takes no tensor twice: a tied weight is written under its first name, as the library does."""
    from helix_megatron.checkpoint.huggingface_io import Entry, write_safetensors

    seen: set[int] = set()
    kept = {}
    for name, tensor in whole.items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    try:
        entries = itertools.starmap(Entry.of, kept.items())
        write_safetensors(Path(output), entries, kept.__getitem__)
    except OSError as error:
        raise HelixError(f"cannot write {output}: {error}. Check the directory.") from error


if __name__ == "__main__":
    main(sys.argv[1:])
