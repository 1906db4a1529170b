"""The stream of training crops: every random choice is a function of the seed and the position alone."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datapipe.draws import DrawParams, draw
from datapipe.pictures import Batch, DataParams, Pictures, enlarged_crop, epoch_order, positions, stream
from tests.commands import photograph
from utils.images import find_pictures, read_image

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven photographs, two of them in a sub-folder, one smaller than a crop."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        photograph(root / f"{i}.png", 90 + i, 60, seed=i)
    for i in (4, 5):
        photograph(root / "sub" / f"{i}.png", 50, 70 + i, seed=i)
    photograph(root / "small.png", 20, 17, seed=6)
    return root


def dataset(folder, seed=0, size=SIZE, **params) -> Pictures:
    return Pictures(DataParams(folder=str(folder), **dict(workers=0) | params), size, seed)


def batches(pictures, batch, rank, world, first, count):
    return list(itertools.islice(stream(pictures, batch, rank, world, first), count))


# Positions ------------------------------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation(folder, monkeypatch):
    pictures = dataset(folder)
    n = len(pictures.source)
    files = [pictures.source.path(i) for i in range(n)]
    assert n == 7 and files == list(map(str, find_pictures(folder)))
    read = []
    monkeypatch.setattr("datapipe.sources.read_image", lambda path: read.append(path) or read_image(path))
    for position in range(3 * n):
        pictures[position]
    epochs = [read[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(epoch) == files for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert read == [files[epoch_order(0, p // n, n)[p % n]] for p in range(3 * n)]


@pytest.mark.parametrize("world", [1, 3, 64])
def test_ranks_share_the_positions_of_a_step(world):
    """Rank r takes p = r mod world; together they take every position once, step after step."""
    ranks = [list(itertools.islice(positions(4, rank, world, 0), 3)) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert sorted(p for part in parts for p in part) == list(range(step * 4 * world, (step + 1) * 4 * world))
        assert all({p % world for p in part} == {rank} and len(part) == 4 for rank, part in enumerate(parts))


def test_it_may_go_on_with_another_batch_and_world(folder):
    """No position twice, none left out; the crops are those of a run on one process that never stopped."""
    shares = [(3, rank, 2, 0, 2) for rank in (0, 1)] + [(1, rank, 3, 12, 4) for rank in range(3)]
    parts = [part for share in shares for part in batches(dataset(folder), *share)]
    crops = {p: crop for part in parts for p, crop in zip(part.position.tolist(), part.image, strict=True)}
    assert sum(map(len, parts)) == len(crops) == 24
    for part in batches(dataset(folder), 5, 0, 1, 0, 5):  # crosses the ends of epochs of 7 pictures
        assert part.image.shape == (5, 3, SIZE, SIZE) and part.image.dtype == torch.float32 and not part.draws
        for p, crop in zip(part.position.tolist(), part.image, strict=True):
            assert p == 24 or torch.equal(crops[p], crop)


def test_workers_do_not_change_the_stream(folder):
    """Crops and draws are functions of (seed, position): neither workers nor the batch that holds one matter."""
    params = DrawParams((2, 3, 4), 4, levels=3, uniforms=5)
    pictures = [Pictures(DataParams(str(folder), workers=workers), SIZE, 0, draws=params) for workers in (0, 2)]
    alone = [batches(pictures[0], 1, 0, 1, first, 1)[0] for first in range(6)]
    for part in batches(pictures[1], 3, 0, 1, 0, 2):
        assert set(part.draws) == {"t", "spread", "decoder_input", "noise", "level", "uniform"} and len(part) == 3
        assert part.position.dtype == torch.int64 and part.draws["noise"].shape == (3, 2, 3, 4)
        for i, position in enumerate(part.position.tolist()):
            single = alone[position]
            assert single.position.tolist() == [position] and torch.equal(single.image[0], part.image[i])
            numbers = draw(params, 0, position)
            assert all(torch.equal(numbers[name], part.draws[name][i]) for name in numbers)


def test_global_generators_do_not_matter_and_the_seed_does(coordinates):
    """Of one picture, whose order cannot tell; every crop is at another place."""
    crops = []
    for global_seed, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        pictures = dataset(coordinates, seed=seed)
        crops.append(torch.stack([pictures[p]["image"] for p in range(4)]))
    assert torch.equal(crops[0], crops[1]) and len(torch.cat(crops[1:]).unique(dim=0)) == 8


# Crops ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coordinates(tmp_path):
    """A picture 120x80 whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:80, :120]
    levels = np.stack([columns, rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "coordinates.png")
    return tmp_path


def test_plain_crops_are_pieces_of_the_picture(coordinates):
    """Bit for bit v / 127.5 - 1, computed as (v / 255 - 0.5) / 0.5 in float32."""
    pictures = dataset(coordinates, flip=False)
    corners = set()
    for position in range(40):
        item = pictures[position]
        crop = item["image"].numpy()
        assert item["position"] == position and crop.shape == (3, SIZE, SIZE)
        left, top = (round((crop[c, 0, 0].item() + 1) * 127.5) for c in (0, 1))
        rows, columns = np.mgrid[top : top + SIZE, left : left + SIZE].astype(np.float32)
        values = np.stack([columns, rows, np.full_like(rows, 255)])
        np.testing.assert_array_equal(crop, (values / np.float32(255) - np.float32(0.5)) / np.float32(0.5))
        corners.add((left, top))
    assert len(corners) > 30
    assert max(x for x, _ in corners) > 60 and max(y for _, y in corners) > 35  # of 88 and 48
    assert min(x for x, _ in corners) < 20 and min(y for _, y in corners) < 12


def test_the_whole_range_of_levels(tmp_path):
    levels = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (64, 64, 3))
    Image.fromarray(levels).save(tmp_path / "extremes.png")
    for params in (dict(), dict(enlarge=(1.3, 1.9)), dict(crop="square")):
        pictures = dataset(tmp_path, **params)
        crops = torch.stack([pictures[p]["image"] for p in range(4)])
        assert crops.min() >= -1 and crops.max() <= 1  # bicubic enlargement overshoots
        if params.get("crop") != "square":
            assert crops.min() == -1 and crops.max() == 1


