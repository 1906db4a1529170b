"""The residual codec alone: shapes, levels, exact indices, and what training and coding share."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import residual_hyperprior
from models.entropy_coding import symbol_bits
from models.rate_model import EntropyBottleneck
from models.records import Draws
from models.residual_hyperprior import HYPER_REACH, SYMBOL_REACH, ResidualHyperprior, ResidualTables, level_of, node_of
from models.residual_networks import SCALE_MIN, SCALE_STEP, SCALES, ResidualParams, hyper_size
from tests.residual import SMALL, D, K, new_codec, new_residual, residual_tables

SIZES = [(1, 1), (2, 5), (17, 9)]
CODES = (1, 100, 255)


def latents(h: int, w: int, n: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and k, with y not far from x."""
    random = torch.Generator().manual_seed(seed)
    y, difference = torch.randn(2, n, D, h, w, generator=random)
    return y + 0.2 * difference, y, torch.randint(0, K, (n, h, w), generator=random)


def centred_noise(residual: ResidualHyperprior, h: int, w: int, n: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, residual.noise_size(h, w), generator=torch.Generator().manual_seed(seed)) - 0.5


@pytest.fixture(scope="module")
def residual():
    """Frozen, with tables; no test changes it."""
    residual = new_residual().requires_grad_(False)
    residual.freeze(residual_tables(SMALL))
    return residual


@pytest.fixture
def training():
    torch.manual_seed(0)
    residual = new_residual()
    residual.train_rates()
    residual.rate_model.bottleneck.quantiles.data[:, 0, 1] = torch.tensor([0.3, -0.2, 0.1])
    residual.freeze(None)
    return residual


# Shapes and levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_shapes(residual, training, size):
    x, y, k = latents(*size, n=2)
    out = training(x, y, k, torch.tensor([1.0, 2.7]), centred_noise(training, *size, n=2))
    assert out.r_hat.shape == x.shape and out.r_hat.isfinite().all()
    for bits in (out.hyper_bits, out.residual_bits):
        assert bits.shape == (2,) and bits.isfinite().all() and (bits > 0).all()
    s = residual.analysis(x - y, y)[:1]
    symbols = residual.symbols(s, y[:1], k[:1], 200, residual.tables)
    assert symbols.hyper.shape == (SMALL.hyper_channels, *hyper_size(*size))
    assert symbols.residual.shape == symbols.index.shape == (SMALL.channels, *size)
    assert residual.restore(symbols.hyper, symbols.residual, k[:1], y[:1], 200).shape == x[:1].shape


@torch.no_grad()
def test_gains_are_geometric_between_the_levels_and_beyond():
    """At first as told; then channels of 1, 4, 64 and of 1/2, 2, 4: the outer intervals go on."""
    fresh = ResidualHyperprior(SMALL, D, K).gain(torch.tensor([1.0, 3.0]))[:, 0, 0, 0]
    assert fresh.tolist() == pytest.approx([SMALL.first_gain, SMALL.last_gain])
    residual = new_residual()
    residual.log_gain[:, 0] = torch.tensor([1.0, 4.0, 64.0]).log()
    residual.log_gain[:, 1] = torch.tensor([0.5, 2.0, 4.0]).log()
    gains = residual.gain(torch.tensor([1.0, 2.0, 3.0, 1.5, 2.25, 3.5, 0.5], dtype=torch.float64))
    assert gains.shape == (7, SMALL.channels, 1, 1) and gains.dtype == torch.float32
    assert gains[:, 0].flatten().tolist() == pytest.approx([1, 4, 64, 2, 8, 256, 0.5], rel=1e-5)
    assert gains[:4, 1].flatten().tolist() == pytest.approx([0.5, 2, 4, 1], rel=1e-5)


