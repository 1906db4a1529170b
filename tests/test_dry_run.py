"""Training before its first step: dry run, options, modules."""

import re

import pytest
import torch

from main_diffusion_train_vq import main
from tests.commands import NANO, ROOT, photograph, run
from tests.small_runs import ALL_PARTS
from training.config import load_config
from training.dry_run import activations, dry_run, parameters
from training.stages import STAGES
from training.start import demo_run, new_codec
from training.step import Step
from utils.config import origin_of


def test_the_papers_size_in_seconds_and_without_a_trace(tmp_path):
    done = run(ROOT / "main_diffusion_train_vq.py", "--dry_run", "--save_dir", tmp_path, "codec.microbatch=2")
    assert "crop_size: 256" in done.stdout and "microbatch: 2" in done.stdout
    table = re.findall(r"^(\w+) +([\d,]+) +([\d,]+)$", done.stdout, re.MULTILINE)
    counts = [(name, int(a.replace(",", "")), int(b.replace(",", ""))) for name, a, b in table]
    assert [name for name, *_ in counts[:4]] == ["unet", "vq_base", "autoencoder", "discriminator"]
    gt, codec = dict((n, (a, b)) for n, a, b in counts[:4]), dict((n, (a, b)) for n, a, b in counts[4:])
    assert gt["unet"] == (0, codec["unet"][0]) and codec["unet"][0] > 100_000_000
    assert codec["autoencoder"] == (0, sum(gt["autoencoder"])) and gt["autoencoder"][1] == 16384 * 256
    assert codec["vq_base"][1] == 256 * (1 + 2 * 256)  # the code book: sizes, averages and rows
    assert "activations, 2 crops of 256" in done.stdout and "activations, 8 crops of 256" in done.stdout
    assert list(tmp_path.iterdir()) == []


def weights_of(step: Step) -> list[torch.Tensor]:
    return [*step.stage.codec.parameters(), *parameters(step.adversary and step.adversary.discriminator)]


@pytest.mark.parametrize("name", ["gt", "codec"])
def test_counts_and_activations_are_those_of_real_networks(name):
    config = load_config(str(NANO), [*ALL_PARTS, "speed.precision=float32", "speed.channels_last=false"])
    told = dry_run(config)
    codec = new_codec(config)
    step = Step(STAGES[name](config, codec, torch.device("cpu")))
    section = told[told.index(f"stage {name}") :]
    for network in ("unet", "vq_base", "autoencoder", "residual"):
        trained, frozen = re.search(rf"^{network} +([\d,]+) +([\d,]+)$", section, re.MULTILINE).groups()
        own = list(getattr(codec, network).parameters())
        assert int(trained.replace(",", "")) + int(frozen.replace(",", "")) == sum(p.numel() for p in own)
        expected = sum(
            p.numel() for p in own if p.requires_grad and any(p is q for q in step.stage.trained.parameters())
        )
        assert int(trained.replace(",", "")) == expected
    real = activations(step, step.blank(), weights_of(step))
    assert real < activations(step, step.blank(), [])  # weights are counted apart
    with torch.device("meta"):
        shapes = Step(STAGES[name](config, new_codec(config).to("meta"), torch.device("meta")))
    estimated = activations(shapes, shapes.blank(), weights_of(shapes))
    # The attention of a CPU keeps less than the plain one that shapes go through.
    assert 0.9 * real < estimated < 1.25 * real


@pytest.mark.filterwarnings("error:.*copying from a non-meta parameter")
@pytest.mark.parametrize("name", ["small-pictures", "small-decoder", "small-texture", "small-light"])
def test_every_part_of_the_model_that_ships(name):
    """Texture's loss has terms of `perceptual` alone: without them there would be none."""
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"))
    told = dry_run(config)
    assert all(re.search(rf"stage {stage}\n(.*\n)+activations", told) for stage in config.stages)


def test_one_of_several_ranks_tells(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["--cfg_path", str(NANO), "--dry_run"]) == 0 and capsys.readouterr().out == ""


def test_training_needs_neither_pyiqa_nor_transformers():
    run("-c", "import sys, main_diffusion_train_vq; sys.exit(bool({'pyiqa', 'transformers'} & set(sys.modules)))")


def test_what_is_found_here_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    photograph(tmp_path / "in" / "0.png", 90, 70)
    args = ["--cfg_path", str(NANO), "--dry_run"]
    assert (
        main([*args, f"validation.folder={tmp_path / 'in'}", "speed.precision=bfloat16", "codec.perceptual.lpips=1"])
        == 0
    )
    out, err = capsys.readouterr()
    assert err.startswith("no pictures are named (--data PATH): five demo photographs test the machinery")
    assert "training pictures: 5 from scikit-image's photographs (no data was named)" in out
    assert f"validation pictures: 1 from {tmp_path / 'in'}" in out
    assert re.search(r"precision and speed on this machine's \w+: bfloat16", out)
    assert "VGG weights of LPIPS are not on disk: stage codec would not start" in out
    assert main([*args, "--data", "nowhere"]) == 1 and "nowhere: no such folder" in capsys.readouterr().err
    assert main([*args, "stages=[codec]", "autoencoder=nothing.pth.tar"]) == 1
    assert "nothing.pth.tar: no such checkpoint" in capsys.readouterr().err


def test_demo_photographs_are_a_short_run_unless_the_command_line_says_how_long(tmp_path):
    (tmp_path / "long.yaml").write_text(f"base: {NANO}\ngt: {{iterations: 8000}}\ncodec: {{minutes: 90}}\n")
    for overrides, lengths in (
        ([], (200, 200, None)),
        (["gt.iterations=900"], (900, 200, None)),
        (["gt.iterations=20", "codec.minutes=3"], (20, 10, 3)),
    ):
        given = str(tmp_path / "long.yaml"), overrides
        config, told = demo_run(load_config(*given), origin_of(*given))
        assert (config.gt.iterations, config.codec.iterations, config.codec.minutes) == lengths
        assert ("a short run" in told) == (200 in lengths) and "codec.iterations=200" in told or lengths[1] != 200


def test_deterministic_sets_what_cublas_reads_or_refuses_it(monkeypatch, capsys, tmp_path):
    photograph(tmp_path / "data" / "0.png", 90, 70)
    data = str(tmp_path / "data")
    args = ["--cfg_path", str(NANO), "--save_dir", str(tmp_path), "--data", data, "--iterations", "1", "stages=[gt]"]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert main([*args, "deterministic=true"]) == 1
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0" in capsys.readouterr().err
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen = []
    monkeypatch.setattr(
        "training.trainer.Trainer.run", lambda self: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    assert main([*args, "deterministic=true"]) == 0 and main(args) == 0
    assert seen == [True, False] and not torch.are_deterministic_algorithms_enabled()
