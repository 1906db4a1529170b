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


def beside(codec: Codec, contents: Contents) -> Bits:
    """Beside the ledger: the ideal cost of the whole file with the integer tables, and the base at fixed length.

    Ideal is the sum of -log2 p over the symbols; header and checks count as they are.
    """
    file, k = contents.file, contents.k.numpy().ravel()
    fixed = math.prod(file.latent_size) * int(math.log2(codec.params.vq_base.codebook_size))
    bits = 8 * (file.header_bytes + file.check_bytes)
    bits += fixed if file.fixed_length else table_cost_bits(k, codec.base_table)
    if contents.symbols is not None:
        coded = codec.residual.coded(contents.symbols, file.residual.level)
        bits += sum(float(np.sum(symbol_bits(*section))) for section in coded.values())
    return {"estimated_bits": round(float(bits), 1), "fixed_length_base_bits": fixed}
