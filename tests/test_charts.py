import numpy as np
from PIL import Image

from measuring.charts import Curve, chart


def test_a_mark_lies_on_its_curve(tmp_path):
    """A diamond of the curve's own colour with a black edge, and nothing else that is different."""
    pixels = {}
    for mark in (None, 2.5):
        chart([Curve("a", [1, 2, 3], [1, 4, 0], mark)], tmp_path / "a.png", "x", "y", "title")
        pixels[mark] = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    rows, columns = np.nonzero((pixels[None] != pixels[2.5]).any(axis=2))
    height, width, _ = pixels[None].shape
    assert 10 < np.ptp(rows) < height / 10 and 10 < np.ptp(columns) < width / 10
    # (2.5, 2) lies at three quarters of the width of the axes and half their height.
    assert abs(rows.mean() / height - 0.5) < 0.06 and 0.65 < columns.mean() / width < 0.8
