"""The tiny autoencoder against diffusers' AutoencoderTiny, and its distillation from a trained one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoencoder.kl import KL
from autoencoder.tiny import Tiny, distillation

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


def test_a_student_learns_its_teachers_latents_and_pictures() -> None:
    torch.manual_seed(0)
    teacher = KL(channels=(8, 8, 8), blocks=1, latent_channels=3, groups=4, mid_attention=False).build()
    teacher.norm.set_(torch.tensor([0.1, -0.2, 0.0]), torch.tensor([0.5, 0.3, 0.4]))
    student, images = SMALL.build(), torch.rand(8, 3, 16, 16) * 2 - 1
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    before = distillation(student, teacher, images, None)
    assert before.shape == (8,)
    for _ in range(40):
        optimizer.zero_grad()
        distillation(student, teacher, images, torch.randn(8, 3, 4, 4)).mean().backward()
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert distillation(student, teacher, images, None).mean() < 0.5 * before.mean()
    torch.testing.assert_close(distillation(student, student, images, None), torch.zeros(8))


def test_a_student_of_another_shape_is_refused() -> None:
    teacher = KL(channels=(8, 8), blocks=1, latent_channels=3, groups=4).build()
    with pytest.raises(ValueError, match="the teacher has factor 2 and 3 latent channels, the student 4 and 3"):
        distillation(SMALL.build(), teacher, torch.zeros(1, 3, 8, 8), None)


@pytest.mark.parametrize("change", [{"width": 0}, {"encoder_blocks": (1, 2)}, {"decoder_blocks": (3, 3, -1, 1)}])
def test_bad_shapes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Tiny(**change)
