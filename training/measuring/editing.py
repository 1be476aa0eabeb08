"""How well scenes of the embedded shapes are edited: inpainted, drawn again, reworded, inverted and extended.

Each part gives its numbers and rows of example pictures. `training/shapes/checker.py` says what is obeyed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoencoder.fidelity import psnr
from autoencoder.images import to_unit
from ldm.coupling import MasaCtrl, PromptToPrompt
from ldm.guidance import ClassifierFree
from ldm.image_tasks import edit_friendly_inversion, extended, image_to_image, inpainting, inverted, referring, styled
from ldm.jumps import Jumping
from ldm.samplers import DDIM, DDPM
from ldm.tasks import Task, Tasks
from training.drawing.edits import half_window
from training.errors import UserError
from training.guarding import check_free
from training.measuring.distances import share
from training.measuring.edit_scores import Numbers, arrays, coloured, mean, obeyed, overlaps, seam
from training.measuring.obedience import sampling_errors
from training.messages import tell
from training.pictures import charts, grids
from training.progress import Progress
from training.shapes.checker import background
from training.shapes.edits import Edit, another_colour, another_object
from training.shapes.scenes import POSITIONS, UNIT

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline, Sampling

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of image-to-image
PAPER = 0.64  # the strength of edit-friendly inversion
KEPT_NOISE = (0.36, PAPER, 1.0)
ITERATIONS = (1, 3)  # of DDIM inversion's fixed point
BEST = 100.0  # dB that an equal picture counts in a mean
SHOWN = 8  # pictures of a row


@dataclass(frozen=True)
class Part:
    """What one kind of edit gave: its numbers, rows of uint8 pictures (n, 3, H, W), and a chart of it."""

    numbers: Numbers
    rows: dict[str, Tensor]
    chart: Image.Image | None = None


@dataclass(frozen=True)
class Studio:
    """A model, how it draws, and the scenes that it is given: `count` of each kind, from `seed` on."""

    pipeline: Pipeline
    sampling: Sampling
    count: int
    seed: int
    batch_size: int

    @property
    def side(self) -> int:
        return self.pipeline.size[0]

    def edits(self, make: Callable[[int, int], Edit], objects: int) -> list[Edit]:
        return [make(self.seed * 1_000_003 + number, objects) for number in range(self.count)]

    def pictures(self, edits: Sequence[Edit]) -> Tensor:
        """The sources, uint8 (N, 3, H, W)."""
        shown = torch.from_numpy(np.stack([edit.picture(self.side) for edit in edits]))
        return shown.permute(0, 3, 1, 2).to(self.pipeline.device)

    def draw(self, captions: Sequence[str], task: Tasks | None = None, sampling: Sampling | None = None) -> Tensor:
        """uint8 (N, 3, H, W) of the captions, picture i from seed + i."""
        seeds = range(self.seed, self.seed + len(captions))
        with sampling_errors():
            made = self.pipeline.pixels(captions, seeds, task=task, sampling=sampling or self.sampling,
                                        batch_size=self.batch_size)
            return torch.cat(list(Progress("drawing", len(captions)).each(made)))


def shapes_edits(pipeline: Pipeline, sampling: Sampling, args: argparse.Namespace) -> Numbers:
    """The numbers of all parts; with --grid FILE one sheet of examples for each, named FILE-PART.

    Raises UserError for a few-step model, for one of other pictures than square RGB ones of at least 32 pixels, and for
    sheets that are there already.
    """
    height, width = pipeline.size
    if pipeline.autoencoder.image_channels != 3 or height != width or height < UNIT:
        what = f"edited shapes are square RGB pictures of at least {UNIT:g} pixels, the model draws {width}x{height}"
        raise UserError(what, hint="measure a model that was trained on the embedded shapes")
    if isinstance(pipeline.denoiser, Jumping):
        what = "--edits shapes draws with ddpm and ddim too, in many steps, and this is a few-step model"
        raise UserError(what, hint="measure its teacher")
    if args.count < 1:
        raise UserError("--edits shapes edits --count pictures of each kind, at least 1", hint="give --count N")
    for name in PARTS if args.grid else ():
        check_free(sheet_path(args.grid, name), args.overwrite, "--grid")
    studio = Studio(pipeline, sampling, args.count, args.seed, args.batch_size)
    numbers: Numbers = {"edits": args.count, "edits_judge": "the rules of training/shapes/checker.py"}
    for name, part in PARTS.items():
        tell(f"editing: {name}")
        found = part(studio)
        numbers |= {f"{name}_{key}": value for key, value in found.numbers.items()}
        if args.grid:
            grids.write(sheet(found), sheet_path(args.grid, name))
    return numbers


def sheet_path(grid: str, name: str) -> Path:
    """Where the examples of a part go."""
    path = Path(grid)
    return path.with_name(f"{path.stem}-{name}{path.suffix}")


def sheet(part: Part) -> Image.Image:
    """The rows of a part, and its chart beneath them."""
    width = max(pixels.shape[-1] for pixels in part.rows.values())
    rows = [torch.nn.functional.pad(pixels[:SHOWN], (0, width - pixels.shape[-1]), value=255).cpu()
            for pixels in part.rows.values()]  # fmt: skip
    examples = grids.grid(torch.cat(rows), len(rows[0]), rows=list(part.rows))
    return charts.stacked([examples, part.chart]) if part.chart else examples


def inpainted(studio: Studio) -> Part:
    """One object's place is drawn anew after a caption that names another there: of the pairs of colour and shape that
    training showed, and of those held out."""
    numbers, rows = Numbers(), dict[str, Tensor]()
    for (objects, name), held_out in product(((1, "one"), (2, "one of two")), (False, True)):
        edits = studio.edits(partial(another_object, held_out=held_out), objects)
        name += ", held out" * held_out
        source, captions = studio.pictures(edits), [edit.words[1] for edit in edits]
        mask = torch.from_numpy(np.stack([edit.hole(studio.side) for edit in edits])[:, None]).to(source.device)
        made = studio.draw(captions, inpainting(studio.pipeline, source, mask))
        assert torch.equal(made.masked_fill(mask, 0), source.masked_fill(mask, 0)), "a pixel outside of the hole moved"
        alone = obeyed(studio.draw(captions), captions)
        numbers |= share(f"{name}_obeyed", obeyed(made, captions)) | share(f"{name}_prompt_alone", alone)
        grey = source.masked_fill(mask, 0).where(~mask, 160)
        rows |= {f"{name}: source": source, f"{name}: hole": grey, f"{name}: drawn": made}
    return Part(numbers, rows)


def drawn_again(studio: Studio) -> Part:
    """Two objects, noised and drawn after a caption that names another for one of them: what is obeyed, and how far the
    other object stays where it was."""
    edits = studio.edits(another_object, 2)
    source, captions = studio.pictures(edits), [edit.words[1] for edit in edits]
    numbers, rows = Numbers(), {"source": source}
    curves: dict[str, list[tuple[float, float]]] = {"captions obeyed": [], "IoU of the object that stays": []}
    for strength in STRENGTHS:
        made = studio.draw(captions, image_to_image(studio.pipeline, source, strength=strength))
        found = share("obeyed", obeyed(made, captions)) | {"kept": mean(overlaps(source, made, edits))}
        numbers |= {f"{strength:g}_{key}": value for key, value in found.items()}
        rows[f"strength {strength:g}"] = made
        for points, value in zip(curves.values(), (found["obeyed"], found["kept"]), strict=True):
            points.append((strength, value))
    return Part(numbers, rows, charts.unit_square(curves, "strength", "share, or mean IoU", diagonal=False))


def reworded(studio: Studio) -> Part:
    """A colour word changed under the same seed, with the source's attention maps and without: whether silhouettes stay
    and colours change. Captions that say everything, those that leave the place open, and colour and shape alone."""
    wordings: dict[str, tuple[int, Callable[[Edit], tuple[str, str]]]] = {
        "full": (1, lambda edit: edit.words),
        "short": (2, lambda edit: edit.fewest_words),
        "bare": (1, lambda edit: (bare(edit.fewest_words[0]), bare(edit.fewest_words[1]))),
    }
    numbers, rows = Numbers(), dict[str, Tensor]()
    for name, (objects, say) in wordings.items():
        edits = studio.edits(another_colour, objects)
        before, after = zip(*map(say, edits), strict=True)
        source = studio.draw(before)
        drawings = {"alone": None, "coupled": referring(None, PromptToPrompt(), before)}
        rows[f"{name}: source"] = source
        for how, task in drawings.items():
            made = studio.draw(after, task)
            kept = overlaps(source, made)
            numbers[f"{name}_{how}_iou"] = mean(kept)
            numbers |= share(f"{name}_{how}_iou_from_0.8", [one >= 0.8 for one in kept])
            numbers |= share(f"{name}_{how}_colour", [*map(coloured, arrays(made), edits)])
            rows[f"{name}: {how}"] = made
    return Part(numbers, rows)


def bare(caption: str) -> str:
    """A caption without its place: `a red circle`."""
    return caption.partition(" at ")[0].partition(" in ")[0]


def turned_back(studio: Studio) -> Part:
    """Pictures whose noise is found: drawn again after their own caption, and edited after one of another colour."""
    edits = studio.edits(another_colour, 1)
    source, (before, after) = studio.pictures(edits), zip(*(edit.words for edit in edits), strict=True)
    pipeline, plan = studio.pipeline, replace(studio.sampling, sampler=DDPM())
    decoded = studio.draw(before, image_to_image(pipeline, source, strength=0))

    def edited(captions: Sequence[str], strength: float) -> Tensor:
        task = edit_friendly_inversion(pipeline, source, before, strength=strength, sampling=plan)
        return studio.draw(captions, task, plan)

    again = edited(before, PAPER)
    numbers: Numbers = {"edit-friendly_largest_difference": (again.int() - decoded.int()).abs().max().item()}
    rows = {"source": source, "same words": again}
    for strength in KEPT_NOISE:
        made = edited(after, strength)
        found = share("obeyed", obeyed(made, after)) | {"iou": mean(overlaps(source, made))}
        numbers |= {f"edit-friendly_{strength:g}_{key}": value for key, value in found.items()}
        rows[f"other colour, {strength:g}"] = made
    for name, guidance in (("unguided", ClassifierFree(scale=1.0)), ("guided", studio.sampling.guidance)):
        way = replace(studio.sampling, sampler=DDIM(), guidance=guidance)
        for iterations in ITERATIONS:
            start = inverted(pipeline, to_unit(source), before, way, iterations)
            made = studio.draw(before, _from(start), way)
            numbers[f"ddim_{name}_{iterations}_psnr"] = psnr(made, decoded).clamp(max=BEST).mean().item()
            rows[f"DDIM {name}, {iterations}x"] = made
    return Part(numbers, rows)


def _from(start: Tensor) -> Tasks:
    return lambda part: Task(start=start[part])


def grown(studio: Studio) -> Part:
    """A canvas of twice the width: whether the seam shows, and whether the new half has the background of the old."""
    edits, side = studio.edits(another_object, 1), studio.side
    source, captions = studio.pictures(edits), [edit.words[0] for edit in edits]
    canvas, new = extended(studio.pipeline, source, (0, 0, side, 0))
    numbers, rows = Numbers(), {"source": source}
    for name, windows in (("windows", half_window(studio.pipeline)), ("whole", 0)):
        made = studio.draw(captions, inpainting(studio.pipeline, canvas, new, dilate=0, windows=windows))
        assert torch.equal(made[..., :side], source), "a pixel of the picture moved"
        steps, limits = zip(*(seam(picture, side) for picture in made), strict=True)
        numbers |= share(f"{name}_seamless", [step <= limit for step, limit in zip(steps, limits, strict=True)])
        numbers |= {f"{name}_seam": mean(steps), f"{name}_interior_95th": mean(limits)}
        grounds = [background(old) == background(added) for old, added in
                   zip(arrays(source), arrays(made[..., side:]), strict=True)]  # fmt: skip
        numbers |= share(f"{name}_background", grounds)
        rows[name] = made
    return Part(numbers, rows)


def looking_alike(studio: Studio) -> Part:
    """Captions that say no background, drawn in the style of one picture, and moved elsewhere by MasaCtrl beside a
    picture whose caption says one: how many have its background, and obey."""
    edits = studio.edits(another_object, 1)
    pipeline, (said, after) = studio.pipeline, zip(*((edit.words[0], edit.fewest_words[1]) for edit in edits),
                                                   strict=True)  # fmt: skip
    style, way = studio.pictures(edits[:1]), replace(studio.sampling, sampler=DDIM())
    noise, style = inverted(pipeline, to_unit(style), said[0], way), style.expand(len(edits), -1, -1, -1)
    moved = [f"{bare(edit.fewest_words[0])} at the {POSITIONS[(number + 4) % len(POSITIONS)]}"
             for number, edit in enumerate(edits)]  # fmt: skip
    beside = studio.draw(said)
    drawings: dict[str, tuple[Tensor, Sequence[str], Tensor]] = {
        "style_alone": (studio.draw(after, sampling=way), after, style),
        "style": (studio.draw(after, styled(pipeline, noise, said[0]), way), after, style),
        "masactrl_alone": (studio.draw(moved), moved, beside),
        "masactrl": (studio.draw(moved, referring(None, MasaCtrl(), said)), moved, beside),
    }
    numbers, rows = Numbers(), {"style of": style}
    for name, (made, captions, like) in drawings.items():
        taken = [background(one) == background(other) for one, other in zip(arrays(made), arrays(like), strict=True)]
        numbers |= share(f"{name}_background", taken) | share(f"{name}_obeyed", obeyed(made, captions))
        rows |= {"beside": beside} if name == "masactrl_alone" else {}
        rows[name.replace("_", " ")] = made
    return Part(numbers, rows)


PARTS = {"inpainting": inpainted, "sdedit": drawn_again, "words": reworded, "inversion": turned_back,
         "outpainting": grown, "style": looking_alike}  # fmt: skip
