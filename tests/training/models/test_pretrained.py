"""Models of others: their code is never run, their weights never guessed, and what files name is never fetched."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BitImageProcessor, Dinov2Config, Dinov2Model

from ldm.text import HuggingFace
from training.errors import UserError
from training.models import pretrained, text_encoders
from training.models.vision import load_vision

SETTINGS = HuggingFace(length=12)
SHAPE: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text encoder and a vision model, as transformers saves them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=13, max_position_embeddings=16, intermediate_size=16, **SHAPE)).save_pretrained(
        home / "text"
    )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(home / "text")
    Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2, image_size=28, patch_size=7)).save_pretrained(home / "vision")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size).save_pretrained(home / "vision")
    return {"text": home / "text", "vision": home / "vision"}


def load(kind: str, folder: Path | str) -> Any:
    return text_encoders.load_huggingface(SETTINGS, str(folder)) if kind == "text" else load_vision(str(folder))


def edited(folder: Path, target: Path, file: str, **values: Any) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    old = json.loads((target / file).read_text()) if (target / file).exists() else {}
    (target / file).write_text(json.dumps(old | values))
    return target


CODE = [
    ("text", "config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
    ("text", "tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}),
    ("vision", "config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}),
    ("vision", "preprocessor_config.json", {"AutoImageProcessor": "evil.Processor"}),
]


@pytest.mark.parametrize(("kind", "file", "code"), CODE)
@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_folder_is_never_run_and_nobody_is_asked(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, file: str,
    code: dict[str, Any], known: bool,
) -> None:  # fmt: skip
    """Whatever would be answered: a known type loads by the library's own code, an unknown one is refused."""
    values: dict[str, Any] = {"auto_map": code}
    if not known:
        values |= {"model_type": "custom", "tokenizer_class": "Custom", "image_processor_type": "Custom"}
    folder = edited(folders[kind], tmp_path / "x", file, **values)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    try:
        load(kind, folder)
    except UserError as problem:
        assert problem.code == 3 and "cannot be loaded" in problem.what
    assert answers.tell() == 0 and not (tmp_path / "canary").exists()


def test_what_a_folder_names_elsewhere_is_not_had(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any) -> None:
        raise AssertionError(f"a network was asked: {args}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    for name in folders:
        load(name, folders[name])
        with pretrained.loading("model", str(folders[name]), "") as how:
            assert constants.HF_HUB_OFFLINE and how == {"trust_remote_code": False, "local_files_only": True}
    assert not constants.HF_HUB_OFFLINE  # for a name that the user gives
    demands = {
        "attn_implementation": ("config.json", {"attn_implementation": "org/kernel"}),
        "quantised": ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        "adapter": ("adapter_config.json", {"base_model_name_or_path": "org/model", "peft_type": "LORA"}),
        "timm_backbone": ("config.json", {"model_type": "timm_backbone", "backbone": "resnet18",
                                          "use_pretrained_backbone": True}),
    }  # fmt: skip
    for says, (file, values) in demands.items():
        with pytest.raises(UserError) as caught:
            load("text", edited(folders["text"], tmp_path / says, file, **values))
        assert caught.value.code == 3 and (says in caught.value.what or says == "timm_backbone"), says


def test_a_stored_name_is_not_followed_without_the_flag(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`copied: false` in a stranger's identity.json, with the name of a repository or a path of this machine."""
    text_encoders.keep(load("text", folders["text"]), str(folders["text"]), tmp_path)
    record = tmp_path / "text_encoder" / "identity.json"
    stored = json.loads(record.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(text_encoders, "load_huggingface", lambda *_: pytest.fail("it was loaded"))
        for name in ("org/x", str(folders["text"])):
            record.write_text(json.dumps(stored | {"copied": False, "name": name}))
            with pytest.raises(UserError, match="names its text encoder") as caught:
                text_encoders.load_stored(SETTINGS, tmp_path)
            assert caught.value.code == 4 and "--text-encoder" in caught.value.hint and name in caught.value.what
    assert text_encoders.load_stored(SETTINGS, tmp_path, str(folders["text"]))  # the hint, followed


def test_a_kept_encoder_has_the_modes_of_new_files(folders: dict[str, Path], tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        text_encoders.keep(load("text", folders["text"]), str(folders["text"]), tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o640}


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"name": 1, "copied": true, "hash": "x"}',
     '{"name": "x", "copied": "no", "hash": "x"}', '{"name": "x", "copied": true, "hash": null}'],
)  # fmt: skip
def test_an_identity_of_another_shape(tmp_path: Path, text: str) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "identity.json").write_text(text)
    with pytest.raises(UserError, match=r"identity\.json: ") as caught:
        text_encoders.load_stored(SETTINGS, tmp_path)
    assert caught.value.code == 4


Change = Callable[[dict[str, torch.Tensor]], object]
WRONG: dict[str, tuple[str, Change]] = {
    "none of them": ("lack", lambda t: (t.clear(), t.update(other=torch.zeros(2)))),
    "a layer less": ("lack", lambda t: [t.pop(k) for k in [*t] if "layer.1." in k]),
    "a layer more": ("no place for", lambda t: t.update({k.replace("layer.1.", "layer.2."): v for k, v in t.items()})),
    "another size": ("of another size", lambda t: t.update({k: v.repeat(*[2] * v.ndim) for k, v in t.items()})),
    "not a number": ("is not finite", lambda t: next(v for k, v in t.items() if "layer.1." in k).fill_(float("nan"))),
    "infinite": ("is not finite", lambda t: next(iter(t.values())).view(-1)[:1].fill_(float("inf"))),
}


@pytest.mark.parametrize("kind", ["text", "vision"])
@pytest.mark.parametrize("name", WRONG)
def test_weights_that_are_not_the_models(folders: dict[str, Path], tmp_path: Path, kind: str, name: str) -> None:
    """transformers would fill in random layers, or leave given ones out, with a line in its log at most."""
    says, change = WRONG[name]
    shutil.copytree(folders[kind], tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=says) as caught:
        load(kind, tmp_path / "x")
    assert caught.value.code == 3 and str(tmp_path / "x") in caught.value.what and "give a folder" in caught.value.hint


def test_another_half_and_another_head_are_no_fault(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The text half of a whole CLIP, the encoder of a whole T5, BERT below a head: as they are published."""
    from transformers import BertForMaskedLM, CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**half, "vocab_size": 13, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 8}
    shape = {"projection_dim": 8, "text_config": text, "vision_config": {**half, "image_size": 8, "patch_size": 4}}
    bert = BertConfig(vocab_size=13, max_position_embeddings=16, intermediate_size=16, **SHAPE)
    t5 = T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    models = {
        "clip": CLIPModel(CLIPConfig(**shape)),
        "t5": T5ForConditionalGeneration(t5),
        "bert": BertForMaskedLM(bert),
    }
    for name, model in models.items():
        shutil.copytree(folders["text"], tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        model.save_pretrained(tmp_path / name)
        assert load("text", tmp_path / name)(["red"]).context.isfinite().all(), name
