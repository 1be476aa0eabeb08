"""Plans of small trainings: what is predicted is what is measured, what is told is what the training then does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from torch import nn

from training.planning.disk import of_latents, of_pictures
from training.planning.memory import Observed, Seen
from training.planning.plan import Planning, flags
from training.planning.trial import largest
from training.planning.weights import counts
from training.shards.index import read_index
from training.shards.reading import ShardSet

UNET = ["--backbone.kind", "unet", "--backbone.channels", "16,32", "--backbone.attention", "0,1"]
UNET += ["--backbone.blocks", "1", "--backbone.groups", "8"]
AUTOENCODER = ["--config", "smoke", "--model.channels", "8,8,8", "--model.groups", "4", "--discriminator.width", "4"]
DIT = ["--config", "smoke", "--backbone.width", "64", "--backbone.depth", "3", "--text.width", "16"]
SHORT = ["--device", "cpu", "--trial-steps", "4", "--max-steps", "50"]


def planned(folder: Path, *words: object) -> dict[str, Any]:
    """The plan that `plan.py WORDS` writes."""
    target = folder / "plan.json"
    assert tiny.call("plan", *words, "--output", target, "--overwrite") == 0
    return dict(json.loads(target.read_text()))


def near(facts: dict[str, Any]) -> float:
    """What was predicted of what was measured."""
    return float(facts["memory"]["alone"] / facts["memory"]["measured"])


@pytest.fixture(scope="module")
def dit(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ("--latents", latents, *DIT, *SHORT, "--batch-size", 16, "--price-per-hour", 3)
    return planned(tmp_path_factory.mktemp("plan"), *words)


@pytest.fixture(scope="module")
def autoencoder_plan(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ("--data", shapes, *AUTOENCODER, *SHORT, "--batch-size", 8, "--loss.adversarial_start", 40)
    words += ("--loss.r1", 0.1, "--loss.r1_every", 4)
    return planned(tmp_path_factory.mktemp("plan"), *words)


def test_a_dit_takes_what_is_predicted(dit: dict[str, Any]) -> None:
    assert 0.9 < near(dit) < 1.1


def test_a_unet_takes_what_is_predicted(latents: Path, tmp_path: Path) -> None:
    """In two passes a step, the gradients of the first there in the second: all but those of a vector nobody reads."""
    words = ("--latents", latents, "--config", "smoke", *UNET, "--text.width", "16", *SHORT, "--batch-size", 12)
    facts = planned(tmp_path, *words, "--micro-batch-size", 6, "--trial-steps", 2)
    assert 0.9 < near(facts) < 1.1 and facts["accumulation"] == 2
    assert 0.99 < facts["memory"]["parts"]["gradients"] / (4 * facts["parameters"]["trainable"]) <= 1
    assert 6 in [row["micro_batch"] for row in facts["choices"]]


def test_a_step_that_is_highest_in_muon_takes_what_is_predicted(shapes: Path, tmp_path: Path) -> None:
    """At the two small micro-batches it is Muon's products that are highest, at the whole one the activations."""
    model = ("--model.channels", "16,32,64", "--model.groups", "4", "--discriminator.width", "4")
    words = ("--optimizer.matrices", "muon", "--batch-size", 16, "--trial-steps", 1, "--max-steps", 50)
    facts = planned(tmp_path, "--data", shapes, "--config", "smoke", *model, *words, "--device", "cpu")
    assert 0.9 < near(facts) < 1.1


def test_small_steps_are_of_the_same_operations() -> None:
    """Layers may choose theirs by the size of a batch; what a process never has of one is not tried, nor are more than
    16."""
    for last_change, share, taken in ((2, 64, (2, 4)), (4, 64, (4, 8)), (4, 7, (2, 4)), (32, 64, (8, 16))):
        trial = SimpleNamespace(observe=lambda micro, _, m=last_change: Seen(micro, [0] * min(micro, m), [], 0))
        planning = object.__new__(Planning)
        planning.share = share
        small, large = planning.alike(trial, 2, 1)  # type: ignore[arg-type]
        assert (small.micro, large.micro) == taken


