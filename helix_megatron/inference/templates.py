"""A chat template is a program of whoever made the model: it runs in a process of its own, within limits.

    template = ChatTemplate(text, {"bos_token": "<s>"})
    template.render([{"role": "user", "content": "Hello"}])

The process is started by the first conversation and serves all that follow; after a limit there is a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.inference.request import TemplateLimitError

SECONDS = 5.0  # of a processor; templates take milliseconds
MEMORY_BYTES = 2**30
MOST_CHARACTERS = 2**26
LIMIT = (
    f"the model's chat template did not end within {SECONDS:g} s, {MEMORY_BYTES >> 30} GiB and "
    f"{MOST_CHARACTERS:,} characters. Try a shorter conversation; where short ones fail, too, it is wrong."
)


class ChatTemplate:
    """Turns conversations into text, one at a time, from any thread.

    Args:
        template: in Jinja, as Hugging Face tokenizers have it.
        special_tokens: their names and texts, which templates refer to.
        seconds: of a processor, for one conversation.
    """

    def __init__(
        self, template: str, special_tokens: Mapping[str, Any], seconds: float = SECONDS
    ) -> None:
        self._job = {"template": template, "special_tokens": special_tokens, "seconds": seconds}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def takes_tools(self) -> bool:
        """Whether it looks at tools."""
        return "tools" in str(self._job["template"])

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The text of a conversation, up to where the assistant's answer begins.

        Args:
            tools: functions that the model may call, as OpenAI's API describes them.

        Raises:
            HelixError: the template refuses these messages.
            TemplateLimitError: it takes too much time or memory, or makes too long a text.
        """
        with self._lock:
            if self._process is None:
                self._process = self._start()
            question = {"messages": list(messages), "tools": list(tools) or None}
            answer = _ask(self._process, question)
            if answer is None:
                self._end()
                raise TemplateLimitError(LIMIT)
        if "error" in answer:
            raise HelixError(
                f"the model's chat template refuses these messages: {answer['error']}. Most want roles user "
                "and assistant in turns, and some no role system."
            )
        return str(answer["text"])

    def close(self) -> None:
        """End the process, also while it works for another thread."""
        if (process := self._process) is not None:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "helix_megatron.inference.templates"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # what a terminal or a launcher signals is not meant for it
        )
        if _ask(process, self._job) is None:
            process.kill()
            raise HelixError(
                "the process for the model's chat template did not start; its log says why."
            )
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _ask(process: subprocess.Popen[bytes], question: Any) -> dict[str, Any] | None:
    """The answer of the process; None if it died of the question."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(question, default=str).encode() + b"\n")
        process.stdin.flush()
        if (line := process.stdout.readline()).endswith(b"\n"):
            return dict(json.loads(line))
    return None


def _main() -> None:
    """The process: it ends when nobody asks any more, or at a limit."""
    import psutil
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    job = json.loads(sys.stdin.buffer.readline())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answer: dict[str, str] = {}
    while True:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        # Its signal ends the process, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])
        try:
            asked = json.loads(line)
            text = tokenizer.apply_chat_template(
                asked["messages"],
                tools=asked["tools"],
                chat_template=job["template"],
                tokenize=False,
                add_generation_prompt=True,
                **job["special_tokens"],
            )
            answer = {"text": str(text)}
        except MemoryError:
            return
        except Exception as error:  # a template is a program: it fails in every way
            answer = {"error": str(error)[:1000]}
        if len(answer.get("text", "")) > MOST_CHARACTERS:
            return
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    _main()
