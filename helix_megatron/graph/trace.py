"""Run one rank of a training step at full size: no other process, no memory for its tensors, no GPU.

Everything that a training run executes between its inputs and its gradients is executed: the model's code,
Megatron's pipeline schedule, and the reductions of gradients after the backward pass. Its tensors are fake
(they have shapes and no data) and its process group, too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state as megatron_state
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel as Replicas
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_megatron.core.layout import contiguous_runs
from helix_megatron.core.observe import observing
from helix_megatron.errors import HelixError
from helix_megatron.graph import costs
from helix_megatron.graph.model import BUFFER, GRADIENTS, INPUT, PARAMETER, Edge, Node, Weight
from helix_megatron.graph.recorder import PAUSE, Participation, Recorder
from helix_megatron.graph.without_data import FunctionsWithoutData, new_process
from helix_megatron.megatron.checkpoint import PermutedFactory
from helix_megatron.megatron.dropout import use_layout_free_dropout
from helix_megatron.megatron.fake_world import fake_world
from helix_megatron.megatron.fill import canonical_name, sharded_weights
from helix_megatron.megatron.gpt import build_chunk, parameter_dtype, transformer_config
from helix_megatron.megatron.initialize import weights_not_drawn
from helix_megatron.run.config import RunConfig
from helix_megatron.training.loop import masked_mean  # the loss of the training loop itself

ROOT = "model"  # path of the model itself, whose own code computes the losses


@dataclass
class RankTrace:
    """What one rank ran. `place` are its coordinates.

    `memory` is in bytes: `traced_peak`, the most that is alive at once, and what it consists of: parameters,
    gradient buffers, and activations (all else). Optimizer states are not there: the step ends before them.
    """

    rank: int
    place: dict[str, int]
    nodes: list[Node]
    edges: list[Edge]
    participations: list[Participation]
    weights: list[Weight]
    memory: dict[str, Any] = field(default_factory=dict)


def trace(
    run: RunConfig, ranks: Sequence[int], *, backward: bool = False, micro_batches: int = 1
) -> Iterator[RankTrace]:
    """Trace ranks of a run of `helix_megatron.graph.flags.parse`, one after the other.

    Args:
        backward: run the backward pass, too, and the reductions of gradients.
        micro_batches: of the step. The graph grows with it; more than one show how pipeline stages overlap.

    Raises:
        HelixError: this process belongs to a process group, or an operator depends on data.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for rank in ranks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core's, of packages and GPU settings
            with _world(run, rank), new_process(), fake:
                yield _trace(run, rank, backward, micro_batches)


def _world(run: RunConfig, rank: int) -> AbstractContextManager[None]:
    """A rank of the groups that the flags describe."""
    parallel: Any = run.parallel
    return fake_world(
        rank,
        run.world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        run.training.seed,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        intra_head_parallel_size=run.helix.intra_head_parallel_size,
    )


def trace_all(
    run: RunConfig, *, backward: bool = False, micro_batches: int = 1, jobs: int = 1
) -> list[RankTrace]:
    """Trace every rank of the run, in `jobs` processes.

    Raises:
        HelixError: as `trace`; or one of the processes was killed.
    """
    ranks = range(run.world_size)
    if jobs <= 1:
        return list(trace(run, ranks, backward=backward, micro_batches=micro_batches))
    parts = [ranks[start::jobs] for start in range(jobs)]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        work = [pool.submit(_trace_part, run, part, backward, micro_batches) for part in parts]
        try:
            found = [traced for one in work for traced in one.result()]
        except BrokenProcessPool as error:
            raise HelixError(
                f"one of the {jobs} processes that trace ranks was killed, probably because this machine ran "
                "out of memory. Try --jobs 1."
            ) from error
    return sorted(found, key=lambda traced: traced.rank)


def _trace_part(
    run: RunConfig, ranks: Sequence[int], backward: bool, micro_batches: int
) -> list[RankTrace]:
    torch.set_num_threads(1)
    return list(trace(run, ranks, backward=backward, micro_batches=micro_batches))


def _trace(run: RunConfig, rank: int, backward: bool, micro_batches: int) -> RankTrace:
    config = transformer_config(run)
    recorder = Recorder(rank)
    with recorder, recorder.during(PAUSE):
        model, wrapped = _build(run, config)
    weights = _weights(model, rank)
    gradient_bytes = _declare(recorder, wrapped)
    parameters = {id(p): p for p in model.parameters()}.values()
    parameter_bytes = sum(p.untyped_storage().nbytes() for p in parameters)
    recorder.storages.reset_peak()

    def finalize(*arguments: Any, **named: Any) -> None:
        with recorder.during(GRADIENTS):
            finalize_model_grads(*arguments, **named)

    config.finalize_model_grads_func = finalize
    names, without_data = _module_names(model, recorder), FunctionsWithoutData()
    with names, observing(recorder), without_data, recorder:
        get_forward_backward_func()(
            forward_step_func=_forward_step(run, recorder),
            data_iterator=iter(range(micro_batches)),
            model=wrapped,
            num_microbatches=micro_batches,
            seq_length=run.model.seq_length,
            micro_batch_size=run.training.micro_batch_size,
            forward_only=not backward,
        )
    held = dict(model.named_parameters())
    read_at = {weight.name: recorder.node_of(held[weight.local_name]) for weight in weights}
    kept = recorder.finish()
    for weight in weights:
        weight.node = read_at[weight.name] if read_at[weight.name] in kept else ""
    storages = recorder.storages
    memory = {
        "traced_peak": storages.peak,
        "parameters": parameter_bytes,
        "gradients": gradient_bytes,
        "activations": storages.peak - parameter_bytes - gradient_bytes,
        "peak_at": f"r{rank}.{storages.at_peak}",
        "passes": "forward and backward" if backward else "forward",
        "micro_batches": micro_batches,
    }
    recorded = recorder.nodes, recorder.edges, recorder.participations
    return RankTrace(rank, _place(), *recorded, weights, memory)


