"""The training of an adapter upon a finished denoiser: what it learns is all that it stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.adapters import joined
from ldm.adapters.controlled import ControlConfig
from ldm.adapters.low_rank import plain_state
from ldm.adapters.words import TextualInversion
from ldm.text import HuggingFace, Scratch, TextEncoder
from ldm.text.tokenizer import is_word
from training.commands import door
from training.errors import UserError, as_user_error
from training.machine.launcher import first_process
from training.messages import note
from training.models import assembly, text_encoders
from training.models.adapters import OF_BASE, config_of_base, keep_base, refuse_adapter
from training.models.captions_read import few_of, refuse_unheard, refuse_unread, tell_unknown
from training.models.cards import HINT, example
from training.models.folders import find, name_of
from training.models.hints import keep_hint
from training.models.init_from import fill_network, refuse_new_words, vocabulary_home
from training.models.lineage import store_ingredients, stored_ingredients
from training.models.text_encoders import known_words
from training.models.vocabulary import added, grown
from training.next_step import again, beside, prompt
from training.runs.ingredients import difference
from training.stages.denoiser import DenoiserStage
from training.stages.denoiser_job import DenoiserJob, first_captions
from training.stages.job import parameters
from training.stages.of_base import in_size_of, same_autoencoder, text_encoder_of
from training.stages.prior import prior_home, tell_captions
from training.tensors import content_hash

if TYPE_CHECKING:
    from accelerate import Accelerator


class AdapterJob(DenoiserJob):
    """A few parameters upon a base, which is loaded, frozen and never written."""

    def settle(self) -> None:
        """Also what the data decide of the adapter."""
        if self.args.init_from:
            hint = "leave one of them out: --base learns an adapter upon a model, --init-from goes on with all of it"
            raise UserError("--base and --init-from are two ways to begin", hint=hint)
        refuse_new_words(self.args, self.config.text)
        if isinstance(self.config.adapter, ControlConfig) and self.config.image.kind != "none":
            kind = self.config.image.kind
            what = f"a control reads a hint, and this base is itself shown an image (image.kind {kind})"
            raise UserError(what, hint="give a base that is shown captions alone, or learn a --config lora upon it")
        self.config = in_size_of(self.config, config_of_base(self.args.base), self.dataset)
        super().settle()
        if self.args.new_words:
            self._take_words()
        self._refuse_no_words()
        factor = self.dataset.shards.summary["latent"]["picture"][0] // self.dataset.shape[1]
        with as_user_error("make_shards pack --hint KIND, then encode_latents, store them beside the pictures"):
            adapter = self.config.adapter.settled(factor, self.hint_channels())
        self.config = dataclasses.replace(self.config, adapter=adapter)

    def _take_words(self) -> None:
        """The captions' words that the base does not know become words of the adapter; marks do not."""
        text, adapter = self.config.text, self.config.adapter
        with as_user_error("name the words with --adapter.words, and leave --new-words out"):
            words = text_encoders.stored_vocabulary(find(self.args.base, "denoiser").final)
            unknown = added(words, grown(text, self.dataset, words)) or []
            new = [word for word in unknown if word not in adapter.words and is_word(word)]
            adapter = dataclasses.replace(adapter, words=(*adapter.words, *new))
        self.config = dataclasses.replace(self.config, adapter=adapter)
        if first_process():
            note(f"--new-words: {len(new)} words of the captions are learned{': ' * bool(new)}{few_of(new)}")

    def _refuse_no_words(self) -> None:
        """Raises UserError where new words are all that is to be learned, and there are none."""
        config, learns = self.config, isinstance(self.config.text, Scratch)  # of others it is told that they do not
        if not learns or not isinstance(config.adapter, TextualInversion) or config.adapter.words:
            return
        what = "textual-inversion learns new words, and none is named"
        hint = "name words of the captions with --adapter.words, or give --new-words: all that the base does not know"
        if self.args.new_words:
            what = "textual-inversion learns new words, and --new-words finds none in the captions"
            hint = "write the new word into the captions and encode them again; --adapter.words names it as well"
        raise UserError(what, hint=hint)

    def build(self, accelerator: Accelerator, final: Path | None) -> DenoiserStage:
        """The base with a fresh adapter at work in it, in a stage that trains the adapter."""
        args, config = self.args, self.config
        found = find(args.base, "denoiser")
        refuse_adapter(args.base, found, "give the model that it was learned upon with --base")
        self.refuse_without_image()
        torch.manual_seed(config.train.seed)
        frozen = isinstance(config.text, HuggingFace)
        home = found.final if frozen else vocabulary_home(config.text, None, args.base)
        text_encoder = text_encoder_of(args, self.dataset, found.final) if frozen else None
        with as_user_error("change the config"):
            given = config, Path(args.latents), self.dataset, home, text_encoder, accelerator.device
            parts = assembly.assemble(*given, draws=accelerator.is_main_process)
        same_autoencoder(args.base, stored_ingredients(found.final), parts.hashes)
        fill_network(config, parts, self.dataset, args.base, args.text_encoder)
        hashes = parts.hashes | assembly.networks(parts.pipeline)
        self.base = {name: hashes[name] for name in OF_BASE if name in hashes}
        for part in (parts.backbone, parts.text):
            part.eval().requires_grad_(False)
        with as_user_error("see the keys of [adapter] with --print-config"):
            self.adapter = joined.build(config.adapter, parts.backbone, parts.text).to(accelerator.device)
        self.frozen = {"denoiser": parts.backbone, "text_encoder": parts.text}
        of_prior = tell_captions(config.prior, parts.text)  # which it draws without the words to come
        backbone, text = self.adapter.attach(parts.backbone, parts.text)
        self._look_at_words(text)
        pipeline = assembly.draw_with(config, parts.autoencoder, backbone, text, parts.hashes)
        self.parts = dataclasses.replace(parts, backbone=backbone, text=text, pipeline=pipeline)
        norm, data = parts.autoencoder.norm, (self.dataset, self.held_out)
        self.trained = DenoiserStage(config, backbone, text, norm, *data, pipeline, parts.null, self.adapter)
        self.trained.prior_home = prior_home(config.prior, final)
        self.trained.tally.counted.merge(of_prior.report())
        self.tell_unread_image(accelerator)
        return self.trained

    def _look_at_words(self, text: TextEncoder) -> None:
        """Say which words of the captions are unknown all the same, and which new ones they lack; refuse where those
        are all."""
        hint = "--adapter.words learns those that it names"
        if not self.args.new_words:
            hint = f"--new-words learns those that are no marks, {hint}"
        tell_unknown(text, self.dataset, self.args.base, hint)
        refuse_unread(text, self.dataset)
        refuse_unheard(self.config.adapter.words, text, self.dataset)

    def description(self) -> str:
        """Parameters of the adapter and of its base, and the number of latents."""
        count = "a stream of" if self.args.stream else f"{len(self.dataset):,}"
        kind, base = self.config.adapter.kind, name_of(self.args.base)
        return f"{kind}: {parameters(self.adapter)} parameters upon {base}, which stays as it is; {count} latents"

    def of_few(self) -> bool:
        """A thing or a word is; to follow hints takes as many data as to draw does."""
        return not self.adapter.hint

    def beside(self) -> int:
        """Nothing: the base is not copied."""
        return 0

    def facts(self) -> dict[str, Any]:
        """Also the hashes of the base."""
        return {**super().facts(), "base": self.base}

    def begin(self, final: Path) -> None:
        """Write down which base it is; what it draws before the adapter learns, it draws alone."""
        final.mkdir(parents=True, exist_ok=True)
        keep_base(final, self.args.base, self.base)
        if self.adapter.hint:
            keep_hint(final, self.dataset.shards.summary.get("hint"), self.held_out, self.config.sample.size)
        self.keep_example(final)
        self.adapter.strength = 0.0
        self.draw_prior(final)
        self.adapter.strength = 1.0

    def export(self, run: Path, facts: dict[str, Any]) -> Mapping[str, Tensor]:
        """The tensors of the adapter. Raises RuntimeError where the base is no longer the same."""
        hashes = {name: content_hash(plain_state(part)) for name, part in self.frozen.items()}
        if change := difference(self.base, hashes):
            raise RuntimeError(f"the {change.name} of the base was {change.before}, and is {change.now} after training")
        tensors: dict[str, Tensor] = self.adapter.state_dict()
        store_ingredients(run / "final", {"adapter": content_hash(tensors)})
        return tensors

    def next_steps(self, run: Path) -> list[str]:
        """To draw with it."""
        hint = run / "final" / HINT  # of a control: the first held-out one, drawn with its caption
        verb, shown = example(run / "final", self.config.image.kind, run / "final")
        captions = chain(self.held_out.captions(0) if shown or hint.is_file() else [], first_captions(self.dataset))
        also = again({"device": self.args.device, "text-encoder": self.args.text_encoder})
        known = known_words(find(self.args.base, "denoiser").final)
        at_work = ["--control", run, "--hint", hint] if hint.is_file() else ["--adapter", run]
        words = ["--model", self.args.base, *at_work, *shown, *prompt(captions, known)]
        return [door(verb, *words, "--output", beside(run, "pictures"), *also)] if verb else []
