"""Rows H5, H6 and H8: text from outside is shown as text, names no file, and nothing private is written."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import tiny

from training.files import write_json
from training.models.cards import text
from training.pictures import grids

# Each would be found, were it written anywhere; a user's files and tokens are known by where they are kept.
PRIVATE = {"HF_TOKEN": "hf_canary_token", "AWS_SECRET_ACCESS_KEY": "canary_secret", "USER": "canary_user"}
PRIVATE |= {"LOGNAME": "canary_user", "HOME": "/home/canary_user", "HOSTNAME": "canary_host"}


def written(*folders: Path) -> dict[Path, bytes]:
    """Everything in them but the lock, which is for this machine alone."""
    files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


def test_h8_nothing_private_is_written(
    autoencoder: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures to latents, a denoiser stopped and resumed, and what it draws; every byte of it looked through."""
    for name, value in PRIVATE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "canary_host")
    home = tmp_path / "canary_folder"
    data, latents, run, drawn = home / "data", home / "latents", home / "run", home / "drawn"
    words = f"pack shapes --samples 48 --val-fraction 0.2 --output {data}".split()
    assert tiny.call("make_shards", *words) == 0
    words = ["--autoencoder", autoencoder, "--data", data, "--output", latents, "--device", "cpu"]
    assert tiny.call("encode_latents", *words) == 0
    train = ["--latents", latents, "--output", run, *tiny.DENOISER, "--save-every", "3", "--resume", "auto"]
    assert tiny.call("train_denoiser", *train) == 0
    words = ["--model", run, "--prompt", "a red circle", "--output", drawn, "--device", "cpu", "--strip"]
    assert tiny.call("generate", *words) == 0
    found = written(home)
    assert {path.suffix for path in found} >= {".json", ".jsonl", ".md", ".png", ".safetensors", ".tar", ".npy"}
    for path, content in found.items():
        for secret in (*PRIVATE.values(), "canary", str(tmp_path), str(autoencoder.parent), str(shapes.parent)):
            assert secret.encode() not in content, (path, secret)


PROMPTS = ["../../x", "a" * 300, "CON", "a\0b", '"><img onerror=alert(1)>', "<script>1</script>", "-rf /", "~"]


def test_h6_prompts_name_no_file(denoiser: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.parent.iterdir())
    words = [word for prompt in PROMPTS for word in (f"--prompt={prompt}",)]
    words += ["--steps", "1", "--device", "cpu", "--model", str(denoiser), "--output", str(tmp_path / "out")]
    assert tiny.call("generate", *words) == 0
    names = [f"{i:05d}.png" for i in range(len(PROMPTS))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*names, "grid.png"]
    assert sorted(tmp_path.parent.iterdir()) == before and list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert [grids.facts(tmp_path / "out" / name)["prompt"] for name in names] == PROMPTS


def test_h5_a_model_card_shows_text_as_text(tmp_path: Path) -> None:
    outside = "<script>1</script> ![x](http://x) [a](http://b) | `c` *d* \n# e\n```\n---"
    values = {"backbone": {"kind": outside}, "text": {"kind": "scratch", "length": 4}, "sample": {"size": [8, 8]}}
    write_json(tmp_path / "config.json", values)
    data = {"captions": [outside], "train": outside, "held_out": 1}
    told = text(tmp_path, {"data": data, "hashes": {outside: outside}})
    code = re.findall(r"^(`{3,})(?:bash|python)\n(.*?)\n\1$", told, re.M | re.S)
    assert len(code) == 2 and all(block.count("<script>") == 1 for _, block in code)
    plain = re.sub(r"^(`{3,})\w+\n.*?\n\1$", "", told, flags=re.M | re.S)
    assert not re.search(r"(?<!\\)[<>`*]", plain.replace("*Pictures", ""))
    assert not re.search(r"^(# e|```|---)$", plain.partition("---\n")[2].partition("---\n")[2], re.M)
    assert all(row.count(" | ") == 1 for row in plain.splitlines() if row.startswith("| ") and "script" in row)
