"""What `--load` finds, and what it says of a run that differs from the one that saved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from crashes import save

from helix_megatron.checkpoint.manifest import MANIFEST_NAME
from helix_megatron.checkpoint.store import POINTER, Store
from helix_megatron.errors import HelixError
from helix_megatron.training.checkpoint_flags import find_checkpoint
from helix_megatron.training.settings import Checkpoints


def found(load: Path | str, store: Path | str) -> Path | None:
    return find_checkpoint(Checkpoints(load=str(load), save=str(store)))


@pytest.mark.parametrize("damage", ["the checkpoint is gone", "the manifest is gone", "no pointer"])
def test_damage_is_no_first_start(tmp_path, damage):
    """A job that is restarted with one command must not train from the beginning after its checkpoint is lost."""
    save(tmp_path, 10, "a")
    if damage == "the checkpoint is gone":
        shutil.rmtree(tmp_path / "iter_0000010")
    else:
        (tmp_path / "iter_0000010" / MANIFEST_NAME).unlink()
    if damage == "no pointer":
        (tmp_path / POINTER).unlink()
    text = "names '10'" if "checkpoint" in damage else "half of a checkpoint"
    with pytest.raises(HelixError, match=text):
        found(tmp_path, tmp_path)


def test_weights_without_an_iteration_are_found_on_a_restart(tmp_path):
    """`release` has no iteration, so a search by iterations alone would begin anew beside it."""
    save(tmp_path, 10, "a")
    (tmp_path / "iter_0000010").rename(tmp_path / "release")
    (tmp_path / POINTER).write_text("release")
    assert found(tmp_path, tmp_path) == tmp_path / "release"


def test_one_directory_by_two_names(tmp_path, monkeypatch):
    """A first start is one whatever the spelling of the directory; another missing directory is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("new", "./new", f"../{tmp_path.name}/new", "link/new", "link/./x/../new"):
        assert found(name, "new") is None, name
    with pytest.raises(HelixError, match="does not exist"):
        found("newer", "new")
    save(tmp_path / "new", 3, "a")
    assert found("link/new", "new") == Path("link/new/iter_0000003")
    assert Store("new").complete() == [3]
