"""CompressAI's conventions over the codec, for tools that speak them: pictures in [0, 1], batches, dictionaries."""

import numpy as np
import torch
from torch import Tensor, nn

from models.codec import Codec
from models.records import Contents
from utils.images import to_uint8


class CompressAIView(nn.Module):
    """A released codec at one quality, as CompressAI's models are called.

    Args:
        codec: released weights (`load_codec(...).model`). quality: 0 for the base alone, up to 100.
    Raises:
        CheckpointError: the weights have no residual codec and the quality is above 0. ValueError: a quality out of range.
    """

    def __init__(self, codec: Codec, quality: float = 0.0):
        super().__init__()
        self.codec = codec
        self.code = codec.level_code(quality)

    def update(self, force: bool = False) -> bool:
        """False: the integer tables of released weights were built once and are never rebuilt."""
        return False

    @torch.inference_mode()
    def forward(self, x: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        """N x 3 x H x W in [0, 1] -> {"x_hat": the same, "likelihoods": {part: probability of every symbol}}.

        Header and checks count as one symbol of as many bits, so that the likelihoods' bits are those of the file, but
        for the range coder's last bytes.
        """
        contents = [self.codec.read(data) for data in self._files(x)]
        parts = [self._likelihoods(one) for one in contents]
        likelihoods = {name: torch.stack([p[name] for p in parts]).to(x.device) for name in parts[0]}
        return self._pictures(contents) | {"likelihoods": likelihoods}

    @torch.inference_mode()
    def compress(self, x: Tensor) -> dict[str, list[list[bytes]] | tuple[int, int]]:
        """N x 3 x H x W in [0, 1] -> {"strings": [[file of each picture]], "shape": (h, w) of the latent}."""
        files = self._files(x)
        return {"strings": [files], "shape": self.codec.read(files[0]).file.latent_size}

    @torch.inference_mode()
    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Files as `compress` gives them -> {"x_hat": N x 3 x H x W in [0, 1]}. `shape` stands in the files, too.

        Raises:
            BitstreamError, CheckpointError: as the codec's `read`.
        """
        return self._pictures([self.codec.read(data) for data in strings[0]])

    def _files(self, x: Tensor) -> list[bytes]:
        pictures = to_uint8(x.float().cpu() * 2 - 1)
        return [self.codec.write(self.codec.analyse(picture), self.code) for picture in pictures]

    def _pictures(self, contents: list[Contents]) -> dict[str, Tensor]:
        images = torch.stack([self.codec.render(one).image for one in contents])
        return {"x_hat": images.to(self.codec.device).float() / 255}

    def _likelihoods(self, contents: Contents) -> dict[str, Tensor]:
        file, found = contents.file, contents.symbols
        base = 2.0 ** -self.codec.base_bits(file, contents.k)
        likelihoods = {"header": np.array([2.0 ** (-8 * (file.header_bytes + file.check_bytes))]), "base": base}
        if found is not None:
            bits = self.codec.residual.bits(found, file.residual.code)
            likelihoods |= {name: 2.0**-each for name, each in bits.items()}
        return {name: torch.from_numpy(p) for name, p in likelihoods.items()}
