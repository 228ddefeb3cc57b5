"""Optional attention kernels, by fake modules: which are found, which take which heads, and what is said."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import attention
from torch.backends.cuda import flash_sdp_enabled
from torch.nn import attention as torch_attention

from helix_megatron.core.kernels import installed
from helix_megatron.core.kernels.installed import FLASH, InstalledKernels, installed_kernels
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.masks import AttentionMask

Install = Callable[..., InstalledKernels]
ALL = (*(module for _, module, _ in FLASH.values()), "ffpa_attn")


class OnGpu(torch.Tensor):
    """A tensor of the host that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def heads(dims: int, length: int = 4, count: int = 2, dtype: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(1, count, length, dims, generator=generator, dtype=torch.float64)
    return x.to(dtype).as_subclass(OnGpu)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install(capability, **modules)`: a GPU, and packages with these functions; returns what is found."""

    def forget() -> None:
        installed_kernels.cache_clear()
        installed._activate.cache_clear()

    def put(capability: int, modules: dict[str, Any] | None = None) -> InstalledKernels:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability > 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
        for name in ALL:
            found = (modules or {}).get(name)
            module = types.ModuleType(name)
            function = "ffpa_attn_func" if name == "ffpa_attn" else "flash_attn_func"
            setattr(module, function, found)
            monkeypatch.setitem(sys.modules, name, module if found else None)
        forget()
        return installed_kernels()

    yield put
    forget()


@pytest.fixture
def activated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that torch is asked to activate, which it does."""
    names: list[str] = []
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", names.append)
    current = lambda: names[-1] if names else None  # noqa: E731
    monkeypatch.setattr(torch_attention, "current_flash_attention_impl", current)
    return names


def test_nothing_is_installed(install):
    """The usual case: torch's own kernels, in one line, and no module imported again and again."""
    assert install(9) == InstalledKernels(
        (), None, dict.fromkeys(installed_kernels().reasons, "not found")
    )
    assert installed_kernels().summary() == (
        "Kernels of attention here: torch's scaled_dot_product_attention (FlashAttention 3 not found, "
        "FlashAttention 4 not found, ffpa-attn not found)."
    )
    assert installed_kernels() is installed_kernels()


def test_each_gpu_gets_what_runs_on_it(install):
    """FlashAttention 3 is for Hopper only, and its import works anywhere."""
    packages = dict.fromkeys(ALL, print)
    assert install(9, packages).flash == ("FA3", "FA4")
    assert install(10, packages).flash == ("FA4",)
    assert install(10, packages).reasons == {"FlashAttention 3": "does not run on this GPU"}
    assert install(8, packages).flash == ()
    without = install(0, packages)
    assert (without.flash, without.wide) == ((), None)
    assert set(without.reasons.values()) == {"needs a CUDA device"}


def test_a_package_that_cannot_be_imported_is_absent(install, monkeypatch, tmp_path):
    """A build for another CUDA fails with anything; attention goes on, and the reason is said."""
    (tmp_path / "ffpa_attn.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    install(9)
    monkeypatch.delitem(sys.modules, "ffpa_attn")
    monkeypatch.syspath_prepend(tmp_path)
    installed_kernels.cache_clear()
    reason = installed_kernels().reasons["ffpa-attn"]
    assert reason == "cannot be imported (OSError: libcudart.so.13: cannot open)"


def test_flash_attention_is_activated_once_and_left_out_where_it_refuses(install, activated):
    """Active, it takes every call of torch's own, and raises for dropout and for wider heads."""
    kernels = install(9, dict.fromkeys(ALL, print))
    for _ in range(2):
        with kernels.flash_for(heads(256), 0.0):
            assert flash_sdp_enabled()
    assert activated == ["FA3"]
    for q, dropout in ((heads(128), 0.1), (heads(320), 0.0)):
        with kernels.flash_for(q, dropout):
            assert not flash_sdp_enabled()
    assert flash_sdp_enabled()
    assert activated == ["FA3"]


def test_nothing_is_activated_that_cannot_serve(install, activated):
    """FlashAttention 4 would take heads of 256 from torch's own, which can compute them."""
    kernels = install(10, dict.fromkeys(ALL, print))
    for q, dropout in (
        (heads(256), 0.0),
        (heads(64), 0.1),
        (heads(64, dtype=torch.float32), 0.0),
    ):
        with kernels.flash_for(q, dropout):
            assert flash_sdp_enabled()
    assert not activated


def test_an_activation_that_fails_is_said_once(install, monkeypatch):
    """torch refuses a package of another version only when it registers its operators."""

    def refuse(name: str) -> None:
        raise RuntimeError("does not expose FA3 kernels")

    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", refuse)
    kernels = install(9, {FLASH["FA3"][1]: print})
    with pytest.warns(
        UserWarning, match="FlashAttention 3 is installed and torch cannot activate it"
    ):
        kernels.flash_for(heads(64), 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kernels.flash_for(heads(64), 0.0):
            assert flash_sdp_enabled()


def test_wide_heads_go_to_ffpa(install):
    """Plain and causal attention, aligned at the last key; everything else stays with torch."""
    calls: list[dict[str, Any]] = []

    def ffpa(
        q: Any, k: Any, v: Any, *, is_causal: bool, scale: float, dropout_p: float, enable_gqa: bool
    ):
        calls.append({"is_causal": is_causal, "enable_gqa": enable_gqa})
        assert dropout_p == 0
        queries, keys, share = q.size(2), k.size(2), q.size(1) // k.size(1)
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(
            keys - queries if is_causal else keys
        )
        k, v = (t.repeat_interleave(share, 1).double() for t in (k, v))
        scores = (q.double() @ k.mT * scale).masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1) @ v).to(q.dtype)

    install(9, {"ffpa_attn": ffpa})
    k, v = heads(320, 6), heads(320, 6) * 0.5
    hidden = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    hidden[..., 0] = True
    for mask, taken in (
        (AttentionMask(), True),
        (AttentionMask(causal=True), True),
        (AttentionMask(causal=True, window=(2, 0)), False),
        (AttentionMask(hidden=hidden), False),
    ):
        before = len(calls)
        q = heads(320, 4, count=4)
        o = sdpa(q, k, v, mask=mask, scale=0.05, dropout=0.0)
        assert (len(calls) > before) == taken
        ordinary = [t.as_subclass(torch.Tensor).double().permute(2, 0, 1, 3) for t in (q, k, v)]
        want = attention(
            *ordinary, causal=mask.causal, window=mask.window, hidden=mask.hidden, scale=0.05
        )
        got = o.as_subclass(torch.Tensor).double().permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.01)
    assert calls == [{"is_causal": causal, "enable_gqa": True} for causal in (False, True)]
    for q in (heads(256), heads(320, dtype=torch.float32), heads(1024)):
        sdpa(q, q, q, mask=AttentionMask(causal=True), scale=0.05, dropout=0.0)
    assert len(calls) == 2
