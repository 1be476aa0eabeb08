"""Coupled attention: exact maps by hand, sources left alone, nothing shared bit for bit nothing, and pairs kept by
whatever guidance stands around."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_backbones import CHANNELS, CONTEXT, POOLED, build
from torch import Tensor

from ldm.backbones import Backbone, DiT, UNet
from ldm.backbones.attention import CrossAttention, SelfAttention
from ldm.composition import composed
from ldm.conditioning import NOTHING, Cond, Share
from ldm.coupling import COUPLINGS, Coupled, Coupling, MasaCtrl, PromptToPrompt, Style, paired, swapped_words
from ldm.denoiser import Conditional, Denoiser
from ldm.diffusion import Diffusion
from ldm.exact import F64, scalar
from ldm.grids import Uniform
from ldm.guidance import Autoguidance, ClassifierFree
from ldm.guiding import Helpers
from ldm.jumps import Jumping, jumping, jumps
from ldm.noise import Noise
from ldm.predictions import Velocity
from ldm.samplers import DDIM, DDPM, Sampler, prior, sample
from ldm.schedules import EDM, VP, Flow
from ldm.text import Label, Reading, Scratch

WIDTHS: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "base_size": 8}
BACKBONES: dict[str, UNet | DiT] = {
    "unet": UNet(channels=(16, 32), attention=(0, 1), blocks=1, heads=2, groups=8, pooled=True),
    "dit": DiT(**WIDTHS),
    "pixart": DiT(**WIDTHS, conditioning="adaln-single", cross_norm=False, pooled=False, qk_norm=True, position="rope"),
}
ALWAYS: list[Coupling] = [PromptToPrompt(cross_until=0, self_until=0), PromptToPrompt(cross_until=0, self_until=1),
                          PromptToPrompt(cross_until=1, self_until=0), MasaCtrl(below=1, depth=0), Style()]
NEVER: list[Coupling] = [PromptToPrompt(cross_until=1, self_until=1), MasaCtrl(below=0), Style(below=0)]


def denoiser_of(backbone: Backbone) -> Denoiser:
    return Denoiser(backbone, Diffusion(schedule=Flow(), prediction=Velocity()))


@pytest.fixture(scope="module", params=BACKBONES, ids=str)
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return denoiser_of(build(BACKBONES[request.param]).eval())


def words(seed: int, batch: int = 2) -> Cond:
    """Captions of 5 and 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5)[None] < torch.tensor([5, 3])[:batch, None]
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)  # noqa: E731
    return Cond(draw(batch, 5, CONTEXT), mask, draw(batch, POOLED))


def latents(batch: int = 4) -> Tensor:
    return torch.randn(batch, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(7), dtype=F64)


