"""The card beside a number: what must be equal for two numbers to be compared, and what need not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from training.data.images import Images
from training.measuring.protocol import DEFINITIONS, card, protocol, protocol_hash
from training.models.judge import caption
from training.shards.reading import ShardSet

NUMBERS: dict[str, Any] = {
    "frechet_generated": 1.5, "frechet_generated_95": [1.0, 2.0], "pictures": 500, "real_pictures": 1200,
    "network": {"name": "random", "dim": 960, "weights": "a" * 64, "preprocessing": "[-1, 1]"},
    "data": {"index_sha256": "b" * 64}, "lpips_network": None, "seed": 0, "hashes": {"backbone": "c"},
    "settings": {"sample": {"steps": 20}, "sampler": {"kind": "euler"}, "guidance": {"kind": "cfg", "scale": 2.0}},
    "versions": {"torch": "2"},
}  # fmt: skip


def same(split: str = "val", **changes: Any) -> bool:
    return protocol_hash(protocol(NUMBERS | changes, split)) == protocol_hash(protocol(NUMBERS, "val"))


def test_what_makes_numbers_comparable() -> None:
    assert same(frechet_generated=9.9) and same(seed=3) and same(hashes={"backbone": "d"})
    assert same(settings=NUMBERS["settings"] | {"sample": {"steps": 50}}) and same(versions={"torch": "3"})
    assert not same(pictures=501) and not same(real_pictures=1000) and not same(split="test")
    assert not same(data={"index_sha256": "d" * 64}) and not same(lpips_network="vgg")
    assert not same(network=NUMBERS["network"] | {"weights": "d" * 64})
    assert not same(network=NUMBERS["network"] | {"preprocessing": "squeezed"}) and not same(clip_score=3.0)


def test_the_card_names_all_that_decides() -> None:
    lines = list(card(protocol(NUMBERS, "val")))
    text = " ".join(" ".join(lines).split())
    for part in ("val split, data bbbbbbbbbbbb", "weights aaaaaaaaaaaa, preprocessing [-1, 1]", "pictures 500",
                 "real_pictures 1200", "sampler euler, guidance cfg of scale 2.0, 20 steps, seed 0", "torch 2",
                 DEFINITIONS["frechet"], "95 %"):  # fmt: skip
        assert part in text, part
    assert max(map(len, lines)) <= 118 and DEFINITIONS["psnr"] not in text


def test_it_is_stored_with_every_kind_of_measurement(
    denoiser: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Likelihood, classification, restoration, obedience: what decides of each stands in its protocol."""
    captions = tmp_path / "captions.txt"
    images = Images(ShardSet(shapes, "val"))
    captions.write_text("\n".join(sorted({caption(images, i) for i in range(3)})))
    data, found = ("--data", shapes), {}
    modes = {
        "likelihood": (*data, "--likelihood", 2, "--steps", 2),
        "restore": (*data, "--restore", "box", "--samples", 2, "--count", 2, "--steps", 2),
        "classify": (*data, "--classify", captions, "--draws", 2),
        "obedience": ("--obedience", "shapes", "--count", 2),
    }
    for name, words in modes.items():
        output = tmp_path / f"{name}.json"
        assert tiny.call("evaluate", "--model", denoiser, "--device", "cpu", "--output", output, *words) == 0
        numbers = json.loads(output.read_text())
        assert numbers["protocol_hash"] == protocol_hash(numbers["protocol"])
        assert f"protocol {numbers['protocol_hash']}" in capsys.readouterr().out
        found[name] = numbers["protocol"]["comparable"]
    assert found["likelihood"]["likelihood_trace"].startswith("hutchinson") and found["likelihood"]["split"] == "val"
    assert set(found["likelihood"]["measures"]) >= {"log_likelihood", "bits_per_dim"}
    assert found["restore"]["operator"]["kind"] == "box" and found["restore"]["sigma_y"] == 0.05
    assert found["classify"]["draws"] == 2 and found["classify"]["classes"] == captions.read_text().split("\n")
    assert set(found["classify"]["measures"]) == {"accuracy_elbo", "accuracy_uniform"}
    assert list(found["obedience"]["measures"]) == ["obedience"] and found["obedience"]["data"] is None
    assert found["obedience"]["prompts"] == 2 and "checker" in found["obedience"]["obedience_judge"]
