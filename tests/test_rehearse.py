"""The rehearsal of a training: its commands with the smallest networks, what it measures, and what it refuses."""

import json

import pytest
from PIL import Image

import inference
import main_diffusion_train_vq
from benchmarks import rehearse
from release.__main__ import main as release
from tests.commands import NANO
from training.config import load_config
from utils.errors import DiffoError

MAINS = {"main_diffusion_train_vq.py": main_diffusion_train_vq.main, "inference.py": inference.main}


def call_here(command, log):
    """A command in this process, which saves the seconds of starting one."""
    return (release(command[2:]) if command[0] == "-m" else MAINS[command[0]](command[1:])), 1.0


def test_a_rehearsal_goes_from_pictures_to_a_coded_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearse, "call", call_here)
    command = ["--config", str(NANO), "--iterations", "4", "--device", "cpu", "-o", str(tmp_path), "gt.crop_size=32"]
    assert rehearse.main([*command, "codec.crop_size=32"]) == 0
    told = json.loads((tmp_path / "rehearsal.json").read_text())
    steps = ["settings, pictures, memory", "gt", "codec", "codec, resumed", "release", "one picture coded"]
    assert [row["step"] for row in told["rows"]] == steps
    assert [row["step"] for row in told["rows"] if "pictures/s" in row] == steps[1:4]
    assert told["about"]["other than configured"] == "gt.batch_size=1 gt.statistics=8 codec.batch_size=1"
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in metrics] == [(s, i) for s in ("gt", "codec") for i in range(4)]
    assert "resumed after codec 2" in (tmp_path / "run" / "train.log").read_text()
    with Image.open(tmp_path / "coded" / "chelsea.png") as picture:
        assert picture.size == (451, 300)
    assert "the whole of stage codec: 0.0 hours" in capsys.readouterr().out
    rehearse.emptied(tmp_path)  # for the next one
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_speed_and_losses_of_what_a_command_has_logged():
    lines = [{"loss": loss} for loss in (8.0, 6.0, 9.0, 9.0, 9.0, 9.0, 3.0, 1.0)]
    lines = [lines[0]] + [line | {"pictures_per_second": i} for i, line in enumerate(lines[1:], 1)]  # 1 to 7
    found = rehearse.trained(lines)
    assert found == {"peak on the GPU, GiB": None, "pictures/s": 4, "first loss": 7.0, "last loss": 2.0}
    rows = [{"step": step} | found for step in ("gt", "codec")] + [
        {"step": "codec, resumed"} | found | {"last loss": 5}
    ]
    assert rehearse.losses(rows) == {"gt": (7.0, 2.0), "codec": (7.0, 5)}


def test_the_whole_is_all_crops_at_the_last_speed():
    rows = [{"step": "gt", "pictures/s": 40.0}, {"step": "codec", "pictures/s": 9.0}]
    rows += [{"step": "codec, resumed", "pictures/s": 0.5}, {"step": "release"}]
    told = rehearse.full(load_config("configs/config.yaml"), rows)
    assert told["the whole of stage gt"].startswith(
        "5.6 hours, 40 pictures a second of 800,000; longer with its advers"
    )
    assert told["the whole of stage codec"] == "11 days, 0.5 pictures a second of 480,000"


def test_a_loss_that_has_not_fallen_is_an_error_where_the_run_was_long_enough(tmp_path, monkeypatch, capsys):
    def done(name, command, out):
        rises = name.startswith("codec")
        return {"step": name, "first loss": 1.0, "last loss": 1.5 if rises else 0.5, "command": ["python"]}

    monkeypatch.setattr(rehearse, "done", done)
    for iterations, status in (("99", 0), ("100", 1)):
        assert rehearse.main(["--config", str(NANO), "--iterations", iterations, "-o", str(tmp_path)]) == status
    assert capsys.readouterr().err == "error: the loss of stage codec has not fallen\n"


def test_ms_ssim_takes_the_place_and_factor_of_lpips_without_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    overrides = rehearse.without_lpips(load_config("configs/config.yaml"))
    config = load_config("configs/config.yaml", overrides)
    assert config.gt.perceptual == {"lpips": 0, "ms_ssim": 1.0} and config.codec.perceptual == {
        "lpips": 0,
        "ms_ssim": 0.2,
    }
    assert "MS-SSIM stands for it" in capsys.readouterr().out
    assert rehearse.without_lpips(load_config(str(NANO))) == []


def test_a_command_that_fails_ends_the_rehearsal_with_its_last_words(tmp_path):
    rehearse.emptied(tmp_path)
    status, peak = rehearse.call(["-c", "x = bytes(300 << 20)"], tmp_path / rehearse.LOG)
    assert status == 0 and peak > 0.29  # Linux counts the parent's own memory at the fork as the child's, here pytest's
    with pytest.raises(DiffoError, match="gt: exit status 3: no room .*commands.log"):
        rehearse.done("gt", ["-c", "import sys; print('hello\\nno room'); sys.exit(3)"], tmp_path)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(DiffoError, match="neither an empty folder nor a rehearsal's"):
        rehearse.emptied(tmp_path)
    assert (tmp_path / "run").is_dir()
