"""A loaded codec made ready for CUDA: precision and layout of its weights, graphs, fused norms."""

import torch
from torch import nn

from models import fused_norm
from models.graphs import leave_graphs, use_graphs

FAST_PATHS = ("fused_norm", "graphs")  # on unless left out; where one cannot run, it says so and the rest goes on
# Convolutions and products of these compute in bfloat16. Code book, norms, linear shortcut and integers stay float32.
LOWERED = (
    "autoencoder.encoder",
    "autoencoder.quant_conv",
    "autoencoder.post_quant_conv",
    "autoencoder.decoder",
    "vq_base.encoder",
    "vq_base.quant_conv",
    "vq_base.post_quant_conv",
    "vq_base.decoder",
    "residual.analysis",
    "residual.hyper_analysis",
    "residual.mean_network",
    "residual.synthesis",
    "unet",
)


def prepare(codec: nn.Module, bfloat16: bool, without: tuple[str, ...] = ()) -> None:
    """Make a codec on its device fast, in place; files hold the same symbols however it is prepared.

    Args:
        bfloat16: weights of the networks are cast, once, and lie NHWC; to be run under autocast. Otherwise weights stay
            as they are, and networks compute the same bits as unprepared ones.
        without: of FAST_PATHS, those that are left out. `fused_norm` is a switch of the process.
    """
    if bfloat16:
        lower(codec)
    fused_norm.enabled = "fused_norm" not in without
    (leave_graphs if "graphs" in without else use_graphs)(codec)


def lower(codec: nn.Module) -> None:
    """Weights of convolutions and matrix products in bfloat16 and NHWC: nothing is copied or cast while coding."""
    for name in LOWERED:
        if name.startswith("residual.") and codec.residual is None:
            continue
        network = codec.get_submodule(name).to(memory_format=torch.channels_last)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
