"""Posterior and latent normalisation: closed forms and round trips."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from autoencoder.norm import LatentNorm, LatentStatistics
from autoencoder.posterior import Posterior


def test_kl_is_zero_for_the_unit_gaussian_and_the_textbook_sum_otherwise() -> None:
    assert Posterior.split(torch.zeros(3, 4, 2, 2)).kl().tolist() == [0, 0, 0]
    moments = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    posterior = Posterior.split(moments)
    mean, logvar = moments[:, :2], moments[:, 2:]
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl(), expected)


def test_extreme_logvar_is_clamped_and_finite() -> None:
    moments = torch.cat((torch.zeros(1, 1, 1, 2), torch.tensor([[[[-1e9, 1e9]]]])), 1)
    posterior = Posterior.split(moments)
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    assert posterior.kl().isfinite().all()
    assert posterior.sample(torch.ones(1, 1, 1, 2)).isfinite().all()


def test_sample_is_mean_plus_std_noise() -> None:
    moments, noise = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    posterior = Posterior.split(moments)
    torch.testing.assert_close(posterior.sample(noise), moments[:, :3] + (moments[:, 3:] / 2).exp() * noise)
    assert torch.equal(posterior.mode(), posterior.sample(torch.zeros_like(noise)))


def test_norm_is_the_identity_at_first_and_inverts() -> None:
    norm = LatentNorm(3)
    moments, noise = torch.randn(2, 6, 4, 4), torch.randn(2, 3, 4, 4)
    z = Posterior.split(moments).sample(noise)
    assert torch.equal(norm.latents(moments, noise), z)
    norm.set_(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0]))
    latents = norm.latents(moments, noise)
    torch.testing.assert_close(latents[:, 1], (z[:, 1] + 2) / 0.5)
    torch.testing.assert_close(norm.inverse(latents), z)
    torch.testing.assert_close(norm.inverse(norm.mean_latents(moments)), moments[:, :3])
    assert torch.equal(norm.latents(moments, None), norm.mean_latents(moments))


def test_norm_without_posterior_takes_z_alone() -> None:
    norm = LatentNorm(3, gaussian=False)
    z = torch.randn(2, 3, 4, 4)
    assert torch.equal(norm.latents(z, torch.randn_like(z)), z)
    assert torch.equal(norm.mean_latents(z), z)


@pytest.mark.parametrize(("shift", "scale"), [([0.0], [0.0]), ([float("nan")], [1.0]), ([0.0, 1.0], [1.0, 1.0])])
def test_norm_refuses_what_cannot_be_inverted(shift: list[float], scale: list[float]) -> None:
    with pytest.raises(ValueError):
        LatentNorm(1).set_(torch.tensor(shift), torch.tensor(scale))


def test_statistics_make_latents_zero_mean_unit_std_whatever_the_batches() -> None:
    torch.manual_seed(0)
    moments = torch.randn(64, 6, 8, 8) * 0.5 + torch.tensor([1.0, -3.0, 0.0, -1.0, 0.0, -2.0]).view(1, 6, 1, 1)
    norms = []
    for sizes in ((64,), (10, 54)):
        norm = LatentNorm(3)
        statistics = LatentStatistics(norm, 3)
        for batch in moments.split(sizes):
            statistics.add(batch)
        statistics.fit()
        norms.append(norm)
    torch.testing.assert_close(norms[0].scale, norms[1].scale)
    latents = torch.cat([norms[0].latents(moments, torch.randn(64, 3, 8, 8)) for _ in range(50)])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(3), atol=0.01, rtol=0)


def test_statistics_reduce_joins_processes() -> None:
    moments = torch.randn(8, 4, 3, 3)
    whole, parts = LatentNorm(2), LatentNorm(2)
    statistics = LatentStatistics(whole, 2)
    statistics.add(moments)
    statistics.fit()
    first, second = LatentStatistics(parts, 2), LatentStatistics(parts, 2)
    first.add(moments[:3])
    second.add(moments[3:])
    first.fit(lambda totals: totals + second.totals)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def test_statistics_of_codes_are_one_scale_and_no_shift() -> None:
    norm = LatentNorm(3, gaussian=False, shared=True)
    z = torch.randn(16, 3, 8, 8) * 4
    statistics = LatentStatistics(norm, 3)
    statistics.add(z)
    statistics.fit()
    torch.testing.assert_close(norm.scale.item(), z.double().std(correction=0).item(), rtol=1e-6, atol=0)
    assert norm.shift.tolist() == [[[[0.0]]]]


def test_constant_channel_keeps_scale_one_and_nothing_added_is_an_error() -> None:
    norm = LatentNorm(2, gaussian=False)
    statistics = LatentStatistics(norm, 2)
    with pytest.raises(ValueError, match="at least one batch"):
        statistics.fit()
    statistics.add(torch.cat((torch.full((4, 1, 2, 2), 3.0), torch.randn(4, 1, 2, 2)), 1))
    statistics.fit()
    assert norm.scale.flatten()[0] == 1 and norm.shift.flatten()[0] == 3
