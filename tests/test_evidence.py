"""The page on the paper's claims: its arithmetic, worked out by hand, and its making."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.plan.clusters import CLUSTERS
from paper import claims, command, curves, measured, plots, simulated
from paper.corrections import corrections
from paper.document import document
from paper.plots import draw_all

STORED = Path(__file__).parents[1] / "docs" / "paper"


def test_the_papers_improvements_are_those_of_its_own_table():
    for model, faster, quieter in claims.IMPROVEMENTS:
        base = claims.claim(model, claims.BASELINE)
        proposed = claims.claim(model, claims.PROPOSED)
        assert proposed.tokens_per_second / base.tokens_per_second - 1 == pytest.approx(
            faster, abs=5e-4
        )
        assert 1 - proposed.tpot_ms / base.tpot_ms == pytest.approx(quieter, abs=5e-4)


@pytest.mark.parametrize(
    ("what", "right"),
    {
        # 4 · (4·8192² + 2·8192·32768) = 3.2212e9; with 8 experts 4 · (4·8192² + 16·8192·32768) = 18.25e9.
        "parameters": "3.22 G (mixture of 8 experts: 18.3 G)",
        # 1024·10000·8192·2 = 167.8e9.
        "activations of the batch": "168 GB per tensor in 16 bit: micro-batches are needed",
        # 2·3·1.024e7·8192·512 = 257.7e12, and 16 of it.
        "FLOPs of QKV, one partition": "258 TFLOP",
        "FLOPs of QKV, all partitions": "4.12 PFLOP",
        # 2·1.024e7·4·128·1e4 = 104.9e12.
        "FLOPs of Q·Kᵀ, one partition": "105 TFLOP (52.4 TFLOP causal)",
        # 2·1.024e7·8192·2048 = 343.6e12, and 16 of it.
        "FLOPs of FC1, one GPU (all)": "344 TFLOP (5.50 PFLOP)",
        # 2·3.2212e9 + 4·4·1e4·8192 = 7.753e9; causal 7.098e9.
        "FLOPs of a token, forward": "7.75 GFLOP (7.10 GFLOP causal)",
        "peak of a GPU": "989 TFLOP/s",
    }.items(),
)
def test_corrections(what, right):
    """The numbers that DESIGN and the deployment plan disagree on, worked out by hand."""
    assert next(x.right for x in corrections() if x.what == what) == right


def test_every_family_is_what_its_name_says():
    """The baseline and its rivals use the 16 GPUs as they say, for both models and both links."""
    for family in simulated.FAMILIES:
        for kind in simulated.PRESETS:
            for cluster in simulated.LINKS.values():
                layout = simulated.fastest(family, kind, "train", 4, CLUSTERS[cluster])
                assert layout is not None
                assert layout.gpus == claims.GPUS
                assert layout.pp == (2 if family.baseline else 1)
                assert (layout.exchange == "none") == (layout.segments == 1)


def test_the_gain_is_the_bubbles():
    """With one micro-batch in flight two stages take turns; with many they do not."""
    few, many = (
        simulated.gain("dense", "train", batches, CLUSTERS["nvlink-16"], 4) for batches in (1, 64)
    )
    assert few > 1.2
    assert many < 1
    # The key-value cache of the paper's whole batch fits nowhere.
    assert math.isnan(simulated.gain("dense", "prefill", claims.BATCH, CLUSTERS["nvlink-16"]))


def stored_curves(iterations: int = curves.ITERATIONS) -> list[dict]:
    """Of losses that fall as 1 / iteration; segment-local 0.1 above; a seed adds 0.01 of itself."""
    found = []
    for kind in curves.KINDS:
        for seed in curves.SEEDS:
            above = 0.1 * (kind.attention == "segment-local") + 0.01 * seed
            loss = [1 / i + above for i in range(1, iterations + 1)]
            found.append(
                {
                    "name": kind.name,
                    "seed": seed,
                    "loss": loss,
                    "validation": [[50, loss[49]], [iterations, loss[-1]]],
                }
            )
    return found


def test_curves_are_summed_up():
    found = {summary.name: summary for summary in curves.summaries(stored_curves())}
    ordinary, local = found["ordinary, one process"], found["segment-local, m = 2"]
    assert local.difference == pytest.approx(0.1)
    assert local.differences == pytest.approx((0.1, 0.1, 0.1))
    assert ordinary.deviation == pytest.approx(0.01)
    assert ordinary.all == found["exact, m = 4"].all == 0
    assert local.early == local.all == pytest.approx(0.1)


def test_curves_that_say_nothing_are_refused():
    missing = [curve for curve in stored_curves() if curve["seed"] != 2 or "exact" in curve["name"]]
    with pytest.raises(HelixError, match="ordinary, one process, seed 2, is missing"):
        list(curves.summaries(missing))
    broken = stored_curves()
    broken[0]["loss"][7] = math.nan
    with pytest.raises(HelixError, match="is missing or not finite"):
        list(curves.summaries(broken))


@pytest.mark.full("graph")
def test_curves_are_trained():
    """Two iterations of each, on real ranks: exact trains the ordinary model, segment-local does not."""
    trained = curves.measure(iterations=2, seeds=[1])
    assert json.loads(curves.to_json(trained)) == json.loads(json.dumps(trained))
    found = {summary.name: summary for summary in curves.summaries(trained)}
    assert found["exact, m = 2"].all < 1e-5
    assert found["exact, m = 4"].all < 1e-5
    assert found["segment-local, m = 2"].all > 1e-4
    assert all(len(curve["validation"]) == 1 for curve in trained)


@pytest.mark.full("graph")
def test_the_page_that_is_committed_is_what_the_command_writes(tmp_path):
    """docs/paper.md follows from the stored measurements and today's planner."""
    trained = json.loads((STORED / command.CURVES).read_text())
    assert (STORED.parent / "paper.md").read_text() == document(STORED, trained)


def test_pictures_are_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "BATCHES", (1, 4))
    monkeypatch.setattr(plots, "LINKS", (50e9, 450e9))
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        names = draw_all(directory, stored_curves())
    assert names == ["where.svg", "bytes.svg", "memory.svg", "curves.svg"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_measurements_compare_the_papers_layouts():
    """Whatever is measured can be trained: 16 ranks, the paper's ratio of widths."""
    from helix_megatron.bench.layout_spec import LayoutSpec, validated

    for kind, (flags, layouts) in measured.KINDS.items():
        for layout in layouts:
            common = [*flags, "--global-batch-size", "8"]
            run = validated(LayoutSpec.parse(layout), measured.RANKS, common)
            assert run.sizes["dp"] == 1
            assert (run.model.num_experts is not None) == (kind == "moe")


def test_what_is_missing_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--out", str(tmp_path)])
    assert exit_info.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "lacks measured-dense-1.json" in error
    assert "Run with --measure (layouts) or --train (curves) first" in error
    assert not (tmp_path / "paper.md").exists()
