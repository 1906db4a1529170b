"""The adversary of a stage: its terms and factor by hand, when it joins, and what it changes."""

import copy

import pytest
import torch
from torch import nn

from tests.stages import batch_of, new_stage, pictures
from training.adversary import Adversary
from training.progress import Progress
from training.stage_config import AdversaryParams
from training.step import Step


class Mean(nn.Module):
    """D(X) = the mean of a picture, times a weight that is 1 at first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return self.weight * image.mean((1, 2, 3))


@pytest.fixture
def adversary():
    """With D(X) = weight x mean(X)."""
    stage = new_stage("gt")
    made = Adversary(stage.params, stage.last_layer, stage.speed)
    made.model = made.discriminator = Mean()
    return made


def flat(*values: float) -> torch.Tensor:
    """Pictures of one grey value each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_the_discriminators_loss_in_micro_batches(adversary):
    """(E max(0, 1 - D(X)) + E max(0, 1 + D(X^))) / 2 over the whole batch, whatever the pieces."""
    real, fake = flat(0.5, 0.25, 0.875), flat(-0.75, -0.5, 0.5)
    for parts in ([slice(0, 3)], [slice(0, 2), slice(2, 3)]):
        adversary.discriminator.weight.grad = torch.tensor(50.0)
        adversary.optimiser.zero_grad = lambda: adversary.discriminator.zero_grad()
        loss = adversary.judge(real, fake, parts)
        assert loss.item() == pytest.approx(((0.5 + 0.75 + 0.125) + (0.25 + 0.5 + 1.5)) / 6)
        assert adversary.discriminator.weight.grad.item() == pytest.approx((-1.625 + -0.75) / 6)  # its own alone


def test_the_generators_term(adversary):
    """-E D(X^); its gradient reaches the pictures alone."""
    picture = flat(0.5, -0.25).clone().requires_grad_()
    term = adversary.generator_term(picture)
    term.backward()
    assert term.item() == pytest.approx(-0.125)
    torch.testing.assert_close(picture.grad, torch.full_like(picture, -1 / 96))
    assert adversary.discriminator.weight.grad is None


def test_the_adaptive_factor(adversary, monkeypatch):
    """w |grad L| / (|grad L_G| + 1e-4) at the last layer, at most 1e4 w: gradients (3, 4) and (0, 2), or what they are
    over all ranks."""
    adversary.params = AdversaryParams(weight=0.8)
    layer = nn.Parameter(torch.tensor([0.5, -0.5]))
    loss, term = (layer * torch.tensor([3.0, 4.0])).sum(), 2 * layer[1]
    factor = adversary.factor(loss, term, layer)
    assert factor.item() == pytest.approx(0.8 * 5 / 2.0001, rel=1e-6) and not factor.requires_grad
    assert adversary.factor(loss, 0 * layer.sum(), layer).item() == pytest.approx(0.8 * 1e4)
    with monkeypatch.context() as patch:
        patch.setattr("utils.distributed.all_reduce_mean", lambda gradients: gradients * torch.tensor([[3.0], [1.0]]))
        assert adversary.factor(loss, term, layer).item() == pytest.approx(3 * factor.item())
    adversary.params = AdversaryParams(weight=0.3, adaptive=False)
    assert adversary.factor(loss, term, layer).item() == pytest.approx(0.3)
    (loss + term).backward()  # both graphs are still there
    assert layer.grad.tolist() == [3, 6]


def options(name: str, *more: str) -> tuple[str, ...]:
    return (f"{name}.adversary.weight=0.6", f"{name}.adversary.start=3", f"{name}.optim.clip=0", *more)


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_it_joins_at_its_start_in_both_stages(name):
    stage = new_stage(name, *options(name), residual=name == "codec")
    step = Step(stage)
    before = copy.deepcopy(step.adversary.discriminator.state_dict())
    progress = Progress(stage.params, step=2)
    done = step(batch_of(stage), progress)
    assert not {"adversarial", "discriminator", "adversarial_factor"} & (done.means | done.numbers).keys()
    assert all(torch.equal(value, before[key]) for key, value in step.adversary.discriminator.state_dict().items())
    done = step(batch_of(stage), progress)  # at 3
    assert {"adversarial", "discriminator"} <= done.means.keys()
    assert {"adversarial_factor", "discriminator_grad_norm"} <= done.numbers.keys()
    assert not torch.equal(step.adversary.discriminator.state_dict()["main.0.weight"], before["main.0.weight"])
    assert not step.adversary.joins(2.99) and step.adversary.joins(3)


