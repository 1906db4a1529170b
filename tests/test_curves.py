"""The picture of a run's log: what is drawn of it, its smoothing, and logs that cannot be drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from measuring import charts
from tests.small_runs import lines
from training.curves import main, series


@pytest.fixture
def drawn(monkeypatch):
    """What `panels` was given last."""
    told, draw, save = {}, charts.panels, charts._save

    def panels(curves, *args):
        told.clear()
        told.update(curves)
        draw(curves, *args)

    def saved(figure, path):
        told["figure"] = figure
        save(figure, path)

    monkeypatch.setattr(charts, "panels", panels)
    monkeypatch.setattr(charts, "_save", saved)
    return told


@pytest.fixture
def run(tmp_path):
    """Two entries of stage gt, three of stage codec, the last of them cut off; a validation."""
    entries = [{"stage": "gt", "step": step, "loss": 1.0, "lr": 0.1} for step in (0, 25)]
    entries += [
        {"stage": "codec", "step": 10 * i, "loss": 0.5 - i, "bpp_level_0": 0.04, "bpp_level_1": 0.1, "revived": 3}
        for i in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries))[:-4])
    (tmp_path / "validation.jsonl").write_text(json.dumps({"stage": "codec", "step": 20, "psnr": 25.0}) + "\n")
    return tmp_path


def test_running_means_by_hand():
    assert charts.running_mean([1, 2, 6, 3, 8], 3).tolist() == pytest.approx([1.5, 3, 11 / 3, 17 / 3, 5.5])
    assert charts.running_mean([4, 7], 1).tolist() == [4, 7]


def test_the_last_stage_is_drawn_or_that_which_is_asked_for(run, drawn, capsys):
    assert main([str(run)]) == 0 and capsys.readouterr().out == f"{run / 'curves.png'}\n"
    figure = drawn.pop("figure")
    assert [*drawn] == ["loss", "bits per pixel by level", "validation: psnr"]
    assert [axes.get_title() for axes in figure.axes] == [*drawn, ""]
    assert [len(axes.lines) for axes in figure.axes] == [2, 4, 2, 0]  # as it is, and its mean
    assert (drawn["loss"][0].x, drawn["loss"][0].y) == ([0, 10], [0.5, -0.5])
    assert [(curve.label, curve.y) for curve in drawn["bits per pixel by level"]] == [
        ("0", [0.04] * 2),
        ("1", [0.1] * 2),
    ]
    pixels = np.asarray(Image.open(run / "curves.png").convert("L"))
    assert min(pixels.shape) > 200 and pixels.min() < 100 and (run / "curves.pdf").is_file()
    assert main([str(run), "--stage", "gt", "-o", str(run / "gt.png")]) == 0
    assert [*drawn] == ["loss", "lr", "figure"] and drawn["lr"][0].x == [0, 25] and (run / "gt.png").is_file()


def test_curves_are_drawn_as_they_are_and_as_means_over_a_twentieth(drawn, tmp_path):
    x, y = np.arange(80), np.random.default_rng(0).normal(size=80)
    charts.panels({"loss": [charts.Curve("", x, y)]}, tmp_path / "a.png", "iterations", "")
    plain, mean = drawn["figure"].axes[0].lines
    assert (plain.get_ydata() == y).all()
    assert mean.get_ydata()[40] == pytest.approx(y[38:43].mean())  # 4 of 80, and one to be around its place


def test_all_that_training_logs_can_be_drawn(saved_run, tmp_path, drawn):
    assert main([str(saved_run), "-o", str(tmp_path / "codec.png")]) == 0
    logged = series(lines(saved_run, "metrics.jsonl"), "codec")
    assert {"loss", "rate", "bits per pixel by level", "validation: loss"} <= drawn.keys()
    assert drawn["loss"][0].y == logged["loss"][1]


def test_a_folder_that_has_nothing_to_draw_is_told(run, tmp_path, capsys):
    for folder, options, told in [
        (tmp_path / "none", [], "no training run there, or none that has logged anything (metrics.jsonl)"),
        (run, ["--stage", "light"], "nothing logged of stage light; there are: gt, codec"),
    ]:
        assert main([str(folder), *options]) == 1
        assert capsys.readouterr().err == f"error: {folder}: {told}\n"
    for text in (b"no log\nat all\n", b"[1]\n", b'{"loss": 1}\n', b"\xff\xfe\n"):
        (run / "metrics.jsonl").write_bytes(text)
        assert main([str(run)]) == 1 and "metrics.jsonl: not a log of a training run (" in capsys.readouterr().err
    assert main([str(run), "-o", "x.txt"]) == 1 and "-o x.txt: name a .png file" in capsys.readouterr().err
