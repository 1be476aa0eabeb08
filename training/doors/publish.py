"""Publish a finished model on the Hugging Face hub: checked, listed, then sent as one commit.

The licence is yours to name, in the front matter of its README.md, which is sent as it lies there.
"""

from __future__ import annotations

from training.settings.flags import Parser


def main() -> None:
    """Read the flags and publish."""
    parser = Parser(__doc__ or "")
    add = parser.add_argument
    add("model", metavar="RUN|FINAL", help="a finished run of either stage, its final/, or what export_model wrote")
    add("--repo", metavar="ORG/NAME", required=True, help="where to; made where it is not there")
    add("--private", action="store_true", help="for you alone; one that is there must be private already")
    add("--revision", metavar="BRANCH", help="a branch, made where it is not there (default: main)")
    add("--message", metavar="TEXT", help="of the commit")
    add("--dry-run", action="store_true", help="check and list, and send nothing")
    add("--text-encoder", metavar="NAME|DIR", help="where a large frozen text encoder lies, which is not sent")
    parser.machine(device="")
    args = parser.read()
    from training.models.publishing import publish

    publish(args)
