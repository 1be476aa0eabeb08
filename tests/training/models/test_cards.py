"""Model cards: what the hub reads of them, where their facts come from, and that an interruption changes none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard
from PIL import Image

from training.files import write_json
from training.models.cards import LONGEST_SIDE, fenced, keep_samples, stored_facts
from training.models.folders import copy_model
from training.settings.embedded import located


def rows(card: str) -> dict[str, str]:
    """Its tables of two columns."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_the_hub_reads_it(denoiser: Path, autoencoder: Path) -> None:
    """No licence is claimed: a comment says who names one."""
    card = (denoiser / "final" / "README.md").read_text()
    told = ModelCard(card).data.to_dict()
    assert told == {"library_name": "latent-diffusion-from-scratch", "pipeline_tag": "text-to-image",
                    "tags": ["text-to-image", "latent-diffusion"]}  # fmt: skip
    assert "\n# license: not stated" in card
    inner = (denoiser / "final" / "autoencoder" / "README.md").read_text()
    assert ModelCard(inner).data.to_dict()["tags"] == ["autoencoder", "latent-diffusion"]


def test_a_denoiser_says_what_it_was_trained_on_and_measured(denoiser: Path) -> None:
    final = denoiser / "final"
    card, record = (final / "README.md").read_text(), json.loads((denoiser / "run.json").read_text())
    said = rows(card)
    assert (said["pictures trained on"], said["held out"]) == ("96", "19")
    assert said["resolution, height and width"] == "32x32"
    assert (said["steps"], said["batch size"], said["epochs"]) == ("6", "32", "2")
    assert said["sha256 of the shards' index"] == record["data"]["index_sha256"]
    assert said["denoiser"] == record["model"] and said["encoder"] == record["hashes"]["encoder"]
    assert said["torch"] == record["versions"]["torch"]
    last = tiny.rows(denoiser)[-1]
    assert f"| loss | {last['val/loss']:.4g} | mean of those below" in card
    assert f"| loss\\_t0.9 | {last['val/loss_t0.9']:.4g} | the objective at this noise level" in card
    assert f"| loss\\_train | {last['val/loss_train']:.4g} | the same mean on as many training pictures |" in card
    captions = stored_facts(final)["data"]["captions"]
    assert len(captions) == 5 and all(f"- “{caption}”" in card for caption in captions)
    words = len(json.loads((final / "tokenizer" / "vocabulary.json").read_text())["vocabulary"])
    assert f"It knows {words} words" in card and "about 2 times" in card
    assert str(denoiser.parent) not in card
    shown, drawn = (np.asarray(Image.open(path)) for path in
                    (final / "samples.png", denoiser / "samples/step-00000006/grid.png"))  # fmt: skip
    assert np.array_equal(shown, drawn) and "![Pictures of held-out captions](samples.png)" in card


def test_an_autoencoder_shows_pictures_of_the_data_in_its_own_folder_alone(
    autoencoder: Path, denoiser: Path, tmp_path: Path
) -> None:
    """A copy in latents or a denoiser is given away with those."""
    card = (autoencoder / "final" / "README.md").read_text()
    numbers = json.loads((autoencoder / "run.json").read_text())["validation"]
    assert f"| psnr | {numbers['psnr']:.4g} | dB, reconstructions" in card
    assert (autoencoder / "final" / "samples.png").is_file() and "(samples.png)" in card
    copy_model(autoencoder / "final", tmp_path / "copy")
    copied = (tmp_path / "copy" / "README.md").read_text()
    assert not (tmp_path / "copy" / "samples.png").exists() and "samples.png" not in copied
    assert copied == (denoiser / "final" / "autoencoder" / "README.md").read_text()
    assert rows(copied) == rows(card)


