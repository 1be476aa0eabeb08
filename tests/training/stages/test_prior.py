"""Prior preservation: both losses are those that stand alone, and what was drawn is drawn once and is the run's."""

from __future__ import annotations

import dataclasses
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch
from denoiser_steps import gradients, make  # noqa: F401
from packs import retold
from stopped import same, stop_at
from torch import Tensor

from ldm.adapters.controlnet import ControlNet
from ldm.adapters.low_rank import LoRA
from ldm.text import Label
from training.data.order import Slot
from training.errors import UserError
from training.models.assembly import load_pipeline
from training.settings.decoding import load
from training.settings.sections import Prior
from training.stages.captioned import Adapted
from training.stages.prior import Drawn, keep_drawn, load_drawn, refuse_prior, tell_captions
from training.tensors import load_tensors, save_tensors

TEXTS = ["a red circle at the top", "a blue square in the centre", "a pink cross at the left"]
PRIOR = ["--prior.weight", "0.5", "--prior.count", "5", "--prior.captions", json.dumps(TEXTS), "--sample.steps", "2"]
ANSWERS = [*PRIOR, "--prior.target", "answers"]
Make = Callable[..., tuple[Any, Any]]


def drawn(stage: Any, count: int = 5) -> Drawn:
    """As if the base had drawn held-out latents."""
    batch = next(stage.held_out.chunks(range(count), count))
    return Drawn(batch.data, [TEXTS[i % 3] for i in range(count)], [], "0")


def passed(stage: Any, slots: list[int], share: float = 1.0, step: int = 3) -> dict[str, Tensor]:
    batch = stage.dataset.__getitems__([Slot(slot % len(stage.dataset), 0, slot) for slot in slots])
    values: dict[str, Tensor] = stage.backward(batch, step, share)
    return values


def taken(stage: Any) -> Tensor:
    """The gradients, which are forgotten."""
    found = torch.cat([gradient.flatten().clone() for gradient in gradients(stage.network)])
    stage.network.zero_grad()
    return found


def test_loss_and_gradient_are_the_sum_of_both(make: Make) -> None:  # noqa: F811
    stage, _ = make(prior__weight="0.3", conditioning__dropout="0.5")
    slots = list(range(24, 32))
    alone = passed(stage, slots)
    assert set(alone) == {"loss"}
    own = taken(stage)
    prior = drawn(stage)
    given = stage.drawn(prior.batch(torch.tensor(slots)), 3, "prior")
    loss = stage.objective.losses(stage.forward, *given).total.mean()
    loss.backward()
    theirs = taken(stage)
    stage.prior = prior
    both = passed(stage, slots)
    torch.testing.assert_close(both["loss"], alone["loss"] + 0.3 * loss.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(both["loss_prior"], loss.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(taken(stage), own + 0.3 * theirs, rtol=0, atol=1e-6)
    assert theirs.norm() > 1e-3


def stir(module: torch.nn.Module) -> None:
    """Add noise to all weights."""
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=noise))


@pytest.fixture
def adapted(make: Make) -> Any:  # noqa: F811
    """A stage whose adapter has learned something, held to what its base answers."""
    stage, _ = make(prior__weight="0.3", prior__target="answers")
    stir(stage.network.backbone)  # whose output layers are zero at the start
    adapter = LoRA(rank=2, targets=("*",), text=("*",)).build(stage.network.backbone.requires_grad_(False), stage.text)
    adapter.attach(stage.network.backbone, stage.text.requires_grad_(False))
    stage.adapter, stage.forward = adapter, Adapted(adapter, stage.network)
    stage.network, stage.prior = stage.forward, drawn(stage)
    return stage


def test_held_to_the_answers_of_the_base(adapted: Any) -> None:
    """Nothing at the start, and then the distance of both answers to the same noisy latents; the rest as without."""
    slots = list(range(24, 32))
    assert passed(adapted, slots)["loss_prior"] < 1e-10
    assert taken(adapted).norm() > 1e-3
    stir(adapted.adapter)
    latents, cond, draw = adapted.drawn(adapted.prior.batch(torch.tensor(slots)), 3, "prior")
    x_t = adapted.objective.diffusion.perturb(latents, draw.eps, draw.t)
    level = adapted.objective.diffusion.condition(x_t, draw.t)[1].float()
    with torch.no_grad():
        mine = adapted.network(x_t, level, cond)
        adapted.adapter.strength = 0.0
        theirs = adapted.network(x_t, level, cond)
    adapted.adapter.strength = 1.0
    expected = (mine - theirs).square().mean()
    found = passed(adapted, slots)
    torch.testing.assert_close(found["loss_prior"], expected, rtol=1e-4, atol=0)
    held = taken(adapted)
    prior, adapted.prior = adapted.prior, None
    own = passed(adapted, slots)["loss"]
    torch.testing.assert_close(found["loss"], own + 0.3 * expected, rtol=1e-5, atol=0)
    assert expected > 1e-3 and not torch.allclose(held, taken(adapted), atol=1e-4)
    assert adapted.adapter.strength == 1 and prior


