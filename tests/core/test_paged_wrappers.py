"""Others' kernels for attention over pages, without a GPU: packages of their signatures, whose bodies are plain
torch, so that what is handed to them and made of their answers is shown to be right. They were not run.

Signatures as of flash_attn_interface (FlashAttention 3, hopper/ of Dao-AILab/flash-attention), flash-attn-4
4.0.0b36 and flashinfer-python 0.7.4.
"""

from __future__ import annotations

import sys
import warnings
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_paged_triton import compare
from torch import Tensor

from helix_megatron.core.caches import paged as caches_paged
from helix_megatron.core.kernels import paged, paged_flash, paged_flashinfer
from helix_megatron.core.kernels.paged import Kind, agrees, largest_error, paged_kernels
from helix_megatron.core.kernels.partial import unfused

CPU = torch.device("cpu")
# query heads, key-value heads, D, E, page size, soft cap, window, members of the head group
CASES = {
    "several queries": (8, 2, 64, 64, 16, None, None, 1),
    "a soft cap": (8, 1, 64, 64, 16, 5.0, None, 1),
    "a window": (6, 2, 128, 128, 64, None, (9, 0), 1),
    "pages of any size": (4, 4, 64, 64, 24, None, (20, 0), 1),
    "narrower values": (4, 2, 192, 128, 16, None, None, 1),
}
DECODE = ((40, 1), (17, 1), (70, 1))
ALL_HERE = "several queries", "a soft cap", "a window", "pages of any size"
USED_FOR = {
    "FlashAttention 3": (*ALL_HERE, "narrower values"),
    "FlashAttention 4": (*ALL_HERE, "narrower values"),
    "FlashInfer": ALL_HERE,
}
CAPABILITIES = {"FlashAttention 3": (9, 0), "FlashAttention 4": (10, 0), "FlashInfer": (8, 0)}


