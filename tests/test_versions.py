"""Releases outside the tested ranges are named, with what to do; the locks lie at the ranges' ends."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helix_megatron import versions
from helix_megatron.errors import HelixError
from helix_megatron.versions import PYTHONS, TESTED, VersionRange, found_version, numbers, require

LOCKS = Path(__file__).parent.parent / "scripts" / "locks"
RANGE = VersionRange("transformers", "5.2.0", "5.24.0")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0+cpu", (2, 13, 0)),
        ("0.20.0rc0", (0, 20, 0)),
        ("2.9", (2, 9, 0)),
        ("2.6.0a0+ecf3bae40a.nv25.01", (2, 6, 0)),
        ("unknown", (0, 0, 0)),
    ],
)
def test_numbers_of_a_version(version, expected):
    """Local builds and development versions of NVIDIA's containers must not fail to parse."""
    assert numbers(version) == expected


@pytest.mark.parametrize("version", ["5.2.0", "5.9.3", "5.24.0", "5.2.0a1"])
def test_a_tested_release_passes_in_silence(version):
    """Nobody wants a warning for what works."""
    assert RANGE.contains(version)
    assert RANGE.check(version) == ""


@pytest.mark.parametrize("version", ["5.24.1", "5.25.0rc1", "5.26.0.dev0"])
def test_patches_and_development_versions_are_remarked_on(version):
    """A patch release must not stop anybody's training."""
    assert RANGE.check(version) == (
        f"transformers {version} is installed, and Helix was tested with transformers 5.2.0 to 5.24.0. It is "
        "expected to work."
    )


@pytest.mark.parametrize("version", ["5.1.4", "4.57.0", "5.25.0", "6.0.0", "5.1.0rc1"])
def test_another_minor_release_is_refused(version):
    """One clear sentence, in place of whatever an unknown release does later."""
    with pytest.raises(HelixError) as error:
        RANGE.check(version)
    assert str(error.value) == (
        f"transformers {version} is installed, and Helix was tested with transformers 5.2.0 to 5.24.0. Try pip "
        "install 'transformers>=5.2.0,<5.25', or set HELIX_UNTESTED_VERSIONS=1 to go on with this one."
    )


def test_require(monkeypatch):
    """Refused, gone on with where the user says so, left alone where it is not installed."""
    monkeypatch.setattr(versions, "found_version", {"torch": "9.0.0", "accelerate": None}.get)
    monkeypatch.delenv(versions.GO_ON, raising=False)
    require("accelerate")
    with pytest.raises(HelixError, match=r"torch 9\.0\.0 is installed"):
        require("accelerate", "torch")
    monkeypatch.setenv(versions.GO_ON, "1")
    with pytest.warns(UserWarning, match=r"torch 9\.0\.0 is installed"):
        require("torch")


def test_the_core_that_would_be_imported_counts(tmp_path, monkeypatch):
    """A checkout of Megatron-LM comes before the installed wheel, and is not imported to be asked."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert found_version("megatron-core") == importlib.metadata.version("megatron-core")
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (core / "package_info.py").write_text(
        "MAJOR = 0\nMINOR = 20\nPATCH = 0\nPRE_RELEASE = 'rc0'\nVERSION = (MAJOR, MINOR)\n"
    )
    program = (
        "from helix_megatron.versions import found_version; print(found_version('megatron-core'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{tmp_path}:{LOCKS.parent.parent}"},
    )
    assert run.stdout.strip() == "0.20.0rc0"


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("helix_megatron.megatron.specs", "megatron-core"),
        ("helix_megatron.huggingface", "transformers"),
        ("helix_megatron.deepspeed", "deepspeed"),
    ],
)
def test_a_host_outside_its_range_is_refused_at_import(module, package):
    """Before anything of the package is imported, which may fail in any way."""
    program = (
        "import sys, importlib.metadata as metadata\n"
        "from helix_megatron import versions\n"
        "real = versions.found_version\n"
        f"versions.found_version = lambda name: '99.1.0' if name == {package!r} else real(name)\n"
        "try:\n"
        f"    import {module}\n"
        "except versions.HelixError as error:\n"
        f"    assert {package.replace('-', '.').removesuffix('.core')!r} not in sys.modules\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(f"{package} 99.1.0 is installed, and Helix was tested with")


# --------------------------------------------------------------------------------- locks


def locked(name: str) -> dict[str, str]:
    """Package → version of a lock."""
    lines = (LOCKS / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", [*(f"py{python}" for python in PYTHONS), "lowest"])
def test_locks_hold_tested_versions(name):
    """What the scripts install lies within the ranges, its ends at the ends."""
    versions_of = locked(name)
    for package, tested in TESTED.items():
        assert tested.contains(versions_of[package]), (package, versions_of[package])
        if name == "lowest":
            assert versions_of[package] == tested.lowest
    assert re.match(
        r"# Made by scripts/lock\.sh on 20\d\d-\d\d-\d\d for", (LOCKS / f"{name}.txt").read_text()
    )


def test_the_newest_lock_is_at_the_newest_end():
    """A range whose end no environment has is a promise that nobody checked."""
    versions_of = locked("py3.12")
    assert {package: versions_of[package] for package in TESTED} == {
        package: tested.newest for package, tested in TESTED.items()
    }


def test_this_environment_is_locked():
    """An environment that the scripts made has nothing that its lock does not name."""
    constraints = Path(sys.prefix) / "constraints.txt"
    if not constraints.is_file():
        pytest.skip("this environment was not made by the scripts (scripts/environment.sh)")
    lines = [line.split("==") for line in constraints.read_text().splitlines()]
    pins = {canonical(name): version for name, version in lines}
    for distribution in importlib.metadata.distributions():
        name = canonical(distribution.metadata["Name"])
        vendored = "_vendor" in str(distribution.locate_file(""))  # setuptools' own copies
        if vendored or name in ("pip", "helix-megatron"):
            continue
        assert distribution.version.partition("+")[0] == pins.get(name), name


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