def test_half_of_the_crops_are_mirrored(coordinates):
    plain, mirrored = dataset(coordinates, flip=False), dataset(coordinates)
    turned = []
    for position in range(400):
        a, b = plain[position]["image"], mirrored[position]["image"]
        turned.append(torch.equal(b, a.flip(2)))
        assert turned[-1] != torch.equal(a, b)
    assert 170 <= sum(turned) <= 230  # 200 and three standard deviations of 10


def test_a_share_of_the_crops_is_plain(folder):
    """Along rows and columns a plain crop has no second difference; half of them are of one colour, half are grey."""
    pictures = dataset(folder, plain=0.5)
    crops = [pictures[position]["image"] for position in range(400)]
    plain = [c for c in crops if max(c.diff(n=2, dim=1).abs().max(), c.diff(n=2, dim=2).abs().max()) < 1e-5]
    flat = [c for c in plain if torch.equal(c, c[:, :1, :1].expand_as(c))]
    grey = [c for c in plain if torch.equal(c, c[:1].expand_as(c))]
    assert 170 <= len(plain) <= 230  # 200 and three standard deviations of 10
    for some in (flat, grey):
        assert 0.35 < len(some) / len(plain) < 0.65
    assert any((c == -1).all() for c in flat) and any((c == 1).all() for c in flat)
    steepest = max((c[:, :, -1] - c[:, :, 0]).abs().max().item() for c in plain)
    assert 1 < steepest <= 2


