"""The command to paste: flags of the training script and of Megatron-LM, and DeepSpeed's JSON."""

from __future__ import annotations

from typing import Any

from helix_megatron.arguments import FLAGS
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.settings import Job, Software

# Model flags that only describe where the model came from, or follow from others.
LEFT_OUT = ("padded_vocab_size", "max_position_embeddings", "attention_dropout", "hidden_dropout")
# Model flags of the training script here that Megatron-LM's own has not.
NOT_THERE = ("geglu", "embedding_multiplier")
OWN_SCRIPT = "$MEGATRON_LM/pretrain_gpt.py"
NO_CP = "scripts/pretrain_gpt.py has no context parallelism."


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
    """Parallelism, batch and precision as words of a command line; those of Megatron-LM and of Helix."""
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
        if layout.exchange != "none":
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


def command_words(model: ModelSpec, layout: Layout, job: Job, software: Software) -> list[str]:
    """All flags of the training command."""
    words = [*model_words(model), *layout_words(model, layout, job, software)]
    if layout.cp > 1:
        for flag, value in _own_flags(model, job).items():
            words += [] if flag in words else [flag, value]
    return words


def _own_flags(model: ModelSpec, job: Job) -> dict[str, str]:
    """What Megatron-LM's own script needs beside, or has another default for than the one here."""
    flags = {
        "--transformer-impl": "transformer_engine",
        "--tokenizer-type": "NullTokenizer",
        "--position-embedding-type": "none" if model.rotary == "none" else "rope",
        "--max-position-embeddings": str(job.sequence),
        "--attention-dropout": "0.0",
        "--hidden-dropout": "0.0",
    }
    if model.experts:
        flags |= {"--moe-token-dispatcher-type": "alltoall", "--moe-aux-loss-coeff": "0.01"}
    return flags


def training_command(
    model: ModelSpec, layout: Layout, job: Job, cluster: Cluster, software: Software
) -> str:
    """One command for every node; data, learning rate and checkpoints are the user's to add.

    With context parallelism it is for Megatron-LM's own script, since the one here has none.
    """
    per_node = min(layout.gpus, cluster.domain)
    nodes = -(-layout.gpus // per_node)
    start = ["torchrun", "--nproc-per-node", str(per_node)]
    if nodes > 1:
        start += [
            "--nnodes",
            str(nodes),
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "$HEAD_NODE:29500",
        ]
    words = command_words(model, layout, job, software)
    if layout.cp > 1:  # Megatron-LM refuses to start without the variable on GPUs before Blackwell
        lines = [" ".join(["CUDA_DEVICE_MAX_CONNECTIONS=1", *start, OWN_SCRIPT])]
    else:
        lines = [" ".join([*start, "scripts/pretrain_gpt.py"])]
    line = ""
    for word in words:
        if word.startswith("--") and line and len(line) + len(word) > 70:
            lines.append("    " + line)
            line = ""
        line = f"{line} {word}".strip()
    lines.append("    " + line)
    note = (
        f"# For Megatron-LM's own pretrain_gpt.py, never run here: {NO_CP}\n"
        if layout.cp > 1
        else ""
    )
    return note + " \\\n".join(lines)


def launch_text(
    model: ModelSpec, layout: Layout, job: Job, cluster: Cluster, software: Software
) -> str:
    """What to paste: the training command; for inference the few lines of a script that serves the model."""
    if job.task == "train":
        return training_command(model, layout, job, cluster, software)
    if layout.pp > 1 or layout.cp > 1 or (layout.segments == 1 and layout.tp > model.num_kv_heads):
        return (
            "# No host here runs inference with pipeline or context parallelism, or whole heads on more ranks\n"
            "# than key-value heads: this row is a forecast. --pipeline-model-parallel-size 1 and\n"
            "# --context-parallel-size 1 leave those that run."
        )
    helix = layout.helix().to_dict() if layout.segments > 1 else layout.segments
    per_node = min(layout.gpus, cluster.domain)
    nodes = -(-layout.gpus // per_node)
    many = f" --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint $HEAD_NODE:29500"
    return "\n".join(
        [
            f"# serve.py, started on every node by: torchrun --nproc-per-node {per_node}"
            f"{many if nodes > 1 else ''} serve.py",
            "import os",
            "",
            "import torch",
            "import torch.distributed as dist",
            "",
            "from helix_megatron.huggingface import from_pretrained, make_groups",
            "",
            'torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))',
            "dist.init_process_group()",
            f"groups = make_groups(tensor_parallel_size={layout.tp}, "
            f"intra_head_parallel_size={layout.segments})",
            f"helix = {helix}",
            'model = from_pretrained("PATH", helix, tensor_group=groups.tensor, device="cuda")  # Hugging Face',
            f"model.generate(input_ids)  # {layout.micro_batch} sequences of {job.sequence} tokens, equal on "
            "all TP ranks",
        ]
    )


def deepspeed_config(
    model: ModelSpec, layout: Layout, job: Job, software: Software
) -> tuple[dict[str, Any] | None, str]:
    """(DeepSpeed's configuration, "") or (None, why there is none)."""
    for degree, name in ((layout.pp, "pipeline"), (layout.cp, "context"), (layout.ep, "expert")):
        if degree > 1:
            return (
                None,
                f"the host for DeepSpeed has no {name} parallelism, and this layout has {degree}",
            )
    helix: dict[str, Any] = {"tensor_parallel_size": layout.tp} | layout.helix().to_dict()
    config: dict[str, Any] = {
        "train_batch_size": job.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.micro_batches(job.global_batch),
        "zero_optimization": {"stage": 1 if software.distributed_optimizer else 0},
    }
    if software.precision in ("bf16", "fp8"):
        config["bf16"] = {"enabled": True}
    return config | {"helix": helix}, ""


def caveats(model: ModelSpec, layout: Layout, job: Job, software: Software) -> list[str]:
    """What a user should know before pasting."""
    found = []
    if job.task == "decode" and layout.cache in ("batch", "sequence"):
        found.append(
            f"Cache layout {layout.cache} is a forecast: the hosts keep keys and values cut by segments."
        )
    if layout.cp > 1 and job.task == "train":
        found.append(f"{NO_CP} The command is for Megatron-LM's own pretrain_gpt.py.")
        missing = [name for name, value in model.flags if name in NOT_THERE and value]
        if missing:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            found.append(
                f"Megatron-LM's own script has no {flags}: it needs changes to train this model."
            )
    if software.precision == "fp8":
        found.append(
            "fp8 needs Transformer Engine: add --fp8-format hybrid to Megatron-LM's script."
        )
        if layout.segments > 1:
            found.append("Helix refuses fp8 so far: this row is a forecast.")
    return found
