"""Text from a routed model; lego/routing/generation.py and lego/routing/command_line.py do it.

python -m lego.generate data/routed "def main(" --max-new-tokens 64 --show-exits
"""

from lego.routing.command_line import main
from lego.routing.generation import Sampling, Token, generate, generate_lossless

__all__ = ["Sampling", "Token", "generate", "generate_lossless", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
