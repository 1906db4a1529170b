"""Levels and budgets: files of every rate from one model, what they cost, and CompressAI's view of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coding import budget, ledger
from coding.compressai_view import CompressAIView
from models import bitstream
from models.released import Triple, load_release, load_triple, save_triple, states_of
from models.residual_hyperprior import LEVEL_CODES, node_of
from release.tables import Counts, gaussian_pmf
from tests.commands import call, photograph
from tests.residual import new_codec, picture
from utils.errors import BitstreamError, BudgetError, CheckpointError
from utils.images import write_image


@pytest.fixture(scope="module")
def codec():
    return new_codec()


@pytest.fixture(scope="module")
def image():
    return picture(512, 512)


@pytest.fixture(scope="module")
def analysed(codec, image):
    return codec.analyse(image)


@pytest.fixture(scope="module")
def release(codec, tmp_path_factory):
    """The codec as a release folder."""
    folder = tmp_path_factory.mktemp("release")
    save_triple(Triple.of(folder, 1), states_of(codec), codec.params, codec.base_table, codec.residual.tables)
    return folder


def test_quality_is_continuous(codec, analysed):
    assert [codec.level_code(q) for q in (0, 1e-9, 0.2, 50, 100)] == [0, 1, 1, 128, LEVEL_CODES]
    sizes = [len(codec.write(analysed, level)) for level in (0, 1, 64, 128, 192, 255)]
    assert sizes == sorted(set(sizes))
    for quality in (-1, 101, math.nan):
        with pytest.raises(ValueError, match="quality"):
            codec.level_code(quality)


def test_a_base_does_not_depend_on_the_residual_codec(codec, image, analysed):
    """Level 0, and the same weights with the residual codec switched off, give identical bytes and pictures."""
    without = new_codec()
    without.residual = None
    base, layered = codec.write(analysed, 0), codec.write(analysed, 9)
    assert without.compress(image) == codec.compress(image) == base
    assert torch.equal(without.decode(layered, preview=True).image, without.decompress(base))
    with pytest.raises(CheckpointError, match="base alone"):
        without.compress(image, quality=1)
    with pytest.raises(BitstreamError, match="no residual codec"):
        without.read(layered)


@pytest.mark.parametrize("share", [0.001, 0.37, 1.0])
def test_a_budget_is_used_kept_and_searched_without_the_image_encoder(codec, analysed, monkeypatch, share):
    smallest, largest = (len(codec.write(analysed, level)) for level in (1, LEVEL_CODES))
    allowed = smallest + math.ceil(share * (largest - smallest))
    monkeypatch.setattr(codec, "to_latent", lambda image: pytest.fail("the encoder ran again"))
    monkeypatch.setattr(codec.residual.analysis, "forward", lambda *a: pytest.fail("g_a ran again"))
    written, write = [], codec.write
    monkeypatch.setattr(codec, "write", lambda picture, level: written.append(level) or write(picture, level))
    fitted = budget.fit(codec, analysed, allowed)
    assert 0.97 * allowed <= len(fitted.data) <= allowed and fitted.note is None
    assert fitted.data == write(analysed, fitted.code)
    assert len(written) == len(set(written)) <= 2 + 8 + 2 * budget.NEIGHBOURS


RISING = {level: 1000 + level for level in range(LEVEL_CODES + 1)}
SIZES = {
    "a dip in the middle": RISING | {40: 1041, 41: 1039, 42: 1050},
    "a wide dip": RISING | dict.fromkeys(range(100, 140), 1030) | {120: 1190, 121: 1200},
    "the first level is not the smallest": RISING | {1: 1060, 2: 1050, 10: 1006},
    "far above the base, and with a gap": {g: 1100 + g + 200 * (g > 99) for g in RISING} | {0: 1000, 1: 1120, 9: 1090},
}


@pytest.mark.parametrize("profile", SIZES)
def test_sizes_that_are_not_monotone_are_searched(profile, codec, analysed, monkeypatch):
    """Of any budget, 97 % are used or no level uses more, which the note says with the next larger size."""
    sizes = SIZES[profile]
    monkeypatch.setattr(codec, "write", lambda picture, level: bytes(sizes[level]))
    for allowed in range(1000, sizes[LEVEL_CODES]):
        found = budget.fit(codec, analysed, allowed)
        used, best = len(found.data), max(size for size in sizes.values() if size <= allowed)
        assert used == sizes[found.code] <= allowed
        assert used == best or (found.code and used >= budget.ENOUGH * allowed), allowed
        if used == allowed or (found.code and used >= budget.ENOUGH * allowed):
            assert found.note is None
        else:
            above = min(size for size in sizes.values() if size > allowed)
            assert f"{above:,} bytes" in found.note and found.note.startswith("base alone") == (found.code == 0)


def test_budgets_below_and_outside_the_range(codec, analysed):
    base, smallest, largest = (len(codec.write(analysed, level)) for level in (0, 1, LEVEL_CODES))
    between = budget.fit(codec, analysed, smallest - 1)
    assert between.code == 0 and len(between.data) == base and f"{smallest:,} bytes" in between.note
    assert budget.fit(codec, analysed, base).note is None
    most = budget.fit(codec, analysed, 10 * largest)
    assert len(most.data) == largest and "largest" in most.note
    for allowed, at_most in [(base - 1, True), (largest + 1, False)]:
        with pytest.raises(BudgetError, match=f"{base:,} to {largest:,} bytes"):
            budget.fit(codec, analysed, allowed, at_most)
    assert budget.bytes_of_bpp(0.1, 512, 768) == 4915


def test_the_range_that_is_told_can_be_asked_for(codec):
    picture_of_odd_size = codec.analyse(picture(333, 517))
    with pytest.raises(BudgetError) as refused:
        budget.fit(codec, picture_of_odd_size, 1)
    told = str(refused.value).rpartition("(")[2].split()
    for bpp in (float(told[0]), float(told[2])):
        budget.fit(codec, picture_of_odd_size, budget.bytes_of_bpp(bpp, 333, 517), at_most=False)


@pytest.mark.parametrize("level", [0, 1, 130, 255])
def test_the_ledger_adds_up(codec, analysed, level):
    data = codec.write(analysed, level)
    contents = codec.read(data)
    bits = ledger.ledger(contents.file)
    parts = ("header", "base", *(("hyper", "residual") if level else ()), "check")
    assert [name for name in bits if name.endswith("_bits")] == [f"{part}_bits" for part in parts]
    assert sum(bits[f"{part}_bits"] for part in parts) == 8 * len(data) == 8 * bits["bytes"]
    assert bits["header_bits"] + bits["check_bits"] <= 8 * (28 if level else 19)  # what the README says
    beside = ledger.beside(codec, contents)
    assert abs(beside["estimated_bits"] - 8 * len(data)) < 0.02 * 8 * len(data) + 128
    assert beside["fixed_length_base_bits"] == 32 * 32 * 4


def test_eta_follows_from_all_sections(codec, analysed):
    files = [codec.read(codec.write(analysed, level)) for level in (0, 1, 255)]
    etas = [codec.render(contents).eta for contents in files]
    assert etas == [codec.rate.eta(8 * sum(c.file.section_bytes.values()) / 512**2) for c in files]
    assert etas == sorted(etas, reverse=True)


def test_every_part_of_the_residual_codec_is_in_the_fingerprint(codec, release, tmp_path):
    before = load_release(release).fingerprint
    states, tables = states_of(codec), codec.residual.tables
    other = replace(tables, symbols=np.roll(tables.symbols, 1, axis=0))
    changed = {**states, "residual": states["residual"] | {"log_gain": states["residual"]["log_gain"] + 0.1}}
    for i, (parts, residual_tables) in enumerate([(states, other), (changed, tables)]):
        triple = Triple.of(tmp_path / str(i), 1)
        triple.unet.parent.mkdir()
        save_triple(triple, parts, codec.params, codec.base_table, residual_tables)
        assert load_triple(triple).fingerprint != before


def test_tables_from_counts(codec, analysed):
    """The release's own tables cost less than tables of Gaussians, on what they were counted on."""
    counts, residual, found = Counts.none(codec), codec.residual, {}
    for level in range(5, 256, 25):
        found[level] = residual.symbols(analysed.s, analysed.y, analysed.k, level)
        counts.add(found[level], node_of(level, residual.params))
    counts.base += np.bincount(analysed.k.numpy().ravel(), minlength=16)
    assert counts.symbols.sum() == sum(f.residual.size for f in found.values())
    tables = counts.residual_tables()
    for table in (*tables.hyper.reshape(-1, 31), *tables.symbols):
        assert table.sum() == 1 << 16 and np.array_equal(table > 0, table[::-1] > 0)
    both = new_codec(), new_codec()
    notes = counts.install(both[0])
    assert notes["counted_indices"] == 32 * 32 and 0 < notes["bits_per_index"] <= 4
    sizes = [sum(len(c.write(analysed, level)) for level in found) for c in both]
    assert sizes[0] < sizes[1]
    np.testing.assert_allclose(gaussian_pmf().sum(1)[:30], 1, atol=1e-6)


