"""The measurements measure what they say: equal layers, the bytes of the formulas, and errors that help.

No time is asserted: the machine of a test is busy.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version

import pytest
from refusals import as_launched, refusal
from tiers import sized
from waiting import run_python

from helix_megatron.bench import attention, traffic
from helix_megatron.bench.__main__ import _parser, main
from helix_megatron.bench.attention_case import DEFAULT_CASES, LAYERS, Case
from helix_megatron.bench.contest import as_predicted, helix_ranks
from helix_megatron.bench.spawn import run_on_ranks
from helix_megatron.bench.timing import Samples, Spread, compare
from helix_megatron.bench.traffic_layer import Layer
from helix_megatron.errors import HelixError
from helix_megatron.tables import text_table

STOCK, STOCK_SDPA, HELIX, FREE = LAYERS
TINY = {"sequence_length": 16, "micro_batch_size": 2}
SMALL = (
    "--hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 64 --tensor-model-parallel-size 8 "
    "--sequence-length 16"
)
FULL_SIZE = Layer(8192, 16, 16, 32768, ranks=32, segments=2, sequence_length=10000)


@pytest.fixture(autouse=True)
def _visible_gpus(monkeypatch):
    """Measurements on gloo hide GPUs from their process; that must not outlast a test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def stderr_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    return refusal(capsys, main, argv)


# --------------------------------------------------------------------------- attention


def measure(case: Case) -> object:
    from helix_megatron.bench.attention_ranks import measure_case

    return measure_case(case, repeats=2)


@pytest.mark.parametrize(
    ("text", "least_ratio"),
    [
        pytest.param(text, ratio, id=text, marks=[pytest.mark.full("attention")] * (number == 0))
        for number, (text, ratio) in enumerate(zip(DEFAULT_CASES, (10, 10, 4), strict=True))
    ],
)
def test_helix_equals_stock_and_sends_far_less(pool, text, least_ratio):
    """The claim of the default cases: the same result from 1/10, 1/10 and 1/4 of the bytes."""
    case = Case.parse(text, **TINY)
    measured = pool.run(measure, case, world_size=case.ranks)[0]
    assert tuple(measured.samples) == LAYERS
    assert all(len(samples.wall) == 2 for samples in measured.samples.values())
    assert max(measured.errors.values()) <= 1e-5

    sent = measured.attention_bytes
    assert sent[STOCK] == sent[STOCK_SDPA] == case.stock_bytes
    assert sent[HELIX] == case.helix_bytes
    assert sent[FREE] == 0
    assert sent[STOCK] >= least_ratio * sent[HELIX] > 0
    of_tensor_parallelism = {measured.all_bytes[name] - sent[name] for name in LAYERS}
    assert len(of_tensor_parallelism) == 1, "only attention's own traffic may differ"


@pytest.mark.parametrize("exchange", ["all-to-all-batch", "score-reduce"])
def test_other_exchanges_and_bf16_are_compared_too(pool, exchange):
    """--exchange and --dtype must reach the layer, and its bytes follow."""
    case = Case.parse("4,2,4,16", exchange=exchange, dtype="bf16", **TINY)
    measured = pool.run(measure, case, world_size=4)[0]
    assert measured.attention_bytes[HELIX] == case.helix_bytes
    assert case.chosen.name == exchange
    assert 1e-5 < max(measured.errors.values()) <= 2e-2


def check_broken(case: Case, fault: str) -> str:
    """The error of comparing layers of which Helix's has a fault."""
    import torch.distributed as dist

    from helix_megatron.bench.attention_ranks import build_layers, check_equal

    with helix_ranks(4, segments=2):
        layers = build_layers(case, dist.get_rank())
        helix = layers[HELIX].linear_proj.weight.data
        if fault == "no exchange":
            layers[HELIX] = layers[FREE]
        elif fault == "rows":
            weight = layers[HELIX].linear_qkv.weight.data
            weight[:2] = weight[:2].flip(0).clone()
        elif fault == "nan on one rank":
            helix.fill_(float("nan") if dist.get_rank() == 3 else 1.0)
        elif fault == "zeros":
            for layer in layers.values():
                layer.linear_proj.weight.data.zero_()
        with pytest.raises(HelixError) as error:
            check_equal(layers, case)
        return str(error.value)


@pytest.mark.parametrize("fault", ["no exchange", "rows", "nan on one rank", "zeros"])
def test_a_wrong_layer_is_never_timed(pool, fault):
    """A benchmark of a wrong layer is worthless, and zeros equal zeros: neither may pass."""
    case = Case.parse("8,2,4,16", **TINY)
    texts = pool.run(check_broken, case, fault, world_size=4)
    assert len(set(texts)) == 1, "all ranks must give up together"
    name = STOCK_SDPA if fault == "zeros" else HELIX
    assert texts[0].startswith(f"case 8,2,4,16: the output of layer {name} differs from stock's by")
    assert "Nothing was timed" in texts[0]