def test_a_run_that_ends_later_has_the_same_card(denoiser: Path, latents: Path, tmp_path: Path) -> None:
    """One stopped after its last checkpoint and before its export."""
    run = tmp_path / denoiser.name
    shutil.copytree(denoiser, run)
    write_json(run / "run.json", {**json.loads((run / "run.json").read_text()), "status": "training"})
    made = {name: (run / "final" / name).read_bytes() for name in ("README.md", "card.json", "samples.png")}
    for name in made:
        (run / "final" / name).unlink()
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--resume", "auto")
    assert tiny.call("train_denoiser", *words) == 0
    assert {name: (run / "final" / name).read_bytes() for name in made} == made


def test_an_export_says_what_its_weights_are(denoiser: Path, tmp_path: Path) -> None:
    """Of a finished run, and of one of an earlier version, which had no facts."""
    export = ("export_model", "--dtype", "bfloat16", "--output")
    assert tiny.call(*export, tmp_path / "made", denoiser) == 0
    card = (tmp_path / "made" / "README.md").read_text()
    assert "before the weights were rounded to bfloat16" in card and "| weights | bfloat16 |" in card
    older = tmp_path / "older"
    shutil.copytree(denoiser, older)
    for path in [*older.rglob("card.json"), *older.rglob("samples.png")]:
        path.unlink()
    assert tiny.call(*export, tmp_path / "again", older) == 0
    told, before = (stored_facts(tmp_path / name) for name in ("again", "made"))
    data = {"index_sha256": before["data"]["index_sha256"]}
    assert told == {**before, "data": data}
    assert (tmp_path / "again" / "samples.png").read_bytes() == (tmp_path / "made" / "samples.png").read_bytes()


def test_large_sheets_are_made_small(tmp_path: Path) -> None:
    sheet = tmp_path / "samples" / "step-00000004"
    sheet.mkdir(parents=True)
    Image.new("RGB", (4096, 1024), "red").save(sheet / "grid.png")
    keep_samples(tmp_path, 4, tmp_path / "final")
    assert Image.open(tmp_path / "final" / "samples.png").size == (LONGEST_SIDE, LONGEST_SIDE // 4)
    keep_samples(tmp_path, 3, tmp_path / "final")  # drawn later than that
    assert not (tmp_path / "final" / "samples.png").exists()


@pytest.mark.parametrize("text", ["plain", "```", "a ```` b"])
def test_no_text_ends_a_block_of_code(text: str) -> None:
    first, *_, last = fenced([text], "bash").split("\n")
    assert first == f"{last}bash" and last not in text and set(last) == {"`"}


def test_the_card_of_the_demo_is_of_the_demo() -> None:
    home = located("demo")
    card = rows((home / "README.md").read_text())
    for name, value in json.loads((home / "ingredients.json").read_text()).items():
        assert card[name.replace("_", "\\_")] == value
    assert (card["pictures trained on"], card["steps"], card["epochs"]) == ("60,000", "12000", "3.2")


def test_a_checkpoint_says_what_was_true_by_then(latents: Path, tmp_path: Path) -> None:
    """Of a run of eight steps, its checkpoint after four."""
    run, words = tmp_path / "run", ("--latents", latents, *tiny.DENOISER, "--save-every", 4, "--max-steps", 8)
    assert tiny.call("train_denoiser", "--output", run, *words) == 0
    checkpoint = run / "checkpoints" / "step-00000004"
    look = next(row for row in tiny.rows(run) if row["step"] == 4 and "val/loss" in row)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as of a run that was killed
    assert tiny.call("export_model", checkpoint, "--output", tmp_path / "made") == 0
    facts = stored_facts(tmp_path / "made")
    assert facts["steps"] == 4 and facts["numbers"] == {n[4:]: v for n, v in look.items() if n != "step"}
    shown, drawn = (np.asarray(Image.open(path)) for path in
                    (tmp_path / "made/samples.png", run / "samples/step-00000004/grid.png"))  # fmt: skip
    assert np.array_equal(shown, drawn)
