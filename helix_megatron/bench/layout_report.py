"""What `bench layouts` found: a table, a line on the losses, JSON records, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron import units
from helix_megatron.bench.layout_ranks import Measured
from helix_megatron.bench.timing import Spread
from helix_megatron.run.config import RunConfig
from helix_megatron.tables import text_table


@dataclass(frozen=True)
class Result:
    """One layout on so many ranks.

    tokens_per_second: of all ranks together, over the timed iterations of all rounds; rounds: its median in
    each. comm_ms_per_token: a rank's time inside collectives, the paper's TPOT; exposed_ms_per_token: the part
    that its computation waits for. sent_bytes_per_token: of one rank, for attention's exchange and for all
    else. flop_utilisation: the model's FLOPs against `product_flops`, what the same ranks reach together in
    large matrix products, measured in the same launches.
    """

    layout: str
    ranks: int
    device: str
    model: str
    tokens_per_second: Spread
    rounds: tuple[float, ...]
    comm_ms_per_token: Spread
    exposed_ms_per_token: Spread
    sent_bytes_per_token: tuple[float, float]
    memory_bytes: int
    flop_utilisation: float
    product_flops: float
    loss: float

    @classmethod
    def of(cls, layout: str, ranks: int, run: RunConfig, launches: Sequence[Measured]) -> Result:
        """From the launches of a layout, one per round."""
        from helix_megatron.plan.models import spec_of_flags

        tokens, first = run.tokens_per_iteration, launches[0]
        model = spec_of_flags("benchmark", run.model.to_flags(), "flags")
        throughput = Spread.of([tokens / s for launch in launches for s in launch.seconds])
        product = statistics.median(launch.product_flops for launch in launches)
        flops = model.flops_per_token(run.model.seq_length) * throughput.median
        comm, exposed = (
            Spread.of([s * 1e3 / tokens for launch in launches for s in getattr(launch, kind)])
            for kind in ("total", "exposed")
        )
        return cls(
            layout=layout,
            ranks=ranks,
            device=first.device,
            model=_model_name(run),
            tokens_per_second=throughput,
            rounds=tuple(tokens / statistics.median(launch.seconds) for launch in launches),
            comm_ms_per_token=comm,
            exposed_ms_per_token=exposed,
            sent_bytes_per_token=(first.sent_bytes[0] / tokens, first.sent_bytes[1] / tokens),
            memory_bytes=max(launch.memory_bytes for launch in launches),
            flop_utilisation=flops / product,
            product_flops=product,
            loss=launches[-1].loss,
        )

    def against(self, other: Result) -> Spread:
        """Throughput relative to another layout's, round by round."""
        return Spread.of([a / b for a, b in zip(self.rounds, other.rounds, strict=True)])


LEGEND = """\
  tokens/s, × first: median (quartiles). comm: ms per token that a rank spends in collectives,
  the paper's TPOT; exposed: that its computation waits, for other stages, too. B: bytes that a
  rank sends per token, in attention's exchange and elsewhere. memory: of the fullest rank.
  FLOPs: the model's, against {}FLOP/s, which these ranks reach together in large matrix
  products.
"""


def table_text(results: Sequence[Result]) -> str:
    """One row per layout on the same number of ranks; the first is what the others are compared with."""
    first, rows = results[0], []
    for result in results:
        speed, ratio = result.tokens_per_second, result.against(first)
        low, middle, high = map(units.count, (speed.low, speed.median, speed.high))
        compared = f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"
        waits = (result.comm_ms_per_token, result.exposed_ms_per_token)
        cells = [result.layout, f"{middle} ({low}–{high})", "1" if result is first else compared]
        cells += [f"{each.median:.3g}" for each in waits]
        cells += [f"{sent:,.0f}" for sent in result.sent_bytes_per_token]
        rows.append([*cells, units.size(result.memory_bytes), f"{result.flop_utilisation:.1%}"])
    comm, sent = ("comm", "exposed"), ("attn B", "other B")
    header = ("layout", "tokens/s", "× first", *comm, *sent, "memory", "FLOPs")
    title = f"{first.model} on {first.ranks} ranks, {first.device}"
    legend = LEGEND.format(units.count(first.product_flops))
    return "\n".join([title, text_table(header, rows), "", legend])


