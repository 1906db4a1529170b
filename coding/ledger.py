"""Where the bits of a file go, and what they would cost ideally and at fixed length."""

import math

import numpy as np

from models.bitstream import CodedPicture
from models.codec import Codec
from models.entropy_coding import symbol_bits, table_cost_bits
from models.records import Contents

Bits = dict[str, float | int | None]


def ledger(file: CodedPicture) -> Bits:
    """Bits of every part, in the file's order; they add up to 8 x the file's bytes."""
    sections = {f"{name}_bits": 8 * size for name, size in file.section_bytes.items()}
    return {"header_bits": 8 * file.header_bytes} | sections | {"check_bits": 8 * file.check_bytes}


def estimate(codec: Codec, contents: Contents) -> dict[str, float]:
    """Ideal cost of every section with the integer tables, in bits: the sum of -log2 p."""
    file = contents.file
    k = contents.k.numpy().ravel()
    bits = {"base": fixed_length_bits(codec, file) if file.fixed_length else table_cost_bits(k, codec.base_table)}
    if contents.symbols is not None:
        coded = codec.residual.coded(contents.symbols, file.residual.level)
        bits |= {name: float(np.sum(symbol_bits(*section))) for name, section in coded.items()}
    return bits


def fixed_length_bits(codec: Codec, file: CodedPicture) -> int:
    """Bits of the base at log2 K per index."""
    return math.prod(file.latent_size) * int(math.log2(codec.params.vq_base.codebook_size))


def beside(codec: Codec, contents: Contents) -> Bits:
    """Beside the ledger: the estimate of the whole file, and the base at fixed length."""
    file = contents.file
    overhead = 8 * (file.header_bytes + file.check_bytes)
    return {
        "estimated_bits": round(overhead + sum(estimate(codec, contents).values()), 1),
        "fixed_length_base_bits": fixed_length_bits(codec, file),
    }