def _build(run: RunConfig, config: Any) -> tuple[Any, Any]:
    """The model of this rank, and the same in Megatron's wrappers."""
    with weights_not_drawn(config):
        model = build_chunk(run, config)
    use_layout_free_dropout(model, config)
    model.train()
    inner: Any = model
    if run.training.precision != "fp32":
        dtype = parameter_dtype(run.training)
        assert all(p.dtype == dtype for p in model.parameters() if p.is_floating_point())
        # Its weights have the dtype already, and torch cannot convert modules of fake tensors in place.
        model.bfloat16 = model.half = lambda: model
        inner = Float16Module(config, model)
    dealt = run.parallel.use_distributed_optimizer
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=dealt)
    return model, Replicas(config, ddp, inner)


def _declare(recorder: Recorder, wrapped: Any) -> int:
    """Name weights and gradient buffers; bytes of the latter."""
    model = wrapped.module
    model = getattr(model, "module", model)
    names = module_names(model)
    for module, path in names.items():
        for name, parameter in module.named_parameters(recurse=False):
            recorder.declare(parameter, PARAMETER, name, path)
        for name, buffer in module.named_buffers(recurse=False):
            recorder.declare(buffer, BUFFER, name, path)
    total = 0
    for buffer in wrapped.buffers + wrapped.expert_parallel_buffers:
        recorder.declare(buffer.grad_data, BUFFER, "gradients")
        total += buffer.grad_data.untyped_storage().nbytes()
    return total


def _forward_step(run: RunConfig, recorder: Recorder) -> Any:
    """What the training loop does with a micro-batch, on inputs without data."""
    own_length = run.model.seq_length // run.parallel.context_parallel_size
    shape = (run.training.micro_batch_size, own_length)

    def forward_step(numbers: Iterator[int], model: Any) -> tuple[Tensor, Any]:
        recorder.micro_batch = next(numbers)
        with recorder.during(PAUSE):
            integers = ("tokens", "position_ids", "labels")
            batch = {name: torch.empty(shape, dtype=torch.long) for name in integers}
            batch["loss_mask"] = torch.empty(shape)
        for name, tensor in batch.items():
            recorder.declare(tensor, INPUT, name)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with recorder.inside("loss"):
                return masked_mean(losses, batch["loss_mask"], batch["loss_mask"].sum())

        return output, loss

    return forward_step


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Every module's path, with layers numbered over all pipeline stages."""
    numbers = {
        path: f"{path.rpartition('.')[0]}.{module.layer_number - 1}"
        for path, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    names = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        lengths = range(len(parts), 0, -1)
        layer = next((k for k in lengths if ".".join(parts[:k]) in numbers), 0)
        start = [numbers[".".join(parts[:layer])]] if layer else []
        names[module] = ".".join([*start, *parts[layer:]]) or ROOT
    return names


@contextlib.contextmanager
def _module_names(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """The recorder knows which module runs."""
    names = module_names(model)

    def enter(module: nn.Module, inputs: Any) -> None:
        if module in names:
            recorder.enter(names[module])

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names:
            recorder.leave()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weights(model: Any, rank: int) -> list[Weight]:
    """This rank's part of every canonical weight, as the model's sharded state dictionary tells it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for item in sharded_weights(model):
        local = names.get(id(item.data))
        if local is None:
            continue
        axis, runs, shape, leading = _part(item)
        name, spec = canonical_name(item.key, leading), costs.spec_of(item.data)
        found[name] = Weight(rank, name, local, shape, spec, axis, runs)
    return list(found.values())


Part = tuple[int | None, tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]


def _part(item: Any) -> Part:
    """(axis that is cut, runs along it, shape of the whole, place on leading axes) of a sharded tensor."""
    if isinstance(item, PermutedFactory):
        assert item.index is not None
        runs = tuple(contiguous_runs(item.index))
        return item.axis, runs, item.global_shape, item.leading_offset
    boxes = item.build() if isinstance(item, ShardedTensorFactory) else [item]
    first = boxes[0]
    leading = first.prepend_axis_num
    whole = tuple(first.global_shape[leading:])
    place = tuple(first.global_offset[:leading])
    cut = [a for a in range(len(whole)) if first.local_shape[a] != whole[a]]
    if not cut:
        return None, (), whole, place
    assert len(cut) == 1, f"{item.key} is cut along {len(cut)} axes"
    axis = cut[0]
    runs = tuple((box.global_offset[leading + axis], box.local_shape[axis]) for box in boxes)
    return axis, runs, whole, place


def _place() -> dict[str, int]:
    """Coordinates of the rank in the groups of the run."""
    from helix_megatron import parallel_state

    return {
        "tensor": megatron_state.get_tensor_model_parallel_rank(),
        "pipeline": megatron_state.get_pipeline_model_parallel_rank(),
        "context": megatron_state.get_context_parallel_rank(),
        "data": megatron_state.get_data_parallel_rank(),
        "expert": megatron_state.get_expert_model_parallel_rank(),
        "expert_tensor": megatron_state.get_expert_tensor_parallel_rank(),
        "head_group": parallel_state.get_head_group_parallel_rank(),
        "segment": parallel_state.get_intra_head_parallel_rank(),
    }
