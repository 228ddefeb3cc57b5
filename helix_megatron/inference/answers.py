"""Answers of models that may call tools: what they say, what they think, and which tools they call.

Models write calls in formats of their own. The parser is that of `transformers`, told of the format by the
`response_template` of the model's tokenizer, or by what the library knows of the type of the model.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from helix_megatron.errors import HelixError

Tool = Mapping[str, Any]
"""A function as OpenAI's API and chat templates describe it."""

CONTENT, CALLS = "content", "tool_calls"
REASONING = ("reasoning_content", "thinking")
NEEDS = "Try pip install 'transformers>=5.18'."


@dataclass(frozen=True)
class Call:
    """A call of a tool. `arguments` are JSON, as the model wrote them."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Said:
    """A part of an answer."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


def whole(parts: Sequence[Said]) -> Said:
    """Join several parts of an answer, in their order."""
    return Said(
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.calls),
    )


class AnswerParser:
    """It takes an answer apart while it comes. What turns out to be no call is content, as it was written.

    Args:
        parser: a `ResponseParser` of `transformers`, which has seen the prompt.
        ends: the texts that end a call.
    """

    def __init__(self, parser: Any, ends: Sequence[str] = ()) -> None:
        self._parser, self._ends = parser, ends
        self._end = re.compile("|".join(map(re.escape, ends))) if ends else None
        self._longest = max(map(len, ends), default=0)
        self._raw = ""  # the answer as it was written
        self._seen = self._sure = (
            0  # characters of it that events had, and that are given or were a call
        )
        self._failed = False

    def add(self, text: str) -> Said:
        """Return what the text adds to the answer, as far as it is certain, however the answer is cut."""
        back = self._raw[len(self._raw) - min(self._longest, len(self._raw)) :]
        ends = self._end.finditer(back + text) if self._end else ()
        cuts = [cut for end in ends if (cut := end.end() - len(back)) > 0]
        return whole([self._add(text[a:b]) for a, b in itertools.pairwise((0, *cuts, len(text)))])

    def _add(self, text: str) -> Said:
        if self._failed:
            return Said(text)
        self._raw += text
        return self._said(lambda: self._parser.feed(text))

    def finish(self, *, cut: bool = False) -> Said:
        """Return what was held back.

        Args:
            cut: a length or a stop text ended the answer, not the model: a call that is open then is none.
        """
        return Said() if self._failed else self._said(lambda: self._rest(cut))

    def _rest(self, cut: bool) -> Sequence[Mapping[str, Any]]:
        events = self._parser.finalize()[1]
        if cut and any(e["type"] == "region_close" and e["field"] == CALLS for e in events):
            raise ValueError("the call is not whole")
        return events

    def _said(self, parse: Callable[[], Sequence[Mapping[str, Any]]]) -> Said:
        try:
            events = parse()
            said = whole([_of_event(event) for event in events])
        except Exception:  # a call that is no JSON, or was cut off: whatever a model may write
            self._failed = True
            return Said(self._raw[self._sure :])
        for event in events:
            if event["type"] == "region_chunk":
                found = self._raw.find(event["text"], self._seen)
                self._seen = max(self._seen, found + len(event["text"]))
            if event["type"] == "region_close" and event["field"] == CALLS:
                behind = (end for end in self._ends if self._raw.startswith(end, self._seen))
                self._seen += len(next(behind, ""))
            if event["type"] == "region_close" or event["field"] != CALLS:
                self._sure = self._seen
        return said


def _of_event(event: Mapping[str, Any]) -> Said:
    kind, field = event["type"], event["field"]
    if kind == "region_chunk" and field == CONTENT:
        return Said(event["text"])
    if kind == "region_chunk" and field in REASONING:
        return Said(reasoning=event["text"])
    if kind != "region_close" or field != CALLS:
        return Said()
    value = event["value"]
    return Said(calls=tuple(map(_call, value if isinstance(value, list) else [value])))


def _call(value: Mapping[str, Any]) -> Call:
    function = value["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(str(function["name"]), arguments)


def answer_parsers(
    template: Mapping[str, Any] | None, model_type: str | None, tools: Sequence[Tool]
) -> Callable[[str], AnswerParser]:
    """What makes a parser of an answer to a prompt.

    Args:
        template: the tokenizer's `response_template`; None where it has none.
        model_type: of the model's configuration, for which the library may know one.
        tools: that the model is told of.

    Raises:
        HelixError: the format of the model's calls is not known, or the installed transformers has no parser.
    """
    try:
        from transformers.utils.chat_parsing import ResponseParser
    except ImportError as error:
        raise HelixError(
            f"the installed transformers does not parse calls of tools. {NEEDS}"
        ) from error
    found: Any = template or _known_template(model_type)
    if found is None:
        raise HelixError(
            "it is not known how this model writes calls of tools: its tokenizer has no response_template, and "
            f"transformers knows none for models of type {model_type}. Leave tools out, or have tool_choice "
            "none."
        )
    try:
        ResponseParser(found, prefix="")
    except Exception as error:  # a template that is none
        raise HelixError(f"the tokenizer's response_template is wrong: {error!s:.300}") from error
    ends = found["fields"].get(CALLS, {}).get("close", ())
    return lambda prompt: AnswerParser(
        ResponseParser(found, prefix=prompt, tools=[dict(tool) for tool in tools]),
        (ends,) if isinstance(ends, str) else ends,
    )


def _known_template(model_type: str | None) -> Any:
    """What the library's own server uses for models of a type; None if it knows none."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return None
    model: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    return get_response_template(SimpleNamespace(), model)
