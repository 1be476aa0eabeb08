"""The start from other models: a cascade, whose last stage is shown what the stages before it draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from training.drawing.given import Given, Size
from training.drawing.start import Group, Start
from training.errors import CHECKPOINT, UserError, as_user_error
from training.ledger import Ledger
from training.settings import decoding
from training.settings.embedded import check_model

if TYPE_CHECKING:
    import argparse

    from ldm.pipeline import Pipeline, Sampling
    from training.drawing.requests import Request
    from training.models.assembly import HashedPipeline

DRAWS = ("sampler", "grid", "guidance", "sample")  # sections of a config that say how pictures are made
AGAIN = "give the models of that picture with --cascade, in their order"


@dataclass(frozen=True)
class Cascaded(Start):
    """Pictures of the models before the last, drawn from the same captions, each by its run's own settings."""

    kind: ClassVar[str] = "cascade"
    fact: ClassVar[str] = "cascade"
    shows: ClassVar[tuple[str, ...]] = ("low-res",)
    settings: ClassVar[dict[str, tuple[str, type]]] = {"level": ("level", float)}
    runs: Sequence[str]  # the last is the model that draws
    level: float | None
    negative: str
    text_encoder: str | None
    sources: Sequence[Given] = ()

    @classmethod
    def add_flags(cls, group: Any) -> None:
        """Add `--cascade` and `--level`."""
        add = group.add_argument
        text = "draw by several models, each of which enlarges what the one before drew: name each, first to last"
        add("--cascade", metavar="RUN", action="append", default=[], help=text)
        text = "noise in [0, 1] on the picture that the last of --cascade enlarges (default: as its config says)"
        add("--level", metavar="U", type=float, help=text)

    @classmethod
    def from_flags(cls, args: argparse.Namespace, ledger: Ledger) -> Cascaded | None:
        """The models of `--cascade`, where they are given."""
        if not args.cascade:
            return None
        if args.level is not None and not 0 <= args.level <= 1:
            what = f"--level: must lie in [0, 1] (got {args.level:g})"
            raise UserError(what, hint="0 shows the picture as it is, 1 nothing of it")
        if args.size and not args.like:
            raise UserError("--size: a cascade draws at the size of its last model", hint="leave --size out")
        ledger.add("ignored", "flags that only the last model of a cascade reads", "--also", bool(args.also))
        return cls(args.cascade, args.level, args.negative_prompt, args.text_encoder)

    @cached_property
    def before(self) -> list[HashedPipeline]:
        """The models before the last, on the CPU until `tasks` takes them elsewhere."""
        from training.models.assembly import load_pipeline

        return [load_pipeline(run, "cpu", self.text_encoder) for run in self.runs[:-1]]

    def seed_of(self, request: Request) -> int:
        """That of the last stage: the picture's own seed is that of the first."""
        from ldm.cascade import stage_seeds

        return stage_seeds([request.seed], len(self.runs) - 1)[0]

    def facts(self, request: Request) -> dict[str, Any]:
        """What each model before the last is, how it draws, and the level of noise on what it drew."""
        from training.models.folders import name_of

        stages = [{"model": name_of(run), "hashes": pipeline.hashes, "settings": _settings(run)}
                  for run, pipeline in zip(self.runs, self.before, strict=False)]  # the last is told as any model is
        return {"stages": stages, "level": self.level if self.level is not None else _own_level(self.runs[-1])}

    def tasks(self, pipeline: Pipeline, sampling: Sampling, size: Size | None,
              ledger: Ledger) -> Callable[[list[Request]], Iterator[Group]]:
        """All requests together: what they are shown is drawn first."""
        from ldm.cascade import Cascade, Stage

        for other in self.before:
            parts: list[Any] = [other.autoencoder, other.denoiser.backbone, other.text]
            for part in parts:
                part.to(pipeline.device)
        with as_user_error("give the models of --cascade from the smallest pictures to the largest"):
            whole = Cascade([*map(Stage, self.before), Stage(pipeline)])
        with as_user_error("give a --level within it, or leave it out: the model has its own"):
            whole = replace(whole, stages=[*whole.stages[:-1], Stage(pipeline, self.level)])

        def tasks(requests: list[Request]) -> Iterator[Group]:
            captions, seeds = [request.prompt for request in requests], [request.seed for request in requests]
            yield requests, whole.last(whole.before_last(captions, seeds, self.negative))

        return tasks

    @classmethod
    def recall(cls, args: argparse.Namespace, path: Path, facts: dict[str, Any]) -> None:
        """The level; the models are given again. Raises UserError where they are not."""
        if not args.cascade:
            models = ", ".join(str(stage.get("model")) for stage in facts["stages"])
            raise UserError(f"{path} was drawn by a cascade ({models} before its own model)", hint=AGAIN)
        super().recall(args, path, facts)

    @classmethod
    def sound(cls, facts: Any) -> bool:
        """Whether the facts in a picture are of the kinds that `facts` gives."""
        return (super().sound(facts) and isinstance(facts.get("stages"), list)
                and all(isinstance(stage, dict) for stage in facts["stages"]))

    @classmethod
    def compare(cls, path: Path, then: Any, now: Any) -> None:
        """Raises UserError (exit 4) where the picture was drawn by other models, or by other settings of theirs."""
        was, own = ((facts or {}).get("stages", []) for facts in (then, now))
        if len(was) != len(own):
            what = f"{path} was drawn by a cascade of {len(was) + 1} models, this is one of {len(own) + 1}"
            raise UserError(what, hint=AGAIN, code=CHECKPOINT)
        for number, (before, after) in enumerate(zip(was, own, strict=True), 1):
            if odd := [key for key in ("hashes", "settings") if before.get(key) != after.get(key)]:
                what = f"{path} was drawn by a cascade whose model {number} has other {odd[0]}"
                raise UserError(what, hint=AGAIN, code=CHECKPOINT)


def settle(args: argparse.Namespace) -> None:
    """Let `--model`, which may stand before `--cascade`, be the last model. Raises UserError where there is none, or
    only one in a cascade."""
    if args.cascade:
        args.cascade = [*([args.model] if args.model else []), *args.cascade]
        if len(args.cascade) == 1:
            what = "--cascade names one model, and a cascade is of two at least"
            raise UserError(what, hint="give it once for each: --cascade BASE --cascade UPSCALER")
        for run in args.cascade:
            check_model(run)
            refuse_control(run)
        args.model = args.cascade[-1]
    if not args.model:
        raise UserError("the following arguments are required: --model", hint="name a run: --model RUN")


def refuse_control(run: str) -> None:
    """Raises UserError for the run of a control, which draws by a hint that a cascade does not give it."""
    from ldm.adapters.controlled import ControlConfig

    if isinstance(config_of(run).adapter, ControlConfig):
        what = f"--cascade {run}: is a control, which is shown a hint, and a cascade shows none"
        hint = "give its base in its place; or draw by it alone, generate --model BASE --control RUN --hint FILE"
        raise UserError(what, hint=f"{hint}, and enlarge that")


def config_of(run: str) -> decoding.DenoiserConfig:
    """The config of a denoiser's run."""
    from training.models.folders import find

    config = find(run, "denoiser").config()
    assert isinstance(config, decoding.DenoiserConfig)
    return config


def _settings(run: str) -> dict[str, Any]:
    values = decoding.to_values(config_of(run))
    return {name: values[name] for name in DRAWS}


def _own_level(run: str) -> float | None:
    return getattr(config_of(run).image, "level", None)
