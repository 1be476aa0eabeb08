"""One rule for links, sizes, shapes, rights and places taken, and every reader and writer that goes by it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rights import deny

from ldm.text import Label
from training.errors import UserError
from training.files import atomic_write, copy_file, hold, write_json
from training.guarding import (
    LARGEST_JSON,
    check_free,
    leads_out,
    no_index,
    read_json,
    read_record,
    read_whole,
    refuse_links,
)
from training.models.assembly import load_pipeline
from training.models.autoencoders import load_autoencoder
from training.models.folders import export, find
from training.models.judge import Classifier, load_classifier
from training.models.lineage import stored_ingredients
from training.models.previews import load_preview
from training.models.text_encoders import stored_vocabulary
from training.pictures import grids
from training.runs.folder import record
from training.tensors import check_weights, load_tensors, save_tensors


@pytest.fixture(params=[0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mode & 0o777 for p in folder.rglob("*") if not p.is_symlink()}


def test_what_is_written_follows_the_umask(umask: int, tmp_path: Path) -> None:
    """safetensors writes through a temporary file of mode 0600, which it keeps."""
    from PIL import Image

    home = tmp_path / "new"
    export(home / "model", {"model": {"kind": "kl"}}, {"w": torch.ones(2)}, {})
    save_tensors(home / "w.safetensors", {"w": torch.ones(2)})
    save_tensors(home / "w.safetensors", {"w": torch.ones(2)})  # over one that is there
    write_json(home / "x.json", {})
    copy_file(home / "x.json", home / "y.json")
    hold(home).close()
    grids.write(Image.new("RGB", (2, 2)), home / "x.png")
    found = modes(tmp_path)
    assert len(found) == 11
    for name, mode in found.items():
        assert mode == (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask, name


@pytest.mark.parametrize("umask", [0o027], indirect=True, ids=oct)
def test_whole_runs_follow_the_umask(umask: int, shapes: Path, tmp_path: Path) -> None:
    """Checkpoints, exports, samples, logs, latents, the classifier: what the group may read, it can."""
    run, latents, second = (tmp_path / name for name in ("run", "latents", "second"))
    words = ("--max-steps", 2, "--save-every", 1)
    assert tiny.call("train_autoencoder", "--data", shapes, "--output", run, *tiny.AUTOENCODER, *words) == 0
    encoded = ("--autoencoder", run, "--data", shapes, "--output", latents, "--device", "cpu")
    assert tiny.call("encode_latents", *encoded) == 0
    assert tiny.call("train_denoiser", "--latents", latents, "--output", second, *tiny.DENOISER, *words) == 0
    drawn = ("--model", second, "--prompt", "x", "--output", tmp_path / "drawn", "--device", "cpu", "--steps", 1)
    assert tiny.call("generate", *drawn) == 0
    found = modes(tmp_path)
    assert sum(name.endswith(".safetensors") for name in found) > 10
    odd = {name: oct(mode) for name, mode in found.items() if mode not in (0o640, 0o750)}
    assert not odd


def link_of(run: Path, name: str, outside: Path) -> None:
    """Put a link out of the run in the place of what is there."""
    path = run / name
    target = outside / Path(name).name
    if path.is_dir():
        shutil.move(path, target)
    elif path.exists():
        shutil.copyfile(path, target)
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


LINKS = (".lock", "metrics.jsonl", "timing.jsonl", "config.json", "run.json", "final", "samples", "checkpoints", "ema",
         "tensorboard", "final/model.safetensors", "final/config.json", "checkpoints/latest", "checkpoints/.tmp-step-1",
         "checkpoints/step-00000006/model.safetensors", "stopped-at-step-00000003.json", "samples/step-00000008",
         "final/autoencoder")  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_run_with_a_link_out_of_it_is_not_gone_on_with(
    name: str, denoiser: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing outside is read, cut, written, moved or deleted, and nothing of it is shown."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(denoiser, run)
    outside.mkdir()
    (outside / ".lock").write_text("a private text")
    link_of(run, name, outside)
    (outside / "own.txt").write_text("kept")
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--max-steps", 8, "--resume", "auto")
    problem = tiny.refused("train_denoiser", *words)
    assert problem.code == 4 and "is a link that leads out of" in problem.what and name in problem.what
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before
    assert "private" not in str(problem) + capsys.readouterr().err
    with pytest.raises(UserError, match="leads out of"):
        find(run)


def test_the_folder_itself_may_be_a_link_and_lie_behind_one(denoiser: Path, latents: Path, tmp_path: Path) -> None:
    """And links inside may name what is inside; a checkpoint kept elsewhere is gone on with, and left alone."""
    shutil.copytree(denoiser, tmp_path / "disk" / "run")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run = tmp_path / "here"
    run.symlink_to(tmp_path / "runs" / "run")
    (run / "same.json").symlink_to("config.json")
    kept = tmp_path / "elsewhere" / "step-00000006"
    shutil.move(run / "checkpoints" / "step-00000006", kept)
    (run / "checkpoints" / "step-00000006").symlink_to(kept)
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    words = ("--latents", latents, "--output", run, *tiny.DENOISER, "--max-steps", 8, "--save-every", 1)
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
    assert load_pipeline(run, "cpu") is not None


def test_a_snapshot_of_the_hub_is_made_of_links(denoiser: Path, tmp_path: Path) -> None:
    """To blobs/ beside it, which is where they may lead; nowhere else."""
    home = tmp_path / "models--someone--something"
    snapshot, blobs = home / "snapshots" / "3f2a", home / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in (denoiser / "final").rglob("*") if p.is_file())):
        shutil.copyfile(path, blobs / str(number))
        place = snapshot / path.relative_to(denoiser / "final")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    assert load_pipeline(snapshot, "cpu") is not None
    (snapshot / "more").symlink_to(tmp_path)
    with pytest.raises(UserError, match="more is a link that leads out"):
        load_pipeline(snapshot, "cpu")


def test_latents_with_a_link_are_not_trained_on_nor_encoded_into(
    autoencoder: Path, shapes: Path, latents: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "latents"
    shutil.copytree(latents, copied)
    link_of(copied, "autoencoder", tmp_path)
    words = ("--latents", copied, "--output", tmp_path / "run", *tiny.DENOISER)
    assert "leads out of" in tiny.refused("train_denoiser", *words).what
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", copied, "--device", "cpu")
    before = {p: p.read_bytes() for p in (tmp_path / "autoencoder").iterdir()}
    assert "leads out of" in tiny.refused("encode_latents", *words).what
    assert {p: p.read_bytes() for p in (tmp_path / "autoencoder").iterdir()} == before


def test_pictures_are_written_in_the_place_of_links(denoiser: Path, tmp_path: Path) -> None:
    """`generate --overwrite` replaces the link, and leaves what it names."""
    (tmp_path / "out").mkdir()
    for name in ("00000.png", "grid.png"):
        (tmp_path / name).write_text("mine")
        (tmp_path / "out" / name).symlink_to(tmp_path / name)
    words = ("--model", denoiser, "--prompt", "x", "--output", tmp_path / "out", "--device", "cpu", "--steps", 1)
    assert tiny.call("generate", *words, "--overwrite") == 0
    for name in ("00000.png", "grid.png"):
        assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).stat().st_size > 20


def test_one_file_is_replaced_only_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    check_free(path, False)
    check_free(None, False)
    path.write_text("mine")
    with pytest.raises(UserError, match="already exists") as caught:
        check_free(path, False, "--grid")
    assert caught.value.code == 2 and caught.value.hint == "use --overwrite, or another --grid"
    check_free(path, True)  # the hint, followed
    with pytest.raises(UserError, match="already exists") as caught:
        check_free(path, None)
    assert "--overwrite" not in caught.value.hint
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists"):
        check_free(path, False)
    with pytest.raises(UserError, match="is a folder"):
        check_free(tmp_path, True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder") as caught:
        check_free(tmp_path / "file" / "x.json", True, "--grid")
    assert caught.value.code == 6 and "--grid" in caught.value.hint


def test_what_is_no_folder_of_shards_says_how_to_make_one(tmp_path: Path) -> None:
    """Not there, a file, the pictures themselves, a packing that was not finished, tars of others."""
    there = tmp_path / "there"
    told = no_index(there)
    assert told.what == f"{there}: no such folder" and told.hint.endswith(f"pack SOURCE --output {there}")
    assert f"--data PICTURES --output {there}" in no_index(there, latents=True).hint
    there.touch()
    assert no_index(there).what == f"{there}: is not a folder"
    there.unlink()
    there.mkdir()
    (there / "cat.jpg").touch()
    told, packing = no_index(there), f"make_shards.py pack {there} --output DIR"
    assert told.what == f"{there} holds no index.json" and told.hint.endswith(packing)
    for name in ("packing.json", "cats.tar"):
        (there / name).touch()
        assert f"pack SOURCE --output {there}; or index the tars" in no_index(there).hint
        (there / name).unlink()


TAKEN: dict[str, tuple[str, str, str]] = {
    "evaluate": ("--model {run} --obedience shapes --count 1", "--output", "x.json"),
    "evaluate's grid": ("--model {run} --obedience shapes --count 1", "--grid", "x.png"),
    "check_samplers": ("--samplers heun --processes flow --steps 4", "--output", "x.md"),
    "benchmark": ("samplers --samplers heun --steps 1 --side 2", "--output", "x.md"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_every_door_asks_before_it_replaces_a_file(name: str, denoiser: Path, tmp_path: Path) -> None:
    """Before the work, not after it."""
    words, flag, file = TAKEN[name]
    script, path = name.partition("'")[0], tmp_path / file
    path.write_text("mine")
    given = (*words.format(run=denoiser).split(), flag, path)
    problem = tiny.refused(script, *given)
    assert problem.code == 2 and problem.what == f"{path} already exists" and path.read_text() == "mine"
    assert tiny.call(script, *given, "--overwrite") == 0 and path.read_bytes() != b"mine"


def test_a_classifiers_folder_is_no_place_for_another(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    problem = tiny.refused("train_classifier", "--data", shapes, "--output", tmp_path, "--epochs", 1)
    assert problem.code == 2 and "already exists" in problem.what and (tmp_path / "config.json").read_text() == "mine"


def test_a_read_only_disk_is_told_and_its_cleaning_up_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that turns read-only while it is written to refuses the removal of the staged file as well."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def staged() -> None:
        with atomic_write(tmp_path / "x") as file:
            file.write(b"x")

    writers: dict[str, Callable[[], object]] = {
        "staged": staged,
        "weights": lambda: save_tensors(tmp_path / "x.safetensors", {"w": torch.ones(1)}),
        "export": lambda: export(tmp_path / "model", {}, {"w": torch.ones(1)}, {}),
        "copy": lambda: copy_file(tmp_path / "given", tmp_path / "x"),
    }
    (tmp_path / "given").write_text("x")
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    for name, write in writers.items():
        with pytest.raises(UserError, match="Read-only file system") as caught:
            write()
        assert caught.value.code == 6 and str(tmp_path) in caught.value.what and "--output" in caught.value.hint, name


def test_files_are_not_read_beyond_their_kinds_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse one of a terabyte
    with pytest.raises(UserError, match=r"x\.json: larger than 16\.8 MB") as caught:
        read_json(path)
    assert caught.value.code == 4
    path.write_bytes(b"1" * 11)
    assert len(read_whole(path, limit=11)) == 11
    with pytest.raises(UserError, match="larger than"):
        read_whole(path, limit=10)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a plain file"):
        read_json(path)
    with pytest.raises(UserError, match="safetensors"):
        load_tensors(path)
    assert LARGEST_JSON == 16 << 20


def test_what_is_forbidden_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.json").write_text("{}")
    deny(monkeypatch, "x.json")
    for read in (read_json, load_tensors):
        with pytest.raises(UserError, match=r"x\.json: cannot be read \(Permission denied\)") as caught:
            read(tmp_path / "x.json")
        assert "damaged" not in str(caught.value) and "owner" in caught.value.hint


def test_a_record_tells_what_is_wrong_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    kinds: dict[str, type] = {"name": str, "width": int}
    for text, says in {
        "[]": "expected an object of JSON, found a list", "null": "found null", "1.5": "found a number",
        "true": "found true or false", '"x"': "found a text", "{}": "has no name", "{": "not readable as JSON",
        '{"name": 1, "width": 1}': "name must be a text, found a whole number",
        '{"name": "x", "width": true}': "width must be a whole number, found true or false",
        '{"name": "x", "width": 1.5}': "width must be a whole number, found a number",
        '{"name": null, "width": 1}': "name must be a text, found null", "\xff": "not readable as JSON",
    }.items():  # fmt: skip
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError) as caught:
            read_record(path, kinds, code=3)
        assert caught.value.code == 3 and str(path) in caught.value.what and says in caught.value.what, text
    path.write_text('{"name": "x", "width": 1, "more": []}')
    assert read_record(path, kinds) == {"name": "x", "width": 1, "more": []}


FORGED = ["[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"classes": null, "width": 4}', '{"classes": [1]}',
          '{"classes": ["a"], "width": -1}', '{"classes": ["a"], "width": 1000000000}', '{"vocabulary": 3}',
          '{"vocabulary": [3], "length": 4}', '{"vocabulary": ["a"], "length": null}', '{"stage": 1}',
          '{"autoencoder": null}', '{"model": null}', '{"model": {"kind": null}}', '{"model": []}']  # fmt: skip


@pytest.mark.parametrize("text", FORGED, ids=lambda text: text[:30])
def test_forged_files_of_runs_are_one_sentence_with_their_name(
    text: str, autoencoder: Path, denoiser: Path, tmp_path: Path
) -> None:
    """Whatever stands in them; what is read of the whole is told, too."""
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    save_tensors(classifier / "model.safetensors", Classifier(("a",), 4).state_dict())
    run = tmp_path / "run"
    shutil.copytree(denoiser / "final", run / "final")
    readers: dict[str, tuple[Path, Callable[[], Any]]] = {
        "classifier": (classifier / "config.json", lambda: load_classifier(classifier)),
        "vocabulary": (run / "tokenizer" / "vocabulary.json", lambda: Label().build(stored_vocabulary(run))),
        "run": (run / "run.json", lambda: record(run)),
        "config": (run / "final" / "config.json", lambda: load_pipeline(run / "final", "cpu")),
    }
    for name, (path, read) in readers.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with pytest.raises((UserError, ValueError)) as caught:
            found = read()
            raise AssertionError(f"{name}: read as {found!r:.80}")
        told = name == "vocabulary" or str(path.parent) in str(caught.value)  # a sentence, which its caller completes
        assert told, (name, str(caught.value))
        path.unlink()
    own = run / "ingredients.json"
    own.write_text(text)
    if text.startswith("{"):
        assert stored_ingredients(run) == json.loads(text)
    else:
        with pytest.raises(UserError, match="ingredients.json"):
            stored_ingredients(run)


def test_a_sound_classifier_and_a_teacher(autoencoder: Path, tmp_path: Path) -> None:
    model = Classifier(("a", "b"), 4).eval()
    save_tensors(tmp_path / "model.safetensors", model.state_dict())
    write_json(tmp_path / "config.json", {"classes": ["a", "b"], "width": 4})
    found, pixels = load_classifier(tmp_path), torch.rand(1, 3, 8, 8)
    assert found.classes == ("a", "b") and torch.equal(found(pixels), model(pixels))
    write_json(tmp_path / "config.json", {"classes": ["a"], "width": 4096})  # far more than the file holds
    with pytest.raises(UserError, match="does not fit its config"):
        load_classifier(tmp_path)
    shutil.copytree(autoencoder / "final", tmp_path / "tiny")
    (tmp_path / "tiny" / "teacher.json").write_text('{"autoencoder": 3}')
    with pytest.raises(UserError, match=r"teacher\.json: autoencoder must be a text"):
        load_preview(tmp_path / "tiny", "x", torch.device("cpu"))


@pytest.mark.parametrize(("change", "says"), [
    (lambda t: t.fill_(float("nan")), "is not finite"), (lambda t: t[..., :1].fill_(float("-inf")), "is not finite"),
    (lambda t: t.to(torch.int8), "is int8"), (lambda t: t > 0, "is bool"), (lambda t: t + 0j, "is complex64"),
])  # fmt: skip
def test_weights_that_are_no_numbers_do_not_draw(
    change: Callable[[torch.Tensor], torch.Tensor], says: str, autoencoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(autoencoder / "final", tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    tensors = load_tensors(file)
    key = sorted(k for k in tensors if k.endswith("weight"))[0]
    result = change(tensors[key])
    tensors[key] = tensors[key] if result.shape != tensors[key].shape else result
    save_tensors(file, tensors)
    with pytest.raises(UserError, match=f"{key} {says}") as caught:
        load_autoencoder(tmp_path / "x")
    assert caught.value.code == 4 and "model.safetensors" in caught.value.what


def test_half_precision_is_sound() -> None:
    check_weights({"w": torch.ones(2, dtype=torch.bfloat16), "n": torch.ones(2, dtype=torch.long)},
                  {"w": torch.ones(2), "n": torch.ones(2, dtype=torch.long)}, "x")  # fmt: skip


def test_locks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link, a pipe, a socket and a folder are no locks; bytes that are no text are."""
    outside = tmp_path / "outside"
    outside.write_text("private")
    for number, make in enumerate((lambda p: p.symlink_to(outside), os.mkfifo, os.mkdir, bound)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / ".lock")
        with pytest.raises((UserError, OSError)) as caught:
            hold(folder)
        assert "private" not in str(caught.value) and outside.read_text() == "private"
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / ".lock").write_bytes(b"\xff\xfe" * 10_000_000)
    file = hold(folder)
    assert (folder / ".lock").read_text().startswith(f"pid {os.getpid()} since ")
    assert len(capsys.readouterr().err) < 500
    file.close()


