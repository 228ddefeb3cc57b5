"""All layouts of a model on a cluster: those that fit, ranked, and the others with the reason."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

from helix_megatron.arguments import as_flag
from helix_megatron.attention_rates import check_kernel
from helix_megatron.core.caches import CACHE_LAYOUTS
from helix_megatron.core.exchanges import EXACT, NO_EXCHANGE
from helix_megatron.errors import HelixError, divisors
from helix_megatron.plan import refusals
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.inference_memory import inference_memory
from helix_megatron.plan.layouts import Layout, attention_shape, head_layout, strip
from helix_megatron.plan.memory import RECOMPUTE, training_bytes, training_states
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.results import Limits, Plan, Rejected, Row
from helix_megatron.plan.score import iteration, layers_cost
from helix_megatron.plan.settings import Job, Software
from helix_megatron.plan.stages import chunk_layers, dealings, stage_layers

MICRO_BATCHES = (1, 2, 4, 8, 16)


def search(
    model: ModelSpec,
    gpus: int,
    cluster: Cluster,
    job: Job,
    software: Software,
    limits: Limits | None = None,
) -> Plan:
    """Enumerate, reject, predict and rank.

    Raises:
        HelixError: no GPUs, more than the cluster has, or a precision that its chip lacks.
    """
    if gpus < 1:
        raise HelixError(f"--gpus {gpus} must be at least 1.")
    if cluster.gpus is not None and gpus > cluster.gpus:
        raise HelixError(f"--gpus {gpus}: cluster {cluster.name} has {cluster.gpus}.")
    needed = {"fp8": ("fp8", "bf16")}.get(software.precision, (software.precision,))
    lacking = [name for name in needed if name not in cluster.chip.flops]
    if lacking:
        problem = f"chip {cluster.chip.name} has no {lacking[0]}."
        raise HelixError(problem, valid=cluster.chip.flops, valid_name="precisions there")
    check_kernel(software.kernel, model.head_dim)
    # Which groups cross domains depends on how many GPUs there are.
    cluster = dataclasses.replace(cluster, gpus=gpus, domain=cluster.used_domain(gpus))
    limits = limits or Limits()
    plan = Plan(model, cluster, job, software, gpus, limits)
    collecting = gc.isenabled()
    gc.disable()  # a hundred thousand steps stay in caches: looking for garbage among them takes its time
    try:
        _Search(plan, limits).run()
    finally:
        if collecting:
            gc.enable()
    plan.everything.sort(key=lambda row: (row.seconds, row.memory))
    plan.rows = [row for row in plan.everything if limits.allow(row.layout)]
    return plan


class _Search:
    """The state of one enumeration."""

    def __init__(self, plan: Plan, limits: Limits) -> None:
        self.plan, self.limits = plan, limits
        self.model, self.job, self.software = plan.model, plan.job, plan.software
        self.cluster, self.gpus = plan.cluster, plan.gpus
        self.training = plan.job.task == "train"
        self.seen: set[tuple[str, str]] = set()
        # (expert parallel, expert tensor parallel): that fit at a (TP, CP, PP, DP); seconds of a layer with it.
        self.dealt: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        self.speed: dict[Layout, dict[tuple[int, int], float]] = {}

    def reject(self, what: str, kind: str, reason: str, **sizes: Any) -> None:
        if (what, reason) not in self.seen:
            self.seen.add((what, reason))
            self.plan.rejected.append(Rejected(what, kind, reason, tuple(sizes.items())))

    def _allowed(self, what: str, refusal: refusals.Refusal, **sizes: Any) -> bool:
        """Whether there is no refusal; one is kept for the report."""
        if refusal is not None:
            self.reject(what, *refusal, **sizes)
        return refusal is None

    def run(self) -> None:
        for tp in self._tensor_parallel():
            for segments, query_layout in self._head_cuts(tp):
                for cp in self._context_parallel(tp, segments):
                    for base in self._micro_batches(tp, cp, segments, query_layout):
                        for cut in self._exchanges(base):
                            for layer in self._sequence_parallel(cut):
                                self._pipelines(layer)

    # ------------------------------------------------------- inside a layer

    def _tensor_parallel(self) -> Iterator[int]:
        """TP sizes that the widths of the model allow."""
        domain = self.cluster.domain
        most = self.limits.max_tp or max(4 * domain, 16)
        for tp in divisors(self.gpus):
            refusal = refusals.of_tensor_parallel(self.model, tp, training=self.training)
            if tp > most and self.limits.tp != tp:
                why = f"a group would span {-(-tp // domain)} domains of {domain} GPUs in every layer; more "
                why += f"than {most} is tried only with --max-tensor-parallel {tp}"
                refusal = ("too wide", why)
            if self._allowed(f"TP {tp}", refusal, tp=tp):
                yield tp

    def _head_cuts(self, tp: int) -> Iterator[tuple[int, str]]:
        """(m, query layout) for m·n = TP; m = 1 first."""
        layouts = ("segments",) if self.job.task == "decode" else ("heads", "segments")
        for m in divisors(tp):
            what = f"TP {tp}, m {m}"
            if m > 1 and not self._allowed("m > 1", refusals.of_cut_heads(self.model)):
                continue
            if m == 1:
                whole = refusals.of_whole_heads(self.model, tp, cached=self.job.task == "decode")
                if self._allowed(what, whole, tp=tp, segments=1):
                    yield 1, "segments"
                continue
            for query_layout in layouts:
                # Query layout heads needs what segments needs, and whole heads for every rank.
                refusal: refusals.Refusal = None
                try:
                    for model in {self.model, self.model.local_model}:
                        head_layout(model, tp, m, query_layout)
                except HelixError as error:
                    refusal = refusals.INDIVISIBLE, error.worded(as_flag)
                sizes = {"tp": tp, "segments": m, "query_layout": query_layout}
                if self._allowed(f"{what}, queries {query_layout}", refusal, **sizes):
                    yield m, query_layout

    def _context_parallel(self, tp: int, segments: int) -> Iterator[int]:
        yield 1
        if segments > 1:
            return  # exchanges are modelled for whole sequences
        for cp in divisors(self.gpus // tp)[1:]:
            refusal = refusals.of_context_parallel(
                self.model, self.job, cp, asked=self.limits.cp == cp
            )
            if self._allowed(f"CP {cp}", refusal, cp=cp):
                yield cp

    def _micro_batches(
        self, tp: int, cp: int, segments: int, query_layout: str
    ) -> Iterator[Layout]:
        """Layouts of a layer, sequence parallel where they can be."""
        sequence = self.job.sequence
        asked = tp > 1 and self.job.task != "decode"
        parallel = asked and sequence // cp % tp == 0
        if asked and not parallel:
            what = f"TP {tp}, CP {cp}"
            why = f"sequence length {sequence} is not divisible by TP {tp}; nearest that is: "
            why += str(-(-sequence // (tp * cp)) * tp * cp)
            if self.model.experts and self.training:
                why += " (Megatron's MoE needs it)"
                self.reject(what, refusals.INDIVISIBLE, why, tp=tp, cp=cp)
                return
            self.reject(f"{what}, sequence parallel", "sequence parallel", why, tp=tp, cp=cp)
        sizes: tuple[int, ...] = MICRO_BATCHES
        if self.job.task == "decode":
            sizes = tuple(divisors(self.job.global_batch))
        if self.limits.micro_batch:
            sizes = tuple(sorted({*sizes, self.limits.micro_batch}))
        for size in sizes:
            if self.job.global_batch % size == 0:
                base = Layout(tp=tp, cp=cp, segments=segments, query_layout=query_layout)
                yield base._replace(micro_batch=size, sequence_parallel=parallel)

    def _sequence_parallel(self, layer: Layout) -> Iterator[Layout]:
        """With it, which saves memory, and without it, where that is faster or asked for."""
        yield layer
        if not layer.sequence_parallel or (self.model.experts and self.training):
            return
        without = layer._replace(sequence_parallel=False)
        more = 100 * (self._layer_seconds(without) / self._layer_seconds(layer) - 1)
        if more < 0 or self.limits.sequence_parallel is False:
            yield without
            return
        what = f"{layer.describe()}, micro-batch {layer.micro_batch}, no sequence parallel"
        why = f"its layers are {more:.1f} % slower than with it, and keep more"
        self.reject(what, "slower without sequence parallel", why, **_sizes(without))

    def _exchanges(self, base: Layout) -> Iterator[Layout]:
        """The fastest exchange of each cut; the others are rejected with what they would cost more."""
        latent = self.model.special.latent is not None and base.tp > 1
        if self.job.task == "decode" and (latent or base.segments > 1):
            for cache in CACHE_LAYOUTS:
                if not latent or cache.placement != "all":  # a latent is one head, and kept whole
                    yield base._replace(cache=cache.name, exchange=NO_EXCHANGE.name)
            return
        if base.segments == 1:
            yield base
            return
        what = f"TP {base.tp}, m {base.segments}, queries {base.query_layout}, micro-batch {base.micro_batch}"
        shape = attention_shape(self.model, base, self.job.sequence, self.software.element)
        timed: list[tuple[float, Layout]] = []
        for exchange in EXACT:
            if exchange.query_layout != base.query_layout:
                continue  # it is tried with the other query layout, where that fits
            layout = base._replace(exchange=exchange.name)
            reason = exchange.supports(shape)
            if reason:
                self.reject(f"{what}, {exchange.name}", "exchange", reason, **_sizes(layout))
                continue
            timed.append((self._layer_seconds(layout), layout))
        timed.sort(key=lambda pair: pair[0])
        for seconds, layout in timed[1:]:
            if layout.exchange == self.limits.exchange:
                yield layout
                continue
            more = 100 * (seconds / timed[0][0] - 1)
            why = f"its layers are {more:.1f} % slower than with {timed[0][1].exchange}"
            self.reject(f"{what}, {layout.exchange}", "slower exchange", why, **_sizes(layout))
        if timed:
            yield timed[0][1]

    # ------------------------------------------------------- between layers

    def _pipelines(self, layer: Layout) -> None:
        rest = self.gpus // (layer.tp * layer.cp)
        for pp in divisors(rest):
            if not self._allowed(f"PP {pp}", refusals.of_stages(self.model.num_layers, pp), pp=pp):
                continue
            dp, size = rest // pp, layer.micro_batch
            refusal = refusals.of_batch(self.job.global_batch, dp, size)
            if not self._allowed(f"DP {dp}, micro-batch {size}", refusal, dp=dp, micro_batch=size):
                continue
            batches = self.job.global_batch // (dp * size)
            for first, last in self._dealings(pp):
                for vp in self._chunks(pp, batches, first, last):
                    placed = layer._replace(pp=pp, dp=dp, vp=vp, first=first, last=last)
                    self._consider(self._expert_parallel(layer, placed))

    def _dealings(self, pp: int) -> Iterator[tuple[int, int]]:
        """(layers of the first stage, of the last) to try: those of the search, and what the user asks for."""
        layers, asked = self.model.num_layers, (self.limits.first or 0, self.limits.last or 0)
        yield from dealings(layers, pp)
        if any(asked) and pp > 1 and asked not in dealings(layers, pp):
            try:
                stage_layers(layers, pp, *asked)
                yield asked
            except HelixError as error:
                self.reject(f"PP {pp}", refusals.INDIVISIBLE, str(error), pp=pp)

    def _chunks(self, pp: int, batches: int, first: int, last: int) -> Iterator[int]:
        layers = self.model.num_layers
        yield 1
        if pp == 1 or not self.training or self.model.special.has_pattern:
            return  # Megatron interleaves no stages of a hybrid
        if batches % pp:
            what = f"PP {pp} interleaved, {batches} micro-batches"
            why = f"the interleaved schedule needs micro-batches in multiples of {pp}"
            self.reject(what, refusals.INDIVISIBLE, why, pp=pp)
            return
        for chunks in divisors(max(stage_layers(layers, pp, first, last)))[1:]:
            if chunk_layers(layers, pp, chunks, first, last):
                yield chunks

    def _expert_parallel(self, layer: Layout, placed: Layout) -> list[Layout]:
        """The ways to deal experts whose weights and states fit, those with the fastest layers first."""
        if not self.model.experts:
            return [placed]
        place = placed.tp, placed.cp, placed.pp, placed.dp
        if place not in self.dealt:
            self.dealt[place] = self._deals(placed)
        known = self.speed.setdefault(layer, {})
        for pair in self.dealt[place]:
            if pair not in known:
                known[pair] = self._layer_seconds(layer._replace(ep=pair[0], etp=pair[1]))
        order = sorted(self.dealt[place], key=known.__getitem__)
        return [placed._replace(ep=ep, etp=etp) for ep, etp in order]

    def _deals(self, layout: Layout) -> list[tuple[int, int]]:
        """(expert parallel, expert tensor parallel) that fit, whatever the layer looks like."""
        model, ranks = self.model, layout.tp * layout.cp * layout.dp
        found = []
        for ep in divisors(model.experts):
            for etp in {1, layout.tp}:
                if etp > 1 and not model.disable_bias_linear:
                    why = "Megatron cannot cut experts with biases"
                    self.reject(f"ETP {etp}", refusals.INDIVISIBLE, why, etp=etp)
                elif ranks % (ep * etp) == 0 and model.moe_ffn % etp == 0:
                    found.append(layout._replace(ep=ep, etp=etp))
        capacity = self.cluster.chip.memory
        fitting = [option for option in found if self._states(option) <= capacity]
        if not fitting:
            least = min(found, key=self._states)
            self._does_not_fit(least, self._states(least), " for weights and states alone")
        return [(option.ep, option.etp) for option in fitting]

    def _states(self, layout: Layout) -> float:
        """Bytes that do not depend on activations."""
        if not self.training:
            return inference_memory(self.model, layout, self.job, self.software).total
        return training_states(self.model, layout, self.software).total

    def _layer_seconds(self, layout: Layout) -> float:
        cost = layers_cost(self.plan.scenario, strip(layout))
        return cost.forward + cost.backward * self.training

    def _consider(self, options: list[Layout]) -> None:
        """Rank the first option that fits, with as little recomputation as any needs."""
        if not options:
            return
        capacity, limits = self.cluster.chip.memory, self.limits
        choices = RECOMPUTE if self.training else RECOMPUTE[:1]
        fixed = {key: getattr(limits, key) for key in ("recompute", "ep", "etp")}
        asked = [(key, value) for key, value in fixed.items() if value is not None]
        fits, memories = False, {}
        for i, recompute in enumerate(choices):
            for option in options:
                if option not in memories:
                    memories[option] = self._memories(option)
                memory = memories[option][i]
                if memory > capacity:
                    continue
                layout = option._replace(recompute=recompute)
                if fits and any(getattr(layout, key) != value for key, value in asked):
                    continue
                self.plan.everything.append(Row(layout, self._seconds(layout), memory))
                fits = True
                if not asked:
                    return
        if fits:
            return
        how = f" with {choices[-1]} recomputation" if self.training else ""
        least = min(options, key=lambda option: memories[option][-1])
        self._does_not_fit(least, memories[least][-1], how)

    def _memories(self, layout: Layout) -> tuple[float, ...]:
        """Bytes with each way of recomputation."""
        if not self.training:
            return (inference_memory(self.model, layout, self.job, self.software).total,)
        return training_bytes(self.model, layout, self.job, self.software)

    def _seconds(self, layout: Layout) -> float:
        if not self.training:
            return self.plan.predict(layout).seconds
        return iteration(self.plan.scenario, layout).seconds

    def _does_not_fit(self, layout: Layout, memory: float, how: str) -> None:
        detail = f"{layout.describe()}, micro-batch {layout.micro_batch}"
        if layout.exchange != NO_EXCHANGE.name:
            detail += f", {layout.exchange}"
        capacity = self.cluster.chip.memory
        why = f"needs {memory / 1e9:.0f} GB a GPU{how}, of {capacity / 1e9:.0f} GB"
        sizes = tuple(layout._asdict().items())
        self.plan.rejected.append(Rejected(detail, "does not fit", why, sizes, memory))


def _sizes(layer: Layout) -> dict[str, Any]:
    """What a rejected layer has in common with all layouts that are made of it."""
    names = ("tp", "cp", "segments", "query_layout", "micro_batch", "exchange")
    return {name: getattr(layer, name) for name in names}
