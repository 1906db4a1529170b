"""How much memory coding takes: an estimate from the sizes of networks and picture."""

import math

from models.bitstream import CELL
from models.records import CodecParams
from models.sizes.tiles import Tiles

# Floats that are alive at the widest moment, measured on a CPU in float32.
MAPS, COPIES = 6, 20  # per pixel that E or D works on: maps of the outermost resolution, and others
DENOISER = 27  # per latent position that U works on, times its width
RESIDUAL = 12  # per latent position, times the width of the residual's networks
TILED = 1.6  # times as much as for one tile: the pass over the crops leaves memory that does not fit the tiles
READING = 10  # bytes per pixel while a picture is read or written, of which 3 stay


def peak(params: CodecParams, weights: int, tiles: Tiles) -> int:
    """Bytes that coding or decoding a picture takes at most, beside Python and its libraries, to about 25 %.

    Args:
        weights: parameters of all networks. tiles: of the picture.
    """
    ae, pixels = params.autoencoder, tiles.height * tiles.width
    each = MAPS * ae.ch / ae.patch**2 + COPIES
    networks = [
        CELL**2 * tiles.most * each * (1 if tiles.small else TILED),
        tiles.latent.most * DENOISER * params.unet.model_channels,
        math.prod(tiles.size) * RESIDUAL * (params.residual.width if params.residual else 0),
    ]
    return round(4 * weights + max(3 * pixels + 4 * max(networks), READING * pixels))
