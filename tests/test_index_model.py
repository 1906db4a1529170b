"""Indices in passes: what a pass knows, exact tables, sections that come back and others that are refused."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import hostile
from coding import ledger
from coding.compressai_view import CompressAIView
from models import index_model
from models.bitstream import pack, unpack
from models.entropy_coding import own_tables
from models.index_model import (
    CONTEXT,
    OFFSETS,
    PASSES,
    IndexModel,
    IndexNetwork,
    bordered,
    contexts,
    parts,
    positions,
    shares,
)
from models.released import Triple, load_release, load_triple, save_triple, states_of
from release import index_model as fitting
from tests.residual import K, new_codec, picture
from utils import checkpoints
from utils.errors import BitstreamError, CheckpointError

SIZES = [(1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (9, 13), (32, 48)]
GOLDEN = "0000000000a182deab7a046d107e23a89e223fa60800849ab57e042ee7e4fd9bdf17"
quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def new_model(codes: int = K, seed: int = 0) -> IndexModel:
    """Random weights, tables that are far from flat."""
    torch.manual_seed(seed)
    network = IndexNetwork(codes, channels=3, width=8)
    torch.nn.init.normal_(network.out.weight, std=0.5)
    return IndexModel(network)


def drawn(model: IndexModel, h: int, w: int, seed: int = 0) -> np.ndarray:
    """Indices as the model has them: each from its table."""
    random, codes = np.random.default_rng(seed), model.network.codes
    grid = bordered(np.full((h, w), codes), codes)
    reach = (grid.shape[0] - h) // 2
    k = grid[reach : reach + h, reach : reach + w]
    for number, rows, columns in parts(h, w, codes):
        edges = np.cumsum(1 + model.masses(grid, number, rows, columns), axis=1)
        k[rows, columns] = (random.integers(0, 1 << 24, len(rows))[:, None] >= edges).sum(axis=1)
    return k.astype(np.int64)


def tables(model: IndexModel, k: np.ndarray) -> np.ndarray:
    """The table of every position: (h, w, K)."""
    found = np.empty((*k.shape, model.network.codes))
    grid = bordered(k, model.network.codes)
    for number, rows, columns in parts(*k.shape, model.network.codes):
        found[rows, columns] = model.masses(grid, number, rows, columns)
    return found


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module", autouse=True)
def small_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "BATCH", 256)
        yield


# Passes ---------------------------------------------------------------------------------------------------------------


def test_the_passes_of_a_small_grid_by_hand():
    order = np.full((3, 5), -1)
    for number, rows, columns in parts(3, 5, K):
        assert (order[rows, columns] == -1).all()
        order[rows, columns] = number
    assert order.tolist() == [[0, 4, 2, 4, 0], [4, 3, 4, 3, 4], [2, 4, 1, 4, 2]]


def test_a_pass_knows_its_nearest_neighbours_of_earlier_passes():
    nearest = {1: {(2, 2), (2, -2), (-2, 2), (-2, -2)}, 2: {(2, 0), (-2, 0), (0, 2), (0, -2)}}
    nearest |= {3: {(1, 1), (1, -1), (-1, 1), (-1, -1)}, 4: {(1, 0), (-1, 0), (0, 1), (0, -1)}}
    assert {number: set(map(tuple, OFFSETS[number][:4].tolist())) for number in range(1, PASSES)} == nearest
    order = np.tile(index_model.PATTERN, (8, 8))
    for number in range(1, PASSES):
        assert len(set(map(tuple, OFFSETS[number].tolist()))) == CONTEXT
        rows, columns = positions(number, 32, 32)
        middle = (np.minimum(rows, columns) >= 12) & (np.maximum(rows, columns) < 20)
        for row, column in zip(rows[middle], columns[middle], strict=True):  # every position of a pass sees alike
            assert (order[tuple((OFFSETS[number] + (row, column)).T)] < number).all()


def test_contexts_by_hand():
    k = np.arange(15).reshape(3, 5)
    seen = contexts(bordered(k, 99), 4, np.array([1]), np.array([0]), 99)[0]
    assert seen[:4].tolist() == [0, 99, 6, 10]  # above, left, right, below
    assert contexts(bordered(k, 99), 0, np.array([0]), np.array([4]), 99).tolist() == [[99] * CONTEXT]


@pytest.mark.parametrize("number", range(PASSES))
def test_no_table_depends_on_what_is_not_decoded_yet(model, number):
    k = np.random.default_rng(1).integers(0, K, (12, 14))
    before, reached = tables(model, k), False
    order = np.tile(index_model.PATTERN, (4, 4))[:12, :14]
    for row, column in np.argwhere(order == number)[:6]:
        changed = k.copy()
        changed[row, column] = (k[row, column] + 1 + row) % K
        differs = (tables(model, changed) != before).any(axis=2)
        assert not differs[order <= number].any()
        reached |= differs.any()
    assert reached == (number < PASSES - 1)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_known_table():
    """Scores of 0, -1, -2 and -2 bits: probabilities of 1/2, 1/4, 1/8 and 1/8."""
    network = IndexNetwork(4, channels=1, width=1)
    torch.nn.init.zeros_(network.out.weight)
    with torch.no_grad():
        network.out.bias.copy_(torch.tensor([5.0, 4, 3, 3]))
    bits = IndexModel(network).bits(np.array([[0, 1, 2, 3, 0, 0]]))
    np.testing.assert_allclose(bits, [[1, 2, 3, 3, 1, 1]], atol=1e-5)


def test_shares_are_powers_of_two_and_no_code_is_without_one():
    scores = np.array([[7.0, 7 - 16, 7 - 8, -1000]])
    assert shares(scores).tolist() == [[2**20, 2**19, np.floor(2**19.5), 1]]


@quick
@given(codes=st.sampled_from([2, 16, 512, 8192]), rows=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_tables_are_the_quotients_of_integers(codes, rows, seed):
    weights = np.floor(2 ** np.random.default_rng(seed).uniform(0, 20, (rows, codes)))
    masses = own_tables(np.asfortranarray(weights))
    assert masses.flags.c_contiguous and (masses.sum(axis=1) == 2**24 - codes).all()
    for row, found in zip(weights.astype(int).tolist(), masses.tolist(), strict=True):
        total = sum(row)
        exact = [weight * (2**24 - codes) // total for weight in row]
        assert found[1:] == exact[1:] and 0 <= found[0] - exact[0] < codes


def test_the_network_computes_in_integers(model):
    """In int64, by hand."""
    network, context = model.network, torch.randint(0, K + 1, (40, CONTEXT), generator=torch.manual_seed(0))
    whole = {key: (value * 64).clamp(-127, 127).round().long() for key, value in network.state_dict().items()}
    bias = {key: (value * 16).round().long() * 64 for key, value in network.state_dict().items() if "bias" in key}
    rows = (network.embedding.weight * 16).clamp(-255, 255).round().long()
    for number in range(PASSES):
        a = rows[context].flatten(1)
        for layer in (f"first.{number}", "hidden", "out"):
            a = (a @ whole[f"{layer}.weight"][:, :, 0, 0].T + bias[f"{layer}.bias"]) >> 6
            a = a if layer == "out" else a.clamp(0, 255)
        assert torch.equal(network(number, context).long(), a) and torch.equal(model.scores(number, context).long(), a)
        assert torch.equal(copy.deepcopy(network).double()(number, context).long(), a)


def test_threads_parts_and_autocast_do_not_matter(model, monkeypatch):
    k = np.random.default_rng(0).integers(0, K, (9, 13))
    section, before = model.encode(k), torch.get_num_threads()
    try:
        for threads, entries in ((1, 1 << 18), (2, 16 * K), (2, 3 * K)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(index_model, "_ENTRIES", entries)
            with torch.autocast("cpu", torch.bfloat16):
                assert model.encode(k) == section
                np.testing.assert_array_equal(model.decode(section, *k.shape), k)
    finally:
        torch.set_num_threads(before)


# Sections -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("codes", [2, K, 512])
def test_indices_come_back_at_their_ideal_cost(size, codes):
    model = new_model(codes)
    for k in (drawn(model, *size), np.random.default_rng(0).integers(0, codes, size), np.full(size, codes - 1)):
        section = model.encode(k)
        found = model.decode(section, *size)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, k)
        assert 0 <= len(section) - np.ceil(model.bits(k).sum() / 8) <= 1


def test_a_golden_section_pins_the_format():
    network = IndexNetwork(8, channels=2, width=4).requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_((torch.arange(parameter.numel()) * 37 % 101 - 50).view(parameter.shape) / 40)
    model, k = IndexModel(network), (np.arange(54) ** 2 % 8).reshape(6, 9)
    assert model.encode(k).hex() == GOLDEN
    np.testing.assert_array_equal(model.decode(bytes.fromhex(GOLDEN), 6, 9), k)


@quick
@given(garbage=st.binary(max_size=60), at=st.integers(0, 1000), flip=st.integers(1, 255))
def test_other_sections_are_refused_or_are_what_the_encoder_writes(model, garbage, at, flip):
    valid = model.encode(drawn(model, 9, 13))
    at %= len(valid)
    altered = valid[:at] + bytes([valid[at] ^ flip]) + valid[at + 1 :]
    for section in (garbage, altered, valid[:at], valid + garbage):
        try:
            found = model.decode(section, 9, 13)
        except BitstreamError as error:
            assert str(error).startswith("the base section is no string") and "\n" not in str(error)
        else:
            assert model.encode(found) == section and 0 <= found.min() <= found.max() < K


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codec():
    """With a model that was fitted to what its pictures hold."""
    codec = new_codec()
    crops = [codec.analyse(picture(256, 256, seed)).k[0].numpy() for seed in range(6)]
    codec.index_model = IndexModel(fitting.fit(crops, K, steps=40, seed=0, device=torch.device("cpu")))
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


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "damage, told",
    [
        (without("out.bias"), "does not fit the configuration. missing: out.bias$"),
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


def test_integers_are_what_a_network_computes_with():
    """Weights in 1/64 up to 127, biases in 1/16 up to 4095, the embedding in 1/16 up to 255."""
    network = IndexNetwork(4, channels=1, width=1).requires_grad_(False)
    network.hidden.weight.fill_(0.25)
    network.out.weight[:] = torch.tensor([3.0, -3.0, 0.012, 0.1])[:, None, None, None]
    network.out.bias[:] = torch.tensor([300.0, -0.0625, 0.03, 0.04])
    network.embedding.weight[:] = torch.tensor([[20.0], [-20.0], [0.5], [0.0], [1.0]])
    integers = network.integers()
    assert integers["out.weight"].flatten().tolist() == [127, -127, 1, 6] and integers["hidden.weight"].item() == 16
    assert integers["out.bias"].tolist() == [4095, -1, 0, 1]
    assert integers["embedding.weight"].flatten().tolist() == [255, -255, 8, 0, 16]
    other = IndexNetwork(4, channels=1, width=1)
    other.load_state_dict(IndexNetwork.natural(integers))
    context = torch.randint(5, (20, CONTEXT), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(1, context), network(1, context))


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
    one, two = (fitting.fit(waves(20), K, 3, 7, torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)
