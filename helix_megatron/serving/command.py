"""`helix serve`: an OpenAI-compatible server, on the ranks of this machine or of a launcher."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helix_megatron.arguments import exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.flags import add_flags, names_with
from helix_megatron.inference.command import (
    command_parser,
    ignore_megatron_warnings,
    opened,
    ranks_together,
    run_command,
    say,
)
from helix_megatron.run.local_ranks import end_with_parent
from helix_megatron.serving.settings import MOST_SECONDS, ServerSettings

if TYPE_CHECKING:
    from helix_megatron.inference.arguments import InferenceConfig
    from helix_megatron.inference.engine import Engine
    from helix_megatron.serving.server import Server

PROGRAM = "helix serve"
KEY_VARIABLE = "HELIX_API_KEY"
FAREWELL_SECONDS = 1.0  # for clients to be told, where there is no more to wait for
GRACE_SECONDS = 5.0  # for the end of what was drained
GONE = "a process of the server is gone; its log says which."
UNANSWERED = "the server is stopping, and a process of it does not answer."
MOST_NUMBER = 2**31 - 1
# Fields of ServerSettings that are flags of the same name.
SETTINGS = names_with(ServerSettings, is_flag=True)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = command_parser(
        program, "Serve a checkpoint of Helix, Megatron or Hugging Face over HTTP as OpenAI does."
    )
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)"
    )
    group.add_argument(
        "--port",
        type=int,
        default=8000,
        help="the port to listen at; 0 takes a free one (default: %(default)s)",
    )
    group.add_argument(
        "--model-name",
        help="the name that clients ask for (default: that of the checkpoint's directory)",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="a file of keys, one a line, of which a request needs one; more are taken from the variable "
        f"{KEY_VARIABLE}, separated by commas (default: no key is asked for)",
    )
    group.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        help="how many sequences may wait for their turn; one more is refused with 429 (default: %(default)s)",
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        help="the time that open requests have to finish after SIGTERM or Ctrl-C (default: %(default)s)",
    )
    add_flags(group, ServerSettings, SETTINGS)
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Wrong input prints one paragraph and exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ignore_megatron_warnings()
    with exit_on_error(program):
        _check_installed()
        options = build_parser(program).parse_args(arguments)
        options.settings = _settings(options)
        return run_command("serve", options, arguments, _serve)


class _Asked(threading.Event):
    """Set by SIGTERM: open requests finish, and no others are taken."""

    def __init__(self, drain_seconds: float) -> None:
        super().__init__()
        self.engine: Engine | None = None
        self.server: Server | None = None
        self._drain_seconds = drain_seconds
        self._deadline = 0.0

    def set(self) -> None:
        import torch.distributed as dist

        super().set()
        if dist.get_rank():
            return  # rank 0 says when it ends
        if self.engine is None or self.server is None:
            say("stopped while the model was loaded")
            os._exit(128 + signal.SIGTERM)
        self._deadline = time.monotonic() + self._drain_seconds
        self.server.announce_stop()
        self.engine.stop(self._drain_seconds)
        last_resort = threading.Timer(self._drain_seconds + GRACE_SECONDS, self._leave)
        last_resort.daemon = True
        last_resort.start()

    def _leave(self) -> None:
        """End this process although the engine has not: a rank that is stopped holds it in a collective."""
        assert self.engine is not None and self.server is not None
        unfinished = self.engine.fail(UNANSWERED)
        self.server.stop(FAREWELL_SECONDS)
        say(f"The server did not end by itself. {unfinished} sequences were not finished.")
        os._exit(1 if unfinished else 0)

    @property
    def seconds_left(self) -> float:
        """Of those in which open requests may finish."""
        return self._deadline - time.monotonic()


def _serve(config: InferenceConfig, options: argparse.Namespace) -> int:
    from helix_megatron.inference.batching_flags import engine_options
    from helix_megatron.inference.engine import follow
    from helix_megatron.inference.start import start
    from helix_megatron.serving.app import make_app
    from helix_megatron.serving.server import Server, allow_many_connections, listen

    asked = _Asked(options.drain_seconds)
    listener = None
    if os.environ.get("RANK", "0") == "0":
        allow_many_connections()
        listener = listen(options.host, options.port)  # before the model is loaded
    tokens = opened(config)
    # Ctrl-C in a terminal, where this process was started without ranks of its own.
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def farewell(reason: str = "") -> None:
        if asked.engine is not None:
            asked.engine.fail(GONE)
        if asked.server is not None:
            asked.server.stop(FAREWELL_SECONDS)

    end_with_parent(farewell)
    with ranks_together(config, asked, farewell):
        runner, engine = start(config, engine_options(options), max_waiting=options.max_waiting)
        if engine is None:
            follow(runner)
        else:
            assert listener is not None
            app = make_app(engine, tokens, options.settings)
            server = Server(app, listener, max_connections=2 * options.max_open_requests)
            _answer(engine, server, asked, config, options)
    return 0


def _answer(
    engine: Engine,
    server: Server,
    asked: _Asked,
    config: InferenceConfig,
    options: argparse.Namespace,
) -> None:
    """Serve until asked to end. The other ranks follow, whatever happens here."""
    try:
        port = server.start()
    except HelixError:
        engine.stop(0)
        engine.run()
        raise
    asked.server, asked.engine = server, engine
    if options.host not in LOOPBACK and not options.settings.api_keys:
        say(f"Anybody who reaches {options.host} may ask: there is no API key ({KEY_VARIABLE}).")
    host = f"[{options.host}]" if ":" in options.host else options.host
    say(
        f"{options.settings.model_name}: http://{host}:{port}/v1, {config.run.world_size} "
        f"rank{'s' * (config.run.world_size != 1)}, contexts of up to {engine.capacity.max_context:,} tokens"
    )
    try:
        engine.run()
    except BaseException:  # every request has been told
        server.stop(FAREWELL_SECONDS)
        raise
    server.stop(max(FAREWELL_SECONDS, asked.seconds_left))


def _settings(options: argparse.Namespace) -> ServerSettings:
    keys = []
    if KEY_VARIABLE in os.environ:
        keys += _keys(os.environ[KEY_VARIABLE].split(","), f"the variable {KEY_VARIABLE}")
    if options.api_key_file:
        try:
            text = Path(options.api_key_file).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
            raise HelixError(
                f"cannot read the key file {options.api_key_file}: {reason}. Give one key a line."
            ) from error
        keys += _keys(text.splitlines(), f"the key file {options.api_key_file}")
    for name, most in (("max_waiting", MOST_NUMBER), ("drain_seconds", MOST_SECONDS)):
        value = getattr(options, name)
        if not 0 <= value <= most:
            raise HelixError(f"--{name.replace('_', '-')} is {value}. Valid: 0 to {most}.")
    return ServerSettings(
        model_name=options.model_name or Path(options.load).resolve().name,
        api_keys=tuple(keys),
        **{name: getattr(options, name) for name in SETTINGS},
    )


def _keys(texts: Sequence[str], source: str) -> list[str]:
    """The keys of one source. Who names a source and gives no key does not mean that anybody may ask."""
    keys = [text.strip() for text in texts if text.strip()]
    if not keys:
        raise HelixError(
            f"{source} holds no key. Give one or more, or leave it out to ask for none."
        )
    return keys


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise HelixError(
            f"the server needs {error.name}. Install it: pip install 'helix_megatron[serve]'."
        ) from error
