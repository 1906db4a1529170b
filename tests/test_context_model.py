"""The context model alone: what a pass knows, which table a symbol gets, sections that come back and others that are refused."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import context_model
from models.context_model import (
    GROUPS,
    MOST_CHANNELS,
    PASSES,
    SKEWS,
    TABLES_SHAPE,
    TAPS,
    ContextModel,
    ContextNetwork,
    bordered,
    contexts,
    grouped,
    parts,
)
from models.entropy_coding import frequency_table
from models.residual_networks import SCALE_MIN, SCALE_STEP, SCALES
from release.tables import gaussian_pmf
from utils.errors import BitstreamError

M = 12
REACH = np.array([1] * 8 + [3] * 8 + [8] * 8 + [14] * 8 + [31] * 16)  # by h_s's index
SIZES = [(1, 1), (1, 7), (6, 1), (2, 2), (9, 13), (32, 48)]
GOLDEN = (
    "0002040b12ad65460090ce4427a748292035040d746e75972f600a66c9f84001d5073a734a648be9aa503d826167a7705621b962d8e932c5574"
    "8d5d57d823b2b64955d536b"
)
quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def gaussian_tables() -> np.ndarray:
    """Of Gaussians with means of u / 8 deviations."""
    pmf = np.stack([gaussian_pmf(u / SKEWS) for u in range(SKEWS + 1)], axis=1)
    return np.apply_along_axis(frequency_table, 2, np.rint(1e6 * pmf).astype(np.int64))


def new_network(channels: int = M, seed: int = 0, width: int = 16) -> ContextNetwork:
    """Random weights: tables that depend on all that is known."""
    torch.manual_seed(seed)
    network = ContextNetwork(channels, width).requires_grad_(False)
    network.group.copy_(torch.from_numpy(grouped(np.random.default_rng(seed).random(channels))))
    torch.nn.init.normal_(network.first.weight, std=0.3)
    torch.nn.init.normal_(network.of_pass.weight)
    torch.nn.init.normal_(network.out.weight, std=0.3)
    return network


def symbols(h: int, w: int, seed: int = 0, channels: int = M) -> tuple[np.ndarray, np.ndarray]:
    """n and i of a picture, n of deviations that i stands for and within its reach."""
    random = np.random.default_rng(seed)
    index = random.integers(0, SCALES, (channels, h, w)).astype(np.uint8)
    n = np.rint(random.normal(size=index.shape) * SCALE_MIN * SCALE_STEP ** index.astype(float))
    return n.clip(-REACH[index], REACH[index]).astype(np.int64), index


@pytest.fixture(scope="module")
def model():
    return ContextModel(new_network(), gaussian_tables(), REACH)


# Passes ---------------------------------------------------------------------------------------------------------------


def test_groups_by_hand():
    """Of 64 channels the first j groups hold 64 j (j + 3) / 88: 2.9, 7.3, 13.1, 20.4, 29.1, 39.3, 50.9 and 64."""
    busy = np.random.default_rng(0).permutation(64)
    group = grouped(busy)
    assert np.bincount(group, minlength=GROUPS).tolist() == [3, 5, 6, 7, 9, 10, 11, 13]
    assert group[busy == 63] == 0 and group[busy == 61] == 0 and group[busy == 60] == 1 and group[busy == 0] == 7
    assert grouped(np.zeros(3)).tolist() == [0, 4, 6] and grouped(np.zeros(1)).tolist() == [0]


def test_every_symbol_is_in_one_pass_of_its_group_and_colour(model):
    order = np.full((M, 3, 4), -1)
    for number, rows, columns in parts(3, 4):
        channels = model.network.members(number).numpy()
        assert (order[channels[:, None], rows, columns] == -1).all()
        order[channels[:, None], rows, columns] = number
    chess = (np.arange(3)[:, None] + np.arange(4)) % 2
    np.testing.assert_array_equal(order, 2 * model.network.group.numpy()[:, None, None] + chess)


def test_contexts_by_hand():
    n = np.arange(12).reshape(1, 3, 4) + np.array([0, 100]).reshape(2, 1, 1)
    seen = contexts(bordered(n), np.array([1, 0]), np.array([0, 3]))
    assert TAPS == ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
    assert seen[0, :, 0].tolist() == [4, 0, 8, 0, 5] and seen[0, :, 1].tolist() == [104, 100, 108, 0, 105]
    assert seen[1, :, 0].tolist() == [3, 0, 7, 2, 0]


def test_a_pass_knows_earlier_groups_and_its_own_on_the_other_colour():
    network = ContextNetwork(3, 4)
    network.group.copy_(torch.tensor([0, 1, 2]))
    here, beside = slice(0, 1), slice(1, 5)
    for colour in (0, 1):
        known = network.known(2 + colour)  # of group 1
        assert known[:, 0].all() and not known[:, 2].any()
        assert not known[here, 1].any() and known[beside, 1].all() == known[beside, 1].any() == (colour == 1)


@pytest.mark.parametrize("number", [0, 1, 6, 7, 14, 15])
def test_no_table_depends_on_what_is_not_decoded_yet(model, number):
    n, index = symbols(6, 7)
    order = 2 * model.network.group.numpy()[:, None, None] + (np.arange(6)[:, None] + np.arange(7)) % 2
    cost, reached = tables_by_symbol(model, n, index), False
    for at in np.argwhere(order == number)[:8]:
        changed = n.copy()
        changed[tuple(at)] = 1 if n[tuple(at)] == 0 else -n[tuple(at)]
        differs = (tables_by_symbol(model, changed, index) != cost).any(axis=0)
        assert not differs[order <= number].any()
        reached |= differs.any()
    assert reached == (number < order.max())


def tables_by_symbol(model: ContextModel, n: np.ndarray, index: np.ndarray) -> np.ndarray:
    """i' and u of every symbol: (2, M, h, w)."""
    found, grid = np.empty((2, *n.shape), dtype=np.int64), bordered(n)
    for number, rows, columns in parts(*n.shape[1:]):
        channels = model.network.members(number).numpy()
        for one, values in zip(found, model.chosen(grid, index, number, rows, columns), strict=True):
            one[channels[:, None], rows, columns] = values.T
    return found


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step, skew, moved, mean",
    [
        (0.0, 0.0, 20, 0),
        (0.5, 0.0, 22, 0),
        (-0.3, 0.0, 18, 0),
        (0.0, 0.25, 20, 2),
        (0.5, -0.25, 22, -2),
        (9.0, 0, 47, 0),
    ],
)
def test_a_network_of_biases_moves_every_index_alike(step, skew, moved, mean):
    """A step of i' is 4 / 16, a step of u 2 / 16; floors: -0.3 is -5 / 16, and that -1.25 steps. What is coded costs by hand."""
    network = ContextNetwork(M, 8)
    with torch.no_grad():
        network.out.bias[:M], network.out.bias[M:] = step, skew
    model = ContextModel(network, gaussian_tables(), REACH)
    n, index = symbols(5, 4)
    index[:] = 20
    n = n.clip(-8, 8)
    scale, u = tables_by_symbol(model, n, index)
    assert (scale == moved).all() and (u == mean).all()
    if moved == SCALES - 1:
        return  # a Gaussian far wider than the symbols reach
    sigma = SCALE_MIN * SCALE_STEP**moved
    edges = (np.stack([n - 0.5, n + 0.5]) - sigma * mean / 8) / (sigma * math.sqrt(2))
    mass = np.diff(np.vectorize(math.erf)(edges), axis=0)[0] / 2
    likely = mass > 0.01
    np.testing.assert_allclose(model.bits(n, index)[likely], -np.log2(mass[likely]), atol=0.02)


