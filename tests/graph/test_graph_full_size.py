"""The paper's model at its full size: 16 ranks, forward and backward, traced, checked and written."""

from __future__ import annotations

import json
import math
import resource

import pytest
from waiting import run_python

from helix_megatron.config import HelixConfig
from helix_megatron.core.exchanges import AttentionShape, choose
from helix_megatron.graph.model import DTYPES

SECONDS, GIGABYTES = 60, 4
LAYERS = 4


def nbytes(spec: str) -> int:
    """Of a tensor as JSON has it: `bf16[625, 8192]`."""
    dtype, _, shape = spec.rstrip("]").partition("[")
    return DTYPES[dtype] * math.prod(map(int, shape.split(",")))


@pytest.mark.full("graph")
def test_the_papers_model_is_traced_checked_and_written_in_a_minute(tmp_path):
    """168 GB per activation tensor of the whole batch, billions of weights: none of it may be allocated."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ["--preset", "paper-dense", "--backward", "--check", "--jobs", "1"]
    run = run_python(["-m", "helix_megatron.graph.command", *flags, "--output", str(tmp_path)])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed  ") == 8
    # Processor time, as this machine may be busy with other things; one process, so it is no less than real.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert after.ru_maxrss * 1024 < GIGABYTES * 1e9

    graph = json.loads((tmp_path / "complete_helix_model.json").read_text())
    assert len(graph["ranks"]) == 16
    layout = HelixConfig(4).layout(16, 16, 512, 16)
    shape = AttentionShape(layout, batch=1, query_length=10000, key_length=10000)
    exchanged = LAYERS * 2 * choose(shape, "gather-kv").bytes(shape)
    tokens, hidden, ffn, vocabulary, layers = 10000, 8192, 32768, 256, LAYERS
    products = layers * (4 * hidden * hidden + 2 * hidden * ffn) + hidden * vocabulary
    attention = layers * 2 * 2 * 16 * (tokens * (tokens + 1) // 2) * 512
    flops = 3 * 2 * tokens * products + 3.5 * attention
    for entry in graph["ranks"]:
        nodes = [n for n in graph["nodes"] if n["ranks"] == [entry["rank"]]]
        exchanges = [n for n in nodes if n.get("purpose", "").startswith("exchange")]
        assert sum(n["sent_bytes"] for n in exchanges) == exchanged
        assert entry["flops"] == flops / 16
        held = sum(nbytes(w["spec"]) for w in graph["weights"] if w.get("rank", 0) == entry["rank"])
        assert entry["parameters"] == held
        # What linear layers, attention and GELU keep of each layer, and little more.
        kept = layers * 2 * tokens * (2 * hidden / 16 + 7 * 512 + 2 * ffn / 16)
        assert kept < entry["activations"] < 2 * kept
