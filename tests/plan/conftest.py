"""What several tests of the planner need."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def old_chip(tmp_path) -> Path:
    """A cluster file of a chip that has fp32 and nothing else."""
    path = tmp_path / "old.yaml"
    path.write_text(
        "chip: {flops: {fp32: 19.5e12}, memory: 80e9, memory_bandwidth: 2e12, units: 108}\n"
        "gpus_per_domain: 8\ndomain_bandwidth: 300e9\nnetwork_bandwidth: 25e9\n"
    )
    return path
