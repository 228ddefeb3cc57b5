"""The recipe of docs/serving.md for Kubernetes asks for what the server has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_engine import FakeEngine, FakeTokens

from helix_megatron.serving.app import make_app
from helix_megatron.serving.command import build_parser
from helix_megatron.serving.settings import ServerSettings

DOCS = Path(__file__).parents[2] / "docs/serving.md"


@pytest.fixture
def pod() -> dict[str, Any]:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return yaml.safe_load(text)["spec"]["template"]["spec"]


def test_its_command_is_one(pod):
    """Flags that exist, with a rank for each GPU; and it is told to end later than it has drained."""
    (container,) = pod["containers"]
    program, command, *flags = container["command"]
    assert (program, command) == ("helix", "serve")
    options = build_parser().parse_args(flags)
    assert options.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.drain_seconds + 5 < pod["terminationGracePeriodSeconds"]


def test_its_probes_are_answered(pod):
    """At the port where it listens."""
    (container,) = pod["containers"]
    options = build_parser().parse_args(container["command"][2:])
    app = make_app(FakeEngine(), FakeTokens(), ServerSettings("model"))
    for name in ("startupProbe", "readinessProbe"):
        asked = container[name]["httpGet"]
        assert asked["path"] in app.openapi()["paths"]
        assert asked["port"] == options.port
