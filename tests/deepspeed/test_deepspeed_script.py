"""scripts/train_deepspeed.py: one command, ready configurations, wrong input said in one paragraph."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helix_megatron.deepspeed import read_block
from helix_megatron.training.report_runs import compare, read_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_deepspeed.py"
CONFIGS = ROOT / "scripts" / "configs"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_deepspeed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> str:
    """What the command prints; it must end well and without noise."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    return done.stdout


def metrics_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_four_ranks_train_as_one_process(tmp_path):
    """A model with 2 heads on 4 ranks, with real text; what is written can be reported on."""
    helix, baseline = tmp_path / "helix" / "metrics.jsonl", tmp_path / "baseline" / "metrics.jsonl"
    common = ["--steps", "4", "--seq-length", "16", "--log-interval", "1", "--metrics-jsonl"]
    printed = run(str(CONFIGS / "dense.json"), "--nproc-per-node", "4", *common, str(helix))
    run(str(CONFIGS / "dense_baseline.json"), *common, str(baseline))
    ours, theirs = metrics_of(helix), metrics_of(baseline)
    assert [record["iteration"] for record in ours] == [1, 2, 3, 4]
    for own, other in zip(ours, theirs, strict=True):
        assert own["lm_loss"] == pytest.approx(other["lm_loss"], abs=1e-4)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert ours[-1]["lm_loss"] < ours[0]["lm_loss"] - 0.1
    assert ours[0]["attention_bytes_per_token"] > 0 == theirs[0]["attention_bytes_per_token"]
    assert "iteration 4/4 | lm loss" in printed
    assert f"final loss {ours[-1]['lm_loss']:.6f}, gradient norm" in printed.splitlines()[-1]

    runs = [read_run(path.parent) for path in (helix, baseline)]
    layout = json.loads((helix.parent / "run.json").read_text())["layout"]
    assert (layout["tp"], layout["m"], layout["n"], layout["dp"]) == (4, 2, 2, 1)
    (difference,) = compare(runs).differences.values()
    assert difference.largest <= 1e-4


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_ready_configurations_differ_by_the_block_alone(script, kind):
    """So a comparison of the two is one of Helix, and each passes its own checks."""
    cut, baseline = (
        script.read_config(str(CONFIGS / f"{kind}{end}.json")) for end in ("", "_baseline")
    )
    args = script.parser().parse_args([str(CONFIGS / f"{kind}.json")])
    block = script.check(cut, 4, args)
    assert (block.tensor_parallel_size, block.helix.intra_head_parallel_size) == (4, 2)
    assert script.check(baseline, 4, args) is None
    assert cut["model"]["num_attention_heads"] == 2
    assert read_block({"helix": cut.pop("helix")}) == block
    assert cut == baseline


GOOD = {
    "train_batch_size": 8,
    "model": {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 32},
    "helix": {"intra_head_parallel_size": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "flags", "text"),
    [
        ({"model": None}, "", 'lacks "model", an object with the transformers configuration'),
        ({"model": {"model_type": "lama"}}, "", "transformers refuses \"model\" of type 'lama'"),
        ({"model": GOOD["model"] | {"max_position_embeddings": 8}}, "", "--seq-length 64 is too long"),
        ({"helix": {"intra_head_parallel_size": 3}}, "", 'does not divide the 4 ranks that hold the model'),
        ({"helix": {"intra_head_size": 2}}, "", 'unknown key "intra_head_size"'),
        ({"helix": {"intra_head_parallel_size": 1, "tensor_parallel_size": 4}}, "",
         '2 heads cannot form 4 head groups. Valid numbers of groups: 1, 2. With 4 ranks try '
         '"intra_head_parallel_size": 2.'),
        ({"train_batch_size": 6, "helix": {}}, "", '"train_batch_size" 6 cannot be shared by 4 replicas'),
        ({"zero_optimization": {"stagee": 1}}, "", "DeepSpeed refuses"),
        ({"tensor_parallel": {"autotp_size": 4}}, "", "AutoTP would cut the model a second time"),
        ({}, "--steps 0", "--steps is 0. It must be a whole number of at least 1."),
    ],
)  # fmt: skip
def test_wrong_input_is_one_paragraph(script, tmp_path, monkeypatch, capsys, change, flags, text):
    """Found before any rank starts, so that it is said once and the exit code is 2."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GOOD | change))
    arguments = [str(path), "--nproc-per-node", "4", *flags.split()]
    monkeypatch.setattr(sys, "argv", ["train_deepspeed.py", *arguments])
    monkeypatch.setattr(script, "start_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("train_deepspeed.py: error: ")
    assert text in printed


def test_files_that_cannot_be_read(script, tmp_path):
    """The ready ones are named."""
    from helix_megatron.errors import HelixError

    with pytest.raises(HelixError, match=r"No such file.*configs/dense\.json"):
        script.read_config(str(tmp_path / "none.json"))
    (tmp_path / "half.json").write_text('{"model"')
    with pytest.raises(HelixError, match=r"half\.json is not JSON"):
        script.read_config(str(tmp_path / "half.json"))
