"""The training of an autoencoder, or of a tiny one taught by another: its data, its networks, what it exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from autoencoder.identity import Identity
from training.commands import door
from training.data.images import Images
from training.errors import as_user_error
from training.guarding import make_folder
from training.models.autoencoders import autoencoder_hashes, load_autoencoder
from training.models.folders import fill
from training.models.lpips import load_perceptual
from training.models.previews import keep_teacher, teacher_hash
from training.models.vision import vision_hash, vision_of_flags
from training.next_step import again, beside, encoding
from training.shards.index import commonest, data_facts
from training.shards.reading import ShardSet, held_out_shards
from training.shards.remote import open_address
from training.stages.autoencoder import AutoencoderStage
from training.stages.checks import check_images, check_shrinking, check_starts, settle_channels
from training.stages.job import Job, parameters
from training.stages.preview import DistillationStage, fit_to_teacher
from training.stages.streams import stream_facts, stream_images
from training.stages.untrained import UntrainedStage, check_no_lessons

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.settings.decoding import AutoencoderConfig


class AutoencoderJob(Job):
    """Stage one: train, measure the latent normaliser, export."""

    stage: ClassVar[str] = "autoencoder"
    config: AutoencoderConfig

    def open_data(self) -> None:
        """Pictures, and the teacher or vision model that flags name."""
        args, train = self.args, self.config.train
        self.given = str(args.data)  # as the user names it
        if isinstance(self.config.model, Identity):
            check_no_lessons(args)
        how: dict[str, Any] = {"flip": train.flip, "seed": train.seed, "on_bad_data": args.on_bad_data}
        if args.stream:
            self.dataset, self.held_out = stream_images(args, train, how)
        else:
            args.data = open_address(args.data, args.cache_dir, args.cache_size, train.window_shards)
            self.dataset = Images(ShardSet(args.data, "train"), **how)
            self.held_out = Images(held_out_shards(args.data))
        self.config, self.teacher = fit_to_teacher(args, self.config)
        self.config = settle_channels(self.config, self.dataset.channels, args.overrides)
        self.vision = vision_of_flags(args, self.config)
        check_images(self.config, self.dataset)

    def settle(self) -> None:
        """Warn of losses that would never begin."""
        check_starts(self.config)

    def build(
        self, accelerator: Accelerator, final: Path | None
    ) -> AutoencoderStage | DistillationStage | UntrainedStage:
        """Model, discriminator and LPIPS in a stage; with a teacher, the stage that distils it; the stage of a model
        without parameters."""
        config, loss, perceptual = self.config, self.config.loss, None
        self.trained: AutoencoderStage | DistillationStage | UntrainedStage
        if isinstance(config.model, Identity):
            self.trained = UntrainedStage(config, config.model.build(), self.dataset, self.held_out)
            return self.trained
        if loss.perceptual or config.discriminator.on_features:
            perceptual = load_perceptual(loss.perceptual_net, loss.perceptual_weights, self.args.lpips_weights)
        torch.manual_seed(config.train.seed)
        with as_user_error("change the config"):
            model = config.model.build()
            discriminator = config.discriminator.build(perceptual.features if perceptual else None)
        for network in (model, discriminator):  # convolutions run 10-50 % faster with channels innermost
            network.to(memory_format=torch.channels_last)
        if self.args.init_from:
            fill(model, load_autoencoder(self.args.init_from).state_dict(), Path(self.args.init_from))
        if self.teacher is not None:
            self.trained = DistillationStage(config, model, self.teacher, perceptual, self.dataset, self.held_out)
        else:
            data = self.dataset, self.held_out
            self.trained = AutoencoderStage(config, model, discriminator, perceptual, *data, self.vision)
        check_shrinking(config, model, accelerator.num_processes)
        return self.trained

    def description(self) -> str:
        """Parameters, factor and channels of the model, and the number of pictures."""
        model = self.trained.model
        what = f"{parameters(model)} parameters, factor {model.factor}, {model.latent_channels} channels"
        if not self.trained.networks:
            what = f"nothing to train, the pixels are the latents: factor 1, {model.latent_channels} channels"
        count = "a stream of" if self.args.stream else f"{len(self.dataset):,}"
        return f"autoencoder: {what}; {count} images"

    def picture(self) -> tuple[int, int, int]:
        """Of the data."""
        channels, height, width = self.dataset[0].data.shape[-3:]
        return channels, height, width

    def beside(self) -> int:
        """Nothing of size."""
        return 0

    def facts(self) -> dict[str, Any]:
        """Hashes of the data, the teacher and the vision model."""
        parts = {"teacher": teacher_hash(self.teacher), "vision": vision_hash(self.vision)}
        data = stream_facts(self.dataset) if self.args.stream else data_facts(self.args.data)
        return {"data": data, **parts}

    def about(self) -> dict[str, Any]:
        """Counts, and the size of the pictures, where they are of one."""
        side = self.args.resolution or self.dataset.shards.summary.get("resolution")
        size = commonest(self.dataset.shards.shards) if self.dataset.sizes else side and (side, side)
        told = {**self.counts(), "resolution": size and list(size), **self.buckets()}
        return {**told, "channels": self.dataset.channels}

    def begin(self, final: Path) -> None:
        """Keep the record of the teacher beside the model."""
        keep_teacher(self.teacher, final)

    def export(self, run: Path, facts: dict[str, Any]) -> Mapping[str, Tensor]:
        """Measure the latents' normaliser, then the reconstructions. Both with the weights that are exported."""
        self.trained.normalise()
        folder = run / "samples" / "final"
        make_folder(folder)
        numbers = self.trained.evaluate(folder)
        facts |= {"hashes": autoencoder_hashes(self.trained.model), "validation": numbers}
        return self.trained.model.state_dict()

    def next_steps(self, run: Path) -> list[str]:
        """To encode the pictures; those of a stream are packed first. A preview is measured."""
        args, data, commands = self.args, self.given, list[str]()
        also = {"device": args.device, "cache-dir": args.cache_dir}
        if args.stream:
            if "://" in data or data.startswith("pipe:"):
                return []  # only files are packed
            data, tars = beside(run, "data"), data
            like = {"resolution": args.resolution, "on-bad-data": args.on_bad_data, "channels": self.dataset.channels}
            commands = [door("make_shards pack", tars, "--output", data, *again(like))]
        if self.teacher is not None:
            measuring = [door("evaluate", "--model", run, "--data", data, *again(also))]
            return [*commands, *(measuring if self.holds_out() else [])]
        return [*commands, encoding(run, data, also)]
