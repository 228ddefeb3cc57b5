"""What gpu_check.sh runs: steps in processes of their own, and a Markdown page of their results.

A step that fails or takes too long costs its own table only. Each step prints its tables as Markdown and ends
with status 0 if all of it is as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_check_paged

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8
EXACT, HALF = 1e-10, 2.0  # fp64 error; half-precision error in multiples of the unsharded one's
LOSSES = 2e-2  # relative difference of losses in bf16


def main() -> int:
    parser = argparse.ArgumentParser(description="Check Helix on the GPUs of this machine.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.md"))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    gpus = count_gpus()
    if args.device == "cuda" and not gpus:
        print(
            "torch sees no NVIDIA GPU here, so there is nothing to check (--device cpu tries the script)."
        )
        return 2
    machine = Machine(args.device, gpus)
    if args.step:
        return STEPS[args.step][1](machine)
    return write_page(machine, args.output)


def count_gpus() -> int:
    """Asked in a process of its own: one that has asked CUDA cannot fork the ranks."""
    program = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{sys.executable} cannot import torch. Try PYTHON=/path/to/python, one that has it.")
        sys.exit(2)
    return int(done.stdout)


@dataclass(frozen=True)
class Machine:
    """What the steps run on."""

    device: str
    gpus: int

    @property
    def ranks(self) -> int:
        """Tensor parallel ranks: as many as there are GPUs, a power of two; 4 share a single one."""
        return 4 if self.gpus < 2 else 1 << (min(self.gpus, 8).bit_length() - 1)

    @property
    def exchange(self) -> str:
        if self.device == "cpu":
            return f"{self.ranks} ranks on the CPU over gloo, in small sizes: this tries the script only"
        if self.gpus == 1:
            return (
                f"{self.ranks} ranks share one GPU, so exchanges go over gloo and times mean little"
            )
        return f"{self.ranks} ranks over NCCL, a GPU for each"

    def size(self, cuda: int, cpu: int) -> int:
        return cuda if self.device == "cuda" else cpu


# ------------------------------------------------------------------------------------------- the page


def write_page(machine: Machine, output: Path) -> int:
    """Run all steps, write the page after each, and say how it went."""
    begun = time.monotonic()
    command = shlex.join(["./scripts/gpu_check.sh", *sys.argv[1:]])
    sections, failed = [environment(machine, command)], []
    for name, (title, _, limit) in STEPS.items():
        left = MINUTES * 60 - 15 - (time.monotonic() - begun)
        print(f"{title} ...", flush=True)
        text, error = run_step(name, machine.device, min(limit, left))
        if error:
            failed.append(f"{title}: {error}")
        sections.append(f"## {title}\n\n{text}")
        minutes = (time.monotonic() - begun) / 60
        verdict = "; ".join(failed) or f"all {len(STEPS)} steps are as they should be"
        head = (
            f"# Helix on {platform.node() or 'this machine'}\n\n**{verdict}** ({minutes:.1f} min)\n"
        )
        output.write_text("\n".join([head, *sections]), encoding="utf-8")
    print(f"{verdict}. The page: {output}")
    return 1 if failed else 0


def run_step(name: str, device: str, limit: float) -> tuple[str, str]:
    """The Markdown of a step, and what went wrong in a few words."""
    command = [sys.executable, __file__, "--step", name, "--device", device]
    if limit < 5:
        return "", "no time was left"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=ROOT, start_new_session=True
        )
        problem = ""
        try:
            if process.wait(limit):
                problem = f"status {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        out.seek(0)
        err.seek(0)
        text, log = out.read(), err.read()
    if problem and log:
        text += f"\n```\n{log[-3000:].strip()}\n```\n"
    return text, problem


def environment(machine: Machine, command: str) -> str:
    """Versions and devices."""

    def said(*words: str) -> str:
        how: Any = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            return subprocess.run(words, check=False, **how).stdout.strip()
        return ""

    commit = said("git", "describe", "--always", "--dirty") or "unknown"
    query = "--query-gpu=name,memory.total,driver_version"
    gpus = said("nvidia-smi", query, "--format=csv,noheader") if machine.gpus else "none used"
    doctor = said(sys.executable, "-m", "helix_megatron.doctor")
    rows = [
        ("command", f"`{command}`"),
        ("date", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"),
        ("commit", commit),
        ("system", f"{platform.platform()}, {os.cpu_count()} CPUs"),
        ("GPUs", "<br>".join(gpus.splitlines()) or f"{machine.gpus}"),
        ("ranks", machine.exchange),
    ]
    return f"{markdown(('what', ''), rows)}\n```\n{doctor}\n```\n"


def markdown(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# ------------------------------------------------------------------------- exchanges against one rank


@dataclass(frozen=True)
class Heads:
    """Attention of h query and g key-value heads of `dim` on n groups of m ranks."""

    heads: int
    kv_heads: int
    groups: int
    segments: int
    dim: int
    length: int
    batch: int = 4

    def layout(self, query_layout: Any) -> Any:
        """None where query heads cannot be dealt whole."""
        from helix_megatron.core.layout import HeadLayout
        from helix_megatron.errors import HelixError

        sizes = self.heads, self.kv_heads, self.dim, self.groups, self.segments
        with contextlib.suppress(HelixError):
            return HeadLayout(*sizes, query_layout)
        return None


def exchanges(machine: Machine) -> int:
    """Every exchange that fits, in fp64 and bf16, forward and backward."""
    from helix_megatron.bench.spawn import run_on_ranks
    from helix_megatron.core.exchanges import EXACT as ALL

    rows = run_on_ranks(exchange_rows, machine, ranks=machine.ranks)
    print(
        "Relative error of output and gradients: in fp64 against one rank; in bf16 in multiples of the error "
        f"of unsharded bf16 attention, both against fp32. Allowed: {EXACT:.0e} and {HALF:g}.\n"
    )
    head = ("exchange", "heads", "groups × segments", "back end", "fp64", "bf16", "")
    shown = [(*row[:4], f"{row[4]:.1e}", f"{row[5]:.2f}", verdict(row[6])) for row in rows]
    print(markdown(head, shown))
    missing = {exchange.name for exchange in ALL} - {row[0] for row in rows}
    if missing:
        print(f"Not reached: {', '.join(sorted(missing))}.")
    return int(bool(missing) or not all(row[6] for row in rows))


def verdict(good: bool) -> str:
    return "ok" if good else "**wrong**"


def exchange_rows(machine: Machine) -> list[tuple[Any, ...]]:
    """On each rank: (exchange, heads, layout, back end, fp64 error, bf16 error, whether both are allowed)."""
    import torch
    import torch.distributed as dist

    from helix_megatron.core.collectives import backend_of
    from helix_megatron.core.exchanges import EXACT as ALL
    from helix_megatron.core.exchanges import AttentionShape

    ranks, rank = machine.ranks, dist.get_rank()
    dim, length = machine.size(64, 16), machine.size(64, 16)
    device = torch.device(machine.device)
    rows = []
    for m in sorted({2, ranks // 2, ranks} - {1}):
        n = ranks // m
        groups = [dist.new_group(list(range(i * m, (i + 1) * m))) for i in range(n)]
        group = groups[rank // m]
        place = f"{n} × {m}", backend_of(group, device)
        kinds = ("MHA", ranks, ranks), ("GQA", 2 * ranks, n), ("fewer than ranks", n, n)
        for name, h, g in kinds:
            case = Heads(h, g, n, m, dim, length)
            whole = {dtype: unsharded(case, dtype) for dtype in ("float64", "float32", "bfloat16")}
            for exchange in ALL:
                layout = case.layout(exchange.query_layout)
                if layout is None or exchange.supports(
                    AttentionShape(layout, case.batch, length, length)
                ):
                    continue
                run = partial(partitioned, case, layout, exchange.name, group, device)
                exact = compared(run("float64"), own_parts(whole["float64"], layout, rank))
                half = ratios(run("bfloat16"), whole, layout, rank)
                worst = torch.tensor([max(exact), max(half)], device=device)
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                good = bool(worst[0] <= EXACT and worst[1] <= HALF)
                rows.append((exchange.name, f"{name} {h}/{g}", *place, *worst.tolist(), good))
    return rows


def drawn(case: Heads, dtype: str) -> list[Any]:
    """q, k, v and the gradient of the output, the same on every rank."""
    import torch

    random = torch.Generator().manual_seed(7)
    tokens, kv = (case.length, case.batch), (case.kv_heads, case.dim)
    shapes = [(case.heads, case.dim), kv, kv, (case.heads * case.dim,)]
    return [
        torch.randn(*tokens, *shape, generator=random, dtype=torch.float64).to(
            getattr(torch, dtype)
        )
        for shape in shapes
    ]


def unsharded(case: Heads, dtype: str) -> list[Any]:
    """The output and the gradients of q, k, v on one rank: the oracle of the tests, on the CPU."""
    from oracle import attention

    q, k, v, grad = drawn(case, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    output = attention(*leaves, causal=True)
    output.backward(grad)
    return [output.detach(), *(t.grad for t in leaves)]


def own_parts(whole: list[Any], layout: Any, rank: int) -> list[Any]:
    """What a rank holds of an output (or its gradient) and of q, k, v."""
    output, q, k, v = whole
    dims = layout.segment_dims(layout.partition(rank)[1])
    q = q[:, :, list(layout.query_heads(rank))]
    q = q if layout.query_layout == "heads" else q[..., dims]
    k, v = (t[:, :, list(layout.kv_heads(rank))][..., dims] for t in (k, v))
    return [output[..., layout.proj_columns(rank)], q, k, v]


def partitioned(
    case: Heads, layout: Any, exchange: str, group: Any, device: Any, dtype: str
) -> list[Any]:
    """This rank's output and gradients."""
    import torch.distributed as dist

    from helix_megatron.core.attention import partitioned_attention
    from helix_megatron.core.masks import AttentionMask

    *qkv, grad = drawn(case, dtype)
    grad, *local = own_parts([grad, *qkv], layout, dist.get_rank())
    leaves = [t.to(device).requires_grad_() for t in local]
    output = partitioned_attention(
        *leaves, layout=layout, group=group, mask=AttentionMask(causal=True), exchange=exchange
    )
    output.backward(grad.to(device))
    return [output.detach(), *(t.grad for t in leaves)]


