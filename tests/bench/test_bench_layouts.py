"""`helix bench layouts`: layouts as they are written, real launches in turns, and what is made of them.

No time is asserted: the machine of a test is busy.
"""

from __future__ import annotations

import json
import math

import pytest
from refusals import as_launched, refusal
from tiers import sized

from helix_megatron import cli
from helix_megatron.bench.layout_ranks import Measured
from helix_megatron.bench.layout_report import Result, losses_text, scaling_text, table_text
from helix_megatron.bench.layout_spec import LayoutSpec, rivals, validated
from helix_megatron.bench.spawn import launch_on_ranks
from helix_megatron.core.exchanges import choose
from helix_megatron.errors import HelixError
from helix_megatron.hardware import MACHINES

ROUNDS = sized("training", full=2, quick=1)
MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", "32", "--micro-batch-size", "1"),
]


def bench(*flags: str) -> int:
    return cli.main(["bench", "layouts", *flags])


def error_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    return refusal(capsys, cli.main, ["bench", "layouts", *flags])


# ------------------------------------------------------------------------------- layouts


def test_a_layout_becomes_flags():
    """What a layout says wins over what all have in common; N is the number of ranks."""
    spec = LayoutSpec.parse("tp=N,m=N/2,exchange=gather-qk,zero1=on,sp=off")
    flags = spec.flags(8, [*MODEL, "--sequence-parallel", "--tensor-model-parallel-size", "2"])
    args = validated(spec, 8, MODEL)
    assert args.parallel.tensor_model_parallel_size == 8
    assert args.helix.intra_head_parallel_size == 4
    assert args.helix.exchange == "gather-qk"
    assert args.parallel.use_distributed_optimizer
    assert "--sequence-parallel" not in flags
    alone = LayoutSpec.parse("tp=1").flags(2, ["--sequence-parallel"])
    assert alone == ["--tensor-model-parallel-size", "1"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    {
        "querry=heads": "unknown key 'querry'. Valid: tp, cp, pp, vpp, ep, etp, m, mb, exchange, query, "
        "attention, sp, zero1. Did you mean query?",
        "tp": "tp has no value. Write tp=",
        "tp=2 tp=4": "tp stands there twice",
        "tp=many": "tp=many is neither a number nor N, N/2",
        "sp=1": "sp is on or off, not 1",
        "": "--layout is ''. It must be a text of one line",
    }.items(),
)
def test_a_wrong_layout_is_explained(capsys, text, complaint):
    assert complaint in error_of(capsys, *MODEL, "--layout", text)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    {
        "--layout tp=3": "4 ranks cannot hold tensor parallel size 3",
        "--layout tp=N/3": "tp=N/3 is no whole number at 4 ranks",
        "--layout tp=4": "2 heads cannot be dealt to 4 tensor parallel ranks",
        "--train-iters=5": "--train-iters has no place in a benchmark of layouts, which counts its iterations",
        "--layout tp=2 --save x": "--save has no place in a benchmark",
        "--ranks 2,4": "several numbers need --scaling strong or weak",
        "--ranks two": "--ranks two must be a number",
        "--rounds 0": "--rounds is 0. It must be a whole number of at least 1.",
        "--plot picture.gif": "must end in .png or .svg",
        "--json /nowhere/x.json": "cannot be written",
    }.items(),
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(capsys, flags, complaint):
    assert complaint in error_of(capsys, *MODEL, *flags.split())


def test_stock_megatron_is_among_the_rivals():
    """Nobody has to ask for m = 1, and what does not fit is named with its reason."""
    fitting, others = rivals(4, [*MODEL, "--global-batch-size", "4"])
    wanted = ["tp=1", "tp=2,pp=2", "tp=2,cp=2", "tp=4,m=2", "tp=4,m=4"]
    assert [spec.text for spec in fitting] == wanted
    assert "2 heads cannot be dealt to 4" in others["tp=4"]


# ---------------------------------------------------------------------------- measurements


