"""Steps of training and of inference on fake CUDA tensors, on a machine without CUDA.

    python fake_cuda_steps.py LIBRARY < cases.json > reports.json

LIBRARY is fake_cuda.cpp, compiled: torch then believes that there is a CUDA device; it is empty for a build
of torch with CUDA. Fake tensors have shapes, dtypes and devices and no data, so every operator of a step is
dispatched and none computed. A report lists the operators for which a GPU's host would wait, that mix devices,
or that make or copy a tensor on the host, with their places in the code.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def pretend_cuda(library: str) -> None:
    """Load the stand-in for CUDA, which must come before torch's Python, and then torch."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    if library:
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    import torch

    if not library:
        torch._C._ensureCUDADeviceGuardSet()
    torch.set_num_threads(1)
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: torch.device("cuda", 0)
    cuda.get_device_capability = lambda *device: (9, 0)


pretend_cuda(sys.argv[1])

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

from helix_megatron import parallel_state  # noqa: E402
from helix_megatron.core.caches import paged  # noqa: E402
from helix_megatron.core.caches.pages import Piece  # noqa: E402
from helix_megatron.core.device import on_device  # noqa: E402
from helix_megatron.core.kernels.paged import paged_kernels  # noqa: E402
from helix_megatron.graph.without_data import new_process  # noqa: E402
from helix_megatron.inference.megatron_runner import MegatronRunner  # noqa: E402
from helix_megatron.inference.request import Sampling  # noqa: E402
from helix_megatron.inference.runner import make_book  # noqa: E402
from helix_megatron.inference.sampler import Place, sample  # noqa: E402
from helix_megatron.inference.step import StepPlan, tell  # noqa: E402
from helix_megatron.megatron.gpt import build_chunk, transformer_config  # noqa: E402
from helix_megatron.megatron.initialize import weights_not_drawn  # noqa: E402
from helix_megatron.training.arguments import parse_args  # noqa: E402
from helix_megatron.training.validate import validate  # noqa: E402

WORLD = 4
HAS_BACKWARD = bool(sys.argv[1])  # torch's own CUDA looks for a real device there
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
PLACES = ("helix_megatron/", "megatron/core/", "tests/")


