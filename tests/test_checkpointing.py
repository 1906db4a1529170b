"""The content of a checkpoint, which ones of a run stay, and which one it goes on from."""

import json
from pathlib import Path

import pytest
import torch

from models.released import NAMES
from tests.small_runs import lines, tree
from training.checkpointing import Checkpoints, Point
from training.config import load_config
from training.start import new_codec
from utils import checkpoints
from utils.errors import CheckpointError


def fake(folder: Path, steps: list[int], keep_last: int = 2) -> Checkpoints:
    """Checkpoints of stage gt with small contents."""
    kept = Checkpoints(folder, ["gt", "codec"], keep_last)
    for step in steps:
        kept.save(Point("gt", step), {"w": torch.full((2,), float(step))})
        kept.prune(None)
    return kept


def test_the_last_and_the_best_stay(saved_run):
    best = json.loads((saved_run / "best.json").read_text())
    scores = {
        entry["step"]: entry["loss"] for entry in lines(saved_run, "validation.jsonl") if entry["stage"] == "codec"
    }
    step = min(scores, key=scores.get)
    assert set(scores) == {2, 4, 6} and best == {"stage": "codec", "step": step, "loss": scores[step]}
    found = {path.stem for path in (saved_run / "checkpoints").iterdir()}
    assert found == {f"codec_{s}" for s in {5, 6, step}} | {"gt_4"}
    averages = tree(saved_run / "ema_ckpts")
    assert averages == {name.format(s) for s in {6, step} for name in NAMES.values()} | {"gt/GT_vq_model_4.pth.tar"}


def tensors(content) -> list[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("name, trained", [("gt_4", ["autoencoder"]), ("codec_6", ["vq_base", "unet", "residual"])])
def test_a_checkpoint_holds_each_tensor_once(name, trained, saved_run):
    """Weights, averages and two moments of what is trained; the frozen autoencoder once. At the end of stage gt the
    averages are the weights."""
    path = saved_run / "checkpoints" / f"{name}.pth"
    content = checkpoints.read(path)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(content)}
    codec = new_codec(load_config(str(saved_run / "config.yaml")))
    parameters = sum(p.numel() for network in trained for p in getattr(codec, network).parameters())
    frozen = 0 if name == "gt_4" else sum(p.numel() for p in codec.autoencoder.parameters())
    critic = sum(t.numel() for t in tensors(content["training"]["adversary"]["discriminator"]))
    expected = 4 * ((3 if name == "gt_4" else 4) * parameters + frozen + 3 * critic)
    assert sum(held.values()) == pytest.approx(expected, rel=0.05)
    assert path.stat().st_size < sum(held.values()) + 700 * len(held)  # names and padding
    assert sorted(content["codec"]) == sorted(content["averages"]) == sorted(trained)
    assert ("autoencoder" in content) == (name == "codec_6")


def test_a_damaged_checkpoint_is_set_aside(tmp_path):
    kept = fake(tmp_path, [1, 2, 3], keep_last=3)
    kept.path(Point("gt", 3)).write_bytes(b"damaged")
    whole = kept.path(Point("gt", 2)).read_bytes()
    kept.path(Point("gt", 2)).write_bytes(whole[: len(whole) // 2])
    content, refused = kept.newest()
    assert content["step"] == 1 and torch.equal(content["w"], torch.ones(2))
    assert [point.step for point in refused] == [3, 2] and "gt_3.pth" in refused[Point("gt", 3)]
    checkpoints.save(kept.path(Point("gt", 3)), {"w": torch.ones(2)})  # readable, and of nobody's run
    assert "not a checkpoint of a run" in kept.newest()[1][Point("gt", 3)]
    kept.set_aside(refused)
    kept.keep_last = 1
    kept.prune(None)  # the good one is the last one now
    assert tree(tmp_path) == {"checkpoints/gt_1.pth", "checkpoints/gt_2.damaged", "checkpoints/gt_3.damaged"}
    kept.path(Point("gt", 1)).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="no readable checkpoint to go on from"):
        kept.newest()


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    kept = fake(tmp_path, [1])
    for name in ("checkpoints/.gt_2.pth.1.ab.tmp", ".config.yaml.1.ab.tmp", "ema_ckpts/.ema_model_2.pth.1.ab.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ema_ckpts" / "notes.txt").touch()  # the user's
    kept.remove_unfinished()
    kept.prune(None)
    assert tree(tmp_path) == {"checkpoints/gt_1.pth", "ema_ckpts/notes.txt"}


def test_checkpoints_of_other_stages_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vq_1.pth").touch()
    with pytest.raises(CheckpointError, match="stage"):
        Checkpoints(tmp_path, ["gt", "codec"], 2).points()
