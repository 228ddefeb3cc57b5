"""A run that has left the finite numbers ends with a sentence, and its good checkpoints are safe."""

from __future__ import annotations

import pytest
from pool import RankError
from training_runs import BASE, run

from helix_megatron.checkpoint.store import Store


def test_a_loss_that_is_not_finite_ends_the_run(pool, tmp_path):
    """The learning rate ruins the weights in iteration 2: what was saved before stays, and is named.

    The sentence must tell iteration, loss and checkpoint; --keep 1 must not have removed iteration 1 for one
    that was never seen to train on.
    """
    run(pool, f"{BASE} --train-iters 1 --lr-decay-iters 4 --save {tmp_path} --keep 1")
    flags = f"{BASE} --train-iters 4 --save {tmp_path} --load {tmp_path} --save-interval 1 --keep 1"
    ruined = f"{flags} --lr 1e36 --override-opt-param-scheduler"
    with pytest.raises(RankError, match="DivergenceError") as caught:
        run(pool, ruined)
    assert "iteration 3 has a loss of nan" in str(caught.value)
    assert f"The last good checkpoint is {tmp_path / 'iter_0000002'}" in str(caught.value)
    assert "--ckpt-step takes an earlier one: 1." in str(caught.value)
    assert Store(tmp_path).complete() == [1, 2]
    records = run(pool, f"{ruined} --no-check-for-nan-in-loss-and-grad")
    assert [record["iteration"] for record in records] == [3, 4]
    assert Store(tmp_path).complete()[-1] == 2, "a state with NaN is never saved"


def test_weights_that_are_not_finite_are_not_saved(pool, tmp_path):
    """The loss of an iteration is that of the weights before it: those after it are looked at, too."""
    flags = f"{BASE} --fp16 --loss-scale 1 --lr 1e6 --train-iters 1 --save {tmp_path}"
    with pytest.raises(
        RankError, match=r"iteration 1 is not saved: \S+ holds numbers that are NaN"
    ):
        run(pool, flags)
    assert Store(tmp_path).complete() == []


def test_steps_that_are_all_skipped_end_the_run(pool, tmp_path):
    """fp16 with a loss scale that always overflows trains nothing, and would do so for ever with status 0."""
    flags = f"{BASE} --fp16 --loss-scale 1e12 --train-iters 3 --save {tmp_path}"
    with pytest.raises(
        RankError, match="every one of the last 3 steps, up to iteration 3, was skipped"
    ):
        run(pool, flags)
    assert Store(tmp_path).complete() == []


def test_a_few_skipped_steps_are_how_a_loss_scale_is_found(pool):
    """A dynamic scale begins too high by design."""
    records = run(pool, f"{BASE} --fp16 --initial-loss-scale 1048576 --train-iters 24")
    assert records[0]["skipped"] and not records[-1]["skipped"]
