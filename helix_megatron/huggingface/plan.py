"""What sharding a model will cut, decided without a process group and without touching a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.huggingface import upstream
from helix_megatron.huggingface.cuts import Cut, block_cut, kv_cut, query_cut
from helix_megatron.model.families import cuttable_modules
from helix_megatron.model.families.modules import Modules
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

    helix: the setting; layout: of every attention layer; cuts: by the name in the model's state dictionary (a
    tied parameter has two), replicated parameters left out; embeddings, mlp: what `shard` was asked to cut
    besides attention.
    """

    helix: HelixConfig
    family: Modules
    layout: HeadLayout
    cuts: Mapping[str, Cut]
    embeddings: bool
    mlp: bool

    @property
    def num_ranks(self) -> int:
        """p, the ranks that hold a model together."""
        return self.layout.num_ranks

    def split(self, state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """A rank's part of a whole model's state dictionary."""
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
    helix = as_config(helix)
    config = model.config
    family = cuttable_modules(getattr(config, "model_type", None))
    _check_setting(model, helix)
    heads = config.num_attention_heads
    layout = helix.layout(
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        tensor_parallel_size,
    )
    cuts: dict[str, Cut] = {}
    for path, module in model.named_modules():
        for name, cut in _cuts_of(module, family, layout, mlp):
            cuts[f"{path}.{name}" if path else name] = cut
    _check_modules(model, family, mlp)
    if embeddings:
        cuts |= _vocabulary_cuts(model, tensor_parallel_size)
    return Plan(helix, family, layout, cuts, embeddings, mlp)


def as_config(helix: HelixConfig | Mapping[str, Any] | int) -> HelixConfig:
    """A configuration from what `shard` takes for one."""
    if isinstance(helix, HelixConfig):
        return helix
    return HelixConfig.from_dict(helix) if isinstance(helix, Mapping) else HelixConfig(helix)


def modules_of(model: Any, class_name: str) -> Iterator[tuple[str, Any]]:
    """(path, module) of all modules of the library's class of that name."""
    return ((path, m) for path, m in model.named_modules() if type(m).__name__ == class_name)


def _cuts_of(
    module: Any, family: Modules, layout: HeadLayout, mlp: bool
) -> Iterator[tuple[str, Cut]]:
    """(name below the module, cut) of the parameters that one attention, MLP or experts module has."""
    name, ranks = type(module).__name__, layout.num_ranks
    if name == family.attention:
        yield from _linear(module.q_proj, "q_proj", query_cut(0, layout))
        yield from _linear(module.k_proj, "k_proj", kv_cut(0, layout))
        yield from _linear(module.v_proj, "v_proj", kv_cut(0, layout))
        yield "o_proj.weight", query_cut(1, layout)
    elif name == family.mlp and mlp:
        size = module.gate_proj.out_features
        _check_divides("intermediate size", size, ranks)
        yield from _linear(module.gate_proj, "gate_proj", block_cut(0, size, ranks))
        yield from _linear(module.up_proj, "up_proj", block_cut(0, size, ranks))
        yield "down_proj.weight", block_cut(1, size, ranks)
    elif name == family.stacked_experts and mlp:
        size = module.down_proj.size(2)
        _check_divides("experts' intermediate size", size, ranks)
        yield "gate_up_proj", block_cut(1, 2 * size, ranks, blocks=2)
        yield "down_proj", block_cut(2, size, ranks)


def _linear(linear: Any, name: str, cut: Cut) -> Iterator[tuple[str, Cut]]:
    """The cut of a linear layer's rows: its weight and, if it has one, its bias."""
    yield f"{name}.weight", cut
    if linear.bias is not None:
        yield f"{name}.bias", cut


def _vocabulary_cuts(model: Any, ranks: int) -> dict[str, Cut]:
    """The rows of the embedding, and of an output layer over the vocabulary, tied or not."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    return {
        name: block_cut(0, parameter.size(0), ranks)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in weights
    }


def _check_modules(model: Any, family: Modules, mlp: bool) -> None:
    """A module that goes by another name would stay whole, and attention would then be wrong."""
    classes = {type(module).__name__: module for module in model.modules()}
    if family.attention not in classes:
        raise _not_found(model, f"no {family.attention} with q_proj, k_proj, v_proj and o_proj")
    if what := upstream.check_attention(classes[family.attention]):
        raise _not_found(model, what)
    if not mlp or {family.mlp, family.stacked_experts} & classes.keys():
        return
    alike = [name for name, module in classes.items() if hasattr(module, "down_proj")]
    if alike:  # MLPs of another kind stay whole
        raise _not_found(
            model,
            f"no {family.mlp} and no {family.stacked_experts}, but {listed(alike)}",
            "leave them whole with mlp=False, or ",
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


def _check_divides(what: str, size: int, ranks: int) -> None:
    if size % ranks:
        raise HelixError(
            f"{what} {size} cannot be cut among {ranks} ranks. Valid numbers of ranks: "
            f"{listed(divisors(size))}. Or leave MLPs whole with mlp=False."
        )
