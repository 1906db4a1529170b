"""A file's content is read the same everywhere: threads, batches, order, precision and noise in y do not matter."""

import copy
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.residual_networks import SCALES
from tests.commands import run
from tests.residual import new_codec, picture
from utils.images import to_signed

SIZES = [(16, 16), (40, 70), (130, 97), (64, 200)]
QUALITIES = (1, 35, 100)


@pytest.fixture(scope="module")
def codec():
    return new_codec()


@pytest.fixture(scope="module")
def written(codec):
    """Files written with one thread, and the symbols that the encoder put there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for seed, size in enumerate(SIZES):
            analysed = codec.analyse(picture(*size, seed))
            for quality in QUALITIES:
                code = codec.level_code(quality)
                symbols = codec.residual.symbols(analysed.s, analysed.y, analysed.k, code, codec.residual.tables)
                found.append((codec.write(analysed, code), analysed.k, symbols))
    finally:
        torch.set_num_threads(before)
    symbols = np.concatenate([symbols.residual.ravel() for _, _, symbols in found])
    indices = np.concatenate([symbols.index.ravel() for _, _, symbols in found])
    assert np.abs(symbols).max() > 5 and len(np.unique(indices)) > SCALES / 2  # much is there to go wrong
    return found


def assert_read_as_written(codec, written):
    for data, k, symbols in written:
        found = codec.read(data)
        assert torch.equal(found.k, k)
        for name in ("hyper", "residual", "index"):
            np.testing.assert_array_equal(getattr(found.symbols, name), getattr(symbols, name))


def test_other_threads_and_another_order(codec, written):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_read_as_written(codec, written[::-1])
    finally:
        torch.set_num_threads(before)


def test_bfloat16(codec, written):
    """Under autocast, as `--precision bfloat16` has it, and of networks cast after loading."""
    other = copy.deepcopy(codec).bfloat16()
    assert other.residual.scale_network.code.weight.dtype == torch.bfloat16
    assert_read_as_written(other, written)
    with torch.autocast("cpu", torch.bfloat16):
        assert_read_as_written(codec, written)
        assert codec.decompress(written[-1][0]).shape == (3, *SIZES[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device here")
def test_cpu_and_cuda_read_each_others_files(codec, written):
    other = copy.deepcopy(codec).cuda()
    assert_read_as_written(other, written)
    analysed = other.analyse(picture(130, 97))
    symbols = other.residual.symbols(analysed.s, analysed.y, analysed.k, 255, other.residual.tables)
    sent = [(other.write(analysed, 255), analysed.k.cpu(), symbols)]
    assert_read_as_written(codec, sent)
    assert_read_as_written(other, sent)


def test_a_decoder_whose_y_is_off(codec, written, monkeypatch):
    """y is float: a relative error of 1e-3 moves the picture a little, the symbols not at all."""
    exact = [codec.decompress(data).int() for data, _, _ in written]
    reconstruct, noise = codec.vq_base.reconstruct, torch.Generator().manual_seed(0)

    def off(z_q):
        y = reconstruct(z_q)
        return y * (1 + 1e-3 * torch.randn(y.shape, generator=noise))

    monkeypatch.setattr(codec.vq_base, "reconstruct", off)
    assert_read_as_written(codec, written)
    moved = [(codec.decompress(data).int() - image).abs() for (data, _, _), image in zip(written, exact, strict=True)]
    assert any(difference.any() for difference in moved)
    assert all(difference.float().mean() < 3 for difference in moved)


@torch.inference_mode()
def test_files_of_a_batch_are_files_of_single_pictures(codec, written):
    """Four pictures through the networks at once: each file decodes to what was encoded, one by one."""
    pictures = [picture(48, 64, seed) for seed in range(4)]
    x = codec.to_latent(torch.stack([to_signed(image) for image in pictures]))
    k = codec.vq_base.indices(x)
    y = codec.vq_base.reconstruct(codec.vq_base.rows(k))
    s = codec.residual.analysis(x - y, y)
    for i, image in enumerate(pictures):
        analysed = codec.analyse(image)
        assert torch.equal(analysed.k, k[i : i + 1])
        batched = replace(analysed, y=y[i : i + 1], s=s[i : i + 1])
        symbols = codec.residual.symbols(batched.s, batched.y, batched.k, 255, codec.residual.tables)
        assert_read_as_written(codec, [(codec.write(batched, 255), batched.k, symbols)])


def digest(k, symbols) -> str:
    arrays = k.numpy(), symbols.hyper, symbols.residual, symbols.index
    return hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in arrays)).hexdigest()


READ = """
import sys
from pathlib import Path
from tests.residual import new_codec
from tests.test_same_symbols import digest

codec = new_codec()
for path in sorted(Path(sys.argv[1]).glob("*.dfo"), reverse=True):
    contents = codec.read(path.read_bytes())
    print(digest(contents.k, contents.symbols))
"""


def test_another_process_of_two_threads(written, tmp_path):
    for number, (data, _, _) in enumerate(written):
        (tmp_path / f"{number:02}.dfo").write_bytes(data)
    found = run("-c", READ, tmp_path, threads=2).stdout.split()
    assert found[::-1] == [digest(k, symbols) for _, k, symbols in written]
