"""Attention with soft caps: block by block it is the plain formula, and it keeps no scores of the sequence."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

from helix_megatron.core.kernels import softcap
from helix_megatron.core.kernels.softcap import capped, with_cap
from helix_megatron.core.masks import AttentionMask
from helix_megatron.errors import HelixError


def tensors(length: int, keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q [2, 4, L, 8], k and v [2, 2, S, 8], which want gradients."""
    random = torch.Generator().manual_seed(length + keys)
    shapes = ((2, 4, length, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    drawn = (torch.randn(*shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [tensor.mul(2).to(dtype).requires_grad_() for tensor in drawn]


@pytest.mark.parametrize(
    ("length", "keys", "mask"),
    [
        (16, 16, {"causal": True}),
        (13, 13, {"causal": True, "window": (5, 0)}),
        (7, 19, {"causal": True}),
        (11, 11, {}),
        (12, 12, {"causal": True, "hidden": True}),
    ],
)
def test_blocks_are_the_formula(monkeypatch, length, keys, mask):
    """Whatever blocks see of keys, outputs and gradients are those of one rank in fp64."""
    monkeypatch.setattr(softcap, "CAPPED_QUERIES", 4)
    hidden = None
    if mask.get("hidden"):
        hidden = torch.zeros(2, 1, 1, keys, dtype=torch.bool)
        hidden[0, ..., :2] = True  # the first two queries see nothing
    found, wanted = tensors(length, keys), tensors(length, keys)
    output = capped(
        0.7, *found, mask=AttentionMask(**mask | {"hidden": hidden}), scale=0.4, dropout=0.0
    )
    settings = mask | {"hidden": hidden, "scale": 0.4}
    sequence_first = (tensor.permute(2, 0, 1, 3) for tensor in wanted)
    expected = oracle.attention(*sequence_first, **settings, softcap=0.7)
    expected = expected.unflatten(2, (4, 8)).permute(1, 2, 0, 3)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(output, expected, rtol=0, atol=1e-12)
    uncapped = oracle.attention(*(t.permute(2, 0, 1, 3) for t in wanted), **settings)
    assert not torch.allclose(uncapped.unflatten(2, (4, 8)).permute(1, 2, 0, 3), expected, atol=0.1)
    for own, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(own.grad, theirs.grad, rtol=0, atol=1e-12)


def test_what_is_kept_for_the_backward_pass_grows_with_the_sequence(monkeypatch):
    """Scores of a long sequence would need its square."""
    monkeypatch.setattr(softcap, "CAPPED_QUERIES", 16)

    def kept(length: int) -> int:
        sizes = []
        q, k, v = tensors(length, length, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            capped(2.0, q, k, v, mask=AttentionMask(True, (15, 0)), scale=1.0, dropout=0.0)
        return sum(sizes)

    assert kept(256) <= 2.2 * kept(128)


def test_dropped_weights_are_the_same_in_the_backward_pass():
    """Scores are computed again there: with other weights dropped gradients would be of another function."""
    q, k, v = tensors(9, 9)

    def attend() -> torch.Tensor:
        torch.manual_seed(3)
        return capped(2.0, q, k, v, mask=AttentionMask(True), scale=0.5, dropout=0.4)

    attend().square().sum().backward()
    step = 1e-6 * torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v.add_(step)
        above = attend().square().sum()
        v.sub_(2 * step)
        below = attend().square().sum()
    slope = (v.grad * step).sum()
    assert math.isclose((above - below) / 2, slope, rel_tol=1e-6)


def test_kernels_that_drop_the_cap_are_refused():
    """A kernel of the user's own takes no cap, and would compute another model."""
    assert with_cap(print, None) is print
    with pytest.raises(
        HelixError, match=r"attn_logit_softcapping is 30.0, which kernel print does"
    ):
        with_cap(print, 30.0)
