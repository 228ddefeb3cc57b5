"""What `--load` finds, and what it says of a run that differs from the one that saved."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from crashes import save
from training_runs import BASE, run

from helix_megatron.checkpoint.manifest import MANIFEST_NAME
from helix_megatron.checkpoint.store import POINTER, Store
from helix_megatron.errors import HelixError
from helix_megatron.run.settings import Checkpoints
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.checkpoint_flags import find_checkpoint
from helix_megatron.training.resumed import check_schedule, data_facts, differing_data
from helix_megatron.training.validate import validate


def found(load: Path | str, store: Path | str) -> Path | None:
    return find_checkpoint(Checkpoints(load=str(load), save=str(store)))


@pytest.mark.parametrize("damage", ["the checkpoint is gone", "the manifest is gone", "no pointer"])
def test_damage_is_no_first_start(tmp_path, damage):
    """A job that is restarted with one command must not begin anew after its checkpoint is lost."""
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


SCHEDULE = {
    "max_lr": 3e-3,
    "min_lr": 0.0,
    "lr_warmup_steps": 8,
    "num_steps": 8,
    "lr_decay_style": "cosine",
    "lr_decay_steps": 40,
    "start_wd": 0.01,
    "end_wd": 0.01,
    "wd_incr_style": "constant",
    "wd_incr_steps": 40,
}
OTHER_SCHEDULES = {
    "--lr is 0.003 there and 0.004 here. Give": {"max_lr": 4e-3},
    "--lr-warmup-iters is 2 there and 3 here": {"lr_warmup_steps": 12},
    "--train-iters is 10 there and 20 here": {"wd_incr_steps": 80},
    "--lr-decay-style is cosine there and linear here": {"lr_decay_style": "linear"},
    "--weight-decay is 0.01 there and 0.1 here": {"start_wd": 0.1, "end_wd": 0.1},
}


@pytest.mark.parametrize("text", OTHER_SCHEDULES)
def test_another_schedule_is_named_by_its_flags(text):
    """Megatron's own comparison speaks of class values, in samples, and is gone under `python -O`."""
    with pytest.raises(HelixError, match=f"differs from the checkpoint's: {text}"):
        check_schedule(SCHEDULE, SCHEDULE | OTHER_SCHEDULES[text], 4, 4)


def test_another_global_batch_size_is_what_is_named():
    """The schedule counts samples: twice the batch doubles every length, and none of these was changed."""
    ours = SCHEDULE | {"lr_warmup_steps": 16, "lr_decay_steps": 80, "wd_incr_steps": 80}
    with pytest.raises(HelixError) as caught:
        check_schedule(SCHEDULE, ours, 4, 8)
    assert "checkpoint's: --global-batch-size is 4 there and 8 here. Give" in str(caught.value)


def test_an_older_schedule_is_read_by_its_names():
    """Checkpoints of Megatron from before have other names for the same numbers."""
    names = {"max_lr": "start_lr", "lr_warmup_steps": "warmup_iter", "lr_decay_steps": "end_iter"}
    older = {names.get(name, name): value for name, value in SCHEDULE.items()}
    check_schedule(older, SCHEDULE, None, 4)
    with pytest.raises(HelixError, match="--lr-warmup-iters is 8 there and 12 here"):
        check_schedule(older, SCHEDULE | {"lr_warmup_steps": 12}, None, 4)


def test_the_schedule_is_compared_without_assertions_too():
    """Under -O a changed schedule was taken for the checkpoint's, past whose end the learning rate is 0."""
    program = (
        "from helix_megatron.training.resumed import check_schedule\n"
        f"check_schedule({SCHEDULE}, {SCHEDULE | {'max_lr': 1.0}}, 4, 4)"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, check=False
    )
    assert "--lr is 0.003 there and 1 here" in done.stderr


def rates_of_steps(flags: str) -> list[float]:
    """The learning rate with which each step of a run on this rank was taken."""
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.loop import Trainer
    from helix_megatron.training.pretrain import training

    cpu_runtime.install()
    rates: list[float] = []
    step = Trainer._step

    def spied(self, *arguments):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *arguments)

    Trainer._step = spied
    try:
        list(training(validate(parse_args(flags.split()), 1)))
    finally:
        Trainer._step = step
    return rates


def test_the_first_step_goes_by_the_chosen_schedule(pool, tmp_path):
    """Either flag decides from the first step on, not from the second."""
    flags = f"{BASE} --lr-decay-style constant --train-iters 4"
    run(pool, f"{flags} --save {tmp_path} --exit-interval 2")
    more = f"{flags} --lr 4e-3 --load {tmp_path}"
    taken = pool.run(rates_of_steps, f"{more} --override-opt-param-scheduler", world_size=1)[0]
    assert taken == [4e-3, 4e-3]
    kept = pool.run(rates_of_steps, f"{more} --use-checkpoint-opt-param-scheduler", world_size=1)[0]
    assert kept == [3e-3, 3e-3]


def test_what_differs_in_the_data_is_said(tmp_path):
    """Another text under the same name, seed, length or batch changes the samples: one line says which, and
    that they do not begin anew. A text that was only moved is the same."""
    here, moved, other = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    here.write_bytes(b"some text " * 100)
    moved.write_bytes(here.read_bytes())
    other.write_bytes(b"more text " * 100)

    def facts(text: Path, more: str = "") -> dict[str, object]:
        return data_facts(validate(parse_args(f"{BASE} {more} --text {text}".split()), 1))

    before = facts(here)
    assert differing_data(before, facts(moved), 8) is None
    assert differing_data({}, before, 8) is None
    changes = {
        "--seed is 1234 there and 7 here": facts(here, "--seed 7"),
        "--seq-length is 16 there and 8 here": facts(here, "--seq-length 8"),
        "--global-batch-size is 4 there and 8 here": facts(here, "--global-batch-size 8"),
        "the data are a text of 1000 bytes": facts(other),
    }
    for text, after in changes.items():
        line = differing_data(before, after, 8)
        assert line is not None and text in line and "\n" not in line
        assert "Data do not begin anew: the first 8 samples" in line


def notes_of(flags: str) -> list[str]:
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.pretrain import training

    cpu_runtime.install()
    notes: list[str] = []
    list(training(validate(parse_args(flags.split()), 1), note=notes.append))
    return notes


def test_a_run_says_what_differs_from_its_checkpoint(pool, tmp_path):
    """The manifest carries what a later run is compared with; the same run has nothing to say."""
    run(pool, f"{BASE} --train-iters 4 --exit-interval 2 --save {tmp_path}")
    flags = f"{BASE} --train-iters 4 --load {tmp_path}"
    differing = pool.run(notes_of, f"{flags} --seed 7 --seq-length 8", world_size=1)[0]
    assert [line for line in differing if "Warning" in line] == [
        "Warning: this run differs from the checkpoint's: --seed is 1234 there and 7 here; --seq-length is "
        "16 there and 8 here. Data do not begin anew: the first 8 samples in this run's order are passed "
        "over. With --finetune they begin anew, and so do iterations and the optimizer."
    ]
    assert not [line for line in pool.run(notes_of, flags, world_size=1)[0] if "Warning" in line]
