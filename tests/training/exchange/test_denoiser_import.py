"""Pipelines of diffusers' taken in: pictures from the same noise are theirs."""

from __future__ import annotations

import json
import shlex
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import donors
import peers
import pytest
import tiny
import torch
from donors import PROMPTS, STEPS, convert, diffusers, noise, ours, theirs
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from training.models.assembly import HashedPipeline, load_pipeline
from training.tensors import load_tensors


def both(pipeline: Any, home: Path, *words: object) -> tuple[HashedPipeline, tuple[Tensor, Tensor]]:
    """The run that a saved pipeline becomes, and what the pipeline draws from its noise."""
    pipeline.save_pretrained(home / "theirs")
    run = load_pipeline(convert(home / "theirs", home / "ours", *words), "cpu")
    return run, theirs(pipeline, noise(run))


COMMON = donors.TABLE | {"clip_sample": False}
DDIM: dict[str, dict[str, Any]] = {
    "leading": {"steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "v": {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "x0 on cosine": {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
}


@pytest.mark.parametrize("case", DDIM)
def test_stable_diffusion_draws_what_it_drew(case: str, tmp_path: Path) -> None:
    """Latents and pictures to 1e-3, with guidance: captions are padded to 77 tokens that are all attended to."""
    run, (latents, pictures) = both(
        donors.stable_diffusion(diffusers.DDIMScheduler(**COMMON | DDIM[case])), tmp_path
    )
    got, drawn = ours(run)
    assert latents.std() > 0.1 and (latents[0] - latents[1]).std() > 0.1
    torch.testing.assert_close(got / latents.std(), latents / latents.std(), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn, pictures, atol=1e-3, rtol=0)
    assert run.size == (16, 16) and run.sampling.steps == 50 and run.sampling.guidance.scale == 7.5
    assert run.text.config.length == 77 and not run.text.config.masked


def test_padding_as_diffusers_takes_it(tmp_path: Path) -> None:
    """A text encoder that asks for its mask gets it, and the U-Net does not."""
    run, (latents, _) = both(donors.stable_diffusion(encoder=donors.clip(use_attention_mask=True)), tmp_path)
    assert run.text.config.mask_rule == 1
    torch.testing.assert_close(ours(run)[0], latents, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "PixArtAlphaPipeline"])
def test_pixart_draws_what_it_drew(kind: str, tmp_path: Path) -> None:
    """A learned variance is left out of DDIM, capitals and padding out of captions."""
    pipeline = donors.pixart(kind=kind)
    run, (latents, pictures) = both(pipeline, tmp_path)
    got, drawn = ours(run, prompts=[prompt.upper() for prompt in PROMPTS])
    assert latents.std() > 0.1 and (latents[0] - latents[1]).std() > 0.1
    torch.testing.assert_close(got / latents.std(), latents / latents.std(), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn, pictures, atol=1e-3, rtol=0)
    assert run.text.config.length == {"PixArtSigmaPipeline": 300, "PixArtAlphaPipeline": 120}[kind]
    assert run.sampling.steps == 20 and run.sampling.guidance.scale == 4.5


