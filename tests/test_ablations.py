"""The ablations of configs/ablations: each says only what it changes, and that change trains."""

import pytest
import torch

from datapipe.pictures import Batch
from tests.commands import NANO, ROOT
from training.config import load_config
from training.progress import Progress
from training.stages import STAGES
from training.start import new_codec
from training.step import Step
from utils.config import load_mapping, to_mapping

FILES = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
SIZE, BATCH = 64, 2


def flat(mapping: dict, prefix: str = "") -> dict:
    items = {}
    for key, value in mapping.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The smallest networks, with a residual codec."""
    path = tmp_path_factory.mktemp("small") / "small.yaml"
    path.write_text(
        f"base: {NANO}\n"
        "networks: {residual: {channels: 8, width: 8, blocks: 1, hyper_channels: 4, scale_width: 8, code_width: 4}}\n"
    )
    path.with_name("empty.yaml").write_text("")
    return path


def test_the_papers_tables_are_all_there():
    """The paper's figures 4 and 10, and its code-book sizes and schedules."""
    names = {path.stem for path in FILES}
    assert {f"codebook-{k}" for k in (64, 256, 2048, 8192)} <= names
    assert {f"steps-{t}" for t in (1, 2, 5, 15, 30, 50)} <= names
    assert {"detail-off", "perceptual-off", "shift-off", "hyperprior-off", "adapter-difference"} <= names
    assert {"forward-published", "forward-decoder", "eta-constant", "eta-by-rate"} <= names
    text = (ROOT / "docs" / "ablations.md").read_text()
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_ablation_trains_and_changes_only_what_it_says(path, small):
    """Two steps, in which every trainable parameter takes part: DDP expects it."""
    config, plain = load_config(str(path), [f"base={small}"]), load_config(str(small))
    own = flat(load_mapping(path, [f"base={small.with_name('empty.yaml')}"]))
    assert config.name == path.stem and own.pop("name") == path.stem
    ours, theirs = flat(to_mapping(config)), flat(to_mapping(plain))
    assert {key: ours.get(key) for key in own} == own
    changed = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} - {"name"}
    assert all(any(key.startswith(mine) for mine in own) for key in changed), changed

    codec = new_codec(config)
    stage = STAGES["codec"](config, codec, torch.device("cpu"))
    images = torch.rand(2, BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    update, progress = Step(stage), Progress(config.codec)
    for number, image in enumerate(images):
        positions = range(number * BATCH, (number + 1) * BATCH)
        batch = Batch(image, torch.tensor(positions), stage.drawn(positions, (SIZE, SIZE)))
        update(batch, progress)  # stops at a loss that is not finite
    idle = [name for name, p in codec.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


def test_a_constant_noise_level():
    """`eta-constant` has one eta at every rate; `eta-by-rate` follows the rate between its bounds."""
    constant, by_rate = (load_config(str(ROOT / f"configs/ablations/eta-{n}.yaml")) for n in ("constant", "by-rate"))
    rates = (0.01, 0.03125, 0.1, 0.5, 2.0)
    assert {constant.networks.rate.eta(rate) for rate in rates} == {0.64}
    assert [by_rate.networks.rate.eta(rate) for rate in rates] == pytest.approx([1.0, 0.64, 0.2, 0.04, 0.02])
