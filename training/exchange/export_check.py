"""A pipeline of diffusers' that was written, opened again and held against the run: by diffusers, or our reader."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.conditioning import Cond
from ldm.noise import Noise
from ldm.samplers import mix
from ldm.schedules import Table
from ldm.text.encoders import LabelEncoder
from ldm.times import shifted
from training.errors import CHECKPOINT, UserError
from training.exchange.export_limits import NULL_CLASS
from training.exchange.scheduler_export import walked
from training.exchange.text_export import save_text
from training.guarding import read_record
from training.messages import SAID, hush
from training.models.assembly import HashedPipeline, load_pipeline
from training.settings.decoding import DenoiserConfig

REPORT = "this is a mistake of the program: please report it with config.json"
# The largest difference by the largest number that is compared or 1: in float32 the sums of wide layers (512 channels),
# in another order, are 1e-5 apart.
CLOSE = 1e-4
PROMPTS = ["a red circle above a blue square", "", "A photo"]
NETWORKS = ("unet", "transformer", "vae")  # their folders
LEVELS = (1.0, 401.0, 998.0)
STEPS = 8  # which divides a table's length to numbers that no arithmetic rounds


class Errors(NamedTuple):
    """The largest difference of each part, by the largest number that is compared or 1."""

    text: float
    denoiser: float
    encode: float
    decode: float
    betas: float
    steps: float


def compare(folder: Path, pipeline: HashedPipeline, config: DenoiserConfig) -> str:
    """One line of how near `folder` is to the run. Raises UserError where it is not within `CLOSE`, or does not open.

    The text's encoding, one call of the denoiser at three noise levels, the encoder's mean, the decoder, the table; of
    the scheduler as it is written, its times and a step (without diffusers, what is made of an answer).
    """
    try:
        import diffusers
    except ImportError:
        diffusers = None
    with torch.no_grad():
        errors = _by_diffusers(diffusers, folder, pipeline, config) if diffusers else _by_import(folder, pipeline)
    by = f"diffusers {diffusers.__version__}" if diffusers else "our own import; diffusers is not installed here"
    return verdict(errors._asdict(), by)


def verdict(errors: Mapping[str, float], by: str, does: str = "draws") -> str:
    """One line of what was found. Raises UserError where it is not within `CLOSE`."""
    told = ", ".join(f"{name} {value:.1g}" for name, value in errors.items())
    if any(not value <= CLOSE for value in errors.values()):  # NaN neither
        what = f"what was written {does} otherwise than the run (opened by {by}; largest differences: {told})"
        raise UserError(what, hint=REPORT, code=CHECKPOINT)
    return f"opened again by {by}: largest differences {told}"


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| by max |ours| or 1; NaN where the shapes differ."""
    if ours.shape != theirs.shape:
        return torch.nan
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))


