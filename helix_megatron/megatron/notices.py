"""Notices of megatron-core that tell its users what only this package can change."""

from __future__ import annotations

import logging
import re
import warnings

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
