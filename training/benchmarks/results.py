"""What a suite measured: as a table, as a record, and in docs/benchmarks.md, whose tables it renews."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from training.benchmarks.case import Case, Number, Place

HEAD = ("| case | what | target | measured | least favourable round | |", "| --- | --- | ---: | ---: | ---: | --- |")
UNKNOWN = "not yet measured"
ALLOCATOR = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF")


def numbers(case: Case, found: Mapping[str, Any], device: str) -> list[Number]:
    """Of each target of a case that was measured."""
    lanes = found[case.kind]["lanes"]
    return [Number.of(target, lanes) for target in case.at(device)[1] if {target.over, target.under} <= lanes.keys()]


def missed(cases: Iterable[Case], found: Mapping[str, Any], device: str, slack: float) -> list[str]:
    """The targets that `--check` holds to, of which not even `slack` is reached."""
    told = [(case, number) for case in cases for number in numbers(case, found, device) if number.target.checked]
    return [f"{case.kind}: {number.target.name} {shown(number, number.value)} (target {number.target.told()})"
            for case, number in told if number.target.met(number.value, slack) is False]  # fmt: skip


def shown(number: Number, value: float) -> str:
    """A number with its unit."""
    if number.target.minus:
        return f"{value:.2f} s"
    return f"{value:.1%}" if number.target.share else f"{value:.2f}x"


def table(cases: Iterable[Case], found: Mapping[str, Any], device: str) -> list[str]:
    """Markdown: a row for each target of each case; what was not measured says so."""
    return [*HEAD, *(row for case in cases for row in rows(case, found, device))]


def rows(case: Case, found: Mapping[str, Any], device: str) -> Iterator[str]:
    """Of one case."""
    if case.kind not in found:
        for target in case.at(device)[1]:
            yield f"| {case.title} | {target.name} | {target.told()} | {UNKNOWN} | | |"
        return
    for number in numbers(case, found, device):
        met = {True: "met", False: "not met", None: ""}[number.target.met(number.value)]
        values = f"{shown(number, number.value)} | {shown(number, number.worst)}"
        yield f"| {case.title} | {number.target.name} | {number.target.told()} | {values} | {met} |"


def below(about: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is told under a table: the machine, and the rates of all lanes."""
    facts = "; ".join(f"{name} {value}" for name, value in about.items())
    return [f"{facts}.", "", *(line for kind, result in found.items() for line in _rates(kind, result))]


def _rates(kind: str, result: Mapping[str, Any]) -> Iterator[str]:
    lanes, each = result["lanes"], result["items"]
    if kind.startswith("memory-"):
        told = [f"{name} {min(values):.1f} MiB" for name, values in lanes.items()]
    else:
        told = [f"{name} {min(values):.4g} s ({each / median(values):.4g} {result['unit']}/s)"
                if "product" not in name and "TFLOP" not in name else f"{name} {min(values):.4g} s"
                for name, values in lanes.items()]  # fmt: skip
    told += [f"{name} {value:.4g}" for name, value in result["facts"].items()]
    counted = f", {result['flops'] / 1e9:.4g} GFLOP a call" if result["flops"] else ""
    yield f"- `{kind}`{counted}: {'; '.join(told)}"


def record(about: Mapping[str, Any], cases: Sequence[Case], found: Mapping[str, Any], device: str) -> dict[str, Any]:
    """All of it, for machines."""
    told = {case.kind: [{"what": n.target.name, "least": n.target.least, "most": n.target.most, "median": n.value,
                         "worst": n.worst, "met": n.target.met(n.value)} for n in numbers(case, found, device)]
            for case in cases}  # fmt: skip
    return {"about": dict(about), "cases": {kind: {**found[kind], "numbers": told[kind]} for kind in found}}


def renewed(page: str, cases: Sequence[Case], found: Mapping[str, Any], about: Mapping[str, Any], device: str) -> str:
    """A page with the section of `device` as it was measured just now; that of the other device stays as it is."""
    mark = f"<!-- measured: {device} -->"
    begin, _, rest = page.partition(f"{mark}\n")
    _, end_mark, end = rest.partition("<!-- end -->")
    if not end_mark:
        raise ValueError(f"the page has no section {mark} ... <!-- end -->")
    told = below(about, found) if found else [f"{UNKNOWN.capitalize()}."]
    text = "\n".join([*table(cases, found, device), "", *told])
    return f"{begin}{mark}\n{text}\n{end_mark}{end}"


def environment(place: Place, *, smoke: bool) -> dict[str, Any]:
    """What numbers depend on, before anything is measured."""
    import torch

    told: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "size": "smoke" if smoke else "full"}
    told |= {name: version(name) for name in ("torch", "diffusers", "webdataset")}
    told |= {"python": platform.python_version(), "processor": processor(), "cores": os.cpu_count(),
             "threads": place.threads or torch.get_num_threads(),
             "clock": "processor time" if place.processor else "wall time",
             "load before": round(os.getloadavg()[0], 2)}  # fmt: skip
    tuned = {name: value for name, value in os.environ.items() if name.startswith(ALLOCATOR)}
    told |= {"allocator by environment": ", ".join(f"{k}={v}" for k, v in tuned.items())} if tuned else {}
    return told | ({"GPU": torch.cuda.get_device_name()} if place.device == "cuda" else {})


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The model's name, where the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
