"""The training of a denoiser on encoded latents: its data, its networks, what it exports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.adapters.controlled import ControlConfig
from ldm.representation import VISION
from ldm.text import Label
from training.commands import door
from training.data.latents import Latents
from training.encoding.shown import trained
from training.errors import DATA, UserError, as_user_error
from training.machine.processes import announce
from training.messages import note
from training.models import assembly, init_from
from training.models.captions_read import refuse_unread, tell_unknown
from training.models.cards import EXAMPLES, example
from training.models.hints import keep_hint, keep_shown
from training.models.text_encoders import known_words
from training.next_step import again, beside, prompt
from training.runs.checkpoints import Checkpoints
from training.shards.index import data_facts, noted_pictures, pictures_facts
from training.shards.reading import COMPARED, ShardSet, held_out_shards
from training.shards.remote import Remote, open_address
from training.stages.denoiser import DenoiserStage
from training.stages.few_step import FewStepStage
from training.stages.job import Job, parameters
from training.stages.prior import keep_drawn, prior_home, refuse_prior, tell_captions
from training.stages.streams import stream_latents

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.settings.decoding import DenoiserConfig

UNREAD = "images beside the latents, which nothing in this training reads"
CAPTIONS = 5  # that a model card shows


class DenoiserJob(Job):
    """Stage two: train on encoded latents, export a self-contained model."""

    stage: ClassVar[str] = "denoiser"
    config: DenoiserConfig

    def open_data(self) -> None:
        """Latents, training and held out; of an address, the models beside them too."""
        args, train = self.args, self.config.train
        args.latents = open_address(args.latents, args.cache_dir, args.cache_size, train.window_shards)
        how: dict[str, Any] = {"flip": train.flip, "seed": train.seed, "on_bad_data": args.on_bad_data}
        how["vision"], sizes = self.config.representation.reads, self.config.conditioning.size
        how["sizes"] = sizes
        if args.stream:
            self.dataset, self.held_out = stream_latents(args, train, how)
        else:
            self.dataset = Latents(ShardSet(args.latents, "train"), **how)
            self.held_out = Latents(held_out_shards(args.latents), sizes=sizes)
        if isinstance(args.latents, Remote):
            args.latents.bring_models(text=self.dataset.text)

    def settle(self) -> None:
        """The size of pictures to draw and the channels of hints that are shown, where the config leaves them to the
        latents; refuse prior pictures of no base."""
        if self.config.sample.size == (0, 0):
            size = tuple(self.dataset.shards.summary["latent"]["picture"])
            self.config = dataclasses.replace(self.config, sample=dataclasses.replace(self.config.sample, size=size))
        if buckets := self.config.sample.buckets or tuple(self.dataset.sizes):
            sample = dataclasses.replace(self.config.sample, buckets=buckets)
            self.config = dataclasses.replace(self.config, sample=sample)
        with as_user_error("leave image.hint_channels out: it is taken from the latents"):
            self.config = dataclasses.replace(self.config, image=self.config.image.settled(self.hint_channels()))
        if self.config.representation.reads and not self.dataset.features:
            what = "representation.kind repa learns from features of a vision model, which these latents do not hold"
            command = door("encode_latents --autoencoder RUN --data PICTURES --vision DIR --output DIR")
            raise UserError(what, hint=f"encode the pictures with them: {command}", code=DATA)
        refuse_prior(self.config, self.args, self.dataset.extras)

    def check_buckets(self) -> None:
        """Raises UserError where the backbone cannot take the latents of a bucket, and for prior pictures, which are of
        one size."""
        for size in self.dataset.sizes:
            step = f"encode pictures that were packed with --bucket-step {self.parts.pipeline.multiple}"
            with as_user_error(f"{step}, or choose another config", DATA):
                self.parts.pipeline.latent_shape(size)
        if self.config.prior.weight and len(self.dataset.sizes) > 1:
            what = "prior pictures are of one size, and stand beside those given in each batch, which are in buckets"
            raise UserError(what, hint="give latents of one size, or --prior.weight 0")
        if self.config.prior.weight and self.config.conditioning.size:
            what = "prior pictures were cut from no others, and conditioning.size tells how those beside them were"
            raise UserError(what, hint="give a base without it, or --prior.weight 0")

    def hint_channels(self) -> int:
        """Those of the hints beside the latents; 0 for none, also where they are encoded."""
        summary = self.dataset.shards.summary
        return 0 if summary.get("image") else (summary.get("hint") or {}).get("channels", 0)

    def build(self, accelerator: Accelerator, final: Path | None) -> DenoiserStage:
        """Backbone, text encoder and frozen autoencoder in a stage."""
        args, config = self.args, self.config
        torch.manual_seed(config.train.seed)
        init_from.refuse_new_words(args, config.text)
        home = init_from.vocabulary_home(config.text, final, args.init_from)
        grows = args.new_words and home != final  # a run that has begun keeps its vocabulary
        with as_user_error("change the config"):
            given = config, Path(args.latents), self.dataset, home, args.text_encoder, accelerator.device
            self.parts = parts = assembly.assemble(*given, draws=accelerator.is_main_process, grows=grows)
            norm, data = parts.autoencoder.norm, (self.dataset, self.held_out)
            stage = DenoiserStage if config.objective.reading is None else FewStepStage
            self.trained = stage(config, parts.backbone, parts.text, norm, *data, parts.pipeline, parts.null)
        if args.init_from:
            added = init_from.fill_network(config, parts, self.dataset, args.init_from, args.text_encoder)
            if added:
                announce(accelerator, f"input widened by {added} channels for the image, zero at first")
            hint = "raise text.max_words, which leaves no room" if args.new_words else "--new-words adds rows for them"
            tell_unknown(parts.text, self.dataset, args.init_from, hint)
        refuse_unread(parts.text, self.dataset)
        self.trained.tally.counted.merge(tell_captions(config.prior, parts.text).report())
        self.trained.prior_home = prior_home(config.prior, final)
        self.check_buckets()
        self.refuse_without_image()
        self.tell_unread_image(accelerator)
        return self.trained

    def tell_unread_image(self, accelerator: Accelerator) -> None:
        """Say, and write into the books, that the latents hold images which this training does not read, and what
        would."""
        image, adapter, summary = self.config.image, self.trained.adapter, self.dataset.shards.summary
        held = summary.get("image") or (summary.get("hint") and {"kind": "hint"})
        if not held or image.stored or (adapter and adapter.hint):
            return
        upon = "--config controlnet" if held["kind"] == "hint" else f"a --base of image.kind {held['kind']}"
        how = f"{upon if adapter else ' '.join(trained(held))} has them read"
        self.trained.tally.counted.add("ignored", UNREAD, how)
        announce(accelerator, f"{UNREAD}: {how}", note)

    def refuse_without_image(self) -> None:
        """Raises UserError where an image condition is made of what these latents do not hold (code 3), and where
        pictures are drawn in another size than what goes with them: images of held-out latents, or prior pictures."""
        image, drawn = self.config.image, self.config.sample.size
        if image.stored and "image" not in self.dataset.extras:
            what = f"image.kind {image.kind} is made of extra-image.npy, which these latents do not hold"
            raise UserError(what, hint=f"encode them again, with {image.stored}", code=DATA)
        summary = self.dataset.shards.summary
        made = summary.get("image") or {"kind": "hint" if summary.get("hint") else image.kind}  # none: it is not told
        if image.stored and made["kind"] != image.kind:
            what = f"image.kind is {image.kind}, the images of these latents are for {made['kind']}"
            raise UserError(what, hint=f"encode them again, with {image.stored}", code=DATA)
        if image.kind == "low-res" and made.get("factor", image.factor) != image.factor:
            what = f"image.factor is {image.factor}, the images of these latents are {made['factor']} times smaller"
            raise UserError(what, hint=f"--image.factor {made['factor']}")
        given, control = tuple(summary["latent"]["picture"]), isinstance(self.config.adapter, ControlConfig)
        prior = "prior pictures" if self.config.prior.weight else ""
        beside = "images shown" if control or image.kind != "none" else prior
        if beside and drawn not in ((0, 0), given):
            sizes = ("x".join(map(str, size)) for size in (drawn, given))
            what = "sample.size is {}, the {beside} are of pictures of {}".format(*sizes, beside=beside)
            raise UserError(what, hint="leave sample.size out")

    def held(self) -> dict[str, nn.Module]:
        """Also what it draws with."""
        parts = self.parts
        return {"backbone": parts.backbone, "text": parts.text, "autoencoder": parts.autoencoder}

    def description(self) -> str:
        """Parameters, the shape of a latent, and the number of latents."""
        what = f"{parameters(self.trained.network)} parameters on latents {'x'.join(map(str, self.parts.shape))}"
        if others := len(self.dataset.sizes[1:]):
            what += f" and {others} other shapes"
        count = "a stream of" if self.args.stream else f"{len(self.dataset):,}"
        return f"denoiser: {what}; {count} latents"

    def picture(self) -> tuple[int, int, int]:
        """Of what is drawn."""
        return self.parts.autoencoder.image_channels, *self.config.sample.size

    def beside(self) -> int:
        """The autoencoder and, where the latents hold one, the text encoder."""
        folders = (Path(self.args.latents) / name for name in ("autoencoder", "text_encoder", "tokenizer"))
        return sum(file.stat().st_size for folder in folders for file in folder.glob("*") if file.is_file())

    def facts(self) -> dict[str, Any]:
        """Hashes of the data, of the pictures they were encoded from, and of every part that is not trained."""
        data = data_facts(self.args.latents) | pictures_facts(self.args.latents)
        reads, summary = self.config.representation.reads, self.dataset.shards.summary
        return {"data": data, "hashes": self.parts.hashes | ({VISION: summary[VISION]["hash"]} if reads else {})}

    def about(self) -> dict[str, Any]:
        """Counts, the size of the pictures, and captions of held-out ones."""
        captions = list(dict(self.trained.grid_samples()))[:CAPTIONS]
        size = {"resolution": self.dataset.shards.summary["latent"]["picture"]}
        return {**self.counts(), **size, **self.buckets(), "captions": captions}

    def begin(self, final: Path) -> None:
        """Put autoencoder and vocabulary or text encoder beside the model to come."""
        assembly.store(self.parts, Path(self.args.latents), final)
        self.keep_example(final)
        self.draw_prior(final)

    def keep_example(self, final: Path) -> None:
        """What the model is shown of the first held-out sample, to draw by."""
        image = self.config.image
        if image.kind == "hint":
            keep_hint(final, self.dataset.shards.summary.get("hint"), self.held_out, self.config.sample.size)
        elif image.kind in EXAMPLES and image.kind != "none":
            keep_shown(final, image, self.held_out, self.parts.pipeline)

    def draw_prior(self, final: Path) -> None:
        """Have the base draw, before the first step, what it is to go on drawing, where the config asks for it."""
        prior, train = self.config.prior, self.config.train
        if home := prior_home(prior, final):
            begun = any(Checkpoints(final.parent).folder.glob("step-*"))
            keep_drawn(home, prior, self.parts.pipeline, train.seed, embedded=self.dataset.text, begun=begun)

    def export(self, run: Path, facts: dict[str, Any]) -> Mapping[str, Tensor]:
        """Store a text encoder that learned; the tensors of the backbone are returned."""
        assembly.export_learned(self.parts, run / "final")
        return self.parts.backbone.state_dict()

    def next_steps(self, run: Path) -> list[str]:
        """To draw, with a held-out caption of known words as prompt (of labels, a trained one), and to measure on
        enough; a model that is shown pictures is shown that of the first held-out sample, with its caption."""
        args, summary, kind = self.args, self.dataset.shards.summary, self.config.image.kind
        verb, shown = example(run / "final", kind, run / "final")
        every = self.dataset if isinstance(self.config.text, Label) else self.held_out
        captions = chain(self.held_out.captions(0) if shown else [], first_captions(every))
        also = again({"device": args.device, "text-encoder": args.text_encoder})
        words = ["--model", run, *shown, *prompt(captions, known_words(run / "final"))]
        words += ["--output", beside(run, "pictures"), *again({"tile": summary.get("tile")}), *also]
        commands = [door(verb, *words)] if verb else []
        measures = {"none": [], "hint": ["--hints"], "low-res": ["--upscale"]}
        if kind in measures and self.holds_out(COMPARED) and (data := noted_pictures(Path(args.latents))):
            commands.append(door("evaluate", "--model", run, "--data", data, *measures[kind], *also))
        return commands


def first_captions(dataset: Latents) -> Iterator[str]:
    """One of each sample."""
    return (caption for place in range(len(dataset)) for caption in dataset.captions(place)[:1])
