"""Stages of unequal layers: megatron-core's own rules, and what searches and commands make of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.launch_commands import training_command
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.memory import expert_weights, rank_weights, training_memory
from helix_megatron.plan.models import model_of
from helix_megatron.plan.perfetto import timeline
from helix_megatron.plan.results import Limits
from helix_megatron.plan.score import iteration
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.stages import chunk_layers, dealings, is_accounted, stage_layers


def built_by_megatron(layers, stages, chunks, first, last):
    """[stage][chunk] as megatron-core itself counts them."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    accounted = is_accounted(layers, stages, first, last)
    config = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_model_parallel_layout=None,
        num_layers_in_first_pipeline_stage=None if accounted else first or None,
        num_layers_in_last_pipeline_stage=None if accounted else last or None,
        account_for_embedding_in_pipeline_split=accounted and first > 0,
        account_for_loss_in_pipeline_split=accounted and last > 0,
    )
    return tuple(
        tuple(
            get_num_layers_to_build(config, vp_stage=chunk if chunks > 1 else None, pp_rank=stage)
            for chunk in range(chunks)
        )
        for stage in range(stages)
    )


@pytest.mark.parametrize("layers", [126, 94, 80, 61])
def test_stages_have_the_layers_that_megatron_builds(layers):
    """Every way that the search tries, chunks included, against megatron-core's own count."""
    tried = 0
    for stages in (2, 3, 4, 7, 8, 16, 32, 64):
        for first, last in dealings(layers, stages):
            assert sum(stage_layers(layers, stages, first, last)) == layers
            for chunks in (1, 2, 3, 4, 8):
                cut = chunk_layers(layers, stages, chunks, first, last)
                if cut is not None:
                    tried += 1
                    assert cut == built_by_megatron(layers, stages, chunks, first, last)
    assert tried >= 8


@pytest.mark.parametrize(
    ("layers", "stages", "ends", "chunked"),
    [
        (
            126,
            8,
            (15, 15),
            {1: True, 2: True, 8: True, 16: False},
        ),  # NVIDIA's Llama 3.1 405B on H100
        (94, 8, (11, 11), {1: True, 4: True, 5: False}),  # and its Qwen3 235B
        (
            61,
            4,
            (15, 14),
            {1: True, 2: False},
        ),  # three layers are missing: numbers instead of accounting
        (61, 2, (0, 30), {1: True, 31: False}),
        (80, 8, (0, 0), {1: True, 5: True, 3: False}),
    ],
)
def test_published_models_are_dealt(layers, stages, ends, chunked):
    """The numbers worked out by hand; a chunk without layers is none."""
    assert dealings(layers, stages) == (ends,)
    for chunks, possible in chunked.items():
        assert (chunk_layers(layers, stages, chunks, *ends) is not None) == possible


def test_layers_that_cannot_be_dealt_say_so():
    """80 layers on 32 stages would leave the first or the last stage with more than the others."""
    assert dealings(80, 32) == () == dealings(3, 4)
    with pytest.raises(
        HelixError, match="13 layers cannot be dealt to 4 pipeline stages with 3 on the first"
    ):
        stage_layers(13, 4, first=3)


def plan(model, gpus, batch, **limits):
    """A search on DGX H100 in fp8, as the published runs were."""
    job, software = Job("train", 8192, batch), Software(precision="fp8")
    cluster = CLUSTERS["dgx-h100"]
    return search(model_of(model), gpus, cluster, job, software, Limits(**limits))


def test_models_of_126_and_61_layers_are_planned():
    """Pipelines of 8 and of 16 stages; the command has one of Megatron's two kinds of flags, never both."""
    found = plan("llama-3-405b", 1024, 512, tp=8, cp=2, pp=8, vp=8)
    layout = found.rows[0].layout
    assert (layout.first, layout.last) == (15, 15)
    command = training_command(found, layout)
    for words in (
        "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split",
        "--num-virtual-stages-per-pipeline-rank 8",
        "-m helix_megatron.launch",
    ):
        assert words in command
    assert "--num-layers-per-virtual" not in command and "--decoder-" not in command
    flags = "--num-layers 61 --hidden-size 4096 --num-attention-heads 32"
    found = plan(flags, 64, 64, pp=16)
    command = training_command(found, found.rows[0].layout)
    assert "--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2" in " ".join(
        command.replace("\\", " ").split()
    )
    assert "account-for" not in command
    asked = plan(flags, 64, 64, pp=4, first=13, last=16)
    assert {row.layout.stages(61) for row in asked.rows} == {(13, 16, 16, 16)}


def test_the_busiest_and_the_fullest_stage_decide():
    """Between even stages of 15 and of 16 layers; run event by event, it takes what the closed form says."""
    cluster, job = CLUSTERS["dgx-h100"], Job("train", 8192, 512)
    whole, seconds = model_of("llama-3-405b"), {}
    for layers, ends in ((120, (0, 0)), (126, (15, 15)), (128, (0, 0))):
        flags = " ".join(
            f"--{k.replace('_', '-')} {v}" for k, v in whole.flags.items() if v is not True
        )
        switches = " ".join(f"--{k.replace('_', '-')}" for k, v in whole.flags.items() if v is True)
        model = model_of(
            f"{flags} {switches}".replace("--num-layers 126", f"--num-layers {layers}")
        )
        scenario = Scenario(model, job, cluster, Software(precision="fp8"))
        layout = Layout(8, 8, 8, 2, sequence_parallel=True, first=ends[0], last=ends[1])
        memory = training_memory(model, layout, job, scenario.software)
        seconds[layers] = iteration(scenario, layout).seconds, memory.total
    assert seconds[120] < seconds[126] < seconds[128]
    assert rank_weights(model, layout, 3) == pytest.approx(16 * 3.2e9 / 8, rel=0.05)
    assert expert_weights(model, layout) == 0
    found = plan("llama-3-405b", 1024, 512, tp=8, cp=2, pp=8, vp=1)
    best = found.rows[0].layout
    assert timeline(found, best).seconds == pytest.approx(
        iteration(found.scenario, best).pipeline, rel=0.02
    )
