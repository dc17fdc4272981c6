"""What routing saves in time, beside what the ledger says it saves in multiply-accumulates.

python -m benchmarks.routing_latency                    prefill; --decode 64 adds decoding token by token

The model is untrained: its threshold is the quantile of its own confidences on the measured batch that gives the
wanted shallow ratio, so the routed share is exact. Routed and full runs alternate; each pair gives a ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lego.cost import Ledger
from lego.exits import quantile_threshold
from lego.harness import reuse_freed_memory
from lego.routing import RoutedDecoder
from lego.transformer import DeepSupervisionTransformer

Run = Callable[[], object]


def build(context: str, arguments: argparse.Namespace) -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(
        arguments.vocab, arguments.dim, arguments.layers, 8, arguments.exit_layer, block2_context=context, init_std=0.1
    )
    return model.eval()


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio_of_pairs(
    routed: Callable[[], object], full: Callable[[], object], repeats: int
) -> tuple[float, float, float]:
    """Median, smallest and largest of routed / full over interleaved pairs, after two of each to warm up."""
    for run in (routed, full, routed, full):
        run()
    ratios = sorted(seconds(routed) / seconds(full) for _ in range(repeats))
    return statistics.median(ratios), ratios[0], ratios[-1]


def decode(model: DeepSupervisionTransformer, threshold: float | None, x: Tensor, steps: int) -> None:
    """Reads the last `steps` tokens one by one after the others."""
    decoder = RoutedDecoder(model, threshold, len(x))
    decoder.read(x[:, :-steps])
    for step in range(x.shape[1] - steps, x.shape[1]):
        decoder.read(x[:, step : step + 1])


def measure(model: DeepSupervisionTransformer, x: Tensor, wanted: float, arguments: argparse.Namespace) -> str:
    """One line about a batch of which a share `wanted` leaves early."""
    confidence = model.compute_confidence(model.forward_to_hidden(x))
    threshold = quantile_threshold(confidence, 1 - wanted)
    flops = Ledger.of(model, x.shape[1]).flops_ratio((confidence >= threshold).double().mean().item())
    repeats, steps = arguments.repeats, arguments.decode
    median, low, high = ratio_of_pairs(lambda: model.route(x, model.exit_layer, threshold), lambda: model(x), repeats)
    line = f"prefill latency_ratio {median:.3f} ({low:.3f} to {high:.3f}), flops_ratio {flops:.3f}, "
    line += f"quotient {median / flops:.3f}"
    if steps:
        routed, full = (partial(decode, model, at, x, steps) for at in (threshold, None))
        median, low, high = ratio_of_pairs(routed, full, repeats)
        line += f"; decoding {median:.3f} ({low:.3f} to {high:.3f})"
    return line


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--exit-layer", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--contexts", nargs="+", default=["sequence", "token"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode", type=int, default=0, help="also decode so many tokens one by one")
    arguments = parser.parse_args()
    reuse_freed_memory()
    torch.set_num_threads(arguments.threads)
    for context in arguments.contexts:
        model = build(context, arguments)
        for batch in arguments.batches:
            x = torch.randint(arguments.vocab, (batch, arguments.seq_len))
            for wanted in arguments.ratios:
                print(
                    f"{context}, batch {batch}, shallow {wanted:.1f}: {measure(model, x, wanted, arguments)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
