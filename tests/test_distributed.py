"""Two processes with batch b train as one with batch 2b, whole or in micro-batches, with all parts of the codec.

In float64, to 1e-9 of each tensor's largest entry.
"""

import copy
from functools import cache

import pytest
import torch

from datapipe.pictures import Batch
from models.codec import Codec
from models.released import NETWORKS
from tests.commands import NANO, run
from tests.recorded import Fixed
from tests.small_runs import ALL_PARTS, ALONE, ranks
from training.config import load_config
from training.progress import Progress
from training.speed import Speed
from training.stages import STAGES
from training.step import Step
from utils import distributed

RELATIVE = 1e-9
ZERO = 1e-15  # some gradients are rounding alone: the bias of the keys cancels in any softmax
STEPS, BATCH, SIZE = 3, 4, 48
OVERRIDES = (
    # AdamW divides by |g| + 1e-8: where a gradient is nearly nothing, the step is its rounding times lr / 1e-8.
    *("gt.optim.lr=1e-4", "codec.optim.lr=1e-4", "decoder.optim.lr=1e-4", "light.optim.lr=1e-4"),
    *("texture.optim.lr=1e-4", "texture.adversary={weight: 0.5, start: 1}", f"texture.crop_size={SIZE}"),
    *("gt.adversary={weight: 0.5, start: 1}", "codec.adversary={weight: 0.5, start: 1}"),
    *("decoder.adversary={weight: 0.5, start: 1}", "decoder.chroma_weight=1.0", f"decoder.crop_size={SIZE}"),
    *("light.adversary={weight: 0.5, start: 1}", "light.chroma_weight=1.0", f"light.crop_size={SIZE}"),
    *("gt.chroma_weight=1.0", "codec.chroma_weight=1.0", f"gt.crop_size={SIZE}", f"codec.crop_size={SIZE}"),
    *ALL_PARTS,
    "codec.train_decoder=0.5",
    "networks.vq_base.revive_below=0.995",  # codes that the second update leaves unused are revived by the third
    "speed.precision=float32",
)


def new_step(name: str, *overrides: str) -> Step:
    """A stage on networks of random weights, in float64."""
    config = load_config(str(NANO), [*OVERRIDES, *ALONE.get(name, ()), *overrides])
    torch.manual_seed(0)
    codec = Codec(config.networks).double()
    codec.residual.train_rates()
    torch.manual_seed(1)
    return Step(STAGES[name](config, codec, torch.device("cpu")))


def batch_of(step: Step, positions: range, size: int = SIZE) -> Batch:
    """Random pictures; those of a position are always the same."""
    images = [torch.rand(3, size, size, generator=torch.Generator().manual_seed(p)) for p in positions]
    draws = step.stage.drawn(positions, (size, size))
    return Batch(torch.stack(images).double() * 2 - 1, torch.tensor(positions), draws)


def state_of(step: Step) -> dict[str, torch.Tensor]:
    """Networks, their averages, and the gradients of the last step."""
    state = {key: value.clone() for key, value in step.stage.codec.state_dict().items()}
    state |= {f"critic.{key}": value.clone() for key, value in step.adversary.discriminator.state_dict().items()}
    gradients = {f"grad.{k}": p.grad.clone() for k, p in step.stage.codec.named_parameters() if p.grad is not None}
    return state | gradients | {f"ema.{k}": v.clone() for k, v in step.averages.average.items()}


