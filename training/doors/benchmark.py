"""Measure speed and memory: all that is aimed at beside peers (suite), or one part; each verb's --help says what."""

from __future__ import annotations

from training.benchmarks import autoencoder, durability, order, reading, samplers, suite
from training.settings.flags import Parser

VERBS = {
    "suite": suite, "autoencoder": autoencoder, "durability": durability, "order": order, "reading": reading,
    "samplers": samplers,
}


def main() -> None:
    """Run the benchmark that the verb names."""
    parser = Parser(__doc__ or "")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in VERBS.items():
        text = module.__doc__ or ""
        module.flags(verbs.add_parser(name, description=text, help=text.partition("\n")[0]))
    args = parser.read()
    VERBS[args.verb].run(args)
