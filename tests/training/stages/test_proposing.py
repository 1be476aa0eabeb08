"""A training without --config: what is proposed from its data, what is given stands, a resumed run keeps its own."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny

DOORS = {"autoencoder": ("train_autoencoder", "--data"), "denoiser": ("train_denoiser", "--latents")}
SHORT = ["--max-steps", "2", "--batch-size", "8", "--train.validation_size", "4", "--device", "cpu"]
# Small enough for a test; another kind or width is the user's to choose.
TINY = {
    "autoencoder": ["--model.channels", "8,8,8", "--model.groups", "4"],
    "denoiser": ["--backbone.channels", "16,16,16", "--text.width", "16", "--text.depth", "1", "--sample.steps", "2"],
}


def printed(capsys: pytest.CaptureFixture[str], script: str, *words: object) -> tuple[str, str]:
    """What --print-config answers, and what is said besides."""
    capsys.readouterr()
    assert tiny.call(script, *words, "--print-config") == 0
    out, err = capsys.readouterr()
    return out, err


@pytest.fixture
def source(request: pytest.FixtureRequest, stage: str) -> Path:
    return Path(request.getfixturevalue({"autoencoder": "shapes", "denoiser": "latents"}[stage]))


@pytest.mark.parametrize("stage", DOORS)
def test_the_command_that_is_told_is_the_same(stage: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The proposal for the fixture's 96 pictures of 32 px; its command line resolves to the same bytes."""
    door, flag = DOORS[stage]
    words = (flag, source, "--device", "cpu", "--lr", "0.0005")
    out, err = printed(capsys, door, *words)
    assert "note: no --config was given: laptop-64, for 96 pictures of 32 px on a CPU" in err
    (told,) = re.findall(r"the same as: (.*)", err)
    proposed = shlex.split(told)
    proposed = proposed[proposed.index("--print-config") + 1 :]
    assert proposed[:2] == ["--config", "laptop-64"]
    again, silent = printed(capsys, door, *words, *proposed)
    assert again == out and silent == ""
    config = json.loads(out)
    assert config["optimizer"]["lr"] == 0.0005
    train = config["train"]
    assert {"autoencoder": (1400, 8, 350), "denoiser": (740, 32, 185)}[stage] == (
        train["max_steps"], train["batch_size"], train["sample_every"],
    )  # fmt: skip
    assert train["flip"] is True  # the fixture's latents are mirrored


@pytest.mark.parametrize("stage", DOORS)
def test_what_is_given_stands(stage: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    door, flag = DOORS[stage]
    words = (flag, source, "--device", "cpu", "--max-steps", "7", "--train-batch-size", "4", "--save-every", "3")
    train = json.loads(printed(capsys, door, *words)[0])["train"]
    assert (train["max_steps"], train["micro_batch_size"], train["save_every"], train["sample_every"]) == (7, 4, 3, 6)


@pytest.mark.parametrize("stage", DOORS)
def test_without_data_the_config_of_the_device_is_printed(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, DOORS[stage][0], "--device", "cpu")
    assert "pictures that nobody has counted" in err and "laptop-64" in err
    assert json.loads(out)["train"]["max_steps"] == {"autoencoder": 10_000, "denoiser": 8000}[stage]


def test_a_stream_has_no_count(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--stream", "--data", f"{shapes}/train-*.tar", "--resolution", "32", "--device", "cpu")
    out, err = printed(capsys, "train_autoencoder", *words)
    assert "pictures that nobody has counted of 32 px" in err and "epochs" not in err
    assert json.loads(out)["train"]["max_steps"] == 10_000


def test_data_without_a_size_show_their_first_picture(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As tars that were indexed in place."""
    data = shutil.copytree(shapes, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    del index["summary"]["resolution"]
    (data / "index.json").write_text(json.dumps(index))
    assert "96 pictures of 32 px" in printed(capsys, "train_autoencoder", "--data", data, "--device", "cpu")[1]


def test_stored_text_embeddings_are_used(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their encoder is set as it was when they were made."""
    index = json.loads((latents / "index.json").read_text())
    index["fields"].append("text.safetensors")
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "text_encoder").mkdir()
    record = {"name": "x", "copied": True, "hash": "0", "length": 32, "pooling": "mean", "layer": -1, "lower": True}
    (tmp_path / "text_encoder" / "identity.json").write_text(json.dumps(record))
    text = json.loads(printed(capsys, "train_denoiser", "--latents", tmp_path, "--device", "cpu")[0])["text"]
    assert text | {"kind": "huggingface", "length": 32, "pooling": "mean", "lower": True} == text


def test_a_batch_is_a_multiple_of_the_launchers_accumulation(
    shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    out, err = printed(capsys, "train_autoencoder", "--data", shapes, "--device", "cpu")
    assert json.loads(out)["train"]["batch_size"] == 6
    assert err.count("note: --gradient-accumulation-steps 3, as ACCELERATE_GRADIENT_ACCUMULATION_STEPS asks") == 1


@pytest.mark.parametrize("stage", DOORS)
def test_a_resumed_run_keeps_its_config(
    stage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's own config goes on, not a new proposal: what had been set by flags is not asked for again."""
    door, flag = DOORS[stage]
    words = (flag, source, "--output", tmp_path / "run", "--device", "cpu", "--resume", "auto")
    assert tiny.call(door, *words, *SHORT, *TINY[stage]) == 0
    begun = json.loads((tmp_path / "run" / "config.json").read_text())
    capsys.readouterr()
    assert tiny.call(door, *words, "--max-steps", "3") == 0
    said = capsys.readouterr().err
    assert f"no --config was given: the run's own is used, {tmp_path / 'run' / 'config.json'}" in said
    assert "resumed from step 2" in said and "laptop" not in said
    gone_on = json.loads((tmp_path / "run" / "config.json").read_text())
    begun["train"]["max_steps"] = 3
    assert gone_on == begun
    assert tiny.call(door, *words) == 0 and "already complete at step 3" in capsys.readouterr().err


def test_a_run_of_another_stage_is_refused_as_such(autoencoder: Path, latents: Path) -> None:
    problem = tiny.refused(
        "train_denoiser", "--latents", latents, "--output", autoencoder, "--resume", "auto", "--device", "cpu"
    )
    assert "holds a run of the autoencoder stage" in problem.what


def test_sixty_pictures_and_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From packed pictures to drawn ones; the networks and the number of steps are cut short by flags alone."""
    data, run, latents, model = (tmp_path / name for name in ("data", "ae", "latents", "dit"))
    assert tiny.call("make_shards", *f"pack shapes --samples 60 --val-fraction 0.1 --output {data}".split()) == 0
    assert tiny.call("train_autoencoder", "--data", data, "--output", run, *SHORT, *TINY["autoencoder"]) == 0
    words = ("--autoencoder", run, "--data", data, "--output", latents, "--device", "cpu", "--num-workers", 0)
    assert tiny.call("encode_latents", *words) == 0
    assert tiny.call("train_denoiser", "--latents", latents, "--output", model, *SHORT, *TINY["denoiser"]) == 0
    said = capsys.readouterr().err
    assert said.count("no --config was given: laptop-64, for 60 pictures of 32 px on a CPU") == 2
    assert "it will draw copies of its pictures" in said and "smoke" not in said
    words = ("--model", model, "--prompt", "a red circle", "--output", tmp_path / "out", "--device", "cpu")
    assert tiny.call("generate", *words) == 0 and list((tmp_path / "out").glob("*.png"))
    assert json.loads((model / "config.json").read_text())["backbone"]["kind"] == "unet"