def compared(found: list[Any], wanted: list[Any]) -> list[float]:
    """Relative errors; infinite for what is no number or nothing."""
    errors = []
    pairs = ((a.double().cpu(), b.double()) for a, b in zip(found, wanted, strict=True))
    for value, expected in pairs:
        error = ((value - expected).norm() / expected.norm()).item()
        errors.append(error if value.isfinite().all() and value.abs().max() > 0 else float("inf"))
    return errors


def ratios(found: list[Any], whole: dict[str, list[Any]], layout: Any, rank: int) -> list[float]:
    """Errors of bf16 against fp32, in multiples of what unsharded bf16 attention errs by."""
    wanted = own_parts(whole["float32"], layout, rank)
    allowed = compared(own_parts(whole["bfloat16"], layout, rank), wanted)
    return [error / usual for error, usual in zip(compared(found, wanted), allowed, strict=True)]


# -------------------------------------------------------------------------------------------- kernels


def kernels(machine: Machine) -> int:
    """Each attention kernel that is here: its error in bf16, and its time at a longer sequence."""
    import torch

    from helix_megatron.core.kernels.installed import FLASH, installed_kernels

    found = installed_kernels()
    length = machine.size(4096, 64)
    print(
        f"{found.summary()}\n\nbf16, causal, 8 query and 2 key-value heads. Error in multiples of unfused bf16 "
        f"attention's; ms: forward and backward, {length} positions.\n"
    )
    print(markdown(("d", "kernel", "error", "ms", ""), []), end="")
    good = True
    for dim in (64, 128, 256, 512) if machine.device == "cuda" else (64,):
        for name, context in attempts(found):
            with context():
                try:
                    error, seconds = kernel_figures(machine, dim)
                except RuntimeError as refusal:
                    print(f"| {dim} | {name} | | | {str(refusal).splitlines()[0][:80]} |")
                    continue
            right = error <= HALF
            good &= right
            active = torch.nn.attention.current_flash_attention_impl()
            shown = f"{name} ({FLASH[active][0]})" if name == "flash" and active in FLASH else name
            # At once: a kernel that compiles for too long costs its own row and those behind it only.
            print(
                f"| {dim} | {shown} | {error:.2f} | {seconds * 1e3:.2f} | {verdict(right)} |",
                flush=True,
            )
    text, rows, paged_good = gpu_check_paged.differences(machine.device)
    print(f"\n{text}\n\nbf16, largest difference from torch in fp32, of the largest value:\n")
    print(markdown(("kernel", "d", "page", "window, soft cap", "difference"), rows))
    return int(not (good and paged_good))


