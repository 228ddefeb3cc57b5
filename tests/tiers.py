"""Which tests run: always the quick tier; the full tier, or a part of it, when asked for.

The quick tier proves every property; the full tier proves it again over more cases, sizes and lengths, in named
parts. `./scripts/test.sh --full` runs all parts, `--full-part NAME` one. docs/testing.md says what each proves.

    @pytest.mark.full("training")            a test, or a case of one, that only runs with its part
    KILLS = sized("faults", full=20, quick=5)   a size that grows with it
"""

from __future__ import annotations

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
# uvicorn. It runs in environments with other versions of them (scripts/compatibility.sh).
COMPATIBILITY = tuple(
    f"tests/{name}"
    for name in (
        "test_versions.py",
        "test_doctor.py",
        # megatron-core
        "megatron/test_host_settings.py",
        "megatron/test_specs.py",
        "megatron/test_transformer_config.py",
        "test_parallel_state.py",
        "megatron/test_cpu_runtime.py",
        "megatron/test_norms.py",
        "core/test_softcap.py",
        "model/test_families.py::test_logits_are_those_of_transformers[",
        "megatron/test_self_attention.py",
        "megatron/test_context_parallel.py",
        "megatron/test_gpt_model.py",
        "megatron/test_hybrid.py",
        "megatron/test_mamba.py",
        "megatron/test_heterogeneous.py",
        "megatron/test_stock_megatron.py",
        "megatron/test_fake_cuda.py",
        "checkpoint/test_canonical_io.py",
        "training/test_training.py::test_losses_are_those_of_one_process[4 ranks",
        "training/test_training.py::test_losses_are_those_of_one_process[details",
        "training/test_training.py::test_losses_are_those_of_one_process[MoE",
        "training/test_training_checkpoints.py::test_round_trips_are_bit_exact[",
        "training/test_training_checkpoints.py::test_a_resumed_run_continues_bit_for_bit[one process",
        "training/test_training_checkpoints.py::test_a_full_disk",
        "megatron_lm/test_megatron_lm_hooks.py",
        "graph/test_graph_trace.py",
        # transformers, accelerate, safetensors
        "huggingface/test_huggingface_upstream.py",
        "huggingface/test_huggingface_models.py",
        "huggingface/test_huggingface_training.py",
        "huggingface/test_huggingface_files.py",
        "huggingface/test_huggingface_checkpoints.py",
        # DeepSpeed
        "deepspeed/test_deepspeed_upstream.py",
        "deepspeed/test_deepspeed_initialize.py",
        "deepspeed/test_deepspeed_training.py::test_thirty_steps",
        # uvicorn
        "serving/test_serving_errors.py",
        "serving/test_serving_limits.py",
    )
)

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
