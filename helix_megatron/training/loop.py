"""The training loop, on Megatron's pipeline schedules."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

from helix_megatron.core.meter import EXCHANGE, Meter
from helix_megatron.megatron.context_parallel import PURPOSE as CONTEXT
from helix_megatron.megatron.random import enter_micro_batch
from helix_megatron.run.config import RunConfig
from helix_megatron.training.metrics import GpuUtilization, IterationMetrics, memory_bytes
from helix_megatron.training.micro_batch import Batch, model_inputs, own_batch

# What Megatron's router calls the losses that balance experts.
LOSSES_OF_EXPERTS = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


@dataclass
class Trainer:
    """All that an iteration needs. `train` runs them and yields what each measured."""

    run: RunConfig
    config: Any
    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    meter: Meter

    def __post_init__(self) -> None:
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if self.run.parallel.overlap_grad_reduce:
            self.config.no_sync_func = [chunk.no_sync for chunk in self.chunks]
            if len(self.chunks) == 1:
                self.config.no_sync_func = self.config.no_sync_func[0]
        self._forward_backward = get_forward_backward_func()
        self._gpu = GpuUtilization()

    def train(
        self,
        batches: Iterator[Batch],
        validation: Any | None = None,
        *,
        iteration: int = 0,
        consumed_samples: int = 0,
    ) -> Iterator[IterationMetrics]:
        """Run the iterations up to `--train-iters`.

        Args:
            batches: this data parallel rank's micro-batches, without end.
            validation: a function that returns a fresh iterator of validation micro-batches, or None.
            iteration, consumed_samples: where a resumed run has stopped.
        """
        run, start = self.run, time.perf_counter()
        while iteration < run.training.train_iters:
            iteration += 1
            consumed_samples += run.global_batch_size
            began = time.perf_counter()
            self.meter.reset()
            learning_rate = self.optimizer.param_groups[0]["lr"]  # before the schedule goes on
            loss, norm, updated = self._step(batches, iteration)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            extra = self._expert_losses()
            traffic = self._traffic(seconds)
            validation_loss = None
            if validation is not None and self._validates(iteration):
                validation_loss = self._evaluate(validation())
            yield IterationMetrics(
                iteration=iteration,
                lm_loss=loss,
                grad_norm=norm,
                learning_rate=learning_rate,
                loss_scale=float(self.optimizer.get_loss_scale().item()),
                skipped=not updated,
                memory_bytes=memory_bytes(),
                consumed_samples=consumed_samples,
                consumed_tokens=consumed_samples * run.model.seq_length,
                elapsed_seconds=time.perf_counter() - start,
                validation_loss=validation_loss,
                gpu_utilization=self._gpu.read(),
                extra_losses=extra,
                **traffic,
            )

    def _step(self, batches: Iterator[Batch], iteration: int) -> tuple[float, float | None, bool]:
        """One optimizer step: mean loss over the global batch, gradient norm, whether it was taken."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(batches, iteration, self.run.num_micro_batches, train=True)
        updated, norm, _ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=self.run.global_batch_size)
        return self._mean_loss(losses), None if norm is None else float(norm), bool(updated)

    def _run(
        self, batches: Iterator[Batch], iteration: int, number: int, *, train: bool
    ) -> list[dict[str, Tensor]]:
        """Forward (and backward) over `number` micro-batches, in Megatron's schedule."""
        run, mine = self.run, list(itertools.islice(batches, number))
        rank, ranks = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        numbered = [(index * ranks + rank, batch) for index, batch in enumerate(mine)]
        # Each virtual stage reads the same micro-batches.
        iterators = [iter(numbered) for _ in self.chunks]

        def forward_step(iterator: Iterator[tuple[int, Batch]], model: Any) -> tuple[Tensor, Any]:
            index, batch = next(iterator)
            if run.model.hidden_dropout:
                enter_micro_batch(run.training.seed, iteration, index)
            device = torch.cuda.current_device()
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            own = own_batch(
                batch, packs=run.data.packed_documents, unit=run.parallel.sequence_parts
            )
            output = model(**model_inputs(own))
            return output, lambda losses: masked_mean(losses, own.tensors["loss_mask"], own.counted)

        return self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=number,
            seq_length=run.row_length,
            micro_batch_size=run.rows,
            forward_only=not train,
        )

    @torch.no_grad()
    def _evaluate(self, batches: Iterator[Batch]) -> float:
        for chunk in self.chunks:
            chunk.eval()
        number = self.run.logging.eval_iters * self.run.num_micro_batches
        losses = self._run(batches, 0, number, train=False)
        for chunk in self.chunks:
            chunk.train()
        moe_utils.clear_aux_losses_tracker()
        return self._mean_loss(losses)

    def _validates(self, iteration: int) -> bool:
        interval = self.run.logging.eval_interval
        return interval > 0 and (
            iteration % interval == 0 or iteration == self.run.training.train_iters
        )

    def _mean_loss(self, losses: list[dict[str, Tensor]]) -> float:
        """Mean over micro-batches and data parallel ranks, of all parts of sequences; equal on all ranks."""
        device = torch.cuda.current_device()
        total = torch.zeros(1, dtype=torch.float64, device=device)
        if losses:  # the last pipeline stage has them
            total += torch.stack([loss["lm loss"].double() for loss in losses]).mean()
        everywhere = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(total, group=everywhere)
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
        return total.item() / parallel_state.get_data_parallel_world_size()

    def _expert_losses(self) -> dict[str, float]:
        """Mean over MoE layers of the load-balancing losses; none in a dense model."""
        if self.run.model.num_experts is None:
            return {}
        self._count_absent_experts()
        moe_utils.reduce_aux_losses_tracker_across_ranks()
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        layers = sum(self.run.model.moe_layers)
        scale = self.run.num_micro_batches * layers
        losses = {name: float(entry["values"].sum()) / scale for name, entry in tracker.items()}
        moe_utils.clear_aux_losses_tracker()
        return losses

    def _count_absent_experts(self) -> None:
        """A pipeline stage without experts has a loss of zero: Megatron sums those of all stages by name."""
        model = self.run.model
        name = LOSSES_OF_EXPERTS.get(model.moe_router_load_balancing_type)
        if name and model.moe_aux_loss_coeff:
            moe_utils.save_to_aux_losses_tracker(
                name,
                torch.zeros((), device=torch.cuda.current_device()),
                1,
                self.config.num_layers,
                reduce_group=parallel_state.get_tensor_and_context_parallel_group(),
            )

    def _traffic(self, seconds: float) -> dict[str, float]:
        inside = self.meter.bytes(EXCHANGE) + self.meter.bytes(CONTEXT)
        total = self.meter.bytes()
        return {
            "tokens_per_second": self.run.tokens_per_iteration / seconds,
            "iteration_ms": seconds * 1e3,
            "comm_ms_per_token": self.meter.seconds() * 1e3 / self.run.tokens_per_iteration,
            "attention_bytes_per_token": inside / self.run.tokens_per_iteration,
            "other_bytes_per_token": (total - inside) / self.run.tokens_per_iteration,
        }


def masked_mean(
    losses: Tensor, loss_mask: Tensor, counted: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's share in the mean loss of a micro-batch, over the tokens that count on all its ranks."""
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum() / counted.float().clamp(min=1)
    # The schedule divides the first in place.
    return loss, {"lm loss": loss.detach().clone()}
