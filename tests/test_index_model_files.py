"""The index model of a codec: files in passes, the release that keeps it, what is refused of both, and its fit."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import hostile
from coding import ledger
from coding.compressai_view import CompressAIView
from models.bitstream import pack, unpack
from models.index_model import IndexModel, IndexNetwork
from models.released import Triple, load_release, load_triple, save_triple, states_of
from release import index_model as fitting
from tests.residual import K, new_codec, picture
from utils import checkpoints
from utils.errors import BitstreamError, CheckpointError


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "BATCH", 256)
        yield


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec():
    """With a model that was fitted to what its pictures hold."""
    codec = new_codec()
    crops = [codec.analyse(picture(256, 256, seed)).k[0].numpy() for seed in range(24)]
    codec.index_model = IndexModel(
        fitting.fit(crops, codec.vq_base.quantize.embedding.weight, 80, 0, torch.device("cpu"))
    )
    return codec


def test_files_in_passes_are_shorter_and_hold_the_same(codec):
    image, plain = picture(250, 333, seed=5), new_codec()
    for quality in (0, 60):
        data, longer = codec.compress(image, quality), plain.compress(image, quality)
        assert unpack(data).in_passes and data[4] & 4 and not longer[4] & 4 and len(data) < len(longer)
        contents, others = codec.read(data), plain.read(longer)
        assert torch.equal(contents.k, others.k) and torch.equal(codec.read(data, preview=True).k, others.k)
        facts = ledger.ledger(contents.file) | ledger.beside(codec, contents)
        assert 0 <= facts["bytes"] * 8 - facts["estimated_bits"] < 8 * 4
        base = CompressAIView(codec, quality)._likelihoods(contents)["base"]
        assert base.shape == contents.k.shape
        assert -base.log2().sum() == pytest.approx(codec.index_model.bits(contents.k[0].numpy()).sum())


def test_indices_that_the_model_does_not_expect_are_coded_another_way(codec):
    for k in (np.full((16, 16), codec.base_table.argmin()), np.random.default_rng(0).integers(0, K, (16, 16))):
        coded = codec.coded_base(k)
        assert coded["fixed_length"] and not coded["in_passes"] and len(coded["base"]) == 16 * 16 * 4 / 8
    assert len(codec.index_model.encode(k)) > 16 * 16 * 4 / 8


def test_refusals(codec):
    file = unpack(codec.compress(picture(250, 333, seed=5)))
    with pytest.raises(BitstreamError, match="in passes and its weights have no index model: the file is damaged"):
        new_codec().read(pack(file))
    with pytest.raises(BitstreamError, match="not fewer than the 168 of fixed length"):
        codec.read(pack(replace(file, base=bytes(168))))
    for change in ({"in_passes": False}, {"base": file.base[:-1]}, {"height": 266}, {"width": 350}):
        with pytest.raises(BitstreamError):
            codec.read(pack(replace(file, **change)))


def test_altered_files_are_refused_or_decode_to_nonsense(codec):
    files = hostile.valid_files(codec, [picture(250, 333, seed=5), picture(16, 16)])
    assert sum(unpack(data).in_passes for data in files) >= 5
    assert not hostile.read_altered(codec, files, 100).violations
    assert not hostile.decode_resealed(codec, files, 40).violations


def test_a_cast_codec_reads_the_same(codec):
    data = codec.compress(picture(250, 333, seed=5))
    assert unpack(data).in_passes
    assert torch.equal(copy.deepcopy(codec).bfloat16().read(data).k, codec.read(data).k)


# Releases -------------------------------------------------------------------------------------------------------------


def saved(codec, folder):
    triple = Triple.of(folder, 1)
    tables = codec.residual.tables
    save_triple(triple, states_of(codec), codec.params, codec.base_table, tables, codec.index_model)
    return triple


def test_a_release_keeps_the_model_and_its_fingerprint_counts_it(codec, tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    loaded = load_triple(saved(codec, tmp_path / "with"))
    k = np.random.default_rng(0).integers(0, K, (9, 13))
    assert loaded.index_model.encode(k) == codec.index_model.encode(k)
    plain = load_triple(saved(new_codec(), tmp_path / "without"))
    assert plain.index_model is None and plain.fingerprint != loaded.fingerprint
    path = Triple.of(tmp_path / "with", 1).vq_base
    content = checkpoints.read(path)
    content["diffo"]["index_model"]["out.bias"][3] += 1
    checkpoints.save(path, content)
    assert load_release(tmp_path / "with").fingerprint not in (loaded.fingerprint, plain.fingerprint)


def test_models_of_earlier_releases_are_read(tmp_path):
    """Their layers are 96 wide, and have none in the middle."""
    codec = new_codec()
    network = IndexNetwork(K, 16, 96, 96, middle=False)
    torch.nn.init.normal_(network.out.weight, std=0.3)
    codec.index_model = IndexModel(network)
    loaded = load_triple(saved(codec, tmp_path)).index_model
    assert sorted(loaded.network.state_dict()) == sorted(network.state_dict()) and loaded.network.middle is None
    k = np.random.default_rng(0).integers(0, K, (9, 13))
    assert loaded.encode(k) == codec.index_model.encode(k)


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "damage, told",
    [
        (without("out.bias"), "does not fit the configuration. missing: out.bias$"),
        (lambda state: state | {"embedding.weight": torch.zeros(K + 1, 33, dtype=torch.int16)}, "other shape"),
        (
            lambda state: state | {"hidden.weight": torch.zeros(1, dtype=torch.int8).expand(8, 1 << 36, 1, 1)},
            "other shape",
        ),
        (lambda state: state | {"hidden.weight": torch.zeros((), dtype=torch.int8)}, "other shape"),
        (without("embedding.weight"), "missing: embedding.weight"),
        (without("hidden.weight"), "missing: hidden.weight"),
        (lambda state: state | {"extra": torch.zeros(2)}, "surplus: extra$"),
        (lambda state: state | {"out.bias": torch.zeros(3, dtype=torch.int16)}, r"other shape: out.bias \[3\] for"),
        (lambda state: state | {"embedding.weight": torch.zeros(3)}, "other shape: embedding.weight"),
        (
            lambda state: state | {"out.bias": state["out.bias"].float()},
            "other type: out.bias torch.float32 for torch.int",
        ),
        (lambda state: state | {"out.bias": 3}, "damaged"),
        (lambda state: [1, 2], "damaged"),
    ],
)
def test_a_damaged_index_model_is_refused_by_what_differs(damage, told, codec, tmp_path):
    path = saved(codec, tmp_path).vq_base
    content = checkpoints.read(path)
    content["diffo"]["index_model"] = damage(content["diffo"]["index_model"])
    checkpoints.save(path, content)
    with pytest.raises(CheckpointError, match=f"vq_model_1.*: diffo.index_model: .*{told}"):
        load_release(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [without("tables"), without("state_dict"), lambda residual: residual | {"tables": {"hyper": torch.zeros(1)}}],
)
def test_a_residual_entry_that_is_not_whole_is_refused(damage, codec, tmp_path):
    path = saved(codec, tmp_path).vq_base
    content = checkpoints.read(path)
    content["diffo"]["residual"] = damage(content["diffo"]["residual"])
    checkpoints.save(path, content)
    with pytest.raises(CheckpointError, match="vq_model_1.*diffo.residual.* is not whole"):
        load_release(tmp_path)


def waves(count: int, size: int = 12) -> list[np.ndarray]:
    """Crops in which neighbours differ by one or not at all: they say much of each other."""
    random = np.random.default_rng(0)
    steps = random.integers(0, 2, (count, 2, size))
    return list((np.cumsum(steps[:, 0], 1)[:, :, None] + np.cumsum(steps[:, 1], 1)[:, None]) % K)


def test_a_model_is_fitted_where_it_pays(capsys):
    codec, cpu = with_flat_table(new_codec()), torch.device("cpu")
    notes = fitting.install(codec, waves(64), 40, 0, cpu)["index_model"]
    assert notes["with_one_table"] == 4 and notes["held_out_bits_per_index"] < 3
    held = waves(64)[::16]
    assert notes["held_out_bits_per_index"] == pytest.approx(np.mean(list(map(codec.index_model.bits, held))), abs=1e-4)
    json.dumps(notes)
    noise = [np.random.default_rng(i).integers(0, K, (12, 12)) for i in range(64)]
    for crops, steps, told in ((noise, 5, "4.000 without"), (waves(11), 5, "1,600 indices, and 1,584"), (noise, 0, "")):
        codec = with_flat_table(new_codec())
        assert fitting.install(codec, crops, steps, 0, cpu) == {} and codec.index_model is None
        assert told in capsys.readouterr().err


def with_flat_table(codec):
    codec.base_table = np.full(K, 2**16 // K, np.int32)
    return codec


def test_a_fit_is_repeatable():
    one, two = (fitting.fit(waves(20), torch.eye(K), 3, 7, torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
