"""Absurd values of every flag of every command: a sentence and exit 2, or a value that may be; no traceback.

The flags are those that the parsers have, so that a new one is tried without being listed. Commands run in this
process up to where they would start to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import psutil
import pytest
from tiers import is_full

from helix_megatron.arguments import Parser

SECONDS = 5.0  # of this process's time: a machine that is busy does not count
BYTES = 2 << 30  # beyond what the process has: more is a MemoryError, and a fault
VALUES = (
    *(
        "",
        " ",
        "\n",
        "a\nb",
        "\x1b[2J",
        "\0",
        "é日本",
        "\udcff",
        "[/red]",
        "-",
        ".",
        "/dev/null/x",
        "x" * 5000,
    ),
    *(
        "0",
        "1",
        "-1",
        "0.5",
        "1e999",
        "-1e308",
        "nan",
        "-inf",
        "1_0",
        "٣",
        "0x10",
        "1,2",
        "None",
        "true",
    ),
    *(str(10**12), str(10**18), str(2**63), "999999937", "9" * 400, "9" * 5000, "1e308", "1e-320"),
)


class Reached(BaseException):
    """The command would now compute."""


class Found(BaseException):
    """The parser of a command."""


@dataclass(frozen=True)
class Command:
    """A command: its main function, arguments with which it reaches its start, and what starts it."""

    main: str
    arguments: str = ""
    starts: tuple[str, ...] = ()
    named: tuple[str, ...] = ()  # words before the flags


TINY = "--num-layers 2 --hidden-size 32 --num-attention-heads 4"
BENCH = "helix_megatron.bench"
COMMANDS = {
    "plan": Command("helix_megatron.plan.command:plan_main", f"--gpus 4 {TINY}"),
    "simulate": Command("helix_megatron.plan.command:simulate_main", f"--gpus 4 {TINY}"),
    "graph": Command(
        "helix_megatron.graph.command:main", TINY, ("helix_megatron.graph.build:build",)
    ),
    "bench layouts": Command(
        f"{BENCH}.__main__:main", "--ranks 2", (f"{BENCH}.layouts:_launch",), ("layouts",)
    ),
    "bench attention": Command(
        f"{BENCH}.__main__:main", "", (f"{BENCH}.contest:run_on_ranks",), ("attention",)
    ),
    "bench decode": Command(
        f"{BENCH}.__main__:main", "", (f"{BENCH}.contest:run_on_ranks",), ("decode",)
    ),
    "bench convert": Command(
        f"{BENCH}.__main__:main", "", (f"{BENCH}.convert:write_model",), ("convert",)
    ),
    "bench traffic": Command(
        f"{BENCH}.__main__:main", "", (f"{BENCH}.traffic:measure_rows",), ("traffic",)
    ),
    "convert": Command(
        "helix_megatron.checkpoint.command:main",
        "source target --to ranks",
        ("helix_megatron.checkpoint.convert:convert",),
    ),
    "generate": Command(
        "helix_megatron.inference.command:main",
        "--load model --prompt text",
        (
            "helix_megatron.inference.arguments:inference_config",
            "helix_megatron.inference.command:start_ranks",
        ),
    ),
    "serve": Command(
        "helix_megatron.serving.command:main",
        "--load model",
        (
            "helix_megatron.inference.arguments:inference_config",
            "helix_megatron.inference.command:start_ranks",
        ),
    ),
    "doctor": Command(
        "helix_megatron.doctor:main", "", ("helix_megatron.doctor:examine_environment",)
    ),
    "pretrain": Command(
        "helix_megatron.training.pretrain:main",
        TINY,
        (
            "helix_megatron.training.pretrain:pretrain",
            "helix_megatron.training.pretrain:start_ranks",
        ),
    ),
    "report": Command(
        "helix_megatron.training.report:main",
        "run --out report",
        ("helix_megatron.training.report:compare",),
    ),
    "preprocess": Command(
        "helix_megatron.data.preprocess:main",
        "--input text.txt --output-prefix out",
        ("helix_megatron.data.preprocess:preprocess",),
    ),
    "merge": Command(
        "helix_megatron.deepspeed.merge:main",
        "directory output.safetensors",
        ("helix_megatron.deepspeed.merge:merge_checkpoint",),
    ),
    "validate": Command("validate_planner:main", "table.csv", ("validate_planner:evaluate",)),
    "paper": Command("paper.command:main", "", ("paper.command:_run",)),
}


def function_of(name: str) -> Callable[[Sequence[str]], Any]:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def parser_of(command: Command, monkeypatch) -> argparse.ArgumentParser:
    def found(self: Any, *_: Any) -> Any:
        raise Found(self)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", found)
        try:
            function_of(command.main)([*command.named])
        except Found as error:
            parser = error.args[0]
    for word in command.named:
        choices = next(a.choices for a in parser._actions if isinstance(a.choices, dict))
        parser = choices[word]
    return parser


def flags_of(command: Command, monkeypatch) -> list[str]:
    """Flags that take a value; the place of an argument without a flag."""
    words = command.arguments.split()
    places = [
        f"#{number}"
        for number in itertools.takewhile(lambda n: words[n][0] != "-", range(len(words)))
    ]
    actions = parser_of(command, monkeypatch)._actions
    return places + [a.option_strings[-1] for a in actions if a.option_strings and a.nargs != 0]


def arguments_of(command: Command, flag: str, value: str) -> list[str]:
    words = command.arguments.split()
    if flag.startswith("#"):
        words[int(flag[1:])] = value
        return [*command.named, *words]
    return [*command.named, *words, f"{flag}={value}"]


@contextlib.contextmanager
def stopped_at_its_start(command: Command, monkeypatch) -> Iterator[None]:
    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    with monkeypatch.context() as patch:
        for name in command.starts:
            module, _, attribute = name.partition(":")
            patch.setattr(import_module(module), attribute, reached)
        yield


@pytest.fixture
def little_memory() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(
        resource.RLIMIT_DATA, (psutil.Process().memory_info().data + BYTES, limits[1])
    )
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limits)


def problem_of(command: Command, arguments: Sequence[str], capsys) -> str | None:
    """What is wrong with how a command took its arguments."""
    began = time.process_time()
    try:
        function_of(command.main)(arguments)
    except Reached:
        pass
    except SystemExit as end:
        error = capsys.readouterr().err.strip()
        sentence = "error:" in error and error.endswith(".") and "\n\n" not in error
        if end.code not in (0, 1, None) and not (end.code == 2 and sentence):
            return f"exit {end.code}: {error[-300:]}"
        if len(error) > 3000 or not error.replace("\n", "").isprintable():
            return f"an error of {len(error)} characters, or not printable"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    finally:
        capsys.readouterr()
    seconds = time.process_time() - began
    return f"{seconds:.0f} s" if seconds > SECONDS else None


@pytest.mark.parametrize("name", COMMANDS)
def test_absurd_values_are_refused_in_a_sentence(
    name, little_memory, tmp_path, monkeypatch, capsys
):
    """The quick tier tries every flag with two values, other ones for each; the full one all values."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    command, problems, cases = COMMANDS[name], [], 0
    for number, flag in enumerate(flags_of(command, monkeypatch)):
        values = VALUES if is_full("commands") else VALUES[number % 17 :: 17][:2]
        for value in values:
            cases += 1
            with stopped_at_its_start(command, monkeypatch):
                problem = problem_of(command, arguments_of(command, flag, value), capsys)
            if problem:
                problems.append(f"{flag}={value!r:.40}: {problem}")
    print(f"{cases} cases")
    assert cases and not problems, "\n".join(problems)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_has_a_type_that_bounds_it(name, monkeypatch):
    """Neither int nor float nor nothing: a number has a range, a text is one line, a path is a name."""
    unbounded = [
        action.option_strings or action.dest
        for action in parser_of(COMMANDS[name], monkeypatch)._actions
        if action.nargs != 0 and not action.choices and action.type in (None, int, float, str)
    ]
    free = ([["--prompt"], ["--stop"]] if name == "generate" else []) + (
        [["--model"], ["--cluster"]] if name in ("plan", "simulate") else []
    )
    assert [flags for flags in unbounded if flags not in free] == []
