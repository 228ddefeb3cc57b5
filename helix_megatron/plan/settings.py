"""What is planned: the job, and how the training software runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from helix_megatron.errors import HelixError, listed
from helix_megatron.hardware import WEIGHT_BYTES
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.models import ModelSpec

# Beyond every cluster and every job there is; a search stays a matter of seconds.
MOST_GPUS, MOST_SEQUENCES, MOST_TOKENS = 200_000, 10**8, 10**8
TASKS = ("train", "prefill", "decode", "serve")  # serve: prefill and decode under a load
PRECISIONS = ("bf16", "fp8", "fp32")


@dataclass(frozen=True)
class Job:
    """The work of one step.

    task: train (an iteration), prefill (a batch of prompts) or decode (one token for each of a batch).
    sequence: tokens of a sequence; for decode, positions already in the cache.
    global_batch: sequences of a step over all ranks.
    """

    task: str = "train"
    sequence: int = 4096
    global_batch: int = 256

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise HelixError(f"--task {self.task} is unknown. Valid: {listed(TASKS)}.")
        sizes = {"--sequence-length": self.sequence, "--global-batch": self.global_batch}
        for flag, value in sizes.items():
            if value < 1:
                raise HelixError(f"{flag} {value} must be at least 1.")


@dataclass(frozen=True)
class Software:
    """How the run is done; the defaults are the training script's on GPUs with what Megatron recommends.

    kernel: of core attention, one of `attention_rates.KERNELS`. tp_overlap: what of tensor parallel
    communication runs beside matrix products: `none`; `backward`, as megatron-core overlaps it with the ones of
    backward; `full`, with Transformer Engine's user buffers forward too. dp_overlap: gradients are
    reduced during the last backward pass and weights gathered during the next forward. distributed_optimizer:
    states are dealt to data parallel ranks. gradient_bytes: of a gradient on the wire.
    scatter_gather: pipeline messages are cut over the tensor parallel ranks even without sequence parallelism,
    as Megatron-LM did before it had that (arXiv 2104.04473, section 4.1). local_modules: Megatron's unfused
    modules, which keep more, as on a CPU and in `helix graph`. cuda_graphs: layers are replayed from CUDA
    graphs, which cost the host nothing; None: in inference alone.
    """

    precision: str = "bf16"
    kernel: str = "auto"
    tp_overlap: str = "backward"
    dp_overlap: bool = True
    distributed_optimizer: bool = True
    gradient_bytes: int = 4
    dropout: bool = False
    scatter_gather: bool = False
    local_modules: bool = False
    cuda_graphs: bool | None = None

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return 4 if self.precision == "fp32" else WEIGHT_BYTES

    @property
    def unquantised(self) -> str:
        """Precision of what fp8 leaves alone: core attention, embedding and output."""
        return "bf16" if self.precision == "fp8" else self.precision


class Scenario(NamedTuple):
    """What layouts are judged on: a model, what is done with it, where, and with which software."""

    model: ModelSpec
    job: Job
    cluster: Cluster
    software: Software

    @property
    def host_seconds(self) -> float:
        """Of the host for one operator; 0 where it launches none."""
        graphs = self.software.cuda_graphs
        replayed = self.job.task != "train" if graphs is None else graphs
        return 0.0 if replayed else self.cluster.host_seconds