def probe(pipeline: HashedPipeline) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (3, C, h, w) of unit variance, noise levels (3,), and a picture in [-1, 1] of the trained size."""
    noise = Noise.from_seeds(range(len(LEVELS))).fold("export")
    picture = noise.normal((pipeline.autoencoder.image_channels, *pipeline.size), "picture")[:1].clamp(-2, 2) / 2
    return noise.normal(pipeline.latent_shape(pipeline.size)), torch.tensor(LEVELS), picture


def captions(pipeline: HashedPipeline) -> list[str]:
    """Three that the text encoder takes, the empty one among them."""
    text = pipeline.text
    return [text.classes[0], "", text.classes[-1]] if isinstance(text, LabelEncoder) else PROMPTS


def _by_diffusers(diffusers: Any, folder: Path, pipeline: HashedPipeline, config: DenoiserConfig) -> Errors:
    with quiet(diffusers):
        parts = {home.name: opened_whole(diffusers, home) for home in map(folder.joinpath, NETWORKS) if home.is_dir()}
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    vae, (x, levels, picture) = parts["vae"], probe(pipeline)
    ours, backbone, cond = pipeline.autoencoder, pipeline.denoiser.backbone, pipeline.text(captions(pipeline))
    given, text = _text(theirs, pipeline, cond)
    network = parts.get("unet") or parts["transformer"]
    answer = network(x, timestep=levels, **given, return_dict=False)[0]
    moments, posterior = ours.encode(picture), vae.encode(picture).latent_dist
    spread = moments.chunk(2, dim=1)[1] - 2 * ours.norm.scale.log()  # of normalised latents
    encoded = max(error(ours.norm.mean_latents(moments), posterior.mean),
                  error(spread, posterior.parameters.chunk(2, dim=1)[1]))  # fmt: skip
    decoded = error(ours.decode(x), vae.decode(x / vae.config.scaling_factor, return_dict=False)[0])
    betas, table = 0.0, config.schedule
    if isinstance(table, Table):
        betas = error(table.alpha_bar().float(), theirs.scheduler.alphas_cumprod)
    steps = scheduled(theirs.scheduler, pipeline, config)
    return Errors(text, error(backbone(x, levels, cond), answer), encoded, decoded, betas, steps)


def scheduled(peer: Any, pipeline: HashedPipeline, config: DenoiserConfig) -> float:
    """How far the times of a scheduler of diffusers' are from those of the grid that was to be written, and its step
    from the middle one of them from DDIM's."""
    process, grid = pipeline.denoiser.diffusion, walked(config)
    schedule = process.schedule
    count = max(1, min(STEPS, schedule.steps // 2))
    peer.set_timesteps(count)
    if isinstance(schedule, Table):
        times = grid(count, schedule)
        wanted, found = times[:-1] * schedule.steps - 1, peer.timesteps
    else:  # diffusers begins at 0.999
        even = 0.999 * torch.arange(count, -1, -1, dtype=torch.float64) / count
        times = wanted = shifted(even, getattr(grid, "shift", 1.0), schedule)
        found = peer.sigmas
    x, t, s = probe(pipeline)[0], times[count // 2], times[count // 2 + 1]
    y, both = x.flip(0), torch.cat([x.flip(0)] * 2, dim=1)  # of a variance that is learned only one of theirs knows
    ends = process.recover(x, both if process.learned_variance else y, t)
    draws = type(peer).__name__ == "DDPMScheduler"  # so that of its step x0 alone can be compared
    answer = peer.step(both if draws else y, peer.timesteps[count // 2], x)
    ours, theirs = (ends.x0, answer.pred_original_sample) if draws else (mix(schedule(s), ends), answer.prev_sample)
    return max(error(wanted, found.double()), error(ours, theirs))


@contextmanager
def quiet(diffusers: Any) -> Iterator[None]:
    """Without the bars and advice of other programs; what is wrong is found by comparing."""
    from transformers.utils import logging

    for library in (diffusers.utils.logging, logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    with warnings.catch_warnings(action="ignore"):
        yield


def opened_whole(diffusers: Any, home: Path) -> Any:
    """A part by the class of its config.json, all of its weights in their places."""
    kind = read_record(home / "config.json", {"_class_name": str})["_class_name"]
    model, outcome = getattr(diffusers, kind).from_pretrained(home, output_loading_info=True, local_files_only=True)
    if wrong := {what: keys for what, keys in outcome.items() if keys}:
        raise UserError(f"diffusers does not read {kind} whole: {wrong}", hint=REPORT, code=CHECKPOINT)
    return model.eval()


def _text(theirs: Any, pipeline: HashedPipeline, cond: Cond) -> tuple[dict[str, Any], float]:
    """How their pipeline tells its network of the captions, and how far that is from `cond`."""
    if isinstance(pipeline.text, LabelEncoder):
        labels = [theirs.labels.get(caption, NULL_CLASS) for caption in captions(pipeline)]
        return {"class_labels": torch.tensor(labels)}, 0.0
    length, given = cond.context.shape[1], captions(pipeline)
    if "Alpha" in type(theirs).__name__ or "Sigma" in type(theirs).__name__:
        states, mask, *_ = theirs.encode_prompt(given, False, max_sequence_length=length)
        real = cond.mask[..., None].float()
        told = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        same = torch.nan if not torch.equal(mask.bool(), cond.mask) else error(cond.context * real, states * real)
        return told | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, same
    states, _ = theirs.encode_prompt(given, "cpu", 1, False)
    return {"encoder_hidden_states": states}, error(cond.context, states)


def compare_file(path: Path, pipeline: HashedPipeline, config: DenoiserConfig) -> str:
    """One line of how near a single file is to the run, by our own import. Raises UserError as `compare` does."""
    backbone = config.backbone
    heads = None if backbone.head_dim else backbone.heads  # else as many as channels have 64s
    with torch.no_grad():
        errors = _by_import(path, pipeline, prediction=config.prediction.kind, heads=heads)
    return verdict(errors._asdict(), "our own import")


def _by_import(source: Path, pipeline: HashedPipeline, **given: Any) -> Errors:
    """What `convert_denoiser import` makes of it, held against the run."""
    from training.exchange.denoiser_import import import_denoiser

    with tempfile.TemporaryDirectory() as home, unheard():
        words = Path(home) / "words"
        if source.is_file():
            save_text(words, pipeline.text)
            given["text_encoder"] = str(words / "text_encoder")
        try:
            import_denoiser(str(source), Path(home) / "again", **given)
        except UserError as problem:
            what = f"what was written cannot be opened again without diffusers: {problem.what}"
            raise UserError(what, hint="pip install diffusers, and export again", code=problem.code) from None
        text = words if source.is_file() else source
        override = str(text / "text_encoder") if (text / "text_encoder").is_dir() else None
        again = load_pipeline(Path(home) / "again", "cpu", override)
    return between(pipeline, again)


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, nothing is told: what is said of a copy that is thrown away is no news."""
    before = SAID.quiet
    hush(True)
    try:
        yield
    finally:
        hush(before)


def between(pipeline: HashedPipeline, again: HashedPipeline) -> Errors:
    """How far two pipelines of ours are from each other."""
    x, levels, picture = probe(pipeline)
    given = captions(pipeline)
    cond, told = pipeline.text(given), again.text(given)
    ours, theirs = pipeline.autoencoder, again.autoencoder
    both = (pipeline, again)
    answers = [p.denoiser.backbone(x, levels, c) for p, c in zip(both, (cond, told), strict=True)]
    encoded = [a.norm.mean_latents(a.encode(picture)) for a in (ours, theirs)]
    times = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    tables = [p.denoiser.schedule(times).alpha for p in both]
    meant = [p.denoiser.diffusion.recover(x, y, times[50]).x0 for p, y in zip(both, answers, strict=True)]
    text = error(cond.context[cond.mask], told.context[told.mask])  # padding may be of another length
    decoded = error(ours.decode(x), theirs.decode(x))
    return Errors(text, error(*answers), error(*encoded), decoded, error(*tables), error(*meant))
