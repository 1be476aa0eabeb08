"""How far pictures show what their captions say, by CLIP (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.images import as_rgb
from training.ledger import Ledger
from training.measuring import bootstrap
from training.measuring.networks.embeddings import HINT, Preprocessing, checked, preprocessing
from training.models.captions_read import short
from training.models.pretrained import load_model, loading
from training.tensors import content_hash


@dataclass
class ClipScore:
    """max(100 cos(picture, caption), 0) of pictures and their captions: uint8 (B,C,H,W), B texts -> (B,).

    A caption is cut to what the text tower reads; how many were is counted in `cut`.
    """

    model: Any
    tokenizer: Any
    prepare: Preprocessing
    cut: dict[str, int] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self, pixels: Tensor, captions: Sequence[str]) -> Tensor:
        model, longest = self.model, self.model.config.text_config.max_position_embeddings
        for caption in captions:
            if len(self.tokenizer(caption)["input_ids"]) > longest:
                self.cut[caption] = self.cut.get(caption, 0) + 1
        words = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        tokens = self.tokenizer(list(captions), **words).to(pixels.device)
        text = model.text_projection(model.text_model(**tokens).pooler_output)
        shown = model.vision_model(pixel_values=self.prepare(as_rgb(pixels))).pooler_output
        cosines = F.cosine_similarity(model.visual_projection(shown), text)
        scores: Tensor = (100 * cosines).clamp(min=0).cpu()
        return scores

    def about(self) -> dict[str, str]:
        """The network as the protocol states it."""
        return {"name": f"CLIP {(weights := content_hash(self.model.state_dict()))[:12]}", "weights": weights,
                "preprocessing": str(self.prepare)}  # fmt: skip

    def tell(self, ledger: Ledger) -> None:
        """Write what was cut into the ledger."""
        for caption, times in self.cut.items():
            ledger.add("cut", "captions longer than CLIP's text tower reads", short(caption), times)


def load_clip_score(name: str, device: torch.device | str) -> ClipScore:
    """The CLIP in a folder or of a name, with its tokenizer. Raises UserError (exit 3) where it cannot be had."""
    with loading("CLIP model", name, f"{HINT}, and the tokenizer's files") as how:
        from transformers import AutoTokenizer

        model = checked(load_model(name, {}, how), "clip").to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
        return ClipScore(model, tokenizer, preprocessing(name, how, crop=True))


def scored(name: str, scores: Iterable[Tensor]) -> dict[str, Any]:
    """Their mean and its 95 % interval."""
    values = torch.cat(list(scores)).double()
    mean = values.mean().item()
    return {name: mean, f"{name}_95": bootstrap.around(mean, bootstrap.of_mean(values), 0.0)}
