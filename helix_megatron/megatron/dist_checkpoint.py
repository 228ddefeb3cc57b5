"""Distributed checkpoints through megatron-core, made safe against crashes, damage and hostile files.

What is written is megatron-core's own `torch_dist` format, so stock megatron-core reads it and the reverse.
Added around it: a save goes to a staging directory that becomes a checkpoint only when a manifest with the
size and SHA-256 of every file is in it (`helix_megatron.checkpoint`); and before a load anything is verified,
pickles included, that megatron-core would trust.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as megatron_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint import safe
from helix_megatron.checkpoint.manifest import FileEntry, Manifest
from helix_megatron.checkpoint.source import SIDECARS, write_side_files
from helix_megatron.checkpoint.store import Store, writing_errors
from helix_megatron.errors import HelixError, Setting, listed
from helix_megatron.megatron.notices import hide_notices
from helix_megatron.run.outcomes import on_every_rank, on_first_rank
from helix_megatron.versions import found_version, numbers

# `CheckpointSaver` drives megatron-core's own writer; from 0.17 on nvidia-resiliency-ext's is the default.
_choices = inspect.signature(dist_checkpointing.save).parameters
WRITER: dict[str, Any] = {"async_strategy": "mcore"} if "async_strategy" in _choices else {}


def sharding_metadata() -> dict[str, Any]:
    """How model and optimizer describe their parts: the only format that any layout can load.

    Megatron's other formats of the distributed optimizer hold a rank's flat buffer, which depends on tensor
    parallelism.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": megatron_state.get_data_parallel_group(with_context_parallel=True),
    }


# ------------------------------------------------------------------------ save


class CheckpointSaver:
    """Writes checkpoints into a store, in the background if asked.

    Args:
        store: where to. Every rank sees the same directory.
        asynchronous: write in a forked process while training goes on. The checkpoint is complete at a later
            `poll` or `close`.
        saved: called on every rank with the directory of each checkpoint that is complete.

    Attributes:
        side_files: what every checkpoint holds beside its tensors, of the Hugging Face model that the weights
            came from: tokenizer, config.json. Rank 0 writes them.
    """

    def __init__(
        self,
        store: Store,
        *,
        asynchronous: bool = False,
        saved: Callable[[Path], None] = lambda path: None,
    ):
        self.store, self._saved = store, saved
        self.side_files: dict[str, bytes | Path] = {}
        self.asynchronous = asynchronous
        self._queue = AsyncCallsQueue(persistent=False)

    def save(self, iteration: int, state: dict[str, Any], manifest: Manifest) -> None:
        """Write `state`, a sharded state dictionary, as the checkpoint of an iteration. Collective.

        Raises:
            HelixError: it cannot be written (no space, read-only, …). Earlier checkpoints are intact.
        """
        self.poll(blocking=True)
        staging = on_first_rank(lambda: self.store.begin(iteration))
        with self._aborting(iteration):
            group = megatron_state.get_data_parallel_group(with_context_parallel=True)
            parts = TorchDistSaveShardedStrategy("torch_dist", 1)
            strategy = FullyParallelSaveStrategyWrapper(parts, group)
            hide_notices()
            with _problems_of(staging):
                request = dist_checkpointing.save(
                    state, str(staging), strategy, async_sharded_save=True, **WRITER
                )
            request = self._with_manifest(request, iteration, staging, manifest)
            if self.asynchronous:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def poll(self, *, blocking: bool = False) -> None:
        """Complete a save that runs in the background, if it has finished on all ranks. Collective."""
        self._queue.maybe_finalize_async_calls(blocking=blocking)

    def close(self) -> None:
        """Wait for a save that runs in the background. Collective."""
        self.poll(blocking=True)

    def _with_manifest(
        self, request: AsyncRequest, iteration: int, staging: Path, manifest: Manifest
    ) -> AsyncRequest:
        """Hash what this rank writes where it is written; commit when megatron-core has finished."""
        receiver, sender = multiprocessing.Pipe(duplex=False)
        prefix = f"__{dist.get_rank()}_"
        parent, write, finish = os.getpid(), request.async_fn, list(request.finalize_fns)

        def write_and_hash(*args: Any, **kwargs: Any) -> None:
            if os.getpid() != parent:  # the watchdog's signal handling is the parent's
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            try:
                assert write is not None
                write(*args, **kwargs)
                own = sorted(path for path in staging.iterdir() if path.name.startswith(prefix))
                sender.send({path.name: manifests.digest(path) for path in own})
            except Exception as error:
                sender.send(error if isinstance(error, OSError) else RuntimeError(str(error)))

        def complete() -> None:
            with self._aborting(iteration):
                digests = on_every_rank(
                    lambda: {} if write is None else _received(receiver, staging)
                )
                with _problems_of(staging):
                    for function in finish:
                        function()
                everyone: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, digests)
                on_first_rank(lambda: self._commit(iteration, staging, manifest, everyone))
            self._saved(self.store.path(iteration))

        return request._replace(
            async_fn=None if write is None else write_and_hash, finalize_fns=[complete]
        )

    def _commit(
        self,
        iteration: int,
        staging: Path,
        manifest: Manifest,
        digests: list[dict[str, FileEntry]],
    ) -> None:
        with writing_errors(staging):
            if self.side_files:
                write_side_files(self.side_files, staging / SIDECARS)
            files = {name: entry for part in digests for name, entry in part.items()}
            for path in sorted(staging.rglob("*")):
                name = path.relative_to(staging).as_posix()
                if path.is_file() and name not in files:
                    files[name] = manifests.digest(path)
            manifests.write_manifest(staging, dataclasses.replace(manifest, files=files))
            self.store.commit(iteration)

    @contextlib.contextmanager
    def _aborting(self, iteration: int) -> Iterator[None]:
        """Nothing of a failed save stays behind."""
        try:
            yield
        except HelixError:
            if dist.get_rank() == 0:
                self.store.abort(iteration)
            raise


