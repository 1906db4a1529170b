"""Runs that are killed or asked to stop go on exactly as if they had not been, and stages end once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from models.released import Triple, load_triple
from tests.commands import NANO, ROOT, TRAIN, on_board, run
from tests.small_runs import command, interrupted, lines, train, tree
from training.checkpointing import Checkpoints, Point
from utils import checkpoints
from utils.images import read_image, to_signed


def kill_while_writing(process, folder: Path, chance: random.Random) -> bool:
    """Kill -9 a run at some moment while it writes a checkpoint; False if it ended before."""
    writes = chance.randrange(1, 20)
    seen: set[Path] = set()
    while process.is_alive():
        seen.update(path for sub in ("ckpts", "ema_ckpts", "states") for path in (folder / sub).glob(".*.tmp"))
        if len(seen) >= writes:
            time.sleep(chance.random() * 0.004)
            process.kill()
            process.join()
            return True
    return False


def flat(content) -> list:
    """Keys and values of nested dictionaries and lists, tensors as their bytes."""
    if isinstance(content, torch.Tensor):
        return [tuple(content.shape), content.numpy().tobytes()]
    if isinstance(content, dict):
        content = [part for item in content.items() for part in item]
    return [part for value in content for part in flat(value)] if isinstance(content, (list, tuple)) else [content]


def test_killed_again_and_again_while_saving(data, processes, saved_run, tmp_path):
    """A run that saves after every iteration, killed at random moments of saving, gives the trace of one left alone."""
    chance = random.Random(0)
    folder, args, kills = tmp_path / "nano", command(data, tmp_path), 0
    for _ in range(60):
        process = processes.Process(target=train, args=(args,))
        process.start()
        killed = kill_while_writing(process, folder, chance) if kills < 6 else process.join()
        if any((folder / "states").glob("*.pth")):
            args = ["--resume", str(folder)]
        if not killed and process.exitcode == 0:
            break
        assert killed, f"exit status {process.exitcode}: {(folder / 'train.log').read_text()}"
        kills += 1
    assert kills >= 4
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert lines(folder, name) == lines(saved_run, name)
    assert tree(folder) == tree(saved_run)
    for stage, score in (("gt", "psnr"), ("codec", "psnr_level_0")):
        told = [(e["step"], e[score]) for e in lines(folder, "validation.jsonl") if e["stage"] == stage]
        events = on_board(folder, f"{stage}-validation").Scalars(f"{stage}/{score}")
        assert told and [(event.step, pytest.approx(event.value)) for event in events] == told
    for name in ("states/codec_6.pth", "ema_ckpts/vq_model_6.pth.tar", "ckpts/model_6.pth"):
        assert flat(checkpoints.read(folder / name)) == flat(checkpoints.read(saved_run / name)), name


@pytest.mark.parametrize("gone", ["states/codec_4.pth", "ema_ckpts/vq_model_4.pth.tar"])
def test_killed_between_the_files_of_the_first_checkpoint_of_the_second_stage(gone, data, processes, tmp_path):
    """Both stages end at the same iteration, and share the file of the autoencoder."""
    args = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path), "--data", str(data), "--iterations", "4"]
    first = processes.Process(target=train, args=([*args, "gt.statistics=2"],))
    first.start()
    first.join()
    folder = tmp_path / "nano"
    trace = lines(folder, "metrics.jsonl")
    assert {path.name for path in (folder / "states").iterdir()} == {"gt_4.pth", "codec_4.pth"}
    (folder / gone).unlink()
    (folder / "states" / ".codec_4.begun").touch()
    again = processes.Process(target=train, args=(["--resume", str(folder)],))
    again.start()
    again.join()
    assert again.exitcode == 0 and lines(folder, "metrics.jsonl") == trace and (folder / gone).is_file()


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_stage_that_is_ended_early_is_ended_all_the_same(iterations, data, tmp_path, monkeypatch):
    """Its averages are taken and its latent is scaled, as at any end: the three files of the next stage fit together."""
    from main_diffusion_train_vq import main

    folder = interrupted(data, tmp_path, monkeypatch)
    assert Checkpoints(folder, ["gt", "codec"], 2).points()[-1] == Point("gt", 2)
    assert main(["--resume", str(folder), f"gt.iterations={iterations}", "codec.iterations=2"]) == 0
    assert {path.stem for path in (folder / "states").iterdir()} == {"gt_2", "codec_1", "codec_2"}
    codec = load_triple(Triple.of(folder / "ema_ckpts", 2))
    pictures = torch.stack([to_signed(read_image(path))[:, :64, :64] for path in sorted(data.iterdir())])
    deviation = codec.to_latent(pictures).std((0, 2, 3))
    assert ((0.5 < deviation) & (deviation < 2)).all(), deviation


def test_an_ended_autoencoder_is_not_trained_further(data, tmp_path, capsys):
    """What ends stage gt, averages and a scaled latent, cannot be taken back. Stage codec has nothing of the kind."""
    from main_diffusion_train_vq import main

    args = [*command(data, tmp_path), "gt.iterations=2", "codec.iterations=2"]
    assert main([*args, "stages=[gt]"]) == 0
    folder = str(tmp_path / "nano")
    assert main(["--resume", folder, "gt.iterations=3"]) == 1
    assert "stage gt has ended there" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "nano" / "best.json").read_text())["stage"] == "gt"
    assert main(["--resume", folder, "stages=[gt,codec]", "codec.iterations=1"]) == 0
    assert json.loads((tmp_path / "nano" / "best.json").read_text())["stage"] == "codec"
    assert main(["--resume", folder, "codec.iterations=2"]) == 0
    assert Checkpoints(tmp_path / "nano", ["gt", "codec"], 2).points()[-1] == Point("codec", 2)


def test_a_resumed_run_needs_no_file_that_it_started_from(data, saved_run, tmp_path, monkeypatch):
    from main_diffusion_train_vq import main

    start = tmp_path / "start.pth.tar"
    start.write_bytes((saved_run / "ema_ckpts" / "GT_vq_model_4.pth.tar").read_bytes())
    folder = interrupted(data, tmp_path, monkeypatch, f"autoencoder={start}")
    start.unlink()
    assert main(["--resume", str(folder), "codec.iterations=1"]) == 0


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_a_run_saves_and_goes_on_exactly(number, data, saved_run, tmp_path):
    """As schedulers ask, and Ctrl-C: with its workers, which get the signal too."""
    args = [sys.executable, str(TRAIN), *command(data, tmp_path), "data.workers=1", "save_every=100", "--auto_resume"]
    folder = tmp_path / "nano"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        args,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # where the tests themselves are told to ignore it
    )
    while process.poll() is None and not (folder / "metrics.jsonl").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in told, told
    assert "stopped as asked; go on with --resume" in told
    saved = Checkpoints(folder, ["gt", "codec"], 2).points()[-1]
    assert saved.step + (4 if saved.stage == "codec" else 0) == len(lines(folder, "metrics.jsonl")) < 10
    run(*args[1:])  # the same command: --auto_resume
    assert lines(folder, "metrics.jsonl") == lines(saved_run, "metrics.jsonl")


def test_a_run_killed_while_its_latent_is_measured_has_saved_before(data, tmp_path, monkeypatch):
    from main_diffusion_train_vq import main
    from training.gt_stage import GtStage

    def finish(self, batches):
        raise KeyboardInterrupt

    args = [*command(data, tmp_path), "save_every=100", "validation.folder=null"]
    whole, killed = tmp_path / "nano", tmp_path / "killed"
    assert main(args) == 0
    with monkeypatch.context() as patch:
        patch.setattr(GtStage, "finish", finish)
        main([*args, "name=killed"])
    assert Checkpoints(killed, ["gt", "codec"], 2).points() == [Point("gt", 4)]
    assert main(["--resume", str(killed)]) == 0
    assert lines(killed, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    for name in ("ema_ckpts/GT_vq_model_4.pth.tar", "ema_ckpts/vq_model_6.pth.tar"):
        assert flat(checkpoints.read(killed / name)) == flat(checkpoints.read(whole / name))


def test_resuming_tells_what_is_not_as_before(data, tmp_path, monkeypatch):
    from main_diffusion_train_vq import main

    folder = interrupted(data, tmp_path, monkeypatch)
    assert main(["--resume", str(folder), "gt.batch_size=1", "codec.iterations=1"]) == 0
    assert "a step took 2 pictures before and takes 1 from here on" in (folder / "train.log").read_text()


def test_an_autoencoder_that_is_not_rescaled_is_told(data, saved_run, tmp_path):
    """Checkpoints of stage gt before its last have a latent of any scale."""
    from main_diffusion_train_vq import main

    state = checkpoints.read(saved_run / "ckpts" / "GT_vq_model_4.pth.tar")["state_dict"]
    told = []
    for name, scale in (("last", 1.0), ("early", 2.0)):
        path = tmp_path / f"{name}.pth.tar"
        checkpoints.save(path, {"state_dict": state | {k: scale * v for k, v in state.items() if "quant_conv" in k}})
        args = [*command(data, tmp_path), f"name={name}", "stages=[codec]", "codec.iterations=1"]
        assert main([*args, f"autoencoder={path}"]) == 0
        told.append("the noise schedule is made for about 1" in (tmp_path / name / "train.log").read_text())
    assert told == [False, True]


@pytest.mark.parametrize("device", DEVICES)
def test_a_deterministic_run_goes_on_bit_for_bit(device, data, tmp_path):
    """With the device's own defaults of precision and layout, and the last iteration taken once more."""
    from main_diffusion_train_vq import main

    args = [*command(data, tmp_path / "whole"), "--device", device, "deterministic=true", "gt.adversary.weight=0.8"]
    assert main([*args, "gt.adversary.start=1"]) == 0
    whole, again = tmp_path / "whole" / "nano", tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "states" / "codec_6.pth").unlink()
    assert main(["--resume", str(again), "--device", device]) == 0
    assert lines(again, "metrics.jsonl") == lines(whole, "metrics.jsonl")
    ours, theirs = (checkpoints.read(folder / "states" / "codec_6.pth")["codec"] for folder in (again, whole))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
