"""`helix convert SOURCE TARGET --to KIND`: flags of a conversion. `--help` starts without torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, exit_on_error

DESCRIPTION = """\
Convert a checkpoint between Hugging Face safetensors, Megatron's distributed checkpoints in canonical order
(what --save and --load of the training script and stock Megatron use), and one file per rank as DeepSpeed
writes them. What SOURCE is, is found out. TARGET is a directory that does not exist; it appears when it is
complete, and an interrupted conversion goes on where it was when the same command is given again."""
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def build_parser(program: str) -> argparse.ArgumentParser:
    """The parser of `helix convert`."""
    parser = argparse.ArgumentParser(prog=program, description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="directory of checkpoints, one checkpoint, or a model")
    add("target", metavar="TARGET", help="directory to write")
    add("--to", required=True, choices=("canonical", "huggingface", "ranks"), help="kind of TARGET")
    add(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="of all weights; as they are when not given",
    )
    add(
        "--shard-size",
        metavar="SIZE",
        help="largest file, such as 500MB. Not given: the Hugging Face files that the weights came from are "
        "made again, others have 5GB, canonical ones 250MB",
    )
    add("--dry-run", action="store_true", help="print every tensor that would be written, and stop")
    add("--verify", action="store_true", help="read the result back and compare it bit for bit")
    add("--overwrite", action="store_true", help="replace TARGET once the new one is complete")
    add("--no-resume", action="store_true", help="begin anew after an interruption")
    add(
        "--no-verify-source",
        action="store_true",
        help="do not check SOURCE against the sizes and hashes in its manifest",
    )
    add(
        "--trust-checkpoint",
        action="store_true",
        help="read pickles that could run code of whoever wrote them; only for files that are your own",
    )
    ranks = parser.add_argument_group("files per rank (--to ranks)")
    add = ranks.add_argument
    add("--tensor-model-parallel-size", type=int, default=1, metavar="P", help="ranks p = m·n")
    add("--pipeline-model-parallel-size", type=int, default=1, metavar="PP", help="pipeline stages")
    add("--expert-model-parallel-size", type=int, default=1, metavar="EP", help="ranks for experts")
    add(
        "--expert-tensor-parallel-size",
        type=int,
        metavar="ETP",
        help="tensor parallel ranks inside an expert; P when not given",
    )
    add(
        "--intra-head-parallel-size",
        type=int,
        default=1,
        metavar="M",
        help="segments m of a head; 1 is stock attention",
    )
    add(
        "--helix-query-layout",
        choices=HelixConfig.choices("query_layout"),
        default="auto",
        help="whether query heads are cut, as in training",
    )
    add(
        "--make-vocab-size-divisible-by",
        type=int,
        default=1,
        metavar="N",
        help="pad each rank's rows of the vocabulary to a multiple of this, as in training",
    )
    add("--tag", default="global_step0", help="directory of the rank files, as DeepSpeed calls it")
    add(
        "--like",
        type=Path,
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
        "--segments", type=int, metavar="M", help="m, with --attention segment-local"
    )
    local.add_argument(
        "--allow-quality-loss", action="store_true", help="needed with --attention segment-local"
    )
    return parser


def main(argv: Sequence[str] | None = None, program: str = "helix convert") -> int:
    """Convert as `argv` says; exit status, 2 for what the user can put right."""
    args = build_parser(program).parse_args(argv)
    with exit_on_error(program):
        _run(args)
        return 0
    raise AssertionError("exit_on_error leaves by itself")


def parse_size(text: str) -> int:
    """Bytes: `5GB` is 5·10⁹, `5GiB` 5·2³⁰.

    Raises:
        HelixError: neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise HelixError(
            f"{text!r} is no size. Give bytes, or a number with kB, MB, GB, MiB or GiB."
        )
    return int(float(match[1]) * UNITS[match[2].lower()])


def _run(args: argparse.Namespace) -> None:
    _check(args)
    size = None if args.shard_size is None else parse_size(args.shard_size)
    helix = HelixConfig(args.intra_head_parallel_size, query_layout=args.helix_query_layout)
    from helix_megatron.checkpoint.convert import Options, RankOptions, convert

    ranks = RankOptions(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
        helix=helix,
        vocabulary_multiple=args.make_vocab_size_divisible_by,
        tag=args.tag,
    )
    options = Options(
        ranks=ranks,
        dtype=args.dtype,
        shard_size=size,
        segments=args.segments,
        allow_quality_loss=args.allow_quality_loss,
        verify=args.verify,
        verify_source=not args.no_verify_source,
        trust=args.trust_checkpoint,
        overwrite=args.overwrite,
        resume=not args.no_resume,
        like=args.like,
    )
    written = convert(args.source, args.target, args.to, options, dry_run=args.dry_run)
    if written is not None:
        print(f"Wrote {written}.")


def _check(args: argparse.Namespace) -> None:
    if (args.attention == "segment-local") != (args.segments is not None):
        raise HelixError(
            "--attention segment-local and --segments M belong together: M is how many segments a head is cut "
            "into. Give both or neither."
        )
    given = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size != 1,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size != 1,
        "--expert-model-parallel-size": args.expert_model_parallel_size != 1,
        "--expert-tensor-parallel-size": args.expert_tensor_parallel_size is not None,
        "--intra-head-parallel-size": args.intra_head_parallel_size != 1,
        "--make-vocab-size-divisible-by": args.make_vocab_size_divisible_by != 1,
    }
    flags = [flag for flag, there in given.items() if there]
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
