"""Integers and integer tables to strings and back: the lossless part of the codec, with no network inside.

A table holds K integer frequencies, each at least 1, that sum to 2^16; a symbol s costs 16 - log2 table[s] bits. Tables
that are made for one symbol alone (`own_tables`) sum to 2^24, the coder's own unit.

The coder is the range coder of `constriction` (Rust), preferred to `compressai.ans` because it measured faster (24,576
indices of K = 8192: encoded in 0.24 ms for 2.50, decoded in 1.37 ms for 56.4) and safer: that one crashes on 0 or 1
symbols, reads past the end of short strings and returns symbols outside the table from garbage, where `constriction`
reads zeros, stays in the alphabet and raises ordinary exceptions. It ends strings on whole 4-byte words; they are ended
here instead, within a byte of the ideal cost rounded up. Its integers are exactly those of the table (`_coder_model`).
"""

import constriction
import numpy as np

from utils.errors import BitstreamError

PRECISION = 16
TOTAL = 1 << PRECISION

# constriction counts probabilities in units of 2^-24: one unit of a table is 2^8 of them.
_CODER_PRECISION = 24
_STATE_BITS, _WORD_BYTES = 64, 4
_OWN = constriction.stream.model.Categorical(perfect=False)  # symbols that each bring a table
_RUN = 1 << 20  # symbols looked at together: beside them, coding needs 5 bytes a symbol, 4 for their order


def frequency_table(counts: np.ndarray) -> np.ndarray:
    """Turn observed counts into the table that codes them at (nearly) the lowest cost.

    Symbols whose share would be below 1 get exactly 1; the others divide what is left in proportion to their counts,
    rounded by largest remainder, ties to the lower symbol. Integer arithmetic only: the same table everywhere.

    Args:
        counts: (K,) non-negative integers, K up to 2^16, sum below 2^47. All zero: a uniform table.
    Returns:
        (K,) int32, every entry >= 1, sum exactly 2^16.
    """
    counts = counts.astype(np.int64) if counts.any() else np.ones(counts.size, dtype=np.int64)
    sharing = np.ones(counts.size, dtype=bool)
    while True:
        budget, total = TOTAL - np.count_nonzero(~sharing), counts[sharing].sum()
        rare = sharing & (counts * budget < total)
        if not rare.any():
            break
        sharing &= ~rare
    share, remainder = np.divmod(counts[sharing] * budget, total)
    share[np.argsort(-remainder, kind="stable")[: budget - share.sum()]] += 1
    table = np.ones(counts.size, dtype=np.int32)
    table[sharing] = share
    return table


