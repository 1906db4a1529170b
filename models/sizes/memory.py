"""How much memory coding takes: an estimate from the sizes of networks and picture."""

import math
from typing import Literal

from models.bitstream import CELL
from models.light import FINE, LightParams
from models.records import CodecParams
from models.sizes.tiles import Tiles
from models.texture import FILTERS

# Floats that are alive at the widest moment, measured on a CPU in float32.
MAPS, COPIES = 6, 20  # per pixel that E or D works on: maps of the outermost resolution, and others
LIGHT_COPIES = 10  # the light decoder's others
TEXTURE = 4 * FILTERS  # per pixel, of the texture network
GRAIN = 5.5  # per pixel of the whole picture, while its noise is drawn; 1 of them stays
DENOISER = 27  # per latent position that U works on, times its width
RESIDUAL = 12  # per latent position, times the width of the residual's networks
TILED = 1.6  # times as much as for one tile: the pass over the crops leaves memory that does not fit the tiles
READING = 10  # bytes per pixel while a picture is read or written, of which 3 stay


Way = Literal["encode", "decode"]


def peak(
    params: CodecParams,
    weights: int,
    tiles: Tiles,
    pixels: int,
    light: LightParams | None = None,
    way: Way | None = None,
) -> int:
    """Bytes that coding or decoding a picture takes, beside Python and its libraries, to about 25 %.

    Args:
        weights: bytes of all parameters. tiles: of what is coded. pixels: of the picture, which may be larger.
        light: of the decoder that stands in D's place. way: None for the one that takes more.
    """
    ae = params.autoencoder
    each = dict.fromkeys(("encode", "decode"), MAPS * ae.ch / ae.patch**2 + COPIES)
    if light:
        each["decode"] = MAPS * light.ch[-1] / FINE**2 + LIGHT_COPIES
    if params.texture:
        each["decode"] = max(each["decode"], TEXTURE)
    most = each[way] if way else max(each.values())
    grain = CELL**2 * math.prod(tiles.size) if params.texture and way != "encode" else 0
    networks = [
        CELL**2 * tiles.most * most * (1 if tiles.small else TILED) + grain,
        GRAIN * grain,
        tiles.latent.most * DENOISER * params.unet.model_channels,
        math.prod(tiles.size) * RESIDUAL * (params.residual.width if params.residual else 0),
    ]
    return round(weights + max(3 * pixels + 4 * max(networks), READING * pixels))
