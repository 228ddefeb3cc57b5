"""What a module of a model is, told by its form: which projections it has, and of which sizes.

Attention classes of `transformers` follow a common form: projections of queries, keys and values, perhaps norms
of heads, one projection back. Where a module has that form it is cut by it, whatever its class is called, so
that a model type that was added yesterday works. What a form does not know is refused by name.

Letters: h query heads, g key-value heads, d dimensions of a key, e of a value, I intermediate dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.huggingface.cuts import Cut, block_cut, kv_cut, parts_cut, query_cut

# Model types beside the families of conversion that the tests show to be cut exactly by their form.
# fmt: off
SHOWN = frozenset(
    (
        "apertus", "bamba", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "falcon_h1", "gemma2",
        "gemma3_text", "gemma4_text", "glm4", "glm4_moe", "gpt_oss", "granite", "granitemoe",
        "granitemoehybrid", "hunyuan_v1_dense", "llama4_text", "mimo_v2_flash", "minimax_m2",
        "ministral", "ministral3", "nemotron_h", "olmo2", "olmo3", "phi3", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next", "smollm3", "starcoder2",
    )
)
# fmt: on
# Attention that was seen to chunk a doubled query projection by head, into queries and an output gate.
GATED = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text")
OUTPUTS = ("o_proj", "out_proj", "dense")
MLP_OUTPUTS = ("down_proj", "c_proj", "output_linear")
QUERY_NORMS, KEY_NORMS = ("q_norm", "query_layernorm"), ("k_norm", "key_layernorm")
LATENT = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")


@dataclass(frozen=True)
class AttentionForm:
    """One attention module's projections and sizes.

    kind: `separate` q_proj, k_proj, v_proj, or q_proj alone where the keys and values are another layer's
        (Gemma 4 E2B); `fused` qkv_proj; `latent`: queries and key-value heads are expanded from latents,
        DeepSeek's multi-head latent attention.
    output: the name of the projection back; query_rows: rows of the query projection per head, twice d with
        an output gate; flat_norms: norms over all heads together.
    """

    kind: Literal["separate", "fused", "latent"]
    output: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    query_rows: int
    flat_norms: tuple[str, ...] = ()

    def layout(self, helix: HelixConfig, ranks: int) -> HeadLayout:
        """Who holds what of queries and keys.

        Raises:
            HelixError: the numbers do not fit.
        """
        if self.kind == "latent" and self.heads % ranks:
            raise HelixError(
                f"latent attention is cut by query heads only, and {self.heads} of them cannot be dealt to "
                f"{ranks} ranks. Valid numbers of ranks: {listed(divisors(self.heads))}."
            )
        return helix.layout(self.heads, self.kv_heads, self.key_dim, ranks)

    def value_layout(self, helix: HelixConfig, ranks: int) -> HeadLayout:
        """Who holds what of values and of the projection back."""
        return helix.layout(self.heads, self.kv_heads, self.value_dim, ranks)

    def cuts(self, module: Any, helix: HelixConfig, ranks: int) -> Iterator[tuple[str, Cut]]:
        """(name below the module, cut) of each parameter that is dealt to ranks."""
        layout, values = self.layout(helix, ranks), self.value_layout(helix, ranks)
        if self.query_rows == layout.head_dim:
            queries = query_cut(0, layout)
        else:
            queries = head_cut(layout, self.query_rows)
        if self.kind == "separate":
            yield from _linear(module, "q_proj", queries)
            for name, cut in (("k_proj", kv_cut(0, layout)), ("v_proj", kv_cut(0, values))):
                if getattr(module, name, None) is not None:
                    yield from _linear(module, name, cut)
        elif self.kind == "fused":
            yield from _linear(module, "qkv_proj", fused_cut(layout, values))
        else:
            name = "q_proj" if getattr(module, "q_b_proj", None) is None else "q_b_proj"
            yield from _linear(module, name, queries)
            rows = module.kv_b_proj.out_features // self.heads
            yield from _linear(module, "kv_b_proj", head_cut(layout, rows))
        yield f"{self.output}.weight", query_cut(1, values)
        for name, parameter in module.named_parameters(recurse=False):
            yield name, head_cut(layout, parameter.numel() // self.heads)


def head_cut(layout: HeadLayout, rows: int) -> Cut:
    """Rows of a projection [h, rows] of which each rank holds whole heads."""
    per_head = np.arange(layout.num_heads * rows).reshape(layout.num_heads, rows)
    ranks = range(layout.num_ranks)
    return Cut(
        0, tuple(per_head[np.asarray(layout.query_heads(rank))].reshape(-1) for rank in ranks)
    )


def fused_cut(layout: HeadLayout, values: HeadLayout) -> Cut:
    """Rows of a fused projection: all queries [h, d], then all keys [g, d], then all values [g, e]."""
    keys = layout.num_heads * layout.head_dim
    first = keys + layout.num_kv_heads * layout.head_dim
    return Cut(
        0,
        tuple(
            np.concatenate(
                [layout.query_rows(r), keys + layout.kv_rows(r), first + values.kv_rows(r)]
            )
            for r in range(layout.num_ranks)
        ),
    )


def attention_form(module: Any, model_type: str | None = None) -> AttentionForm | None:
    """The form of a decoder's attention module; None for what is something else.

    Raises:
        HelixError: attention of a decoder whose form is unknown; the text says what is.
    """
    kind = type(module).__name__
    if not hasattr(module, "layer_idx") or not getattr(module, "is_causal", False):
        return None
    output = next((name for name in OUTPUTS if hasattr(module, name)), None)
    if output is None:
        raise _unknown(kind, f"none of {listed(OUTPUTS)}")
    if hasattr(module, "kv_b_proj"):
        form = _latent(module, output)
    elif hasattr(module, "qkv_proj"):
        form = _fused(module, output)
    elif hasattr(module, "q_proj") and hasattr(module, "k_proj") == hasattr(module, "v_proj"):
        form = _separate(module, output, model_type)
    else:
        raise _unknown(kind, "no q_proj, k_proj and v_proj, no qkv_proj and no kv_b_proj")
    _check_parts(module, form)
    return form


def _separate(module: Any, output: str, model_type: str | None) -> AttentionForm:
    d = _head_dim(module)
    e = getattr(module, "v_head_dim", d)
    rows, columns = module.q_proj.out_features, getattr(module, output).in_features
    heads = columns // e
    doubled = rows == 2 * heads * d and model_type in GATED
    if columns % e or (rows != heads * d and not doubled):
        raise _unknown(
            type(module).__name__,
            f"{rows} rows of queries and {columns} columns of output, with heads of {d} and {e} dimensions",
        )
    if hasattr(module, "k_proj"):
        kv_heads = module.k_proj.out_features // d
    elif groups := getattr(module, "num_key_value_groups", 0):
        kv_heads = heads // groups
    else:
        raise _unknown(type(module).__name__, "no k_proj, and no num_key_value_groups")
    return AttentionForm(
        "separate",
        output,
        heads,
        kv_heads,
        d,
        e,
        rows // heads,
        tuple(_flat_norms(module, d)),
    )


def _fused(module: Any, output: str) -> AttentionForm:
    d = _head_dim(module)
    heads, rows = getattr(module, output).in_features // d, module.qkv_proj.out_features
    if rows % d or (rows // d - heads) % 2:
        raise _unknown(type(module).__name__, f"{rows} rows of queries, keys and values")
    return AttentionForm("fused", output, heads, (rows // d - heads) // 2, d, d, d)


def _latent(module: Any, output: str) -> AttentionForm:
    heads = module.num_heads
    projection = getattr(module, "q_b_proj", None)  # None, or missing, without a latent of queries
    projection = module.q_proj if projection is None else projection
    e, d = module.v_head_dim, projection.out_features // heads
    if getattr(module, output).in_features != heads * e:
        raise _unknown(type(module).__name__, f"{heads} heads of {e} dimensions and another output")
    return AttentionForm("latent", output, heads, heads, d, e, d)


def _flat_norms(module: Any, head_dim: int) -> Iterator[str]:
    for name in (*QUERY_NORMS, *KEY_NORMS):
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None and weight.numel() != head_dim:
            yield name


def _head_dim(module: Any) -> int:
    if not isinstance(getattr(module, "head_dim", None), int):
        raise _unknown(type(module).__name__, "no head_dim")
    return int(module.head_dim)


def _check_parts(module: Any, form: AttentionForm) -> None:
    """Whatever else has parameters might act on what is cut, and is then wrong without a word."""
    known = {"q_proj", "k_proj", "v_proj", "qkv_proj", form.output, *QUERY_NORMS, *KEY_NORMS}
    if form.kind == "latent":
        known |= {"q_b_proj", "kv_b_proj", *LATENT}
    for name, part in module.named_children():
        if name not in known and next(part.parameters(), None) is not None:
            raise _unknown(type(module).__name__, f"a part {name} ({type(part).__name__})")
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() != 1 or parameter.numel() != form.heads:
            shape = "×".join(map(str, parameter.shape))
            raise _unknown(type(module).__name__, f"a parameter {name} of shape {shape}")
    for name in form.flat_norms:
        size, heads = getattr(module, name).weight.numel(), form.heads
        if name in KEY_NORMS:
            heads = form.kv_heads
        if size != heads * form.key_dim or not hasattr(getattr(module, name), "variance_epsilon"):
            raise _unknown(type(module).__name__, f"a norm {name} over {size} dimensions")


def _unknown(kind: str, what: str) -> HelixError:
    return HelixError(
        f"attention of class {kind} has {what}, which Helix does not know how to cut. Known are separate "
        "projections q_proj, k_proj, v_proj, a fused qkv_proj, and latent attention with kv_b_proj, with "
        "norms of heads and one number per head (sinks)."
    )


def mlp_cuts(module: Any, ranks: int) -> Iterator[tuple[str, Cut]]:
    """(name below the module, cut) of a dense MLP: gated, gated with one projection for both, or plain.

    Nothing where it has `other_parts`: then it stays whole.
    """
    linear = {n: part for n, part in module.named_children() if hasattr(part, "out_features")}
    if other_parts(module):
        return
    down = next((n for n in MLP_OUTPUTS if n in linear), None)
    ups = tuple(sorted(name for name in linear if name != down))
    if down is None or ups not in (
        ("gate_proj", "up_proj"),
        ("gate_up_proj",),
        ("up_proj",),
        ("c_fc",),
        ("input_linear",),
    ):
        return
    fused, size = ups[0] in ("gate_up_proj", "input_linear"), linear[down].in_features
    rows = {name: linear[name].out_features for name in ups}
    if set(rows.values()) != {2 * size if fused else size}:
        return
    check_divides("intermediate size", size, ranks)
    for name, length in rows.items():
        yield from _linear(module, name, block_cut(0, length, ranks, blocks=2 if fused else 1))
    yield f"{down}.weight", block_cut(1, size, ranks)


def other_parts(module: Any) -> set[str]:
    """The names of an MLP's parts with parameters beside linear layers and activations, such as adapters."""
    known = {n for n, part in module.named_children() if hasattr(part, "out_features")}
    return _parts(module) - known - set(learned_activations(module))


