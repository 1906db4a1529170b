"""Two processes with batch b train as one with batch 2b: in float64, to 1e-9 of each tensor's largest entry."""

import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing

from models.codec import Codec
from tests.commands import NANO
from training.config import load_config
from training.stages import STAGES
from utils import distributed

RELATIVE = 1e-9
ZERO = 1e-15  # some gradients are rounding alone: the bias of the keys cancels in any softmax
STEPS, BATCH, SIZE = 3, 4, 48


def train(name: str, world: int, rank: int) -> dict[str, torch.Tensor]:
    """A few steps on this rank's share of fixed batches; the state afterwards, with gradients of the last step."""
    overrides = ["gt.adversarial_start=1", "gt.adversarial_weight=0.5"]
    config = load_config(str(NANO), overrides)
    torch.manual_seed(0)
    codec = Codec(config.networks).double()
    torch.manual_seed(1)
    stage = STAGES[name](config, codec, torch.device("cpu"))
    images = torch.rand(STEPS, BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for step in range(STEPS):
        mine = torch.arange(rank, BATCH, world)
        stage.step(images[step, mine] * 2 - 1, step * BATCH + mine, step)
    state = {key: value.clone() for key, value in codec.state_dict().items()}
    if name == "gt":
        state |= {f"discriminator.{key}": value.clone() for key, value in stage.discriminator.state_dict().items()}
    gradients = {f"grad.{k}": p.grad.clone() for k, p in codec.named_parameters() if p.grad is not None}
    return state | gradients | {f"ema.{k}": v.clone() for k, v in stage.ema.average.items()}


def worker(rank: int, world: int, port: int, name: str, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    state = train(name, world, rank)
    torch.save(state, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_two_processes_train_as_one(name, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(2, port, name, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = train(name, 1, 0)
    assert alone.keys() == ranks[0].keys() and any(key.startswith("grad.") for key in alone)
    for key, value in alone.items():
        assert torch.equal(ranks[0][key], ranks[1][key]), f"{key} differs between the ranks"
        error = (ranks[0][key] - value).abs().max().item()
        assert error <= RELATIVE * value.abs().max().item() + ZERO, f"{key}: {error:.1e}"


def test_unlaunched_is_a_world_of_one():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    samples = torch.arange(3.0)
    assert torch.equal(distributed.gather_samples(samples), samples)
    assert torch.equal(distributed.all_reduce_mean(samples.clone()), samples)


def test_every_trainable_tensor_is_in_one_optimiser_and_frozen_parts_stay_frozen():
    config = load_config(str(NANO))
    codec = Codec(config.networks)
    stage = STAGES["codec"](config, codec, torch.device("cpu"))
    codec.train()
    trainable = {id(p) for p in codec.parameters() if p.requires_grad}
    optimised = [id(p) for p in stage.optimiser.parameters]
    assert len(optimised) == len(set(optimised)) and set(optimised) == trainable
    assert not any(p.requires_grad for p in codec.autoencoder.parameters())
