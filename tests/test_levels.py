"""Levels and budgets: files of every rate from one model, what they cost, and CompressAI's view of them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coding import budget, ledger
from coding.compressai_view import CompressAIView
from measuring.metrics import bpp
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


LEVELS = range(1, LEVEL_CODES + 1)
RISING = {0: 1000} | {level: 1050 + 4 * level for level in LEVELS}
SIZES = {  # of a picture's files by level
    "small dips": RISING | {level: RISING[level] - 9 for level in range(5, LEVEL_CODES, 10)},
    "a gap": RISING | {level: 1250 + 4 * level for level in range(100, LEVEL_CODES + 1)},
    "a valley": {0: 1000} | {level: 1050 + (level - 60) ** 2 // 9 for level in LEVELS},
    "a low valley": {0: 1000} | {level: 1050 + (level - 7) ** 2 // 9 for level in LEVELS},
    "a high valley": {0: 1000} | {level: 1050 + (level - 190) ** 2 // 9 for level in LEVELS},
}


@pytest.mark.parametrize("profile", SIZES)
def test_sizes_that_are_not_monotone_are_searched_near_the_budget(profile, codec, analysed, monkeypatch):
    """The best file of all but for a few bytes, in few files, the higher level of equal ones; a note where much is left."""
    sizes, written = SIZES[profile], []
    monkeypatch.setattr(codec, "write", lambda picture, level: written.append(level) or bytes(sizes[level]))
    for allowed in range(1000, sizes[LEVEL_CODES], 7):
        written.clear()
        found = budget.fit(codec, analysed, allowed)
        used, best = len(found.data), max(size for size in sizes.values() if size <= allowed)
        rising = [level for level in LEVELS if sizes[level] == used]
        assert best - 40 <= used <= allowed and found.code == max(rising, default=0) and len(written) <= 26, allowed
        if used == allowed or used >= budget.ENOUGH * allowed and found.code:
            assert found.note is None
        else:
            assert "bytes" in found.note and found.note.startswith("base alone") == (found.code == 0)


def test_budgets_at_both_ends(codec, analysed, monkeypatch):
    base, smallest, largest = (len(codec.write(analysed, level)) for level in (0, 1, LEVEL_CODES))
    between = budget.fit(codec, analysed, smallest - 1)
    assert between.code == 0 and len(between.data) == base and f"from {smallest:,} bytes" in between.note
    most = budget.fit(codec, analysed, 10 * largest)
    assert most.code == LEVEL_CODES and len(most.data) == largest and "highest level" in most.note
    assert budget.fit(codec, analysed, largest).note is None
    with pytest.raises(BudgetError, match=f"too few .* its smallest file has {base:,} bytes"):
        budget.fit(codec, analysed, base - 1)
    write = codec.write
    monkeypatch.setattr(codec, "write", lambda picture, level: write(picture, level) if level == 0 else pytest.fail())
    assert budget.fit(codec, analysed, base).note is None
    assert budget.fit(codec, analysed, base + 8).note == "base alone; a residual takes 9 bytes or more"
    monkeypatch.setattr(codec.residual, "tables", None)
    assert budget.fit(codec, analysed, largest).note == "base alone; all that these weights have"


def test_the_shortest_residual_has_the_bytes_that_a_budget_reckons_with(analysed):
    shortest = replace(analysed.file, residual=bitstream.CodedResidual(1, b"z", b"n"))
    assert len(bitstream.pack(shortest)) - len(bitstream.pack(analysed.file)) == bitstream.LEAST_RESIDUAL


def test_the_smallest_rate_that_is_told_can_be_asked_for(codec):
    picture_of_odd_size = codec.analyse(picture(333, 517))
    with pytest.raises(BudgetError) as refused:
        budget.fit(codec, picture_of_odd_size, 1)
    told = float(str(refused.value).rpartition("(")[2].split()[0])
    assert budget.fit(codec, picture_of_odd_size, budget.bytes_of_bpp(told, 333, 517)).code == 0


@pytest.mark.parametrize("height,width", [(333, 500), (150, 250), (60, 100), (1080, 1920), (427, 640), (512, 768)])
def test_a_reported_rate_asked_for_again_allows_the_same_bytes(height, width):
    assert budget.bytes_of_bpp(0.1, 512, 768) == 4915  # 4915.2
    for size in range(20, 9000):
        rate = bpp(size, height, width)
        assert budget.bytes_of_bpp(rate, height, width) == size
        assert budget.bytes_of_bpp(math.nextafter(rate, 0), height, width) == size - 1


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
    status, out, _ = call(capsys, "-i", source, "-o", tmp_path / "x", "--target_bpp", 9, *flags)
    assert status == 0 and "the highest level" in out
    status, _, err = call(capsys, "-i", source, "-o", tmp_path / "y", "--target_bpp", 0.001, *flags)
    assert status == 1 and "its smallest file has" in err and not (tmp_path / "y").exists()
    status, _, err = call(capsys, *decode, "--preview", "--overwrite", "--max_pixels", 1000)
    assert status == 1 and "--max_pixels" in err


def test_files_of_several_levels_are_decoded_together_as_each_alone(codec):
    """Pictures of one size: the base alone between two levels, each with its own residual, noise and noise level."""
    files = [codec.compress(picture(48, 64, seed), quality) for seed, quality in ((0, 90), (1, 0), (2, 20))]
    together = codec.render_all([codec.read(data) for data in files])
    for data, ours in zip(files, together, strict=True):
        alone = codec.decode(data)
        assert ours.eta == alone.eta
        assert (ours.image.int() - alone.image.int()).abs().max() <= 1  # batches round otherwise
