"""How a command refuses: status 2, and one paragraph on standard error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest


def refusal(
    capsys: pytest.CaptureFixture[str], main: Callable[..., object], argv: Sequence[str]
) -> str:
    """What a command that exits with 2 prints, without its line breaks."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(argv))
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def as_launched(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """The environment that torchrun gives its first rank."""
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
