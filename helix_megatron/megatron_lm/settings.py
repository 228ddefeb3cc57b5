"""What the script's arguments say about Helix, between their validation and the building of the model.

Megatron-LM itself passes arguments through a global; this is ours. The arguments object is left as it is: it
goes into every checkpoint, which stock Megatron-LM must be able to read.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from helix_megatron.arguments import FLAGS
from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout, rotary_of
from helix_megatron.errors import HelixError, listed

DRY_RUN = "--helix-dry-run"
LAYOUT_FREE_INIT = "--helix-layout-free-init"
SIZE = FLAGS["intra_head_parallel_size"]


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the default is stock Megatron-LM."""

    helix: HelixConfig = field(default_factory=HelixConfig)
    layout: HeadLayout | None = None
    """The layout of every attention layer, or None where attention is stock."""
    rotary_percent: float = 0.0
    seed: int = 0
    timeout_minutes: float = 30.0
    layout_free_init: bool = False
    dry_run: bool = False
    causal_masks_only: bool = False


def settings_of(args: Any) -> Settings:
    """Settings from validated arguments of Megatron-LM.

    Raises:
        HelixError: the layout does not fit the model, or another argument does not work with cut heads.
    """
    helix = HelixConfig.from_args(args)
    settings = Settings(
        helix=helix,
        rotary_percent=_rotary_percent(args),
        seed=args.seed,
        timeout_minutes=args.distributed_timeout_minutes,
        layout_free_init=args.helix_layout_free_init,
        dry_run=args.helix_dry_run,
        causal_masks_only=not getattr(args, "reset_attention_mask", True),
    )
    if settings.layout_free_init and getattr(args, "init_model_with_meta_device", False):
        raise HelixError(
            f"{LAYOUT_FREE_INIT} draws weights while the model is built, and --init-model-with-meta-device "
            "builds it without weights. Leave one out."
        )
    if not helix.active:
        return settings
    _refuse(args)
    percent = settings.rotary_percent
    rotary, rotary_dim = rotary_of(args.kv_channels, percent, args.rotary_interleaved)
    layout = helix.layout(
        num_heads=args.num_attention_heads,
        num_kv_heads=args.num_query_groups
        if args.group_query_attention
        else args.num_attention_heads,
        head_dim=args.kv_channels,
        tensor_parallel_size=args.tensor_model_parallel_size,
        rotary=rotary,
        rotary_dim=rotary_dim,
        output_gate=getattr(args, "attention_output_gate", False),
    )
    return dataclasses.replace(settings, layout=layout)


_recorded: list[Settings] = []


def record(settings: Settings) -> None:
    _recorded[:] = [settings]


def current() -> Settings:
    """The settings of the process; stock ones where no arguments were validated.

    Raises:
        HelixError: Helix was asked for on the command line, and the arguments never came by.
    """
    if _recorded:
        return _recorded[0]
    if any(argument.partition("=")[0] == SIZE for argument in sys.argv):
        raise HelixError(
            f"{SIZE} was given, but this script did not let Megatron-LM validate its arguments (as with "
            "--yaml-cfg, which ignores the command line). Give the model's arguments on the command line."
        )
    return Settings()


def _rotary_percent(args: Any) -> float:
    """Share of a head's dimensions that is rotated; 0 without rotary embedding."""
    return args.rotary_percent if args.position_embedding_type == "rope" else 0.0


def _refuse(args: Any) -> None:
    """What Megatron-LM's arguments can ask for and cut heads cannot give; `support` knows the rest."""
    size = args.intra_head_parallel_size
    positions = ("learned_absolute", "rope", "none")
    if args.position_embedding_type not in positions:
        raise HelixError(
            f"--position-embedding-type {args.position_embedding_type} does not work with {SIZE} {size}. "
            f"Valid: {listed(positions)}."
        )
    if getattr(args, "use_legacy_models", False):
        raise HelixError(
            f"--use-legacy-models does not work with {SIZE} {size}: legacy models have their own attention. "
            "Leave it out."
        )
    shards = getattr(args, "gtp_weight_remat_size", 1) or 1
    if shards > 1:
        raise HelixError(
            "--tensor-parallel-num-weight-shards above the tensor parallel size has not been shown to work "
            f"with {SIZE} {size}. Leave it out."
        )
    if getattr(args, "ckpt_format", "torch_dist") != "torch_dist" and (args.save or args.load):
        raise HelixError(
            f"--ckpt-format {args.ckpt_format} writes what one rank holds, which depends on {SIZE}; only "
            "torch_dist can be read at another layout. Set --ckpt-format torch_dist."
        )
