"""Layers of integers: the same numbers in every precision and with every number of threads."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.integers import (
    ACTIVATION_MAX,
    BIAS_MAX,
    WEIGHT_MAX,
    WEIGHT_UNIT,
    IntegerConv,
    IntegerEmbedding,
    bounded,
    floor_through,
    product,
    rectified,
    round_through,
)

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def layer(in_channels: int, out_channels: int, kernel: int, scale: float, seed: int = 0) -> IntegerConv:
    torch.manual_seed(seed)
    conv = IntegerConv(in_channels, out_channels, kernel)
    torch.nn.init.normal_(conv.weight, std=scale)
    torch.nn.init.normal_(conv.bias, std=20 * scale)
    return conv.requires_grad_(False)


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, ACTIVATION_MAX + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def by_hand(conv: IntegerConv, a: torch.Tensor) -> torch.Tensor:
    """The layer in int64, tap by tap."""
    weight = (conv.weight.double() * WEIGHT_UNIT).clamp(-WEIGHT_MAX, WEIGHT_MAX).round().long()
    bias = (conv.bias.double() * 16).clamp(-BIAS_MAX, BIAS_MAX).round().long() * WEIGHT_UNIT
    pad, (_, _, h, w) = conv.padding, a.shape
    padded = torch.nn.functional.pad(a.long(), (pad,) * 4)
    total = bias.view(1, -1, 1, 1).expand(len(a), -1, h, w)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            taps = padded[:, None, :, i : i + h, j : j + w] * weight[None, :, :, i, j, None, None]
            total = total + taps.sum(2)
    return total >> 6


@quick
@given(
    channels=st.tuples(st.integers(1, 24), st.integers(1, 8)),
    kernel=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    scale=st.sampled_from([0.02, 0.3, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_float32_and_float64_give_the_integers(channels, kernel, size, scale, seed):
    conv = layer(*channels, kernel, scale, seed)
    a = activations(2, channels[0], *size, seed=seed)
    out = conv(a)
    assert torch.equal(out.long(), by_hand(conv, a)) and torch.equal(out, out.floor())
    assert torch.equal(out.double(), copy.deepcopy(conv).double()(a.double()))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign):
    """As many channels as are allowed, every weight, bias and activation at its end."""
    channels = 56
    conv = IntegerConv(channels, 3, 3).requires_grad_(False)
    conv.weight.fill_(sign * 1e3)
    conv.bias.fill_(sign * 1e6)
    a = torch.full((1, channels, 5, 6), float(ACTIVATION_MAX))
    out = conv(a)
    assert torch.equal(out.long(), by_hand(conv, a))
    middle = sign * (channels * 9 * WEIGHT_MAX * ACTIVATION_MAX + BIAS_MAX * WEIGHT_UNIT)
    assert out[0, :, 2, 2].tolist() == [middle // WEIGHT_UNIT] * 3
    a[0, 0, 2, 2] -= 1  # a single unit of a single activation, which rounding would swallow
    assert torch.equal(conv(a).long(), by_hand(conv, a)) and conv(a)[0, 0, 2, 2] != out[0, 0, 2, 2]


@pytest.mark.parametrize(("channels", "kernel"), [(56, 3), (509, 1)])
def test_sums_that_float32_could_not_hold_are_refused(channels, kernel):
    IntegerConv(channels, 1, kernel)
    with pytest.raises(ValueError, match=f"{channels + 1} channels in a {kernel}x{kernel} kernel: sums would not be"):
        IntegerConv(channels + 1, 1, kernel)


def test_layouts_and_batches_do_not_change_them():
    conv, a = layer(24, 32, 3, 0.2), activations(1, 24, 40, 50)
    for other in (conv(a.to(memory_format=torch.channels_last)), conv(a.repeat(3, 1, 1, 1))[2:]):
        assert torch.equal(other, conv(a))


def test_embedding_rows_are_integers_in_range():
    embedding = IntegerEmbedding(5, 3).requires_grad_(False)
    embedding.weight.copy_(torch.tensor([[0.03, -0.04, 0.1], [99, -99, 15.9], [0, 0, 0], [1, 2, 3], [-1, -2, -3]]))
    rows = embedding(torch.tensor([[[0, 1], [3, 4]]]))
    assert rows.shape == (1, 3, 2, 2)
    assert rows[0, :, 0].T.tolist() == [[0, -1, 2], [255, -255, 254]]
    assert rows[0, :, 1].T.tolist() == [[16, 32, 48], [-16, -32, -48]]


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_pass_roundings():
    x = torch.tensor([-1.5, -0.2, 0.5, 2.7], requires_grad=True)
    for through, values in ((round_through, [-2, 0, 0, 3]), (floor_through, [-2, -1, 0, 2])):
        out = through(x)
        assert out.tolist() == values
        (gradient,) = torch.autograd.grad((out * torch.arange(4.0)).sum(), x)
        assert gradient.tolist() == [0, 1, 2, 3]
        assert torch.equal(through(x.detach()), out.detach())


def test_the_gradient_of_bounded_leads_back_inside():
    """Descent adds -gradient: below the range only a negative one may pass, above it only a positive one."""
    x = torch.tensor([-2.0, -2.0, 0.5, 0.5, 3.0, 3.0, 0.0, 1.0], requires_grad=True)
    out = bounded(x, 0, 1)
    assert out.tolist() == [0, 0, 0.5, 0.5, 1, 1, 0, 1]
    out.backward(torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0]))
    assert x.grad.tolist() == [0, -2, 2, -2, 2, 0, 2, -2]
    assert rectified(torch.tensor([-1.0, 7.0, 1000.0])).tolist() == [0, 7, ACTIVATION_MAX]


def test_a_product_of_rows_is_the_convolution_and_has_its_gradients():
    conv, a = layer(6, 5, 1, 0.3).requires_grad_(True), activations(1, 6, 7, 1)
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for way in (lambda rows: product(rows, *conv.matrix()), lambda rows: conv(rows.T[None, ..., None])[0, ..., 0].T):
        rows = a[0, :, :, 0].T.clone().requires_grad_(True)
        out = way(rows)
        found.append((out, *torch.autograd.grad((out * weights).sum(), (rows, conv.weight, conv.bias))))
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order


def test_the_gradient_of_a_layer_is_that_of_the_float_layer():
    conv, a = layer(4, 5, 3, 0.3), activations(2, 4, 6, 7).requires_grad_(True)
    conv.requires_grad_(True)
    weights = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(1))
    (conv(a) * weights).sum().backward()
    rounded = ((conv.weight.detach() * WEIGHT_UNIT).round() / WEIGHT_UNIT).requires_grad_(True)
    assert rounded.abs().max() * WEIGHT_UNIT < WEIGHT_MAX  # nothing is clamped here
    plain = torch.nn.functional.conv2d(a, rounded, conv.bias * 16, padding=1)
    found = conv.weight.grad, conv.bias.grad, a.grad
    expected = torch.autograd.grad((plain * weights).sum(), (rounded, conv.bias, a))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
