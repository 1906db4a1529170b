"""YAML and overrides to dataclasses, and the configurations that ship."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from omegaconf import OmegaConf

from models.codec import Codec
from tests.commands import ROOT
from training.config import TrainConfig, load_config
from utils.config import build, load_mapping, to_mapping
from utils.errors import ConfigError

PAPER, TINY = ROOT / "configs" / "config.yaml", ROOT / "configs" / "tiny.yaml"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    lr: float = 1.0
    betas: tuple[float, ...] = (0.9, 0.999)


@dataclass(frozen=True)
class Outer:
    steps: int = 2
    name: str = "run"
    flip: bool = True
    folder: str | None = None
    share: float | None = None
    crop: Literal["random", "square"] = "random"
    stages: tuple[Literal["gt", "codec"], ...] = ("gt",)
    terms: dict[Literal["a", "b"], float] = field(default_factory=dict)
    inner: Inner = field(default_factory=lambda: Inner(lr=3.0, betas=(0.5, 0.9)))
    flag: Literal["auto", True] = "auto"

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


def test_absent_keys_keep_their_defaults():
    """Those of a nested block are of the block at that place, which may differ from those of its class."""
    assert build(Outer, {"steps": 4, "inner": {}}, "x") == Outer(steps=4)
    assert build(Outer, {"inner": {"lr": 2.0}}, "x").inner == Inner(lr=2.0, betas=(0.5, 0.9))


def test_values_of_every_kind():
    mapping = {
        "steps": 4,
        "name": "other",
        "flip": False,
        "folder": "pictures",
        "share": "1e-4",  # YAML 1.1 reads 1e-4 as text
        "crop": "square",
        "stages": ["codec", "gt"],
        "terms": {"b": 1, "a": "2e-1"},
        "inner": {"lr": 1, "betas": [0, "5e-1"]},
    }
    built = build(Outer, mapping, "x")
    expected = Outer(
        4, "other", False, "pictures", 1e-4, "square", ("codec", "gt"), {"a": 0.2, "b": 1.0}, Inner(1.0, (0.0, 0.5))
    )
    assert built == expected and type(built.inner.lr) is float and type(built.inner.betas[0]) is float
    assert build(Outer, {"folder": None, "share": None}, "x") == Outer()


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({"stepz": 1}, "x: unknown key stepz; did you mean steps"),
        ({7: 1}, "x: unknown key 7"),
        ({"inner": {"betaz": []}}, "x: inner: unknown key betaz; did you mean betas"),
        ({"steps": "2"}, "x: steps: expected int, found '2'"),
        ({"steps": True}, "x: steps: expected int, found True"),
        ({"flip": 1}, "x: flip: expected bool, found 1"),
        ({"inner": {"lr": True}}, "x: inner.lr: expected a finite number, found True"),
        ({"inner": 3}, "x: inner: expected a block of keys, for instance {lr: 1.0}, found 3"),
        ({"inner": {"betas": 0.9}}, "x: inner.betas: expected a list, found 0.9"),
        ({"inner": {"betas": ["a"]}}, "x: inner.betas: expected a finite number, found 'a'"),
        ({"crop": "round"}, "x: crop: 'round' is none of random, square"),
        ({"terms": "a"}, "x: terms: expected a block of keys, for instance {a: 1.0}, found 'a'"),
        ({"share": math.nan}, "x: share: expected a finite number, found nan"),
        ({"flag": 1}, "x: flag: 1 is none of auto, True"),
        ({"terms": {"c": 1}}, "x: terms: 'c' is none of a, b"),
        ({"terms": {"a": "much"}}, "x: terms.a: expected a finite number, found 'much'"),
        ({"share": "half"}, "x: share: expected a finite number, found 'half'"),
        ({"steps": 0}, "x: steps must be at least 1"),  # refused by the dataclass itself
    ],
    ids=str,
)
def test_what_is_refused_is_named(mapping, message):
    with pytest.raises(ConfigError) as error:
        build(Outer, mapping, "x")
    assert str(error.value).startswith(message)


# Files and overrides --------------------------------------------------------------------------------------------------


def test_overrides(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("a: 1\nb: {c: 1e-4, d: [1, 2]}\n")
    assert load_mapping(path) == {"a": 1, "b": {"c": 1e-4, "d": [1, 2]}}
    overridden = load_mapping(path, ["b.c=2e-5", "b.d=[3]", "e.f=word", "a=null", "g=p=q"])
    assert overridden == {"a": None, "b": {"c": 2e-5, "d": [3]}, "e": {"f": "word"}, "g": "p=q"}
    assert load_mapping(path, ["a=2", "a=3"])["a"] == 3
    emptied = load_mapping(path, ["b={}", "b.f=1"])  # in their order
    assert emptied == {"a": 1, "b": {"f": 1}} and load_mapping(path, ["b={c: {}}"])["b"] == {"c": {}, "d": [1, 2]}
    path.write_text("")
    assert load_mapping(path) == {}


def test_terms_of_a_file_are_emptied_on_the_command_line(tmp_path):
    emptied = "codec.perceptual={}"
    assert load_config(str(TINY)).codec.perceptual and not load_config(str(TINY), [emptied]).codec.perceptual
    path = tmp_path / "perceptual.yaml"
    path.write_text(f"base: {TINY}\ncodec: {{distortion_weight: 0, chroma_weight: 0}}\n")
    with pytest.raises(ConfigError, match=r"^command line: codec\.distortion_weight.* are all 0"):
        load_config(str(path), [emptied])


def test_a_base_and_what_a_file_changes_in_it(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "first.yaml").write_text("a: 1\nb: {c: 2, d: [3, 4]}\ne: {f: 5}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nb: {c: 6}\ne: null\n")
    third = tmp_path / "below" / "third.yaml"
    third.write_text("base: ../second.yaml\nb: {d: [7]}\ng: 8\n")
    assert load_mapping(third) == {"a": 1, "b": {"c": 6, "d": [7]}, "e": None, "g": 8}
    assert load_mapping(third, ["b.c=9", "a=0"]) == {"a": 0, "b": {"c": 9, "d": [7]}, "e": None, "g": 8}
    first = f"base={tmp_path / 'first.yaml'}"  # another base, seen from the working folder
    assert load_mapping(third, [first, "a=0"]) == {"a": 0, "b": {"c": 2, "d": [7]}, "e": {"f": 5}, "g": 8}


@pytest.mark.parametrize(
    "files, overrides, message",
    [
        ({"a": "a: 1"}, ["a"], "a: an override is written key=value"),
        ({"a": "a: 1"}, ["b={x"], "command line: b={x: "),
        ({"a": "a: [1"}, [], "a.yaml: "),
        ({"a": "a: [1, 2]"}, ["a.0=3"], "command line: a.0=3: "),
        ({"a": "a: 1\na: 2"}, [], "a.yaml: "),
        ({"a": "a: ${b}"}, [], "a.yaml: Interpolation key 'b' not found"),
        ({"a": "\udcff"}, [], "a.yaml: "),  # no text
        ({}, [], "a.yaml: no such configuration file"),
        ({"a": "base: a.yaml"}, [], "a.yaml: its bases lead back to it"),
        ({"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: b.yaml"}, [], "b.yaml -> "),
        ({"a": "base: 7"}, [], "7: no such configuration file (the base of "),
        ({"a": "base: b.yaml", "b": "- 1"}, [], "b.yaml: a configuration is a mapping"),
    ],
    ids=str,
)
def test_what_cannot_be_read_or_followed_is_named(files, overrides, message, tmp_path):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        load_mapping(tmp_path / "a.yaml", overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


# The configurations that ship -----------------------------------------------------------------------------------------


def test_the_papers_numbers():
    """DiffO, section 4; the rest as published."""
    paper = load_config(str(PAPER))
    codec = paper.codec
    assert (codec.distortion_weight, codec.perceptual, codec.commitment) == (0.8, {"lpips": 0.2}, 0.25)
    assert (codec.optim.lr, codec.optim.lr_end, codec.optim.warmup, codec.ema) == (5e-5, None, 0, 0.999)
    assert (codec.crop_size, codec.batch_size, codec.iterations) == (256, 8, 60000)
    assert codec.forward == "published" and codec.last_step_share is None
    networks = paper.networks
    assert networks.vq_base.codebook_size == 256 and networks.vq_base.decay == 0.99
    diffusion = networks.diffusion
    assert (diffusion.steps, diffusion.kappa, diffusion.power) == (2, 2.0, 0.3)
    assert (diffusion.etas_end, diffusion.min_noise_level) == (0.8, 0.04)
    assert networks.rate.c == 0.02 and networks.rate.eta(0.03125) == 0.64
    assert paper.gt.optim.betas == (0.5, 0.9) and paper.gt.adversary.weight == 0.8
    assert paper.stages == ("gt", "codec") and paper.data.crop == "random"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_loads(path):
    config = load_config(str(path))
    assert build(TrainConfig, to_mapping(config), "again") == config
    with torch.device("meta"):
        codec = Codec(config.networks)
    assert (codec.residual is None) == (config.networks.residual is None)


def test_what_cannot_work_together_is_refused():
    for key, told in (("codebook_siez=64", "did you mean codebook_size"), ("codebook_size=100", "power of two")):
        with pytest.raises(ConfigError, match=told):
            load_config(str(TINY), [f"networks.vq_base.{key}"])
    with pytest.raises(ConfigError, match="in_channels must equal"):
        load_config(str(TINY), ["networks.vq_base.in_channels=7"])


REFUSED = {
    "unet.windows=[4, 4]": "unet.windows [4, 4]: one for each resolution of channel_mult [1, 1, 1, 1]",
    "unet.windows=[0, 4, 4, 2]": "unet.windows [0, 4, 4, 2]: one number or more, each from 1 up",
    "unet.middle_window=0": "unet.middle_window 0: from 1 up",
    "unet.head_channels=5": "unet.swin_embed_dim 64: a multiple of head_channels, 5",
    "unet.mlp_ratio=0": "unet.mlp_ratio 0: from 1 up",
    "unet.channel_mult=[1, 2]": "unet.windows [4, 4, 4, 2]: one for each resolution of channel_mult [1, 2]",
    "unet.groups=3": "unet.model_channels 80: a multiple of groups, 3",
    "diffusion.kappa=0": "diffusion.kappa 0.0: above 0",
    "diffusion.power=-1": "diffusion.power -1.0: above 0",
    "diffusion.etas_end=0.01": "diffusion.etas_end 0.01: above the first step's 0.02, at most 1",
    "diffusion.etas_end=1.5": "diffusion.etas_end 1.5: above",
    "rate.c=.inf": "rate.c: expected a finite number, found inf",
    "vq_base.in_channels=7": "vq_base.in_channels must equal autoencoder.embed_dim: 7 is not 32",
    "autoencoder.ch_mult=[1, 1]": "autoencoder.patch 1, autoencoder.ch_mult [1, 1]: patch * 2^(resolutions - 1) must be 16",
    "vq_base.decay=1": "vq_base.decay 1.0: in [0, 1)",
    "residual.scale_width=57": "residual.scale_width 57: too many for exact sums",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_train_is_refused_with_its_key_and_where_it_came_from(override, tmp_path):
    """On the command line, in the file, and in the file that it changes."""
    key, _, value = override.partition("=")
    block, name = key.split(".")
    below, above = tmp_path / "below.yaml", tmp_path / "above.yaml"
    below.write_text(f"base: {TINY}\nnetworks: {{{block}: {{{name}: {value}}}}}\n")
    above.write_text(f"base: below.yaml\nname: other\nnetworks: {{{block}: {{}}}}\n")
    for path, overrides, origin in (
        (TINY, [f"networks.{override}"], "command line"),
        (above, [], str(below)),
    ):
        with pytest.raises(ConfigError) as error:
            load_config(str(path), overrides)
        assert str(error.value).startswith(f"{origin}: networks.{REFUSED[override]}")


@pytest.mark.parametrize("key", ["fooo.bar", "networks.fooo", "networks.fooo.bar", "fooo"])
def test_an_unknown_key_is_told_with_where_it_came_from(key, tmp_path):
    above = tmp_path / "above.yaml"
    above.write_text(f"base: {TINY}\n")
    OmegaConf.save(OmegaConf.from_dotlist([f"{key}=1"]), tmp_path / "odd.yaml")
    for path, overrides, origin in ((above, [f"{key}=1"], "command line"), (tmp_path / "odd.yaml", [], "odd.yaml")):
        with pytest.raises(ConfigError, match=f"{origin}: (networks: )?unknown key fooo; "):
            load_config(str(path), overrides)


def test_the_small_model_needs_no_pretrained_weights():
    tiny = load_config(str(TINY))
    assert {*tiny.gt.perceptual, *tiny.codec.perceptual} <= {"ms_ssim"} and tiny.data.folder is None
    assert tiny.codec.forward == "decoder"
