"""Moves commute with what should commute, spectra by closed form, and each regulariser does what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.kl import KL
from autoencoder.regularisers import (
    LATENT_REGULARISERS,
    Equivariance,
    Free,
    Move,
    Spectral,
    equivariance_error,
    log_spectrum,
)

F64 = torch.float64


def test_a_move_that_does_nothing_is_nothing() -> None:
    x = torch.randn(2, 3, 8, 12)
    assert Move(8, 12, 0)(x) is x and Move(4, 6, 0)(x, 2) is x


def test_moves_of_latents_and_of_images_agree() -> None:
    """Latents that are the mean of their cell of the image: turning commutes exactly, halving on whole cells too."""
    images = torch.rand(2, 3, 32, 48, dtype=F64)
    for turns in range(4):
        move = Move(8, 12, turns)
        torch.testing.assert_close(F.avg_pool2d(move(images, 4), 4), move(F.avg_pool2d(images, 4)))
        assert move(images, 4).shape[2:] == ((32, 48) if turns % 2 == 0 else (48, 32))
    slope = torch.linspace(-1, 1, 32, dtype=F64).expand(1, 1, 32, 32)  # linear: bilinear resizing is exact inside
    half = Move(4, 4, 0)
    inside = half(F.avg_pool2d(slope, 4)) - F.avg_pool2d(half(slope, 4), 4)
    assert inside[..., 1:-1].abs().max() < 1e-12


def test_equivariance_draws_what_it_says() -> None:
    torch.manual_seed(0)
    draws = [Equivariance(probability=0.5, least_scale=0.25).move(torch.rand(3), (16, 32), 0) for _ in range(4000)]
    moves = [move for move in draws if move]
    assert 0.46 < len(moves) / 4000 < 0.54
    assert {move.height for move in moves} == set(range(4, 17)) and {move.turns for move in moves} == {0, 1, 2, 3}
    assert all(move.width == 2 * move.height for move in moves)
    always = Equivariance(probability=1.0, least_scale=1.0, rotate=False)
    assert all(always.move(torch.rand(3), (16, 32), 0) == Move(16, 32, 0) for _ in range(100))
    assert all(
        Equivariance(probability=1.0).move(torch.rand(3), (8, 8), 8).height == 8  # type: ignore[union-attr]
        for _ in range(50)
    )
    assert Equivariance(probability=0.0).move(torch.zeros(3), (8, 8), 0) is None


def test_the_move_reaches_the_decoder_only() -> None:
    torch.manual_seed(0)
    model = KL(channels=(8, 8), blocks=1, latent_channels=2, groups=4).build()
    images, noise, move = torch.rand(2, 3, 16, 24), torch.randn(2, 2, 8, 12), Move(4, 6, 1)
    reconstruction, moments = model(images, noise, move)
    torch.testing.assert_close(moments, model.encode(images))
    torch.testing.assert_close(reconstruction, model.decode(move(model.norm.latents(moments, noise))))
    assert reconstruction.shape == (2, 3, 12, 8)


def test_log_spectrum_of_one_wave_and_of_white_noise() -> None:
    """A plane wave puts all power into its ring; white noise the same into every ring."""
    x = torch.arange(32) * 2 * math.pi / 32
    wave = torch.cos(3 * x)[:, None] + torch.zeros(32, 32)
    share = log_spectrum(wave[None, None]).exp()[0]
    assert len(share) == 16 and share[2] > 0.999 and share.sum() == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    noise = log_spectrum(torch.randn(1, 2000, 32, 32)).exp()[0]
    torch.testing.assert_close(noise, torch.full((16,), 1 / 16), rtol=0.05, atol=0)
    assert log_spectrum(torch.zeros(2, 3, 8, 8)).isfinite().all()


def test_log_spectrum_ignores_scale_mean_and_turning() -> None:
    x = torch.randn(2, 3, 12, 12)
    for other in (5 * x, x + 3, x.rot90(1, (2, 3)), x.flip(3), x.roll(4, 2)):
        torch.testing.assert_close(log_spectrum(other), log_spectrum(x), atol=1e-3, rtol=1e-3)
    assert log_spectrum(torch.randn(1, 2, 9, 14)).shape == (1, 4)


def test_spectral_term_is_zero_for_the_picture_itself_and_gradient_descent_takes_the_noise_out() -> None:
    torch.manual_seed(0)
    small = F.interpolate(torch.rand(2, 3, 4, 4), (16, 16), mode="bicubic")  # a smooth picture
    images = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    term = Spectral(weight=1.0)
    assert term.term(7 * small - 1, images).max() < 1e-3  # type: ignore[union-attr]
    z = torch.randn(2, 5, 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([z], 0.05)
    shares = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = term.term(z, images).mean()  # type: ignore[union-attr]
        loss.backward()
        optimizer.step()
        shares.append((loss.item(), log_spectrum(z.detach()).exp()[:, 4:].sum(1).mean().item()))
    assert shares[-1][0] < 0.02 * shares[0][0]
    assert shares[-1][1] < 0.3 * shares[0][1]  # the upper half of the band
    torch.testing.assert_close(Spectral(weight=3.0).term(z, images), 3 * term.term(z, images))  # type: ignore[operator]


def test_spectral_gradient_is_finite_for_constant_pictures_and_latents() -> None:
    z = torch.zeros(1, 2, 8, 8, requires_grad=True)
    Spectral().term(z, torch.zeros(1, 3, 32, 32)).sum().backward()  # type: ignore[union-attr]
    assert z.grad is not None and z.grad.isfinite().all()


def toy(probability: float, pictures: Tensor) -> tuple[float, float]:
    """A small autoencoder trained on pictures: its equivariance error under quarter turns, and its squared error."""
    torch.manual_seed(0)
    model = KL(channels=(16, 16), blocks=1, latent_channels=4, groups=4, mid_attention=False).build()
    optimizer, generator = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(1)
    rule = Equivariance(probability=probability, least_scale=1.0)
    for _ in range(100):
        images = pictures[torch.randint(len(pictures), (8,), generator=generator)]
        move = rule.move(torch.rand(3, generator=generator), (6, 6), 0) or Move(6, 6, 0)
        reconstruction, _ = model(images, None, move)
        loss = (reconstruction - move(images, 2)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (model(pictures, None)[0] - pictures).square().mean().item()
    turns = [equivariance_error(model, pictures, Move(6, 6, k)).mean().item() for k in (1, 2, 3)]
    return sum(turns) / 3, error


def test_equivariance_training_makes_the_encoder_commute_with_turning() -> None:
    """The measured error falls to less than half while PSNR holds within a decibel (1.259 = 10^0.1)."""
    torch.manual_seed(0)
    pictures = F.interpolate(torch.rand(32, 3, 4, 4) * 2 - 1, (12, 12), mode="bicubic")
    (plain, plain_error), (trained, error) = toy(0.0, pictures), toy(0.5, pictures)
    assert trained < 0.5 * plain, (plain, trained)
    assert error < 1.259 * plain_error, (plain_error, error)


@pytest.mark.parametrize("member", LATENT_REGULARISERS)
def test_every_regulariser_is_off_or_per_image(member: type) -> None:
    rule, z, images = member(), torch.randn(3, 2, 8, 8), torch.rand(3, 3, 16, 16)
    term = rule.term(z, images)
    assert term is None or term.shape == (3,)
    move = rule.move(torch.zeros(3), (8, 8), 0)
    assert move is None or move(images, 2).shape[:2] == (3, 3)
    assert (term is None and move is None) == (member is Free)


@pytest.mark.parametrize(
    ("member", "change"),
    [
        (Equivariance, {"probability": 1.5}),
        (Equivariance, {"least_scale": 0.0}),
        (Spectral, {"weight": -1.0}),
    ],
)
def test_bad_values_are_refused(member: type, change: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        member(**change)
