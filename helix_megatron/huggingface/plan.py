"""What sharding a model will cut, decided without a process group and without touching a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.huggingface.cuts import Cut, block_cut
from helix_megatron.huggingface.forms import (
    AttentionForm,
    attention_form,
    delta_net_cuts,
    expert_cuts,
    mamba_cuts,
    mlp_cuts,
    other_parts,
)
from helix_megatron.huggingface.upstream import check_attention
from helix_megatron.model.families import CUTTABLE
from helix_megatron.versions import TESTED

if TYPE_CHECKING:
    from torch import Tensor

NO_PROBABILITIES = (
    "output_attentions = True does not work with Helix attention, whose ranks never hold all probabilities. "
    "Valid: False."
)


@dataclass(frozen=True)
class Plan:
    """Which parameters of a model are cut, and how.

    helix: the setting; attention: the attention modules by path; layout: of the first of them; mlps, experts,
    delta_nets, mambas: paths of the modules that are cut; cuts: by the name in the model's state dictionary (a
    tied parameter has two), replicated parameters left out; embeddings, mlp: what `shard` was asked to cut
    besides attention.
    """

    helix: HelixConfig
    attention: Mapping[str, AttentionForm]
    layout: HeadLayout
    mlps: Sequence[str]
    experts: Sequence[str]
    delta_nets: Sequence[str]
    mambas: Sequence[str]
    cuts: Mapping[str, Cut]
    embeddings: bool
    mlp: bool

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    def split(self, state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        return {
            name: self.cuts[name].take(whole, rank) if name in self.cuts else whole
            for name, whole in state.items()
        }

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A whole model's state dictionary from those of the p ranks, in order of rank.

        Replicated tensors are rank 0's.

        Raises:
            HelixError: a number of ranks, names or shapes that are not this plan's.
        """
        if len(states) != self.num_ranks:
            raise HelixError(
                f"{len(states)} state dictionaries were given of a model that {self.num_ranks} ranks hold. "
                "Give one of each rank, in order of rank."
            )
        for rank, state in enumerate(states):
            if missing := [name for name in states[0] if name not in state]:
                raise HelixError(
                    f"rank {rank} lacks {listed(missing[:4])}, which rank 0 has. Give the state dictionaries "
                    "of one model."
                )
        return {
            name: self.cuts[name].join([state[name] for state in states])
            if name in self.cuts
            else first
            for name, first in states[0].items()
        }


def plan(
    model: Any,
    helix: HelixConfig | Mapping[str, Any] | int,
    tensor_parallel_size: int,
    *,
    embeddings: bool = True,
    mlp: bool = True,
) -> Plan:
    """What `shard` with these arguments would cut on `tensor_parallel_size` ranks.

    Args:
        model: whole, of a family that can be cut; on any device, the meta device too.
        helix: the setting, as a configuration, a mapping of its fields, or the intra-head parallel size m.

    Raises:
        HelixError: the model's type, a setting or a size does not fit; the text says which would.
    """
    helix, kind = as_config(helix), getattr(model.config, "model_type", None)
    _check_setting(model, helix)
    cuts: dict[str, Cut] = {}
    attention: dict[str, AttentionForm] = {}
    known = (mlp_cuts, expert_cuts, delta_net_cuts, mamba_cuts)
    others: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
    for path, module in model.named_modules():
        own: dict[str, Cut] = {}
        if form := attention_form(
            module, getattr(getattr(module, "config", None), "model_type", kind)
        ):
            attention[path] = form
            own = dict(form.cuts(module, helix, tensor_parallel_size))
        for paths, cuts_of in zip(others, known, strict=True) if mlp and form is None else ():
            if own := dict(cuts_of(module, tensor_parallel_size)):
                paths.append(path)
                break
        cuts |= {f"{path}.{name}" if path else name: cut for name, cut in own.items()}
    if not attention:
        raise _not_found(model, "no attention module of a decoder")
    layouts = [form.layout(helix, tensor_parallel_size) for form in attention.values()]
    if kind not in CUTTABLE and any(layout.query_layout == "segments" for layout in layouts):
        raise _queries_stay_whole(kind, next(iter(attention.values())), tensor_parallel_size)
    # MLPs of another kind, or with adapters, stay whole.
    unknown = any(hasattr(m, "down_proj") and not other_parts(m) for m in model.modules())
    if mlp and not any(others[:2]) and unknown:
        raise _not_found(
            model, "no MLP whose form is known", "leave MLPs whole with mlp=False, or "
        )
    for path, layout in zip(attention, layouts, strict=True):
        if layout.query_layout == "segments" and (
            what := check_attention(model.get_submodule(path))
        ):
            raise _not_found(model, what)
    if embeddings:
        cuts |= _vocabulary_cuts(model, tensor_parallel_size)
    return Plan(helix, attention, layouts[0], *others, cuts, embeddings, mlp)


def as_config(helix: HelixConfig | Mapping[str, Any] | int) -> HelixConfig:
    """A configuration from what `shard` takes for one."""
    if isinstance(helix, HelixConfig):
        return helix
    return HelixConfig.from_dict(helix) if isinstance(helix, Mapping) else HelixConfig(helix)


def embeddings_of(model: Any) -> list[Any]:
    """What looks tokens up: the embedding, and Gemma 4's other one, of what each layer is given besides."""
    per_layer = (m for n, m in model.named_modules() if n.endswith("embed_tokens_per_layer"))
    return [model.get_input_embeddings(), *per_layer]


def _vocabulary_cuts(model: Any, ranks: int) -> dict[str, Cut]:
    """The rows of embeddings, and of an output layer over the vocabulary, tied or not."""
    layers = [*embeddings_of(model), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    return {
        name: block_cut(0, parameter.size(0), ranks)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in weights
    }


def _queries_stay_whole(kind: Any, form: AttentionForm, ranks: int) -> HelixError:
    return HelixError(
        f"models of type {kind} keep their query heads whole, with the exchange gather-kv, and {form.heads} "
        f"heads on {ranks} ranks were to be cut. Valid numbers of ranks: {listed(divisors(form.heads))}. Heads "
        f"of queries can be cut in models of type {listed(CUTTABLE)}."
    )


def _not_found(model: Any, what: str, instead: str = "") -> HelixError:
    tested = TESTED["transformers"]
    return HelixError(
        f"{type(model).__name__} has {what}. Helix knows the models of transformers {tested.lowest} to "
        f"{tested.newest}; {instead}give it one that such a release made, not a wrapped one."
    )


def _check_setting(model: Any, helix: HelixConfig) -> None:
    if helix.attention != "exact":
        raise HelixError(
            f"attention {helix.attention} is a different architecture from the one that this model was made "
            "for. Valid for Hugging Face models: exact."
        )
    if helix.kernel == "host":
        raise HelixError(
            "kernel host is the core attention that a Megatron layer spec names, and Hugging Face models have "
            "no such spec.",
            setting="kernel",
            value="host",
            valid=("auto", "sdpa"),
        )
    if getattr(model.config, "output_attentions", False):
        raise HelixError(f"{NO_PROBABILITIES} Set model.config.output_attentions = False.")
