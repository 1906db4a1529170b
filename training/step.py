"""One update, the same in every stage: micro-batches, gradients over ranks, one look at the flags, updates, averages."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from datapipe.pictures import Batch
from training.adversary import Adversary
from training.graphs import Graphs
from training.optimiser import Optimiser
from training.parallel import accumulate, average_gradients, micro_batches, parallel, settle, synchronised
from training.progress import Progress
from training.stage import Stage
from utils import distributed
from utils.ema import Ema
from utils.errors import CheckpointError, NotFinite


@dataclass(frozen=True)
class Flags:
    """What a step that is finite has waited for: whether a rank is asked to stop, a code is dead; the main process's
    clock, in seconds."""

    stop: bool
    dead: bool
    seconds: float


@dataclass(frozen=True)
class Passed:
    """What forward and backward passes over a batch leave beside the gradients, on the device.

    Attributes:
        terms: means over the batch, scalars. seen: results of its micro-batches. restored: N x 3 x H x W, or None.
        factor: of the adversary's term; None without one.
    """

    terms: dict[str, Tensor]
    seen: list
    restored: Tensor | None
    factor: Tensor | None


@dataclass(frozen=True)
class Done:
    """An update that was made.

    Attributes:
        flags: of the step. means: terms over all ranks, scalars on the device. numbers: further scalars to log.
        seen: results of its micro-batches. image, restored: N x 3 x H x W; nothing is restored without a term of it.
    """

    flags: Flags
    means: dict[str, Tensor]
    numbers: dict[str, Tensor | float]
    seen: list
    image: Tensor
    restored: Tensor | None


class Step:
    """Updates the networks of a stage.

    Attributes:
        averages: exponential averages of `stage.trained`, which are validated and released.
    """

    def __init__(self, stage: Stage):
        p = stage.params
        self.stage, self.speed = stage, stage.speed
        self.model = parallel(stage.network, self.speed.graphs)
        self.averages = Ema(stage.trained, p.ema)
        self.optimiser = Optimiser(
            stage.network.named_parameters(), p.optim, p.iterations, self.speed.fused_adamw, stage.shares
        )
        self.adversary = Adversary(p, stage.last_layer, self.speed) if p.adversary.weight else None
        judging = list(self.adversary.discriminator.parameters()) if self.adversary else []
        own = [parameter for parameter in (*stage.network.parameters(), *judging) if parameter.requires_grad]
        self.graphs = Graphs(own) if self.speed.graphs else None
        settle(self.model, lambda: self.rehearse(self.blank()))
        if self.adversary:
            self.adversary.settle(self.blank().image)

    def __call__(self, batch: Batch, progress: Progress, stop: bool = False) -> Done:
        """One update.

        Args:
            batch: of this rank, on the device. stop: this process is asked to; every rank learns it from the flags.
        Raises:
            NotFinite: a term or a gradient is not, on every rank alike; nothing was updated.
        """
        at, stage = progress.at, self.stage
        adversary = self.adversary if self.adversary and self.adversary.joins(at) else None
        self.optimiser.zero_grad()
        passed = self._passed(batch, adversary)
        terms, seen, restored = passed.terms, passed.seen, passed.restored
        numbers = {"grad_norm": self.optimiser.clip(), "lr": self.optimiser.lr(at)}
        if adversary:
            discriminator_norm = adversary.optimiser.clip()
            numbers |= {"adversarial_factor": passed.factor, "discriminator_grad_norm": discriminator_norm}
        statistics = stage.gathered(seen, progress.step)
        dead = terms["loss"].new_zeros(()) if statistics is None else statistics.dead

        flags, means = self._flags(terms, numbers, dead, stop, progress)
        self.optimiser.update(at)
        if adversary:
            adversary.optimiser.update(at)
        numbers |= stage.follow(statistics, flags.dead, progress.step, self.averages)
        self.averages.update()
        progress.advance(flags.seconds)
        return Done(flags, means, numbers, seen, batch.image, restored)

    def _passed(self, batch: Batch, adversary: Adversary | None) -> Passed:
        """`passes`, by a graph where one can be recorded."""
        passes = partial(self.passes, adversary=adversary)
        if not self.graphs:
            return passes(batch)
        kind = None if adversary and not adversary.recordable else self.stage.kind(batch)
        passed = passes(batch) if kind is None else self.graphs(passes, batch, (kind, adversary is not None))
        average_gradients(self.graphs.parameters)  # in DDP's place
        return passed

    def passes(self, batch: Batch, adversary: Adversary | None) -> Passed:
        """Forward and backward passes over a batch in micro-batches, an adversary's own among them."""
        parts = micro_batches(len(batch), self.stage.params.microbatch)
        terms, seen, factor = {}, [], None
        for part in parts:
            piece, share = batch[part], (part.stop - part.start) / len(batch)
            with synchronised(self.model, part is parts[-1]):
                out, own = self.losses(piece)
                objective = own["loss"] + own.get("auxiliary", 0)
                if adversary:
                    own["adversarial"] = adversary.generator_term(out.image)
                    if factor is None:  # of the first micro-batch, for all of them
                        factor = adversary.factor(own["loss"], own["adversarial"], self.stage.last_layer)
                    objective = objective + factor * own["adversarial"]
                (share * objective).backward()
            accumulate(terms, own, share)
            seen.append(self.stage.kept(out, piece))
        restored = None if out.image is None else torch.cat([one.image for one in seen])
        if adversary:
            terms["discriminator"] = adversary.judge(batch.image, restored, parts)
        return Passed(terms, seen, restored, factor)

    def losses(self, batch: Batch) -> tuple:
        """The stage's forward pass, under DDP and autocast, and its terms, in float32."""
        with self.speed.autocast():
            out = self.stage.forward(self.model, batch)
        return out, self.stage.losses(out, batch)

    def _flags(self, terms: dict, numbers: dict, dead: Tensor, stop: bool, progress: Progress) -> tuple[Flags, dict]:
        """The flags, in the one wait of a step, and the terms' means over the ranks."""
        seconds = progress.clock() if distributed.is_main() else 0.0
        scalars = torch.stack([term.double() for term in terms.values()])
        # Filled on the device: a copy from the host would be a second wait.
        own = [scalars.new_full((1,), value) for value in (float(stop), seconds)]
        together = distributed.all_reduce_sum(torch.cat([scalars, *own]))
        means = together[: len(terms)] / distributed.world_size()
        norms = [value for name, value in numbers.items() if name.endswith("grad_norm")]
        whole = torch.cat([means, torch.stack(norms).double()]).isfinite().all()
        flags = torch.stack([whole.double(), together[-2], dead.double(), together[-1]])
        finite, stopped, died, now = flags.tolist()
        named = dict(zip(terms, means, strict=True))
        if not finite:
            broken = [name for name, value in (named | numbers).items() if not math.isfinite(value)]
            raise NotFinite(
                f"stage {self.stage.name}, step {progress.step}: the term {broken[0]} is not finite; nothing was "
                "updated with it"
            )
        return Flags(stopped > 0, died > 0, now), named

    def logs(self, done: Done) -> dict[str, float]:
        """The scalars of an update, fetched from the device; a collective."""
        numbers = done.means | done.numbers
        values = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in numbers.values()]).tolist()
        return dict(zip(numbers, values, strict=True)) | self.stage.logs(done.seen)

    def finish(self, batches) -> None:
        """The averages take the trained weights' place for good, and the stage's last pass changes them."""
        self.averages.copy_to(self.stage.trained)
        self.stage.finish(batches)
        self.averages.average = self.stage.trained.state_dict()  # one and the same from here on, and saved once

    # Passes whose result nobody wants: DDP's first, and memory by shapes alone ----------------------------------------

    def blank(self) -> Batch:
        """A micro-batch of grey pictures, on the networks' device and in their precision."""
        p, like = self.stage.params, self.stage.last_layer
        count = micro_batches(p.batch_size, p.microbatch)[0].stop
        size = (p.crop_size, p.crop_size)
        batch = Batch(like.new_zeros(count, 3, *size), torch.arange(count), self.stage.drawn(range(count), size))
        return batch.to(like.device)

    def rehearse(self, batch: Batch) -> Tensor:
        """The objective of a micro-batch, the adversary's term included."""
        out, own = self.losses(batch)
        objective = own["loss"] + own.get("auxiliary", 0)
        return objective + self.adversary.generator_term(out.image) if self.adversary else objective

    def state_dict(self) -> dict:
        state = {"updates": self.averages.updates, "optimiser": self.optimiser.state_dict()}
        return state | ({"adversary": self.adversary.state_dict()} if self.adversary else {})

    def load_state_dict(self, state: dict, averages: dict[str, dict[str, Tensor]]) -> None:
        """Go on from a saved state and averages by network; an adversary that it does not have starts anew.

        Raises:
            CheckpointError: other parameters were trained.
        """
        average = {f"{network}.{key}": value for network, own in averages.items() for key, value in own.items()}
        sizes = [
            [len(group["params"]) for group in s["param_groups"]]
            for s in (self.optimiser.state_dict(), state["optimiser"])
        ]
        if average.keys() != self.averages.average.keys() or sizes[0] != sizes[1]:
            raise CheckpointError(
                f"stage {self.stage.name}: the checkpoint trains other parameters; what decides that, such as "
                "train_decoder, stays as it was when the stage began"
            )
        self.averages.load_state_dict({"updates": state["updates"], "average": average})
        self.optimiser.load_state_dict(state["optimiser"])
        if self.adversary and "adversary" in state:
            self.adversary.load_state_dict(state["adversary"])
