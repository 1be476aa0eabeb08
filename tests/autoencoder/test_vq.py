"""The VQ autoencoder: published sizes, diffusers' VQModel, gradients of the quantiser, usage and revival."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autoencoder.quantizer import Quantizer, code_counts, perplexity, usage
from autoencoder.vq import VQ

SMALL = VQ(channels=(8, 16), blocks=1, latent_channels=2, encoder_channels=3, groups=4, codes=16)


@pytest.mark.parametrize(
    ("count", "config"),
    [
        (55_322_782, VQ()),
        (
            67_717_295,
            VQ(channels=(128, 256, 256, 512), latent_channels=4, encoder_channels=4, attention_at=(8,), codes=16384),
        ),
        (
            69_593_371,
            VQ(
                channels=(128, 128, 256, 256, 512),
                latent_channels=8,
                encoder_channels=8,
                attention_at=(16,),
                codes=16384,
            ),
        ),
        (
            72_141_699,
            VQ(
                channels=(128, 128, 256, 256, 512),
                latent_channels=256,
                encoder_channels=256,
                attention_at=(16,),
                codes=1024,
            ),
        ),
    ],
)
def test_parameter_counts(count: int, config: VQ) -> None:
    """LDM's VQ-f4, f8, f16 and VQGAN-f16; the same as diffusers' VQModel of that shape."""
    diffusers = pytest.importorskip("diffusers")
    levels = range(len(config.channels))
    down = ["AttnDownEncoderBlock2D" if 2**i in config.attention_at else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if 2**i in config.attention_at else "UpDecoderBlock2D" for i in reversed(levels)]
    with torch.device("meta"):
        theirs = diffusers.VQModel(
            down_block_types=tuple(down), up_block_types=tuple(up), block_out_channels=config.channels,
            layers_per_block=config.blocks, latent_channels=config.encoder_channels, num_vq_embeddings=config.codes,
            vq_embed_dim=config.latent_channels,
        )  # fmt: skip
        for model in (config.build(), theirs):
            assert sum(p.numel() for p in model.parameters()) == count


def test_keys_and_values_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs: Any = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=SMALL.channels, layers_per_block=1, latent_channels=3, num_vq_embeddings=16,
        norm_num_groups=4, vq_embed_dim=2,
    ).eval()  # fmt: skip
    torch.nn.init.normal_(theirs.quantize.embedding.weight, 0, 0.3)
    ours = SMALL.build().eval()
    outcome = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not outcome.unexpected_keys and outcome.missing_keys == ["norm.shift", "norm.scale"]
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        z = ours.encode(images)
        torch.testing.assert_close(z, theirs.encode(images).latents, atol=1e-5, rtol=1e-5)
        spread = torch.randn_like(z)
        assert len(ours.quantize.indices(spread).unique()) > 8
        torch.testing.assert_close(ours.decode(spread), theirs.decode(spread).sample, atol=1e-5, rtol=1e-5)


def quantizer(beta: float = 0.25, normalize: bool = False) -> Quantizer:
    torch.manual_seed(0)
    q = Quantizer(7, 3, beta=beta, normalize=normalize).double()
    torch.nn.init.normal_(q.embedding.weight)
    return q


@pytest.mark.parametrize("normalize", [False, True])
def test_indices_are_the_nearest_codes_chunk_by_chunk(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, z = quantizer(normalize=normalize), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    vectors = q.prepare(z).movedim(1, -1).reshape(-1, 3)
    expected = torch.cdist(vectors, q.codebook()).argmin(1).reshape(2, 4, 5)
    assert torch.equal(q.indices(z), expected)
    monkeypatch.setattr("autoencoder.quantizer.SCORES_AT_ONCE", 30)
    assert torch.equal(q.indices(z), expected)


def test_straight_through_gradient_is_the_identity() -> None:
    q, z = quantizer(), torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(z)
    quantised = q(z)
    torch.testing.assert_close(quantised, q.lookup(q.indices(z)))
    quantised.backward(upstream)
    assert z.grad is not None and torch.equal(z.grad, upstream)
    assert q.embedding.weight.grad is None


def test_beta_weighs_the_commitment_and_not_the_codebook() -> None:
    z = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    full, quarter = quantizer(1.0), quantizer(0.25)
    at_z, at_codes = zip(
        *(torch.autograd.grad(q.terms(z).sum(), (z, q.embedding.weight)) for q in (full, quarter)), strict=True
    )
    torch.testing.assert_close(at_z[0], 4 * at_z[1])
    torch.testing.assert_close(at_codes[0], at_codes[1])
    expected = 2 * (z - full.lookup(full.indices(z))) / z[0].numel()
    torch.testing.assert_close(at_z[0], expected)


def test_decode_quantises_and_forward_agrees() -> None:
    torch.manual_seed(0)
    model = SMALL.build()
    torch.nn.init.normal_(model.quantize.embedding.weight)
    images = torch.rand(2, 3, 8, 8)
    reconstruction, z = model(images, None)
    model.norm.set_(torch.zeros(1), torch.full((1,), 0.37))
    latents = model.norm.latents(z, None)
    torch.testing.assert_close(latents, z / 0.37)
    torch.testing.assert_close(model.decode(latents), reconstruction)
    nudged = latents + 1e-6
    torch.testing.assert_close(model.decode(nudged), reconstruction, atol=1e-5, rtol=1e-5)


def test_one_backward_trains_encoder_codes_and_decoder() -> None:
    model = SMALL.build()
    images = torch.rand(2, 3, 8, 8)
    reconstruction, z = model(images, None)
    ((reconstruction - images).square().mean() + model.regularisation(z).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.regularisation(z).shape == (2,)


def test_normalised_codes_and_moments_have_length_one() -> None:
    config = VQ(channels=(8, 16), blocks=1, latent_channels=2, groups=4, codes=16, normalize=True)
    z = config.build().encode(torch.rand(2, 3, 8, 8))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2, 4, 4))


def test_usage_and_perplexity() -> None:
    uniform = code_counts(torch.arange(12).reshape(1, 3, 4), 12)
    assert usage(uniform) == 1 and perplexity(uniform).item() == pytest.approx(12)
    collapsed = code_counts(torch.zeros(1, 3, 4, dtype=torch.long), 12)
    assert usage(collapsed).item() == pytest.approx(1 / 12) and perplexity(collapsed) == 1
    assert perplexity(torch.zeros(5, dtype=torch.long)) == 0
    halves = code_counts(torch.zeros(1, 2, 2, dtype=torch.long), 2, lambda counts: counts + torch.tensor([0, 4]))
    assert perplexity(halves).item() == pytest.approx(2)


def test_revival_is_deterministic_and_touches_dead_codes_only() -> None:
    q, vectors = quantizer(), torch.randn(5, 3, dtype=torch.float64)
    before = q.embedding.weight.detach().clone()
    counts, uniform = torch.tensor([3, 0, 1, 0, 2, 2, 2]), torch.tensor([0.9, 0.0, 0.5, 0.999999, 0.1, 0.1, 0.1])
    dead = q.revive_(counts, vectors, uniform.double())
    assert dead.nonzero().flatten().tolist() == [1, 3]
    assert torch.equal(q.embedding.weight[~dead], before[~dead])
    assert torch.equal(q.embedding.weight[dead], vectors[[0, 4]])


@pytest.mark.parametrize(
    "change", [{"codes": 1}, {"beta": -1.0}, {"normalize": True, "latent_channels": 1}, {"encoder_channels": 0}]
)
def test_bad_shapes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        VQ(**change)
