"""One update: its pieces, its flags and what it leaves untouched; the code book, moved by hand."""

import sys

import pytest
import torch

from tests.stages import batch_of, new_stage
from training.progress import Progress
from training.step import Step
from utils.errors import NotFinite


def flatten(state, prefix="") -> dict[str, object]:
    """Every tensor and number of nested dictionaries and lists, copied."""
    if isinstance(state, torch.Tensor):
        return {prefix: state.detach().clone()}
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, value in items for k, v in flatten(value, f"{prefix}.{name}").items()}
    return {prefix: state}


def whole(step: Step) -> dict[str, object]:
    """Everything that a step changes."""
    return flatten([step.stage.codec.state_dict(), step.averages.average, step.state_dict()])


def differing(one: dict, other: dict) -> list[str]:
    assert one.keys() == other.keys()
    same = {k: torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()}
    return [name for name, equal in same.items() if not equal]


def codec_step(*overrides: str, at: int = 1, residual: bool = False) -> tuple[Step, Progress]:
    """A step of stage `codec` after the first, which places all codes."""
    step = Step(new_stage("codec", *overrides, residual=residual))
    return step, Progress(step.stage.params, step=at)


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_micro_batches_add_up_to_the_batch(name):
    """Pieces of 2 and 1 weigh 2/3 and 1/3: gradient, terms and picture are those of the whole batch of 3."""
    stage = new_stage(name, f"{name}.microbatch=2", f"{name}.adversary.weight=0", residual=name == "codec")
    step, batch = Step(stage), batch_of(stage, 3, **({"level": [0.0, 1.5, 3.0]} if name == "codec" else {}))
    out = stage.forward(stage.network, batch)
    terms = stage.losses(out, batch)
    parameters = step.optimiser.parameters
    gradients = torch.autograd.grad(terms["loss"], parameters)
    done = step(batch, Progress(stage.params, step=1))
    ours, theirs = (torch.cat([g.flatten() for g in many]) for many in ([p.grad for p in parameters], gradients))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert done.means.keys() == terms.keys()
    for term, value in terms.items():
        assert done.means[term].item() == pytest.approx(value.item(), rel=1e-4), term
    torch.testing.assert_close(done.restored, out.image.detach(), rtol=0, atol=1e-5)
    assert torch.equal(done.image, batch.image) and not done.restored.requires_grad


def test_the_quantiles_learn_from_the_auxiliary_term():
    step, progress = codec_step(residual=True)
    quantiles = step.stage.codec.residual.rate_model.bottleneck.quantiles
    before = quantiles.detach().clone()
    step(batch_of(step.stage), progress)
    assert (quantiles - before).abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def broken_term(stage, name: str, value):
    """Let a term of the stage become something else."""
    plain = stage.terms
    stage.terms = lambda out, batch: (terms := plain(out, batch)) | {name: value(out, terms[name])}


def assert_refused(step: Step, progress: Progress, told: str) -> None:
    """The step raises, and changes nothing."""
    before, at = whole(step), progress.step
    with pytest.raises(NotFinite, match=told):
        step(batch_of(step.stage), progress)
    changed = [key for key in differing(whole(step), before) if not key.endswith("residual.median")]  # of the quantiles
    assert not changed and progress.step == at


def rooted(out, term: torch.Tensor) -> torch.Tensor:
    """A term with 0 more, whose slope is infinite."""
    return term + (out.image * 0).abs().sqrt().sum()


@pytest.mark.parametrize(
    "told, name, value",
    [
        ("commitment", "commitment", lambda out, term: term * float("nan")),
        ("distortion", "distortion", lambda out, term: term + float("inf")),
        ("auxiliary", "auxiliary", lambda out, term: term * float("nan")),
        ("grad_norm", "distortion", rooted),
    ],
)
def test_nothing_is_updated_with_what_is_not_finite(told, name, value):
    step, progress = codec_step("codec.adversary.weight=0.5", residual=True)
    step(batch_of(step.stage), progress)
    step.stage.codec.vq_base.quantize.embedding.cluster_size[3] = 0  # a dead code stays dead as well
    broken_term(step.stage, name, value)
    assert_refused(step, progress, f"stage codec, step 2: the term {told} is not finite")


