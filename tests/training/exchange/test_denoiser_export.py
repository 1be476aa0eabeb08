"""Denoisers of ours as pipelines of diffusers': the same text, network and pictures; or refused by name."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import portable
import pytest
import torch
from peers import diffusers
from portable import CLIP, DIT, EPS, FLOW, PIXART, T5, UNET

from autoencoder.dc import DC
from autoencoder.kl import KL
from autoencoder.tiny import Tiny
from autoencoder.vq import FSQ, VQ
from ldm.denoiser import Bound
from ldm.grids import Leading, Trailing
from ldm.guidance import Autoguidance, ByClassifier, ClassifierFree
from ldm.noise import Noise
from ldm.samplers import DDIM, prior, sample
from ldm.samplers.multistep import DPMpp2M
from training.errors import UserError
from training.exchange import denoiser_export, export_check
from training.exchange.denoiser_export import export_denoiser
from training.exchange.export_limits import Facts, obstacles
from training.exchange.scheduler_export import scheduler
from training.files import file_sha256
from training.models.assembly import HashedPipeline, load_pipeline
from training.settings import decoding

LABEL = {"kind": "label", "width": 32}
V = {"schedule": {"kind": "ddpm-scaled-linear", "zero_terminal_snr": True}, "prediction": {"kind": "v"}}
# Each with what opens it, the text encoder it has, and its config.
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "unet": ("StableDiffusionPipeline", "clip", {"backbone": UNET, "text": CLIP, **EPS}),
    "unet, everything": ("StableDiffusionPipeline", "t5", {
        "backbone": UNET | {"head_dim": 8, "depth": 2, "scale_shift": True, "linear_projection": True,
                            "attention": [1], "blocks": 2},
        "text": CLIP, **V, "grid": {"kind": "trailing"}}),
    "unet, older mask rule": ("StableDiffusionPipeline", "bert", {
        "backbone": UNET, "text": CLIP | {"mask_rule": 1}, **EPS}),
    "unet, flow": ("StableDiffusionPipeline", "clip", {
        "backbone": UNET, "text": CLIP, **FLOW, "grid": {"kind": "uniform", "shift": 3.0}}),
    "unet, learned variance": ("StableDiffusionPipeline", "clip", {
        "backbone": UNET | {"learned_variance": True}, "text": CLIP, **EPS}),
    "pixart": ("PixArtAlphaPipeline", "t5", {"backbone": PIXART, "text": T5, **EPS}),
    "pixart, learned variance": ("PixArtAlphaPipeline", "bert", {
        "backbone": PIXART | {"learned_variance": True, "base_size": 4}, "text": T5, **EPS,
        "grid": {"kind": "leading", "offset": 1}}),
    "pixart, flow": ("PixArtAlphaPipeline", "t5", {"backbone": PIXART, "text": T5, **FLOW}),
    "dit": ("DiTPipeline", "", {"backbone": DIT, "text": LABEL, **EPS}),
    "dit, learned variance": ("DiTPipeline", "", {"backbone": DIT | {"learned_variance": True}, "text": LABEL, **EPS}),
}  # fmt: skip
SCRATCH = ["backbone.conditioning", "backbone.cross_norm", "backbone.pooled", "backbone.mlp", "text.kind"]
OWN_UNET = ["backbone.position", "backbone.pooled", "text.kind"]
LISTS = (
    ("pixart pixart-xl-2 unet-sd15 portable-unet portable-dit", []),
    ("dit-s-2-label dit-b-2-label dit-l-2-label dit-xl-2-label", ["backbone.frequency_shift"]),
    ("dit-s dit-b dit-l dit-xl gpu-64 gpu-128 gpu-256 gpus-256 smoke fashion-dit", SCRATCH),
    ("laptop-64 laptop-128 laptop-256 fashion fashion-pixels", OWN_UNET),
    ("quickstart shapes", [OWN_UNET[0], "backbone.query_position", *OWN_UNET[1:]]),
    ("emoji-dit", [*SCRATCH[:-1], "text.lower"]),
    ("upscale-shapes inpaint edit hint", [*OWN_UNET, "image.kind"]),
    ("upscale-emoji", [*OWN_UNET[:-1], "text.masked", "image.kind"]),
    ("emoji-unet", [*OWN_UNET[:-1], "text.masked"]),
)
CONFIGS = {name: keys for names, keys in LISTS for name in names.split()}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("encoders")
    return {"": home} | {kind: portable.encoder(kind, home / kind) for kind in ("clip", "t5", "bert")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, encoders: dict[str, Path]) -> Any:
    """(run, written folder, what was found by comparing them) of a shape, each made once."""
    home, made, compared = tmp_path_factory.mktemp("exported"), {}, export_check._by_diffusers

    def give(name: str) -> tuple[Path, Path, export_check.Errors]:
        if name not in made:
            _, kind, sections = SHAPES[name]
            source, folder = (home / f"{what}-{len(made)}" for what in ("run", "out"))
            portable.run(source, encoders[kind], **sections)
            found = list[export_check.Errors]()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export_check, "_by_diffusers", lambda *given: found.append(compared(*given)) or found[0])
                export_denoiser(str(source), folder)
            made[name] = source, folder, found[0]
        return made[name]  # type: ignore[no-any-return]

    return give


def theirs(folder: Path) -> Any:
    with export_check.quiet(diffusers):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def asked(config: decoding.DenoiserConfig) -> list[str]:
    return ["blue", "red"] if config.text.kind == "label" else ["a red circle", "the blue square"]


def drawn(ours: HashedPipeline, peer: Any, config: decoding.DenoiserConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures of two captions from the same noise, ours and theirs, as 0 to 255."""
    captions = asked(config)
    noise = prior(ours.denoiser.schedule, ours.latent_shape(ours.size), Noise.from_seeds([5, 6]))
    words: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "np"}
    guidance = dataclasses.replace(config.guidance, scale=3.0)
    plan = dataclasses.replace(ours.sampling, steps=8, grid=config.grid, guidance=guidance)
    if config.backbone.kind == "dit":
        words |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": config.text.length}
    got = peer(captions, latents=noise, **words).images
    (own,) = ours.pixels(captions, [5, 6], sampling=plan)
    return own.permute(0, 2, 3, 1).float(), torch.from_numpy(got) * 255


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_opened_whole_and_answers_as_ours(name: str, exported: Any) -> None:
    """No key is missing or over, and text, one call at three levels, encoder, decoder and table are within 1e-5."""
    _, folder, errors = exported(name)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == SHAPES[name][0]
    assert 0 <= max(errors) < 1e-5 and errors.decode > 0
    assert not list(folder.parent.glob(".*")) and (folder / "README.md").is_file()


