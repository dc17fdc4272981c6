"""What routing saves in time, beside what the ledger says it saves in multiply-accumulates.

python -m benchmarks.routing_latency                    prefill; --decode 64 measures decoding token by token

The model is untrained: its threshold is the quantile of its own scores on the measured text that gives the wanted
shallow ratio, so the routed share is exact. Routed and full runs are the same decoder and alternate; each pair gives a
ratio. Decoding stands beside a bound by bytes read: block 2's weights are read unless all sequences leave together.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from benchmarks import parser_with_sizes
from lego.base.harness import reuse_freed_memory
from lego.evaluation.latency import ratio_of_pairs, seconds
from lego.mining.thresholds import quantile_threshold
from lego.model.cost import Ledger
from lego.model.exit_criteria import Criterion, StateCriterion, max_prob
from lego.model.transformer import DeepSupervisionTransformer
from lego.routing.decoder import RoutedDecoder


def build(context: str, arguments: argparse.Namespace) -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(
        arguments.vocab, arguments.dim, arguments.layers, 8, arguments.exit_layer, block2_context=context, init_std=0.1
    )
    return model.eval()


def threshold_for(model: DeepSupervisionTransformer, x: Tensor, criterion: Criterion, wanted: float) -> float:
    """The score from which a share `wanted` of the tokens leaves."""
    h = model.forward_to_hidden(x).flatten(0, 1)
    score = torch.cat([criterion(part, model.logits_at(part, model.exit_layer)) for part in h.split(2048)])
    return quantile_threshold(score, 1 - wanted)


def prefill(model: DeepSupervisionTransformer, x: Tensor, criterion: Criterion, wanted: float, repeats: int) -> str:
    threshold = threshold_for(model, x, criterion, wanted)
    ratio = 1 - RoutedDecoder(model, threshold, len(x), criterion).read(x).deep.double().mean().item()
    macs = criterion.macs if isinstance(criterion, StateCriterion) else None
    flops = Ledger.of(model, x.shape[1]).flops_ratio(ratio, macs)
    routed, full = (
        partial(lambda at: RoutedDecoder(model, at, len(x), criterion).read(x), at) for at in (threshold, None)
    )
    median, low, high = ratio_of_pairs(routed, full, repeats)
    plain = statistics.median(seconds(full) / seconds(lambda: model(x)) for _ in range(repeats))
    return (
        f"latency_ratio {median:.3f} ({low:.3f} to {high:.3f}), flops_ratio {flops:.3f}, quotient "
        f"{median / flops:.3f}; the decoder's full pass takes {plain:.3f} of the model's own"
    )


def decode(
    model: DeepSupervisionTransformer, threshold: float | None, x: Tensor, criterion: Criterion, steps: int
) -> float:
    """Seconds to read the last `steps` tokens one by one after the others."""
    decoder = RoutedDecoder(model, threshold, len(x), criterion)
    decoder.read(x[:, :-steps], last_only=True)

    def step_by_step() -> None:
        for step in range(x.shape[1] - steps, x.shape[1]):
            decoder.read(x[:, step : step + 1])

    return seconds(step_by_step)


def decoding(model: DeepSupervisionTransformer, x: Tensor, wanted: float, arguments: argparse.Namespace) -> str:
    torch.manual_seed(1)
    criterion, steps = StateCriterion(arguments.dim).requires_grad_(False), arguments.decode
    threshold = threshold_for(model, x[:, -steps:], criterion, wanted)
    runs = [partial(decode, model, at, x, criterion, steps) for at in (threshold, None)]
    for run in (*runs, *runs):
        run()
    ratio = statistics.median(runs[0]() / runs[1]() for _ in range(arguments.repeats))
    ledger = Ledger.of(model, 1)
    small = ledger.block1 + ledger.head
    bound = (small + (1 - wanted ** len(x)) * ledger.block2) / (small + ledger.block2)
    return f"time of the full model's {ratio:.3f}, bound by bytes read {bound:.3f}"


@torch.no_grad()
def main() -> None:
    parser = parser_with_sizes(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--contexts", nargs="+", default=["sequence", "token"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--decode", type=int, default=0, help="decode so many tokens one by one instead")
    arguments = parser.parse_args()
    reuse_freed_memory()
    torch.set_num_threads(arguments.threads)
    probe = StateCriterion(arguments.dim).requires_grad_(False)
    criteria: dict[str, Criterion] = {"max_prob": max_prob, "probe": probe}
    for context in arguments.contexts:
        model = build(context, arguments)
        for batch in arguments.batches:
            x = torch.randint(arguments.vocab, (batch, arguments.seq_len))
            for wanted in arguments.ratios:
                if arguments.decode:
                    line = decoding(model, x, wanted, arguments)
                    print(f"{context}, batch {batch}, shallow {wanted:.2f}, probe: {line}", flush=True)
                    continue
                for name, criterion in criteria.items():
                    line = prefill(model, x, criterion, wanted, arguments.repeats)
                    print(f"{context}, batch {batch}, shallow {wanted:.2f}, {name}: {line}", flush=True)


if __name__ == "__main__":
    main()
