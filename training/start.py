"""Networks that training starts from: untrained ones, and what the configuration names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from datapipe.pictures import Pictures
from datapipe.source import Source
from datapipe.sources import KINDS, open_source
from models.codec import Codec
from models.released import NAMES, load_release, start_from_release, states_of
from training.config import TrainConfig
from training.validation import Validation
from utils import checkpoints
from utils.config import COMMAND_LINE, Origin
from utils.errors import ConfigError, DiffoError

DEMO_ITERATIONS = 200  # of a stage, at most, where no pictures are named


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors of what the configuration names under a key as ConfigErrors with that key."""
    try:
        yield
    except DiffoError as error:
        raise ConfigError(str(error), key) from error


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
        raise ConfigError(f"these sizes do not fit together ({error})", "networks") from error
    return codec


def demo_run(config: TrainConfig, origin: Origin) -> tuple[TrainConfig, str]:
    """For the demo photographs: stages of DEMO_ITERATIONS at most, but for those whose length the command line says; a
    line to tell."""
    stages = {}
    for name in config.stages:
        params = getattr(config, name)
        asked = any(origin(f"{name}.{key}", "") == COMMAND_LINE for key in ("iterations", "minutes"))
        if not asked and (params.minutes is not None or params.iterations > DEMO_ITERATIONS):
            stages[name] = replace(params, iterations=DEMO_ITERATIONS, minutes=None)
    told = "no pictures are named (--data PATH): five demo photographs test the machinery, and a model learns nothing of them"
    if stages:
        lengths = " ".join(f"{name}.iterations={DEMO_ITERATIONS}" for name in stages)
        told += f"; so this is a short run, {lengths}, unless the command line says how long"
    return replace(config, **stages), told


def training_pictures(config: TrainConfig) -> Source:
    """The pictures that the configuration names, opened. Raises ConfigError, also where none of the first can be read."""
    data = config.data
    with named("data." + next((kind for kind in KINDS if getattr(data, kind)), KINDS[0])):
        source = open_source(data.folder, data.txt_file_path, data.shards)
        for stage in config.stages:
            Pictures(data, getattr(config, stage).crop_size, config.seed, source)
    return source


def validation_of(config: TrainConfig, stage: str, device: torch.device) -> Validation | None:
    """The validation of a stage, if there is one. Raises ConfigError."""
    if not config.validation.folder:
        return None
    with named("validation.folder"):
        return Validation(config.validation, device, getattr(config, stage).least_sides)


def start_from(config: TrainConfig, codec: Codec) -> list[str]:
    """Load the networks that the configuration starts from, in place; one line to tell for each.

    Raises:
        ConfigError: a file that is not there, or not of that network and size.
    """
    told = []
    if config.release:
        with named("release"):
            told += start_from_release(config.release, codec)
    for name in NAMES:
        if path := getattr(config, name):
            with named(name):
                state, dropped = checkpoints.parameters_of(checkpoints.read(path))
                checkpoints.load_strictly(getattr(codec, name), state, path)
            told.append(f"{name} from {path}, without {len(dropped)} other entries")
    if codec.light and (path := config.light.start):
        with named("light.start"):
            checkpoints.load_strictly(codec.light, checkpoints.parameters_of(checkpoints.read(path))[0], path)
        told.append(f"light decoder from {path}")
    if config.stages == ("texture",) and (path := config.texture.start):
        with named("texture.start"):
            state = states_of(load_release(path)).get("texture")
            if state is None:
                raise ConfigError(f"{path}: that release adds no texture")
            checkpoints.load_strictly(codec.texture, state, path)
        told.append(f"texture from {path}")
    return told