def test_memory_is_tried_on_the_largest_bucket_that_fills_a_batch() -> None:
    """As often as a trial asks, in the order of its samples."""
    buckets = {(8, 24): (range(3), range(14, 16)), (16, 16): (range(3, 5), range(9, 12)), (24, 8): (range(5, 9),)}
    stage = SimpleNamespace(dataset=SimpleNamespace(shards=SimpleNamespace(buckets=buckets)))
    order = largest(stage, SimpleNamespace(batch_size=4, seed=0))  # type: ignore[arg-type]
    assert [slot.index for slot in order.at(7, 0, 7)] == [3, 4, 9, 10, 11, 3, 4]
    assert [slot.index for slot in order.at(8, 4, 2)] == [11, 3]
    assert len({slot.slot for slot in order.at(7, 0, 7)}) == 7
    buckets[8, 40] = (range(12, 14),)  # too few
    again = largest(stage, SimpleNamespace(batch_size=4, seed=0))  # type: ignore[arg-type]
    assert again.at(0, 0, 1) == order.at(0, 0, 1)


def test_only_what_the_training_holds_is_counted() -> None:
    """Each parameter once, by the first part that has it; another network of the process is not of it."""
    other, learns, called = nn.Linear(4, 4), nn.Linear(2, 3), nn.Linear(5, 5)
    stage = SimpleNamespace(networks={"net": nn.Sequential(learns)}, frozen=[called, learns], model=learns)
    told = counts(stage, {"text": called})  # type: ignore[arg-type]
    assert (told["trainable"], told["frozen"], other.weight.numel()) == (9, 30, 16)
    assert told["parts"] == {"net.0": [9, 0], "text": [0, 30]}
    assert counts(stage, {})["parts"] == {"net.0": [9, 0], "others": [0, 30]}  # type: ignore[arg-type]


def test_an_autoencoder_takes_what_is_predicted(autoencoder_plan: dict[str, Any]) -> None:
    """At the last step that the trial may begin at, of those in which the critic is held back."""
    assert 0.9 < near(autoencoder_plan) < 1.1 and autoencoder_plan["tried_at_step"] == 44


def test_a_choice_takes_what_is_predicted_where_it_is_made(dit: dict[str, Any], latents: Path, tmp_path: Path) -> None:
    """With half the micro-batch and checkpointing, of which that plan has tried neither."""
    (row,) = [row for row in dit["choices"] if row["micro_batch"] == 8 and row["checkpointing"]]
    words = ("--micro-batch-size", 8, "--backbone.gradient_checkpointing", "true")
    facts = planned(tmp_path, "--latents", latents, *DIT, *SHORT, "--batch-size", 16, *words)
    assert 0.9 < row["bytes"] / facts["memory"]["measured"] < 1.1
    plain = {row["micro_batch"]: row["bytes"] for row in dit["choices"] if not row["checkpointing"]}
    saving = {row["micro_batch"]: row["bytes"] for row in dit["choices"] if row["checkpointing"]}
    assert list(plain) == list(saving) == [1, 2, 4, 8, 16] and all(saving[m] < plain[m] for m in (4, 8, 16))


def test_the_parts_are_those_of_the_run(dit: dict[str, Any], autoencoder_plan: dict[str, Any]) -> None:
    for facts in (dit, autoencoder_plan):
        parts, learn = facts["memory"]["parts"], facts["parameters"]["trainable"]
        assert parts["weights"] == 4 * learn and 8 * learn < parts["optimizer"] < 8.1 * learn
        assert sum(parts.values()) == facts["memory"]["predicted"] == facts["memory"]["alone"]
        assert min(parts.values()) >= 0 and parts["rest"] < 0.05 * facts["memory"]["predicted"]
        assert parts["frozen weights"] == 4 * facts["parameters"]["frozen"]
        rows = facts["parameters"]["parts"].values()
        assert [sum(column) for column in zip(*rows, strict=True)] == [learn, facts["parameters"]["frozen"]]
    assert set(dit["parameters"]["parts"]) == {"denoiser.backbone", "denoiser.text", "autoencoder"}
    critic = autoencoder_plan["parameters"]["parts"]["discriminator.main"][0]
    averaged = autoencoder_plan["parameters"]["trainable"] - critic
    assert autoencoder_plan["memory"]["parts"]["averages"] == 4 * averaged == 4 * autoencoder_plan["run"]["parameters"]


