"""Networks that training starts from: untrained ones, and what the configuration names."""

import torch

from models.codec import Codec
from models.released import NAMES, start_from_release
from training.config import TrainConfig
from utils import checkpoints
from utils.errors import ConfigError


def new_codec(config: TrainConfig) -> Codec:
    """A codec with the densities that training needs, initial weights from the seed.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    torch.manual_seed(config.seed)  # alike on every rank
    try:
        codec = Codec(config.networks)
        if codec.residual:
            codec.residual.train_rates()
    except ValueError as error:
        raise ConfigError(f"networks: these sizes do not fit together ({error})") from error
    return codec


def start_from(config: TrainConfig, codec: Codec) -> list[str]:
    """Load the networks that the configuration starts from, in place; one line to tell for each.

    Raises:
        CheckpointError: a file that is not there, or not of that network and size.
    """
    told = start_from_release(config.release, codec) if config.release else []
    for name in NAMES:
        if path := getattr(config, name):
            state, dropped = checkpoints.parameters_of(checkpoints.read(path))
            checkpoints.load_strictly(getattr(codec, name), state, path)
            told.append(f"{name} from {path}, without {len(dropped)} other entries")
    return told
