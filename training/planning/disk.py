"""Room on disk for latents and what stands beside them: measured where they are encoded, else predicted."""

from __future__ import annotations

from typing import Any

from training.encoding.data_set import latent_of
from training.encoding.plan import sample_bytes
from training.shards.index import read_index
from training.shards.reading import ShardSet

LOOKED_AT = 64  # samples whose fields are measured


def of_latents(folder: Any, shards: ShardSet) -> dict[str, Any]:
    """What encoded latents take: bytes of all shards, and how they are shared by what a sample holds."""
    infos = read_index(folder)[1]
    places = range(0, len(shards), max(1, len(shards) // LOOKED_AT))
    fields = [(name, len(data)) for place in places for name, data in shards.read(place).items()]
    latents = sum(size for name, size in fields if name.endswith(".npy"))
    text = sum(size for name, size in fields if not name.endswith(".npy"))
    return {
        "how": "measured",
        "samples": sum(info.samples for info in infos),
        "bytes": sum(info.bytes for info in infos),
        "latents_each": latents / len(places),
        "text_each": text / len(places),
    }


def of_pictures(folder: Any, images: Any, model: Any, *, flip: bool) -> dict[str, Any]:
    """What the latents of all pictures of a folder would take, as float16, their captions beside them."""
    infos = read_index(folder)[1]
    latent = latent_of(infos, images, model, "float16")
    each, captions = (sample_bytes({"latent": part}, flip=flip) for part in (latent, latent | {"shape": [0]}))
    samples = sum(info.samples for info in infos)
    return {
        "how": "predicted",
        "samples": samples,
        "bytes": samples * each,
        "latents_each": each - captions,
        "text_each": captions,
    }
