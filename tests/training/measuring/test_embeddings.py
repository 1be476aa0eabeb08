"""FID's network, DINOv2 and CLIP, of random weights in the layout of the published ones; and scores of captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from training.errors import UserError
from training.files import file_sha256
from training.ledger import Ledger
from training.measuring.clip_score import load_clip_score
from training.measuring.features import load_features
from training.measuring.networks import inception
from training.measuring.networks.embeddings import Preprocessing
from training.tensors import content_hash

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
WORDS = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdeghijlnqrstu")]


def processor(folder: Path, kind: str, side: int) -> None:
    about = {"image_processor_type": kind, "do_resize": True, "size": {"shortest_edge": side + 4}, "resample": 3}
    crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
    rest = {"image_mean": MEAN, "image_std": STD, "do_normalize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(about | crop | rest))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**shape)).eval()
    model.save_pretrained(folder)
    processor(folder, "BitImageProcessor", 28)
    return folder, model


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    processor(folder, "CLIPImageProcessor", 24)
    return folder, model


def pictures(count: int, height: int = 32, width: int = 32) -> Tensor:
    numbers = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=numbers)


def by_pil(picture: Tensor, side: int) -> np.ndarray:
    """Each channel resized as numbers, not rounded to 8 bits: how the authors of FD-DINOv2 do it."""
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in picture]
    return np.stack([np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255) for p in planes])


@pytest.mark.parametrize("side", [28, 80])
def test_pictures_are_resized_as_pil_does(side: int) -> None:
    """Bicubic, antialiased where they become smaller; whole pictures, however wide."""
    picture = pictures(1, 48, 40)[0]
    found = Preprocessing(side, MEAN, STD)(picture[None])[0]
    wanted = (by_pil(picture, side) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert np.abs(found.numpy() - wanted).max() < 1e-3


def test_a_crop_keeps_the_proportions_and_the_middle() -> None:
    """A wide picture whose middle square is the one picture, and its sides another."""
    square = pictures(1, 24, 24)[0]
    wide = torch.cat([torch.zeros(3, 24, 12, dtype=torch.uint8), square, torch.full((3, 24, 12), 255).byte()], 2)
    cropped = Preprocessing(24, MEAN, STD, crop=True)(wide[None])
    torch.testing.assert_close(cropped, Preprocessing(24, MEAN, STD)(square[None]))
    assert not torch.allclose(cropped, Preprocessing(24, MEAN, STD)(wide[None]), atol=0.1)


def test_dinov2_gives_the_class_token_of_whole_pictures(dinov2: tuple[Path, Any]) -> None:
    folder, model = dinov2
    features, shown = load_features(f"dinov2:{folder}"), pictures(3, 40, 32)
    values = torch.stack([torch.from_numpy(by_pil(p, 28)).float() for p in shown]) / 255
    values = (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        wanted = model(pixel_values=values).last_hidden_state[:, 0]
    torch.testing.assert_close(features(shown), wanted, rtol=1e-3, atol=1e-3)
    assert features.dim == 16 and features.facts["weights"] == content_hash(model.state_dict())
    assert "28x28 bicubic" in features.facts["preprocessing"] and features.name.startswith("DINOv2 ")
    assert not features.published  # ViT-L/14 alone is that of FD-DINOv2
    torch.testing.assert_close(features(shown[1:2]), features(shown)[1:2], rtol=1e-4, atol=1e-5)


def test_clip_gives_projected_embeddings_of_length_one(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    features, shown = load_features(f"clip:{folder}"), pictures(4)
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=Preprocessing(24, MEAN, STD)(shown)).last_hidden_state[:, 0]
        wanted = model.visual_projection(model.vision_model.post_layernorm(hidden))
    torch.testing.assert_close(features(shown), wanted / wanted.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert features.dim == 8 and features.name.startswith("CLIP ") and not features.published


def test_a_model_of_another_kind_is_refused(dinov2: tuple[Path, Any], clip: tuple[Path, Any]) -> None:
    """Its numbers would bear a name that is not theirs."""
    for spec, kind in ((f"clip:{dinov2[0]}", "dinov2"), (f"dinov2:{clip[0]}", "clip")):
        with pytest.raises(UserError, match=f"it is a {kind} model") as caught:
            load_features(spec)
        assert caught.value.code == 3
    with pytest.raises(UserError, match="it is a dinov2 model"):
        load_clip_score(str(dinov2[0]), "cpu")


def test_the_score_of_a_caption_is_a_hundred_cosines_from_0_on(clip: tuple[Path, Any]) -> None:
    folder, model = clip
    score, shown = load_clip_score(str(folder), "cpu"), pictures(6)
    captions = ["a", "b c", "bad red", "tea", "the rest", "a" * 40]
    found = score(shown, captions)
    for number, caption in enumerate(captions):
        letters = caption.replace(" ", "")
        ends = [i + 1 for i in range(len(caption)) if caption[i + 1 : i + 2] in ("", " ") and caption[i] != " "]
        marks = {len(caption[:end].replace(" ", "")) - 1 for end in ends}
        ids = [WORDS.index(letter + "</w>" * (place in marks)) for place, letter in enumerate(letters)][:10]
        with torch.no_grad():
            text = model.text_model(input_ids=torch.tensor([[0, *ids, 1]])).last_hidden_state[0, -1]
            text = model.text_projection(text)
            image = load_features(f"clip:{folder}")(shown[number : number + 1])[0]
        wanted = max(0.0, 100 * float(text @ image / text.norm()))
        assert found[number].item() == pytest.approx(wanted, abs=0.02), caption
    assert (found == 0).any() and (found > 0).any()  # both happen among these
    ledger = Ledger()
    score.tell(ledger)
    assert "captions longer than CLIP's text tower reads" in json.dumps(ledger.report()) and len(score.cut) == 1


def test_evaluate_scores_captions_beside_those_of_real_pictures(
    clip: tuple[Path, Any], denoiser: Path, shapes: Path, tmp_path: Path
) -> None:
    """In CLIP's embeddings also its MMD; the network stands in the protocol."""
    folder, model = clip
    words = ["--model", denoiser, "--data", shapes, "--count", 10, "--device", "cpu", "--output", tmp_path / "out.json"]
    assert tiny.call("evaluate", *words, "--clip", folder, "--features", f"clip:{folder}") == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    for name in ("clip_score", "clip_score_real", "clip_mmd", "clip_mmd_training"):
        low, high = numbers[f"{name}_95"]
        assert low <= numbers[name] <= high, name
    same = numbers["protocol"]["comparable"]
    assert same["clip"]["weights"] == same["network"]["weights"] == content_hash(model.state_dict())
    assert "cmmd" not in numbers and "clip_score" in same["measures"] and "clip_mmd" in same["measures"]