def test_the_discriminators_loss_and_other_ranks_terms_must_be_finite_too(monkeypatch):
    step = Step(new_stage("gt", "gt.adversary.start=0"))
    progress = Progress(step.stage.params)
    step.adversary.judge = lambda *_: torch.tensor(float("nan"))
    assert_refused(step, progress, "discriminator")
    step.adversary = None
    of_another = torch.zeros(4).index_fill(0, torch.tensor(0), float("nan"))  # distortion, loss, stop, seconds
    monkeypatch.setattr("utils.distributed.all_reduce_sum", lambda own: own + of_another)
    assert_refused(step, progress, "distortion")


def test_the_wish_to_stop_is_everybodys(monkeypatch):
    step = Step(new_stage("gt", "gt.adversary.weight=0"))
    progress, batch = Progress(step.stage.params), batch_of(step.stage)
    assert [step(batch, progress, stop).flags.stop for stop in (False, True, False)] == [False, True, False]
    monkeypatch.setattr(
        "utils.distributed.all_reduce_sum", lambda t: t + torch.tensor([0.0] * (len(t) - 2) + [1.0, 0.0])
    )
    assert step(batch, progress).flags.stop  # another rank's
    assert progress.step == 4  # the steps were made all the same


def test_a_step_waits_once(monkeypatch):
    """The flags come to the CPU together; nothing else that the project's code does needs a number of the device."""
    step, progress = codec_step("codec.adversary.weight=0.5", "codec.microbatch=1", residual=True)
    waits = []

    def counted(name):
        plain = getattr(torch.Tensor, name)

        def method(*args, **options):
            caller = sys._getframe(1).f_code.co_filename
            if "site-packages" not in caller:
                waits.append((name, caller))
            return plain(*args, **options)

        return method

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    batch = batch_of(step.stage)
    step.stage.codec.vq_base.quantize.embedding.cluster_size.fill_(1.0)
    waits.clear()
    done = step(batch, progress)
    monkeypatch.undo()
    assert [name for name, _ in waits] == ["tolist"] and not done.flags.dead


def test_losses_are_outside_autocast():
    """Networks in bfloat16, terms in float32, whatever the perceptual term computes with."""
    step, seen = codec_step("speed.precision=bfloat16")[0], []
    step.stage.perceptual = {"lpips": lambda image, _: (seen.append(torch.is_autocast_enabled("cpu")), image.mean())[1]}
    plain = step.stage.codec.unet.forward
    step.stage.codec.unet.forward = lambda *args: (seen.append(torch.is_autocast_enabled("cpu")), plain(*args))[1]
    _, terms = step.losses(batch_of(step.stage))
    assert seen == [True, False] and {term.dtype for term in terms.values()} == {torch.float32}


# The code book -----------------------------------------------------------------------------------------------------


