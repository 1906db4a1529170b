"""The fused normalisation and sum, interpreted on the CPU, against PyTorch's in float64; compiled for an H100, unrun."""

import json
import re

import pytest
import torch

from models.layers import fused_norm, norms
from tests.commands import run

# precision, N, C, H, W, groups, modulated, SiLU, biased: odd sizes, groups of 1, 5 and 6 channels, several tiles, large means
CASES = [
    ("float32", 1, 32, 5, 7, 32, False, True, False),
    ("float32", 2, 20, 9, 3, 4, True, True, True),
    ("float32", 1, 160, 6, 5, 32, True, False, False),
    ("float32", 2, 192, 1, 1, 32, False, False, True),
    ("float32", 1, 8, 70, 61, 2, False, True, True),
    ("bfloat16", 2, 160, 9, 11, 32, True, True, False),
    ("bfloat16", 1, 48, 33, 17, 8, False, True, True),
]

COMPARE = """
import json, sys
import torch
from models.layers import fused_norm, norms
from models.layers.norms import GroupNorm
from tests.networks import off_zero
from tests.small_codec import PARAMS
from models.codec import Codec

def largest(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()

def compared(precision, n, c, h, w, groups, modulated, silu, biased):
    dtype = getattr(torch, precision)
    x, weight, bias, dy = 2 * torch.randn(n, c, h, w) + 20, torch.randn(c), torch.randn(c), torch.randn(n, c, h, w)
    inputs = [x.to(dtype).contiguous(memory_format=torch.channels_last), weight, bias]
    inputs += [torch.randn(n, c, 1, 1), torch.randn(n, c, 1, 1)] if modulated else []
    inputs += [5 * torch.randn(c)] if biased else []
    ours, exact = ([v.detach().to(t).requires_grad_() for v, t in zip(inputs, kinds)] for kinds in
                   ([v.dtype for v in inputs], [torch.float64] * 6))
    modulation, before = slice(3, 3 + 2 * modulated), (lambda v: v[-1] if biased else None)
    y = fused_norm.group_norm(ours[0], groups, *ours[1:3], 1e-5, *ours[modulation], silu=silu, before=before(ours))
    norm = GroupNorm(groups, c, silu=silu).double()
    norm.weight, norm.bias = map(torch.nn.Parameter, (weight.double(), bias.double()))
    expected = norm(exact[0] + (before(exact).view(-1, 1, 1) if biased else 0), *exact[modulation])
    y.backward(dy.to(dtype)); expected.backward(dy.to(dtype).double())
    gradients = [norm.weight.grad if i == 1 else norm.bias.grad if i == 2 else v.grad for i, v in enumerate(exact)]
    layout = y.stride() == ours[0].stride() and y.dtype == dtype
    return [layout, largest(y, expected), *(largest(v.grad, g) for v, g in zip(ours, gradients))]

def summed(precision):
    # x + h + bias, and its gradients.
    kind = getattr(torch, precision)
    maps = [torch.randn(2, 36, 9, 70).to(kind).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    *ours, dy = [v.requires_grad_() for v in (*maps[:2], torch.randn(36))] + [maps[2]]
    exact = [v.detach().double().requires_grad_() for v in ours]
    y, expected = fused_norm.added(*ours), exact[0] + exact[1] + exact[2].view(-1, 1, 1)
    y.backward(dy); expected.backward(dy.double())
    return [y.stride() == maps[0].stride() and y.dtype == kind, largest(y, expected),
            *(largest(v.grad, g.grad) for v, g in zip(ours, exact))]

def network():
    # A whole denoiser and image autoencoder, every norm of them fused and none.
    codec = Codec(PARAMS).to(memory_format=torch.channels_last)
    off_zero(codec)
    for layer in codec.modules():  # a bias that is lost, or added twice, is seen
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.bias)
    image = torch.rand(1, 3, 48, 32).contiguous(memory_format=torch.channels_last)
    found = []
    for takes in (lambda x: False, lambda x: x.is_contiguous(memory_format=torch.channels_last)):
        taken = []
        fused_norm.takes = lambda x, takes=takes: taken.append(takes(x)) or taken[-1]
        with torch.no_grad():
            x = codec.autoencoder.encode(image)
            found.append([codec.unet(x, torch.tensor([3.0]), codec.vq_base(x).z_q), codec.autoencoder.decode(x)])
    return sum(taken) / len(taken), *(largest(a, b.double()) for a, b in zip(*found))

torch.manual_seed(0)
with torch.inference_mode():
    tried = fused_norm._runs(torch.device("cpu"))
print(json.dumps([[compared(*case) for case in json.loads(sys.argv[1])], network(), tried, [summed(kind) for kind in ("float32", "bfloat16")]]))
"""


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # decided when Triton is imported: hence a process of its own
        return json.loads(run("-c", COMPARE, json.dumps(CASES)).stdout)


