"""The library's `Trainer` for sharded models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from helix_megatron.errors import HelixError
from helix_megatron.huggingface import upstream
from helix_megatron.huggingface.gradients import clip_grad_norm_
from helix_megatron.huggingface.save import save_pretrained
from helix_megatron.huggingface.sharding import sharding_of


class ShardedTrainer(Trainer):
    """`transformers.Trainer` that trains a sharded model: every rank gets every batch.

    Takes the arguments of `Trainer`. All ranks of the world hold one model together. What differs: batches are
    not dealt to ranks, gradient norms are those of the whole model, and `save_model` gathers whole weights.
    With a model that is not sharded it is `Trainer`.

    Raises:
        HelixError: `save_strategy` asks for checkpoints, whose optimizer state would be one rank's only.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        sharding = sharding_of(model)
        if sharding is not None:
            _check(args, sharding.plan.num_ranks)
            upstream.require_trainer()
            ranks = sharding.plan.num_ranks
            args.parallelism_config = _tensor_parallelism(ranks)
            args.average_tokens_across_devices = True  # only so does the library count tokens once
            # accelerate asks the model how it was sharded, and would wrap it for data parallelism otherwise.
            model.config.distributed_config = {"tp_size": ranks}
        super().__init__(model=model, args=args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights in `output_dir`, as plain `transformers` loads them. Every rank calls it."""
        if sharding_of(self.model) is None:
            super().save_model(output_dir, _internal_call)
            return
        directory = str(output_dir or self.args.output_dir)
        save_pretrained(self.model, directory)
        if self.processing_class is not None and self.args.should_save:
            self.processing_class.save_pretrained(directory)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's own, without its factor for replicas, for which transformers 5.2 takes all ranks."""
        asked = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices &= sharding_of(self.model) is None
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.args.average_tokens_across_devices = asked

    def create_accelerator_and_postprocess(self) -> None:
        """As the library's own; then norms of gradients, with and without clipping, are the whole model's.

        All releases of the library ask `Accelerator.clip_grad_norm_` for norms, each in another method.
        """
        super().create_accelerator_and_postprocess()
        sharding, accelerator = sharding_of(self.model), self.accelerator

        def clip(parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor:
            assert sharding is not None and norm_type == 2
            accelerator.unscale_gradients()
            return clip_grad_norm_(parameters, max_norm, sharding.tensor_group)

        if sharding is not None:
            accelerator.clip_grad_norm_ = clip


def _tensor_parallelism(ranks: int) -> Any:
    from accelerate import DistributedType, ParallelismConfig

    class TensorParallelism(ParallelismConfig):
        """accelerate 1.15 refuses to start on CPU ranks (parallelism_config.py:389), and then works on them."""

        def _validate_accelerator(self, accelerator: Any) -> None:
            if accelerator.distributed_type != DistributedType.MULTI_CPU:
                super()._validate_accelerator(accelerator)

    return TensorParallelism(tp_size=ranks)


def _check(args: Any, ranks: int) -> None:
    if args is None:
        raise HelixError(
            "training a sharded model needs its settings. Pass args=TrainingArguments(..., save_strategy='no')."
        )
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy != "no":
        raise HelixError(
            f"save_strategy {strategy!r} would keep one rank's part of the optimizer state. Valid: 'no'. Call "
            "trainer.save_model(directory) on every rank for the weights, or train with "
            "helix_megatron.deepspeed for checkpoints that training resumes from."
        )
    if args.world_size != ranks:
        raise HelixError(
            f"{args.world_size} ranks train, and {ranks} hold the model together. Start as many ranks as hold "
            "the model; for replicas of it train with helix_megatron.deepspeed."
        )
