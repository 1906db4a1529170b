"""Where the bits of a file go, and what they would cost ideally and at fixed length."""

import math

from measuring.metrics import bpp
from models.bitstream import WHOLE, CodedPicture
from models.codec import Codec
from models.records import Contents

Facts = dict[str, float | int]


def ledger(file: CodedPicture) -> Facts:
    """Sizes of a file, and the bits of every part in its order, which add up to 8 x the bytes.

    Of a preview, the bytes are those that it was made from: header, base and their checksum.
    """
    bits = {"header_bits": 8 * file.header_bytes}
    bits |= {f"{name}_bits": 8 * size for name, size in file.section_bytes.items()}
    bits |= {"check_bits": 8 * file.check_bytes}
    size = sum(bits.values()) // 8
    facts = {"width": file.width, "height": file.height, "scale": file.scale / WHOLE}
    facts |= {"bytes": size, "bpp": bpp(size, file.height, file.width)}
    return facts | {"code": file.residual.code if file.residual else 0} | bits


def beside(codec: Codec, contents: Contents) -> Facts:
    """Beside the ledger: the ideal cost of the whole file with the integer tables, and the base at fixed length.

    Ideal is the sum of -log2 p over the symbols; header and checks count as they are.
    """
    file = contents.file
    fixed = math.prod(file.latent_size) * int(math.log2(codec.params.vq_base.codebook_size))
    bits = 8 * (file.header_bytes + file.check_bytes)
    bits += codec.base_bits(file, contents.k).sum()
    if contents.symbols is not None:
        bits += sum(each.sum() for each in codec.residual.bits(contents.symbols, file.residual.code).values())
    return {"estimated_bits": round(float(bits), 1), "fixed_length_base_bits": fixed}
