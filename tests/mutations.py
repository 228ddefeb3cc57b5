"""Mutations of valid files: hypothesis strategies that know what a file of each kind is made of."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import pickletools
import struct
import zipfile
from typing import Any

from hypothesis import strategies as st

Mutated = st.SearchStrategy[bytes]
DIGITS = "#digits"  # stands for a number that is too long for Python to write

NUMBERS = (
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        2.0,
        0.5,
        -0.0,
        1e308,
        -1e308,
        5e-324,
        10**6,
        10**9,
        10**12,
        10**18,
        10**30,
    ),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**300),
    *(float("nan"), float("inf"), -float("inf")),
)
TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../x",
        "/",
        "/etc/passwd",
        "a/b",
        "a\0b",
        "\ud800",
        "é",
        "😀",
        "\u202e",
        "-",
        "2",
    ),
    *(
        "1e3",
        "nan",
        "None",
        "true",
        "[bold]",
        "{}",
        "%s%n",
        "\n",
        "x" * 300,
        "x" * 100_000,
        DIGITS,
        "~",
        "C:\\x",
    ),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)


def nested(depth: int) -> Any:
    """Lists inside each other."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.text(max_size=4), SCALARS, max_size=3),
    st.sampled_from([90, 150, 500]).map(nested),
    st.sampled_from([[0] * 10_000, {str(i): i for i in range(1000)}]),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside of a JSON value."""
    found = []
    todo = [value]
    while todo:
        one = todo.pop()
        keys = (
            list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        )
        for key in keys:
            found.append((one, key))
            todo.append(one[key])
    return found


@st.composite
def edited(draw: Any, document: Any) -> Any:
    """A JSON value with a few things in it changed, removed, renamed or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        there = places(document)
        if not there:
            return draw(VALUES)
        container, key = there[draw(st.integers(0, len(there) - 1))]
        kind = draw(
            st.sampled_from(("value", "value", "value", "gone", "name", "swap", "wrapped", "near"))
        )
        if kind == "value":
            container[key] = copy.deepcopy(draw(VALUES))
        elif kind == "gone":
            del container[key]
        elif kind == "name" and isinstance(container, dict):
            container[draw(st.sampled_from(TEXTS))] = container.pop(key)
        elif kind == "swap":
            other, place = there[draw(st.integers(0, len(there) - 1))]
            container[key], other[place] = (
                copy.deepcopy(other[place]),
                copy.deepcopy(container[key]),
            )
        elif kind == "wrapped":
            container[key] = [container[key]] if draw(st.booleans()) else {"": container[key]}
        elif isinstance(container[key], int | float):
            container[key] = draw(near(container[key]))
        elif isinstance(container[key], list):
            container[key] = container[key] * draw(st.sampled_from((0, 2, 1000)))
        else:
            container[key] = str(container[key]) + draw(st.sampled_from(TEXTS))
    return document


def near(number: float) -> st.SearchStrategy[Any]:
    """What is written in place of a number by mistake."""
    some = (number + 1, number - 1, -number, 2 * number, number * 10**6, str(number), [number])
    return st.sampled_from((*some, float(min(number, 10**300)), number // 1))


def as_text(value: Any) -> bytes:
    """JSON of a value, with NaN and integers of any length, as its readers may meet it."""
    text = json.dumps(value).replace(f'"{DIGITS}"', "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def broken(draw: Any, content: bytes) -> bytes:
    """Bytes that were cut, changed, repeated or encoded in another way."""
    if not content:
        return draw(st.binary(max_size=64))
    at = draw(st.integers(0, len(content)))
    end = draw(st.integers(at, len(content)))
    put = draw(st.binary(min_size=1, max_size=16))
    times = draw(st.sampled_from((0, 2, 50)))
    mark = draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"[" * 100_000)))
    coding = draw(st.sampled_from(("utf-16", "utf-32", "utf-8")))
    other = (b"", b"\0" * 4096, b"{" * 50_000, b'{"a":' * 50_000, b"9" * 5000)
    kinds = (
        content[:at],
        content[:at] + put + content[at:],
        content[:at] + put + content[at + len(put) :],
        content[:at] + content[at:end] * times + content[end:],
        mark + content,
        content.decode("latin-1").encode(coding),
        draw(st.one_of(st.sampled_from(other), st.binary(max_size=256))),
    )
    return draw(st.sampled_from(kinds))


def mutated_json(content: bytes) -> Mutated:
    """Of a JSON file."""
    document = json.loads(content)

    def doubled(pair: tuple[bytes, Any]) -> bytes:
        """A key once more."""
        text, value = pair
        name = next(iter(document), "a") if isinstance(document, dict) else "a"
        return text[:1] + as_text(name) + b":" + as_text(value) + b"," + text[1:]

    edits = edited(document).map(as_text)
    return st.one_of(edits, edits, edits, broken(content), st.tuples(edits, SCALARS).map(doubled))


