"""What a checkpoint says about its model, against the flags of a run. Starts without torch.

*Model flags* are the destination names of the training script's flags for model and experts, with their
values: `{"num_layers": 4, "num_attention_heads": 2, …, "padded_vocab_size": 256}`. A checkpoint's manifest
holds them. They describe the *stock* model whose tensors the checkpoint has: for `segment-local` attention
that is the model with m times the heads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.manifest import Manifest, has_manifest, read_manifest
from helix_megatron.checkpoint.store import Store
from helix_megatron.errors import HelixError, listed

# May differ between the run that saved and the run that loads: they change neither tensors nor function.
FREE = frozenset(
    (
        "seq_length",
        "max_position_embeddings",  # of learned positions it may not: see check_model_flags
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
        "vocab_size",  # has a check of its own
        "padded_vocab_size",
        "make_vocab_size_divisible_by",
        "group_query_attention",  # the number of key-value heads says it
        "transformer_impl",
        "moe_aux_loss_coeff",
        "moe_router_load_balancing_type",
        "moe_token_dispatcher_type",
    )
)
HEADS = frozenset(("num_attention_heads", "num_query_groups", "kv_channels"))

QUALITY = (
    "segment-local attention is another architecture: h·m heads of d/m dimensions. Ordinary weights loaded "
    "into it lose quality, and how much is not known for your model. The nearest published method lost this: "
    "DeepSeek-V2-Lite, perplexity 6.31 → 7.24 without alignment (TPLA, arXiv 2508.15881). Expect to train "
    "on, or take --helix-attention exact, which loses nothing"
)


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The model flags of a validated run, as its checkpoints have them."""
    flags = plain_model_flags(args)
    if args.helix.active and args.helix.attention == "segment-local":
        m = args.intra_head_parallel_size
        flags["num_attention_heads"] *= m
        flags["num_query_groups"] *= m
        flags["kv_channels"] //= m
    return flags


def plain_model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The same for ordinary attention, whatever the run's own is."""
    from helix_megatron.training.arguments import EXPERTS, MODEL

    names = [row[0].removeprefix("--").replace("-", "_") for row in (*MODEL, *EXPERTS)]
    flags = {name: getattr(args, name) for name in names}
    if flags["ffn_hidden_size"] is None:
        flags["ffn_hidden_size"] = 4 * args.hidden_size
    if flags["num_experts"] is not None and flags["moe_ffn_hidden_size"] is None:
        flags["moe_ffn_hidden_size"] = flags["ffn_hidden_size"]
    return flags | {"padded_vocab_size": args.padded_vocab_size}


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The directory that `--load` means; None where a run starts anew: no `--load`, or an empty `--save`.

    Raises:
        HelixError: there is no complete checkpoint.
    """
    if not args.load:
        return None
    store = Store(args.load)
    restarted = args.save and store.root.absolute() == Path(args.save).absolute()
    may_be_missing = restarted and args.ckpt_step is None and not args.exit_on_missing_checkpoint
    if may_be_missing and store.latest() is None:
        return None  # the first start of a job that is restarted with the same command
    return store.resolve(args.ckpt_step)


def checkpoint_defaults(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """For `--use-checkpoint-args`: the model flags of a checkpoint, as defaults of the parser.

    A segment-local checkpoint is of a model with m times the heads; a run with the same m and
    `--helix-attention segment-local` gets the heads that it means.
    """
    manifest = read_manifest(path) if has_manifest(path) else None
    saved = stored_arguments(path, manifest, trust=args.trust_checkpoint)
    known = set(vars(args))
    flags = {name: value for name, value in saved.items() if name in known}
    flags.pop("seq_length", None)
    if flags.get("position_embedding_type") != "learned_absolute":
        flags.pop("max_position_embeddings", None)
    local = manifest is not None and manifest.attention == "segment-local"
    if local and args.helix_attention == "segment-local":
        m = manifest.segments  # type: ignore[union-attr]
        flags["num_attention_heads"] //= m
        flags["num_query_groups"] //= m
        flags["kv_channels"] *= m
        flags["intra_head_parallel_size"] = m
    return flags


def stored_arguments(path: Path, manifest: Manifest | None, *, trust: bool) -> dict[str, Any]:
    """Model flags and place in the data: from the manifest, else from the arguments that Megatron-LM saved."""
    from helix_megatron.checkpoint.safe import load_common  # needs torch

    if manifest is not None:
        return manifest.model | manifest.extra
    common = load_common(path, trust=trust)
    arguments = dict(vars(common["args"])) if "args" in common else {}
    heads = arguments.get("num_attention_heads")
    if heads is not None and not arguments.get("group_query_attention"):
        arguments["num_query_groups"] = heads  # Megatron-LM leaves 1 there
    simple = (bool, int, float, str, list, type(None))
    return {name: value for name, value in arguments.items() if isinstance(value, simple)}


def converts_to_segment_local(args: argparse.Namespace, saved: dict[str, Any]) -> bool:
    """Whether a segment-local run meets the checkpoint of an ordinary model with its number of heads."""
    if not args.helix.active or args.helix.attention != "segment-local":
        return False
    stored = {name: saved.get(name) for name in HEADS}
    own, plain = model_flags(args), plain_model_flags(args)
    return all(stored[name] in (plain[name], None) for name in HEADS) and any(
        stored[name] not in (own[name], None) for name in HEADS
    )


def check_model_flags(
    args: argparse.Namespace, path: Path, manifest: Manifest | None, saved: dict[str, Any]
) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        HelixError: names the flag, both values and what to try.
    """
    own = model_flags(args)
    if converts_to_segment_local(args, saved):
        if not args.allow_quality_loss:
            raise HelixError(
                f"{path} holds ordinary weights, and this run has segment-local attention. {QUALITY}. To load "
                "them all the same, add --allow-quality-loss and --finetune."
            )
        own = plain_model_flags(args)
    free = (
        FREE
        if args.position_embedding_type != "learned_absolute"
        else FREE - {"max_position_embeddings"}
    )
    different = {
        name: (saved[name], value)
        for name, value in own.items()
        if name in saved and name not in free and saved[name] != value
    }
    different |= _vocabulary(args, saved)
    if not different:
        return
    lines = [
        f"--{name.replace('_', '-')} is {theirs} there and {ours} here"
        for name, (theirs, ours) in sorted(different.items())
    ]
    local = manifest is not None and manifest.attention == "segment-local"
    hint = ""
    if local and HEADS & different.keys():
        assert manifest is not None
        hint = (
            f" It was trained with segment-local attention of {manifest.segments} segments: load it with "
            f"--helix-attention segment-local --intra-head-parallel-size {manifest.segments}, or as an "
            "ordinary model with its number of heads."
        )
    raise HelixError(
        f"{path} holds another model: {'; '.join(lines)}.{hint} Give the checkpoint's values, or "
        "--use-checkpoint-args to take them all."
    )


