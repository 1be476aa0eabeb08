"""Every variable that Accelerate reads: taken, refused, or told to be unused."""

from __future__ import annotations

import re
from pathlib import Path

import accelerate
import pytest
import tiny

from training.errors import UserError
from training.machine import launcher
from training.machine.processes import start

OWN = re.compile("ACCELERATE_|FSDP_|MEGATRON_LM_|PARALLELISM_CONFIG_")


def read_by_accelerate() -> set[str]:
    """The names of variables in the source of the installed Accelerate, those put together from a prefix too."""
    names: set[str] = set()
    for file in Path(accelerate.__file__).parent.rglob("*.py"):
        if "test_utils" in file.parts:
            continue
        text = file.read_text()
        names |= set(re.findall(r'"((?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]*[A-Z0-9])"', text))
        for found in re.finditer(r'prefix \+ "([A-Z0-9_]+)"', text):
            before = re.findall(r'prefix = "([A-Z0-9_]*_)"', text[: found.start()])
            names |= {before[-1] + found[1]} if before else set()
    return names


def test_every_variable_is_in_a_table() -> None:
    names = read_by_accelerate()
    assert len(names) > 60 and {launcher.ACCUMULATION, "ACCELERATE_USE_FSDP", "FSDP_VERSION"} <= names
    for name in sorted(names):
        places = [launcher.TAKEN.fullmatch(name), name in launcher.REFUSED, launcher.UNUSED.fullmatch(name)]
        if name == "ACCELERATE_DYNAMO_BACKEND":  # the one of its kind that starts something
            places.pop()
        assert sum(map(bool, places)) == 1, f"{name}: say in training/machine/launcher.py what is done with it"


@pytest.mark.parametrize("name", launcher.REFUSED)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "false", "no", "NO", "0", "None"):
        monkeypatch.setenv(name, value)
        launcher.check()
    for value in ("true", "True", "1", "inductor"):
        monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"{name}={value} is not supported") as caught:
            start("cpu")
        assert caught.value.code == 2 and caught.value.hint


@pytest.mark.parametrize("door", ["train_denoiser", "encode_latents"])
def test_fp8_is_refused(
    door: str, latents: Path, shapes: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = {
        "train_denoiser": ["--latents", latents, "--dry-run", *tiny.DENOISER],
        "encode_latents": ["--data", shapes, "--autoencoder", autoencoder, "--output", tmp_path / "x"],
    }
    monkeypatch.setenv(launcher.PRECISION, "fp8")
    problem = tiny.refused(door, *words[door])
    assert problem.code == 2 and problem.what == f"{launcher.PRECISION}=fp8 is not supported"
    assert problem.hint == "start with --mixed_precision bf16, fp16 or no"


def config(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert tiny.call("train_denoiser", "--config", "smoke", "--print-config", *words) == 0
    said = capsys.readouterr()
    return re.findall(r'"mixed_precision": "(\w+)"', said.out)[0], said.err


def test_the_launcher_precision_where_ours_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert config(capsys=capsys) == ("no", "")
    monkeypatch.setenv(launcher.PRECISION, "bf16")
    assert config(capsys=capsys) == ("bf16", f"note: --mixed-precision bf16, as {launcher.PRECISION} asks\n")
    assert config("--mixed-precision", "bf16", capsys=capsys) == ("bf16", "")
    monkeypatch.setenv("RANK", "1")
    assert config(capsys=capsys) == ("bf16", "")
    monkeypatch.setenv(launcher.PRECISION, "no")  # what `accelerate launch` sets unless told
    assert config("--mixed-precision", "bf16", capsys=capsys) == ("bf16", "")


def test_two_precisions_are_refused_and_either_way_out_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[train]\nmixed_precision = "no"\n')
    monkeypatch.setenv(launcher.PRECISION, "bf16")
    for words in (["--mixed-precision", "no"], ["--config", own], ["--mixed-precision", "fp16"]):
        problem = tiny.refused("train_autoencoder", "--print-config", *words)
        assert problem.code == 2 and "and bf16 in ACCELERATE_MIXED_PRECISION" in problem.what
        assert problem.hint.startswith("give --mixed-precision bf16, or start with")
    assert tiny.call("train_autoencoder", "--print-config", "--config", own, "--mixed-precision", "bf16") == 0
    monkeypatch.setenv(launcher.PRECISION, "no")
    assert tiny.call("train_autoencoder", "--print-config", "--config", own) == 0


def test_encoding_offers_no_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher.PRECISION, "fp16")
    for given in (None, "no", "bf16"):
        with pytest.raises(UserError, match="fp16 is not supported here") as caught:
            launcher.precision(given, ("no", "bf16"))
        assert caught.value.hint.endswith("--mixed_precision no or bf16")
    monkeypatch.setenv(launcher.PRECISION, "bf16")
    assert launcher.precision(None, ("no", "bf16")) == "bf16"


def test_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.accumulation(None) is None and launcher.accumulation(2) == 2
    monkeypatch.setenv(launcher.ACCUMULATION, "4")
    assert launcher.accumulation(None) == 4 == launcher.accumulation(4)
    with pytest.raises(UserError, match="is 2 and ACCELERATE_GRADIENT_ACCUMULATION_STEPS 4") as caught:
        launcher.accumulation(2)
    assert caught.value.code == 2
    for value in ("1", "auto"):
        monkeypatch.setenv(launcher.ACCUMULATION, value)
        assert launcher.accumulation(2) == 2
    monkeypatch.setenv(launcher.ACCUMULATION, "four")
    with pytest.raises(UserError, match="expected a whole number"):
        launcher.accumulation(None)


def test_gradients_are_never_divided_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv(launcher.ACCUMULATION, "4")
    accelerator, weight = start("cpu"), torch.ones(1, requires_grad=True)
    accelerator.backward(weight * 8)
    assert accelerator.gradient_accumulation_steps == 1 and weight.grad == 8


def test_what_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    monkeypatch.setenv("ACCELERATE_SOMETHING_NEW", "7")
    monkeypatch.setenv("ACCELERATE_FP8_FORMAT", "")
    monkeypatch.setenv(launcher.PRECISION, "bf16")
    start("cpu")  # as a door that computes in float32 does
    said = f"note: not used: {launcher.PRECISION}=bf16, ACCELERATE_SOMETHING_NEW=7, FSDP_OFFLOAD_PARAMS=true\n"
    assert capsys.readouterr().err == said
    start("cpu", autocasts=True)
    start("cpu", "no")
    assert launcher.PRECISION not in capsys.readouterr().err
