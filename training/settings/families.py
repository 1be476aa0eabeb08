"""What --help lists of the diffusion core, without importing torch: the kinds of its families, read from their files,
and the methods that are a key of theirs; and what is said of names that are not known."""

from __future__ import annotations

import ast
import difflib
from importlib import resources
from typing import NamedTuple

from training.settings.plugins import kinds_of_packages
from training.settings.sections import Conditioning, Format, Loss, Optimizer, Prior, Sample, Train

Families = dict[str, tuple[type, ...]]
FAMILIES = {  # section: a module or package of ldm, and the tuple there that lists the members
    "schedule": ("schedules", "SCHEDULES"),
    "prediction": ("predictions", "PREDICTIONS"),
    "times": ("times", "TIMES"),
    "weighting": ("weighting", "WEIGHTINGS"),
    "pairing": ("pairing", "PAIRINGS"),
    "grid": ("grids", "GRIDS"),
    "sampler": ("samplers", "SAMPLERS"),
    "guidance": ("guidance", "GUIDANCES"),
    "objective": ("objectives", "OBJECTIVES"),
    "representation": ("representation", "REPRESENTATIONS"),
    "operator": ("inverse/operators", "OPERATORS"),
    "measurement": ("inverse/measurement", "MEASUREMENTS"),
    "posterior": ("inverse/posterior", "POSTERIORS"),
    "coupling": ("coupling", "COUPLINGS"),
    "adapter": ("adapters", "ADAPTERS"),
    "image": ("image_conditions", "IMAGE_CONDITIONS"),
}


class Part(NamedTuple):
    """Sections that are a choice among kinds, and beside them the methods that are keys: by name, an example."""

    sections: tuple[str, ...]
    methods: dict[str, str]


TRAINING = Part(
    ("schedule", "prediction", "times", "weighting", "pairing", "representation", "adapter", "image"),
    {
        "zero-terminal SNR (any ddpm-*)": "--schedule.kind ddpm-scaled-linear --schedule.zero_terminal_snr true",
        "resolution shift of the process (any ddpm-*)": "--schedule.kind ddpm-cosine --schedule.shift 4",
        "resolution shift of training times (logit-normal, uniform)": "--times.shift 3",
        "score matching over noise levels (NCSN, SMLD)": "--schedule.kind ve --prediction.kind score "
        "--weighting.kind snr",
        "stratified times (any kind)": "--times.stratified true",
        "learned variance": "--backbone.learned_variance true",
        "velocity-direction loss": "--objective.direction 0.5",
        "contrastive flow matching": "--objective.contrastive 0.05",
        "token routing (TREAD), value residual": "--backbone.kind dit --backbone.route 0.5 "
        "--backbone.value_residual true",
        "Muon for matrices": "--optimizer.matrices muon",
        "one rate for all widths (muP)": "--backbone.kind dit --backbone.base_width 64",
        "warm-up EMA": "--train.ema 0.999",
        "power-function EMA": "--train.ema_lengths 0.05,0.1 --train.ema_every 1000, then posthoc_ema",
    },
)
SAMPLING = Part(
    ("sampler", "grid", "guidance"),
    {
        "DDIM with eta": "--sampler.kind ddim --sampler.eta 0.5",
        "DDPM variance: small, large, learned": "--sampler.kind ddpm --sampler.variance learned",
        "ancestral VE steps": "--sampler.kind ddpm, of a model with --schedule.kind ve",
        "stochastic flow sampling": "--sampler.kind euler-maruyama --sampler.diffusion sigma",
        "EDM's churn": "--sampler.kind heun-churn --sampler.churn 0.2",
        "poly-exponential grid": "--grid.kind exponential --grid.rho 2",
        "resolution shift of the grid": "--grid.kind uniform --grid.shift 3",
        "guidance interval": "--guidance.kind classifier-free --guidance.interval 0.2,0.8",
        "guidance rescale": "--guidance.kind classifier-free --guidance.rescale 0.7",
    },
)
RESTORING = Part(
    ("operator", "measurement", "posterior"),
    {
        "four times fewer pixels": "--operator.kind box --operator.factor 4",
        "posterior samples that are calibrated": "--posterior.kind split-gibbs",
    },
)
STUDENTS = Part(
    ("objective", "times", "sampler", "grid"),
    {
        "guidance baked in at another scale than the teacher's own": "--student.guidance_scale 4",
        "a range of guidance scales, told when it draws": "--student.guidance_scale 1,8",
        "nothing of the teacher but its weights": "--student.learns_from data",
    },
)
COUPLING = Part(
    ("coupling",),
    {"a word swapped, all else kept": "--coupling.kind prompt-to-prompt --coupling.self_until 0.6"},
)


