import subprocess
import sys
from pathlib import Path

import constriction
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import entropy_coding
from models.entropy_coding import (
    PRECISION,
    decode_indices,
    encode_indices,
    fixed_length_bytes,
    frequency_table,
    table_cost_bits,
)
from utils.errors import BitstreamError

ROOT = Path(__file__).resolve().parents[1]
SIZES = (2, 64, 256, 512, 8192)
GOLDEN_TABLE = np.array([60000, 5000, 500, 36], dtype=np.int32)
GOLDEN_INDICES = np.array([0] * 12 + [1, 0, 0, 2, 0, 0, 0, 1, 3, 0] + [0] * 10)
GOLDEN_SECTION = "56f0c85c"

quick = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def skewed_table(codebook_size: int, concentration: float = 0.1, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return frequency_table(rng.multinomial(10**6, rng.dirichlet(np.full(codebook_size, concentration))))


def draw(table: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(table.size, count, p=table / table.sum())


def assert_round_trip(indices: np.ndarray, codebook_size: int, table: np.ndarray | None) -> tuple[bytes, bool]:
    section, fixed_length = encode_indices(indices, codebook_size, table)
    decoded = decode_indices(section, len(indices), codebook_size, table, fixed_length)
    assert decoded.dtype == np.int64
    np.testing.assert_array_equal(decoded, indices)
    limit = fixed_length_bytes(len(indices), codebook_size)
    assert len(section) == limit if fixed_length else len(section) < limit
    return section, fixed_length


@pytest.mark.parametrize("codebook_size", SIZES)
@pytest.mark.parametrize("count", [*range(1, 11), 1536])
def test_round_trip_of_every_size(codebook_size, count):
    table = skewed_table(codebook_size)
    uniform = np.random.default_rng(count).integers(0, codebook_size, count)
    for indices in (uniform, draw(table, count), np.zeros(count, int), np.full(count, codebook_size - 1)):
        assert_round_trip(indices, codebook_size, table)
        assert assert_round_trip(indices, codebook_size, None)[1]


@pytest.mark.parametrize("codebook_size", SIZES)
def test_one_repeated_symbol_under_extreme_tables(codebook_size):
    likely_first = frequency_table(np.eye(1, codebook_size, 0, dtype=int)[0])
    likely_last = likely_first[::-1].copy()
    for table in (likely_first, likely_last):
        for symbol in (0, codebook_size - 1):
            _, fixed_length = assert_round_trip(np.full(5000, symbol), codebook_size, table)
            assert fixed_length == (table[symbol] == 1)


@pytest.mark.parametrize("codebook_size", SIZES[1:])
@pytest.mark.parametrize("count", [100, 1536, 24576])
def test_coded_length_is_the_ideal_cost_within_a_byte(codebook_size, count):
    table = skewed_table(codebook_size)
    indices = draw(table, count)
    section, fixed_length = encode_indices(indices, codebook_size, table)
    assert not fixed_length
    assert 0 <= len(section) - np.ceil(table_cost_bits(indices, table) / 8) <= 1


def test_fixed_length_by_hand():
    """Where coding saves nothing; most significant bit first, with zero padding."""
    uniform = frequency_table(np.zeros(256, int))
    assert encode_indices(np.arange(256), 256, uniform) == (bytes(range(256)), True)
    packed = bytes([0b00000111, 0b11101111, 0b11000000])
    assert encode_indices(np.array([1, 62, 63]), 64, None) == (packed, True)


def test_golden_section_pins_the_format():
    section, fixed_length = encode_indices(GOLDEN_INDICES, 4, GOLDEN_TABLE)
    assert not fixed_length
    assert section.hex() == GOLDEN_SECTION
    decoded = decode_indices(bytes.fromhex(GOLDEN_SECTION), len(GOLDEN_INDICES), 4, GOLDEN_TABLE, False)
    np.testing.assert_array_equal(decoded, GOLDEN_INDICES)


@pytest.mark.parametrize("codebook_size", [2, 256, 8192])
def test_coder_uses_exactly_the_integer_table(codebook_size):
    """The encoder's state after one symbol shows the interval that the library gave to it."""
    table = skewed_table(codebook_size, 0.3)
    model = entropy_coding._coder_model(table)
    unit = (2**64 - 1 >> 24) << 8
    starts = np.cumsum(table) - table
    for symbol in range(0, codebook_size, max(1, codebook_size // 512)):
        encoder = constriction.stream.queue.RangeEncoder()
        encoder.encode(symbol, model)
        _, (low, width) = encoder.pos()
        expected_low, expected_width = unit * int(starts[symbol]), unit * int(table[symbol])
        if expected_width < 1 << 32:
            expected_low, expected_width = (expected_low << 32) % 2**64, expected_width << 32
        assert (low, width) == (expected_low, expected_width)


def test_refusals_of_a_fixed_length_section():
    indices = np.arange(11) % 64
    section, _ = encode_indices(indices, 64, None)
    for wrong in (b"", section[:-1], section + b"\0"):
        with pytest.raises(BitstreamError, match="where 11 indices of 6 bits take 9"):
            decode_indices(wrong, 11, 64, None, True)
    for bit in range(6):
        padded = section[:-1] + bytes([section[-1] | 1 << bit])
        with pytest.raises(BitstreamError, match="padding"):
            decode_indices(padded, 11, 64, None, True)
    with pytest.raises(BitstreamError, match="table"):
        decode_indices(section[:-1], 11, 64, None, False)


def test_refusals_of_a_coded_section():
    table = skewed_table(256)
    indices = draw(table, 300)
    section, _ = encode_indices(indices, 256, table)
    for extra in (b"\0", b"\x80", b"\0\0\0\0", b"\xff" * 8):
        with pytest.raises(BitstreamError, match="no string that an encoder writes"):
            decode_indices(section + extra, 300, 256, table, False)
    for size in range(len(section)):
        with pytest.raises(BitstreamError):
            decode_indices(section[:size], 300, 256, table, False)
    with pytest.raises(BitstreamError, match="not fewer than the 300"):
        decode_indices(bytes(300), 300, 256, table, False)
    with pytest.raises(BitstreamError, match="no string that an encoder writes"):
        decode_indices(b"\xff" * 299, 300, 256, table, False)


@quick
@given(data=st.data(), bits=st.integers(1, 13), concentration=st.sampled_from([0.02, 0.5, 5.0]))
def test_any_indices_round_trip(data, bits, concentration):
    table = skewed_table(1 << bits, concentration, seed=bits)
    indices = np.array(data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=200)))
    assert_round_trip(indices, 1 << bits, table)


@quick
@given(section=st.binary(max_size=80), count=st.integers(1, 80), bits=st.sampled_from([1, 6, 13]), fixed=st.booleans())
def test_garbage_decodes_to_valid_indices_or_is_refused(section, count, bits, fixed):
    table = skewed_table(1 << bits)
    try:
        decoded = decode_indices(section, count, 1 << bits, table, fixed)
    except BitstreamError as error:
        assert "\n" not in str(error)
        return
    assert decoded.shape == (count,) and decoded.min() >= 0 and decoded.max() < 1 << bits
    # What is accepted is what the encoder writes, unless it would have chosen the other form.
    section_again, fixed_again = encode_indices(decoded, 1 << bits, None if fixed else table)
    assert (section_again, fixed_again) == (section, fixed)


def test_accepted_garbage_exists():
    """The property above must not hold for want of accepted strings."""
    table = frequency_table(np.array([3, 1]))
    accepted = 0
    for byte in range(256):
        try:
            accepted += decode_indices(bytes([byte]), 10, 2, table, False).size == 10
        except BitstreamError:
            continue
    assert accepted > 0


@quick
@given(bits=st.integers(1, 13), total=st.integers(0, 2**46), seed=st.integers(0, 2**32 - 1))
def test_table_is_valid_deterministic_and_monotone(bits, total, seed):
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(total, rng.dirichlet(np.full(1 << bits, 10.0 ** rng.uniform(-2, 2))))
    table = frequency_table(counts)
    assert table.dtype == np.int32 and table.shape == counts.shape
    assert table.min() >= 1 and table.sum() == 1 << PRECISION
    np.testing.assert_array_equal(table, frequency_table(counts.astype(np.uint64)))
    order = np.argsort(counts, kind="stable")
    frequencies, ascending = table[order], np.diff(counts[order]) > 0
    assert (np.diff(frequencies)[ascending] >= 0).all()


def test_tables_by_hand():
    """Exact shares, no counts, one symbol, equal counts; what ties leave goes to the lower symbols."""
    for counts, expected in [
        (np.array([1, 2, 4, 9]) * 4096, np.array([1, 2, 4, 9]) * 4096),
        (np.zeros(256, int), np.full(256, 256)),
        (np.array([0, 0, 5, 0]), [1, 1, 65533, 1]),
        (np.array([1, 1, 1, 0]), [21845, 21845, 21845, 1]),
        (np.array([5] * 8191 + [0]), [9] * 7 + [8] * 8184 + [1]),
    ]:
        np.testing.assert_array_equal(frequency_table(counts), expected)


def test_table_cost():
    table = np.array([32768, 16384, 8192, 8192])
    assert table_cost_bits(np.array([0, 0, 1, 3]), table) == 1 + 1 + 2 + 3


def test_import_loads_no_network_library():
    code = "import sys, models.entropy_coding; print({'torch', 'compressai', 'pyiqa'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
