"""Control branches: nothing at the start, the zero layers first, sums, intervals, hints; diffusers' own networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_backbones import CHANNELS, CONTEXT, SMALL, inputs
from test_backbones import build as backbone_of
from torch import Tensor, nn

from ldm.adapters.controlled import Control, Controlled
from ldm.adapters.controlnet import ControlNet, DiTBranch
from ldm.adapters.t2i import T2IAdapter
from ldm.backbones import Backbone, DiT, UNet
from ldm.conditioning import Cond, Share
from ldm.denoiser import Denoiser
from ldm.diffusion import Diffusion
from ldm.grids import Uniform
from ldm.guidance import ClassifierFree
from ldm.guiding import place
from ldm.noise import Noise
from ldm.predictions import Velocity
from ldm.samplers import DDIM, sample
from ldm.schedules import SCHEDULES, DDPMLinear, Flow, NoiseSchedule, per_sample

NETWORKS: dict[str, Any] = {name: SMALL[name] for name in ("dit", "dit-single", "dit-in-context", "dit-variance")}
NETWORKS["unet"] = UNet(**UNet.small, position=True, pooled=True, scale_shift=True)
NETWORKS["unet-linear"] = SMALL["unet-linear"]
NETWORKS["dit-deep"] = DiT(width=32, depth=5, heads=2, conditioning="adaln-single", norm="rms")
TEXT: Any = None  # no branch reads the text encoder
FACTOR = 4


def frozen(config: Any) -> Backbone:
    """A base whose output layers and gates are not zero: else no gradient would reach a branch."""
    return backbone_of(config).requires_grad_(False)


def hinted(channels: int = 3, seed: int = 5, name: str = "image") -> tuple[Tensor, Tensor, Cond]:
    x, level, cond = inputs()
    image = torch.rand(3, channels, 8 * FACTOR, 8 * FACTOR, generator=torch.Generator().manual_seed(seed))
    return x, level, cond._replace(extras={name: image.double()})


def branch_on(base: Backbone, *, learned: bool = False, kind: type = ControlNet, seed: int = 3, **settings: Any) -> Any:
    torch.manual_seed(seed)
    branch = kind(**{"factor": FACTOR, "hint_channels": 3, **settings}).build(base, TEXT)
    with torch.no_grad():
        for parameter in branch.parameters() if learned else ():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return branch


def beside(base: Backbone, *branches: Control) -> Backbone:
    for branch in branches:
        base, _ = branch.attach(base, TEXT)
    return base


def zeros(branch: Any) -> tuple[nn.Module, nn.Module]:
    """The layers that speak, and the last one of the hint network."""
    if isinstance(branch, DiTBranch):
        return branch.spoken, branch.hint_network.conv_out
    return nn.ModuleList([branch.controlnet_down_blocks, branch.controlnet_mid_block]), (
        branch.controlnet_cond_embedding.conv_out)


@pytest.fixture(params=NETWORKS, ids=str)
def config(request: pytest.FixtureRequest) -> Any:
    return NETWORKS[request.param]


@pytest.mark.parametrize("how", ["float64", "bfloat16", "checkpointing"])
def test_a_fresh_controlnet_changes_no_bit(config: Any, how: str) -> None:
    base = frozen(replace(config, gradient_checkpointing=how == "checkpointing"))
    controlled = beside(base, branch_on(base))
    x, level, cond = hinted()
    if how == "bfloat16":
        base.float(), controlled.float()
        x, cond = x.float(), cond.to("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"):
        y = controlled(x, level, cond)
        assert y.abs().max() > 0.01
        assert torch.equal(y, base(x, level, cond))
    assert y.shape[1] == base.out_channels == controlled.out_channels


def test_zero_layers_learn_first_then_the_copy_and_never_the_base(config: Any) -> None:
    base = frozen(config)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    branch = branch_on(base)
    controlled, optimizer = beside(base, branch), torch.optim.SGD(branch.parameters(), lr=0.01)
    speaking, last = (set(part.parameters()) for part in zeros(branch))
    for step in range(3):
        optimizer.zero_grad()
        controlled(*hinted()).square().sum().backward()
        for name, p in branch.named_parameters():
            waits = 2 if "cond_embedding" in name or "hint_network" in name else 1
            waits = 0 if p in speaking else 1 if p in last else waits  # the hint speaks through the copy
            assert bool(p.grad.any()) == (step >= waits), (step, name)
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not torch.equal(controlled(*hinted()), base(*hinted()))


@pytest.mark.parametrize("kind", [ControlNet, T2IAdapter], ids=lambda kind: kind.kind)
def test_sums_strengths_and_their_absence(config: Any, kind: type) -> None:
    if kind is T2IAdapter and isinstance(config, DiT):
        with pytest.raises(ValueError, match="take a controlnet"):
            branch_on(frozen(config), kind=kind)
        return
    base = frozen(config)
    one, x = branch_on(base, learned=True, kind=kind), hinted()
    alone = beside(base, one)(*x)
    assert (alone - base(*x)).abs().max() > 1e-3
    halves = [branch_on(base, learned=True, kind=kind) for _ in range(2)]
    for half in halves:
        half.load_state_dict(one.state_dict())
        half.strength = 0.5
    both = beside(base, *halves)
    torch.testing.assert_close(both(*x), alone, rtol=0, atol=1e-12)
    halves[0].strength, halves[1].strength = 0.0, 1.0
    assert torch.equal(both(*x), alone)
    for off in (0.0, 0):  # as `load_pipeline(RUN, adapters=[(CONTROL, 0)])` gives it
        halves[0].strength = halves[1].strength = off
        assert torch.equal(both(*x), base(*x))
        assert torch.equal(both(*inputs()), base(*inputs()))  # nobody asks for a hint


def test_two_hints_are_read_by_name() -> None:
    base = frozen(NETWORKS["unet"])
    first, second = (branch_on(base, learned=True, seed=seed) for seed in (1, 2))
    second.hint = "image-2"
    x, level, cond = hinted()
    other = hinted(seed=6)[2].extras["image"]
    two = cond._replace(extras={"image": cond.extras["image"], "image-2": other})
    both = beside(base, first, second)(x, level, two)
    second.hint = "image"
    seen = [branch.residuals(base, x, level, cond._replace(extras={"image": image}))["kept"]
            for branch, image in ((first, cond.extras["image"]), (second, other))]
    wanted = base.predict(x, level, cond, kept=[a + b for a, b in zip(*seen, strict=True)])
    torch.testing.assert_close(both, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["unet", "dit", "dit-in-context"])
def test_guided_in_one_call_is_two_calls(kind: str) -> None:
    """The hint stands in both halves of a guided call, though the null has none."""
    base = frozen(NETWORKS[kind])
    denoiser = Denoiser(beside(base, branch_on(base, learned=True)), Diffusion(schedule=Flow(), prediction=Velocity()))
    x, _, cond = hinted()
    null, t = inputs()[2].select(slice(1))._replace(context=torch.zeros(1, 5, CONTEXT).double()), torch.tensor(0.7)
    guided = ClassifierFree(scale=3.0)(denoiser, cond, null)(x, t.double())
    told, absent = (denoiser(x, t.double(), each) for each in (cond, null.expand(3)._replace(extras=cond.extras)))
    torch.testing.assert_close(guided.x0, absent.x0 + 3 * (told.x0 - absent.x0), rtol=0, atol=1e-6)


def test_a_missing_or_ill_fitting_hint_is_refused() -> None:
    base = frozen(NETWORKS["unet"])
    controlled = beside(base, branch_on(base))
    with pytest.raises(ValueError, match="the hint 'image', and the condition has none"):
        controlled(*inputs())
    with pytest.raises(ValueError, match="'image', and the condition has 'edges'"):
        controlled(*hinted(name="edges"))
    with pytest.raises(ValueError, match=r"1x32x32 .* must be 3x32x32 .* adapter.hint_channels"):
        controlled(*hinted(channels=1))
    with pytest.raises(ValueError, match=r"3x32x32 .* must be 3x64x64 .* adapter.factor"):
        beside(base, ControlNet(factor=8, hint_channels=3).build(base, TEXT))(*hinted())
    for wrong in ({"factor": 6}, {"factor": -1}, {"hint_channels": -1}, {"blocks": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ControlNet(**wrong)
    with pytest.raises(ValueError, match="at most the backbone's 2, got 3"):
        branch_on(frozen(NETWORKS["dit"]), blocks=3)
    with pytest.raises(ValueError, match="takes residuals"):
        branch_on(nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks are those of a `dit`"):
        branch_on(base, blocks=1)
    branch = branch_on(base)
    both = beside(base, branch)
    with pytest.raises(ValueError, match="attached already"):
        branch.attach(both, TEXT)


def test_controlled_presents_its_base(config: Any) -> None:
    base = frozen(config)
    controlled = beside(base, branch_on(base), branch_on(base))
    assert isinstance(controlled, Controlled)
    assert controlled.base is base and len(controlled.branches) == 2
    for name in ("channels", "out_channels", "multiple", "shares", "config"):
        assert getattr(controlled, name) == getattr(base, name)
    assert branch_on(controlled).attach(controlled, TEXT)[0] is controlled
    x, level, cond = hinted()
    with pytest.raises(ValueError, match="2 channels"):
        controlled(x[:, :2], level, cond)


@pytest.mark.parametrize("kind", ["dit-deep", "dit-in-context"])
def test_a_dit_adds_to_the_outputs_of_the_blocks_it_copied(kind: str) -> None:
    """PixArt-delta, written out: y_i = block_i(y) + linear_i(copy_i(z)), z = copy_i(z) from the tokens and the hint."""
    base: Any = frozen(NETWORKS[kind])
    branch, (x, level, cond) = branch_on(base, learned=True), hinted()
    assert len(branch.blocks) == len(base.blocks) // 2
    tokens, given = base.begin(x, level, cond)
    (hint,) = branch.encode(cond.extras["image"])
    branched, prefix = tokens.clone(), tokens.shape[1] - 16
    branched[:, prefix:] += hint
    for i, block in enumerate(base.blocks):
        tokens = base.step(block, i, tokens, given)
        if i < len(branch.blocks):
            branched = base.step(branch.blocks[i], i, branched, given)
            tokens = tokens + branch.spoken[i](branched)
    seen: list[Tensor] = []
    base.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    beside(base, branch)(x, level, cond)
    torch.testing.assert_close(seen[0], tokens[:, prefix:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_branch_shares_attention_as_its_base(kind: str) -> None:
    """Targets take their sources' queries and keys in the copy as in the layers that it was copied from."""
    base = frozen(NETWORKS[kind])
    branch = branch_on(base, learned=True)
    x, level, cond = hinted()
    x, level, cond = torch.cat([x, x]), torch.cat([level, level]), Cond.cat([cond, cond])
    plain, shared = (branch.residuals(base, x, level, cond._replace(share=share)) for share in (
        Share(), Share(own="qk", cross="qk")))
    deep = branch.residuals(base, x, level, cond._replace(share=Share(own="qk", cross="qk", depth=0.99)))
    for name, maps in plain.items():
        assert all(torch.equal(a[::2], b[::2]) for a, b in zip(maps, shared[name], strict=True))
        assert not torch.equal(maps[-1][1::2], shared[name][-1][1::2])
        assert all(torch.equal(a, b) for a, b in zip(maps, deep[name], strict=True))  # all of a branch lies above
    places = [part.depth for part in branch.modules() if hasattr(part, "depth")]
    assert places == [part.depth for part in base.modules() if hasattr(part, "depth")][: len(places)]


