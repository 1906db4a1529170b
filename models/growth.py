"""The networks of a release -> those of a wider latent: channels added to x, and to s of the residual codec.

What was there computes as before: new inputs meet zeros, new outputs are zero. The image autoencoder's shortcut gets its new
channels from training pictures (`autoencoder.fit_linear`); g_a and g_s pass them on as they are, so that the residual
codec, from its first step on, sends what is new in them.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.codec import Codec
from models.records import CodecParams
from utils.errors import ConfigError

_NEW_SCALE = -3.0  # of h_s's last bias: sigma 0.17, so that a symbol 0 costs next to nothing


def narrowed(asked: CodecParams, released: CodecParams) -> CodecParams:
    """`asked` with the release's numbers of channels of x and of s, where it asks for more.

    Raises:
        ConfigError: more, and there is no linear shortcut that new channels could start from.
    """
    blocks = {"autoencoder": "embed_dim", "vq_base": "in_channels", "unet": "latent_channels"}
    if asked.residual and released.residual:
        blocks["residual"] = "channels"
    fewer = {}
    for block, channels in blocks.items():
        ours, theirs = getattr(asked, block), getattr(getattr(released, block), channels)
        if getattr(ours, channels) > theirs:
            fewer[block] = replace(ours, **{channels: theirs})
    if "autoencoder" in fewer and asked.autoencoder.shortcut == "none":
        raise ConfigError("a latent wider than the release's needs a linear shortcut", "networks.autoencoder.shortcut")
    return replace(asked, **fewer)


@torch.no_grad()
def widened(
    states: Mapping[str, Mapping[str, Tensor]], released: CodecParams, codec: Codec
) -> dict[str, dict[str, Tensor]]:
    """State dicts of a release, for the wider codec, by network.

    Args:
        states: of `released`'s networks. codec: of the widths that are wanted, at least as large.
    """
    d, d_new = released.autoencoder.embed_dim, codec.params.autoencoder.embed_dim
    m, m_new = released.residual and released.residual.channels, codec.residual and codec.residual.params.channels
    # Convolutions that see several maps side by side: (channels before, channels now) of all but the last.
    parts = {"analysis.conv_in": [(d, d_new)], "synthesis.conv_in": [(m, m_new)], "input_blocks.0.0": [(d, d_new)]}
    grown = {}
    for network, state in states.items():
        shapes = {key: value.shape for key, value in getattr(codec, network).state_dict().items()}
        grown[network] = {
            key: _placed(value, shapes[key], parts.get(key.removesuffix(".weight"), []))
            if key in shapes and value.shape != shapes[key]
            else value
            for key, value in state.items()
        }
    if m != m_new:
        residual = grown["residual"]
        residual["scale_network.out.bias"][m:] = _NEW_SCALE
        residual["log_gain"][:, m:] = residual["log_gain"][:, :m].mean(1, keepdim=True)
        if d != d_new:
            nn.init.eye_(residual["analysis.linear.weight"][m:, d:, 0, 0])
            nn.init.eye_(residual["synthesis.linear.weight"][d:, m:, 0, 0])
    return grown


def _placed(old: Tensor, shape: torch.Size, parts: list[tuple[int, int]]) -> Tensor:
    """A parameter among zeros: its outputs first, its inputs where the map that each belongs to now begins."""
    new = old.new_zeros(shape)
    if old.dim() == 1:
        new[: len(old)] = old
        return new
    before = now = 0
    for channels, wider in [*parts, (old.shape[1] - sum(c for c, _ in parts), shape[1] - sum(w for _, w in parts))]:
        new[: old.shape[0], now : now + channels] = old[:, before : before + channels]
        before, now = before + channels, now + wider
    return new
