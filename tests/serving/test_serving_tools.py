"""Calls of tools, by OpenAI's own client: whole and streamed, what is no call, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import END, MODEL, FakeEngine, FakeTokens, Served, serving
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helix_megatron.errors import HelixError
from helix_megatron.inference.answers import answer_parsers
from helix_megatron.inference.tokens import HuggingFaceTokens

pytest.importorskip(
    "transformers.utils.chat_parsing", reason="early transformers 5 has no parser of calls"
)
ASK = [{"role": "user", "content": "x"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside.",
        "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"days": 2}}</tool_call>'
OTHER = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
CALLS = [("weather", {"days": 2}), ("time", {})]


class ToolTokens(FakeTokens):
    """A model that writes calls as Qwen's do."""

    def answers(self, tools):
        return answer_parsers(None, "qwen3", tools)


class Says:
    """What the model answers, whatever it is asked."""

    answer = ""

    def __call__(self, request: Any) -> Iterator[int]:
        yield from self.answer.encode()
        while True:
            yield END


SAYS = Says()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(FakeEngine(script=SAYS), tokens=ToolTokens()) as server:
        yield server


def ask(served: Served, answer: str, **options: Any) -> tuple[Any, ...]:
    """(content, reasoning, calls, finish reason) of an answer, the same whole and streamed."""
    SAYS.answer = answer
    client = served.openai()
    how: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": [TOOL]} | options
    (choice,) = client.chat.completions.create(**how).choices
    said = choice.message
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in said.tool_calls or ()]
    found = said.content or "", getattr(said, "reasoning_content", "") or "", calls
    parts, content, reasoning, ids = {}, "", "", set()
    for event in client.chat.completions.create(**how, stream=True):
        (piece,) = event.choices
        content += piece.delta.content or ""
        reasoning += getattr(piece.delta, "reasoning_content", None) or ""
        for call in piece.delta.tool_calls or ():
            parts[call.index] = call.function.name, json.loads(call.function.arguments)
            ids.add(call.id)
    assert (content, reasoning, [parts[number] for number in sorted(parts)]) == found
    assert len(ids) == len(calls)
    assert piece.finish_reason == choice.finish_reason
    return *found, choice.finish_reason


@pytest.mark.parametrize(
    ("answer", "content", "reasoning", "calls", "reason"),
    [
        ("It rains.", "It rains.", "", [], "stop"),
        (CALL, "", "", CALLS[:1], "tool_calls"),
        (f"Let me see.\n{CALL}\n{OTHER}", "Let me see.", "", CALLS, "tool_calls"),
        (f"<think>Hm.</think>{CALL}", "", "Hm.", CALLS[:1], "tool_calls"),
        ("1 < 2 <tool", "1 < 2 <tool", "", [], "stop"),
    ],
    ids=["no call", "a call", "two calls", "reasoning", "what looks like one"],
)
def test_answers(served, answer, content, reasoning, calls, reason):
    """The same whole and streamed; a stream has each call in one event."""
    assert ask(served, answer) == (content, reasoning, calls, reason)


@pytest.mark.parametrize("wrong", ['<tool_call>{"name": ', "<tool_call>no JSON</tool_call> later"])
def test_what_is_no_call_is_text(served, wrong):
    """Nothing that the model wrote is lost, and no call is made up."""
    assert ask(served, f"Now {CALL}{wrong}") == ("Now" + wrong, "", CALLS[:1], "tool_calls")
    assert ask(served, f"Now {wrong}") == (f"Now {wrong}", "", [], "stop")


def test_a_length_that_ends_a_call(served):
    """Half a call is text, and the reason is the length."""
    assert ask(served, CALL, max_tokens=20) == (CALL[:20], "", [], "length")


