"""megatron-core trains without a GPU, and equally in every layout; the stand-ins leave no trace."""

from __future__ import annotations

import importlib
import os
from typing import Any
from unittest import mock

import pytest
import torch
from pool import RankPool
from tiny_gpt import Layout, Log, build, start_megatron, train, train_step

from helix_megatron.errors import HelixError
from helix_megatron.megatron import cpu_runtime, torch_adam
from helix_megatron.megatron.cpu_devices import CpuEvent, CpuTensorType

RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
LAYOUTS = {
    "tensor parallel": Layout(2, tp=2),
    "sequence parallel": Layout(2, tp=2, config={"sequence_parallel": True}),
    "tensor and pipeline parallel": Layout(4, tp=2, pp=2),
    "virtual pipeline": Layout(
        2, pp=2, chunks=2, config={"overlap_p2p_comm": True, "batch_p2p_comm": False}
    ),
    "data parallel": Layout(2),
    "distributed optimizer": Layout(2, distributed_optimizer=True),
    "overlapped": Layout(2, distributed_optimizer=True, overlap=True),
    "full recompute": Layout(2, tp=2, config=RECOMPUTE),
    "selective recompute": Layout(2, tp=2, config={"recompute_granularity": "selective"}),
}
MOE = {"num_moe_experts": 4, "moe_router_load_balancing_type": "none", "add_bias_linear": False}
ALL_TO_ALL = MOE | {"moe_token_dispatcher_type": "alltoall"}
MOE_LAYOUTS = {
    "all-to-all": Layout(2, ep=2, config=ALL_TO_ALL),
    "all-gather": Layout(2, ep=2, config=MOE | {"moe_token_dispatcher_type": "allgather"}),
    "tensor parallel": Layout(4, tp=2, ep=2, config=ALL_TO_ALL | {"sequence_parallel": True}),
    "experts cut": Layout(4, tp=2, ep=2, etp=2, config=ALL_TO_ALL | {"sequence_parallel": True}),
}


@pytest.fixture(scope="module")
def dense(pool: RankPool) -> Log:
    return pool.run(train, Layout(), world_size=1)[0]


@pytest.fixture(scope="module")
def moe(pool: RankPool) -> Log:
    return pool.run(train, Layout(config=ALL_TO_ALL), world_size=1)[0]


