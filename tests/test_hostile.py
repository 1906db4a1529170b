"""Files that somebody altered, through the whole codec: refused with an error of their own, soon, in little memory."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import hostile
from models import entropy_coding
from models.bitstream import WHOLE, CodedResidual, noise_seed, pack, unpack
from models.residual_networks import hyper_size
from tests.commands import photograph
from tests.residual import FINGERPRINT, new_codec, picture
from utils.errors import BitstreamError, CheckpointError

SIZES = [(16, 16), (40, 70), (64, 48)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Processor time is measured here, and threads that wait for each other would count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def codec():
    return new_codec()


@pytest.fixture(scope="module")
def files(codec):
    files = hostile.valid_files(codec, (picture(*size, seed) for seed, size in enumerate(SIZES)))
    assert len(files) == 18 and {unpack(data).fixed_length for data in files} == {False, True}
    return files


def test_altered_files_are_refused(codec, files):
    found = hostile.read_altered(codec, files, 500)
    assert not found.violations
    assert len(found.outcomes[BitstreamError.__name__]) == 500
    assert len(found.outcomes["preview: decoded"]) > 30  # bases that are whole


def test_files_with_checksums_that_match_are_refused_or_decode(codec, files):
    found = hostile.decode_resealed(codec, files, 100, seed=2)
    assert not found.violations
    assert found.outcomes.keys() == {"decoded", BitstreamError.__name__, CheckpointError.__name__}
    counts = list(map(len, found.outcomes.values()))
    assert min(counts) >= 5 and sum(counts) == 100


def test_mutations_are_seeded_and_of_every_kind(files):
    for draw in (hostile.altered, hostile.resealed, hostile.refilled):
        first = list(hostile.drawn(draw, files, 100, seed=1))
        assert first == list(hostile.drawn(draw, files, 100, seed=1)) != list(hostile.drawn(draw, files, 100, seed=2))
        assert len(set(first)) > 90 and not set(first) & set(files)
        whole = [data for data in first if zlib.crc32(data[:-4]).to_bytes(4, "big") == data[-4:]]
        assert len(whole) == (0 if draw is hostile.altered else 100)
    random, data = np.random.default_rng(0), bytes(range(200))
    changed = [hostile.mutate(data, [bytes(300)], random) for _ in range(2000)]
    assert any(len(c) < 200 and data.startswith(c) for c in changed)  # cut
    assert any(len(c) < 200 and data.endswith(c) for c in changed)
    assert any(len(c) > 200 and c.startswith(data) for c in changed)  # extended
    assert any(c[-99:] == bytes(99) and data.startswith(c.rstrip(b"\0")) for c in changed)  # spliced
    bits = (bin(int.from_bytes(c) ^ int.from_bytes(data)).count("1") for c in changed if len(c) == 200)
    assert 1 in bits


def test_other_weights_are_named_only_where_the_checksum_holds(codec, files, monkeypatch):
    data = bytearray(files[-1])
    monkeypatch.setattr(codec, "fingerprint", b"more")
    with pytest.raises(CheckpointError, match=FINGERPRINT.hex()):
        codec.read(bytes(data))
    data[6] ^= 1
    with pytest.raises(BitstreamError, match="checksum"):
        codec.read(bytes(data))


# Claims ---------------------------------------------------------------------------------------------------------------


ABOVE = "pixels is above the limit of 100,000,000"


@pytest.mark.parametrize(
    "size, told",
    [(size, ABOVE) for size in ((65535, 65535), (10_001, 10_000), (2**20, 96), (2**20, 2**20))]
    + [
        (size, None) for size in ((10_000, 10_000), (16, 2**20), (2**20, 16))
    ],  # allowed, but of sections of their length
    ids=str,
)
def test_claims_are_refused_before_anything(codec, files, size, told):
    assert unpack(files[-1]).scale < WHOLE  # the limit is that of the picture
    for file, preview in ((files[0], False), (files[-1], False), (files[-1], True)):
        data = pack(replace(unpack(file), height=size[0], width=size[1]))
        memory = hostile.Memory()
        outcome, seconds, _ = hostile.attempt(lambda data=data, preview=preview: codec.read(data, preview))
        assert outcome == BitstreamError.__name__ and seconds < 0.1 and memory.beyond() < 20
        with pytest.raises(BitstreamError, match=told):
            codec.decode(data, preview=preview)


@pytest.fixture(scope="module")
def largest(codec):
    """A picture of 100 megapixels, everywhere the cheapest symbols: a valid file, far shorter than honest ones."""
    file = replace(unpack(codec.compress(picture(16, 16))), height=10_000, width=10_000)
    h, w = file.latent_size
    k = np.full(h * w, codec.base_table.argmax())
    base, fixed = entropy_coding.encode_indices(k, len(codec.base_table), codec.base_table)
    shape = (codec.params.residual.hyper_channels, *hyper_size(h, w))
    n_z = np.zeros(shape, dtype=np.int8)
    hyper = entropy_coding.encode_symbols(n_z.ravel(), *codec.residual.hyper_coding(shape, 1))
    index = codec.residual.table_index(n_z, torch.from_numpy(k).view(1, h, w))
    n = np.zeros(index.size, dtype=np.int8)
    symbols = entropy_coding.encode_symbols(n, *codec.residual.residual_coding(index))
    return replace(file, base=base, fixed_length=fixed, residual=CodedResidual(1, hyper, symbols))


def test_a_hundred_megapixels_are_read_in_little_memory(codec, largest):
    memory = hostile.Memory()
    outcome, seconds, contents = hostile.attempt(lambda: codec.read(pack(largest)))
    assert outcome == "decoded" and not contents.symbols.residual.any()
    assert seconds < 5 and memory.beyond() < hostile.MEGABYTES


@pytest.mark.parametrize("section", ["base", "hyper", "symbols"])
def test_a_hundred_megapixels_of_garbage_are_refused_in_little_memory(codec, largest, section):
    owner = largest if section == "base" else largest.residual
    changed = replace(owner, **{section: np.random.default_rng(0).bytes(len(getattr(owner, section)))})
    file = changed if section == "base" else replace(largest, residual=changed)
    memory = hostile.Memory()
    outcome, seconds, _ = hostile.attempt(lambda: codec.read(pack(file)))
    assert outcome == BitstreamError.__name__ and seconds < 3 and memory.beyond() < hostile.MEGABYTES


# Previews -------------------------------------------------------------------------------------------------------------


def test_every_cut_is_previewed_from_the_base_on_and_refused_in_full(codec, files):
    data = files[-1]
    end = len(pack(replace(unpack(data), residual=None)))
    whole = codec.read(data)
    for size in range(len(data)):
        with pytest.raises(BitstreamError):
            codec.read(data[:size])
        if size < end:
            with pytest.raises(BitstreamError):
                codec.read(data[:size], preview=True)
        else:
            contents = codec.read(data[:size], preview=True)
            assert contents.symbols is None and torch.equal(contents.k, whole.k)


def test_a_preview_is_the_picture_of_the_base_file(codec):
    """The same indices, seed and rate: bit by bit what the base-only file decodes to."""
    image = picture(40, 70)
    alone, layered = codec.compress(image), codec.compress(image, 60)
    assert noise_seed(unpack(alone).base) == noise_seed(unpack(layered).base)
    expected = codec.decode(alone)
    for data in (layered, layered[: len(alone)], layered[:-3]):
        preview = codec.decode(data, preview=True)
        assert torch.equal(preview.image, expected.image) and preview.eta == expected.eta
    assert not torch.equal(codec.decompress(layered), expected.image)


# The command ----------------------------------------------------------------------------------------------------------


def test_the_benchmark_command(tmp_path, monkeypatch, capsys):
    photograph(tmp_path / "photos" / "a.png", 70, 40)
    codec = new_codec()
    monkeypatch.setattr(hostile, "load_release", lambda folder: codec)
    args = ["--pictures", str(tmp_path / "photos"), "--mutations", "20", "--resealed", "12"]
    assert hostile.main(args) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("6 valid files of 1 pictures") and printed.endswith("0 violations\n")
    assert "altered    BitstreamError" in printed and "memory beyond the model" in printed
    # Whatever is no error of the project counts, and the command says so.
    monkeypatch.setattr(codec, "_read_residual", lambda *args: np.zeros(3)[7])
    assert hostile.main(args) == 1
    assert ": IndexError" in capsys.readouterr().out
