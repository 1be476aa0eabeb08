"""evaluate --classify: the pictures that are asked about, the numbers that are told, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from autoencoder.images import to_unit
from ldm.diffusion_classifier import DiffusionClassifier, posterior
from ldm.noise import Noise
from training.data.images import Images
from training.data.order import Slot
from training.errors import UserError
from training.measuring.classification import judged, table
from training.models.assembly import load_pipeline
from training.models.judge import caption
from training.shards.reading import ShardSet

Report = Callable[..., dict[str, object]]


@pytest.fixture(scope="module")
def hearing(denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that listens to captions."""
    run = tmp_path_factory.mktemp("classification") / "run"
    shutil.copytree(denoiser, run)
    tiny.shake(run / "final")
    return run


@pytest.fixture
def file(shapes: Path, tmp_path: Path) -> Path:
    """The captions of the first four held-out pictures, and one of none."""
    images = Images(ShardSet(shapes, "val"))
    lines = ["# of pictures", *(caption(images, i) for i in range(4)), "a red circle at the top on a grey background"]
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    return tmp_path / "captions.txt"


@pytest.fixture
def report(hearing: Path, shapes: Path, file: Path, tmp_path: Path) -> Report:
    def called(*words: object) -> dict[str, object]:
        given = ("--model", hearing, "--data", shapes, "--classify", file, "--draws", 4, "--device", "cpu")
        assert tiny.call("evaluate", *given, "--overwrite", "--output", tmp_path / "out.json", *words) == 0
        return dict(json.loads((tmp_path / "out.json").read_text()))

    return called


