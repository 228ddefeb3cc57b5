"""`helix convert SOURCE TARGET --to KIND`: flags of a conversion. `--help` starts without torch."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.flags import INPUT_DIRECTORY, OUTPUT_DIRECTORY, one_line, whole

DESCRIPTION = """\
Convert a checkpoint between Hugging Face safetensors, Megatron's distributed checkpoints in canonical order
(what --save and --load of the training script and stock Megatron use), and one file per rank as DeepSpeed
writes them. What SOURCE is, is found out. TARGET is a directory that does not exist; it appears when it is
complete, and an interrupted conversion goes on where it was when the same command is given again."""
LAYOUT = (  # flag, field of `RankOptions` or `HelixConfig`, metavar, default, help
    ("--tensor-model-parallel-size", "tensor", "P", 1, "ranks p = m·n"),
    ("--pipeline-model-parallel-size", "pipeline", "PP", 1, "pipeline stages"),
    ("--expert-model-parallel-size", "expert", "EP", 1, "ranks for experts"),
    (
        "--expert-tensor-parallel-size",
        "expert_tensor",
        "ETP",
        None,
        "tensor parallel ranks inside an expert; P when not given",
    ),
    (
        "--intra-head-parallel-size",
        "intra_head_parallel_size",
        "M",
        1,
        "segments m of a head; 1 is stock attention",
    ),
    (
        "--make-vocab-size-divisible-by",
        "vocabulary_multiple",
        "N",
        1,
        "pad each rank's rows of the vocabulary to a multiple of this, as in training",
    ),
)
MOST_RANKS = 10**6
MOST_BYTES = 10**18
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser of `helix convert`."""
    parser = Parser(prog=program, description=DESCRIPTION)
    add = parser.add_argument
    add(
        "source",
        type=INPUT_DIRECTORY,
        metavar="SOURCE",
        help="directory of checkpoints, one checkpoint, or a model",
    )
    add("target", type=OUTPUT_DIRECTORY, metavar="TARGET", help="directory to write")
    add("--to", required=True, choices=("canonical", "huggingface", "ranks"), help="kind of TARGET")
    add(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="of all weights; as they are when not given",
    )
    add(
        "--shard-size",
        type=one_line,
        metavar="SIZE",
        help="largest file, such as 500MB. Not given: the Hugging Face files that the weights came from are "
        "made again, others have 5GB, canonical ones 250MB",
    )
    add("--dry-run", action="store_true", help="print every tensor that would be written, and stop")
    add("--verify", action="store_true", help="read the result back and compare it bit for bit")
    add("--overwrite", action="store_true", help="replace TARGET once the new one is complete")
    add(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="begin anew after an interruption",
    )
    add(
        "--no-verify-source",
        dest="verify_source",
        action="store_false",
        help="do not check SOURCE against the sizes and hashes in its manifest",
    )
    add(
        "--trust-checkpoint",
        dest="trust",
        action="store_true",
        help="read pickles that could run code of whoever wrote them; only for files that are your own",
    )
    ranks = parser.add_argument_group("files per rank (--to ranks)")
    add = ranks.add_argument
    for flag, field, metavar, default, text in LAYOUT:
        add(
            flag,
            dest=field,
            type=whole(largest=MOST_RANKS),
            metavar=metavar,
            default=default,
            help=text,
        )
    add(
        "--helix-query-layout",
        choices=HelixConfig.choices("query_layout"),
        default="auto",
        help="whether query heads are cut, as in training",
    )
    add(
        "--tag",
        type=one_line,
        default="global_step0",
        help="directory of the rank files, as DeepSpeed calls it",
    )
    add(
        "--like",
        type=INPUT_DIRECTORY,
        metavar="DIR",
        help="for a SOURCE of rank files without helix.json: converted rank files of the same model and layout",
    )
    local = parser.add_argument_group("another architecture")
    local.add_argument(
        "--attention",
        choices=("exact", "segment-local"),
        default="exact",
        help="segment-local: h·m heads of d/m dimensions. Loses quality",
    )
    local.add_argument(
        "--segments", type=whole(), metavar="M", help="m, with --attention segment-local"
    )
    local.add_argument(
        "--allow-quality-loss", action="store_true", help="needed with --attention segment-local"
    )
    return parser


def main(argv: Sequence[str] | None = None, program: str = "helix convert") -> int:
    """Convert as `argv` says; exit status, 2 for what the user can put right."""
    # Of torch, before its first tensor: the kernel then clears memory in pages of 2 MB, five times as fast.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with exit_on_error(program):
        _run(build_parser(program).parse_args(argv))
        return 0
    raise AssertionError("exit_on_error leaves by itself")


def parse_size(text: str) -> int:
    """Bytes: `5GB` is 5·10⁹, `5GiB` 5·2³⁰.

    Raises:
        HelixError: neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    size = float(match[1]) * UNITS.get(match[2].lower(), 0) if match else 0
    if not 1 <= size <= MOST_BYTES:
        raise HelixError(
            f"{text!r:.60} is no size. Give bytes, at least one, or a number with kB, MB, GB, MiB or GiB."
        )
    return int(size)


def _run(args: argparse.Namespace) -> None:
    _check(args)
    size = None if args.shard_size is None else parse_size(args.shard_size)
    helix = HelixConfig(args.intra_head_parallel_size, query_layout=args.helix_query_layout)
    from helix_megatron.checkpoint.convert import Options, RankOptions, convert

    like = None if args.like is None else Path(args.like)
    given = vars(args) | {"shard_size": size, "helix": helix, "like": like}
    given["ranks"] = RankOptions(**_fields_of(RankOptions, given))
    options = Options(**_fields_of(Options, given))
    written = convert(args.source, args.target, args.to, options, dry_run=args.dry_run)
    if written is not None:
        print(f"Wrote {written}.")


def _fields_of(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {field.name: given[field.name] for field in fields(kind)}


def _check(args: argparse.Namespace) -> None:
    if (args.attention == "segment-local") != (args.segments is not None):
        raise HelixError(
            "--attention segment-local and --segments M belong together: M is how many segments a head is cut "
            "into. Give both or neither."
        )
    flags = [flag for flag, field, _, default, _ in LAYOUT if getattr(args, field) != default]
    if flags and args.to != "ranks":
        raise HelixError(
            f"{flags[0]} has no effect with --to {args.to}: that holds whole tensors, which load at any "
            "layout. Leave it out, or take --to ranks."
        )
    if args.shard_size is not None and args.to == "ranks":
        raise HelixError(
            "--shard-size has no effect with --to ranks: each rank has one file. Leave it out."
        )


if __name__ == "__main__":
    sys.exit(main())
