"""Steps on fake CUDA tensors: the layer mixes no devices, makes no index on the host and waits for nothing.

A GPU's host must run ahead of its device: a wait in every layer costs more than an exchange, and CUDA graphs
cannot capture it. Here nothing is computed: every operator is looked at, with its file and line
(tests/fake_cuda_steps.py). `pytest -s` prints what was found, also outside of the layer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helix_megatron.core.caches.registry import NAMES
from helix_megatron.core.exchanges import EXACT

TESTS = Path(__file__).parents[1]
TORCH = Path(importlib.util.find_spec("torch").origin).parent
MODEL = (
    "--num-layers 1 --hidden-size 512 --kv-channels 128 --seq-length 256 --micro-batch-size 2 --swiglu "
    "--normalization RMSNorm --disable-bias-linear --bf16 --transformer-impl local "
    "--tensor-model-parallel-size 4 --vocab-size 1000"
)
HEADS = {"MHA": (2, 8, 8), "GQA": (2, 8, 2), "MQA": (4, 8, 1), "uneven": (4, 12, 3)}
ATTENTION = (
    "megatron/core/transformer/attention.py",
    "megatron/core/transformer/dot_product_attention.py",
)


def flags(heads: str, more: str = "") -> str:
    segments, queries, kv = HEADS[heads]
    return (
        f"{MODEL} --num-attention-heads {queries} --group-query-attention --num-query-groups {kv} "
        f"--intra-head-parallel-size {segments} {more}"
    )


def asks(exchange: Any) -> str:
    return f"--helix-exchange {exchange.name} --helix-query-layout {exchange.query_layout}"


TRAINING = {
    f"{exchange.name}, {heads}": flags(heads, f"{asks(exchange)} --sequence-parallel")
    for exchange in EXACT
    for heads in ("MHA", "GQA")
} | {
    "gather-kv, uneven heads": flags("uneven"),
    "gather-kv, the host's kernel": flags("GQA", "--helix-kernel host --sequence-parallel"),
    "segment-local": flags("GQA", "--helix-attention segment-local"),
    "query-key norms": flags("GQA", "--qk-layernorm --sequence-parallel"),
    "query-key norms of segments": flags("GQA", "--qk-layernorm --helix-query-layout segments"),
    "window": flags("GQA", "--window-size 63"),
    "window, all-to-all-sequence": flags(
        "GQA",
        "--window-size 63 --helix-exchange all-to-all-sequence --helix-query-layout segments",
    ),
    "selective recompute": flags("GQA", "--sequence-parallel --recompute-granularity selective"),
    "full recompute": flags(
        "GQA",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
INFERENCE = {
    f"cache {cache}, {name}": (more, cache)
    for cache in NAMES
    for name, more in {
        "MHA": flags("MHA"),
        "GQA": flags("GQA"),
        "MQA": flags("MQA"),
        "segments": flags("GQA", "--helix-query-layout segments"),
        "window": flags("GQA", "--window-size 15 --sequence-parallel"),
    }.items()
}


def compiled(folder: Path) -> str:
    """The stand-in for CUDA as a library; a build of torch with CUDA has what it stands for."""
    if list((TORCH / "lib").glob("libtorch_cuda*")):
        return ""
    header = TORCH / "include/ATen/detail/CUDAHooksInterface.h"
    if shutil.which("g++") is None or not header.exists():
        pytest.skip("a stand-in for CUDA is compiled, and g++ or the headers of torch are not here")
    library = folder / "fake_cuda.so"
    include = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    libraries = [f"-L{TORCH}/lib", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-shared", "-fPIC", "-std=c++20", *include, TESTS / "fake_cuda.cpp"]
    subprocess.run([*command, "-o", library, *libraries], check=True, timeout=500)
    return str(library)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Any]:
    """Of every case, from one process: (part, what, operator, place, count) of all that was found."""
    cases = {"faults": ("faults",)}
    cases |= {name: ("train", text) for name, text in TRAINING.items()}
    cases |= {name: ("infer", *arguments) for name, arguments in INFERENCE.items()}
    library = compiled(tmp_path_factory.mktemp("fake_cuda"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TESTS / "fake_cuda_steps.py", library],
        input=json.dumps(cases),
        env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def shown(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What was found, printed; the step itself went through."""
    assert not report["error"], report["error"]
    print(f"{report['operators']} operators")
    for part, what, operator, place, count in report["found"]:
        print(f"  {part or 'model':<10} {what:<20} {operator:<22} {place} ×{count}")
    return [tuple(found[:4]) for found in report["found"]]


def test_the_watch_sees_each_kind_of_fault(reports):
    """Otherwise the other tests could not fail."""
    found = {part: (what, operator) for part, what, operator, _ in shown(reports["faults"])}
    assert found == {
        "item": ("waits", "_local_scalar_dense"),
        "truth": ("waits", "_local_scalar_dense"),
        "to the host": ("waits", "_to_copy"),
        "mask": ("waits", "index"),
        "counts": ("waits", "repeat_interleave"),
        "list": ("waits", "_to_copy"),
        "from a list": ("waits", "_to_copy"),
        "from pageable memory": ("waits", "_to_copy"),
        "from pinned memory": ("makes on the host", "lift_fresh"),
        "index on the host": ("mixes devices", "index"),
    }


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_stays_on_the_device(reports, name):
    """No operator of the package, or of Megatron's attention, is on the host or waits, forward and backward."""
    faults = []
    for found in shown(reports[name]):
        _, what, _, place = found
        upstream = place.startswith(("megatron/", "backward of megatron/"))
        if upstream and not any(file in place for file in ATTENTION):
            continue  # embedding, loss: not ours
        if upstream and what == "makes on the host":
            continue  # the mask type, a number that stays on the host
        faults.append(found)
    assert not faults
    if not reports[name]["backward"]:
        pytest.skip("forward only: a build of torch with CUDA runs no backward pass without a GPU")


@pytest.mark.parametrize("name", INFERENCE)
def test_a_step_of_inference_waits_for_its_tokens_only(reports, name):
    """Prefill and decoding: layers make and await nothing; the host waits once, where it reads the tokens."""
    found = shown(reports[name])
    assert not [each for each in found if each[0] == "layer"]
    waits = [(part, place) for part, what, _, place in found if what == "waits"]
    assert [part for part, _ in waits] == ["sampling"], waits
    assert waits[0][1].startswith("helix_megatron/inference/sampler.py")
    assert not [each for each in found if each[1] == "mixes devices" and "helix" in each[3]]