@pytest.mark.parametrize("name", ["gt", "codec"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_it_adds_to_a_step(name, pieces):
    """The last layer's gradient is grad L + factor x grad L_G, with the first micro-batch's factor for all; that of the
    discriminator is its own loss's alone."""
    micro = (f"{name}.microbatch={2 // pieces}",)
    stage = new_stage(name, *options(name, *micro), residual=name == "codec")
    step, batch = Step(stage), batch_of(stage)
    discriminator = copy.deepcopy(step.adversary.discriminator)
    layer, expected, factor, restored, adversarial = stage.last_layer, 0, None, [], 0
    assert layer is (stage.codec.unet.last_layer if name == "codec" else stage.codec.autoencoder.decoder.last_layer)
    for i in range(pieces):
        piece = batch[slice(i * 2 // pieces, (i + 1) * 2 // pieces)]
        out = stage.forward(stage.network, piece)
        term = -discriminator(out.image).mean()
        own = stage.losses(out, piece)["loss"]
        g_own, g_term = (torch.autograd.grad(t, layer, retain_graph=True)[0] for t in (own, term))
        if factor is None:
            factor = 0.6 * (g_own.norm() / (g_term.norm() + 1e-4)).item()
        expected = expected + (g_own + factor * g_term) / pieces
        adversarial += term.item() / pieces
        restored.append(out.image.detach())
    real, fake = discriminator(batch.image), discriminator(torch.cat(restored))
    loss = ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()) / 2
    loss.backward()

    layer_before = layer.detach().clone()
    done = step(batch, Progress(stage.params, step=3))
    assert done.numbers["adversarial_factor"].item() == pytest.approx(factor, rel=1e-4)
    assert done.means["adversarial"].item() == pytest.approx(adversarial, rel=1e-4)
    assert done.means["discriminator"].item() == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(layer.grad, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert not torch.equal(layer, layer_before)
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in network.parameters()])
        for network in (step.adversary.discriminator, discriminator)
    )
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_every_update_takes_its_own_gradient_alone():
    """Gradients of the step before are gone, the discriminator's too: the same batch at the same weights, twice."""
    stage = new_stage("gt", *options("gt"))
    step, batch = Step(stage), batch_of(stage)
    for optimiser in (step.optimiser, step.adversary.optimiser):
        optimiser.update = lambda at: None
    norms = []
    for _ in range(2):
        done = step(batch, Progress(stage.params, step=3))
        norms.append((done.numbers["grad_norm"].item(), done.numbers["discriminator_grad_norm"].item()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_its_gradient_is_clipped_too():
    stage = new_stage("gt", "gt.adversary.weight=0.6", "gt.adversary.start=0", "gt.optim.clip=0.001")
    step = Step(stage)
    told = step(batch_of(stage), Progress(stage.params)).numbers["discriminator_grad_norm"].item()
    norm = torch.stack([p.grad.norm() for p in step.adversary.discriminator.parameters()]).norm().item()
    assert told > 0.002 and norm == pytest.approx(0.001, rel=1e-2)


def test_its_state_goes_with_the_steps():
    stage = new_stage("gt", *options("gt"))
    step = Step(stage)
    step(batch_of(stage), Progress(stage.params, step=3))
    saved = copy.deepcopy(step.state_dict())
    torch.manual_seed(1)
    other = Step(stage)
    other.load_state_dict(saved, step.stage.networks(step.averages.average))
    assert other.averages.updates == 1
    shown = pictures(1)
    with torch.no_grad():
        assert torch.equal(other.adversary.discriminator(shown), step.adversary.discriminator(shown))
    moments = other.adversary.optimiser.adamw.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moments, step.adversary.optimiser.adamw.state_dict()["state"][0]["exp_avg"]) and moments.any()