class Packages:
    """Stand-ins for the packages, which count their calls; `lie` has them be wrong in one way."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.lie = ""

    def attention(
        self,
        q_THD: Tensor,
        k_PSGD: Tensor,
        v_PSGE: Tensor,
        first_rows: list[int],
        keys: list[int],
        pages: list[list[int]],
        scale: float,
        causal: bool,
        back: int | None,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        """o [T, H, E] and lse [T, H]: causality and windows aligned at the last query and key."""
        o = torch.full((*q_THD.shape[:2], v_PSGE.size(-1)), torch.nan, dtype=q_THD.dtype)
        lse = torch.full(q_THD.shape[:2], torch.nan)
        for number, count in enumerate(keys):
            rows = slice(first_rows[number], first_rows[number + 1])
            own = -(-count // k_PSGD.size(1))
            place = pages[number][: own or 1]
            k, v = (
                pool[place].flatten(0, 1)[:count].transpose(0, 1)[None] for pool in (k_PSGD, v_PSGE)
            )
            query = torch.arange(rows.stop - rows.start)[:, None]
            at = query if self.lie == "top left" else query + count - len(query)
            key = torch.arange(count)[None]
            hidden = (key > at) if causal else torch.zeros_like(key + at, dtype=torch.bool)
            if back is not None and self.lie != "no window":
                hidden |= key < at - back
            bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            part = unfused(
                q_THD[rows].float().transpose(0, 1)[None],
                k.float(),
                v.float(),
                bias,
                scale,
                softcap or None,
            )
            o[rows], lse[rows] = (one[0].transpose(0, 1).to(o.dtype) for one in part)
        if self.lie == "decode" and not causal:
            lse += 3
        return o, lse / 2 if self.lie == "lse" else lse

    def flash(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[Any, ...], *how: Any
    ) -> tuple[Tensor, Tensor]:
        cu_seqlens_q, longest, keys, page_table = lengths
        self.calls.append(name)
        assert all(t.stride(-1) == 1 for t in (q, k, v, page_table))
        assert {t.dtype for t in (cu_seqlens_q, keys, page_table)} == {torch.int32}
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.dtype == k.dtype == v.dtype
        assert page_table.size(0) == len(keys) == len(cu_seqlens_q) - 1
        assert longest == cu_seqlens_q.diff().max()
        numbers = cu_seqlens_q.tolist(), keys.tolist(), page_table.tolist()
        o, lse = self.attention(q, k, v, *numbers, *how)
        return o, lse.transpose(0, 1).contiguous()

    def install(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        """Make some of them importable; none of the others is."""
        modules = {
            "flash_attn_interface": {"flash_attn_with_kvcache": self.flash_attention_3()},
            "flash_attn": {},
            "flash_attn.cute": {},
            "flash_attn.cute.interface": {"flash_attn_varlen_func": self.flash_attention_4()},
            "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": self.flashinfer()},
        }
        whose = {"flash_attn_interface": "FlashAttention 3", "flashinfer": "FlashInfer"}
        for name, members in modules.items():
            made: Any = ModuleType(name)
            vars(made).update(members)
            here = whose.get(name, "FlashAttention 4") in names
            monkeypatch.setitem(sys.modules, name, made if here else None)
        monkeypatch.setattr(paged_flashinfer, "WORKSPACE_BYTES", 256)

    def flash_attention_3(self) -> Any:
        def flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k=None,
            v=None,
            qv=None,
            rotary_cos=None,
            rotary_sin=None,
            cache_seqlens=None,
            cache_batch_idx=None,
            cache_leftpad=None,
            page_table=None,
            cu_seqlens_q=None,
            cu_seqlens_k_new=None,
            max_seqlen_q=None,
            rotary_seqlens=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            rotary_interleaved=True,
            scheduler_metadata=None,
            num_splits=0,
            pack_gqa=None,
            sm_margin=0,
            return_softmax_lse=False,
        ):
            assert return_softmax_lse
            left, right = window_size
            assert right in (-1, 0)
            back = None if left < 0 else left
            lengths = (cu_seqlens_q, max_seqlen_q, cache_seqlens, page_table)
            how = (softmax_scale, causal, back, softcap)
            o, lse = self.flash("FlashAttention 3", q, k_cache, v_cache, lengths, *how)
            return o, lse, torch.empty(0), torch.empty(0)

        return flash_attn_with_kvcache

    def flash_attention_4(self) -> Any:
        def flash_attn_varlen_func(
            q,
            k,
            v,
            qv=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            min_seqlen_k=None,
            seqused_q=None,
            seqused_k=None,
            gather_kv_indices=None,
            page_table=None,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            score_mod=None,
            score_mod_bwd=None,
            mask_mod=None,
            block_sparse_tensors=None,
            aux_tensors=None,
            aux_scalars=None,
            return_lse=False,
            scheduler_metadata=None,
            seqlen_k_per_split=None,
            disable_scheduler_metadata=False,
            gather_bwd_recompute_p=False,
            gather_bwd_token_chunk=None,
        ):
            assert return_lse
            left, right = window_size
            assert right in (None, 0)
            lengths = (cu_seqlens_q, max_seqlen_q, seqused_k, page_table)
            how = (softmax_scale, causal, left, softcap)
            return self.flash("FlashAttention 4", q, k, v, lengths, *how)

        return flash_attn_varlen_func

    def flashinfer(self) -> Any:
        packages = self

        class BatchPrefillWithPagedKVCacheWrapper:
            def __init__(self, float_workspace_buffer, kv_layout="NHD", backend="auto"):
                assert float_workspace_buffer.dtype == torch.uint8
                assert (kv_layout, backend) == ("NHD", "fa2")

            def plan(
                self,
                qo_indptr,
                paged_kv_indptr,
                paged_kv_indices,
                paged_kv_last_page_len,
                num_qo_heads,
                num_kv_heads,
                head_dim_qk,
                page_size,
                head_dim_vo=None,
                custom_mask=None,
                packed_custom_mask=None,
                causal=False,
                pos_encoding_mode="NONE",
                use_fp16_qk_reduction=False,
                sm_scale=None,
                window_left=-1,
                logits_soft_cap=None,
                rope_scale=None,
                rope_theta=None,
                q_data_type="float16",
                kv_data_type=None,
            ):
                indptr = paged_kv_indptr.tolist()
                assert len(paged_kv_indices) == indptr[-1]
                assert (
                    1 <= paged_kv_last_page_len.min() <= paged_kv_last_page_len.max() <= page_size
                )
                blocks = paged_kv_indptr.diff()
                self.numbers = (
                    qo_indptr.tolist(),
                    ((blocks - 1) * page_size + paged_kv_last_page_len).tolist(),
                    [paged_kv_indices[a:b].tolist() for a, b in pairwise(indptr)],
                )
                back = None if window_left < 0 else window_left
                self.how = sm_scale, causal, back, logits_soft_cap
                self.shape = num_qo_heads, head_dim_qk, num_kv_heads, page_size, q_data_type

            def run(self, q, paged_kv_cache, return_lse=False):
                packages.calls.append("FlashInfer")
                k, v = paged_kv_cache
                assert return_lse
                assert k.stride() == v.stride()
                assert self.shape == (q.size(1), q.size(2), k.size(2), k.size(1), q.dtype)
                o, lse = packages.attention(q, k, v, *self.numbers, *self.how)
                return o, lse / torch.log(torch.tensor(2.0))

        return BatchPrefillWithPagedKVCacheWrapper


@pytest.fixture
def packages() -> Packages:
    return Packages()


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU of some compute capability, as far as the search for kernels sees."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)

    paged_kernels.cache_clear()
    agrees.cache_clear()
    yield pretend
    paged_kernels.cache_clear()
    agrees.cache_clear()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", USED_FOR)
def test_steps_equal_attention_in_fp64(monkeypatch, packages, on_gpu, name, case):
    """Chunks and tokens; what a package cannot compute is computed by torch."""
    packages.install(monkeypatch, name)
    on_gpu(CAPABILITIES[name])
    found = [kernel for kernel in paged_kernels("cuda").kernels if name == kernel.NAME]
    monkeypatch.setattr(
        caches_paged, "paged_kernels", lambda device: SimpleNamespace(kernels=tuple(found))
    )
    error, _ = compare(torch.float16, *CASES[case])
    called = set(packages.calls)
    monkeypatch.setattr(caches_paged, "paged_kernels", lambda device: SimpleNamespace(kernels=()))
    assert error <= 2 * compare(torch.float16, *CASES[case])[0]
    assert called == ({name} if case in USED_FOR[name] else set())


@pytest.mark.parametrize("name", USED_FOR)
@pytest.mark.parametrize(
    ("steps", "window", "used"),
    [
        (DECODE, None, True),  # a token sees all keys of its sequence that are here
        (DECODE, (20, 0), False),  # their distances are not those of neighbours
        ((*DECODE, (3, 19)), None, False),
    ],
    ids=["tokens", "a window", "a chunk"],
)
def test_keys_that_are_dealt_to_two_ranks(monkeypatch, packages, on_gpu, name, steps, window, used):
    """Only what needs no positions is left to kernels that know none."""
    packages.install(monkeypatch, name)
    on_gpu(CAPABILITIES[name])
    kernels = tuple(kernel for kernel in paged_kernels("cuda").kernels if name == kernel.NAME)
    monkeypatch.setattr(
        caches_paged, "paged_kernels", lambda device: SimpleNamespace(kernels=kernels)
    )
    monkeypatch.setattr(caches_paged, "agrees", lambda *kind: True)
    error, largest = compare(torch.float16, 8, 2, 64, 64, 16, None, window, 2, steps)
    assert error <= 2e-3 * largest
    assert bool(packages.calls) == used


@pytest.mark.parametrize("lie", ["top left", "no window", "lse", "decode"])
@pytest.mark.parametrize("name", USED_FOR)
def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, packages, on_gpu, name, lie):
    """Nothing is relied upon that was not seen to agree with torch on this device; it is said once."""
    packages.install(monkeypatch, name)
    on_gpu(CAPABILITIES[name])
    (kernel, *_) = paged_kernels("cuda").kernels
    kind = Kind(4, 2, 64, 64, 16, torch.float16, windowed=lie != "decode")
    assert largest_error(kernel, kind, CPU) < paged.ALLOWED[torch.float16] / 4
    packages.lie = lie
    with pytest.warns(
        UserWarning, match=f"{name} is not used for 4 query and 2 .* differ from torch's"
    ):
        assert not agrees(kernel, kind, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not agrees(kernel, kind, CPU)


def test_a_kernel_of_another_signature_is_not_used(monkeypatch, packages, on_gpu):
    """A release with other names of arguments costs a sentence."""
    packages.install(monkeypatch, "FlashAttention 4")
    sys.modules["flash_attn.cute.interface"].flash_attn_varlen_func = lambda q, k, v: None
    kernel = paged_flash.flash_attention_4()
    with pytest.warns(UserWarning, match="FlashAttention 4 is not used .* TypeError"):
        assert not agrees(kernel, Kind(4, 2, 64, 64, 16, torch.bfloat16), CPU)


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((9, 0), ["FlashAttention 3", "FlashAttention 4", "FlashInfer"]),
        ((10, 0), ["FlashAttention 4", "FlashInfer"]),
        ((8, 0), ["FlashInfer"]),
        ((7, 5), []),
    ],
)
def test_what_is_there_is_named(monkeypatch, packages, on_gpu, capability, names):
    """The fastest first, by the GPU; what is missing, too."""
    packages.install(monkeypatch, *CAPABILITIES)
    on_gpu(capability)
    text = paged_kernels("cuda").text
    found = [kernel.NAME for kernel in paged_kernels("cuda").kernels]
    assert [name for name in found if name != "Triton"] == names
    assert text.startswith(f"Attention over pages by {', '.join(found) or 'torch'}")


def test_what_is_missing_is_named(monkeypatch, packages, on_gpu):
    packages.install(monkeypatch)
    on_gpu((9, 0))
    text = paged_kernels("cuda").text
    for name in ("FlashAttention 3", "FlashAttention 4", "FlashInfer"):
        assert f"{name} is not installed" in text
    assert paged_kernels("cpu").text == "Attention over pages by torch: other kernels need a GPU."
