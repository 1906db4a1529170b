"""Which pictures a command of reproduce.py takes, and what it refuses before any work."""

from argparse import Namespace

import pytest

from experiments.coded import baselines_of, curve_of, fill
from experiments.inputs import named_photographs, photographs, spread
from experiments.summary import label_words, upright
from models.codec import Codec
from reproduce import parse
from tests.commands import photograph
from tests.small_releases import reproduce
from utils.errors import DiffoError


def test_a_limit_spreads_over_all_names(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").touch()
    assert [path.name for path in photographs(tmp_path, 3)] == ["0.png", "2.png", "4.png"]
    assert spread([], 3) == []
    assert list(named_photographs(tmp_path, 4)) == ["0.png", "1.png", "3.png", "4.png"]
    assert len(photographs(tmp_path)) == len(photographs(tmp_path, 9)) == 5


def test_one_stem_is_refused_only_where_files_are_named_by_it(tmp_path):
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).touch()
    assert len(photographs(tmp_path)) == 2
    with pytest.raises(DiffoError, match="have one stem"):
        named_photographs(tmp_path)


def test_results_do_not_go_among_the_pictures(tmp_path, capsys, monkeypatch):
    """There, a second run would take decoded pictures and charts for photographs."""
    monkeypatch.setattr(Codec, "analyse", lambda *_: pytest.fail("a picture was coded"))
    picture = photograph(tmp_path / "kodak" / "0.png", 96, 80)
    for out in (picture.parent, picture.parent / "results"):
        assert reproduce("rates", "--data", picture.parent, "--codecs", "--metrics", "psnr", "-o", out) == 1
        assert "lies in the pictures' folder" in capsys.readouterr().err
    assert list(picture.parent.iterdir()) == [picture]


def test_what_is_named_twice_is_one_point():
    base_alone = type("BaseAlone", (), {"has_levels": False})
    assert len(curve_of("small", base_alone, Namespace(qualities=[0, 0.0, 20], bpp=()))) == 1
    assert len(curve_of("small", base_alone, Namespace(qualities=[20], bpp=[0.05, 0.050, 0.1]))) == 2
    assert [codec.name for codec in baselines_of(["webp", "jpeg", "webp"], [])] == ["webp", "jpeg"]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("40", "quality 40"),
        ("at 0.4 by payload", "at the bytes of quality 0.4 by payload"),
        ("0.05bpp", "0.05 bits per pixel"),
        ("at 0.05bpp by payload", "at the bytes of 0.05 bits per pixel by payload"),
        ("corrected by U", "corrected by U"),
    ],
)
def test_labels_are_told_in_words(label, words):
    assert label_words(label) == words


def test_ranks_meet_before_the_first_of_them_writes(monkeypatch):
    """One that looked later would find files of the others, have fewer jobs, and leave them waiting."""
    happened = []
    monkeypatch.setattr("experiments.coded.gather_objects", lambda rows: happened.append("met") or [rows])
    fill(None, [lambda: happened.append("wrote") or []], "")
    assert happened[:2] == ["met", "wrote"]


@pytest.mark.parametrize("timeout", ["-1", "nan", "0"])
def test_a_timeout_is_a_number_of_seconds(timeout, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["weights", f"--timeout={timeout}"])
    assert f"{timeout} is not a number of seconds above 0" in capsys.readouterr().err


def test_few_rows_of_many_columns_stand_upright_on_a_terminal():
    """Artefacts has 30 columns: some 500 characters. A table that fits, or of more rows than columns, stays."""
    wide = [[f"{name} of a column {i}" for i in range(30)] for name in ("heading", "value")]
    assert upright(wide) == [[f"heading of a column {i}", f"value of a column {i}"] for i in range(30)]
    assert upright([["codec", "bytes"], ["small", "400"]]) == [["codec", "bytes"], ["small", "400"]]
    long = [["x" * 90, "y" * 90]] * 4
    assert upright(long) == long