@pytest.mark.parametrize("number", range(len(CASES)), ids=str)
def test_values_and_gradients_are_those_of_float64(number, found):
    """To a relative 5e-6 in float32; in bfloat16, whose values the interpreter cuts off, to one unit of 2^-7.

    Sums for weights and modulation are float32 in either case. That for the bias before is one of dx as it is written,
    as a convolution's own would be.
    """
    layout, y, dx, *others = found[0][number]
    assert layout
    precision, *_, biased = CASES[number]
    bound = 5e-6 if precision == "float32" else 2**-7
    rounded = [others.pop()] if biased else []
    assert max(y, dx, *rounded) < bound and max(others) < 5e-6


@pytest.mark.parametrize("precision", [0, 1], ids=["float32", "bfloat16"])
def test_a_sum_takes_the_bias_along(precision, found):
    layout, y, dx, dh, dbias = found[3][precision]
    assert layout
    assert y < (2**-7 if precision else 1e-6) and dx == dh == 0 and dbias < 1e-6


def test_networks_with_fused_norms_compute_as_those_without(found):
    share, denoised, decoded = found[1]
    assert share > 0.9  # of the norms that were met lay NHWC
    assert 0 < denoised < 1e-4 and 0 < decoded < 1e-4


def test_programs_that_run_are_used(found):
    assert found[2]


@pytest.mark.parametrize("broken", ["bfloat16", "backward"])
def test_where_either_precision_or_direction_fails_one_line_says_so(broken, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such instruction\nmore of it")

    def group_norm(x, *_, before):
        if x.dtype == torch.bfloat16 and broken == "bfloat16":
            fail()
        y = x + 1
        if broken == "backward":
            y.register_hook(fail)
        return y

    monkeypatch.setattr(fused_norm, "group_norm", group_norm)
    monkeypatch.setattr(fused_norm, "added", lambda x, h, bias: x)
    with torch.inference_mode():
        assert not fused_norm._runs.__wrapped__(torch.device("cpu"))
    said = capsys.readouterr().err
    assert said == "fused_norm is left out, PyTorch's normalisation serves: no such instruction\n"


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.layers import fused_norm_kernels as kernels

SIZES = {"ROWS": 128, "WIDE": 32, "PARTS": 64, "BIASED": True, "MODULATED": True, "SILU": True}
for name in ("moments", "merged", "apply", "gradient_sums", "gradient", "added"):
    program = getattr(kernels, name)
    names, kinds, known = program.arg_names, {}, {}
    for i, arg in enumerate(names):
        wide = arg in ("x", "h", "y", "dx", "dy", "scale", "shift")
        number = "fp32" if arg == "eps" else "i32"
        scalar = arg in ("positions", "channels", "of_group", "groups", "spans", "eps")
        kinds[arg] = "constexpr" if arg in SIZES else number if scalar else "*bf16" if wide else "*fp32"
        if kinds[arg].startswith("*") or arg == "channels":
            known[(i,)] = [["tt.divisibility", 16]]
    constants = {(i,): SIZES[arg] for i, arg in enumerate(names) if arg in SIZES}
    made = triton.compile(ASTSource(program, kinds, constants, known), target=GPUTarget("cuda", 90, 32))
    print(name, len(made.asm["cubin"]), *set(re.findall(r"ld[.]global[.][\\w.]+", made.asm["ptx"])))
"""


@pytest.mark.slow
def test_the_programs_compile_for_an_h100_and_read_sixteen_bytes_at_a_time():
    pytest.importorskip("triton")
    lines = run("-c", COMPILE).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["moments", "merged", "apply", "gradient_sums", "gradient", "added"]
    assert all(int(line.split()[1]) > 1000 for line in lines)
    wide = {line.split()[0] for line in lines if re.search(r"\.v4\.b32", line)}
    assert wide >= {"moments", "apply", "gradient_sums", "gradient", "added"}


def test_a_bias_that_stands_apart_is_added_where_there_are_no_kernels():
    """Convolution, norm and sum with the bias beside the map are those with it in the map."""
    x, bias = torch.randn(2, 8, 5, 7), torch.randn(8)
    norm = norms.GroupNorm(4, 8, silu=True)
    torch.testing.assert_close(norm(x, before=bias), norm(x + bias.view(-1, 1, 1)))
    torch.testing.assert_close(norms.added(x, 2 * x, bias), 3 * x + bias.view(-1, 1, 1))
    conv = torch.nn.Conv2d(8, 8, 3)
    h, apart = norms.convolved(conv, x)
    assert apart is None and torch.equal(h, conv(x))
