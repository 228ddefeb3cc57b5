"""Which tests run: always the quick tier; the full tier, or a part of it, when asked for.

The quick tier proves every property; the full tier proves it again over more cases, sizes and lengths, in named
parts. `./scripts/test.sh --full` runs all parts, `--full-part NAME` one. docs/testing.md says what each proves.

    @pytest.mark.full("training")            a test, or a case of one, that only runs with its part
    KILLS = sized("faults", full=20, quick=5)   a size that grows with it
"""

from __future__ import annotations

import re
from typing import TypeVar

T = TypeVar("T")

PARTS = (
    "attention",
    "commands",
    "training",
    "checkpoints",
    "conversion",
    "inference",
    "serving",
    "graph",
)
_chosen: set[str] = set()


def choose(parts: set[str]) -> None:
    """Run these parts of the full tier; called before test modules are imported."""
    unknown = parts - set(PARTS)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such part. Valid: {', '.join(PARTS)}.")
    _chosen.update(parts)


def chosen() -> set[str]:
    """The parts of the full tier that run."""
    return set(_chosen)


def is_full(part: str) -> bool:
    """Whether a part of the full tier runs."""
    assert part in PARTS, part
    return part in _chosen


def sized(part: str, *, full: T, quick: T) -> T:
    """One of two sizes of a test."""
    return full if is_full(part) else quick


# The compatibility tier, by the beginnings of names: what touches megatron-core, transformers, DeepSpeed and
# uvicorn, one case of a kind. "…" is any text. It runs in environments with other versions of them
# (scripts/compatibility.sh), beside the quick tier with the locked ones.
_NAMES = (
    "test_versions.py",
    "test_doctor.py",
    # megatron-core
    "megatron/test_host_settings.py",
    "megatron/test_specs.py",
    "megatron/test_transformer_config.py",
    "test_parallel_state.py::test_groups",
    "test_parallel_state.py::test_destroyed_groups_leave_nothing_behind[2",
    "test_parallel_state.py::test_collections",
    "megatron/test_cpu_runtime.py",
    "megatron/test_norms.py",
    "core/test_softcap.py",
    "model/test_families.py::test_logits_are_those_of_transformers[",
    "megatron/test_self_attention.py",
    "megatron/test_context_parallel.py::test_ranks_hold_their_part_of_attention[…-4",
    "megatron/test_context_parallel.py::test_packed_documents_are_sequences_of_their_own[…-2",
    "megatron/test_gpt_model.py",
    "megatron/test_hybrid.py::test_losses_are_those_of_one_process[",
    "megatron/test_hybrid.py::test_a_checkpoint_of_one_layout_is_loaded_at_the_other[G*G--2",
    "megatron/test_hybrid.py::test_a_checkpoint_of_one_layout_is_loaded_at_the_other[M*M--2",
    "megatron/test_hybrid.py::test_the_hooks",
    "megatron/test_mamba.py",
    "megatron/test_heterogeneous.py",
    "megatron/test_stock_megatron.py::test_stock_megatron_core_loads_what_helix_saved[",
    "megatron/test_stock_megatron.py::test_helix_loads_what_stock_megatron_core_saved[",
    "megatron/test_stock_megatron.py::test_latent",
    "megatron/test_fake_cuda.py",
    "checkpoint/test_canonical_io.py::test_what_megatron_saves_is_read[",
    "training/test_training.py::test_losses_are_those_of_one_process[4 ranks, m 2, DP 2",
    "training/test_training.py::test_losses_are_those_of_one_process[4 ranks, m 2, PP 2",
    "training/test_training.py::test_losses_are_those_of_one_process[details, 4 ranks, m 2]",
    "training/test_training.py::test_losses_are_those_of_one_process[MoE, 4 ranks, m 2, EP 2, DP 2",
    "training/test_training_checkpoints.py::test_round_trips_are_bit_exact[dense, ZeRO-1: (2,1)",
    "training/test_training_checkpoints.py::test_round_trips_are_bit_exact[GQA, ZeRO-1: (1,2), CP 2",
    "training/test_training_checkpoints.py::test_round_trips_are_bit_exact[experts: (2,2), EP 2",
    "training/test_training_checkpoints.py::test_a_resumed_run_continues_bit_for_bit[one process",
    "training/test_training_checkpoints.py::test_a_full_disk",
    "megatron_lm/test_megatron_lm_hooks.py",
    "graph/test_graph_trace.py::test_traced_collectives_are_those_that_really_run[",
    "graph/test_graph_trace.py::test_memory",
    # transformers, accelerate, safetensors
    "huggingface/test_huggingface_upstream.py",
    "huggingface/test_huggingface_models.py",
    "huggingface/test_huggingface_training.py",
    "huggingface/test_huggingface_files.py",
    "huggingface/test_huggingface_checkpoints.py",
    # DeepSpeed
    "deepspeed/test_deepspeed_upstream.py",
    "deepspeed/test_deepspeed_initialize.py",
    "deepspeed/test_deepspeed_training.py::test_thirty_steps_equal_one_process[2",
    "deepspeed/test_deepspeed_training.py::test_replicas_of_a_cut_model[3",
    # uvicorn
    "serving/test_serving_errors.py",
    "serving/test_serving_limits.py",
)
COMPATIBILITY = {name: re.compile(f"tests/{re.escape(name).replace('…', '.*')}") for name in _NAMES}

LONGEST_FIRST = {
    f"test_{name}": place
    for place, name in enumerate(
        (
            "inference_engine",
            "training_checkpoints",
            "serve_command",
            "training",
            "inference_load",
            "deepspeed_training",
            "huggingface_models",
            "watchdog",
            "bench",
            "families",
            "deepspeed_initialize",
            "megatron_lm_launch",
            "stock_megatron",
            "bench_decode",
            "pool",
            "evidence",
            "report",
            "cpu_runtime",
        )
    )
}
