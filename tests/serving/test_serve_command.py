"""`helix serve` and `helix generate` as their users run them: real ranks, a real client, real signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import torch
import transformers
from tiers import is_full, sized
from tiny_transformers import COMMON, randomize
from waiting import LIMIT, PROGRAM_LIMIT, wait_until

from helix_megatron import cli

HELIX = (sys.executable, "-m", "helix_megatron.cli")
MODEL = "tiny"
RANKS = sized("serving", full=4, quick=2)
CUT = ("--intra-head-parallel-size", "2")
REQUESTS, CUT_OFF = sized("serving", full=(200, 10), quick=(40, 4))
TOKENS = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A Llama of 2 layers with random weights and 2 key-value heads; its tokens are bytes."""
    torch.manual_seed(3)
    sizes = COMMON | {"vocab_size": 256, "max_position_embeddings": 256, "bos_token_id": None}
    config = transformers.LlamaConfig(**sizes)
    model = transformers.LlamaForCausalLM(config)
    randomize(model)
    path = tmp_path_factory.mktemp("served") / MODEL
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[str]:
    """What transformers generates greedily for every prompt, a full forward pass for every token."""
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    sequences = [list(prompt(row).encode()) for row in range(REQUESTS)]
    with torch.inference_mode():
        for _ in range(TOKENS):
            longest = max(map(len, sequences))
            ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
            logits = model(ids).logits
            for row, sequence in enumerate(sequences):
                sequence.append(int(logits[row, len(sequence) - 1].argmax()))
    return [bytes(s[-TOKENS:]).decode(errors="replace") for s in sequences]


def prompt(row: int) -> str:
    return f"request {row}: " + "lorem ipsum "[: row % 12] * (row % 5)


