"""Schedules and sampling steps against the reference's numbers, and against closed forms. -s shows how far off."""

import copy
import json
import math

import numpy as np
import pytest
import torch

from models import diffusion
from models.diffusion import DiffusionParams, RateParams, Schedule, first_sqrt_eta, time_of_eta
from tests.parity import compare, fixture_file

NAMES = ("steps2", "steps4", "steps15", "steps15_respaced4", "steps2_respaced15")
MAX, RMS = 1e-6, 3e-7  # float32, values up to about 5


def by_name(function):
    return pytest.mark.parametrize("name", NAMES, ids=lambda name: f"diffusion.json-{name}")(function)


@pytest.fixture(scope="module")
def reference():
    return json.loads(fixture_file("diffusion.json").read_text())


def schedule_of(info) -> Schedule:
    schedule = Schedule.exponential(DiffusionParams(steps=info["steps"]))
    respacing = info["timestep_respacing"]
    return schedule if respacing is None else schedule.spaced(int(respacing))


@by_name
def test_schedule_arrays(reference, name):
    info = reference["schedules"][name]
    schedule = schedule_of(info)
    etas, etas_prev = schedule.neighbours(torch.arange(len(schedule)))
    for key, ours in {"sqrt_etas": schedule.sqrt_etas, "etas": etas, "etas_prev": etas_prev}.items():
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours, info[key], rtol=1e-12, atol=1e-15, err_msg=key)
    assert len(schedule) == info["num_timesteps"]
    assert schedule.timesteps.tolist() == info["timestep_map"]
    whole = Schedule.exponential(DiffusionParams(steps=info["steps"]))
    np.testing.assert_allclose(whole.sqrt_etas, info["sqrt_etas_before_respacing"], rtol=1e-12)


