"""Record what a rank runs: operators as nodes, tensors as edges, collectives with their groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode

from helix_megatron.core.observe import Call
from helix_megatron.graph import costs, values
from helix_megatron.graph.model import (
    BACKWARD,
    BUFFER,
    COLLECTIVE,
    FORWARD,
    GRADIENTS,
    OPERATOR,
    SOURCES,
    Edge,
    Node,
)
from helix_megatron.graph.storages import Storages

PAUSE = "pause"
OUTSIDE = "schedule"  # the module of what no module runs: Megatron's schedule


class Participation(NamedTuple):
    """A collective as one rank sees it: its node, the group's ranks and, of messages, the other rank."""

    node: Node
    ranks: tuple[int, ...]
    peer: int | None = None


class _Tag(NamedTuple):
    """Where a tensor's value came from: a node's output, at a version of its storage."""

    node: int
    output: int
    version: int


class _Place(NamedTuple):
    module: str
    micro_batch: int


class Recorder(TorchDispatchMode):
    """Dispatch mode, to be entered inside `FakeTensorMode`; also an observer of collectives (`observing`)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self._tag = f"_helix_source_{id(self)}"  # the attribute of tensors that holds their tag
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self.participations: list[Participation] = []
        self.storages = Storages()
        self.micro_batch = 0
        self._modules: list[str] = []
        self._during: set[str] = set()
        self._call: Call | None = None
        # Autograd's number of a forward operator → where it ran.
        self._places: dict[int, _Place] = {}

    # ------------------------------------------------------------ what is there before

    def declare(self, tensor: Tensor, kind: str, name: str, module: str = "") -> None:
        """Name a tensor that no operator makes: a weight, an input, a buffer."""
        storage = self.storages.of(tensor)
        storage.kind, storage.name, storage.module = kind, name, module

    def node_of(self, tensor: Tensor) -> str:
        """Id of the node that a tensor's value came from; empty for a tensor that no operator has read."""
        tag = getattr(tensor, self._tag, None)
        return "" if tag is None else self.nodes[tag.node].id

    def finish(self) -> set[str]:
        """Drop what nothing reads: views, buffers that a collective fills, inputs. Ids of what is kept."""
        sources: dict[str, list[str]] = {}
        for edge in self.edges:
            sources.setdefault(edge.target, []).append(edge.source)
        kept: set[str] = set()
        needed: set[str] = set()
        for node in reversed(self.nodes):
            if node.id in needed or not (node.view or node.kind in SOURCES):
                kept.add(node.id)
                needed.update(sources.get(node.id, ()))
        self.nodes = [node for node in self.nodes if node.id in kept]
        self.edges = [edge for edge in self.edges if edge.target in kept]
        return kept

    # ------------------------------------------------------------------- where we are

    @contextlib.contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """Operators in the block are the module's."""
        self.enter(module)
        try:
            yield
        finally:
            self.leave()

    def enter(self, module: str) -> None:
        self._modules.append(module)

    def leave(self) -> None:
        self._modules.pop()

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """The block is GRADIENTS, sums over ranks after the backward pass; or PAUSE, no part of the pass."""
        self._during.add(what)
        try:
            yield
        finally:
            self._during.remove(what)

    def _where(self, sources: list[_Tag]) -> tuple[str, str, int]:
        """Phase, module and micro-batch of the operator that runs now."""
        node = torch._C._current_autograd_node()
        here = _Place(self._modules[-1] if self._modules else OUTSIDE, self.micro_batch)
        if GRADIENTS in self._during:
            return GRADIENTS, *here
        if node is None:
            self._places.setdefault(torch._C._autograd._get_sequence_nr() - 1, here)
            return FORWARD, *here
        place = self._places.get(node._sequence_nr()) or self._place_of(sources)
        if self._modules:  # recomputation
            place = place._replace(module=here.module)
        return BACKWARD, *place

    def _place_of(self, sources: list[_Tag]) -> _Place:
        """Accumulation of gradients belongs to what made the gradient."""
        made = [self.nodes[tag.node] for tag in sources]
        made = [node for node in made if node.kind in (OPERATOR, COLLECTIVE)] or made
        if not made:
            return _Place(OUTSIDE, self.micro_batch)
        return _Place(made[-1].module, made[-1].micro_batch)

    # ------------------------------------------------------------------------ operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._run_collective(func, args)
        if PAUSE in self._during:
            return values.execute(func, args, kwargs)
        if func.namespace not in ("aten", "helix") or func in costs.TRANSPARENT:
            return self._pass_on(func, args, kwargs)
        self.storages.now = len(self.nodes)
        written = values.written_by(func, args, kwargs)
        name = func._schema.name.split("::")[1]
        read = [] if name in costs.SHAPED else list(values.tensors_of((args, kwargs)))
        if name in costs.OVERWRITES:
            read = _others(read, written)
        sources = [self._source(tensor) for tensor in read]
        inputs = tuple(costs.spec_of(tensor) for tensor in read)
        where = self._where(sources)
        out = values.execute(func, args, kwargs)
        outputs = written + _others(values.tensors_of(out), written)
        if not outputs:
            return out
        view = func.is_view or name == "_unsafe_view" or name in costs.EMPTY
        specs = tuple(costs.spec_of(tensor) for tensor in outputs)
        op = costs.NAMES.get(func, str(func).removesuffix(".default"))
        node = self._add(where, OPERATOR, op, sources, inputs, specs, view=view)
        self.nodes[node].flops = costs.flops_of(func, args, inputs)
        self.nodes[node].bytes = costs.bytes_moved(inputs, specs, view)
        self._made(node, outputs, written)
        return out

    def _pass_on(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = values.execute(func, args, kwargs)
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            self._source(args[0])
            self.storages.of(out)
            setattr(out, self._tag, getattr(args[0], self._tag))
        return out

    # ----------------------------------------------------------------------- collectives

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        """`helix_megatron.core.observe.Observer`: what the collective about to be dispatched is for."""
        self._call = call
        try:
            return run()
        finally:
            self._call = None

    def _run_collective(self, func: Any, args: Any) -> Any:
        """Nothing moves: the outputs have their shapes already."""
        work = _finished_work()
        done = (args[0], work) if len(func._schema.returns) == 2 else work
        if PAUSE in self._during:
            return done
        call, name = self._call, func._schema.name.split("::")[1].strip("_")
        assert call is not None, f"{func} was called past torch.distributed's groups"
        outputs, inputs = costs.tensors_of_collective(name, args)
        if call.group.size() == 1:
            return done
        self.storages.now = len(self.nodes)
        sources = [self._source(tensor) for tensor in inputs]
        read, made = (tuple(map(costs.spec_of, tensors)) for tensors in (inputs, outputs))
        node = self._add(self._where(sources), COLLECTIVE, call.collective, sources, read, made)
        entry = self.nodes[node]
        entry.group, entry.purpose = call.group.group_desc, call.purpose
        entry.sent_bytes = call.sent_bytes
        entry.bytes = costs.bytes_moved(read, made, view=False)
        self._made(node, outputs, outputs)
        ranks = dist.get_process_group_ranks(call.group)
        peer = ranks[args[2]] if name in ("send", "recv") else None
        self.participations.append(Participation(entry, tuple(ranks), peer))
        if "gather" in name and len(outputs) == 1 == len(inputs):
            values.after_gather(outputs[0], inputs[0])
        elif "gather" in name:
            for output in outputs:
                values.learn(output, values.known(inputs[0]))
        return done

    # ------------------------------------------------------------------ nodes and edges

    def _add(
        self,
        where: tuple[str, str, int],
        kind: str,
        op: str,
        sources: list[_Tag],
        inputs: tuple[Any, ...],
        outputs: tuple[Any, ...],
        view: bool = False,
    ) -> int:
        phase, module, micro_batch = where
        index = len(self.nodes)
        name = f"r{self.rank}.{index}"
        node = Node(name, kind, op, module, (self.rank,), phase, inputs, outputs, view=view)
        node.micro_batch = micro_batch
        self.nodes.append(node)
        for position, tag in enumerate(sources):
            self.edges.append(Edge(self.nodes[tag.node].id, tag.output, node.id, position))
        return index

    def _made(self, node: int, outputs: list[Tensor], written: list[Tensor]) -> None:
        """Mark tensors as a node's outputs."""
        for output, tensor in enumerate(outputs):
            storage = self.storages.of(tensor)
            if any(tensor is one for one in written):
                storage.write(tensor, node, output)
            setattr(tensor, self._tag, _Tag(node, output, storage.version))

    def _source(self, tensor: Tensor) -> _Tag:
        """Where the value of a tensor came from, as of now."""
        storage = self.storages.of(tensor)
        tag = getattr(tensor, self._tag, None)
        if tag is None:
            tag = self._declared(tensor)
        later = storage.writes_after(tag.version, tensor)
        if later:
            last = later[-1]
            if len(later) == 1 and last.shape == tuple(tensor.shape):
                tag = _Tag(last.node, last.output, storage.version)
            else:
                tag = _Tag(self._written(tensor, tag, later), 0, storage.version)
        tag = tag._replace(version=storage.version)
        setattr(tensor, self._tag, tag)
        return tag

    def _declared(self, tensor: Tensor) -> _Tag:
        """A node for a tensor that no recorded operator made."""
        storage = self.storages.of(tensor)
        where = (FORWARD, storage.module, 0)
        name = storage.name or "constant"
        node = self._add(where, storage.kind or BUFFER, name, [], (), (costs.spec_of(tensor),))
        return _Tag(node, 0, 0)

    def _written(self, tensor: Tensor, tag: _Tag, later: list[Any]) -> int:
        """A node for a view of memory that was written through other views since the view was made."""
        covered = len(later) == 1 and torch.Size(later[0].shape).numel() == tensor.numel()
        sources = [] if covered else [tag]
        sources += [_Tag(write.node, write.output, write.version) for write in later]
        inputs = tuple(self.nodes[one.node].outputs[one.output] for one in sources)
        made, op = (costs.spec_of(tensor),), "view of written memory"
        return self._add(self._where(sources), OPERATOR, op, sources, inputs, made, view=True)


def _others(tensors: Iterable[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Those that are none of the known ones; tensors are compared by identity."""
    return [tensor for tensor in tensors if not any(tensor is one for one in known)]


def _finished_work() -> torch.ScriptObject:
    """What an operator of a collective returns for `wait`; torch 2.6 has no `FakeWork`."""
    done: Future[None] = Future()
    done.set_result(None)
    return _create_work_from_future(done).boxed()
