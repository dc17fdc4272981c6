"""Speed of CVFP's phase 1: parallel against sequential_batch, and against plain batched PyTorch; memory at many tokens.

python -m benchmarks.cvfp_speed                        N = 6,400, d = 768, 6 layers, both modes in one run
python -m benchmarks.cvfp_speed --memory 100000        peak memory of a parallel step over so many tokens
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lego.cvfp.model import NewLLMResidual
from lego.cvfp.passes import sequential_pass, shifted
from lego.cvfp.phase1 import ContextTrainer
from lego.cvfp.sections import CvfpParams, changed, load, with_profile
from lego.cvfp.store import build


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The fastest of so many runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def trainer_of(params: CvfpParams, tokens: int) -> ContextTrainer:
    model = build(params.model, params.phase1, 1000, 0)
    ids = torch.randint(1000, (tokens,), generator=torch.Generator().manual_seed(0))
    return ContextTrainer(model, model.embed(ids).detach(), params.phase1)


def plain_step(model: NewLLMResidual, embeddings: Tensor, previous: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The formulas of the specification in plain tensors, with autograd and Adam."""
    c, t, d = shifted(previous, previous[-1]), embeddings, model.context_dim
    for block in model.blocks:
        for layer in block.layers:
            u = torch.relu(functional.linear(torch.cat([c, t], 1), layer.fnn.weight, layer.fnn.bias))
            c = functional.layer_norm(c + u[:, :d], (d,), layer.context_norm.weight, layer.context_norm.bias)
            t = functional.layer_norm(t + u[:, d:], t.shape[1:], layer.token_norm.weight, layer.token_norm.bias)
    loss = 0.1 * functional.mse_loss(c, previous) - 0.9 * (c - c.mean(0)).norm() / len(c)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6400)
    parser.add_argument("--sequential-tokens", type=int, default=400, help="tokens of which the slow mode is timed")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, help="measure the peak memory of one parallel step over so many tokens")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    sizes = {"model.context_dim": asked.dim, "model.embed_dim": asked.dim, "model.hidden_dim": 2 * asked.dim}
    params = changed(with_profile(load(), "seed"), sizes | {"model.layer_structure": [1] * asked.layers}, "benchmark")
    if asked.memory:
        trainer = trainer_of(params, asked.memory)
        previous = torch.randn(asked.memory, asked.dim)
        trainer.iterate(1, previous, previous)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        chunk = params.phase1.chunk_tokens
        print(f"parallel step over {asked.memory:,} tokens in chunks of {chunk:,}: peak resident memory {peak:.2f} GiB")
        return
    parallel = trainer_of(params, asked.tokens)
    previous = torch.randn(asked.tokens, asked.dim)
    ours = seconds(lambda: parallel.iterate(1, previous, previous), 3)
    optimizer = torch.optim.Adam([p for p in parallel.model.parameters() if p.requires_grad], lr=0.002)
    plain = seconds(lambda: plain_step(parallel.model, parallel.embeddings, previous, optimizer), 3)
    slow = trainer_of(changed(params, {"phase1.mode": "sequential_batch"}, "benchmark"), asked.sequential_tokens)
    few = previous[: asked.sequential_tokens]
    share = asked.tokens / asked.sequential_tokens
    sequential = share * seconds(lambda: slow.iterate(1, few, few), 2)
    first = share * seconds(lambda: sequential_pass(slow.model, slow.embeddings), 2)  # iteration 0 of both modes
    steps = params.phase1.max_iterations - 1
    whole = (first + steps * sequential) / (first + steps * ours)
    print(
        f"N = {asked.tokens:,}, d = {asked.dim}, {asked.layers} layers, {asked.threads} threads, an iteration with step"
    )
    print(f"parallel           {asked.tokens / ours:9.0f} tokens/s")
    print(f"sequential_batch   {asked.tokens / sequential:9.0f} tokens/s; parallel is {sequential / ours:.1f}x as fast")
    print(f"plain batched step {asked.tokens / plain:9.0f} tokens/s; parallel is {plain / ours:.2f}x as fast")
    print(f"all {steps + 1} iterations, the first of them sequential ({first:.0f} s): {whole:.1f}x as fast")


if __name__ == "__main__":
    main()
