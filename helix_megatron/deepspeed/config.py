"""The block `"helix"` of a DeepSpeed configuration, next to DeepSpeed's own keys.

    {
      "train_batch_size": 8,
      "zero_optimization": {"stage": 1},
      "helix": {"intra_head_parallel_size": 2, "tensor_parallel_size": 4}
    }

It needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, Setting, did_you_mean, divisors, listed

KEY = "helix"
# Keys that are not called like the settings of other hosts.
OTHER_KEYS = {"tensor_model_parallel_size": "tensor_parallel_size"}
# DeepSpeed reads settings that it doesn't know as if they were not there; this close to ours is a slip.
_NEAR = 0.7


@dataclass(frozen=True)
class HelixBlock:
    """What the block says, checked.

    helix: the fields of `HelixConfig`, which are keys of the block.
    tensor_parallel_size: p, the ranks that hold one model together; the other ranks hold replicas of it,
        between which DeepSpeed averages gradients and ZeRO deals its states. None: of the `mpu` that was
        given, of Megatron where it is initialised, or else all ranks.
    mlp, embeddings: whether MLPs and the vocabulary of a Hugging Face model are cut among the p ranks, too.

    Raises:
        HelixError: a value that it cannot have.
    """

    helix: HelixConfig = field(default_factory=HelixConfig)
    tensor_parallel_size: int | None = None
    mlp: bool = True
    embeddings: bool = True

    def __post_init__(self) -> None:
        p, m = self.tensor_parallel_size, self.helix.intra_head_parallel_size
        if p is not None and (not isinstance(p, int) or isinstance(p, bool) or p < 1):
            raise HelixError(
                f'"tensor_parallel_size" in the block "{KEY}" is {p!r}. It must be a whole number of at least '
                "1: the ranks that hold one model together."
            )
        for name in ("mlp", "embeddings"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise HelixError(f'"{name}" in the block "{KEY}" is {value!r}. Valid: true, false.')
        if p is not None:
            check_divides(m, p, f'"tensor_parallel_size" {p}')

    @property
    def active(self) -> bool:
        """Whether anything is to be cut. If not, DeepSpeed gets its arguments as they are."""
        return self.helix.active or (self.tensor_parallel_size or 1) > 1

    def for_world(self, ranks: int) -> HelixBlock:
        """The block with its tensor parallel size filled in, for a world of `ranks`.

        Raises:
            HelixError: the sizes do not divide the world.
        """
        m = self.helix.intra_head_parallel_size
        p = self.tensor_parallel_size or ranks
        if ranks % p:
            valid = [size for size in divisors(ranks) if size % m == 0]
            none = f"No size fits: start a multiple of {m} ranks."
            advice = f"Valid: {listed(valid)}." if valid else none
            raise HelixError(
                f'"tensor_parallel_size" {p} in the block "{KEY}" does not divide the {ranks} ranks of '
                f"the world. {advice}"
            )
        check_divides(m, p, f"the {p} ranks that hold the model together")
        return dataclasses.replace(self, tensor_parallel_size=p)

    def to_dict(self) -> dict[str, Any]:
        """The block again, with every key; `from_dict` is its inverse."""
        rest = {name: getattr(self, name) for name in _OWN_KEYS}
        return self.helix.to_dict() | rest

    @classmethod
    def from_dict(cls, block: Any) -> HelixBlock:
        """Check a block.

        Raises:
            HelixError: it is not an object, has an unknown key (the nearest valid one is named), or a value
                that its key cannot have.
        """
        if not isinstance(block, Mapping):
            raise HelixError(
                f'"{KEY}" in the DeepSpeed configuration is {block!r}. It must be an object such as '
                '{"intra_head_parallel_size": 2}. Leave it out for DeepSpeed without Helix.'
            )
        helix_keys = [setting.name for setting in dataclasses.fields(HelixConfig)]
        valid = [*helix_keys, *_OWN_KEYS]
        for key in block:
            if key not in valid:
                raise HelixError(
                    f'unknown key "{key}" in the block "{KEY}" of the DeepSpeed configuration.',
                    setting=str(key),
                    valid=valid,
                    remedy=did_you_mean(key, valid, quote='"'),
                )
        helix = HelixConfig.from_dict({k: v for k, v in block.items() if k in helix_keys})
        return cls(helix, **{k: v for k, v in block.items() if k in _OWN_KEYS})


_OWN_KEYS = tuple(setting.name for setting in dataclasses.fields(HelixBlock)[1:])


def check_divides(m: int, ranks: int, called: str) -> None:
    """Refuse segments that do not make head groups of so many ranks, which the text calls `called`."""
    if ranks % m:
        raise HelixError(
            f'"intra_head_parallel_size" {m} in the block "{KEY}" does not divide {called}. Valid '
            f"with {ranks}: {listed(divisors(ranks))}. Or take a multiple of {m} ranks."
        )


def read_block(config: Mapping[str, Any]) -> HelixBlock | None:
    """The block of a DeepSpeed configuration; None where there is none.

    A key that only looks like `helix` is DeepSpeed's or nobody's: it gets a warning.
    """
    for key in config:
        near = difflib.SequenceMatcher(None, str(key).lower(), KEY).ratio() >= _NEAR
        if key != KEY and (near or str(key).lower().startswith(KEY)):
            warnings.warn(
                f'the DeepSpeed configuration has a key "{key}", which DeepSpeed ignores. '
                f'Did you mean "{KEY}"?',
                stacklevel=3,
            )
    return HelixBlock.from_dict(config[KEY]) if KEY in config else None


def as_key(setting: Setting) -> str:
    """Word a setting as a key of the block: `"exchange": "auto"`."""
    name = OTHER_KEYS.get(setting.name, setting.name)
    return f'"{name}"' if setting.value is None else f'"{name}": {json.dumps(setting.value)}'


@contextlib.contextmanager
def in_words_of_the_block() -> Iterator[None]:
    """Errors from inside name settings as keys of the block."""
    try:
        yield
    except HelixError as error:
        raise HelixError(error.worded(as_key)) from error
