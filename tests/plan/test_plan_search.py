"""The search: rivals are always there, reasons are right, and Helix is not sold where it does not help."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest
from waiting import run_python

from helix_megatron.errors import HelixError
from helix_megatron.plan.clusters import CLUSTERS, Cluster, cluster_of
from helix_megatron.plan.collective_time import Group
from helix_megatron.plan.inference import predict_decode
from helix_megatron.plan.inference_memory import inference_memory
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec, model_of
from helix_megatron.plan.operators import attention_steps
from helix_megatron.plan.ranking import header, plan_json
from helix_megatron.plan.results import Limits, Plan
from helix_megatron.plan.score import iteration, layers_cost, predict_training
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.traffic import layer_traffic
from helix_megatron.plan.verdict import RIVALS, missing_rival, recommended, rivals, verdict

DGX = CLUSTERS["dgx-h100"]


def plan_of(
    model: ModelSpec | str = "llama-3-8b",
    gpus: int = 16,
    cluster: Cluster = DGX,
    *,
    task: str = "train",
    sequence: int = 4096,
    batch: int = 64,
    limits: Limits | None = None,
    software: Software | None = None,
) -> Plan:
    model = model_of(model) if isinstance(model, str) else model
    return search(model, gpus, cluster, Job(task, sequence, batch), software or Software(), limits)


def small(kv_heads: int, heads: int = 8) -> ModelSpec:
    """Few key-value heads, wide MLP: where TP beyond them is interesting."""
    return model_of(
        f"--num-layers 8 --hidden-size 1024 --num-attention-heads {heads} --group-query-attention "
        f"--num-query-groups {kv_heads} --kv-channels 128 --vocab-size 32000"
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


def test_rivals_are_always_there(plan):
    """m = 1, TP × PP and context parallelism are what a user would do without Helix."""
    found = rivals(plan)
    assert {"Helix (m > 1)", "m = 1", "TP × PP", "context parallel"} <= set(found)
    limited = plan_of(limits=Limits(tp=8, segments=4))
    assert all(row.layout.tp == 8 and row.layout.segments == 4 for row in limited.rows)
    assert set(rivals(limited)) >= {"m = 1", "TP × PP"}, "fixing m must not remove the rivals"
    best = found["Helix (m > 1)"].layout
    name = f"TP {best.head_groups} × CP {best.segments}"
    if name in found:
        assert (found[name].layout.tp, found[name].layout.cp) == (best.head_groups, best.segments)


def test_rows_are_legal_ranked_and_fit(plan):
    """What is offered must run: Megatron's and Helix's own rules, memory, and the whole cluster used."""
    model, job = plan.model, plan.job
    assert [r.seconds for r in plan.everything] == sorted(r.seconds for r in plan.everything)
    assert len({row.layout for row in plan.everything}) == len(plan.everything)
    for row in plan.everything:
        layout = row.layout
        assert layout.gpus == plan.gpus
        assert row.memory <= DGX.chip.memory
        assert job.global_batch % (layout.dp * layout.micro_batch) == 0
        assert model.num_layers % (layout.pp * layout.vp) == 0
        if layout.vp > 1:
            assert layout.micro_batches(job.global_batch) % layout.pp == 0
        if layout.segments > 1:
            assert layout.cp == 1
            assert model.num_query_groups % layout.head_groups == 0
            assert layout.exchange != "none"
        else:
            assert layout.exchange == "none"
            assert model.num_attention_heads % layout.tp == 0


def test_every_dimension_is_enumerated():
    """TP, m × n, query layouts, exchanges, CP, PP, VP, DP, EP, micro-batch, recomputation."""
    dense = [row.layout for row in plan_of("llama-3-70b", 64, sequence=8192, batch=256).everything]
    experts = [row.layout for row in plan_of("mixtral-8x7b", 64, batch=256).everything]
    for name in ("tp", "pp", "vp", "dp", "cp", "segments", "micro_batch", "query_layout"):
        assert len({getattr(layout, name) for layout in dense}) > 1, name
    assert {"none", "selective", "full"} <= {layout.recompute for layout in dense}
    assert len({layout.exchange for layout in dense}) > 2
    assert len({layout.ep for layout in experts}) > 1


def test_reasons_name_the_nearest_that_fits(plan):
    """A rejected row says why, and what would not be rejected."""
    reasons = {rejected.what: rejected.reason for rejected in plan_of(gpus=96, batch=96).rejected}
    assert "hidden size 4096 is not divisible by 3; nearest that divide it: 2, 4" in reasons["TP 3"]
    assert "nearest that divide them: 16, 32" in reasons["PP 24"]
    slower = [r.reason for r in plan.rejected if r.kind == "slower exchange"]
    assert all("slower than with" in reason for reason in slower)
    assert slower
    exchanges = [r.reason for r in plan.rejected if r.kind == "exchange"]
    assert any("micro-batch of 1 cannot be dealt to" in reason for reason in exchanges)
    tight = plan_of("llama-3-70b", 8)
    assert not tight.everything
    assert any("GB a GPU" in r.reason and "of 80 GB" in r.reason for r in tight.rejected)
    assert "try --gpus" in verdict(tight)[1]


def test_the_advice_when_nothing_fits_works():
    """`try --gpus N` that does not fit either would be worse than silence."""
    text = verdict(plan_of("llama-3-70b", 8, batch=64))[1]
    gpus = int(text.rpartition("--gpus ")[2].rstrip("."))
    assert plan_of("llama-3-70b", gpus, batch=64).everything


def test_helix_is_not_sold_where_it_does_not_help():
    """With as many key-value heads as ranks there is nothing to gain, and the answer says so."""
    helps, text = verdict(plan_of(small(8), 8, batch=64))
    assert not helps
    assert text.startswith("Helix does not help here")


def test_helix_helps_where_heads_are_the_limit():
    """A long context on twice as many GPUs as key-value heads: whole heads would keep every cache twice."""
    plan = plan_of(
        "llama-3-70b", 16, CLUSTERS["nvlink-16"], task="decode", sequence=131072, batch=1
    )
    helps, text = verdict(plan)
    assert helps
    assert text.startswith("Helix helps: TP 16 = m 2 × n 8 is ")
    assert plan.rows[recommended(plan) - 1].layout.segments == 2


def test_the_row_to_paste_is_the_one_the_verdict_speaks_for(plan):
    """A verdict against Helix beside a command that cuts heads would contradict itself."""
    assert not verdict(plan)[0]
    assert plan.rows[recommended(plan) - 1].layout.segments == 1


def test_a_rival_that_is_not_ranked_has_a_reason():
    """TP = n with context parallel m is what a reader asks for first."""
    found = plan_of("paper-dense", 16, sequence=10000, batch=16, limits=Limits(tp=16, segments=16))
    for m in (2, 4, 8, 16):
        rest = [
            r for r in found.everything if r.layout.segments in (1, m) and r.layout.tp * m >= 16
        ]
        narrow = dataclasses.replace(found, everything=rest)
        text = missing_rival(narrow)
        best = narrow.best(RIVALS["Helix (m > 1)"]).layout
        there = narrow.best(
            lambda x, b=best: (x.segments, x.tp, x.cp) == (1, b.head_groups, b.segments)
        )
        assert (there is None) == text.startswith(f"TP {best.head_groups} × CP {best.segments} is")


def test_segments_beat_the_stock_gather():
    """At the same TP above the key-value heads, stock gathers all of QKV: the layers must cost more."""
    model, job = model_of("llama-3-8b"), Job("train", 4096, 8)
    base = Layout(tp=16, dp=1, micro_batch=1, sequence_parallel=True)
    cut = base._replace(segments=2, query_layout="heads", exchange="gather-kv")
    scenario = Scenario(model, job, CLUSTERS["nvlink-16"], Software(cuda_graphs=True))
    stock, helix = (iteration(scenario, x).seconds for x in (base, cut))
    assert helix < stock


@pytest.mark.parametrize(
    ("preset", "layout", "name"),
    [
        ("llama-3-8b", Layout(tp=16), "stock QKV gather"),
        (
            "qwen3-8b",
            Layout(tp=16, segments=2, query_layout="segments", exchange="gather-qk"),
            "QK norm statistics",
        ),
    ],
)
def test_selective_recomputation_repeats_core_attention_only(preset, layout, name):
    """Megatron checkpoints core attention: what comes before it is sent once, forward and backward."""
    model = model_of(preset)
    scenario = Scenario(model, Job("train", 4096, 1), DGX, Software())
    steps = attention_steps(scenario, layout, False)
    assert [step.axis for step in steps if step.name == name] == ["qkv", "qkv"]
    forward = [step for step in steps if step.phase == "forward"]
    core = [step for step in forward if step.kind == "attention" or step.axis == "exchange"]
    repeated = sum(step.exposed for step in core)
    cost = layers_cost(scenario, layout)
    assert cost.attention == pytest.approx(model.num_layers * repeated)
    rows = {
        recompute: [*layer_traffic(scenario, layout._replace(recompute=recompute), 1)]
        for recompute in ("none", "selective", "full")
    }
    sent = {key: sum(r.bytes for r in rows[key] if r.axis == "qkv") for key in rows}
    assert 0 < sent["none"] == sent["selective"] < sent["full"]


def test_selective_recomputation_does_not_repeat_the_gather_behind_the_projection():
    """gather-kv runs before core attention and before the norm of keys, which is then whole."""
    layout = Layout(tp=16, segments=2, query_layout="heads", exchange="gather-kv")
    scenario = Scenario(model_of("qwen3-8b"), Job("train", 4096, 1), DGX, Software())
    steps = attention_steps(scenario, layout, False)
    assert {step.axis for step in steps} == {"", "exchange", "tp"}
    once, again = (
        sum(
            row.bytes
            for row in layer_traffic(scenario, layout._replace(recompute=recompute), 1)
            if row.axis == "exchange"
        )
        for recompute in ("none", "selective")
    )
    assert 0 < once == again


def test_fp32_is_planned_on_a_chip_that_has_nothing_else(old_chip):
    """4 bytes a weight, in memory and on the wire; heads without a fused kernel must not ask for bf16."""
    cluster, fp32 = cluster_of(str(old_chip)), Software(precision="fp32")
    model, layout = model_of("paper-dense"), Layout(tp=8, micro_batch=1)
    for task in ("train", "prefill", "decode"):
        found = plan_of(model, 16, cluster, task=task, batch=16, software=fp32)
        assert any(row.layout.segments > 1 for row in found.everything), task
    narrow, wide = (
        inference_memory(model, layout, Job("decode", 4096, 1), software)
        for software in (Software(), fp32)
    )
    assert wide.weights == 2 * narrow.weights
    assert wide.cache == 2 * narrow.cache
    narrow, wide = (
        predict_training(Scenario(model, Job("train", 4096, 2), *where), layout._replace(dp=2))
        for where in ((DGX, Software()), (cluster, fp32))
    )
    gathered, twice = (
        sum(row.bytes for row in p.traffic if (row.axis, row.kind) == ("dp", "all-gather"))
        for p in (narrow, wide)
    )
    assert twice == 2 * gathered


def test_the_logits_are_in_the_communication():
    """Seconds that are predicted without bytes would be missing from what to watch."""
    found = plan_of(task="decode", gpus=8, batch=8)
    p = found.predict(Layout(tp=8, micro_batch=8))
    logits = 8 * found.model.padded_vocab(8) * 2 * 7 / 8
    assert sum(r.bytes for r in p.traffic if r.kind == "all-gather") == logits


def test_predictions_add_up(plan):
    """Seconds are the sum of the terms, and communication splits into exposed and hidden."""
    for row in [*plan.everything[:40], *plan.everything[-40:]]:
        p = plan.predict(row.layout)
        assert p.seconds == pytest.approx(row.seconds)
        assert sum(p.terms.values()) == pytest.approx(p.seconds)
        assert p.memory.total == pytest.approx(row.memory)
        assert p.exposed >= 0
        assert p.hidden >= 0
        assert 0 <= p.bubble < 1
        assert p.flops_per_gpu < DGX.chip.flops["bf16"]


@pytest.mark.parametrize("task", ["train", "decode"])
def test_the_host_sets_the_pace_of_small_work(task):
    """Where the GPU has done an operator before the next is launched; CUDA graphs need no host."""
    model, layout = model_of("llama-3-8b"), Layout(tp=8, micro_batch=1)
    scenario = Scenario(model, Job(task, 128, 1), DGX, Software(cuda_graphs=False))
    graphs = scenario._replace(software=Software(cuda_graphs=True))
    slow = scenario._replace(cluster=dataclasses.replace(DGX, host_seconds=2 * DGX.host_seconds))
    predict = predict_training if task == "train" else predict_decode
    replayed, launched, twice = (predict(s, layout).seconds for s in (graphs, scenario, slow))
    assert launched > 2 * replayed
    operators = 32 * (36 if task == "train" else 12) * DGX.host_seconds
    assert twice - launched == pytest.approx(operators, rel=0.25)


@pytest.mark.parametrize(("task", "batch"), [("prefill", 4), ("decode", 64)])
def test_inference_tasks_rank_too(task, batch):
    """TTFT and time per token, with a cache that no Helix layout stores twice."""
    found = plan_of("llama-3-70b", 16, CLUSTERS["nvlink-16"], task=task, batch=batch, sequence=8192)
    assert {"Helix (m > 1)", "m = 1"} <= set(rivals(found))
    for row in found.everything:
        p = found.predict(row.layout)
        assert p.seconds == pytest.approx(sum(p.terms.values()))
        if row.layout.segments > 1:
            whole = p.memory.cache * row.layout.gpus
            model = found.model
            once = 2 * batch * 8192 * model.num_query_groups * model.head_dim * 2 * model.num_layers
            assert whole == pytest.approx(once)


def test_decode_beats_the_replicated_cache():
    """TP 16 on 8 key-value heads: half the cache to read, and no gather of QKV."""
    found = plan_of(
        "llama-3-70b", 16, CLUSTERS["nvlink-16"], task="decode", sequence=8192, batch=64
    )
    base = Layout(tp=16, micro_batch=64)
    stock = found.predict(base)
    for cache in ("batch", "sequence"):
        helix = found.predict(base._replace(segments=2, cache=cache))
        assert helix.memory.cache == stock.memory.cache / 2
        assert helix.seconds < stock.seconds
    reduced = found.predict(base._replace(segments=2, cache="segment"))
    assert reduced.seconds > stock.seconds, "a score all-reduce per step costs more than it saves"


def test_wrong_numbers_are_named():
    """As everywhere."""
    for kwargs, expected in (
        ({"gpus": 0}, "--gpus 0 must be at least 1"),
        ({"batch": 0}, "--global-batch 0"),
        ({"sequence": 0}, "--sequence-length 0"),
        ({"task": "dream"}, "Valid: train, prefill, decode"),
        (
            {"cluster": CLUSTERS["dgx-a100"], "software": Software(precision="fp8")},
            "chip a100 has no fp8",
        ),
    ):
        with pytest.raises(HelixError, match=expected):
            plan_of(**kwargs)


def test_a_thousand_gpus_are_planned_fast():
    """The figure wanted is 2 s with the start, on a quiet core. CPU time, and three times as much, because the
    machine of a test is busy; and torch, which alone takes longer, must not be imported."""
    program = """
