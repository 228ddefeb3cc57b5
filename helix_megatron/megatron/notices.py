"""Notices: those of megatron-core that its users cannot change are hidden, those of the layer are said once."""

from __future__ import annotations

import functools
import logging
import re
import sys
import warnings

import torch

NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Module that says it, and how the sentence begins. Both came with megatron-core 0.17 to 0.19."""


class _Hide(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOTICES[record.name])


_hide = _Hide()


def hide_notices() -> None:
    """Let exactly these sentences be neither logged nor warned of; idempotent."""
    for module, beginning in NOTICES.items():
        logging.getLogger(module).addFilter(_hide)
        warnings.filterwarnings("ignore", re.escape(beginning))


@functools.cache
def say_once(sentence: str) -> None:
    """Tell people, once per process and by the first rank of a real process group, what was chosen for them."""
    if not sentence:
        return
    if not torch.distributed.is_initialized() or (
        torch.distributed.get_rank() == 0 and torch.distributed.get_backend() != "fake"
    ):
        print(sentence, file=sys.stderr, flush=True)
