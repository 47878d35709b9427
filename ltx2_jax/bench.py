"""Speed and memory on this machine, with random weights: python -m ltx2_jax.bench --help."""

import argparse
import sys
from collections.abc import Sequence

from ltx2_jax import command, planning

DESCRIPTION = """\
Measure a part of the package on this machine, with random weights of the released sizes.
"""

EXAMPLE = """\
example:
  python -m ltx2_jax.bench codec
  python -m ltx2_jax.bench codec --release=2.0 --frames=17 --height=128 --width=192
  python -m ltx2_jax.bench data clips/ --records=data/clips --step=2
  python -m ltx2_jax.bench step
  python -m ltx2_jax.bench step --height=512 --width=768 --layers=12
  python -m ltx2_jax.bench train --layers=4 --remat=projections
  python -m ltx2_jax.bench weights --gigabytes=8 --folder=/mnt/disks/data
"""


def cli(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, see `command.run`."""
    args = _parser().parse_args(argv)
    return command.run("bench", lambda: planning.BENCHES[args.what][0].run(args))


def _parser() -> argparse.ArgumentParser:
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = command.parser("bench", DESCRIPTION, EXAMPLE)
    parts = parser.add_subparsers(dest="what", required=True, metavar="PART")
    for name, (module, what) in planning.BENCHES.items():
        module.add_arguments(parts.add_parser(name, help=what, description=module.__doc__, **form))
    return parser


if __name__ == "__main__":
    sys.exit(cli())
