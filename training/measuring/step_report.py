"""What `compare_steps` says: how many steps are enough, a table of every setting, and a chart."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from training.commands import opener
from training.measuring.distances import share
from training.pictures import charts

FILES = ("comparison.json", "comparison.md", "comparison.png")
Row = dict[str, Any]  # a setting: run, sampler, steps, calls, seconds_..., quality: {name: [value, low, high]}, numbers


class Quality(NamedTuple):
    """A number that settings are ranked by."""

    key: str
    name: str
    higher: bool  # whether more of it is better

    def best(self, rows: Sequence[Row]) -> Row:
        """The setting that has the best value; of equal ones the one that asks the network least."""
        sign = -1 if self.higher else 1
        return min(rows, key=lambda row: (sign * row["quality"][self.key][0], *cheap(row)))

    def level(self, best: Row, part: float) -> float:
        """The value that is `part` of the best; of a distance, best / part."""
        value: float = best["quality"][self.key][0]
        return part * value if self.higher else value / part

    def reaches(self, row: Row, level: float, *, surely: bool = False) -> bool:
        """Whether the interval of a setting reaches that value, or, `surely`, what was measured itself does."""
        value, low, high = row["quality"][self.key]
        if surely:
            return bool(value >= level if self.higher else value <= level)
        return bool(high >= level if self.higher else low <= level)


OBEDIENCE = Quality("obedience", "share of pictures that are as asked", True)
FRECHET = Quality("frechet", "Frechet distance (less is better)", False)
RULE = (
    "Enough is the setting with the fewest network calls a picture (of these the quickest) whose 95 % interval reaches"
    " {0} of the best value measured: its upper end is at least {0} times that; of a distance, its lower end is at most"
    " that over {0}."
)
COSTS = {"calls": "network calls a picture", "seconds_denoising": "seconds of denoising a picture"}


def qualities(numbers: Mapping[str, Any], obeyed: Sequence[bool]) -> dict[str, list[float]]:
    """[value, low, high] of what a setting is ranked by: the share of all pictures obeyed, whatever the number of
    objects, and the Frechet distance of those that were compared."""
    found = dict[str, list[float]]()
    if obeyed:
        told = share("obedience", obeyed)
        found["obedience"] = [told["obedience"], *told["obedience_95"]]
    if "frechet_generated" in numbers:
        found["frechet"] = [numbers["frechet_generated"], *numbers["frechet_generated_95"]]
    return found


def ranked_by(rows: Sequence[Row]) -> list[Quality]:
    """What the settings were measured by."""
    return [quality for quality in (OBEDIENCE, FRECHET) if quality.key in rows[0]["quality"]]


def cheap(row: Row) -> tuple[float, float]:
    """What a setting costs, to be ordered by."""
    return row["calls"], row["seconds_denoising"]


def enough(rows: Sequence[Row], quality: Quality, part: float) -> Row | None:
    """The setting that `RULE` takes; None where the best of them is worth nothing."""
    best = quality.best(rows)
    if quality.higher and best["quality"][quality.key][0] == 0:
        return None
    return min((row for row in rows if quality.reaches(row, quality.level(best, part))), key=cheap)


def recommendations(rows: Sequence[Row], part: float) -> dict[str, dict[str, Any]]:
    """By each quality what is enough of each run, against that run's own best; and of all runs."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    groups: dict[str, Sequence[Row]] = {run: [row for row in rows if row["run"] == run] for run in runs}
    found = dict[str, dict[str, Any]]()
    for quality in ranked_by(rows):
        of_runs = {run: _told(group, quality, part) for run, group in groups.items()}
        found[quality.key] = {"runs": of_runs, "all": _told(rows, quality, part)}
    return found


def _told(rows: Sequence[Row], quality: Quality, part: float) -> dict[str, Any] | None:
    chosen, best = enough(rows, quality, part), quality.best(rows)
    if chosen is None:
        return None
    sure = quality.reaches(chosen, quality.level(best, part), surely=True)
    return {"enough": _short(chosen, quality), "best": _short(best, quality), "by_its_interval_alone": not sure}


def _short(row: Row, quality: Quality) -> dict[str, Any]:
    facts = {key: row[key] for key in ("run", "sampler", "steps", "calls", "seconds_denoising")}
    return {**facts, "quality": row["quality"][quality.key]}


def report(found: Mapping[str, Any]) -> Iterator[str]:
    """All of it, as Markdown."""
    about, rows = found["about"], found["rows"]
    yield from ("# How many steps are enough", "", "```bash")
    yield from (shlex.join([*opener("compare_steps", "python"), *sys.argv[1:]]), "```", "")
    yield from recommended(found["recommended"], about["good_enough"])
    yield from ("", *table(rows, found["baselines"]), "")
    where = f"{about['device']} with {about['threads']} thread{'s' * (about['threads'] != 1)}"
    yield (
        f"Network calls and seconds are those of one picture, in batches of up to {about['batch_size']} on {where}:"
        " calls counted, where guidance makes two at a time; seconds the median over batches, which all settings drew"
        " in turn. In parentheses 95 % intervals."
    )


