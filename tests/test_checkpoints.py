"""Checkpoints: read without running anything, loaded strictly, and the three that belong together."""

import hashlib
import io
import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models import entropy_coding
from models.codec import Codec
from models.diffusion import RateParams
from models.released import NAMES, OURS, Triple, load_release, load_triple, save_triple, states_of
from tests.commands import NANO
from tests.residual import new_codec
from training.config import load_config
from utils import checkpoints
from utils.config import to_mapping
from utils.errors import CheckpointError

PARAMS = load_config(str(NANO)).networks
K = PARAMS.vq_base.codebook_size


# Reading and writing --------------------------------------------------------------------------------------------------


def test_save_and_read(tmp_path):
    content = {"state_dict": {"a": torch.arange(3.0)}, "step": 7, "names": ["x", None], "nested": {"b": torch.ones(2)}}
    checkpoints.save(tmp_path / "some.pth", content)
    found = checkpoints.read(tmp_path / "some.pth")
    assert torch.equal(found["state_dict"]["a"], torch.arange(3.0)) and found["nested"]["b"].device.type == "cpu"
    assert found["step"] == 7 and found["names"] == ["x", None]
    assert [path.name for path in tmp_path.iterdir()] == ["some.pth"]


def test_deflated_records_are_smaller_and_the_same(tmp_path):
    content = {"state_dict": {"a": torch.arange(5000).half(), "b": torch.ones(3)}, "step": 7}
    for name, deflated in (("plain", False), ("small", True), ("again", True)):
        checkpoints.save(tmp_path / name, content, deflated)
    plain, small, again = ((tmp_path / name).read_bytes() for name in ("plain", "small", "again"))
    assert len(small) < 0.8 * len(plain) and small == again
    found = checkpoints.read(tmp_path / "small")
    assert found["state_dict"].keys() == {"a", "b"} and found["step"] == 7
    assert torch.equal(found["state_dict"]["a"], content["state_dict"]["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "plain", "small"]


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, new):
    ran, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "x": Malicious(ran)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="evil.pth: refused"):
        checkpoints.read(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert ran.exists()


@pytest.mark.parametrize("part", ["state_dict", "tables"])
def test_code_in_the_residual_codec_is_refused_and_not_run(tmp_path, part):
    ran, codec = tmp_path / "ran", new_codec()
    triple = Triple.of(tmp_path, 7)
    save_triple(triple, states_of(codec), codec.params, codec.base_table, codec.residual.tables)
    content = checkpoints.read(triple.vq_base)
    assert load_triple(triple).has_levels
    content[OURS]["residual"][part]["hyper"] = Malicious(ran)
    torch.save(content, triple.vq_base)
    with pytest.raises(CheckpointError, match="vq_model_7.pth.tar: refused"):
        load_triple(triple)
    assert not ran.exists()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_cut_checkpoints_are_refused(tmp_path, new):
    buffer, path = io.BytesIO(), tmp_path / "cut.pth"
    torch.save({"state_dict": {"a": torch.ones(3, 4)}}, buffer, _use_new_zipfile_serialization=new)
    data = buffer.getvalue()
    for end in range(0, len(data), 13):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="cut.pth"):
            checkpoints.read(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello, this is no checkpoint\n" * 20)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    told = {"none": "no such checkpoint", "list": "a checkpoint holds a dictionary", "text": "", "plain": ""}
    for name, message in told.items():
        with pytest.raises(CheckpointError, match=f"{name}.pth: {message}"):
            checkpoints.read(tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


# Parameters, strict loading, digests ----------------------------------------------------------------------------------


def test_parameters_of_public_files():
    wanted = {"a.weight": torch.ones(2), "loss_scale": torch.zeros(1), "decoder.loss.weight": torch.ones(1)}
    extra = {
        "loss.discriminator.weight": torch.ones(3),
        "input_blocks.1.blocks.0.attn_mask": torch.ones(4),
        "blocks.0.attn.relative_position_index": torch.ones(5),
    }
    wrapped = {f"module.{key}": value for key, value in (wanted | extra).items()}
    for content in (wanted | extra, {"state_dict": wanted | extra, "epoch": 3}, {"state_dict": wrapped}):
        found, dropped = checkpoints.parameters_of(content)
        assert found.keys() == wanted.keys() and sorted(dropped) == sorted(extra)


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {"state_dict": torch.ones(2)}, {3: torch.ones(2)}], ids=str)
def test_checkpoints_without_named_parameters_fit_nothing(content):
    with pytest.raises(CheckpointError):
        state, _ = checkpoints.parameters_of(content)
        checkpoints.load_strictly(torch.nn.Linear(2, 3), state, "odd.pth")


