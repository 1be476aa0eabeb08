"""Hugging Face text encoders from folders, kept with what they were used for, and nothing else taken for them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import torch

from ldm.text import HuggingFace
from training.data.latents import Latents
from training.errors import UserError
from training.models import pretrained, text_encoders
from training.models.assembly import load_pipeline
from training.shards.reading import ShardSet

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue", "green", "circle", "square", "triangle", "the", "left"]
SETTINGS = HuggingFace(length=12)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPTextConfig(vocab_size=13, projection_dim=8, max_position_embeddings=16, **shape, **ids)
    return CLIPTextModelWithProjection(config)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def bert() -> Any:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=13, max_position_embeddings=16, **shape))


MODELS: dict[str, Callable[[], Any]] = {"clip": clip, "t5": t5, "bert": bert}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny encoders, each saved as transformers saves them."""
    home = tmp_path_factory.mktemp("encoders")
    for seed, (name, build) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        build().save_pretrained(home / name)
        tokenizer().save_pretrained(home / name)
    return {name: home / name for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_load(folders: dict[str, Path], name: str) -> None:
    encoder = text_encoders.load_huggingface(SETTINGS, str(folders[name]))
    cond = encoder(["a red circle", ""])
    assert cond.context.shape == (2, 12, 16) and cond.mask.sum(1).tolist() == [5, 2]
    assert cond.pooled is not None and cond.pooled.shape == (2, 8 if name == "clip" else 16)
    assert not encoder.trainable and not any(p.requires_grad for p in encoder.parameters())


def test_no_bars_of_libraries_and_the_next_step_takes_the_encoder(
    folders: dict[str, Path], autoencoder: Path, shapes: Path, tmp_path: Path
) -> None:
    """In a process of its own, where the bars of transformers would be."""
    words = ["--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "latents", "--device", "cpu"]
    words += ["--text-encoder", folders["clip"], "--text-length", "12", "--text-lower"]
    done = tiny.spawn(tiny.SCRIPTS / "encode_latents.py", *words)
    assert done.returncode == 0 and not re.search(r"[\r\x1b]", done.stderr), done.stderr
    *_, command = done.stderr.splitlines()
    flags = shlex.split(command.removeprefix("next: "))[2:]
    of_text = ["--text.length", "12", "--text.pooling", "auto", "--text.lower", "true"]
    wanted = ["--text.kind", "huggingface", *of_text, "--text-encoder", str(folders["clip"])]
    assert flags[flags.index("--text.kind") :] == wanted
    assert tiny.call("train_denoiser", *flags, *tiny.DENOISER[:6], *tiny.SHORT, "--max-steps", "1") == 0


def damaged(folder: Path, target: Path, file: str, data: bytes | None) -> Path:
    shutil.copytree(folder, target)
    (target / file).unlink() if data is None else (target / file).write_bytes(data)
    return target


def test_what_cannot_be_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = (folders["bert"] / "model.safetensors").read_bytes()
    cases = {
        "empty": tmp_path,
        "config": damaged(folders["bert"], tmp_path / "a", "config.json", b"{"),
        "kind": damaged(folders["bert"], tmp_path / "b", "config.json", b'{"model_type": "no-such-model"}'),
        "weights": damaged(folders["bert"], tmp_path / "c", "model.safetensors", None),
        "truncated": damaged(folders["bert"], tmp_path / "d", "model.safetensors", whole[: len(whole) // 2]),
        "garbage": damaged(folders["bert"], tmp_path / "e", "model.safetensors", b"garbage"),
    }
    for name, folder in cases.items():
        with pytest.raises(UserError) as caught:
            text_encoders.load_huggingface(SETTINGS, str(folder))
        problem = caught.value
        assert problem.code == 3 and "cannot be loaded" in problem.what and "model.safetensors" in problem.hint, name
        assert "\n" not in problem.what, name


def test_remote_code_is_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((folders["bert"] / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    folder = damaged(folders["bert"], tmp_path / "x", "config.json", json.dumps(config).encode())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(UserError):
        text_encoders.load_huggingface(SETTINGS, str(folder))
    assert not (tmp_path / "canary").exists()


def test_a_length_that_does_not_fit(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="positions") as caught:
        text_encoders.load_huggingface(HuggingFace(length=77), str(folders["bert"]))
    assert caught.value.code == 2 and "[text]" in caught.value.hint


@pytest.mark.parametrize("name", MODELS)
def test_kept_and_found_again(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    encoder = text_encoders.load_huggingface(SETTINGS, str(folders[name]))
    text_encoders.keep(encoder, str(folders[name]), tmp_path)
    again = text_encoders.load_stored(SETTINGS, tmp_path)
    assert torch.equal(again(["a blue square"]).context, encoder(["a blue square"]).context)
    assert text_encoders.load_stored(SETTINGS, tmp_path, str(folders[name])) is not None
    stored = (tmp_path / "text_encoder" / "identity.json").read_text()
    assert json.loads(stored)["name"] == name and str(folders[name]) not in stored


def test_another_encoder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    text_encoders.keep(text_encoders.load_huggingface(SETTINGS, str(folders["bert"])), "bert", tmp_path)
    stored = json.loads((tmp_path / "text_encoder" / "identity.json").read_text())["hash"][:12]
    for settings, override, said in (
        (SETTINGS, str(folders["t5"]), stored),
        (HuggingFace(length=11), str(folders["t5"]), stored),
        (HuggingFace(length=11), None, "but text.length is 11, not 12\nhint: set text.length to 12"),
        (HuggingFace(length=12, masked=False), None, "but text.masked is false, not true\n"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            text_encoders.load_stored(settings, tmp_path, override)
        assert caught.value.code == 4
    with pytest.raises(UserError, match="no such file") as caught:
        text_encoders.load_stored(SETTINGS, tmp_path / "nothing")
    assert caught.value.code == 4


def otherwise(part: str) -> Any:
    """The tokenizer above with one thing changed that neither its vocabulary nor its settings tell."""
    from tokenizers import normalizers, pre_tokenizers

    changed = tokenizer()
    if part == "lower-casing":
        changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif part == "pre-tokenizer":
        changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return changed


def merging(*merges: tuple[str, str]) -> Any:
    """A tokenizer of letters, whose merges in their order decide what "abc" becomes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "b", "c", "ab", "bc"])}
    words = Tokenizer(models.BPE(known, list(merges), unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")


TOKENIZERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "lower-casing": (tokenizer, lambda: otherwise("lower-casing"), "A Red circle"),
    "pre-tokenizer": (tokenizer, lambda: otherwise("pre-tokenizer"), "a red, circle"),
    "merges": (lambda: merging(("a", "b"), ("b", "c")), lambda: merging(("b", "c"), ("a", "b")), "abc"),
}


@pytest.mark.parametrize("part", TOKENIZERS)
def test_another_tokenizer_is_refused(part: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Of the same words and weights, which reads a caption otherwise; what was stored before this was told is valid."""
    encoders = []
    for number, make in enumerate(TOKENIZERS[part][:2]):
        folder = tmp_path / str(number)
        shutil.copytree(folders["bert"], folder)
        make().save_pretrained(folder)
        encoders.append(text_encoders.load_huggingface(SETTINGS, str(folder)))
    ours, theirs = map(text_encoders.identity, encoders)
    contexts = [encoder([TOKENIZERS[part][2]]).context for encoder in encoders]
    assert ours["hash"] == theirs["hash"] and not torch.equal(*contexts)
    # How long captions are, as they were just read, is no part of it.
    assert text_encoders.identity(encoders[0]) == ours
    text_encoders.keep(encoders[0], str(tmp_path / "0"), tmp_path)
    assert text_encoders.identity(text_encoders.load_stored(SETTINGS, tmp_path))["tokenizer"] == ours["tokenizer"]
    for given in (lambda: text_encoders.load_stored(SETTINGS, tmp_path, str(tmp_path / "1")),
                  lambda: text_encoders.keep(encoders[1], str(tmp_path / "1"), tmp_path)):  # fmt: skip
        with pytest.raises(UserError, match="the tokenizer of text encoder") as caught:
            given()
        assert caught.value.code == 4 and "--text-encoder" in caught.value.hint
        assert ours["tokenizer"][:12] in caught.value.what and theirs["tokenizer"][:12] in caught.value.what
    assert text_encoders.load_stored(SETTINGS, tmp_path, str(tmp_path / "0"))  # the hint, followed
    record = tmp_path / "text_encoder" / "identity.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "tokenizer"}))
    assert text_encoders.load_stored(SETTINGS, tmp_path, str(tmp_path / "1")) is not None


def test_a_run_goes_on_with_its_own_tokenizer(
    folders: dict[str, Path], frozen_config: list[str], latents: Path, tmp_path: Path
) -> None:
    """Also where nothing is stored, and captions are encoded while it trains."""
    encoder = tmp_path / "bert"
    shutil.copytree(folders["bert"], encoder)
    words = ("--latents", latents, "--output", tmp_path / "run", *frozen_config, "--text-encoder", encoder)
    assert tiny.call("train_denoiser", *words, "--max-steps", 1) == 0
    known = json.loads((tmp_path / "run" / "run.json").read_text())["hashes"]["tokenizer"]
    otherwise("lower-casing").save_pretrained(encoder)
    problem = tiny.refused("train_denoiser", *words, "--resume", "auto")
    assert problem.code == 4 and f"hashes tokenizer {known[:12]}, now given " in problem.what
    tokenizer().save_pretrained(encoder)
    assert tiny.call("train_denoiser", *words, "--resume", "auto") == 0
    stored = json.loads((tmp_path / "run" / "final" / "ingredients.json").read_text())
    assert stored["tokenizer"] == known and stored == load_pipeline(tmp_path / "run", "cpu").hashes


def test_a_large_encoder_is_named_not_copied(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_encoders, "LARGE", 10)
    encoder = text_encoders.load_huggingface(SETTINGS, str(folders["bert"]))
    text_encoders.keep(encoder, str(folders["bert"]), tmp_path)
    assert [p.name for p in (tmp_path / "text_encoder").iterdir()] == ["identity.json"]
    assert text_encoders.load_stored(SETTINGS, tmp_path, str(folders["bert"])) is not None
    with pytest.raises(UserError, match="names its text encoder, bert") as caught:
        text_encoders.load_stored(SETTINGS, tmp_path)
    assert caught.value.code == 4 and "--text-encoder" in caught.value.hint


@pytest.fixture
def frozen_config(tmp_path: Path) -> list[str]:
    """The smoke config with a frozen encoder: its own [text] keys belong to another kind."""
    path = tmp_path / "frozen.toml"
    backbone = '[backbone]\nkind = "dit"\nwidth = 16\ndepth = 1\nheads = 2\nbase_size = 8\n'
    path.write_text(f'{backbone}[text]\nkind = "huggingface"\nlength = 12\n')
    return ["--config", str(path), "--sample.steps", "2", *tiny.SHORT, "--max-steps", "2"]


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_trained_on_stored_embeddings_and_on_the_fly(
    name: str, folders: dict[str, Path], frozen_config: list[str], shapes: Path, autoencoder: Path, tmp_path: Path
) -> None:
    """Both ways learn the same (stored ones are float16), and either run draws without the folder it came from."""
    encode = ("--autoencoder", autoencoder, "--data", shapes, "--device", "cpu")
    asked = ("--text-encoder", folders[name], "--text-length", "12")
    assert tiny.call("encode_latents", *encode, "--output", tmp_path / "stored", *asked) == 0
    assert tiny.call("encode_latents", *encode, "--output", tmp_path / "plain") == 0
    data = Latents(ShardSet(tmp_path / "stored"))
    batch = data.__getitem__(0)
    assert batch.text is not None and batch.text.context.dtype == torch.float16
    encoder = text_encoders.load_huggingface(SETTINGS, str(folders[name]))
    cond = encoder(batch.captions)
    theirs = cond.context[0][cond.mask[0]]
    assert torch.allclose(batch.text.context[0].float(), theirs, rtol=2e-3, atol=2e-3)

    assert (
        tiny.call("train_denoiser", "--latents", tmp_path / "stored", "--output", tmp_path / "a", *frozen_config) == 0
    )
    words = ("--latents", tmp_path / "plain", "--output", tmp_path / "b", *frozen_config)
    assert tiny.call("train_denoiser", *words, "--text-encoder", folders[name]) == 0
    for a, b in zip(tiny.rows(tmp_path / "a"), tiny.rows(tmp_path / "b"), strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-2) for key in a)
    for run in ("a", "b"):
        (image,) = load_pipeline(tmp_path / run, "cpu")(["a red circle"])
        assert image.size == (32, 32)


def test_what_a_frozen_denoiser_refuses(
    folders: dict[str, Path], frozen_config: list[str], latents: Path, shapes: Path, autoencoder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    problem = tiny.refused("train_denoiser", "--latents", latents, "--output", run, *frozen_config)
    assert problem.code == 3 and "--text-encoder" in problem.hint
    bad = ("--text-encoder", tmp_path)
    problem = tiny.refused("train_denoiser", "--latents", latents, "--output", run, *frozen_config, *bad)
    assert problem.code == 3 and "cannot be loaded" in problem.what
    encode = ("--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "stored", "--device", "cpu")
    asked = ("--text-encoder", folders["bert"], "--text-length", "12")
    assert tiny.call("encode_latents", *encode, *asked) == 0
    words = ("--latents", tmp_path / "stored", "--output", run, *frozen_config)
    problem = tiny.refused("train_denoiser", *words, "--text-encoder", folders["t5"])
    assert problem.code == 4 and "text encoder" in problem.what
    problem = tiny.refused("train_denoiser", *words, "--text.masked", "false", "--text.length", "16")
    assert problem.code == 4 and "text.length is 16, not 12 and text.masked is false, not true" in problem.what
    assert problem.hint == "set text.length to 12 and text.masked to true"
    follow = [word for part in problem.hint.split(" ", 1)[1].split(" and ") for word in f"--{part}".split(" to ")]
    assert tiny.call("train_denoiser", *words, *follow) == 0  # none of these left a run behind


def test_embeddings_that_float16_cannot_hold(
    folders: dict[str, Path], shapes: Path, autoencoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.text.huggingface import HuggingFaceTextEncoder

    whole = HuggingFaceTextEncoder.encode
    large = lambda self, captions: whole(self, captions)._replace(context=torch.full((len(captions), 12, 16), 1e6))  # noqa: E731
    monkeypatch.setattr(HuggingFaceTextEncoder, "encode", large)
    words = ("--autoencoder", autoencoder, "--data", shapes, "--output", tmp_path / "x", "--device", "cpu")
    problem = tiny.refused("encode_latents", *words, "--text-encoder", folders["t5"], "--text-length", "12")
    assert problem.code == 5 and "not finite" in problem.what and problem.hint.startswith("leave --text-encoder out")
    assert "another --output" in problem.hint
    assert tiny.call("encode_latents", *words, "--output", tmp_path / "y") == 0


def test_the_rule_of_padding_is_no_part_of_what_was_stored_before_it(folders: dict[str, Path]) -> None:
    """Identities of encoders kept by earlier versions hold under the rule they were kept by."""

    def identity(**changes: Any) -> dict[str, Any]:
        encoder = text_encoders.load_huggingface(HuggingFace(length=12, **changes), str(folders["clip"]))
        return text_encoders.identity(encoder)

    for changes in ({"mask_rule": 1}, {"masked": False, "mask_rule": 1}, {"mask_rule": 2}):
        found = identity(**changes)
        settings = {key: found[key] for key in ("length", "pooling", "layer", "lower", "masked")}
        whole = json.dumps([found["weights"], found["vocabulary"], settings], sort_keys=True)
        assert found["hash"] == hashlib.sha256(whole.encode()).hexdigest() and "mask_rule" not in found
    assert identity(masked=False)["hash"] != identity(masked=False, mask_rule=1)["hash"]


def test_a_config_that_asks_for_an_encoder_names_one_that_does_not(latents: Path, tmp_path: Path) -> None:
    alone = ("--device", "cpu", "--batch-size", 8, "--mixed-precision", "no")
    words = ("--latents", latents, "--output", tmp_path / "run", *alone)
    problem = tiny.refused("train_denoiser", *words, "--config", "unet-sd15")
    assert problem.code == 3 and "none was given" in problem.what
    advised = problem.hint.rpartition("as ")[2].split()
    assert advised[0] == "--config" and tiny.call("train_denoiser", *words, *advised, "--dry-run") == 0


@pytest.fixture
def halved(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The folder of an encoder whose weights are stored in half the precision."""
    from transformers import BertModel

    folder = tmp_path / "half"
    BertModel.from_pretrained(folders["bert"]).half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_weights_are_loaded_in_float32_whatever_they_are_stored_as(halved: Path, tmp_path: Path) -> None:
    encoder = text_encoders.load_huggingface(SETTINGS, str(halved))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    text_encoders.keep(encoder, str(halved), tmp_path)
    record = json.loads((tmp_path / "text_encoder" / "identity.json").read_text())
    assert record["dtype"] == "float32"
    for given in (None, str(halved)):
        assert text_encoders.identity(text_encoders.load_stored(SETTINGS, tmp_path, given))["hash"] == record["hash"]


@pytest.mark.parametrize("own", [True, False])
def test_what_was_kept_in_the_files_precision_is_found_again(own: bool, halved: Path, tmp_path: Path) -> None:
    """As earlier versions did under transformers 5, or did not under 4: neither wrote it down."""
    encoder = text_encoders.load_huggingface(SETTINGS, str(halved), "auto" if own else "float32")
    text_encoders.keep(encoder, str(halved), tmp_path)
    path = tmp_path / "text_encoder" / "identity.json"
    record = {key: value for key, value in json.loads(path.read_text()).items() if key != "dtype"}
    path.write_text(json.dumps(record))
    for given in (None, str(halved)):
        again = text_encoders.load_stored(SETTINGS, tmp_path, given)
        assert {p.dtype for p in again.parameters()} == {torch.float16 if own else torch.float32}
        assert torch.equal(again(["a red circle"]).context, encoder(["a red circle"]).context)


@pytest.mark.parametrize(("version", "name"), [("4.50.3", "torch_dtype"), ("4.56.0", "dtype"), ("5.24.0", "dtype")])
def test_the_precision_is_told_under_the_name_that_transformers_reads(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    assert pretrained.in_precision("float32") == {name: "float32"}


def test_of_several_processes_only_the_one_that_draws_loads_it(
    folders: dict[str, Path], frozen_config: list[str], shapes: Path, autoencoder: Path, tmp_path: Path
) -> None:
    """Where embeddings are stored; the run is that of one process."""
    encode = ("--autoencoder", autoencoder, "--data", shapes, "--device", "cpu", "--output", tmp_path / "stored")
    assert tiny.call("encode_latents", *encode, "--text-encoder", folders["clip"], "--text-length", "12") == 0
    words = ["train_denoiser", "--latents", tmp_path / "stored", *frozen_config, "--output"]
    codes = ranks.start(2, tmp_path, *words, tmp_path / "two", wrong={1: "no_text:0"})
    assert codes == [0, 0], ranks.said(tmp_path)
    assert tiny.call(*words, tmp_path / "one") == 0
    for a, b in zip(tiny.rows(tmp_path / "one"), tiny.rows(tmp_path / "two"), strict=True):
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in a)
    more = [*words, tmp_path / "more", "--seed", "5", "--init-from", tmp_path / "one"]
    assert ranks.start(2, tmp_path, *more, wrong={1: "no_text:0"}) == [0, 0], ranks.said(tmp_path)
    encoder = tmp_path / "one" / "final" / "text_encoder"
    (encoder / "model.safetensors").unlink()  # nor is the donor's needed
    assert tiny.call(*words, tmp_path / "last", "--init-from", tmp_path / "one") == 0
    record = json.loads((encoder / "identity.json").read_text())
    (encoder / "identity.json").write_text(json.dumps({**record, "weights": "0" * 64, "hash": "1" * 64}))
    given = ("--init-from", tmp_path / "one", "--text-encoder", folders["clip"])
    assert "the one asked for is 111111111111" in tiny.refused(*words, tmp_path / "no", *given).what
