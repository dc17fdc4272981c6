"""Phase 1's training speed against a plain loop over `transformers.LlamaForCausalLM` of the same shape.

python -m benchmarks.train_throughput                    pairs of runs, interleaved, on the CPU
python -m benchmarks.train_throughput --device cuda --precision bf16 --compile
python -m benchmarks.train_throughput --profile          where the time of our steps goes

Both loops see the same batches, clip at the same norm and use the same fused AdamW, so that what is compared is the
model and the loss. The ratio of each pair is taken by itself: the machine's moods hit both halves of a pair alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from lego.base.harness import reuse_freed_memory
from lego.base.params import Params, load_params
from lego.model.transformer import StandardTransformer
from lego.training.setup import build_training
from lego.training.trainer import Trainer, create_standard_config

Batches = list[tuple[Tensor, Tensor]]


def our_epoch(params: Params, dim: int, layers: int, device: str) -> Callable[[Batches], object]:
    """One epoch of phase 1 as the pipeline runs it."""
    model = StandardTransformer(params.data.vocab_size, dim, layers, dim // 32, ffn_dim=3 * dim, tie_embeddings=True)
    optimizer, options = build_training(model.to(device), 1e-3, 1000, params.train)
    trainer = Trainer(create_standard_config(layers), params.data.vocab_size, device, options=options)
    return lambda batches: trainer.train_epoch(model, batches, optimizer)


def llama_epoch(params: Params, dim: int, layers: int, device: str) -> Callable[[Batches], object]:
    """The loop anybody would write over transformers' model."""
    config = LlamaConfig(
        vocab_size=params.data.vocab_size,
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=layers,
        num_attention_heads=dim // 32,
        num_key_value_heads=dim // 32,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if params.train.compile else model

    def epoch(batches: Batches) -> None:
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=params.train.precision == "bf16"):
                loss = forward(input_ids=x, labels=y, shift_labels=y).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), params.train.grad_clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return epoch


def seconds(epoch: Callable[[Batches], object], batches: Batches, device: str) -> float:
    start = time.perf_counter()
    epoch(batches)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def profile(epoch: Callable[[Batches], object], batches: Batches) -> str:
    """The dozen operations that take most of the time."""
    with torch.profiler.profile() as profiler:
        epoch(batches)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="steps per run")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    params = load_params()
    chosen = {"precision": arguments.precision, "compile": arguments.compile, "grad_accumulation": 1}
    params = params.model_copy(update={"train": params.train.model_copy(update=chosen)})
    reuse_freed_memory()
    torch.set_num_threads(params.train.threads)
    rows = torch.randint(params.data.vocab_size, (arguments.steps, arguments.batch_size, arguments.seq_len + 1))
    batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    tokens = rows[:, :, 1:].numel()
    for dim in arguments.dims:
        ours, llama = (make(params, dim, arguments.layers, arguments.device) for make in (our_epoch, llama_epoch))
        for epoch in (ours, llama):  # memory, caches and, if asked for, the compiler
            seconds(epoch, batches, arguments.device)
        times = []
        for _ in range(arguments.pairs):
            times.append((seconds(ours, batches, arguments.device), seconds(llama, batches, arguments.device)))
        ratios = sorted(theirs / mine for mine, theirs in times)
        mine, theirs = (tokens / statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"d={dim}, {arguments.layers} layers, {arguments.precision}: lego {mine:,.0f} tokens/s, Llama loop "
            f"{theirs:,.0f} tokens/s; ratio {statistics.median(ratios):.3f} "
            f"(median of {len(ratios)} pairs, {ratios[0]:.3f} to {ratios[-1]:.3f})",
            flush=True,
        )
        if arguments.profile:
            print(profile(ours, batches))


if __name__ == "__main__":
    main()
