"""Means of measurements, and the table that is printed."""

import math
import re

from coding.report import aligned_table, mean_row


def test_a_mean_is_over_all_rows_or_not_there():
    """MS-SSIM of one small picture is missing, PSNR of equal ones is infinite, an extra metric is not a number."""
    rows = [
        {"picture": "a.png", "bytes": 100, "bpp": 0.1, "psnr": 20.0, "ms_ssim": 0.8, "eta": 0.5, "vif": 0.25},
        {"picture": "b.png", "bytes": 300, "bpp": 0.2, "psnr": math.inf, "ms_ssim": None, "eta": 1.0, "vif": math.nan},
    ]
    mean = mean_row(rows)
    assert mean == {"picture": "mean of 2", "bytes": 200, "bpp": (0.1 + 0.2) / 2, "eta": 0.75}
    first, *_, last = aligned_table([*rows, mean]).splitlines()
    assert re.split("  +", first)[-4:] == ["noise eta", "PSNR dB", "MS-SSIM (luma)", "VIF"]  # as in every other table
    assert last.split() == "mean of 2 200.0 0.1500 0.750 - - -".split()
