"""A family of Hugging Face models: pieces of its `config.json`, and a table of its tensors."""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import flag_of
from helix_megatron.model.description import FUNCTION_FLAGS, ModelConfig, complete
from helix_megatron.model.families.conditions import features, sizes_of
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import (
    HARMLESS,
    HARMLESS_PREFIXES,
    READ,
    Piece,
    check_field,
)
from helix_megatron.model.families.rules import (
    Copies,
    FusedQueryKeyValue,
    Interleaved,
    Part,
    QueryKeyValue,
    Rule,
    Same,
    Stacked,
    Transform,
    Transposed,
)
from helix_megatron.model.families.towers import head_prefix, text_prefix
from helix_megatron.model.packing import KEY as PACKED
from helix_megatron.model.packing import packing_of

# Tensors of old files that hold constants: rotary frequencies and GPT-2's causal masks.
CONSTANTS = re.compile(r"(rotary_emb\.inv_freq|attn\.(bias|masked_bias))$")
SHOWN = 5
IMPOSSIBLE = "these flags: "  # how a difference begins that is all of them together


@dataclass(frozen=True)
class Row:
    """One line of a family's table of tensors.

    Args:
        name: canonical, below `decoder.layers.N.` for a layer's; `{expert}` is an expert's number.
        sources: Hugging Face names with the letters of their shapes: `self_attn.q_proj.weight[Q,D]`.
        join: `same`, `transposed`, `stacked`, `interleaved`, `qkv`, `fused-qkv` or `fused-qkv-transposed`.
        when: what a model (a layer) must have for the row to count; see `conditions.features`.
        part: of its source's rows, in place of `join`: letters of the number of blocks that these are, and of
            the sizes of a block's parts, and which of the parts the tensor is.

    A row of an expert whose sources have no `{expert}` reads its expert from sources that stack all of them on
    their first axis.
    """

    name: str
    sources: str
    join: str = "same"
    when: str = ""
    part: tuple[str, tuple[str, ...], int] | None = None


# Experts of files that stack all of a layer, as Qwen3.5's may.
STACKED = {
    row.name: row
    for row in (
        Row(
            "mlp.experts.{expert}.linear_fc1.weight",
            "mlp.experts.gate_up_proj[E,2M,D]",
            when="experts",
        ),
        Row(
            "mlp.experts.{expert}.linear_fc2.weight",
            "mlp.experts.down_proj[E,D,M]",
            when="experts",
        ),
    )
}