def learned_activations(module: Any) -> list[str]:
    """The names of the parts of a module whose parameters are single numbers, such as xIELU (Apertus)."""
    return [
        name
        for name in sorted(_parts(module))
        if {p.numel() for p in getattr(module, name).parameters()} == {1}
        and not _parts(getattr(module, name))
    ]


def expert_cuts(module: Any, ranks: int) -> Iterator[tuple[str, Cut]]:
    """(name below the module, cut) of experts that are stacked in `down_proj` and `gate_up_proj` or `up_proj`.

    The library's experts say how their matrices lie: `is_transposed`, `is_concatenated` (gate before up, or
    one after the other in turn).
    """
    parameters = dict(module.named_parameters(recurse=False))
    down = parameters.get("down_proj")
    up = next((n for n in ("gate_up_proj", "up_proj") if n in parameters), None)
    if down is None or up is None or down.dim() != 3:
        return
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", down.size(1)))
        transposed = parameters[up].size(1) == hidden != down.size(1)
    rows, columns = (2, 1) if transposed else (1, 2)
    size, length = down.size(columns), parameters[up].size(rows)
    check_divides("experts' intermediate size", size, ranks)
    apart = length == 2 * size and getattr(module, "is_concatenated", True)
    cut = block_cut(rows, length, ranks, blocks=2 if apart else 1)
    yield up, cut
    if f"{up}_bias" in parameters:
        yield f"{up}_bias", Cut(1, cut.indices)
    yield "down_proj", block_cut(columns, size, ranks)