def test_command_measures_and_writes_json(tmp_path, capsys):
    """What a user runs, with processes of its own: a table, and JSON that can be read without it."""
    path = tmp_path / "attention.json"
    argv = ["attention", "--cases", "4,1,2,8", "--sequence-length", "8", "--repeats", "2"]
    assert main([*argv, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "4 query heads, 1 key-value heads of 8, hidden 32, 2 ranks" in printed
    assert all(f"\n  {name} " in printed for name in LAYERS)

    document = json.loads(path.read_text())
    assert document["command"].startswith(f"python -m helix_megatron.bench {' '.join(argv)} --json")
    assert document["versions"]["torch"] == version("torch")
    assert document["date"].endswith("+00:00")
    (result,) = document["results"]
    assert result["exchange"] == "gather-kv"
    assert set(result["layers"]) == set(LAYERS)
    assert result["layers"][STOCK]["attention_bytes"] == 4 * 8 * 2 * 6 * 8 * (2 - 1)
    assert as_predicted(result)
    result["layers"][HELIX]["attention_bytes"] += 1
    assert not as_predicted(result)


def fail_on_second_rank() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise HelixError("the second rank knows why")
    dist.barrier()


def test_an_error_of_a_rank_reaches_the_user():
    """A rank's HelixError must not end as a traceback of some other rank's broken connection."""
    with pytest.raises(HelixError, match="the second rank knows why"):
        run_on_ranks(fail_on_second_rank, ranks=2)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ("--cases", "16,2,4"),
            "case '16,2,4' is not four positive whole numbers: query heads, key-value heads, ranks, "
            "dimensions of a head. Ranks are at most 4096. Example: 16,2,4,64.",
        ),
        (
            ("--cases", "16,4,4,64"),
            "case 16,4,4,64: 4 key-value heads on 4 ranks need no Helix: every rank has whole ones. Valid "
            "here: more than 4 ranks.",
        ),
        (
            ("--cases", "16,2,5,64"),
            "case 16,2,5,64: stock Megatron needs ranks that divide the 16 query heads and are a multiple of "
            "the 2 key-value heads. Valid numbers of ranks here: 4, 8, 16.",
        ),
        (
            ("--cases", "16,2,4,64", "--exchange", "all-to-all-batch", "--micro-batch-size", "3"),
            "exchange all-to-all-batch does not fit here (all-to-all-batch: a micro-batch of 3 cannot be "
            "dealt to 2 ranks; it must be a multiple of 2).",
        ),
        (("--repeats", "0"), "--repeats is 0. It must be a whole number of at least 1."),
        (("--sequence-length", "0"), "--sequence-length is 0. It must be a whole number of at"),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json cannot be written"),
    ],
)
def test_attention_refuses_with_the_way_out(capsys, argv, text):
    """Each is a slip of a user, found before any process is started."""
    printed = stderr_of(capsys, "attention", *argv)
    assert printed.startswith(f"python -m helix_megatron.bench attention: error: {text}")


def test_torchrun_with_another_number_of_ranks_is_refused(capsys, monkeypatch):
    """Ranks that a case does not use would wait for ever."""
    as_launched(monkeypatch, 3)
    assert (
        "torchrun started 3 ranks, and the cases need 4, 8. Start as many as the cases need, give other "
        "--cases, or run without torchrun: ranks are then started as needed."
    ) in stderr_of(capsys, "attention")
    assert "Run it without torchrun." in stderr_of(capsys, "traffic")
    monkeypatch.setenv("WORLD_SIZE", "8")
    parsed = attention.select_cases(_parser("bench").parse_args(["attention"]))
    assert [case.name for case in parsed] == ["32,2,8,64", "8,1,8,128"]


# ----------------------------------------------------------------------------- timing


def test_ratios_are_those_of_medians_and_of_pairs():
    """In a slow turn both are slow: pairs see through it, medians over few turns may not."""
    slow_turn = Samples(wall=[2.0, 20.0, 2.0], cpu=[3.0, 3.0, 3.0])
    other = Samples(wall=[1.0, 10.0, 4.0], cpu=[2.0, 2.0, 2.0])
    pairs = {"pairs": 2.0, "pairs_low": 1.25, "pairs_high": 2.0}
    assert compare(slow_turn, other) == {"medians": 0.5, **pairs, "cpu": 1.5}
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_table_aligns_columns():
    """Numbers are compared by eye: their ends must be one below the other."""
    assert text_table(("", "ms"), [("stock", "9.5"), ("a", "10.25")]) == (
        "            ms\n  stock    9.5\n  a      10.25"
    )


