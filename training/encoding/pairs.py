"""Pairs of noise and where a teacher's ODE takes it, as latent shards with the noise beside them: what reflow trains on
(Liu et al. 2022, 2209.03003).

A pair is a function of the teacher, how it is drawn, the seed, its split and its number there. It takes the caption of
a sample of a latent data set, samples in an order keyed by the seed, and what else is stored of that sample. The folder
is a latent data set of its own: autoencoder and text encoder lie in it, and z is stored as moments of no variance.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from autoencoder.posterior import LOGVAR_RANGE
from ldm.exact import Isotropic
from ldm.image_conditions import NoImage
from ldm.jumps import BoundJump
from ldm.noise import Noise
from ldm.objectives.reflow import NOISE
from ldm.pipeline import Pipeline, Sampling
from ldm.samplers import prior, sample
from training.data.latents import Latents
from training.data.order import DataOrder
from training.data.permutation import RULE
from training.data.samples import Batch
from training.encoding.plan import claim, told_from
from training.encoding.shard import npy
from training.errors import CHECKPOINT, DATA, NUMERICAL, UserError, as_user_error
from training.files import copy_file, finite
from training.guarding import check_output, make_folder, read_record, refuse_links
from training.machine import meeting
from training.messages import tell
from training.models.assembly import HashedPipeline
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.folders import copy_model
from training.models.vocabulary import count_captions
from training.progress import Progress
from training.shards.claims import claimed
from training.shards.index import ENCODING, INDEX, data_facts, noted_pictures, write_index
from training.shards.indexing import latents_summary
from training.shards.reading import ShardSet, held_out_split
from training.shards.writing import sound_shard, write_shard

SHARD = 500  # pairs: what is drawn again, at most, where a writing was broken off
BESIDE = 3000  # bytes of a sample beyond its numbers
EPS = f"extra-{NOISE}.npy"


class Shard(NamedTuple):
    """The pairs of a shard: those from `first` on of their split."""

    name: str
    split: str
    first: int
    pairs: int


class Drew(Exception):
    """What has no noise of its own was asked for some."""


class Still(Noise):
    """Noise that is not drawn from. Raises Drew."""

    def fold(self, *key: int | str) -> Still:
        return self

    def uniform(self, shape: Any, *key: int | str) -> Tensor:
        raise Drew


def write_pairs(
    pipeline: HashedPipeline, latents: Path, output: Path, *, count: int, seed: int, sampling: Sampling,
    batch_size: int, held_out: int = 256,
) -> None:
    """Write `count` pairs for training, and of the held-out split of `latents` one a sample, `held_out` at the most.

    What is there of the same pairs is kept shard by shard; processes that have joined share the shards. A pair does not
    depend on `batch_size` but for the rounding of its kernels. Raises UserError for a folder of anything else, latents
    of another autoencoder, a sampler that adds noise, and a teacher that is shown what is drawn anew at each step.
    """
    if count < 1 or batch_size < 1 or held_out < 0:
        raise UserError(f"pairs: their count and batch must be at least 1, got {count} and {batch_size}")
    refuse_noise(pipeline, sampling)
    split = held_out_split(latents)
    names = dict.fromkeys(["train", split])
    data = {name: Latents(ShardSet(latents, name), sizes=pipeline.sized) for name in names}
    if len(sizes := data["train"].sizes) > 1:
        what = f"{latents} is in buckets of {len(sizes)} sizes, and pairs are drawn in one"
        raise UserError(what, hint="give latents of pictures that were packed without --buckets", code=DATA)
    refuse_other_autoencoder(pipeline, latents)
    counts = {"train": count} | ({split: min(held_out, len(data[split]))} if split != "train" and held_out else {})
    told = {"seed": seed, "counts": counts, "per_shard": SHARD}
    if (rule := _rule(output)) > 1:  # folders begun before there was another name none
        told["order"] = rule
    plan = _plan(pipeline, sampling, latents, data["train"]) | {"pairs": facts(pipeline, sampling, latents) | told}
    shards = [Shard(f"{name}-{number:06d}", name, first, min(SHARD, total - first))
              for name, total in counts.items() for number, first in enumerate(range(0, total, SHARD))]
    drawing = Drawing(pipeline, sampling, data, seed, batch_size, rule)
    drawing.refuse_drawn_images()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if meeting.is_distributed() else (0, 1)
    with ExitStack() as held:
        if rank == 0:
            make_folder(output)
            refuse_links(output)
            held.enter_context(claimed(output))
            _prepare(output, latents, plan, sum(counts.values()))
        meeting.meet()  # no process writes a shard before the folder is claimed for these pairs
        _write(output, drawing, shards[rank::size], aloud=rank == 0)
        meeting.meet()  # the index lists the shards of all processes
        if rank == 0:
            _finish(output, plan, shards)
        meeting.meet()


def facts(pipeline: HashedPipeline, sampling: Sampling, latents: Path) -> dict[str, Any]:
    """What makes pairs what they are, but for seed and number: hashes of the teacher, how it is drawn with a guidance
    that is theirs from then on, and the hash of the data whose captions they have."""
    how = json.loads(json.dumps(finite(dataclasses.asdict(sampling))))
    scale = getattr(sampling.guidance, "scale", 1.0)
    named = {"latents_sha256": data_facts(latents)["index_sha256"], "guidance_scale": scale}
    return {"teacher": dict(pipeline.hashes), "sampling": how, **named}


def _rule(output: Path) -> int:
    """The rule of the order of samples by which a folder of pairs was begun, today's where none is there."""
    plan = output / ENCODING
    pairs = read_record(plan, {}).get("pairs", {}) if plan.is_file() else {"order": RULE}
    return int(pairs.get("order", 1)) if isinstance(pairs, dict) else RULE