def bound(path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    before = os.getcwd()
    os.chdir(path.parent)  # such names are short
    try:
        server.bind(path.name)
    finally:
        os.chdir(before)
        server.close()


def test_links(tmp_path: Path) -> None:
    (tmp_path / "home" / "in").mkdir(parents=True)
    home = tmp_path / "home"
    (home / "in" / "up").symlink_to("../x")
    (home / "loop").symlink_to("loop")
    refuse_links(home)
    assert leads_out(home / "in" / "up") and not leads_out(home / "in" / "up", home)
    (home / "in" / "out").symlink_to("../../x")
    with pytest.raises(UserError, match=r"in/out is a link that leads out of .*home") as caught:
        refuse_links(home, 3)
    assert caught.value.code == 3


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner))
KEYS = st.sampled_from(["stage", "status", "step", "versions", "resumes", "hashes", "data"])


@given(st.one_of(VALUES, st.dictionaries(KEYS, SCALARS | st.lists(SCALARS) | st.dictionaries(KEYS, SCALARS))))
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")), deadline=None)
def test_a_record_is_read_as_it_stands_or_refused(value: Any) -> None:
    """run.json and ingredients.json by value: what is returned is what was written, of the types that readers need."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("run.json", "ingredients.json"):
            (folder / file).write_text(json.dumps(value))
        try:
            found = record(folder)
            assert found == value and isinstance(found["stage"], str) and isinstance(found["step"], int)
        except UserError as problem:
            assert "run.json" in problem.what
        try:
            assert stored_ingredients(folder) == value and isinstance(value, dict)
        except UserError as problem:
            assert "ingredients.json" in problem.what and not isinstance(value, dict)
