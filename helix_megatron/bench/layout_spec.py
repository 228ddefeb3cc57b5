"""A layout of `bench layouts` as the user writes it, `tp=4,m=2`, and as flags of the training script."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from helix_megatron.arguments import as_flag
from helix_megatron.errors import HelixError, did_you_mean
from helix_megatron.flags import flag_of
from helix_megatron.run.config import RunConfig

# Key → flag. A switch is `on` or `off`; other values pass to the flag as they are.
FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-layers-per-virtual-pipeline-stage",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
    "m": "--intra-head-parallel-size",
    "mb": "--micro-batch-size",
    "exchange": "--helix-exchange",
    "query": "--helix-query-layout",
    "attention": "--helix-attention",
    "sp": "--sequence-parallel",
    "zero1": "--use-distributed-optimizer",
}
SWITCHES = ("sp", "zero1")
NUMBERS = ("tp", "cp", "pp", "vpp", "ep", "etp", "m", "mb")
EXPRESSION = re.compile(r"(\d{1,9}|N)(?:/(\d{1,9}))?")


@dataclass(frozen=True)
class LayoutSpec:
    """One layout, for any number of ranks N, as it was written (its name in tables), and its values by key."""

    text: str
    settings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> LayoutSpec:
        """Read `tp=N,m=N/2,exchange=gather-kv`.

        Raises:
            HelixError: an unknown key, a key twice, or a value that the key does not take.
        """
        settings: dict[str, str] = {}
        for part in filter(None, (word.strip() for word in re.split(r"[,\s]+", text))):
            key, equals, value = part.partition("=")
            if key not in FLAGS:
                problem = f"--layout {text}: unknown key {key!r}."
                raise HelixError(problem, valid=FLAGS, remedy=did_you_mean(key, FLAGS))
            if not equals or not value:
                raise HelixError(f"--layout {text}: {key} has no value. Write {key}=….")
            if key in settings:
                raise HelixError(f"--layout {text}: {key} stands there twice.")
            if key in SWITCHES and value not in ("on", "off"):
                raise HelixError(f"--layout {text}: {key} is on or off, not {value}.")
            if key in NUMBERS and not EXPRESSION.fullmatch(value):
                raise HelixError(
                    f"--layout {text}: {key}={value} is neither a number nor N, N/2, … (N: the ranks)."
                )
            settings[key] = value
        if not settings:
            raise HelixError("--layout is empty. Write, for one, tp=4,m=2.")
        return cls(text, settings)

    def flags(self, ranks: int, common: Sequence[str]) -> list[str]:
        """`common` with this layout's flags after them, which win.

        Raises:
            HelixError: N/k is not a whole number.
        """
        values = {key: self._value(key, value, ranks) for key, value in self.settings.items()}
        if values.get("tp") == "1":
            # Sequence parallelism is not for one rank, and a set of rivals has common flags.
            values.setdefault("sp", "off")
        off = {FLAGS[key] for key in SWITCHES if values.get(key) == "off"}
        flags = [flag for flag in common if flag not in off]
        for key, value in values.items():
            if key not in SWITCHES:
                flags += [FLAGS[key], value]
            elif value == "on":
                flags.append(FLAGS[key])
        return flags

    def _value(self, key: str, value: str, ranks: int) -> str:
        if key not in NUMBERS:
            return value
        match = EXPRESSION.fullmatch(value)
        assert match is not None
        number = ranks if match[1] == "N" else int(match[1])
        divisor = int(match[2] or 1)
        if divisor == 0 or number % divisor or number < divisor:
            raise HelixError(
                f"--layout {self.text}: {key}={value} is no whole number at {ranks} ranks. Leave out that "
                "number of ranks, or divide by another."
            )
        return str(number // divisor)


def rivals(ranks: int, common: Sequence[str]) -> tuple[list[LayoutSpec], dict[str, str]]:
    """What to measure when nobody says: stock parallelism of data, tensors, pipeline and context, and every m.

    Returns:
        The layouts that fit the model, and the others with the reason why not.
    """
    from helix_megatron.training.arguments import parse_args

    texts = ["tp=1", f"tp={ranks}"]
    texts += [f"tp={ranks // 2},pp=2"] if ranks % 2 == 0 else []
    # Stock Megatron deals whole heads, and what ranks are left can share the sequence.
    values = parse_args(common)
    groups = values["num_query_groups"] if values["group_query_attention"] else 0
    for heads in (values["num_attention_heads"], groups):
        tensor = math.gcd(ranks, heads)
        texts += [f"tp={tensor},cp={ranks // tensor}"] if tensor < ranks else []
    texts += [f"tp={ranks},m={m}" for m in range(2, ranks + 1) if ranks % m == 0]
    fitting, others = [], {}
    for text in dict.fromkeys(texts):
        spec = LayoutSpec.parse(text)
        try:
            validated(spec, ranks, common)
        except HelixError as error:
            others[text] = error.worded(as_flag)
        else:
            fitting.append(spec)
    return fitting, others


def validated(spec: LayoutSpec, ranks: int, common: Sequence[str]) -> RunConfig:
    """The run of a layout, checked.

    Raises:
        HelixError: they do not fit together, or a flag that makes no sense here.
    """
    from helix_megatron.training.arguments import parse_args
    from helix_megatron.training.validate import validate

    values = parse_args(spec.flags(ranks, common))
    for name in ("save", "load", "nproc_per_node", "eval_interval"):
        if values[name]:
            raise HelixError(
                f"{flag_of(name)} has no place in a benchmark of layouts. Leave it out."
            )
    return validate(values, ranks)
