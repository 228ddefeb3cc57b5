"""`helix serve`: an OpenAI-compatible server, on the ranks of this machine or of a launcher."""

from __future__ import annotations

import argparse
import functools
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from helix_megatron.arguments import exit_on_error
from helix_megatron.errors import HelixError, counted
from helix_megatron.flags import INPUT_FILE, add_flags, one_line, values_of, whole
from helix_megatron.inference.batching_flags import EngineOptions
from helix_megatron.inference.command import (
    command_parser,
    opened,
    ranks_together,
    run_command,
    say,
)
from helix_megatron.run.local_ranks import end_with_parent
from helix_megatron.run.quiet import ignore_megatron_warnings
from helix_megatron.serving.settings import ServerSettings

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
MOST_REPLICAS = 64
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = command_parser(
        program, "Serve a checkpoint of Helix, Megatron or Hugging Face over HTTP as OpenAI does."
    )
    group = parser.add_argument_group("server")
    add_flags(group, ServerSettings)
    group.add_argument(
        "--model-name",
        type=one_line,
        help="the name that clients ask for (default: that of the checkpoint's directory)",
    )
    group.add_argument(
        "--data-parallel-size",
        type=whole(largest=MOST_REPLICAS),
        default=1,
        metavar="N",
        help="how many replicas are started on this machine behind one address, each with --nproc-per-node "
        "ranks; what begins alike goes to the same one, and one that dies does not end the others "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--api-key-file",
        type=INPUT_FILE,
        metavar="FILE",
        help="a file of keys, one a line, of which a request needs one; more are taken from the variable "
        f"{KEY_VARIABLE}, separated by commas (default: no key is asked for)",
    )
    return parser


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Wrong input prints one paragraph and exits with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ignore_megatron_warnings()
    with exit_on_error(program):
        _check_installed()
        options = build_parser(program).parse_args(arguments)
        settings = _settings(options)
        if options.data_parallel_size > 1:
            from helix_megatron.serving.launch import serve_replicas

            ranks = options.nproc_per_node or 1
            return serve_replicas(settings, arguments, options.data_parallel_size, ranks)
        if "RANK" not in os.environ:
            end_with_parent()  # of a replica
        serve = functools.partial(_serve, settings)
        return run_command("serve", options, arguments, serve)


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


def _serve(settings: ServerSettings, config: InferenceConfig, engine_options: EngineOptions) -> int:
    from helix_megatron.inference.engine import follow
    from helix_megatron.inference.start import start
    from helix_megatron.serving.app import make_app
    from helix_megatron.serving.server import Server, allow_many_connections, listen

    asked = _Asked(settings.drain_seconds)
    listener = None
    if os.environ.get("RANK", "0") == "0":
        allow_many_connections()
        listener = listen(settings.host, settings.port)  # before the model is loaded
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
        runner, engine = start(config, engine_options, max_waiting=settings.max_waiting)
        # Python looks for all garbage when there are a quarter more objects than there were. Of those of the
        # modules and the model a quarter are megabytes of ended requests, which refer to themselves.
        gc.collect()
        gc.freeze()
        if engine is None:
            follow(runner)
        else:
            assert listener is not None
            app = make_app(engine, tokens, settings)
            server = Server(app, listener, max_connections=2 * settings.max_open_requests)
            _answer(engine, server, asked, config.run.world_size, settings)
    return 0


def _answer(
    engine: Engine,
    server: Server,
    asked: _Asked,
    ranks: int,
    settings: ServerSettings,
) -> None:
    """Serve until asked to end. The other ranks follow, whatever happens here."""
    try:
        port = server.start()
    except HelixError:
        engine.stop(0)
        engine.run()
        raise
    asked.server, asked.engine = server, engine
    if settings.host not in LOOPBACK and not settings.api_keys:
        say(f"Anybody who reaches {settings.host} may ask: there is no API key ({KEY_VARIABLE}).")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    say(
        f"{settings.model_name}: http://{host}:{port}/v1, {counted(ranks, 'rank')}, contexts of up to "
        f"{engine.capacity.max_context:,} tokens"
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
    given = values_of(ServerSettings, vars(options))
    given["model_name"] = options.model_name or Path(options.load).resolve().name
    return ServerSettings(**given, api_keys=tuple(keys))


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