@pytest.fixture(scope="module")
def fid_network(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """torch-fidelity's Inception as it is before it reads weights, and these in a file."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *asked, **more: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    file = tmp_path_factory.mktemp("fid") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file, network


@pytest.fixture
def fid_file(fid_network: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """As if that file were the published one."""
    monkeypatch.setattr(inception, "FID_SHA256", file_sha256(fid_network[0]))
    return fid_network


def test_fid_is_named_so_in_its_own_network_alone(fid_file: tuple[Path, Any]) -> None:
    file, network = fid_file
    features, shown = load_features(f"inception:{file}"), pictures(1)
    torch.testing.assert_close(features(shown), network(shown)[0])
    assert features.dim == 2048 and features.published == {"frechet": "fid", "kernel_distance": "kid"}
    assert "TensorFlow 1" in features.facts["preprocessing"]
    assert torch.equal(features(shown[:, :1]), features(shown[:, :1].expand(-1, 3, -1, -1)))  # grey is shown as RGB


def test_another_file_is_not_fids_network(fid_file: tuple[Path, Any], tmp_path: Path) -> None:
    """One weight differs: same keys, same shapes, another network."""
    state = dict(fid_file[1].state_dict())
    state["fc.bias"] = state["fc.bias"] + 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights in which FID is defined") as caught:
        load_features(f"inception:{tmp_path / 'other.pth'}")
    assert "torchvision-inception:FILE" in caught.value.hint and caught.value.code == 3


def test_without_torch_fidelity_its_package_is_named(
    fid_file: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="needs torch-fidelity, which is not installed") as caught:
        load_features(f"inception:{fid_file[0]}")
    assert caught.value.hint == "pip install 'latent-diffusion-from-scratch[metrics]'"
