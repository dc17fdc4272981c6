"""What an epoch of phase 2 takes beside an epoch of training the full model on the same blocks, and what reading costs.

python -m benchmarks.phase2_epoch

The full model is trained on every token of the blocks, phase 2 on the stored exit states of the hard ones. Both run
in this process, interleaved; the quotient is (time / time) / (MACs / MACs).
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks import parser_with_sizes
from lego.base.harness import reuse_freed_memory
from lego.evaluation.latency import seconds
from lego.growing.hard_batches import HardBlockBatches
from lego.growing.upper_layers import train_gathered
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import HiddenStateStore, StoreWriter
from lego.mining.thresholds import quantile_threshold
from lego.model.cost import Ledger
from lego.model.growth import grow_model
from lego.model.transformer import DeepSupervisionTransformer
from lego.tokens.batches import EvaluationBatches
from lego.training.trainer import Trainer, create_standard_config


class RandomBlocks:
    """Blocks of random tokens: speed does not depend on what they say."""

    def __init__(self, count: int, seq_len: int, vocab: int) -> None:
        self.seq_len, self.ids = seq_len, torch.randint(vocab, (count, seq_len + 1))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return len(self.ids) * self.seq_len

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return self.ids[indices]


def stored(
    block1: DeepSupervisionTransformer, batches: EvaluationBatches, share: float, folder: Path
) -> HiddenStateStore:
    """Exit states of all batches, of which a share is hard."""
    parts = list(exit_states(block1, batches, "cpu"))
    threshold = quantile_threshold(torch.cat([part[3].flatten() for part in parts]), share)
    writer = StoreWriter(folder, threshold, "float16", 131_072)
    for part in parts:
        writer.add(*part)
    writer.close(split="train", text="fresh", block1_sha256="", tokenizer_sha256="", macs=0)
    return HiddenStateStore(folder)


def main() -> None:
    parser = parser_with_sizes(__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--hard", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    reuse_freed_memory()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = {"init_std": 0.1, "exit_layer": arguments.exit_layer}
    block1 = DeepSupervisionTransformer(arguments.vocab, arguments.dim, arguments.exit_layer, 8, **sizes)
    full = DeepSupervisionTransformer(arguments.vocab, arguments.dim, arguments.layers, 8, **sizes)
    blocks = RandomBlocks(arguments.blocks, arguments.seq_len, arguments.vocab)
    batches = EvaluationBatches(blocks, arguments.batch)
    trainer = Trainer(create_standard_config(arguments.layers), arguments.vocab)
    full_optimizer = trainer.create_optimizer(full, 1e-4)
    ledger = Ledger.of(full, arguments.seq_len)
    full_macs = 3 * ledger.full * blocks.tokens
    for hard in arguments.hard:
        grown = grow_model(block1, arguments.layers, block2_context="sequence")
        optimizer = trainer.create_optimizer(grown, 1e-4)
        with tempfile.TemporaryDirectory() as folder:
            store = stored(block1, batches, hard, Path(folder))
            tokens = arguments.batch * arguments.seq_len
            epoch = HardBlockBatches(store, tokens, store.hard_tokens, 0)
            times: dict[str, list[float]] = {"phase 2": [], "full": [], "reading": []}
            for repeat in range(arguments.repeats + 1):
                epoch.set_epoch(repeat)
                times["phase 2"].append(seconds(partial(train_gathered, grown, epoch, optimizer, "cpu")))
                times["full"].append(seconds(partial(trainer.train_epoch, full, batches, full_optimizer)))
                times["reading"].append(seconds(partial(list, epoch)))
            streamed, seen = epoch.streamed(1), epoch.seen(1)[-1]
        took = {name: statistics.median(values[1:]) for name, values in times.items()}
        macs = Ledger.of(grown, arguments.seq_len).train_block2(seen, False, streamed)
        work = (macs / streamed) / (full_macs / blocks.tokens)
        ratio = took["phase 2"] / streamed / (took["full"] / blocks.tokens)
        print(
            f"hard {hard:.1f}: time per token of text {ratio:.3f} of the full model's, MACs {work:.3f}, quotient "
            f"{ratio / work:.3f}; reading the store {100 * took['reading'] / took['phase 2']:.1f} % of phase 2",
            flush=True,
        )


if __name__ == "__main__":
    main()
