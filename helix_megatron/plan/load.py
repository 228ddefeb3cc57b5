"""A server under load: how many sequences run at once, and what their tokens take, from rate and lengths.

A running sequence gets a token per step. Between steps the server reads the prompts of those that arrive: with
c sequences running and o tokens for each, c / o prompts a step. So a token of each takes

    step(c, prompt + o / 2) + c / o · prefill(prompt)

seconds on average (the prompts' work is the same, whether it comes whole or in chunks beside decode), and by
Little's law c = rate · (time to first token + o · time per token).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from helix_megatron.plan.inference import predict_decode, predict_prefill
from helix_megatron.plan.inference_memory import average_cache_bytes, inference_memory
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.settings import Job, Scenario

MOST_SEQUENCES = 4096  # of one replica; servers are set to far fewer
BUSIEST = 0.95  # share of its time that a server can read prompts without an endless queue


class Load(NamedTuple):
    """Requests a second over all GPUs, and the tokens of each.

    rate: infinite where a new request comes whenever another has its answer, so that servers are always full.
    """

    rate: float
    prompt: int
    output: int


class Served(NamedTuple):
    """What one layout does under a load; all of it simulated.

    sequences: running at once in a replica. fitting: that its memory holds. first, token: seconds until the
    first token, and of each other. throughput: output tokens a second over all replicas. sustained: whether
    the rate is met; where it is not, the figures are those of a full server whose queue grows.
    """

    layout: Layout
    sequences: float
    fitting: int
    first: float
    token: float
    throughput: float
    sustained: bool


@functools.lru_cache(maxsize=65536)
def step_seconds(scenario: Scenario, layout: Layout, sequences: int, context: int) -> float:
    """One token of so many sequences of a replica."""
    batch = sequences * layout.dp
    job = Job("decode", context, batch)
    return predict_decode(
        scenario._replace(job=job), layout._replace(micro_batch=sequences)
    ).seconds


@functools.lru_cache(maxsize=4096)
def prompt_seconds(scenario: Scenario, layout: Layout, prompt: int) -> float:
    """One prompt of a replica, alone; cut heads exchange what their cache layout needs, as whole ones here."""
    plain = layout._replace(segments=1, cache="heads", micro_batch=1, dp=1)
    return predict_prefill(scenario._replace(job=Job("prefill", prompt, 1)), plain).seconds


def token_seconds(scenario: Scenario, layout: Layout, sequences: float, load: Load) -> float:
    """Of a token of each running sequence, prompts in between included."""
    context = load.prompt + load.output // 2
    low = max(1, int(sequences))
    seconds = step_seconds(scenario, layout, low, context)
    if sequences > low:
        above = step_seconds(scenario, layout, low + 1, context)
        seconds += (sequences - low) * (above - seconds)
    return seconds + sequences / load.output * prompt_seconds(scenario, layout, load.prompt)


def first_seconds(scenario: Scenario, layout: Layout, sequences: float, load: Load) -> float:
    """Until a prompt's first token: the queue of prompts, half a step, and the prompt itself.

    The queue is that of prompts which come at random and are read one after the other (M/D/1).
    """
    own = prompt_seconds(scenario, layout, load.prompt)
    busy = min(BUSIEST, load.rate / layout.dp * own) if load.rate < math.inf else 0.0
    step = step_seconds(scenario, layout, max(1, int(sequences)), load.prompt + load.output // 2)
    return own * (1 + busy / (2 * (1 - busy))) + step / 2


def fitting(scenario: Scenario, layout: Layout, load: Load) -> int:
    """Whole sequences of a replica that its memory holds beside the weights."""
    job = Job("decode", load.prompt + load.output, layout.dp)
    model, software = scenario.model, scenario.software
    alone = inference_memory(model, layout._replace(micro_batch=1), job, software)
    # Sequences that a head group deals evenly; of latents it is all ranks.
    m = layout.tp if model.special.latent else layout.segments
    each = average_cache_bytes(model, layout, m, job.sequence, software.element) / m
    each *= model.num_layers
    room = scenario.cluster.chip.memory - (alone.total - alone.cache)
    return max(0, min(MOST_SEQUENCES, int(room / each)))


def serve(scenario: Scenario, layout: Layout, load: Load) -> Served | None:
    """The steady state of one layout; None where not even one sequence fits."""
    most = fitting(scenario, layout, load)
    if most < 1:
        return None

    def rate(sequences: float) -> float:
        """Requests a second of a replica with so many running."""
        first = first_seconds(scenario, layout, sequences, load)
        return sequences / (first + load.output * token_seconds(scenario, layout, sequences, load))

    wanted, low, high = load.rate / layout.dp, 0.0, float(most)
    sustained = rate(high) >= wanted
    if sustained:
        while high - low > 0.01 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if rate(middle) < wanted else (low, middle)
    first = first_seconds(scenario, layout, high, load)
    token = token_seconds(scenario, layout, high, load)
    throughput = min(load.rate, rate(high) * layout.dp) * load.output
    return Served(layout, high, most, first, token, throughput, sustained)