def assert_same_training(logs: list[Log], reference: Log, rtol: float = 1e-5) -> None:
    """Losses and gradient norms agree on all ranks, and something was learned."""
    assert reference[-1][0] < reference[0][0] - 0.1
    assert all(norm > 0 for _, norm in reference)
    for log in logs:
        torch.testing.assert_close(log, reference, rtol=rtol, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_dense_training_is_the_same_in_every_layout(
    pool: RankPool, dense: Log, layout: Layout
) -> None:
    """A stand-in that does nothing where it should do something changes the loss."""
    assert_same_training(pool.run(train, layout, world_size=layout.ranks), dense)


@pytest.mark.parametrize("layout", MOE_LAYOUTS.values(), ids=MOE_LAYOUTS.keys())
def test_mixture_of_experts_is_the_same_in_every_layout(
    pool: RankPool, moe: Log, layout: Layout
) -> None:
    """Experts need the most stand-ins: streams, split sizes, unequal parts."""
    assert_same_training(pool.run(train, layout, world_size=layout.ranks), moe)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(
    pool: RankPool, dense: Log, dtype: torch.dtype, distributed_optimizer: bool
) -> None:
    """The optimizers tell precisions by the names of CUDA types; fp16 has a loss scaler."""
    layout = Layout(2, dtype=dtype, distributed_optimizer=distributed_optimizer)
    assert_same_training(pool.run(train, layout, world_size=2), dense, rtol=2e-2)


@pytest.mark.parametrize("recompute", [RECOMPUTE, {"recompute_granularity": "selective"}])
def test_recompute_repeats_the_dropout(pool: RankPool, recompute: dict[str, Any]) -> None:
    """Recompute must draw the same numbers again and leave the generator as it found it."""
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
    stored, *_ = pool.run(train, Layout(2, tp=2, config=dropout), world_size=2)
    logs = pool.run(train, Layout(2, tp=2, config=dropout | recompute), world_size=2)
    assert_same_training(logs, stored)


def draws() -> dict[str, Any]:
    """What the random states give, at the top, forked and nested."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    start_megatron(Layout(2, tp=2))
    tracker = get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    with tracker.fork():
        first = float(torch.rand(()))
        with tracker.fork("data-parallel-rng"):
            other = float(torch.rand(()))
            with tracker.fork():
                second = float(torch.rand(()))
        third = float(torch.rand(()))
    restored = torch.equal(outside, torch.get_rng_state())
    plain = float(torch.rand(()))
    start_again = tracker.get_states()
    with tracker.fork():
        fourth = float(torch.rand(()))
    tracker.set_states(start_again)
    kept = torch.cuda.get_rng_state()
    torch.rand(3)
    torch.cuda.set_rng_state(kept)
    restored = restored and torch.equal(kept, torch.get_rng_state())
    with tracker.fork():
        repeated = float(torch.rand(()))
    with pytest.raises(KeyError, match="The random state nobody was not added"):
        tracker.fork("nobody").__enter__()
    return {
        "model parallel": [first, second, third, fourth],
        "repeated": repeated,
        "data parallel": other,
        "plain": plain,
        "restored": restored,
    }


def test_random_states(pool: RankPool) -> None:
    """Tensor-parallel ranks share the data-parallel state and differ in their own.

    A nested fork continues the state that is forked already.
    """
    ranks = pool.run(draws, world_size=2)
    for rank, found in enumerate(ranks):
        generator = torch.Generator().manual_seed(1234 + 2718 + rank)
        expected = [float(torch.rand((), generator=generator)) for _ in range(4)]
        assert found["model parallel"] == expected
        assert found["repeated"] == expected[3]
        assert found["restored"]
    seeded = float(torch.rand((), generator=torch.Generator().manual_seed(1234)))
    assert [found["data parallel"] for found in ranks] == [seeded, seeded]
    assert [found["plain"] for found in ranks] == [seeded, seeded]


def trackers() -> list[str]:
    """The tracker's class before, during and after, and whether it is the same one in the end."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    first = get_cuda_rng_tracker()
    cpu_runtime.install()
    second = get_cuda_rng_tracker()
    cpu_runtime.uninstall()
    assert get_cuda_rng_tracker() is first
    return [type(first).__name__, type(second).__name__]


def test_a_tracker_made_before_is_replaced_for_the_time(pool: RankPool) -> None:
    """Building any layer makes one, which cannot seed anything without a GPU."""
    assert pool.run(trackers, world_size=1) == [["CudaRNGStatesTracker", "CpuRNGStatesTracker"]]


def devices() -> list[str]:
    """Where tensors land that were asked for on a GPU."""
    cpu_runtime.install()
    tensors = [
        torch.zeros(1, device="cuda"),
        torch.zeros(1, device="cuda:1"),
        torch.tensor([1], device=torch.device("cuda")),
        torch.empty_like(torch.zeros(1), device="cuda"),
        torch.zeros(1, device=torch.cuda.current_device()),
        torch.zeros(1).cuda(),
        torch.zeros(1).to("cuda"),
        torch.zeros(1).to(device="cuda", dtype=torch.float64),
        torch.nn.Linear(1, 1, device="cuda").cuda().weight,
    ]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        torch.cuda.Event().record(torch.cuda.current_stream())
    torch.cuda.synchronize()
    return [tensor.device.type for tensor in tensors]


def test_cuda_means_cpu(pool: RankPool) -> None:
    """Every way in which megatron-core asks for a GPU."""
    assert set(pool.run(devices, world_size=1)[0]) == {"cpu"}


def test_tensor_types_equal_their_cuda_names() -> None:
    """distrib_optimizer.py tests with `in`, clip_grads.py with `==`."""
    name = CpuTensorType("torch.BFloat16Tensor")
    assert name in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
    assert name == "torch.BFloat16Tensor"
    assert "torch.cuda.BFloat16Tensor" == name  # noqa: SIM300 - the other operand's __eq__
    assert name not in ["torch.cuda.HalfTensor", "torch.HalfTensor"]
    assert name != "torch.cuda.FloatTensor"
    assert name != 1
    assert f"{name}" == "torch.BFloat16Tensor"


def test_events_measure_time() -> None:
    """megatron-core's timers subtract two events."""
    start, end = CpuEvent(enable_timing=True), CpuEvent(enable_timing=True)
    start.record()
    end.record()
    assert start.query()
    assert 0 <= start.elapsed_time(end) < 1000


def attributes() -> dict[str, Any]:
    """The current value behind each target of the tables, and what torch.Tensor defines itself."""
    values: dict[str, Any] = {}
    for patch in [*cpu_runtime.TABLE.fitting(), *torch_adam.TABLE.fitting()]:
        module, _, path = patch.target.partition(":")
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name, "nothing")
        values[patch.target] = value
    return values | {f"Tensor.{name}": value for name, value in vars(torch.Tensor).items()}


