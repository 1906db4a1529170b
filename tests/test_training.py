"""The command main_diffusion_train_vq.py and the release made from its run, as a user runs them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from main_diffusion_train_vq import main
from models.released import load_release
from tests.commands import NANO, ROOT, TRAIN, on_board, run
from tests.small_runs import NO_ADVERSARY, command, lines, quick
from utils import checkpoints


def test_a_run_leaves_what_it_promises(saved_run):
    metrics = lines(saved_run, "metrics.jsonl")
    steps = [(m["stage"], m["step"]) for m in metrics]
    assert steps == [("gt", step) for step in range(4)] + [("codec", step) for step in range(6)]
    assert {"loss", "distortion", "perplexity", "rate", "grad_norm", "lr", "bpp_level_0"} <= set().union(*metrics[4:])
    assert [m["step"] for m in metrics if "discriminator" in m] == [2, 3, 3, 4, 5]
    assert (saved_run / "train.log").read_text()
    assert yaml.safe_load((saved_run / "config.yaml").read_text())["codec"]["adversary"]["start"] == 3
    assert not list(saved_run.rglob("*.tmp"))


def test_tensorboard_shows_the_lines_and_pictures(saved_run):
    """The same numbers as in metrics.jsonl, each once."""
    for stage, pictures in (("gt", [0]), ("codec", [0, 5])):
        board = on_board(saved_run, stage)
        told: dict[str, list] = {}
        for line in (json.loads(line) for line in (saved_run / "metrics.jsonl").read_text().splitlines()):
            for key in (line.keys() - {"stage", "step"}) if line["stage"] == stage else ():
                told.setdefault(f"{stage}/{key}", []).append((line["step"], pytest.approx(line[key], rel=1e-6)))
        assert set(board.Tags()["scalars"]) == set(told)
        for tag, values in told.items():
            assert [(event.step, event.value) for event in board.Scalars(tag)] == values, tag
        assert [event.step for event in board.Images(f"{stage}/pictures")] == pictures
    picture = board.Images("codec/pictures")[0]
    assert (picture.width, picture.height) == (2 * 64, 2 * 64)  # two samples; originals above, results below


@pytest.fixture(scope="module")
def released(saved_run, data, tmp_path_factory):
    """A release of that run, which names a path that is nobody's business."""
    folder = shutil.copytree(saved_run, tmp_path_factory.mktemp("released") / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"autoencoder": str(data / "start.pth.tar")}))
    run("-m", "release", folder, folder.parent / "mine", "--data", data, "--crops", 16)
    return folder.parent / "mine"


def test_release_and_code_with_it(released, data):
    about = json.loads((released / "release.json").read_text())
    codec = load_release(released)
    averages = checkpoints.read(released.parent / "run" / "checkpoints" / "codec_6.pth")["averages"]["unet"]
    for key, value in codec.unet.state_dict().items():  # as half-precision numbers
        assert (value - averages[key]).abs().max() <= 1e-3 * max(1, averages[key].abs().max()), key
    assert codec.fingerprint.hex() == about["fingerprint"]
    assert codec.base_table.sum() == 2**16 and (codec.base_table > 0).all()
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    assert codec.decompress(codec.compress(image)).shape == image.shape
    told = (released / "config.yaml").read_text()
    assert str(data) not in told and yaml.safe_load(told)["autoencoder"] == "start.pth.tar"


def test_a_run_goes_on_from_a_release(released, saved_run, data, tmp_path):
    """With its code book and densities, from the scores that it has, and with a warm-up."""
    still = ["codec.optim={lr: 1e-7, warmup: 10}", "networks.vq_base.decay=0.999999"]
    options = ["stages=[codec]", "codec.iterations=2", "validation.every=1", f"release={released}", *NO_ADVERSARY]
    assert main(command(data, tmp_path, *options, *still)) == 0
    before, after = lines(saved_run, "validation.jsonl")[-1], lines(tmp_path / "nano", "validation.jsonl")[0]
    assert after["step"] == 1 and "bpp_level_3" in after
    for name in before.keys() - {"stage", "step"}:
        assert after[name] == pytest.approx(before[name], rel=2e-3), name
    metrics = lines(tmp_path / "nano", "metrics.jsonl")
    assert [m["lr"] for m in metrics] == pytest.approx([1e-8, 2e-8]) and metrics[0]["revived"] == 0
    assert f"from {released}" in (tmp_path / "nano" / "train.log").read_text()


