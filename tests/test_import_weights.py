"""The command release.import_weights: what it takes of public checkpoints, what it leaves out, what it refuses."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from main_diffusion_train_vq import main as train
from models.codec import Codec
from models.released import NAMES, Triple, load_release, save_triple
from release.import_weights import main, take
from tests.commands import NANO, ROOT, photograph, run
from tests.parity import fixture_file
from training.config import load_config
from utils import checkpoints
from utils.errors import CheckpointError

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """The nano networks, with a code book in the image autoencoder, as a VQGAN has one."""
    mapping = yaml.safe_load(NANO.read_text())
    mapping["networks"]["autoencoder"]["n_embed"] = 32
    path = tmp_path_factory.mktemp("config") / "nano.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="module")
def states(config) -> dict:
    torch.manual_seed(0)
    codec = Codec(load_config(str(config)).networks)
    return {network: getattr(codec, network).state_dict() for network in NAMES}


def lightning(monkeypatch, **attributes) -> ModuleType:
    """A module that stands for the package of training callbacks while a checkpoint is written."""
    parts = CALLBACK.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    module = sys.modules[CALLBACK]
    for name, value in attributes.items():
        value.__module__, value.__qualname__ = CALLBACK, name
        setattr(module, name, value)
    return module


def vqgan_content(state: dict) -> dict:
    """Entries that a VQGAN's training leaves around its parameters."""
    loss = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(1, 4, 1, 1), "loss.logvar": torch.zeros(1)}
    return {
        "epoch": 16,
        "global_step": 1234,
        "pytorch-lightning_version": "1.0.8",
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 4.5e-6}]}],
        "state_dict": state | loss,
    }


@pytest.fixture
def last(tmp_path, monkeypatch, states) -> Path:
    """last.ckpt, with a class of a package that is not installed, and a container of omegaconf, which is."""
    path = tmp_path / "last.ckpt"
    with monkeypatch.context() as patched:
        module = lightning(patched, ModelCheckpoint=type("ModelCheckpoint", (), {}))
        callbacks = {module.ModelCheckpoint: {"best_model_score": torch.ones(()), "best_model_path": "x.ckpt"}}
        others = {
            "callbacks": callbacks,
            "hyper_parameters": OmegaConf.create({"ddconfig": {"ch_mult": [1, 1, 2, 2, 4]}}),
        }
        torch.save(vqgan_content(states["autoencoder"]) | others, path)
    return path


# VQGAN ----------------------------------------------------------------------------------------------------------------