def test_the_network_computes_in_integers(model):
    """In int64, by hand."""
    network, (n, index) = model.network, symbols(4, 6)
    whole = {key: (value * 64).clamp(-127, 127).round().long() for key, value in network.state_dict().items()}
    bias = {key: (value * 16).round().long() * 64 for key, value in network.state_dict().items() if "bias" in key}
    of_pass = (network.of_pass.weight * 16).clamp(-255, 255).round().long()
    grid = bordered(n)
    for number, rows, columns in parts(4, 6):
        context = torch.from_numpy(contexts(grid, rows, columns)).long()
        i = torch.from_numpy(index[:, rows, columns].T).long()
        signed = 16 * (context * network.known(number)).clamp(-3, 3).flatten(1)
        a = torch.cat([signed, signed.abs(), i], dim=1)
        for layer in ("first", "hidden", "out"):
            a = (a @ whole[f"{layer}.weight"][:, :, 0, 0].T + bias[f"{layer}.bias"]) >> 6
            a = a + of_pass[number] if layer == "first" else a
            a = a if layer == "out" else a.clamp(0, 255)
        ours = network.members(number)
        scale, skew = (i + (a[:, :M] >> 2)).clamp(0, 47)[:, ours], (a[:, M:] >> 1).clamp(-8, 8)[:, ours]
        for double in (False, True):
            made = copy.deepcopy(network).double() if double else network
            kind = torch.float64 if double else torch.float32
            got = made(number, context.to(kind), i.to(kind))
            assert torch.equal(got[0].long(), scale) and torch.equal(got[1].long(), skew)
        chosen = model.chosen(grid, index, number, rows, columns)
        np.testing.assert_array_equal(chosen[0], scale)
        np.testing.assert_array_equal(chosen[1], skew)


