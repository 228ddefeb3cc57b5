"""What describes a training run beside its model: small tables of settings, each of which is a group of flags.

Metadata beside what `flags.setting` knows: `decides` (`LOSSES` where the setting decides the losses),
`megatron` and `optimizer` (True where TransformerConfig or OptimizerConfig has the setting under its name).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import listed, setting_error
from helix_megatron.flags import (
    INPUT,
    INPUT_DIRECTORY,
    INPUT_FILE,
    OUTPUT_DIRECTORY,
    OUTPUT_FILE,
    check_values,
    names_with,
    setting,
)

LOSSES = "losses"
FP32_MAX = 3.4e38


class _Checked:
    """A table of settings whose values are checked one by one when it is made."""

    def __post_init__(self) -> None:
        check_values(self)


def _losses(default: Any, help_text: str, **facts: Any) -> Any:
    own: dict[str, Any] = {"decides": LOSSES, "optimizer": True}
    return setting(default, help_text, **own | facts)


@dataclass(frozen=True)
class Parallelism(_Checked):
    """How the run is dealt to ranks, and how they reach each other."""

    tensor_model_parallel_size: int = setting(
        1, "number of tensor parallel ranks p = m·n", megatron=True
    )
    pipeline_model_parallel_size: int = setting(1, "number of pipeline stages", megatron=True)
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, "layers of a virtual stage, for the interleaved schedule"
    )
    context_parallel_size: int = setting(
        1, "number of ranks to which each sequence is dealt", megatron=True
    )
    cp_comm_type: str | None = setting(
        None,
        "how context parallel ranks communicate: all_gather, or with Transformer Engine any, of which p2p is "
        "its own choice",
        choices=("p2p", "all_gather", "a2a"),
        megatron=True,
    )
    expert_model_parallel_size: int = setting(
        1, "number of ranks among which experts are dealt", megatron=True
    )
    expert_tensor_parallel_size: int | None = setting(
        None, "number of tensor parallel ranks inside an expert", megatron=True
    )
    sequence_parallel: bool = setting(
        False,
        "cut the sequence outside attention and MLP over the tensor parallel ranks",
        megatron=True,
    )
    use_distributed_optimizer: bool = setting(
        False, "cut the optimizer state over data parallel ranks", optimizer=True
    )
    overlap_grad_reduce: bool = setting(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = setting(
        False, "gather parameters during the forward pass", optimizer=True
    )
    distributed_backend: str = setting(
        "auto", "back end; auto is nccl on GPUs and gloo without", choices=("auto", "nccl", "gloo")
    )
    distributed_timeout_minutes: float = setting(
        10.0, "a collective that takes longer ends the program with a message", above=0
    )
    nproc_per_node: int | None = setting(
        None,
        "start this many ranks on this machine, as torchrun would; leave it out under a launcher",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cp_comm_type is not None and self.context_parallel_size == 1:
            raise setting_error(
                f"<cp_comm_type> {self.cp_comm_type} is for context parallel ranks, and there is one. Leave it "
                "out, or raise <context_parallel_size>."
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise setting_error(
                "<overlap_param_gather> needs <use_distributed_optimizer> and <overlap_grad_reduce>. Add them."
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise setting_error(
                "<sequence_parallel> cuts the sequence over the tensor parallel ranks, and there is one. Leave "
                "it out, or raise <tensor_model_parallel_size>."
            )

    @property
    def sequence_parts(self) -> int:
        """Parts into which sequence parallelism cuts a context-parallel rank's positions."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1


