"""Which input becomes which output, and that nothing of the user's is replaced."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from coding.plan import inputs, plan
from models.codec import Codec
from models.entropy_coding import frequency_table
from models.released import Triple, save_triple, states_of
from tests.commands import NANO, ROOT, call, grey_values, photograph
from training.config import load_config
from utils.errors import DiffoError
from utils.files import made_folder
from utils.images import is_ours

COMPRESS, DECOMPRESS, ROUNDTRIP = [".dfo"], [".png"], [".dfo", ".png"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained small weights with an integer table, as a flag."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    codec = Codec(load_config(str(NANO)).networks)
    save_triple(Triple.of(folder, 5), states_of(codec), codec.params, frequency_table(np.arange(16)))
    return ["--weights", folder]


@pytest.fixture
def same_stem(tmp_path):
    """A folder with a.jpg and a.png, of different sizes."""
    photograph(tmp_path / "in" / "a.jpg", 32, 48)
    photograph(tmp_path / "in" / "a.png", 64, 48)
    return tmp_path / "in"


def outputs(folder, names, suffixes, known=None) -> dict[str, str]:
    """Input name -> the output that its first suffix gives."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    files = inputs([folder / name for name in names], suffixes == DECOMPRESS, recursive=False)
    jobs = plan(files, folder / "out", None, suffixes, [], known)
    return {job.name: str(job.output(suffixes[0]).relative_to(folder / "out")) for job in jobs}


def test_the_later_of_one_stem_keeps_its_whole_name(tmp_path):
    found = outputs(tmp_path, ["a.jpg", "a.png", "a.png.jpg", "b.tif"], COMPRESS)
    assert found == {"a.jpg": "a.dfo", "a.png": "a.png.dfo", "a.png.jpg": "a.png.jpg.dfo", "b.tif": "b.dfo"}
    assert outputs(tmp_path, ["a.dfo", "a.png.dfo"], DECOMPRESS) == {"a.dfo": "a.png", "a.png.dfo": "a.png.png"}


def test_a_name_in_the_table_stays_what_it_is(tmp_path):
    known = {"a.png": "a.dfo", "b.jpg": "b.jpg.dfo", "a.dfo": "a.png", "gone.png": "c.dfo"}
    found = outputs(tmp_path, ["a.jpg", "a.png", "b.jpg", "c.gif"], ROUNDTRIP, known)
    assert found == {"a.jpg": "a.jpg.dfo", "a.png": "a.dfo", "b.jpg": "b.jpg.dfo", "c.gif": "c.gif.dfo"}
    assert outputs(tmp_path, ["a.dfo"], DECOMPRESS, known) == {"a.dfo": "a.png"}


def test_a_name_given_twice_counts_once(same_stem):
    given = [same_stem, same_stem / "a.png", same_stem / ".." / "in" / "a.jpg"]
    assert [name.name for _, name in inputs(given, streams=False, recursive=False)] == ["a.jpg", "a.png"]


def test_two_files_of_one_name_are_refused(tmp_path):
    photograph(tmp_path / "x" / "a.png", 20, 20)
    photograph(tmp_path / "y" / "a.png", 20, 20)
    with pytest.raises(DiffoError, match="have one name: give each a folder"):
        plan(inputs([tmp_path / "x", tmp_path / "y"], False, False), tmp_path / "out", None, COMPRESS, [])


def test_both_pictures_of_one_stem_go_there_and_back(same_stem, weights, tmp_path, capsys):
    files, out = tmp_path / "files", tmp_path / "out"
    assert call(capsys, "--mode", "compress", "-i", same_stem, "-o", files, *weights)[0] == 0
    status, table, _ = call(capsys, "--mode", "decompress", "-i", files, "-o", out, "-r", same_stem, *weights)
    assert status == 0 and f"written to {out}/: 2 .png, metrics.csv, metrics.json" in table
    assert grey_values(out / "a.png").shape == (48, 32, 3) and grey_values(out / "a.png.png").shape == (48, 64, 3)


def test_an_output_of_an_earlier_run_keeps_its_name(same_stem, weights, tmp_path, capsys):
    code = ["--mode", "compress", "-o", tmp_path / "out", *weights, "-i"]
    assert call(capsys, *code, same_stem / "a.png")[0] == 0
    before = (tmp_path / "out" / "a.dfo").read_bytes()
    assert call(capsys, *code, same_stem / "a.jpg")[0] == 0  # nothing to overwrite
    assert (tmp_path / "out" / "a.dfo").read_bytes() == before and (tmp_path / "out" / "a.jpg.dfo").is_file()
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["pictures"]
    assert [(row["picture"], row["output"]) for row in rows] == [("a.png", "a.dfo"), ("a.jpg", "a.jpg.dfo")]


