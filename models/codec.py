"""Joins the rooms: image -> latent -> base code and residual -> bytes -> one denoising step -> image.

    X --E--> x --VQ-E--> k ------------- coder --> bytes --> decoder ---> k --> z_q --VQ-D--> y
             |                            |                     |                             |
             +--x - y--> n_z, n (levels above 0) ---------------+--> n_z, n --g_s--> r^ --+-- y^ = y + r^
                                                                                          |
                        X^ <--D-- x^ <--U(scaled x~, t, z_q)-- x~ = y^ + kappa sqrt(eta) eps

The decoder's only inputs are the bytes and the weights. The networks, and a training pass through them, are in networks.py.
Axes: N batch, d latent channels, H and W picture rows and columns, h = ceil(H/16) and w = ceil(W/16) latent ones.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from models import bitstream, diffusion, entropy_coding
from models.bitstream import CELL, WHOLE, CodedPicture, CodedResidual, scaled
from models.blocks import finished
from models.index_model import IndexModel
from models.networks import Networks, padded
from models.noise import GRAIN_STEP, drawn, portable_noise
from models.records import ONE_STEP, Analysed, CodecParams, Contents, Decoded, Sampling
from models.residual_hyperprior import LEVEL_CODES, Symbols, beyond_middle
from models.sizes import memory
from models.sizes.tiles import ENCODER_KEYS, EXACT, SIDE, Tiles
from utils.errors import BitstreamError, CheckpointError
from utils.images import resized, to_signed, to_uint8
from utils.limits import MAX_PIXELS, MIN_SIDE
from utils.precision import full_precision

Sections = Sequence[bytes | None]  # of the base in passes, of N pictures; None where it is yet to be made
RATE_WEIGHT = 1 / 16  # of the bits of indices, beside their distance, unless another is asked for


class Codec(Networks):
    """The whole codec: `compress` and `decompress` write and read files; a call is a training pass, as of any `Networks`.

    Attributes:
        max_pixels: files that claim more are refused before anything is allocated.
        tile_side: of the tiles that large pictures are coded in, in pixels, a multiple of 64 (models.sizes.tiles).
        rdo: what a bit may cost when indices of the base are chosen, in shares of the code book's spacing
            (`Codebook.spacing`); 0 takes the nearest codes. Released weights that have an index model start with RATE_WEIGHT.
        base_table: integer frequency table of the base indices, int32 (K,), learnt at release; None before.
        index_model: codes the base indices in passes, fitted at release; None without one.
        fingerprint: 4 bytes that name the weights; None while they are being trained.
    """

    # Noise of latents and of pixels, of which there may be graphs as of the networks.
    drawn = grained = staticmethod(drawn)

    def __init__(self, params: CodecParams):
        super().__init__(params)
        self.max_pixels = MAX_PIXELS
        self.tile_side = SIDE
        self.rdo = 0.0
        self.base_table: np.ndarray | None = None
        self.index_model: IndexModel | None = None
        self.fingerprint: bytes | None = None

    def memory(self, height: int, width: int, way: memory.Way | None = None, scale: int = WHOLE) -> int:
        """Bytes that one way of a picture of this size takes, or the larger of both, about (models.sizes.memory).

        Args:
            scale: as `analyse` has it.
        """
        weights, tiles = (
            sum(p.nbytes for p in self.parameters()),
            self.tiles(scaled(height, scale), scaled(width, scale)),
        )
        return memory.peak(self.params, weights, tiles, height * width, self.light and self.light.params, way)

    def tiles(self, height: int, width: int) -> Tiles:
        """How a picture of this size is coded and decoded."""
        return Tiles(height, width, self.tile_side)

    # Coding ---------------------------------------------------------------------------------------------------------

    def compress(self, image: Tensor, quality: float = 0.0, scale: int = WHOLE) -> bytes:
        """Code a picture: uint8 (3, H, W), sides from 16 -> the bytes of a `.dfo` file.

        Args:
            quality: 0 sends the base alone; above it, up to 100, the residual as well, at a level whose code is 1 to 255.
            scale: as `analyse` has it.
        Raises:
            CheckpointError: the weights have no fingerprint, or no residual codec for a quality above 0.
            ValueError: a side under 16, or a quality outside its range.
        """
        return self.write(self.analyse(image, scale), self.level_code(quality))

    def level_code(self, quality: float) -> int:
        """The byte that stands for a quality: 0 for the base alone, else 1 to 255. Errors as `compress`."""
        if not 0 <= quality <= 100:
            raise ValueError(f"quality {quality}: from 0 (the base alone) to 100")
        if quality > 0 and not self.has_levels:
            raise CheckpointError("these weights code the base alone (quality 0): take a release with a residual codec")
        return 0 if quality == 0 else max(1, round(quality / 100 * LEVEL_CODES))

    @property
    def has_levels(self) -> bool:
        """Whether these weights can send a residual."""
        return self.residual is not None and self.residual.tables is not None

    def analyse(self, image: Tensor, scale: int = WHOLE) -> Analysed:
        """The image encoder, the base code and g_a, run once: uint8 (3, H, W). Errors as `compress`.

        Args:
            scale: sixteenths of both sides that are coded, LEAST_SCALE to WHOLE; the decoder enlarges what it decodes.
        """
        height, width = image.shape[1:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"pictures start at {MIN_SIDE}x{MIN_SIDE} pixels, not {width}x{height}")
        coded = resized(image, scaled(height, scale), scaled(width, scale))
        return self.analysed(height, width, scale, *self.signals(coded[None]))

    @torch.inference_mode()
    @full_precision()
    def signals(self, images: Tensor) -> tuple[Tensor, Tensor, Sections, Tensor, Tensor | None]:
        """The encoder's networks: uint8 N x 3 x H x W, sides from 16 -> x, k, y and s of `Analysed`, and after k its
        sections, of N pictures. Raises CheckpointError as `compress`.
        """
        if self.fingerprint is None:
            raise CheckpointError("these weights have no fingerprint: load them with load_release before coding")
        tiles = self.tiles(*images.shape[2:])
        x = self.encoded(images, tiles)
        k, sections = self.indices(x, tiles)
        y = tiles.latent.run(self.vq_base.reconstruct, self.vq_base.rows(k))
        return x, k, sections, y, self.residual.analysis(x - y, y) if self.has_levels else None

    def encoded(self, images: Tensor, tiles: Tiles) -> Tensor:
        """x = E(X) of uint8 N x 3 x H x W: N x d x h x w."""
        if tiles.small:
            return self.to_latent(to_signed(images).to(self.device))
        e = self.autoencoder
        parts = tiles.run(
            lambda tile: e.encode_fine(padded(to_signed(tile).to(self.device))),
            images,
            exact=e.encoder.fine_norms <= EXACT,
        )
        return tiles.latent.run(e.encode_coarse, parts, keys=ENCODER_KEYS)

    def indices(self, x: Tensor, tiles: Tiles) -> tuple[Tensor, Sections]:
        """k of latents, N x d x h x w -> int64 N x h x w, and their sections: of the nearest codes None each, of codes that are
        chosen to cost little as well, with the weight `rdo` (`IndexModel.choose`), the bytes.
        """
        if not self.rdo:
            return tiles.latent.run(self.vq_base.indices, x), [None] * len(x)
        z, codes = tiles.latent.run(self.vq_base.encode, x), self.vq_base.quantize.embedding.weight
        weight = self.rdo * self._spacing
        k, sections = zip(*(self.index_model.choose(each, codes, weight) for each in z), strict=True)
        return torch.from_numpy(np.stack(k)).to(self.device), sections

    @cached_property
    def _spacing(self) -> float:
        return self.vq_base.quantize.spacing  # of codes that no training moves any more

    def analysed(
        self, height: int, width: int, scale: int, x: Tensor, k: Tensor, sections: Sections, y: Tensor, s: Tensor | None
    ) -> Analysed:
        """The base of one picture, coded, with the `signals` that its files are written from."""
        base = self.coded_base(k[0].cpu().numpy(), sections[0])
        file = CodedPicture(height, width, self.fingerprint, **base, scale=scale)
        return Analysed(file, x, k, y, s)

    def choose_by_rate(self, weight: float | None = None) -> None:
        """Set `rdo`, without a weight to RATE_WEIGHT where there is an index model.

        Raises:
            CheckpointError: a weight above 0, and no index model.
        """
        if weight is None:
            weight = RATE_WEIGHT if self.index_model else 0.0
        if weight and self.index_model is None:
            raise CheckpointError("these weights have no index model (python -m release fits one): leave out --rdo")
        self.rdo = weight

    def coded_base(self, k: np.ndarray, in_passes: bytes | None = None) -> dict[str, bytes | bool]:
        """Indices (h, w) in the shortest of the ways that these weights have: fields of `CodedPicture`.

        Args:
            in_passes: their section by the index model, if it is known already.
        """
        base, fixed = entropy_coding.encode_indices(k.ravel(), self.params.vq_base.codebook_size, self.base_table)
        if self.index_model and in_passes is None:
            in_passes = self.index_model.encode(k)
        if in_passes is not None and len(in_passes) < len(base):
            return {"base": in_passes, "fixed_length": False, "in_passes": True}
        return {"base": base, "fixed_length": fixed, "in_passes": False}

    @torch.inference_mode()
    @full_precision()
    def write(self, analysed: Analysed, code: int) -> bytes:
        """The file of a level's code: 0 for the base alone, else 1 to 255."""
        if code == 0:
            return bitstream.pack(analysed.file)
        symbols = self.residual.symbols(analysed.s, analysed.y, analysed.k, code, self.residual.tables)
        residual = CodedResidual(code, *self.residual.sections(symbols, code))
        return bitstream.pack(replace(analysed.file, residual=residual))

    @torch.inference_mode()
    def read(self, data: bytes, preview: bool = False) -> Contents:
        """Parse a file and decode its integers.

        Args:
            preview: read the base alone, whatever follows it.
        Raises:
            BitstreamError: damaged or foreign file. CheckpointError: it was written with other weights.
        """
        file = bitstream.unpack(data, preview)
        if file.fingerprint != self.fingerprint:
            own = self.fingerprint.hex() if self.fingerprint else "none"
            raise CheckpointError(
                f"the file was written with the weights {file.fingerprint.hex()}, these are {own}: "
                "decode it with the release of that fingerprint"
            )
        self.require_allowed(file.height, file.width)
        k = torch.from_numpy(self._read_base(file))[None]
        return Contents(file, k, self._read_residual(file.residual, k) if file.residual else None)

    def require_allowed(self, height: int, width: int) -> None:
        """Raise BitstreamError for a size above `max_pixels`."""
        if height * width > self.max_pixels:
            raise BitstreamError(
                f"a picture of {width}x{height} pixels is above the limit of {self.max_pixels:,}: "
                "raise max_pixels (--max_pixels) if you trust the file"
            )

    def _read_base(self, file: CodedPicture) -> np.ndarray:
        h, w = file.latent_size
        if not file.in_passes:
            how = self.params.vq_base.codebook_size, self.base_table, file.fixed_length
            return entropy_coding.decode_indices(file.base, h * w, *how).reshape(h, w)
        if self.index_model is None:
            raise BitstreamError("the base is coded in passes and its weights have no index model: the file is damaged")
        entropy_coding.require_shorter(file.base, h * w, self.params.vq_base.codebook_size)
        return self.index_model.decode(file.base, h, w)

    def base_bits(self, file: CodedPicture, k: Tensor) -> np.ndarray:
        """Ideal cost of every index of a file that holds k, 1 x h x w, as it codes them: float64 (1, h, w)."""
        k = k.numpy()
        if file.fixed_length:
            return np.full(k.shape, math.log2(self.params.vq_base.codebook_size))
        return self.index_model.bits(k[0])[None] if file.in_passes else entropy_coding.index_bits(k, self.base_table)

    def _read_residual(self, coded: CodedResidual, k: Tensor) -> Symbols:
        if not self.has_levels:
            raise BitstreamError("the file has a residual and its weights have no residual codec: it is damaged")
        return self.residual.read(coded.hyper, coded.symbols, k, coded.code)

    def decompress(self, data: bytes) -> Tensor:
        """Decode a file with the codec's single step: bytes -> uint8 (3, H, W). Errors as `read`."""
        return self.decode(data).image

    @torch.inference_mode()
    @full_precision()
    def decode(self, data: bytes, sampling: Sampling = ONE_STEP, preview: bool = False) -> Decoded:
        """Decode a file. Errors as `read`."""
        return self.render(self.read(data, preview), sampling)

    def render(self, contents: Contents, sampling: Sampling = ONE_STEP) -> Decoded:
        """x~ = y^ + kappa sqrt(eta) eps, x^ = U(x~ scaled, t(eta), lq), X^ = D(x^) (DiffO, Alg. 1).

        Raises:
            BitstreamError: the picture is not finite.
        """
        return self.render_all([contents], sampling)[0]

    @torch.inference_mode()
    @full_precision()
    def render_all(self, contents: Sequence[Contents], sampling: Sampling = ONE_STEP) -> list[Decoded]:
        """`render` of files whose coded pictures have one size, through the networks at once. Errors as `render`."""
        files = [each.file for each in contents]
        y_hat, z_q = self.known(contents)
        x_hat, etas = self.denoise(y_hat, z_q, files, sampling)
        tiles, maps, texture = self.tiles(*files[0].coded_size), {"x_hat": x_hat}, None
        if self.texture and sampling.texture:
            maps["grain"] = self.grain(x_hat, files, sampling)
            texture = self.texture_shares(files, sampling).to(x_hat)
        if not (tiles.small or self.light):
            maps["coarse"] = tiles.latent.run(self.autoencoder.decode_coarse, x_hat)
            tiles = replace(tiles, margin=math.ceil(self.autoencoder.decoder.fine_reach))

        def to_picture(*parts: Tensor) -> Tensor:
            return self.to_picture(**dict(zip(maps, parts, strict=True)), texture=texture)

        images = tiles.run(to_picture, *maps.values())
        pictures = [resized(image, file.height, file.width) for image, file in zip(images, files, strict=True)]
        return list(map(Decoded, pictures, etas))

    def picture(
        self,
        x_hat: Tensor,
        grain: Tensor | None = None,
        texture: Tensor | None = None,
        coarse: Tensor | None = None,
    ) -> Tensor:
        """X^ = D(x^), or the light decoder's, with texture if there is grain for it, `finished`.

        N x d x h x w, N x 256 x h x w and shares of texture, N x 1 x 1 x 1 -> N x 3 x 16h x 16w, unclamped.

        Args:
            coarse: what D makes of x^ at the latent's resolution, if it is known.
        """
        if coarse is None:
            image = (self.light or self.autoencoder.decode)(x_hat)
        else:
            image = self.autoencoder.decode_fine(coarse, x_hat)
        if grain is not None:
            image = image.lerp(self.texture(image, x_hat, grain), texture)
        return finished(image, self.params.sharpening, self.params.colour_blur)

    def to_picture(self, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        """`picture`, of the same arguments, in 8 bits: uint8, on the CPU. Raises BitstreamError if it is not finite."""
        image = self.picture(*args, **kwargs)
        if not image.isfinite().all():
            raise BitstreamError("the decoded picture is not finite: these weights or this precision cannot decode it")
        return to_uint8(image.float().cpu())

    def known(self, contents: Sequence[Contents]) -> tuple[Tensor, Tensor]:
        """y^ = y + r^, N x d x h x w, and z_q, N x d_q x h x w: what N files of one coded size tell of the latents."""
        file = contents[0].file
        k = torch.cat([each.k for each in contents]).to(self.device)
        z_q = self.vq_base.rows(k)
        y_hat = self.tiles(*file.coded_size).latent.run(self.vq_base.reconstruct, z_q)
        for i, each in enumerate(contents):
            if each.symbols:  # levels differ
                own, code = slice(i, i + 1), each.file.residual.code
                r_hat = self.residual.restore(each.symbols.hyper, each.symbols.residual, k[own], y_hat[own], code)
                y_hat[own] += r_hat
        return y_hat, z_q

    def grain(self, x_hat: Tensor, files: Sequence[CodedPicture], sampling: Sampling) -> Tensor:
        """The noise that texture is made of, N x 256 x h x w: a number for every pixel of N files' pictures."""
        like = x_hat.new_empty(1, CELL**2, *x_hat.shape[2:])
        return torch.cat(
            [next(portable_noise(seed, like, self.grained, GRAIN_STEP)) for seed in _seeds(files, sampling)]
        )

    def texture_shares(self, files: Sequence[CodedPicture], sampling: Sampling) -> Tensor:
        """Shares of texture that N files get, by their levels: N x 1 x 1 x 1."""
        above = [beyond_middle(file.residual.code, self.residual.params) if file.residual else 0.0 for file in files]
        shares = [sampling.texture * (1 - self.params.texture.fade * each) for each in above]
        return torch.tensor(shares).view(-1, 1, 1, 1)

    def denoise(
        self, y_hat: Tensor, z_q: Tensor, files: Sequence[CodedPicture], sampling: Sampling
    ) -> tuple[Tensor, list[float]]:
        """x^ of N files, N x d x h x w, and the noise levels that they were made with."""
        known, lq, centre = self.denoiser_inputs(y_hat, z_q)
        noises = [portable_noise(seed, known, self.drawn) for seed in _seeds(files, sampling)]

        def draw() -> Tensor:
            return torch.cat([next(noise) for noise in noises])

        denoiser = self.denoiser(y_hat, self.tiles(*files[0].coded_size).latent.run)
        if sampling.steps is not None:
            schedule = self.schedule.spaced(sampling.steps)
            x_hat = diffusion.sample(schedule, denoiser, known, lq, draw, sampling.ddim, centre)
            return x_hat, [float(schedule.etas[-1])] * len(files)
        levels = [self.rate.eta(file.section_bpp) if sampling.eta is None else sampling.eta for file in files]
        etas = torch.tensor(levels, dtype=torch.float64, device=self.device)
        x_noisy = diffusion.prior_sample(known, etas, self.schedule.kappa, draw())
        return diffusion.one_step(denoiser, x_noisy, lq, etas, self.params.diffusion, centre), levels


def _seeds(files: Sequence[CodedPicture], sampling: Sampling) -> list[int]:
    return [bitstream.noise_seed(file.base) if sampling.seed is None else sampling.seed for file in files]
