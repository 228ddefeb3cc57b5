"""What does not work with cut heads is refused when the model is configured, with what to do instead."""

from __future__ import annotations

import warnings
from typing import Any

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, Setting

# How the advice of an error ends that stock attention would not raise.
STOCK = (
    ", or leave ",
    Setting("intra_head_parallel_size"),
    " at 1, which is stock attention.",
)
CAPTURED = "captured graphs cannot hold the exchanges of a head group"

# Setting of TransformerConfig, the value that works, why another does not. What to do instead follows from the
# value, unless it is given.
REFUSED: tuple[tuple[Any, ...], ...] = (
    (
        "multi_latent_attention",
        False,
        "multi-latent attention has no key-value heads to cut",
    ),
    (
        "context_parallel_size",
        1,
        "context parallelism cuts the sequence inside the same layers",
        (
            "Set ",
            Setting("context_parallel_size", 1),
            " and give those ranks to ",
            Setting("intra_head_parallel_size"),
        ),
    ),
    (
        "fp8",
        None,
        "fp8 scaling factors are not kept for exchanged segments",
        ("Use ", Setting("bf16"), " without ", Setting("fp8")),
    ),
    (
        "fp4",
        None,
        "fp4 scaling factors are not kept for exchanged segments",
        ("Use ", Setting("bf16"), " without ", Setting("fp4")),
    ),
    ("cuda_graph_impl", "none", CAPTURED),
    ("enable_cuda_graph", False, CAPTURED),
    ("external_cuda_graph", False, CAPTURED),
    ("flash_decode", False, "the flash-decode kernel needs whole key-value heads in the cache"),
    ("softmax_type", "vanilla", "attention sinks are a parameter of whole heads"),
    ("qk_clip", False, "QK clipping needs the largest score of whole heads"),
    (
        "log_max_attention_logit",
        False,
        "the largest score of a head is not visible to fused attention",
    ),
    ("experimental_attention_variant", None, "this variant replaces self-attention itself"),
    (
        "heterogeneous_block_specs",
        False,
        "layers with different numbers of heads need different layouts",
        ("Use a model whose layers are alike",),
    ),
    (
        "fused_single_qkv_rope",
        False,
        "the fused kernel rotates whole heads",
        ("Leave fused_single_qkv_rope off",),
    ),
    ("batch_invariant_mode", False, "its kernels are not used by the exchanges"),
    (
        "fine_grained_activation_offloading",
        False,
        "offloading has not been shown to work with the exchanges",
    ),
    (
        "mtp_num_layers",
        None,
        "multi-token prediction layers have not been shown to work with cut heads",
    ),
    (
        "test_mode",
        False,
        "its consistency check expects Megatron's own query and key norms",
        ("Leave test_mode off",),
    ),
)


def check_supported(config: Any, helix: HelixConfig) -> None:
    """Refuse settings of a `TransformerConfig` that cannot work together with cut heads.

    Raises:
        HelixError: names the setting, its value, why, and what to do instead.
    """
    for name, works, why, *instead in REFUSED:
        value = getattr(config, name, works)
        if value != works and not (works is None and not value):
            usual = ("Set ", Setting(name, works)) if works else ("Leave out ", Setting(name))
            raise HelixError(
                f"{name} = {value} does not work with intra-head parallel size "
                f"{helix.intra_head_parallel_size}: {why}.",
                setting=name,
                value=value,
                remedy=(*(instead[0] if instead else usual), *STOCK),
            )
    backend = getattr(getattr(config, "attention_backend", None), "name", "auto")
    version = getattr(config, "flash_attention_version", None)
    for setting, given in (
        (f"attention_backend = {backend}", backend in ("flash", "fused")),
        (f"flash_attention_version = {version}", version is not None),
    ):
        if helix.attention == "exact" and given:
            warnings.warn(
                f"{setting} has no effect with exact Helix attention, which calls torch's "
                "scaled_dot_product_attention; that takes a fused kernel by itself where one fits.",
                stacklevel=2,
            )


def refuse_dynamic_inference() -> HelixError:
    """The error of an inference context whose kernels need whole heads in a paged cache."""
    return HelixError(
        "Megatron's dynamic inference context calls flash attention on a paged cache of whole key-value "
        "heads, which cut heads do not have.",
        remedy=(
            "Use its static context; or helix generate and helix serve (helix_megatron.inference), whose "
            "paged cache knows cut heads",
            *STOCK,
        ),
    )


def refuse_packed_sequences(qkv_format: str) -> HelixError:
    """Make the error of packed sequences, whose borders exact attention does not know."""
    return HelixError(
        f"packed sequences (qkv_format {qkv_format}) do not work with exact Helix attention.",
        remedy=("Pad the sequences to one length and pass an attention mask", *STOCK),
    )
