"""Cut a `transformers` model in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from helix_megatron.config import HelixConfig
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.errors import HelixError, listed
from helix_megatron.huggingface import attention, layers, upstream
from helix_megatron.huggingface.cuts import Cut
from helix_megatron.huggingface.groups import intra_head_group_of
from helix_megatron.huggingface.plan import Plan, as_config, modules_of, plan
from helix_megatron.huggingface.sharding import Sharding


def shard(
    model: Any,
    helix: HelixConfig | Mapping[str, Any] | int,
    *,
    tensor_group: ProcessGroup,
    intra_head_group: ProcessGroup | None = None,
    embeddings: bool = True,
    mlp: bool = True,
    kernel: AttentionKernel = sdpa,
) -> Any:
    """Cut a model, in place: attention m × n, MLPs and experts and the vocabulary by tensor parallelism.

    Every rank of `tensor_group` calls it with an equal model (or, on the meta device, an empty one). The
    Parameter objects stay, since an optimizer may have them already; what they hold becomes this rank's part.
    A parameter that was cut gets Megatron's marks, `tensor_model_parallel`, `partition_dim` and
    `partition_stride`; the others are replicated. A replicated parameter's gradient is whole and equal on all
    ranks of the group: nothing is left to reduce there.

    Inputs and outputs of the model are replicated: every rank is given the same tokens and gets all logits.
    `model.config` becomes a copy that keeps the true numbers of heads.

    Args:
        model: of a family in `model.families.CUTTABLE`, from `transformers`.
        helix: the setting, as a configuration, a mapping of its fields, or the intra-head parallel size m.
        tensor_group: the p = m·n ranks that hold the model together. One rank: nothing is changed.
        intra_head_group: the m neighbours of this rank's head group, made from `tensor_group` when None.
        embeddings: cut the embedding and the output layer by vocabulary.
        mlp: cut MLPs and experts by their intermediate size.
        kernel: local attention.

    Returns:
        `model`.

    Raises:
        HelixError: the model is sharded already, or its type, a setting or a size does not fit.
    """
    upstream.require()
    helix = as_config(helix)
    _check_state(model)
    what = plan(model, helix, tensor_group.size(), embeddings=embeddings, mlp=mlp)
    if what.num_ranks == 1:
        return model
    if intra_head_group is None:
        intra_head_group = intra_head_group_of(tensor_group, helix.intra_head_parallel_size)
    _check_groups(what, tensor_group, intra_head_group)

    attention.register()
    before = model.config._attn_implementation
    sharding = Sharding(what, tensor_group, intra_head_group, kernel, before)
    _own_config(model)
    _replace_modules(model, sharding)
    _cut_parameters(model, sharding)
    model.set_attn_implementation(attention.NAME)
    model.sharding = sharding
    for name, reason in REFUSED_METHODS.items():
        setattr(model, name, _refusal(name, reason))
    return model


EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

# Methods of the library that would take a part for the whole.
REFUSED_METHODS = {
    "save_pretrained": "would write this rank's part of every weight. Call "
    "helix_megatron.huggingface.save_pretrained(model, directory) on every rank",
    "resize_token_embeddings": "knows only this rank's part of the vocabulary. Resize before sharding",
    "merge_and_unload": "would merge adapters into parts of weights. Merge before sharding",
}


def _refusal(name: str, reason: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HelixError(f"{name} of a sharded model {reason}.")

    return refuse


def _check_state(model: Any) -> None:
    if getattr(model, "sharding", None) is not None or any(
        isinstance(module, layers.Partitioned) for module in model.modules()
    ):
        raise HelixError(
            "this model is sharded already. Make a new one, or load it with "
            "helix_megatron.huggingface.from_pretrained."
        )
    if model.tp_size is not None:
        raise HelixError(
            "this model was loaded with the library's own tensor parallelism (tp_plan). Load it without."
        )
    if model.use_kernels:
        raise HelixError(
            "this model runs kernels from the Hub in place of its modules (use_kernels = True). "
            "Set model.use_kernels = False."
        )
    experts = getattr(model.config, "_experts_implementation", None) or "eager"
    if experts not in EXPERTS_IMPLEMENTATIONS:
        raise HelixError(
            f"experts implementation {experts!r} has not been shown to work with experts that are cut. Valid: "
            f"{listed(EXPERTS_IMPLEMENTATIONS)}. Call model.set_experts_implementation('grouped_mm')."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise HelixError(
            "this model is quantized, and quantized weights cannot be cut. Load it in bfloat16, float16 "
            "or float32."
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise HelixError(
                f"parameter {name} is partitioned by DeepSpeed's ZeRO 3. Shard the model before "
                "deepspeed.initialize, and build it outside deepspeed.zero.Init."
            )


def _check_groups(what: Plan, tensor: ProcessGroup, intra_head: ProcessGroup) -> None:
    m = what.layout.segments
    if intra_head.size() != m or intra_head.rank() != tensor.rank() % m:
        raise HelixError(
            f"intra-head parallel size {m} needs groups of {m} neighbours of the tensor group, and rank "
            f"{tensor.rank()} of {tensor.size()} was given rank {intra_head.rank()} of {intra_head.size()}. "
            "Take both from helix_megatron.huggingface.make_groups, or leave intra_head_group out."
        )


def _own_config(model: nn.Module) -> None:
    """Give the model its own configuration: its attention implementation must not change other models."""
    old = model.config
    new = copy.deepcopy(old)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _replace_modules(model: Any, sharding: Sharding) -> None:
    what, rank = sharding.plan, sharding.rank
    family, whole_queries = what.family, what.layout.query_layout == "heads"
    for _, module in list(modules_of(model, family.attention)):
        layers.replace(module, attention.PartitionedAttention, sharding=sharding)
        layers.replace(module.o_proj, layers.RowParallelLinear, sharding=sharding)
        for name in ("q_norm", "k_norm"):
            if getattr(module, name, None) is not None:
                whole = whole_queries and name == "q_norm"
                norm = getattr(module, name)
                layers.replace(
                    norm, layers.PartitionedHeadNorm, sharding=sharding, whole_heads=whole
                )
    if what.mlp:
        for _, module in list(modules_of(model, family.mlp)):
            layers.replace(module, layers.PartitionedMLP, sharding=sharding)
            layers.replace(module.down_proj, layers.RowParallelLinear, sharding=sharding)
        for _, module in list(modules_of(model, family.stacked_experts)):
            layers.replace(module, layers.PartitionedExperts, sharding=sharding)
            module.intermediate_dim //= what.num_ranks
        _settle_experts(model, what)
    if what.embeddings:
        _replace_vocabulary(model, sharding, rank)


def _settle_experts(model: Any, what: Plan) -> None:
    """torch's grouped matrix product needs rows of a multiple of 16 bytes: 8 elements in half precision."""
    experts = modules_of(model, f"Partitioned{what.family.stacked_experts}")
    sizes = {module.intermediate_dim for _, module in experts}
    asked = getattr(model.config, "_experts_implementation", None)
    if asked == "grouped_mm" and any(size % 8 for size in sizes):
        warnings.warn(
            f"each rank has {listed(sorted(sizes))} intermediate dimensions of an expert, and torch's grouped "
            "matrix product needs a multiple of 8: experts run one after the other.",
            stacklevel=4,
        )
        model.set_experts_implementation("eager")


def _replace_vocabulary(model: Any, sharding: Sharding, rank: int) -> None:
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    for layer, mixin in (
        (embedding, layers.PartitionedEmbedding),
        (output, layers.PartitionedOutput),
    ):
        if layer is None:
            continue
        name = next(n for n, p in model.named_parameters() if p is layer.weight)
        cut = sharding.plan.cuts[name]
        first = int(cut.indices[rank][0])
        layers.replace(layer, mixin, sharding=sharding)
        if layer is output:
            layer.vocabulary = tuple(index.size for index in cut.indices)
            continue
        layer.first_token = first
        if layer.padding_idx is not None:
            own = 0 <= layer.padding_idx - first < cut.indices[rank].size
            layer.padding_idx = layer.padding_idx - first if own else None


def _cut_parameters(model: Any, sharding: Sharding) -> None:
    done: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        cut = sharding.plan.cuts.get(name)
        if cut is None or id(parameter) in done:  # tied parameters have two names
            continue
        done.add(id(parameter))
        _cut(parameter, cut, sharding.rank)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings = module.weight.size(0)


def _cut(parameter: nn.Parameter, cut: Cut, rank: int) -> None:
    parameter.data = cut.take(parameter.data, rank)
    parameter.grad = None
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = cut.dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
