#!/usr/bin/env python3
"""What a change costs: processor time of everyday commands, here and in an earlier commit, side by side.

`scripts/compare_speed.py REV` checks REV out into a temporary directory and runs each command in turn from both
trees, with the Python that runs this. Processor time (user and system, of all processes of a command) is less
disturbed by other programs than wall time; the ratio is the median over pairs that ran one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = (
    "scripts/pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 "
    "--micro-batch-size 2 --global-batch-size 2 --log-interval 100 --train-iters"
)
COMMANDS = {
    "helix --help": "-m helix_megatron.cli --help",
    "import of the layer": "-c import,helix_megatron.megatron.specs",
    "helix plan": "-m helix_megatron.cli plan --model llama-3-70b --gpus 64",
    "start of training": f"{TRAIN} 1",
    "start and 200 steps": f"{TRAIN} 200",
    "conversion of 100 MB": "-m helix_megatron.bench convert --size 100MB",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Processor time of commands against an earlier commit."
    )
    parser.add_argument("revision", help="a commit, tag or branch to compare with")
    parser.add_argument("--turns", type=int, default=5, help="pairs of runs (default: 5)")
    args = parser.parse_args()
    known = [
        "git",
        "-C",
        str(ROOT),
        "rev-parse",
        "--verify",
        "--quiet",
        f"{args.revision}^{{commit}}",
    ]
    if subprocess.run(known, capture_output=True, check=False).returncode:
        parser.error(f"{args.revision} is no commit, tag or branch of this repository.")
    with checkout(args.revision) as before:
        header = f"{'':22}{args.revision[:10]:>12}{'here':>12}{'ratio of pairs':>22}"
        print(f"{header}   processor seconds, medians", flush=True)
        for name, command in COMMANDS.items():
            show(
                name,
                [(seconds(command, before), seconds(command, ROOT)) for _ in range(args.turns)],
            )
    return 0


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The tree of a commit in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="helix-before-") as name:
        tree = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def seconds(command: str, tree: Path) -> float:
    """Processor time of a command that runs with the package of a tree, in a directory of its own."""
    words = [word.replace(",", " ") for word in command.split()]
    if words[0].startswith("scripts/"):
        words[0] = str(tree / words[0])
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="helix-speed-") as where,
        open(os.devnull, "wb") as nowhere,
    ):
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=where,
            env=environment,
            stdout=nowhere,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{' '.join(words)} failed in {tree}:\n{said.decode(errors='replace')[-2000:]}"
        )
    return usage.ru_utime + usage.ru_stime


def show(name: str, pairs: list[tuple[float, float]]) -> None:
    before, here = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratios = sorted(new / old for old, new in pairs)
    spread = f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
    print(f"{name:22}{before:12.2f}{here:12.2f}{spread:>22}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