def test_times_lie_where_the_losses_of_the_pictures_given_do(make: Make) -> None:  # noqa: F811
    stage, _ = make(prior__weight="1", times__kind="loss-aware")
    stage.prior = drawn(stage)
    passed(stage, list(range(8)))
    assert [len(part) for part in stage.losses[-1]] == [8, 8]


def test_prior_samples_have_noise_and_dropout_of_their_own(make: Make) -> None:  # noqa: F811
    stage, _ = make(prior__weight="1", conditioning__dropout="0.5")
    batch = drawn(stage).batch(torch.arange(8))
    own, theirs = stage.drawn(batch, 3), stage.drawn(batch, 3, "prior")
    assert not (own.draw.t == theirs.draw.t).any()
    assert own.cond.texts != theirs.cond.texts
    assert not torch.equal(own.draw.eps, theirs.draw.eps)


def test_a_split_batch_gives_the_same_gradient(make: Make) -> None:  # noqa: F811
    stage, _ = make(prior__weight="1", train__batch_size="8")
    stage.prior = drawn(stage)
    passed(stage, list(range(8, 16)))
    whole = taken(stage)
    for part in (range(8, 12), range(12, 16)):
        passed(stage, list(part), 0.5)
    torch.testing.assert_close(taken(stage), whole, rtol=0, atol=1e-6)


def test_each_slot_has_its_sample_in_turn() -> None:
    prior = Drawn(torch.arange(5.0).view(5, 1, 1, 1), list("abcde"), [], "0")
    assert prior.batch(torch.arange(8, 14)).data.flatten().tolist() == [3, 4, 0, 1, 2, 3]
    assert prior.batch(torch.tensor([13, 8])).captions == ["d", "d"]
    embedded = prior._replace(text=[{"context": torch.full((1 + i, 2), float(i))} for i in range(5)])
    cond = embedded.batch(torch.tensor([2, 6])).text
    assert cond is not None and cond.mask.sum(1).tolist() == [3, 2]


def test_captions_are_drawn_in_turn() -> None:
    assert Prior(count=5, captions=("a", "b")).texts == ["a", "b", "a", "b", "a"]
    assert Prior(count=2, captions="a dog, sitting").texts == ["a dog, sitting"] * 2
    assert Prior().texts == Prior(captions="").texts == []


def test_captions_that_labels_are_not_are_refused_before_anything_is_drawn() -> None:
    text = Label(width=4).build(json.dumps({"classes": ["dog", "cat"]}))
    for prior in (Prior(captions="cow"), Prior(weight=1, captions="cat")):
        assert not tell_captions(prior, text).report()
    with pytest.raises(UserError, match="'cow' is not one of the 2 captions trained on"):
        tell_captions(Prior(weight=1, captions=("dog", "cow")), text)


def train(latents: Path, base: Path, run: Path, *words: object) -> int:
    given = ("--latents", latents, "--init-from", base, "--output", run)
    return tiny.call("train_denoiser", *given, *tiny.DENOISER, *words)