def test_a_share_of_the_crops_ends_in_lines(folder):
    """Of one grey, along each side by a chance of a half, 1 to 4 pixels wide; the rest of the crop is as without them."""
    framed, bare = dataset(folder, framed=0.5, flip=False, plain=1.0), dataset(folder, flip=False, plain=1.0)
    pairs = [(framed[position]["image"], bare[position]["image"]) for position in range(400)]
    sides = []
    for ours, theirs in pairs:
        assert torch.equal(ours[:, 4:-4, 4:-4], theirs[:, 4:-4, 4:-4])
        for turns in range(4):
            a, b = ours.rot90(turns, (1, 2)), theirs.rot90(turns, (1, 2))
            changed = [not torch.equal(a[:, row, 4:-4], b[:, row, 4:-4]) for row in range(4)]
            if any(changed):
                line = a[:, :4, 4:-4][:, changed]
                assert torch.equal(line, line[:1, :, :1].expand_as(line))
                inner = line[0, -1, 0]
                assert (line[:, 1:] == inner).all() and ((line[:, 0] == inner).all() or (line[:, 0] == -1).all())
                sides.append((turns, sum(changed), float(inner), bool((line[:, 0] != inner).any())))
    with_lines = sum(not torch.equal(*pair) for pair in pairs)
    assert 150 <= with_lines <= 225  # half, but for the 1 in 16 that no side is drawn of
    assert len(sides) / with_lines == pytest.approx(32 / 15, rel=0.1)
    for turns in range(4):
        assert sum(side[0] == turns for side in sides) > 70
    assert {side[1] for side in sides} == {1, 2, 3, 4}
    assert sum(side[2] == -1 for side in sides) > 80 and sum(side[2] == 1 for side in sides) > 60
    wide = [
        side for side in sides if side[1] > 1 and side[2] > -1
    ]  # whose outermost pixels can be told from the others
    assert sum(side[3] for side in wide) / len(wide) == pytest.approx(1 / 3, abs=0.1)


def test_enlarged_crops_show_less_of_the_picture(coordinates):
    pictures = dataset(coordinates, flip=False, enlarge=(1.5, 3.0))
    factors = []
    for position in range(30):
        red = pictures[position]["image"][0]
        shown = (red[:, -1] - red[:, 0]).mean().item() * 127.5  # columns between the first and the last
        factors.append((SIZE - 1) / shown)
    assert 1.4 < min(factors) < 1.8 and 2.4 < max(factors) < 3.2


@pytest.mark.parametrize("place", [(0, 0), (29, 90), (61, 90)], ids=str)
@pytest.mark.parametrize("enlarged", [(93, 122), (48, 88), (490, 880)], ids=str)
def test_an_enlarged_crop_is_one_of_the_enlarged_picture(enlarged, place):
    """Only what it shows is converted; its pixels are those of the whole picture's interpolation, rims included."""
    picture = torch.randint(0, 256, (3, 48, 88), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    top, left = (min(start, side - 32) for start, side in zip(place, enlarged, strict=True))
    crop = enlarged_crop(picture, enlarged, top, left, 32)
    signed = picture / 127.5 - 1
    whole = F.interpolate(signed[None], size=enlarged, mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(crop, whole[:, top : top + 32, left : left + 32], rtol=0, atol=1e-3)


def test_small_pictures_are_enlarged_to_a_crop(tmp_path):
    photograph(tmp_path / "small.png", 40, 17)
    for params in (dict(), dict(crop="square"), dict(enlarge=(0.5, 1.2))):
        pictures = dataset(tmp_path, **params)
        for position in range(5):
            crop = pictures[position]["image"]
            assert crop.shape == (3, SIZE, SIZE) and crop.std() > 0.05


def test_square_crops_hold_the_whole_short_side(coordinates):
    pictures = dataset(coordinates, flip=False, crop="square", size=20)
    lefts = set()
    for position in range(20):
        crop = pictures[position]["image"]
        columns, rows = (crop[:2] + 1) * 127.5
        # 80 rows become 20: each is the mean of four, from 1.5 to 77.5.
        torch.testing.assert_close(rows, (1.5 + 4 * torch.arange(20.0)).view(20, 1).expand(20, 20), rtol=0, atol=1e-3)
        left = columns[0, 0].item() - 1.5
        torch.testing.assert_close(columns[0], left + 1.5 + 4 * torch.arange(20.0), rtol=0, atol=1e-3)
        lefts.add(round(left))
    assert 0 <= min(lefts) and max(lefts) <= 40 and len(lefts) > 10


def test_positions_stay_on_the_cpu():
    """What is drawn at them is drawn there; to read them must not wait for a device."""
    batch = Batch(torch.ones(2, 3, 16, 16), torch.arange(2), {"t": torch.zeros(2)}).to("meta")
    assert batch.image.is_meta and batch.draws["t"].is_meta and batch.position.tolist() == [0, 1]
