"""The index model alone: what a pass knows, exact tables, sections that come back and others that are refused."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import index_model
from models.entropy_coding import own_tables
from models.index_model import (
    CONTEXT,
    OFFSETS,
    PASSES,
    IndexModel,
    IndexNetwork,
    below_best,
    bordered,
    contexts,
    parts,
    positions,
    shares,
)
from tests.residual import K
from utils.errors import BitstreamError

SIZES = [(1, 1), (1, 7), (6, 1), (2, 2), (3, 5), (9, 13), (32, 48)]
GOLDEN = "0000000000a182deab7a046d107e23a89e223fa60800849ab57e042ee7e4fd9bdf17"
quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def new_model(codes: int = K, seed: int = 0, wide: int = 8, middle: bool = False) -> IndexModel:
    """Random weights, tables that are far from flat."""
    torch.manual_seed(seed)
    network = IndexNetwork(codes, channels=3, wide=wide, narrow=8, middle=middle)
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
    network = IndexNetwork(4, channels=1, wide=1, narrow=1)
    torch.nn.init.zeros_(network.out.weight)
    with torch.no_grad():
        network.out.bias.copy_(torch.tensor([5.0, 4, 3, 3]))
    bits = IndexModel(network).bits(np.array([[0, 1, 2, 3, 0, 0]]))
    np.testing.assert_allclose(bits, [[1, 2, 3, 3, 1, 1]], atol=1e-5)


def test_shares_are_powers_of_two_and_no_code_is_without_one():
    scores = torch.tensor([[7.0, 7 - 16, 7 - 8, -1000]])
    assert shares(below_best(scores)).tolist() == [[2**20, 2**19, np.floor(2**19.5), 1]]


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


@pytest.mark.parametrize(("wide", "middle"), [(8, False), (11, True)])
def test_the_network_computes_in_integers(wide, middle):
    """In int64, by hand."""
    model = new_model(wide=wide, middle=middle)
    network, context = model.network, torch.randint(0, K + 1, (40, CONTEXT), generator=torch.manual_seed(0))
    whole = {key: (value * 64).clamp(-127, 127).round().long() for key, value in network.state_dict().items()}
    bias = {key: (value * 16).round().long() * 64 for key, value in network.state_dict().items() if "bias" in key}
    rows = (network.embedding.weight * 16).clamp(-255, 255).round().long()
    for number in range(PASSES):
        a = rows[context].flatten(1)
        for layer in (f"first.{number}", *["middle"] * middle, "hidden", "out"):
            a = (a @ whole[f"{layer}.weight"][:, :, 0, 0].T + bias[f"{layer}.bias"]) >> 6
            a = a if layer == "out" else a.clamp(0, 255)
        assert torch.equal(network(number, context).long(), a) and torch.equal(model.scores(number, context).long(), a)
        assert torch.equal(copy.deepcopy(network).double()(number, context).long(), a)


def test_integers_are_what_a_network_computes_with():
    """Weights in 1/64 up to 127, biases in 1/16 up to 4095, the embedding in 1/16 up to 255."""
    network = IndexNetwork(4, channels=1, wide=1, narrow=1).requires_grad_(False)
    network.hidden.weight.fill_(0.25)
    network.out.weight[:] = torch.tensor([3.0, -3.0, 0.012, 0.1])[:, None, None, None]
    network.out.bias[:] = torch.tensor([300.0, -0.0625, 0.03, 0.04])
    network.embedding.weight[:] = torch.tensor([[20.0], [-20.0], [0.5], [0.0], [1.0]])
    integers = network.integers()
    assert integers["out.weight"].flatten().tolist() == [127, -127, 1, 6] and integers["hidden.weight"].item() == 16
    assert integers["out.bias"].tolist() == [4095, -1, 0, 1]
    assert integers["embedding.weight"].flatten().tolist() == [255, -255, 8, 0, 16]
    other = IndexNetwork(4, channels=1, wide=1, narrow=1)
    other.load_state_dict(other.natural(integers))
    context = torch.randint(5, (20, CONTEXT), generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(1, context), network(1, context))


def test_codes_that_are_near_start_with_like_embeddings_and_scores():
    """By hand: four codes, whose vectors have unit deviation after their first layer and a fifth of it before the scores."""
    network = IndexNetwork(4, channels=3, wide=5, narrow=5).requires_grad_(False)
    book = torch.tensor(
        [[2.0, 10.0], [-2.0, 10.0], [2.0, -10.0], [-2.0, -10.0]]
    )  # deviations of 4 / sqrt(3), 20 / sqrt(3)
    own = network.out.weight.clone()
    network.start_alike(book)
    half = 3**0.5 / 2
    vectors = torch.tensor([[half, half], [-half, half], [half, -half], [-half, -half]])
    torch.testing.assert_close(network.embedding.weight[:4, :2], vectors)
    assert not network.embedding.weight[4].any()
    out = network.out.weight[:, :, 0, 0]
    torch.testing.assert_close(out[:, :4], 0.2 * torch.cat([vectors, -vectors], dim=1))
    torch.testing.assert_close(out[:, 4:], 0.3 * own[:, 4:, 0, 0])


def test_a_code_book_of_more_dimensions_starts_with_its_principal_components():
    """Points on a line in four dimensions, and a little beside it: one component has their order."""
    network = IndexNetwork(5, channels=1, wide=2, narrow=2)
    along, beside = torch.tensor([-2.0, -1, 0, 1, 2]), torch.tensor([0.1, -0.1, 0.1, -0.1, 0])
    network.start_alike(
        3 + along[:, None] * torch.tensor([1.0, 2, 3, 4]) + beside[:, None] * torch.tensor([0.0, 0, 4, -3])
    )
    order = network.embedding.weight[:5, 0].detach()
    assert torch.equal(order.argsort(descending=bool(order[0] > 0)), torch.arange(5)) and order.std() == pytest.approx(
        1
    )


@pytest.mark.parametrize("codes, dimensions", [(8, 32), (4, 1), (16, 16)])
def test_code_books_of_any_shape_start_within_the_range_of_integers(codes, dimensions):
    """One dimension says nothing: rounding alone tells its values apart."""
    network = IndexNetwork(codes).requires_grad_(False)
    book = torch.randn(codes, dimensions, generator=torch.Generator().manual_seed(0))
    book[:, -1] = 0.1 if dimensions > 1 else book[:, -1]
    network.start_alike(book)
    assert network.embedding.weight[:codes].abs().max() < 16 and network.out.weight.abs().max() < 2


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
    network = IndexNetwork(8, channels=2, wide=4, narrow=4, middle=False).requires_grad_(False)
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
