"""A run of both stages that ends by the clock, through the commands: stopped, resumed, released; what its files hold."""

import math
import os
import signal

import pytest
import torch

from main_diffusion_train_vq import main
from tests.commands import NANO
from tests.small_runs import lines
from training.gt_stage import GtStage
from training.step import Step
from utils import checkpoints


@pytest.fixture(scope="module")
def stopped_run(data, tmp_path_factory):
    """Folder of a run that was asked to stop in its first step, and went on afterwards; its checkpoint of then."""
    save_dir, plain, finish, measured = tmp_path_factory.mktemp("runs"), Step.__call__, GtStage.finish, []

    def stopped(self, batch, progress, stop=False):
        if progress.step == 0 and self.stage.name == "gt":
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch, progress, stop)

    def measuring(self, batches):
        batches = list(batches)
        measured.extend(batch.position.tolist() for batch in batches)
        finish(self, batches)

    clock = ("gt.minutes=0.05", "codec.minutes=0.05", "gt.iterations=1000", "codec.iterations=1000")
    options = (*clock, "gt.adversary.weight=0", "gt.statistics=3", "save_every=1", "keep_last=4")
    options += ("networks.autoencoder.shortcut=linear",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", stopped)
        patch.setattr(GtStage, "finish", measuring)
        status = main(
            ["--cfg_path", str(NANO), "--save_dir", str(save_dir), "--data", str(data), "--steps", "2", *options]
        )
        folder = save_dir / "nano"
        assert status == 128 + signal.SIGTERM
        saved = newest(folder, "gt")
        assert main(["--resume", str(folder)]) == 0
    assert measured == [[0, 1], [2, 3]]  # three pictures for the latent's moments, from the stream's beginning
    return folder, saved


def newest(folder, stage: str, back: int = 0) -> dict:
    """Content of a stage's newest checkpoint, or of one before it."""
    steps = sorted(int(path.stem.partition("_")[2]) for path in (folder / "checkpoints").glob(f"{stage}_*.pth"))
    return checkpoints.read(folder / "checkpoints" / f"{stage}_{steps[-1 - back]}.pth")


def test_it_ends_by_the_clock_and_says_so(stopped_run):
    folder, stopped = stopped_run
    told = (folder / "train.log").read_text()
    assert told.count("this stage ends by the clock: it is not repeatable step by step") == 3  # gt, gt resumed, codec
    assert told.count("linear shortcut: ") == 1  # fitted before the first step, not when it goes on
    assert "stopped as asked" in told and f"finished: {folder}" in told
    assert 0 < stopped["seconds"] < 3  # what was left when it stopped was trained afterwards
    for stage in ("gt", "codec"):
        saved = newest(folder, stage)
        assert 3 <= saved["seconds"] < 20 and saved["position"] == 2 * saved["step"]
        steps = [entry["step"] for entry in lines(folder, "metrics.jsonl") if entry["stage"] == stage]
        assert steps == list(range(saved["step"]))


def test_schedules_run_over_the_time(stopped_run):
    """lr falls from 1e-3 to 1e-4 as a cosine over the seconds of a stage, those before the stop included."""
    folder, stopped = stopped_run
    entries = lines(folder, "metrics.jsonl")
    for saved in (stopped, newest(folder, "codec", back=1)):
        (rate,) = (e["lr"] for e in entries if (e["stage"], e["step"]) == (saved["stage"], saved["step"]))
        share = 0.5 * (1 + math.cos(math.pi * saved["seconds"] / 3))
        assert rate == pytest.approx(1e-4 + 9e-4 * share, rel=1e-6) and rate < 1e-3


def test_files_hold_the_averages(stopped_run):
    """average <- d average + (1 - d) weights from one checkpoint to the next; ema_ckpts hold the averages."""
    folder, _ = stopped_run
    before, after = newest(folder, "codec", back=1), newest(folder, "codec")
    assert after["step"] == before["step"] + 1
    decay = min(0.999, (1 + before["step"]) / (10 + before["step"]))
    for network, state in after["codec"].items():
        for key, value in state.items():
            expected = decay * before["averages"][network][key] + (1 - decay) * value
            torch.testing.assert_close(after["averages"][network][key], expected, rtol=1e-4, atol=1e-6)
    name = {"unet": "ema_model_{}.pth", "vq_base": "vq_model_{}.pth.tar"}
    for network, pattern in name.items():
        written = checkpoints.read(folder / "ema_ckpts" / pattern.format(after["step"]))["state_dict"]
        assert all(torch.equal(value, after["averages"][network][key]) for key, value in written.items())
        assert any(not torch.equal(value, after["codec"][network][key]) for key, value in written.items())
    gt = newest(folder, "gt")  # finished: averages in the weights' place, as stage codec takes them
    frozen, written = (
        after["autoencoder"],
        checkpoints.read(folder / "ema_ckpts" / "gt" / f"GT_vq_model_{gt['step']}.pth.tar"),
    )
    for key, value in gt["averages"]["autoencoder"].items():
        assert torch.equal(value, frozen[key]) and torch.equal(value, written["state_dict"][key])
        assert torch.equal(value, gt["codec"]["autoencoder"][key])
