"""The nearest training picture of each of many pictures: training pictures pass by in chunks, none of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from autoencoder.images import as_rgb
from training.data.images import Images
from training.measuring.held_out import CHUNK, chunks

Space = Callable[[Tensor], Tensor]  # uint8 pictures (B, C, H, W) -> points (B, D) float32
PIXELS_SIDE = 16  # pictures are averaged to so many pixels a side at most before pixels are compared


class Nearest(NamedTuple):
    """Of each of Q pictures: the distance to its nearest training picture, its place, and whether it is mirrored."""

    distance: Tensor  # (Q,) float32
    place: Tensor  # (Q,) int64
    mirrored: Tensor  # (Q,) bool

    def part(self, start: int, stop: int) -> Nearest:
        """Of the pictures from `start` to before `stop`."""
        return Nearest(self.distance[start:stop], self.place[start:stop], self.mirrored[start:stop])


def pixel_space(height: int, width: int) -> Space:
    """Colours in [0, 1] of pictures averaged to `PIXELS_SIDE` at most, scaled so that distances are RMS."""
    size = min(height, PIXELS_SIDE), min(width, PIXELS_SIDE)

    def points(pixels: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(as_rgb(pixels).float() / 255, size).flatten(1)
        scaled: Tensor = small / small.shape[1] ** 0.5
        return scaled

    return points


class Search:
    """The point nearest to each of `queries` (Q, D) by Euclidean distance, among those looked at; the first of equals.

    Candidates come from |t|^2 - 2 q.t, whose rounding hides small distances; what is kept is |q - t| itself.
    Memory: (Q, D + N) floats.
    """

    def __init__(self, queries: Tensor) -> None:
        self.centre = queries.mean(0)  # distances stay, and less is lost to rounding
        self.queries = queries - self.centre
        self.square = self.queries.square().sum(1)
        self.best = torch.full_like(self.square, torch.inf)
        self.place = torch.full_like(self.square, -1, dtype=torch.int64)

    def look(self, points: Tensor, places: Tensor) -> None:
        """Compare with further points (N, D) at `places` (N,)."""
        points = points - self.centre
        rough, found = (points.square().sum(1) - 2 * self.queries @ points.T).min(1)
        slack = 1e-5 * (self.square + points.square().sum(1).max())
        maybe = (rough + self.square < self.best.square() + slack).nonzero()[:, 0]
        exact = (self.queries[maybe] - points[found[maybe]]).norm(dim=1)
        closer = exact < self.best[maybe]
        self.best[maybe[closer]] = exact[closer]
        self.place[maybe[closer]] = places[found[maybe[closer]]]


def nearest(
    spaces: Mapping[str, Space],
    queries: Iterable[Tensor],
    training: Images,
    places: Sequence[int],
    device: torch.device,
) -> dict[str, Nearest]:
    """In each space the nearest of the training pictures at `places` to each of uint8 pictures, which come batch by
    batch, as they are and mirrored."""
    rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in spaces}
    for pixels in queries:
        for name, space in spaces.items():
            for side, shown in zip(rows[name], (pixels, pixels.flip(-1)), strict=True):
                side.append(space(shown).float())
    searches = {name: Search(torch.cat([*plain, *mirrored])) for name, (plain, mirrored) in rows.items()}
    for start, pixels in enumerate(chunks(training, places, device, "searching training pictures")):
        at = torch.tensor(places[start * CHUNK : start * CHUNK + len(pixels)], device=device)
        for name, space in spaces.items():
            searches[name].look(space(pixels).float(), at)
    return {name: _either(search) for name, search in searches.items()}


def _either(search: Search) -> Nearest:
    """The nearer of each picture and its mirror image, which stand in the two halves of a search."""
    (plain, mirrored), (at, at_mirrored) = (values.cpu().chunk(2) for values in (search.best, search.place))
    turned = mirrored < plain
    return Nearest(torch.minimum(plain, mirrored), torch.where(turned, at_mirrored, at), turned)
