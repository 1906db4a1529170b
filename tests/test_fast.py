"""A codec prepared to code fast: the same integers, nearly the same picture, and only where the hardware has it."""

import copy
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from coding import options
from coding.api import load_codec
from coding.weights import Weights
from measuring.metrics import psnr
from models.blocks import doubling
from models.codec import Codec
from models.layers.attention import attention
from models.released import SMALL, load_release
from models.speed import fast
from models.speed.fast import DoublingConv, precision_of, prepare, without_fast_paths
from tests.commands import ROOT
from tests.networks import off_zero
from tests.residual import new_codec, picture

HEAVY = ("compressai", "pyiqa", "matplotlib", "tensorboard", "torchvision", "skimage", "scipy", "lpips", "triton")


@pytest.fixture(scope="module")
def plain():
    codec = new_codec()
    off_zero(codec)
    return codec


@pytest.fixture(scope="module")
def small():
    return load_release(SMALL)


def cast(codec: Codec) -> set[str]:
    """Networks whose convolutions compute in bfloat16."""
    networks = {"E": codec.autoencoder.encoder, "D": codec.autoencoder.decoder, "U": codec.unet}
    networks |= {"VQ-E": codec.vq_base.encoder, "VQ-D": codec.vq_base.decoder}
    return {name for name, network in networks.items() if next(network.parameters()).dtype == torch.bfloat16}


def test_float32_is_the_codec_as_it_was_loaded(plain):
    prepared = prepare(copy.deepcopy(plain), "float32")
    assert precision_of(prepared) == "float32"
    assert prepared.compress(picture(70, 90), 60) == plain.compress(picture(70, 90), 60)


@pytest.mark.parametrize(
    ("has", "chosen"),
    [
        ({}, set()),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, set()),
        ({"avx512_bf16": True}, {"E", "D", "U"}),  # VQ-E and VQ-D of small have 56 channels
        ({"amx_bf16": True}, {"E", "D", "U"}),
    ],
)
def test_auto_takes_bfloat16_where_a_processor_has_it_and_networks_are_wide(has, chosen, small, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    prepared = prepare(copy.deepcopy(small), "auto")
    assert cast(prepared) == chosen and precision_of(prepared) == ("bfloat16" if chosen else "float32")
    others = (prepared.residual, prepared.index_model.network, prepared.autoencoder.shortcut, prepared.vq_base.quantize)
    assert all(p.dtype == torch.float32 for part in others for p in part.parameters())


@pytest.mark.parametrize(("capability", "takes"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)])
def test_auto_takes_bfloat16_on_cuda_from_ampere_on(capability, takes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast.computes_bfloat16(torch.device("cuda")) == takes


def test_the_command_keeps_freed_memory_unless_told(monkeypatch):
    calls = []
    monkeypatch.setattr("coding.weights.keep_freed_memory", lambda: calls.append(1))
    for without, count in (([], 1), (["--without", "keep_memory"], 1), (["--without", "graphs"], 2)):
        Weights(options.parse(["-i", "a", "-o", "b", "--device", "cpu", *without]))
        assert len(calls) == count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose allocator is told")
def test_freed_memory_stays_or_goes_back():
    """256 MiB in blocks of 16, which the system sees or does not see again."""
    script = """
from utils.memory import freed_memory_returned, keep_freed_memory

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) >> 10

def left():
    before, blocks = resident(), [bytearray(16 << 20) for _ in range(16)]
    for block in blocks:
        block[:] = bytes(len(block))
    del block, blocks
    return resident() - before

keep_freed_memory()
with freed_memory_returned():
    inside = left()
print(inside, left())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    inside, after = map(int, done.stdout.split())
    assert inside < 64 and after > 200


def test_a_file_holds_the_same_integers_in_every_precision(plain):
    both = plain, prepare(copy.deepcopy(plain), "bfloat16")
    assert cast(both[1]) == {"E", "D", "U", "VQ-E", "VQ-D"}
    for writer, reader in (both, both[::-1]):
        data = writer.compress(picture(90, 70), 80)
        theirs, ours = writer.read(data), reader.read(data)
        assert torch.equal(theirs.k, ours.k)
        for name in ("hyper", "residual", "index"):
            assert (getattr(theirs.symbols, name) == getattr(ours.symbols, name)).all()
        assert theirs.symbols.residual.any()
        assert psnr(writer.decode(data).image, reader.decode(data).image) > 35


def test_bfloat16_is_not_seen_in_the_small_release(small):
    bfloat16 = prepare(copy.deepcopy(small), "bfloat16")
    image = picture(128, 160)
    data = small.compress(image, 40)
    assert psnr(small.decompress(data), bfloat16.decompress(data)) > 50
    theirs = small.decompress(bfloat16.compress(image, 40))
    assert abs(psnr(image, theirs) - psnr(image, small.decompress(data))) < 0.2  # codes that were nearly as near


def test_float32_is_the_same_bits_without_fast_paths(plain):
    image = picture(70, 90)
    with without_fast_paths():
        data = plain.compress(image, 60)
        decoded = plain.decompress(data)
    assert plain.compress(image, 60) == data and torch.equal(plain.decompress(data), decoded)


def test_the_functions_take_a_precision(monkeypatch):
    monkeypatch.setattr(fast, "computes_bfloat16", lambda device: True)
    assert precision_of(load_codec().model) == "bfloat16"
    assert precision_of(load_codec(precision="float32").model) == "float32"


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (6, 7)])
def test_a_doubling_convolution_is_the_convolution_of_the_doubled_map(size):
    """Integers, which float32 sums exactly in any order."""
    network, random = doubling(5), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randint(-9, 10, parameter.shape, generator=random))
        x = torch.randint(-9, 10, (2, 5, *size), generator=random).float()
        assert torch.equal(DoublingConv(network.conv)(x), network(x))


@torch.no_grad()
def test_attention_in_bfloat16_is_attention(monkeypatch):
    """Against float64, no further off than bfloat16's 8 bits; in parts of rows that do not divide their number."""
    monkeypatch.setattr("models.layers.attention.ROWS", 7)
    q, k, v = torch.randn(3, 2, 1, 30, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    found = attention(q, k, v)
    assert found.dtype == torch.bfloat16 and found.shape == q.shape
    assert (found.double() - exact).abs().max() < 0.02 < exact.abs().max()


def test_the_command_imports_no_package_that_it_does_not_need(tmp_path):
    """They take seconds, which a picture that is coded alone would wait for."""
    code = "import sys, coding.run, coding.batch; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert {"torch", "constriction"} <= imported and not imported & set(HEAVY)
