"""What a pipeline is asked for: its own settings, and the field's words for them, each translated exactly."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from ldm.grids import Grid
from ldm.guiding import Guidance, Scaled
from ldm.samplers import Sampler
from ldm.tasks import Tasks, Watch

Captions = str | Sequence[str]  # one, or one per picture
Seeds = int | Sequence[int]  # the first of a run, or one per picture
Also = Sequence[tuple[str, float]]  # further captions of every picture, each with its weight
Extras = Mapping[str, Tensor]  # by name, as `Cond.extras` has them: one for all pictures, or one each
NO_EXTRAS: Extras = {}
SLACK = 1e-3  # by which rounding may take a hint out of [0, 1]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are made: solver, its steps and the times it visits, what steers it, and, of pictures in pixels, the
    quantile that `ldm.thresholding` scales into their range, 0 for none. `image_scale`: guidance by the picture that is
    to be changed, of `ldm.image_conditions.source`. Of a model that is told sizes: `original_size`, height and width of
    the picture that it would have been cut from, (0, 0) for the picture's own, and `crop_offset`, the rows and columns
    that would have been cut off above and to the left."""

    sampler: Sampler
    grid: Grid
    guidance: Guidance
    steps: int = 25
    dynamic_threshold: float = 0.0
    image_scale: float = 1.0
    original_size: tuple[int, int] = (0, 0)
    crop_offset: tuple[int, int] = (0, 0)

    @property
    def cut(self) -> tuple[int, ...]:
        """What `Cond.extras["size"]` holds; empty where all of it goes without saying."""
        numbers = *self.original_size, *self.crop_offset, 0, 0
        return numbers if any(numbers) else ()


class Settings(TypedDict, total=False):
    """What `Pipeline.pixels` takes beside captions and seeds."""

    negative: Captions
    also: Also
    extras: Extras
    task: Tasks | None
    sampling: Sampling | None
    size: tuple[int, int] | None
    batch_size: int
    watch: Watch | None


class Words(Settings, total=False):
    """What `Pipeline.__call__` takes by name: the settings, and the words that other programs have for them."""

    prompt: Captions | None
    negative_prompt: Captions | None
    num_images_per_prompt: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    height: int | None
    width: int | None
    seed: int | None


SAME = {"prompt": "captions", "negative_prompt": "negative", "seed": "seeds", "num_inference_steps": "sampling",
        "guidance_scale": "sampling", "height": "size", "width": "size"}  # fmt: skip


def translated(captions: Captions | None, seeds: Seeds | None, words: Words,
               plan: Sampling) -> tuple[list[str], Seeds, Settings]:
    """Captions, seeds and settings as `Pipeline.pixels` takes them; what is None is not given.

    Each caption is drawn `num_images_per_prompt` times in a row, and so is a negative prompt or an extra of its own.
    `seed`: the
    k-th picture of a caption has seed + k, wherever in the list it stands, as `generate --seed` numbers them; without
    `seed` and `seeds` all pictures have those from 0 on. `guidance_scale` w: uncond + w (cond - uncond), at least 1;
    a student that has a range is told it, and one that has its own in it takes 1 alone.
    Raises TypeError for an unknown word, ValueError where two say the same, one is missing, or a value means nothing.
    """
    if unknown := [word for word in words if word not in Words.__annotations__]:
        near = difflib.get_close_matches(unknown[0], Words.__annotations__, 1)
        said = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(Words.__annotations__))}."
        raise TypeError(f"a pipeline takes no {unknown[0]!r}: {said}")
    everything = {"captions": captions, "seeds": seeds, **words}
    given: dict[str, Any] = {name: value for name, value in everything.items() if value is not None}
    for theirs, ours in SAME.items():
        if theirs in given and ours in given:
            raise ValueError(f"{theirs} and {ours} were both given: give one of them.")
    copies = whole("num_images_per_prompt", given.get("num_images_per_prompt", 1))
    if copies < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {copies}.")
    own = {name: value for name, value in given.items() if name in Settings.__annotations__}
    prompts, opposite = (given.get(theirs, given.get(SAME[theirs])) for theirs in ("prompt", "negative_prompt"))
    if prompts is None:
        raise ValueError("a pipeline draws captions: give one, or a list of them.")
    each = [caption for caption in each_caption(prompts) for _ in range(copies)]
    if opposite is not None:
        repeated = isinstance(opposite, str) or copies == 1
        own["negative"] = opposite if repeated else [text for text in each_caption(opposite) for _ in range(copies)]
    if extras := given.get("extras"):
        per_caption = copies > 1 and not isinstance(prompts, str)
        own["extras"] = {name: extra.repeat_interleave(copies, dim=0)
                         if per_caption and isinstance(extra, Tensor) and 1 < len(extra) == len(prompts) else extra
                         for name, extra in extras.items()}
    numbers = list(numbered(each, whole("seed", given["seed"]))) if "seed" in given else given.get("seeds", 0)
    return each, numbers, cast(Settings, own | _size(given) | _sampling(given, plan))


def numbered(things: Iterable[Hashable], seed: int) -> Iterator[int]:
    """A seed for each: the k-th of equal things has seed + k, wherever it stands."""
    before: Counter[Hashable] = Counter()
    for thing in things:
        yield seed + before[thing]
        before[thing] += 1


