"""Untrained networks as tests need them."""

import torch
from torch import nn

from models.blocks import AttnBlock, ResnetBlock
from models.unet import ResBlock

STARTS_AT_ZERO = {ResBlock: "out_layers.3", ResnetBlock: "conv2", AttnBlock: "proj_out"}


def off_zero(network: nn.Module, std: float = 0.1) -> None:
    """Give the residual branches, which training starts from zero, random weights: every layer then has a say."""
    for module in network.modules():
        if layer := STARTS_AT_ZERO.get(type(module)):
            torch.nn.init.normal_(module.get_submodule(layer).weight, std=std)


def numbers_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
