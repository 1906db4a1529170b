"""Signed symbols to strings and back, each with the table of its group."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import entropy_coding
from models.entropy_coding import TOTAL, centred_table, decode_symbols, encode_symbols, symbol_bits
from utils.errors import BitstreamError

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
REACH = 7
GOLDEN_TABLES = np.array([[0, 1000, 64000, 536, 0], [4096, 8192, 40960, 8192, 4096]], dtype=np.int32)
GOLDEN_GROUPS = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1])
GOLDEN_SYMBOLS = np.array([0, 0, -1, 2, 0, 0, -2, 0, 1, 0, 1])
GOLDEN_SECTION = "07a7177f"


def tables_of(groups: int, seed: int = 0) -> np.ndarray:
    """Tables from nearly flat to nearly certain, with reaches from 1 to REACH."""
    random = np.random.default_rng(seed)
    found = []
    for group in range(groups):
        counts = np.zeros(2 * REACH + 1, dtype=np.int64)
        reach = group % REACH + 1
        weights = np.exp(-np.abs(np.arange(-reach, reach + 1)) * random.uniform(0, 6))
        counts[REACH - reach : REACH + reach + 1] = np.maximum(1, 1e6 * weights / weights.sum())
        found.append(centred_table(counts))
    return np.array(found)


def draw(tables: np.ndarray, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Symbols as their tables have them, and their groups."""
    random = np.random.default_rng(seed)
    groups = random.integers(0, len(tables), count)
    edges = np.cumsum(tables, axis=1)
    return (random.integers(0, TOTAL, count)[:, None] >= edges[groups]).sum(axis=1) - tables.shape[1] // 2, groups


def assert_round_trip(symbols: np.ndarray, groups: np.ndarray, tables: np.ndarray) -> bytes:
    section = encode_symbols(symbols, groups, tables)
    decoded = decode_symbols(section, groups, tables, "some")
    assert decoded.dtype.kind == "i"
    np.testing.assert_array_equal(decoded, symbols)
    ideal = symbol_bits(symbols, groups, tables).sum() / 8
    assert ideal <= len(section) + 1e-6 and len(section) <= ideal + 2
    return section


# Tables ---------------------------------------------------------------------------------------------------------------


@quick
@given(counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=31), empty=st.integers(0, 5))
def test_tables_cover_what_was_seen_and_no_more(counts, empty):
    counts = np.array([0] * empty + counts + [0] * 2)
    counts = counts[: counts.size - 1 + counts.size % 2]
    table, centre = centred_table(counts), counts.size // 2
    reach = max([1, *np.abs(np.flatnonzero(counts) - centre)])
    assert table.dtype == np.int32 and table.sum() == TOTAL
    assert (np.flatnonzero(table) == np.arange(centre - reach, centre + reach + 1)).all()


def test_tables_of_known_shares():
    np.testing.assert_array_equal(centred_table(np.array([0, 1, 2, 1, 0])), [0, 16384, 32768, 16384, 0])
    np.testing.assert_array_equal(centred_table(np.array([0, 0, 5, 0, 0])), [0, 1, 65534, 1, 0])
    np.testing.assert_array_equal(centred_table(np.array([0, 0, 5, 0, 5])), [1, 1, 32767, 1, 32766])
    assert centred_table(np.zeros(7, dtype=int)).tolist() == [0, 0, 21846, 21845, 21845, 0, 0]


# Coding ---------------------------------------------------------------------------------------------------------------


@quick
@given(groups=st.integers(1, 12), count=st.integers(1, 3000), seed=st.integers(0, 2**31))
def test_symbols_come_back_at_their_ideal_cost(groups, count, seed):
    tables = tables_of(groups, seed)
    assert_round_trip(*draw(tables, count, seed), tables)


