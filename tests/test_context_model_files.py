"""The context model of a codec: shorter files of the same picture, the release that keeps it, what is refused of both, and its fit."""

import copy
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import hostile
from coding import ledger
from coding.compressai_view import CompressAIView
from experiments.stopwatch import Stopwatch
from models.bitstream import pack, unpack
from models.context_model import SKEWS, TABLES, ContextModel, ContextNetwork, bordered, parts
from models.entropy_coding import symbol_bits
from models.released import Triple, load_release, load_triple, save_triple, states_of
from models.residual_hyperprior import SYMBOL_REACH, Symbols
from models.residual_networks import SCALE_MIN, SCALE_STEP, SCALES
from release import context_model as fitting
from tests.residual import new_codec, picture
from utils import checkpoints
from utils.errors import BitstreamError, CheckpointError

CPU = torch.device("cpu")


def fitted(codec, crops, steps=40):
    network = fitting.fit(crops, steps, 0, CPU)
    reach = codec.residual.tables.reach("symbols")
    return ContextModel(network, fitting.counted(network, crops), reach)


@pytest.fixture(scope="module", autouse=True)
def few_positions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "BATCH", 64)
        yield


@pytest.fixture(scope="module")
def codec():
    """With a model that was fitted to what its pictures hold."""
    codec = new_codec()
    crops = []
    for seed in range(8):
        analysed = codec.analyse(picture(256, 256, seed))
        crops.append(codec.residual.symbols(analysed.s, analysed.y, analysed.k, 150, codec.residual.tables))
    codec.residual.context_model = fitted(codec, crops)
    return codec


# Files ----------------------------------------------------------------------------------------------------------------


def test_files_are_shorter_and_hold_the_same_picture(codec):
    image, plain = picture(250, 333, seed=9), new_codec()
    data, longer = codec.compress(image, 60), plain.compress(image, 60)
    assert len(data) < len(longer) and unpack(data).residual.hyper == unpack(longer).residual.hyper
    assert len(codec.compress(image)) == len(plain.compress(image))
    contents, others = codec.read(data), plain.read(longer)
    for name in ("hyper", "residual", "index"):
        np.testing.assert_array_equal(getattr(contents.symbols, name), getattr(others.symbols, name))
    facts = ledger.ledger(contents.file) | ledger.beside(codec, contents)
    assert 0 <= facts["bytes"] * 8 - facts["estimated_bits"] < 8 * 4
    likelihoods = CompressAIView(codec, 60)._likelihoods(contents)["residual"]
    symbols = contents.symbols
    assert likelihoods.shape == symbols.residual.shape
    expected = codec.residual.context_model.bits(symbols.residual, symbols.index).sum()
    assert -likelihoods.log2().sum() == pytest.approx(expected)


def test_altered_files_are_refused_or_decode_to_nonsense(codec):
    files = hostile.valid_files(codec, [picture(250, 333, seed=5), picture(16, 16)])
    assert not hostile.read_altered(codec, files, 100).violations
    assert not hostile.decode_resealed(codec, files, 40).violations
    nonsense = [codec.read(hostile.nonsense(codec, files[-1:], np.random.default_rng(seed))) for seed in range(4)]
    assert any(
        each.symbols is not None and each.symbols.residual.any() for each in nonsense
    )  # it is valid, and is read
    file = unpack(codec.compress(picture(250, 333, seed=9), 60))
    for section in (file.residual.symbols[:-1], file.residual.symbols + b"\1", b"\0"):
        with pytest.raises(BitstreamError, match="the residual section is no string"):
            codec.read(pack(replace(file, residual=replace(file.residual, symbols=section))))


def test_its_time_is_counted_as_its_own(codec):
    watch = Stopwatch(time.perf_counter)
    with watch.watching(codec):
        data = codec.compress(picture(64, 80), 60)
        written = dict(watch.spent)
        codec.decompress(data)
    (part,) = [part for part in written if part.startswith("context model")]
    assert 0 < written[part] < watch.spent[part]


def test_a_cast_codec_reads_the_same(codec):
    data = codec.compress(picture(250, 333, seed=5), 60)
    cast = copy.deepcopy(codec).bfloat16().read(data).symbols
    np.testing.assert_array_equal(cast.residual, codec.read(data).symbols.residual)


# Releases -------------------------------------------------------------------------------------------------------------


def saved(codec, folder):
    folder.mkdir(exist_ok=True)
    triple, residual = Triple.of(folder, 1), codec.residual
    tables = codec.base_table, residual.tables, codec.index_model, residual.context_model
    save_triple(triple, states_of(codec), codec.params, *tables)
    return triple


def changed(path, change):
    content = checkpoints.read(path)
    entry = content["diffo"]["residual"]
    entry["context_model"] = change(entry["context_model"])
    checkpoints.save(path, content)


