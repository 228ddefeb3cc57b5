"""A server that has answered many requests has the memory and the pages that it had after some."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import transformers
from tiny_transformers import COMMON, randomize
from waiting import LIMIT, wait_until

REQUESTS, BEFORE = 600, 300  # 5,000 after 500 take longer than a part of the full tier may
TOGETHER = 24
CUT_OFF = 0.1
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"n": 2, "temperature": 1.0},
    {"logprobs": 3, "echo": True},
    {"best_of": 3, "temperature": 1.0},
    {"presence_penalty": 1.0, "repetition_penalty": 1.2, "logit_bias": {"65": 5}},
    {"response_format": FORM},
    {"stop": ["e", "~~"]},
    {"top_p": 0.5, "min_p": 0.1},
]
BEGINNINGS = ["", "Once upon a time ", "The quick brown fox jumps over the lazy dog, and " * 2]


def body_of(source: random.Random) -> dict[str, Any]:
    """A request of any kind."""
    letters = "".join(source.choices("abcdefgh ", k=source.randrange(1, 60)))
    options = source.choice(OPTIONS)
    stream = "best_of" not in options and source.random() < 0.5
    base = {"model": "soaked", "prompt": source.choice(BEGINNINGS) + letters, "stream": stream}
    return base | {"max_tokens": source.randrange(1, 16)} | options


async def ask(client: httpx.AsyncClient, body: dict[str, Any], cut: bool) -> str:
    """How a request ended."""
    if cut:
        body = body | {"stream": True, "max_tokens": 200, "best_of": None, "stop": None}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if cut:
            async for _ in response.aiter_raw():
                return "cut off"
        await response.aread()
        assert response.status_code == 200, response.text
        if body["stream"]:
            assert response.text.endswith("data: [DONE]\n\n")
        else:
            for choice in response.json()["choices"]:
                if "response_format" in body and choice["finish_reason"] == "stop":
                    assert json.loads(choice["text"]) in ({"a": 1}, {"a": 2})
        return "answered"


async def send(url: str, count: int, seed: int) -> Counter[str]:
    """Send requests, some at a time; how they ended."""
    source = random.Random(seed)
    bodies = [(body_of(source), source.random() < CUT_OFF) for _ in range(count)]
    limit = asyncio.Semaphore(TOGETHER)

    async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as client:

        async def one(body: dict[str, Any], cut: bool) -> str:
            async with limit:
                return await ask(client, body, cut)

        return Counter(await asyncio.gather(*(one(*each) for each in bodies)))


def soak(folder: Path, requests: int) -> dict[str, Any]:
    """What a server with two ranks has after some requests and after all of them."""
    torch.manual_seed(3)
    sizes = COMMON | {"vocab_size": 256, "max_position_embeddings": 512, "bos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    randomize(model)
    model.save_pretrained(folder / "soaked")
    flags = f"--load {folder / 'soaked'} --tokenizer byte --port 0 --nproc-per-node 2 --dtype fp32"
    command = [sys.executable, "-m", "helix_megatron.cli", "serve", *flags.split()]
    more = "--intra-head-parallel-size 2 --cache-memory 0.0002 --max-sequences 32"
    command += more.split()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        (url,) = re.findall(r"http://\S+(?=/v1)", line)
        threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()

        def state() -> dict[str, float]:
            text = httpx.get(f"{url}/metrics", timeout=LIMIT).text
            found = dict(re.findall(r"^(helix_\w+) (\S+)$", text, re.MULTILINE))
            ranks = psutil.Process(process.pid).children()
            return {name: float(value) for name, value in found.items()} | {
                "memory": float(sum(rank.memory_info().rss for rank in ranks))
            }

        def at_rest() -> dict[str, float]:
            wait_until(lambda: not state()["helix_cache_pages_used"], "no page is in use")
            return state()

        ends = asyncio.run(send(url, BEFORE, 1))
        before = at_rest()
        ends += asyncio.run(send(url, requests - BEFORE, 2))
        after = at_rest()
        process.send_signal(signal.SIGTERM)
        return {"ends": ends, "before": before, "after": after, "status": process.wait(LIMIT)}
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()


@pytest.mark.full("serving")
def test_nothing_is_left_behind(tmp_path):
    """Mixed requests, a tenth of them cut off, with little room: memory within 2 %, and no page in use."""
    found = soak(tmp_path, REQUESTS)
    before, after = found["before"], found["after"]
    assert found["ends"].total() == REQUESTS
    assert 0.05 < found["ends"]["cut off"] / REQUESTS < 0.15
    assert found["status"] == 0
    for state in (before, after):
        assert state["helix_cache_pages_used"] == 0
        assert (
            state["helix_engine_running_sequences"] == state["helix_engine_waiting_sequences"] == 0
        )
    assert (
        after["helix_prefix_cache_hit_tokens_total"]
        > before["helix_engine_prompt_tokens_total"] / 10
    )
    assert after["helix_engine_preemptions_total"] > 0, "there was too much room"
    assert after["memory"] <= 1.02 * before["memory"]


if __name__ == "__main__":  # python tests/serving/test_serving_soak.py FOLDER REQUESTS
    print(json.dumps(soak(Path(sys.argv[1]), int(sys.argv[2])), indent=1))