def test_hours_and_price_follow_from_a_step(dit: dict[str, Any]) -> None:
    speed = dit["speed"]
    assert (speed["steps"], speed["timed"]) == (4, 2)
    assert speed["images_per_second"] == pytest.approx(16 / speed["step_seconds"])
    assert speed["hours"] == pytest.approx(50 * speed["step_seconds"] / 3600)
    assert speed["price"] == pytest.approx(3 * speed["hours"])
    assert dit["run"]["epochs"] == pytest.approx(50 * 16 / 96)


def test_flops_are_of_the_whole_step(dit: dict[str, Any], autoencoder_plan: dict[str, Any]) -> None:
    """A multiply-add is 2, and backward twice as much as forward: 6 a weight and token at least, in the blocks."""
    tokens, weights = 16, dit["parameters"]["parts"]["denoiser.backbone"][0]
    assert 6 * tokens * weights * 0.4 < dit["flops"]["each"] < 6 * tokens * weights * 2
    assert dit["flops"]["training"] == dit["flops"]["each"] * 16 * 50
    assert autoencoder_plan["flops"]["each"] > 0


def test_processes_are_assumed_and_share_the_batch(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of a launcher, too, of which the first alone speaks; each holds the messages of gradients besides."""
    words = ("--latents", latents, *DIT, "--device", "cpu", "--trial-steps", 2, "--batch-size", 16)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert tiny.call("plan", *words) == 0 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    facts = planned(tmp_path, *words, "--price-per-hour", 3)
    assert (facts["processes"], facts["batch"], facts["micro_batch"]) == (2, 16, 8)
    assert facts["speed"]["price"] == pytest.approx(2 * 3 * facts["speed"]["hours"])
    exchanged = facts["memory"]["parts"]["several processes"]
    assert exchanged == facts["memory"]["parts"]["weights"]
    assert facts["memory"]["predicted"] == facts["memory"]["alone"] + exchanged
    said = capsys.readouterr().out
    assert "2 processes are assumed" in said and "if all 2 processes are as fast as this one" in said


def test_what_is_larger_than_the_machine_is_not_tried(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.planning.plan.machine_memory", lambda _: 1 << 20)
    monkeypatch.setattr(Planning, "speed", None)
    facts = planned(tmp_path, "--latents", latents, *DIT, *SHORT, "--batch-size", 16)
    assert facts["flags"] == [] and not any(row["fits"] for row in facts["choices"])
    said = capsys.readouterr().out
    assert "not tried: this machine has 0.001 GiB" in said and "none fits" in said and "no trial was made" in said
    assert facts["speed"] is None and "measured" not in facts["memory"]


def test_the_flags_are_the_largest_that_fits_and_checkpointing_only_where_it_must() -> None:
    def rows(plain: str, saving: str) -> list[dict[str, Any]]:
        fits = [(name, on == "saving") for on, names in (("plain", plain), ("saving", saving)) for name in names]
        every = [("1", False), ("2", False), ("1", True), ("2", True)]
        return [{"micro_batch": int(n), "checkpointing": on, "fits": (n, on) in fits} for n, on in every]

    assert flags(rows("12", "12"), "model", own=False) == ["--micro-batch-size", "2"]
    assert flags(rows("1", "12"), "model", own=False) == ["--micro-batch-size", "1"]
    switch = "--backbone.gradient_checkpointing"
    assert flags(rows("12", "12"), "backbone", own=True) == ["--micro-batch-size", "2", switch, "false"]
    assert flags(rows("", "1"), "backbone", own=False) == ["--micro-batch-size", "1", switch, "true"]
    assert flags(rows("", "12"), "backbone", own=True) == ["--micro-batch-size", "2"]
    assert flags(rows("", ""), "backbone", own=False) == []


def test_a_tenth_must_be_to_spare() -> None:
    """A choice of 1,000 and 10 a sample: 1,080 bytes with 8."""
    steps = Seen(2, [20], [], 20), Seen(4, [40], [], 40)
    planning = object.__new__(Planning)
    planning.share = planning.micro = 8
    memory = {"predicted": 0, "alone": 0, "given": 1188}
    for given, fitting in ((1188, [1, 2, 4, 8]), (1187, [1, 2, 4])):
        rows = planning.choices([Observed(False, steps, steps, 1000)], {**memory, "given": given}, 1)
        assert [row["micro_batch"] for row in rows if row["fits"]] == fitting


def test_latents_take_what_was_predicted_of_their_pictures(latents: Path, shapes: Path, autoencoder: Path) -> None:
    from training.data.images import Images
    from training.models.autoencoders import load_autoencoder

    model = load_autoencoder(autoencoder)
    ahead = of_pictures(shapes, Images(ShardSet(shapes)), model, flip=True)
    there = of_latents(latents, ShardSet(latents))
    infos = read_index(latents)[1]
    assert there["bytes"] == sum(info.bytes for info in infos) and there["samples"] == ahead["samples"] == 115
    assert there["latents_each"] == ahead["latents_each"] + 2 * 128  # the heads of two npy files
    assert there["text_each"] < ahead["text_each"]
    assert 0.7 < ahead["bytes"] / there["bytes"] < 1.3  # of latents as small as these, most is heads of files


def test_nothing_is_left_behind(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(shapes.rglob("*"))
    words = ("--data", shapes, *AUTOENCODER, *SHORT, "--batch-size", 8, "--trial-steps", 2)
    assert tiny.call("plan", *words) == 0
    assert list(tmp_path.iterdir()) == [] and sorted(shapes.rglob("*")) == before


def test_what_is_refused_goes_as_the_hint_says(shapes: Path, latents: Path, tmp_path: Path) -> None:
    both = tiny.refused("plan", "--data", shapes, "--latents", latents)
    assert both.what == "--data and --latents: a plan is of one stage" and both.code == 2
    assert tiny.refused("plan", "--config", "smoke").what == "--latents is missing"
    words = ("--latents", latents, *DIT, "--device", "cpu")
    resumed = tiny.refused("plan", *words, "--resume", "auto", "--report-to", "wandb")
    assert resumed.what == "--resume, --report-to: a plan is of a whole run, and begins none"
    folder = tiny.refused("plan", *words, "--output", "runs/x")
    assert (folder.what, folder.hint) == ("--output runs/x: is the plan's file here", "give --output FILE.json")
    (tmp_path / "plan.json").touch()
    there = tiny.refused("plan", *words, "--output", tmp_path / "plan.json")
    assert there.what.endswith("plan.json is there") and there.hint == "use --overwrite, or another --output"
    assert tiny.call("plan", *words, "--output", tmp_path / "plan.json", "--overwrite", "--print-config") == 0
    for flag in ("--memory", "--price-per-hour"):
        assert tiny.refused("plan", *words, flag, "0").what == f"{flag}: must be above 0 (got 0)"
    assert tiny.refused("plan", *words, "--processes", "-1").what == "--processes: must be at least 0 (got -1)"


def test_what_has_nothing_to_train_has_no_plan(grey: Path) -> None:
    refused = tiny.refused("plan", "--config", "identity", "--data", grey / "data", "--device", "cpu")
    assert refused.what == "config identity has nothing to train: a run of it measures and exports"