# Intervals


@pytest.mark.parametrize("schedule", [cls() for cls in SCHEDULES], ids=repr)
def test_an_interval_is_that_of_a_guidance(schedule: NoiseSchedule) -> None:
    base = frozen(NETWORKS["unet"])
    branch: Any = branch_on(base)
    branch.strength = 0.5
    t = torch.linspace(schedule.t_min, 1, 41, dtype=torch.float64)
    low, high = 0.3, 0.8
    shares = place(t, schedule, "noise-share")
    branch.during(low, high, schedule)
    levels = schedule.noise_level(t).float()  # as on a device without float64
    wanted = (low <= shares) & (shares <= high)
    assert branch.weight(levels).tolist() == [0.5 if inside else 0.0 for inside in wanted]
    assert {branch.weight(level[None]) for level in levels[wanted]} == {0.5}
    assert {branch.weight(level[None]) for level in levels[~wanted]} == {0.0}
    ends = schedule.time(2 * torch.log((1 - torch.tensor([low, high]).double()) / torch.tensor([low, high]).double()))
    assert branch.weight(schedule.noise_level(ends).float()) == 0.5  # both ends are inside
    branch.during(0, 1, schedule)
    assert branch.levels is None
    with pytest.raises(ValueError, match="low <= high"):
        branch.during(0.5, 0.4, schedule)


