"""Text to tokens and back: Hugging Face tokenizers, tokenizer.json files, and bytes.

Nothing is fetched from the network and no code that lies beside a tokenizer is run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.foreign import check_files, read_json
from helix_megatron.checkpoint.source import SIDECARS
from helix_megatron.data.text import EOD_NAMES, is_fault, read_tokenizer_file
from helix_megatron.errors import HelixError, listed
from helix_megatron.inference.answers import AnswerParser, Tool, answer_parsers
from helix_megatron.inference.arguments import InferenceConfig
from helix_megatron.inference.request import TextStream, Tokens
from helix_megatron.inference.templates import ChatTemplate
from helix_megatron.inference.token_streams import (
    BYTES,
    UNKNOWN,
    ByteStream,
    NumberStream,
    TokenStream,
)

# Any of them means that a directory has a tokenizer.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
TOKENIZER = "tokenizer.json"
READ_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # of what transformers opens
GIVE = (
    "Give --tokenizer DIR with the files of a Hugging Face tokenizer, or --tokenizer tokenizer.json, or "
    "--tokenizer byte"
)


def open_tokens(
    config: InferenceConfig,
    note: Callable[[str], None] = lambda text: None,
    *,
    needed: bool = True,
) -> Tokens:
    """The tokenizer that `--tokenizer` names, else the one that lies with the checkpoint.

    Args:
        note: told what was chosen where the flag does not say it.
        needed: whether there is text to be turned into tokens. If not, and there is no tokenizer, tokens are
            written as their numbers.

    Raises:
        HelixError: no tokenizer, or one that cannot be read or is of another model.
    """
    vocabulary, load = config.vocab_size, Path(config.load_path)
    if config.tokenizer == "byte":
        return ByteTokens(vocabulary)
    if config.tokenizer is not None:
        tokens = _at(Path(config.tokenizer), load)
        if tokens.vocab_size > vocabulary:
            raise HelixError(
                f"{config.tokenizer} has {tokens.vocab_size} tokens, and the model knows {vocabulary}. It is "
                "another model's tokenizer."
            )
        return tokens
    for folder in (load, load / SIDECARS):
        if any((folder / name).is_file() for name in FILES):
            return _at(folder, folder)
    if vocabulary in (BYTES, BYTES + 1) and config.load_kind != "huggingface":
        end = "" if vocabulary == BYTES else f", token {BYTES} ends a document"
        note(f"The model has {vocabulary} tokens and no tokenizer: every byte is a token{end}.")
        return ByteTokens(vocabulary)
    if not needed:
        note("The model has no tokenizer: tokens are written as their numbers.")
        return NumberTokens(vocabulary, configured_stops(load) | configured_stops(load / SIDECARS))
    raise HelixError(
        f"no tokenizer lies with {load}, and its model has {vocabulary} tokens. {GIVE} if every byte is a "
        "token."
    )


def _at(path: Path, model: Path) -> Tokens:
    """A tokenizer by its file or directory; `model` is the directory with the model's configuration."""
    if path.is_file():
        return FileTokens(path)
    if not path.is_dir():
        raise HelixError(f"--tokenizer {path} does not exist. {GIVE}.")
    if not any((path / name).is_file() for name in FILES):
        raise HelixError(f"{path} has no tokenizer ({listed(FILES)}). {GIVE}.")
    if (path / TOKENIZER).is_file() and not (path / "tokenizer_config.json").is_file():
        return FileTokens(path / TOKENIZER, configured_stops(path) | configured_stops(model))
    return HuggingFaceTokens(path, configured_stops(model), model)