def test_loading_is_strict_and_names_what_differs():
    network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = {key: value + 1 for key, value in before.items() if not key.startswith(("1.", "2.", "3."))}
    state |= {"other.weight": torch.ones(1), "0.bias": torch.ones(5)}
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_strictly(network, state, "some.pth")
    assert str(error.value) == (
        "some.pth: does not fit the configuration. missing: 1.weight, 1.bias, 2.weight, 2.bias and 2 more; "
        "surplus: other.weight; other shape: 0.bias [5] for [2]"
    )
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    checkpoints.load_strictly(network, {key: value + 1 for key, value in before.items()}, "some.pth")
    assert all(torch.equal(value, before[key] + 1) for key, value in network.state_dict().items())


def test_digest():
    tensors = {"b": torch.tensor([[0.5, -2.0], [1.5, 4.0]]), "a": torch.tensor([1, 2, 3])}
    name = checkpoints.digest(tensors)
    ours = b"a[3]" + struct.pack("<3q", 1, 2, 3) + b"b[2, 2]" + struct.pack("<4f", 0.5, -2, 1.5, 4)
    assert name == hashlib.sha256(ours).hexdigest()
    for b in (tensors["b"].double(), tensors["b"].half(), tensors["b"].t().contiguous().t()):
        assert checkpoints.digest({"a": tensors["a"].int(), "b": torch.nn.Parameter(b)}) == name
    for other in (
        tensors | {"b": tensors["b"] + torch.tensor([[1e-6, 0], [0, 0]])},
        tensors | {"b": tensors["b"].view(4)},
        tensors | {"c": torch.zeros(0)},
        {"B": tensors["b"], "a": tensors["a"]},
    ):
        assert checkpoints.digest(other) != name


# The three that belong together ---------------------------------------------------------------------------------------


def new_states(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    return states_of(Codec(PARAMS))


def released(folder: Path, states: dict, params=PARAMS, table=None) -> Triple:
    folder.mkdir(exist_ok=True)
    triple = Triple.of(folder, 7)
    save_triple(triple, states, params, table)
    return triple


@pytest.fixture(scope="module")
def states():
    return new_states()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, states) -> Triple:
    """A release that no test changes."""
    return released(tmp_path_factory.mktemp("plain"), states)


@pytest.fixture(scope="module")
def plain_fingerprint(plain):
    return load_triple(plain).fingerprint


def table(seed=0):
    return entropy_coding.frequency_table(np.random.default_rng(seed).integers(0, 1000, K))


def test_a_release_comes_back_as_it_was(tmp_path, states):
    triple = released(tmp_path, states, table=table())
    written = {"GT_vq_model_7.pth.tar", "ema_model_7.pth", "vq_model_7.pth.tar"}
    assert {path.name for path in tmp_path.iterdir()} == written
    codec = load_triple(triple)
    assert codec.params == PARAMS and not codec.training and not any(p.requires_grad for p in codec.parameters())
    for network, state in states.items():
        own = getattr(codec, network).state_dict()
        assert own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)
        assert checkpoints.read(getattr(triple, network))["state_dict"].keys() == state.keys()
    assert np.array_equal(codec.base_table, table()) and codec.base_table.dtype == np.int32
    assert len(codec.fingerprint) == 4
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    again = load_release(tmp_path)
    assert again.fingerprint == codec.fingerprint
    assert torch.equal(again.decompress(codec.compress(image)), codec.decompress(again.compress(image)))