@dataclass(frozen=True)
class Training(_Checked):
    """Batches, iterations, random numbers, precision and recomputation."""

    micro_batch_size: int = setting(
        4,
        "samples of a forward pass on one data parallel rank",
        decides=LOSSES,
        under="balanced micro-batches",
    )
    global_batch_size: int | None = setting(
        None, "samples of an iteration; one micro-batch per rank when not given", decides=LOSSES
    )
    train_iters: int = setting(50, "number of iterations")
    seed: int = setting(
        1234, "seed of weights, data order and dropout, the same at every layout", decides=LOSSES
    )
    bf16: bool = setting(False, "train in bf16", megatron=True, optimizer=True)
    fp16: bool = setting(False, "train in fp16 with loss scaling", megatron=True, optimizer=True)
    no_check_for_nan_in_loss_and_grad: bool = setting(
        False,
        "go on after a loss or a gradient norm that is NaN or infinite; such a state is never saved",
    )
    recompute_granularity: str | None = setting(
        None,
        "recompute core attention, or whole layers, in the backward pass",
        choices=("selective", "full"),
        megatron=True,
    )
    recompute_method: str = setting(
        "uniform", "which layers are recomputed, with full", choices=("uniform", "block")
    )
    recompute_num_layers: int = setting(1, "layers of a recomputed unit, with full")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 and self.fp16:
            raise setting_error("<bf16> and <fp16> exclude each other. Leave one out.")

    @property
    def precision(self) -> str:
        """The dtype of forward and backward."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class Optimization(_Checked):
    """The optimizer, and the schedule of its learning rate."""

    optimizer: str = _losses("adam", "optimizer", choices=("adam", "sgd"))
    lr: float = _losses(1e-3, "highest learning rate", largest=1e36)
    min_lr: float = _losses(0.0, "lowest learning rate")
    lr_decay_style: str = _losses(
        "cosine",
        "decay of the learning rate",
        choices=("constant", "linear", "cosine"),
        optimizer=False,
    )
    lr_warmup_iters: int = _losses(0, "iterations of linear warm-up", at_least=0, optimizer=False)
    lr_decay_iters: int | None = _losses(
        None, "iterations of decay; --train-iters when not given", optimizer=False
    )
    weight_decay: float = _losses(0.01, "weight decay")
    adam_beta1: float = _losses(0.9, "Adam's beta 1", below=1, under="adam")
    adam_beta2: float = _losses(0.999, "Adam's beta 2", below=1, under="adam")
    adam_eps: float = _losses(1e-8, "Adam's epsilon", above=0, under="adam")
    clip_grad: float = _losses(1.0, "largest gradient norm; 0 clips nothing")
    loss_scale: float | None = _losses(
        None, "fixed loss scale for fp16; dynamic when not given", above=0, under="fp16"
    )
    initial_loss_scale: float = _losses(2.0**32, "first dynamic loss scale", above=0, under="fp16")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise setting_error(
                f"<min_lr> {self.min_lr:g} is above <lr> {self.lr:g}. The first is the lowest learning rate "
                "and the second the highest: lower the one, or raise the other."
            )
        # What Adam computes of them for its first step, in fp32.
        factor = max(1 / (1 - self.adam_beta1), self.weight_decay, 1)
        if self.lr * factor > FP32_MAX:
            raise setting_error(
                f"<lr> {self.lr:g} with <adam_beta1> {self.adam_beta1:g} and <weight_decay> "
                f"{self.weight_decay:g} makes steps beyond the numbers of fp32. Lower it below "
                f"{FP32_MAX / factor:.1g}."
            )
        decay = self.lr_decay_iters
        if decay is not None and self.lr_warmup_iters >= decay:
            raise setting_error(
                f"<lr_warmup_iters> {self.lr_warmup_iters} must be less than <lr_decay_iters>, "
                f"which is {decay} (<train_iters> when not given). Lower it."
            )


@dataclass(frozen=True)
class Data(_Checked):
    """What is trained on."""

    text: tuple[str, ...] | None = setting(
        None,
        "text files, read as bytes; the Python language reference when neither this nor --data-path is given",
        parse=INPUT_FILE,
        several=True,
        decides=LOSSES,
    )
    data_path: tuple[str, ...] | None = setting(
        None,
        "prefix of Megatron's .bin/.idx, or weights and prefixes",
        parse=INPUT,
        several=True,
        decides=LOSSES,
    )
    data_cache_path: str | None = setting(
        None, "directory for the indices of --data-path", parse=OUTPUT_DIRECTORY
    )
    tokenizer_type: str | None = setting(
        None,
        "tokenizer of --data-path; byte without --tokenizer-model",
        choices=("HuggingFaceTokenizer", "byte"),
    )
    tokenizer_model: str | None = setting(
        None, "a Hugging Face tokenizers file (tokenizer.json)", parse=INPUT_FILE
    )
    split: str = setting("969,30,1", "shares for training, validation and test", decides=LOSSES)
    packed_documents: bool = setting(
        False,
        "each document of --data-path attends to itself only, and its positions begin at 0: as if it were a "
        "sequence of its own, without padding",
        decides=LOSSES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text", "data_path"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.text and self.data_path:
            raise setting_error("<text> and <data_path> exclude each other. Leave one out.")
        if self.packed_documents and not self.data_path:
            raise setting_error(
                "<packed_documents> needs the documents of <data_path>: text is one long sequence. Make them "
                "with scripts/preprocess_data.py and <append_eod>, or leave it out."
            )


@dataclass(frozen=True)
class Checkpoints(_Checked):
    """What is saved and loaded, and when the run ends early.

    `load_path` is the directory that `load` means, None where a run starts anew; `load_iteration` is the
    checkpoint's, as far as its manifest tells.
    """

    save: str | None = setting(
        None,
        "directory for checkpoints; one is also saved after the last iteration",
        parse=OUTPUT_DIRECTORY,
    )
    save_interval: int | None = setting(None, "save every so many iterations")
    keep: int | None = setting(
        None, "keep the newest so many checkpoints; all of them when not given"
    )
    async_save: bool = setting(
        False,
        "write in the background while training goes on; a checkpoint is complete some iterations later",
    )
    no_save_optim: bool = setting(False, "save no optimizer state")
    no_save_rng: bool = setting(False, "save no random states")
    load: str | None = setting(
        None,
        "directory of checkpoints to go on from: of this script, of stock Megatron, or converted; saved at any "
        "layout. With the directory of --save a first start finds nothing and begins anew",
        parse=INPUT_DIRECTORY,
    )
    ckpt_step: int | None = setting(
        None, "load the checkpoint of this iteration; the newest when not given", at_least=0
    )
    exit_on_missing_checkpoint: bool = setting(
        False, "do not begin anew where --load finds nothing"
    )
    no_load_optim: bool = setting(False, "load no optimizer state")
    no_load_rng: bool = setting(False, "load no random states")
    finetune: bool = setting(False, "load weights only, and begin at iteration 0")
    use_checkpoint_args: bool = setting(False, "take the model's flags from the checkpoint")
    override_opt_param_scheduler: bool = setting(
        False, "take learning rate and weight decay of this command, not the checkpoint's"
    )
    use_checkpoint_opt_param_scheduler: bool = setting(
        False, "take learning rate and weight decay of the checkpoint, not this command's"
    )
    trust_checkpoint: bool = setting(
        False,
        "read pickles that could run code of whoever wrote them; only for files that are your own",
    )
    allow_quality_loss: bool = setting(
        False, "load ordinary weights into segment-local attention, which is another architecture"
    )
    exit_interval: int | None = setting(None, "end after an iteration that is a multiple of this")
    exit_duration_in_mins: float | None = setting(
        None, "save and end after so many minutes", above=0
    )
    exit_signal_handler: bool = setting(False, "save and end on SIGTERM; at once on one 5 s later")
    load_path: str | None = setting(None, "", is_flag=False)
    load_iteration: int = setting(0, "", at_least=0, is_flag=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for names, target, problem in (
            (("save_interval", "async_save", "keep"), "save", "nowhere to save to"),
            (("ckpt_step", "use_checkpoint_args", "finetune"), "load", "nothing to load"),
        ):
            given = [f"<{name}>" for name in names if getattr(self, name) not in (None, False)]
            if given and not getattr(self, target):
                raise setting_error(
                    f"{listed(given)} without <{target}>: there is {problem}. Add <{target}>, a directory."
                )


@dataclass(frozen=True)
class Logging(_Checked):
    """What the run tells."""

    log_interval: int = setting(
        10, "print every so many iterations where a line cannot be rewritten"
    )
    eval_interval: int = setting(
        0, "validate every so many iterations, and after the last; 0 never", at_least=0
    )
    eval_iters: int = setting(5, "batches of a validation", at_least=0)
    metrics_jsonl: str | None = setting(
        None, "write one JSON object per iteration to this file", parse=OUTPUT_FILE
    )
    tensorboard_dir: str | None = setting(
        None, "write TensorBoard events to this directory", parse=OUTPUT_DIRECTORY
    )
    wandb_project: str | None = setting(None, "log to this Weights & Biases project")
    run_name: str | None = setting(None, "name of the run in tables and reports")
    log_communication_time: str = setting(
        "auto",
        "time collectives: total, each one, without overlap; exposed, only while computation waits for it; "
        "auto is total on CPU and off on a GPU",
        choices=("auto", "total", "exposed", "off"),
    )
    check: bool = setting(False, "check everything that can be checked without starting, then stop")
    explain: bool = setting(
        False, "like --check, and show the groups of ranks and the choice of exchange"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_interval and not self.eval_iters:
            raise setting_error(
                f"<eval_interval> {self.eval_interval} validates, and <eval_iters> 0 gives it no batches. "
                "Leave either out."
            )


def same_named(settings: Any, reader: str) -> dict[str, Any]:
    """The values of the fields that `reader` (`megatron`, `optimizer`) has under the same name."""
    return {name: getattr(settings, name) for name in names_with(type(settings), **{reader: True})}