class _Tokens:
    """What tokenizers have in common. `owner` names them in errors."""

    owner: str
    vocab_size: int
    stop_tokens: frozenset[int]
    _encode: Callable[[str, bool], list[int]]
    _decode: Callable[[list[int]], str]
    _name_of: Callable[[int], str | None]
    _anchor: list[int] | None = None
    _front: Sequence[int] = ()
    _template: ChatTemplate | None = None
    # With the text of special tokens that do not end a text, where that is another.
    _decode_special: Callable[[list[int]], str] | None = None
    response_template: Any = None
    model_type: str | None = None

    def encode(self, text: str, begin: bool = True) -> list[int]:
        _utf8(text)
        return [*(self._front if begin else ()), *self._encode(text, False)]

    def token_text(self, token: int) -> tuple[str, bytes | None]:
        # Behind another token, since some decoders take the space in front of a text away.
        if self._anchor is None:
            self._anchor = self._encode("a", False)
        start = len(self._decode(self._anchor))
        text = self._decode([*self._anchor, token])[start:]
        if text and UNKNOWN not in text:
            return text, text.encode(errors="replace")
        name = self._name_of(token) or ""
        data = raw_bytes(name) if text else None
        return (name, None) if data is None else (_as_bytes(data), data)

    def chat_text(self, messages: Sequence[dict[str, Any]], tools: Sequence[Tool] = ()) -> str:
        if self._template is None:
            raise HelixError(
                f"{self.owner} has no chat template, so a conversation cannot be turned into tokens. Send a "
                "plain prompt, or give --tokenizer DIR with a tokenizer that has a template "
                "(tokenizer_config.json or chat_template.jinja)."
            )
        return self._template.render(messages, tools)

    def answers(self, tools: Sequence[Tool]) -> Callable[[str], AnswerParser]:
        if self._template is None or not self._template.takes_tools:
            raise HelixError(
                f"{self.owner} has no chat template that tells a model of tools. Leave tools out, or have "
                "tool_choice none."
            )
        return answer_parsers(self.response_template, self.model_type, tools)

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    def decoder(self, after: Sequence[int] = (), special: bool = False) -> TextStream:
        decode = self._decode_special if special and self._decode_special else self._decode
        return TokenStream(decode, after, self.stop_tokens)


