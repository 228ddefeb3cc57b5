"""From a run to Megatron's optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from helix_megatron.megatron.gpt import parameter_dtype
from helix_megatron.run.config import RunConfig
from helix_megatron.run.settings import same_named


def build_optimizer(run: RunConfig, chunks: list[Any]) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's optimizer (apex's or Transformer Engine's Adam if there, else torch's) and schedule."""
    settings: dict[str, Any] = {}
    for group in (run.parallel, run.training, run.optimization):
        settings |= same_named(group, "optimizer")
    config = OptimizerConfig(**settings, params_dtype=parameter_dtype(run.training))
    optimizer = get_megatron_optimizer(config, chunks)
    return optimizer, OptimizerParamScheduler(optimizer, **schedule_settings(run))


def schedule_settings(run: RunConfig) -> dict[str, Any]:
    """What Megatron's scheduler of learning rate and weight decay is told; its steps are samples."""
    own, batch = run.optimization, run.global_batch_size
    assert own.lr_decay_iters is not None
    return {
        "init_lr": 0.0,
        "max_lr": own.lr,
        "min_lr": own.min_lr,
        "lr_warmup_steps": own.lr_warmup_iters * batch,
        "lr_decay_steps": own.lr_decay_iters * batch,
        "lr_decay_style": own.lr_decay_style,
        "start_wd": own.weight_decay,
        "end_wd": own.weight_decay,
        "wd_incr_steps": run.training.train_iters * batch,
        "wd_incr_style": "constant",
        "override_opt_param_scheduler": run.checkpoints.override_opt_param_scheduler,
        "use_checkpoint_opt_param_scheduler": run.checkpoints.use_checkpoint_opt_param_scheduler,
    }
