"""Which optional packages are taken, and what is said about those that are not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import RankPool

from helix_megatron.core.kernels.installed import installed_kernels
from helix_megatron.errors import HelixError
from helix_megatron.megatron.optional import available_backends, describe

PACKAGES = ("apex", "transformer_engine", "flash_attn")
APEX = {
    "apex/__init__.py": "",
    "apex/optimizers.py": "class FusedAdam: pass",
    "apex/normalization.py": "class FusedLayerNorm: pass",
    "apex/multi_tensor_apply.py": "class multi_tensor_applier: available = True",
}
TRANSFORMER_ENGINE = {
    "transformer_engine/__init__.py": "",
    "transformer_engine/pytorch.py": "class TransformerLayer: pass",
}
Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write fake packages into a directory of their own, and forget them afterwards."""

    def forget() -> None:
        available_backends.cache_clear()
        for name in list(sys.modules):
            if name.partition(".")[0] in PACKAGES:
                del sys.modules[name]

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    forget()
    yield write
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_nothing_installed(install: Install) -> None:
    """The usual case without a GPU: torch everywhere, and no complaint."""
    install({})
    backends = available_backends()
    assert (backends.adam, backends.norm) == ("torch", "torch")
    assert not backends.transformer_engine
    assert not backends.flash_attention
    assert backends.summary() == (
        "Optional packages: apex not found, Transformer Engine not found, flash-attn not found: "
        "torch norms and torch Adam are used."
    )
    backends.check()


def test_apex_is_used(install: Install, gpu: None) -> None:
    """NVIDIA's apex, built, with a GPU."""
    install(APEX)
    backends = available_backends()
    assert (backends.adam, backends.norm, backends.conflict) == ("apex", "apex", "")
    assert "apex" not in backends.reasons
    assert backends.summary().endswith("apex norms and apex Adam are used.")


def test_transformer_engine_comes_first(install: Install, gpu: None) -> None:
    """megatron-core takes the Adam of Transformer Engine before that of apex."""
    install(APEX | TRANSFORMER_ENGINE | {"flash_attn.py": "def flash_attn_func(): pass"})
    backends = available_backends()
    assert (backends.adam, backends.norm) == ("transformer_engine", "apex")
    assert backends.transformer_engine
    assert backends.flash_attention
    assert backends.summary() == (
        "Optional packages: all found: apex norms and Transformer Engine Adam are used."
    )


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"apex/__init__.py": ""}, "apex.optimizers.FusedAdam"),
        ({"apex.py": "def main(): pass"}, "apex.optimizers.FusedAdam"),
        (
            {"apex/__init__.py": "", "apex/optimizers.py": "class FusedAdam: pass"},
            "apex.normalization.FusedLayerNorm",
        ),
    ],
)
def test_the_unrelated_apex_is_named(
    install: Install, gpu: None, files: dict[str, str], missing: str
) -> None:
    """PyPI's `apex` is a web toolkit: megatron-core mistakes it for NVIDIA's."""
    install(files)
    backends = available_backends()
    assert (backends.adam, backends.norm) == ("torch", "torch")
    assert backends.reasons["apex"] == (
        f"is another package of that name (it has no {missing}; pip uninstall apex, NVIDIA's is "
        "built from https://github.com/NVIDIA/apex)"
    )
    backends.check()  # megatron-core goes on; norms are taken care of


@pytest.mark.parametrize(
    ("text", "reason", "fatal"),
    [
        ("import pyramid", "(ModuleNotFoundError: No module named 'pyramid')", False),
        ("raise RuntimeError('no driver')", "(RuntimeError: no driver)", True),
        ("raise SystemExit(1)", "(SystemExit: 1)", True),
        ("def", "(SyntaxError: ", True),
    ],
)
def test_an_apex_that_raises_counts_as_absent(
    install: Install, gpu: None, text: str, reason: str, fatal: bool
) -> None:
    """megatron-core survives an ImportError only: anything else has to be said beforehand."""
    install({"apex/__init__.py": text})
    backends = available_backends()
    assert backends.norm == "torch"
    assert backends.reasons["apex"].startswith(f"cannot be imported {reason}")
    if fatal:
        with pytest.raises(HelixError, match=r"megatron-core imports it\. Try pip uninstall apex"):
            backends.check()
    else:
        backends.check()


def test_an_apex_without_its_extension(install: Install, gpu: None) -> None:
    """Installed from Python alone, apex has the classes, and they raise when they are built."""
    built_without = {"apex/multi_tensor_apply.py": "class multi_tensor_applier: available = False"}
    install(APEX | built_without)
    backends = available_backends()
    assert (backends.adam, backends.norm) == ("torch", "torch")
    assert backends.reasons["apex"] == "was built without its CUDA extensions"
    with pytest.raises(HelixError, match="would take its FusedAdam"):
        backends.check()


def test_packages_for_gpus_are_not_used_without_one(install: Install) -> None:
    """They import on a machine without a GPU, and fail at the first call."""
    install(APEX | TRANSFORMER_ENGINE)
    backends = available_backends()
    assert (backends.adam, backends.norm) == ("torch", "torch")
    assert backends.reasons["apex"] == "needs a CUDA device"
    assert backends.reasons["Transformer Engine"] == "needs a CUDA device"


def test_backends_are_probed_once(install: Install) -> None:
    """Probing imports packages: not in every layer."""
    install({})
    assert available_backends() is available_backends()


def summaries() -> str:
    return f"{available_backends().summary()}\n{installed_kernels().summary()}"


def say_three_times() -> list[list[str]]:
    """What this rank says in its group, and again in a second one."""
    said: list[list[str]] = []
    for _ in range(2):
        said.append([])
        for _ in range(3):
            assert describe(said[-1].append) == summaries()
        store = dist.distributed_c10d._get_default_store()
        rank, size = dist.get_rank(), dist.get_world_size()
        dist.barrier()
        dist.destroy_process_group()
        again = dist.PrefixStore("again", store)
        dist.init_process_group("gloo", store=again, rank=rank, world_size=size)
    return said


def test_the_summary_is_said_once_per_group(pool: RankPool) -> None:
    """Eight ranks must not say the same thing eight times, nor every layer again."""
    first, second = pool.run(say_three_times, world_size=2)
    line = summaries()
    assert first == [[line], [line]]
    assert second == [[], []]
