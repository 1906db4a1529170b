"""Graphs of a step's passes: what is recorded, replayed and given up, by a recorder without a GPU; what a recording forbids."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.commands import NANO
from tests.recorded import Fixed, tensors
from tests.small_runs import ALONE, RESIDUAL
from tests.stages import batch_of, new_stage
from training.config import load_config
from training.dry_run import META
from training.perceptual import perceptual_terms
from training.progress import Progress
from training.speed import Speed, SpeedParams
from training.stages import STAGES
from training.start import new_codec
from training.step import Step


def steps(name: str, count: int, *overrides: str, graphs: bool, broken: bool = False) -> tuple[Step, list]:
    """A step after a few updates, with or without graphs, and the terms of each."""
    step = Step(new_stage(name, *overrides, residual=name == "codec"))
    if graphs:
        own = [*step.stage.network.parameters(), *(step.adversary.discriminator.parameters() if step.adversary else ())]
        step.graphs = Fixed([p for p in own if p.requires_grad], broken)
    progress, terms = Progress(step.stage.params), []
    for number in range(count):
        batch = batch_of(step.stage, 2, seed=number)
        drawn = step.stage.drawn(range(2 * number, 2 * number + 2), batch.image.shape[2:])
        done = step(replace(batch, draws=drawn), progress)
        terms.append(
            {key: value.item() for key, value in done.means.items()} | {"norm": done.numbers["grad_norm"].item()}
        )
    return step, terms


@pytest.mark.parametrize("overrides", [(), ("microbatch=1",), ("adversary.weight=0.5", "adversary.start=3")], ids=str)
@pytest.mark.parametrize("name", ["gt", "codec"])
def test_a_step_with_graphs_is_the_step_without(name, overrides):
    """Terms, norms, weights, averages and moments, bit by bit; an adversary that joins later has a graph of its own."""
    own = [f"{name}.{override}" for override in ("adversary.weight=0", *overrides)]
    plain, expected = steps(name, 6, *own, graphs=False)
    ours, found = steps(name, 6, *own, graphs=True)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(tensors(ours.state_dict()), tensors(plain.state_dict()), strict=True))
    states = [
        step.stage.codec.state_dict() | {f"average.{k}": v for k, v in step.averages.average.items()}
        for step in (ours, plain)
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    kinds = 2 if len(overrides) == 2 else 1
    assert (ours.graphs.recorded, ours.graphs.replayed) == (kinds, 6 - kinds)  # the first of each kind runs as always


def test_batches_of_other_copies_or_sizes_are_other_kinds():
    step, _ = steps("codec", 1, "codec.copies=[1, 2]", "codec.adversary.weight=0", graphs=True)
    progress, kinds = Progress(step.stage.params), set()
    for position in range(24):
        batch = batch_of(step.stage)
        batch = replace(batch, position=batch.position + position)
        kinds.add(step.stage.kind(batch))
        step(batch, progress)
    assert len(kinds) == 4 and step.graphs.recorded == 4
    for _ in range(2):
        step(batch_of(step.stage, 1), progress)
    assert step.graphs.recorded == 5


def test_where_none_can_be_recorded_one_line_says_so_and_the_step_goes_on(capsys):
    _, expected = steps("gt", 4, "gt.adversary.weight=0", graphs=False)
    _, found = steps("gt", 4, "gt.adversary.weight=0", graphs=True, broken=True)
    assert found == expected
    said = capsys.readouterr().err
    assert (
        said == "graphs of the step are left out, it runs as always: operation not permitted when stream is capturing\n"
    )


def test_the_light_decoder_draws_on_the_host():
    step, _ = steps("light", 3, "light.adversary.weight=0", graphs=True)
    assert step.graphs.recorded == 0


@pytest.mark.parametrize(
    "kind, adaptive, world, can",
    [
        ("patch", True, 1, True),
        ("patch", True, 2, False),
        ("patch", False, 2, True),
        ("projected", False, 1, False),
    ],
)
def test_adversaries_that_take_more_are_not_recorded(kind, adaptive, world, can, monkeypatch):
    """A projected one draws on the host; the adaptive factor takes gradients of other ranks."""
    step, _ = steps("gt", 1, "gt.adversary={weight: 0.5, start: 0, adaptive: true}", graphs=True)
    step.adversary.params = replace(step.adversary.params, kind=kind, adaptive=adaptive)
    monkeypatch.setattr("utils.distributed.world_size", lambda: world)
    monkeypatch.setattr("training.step.average_gradients", lambda _: None)
    for number in range(2):
        step._passed(batch_of(step.stage, seed=number), step.adversary) if can or world == 1 else None
    assert step.adversary.recordable == can and step.graphs.recorded == int(can)


def test_graphs_are_for_cuda_where_nothing_is_compiled():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        assert Speed(SpeedParams(), cuda).graphs and "graphs" in str(Speed(SpeedParams(), cuda))
        assert not Speed(SpeedParams(compile=True), cuda).graphs and not Speed(SpeedParams(graphs=False), cuda).graphs
    assert not Speed(SpeedParams(graphs=True), cpu).graphs


class Makers(TorchFunctionMode):
    """What makes tensors on a device of numbers of the host: a wait for the device, which no graph can have."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        listed = name == "__getitem__" and any(
            isinstance(i, list) for i in (args[1] if isinstance(args[1], tuple) else args[1:])
        )
        if name in ("tensor", "as_tensor", "from_numpy", "new_tensor", "item", "tolist", "nonzero") or listed:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Copies of arrays on the CPU to the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" and t.dim() for t in given) and any(t.is_meta for t in made):
            self.found.append(str(func))
        return out


ONE = "{ms_ssim: 1.0}"
TERMS = "{stlpips: 1.0, features: 1.0, ms_ssim: 1.0, weave: 1.0, lines: 1.0}"


def taken_from_the_host(name: str, terms: str = TERMS, extra=None) -> list[str]:
    """What the passes of a stage with these terms and a PatchGAN take, by shapes alone; `extra` in MS-SSIM's place."""
    own = [f"{name}.crop_size=192", f"{name}.perceptual={terms}", f"{name}.adversary={{weight: 1.0, start: 0}}"]
    config = load_config(str(NANO), [*own, f"networks.residual={RESIDUAL}", *ALONE.get(name, ())])
    params = getattr(config, name)
    with META:
        bare = replace(config, **{name: replace(params, perceptual={})})
        step = Step(STAGES[name](bare, new_codec(config).to(META), META))
        step.stage.perceptual = perceptual_terms(params.perceptual).to(META)
    if extra:
        step.stage.perceptual["ms_ssim"].forward = extra
    step.stage.factors = step.stage.factors | params.perceptual
    batch = step.blank()
    with Makers() as makers, Copies() as copies:
        step.passes(batch, step.adversary)
    return makers.found + copies.found


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
@pytest.mark.parametrize("name", ["gt", "codec"])
def test_passes_take_nothing_from_the_host(name):
    """A copy from there is a wait for the device: recording would fail, on a GPU alone."""
    assert taken_from_the_host(name) == []


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_what_takes_something_from_the_host_is_found():
    assert "new_tensor" in taken_from_the_host(
        "gt", ONE, lambda image, _: (image.mean() * image.new_tensor([0.3])).sum()
    )
    assert "__getitem__" in taken_from_the_host("gt", ONE, lambda image, _: image[0, 0, 0][[1, 2]].mean())
    fixed = torch.ones(2)
    assert "aten._to_copy.default" in taken_from_the_host(
        "gt", ONE, lambda image, _: (image.mean() * fixed.to(image)).sum()
    )
    assert taken_from_the_host("light", ONE)