@dataclass(frozen=True)
class Family:
    """One family; `name` is its `model_type`.

    Args:
        name: `model_type` of its config.json.
        architecture: the class that config.json names.
        prefix: what names of all tensors but the output layer's begin with; may be missing in files that
            were saved without the output layer.
        layer: what a layer's names begin with, after the prefix.
        pieces: of its config.json.
        rows: of a layer's tensors; `outer` of the others.
        letters: of a hybrid pattern that one layer of the files is.
        modules: what its modules are called; None where its models cannot be cut in place.
        aliases: second names that transformers has for keys of the pieces, and that are refused here.
        predicts_further: files have layers of multi-token prediction behind the last, which transformers leaves
            out as well.
        runs_in_engine: whether megatron-core's code of it generates; transformers' own does for the others.
    """

    name: str
    architecture: str
    prefix: str
    layer: str
    pieces: tuple[Piece, ...]
    rows: tuple[Row, ...]
    outer: tuple[Row, ...]
    letters: int = 1
    modules: Modules | None = None
    aliases: frozenset[str] = frozenset()
    predicts_further: bool = False
    runs_in_engine: bool = True

    # ---------------------------------------------------------------- configuration

    def model_flags(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json → model flags.

        Raises:
            HelixError: a key is missing, or has a value that changes what the model computes and that
                Megatron's GPT does not have; the text names key and value.
        """
        known = {key for piece in self.pieces for key in piece.keys}
        for key, value in config.items():
            if key in known or key in HARMLESS or key.startswith(HARMLESS_PREFIXES):
                continue
            if value is None or value is False or value in ("", [], {}):
                continue
            if key == "partial_rotary_factor" and value == 1:
                continue
            if key == PACKED:
                packing_of(config)  # refuses what cannot be unpacked
                continue
            if key == "auto_map":
                warnings.warn(
                    "config.json names code of its own (auto_map), which is not run: the model is taken for "
                    f"what transformers calls {self.name}.",
                    stacklevel=3,
                )
                continue
            if key in READ or key in self.aliases:
                raise HelixError(
                    f"config.json sets {key} = {_short(value)}, which {self.name} models do not have here. "
                    "If it does not change what the model computes, delete it from config.json."
                )
            warnings.warn(
                f"config.json sets {key} = {_short(value)}, which {self.name} models of transformers do not "
                "read: it is ignored.",
                stacklevel=3,
            )
        self.check_values(config)
        flags: dict[str, Any] = {}
        for piece in self.pieces:
            flags |= piece.flags(config)
        return complete(flags)

    def check_values(self, config: Mapping[str, Any]) -> None:
        """Check each number of a config.json by itself, before anything is made of it.

        Raises:
            HelixError: one of another type, or outside of the range of every model; names the key.
        """
        for piece in self.pieces:
            for key, field in piece.fields.items():
                check_field(key, field, config.get(key))

    def config(
        self, flags: Mapping[str, Any], original: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Model flags → config.json.

        Args:
            flags: of a model that this family can express.
            original: config.json that the weights once had. It is kept, except where flags have changed
                since, and for how files packed them; what flags do not determine (token ids, dtype) is
                always its.

        Raises:
            HelixError: a flag has a value that this family cannot express.
        """
        differences = self.differences(flags)
        if differences:
            raise HelixError(f"{self.name} models of Hugging Face cannot have {differences[0]}.")
        fresh = self._config(ModelConfig.from_flags(flags))
        if original is None:
            return fresh
        before = self._config(ModelConfig.from_flags(self.model_flags(original)))
        changed = {key: value for key, value in fresh.items() if before.get(key) != value}
        if "rope_parameters" in changed:  # in all spellings: an older one left as it was would win
            changed |= {key: fresh[key] for key in ("rope_theta", "rope_scaling")}
        kept = {key: value for key, value in original.items() if key != PACKED}
        return {**kept, **changed}

    def differences(self, flags: Mapping[str, Any]) -> list[str]:
        """Flags that this family cannot express: `--flag = value (here: the nearest value)`."""
        model = ModelConfig.from_flags(flags).unpadded()
        wanted = model.function
        try:
            given = ModelConfig.from_flags(self.model_flags(self._config(model))).function
        except HelixError as error:
            return [f"{IMPOSSIBLE}{str(error).rstrip('.')}"]
        return [
            f"{flag_of(name)} = {_short(wanted[name])} (here: {_short(given[name])})"
            for name in FUNCTION_FLAGS
            if wanted[name] != given[name]
        ]

    def _config(self, model: ModelConfig) -> dict[str, Any]:
        config: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        for piece in self.pieces:
            config |= piece.config(model)
        return config

    # ---------------------------------------------------------------------- tensors

    def rules(
        self,
        flags: Mapping[str, Any],
        names: Collection[str] | None = None,
        *,
        tower: bool = False,
    ) -> list[Rule]:
        """One rule per canonical tensor: embeddings, layers in order, final norm, output layer.

        Args:
            flags: model flags.
            names: those of the tensors of a checkpoint directory, all of them. They decide the spelling
                where there are several: without the prefix, or with a copy of a tied embedding.
            tower: whether the model has more than its text, which is left out.

        Raises:
            HelixError: names are missing, or unknown.
        """
        model = ModelConfig.from_flags(flags).unpadded()
        prefix = text_prefix(names, self.prefix) if names else self.prefix
        beside = head_prefix(names or ())
        head = f"{beside}lm_head.weight"
        spelled = self
        own = (name for name in names or () if name.startswith(f"{prefix}{self.layer}."))
        if any(name.endswith(".mlp.experts.gate_up_proj") for name in own):
            rows = (STACKED[r.name] if "{expert}" in r.sources else r for r in self.rows)
            spelled = replace(self, rows=tuple(rows))
        rules = list(spelled._rules(model, prefix, beside))
        if not model.untie_embeddings_and_output_weights and names and head in names:
            rules[0] = _with_copy(rules[0], head)
        if names is not None:
            if tower:
                names = _of_text(names, prefix, self.layer, head)
            self._check_names(rules, names, model.num_layers)
        return rules

    def _rules(self, model: ModelConfig, prefix: str, head: str) -> Iterator[Rule]:
        """Outer rows up to the embeddings, then layers, then the other outer rows."""
        sizes, present = sizes_of(model), features(model)
        outer = [row for row in self.outer if set(row.when.split()) <= present]
        before = [row for row in outer if row.name.startswith("embedding.")]
        for row in before:
            yield _rule(row, "", prefix, sizes, model)
        for number in range(model.num_layers):
            yield from self._layer(model, number, prefix, sizes)
        for row in outer[len(before) :]:
            own = head if row.name.startswith("output_layer.") else prefix
            yield _rule(row, "", own, sizes, model)

    def _layer(
        self, model: ModelConfig, number: int, prefix: str, sizes: Mapping[str, Any]
    ) -> Iterator[Rule]:
        experts, linear = model.moe_layers[number], model.linear_layers[number]
        letter = (model.hybrid_layer_pattern or "")[number : number + 1]
        present = features(model, experts=experts, linear=linear, letter=letter)
        own = number // self.letters if letter else number
        where, source = f"decoder.layers.{number}.", f"{prefix}{self.layer}.{own}."
        for row in self.rows:
            if set(row.when.split()) <= present:
                copies = model.num_experts or 0 if "{expert}" in row.name else 1
                for expert in range(copies):
                    yield _rule(row, where, source, sizes, model, expert)

    def _without_prediction(self, names: list[str], num_layers: int) -> list[str]:
        """The names that are not of layers behind the last one, of which it warns."""
        layers = re.compile(rf"(?:^|\.){self.layer}\.(\d+)\.")
        numbers = {name: int(found[1]) for name in names if (found := layers.search(name))}
        behind = [name for name, number in numbers.items() if number >= num_layers]
        behind += [name for name in names if name.startswith("mtp.")]
        if behind:
            warnings.warn(
                f"{len(behind)} tensors of multi-token prediction are left out: {_some(behind)}.",
                stacklevel=5,
            )
        return [name for name in names if name not in behind]

    def _check_names(self, rules: list[Rule], names: Collection[str], num_layers: int) -> None:
        expected = {source for rule in rules for source in rule.sources}
        missing = sorted(expected - set(names))
        unknown = sorted(n for n in set(names) - expected if not CONSTANTS.search(n))
        if self.predicts_further:
            unknown = self._without_prediction(unknown, num_layers)
        if missing:
            close = difflib.get_close_matches(missing[0], unknown, n=1)
            hint = f" There is {close[0]}, which is not expected." if close else ""
            raise HelixError(
                f"{len(missing)} tensors of a {self.name} model with this configuration are missing: "
                f"{_some(missing)}.{hint} Check that all files of the model are there."
            )
        if unknown:
            raise HelixError(
                f"{len(unknown)} tensors do not belong to a {self.name} model with this configuration: "
                f"{_some(unknown)}. Check that config.json is this model's."
            )


def _of_text(names: Collection[str], prefix: str, layer: str, head: str) -> list[str]:
    """The names of a text tower's tensors; warns of the others."""
    beside = tuple(f"{prefix}{part}." for part in (layer, "embed_tokens", "norm"))
    text = [name for name in names if name.startswith(beside) or name == head]
    if others := sorted(set(names) - set(text)):
        warnings.warn(
            f"{len(others)} tensors are not of the model's text, and are left out: {_some(others)}.",
            stacklevel=4,
        )
    return text


def _rule(
    row: Row, where: str, prefix: str, sizes: Mapping[str, Any], model: ModelConfig, expert: int = 0
) -> Rule:
    sources, shapes = [], []
    for source in row.sources.split():
        name, _, letters = source.rstrip("]").partition("[")
        sources.append(prefix + name.format(expert=expert))
        shapes.append(tuple(sizes[letter] for letter in letters.split(",")))
    name = where + row.name.format(expert=expert)
    stacked = "{expert}" in row.name and "{expert}" not in row.sources
    place = expert if stacked else None
    if row.part is None:
        transform = _transform(row.join, model)
    else:
        blocks, parts, own = row.part
        ends = list(itertools.accumulate((sizes[part] for part in parts), initial=0))
        transform = Part(sizes[blocks], ends[own], ends[own + 1])
    return Rule(name, tuple(sources), tuple(shapes), transform, place)


def _transform(join: str, model: ModelConfig) -> Transform:
    heads = QueryKeyValue(model.num_query_groups, model.head_dim, gated=model.attention_output_gate)
    transforms: dict[str, Transform] = {
        "same": Same(),
        "transposed": Transposed(),
        "stacked": Stacked(),
        "interleaved": Interleaved(),
        "qkv": heads,
        "fused-qkv": FusedQueryKeyValue(heads),
        "fused-qkv-transposed": FusedQueryKeyValue(heads, transposed=True),
    }
    return transforms[join]


def _with_copy(rule: Rule, name: str) -> Rule:
    names = (*rule.sources, name)
    return Rule(rule.name, names, (*rule.shapes, rule.shape), Copies(names))


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return listed(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