def _plan(pipeline: Pipeline, sampling: Sampling, latents: Path, data: Latents) -> dict[str, Any]:
    """What a folder of latents says of itself; the pictures are those of the latents that the captions are of."""
    summary, source = data.shards.summary, latents / ENCODING
    shown = {name: summary.get(name) for name in ("text_encoder", "hint", "image")}
    shown |= {"framed": True} if summary.get("framed") else {}
    pictures = read_record(source, {}).get("data", {}) if source.is_file() else {}
    return {"encoder": summary["encoder"], "data": pictures, "latent": {**summary["latent"], "dtype": "float32"},
            "flip": False, "tile": summary.get("tile", 0), **shown}


def refuse_noise(pipeline: Pipeline, sampling: Sampling) -> None:
    """Raises UserError for a way of drawing that is no map from the noise of t = 1 to data."""
    schedule = pipeline.denoiser.schedule
    with as_user_error("draw pairs in other steps, or on another grid"):
        grid = sampling.grid(sampling.steps, schedule)
    if grid[0] != 1 or grid[-1] != 0:
        what = f"grid {sampling.grid.kind} goes from t = {grid[0]:g} to {grid[-1]:g}, and pairs go from 1 to 0"
        raise UserError(what, hint="take one that does, as uniform or karras")
    known = Isotropic(schedule)
    probe = BoundJump(schedule, lambda x, t, s: known(x, t))
    try:
        sample(sampling.sampler, probe, torch.ones(1, 1, dtype=torch.float64), grid, Still(torch.zeros(1).long()))
    except Drew:
        what = f"sampler {sampling.sampler.kind} adds noise on its way, and a pair is where the ODE takes its noise"
        raise UserError(what, hint="take one that adds none, as dpmpp-2m, heun or ddim with eta 0") from None


def refuse_other_autoencoder(pipeline: Pipeline, latents: Path) -> None:
    """Raises UserError where latents are not those that the teacher draws."""
    stored, own = (autoencoder_hashes(model)["autoencoder"]
                   for model in (load_autoencoder(latents / "autoencoder"), pipeline.autoencoder))
    if stored != own:
        what = f"{latents} is of autoencoder {stored[:12]}, the teacher's is {own[:12]}"
        raise UserError(what, hint="give the latents that the teacher was trained on", code=CHECKPOINT)


