"""Denoiser and decoder as graphs that run by themselves, on any number of pictures."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peers
import portable
import pytest
import tiny
import torch
from portable import EPS, FLOW

from autoencoder import AUTOENCODERS
from ldm.guidance import ClassifierFree
from ldm.noise import Noise
from training.exchange import export_check, graphs
from training.models.assembly import load_pipeline

SMALL = {"kind": "kl", "channels": [8, 8], "groups": 4, "blocks": 1, "mid_attention": False}
UNET = {"kind": "unet", "channels": [8, 8], "blocks": 1, "attention": [1], "heads": 2, "groups": 4, "pooled": True,
        "position": True}  # fmt: skip
DIT = {"kind": "dit", "width": 16, "depth": 1, "heads": 2, "base_size": 8}
SCRATCH = {"kind": "scratch", "width": 16, "depth": 1, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "unet": {"backbone": UNET, "text": SCRATCH, **FLOW},
    "dit": {"backbone": DIT | {"learned_variance": True}, "text": SCRATCH, **EPS},
    "dit in context": {"backbone": DIT | {"text": "in-context", "position": "rope", "pooled": False}, "text": SCRATCH,
                       **FLOW},
    "unet, masked": {"backbone": UNET | {"pooled": False}, "text": SCRATCH, "image": {"kind": "masked"}, **FLOW},
    "dit, low-res": {"backbone": DIT, "text": SCRATCH, "image": {"kind": "low-res", "factor": 2}, **EPS},
    "dit, labels": {"backbone": portable.DIT | {"learned_variance": True}, "text": {"kind": "label", "width": 32},
                    "schedule": {"kind": "edm"}, "prediction": {"kind": "edm"}, "grid": {"kind": "karras"}},
}  # fmt: skip


CAPTIONS = ["blue", "", "red", "blue", "red"]
NARROW = {"channels": [8, 8], "groups": 4, "blocks": 1, "mid_attention": False}
DECODERS: dict[str, dict[str, Any]] = {
    "kl": {"kind": "kl", **NARROW}, "vq": {"kind": "vq", "codes": 16, **NARROW},
    "vq, normalised": {"kind": "vq", "codes": 16, "normalize": True, "codebook_decay": 0.9, **NARROW},
    "fsq": {"kind": "fsq", "levels": [5, 5, 3], **NARROW}, "lfq": {"kind": "lfq", "latent_channels": 4, **NARROW},
    "tiny": {"kind": "tiny", "width": 8, "encoder_blocks": [1, 1], "decoder_blocks": [1, 1]},
    "dc": {"kind": "dc", "channels": [8, 8, 32], "encoder_blocks": [1] * 3, "decoder_blocks": [1] * 3,
           "attention_at": [4], "batch_norm_at": [2], "latent_channels": 4},
    "identity": {"kind": "identity"},
}  # fmt: skip


class Written(NamedTuple):
    """The folder, the pipeline, inputs of five pictures by name, and what its denoiser answers."""

    folder: Path
    pipeline: Any
    given: dict[str, torch.Tensor]
    wanted: torch.Tensor


def written(model: str, home: Path, *flags: str) -> Written:
    source = portable.run(home / "run", model=SMALL, **MODELS[model])
    assert tiny.call("convert_denoiser", "export", source, "--output", home / "out", *flags) == 0
    pipeline = load_pipeline(source, "cpu")
    x, levels, _ = export_check.probe(pipeline)
    given = {"x": torch.cat([x, x[:2]]), "noise_level": torch.cat([levels, levels[:2] + 5])}
    cond = pipeline.text(CAPTIONS)._replace(extras=shown(pipeline, 5))
    given |= {"context": cond.context, "mask": cond.mask, **cond.extras}
    with torch.no_grad():
        wanted = pipeline.denoiser.backbone(given["x"], given["noise_level"], cond)
    assert wanted.std() > 0.01
    pooled = {"pooled": cond.pooled} if model in ("unet", "dit", "dit, low-res", "dit, labels") else {}
    return Written(home / "out", pipeline, given | pooled, wanted)


def shown(pipeline: Any, count: int) -> dict[str, torch.Tensor]:
    """What is shown beside the captions of so many pictures, as the pipeline's image condition has it."""
    generator = torch.Generator().manual_seed(3)
    if pipeline.image.kind == "masked":
        return {"image": torch.randn(count, 5, 8, 8, generator=generator)}
    if pipeline.image.kind == "low-res":
        image = torch.randn(count, 3, 8, 8, generator=generator)
        return {"image": image, "image_level": torch.rand(count, generator=generator)}
    return {}


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """What --pt2 writes of a model, each written once."""
    return functools.cache(lambda model: written(model, tmp_path_factory.mktemp("graphs"), "--pt2"))


