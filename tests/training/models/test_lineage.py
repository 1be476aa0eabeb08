"""Every part of a model is known by its content hash, and weights taken from a model come with its words."""

from __future__ import annotations

import json
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from packs import retold
from PIL import Image
from torch import Tensor

from ldm.text import HuggingFace, Scratch
from ldm.text.tokenizer import split
from training.errors import UserError
from training.loop.loop import Loop
from training.models import assembly, autoencoders
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.models.init_from import refuse_new_words
from training.models.lineage import INGREDIENTS
from training.models.text_encoders import vocabulary_hash
from training.pictures import grids
from training.shards.reading import ShardSet
from training.tensors import content_hash, load_tensors, save_tensors

LABEL = (
    '[backbone]\nkind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n[text]\nkind = "label"\nwidth = 16\n'
)


def begun(script: str, *words: object) -> dict[str, Tensor]:
    """The weights with which a training begins, and their averages; it is stopped before its first step."""
    found: dict[str, Tensor] = {}

    def fit(self: Loop, start: int) -> int:
        for name, network in self.stage.networks.items():
            found.update({f"{name}.{key}": value.clone() for key, value in network.state_dict().items()})
        found.update({f"ema/{key}": value.clone() for key, value in self.ema.shadow.items()})
        self.save(start, wait=True)  # or a resume would begin anew
        return int(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "fit", fit)
        assert tiny.call(script, *words) == 128 + signal.SIGTERM
    return found


def begins_as(found: dict[str, Tensor], name: str, network: torch.nn.Module) -> None:
    """Weights and averages of network `name` are those of `network`."""
    for key, value in network.state_dict().items():
        assert torch.equal(found[f"{name}.{key}"], value), key
        assert torch.equal(found.get(f"ema/{name}.{key}", value), value), key
    assert any(key.startswith(f"ema/{name}.") for key in found)


def test_stage_one_begins_with_the_weights_of_another_run(autoencoder: Path, shapes: Path, tmp_path: Path) -> None:
    words = ("--data", shapes, "--output", tmp_path / "run", *tiny.AUTOENCODER, "--seed", 5)
    found = begun("train_autoencoder", *words, "--init-from", autoencoder)
    begins_as(found, "autoencoder", load_autoencoder(autoencoder))


