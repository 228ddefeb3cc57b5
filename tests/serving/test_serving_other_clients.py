"""OpenAI's client, LangChain's and LiteLLM's make their usual calls to `helix serve` with a tiny model.

They run in an environment of their own: HELIX_CLIENTS_PYTHON names its Python, which is this one if not set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from test_serve_command import Served, served
from tiny_transformers import COMMON, randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from waiting import PROGRAM_LIMIT

PYTHON = os.environ.get("HELIX_CLIENTS_PYTHON", sys.executable)
CALLS = Path(__file__).with_name("client_calls.py")
KEY = "a-key"
PACKAGES = {"openai": "openai", "langchain": "langchain_openai", "litellm": "litellm"}
TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


def installed(client: str) -> bool:
    """Whether the Python of the clients has this one."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({PACKAGES[client]!r}) is None)"
    return subprocess.run([PYTHON, "-c", look], check=False).returncode == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Served]:
    """`helix serve` on one rank, with a tokenizer and a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["</s>", "<|turn|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(3)
    sizes = COMMON | {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    randomize(model)
    path = tmp_path_factory.mktemp("clients") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path.parent / "keys").write_text(KEY)
    flags = ("--tokenizer", str(path), "--api-key-file", str(path.parent / "keys"))
    with served(path, *flags, ranks=1) as running:
        yield running


@pytest.mark.parametrize("client", PACKAGES)
def test_usual_calls(server, client):
    """Chat, streams, completions, tools that are not used, models, errors."""
    if not installed(client):
        pytest.skip(
            f"{PYTHON} has no {PACKAGES[client]}: name one that has with HELIX_CLIENTS_PYTHON"
        )
    command = [PYTHON, str(CALLS), client, server.base, "tiny", KEY]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=PROGRAM_LIMIT, env=environment, check=False
    )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[-3000:]}"
    print(client, run.stdout.splitlines())
    assert "errors" in run.stdout.splitlines()
