"""Few steps: teach a student to draw in one to eight calls what a trained denoiser draws in many."""

from __future__ import annotations

import sys
from pathlib import Path

from training.errors import UserError
from training.guarding import read_record
from training.settings.families import STUDENTS, listing
from training.settings.flags import TrainParser


def main() -> None:
    """Read the flags and train."""
    parser = TrainParser(__doc__ or "", "denoiser", "student")
    parser.epilog = f"{parser.epilog}\n\n{listing(STUDENTS)}"
    text = "the trained denoiser that the student begins as and learns from, which stays as it is; or demo"
    parser.data.add_argument("--teacher", metavar="RUN", help=text)
    parser.data.add_argument("--latents", metavar="DIR", help="encoded latents of its autoencoder (encode_latents)")
    text = "where the teacher's frozen text encoder lies, where it has one that is not stored with it"
    parser.data.add_argument("--text-encoder", metavar="NAME|DIR", help=text)
    text = "of --config reflow: where the teacher's pairs are, or are written; OUTPUT-pairs when not given"
    parser.data.add_argument("--pairs", metavar="DIR", help=text)
    parser.set_defaults(new_words=False)
    args = parser.read_training()
    if not args.teacher:
        raise no_teacher(args.output)
    from training.stages.train import train

    sys.exit(train(args, "denoiser"))


def no_teacher(output: str | None) -> UserError:
    """What to say where none is named; of a run that goes on, which one it was."""
    from training.models.cards import TEACHER

    stored = Path(output or "") / "final" / TEACHER
    was = f", which was {read_record(stored, {'name': str})['name']}" if output and stored.is_file() else ""
    what = "a student begins as a copy of its teacher and learns from it, and none is named"
    return UserError(what, hint=f"give the trained denoiser with --teacher RUN{was}")