@pytest.fixture(scope="module")
def other_words(latents: Path, denoiser: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many words as the denoiser knows, each at the place of another: its frequent words are rare here."""
    known = json.loads((denoiser / "final" / "tokenizer" / "vocabulary.json").read_text())["vocabulary"][4:]
    swapped = dict(zip(known, reversed(known), strict=True))
    return retold(latents, tmp_path_factory.mktemp("words") / "latents",
                  lambda caption: " ".join(swapped[word] for word in split(caption)))  # fmt: skip


def test_stage_two_begins_with_the_weights_and_words_of_another_run(
    denoiser: Path, other_words: Path, tmp_path: Path
) -> None:
    """Captions whose own vocabulary would be as large, in another order: the same words keep the same vectors."""
    words = ("--latents", other_words, *tiny.DENOISER, "--output")
    begun("train_denoiser", *words, tmp_path / "own")
    found = begun("train_denoiser", *words, tmp_path / "run", "--init-from", denoiser, "--seed", 5)
    donor = load_pipeline(denoiser, "cpu")
    begins_as(found, "denoiser.backbone", donor.denoiser.backbone)  # type: ignore[arg-type]
    begins_as(found, "denoiser.text", donor.text)
    own, ours, theirs = (
        (run / "final" / "tokenizer" / "vocabulary.json").read_text()
        for run in (tmp_path / "own", tmp_path / "run", denoiser)
    )
    assert ours == theirs != own and len(json.loads(own)["vocabulary"]) == len(json.loads(theirs)["vocabulary"])
    record = json.loads((tmp_path / "run" / "run.json").read_text())["hashes"]
    assert record["vocabulary"] == donor.hashes["vocabulary"] == vocabulary_hash(theirs)
    assert tiny.call("train_denoiser", *words, tmp_path / "run", "--resume", "auto", "--seed", 5) == 0  # its own now
    assert load_pipeline(tmp_path / "run", "cpu").hashes["vocabulary"] == record["vocabulary"]

    problem = tiny.refused("train_denoiser", *words, tmp_path / "own", "--resume", "auto", "--init-from", denoiser)
    assert problem.code == 4 and "leave --init-from out" in problem.hint
    assert record["vocabulary"][:12] in problem.what and vocabulary_hash(own)[:12] in problem.what
    assert tiny.call("train_denoiser", *words, tmp_path / "own", "--resume", "auto") == 0  # the hint, followed


def test_what_init_from_refuses(denoiser: Path, latents: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", "--init-from", denoiser, *tiny.DENOISER)
    problem = tiny.refused("train_denoiser", *words, "--text.length", "9")
    assert problem.code == 2 and "the vocabulary is for 32 tokens, the config asks for 9" in problem.what
    (config := tmp_path / "label.toml").write_text(LABEL)
    problem = tiny.refused("train_denoiser", *words[:6], "--config", config, *tiny.SHORT)
    assert problem.code == 4 and "is of the kind scratch, this config's is label" in problem.what
    assert not (tmp_path / "run" / "run.json").exists()
    advised = problem.hint.removeprefix("give ").partition(", or ")[0].split()
    assert advised[0] == "--config" and tiny.call("train_denoiser", *words[:6], *advised, "--device", "cpu") == 0


def test_labels_keep_their_places(latents: Path, tmp_path: Path) -> None:
    """A donor of four classes: two of them, in a set of their own, are not the first two; a fifth has no place."""
    names = {word: f"thing {word}" for word in "abcd"}

    def classes(kept: str, folder: str) -> Path:
        return retold(latents, tmp_path / folder, lambda caption: names[kept[len(caption) % len(kept)]])

    (config := tmp_path / "label.toml").write_text(LABEL)
    words = ("--config", config, *tiny.SHORT, "--max-steps", "1", "--output")
    assert tiny.call("train_denoiser", "--latents", classes("abcd", "four"), *words, tmp_path / "donor") == 0
    donor = load_pipeline(tmp_path / "donor", "cpu").text
    asked = (*words, tmp_path / "run", "--init-from", tmp_path / "donor", "--seed", "5")
    begins_as(begun("train_denoiser", "--latents", classes("cd", "two"), *asked), "denoiser.text", donor)
    names["a"] = "thing <new>"
    asked = (*words, tmp_path / "no", "--init-from", tmp_path / "donor")
    given = ("--latents", classes("abcd", "new"), *asked)
    problem = tiny.refused("train_denoiser", *given)
    assert problem.code == 3 and "caption 'thing <new>' is not one of the 4 labels" in problem.what
    assert "--init-from RUN --new-words" in problem.hint and tiny.call("train_denoiser", *given[:-2]) == 0
    grown = (*given[:-3], tmp_path / "grown", *given[-2:], "--new-words")
    found = begun("train_denoiser", *grown)["denoiser.text.embedding.weight"]
    assert torch.equal(found[:5], donor.embedding.weight) and found.shape[0] == 6 and found[5].any()  # with the null
    assert tiny.call("train_denoiser", *grown, "--resume", "auto") == 0
    assert load_pipeline(tmp_path / "grown", "cpu").text.classes == (*donor.classes, "thing <new>")  # type: ignore


def test_new_words_get_rows_after_those_of_the_donor(
    latents: Path, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And only when asked for; the run keeps its vocabulary when it goes on."""
    told = retold(latents, tmp_path / "told", lambda caption: f"{caption} zeb" + " blicket" * ("red" in caption))
    words = ("--latents", told, *tiny.DENOISER, "--max-steps", "2", "--init-from", denoiser, "--output")
    asked = [*words, tmp_path / "run", "--new-words"]
    begun("train_denoiser", *words, tmp_path / "without")
    count = len(ShardSet(told))
    said = capsys.readouterr().err
    assert f"{denoiser} has no row for 2 words of the captions ('zeb', 'blicket'): {count} captions have one" in said
    found = begun("train_denoiser", *asked)
    donor = load_pipeline(denoiser, "cpu")
    begins_as(found, "denoiser.backbone", donor.denoiser.backbone)  # type: ignore[arg-type]
    known = donor.text.tokenizer.vocabulary  # type: ignore[union-attr,operator]
    rows = found.pop("denoiser.text.words.weight")
    begins_as({**found, "denoiser.text.words.weight": rows[: len(known)],
               "ema/denoiser.text.words.weight": found["ema/denoiser.text.words.weight"][: len(known)]},
              "denoiser.text", donor.text)  # fmt: skip
    assert rows.shape[0] == len(known) + 2 and 0.5 < rows[len(known) :].std() < 1.5
    said = capsys.readouterr().err
    assert f"2 words or labels added to the vocabulary of {denoiser}: 'zeb', 'blicket'" in said
    assert "has no row" not in said and "read as unknown" not in said
    record = json.loads((tmp_path / "run" / "run.json").read_text())["hashes"]["vocabulary"]
    assert record[:12] in said and record != donor.hashes["vocabulary"]
    assert tiny.call("train_denoiser", *asked, "--resume", "auto") == 0
    run = load_pipeline(tmp_path / "run", "cpu")
    assert run.text.tokenizer.vocabulary == (*known, "zeb", "blicket")  # type: ignore[union-attr,operator]
    assert run.hashes["vocabulary"] == record
    again = begun("train_denoiser", *words[:-2], tmp_path / "run", "--output", tmp_path / "third", "--new-words")
    assert again["denoiser.text.words.weight"].shape == rows.shape  # nothing is left to be added


def test_a_frozen_text_encoder_takes_no_new_words() -> None:
    for given, config in ((True, Scratch()), (False, HuggingFace())):
        refuse_new_words(Namespace(new_words=given, init_from="RUN", base=None), config)
    with pytest.raises(UserError, match="--new-words: a frozen text encoder learns no words") as refused:
        refuse_new_words(Namespace(new_words=True, init_from="RUN", base=None), HuggingFace())
    assert refused.value.code == 2 and refused.value.hint.startswith("leave --new-words out")


def test_new_words_need_a_run_whose_words_they_are_added_to(latents: Path, denoiser: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, *tiny.DENOISER, "--output", tmp_path / "run", "--new-words")
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 2 and "none is named" in problem.what and "--init-from RUN" in problem.hint
    assert tiny.call("train_denoiser", *words, "--init-from", denoiser) == 0


def test_a_run_goes_on_with_its_own_vocabulary_alone(latents: Path, tmp_path: Path) -> None:
    words = ("--latents", latents, "--output", tmp_path / "run", *tiny.DENOISER)
    begun("train_denoiser", *words)
    known = json.loads((tmp_path / "run" / "run.json").read_text())["hashes"]["vocabulary"]
    file = tmp_path / "run" / "final" / "tokenizer" / "vocabulary.json"
    swap_words(file)
    problem = tiny.refused("train_denoiser", *words, "--resume", "auto")
    assert problem.code == 4 and "--init-from" in problem.hint
    assert f"hashes vocabulary {known[:12]}, now given {vocabulary_hash(file.read_text())[:12]}" in problem.what
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["hashes"]["vocabulary"]  # as in runs that were begun before it was named
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    begun("train_denoiser", *words, "--resume", "auto")


def swap_words(file: Path) -> str:
    """Two words of a stored vocabulary change places; the hash it has now."""
    stored = json.loads(file.read_text())
    stored["vocabulary"][4:6] = reversed(stored["vocabulary"][4:6])
    file.write_text(json.dumps(stored))
    return vocabulary_hash(file.read_text())


def shift(file: Path) -> str:
    """One weight of a file changes; the hash it has now."""
    tensors = load_tensors(file)
    name = next(key for key, value in sorted(tensors.items()) if value.is_floating_point())
    tensors[name] = tensors[name] + 1
    save_tensors(file, tensors)
    return content_hash(tensors)


CHANGES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "autoencoder": ("autoencoder/model.safetensors", shift),
    "denoiser": ("model.safetensors", shift),
    "text_encoder": ("text_encoder/model.safetensors", shift),
    "vocabulary": ("tokenizer/vocabulary.json", swap_words),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_copied_model_with_another_part_is_refused(name: str, denoiser: Path, tmp_path: Path) -> None:
    """Wherever it lies; one of before these hashes were stored is taken as it is."""
    final = tmp_path / "elsewhere"
    shutil.copytree(denoiser / "final", final)
    known = load_pipeline(final, "cpu").hashes[name]
    assert json.loads((final / INGREDIENTS).read_text())[name] == known
    file, change = CHANGES[name]
    found = change(final / file)
    problem = tiny.refused(
        "generate", "--model", final, "--prompt", "x", "--output", tmp_path / "no", "--device", "cpu"
    )
    assert problem.code == 4 and "put back" in problem.hint and not (tmp_path / "no").exists()
    assert f"is {found[:12]}, the denoiser was trained with {known[:12]}" in problem.what
    assert str(final / Path(file).parts[0]) in problem.what
    (final / INGREDIENTS).unlink()
    assert load_pipeline(final, "cpu").hashes[name] == found
    (final / INGREDIENTS).write_text("[]")
    with pytest.raises(UserError, match=r"ingredients\.json: expected an object"):
        load_pipeline(final, "cpu")


def test_a_vocabulary_of_other_size_is_named_and_not_its_weights(denoiser: Path, tmp_path: Path) -> None:
    shutil.copytree(denoiser / "final", tmp_path / "final")
    file = tmp_path / "final" / "tokenizer" / "vocabulary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocabulary": ["<pad>", "<unk>", "<start>", "<end>"]}))
    with pytest.raises(UserError, match="tokenizer is .* the denoiser was trained with"):
        load_pipeline(tmp_path / "final", "cpu")