@pytest.mark.parametrize("model", MODELS)
def test_a_graph_of_torch_answers_as_the_run(model: str, of_torch: Callable[[str], Written]) -> None:
    folder, pipeline, given, wanted = of_torch(model)
    names = ["README.md", "decoder.pt2", "denoiser.pt2", "steps.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    denoiser, decoder = (torch.export.load(folder / f"{name}.pt2").module() for name in ("denoiser", "decoder"))
    with torch.no_grad():
        torch.testing.assert_close(denoiser(**given), wanted, rtol=0, atol=1e-5)
        for count in (1, 5):
            latents = given["x"][:count]
            torch.testing.assert_close(decoder(latents=latents), pipeline.decode(latents), rtol=0, atol=1e-5)
    text = (folder / "README.md").read_text()
    assert "`denoiser`: x (B, 4, 8, 8) float32, noise_level (B) float32" in text and '"kind":' in text
    assert ("is read behind the channels of x (masked): The mask, 1 in the hole" in text) == ("masked" in model)
    assert ("`image_level`, 0 to 1" in text) == ("image_level (B)" in text) == ("low-res" in model)


@pytest.mark.parametrize("model", MODELS)
def test_graphs_draw_as_the_run_by_what_stands_beside_them(model: str, of_torch: Callable[[str], Written]) -> None:
    """The numbers of steps.json in the lines of README.md, under guidance: DDIM's latents of the same noise."""
    folder, pipeline, given, _ = of_torch(model)
    numbers = json.loads((folder / "steps.json").read_text())
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    network, decoder = (torch.export.load(folder / f"{name}.pt2").module() for name in ("denoiser", "decoder"))
    text = {name: value for name, value in given.items() if name not in ("x", "noise_level")}
    null = pipeline.text([""]).expand(5)
    empty = text | {"context": null.context, "mask": null.mask} | ({"pooled": null.pooled} if "pooled" in text else {})
    noise, plan = Noise.from_seeds(range(5)), dataclasses.replace(pipeline.sampling, guidance=ClassifierFree(scale=3.0))

    def denoiser(x: torch.Tensor, noise_level: torch.Tensor, **told: torch.Tensor) -> Any:
        absent = network(x=x, noise_level=noise_level, **empty)
        return absent + 3 * (network(x=x, noise_level=noise_level, **told) - absent)

    given_to_it = {"denoiser": denoiser, "decoder": decoder, "numbers": numbers, "text": text, "B": 5, "torch": torch}
    denoise = pipeline.guided(CAPTIONS, plan=plan, extras=shown(pipeline, 5))
    with torch.no_grad():
        wanted = pipeline.latents(denoise, noise, (4, 8, 8), plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda count, *shape: noise.normal(shape, "prior"))
            exec(code, given_to_it)
    assert plan.sampler.kind == "ddim" and len(numbers["steps"]) == plan.steps == 8
    spread = float(wanted.std())
    torch.testing.assert_close(given_to_it["x"], wanted, rtol=0, atol=1e-4 * spread)
    torch.testing.assert_close(given_to_it["pictures"], pipeline.decode(wanted), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_of_every_autoencoder_is_a_graph(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those with a codebook too, for any number of pictures, however many are compared with the codes at once."""
    monkeypatch.setattr("autoencoder.quantizer.SCORES_AT_ONCE", 16 * 64)  # the positions of one picture
    assert {model["kind"] for model in DECODERS.values()} == {kind().kind for kind in AUTOENCODERS}
    _, network = peers.stored(tmp_path / "ae", DECODERS[name])
    latents = torch.randn(5, network.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        graph = graphs.Graph(graphs.DecoderGraph(network), {"latents": latents[:3]})
        found = graphs.WRITERS["pt2"](tmp_path / "a.pt2", graph)
        again = torch.export.load(tmp_path / "a.pt2").module()
        pictures = network.decode(latents)
        torch.testing.assert_close(again(latents=latents), pictures, rtol=0, atol=1e-5)
    assert found < 1e-5 and pictures.flatten(1).std(0).max() > 0.01


def test_onnx_that_is_not_installed_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    source = portable.run(tmp_path / "run", model=SMALL, **MODELS["unet"])
    problem = tiny.refused("convert_denoiser", "export", source, "--output", tmp_path / "out", "--onnx")
    assert problem.what == "--onnx needs onnx, which is not installed" and "[export]" in problem.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.onnx
@pytest.mark.parametrize("model", MODELS)
def test_onnx_answers_as_the_run(model: str, tmp_path: Path) -> None:
    import onnxruntime

    folder, pipeline, given, wanted = written(model, tmp_path, "--onnx")
    denoiser, decoder = (onnxruntime.InferenceSession(str(folder / f"{name}.onnx")) for name in ("denoiser", "decoder"))
    (answer,) = denoiser.run(None, {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(answer), wanted, rtol=0, atol=1e-4)
    (pictures,) = decoder.run(None, {"latents": given["x"].numpy()})
    torch.testing.assert_close(torch.from_numpy(pictures), pipeline.decode(given["x"]), rtol=0, atol=1e-4)


def test_flags_of_the_other_way_are_refused(tmp_path: Path) -> None:
    for flag in (["--pt2"], ["--onnx"], ["--single-file", "a.safetensors"]):
        problem = tiny.refused("convert_denoiser", "import", tmp_path, "--output", tmp_path / "out", *flag)
        assert problem.what == f"{flag[0]} belongs to export"
    both = ["--pt2", "--single-file", "a.safetensors"]
    assert "different" in tiny.refused("convert_denoiser", "export", tmp_path, "--output", tmp_path / "o", *both).what
