"""Every variable that Accelerate reads: taken, refused, or told to be unused."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import tiny

from training.errors import UserError
from training.machine import launcher
from training.machine.processes import start

NONE = SimpleNamespace(num_processes=1)
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


OF_FSDP = {  # as `accelerate launch --use_fsdp --fsdp_version 2` sets them
    "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false", "FSDP_MIN_NUM_PARAMS": "100000000", "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
}


def asks_for_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {launcher.SHARDING: "true", **OF_FSDP}.items():
        monkeypatch.setenv(name, value)


def test_fsdp_is_done_where_ours_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asks_for_shares(monkeypatch)
    words = ["train_denoiser", "--config", "smoke", "--print-config"]
    assert tiny.call(*words) == 0
    said = capsys.readouterr()
    assert '"sharding": "full"' in said.out
    assert said.err == f"note: --train.sharding full, as {launcher.SHARDING} asks\n"
    assert tiny.call(*words, "--train.sharding", "full") == 0 and not capsys.readouterr().err
    problem = tiny.refused(*words, "--train.sharding", "none")
    assert problem.what == f"--train.sharding is none here, and {launcher.SHARDING} asks for it"
    own = tmp_path / "own.toml"
    own.write_text('[train]\nsharding = "none"\n')
    assert tiny.refused("train_denoiser", "--config", own, "--print-config").what == problem.what


def test_accelerate_shares_nothing_out_beside_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asks_for_shares(monkeypatch)
    asked = list[str | None]()
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: asked.append(os.environ.get(launcher.SHARDING)) or NONE)
    start("cpu", shards=True)
    assert asked == [None] and os.environ[launcher.SHARDING] == "true" and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("FSDP_VERSION", "1"), ("FSDP_VERSION", ""), ("FSDP_SHARDING_STRATEGY", "SHARD_GRAD_OP"),
     ("FSDP_RESHARD_AFTER_FORWARD", "false"), ("FSDP_OFFLOAD_PARAMS", "true"), ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP"),
     ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP"), ("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block"),
     ("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"), ("FSDP_FORWARD_PREFETCH", "true"),
     ("FSDP_BACKWARD_PREFETCH", "BACKWARD_POST"), ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
     ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "true"), ("FSDP_IGNORED_MODULES", "text")],
)  # fmt: skip
def test_another_kind_of_fsdp_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asks_for_shares(monkeypatch)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^error: {name}={value} is not supported") as caught:
        launcher.sharding(None)
    assert caught.value.code == 2 and caught.value.hint == launcher.SHARES[name][1]


def test_every_variable_of_fsdp_is_looked_at() -> None:
    without_effect = {"FSDP_MIN_NUM_PARAMS", "FSDP_USE_ORIG_PARAMS", "FSDP_CPU_RAM_EFFICIENT_LOADING",
                      "FSDP_SYNC_MODULE_STATES"}  # in the second version, or on anything but the loading  # fmt: skip
    assert {name for name in read_by_accelerate() if name.startswith("FSDP_")} == {*launcher.SHARES, *without_effect}


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
