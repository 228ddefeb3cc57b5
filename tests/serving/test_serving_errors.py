"""Every error has OpenAI's shape and says what to do: wrong bodies, limits, keys, paths."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator

import openai
import pytest
from fake_engine import MODEL, FakeEngine, FakeTokens, Served, head, post, serving
from waiting import LIMIT, wait_until

from helix_megatron.errors import HelixError
from helix_megatron.serving.app import make_app
from helix_megatron.serving.settings import ServerSettings

MOST_BYTES = 10_000
VALID = {"model": MODEL, "prompt": "x"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(max_body_bytes=MOST_BYTES, max_choices=3, max_prompts=4) as server:
        yield server


def error_of(response) -> dict:
    """The error of a response, whose shape is right."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "There is no path '/'."),
        ("POST", "/v1/embeddings", 404, "There is no path '/v1/embeddings'."),
        ("GET", "/v1/%ff%00é", 404, "There is no path"),
        ("GET", "/v1/models/other", 404, "There is no model 'other'. Valid: org/model."),
        ("GET", "/v1/completions/", 405, "does not have method 'GET'. Valid: POST."),
        ("DELETE", "/health", 405, "does not have method 'DELETE'. Valid: GET."),
        ("PATCH", "/v1/models", 405, "does not have method 'PATCH'. Valid: GET."),
    ],
)
def test_paths_and_methods(served, method, path, status, message):
    """Also what the framework refuses before any route."""
    response = served.http().request(method, path)
    assert response.status_code == status
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is not valid JSON: EOF"),
        (b"{", "The body is not valid JSON"),
        (b"null", "The body is None. Valid: a JSON object."),
        (b'"text"', "The body is 'text'. Valid: a JSON object."),
        (b"[]", "The body is []. Valid: a JSON object."),
        (b"\xff\xfe{}", "The body is not valid JSON"),
        (b'{"model": "\xff"}', "The body is not valid JSON: invalid unicode"),
        (b'{"prompt": "\\ud800"}', "The body is not valid JSON"),
        (b'{"n": NaN}', "The body is not valid JSON"),
        (b'{"temperature": -Infinity}', "The body is not valid JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "number out of range"),
        (b"[" * 9000, "recursion limit exceeded"),
        (b'{"a":' * 1500, "recursion limit exceeded"),
        (b"\x00" * 100, "The body is not valid JSON"),
    ],
)
def test_not_json(served, body, message):
    """What cannot be parsed: deep nesting, NaN, half a surrogate pair, other encodings."""
    response = served.http(headers=JSON).post("/v1/completions", content=body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is None. Valid: a string, or a list, not empty"),
        ({"prompt": []}, "prompt", "prompt is []. Valid: a string, or a list, not empty"),
        ({"prompt": ""}, None, "The prompt is empty."),
        ({"prompt": ["x", 1]}, "prompt[1]", "prompt[1] is 1. Input should be a valid string."),
        ({"prompt": [1, -1]}, "prompt[1]", "prompt[1] is -1. Input should be greater than"),
        ({"prompt": [[1], []]}, "prompt[1]", "prompt[1] is []. List should have at least 1"),
        ({"prompt": [2**70]}, "prompt[0]", "Input should be less than or equal to 2147483647."),
        ({"prompt": [300]}, None, "Token 300 does not exist. Valid: 0 to 256."),
        ({"prompt": ["x"] * 5}, "prompt", "The request has 5 prompts. Valid: up to 4."),
        ({"n": 4}, "n", "The request has 4 choices. Valid: up to 3."),
        ({"n": True}, "n", "n is True. Input should be a valid integer."),
        ({"n": "1"}, "n", "n is '1'. Input should be a valid integer."),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0. Input should be greater than"),
        ({"max_tokens": 10**30}, "max_tokens", "less than or equal to 2147483647."),
        (
            {"prompt": "x" * 2000, "max_tokens": 49},
            "prompt",
            "The prompt has 2000 tokens and max_tokens is 49, together 2049. The context holds 2048, at "
            "least one of them generated. Try max_tokens up to 48, or a shorter prompt.",
        ),
        ({"prompt": "x" * 2048}, "prompt", "The prompt has 2048 tokens. The context holds 2048"),
        ({"temperature": 2.1}, "temperature", "temperature is 2.1. Input should be less than"),
        ({"top_p": 0}, "top_p", "top_p is 0. Input should be greater than 0."),
        ({"seed": 2**63}, "seed", "Input should be less than or equal to 9223372036854775807."),
        ({"stop": ["a"] * 5}, "stop", "List should have at most 4 items"),
        ({"stop": ""}, "stop", "stop is ''. String should have at least 1 character."),
        ({"stop": {}}, "stop", "stop: Valid: a string, or a list of up to 4 strings."),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens is 1.5. Input should be a valid integer."),
        ({"stream": "yes"}, "stream", "stream is 'yes'. Input should be a valid boolean."),
        ({"stream_options": {}}, "stream_options", "only valid with stream true."),
        ({"temprature": 1}, "temprature", "Unknown field 'temprature'. Did you mean temperature?"),
        ({"x" * 500: 1}, "x" * 80, "Unknown field 'xxx"),
        ({"echo": 0}, "echo", "echo is 0. Input should be a valid boolean."),
        ({"logprobs": 21}, "logprobs", "logprobs is 21. Input should be less than or equal to 20."),
        ({"logprobs": True}, "logprobs", "logprobs is True. Input should be a valid integer."),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "String should match pattern"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "Input should be less than or equal to 100."),
        ({"logit_bias": {"300": 1}}, "logit_bias", "has token 300. Valid tokens: 0 to 256."),
        ({"presence_penalty": 2.1}, "presence_penalty", "should be less than or equal to 2."),
        ({"repetition_penalty": 0}, "repetition_penalty", "Input should be greater than 0."),
        ({"min_p": -0.1}, "min_p", "Input should be greater than or equal to 0."),
        ({"suffix": "end"}, "suffix", "suffix is not supported. Valid: leave it out, or"),
        ({"n": 2, "best_of": 1}, "best_of", "best_of is 1. Valid: at least n, which is 2."),
        ({"best_of": 2, "stream": True}, "best_of", "Valid with stream true: n, which is 1."),
        ({"best_of": 4}, "best_of", "The request has 4 choices. Valid: up to 3."),
        ({"model": 1}, "model", "model is 1. Input should be a valid string."),
    ],
)
def test_wrong_completions(served, change, param, message):
    """The field, its value, and what is valid; nothing that is not supported is silently ignored."""
    response = served.http().post("/v1/completions", json=VALID | change)
    assert response.status_code == 400
    error = error_of(response)
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": []}, "messages", "messages is []. List should have at least 1 item"),
        ({"messages": ["x"]}, "messages[0]", "messages[0] is 'x'. Valid: a JSON object."),
        (
            {"messages": [{"role": "user"}]},
            "messages[0]",
            "messages[0]: content is required for role user.",
        ),
        (
            {"messages": [{"role": "critic", "content": "x"}]},
            "messages[0].role",
            "messages[0].role is 'critic'. Input should be 'system', 'developer', 'user', 'assistant' or",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
            "image_url is not supported. Valid: leave it out, or null.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "text": "x"}]}]},
            "messages[0].content[0].type",
            "Input should be 'text'.",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "nome": "me"}]},
            "messages[0]",
            "messages[0]: Unknown field 'nome'. Did you mean name?",
        ),
        (
            {"messages": [{"role": "assistant", "audio": {"id": "x"}}]},
            "messages[0]",
            "messages[0]: audio is not supported. Valid: leave it out, or null.",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, None, "The last message is not"),
        ({"mesages": []}, "mesages", "Unknown field 'mesages'. Did you mean messages?"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "Give one of them."),
        ({"tools": [{}]}, "tools[0].type", "tools[0].type is required."),
        ({"logprobs": 1}, "logprobs", "logprobs is 1. Input should be a valid boolean."),
        ({"top_logprobs": 3}, "top_logprobs", "Valid without logprobs true: leave it out, or 0."),
        ({"prompt": "x"}, "prompt", "Unknown field 'prompt'."),
    ],
)
def test_wrong_chats(served, change, param, message):
    """The same for conversations, down to a part of a message."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    response = served.http().post("/v1/chat/completions", json=body | change)
    assert response.status_code == 400
    error = error_of(response)
    assert message in error["message"]
    assert error["param"] == param


def test_neutral_and_ignored_fields(served):
    """Clients send them all the time: they change nothing."""
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False}
    neutral |= {"stop": [], "max_tokens": 16.0, "n": 1.0}
    ignored = {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "flex"}
    nulls = dict.fromkeys(["seed", "stream", "temperature", "suffix", "logprobs"])
    response = served.http().post("/v1/completions", json=VALID | neutral | ignored | nulls)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("tokenize", {}, "prompt", "Valid: one of prompt and messages."),
        ("tokenize", {"prompt": "x", "model": "y"}, "model", "There is no model 'y'."),
        (
            "detokenize",
            {"tokens": [300]},
            None,
            "token 300 does not exist. Valid tokens: 0 to 256.",
        ),
        ("detokenize", {"tokens": "x"}, "tokens", "Input should be a valid list."),
    ],
)
def test_wrong_texts_and_tokens(served, path, body, param, message):
    """The routes around the tokeniser refuse as the others do."""
    response = served.http().post(f"/{path}", json=body)
    assert response.status_code == (404 if param == "model" else 400)
    error = error_of(response)
    assert message in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_content_type(served, content_type):
    """Pages of another origin can send these, or none; `curl -d` without a header says that it sends a form."""
    for headers in ({"Content-Type": content_type}, {}):
        response = served.http().post("/v1/completions", content=b"{}", headers=headers)
        assert response.status_code == 415
        given = headers.get("Content-Type", "")
        assert f"{given!r}. Valid: application/json." in error_of(response)["message"]
    packed = JSON | {"Content-Encoding": "gzip"}
    response = served.http().post("/v1/completions", content=b"{}", headers=packed)
    assert response.status_code == 415
    marked = b"\xef\xbb\xbf" + json.dumps(VALID).encode()
    response = served.http(headers=JSON).post("/v1/completions", content=marked)
    assert response.status_code == 200, "a byte order mark is no mistake"


def test_body_limit(served):
    """By its declared length, or while it comes: a body is never kept beyond the limit."""
    body = json.dumps(VALID | {"user": ""}).encode()
    exact = body.replace(b'"user": ""', b'"user": "%s"' % (b"x" * (MOST_BYTES - len(body))))
    assert len(exact) == MOST_BYTES
    for content, status in ((exact, 200), (exact + b" ", 413), (b" " * 70_000, 413)):
        for sent in (content, (content[i : i + 999] for i in range(0, len(content), 999))):
            response = served.http(headers=JSON).post("/v1/completions", content=sent)
            assert response.status_code == status
            if status == 413:
                assert "larger than 10000 bytes" in error_of(response)["message"]
                assert response.headers["connection"] == "close"


def test_declared_length_is_refused_before_it_is_sent(served):
    """A client that asks first need not send gigabytes."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=LIMIT)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "9" * 12)
    connection.putheader("Expect", "100-continue")
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.load(response)["error"]["message"].startswith("The body is larger")


