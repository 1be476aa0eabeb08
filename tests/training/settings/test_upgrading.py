"""Configs of earlier versions mean what they did: files without a version, and runs that were begun with one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny

from training.errors import UserError
from training.models.folders import find
from training.pictures import grids
from training.settings import decoding
from training.settings.sections import VERSION

OLD = """[backbone]
kind = "dit"
[text]
kind = "scratch"
[guidance]
interval = [0.2, 0.8]
"""


def rules(config: Any) -> tuple[int, str, int]:
    return config.format.version, config.guidance.interval_in, config.text.rule


def test_a_file_without_a_version_means_the_old_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.toml"
    path.write_text(OLD)
    assert rules(decoding.load("denoiser", str(path))) == (1, "t", 1)
    assert "has no [format] version" in capsys.readouterr().err
    path.write_text(OLD + "[format]\nversion = 2\n")
    assert rules(decoding.load("denoiser", str(path))) == (2, "noise-share", 2)
    assert not capsys.readouterr().err
    path.write_text(OLD.replace("[guidance]", "rule = 2\n[guidance]\ninterval_in = 'noise-share'"))
    assert rules(decoding.load("denoiser", str(path))) == (1, "noise-share", 2)  # what it says itself counts
    path.write_text(OLD + "[format]\nversion = 4\n")
    with pytest.raises(UserError, match="this program understands 1 to 3"):
        decoding.load("denoiser", str(path))


def test_cfg_zero_star_of_old_stands_still_in_times(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    for version, unit in (("", "t"), ("[format]\nversion = 2\n", "noise-share")):
        path.write_text(version + '[guidance]\nkind = "cfg-zero-star"\nzero_from = 0.9\n')
        config: Any = decoding.load("denoiser", str(path))
        assert (config.guidance.zero_in, config.guidance.zero_from) == (unit, 0.9)


def test_an_encoder_is_told_of_padding_up_to_version_2(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    for version, rule in ((1, 1), (2, 1), (3, 2)):
        path.write_text(f'[text]\nkind = "huggingface"\nmasked = false\n[format]\nversion = {version}\n')
        config: Any = decoding.load("denoiser", str(path))
        assert (config.format.version, config.text.mask_rule) == (version, rule)
        assert decoding.decode_stored("denoiser", decoding.to_values(config)) == config


def test_other_kinds_take_only_the_keys_they_have(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text('[text]\nkind = "label"\n[guidance]\nkind = "apg"\n')
    config = decoding.load("denoiser", str(path))
    assert isinstance(config, decoding.DenoiserConfig) and config.format.version == 1


@pytest.mark.parametrize("name", decoding.names("denoiser"))
def test_every_packaged_config_names_the_newest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = decoding.load("denoiser", name)
    assert isinstance(config, decoding.DenoiserConfig) and config.format.version == VERSION
    assert not capsys.readouterr().err


def aged(run: Path, target: Path) -> Path:
    """A run as the version before wrote it."""
    shutil.copytree(run, target)
    for path in (target / "config.json", target / "final" / "config.json"):
        values = json.loads(path.read_text())
        del values["format"], values["guidance"]["interval_in"], values["text"]["rule"]
        path.write_text(json.dumps(values))
    return target


def test_an_old_run_goes_on_and_draws_by_its_rules(latents: Path, denoiser: Path, tmp_path: Path) -> None:
    """With the command that began it, whose packaged config has a newer version by now."""
    run = aged(denoiser, tmp_path / "run")
    assert rules(find(run, "denoiser").config()) == (1, "t", 1)
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--resume", "auto", "--max-steps", "7")
    assert tiny.call("train_denoiser", *words) == 0
    kept = json.loads((run / "final" / "config.json").read_text())
    assert (kept["format"]["version"], kept["guidance"]["interval_in"], kept["text"]["rule"]) == (1, "t", 1)
    drawn = ("--model", run, "--prompt", "x", "--device", "cpu", "--steps", "2", "--guidance.interval", "0.2,0.8")
    assert tiny.call("generate", *drawn, "--output", tmp_path / "pictures") == 0
    assert grids.facts(tmp_path / "pictures" / "00000.png")["settings"]["guidance"]["interval_in"] == "t"
