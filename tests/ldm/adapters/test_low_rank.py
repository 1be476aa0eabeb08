"""LoRA and DoRA: numbers worked out by hand, the bits of the base, sums, merging, and the published counts."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_backbones import CHANNELS, CONTEXT, POOLED, SMALL, build, inputs, parameters
from torch import Tensor, nn
from torch.testing import assert_close

from ldm.adapters.low_rank import Delta, DoRA, LoRA, LowRank, LowRankConfig, MagnitudeDelta, merge, plain_state, unmerge
from ldm.backbones import Backbone, DiT, UNet
from ldm.text import HuggingFace, Scratch, TextEncoder
from training.settings.decoding import load
from training.tensors import content_hash

W = torch.tensor([[1.0, 2, 0], [0, -1, 1]])
A = torch.tensor([[0.5, -0.5, 1]])
G = torch.tensor([[0.1, 0.2, -0.3], [0.4, 0, 0.5]])
KINDS: list[LowRankConfig] = [LoRA(rank=3, alpha=6.0), DoRA(rank=3, alpha=6.0)]


def text(captions: tuple[str, ...] = ("a red circle",)) -> TextEncoder:
    config = Scratch(width=16, depth=1, heads=2, length=8)
    return config.build(config.vocabulary(captions))


def shake(adapter: nn.Module, seed: int = 3) -> None:
    """As if it had learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def attached(config: LowRankConfig, backbone: Backbone, *, learned: bool = True, seed: int = 3) -> LowRank:
    torch.manual_seed(seed)
    adapter = config.build(backbone, text())
    if learned:
        shake(adapter, seed)
    adapter.attach(backbone, text())
    return adapter


def delta(kind: type[Delta], b: float = 0.0) -> Delta:
    made = kind(W, 1, 2.0)
    with torch.no_grad():
        made.A.copy_(A), made.B.copy_(torch.tensor([[-1.0], [2.0]]) * b)
    return made


def test_the_first_gradient_and_step_of_lora() -> None:
    """dL/dB = s G A', dL/dA = 0; after one step of SGD the weight has moved by -lr s^2 G A' A."""
    lora = delta(Delta)
    ((W + lora(W)) * G).sum().backward()
    assert_close(lora.B.grad, torch.tensor([[-0.7], [1.4]]))
    assert torch.equal(lora.A.grad, torch.zeros_like(A))
    torch.optim.SGD(lora.parameters(), lr=0.1).step()
    assert_close(lora(W), torch.tensor([[0.07, -0.07, 0.14], [-0.14, 0.14, -0.28]]))
    assert_close(lora(W), -0.1 * 2.0**2 * G @ A.T @ A)


def test_the_numbers_of_dora() -> None:
    """Of the whole formula, its norm included: dL/dV is that by W, which enters by V alone."""
    dora, weight = delta(MagnitudeDelta, -0.07), W.clone().requires_grad_()
    changed = weight + dora(weight)
    assert_close(changed, torch.tensor([[1.082034, 1.951707, 0.141575], [-0.175164, -1.076009, 0.900845]]),
                 atol=1e-6, rtol=0)
    (changed * G).sum().backward()
    assert_close(weight.grad, torch.tensor([[0.001317, 0.022223, -0.316433], [0.542149, 0.256032, 0.411234]]),
                 atol=1e-6, rtol=0)
    assert_close(dora.m.grad, torch.tensor([0.203962, 0.268953]), atol=1e-6, rtol=0)
    assert_close(dora.B.grad, 2.0 * weight.grad @ A.T)


def test_a_row_of_zeros_stays_finite_in_dora() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]])
    dora = MagnitudeDelta(weight, 1, 1.0)
    changed = weight + dora(weight)
    changed.sum().backward()
    assert torch.equal(changed, weight)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dora.parameters())