def test_a_dit_draws_its_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its captions are the names of its classes; the null is diffusers' last row. Pictures of the same noise are those
    of DiTPipeline, whose null is told as that row."""
    names = {0: "red circle", 1: "crane", 2: "blue", 3: "crane", 4: "green"}
    pipeline = diffusers.DiTPipeline(
        transformer=donors.network("DiTTransformer2DModel", donors.DIT), vae=peers.kl(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": names}))  # as the hub's has
    run = load_pipeline(convert(tmp_path / "theirs", tmp_path / "ours", "--text-encoder", "clip"), "cpu")
    assert "ignored 1: the text encoder, since this network is told classes (clip)" in capsys.readouterr().err
    assert run.text.classes == ("red circle", "crane", "blue", "crane (3)", "green")
    start = noise(run)
    cond, null = run.text(["crane (3)", "green"]), run.text([""])
    times, network = torch.tensor([0.3, 0.3]), run.denoiser.backbone
    with torch.no_grad():
        for number, told in ((torch.tensor([3, 4]), cond), (torch.tensor([5, 5]), null.expand(2))):
            wanted = pipeline.transformer(start, timestep=1000 * times, class_labels=number).sample
            torch.testing.assert_close(network(start, 1000 * times, told), wanted, atol=1e-4, rtol=1e-4)
    assert run.sampling.guidance.scale == 4.0

    def last_row(network: Any, given: Any, words: dict[str, Any]) -> Any:
        return given, words | {"class_labels": words["class_labels"].clamp(max=5)}  # 1000 where there are 1000 classes

    pipeline.transformer.register_forward_pre_hook(last_row, with_kwargs=True)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: start)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline([3, 4], guidance_scale=4.0, num_inference_steps=STEPS, output_type="np").images
    latents, drawn = ours(run, 4.0, ["crane (3)", "green"])
    assert latents.std() > 0.1 and (latents[0] - latents[1]).std() > 0.1
    torch.testing.assert_close(drawn, torch.from_numpy(wanted).movedim(-1, 1), atol=1e-4, rtol=0)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_flow_is_equal_call_by_call(kind: str, tmp_path: Path) -> None:
    """diffusers cuts 1000 sigma to whole numbers and starts below 1, so that pictures differ: its network calls, made
    again with ours at its times, do not."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**FLOW)
    pipeline = donors.stable_diffusion(scheduler) if kind == "unet" else donors.pixart(scheduler)
    pipeline.save_pretrained(tmp_path / "theirs")
    run = load_pipeline(convert(tmp_path / "theirs", tmp_path / "ours"), "cpu")
    calls: list[tuple[Any, ...]] = []
    network = pipeline.unet if kind == "unet" else pipeline.transformer
    keep = lambda module, args, told, answer: calls.append((args[0], told.get("timestep", args[1:]), answer[0]))  # noqa: E731
    hook = network.register_forward_hook(keep, with_kwargs=True)
    theirs(pipeline, noise(run))
    hook.remove()
    cond = run.text(["", "", *PROMPTS])
    assert len(calls) == STEPS
    for x, level, answer in calls:
        told = level[0] if isinstance(level, tuple) else level
        with torch.no_grad():
            got = run.denoiser.backbone(x, torch.as_tensor(told).expand(4).float(), cond)
        torch.testing.assert_close(got, answer, atol=1e-4, rtol=1e-4)
    assert type(run.denoiser.diffusion.schedule).__name__ == "Flow" and run.sampling.grid.shift == 3.0
    assert type(run.denoiser.diffusion.prediction).__name__ == "Velocity"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines' folders, each written once."""
    home = tmp_path_factory.mktemp("saved")
    donors.stable_diffusion().save_pretrained(home / "sd")
    donors.pixart().save_pretrained(home / "pixart")
    return {"sd": home / "sd", "pixart": home / "pixart"}


def weights(run: Path) -> dict[str, Tensor]:
    return load_tensors(run / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def changed(source: Path, target: Path, file: str, **settings: Any) -> Path:
    """A copy of a folder with other settings in one of its files; None takes one out."""
    shutil.copytree(source, target)
    about = json.loads((target / file).read_text()) | settings
    (target / file).write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    return target


def test_what_is_written_is_a_finished_run(saved: dict[str, Path], tmp_path: Path) -> None:
    """It draws at the command line, is exported, and is its own ingredients; nothing was left out without a word."""
    run = convert(saved["sd"], tmp_path / "run")
    words = ["--prompt", "a red circle", "--output", tmp_path / "pictures", "--steps", 2, "--device", "cpu"]
    assert tiny.call("generate", "--model", run, *words) == 0
    assert tiny.call("export_model", run, "--output", tmp_path / "small", "--dtype", "bfloat16") == 0
    stored, pipeline = json.loads((run / "ingredients.json").read_text()), load_pipeline(run, "cpu")
    assert all(pipeline.hashes[name] == value for name, value in stored.items())
    assert stored.keys() == {"autoencoder", "tokenizer", "denoiser", "text_encoder"}
    facts = json.loads((run / "card.json").read_text())
    assert facts["taken"] == {} and "not trained here" in (run / "README.md").read_text()


def test_training_goes_on_from_it(saved: dict[str, Path], tmp_path: Path) -> None:
    """`--init-from` and `--base` take it, with the text encoder that it holds."""
    run = convert(saved["sd"], tmp_path / "run")
    (tmp_path / "in").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 9, 9)).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text("a red circle")
    data, latents = tmp_path / "data", tmp_path / "latents"
    assert tiny.call("make_shards", "pack", tmp_path / "in", "--output", data, "--resolution", 16) == 0
    assert tiny.call("encode_latents", "--autoencoder", run / "autoencoder", "--data", data, "--output", latents) == 0
    words = ["--latents", latents, "--text-encoder", run / "text_encoder", "--batch-size", 2, "--max-steps", 1,
             "--sample-every", 100, "--train.validation_size", 0, "--sample.steps", 1, "--device", "cpu"]  # fmt: skip
    further = ["--config", run / "config.json", "--init-from", run, "--lr", 1e-30, "--train.ema", 0]
    assert tiny.call("train_denoiser", *further, *words, "--output", tmp_path / "more") == 0
    after, before = weights(tmp_path / "more" / "final"), weights(run)
    assert all(torch.allclose(value, before[key], atol=1e-6) for key, value in after.items())
    assert tiny.call("train_denoiser", "--config", "lora", "--base", run, *words, "--output", tmp_path / "lora") == 0


