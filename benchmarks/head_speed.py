"""The output head at any vocabulary: losses, readings and confidences without a batch's logits, against torch's own.

python -m benchmarks.head_speed                          V = 1k, 4k, 49k and 128k
python -m benchmarks.head_speed --model FOLDER           mining by a Llama, against its forward pass with logits

Both sides alternate; each pair gives a ratio of speeds, of which the median, the least and the largest are shown.
Memory is what the process holds at its peak beyond what it held before.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lego.evaluation.latency import ratio_of_pairs
from lego.mining.hard_tokens import exit_states
from lego.model.losses import exit_confidence, linear_cross_entropy, read_exit

Call = Callable[[], object]


def peak_mib(call: Call) -> float:
    """Memory of a call (Linux)."""

    def told(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) if found else 0

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = told("VmRSS")
    call()
    return max(0, told("VmHWM") - before) / 1024


def with_gradients(loss: Callable[[Tensor, Tensor, Tensor], Tensor], h: Tensor, weight: Tensor, y: Tensor) -> Call:
    def call() -> None:
        h.grad = weight.grad = None
        loss(h, weight, y).backward()

    return call


@torch.no_grad()
def plain_reading(h: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    logits = h @ weight.t()
    best = logits.max(dim=1)
    loss = F.cross_entropy(logits, y, reduction="none")
    return loss, best.indices == y, (best.values - logits.logsumexp(dim=1)).exp()


@torch.no_grad()
def plain_confidence(h: Tensor, weight: Tensor) -> Tensor:
    return (h @ weight.t()).softmax(dim=1).amax(dim=1)


def report(name: str, ours: Call, theirs: Call, repeats: int) -> None:
    peaks = [peak_mib(call) for call in (ours, theirs)]  # which also warms both up
    ratio, low, high = ratio_of_pairs(theirs, ours, repeats)
    memory = f"peak {peaks[0]:6.0f} MiB, plain {peaks[1]:6.0f}"
    print(f"  {name:22} {ratio:.2f}x ({low:.2f} to {high:.2f}); {memory}", flush=True)


def heads(arguments: argparse.Namespace) -> None:
    for vocab in arguments.vocab:
        torch.manual_seed(0)
        n, dim = arguments.tokens, arguments.dim
        weight, h, y = torch.randn(vocab, dim) * 0.02, torch.randn(n, dim), torch.randint(vocab, (n,))
        print(f"V = {vocab:,}, D = {dim}, {n} tokens")
        fixed = h.clone(), weight.clone(), y
        loss = with_gradients(linear_cross_entropy, h.requires_grad_(), weight.requires_grad_(), y)
        theirs = with_gradients(lambda h, w, y: F.cross_entropy(h @ w.t(), y), h, weight, y)
        report("loss with gradients", loss, theirs, arguments.repeats)
        h, weight = fixed[:2]
        report("reading", partial(read_exit, *fixed), partial(plain_reading, *fixed), arguments.repeats)
        report(
            "confidence", partial(exit_confidence, h, weight), partial(plain_confidence, h, weight), arguments.repeats
        )


def mining(arguments: argparse.Namespace) -> None:
    """Tokens mined in a second, against transformers' forward pass of the same model, logits included."""
    from transformers import AutoModelForCausalLM

    from lego.model.llama import load_llama

    folder = str(arguments.model)
    ours = load_llama(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    ids = torch.randint(ours.sizes["vocab_size"], (arguments.tokens // 128, 128))

    def forward() -> None:
        with torch.inference_mode():
            theirs(ids, use_cache=False)

    print(f"mining {ids.numel()} tokens")
    mine = lambda: list(exit_states(ours, [(ids, ids)], "cpu"))  # noqa: E731
    report("mining", mine, forward, arguments.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 4096, 49_152, 128_256])
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a folder of a trained Llama")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    (mining if arguments.model else heads)(arguments)


if __name__ == "__main__":
    main()