def test_a_release_keeps_the_model_and_its_fingerprint_counts_it(codec, tmp_path):
    loaded = load_triple(saved(codec, tmp_path / "with"))
    symbols = codec.read(codec.compress(picture(250, 333), 60)).symbols
    coded = symbols.residual, symbols.index
    assert loaded.residual.context_model.encode(*coded) == codec.residual.context_model.encode(*coded)
    plain = load_triple(saved(new_codec(), tmp_path / "without"))
    assert plain.residual.context_model is None
    fingerprints = {plain.fingerprint, loaded.fingerprint}
    for key in ("out.bias", "group", TABLES):
        path = saved(codec, tmp_path / key).vq_base

        def change(state, key=key):
            values = state[key].clone()
            if key == TABLES:
                values[3, 2, :2] += torch.tensor([1, -1]) * (1 if values[3, 2, 1] > 1 else 0)
                values[3, 2, 31:33] += torch.tensor([-1, 1])
            else:
                values[1] = values[1] - 1 if values[1] > 0 else values[1] + 1
            return state | {key: values}

        changed(path, change)
        fingerprints.add(load_release(tmp_path / key).fingerprint)
    assert len(fingerprints) == 5


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "damage, told",
    [
        (without("out.bias"), "does not fit the configuration. missing: out.bias$"),
        (without("hidden.weight"), "missing: hidden.weight"),
        (without("group"), "missing: group"),
        (without(TABLES), "no tables of"),
        (lambda state: state | {"extra": torch.zeros(2)}, "surplus: extra$"),
        (lambda state: state | {"group": state["group"] + 8}, "groups of channels beyond 0 to 7"),
        (lambda state: state | {"group": state["group"].float()}, "other type: group torch.float32 for torch.int64"),
        (lambda state: state | {TABLES: state[TABLES] + 1}, "frequencies that sum to 65536"),
        (lambda state: state | {TABLES: state[TABLES][:, :4]}, "no tables of"),
        (
            lambda state: state | {TABLES: torch.zeros_like(state[TABLES]).index_fill_(2, torch.tensor([31]), 2**16)},
            "no tables",
        ),
        (lambda state: state | {TABLES: 3}, "damaged"),
        (lambda state: [1, 2], "damaged"),
    ],
)
def test_a_damaged_context_model_is_refused_by_what_differs(damage, told, codec, tmp_path):
    changed(saved(codec, tmp_path).vq_base, damage)
    with pytest.raises(CheckpointError, match=f"vq_model_1.*: diffo.residual.context_model: .*{told}"):
        load_release(tmp_path)


# The fit --------------------------------------------------------------------------------------------------------------


def test_bits_of_a_gaussian_by_hand():
    """sigma = 0.11 x 1.112^21 = 1.022; u = 4 puts the mean at 0.511, and n = 1 between -0.011 and 0.968 deviations of it: 0.338."""
    sigma = SCALE_MIN * SCALE_STEP**21
    assert sigma == pytest.approx(1.0223, abs=1e-4)
    index, n = torch.tensor([21.0, 21.0, 21.0]), torch.tensor([1.0, 1.0, 30.0])
    bits = fitting.gaussian_bits(n, index, torch.tensor([4.0, -4.0, 0.0]))
    assert bits[0].item() == pytest.approx(-np.log2(0.3378), abs=0.01)
    assert bits[1].item() == pytest.approx(-np.log2(0.1367), abs=0.01)  # between 0.989 and 1.968 deviations
    assert bits[2].item() == 16  # no table gives less than 1 of 2^16


def test_positions_are_of_the_pass():
    torch.manual_seed(0)
    for number in range(4):
        crop, row, column = fitting.drawn(number, 5, 6, 8, 400)
        assert ((row + column) % 2 == number % 2).all()
        assert set(crop.tolist()) == set(range(5)) and set(row.tolist()) == set(range(6))
        assert set(column.tolist()) == set(range(8))


def test_a_crop_is_trained_on_with_its_own_indices(monkeypatch):
    """i = 10 + n everywhere in each of six crops; the network that has not learnt yet gives i itself."""
    values = [np.full((6, 4, 4), n) for n in range(6)]
    seen = []
    bits = fitting.gaussian_bits
    monkeypatch.setattr(fitting, "gaussian_bits", lambda n, i, u: (seen.append((n, i)), bits(n, i, u))[1])
    fitting.fit([Symbols(None, n.astype(np.int8), (10 + n).astype(np.uint8)) for n in values], 1, 0, CPU)
    assert sum(n.numel() for n, _ in seen) == 12 * 64 and all(torch.equal(i, 10 + n) for n, i in seen)


def repeated(count: int, channels: int = 6) -> list[Symbols]:
    """Crops whose symbols are alike in all channels of a position, -2, 0 or 2, while i says nothing of them."""
    random = np.random.default_rng(0)
    crops = []
    for _ in range(count):
        n = np.repeat(random.integers(-1, 2, (1, 8, 8)) * 2, channels, axis=0)
        crops.append(Symbols(None, n.astype(np.int8), np.full(n.shape, 26, dtype=np.uint8)))
    return crops


