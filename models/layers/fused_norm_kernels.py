"""The programs of fused_norm.py. A tile is rows of positions by channels of an NHWC map; axes as there."""

import triton
import triton.language as tl

# Sizes that change from picture to picture are numbers like others; Triton would compile anew for 1 and multiples of 16.
_SIZES = ["positions", "spans"]


@triton.jit
def _tile(positions, channels, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Places of this program's tile in the map, which of them are there, its channels, and which of those."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    real = channel < channels
    place = (tl.program_id(2).to(tl.int64) * positions + row)[:, None] * channels + channel[None, :]
    return place, (row < positions)[:, None] & real[None, :], channel, real


@triton.jit
def _values(x, before, place, there, channel, real, BIASED: tl.constexpr):
    """The tile of a map, with the bias before the norm."""
    values = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        values += tl.load(before + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=_SIZES)
def moments(
    x, before, mean, squares, positions, channels, spans, ROWS: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel of a tile."""
    place, there, channel, real = _tile(positions, channels, ROWS, WIDE)
    values = tl.where(there, _values(x, before, place, there, channel, real, BIASED), 0.0)
    count = tl.minimum(positions - tl.program_id(0) * ROWS, ROWS).to(tl.float32)
    average = tl.sum(values, axis=0) / count
    off = tl.where(there, values - average[None, :], 0.0)
    to = (tl.program_id(2) * spans + tl.program_id(0)) * channels + channel
    tl.store(mean + to, average, mask=real)
    tl.store(squares + to, tl.sum(off * off, axis=0), mask=real)


@triton.jit
def _of_parts(start, n, group, positions, channels, of_group, spans, ROWS, PARTS: tl.constexpr, WIDE: tl.constexpr):
    """Where the moments of a group's channels in some tiles lie, which are there, and how many numbers each is of."""
    part, within = start + tl.arange(0, PARTS), tl.arange(0, WIDE)
    there = (part < spans)[:, None] & (within < of_group)[None, :]
    count = tl.minimum(positions - part * ROWS, ROWS).to(tl.float32)[:, None]
    return (n * spans + part)[:, None] * channels + group * of_group + within[None, :], there, count


@triton.jit(do_not_specialize=_SIZES)
def merged(
    mean, squares, out_mean, out_rstd, positions, channels, of_group, groups, spans, eps,
    ROWS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of one group from the moments of its parts (Chan et al. 1979)."""
    group, n = tl.program_id(0), tl.program_id(1)
    total = (positions * of_group).to(tl.float32)
    sums = tl.zeros([PARTS, WIDE], tl.float32)
    for start in range(0, spans, PARTS):
        at, there, count = _of_parts(start, n, group, positions, channels, of_group, spans, ROWS, PARTS, WIDE)
        sums += tl.where(there, tl.load(mean + at, mask=there, other=0.0) * (count / total), 0.0)
    average = tl.sum(tl.sum(sums, axis=1), axis=0)
    sums = tl.zeros([PARTS, WIDE], tl.float32)
    for start in range(0, spans, PARTS):
        at, there, count = _of_parts(start, n, group, positions, channels, of_group, spans, ROWS, PARTS, WIDE)
        off = tl.load(mean + at, mask=there, other=0.0) - average
        sums += tl.where(there, tl.load(squares + at, mask=there, other=0.0) + off * off * count, 0.0)
    tl.store(out_mean + n * groups + group, average)
    tl.store(out_rstd + n * groups + group, tl.rsqrt(tl.sum(tl.sum(sums, axis=1), axis=0) / total + eps))


@triton.jit
def _normalised(x, before, mean, rstd, place, there, channel, real, of_group, groups, BIASED: tl.constexpr):
    """xhat, and where the groups' numbers lie."""
    group = tl.program_id(2) * groups + channel // of_group
    values = _values(x, before, place, there, channel, real, BIASED)
    centre, factor = tl.load(mean + group, mask=real, other=0.0), tl.load(rstd + group, mask=real, other=0.0)
    return (values - centre[None, :]) * factor[None, :], group, factor


@triton.jit
def _factors(weight, bias, scale, shift, channel, real, channels, MODULATED: tl.constexpr):
    """p and q of g = xhat p + q."""
    p = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    q = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    if MODULATED:
        at = tl.program_id(2) * channels + channel
        grown = 1.0 + tl.load(scale + at, mask=real, other=0.0).to(tl.float32)
        p, q = p * grown, q * grown + tl.load(shift + at, mask=real, other=0.0).to(tl.float32)
    return p, q


@triton.jit
def _gradient_of_g(dy, place, there, xhat, p, q, SILU: tl.constexpr):
    dg = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
    if SILU:
        g = xhat * p[None, :] + q[None, :]
        share = 1.0 / (1.0 + tl.exp(-g))
        dg = dg * share * (1.0 + g * (1.0 - share))
    return dg


@triton.jit(do_not_specialize=_SIZES)
def apply(
    x, before, mean, rstd, weight, bias, scale, shift, y, positions, channels, of_group, groups,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of a tile."""
    place, there, channel, real = _tile(positions, channels, ROWS, WIDE)
    xhat, _, _ = _normalised(x, before, mean, rstd, place, there, channel, real, of_group, groups, BIASED)
    p, q = _factors(weight, bias, scale, shift, channel, real, channels, MODULATED)
    g = xhat * p[None, :] + q[None, :]
    if SILU:
        g = g / (1.0 + tl.exp(-g))
    tl.store(y + place, g.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def gradient_sums(
    dy, x, before, mean, rstd, weight, bias, scale, shift, plain, along, positions, channels, of_group, groups, spans,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Sums over a tile's positions of dg and of dg xhat."""
    place, there, channel, real = _tile(positions, channels, ROWS, WIDE)
    xhat, _, _ = _normalised(x, before, mean, rstd, place, there, channel, real, of_group, groups, BIASED)
    p, q = _factors(weight, bias, scale, shift, channel, real, channels, MODULATED)
    dg = _gradient_of_g(dy, place, there, xhat, p, q, SILU)
    to = (tl.program_id(2) * spans + tl.program_id(0)) * channels + channel
    tl.store(plain + to, tl.sum(dg, axis=0), mask=real)
    tl.store(along + to, tl.sum(dg * xhat, axis=0), mask=real)


@triton.jit(do_not_specialize=_SIZES)
def gradient(
    dy, x, before, mean, rstd, weight, bias, scale, shift, plain, along, dx, positions, channels, of_group, groups,
    ROWS: tl.constexpr, WIDE: tl.constexpr, BIASED: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx = rstd (p dg - mean(p dg) - xhat mean(p dg xhat)), the means over a group."""
    place, there, channel, real = _tile(positions, channels, ROWS, WIDE)
    xhat, group, factor = _normalised(x, before, mean, rstd, place, there, channel, real, of_group, groups, BIASED)
    p, q = _factors(weight, bias, scale, shift, channel, real, channels, MODULATED)
    dg = _gradient_of_g(dy, place, there, xhat, p, q, SILU)
    common = tl.load(plain + group, mask=real, other=0.0)
    slope = tl.load(along + group, mask=real, other=0.0)
    result = factor[None, :] * (dg * p[None, :] - common[None, :] - xhat * slope[None, :])
    tl.store(dx + place, result.to(dx.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_SIZES)
def added(x, h, bias, y, positions, channels, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """y = x + h + bias of a tile."""
    place, there, channel, real = _tile(positions, channels, ROWS, WIDE)
    values = _values(h, bias, place, there, channel, real, True) + tl.load(x + place, mask=there, other=0.0).to(
        tl.float32
    )
    tl.store(y + place, values.to(y.dtype.element_ty), mask=there)