class Drawing:
    """How pairs are drawn: of the samples of `data`, split by split."""

    def __init__(
        self, pipeline: Pipeline, plan: Sampling, data: Mapping[str, Latents], seed: int, batch: int, rule: int = RULE
    ) -> None:
        self.pipeline, self.plan, self.data, self.seed, self.batch = pipeline, plan, data, seed, batch
        self.rule = rule  # of the order of samples

    def refuse_drawn_images(self) -> None:
        """Raises UserError for a teacher that is shown images which a training draws anew, so that they are not those
        that the pairs were drawn with."""
        try:
            self.shown(self.data["train"][0])
        except Drew:
            what = f"the teacher's image.kind {self.pipeline.image.kind} draws an image anew at each step of a training"
            raise UserError(what, hint="pairs are written of teachers of image.kind none or hint") from None

    def samples(self, shard: Shard, told: Progress) -> Iterator[tuple[str, dict[str, bytes]]]:
        """(key, fields) of the pairs of a shard, in order. Batches begin anew with it, so that they are the same
        wherever a writing begins."""
        data = self.data[shard.split]
        order = DataOrder(len(data), 1, self.seed, rule=self.rule)
        for first in range(shard.first, shard.first + shard.pairs, self.batch):
            size = min(self.batch, shard.first + shard.pairs - first)
            batch, before = data.__getitems__(order.at(0, first, size)), told.done
            moments, eps = self.drawn(batch, shard.split, told)
            for row in range(size):
                key = f"{shard.split}-{first + row:08d}"
                yield key, {"moments.npy": npy(moments[row]), EPS: npy(eps[row]), **self.told(data, batch, row)}
            told.at(before + size)

    @torch.no_grad()
    def drawn(self, batch: Batch, split: str, told: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Moments (B, 2C, h, w) and the noise (B, C, h, w) that makes up, with what was drawn of it, x at t = 1."""
        pipeline, plan = self.pipeline, self.plan
        noise = Noise(batch.slots.to(pipeline.device)).fold(self.seed, "pairs", split)
        with as_user_error("give what the teacher was trained on, and draw it as it is drawn alone", DATA):
            denoise = pipeline.guided(batch.captions, plan=plan, extras=self.shown(batch))
        norm, grid = pipeline.autoencoder.norm, plan.grid(plan.steps, denoise.schedule)
        x = prior(denoise.schedule, (pipeline.autoencoder.latent_channels, *batch.data.shape[2:]), noise)
        x0 = sample(plan.sampler, denoise, x, grid, Still(noise.seeds), told.by_steps(len(x), plan.steps))
        # The very noise where the process ends in it alone; else what stands beside x0 in the x that is begun from.
        alpha, sigma = denoise.schedule(grid[0])
        z, eps = norm.inverse(x0).float(), ((x - alpha * x0) / sigma).float()
        if not (z.isfinite().all() and eps.isfinite().all()):
            what = f"pair {int(batch.slots[0])} of {split}, or one after it: what the teacher draws is not finite"
            raise UserError(what, hint="draw in more steps, at a lower guidance scale", code=NUMERICAL)
        moments = torch.cat([z, torch.full_like(z, LOGVAR_RANGE[0])], dim=1) if norm.gaussian else z
        return moments.cpu().numpy(), eps.cpu().numpy()

    def shown(self, batch: Batch) -> dict[str, Tensor]:
        """What the teacher is shown beside the captions, as its training was. Raises Drew where that draws."""
        image, device = self.pipeline.image, self.pipeline.device
        stored = {name: extra.to(device) for name, extra in batch.extras.items() if name != NOISE}
        if isinstance(image, NoImage):
            return stored
        still = Still(batch.slots)
        if image.left_out(still) is not None or not image.stored:  # it is made of latents, which are others here
            raise Drew
        with as_user_error("give latents that hold what the teacher is shown", DATA):
            return image.extras(self.pipeline.autoencoder.norm.mean_latents(batch.data.to(device)), stored, still)

    def told(self, data: Latents, batch: Batch, row: int) -> dict[str, bytes]:
        """What a pair has of the sample: the caption that it was drawn with, alone, and what else is stored of it."""
        from safetensors.torch import save

        record = data.shards.read(batch.indices[row])
        notes = {**json.loads(record["json"]), "captions": [batch.captions[row]]}
        kept = {f"extra-{name}.npy" for name in data.extras} - {EPS}  # no features: those of the sample's own picture
        fields = {name: value for name, value in record.items() if name in kept}
        fields |= {"txt": batch.captions[row].encode(), "json": json.dumps(notes, ensure_ascii=False).encode()}
        if (text := batch.text) is not None:
            own = {"0.context": text.context[row][text.mask[row]]}
            own |= {} if text.pooled is None else {"0.pooled": text.pooled[row]}
            fields["text.safetensors"] = bytes(save({name: part.contiguous() for name, part in own.items()}))
        return fields


def _prepare(output: Path, latents: Path, plan: dict[str, Any], total: int) -> None:
    """Claim the folder, and put beside the pairs what lies beside the latents."""
    size = total * (8 * math.prod(plan["latent"]["shape"]) + BESIDE)
    check_output(output, size - sum(path.stat().st_size for path in output.glob("*.tar")))
    noted = noted_pictures(latents)
    claim(output, plan, noted if "://" in noted or not noted else told_from(Path(noted), output))
    copy_model(latents / "autoencoder", output / "autoencoder")
    for folder in ("text_encoder", "tokenizer"):
        for file in sorted(path for path in (latents / folder).glob("*") if path.is_file()):
            make_folder(output / folder)
            copy_file(file, output / folder / file.name)


def _write(output: Path, drawing: Drawing, shards: list[Shard], *, aloud: bool) -> None:
    """Draw the shards that are not there yet."""
    waiting = [shard for shard in shards if not sound_shard(output, shard.name, shard.split)]
    with Progress("drawing pairs", sum(shard.pairs for shard in shards), "pair", aloud=aloud) as told:
        told.skip(sum(shard.pairs for shard in shards if shard not in waiting))
        if aloud and len(waiting) < len(shards):
            tell(f"kept: {len(shards) - len(waiting)} of {len(shards)} shards of pairs, which are there")
        for shard in waiting:
            meeting.watch()  # who was left alone must end before the same command is run again
            samples = drawing.samples(shard, told)
            # The first is drawn before the file is begun: what cannot be drawn leaves none.
            write_shard(output, shard.name, chain([next(samples)], samples), shard.split)


def _finish(output: Path, plan: dict[str, Any], shards: list[Shard]) -> None:
    """Write the index, last of the data, and what is counted of the captions."""
    infos = [info for shard in shards if (info := sound_shard(output, shard.name, shard.split))]
    write_index(output, infos, latents_summary(plan) | {"order": "mixed", "ledger": {}}, kind="latents")
    count_captions(Latents(ShardSet(output)))
    counts = plan["pairs"]["counts"]
    held = "".join(f", {n:,} of {split}" for split, n in counts.items() if split != "train")
    tell(f"pairs: {output} ({counts['train']:,} to train on{held}; {INDEX} says of which teacher)")