def test_the_most_channels_that_have_exact_sums():
    """11 x 246 inputs of at most 48, weights of at most 127 and a bias of at most 4095 x 64: 16,757,856 of 16,777,216."""
    assert ContextNetwork(MOST_CHANNELS, 8).first.weight.shape == (8, 2706, 1, 1)
    with pytest.raises(ValueError, match="sums would not be exact"):
        ContextNetwork(MOST_CHANNELS + 1, 8)


def test_threads_parts_and_autocast_do_not_matter(model, monkeypatch):
    n, index = symbols(9, 13)
    section, before = model.encode(n, index), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.autocast("cpu", torch.bfloat16):
                assert model.encode(n, index) == section
                np.testing.assert_array_equal(model.decode(section, index), n)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(context_model, "_PART", 7)  # another order of the same symbols
    assert len(model.encode(n, index)) == pytest.approx(len(section), abs=1)
    np.testing.assert_array_equal(model.decode(model.encode(n, index), index), n)


# Sections -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, M, 40])
def test_symbols_come_back_at_their_ideal_cost(size, channels):
    model = ContextModel(new_network(channels), gaussian_tables(), REACH)
    n, index = symbols(*size, channels=channels)
    for values in (n, np.zeros_like(n), REACH[index], -REACH[index]):
        section = model.encode(values, index)
        found = model.decode(section, index)
        assert found.dtype == np.int8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, values)
        assert 0 <= len(section) - np.ceil(model.bits(values, index).sum() / 8) <= 1


def test_a_golden_section_pins_the_format():
    network = ContextNetwork(4, 4).requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_((torch.arange(parameter.numel()) * 37 % 101 - 50).view(parameter.shape) / 40)
    network.group.copy_(torch.tensor([3, 0, 7, 0]))
    model = ContextModel(network, gaussian_tables(), REACH)
    index = (np.arange(4 * 15) * 7 % 30).astype(np.uint8).reshape(4, 3, 5)
    n = (np.arange(4 * 15) ** 2 % 7 - 3).reshape(4, 3, 5).clip(-REACH[index], REACH[index])
    assert model.encode(n, index).hex() == GOLDEN
    np.testing.assert_array_equal(model.decode(bytes.fromhex(GOLDEN), index), n)


@quick
@given(garbage=st.binary(max_size=60), at=st.integers(0, 1000), flip=st.integers(1, 255))
def test_other_sections_are_refused_or_are_what_the_encoder_writes(model, garbage, at, flip):
    n, index = symbols(5, 6)
    valid = model.encode(n, index)
    at %= len(valid)
    altered = valid[:at] + bytes([valid[at] ^ flip]) + valid[at + 1 :]
    for section in (garbage, altered, valid[:at], valid + garbage):
        try:
            found = model.decode(section, index)
        except BitstreamError as error:
            assert str(error).startswith("the residual section is no string") and "\n" not in str(error)
        else:
            assert model.encode(found, index) == section


def test_tables_have_the_shape_that_is_stated():
    assert gaussian_tables().shape == TABLES_SHAPE and PASSES == 2 * GROUPS
