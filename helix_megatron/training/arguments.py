"""Flags of the training script: Megatron's names, and a few of our own.

The rows are the fields of `model.description.ModelConfig` and of the tables in `run.settings`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from helix_megatron.arguments import Parser, add_helix_arguments
from helix_megatron.flags import add_flags, values_of
from helix_megatron.model.fields import add_model_flags
from helix_megatron.model.presets import PRESETS
from helix_megatron.run.config import SETTINGS
from helix_megatron.run.settings import Checkpoints
from helix_megatron.training.checkpoint_flags import checkpoint_defaults, find_checkpoint

TITLES = {"parallel": "parallelism"}
PROGRAM = "pretrain_gpt.py"


def build_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The training script's parser; `prog` is the program that its usage and errors name."""
    parser = Parser(
        prog=prog,
        description="Train a GPT, dense or mixture-of-experts, with attention on m × n ranks.",
    )
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="defaults for the paper's 4-layer dense or 8-expert model, at full size (16 ranks) or small "
        "(4 ranks)",
    )
    add_model_flags(parser)
    for name, settings in SETTINGS.items():
        add_flags(parser.add_argument_group(TITLES.get(name, name)), settings)
    return add_helix_arguments(parser)


def parse_args(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> dict[str, Any]:
    """The values of the flags by their destination names, of which `validate` makes a run.

    A preset, or the checkpoint with `--use-checkpoint-args`, gives other defaults; flags given beside it win.

    Raises:
        HelixError: `--use-checkpoint-args` and no checkpoint that can be read.
    """
    parser = build_parser(prog)
    first = parser.parse_known_args(argv)[0]
    if first.preset is not None:
        parser.set_defaults(**PRESETS[first.preset])
        first = parser.parse_known_args(argv)[0]
    if first.use_checkpoint_args:
        path = find_checkpoint(Checkpoints(**values_of(Checkpoints, vars(first))))
        if path is not None:
            found = checkpoint_defaults(
                path,
                attention=first.helix_attention,
                trust=first.trust_checkpoint,
                seq_length=first.seq_length,
            )
            parser.set_defaults(**found)
    return vars(parser.parse_args(argv))
