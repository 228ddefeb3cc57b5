"""`bench decode` compares equal steps: equal logits, the bytes of the formulas, one copy against p/g.

No time is asserted: the machine of a test is busy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from refusals import as_launched, refusal

from helix_megatron.bench import decode
from helix_megatron.bench.__main__ import main
from helix_megatron.bench.contest import as_predicted, helix_ranks
from helix_megatron.bench.decode_case import CONTESTANTS, STOCK, STOCK_PAGED, DecodeCase
from helix_megatron.core.caches import NAMES
from helix_megatron.errors import HelixError

TINY = DecodeCase(
    heads=8, kv_heads=1, ranks=4, head_dim=16, hidden_size=64, layers=2, sequences=8, context=64
)


@pytest.fixture(autouse=True)
def _visible_gpus(monkeypatch):
    """Measurements on gloo hide GPUs from their process; that must not outlast a test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def measure_cases(cases: list[DecodeCase]) -> list[dict[str, Any]]:
    from helix_megatron.bench.decode_ranks import measure_decode

    return [decode.summary(case, measure_decode(case, turns=2)) for case in cases]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"query_layout": "heads"}, marks=pytest.mark.full("inference")),
        pytest.param({"query_layout": "segments"}, marks=pytest.mark.full("inference")),
        pytest.param({"kv_heads": 2}, marks=pytest.mark.full("inference")),
        {"kv_heads": 2, "segments": 4},
    ],
    ids=["heads", "segments", "2 groups", "2 kv heads in a group"],
)
def test_equal_steps_and_what_they_send_and_keep(pool, changes):
    """All contestants give the same logits; only segment and nobody else pays for the context."""
    case = dataclasses.replace(TINY, **changes)
    longer = dataclasses.replace(case, context=256)
    results = pool.run(measure_cases, [case, longer], world_size=case.ranks)[0]
    for result in results:
        found = result["contestants"]
        assert tuple(found) == CONTESTANTS
        assert as_predicted(result)
        for contestant in found.values():
            seconds = [*contestant["wall_seconds"].values(), contestant["cpu_seconds"]]
            assert all(math.isfinite(value) and value > 0 for value in seconds)
            assert 0 <= contestant["difference_of_logits"] <= 1e-5
        assert all(found[name]["cache_copies"] == 1 for name in NAMES)
        replicated = case.ranks / case.kv_heads
        assert found[STOCK]["cache_copies"] == found[STOCK_PAGED]["cache_copies"] == replicated
    sent, sent_longer = (
        {name: found["sent_bytes_per_token"] for name, found in result["contestants"].items()}
        for result in results
    )
    assert all(sent.values())
    assert {name for name in CONTESTANTS if sent[name] != sent_longer[name]} == {"segment"}
    assert sent["batch"] < sent[STOCK] == sent[STOCK_PAGED]


def check_broken(case: DecodeCase, fault: str) -> str:
    """The error of comparing steps of which one has a fault."""
    import torch.distributed as dist

    from helix_megatron.bench import decode_ranks

    with helix_ranks(4, segments=4):
        contestants: Any = decode_ranks.build_contestants(case)
        decode_ranks.fill_caches(contestants, case)
        name, _, what = fault.partition(": ")
        if name == STOCK:
            k, _ = contestants[STOCK].memory[2]
            k.copy_(k.flip(0))
        elif dist.get_rank() == 1:
            cache = contestants[name].runner.cache
            if what == "a key":
                cache.k[1].flatten(0, 1)[5] = -cache.k[1].flatten(0, 1)[5]
            elif what == "dimensions":
                for value in cache.v:
                    value.copy_(value.roll(1, dims=-1))
            elif what == "nan":
                for value in cache.v:
                    value.fill_(float("nan"))
        with pytest.raises(HelixError) as error:
            decode_ranks.check_equal(contestants, case)
        return str(error.value)


@pytest.mark.parametrize(
    "fault",
    ["batch: a key", "sequence: dimensions", "segment: a key", "stock, paged: nan", "stock: order"],
)
def test_a_wrong_step_is_never_timed(pool, fault):
    """One wrong key on one rank is enough: a benchmark of different computations is worthless."""
    texts = pool.run(check_broken, TINY, fault, world_size=4)
    assert len(set(texts)) == 1, "all ranks must give up together"
    name = fault.partition(": ")[0]
    # What is wrong with stock is seen in the first that is compared with it.
    shown = "batch" if name == STOCK else name
    assert texts[0].startswith(f"the logits of {shown} at context 64 differ from stock's by")
    assert "Nothing was timed" in texts[0]


def test_command_measures_several_contexts_and_writes_json(tmp_path, capsys):
    """What a user runs, with processes of its own: a table for each context, and JSON."""
    path = tmp_path / "decode.json"
    small = {"heads": 4, "ranks": 2, "head-dim": 8, "hidden-size": 16, "layers": 1, "sequences": 2}
    argv = ["decode", *(f"--{name}={value}" for name, value in small.items())]
    argv += ["--context", "32", "64", "--turns", "2", "--json", str(path)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "2 sequences at context 32; 1 layers" in printed
    assert "2 sequences at context 64; 1 layers" in printed
    for name in CONTESTANTS:
        assert printed.count(f"\n  {name} ") == 2
    results = json.loads(path.read_text())["results"]
    assert [result["case"]["context"] for result in results] == [32, 64]
    for result in results:
        assert as_predicted(result)
        found = result["contestants"]["batch"]
        assert found["times_as_long"].keys() == set(decode.RIVALS)
        found["sent_bytes_per_token"] += 1
        assert not as_predicted(result)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ("--kv-heads", "4"),
            "--ranks 4: compared is where stock Megatron gathers QKV and replicates its cache, which needs "
            "more ranks than the 4 key-value heads, a multiple of them that divides the 8 query heads. Valid "
            "here: 8.",
        ),
        (
            ("--heads", "8", "--kv-heads", "8"),
            "--ranks 4: compared is where stock Megatron gathers QKV and replicates its cache, which needs "
            "more ranks than the 8 key-value heads, a multiple of them that divides the 8 query heads. Valid "
            "here: none.",
        ),
        (
            ("--sequences", "6"),
            "--sequences 6 cannot be dealt evenly to the 4 ranks of a head group. Valid: multiples of 4.",
        ),
        (
            ("--segments", "1"),
            "--segments 1 does not make head groups of 4 ranks and 1 key-value heads. Valid: 4.",
        ),
        (
            ("--head-dim", "12"),
            "4 segments of a head of 12 dimensions would split a rotary pair",
        ),
        (("--context", "1024", "1"), "--context is 1. It must be a whole number of at least 2."),
        (("--layers", "0"), "--layers is 0. It must be a whole number of at least 1."),
        (("--turns", "0"), "--turns is 0. It must be a whole number of at least 1."),
        (("--json", "nowhere/a.json"), "--json nowhere/a.json cannot be written"),
    ],
)
def test_decode_refuses_with_the_way_out(capsys, argv, text):
    """Each is a slip of a user, found before any process is started."""
    printed = refusal(capsys, main, ["decode", *argv])
    assert printed.startswith(f"python -m helix_megatron.bench decode: error: {text}")


def test_torchrun_is_refused(capsys, monkeypatch):
    """Its ranks would each start ranks."""
    as_launched(monkeypatch, 4)
    assert "Run it without torchrun." in refusal(capsys, main, ["decode"])
