"""A release: half precision, densities, what it is made of, and training that starts from it."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from models.codec import Codec
from models.context_model import ContextModel
from models.records import CodecParams
from models.released import (
    DENSITIES,
    OURS,
    Triple,
    load_release,
    load_triple,
    save_triple,
    start_from_release,
    states_of,
)
from models.residual_hyperprior import HYPER_REACH, SYMBOL_REACH
from models.residual_networks import ResidualParams
from models.stated import meaning
from release import context_model
from release.__main__ import main
from release.from_run import averaged, chosen, set_rules
from release.making import halved, round_to_half, with_rate, write_release
from release.tables import Counts, count
from tests.commands import NANO, photograph
from tests.residual import new_codec, picture
from training.config import RUN_CONFIG, load_config
from utils import checkpoints
from utils.config import to_mapping
from utils.errors import CheckpointError

EXACT = ("quantize.embedding.", "scale_network.", "log_gain", "median")


def trained_codec() -> Codec:
    """As training leaves it: with densities, whose medians are 0.5, 1.5 and 2.5."""
    codec = new_codec()
    codec.residual.train_rates()
    with torch.no_grad():
        codec.residual.median.copy_(torch.tensor([0.5, 1.5, 2.5]))
        codec.residual.rate_model.bottleneck.quantiles += codec.residual.median.view(-1, 1, 1)
        for parameter in codec.residual.rate_model.parameters():
            parameter += 0.125
    return codec.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    photograph(data / "0.png", 90, 70)
    config = load_config(str(NANO), values={"data.folder": str(data)})
    return replace(config, networks=new_codec().params)


@pytest.fixture(scope="module")
def rounded():
    codec = trained_codec()
    round_to_half(codec)
    return codec


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rounded, config) -> Path:
    """A release of the rounded codec, in half precision, that no test changes."""
    folder = tmp_path_factory.mktemp("release")
    write_release(folder, 7, rounded, config, "float16")
    return folder


def assert_alike(ours: dict, theirs: dict) -> None:
    """The same keys and tensors."""
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


def stored(folder: Path) -> dict:
    triple = Triple.in_folder(folder)
    found = {name: checkpoints.read(path)["state_dict"] for name, path in vars(triple).items()}
    return found | {"residual": checkpoints.read(triple.vq_base)[OURS]["residual"]["state_dict"]}


# Half precision -------------------------------------------------------------------------------------------------------


def test_networks_are_stored_in_half_precision_and_code_books_and_integers_exactly(folder):
    before = states_of(trained_codec())
    for network, state in stored(folder).items():
        assert state.keys() == {key for key in before[network] if not key.startswith(DENSITIES)}
        for key, value in state.items():
            exact = key.startswith(EXACT)
            assert value.dtype == (torch.float32 if exact else torch.float16), key
            assert torch.equal(value, before[network][key] if exact else before[network][key].half()), key
    assert {key.partition(".")[0] for key in stored(folder)["residual"] if key.startswith(EXACT)} == {
        "scale_network",
        "log_gain",
        "median",
    }


def test_what_is_loaded_computes_as_the_rounded_codec(folder, rounded):
    codec, about = load_release(folder), json.loads((folder / "release.json").read_text())
    assert codec.fingerprint.hex() == about["fingerprint"] and about["precision"] == "float16"
    assert all(parameter.dtype == torch.float32 for parameter in codec.parameters())
    assert np.array_equal(codec.base_table, rounded.base_table)
    for key, table in vars(rounded.residual.tables).items():
        assert np.array_equal(getattr(codec.residual.tables, key), table)
    rounded.fingerprint = codec.fingerprint
    for quality in (0, 50):
        data = rounded.compress(picture(64, 80), quality)
        assert codec.compress(picture(64, 80), quality) == data
        assert torch.equal(codec.decompress(data), rounded.decompress(data))


def test_a_value_beyond_float16_is_refused_with_its_tensor():
    """The largest float16 is 65504, and what is nearer to 65536 becomes infinite."""
    state = {"out.bias": torch.tensor([0.0, 65519.0]), "log_gain": torch.tensor([1e9])}
    assert halved(state, "residual")["out.bias"].tolist() == [0, 65504]
    state["out.bias"][0] = -65520
    with pytest.raises(CheckpointError, match="residual: out.bias: float16.* cannot hold 6.552e.04"):
        halved(state, "residual")


def test_another_rate_rule_keeps_precision_and_densities(folder, tmp_path):
    rate = replace(load_release(folder).params.rate, c=0.03)
    with_rate(folder, rate, tmp_path / "new")
    old, new = (load_triple(Triple.in_folder(f), densities=True) for f in (folder, tmp_path / "new"))
    assert new.rate == rate and new.fingerprint != old.fingerprint
    assert yaml.safe_load((tmp_path / "new" / RUN_CONFIG).read_text())["networks"]["rate"]["c"] == 0.03
    for name, state in states_of(old).items():
        assert_alike(new.get_submodule(name).state_dict(), state)
    assert stored(tmp_path / "new")["unet"]["out.2.weight"].dtype == torch.float16


# Fingerprints ---------------------------------------------------------------------------------------------------------


def test_parameters_added_later_count_where_they_are_not_at_their_default():
    params = CodecParams()
    assert set(meaning(params)) == {"autoencoder", "vq_base", "unet", "diffusion"}
    assert not {"patch", "shortcut"} & meaning(params)["autoencoder"].keys()
    folded = replace(params, autoencoder=replace(params.autoencoder, ch_mult=(1, 2, 4), patch=4))
    assert meaning(folded)["autoencoder"]["patch"] == 4 and "shortcut" not in meaning(folded)["autoencoder"]
    assert not {"shortcut", "least_side"} & meaning(params)["vq_base"].keys()
    grown = replace(params, vq_base=replace(params.vq_base, shortcut="linear", least_side=16))
    assert meaning(grown)["vq_base"] == meaning(params)["vq_base"] | {"shortcut": "linear", "least_side": 16}
    assert meaning(replace(params, detail_branch=False))["detail_branch"] is False
    finished = meaning(replace(params, sharpening=0.1, colour_blur=0.2))
    assert finished == meaning(params) | {"sharpening": 0.1, "colour_blur": 0.2}
    plain, ruled = (
        meaning(replace(params, residual=ResidualParams(**rules)))["residual"]
        for rules in ({}, {"masking": 0.1, "stretch": 0.2})
    )
    assert not ResidualParams().rules.keys() & plain.keys() and ruled == plain | {"masking": 0.1, "stretch": 0.2}
    trained = replace(params.vq_base, decay=0.5, epsilon=0.1, revive_below=0.5)
    assert meaning(replace(params, vq_base=trained)) == meaning(params)


# Densities, and training from a release -------------------------------------------------------------------------------


def test_densities_stay_beside_the_tables_and_change_no_fingerprint(folder, rounded, config, tmp_path):
    kept = checkpoints.read(Triple.in_folder(folder).vq_base)[OURS]["residual"]["densities"]
    assert_alike(kept, {DENSITIES + key: value for key, value in rounded.residual.rate_model.state_dict().items()})
    plain = load_release(folder)
    assert plain.residual.rate_model is None
    about = write_release(tmp_path, 7, plain, config, "float16")
    with_densities = load_triple(Triple.in_folder(folder), densities=True)
    assert about["fingerprint"] == plain.fingerprint.hex() == with_densities.fingerprint.hex()


def test_the_files_of_a_release_are_deflated(folder):
    for path in vars(Triple.in_folder(folder)).values():
        with zipfile.ZipFile(path) as archive:
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_DEFLATED}


def fresh(params: CodecParams) -> Codec:
    torch.manual_seed(1)
    codec = Codec(params)
    if codec.residual:
        codec.residual.train_rates()
    return codec.train()


def test_training_starts_from_everything_that_a_release_has(folder, rounded):
    other_rule = replace(rounded.params, rate=replace(rounded.params.rate, c=0.1))
    codec = fresh(other_rule)
    assert start_from_release(folder, codec) == [f"unet, vq_base, autoencoder, residual from {folder}"]
    for name, state in states_of(rounded).items():
        assert_alike(getattr(codec, name).state_dict(), state)
    assert codec.rate.c == 0.1 and codec.training and codec.unet.out[2].weight.requires_grad


def test_densities_that_a_release_lacks_start_around_its_medians(tmp_path, rounded, config):
    states = states_of(rounded)
    states["residual"] = {key: v for key, v in states["residual"].items() if not key.startswith(DENSITIES)}
    save_triple(Triple.of(tmp_path, 7), states, rounded.params)
    codec = fresh(rounded.params)
    told = start_from_release(tmp_path, codec)
    assert told[1:] == [f"{tmp_path} has no densities of the residual: they are fitted anew"]
    assert codec.residual.rate_model.bottleneck.quantiles[:, 0].tolist() == [
        [-9.5, 0.5, 10.5],
        [-8.5, 1.5, 11.5],
        [-7.5, 2.5, 12.5],
    ]
    assert torch.equal(codec.residual.log_gain, rounded.residual.log_gain)
    shared = fresh(rounded.params)
    shared.residual.median = shared.residual.rate_model.median  # one memory, as after a training pass
    start_from_release(tmp_path, shared)
    assert shared.residual.rate_model.median.tolist() == [0.5, 1.5, 2.5]


def test_a_shortcut_that_a_release_lacks_changes_nothing_at_first(folder, rounded, tmp_path):
    grown = replace(rounded.params, vq_base=replace(rounded.params.vq_base, shortcut="linear", least_side=3))
    codec = fresh(grown)
    assert start_from_release(folder, codec)[1:] == [
        f"{folder} has no linear shortcut of the VQ base: it starts at zero"
    ]
    x = torch.randn(1, grown.vq_base.in_channels, 4, 4)
    with torch.no_grad():
        ours, theirs = codec.vq_base.eval()(x), rounded.vq_base(x)
        assert torch.equal(ours.z, theirs.z)
        assert torch.equal(codec.vq_base.reconstruct(ours.z_q), rounded.vq_base.reconstruct(theirs.z_q))
    save_triple(Triple.of(tmp_path, 7), states_of(codec), codec.params)
    with pytest.raises(CheckpointError, match="of other networks: vq_base.shortcut None for linear"):
        start_from_release(tmp_path, fresh(rounded.params))


def test_a_release_of_other_sizes_is_refused_with_its_keys(folder, rounded):
    wider = replace(rounded.params, unet=replace(rounded.params.unet, condition_width=4))
    with pytest.raises(CheckpointError, match="of other networks: unet.condition_width 4 for 8"):
        start_from_release(folder, fresh(wider))
    with pytest.raises(CheckpointError, match="of other networks: residual"):
        start_from_release(folder, fresh(replace(rounded.params, residual=None)))
    with pytest.raises(CheckpointError, match="of other networks: prediction correction for None"):  # no shape tells
        start_from_release(folder, fresh(replace(rounded.params, prediction="correction")))


# What a release is made of --------------------------------------------------------------------------------------------


def test_a_checkpoint_whose_decoder_goes_on_learning_has_its_average(tmp_path, rounded):
    checkpoint(tmp_path / "codec_3.pth", rounded, 3)
    content = checkpoints.read(tmp_path / "codec_3.pth")
    content["averages"]["autoencoder"] = content.pop("autoencoder")
    checkpoints.save(tmp_path / "codec_4.pth", content)
    ours, theirs = (states_of(averaged(tmp_path / f"codec_{step}.pth"))["autoencoder"] for step in (3, 4))
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())


def checkpoint(path: Path, codec: Codec, step: int, stage: str = "codec") -> None:
    """A training checkpoint of the stage, with raw weights that are not its averages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = states_of(codec)
    averages = {name: states[name] for name in ("unet", "vq_base", "residual")}
    raw = {name: {key: value + 1 for key, value in state.items()} for name, state in averages.items()}
    networks = json.dumps(to_mapping(codec.params))
    about = {"stage": stage, "step": step, "networks": networks, "averages": averages, "codec": raw}
    checkpoints.save(path, about | {"autoencoder": states["autoencoder"]})


