"""Commands to paste: the training script, `helix serve`, and DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from helix_megatron.core.caches import NAMES as CACHES
from helix_megatron.core.exchanges import NO_EXCHANGE
from helix_megatron.errors import listed
from helix_megatron.flags import flag_of
from helix_megatron.model.description import SIZES, ModelConfig
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.mixers import ORDINARY
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.operators import attention_kernel
from helix_megatron.plan.results import Plan
from helix_megatron.plan.settings import Job, Software
from helix_megatron.plan.stages import is_accounted

MEGATRON_LM = "../Megatron-LM/pretrain_gpt.py"
# Model flags that are written at their defaults, too, since Megatron-LM has other ones.
KEPT = (*SIZES, "position_embedding_type", "moe_aux_loss_coeff", "moe_token_dispatcher_type")
# Model flags that only describe where the model came from, or follow from others.
LEFT_OUT = ("padded_vocab_size", "max_position_embeddings", "attention_dropout", "hidden_dropout")


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags by their destination names as words of a command line; without those that are off."""
    words: list[str] = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        words.append(flag_of(name))
        if isinstance(value, list | tuple):
            words.append("[" + ",".join(str(int(v)) for v in value) + "]")
        elif value is not True:
            words.append(str(value))
    return words


def model_words(model: ModelSpec) -> list[str]:
    """The model's flags as words of a command line, without those at the defaults of all training scripts."""
    flags = {
        name: value
        for name, value in model.flags.items()
        if name not in LEFT_OUT and (name in KEPT or value != getattr(ModelConfig, name))
    }
    return flag_words(flags | {"vocab_size": flags.get("vocab_size", model.padded_vocab_size)})


def layout_words(model: ModelSpec, layout: Layout, job: Job, software: Software) -> list[str]:
    """Parallelism, batch and precision as words of a command line."""
    overlap = software.distributed_optimizer and software.dp_overlap
    full = layout.recompute == "full"
    flags: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        **_cut(layout),
        "pipeline_model_parallel_size": layout.pp if layout.pp > 1 else None,
        **_stages(model, layout),
        "context_parallel_size": layout.cp if layout.cp > 1 else None,
        **_experts(model, layout),
        "sequence_parallel": layout.sequence_parallel,
        "seq_length": job.sequence,
        "micro_batch_size": layout.micro_batch,
        "global_batch_size": job.global_batch,
        "bf16": software.precision in ("bf16", "fp8"),
        "recompute_granularity": None if layout.recompute == "none" else layout.recompute,
        "recompute_method": "uniform" if full else None,
        "recompute_num_layers": 1 if full else None,
        "use_distributed_optimizer": software.distributed_optimizer,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap,
    }
    if model.learned_positions:
        flags["max_position_embeddings"] = max(model.learned_positions, job.sequence)
    return flag_words(flags)


def _stages(model: ModelSpec, layout: Layout) -> dict[str, Any]:
    """Flags of stages that are cut into chunks, and of a first or last stage with other numbers of layers."""
    ends = layout.first, layout.last
    if not any(ends):
        each = model.num_layers // layout.pp // layout.vp
        return {"num_layers_per_virtual_pipeline_stage": each if layout.vp > 1 else None}
    flags: dict[str, Any] = {
        "num_virtual_stages_per_pipeline_rank": layout.vp if layout.vp > 1 else None
    }
    if is_accounted(model.num_layers, layout.pp, *ends):
        named = (f"account_for_{end}_in_pipeline_split" for end in ("embedding", "loss"))
        return flags | dict(zip(named, map(bool, ends), strict=True))
    names = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    return flags | {name: own or None for name, own in zip(names, ends, strict=True)}


def _cut(layout: Layout) -> dict[str, Any]:
    """Flags of Helix's own, by the names of Megatron's namespace."""
    if layout.segments == 1:
        return {}
    exchange = None if layout.exchange == NO_EXCHANGE.name else layout.exchange
    return {
        "intra_head_parallel_size": layout.segments,
        "helix_query_layout": layout.query_layout,
        "helix_exchange": exchange,
    }


