"""Group normalisation with what stands around it, in one go, for feature maps that lie NHWC, in Triton: forward and backward.

    v = x + before      u = (v - mean) rstd w + b      g = u (1 + scale) + shift      y = a(g), a = SiLU or nothing

`before` is the bias of the convolution that made x, which cuDNN's caller would add in a pass of its own. Where a residual
follows a convolution in place of a norm, `added` takes its bias along.

cuDNN's convolutions take NHWC, PyTorch's normalisation NCHW, and autocast runs it in float32: each norm costs four
copies there. Here a map is read twice and written once, in its own precision; statistics and arithmetic are float32.
No size is compiled for. Sums are merged in a fixed order, without atomics: equal inputs give equal bits.

Axes: N batch, P = HW positions, C channels in G groups of C/G.
"""

import sys
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PRECISIONS = torch.float32, torch.bfloat16, torch.float16
TILE = 4096  # numbers of a map that a program holds
SUMMED, WRITTEN = 32, 128  # channels of a tile at most, where sums over positions are taken, and where none are
MERGED = 2048  # moments that a program merges at a time

enabled = True  # the option: False leaves every norm to PyTorch


def takes(x: Tensor) -> bool:
    """Whether a map is one for these kernels: on CUDA, NHWC, and not under torch.compile, which fuses by itself."""
    if not (enabled and x.is_cuda and x.dim() == 4 and x.dtype in PRECISIONS) or torch.compiler.is_compiling():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and _runs(x.device)


@cache
def _runs(device: torch.device) -> bool:
    """Whether Triton is there and works on a device, forward and backward; says why not. It needs a C compiler, for one."""
    try:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.zeros(1, 1, 1, 1, device=device, dtype=dtype, requires_grad=True)
                group_norm(added(x, x, x.flatten()), 1, *[x.flatten()] * 2, 1.0, before=x.flatten()).sum().backward()
    except Exception as error:  # of Triton, of its compilers, of the driver: whichever it is, PyTorch's norm works
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"fused_norm is left out, PyTorch's normalisation serves: {reason}", file=sys.stderr)
        return False
    return True


@cache
def _kernels() -> ModuleType:
    """The programs; Triton takes a while to import, and only CUDA needs it."""
    from models.layers import fused_norm_kernels

    return fused_norm_kernels


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    before: Tensor | None = None,
) -> Tensor:
    """a(GN(x + before) (1 + scale) + shift), in x's precision and layout.

    Args:
        x: N C H W, channels_last. weight, bias: (C,). scale, shift: N C 1 1, both or neither. before: (C,).
    """
    with torch.cuda.device_of(x):  # Triton starts programs on the current device
        return _GroupNorm.apply(x, weight, bias, scale, shift, before, groups, eps, silu)


def added(x: Tensor, h: Tensor, bias: Tensor) -> Tensor:
    """x + h + bias: NHWC maps N C H W of one precision, and (C,); rounded once."""
    with torch.cuda.device_of(x):
        return _Added.apply(x, h, bias)


def statistics(x: Tensor, groups: int, eps: float, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every group of an NHWC map, and a bias (C,): float32 (N, G) each."""
    n, c, of_group = *x.shape[:2], x.shape[1] // groups
    grid, (positions, _, rows, wide) = _tiles(x, SUMMED)
    spans = grid[0]
    moments = x.new_empty(2, n, spans, c, dtype=torch.float32)
    _kernels().moments[grid](x, before, *moments, positions, c, spans, rows, wide, before is not None)
    found = x.new_empty(2, n, groups, dtype=torch.float32)
    sizes = positions, c, of_group, groups, spans, eps, rows, max(1, MERGED // _power(of_group)), _power(of_group)
    _kernels().merged[groups, n](*moments, *found, *sizes)
    return found[0], found[1]


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, before, groups, eps, silu):
        mean, rstd = statistics(x, groups, eps, before)
        if scale is not None:
            scale, shift = (v.flatten(1).contiguous() for v in (scale, shift))  # N C
        y = torch.empty_like(x)  # channels_last as x
        grid, (positions, c, *tile) = _tiles(x, WRITTEN)
        sizes = positions, c, c // groups, groups, *tile
        how = before is not None, scale is not None, silu
        _kernels().apply[grid](x, before, mean, rstd, weight, bias, scale, shift, y, *sizes, *how)
        ctx.save_for_backward(x, before, mean, rstd, weight, bias, scale, shift)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """With A and B the sums over positions of dg and of dg xhat: dshift = A, dscale = w B + b A, and over n
        db = sum (1 + scale) A, dw = sum (1 + scale) B; a group's means of w (1 + scale) A and B correct dx."""
        x, before, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        (spans, _, n), (positions, c, *tile) = grid, _ = _tiles(x, SUMMED)
        sizes = positions, c, c // ctx.groups, ctx.groups
        modulated = scale is not None
        partial = x.new_empty(2, n, spans, c, dtype=torch.float32)
        known, how = (x, before, mean, rstd, weight, bias, scale, shift), (before is not None, modulated, ctx.silu)
        _kernels().gradient_sums[grid](dy, *known, *partial, *sizes, spans, *tile, *how)
        sums = partial.sum(2)  # 2 N C: A, B
        scaled = sums * (1 + scale.float()) if modulated else sums
        of_group = (scaled * weight.float()).view(2, n, ctx.groups, -1).sum(-1) / (positions * c // ctx.groups)
        dx = torch.empty_like(x)
        grid, (*_, rows, wide) = _tiles(x, WRITTEN)
        _kernels().gradient[grid](dy, *known, *of_group, dx, *sizes, rows, wide, *how)
        db, dw = scaled.sum(1)
        dscale = dshift = None
        if modulated:
            dshift = sums[0].to(shift.dtype)[..., None, None]
            dscale = (weight * sums[1] + bias * sums[0]).to(scale.dtype)[..., None, None]
        dbefore = _summed(dx).to(before.dtype) if ctx.needs_input_grad[5] else None  # frozen ones are left alone
        return dx, dw.to(weight.dtype), db.to(bias.dtype), dscale, dshift, dbefore, None, None, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, bias):
        y = torch.empty_like(x)
        grid, sizes = _tiles(x, WRITTEN)
        _kernels().added[grid](x, h, bias, y, *sizes)
        ctx.precision = bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy, dy, _summed(dy).to(ctx.precision) if ctx.needs_input_grad[2] else None


def _summed(gradient: Tensor) -> Tensor:
    """That of a bias: N C H W -> float32 (C,)."""
    return gradient.sum((0, 2, 3), dtype=torch.float32)


def _power(value: int) -> int:
    """The smallest power of two from a number on."""
    return 1 << (value - 1).bit_length()


def _tiles(x: Tensor, widest: int) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """Grid of programs over a map (tiles of positions, of channels, N), and P, C, rows and channels of a tile.

    Positions come first: there are up to 2^31 - 1 programs along that axis, 65,535 along the others.
    """
    n, c, h, w = x.shape
    wide = min(_power(c), widest)
    rows = TILE // wide
    return (-(-h * w // rows), -(-c // wide), n), (h * w, c, rows, wide)
