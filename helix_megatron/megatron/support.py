"""What does not work with cut heads is refused when the model is configured, with what to do instead."""

from __future__ import annotations

import warnings
from typing import Any

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError

STOCK = "or leave --intra-head-parallel-size at 1, which is stock attention"

# Setting of TransformerConfig, the value that works, what it is, what to do instead.
REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    (
        "multi_latent_attention",
        False,
        "multi-latent attention has no key-value heads to cut",
        "Set multi_latent_attention (--multi-latent-attention) off",
    ),
    (
        "context_parallel_size",
        1,
        "context parallelism cuts the sequence inside the same layers",
        "Set --context-parallel-size 1 and give those ranks to --intra-head-parallel-size",
    ),
    (
        "fp8",
        None,
        "fp8 scaling factors are not kept for exchanged segments",
        "Use --bf16 without --fp8-format",
    ),
    (
        "fp4",
        None,
        "fp4 scaling factors are not kept for exchanged segments",
        "Use --bf16 without --fp4-format",
    ),
    (
        "cuda_graph_impl",
        "none",
        "captured graphs cannot hold the exchanges of a head group",
        "Leave --cuda-graph-impl at none",
    ),
    (
        "enable_cuda_graph",
        False,
        "captured graphs cannot hold the exchanges of a head group",
        "Leave out --enable-cuda-graph",
    ),
    (
        "external_cuda_graph",
        False,
        "captured graphs cannot hold the exchanges of a head group",
        "Leave out --external-cuda-graph",
    ),
    (
        "flash_decode",
        False,
        "the flash-decode kernel needs whole key-value heads in the cache",
        "Leave out --flash-decode",
    ),
    (
        "softmax_type",
        "vanilla",
        "attention sinks are a parameter of whole heads",
        "Set --softmax-type vanilla",
    ),
    (
        "qk_clip",
        False,
        "QK clipping needs the largest score of whole heads",
        "Leave out --qk-clip",
    ),
    (
        "log_max_attention_logit",
        False,
        "the largest score of a head is not visible to fused attention",
        "Leave out --log-max-attention-logit",
    ),
    (
        "experimental_attention_variant",
        None,
        "this variant replaces self-attention itself",
        "Leave out --experimental-attention-variant",
    ),
    (
        "heterogeneous_block_specs",
        False,
        "layers with different numbers of heads need different layouts",
        "Use a model whose layers are alike",
    ),
    (
        "fused_single_qkv_rope",
        False,
        "the fused kernel rotates whole heads",
        "Leave fused_single_qkv_rope off",
    ),
    (
        "batch_invariant_mode",
        False,
        "its kernels are not used by the exchanges",
        "Leave out --batch-invariant-mode",
    ),
    (
        "fine_grained_activation_offloading",
        False,
        "offloading has not been shown to work with the exchanges",
        "Leave out --fine-grained-activation-offloading",
    ),
    (
        "mtp_num_layers",
        None,
        "multi-token prediction layers have not been shown to work with cut heads",
        "Leave out --mtp-num-layers",
    ),
    (
        "test_mode",
        False,
        "its consistency check expects Megatron's own query and key norms",
        "Leave test_mode off",
    ),
)


def check_supported(config: Any, helix: HelixConfig) -> None:
    """Refuse settings of a `TransformerConfig` that cannot work together with cut heads.

    Raises:
        HelixError: names the setting, its value, why, and what to do instead.
    """
    for name, works, why, instead in REFUSED:
        value = getattr(config, name, works)
        if value != works and not (works is None and not value):
            raise HelixError(
                f"{name} = {value} does not work with intra-head parallel size "
                f"{helix.intra_head_parallel_size}: {why}. {instead}, {STOCK}."
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
        f"heads, which cut heads do not have. Use its static context; or helix generate and helix serve "
        f"(helix_megatron.inference), whose paged cache knows cut heads; {STOCK}."
    )


def refuse_packed_sequences(qkv_format: str) -> HelixError:
    """The error of packed sequences."""
    return HelixError(
        f"packed sequences (qkv_format {qkv_format}) do not work with exact Helix attention. Pad the "
        f"sequences to one length and pass an attention mask, {STOCK}."
    )