def recommended(found: Mapping[str, Any], part: float) -> Iterator[str]:
    """A line a run and quality, and one of all runs; then the rule."""
    for quality in (OBEDIENCE, FRECHET):
        if (told := found.get(quality.key)) is None:
            continue
        whose = dict(told["runs"])
        if len(whose) > 1:
            whose["all runs"] = told["all"]
        for run, choice in whose.items():
            yield f"- {run}, by {quality.key}: {_sentence(run, choice)}"
    yield from ("", RULE.format(f"{part:.3g}"))


def _sentence(run: str, choice: Mapping[str, Any] | None) -> str:
    if choice is None:
        return "no number of steps is enough, since no picture of any is as asked."
    chosen, best = choice["enough"], choice["best"]

    def setting(row: Mapping[str, Any]) -> str:
        own = "" if row["run"] == run else f" of {row['run']}"
        return f"{row['steps']} step{'s' * (row['steps'] != 1)} with {row['sampler']}{own}"

    cost = f"{_calls(chosen)} network calls and {chosen['seconds_denoising']:.3g} s a picture"
    text: str = f"**{setting(chosen)}**, {cost}: {interval(*chosen['quality'])}"
    if setting(chosen) == setting(best):
        return f"{text}, the best that was measured."
    text += f"; the best is {interval(*best['quality'])}, {setting(best)}, {_calls(best)} calls."
    alone = choice["by_its_interval_alone"]
    return f"{text} It is enough by its interval alone: with a larger --count it may not be." if alone else text


def table(rows: Sequence[Row], baselines: Mapping[str, Any]) -> Iterator[str]:
    """A row of each setting; beneath, what pictures get that no model drew."""
    shown = {f"obedience_{objects}": f"obeyed, {objects} object{'s' * (objects > 1)}" for objects in (1, 2, 3)}
    shown |= {"obedience": "obeyed", "frechet_generated": "Frechet distance", "kernel_distance": "kernel distance"}
    shown = {key: name for key, name in shown.items() if key in rows[0]["numbers"]}
    pooled = {"all obeyed": "obedience"} if "obedience_1" in shown else {}
    head = ["run", "sampler", "steps", "network calls", "denoising, s", "decoding, s", *pooled, *shown.values()]
    yield _line(head)
    yield _line(["---", "---", *["---:"] * (len(head) - 2)])
    for row in rows:
        cells = [row["run"], row["sampler"], str(row["steps"]), _calls(row)]
        cells += [f"{row[f'seconds_{what}']:.3g}" for what in ("denoising", "decoding")]
        cells += [interval(*row["quality"][key]) for key in pooled.values()]
        yield _line([*cells, *(_cell(row["numbers"], key) for key in shown)])
    for number, (coder, numbers) in enumerate(baselines.items()):
        which = f" (autoencoder {coder[:8]})" if len(baselines) > 1 else ""
        whose = {"reconstructed": f"reconstructed pictures{which}", "training": "training pictures"}
        for name, told in whose.items():
            if f"frechet_{name}" in numbers and not (number and name == "training"):
                keys = {"frechet_generated": f"frechet_{name}", "kernel_distance": f"kernel_distance_{name}"}
                yield _line([told, *[""] * (5 + len(pooled)), *(_cell(numbers, keys.get(key, key)) for key in shown)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(numbers: Mapping[str, Any], key: str) -> str:
    return interval(numbers[key], *numbers[f"{key}_95"]) if key in numbers else ""


def interval(value: float, low: float, high: float) -> str:
    """A number and its interval, for people: four digits, no more than three of them after the point."""
    return f"{_number(value)} ({_number(low)} to {_number(high)})"


def _number(value: float) -> str:
    digits = 3 - min(3, max(0, math.floor(math.log10(max(1.0, abs(value))))))
    return f"{value:.{digits}f}"


def _calls(row: Mapping[str, Any]) -> str:
    return f"{row['calls']:.4g}"


def chart(rows: Sequence[Row], part: float) -> Image.Image:
    """For each quality, that against network calls and against seconds: a line a run and sampler, the steps at its
    points, and dashed the value that is enough."""
    return charts.stacked([_panels(rows, quality, part) for quality in ranked_by(rows)])


def _panels(rows: Sequence[Row], quality: Quality, part: float) -> Image.Image:
    level = quality.level(quality.best(rows), part)
    up = charts.Axis(quality.name, 0, 1)
    if not quality.higher:
        values, lows, highs = zip(*(row["quality"][quality.key] for row in rows), strict=True)
        seen = [max(low, min(values) / 4) for low in lows]  # an interval may end at 0, which a logarithm never shows
        up = charts.Axis.around(quality.name, [*seen, *highs, level], log=True)
    panels = []
    for key, name in COSTS.items():
        across = charts.Axis.around(name, [row[key] for row in rows], log=True)
        panels.append(charts.panel(_spots(rows, quality, key), across, up, level))
    names, dashed = list(_spots(rows, quality, "calls")), f"{part:.3g} of the best"
    return charts.abreast([*panels, charts.legend(names, dashed if quality.higher else f"the best / {part:.3g}")])


def _spots(rows: Sequence[Row], quality: Quality, across: str) -> dict[str, list[charts.Spot]]:
    """The points of each line."""
    lines = dict[str, list[charts.Spot]]()
    for row in rows:
        value, low, high = row["quality"][quality.key]
        spot = charts.Spot(row[across], value, low, high, str(row["steps"]))
        lines.setdefault(f"{row['run']}, {row['sampler']}", []).append(spot)
    return lines
