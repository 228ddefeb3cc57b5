"""Pipeline schedules: order, dependencies, and bubbles that the literature gives in closed form."""

from __future__ import annotations

import itertools
import random

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.plan.schedule import order_of, pipeline_seconds, simulate


def uniform(stages: int, chunks: int, seconds: float) -> list[list[float]]:
    return [[seconds / chunks] * chunks for _ in range(stages)]


@pytest.mark.parametrize(("stages", "batches"), [(2, 2), (4, 4), (4, 16), (8, 9)])
def test_one_forward_one_backward_has_the_known_bubble(stages, batches):
    """(p − 1)/(M + p − 1) of the time, whatever backward costs (arXiv 2104.04473, section 2.2.1)."""
    found = simulate(uniform(stages, 1, 1.0), uniform(stages, 1, 2.0), batches)
    assert found.seconds == pytest.approx(3.0 * (batches + stages - 1))
    assert found.bubble == pytest.approx((stages - 1) / (batches + stages - 1))


@pytest.mark.parametrize(
    ("stages", "chunks", "batches"), [(2, 2, 4), (4, 2, 4), (4, 2, 8), (4, 3, 16)]
)
def test_interleaving_divides_the_bubble_by_the_chunks(stages, chunks, batches):
    """(p − 1)/(v·M + p − 1) (arXiv 2104.04473, section 2.2.2): the reason to interleave."""
    found = simulate(uniform(stages, chunks, 1.0), uniform(stages, chunks, 2.0), batches)
    extra = 3.0 * (stages - 1) / chunks
    assert found.seconds == pytest.approx(3.0 * batches + extra)


@pytest.mark.parametrize(
    ("stages", "chunks", "batches"), [(1, 1, 3), (3, 1, 7), (4, 2, 4), (4, 2, 8)]
)
def test_every_unit_runs_once_after_what_it_needs(stages, chunks, batches):
    """A schedule that forgets a micro-batch, or runs it before its input, would flatter every pipeline."""
    generator = random.Random(7)
    forward = [[generator.uniform(1, 2) for _ in range(chunks)] for _ in range(stages)]
    backward = [[generator.uniform(2, 3) for _ in range(chunks)] for _ in range(stages)]
    message = 0.25
    slots = simulate(forward, backward, batches, message).slots
    done = {(s.backward, s.chunk * stages + s.stage, s.micro_batch): s for s in slots}
    assert len(done) == len(slots) == 2 * stages * chunks * batches
    last = stages * chunks - 1
    for (is_backward, virtual, batch), slot in done.items():
        if not is_backward and virtual:
            assert slot.start >= done[False, virtual - 1, batch].end + message - 1e-9
        if is_backward:
            assert slot.start >= done[False, virtual, batch].end - 1e-9
            if virtual < last:
                assert slot.start >= done[True, virtual + 1, batch].end + message - 1e-9
    for stage in range(stages):
        own = sorted((s.start, s.end) for s in slots if s.stage == stage)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(own)), "two at once"


@pytest.mark.parametrize("batches", [4, 16])
@pytest.mark.parametrize("chunks", [1, 2])
def test_no_stage_holds_more_micro_batches_than_the_memory_model_says(chunks, batches):
    """`memory.layers_in_flight` counts them; what runs must agree."""
    from helix_megatron.plan.layouts import Layout
    from helix_megatron.plan.memory import layers_in_flight
    from helix_megatron.plan.models import model_of

    stages, model = 4, model_of("llama-3-8b")
    layout = Layout(pp=stages, vp=chunks)
    for stage in range(stages):
        held = most = 0
        for is_backward, _, _ in order_of(stage, stages, chunks, batches):
            held += -1 if is_backward else 1
            most = max(most, held)
        layers = most * model.num_layers / stages / chunks
        assert layers == layers_in_flight(layout, model, batches, stage)


@pytest.mark.parametrize("seed", range(4))
def test_the_closed_form_ranks_as_the_events_do(seed):
    """Thousands of layouts are ranked by the closed form: with one slow stage it must stay near the events."""
    generator = random.Random(seed)
    stages, batches = generator.choice([2, 4, 8]), 8 * generator.randint(1, 4)
    chunks = generator.choice([1, 2])
    forward, backward = uniform(stages, chunks, 1.0), uniform(stages, chunks, 2.0)
    forward[-1][-1] += 0.4
    backward[-1][-1] += 0.6
    exact = simulate(forward, backward, batches).seconds
    per_stage = [sum(f) + sum(b) for f, b in zip(forward, backward, strict=True)]
    assert pipeline_seconds(per_stage, batches, chunks) == pytest.approx(exact, rel=0.04)


def test_interleaving_needs_rounds_of_micro_batches():
    """Megatron refuses it, so it must not be planned."""
    with pytest.raises(HelixError, match="multiples of the 4 pipeline stages"):
        order_of(0, 4, 2, 6)


def test_inference_runs_forward_only():
    """Prompts go through once: fill, then one micro-batch after the other."""
    found = simulate(uniform(4, 1, 1.0), uniform(4, 1, 0.0), 5)
    assert found.seconds == pytest.approx(5 + 3)
    assert not any(slot.backward for slot in found.slots)