# Projections of a gated delta net, of Qwen3-Next and of Qwen3.5, and what it counts of its heads.
DELTA_NET_INPUTS = ({"in_proj_qkvz", "in_proj_ba"}, {f"in_proj_{part}" for part in ("qkv", *"zba")})
DELTA_NET_SIZES = ("num_k_heads", "num_v_heads", "key_dim", "value_dim", "conv_dim")


def delta_net_cuts(module: Any, ranks: int) -> Iterator[tuple[str, Cut]]:
    """(name below the module, cut) of a gated delta net, by its key heads and the value heads of each.

    Nothing where the ranks do not divide the key heads: then it stays whole.
    """
    inputs = _parts(module) - {"conv1d", "norm", "out_proj"}
    if inputs not in DELTA_NET_INPUTS or not all(hasattr(module, n) for n in DELTA_NET_SIZES):
        return
    if module.num_k_heads % ranks:
        return
    channels = parts_cut(0, (module.key_dim, module.key_dim, module.value_dim), ranks)
    for name in sorted(inputs):
        whole = block_cut(0, getattr(module, name).out_features, ranks)
        yield from _linear(module, name, channels if name == "in_proj_qkv" else whole)
    yield from _linear(module, "conv1d", channels)
    for name in ("dt_bias", "A_log"):
        yield name, block_cut(0, module.num_v_heads, ranks)
    yield "out_proj.weight", block_cut(1, module.value_dim, ranks)


