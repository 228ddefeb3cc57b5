"""The converter's benchmark measures what it says, and fails when files come back different."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refusal

from helix_megatron.bench import convert
from helix_megatron.bench.__main__ import main


def test_a_small_model_goes_there_and_back(tmp_path, capsys):
    """The whole measurement, small: its figures are in the JSON, and its files are removed."""
    path = tmp_path / "result.json"
    folder = tmp_path / "work"
    folder.mkdir()
    command = ["convert", "--size", "8MB", "--directory", str(folder), "--json", str(path)]
    assert main(command) == 0
    assert list(folder.iterdir()) == []
    results = json.loads(path.read_text())["results"]
    names = [row["name"] for row in results["rows"]]
    assert names.count("plain copy") == 3
    assert results["files_identical"] is True
    sizes = {row["bytes"] for row in results["rows"]}
    assert len(sizes) == 1
    assert 6e6 < sizes.pop() < 10e6
    assert len(results["throughput_relative_to_copy"]) == 2
    for row in results["rows"]:
        assert row["seconds"] > 0
        if row["peak_memory"] is not None:
            assert row["peak_memory"] > row["imported_memory"] > 50e6
    text = capsys.readouterr().out
    assert "- largest tensor" in text
    assert "Files that came back are identical." in text


def test_different_files_fail(tmp_path, capsys, monkeypatch):
    """A benchmark of wrong results would be worthless."""

    def damaged(name: str, source: Path, target: Path, kind: str) -> Any:
        target.mkdir()
        for path in (source.parent / "model").iterdir():
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            (target / path.name).write_bytes(content)
        return convert.Row(name, 1, 1.0, 1.0, 1, 2)

    monkeypatch.setattr(convert, "_converted", damaged)
    assert main(["convert", "--size", "1MB", "--directory", str(tmp_path)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "text"),
    [(["--size", "large"], "no size"), (["--directory", "/nowhere"], "is no directory")],
)
def test_wrong_settings(capsys, command, text):
    """Exit code 2 and one paragraph, before anything is measured."""
    assert text in refusal(capsys, main, ["convert", *command])
