"""A deployment plan, as data and as a page: what every rank holds and computes, whom it talks to, and checks.

What each rank holds is asked of `HeadLayout`, and what it computes of the cost model, so that the plan says
what would run. Bytes, seconds and FLOP/s are simulated. `helix plan --write DIR` writes both.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from helix_megatron.core.layout import HeadLayout, contiguous_runs
from helix_megatron.errors import HelixError, divisors
from helix_megatron.outputs import write_text
from helix_megatron.plan.collective_time import Group
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
from helix_megatron.plan.launch_commands import caveats, deepspeed_config, launch_text
from helix_megatron.plan.layouts import Layout, head_layout
from helix_megatron.plan.ranking import prediction_json
from helix_megatron.plan.results import Plan
from helix_megatron.plan.score import Prediction
from helix_megatron.plan.steps import BACKWARD, FORWARD, Step, in_order
from helix_megatron.plan.verdict import verdict
from helix_megatron.tables import markdown_table

FORMAT = 1


def deployment(plan: Plan, p: Prediction) -> dict[str, Any]:
    """The plan of one row. Bytes and seconds are of one rank and one step unless a key says otherwise."""
    layout = p.layout
    heads = partition_of(plan, layout)
    operators = []
    for name, count, steps in kinds_of_layers(plan, layout):
        ordered = [step for phase in (FORWARD, BACKWARD) for step in in_order(steps, phase)]
        kind = {"layers": name, "count": count, "steps": list(map(_step, ordered))}
        operators.append(kind)
    return {
        "format": FORMAT,
        "simulated": True,
        "prediction": prediction_json(plan, p),
        "verdict": verdict(plan)[1],
        "batch": batch_sizes(plan, p),
        "cuts": list(cuts(plan, layout)),
        "ranks": [_rank(plan, layout, heads, rank) for rank in range(layout.gpus)],
        "weights_of_a_rank": list(weights(plan, layout, heads)),
        "operators_per_micro_batch": operators,
        "groups": list(groups(plan, layout)),
        "checks": checks(plan, p, heads),
        "command": launch_text(plan, layout),
        "caveats": caveats(plan, layout),
    }


def partition_of(plan: Plan, layout: Layout) -> HeadLayout:
    """The heads of one layer over TP ranks; with whole heads n = TP, and key-value heads kept in several copies
    where TP exceeds them."""
    if layout.segments > 1:
        return head_layout(plan.model, layout.tp, layout.segments, layout.query_layout)
    model = plan.model
    heads = (model.num_attention_heads, max(model.num_query_groups, layout.tp), model.head_dim)
    gate = model.attention_output_gate
    return HeadLayout(*heads, head_groups=layout.tp, rotary="none", output_gate=gate)


def _qkv_rows(plan: Plan, layout: Layout, heads: HeadLayout, rank: int) -> list[int]:
    """Rows of linear_qkv on a TP rank. With more ranks than key-value heads stock Megatron deals them in equal
    runs, whatever head they belong to, and gathers its output."""
    if layout.segments == 1 and layout.tp > plan.model.num_query_groups:
        each = plan.model.qkv_rows // layout.tp
        return [*range(rank * each, (rank + 1) * each)]
    return heads.qkv_rows(rank).tolist()


def batch_sizes(plan: Plan, p: Prediction) -> dict[str, Any]:
    """Bytes of one activation tensor [batch, sequence, hidden]: of everything, and of what a rank works on."""
    job, layout = plan.job, p.layout
    length = 1 if job.task == "decode" else job.sequence
    row = length * plan.model.hidden_size * plan.software.element
    cut = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    return {
        "global_batch": job.global_batch,
        "micro_batch": layout.micro_batch,
        "micro_batches": p.micro_batches,
        "replicas": layout.dp,
        "activation_bytes_of_the_global_batch": job.global_batch * row,
        "activation_bytes_of_a_rank": layout.micro_batch * row / cut,
    }


def cuts(plan: Plan, layout: Layout) -> Iterator[dict[str, Any]]:
    """Every m × n of this TP, with the other degrees as they are: its best row, or why there is none."""
    degrees = operator.attrgetter("tp", "segments", "pp", "cp", "dp")
    for m in divisors(layout.tp):
        wanted = degrees(layout._replace(segments=m))
        row = plan.best(lambda x, wanted=wanted: degrees(x) == wanted)  # type: ignore[misc]
        found: dict[str, Any] = {"m": m, "n": layout.tp // m, "chosen": m == layout.segments}
        if row is None:
            yield found | {"reason": _refusal(plan, layout, m)}
            continue
        best = row.layout
        yield found | {
            "queries": best.query_layout if m > 1 else "whole heads",
            "exchange": best.cache if plan.job.task == "decode" else best.exchange,
            "simulated_seconds": row.seconds,
            "memory_bytes": row.memory,
        }


def _refusal(plan: Plan, layout: Layout, m: int) -> str:
    wanted, last = layout._replace(segments=m), ("exchange",)  # one of several
    for rejected in sorted(plan.rejected, key=lambda r: r.kind in last):
        cuts_heads = any(name == "segments" for name, _ in rejected.sizes)
        if cuts_heads and rejected.explains(wanted, "tp", "segments", "pp", "cp", "dp"):
            return rejected.reason
    return "not tried: the flags leave it out"


# ------------------------------------------------------------------------------ ranks


def _rank(plan: Plan, layout: Layout, heads: HeadLayout, rank: int) -> dict[str, Any]:
    tp_rank, rest = rank % layout.tp, rank // layout.tp
    cp_rank, rest = rest % layout.cp, rest // layout.cp
    dp_rank, stage = rest % layout.dp, rest // layout.dp
    group, segment = heads.partition(tp_rank)
    kv = heads.kv_heads(tp_rank)
    if layout.segments == 1 and layout.tp > plan.model.num_query_groups:
        shared = layout.tp // plan.model.num_query_groups
        kv = range(tp_rank // shared, tp_rank // shared + 1)
    whole = layout.query_layout == "heads" and layout.segments > 1
    return {
        "rank": rank,
        "node": rank // plan.cluster.domain,
        "device": rank % plan.cluster.domain,
        "partition": [group, segment],
        "tensor_parallel_rank": tp_rank,
        "context_parallel_rank": cp_rank,
        "data_parallel_rank": dp_rank,
        "pipeline_stage": stage,
        "layers": _layers(plan, layout, stage),
        "query_heads": [*heads.query_heads(tp_rank)],
        "query_dimensions": [[0, heads.head_dim]] if whole else _dims(heads, segment),
        "key_value_heads": [*kv],
        "key_value_dimensions": _dims(heads, segment),
    }


def _dims(heads: HeadLayout, segment: int) -> list[list[int]]:
    """[first, end) of the runs of dimensions that a segment holds."""
    return [[a, a + length] for a, length in contiguous_runs(heads.segment_dims(segment))]


def _layers(plan: Plan, layout: Layout, stage: int) -> list[list[int]]:
    """[first, end) of the layers of a stage, one run for each chunk."""
    cut = layout.chunks(plan.model.num_layers)
    runs, start = [], 0
    for chunk in range(layout.vp):
        for place, chunks in enumerate(cut):
            if place == stage:
                runs.append([start, start + chunks[chunk]])
            start += chunks[chunk]
    return runs


def weights(plan: Plan, layout: Layout, heads: HeadLayout) -> Iterator[dict[str, Any]]:
    """Matrices of one rank [rows, columns], as megatron-core stores them, with the whole one beside."""
    model, tp = plan.model, layout.tp
    hidden, width = model.hidden_size, model.width
    rows = len(_qkv_rows(plan, layout, heads, 0))
    columns = len(heads.proj_columns(0))

    def matrix(name: str, part: tuple[int, int], whole: tuple[int, int], count: int = 1) -> Any:
        return {"name": name, "shape": [*part], "of": [*whole], "count": count}

    yield matrix("linear_qkv", (rows, hidden), (model.qkv_rows, hidden))
    yield matrix("linear_proj", (hidden, columns), (hidden, width))
    if model.dense_layers:
        ffn = model.ffn
        fc1 = ffn * model.fc1_factor
        yield matrix("linear_fc1", (fc1 // tp, hidden), (fc1, hidden))
        yield matrix("linear_fc2", (hidden, ffn // tp), (hidden, ffn))
    if model.experts:
        ffn, here = model.moe_ffn, model.experts // layout.ep
        fc1 = ffn * model.fc1_factor
        yield matrix("router", (model.experts, hidden), (model.experts, hidden))
        yield matrix("expert fc1", (fc1 // layout.etp, hidden), (fc1, hidden), here)
        yield matrix("expert fc2", (hidden, ffn // layout.etp), (hidden, ffn), here)
    vocab = model.padded_vocab(tp)
    yield matrix("embedding, output layer", (vocab // tp, hidden), (vocab, hidden))


def groups(plan: Plan, layout: Layout) -> Iterator[dict[str, Any]]:
    """Every kind of process group, with the ranks of each."""
    kinds = {
        "tensor parallel": layout.tp_group,
        "head group (exchange)": layout.head_group,
        "context parallel": layout.cp_group,
        "data parallel": layout.dp_group,
        "pipeline parallel": layout.pp_group,
    }
    if plan.model.experts:
        kinds |= {"expert parallel": layout.ep_group, "expert tensor parallel": Group(layout.etp)}
    for name, group in kinds.items():
        if group.ranks == 1:
            continue
        firsts = [r for r in range(layout.gpus) if r // group.stride % group.ranks == 0]
        yield {
            "axis": name,
            "ranks": group.ranks,
            "slowest_link": group.link(plan.cluster),
            "groups": [[f + k * group.stride for k in range(group.ranks)] for f in firsts],
        }


def _step(step: Step) -> dict[str, Any]:
    own = {name: getattr(step, name) for name in ("name", "phase", "kind", "shape", "flops")}
    seconds = {"simulated_seconds": step.seconds, "hidden_seconds": step.hidden}
    return own | {"bytes": step.moved, "bytes_sent": step.sent} | seconds


# ----------------------------------------------------------------------------- checks


def checks(plan: Plan, p: Prediction, heads: HeadLayout) -> list[dict[str, Any]]:
    """What can be checked of the plan, with its figure."""
    layout, model = p.layout, plan.model
    total = layout.tp * layout.cp * layout.dp * layout.pp
    dealt = layout.stages(model.num_layers)
    columns = sorted(c for rank in range(layout.tp) for c in heads.proj_columns(rank).tolist())
    rows = sorted(r for rank in range(layout.tp) for r in _qkv_rows(plan, layout, heads, rank))
    used, limit = p.memory.total / 1e9, plan.cluster.chip.memory / 1e9
    domain, batch = plan.cluster.domain, (layout.micro_batch, p.micro_batches, layout.dp)
    found = {
        "ranks = TP × CP × DP × PP": (total == plan.gpus, f"{total} = {plan.gpus}"),
        "every row of linear_qkv is on exactly one TP rank": (
            rows == list(range(model.qkv_rows)),
            f"{len(rows)} of {model.qkv_rows} rows",
        ),
        "every column of linear_proj is on exactly one TP rank": (
            columns == list(range(model.width)),
            f"{len(columns)} columns",
        ),
        "layers of all stages add up": (
            sum(dealt) == model.num_layers,
            f"{dealt[0]} × {layout.pp} = {model.num_layers}"
            if len({*dealt}) == 1
            else f"{' + '.join(map(str, dealt))} = {model.num_layers}",
        ),
        "batch = micro-batch × micro-batches × DP": (
            math.prod(batch) == plan.job.global_batch,
            f"{' × '.join(map(str, batch))} = {plan.job.global_batch}",
        ),
        "memory fits (simulated)": (used <= limit, f"{used:.1f} of {limit:.0f} GB"),
        "a head group stays inside a domain": (
            layout.head_group.domains(plan.cluster) == 1,
            f"m {layout.segments}, domain of {domain}",
        ),
        "TP stays inside a domain": (
            layout.tp_group.domains(plan.cluster) == 1,
            f"TP {layout.tp}, domain of {domain}, else every layer crosses {plan.cluster.network_link}",
        ),
    }
    return [{"check": n, "passed": bool(ok), "figure": text} for n, (ok, text) in found.items()]


SHOWN_RANKS = 64  # of the table in Markdown; JSON has all
SHOWN_GROUPS = 4


def write(plan: Plan, layout: Layout, paths: Sequence[Path]) -> None:
    """Write the plan of a layout as Markdown and as JSON, to two paths in one directory.

    Raises:
        HelixError: the directory cannot be made or written.
    """
    prediction = plan.predict(layout)
    content = deployment(plan, prediction)
    directory = paths[0].parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HelixError(f"cannot make {directory}: {error.strerror}.") from error
    write_text(paths[0], markdown(plan, prediction, content))
    write_text(paths[1], json.dumps(content, indent=1) + "\n")


def markdown(plan: Plan, p: Prediction, content: dict[str, Any]) -> str:
    """The plan to read: `deployment.md.jinja`, filled in."""
    import jinja2

    blocks: dict[str, Any] = {
        "trim_blocks": True,
        "lstrip_blocks": True,
        "keep_trailing_newline": True,
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, **blocks)
    environment.globals = {f.__name__: f for f in (duration, layers, members, runs, span)}
    page = resources.files("helix_megatron.plan").joinpath("deployment.md.jinja").read_text()
    config, reason = deepspeed_config(plan, p.layout)
    tables = {"terms": terms_table(p), "memory": memory_table(plan, p), "traffic": traffic_table(p)}
    return environment.from_string(page).render(
        plan=plan,
        p=p,
        content=content,
        speed=speed_text(plan, p),
        memory=memory_text(plan, p),
        tables={name: markdown_table(*table) for name, table in tables.items()},
        kinds=[
            (name, count, markdown_table(*operators_table(steps, p.layout.tp)))
            for name, count, steps in kinds_of_layers(plan, p.layout)
        ],
        shown_ranks=SHOWN_RANKS,
        deepspeed=json.dumps(config, indent=2) if config else "",
        no_deepspeed=reason,
        slowest=max(p.traffic, key=lambda t: t.exposed, default=None),
    )


# ------------------------------------------------------------------------------ cells


def layers(runs: list[list[int]]) -> str:
    texts = [f"{a}–{b - 1}" if b > a + 1 else str(a) for a, b in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, … {texts[-1]}"


def span(heads: list[int]) -> str:
    return f"{heads[0]}–{heads[-1]}" if len(heads) > 1 else str(heads[0])


def runs(runs: list[list[int]]) -> str:
    return ", ".join(f"{a}:{b}" for a, b in runs)


def members(groups: Sequence[Sequence[int]]) -> str:
    """The first groups, short."""
    texts = []
    for ranks in groups[:SHOWN_GROUPS]:
        first, second, *_, last = *ranks, ranks[-1]
        if len(ranks) <= 4:
            texts.append(", ".join(map(str, ranks)))
        else:
            texts.append(
                f"{first}–{last}" if second == first + 1 else f"{first}, {second}, … {last}"
            )
    more = len(groups) - len(texts)
    return "; ".join(texts) + (f"; … {more} more in plan.json" if more else "")