@pytest.mark.parametrize("name", ["unet", "unet, everything", "pixart", "pixart, learned variance"])
def test_pipelines_draw_the_same_pictures(name: str, exported: Any) -> None:
    source, folder, _ = exported(name)
    ours, peer = load_pipeline(source, "cpu"), theirs(folder)
    config: Any = decoding.decode_stored("denoiser", json.loads((source / "final" / "config.json").read_text()))
    for grid in (Trailing(), Leading(offset=1)):
        kind, settings = scheduler(dataclasses.replace(config, grid=grid))
        peer.scheduler = getattr(diffusers, kind)(**settings)
        own, got = drawn(ours, peer, dataclasses.replace(config, grid=grid))
        assert own.std() > 10
        assert float((own - got).abs().max()) <= 1.5, "a rounding, and no more"


def as_written(folder: Path, ours: HashedPipeline, config: decoding.DenoiserConfig) -> torch.Tensor:
    """The latents after each of 8 steps (8, 2, C, h, w) of two captions, by a pipeline as it stands in a folder."""
    peer, seen = theirs(folder), list[torch.Tensor]()
    noise = prior(ours.denoiser.schedule, ours.latent_shape(ours.size), Noise.from_seeds([5, 6]))
    words: dict[str, Any] = {"num_inference_steps": 8, "guidance_scale": 3.0}
    step = peer.scheduler.step

    def watched(*given: Any, **words: Any) -> Any:
        answer = step(*given, **words)
        seen.append(answer[0][:2] if isinstance(answer, tuple) else answer.prev_sample[:2])  # DiTPipeline: both twice
        return answer

    peer.scheduler.step = watched
    if config.text.kind == "label":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise)
            peer(peer.get_label_ids(asked(config)), **words)
        return torch.stack(seen)
    if config.backbone.kind == "dit":
        words |= {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": config.text.length}
    peer(asked(config), latents=noise, output_type="latent", **words)
    return torch.stack(seen)


def by_ours(
    ours: HashedPipeline, captions: list[str], sampler: Any, times: torch.Tensor, level: Any
) -> torch.Tensor:
    """The same by a sampler of ours at these times, whose network is told `level` of each."""
    seen, noise = list[torch.Tensor](), Noise.from_seeds([5, 6])
    network, process = ours.denoiser.backbone, ours.denoiser.diffusion
    told, null = ours.text(captions), ours.text([""]).expand(2)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> Any:
        absent, answer = (network(x, torch.full((2,), float(level(t))), cond) for cond in (null, told))
        return process.recover(x, absent + 3 * (answer - absent), t)

    x = prior(ours.denoiser.schedule, ours.latent_shape(ours.size), noise)
    bound = Bound(ours.denoiser.schedule, denoise)
    with torch.no_grad():
        sample(sampler, bound, x, times, noise, lambda shot: seen.append(shot.x))
    return torch.stack(seen)


def stored(source: Path) -> Any:
    return decoding.decode_stored("denoiser", json.loads((source / "final" / "config.json").read_text()))


@pytest.mark.parametrize("name", [
    "unet", "unet, everything", "pixart", "pixart, learned variance", "dit", "dit, learned variance",
])  # fmt: skip
def test_tables_are_walked_as_they_are_written(name: str, exported: Any) -> None:
    """The scheduler of the folder, not one of the test's: eps and v, trailing and leading, every step's latents."""
    source, folder, _ = exported(name)
    ours, config = load_pipeline(source, "cpu"), stored(source)
    found = as_written(folder, ours, config)
    times, total = config.grid(8, config.schedule), config.schedule.steps
    wanted = by_ours(ours, asked(config), DDIM(), times, lambda t: t * total - 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.std()))