@pytest.fixture
def run_folder(tmp_path, config) -> Path:
    """A run with checkpoints of codec at 9 and 12, of gt at 20, and the triple at 10."""
    folder, codec = tmp_path / "run", trained_codec()
    for stage, step in [("codec", 9), ("codec", 12), ("gt", 20)]:
        checkpoint(folder / "checkpoints" / f"{stage}_{step}.pth", codec, step, stage)
    (folder / "ema_ckpts").mkdir()
    save_triple(Triple.of(folder / "ema_ckpts", 10), states_of(codec), codec.params)
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(to_mapping(config)))
    return folder


def test_the_newest_the_best_or_the_one_that_is_asked_for(run_folder):
    points, triple = run_folder / "checkpoints", Triple.of(run_folder / "ema_ckpts", 10)
    assert chosen(run_folder, None) == (12, points / "codec_12.pth")
    assert chosen(run_folder, "9") == (9, points / "codec_9.pth") and chosen(run_folder, "10") == (10, triple)
    with pytest.raises(CheckpointError, match="no validation of stage codec"):
        chosen(run_folder, "best")
    (run_folder / "best.json").write_text('{"stage": "co')
    with pytest.raises(CheckpointError, match="best.json: not readable JSON"):
        chosen(run_folder, "best")
    (run_folder / "best.json").write_text('{"stage": "codec", "step": 10, "loss": 0.5}')
    assert chosen(run_folder, "best") == (10, triple)
    for asked in ("11", "20", "last"):
        with pytest.raises(CheckpointError, match=f"iteration {asked}; there are: 9, 10, 12"):
            chosen(run_folder, asked)
    triple.unet.unlink()
    with pytest.raises(CheckpointError, match="iteration 10; there are: 9, 12"):
        chosen(run_folder, "best")
    with pytest.raises(CheckpointError, match="it has not saved yet"):
        chosen(points, None)