def test_layouts_are_measured_side_by_side(capsys, tmp_path):
    """Launches of each layout on real ranks: a row each with the bytes that tensor parallelism and the
    exchange send, equal losses, JSON and a picture."""
    path, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    layouts = ["--layout", "tp=1", "--layout", "tp=2,m=2"]
    flags = [*MODEL, "--ranks", "2", "--rounds", str(ROUNDS), "--iterations", "2", "--warm-up", "1"]
    assert bench(*flags, *layouts, "--json", str(path), "--plot", str(picture)) == 0
    printed = capsys.readouterr()
    assert "tp=1 on 2 ranks" in printed.err
    assert "2 layers of 32, 2 heads of 16" in printed.out
    document = json.loads(path.read_text())
    stock, helix = document["results"]
    assert (stock["layout"], helix["layout"]) == ("tp=1", "tp=2,m=2")
    assert abs(stock["loss"] - helix["loss"]) < 1e-5
    args = validated(LayoutSpec.parse("tp=2,m=2"), 2, [*MODEL, "--global-batch-size", "2"])
    shape = args.attention_shape
    formula = choose(shape, "auto", MACHINES["cpu"]).bytes(shape)
    # Forward and backward, 2 layers, of the 32 tokens of a micro-batch.
    assert helix["sent_bytes_per_token"][0] == 2 * 2 * formula / 32
    assert stock["sent_bytes_per_token"][0] == 0
    assert stock["sent_bytes_per_token"][1] > 0
    for result in (stock, helix):
        assert len(result["rounds"]) == ROUNDS
        assert result["exposed_ms_per_token"]["median"] > 0
        assert result["comm_ms_per_token"]["median"] > 0
        assert 0 < result["flop_utilisation"] < 1
        assert result["tokens_per_second"]["low"] <= result["tokens_per_second"]["high"]
    assert "<svg" in picture.read_text()


def launch(seconds: float, loss: float = 5.0, memory: int = 1 << 20) -> Measured:
    return Measured([seconds] * 3, [0.1] * 3, [0.2], (8.0, 16.0), memory, loss, 1e12, "x CPU")


def result(layout: str, ranks: int, seconds: tuple[float, ...], loss: float = 5.0) -> Result:
    args = validated(LayoutSpec.parse("tp=1"), ranks, [*MODEL, "--global-batch-size", "4"])
    return Result.of(layout, ranks, args, [launch(s, loss) for s in seconds])


def test_the_arithmetic_of_the_table():
    """4 × 32 tokens in 2 s against 1 s and 1.25 s: half as fast in one round, 0.625 in the other."""
    slow, fast = result("slow", 2, (2.0, 2.0)), result("fast", 2, (1.0, 1.25))
    assert slow.tokens_per_second.median == 64
    assert slow.against(fast).median == (0.5 + 0.625) / 2
    assert slow.comm_ms_per_token.median == pytest.approx(200 / 128)
    assert slow.exposed_ms_per_token.median == pytest.approx(100 / 128)
    assert slow.sent_bytes_per_token == (8 / 128, 16 / 128)
    row = next(line for line in table_text([fast, slow]).splitlines() if "slow" in line)
    assert "0.56 (0.53–0.59)" in row
    assert "1.00 MiB" in row


def test_scaling_efficiency_is_per_rank():
    """Twice the ranks and 1.5 times the tokens: three quarters."""
    results = [result("a", 1, (1.5,)), result("a", 2, (1.0,))]
    text = scaling_text(results, "strong")
    assert "85.3 (100%)" in text
    assert "128 (75%)" in text


def test_layouts_that_train_something_else_are_seen():
    assert "equal losses" in losses_text([result("a", 2, (1.0,)), result("b", 2, (1.0,))])
    text = losses_text([result("a", 2, (1.0,)), result("b", 2, (1.0,), loss=4.0)])
    assert "differ by at most 1.0e+00 nats per token (b)" in text
    nan = [result("a", 2, (1.0,)), result("b", 2, (1.0,), loss=math.nan)]
    assert "not finite (b)" in losses_text(nan)


def test_a_launcher_of_ranks_is_refused(monkeypatch):
    """Its ranks would each start ranks."""
    as_launched(monkeypatch, 2)
    with pytest.raises(HelixError, match="Run it without torchrun"):
        launch_on_ranks(len, "x", ranks=2)
