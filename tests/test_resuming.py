"""Runs that are killed or asked to stop go on exactly as if they had not been, and stages end once."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from main_diffusion_train_vq import main
from models.released import Triple, load_triple
from tests.commands import on_board
from tests.small_runs import command, finished, interrupted, lines, quick, train, tree
from training.checkpointing import Checkpoints, Point
from training.step import Step
from utils import checkpoints
from utils.images import read_image, to_signed


def points(folder: Path) -> list[Point]:
    return Checkpoints(folder, ["gt", "codec"], 2).points()


def kill_while_writing(process, folder: Path, chance: random.Random) -> bool:
    """Kill -9 a run at some moment while it writes a checkpoint; False if it ended before."""
    writes = chance.randrange(1, 8)
    seen: set[Path] = set()
    while process.is_alive():
        seen.update(path for sub in ("ema_ckpts", "checkpoints") for path in (folder / sub).glob(".*.tmp"))
        if len(seen) >= writes:
            time.sleep(chance.random() * 0.004)
            process.kill()
            process.join()
            return True
    return False


def flat(content) -> list:
    """Keys and values of nested dictionaries and lists, tensors as their bytes."""
    if isinstance(content, torch.Tensor):
        return [tuple(content.shape), content.contiguous().numpy().tobytes()]
    if isinstance(content, dict):
        content = [part for item in content.items() if item[0] != "seconds" for part in item]
    return [part for value in content for part in flat(value)] if isinstance(content, (list, tuple)) else [content]


def assert_same(folder: Path, whole: Path) -> None:
    """The same files, with the same numbers in them."""
    assert tree(folder) == tree(whole)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(folder, name) == lines(whole, name)
    for name in ("checkpoints/codec_6.pth", "ema_ckpts/vq_model_6.pth.tar", "ema_ckpts/ema_model_6.pth"):
        assert flat(checkpoints.read(folder / name)) == flat(checkpoints.read(whole / name)), name


def test_killed_again_and_again_while_saving(data, processes, saved_run, tmp_path):
    """A run that saves after every iteration, killed at random moments of saving, gives the trace of one left alone.

    It goes on at once, while the process that decoded for the killed one is still there.
    """
    chance = random.Random(0)
    folder, args, kills = tmp_path / "nano", command(data, tmp_path, "data.workers=1"), 0
    for _ in range(60):
        process = processes.Process(target=train, args=(args,))
        process.start()
        killed = kill_while_writing(process, folder, chance) if kills < 5 else process.join()
        if any((folder / "checkpoints").glob("*.pth")):
            args = ["--resume", str(folder)]
        if not killed and process.exitcode == 0:
            break
        assert killed, f"exit status {process.exitcode}: {(folder / 'train.log').read_text()}"
        kills += 1
        if (folder / "metrics.jsonl").exists():
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"stage": "cod')  # a line that was cut
    assert kills >= 3
    assert_same(folder, saved_run)
    for stage, score in (("gt", "psnr"), ("codec", "psnr_level_0")):
        told = [(e["step"], e[score]) for e in lines(folder, "validation.jsonl") if e["stage"] == stage]
        events = on_board(folder, f"{stage}-validation").Scalars(f"{stage}/{score}")
        assert told and [(event.step, pytest.approx(event.value)) for event in events] == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_saves_and_goes_on_exactly(number, data, processes, saved_run, tmp_path):
    """As schedulers ask, and Ctrl-C: with its workers, which are in sessions of their own."""
    folder, told = tmp_path / "nano", tmp_path / "stderr"
    args = command(data, tmp_path, "data.workers=1", "save_every=100", "--auto_resume")
    process = processes.Process(target=train, args=(args, str(told)))
    process.start()
    while process.is_alive() and not (folder / "metrics.jsonl").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number and "Traceback" not in told.read_text(), told.read_text()
    assert "stopped as asked; go on with --resume" in told.read_text()
    saved = points(folder)[-1]
    assert saved.step + (4 if saved.stage == "codec" else 0) == len(lines(folder, "metrics.jsonl")) < 10
    assert finished(processes, args) == 0  # the same command: --auto_resume
    assert lines(folder, "metrics.jsonl") == lines(saved_run, "metrics.jsonl")


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stage_that_is_ended_early_is_ended_all_the_same(iterations, data, tmp_path, monkeypatch):
    """Its averages are taken and its latent is scaled, as at any end: the three files of the next stage fit together.

    And a resumed run says that a step is another one now.
    """
    folder = interrupted(data, tmp_path, monkeypatch)
    assert points(folder)[-1] == Point("gt", 2)
    assert main(["--resume", str(folder), f"gt.iterations={iterations}", "codec.iterations=2", "gt.batch_size=1"]) == 0
    assert set(points(folder)) == {Point("gt", 2), Point("codec", 1), Point("codec", 2)}
    codec = load_triple(Triple.of(folder / "ema_ckpts", 2))
    pictures = torch.stack([to_signed(read_image(path))[:, :64, :64] for path in sorted(data.iterdir())])
    deviation = codec.to_latent(pictures).std((0, 2, 3))
    assert ((0.5 < deviation) & (deviation < 2)).all(), deviation
    assert "a step took 2 pictures before and takes 1 from here on" in (folder / "train.log").read_text()


def test_an_ended_stage_stays_ended(data, tmp_path, capsys):
    """The end of stage gt, averages and a scaled latent, cannot be taken back. Stage codec has nothing of the kind.

    The best of an ended stage is no longer named when the next one saves without a validation of its own.
    """
    args = quick(data, tmp_path, "gt.iterations=2", f"validation.folder={data}", "stages=[gt]")
    assert main(args) == 0
    folder, best = tmp_path / "nano", tmp_path / "nano" / "best.json"
    assert main(["--resume", str(folder), "gt.iterations=3"]) == 1
    assert "stage gt has ended there" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads(best.read_text())["stage"] == "gt"
    unscored = ["stages=[gt,codec]", "codec.iterations=1", "validation.folder=null"]
    assert main(["--resume", str(folder), *unscored]) == 0 and not best.exists()
    scored = ["codec.iterations=3", "save_every=100", f"validation.folder={data}"]  # at step 2, saved as the best
    assert main(["--resume", str(folder), *scored]) == 0
    assert points(folder)[-2:] == [Point("codec", 2), Point("codec", 3)]
    assert json.loads(best.read_text())["stage"] == "codec"


@pytest.mark.parametrize("where, name", [(Step, "finish"), (Checkpoints, "save_averages")])
def test_a_stage_killed_at_its_end_is_ended_on_resuming(where, name, data, tmp_path, monkeypatch):
    """While its latent is measured: it has saved before. After it: no checkpoint is finished without its averages."""

    def killed(*_):
        raise KeyboardInterrupt

    args = quick(data, tmp_path, "save_every=100", "stages=[gt]")
    whole, killed_run = tmp_path / "nano", tmp_path / "killed"
    assert main(args) == 0
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        assert main([*args, "name=killed"]) == 130
    assert points(killed_run) == [Point("gt", 4)]
    assert main(["--resume", str(killed_run)]) == 0
    assert lines(killed_run, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    ours, theirs = (checkpoints.read(f / "ema_ckpts" / "gt" / "GT_vq_model_4.pth.tar") for f in (killed_run, whole))
    assert flat(ours) == flat(theirs)


def test_a_resumed_run_needs_no_file_that_it_started_from(data, saved_run, tmp_path, monkeypatch):
    start = Path(shutil.copy(saved_run / "ema_ckpts" / "gt" / "GT_vq_model_4.pth.tar", tmp_path / "start.pth.tar"))
    folder = interrupted(data, tmp_path, monkeypatch, f"autoencoder={start}")
    start.unlink()
    assert main(["--resume", str(folder), "codec.iterations=1"]) == 0


def test_stage_codec_starts_from_the_named_files_after_stage_gt_was_resumed(data, saved_run, tmp_path, monkeypatch):
    start = saved_run / "ema_ckpts" / "ema_model_6.pth"
    folder = interrupted(data, tmp_path, monkeypatch, f"unet={start}")
    assert main(["--resume", str(folder), "codec.iterations=1", "codec.optim.lr=1e-9"]) == 0
    ours, theirs = checkpoints.read(folder / "checkpoints" / "codec_1.pth")["codec"]["unet"], checkpoints.read(start)
    assert all(torch.allclose(ours[key], value, atol=1e-7) for key, value in theirs["state_dict"].items())


def test_asked_in_its_last_step_a_stage_stops_before_the_next(data, tmp_path, monkeypatch):
    plain = Step.__call__

    def asked(self, batch, progress, stop=False):
        done = plain(self, batch, progress, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        return done

    monkeypatch.setattr(Step, "__call__", asked)
    assert main(quick(data, tmp_path, "gt.iterations=1", "codec.iterations=1")) == 128 + signal.SIGTERM
    assert points(tmp_path / "nano") == [Point("gt", 1)]


def test_overrides_that_do_not_fit_are_told_and_leave_the_run_as_it_was(data, tmp_path, capsys):
    """An adversary that joins late starts anew. The learning rate, from 1e-3 to 1e-4, follows the longer stage."""
    folder = tmp_path / "nano"
    assert main(quick(data, tmp_path, "gt.iterations=1", "codec.iterations=1")) == 0
    resume = ["--resume", str(folder), "codec.iterations=2"]
    for override, told in (
        ("codec.train_decoder=0.1", "stage codec: the checkpoint trains other parameters"),
        ("networks.unet.groups=2", "codec 1: of other networks: unet.groups 2 for 4"),
    ):
        assert main([*resume, override]) == 1 and told in capsys.readouterr().err.splitlines()[-1]
    assert main([*resume, "codec.adversary={weight: 0.5, start: 0}"]) == 0
    assert "adversarial" in lines(folder, "metrics.jsonl")[-1]
    told = "it was 0.001 at the end, goes on at 0.00055 and ends at 0.0001"
    assert told in (folder / "train.log").read_text()  # half of the cosine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; on a CPU every run is exact, see above")
def test_a_deterministic_run_on_cuda_goes_on_bit_for_bit(data, tmp_path):
    """With the device's own defaults of precision and layout, and the last iteration taken once more."""
    assert main(command(data, tmp_path / "whole", "--device", "cuda", "deterministic=true")) == 0
    whole, again = tmp_path / "whole" / "nano", tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "checkpoints" / "codec_6.pth").unlink()
    assert main(["--resume", str(again), "--device", "cuda"]) == 0
    assert_same(again, whole)