def attempts(found: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What torch would choose (or ffpa-attn), and each of its kernels by force."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    yield "chosen", contextlib.nullcontext
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("unfused", SDPBackend.MATH),
    ):
        yield name, partial(sdpa_kernel, backend)


def kernel_figures(machine: Machine, dim: int) -> tuple[float, float]:
    """(error in multiples of the oracle's in bf16, seconds)."""
    import torch

    from helix_megatron.core.kernels.sdpa import sdpa
    from helix_megatron.core.masks import AttentionMask

    def run(q: Any, k: Any, v: Any, grad: Any) -> list[Any]:
        leaves = [t.detach().to(machine.device).requires_grad_() for t in (q, k, v)]
        first = [t.permute(1, 2, 0, 3) for t in leaves]
        mask = AttentionMask(causal=True)
        output = sdpa(*first, mask=mask, scale=dim**-0.5, dropout=0.0)
        output = output.permute(2, 0, 1, 3).flatten(2)
        output.backward(grad.to(machine.device))
        return [output.detach(), *(t.grad for t in leaves)]

    case = Heads(8, 2, 1, 1, dim, machine.size(128, 16), batch=1)
    exact, usual = (unsharded(case, dtype) for dtype in ("float32", "bfloat16"))
    found = compared(run(*drawn(case, "bfloat16")), exact)
    error = max(a / b for a, b in zip(found, compared(usual, exact), strict=True))
    longer = Heads(8, 2, 1, 1, dim, machine.size(4096, 64), batch=1)
    inputs = [t.to(machine.device) for t in drawn(longer, "bfloat16")]
    wait = torch.cuda.synchronize if machine.device == "cuda" else lambda: None
    seconds = []
    for _ in range(machine.size(8, 2)):
        wait()
        begun = time.perf_counter()
        run(*inputs)
        wait()
        seconds.append(time.perf_counter() - begun)
    return error, statistics.median(seconds[1:])