def _experts(model: ModelSpec, layout: Layout) -> dict[str, Any]:
    names = ("expert_model_parallel_size", "expert_tensor_parallel_size")
    return dict(zip(names, (layout.ep, layout.etp), strict=True)) if model.experts else {}


def command_words(plan: Plan, layout: Layout) -> list[str]:
    """All flags of the training command."""
    words = model_words(plan.model)
    return words + layout_words(plan.model, layout, plan.job, plan.software)


def training_command(plan: Plan, layout: Layout) -> str:
    """One command for every node; data, learning rate and checkpoints are the user's to add."""
    if plan.model.special != ORDINARY:
        what = listed(plan.model.special.names) or "layers of one part each"
        return f"# This row is a forecast: no command is written for a model with {what}."
    even = not (layout.first or layout.last)
    script = "scripts/pretrain_gpt.py" if even else f"-m helix_megatron.launch {MEGATRON_LM}"
    start = [*_torchrun(layout.gpus, plan.cluster), script]
    return " \\\n".join([" ".join(start), *_wrapped(command_words(plan, layout))])


def _torchrun(ranks: int, cluster: Cluster) -> list[str]:
    """The words that start so many ranks, on every node alike."""
    per_node = min(ranks, cluster.domain)
    start = ["torchrun", "--nproc-per-node", str(per_node)]
    if ranks > per_node:
        start += ["--nnodes", str(-(-ranks // per_node))]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "$HEAD_NODE:29500"]
    return start


def _wrapped(words: Sequence[str]) -> list[str]:
    """Lines of flags; a flag and its value stay together."""
    lines, line = [], ""
    for word in words:
        if word.startswith("--") and line and len(line) + len(word) > 70:
            lines.append("    " + line)
            line = ""
        line = f"{line} {word}".strip()
    return [*lines, "    " + line]


def serving_words(plan: Plan, layout: Layout, nodes: int) -> list[str]:
    """The flags of `helix serve` for one replica; over several nodes a launcher starts the ranks."""
    model, job = plan.model, plan.job
    # The planner's sequence is in the cache already; a token follows it where the model has a position for it.
    positions = min(job.sequence + 1, model.learned_positions or job.sequence + 1)
    cut, ordinary = layout.segments > 1, model.special == ORDINARY
    flags = {
        "load": "$CHECKPOINT",
        "nproc_per_node": layout.tp if nodes == 1 else None,
        "intra_head_parallel_size": layout.segments,
        "helix_query_layout": layout.query_layout if cut and ordinary else None,
        "cache_layout": layout.cache if layout.cache in CACHES else None,
        **(_experts(model, layout) if ordinary else {}),
        "dtype": "fp32" if plan.software.precision == "fp32" else "bf16",
        "max_sequences": job.global_batch // layout.dp,
        "max_context": positions,
        "prefill_chunk": layout.micro_batch * job.sequence if job.task == "prefill" else None,
    }
    return flag_words(flags)


def not_served(model: ModelSpec, layout: Layout) -> str:
    """Why `helix serve` cannot run a layout, as a clause; empty if it can."""
    if model.special != ORDINARY:  # the code of transformers computes it
        uneven = layout.segments > 1 and layout.query_layout == "segments"
        if uneven or model.num_attention_heads % layout.tp or layout.ep > 1:
            special = listed(model.special.names) or "layers of one part each"
            return f"with {special} it has whole query heads on each rank and deals no experts"
    if layout.pp > 1:
        return "it has no pipeline parallelism"
    if layout.cp > 1:
        return "it has no context parallelism"
    if layout.segments == 1 and layout.tp > model.num_query_groups:
        return "it does not keep whole heads on more ranks than there are key-value heads"
    if model.experts and layout.tp % (layout.ep * layout.etp):
        return "it deals experts to the tensor parallel ranks of one replica only"
    return ""


def serving_command(plan: Plan, layout: Layout) -> str:
    """The command of `helix serve` for one replica, or a comment that says why the layout is a forecast."""
    reason = not_served(plan.model, layout)
    if reason:
        return f"# This row is a forecast. helix serve does not run it: {reason}."
    nodes = -(-layout.tp // plan.cluster.domain)
    start = "helix serve"
    if nodes > 1:
        start = " ".join([*_torchrun(layout.tp, plan.cluster), "-m helix_megatron.cli serve"])
    words = serving_words(plan, layout, nodes)
    note = "# $CHECKPOINT is a checkpoint of Helix, Megatron or Hugging Face.\n"
    if layout.dp > 1:
        note += f"# Start {layout.dp} of these, on {layout.tp} GPUs each, behind a load balancer.\n"
    return note + " \\\n".join([start, *_wrapped(words)])


def launch_text(plan: Plan, layout: Layout) -> str:
    """What to paste: the training command, or for inference the command that serves the model."""
    command = training_command if plan.job.task == "train" else serving_command
    return command(plan, layout)


def deepspeed_config(plan: Plan, layout: Layout) -> tuple[dict[str, Any] | None, str]:
    """(DeepSpeed's configuration, "") or (None, why there is none)."""
    if plan.model.special != ORDINARY:
        return None, f"it is not known there: {listed(plan.model.special.names)}"
    for degree, name in ((layout.pp, "pipeline"), (layout.cp, "context"), (layout.ep, "expert")):
        if degree > 1:
            reason = f"no {name} parallelism, and this layout has {degree}"
            return None, f"the host for DeepSpeed has {reason}"
    helix: dict[str, Any] = {"tensor_parallel_size": layout.tp} | layout.helix().to_dict()
    config: dict[str, Any] = {
        "train_batch_size": plan.job.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.micro_batches(plan.job.global_batch),
        "zero_optimization": {"stage": 1 if plan.software.distributed_optimizer else 0},
    }
    if plan.software.precision in ("bf16", "fp8"):
        config["bf16"] = {"enabled": True}
    return config | {"helix": helix}, ""


def caveats(plan: Plan, layout: Layout) -> list[str]:
    """What a user should know before pasting."""
    found = []
    if plan.job.task == "train" and (layout.first or layout.last):
        found.append(
            f"The stages have {listed(layout.stages(plan.model.num_layers))} layers. "
            "scripts/pretrain_gpt.py deals layers evenly, and the script of Megatron-LM can deal them so: the "
            f"command is for that ({MEGATRON_LM})."
        )
    if plan.job.task == "prefill" and layout.segments > 1:
        found.append(
            "helix serve exchanges for prompts what its cache layout needs. The exchange of this row is what "
            "Hugging Face models run that helix_megatron.huggingface has cut."
        )
    asked, runs = plan.software.kernel, attention_kernel(plan.scenario, layout, plan.model.head_dim)
    if asked not in ("auto", runs) and runs == "math" and plan.model.attn_logit_softcapping:
        found.append(
            f"--kernel {asked} does not train with soft caps (attn_logit_softcapping): this row is timed with "
            f"{runs}."
        )
    linear = plan.model.special.linear
    if linear and linear.ranks(layout.tp) < layout.tp:
        groups = f", or do not fit their {linear.groups} groups" if linear.groups else ""
        who = "helix_megatron.huggingface" if plan.job.task == "train" else "helix serve"
        found.append(
            f"{layout.tp} ranks do not divide the {linear.shares} {linear.dealt}{groups}: {who} keeps "
            "these layers whole on every rank, and so they are counted."
        )
    if plan.cluster.host_seconds and not plan.scenario.host_seconds:
        runs = "helix serve launches operators one by one, and this row is timed as if it did not"
        if plan.job.task == "train":
            runs = "scripts/pretrain_gpt.py captures no CUDA graphs, which this row is timed with"
        found.append(f"{runs}: --cuda-graphs off shows what the host costs.")
    if plan.software.precision == "fp8" and plan.job.task != "train":
        found.append("helix serve has no fp8: the command is for bf16, and this row is a forecast.")
    elif plan.software.precision == "fp8":
        found.append(
            "fp8 needs Transformer Engine: add --fp8-format hybrid to Megatron-LM's script."
        )
        if layout.segments > 1:
            found.append(
                "fp8 parameters (--fp8-param-gather) are refused with cut heads; leave them out."
            )
    return found
