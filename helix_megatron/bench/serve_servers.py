"""The servers of `bench serve`: how each is started, when it is ready, and the random model that they serve."""

from __future__ import annotations

import contextlib
import os
import signal
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from helix_megatron.errors import HelixError

HELIX, WHOLE_PROMPTS, TRANSFORMERS = "helix", "helix, no prefix caching", "transformers"
SERVERS = (HELIX, WHOLE_PROMPTS, TRANSFORMERS)
START_SECONDS, STOP_SECONDS = 300.0, 30.0
MEMORY = 0.1  # of the machine's, for transformers' keys and values; by default it takes nearly all
TAIL = 1500  # characters of a server's log in an error


def command(server: str, model: Path, port: int, ranks: int) -> list[str]:
    """The command line of a server, of any kind in `SERVERS`."""
    if server == TRANSFORMERS:
        module = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
        flags = f"--host 127.0.0.1 --port {port} --continuous-batching --dtype float32"
        return [*module, *flags.split(), "--cb-max-memory-percent", str(MEMORY)]
    name = model_name(server, model)
    flags = f"--port {port} --nproc-per-node {ranks} --model-name {name} --dtype fp32"
    more = ["--no-prefix-caching"] if server == WHOLE_PROMPTS else []
    module = [sys.executable, "-m", "helix_megatron.cli", "serve", "--load", str(model)]
    return [*module, *flags.split(), *more]


def model_name(server: str, model: Path) -> str:
    """What a client calls the model at a server."""
    return str(model) if server == TRANSFORMERS else "model"


@contextlib.contextmanager
def running(arguments: Sequence[str], port: int, log: Path) -> Iterator[str]:
    """A server that answers; its address for OpenAI's client. It is ended on the way out.

    Raises:
        HelixError: it did not start.
    """
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as written:
        process = subprocess.Popen(
            arguments, stdout=written, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    text = log.read_text(errors="replace")[-TAIL:]
    raise HelixError(f"a server did not start: {text}")


def write_model(directory: Path, context: int, size: int) -> None:
    """A random Llama whose tokens are single characters, so that equal texts are equal tokens.

    Args:
        context: positions.
        size: of the hidden states; a multiple of 64. Eight query heads share two key-value heads.
    """
    try:
        import tokenizers
        import torch
        import transformers
    except ImportError as error:
        raise HelixError(
            f"a random model needs {error.name}: pip install 'helix_megatron[huggingface]'. Or give --load."
        ) from error
    characters = sorted(set(string.printable) - set("\r\x0b\x0c\t"))
    vocabulary = {character: number for number, character in enumerate(characters)}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=size // 8,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.2,  # so large that rounding does not choose the tokens
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(directory)
