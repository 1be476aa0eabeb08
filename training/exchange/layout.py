"""What layouts of diffusers' classes share: the one form of a denoising network, and what is said of settings that have
no counterpart here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from training.errors import CHECKPOINT, UserError
from training.messages import note

Settings = dict[str, Any]
Tensors = dict[str, Tensor]

IN_DIFFUSERS = "in diffusers"
# Without effect on what the network answers, in training alone or in the precision of a softmax.
PASSED_OVER = {"dropout", "upcast_attention", "addition_time_embed_dim", "addition_embed_type_num_heads",
               "mid_block_only_cross_attention", "norm_num_groups", "norm_type", "num_embeds_ada_norm",
               "num_vector_embeds", "use_linear_projection", "cross_attention_dim"}  # fmt: skip

@dataclass(frozen=True, kw_only=True)
class Network:
    """A denoising network: `[backbone]` of a config, the tensors that fit it, and what it was built for.

    `context_dim`: width of the text it reads, 0 for none; `size`: latents a side that it was trained at. `labels`, of
    networks that are told a class: (classes + 1, width), the null first as in our label encoder.
    """

    backbone: Settings
    tensors: Tensors
    channels: int
    context_dim: int
    pooled_dim: int | None = None
    size: int = 64
    labels: Tensor | None = None


class Layout(NamedTuple):
    """A class's two ways. A reader takes config.json's settings and tensors in float32."""

    read: Callable[[Mapping[str, Any], Tensors], Network]
    write: Callable[[Network], tuple[Settings, Tensors]]


def foreign(said: str, hint: str, where: str = "here") -> UserError:
    """The refusal of a setting that networks cannot have `where` they are to be taken."""
    return UserError(f"{said} has no counterpart {where}", hint=hint, code=CHECKPOINT)


def expect(about: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "here") -> None:
    """Raises UserError at the first setting that is there and is another one: it would be another network."""
    for key, value in wanted.items():
        if about.get(key, value) != value:
            raise foreign(f"{key} = {about[key]!r}", f"only {value!r} has", where)


def settings(about: Mapping[str, Any], usual: Settings, fixed: Settings, nulls: tuple[str, ...] = ()) -> Settings:
    """The settings of a class, defaults filled in. Raises UserError for those that make it another network; says which
    are not known."""
    for key in nulls:
        if about.get(key):
            raise foreign(f"{key} = {about[key]!r}", f"only networks without {key} are read")
    expect(about, fixed)
    known = {*usual, *fixed, *nulls, *PASSED_OVER}
    if odd := sorted(key for key in about if key not in known and not key.startswith("_") and about[key] is not False):
        note(f"ignored in config.json, as not known here: {', '.join(odd)}")
    return usual | {key: value for key, value in about.items() if key in usual}


def learned_variance(channels: int, outputs: int | None) -> bool:
    """Whether a network answers twice its `channels`. Raises UserError for any other number of `outputs`."""
    if outputs not in (None, channels, 2 * channels):
        hint = "networks that are told a picture beside the latents, as for inpainting, are not read"
        raise foreign(f"{channels} channels in and {outputs} out", hint)
    return outputs == 2 * channels