def _vocabulary(args: argparse.Namespace, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Padding may differ; the tokens may not. Megatron would load the rows that fit and say nothing."""
    if saved.get("vocab_size") is not None:
        if saved["vocab_size"] != args.vocab_size:
            return {"vocab_size": (saved["vocab_size"], args.vocab_size)}
    elif saved.get("padded_vocab_size") not in (None, args.padded_vocab_size):
        return {"vocab_size": (saved["padded_vocab_size"], args.padded_vocab_size)}
    return {}


def check_flags(args: argparse.Namespace) -> None:
    """The checkpoint flags against each other and the directories that they name; sets `load_path`.

    Raises:
        HelixError: with what to try.
    """
    for name in ("save_interval", "exit_interval", "keep", "exit_duration_in_mins"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise HelixError(
                f"--{name.replace('_', '-')} is {value}. Give at least 1, or leave it out."
            )
    needing = {
        "--save-interval": args.save_interval is not None,
        "--async-save": args.async_save,
        "--keep": args.keep is not None,
    }
    given = [flag for flag, there in needing.items() if there]
    if given and not args.save:
        raise HelixError(
            f"{listed(given)} without --save: there is nowhere to save to. Add --save DIR."
        )
    for flag, there in (
        ("--ckpt-step", args.ckpt_step is not None),
        ("--use-checkpoint-args", args.use_checkpoint_args),
        ("--finetune", args.finetune),
    ):
        if there and not args.load:
            raise HelixError(f"{flag} without --load: there is nothing to load. Add --load DIR.")
    if args.save:
        Store(args.save).check_writable()
    path = find_checkpoint(args)
    args.load_path = None if path is None else str(path)
    args.load_iteration = 0
    if path is None:
        return
    manifest = read_manifest(path) if has_manifest(path) else None
    saved = stored_arguments(path, manifest, trust=args.trust_checkpoint)
    check_model_flags(args, path, manifest, saved)
    if manifest is not None and not args.finetune:
        args.load_iteration = manifest.iteration or 0
