"""The flags that `helix generate` and `helix serve` share: checkpoint, ranks and precision.

`inference_config` makes of them, and of what the checkpoint says about its model, the run that
`helix_megatron.megatron.gpt` builds a model from. Starts without torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, counted, listed
from helix_megatron.flags import INPUT, INPUT_DIRECTORY, add_flags, flag_of, whole
from helix_megatron.model.description import MODEL_FLAGS, ModelConfig
from helix_megatron.run.config import RunConfig
from helix_megatron.run.settings import Checkpoints, Parallelism, Training

if TYPE_CHECKING:
    from helix_megatron.checkpoint.source import Source
    from helix_megatron.inference.transformers_load import Described

RANKS = whole(largest=4096)  # of one machine
DTYPES = ("fp32", "bf16", "fp16", "fp64")
# Model flags that mean nothing here, or that another flag of ours is for, are left out.
OVERRIDES = tuple(
    f.name
    for f in dataclasses.fields(ModelConfig)
    if f.name in MODEL_FLAGS and f.metadata.get("inference", True)
)
RANK_SETTINGS = ("distributed_backend", "distributed_timeout_minutes", "nproc_per_node")


IMPLEMENTATIONS = ("auto", "megatron", "transformers")


@dataclass(frozen=True)
class TransformersRun:
    """A model that the code of `transformers` computes, cut by `helix_megatron.huggingface`.

    Args:
        described: what its configuration says.
        world_size: ranks, all of which hold it together.
        segments: m.
        parallel: back end and timeout of the process groups.
    """

    described: Described
    world_size: int
    segments: int
    parallel: Parallelism


@dataclass(frozen=True)
class InferenceConfig:
    """A model that is to be loaded, and how.

    Args:
        run: the model, on all ranks as one copy: no pipeline and no data parallelism. The kind says whose code
            computes it.
        dtype: of weights and activations, one of `DTYPES`.
        load_path: directory of the checkpoint; `load_kind` is that of `checkpoint.sources`.
        tokenizer: as asked for; None takes what lies with the checkpoint.
        trust_checkpoint: read pickles that could run code.
        notes: sentences that tell people what was chosen for them.
    """

    run: RunConfig | TransformersRun
    dtype: str
    load_path: str
    load_kind: str
    tokenizer: str | None = None
    trust_checkpoint: bool = False
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """How many tokens the model has."""
        if isinstance(self.run, TransformersRun):
            return self.run.described.vocab_size
        assert self.run.model.vocab_size is not None
        return self.run.model.vocab_size


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the groups `checkpoint`, `ranks` and `model` to a parser and return the parser."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--load",
        type=INPUT_DIRECTORY,
        metavar="DIR",
        required=True,
        help="the model: checkpoints of Helix or of Megatron, files per rank, or a Hugging Face model",
    )
    add_flags(group, Checkpoints, ("ckpt_step",))
    group.add_argument(
        "--tokenizer",
        type=INPUT,
        metavar="PATH",
        help="directory of a Hugging Face tokenizer, a tokenizer.json, or byte: every byte is a token "
        "(default: what lies with the checkpoint; byte for a vocabulary of 256 outside of Hugging Face models)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="precision; auto is fp32 on CPU and the checkpoint's on a GPU (default: %(default)s)",
    )
    group.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="whose code computes the model: megatron-core's, or that of transformers for Hugging Face models "
        "and what can become one; auto takes megatron-core's where it generates (default: %(default)s)",
    )
    add_flags(group, Checkpoints, ("trust_checkpoint",))
    add_flags(group, Training, ("seed",))
    _add_ranks(parser)
    _add_overrides(parser)
    return parser


def inference_config(options: Mapping[str, Any], world_size: int) -> InferenceConfig:
    """What the flags and the checkpoint make together.

    Dropout is off. Sequence parallelism is on exactly for a mixture of experts on several ranks, where
    Megatron's layers insist on it.

    Args:
        options: values of the flags of `add_checkpoint_arguments` by their destination names.
        world_size: number of ranks.

    Raises:
        HelixError: no checkpoint, or flags that do not fit it or the ranks; with what to try.
    """
    from helix_megatron.checkpoint.partition import RankLayout
    from helix_megatron.inference import model_flags as describe

    tensor = _tensor_parallel_size(options["tensor_model_parallel_size"], world_size)
    if _by_transformers(options):
        return _transformers_config(options, world_size)
    checkpoint = describe.open_description(
        options["load"], options["ckpt_step"], trust=options["trust_checkpoint"]
    )
    if checkpoint.kind != "huggingface" and _needs_transformers(checkpoint, options):
        return _transformers_config(options, world_size, checkpoint)
    given = {name: options[name] for name in OVERRIDES if name in options}
    notes: list[str] = []
    model = describe.with_overrides(checkpoint, given, notes.append)
    model, segments = describe.cut_heads(
        checkpoint,
        model,
        tensor,
        options["intra_head_parallel_size"],
        options["helix_attention"],
        options["helix_query_layout"],
        notes.append,
    )
    helix = HelixConfig(
        segments, options["helix_attention"], query_layout=options["helix_query_layout"]
    )
    expert, expert_tensor = describe.deal_experts(
        model,
        tensor,
        options["expert_model_parallel_size"],
        options["expert_tensor_parallel_size"],
        notes.append,
    )
    stock = model if segments == 1 or helix.attention == "exact" else model.cut_heads(segments)
    # Whether every tensor can be cut for the ranks is known before one starts.
    RankLayout(stock.to_flags(), tensor, 1, expert, expert_tensor, helix)
    dtype = describe.precision(checkpoint, options["dtype"])
    if checkpoint.packing:
        notes.append(f"Weights are read from {checkpoint.packing} and kept in {dtype}.")
    run = RunConfig(
        dataclasses.replace(
            model,
            seq_length=describe.sequence_length(model, tensor),
            attention_dropout=0.0,
            hidden_dropout=0.0,
            transformer_impl=given.get("transformer_impl"),
        ),
        world_size,
        helix,
        Parallelism(
            tensor_model_parallel_size=tensor,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            sequence_parallel=model.num_experts is not None and tensor > 1,
            distributed_backend=options["distributed_backend"],
            distributed_timeout_minutes=options["distributed_timeout_minutes"],
        ),
        Training(
            micro_batch_size=1, seed=options["seed"], bf16=dtype == "bf16", fp16=dtype == "fp16"
        ),
    )
    return InferenceConfig(
        run.with_padded_vocabulary(),
        dtype,
        str(checkpoint.directory),
        checkpoint.kind,
        options["tokenizer"],
        options["trust_checkpoint"],
        tuple(notes),
    )


def _by_transformers(options: Mapping[str, Any]) -> bool:
    """Whether what is loaded is a Hugging Face model that the code of `transformers` computes."""
    from helix_megatron.checkpoint.foreign import read_json
    from helix_megatron.checkpoint.huggingface_io import snapshot_of
    from helix_megatron.model.families import FAMILIES
    from helix_megatron.model.families.towers import text_config

    path = Path(options["load"])
    config = snapshot_of(path) / "config.json" if path.is_dir() else path
    asked = options["implementation"]
    if not config.is_file():
        return False
    content = read_json(config)

    def known(config: Mapping[str, Any]) -> bool:
        kind = config.get("model_type")
        return not isinstance(kind, str) or (kind in FAMILIES and FAMILIES[kind].runs_in_engine)

    text = text_config(content)
    if asked == "megatron" and not known(text):
        raise HelixError(
            f"--implementation megatron does not compute models of type {text['model_type']}. Leave the flag "
            "out."
        )
    # The engine has no pages for what megatron-core makes of latents, and no states.
    layers = content.get("layer_types")
    linear = isinstance(layers, list) and "linear_attention" in layers
    other = not known(content) or content.get("kv_lora_rank") or linear
    return asked == "transformers" or (asked == "auto" and bool(other))


def _needs_transformers(checkpoint: Source, options: Mapping[str, Any]) -> bool:
    """Whether the code of `transformers` computes a checkpoint of training, as a Hugging Face model."""
    from helix_megatron.inference.model_flags import beyond_the_engine

    given = {name: options[name] for name in OVERRIDES if options.get(name) is not None}
    beyond, asked = beyond_the_engine(checkpoint.flags | given), options["implementation"]
    if beyond and asked == "megatron":
        raise HelixError(
            f"--implementation megatron does not compute models with {beyond}, as {checkpoint.directory} holds "
            "one. Leave the flag out."
        )
    return asked == "transformers" or bool(beyond)


def _transformers_config(
    options: Mapping[str, Any], world_size: int, checkpoint: Source | None = None
) -> InferenceConfig:
    """A Hugging Face model, or a checkpoint of training that becomes one as it is read."""
    from helix_megatron.checkpoint.huggingface_io import snapshot_of
    from helix_megatron.inference import model_flags
    from helix_megatron.inference.transformers_load import describe, describe_checkpoint

    if checkpoint is None and options["ckpt_step"] is not None:
        raise HelixError(
            f"--ckpt-step {options['ckpt_step']}: {options['load']} is a Hugging Face model, which has no "
            "iterations. Leave it out."
        )
    wrong = [name for name in OVERRIDES if options.get(name) is not None]
    wrong += [
        name
        for name in ("expert_model_parallel_size", "expert_tensor_parallel_size")
        if options[name] is not None
    ]
    if options["helix_attention"] != "exact":
        wrong.append("helix_attention")
    if options["helix_query_layout"] == "segments":
        wrong.append("helix_query_layout")
    if wrong:
        raise HelixError(
            f"{listed(map(flag_of, wrong))}: the code of transformers computes this model as its configuration "
            "says, with whole query heads, and cuts every expert. Leave it out."
        )
    notes: list[str] = []
    if checkpoint is None:
        path, kind = snapshot_of(Path(options["load"])), "huggingface"
        described = describe(path)
        dtype = model_flags.precision_of_files(path, options["dtype"])
    else:
        path, kind = checkpoint.directory, checkpoint.kind
        described = describe_checkpoint(checkpoint)
        heads = checkpoint.flags["num_attention_heads"]
        model_flags.note_segment_local(checkpoint, heads, notes.append)
        dtype = model_flags.precision(checkpoint, options["dtype"])
    segments = described.segments(world_size, options["intra_head_parallel_size"])
    note = (
        f"The model is computed by the code of transformers, cut for {counted(world_size, 'rank')}"
    )
    if described.latent_dim is not None:
        note += "; its latents are kept once on all of them together"
    elif segments > 1:
        note += f"; every key-value head is cut into {segments} segments"
    return InferenceConfig(
        TransformersRun(
            described,
            world_size,
            segments,
            Parallelism(
                distributed_backend=options["distributed_backend"],
                distributed_timeout_minutes=options["distributed_timeout_minutes"],
            ),
        ),
        dtype,
        str(path),
        kind,
        options["tokenizer"],
        options["trust_checkpoint"],
        (f"{note}.", *notes),
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument(
        "--tensor-model-parallel-size",
        type=RANKS,
        help="tensor parallel ranks p = m·n (default: the number of ranks, and no other is possible)",
    )
    group.add_argument(
        "--intra-head-parallel-size",
        type=_segments,
        default="auto",
        metavar="M",
        help="segments m into which every key-value head is cut; auto is 1 where the heads divide by the "
        "ranks, else the smallest that fits (default: %(default)s)",
    )
    helps = {setting.name: setting.metadata for setting in dataclasses.fields(HelixConfig)}
    for flag, name in (
        ("--helix-attention", "attention"),
        ("--helix-query-layout", "query_layout"),
    ):
        group.add_argument(
            flag,
            choices=helps[name]["choices"],
            default=getattr(HelixConfig(), name),
            help=f"{helps[name]['help']} (default: %(default)s)",
        )
    group.add_argument(
        "--expert-model-parallel-size",
        type=RANKS,
        help="ranks among which experts are dealt (default: all of them where the experts divide by them, "
        "else 1)",
    )
    group.add_argument(
        "--expert-tensor-parallel-size",
        type=RANKS,
        help="tensor parallel ranks inside an expert (default: 1 where experts are dealt, else all)",
    )
    add_flags(group, Parallelism, RANK_SETTINGS)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    """Without defaults, so that what was given can be told from what was not."""
    group = parser.add_argument_group(
        "model",
        "for checkpoints of stock Megatron, which do not say everything about their model; others do",
    )
    add_flags(group, ModelConfig, OVERRIDES, defaults=False)


def _segments(text: str) -> int | str:
    return text if text == "auto" else int(RANKS(text))


def _tensor_parallel_size(tensor: int | None, world_size: int) -> int:
    if tensor is None:
        return world_size
    if tensor != world_size:
        raise HelixError(
            f"--tensor-model-parallel-size {tensor} and {world_size} ranks: one copy of the model lies on all "
            f"ranks, there are no data and no pipeline parallel ones. Start {tensor} ranks (--nproc-per-node "
            f"{tensor}, or torchrun's), or leave --tensor-model-parallel-size out."
        )
    return tensor
