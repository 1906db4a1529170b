"""The stream of training crops: every random choice is a function of the seed and the position alone."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from datapipe import pictures as module
from datapipe.pictures import DataParams, Pictures, Positions, enlarged_crop, epoch_order, generator, stream
from tests.commands import photograph
from utils.images import read_image, to_signed

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
    n, files = len(pictures.source), pictures.source.paths
    assert n == 7
    read = []
    monkeypatch.setattr("datapipe.sources.read_image", lambda path: read.append(path) or read_image(path))
    for position in range(3 * n):
        pictures[position]
    epochs = [read[i : i + n] for i in range(0, 3 * n, n)]
    assert all(sorted(epoch) == files for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert read == [files[epoch_order(0, p // n, n)[p % n]] for p in range(3 * n)]


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_ranks_share_the_positions_of_a_step(world):
    """Rank r takes p = r mod world; together they take every position once, step after step."""
    batch, steps = 4, 3
    taken = []
    for step in range(steps):
        of_step = []
        for rank in range(world):
            positions = next(iter(Positions(batch, rank, world, step * batch * world)))
            assert len(positions) == batch and {p % world for p in positions} == {rank}
            of_step += positions
        assert sorted(of_step) == list(range(step * batch * world, (step + 1) * batch * world))
        taken += of_step
    assert sorted(taken) == list(range(steps * batch * world))


def test_batches_cross_the_ends_of_epochs(folder):
    pictures = dataset(folder)
    found = batches(pictures, 5, 0, 1, 0, 3)  # 15 positions of 7 pictures
    assert [p.tolist() for _, p in found] == [list(range(i, i + 5)) for i in (0, 5, 10)]
    assert all(crops.shape == (5, 3, SIZE, SIZE) and crops.dtype == torch.float32 for crops, _ in found)


@pytest.mark.parametrize("world", [2, 3])
def test_the_crops_do_not_depend_on_the_world_size(folder, world):
    def crops(world):
        found = {}
        for rank in range(world):
            for images, positions in batches(dataset(folder), 6 // world, rank, world, 0, 2):
                found |= dict(zip(positions.tolist(), images, strict=True))
        return found

    alone, shared = crops(1), crops(world)
    assert sorted(alone) == sorted(shared) == list(range(12))
    assert all(torch.equal(alone[p], shared[p]) for p in alone)


def test_a_run_goes_on_where_it_stopped(folder):
    whole = batches(dataset(folder), 3, 1, 2, 0, 5)
    rest = batches(dataset(folder), 3, 1, 2, 3 * 3 * 2, 2)
    for (images, positions), (again, same) in zip(whole[3:], rest, strict=True):
        assert torch.equal(positions, same) and torch.equal(images, again)


def test_it_may_go_on_with_another_batch_and_world(folder):
    """No position twice, none left out."""
    before = [p for rank in (0, 1) for _, positions in batches(dataset(folder), 3, rank, 2, 0, 2) for p in positions]
    after = [p for rank in range(3) for _, positions in batches(dataset(folder), 1, rank, 3, 12, 4) for p in positions]
    assert sorted(map(int, before + after)) == list(range(24))


def test_workers_do_not_change_the_stream(folder):
    for (images, positions), (again, same) in zip(
        batches(dataset(folder), 3, 0, 1, 0, 3), batches(dataset(folder, workers=2), 3, 0, 1, 0, 3), strict=True
    ):
        assert torch.equal(positions, same) and torch.equal(images, again)


def test_global_generators_do_not_matter_and_the_seed_does(folder):
    crops = []
    for global_seed, seed in ((0, 0), (1, 0), (1, 1)):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        pictures = dataset(folder, seed=seed)
        crops.append(torch.stack([pictures[p][0] for p in range(4)]))
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[1], crops[2])


def test_random_streams_are_independent():
    draws = {
        (seed, purpose, position): generator(seed, purpose, position).random()
        for seed in range(3)
        for purpose in (module.EPOCH, module.CROP, module.DRAWS, module.REVIVAL)
        for position in range(3)
    }
    assert len(set(draws.values())) == 36
    assert generator(2, module.CROP, 1).random() == draws[2, module.CROP, 1]


# Crops ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coordinates(tmp_path):
    """A picture 120x80 whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:80, :120]
    levels = np.stack([columns, rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "coordinates.png")
    return tmp_path


def test_plain_crops_are_pieces_of_the_picture(coordinates):
    pictures = dataset(coordinates, flip=False)
    whole = to_signed(read_image(pictures.source.paths[0]))
    corners = set()
    for position in range(40):
        crop, told = pictures[position]
        assert told == position and crop.shape == (3, SIZE, SIZE)
        left, top = (round((crop[c, 0, 0].item() + 1) * 127.5) for c in (0, 1))
        assert torch.equal(crop, whole[:, top : top + SIZE, left : left + SIZE])
        corners.add((left, top))
    assert len(corners) > 30
    assert max(x for x, _ in corners) > 60 and max(y for _, y in corners) > 35  # of 88 and 48
    assert min(x for x, _ in corners) < 20 and min(y for _, y in corners) < 12


def test_the_whole_range_of_levels(tmp_path):
    levels = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (64, 64, 3))
    Image.fromarray(levels).save(tmp_path / "extremes.png")
    for params in (dict(), dict(enlarge=(1.3, 1.9)), dict(crop="square")):
        pictures = dataset(tmp_path, **params)
        crops = torch.stack([pictures[p][0] for p in range(4)])
        assert crops.min() >= -1 and crops.max() <= 1  # bicubic enlargement overshoots
        if params.get("crop") != "square":
            assert crops.min() == -1 and crops.max() == 1


