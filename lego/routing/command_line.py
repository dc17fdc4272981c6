"""The command line of generation: text with a routed model, and its speed beside the full model's.

python -m lego.generate data/routed "def main(" --max-new-tokens 64 --show-exits
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lego.base.artifacts import ArtifactError
from lego.base.outside import encodable, printable
from lego.model.checkpoint import load_routed
from lego.routing.generation import Sampling, Token, generate, generate_lossless
from lego.routing.spelling import spelled

COLOURS = ("\033[32m", "\033[33m", "\033[35m", "\033[31m")  # of exits 1, 2, 3 and beyond


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lego.generate", description="Writes text with a routed model.")
    parser.add_argument("folder", help="a model folder with its tokenizer, such as data/routed")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--threshold", type=float, help="score from which a token leaves early")
    how.add_argument("--lossless", action="store_true", help="exactly as the full model; block 1 drafts")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--show-exits",
        action="store_true",
        help="green: left after block 1; yellow, magenta, red: after block 2, 3, a later one",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(argv)


def stop_ids(generation_config: Mapping[str, Any], end_of_text: int | None) -> set[int]:
    """Ids that end a text: the model's own, one or several, and where it names none the tokenizer's end-of-text.

    Raises:
        ValueError: the model's are no ids.
    """
    told = generation_config.get("eos_token_id")
    told = end_of_text if told is None else told
    ids = [] if told is None else told if isinstance(told, list) else [told]
    if not all(type(one) is int for one in ids):
        raise ValueError(f"generation_config.json: eos_token_id must be a whole number or a list of such, got {told!r}")
    return {*ids}


def _write(arguments: argparse.Namespace) -> dict[str, Any]:
    """Text and measures of the routed model, and the full model's speed for the same prompt."""
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2^63), got {arguments.seed}")
    if any("\ud800" <= letter <= "\udfff" for letter in arguments.prompt):
        raise ValueError("the prompt is not UTF-8")
    routed = load_routed(arguments.folder)
    model = routed.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{arguments.folder}: has no tokenizer ({str(error).splitlines()[0]})") from None
    prompt = tokenizer(arguments.prompt)["input_ids"]
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    count, stop = arguments.max_new_tokens, stop_ids(model.generation_config, tokenizer.eos_token_id)
    gate = routed.gates or routed.gate
    threshold: Any = arguments.threshold
    if threshold is None:
        threshold = routed.thresholds or routed.threshold

    def run(exits: bool) -> Iterator[Token]:
        drawn = torch.Generator().manual_seed(arguments.seed)
        if exits and arguments.lossless:
            return generate_lossless(model, prompt, count, gate=gate, sampling=sampling, stop=stop, generator=drawn)
        routing = partial(generate, criterion=routed.criterion, gate=gate)
        at = threshold if exits else None
        return routing(model, [prompt], count, at, sampling=sampling, stop=stop, generator=drawn)

    list(generate(model, [prompt], 2, None))  # the first steps of a process are slow
    started = time.perf_counter()
    tokens = list(run(exits=True))
    between = time.perf_counter()
    full = list(run(exits=False))
    speed, full_speed = len(tokens) / (between - started), len(full) / (time.perf_counter() - between)
    texts = spelled(tokenizer.decode, prompt, [token.id for token in tokens])
    return {
        "prompt": arguments.prompt,
        "text": "".join(texts),
        "tokens": [
            {"id": token.id, "text": text, "deep": token.deep, "exit": token.exit}
            for token, text in zip(tokens, texts, strict=True)
        ],
        "shallow_ratio": sum(not token.deep for token in tokens) / max(1, len(tokens)),
        "tokens_per_second": speed,
        "full_tokens_per_second": full_speed,
    }


def _shown(result: dict[str, Any], exits: bool) -> str:
    """Prompt and text; what a terminal would obey is spelled out, and only our own colours reach it."""
    if exits:
        tokens = (
            f"{COLOURS[min(token['exit'], len(COLOURS)) - 1]}{printable(token['text'])}" for token in result["tokens"]
        )
        return printable(result["prompt"]) + "".join(tokens) + "\033[0m"
    text = result["prompt"] + result["text"]
    return printable(text) if sys.stdout.isatty() else text


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        result = _write(arguments)
    except (ArtifactError, ValueError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(encodable(_shown(result, arguments.show_exits), sys.stdout.encoding))
    print(
        f"{len(result['tokens'])} tokens, {100 * result['shallow_ratio']:.1f} % shallow, "
        f"{result['tokens_per_second']:.1f} tokens/s; full model {result['full_tokens_per_second']:.1f} tokens/s",
        file=sys.stderr,
    )
    return 0
