"""`helix generate`: text from a checkpoint, on the ranks of this machine or of a launcher."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.errors import HelixError, counted
from helix_megatron.flags import INPUT_FILE, add_flags, real, values_of, whole
from helix_megatron.inference.batching_flags import MOST_NUMBER, EngineOptions
from helix_megatron.inference.request import Output, Request, Sampling, TextStream, Tokens
from helix_megatron.inference.stop_strings import StopStrings
from helix_megatron.run.local_ranks import end_with_parent, start_ranks
from helix_megatron.run.quiet import ignore_megatron_warnings
from helix_megatron.run.rank_environment import number_of_ranks

if TYPE_CHECKING:
    from helix_megatron.inference.arguments import InferenceConfig
    from helix_megatron.inference.engine import Engine

PROGRAM = "helix generate"
MOST_TEMPERATURE = 1e6  # any token is then as likely as any other


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = command_parser(
        program,
        "Generate text from a checkpoint of Helix, Megatron or Hugging Face, at any layout.",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], help="a text; may be given again")
    group.add_argument(
        "--prompt-file",
        type=INPUT_FILE,
        action="append",
        default=[],
        metavar="FILE",
        help="a file with one prompt",
    )
    group.add_argument(
        "--prompt-tokens",
        type=token_ids,
        action="append",
        default=[],
        metavar="JSON",
        help="a prompt as token ids, such as '[1, 2, 3]'; may be given again. A model without a tokenizer then "
        "gives token ids",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="prompts are what a user says to the model's chat template",
    )
    group = parser.add_argument_group("tokens")
    group.add_argument(
        "--max-tokens",
        type=whole(largest=MOST_NUMBER),
        default=128,
        help="of each output (default: %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=real(at_most=MOST_TEMPERATURE),
        default=0.0,
        help="divides the logits; 0 takes the most likely token (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=whole(0, MOST_NUMBER),
        default=0,
        help="only the k most likely tokens; 0: all",
    )
    group.add_argument(
        "--top-p",
        type=real(above=0, at_most=1),
        default=1.0,
        help="only the most likely tokens of this probability",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an output before this text"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on behind the token that ends a text"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt, nothing else"
    )
    return parser


def command_parser(program: str, description: str) -> argparse.ArgumentParser:
    from helix_megatron.inference.arguments import add_checkpoint_arguments

    parser = Parser(prog=program, description=description)
    add_checkpoint_arguments(parser)
    add_flags(parser.add_argument_group("cache and batching"), EngineOptions)
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Wrong input prints one paragraph and exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ignore_megatron_warnings()
    with exit_on_error(program):
        options = build_parser(program).parse_args(arguments)
        _check_prompts(options)
        if not all(options.stop):
            raise HelixError(
                "--stop is an empty text, which every output begins with. Leave it out."
            )
        _sampling(options, frozenset(), options.seed)
        generate = functools.partial(_generate, options)
        return run_command("generate", options, arguments, generate)


def run_command(
    name: str,
    options: argparse.Namespace,
    arguments: Sequence[str],
    run: Callable[[InferenceConfig, EngineOptions], int],
) -> int:
    """Check the flags, start ranks if asked for, and run on this one.

    Args:
        arguments: as they were given.
        run: of (`inference_config`, options of the engine), its exit status.
    """
    from helix_megatron.inference.arguments import inference_config

    engine = EngineOptions(**values_of(EngineOptions, vars(options)))
    ranks = number_of_ranks(options.nproc_per_node)
    config = inference_config(vars(options), ranks)
    if ranks > 1 and "RANK" not in os.environ:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than it saves
        command = [sys.executable, "-m", "helix_megatron.cli", name]
        return start_ranks(ranks, [*command, *arguments], drains=name == "serve")
    return run(config, engine)


@contextlib.contextmanager
def ranks_together(
    config: InferenceConfig,
    asked_to_end: threading.Event | None = None,
    farewell: Callable[[str], None] = lambda reason: None,
) -> Iterator[None]:
    """The process group of the run, watched (`training.watchdog.watching`).

    A `HelixError` from inside is raised when all ranks have taken leave of each other: it is all they say.
    """
    from helix_megatron.megatron.process_group import process_group
    from helix_megatron.run.watchdog import watching

    problem = None
    with process_group(config.run.parallel), watching(asked_to_end, farewell):
        try:
            yield
        except HelixError as error:
            problem = error
    if problem is not None:
        raise problem


def opened(config: InferenceConfig, *, needed: bool = True) -> Tokens:
    """The tokenizer, and on rank 0 a word on what was chosen for the user.

    Args:
        needed: whether text is turned into tokens. If not, a model may have no tokenizer.
    """
    from helix_megatron.inference.tokens import open_tokens

    first = os.environ.get("RANK", "0") == "0"
    tokens = open_tokens(config, say if first else lambda text: None, needed=needed)
    for note in config.notes if first else ():
        say(note)
    return tokens


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _generate(
    options: argparse.Namespace, config: InferenceConfig, engine_options: EngineOptions
) -> int:
    from helix_megatron.inference.engine import follow
    from helix_megatron.inference.start import start

    end_with_parent()
    asked_ids: list[tuple[int, ...]] = options.prompt_tokens
    texts = _prompts(options)
    tokens = opened(config, needed=bool(texts or options.stop))
    prompts = [*texts, *(json.dumps(ids) for ids in asked_ids)]
    asked = [
        tuple(_encode(tokens, prompt, options.chat) if prompt or options.chat else [])
        for prompt in texts
    ] + asked_ids
    most = min(engine_options.max_sequences, len(prompts))
    engine_options = dataclasses.replace(engine_options, max_sequences=most)
    longest = max(map(len, asked)) + options.max_tokens
    sampling = [
        _sampling(options, tokens.stop_tokens, options.seed + index)
        for index in range(len(prompts))
    ]
    with ranks_together(config):
        runner, engine = start(config, engine_options, max_waiting=len(prompts), longest=longest)
        if engine is None:
            follow(runner)
        else:
            _ask(engine, tokens, prompts, asked, sampling, options)
    return 0


def _ask(
    engine: Engine,
    tokens: Tokens,
    prompts: Sequence[str],
    asked: Sequence[tuple[int, ...]],
    samplings: Sequence[Sampling],
    options: argparse.Namespace,
) -> None:
    alone = len(prompts) == 1 and not options.json
    answers = [
        Answer(
            prompt, tokens.decoder(ids), options.stop, engine.cancel, sys.stdout if alone else None
        )
        for prompt, ids in zip(prompts, asked, strict=True)
    ]
    for answer, prompt, sampling in zip(answers, asked, samplings, strict=True):
        answer.request = Request(prompt, sampling, answer)
    begin = time.perf_counter()
    try:
        engine.submit([answer.request for answer in answers if answer.request])
    except HelixError:
        engine.stop()
        engine.run()  # the other ranks wait to be told
        raise
    engine.stop()
    engine.run()
    seconds = time.perf_counter() - begin
    for index, answer in enumerate(answers):
        if options.json:
            print(json.dumps(answer.record(index), ensure_ascii=False))
        elif alone:
            print()
        else:
            print(f"[{index + 1}] {prompts[index]}{answer.text}")
    sys.stdout.flush()
    say(_summary(answers, seconds, begin))


class Answer:
    """Listens to one sequence: its text as it comes, and when it came.

    Args:
        stream: where to write text at once; None keeps it.
    """

    def __init__(
        self,
        prompt: str,
        decoder: TextStream,
        stop: Sequence[str],
        cancel: Callable[[Request], None],
        stream: TextIO | None,
    ) -> None:
        self.prompt, self.text, self.reason = prompt, "", ""
        self.request: Request | None = None
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._decoder, self._stop, self._stream = decoder, StopStrings(stop), stream
        self._cancel = cancel

    def __call__(self, output: Output) -> None:
        if self._stop.hit:
            return
        self.tokens += output.tokens
        self.times += [time.perf_counter()] * len(output.tokens)
        self._write(self._stop.add(self._decoder.add(output.tokens)))
        if output.reason is not None and not self._stop.hit:
            self._write(self._stop.add(self._decoder.finish()))
            self._write(self._stop.finish())
            self.reason = output.reason
        if self._stop.hit:
            self.reason = "stop"
            if output.reason is None and self.request is not None:
                self._cancel(self.request)

    def record(self, index: int) -> dict[str, Any]:
        """For `--json`."""
        return {
            "index": index,
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.reason,
        }

    def _write(self, text: str) -> None:
        self.text += text
        if self._stream is not None and text:
            self._stream.write(text)
            self._stream.flush()


def _summary(answers: Sequence[Answer], seconds: float, begin: float) -> str:
    """How much and how fast, for people."""
    count = sum(len(answer.tokens) for answer in answers)
    first = statistics.median(answer.times[0] - begin for answer in answers if answer.times)
    text = (
        f"{counted(count, 'token')} of {counted(len(answers), 'prompt')} in {seconds:.2f} s: "
        f"{count / seconds:,.1f} tokens/s; first token after {first * 1e3:,.0f} ms"
    )
    each = [
        (answer.times[-1] - answer.times[0]) / (len(answer.times) - 1)
        for answer in answers
        if len(answer.times) > 1
    ]
    if each:
        text += f", then {statistics.median(each) * 1e3:,.1f} ms per token"
    return text + ("" if len(answers) == 1 else " (medians)") + "."


def _sampling(options: argparse.Namespace, stops: frozenset[int], seed: int) -> Sampling:
    return Sampling(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=seed,
        stop_tokens=frozenset() if options.ignore_eos else stops,
    )


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    for name in options.prompt_file:
        try:
            prompts.append(Path(name).read_text("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise HelixError(f"cannot read the prompt file {name}: {error}.") from error
    return prompts


def token_ids(text: str) -> tuple[int, ...]:
    """The value of `--prompt-tokens`; whether the model has such tokens is the engine's to say."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not ids or any(type(one) is not int for one in ids):
        raise argparse.ArgumentTypeError(
            f"is {text!r:.60}. It must be a JSON list of token ids, such as [1, 2, 3]."
        )
    return tuple(ids)


def _check_prompts(options: argparse.Namespace) -> None:
    texts, ids = _prompts(options), options.prompt_tokens
    if not texts and not ids:
        raise HelixError(
            "there is no prompt. Give --prompt TEXT, --prompt-file FILE or --prompt-tokens '[1, 2, 3]'."
        )
    if ids and options.chat:
        raise HelixError(
            "--chat puts the text of a prompt into the model's template, and --prompt-tokens has no text. "
            "Leave one of them out."
        )


def _encode(tokens: Tokens, prompt: str, chat: bool) -> list[int]:
    if chat:
        return tokens.encode(tokens.chat_text([{"role": "user", "content": prompt}]), begin=False)
    return tokens.encode(prompt)