def test_whatever_changes_pictures_changes_the_fingerprint(tmp_path, states, plain_fingerprint):
    def fingerprint(states=states, params=PARAMS, table=None):
        return load_triple(released(tmp_path, states, params, table)).fingerprint

    assert fingerprint(new_states()) == plain_fingerprint
    found = {
        "plain": plain_fingerprint,
        "table": fingerprint(table=table(0)),
        "other table": fingerprint(table=table(1)),
        "c": fingerprint(params=replace(PARAMS, rate=RateParams(c=0.021))),
        "kappa": fingerprint(params=replace(PARAMS, diffusion=replace(PARAMS.diffusion, kappa=1.0))),
    }
    for network, state in states.items():
        key = list(state)[len(state) // 2]
        changed = state[key].clone()
        changed.view(-1)[-1] += 1e-3
        found[network] = fingerprint(states | {network: state | {key: changed}})
        # No parameter shows how many groups a normalisation has, yet every picture depends on it.
        part = getattr(PARAMS, network)
        other = replace(PARAMS, **{network: replace(part, groups=part.groups // 2)})
        found[f"{network}.groups"] = fingerprint(params=other)
    assert len(set(found.values())) == len(found) == 11


def test_a_file_that_says_half_of_what_it_should_is_refused(tmp_path, states):
    triple = released(tmp_path, states)
    content = checkpoints.read(triple.vq_base)
    del content[OURS]["base_table"]
    checkpoints.save(triple.vq_base, content)
    with pytest.raises(CheckpointError, match=f"{triple.vq_base.name}: .* is not whole"):
        load_triple(triple)


@pytest.mark.parametrize("network", ["unet", "autoencoder"])
def test_files_of_two_releases_are_refused(tmp_path, plain, network):
    other = released(tmp_path, new_states(1))
    mixed = replace(plain, **{network: getattr(other, network)})
    name = NAMES[network].format(7)
    with pytest.raises(
        CheckpointError, match=f"{name}: from another release than .*plain.*not its {network}: take the three"
    ):
        load_triple(mixed)


def test_files_of_releases_of_two_sizes_are_told_so_rather_than_by_their_keys(tmp_path, plain):
    params = replace(PARAMS, unet=replace(PARAMS.unet, model_channels=2 * PARAMS.unet.model_channels))
    other = released(tmp_path, states_of(Codec(params)), params)
    with pytest.raises(CheckpointError, match="ema_model_7.pth: from another release than [^;]*$"):
        load_triple(replace(plain, unet=other.unet))


def test_names_that_were_never_published(tmp_path, states):
    with pytest.raises(CheckpointError, match="ema_model_60000.pth: no weights were ever published under this name"):
        load_triple(Triple.of(tmp_path, 60000))
    mine = Triple.of(tmp_path, 60000)
    save_triple(mine, states, PARAMS)
    assert load_triple(mine).fingerprint  # trained ones may have that name
    mine.autoencoder.unlink()
    with pytest.raises(CheckpointError, match="GT_vq_model_60000.pth.tar: no weights were ever published"):
        load_triple(mine)
    with pytest.raises(CheckpointError, match="ema_model_5000.pth: no such checkpoint"):
        load_triple(Triple.of(tmp_path, 5000))


def test_a_folder_holds_one_release(tmp_path, states):
    with pytest.raises(CheckpointError, match="no release there"):
        load_release(tmp_path)
    released(tmp_path, states)
    assert Triple.in_folder(tmp_path) == Triple.of(tmp_path, 7)
    save_triple(Triple.of(tmp_path, 8), states, PARAMS)
    with pytest.raises(CheckpointError, match="several releases there .*ema_model_7.pth, ema_model_8.pth"):
        load_release(tmp_path)


def test_bare_and_wrapped_state_dicts_load(tmp_path, states, plain_fingerprint):
    triple = released(tmp_path, states)
    checkpoints.save(triple.unet, dict(states["unet"]))
    public = {f"module.{key}": value for key, value in states["autoencoder"].items()}
    checkpoints.save(triple.autoencoder, {"state_dict": public | {"module.loss.w": torch.ones(1)}, "epoch": 1})
    assert load_triple(triple).fingerprint == plain_fingerprint


def test_without_our_key_the_configuration_must_be_named(tmp_path, states, plain_fingerprint):
    triple = released(tmp_path, states)
    content = checkpoints.read(triple.vq_base)
    assert json.loads(content[OURS]["networks"]) | {"light": None} == to_mapping(PARAMS)
    checkpoints.save(triple.vq_base, {"state_dict": content["state_dict"]})
    with pytest.raises(CheckpointError, match="vq_model_7.pth.tar: .*--config"):
        load_triple(triple)
    config, networks = tmp_path / "sizes.yaml", to_mapping(PARAMS)
    config.write_text(yaml.safe_dump({"networks": networks}))
    assert load_triple(triple, config).fingerprint == plain_fingerprint
    networks["unet"]["model_channels"] *= 2
    config.write_text(yaml.safe_dump({"networks": networks}))
    with pytest.raises(CheckpointError, match="ema_model_7.pth: does not fit the configuration"):
        load_triple(triple, config)


def test_the_fitted_rate_stays_with_the_weights(tmp_path, states):
    triple = released(tmp_path, states, replace(PARAMS, rate=RateParams(c=0.03)))
    named = load_triple(triple, NANO)
    assert named.rate.c == 0.03 and PARAMS.rate.c == 0.02
    assert named.fingerprint == load_triple(triple).fingerprint
