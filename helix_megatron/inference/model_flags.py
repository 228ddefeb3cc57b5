"""What a checkpoint says about its model, and how that model is dealt to the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.catalog import QUALITY
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.flags import flag_of
from helix_megatron.model.description import FREE_FLAGS, ModelConfig

if TYPE_CHECKING:
    from helix_megatron.checkpoint.source import Source

Note = Callable[[str], None]
WORDS = "embedding.word_embeddings.weight"


def open_description(path: Path | str, step: int | None = None, *, trust: bool = False) -> Source:
    """Look at a checkpoint of any kind; its files are not verified yet.

    Args:
        path: as for `checkpoint.sources.open_source`.
        step: iteration of a store; the newest when None.
        trust: read pickles that could run code.
    """
    from helix_megatron.checkpoint.sources import kind_of, open_source
    from helix_megatron.checkpoint.store import Store

    directory = Path(path)
    kind = kind_of(directory) if directory.is_dir() else None
    if kind == "canonical":
        directory = Store(directory).resolve(step)
    elif step is not None and kind is not None:
        raise HelixError(
            f"--ckpt-step {step} chooses among the checkpoints of a directory, and {directory} holds one model "
            f"({kind}). Leave it out."
        )
    if kind == "ranks" and not manifests.has_manifest(directory):
        raise HelixError(
            f"{directory} has one file per rank and no manifest ({manifests.MANIFEST_NAME}), so its model and "
            "layout are not known. Convert it first: helix convert, with --like."
        )
    return open_source(directory, trust=trust, verify=False)


def beyond_the_engine(flags: Mapping[str, Any]) -> str:
    """What a model has that only the code of transformers generates with; empty where megatron-core's does.

    The engine has no pages for what megatron-core makes of latents, and no states.
    """
    known = {
        "linear_attention_freq": "gated delta nets",
        "hybrid_layer_pattern": "layers of several kinds",
        "multi_latent_attention": "latent attention",
        "qk_norm_behind_rotary": "norms behind rotary embedding",
    }
    return " and ".join(what for name, what in known.items() if flags.get(name))


def with_overrides(checkpoint: Source, given: Mapping[str, Any], note: Note) -> ModelConfig:
    """The checkpoint's model with the flags of the command line."""
    flags = dict(checkpoint.flags)
    # The arguments of stock Megatron may not say all about the model.
    complete = checkpoint.kind != "canonical" or manifests.has_manifest(checkpoint.directory)
    learned = flags.get("position_embedding_type") == "learned_absolute"
    fixed = {"vocab_size", "padded_vocab_size"} | (
        {"max_position_embeddings"} if learned else set()
    )
    for name, given_value in given.items():
        flag, own = flag_of(name), flags.get(name)
        value = list(given_value) if isinstance(given_value, tuple) else given_value
        known = complete and own is not None and (name not in FREE_FLAGS or name in fixed)
        if known and own != value:
            raise HelixError(
                f"{flag} {value}: {checkpoint.directory} holds a model with {own}. Leave the flag out."
            )
        if own != value and name != "transformer_impl":
            note(f"{flag} is {value}, where the checkpoint says {own}.")
        flags[name] = value
    if flags.get("vocab_size") is None:
        flags["vocab_size"] = flags.get("padded_vocab_size")
    if flags.get("max_position_embeddings") is not None:
        # That of the run that trained the model: here it takes what its positions allow.
        flags.pop("seq_length", None)
    return ModelConfig.from_flags(flags)


# ------------------------------------------------------------------------- heads


def cut_heads(
    checkpoint: Source,
    model: ModelConfig,
    ranks: int,
    asked: int | str,
    attention: str,
    query_layout: str,
    note: Note,
) -> tuple[ModelConfig, int]:
    """The model as a run with this attention has it, and m.

    Raises:
        HelixError: no m fits, or segment-local attention for weights that are not.
    """
    if attention == "segment-local":
        return _segment_local(checkpoint, model, asked)
    note_segment_local(checkpoint, model.num_attention_heads, note)
    if asked != "auto":
        return model, int(asked)
    m = smallest_m(model, ranks, query_layout)
    heads = f"{model.num_query_groups} key-value heads"
    if m > 1:
        note(
            f"{heads} on {ranks} ranks: every head is cut into {m} segments (--intra-head-parallel-size {m}), "
            f"in {ranks // m} head groups."
        )
    elif ranks > 1:
        note(f"{heads} on {ranks} ranks: whole heads (--intra-head-parallel-size 1).")
    return model, m


def note_segment_local(checkpoint: Source, heads: int, note: Note) -> None:
    """Say that segments of heads are loaded as whole heads, where a checkpoint has them."""
    if checkpoint.attention == "segment-local":
        note(
            f"The model was trained with segment-local attention of {checkpoint.segments} segments: it is "
            f"loaded as what it is, an ordinary model with {heads} heads."
        )


