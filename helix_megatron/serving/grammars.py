"""`response_format`: which tokens may come next so that a text is JSON of a schema, by llguidance."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from helix_megatron import versions
from helix_megatron.errors import HelixError
from helix_megatron.inference.request import Constraint, Tokens

# A model that may write spaces for ever does, if it is a weak one.
LAYOUT = {"whitespace_pattern": r"[ \n]{0,20}"}


class Grammars:
    """Turns JSON schemas into constraints of a model's tokens.

    Args:
        tokens: of the model.
        vocab_size: how many logits the model gives.
    """

    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        self._tokens, self._size = tokens, vocab_size

    def constraint(self, schema: dict[str, Any]) -> Callable[[], Constraint]:
        """What makes a constraint for each text that is to be JSON of a schema.

        The first call looks at every token: seconds for a large vocabulary.

        Raises:
            HelixError: the schema is none, or uses what llguidance cannot do; or llguidance is not installed.
        """
        library, tokenizer = self._library, self._tokenizer
        with refused("the schema of response_format cannot be used"):
            grammar = library.LLMatcher.grammar_from_json_schema(json.dumps(schema), LAYOUT)
            problem = library.LLMatcher.validate_grammar(grammar, tokenizer)
            if problem:
                raise ValueError(problem)
        return partial(JsonConstraint, library, tokenizer, grammar)

    @cached_property
    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise HelixError(
                "response_format needs llguidance, which this server has not. Leave it out; or its operator "
                "may install it: pip install 'helix_megatron[json]'."
            ) from error
        versions.require("llguidance")
        return llguidance

    @cached_property
    def _tokenizer(self) -> Any:
        return self._library.LLTokenizer(
            self._library.TokenizerWrapper(_Vocabulary(self._tokens, self._size))
        )


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Inside the block what llguidance refuses, or fails at, is a `HelixError`."""
    try:
        yield
    except BaseException as error:
        # A panic of a Rust library derives from BaseException, so that nobody takes it for an ordinary one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise HelixError(
            f"{what}: {lines[0]:.300}. Valid: JSON Schema as llguidance takes it."
        ) from error


class _Vocabulary:
    """The bytes of all tokens, as `llguidance.TokenizerWrapper` asks for them."""

    bos_token_id = None

    def __init__(self, tokens: Tokens, size: int) -> None:
        self._tokens = tokens
        texts = [tokens.token_text(token) for token in range(size)]
        self.special_token_ids = [
            token
            for token, (_, data) in enumerate(texts)
            if data is None or token in tokens.stop_tokens
        ]
        self.tokens = [name.encode() if data is None else data for name, data in texts]
        # Of several tokens that end a text one is enough; a model without any gets one that it never says.
        self.eos_token_id = min(tokens.stop_tokens, default=size)
        if not tokens.stop_tokens:
            self.special_token_ids.append(size)
            self.tokens.append(b"<end>")

    def __call__(self, text: bytes) -> Sequence[int]:
        return self._tokens.encode(bytes(text).decode(errors="replace"), begin=False)


class JsonConstraint:
    """A text that is JSON of a schema: see `helix_megatron.inference.request.Constraint`."""

    def __init__(self, library: Any, tokenizer: Any, grammar: str) -> None:
        self._matcher = library.LLMatcher(tokenizer, grammar)
        self._end = tokenizer.eos_token

    def allowed(self, size: int) -> np.ndarray:
        with refused("the text cannot go on as JSON of its schema"):
            found = self._bits()[:size]
            if not found.any():
                raise ValueError("no token of the model continues it")
            return found

    def accept(self, token: int) -> bool:
        with refused("the text is no JSON of its schema"):
            if not self._matcher.consume_token(token):
                raise ValueError(self._matcher.get_error())
            if self._matcher.is_stopped():
                return True
            others = self._bits()
            others[self._end] = False
            return not others.any()

    def _bits(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(mask, bitorder="little").astype(bool)
