"""The denoiser and the decoder as graphs that run without this package: torch.export's .pt2, or ONNX.

The number of pictures is free, their size and the length of the text are those trained at. Text is encoded, and steps
are taken, by whoever runs them: README.md beside them says on what inputs, steps.json by which numbers.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.backbones import Backbone
from ldm.backbones.image import SIZE, SIZES
from ldm.conditioning import Cond
from ldm.jumps import SCALE, SPAN, Jumping, noise_share, plainly
from ldm.noise import Noise
from training.errors import CHECKPOINT, UserError, missing_extra
from training.exchange.export_check import captions, error, probe
from training.files import write_bytes, write_json
from training.guarding import make_folder
from training.models.assembly import HashedPipeline

CLOSE = {"pt2": 1e-5, "onnx": 1e-4}  # of what is compared, by its largest number or 1: ONNX has kernels of its own


class DenoiserGraph(nn.Module):
    """Latents, noise level, text, its mask, the pooled text, an image and its level, the numbers that a few-step model
    is told, how a picture is cut, as many as the network reads -> what it predicts."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, x: Tensor, noise_level: Tensor, context: Tensor, mask: Tensor, pooled: Tensor | None = None,
        image: Tensor | None = None, image_level: Tensor | None = None, span: Tensor | None = None,
        guidance_scale: Tensor | None = None, size: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        shown = {"image": image, "image_level": image_level, SPAN: span, SCALE: guidance_scale, SIZE: size}
        extras = {name: value for name, value in shown.items() if value is not None}
        y: Tensor = self.backbone(x, noise_level, Cond(context, mask, pooled, extras))
        return y


class DecoderGraph(nn.Module):
    """Latents -> pictures in [-1, 1]."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        y: Tensor = self.autoencoder.decode(latents)
        return y


class Graph(NamedTuple):
    """A network, and inputs of it by name."""

    network: nn.Module
    inputs: dict[str, Tensor]


def write_graphs(folder: Path, pipeline: HashedPipeline, kinds: Sequence[str]) -> str:
    """Write denoiser.KIND and decoder.KIND, each run again on another number of pictures and compared; one line of
    that. Raises UserError where it gives other numbers, or ONNX is not installed."""
    if "onnx" in kinds:
        need_onnx()
    refuse_reading(pipeline)
    make_folder(folder)
    told = []
    with torch.no_grad():
        parts = graphs(pipeline)
        for kind in kinds:
            for name, graph in parts.items():
                path = folder / f"{name}.{kind}"
                found = WRITERS[kind](path, graph)
                told.append(f"{path.name} {found:.1g}")
                if not found <= CLOSE[kind]:
                    what = f"{path.name} gives other numbers than the run: differences up to {found:.1g}"
                    raise UserError(what, hint="please report it with config.json", code=CHECKPOINT)
    write_bytes(folder / "README.md", _card(pipeline, parts).encode())
    write_json(folder / "steps.json", steps(pipeline))
    return f"run again: largest differences {', '.join(told)}"


def refuse_reading(pipeline: HashedPipeline) -> None:
    """Raises UserError for a few-step model whose answers are read by a rule that steps.json has no numbers for."""
    if getattr(pipeline.denoiser, "reading", plainly) is not plainly:
        what = "this student's network answers no prediction of its process, and the steps beside a graph read no other"
        raise UserError(what, hint="export the model that taught it")


def need_onnx() -> None:
    """Raises UserError where a package of the extra is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise missing_extra(package, "export", "--onnx") from None


def graphs(pipeline: HashedPipeline) -> dict[str, Graph]:
    """Both networks with inputs that a run has seen: three pictures."""
    (x, levels, _), backbone = probe(pipeline), pipeline.denoiser.backbone
    assert isinstance(backbone, Backbone)
    cond = pipeline.text(captions(pipeline))
    inputs = {"x": x, "noise_level": levels, "context": cond.context, "mask": cond.mask}
    if cond.pooled is not None and backbone.config.pooled:  # type: ignore[union-attr]
        inputs["pooled"] = cond.pooled
    if backbone.image_channels:
        noise = Noise.from_seeds(range(len(x))).fold("export")
        inputs["image"] = noise.normal((backbone.image_channels, *x.shape[2:]), "image")
    if backbone.level_embedding:
        inputs["image_level"] = torch.linspace(0, 1, len(x))
    inputs |= {name: torch.linspace(0, 1, len(x)) for name in backbone.number_embeddings or ()}
    if backbone.size_embedding:
        inputs[SIZE] = torch.zeros(len(x), SIZES)  # 0: as it goes without saying
    network, decoder = DenoiserGraph(backbone), DecoderGraph(pipeline.autoencoder)
    return {"denoiser": Graph(network.eval(), inputs), "decoder": Graph(decoder.eval(), {"latents": x})}


def _exported(graph: Graph) -> Any:
    """The graph with a free number of pictures."""
    batch = torch.export.Dim("batch", min=1)
    given = {name: value.clone() for name, value in graph.inputs.items()}
    return torch.export.export(graph.network, (), given, dynamic_shapes={name: {0: batch} for name in given})


def _few(graph: Graph) -> dict[str, Tensor]:
    """Inputs of another number of pictures than it was traced with."""
    return {name: value[:1] for name, value in graph.inputs.items()}


def _pt2(path: Path, graph: Graph) -> float:
    torch.export.save(_exported(graph), path)
    again = torch.export.load(path).module()
    return max(error(graph.network(**given), again(**given)) for given in (graph.inputs, _few(graph)))