class Served:
    """A running `helix serve`: where it listens, and what it wrote to standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._ready = threading.Event()
        self.base = ""
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(PROGRAM_LIMIT) or not self.base:
            process.kill()
            pytest.fail("the server did not start: " + "".join(self.lines))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.search(r"http://\S+/v1", line)
            if found:
                self.base = found[0]
                self._ready.set()
        self._ready.set()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def metric(self, name: str) -> float:
        url = self.base.removesuffix("/v1") + "/metrics"
        with urllib.request.urlopen(url, timeout=LIMIT) as reply:
            text = reply.read().decode()
        return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]

    def rank(self, number: int) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"there is no rank {number}")


@contextlib.contextmanager
def served(
    checkpoint: Path, *flags: str, ranks: int = RANKS, drain_seconds: int = 600
) -> Iterator[Served]:
    command = [*HELIX, *f"serve --load {checkpoint} --tokenizer byte --port 0".split(), *flags]
    # None of these limits ends anything here but a hang.
    command += ["--nproc-per-node", str(ranks), "--distributed-timeout-minutes", "60"]
    command += [
        "--drain-seconds",
        str(drain_seconds),
        "--body-seconds",
        "600",
        "--send-seconds",
        "600",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Served(process)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def end_of(server: Served) -> int:
    """Its exit status."""
    return server.process.wait(PROGRAM_LIMIT)


async def stream_text(
    client: openai.AsyncOpenAI, text: str, tokens: int, cut_after: int = 0
) -> str:
    """The text of a streamed completion; closed by this side after so many chunks, if asked."""
    stream = await client.completions.create(
        model=MODEL, prompt=text, max_tokens=tokens, temperature=0, stream=True
    )
    came, chunks = "", 0
    async for chunk in stream:
        came += "".join(choice.text for choice in chunk.choices)
        chunks += 1
        if cut_after and chunks == cut_after:
            await stream.close()
            break
    return came


def test_many_streams_of_which_some_are_cut_off(checkpoint, expected):
    """All the others get their tokens, no page is left, and SIGTERM ends the server when they are done."""
    cut = set(range(7, REQUESTS, REQUESTS // CUT_OFF))
    assert len(cut) == CUT_OFF

    async def clients(base: str) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=base, api_key="none", timeout=PROGRAM_LIMIT, max_retries=0
        ) as client:
            after = [8 if row in cut else 0 for row in range(REQUESTS)]
            streams = (
                stream_text(client, prompt(row), TOKENS, cut) for row, cut in enumerate(after)
            )
            return await asyncio.gather(*streams)

    # Room for 4 to 8 sequences on a rank: some must give up their pages again, however few come at once.
    sequences = sized("serving", full="48", quick="24")
    flags = ("--max-sequences", sequences, "--cache-memory", "0.0001")
    with served(checkpoint, *flags, *CUT) as server:
        texts = asyncio.run(clients(server.base))
        assert server.metric("helix_engine_preemptions_total") > 0
        for row, text in enumerate(texts):
            assert expected[row].startswith(text) if row in cut else text == expected[row]
        wait_until(lambda: not server.metric("helix_cache_pages_used"), "no page is left")
        for name in ("cache_pages_used", "engine_running_sequences", "engine_waiting_sequences"):
            assert server.metric(f"helix_{name}") == 0, name

        client = openai.OpenAI(base_url=server.base, api_key="none", max_retries=0)
        stream = client.completions.create(
            model=MODEL, prompt=prompt(0), max_tokens=120, temperature=0, stream=True
        )
        first = next(iter(stream))
        server.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices and rest[-1].choices[0].finish_reason == "length"
        assert end_of(server) == 0, server.text


def test_a_killed_rank_ends_all_streams(checkpoint, tmp_path):
    """Every client hears of it, the server ends by itself, and says which rank is gone.

    Long before a collective would time out, and before the texts would end.
    """
    long = shutil.copytree(checkpoint, tmp_path / MODEL)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    victim = RANKS // 2
    started = set()

    async def client_of(client: openai.AsyncOpenAI, row: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt(row), max_tokens=8000, temperature=0, stream=True
        )
        try:
            async for _ in stream:
                started.add(row)
        except openai.APIError as error:
            return str(error)
        return ""

    async def clients(server: Served) -> list[str]:
        async with (
            asyncio.timeout(PROGRAM_LIMIT),
            openai.AsyncOpenAI(
                base_url=server.base, api_key="none", timeout=PROGRAM_LIMIT, max_retries=0
            ) as client,
        ):
            tasks = [asyncio.create_task(client_of(client, row)) for row in range(16)]
            while len(started) < len(tasks) and not any(task.done() for task in tasks):
                await asyncio.sleep(0.01)
            server.rank(victim).kill()
            return await asyncio.gather(*tasks)

    with served(long, "--max-sequences", "16", *CUT) as server:
        errors = asyncio.run(clients(server))
        assert len(errors) == 16 and all(errors), errors
        assert end_of(server) != 0
        assert f"rank {victim}" in server.text.lower()


def test_a_key_and_what_else_is_asked_for(checkpoint):
    """Health, models, a key that is asked for, and a completion that is not streamed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HELIX_API_KEY", "secret")
        with served(checkpoint, "--model-name", "mine", ranks=1) as server:
            client = openai.OpenAI(base_url=server.base, api_key="secret", max_retries=0)
            with urllib.request.urlopen(server.base.removesuffix("/v1") + "/health") as reply:
                assert json.load(reply) == {"status": "ok"}
            assert [model.id for model in client.models.list()] == ["mine"]
            answer = client.completions.create(model="mine", prompt=[1, 2, 3], max_tokens=5)
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").models.list()
            with pytest.raises(openai.BadRequestError, match="256"):
                client.completions.create(model="mine", prompt="x" * 300, max_tokens=5)
            server.process.send_signal(signal.SIGINT)
            assert end_of(server) == 0, server.text


