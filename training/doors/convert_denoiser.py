"""Take in another program's denoiser with all that it draws with, or give ours out as diffusers writes it; LoRA too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.errors import UserError
from training.messages import tell
from training.next_step import tell_next
from training.settings.flags import Parser

if TYPE_CHECKING:
    import argparse

# The flags of each way; the last of them is of a LoRA file and goes with none of the others.
OF = {"import": ("autoencoder", "prediction", "heads", "base"), "export": ("single_file", "pt2", "onnx", "lora")}
EPILOG = """import reads diffusers' UNet2DConditionModel, DiTTransformer2DModel and PixArtTransformer2DModel: a
pipeline's folder with scheduler, autoencoder and text encoder, one of these networks alone, ORG/NAME, or a
single .safetensors file of Stable Diffusion 1 or 2; what it writes serves wherever a denoiser's run does.
export writes a run as a pipeline of diffusers, and compares what it wrote with the run: U-Nets as
StableDiffusionPipeline, DiTs with text as PixArt's, DiTs with labels as DiTPipeline; --config portable-unet
and portable-dit train what fits. What does not fit is named. --pt2 and --onnx write any model's networks.
A LoRA is one file: import FILE --base RUN makes the run of an adapter of it, export RUN --lora kohya a file."""


def flags() -> Parser:
    """What can be asked."""
    parser = Parser(__doc__ or "", epilog=EPILOG)
    parser.add_argument("verb", choices=("import", "export"), help="which way")
    parser.add_argument("source", metavar="SOURCE", help="import: a folder, file or ORG/NAME; export: a run")
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    text = "the text encoder with its tokenizer, where SOURCE does not hold them"
    parser.add_argument("--text-encoder", metavar="NAME|DIR", default="", help=text)
    text = "import: the autoencoder (a run of ours) of a source that lacks one"
    parser.add_argument("--autoencoder", metavar="RUN", default="", help=text)
    text = "import: what the network predicts, where SOURCE does not say"
    parser.add_argument("--prediction", choices=("eps", "v", "x0", "velocity"), help=text)
    text = "import of a single file: attention heads, which its shapes do not tell (default: 8, or 64 channels a head)"
    parser.add_argument("--heads", metavar="N", type=int, help=text)
    text = "export: one file as Stable Diffusion 1 is published, with its .yaml, in place of diffusers' folders"
    parser.add_argument("--single-file", metavar="NAME.safetensors", default="", help=text)
    text = "export: denoiser and decoder as graphs of torch.export, in place of diffusers' folders"
    parser.add_argument("--pt2", action="store_true", help=text)
    parser.add_argument("--onnx", action="store_true", help="export: so too, as ONNX (needs the extra export)")
    text = "import: SOURCE is a LoRA file for this run, by the names of diffusers, PEFT or kohya"
    parser.add_argument("--base", metavar="RUN", help=text)
    text = "export: RUN is that of a LoRA or DoRA, and --output a file by such names"
    parser.add_argument("--lora", choices=("diffusers", "kohya"), help=text)
    parser.machine(device="")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together."""
    other = "import" if args.verb == "export" else "export"
    theirs, ours = ([name for name in OF[verb] if getattr(args, name) not in (None, "", False)]
                    for verb in (other, args.verb))  # fmt: skip
    if theirs:
        raise UserError(f"--{theirs[0].replace('_', '-')} belongs to {other}", hint="leave it out")
    if ours[1:] and ours[-1] in ("base", "lora"):
        what = f"--{ours[0].replace('_', '-')} is of whole networks, --{ours[-1]} of a LoRA file"
        raise UserError(what, hint="leave one of them out")
    if args.single_file and ours[1:]:
        raise UserError(f"--single-file and --{ours[1]} write different things", hint="export twice")


def main() -> None:
    """Read the flags, then import or export."""
    args = flags().read()
    check(args)
    from pathlib import Path

    output, following = Path(args.output), ""
    if args.base or args.lora:
        from training.exchange import lora_export, lora_files

        if args.base:
            lora_files.import_lora(args.source, args.base, output, args.text_encoder or None)
        else:
            lora_export.export_lora(args.source, args.lora, output)
    elif args.verb == "import":
        from training.exchange.denoiser_import import import_denoiser

        given = args.text_encoder, args.autoencoder, args.prediction, args.heads
        following = import_denoiser(args.source, output, *given)
    else:
        from training.exchange.denoiser_export import export_denoiser

        graphs = [kind for kind in ("pt2", "onnx") if getattr(args, kind)]
        export_denoiser(args.source, output, args.text_encoder, args.single_file, graphs)
    tell(f"wrote {output}")
    if following:
        tell_next(following)
