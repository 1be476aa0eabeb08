"""A page of this machine to draw, edit, inpaint, restore and compare with a trained denoiser, and to read pictures.

It listens on this machine alone and loads nothing from elsewhere. Needs: pip install
'latent-diffusion-from-scratch[studio]'.
"""

from __future__ import annotations

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and serve the page until it is interrupted."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    text = "a denoiser's run (also while it trains), its final/, or a checkpoint; demo or demo-student: of the package"
    add("--model", metavar="RUN", required=True, help=text)
    text = "where to listen; at another than this machine's own, whoever reaches it draws here and sees what is drawn"
    add("--host", metavar="ADDRESS", default="127.0.0.1", help=text)
    add("--port", metavar="N", type=int, default=7860, help="0: any that is free")
    add("--output", metavar="DIR", help="where drawings are kept, each in a numbered folder; when not given they are "
        "removed at the end")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies on this machine")
    parser.machine()
    args = parser.read()
    from training.studio.app import serve

    serve(args)