def test_a_model_is_fitted_where_it_pays(capsys, monkeypatch):
    """What one channel tells of the next: of 6 channels in 6 groups, 5 are known by the first, which has three likely values."""
    monkeypatch.setattr(fitting, "ENOUGH", 48)
    codec, crops = new_codec(), repeated(64)
    notes = fitting.install(codec, crops, 150, 0, CPU)["context_model"]
    assert len(set(codec.residual.context_model.network.group.tolist())) == 6
    held = crops[::16]
    tables = codec.residual.tables.symbols
    alone = np.mean([symbol_bits(c.residual.ravel(), c.index.ravel(), tables).sum() / 64 for c in held])
    model = codec.residual.context_model
    own = np.mean([model.bits(c.residual, c.index).sum() / 64 for c in held])
    assert notes == {"held_out_bits_per_position": round(own, 3), "without": round(alone, 3)}
    assert own < 0.6 * alone
    json.dumps(notes)
    monkeypatch.setattr(fitting, "MOST_CHANNELS", 5)
    assert fitting.install(new_codec(), crops, 5, 0, CPU) == {}
    assert "no context model: 6 channels of the residual, and it takes up to 5" in capsys.readouterr().err
    monkeypatch.setattr(fitting, "MOST_CHANNELS", 6)
    for few, steps, told in ((repeated(47), 5, "it takes 48 crops, and 47 were counted"), (crops, 0, "")):
        codec = new_codec()
        assert fitting.install(codec, few, steps, 0, CPU) == {} and codec.residual.context_model is None
        assert told in capsys.readouterr().err


def test_what_a_model_saves_is_measured_on_crops_that_it_was_not_fitted_to(monkeypatch):
    monkeypatch.setattr(fitting, "ENOUGH", 16)
    crops, fit, counted = repeated(33), fitting.fit, fitting.counted
    trained, read = [], []
    monkeypatch.setattr(fitting, "fit", lambda own, *rest: (trained.extend(map(id, own)), fit(own, *rest))[1])
    monkeypatch.setattr(fitting, "counted", lambda network, own: (read.extend(map(id, own)), counted(network, own))[1])
    fitting.install(new_codec(), crops, 2, 0, CPU)
    apart = {id(crop) for crop in crops[::16]}
    assert len(trained) == len(read) == 30 and not apart & {*trained, *read}


def test_no_model_where_it_saves_nothing(capsys, monkeypatch):
    monkeypatch.setattr(fitting, "ENOUGH", 16)
    random = np.random.default_rng(0)
    index = [random.integers(0, 20, (6, 8, 8)).astype(np.uint8) for _ in range(16)]
    crops = [Symbols(None, np.zeros((6, 8, 8), np.int8), i) for i in index]
    monkeypatch.setattr(ContextModel, "bits", lambda self, n, i: np.full(n.shape, 9.0))
    codec = new_codec()
    assert fitting.install(codec, crops, 2, 0, CPU) == {} and codec.residual.context_model is None
    assert "no context model: 54.00 bits per position with it" in capsys.readouterr().err


def test_counts_of_a_negative_mean_are_those_of_a_positive_one_mirrored(codec):
    network = ContextNetwork(6, 4)
    with torch.no_grad():
        network.out.bias[6:] = -0.5  # u = -4 for every symbol
    index = np.full((6, 2, 2), 20, dtype=np.uint8)
    n = np.full((6, 2, 2), -3, dtype=np.int8)
    n[:3] = 1
    tables = fitting.counted(network, [Symbols(None, n, index)] * 40)  # 480 symbols of each kind
    busy = tables[20, 4] / 2**16
    assert busy[SYMBOL_REACH + 3] > 0.4 and busy[SYMBOL_REACH - 1] > 0.4
    assert busy[SYMBOL_REACH - 3] < 0.01 and busy[SYMBOL_REACH + 1] < 0.1  # what the prior alone says
    assert (tables > 0).all() and (tables.sum(-1) == 2**16).all() and tables.shape == (SCALES, SKEWS + 1, 63)


def test_tables_that_were_never_seen_are_gaussian(codec):
    network = ContextNetwork(6, 4)
    tables = fitting.counted(network, [Symbols(None, np.zeros((6, 1, 2), np.int8), np.zeros((6, 1, 2), np.uint8))])
    for index, u in ((20, 0), (20, 8), (30, 6)):
        n, sigma = np.arange(-8, 9), SCALE_MIN * SCALE_STEP**index
        share = tables[index, u, SYMBOL_REACH - 8 : SYMBOL_REACH + 9] / 2**16  # further out, 1 stands for what is less
        assert (share * n).sum() == pytest.approx(sigma * u / 8, abs=0.1)
        assert ((share * n**2).sum() - (share * n).sum() ** 2) ** 0.5 == pytest.approx(
            (sigma**2 + 1 / 12) ** 0.5, rel=0.05
        )


def test_a_fit_is_repeatable_and_a_pass_is_trained_as_it_codes():
    crops = repeated(20)
    one, two = (fitting.fit(crops, 3, 7, CPU) for _ in range(2))
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    model = ContextModel(one, np.ones((SCALES, SKEWS + 1, 63), np.int32), np.full(SCALES, SYMBOL_REACH))
    grid, index = bordered(crops[0].residual), crops[0].index
    for number, rows, columns in parts(8, 8):
        members = one.members(number).numpy()
        assert model.chosen(grid, index, number, rows, columns)[0].shape == (32, len(members))