def test_the_numbers_are_those_of_the_pictures_and_captions(
    report: Report, hearing: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Samples of the posterior and noise, keyed by seed and place; the rest of the pictures is left out and counted."""
    seen: list[torch.Tensor] = []

    def watched(scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return posterior(scores)

    monkeypatch.setattr("training.measuring.classification.posterior", watched)
    numbers = report("--seed", 3, "--grid", tmp_path / "grid.png")
    pipeline, images = load_pipeline(hearing, "cpu"), Images(ShardSet(shapes, "val"))
    classes = [*(caption(images, i) for i in range(4)), "a red circle at the top on a grey background"]
    assert numbers["classes"] == classes and numbers["pictures"] == 4 and numbers["draws"] == 4
    pixels = images.__getitems__([Slot(i, 0, i) for i in range(4)]).data
    moments = pipeline.autoencoder.encode(to_unit(pixels)).detach()
    classify = DiffusionClassifier(denoiser=pipeline.denoiser, diffusion=pipeline.denoiser.diffusion, draws=4)
    shape, norm = pipeline.latent_shape((32, 32)), pipeline.autoencoder.norm
    scores = classify(
        lambda noise: norm.latents(moments, noise.normal(shape, "posterior")),
        Noise.from_seeds([3, 4, 5, 6]),
        pipeline.text(classes),
    )
    torch.testing.assert_close(seen[0], scores, rtol=1e-4, atol=0)
    for name, belief in zip(("elbo", "uniform"), posterior(scores), strict=True):
        wanted = judged(belief, torch.arange(4))
        assert numbers[f"confusion_{name}"] == wanted["confusion"]
        assert numbers[f"accuracy_{name}"] == wanted["accuracy"]
        assert numbers[f"calibration_error_{name}"] == pytest.approx(wanted["calibration_error"], abs=1e-3)
    assert (tmp_path / "grid.png").exists() and numbers["grid"] == "grid.png"
    left = numbers["ledger"]["left out"]["pictures whose caption is not among those of --classify"]  # type: ignore[index]
    assert left["count"] == len(images) - 4
    said = capsys.readouterr().out
    assert "by elbo weights:" in said and "by uniform weights:" in said and "accuracy_elbo" in said


def test_batches_do_not_matter_and_whoever_is_left_out_was_not_the_best(report: Report) -> None:
    one, many = report("--batch-size", 3), report("--batch-size", 100)
    assert one["confusion_elbo"] == many["confusion_elbo"] and one["confusion_uniform"] == many["confusion_uniform"]
    assert report("--count", 2)["pictures"] == 2
    staged = report("--eliminate", "1:4", "2:3")
    assert staged["eliminate"] == ["1:4", "2:3"] and staged["pictures"] == 4


def test_stages_that_do_not_fit_the_draws_are_mended_as_it_is_told(report: Report) -> None:
    with pytest.raises(UserError) as refused:
        report("--eliminate", "4:1")
    assert "--draws" in refused.value.hint and "--eliminate DRAWS:KEEP" in refused.value.hint
    assert report("--eliminate", "4:1", "--draws", 5)["draws"] == 5
    assert report("--eliminate", "3:1")["eliminate"] == ["3:1"]


MISTAKES = {  # (lines of the file, flags, exit code, what is said)
    "one caption": (["a red circle"], "", 3, "a choice needs at least 2 captions (got 1)"),
    "a caption twice": (["a red circle", "a blue square", "a red circle"], "", 3, "stands there more than once"),
    "no caption": (["# none"], "", 3, "no prompts in it"),
    "an unknown word": (["a red circle", "a red dodecahedron"], "", 3, "the model does not know 'dodecahedron'"),
    "too long": (["a red circle", "a red circle " * 40], "", 3, "the model reads only"),
    "captions of no picture": (["a red circle", "a blue square"], "", 3, "no held-out picture has one of the 2"),
    "no draws": (["a red circle", "a blue square"], "--draws 0", 2, "--draws: must be at least 1"),
    "no numbers": (None, "--eliminate 4", 2, "--eliminate 4: expected DRAWS:KEEP"),
    "late": (None, "--draws 4 --eliminate 4:1", 2, "after 1 to 3 of 4 draws"),
    "none kept": (None, "--eliminate 4:0", 2, "at least 1 is kept"),
    "two questions": (None, "--likelihood 3", 2, "not allowed with argument"),
    "an autoencoder": (None, "--model {autoencoder}", 4, "autoencoder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_anything_is_measured(
    name: str, hearing: Path, autoencoder: Path, shapes: Path, file: Path, tmp_path: Path
) -> None:
    lines, flags, code, expected = MISTAKES[name]
    if lines:
        file.write_text("\n".join(lines))
    words = ["--model", hearing, "--data", shapes, "--classify", file, "--device", "cpu", "--output", tmp_path / "o"]
    problem = tiny.refused("evaluate", *words, *flags.format(autoencoder=autoencoder).split())
    assert problem.code == code and expected in problem.what and problem.hint, problem
    assert not (tmp_path / "o").exists()


def test_data_are_asked_for(hearing: Path, file: Path, tmp_path: Path) -> None:
    refused = tiny.refused("evaluate", "--model", hearing, "--classify", file, "--device", "cpu")
    assert refused.code == 2 and "--data is missing" in refused.what


def test_confusions_and_reliability_by_hand() -> None:
    belief = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.75, 0.05], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = judged(belief, torch.tensor([0, 1, 1, 2]))
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [1, 0, 0]] and found["accuracy"] == 0.5
    assert found["reliability"] == [
        {"from": 0.7, "to": 0.8, "pictures": 2, "confidence": pytest.approx(0.725), "accuracy": 0.5},
        {"from": 0.9, "to": 1.0, "pictures": 2, "confidence": pytest.approx(0.95), "accuracy": 0.5},
    ]
    assert found["calibration_error"] == pytest.approx((0.225 + 0.45) / 2)
    lines = table("by hand", ["a", "bb", "c"], found["confusion"], found["reliability"])
    assert lines[2:5] == [
        "a               1      1", "bb              2      1  a (1)", "c               1      0  a (1)"
    ]  # fmt: skip
    assert lines[-1].split() == ["0.9", "to", "1.0", "2", "0.950", "0.500"]