def drawn(denoiser: Conditional, cond: Cond, scale: float = 1.0, sampler: Sampler | None = None) -> Tensor:
    """Pairs of one noise each, walked down by a guided denoiser."""
    seeds = [seed for seed in range(len(cond.mask) // 2) for _ in range(2)]
    noise = Noise.from_seeds(seeds)
    denoise = ClassifierFree(scale=scale)(denoiser, cond, words(9, 1))
    grid = Uniform()(4, denoiser.schedule)
    return sample(sampler or DDIM(), denoise, prior(denoiser.schedule, (CHANNELS, 4, 4), noise, F64), grid, noise)


# --- the maps, by hand ------------------------------------------------------------------------------------------------


def by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v with the softmax written out, of (N, D), (L, D), (L, D)."""
    parts = []
    for one_q, one_k, one_v in zip(*(x.chunk(heads, dim=1) for x in (q, k, v)), strict=True):
        scores = one_q @ one_k.T / one_q.shape[1] ** 0.5
        weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).exp()
        parts.append(weights / weights.sum(1, keepdim=True) @ one_v)
    return torch.cat(parts, dim=1)


def test_cross_attention_is_the_sources_map_on_the_targets_values() -> None:
    torch.manual_seed(0)
    layer, x, context = CrossAttention(16, 2).double(), torch.randn(4, 6, 16, dtype=F64), words(1).context[..., :16]
    context, mask = torch.cat([context, context + 1]), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]] * 2).bool()
    got = layer(x, context, mask[:, None, None], "qk")
    for source, target in ((0, 1), (2, 3)):
        k, _ = layer.kv(context[source]).chunk(2, dim=1)
        _, v = layer.kv(context[target]).chunk(2, dim=1)
        expected = layer.out(by_hand(layer.q(x[source]), k, v, 2, mask[source]))
        torch.testing.assert_close(got[target], expected, rtol=0, atol=1e-12)
    assert torch.equal(got[::2], layer(x, context, mask[:, None, None])[::2])


@pytest.mark.parametrize(("shared", "taken"), [("qk", (0, 0, 1)), ("kv", (1, 0, 0))])
def test_self_attention_takes_what_is_shared(shared: Any, taken: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(16, 2).double(), torch.randn(4, 6, 16, dtype=F64)
    got = layer(x, shared=shared)
    for first in (0, 2):
        q, k, v = (layer.qkv(x[first + side]).chunk(3, dim=1)[part] for part, side in enumerate(taken))
        torch.testing.assert_close(got[first + 1], layer.out(by_hand(q, k, v, 2)), rtol=0, atol=1e-12)
    assert torch.equal(got[::2], layer(x)[::2])


# --- what is left alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ALWAYS, ids=repr)
def test_the_source_is_what_it_is_alone_and_the_target_is_not(denoiser: Denoiser, coupling: Coupling) -> None:
    cond = paired(words(1), words(2))
    plain, coupled = denoiser(latents(), scalar(0.5), cond), Coupled(coupling, denoiser)(latents(), scalar(0.5), cond)
    for one, other in zip(plain[:2], coupled[:2], strict=True):
        assert torch.equal(one[::2], other[::2])
        assert all((one[i] - other[i]).abs().max() > 1e-4 for i in (1, 3))


@pytest.mark.parametrize("coupling", ALWAYS, ids=repr)
def test_jumps_of_pairs_share_as_answers_do(denoiser: Denoiser, coupling: Coupling) -> None:
    """What a few-step model shares goes by the time that it jumps from; of a plain denoiser there is no jump."""
    cond, t, student = paired(words(1), words(2)), scalar(0.5), Jumping(denoiser.backbone, denoiser.diffusion)
    jump = jumping(Coupled(coupling, student).bind(cond)).jump
    shared = Coupled(coupling, denoiser)(latents(), t, cond)
    for got, wanted in zip(jump(latents(), t, scalar(0.2))[:2], shared[:2], strict=True):
        assert torch.equal(got, wanted)
    with pytest.raises(ValueError, match="works on pairs"):
        jump(latents(3), t, scalar(0.2))
    assert not jumps(Coupled(coupling, denoiser).bind(cond))


@pytest.mark.parametrize("coupling", NEVER, ids=repr)
def test_never_is_the_plain_target_bit_for_bit(denoiser: Denoiser, coupling: Coupling) -> None:
    cond = paired(words(1), words(2))
    assert torch.equal(drawn(Coupled(coupling, denoiser), cond, 3.0), drawn(denoiser, cond, 3.0))


@pytest.mark.parametrize("coupling", ALWAYS, ids=repr)
def test_the_same_caption_and_noise_twice_is_one_picture_bit_for_bit(denoiser: Denoiser, coupling: Coupling) -> None:
    cond = paired(words(1), words(1))
    got, plain = drawn(Coupled(coupling, denoiser), cond, 3.0, DDPM()), drawn(denoiser, cond, 3.0, DDPM())
    assert torch.equal(got, plain)
    assert torch.equal(got[::2], got[1::2])


def test_a_swapped_word_changes_the_target_and_the_source_is_drawn_as_alone(denoiser: Denoiser) -> None:
    other = torch.where((torch.arange(5) == 2)[:, None], words(3).context, words(1).context)
    cond = paired(words(1), words(1)._replace(context=other))
    got, plain = drawn(Coupled(PromptToPrompt(), denoiser), cond, 3.0), drawn(denoiser, cond, 3.0)
    assert torch.equal(got[::2], plain[::2])
    assert (got[1::2] - got[::2]).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert (got[1::2] - plain[1::2]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_each_picture_walks_with_an_x_of_its_own(denoiser: Denoiser) -> None:
    """With the source's x in the place of both, later steps would differ: bloc97/CrossAttentionControl #30."""
    asked: list[Tensor] = []

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        asked.append(x)
        return denoiser.backbone(x, level, cond)

    network.shares = denoiser.backbone.shares  # type: ignore[attr-defined]
    coupled = Coupled(PromptToPrompt(), replace(denoiser, backbone=network))
    drawn(coupled, paired(words(1), words(2)))
    assert torch.equal(asked[0][::2], asked[0][1::2])
    for x in asked[1:]:
        assert (x[1::2] - x[::2]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


# --- what stands around -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [*ALWAYS, *NEVER], ids=repr)
def test_guidance_couples_both_halves_as_two_calls_do(denoiser: Denoiser, coupling: Coupling) -> None:
    cond, null, coupled = paired(words(1), words(2)), paired(words(9), words(8)), Coupled(coupling, denoiser)
    x, t = latents(), scalar(0.5)
    told, absent = coupled(x, t, cond), coupled(x, t, null)
    got = ClassifierFree(scale=3.0)(coupled, cond, null)(x, t)
    torch.testing.assert_close(got.x0, absent.x0 + 3 * (told.x0 - absent.x0), rtol=0, atol=1e-6)
    got = composed(coupled, [(cond, 2.0), (cond, 0.5)], null)(x, t)
    torch.testing.assert_close(got.eps, absent.eps + 2.5 * (told.eps - absent.eps), rtol=0, atol=1e-6)
    got = Autoguidance(scale=1.5)(coupled, cond, None, Helpers(weak=denoiser))(x, t)
    torch.testing.assert_close(got.x0, 1.5 * told.x0 - 0.5 * denoiser(x, t, cond).x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_are_those_of_the_coupled_call_with_and_without_checkpointing(name: str) -> None:
    """What is computed again in the backward pass is coupled as it was the first time."""
    gradients = []
    for saving in (False, True):
        backbone = build(replace(BACKBONES[name], gradient_checkpointing=saving))
        x = latents().requires_grad_()
        coupled = Coupled(PromptToPrompt(self_until=0), denoiser_of(backbone))
        coupled(x, scalar(0.5), paired(words(1), words(2))).x0.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_nothing_is_left_after_an_exception(denoiser: Denoiser) -> None:
    cond, t = paired(words(1), words(2)), scalar(0.5)
    plain = denoiser(latents(), t, cond).x0
    with pytest.raises(RuntimeError):
        Coupled(Style(), denoiser)(latents(), t, cond._replace(context=cond.context[..., 1:]))
    assert cond.share == NOTHING
    assert torch.equal(denoiser(latents(), t, cond).x0, plain)


@pytest.mark.parametrize("config", [DiT(**WIDTHS | {"depth": 1}), UNet(channels=(16,), attention=(), groups=8)])
def test_a_backbone_is_traced_whole_with_and_without(config: UNet | DiT) -> None:
    backbone = build(config).eval()
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    for share in (NOTHING, Share("qk", "qk")):
        given = latents(), torch.full((4,), 0.5, dtype=F64), paired(words(1), words(2))._replace(share=share)
        torch.testing.assert_close(compiled(*given), backbone(*given), rtol=0, atol=1e-10)


def test_a_share_survives_the_cast_to_the_dtype_of_the_weights(denoiser: Denoiser) -> None:
    x, t, cond = latents().float(), scalar(0.5), paired(words(1), words(2)).to("cpu", torch.float32)
    coupled = Coupled(Style(), denoiser)(x, t, cond).x0
    assert (coupled - denoiser(x, t, cond).x0)[1::2].abs().max() > 1e-4


# --- when and where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Flow(), VP(), EDM()], ids=repr)
def test_thresholds_are_shares_of_noise_on_every_process(schedule: Any) -> None:
    seen: list[Share] = []

    def network(x: Tensor, level: Tensor, cond: Cond) -> Tensor:
        seen.append(cond.share)
        return x

    network.shares = frozenset({"own", "cross"})  # type: ignore[attr-defined]
    coupled = Coupled(PromptToPrompt(cross_until=0.2, self_until=0.6),
                      Denoiser(network, Diffusion(schedule=schedule, prediction=Velocity())))
    for odds in (0.7 / 0.3, 0.59 / 0.41, 0.21 / 0.79, 0.19 / 0.81):
        coupled(latents(), schedule.time(-2 * torch.tensor(odds, dtype=F64).log()), paired(words(1), words(2)))
    assert seen == [Share("qk", "qk"), Share("", "qk"), Share("", "qk"), NOTHING]


@pytest.mark.parametrize(("name", "places"), [("unet", [0, 0.2, 0.4, 0.6, 0.6, 0.8, 0.8]), ("dit", [0, 0.5])])
def test_depth_leaves_the_first_layers_alone(name: str, places: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def at(share: Share, depth: float) -> Share:
        asked.append(depth)
        return share

    monkeypatch.setattr(Share, "at", at)
    Coupled(MasaCtrl(), denoiser_of(build(BACKBONES[name])))(latents(), scalar(0.5), paired(words(1), words(2)))
    assert asked == pytest.approx(places)
    monkeypatch.undo()
    assert Share("kv", "qk", 0.5).at(0.49) == NOTHING
    assert Share("kv", "qk", 0.5).at(0.5) == Share("kv", "qk", 0.5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", COUPLINGS)
def test_an_odd_batch_is_refused(denoiser: Denoiser, cls: type[Coupling]) -> None:
    with pytest.raises(ValueError, match=r"pairs \(source, target\), not on 3 samples"):
        Coupled(cls(), denoiser)(latents(3), scalar(0.5), words(1).select(torch.tensor([0, 1, 0])))


def test_a_backbone_without_the_attention_is_refused() -> None:
    label, inside = (denoiser_of(build(DiT(**WIDTHS, text=text))) for text in ("none", "in-context"))
    with pytest.raises(ValueError, match="needs a backbone with cross-attention to the text, which"):
        Coupled(PromptToPrompt(), label)
    Coupled(MasaCtrl(), label)
    for cls in COUPLINGS:
        with pytest.raises(ValueError, match="needs a backbone with attention over the picture alone"):
            Coupled(cls(), inside)
        with pytest.raises(ValueError, match="needs a backbone with"):
            Coupled(cls(), Denoiser(lambda x, level, cond: x, inside.diffusion))


@pytest.mark.parametrize(("cross", "own"), [(1.1, 0.5), (0.5, -0.1)])
def test_settings_outside_their_limits_are_refused(cross: float, own: float) -> None:
    with pytest.raises(ValueError, match="prompt-to-prompt .*_until must be in"):
        PromptToPrompt(cross_until=cross, self_until=own)
    with pytest.raises(ValueError, match="depth must be in"):
        Style(depth=1.0)


# --- pairs and words --------------------------------------------------------------------------------------------------


def test_pairs_stand_side_by_side() -> None:
    source, target = words(1), words(2, 1)
    both = paired(source, target)
    assert torch.equal(both.context[::2], source.context)
    assert torch.equal(both.context[1::2], target.context.expand(2, -1, -1))
    assert torch.equal(both.mask[::2], source.mask)
    assert both.pooled is not None
    assert both.pooled.shape == (4, POOLED)


def test_words_that_differ_are_named_and_other_lengths_refused() -> None:
    captions = ["a red circle at the top left", "a large red circle"]
    text = Scratch(width=16, depth=1, heads=2, length=16)
    encoder = text.build(text.vocabulary(captions))
    assert swapped_words(encoder, captions[0], captions[0]) == []
    assert swapped_words(encoder, captions[0], "an orange circle at the top right") == [
        ("a", "an"), ("red", "orange"), ("left", "right")]
    with pytest.raises(ValueError, match="'a red circle at the top left' and 'a large red circle' are of diff"):
        swapped_words(encoder, *captions)


def test_words_of_other_token_counts_are_refused_where_the_sum_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Scratch(width=16, depth=1, heads=2, length=16)
    encoder = text.build(text.vocabulary(["red circle"]))
    pieces = {"red": 1, "vermilion": 3, "circle": 1, "rhombicuboctahedron": 3}
    count = lambda caption: sum(pieces[word] for word in caption.split())  # noqa: E731
    monkeypatch.setattr(encoder, "readings", lambda captions: [Reading(count(one), count(one)) for one in captions])
    with pytest.raises(ValueError, match="'circle' and 'rhombicuboctahedron' are of different lengths"):
        swapped_words(encoder, "vermilion circle", "red rhombicuboctahedron")


def test_one_token_per_caption_has_no_map_to_keep() -> None:
    text = Label(width=8)
    with pytest.raises(ValueError, match="one token per caption"):
        swapped_words(text.build(text.vocabulary(["cat", "dog"])), "cat", "dog")
