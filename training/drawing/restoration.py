"""The start from a measurement: pictures x of which y = A x + sigma_y n is given, or measured of a picture first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.edits import hole_of
from training.drawing.given import Given, Size, beside, given, reader
from training.drawing.start import Group, Start, source_of
from training.errors import DATA, UserError, as_user_error
from training.ledger import Ledger
from training.settings import decoding
from training.settings.families import all_kinds, kinds, suggestion

if TYPE_CHECKING:
    import argparse

    from torch import Tensor

    from ldm.image_tasks import Method
    from ldm.inverse.operators import Operator
    from ldm.pipeline import Pipeline, Sampling
    from training.drawing.requests import Request

FAMILIES = ("measurement", "posterior")  # of methods
SIGMA_Y = 0.05  # of pictures in [-1, 1]: the noise of the published comparisons


@dataclass(frozen=True)
class Restoration(Start):
    """A measurement given as a picture (or as `y` in safetensors), or made of one with noise of the picture's seed."""

    kind: ClassVar[str] = "restoration"
    fact: ClassVar[str] = "restore"
    inputs: ClassVar[dict[str, str]] = {"sha256": "measurement", "image_sha256": "image", "mask_sha256": "mask"}
    settings: ClassVar[dict[str, tuple[str, type]]] = {
        "kinds": ("restore", dict), "sigma_y": ("sigma_y", float), "invert_mask": ("invert_mask", bool),
        "windows": ("windows", int),
    }  # fmt: skip
    sources: Sequence[Given]
    operator: Operator
    method: Method
    sigma_y: float
    masks: Callable[[Given], Given] | None
    invert_mask: bool
    windows: int

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--restore`, `--measurement`, `--method` and `--sigma-y`."""
        add = group.add_argument
        text = "draw pictures of which this operator gives the measurement: a kind of --operator.kind"
        add("--restore", metavar="OPERATOR", help=text)
        text = "what was measured: a picture, safetensors with y, or a folder of such; without it, --image is measured"
        add("--measurement", metavar="FILE|DIR", help=text)
        own = kinds("measurement")[0]
        text = f"how: a kind of --measurement.kind, with any sampler, or of --posterior.kind (default: {own}); "
        text += "the latter, such as repaint, fill the hole of --mask too, without --restore"
        add("--method", metavar="NAME", help=text)
        text = f"standard deviation of the measurement's noise, of values in [-1, 1] (default: {SIGMA_Y})"
        add("--sigma-y", metavar="S", type=float, help=text)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Restoration | None:
        """The operator of `--restore` and what it measured, where it is given."""
        if not args.restore:
            return None
        if bool(args.measurement) == bool(args.image):
            what = "--restore takes a measurement, or a picture that it measures first"
            raise UserError(what, hint="give one of --measurement FILE and --image FILE")
        sources = given("--measurement" if args.measurement else "--image", args.measurement or args.image, ledger)
        masks = beside("--mask", args.mask, sources, ledger) if args.mask else None
        operator, method = operator_of(args), method_of(args)
        if masks and operator.kind != "mask":
            raise UserError(f"--mask is what --restore mask sees, not {operator.kind}", hint="leave --mask out")
        for source in sources:
            if source.name.endswith(".safetensors"):
                _tensor(source)
        sigma_y = SIGMA_Y if args.sigma_y is None else args.sigma_y
        return cls(sources, operator, method, sigma_y, masks, args.invert_mask, args.windows)

    def facts(self, request: Request) -> dict[str, Any]:
        """The measurement or the picture it was made of, the operator, the method, and the noise."""
        source = source_of(request)
        key = "sha256" if source.flag == "--measurement" else "image_sha256"
        facts = {key: source.sha256, "name": source.name, "sigma_y": self.sigma_y, "windows": self.windows}
        facts |= {"mask_sha256": self.masks(source).sha256, "invert_mask": self.invert_mask} if self.masks else {}
        members = {family_of(self.method.kind): self.method, "operator": self.operator}
        return facts | {"kinds": {name: decoding.values_of(member) for name, member in members.items()}}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """Measurements by one operator and of one shape together."""
        import torch

        from autoencoder.images import to_unit
        from ldm.image_tasks import restoration, stacked

        channels = pipeline.autoencoder.image_channels
        read = reader(channels, size, ledger)

        @cache
        def operator_for(source: Given) -> Operator:
            return self._with_mask(source, size)

        @lru_cache(maxsize=2)  # for a measurement that is drawn from several times
        def given_y(source: Given) -> Tensor:
            return self._read(operator_for(source), source, channels, ledger)

        def measurement(request: Request) -> Tensor:
            source = source_of(request)
            if source.flag == "--image":
                images = to_unit(stacked([read(source)], channels))
                return self._measured(operator_for(source), images, request.seed)
            return given_y(source)

        def alike(pair: tuple[Request, Tensor]) -> tuple[int, torch.Size]:
            return id(operator_for(source_of(pair[0]))), pair[1].shape

        def tasks(requests: list[Request]) -> Iterator[Group]:
            pairs = [(request, measurement(request)) for request in requests]
            for _, group in groupby(pairs, alike):
                own, found = zip(*group, strict=True)
                operator, y = operator_for(source_of(own[0])), torch.cat(found).to(pipeline.device)
                task = restoration(pipeline, operator, y, self.sigma_y, self.method, windows=self.windows)
                yield list(own), task

        return tasks

    def _with_mask(self, source: Given, size: Size | None) -> Operator:
        """The operator, with the mask of this picture where one is given."""
        from ldm.inverse.operators import GivenMask

        if not self.masks:
            return self.operator
        return GivenMask(~hole_of(self.masks(source), source, size, self.invert_mask)[0])

    def _measured(self, operator: Operator, images: Tensor, seed: int) -> Tensor:
        """What the operator gives of images (1, C, H, W) in [-1, 1], with noise of the seed."""
        from ldm.inverse.operators import measure
        from ldm.noise import Noise

        with as_user_error("choose another size with --size, or other settings of the operator"):
            return measure(operator, images, self.sigma_y, Noise.from_seeds([seed]))

    def _read(self, operator: Operator, source: Given, channels: int, ledger: Ledger) -> Tensor:
        """y (1, ...) of a file: `y` of safetensors, or a picture in [-1, 1], grey where the operator gives grey."""
        from autoencoder.images import to_unit
        from ldm.image_tasks import stacked

        if source.name.endswith(".safetensors"):
            return _tensor(source)
        with as_user_error("give a measurement as the operator makes it, or other settings of the operator"):
            y = to_unit(stacked([source.decoded(channels, ledger)], channels))
            if operator.domain(y[:, :1])[0] == channels:  # of one channel in y it makes all of the picture's
                y = to_unit(stacked([source.decoded(1, Ledger())], 1))
            operator.domain(y)
        return operator(y) if operator.kind == "mask" else y


def _tensor(source: Given) -> Tensor:
    """`y` (1, ...) of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        y: Tensor = load(source.data)["y"]
    except (SafetensorError, KeyError, ValueError) as failure:
        what = f"{source.flag} {source.name} is no safetensors file with a tensor named y ({failure})"
        raise UserError(what, hint="store the measurement (1, ...) under y", code=DATA) from None
    if len(y) != 1:
        what = f"{source.flag} {source.name} holds {len(y)} measurements"
        raise UserError(what, hint="store one, as (1, ...)", code=DATA)
    return y.float()


def operator_of(args: argparse.Namespace) -> Operator:
    """That of `--restore` and `--operator.KEY`, or of the facts that `--like` read."""
    if isinstance(args.restore, dict):
        told: Operator = _of_facts(args, "operator")
        return told
    operator: Operator = decoding.chosen("operator", {"operator.kind": args.restore, **args.overrides})
    return operator


def method_of(args: argparse.Namespace) -> Method:
    """That of `--method` and `--measurement.KEY` or `--posterior.KEY`, or of the facts that `--like` read."""
    if isinstance(args.restore, dict):
        told: Method = _of_facts(args, next((name for name in FAMILIES if name in args.restore), FAMILIES[0]))
        return told
    named = [name for name in FAMILIES if any(key.startswith(f"{name}.") for key in args.overrides)]
    family = family_of(args.method) if args.method else (named or FAMILIES)[0]
    method: Method = decoding.chosen(family, ({f"{family}.kind": args.method} if args.method else {}) | args.overrides)
    return method


def _of_facts(args: argparse.Namespace, section: str) -> Any:
    """A member as a picture tells of it: its values are written as flags would be."""
    values = args.restore.get(section)
    if not isinstance(values, dict):
        raise UserError(f"{args.like} does not say its {section}", hint="restore it by flags instead", code=DATA)
    return decoding.recalled(section, values)


def family_of(kind: str) -> str:
    """Where a method stands. Raises UserError for one that there is not."""
    for family in FAMILIES:
        if kind in all_kinds(family):
            return family
    known = [kind for family in FAMILIES for kind in all_kinds(family)]
    raise UserError(f"--method {kind}: there is none of that name{suggestion(kind, known)}", hint=", ".join(known))
