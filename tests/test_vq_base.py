"""The VQ base: nearest codes, the straight-through gradient, and a code book that moves by averages."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.blocks import nearest_codes
from models.sizes.mirrors import mirrored
from models.vq_base import Codebook, VQBase, VQBaseParams, perplexity

PARAMS = VQBaseParams(
    ch=8, ch_mult=(2,), num_res_blocks=1, z_channels=8, embed_dim=5, in_channels=6, codebook_size=16, groups=4
)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return VQBase(PARAMS)


def book(size=16, dim=4):
    torch.manual_seed(0)
    return Codebook(VQBaseParams(embed_dim=dim, codebook_size=size))


def latent(n=2, h=3, w=5):
    return torch.randn(n, PARAMS.in_channels, h, w, generator=torch.Generator().manual_seed(n * h * w))


def nearest_by_brute_force(z, codes):
    found = []
    for vector in z.double():
        distances = [(vector - code).square().sum().item() for code in codes.double()]
        found.append(distances.index(min(distances)))  # the first one on a tie
    return torch.tensor(found)


def test_nearest_codes_against_brute_force():
    random = torch.Generator().manual_seed(0)
    z, codes = torch.randn(60, 7, generator=random), torch.randn(33, 7, generator=random)
    k = nearest_codes(z, codes)
    assert k.dtype == torch.int64 and torch.equal(k, nearest_by_brute_force(z, codes))


def test_the_first_code_wins_a_tie():
    codes = torch.tensor([[4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.5, 0.0], [-0.5, 0.0]])  # halves and whole numbers: exact
    assert nearest_codes(z, codes).tolist() == [1, 1, 0, 2]


def test_codes_are_chosen_in_full_precision_under_autocast():
    codes = 1 + torch.arange(16.0).view(16, 1) / 512  # bfloat16 rounds these to multiples of 1/128
    assert codes.bfloat16().unique().numel() < 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_codes(codes.clone(), codes).tolist() == list(range(16))


def test_code_book_sizes_are_powers_of_two():
    for size in (2, 64, 256, 2048, 8192):
        assert VQBaseParams(codebook_size=size).codebook_size == size
    for size in (24, 1, 0, 16384):
        with pytest.raises(ValueError, match="power of two"):
            VQBaseParams(codebook_size=size)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (1, 16, 1)], ids=str)
@torch.no_grad()
def test_rows_indices_and_reconstruction_agree_with_the_forward_pass(base, size):
    x = latent(*size)
    code = base(x)
    n, h, w = size
    assert code.z.shape == code.z_q.shape == (n, PARAMS.embed_dim, h, w)
    assert code.indices.shape == size and code.indices.dtype == torch.int64
    vectors = code.z.permute(0, 2, 3, 1).reshape(-1, PARAMS.embed_dim)
    assert torch.equal(code.indices.flatten(), nearest_by_brute_force(vectors, base.quantize.embedding.weight))
    assert torch.equal(base.indices(x), code.indices)
    torch.testing.assert_close(base.rows(code.indices), code.z_q, rtol=0, atol=1e-6)
    y = base.reconstruct(base.rows(code.indices))
    assert y.shape == x.shape and y.isfinite().all()
    torch.testing.assert_close(y, base.reconstruct(code.z_q), rtol=0, atol=1e-5)


@torch.no_grad()
def test_counts_and_sums_add_up_over_split_batches(base):
    x = latent(n=4)
    whole, parts = base(x), [base(part) for part in x.split(1)]
    assert torch.equal(whole.counts, sum(part.counts for part in parts))
    torch.testing.assert_close(whole.sums, sum(part.sums for part in parts), rtol=0, atol=1e-5)
    assert whole.counts.sum() == whole.indices.numel()
    vectors = whole.z.permute(0, 2, 3, 1).reshape(-1, PARAMS.embed_dim)
    for k in range(PARAMS.codebook_size):
        mine = vectors[whole.indices.flatten() == k]
        assert whole.counts[k] == len(mine)
        torch.testing.assert_close(whole.sums[k], mine.sum(0), rtol=0, atol=1e-5)


def test_the_gradient_passes_straight_through(base):
    for p in base.encoder.parameters():  # off the zeros that residual branches start from
        p.data += 0.02 * torch.randn_like(p)
    code = base(latent())
    code.z.retain_grad()
    weights = torch.randn_like(code.z)
    (code.z_q * weights).sum().backward()
    assert torch.equal(code.z.grad, weights)
    untouched = [name for name, p in base.encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == [] and base.quant_conv.weight.grad.any()
    assert all(p.grad is None for p in base.quantize.parameters())
    assert not (code.counts.requires_grad or code.sums.requires_grad)


def test_update_is_the_exponential_average():
    codes = book()
    n, m = (getattr(codes.embedding, name).double().clone() for name in ("cluster_size", "embed_avg"))
    counts, sums = torch.randint(0, 9, (16,)).float(), torch.randn(16, 4)
    codes.update(counts, sums)
    n, m = 0.99 * n + 0.01 * counts, 0.99 * m + 0.01 * sums
    expected = m / ((n + 1e-5) / (n.sum() + 16e-5) * n.sum()).unsqueeze(1)
    torch.testing.assert_close(codes.embedding.cluster_size.double(), n, rtol=1e-6, atol=0)
    torch.testing.assert_close(codes.embedding.weight.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("positions", [1, 64, 4096])
def test_from_a_fresh_start_no_code_explodes(positions):
    """The published code divides the averages of unused codes by almost nothing."""
    codes = book()
    start = codes.embedding.weight.clone()
    target = torch.full((4,), 0.5)
    counts, sums = torch.zeros(16), torch.zeros(16, 4)
    counts[3], sums[3] = positions, positions * target
    for _ in range(50):
        codes.update(counts, sums)
        assert codes.embedding.weight.abs().max() <= 1.01 * start.abs().max()
    unused = torch.arange(16) != 3
    torch.testing.assert_close(codes.embedding.weight[unused], start[unused], rtol=1e-3, atol=0)
    # The used code lies between its start and the mean of its vectors, nearer to it the more there are.
    share = (codes.embedding.weight[3] - start[3]) / (target - start[3])
    weight = (1 - 0.99**50) * positions
    torch.testing.assert_close(share, torch.full((4,), weight / (weight + 0.99**50)), rtol=1e-2, atol=0)


def test_revive_moves_exactly_the_unused_codes():
    codes = book()
    n = codes.embedding.cluster_size
    n[torch.tensor([2, 5, 11])] = torch.tensor([0.0, 0.0099, 0.0101])
    before = {name: p.detach().clone() for name, p in codes.embedding.named_parameters()}
    vectors = torch.randn(7, 4)
    assert len(codes.revive(vectors)) == 2
    moved = torch.zeros(16, dtype=torch.bool)
    moved[[2, 5]] = True
    for name, p in codes.embedding.named_parameters():
        assert torch.equal(p[~moved], before[name][~moved]), name
    assert torch.equal(codes.embedding.weight[moved], vectors[:2])
    assert torch.equal(codes.embedding.embed_avg[moved], vectors[:2]) and n[moved].tolist() == [1, 1]
    assert len(codes.revive(vectors)) == 0
    placed = codes.embedding.weight.clone()
    codes.update(torch.zeros(16), torch.zeros(16, 4))  # size, average and code agree: nothing new moves nothing
    torch.testing.assert_close(codes.embedding.weight[moved], placed[moved], rtol=1e-3, atol=1e-6)


def test_revive_is_deterministic_and_can_place_everything():
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    first, second = book(), book()
    for seed, codes in enumerate((first, second)):
        torch.manual_seed(seed)  # the global generator must not matter
        assert len(codes.revive(vectors, everything=True)) == 16
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert torch.equal(first.embedding.weight, vectors[torch.arange(16) % 6])  # fewer vectors than codes: they repeat
    assert torch.equal(first.embedding.embed_avg, first.embedding.weight)
    assert first.embedding.cluster_size.tolist() == [1.0] * 16


def test_perplexity():
    assert perplexity(torch.full((16,), 3.0)).item() == pytest.approx(16, rel=1e-4)
    assert perplexity(torch.tensor([0.0, 7.0, 0.0])).item() == pytest.approx(1, abs=1e-4)
    assert perplexity(torch.tensor([1.0, 1.0, 0.0, 0.0])).item() == pytest.approx(2, rel=1e-4)


# Small maps -----------------------------------------------------------------------------------------------------------


def test_a_small_map_is_mirrored_with_its_edge_repeated():
    x = torch.tensor([[1.0, 2.0, 3.0]]).view(1, 1, 1, 3)
    assert mirrored(x, 8, 8).tolist() == [[[[1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 1.0, 2.0]] * 8]]
    assert mirrored(x, 3, 5).shape == (1, 1, 3, 5)
    assert mirrored(x, 1, 1) is x


@torch.no_grad()
def test_small_maps_are_coded_as_part_of_one_of_the_least_side(base):
    """As the same network codes the larger map, cut; a map that is large enough is coded as ever."""
    least = VQBase(replace(PARAMS, least_side=8))
    least.load_state_dict(base.state_dict())
    x = latent(2, 3, 11)
    larger = torch.cat([x, x.flip(2), x[:, :, :2]], dim=2)  # 3 rows become 8, 11 columns stay
    ours, theirs = least(x), base(larger)
    torch.testing.assert_close(ours.z, theirs.z[:, :, :3])
    assert ours.counts.sum() == 2 * 3 * 11  # what the mirror adds is no position of the picture
    y = base.reconstruct(torch.cat([ours.z_q, ours.z_q.flip(2), ours.z_q[:, :, :2]], dim=2))
    torch.testing.assert_close(least.reconstruct(ours.z_q), y[:, :, :3])
    large = latent(1, 8, 9)
    assert torch.equal(least(large).z, base(large).z)


# The linear shortcut --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_with_a_shortcut_the_base_starts_as_a_choice_of_channels():
    torch.manual_seed(0)
    base = VQBase(replace(PARAMS, shortcut="linear"))
    x = latent()  # of 6 channels, where codes have 5
    z = base(x).z
    assert torch.equal(z, x[:, :5])
    y = base.reconstruct(z)
    assert torch.equal(y[:, :5], z) and not y[:, 5].any()


@torch.no_grad()
def test_a_shortcut_carries_the_level_that_normalisation_loses():
    """A map that is the same everywhere, and one of three times its level: f's last normalisation hardly tells them apart."""
    torch.manual_seed(0)
    plain, linear = VQBase(PARAMS), VQBase(replace(PARAMS, shortcut="linear"))
    flat = torch.randn(1, PARAMS.in_channels, 1, 1).expand(-1, -1, 16, 16)
    ratios = [(base(3 * flat).z[..., 8, 8].norm() / base(flat).z[..., 8, 8].norm()).item() for base in (plain, linear)]
    assert ratios[0] < 1.2 and ratios[1] == pytest.approx(3)


@torch.no_grad()
def test_the_shortcut_adds_its_linear_map_in_full_precision():
    torch.manual_seed(0)
    base = VQBase(replace(PARAMS, shortcut="linear"))
    nn.init.constant_(base.shortcut.analysis.weight, 0.5)
    base.shortcut.analysis.bias.copy_(torch.arange(5.0))
    x = 1 + latent() / 512  # bfloat16 would round it to multiples of 1/128
    expected = 0.5 * x.sum(1, keepdim=True) + torch.arange(5.0).view(1, 5, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(base(x).z, expected, rtol=1e-6, atol=1e-6)
