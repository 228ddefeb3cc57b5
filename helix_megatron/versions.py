"""The releases of other packages that Helix is tested with, and what happens with others.

`TESTED` is the one place of these ranges: `setup.py` takes its requirements from it, the locks of the scripts
are resolved at both ends, and a host calls `require` before it imports anything of the package it is for.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron import __version__
from helix_megatron.errors import HelixError

Version = tuple[int, ...]
GO_ON = "HELIX_UNTESTED_VERSIONS"
PYTHONS = ("3.11", "3.12", "3.13")


@dataclass(frozen=True)
class VersionRange:
    """The lowest and the newest release of a package that the tests ran with.

    All minor releases from the one to the other are expected to work, whatever their patch release.
    """

    package: str
    lowest: str
    newest: str

    @property
    def requirement(self) -> str:
        """The range as pip takes it, such as `torch>=2.6.0,<2.16`."""
        major, minor, _ = numbers(self.newest)
        return f"{self.package}>={self.lowest},<{major}.{minor + 1}"

    def contains(self, found: str) -> bool:
        """Whether a release lies between the tested ends, both included."""
        return numbers(self.lowest) <= numbers(found) <= numbers(self.newest)

    def check(self, found: str) -> str:
        """A sentence on a release that the tests did not cover; the empty string for the others.

        Raises:
            HelixError: it is of another minor release than those tested, and no development version of a later
                one, whose user knows that it is untested.
        """
        if self.contains(found):
            return ""
        text = (
            f"{self.package} {found} is installed, and Helix was tested with {self.package} {self.lowest} to "
            f"{self.newest}"
        )
        minor = numbers(found)[:2]
        later = minor > numbers(self.newest)[:2]
        if minor < numbers(self.lowest)[:2] or (later and not _is_development_version(found)):
            raise HelixError(
                f"{text}. Try pip install '{self.requirement}', or set {GO_ON}=1 to go on with this one."
            )
        return f"{text}. It is expected to work."


TESTED = {
    tested.package: tested
    for tested in (
        VersionRange("torch", "2.13.0", "2.15.0"),
        VersionRange("megatron-core", "0.16.1", "0.19.2"),
        VersionRange("transformers", "5.2.0", "5.24.0"),
        VersionRange("accelerate", "1.15.0", "1.15.0"),
        VersionRange("deepspeed", "0.19.0", "0.19.8"),
        VersionRange("safetensors", "0.7.0", "0.8.0"),
        VersionRange("uvicorn", "0.32.0", "0.54.0"),
        VersionRange("llguidance", "1.9.1", "1.9.1"),
    )
}


def installed(*packages: str) -> dict[str, str]:
    """The versions of this package, of Python, and of those of the packages that are installed."""
    versions = {"helix_megatron": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def numbers(version: str) -> Version:
    """The three numbers of a release: (2, 13, 0) of `2.13.0+cpu` and of `2.13`."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(number or 0) for number in found.groups()) if found else (0, 0, 0)


def dotted(version: Version) -> str:
    """`0.16` for (0, 16)."""
    return ".".join(map(str, version))


def _is_development_version(version: str) -> bool:
    """Whether it comes before a release, as `0.20.0rc0` and NVIDIA's `2.16.0a0+nv26.11` do."""
    return re.match(r"[\d.]+(a|b|rc|dev)", version) is not None


def found_version(package: str) -> str | None:
    """The version of a package that Python would import; None if there is none. Imports nothing of it.

    A checkout of Megatron-LM on the search path counts as megatron-core, before an installed one.
    """
    if package == "megatron-core":
        return _core_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _core_version() -> str | None:
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).with_name("package_info.py").read_text(encoding="utf-8")
    return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format_map(constants(ast.parse(source)))


def constants(module: ast.Module) -> dict[str, Any]:
    """The names that a module gives constants to, and these."""
    return {
        target.id: node.value.value
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def require(*packages: str) -> None:
    """Refuse packages outside their tested range; those that are not installed are left to their import.

    Other patch releases and development versions only warn; with HELIX_UNTESTED_VERSIONS=1 all others do, too.

    Raises:
        HelixError: names the version found, the versions tested and what to do.
    """
    for package in packages:
        found = found_version(package)
        if found is None:
            continue
        try:
            remark = TESTED[package].check(found)
        except HelixError as error:
            if os.environ.get(GO_ON, "0") in ("", "0"):
                raise
            remark = str(error)
        if remark:
            warnings.warn(remark, stacklevel=2)
