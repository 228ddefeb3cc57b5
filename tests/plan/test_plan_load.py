"""A server under load: Little's law, what fits, and what the command says."""

from __future__ import annotations

import json
import math
import random

import pytest
from refusals import refusal

from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.command import plan_main
from helix_megatron.plan.inference import fullest
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.load import Load, fitting, prompt_seconds, serve, token_seconds
from helix_megatron.plan.models import model_of
from helix_megatron.plan.settings import Job, Scenario, Software

MODEL = model_of("llama-3-8b")
SCENARIO = Scenario(MODEL, Job("decode", 1, 1), CLUSTERS["dgx-h100"], Software())
EIGHT = ["--model", "llama-3-8b", "--gpus", "8", "--task", "serve"]


@pytest.mark.parametrize("layout", [Layout(tp=2, dp=4), Layout(tp=8, segments=2, cache="sequence")])
@pytest.mark.parametrize("rate", [2.0, 20.0])
def test_littles_law_holds(layout, rate):
    """Sequences that run are those that come, times how long each stays; and all that come are answered."""
    load = Load(rate, 1024, 256)
    found = serve(SCENARIO, layout, load)
    assert found.sustained and found.sequences < found.fitting
    stay = found.first + load.output * found.token
    assert found.sequences == pytest.approx(rate / layout.dp * stay, rel=0.02)
    assert found.throughput == pytest.approx(rate * load.output)


def test_more_load_takes_longer_until_it_is_too_much():
    """Time per token grows with the rate; beyond what the server can do throughput stays, and it says so."""
    layout = Layout(tp=2, dp=4)
    found = [serve(SCENARIO, layout, Load(rate, 1024, 256)) for rate in (1, 10, 40, 1e5, math.inf)]
    tokens = [one.token for one in found]
    assert tokens == sorted(tokens) and tokens[0] < tokens[2] / 1.2
    assert [one.sustained for one in found] == [True, True, True, False, False]
    assert found[3].throughput < 1e5 * 256 / 100
    assert found[4].throughput == pytest.approx(found[3].throughput, rel=0.05)


def test_what_fits_was_worked_out_by_hand():
    """80 GB less 16.06 GB of weights and 4 GB: 1280 positions of 131,072 bytes each on one GPU; none stored
    twice by
    cut heads, twice by whole heads on twice as many ranks as heads."""
    load = Load(1, 1024, 256)
    weights = 2 * MODEL.parameters
    assert fitting(SCENARIO, Layout(), load) == pytest.approx(
        (76e9 - weights) / (1280 * 131072), rel=0.01
    )
    room = 76e9 - weights / 8
    for layout, share in ((Layout(tp=8), 8), (Layout(tp=8, segments=2, cache="sequence"), 8)):
        found = fitting(SCENARIO, layout, Load(1, 65536, 65536))
        assert found == pytest.approx(share * room / (131072 * 131072), rel=0.03)
    assert serve(SCENARIO, Layout(), Load(1, 10**7, 1)) is None


def test_prompts_in_between_are_paid_for():
    """A step of eight sequences reads half a prompt where answers have 16 tokens."""
    layout = Layout(tp=2)
    long, short = (token_seconds(SCENARIO, layout, 8, Load(1, 1024, out)) for out in (1024, 16))
    more = 8 * (1 / 16 - 1 / 1024) * prompt_seconds(SCENARIO, layout, 1024)
    assert short - long == pytest.approx(more, rel=0.05)


def test_the_command_prints_a_table_and_a_command(capsys, tmp_path):
    """Layouts that keep up first; the band; JSON with the same figures."""
    assert plan_main([*EIGHT, "--request-rate", "40", "--json", str(tmp_path / "s.json")]) == 0
    text = capsys.readouterr().out
    for words in (
        "40 requests a second",
        "ms to first",
        "keeps up",
        "published servers",
        "helix serve",
    ):
        assert words in text
    content = json.loads((tmp_path / "s.json").read_text())
    rows = content["rows"]
    assert content["load"] == {"rate": 40.0, "prompt": 1024, "output": 256}
    stays = [row["first"] + 256 * row["token"] for row in rows if row["sustained"]]
    assert stays == sorted(stays) and len(stays) > 3
    assert any(row["layout"]["segments"] > 1 for row in rows)
    assert plan_main([*EIGHT, "--prompt-tokens", "4096", "--rows", "1"]) == 0
    assert "as many requests as it can serve" in capsys.readouterr().out


def test_replicas_are_as_large_as_a_sequence_needs(capsys):
    """Half a million positions fit on all 16 GPUs; hybrid models are served, too."""
    flags = ["--model", "llama-3-70b", "--gpus", "16", "--cluster", "nvlink-16", "--task", "serve"]
    assert plan_main([*flags, "--prompt-tokens", "500000", "--rows", "3"]) == 0
    assert "TP 16 = m 2 × n 8" in capsys.readouterr().out
    assert plan_main(["--model", "qwen3.5-27b", *EIGHT[2:], "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "helix serve" in text and "forecast" not in text


def test_what_shows_one_step_is_refused(capsys):
    """A load has no single step to explain."""
    assert "--explain shows a single step" in refusal(capsys, plan_main, [*EIGHT, "--explain", "1"])


@pytest.mark.parametrize(("ranks", "sequences"), [(8, 4), (8, 64), (32, 16)])
def test_experts_wait_for_the_fullest_rank(ranks, sequences):
    """128 experts, 8 for a token, chosen at random: never below what was drawn, and at most a third above."""
    draw, most_experts, most_tokens = random.Random(1), 0.0, 0.0
    for _ in range(200):
        chosen = [e for _ in range(ranks * sequences) for e in draw.sample(range(128), 8)]
        of_rank = [[e for e in chosen if e % ranks == rank] for rank in range(ranks)]
        most_experts += max(len(set(own)) for own in of_rank) / 200
        most_tokens += max(map(len, of_rank)) / 200
    here, copies = 128 / ranks, 8.0 * sequences
    share = 1 - (1 - 1 / 128) ** (copies * ranks)
    experts = fullest(here * share, here * share * (1 - share), ranks, here)
    assert 0.95 < experts / most_experts < 1.33
    assert 0.95 < fullest(copies, copies, ranks) / most_tokens < 1.33
