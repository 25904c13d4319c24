"""Brings real models into the cache before they are needed: ``python -m models.fetch [NAME...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import models
from apollo_fuse.errors import ApolloFuseError


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if a model could not be had, which does not keep the others from being fetched."""
    parser = argparse.ArgumentParser(prog="python -m models.fetch", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all real models by default")
    failed = False
    for name in parser.parse_args(arguments).names or models.REAL:
        try:
            print(f"{name}: {models.path(name)}", flush=True)
        except ApolloFuseError as error:
            print(error, file=sys.stderr)
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