def test_a_vqgan_gives_the_image_autoencoder(tmp_path, config, states, last, capsys):
    with pytest.raises(CheckpointError, match=f"last.ckpt: refused.*{CALLBACK}.ModelCheckpoint"):
        checkpoints.read(last, inert=["omegaconf", "collections", "typing", "builtins"])
    assert main(["vqgan", str(last), str(tmp_path / "public"), "--config", str(config)]) == 0
    assert "pytorch_lightning" not in sys.modules
    told = capsys.readouterr().out
    count = sum(value.numel() for value in states["autoencoder"].values())
    assert f"last.ckpt: took {len(states['autoencoder'])} tensors, {count:,} parameters" in told
    assert "last.ckpt: left out loss.* (2 tensors), epoch, global_step, " in told and "callbacks" in told
    written = tmp_path / "public" / "GT_vq_model_1234.pth.tar"
    assert str(written) in told
    content = checkpoints.read(written)
    assert content.keys() == {"state_dict"} and content["state_dict"].keys() == states["autoencoder"].keys()
    assert all(torch.equal(value, states["autoencoder"][key]) for key, value in content["state_dict"].items())
    assert main(["vqgan", str(last), str(tmp_path / "public"), "--config", str(config)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_training_starts_from_it(tmp_path, config, states, last):
    photograph(tmp_path / "data" / "0.png", 90, 70)
    assert main(["vqgan", str(last), str(tmp_path), "--config", str(config)]) == 0
    arguments = ["--cfg_path", config, "--save_dir", tmp_path, "--data", tmp_path / "data", "--iterations", 1]
    options = ["stages=[codec]", f"autoencoder={tmp_path / 'GT_vq_model_1234.pth.tar'}"]
    assert train([str(argument) for argument in arguments + options]) == 0
    kept = checkpoints.read(tmp_path / "nano" / "ema_ckpts" / "GT_vq_model_1.pth.tar")["state_dict"]
    assert all(torch.equal(kept[key], value) for key, value in states["autoencoder"].items())


class Shell:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_code_in_a_file_is_refused_and_never_run(tmp_path, config, states, capsys):
    path, marker, out = tmp_path / "last.ckpt", tmp_path / "ran", tmp_path / "out"
    torch.save(vqgan_content(states["autoencoder"]) | {"callbacks": Shell(f"touch '{marker}'")}, path)
    assert main(["vqgan", str(path), str(out), "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert "last.ckpt: refused" in error and f"{os.system.__module__}.system" in error
    assert not marker.exists() and not out.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert marker.exists()


def test_what_the_lightning_package_names_is_never_called(tmp_path, config, states, monkeypatch):
    """Even where the package is installed, and its own function or class is what the file would have run."""
    ran = []

    class Loader:
        def __init__(self, *args):
            ran.append(args)

        def __setstate__(self, state):
            ran.append(state)

        def __reduce__(self):
            return module.Loader, (1,), {"state": 2}

    module = lightning(monkeypatch, Loader=Loader)
    path = tmp_path / "last.ckpt"
    torch.save(vqgan_content(states["autoencoder"]) | {"callbacks": [Loader()]}, path)
    ran.clear()
    assert main(["vqgan", str(path), str(tmp_path), "--config", str(config)]) == 0
    assert not ran
    torch.load(path, weights_only=False)
    assert ran == [(1,), {"state": 2}]


def test_a_wrong_vqgan_is_refused_with_its_keys(tmp_path, config, states, capsys):
    state = dict(states["autoencoder"])
    state["quantize.embedding.weight"] = torch.zeros(64, 8)
    for index in range(6):
        state[f"gumbel.{index}"] = torch.zeros(1)
    del state["quant_conv.bias"], state["quant_conv.weight"]
    torch.save(vqgan_content(state), tmp_path / "f8.ckpt")
    assert main(["vqgan", str(tmp_path / "f8.ckpt"), str(tmp_path / "out"), "--config", str(config)]) == 1
    told = capsys.readouterr()
    assert told.err == (
        f"error: {tmp_path / 'f8.ckpt'}: does not fit the configuration. missing: quant_conv.weight, quant_conv.bias; "
        "surplus: gumbel.0, gumbel.1, gumbel.2, gumbel.3 and 2 more; "
        "other shape: quantize.embedding.weight [64, 8] for [32, 8]\n"
    )
    assert not told.out and not (tmp_path / "out").exists()


# A published triple ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory, states) -> dict[str, Path]:
    """Three files as the published trainer leaves them: averaged UNet bare, the others wrapped, one from DDP."""
    folder = tmp_path_factory.mktemp("published")
    paths = {network: folder / name.format(60000) for network, name in NAMES.items()}
    buffers = {f"input_blocks.1.1.blocks.{i}.attn.relative_position_index": torch.zeros(4, 4) for i in (0, 1)}
    buffers["input_blocks.1.1.blocks.1.attn_mask"] = torch.zeros(1)
    torch.save({f"module.{key}": value for key, value in (states["unet"] | buffers).items()}, paths["unet"])
    around = {"iters_start": 60000, "log_step": {"train": 1}, "log_step_img": {"train": 1}}
    torch.save(around | {"state_dict": states["vq_base"]}, paths["vq_base"])
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save(around | {"state_dict": states["autoencoder"] | loss}, paths["autoencoder"])
    return paths


def arguments(paths: dict[str, Path], out: Path, config: Path) -> list[str]:
    flags = {"unet": "--ckpt", "vq_base": "--vqckpt", "autoencoder": "--GT_vqckpt"}
    files = [item for network, flag in flags.items() for item in (flag, str(paths[network]))]
    return ["diffo", *files, str(out), "--config", str(config)]


def test_a_published_triple_gives_a_release(tmp_path, config, states, published):
    done = run("-m", "release.import_weights", *arguments(published, tmp_path / "theirs", config))
    for network, left in [
        ("unet", "relative_position_index (2 tensors), attn_mask (1 tensor)"),
        ("vq_base", "iters_start, log_step, log_step_img"),
        ("autoencoder", "loss.* (1 tensor), iters_start, log_step, log_step_img"),
    ]:
        count = sum(value.numel() for value in states[network].values())
        assert f"{published[network]}: took {len(states[network])} tensors, {count:,} parameters\n" in done.stdout
        assert f"{published[network]}: left out {left}\n" in done.stdout
    about = json.loads((tmp_path / "theirs" / "release.json").read_text())
    assert about["iteration"] == 60000 and set(about["imported_from"]) == {p.name for p in published.values()}
    assert about["precision"] == "float32" and "counted_indices" not in about
    assert "base indices at fixed length" in done.stdout
    codec = load_release(tmp_path / "theirs")
    assert codec.fingerprint.hex() == about["fingerprint"] and codec.base_table is None
    for network, state in states.items():
        own = getattr(codec, network).state_dict()
        assert all(torch.equal(own[key], value) for key, value in state.items())
        kept = checkpoints.read(tmp_path / "theirs" / NAMES[network].format(60000))["state_dict"]
        assert {value.dtype for value in kept.values()} == {torch.float32}
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = codec.compress(image)
    assert codec.read(data).file.fixed_length and codec.decompress(data).shape == image.shape


def test_with_pictures_it_gets_an_integer_table(tmp_path, config, published):
    photograph(tmp_path / "data" / "0.png", 90, 70)
    options = ["--data", str(tmp_path / "data"), "--crops", "8"]
    assert main(arguments(published, tmp_path / "theirs", config) + options) == 0
    about = json.loads((tmp_path / "theirs" / "release.json").read_text())
    assert about["counted_indices"] == 8 * (64 // 16) ** 2
    assert load_release(tmp_path / "theirs").base_table.sum() == 2**16
    assert yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())["data"]["folder"] is None


def refused(paths, out, config, capsys) -> str:
    assert main(arguments(paths, out, config)) == 1
    assert not out.exists()
    return capsys.readouterr().err


def test_a_wrong_file_of_a_triple_is_named(tmp_path, config, states, published, capsys):
    swapped = published | {"vq_base": published["autoencoder"]}
    told = refused(swapped, tmp_path / "theirs", config, capsys)
    assert told.startswith(f"error: {published['autoencoder']}: does not fit the configuration. missing: ")
    assert "surplus: encoder.down.0.downsample.conv.weight, " in told and " more; other shape: " in told
    assert "encoder.conv_in.weight [4, 3, 3, 3] for [8, 8, 3, 3]" in told
    absent = published | {"autoencoder": tmp_path / "GT_vq_model_60000.pth.tar"}
    assert "GT_vq_model_60000.pth.tar: no such checkpoint" in refused(absent, tmp_path / "theirs", config, capsys)


def test_a_release_of_ours_is_not_imported(tmp_path, config, states, capsys):
    (tmp_path / "ours").mkdir()
    triple = Triple.of(tmp_path / "ours", 7)
    save_triple(triple, states, load_config(str(config)).networks)
    told = refused(vars(triple), tmp_path / "theirs", config, capsys)
    assert "vq_model_7.pth.tar: is of a release or run of this project already" in told


# The published sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network, name, buffers",
    [
        ("unet", "UNet", "relative_position_index (18 tensors), attn_mask (9 tensors)"),
        ("vq_base", "autoencoder", "nothing"),
        ("autoencoder", "GT_encoder", "nothing"),
    ],
    ids=lambda name: f"keys_full-{name}",
)
def test_the_published_keys_are_taken(network, name, buffers, capsys):
    """Full-size names and shapes, on the meta device: no number is stored."""
    info = json.loads(fixture_file("keys_full.json").read_text())[name]
    with torch.device("meta"):
        ours = getattr(Codec(load_config(str(ROOT / "configs" / "config.yaml")).networks), network)
        state = {key: torch.empty(entry["shape"]) for key, entry in info["state_dict"].items()}
    take(ours, {"state_dict": state}, Path("theirs.pth"))
    told = capsys.readouterr().out
    assert f", {info['parameters']:,} parameters\n" in told
    assert f"left out {buffers}\n" in told
    first = next(iter(ours.state_dict()))
    with pytest.raises(CheckpointError, match=f"theirs.pth: .* missing: {first}"):
        take(ours, {key: value for key, value in state.items() if key != first}, Path("theirs.pth"))