def train(name: str, world: int, rank: int, *overrides: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """A few steps on this rank's share of the batches; the state afterwards, and what was logged."""
    step = new_step(name, *overrides)
    progress, logs = Progress(step.stage.params), []
    for number in range(STEPS):
        own = range(number * BATCH + rank, (number + 1) * BATCH, world)
        logs.append(step.logs(step(batch_of(step, own), progress)))
    return state_of(step), logs


@cache
def alone(name: str, *overrides: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    return train(name, 1, 0, *overrides)


# The adaptive factor of a step is that of its first micro-batch.
WHOLE = {name: () for name in STAGES}
PIECES = {name: (f"{name}.adversary.adaptive=false",) for name in STAGES}


def shares(rank: int, path: str) -> None:
    with distributed.process_group(torch.device("cpu")):
        found = {}
        for name in STAGES:
            runs = (WHOLE[name], (*PIECES[name], f"{name}.microbatch=1"))
            found[name] = [train(name, distributed.world_size(), rank, *overrides) for overrides in runs]
        torch.save(found, f"{path}/{rank}.pt")


def graphed(rank: int, path: str) -> None:
    """The same as `shares`, as on CUDA: passes that are recorded, where they can be, and no DDP."""
    with distributed.process_group(torch.device("cpu")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Speed, "graphs", property(lambda _: True, lambda *_: None), raising=False)
        patch.setattr("training.step.Graphs", Fixed)
        found = {}
        for name in ("gt", "codec"):
            runs = (WHOLE[name], (*PIECES[name], f"{name}.microbatch=1"))
            found[name] = [train(name, distributed.world_size(), rank, *overrides) for overrides in runs]
        assert Fixed.in_all == len(found)  # of the steps that have no adaptive factor
        torch.save(found, f"{path}/{rank}.pt")


def assert_equal(found: tuple[dict, list], expected: tuple[dict, list]) -> None:
    assert found[0].keys() == expected[0].keys() and any(key.startswith("grad.") for key in expected[0])
    for key, value in expected[0].items():
        if value.numel():
            error = (found[0][key] - value).abs().max().item()
            assert error <= RELATIVE * value.abs().max().item() + ZERO, f"{key}: {error:.1e}"
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


def test_two_processes_train_as_one(processes, tmp_path):
    """With the batch whole, and with micro-batches of one."""
    assert ranks(processes, 2, shares, str(tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in STAGES:
        for ours, theirs, overrides in zip(first[name], second[name], (WHOLE[name], PIECES[name]), strict=True):
            assert all(torch.equal(theirs[0][key], value) for key, value in ours[0].items()), "the ranks differ"
            assert_equal(ours, alone(name, *overrides))
    revived = [logs["revived"] for logs in alone("codec")[1]]
    assert revived[1] == 0 < revived[2] < revived[0] == 16


def test_two_processes_with_graphs_train_as_one(processes, tmp_path):
    assert ranks(processes, 2, graphed, str(tmp_path)) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, runs in first.items():
        for ours, theirs, overrides in zip(runs, second[name], (WHOLE[name], PIECES[name]), strict=True):
            assert all(torch.equal(theirs[0][key], value) for key, value in ours[0].items()), "the ranks differ"
            assert_equal(ours, alone(name, *overrides))


def go_on(rank: int, path: str) -> None:
    """Four steps; then the last two again, from the state after the second, in a step made anew."""
    with distributed.process_group(torch.device("cpu")):
        found, world = {}, distributed.world_size()
        for name in STAGES:
            first, again = new_step(name), new_step(name)
            progress = Progress(first.stage.params)
            for number in range(4):
                if number == 2:
                    again.stage.codec.load_state_dict(first.stage.codec.state_dict())
                    averages = again.stage.networks(first.averages.average)
                    again.load_state_dict(copy.deepcopy(first.state_dict()), averages)
                first(batch_of(first, range(number * world + rank, number * world + rank + 1)), progress)
            progress = Progress(again.stage.params, 2)
            for number in (2, 3):
                again(batch_of(again, range(number * world + rank, number * world + rank + 1)), progress)
            found[name] = (state_of(first), state_of(again))
        torch.save(found, f"{path}/{rank}.pt")


def test_three_processes_go_on_bit_for_bit(processes, tmp_path):
    """The order in which the gradients of three ranks are summed must not depend on when a run was started."""
    assert ranks(processes, 3, go_on, str(tmp_path)) == [0, 0, 0]
    for rank in range(3):
        for name, (state, again) in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            assert state.keys() == again.keys()
            assert [key for key, value in state.items() if not torch.equal(again[key], value)] == [], name


LEAVING = """
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from utils import distributed
with distributed.process_group(torch.device("cpu")):
    DistributedDataParallel(torch.nn.Linear(1, 1))
assert not [told for told in Path("/proc/self/task").glob("*/comm") if "gloo" in told.read_text()]
"""


def test_no_thread_of_a_group_outlives_it(tmp_path):
    """One that waits for the interpreter when that has gone ends a finished process by SIGABRT, once in a hundred."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "leaving.py")


@pytest.mark.parametrize(
    "name, options", [*((name, ()) for name in STAGES), ("texture", ("texture.train_decoder=0.5",))]
)
def test_every_trainable_tensor_is_in_one_group_gets_a_gradient_and_is_averaged(name, options):
    step = new_step(name, f"{name}.adversary.start=0", *options)
    step(batch_of(step, range(2)), Progress(step.stage.params))
    owned = [(step.stage.codec, step.optimiser), (step.adversary.discriminator, step.adversary.optimiser)]
    for network, optimiser in owned:
        groups = [id(p) for group in optimiser.adamw.param_groups for p in group["params"]]
        with_gradient = {id(p) for p in network.parameters() if p.grad is not None}
        assert len(groups) == len(with_gradient) and set(groups) == with_gradient
    trainable = {id(p) for p in step.stage.trained.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in step.stage.codec.parameters() if p.grad is not None}
    averaged = step.stage.networks(step.averages.average)
    own = {"gt": {"autoencoder"}, "decoder": {"autoencoder"}, "light": {"light"}, "texture": {"texture"}}
    assert set(averaged) == own.get(name, set(NETWORKS) - {"texture"}) | ({"autoencoder"} if options else set())
    for network, state in averaged.items():
        assert state.keys() == getattr(step.stage.codec, network).state_dict().keys()