# ---------------------------------------------------------------------------- traffic


def added(layer: Layer, batches: list[int], ranks: list[int]) -> dict[tuple[int, str], traffic.Row]:
    rows, _ = traffic.measure_rows(layer, batches, "auto", ranks)
    assert all(row.as_predicted for row in rows)
    return {(row.micro_batch_size, row.exchange): row for row in rows}


def test_exchange_adds_little_at_full_size():
    """Cutting heads of 512 in two adds at most 2 % to what 32 tensor parallel ranks send anyway."""
    rows = added(FULL_SIZE, [1, 2], sized("graph", full=list(range(32)), quick=[0, 13, 31]))
    chosen = {batch: name for (batch, name), row in rows.items() if row.chosen}
    assert chosen == {1: "all-to-all-sequence", 2: "all-to-all-batch"}
    assert rows[2, "all-to-all-batch"].added <= 0.02
    assert rows[1, "gather-qk"].added <= 0.02
    # The fastest at a micro-batch of 1 is not the one that sends least.
    assert rows[1, "all-to-all-sequence"].added == pytest.approx(768 * 32 / (31 * 4 * 8192))


def test_exchange_adds_less_with_sequence_parallelism():
    """Backward then gathers inputs again, so tensor parallelism itself sends more."""
    layer = Layer(8192, 16, 16, 32768, 32, 2, sequence_length=10016, sequence_parallel=True)
    rows = added(layer, [1, 2], [0, 31])
    assert all(row.added <= 0.02 for row in rows.values() if row.chosen)


def test_whole_query_heads_are_traced_as_well():
    """gather-kv needs the other query layout; a table of one layout only would leave it out."""
    rows = added(Layer(512, 16, 2, 1024, 8, 4, sequence_length=64), [2], [0, 5])
    assert rows[2, "gather-kv"].chosen
    assert (2, "all-to-all-heads") in rows


def test_traffic_command_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "traffic.json"
    assert main(["traffic", *SMALL.split(), "--ranks", "0,7", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "8 ranks: 4 head groups of 2 segments. Bytes that one rank sends, traced on 2" in printed
    assert "Not at micro-batch 1: all-to-all-batch, a micro-batch of 1 cannot be dealt" in printed
    results = json.loads(path.read_text())["results"]
    assert results["traced_ranks"] == [0, 7]
    for row in results["rows"]:
        assert f"{row['exchange_bytes']:,}" in printed
        assert row["exchange_bytes"] == row["exchange_bytes_by_formula"] > 0


@pytest.mark.parametrize("formula", ["exchange_bytes", "tensor_parallel_bytes"])
def test_a_wrong_formula_fails_the_command(monkeypatch, capsys, formula):
    """The comparison must be able to fail."""
    right = getattr(Layer, formula)
    monkeypatch.setattr(Layer, formula, lambda self, *args: right(self, *args) + 2)
    assert main(["traffic", *SMALL.split(), "--ranks", "0"]) == 1
    assert "DIFFERS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ("--sequence-parallel",),
            "sequence parallelism cannot deal 10000 tokens to 32 ranks. Try --sequence-length 10016.",
        ),
        (
            ("--ranks", "32"),
            "--ranks 32 is not a list of ranks. Valid: all, or numbers from 0 to 31",
        ),
        (("--hidden-size", "8200"), "--hidden-size 8200 must be a multiple of 16."),
        (
            ("--micro-batch-sizes", "2", "0"),
            "--micro-batch-sizes is 0. It must be a whole number of at least 1.",
        ),
        (
            ("--tensor-model-parallel-size", "16"),
            "16 ranks with --intra-head-parallel-size 1 run stock attention, which exchanges nothing.",
        ),
        (
            ("--exchange", "all-to-all-heads"),
            "exchange all-to-all-heads does not fit here (all-to-all-heads: the 1 query heads",
        ),
    ],
)
def test_traffic_refuses_with_the_way_out(capsys, argv, text):
    printed = stderr_of(capsys, "traffic", *argv)
    assert printed.startswith(f"python -m helix_megatron.bench traffic: error: {text}")


# --------------------------------------------------------------------------- the command


def test_help_lists_the_measurements_without_importing_torch():
    """--help must answer at once."""
    done = run_python(["-X", "importtime", "-m", "helix_megatron.bench", "--help"])
    assert done.returncode == 0
    assert not re.search(r"\| +torch\n", done.stderr)
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")]
    assert {attention.NAME, traffic.NAME} <= set(lines)
