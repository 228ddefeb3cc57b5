"""Several replicas behind one endpoint: who answers, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest
from fake_engine import CAPACITY, MODEL, FakeEngine, Served, serving, until_set
from hypothesis import given
from hypothesis import strategies as st
from waiting import LIMIT, wait_until

from helix_megatron.errors import HelixError
from helix_megatron.serving import launch
from helix_megatron.serving.front import make_front
from helix_megatron.serving.launch import serve_replicas
from helix_megatron.serving.replicas import MORE_TO_DO, Replica, Replicas, beginning_of
from helix_megatron.serving.server import Server, listen
from helix_megatron.serving.settings import ServerSettings


@dataclass(frozen=True)
class Fronted:
    """An endpoint, and the servers behind it; engines are simulated."""

    url: str
    state: Replicas
    behind: list[Served]

    def openai(self, **options: str) -> openai.OpenAI:
        options = {"api_key": "none"} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=LIMIT, **options)

    def metric(self, name: str, replica: int) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=LIMIT).text
        (line,) = (
            one for one in text.splitlines() if one.startswith(f'{name}{{replica="{replica}')
        )
        return float(line.split()[-1])


@contextlib.contextmanager
def fronted(engines: list[FakeEngine], **options: object) -> Iterator[Fronted]:
    with contextlib.ExitStack() as stack:
        behind = [stack.enter_context(serving(engine, **options)) for engine in engines]
        ports = [int(one.url.rsplit(":")[-1]) for one in behind]
        state = Replicas([Replica(n, port, trouble="") for n, port in enumerate(ports)])
        settings = ServerSettings(MODEL, **options)  # type: ignore[arg-type]
        server = Server(make_front(state, settings), listen("127.0.0.1", 0))
        port = server.start()
        stack.callback(server.stop)
        yield Fronted(f"http://127.0.0.1:{port}", state, behind)


def die(served: Served) -> None:
    """As a process does that is killed: its port is closed, and its connections are cut."""
    uvicorn, loop = served.server._uvicorn, served.server._loop
    assert loop is not None

    def cut() -> None:
        for one in uvicorn.servers:
            one.close()
        for connection in list(uvicorn.server_state.connections):
            connection.transport.abort()

    loop.call_soon_threadsafe(cut)


def test_the_front_is_as_the_server_itself():
    """OpenAI's client gets the same answers, streams and errors; keys are asked for; logs of each are there."""
    with fronted([FakeEngine(), FakeEngine()], api_keys=("right",)) as front:
        client = front.openai(api_key="right")
        assert [one.id for one in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        answer = client.completions.create(model=MODEL, prompt="é", max_tokens=4)
        assert answer.choices[0].text == "éé"
        stream = client.completions.create(model=MODEL, prompt="ab", max_tokens=50, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "ab" * 25
        with pytest.raises(openai.BadRequestError, match="best_of is 1"):
            client.completions.create(model=MODEL, prompt="ab", n=2, best_of=1)
        with pytest.raises(openai.AuthenticationError):
            front.openai().completions.create(model=MODEL, prompt="ab")
        assert httpx.get(f"{front.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{front.url}/v1/nowhere").status_code == 404
        assert "helix_engine_steps" in httpx.get(f"{front.url}/replicas/1/metrics").text

        def answered() -> float:
            return sum(front.metric("helix_replica_answered_requests_total", n) for n in (0, 1))

        wait_until(lambda: answered() == 7, "all but the one without a key are counted")


def test_one_dies_under_load():
    """The other's requests all complete; those of the dead one get an error, are counted, and others go on."""
    released = threading.Event()
    engines = [FakeEngine(CAPACITY, 0.001, until_set(released)) for _ in range(2)]

    async def ask(client: openai.AsyncOpenAI, number: int, stream: bool) -> str:
        asked = {"model": MODEL, "prompt": f"{number} asks", "max_tokens": 2000}
        try:
            if not stream:
                answer = await client.completions.create(**asked)
                return str(answer.choices[0].finish_reason)
            last = ""
            async for chunk in await client.completions.create(**asked, stream=True):
                last = chunk.choices[0].finish_reason or last
            return last
        except openai.APIError as error:
            return f"{type(error).__name__}: {error.message}"

    async def all_of_them(front: Fronted) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="none", max_retries=0, timeout=LIMIT
        ) as client:
            tasks = [asyncio.create_task(ask(client, n, bool(n % 2))) for n in range(20)]
            while sum(len(engine.submitted) for engine in engines) < 20:
                await asyncio.sleep(0.01)
            die(front.behind[0])
            while front.state.all[0].open:
                await asyncio.sleep(0.01)
            released.set()
            return await asyncio.gather(*tasks)

    with fronted(engines) as front:
        ends = asyncio.run(all_of_them(front))
        of_the_dead, of_the_other = (len(engine.submitted) for engine in engines)
        assert of_the_dead + of_the_other == 20
        assert min(of_the_dead, of_the_other) >= 20 // 2 - MORE_TO_DO
        errors = [end for end in ends if end != "stop"]
        assert ends.count("stop") == of_the_other
        assert len(errors) == of_the_dead
        assert all("the replica that answered is gone" in error for error in errors)
        assert front.metric("helix_replica_lost_requests_total", 0) == of_the_dead
        assert front.metric("helix_replica_lost_requests_total", 1) == 0
        client = front.openai()
        for number in range(6):  # whoever belonged to the dead one goes elsewhere
            answer = client.completions.create(model=MODEL, prompt=f"{number} asks", max_tokens=1)
            assert answer.choices[0].text == ""
        assert front.metric("helix_replica_up", 0) == 0
        health = httpx.get(f"{front.url}/health").json()
        assert health["status"] == "degraded"
        assert "replica 0: it cannot be reached" in health["reason"]
        front.state.all[1].trouble = "it ended with status 1."
        assert httpx.get(f"{front.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="no replica works"):
            client.completions.create(model=MODEL, prompt="x", max_tokens=1)


def test_a_client_that_goes_away():
    """Its sequence ends at the replica, too."""
    with fronted([FakeEngine(tick=0.01)]) as front:
        stream = front.openai().completions.create(
            model=MODEL, prompt="ab", max_tokens=2000, stream=True
        )
        next(iter(stream))
        stream.close()
        engine = front.behind[0].engine
        wait_until(lambda: engine.cancelled == engine.submitted, "it is cancelled")
        wait_until(lambda: not front.state.all[0].open, "its place is free")


@given(st.integers(1, 8), st.lists(st.binary(max_size=8), min_size=1, max_size=60, unique=True))
def test_what_begins_alike_goes_to_the_same_replica(count, beginnings):
    """As long as that one is not busier; when one dies only what belonged to it goes elsewhere."""
    state = Replicas([Replica(number, 1, trouble="") for number in range(count)])
    first = {one: state.for_request(one) for one in beginnings}
    assert all(set(ranked) == set(state.all) for ranked in first.values())
    dead = state.all[0]
    dead.trouble = "dead"
    for one, ranked in first.items():
        assert state.for_request(one) == [replica for replica in ranked if replica is not dead]
    dead.trouble = ""
    busy = first[beginnings[0]][0]
    busy.open = MORE_TO_DO
    assert state.for_request(beginnings[0])[0] is busy
    busy.open = MORE_TO_DO + 1
    assert state.for_request(beginnings[0])[0] is not busy or count == 1


def test_beginnings_are_shared_out():
    """Of many different ones each replica gets about its share."""
    state = Replicas([Replica(number, 1, trouble="") for number in range(4)])
    counts = Counter(state.for_request(b"%d" % n)[0].number for n in range(4000))
    assert all(800 < count < 1200 for count in counts.values())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (b'{"n": 1, "prompt": "abc"}', b'{"prompt": "abc", "seed": 3}', True),
        (b'{"prompt": "abc"}', b'{"prompt": ["abc", "x"]}', True),
        (b'{"prompt": [1, 2]}', b'{"prompt": [1, 3]}', False),
        (b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": "system"}]}', False),
        (b"{", b"}", False),
        (b"[]", b"[]", True),
    ],
)
def test_beginnings(one, other, same):
    """The prompt alone counts, wherever it stands; a body that is none is taken as it is."""
    assert (beginning_of(one) == beginning_of(other)) == same
    long = b'{"prompt": "%s"}'
    assert beginning_of(long % (b"x" * 2000 + b"a")) == beginning_of(long % (b"x" * 2000 + b"b"))


def test_what_cannot_be_started(monkeypatch):
    """Before a port is taken: more ranks than GPUs, and ranks that a launcher has started."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    with pytest.raises(
        HelixError, match=r"2 replicas of 2 ranks need 4 GPUs, and 3 are visible\. Give .* 1,"
    ):
        serve_replicas(ServerSettings(MODEL), [], 2, 2)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(HelixError, match="a launcher has started ranks already"):
        serve_replicas(ServerSettings(MODEL), [], 2, 1)


class FakeProcess:
    """A replica's process. One that works takes requests until it ends."""

    def __init__(self, works: bool = True) -> None:
        self.works, self.status = works, None

    def poll(self) -> int | None:
        return self.status


def watched(monkeypatch, events: dict[int, Any], starts: list[FakeProcess]) -> tuple[Any, ...]:
    """(replicas, when they were started again, what was said) of two replicas; events by seconds."""
    first = [starts.pop(0), starts.pop(0)]  # the processes, which are replaced by others
    state, clock = Replicas([Replica(0, 0), Replica(1, 0)]), [0.0]
    asked: list[int] = []
    started: list[tuple[int, float]] = []
    said: list[str] = []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] in events:
            events[clock[0]](first, asked)
        assert clock[0] < 1000, "it should have ended"

    def start(replica: Replica) -> Any:
        started.append((replica.number, clock[0]))
        return starts.pop(0)

    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock[0]))
    monkeypatch.setattr(launch, "say", said.append)
    monkeypatch.setattr(
        launch,
        "_trouble",
        lambda replica, process: (
            "" if process.works and process.status is None else f"status {process.status}"
        ),
    )
    launch._watch(state, first, asked, start)
    return state, started, said