class Watch(TorchDispatchMode):
    """Counts what a GPU's host waits for or has to make, by (part of the step, what, operator, place)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str, str]] = Counter()
        self.operators, self.part, self.error = 0, "", ""

    @contextlib.contextmanager
    def inside(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def inside_module(self, module: Any, part: str) -> None:
        """Whatever the forward pass of a module runs belongs to that part."""
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.inside(part):
                return forward(*args, **kwargs)

        module.forward = watched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func._schema.name.partition("::")
        kwargs = kwargs or {}
        if library == "prim":
            return func(*args, **kwargs)
        if name == "to":  # whole in inference mode; torch takes it apart elsewhere
            with self:
                return func.decompose(*args, **kwargs)
        self.operators += 1
        given = _tensors((args, kwargs))
        if name in WAITS or func is torch.ops.aten.repeat_interleave.Tensor or _by_mask(name, args):
            if any(t.is_cuda for t in given):
                self.see("waits", name)
                if name == "_local_scalar_dense":
                    return 0  # fake tensors have no values
            return func(*args, **kwargs)
        if name == "_to_copy":
            args[0].constant = None  # a single number, which torch would really copy
        output = func(*args, **kwargs)
        made = _tensors(output)
        devices = {t.device.type for t in (*given, *made)}
        if len(devices) > 1 and name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            by_itself = hasattr(source, "pinned") and kwargs.get("non_blocking")
            self.see("copies to the device" if made[0].is_cuda and by_itself else "waits", name)
        elif len(devices) > 1:
            self.see("mixes devices", name)
        elif "cpu" in devices:
            self.see("makes on the host", name)
        return output

    def see(self, what: str, name: str) -> None:
        self.found[self.part, what, name, place()] += 1


class ListsAreCopied(TorchFunctionMode):
    """Lists that become tensors on a device, made on the host and copied, which torch does out of sight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and "cuda" in str(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            x, index, *value = args
            several = index if isinstance(index, tuple) else (index,)
            if any(isinstance(i, list) for i in several):
                index = tuple(
                    torch.tensor(i).to(x.device) if isinstance(i, list) else i for i in several
                )
            args = (x, index, *value)
        return func(*args, **kwargs)


def pinned(tensor: Tensor) -> Tensor:
    """In the place of `Tensor.pin_memory`, which fake tensors have not."""
    made: Any = tensor.clone()
    made.pinned = True
    return made


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _by_mask(name: str, args: Any) -> bool:
    """Whether an index is a mask, whose true elements are counted first, unless one number fills them."""
    if not name.startswith(("index", "_unsafe_index")) or not isinstance(args[1], (list, tuple)):
        return False
    fills = name.startswith("index_put") and args[2].numel() == 1
    return not fills and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def place() -> str:
    """file:line of the innermost frame of the package or Megatron; of the forward pass for autograd's own."""
    frame: Any = sys._getframe(1)
    here = __file__
    while frame is not None:
        if (name := frame.f_code.co_filename) != here and (short := _shortened(name)):
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    for line in reversed(node.metadata.get("traceback_", []) if node is not None else []):
        name, _, rest = line.partition('", line ')
        if here not in name and (short := _shortened(name)):
            return f"backward of {short}:{rest.partition(',')[0]}"
    return "?"


def _shortened(path: str) -> str:
    return next((part + path.rpartition(part)[2] for part in PLACES if part in path), "")


class NoRandomStates:
    """In the place of Megatron's CUDA random states."""

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict[str, int]:
        return {"helix-head-group-rng": 0}

    def set_states(self, states: dict[str, int]) -> None:
        pass

    def fork(self, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def model_on(flags: str, rank: int) -> Iterator[tuple[Any, Any]]:
    """(run, model on the fake device) of a rank, with tensors that stay fake."""
    run = validate(parse_args(flags.split()), WORLD)
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    parallel_state.initialize_model_parallel(
        run.parallel.tensor_model_parallel_size,
        intra_head_parallel_size=run.helix.intra_head_parallel_size,
        create_gloo_process_groups=False,
    )
    try:
        with FakeTensorMode(), ListsAreCopied(), new_process():
            config = transformer_config(run)
            with weights_not_drawn(config):
                model = build_chunk(run, config)
            _to_cuda(model)
            yield run, model
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _to_cuda(model: Any) -> None:
    """`model.cuda()`, which torch cannot do with fake parameters."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None or old.is_cuda:
                    continue
                new = torch.empty_like(old, device="cuda")
                if isinstance(old, torch.nn.Parameter):
                    new = torch.nn.Parameter(new)
                for key in vars(old).keys() - vars(new).keys():
                    setattr(new, key, getattr(old, key))
                held[name] = new


def train(watch: Watch, flags: str) -> None:
    """Forward and backward of a micro-batch."""
    with model_on(flags, rank=1) as (run, model):
        batch, length = run.training.micro_batch_size, run.model.seq_length
        tokens = torch.zeros(batch, length, dtype=torch.int64, device="cuda")
        positions = torch.arange(length, device="cuda").expand(batch, length)
        for layer in model.decoder.layers:
            watch.inside_module(layer.self_attention, "layer")
        with watch, torch.autograd.detect_anomaly(check_nan=False):
            losses = model(tokens, positions, None, labels=tokens)
            if HAS_BACKWARD:
                with watch.inside("backward"):
                    losses.sum().backward()
        assert not HAS_BACKWARD or all(p.grad.is_cuda for p in model.parameters())


def infer(watch: Watch, flags: str, cache: str) -> None:
    """A step of the prompts of four sequences, and then one of a token for each."""
    lengths = (40, 3, 17, 1)
    with model_on(flags, rank=0) as (run, model), torch.no_grad():
        model.eval()
        runner = MegatronRunner(
            model,
            run.layout,
            cache=cache,
            pages=64,
            page_size=16,
            max_context=128,
            vocab_size=1000,
            attention=run.helix.attention,
        )
        for layer in model.decoder.layers:
            watch.inside_module(layer.self_attention, "layer")
        runner.plans = runner.group  # over gloo it would be, which needs the other ranks
        book = make_book(cache, runner.members, 64, 16)
        for number in range(len(lengths)):
            book.add(number, number % book.members)
        for decoding in (False, True):
            for number, length in enumerate(lengths):
                assert book.grow(number, length + decoding)
            pieces = tuple(
                Piece(
                    sequence=number,
                    start=length if decoding else 0,
                    tokens=np.zeros(1 if decoding else length, dtype=np.int64),
                    member=number % book.members,
                    pages=book.tell(number),
                    wanted=1,
                )
                for number, length in enumerate(lengths)
            )
            plan = StepPlan(pieces=pieces)
            with watch:
                with watch.inside("plan"):
                    tell(plan, runner.plans)
                with watch.inside("step"):
                    logits = runner.run(plan)
                with watch.inside("sampling"):
                    greedy, warm = (
                        Sampling(temperature=0),
                        Sampling(temperature=0.7, top_k=5, seed=1),
                    )
                    sample(logits, [Place(greedy), Place(warm)] * 2)


def faults(watch: Watch) -> None:
    """What the watch must see, each once."""
    with FakeTensorMode(), ListsAreCopied():
        x = torch.zeros(4, 6, device="cuda", requires_grad=True)
        with watch:
            for part, fault in (
                ("item", lambda: x.sum().item()),
                ("truth", lambda: bool(x.sum() > 0)),
                ("to the host", x.cpu),
                ("from pageable memory", lambda: torch.from_numpy(np.zeros(2)).to(x.device)),
                ("from pinned memory", lambda: on_device(np.zeros(2), x.device)),
                ("list", lambda: x[:, [0, 2]]),
                ("index on the host", lambda: x[torch.tensor([0, 2])]),
                ("from a list", lambda: torch.tensor([0, 2], device="cuda")),
                ("mask", lambda: x[x > 0]),
                ("counts", lambda: x.repeat_interleave(torch.ones_like(x[:, 0]).long(), dim=0)),
            ):
                with watch.inside(part), contextlib.suppress(RuntimeError):
                    fault()


KINDS = {"train": train, "infer": infer, "faults": faults}


class NotLaunched:
    """A Triton kernel that is called as one is and does nothing: fake tensors have nothing to read."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **settings: None


def main() -> None:
    paged.agrees = lambda *kind: True
    if paged_kernels("cuda").kernels:
        importlib.import_module("helix_megatron.core.kernels.paged_triton")._attend = NotLaunched()
    torch.Tensor.pin_memory = pinned
    random: Any = megatron_random
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = (
        NoRandomStates(),
        True,
    )
    random._get_cuda_rng_state = random._set_cuda_rng_state = lambda *args, **kwargs: None
    reports = {}
    for name, (kind, *arguments) in json.load(sys.stdin).items():
        watch = Watch()
        try:
            KINDS[kind](watch, *arguments)
        except Exception:
            watch.error = traceback.format_exc()
        found = [[*key, count] for key, count in sorted(watch.found.items())]
        reports[name] = {
            "operators": watch.operators,
            "backward": HAS_BACKWARD,
            "error": watch.error,
            "found": found,
        }
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