def test_slow_body():
    """A client that promises more than it sends does not keep its place."""
    with serving(body_seconds=0.5) as served, served.connect() as connection:
        connection.sendall(head(length=1000) + b"{")
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"The body did not arrive within 0.5 s: 1 bytes did." in answer


def test_client_leaves_its_body(served):
    """It is counted, and nothing else happens."""
    with served.connect() as connection:
        connection.sendall(head("chat/completions", 1000) + b"{")
        begun = "helix_http_requests_in_flight 2.0"  # one of them asks for this
        http = served.http()
        wait_until(lambda: begun in http.get("/metrics").text, "the request has begun")
    line = 'helix_http_requests_total{route="/v1/chat/completions",status="499"} 1.0'
    wait_until(lambda: line in http.get("/metrics").text, "the request is counted")


def test_keys():
    """Wrong, missing, in another scheme, not even text: 401; health and metrics stay open."""
    with serving(api_keys=("right", "other")) as served, served.http() as http:
        for header in ("", "Bearer", "Bearer wrong", "Basic right", "right", "Bearer r\xefght"):
            headers = {"Authorization": header.encode("latin-1")} if header else {}
            for path in ("/v1/models", f"/v1/models/{MODEL}", "/v1/completions"):
                method = "POST" if path.endswith("s") and "completions" in path else "GET"
                response = http.request(method, path, headers=headers)
                assert response.status_code == 401, (header, path)
                assert response.headers["www-authenticate"] == "Bearer"
                assert error_of(response)["code"] == "invalid_api_key"
        for path in ("/health", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200
        for key in ("right", "other"):
            assert served.openai(api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError, match=r"The API key is wrong\. Send the"):
            served.openai(api_key="wrong").completions.create(model=MODEL, prompt="x")
        assert not served.engine.submitted
    with serving(api_keys=("right",), protect_metrics=True) as served, served.http() as http:
        assert http.get("/metrics").status_code == 401
        assert http.get("/metrics", headers={"Authorization": "bearer right"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": " "}, "model_name is ' '. Valid: the name that clients ask for"),
        ({"model_name": "a\nb"}, "model_name is 'a\\nb'. Valid: the name that clients ask for"),
        ({"model_name": "\udce4"}, "model_name is '\\udce4'. Valid: the name that"),
        ({"model_name": "a/"}, "model_name is 'a/'. Valid: the name that"),
        (
            {"api_keys": ("secret key",)},
            "An API key of 10 characters is none that a client can send.",
        ),
        ({"api_keys": (",;",)}, "An API key of 2 characters"),
        ({"api_keys": ("",)}, "An API key of 0 characters"),
        ({"protect_metrics": True}, "protect_metrics asks for an API key, and there is none."),
        ({"max_body_bytes": 0}, "max_body_bytes is 0. It must be a whole number of at least 1."),
        (
            {"body_seconds": float("nan")},
            "body_seconds is nan. It must be a finite number above 0 and at most 10000000.",
        ),
        ({"body_seconds": float("inf")}, "body_seconds is inf. It must be a finite number above 0"),
        ({"send_seconds": 0}, "send_seconds is 0. It must be a finite number above 0"),
    ],
)
def test_settings(change, message):
    """The operator's mistakes, before the server starts; a key is never repeated."""
    with pytest.raises(HelixError) as error:
        ServerSettings(**({"model_name": MODEL} | change))
    assert str(error.value).startswith(message)
    assert "secret" not in str(error.value)


def test_a_mistake_of_the_server():
    """What nobody foresaw is a 500 of the same shape, its text is for the log, and it is counted."""

    class Broken(FakeTokens):
        def encode(self, text, begin=True):
            raise RuntimeError("secret")

    app = make_app(FakeEngine(), Broken(), ServerSettings(MODEL))
    sent = asyncio.run(post(app, "/v1/completions", json.dumps(VALID).encode(), strict=False))
    assert sent[0] == 500
    assert json.loads(sent[1])["error"]["type"] == "server_error"
    assert b"secret" not in sent[1]
    counted = b'helix_http_requests_total{route="/v1/completions",status="500"} 1.0'
    assert counted in app.state.service.metrics.text()


def test_metrics(served):
    """What Prometheus' own parser reads: names with units, counters that end in `_total`."""
    from prometheus_client.parser import text_string_to_metric_families

    served.openai().completions.create(model=MODEL, prompt="hello", max_tokens=7)
    served.http().get("/made/up")
    response = served.http().get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    kinds = {
        "counter": "http_requests prompt_tokens generated_tokens engine_preemptions engine_step_seconds "
        "engine_steps prefix_cache_query_tokens prefix_cache_hit_tokens",
        "gauge": "http_requests_in_flight engine_running_sequences engine_waiting_sequences cache_pages "
        "cache_pages_kept cache_pages_used cache_used_bytes",
        "histogram": "http_request_duration_seconds time_to_first_token_seconds time_per_output_token_seconds",
    }
    for kind, names in kinds.items():
        assert {families[f"helix_{name}"].type for name in names.split()} == {kind}
    routes = {sample.labels["route"] for sample in families["helix_http_requests"].samples}
    known = {"/health", "/metrics", "/v1/models", "/v1/models/{model:path}"}
    known |= {"/tokenize", "/detokenize"}
    assert routes <= known | {"/v1/completions", "/v1/chat/completions", "unknown"}
    assert families["helix_generated_tokens"].samples[0].value >= 7