def test_a_checkpoint_is_not_held_to_the_weights_of_the_end(denoiser: Path, tmp_path: Path) -> None:
    """But to what did not change in training."""
    run = tmp_path / "run"
    shutil.copytree(denoiser, run)
    known = json.loads((run / "final" / INGREDIENTS).read_text())
    (run / "final" / INGREDIENTS).write_text(json.dumps(known | dict.fromkeys(("denoiser", "text_encoder"), "0" * 64)))
    newest = max((run / "checkpoints").glob("step-*"))
    assert load_pipeline(newest, "cpu").hashes == known
    with pytest.raises(UserError, match="the denoiser was trained with 000000000000"):
        load_pipeline(run, "cpu")
    swap_words(run / "final" / "tokenizer" / "vocabulary.json")
    with pytest.raises(UserError, match=f"tokenizer is .* trained with {known['vocabulary'][:12]}"):
        load_pipeline(newest, "cpu")


def test_an_autoencoder_is_hashed_once(denoiser: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw with it, and to name it in pictures; its preview, of the same shape here, once too."""
    own, seen = load_autoencoder(denoiser / "final" / "autoencoder").state_dict(), []

    def counted(tensors: dict[str, Tensor]) -> str:
        seen.append(tensors.keys() & own.keys())
        return content_hash(tensors)

    for module in (assembly, autoencoders):
        monkeypatch.setattr(module, "content_hash", counted)
    preview = tmp_path / "preview"
    shutil.copytree(denoiser / "final" / "autoencoder", preview)
    known = json.loads((denoiser / "run.json").read_text())["hashes"]["autoencoder"]
    (preview / "teacher.json").write_text(json.dumps({"autoencoder": known}))
    words = ("--model", denoiser, "--prompt", "x", "--steps", "1", "--device", "cpu", "--output")
    for count, more in enumerate(((), ("--preview", preview)), start=1):
        seen.clear()
        assert tiny.call("generate", *words, tmp_path / str(count), *more) == 0
        assert len([keys for keys in seen if keys]) == count


def test_like_a_picture_that_does_not_name_its_words(
    denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of before are taken as they are; one that names other words is refused."""
    words = ("generate", "--model", denoiser, "--device", "cpu", "--output")
    assert tiny.call(*words, tmp_path / "made", "--prompt", "x", "--steps", "2") == 0
    made = tmp_path / "made" / "00000.png"
    facts = grids.facts(made)
    hashes = facts["hashes"]
    assert hashes == json.loads((denoiser / "final" / INGREDIENTS).read_text())
    older = {name: value for name, value in hashes.items() if name != "vocabulary"}
    grids.save(Image.open(made), tmp_path / "older.png", facts | {"hashes": older})
    assert tiny.call(*words, tmp_path / "again", "--like", tmp_path / "older.png") == 0
    assert "the same pixels as" in capsys.readouterr().err
    grids.save(Image.open(made), tmp_path / "other.png", facts | {"hashes": hashes | {"vocabulary": "0" * 64}})
    problem = tiny.refused(*words, tmp_path / "no", "--like", tmp_path / "other.png")
    assert problem.code == 4 and "--model" in problem.hint
    assert f"made with vocabulary 000000000000, this is {hashes['vocabulary'][:12]}" in problem.what