def install_and_uninstall() -> tuple[list[str], list[str]]:
    """(targets that installing left unchanged, targets that uninstalling left changed)."""
    before = attributes()
    assert not cpu_runtime.is_installed()
    assert cpu_runtime.install()
    during = attributes()
    assert cpu_runtime.install()  # twice is once
    assert cpu_runtime.is_installed()
    assert all(during[name] is value for name, value in attributes().items())
    cpu_runtime.uninstall()
    assert not cpu_runtime.is_installed()
    cpu_runtime.uninstall()
    after = attributes()
    assert after.keys() == before.keys()
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        torch.zeros(1, device="cuda")
    unchanged = [name for name, value in before.items() if ":" in name and during[name] is value]
    return unchanged, [name for name, value in before.items() if after[name] is not value]


def test_uninstall_restores_everything(pool: RankPool) -> None:
    """The stand-ins must not leak into code that runs later in the process."""
    unchanged, left = pool.run(install_and_uninstall, world_size=1)[0]
    # These are what they are to become: no tracker was made, and newer megatron-core sees that there is no
    # Transformer Engine.
    assert set(unchanged) <= {
        "megatron.core.transformer.multi_latent_attention:HAVE_TE",
        "megatron.core.tensor_parallel.random:_CUDA_RNG_STATE_TRACKER",
        "megatron.core.tensor_parallel.random:_CUDA_RNG_STATE_TRACKER_INITIALIZED",
    }
    assert left == []


def install_with_a_gpu() -> bool:
    before = attributes()
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        installed = cpu_runtime.install()
    after = attributes()
    return installed or cpu_runtime.is_installed() or any(after[k] is not before[k] for k in before)


def test_nothing_is_touched_with_a_gpu(pool: RankPool) -> None:
    """On a GPU the stand-ins would break training."""
    assert pool.run(install_with_a_gpu, world_size=1) == [False]


def install_with_an_unknown_optimizer() -> tuple[bool, list[str]]:
    before = attributes()
    torch_adam.TABLE.replace("megatron.core.optimizer:missing")(lambda upstream: None)
    try:
        with pytest.raises(HelixError, match=r"has no megatron\.core\.optimizer\.missing"):
            cpu_runtime.install()
    finally:
        torch_adam.TABLE.patches.pop()
    after = attributes()
    return cpu_runtime.is_installed(), [name for name in before if after[name] is not before[name]]


def test_all_or_nothing(pool: RankPool) -> None:
    """Half a runtime would fail later, with an error that explains nothing."""
    assert pool.run(install_with_an_unknown_optimizer, world_size=1) == [(False, [])]


def compilations() -> list[int]:
    """How often torch.compile has compiled: without the stand-ins, then with them."""
    os.environ.pop("TORCHDYNAMO_DISABLE")
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    counts = [len(calls)]
    cpu_runtime.install()
    torch.compile(lambda x: x + 2, backend=backend)(torch.ones(1))
    return [*counts, len(calls)]


def test_nothing_is_compiled(pool: RankPool) -> None:
    """The functions that megatron-core compiles for the GPU take longer than all tests here."""
    assert pool.run(compilations, world_size=1) == [[1, 1]]


def uninstall_inside_a_mode() -> bool:
    cpu_runtime.install()
    with torch.device("cpu"), pytest.raises(RuntimeError, match="Leave that mode first"):
        cpu_runtime.uninstall()
    return cpu_runtime.is_installed()


def test_uninstall_inside_another_mode_is_refused(pool: RankPool) -> None:
    """Popping somebody else's mode would break their block."""
    assert pool.run(uninstall_inside_a_mode, world_size=1) == [True]


def resume(layout: Layout, directory: str) -> tuple[Log, Log]:
    """(two steps and one more, two steps and one more after a checkpoint into a new model)."""
    from megatron.core import dist_checkpointing, parallel_state

    start_megatron(layout)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }

    def sharded(chunks: list[Any], optimizer: Any, is_loading: bool) -> dict[str, Any]:
        model = chunks[0].module.sharded_state_dict(metadata=metadata)
        state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": state}

    chunks, optimizer = build(layout)
    log = [train_step(layout, chunks, optimizer) for _ in range(2)]
    dist_checkpointing.save(sharded(chunks, optimizer, False), directory)
    straight = [*log, train_step(layout, chunks, optimizer)]

    chunks, optimizer = build(layout)
    loaded = dist_checkpointing.load(sharded(chunks, optimizer, True), directory)
    chunks[0].module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    for part in optimizer.chained_optimizers:
        steps = [state["step"] for state in part.optimizer.state.values()]
        assert {float(step) for step in steps} == {2.0}
        assert len({step.data_ptr() for step in steps}) == len(steps)
    return straight, [*log, train_step(layout, chunks, optimizer)]


def test_the_distributed_optimizer_resumes_exactly(pool: RankPool, tmp_path: Any) -> None:
    """Upstream's faults with torch's Adam: two errors, and one wrong result without an error."""
    layout = Layout(2, distributed_optimizer=True)
    for straight, resumed in pool.run(resume, layout, str(tmp_path), world_size=2):
        assert_same_training([resumed], straight, rtol=1e-6)
