"""The command inference.py: what it writes, and what it says of bad input."""

import csv
import json

import numpy as np
import pytest
import torch

from models.codec import Codec
from models.entropy_coding import frequency_table
from models.released import Triple, save_triple, states_of
from tests.commands import NANO, ROOT, call, grey_values, photograph, run
from training.config import load_config
from utils import picture_files

DENOISE = ["--ddim", "--one_step"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained small weights with an integer table, as flags."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    codec = Codec(load_config(str(NANO)).networks)
    triple = Triple.of(folder, 5)
    save_triple(triple, states_of(codec), codec.params, frequency_table(np.arange(16)))
    return ["--ckpt", str(triple.unet), "--vqckpt", str(triple.vq_base), "--GT_vqckpt", str(triple.autoencoder)]


@pytest.fixture
def pictures(tmp_path):
    photograph(tmp_path / "in" / "a.png", 64, 48)
    photograph(tmp_path / "in" / "deep" / "b.jpg", 33, 70, seed=1)
    return tmp_path / "in"


def test_round_trip_writes_what_it_says(pictures, weights, tmp_path, capsys):
    out = tmp_path / "out"
    status, table, _ = call(capsys, "-i", pictures, "-o", out, "--recursive", "--overview", *weights, *DENOISE)
    assert status == 0
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    tables = {"metrics.csv", "metrics.json", "overview.png"}
    assert written == {"a.dfo", "a.png", "deep/b.dfo", "deep/b.png"} | tables
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["picture"] for row in rows] == ["a.png", "deep/b.jpg"]
    for row, name, (width, height) in zip(rows, ("a", "deep/b"), ((64, 48), (33, 70)), strict=True):
        size = (out / f"{name}.dfo").stat().st_size
        assert int(row["bytes"]) == size == sum(int(row[f"{part}_bits"]) for part in ("header", "base", "check")) / 8
        assert float(row["bpp"]) == pytest.approx(8 * size / (width * height))
        assert grey_values(out / f"{name}.png").shape == (height, width, 3)
    assert json.loads((out / "metrics.json").read_text())["pictures"][0]["picture"] == "a.png"
    assert "PSNR" in table and "mean of 2" in table


def test_schedule_steps_and_flags_of_the_single_step(pictures, weights, tmp_path, capsys):
    seen = {}
    for name, flags in {
        "rate": [],
        "published": DENOISE,
        "eta": ["--eta", "0.1"],
        "seed": [*DENOISE, "--seed", "7"],
        "ddim": ["--ddim", "--infer_steps", "2"],
        "ancestral": ["--ancestral", "--infer_steps", "2"],
        "infer_steps": ["--infer_steps", "1"],
        "bfloat16": ["--infer_steps", "1", "--one_step", "--precision", "bfloat16"],
    }.items():
        out = tmp_path / name
        assert call(capsys, "-i", pictures / "a.png", "-o", out, *weights, *flags)[0] == 0
        row = json.loads((out / "metrics.json").read_text())["pictures"][0]
        seen[name] = row | {"values": grey_values(out / "a.png")}
    assert seen["eta"]["eta"] == 0.1 and seen["rate"]["eta"] != 0.1
    assert [seen[n]["steps"] for n in ("rate", "ddim", "ancestral", "infer_steps")] == [1, 2, 2, 1]
    assert (seen["published"]["values"] == seen["rate"]["values"]).all()
    assert seen["bfloat16"]["eta"] == seen["rate"]["eta"] != seen["infer_steps"]["eta"]
    for name in ("eta", "seed", "ddim", "ancestral"):
        assert (seen[name]["values"] != seen["rate"]["values"]).any(), name
    assert (seen["ancestral"]["values"] != seen["ddim"]["values"]).any()


