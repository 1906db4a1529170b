from itertools import groupby

from experiments.published import KINDS, published, records


def test_every_record_names_its_kind_and_source_and_says_something():
    assert len(records()) > 200
    for record in records():
        assert record.kind in KINDS and record.where, record
        assert record.scores or record.decode_s, record
        assert record.bpp is None or 0 < record.bpp <= 0.3, record
        assert set(record.scores) <= {
            *("psnr", "ms_ssim", "ms_ssim_rgb", "lpips-vgg", "lpips-alex", "dists", "fid", "kid"),
            *("bd-rate-lpips-vgg", "bd-rate-dists"),
        }


def test_a_curve_has_one_source_and_gets_better_with_its_rate():
    """Points of one system, set and score can be joined by a line; reading off a curve may err by 0.003."""
    joined = 0
    for dataset in ("kodak", "clic2020-768", "clic2020-full", "div2k", "div2k-full"):
        for score in ("lpips-alex", "lpips-vgg", "dists"):
            found = [record for record in published(dataset, score) if not record.variant]
            for system, points in groupby(found, key=lambda record: record.system):
                points = list(points)
                joined += len(points) > 2
                assert len({record.source for record in points}) == 1, system
                values = [record.scores[score] for record in points]
                assert all(b < a + 0.003 for a, b in zip(values, values[1:], strict=False)), (system, dataset, score)
                assert all(a.bpp < b.bpp for a, b in zip(points, points[1:], strict=False)), (system, dataset, score)
    assert joined > 20


def test_filters_narrow_down_to_the_papers_tables():
    steps = published(source="paper-table2", score="lpips-vgg")
    assert {record.variant for record in steps} >= {"1 step", "50 steps", "trained with 2 steps, run with 1"}
    assert {record.bpp for record in steps} == {0.0294} and {record.kind for record in steps} == {"secondary"}
    (ours,) = (record for record in published(source="paper-table1", timed=True) if record.system == "DiffO")
    assert (ours.encode_s, ours.decode_s, ours.size) == (0.136, 0.253, "768x768")
    assert ours.scores["bd-rate-lpips-vgg"] == -45.65 and ours.parameters == 210_000_000
    assert {record.system for record in published("div2k-full", "dists")} == {"MS-ILLM", "StableCodec"}
