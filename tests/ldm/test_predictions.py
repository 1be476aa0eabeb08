from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import F64, scalar
from ldm.predictions import EDMF, PREDICTIONS, X0, Eps, Prediction, Score, V, Velocity
from ldm.schedules import EDM, SCHEDULES, VP, DDPMLinear, Flow, NoiseSchedule, Table

ENDS: list[NoiseSchedule] = (
    [cls() for cls in SCHEDULES]
    + [Flow(t_min=0.0)]
    + [cls(zero_terminal_snr=True) for cls in SCHEDULES if issubclass(cls, Table)]
)  # type: ignore[call-arg]
PAIRS = [(schedule, cls()) for schedule, cls in itertools.product(ENDS, PREDICTIONS)]
ALLOWED = [pair for pair in PAIRS if pair[1].refusal(pair[0]) is None]
REFUSED = [pair for pair in PAIRS if pair[1].refusal(pair[0]) is not None]
allowed = pytest.mark.parametrize(("schedule", "prediction"), ALLOWED, ids=repr)


@allowed
@settings(max_examples=15)
@given(u=st.floats(0, 1), dtype=st.sampled_from([torch.float32, F64]))
def test_both_ends_come_back(schedule: NoiseSchedule, prediction: Prediction, u: float, dtype: torch.dtype) -> None:
    diffusion = Diffusion(schedule=schedule, prediction=prediction)
    t = scalar(schedule.t_min + (1 - schedule.t_min) * u)
    x0 = torch.tensor([[0.3, -1.2], [2.0, 0.0]], dtype=dtype)
    eps = torch.tensor([[1.1, 0.4], [-0.7, 0.2]], dtype=dtype)
    x = diffusion.perturb(x0, eps, t)
    ends = diffusion.recover(x, diffusion.target(x0, eps, t), t)
    alpha, sigma = schedule(t)
    assert ends.x0.dtype == ends.eps.dtype == dtype
    # Rounding in x_t is amplified by the prediction's own condition: 1 / alpha in x0, 1 / sigma in eps.
    unit = 40 * torch.finfo(dtype).eps
    assert (alpha * ends.x0 + sigma * ends.eps - x).abs().max() < unit * (1 + sigma)
    assert (alpha * (ends.x0 - x0)).abs().max() < unit * (1 + sigma)
    assert (sigma * (ends.eps - eps)).abs().max() < unit * (1 + sigma)


@allowed
def test_the_ends_of_time_are_finite(schedule: NoiseSchedule, prediction: Prediction) -> None:
    diffusion = Diffusion(schedule=schedule, prediction=prediction)
    t = torch.tensor([schedule.t_min, 1.0], dtype=F64)
    y = torch.ones(2, 3, dtype=torch.bfloat16)
    for value in (
        *diffusion.recover(torch.ones(2, 3), y, t)[:2],
        diffusion.target(torch.ones(2, 3), torch.ones(2, 3), t),
    ):
        assert value.dtype == torch.float32 and bool(value.isfinite().all())


@pytest.mark.parametrize(("schedule", "prediction"), REFUSED, ids=repr)
def test_singular_pairs_are_refused_with_the_way_out(schedule: NoiseSchedule, prediction: Prediction) -> None:
    with pytest.raises(ValueError, match=rf"prediction '{prediction.kind}' cannot tell .*; (use|give)"):
        Diffusion(schedule=schedule, prediction=prediction)


def test_which_pairs_are_singular() -> None:
    refused = {
        (schedule.kind, prediction.kind)
        for schedule, prediction in REFUSED
        if not isinstance(schedule, Table) and schedule != Flow(t_min=0.0)
    }  # type: ignore[attr-defined]
    assert refused == {(schedule, prediction) for schedule in ("flow", "gvp") for prediction in ("eps", "score")}
    assert X0().refusal(Flow(t_min=0.0)) is not None and Velocity().refusal(Flow(t_min=0.0)) is None
    assert Eps().refusal(DDPMLinear(zero_terminal_snr=True)) is not None and Eps().refusal(DDPMLinear()) is None


def test_targets_are_the_textbook_ones() -> None:
    t, x0, eps = torch.tensor([0.3, 0.8], dtype=F64), torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.0], [0.25]])

    def target(schedule: NoiseSchedule, prediction: Prediction) -> torch.Tensor:
        return Diffusion(schedule=schedule, prediction=prediction).target(x0, eps, t)

    alpha, sigma = (part.float()[:, None] for part in VP()(t))
    torch.testing.assert_close(target(Flow(), Velocity()), eps - x0)
    torch.testing.assert_close(target(VP(), Eps()), eps)
    torch.testing.assert_close(target(VP(), X0()), x0)
    torch.testing.assert_close(target(VP(), V()), alpha * eps - sigma * x0)
    torch.testing.assert_close(target(VP(), EDMF(sigma_data=1.0)), sigma * x0 - alpha * eps)
    torch.testing.assert_close(target(VP(), Score()), -eps / sigma)


def test_edm_preconditioning_at_sigma_one_half() -> None:
    """c_skip, c_out and c_in of EDM are our a, b and input scale: D = c_skip x + c_out F."""
    t, sigma, data = scalar(0.5 / 80), 0.5, 0.5
    diffusion = Diffusion(schedule=EDM(), prediction=EDMF())
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    assert diffusion.recover(one, zero, t).x0.item() == pytest.approx(0.5, abs=1e-12)
    assert diffusion.recover(zero, one, t).x0.item() == pytest.approx(0.353553, abs=5e-7)
    assert diffusion.condition(one, t)[0].item() == pytest.approx(1.414214, abs=5e-7)
    assert diffusion.gains(t)[0].item() == pytest.approx((sigma * data) ** 2 / (sigma**2 + data**2), abs=1e-12)


def test_learned_variance_splits_the_channels() -> None:
    diffusion = Diffusion(schedule=DDPMLinear(), prediction=Eps(), learned_variance=True)
    y = torch.cat([torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), -1.0)], dim=1)
    ends = diffusion.recover(torch.zeros(2, 3, 4, 4), y, scalar(0.5))
    assert ends.log_var_frac is not None and bool((ends.log_var_frac == 0).all()) and bool((ends.eps == 0.5).all())


def test_a_denoiser_tells_its_network_scale_and_level() -> None:
    seen = {}

    def network(x: torch.Tensor, level: torch.Tensor, cond: object) -> torch.Tensor:
        seen.update(x=x, level=level)
        return torch.zeros_like(x)

    denoiser = Denoiser(network, Diffusion(schedule=EDM(), prediction=EDMF()))
    x = torch.full((3, 1, 2, 2), 2.0)
    for t in (scalar(0.5 / 80), torch.full((3,), 0.5 / 80, dtype=F64)):
        ends = denoiser(x, t, None)  # type: ignore[arg-type]
        torch.testing.assert_close(seen["x"], x * math.sqrt(2))
        torch.testing.assert_close(seen["level"], torch.full((3,), math.log(0.5) / 4, dtype=F64))
        torch.testing.assert_close(ends.x0, x / 2)
    with pytest.raises(ValueError, match="t_min"):
        denoiser(x, scalar(0.0), None)  # type: ignore[arg-type]
