"""What cannot work with cut heads is refused in one table, with its reason and what to do instead."""

from __future__ import annotations

from typing import Any, NamedTuple

from helix_megatron.errors import HelixError, Setting

# How the advice of an error ends that stock attention would not raise.
STOCK = (
    ", or leave ",
    Setting("intra_head_parallel_size"),
    " at 1, which is stock attention.",
)

# Where a row of the table applies, as its error says it.
EVERYWHERE = "with cut heads"
CUT = "where queries are cut, too"
KERNEL = "with Helix's own attention kernels"
LEFT_CUT = "with an exchange that leaves heads cut"
BATCH = "with exchange all-to-all-batch"
FOREIGN = "with a core attention other than Helix's own"
PACKED = "with packed sequences in Helix's own attention kernels"

_HOST = ("Set ", Setting("kernel", "host"), " with a layer spec of Transformer Engine's")
_HEADS = ("Set ", Setting("query_layout", "heads"), " where the query heads divide evenly")


class Refused(NamedTuple):
    """A setting of TransformerConfig or an argument of the layer; a value that works, or several of them."""

    name: str
    works: Any
    where: str
    why: str
    instead: tuple[str | Setting, ...] = ()
    """What to do; follows from the value that works unless it is given."""


REFUSED = (
    Refused(
        "multi_latent_attention",
        False,
        EVERYWHERE,
        "multi-latent attention has no key-value heads to cut: it trains with plain tensor parallelism, and "
        "helix generate and helix serve keep its latents once on all ranks",
    ),
    Refused(
        "experimental_attention_variant",
        None,
        EVERYWHERE,
        "this variant replaces self-attention itself",
    ),
    Refused(
        "fp8_param",
        False,
        EVERYWHERE,
        "rows of a weight are dealt one by one in checkpoints, and blocks of them share a scaling factor",
    ),
    Refused(
        "fp4_param",
        False,
        EVERYWHERE,
        "rows of a weight are dealt one by one in checkpoints, and blocks of them share a scaling factor",
    ),
    Refused(
        "fused_single_qkv_rope",
        False,
        EVERYWHERE,
        "its kernel wants queries, keys and values in one tensor, and keys and values come from other ranks",
        ("Leave fused_single_qkv_rope off",),
    ),
    Refused("flash_decode", False, CUT, "its kernel rotates and keeps whole heads", _HEADS),
    Refused(
        "inference_context",
        "static",
        CUT,
        "its kernels read whole key-value heads from pages",
        (
            "Use the static context; or helix generate and helix serve, whose cache knows cut heads; or set ",
            Setting("query_layout", "heads"),
        ),
    ),
    Refused(
        "softmax_type",
        ("vanilla", "off-by-one"),
        BATCH,
        "each rank would learn the sinks of all heads from its part of the batch only",
        ("Set ", Setting("exchange", "all-to-all-heads"), " or ", Setting("query_layout", "heads")),
    ),
    Refused(
        "softmax_type",
        "vanilla",
        LEFT_CUT,
        "a sink belongs to the scores of whole heads",
        ("Set ", Setting("exchange", "all-to-all-heads"), " or ", Setting("query_layout", "heads")),
    ),
    Refused("qk_clip", False, KERNEL, "torch's kernels do not return the largest score", _HOST),
    Refused(
        "log_max_attention_logit",
        False,
        KERNEL,
        "torch's kernels do not return the largest score",
        _HOST,
    ),
    Refused(
        "batch_invariant_mode",
        False,
        KERNEL,
        "torch's kernels choose their order of summation by the batch",
        _HOST,
    ),
    Refused("fp8_dot_product_attention", False, KERNEL, "they do not compute in fp8", _HOST),
    Refused("fp8_multi_head_attention", False, KERNEL, "they do not compute in fp8", _HOST),
    Refused("attention_bias", None, KERNEL, "they take none", _HOST),
    Refused(
        "attn_logit_softcapping",
        None,
        FOREIGN,
        "neither Megatron's nor Transformer Engine's bounds scores",
        ("Set ", Setting("kernel", "auto")),
    ),
    Refused(
        "cuda_graph_impl", "none", PACKED, "the borders of documents are read on the host", _HOST
    ),
)


def problem(config: Any, where: str) -> HelixError | None:
    """The first refusal of a configuration that applies there."""
    for row in REFUSED:
        if row.where == where and hasattr(config, row.name):
            value = getattr(config, row.name)
            works = row.works if isinstance(row.works, tuple) else (row.works,)
            if value not in works and (value or None) not in works:
                return refusal(row.name, value, where)
    return None


def check(config: Any, where: str) -> None:
    """Refuse what cannot work there.

    Raises:
        HelixError: names the setting, its value, why, and what to do instead.
    """
    if error := problem(config, where):
        raise error


def refusal(name: str, value: Any, where: str) -> HelixError:
    """The error of a row of the table."""
    row = next(row for row in REFUSED if (row.name, row.where) == (name, where))
    usual = ("Set ", Setting(name, row.works)) if row.works else ("Leave out ", Setting(name))
    return HelixError(
        f"{name} = {value} does not work {where}: {row.why}.",
        setting=name,
        value=value,
        remedy=(*(row.instead or usual), *STOCK),
    )
