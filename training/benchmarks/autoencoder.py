"""Images a second and peak memory of a KL autoencoder beside diffusers' AutoencoderKL of the same shape and weights.

A training step (forward, and backward of a squared error), encode and decode, in turn and in alternating order within
one run, after both have given the same pictures. diffusers gets the tuned allocator and channels-last too, and is
timed with both memory layouts; the better one counts. Needs the package diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from training.benchmarks.case import peers
from training.messages import answer

if TYPE_CHECKING:
    import argparse

    from autoencoder.kl import KL
    from training.settings.flags import Parser

VERBS = ("train", "encode", "decode")


def peer(shape: KL) -> Any:
    """diffusers' AutoencoderKL of a shape, with random weights. Raises UserError without diffusers."""
    levels = [2**i in shape.attention_at for i in range(len(shape.channels))]
    return peers().AutoencoderKL(
        in_channels=shape.image_channels,
        out_channels=shape.image_channels,
        block_out_channels=shape.channels,
        down_block_types=["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in levels],
        up_block_types=["AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in reversed(levels)],
        layers_per_block=shape.blocks,
        latent_channels=shape.latent_channels,
        norm_num_groups=shape.groups,
        mid_block_add_attention=shape.mid_attention,
    )


def models(shape: KL, device: str) -> dict[str, Any]:
    """Ours, and diffusers' with the same weights in both memory layouts. Raises UserError without diffusers."""
    import copy

    import torch

    ours, theirs = shape.build(), peer(shape)
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if not key.startswith("norm.")})
    layouts = {"ours": (ours, torch.channels_last), "diffusers": (theirs, torch.contiguous_format),
               "diffusers, channels-last": (copy.deepcopy(theirs), torch.channels_last)}  # fmt: skip
    return {name: model.to(device=device, memory_format=layout) for name, (model, layout) in layouts.items()}


def case(name: str, model: Any, verb: str, args: argparse.Namespace, shape: KL) -> Callable[[], Any]:
    """One call of `verb`; what it returns is the same for every model."""
    import torch

    torch.manual_seed(0)
    layout = torch.contiguous_format if name == "diffusers" else torch.channels_last
    side = args.size // shape.factor
    images = torch.randn(args.batch_size, shape.image_channels, args.size, args.size, device=args.device)
    images = images.to(memory_format=layout)
    z = torch.randn(args.batch_size, shape.latent_channels, side, side, device=args.device)
    precision = torch.autocast(args.device, torch.bfloat16, enabled=args.mixed_precision == "bf16")

    def encode() -> Any:
        return model.encode(images) if name == "ours" else model.encode(images).latent_dist.parameters

    def decode(z: Any = z) -> Any:
        return model.decode(z) if name == "ours" else model.decode(z).sample

    def train() -> Any:
        model.zero_grad(set_to_none=True)
        with precision:
            mean, logvar = encode().chunk(2, 1)
            reconstruction = decode(mean + (0.5 * logvar.clamp(-30, 20)).exp() * z)
        loss = (reconstruction.float() - images).square().mean()
        loss.backward()
        return loss.detach()

    def frozen() -> Any:
        with torch.no_grad(), precision:
            return encode() if verb == "encode" else decode()

    return train if verb == "train" else frozen


def compare(verb: str, models_by_name: dict[str, Any], args: argparse.Namespace, shape: KL) -> None:
    """Time `verb` of all models in turn and print a line for each."""
    from statistics import median

    import torch

    from training.benchmarks.meters import peak, seconds

    cases = {name: case(name, model, verb, args, shape) for name, model in models_by_name.items()}
    answers, tolerance = [call() for call in cases.values()], 1e-3 if args.mixed_precision == "no" else 0.1
    for result in answers[1:]:
        torch.testing.assert_close(result, answers[0], rtol=1e-3, atol=tolerance)
    times_of: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(args.rounds):
        for name in sorted(cases, reverse=bool(number % 2)):
            times_of[name].append(seconds(cases[name], args.device))
    for model in models_by_name.values():
        model.zero_grad(set_to_none=True)  # what a call gives back is not to be set against what it takes
    memory = {name: peak(call, args.device) for name, call in cases.items()}
    for name, times in times_of.items():
        ratios = [theirs / ours for theirs, ours in zip(times, times_of["ours"], strict=True)]
        beside = "" if name == "ours" else f"  ours is {median(ratios):.2f}x as fast (least {min(ratios):.2f}x)"
        rate, most = args.batch_size / min(times), memory[name]
        answer(f"{verb:<7} {name:<25} {rate:8.2f} images/s  peak {most:7.0f} MiB{beside}")


def flags(parser: Parser) -> None:
    """The flags of this benchmark."""
    add = parser.add_argument
    add("--config", default="kl-f8", metavar="NAME|FILE", help="a KL autoencoder")
    add("--size", type=int, default=64, help="pixels a side")
    add("--batch-size", type=int, default=2, help="pictures a step")
    add("--rounds", type=int, default=7, help="of all in turn")
    add("--device", default="cpu", help="cpu or cuda")
    add("--mixed-precision", default="no", choices=("no", "bf16"))
    add("--compile", action="store_true", help="torch.compile all of them")
    parser.machine(device="")


def run(args: argparse.Namespace) -> None:
    """Time every verb and print a line for each model."""
    import torch

    from training.machine.memory import keep_memory
    from training.machine.processes import resolve
    from training.settings import decoding

    keep_memory()
    args.device = resolve(args.device).type
    config: Any = decoding.load("autoencoder", args.config)
    torch.manual_seed(0)
    networks = models(config.model, args.device)
    count = sum(p.numel() for p in networks["ours"].parameters())
    answer(f"{args.config}, {count:,} parameters, batch {args.batch_size} "
           f"of {args.size} px, {args.device}, {torch.get_num_threads()} threads")  # fmt: skip
    if args.compile:
        for model in networks.values():
            model.encoder.compile()
            model.decoder.compile()
    for verb in VERBS:
        compare(verb, networks, args, config.model)