def losses_text(results: Sequence[Result]) -> str:
    """Whether they trained the same model: a comparison of speed says nothing otherwise."""
    bad = [result.layout for result in results if not math.isfinite(result.loss)]
    if bad:
        return f"Losses are not finite ({', '.join(bad)}): the comparison says nothing. Lower --lr."
    by_ranks: dict[int, list[Result]] = {}
    for result in results:
        by_ranks.setdefault(result.ranks, []).append(result)
    groups = by_ranks.values()
    gap, layout = max((abs(r.loss - own[0].loss), r.layout) for own in groups for r in own)
    if gap == 0:
        return "The layouts reach equal losses."
    differ = f"differ by at most {gap:.1e} nats per token ({layout})"
    return f"The layouts' losses after the last iteration {differ}."


def scaling_text(results: Sequence[Result], kind: str) -> str:
    """Throughput of each layout over the ranks, and its efficiency: per rank, against its smallest number."""
    speeds: dict[str, dict[int, float]] = {}
    for result in results:
        speeds.setdefault(result.layout, {})[result.ranks] = result.tokens_per_second.median
    numbers = sorted({result.ranks for result in results})
    rows = []
    for layout, own in speeds.items():
        base = own[min(own)] / min(own)
        shares = {ranks: f"{speed / ranks / base:.0%}" for ranks, speed in own.items()}
        cells = (f"{units.count(own[n])} ({shares[n]})" if n in own else "–" for n in numbers)
        rows.append([layout, *cells])
    title = f"{kind} scaling, tokens/s (efficiency per rank)"
    return text_table([title, *(f"{ranks} ranks" for ranks in numbers)], rows) + "\n"


def draw(results: Sequence[Result], path: Path, *, scaling: str | None) -> None:
    """Bars of throughput, communication and memory; with scaling, throughput over ranks."""
    import matplotlib
    from matplotlib.figure import Figure

    from helix_megatron.training.report_picture import LIGHT, PALETTE, style

    with matplotlib.rc_context(style(LIGHT)):
        if scaling:
            figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
            _draw_scaling(figure.subplots(), results, scaling, PALETTE)
        else:
            figure = Figure(figsize=(11, 1.4 + 0.42 * len(results)), dpi=160, layout="constrained")
            _draw_bars(figure.subplots(1, 3, sharey=True), results, PALETTE)
        figure.suptitle(f"{results[0].model}, {results[0].device}", fontsize="medium")
        figure.savefig(path)


def _draw_bars(panels: Any, results: Sequence[Result], palette: Sequence[str]) -> None:
    names = [result.layout for result in results]
    speeds = [result.tokens_per_second for result in results]
    errors = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
    panels[0].barh(names, [s.median for s in speeds], xerr=errors, color=palette[0], height=0.6)
    panels[0].set_xlabel("tokens/s (whiskers: quartiles)")
    panels[0].invert_yaxis()
    comm = [result.comm_ms_per_token.median for result in results]
    exposed = [result.exposed_ms_per_token.median for result in results]
    panels[1].barh(names, comm, color=palette[0], height=0.6, label="in collectives")
    panels[1].barh(names, exposed, color=palette[1], height=0.25, label="exposed")
    panels[1].set_xlabel("communication of a rank, ms/token")
    panels[1].legend(fontsize="small")
    memory = [result.memory_bytes / 2**20 for result in results]
    panels[2].barh(names, memory, color=palette[2], height=0.6)
    panels[2].set_xlabel("memory of the fullest rank, MiB")


def _draw_scaling(
    axes: Any, results: Sequence[Result], scaling: str, palette: Sequence[str]
) -> None:
    for index, layout in enumerate(dict.fromkeys(result.layout for result in results)):
        own = sorted((r for r in results if r.layout == layout), key=lambda r: r.ranks)
        ranks, speeds = [r.ranks for r in own], [r.tokens_per_second for r in own]
        colour = palette[index % len(palette)]
        axes.plot(ranks, [s.median for s in speeds], marker="o", color=colour, label=layout)
        band = [s.low for s in speeds], [s.high for s in speeds]
        axes.fill_between(ranks, *band, color=colour, alpha=0.2)
    axes.set_xscale("log", base=2)
    numbers = sorted({r.ranks for r in results})
    axes.set_xticks(numbers, list(map(str, numbers)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks")
    axes.set_ylabel(f"tokens/s, {scaling} scaling (band: quartiles)")
    axes.legend(fontsize="small")


def _model_name(run: RunConfig) -> str:
    model = run.model
    heads = f"{model.num_attention_heads} heads"
    if model.num_query_groups != model.num_attention_heads:
        heads += f", {model.num_query_groups} key-value heads"
    experts = f", {model.num_experts} experts" if model.num_experts else ""
    return (
        f"{model.num_layers} layers of {model.hidden_size}, {heads} of {model.kv_channels}{experts}, "
        f"sequences of {model.seq_length}, global batch {run.global_batch_size}"
    )