def used(step: Step, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts and sums of the batch's nearest codes, and the vectors, worked out one by one."""
    codec = step.stage.codec
    with torch.no_grad():
        z = codec.vq_base(codec.to_latent(batch.image)).z.permute(0, 2, 3, 1).flatten(0, 2)
    codes = codec.vq_base.quantize.embedding.weight
    counts, sums = torch.zeros(len(codes)), torch.zeros_like(codes)
    for vector in z:
        nearest = (codes - vector).square().sum(1).argmin()
        counts[nearest] += 1
        sums[nearest] += vector
    return counts, sums, z


@pytest.mark.parametrize("micro, ranks", [(1, 1), (3, 1), (3, 2)])
def test_the_code_book_moves_by_the_whole_batch(micro, ranks, monkeypatch):
    """n <- 0.99 n + 0.01 counts, m <- 0.99 m + 0.01 sums, once a step; codes are m / n but for the smoothing. A second
    rank has seen the same vectors."""
    monkeypatch.setattr("utils.distributed.all_reduce_sum", lambda t: t * ranks if t.ndim == 2 else t)
    step, progress = codec_step(f"codec.microbatch={micro}")
    book = step.stage.codec.vq_base.quantize.embedding
    batch = batch_of(step.stage, 3)
    counts, sums, _ = used(step, batch)
    n, m = book.cluster_size.clone(), book.embed_avg.clone()
    assert counts.sum() == 12 and counts.count_nonzero() > 1
    done = step(batch, progress)
    torch.testing.assert_close(book.cluster_size, 0.99 * n + 0.01 * ranks * counts, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(book.embed_avg, 0.99 * m + 0.01 * ranks * sums, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.weight, book.embed_avg / book.cluster_size[:, None], rtol=1e-3, atol=1e-3)
    share = counts[counts > 0] / 12
    assert done.numbers["perplexity"].item() == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-4)
    assert done.numbers["revived"] == 0 and not done.flags.dead


def test_a_dead_code_starts_anew_and_its_average_with_it():
    """It is seen dead in the step after the one in which its size fell below 0.01."""
    step, progress = codec_step()
    book, batch = step.stage.codec.vq_base.quantize.embedding, batch_of(step.stage)
    averages = step.averages.average
    book.cluster_size[5], book.weight[5], book.embed_avg[5] = 0.0101, 1e3, 1e3 * 0.0101
    averages["vq_base.quantize.embedding.weight"][5] = 1e3
    done = step(batch, progress)
    assert not done.flags.dead and book.cluster_size[5].item() == pytest.approx(0.99 * 0.0101)
    others = [i for i in range(16) if i != 5]
    before = averages["vq_base.quantize.embedding.weight"][others].clone()
    _, _, z = used(step, batch)
    done = step(batch, progress)
    assert done.flags.dead and done.numbers["revived"] == 1
    assert any(torch.allclose(book.weight[5], vector, atol=1e-4) for vector in z)
    assert book.cluster_size[5] == 1 and torch.equal(book.embed_avg[5], book.weight[5])
    for name in ("weight", "cluster_size", "embed_avg"):
        torch.testing.assert_close(averages[f"vq_base.quantize.embedding.{name}"][5], getattr(book, name)[5])
    decay = (1 + 1) / (10 + 1)  # the other codes' averages follow as ever
    expected = decay * before + (1 - decay) * book.weight[others]
    torch.testing.assert_close(averages["vq_base.quantize.embedding.weight"][others], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_first_step_places_every_code(micro):
    step, progress = codec_step(f"codec.microbatch={micro}", at=0)
    book, batch = step.stage.codec.vq_base.quantize.embedding, batch_of(step.stage)
    book.weight.fill_(0.5)
    _, _, z = used(step, batch)
    done = step(batch, progress)
    assert done.flags.dead and done.numbers["revived"] == 16
    distance = torch.cdist(book.weight, z).min(1).values
    assert distance.max() < 1e-4 and (book.cluster_size == 1).all()
    assert len(book.weight.unique(dim=0)) == len(z)  # 16 codes share the 8 vectors of this small batch
    average = step.averages.average["vq_base.quantize.embedding.weight"]
    torch.testing.assert_close(average, book.weight.data)


def test_codes_that_come_from_a_file_stay_in_the_first_step():
    step, progress = codec_step("vq_base=somewhere.pth", at=0)
    before = step.stage.codec.vq_base.quantize.embedding.weight.clone()
    assert step(batch_of(step.stage), progress).numbers["revived"] == 0
    moved = step.stage.codec.vq_base.quantize.embedding.weight - before
    assert moved.norm() < 0.1 * before.norm()