def test_flow_is_walked_as_it_is_written(exported: Any) -> None:
    """By dpmpp-2m along our shifted times from 0.999 on, where its network is told whole numbers."""
    source, folder, _ = exported("unet, flow")
    ours, config = load_pipeline(source, "cpu"), stored(source)
    found = as_written(folder, ours, config)
    even = 0.999 * torch.arange(8, -1, -1, dtype=torch.float64) / 8
    wanted = by_ours(ours, asked(config), DPMpp2M(), 3 * even / (1 + 2 * even), lambda t: (1000 * t).floor())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.std()))


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"prediction_type": "sample"}), ("unet", {"timestep_spacing": "leading"}),
    ("unet", {"set_alpha_to_one": False, "timestep_spacing": "linspace"}),
    ("unet, learned variance", {"prediction_type": "v_prediction"}),
    ("pixart, learned variance", {"steps_offset": 0}), ("unet, flow", {"flow_shift": 1.0}),
    ("unet, flow", {"prediction_type": "sample"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), WRONG)
def test_a_scheduler_that_walks_otherwise_is_found(
    name: str, changes: dict[str, Any], exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the export itself: the scheduler that was written is asked for its times and a step."""
    source = exported(name)[0]
    kind, settings = scheduler(stored(source))
    monkeypatch.setattr(denoiser_export, "scheduler", lambda config: (kind, settings | changes))
    with pytest.raises(UserError, match="draws otherwise than the run"):
        export_denoiser(str(source), tmp_path / "out")


def test_a_pipeline_saved_and_opened_again_is_the_same(exported: Any, tmp_path: Path) -> None:
    folder = exported("pixart")[1]
    with export_check.quiet(diffusers):
        theirs(folder).save_pretrained(tmp_path / "saved")
        theirs(tmp_path / "saved").save_pretrained(tmp_path / "again")
    files = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        hashes = {file_sha256(home / file) for home in (tmp_path / "saved", tmp_path / "again")}
        assert len(hashes) == 1, file


def test_it_is_opened_without_a_network(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    assert theirs(exported("unet")[1]).unet is not None


def test_the_card_says_how_it_is_called(exported: Any) -> None:
    """The call of README.md, run as it stands."""
    source, folder, _ = exported("dit")
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("PATH OF THIS FOLDER", str(folder))
    with export_check.quiet(diffusers):
        exec(code.replace("picture.png", str(source / "picture.png")), {})
    assert (source / "picture.png").is_file()


def test_the_call_has_the_guidance_that_pipelines_know() -> None:
    """Of other rules none: not their scale, and not the pipeline's own."""
    base: Any = decoding.decode_stored("denoiser", {"backbone": UNET, "text": CLIP, "format": {"version": 3}, **EPS})
    for guidance, said in ((ClassifierFree(scale=3), "3"), (Autoguidance(scale=3), "1"), (ByClassifier(), "1")):
        config = dataclasses.replace(base, guidance=guidance)
        assert denoiser_export.call(config, None)["guidance_scale"] == said


@pytest.mark.parametrize("name", decoding.names("denoiser"))
def test_each_config_is_written_or_refused_by_name(name: str) -> None:
    config = decoding.load("denoiser", name)
    assert isinstance(config, decoding.DenoiserConfig)
    assert [reason.key for reason in obstacles(config, Facts(KL()))] == CONFIGS[name]
    for reason in obstacles(config, Facts(KL())):
        assert reason.why and ("can be written" in reason.instead)


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ve": ({"schedule": {"kind": "ve"}}, ["schedule.kind"]),
    "edm": ({"schedule": {"kind": "edm"}, "prediction": {"kind": "edm"}}, ["schedule.kind"]),
    "gvp": ({"schedule": {"kind": "gvp"}}, ["schedule.kind"]),
    "score": ({"prediction": {"kind": "score"}}, ["prediction.kind"]),
    "flow v": ({"schedule": {"kind": "flow"}, "prediction": {"kind": "v"}}, ["prediction.kind"]),
    "velocity": ({"prediction": {"kind": "velocity"}}, ["prediction.kind"]),
    "layer": ({"text": CLIP | {"layer": -2}}, ["text.layer"]),
    "lower": ({"text": CLIP | {"lower": True}}, ["text.lower"]),
    "odd size": ({"sample": {"size": [20, 16]}}, ["sample.size"]),
    "many": ({"backbone": UNET | {"position": True, "pooled": True}, "text": {"kind": "scratch"}}, OWN_UNET),
    "in context": ({"backbone": PIXART | {"text": "in-context"}, "text": T5}, ["backbone.text"]),
    "transformer": ({"backbone": PIXART | {"qk_norm": True, "norm": "rms", "position": "rope", "mlp_ratio": 2.0},
                     "text": T5}, ["backbone.mlp_ratio", "backbone.qk_norm", "backbone.norm", "backbone.position"]),
    "unmasked": ({"backbone": PIXART, "text": CLIP | {"lower": True}}, ["text.masked"]),
    "label of text": ({"backbone": PIXART, "text": LABEL}, ["text.kind"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffusers_cannot_hold_is_named(name: str) -> None:
    sections, keys = REFUSED[name]
    values = {"backbone": UNET, "text": CLIP, "sample": {"size": [16, 16]}, "format": {"version": 3}, **EPS} | sections
    config: Any = decoding.decode_stored("denoiser", values)
    assert [reason.key for reason in obstacles(config, Facts(KL()))] == keys
    facts = Facts(VQ(), labels=1001, lowers=True)
    assert [reason.key for reason in obstacles(config, facts)][-1] == "model.kind (autoencoder)"
    for model, peer in ((VQ(), "VQModel"), (Tiny(), "AutoencoderTiny"), (DC(), "AutoencoderDC"), (FSQ(), "")):
        instead = obstacles(config, facts._replace(model=model))[-1].instead
        end = f", and RUN/final/autoencoder alone as {peer} by convert_autoencoder export" if peer else ""
        assert instead == f'"kl" can be written{end}'


def test_all_reasons_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    sections = {"backbone": UNET | {"pooled": True, "position": True}, "text": {"kind": "scratch"}, **EPS}
    source = portable.run(tmp_path / "run", **sections)
    with pytest.raises(UserError) as refused:
        export_denoiser(str(source), tmp_path / "out")
    assert refused.value.code == 4 and "portable-unet" in refused.value.hint
    for key in OWN_UNET:
        assert f"\n  {key} = " in refused.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_that_lower_cases_serves_as_well(tmp_path: Path) -> None:
    """PixArt's lower-casing changes nothing for one, whatever `text.lower` is."""
    home = portable.encoder("t5", tmp_path / "t5", lower=True)
    source = portable.run(tmp_path / "run", home, backbone=PIXART, text=T5 | {"lower": False}, **EPS)
    export_denoiser(str(source), tmp_path / "out")


def test_labels_are_numbered_as_diffusers_counts(exported: Any) -> None:
    """Class 1000 is none, whatever the number of labels."""
    folder = exported("dit")[1]
    peer = theirs(folder)
    assert peer.labels == {"blue": 0, "green square": 1, "red": 2}
    table = peer.transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    assert table.shape[0] == 1001 and torch.equal(table[1000], table[500]) and not torch.equal(table[2], table[1000])


def test_an_export_that_draws_otherwise_leaves_nothing(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = portable.run(tmp_path / "run", encoders["clip"], backbone=UNET, text=CLIP, **EPS)
    right = denoiser_export.described

    def wrong(*given: Any) -> Any:
        network = right(*given)
        network.tensors["conv_in.weight"][0] += 0.1
        return network

    monkeypatch.setattr(denoiser_export, "described", wrong)
    with pytest.raises(UserError, match="draws otherwise"):
        export_denoiser(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_diffusers_our_own_reader_compares(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a table, too, that diffusers has no name for."""
    table = {"schedule": {"kind": "ddpm-sigmoid"}}
    source = portable.run(tmp_path / "run", encoders["t5"], backbone=PIXART, text=T5, **EPS | table)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    export_denoiser(str(source), tmp_path / "out")
    assert "diffusers is not installed here" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