def test_half_of_the_crops_are_mirrored(coordinates):
    plain, mirrored = dataset(coordinates, flip=False), dataset(coordinates)
    turned = []
    for position in range(60):
        (a, _), (b, _) = plain[position], mirrored[position]
        turned.append(torch.equal(b, a.flip(2)))
        assert turned[-1] != torch.equal(a, b)
    assert 18 <= sum(turned) <= 42


def test_enlarged_crops_show_less_of_the_picture(coordinates):
    pictures = dataset(coordinates, flip=False, enlarge=(1.5, 3.0))
    factors = []
    for position in range(30):
        red = pictures[position][0][0]
        shown = (red[:, -1] - red[:, 0]).mean().item() * 127.5  # columns between the first and the last
        factors.append((SIZE - 1) / shown)
    assert 1.4 < min(factors) < 1.8 and 2.4 < max(factors) < 3.2


@pytest.mark.parametrize("place", [(0, 0), (29, 90), (61, 90)], ids=str)
def test_an_enlarged_crop_is_one_of_the_enlarged_picture(place):
    """Only the crop is computed; its pixels are those of bicubic interpolation of the whole, rims included."""
    picture = torch.rand(1, 3, 48, 88, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(picture, size=(93, 122), mode="bicubic", align_corners=False)
    top, left = place
    crop = enlarged_crop(picture, (93, 122), top, left, 32)
    torch.testing.assert_close(crop, whole[:, :, top : top + 32, left : left + 32], rtol=0, atol=1e-4)


def test_small_pictures_are_enlarged_to_a_crop(tmp_path):
    photograph(tmp_path / "small.png", 40, 17)
    for params in (dict(), dict(crop="square"), dict(enlarge=(0.5, 1.2))):
        pictures = dataset(tmp_path, **params)
        for position in range(5):
            crop, _ = pictures[position]
            assert crop.shape == (3, SIZE, SIZE) and crop.std() > 0.05


def test_square_crops_hold_the_whole_short_side(coordinates):
    pictures = dataset(coordinates, flip=False, crop="square", size=20)
    lefts = set()
    for position in range(20):
        crop, _ = pictures[position]
        columns, rows = (crop[:2] + 1) * 127.5
        # 80 rows become 20: each is the mean of four, from 1.5 to 77.5.
        torch.testing.assert_close(rows, (1.5 + 4 * torch.arange(20.0)).view(20, 1).expand(20, 20), rtol=0, atol=1e-3)
        left = columns[0, 0].item() - 1.5
        torch.testing.assert_close(columns[0], left + 1.5 + 4 * torch.arange(20.0), rtol=0, atol=1e-3)
        lefts.add(round(left))
    assert 0 <= min(lefts) and max(lefts) <= 40 and len(lefts) > 10