def ends(number: int, status: int = 1) -> Any:
    def end(processes: list[FakeProcess], asked: list[int]) -> None:
        processes[number].status = status

    return end


def test_a_replica_that_ended_is_started_again(monkeypatch):
    """Once it has worked; after pauses that double until it works again. A signal ends it all."""
    events = {
        5: ends(0),
        6: ends(0),  # the second one ends before it has worked
        10: lambda processes, asked: asked.append(15),
    }
    starts = [FakeProcess(), FakeProcess(), FakeProcess(works=False), FakeProcess()]
    state, started, said = watched(monkeypatch, events, starts)
    assert started == [(0, 5.5), (0, 7.0)]
    assert [replica.restarts for replica in state.all] == [2, 0]
    assert not state.all[0].trouble
    assert "replica 0 will be started again in 0.5 s" in said
    assert "replica 0 will be started again in 1 s" in said


def test_replicas_that_never_worked_are_left(monkeypatch):
    """They would tell the same again; when all have ended so, the server ends."""
    starts = [FakeProcess(works=False), FakeProcess(works=False)]
    state, started, _ = watched(monkeypatch, {3: ends(0), 4: ends(1)}, starts)
    assert not started
    assert [replica.trouble for replica in state.all] == ["status 1", "status None"]


# ------------------------------------------------------------------------ real replicas


