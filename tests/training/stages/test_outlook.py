"""What is said before the first step: exact numbers of the tiny fixtures, and each warning only where it is due."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from training.errors import UserError
from training.stages.outlook import Outlook, objections
from training.tensors import load_tensors

PLAIN = Outlook(
    steps=100, batch=8, samples=400, held_out=20, parameters=10, checkpoint=1, checkpoints=3, looks=5, disk=9
)  # fmt: skip


def look(**changes: int | None) -> Outlook:
    return Outlook(**{**vars(PLAIN), **changes})


def of_run(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "run.json").read_text())["outlook"])


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["autoencoder", "denoiser"])
def test_the_numbers_of_a_run(name: str, request: pytest.FixtureRequest) -> None:
    """Six steps of 32 over 96 pictures, looked at after 0, 4 and 6; one checkpoint, as large as was said."""
    run = Path(request.getfixturevalue(name))
    told = of_run(run)
    assert (told["steps"], told["batch"], told["samples"], told["held_out"], told["epochs"]) == (6, 32, 96, 19, 2.0)
    assert (told["checkpoints"], told["looks"]) == (1, 3)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    files = [load_tensors(path) for path in checkpoint.glob("*.safetensors")]
    counters = {key for file in files for key in file if key.endswith(".step")}
    assert told["checkpoint"] == sum(x.nbytes for file in files for key, x in file.items() if key not in counters)
    kept = size(run) - size(run / "tensorboard")
    assert 0.4 * kept < told["disk"] < 2 * kept


def test_the_parameters_are_those_exported(autoencoder: Path) -> None:
    from training.models.autoencoders import load_autoencoder

    assert of_run(autoencoder)["parameters"] == sum(p.numel() for p in load_autoencoder(autoencoder).parameters())


def test_a_dry_run_says_it_too(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("train_autoencoder", "--data", shapes, "--dry-run", *tiny.AUTOENCODER) == 0
    said = capsys.readouterr().err
    assert "outlook: 6 steps of 32 are 2 epochs of 96 pictures\n         on disk about " in said
    assert ": 1 checkpoint of " in said and "final/, pictures of 3 steps" in said
    assert said.count("warning: ") == 1 and "warning: only 19 held-out pictures, fewer than 20" in said


def test_checkpoints_that_are_kept_count(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--data", shapes, "--dry-run", *tiny.AUTOENCODER, "--save-every", "1")
    for more, kept in (((), 3), (("--keep-last", "4"), 5), (("--train.keep_best", "false"), 2)):
        assert tiny.call("train_autoencoder", *words, *more) == 0
        assert f": {kept} checkpoints of " in capsys.readouterr().err


def test_snapshots_of_averages_take_room(latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def disk(*more: str) -> float:
        words = ("--latents", latents, "--dry-run", *tiny.DENOISER, "--save-every", "1", *more)
        assert tiny.call("train_denoiser", *words) == 0
        return float(capsys.readouterr().err.partition("on disk about ")[2].partition(" MB")[0])

    lengths = ("--train.ema_lengths", "[0.1]")
    assert disk() < disk(*lengths) < disk(*lengths, "--train.ema_every", "1")


def test_a_stream_has_no_count(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--stream", "--data", f"{shapes}/train-*.tar", "--resolution", "32", "--dry-run", *tiny.AUTOENCODER)
    assert tiny.call("train_autoencoder", *words) == 0
    said = capsys.readouterr().err
    assert "6 steps of 32 take 192 pictures of a stream, which has no count: no epochs" in said
    assert "held-out pictures, fewer" not in said


def test_nothing_to_train_has_no_outlook(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.call("train_autoencoder", "--data", shapes, "--config", "identity", "--dry-run", "--device", "cpu") == 0
    assert "outlook" not in capsys.readouterr().err


def test_many_epochs_are_warned_of() -> None:
    assert objections(look(steps=10_000), steps_proposed=False) == []  # exactly 200
    (why,) = objections(look(steps=10_050), steps_proposed=False)
    assert why.startswith("201 epochs, more than 200") and "give --max-steps 10000, or pack more pictures" in why
    assert objections(look(steps=10_050), steps_proposed=True) == []  # the proposal has said it
    assert objections(look(steps=10**9, samples=None), steps_proposed=False) == []


def test_few_held_out_pictures_are_warned_of() -> None:
    (why,) = objections(look(held_out=19), steps_proposed=True)
    assert why.startswith("only 19 held-out pictures, fewer than 20") and why.endswith("--val-fraction 0.07")
    assert objections(look(held_out=None), steps_proposed=False) == []  # a stream, or the training pictures themselves
    (why,) = objections(look(samples=10, held_out=1, steps=1), steps_proposed=False)
    assert why.endswith("--val-fraction 0.5")


def test_warnings_of_a_run(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of steps that somebody asks for, with a config or over a proposal; not of those that are proposed."""
    data = shutil.copytree(shapes, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    for shard in index["shards"]:
        shard["split"] = "train" if shard["name"] == "train-000002.tar" else "val"
    (data / "index.json").write_text(json.dumps(index))  # 16 to train on
    words = ("--data", data, "--dry-run", "--device", "cpu")
    assert tiny.call("train_autoencoder", *words) == 0
    assert "epochs, more than 200" not in capsys.readouterr().err
    for more in (("--max-steps", "500"), ("--config", "laptop-64", "--max-steps", "500")):
        assert tiny.call("train_autoencoder", *words, *more, "--batch-size", "8") == 0
        assert "warning: 250 epochs, more than 200" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(shapes: Path) -> None:
    with pytest.raises(UserError, match="dataset has 96 samples, fewer than one global batch"):
        tiny.call("train_autoencoder", "--data", shapes, "--dry-run", "--device", "cpu", "--batch-size", "97")
