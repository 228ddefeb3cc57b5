"""Flags for any `argparse` parser, Megatron's own or a script's; what a command line says, and how it ends."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import os
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from helix_megatron.errors import HelixError, LaunchError, Setting
from helix_megatron.flags import whole

FLAGS = {
    "intra_head_parallel_size": "--intra-head-parallel-size",
    "attention": "--helix-attention",
    "exchange": "--helix-exchange",
    "query_layout": "--helix-query-layout",
    "kernel": "--helix-kernel",
}
# Megatron's flags that are not called like the settings that they set.
OTHER_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}
LONGEST_WORD = 400  # characters of a word in an error, which may be a path
# What a terminal shows in place of characters that its encoding lacks.
PLAIN = {
    "×": "x",
    "·": "*",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "²": "^2",
}


def as_flag(setting: Setting) -> str:
    """Word a setting as a flag of a command line: `--helix-exchange auto`."""
    name = setting.name
    flag = FLAGS.get(name) or OTHER_FLAGS.get(name) or "--" + name.replace("_", "-")
    return flag if setting.value is None else f"{flag} {setting.value}"


def add_helix_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `helix` to a parser and return the parser.

    `HelixConfig.from_args` reads the result. The flags' help is the configuration's own.
    """
    from helix_megatron.config import HelixConfig  # imports NumPy, and `helix --help` needs neither

    group = parser.add_argument_group("helix", "two-level attention partitioning")
    for setting in dataclasses.fields(HelixConfig):
        choices = setting.metadata["choices"]
        group.add_argument(
            FLAGS[setting.name],
            type=whole() if type(setting.default) is int else str,
            default=setting.default,
            choices=choices,
            metavar=None if choices else "M",
            help=f"{setting.metadata['help']} (default: %(default)s)",
        )
    return parser


class Parser(argparse.ArgumentParser):
    """A parser whose flags are written in full, and whose errors are one paragraph without all its flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, and exit with 2."""
        of_flag = message.startswith("argument ")
        text = message.removeprefix("argument ")
        if of_flag and ": is " in text:  # of `flags.Number` and its like: whole sentences
            text = text.replace(": is ", " is ", 1)
        else:
            text += "."
        self.exit(2, paragraph(self.prog, f"{text} Try {self.prog} --help.") + "\n")


def paragraph(program: str, text: str) -> str:
    """An error as it is printed: what it quotes cannot break lines, move the cursor or fill the screen."""
    words = "".join(map(_printable, text)).split()
    short = (w if len(w) <= LONGEST_WORD else f"{w[: LONGEST_WORD // 2]}…{w[-40:]}" for w in words)
    return textwrap.fill(
        f"{program}: error: {' '.join(short)}",
        width=100,
        break_on_hyphens=False,  # paths and flags stay whole, to be copied
        break_long_words=False,
    )


def _printable(character: str) -> str:
    unseen = unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in "\n\t"
    return character.encode("unicode_escape").decode() if unseen else character


@contextlib.contextmanager
def exit_on_error(program: str, *, foreign: bool = False) -> Iterator[None]:
    """The frame of every command: how it ends where something is wrong, and how it prints.

    A `HelixError` becomes one paragraph on standard error and its exit status (2), Ctrl-C a line and 130. A
    standard output that is closed, full, or a pipe that nobody reads any more ends the command with a line, the
    last one without; characters that its encoding lacks are replaced.

    Under a launcher only the first rank prints, so that eight ranks do not say the same thing eight times.
    Other errors of the operating system become a line, too, unless the program is a `foreign` one.
    """
    _prepare_streams()
    first = os.environ.get("RANK", "0") == "0"
    try:
        try:
            yield
        except HelixError as error:
            if isinstance(error, LaunchError) or first:
                print(paragraph(program, error.worded(as_flag)), file=sys.stderr, flush=True)
            sys.exit(error.status)
        except KeyboardInterrupt:
            if first:
                print(f"{program}: interrupted", file=sys.stderr, flush=True)
            sys.exit(128 + signal.SIGINT)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `helix … | head` has read enough
        _give_up(sys.stdout)
        sys.exit(1)
    except OSError as error:
        if foreign:
            raise
        where = error.filename or "an output"
        _give_up(sys.stdout)
        text = paragraph(program, f"{where} cannot be used: {error.strerror or error}.")
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:  # the same disk
            _give_up(sys.stderr)
        sys.exit(1)


def _prepare_streams() -> None:
    """Make both streams such that printing never fails for what is printed, nor for a stream that is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started this program
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the program ends
        elif isinstance(stream, codecs.StreamReaderWriter) or hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="helix")


def _give_up(stream: TextIO) -> None:
    """Let nothing be written any more, not even what is left when the program ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Plainer words for what an encoding lacks: a codec's error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(
        PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing
    ), error.end


codecs.register_error("helix", _plain)
