#!/usr/bin/env python3
"""NVIDIA's own unit tests of attention, with stock attention and with the Helix layer in place, side by side.

    scripts/upstream_tests.py ../Megatron-LM                       # heads in 2 segments, then in 4
    scripts/upstream_tests.py ../Megatron-LM --segments 2 -k num_query_groups

Runs on CPU ranks over gloo; the checkout stays as it is. The Python's megatron-core has to be of the checkout's
minor version. A star marks a test that has built a Helix layer; the others have no tensor parallel size that m
divides. Exit status: 0 if every test that passes with stock attention passes with Helix, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helix_megatron.arguments import exit_on_error  # noqa: E402
from helix_megatron.errors import HelixError  # noqa: E402
from helix_megatron.megatron_lm.source import core_version  # noqa: E402
from helix_megatron.run.local_ranks import start_ranks  # noqa: E402
from helix_megatron.versions import dotted, found_version, numbers  # noqa: E402

TESTS = "tests/unit_tests/transformer/test_attention.py"
Outcomes = dict[str, list[Any]]
"""By name of the test: passed, skipped or failed; why not passed; whether it built a Helix layer."""
ABSENT = ["failed", "not every rank has run it", False]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of a Megatron-LM checkout")
    parser.add_argument("--tests", default=TESTS, help=f"file in the checkout; default {TESTS}")
    parser.add_argument("--ranks", type=int, default=4, help="default 4")
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="pytest's: only some tests")
    given = parser.parse_args()
    with exit_on_error(parser.prog):
        version = core_version(given.checkout)
        installed = found_version("megatron-core") or "none"
        if numbers(installed)[:2] != version[:2]:
            raise HelixError(
                f"{given.checkout} is of megatron-core {dotted(version)}, and this Python has {installed}. Run "
                f"it in an environment with megatron-core {dotted(version[:2])}."
            )
        print(f"{given.tests}, megatron-core {dotted(version)}, {given.ranks} ranks", flush=True)
        sides = {size: outcomes(given, size) for size in (1, *given.segments)}
        return report(sides)


def outcomes(given: argparse.Namespace, segments: int) -> Outcomes:
    """Run the tests on all ranks; a test passes if it does on each."""
    checkout = given.checkout.resolve()
    with tempfile.TemporaryDirectory(prefix="helix-upstream-") as folder:
        os.environ |= {
            "HELIX_SEGMENTS": str(segments),
            "HELIX_FOLDER": folder,
            "PYTHONPATH": os.pathsep.join(map(str, (checkout, ROOT, ROOT / "scripts"))),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "upstream_conftest"]
        command += ["-p", "no:terminal", "-p", "no:cacheprovider", "-c", os.devnull]
        command += ["--rootdir", str(checkout), *(["-k", given.k] if given.k else [])]
        status = start_ranks(given.ranks, [*command, str(checkout / given.tests)])
        files = sorted(Path(folder).glob("rank-*.json"))
        if status or len(files) != given.ranks:
            raise HelixError(
                f"a rank ended with exit status {status} before its tests had. Try fewer, with -k."
            )
        return _together([json.loads(file.read_text()) for file in files])


def _together(ranks: list[Outcomes]) -> Outcomes:
    every: Outcomes = {}
    for name in ranks[0]:
        found = [rank.get(name, ABSENT) for rank in ranks]
        every[name] = min(found, key=lambda one: ("failed", "skipped", "passed").index(one[0]))
    return every


def report(sides: dict[int, Outcomes]) -> int:
    """Print the table; 1 if a test passes with stock attention alone."""
    stock, *cut = sides.values()
    worse = 0
    print("  ".join(f"{side:9}" for side in ("stock", *(f"m = {m}" for m in [*sides][1:]))))
    for name, (result, why, _) in stock.items():
        columns = [side.get(name, ABSENT) for side in (stock, *cut)]
        lost = [text for state, text, _ in columns if result == "passed" != state]
        worse += bool(lost)
        note = f"  ({lost[0] if lost else why})" if lost or why else ""
        states = (f"{state}{' *' if cut else ''}" for state, _, cut in columns)
        print("  ".join(f"{state:9}" for state in states) + f"  {name}{note[:110]}")
    counts = [sum(state == "passed" for state, *_ in side.values()) for side in sides.values()]
    print(
        f"passed of {len(stock)}: {counts[0]} with stock attention; "
        + ", ".join(f"{n} with m = {m}" for m, n in zip([*sides][1:], counts[1:], strict=True))
        + f"; {worse} with stock attention alone."
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
