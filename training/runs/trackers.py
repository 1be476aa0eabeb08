"""Trackers of other programs (TensorBoard, Weights & Biases, MLflow, Trackio ...), through Accelerate: they are told
what metrics.jsonl holds, which alone is read again."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError, missing_extra
from training.files import write_json
from training.guarding import read_record
from training.messages import note, warn
from training.settings.families import suggestion

PROJECT = "latent-diffusion"  # what the runs stand together under
RECORD = "trackers.json"  # in a run folder: under what its trackers know it
OURS = {"tensorboard", "wandb", "mlflow", "trackio"}  # the packages of the extra


def choose(text: str) -> list[str]:
    """The trackers of `--report-to`, each once; none for "none". Raises UserError for one that Accelerate does not
    know, and for one whose package is not installed."""
    if text == "none":
        return []
    from accelerate import tracking

    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    known, there = list(tracking.LOGGER_TYPE_TO_CLASS), {str(name) for name in tracking.get_available_trackers()}
    for name in names:
        if name not in known:
            what = f"--report-to {name}: there is no such tracker{suggestion(name, known)}"
            raise UserError(what, hint=f"give one or more of {', '.join(known)}, with commas between, or none")
        if name in tracking.LoggerType.list() and name not in there:
            what_for = f"--report-to {name}"
            if name in OURS:
                raise missing_extra(name, "trackers", what_for)
            raise UserError(f"{what_for} needs {name}, which is not installed", hint=f"pip install {name}")
    return names


@dataclass(frozen=True)
class Identity:
    """Under what a run's trackers know it, and the first step that they are told now."""

    name: str
    id: str
    begin: int
    begun: Mapping[str, str]  # the trackers that were told of it before, with what they call it themselves


# What a tracker is begun with, so that a resumed run goes on where it stood; all others begin anew.
HOW: Mapping[str, Callable[[Identity], dict[str, Any]]] = {
    "tensorboard": lambda run: {"purge_step": run.begin},
    "wandb": lambda run: {"name": run.name, "id": run.id, "resume": "allow"},
    "trackio": lambda run: {"name": run.name, "resume": "allow"},
    "mlflow": lambda run: {"run_id": run.begun["mlflow"]} if "mlflow" in run.begun else {"run_name": run.name},
}
OWN_NAMES: Mapping[str, Callable[[Any], str]] = {"mlflow": lambda tracker: str(tracker.tracker.info.run_id)}


def _array(path: Path) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def _tensorboard(tracker: Any, path: Path, step: int) -> None:
    tracker.log_images({path.stem: _array(path)[None]}, step=step, dataformats="NHWC")


def _trackio(tracker: Any, path: Path, step: int) -> None:
    import trackio

    tracker.log({path.stem: trackio.Image(_array(path))}, step=step)


def _mlflow(tracker: Any, path: Path, step: int) -> None:
    tracker.log_artifact(str(path), f"samples/step-{step:08d}")


def _single(tracker: Any, path: Path, step: int) -> None:
    tracker.log_images({path.stem: _array(path)}, step=step)


def _listed(tracker: Any, path: Path, step: int) -> None:
    if hasattr(tracker, "log_images"):
        tracker.log_images({path.stem: [_array(path)]}, step=step)


PICTURES: Mapping[str, Callable[[Any, Path, int], None]] = {
    "tensorboard": _tensorboard, "trackio": _trackio, "mlflow": _mlflow, "aim": _single, "clearml": _single,
}  # fmt: skip


class Trackers:
    """Those of `names` that work, told of a run from `step` on. One that fails is left out, said once.

    They are begun when first told of something: by then the loader processes are forked, which must not have their
    threads. As a context manager: ended with it.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        run: Path = Path(),
        values: Mapping[str, Mapping[str, Any]] | None = None,
        step: int = 0,
    ) -> None:
        """`values`: the run's config by section, which they keep as hyperparameters."""
        self.waiting, self.working = list(names), dict[str, Any]()
        self.run, self.values, self.step = run, values or {}, step

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self.working.items()):  # one that was told nothing is not begun to be ended
            with self._left_out_where_it_fails(name):
                tracker.finish()
        self.working = {}

    def log(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Tell the values of steps."""
        told = list(rows)
        for name, tracker in self._all():
            with self._left_out_where_it_fails(name):
                for step, values in told:
                    tracker.log(dict(values), step=step)

    def show(self, folder: Path, step: int) -> None:
        """Show the pictures of a folder, to those trackers that take pictures."""
        paths = sorted(folder.glob("*.png"))
        for name, tracker in self._all():
            with self._left_out_where_it_fails(name):
                for path in paths:
                    PICTURES.get(name, _listed)(tracker, path, step)

    def _all(self) -> list[tuple[str, Any]]:
        waiting, self.waiting = self.waiting, []
        for name in waiting:
            with self._left_out_where_it_fails(name):
                self._begin(name)
        return list(self.working.items())

    def _begin(self, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        identity = self._identity()
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        own = {"tensorboard": "tensorboard", "wandb": os.environ.get("WANDB_PROJECT", PROJECT)}  # there a folder's name
        folder = [str(self.run)] if kind.requires_logging_directory else []
        tracker = kind(own.get(name, PROJECT), *folder, **(HOW[name](identity) if name in HOW else {}))
        tracker.start()
        self.working[name] = tracker
        if name not in identity.begun or name not in HOW:
            tracker.store_init_configuration(flat(self.values))
        begun = {**identity.begun, name: OWN_NAMES[name](tracker) if name in OWN_NAMES else ""}
        write_json(self.run / RECORD, {"id": identity.id, "begun": begun})

    def _identity(self) -> Identity:
        path = self.run / RECORD
        record = read_record(path, {"id": str, "begun": dict}) if path.is_file() else {}
        own = record.get("id") or uuid.uuid4().hex[:8]
        name = f"{self.run.resolve().name}-{own}"
        return Identity(name, own, self.step + 1 if self.step else 0, record.get("begun", {}))

    @contextmanager
    def _left_out_where_it_fails(self, name: str) -> Iterator[None]:
        try:
            with redirect_stdout(sys.stderr):  # what some print of themselves is no answer of ours
                yield
        except Exception as failure:
            self.working.pop(name, None)
            why = str(failure).strip().partition("\n")[0][:200] or type(failure).__name__
            warn(f"{name} is told nothing from here on ({why}); metrics.jsonl holds everything")


def flat(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A config as trackers take it: `section.key` to a number or text, lists as JSON."""
    pairs = ((f"{section}.{key}", value) for section, keys in values.items() for key, value in keys.items())
    return {key: value if isinstance(value, bool | int | float | str) else json.dumps(value) for key, value in pairs}


def tell_left(run: Path, names: Sequence[str]) -> None:
    """Say that a log of TensorBoard, which earlier versions always wrote, is not gone on with."""
    if "tensorboard" not in names and (run / "tensorboard").is_dir():
        note(f"{run / 'tensorboard'} is not gone on with; --report-to tensorboard does that")