def families(stage: str) -> Families:
    """The sections of a stage's config, and those of "editing", which no config has, each with our own kinds; of a
    choice among kinds, the first is the default."""
    if stage == "editing":
        from ldm.coupling import COUPLINGS
        from ldm.inverse.measurement import MEASUREMENTS
        from ldm.inverse.operators import OPERATORS
        from ldm.inverse.posterior import POSTERIORS

        methods: Families = {"measurement": MEASUREMENTS, "posterior": POSTERIORS}
        return {"operator": OPERATORS, **methods, "coupling": COUPLINGS}
    common = {"optimizer": (Optimizer,), "train": (Train,)}
    if stage == "autoencoder":
        from autoencoder import AUTOENCODERS
        from autoencoder.discriminator import DISCRIMINATORS
        from autoencoder.regularisers import LATENT_REGULARISERS

        losses = {"loss": (Loss,), "latent": LATENT_REGULARISERS, "discriminator": DISCRIMINATORS}
        return {"model": AUTOENCODERS, **losses, **common}
    from ldm.adapters import ADAPTERS
    from ldm.backbones import BACKBONES
    from ldm.grids import GRIDS
    from ldm.guidance import GUIDANCES
    from ldm.image_conditions import IMAGE_CONDITIONS
    from ldm.objectives import OBJECTIVES
    from ldm.pairing import PAIRINGS
    from ldm.predictions import PREDICTIONS
    from ldm.representation import REPRESENTATIONS
    from ldm.samplers import SAMPLERS
    from ldm.schedules import SCHEDULES
    from ldm.students import Student
    from ldm.text import TEXT_ENCODERS
    from ldm.times import TIMES
    from ldm.weighting import WEIGHTINGS

    process: Families = {"schedule": SCHEDULES, "prediction": PREDICTIONS, "times": TIMES, "weighting": WEIGHTINGS}
    sampling: Families = {"sample": (Sample,), "sampler": SAMPLERS, "grid": GRIDS, "guidance": GUIDANCES}
    networks: Families = {"backbone": BACKBONES, "text": TEXT_ENCODERS, "adapter": ADAPTERS}
    conditions: Families = {"conditioning": (Conditioning,), "image": IMAGE_CONDITIONS}
    learning: Families = {"pairing": PAIRINGS, "objective": OBJECTIVES, "representation": REPRESENTATIONS}
    learning |= {"student": (Student,), "prior": (Prior,)}
    return {**networks, **conditions, **process, **learning, **common, **sampling, "format": (Format,)}


def kinds(section: str) -> list[str]:
    """The names of a family's members, in the order of the tuple that lists them; those of a package's modules in its
    `ORDER`."""
    module, members = FAMILIES[section]
    package = resources.files("ldm") / module
    files = list(package.iterdir()) if package.is_dir() else [resources.files("ldm") / f"{module}.py"]
    kind_of: dict[str, str] = {}
    names: list[str] = []
    order: list[str] = []
    for file in sorted((file for file in files if file.name.endswith(".py")), key=lambda file: file.name):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.AnnAssign) and part.value and ast.unparse(part.target) == "kind":
                        kind_of[node.name] = ast.literal_eval(part.value)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                if ast.unparse(node.targets[0]) == members:
                    names += map(ast.unparse, node.value.elts)
                elif ast.unparse(node.targets[0]) == "ORDER":
                    order += ast.literal_eval(node.value)
    members_kinds = [kind_of[name] for name in names]
    return sorted(members_kinds, key=lambda kind: order.index(kind) if kind in order else len(order))


def listing(*parts: Part) -> str:
    """One paragraph a section, as `--SECTION.kind` takes the names; then the methods that are keys."""
    from textwrap import fill

    texts = [f"--{name}.kind  {', '.join(all_kinds(name))}" for part in parts for name in part.sections]
    texts += ["", "by a key:", *(f"  {name}: {flags}" for part in parts for name, flags in part.methods.items())]
    return "\n".join(fill(text, 110, subsequent_indent=" " * 8, break_on_hyphens=False) for text in texts)


def all_kinds(section: str) -> list[str]:
    """The names of a family's members, installed packages' last. Raises UserError where such a package is at fault."""
    own = kinds(section)
    return [*own, *kinds_of_packages(section, own)]


def suggestion(name: str, known: list[str], prefix: str = "", cutoff: float = 0.5) -> str:
    """"; did you mean ...?" where one of the known names is near, else nothing."""
    close = difflib.get_close_matches(name, known, 1, cutoff)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""


def unknown_kind(section: str, kind: str, known: list[str]) -> str:
    """What to say of a kind that a section has not."""
    return f'{section}.kind: unknown kind "{kind}"{suggestion(kind, known)}; known: {", ".join(known)}'


def unknown_key(section: str, key: str, known: list[str]) -> str:
    """What to say of a key that a section has not."""
    return f"unknown key '{section}.{key}'{suggestion(key, known, section + '.')}"