@pytest.mark.parametrize("extrapolated", [(0, 0), (1, 0.8), (0.3, 2)])
@pytest.mark.parametrize("levels", [2, 3, 6, 9])
def test_bytes_stand_for_levels(levels, extrapolated):
    params = replace(SMALL, levels=levels, extrapolated=extrapolated)
    found = [level_of(code, params) for code in range(1, 256)]
    assert found[0] == 1 - extrapolated[0] and found[-1] == pytest.approx(levels + extrapolated[1])
    assert np.allclose(np.diff(found), (levels - 1 + sum(extrapolated)) / 254)
    for code, level in enumerate(found, 1):
        node = node_of(code, params)
        assert 0 <= node < levels and abs(node + 1 - min(max(level, 1), levels)) <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"levels": 1}, "levels 1"),
        ({"extrapolated": (-1, 0)}, "extrapolated"),
        ({"first_gain": 2, "last_gain": 1}, "first_gain 2, last_gain 1: above 0, the smaller first"),
        ({"masking": -0.1}, "masking -0.1: 0 to 1"),
        ({"masking_floor": 0}, "masking_floor 0: above 0"),
        ({"stretch": 0.6}, "stretch 0.6: 0 to 0.5"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ResidualParams(**wrong)


# Masking --------------------------------------------------------------------------------------------------------------

MASKED = replace(SMALL, masking=0.5, masking_floor=2.0)


@torch.no_grad()
def test_steps_are_finer_where_the_base_is_smooth():
    """One channel of 0 but for a corner of 3, the others constant. Around the corner, of 4 positions: mean 3/4, mean square
    9/4, variance 27/16. Beside it, of 6: 1/2, 3/2, 5/4. In the middle, of 9: 1/3, 1, 8/9. Elsewhere 0.
    """
    residual = new_residual(MASKED)
    y = torch.ones(1, D, 4, 4) * torch.arange(D).view(1, D, 1, 1)
    y[0, 0, 0, 0] = 3
    mask = residual.contrast_gain(y)
    assert mask.shape == (1, 1, 4, 4)
    # ((1 + v / 2) / 2)^-1/2
    smooth, corner, beside, middle = 2**0.5, (59 / 64) ** -0.5, (13 / 16) ** -0.5, (13 / 18) ** -0.5
    expected = [
        [corner, beside, smooth, smooth],
        [beside, middle, smooth, smooth],
        [smooth] * 4,
        [smooth] * 4,
    ]
    torch.testing.assert_close(mask[0, 0], torch.tensor(expected))
    assert residual.contrast_gain(y[:, :, :1, :1]).item() == pytest.approx(
        smooth
    )  # alone, a position has no surroundings
    with torch.enable_grad():
        assert not residual.contrast_gain(y.requires_grad_()).requires_grad


@torch.no_grad()
def test_without_masking_all_is_as_it_was(residual):
    x, y, k = latents(7, 5)
    assert residual.contrast_gain(y) == 1 and SMALL.masking == 0 == SMALL.stretch
    masked = new_residual(MASKED).requires_grad_(False)  # of the same weights
    masked.freeze(residual.tables)
    s = residual.analysis(x - y, y)
    assert (masked.symbols(s, y, k, 200).residual != residual.symbols(s, y, k, 200).residual).any()


# Exact indices --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_table_index_depends_on_decoded_integers_alone(residual):
    """Another y, and another x that gives the same n_z, change nothing; another n_z or k does."""
    x, y, k = latents(12, 10)
    s = residual.analysis(x - y, y)
    first = residual.symbols(s, y, k, 200, residual.tables)
    other = residual.symbols(s, y + torch.randn_like(y), k, 200, residual.tables)
    assert (other.hyper == first.hyper).all() and (other.index == first.index).all()
    assert (other.residual != first.residual).any()  # mu does see y
    assert (residual.table_index(first.hyper, k) == first.index).all()
    assert (residual.table_index(first.hyper + 1, k) != first.index).any()
    assert (residual.table_index(first.hyper, (k + 1) % K) != first.index).any()
    assert first.index.min() >= 0 and first.index.max() < SCALES and len(np.unique(first.index)) > SCALES / 2


@pytest.mark.parametrize("size", [*SIZES, (40, 33)], ids=str)
def test_tiles_leave_no_trace(residual, monkeypatch, size):
    random = np.random.default_rng(0)
    n_z = random.integers(-HYPER_REACH, HYPER_REACH + 1, (SMALL.hyper_channels, *hyper_size(*size)))
    k = torch.from_numpy(random.integers(0, K, (1, *size)))
    whole = residual.scale_network(torch.from_numpy(n_z)[None].float(), k)[0].numpy()  # float32, as in training
    for tile in (1, 2, 5, 32):
        monkeypatch.setattr(residual_hyperprior, "_TILE", tile)
        assert np.array_equal(residual.table_index(n_z, k), whole)


# Training and coding --------------------------------------------------------------------------------------------------


class Costs:
    """In place of the densities: the median of z, and what is to be priced."""

    median = torch.full((SMALL.hyper_channels,), 0.7)

    def __call__(self, z, s, mu, sigma):
        self.given = {"z": z, "s": s, "mu": mu, "sigma": sigma}
        return torch.tensor([5.0]), torch.tensor([7.0])


@pytest.fixture
def plain(monkeypatch):
    """Networks that give numbers: s = x - y, h_a = 2.4, h_s = 10, mu = 0.3, r^ = s^ / gain; gains of 4, median 0.7."""
    residual, told = new_residual(replace(SMALL, channels=D)), []

    def gives(network, function):
        monkeypatch.setattr(network, "forward", function)

    residual.log_gain.data.fill_(math.log(4))
    residual.median.fill_(0.7)
    gives(residual.analysis, lambda a, y: a)
    gives(residual.synthesis, lambda a, y: a)
    gives(residual.hyper_analysis, lambda s: torch.full((1, SMALL.hyper_channels, 1, 1), 2.4))
    gives(residual.scale_network, lambda n_z, k: told.append(n_z) or torch.full((1, D, 1, 1), 10.0))
    gives(residual.mean_network, lambda n_z, k, y: told.append(n_z) or torch.full((1, D, 1, 1), 0.3))
    residual.freeze(None)
    return residual, told


def test_a_training_pass_by_hand(plain):
    residual, told = plain
    residual.rate_model = costs = Costs()
    x, y, k = torch.full((1, D, 1, 1), 1.3, requires_grad=True), torch.ones(1, D, 1, 1), torch.zeros(1, 1, 1).long()
    noise = torch.cat([torch.full((1, D), -0.5), torch.full((1, SMALL.hyper_channels), 0.25)], dim=1)
    out = residual(x, y, k, torch.tensor([1.5]), noise)
    assert [out.hyper_bits.item(), out.residual_bits.item()] == [5, 7]
    assert {n_z.unique().item() for n_z in told} == {2.0}  # round(2.4 - 0.7)
    # z: 2.4 + 0.25, the median not taken off. s: 4 * 0.3 - 0.5. sigma: 0.11 * 1.112^10, or 0.11 * e^(10 * 0.1061602)
    expected = {"z": 2.65, "s": 0.7, "mu": 0.3, "sigma": 0.318010}
    for name, value in expected.items():
        torch.testing.assert_close(costs.given[name], torch.full_like(costs.given[name], value), rtol=1e-5, atol=0)
    # (round(1.2 - 0.3) + 0.3) / 4, and the gradient of x as if nothing were rounded
    torch.testing.assert_close(out.r_hat, torch.full_like(y, 0.325))
    out.r_hat.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_a_training_pass_with_masking_by_hand(plain):
    """As above, of a base without contrast: m = 2^(1/2), and stretching is left to decoders."""
    residual, _ = plain
    residual.params = replace(residual.params, masking=0.5, stretch=0.2)
    residual.rate_model = costs = Costs()
    x, y, k = torch.full((1, D, 1, 1), 1.3), torch.ones(1, D, 1, 1), torch.zeros(1, 1, 1).long()
    out = residual(x, y, k, torch.tensor([1.5]), torch.zeros(1, D + SMALL.hyper_channels))
    torch.testing.assert_close(costs.given["s"], torch.full((1, D, 1, 1), 4 * 0.3 * 2**0.5))
    # (round(1.697 - 0.3) + 0.3) / (4 * 2^(1/2))
    torch.testing.assert_close(out.r_hat, torch.full_like(y, 1.3 / (4 * 2**0.5)))


@torch.no_grad()
def test_coding_by_hand(plain):
    """round(2.4 - 0.7), round(1.2 - 0.3), and back: (1 + 0.3) / 4."""
    residual, _ = plain
    y, k = torch.ones(1, D, 1, 1), torch.zeros(1, 1, 1).long()
    symbols = residual.symbols(torch.full((1, D, 1, 1), 0.3), y, k, 100)
    assert np.unique(symbols.hyper).tolist() == [2] and np.unique(symbols.residual).tolist() == [1]
    restored = residual.restore(symbols.hyper, symbols.residual, k, y, 100)
    torch.testing.assert_close(restored, torch.full_like(y, 0.325))


@pytest.mark.parametrize(("code", "stretched"), [(1, 1.1), (64, 1 + 0.1 * (1 - 63 / 254)), (128, 1.05), (255, 1.0)])
@torch.no_grad()
def test_coding_with_masking_and_stretching_by_hand(plain, code, stretched):
    """round(1.4 * 4 * 2^(1/2) - 0.3), or 8, and back: (8 * 1.1 + 0.3) / (4 * 2^(1/2)) at level 1. Without contrast m = 2^(1/2)."""
    residual, _ = plain
    residual.params = replace(residual.params, masking=0.5, stretch=0.1)
    y, k = torch.ones(1, D, 1, 1), torch.zeros(1, 1, 1).long()
    symbols = residual.symbols(torch.full((1, D, 1, 1), 1.4), y, k, code)
    assert np.unique(symbols.residual).tolist() == [8]
    restored = residual.restore(symbols.hyper, symbols.residual, k, y, code)
    torch.testing.assert_close(restored, torch.full_like(y, (8 * stretched + 0.3) / (4 * 2**0.5)))


@pytest.mark.parametrize(("code", "stretched"), [(1, 1.2), (255, 1.0)])
def test_levels_beyond_the_trained_ones_are_stretched_as_the_outermost(code, stretched):
    residual = new_residual(replace(SMALL, extrapolated=(1, 1), stretch=0.2))
    assert residual._stretched(code) == pytest.approx(stretched)


@torch.no_grad()
def test_symbols_stay_within_their_tables(residual):
    """Where a picture has symbols that no table can code, they are brought to its reach."""
    _, y, k = latents(6, 7)
    s = 100 * residual.analysis(y.flip(2), y)
    narrow = np.zeros_like(residual.tables.symbols)
    narrow[:, SYMBOL_REACH - 1 : SYMBOL_REACH + 2] = [1, 65534, 1]
    hyper = np.zeros_like(residual.tables.hyper)
    hyper[..., HYPER_REACH - 2 : HYPER_REACH + 3] = [1, 1, 65532, 1, 1]
    found, free = residual.symbols(s, y, k, 255, ResidualTables(hyper, narrow)), residual.symbols(s, y, k, 255)
    assert np.abs(found.residual).max() == 1 and np.abs(found.hyper).max() == 2
    assert np.abs(free.residual).max() == SYMBOL_REACH and np.abs(free.hyper).max() == HYPER_REACH


@pytest.mark.parametrize("code", CODES)
@torch.no_grad()
def test_training_sees_what_coding_does(training, code):
    """With the noise that rounds, a training pass reconstructs and prices what coding sends."""
    size = 9, 14
    x, y, k = latents(*size)
    level = torch.tensor([level_of(code, SMALL)])
    training(x, y, k, level, centred_noise(training, *size))  # takes over the median
    assert training.median.tolist() == pytest.approx([0.3, -0.2, 0.1])
    s = training.analysis(x - y, y)
    symbols = training.symbols(s, y, k, code)
    s_g = training.gain(level) * s
    n_z, n = (torch.from_numpy(a)[None].float() for a in (symbols.hyper, symbols.residual))
    noise_s = n + training.mean_network(n_z, k, y) - s_g
    noise_z = n_z - training.centred(s_g)
    assert max(noise_s.abs().max(), noise_z.abs().max()) <= 0.5001
    out = training(x, y, k, level, torch.cat([noise_s.flatten(1), noise_z.flatten(1)], dim=1))
    restored = training.restore(symbols.hyper, symbols.residual, k, y, code)
    torch.testing.assert_close(out.r_hat, restored, rtol=1e-4, atol=1e-4)
    sigma = SCALE_MIN * SCALE_STEP ** symbols.index.astype(np.float64)
    below, above = ((symbols.residual + side) / (sigma * math.sqrt(2)) for side in (-0.5, 0.5))
    mass = (torch.erf(torch.from_numpy(above)) - torch.erf(torch.from_numpy(below))) / 2
    assert out.residual_bits.item() == pytest.approx(-mass.clamp(min=1e-9).log2().sum().item(), rel=1e-3)


@torch.no_grad()
def test_bits_by_hand(training, monkeypatch):
    """Per sample, summed over channels and positions, with a density of 2^-(channel * z) for z; N(mu, sigma^2) for s."""
    rates = training.rate_model
    z = torch.tensor([[[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]], [[4.0, 0.0], [2.0, 2.0], [1.0, 0.0]]])[
        :, :, None
    ]  # 2 3 1 2
    torch.testing.assert_close(rates.bottleneck(z)[1], EntropyBottleneck.forward(rates.bottleneck, z)[1])
    channel = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    monkeypatch.setattr(rates.bottleneck, "_likelihood", lambda v: (2 ** -(channel * v), None, None))
    s, mu = torch.tensor([[[0.2, 1.5], [1.0, -1.0]], [[0.2, 0.5], [1.0, 0.0]]])[..., None, None]  # 2 2 1 1 each
    hyper_bits, residual_bits = rates(z, s, mu, torch.ones(2, 2, 1, 1))
    assert hyper_bits.tolist() == pytest.approx([3 + 2 * 1 + 3 * 4, 4 + 2 * 4 + 3 * 1])
    # of the integers 0 and 1 under N(0, 1): 0.382925 and 0.241730, so 1.384867 and 2.048530 bits
    assert residual_bits.tolist() == pytest.approx([3.433397, 3.433397], abs=1e-4)


@pytest.mark.parametrize("code", CODES)
@torch.no_grad()
def test_the_rate_under_noise_is_close_to_that_of_rounding(training, code):
    """Where s is spread as h_s says, the tables take about the bits that training estimates with noise."""
    size = 24, 20
    x, y, k = latents(*size)
    symbols = training.symbols(training.analysis(x - y, y), y, k, code)
    n_z = torch.from_numpy(symbols.hyper)[None].float()
    sigma = torch.from_numpy(SCALE_MIN * SCALE_STEP ** symbols.index.astype(np.float32))[None]
    drawn = sigma * torch.randn(sigma.shape, generator=torch.Generator().manual_seed(1))
    mu = training.mean_network(n_z, k, y)
    noise = centred_noise(training, *size)[:, : drawn.numel()].view_as(drawn)
    z = torch.zeros(1, SMALL.hyper_channels, 1, 1)
    _, estimate = training.rate_model(z, mu + drawn + noise, mu, sigma)
    tables = residual_tables(SMALL)
    reach = tables.reach("symbols")[symbols.index]
    n = np.clip(drawn[0].round().numpy().astype(int), -reach, reach)
    sent = symbol_bits(n.ravel(), symbols.index.ravel(), tables.symbols).sum()
    assert estimate.item() == pytest.approx(sent, rel=0.1)


def test_level_zero_sends_nothing_and_every_parameter_takes_part():
    """The rows of a batch: level 0 is masked, not skipped, and what it gives is exactly y."""
    codec = new_codec()
    codec.residual.requires_grad_(True).train_rates()
    x, y, k = latents(4, 4, n=4)
    uniform = centred_noise(codec.residual, 4, 4, n=4)
    level = torch.tensor([0.0, 1.3, 0.0, 2.6])
    draws = Draws(torch.zeros(4, dtype=torch.long), torch.ones(4), torch.zeros(4, dtype=torch.bool), x, level, uniform)
    y_hat, bpp = codec.with_residual(x, y, k, draws)
    sent = level > 0
    assert torch.equal(y_hat[~sent], y[~sent]) and bpp[~sent].tolist() == [0, 0]
    assert (bpp[sent] > 0).all() and (y_hat[sent] != y[sent]).flatten(1).any(1).all()
    out = codec.residual(x, y, k, level, uniform)
    torch.testing.assert_close(y_hat[sent], (y + out.r_hat)[sent])
    torch.testing.assert_close(bpp[sent], ((out.hyper_bits + out.residual_bits) / (256 * 16))[sent])

    (y_hat.square().mean() + bpp.mean() + codec.residual.rate_model.auxiliary_loss()).backward()
    for name, parameter in codec.residual.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    codec.residual.zero_grad()
    nothing = replace(draws, level=torch.zeros(4))
    y_hat, bpp = codec.with_residual(x, y, k, nothing)
    assert torch.equal(y_hat, y) and not bpp.any()
    (y_hat.square().mean() + bpp.mean() + codec.residual.rate_model.auxiliary_loss()).backward()
    for name, parameter in codec.residual.named_parameters():
        moved = name.endswith("quantiles")
        assert parameter.grad is not None and bool(parameter.grad.any()) == moved, name


@torch.no_grad()
def test_the_auxiliary_loss_moves_the_quantiles_alone(training):
    with torch.enable_grad():
        training.rate_model.auxiliary_loss().backward()
    assert [n for n, p in training.named_parameters() if p.grad is not None] == ["rate_model.bottleneck.quantiles"]