def _onnx(path: Path, graph: Graph) -> float:
    """Weights of over 2 GB go into a second file, as ONNX has it."""
    import onnxruntime

    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(_exported(graph), dynamo=True, verbose=False)
    assert program is not None
    size = sum(value.nbytes for value in graph.network.state_dict().values())
    program.save(str(path), external_data=size > 2**30)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for given in (graph.inputs, _few(graph)):
        (answer,) = session.run(None, {name: value.numpy() for name, value in given.items()})
        found.append(error(graph.network(**given), torch.from_numpy(answer)))
    return max(found)


WRITERS = {"pt2": _pt2, "onnx": _onnx}


def steps(pipeline: HashedPipeline) -> dict[str, Any]:
    """What takes pure noise to a picture, in numbers: each time that the run visits, and the clean end. README.md says
    what each is.
    """
    plan, process = pipeline.sampling, pipeline.denoiser.diffusion
    schedule = process.schedule
    grid = plan.grid(plan.steps, schedule)
    times, level = grid[:-1], schedule(grid[:-1])
    a, b = process.prediction.coefficients(level, schedule.rates(times))
    numbers = {"t": times, "alpha": level.alpha, "sigma": level.sigma, "input_scale": schedule.input_scale(times),
               "noise_level": schedule.noise_level(times), "a": a, "b": b}  # fmt: skip
    if getattr(pipeline.denoiser, "spans", False):
        ends = torch.zeros_like(times) if plan.sampler.kind == "consistency" else grid[1:]
        numbers[SPAN] = noise_share(schedule, times) - noise_share(schedule, ends)
    each = [dict(zip(numbers, row, strict=True)) for row in torch.stack(list(numbers.values()), 1).tolist()]
    return {"prior_std": schedule.prior_std, "steps": each, "end": {"t": 0.0, "alpha": 1.0, "sigma": 0.0}}


def _card(pipeline: HashedPipeline, parts: dict[str, Graph]) -> str:
    """README.md: the inputs, and what the numbers mean."""
    process, plan, inputs = pipeline.denoiser.diffusion, pipeline.sampling, parts["denoiser"].inputs
    lines = [f"`{name}`: {', '.join(map(_shape, graph.inputs.items()))}" for name, graph in parts.items()]
    how = json.dumps({name: vars(part) for name, part in (
        ("schedule", process.schedule), ("prediction", process.prediction), ("sampler", plan.sampler),
        ("grid", plan.grid), ("guidance", plan.guidance))})  # fmt: skip
    half = ".chunk(2, 1)[0]  # the other half says the variance" if process.learned_variance else ""
    about = " ".join((inspect.getdoc(pipeline.image) or "").split("\n\n")[0].split())
    image = f"\n`image` is read behind the channels of x ({pipeline.image.kind}): {about}" if "image" in inputs else ""
    level = " `image_level`, 0 to 1: the share of noise in it." if "image_level" in inputs else ""
    told, noise, guided = _of_student(pipeline, inputs)
    return f"""# A denoiser and its decoder

{lines[0]}

{lines[1]}

B is the number of pictures; the text is given as the run's text encoder answers it.{image}{level}

steps.json has the `numbers` of a drawing, by which x_t = alpha x0 + sigma eps at each of `steps`, and the network,
given input_scale x_t and noise_level, answers y = a x0 + b eps. Told `text`, the other inputs by name, it draws so:

```python
x = numbers["prior_std"] * torch.randn({_sides(inputs["x"])})
for now, after in zip(numbers["steps"], [*numbers["steps"][1:], numbers["end"]]):
    level = torch.full((len(x),), now["noise_level"])
    y = denoiser(x=now["input_scale"] * x, noise_level=level, **text{told}){half}
    scale = now["alpha"] * now["b"] - now["sigma"] * now["a"]
    x0 = (now["b"] * x - now["sigma"] * y) / scale
    eps = (now["alpha"] * y - now["a"] * x) / scale
    x = after["alpha"] * x0 + after["sigma"] * {noise}
pictures = decoder(latents=x)  # in [-1, 1]
```

{guided} What the run was trained on and draws with: {how}
"""


def _of_student(pipeline: HashedPipeline, inputs: dict[str, Tensor]) -> tuple[str, str, str]:
    """What the network is told besides, what is noise after a step, and what the card says of guidance and steps."""
    student, denoiser, scale = pipeline.student, pipeline.denoiser, getattr(pipeline.sampling.guidance, "scale", 1.0)
    guided = ("Classifier-free guidance of scale s takes two calls, of the caption and of the empty one: y_empty + "
              "s (y - y_empty).\nThose are DDIM's steps, on the run's grid.")
    if not isinstance(denoiser, Jumping):
        return "", "eps", guided
    values = {SPAN: 'now["span"]', SCALE: str(float(scale))}  # a whole number would make a tensor of those
    told = "".join(f", {name}=torch.full((len(x),), {values[name]})" for name in values if name in inputs)
    sampler = pipeline.sampling.sampler
    noise = "torch.randn_like(x)" if sampler.kind == "consistency" else "eps"
    less = ", but for the noise of its sampler" if getattr(sampler, "noise", 0) else ""
    return told, noise, f"It is a few-step model, {student.words}: these are its steps{less}; give no other guidance."


def _shape(given: tuple[str, Tensor]) -> str:
    name, value = given
    return f"{name} ({_sides(value)}) {str(value.dtype).removeprefix('torch.')}"


def _sides(value: Tensor) -> str:
    return ", ".join(map(str, ("B", *value.shape[1:])))