def test_a_checkpoint_and_its_triple_give_one_release_however_it_is_counted(run_folder, rounded, tmp_path, capsys):
    for out, options in {"a": ["9", "--batch", "2"], "b": ["10", "--batch", "5"]}.items():
        command = [str(run_folder), str(tmp_path / out), "--crops", "5", "--device", "cpu", "--iteration", *options]
        assert main(command) == 0, capsys.readouterr().err
    told = [json.loads((tmp_path / out / "release.json").read_text()) for out in "ab"]
    assert told[0]["fingerprint"] == told[1]["fingerprint"] and told[0]["counted_indices"] == 5 * (64 // 16) ** 2
    assert told[0]["precision"] == "float16"
    codec = load_triple(Triple.in_folder(tmp_path / "a"), densities=True)
    for name, state in states_of(rounded).items():
        assert_alike(getattr(codec, name).state_dict(), state)


def test_tables_are_counted_with_the_rounded_networks(run_folder, config, rounded, tmp_path):
    assert main([str(run_folder), str(tmp_path / "out"), "--crops", "4", "--device", "cpu"]) == 0
    expected = count(rounded, config, crops=4)
    tables = load_release(tmp_path / "out").residual.tables
    assert np.array_equal(tables.hyper, expected.residual_tables().hyper)
    assert np.array_equal(tables.symbols, expected.residual_tables().symbols)


def test_symbols_of_every_crop_are_kept_at_one_level_in_turn(config, rounded):
    """For the context model: of crop 4, whose turn is the second of three levels, what a file of a code of that level holds."""
    counts = count(rounded, config, crops=7)
    assert len(counts.coded) == 7 and all(crop.residual.dtype == np.int8 for crop in counts.coded)
    sums = [np.abs(crop.residual).sum() for crop in counts.coded]
    assert sums[0] < sums[2] and sums[3] < sums[5]  # the first level and the last
    total = np.zeros_like(counts.symbols)
    for crop in counts.coded:
        np.add.at(total, (crop.index, crop.residual.astype(int) + SYMBOL_REACH), 1)
    assert (total <= counts.symbols).all() and 3 * total.sum() == counts.symbols.sum()


def test_a_release_has_a_context_model_where_crops_are_enough(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(context_model, "ENOUGH", 20)
    monkeypatch.setattr(context_model, "BATCH", 16)
    monkeypatch.setattr(ContextModel, "bits", lambda self, n, index: np.zeros(n.shape))  # two steps save nothing
    asked = [str(run_folder), "--crops", "20", "--index_steps", "0", "--device", "cpu"]
    assert main([*asked, str(tmp_path / "with"), "--context_steps", "2"]) == 0
    assert main([*asked, str(tmp_path / "without"), "--context_steps", "0"]) == 0
    about = [json.loads((tmp_path / name / "release.json").read_text()) for name in ("with", "without")]
    assert about[0]["context_model"]["held_out_bits_per_position"] == 0 < about[0]["context_model"]["without"]
    assert "context_model" not in about[1] and about[0]["fingerprint"] != about[1]["fingerprint"]
    assert load_release(tmp_path / "with").residual.context_model
    assert not load_release(tmp_path / "without").residual.context_model


def test_rules_are_told_at_release(run_folder, tmp_path, rounded, capsys):
    """Files and pictures depend on them, sizes of networks do not: training that starts there has its own."""
    asked = [str(run_folder), "--crops", "4", "--index_steps", "0", "--device", "cpu"]
    assert main([*asked, str(tmp_path / "plain")]) == 0
    assert main([*asked, str(tmp_path / "ruled"), "--masking", "0.3", "--stretch", "0.2", "--sharpening", "0.5"]) == 0
    plain, ruled = load_release(tmp_path / "plain"), load_release(tmp_path / "ruled")
    assert (ruled.residual.params.masking, ruled.residual.params.stretch) == (0.3, 0.2)
    assert ruled.params == replace(plain.params, residual=ruled.residual.params, sharpening=0.5) != plain.params
    assert load_config(str(tmp_path / "ruled" / RUN_CONFIG)).networks == ruled.params
    assert plain.fingerprint != ruled.fingerprint
    assert not np.array_equal(plain.residual.tables.symbols, ruled.residual.tables.symbols)  # counted with the rule
    told = start_from_release(tmp_path / "ruled", fresh(rounded.params))
    assert told[1:] == [
        f"{tmp_path / 'ruled'} codes with sharpening 0.5, here it is 0.0",
        f"{tmp_path / 'ruled'} codes with masking 0.3, here it is 0.0",
        f"{tmp_path / 'ruled'} codes with stretch 0.2, here it is 0.0",
    ]
    config = to_mapping(load_config(str(run_folder / RUN_CONFIG)))
    own = {"masking": 0.4, "stretch": 0.1}
    config["networks"]["residual"] |= own
    run = tmp_path / "with rules"
    set_rules(codec := trained_codec(), own)
    checkpoint(run / "checkpoints" / "codec_9.pth", codec, 9)
    (run / RUN_CONFIG).write_text(yaml.safe_dump(config))
    kept = [str(run), *asked[1:], str(tmp_path / "kept")]  # the run's, but for what is told
    assert main([*kept, "--stretch", "0.3"]) == 0
    assert load_release(tmp_path / "kept").residual.params.rules == own | {"stretch": 0.3, "masking_floor": 1.0}
    config["stages"] = ["decoder"]
    (run / RUN_CONFIG).write_text(yaml.safe_dump(config | {"release": "elsewhere"}))
    assert main([str(run), str(tmp_path / "none"), "--masking", "0.1"]) == 1
    assert "--masking: a run of stage decoder leaves the rules of its release as they are" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*asked, str(tmp_path / "wrong"), "--masking", "-0.1"])
    assert "argument --masking: -0.1 is not 0 to 1" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="--stretch: the run has no residual codec .networks.residual"):
        set_rules(Codec(replace(rounded.params, residual=None)), {"stretch": 0.1, "sharpening": 0.1})
    set_rules(codec := Codec(replace(rounded.params, residual=None)), {"sharpening": 0.1})
    assert codec.params.rules == {"sharpening": 0.1, "colour_blur": 0.0}


def test_tables_of_hyper_symbols_reach_one_beyond_the_largest_seen(rounded):
    counts = Counts.none(rounded)
    counts.hyper[..., HYPER_REACH - 2] = 5
    assert (counts.residual_tables().reach("hyper") == 3).all()


def test_a_file_that_is_no_checkpoint_of_the_stage_is_refused(run_folder, capsys):
    checkpoints.save(run_folder / "checkpoints" / "codec_30.pth", {"stage": "codec", "step": 30})
    assert main([str(run_folder), str(run_folder / "out"), "--device", "cpu"]) == 1
    assert "codec_30.pth: not a checkpoint of stage codec" in capsys.readouterr().err
