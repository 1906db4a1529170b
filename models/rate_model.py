"""The densities that training prices symbols with; released weights have integer tables in their place.

CompressAI's modules draw their own quantisation noise. Here the noise belongs to the sample (it is a function of its
position in the stream), so they are given inputs that have it already.
"""

from torch import Tensor, nn

from utils.imports import absent, quiet

with (
    quiet(),
    absent("transformers"),
):  # CompressAI takes it along by way of torch_geometric, which does without it as well
    from compressai.entropy_models import EntropyBottleneck, GaussianConditional


class _NoiseInside:
    def quantize(self, inputs: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
        return inputs


class _Bottleneck(_NoiseInside, EntropyBottleneck):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """CompressAI's forward without its index permutation, which syncs the GPU and fails on meta tensors."""
        by_channel = x.transpose(0, 1)  # C N h w
        likelihood, _, _ = self._likelihood(by_channel.flatten(1)[:, None])
        return x, self.likelihood_lower_bound(likelihood).view(by_channel.shape).transpose(0, 1)


class _Gaussian(_NoiseInside, GaussianConditional):
    pass


class RateModel(nn.Module):
    """Costs of z and s (Minnen et al. 2018): a factorised density for z, N(mu, sigma^2) * U(-1/2, 1/2) for s."""

    def __init__(self, hyper_channels: int):
        super().__init__()
        self.bottleneck = _Bottleneck(hyper_channels)
        self.gaussian = _Gaussian(None)

    @property
    def median(self) -> Tensor:
        """Of every channel of z: (C_z,)."""
        return self.bottleneck.quantiles[:, 0, 1].detach()

    def forward(self, z: Tensor, s: Tensor, mu: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Bits per sample, (N,) each, of z and of s, both with uniform noise of width 1 already added."""
        _, p_z = self.bottleneck(z)
        _, p_s = self.gaussian(s, sigma, mu)
        return -p_z.log2().flatten(1).sum(1), -p_s.log2().flatten(1).sum(1)

    def auxiliary_loss(self) -> Tensor:
        """Moves the quantiles, the median among them, to where the density has them; touches nothing else."""
        return self.bottleneck.loss()
