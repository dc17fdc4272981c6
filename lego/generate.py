"""Text from a routed model; lego/routing/generation.py does it.

python -m lego.generate data/routed "def main(" --max-new-tokens 64 --show-exits
"""

from lego.routing.generation import Sampling, Token, generate, generate_lossless, main

__all__ = ["Sampling", "Token", "generate", "generate_lossless", "main"]

if __name__ == "__main__":
    raise SystemExit(main())