def test_outside_of_its_interval_a_branch_is_not_called() -> None:
    base = frozen(NETWORKS["unet"])
    branch: Any = branch_on(base, learned=True)
    controlled, schedule = beside(base, branch), DDPMLinear()
    x, _, cond = hinted()
    t = torch.tensor([0.01, 0.3, 0.99], dtype=torch.float64)
    branch.during(0.2, 0.9, schedule)
    level = per_sample(schedule.noise_level(t), x)
    always = beside(base, branch_on(base, learned=True))(x, level, cond)
    mixed = controlled(x, level, cond)
    assert torch.equal(mixed[[0, 2]], base(x, level, cond)[[0, 2]])
    torch.testing.assert_close(mixed[1], always[1], rtol=0, atol=1e-12)
    assert torch.equal(controlled(x, level[:1].expand(3), inputs()[2]), base(x, level[:1].expand(3), cond))


# A hint is read once a picture


@pytest.mark.parametrize("kind", [ControlNet, T2IAdapter], ids=lambda kind: kind.kind)
def test_the_hint_is_encoded_once_a_picture(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    base = frozen(NETWORKS["unet"])
    branch: Any = branch_on(base, learned=True, kind=kind)
    calls, encode = [], type(branch).encode
    monkeypatch.setattr(type(branch), "encode", lambda self, hint: calls.append(1) or encode(self, hint))
    denoiser = Denoiser(beside(base, branch), Diffusion(schedule=Flow(), prediction=Velocity()))
    _, _, cond = hinted()
    noise = Noise.from_seeds([0, 1, 2])

    def draw() -> Tensor:
        guided = ClassifierFree(scale=2.0)(denoiser, cond, inputs()[2].select(slice(1)))
        return sample(DDIM(), guided, noise.normal((CHANNELS, 8, 8)).double(), Uniform()(4, Flow()), noise)

    with torch.no_grad():
        first = draw()
        assert len(calls) == 1
        cond.extras["image"].mul_(0.5)
        assert not torch.equal(draw(), first)
        parameter = next(p for name, p in branch.named_parameters() if "conv_in" in name)
        x, level, _ = hinted()
        for change in (lambda: cond.extras["image"].add_(0.1), lambda: parameter.mul_(2), lambda: swap(parameter)):
            before = branch.residuals(base, x, level, cond)
            change()
            after = branch.residuals(base, x, level, cond)
            assert all(not torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
        count = len(calls)
        branch.residuals(base, x, level, cond)
        assert len(calls) == count
    branch.residuals(base, x, level, cond)
    assert len(calls) == count + 1  # a graph is never taken from another call


@pytest.mark.parametrize("kind", [ControlNet, T2IAdapter], ids=lambda kind: kind.kind)
def test_a_step_of_any_optimizer_is_seen(kind: type) -> None:
    """A fused one changes parameters without a new version of them."""
    base = frozen(NETWORKS["unet"]).float()
    branch: Any = branch_on(base, learned=True, kind=kind)
    x, level, cond = hinted()
    x, cond = x.float(), cond.to("cpu", torch.float32)
    optimizer = torch.optim.AdamW(branch.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        branch.residuals(base, x, level, cond)
    beside(base, branch)(x, level, cond).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        for kept, fresh in zip(branch.features(x, cond), branch.encode(cond.extras["image"]), strict=True):
            assert torch.equal(kept, fresh)


@pytest.mark.parametrize("context", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_bfloat16_read_a_hint_once_too(context: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base = frozen(NETWORKS["unet"])
    branch: Any = branch_on(base, learned=True)
    controlled, calls, encode = beside(base, branch).bfloat16(), [], type(branch).encode
    monkeypatch.setattr(type(branch), "encode", lambda self, hint: calls.append(hint.dtype) or encode(self, hint))
    x, level, cond = hinted()
    hint = cond.extras["image"].float()
    cond = cond.to("cpu", context)._replace(extras={"image": hint})
    with torch.no_grad():
        answers = [controlled(x.to(context), level, cond) for _ in range(3)]
    assert calls == [torch.bfloat16]
    assert all(torch.equal(answer, answers[0]) and answer.dtype == context for answer in answers)


def swap(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 3  # as averaged weights take the place of others


@pytest.mark.parametrize("kind", [ControlNet, T2IAdapter], ids=lambda kind: kind.kind)
def test_the_data_settle_what_a_hint_is(kind: type) -> None:
    assert kind().settled(4, 1) == kind(factor=4, hint_channels=1) == kind(factor=4).settled(4, 1)
    with pytest.raises(ValueError, match="there are none beside"):
        kind().settled(4, 0)
    with pytest.raises(ValueError, match=r"adapter.factor is 8, that of these latents 4"):
        kind(factor=8).settled(4, 1)
    with pytest.raises(ValueError, match="set both"):
        kind(factor=8).build(frozen(NETWORKS["unet"]), TEXT)
