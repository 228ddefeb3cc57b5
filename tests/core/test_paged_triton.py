"""Triton's kernel over pages, in Triton's interpreter and compiled ahead of time; nothing here runs on a GPU.

Run by pytest, each test starts this file as a program, since Triton must be told before it is imported. Without
Triton (builds of torch for the CPU do not bring it: pip install triton) they are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

NEEDS_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
BLACKWELL = 100
# query heads, key-value heads, D, E, page size, soft cap, window, members of the head group
CASES = (
    (8, 2, 64, 64, 16, None, None, 1),
    (8, 1, 80, 80, 16, 5.0, None, 2),
    (6, 2, 128, 128, 64, None, (9, 0), 1),
    (4, 2, 192, 128, 16, None, (20, 0), 2),
    (24, 1, 576, 512, 16, None, None, 2),
)


def program(name: str, timeout: float, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, __file__, name],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@NEEDS_TRITON
def test_steps_equal_attention_in_fp64():
    """Chunks, tokens, keys dealt to two ranks: fp32 to rounding, fp16 within twice torch's error in fp16."""
    found = program("interpret", 300, TRITON_INTERPRET="1")
    assert found.count("equal") == 2 * len(CASES)


@NEEDS_TRITON
@pytest.mark.full("inference")
def test_no_register_spills():
    """Compiled for Hopper and Blackwell in bf16, decoding and chunks, heads of 64 to 576 dimensions."""
    lines = program("compile", 600).splitlines()
    assert len(lines) == 2 * 2 * 5
    for line in lines:
        registers, spilled = map(int, re.findall(r"(\d+) (?:registers|bytes)", line))
        assert 0 < registers <= 255, line
        assert spilled == 0, line


# ------------------------------------------------------------------------------ the program


def interpret() -> None:
    from helix_megatron.core.caches import paged
    from helix_megatron.core.kernels import paged_triton

    kernel = SimpleNamespace(kernels=(paged_triton,))
    paged.agrees = lambda *kind: True
    for case in CASES:
        for dtype in (torch.float32, torch.float16):
            paged.paged_kernels = lambda device: kernel
            error, largest = compare(dtype, *case)
            if dtype is torch.float16:
                paged.paged_kernels = lambda device: SimpleNamespace(kernels=())
                assert error <= 2 * compare(dtype, *case)[0], (case, error)
            else:
                assert error <= 1e-5 * largest, (case, error)
            print("equal", dtype, case, error)


def compare(
    dtype: torch.dtype,
    heads: int,
    groups: int,
    d: int,
    e: int,
    size: int,
    softcap: float | None,
    window: tuple[int, int] | None,
    members: int,
    steps: Sequence[tuple[int, int]] = ((40, 1), (0, 21), (6, 1), (37, 5)),
) -> tuple[float, float]:
    """(largest error, largest value) of a step over all members, against attention in fp64.

    steps: of each sequence the positions before, and the new ones.
    """
    from helix_megatron.core.caches.book import PageBook
    from helix_megatron.core.caches.paged import LocalPiece, PagedWork
    from helix_megatron.core.kernels.partial import merge

    torch.manual_seed(3)
    book = PageBook(members, 64, size, dealt=members > 1)
    pools = [torch.randn(2, groups, 64, size, max(d, e)).to(dtype) for _ in range(members)]
    queries = sum(count for _, count in steps)
    q = torch.randn(queries, heads, d).to(dtype)
    scale = d**-0.5
    wanted = torch.zeros(queries, heads, e, dtype=torch.float64)
    pieces: list[list[Any]] = [[] for _ in range(members)]
    row = 0
    for number, (before, count) in enumerate(steps):
        length = before + count
        book.add(number, number % members, length)
        assert book.grow(number, length)
        places = np.arange(length)
        owner = book.owners(number, places)
        k = torch.zeros(length, groups, d, dtype=torch.float64)
        v = torch.zeros(length, groups, e, dtype=torch.float64)
        for member in range(members):
            own = book.positions(number, member, length)
            if not len(own):
                continue
            slots = book.slots(number, member, places[owner == member])
            k[own] = pools[member][0].flatten(1, 2)[:, slots, :d].transpose(0, 1).double()
            v[own] = pools[member][1].flatten(1, 2)[:, slots, :e].transpose(0, 1).double()
            rows = (row, row + count)
            pieces[member].append(LocalPiece(rows, before, book.pages(number, member), own))
        for step in range(count):
            at = before + step
            first = 0 if window is None else max(0, at - window[0])
            keys = k[first : at + 1].repeat_interleave(heads // groups, 1)
            values = v[first : at + 1].repeat_interleave(heads // groups, 1)
            scores = torch.einsum("hd,shd->hs", q[row + step].double(), keys) * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            wanted[row + step] = torch.einsum("hs,she->he", scores.softmax(-1), values)
        row += count
    parts = []
    for member in range(members):
        work = PagedWork(pieces[member], queries, size, dtype, torch.device("cpu"), {window})
        k, v = (
            pools[member][kind].permute(1, 2, 0, 3)[..., :width] for kind, width in ((0, d), (1, e))
        )
        parts.append(work.attend(q, k, v, scale=scale, window=window, softcap=softcap))
    o = merge(torch.stack([o.float() for o, _ in parts]), torch.stack([lse for _, lse in parts]))
    assert torch.isfinite(o).all()
    assert o.abs().max() > 0
    return (o - wanted).abs().max().item(), wanted.abs().max().item()


def compile_all() -> None:
    """Registers and spills of the kernel for sm_90 and sm_100, by the assembler that Triton brings."""
    from helix_megatron.core.kernels import paged_triton

    for heads, d, e, size in (
        (8, 64, 64, 16),
        (8, 128, 128, 64),
        (8, 256, 256, 16),
        (8, 256, 256, 256),
        (128, 576, 512, 64),
    ):
        for queries in (1, paged_triton.QUERIES):
            for capability in (90, BLACKWELL):
                print(compiled(heads, d, e, size, queries, capability), flush=True)


def compiled(heads: int, d: int, e: int, size: int, queries: int, capability: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from helix_megatron.core.kernels import paged_triton

    q, k, v = (
        torch.empty(1, n, width, dtype=torch.bfloat16, device="meta")
        for n, width in ((heads, d), (size, d), (size, e))
    )
    tiles = paged_triton.Tiles(torch.empty(0), torch.empty(0), queries, 1)
    constants, options = paged_triton.constants(
        q, k.unsqueeze(2), v.unsqueeze(2), tiles, capped=True
    )
    names = paged_triton._attend.arg_names
    types = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), "*bf16")
    types |= {"lse_ptr": "*fp32", "tile_ptr": "*i32", "page_ptr": "*i32"}
    types |= {"scale": "fp32", "softcap": "fp32"}
    aligned = ("_ptr", "q_t", "q_h", "k_p", "k_s", "k_g", "v_p", "v_s", "v_g", "o_t", "o_h")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name.endswith(aligned)
    }
    source = ASTSource(paged_triton._attend, types, constexprs=constants, attrs=attributes)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = "ptxas-blackwell" if capability >= BLACKWELL else "ptxas"
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    command = [path, "-v", f"-arch=sm_{capability}a", "-o", os.devnull, "-"]
    said = subprocess.run(
        command, input=made.asm["ptx"], capture_output=True, text=True, check=True
    ).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    assert registers is not None
    return f"sm_{capability} d {d} page {size} queries {queries}: {registers[1]} registers, {spilled} bytes"


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_all}[sys.argv[1]]()