def test_a_taken_port_is_said_at_once(checkpoint):
    """Before the model is loaded, in one paragraph, whatever the number of ranks."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [*HELIX, "serve", "--load", str(checkpoint), "--port", port]
        command += [
            "--tokenizer",
            "byte",
            "--nproc-per-node",
            sized("serving", full="2", quick="1"),
        ]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=PROGRAM_LIMIT, check=False
        )
    assert run.returncode == 2
    text = re.sub(r"\s+", " ", run.stderr)
    assert f"Cannot listen on 127.0.0.1 port {port}: Address already in use." in text
    assert "Traceback" not in text
    assert "gloo" not in text


@pytest.mark.full("serving")
def test_a_signal_to_every_process_is_one_signal(checkpoint):
    """As systemd and Slurm send it: open requests still finish, also where a rank was stopped meanwhile."""
    with served(checkpoint, ranks=2) as server:
        client = openai.OpenAI(base_url=server.base, api_key="none", max_retries=0)
        stream = client.completions.create(
            model=MODEL, prompt="x", max_tokens=150, temperature=0, stream=True
        )
        next(iter(stream))
        children = psutil.Process(server.process.pid).children()
        server.rank(1).suspend()
        server.process.send_signal(signal.SIGTERM)
        for child in children:
            child.send_signal(signal.SIGTERM)
        assert list(stream)[-1].choices[0].finish_reason == "length"
        assert end_of(server) == 0, server.text


@pytest.mark.full("serving")
def test_a_rank_that_does_not_answer_keeps_no_server_alive(checkpoint):
    """It holds rank 0 in a collective: clients are told when the time is over, and the server ends."""
    with served(checkpoint, ranks=2, drain_seconds=1) as server:
        client = openai.OpenAI(base_url=server.base, api_key="none", max_retries=0)
        stream = iter(
            client.completions.create(model=MODEL, prompt="x", max_tokens=150, stream=True)
        )
        next(stream)
        server.rank(1).suspend()
        server.rank(
            0
        ).terminate()  # not by the process that started the ranks, which would wake them
        with pytest.raises(openai.APIError, match="a process of it does not answer"):
            list(stream)
        assert end_of(server) == 1, server.text
        assert "The server did not end by itself. 1 sequences were not finished." in server.text


# ------------------------------------------------------------------------------ generate


def generate(checkpoint: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*HELIX, "generate", "--load", str(checkpoint), "--tokenizer", "byte", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PROGRAM_LIMIT, env=environment, check=False
    )


def test_generate_on_ranks(checkpoint, expected):
    """Prompts of several lengths, on as many ranks as heads and twice as many as key-value heads."""
    prompts = [flag for row in range(3) for flag in ("--prompt", prompt(row))]
    run = generate(
        checkpoint, *prompts, "--max-tokens", str(TOKENS), "--json", "--nproc-per-node", "4"
    )
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert [record["text"] for record in records] == expected[:3]
    assert {record["finish_reason"] for record in records} == {"length"}
    assert re.search(r"72 tokens of 3 prompts in .* tokens/s; .* ms per token", run.stderr)
    assert "every head is cut into 2 segments" in run.stderr


def test_generate_streams_to_the_terminal(checkpoint, expected):
    """One prompt: its text and nothing else on standard output, up to a stop string."""
    flags = ("--prompt", prompt(0), "--max-tokens", str(TOKENS))
    stop = expected[0][5:7]
    run = generate(checkpoint, *flags, "--stop", stop)
    assert run.returncode == 0, run.stderr
    assert run.stdout == expected[0][: expected[0].index(stop)] + "\n"
    if is_full("serving"):
        assert generate(checkpoint, *flags).stdout == expected[0] + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompt", "x", "--max-tokens", "0"],
            "--max-tokens is 0. It must be a whole number of at least 1.",
        ),
        (
            ["--prompt", "x", "--top-p", "0"],
            "--top-p is 0.0. It must be a finite number above 0 and at most 1.",
        ),
        (
            [],
            "there is no prompt. Give --prompt TEXT, --prompt-file FILE or --prompt-tokens '[1, 2, 3]'.",
        ),
        (
            ["--prompt-tokens", "[1, true]"],
            "--prompt-tokens is '[1, true]'. It must be a JSON list of token ids",
        ),
        (
            ["--prompt-tokens", "[1]", "--chat"],
            "--prompt-tokens has no text. Leave one of them out.",
        ),
        (["--prompt-file", "/nowhere"], "cannot read the prompt file /nowhere"),
        (["--prompt", "x", "--nproc-per-node", "3"], "cannot be dealt to 3 tensor parallel ranks"),
        (["--prompt", "x", "--stop", ""], "--stop is an empty text"),
    ],
)
def test_wrong_input_is_one_paragraph(checkpoint, capsys, flags, message):
    """What is wrong, the valid values and what to try, before any model is loaded."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--load", str(checkpoint), "--tokenizer", "byte", *flags])
    assert ended.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "400"], "the longest context is 256"),
        (["--cache-memory", "1e9"], "--cache-memory is 1000000000.0 GiB, and this machine has"),
        (
            ["--page-size", str(2**31 - 1)],
            "less than one page of 1,099,511,627,264 bytes. Give more",
        ),
    ],
)
def test_what_shows_when_the_model_is_loaded_is_one_paragraph_too(checkpoint, flags, message):
    """By then there is a process group, which must not add its own words."""
    run = generate(checkpoint, "--prompt", "x", *flags)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert message in re.sub(r"\s+", " ", run.stderr), run.stderr