def test_files_of_other_forms(saved: dict[str, Path], tmp_path: Path) -> None:
    """fp16 variants, shards and the class of before diffusers 0.29 are the same networks."""
    whole = weights(convert(saved["pixart"], tmp_path / "whole"))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved["pixart"], local_files_only=True)
    pipeline.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*-of-*.safetensors"))) > 1
    assert same(weights(convert(tmp_path / "sharded", tmp_path / "of-shards")), whole)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    halves = weights(convert(tmp_path / "half", tmp_path / "of-half"))
    assert same(halves, {key: value.half().float() for key, value in whole.items()})
    older = changed(saved["pixart"], tmp_path / "older", "transformer/config.json", _class_name="Transformer2DModel",
                    double_self_attention=False, num_vector_embeds=None, only_cross_attention=False)  # fmt: skip
    assert same(weights(convert(older, tmp_path / "of-older")), whole)


def test_a_network_alone(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it lacks is asked for, each with the flag that gives it; what no file says is guessed aloud."""
    alone, whole = saved["sd"] / "unet", convert(saved["sd"], tmp_path / "whole")
    output, words = tmp_path / "alone", list[object]()
    for flag, value in (("--autoencoder", whole / "autoencoder"), ("--text-encoder", whole / "text_encoder")):
        problem = tiny.refused("convert_denoiser", "import", alone, "--output", output, *words)
        assert flag in problem.hint and not output.exists(), problem
        words += [flag, value]
    capsys.readouterr()
    run = convert(alone, output, *words)
    said = capsys.readouterr().err
    assert "guessed 1: that the network predicts eps, which no scheduler states (--prediction v says v)" in said
    assert "guessed 1: the process" in said and "50 steps and guidance 7.5" in said
    assert same(weights(run), weights(whole))
    of_file = convert(alone / peers.FILE, tmp_path / "of-file", *words, "--prediction", "v")
    assert same(weights(of_file), weights(whole)) and load_pipeline(of_file).denoiser.diffusion.prediction.kind == "v"
    two = Path(shutil.copytree(alone, tmp_path / "two"))
    (two / peers.FILE).rename(two / "a.safetensors")
    save_file({key: value + 1 for key, value in load_tensors(alone / peers.FILE).items()}, two / "b.safetensors")
    hint = tiny.refused("convert_denoiser", "import", two, "--output", tmp_path / "no", *words).hint
    assert same(weights(convert(two / "a.safetensors", tmp_path / "chosen", *words)), weights(whole))
    assert hint == "leave one of them in the folder, and move b.safetensors elsewhere"
    (two / "b.safetensors").unlink()
    assert same(weights(convert(two, tmp_path / "left", *words)), weights(whole))
    lost = tmp_path / peers.FILE
    shutil.copy(alone / peers.FILE, lost)
    problem = tiny.refused("convert_denoiser", "import", lost, "--output", tmp_path / "no", *words)
    assert "holds no denoiser of Stable Diffusion's" in problem.what and "config.json" in problem.hint
    shutil.copy(alone / "config.json", tmp_path)
    assert same(weights(convert(lost, tmp_path / "found", *words)), weights(whole))


def test_prediction_over_what_a_scheduler_says(
    saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zero = changed(saved["sd"], tmp_path / "zero", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    problem = tiny.refused("convert_denoiser", "import", zero, "--output", tmp_path / "run")
    assert "cannot tell x0 from pure noise" in problem.what and "--prediction v" in problem.hint
    run = convert(zero, tmp_path / "run", "--prediction", "v")
    assert "replaced 1: the prediction, by --prediction v (eps)" in capsys.readouterr().err
    assert load_pipeline(run, "cpu").denoiser.diffusion.prediction.kind == "v"
    assert json.loads((run / "card.json").read_text())["taken"]["replaced"]


def test_a_large_text_encoder_is_named(
    saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in every run; the command that follows names it."""
    monkeypatch.setattr("training.models.text_encoders.LARGE", 10)
    run = convert(saved["sd"], tmp_path / "run")
    command = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert command.startswith("next: ") and f"--text-encoder {saved['sd'] / 'text_encoder'}" in command
    assert not (run / "text_encoder" / "model.safetensors").exists()
    words = shlex.split(command.partition("generate.py")[2])
    assert tiny.call("generate", *words, "--steps", 2, "--device", "cpu") == 0


def test_a_scale_of_latents_that_is_none(saved: dict[str, Path], tmp_path: Path) -> None:
    """The hint followed: the autoencoder alone, with a scale that is told, stands in for the pipeline's."""
    sd = changed(saved["sd"], tmp_path / "sd", "vae/config.json", scaling_factor=-1.0)
    problem = tiny.refused("convert_denoiser", "import", sd, "--output", tmp_path / "run")
    assert "--scale-factor X" in problem.hint and "--autoencoder RUN" in problem.hint, problem
    inner = peers.convert("import", sd / "vae", tmp_path / "ae", "--scale-factor", 0.5)
    run = load_pipeline(convert(sd, tmp_path / "run", "--autoencoder", inner), "cpu")
    assert float(run.autoencoder.norm.scale.max()) == 2.0


def test_parts_that_are_not_read_are_told(saved: dict[str, Path], tmp_path: Path) -> None:
    index = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "feature_extractor": [None, None]}
    run = convert(changed(saved["sd"], tmp_path / "sd", "model_index.json", **index), tmp_path / "run")
    taken = json.loads((run / "card.json").read_text())["taken"]
    assert taken == {"ignored": {"parts of the pipeline that are not read": {"count": 1, "first": ["safety_checker"]}}}