@pytest.fixture(scope="module")
def straight(latents: Path, denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with prior pictures, not interrupted."""
    run = tmp_path_factory.mktemp("prior") / "run"
    assert train(latents, denoiser, run, *PRIOR) == 0
    return run


def test_what_is_drawn_is_kept_with_its_hash(straight: Path) -> None:
    prior, record = load_drawn(straight / "prior"), json.loads((straight / "prior" / "prior.json").read_text())
    assert prior.captions == record["captions"] == [TEXTS[i % 3] for i in range(5)]
    assert prior.hash == record["hash"]
    assert (straight / "prior" / "prior.png").is_file()
    mean, logvar = prior.moments.chunk(2, dim=1)
    assert logvar.unique().tolist() == [-30.0]  # so that training's draw of the posterior is the latent itself
    assert len({tuple(row.flatten().tolist()) for row in mean}) == 5
    rows = tiny.rows(straight)
    assert all(row["loss_prior"] > 0 for row in rows if "loss" in row)


def test_the_base_draws_them_alone_and_stays_as_it_is(latents: Path, denoiser: Path, tmp_path: Path) -> None:
    """Bit for bit as without an adapter, also of captions with the word that it is to learn."""
    before = {file: file.read_bytes() for file in denoiser.rglob("*") if file.is_file()}
    told = retold(latents, tmp_path / "latents", lambda caption: f"{caption} blicket")
    words = ("--base", denoiser, "--latents", told, "--config", "lora", "--output", tmp_path / "run", *tiny.SHORT)
    new = ("--adapter.words", '["blicket"]', "--prior.captions", "a blicket circle at the top")
    assert tiny.call("train_denoiser", *words, *PRIOR, *new) == 0
    assert before == {file: file.read_bytes() for file in denoiser.rglob("*") if file.is_file()}
    replaced = json.loads((tmp_path / "run" / "run.json").read_text())["ledger"]["replaced"]
    assert [entry["first"] for entry in replaced.values()] == [["blicket"]]  # of the prior captions alone
    pipeline = load_pipeline(denoiser, "cpu")
    pipeline = dataclasses.replace(pipeline, sampling=dataclasses.replace(pipeline.sampling, steps=2))
    prior = Prior(weight=1.0, count=5, captions=new[-1])
    keep_drawn(tmp_path / "alone", prior, pipeline, 0, embedded=False, begun=False)
    assert load_drawn(tmp_path / "alone").hash == load_drawn(tmp_path / "run" / "prior").hash


def test_other_seeds_draw_other_pictures(denoiser: Path, tmp_path: Path) -> None:
    """And the same seed the same ones; no picture of one seed is one of another."""
    pipeline = load_pipeline(denoiser, "cpu")
    pipeline = dataclasses.replace(pipeline, sampling=dataclasses.replace(pipeline.sampling, steps=2))
    drawn = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        keep_drawn(tmp_path / name, Prior(weight=1.0, count=3, captions=TEXTS[0]), pipeline, seed, embedded=False,
                   begun=False)  # fmt: skip
        drawn.append(load_drawn(tmp_path / name).moments)
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(row.flatten().tolist()) for row in torch.cat([drawn[0], drawn[2]])}) == 6


@pytest.mark.timeout(600)
def test_two_processes_train_an_adapter_as_one(latents: Path, denoiser: Path, tmp_path: Path) -> None:
    """DoRA with another rate for B and a new word, held to the answers of its base."""
    base = Path(shutil.copytree(denoiser, tmp_path / "base"))
    tiny.shake(base / "final")
    told = retold(latents, tmp_path / "latents", lambda caption: f"{caption} blicket")
    words = ["--base", base, "--latents", told, "--config", "dora", *tiny.SHORT, *ANSWERS, "--train.ema", "0.5"]
    words += ["--adapter.ratio", "16", "--adapter.words", "blicket"]
    assert tiny.call("train_denoiser", *words, "--output", tmp_path / "one") == 0
    codes = ranks.start(2, tmp_path, "train_denoiser", *words, "--output", tmp_path / "two")
    assert codes == [0, 0], ranks.said(tmp_path)
    assert load_drawn(tmp_path / "one" / "prior").hash == load_drawn(tmp_path / "two" / "prior").hash
    for ours, theirs in zip(tiny.rows(tmp_path / "one"), tiny.rows(tmp_path / "two"), strict=True):
        for name in ("loss", "loss_prior"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-5, abs=1e-9)
    ranks.same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.timeout(600)
def test_two_processes_train_as_one(straight: Path, latents: Path, denoiser: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--init-from", denoiser, "--output", tmp_path / "run", *tiny.DENOISER, *PRIOR)
    assert ranks.start(2, tmp_path, "train_denoiser", *words) == [0, 0], ranks.said(tmp_path)
    assert load_drawn(tmp_path / "run" / "prior").hash == load_drawn(straight / "prior").hash
    for ours, theirs in zip(tiny.rows(tmp_path / "run"), tiny.rows(straight), strict=True):
        for name in ("loss", "loss_prior"):
            assert ours.get(name, 0) == pytest.approx(theirs.get(name, 0), rel=1e-5)
    before = load_tensors(straight / "final" / "model.safetensors")
    for name, weight in load_tensors(tmp_path / "run" / "final" / "model.safetensors").items():
        torch.testing.assert_close(weight, before[name], rtol=1e-3, atol=1e-4)


def test_what_is_shown_besides_captions_is_refused() -> None:
    """The base would have to be shown it too: what the network reads, and no more."""
    given = {"prior.weight": "1", "prior.captions": "a dog"}
    config: Any = load("denoiser", "smoke", given)
    refuse_prior(config, Namespace(init_from="run"), ["image"])
    control = dataclasses.replace(config, adapter=ControlNet())
    masked: Any = load("denoiser", "smoke", given | {"image.kind": "masked"})
    for name, reading, beside in (("image", control, ["image"]), ("image", masked, []), ("depth", config, ["depth"])):
        with pytest.raises(UserError, match=f"prior pictures have no {name}, which the denoiser is shown"):
            refuse_prior(reading, Namespace(init_from="run"), beside)


@pytest.mark.parametrize("learns", [True, False])
def test_an_image_that_nothing_reads_may_lie_beside(make: Make, learns: bool) -> None:  # noqa: F811
    """As of latents with hints, on which a control was trained: the step is the one without."""
    steps = []
    for beside in ({}, {"image": torch.ones(8, 1, 4, 4)}):
        stage, _ = make(prior__weight="1")
        stage.prior, stage.text.trainable = drawn(stage), learns
        batch = stage.dataset.__getitems__([Slot(slot, 0, slot) for slot in range(8)])
        steps.append(stage.backward(batch._replace(extras=beside), 3, 1.0)["loss"])
    assert torch.equal(*steps)


def test_answers_teach_no_variance() -> None:
    given = {"prior.weight": "1", "prior.captions": "a dog", "prior.target": "answers", "schedule.kind": "ddpm-linear",
             "prediction.kind": "eps", "backbone.learned_variance": "true"}
    config: Any = load("denoiser", "smoke", given)
    with pytest.raises(UserError, match="this base has a learned one") as refused:
        refuse_prior(config, Namespace(base="run", init_from=None), [])
    refuse_prior(load("denoiser", "smoke", given | {"prior.target": "pictures"}), Namespace(base="run"), [])  # type: ignore[arg-type]
    assert "--prior.target pictures" in str(refused.value.hint)


def test_a_stopped_run_goes_on_with_the_same_pictures(
    straight: Path, latents: Path, denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    stop_at(monkeypatch, 2)
    assert train(latents, denoiser, run, *PRIOR) == 143
    monkeypatch.undo()
    monkeypatch.setattr("training.stages.prior._draw", None)  # nothing is drawn again
    assert train(latents, denoiser, run, *PRIOR, "--resume", "auto") == 0
    same(run, straight)
    assert load_drawn(run / "prior").hash == load_drawn(straight / "prior").hash


def test_a_stopped_dreambooth_with_a_new_word_goes_on_byte_for_byte(
    latents: Path, denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = retold(latents, tmp_path / "told", lambda caption: f"{caption} blicket")
    words = ["train_denoiser", "--base", denoiser, "--latents", told, "--config", "dreambooth", *tiny.SHORT, *PRIOR]
    words += ["--adapter.rank", 2, "--adapter.words", '["blicket"]', "--output"]
    assert tiny.call(*words, tmp_path / "straight") == 0
    stop_at(monkeypatch, 3)
    assert tiny.call(*words, tmp_path / "run") == 143
    monkeypatch.undo()
    assert tiny.call(*words, tmp_path / "run", "--resume", "auto") == 0
    same(tmp_path / "run", tmp_path / "straight")


def test_weight_0_is_plain_training(latents: Path, denoiser: Path, tmp_path: Path) -> None:
    plain, zero = tmp_path / "plain", tmp_path / "zero"
    assert train(latents, denoiser, plain, "--sample.steps", "2") == 0
    assert train(latents, denoiser, zero, *PRIOR, "--prior.weight", "0") == 0
    assert (plain / "final" / "model.safetensors").read_bytes() == (zero / "final" / "model.safetensors").read_bytes()
    assert not (zero / "prior").exists()


@pytest.mark.parametrize("damage", ["changed", "others", "gone"])
def test_other_pictures_are_refused(
    damage: str, straight: Path, latents: Path, denoiser: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "final")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "stopped", "state": "stopped"}))
    file = run / "prior" / "moments.safetensors"
    if damage == "gone":
        shutil.rmtree(run / "prior")
    else:
        save_tensors(file, {name: value + 1 for name, value in load_tensors(file).items()})
    if damage == "others":  # whole in themselves
        from training.tensors import content_hash

        told = json.loads((run / "prior" / "prior.json").read_text())
        (run / "prior" / "prior.json").write_text(json.dumps({**told, "hash": content_hash(load_tensors(file))}))
    said = "are gone" if damage == "gone" else "are not those that this run was begun with"
    with pytest.raises(UserError, match=said) as refused:
        train(latents, denoiser, run, *PRIOR, "--max-steps", "8", "--resume", "auto")
    assert refused.value.code == 4


@pytest.mark.parametrize(("words", "said"), [
    (ANSWERS, "what --init-from trains is the base itself"),
    (["--prior.weight", "1"], "prior.captions is empty"),
    (["--prior.weight", "-1"], "weight: must be >= 0"),
    (["--prior.weight", "1", "--prior.captions", "a dog", "--prior.count", "0"], "count: must be > 0"),
])
def test_settings_that_are_refused(
    words: list[str], said: str, latents: Path, denoiser: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(latents, denoiser, tmp_path / "run", *words)


def test_without_a_base_nothing_can_draw(latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is no base that could draw"):
        tiny.call("train_denoiser", "--latents", latents, "--output", run, *tiny.DENOISER, *PRIOR)