@pytest.mark.parametrize("cut", [True, False])
def test_arguments_that_are_cut_off_are_no_call(cut):
    """Formats without JSON could be closed anywhere: a call with fewer arguments would be another call."""
    start = "<tool_call>\n<function=weather>\n<parameter=days>\n2\n</parameter>\n"
    parser = answer_parsers(None, "qwen3_5", [TOOL])("")
    said = [parser.add(letter) for letter in f"Now {start}<parameter=pla"]
    said.append(parser.finish(cut=cut))
    content, calls = (
        "".join(part.content for part in said),
        [c for part in said for c in part.calls],
    )
    if cut:
        assert (content, calls) == (f"Now {start}<parameter=pla", [])
    else:  # a token that ends calls, and is not shown
        assert (content, [json.loads(call.arguments) for call in calls]) == ("Now", [{"days": 2}])


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_a_good_call_before_a_bad_one_is_one_however_they_come(pieces):
    """Text that was held back for a stop text comes with what follows."""
    parser, text = answer_parsers(None, "qwen3", [TOOL])(""), f"{CALL}<tool_call>no</tool_call>"
    said = [parser.add(text[at : at + pieces]) for at in range(0, len(text), pieces)]
    said.append(parser.finish())
    assert [call.name for part in said for call in part.calls] == ["weather"]
    assert "".join(part.content for part in said) == "<tool_call>no</tool_call>"


def test_one_call_only(served):
    """Without parallel calls the answer ends with the first."""
    assert ask(served, f"{CALL}{OTHER}", parallel_tool_calls=False)[2:] == (CALLS[:1], "tool_calls")


def test_a_conversation_with_calls_goes_on(served):
    """The client sends its own objects back, with the result."""
    SAYS.answer = CALL
    client = served.openai()
    how: dict[str, Any] = {"model": MODEL, "tools": [TOOL]}
    message = client.chat.completions.create(messages=ASK, **how).choices[0].message
    assert message.content is None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    SAYS.answer = "It rains."
    answer = client.chat.completions.create(messages=[*ASK, message, result], **how)
    assert answer.choices[0].message.content == "It rains."
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (
            {"tool_choice": "required"},
            "tool_choice",
            "tool_choice is not supported. Valid: leave it",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "tool_choice",
            'Valid: leave it out, or "none", "auto", null.',
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools[0].function",
            "strict is not supported. Valid: leave it out, or false, null.",
        ),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            "Valid with tools: leave",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "",
        ),
    ],
)
def test_what_is_refused(served, change, param, message):
    """By name, with what would be valid."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, "x", **change)
    assert caught.value.param == param
    assert message in caught.value.message


def test_models_that_know_no_tools():
    """Without a template that tells of tools nothing is parsed, and nothing is silently ignored."""
    with serving(FakeEngine()) as server, pytest.raises(openai.BadRequestError) as caught:
        ask(server, "x")
    assert caught.value.param == "tools"
    assert "tools cannot be used: a model of bytes has no chat template" in caught.value.message
    with pytest.raises(HelixError, match="transformers knows none for models of type llama"):
        answer_parsers(None, "llama", [TOOL])
    with pytest.raises(HelixError, match=r"response_template is wrong: .*fields"):
        answer_parsers({"version": 1}, "llama", [TOOL])


def test_the_tokenizers_own_template(tmp_path):
    """Special tokens around calls are seen by the parser, and by nobody else."""
    words = ["<|call|>", "<|/call|>", "<|end|>", '{"name":', '"f",', '"arguments":', "{}}", "Well"]
    backend = Tokenizer(models.WordLevel(dict(zip(words, range(8), strict=True)), unk_token="Well"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|call|>", "<|/call|>"]})
    made.chat_template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}>"
    made.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": ">",
        "fields": {
            "tool_calls": {
                "open": "<|call|>",
                "close": "<|/call|>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }
    made.save_pretrained(tmp_path)
    tokens = HuggingFaceTokens(tmp_path)
    try:
        tools = [{"type": "function", "function": {"name": "f"}}]
        prompt = tokens.chat_text(ASK, tools)
        assert prompt == "[f]>"
        ids = [7, 0, 3, 4, 5, 6, 1]
        parser, stream = tokens.answers(tools)(prompt), tokens.decoder(special=True)
        said = [parser.add(stream.add([token])) for token in ids] + [parser.finish()]
        assert [call.name for part in said for call in part.calls] == ["f"]
        assert "".join(part.content for part in said).strip() == "Well"
        plain = tokens.decoder()
        assert "call" not in plain.add(ids) + plain.finish()
    finally:
        tokens.close()