@quick
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_unlikely_symbols_come_back_too(data, seed):
    tables = tables_of(5, seed)
    groups = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=60)))
    reach = (np.count_nonzero(tables, axis=1)[groups] - 1) // 2
    symbols = np.array([data.draw(st.sampled_from([-r, r, 0])) for r in reach.tolist()])
    assert_round_trip(symbols, groups, tables)


def test_golden_section_pins_the_format():
    assert encode_symbols(GOLDEN_SYMBOLS, GOLDEN_GROUPS, GOLDEN_TABLES).hex() == GOLDEN_SECTION
    decoded = decode_symbols(bytes.fromhex(GOLDEN_SECTION), GOLDEN_GROUPS, GOLDEN_TABLES, "some")
    np.testing.assert_array_equal(decoded, GOLDEN_SYMBOLS)


def test_long_runs_are_coded_as_one(monkeypatch):
    """In how many parts a group is looked at does not show."""
    tables = tables_of(3)
    symbols, groups = draw(tables, 5000)
    section = encode_symbols(symbols, groups, tables)
    monkeypatch.setattr(entropy_coding, "_RUN", 7)
    assert assert_round_trip(symbols, groups, tables) == section


@pytest.mark.parametrize("symbol", [-3, 3, REACH + 1, -REACH - 1, 100])
def test_symbols_beyond_their_table_are_refused(symbol):
    with pytest.raises(KeyError):  # reaches 1 and 2
        encode_symbols(np.array([0, symbol, 0]), np.array([0, 1, 0]), tables_of(2))


# Strings that no encoder writes ---------------------------------------------------------------------------------------


@quick
@given(data=st.data(), count=st.integers(1, 300), seed=st.integers(0, 2**31), garbage=st.binary(max_size=60))
def test_other_strings_are_refused_or_are_what_the_encoder_writes(data, count, seed, garbage):
    """Garbage, and a section that is cut, extended or altered: such strings decode at first."""
    tables = tables_of(6, seed)
    symbols, groups = draw(tables, count, seed)
    valid = encode_symbols(symbols, groups, tables)
    at = data.draw(st.integers(0, len(valid) - 1))
    altered = valid[:at] + bytes([valid[at] ^ (1 + seed % 255)]) + valid[at + 1 :]
    for section in (garbage, valid + garbage, altered, *(valid[:size] for size in range(len(valid)))):
        try:
            found = decode_symbols(section, groups, tables, "some")
        except BitstreamError as error:
            assert str(error).startswith("the some section is no string") and "\n" not in str(error)
        else:
            assert encode_symbols(found, groups, tables) == section
            assert (np.abs(found) <= (np.count_nonzero(tables, axis=1)[groups] - 1) // 2).all()


def test_a_section_that_is_cut_or_extended_is_refused():
    golden = bytes.fromhex(GOLDEN_SECTION)
    for section in (*(golden[:size] for size in range(4)), golden + b"\0", golden + b"\xff"):
        with pytest.raises(BitstreamError, match="the some section is no string"):
            decode_symbols(section, GOLDEN_GROUPS, GOLDEN_TABLES, "some")


def test_some_altered_strings_are_accepted():
    """The property above must not hold for want of them."""
    tables = tables_of(2)
    _, groups = draw(tables, 4)
    accepted = 0
    for byte in range(256):
        try:
            accepted += decode_symbols(bytes([byte]), groups, tables, "some").size == 4
        except BitstreamError:
            continue
    assert accepted > 0


@pytest.mark.parametrize("group", [0, 1], ids=["a flat table", "an almost certain symbol"])
def test_a_claim_of_millions_is_refused_soon(group):
    """In a moment, and with little memory beside the symbols themselves, even where a symbol costs next to nothing."""
    tables = np.array([centred_table(np.ones(63, dtype=int)), centred_table(np.eye(1, 63, 31, dtype=int)[0])])
    groups = np.full(10_000_000, group, dtype=np.uint8)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(BitstreamError):
        decode_symbols(bytes(range(1, 50)), groups, tables, "some")
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 2 * groups.size + 30e6
