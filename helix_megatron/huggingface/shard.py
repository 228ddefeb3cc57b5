"""Cut a `transformers` model in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.config import HelixConfig
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.errors import HelixError, listed
from helix_megatron.huggingface import attention, layers, upstream
from helix_megatron.huggingface.cuts import Cut
from helix_megatron.huggingface.forms import (
    DELTA_NET_SIZES,
    MLP_OUTPUTS,
    SHOWN,
    learned_activations,
)
from helix_megatron.huggingface.groups import INTRA_HEAD, neighbours_of
from helix_megatron.huggingface.mamba import replace_mamba
from helix_megatron.huggingface.plan import Plan, as_config, embeddings_of, plan
from helix_megatron.huggingface.sharding import Sharding
from helix_megatron.huggingface.whole_heads import replace_attention
from helix_megatron.model.families import CUTTABLE


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
        model: of `transformers`, with attention of a form that `forms` knows. Of a type that this release
            does not know, logits are compared before and after.
        helix: the setting, as a configuration, a mapping of its fields, or the intra-head parallel size m.
        tensor_group: the p = m·n ranks that hold the model together. One rank: nothing is changed.
        intra_head_group: the m neighbours of this rank's head group, made from `tensor_group` when None.
        embeddings: cut the embedding and the output layer by vocabulary.
        mlp: cut MLPs and experts by their intermediate size.
        kernel: local attention where query heads are cut. With whole query heads the model's own attention
            implementation runs.

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
        intra_head_group = neighbours_of(tensor_group, helix.intra_head_parallel_size, INTRA_HEAD)
    _check_groups(what, tensor_group, intra_head_group)

    kind, probed = getattr(model.config, "model_type", None), None
    if kind not in CUTTABLE and kind not in SHOWN:
        probed = _probe(model)
    _warn_of_whole(model, what)
    before = model.config._attn_implementation
    sharding = Sharding(what, tensor_group, intra_head_group, kernel, before)
    _own_config(model)
    _replace_modules(model, sharding)
    _cut_parameters(model, sharding)
    if what.layout.query_layout == "segments":
        attention.register()
        model.set_attn_implementation(attention.NAME)
    model.sharding = sharding
    if probed is not None:
        _check_probe(model, probed)
    for name, reason in REFUSED_METHODS.items():
        setattr(model, name, _refusal(name, reason))
    return model


def _probe(model: Any) -> Tensor | None:
    """Logits of a few tokens; None where the model is empty (on the meta device)."""
    weight = model.get_input_embeddings().weight
    if weight.is_meta:
        warnings.warn(
            f"models of type {model.config.model_type} are not known to this release: this one is cut by the "
            "form of its modules. helix_megatron.huggingface.shard, given a model with its weights, compares "
            "logits before and after.",
            stacklevel=3,
        )
        return None
    training, tokens = model.training, torch.arange(16, device=weight.device)[None] * 5 % 11
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, use_cache=False).logits
    model.train(training)
    return logits.float()


def _check_probe(model: Any, before: Tensor) -> None:
    after = _probe(model)
    assert after is not None
    error = ((after - before).abs().max() / before.abs().max()).item()
    bound = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= bound:
        raise HelixError(
            f"models of type {model.config.model_type} are not known to this release, and this one, cut by the "
            f"form of its modules, gives other logits, by {error:.1e} of the largest. Load it again "
            f"and leave it whole, or give a model of type {listed(sorted({*CUTTABLE, *SHOWN}))}."
        )


def _warn_of_whole(model: Any, what: Plan) -> None:
    """Say which matrices no rank is spared, where they are many."""
    owners: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            whole = f"{path}.{name}" not in what.cuts
            if whole and parameter.dim() > 1 and not isinstance(module, nn.Embedding):
                owner = path.rpartition(".")[0] if isinstance(module, nn.Linear) else path
                kind = type(model.get_submodule(owner)).__name__
                owners[kind] = owners.get(kind, 0) + parameter.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    if what.mlp and sum(owners.values()) > total / 10:
        most = sorted(owners, key=lambda kind: -owners[kind])
        warnings.warn(
            f"{sum(owners.values()):,} of {total:,} parameters stay whole on every rank, those of "
            f"{listed(most[:4])}: Helix does not know how to cut these modules, or the ranks do not divide "
            "their heads.",
            stacklevel=3,
        )


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
    what, modules = sharding.plan, dict(model.named_modules())
    whole_queries = what.layout.query_layout == "heads"
    for path, form in what.attention.items():
        if whole_queries:
            replace_attention(modules[path], form, sharding)
        else:
            attention.replace_attention(modules[path], sharding)
    for path in what.mlps:
        layers.replace(modules[path], layers.PartitionedMLP, sharding=sharding)
        down = next(name for name in MLP_OUTPUTS if hasattr(modules[path], name))
        layers.replace(getattr(modules[path], down), layers.RowParallelLinear, sharding=sharding)
        for name in learned_activations(modules[path]):
            layers.replace(getattr(modules[path], name), layers.UsedByRanks, sharding=sharding)
    for path in what.experts:
        experts = modules[path]
        size = what.cuts[f"{path}.down_proj"].size
        for name in ("intermediate_dim", "intermediate_size", "expert_dim"):
            if getattr(experts, name, None) == size:
                setattr(experts, name, size // what.num_ranks)
        layers.replace(experts, layers.PartitionedExperts, sharding=sharding)
    for path in what.delta_nets:
        delta_net = modules[path]
        for name in DELTA_NET_SIZES:
            setattr(delta_net, name, getattr(delta_net, name) // what.num_ranks)
        layers.resize_convolution(delta_net.conv1d, delta_net.conv_dim)
        layers.replace(delta_net, layers.PartitionedDeltaNet, sharding=sharding)
        layers.replace(delta_net.norm, layers.UsedByRanks, sharding=sharding)
        layers.replace(delta_net.out_proj, layers.RowParallelLinear, sharding=sharding)
    for path in what.mambas:
        replace_mamba(modules[path], sharding)
    _settle_experts(model, what)
    if what.embeddings:
        _replace_vocabulary(model, sharding, sharding.rank)


def _settle_experts(model: Any, what: Plan) -> None:
    """torch's grouped matrix product needs rows of a multiple of 16 bytes: 8 elements in half precision."""
    sizes = {what.cuts[f"{path}.down_proj"].size // what.num_ranks for path in what.experts}
    asked = getattr(model.config, "_experts_implementation", None)
    if asked == "grouped_mm" and any(size % 8 for size in sizes):
        warnings.warn(
            f"each rank has {listed(sorted(sizes))} intermediate dimensions of an expert, and torch's grouped "
            "matrix product needs a multiple of 8: experts run one after the other.",
            stacklevel=4,
        )
        model.set_experts_implementation("eager")


def _replace_vocabulary(model: Any, sharding: Sharding, rank: int) -> None:
    output = model.get_output_embeddings()
    embeddings = [(layer, layers.PartitionedEmbedding) for layer in embeddings_of(model)]
    for layer, mixin in (*embeddings, (output, layers.PartitionedOutput)):
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