def test_a_picture_that_is_not_ours_stays(same_stem, weights, tmp_path, capsys):
    original, file = same_stem / "a.png", same_stem / "a.dfo"
    before = original.read_bytes()
    assert call(capsys, "--mode", "compress", "-i", original, "-o", file, *weights)[0] == 0
    decode = ["--mode", "decompress", "--overwrite", *weights, "-i"]
    for given, out in ((same_stem, same_stem), (file, same_stem)):
        status, _, error = call(capsys, *decode, given, "-o", out)
        assert status == 1 and f"{original}: is there, and no picture of this codec's" in error
        assert "choose another -o" in error and original.read_bytes() == before
    (tmp_path / "sheet").mkdir()
    (tmp_path / "sheet" / "overview.png").write_bytes(before)
    overview = ["--overwrite", "--overview", "-i", original, "-o", tmp_path / "sheet", *weights]
    assert "overview.png: is there, and no picture of" in call(capsys, *overview)[2]
    assert call(capsys, *decode, file, "-o", original)[0] == 0  # named alone
    assert is_ours(original)
    assert call(capsys, *decode, file, "-o", same_stem)[0] == 0  # the codec's own by now
    assert call(capsys, "--overview", "-i", same_stem / "a.jpg", "-o", tmp_path / "new", *weights)[0] == 0
    assert is_ours(tmp_path / "new" / "overview.png")


def test_decoding_beside_the_files(weights, tmp_path, capsys):
    photograph(tmp_path / "a.jpg", 20, 20)
    assert call(capsys, "--mode", "compress", "-i", tmp_path / "a.jpg", "-o", tmp_path / "b", *weights)[0] == 0
    assert call(capsys, "--mode", "decompress", "-i", tmp_path / "b", "-o", tmp_path / "b", *weights)[0] == 0
    assert sorted(path.name for path in (tmp_path / "b").glob("a.*")) == ["a.dfo", "a.png"]


def test_an_output_named_alone_is_that_file(same_stem, weights, tmp_path, capsys):
    out = tmp_path / "new"
    status, table, _ = call(capsys, "--mode", "compress", "-i", same_stem / "a.jpg", "-o", out / "x.dfo", *weights)
    assert status == 0 and [path.name for path in out.iterdir()] == ["x.dfo"] and f"written to {out}/: x.dfo" in table
    assert call(capsys, "--mode", "decompress", "-i", out / "x.dfo", "-o", out / "y.png", *weights)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["x.dfo", "y.png"]
    assert call(capsys, "-i", same_stem / "a.jpg", "-o", out / "z.dfo", *weights)[0] == 0
    assert sorted(path.name for path in out.glob("z*")) == ["z.dfo", "z.png"]
    for mode, given, name, told in [
        ("compress", [same_stem], "both.dfo", "one file for 2 inputs"),
        ("compress", [same_stem / "a.jpg"], "x.png", "ends in .dfo; name such a file, or a folder"),
        ("decompress", [out / "x.dfo"], "x.JPG", "ends in .png; name such a file, or a folder"),
        ("roundtrip", [same_stem / "a.jpg", "--overview"], "w.png", "--overview needs a folder"),
        ("roundtrip", [same_stem / "a.png"], "../in/a.dfo", "a.png: this output would overwrite an input"),
    ]:
        status, _, error = call(capsys, "--mode", mode, "-i", *given, "-o", out / name, *weights)
        assert status == 1 and told in error, error


def test_refusals_leave_no_folder(same_stem, weights, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    for flags in (
        ["--weights", tmp_path / "none"],
        ["--max_bytes", "3", *weights],
        ["--infer_steps", "9", *weights],
        ["--max_pixels", "100", *weights],
    ):
        assert call(capsys, "-i", same_stem / "a.jpg", "-o", out, *flags)[0] == 1
        assert not (tmp_path / "deep").exists(), flags
    with made_folder(out):
        (out / "kept").touch()
    assert (out / "kept").exists()


def test_what_is_said_of_a_single_small_picture(same_stem, weights, tmp_path, capsys):
    """No mean of one, a reason where a score is missing, nothing that reads None."""
    status, table, _ = call(capsys, "-i", same_stem / "a.jpg", "-o", tmp_path / "out", *weights)
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())["pictures"][0]
    assert status == 0 and "mean of" not in table and "ms_ssim" in row and row["ms_ssim"] is None
    assert row["note"] == "MS-SSIM (luma) needs sides from 161 pixels" and row["note"] in table
    _, text, _ = call(capsys, "--mode", "inspect", "-i", tmp_path / "out" / "a.dfo", *weights)
    assert "None" not in text and "none of those that ship" in text


def test_an_interrupt_is_one_line(tmp_path, weights):
    """Ctrl-C while a folder is coded: status 130, and the pictures that were done are in the table."""
    for number in range(200):
        photograph(tmp_path / "in" / f"{number:03}.png", 64, 64, number)
    args = [sys.executable, "inference.py", "-i", tmp_path / "in", "-o", tmp_path / "out", *weights]
    work = subprocess.Popen([str(arg) for arg in args], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    waited = time.monotonic()
    while not (tmp_path / "out" / "metrics.json").exists() and time.monotonic() - waited < 60:
        time.sleep(0.02)
    work.send_signal(signal.SIGINT)
    _, told = work.communicate(timeout=60)
    assert work.returncode == 130 and told.endswith("\ninterrupted\n") and "Traceback" not in told
    done = json.loads((tmp_path / "out" / "metrics.json").read_text())["pictures"]
    assert 0 < len(done) < 200 and not list(tmp_path.rglob("*.tmp"))
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {name for row in done for name in (row["picture"], row["output"])} | {
        "metrics.csv",
        "metrics.json",
    }
