"""`helix doctor` in this environment: versions, hosts, kernels, and what to do."""

from __future__ import annotations

import sys
import types

import pytest

from helix_megatron import cli, doctor, versions
from helix_megatron.core.kernels.installed import installed_kernels
from helix_megatron.doctor import HOSTS, Host
from helix_megatron.versions import TESTED


def examine(capsys, *hosts: Host, monkeypatch) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "HOSTS", hosts or HOSTS)
    code = cli.main(["doctor"])
    return code, capsys.readouterr().out


def test_everything_works_here(capsys, monkeypatch):
    """The tests run in an environment with all hosts, so all of them must be found in order."""
    code, text = examine(capsys, monkeypatch=monkeypatch)
    assert code == 0, text
    for package, tested in TESTED.items():
        found = versions.found_version(package)
        assert f"{package:<15} {found:<14} {tested.lowest} to {tested.newest}\n" in text
    for host in HOSTS:
        assert f"  {host.name:<15} works\n" in text
    assert "apex" in text
    assert installed_kernels().summary() in text
    assert text.endswith("All that is installed works.\n")


def test_a_host_that_is_not_installed_is_no_problem(capsys, monkeypatch):
    """Whoever does not use DeepSpeed needs only to know how to get it."""
    host = Host("Other", ("no-such-package",), ("nothing",), "nothing:check", "pip install other")
    code, text = examine(capsys, host, monkeypatch=monkeypatch)
    assert code == 0
    assert "  Other           not installed (no-such-package): pip install other\n" in text


def test_a_release_outside_the_range(capsys, monkeypatch):
    """It is marked in the table, and what to do is said once."""
    real = versions.found_version

    def found(package: str) -> str | None:
        return "99.0.0" if package == "torch" else real(package)

    def check() -> list[str]:
        versions.require("torch")
        raise AssertionError("not refused")

    for module in (doctor, versions):
        monkeypatch.setattr(module, "found_version", found)
    fake = types.ModuleType("fake_host")
    fake.check = check  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_host", fake)
    hosts = [Host(name, ("torch",), (), "fake_host:check", "") for name in ("One", "Two")]
    code, text = examine(capsys, *hosts, monkeypatch=monkeypatch)
    assert code == 1
    assert "<- outside" in next(line for line in text.splitlines() if line.startswith("torch "))
    assert text.count("torch 99.0.0 is installed, and Helix was tested with") == 1
    assert "  Two             does not work\n" in text


def test_a_release_that_renamed_what_we_import(capsys, monkeypatch):
    """An ImportError of a host is a sentence with its version, and no traceback."""
    monkeypatch.setitem(sys.modules, "fake_host", types.ModuleType("fake_host"))
    host = Host("Other", ("torch",), ("fake_host.renamed",), "", "pip install other")
    code, text = examine(capsys, host, monkeypatch=monkeypatch)
    assert code == 1
    found = versions.found_version("torch")
    assert f"  Other cannot be imported with torch {found}: ModuleNotFoundError: " in text
    assert text.endswith("Install tested versions: pip install other.\n")


def test_missing_parts_are_said(capsys, monkeypatch):
    """What a host's own check finds is passed on as it is."""
    fake = types.ModuleType("fake_host")
    fake.check = lambda: ["torch has no such_thing, which Other replaces."]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_host", fake)
    host = Host("Other", ("torch",), (), "fake_host:check", "")
    code, text = examine(capsys, host, monkeypatch=monkeypatch)
    assert code == 1
    assert text.endswith("what to do\n  torch has no such_thing, which Other replaces.\n")


def test_patch_needs_a_checkout(capsys):
    """A flag that has no effect alone says so."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--patch"])
    assert ended.value.code == 2
    assert "--patch needs --megatron PATH" in capsys.readouterr().err
