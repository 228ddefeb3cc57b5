"""The usual calls of a client of OpenAI's API. It needs the client, and nothing of this package.

    python tests/serving/client_calls.py openai|langchain|litellm http://127.0.0.1:8000/v1 MODEL KEY

The model has a chat template. The names of the calls that went well are printed; another ends the program.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hello."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOKENS = 6
WRONG = "another-model"


def said(name: str) -> None:
    print(name, flush=True)


def refused(
    kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any]
) -> Exception:
    """The exception of a call that must fail in this way."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind} was not raised")


def calls_of_openai(url: str, model: str, key: str) -> None:
    import openai

    def client(**options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": url, "api_key": key, "max_retries": 0} | options)

    ask = client()
    assert [one.id for one in ask.models.list()] == [model]
    assert ask.models.retrieve(model).id == model
    said("models")
    whole = ask.completions.create(model=model, prompt="Hello", max_tokens=TOKENS, temperature=0)
    assert whole.usage.completion_tokens <= TOKENS
    chunks = ask.completions.create(
        model=model, prompt="Hello", max_tokens=TOKENS, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    said("completions")
    chat = {"model": model, "messages": ASK, "temperature": 0, "max_tokens": TOKENS}
    answer = ask.chat.completions.create(**chat)
    message = answer.choices[0].message
    assert message.role == "assistant" and answer.usage.total_tokens > 0
    *chunks, last = ask.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == message.content
    assert last.usage.completion_tokens == answer.usage.completion_tokens
    said("chat")
    turns = [*ASK, message, {"role": "user", "content": [{"type": "text", "text": "Again."}]}]
    ask.chat.completions.create(**chat | {"messages": turns}, tools=[TOOL], tool_choice="none")
    said("a conversation that goes on, tools that are not used")
    error = refused(
        openai.BadRequestError, lambda: ask.chat.completions.create(**chat, tools=[TOOL])
    )
    assert error.param == "tools"  # type: ignore[attr-defined]
    refused(openai.NotFoundError, lambda: ask.chat.completions.create(**chat | {"model": WRONG}))
    refused(
        openai.BadRequestError, lambda: ask.chat.completions.create(**chat | {"temperature": 3})
    )
    refused(openai.AuthenticationError, client(api_key="wrong").models.list)
    said("errors")

    async def two() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as other:
            return await asyncio.gather(*(other.chat.completions.create(**chat) for _ in range(2)))

    assert [one.choices[0].message.content for one in asyncio.run(two())] == [message.content] * 2
    said("asynchronous")


def calls_of_langchain(url: str, model: str, key: str) -> None:
    import openai
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI

    common = {"base_url": url, "api_key": key, "temperature": 0, "max_retries": 0}

    def chat(**options: Any) -> ChatOpenAI:
        return ChatOpenAI(**common | {"model": model, "max_tokens": TOKENS} | options)

    ask = [SystemMessage("Be brief."), HumanMessage("Say hello.")]
    answer = chat().invoke(ask)
    assert isinstance(answer, AIMessage) and answer.usage_metadata["output_tokens"] <= TOKENS
    said("invoke")
    pieces = list(chat(stream_usage=True).stream(ask))
    assert "".join(piece.content for piece in pieces) == answer.content
    assert [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    said("stream")
    assert chat().batch([ask, ask]) and asyncio.run(chat().ainvoke(ask)).content == answer.content
    said("batch, ainvoke")
    chat().invoke([*ask, answer, HumanMessage([{"type": "text", "text": "Again."}])], stop=["\n\n"])
    said("a conversation that goes on, stop")
    chat().bind_tools([TOOL], tool_choice="none").invoke(ask)
    refused(openai.BadRequestError, lambda: chat().bind_tools([TOOL]).invoke(ask))
    said("tools")
    refused(openai.NotFoundError, lambda: chat(model=WRONG).invoke(ask))
    refused(openai.AuthenticationError, lambda: chat(api_key="wrong").invoke(ask))
    said("errors")
    plain = OpenAI(**common, model=model, max_tokens=TOKENS)
    assert plain.invoke("Hello") == "".join(plain.stream("Hello"))
    assert len(plain.generate(["Hello", "World"]).generations) == 2
    said("completions")


def calls_of_litellm(url: str, model: str, key: str) -> None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = (
        "True"  # otherwise it asks a server when it is imported
    )
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    place = {"api_base": url, "api_key": key, "num_retries": 0}
    chat = place | {"messages": ASK, "temperature": 0, "max_tokens": TOKENS}
    for provider in ("openai", "hosted_vllm"):
        name = f"{provider}/{model}"
        answer = litellm.completion(model=name, **chat)
        text = answer.choices[0].message.content
        assert answer.usage.completion_tokens <= TOKENS
        chunks = litellm.completion(
            model=name, **chat, stream=True, stream_options={"include_usage": True}
        )
        assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == text
        turns = [
            *ASK,
            answer.choices[0].message.model_dump(),
            {"role": "user", "content": "Again."},
        ]
        litellm.completion(
            model=name, **chat | {"messages": turns}, user="me", seed=1, stop=["\n\n"]
        )
        said(f"completion, stream, a conversation that goes on ({provider})")
    name = f"openai/{model}"
    answered = asyncio.run(litellm.acompletion(model=name, **chat))
    assert answered.choices[0].message.content == text
    said("acompletion")
    litellm.completion(model=name, **chat, tools=[TOOL], tool_choice="none")
    refused(litellm.BadRequestError, lambda: litellm.completion(model=name, **chat, tools=[TOOL]))
    said("tools")
    refused(litellm.NotFoundError, lambda: litellm.completion(model=f"openai/{WRONG}", **chat))
    refused(
        litellm.AuthenticationError,
        lambda: litellm.completion(model=name, **chat | {"api_key": "no"}),
    )
    said("errors")
    plain = litellm.text_completion(
        model=f"text-completion-openai/{model}", prompt="Hello", max_tokens=TOKENS, **place
    )
    assert plain.choices[0].text is not None
    said("text_completion")
    found = litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_base=url, api_key=key
    )
    assert [one.removeprefix("openai/") for one in found] == [model], found
    said("models")


CALLS = {"openai": calls_of_openai, "langchain": calls_of_langchain, "litellm": calls_of_litellm}

if __name__ == "__main__":
    CALLS[sys.argv[1]](*sys.argv[2:])