@contextlib.contextmanager
def _problems_of(staging: Path) -> Iterator[None]:
    """A failure to write, which megatron-core and torch wrap in their own exceptions, as a HelixError.

    They raise it on every rank. Only the first knows the reason.
    """
    problem: BaseException | None = None
    try:
        yield
    except (CheckpointException, OSError, RuntimeError) as error:
        problem = error
    if problem is None:
        return

    def explain() -> None:
        with writing_errors(staging):
            raise _root_cause(problem)

    try:
        explain()
    except HelixError:
        raise
    except Exception as error:
        raise HelixError(
            f"the checkpoint in {staging} could not be written: {error}. Earlier checkpoints are intact."
        ) from problem


def _root_cause(error: BaseException) -> Exception:
    """The OSError at the bottom of a chain of exceptions; else its text, since torch's is no Exception."""
    seen: list[BaseException] = [error]
    for current in seen:
        if isinstance(current, OSError):
            return current
        # Exceptions that travelled between processes have lost their cause, and kept its text.
        if number := re.search(r"\[Errno (\d+)\]", str(current)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        failures = getattr(current, "failures", {})
        wrapped = [failure[0] for failure in failures.values()]
        following = [*wrapped, current.__cause__, current.__context__]
        seen += [other for other in following if other is not None and other not in seen]
    return RuntimeError(str(error))


def _received(receiver: Any, staging: Path) -> dict[str, FileEntry]:
    """What the writing process sent: digests of its files."""
    if not receiver.poll(0):
        raise HelixError(
            "the process that wrote the checkpoint ended without a word, as one does that is killed for "
            "memory. Earlier checkpoints are intact.",
            remedy=("Leave out ", Setting("async_save"), ", or give the machine more memory."),
        )
    answer = receiver.recv()
    with _problems_of(staging):
        if isinstance(answer, Exception):
            raise answer
    return answer


# ------------------------------------------------------------------------ load


def verify(directory: Path, *, trust: bool = False) -> Manifest | None:
    """Check every file against the manifest, and every pickle, before anything is read. Collective.

    The ranks share the hashing. Returns the manifest, or None for a checkpoint of stock Megatron, which has
    none.

    Raises:
        HelixError: a damaged, missing or hostile file, by name.
    """
    if not manifests.has_manifest(directory):
        on_first_rank(lambda: safe.inspect(directory, trust=trust))
        return None
    manifest = on_every_rank(lambda: manifests.read_manifest(directory))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    mine = set(sorted(manifest.files)[rank::ranks])
    on_every_rank(lambda: manifests.verify(directory, only=mine.__contains__))
    on_first_rank(lambda: safe.inspect(directory, trust=trust))
    return manifest


def load(directory: Path, state: dict[str, Any], *, trust: bool = False) -> dict[str, Any]:
    """Read what `state`, a sharded state dictionary, describes. Call `verify` first. Collective.

    Random states of another layout and the `_extra_state` of another implementation's layers are left out.

    Raises:
        HelixError: a tensor is missing or has another shape; nothing has been read then.
    """
    stored = on_first_rank(lambda: stored_shapes(directory, trust=trust))
    core = found_version("megatron-core") or ""
    if safe.COMMON_KEY in stored and numbers(core) < (0, 19):
        raise HelixError(
            f"{directory} was saved with megatron-core 0.19 or later, whose checkpoints megatron-core "
            f"{core} cannot read. Load it with megatron-core 0.19."
        )
    state = _without_absent_objects(state, stored)
    on_every_rank(lambda: _check_shapes(directory, state, stored))
    asked: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(asked, {tensor.key for tensor in _sharded_tensors(state)})
    _check_nothing_left(directory, set().union(*asked), stored)
    try:
        return dist_checkpointing.load(state, str(directory))
    except (CheckpointException, OSError, RuntimeError, EOFError) as error:
        raise HelixError(
            f"{directory} cannot be read: {_first_line(_root_cause(error))}. If it has no manifest "
            "(helix.json), it was never verified: copy it again from where it came."
        ) from error


def stored_shapes(directory: Path, *, trust: bool = False) -> dict[str, tuple[int, ...] | None]:
    """Global shape of every tensor in a distributed checkpoint; None for an object."""
    metadata = safe.load_metadata(directory / ".metadata", trust=trust)
    return {
        key: tuple(entry.size) if hasattr(entry, "size") else None
        for key, entry in metadata.state_dict_metadata.items()
    }


def _without_absent_objects(state: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Objects that the checkpoint lacks are not asked for: each has a default."""

    def replace(item: Any) -> Any:
        if isinstance(item, ShardedObject) and item.unique_key not in stored:
            return LocalNonpersistentObject(None)
        return item

    dict_list_map_inplace(replace, state)
    return state


def _check_shapes(directory: Path, state: dict[str, Any], stored: dict[str, Any]) -> None:
    missing, different = set(), set()
    for tensor in _sharded_tensors(state):
        shape = stored.get(tensor.key)
        if shape is None:
            missing.add(tensor.key)
        elif shape != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            different.add((tensor.key, shape, tuple(tensor.global_shape)))
    if different:
        key, theirs, ours = min(different)
        raise HelixError(
            f"{directory} holds another model: {key} is {list(theirs)} there and {list(ours)} here"
            + (f" (and {len(different) - 1} more tensors differ)" if len(different) > 1 else "")
            + ".",
            remedy=("Give the checkpoint's sizes, or ", Setting("use_checkpoint_args"), "."),
        )
    if missing:
        raise _missing(directory, missing, stored)


def _check_nothing_left(directory: Path, asked: set[str], stored: dict[str, Any]) -> None:
    """A weight that the model has no place for means that it is another model."""
    left = sorted(
        key
        for key, shape in stored.items()
        if shape is not None and key not in asked and "optimizer." not in key
    )
    if left:
        raise HelixError(
            f"{directory} holds another model: it has {len(left)} tensors that this one has no place for: "
            f"{listed(left[:3])}{' …' if len(left) > 3 else ''}.",
            remedy=("Give its flags, or ", Setting("use_checkpoint_args"), "."),
        )


def _missing(directory: Path, missing: set[str], stored: dict[str, Any]) -> HelixError:
    optimizer = {key for key in missing if key.startswith("optimizer.")}
    names = listed(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
    if optimizer != missing:
        return HelixError(
            f"{directory} lacks {len(missing)} tensors of this model: {names}. It holds another model.",
            remedy=("Give its flags, or ", Setting("use_checkpoint_args"), "."),
        )
    anew = Setting("no_load_optim")
    if not any(key.startswith("optimizer.") for key in stored):
        return HelixError(
            f"{directory} holds weights and no optimizer state.",
            remedy=("Add ", anew, ", or ", Setting("finetune"), " to start at iteration 0."),
        )
    kind = (Setting("optimizer"), " and ", Setting("use_distributed_optimizer"))
    return HelixError(
        f"{directory} holds optimizer state of another kind: it lacks {names}.",
        remedy=(
            *("Take the same precision, ", *kind, " as the run that saved it, or add "),
            *(anew, "."),
        ),
    )


def _sharded_tensors(state: Any) -> Iterator[ShardedTensor]:
    for item in nested_values(state):
        if isinstance(item, ShardedTensorFactory):
            built = item.build()
            yield from _sharded_tensors(built if isinstance(built, dict) else {"": built})
        elif isinstance(item, ShardedTensor):
            yield item
        elif isinstance(item, list):
            yield from (part for part in item if isinstance(part, ShardedTensor))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
