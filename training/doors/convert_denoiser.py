"""Take in another program's denoiser with all that it draws with, or give ours out as diffusers writes it."""

from __future__ import annotations

from training.errors import UserError
from training.messages import tell
from training.settings.flags import Parser

IMPORTING = ("autoencoder", "prediction", "heads")
EXPORTING = ("single_file", "pt2", "onnx")


def main() -> None:
    """Read the flags, then import or export."""
    parser = Parser(
        __doc__ or "",
        epilog="import reads diffusers' UNet2DConditionModel, DiTTransformer2DModel and PixArtTransformer2DModel: a\n"
        "pipeline's folder with scheduler, autoencoder and text encoder, one of these networks alone, ORG/NAME, or a\n"
        "single .safetensors file of Stable Diffusion 1 or 2; what it writes serves wherever a denoiser's run does.\n"
        "export writes a run as a pipeline of diffusers, and compares what it wrote with the run: U-Nets as\n"
        "StableDiffusionPipeline, DiTs with text as PixArt's, DiTs with labels as DiTPipeline; --config portable-unet\n"
        "and portable-dit train what fits. What does not fit is named. --pt2 and --onnx write any model's networks.",
    )
    _flags(parser)
    parser.machine(device="")
    args = parser.read()
    other, names = ("import", IMPORTING) if args.verb == "export" else ("export", EXPORTING)
    if given := [name for name in names if getattr(args, name) not in (None, "", False)]:
        raise UserError(f"--{given[0].replace('_', '-')} belongs to {other}", hint="leave it out")
    graphs = [kind for kind in ("pt2", "onnx") if getattr(args, kind)]
    if args.single_file and graphs:
        raise UserError(f"--single-file and --{graphs[0]} write different things", hint="export twice")
    from pathlib import Path

    if args.verb == "import":
        from training.models.denoiser_import import import_denoiser

        asked = {name: getattr(args, name) for name in IMPORTING}
        import_denoiser(args.source, Path(args.output), args.text_encoder, **asked)
    else:
        from training.models.denoiser_export import export_denoiser

        export_denoiser(args.source, Path(args.output), args.text_encoder, args.single_file, graphs)
        tell(f"wrote {args.output}")


def _flags(parser: Parser) -> None:
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