def from_hub(name: str, allow_patterns: list[str], ignore_patterns: list[str], of: Path, to: Path) -> str:
    """What `snapshot_download` does, from a folder."""
    for file in (path for path in of.rglob("*") if path.is_file()):
        place = file.relative_to(of)
        wanted, not_wanted = (any(fnmatch(str(place), p) for p in each) for each in (allow_patterns, ignore_patterns))
        if wanted and not not_wanted:
            (to / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to / place)
    return str(to)


def test_a_repository_by_name(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts in full precision, or in half where there is no other; nothing else of it is fetched."""
    store = shutil.copytree(saved["sd"], tmp_path / "hub")
    (store / "v1.ckpt").write_bytes(b"0")
    shutil.copy(store / "unet" / peers.FILE, store / "unet" / peers.FILE.replace(".safe", ".fp16.safe"))
    wanted = weights(convert(saved["sd"], tmp_path / "whole"))
    fetch = partial(from_hub, of=store, to=tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: fetch(name, **how))
    assert same(weights(convert("someone/something", tmp_path / "one")), wanted)
    assert not list((tmp_path / "cache").rglob("*fp16*")) and not list((tmp_path / "cache").glob("*.ckpt"))
    (store / "unet" / peers.FILE).unlink()
    shutil.rmtree(tmp_path / "cache")
    assert same(weights(convert("someone/something", tmp_path / "two")), wanted)


def broken(saved: dict[str, Path], home: Path) -> list[tuple[Path, str, str]]:
    """(folder, what is said, what its hint has)."""
    sd, pixart = saved["sd"], saved["pixart"]

    def copy(name: str) -> Path:
        return Path(shutil.copytree(sd, home / name))

    def unet(name: str, **settings: Any) -> Path:
        return changed(sd, home / name, "unet/config.json", **settings)

    pickled, cut, lost, empty = copy("pickled"), copy("cut"), copy("lost"), home / "empty"
    file = pickled / "unet" / peers.FILE
    torch.save({}, file.with_suffix(".bin"))
    file.unlink()
    whole = (cut / "unet" / peers.FILE).read_bytes()
    (cut / "unet" / peers.FILE).write_bytes(whole[:-100])
    tensors = load_tensors(lost / "unet" / peers.FILE)
    save_file({**tensors, "more.weight": torch.zeros(1)}, lost / "unet" / peers.FILE)
    nan, no_text, no_vae = copy("nan"), copy("no-text"), copy("no-vae")
    save_file(tensors | {"conv_in.bias": torch.full((16,), torch.nan)}, nan / "unet" / peers.FILE)
    lacking = copy("lacking")
    save_file({k: v for k, v in tensors.items() if k != "conv_in.bias"}, lacking / "unet" / peers.FILE)
    shutil.rmtree(no_text / "text_encoder")
    shutil.rmtree(no_vae / "vae")
    empty.mkdir()
    transformer, scheduler = "transformer/config.json", "scheduler/scheduler_config.json"
    return [
        (unet("xl", addition_embed_type="text_time"), "addition_embed_type = 'text_time'", "only networks without"),
        (unet("class", _class_name="SD3Transformer2DModel"), "a SD3Transformer2DModel has no counterpart", "PixArt"),
        (unet("no-class", _class_name=None), "what its config.json describes", "UNet2DConditionModel"),
        (unet("odd", attention_head_dim=3), "cut level 0 (16 channels) into heads by 3", "config.json"),
        (unet("wrong", block_out_channels="x"), "expected a whole number", "config.json"),
        (unet("depth", layers_per_block=[]), "not the settings of UNet2DConditionModel (IndexError", "config.json"),
        (unet("text", cross_attention_dim=24), "reads text of 24 features", "--text-encoder"),
        (changed(pixart, home / "sizes", transformer, use_additional_conditions=True), "additional", "PixArt-Sigma"),
        (changed(sd, home / "process", scheduler, trained_betas=[0.1]), "trained_betas", "by a beta_schedule"),
        (changed(sd, home / "vae", "vae/config.json", latent_channels=8), "", ""),
        (pickled, "a pickle, which is not read", "safe_serialization"), (cut, "damaged safetensors", "download"),
        (lost, "tensor more.weight has no place", "another network"), (nan, "conv_in.bias is not finite", "damaged"),
        (lacking, "tensor conv_in.bias is missing", "complete"), (no_text, "no text encoder", "--text-encoder"),
        (no_vae, "holds no autoencoder", "--autoencoder"), (empty, "no denoiser's config.json", "unet/"),
    ]  # fmt: skip


def test_refusals(saved: dict[str, Path], tmp_path: Path) -> None:
    """Each a sentence with a next step, of code 4, and nothing is left behind."""
    for source, what, hint in broken(saved, tmp_path):
        problem = tiny.refused("convert_denoiser", "import", source, "--output", tmp_path / "out")
        assert what in problem.what and hint in problem.hint and problem.hint, (source, problem)
        assert problem.code == 4 and not (tmp_path / "out").exists(), source
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], source


def test_words_that_do_not_fit(saved: dict[str, Path], tmp_path: Path) -> None:
    wide = peers.stored(tmp_path / "ae", {"kind": "kl", "channels": [8, 16], "groups": 4, "latent_channels": 3})[0]
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for words, what, hint in (
        (["import", saved["sd"], "--output", tmp_path / "out", "--autoencoder", wide], "of 4 latent", "--auto"),
        (["import", saved["sd"], "--output", full], "already exists", "choose another --output"),
        (["import", "nothing", "--output", tmp_path / "out"], "no such file or folder", "ORG/NAME"),
        (["import", saved["sd"], "--output", tmp_path / "out", "--prediction", "velocity"], "on schedule", "flow"),
        (["import", saved["sd"], "--output", tmp_path / "out", "--heads", 2], "of a single file", "leave --heads out"),
        (["export", saved["sd"], "--output", tmp_path / "out", "--heads", 2], "--heads belongs to import", "leave"),
    ):
        problem = tiny.refused("convert_denoiser", *words)
        assert what in problem.what and hint in problem.hint, problem
