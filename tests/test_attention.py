"""Attention of every width, and what the denoiser keeps between calls: the same values as without."""

import copy

import pytest
import torch
import torch.nn.functional as F

from models import swin
from models.layers.attention import attention, by_products, kernel_width
from models.layers.kept import Kept, holding
from models.swin import SwinLayer


@pytest.mark.parametrize("width, kernel", [(1, 32), (4, 32), (32, 32), (33, 40), (40, 40), (100, 104), (512, 512)])
def test_widths_of_heads_on_cuda(width, kernel):
    assert kernel_width(width) == kernel


@pytest.mark.parametrize("width", [1, 4, 20, 33])
def test_padded_heads_attend_as_narrow_ones(width):
    shape, made = (2, 3, 5, width), torch.Generator().manual_seed(width)
    ours, theirs = ([torch.randn(shape, dtype=torch.float64, generator=made) for _ in range(3)] for _ in range(2))
    theirs = [part.clone() for part in ours]
    bias = torch.randn(3, 5, 5, dtype=torch.float64, generator=made)
    for parts in (ours, theirs):
        for part in parts:
            part.requires_grad_()
    padded, plain = attention(*ours, bias, padded=True), F.scaled_dot_product_attention(*theirs, attn_mask=bias)
    torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)
    (padded.square().sum() + plain.square().sum()).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)
    assert torch.equal(attention(*theirs, bias), plain)  # on the CPU nothing is padded


def test_products_attend_as_the_kernel_does():
    """CUDA's way for heads of more than 256 channels, in half precision there, where weights learn."""
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 20, dtype=torch.float64, generator=made).requires_grad_() for _ in range(3))
    ours, theirs = by_products(q, k, v), F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # float32 between the products
    wanted = torch.autograd.grad(theirs.square().sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad(ours.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def layer() -> SwinLayer:
    torch.manual_seed(0)
    made = SwinLayer(8, 16, 2, 8, 4, 2, 4)
    for block in made.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)
    return made


def test_masks_and_biases_are_kept_by_size_and_give_the_same_bits(monkeypatch):
    ours, sizes = layer(), [(8, 4), (4, 8), (8, 8), (12, 4), (16, 4), (8, 4)]  # 8 x 4 and 4 x 8 have as many windows
    maps = [torch.randn(2, 8, *size) for size in sizes]
    made = []
    plain = swin.shifted_window_mask
    monkeypatch.setattr(swin, "shifted_window_mask", lambda *size: made.append(size) or plain(*size))
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(swin, "keeps", lambda positions: False)
            expected = [ours(x) for x in maps]
        assert len(made) == len(sizes) and not len(ours.kept)
        for x, result in zip(maps * 2, expected * 2, strict=True):
            assert torch.equal(ours(x), result)
            before = len(made)
            assert torch.equal(ours(x), result) and len(made) == before
    assert len(ours.kept) == len(ours.blocks[1].attn.kept) == swin.SIZES
    with torch.inference_mode():
        ours(maps[0])
    kept = len(ours.kept)
    ours(torch.randn(1, 8, 20, 4)).sum().backward()  # with gradients, nothing is kept
    assert len(ours.kept) == kept and (20, 4) not in {key[:2] for key in ours.kept._results}


def test_kept_biases_follow_the_weights():
    ours, x = layer(), torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        before = ours(x)
        other = copy.deepcopy(ours)
        for network in (ours, other):
            for block in network.blocks:
                block.attn.relative_position_bias_table.mul_(-3)
        assert not torch.equal(ours(x), before)
        assert torch.equal(ours(x), other(x))
        assert ours.double()(x.double()).dtype == torch.float64


def test_large_maps_keep_nothing(monkeypatch):
    monkeypatch.setattr(swin, "KEPT", 63)
    ours = layer()
    with torch.no_grad():
        ours(torch.randn(1, 8, 8, 8))
    assert not len(ours.kept) and not len(ours.blocks[0].attn.kept)


def test_the_result_of_longest_ago_is_forgotten_and_copies_start_empty():
    kept, made = Kept(2), []

    def get(key):
        return kept.get(key, lambda: made.append(key) or key)

    for key in "abacab":  # a is used again before c comes: b goes, and after it c
        get(key)
    assert made == ["a", "b", "c", "b"]
    assert len(kept) == 2 and not len(copy.deepcopy(kept))
    with holding() as held:
        get("a"), get("d")
    get("b")
    assert held == ["a", "d"]