def test_scales() -> None:
    assert [LoRA(rank=4).scale, LoRA(rank=4, alpha=8.0).scale] == [1.0, 2.0]
    assert LoRA(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0
    assert LoRA(rank=16, rank_stabilised=True).scale == 4.0


def test_a_starts_uniform_within_the_inverse_root_of_its_inputs() -> None:
    torch.manual_seed(0)
    a = Delta(torch.empty(8, 25, 2, 2), 64, 1.0).A
    assert a.shape == (64, 25, 2, 2)
    assert 0.095 < a.abs().max() <= 0.1
    assert a.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_a_convolution_is_a_convolution_to_r_and_one_of_one_pixel() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    lora, x = Delta(conv.weight, 2, 0.5), torch.randn(2, 3, 6, 6)
    shake(lora)
    assert lora.B.shape == (5, 2, 1, 1)
    thin = nn.functional.conv2d(nn.functional.conv2d(x, lora.A, padding=1), lora.B)
    assert_close(nn.functional.conv2d(x, conv.weight + lora(conv.weight), padding=1), conv(x) + 0.5 * thin)


@pytest.mark.parametrize("name", SMALL)
def test_the_start_is_the_base_bit_for_bit(name: str) -> None:
    backbone, given = build(SMALL[name]), inputs()
    before = backbone(*given)
    attached(LoRA(targets=("*",)), backbone, learned=False)
    assert torch.equal(backbone(*given), before)
    attached(DoRA(targets=("*",)), backbone, learned=False)
    assert_close(backbone(*given), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
@pytest.mark.parametrize("name", ["unet", "unet-linear", "dit"])
def test_merged_is_unmerged_and_the_kept_bits_come_back(name: str, config: LowRankConfig) -> None:
    backbone, given = build(SMALL[name]).float(), inputs()
    given = (given[0].float(), given[1], given[2].to("cpu", torch.float32))
    alone, state = backbone(*given), copy.deepcopy(backbone.state_dict())
    attached(replace(config, targets=("*",)), backbone)
    apart = backbone(*given)
    assert (apart - alone).abs().max() > 1e-2
    merge(backbone)
    assert_close(backbone(*given), apart, rtol=0, atol=1e-5 * apart.abs().max().item())
    assert content_hash(plain_state(backbone)) != content_hash(state)
    with pytest.raises(ValueError, match="merged already"):
        merge(backbone)
    with pytest.raises(ValueError, match="unmerge them"):
        attached(config, backbone)
    unmerge(backbone)
    assert content_hash(plain_state(backbone)) == content_hash(state)
    assert torch.equal(backbone(*given), apart)


def test_a_merge_of_bfloat16_adds_in_float32() -> None:
    """What is smaller than a step of bfloat16 beside each term is not lost in the sum of both."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    backbone: Any = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for _ in range(2):
        adapter = LoRA(rank=1, targets=("0",)).build(backbone, text())
        with torch.no_grad():
            adapter.get_parameter("backbone.0.A").fill_(1.0), adapter.get_parameter("backbone.0.B").fill_(0.003)
        adapter.attach(backbone, text())
    merge(backbone)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.item() == 1.0078125


def test_several_add_and_two_halves_are_one() -> None:
    backbones = [build(SMALL["unet"]) for _ in range(4)]
    alone, given = build(SMALL["unet"]), inputs()
    one, other = (attached(LoRA(rank=2), backbones[i], seed=i) for i in range(2))
    state = plain_state(alone)
    changes = [{n: v for n, v in _merged(b).items() if n.endswith("to_q.weight")} for b in backbones[:2]]
    for adapter in (one, other):
        adapter.attach(backbones[2], text())
    other.strength = 0.5
    for name, value in _merged(backbones[2]).items():
        if name in changes[0]:
            assert_close(value - state[name], changes[0][name] - state[name] + 0.5 * (changes[1][name] - state[name]))
    for _ in range(2):
        attached(LoRA(rank=2), backbones[3], seed=0).strength = 0.5
    assert_close(backbones[3](*given), backbones[0](*given), rtol=0, atol=1e-10)


def test_dora_on_lora_is_of_the_bare_base() -> None:
    both, dora = build(SMALL["dit"]), build(SMALL["dit"])
    attached(DoRA(rank=2), dora, seed=1)
    attached(LoRA(rank=2), both, seed=0), attached(DoRA(rank=2), both, seed=1)
    lora = build(SMALL["dit"])
    attached(LoRA(rank=2), lora, seed=0)
    base, name = plain_state(build(SMALL["dit"])), "blocks.0.attention.qkv.weight"
    changes = [_merged(backbone)[name] - base[name] for backbone in (both, dora, lora)]
    assert_close(changes[0], changes[1] + changes[2])


def _merged(backbone: Backbone) -> dict[str, Tensor]:
    merge(backbone)
    state = {name: value.clone() for name, value in plain_state(backbone).items()}
    unmerge(backbone)
    return state


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_strength_0_is_the_base_and_its_state_stays(config: LowRankConfig) -> None:
    backbone, given = build(SMALL["unet"]), inputs()
    before, state, names = backbone(*given), content_hash(backbone.state_dict()), set(backbone.state_dict())
    own = {id(p) for p in backbone.parameters()}
    adapter = attached(config, backbone)
    assert not torch.equal(backbone(*given), before)
    adapter.strength = 0.0
    assert torch.equal(backbone(*given), before)
    assert {id(p) for p in backbone.parameters()} == own
    assert set(plain_state(backbone)) == names
    assert content_hash(plain_state(backbone)) == state


@pytest.mark.parametrize(("name", "rank", "count"), [
    ("unet-sd15", 4, 797_184), ("shapes", 4, 46_592), ("fashion", 4, 49_152), ("quickstart", 4, 44_800),
    ("gpu-64", 4, 239_616), ("emoji-dit", 4, 79_872)])
def test_counts(name: str, rank: int, count: int) -> None:
    """The sum of rank (in + out) over the attentions' projections."""
    config = load("denoiser", name)
    width = 768 if isinstance(config.text, HuggingFace) else config.text.width
    with torch.device("meta"):
        backbone = config.backbone.build(channels=4, context_dim=width, pooled_dim=width)
        adapter = LoRA(rank=rank).build(backbone, text())
    assert parameters(adapter) == count


def test_counts_of_a_dit_by_hand() -> None:
    """Of each block q k v in one, out; q, k v in one, out: (4 + 2 + 2 + 3 + 2) width times the rank."""
    backbone = DiT(width=128, depth=3, heads=2).build(channels=4, context_dim=8, pooled_dim=8)
    adapter = LoRA(rank=4).build(backbone, text())
    assert parameters(adapter) == 52 * 128 * 3
    assert adapter.get_parameter("backbone.blocks.0.attention.qkv.A").shape == (4, 128)
    assert adapter.get_parameter("backbone.blocks.0.attention.qkv.B").shape == (384, 4)


def test_only_b_moves_in_the_first_step_of_a_backbone() -> None:
    for name in ("unet", "dit"):
        backbone = build(SMALL[name])
        adapter = attached(LoRA(), backbone.requires_grad_(False), learned=False)
        backbone(*inputs()).square().sum().backward()
        for _, part in adapter.deltas():
            assert not part.A.grad.any()
            assert part.B.grad.any()


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for saving in (False, True):
        backbone = build(replace(SMALL[name], gradient_checkpointing=saving)).requires_grad_(False)
        adapter = attached(DoRA(rank=2), backbone)
        backbone(*inputs()).square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        assert torch.equal(plain, saved)


def test_autocast_adds_in_float32_and_everything_learns() -> None:
    backbone, (x, level, cond) = build(SMALL["unet"]).float().requires_grad_(False), inputs()
    adapter = attached(LoRA(rank=2), backbone)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer: Any = backbone.get_submodule(name)
    delta = adapter.get_submodule(f"backbone.{name}")
    plain = plain_state(backbone)[f"{name}.weight"] + delta.scale * (delta.B @ delta.A)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, plain)
        y = backbone(x.float(), level, cond.to("cpu", torch.float32))
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def test_compiled_parts_follow_the_adapter() -> None:
    """Of a whole network, it takes a minute; of one attention, it is the same."""
    backbone: Any = build(SMALL["dit"])
    adapter, x = attached(LoRA(rank=2), backbone), torch.randn(2, 4, 32).double()
    attention = backbone.blocks[0].attention
    compiled = torch.compile(attention, backend="eager")
    for strength in (1.0, 0.5, 0.0):
        adapter.strength = strength
        assert_close(compiled(x), attention(x), rtol=0, atol=1e-12)
    torch._dynamo.reset()


def test_a_copy_of_a_base_has_a_copy_of_its_adapter() -> None:
    backbone, given = build(SMALL["dit"]), inputs()
    adapter = attached(LoRA(rank=2), backbone)
    twin, before = copy.deepcopy(backbone), backbone(*given)
    shake(adapter, 7)
    assert torch.equal(twin(*given), before)
    assert not torch.equal(backbone(*given), before)


def test_a_text_encoder_that_learns_is_a_target_too() -> None:
    backbone, encoder = build(SMALL["unet"]), text()
    before = encoder(["a red circle"])
    adapter = LoRA(rank=2, text=("layers.*.attention.*",)).build(backbone, encoder)
    adapter.attach(backbone, encoder)
    assert torch.equal(encoder(["a red circle"]).context, before.context)
    shake(adapter)
    assert not torch.equal(encoder(["a red circle"]).context, before.context)
    assert {name for name, _ in adapter.deltas() if name.startswith("text.")} == {
        "text.layers.0.attention.qkv", "text.layers.0.attention.out"}


def test_what_is_refused() -> None:
    backbone, encoder = build(SMALL["unet"]), text()
    with pytest.raises(ValueError, match=r"adapter targets: no Linear or Conv2d layer has a name like '\*.to_x'"):
        LoRA(targets=("*.to_q", "*.to_x")).build(backbone, encoder)
    with pytest.raises(ValueError, match="adapter text: no Linear"):
        LoRA(text=("*.to_q", "words")).build(backbone, encoder)
    with pytest.raises(ValueError, match="adapter targets: the backbone has no layer"):
        LoRA(targets=()).build(backbone, encoder)
    adapter = attached(LoRA(), backbone)
    with pytest.raises(ValueError, match="attached already"):
        adapter.attach(backbone, encoder)
    other = UNet(channels=(16, 32), attention=(0, 1), blocks=1, groups=8)
    with pytest.raises(ValueError, match="of another base: this one has no layer backbone.down_blocks.0"):
        adapter.attach(other.build(channels=CHANNELS, context_dim=CONTEXT, pooled_dim=POOLED), encoder)
    with pytest.raises(ValueError, match="of another base"):
        adapter.attach(build(SMALL["dit"]), encoder)
    deeper, shallow = (DiT(width=32, depth=depth, heads=2).build(channels=2, context_dim=8, pooled_dim=8)
                       for depth in (2, 1))
    with pytest.raises(ValueError, match="of another base: this one has no layer backbone.blocks.1"):
        LoRA().build(deeper, encoder).attach(shallow, encoder)
    assert set(plain_state(shallow)) == set(shallow.state_dict())  # none of its layers was changed
    encoder.trainable = False
    with pytest.raises(ValueError, match="adapter text must be empty: this text encoder is frozen"):
        LoRA(text=("layers.*.attention.*",)).build(backbone, encoder)


def test_the_ratio_is_said_of_b_alone() -> None:
    adapter = LoRA(ratio=16.0).build(build(SMALL["dit"]), text())
    assert {tuple(part.rates.items()) for _, part in adapter.deltas()} == {(("B", 16.0),)}
    names = [name for name, _ in adapter.named_parameters()]
    assert all(len({a.rsplit(".", 1)[0], b.rsplit(".", 1)[0]}) == 1 for a, b in list(pairwise(names))[::2])
