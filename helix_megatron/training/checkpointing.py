"""Saving and resuming a training run: weights, optimizer, schedule, random states, place in the data.

The state dictionary has the entries that Megatron-LM's own checkpoints have, so each loads the other's.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as megatron_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.utils import unwrap_model

from helix_megatron.checkpoint.manifest import Manifest
from helix_megatron.checkpoint.run_lock import sole_run
from helix_megatron.checkpoint.source import SIDECARS, side_files
from helix_megatron.checkpoint.store import Store, is_same_directory
from helix_megatron.errors import DivergenceError, HelixError, listed
from helix_megatron.megatron import dist_checkpoint, torch_adam
from helix_megatron.megatron.finite import check_finite
from helix_megatron.megatron.optimizer_state import (
    PARTS,
    load_optimizer,
    optimizers_of,
    take_schedule,
)
from helix_megatron.megatron.random import random_states, restore_random_states
from helix_megatron.megatron.segment_local import as_segment_local
from helix_megatron.run.config import RunConfig
from helix_megatron.run.outcomes import on_every_rank, on_first_rank
from helix_megatron.training.checkpoint_flags import (
    QUALITY,
    converts_to_segment_local,
    stored_arguments,
)
from helix_megatron.training.metrics import software_versions
from helix_megatron.training.resumed import check_schedule, data_facts, differing_data

TRAINED_ON = "trained_on"  # in a manifest
CHECKPOINT_VERSION = 3.0  # Megatron-LM's number for the order of rows that megatron-core has


@dataclass
class Progress:
    """How far a run is."""

    iteration: int = 0
    consumed_samples: int = 0


class Checkpointing:
    """Loads where `--load` says, saves where `--save` says, and knows when to stop early; a context manager.

    Args:
        run: validated.
        chunks: the model's chunks of this rank, in DDP.
        optimizer, scheduler: of `build_optimizer`.
        note: where to say what was loaded and saved.

    Entering raises `HelixError` where `--save` cannot be written to, or another run saves there.
    """

    def __init__(
        self,
        run: RunConfig,
        chunks: list[Any],
        optimizer: Any,
        scheduler: Any,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.run, self.optimizer, self.scheduler = run, optimizer, scheduler
        self._note = note
        self.chunks = unwrap_model(chunks)
        self._began = time.monotonic()
        self._saver: dist_checkpoint.CheckpointSaver | None = None
        settings = run.checkpoints
        if settings.save:
            store = Store(settings.save)
            self._saver = dist_checkpoint.CheckpointSaver(
                store,
                asynchronous=settings.async_save,
                saved=self._was_saved,
            )
        self._data_facts = on_first_rank(lambda: data_facts(run))
        self._directory = contextlib.ExitStack()
        self._saved = 0
        self._may_prune = False
        torch_adam.install()  # loading the distributed optimizer's state needs it, on GPUs too
        for part in optimizers_of(optimizer):
            if (
                part.init_state_fn is None
            ):  # megatron-core has none for SGD, and calls it when loading
                part.init_state_fn = _allocate_momentum

    def __enter__(self) -> Checkpointing:
        """Make the directory of --save, and keep other runs from it. Collective."""
        if self._saver is not None:
            on_first_rank(self._enter_directory)  # now, not after hours of training
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.close()

    def _enter_directory(self) -> None:
        assert self._saver is not None
        self._saver.store.prepare()
        self._directory.enter_context(sole_run(self._saver.store.root))

    # ------------------------------------------------------------------- resume

    def load(self) -> Progress:
        """Restore from `--load`; where a run starts anew, nothing happens. Collective.

        Raises:
            HelixError: a damaged checkpoint, or one of another model; the weights are as before.
        """
        run, settings = self.run, self.run.checkpoints
        if settings.load_path is None:
            return Progress()
        path = Path(settings.load_path)
        manifest = dist_checkpoint.verify(path, trust=settings.trust_checkpoint)
        saved = on_first_rank(
            lambda: stored_arguments(path, manifest, trust=settings.trust_checkpoint)
        )
        with_optimizer = not (settings.no_load_optim or settings.finetune)
        with_random = not (settings.no_load_rng or settings.finetune)
        state = self._state(
            Progress(), optimizer=with_optimizer, random=with_random, is_loading=True
        )
        if converts_to_segment_local(run, saved):
            if with_optimizer:
                raise HelixError(
                    "the optimizer's state of ordinary weights has no meaning for segment-local attention. "
                    "Add --finetune."
                )
            self._note(f"Warning: {QUALITY}.")
            state = as_segment_local(state, run.model, run.local_segments)
        loaded = dist_checkpoint.load(path, state, trust=settings.trust_checkpoint)
        for chunk, name in zip(self.chunks, self._model_keys, strict=True):
            chunk.load_state_dict(loaded[name])
        if with_optimizer:
            load_optimizer(self.optimizer, loaded[PARTS], loaded["optimizer"])
            batch = getattr(loaded.get("args"), "global_batch_size", None)
            self._load_schedule(loaded["opt_param_scheduler"], batch)
        elif run.training.precision != "fp32":
            self.optimizer.reload_model_params()  # the fp32 copies are still those of the start
        if with_random:
            self._load_random_states(loaded.get("rng_state"))
        on_first_rank(lambda: self._keep_side_files(path / SIDECARS))
        if settings.finetune:
            self._note(
                f"loaded the weights of {path}; data, iterations and the optimizer begin anew"
            )
            return Progress()
        iteration = int(loaded.get("iteration", 0))
        samples = saved.get("consumed_train_samples", iteration * run.global_batch_size)
        self._note(f"loaded {path}: iteration {iteration}")
        if iteration:
            self._compare_data(saved, int(samples))
        if iteration >= run.training.train_iters:
            self._note(f"nothing to train: --train-iters is {run.training.train_iters}")
        if settings.save and is_same_directory(settings.save, path.parent):
            self._saved = iteration
        return Progress(iteration, int(samples))

    def _keep_side_files(self, folder: Path) -> None:
        """Keep what came with a Hugging Face model for this run's checkpoints; it may remove that one."""
        if self._saver is not None:
            for name, file in side_files(folder).items():
                self._saver.side_files[name] = (
                    file if isinstance(file, bytes) else file.read_bytes()
                )

    def _compare_data(self, saved: dict[str, Any], consumed_samples: int) -> None:
        theirs = saved.get(TRAINED_ON, {}) | {"--seq-length": saved.get("seq_length")}
        theirs = {name: value for name, value in theirs.items() if value is not None}
        if difference := differing_data(theirs, self._data_facts, consumed_samples):
            self._note(difference)

    def _load_schedule(self, state: dict[str, Any], batch: int | None) -> None:
        """Take up the schedule where it was; `batch` is the checkpoint's global batch size, where known."""
        settings = self.run.checkpoints
        takes_theirs = settings.use_checkpoint_opt_param_scheduler
        if not (takes_theirs or settings.override_opt_param_scheduler):
            own = self.scheduler.state_dict()
            check_schedule(state, own, batch, self.run.global_batch_size)
        self.scheduler.load_state_dict(state)
        if takes_theirs:
            take_schedule(self.optimizer, self.scheduler)
        self.scheduler.step(0)  # the first step goes by the settings that hold from now on

    def _load_random_states(self, states: Any) -> None:
        fresh = random_states()
        if states and states[0]["cuda_rng_state"].shape == fresh["cuda_rng_state"].shape:
            restore_random_states(states[0])
        elif self.run.model.attention_dropout:
            self._note(
                "The checkpoint has no random states of this layout: attention dropout begins with those of "
                f"--seed {self.run.training.seed}."
            )

    # --------------------------------------------------------------------- save

    def after_iteration(self, progress: Progress, asked_to_end: Any = None) -> bool:
        """Save if it is time; whether the run should end now. Collective.

        Args:
            asked_to_end: an event that says so when any rank has it set.
        """
        settings, iteration = self.run.checkpoints, progress.iteration
        if self._saver is not None:
            self._saver.poll()
        self._prune()  # the newest checkpoint has shown in an iteration that it trains on
        interval = settings.exit_interval
        leave = interval is not None and iteration % interval == 0
        if settings.exit_duration_in_mins:
            minutes = (time.monotonic() - self._began) / 60
            leave |= self._any_rank(minutes >= settings.exit_duration_in_mins)
        if asked_to_end is not None:
            leave |= self._any_rank(asked_to_end.is_set())
        if settings.save_interval and iteration % settings.save_interval == 0:
            self.save(progress)
        return leave

    def save(self, progress: Progress) -> None:
        """Save now, unless this iteration is saved already. Collective."""
        if self._saver is None or self._saved == progress.iteration:
            return
        settings = self.run.checkpoints
        state = self._state(
            progress, optimizer=not settings.no_save_optim, random=not settings.no_save_rng
        )
        try:
            on_every_rank(lambda: check_finite(state))
        except HelixError as error:
            text = f"iteration {progress.iteration} is not saved: {error} {self.described()}"
            if not self.run.training.no_check_for_nan_in_loss_and_grad:
                raise DivergenceError(text) from error
            self._note(text)
            return
        self._saver.save(progress.iteration, state, self._manifest(progress))
        self._saved = progress.iteration

    def close(self) -> None:
        """Complete a save that runs in the background, and remove old checkpoints. Collective."""
        if self._saver is not None:
            self._saver.close()
        self._prune()

    def described(self) -> str:
        """Which checkpoints there are to go back to, as a sentence."""
        settings = self.run.checkpoints
        store = Store(settings.save) if settings.save else None
        if store is not None and (complete := store.complete()):
            text = f"The last good checkpoint is {store.path(complete[-1])}"
            earlier = f", and --ckpt-step takes an earlier one: {listed(complete[:-1])}"
            return text + (earlier if complete[:-1] else "") + "."
        if settings.load_path:
            return f"The last good checkpoint is {settings.load_path}."
        return "There is no checkpoint of this run."

    def _was_saved(self, path: Path) -> None:
        self._may_prune = True
        self._note(f"saved {path}")

    def _prune(self) -> None:
        """Remove what --keep does not keep, on the first rank.

        This waits for an iteration after a save: weights that are finite and trained to death would otherwise
        take the place of the last good ones.
        """
        keep = self.run.checkpoints.keep
        if keep is not None and self._may_prune and dist.get_rank() == 0:
            assert self._saver is not None
            self._saver.store.try_to_prune(keep)
        self._may_prune = False

    @staticmethod
    def _any_rank(here: bool) -> bool:
        flag = torch.tensor([int(here)], dtype=torch.int, device=torch.cuda.current_device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    # -------------------------------------------------------------------- state

    @property
    def _model_keys(self) -> list[str]:
        if len(self.chunks) == 1:
            return ["model"]
        return [f"model{index}" for index in range(len(self.chunks))]

    def _state(
        self, progress: Progress, *, optimizer: bool, random: bool, is_loading: bool = False
    ) -> dict[str, Any]:
        metadata = dist_checkpoint.sharding_metadata()
        state: dict[str, Any] = {
            name: chunk.sharded_state_dict(metadata=metadata)
            for name, chunk in zip(self._model_keys, self.chunks, strict=True)
        }
        if optimizer:
            state[PARTS if is_loading else "optimizer"] = self.optimizer.sharded_state_dict(
                dict(state), is_loading=is_loading, metadata=metadata
            )
        if random:
            state["rng_state"] = _sharded_random_states()
        if is_loading:
            return state
        if optimizer:
            state["opt_param_scheduler"] = self.scheduler.state_dict()
        return state | {
            "args": self._arguments(progress),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": progress.iteration,
        }

    def _arguments(self, progress: Progress) -> argparse.Namespace:
        """The arguments that Megatron-LM looks for, equal on all ranks."""
        parallel = self.run.parallel
        return argparse.Namespace(
            **self.run.stored_model.to_flags(),
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            world_size=self.run.world_size,
            global_batch_size=self.run.global_batch_size,
            consumed_train_samples=progress.consumed_samples,
            consumed_valid_samples=0,
            skipped_train_samples=0,
        )

    def _manifest(self, progress: Progress) -> Manifest:
        run = self.run
        optimizer = "distributed" if run.parallel.use_distributed_optimizer else "plain"
        return Manifest(
            kind="canonical",
            model=run.stored_model.to_flags(),
            attention="segment-local" if run.local_segments > 1 else "exact",
            segments=run.local_segments,
            iteration=progress.iteration,
            layout=run.sizes | {"optimizer": None if run.checkpoints.no_save_optim else optimizer},
            versions=software_versions(),
            extra={
                "consumed_train_samples": progress.consumed_samples,
                TRAINED_ON: self._data_facts,
            },
        )


def _allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give a fresh SGD the buffers that its first step would create."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and not optimizer.state[parameter]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def _sharded_random_states() -> ShardedObject:
    """This rank's random states, placed as Megatron-LM does: by stage and tensor parallel rank."""
    group = megatron_state
    place = [
        (group.get_pipeline_model_parallel_world_size(), group.get_pipeline_model_parallel_rank()),
        (group.get_tensor_model_parallel_world_size(), group.get_tensor_model_parallel_rank()),
    ]
    replica = group.get_data_parallel_rank(with_context_parallel=True)
    if group.get_expert_model_parallel_world_size() > 1:
        place.append((group.get_data_parallel_world_size(with_context_parallel=True), replica))
        replica = 0
    shape, offset = zip(*place, strict=True)
    return ShardedObject("rng_state", [random_states()], shape, offset, replica_id=replica)