def index_bits(indices: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Ideal cost of each of `indices` (any shape, integers in [0, K)) with `table` (K,), in bits: -log2 p."""
    return PRECISION - np.log2(table[indices])


def table_cost_bits(indices: np.ndarray, table: np.ndarray) -> float:
    """Ideal cost of all of `indices` with `table`, in bits: arguments as `index_bits`."""
    return float(index_bits(indices, table).sum())


def fixed_length_bytes(count: int, codebook_size: int) -> int:
    """Bytes of `count` indices at log2 K bits each, K = `codebook_size`: the most that a section ever takes."""
    return (count * _index_bits(codebook_size) + 7) // 8


def encode_indices(indices: np.ndarray, codebook_size: int, table: np.ndarray | None) -> tuple[bytes, bool]:
    """Code indices into one section, range-coded or, whenever that is not shorter, at fixed length.

    Args:
        indices: (count,) integers in [0, codebook_size), count >= 1.
        codebook_size: K, a power of two from 2 to 8192.
        table: (K,) as from `frequency_table`, or None where none was learnt: fixed length then.
    Returns:
        The section and whether it is at fixed length. The decoder needs both, and the count.
    """
    if table is not None:
        section = encode_symbols(indices - codebook_size // 2, np.zeros(len(indices), np.uint8), table[None])
        if len(section) < fixed_length_bytes(len(indices), codebook_size):
            return section, False
    return _pack_bits(indices, codebook_size), True


def decode_indices(
    section: bytes, count: int, codebook_size: int, table: np.ndarray | None, fixed_length: bool
) -> np.ndarray:
    """Inverse of `encode_indices`. Of all strings, exactly those that the encoder can write are accepted.

    Args:
        section, fixed_length: as returned by `encode_indices`; any bytes are safe.
        count: number of indices, >= 1.
        codebook_size, table: as given to `encode_indices`.
    Returns:
        (count,) int64, in [0, codebook_size).
    Raises:
        BitstreamError: a section that no encoder writes with this count and table.
    """
    limit = fixed_length_bytes(count, codebook_size)
    if fixed_length:
        if len(section) != limit:
            raise BitstreamError(
                f"the base section has {len(section)} bytes where {count} indices of {_index_bits(codebook_size)} bits "
                f"take {limit}: the file is damaged, or belongs to other weights"
            )
        return _unpack_bits(section, count, codebook_size)
    if table is None:
        raise BitstreamError("the base section needs a frequency table and these weights have none: use others")
    require_shorter(section, count, codebook_size)
    return decode_symbols(section, np.zeros(count, np.uint8), table[None], "base").astype(np.int64) + codebook_size // 2


def require_shorter(section: bytes, count: int, codebook_size: int) -> None:
    """Raise BitstreamError for a range-coded base that is no shorter than `count` indices at fixed length."""
    if len(section) >= (limit := fixed_length_bytes(count, codebook_size)):
        raise BitstreamError(
            f"the coded base section has {len(section)} bytes, not fewer than the {limit} of fixed length: "
            "the file is damaged, or belongs to other weights"
        )


def centred_table(counts: np.ndarray) -> np.ndarray:
    """The table of signed symbols from their counts: int32 as `counts`, 0 beyond the largest symbol seen.

    Args:
        counts: (2R + 1,) non-negative integers, of the symbols -R to R.
    Returns:
        entries of -r to r sum to 2^16, each at least 1, r >= 1 the largest |symbol| that was seen.
    """
    distance = np.abs(np.arange(counts.size) - counts.size // 2)
    within = distance <= max(1, distance[counts > 0].max(initial=0))
    table = np.zeros(counts.size, dtype=np.int32)
    table[within] = frequency_table(counts[within])
    return table


def symbol_bits(symbols: np.ndarray, groups: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Ideal cost of every symbol in bits: arguments as `encode_symbols`; float64 as `symbols`."""
    return PRECISION - np.log2(tables[groups, symbols + tables.shape[1] // 2])


def encode_symbols(symbols: np.ndarray, groups: np.ndarray, tables: np.ndarray) -> bytes:
    """Range-code signed symbols, each with the table of its group.

    They are coded group after group, in their order within each: the coder is fast on runs of one table.

    Args:
        symbols: (count,) integers, count >= 1, within the reach of their tables. groups: (count,) in [0, G).
        tables: (G, 2R + 1) int32 as from `centred_table`, or one of an even number of entries, -R to R - 1.
    """
    encoder, sortings = constriction.stream.queue.RangeEncoder(), _by_group(groups, len(tables))
    ordered = [symbols[start : start + _RUN][order] for start, order, _ in sortings]
    for number, members, model, reach in _runs(sortings, tables):
        encoder.encode(ordered[number][members].astype(np.int32) + reach, model)
    return _close(encoder)


def decode_symbols(section: bytes, groups: np.ndarray, tables: np.ndarray, what: str) -> np.ndarray:
    """Inverse of `encode_symbols`: (count,) int8, int16 for wide tables. Accepts exactly what the encoder writes.

    Memory beside the result is 5 or 6 bytes a symbol and a little, and a string that cannot last is given up early.

    Args:
        section: any bytes are safe. groups, tables: as given to the encoder. what: the section's name in errors.
    Raises:
        BitstreamError: a section that no encoder writes with these groups and tables.
    """
    sortings = _by_group(groups, len(tables))
    if _least_bits(sortings, tables) > 8 * len(section) + 1:
        raise _damaged(what)
    decoder = SectionDecoder(section, what)
    symbols = np.empty(len(groups), dtype=np.int8 if tables.shape[1] < 128 else np.int16)
    ordered = [np.empty_like(symbols, shape=len(order)) for _, order, _ in sortings]
    for number, members, model, reach in _runs(sortings, tables):
        ordered[number][members] = decoder.take(members.stop - members.start, model) - reach
    decoder.close()
    for (start, order, _), values in zip(sortings, ordered, strict=True):
        symbols[start : start + _RUN][order] = values
    return symbols


def own_tables(weights: np.ndarray) -> np.ndarray:
    """Frequencies in proportion to weights, row by row, each less the one unit that the coder adds to every symbol.

    Integer arithmetic in float64: products stay below 2^53, so that the floor of a rounded quotient is the quotient's.

    Args:
        weights: (M, K) float64 that holds integers, 1 to 2^28 each; the result takes their place.
    Returns:
        (M, K) float64 that holds integers from 0; rows sum to 2^24 - K. Code 0 is given what the floors leave.
    """
    total = float((1 << _CODER_PRECISION) - weights.shape[1])
    masses = np.ascontiguousarray(weights)  # constriction reads other layouts as if they were this one
    sums = masses.sum(axis=1, keepdims=True)
    masses *= total
    masses /= sums
    np.floor(masses, out=masses)
    masses[:, 0] += total - masses.sum(axis=1)
    return masses


def own_bits(symbols: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Ideal cost of every symbol in bits with its row of `own_tables`: (M,) integers, (M, K) -> float64 (M,)."""
    return _CODER_PRECISION - np.log2(1 + masses[np.arange(len(symbols)), symbols])


class SectionEncoder:
    """Range-codes symbols that each have a table of their own, part after part."""

    def __init__(self):
        self._encoder = constriction.stream.queue.RangeEncoder()

    def add(self, symbols: np.ndarray, masses: np.ndarray) -> None:
        """Code (M,) integers in [0, K) with their rows of `own_tables`, (M, K)."""
        self._encoder.encode(symbols.astype(np.int32), _OWN, masses)

    def close(self) -> bytes:
        return _close(self._encoder)


class SectionDecoder:
    """A section while it is decoded part after part, and encoded again: exactly what an encoder writes is accepted.

    Every method raises BitstreamError for other strings, `take` as soon as the string cannot last.
    """

    def __init__(self, section: bytes, what: str):
        words = np.frombuffer(section.ljust(-(-len(section) // _WORD_BYTES) * _WORD_BYTES, b"\0"), dtype=">u4")
        self._decoder = constriction.stream.queue.RangeDecoder(words.astype(np.uint32))
        self._again = constriction.stream.queue.RangeEncoder()
        self._section, self._what = section, what

    def take(self, count: int, model: constriction.stream.model.Categorical) -> np.ndarray:
        """`count` symbols of one table: int32, in [0, K)."""
        return self._checked((model, count), (model,))

    def take_own(self, masses: np.ndarray) -> np.ndarray:
        """As many symbols as `masses`, (M, K), of `own_tables`, has rows: int32, in [0, K)."""
        return self._checked((_OWN, masses), (_OWN, masses))

    def _checked(self, how: tuple, again: tuple) -> np.ndarray:
        try:
            values = self._decoder.decode(*how)
        except AssertionError as error:  # constriction's exception for a string outside the coder's interval
            raise _damaged(self._what) from error
        self._again.encode(values, *again)
        if self._again.pos()[0] * _WORD_BYTES > len(self._section):  # words that no later symbol takes back
            raise _damaged(self._what)
        return values

    def close(self) -> None:
        if _close(self._again) != self._section:
            raise _damaged(self._what)


def _damaged(what: str) -> BitstreamError:
    return BitstreamError(
        f"the {what} section is no string that an encoder writes: the file is damaged, or belongs to other weights"
    )


_Sorting = tuple[int, np.ndarray, np.ndarray]


def _by_group(groups: np.ndarray, count: int) -> list[_Sorting]:
    """For every _RUN symbols their start, the order, uint32, that sorts them by group, and where groups begin and end in it."""
    sortings = []
    for start in range(0, len(groups), _RUN):
        part = groups[start : start + _RUN]
        ends = np.concatenate([[0], np.bincount(part, minlength=count).cumsum()])
        sortings.append((start, np.argsort(part, kind="stable").astype(np.uint32), ends))
    return sortings


def _runs(sortings: list[_Sorting], tables: np.ndarray):
    """(sorting's number, places in its order, coder's model, reach) of every group that occurs, in the order of the groups."""
    for group, table in enumerate(tables):
        table = table[table > 0]
        model = None
        for number, (_, _, ends) in enumerate(sortings):
            if ends[group] < ends[group + 1]:
                model = model or _coder_model(table)
                yield number, slice(int(ends[group]), int(ends[group + 1])), model, len(table) // 2


def _least_bits(sortings: list[_Sorting], tables: np.ndarray) -> float:
    """Cost of the most likely symbol everywhere."""
    counts = sum(np.diff(ends) for _, _, ends in sortings)
    return float(np.dot(counts, PRECISION - np.log2(tables.max(axis=1))))


def _index_bits(codebook_size: int) -> int:
    """log2 K, K a power of two."""
    return codebook_size.bit_length() - 1


def _pack_bits(indices: np.ndarray, codebook_size: int) -> bytes:
    """Most significant bit first, zero bits up to a whole byte."""
    shifts = np.arange(_index_bits(codebook_size) - 1, -1, -1)
    return np.packbits((indices.astype(np.int64)[:, None] >> shifts & 1).astype(np.uint8)).tobytes()


def _unpack_bits(section: bytes, count: int, codebook_size: int) -> np.ndarray:
    width = _index_bits(codebook_size)
    bits = np.unpackbits(np.frombuffer(section, dtype=np.uint8))
    if bits[count * width :].any():
        raise BitstreamError("the padding bits of the base section are not zero: the file is damaged")
    return bits[: count * width].reshape(count, width).astype(np.int64) @ (1 << np.arange(width - 1, -1, -1))


def _coder_model(table: np.ndarray) -> constriction.stream.model.Categorical:
    """The coder's model with cumulative frequencies of exactly 2^8 times those of the table.

    `perfect=False` puts the left edge of symbol s at floor(c_s · scale) + s, where c_s sums the masses before s and
    scale = (2^24 - K) / (sum of all masses). Masses 2^8 f - 1 make scale = 1 and every sum an integer below 2^24,
    so nothing is ever rounded, in float32 or float64. Probabilities f / 2^16 would be rescaled and rounded.
    """
    masses = table.astype(np.float64) * (1 << _CODER_PRECISION - PRECISION) - 1
    return constriction.stream.model.Categorical(masses, lazy=False, perfect=False)


def _close(encoder: constriction.stream.queue.RangeEncoder) -> bytes:
    """End the string with as few bytes as always suffice: about the ideal cost, rounded up to whole bytes.

    Every number in [low, low + width) decodes to the symbols, read as a string with zeros after it. The library ends
    on the lowest multiple of 2^32 in there. The lowest multiple of 256^dropped <= width is in there as well, and is
    stored without its zeros.
    """
    words, (_, width) = encoder.pos()
    end = words * _WORD_BYTES + _STATE_BITS // 8
    sealed = int.from_bytes(encoder.get_compressed().astype(">u4").tobytes().ljust(end, b"\0"), "big")
    dropped = (width.bit_length() - 1) // 8
    return (-(-sealed >> 8 * dropped)).to_bytes(end - dropped, "big")
