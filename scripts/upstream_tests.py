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
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helix_megatron.arguments import exit_on_error  # noqa: E402
from helix_megatron.errors import HelixError  # noqa: E402
from helix_megatron.flags import whole  # noqa: E402
from helix_megatron.megatron_lm.source import core_version  # noqa: E402
from helix_megatron.run.local_ranks import start_ranks  # noqa: E402
from helix_megatron.versions import dotted, found_version, numbers  # noqa: E402

TESTS = "tests/unit_tests/transformer/test_attention.py"
Outcomes = dict[str, list[Any]]
"""By name of the test: passed, skipped or failed; why not passed; whether it built a Helix layer."""
ABSENT = ["failed", "not run", False]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of a Megatron-LM checkout")
    parser.add_argument("--tests", default=TESTS, help=f"file in the checkout; default {TESTS}")
    parser.add_argument("--ranks", type=int, default=4, help="default 4")
    parser.add_argument("--segments", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="pytest's: only some tests")
    parser.add_argument(
        "--at-once", type=whole(), default=8, help="tests in the same processes; default 8"
    )
    parser.add_argument(
        "--seconds", type=whole(), default=300, help="that a test may take; default 300"
    )
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
        os.environ |= environment(given)
        names = collected(given)
        sides = {size: outcomes(given, names, size) for size in (1, *given.segments)}
        return report(sides)


def environment(given: argparse.Namespace) -> dict[str, str]:
    """Beside those of this process: the checkout's own core, no GPU, and no threads beside a rank's own."""
    return {
        "HELIX_TEST_SECONDS": str(given.seconds),
        "PYTHONPATH": os.pathsep.join(map(str, (given.checkout.resolve(), ROOT, ROOT / "scripts"))),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def pytest_command(given: argparse.Namespace, *more: str) -> list[str]:
    """On the checkout, with our plugin in the place of its conftest.py."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "upstream_conftest"]
    return [
        *command,
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(given.checkout.resolve()),
        *more,
    ]


def collected(given: argparse.Namespace) -> list[str]:
    """Names of the tests, in the order of the file."""
    more = ["--collect-only", "-q", *(["-k", given.k] if given.k else [])]
    listing = subprocess.run(
        pytest_command(given, *more, str(given.checkout.resolve() / given.tests)),
        env=os.environ | {"HELIX_SEGMENTS": "1", "HELIX_FOLDER": os.devnull},
        capture_output=True,
        text=True,
        check=False,
    )
    names = [line.partition("::")[2] for line in listing.stdout.splitlines() if "::" in line]
    if not names:
        raise HelixError(
            f"pytest finds no test in {given.tests}:\n{listing.stdout}{listing.stderr}"
        )
    return names


def outcomes(given: argparse.Namespace, names: list[str], segments: int) -> Outcomes:
    """Run tests on all ranks, a few in the same processes; a test passes if it does on each rank.

    Groups of gloo keep their threads until a process ends, so that a whole file would run out of them. A test
    that ends a process has failed, and those behind it run in new ones.
    """
    found: Outcomes = {}
    while waiting := [name for name in names if name not in found]:
        few = waiting[: given.at_once]
        found |= _some(given, few, segments)
        first = next((name for name in few if name not in found), None)
        if first is not None:
            found[first] = [
                "failed",
                f"a rank ended, or it took longer than {given.seconds} s",
                False,
            ]
    return found


def _some(given: argparse.Namespace, names: list[str], segments: int) -> Outcomes:
    with tempfile.TemporaryDirectory(prefix="helix-upstream-") as folder:
        os.environ |= {"HELIX_SEGMENTS": str(segments), "HELIX_FOLDER": folder}
        file = given.checkout.resolve() / given.tests
        tests = [f"{file}::{name}" for name in names]
        status = start_ranks(given.ranks, pytest_command(given, "-p", "no:terminal", *tests))
        if status == 128 + signal.SIGTERM:
            raise SystemExit(status)
        files = sorted(Path(folder).glob("rank-*.json"))
        return _together([json.loads(file.read_text()) for file in files], given.ranks)


def _together(ranks: list[Outcomes], number: int) -> Outcomes:
    """Of the tests that every rank has run."""
    every: Outcomes = {}
    for name in ranks[0] if len(ranks) == number else ():
        found = [rank[name] for rank in ranks if name in rank]
        if len(found) == number:
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