def _size(given: dict[str, Any]) -> dict[str, Any]:
    sides = {name: whole(name, given[name]) for name in ("height", "width") if name in given}
    if len(sides) == 1:
        raise ValueError(f"{next(iter(sides))} was given alone: give height and width.")
    return {"size": tuple(sides.values())} if sides else {}


def _sampling(given: dict[str, Any], plan: Sampling) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if "num_inference_steps" in given:
        changes["steps"] = whole("num_inference_steps", given["num_inference_steps"])
    if (scale := given.get("guidance_scale")) is not None:
        if not isinstance(plan.guidance, Scaled):
            raise ValueError(f"guidance_scale is no setting of the guidance {plan.guidance.kind!r}: give sampling.")
        if not scale >= 1:  # where other programs take 1
            raise ValueError(f"guidance_scale must be at least 1, which is no guidance, got {scale}.")
        changes["guidance"] = replace(plan.guidance, scale=float(scale))
    return {"sampling": replace(plan, **changes)} if changes else {}


def whole(name: str, value: Any) -> int:
    """A whole number. Raises ValueError that names what is none."""
    try:
        return index(value)
    except TypeError:
        raise ValueError(f"{name} is a whole number, got {value!r}.") from None


def one_each(captions: Sequence[str], count: int) -> Sequence[str]:
    """`count` captions, of which one stands for all."""
    return list(captions) * count if len(captions) == 1 else captions


def each_caption(captions: Captions) -> list[str]:
    """One string is one caption, not one for each letter. Raises ValueError where one is no text."""
    each = [captions] if isinstance(captions, str) else list(captions)
    for caption in each:
        if not isinstance(caption, str):
            raise ValueError(f"captions and prompts are texts, got {caption!r}.")
    return each


def each_seed(seeds: Seeds, count: int) -> list[int]:
    """A seed each; one whole number is the first of a run. Raises ValueError for what is no whole number."""
    given: Any = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    try:
        if hasattr(given, "__len__"):
            return [index(seed) for seed in given]
        return list(range(index(given), index(given) + count))
    except TypeError:
        raise ValueError(f"seeds are whole numbers, got {seeds!r}.") from None


def check_extras(extras: Extras, count: int) -> None:
    """Raises ValueError where there is not one for all of `count` pictures or one each, and for whole numbers: pictures
    are shown in [0, 1]."""
    for name, extra in extras.items():
        if not isinstance(extra, Tensor) or not extra.ndim or not extra.is_floating_point():
            kind = f"{extra.dtype} of shape {tuple(extra.shape)}" if isinstance(extra, Tensor) else repr(type(extra))
            raise ValueError(f"the extra {name!r} must be a tensor (1 or B, ...) of floating-point numbers, for a "
                             f"picture in [0, 1], got {kind}.")
        if len(extra) not in (1, count):
            raise ValueError(f"{count} captions but {len(extra)} of the extra {name!r}: give one, or one each.")


def check_hints(extras: Extras, names: Iterable[str]) -> None:
    """Raises ValueError where a hint among `names` is not finite or leaves [0, 1]: once a drawing, for a GPU is waited
    for."""
    for name in {*names} & extras.keys():
        low, high = (end.item() for end in extras[name].aminmax())  # of a NaN both are
        if not (low >= -SLACK and high <= 1 + SLACK):
            raise ValueError(f"the extra {name!r} is a hint, which has values in [0, 1], and these are from {low:g} to "
                             f"{high:g}: divide those of 0 to 255 by 255, those of [-1, 1] are (x + 1) / 2.")


def cut_extras(extras: Extras, part: slice, count: int, sizes: Sequence[tuple[int, int]],
               device: torch.device) -> dict[str, Tensor]:
    """The extras of the `count` pictures at a slice of all, where those are drawn. Raises ValueError where one that has
    a height and width (B, C, H, W) is of none of the `sizes`."""
    for name, extra in extras.items():
        if extra.ndim == 4 and tuple(extra.shape[-2:]) not in sizes:
            given, (pixels, latents) = "x".join(map(str, extra.shape[-2:])), ("x".join(map(str, s)) for s in sizes)
            raise ValueError(f"the extra {name!r} is of {given} (height x width) for pictures of {pixels} from latents "
                             f"of {latents}: give it in the size of one of these.")
    own = {name: extra if len(extra) == 1 else extra[part] for name, extra in extras.items()}
    return {name: extra.to(device).expand(count, *extra.shape[1:]) for name, extra in own.items()}


def joined_extras(given: Extras, shown: Extras) -> dict[str, Tensor]:
    """What is given and what a task shows. Raises ValueError where both have the same name."""
    if both := [name for name in given if name in shown]:
        raise ValueError(f"the task shows the extra {both[0]!r} itself, and one of that name is given besides: leave "
                         "it out, or name it otherwise")
    return {**given, **shown}


def each_weight(also: Also) -> list[tuple[str, float]]:
    """Further captions and their weights. Raises ValueError for anything else."""
    for pair in also:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError("`also` takes pairs of a caption and its weight.")
        if not isinstance(pair[0], str) or not math.isfinite(pair[1]):
            raise ValueError(f"`also` takes pairs of a caption and a finite weight, got {tuple(pair)}.")
    return [(caption, weight) for caption, weight in also]