# CompressAI's conventions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [0, 60])
def test_compressai_view(codec, quality):
    view = CompressAIView(codec, quality).eval()
    x = torch.stack([picture(64, 128, seed) for seed in (0, 1)]).float() / 255
    coded = view.compress(x)
    assert coded["strings"][0] == [codec.compress(picture(64, 128, seed), quality) for seed in (0, 1)]
    assert coded["shape"] == (4, 8) and view.update() is False and view.update(force=True) is False
    decoded = view.decompress(coded["strings"], coded["shape"])["x_hat"]
    out = view(x)
    assert torch.equal(out["x_hat"], decoded) and decoded.shape == x.shape and 0 <= decoded.min() <= decoded.max() <= 1
    bits = -sum(p.log2().sum().item() for p in out["likelihoods"].values())
    written = 8 * sum(map(len, coded["strings"][0]))
    assert abs(bits - written) < 2 * 24


def test_compressai_evaluates_it(codec, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", torch.backends.cudnn.deterministic)
    from compressai.utils.eval_model.__main__ import eval_model  # which sets threads and determinism

    torch.set_num_threads(threads)
    for i in range(2):
        write_image(tmp_path / f"{i}.png", picture(192, 256, i))
    files, view = sorted(tmp_path.glob("*.png")), CompressAIView(codec, 50)
    coded, estimated = (
        eval_model(view, tmp_path, tmp_path, files, entropy, architecture="diffo", half=False, per_image=False)
        for entropy in (False, True)
    )
    sizes = [len(codec.compress(picture(192, 256, i), 50)) for i in range(2)]
    assert coded["bpp"] == pytest.approx(8 * sum(sizes) / 2 / (192 * 256), rel=1e-9)
    assert abs(estimated["bpp"] - coded["bpp"]) < 0.02 * coded["bpp"] + 128 / (192 * 256)
    assert estimated["psnr-rgb"] == pytest.approx(coded["psnr-rgb"], abs=1e-4)


def test_inference_writes_budgets_and_previews(release, tmp_path, capsys):
    source = photograph(tmp_path / "in" / "a.png", 512, 512)
    flags = ["--weights", release, "--one_step", "--ddim"]
    status, _, _ = call(capsys, "-i", source, "-o", tmp_path / "o", "--max_bytes", 4000, *flags)
    row = json.loads((tmp_path / "o" / "metrics.json").read_text())["pictures"][0]
    data = (tmp_path / "o" / "a.dfo").read_bytes()
    assert status == 0 and row["bytes"] == len(data) <= 4000 and row["code"] == bitstream.unpack(data).residual.code
    parts = ("header", "base", "hyper", "residual", "check")
    assert sum(row[f"{part}_bits"] for part in parts) == 8 * len(data)
    status, out, _ = call(capsys, "--mode", "inspect", "-i", tmp_path / "o", "--json", "--weights", release)
    told = json.loads(out)
    assert status == 0 and sum(told[f"{part}_bits"] for part in parts) == 8 * len(data)
    assert all(told[name] == row[name] for name in ("code", "estimated_bits", "fixed_length_base_bits"))
    (tmp_path / "cut.dfo").write_bytes(data[: len(data) * 2 // 3])
    inspect = ["--mode", "inspect", "-i", tmp_path / "cut.dfo", "--json"]
    status, _, err = call(capsys, *inspect)
    assert status == 1 and "--preview" in err
    status, out, _ = call(capsys, *inspect, "--preview")
    assert status == 0 and json.loads(out)["bytes"] < len(data) / 2
    decode = ["--mode", "decompress", "-i", tmp_path / "cut.dfo", "-o", tmp_path / "p", *flags]
    status, _, err = call(capsys, *decode)
    assert status == 1 and "--preview" in err and not list((tmp_path / "p").glob("*.png"))
    status, out, _ = call(capsys, *decode, "--preview")
    assert status == 0 and "preview: the base alone" in out and (tmp_path / "p" / "cut.png").is_file()
    status, _, err = call(capsys, "-i", source, "-o", tmp_path / "x", "--target_bpp", 9, *flags)
    assert status == 1 and " to " in err and not list((tmp_path / "x").glob("*.dfo"))
    status, _, err = call(capsys, *decode, "--preview", "--overwrite", "--max_pixels", 1000)
    assert status == 1 and "--max_pixels" in err
