"""What the benchmarks of block 2 share: the sizes of the model that they measure."""

from __future__ import annotations

import argparse


def parser_with_sizes(description: str | None) -> argparse.ArgumentParser:
    """Options for the sizes of the model, of its sequences and of the machine, with the same defaults everywhere."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    return parser
