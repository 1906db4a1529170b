"""The command main_diffusion_train_vq.py and the release made from its run, as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from release import load_codec
from tests.commands import NANO, ROOT, TRAIN, free_port, on_board, run
from utils import checkpoints


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of both stages on one process, without torchrun."""
    save_dir = tmp_path_factory.mktemp("runs")
    run(TRAIN, "--cfg_path", NANO, "--save_dir", save_dir, "--data", data, "--steps", 2)
    return save_dir / "nano"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    return [(m["stage"], m["step"], m["loss"]) for m in metrics(folder)]


def test_a_run_leaves_what_it_promises(finished):
    steps = [(m["stage"], m["step"]) for m in metrics(finished)]
    assert steps == [(stage, step) for stage in ("gt", "codec") for step in range(10)]
    assert {"loss", "distortion", "perplexity", "grad_norm", "lr"} <= set(metrics(finished)[-1])
    assert "discriminator" in metrics(finished)[9] and "discriminator" not in metrics(finished)[3]
    names = {p.name for p in (finished / "ema_ckpts").iterdir()}
    assert {"ema_model_10.pth", "vq_model_10.pth.tar", "GT_vq_model_10.pth.tar"} <= names
    names = {p.name for p in (finished / "ckpts").iterdir()}
    assert {"model_10.pth", "vq_model_10.pth.tar", "GT_vq_model_10.pth.tar"} <= names
    assert (finished / "train.log").read_text()
    assert yaml.safe_load((finished / "config.yaml").read_text())["networks"]["diffusion"]["steps"] == 2
    assert not list(finished.rglob("*.tmp"))


def assert_board_shows_the_lines(folder: Path) -> None:
    """The same numbers as in metrics.jsonl, each once."""
    for stage in ("gt", "codec"):
        board = on_board(folder, stage)
        lines = [m for m in metrics(folder) if m["stage"] == stage]
        tags = {f"{stage}/{key}" for line in lines for key in line} - {f"{stage}/stage", f"{stage}/step"}
        assert set(board.Tags()["scalars"]) == tags
        for tag in tags:
            told = [(m["step"], m[tag.split("/")[1]]) for m in lines if tag.split("/")[1] in m]
            shown = [(event.step, event.value) for event in board.Scalars(tag)]
            assert [step for step, _ in shown] == [step for step, _ in told], tag
            assert [value for _, value in shown] == pytest.approx([value for _, value in told], rel=1e-6), tag
        assert [event.step for event in board.Images(f"{stage}/pictures")] == [0, 5]


def test_tensorboard_shows_the_lines_and_pictures(finished):
    assert_board_shows_the_lines(finished)
    picture = on_board(finished, "codec").Images("codec/pictures")[0]
    assert (picture.width, picture.height) == (2 * 64, 2 * 64)  # two samples; originals above, results below


def test_the_codec_stage_leaves_the_autoencoder_alone(finished):
    states = [
        checkpoints.read(finished / folder / name)["state_dict"]
        for folder, name in [("ckpts", "GT_vq_model_8.pth.tar"), ("ema_ckpts", "GT_vq_model_10.pth.tar")]
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_release_and_code_with_it(finished, data, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"autoencoder": str(data / "start.pth.tar")}))
    run("-m", "release", folder, tmp_path / "mine", "--data", data, "--crops", 16)
    about = json.loads((tmp_path / "mine" / "release.json").read_text())
    codec = load_codec(tmp_path / "mine")
    assert codec.fingerprint.hex() == about["fingerprint"]
    assert codec.base_table.sum() == 2**16 and (codec.base_table > 0).all()
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    assert codec.decompress(codec.compress(image)).shape == image.shape
    told = (tmp_path / "mine" / "config.yaml").read_text()
    assert str(data) not in told and yaml.safe_load(told)["autoencoder"] == "start.pth.tar"


def test_resume_after_a_kill_gives_the_same_losses(finished, data, tmp_path):
    """Killed at some moment in the second stage, then resumed: the same trace as the run that was never stopped."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, TRAIN, "--cfg_path", NANO, "--save_dir", tmp_path, "--data", data, "--steps", "2"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    folder = tmp_path / "nano"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and '"codec", "step": 5' in (folder / "metrics.jsonl").read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "states" / "codec_4.pth").exists()
    run(TRAIN, "--resume", folder)
    assert losses(folder) == losses(finished)
    assert_board_shows_the_lines(folder)
    ours, theirs = (checkpoints.read(f / "ema_ckpts" / "vq_model_10.pth.tar")["state_dict"] for f in (folder, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_twenty_steps_on_two_gloo_processes(data, tmp_path):
    """Two ranks train as one: the same first loss as one process with twice the batch, and equal parameters."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--nnodes=1", f"--master_port={free_port()}"]
    shared = ["--cfg_path", NANO, "--data", data, "--steps", 2, "--iterations", 20, "gt.adversary.start=30"]
    run(*launch, TRAIN, *shared, "--save_dir", tmp_path / "two", "gt.batch_size=1", "codec.batch_size=1")
    run(TRAIN, *shared, "--save_dir", tmp_path / "one")
    two, one = (metrics(tmp_path / name / "nano") for name in ("two", "one"))
    assert [m["step"] for m in two] == [m["step"] for m in one]
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    last = [
        checkpoints.read(tmp_path / n / "nano" / "ckpts" / "GT_vq_model_20.pth.tar")["state_dict"]
        for n in ("two", "one")
    ]
    for key, value in last[1].items():
        assert torch.allclose(last[0][key], value, atol=2e-3), key