import json, sys, time
from helix_megatron.plan.command import plan_main
status = plan_main(sys.argv[1:])
print(json.dumps({"cpu": time.process_time(), "status": status, "torch": "torch" in sys.modules}))
"""
    flags = "--model llama-3-70b --gpus 1024 --sequence-length 8192 --global-batch 1024"
    run = run_python(["-c", program, *shlex.split(flags)])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["status"] == 0
    assert not found["torch"]
    assert found["cpu"] < 6


def test_the_json_says_that_it_is_simulated(plan):
    """A figure without its label ends up in a report as measured."""
    content = json.loads(json.dumps(plan_json(plan, 3)))
    assert content["simulated"] is True
    assert content["verdict"] == verdict(plan)[1]
    assert len(content["rows"]) == len(plan.rows)
    assert len(content["rejected"]) == len(plan.rejected)
    assert set(content["shown"]) == {"1", "2", "3"}
    assert {"simulated_seconds", "memory_bytes", "communication"} <= set(content["shown"]["1"])


def test_what_is_left_out_is_counted_by_kind(plan):
    """A slower exchange fits: to count it as not fitting would be false."""
    text = header(plan)
    assert f"{len(plan.rows)} layouts fit and are ranked." in text
    for kind in {rejected.kind for rejected in plan.rejected}:
        number = sum(rejected.kind == kind for rejected in plan.rejected)
        assert f"{kind} {number}" in text


def test_groups_that_cross_racks_are_found():
    """16 ranks stay inside a rack of 72, but for those that begin in one and end in the next."""
    rack = CLUSTERS["nvlink-72"]
    inside, across = (
        search(model_of("llama-3-8b"), gpus, rack, Job("train", 4096, gpus), Software()).cluster
        for gpus in (64, 144)
    )
    assert Group(16).link(inside) == rack.domain_link
    assert Group(16).link(across) == rack.network_link