class Case:
    """The tensors of one schedule, for the fixture's toy network."""

    def __init__(self, reference, name):
        self.name, self.info = name, reference["tensors"][name]
        assert "0.5 * scaled_input + 0.25 * timestep_given_to_network - 0.125 * lq" in self.info["toy_network"]
        self.schedule = schedule_of(reference["schedules"][name])
        self.x, self.y, self.noise, self.lq = (self.read(self.info[key]) for key in ("x", "y", "noise", "lq"))
        self.t = torch.tensor(self.info["t"])
        self.eta = self.schedule.etas[self.t]
        self.last_eta = self.schedule.etas[-1].expand(len(self.y))

    @staticmethod
    def read(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    def compare(self, ours, *keys):
        expected = self.info
        for key in keys:
            expected = expected[key]
        compare(f"{self.name} {' '.join(keys)}", ours, self.read(expected), MAX, RMS)


@by_name
def test_steps(reference, name):
    case = Case(reference, name)
    s, x, y, t, noise = case.schedule, case.x, case.y, case.t, case.noise
    x_t, nothing, ones = diffusion.q_sample(s, x, y, t, noise), torch.zeros_like(x), torch.ones_like(x)
    case.compare(x_t, "q_sample")
    case.compare(diffusion.q_sample(s, nothing, nothing, t, ones).square(), "q_variance")
    case.compare(diffusion.q_sample(s, x, x, t, noise), "q_sample_without_residual_shift")  # towards x itself
    case.compare(diffusion.scale_input(x, case.eta, s.kappa), "scale_input")
    case.compare(diffusion.ancestral_step(s, x_t, x, t, nothing), "posterior_mean_of_x_and_q_sample")
    case.compare(diffusion.ancestral_step(s, nothing, nothing, t, ones).square(), "posterior_variance")
    x_0 = diffusion.predict(s, toy, x_t, t, case.lq)
    case.compare(x_0, "p_mean_variance", "pred_xstart")
    case.compare(diffusion.ancestral_step(s, x_t, x_0, t, nothing), "p_mean_variance", "mean")
    case.compare(diffusion.ddim_step(s, x_t, x_0, y, t), "ddim_sample")
    for key, (k, m, j) in zip(("ddim_k", "ddim_m", "ddim_j"), torch.eye(3), strict=True):
        case.compare(diffusion.ddim_step(s, m * ones, k * ones, j * ones, t), "p_mean_variance", key)


@by_name
def test_sampling(reference, name):
    case = Case(reference, name)
    s = case.schedule
    start = diffusion.prior_sample(case.y, case.last_eta, s.kappa, case.noise)
    case.compare(start, "one_step", "start")
    params = DiffusionParams(steps=reference["schedules"][name]["steps"])
    one = diffusion.one_step(toy, start, case.lq, case.last_eta, params)
    case.compare(one, "one_step", "result_pred_xstart")
    chain = diffusion.sample(s, toy, case.y, case.lq, lambda: case.noise, ddim=True)
    case.compare(chain, "ddim_full_chain")


def toy(scaled, t, lq):
    return 0.5 * scaled + 0.25 * t.float().view(-1, 1, 1, 1) - 0.125 * lq


@pytest.mark.parametrize("ddim", [True, False])
@pytest.mark.parametrize("steps", [1, 15], ids=["trained with one", "one of fifteen"])
def test_one_step_of_a_schedule_is_the_single_step(steps, ddim):
    params = DiffusionParams(steps=steps)
    spaced = Schedule.exponential(params).spaced(1)
    y, lq, noise = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    eta = spaced.etas[-1].expand(2)
    one = diffusion.one_step(toy, diffusion.prior_sample(y, eta, 2.0, noise), lq, eta, params)
    sampled = diffusion.sample(spaced, toy, y, lq, lambda: noise, ddim=ddim)
    torch.testing.assert_close(sampled, one, rtol=0, atol=1e-6)


def test_sampling_starts_on_the_device_of_its_input():
    """A tensor without a device of its own meets `meta` as it would meet CUDA: with an error."""
    schedule = Schedule.exponential(DiffusionParams(steps=4)).to("meta")
    y = torch.zeros(2, 3, 4, 4, device="meta")
    for ddim in (True, False):
        assert diffusion.sample(schedule, toy, y, y, lambda: y, ddim).device.type == "meta"


def test_a_schedule_of_one_step_has_the_last_noise_level():
    schedule = Schedule.exponential(DiffusionParams(steps=1))
    assert schedule.sqrt_etas.tolist() == [0.8] and len(schedule) == 1
    assert schedule.timesteps.tolist() == [0]
    times = time_of_eta(torch.tensor([0.02, 0.64, 1.0]), DiffusionParams(steps=1))
    assert times.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("steps", [2, 4, 15])
def test_time_is_the_inverse_of_the_schedule(steps):
    params = DiffusionParams(steps=steps)
    etas = Schedule.exponential(params).etas
    times = time_of_eta(etas, params)
    assert times.dtype == torch.float64
    torch.testing.assert_close(times, torch.arange(steps, dtype=torch.float64), rtol=0, atol=1e-9)
    assert time_of_eta(torch.tensor(0.64, dtype=torch.float64), params).item() == pytest.approx(steps - 1, abs=1e-9)
    below, above = time_of_eta(torch.tensor([1e-8, 0.9]), params).tolist()
    assert below == 0 and above > steps - 1
    between = time_of_eta(torch.linspace(0.001, 1, 50), params)
    assert (between.diff() > 0).all()


def test_spacing_keeps_the_original_step_numbers():
    schedule = Schedule.exponential(DiffusionParams(steps=15))
    assert schedule.spaced(5).timesteps.tolist() == [0, 3, 6, 9, 12]
    assert schedule.spaced(15) is schedule and schedule.spaced(99) is schedule


def column(*values: float) -> torch.Tensor:
    """One number per sample: N x 1 x 1 x 1."""
    return torch.tensor(values).view(-1, 1, 1, 1)


# By hand, T = 2: sqrt(eta) = 0.02, 0.8 and eta = 0.0004, 0.64. All below with x = 1, y = 3, noise 0.5, kappa = 2.
X, Y, NOISE = column(1.0, 1.0), column(3.0, 3.0), column(0.5, 0.5)
BOTH = torch.tensor([1, 0])
X_T = column(3.08, 1.0208)  # 1 + 0.64 * 2 + 2 * 0.8 * 0.5, and 1 + 0.0004 * 2 + 2 * 0.02 * 0.5


def equal(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_the_schedule_by_hand():
    two = Schedule.exponential(DiffusionParams())
    assert two.sqrt_etas.tolist() == pytest.approx([0.02, 0.8], rel=1e-15)
    assert two.timesteps.tolist() == [0, 1] and two.kappa == 2
    # T = 3: 0.02 * 40^(0.5^0.3) in the middle, 0.5^0.3 = 0.812252, ln 40 = 3.688879
    three = Schedule.exponential(DiffusionParams(steps=3))
    assert three.sqrt_etas.tolist() == pytest.approx([0.02, 0.400228, 0.8], abs=1e-6)
    firsts = [(2, 0.04, 0.02), (0.5, 0.04, math.sqrt(0.001)), (0.5, 0.01, 0.01)]  # the least of the three rules
    for kappa, least, expected in firsts:
        assert first_sqrt_eta(DiffusionParams(kappa=kappa, min_noise_level=least)) == pytest.approx(expected)


def test_time_of_eta_by_hand():
    # eta = 0.0004 * 40 = 0.016 lies half of the way in the logarithm: 0.5^(1/0.3) = 0.0992126 of T - 1
    eta = torch.tensor([0.0004, 0.016, 0.64])
    assert time_of_eta(eta, DiffusionParams()).tolist() == pytest.approx([0, 0.0992126, 1], abs=1e-6)
    assert time_of_eta(eta, DiffusionParams(steps=4)).tolist() == pytest.approx([0, 0.2976378, 3], abs=1e-6)


def test_the_forward_process_by_hand():
    schedule = Schedule.exponential(DiffusionParams())
    equal(diffusion.q_sample(schedule, X, Y, BOTH, NOISE), X_T)
    eta = torch.tensor([0.64, 0.01], dtype=torch.float64)
    equal(diffusion.prior_sample(Y, eta, 3.0, NOISE), column(4.2, 3.15))  # 3 + 3 * 0.8 * 0.5, 3 + 3 * 0.1 * 0.5
    # 4.2 / sqrt(1 + 9 * 0.64) = 4.2 / 2.6, 3.15 / sqrt(1 + 9 * 0.01) = 3.15 / 1.044031
    equal(diffusion.scale_input(column(4.2, 3.15), eta, 3.0), column(1.615385, 3.017152))


class Told:
    """A denoiser that says 7 and keeps what it was told, the last and all scaled inputs."""

    def __init__(self):
        self.inputs = []

    def __call__(self, scaled, t, lq):
        self.scaled, self.t, self.lq = scaled, t, lq
        self.inputs.append(scaled)
        return torch.full_like(scaled, 7.0)


@pytest.mark.parametrize(
    ("centre", "scaled"),
    [(0.0, (2.013997, 3.039800)), (Y, (0.423999, 0.098058))],  # of 3.8 and 3.1, of 0.8 and 0.1
    ids=["published", "difference"],
)  # 3.8 / 1.886796 and 3.1 / 1.019804
def test_the_single_step_by_hand(centre, scaled):
    told, eta = Told(), torch.tensor([0.64, 0.01], dtype=torch.float64)
    assert torch.equal(diffusion.one_step(told, column(3.8, 3.1), X, eta, DiffusionParams(), centre), column(7.0, 7.0))
    equal(told.scaled, column(*scaled))
    # sqrt(0.01) / 0.02 = 5: (ln 5 / ln 40)^(1/0.3) = 0.436294^3.333 = 0.062989
    assert told.t.tolist() == pytest.approx([1, 0.062989], abs=1e-5) and told.t.dtype == torch.float32
    assert told.lq is X


def test_a_prediction_by_hand():
    """Of one step of several: the step's own eta and, in a spaced schedule, its original number."""
    told, schedule = Told(), Schedule.exponential(DiffusionParams())
    diffusion.predict(schedule, told, X_T, BOTH, X, Y)
    # (3.08 - 3) / sqrt(1 + 4 * 0.64), (1.0208 - 3) / sqrt(1 + 4 * 0.0004)
    equal(told.scaled, column(0.042400, -1.977618))
    assert told.t.tolist() == [1, 0]
    diffusion.predict(Schedule.exponential(DiffusionParams(steps=9)).spaced(3), told, X_T, BOTH, X)
    assert told.t.tolist() == [3, 0]


def test_a_step_towards_the_truth_lands_on_the_right_marginal():
    # m = sqrt(0.0004 / 0.64) = 0.025, j = 0.0004 - 0.016 = -0.0156, k = 1 - 0.0004 + 0.016 - 0.025 = 0.9906:
    # 0.9906 + 0.025 * 3.08 - 0.0156 * 3 = 1.0208, which is q_sample at t = 0 with the same noise. From there on, x_0.
    schedule = Schedule.exponential(DiffusionParams())
    equal(diffusion.ddim_step(schedule, X_T, X, Y, BOTH), column(1.0208, 1.0))


def test_an_ancestral_step_by_hand():
    # 0.000625 * 3.08 + 0.999375 = 1.0013; deviation sqrt(9 * 0.000625 * 0.6396) = 0.05998125, half of it is added
    schedule = Schedule.exponential(DiffusionParams(kappa=3, min_noise_level=0.06))  # eta 0.0004, 0.64 as above
    equal(diffusion.ancestral_step(schedule, X_T, X, BOTH, NOISE), column(1.03129063, 1.0))


@pytest.mark.parametrize(
    ("ddim", "second"),
    [
        (True, 6.976821),  # 0.9906 * 7 + 0.025 * 3.8 - 0.0156 * 3 = 6.9824
        (False, 7.012386),  # 0.999375 * 7 + 0.000625 * 3.8 + 0.0399875 * 0.5 = 7.01799375
    ],
)
def test_all_steps_by_hand(ddim, second):
    """The start 3.8 / sqrt(1 + 4 * 0.64), then the above / sqrt(1 + 4 * 0.0004) = 1.0007997; told 7 each time."""
    told, schedule = Told(), Schedule.exponential(DiffusionParams())
    equal(diffusion.sample(schedule, told, Y, X, lambda: NOISE, ddim), column(7.0, 7.0))
    assert len(told.inputs) == 2 and told.t.tolist() == [0, 0]
    equal(told.inputs[0], column(2.013997, 2.013997))
    equal(told.inputs[1], column(second, second))


def test_no_cast_rounds_the_schedule():
    """Half precision of the networks, a move, and back: the same float64 tables; state dicts have none of them."""
    network = torch.nn.Module()
    network.schedule, network.layer = Schedule.exponential(DiffusionParams(steps=15)), torch.nn.Linear(1, 1)
    exact = {name: table.clone() for name, table in network.schedule.named_buffers()}
    assert {name: table.dtype for name, table in exact.items()} == {
        "sqrt_etas": torch.float64, "etas": torch.float64, "timesteps": torch.int64,
    }  # fmt: skip
    for other in (network.bfloat16(), network.half(), network.to("cpu", torch.bfloat16), copy.deepcopy(network)):
        assert other.layer.weight.dtype != torch.float32
        for name, table in other.schedule.named_buffers():
            assert table.dtype == exact[name].dtype and torch.equal(table, exact[name])
    assert not [key for key in network.state_dict() if "schedule" in key]
    assert {table.device.type for table in network.to("meta", torch.float16).buffers()} == {"meta"}


def test_rate_aware_modulation():
    rate = RateParams()
    assert [rate.eta(b) for b in (0.01, 0.02, 0.05, 0.5, 1.0, 2.0)] == pytest.approx([1, 1, 0.4, 0.04, 0.02, 0.02])
    assert rate.eta(0.03125) == 0.64
    narrow = RateParams(c=0.01, eta_min=0.1, eta_max=0.5)
    assert [narrow.eta(b) for b in (0.05, 0.01, 1.0)] == pytest.approx([0.2, 0.5, 0.1])