@pytest.mark.parametrize(
    "args, told",
    [
        (["--cfg_path", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["--cfg_path", NANO, "codec.learning_rate=1"], "unknown key learning_rate"),
        (["--cfg_path", NANO, "codec.forward=backward"], "'backward' is none of published, decoder"),
        (["--cfg_path", NANO, "codec.iterations=many"], "expected int"),
        (["--cfg_path", NANO, "rubbish"], "key=value"),
        (["--cfg_path", NANO, "--device", "cuda:99"], "--device cuda:99"),
        (["--cfg_path", NANO, "--steps", 2, "networks.diffusion.steps=5"], "networks.diffusion.steps as well"),
        (["--cfg_path", NANO, "--data", ROOT / "docs", "data.shards=x.tar"], "data.shards as well"),
        (["--cfg_path", NANO, "codec.optim.lr"], "for instance codec.optim.lr=1e-4"),
        (["--cfg_path", NANO, "gt.statistics=0"], "statistics 0: at least 1"),
        (["--cfg_path", NANO, "gt.crop_size=16"], "the PatchGAN (adversary.weight) needs 32 pixels"),
        (["--cfg_path", NANO, "codec.last_step_share=90"], "last_step_share 90.0: in [0, 1]"),
        (["--cfg_path", NANO, "codec.commitment=-1"], "commitment -1.0: from 0 up"),
        (["--cfg_path", NANO, "--data", "nowhere"], "nowhere: no such folder"),
        (["--cfg_path", NANO, "networks.vq_base.codebook_size=300"], "power of two"),
        (["--cfg_path", NANO, "networks.unet.latent_channels=4"], "must equal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_one_line(args, told, tmp_path, capsys):
    from main_diffusion_train_vq import main

    status = main([str(a) for a in [*args, "--save_dir", tmp_path]])
    error = capsys.readouterr().err
    assert status == 1 and told in error, error
    assert error.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("folder", ["nowhere", ROOT / "weights" / "tiny-2"])
def test_what_is_no_run_is_not_resumed(folder, capsys):
    from main_diffusion_train_vq import main

    assert main(["--resume", str(folder)]) == 1
    assert f"{folder}: not a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, told", [(["--save_dir", "x"], "--save_dir"), (["--auto_resume"], "--auto_resume"), (["name=x"], "name=")]
)
def test_resuming_is_in_the_runs_own_folder(given, told, finished, capsys):
    from main_diffusion_train_vq import main

    with pytest.raises(SystemExit):
        main(["--resume", str(finished), *given])
    assert f"leave out {told}" in capsys.readouterr().err


def test_lpips_without_weights_stops_at_once(tmp_path, capsys, monkeypatch):
    from main_diffusion_train_vq import main

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    status = main(["--cfg_path", str(NANO), "--save_dir", str(tmp_path), "gt.perceptual=lpips"])
    error = capsys.readouterr().err
    assert status == 1 and "reproduce.py weights" in error and "ms_ssim" in error


def test_a_run_folder_is_not_overwritten(finished, capsys):
    from main_diffusion_train_vq import main

    assert main(["--cfg_path", str(NANO), "--save_dir", str(finished.parent)]) == 1
    assert "--resume" in capsys.readouterr().err


def test_a_validation_that_is_not_finite_stops_with_its_picture(data, tmp_path, capsys):
    from main_diffusion_train_vq import main

    args = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path), "--data", str(data), "gt.optim.lr=1e30"]
    assert main([*args, f"validation.folder={data}", "validation.every=1"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: validation, the picture 0.png") and "failed_state.pth" in told
    assert checkpoints.read(tmp_path / "nano" / "failed_state.pth")["step"] == 1


def test_a_loss_that_is_not_finite_stops_with_its_name(data, tmp_path, capsys):
    from main_diffusion_train_vq import main

    args = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path), "--data", str(data), "gt.optim.lr=1e30"]
    assert main(args) == 1
    assert "is not finite" in capsys.readouterr().err
