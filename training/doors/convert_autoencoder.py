"""Take in another program's autoencoder, or give ours out as diffusers writes it."""

from __future__ import annotations

from training.errors import UserError
from training.messages import tell
from training.next_step import encoding, tell_next
from training.settings.flags import Parser


def main() -> None:
    """Read the flags, then import or export."""
    parser = Parser(
        __doc__ or "",
        epilog="import reads diffusers' AutoencoderKL, VQModel, AutoencoderTiny and AutoencoderDC (a folder, a\n"
        "pipeline's, ORG/NAME, or a .safetensors file beside its config.json; sharded and fp16 ones too) and\n"
        "LDM's single safetensors files; what it writes serves wherever an autoencoder's run does.\n"
        "export writes kl, vq, tiny and dc models as those four classes, and compares what it wrote with the run.",
    )
    parser.add_argument("verb", choices=("import", "export"), help="which way")
    parser.add_argument("source", metavar="SOURCE", help="import: a folder, file or ORG/NAME; export: a run")
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    text = "import: measure the latents' shift and scale on these packed pictures, whatever SOURCE says of them"
    parser.add_argument("--data", metavar="DIR", default="", help=text)
    text = "import: latents are z * X, whatever SOURCE says of them"
    parser.add_argument("--scale-factor", metavar="X", type=float, help=text)
    parser.machine(device="")
    args = parser.read()
    if args.verb == "export" and (args.data or args.scale_factor is not None):
        raise UserError("--data and --scale-factor belong to import", hint="leave them out")
    from pathlib import Path

    if args.verb == "import":
        from training.exchange.autoencoders import import_autoencoder

        import_autoencoder(args.source, Path(args.output), args.data, args.scale_factor)
    else:
        from training.exchange.autoencoder_export import export_autoencoder

        export_autoencoder(args.source, Path(args.output))
    tell(f"wrote {args.output}")
    if args.verb == "import" and args.data:
        tell_next(encoding(args.output, args.data, {}))
