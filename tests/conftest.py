"""What all tests share: one thread per process, the pool of ranks, and skips that say why."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Read once, by torch and OpenMP when they are imported and by the pool's processes: hence up here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron-core compiles small functions: slow
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
if "lo" in (name for _, name in socket.if_nameindex()):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name need not resolve

import hypothesis
import pytest
import tiers
import torch
from pool import RankPool

torch.set_num_threads(1)
# On a busy machine an example, and its making, may take any time.
hypothesis.settings.register_profile(
    "helix", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("helix")


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Ranks of a gloo process group: `pool.run(function, *args, world_size=4)`."""
    ranks = RankPool()
    yield ranks
    ranks.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("helix")
    group.addoption(
        "--full", action="store_true", help="run the full tier, too (see tests/tiers.py)"
    )
    group.addoption(
        "--full-part",
        action="append",
        default=[],
        choices=tiers.PARTS,
        help="run this part of the full tier, too; may be given again",
    )
    group.addoption("--compatibility", action="store_true", help="run the compatibility tier only")


def pytest_configure(config: pytest.Config) -> None:
    """List every skipped and expectedly failing test with its reason, as `-rsx` does."""
    config.option.reportchars += "".join(c for c in "sx" if c not in config.option.reportchars)
    config.addinivalue_line("markers", "full(part): runs with this part of the full tier only")
    tiers.choose(set(tiers.PARTS if config.option.full else config.option.full_part))


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out the tiers that were not asked for; begin with the files that take longest.

    Each of two workers takes the next file, so the last ones must be short.
    """
    names = tiers.COMPATIBILITY if config.option.compatibility else {"": re.compile("")}
    chosen, left, used = [], [], set[str]()
    for item in items:
        mark = item.get_closest_marker("full")
        of = [name for name, pattern in names.items() if pattern.match(item.nodeid)]
        in_tier = of and (not mark or tiers.is_full(*mark.args))
        (chosen if in_tier else left).append(item)
        used.update(of if in_tier else ())
    if config.args_source is not pytest.Config.ArgsSource.ARGS and (names.keys() - used):
        gone = ", ".join(sorted(names.keys() - used))
        session.shouldfail = f"no test of the compatibility tier is called {gone}"
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = chosen
    items.sort(key=lambda item: tiers.LONGEST_FIRST.get(item.path.stem, len(tiers.LONGEST_FIRST)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A skip without a reason is a failure: nobody could tell what would bring the test back."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if reason.strip(": ") in {"", "Skipped", "Skipped: unconditional skip"}:
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: this test is skipped without a reason"