def smallest_m(model: ModelConfig, ranks: int, query_layout: str = "auto") -> int:
    """The fewest segments of a head with which each rank holds key-value heads, or parts, of its own."""
    fitting = model.segments_that_fit(ranks, query_layout)
    if fitting:
        return fitting[0]
    valid = [p for p in range(1, 2 * ranks) if model.segments_that_fit(p, query_layout)]
    layout = "" if query_layout == "auto" else f" with --helix-query-layout {query_layout}"
    raise HelixError(
        f"{model.num_attention_heads} query and {model.num_query_groups} key-value heads of {model.head_dim} "
        f"dimensions cannot be dealt to {ranks} tensor parallel ranks{layout}, whole or cut. Valid "
        f"numbers of ranks up to {2 * ranks - 1}: {listed(valid)}."
    )


def _segment_local(
    checkpoint: Source, model: ModelConfig, asked: int | str
) -> tuple[ModelConfig, int]:
    if checkpoint.attention != "segment-local":
        raise HelixError(
            f"{checkpoint.directory} holds ordinary weights, and --helix-attention is segment-local. "
            f"{QUALITY}. helix convert --attention segment-local makes such a model."
        )
    m = checkpoint.segments
    if asked not in ("auto", m):
        raise HelixError(
            f"{checkpoint.directory} was trained with segment-local attention of {m} segments, and "
            f"--intra-head-parallel-size is {asked}. Leave it out, or take --helix-attention exact, with which "
            "it is an ordinary model with more heads."
        )
    return model.joined_heads(m), m


# ----------------------------------------------------------------------- experts


def deal_experts(
    model: ModelConfig, ranks: int, expert: int | None, expert_tensor: int | None, note: Note
) -> tuple[int, int | None]:
    """Expert parallel size EP, and tensor parallel size ETP inside an expert.

    What is None is chosen: whole experts on every rank where their number divides by the ranks, else all
    experts cut for all ranks.

    Returns:
        (EP, ETP); (1, None) of a dense model, unless something else was asked for.

    Raises:
        HelixError: neither fits; with what does.
    """
    experts = model.num_experts
    if not experts:
        return expert or 1, expert_tensor
    if expert is not None and expert_tensor is not None:
        return expert, expert_tensor
    if expert is not None:
        return expert, 1 if expert > 1 or not _can_cut_experts(model, ranks) else ranks
    if expert_tensor is not None:
        rest = ranks // max(1, expert_tensor)
        return rest if rest * expert_tensor == ranks and experts % rest == 0 else 1, expert_tensor
    if experts % ranks == 0:
        if ranks > 1:
            note(f"{experts} experts on {ranks} ranks: {experts // ranks} on each, whole.")
        return ranks, 1
    if _can_cut_experts(model, ranks):
        note(f"{experts} experts on {ranks} ranks: every expert is cut for all of them.")
        return 1, ranks
    valid = [
        (e, t)
        for e in divisors(math.gcd(experts, ranks))
        for t in divisors(ranks // e)
        if _can_cut_experts(model, t)
    ]
    best = max(valid, key=lambda pair: (pair[0] * pair[1], pair[0]))
    why = (
        f"{model.moe_ffn_hidden_size} columns do not divide by {ranks}"
        if model.disable_bias_linear
        else "Megatron cannot cut experts with biases"
    )
    raise HelixError(
        f"{experts} experts cannot be dealt to {ranks} ranks, and not be cut for them: {why}. Valid pairs of "
        f"--expert-model-parallel-size and --expert-tensor-parallel-size: "
        f"{listed(f'{e} and {t}' for e, t in valid)}. {best[0]} and {best[1]} keep the fewest copies."
    )


def _can_cut_experts(model: ModelConfig, ranks: int) -> bool:
    assert model.moe_ffn_hidden_size is not None
    whole = model.moe_ffn_hidden_size % ranks == 0
    return ranks == 1 or (whole and model.disable_bias_linear)


# ------------------------------------------------------------------------ the rest


def sequence_length(model: ModelConfig, ranks: int) -> int:
    """The longest sequence of the model that sequence parallel ranks can share evenly."""
    longest = model.max_position_embeddings
    assert longest is not None
    return max(longest // ranks * ranks, min(longest, ranks))


def precision(checkpoint: Source, asked: str) -> str:
    """The dtype to compute in, one of `arguments.DTYPES`."""
    import torch

    if asked != "auto":
        return asked
    return _precision(checkpoint.dtype(WORDS), torch.cuda.is_available())


def precision_of_files(directory: Path, asked: str) -> str:
    """`precision` of a Hugging Face model's files."""
    import torch

    from helix_megatron.checkpoint.packed import open_weights
    from helix_megatron.huggingface.files import float_dtype

    if asked != "auto":
        return asked
    return _precision(float_dtype(open_weights(directory)), torch.cuda.is_available())


def _precision(own: Any, on_gpu: bool) -> str:
    import torch

    names = {torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(own, "fp32") if on_gpu else "fp32"
