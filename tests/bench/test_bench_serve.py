"""`bench serve`: the load is the one that was asked for, times are what they say, and texts are compared."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
from fake_engine import MODEL, FakeEngine, serving

from helix_megatron.bench import __main__ as bench
from helix_megatron.bench import serve
from helix_megatron.bench.serve_load import Answered, Load, Workload, percentile, send
from helix_megatron.errors import HelixError


def workload(**changes: float) -> Workload:
    sizes = {"requests": 12, "rate": 0, "prompt_tokens": 20, "common_tokens": 8, "max_tokens": 25}
    return Workload(**{**sizes, "seed": 3, **changes})  # type: ignore[arg-type]


def test_prompts_have_as_much_in_common_as_they_should():
    """And no more: what comes behind differs; the same seed asks the same again."""
    prompts = workload().prompts()
    assert {len(prompt) for prompt in prompts} == {20}
    assert len({prompt[:8] for prompt in prompts}) == 1
    assert len({prompt[8:] for prompt in prompts}) == 12
    assert workload().prompts() == prompts != workload(seed=4).prompts()
    with pytest.raises(HelixError, match="--common-tokens is 21, and a prompt has 20 tokens"):
        workload(common_tokens=21)


def test_arrivals_are_those_of_a_poisson_process():
    """Gaps of an exponential distribution: mean and deviation are both 1/rate, a share of 1/e is longer."""
    times = workload(requests=20_000, rate=5).arrivals()
    gaps = [late - early for early, late in itertools.pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.015)
    assert set(workload().arrivals()) == {0.0}


def test_a_load_at_a_server():
    """A real server and OpenAI's client: each request's own text, a time for each token, in order."""
    asked = workload(rate=200)
    with serving(FakeEngine(tick=0.002)) as served:
        load = send(asked, f"{served.url}/v1", MODEL)
    for prompt, answer, at in zip(asked.prompts(), load.answers, asked.arrivals(), strict=True):
        assert answer.text == (prompt * 2)[:25]
        assert answer.tokens == 25
        assert 0 < answer.first <= answer.times[-1] <= load.seconds - at
        assert list(answer.times) == sorted(answer.times)
    assert load.tokens == 12 * 25
    assert all(each > 0 for each in load.eaches())
    with serving() as served, pytest.raises(HelixError, match="refused or lost a request"):
        send(asked, f"{served.url}/v1", "another-model")


def test_percentiles():
    """As NumPy takes them, between neighbours in proportion."""
    import numpy as np

    values = [0.3, 0.1, 0.9, 0.4, 0.2]
    for percent in (50, 90, 99):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(("other", "status"), [("abc", 0), ("abd", 1)])
def test_other_texts_are_a_failure(other, status, monkeypatch, tmp_path, capsys):
    """Of this server with and without prefix caching; the servers are simulated."""
    texts = {"helix": "abc", "helix, no prefix caching": other}
    monkeypatch.setattr(serve, "command", lambda server, *_: server)
    monkeypatch.setattr(serve, "write_model", lambda *_: None)

    class Running:
        def __init__(self, server: str, port: int, log: Path) -> None:
            self.server = server

        def __enter__(self) -> str:
            return self.server

        def __exit__(self, *_: object) -> None:
            pass

    answer = {name: Answered(text, 3, (0.5, 0.6, 0.9)) for name, text in texts.items()}
    monkeypatch.setattr(serve, "running", Running)
    monkeypatch.setattr(serve, "send", lambda _, server, __: Load((answer[server],), 2.0))
    files = tmp_path / "a.json", tmp_path / "a.png"
    flags = ["--json", str(files[0]), "--plot", str(files[1]), "--server", *texts]
    assert bench.main(["serve", *flags]) == status
    printed = capsys.readouterr().out
    assert ("NOT equal" in printed) == bool(status)
    assert "500.0" in printed and "200.0" in printed  # to the first token, and per further token
    results = json.loads(files[0].read_text())["results"]
    assert results["helix"]["first_token_seconds"] == [0.5]
    assert results["helix"]["output_token_seconds"] == [pytest.approx(0.2)]
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.full("serving")
def test_servers_under_load(tmp_path):
    """The command itself: a random model, this server twice; the texts are equal."""
    flags = "--requests 6 --prompt-tokens 80 --common-tokens 64 --max-tokens 6 --size 64 --rate 20"
    servers = ["--server", "helix", "helix, no prefix caching"]
    path = tmp_path / "serve.json"
    assert bench.main(["serve", *flags.split(), *servers, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [one["tokens"] for one in results.values()] == [36, 36]
