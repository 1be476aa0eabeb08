"""The denoiser and the decoder as graphs that run without this package: torch.export's .pt2, or ONNX.

The number of pictures is free, their size and the length of the text are those trained at. Text is encoded, and steps
are taken, by whoever runs them: README.md beside them says on what inputs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioning import Cond
from ldm.schedules import Table
from training.errors import CHECKPOINT, UserError, missing_extra
from training.exchange.export_check import captions, error, probe
from training.files import write_bytes
from training.guarding import make_folder
from training.models.assembly import HashedPipeline

CLOSE = {"pt2": 1e-5, "onnx": 1e-4}  # of what is compared, by its largest number or 1: ONNX has kernels of its own


class DenoiserGraph(nn.Module):
    """Latents, noise level, text, its mask and the pooled text, as many as the network reads -> what it predicts."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self, x: Tensor, noise_level: Tensor, context: Tensor, mask: Tensor, pooled: Tensor | None = None
    ) -> Tensor:
        y: Tensor = self.backbone(x, noise_level, Cond(context, mask, pooled))
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
    return f"run again: largest differences {', '.join(told)}"


def need_onnx() -> None:
    """Raises UserError where a package of the extra is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise missing_extra(package, "export", "--onnx") from None


def graphs(pipeline: HashedPipeline) -> dict[str, Graph]:
    """Both networks with inputs that a run has seen: three pictures."""
    x, levels, _ = probe(pipeline)
    cond = pipeline.text(captions(pipeline))
    inputs = {"x": x, "noise_level": levels, "context": cond.context, "mask": cond.mask}
    if cond.pooled is not None and pipeline.denoiser.backbone.config.pooled:  # type: ignore[attr-defined]
        inputs["pooled"] = cond.pooled
    network, decoder = DenoiserGraph(pipeline.denoiser.backbone), DecoderGraph(pipeline.autoencoder)
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


def _card(pipeline: HashedPipeline, parts: dict[str, Graph]) -> str:
    """README.md: the inputs, and what the numbers mean."""
    process = pipeline.denoiser.diffusion
    lines = [f"`{name}`: {', '.join(map(_shape, graph.inputs.items()))}" for name, graph in parts.items()]
    told = json.dumps({"schedule": vars(process.schedule), "prediction": vars(process.prediction),
                       "learned_variance": process.learned_variance})  # fmt: skip
    table = isinstance(process.schedule, Table)
    level = "the entry of the table, 0 to T - 1" if table else "what schedule.noise_level(t) gives: 1000 t on flow"
    return f"""# A denoiser and its decoder

{lines[0]}

{lines[1]}

B is the number of pictures. The denoiser predicts, of x at a noise level and with text as the run's encoder gives it,
what its process says: {told}.
The noise level is {level}. The decoder gives pictures in [-1, 1].
"""


def _shape(given: tuple[str, Tensor]) -> str:
    name, value = given
    sides = ", ".join(map(str, ("B", *value.shape[1:])))
    return f"{name} ({sides}) {str(value.dtype).removeprefix('torch.')}"