def test_a_run_in_the_latent_alone(saved_run, data, tmp_path):
    """It has no picture to show or to score in its steps, and validation decodes as ever."""
    autoencoder = next((saved_run / "ema_ckpts" / "gt").iterdir())
    alone = ("codec.distortion_weight=0", "codec.latent_weight=1", "codec.adversary.weight=0", "picture_every=1")
    options = ("stages=[codec]", f"autoencoder={autoencoder}", "codec.iterations=2", *alone)
    assert main(command(data, tmp_path, *options)) == 0
    for line in lines(tmp_path / "nano", "metrics.jsonl"):
        assert "latent" in line and "distortion" not in line
        parts = line["latent"] + 0.25 * line["commitment"] + line["rate"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert all("psnr_level_0" in line for line in lines(tmp_path / "nano", "validation.jsonl"))


def test_the_published_command_on_two_gloo_processes(data, tmp_path):
    """Two ranks train as one: the same first loss as one process with twice the batch, and equal weights."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--nnodes=1"]
    shared = ["--steps", 2, "--cfg_path", NANO, "--data", data, "--iterations", 10, "stages=[gt]"]
    run(*launch, TRAIN, *shared, "--save_dir", tmp_path / "two", "gt.batch_size=1", "gt.adversary.start=30")
    assert main([str(a) for a in [*shared, "--save_dir", tmp_path / "one", "gt.adversary.start=30"]]) == 0
    two, one = (lines(tmp_path / name / "nano", "metrics.jsonl") for name in ("two", "one"))
    assert [m["step"] for m in two] == [m["step"] for m in one] == list(range(10))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    folders = [tmp_path / name / "nano" for name in ("two", "one")]
    ours, theirs = (checkpoints.read(folder / "checkpoints" / "gt_8.pth")["codec"]["autoencoder"] for folder in folders)
    for key, value in theirs.items():
        assert torch.allclose(ours[key], value, atol=2e-3), key
    assert yaml.safe_load((folders[0] / "config.yaml").read_text())["networks"]["diffusion"]["steps"] == 2


@pytest.mark.parametrize(
    "args, told",
    [
        (["--cfg_path", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["codec.learning_rate=1"], "unknown key learning_rate"),
        (["codec.forward=backward"], "'backward' is none of published, decoder"),
        (["codec.iterations=many"], "expected int"),
        (["rubbish"], "key=value"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--steps", 2, "networks.diffusion.steps=5"], "networks.diffusion.steps as well"),
        (["--data", ROOT / "docs", "data.shards=x.tar"], "data.shards as well"),
        (["codec.optim.lr"], "for instance codec.optim.lr=1e-4"),
        (["gt.statistics=0"], "command line: gt.statistics 0: from 1 up"),
        (["gt.minutes=0"], "minutes 0.0: above 0, or null"),
        (["gt.microbatch=0"], "microbatch 0"),
        (["keep_last=0"], "keep_last 0"),
        (["gt.crop_size=16"], "adversary.patch needs 32 pixels"),
        (["codec.crop_size=16", "codec.adversary.weight=1"], "adversary.patch needs 32 pixels"),
        (["codec.last_step_share=90"], "last_step_share 90.0: in [0, 1]"),
        (["codec.commitment=-1"], "commitment -1.0: from 0 up"),
        (["--data", "nowhere"], "command line: data.folder: nowhere: no such folder"),
        (
            ["--data", "missing.txt"],
            "command line: data.txt_file_path: missing.txt: 2 pictures in a row cannot be read",
        ),
        (["release=nowhere", "stages=[codec]"], "command line: release: nowhere: no release there"),
        (["autoencoder=nowhere"], "command line: autoencoder: nowhere: no such checkpoint"),
        (["gt.perceptual=lpips"], "gt.perceptual: expected a block of keys, for instance {lpips: 1.0}, found 'lpips'"),
        (["validation.folder=nowhere"], "command line: validation.folder: nowhere: no such folder"),
        (["validation.crop=100"], "multiple of 16"),
        (["gt.perceptual.ms_ssim=1", "gt.crop_size=176", "validation.crop=160"], "ms_ssim needs sides from 161 pixels"),
        (["gt.perceptual.weave=1", "gt.crop_size=48"], "crop_size 48: perceptual.weave needs sides from 64 pixels"),
        (["gt.perceptual.lines=1", "gt.crop_size=176"], "crop_size 176: perceptual.lines needs sides from 192 pixels"),
        (["networks.vq_base.codebook_size=300"], "power of two"),
        (["networks.unet.latent_channels=4"], "must equal"),
        (["release=weights/small", "unet=x.pth"], "release is a whole codec: leave out unet"),
        (
            ["release=weights/small"],
            "gt.latent_scale channel: kept beside a release, whose codec knows the latent as it is",
        ),
        (["gt.perceptual.lpips=1"], "reproduce.py weights`, or train with another term: gt.perceptual.lpips=0"),
        (["--resume", "nowhere"], "nowhere: not a run folder"),
        (["--resume", ROOT / "weights" / "small"], "small: not a run folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_input_is_one_line_and_leaves_no_folder(args, told, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "missing.txt").write_text("a.png\nb.png\n")
    args = [str(tmp_path / arg) if arg == "missing.txt" else arg for arg in args]
    told = told.replace("missing.txt", str(tmp_path / "missing.txt"))
    named = [] if {"--cfg_path", "--resume"} & set(args) else ["--cfg_path", NANO]
    status = main([str(a) for a in [*named, *args, *([] if "--resume" in args else ["--save_dir", tmp_path])]])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 1 and error.startswith("error: ") and told in error, error
    assert not (tmp_path / "nano").exists()


EDGES = [  # accepted, so they train
    *(
        "windows=[1,3,4,2]",
        "middle_window=3",
        "head_channels=8",
        "num_res_blocks=0",
        "swin_depth=1",
        "condition_width=1",
    ),
    *("channel_mult=[1,2,1,1]", "model_channels=4"),
]


def test_values_at_the_edge_of_what_is_accepted_train(data, tmp_path):
    edges = [f"networks.unet.{edge}" for edge in EDGES] + [
        "networks.diffusion.steps=1",
        "networks.diffusion.kappa=0.01",
    ]
    edges += ["networks.diffusion.power=10", "networks.diffusion.etas_end=1", "networks.residual.levels=2"]
    (tmp_path / "some.txt").write_text(f"nowhere.png\n{data / '0.png'}\n")
    named = ["data.folder=null", f"data.txt_file_path={tmp_path / 'some.txt'}", "gt.crop_size=16", "codec.crop_size=16"]
    args = [arg for arg in quick(data, tmp_path, *edges) if arg not in ("--data", str(data))]
    assert main([*args, *named, "gt.iterations=1", "codec.iterations=1"]) == 0


@pytest.mark.parametrize(
    "given, told", [(["--save_dir", "x"], "--save_dir"), (["--auto_resume"], "--auto_resume"), (["name=x"], "name=")]
)
def test_resuming_is_in_the_runs_own_folder(given, told, capsys):
    with pytest.raises(SystemExit):
        main(["--resume", "runs/nano", *given])
    assert f"leave out {told}" in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten(saved_run, capsys):
    assert main(["--cfg_path", str(NANO), "--save_dir", str(saved_run.parent)]) == 1
    assert "--resume" in capsys.readouterr().err


def test_pictures_too_small_to_validate_on_are_told_at_once(data, tmp_path: Path, capsys):
    args = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path), f"validation.folder={data}"]
    assert main([*args, "validation.crop=80"]) == 1
    assert "0.png: 90x70 pixels are less than validation.crop 80" in capsys.readouterr().err
    assert main([*args, "gt.perceptual.ms_ssim=1", "gt.crop_size=176"]) == 1
    assert "needs sides from 161" in capsys.readouterr().err
