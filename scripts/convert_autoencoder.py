"""Take in another program's autoencoder, or give ours out as diffusers writes it."""

from __future__ import annotations

import sys

from training.cli import Parser, run_main


def main() -> None:
    parser = Parser(
        __doc__ or "",
        epilog="import reads diffusers' AutoencoderKL, VQModel, AutoencoderTiny and AutoencoderDC (a folder, a\n"
        "pipeline's, or ORG/NAME) and LDM's single safetensors files; what it writes serves wherever an\n"
        "autoencoder's run does. export writes kl and vq models.",
    )
    parser.add_argument("verb", choices=("import", "export"), help="which way")
    parser.add_argument("source", metavar="SOURCE", help="import: a folder, file or ORG/NAME; export: a run")
    parser.add_argument("--output", metavar="DIR", required=True, help="the folder to write")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.read()
    from pathlib import Path

    from training.interchange import export_autoencoder, import_autoencoder

    (import_autoencoder if args.verb == "import" else export_autoencoder)(args.source, Path(args.output))
    print(f"wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
