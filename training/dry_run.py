"""A configuration's consequences, told without training: settings, what is found, parameters, memory by shapes alone."""

import warnings

import torch
import yaml
from torch import Tensor, nn

from datapipe.pictures import Batch
from measuring.weights import VGG16
from models.codec import Codec
from models.released import NAMES, NETWORKS
from training.config import TrainConfig
from training.speed import Speed
from training.stages import STAGES
from training.start import new_codec, start_from, training_pictures, validation_of
from training.step import Step
from utils.config import to_mapping

META = torch.device("meta")
MIB = 2**20
NOTE = """\
Activations are the tensors that autograd keeps for the backward pass of one micro-batch, from shapes alone. On top come
temporaries, cuDNN's workspaces, CUDA's own few hundred MiB and, with several processes, the gradients once more (DDP)."""


def dry_run(config: TrainConfig) -> str:
    """The report. Raises DiffoError for sizes that do not fit together, and for what is named and not there."""
    sections = [yaml.safe_dump(to_mapping(config), sort_keys=False), surroundings(config)]
    with META:
        codec = new_codec(config).to(META)
    for name in config.stages:
        with META, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "for .* copying from a non-meta parameter")  # shapes take no weights
            step = Step(STAGES[name](config, codec, META))
        sections.append(f"stage {name}\n{counts(codec, step)}\n\n{memory(step)}\n")
    missing = [n for n in config.stages if getattr(config, n).perceptual.get("lpips") and not VGG16.path.is_file()]
    if missing:
        sections.append(f"The VGG weights of LPIPS are not on disk: stage {' and '.join(missing)} would not start.")
    return "\n".join([*sections, NOTE])


def surroundings(config: TrainConfig) -> str:
    """Pictures, checkpoints to start from and the device's precision, as they are found here.

    Raises:
        DiffoError: what is named and not there.
    """
    source = training_pictures(config)
    rows = [f"training pictures: {len(source)} from {source.name}{source.left_out}"]
    if config.validation.folder:
        count = max(len(validation_of(config, stage, META).files) for stage in config.stages)
        rows.append(f"validation pictures: {count} from {config.validation.folder}")
    if config.release or any(getattr(config, name) for name in NAMES):
        rows += start_from(config, new_codec(config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(f"precision and speed on this machine's {device}: {Speed(config.speed, device)}")
    return "\n".join(rows) + "\n"


def counts(codec: Codec, step: Step) -> str:
    """Table of parameters per network: those that the stage trains, and the others."""
    critic = step.adversary and step.adversary.discriminator
    networks = {name: getattr(codec, name) for name in (*NETWORKS, "light")} | {"discriminator": critic}
    rows = [f"{'network':<16}{'trainable':>14}{'frozen':>14}"]
    owned = {id(p) for p in step.stage.trained.parameters()} | {id(p) for p in parameters(critic)}
    for name, network in networks.items():
        if network is not None:
            trained = sum(p.numel() for p in network.parameters() if p.requires_grad and id(p) in owned)
            rows.append(f"{name:<16}{trained:>14,}{sum(p.numel() for p in network.parameters()) - trained:>14,}")
    return "\n".join(rows)


def parameters(network: nn.Module | None) -> list[nn.Parameter]:
    return list(network.parameters()) if network else []


def memory(step: Step) -> str:
    """Table of the memory of one process, in MiB."""
    stage = step.stage
    critic = step.adversary and step.adversary.discriminator
    weights = [*stage.codec.parameters(), *parameters(critic), *stage.perceptual.parameters()]
    trained = [q for q in (*stage.trained.parameters(), *parameters(critic)) if q.requires_grad]
    batch = step.blank()
    sizes = {
        "parameters": size(weights),
        "gradients": size(trained),
        "AdamW's moments": 2 * size(trained),
        "averages (EMA)": size(step.averages.average.values()),
        f"activations, {len(batch)} crops of {stage.params.crop_size}": activations(step, batch, weights),
    }
    rows = [f"{name:<32}{value / MIB:>10,.0f} MiB" for name, value in sizes.items()]
    return "\n".join([*rows, f"{'together, per process':<32}{sum(sizes.values()) / MIB:>10,.0f} MiB"])


def activations(step: Step, batch: Batch, weights: list[Tensor]) -> int:
    """Bytes that the backward pass of a micro-batch needs beside the weights, on any device."""
    known = {tensor.untyped_storage()._cdata for tensor in (*weights, *step.stage.codec.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes the place of one

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step.rehearse(batch)
    return sum(storage.nbytes() for key, storage in kept.items() if key not in known)


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
