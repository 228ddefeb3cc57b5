"""`helix plan --write DIR`: a deployment plan (`deployment`) as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.plan.deployment import deployment
from helix_megatron.plan.explain import (
    duration,
    kinds_of_layers,
    memory_table,
    memory_text,
    operators_table,
    speed_text,
    terms_table,
    traffic_table,
)
from helix_megatron.plan.launch_commands import deepspeed_config
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.results import Plan
from helix_megatron.plan.score import Prediction
from helix_megatron.tables import markdown_table

SHOWN_RANKS = 64  # of the table in Markdown; JSON has all
SHOWN_GROUPS = 4


def write(plan: Plan, layout: Any, directory: Path) -> list[Path]:
    """Write `plan.md` and `plan.json`; their paths.

    Raises:
        HelixError: the directory cannot be made or written.
    """
    prediction = plan.predict(layout)
    content = deployment(plan, prediction)
    paths = [directory / "plan.md", directory / "plan.json"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(markdown(plan, prediction, content))
        paths[1].write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise HelixError(f"cannot write {directory}: {error.strerror}.") from error
    return paths


def markdown(plan: Plan, p: Prediction, content: dict[str, Any]) -> str:
    """The plan to read."""
    parts = [
        f"# Deployment of {plan.model.name} on {plan.gpus} GPUs\n",
        _summary(plan, p),
        content["verdict"] + "\n",
        "## Prediction (simulated)\n",
        speed_text(plan, p) + "\n",
        _table(*terms_table(p)),
        "## Batch\n",
        _batch(content["batch"]),
        f"## Ways to cut TP {p.layout.tp}: m segments × n head groups (simulated)\n",
        _cuts(content["cuts"]),
        "## Where everything is: partition → rank → node and GPU\n",
        _rank_table(content["ranks"]),
        "## Weights of one rank, of a layer and of the vocabulary\n",
        "Rows and columns as megatron-core stores them: [output, input].\n",
        _weights(content["weights_of_a_rank"]),
        "## Operators of one rank, one micro-batch\n",
        "FLOPs count a multiply-add as two. MB of kernels are read and written in GPU memory; those of "
        "collectives are sent. Times are simulated.\n",
        *_operators(plan, p.layout),
        "## Memory of the fullest GPU (simulated)\n",
        memory_text(plan, p) + "\n",
        _table(*memory_table(plan, p)),
        "## Communication of one rank in a step (simulated times)\n",
        _table(*traffic_table(p)),
        "Who talks to whom:\n",
        _groups(content["groups"]),
        "## Checks\n",
        _table(
            ("check", "result", "figure"),
            [
                (c["check"], "passed" if c["passed"] else "**no**", c["figure"])
                for c in content["checks"]
            ],
        ),
        "## Commands\n",
        *_commands(plan, p, content),
        "## What to watch\n",
        *_watch(plan, p),
    ]
    return "\n".join(parts) + "\n"


def _summary(plan: Plan, p: Prediction) -> str:
    layout, model, job = p.layout, plan.model, plan.job
    cluster = plan.cluster
    return (
        f"{layout.describe()} on {cluster.name} ({cluster.chip.name}; {cluster.source}; {cluster.domain_link} "
        f"in a domain of {cluster.domain}, {cluster.network_link} between). "
        f"{model.parameters / 1e9:.2f} B parameters, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{model.num_heads} query and {model.num_kv_heads} key-value heads of {model.head_dim} dimensions. "
        f"Task {job.task}, sequence {job.sequence}, {plan.software.precision}. **Every figure of time and "
        "memory here is simulated, none is measured.**\n"
    )


def _batch(sizes: dict[str, Any]) -> str:
    whole, own = (sizes[f"activation_bytes_of_{k}"] / 1e9 for k in ("the_global_batch", "a_rank"))
    return (
        f"{sizes['global_batch']} sequences = {sizes['micro_batch']} × {sizes['micro_batches']} micro-batches "
        f"× {sizes['replicas']} replicas. One activation tensor [batch, sequence, hidden] of the whole batch "
        f"would be {whole:,.2f} GB; a rank works on {own:,.3f} GB of it at a time.\n"
    )


def _cuts(cuts: Sequence[dict[str, Any]]) -> str:
    rows = []
    for cut in cuts:
        name = f"{cut['m']} × {cut['n']}" + (" **(this plan)**" if cut["chosen"] else "")
        if "reason" in cut:
            rows.append((name, "–", "–", "–", "–", cut["reason"]))
        else:
            time, memory = duration(cut["simulated_seconds"]), f"{cut['memory_bytes'] / 1e9:.1f}"
            rows.append((name, cut["queries"], cut["exchange"], time, memory, ""))
    return _table(("m × n", "queries", "exchange or cache", "best time", "GB", "why not"), rows)


def _rank_table(ranks: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"({r['partition'][0]}, {r['partition'][1]})",
            str(r["rank"]),
            f"{r['node']} : {r['device']}",
            str(r["pipeline_stage"]),
            f"{r['data_parallel_rank']}",
            str(r["context_parallel_rank"]),
            _layers(r["layers"]),
            f"{_span(r['query_heads'])} [{_runs(r['query_dimensions'])}]",
            f"{_span(r['key_value_heads'])} [{_runs(r['key_value_dimensions'])}]",
        )
        for r in ranks[:SHOWN_RANKS]
    ]
    heads = ("(group, segment)", "rank", "node : GPU", "stage", "replica", "context part", "layers")
    table = _table((*heads, "query heads [dimensions]", "key-value heads [dimensions]"), rows)
    more = len(ranks) - SHOWN_RANKS
    return table + (f"\n{more} more ranks: plan.json.\n" if more > 0 else "")


def _layers(runs: list[list[int]]) -> str:
    texts = [f"{a}–{b - 1}" if b > a + 1 else str(a) for a, b in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, … {texts[-1]}"


def _span(heads: list[int]) -> str:
    return f"{heads[0]}–{heads[-1]}" if len(heads) > 1 else str(heads[0])


def _runs(runs: list[list[int]]) -> str:
    return ", ".join(f"{a}:{b}" for a, b in runs)


def _weights(matrices: Sequence[dict[str, Any]]) -> str:
    rows = []
    for matrix in matrices:
        (a, b), (c, d), count = matrix["shape"], matrix["of"], matrix["count"]
        copies = f"{count} × " if count > 1 else ""
        rows.append(
            (matrix["name"], f"{copies}[{a}, {b}]", f"[{c}, {d}]", f"{count * a * b / 1e6:,.2f} M")
        )
    return _table(("matrix", "on this rank", "whole", "parameters"), rows)


def _operators(plan: Plan, layout: Layout) -> Iterator[str]:
    for name, count, steps in kinds_of_layers(plan, layout):
        yield f"{count} layers, {name}:\n"
        yield _table(*operators_table(steps, layout.tp))


def _groups(groups: Sequence[dict[str, Any]]) -> str:
    rows = []
    for group in groups:
        shown = [_ranks(ranks) for ranks in group["groups"][:SHOWN_GROUPS]]
        more = len(group["groups"]) - len(shown)
        text = "; ".join(shown) + (f"; … {more} more in plan.json" if more else "")
        rows.append((group["axis"], str(group["ranks"]), group["slowest_link"], text))
    return _table(("group", "ranks", "slowest link", "members"), rows)


def _ranks(ranks: Sequence[int]) -> str:
    step = ranks[1] - ranks[0]
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}–{ranks[-1]}" if step == 1 else f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"


def _commands(plan: Plan, p: Prediction, content: dict[str, Any]) -> list[str]:
    parts = [f"```bash\n{content['command']}\n```\n"]
    if plan.job.task == "train":
        config, reason = deepspeed_config(plan, p.layout)
        parts.append(
            f"DeepSpeed:\n\n```json\n{json.dumps(config, indent=2)}\n```\n"
            if config
            else f"DeepSpeed: {reason}.\n"
        )
    return [*parts, *(f"- {text}" for text in content["caveats"]), ""]


def _watch(plan: Plan, p: Prediction) -> list[str]:
    """What a run should show if the prediction is right."""
    lines = [
        f"- Time of a step: {duration(p.seconds)} simulated. More than 10 % above: look at the parts below.",
        f"- Throughput: {p.tokens_per_second:,.0f} tokens/s, {p.flops_per_gpu / 1e12:.0f} TFLOP/s a GPU "
        "(simulated).",
        f"- Memory: {p.memory.total / 1e9:.1f} GB simulated on the fullest GPU, of "
        f"{plan.cluster.chip.memory / 1e9:.0f}.",
        f"- Communication: {p.exposed / p.seconds:.0%} of the step exposed (simulated)"
        + (
            "; `--log-communication-time exposed` measures it." if plan.job.task == "train" else "."
        ),
    ]
    slowest = max(p.traffic, key=lambda t: t.exposed, default=None)
    if slowest is not None and slowest.seconds:
        rate = slowest.bytes / slowest.seconds / 1e9
        lines.append(
            f"- Bandwidth: {slowest.axis} {slowest.kind} costs most, {rate:.0f} GB/s sent by a rank over "
            f"{slowest.link} (simulated); nccl-tests on the same ranks says what is possible."
        )
    if p.layout.pp > 1:
        lines.append(f"- Pipeline bubble: {p.bubble:.0%} (simulated); more micro-batches lower it.")
    if plan.model.experts:
        lines.append(
            "- Tokens of every expert: balanced routing is assumed, and the slowest expert decides."
        )
    if plan.job.task == "train":
        lines.append(
            "- Loss and gradient norm against a run with m = 1: exact attention gives the same to rounding."
        )
    else:
        lines.append(
            "- Logits against one GPU or m = 1: exact attention gives the same to rounding."
        )
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(head, rows) + "\n"