@pytest.fixture
def command(tmp_path) -> list[str]:
    """`helix serve` of a random Llama, whose tokens are bytes, with two replicas."""
    import torch
    import transformers
    from tiny_transformers import COMMON, randomize

    torch.manual_seed(3)
    sizes = COMMON | {"vocab_size": 256, "max_position_embeddings": 2048, "bos_token_id": None}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    randomize(model)
    model.save_pretrained(tmp_path / "model")
    flags = f"--load {tmp_path / 'model'} --model-name {MODEL} --tokenizer byte --port 0"
    program = [sys.executable, "-m", "helix_megatron.cli", "serve", *flags.split()]
    return [*program, "--data-parallel-size", "2", "--dtype", "fp32"]


@pytest.mark.full("serving")
def test_a_real_replica_is_killed(command):
    """The processes: the other's requests end well, the dead one's are told, and a signal ends it all."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "all 2 replicas take requests" in line:
            break
    else:
        pytest.fail("".join(lines))
    threading.Thread(target=lambda: list(process.stderr or ()), daemon=True).start()
    (url,) = re.findall(r"http://\S+(?=/v1, 2 replicas)", "".join(lines))
    front = Fronted(url, Replicas([]), [])

    def ask(number: int) -> str:
        try:
            answer = front.openai().completions.create(
                model=MODEL, prompt=f"{number} asks", max_tokens=1000
            )
            return str(answer.choices[0].finish_reason)
        except openai.APIError as error:
            return error.message

    try:
        children = psutil.Process(process.pid).children()
        first = min(children, key=lambda child: child.create_time())  # replica 0
        with ThreadPoolExecutor(12) as executor:
            asked = [executor.submit(ask, number) for number in range(12)]
            wait_until(
                lambda: min(front.metric("helix_replica_open_requests", n) for n in (0, 1)) > 1,
                "both have something to do",
            )
            first.kill()
            ends = Counter(one.result() for one in asked)
        lost = front.metric("helix_replica_lost_requests_total", 0)
        assert lost > 1 and ends["length"] == 12 - lost > 1
        assert front.metric("helix_replica_lost_requests_total", 1) == 0
        assert ask(99) == "length"
        wait_until(lambda: front.metric("helix_replica_up", 0) == 1, "it is started again")
        assert front.metric("helix_replica_restarts_total", 0) == 1
        assert ask(99) == "length"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
        assert not psutil.pid_exists(first.pid)
    finally:
        for child in psutil.Process().children(recursive=True):
            if child.cmdline()[1:4] == command[1:4]:
                child.kill()
