"""Speed of CVFP's phase 1: parallel against sequential_batch, and against plain batched PyTorch; memory at many tokens.

python -m benchmarks.cvfp_speed                        N = 6,400, d = 768, 6 layers, both modes in one run
python -m benchmarks.cvfp_speed --memory 100000        peak memory of three parallel iterations over so many tokens
"""

import argparse
import resource

import torch
from torch import Tensor
from torch.nn import functional

from lego.base.timing import fastest
from lego.cvfp.model import NewLLMResidual
from lego.cvfp.passes import sequential_pass, shifted
from lego.cvfp.phase1 import ContextTrainer
from lego.cvfp.sections import CvfpParams, changed, load, with_profile
from lego.cvfp.store import build


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


def profile(dim: int, layers: int) -> CvfpParams:
    """The profile `seed` at this size."""
    sizes = {"model.context_dim": dim, "model.embed_dim": dim, "model.hidden_dim": 2 * dim}
    return changed(with_profile(load(), "seed"), sizes | {"model.layer_structure": [1] * layers}, "benchmark")


def measure(params: CvfpParams, tokens: int, sequential_tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second of one iteration with its step, and of the sequential first one.

    Args:
        params: of the network and of phase 1.
        tokens: N.
        sequential_tokens: of which the modes token by token are timed; their time is linear in tokens.
        repeats: of each, of which the fastest counts.
    """
    parallel = trainer_of(params, tokens)
    previous = torch.randn(tokens, params.model.context_dim)
    slow = trainer_of(changed(params, {"phase1.mode": "sequential_batch"}, "benchmark"), sequential_tokens)
    few = previous[:sequential_tokens]
    optimizer = torch.optim.Adam([p for p in parallel.model.parameters() if p.requires_grad], lr=params.phase1.lr)
    found = fastest(
        {
            "parallel": lambda: parallel.iterate(1, previous, previous),
            "plain": lambda: plain_step(parallel.model, parallel.embeddings, previous, optimizer),
            "sequential_batch": lambda: slow.iterate(1, few, few),
            "first": lambda: sequential_pass(slow.model, slow.embeddings),  # iteration 0 of both modes
        },
        repeats,
    )
    return {name: (tokens if name in ("parallel", "plain") else sequential_tokens) / one for name, one in found.items()}


def whole_phase(speeds: dict[str, float], iterations: int) -> float:
    """How many times as fast a phase of so many iterations is, of which the first is sequential in both modes."""
    spent = {mode: 1 / speeds["first"] + (iterations - 1) / speeds[mode] for mode in ("parallel", "sequential_batch")}
    return spent["sequential_batch"] / spent["parallel"]


def peak_gib(params: CvfpParams, tokens: int, iterations: int) -> float:
    """Peak resident memory of this process after so many parallel iterations."""
    trainer, previous = trainer_of(params, tokens), torch.randn(tokens, params.model.context_dim)
    for number in range(1, iterations + 1):
        previous = trainer.iterate(number, previous, previous).contexts.values
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6400)
    parser.add_argument("--sequential-tokens", type=int, default=400, help="tokens of which the slow mode is timed")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, help="measure the peak memory of parallel iterations over so many tokens")
    parser.add_argument("--iterations", type=int, default=3, help="of --memory")
    parser.add_argument("--chunk-tokens", type=int, help="of --memory; default: that of phase1.chunk_tokens")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    params = profile(asked.dim, asked.layers)
    if asked.memory:
        chunk = asked.chunk_tokens or params.phase1.chunk_tokens
        params = changed(params, {"phase1.chunk_tokens": chunk}, "benchmark")
        peak = peak_gib(params, asked.memory, asked.iterations)
        print(
            f"{asked.iterations} parallel iterations over {asked.memory:,} tokens in chunks of {chunk:,}: peak "
            f"resident memory {peak:.2f} GiB"
        )
        return
    found = measure(params, asked.tokens, asked.sequential_tokens, asked.repeats)
    iterations, ours = params.phase1.max_iterations, found["parallel"]
    print(
        f"N = {asked.tokens:,}, d = {asked.dim}, {asked.layers} layers, {asked.threads} threads, an iteration with step"
    )
    for name, speed in found.items():
        said = "" if name == "parallel" else f"; parallel is {ours / speed:.2f}x as fast"
        print(f"{name:17} {speed:9.0f} tokens/s{said}")
    print(f"all {iterations} iterations, the first sequential in both: {whole_phase(found, iterations):.1f}x as fast")


if __name__ == "__main__":
    main()