def test_decoding_against_references(pictures, weights, tmp_path, capsys):
    files, out = tmp_path / "files", tmp_path / "out"
    assert call(capsys, "--mode", "compress", "-i", pictures, "-o", files, "--recursive", *weights)[0] == 0
    flags = ["--mode", "decompress", "-i", files, "-o", out, "--recursive", *weights, *DENOISE]
    assert call(capsys, *flags, "-r", pictures)[0] == 0  # a.dfo with a.png, deep/b.dfo with deep/b.jpg
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert all(float(row["psnr"]) > 0 for row in rows)
    status, _, error = call(capsys, *flags, "--overwrite", "-r", pictures / "deep")
    assert status == 1 and "named a" in error
    photograph(tmp_path / "others" / "a.png", 64, 40)
    photograph(tmp_path / "others" / "deep" / "b.png", 33, 70)
    other = ["--mode", "decompress", "-i", files, "-o", tmp_path / "other", "--recursive", *weights, *DENOISE]
    status, _, error = call(capsys, *other, "-r", tmp_path / "others")
    assert status == 1 and "64x40 cannot be compared with 64x48" in error
    assert [p.name for p in sorted((tmp_path / "other").rglob("*.png"))] == ["b.png"]  # refused before it was decoded
    round_trip = ["-i", pictures / "a.png", "-o", tmp_path / "both", "-r", tmp_path / "others", *weights]
    assert call(capsys, *round_trip)[0] == 1 and not (tmp_path / "both").exists()  # and before it is coded


def test_inspect_needs_no_weights(pictures, weights, tmp_path, capsys):
    call(capsys, "--mode", "compress", "-i", pictures / "a.png", "-o", tmp_path / "out", *weights)
    inspect = ["--mode", "inspect", "-i", tmp_path / "out"]
    facts = json.loads(call(capsys, *inspect, "--json")[1])
    assert (facts["width"], facts["height"], facts["version"]) == (64, 48, 1)
    assert facts["header_bits"] + facts["base_bits"] + facts["check_bits"] == 8 * facts["bytes"]
    status, text, _ = call(capsys, *inspect)
    assert status == 0 and facts["weights"] in text and "estimated" not in text
    status, text, _ = call(capsys, *inspect, "--json", *weights)
    facts = json.loads(text)
    assert status == 0 and abs(facts["estimated_bits"] - 8 * facts["bytes"]) < 24
    assert facts["fixed_length_base_bits"] == 4 * 3 * 4 and facts["release"] is None


def test_a_broken_picture_does_not_stop_the_others(pictures, weights, tmp_path, capsys):
    (pictures / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:200])
    photograph(pictures / "small.png", 15, 40)
    status, table, error = call(capsys, "-i", pictures, "-o", tmp_path / "out", *weights, *DENOISE)
    assert status == 1 and "broken.png" in error and "small.png" in error and "2 of 3" in error
    assert (tmp_path / "out" / "a.png").exists() and not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "out" / "broken.dfo").exists()


def test_what_a_folder_holds_besides_is_said_in_one_line(pictures, weights, tmp_path, capsys):
    (pictures / "notes.txt").touch()
    args = ["-i", pictures, "-o", tmp_path / "out", "--mode", "compress", *weights]
    status, _, error = call(capsys, *args)
    assert status == 0 and error == f"{pictures}: 1 picture, 1 .txt: no reader\n"


def test_a_picture_that_a_library_fails_on_does_not_stop_the_others(pictures, weights, tmp_path, capsys, monkeypatch):
    def fail(image):
        if image.size == (30, 20):
            raise ValueError("conversion from La to L not supported")
        return image

    photograph(pictures / "0.png", 30, 20)
    monkeypatch.setattr(picture_files, "to_srgb", fail)
    status, _, error = call(capsys, "-i", pictures, "-o", tmp_path / "out", "--mode", "compress", *weights)
    assert status == 1 and "0.png: damaged or cut short (conversion from La" in error and "1 of 2" in error
    assert (tmp_path / "out" / "a.dfo").is_file() and (tmp_path / "out" / "metrics.csv").is_file()


