"""Commands to paste: the training script, `helix serve`, and DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from helix_megatron.arguments import FLAGS
from helix_megatron.core.exchanges import NO_EXCHANGE
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.results import Plan
from helix_megatron.plan.settings import Job, Software

# Model flags that only describe where the model came from, or follow from others.
LEFT_OUT = ("padded_vocab_size", "max_position_embeddings", "attention_dropout", "hidden_dropout")


def model_words(model: ModelSpec) -> list[str]:
    """The model's flags as words of a command line."""
    words: list[str] = []
    for name, value in model.flags:
        flag = "--" + name.replace("_", "-")
        if name in LEFT_OUT or value is False or value is None:
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple):
            words += [flag, "[" + ",".join(str(int(v)) for v in value) + "]"]
        else:
            words += [flag, str(value)]
    if "--vocab-size" not in words:
        words += ["--vocab-size", str(model.vocab_size)]
    return words


def layout_words(model: ModelSpec, layout: Layout, job: Job, software: Software) -> list[str]:
    """Parallelism, batch and precision as words of a command line."""
    words = [*_parallel_words(model, layout), "--seq-length", str(job.sequence)]
    words += ["--micro-batch-size", str(layout.micro_batch)]
    words += ["--global-batch-size", str(job.global_batch)]
    if model.learned_positions:
        words += ["--max-position-embeddings", str(max(model.learned_positions, job.sequence))]
    if software.precision in ("bf16", "fp8"):
        words.append("--bf16")
    if layout.recompute != "none":
        words += ["--recompute-granularity", layout.recompute]
    if layout.recompute == "full":
        words += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    if software.distributed_optimizer:
        words.append("--use-distributed-optimizer")
        if software.dp_overlap:
            words += ["--overlap-grad-reduce", "--overlap-param-gather"]
    return words


def _parallel_words(model: ModelSpec, layout: Layout) -> list[str]:
    words = ["--tensor-model-parallel-size", str(layout.tp)]
    if layout.segments > 1:
        words += [FLAGS["intra_head_parallel_size"], str(layout.segments)]
        words += [FLAGS["query_layout"], layout.query_layout]
        if layout.exchange != NO_EXCHANGE.name:
            words += [FLAGS["exchange"], layout.exchange]
    if layout.pp > 1:
        words += ["--pipeline-model-parallel-size", str(layout.pp)]
    if layout.vp > 1:
        per_chunk = model.num_layers // layout.pp // layout.vp
        words += ["--num-layers-per-virtual-pipeline-stage", str(per_chunk)]
    if layout.cp > 1:
        words += ["--context-parallel-size", str(layout.cp)]
    if model.experts:
        words += ["--expert-model-parallel-size", str(layout.ep)]
        words += ["--expert-tensor-parallel-size", str(layout.etp)]
    if layout.sequence_parallel:
        words.append("--sequence-parallel")
    return words


def command_words(plan: Plan, layout: Layout) -> list[str]:
    """All flags of the training command."""
    return [
        *model_words(plan.model),
        *layout_words(plan.model, layout, plan.job, plan.software),
    ]


def training_command(plan: Plan, layout: Layout) -> str:
    """One command for every node; data, learning rate and checkpoints are the user's to add."""
    start = [*_torchrun(layout.gpus, plan.cluster), "scripts/pretrain_gpt.py"]
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
    words = ["--load", "$CHECKPOINT"]
    if nodes == 1:
        words += ["--nproc-per-node", str(layout.tp)]
    words += [FLAGS["intra_head_parallel_size"], str(layout.segments)]
    if layout.segments > 1:
        words += [FLAGS["query_layout"], layout.query_layout]
        if job.task == "decode":
            words += ["--cache-layout", layout.cache]
    if model.experts:
        words += ["--expert-model-parallel-size", str(layout.ep)]
        words += ["--expert-tensor-parallel-size", str(layout.etp)]
    words += ["--dtype", "fp32" if plan.software.precision == "fp32" else "bf16"]
    words += ["--max-sequences", str(job.global_batch // layout.dp)]
    # The planner's sequence is in the cache already; a token follows it where the model has a position for it.
    positions = job.sequence + 1
    if model.learned_positions:
        positions = min(positions, model.learned_positions)
    words += ["--max-context", str(positions)]
    if job.task == "prefill":
        words += ["--prefill-chunk", str(layout.micro_batch * job.sequence)]
    return words


def not_served(model: ModelSpec, layout: Layout) -> str:
    """Why `helix serve` cannot run a layout, as a clause; empty if it can."""
    if layout.pp > 1:
        return "it has no pipeline parallelism"
    if layout.cp > 1:
        return "it has no context parallelism"
    if layout.segments == 1 and layout.tp > model.num_kv_heads:
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
    for degree, name in ((layout.pp, "pipeline"), (layout.cp, "context"), (layout.ep, "expert")):
        if degree > 1:
            return (
                None,
                f"the host for DeepSpeed has no {name} parallelism, and this layout has {degree}",
            )
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
    if plan.job.task == "prefill" and layout.segments > 1:
        found.append(
            "helix serve exchanges for prompts what its cache layout needs. The exchange of this row is what "
            "Hugging Face models run that helix_megatron.huggingface has cut."
        )
    if plan.software.precision == "fp8" and plan.job.task != "train":
        found.append("helix serve has no fp8: the command is for bf16, and this row is a forecast.")
    elif plan.software.precision == "fp8":
        found.append(
            "fp8 needs Transformer Engine: add --fp8-format hybrid to Megatron-LM's script."
        )
        if layout.segments > 1:
            found.append("Helix refuses fp8 so far: this row is a forecast.")
    return found