def mutated_lines(content: bytes) -> Mutated:
    """Of a file of JSON lines."""
    lines = content.splitlines()

    @st.composite
    def strategy(draw: Any) -> bytes:
        at = draw(st.integers(0, len(lines) - 1))
        changed = [*lines[:at], draw(mutated_json(lines[at])), *lines[at + 1 :]]
        return b"\n".join(changed) + draw(st.sampled_from((b"\n", b"")))

    return st.one_of(strategy(), broken(content))


def mutated_text(content: bytes) -> Mutated:
    """Of a file of one line, such as a pointer."""
    texts = st.one_of(
        st.sampled_from(TEXTS), st.sampled_from(NUMBERS).map(str), st.text(max_size=20)
    )
    return st.one_of(texts.map(lambda text: text.encode("utf-8", "surrogatepass")), broken(content))


# ----------------------------------------------------------------------- binaries


@st.composite
def edited_pickle(draw: Any, content: bytes) -> bytes:
    """A pickle with other numbers and texts in it, or with instructions removed, repeated or exchanged."""
    steps = [
        step for step in split_pickle(content) if not step.startswith(b"\x95")
    ]  # FRAME: lengths
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(steps) - 1))
        kind = draw(
            st.sampled_from(("number", "text", "number", "text", "gone", "twice", "swap", "any"))
        )
        if kind == "number":
            chosen = [
                i for i, step in enumerate(steps) if step[:1] in (b"K", b"M", b"J", b"\x8a", b"N")
            ]
            if chosen:
                at = draw(st.sampled_from(chosen))
                steps[at] = _pickled(draw(st.one_of(SCALARS, st.integers(-3, 300))))
        elif kind == "text":
            chosen = [i for i, step in enumerate(steps) if step[:1] in (b"X", b"\x8c", b"c")]
            if chosen:
                at = draw(st.sampled_from(chosen))
                steps[at] = _pickled(draw(st.one_of(st.sampled_from(TEXTS), SCALARS)))
        elif kind == "gone":
            del steps[at]
        elif kind == "twice":
            steps.insert(at, steps[at])
        elif kind == "swap":
            other = draw(st.integers(0, len(steps) - 1))
            steps[at], steps[other] = steps[other], steps[at]
        else:
            codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
            steps[at] = draw(st.sampled_from(codes)) + draw(st.binary(max_size=4))
        if not steps:
            return b"."
    return b"".join(steps)


def split_pickle(content: bytes) -> list[bytes]:
    """Its instructions."""
    starts = [place for _, _, place in pickletools.genops(content)] + [len(content)]
    return [content[a:b] for a, b in itertools.pairwise(starts)]


def _pickled(value: Any) -> bytes:
    """The instructions that put a value on the stack, without remembering it."""
    try:
        steps = split_pickle(pickle.dumps(value, protocol=2))[1:-1]
    except UnicodeEncodeError:
        return b"N"
    return b"".join(step for step in steps if step[:1] not in (b"q", b"r"))


def mutated_pickle(content: bytes) -> Mutated:
    """Of a plain pickle."""
    return st.one_of(edited_pickle(content), edited_pickle(content), broken(content))


def mutated_zip(content: bytes) -> Mutated:
    """Of what `torch.save` writes: the pickle in it, another member, or the archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))

    def packed(changed: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, value in (members | changed).items():
                archive.writestr(name, value)
        return buffer.getvalue()

    inside = edited_pickle(members[pickled]).map(lambda new: packed({pickled: new}))
    other = st.sampled_from(sorted(members)).flatmap(
        lambda name: broken(members[name]).map(lambda new: packed({name: new}))
    )
    return st.one_of(inside, inside, other, broken(content))


def mutated_safetensors(content: bytes) -> Mutated:
    """Of a safetensors file: its header, the length of that, or its bytes."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    sizes = st.sampled_from((0, 1, 7, length - 1, length + 1, 2**31, 2**32, 2**63, 2**64 - 1))

    def whole(new: bytes) -> bytes:
        return len(new).to_bytes(8, "little") + new + rest

    return st.one_of(
        mutated_json(header).map(whole),
        mutated_json(header).map(whole),
        sizes.map(lambda size: size.to_bytes(8, "little") + content[8:]),
        broken(content),
    )


def mutated_index(content: bytes) -> Mutated:
    """Of Megatron's `.idx`: a number of the header or of the tables, or its bytes."""
    numbers = st.sampled_from(
        (0, 1, 2, 9, 2**31 - 1, 2**31, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
    )
    places_of = [(9, "<Q"), (17, "<B"), (18, "<Q"), (26, "<Q")]
    places_of += [(at, "<I") for at in range(34, len(content) - 3, 4)]
    places_of += [(at, "<Q") for at in range(34, len(content) - 7, 4)]

    @st.composite
    def strategy(draw: Any) -> bytes:
        changed = bytearray(content)
        for _ in range(draw(st.integers(1, 3))):
            at, kind = draw(st.sampled_from(places_of))
            most = 256 ** struct.calcsize(kind)
            struct.pack_into(
                kind, changed, at, draw(st.one_of(numbers, st.integers(0, 300))) % most
            )
        return bytes(changed)

    return st.one_of(strategy(), strategy(), broken(content))