# Parameters of a Mamba 2 layer, all parts and the numbers of each head, and its sizes.
MAMBA_NUMBERS = ("A_log", "D", "dt_bias")
MAMBA_PARTS = {"in_proj", "conv1d", "norm", "out_proj", *MAMBA_NUMBERS}
MAMBA_SIZES = ("num_heads", "n_groups", "ssm_state_size", "intermediate_size", "conv_dim")


def mamba_cuts(module: Any, ranks: int) -> Iterator[tuple[str, Cut]]:
    """(name below the module, cut) of a Mamba 2 layer, by its heads and their groups.

    Nothing where the ranks do not divide its heads, or neither divide its groups nor are a multiple of them:
    then it stays whole, as in releases of the library whose caches always have the states of all heads.
    """
    parts = {name.partition(".")[0] for name, _ in module.named_parameters()}
    if parts | {"norm"} != MAMBA_PARTS or not all(hasattr(module, n) for n in MAMBA_SIZES):
        return
    heads, groups, size, inner, channels = (getattr(module, name) for name in MAMBA_SIZES)
    states = groups * size
    of_parts = (module.in_proj.out_features, channels, module.out_proj.in_features)
    if of_parts != (2 * inner + 2 * states + heads, inner + 2 * states, inner):
        return
    if "norm" in parts and not hasattr(module.norm, "variance_epsilon"):
        return
    if "cache" not in inspect.signature(type(module).forward).parameters:
        return
    if heads % ranks or states % ranks or (groups % ranks and ranks % groups):
        return
    rows = (inner, inner, states, states, heads)
    yield from _linear(module, "in_proj", parts_cut(0, rows, ranks))
    if ranks <= groups:
        yield from _linear(module, "conv1d", parts_cut(0, rows[1:4], ranks))
    if "norm" in parts:
        yield "norm.weight", block_cut(0, inner, ranks)
    for name in MAMBA_NUMBERS:
        yield name, block_cut(0, heads, ranks)
    yield "out_proj.weight", block_cut(1, inner, ranks)


def check_divides(what: str, size: int, ranks: int) -> None:
    """Raise unless a size can be dealt to ranks."""
    if size % ranks:
        raise HelixError(
            f"{what} {size} cannot be cut among {ranks} ranks. Valid numbers of ranks: "
            f"{listed(divisors(size))}. Or leave MLPs whole with mlp=False."
        )


def _parts(module: Any) -> set[str]:
    """The names of the modules right below one that have parameters."""
    return {n for n, part in module.named_children() if next(part.parameters(), None) is not None}


def _linear(module: Any, name: str, cut: Cut) -> Iterator[tuple[str, Cut]]:
    """The cut of a linear layer's rows: its weight and, if it has one, its bias."""
    yield f"{name}.weight", cut
    if getattr(module, name).bias is not None:
        yield f"{name}.bias", cut