class ByteTokens(_Tokens):
    """Every byte of a text in UTF-8 is a token. With more than 256 of them, 256 ends a document.

    So it is for models that the training script trains without a tokenizer, and on Megatron's files of bytes.

    Raises:
        HelixError: the model has fewer tokens than there are bytes.
    """

    owner = "a model of bytes"

    def __init__(self, vocab_size: int = BYTES) -> None:
        if vocab_size < BYTES:
            raise HelixError(
                f"--tokenizer byte has {BYTES} tokens, and the model knows {vocab_size}. {GIVE} of a model of "
                "bytes."
            )
        self.vocab_size = min(vocab_size, BYTES + 1)
        self.stop_tokens = frozenset(range(BYTES, self.vocab_size))

    def encode(self, text: str, begin: bool = True) -> list[int]:
        # What a shell could not decode comes as lone surrogates, which stand for the bytes themselves.
        return list(_utf8(text, "surrogateescape"))

    def token_text(self, token: int) -> tuple[str, bytes | None]:
        data = bytes([token] if token < BYTES else [])
        return (data.decode() if token < BYTES // 2 else _as_bytes(data)), data

    def decoder(self, after: Sequence[int] = (), special: bool = False) -> TextStream:
        return ByteStream()


class NumberTokens(_Tokens):
    """The tokens of a model without a tokenizer: their text is their numbers, and no text can be encoded."""

    owner = "a model without a tokenizer"

    def __init__(self, vocab_size: int, stop_tokens: Collection[int] = ()) -> None:
        self.vocab_size, self.stop_tokens = vocab_size, frozenset(stop_tokens)

    def encode(self, text: str, begin: bool = True) -> list[int]:
        raise HelixError(f"the model has no tokenizer, so text has no tokens. {GIVE}.")

    def decoder(self, after: Sequence[int] = (), special: bool = False) -> TextStream:
        return NumberStream(self.stop_tokens)


class FileTokens(_Tokens):
    """A `tokenizer.json` of the `tokenizers` library, with the special tokens in front that it asks for.

    Args:
        stop_tokens: the tokens that end a text; without any, one that is known by a usual name.

    Raises:
        HelixError: no tokenizer, or the library is not installed.
    """

    owner = "a tokenizer.json alone"

    def __init__(self, path: Path, stop_tokens: Collection[int] = ()) -> None:
        self._backend, vocabulary = read_tokenizer_file(str(path), "--tokenizer byte")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        by_name = [vocabulary[name] for name in EOD_NAMES if name in vocabulary]
        self.stop_tokens = frozenset(stop_tokens or by_name[:1])
        self._decode = self._backend.decode
        self._name_of = self._backend.id_to_token
        self._front = front(self._encode)

    def _encode(self, text: str, special: bool) -> list[int]:
        # In batches of one: `encode` would keep all other threads waiting.
        return self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids


class HuggingFaceTokens(_Tokens):
    """A tokenizer that `transformers.AutoTokenizer` reads.

    Args:
        stop_tokens: the tokens that end a text, besides the tokenizer's own.
        model: the directory with the model's configuration.

    Raises:
        HelixError: it cannot be read, or needs code of its own.
    """

    def __init__(
        self, directory: Path, stop_tokens: Collection[int] = (), model: Path | None = None
    ) -> None:
        self.owner = str(directory)
        if model is not None and (model / "config.json").is_file():
            self.model_type = read_json(model / "config.json").get("model_type")
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise HelixError(
                f"{directory} needs the package transformers, which is not installed. Try pip install "
                "transformers, or give --tokenizer tokenizer.json."
            ) from error
        check_files(path for path in directory.iterdir() if path.suffix in READ_SUFFIXES)
        try:
            with _offline():
                self._tokenizer: Any = AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
            self._take_up(stop_tokens)
        except HelixError:
            raise
        except BaseException as error:  # from a file that is missing to code that it would run
            if not is_fault(error):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise HelixError(
                f"the tokenizer in {directory} cannot be read: {reason[0]:.500}. If it is incomplete, copy it "
                f"again from where it came. {GIVE}."
            ) from error

    def _take_up(self, stop_tokens: Collection[int]) -> None:
        """Ask it for all that is needed later, so that a tokenizer of wrong values is found at once."""
        vocabulary = self._tokenizer.get_vocab()
        self._name_of = self._tokenizer.convert_ids_to_tokens
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        own = self._tokenizer.eos_token_id
        self.stop_tokens = frozenset(stop_tokens) | ({own} if own is not None else set())
        self._front = front(self._encode)
        if self._tokenizer.chat_template:
            self._template = self._chat_template()
        self.response_template = getattr(self._tokenizer, "response_template", None)

    def _chat_template(self) -> ChatTemplate | None:
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError:  # several templates, and none for plain conversations
            return None
        return ChatTemplate(template, self._tokenizer.special_tokens_map)

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

    def _decode_special(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    def _decode(self, tokens: list[int]) -> str:
        # "Cleaning up" takes spaces away that were there, depending on what follows them.
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def front(encode: Callable[[str, bool], list[int]]) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text; not those at the end, which would end it."""
    plain, whole = encode("a", False), encode("a", True)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    return []


def configured_stops(directory: Path) -> frozenset[int]:
    """`eos_token_id` of generation_config.json and config.json: a number, a list of them, or nothing."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not (directory / name).is_file():
            continue
        value = read_json(directory / name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        found |= {one for one in values if isinstance(one, int) and not isinstance(one, bool)}
    return frozenset(found)


def raw_bytes(name: str) -> bytes | None:
    """The bytes of a token that is a part of a character, by its name in the vocabulary.

    Such tokens are called `<0xE2>`, or have a printable character for each byte, as GPT-2 has them. None for
    others.
    """
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
        return bytes([int(name[3:5], 16)])
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(BYTES + place): byte for place, byte in enumerate(others)}
    return bytes(byte_of[c] for c in name) if all(c in byte_of for c in name) else None


def _as_bytes(data: bytes) -> str:
    """What stands for bytes that are no text."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) if data else ""


def _utf8(text: str, errors: str = "strict") -> bytes:
    try:
        return text.encode(errors=errors)
    except UnicodeEncodeError as error:
        raise HelixError(
            f"character {error.start} of the text is half of a surrogate pair ({text[error.start]!r}), which "
            "is no text by itself. Send the whole pair, or UTF-8."
        ) from error


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Inside the block the Hugging Face libraries ask no server, not even whether there is a newer file."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