# ----------------------------------------------------------------------------- training and the benchmark


def training(machine: Machine) -> int:
    """The training script with stock attention and with Helix, from the same weights."""
    size = partial(machine.size)
    flags = (
        f"--num-layers {size(4, 2)} --hidden-size {size(2048, 32)} --num-attention-heads {2 * machine.ranks} "
        f"--group-query-attention --num-query-groups {machine.ranks} --kv-channels {size(128, 16)} "
        f"--seq-length {size(2048, 32)} --micro-batch-size 1 --global-batch-size {size(4, 2)} --swiglu "
        f"--normalization RMSNorm --disable-bias-linear --bf16 --train-iters {size(6, 3)} --lr 1e-4 "
        f"--nproc-per-node {machine.ranks} --tensor-model-parallel-size {machine.ranks}"
    ).split()
    if machine.gpus == 1:
        flags += ["--distributed-backend", "gloo"]
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, segments in (("stock", 1), ("Helix, m = 2", 2)):
            file = Path(folder, f"{segments}.jsonl")
            more = ["--intra-head-parallel-size", str(segments), "--metrics-jsonl", str(file)]
            command = [sys.executable, "scripts/pretrain_gpt.py", *flags, *more]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"`{shlex.join(command[1:])}` failed.")
                print(done.stdout[-1500:] + done.stderr[-1500:], file=sys.stderr)
                return 1
            runs[name] = [json.loads(line) for line in file.read_text().splitlines()]
    print(f"`scripts/pretrain_gpt.py {shlex.join(flags)}`\n")
    rows = [
        (
            name,
            *(f"{steps[index]['lm_loss']:.4f}" for index in (0, -1)),
            f"{statistics.median(step['iteration_ms'] for step in steps[1:]):.0f}",
            f"{steps[-1]['attention_bytes_per_token']:.0f}",
        )
        for name, steps in runs.items()
    ]
    print(
        markdown(("", "first loss", "last loss", "ms per step", "attention bytes per token"), rows)
    )
    stock, helix = ([step["lm_loss"] for step in steps] for steps in runs.values())
    difference = max(abs(a - b) / abs(a) for a, b in zip(stock, helix, strict=True))
    right = difference <= LOSSES
    print(f"Losses differ by {difference:.1e} at most; allowed: {LOSSES:.0e}: {verdict(right)}.")
    return int(not right)


def benchmark(machine: Machine) -> int:
    """`helix bench attention`, more ranks than key-value heads."""
    ranks = machine.ranks
    heads = f"{2 * ranks},{ranks // 2},{ranks},{machine.size(128, 16)}"
    lengths = ["--sequence-length", str(machine.size(4096, 32)), "--micro-batch-size", "1"]
    turns = ["--repeats", str(machine.size(11, 2)), "--device", machine.device]
    command = ["bench", "attention", "--cases", heads, "--dtype", "bf16", *lengths, *turns]
    program = [sys.executable, "-m", "helix_megatron.cli", *command]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    print(f"`helix {shlex.join(command)}`\n\n```\n{done.stdout.strip()}\n```")
    print(done.stderr, file=sys.stderr)
    return done.returncode


# name: (title, what it runs, seconds that it may take)
STEPS: dict[str, tuple[str, Callable[[Machine], int], int]] = {
    "exchanges": ("Exchanges against one rank", exchanges, 120),
    "kernels": ("Attention kernels", kernels, 90),
    "training": ("Training with and without Helix", training, 150),
    "benchmark": ("The attention layer against stock Megatron", benchmark, 110),
}

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))  # the oracle
    sys.exit(main())