def test_names_that_are_no_text(pictures, weights, tmp_path):
    """Bytes that are no UTF-8 in a name: the tables say them escaped, and nothing is lost."""
    (pictures / "a.png").rename(pictures / "\udcff.png")
    done = run("inference.py", "-i", pictures, "-o", tmp_path / "out", *weights, *DENOISE)
    assert "\\udcff.png" in done.stdout and "\\udcff.png" in (tmp_path / "out" / "metrics.csv").read_text()
    assert (tmp_path / "out" / "\udcff.dfo").is_file()


def test_memory_that_does_not_suffice_is_one_line(pictures, weights, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(Codec, "signals", fail)
    assert "not enough memory on cpu" in refused(capsys, "-i", pictures / "a.png", "-o", tmp_path / "a", *weights)
    monkeypatch.setattr(torch, "load", fail)
    error = refused(capsys, "-i", pictures / "a.png", "-o", tmp_path / "b", *weights)
    assert error.startswith("error: not enough memory (") and "checkpoint" not in error


def refused(capsys, *args) -> str:
    """Exit status 1 and one line on stderr."""
    status, _, error = call(capsys, *args)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_refused_before_any_work(pictures, weights, tmp_path, capsys):
    out = tmp_path / "out"
    assert "no such file" in refused(capsys, "-i", tmp_path / "nothing.png", "-o", out)
    assert "no pictures" in refused(capsys, "-i", tmp_path, "-o", out)
    assert "name too long" in refused(capsys, "-i", "a" * 300, "-o", out)
    assert "overwrite an input" in refused(capsys, "-i", pictures / "a.png", "-o", pictures)
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(capsys, "-i", pictures / "a.png", "-o", tmp_path / "file" / "out")
    assert not out.exists()
    out.mkdir()
    (out / "a.png").write_text("precious")
    assert "it stays; choose another -o" in refused(capsys, "-i", pictures / "a.png", "-o", out, "--overwrite")
    assert (out / "a.png").read_text() == "precious"
    (out / "a.png").rename(out / "a.dfo")
    assert "--overwrite" in refused(capsys, "-i", pictures / "a.png", "-o", out)
    assert (out / "a.dfo").read_text() == "precious"


def test_large_pictures_are_coded_in_tiles(weights, tmp_path, capsys):
    """Above 1.5 chop_size^2 pixels, both ways; the file is as long as that of the whole, which reads it, too."""
    photograph(tmp_path / "a.png", 400, 300)
    assert call(capsys, "-i", tmp_path / "a.png", "-o", tmp_path / "out", "--chop_size", 256, *weights)[0] == 0
    assert call(capsys, "-i", tmp_path / "a.png", "-o", tmp_path / "whole", *weights)[0] == 0
    decode = ["--mode", "decompress", "-i", tmp_path / "out" / "a.dfo", "-o", tmp_path / "b.png", *weights]
    assert call(capsys, *decode)[0] == 0
    sizes = [(tmp_path / folder / "a.dfo").stat().st_size for folder in ("out", "whole")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    tiled, whole = grey_values(tmp_path / "out" / "a.png"), grey_values(tmp_path / "b.png")
    assert tiled.shape == whole.shape == (300, 400, 3) and 0 < abs(tiled - whole).mean() < 8


def test_refused_options(pictures, weights, tmp_path, capsys):
    args = ["-i", pictures / "a.png", "-o", tmp_path / "out", *weights]
    if not torch.cuda.is_available():
        assert "CUDA" in refused(capsys, *args, "--device", "cuda")
    assert "--device tpu" in refused(capsys, *args, "--device", "tpu")
    assert "2 steps" in refused(capsys, *args, "--steps", "15")
    assert "--infer_steps 3: the schedule of these weights has 2 steps" in refused(capsys, *args, "--infer_steps", "3")
    status, _, error = call(capsys, *args, "--chop_size", "100")
    assert status == 2 and "--chop_size: 100 is not a multiple of 64 pixels, from 256" in error
    assert "3000 pixels allowed" in refused(capsys, *args, "--max_pixels", 3000, "--overwrite")
    assert not list((tmp_path / "out").glob("*.dfo"))


@pytest.mark.parametrize(
    "flags",
    [
        "-o out",
        "-i a.png",
        "-i a -o b --weights w --ckpt x --vqckpt y --GT_vqckpt z",
        "-i a.png -o out --ckpt x",
        "--mode squeeze",
        "--mode compress -i a -o b --metrics fsim",
        "--mode compress -i a -o b --preview",
        "--mode decompress -i a -o b --overview",
        "--mode decompress -i a -o b --quality 3",
        "-i a -o b --json",
        "-i a -o b --one_step --eta 1.5",
        "-i a -o b --infer_steps 2 --eta 0.5",
        "-i a -o b --one_step --infer_steps 2",
        "-i a -o b --ancestral",
        "-i a -o b --ancestral --ddim --infer_steps 2",
        "-i a -o b --ancestral --one_step --infer_steps 1",
        "-i a -o b --qual 3",
        "-i a -o b --target 0.1",
    ],
)
def test_wrong_usage_is_status_2(capsys, flags):
    assert call(capsys, *flags.split())[0] == 2


@pytest.mark.parametrize("option", ["-i", "-o", "-r", "--weights"])
def test_an_empty_name_is_not_the_working_folder(option, capsys):
    status, _, error = call(capsys, "-i", "a.png", "-o", "out", option, "")
    assert status == 2 and f"{option}" in error and "an empty name" in error


def test_published_names_that_do_not_exist(pictures, tmp_path, capsys):
    command = "--scale 1 --steps 2 --ckpt weights/ema_model_60000.pth --vqckpt weights/vq_model_60000.pth.tar"
    command += " --GT_vqckpt weights/GT_vq_model_60000.pth.tar --config configs/config.yaml --ddim --one_step"
    error = refused(capsys, "-i", pictures, "-o", tmp_path / "out", "-r", pictures, *command.split())
    assert "no weights were ever published" in error


def test_wrong_checkpoints(pictures, weights, tmp_path, capsys):
    args = ["-i", pictures / "a.png", "-o", tmp_path / "out"]
    error = refused(capsys, *args, *weights, "--config", ROOT / "configs" / "tiny.yaml")
    assert "does not fit" in error and "autoencoder.ch_mult" in error
    swapped = [weights[0], weights[5], *weights[2:]]
    assert "from another release than" in refused(capsys, *args, *swapped)


def test_damaged_files_and_those_of_other_weights(pictures, weights, tmp_path, capsys):
    call(capsys, "--mode", "compress", "-i", pictures / "a.png", "-o", tmp_path / "files", *weights)
    file, out = tmp_path / "files" / "a.dfo", tmp_path / "out"
    needed = json.loads(call(capsys, "--mode", "inspect", "-i", file, "--json")[1])["weights"]
    decode = ["--mode", "decompress", "-i", tmp_path / "files", "-o", out, *DENOISE]
    assert needed in refused(capsys, *decode)  # no release that ships
    file.write_bytes(file.read_bytes()[:-6])
    assert str(file) in refused(capsys, *decode, *weights) and not out.exists()


def test_an_extended_file_is_refused_without_being_read_whole(pictures, weights, tmp_path, capsys):
    call(capsys, "--mode", "compress", "-i", pictures / "a.png", "-o", tmp_path, *weights)
    with open(tmp_path / "a.dfo", "r+b") as file:
        file.truncate(1 << 40)  # sparse: 1 TiB to whoever reads it
    for flags in (["--mode", "inspect"], ["--mode", "decompress", "-o", tmp_path / "out", *weights, *DENOISE]):
        assert "25,000,000 bytes" in refused(capsys, "-i", tmp_path / "a.dfo", *flags)


def test_coding_imports_nothing_heavy(pictures, weights, tmp_path):
    program = "import sys, inference; status = inference.main(sys.argv[1:]); print(*sys.modules); sys.exit(status)"
    loaded = run("-c", program, "-i", pictures / "a.png", "-o", tmp_path / "out", *weights, *DENOISE).stdout.split()
    assert not {"compressai", "pyiqa", "transformers", "tensorboard", "lpips", "torchvision"} & set(loaded)
