"""The tiny autoencoder against diffusers' AutoencoderTiny, and its distillation from a trained one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoencoder.kl import KL
from autoencoder.tiny import Distilled, Tiny, distillation

SMALL = Tiny(width=8, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1), latent_channels=3)


def diffusers_twin(config: Tiny) -> Any:
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.encoder_blocks)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(config.width,) * levels, decoder_block_out_channels=(config.width,) * levels,
        num_encoder_blocks=config.encoder_blocks, num_decoder_blocks=config.decoder_blocks,
        latent_channels=config.latent_channels,
    ).eval()  # fmt: skip


def test_keys_and_values_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers_twin(SMALL), SMALL.build().eval()
    outcome = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not outcome.unexpected_keys and outcome.missing_keys == ["norm.shift", "norm.scale"]
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        z = ours.encode(images)
        torch.testing.assert_close(z, theirs.encode(images).latents, atol=1e-5, rtol=1e-5)
        for scale in (1, 20):
            torch.testing.assert_close(ours.decode(scale * z), theirs.decode(scale * z).sample, atol=1e-5, rtol=1e-5)


def test_parameter_count_is_that_of_taesd() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in model.parameters()) for model in (Tiny().build(), diffusers_twin(Tiny()))]
    assert sizes[0] == sizes[1] == 2_445_063
    assert Tiny().factor == 8


def loss(pair: Distilled) -> torch.Tensor:
    return (pair.images - pair.target).square().flatten(1).mean(1) + pair.latents


def test_a_student_learns_its_teachers_latents_and_pictures() -> None:
    torch.manual_seed(0)
    teacher = KL(channels=(8, 8, 8), blocks=1, latent_channels=3, groups=4, mid_attention=False).build()
    teacher.norm.set_(torch.tensor([0.1, -0.2, 0.0]), torch.tensor([0.5, 0.3, 0.4]))
    student, images = SMALL.build(), torch.rand(8, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    before = loss(distillation(student, teacher, images, None))
    assert before.shape == (8,)
    for _ in range(40):
        optimizer.zero_grad()
        loss(distillation(student, teacher, images, torch.randn(8, 3, 4, 4))).mean().backward()
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert loss(distillation(student, teacher, images, None)).mean() < 0.5 * before.mean()
    torch.testing.assert_close(loss(distillation(student, student, images, None)), torch.zeros(8))


def test_what_is_compared() -> None:
    """Both decode the teacher's latents, drawn with the noise; the student's own are held to their mean."""
    torch.manual_seed(0)
    teacher = KL(channels=(8, 8, 8), blocks=1, latent_channels=3, groups=4, mid_attention=False).build()
    teacher.norm.set_(torch.tensor([0.1, -0.2, 0.0]), torch.tensor([0.5, 0.3, 0.4]))
    student, images, noise = SMALL.build(), torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 4, 4)
    student.norm.set_(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))  # of a model begun from another
    pair, moments = distillation(student, teacher, images, noise), teacher.encode(images)
    latents, mean = teacher.norm.latents(moments, noise), teacher.norm.mean_latents(moments)
    torch.testing.assert_close(pair.images, student.decode(latents))
    torch.testing.assert_close(pair.target, teacher.decode(latents))
    error = (student.norm.mean_latents(student.encode(images)) - mean).square().flatten(1).mean(1)
    torch.testing.assert_close(pair.latents, error)


def test_students_that_cannot_be_taught_are_refused() -> None:
    teacher = KL(channels=(8, 8), blocks=1, latent_channels=3, groups=4).build()
    with pytest.raises(ValueError, match="the teacher has factor 2 and 3 latent channels, the student 4 and 3"):
        distillation(SMALL.build(), teacher, torch.zeros(1, 3, 8, 8), None)
    with pytest.raises(ValueError, match="posterior or codes"):
        distillation(teacher, teacher, torch.zeros(1, 3, 8, 8), None)


@pytest.mark.parametrize("factor", [1, 4, 8, 32])
def test_a_shape_follows_its_teacher(factor: int) -> None:
    fitted = Tiny().fit_to(factor, 6)
    assert (fitted.factor, fitted.latent_channels, fitted.width) == (factor, 6, 64)
    assert fitted.encoder_blocks[0] == fitted.decoder_blocks[-1] == 1  # the finest level
    assert fitted.encoder_blocks == fitted.decoder_blocks[::-1] and fitted.fit_to(factor, 6) == fitted
    assert Tiny().fit_to(8, 4) == Tiny()


@pytest.mark.parametrize("change", [{"width": 0}, {"encoder_blocks": (1, 2)}, {"decoder_blocks": (3, 3, -1, 1)}])
def test_bad_shapes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Tiny(**change)
