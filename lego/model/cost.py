"""The ledger of multiply-accumulates (MACs): what a token costs at each exit, and what training cost (ashem section 6).

Counted are matrix products, as `torch.utils.flop_counter.FlopCounterMode` counts them (1 MAC = 2 FLOPs): projections,
attention over all T keys of a block (dense, as the math kernel computes it) and output heads. Norms, rotary positions,
activations and softmax are not: they are elementwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lego.model.blocks import Block
from lego.model.stack import CONTEXT_AT_INFERENCE

FORWARD_BACKWARD = 3  # a trained matrix product: forward, gradient of the input, gradient of the weight
FROZEN_BACKWARD = 2  # a frozen one inside the graph: forward, gradient of the input
SIZES = ("vocab_size", "dim", "num_heads", "num_kv_heads", "ffn_dim", "num_layers")  # of a model


@dataclass(frozen=True)
class Ledger:
    """MACs per token of a two-block model.

    Args:
        vocab_size, dim, num_heads, num_kv_heads, ffn_dim: sizes of the model.
        num_layers: total depth (N).
        exit_layer: depth of block 1 (k).
        seq_len: tokens per sequence (T).
        block2_context: `full`, `token` or `sequence`, see DeepSupervisionTransformer.
        branches: layers above the exit that repeat block 1's last ones on their keys and values.
        branch_rank: of the changes that they learn beside frozen matrices; 0 = whole matrices.
        online: phase 2 makes exit states anew instead of reading them.
        kept: phase 2 reads keys and values of the repeated layers, and exit states, instead of making them.
        gated: answers of hard tokens mix both exits, so these need the exit's head whatever the criterion reads.
    """

    vocab_size: int
    dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    num_layers: int
    exit_layer: int
    seq_len: int
    block2_context: str = "full"
    branches: int = 0
    branch_rank: int = 0
    gated: bool = False
    online: bool = False
    kept: bool = False

    @classmethod
    def of(cls, model: Any, seq_len: int, gated: bool = False) -> Ledger:
        """Ledger of a BaseTransformer on sequences of seq_len tokens, with a gate or without."""
        sizes = {name: model.sizes[name] for name in SIZES}
        shape = {name: getattr(model, name) for name in ("exit_layer", "block2_context", "branches", "branch_rank")}
        return cls(**sizes, **shape, seq_len=seq_len, gated=gated)

    @classmethod
    def of_block(cls, model: Any, block: Block, seq_len: int) -> Ledger:
        """Ledger of block 1 and one of the blocks above it, which stands at block 2's place; all it reads is stored."""
        depth = model.exit_layer + block.layers
        own = replace(cls.of(model, seq_len), num_layers=depth, branches=block.repeats, kept=True)
        return own if block is model.blocks[-1] else replace(own, branch_rank=0)

    def grown(self, num_layers: int, phase2_context: str, branch_layer: int | None = None) -> Ledger:
        """Ledger of the routed model that grows from this block 1, with arguments as for grow_model."""
        context, branches = CONTEXT_AT_INFERENCE[phase2_context], 0
        if branch_layer is not None:
            branches = self.num_layers - branch_layer
        depth, exit_layer = num_layers + branches, self.num_layers
        return replace(self, num_layers=depth, exit_layer=exit_layer, branches=branches, block2_context=context)

    @property
    def head(self) -> int:
        """One output head."""
        return self.dim * self.vocab_size

    @property
    def layer(self) -> int:
        """One layer that sees the sequence: four projections, scores and mixing over T keys, MLP."""
        kv_dim = self.dim * self.num_kv_heads // self.num_heads
        return 2 * self.dim * (self.dim + kv_dim) + self.attention + 3 * self.dim * self.ffn_dim

    @property
    def attention(self) -> int:
        """Scores and mixing over T keys in one layer."""
        return 2 * self.seq_len * self.dim

    @property
    def lone_layer(self) -> int:
        """One layer that sees one token alone: value and output projection, MLP; queries and keys cannot matter."""
        kv_dim = self.dim * self.num_kv_heads // self.num_heads
        return self.dim * (self.dim + kv_dim) + 3 * self.dim * self.ffn_dim

    @property
    def keys_values(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * self.dim * self.dim * self.num_kv_heads // self.num_heads

    @property
    def block1(self) -> int:
        return self.exit_layer * self.layer

    @property
    def block2(self) -> int:
        """What a token costs there; branch layers have no keys and values to project."""
        own = self.own_layers * (self.lone_layer if self.block2_context == "token" else self.layer)
        return own + self.branches * (self.layer - self.keys_values)

    @property
    def own_layers(self) -> int:
        """Layers of block 2 with keys and values of their own."""
        return self.num_layers - self.exit_layer - self.branches

    @property
    def full(self) -> int:
        """All layers in the same context, and one head."""
        return self.block1 + self.block2 + self.head

    @property
    def always_deep(self) -> int:
        """Routing switched off: the full model, and with a gate the exit's head too."""
        return self.full + (self.head if self.gated else 0)

    def kv_fill(self) -> int:
        """What an exited token costs in block 2 so that later hard tokens can attend to it.

        In `token` context nothing attends to it. In `sequence` context its keys and values are two projections of its
        exit state in every layer. In `full` context the states above the exit must exist at every layer, so block 2
        runs for exited tokens too: early exit then saves no layer at all.
        """
        return {"token": 0, "sequence": self.own_layers * self.keys_values, "full": self.block2}[self.block2_context]

    def routed(self, shallow_ratio: float, criterion_macs: int | None = None) -> float:
        """Mean cost of a token.

        A criterion that reads logits makes every token pay the exit head, which yields both its score and, if it
        leaves, its logits; a hard token pays block 2 and a second head on top. One that reads the exit state costs
        `criterion_macs` instead, and every token pays one head; hard ones two, if their answers mix both exits.
        """
        hard = 1 - shallow_ratio
        asked = hard * self.head if criterion_macs is None or self.gated else 0
        asked += criterion_macs or 0
        return self.block1 + self.head + asked + hard * self.block2 + shallow_ratio * self.kv_fill()

    def flops_ratio(self, shallow_ratio: float, criterion_macs: int | None = None) -> float:
        """Routed cost as a share of the full model's."""
        return self.routed(shallow_ratio, criterion_macs) / self.full

    def break_even_shallow_ratio(self, criterion_macs: int | None = None) -> float:
        """The shallow ratio from which routing costs less than the full model; 1.0 if it never does."""
        spared = self.block2 - self.kv_fill()  # what one more exited token saves
        if criterion_macs is None or self.gated:
            return min(1.0, ((criterion_macs or 0) + self.head) / (spared + self.head))
        return min(1.0, criterion_macs / spared) if spared > 0 else 1.0

    def shallow(self) -> int:
        """Always-shallow inference: block 1 and its head."""
        return self.block1 + self.head

    def train_block1(self, tokens: int) -> int:
        """Training block 1 and its head on `tokens` tokens."""
        return FORWARD_BACKWARD * self.shallow() * tokens

    def train_joint(self, tokens: int, exits: int = 1) -> int:
        """Training all layers on `tokens` tokens, with the loss at this many exits."""
        layers = self.num_layers * self.layer + self.branches * (self.low_rank - self.keys_values)
        return FORWARD_BACKWARD * (layers + exits * self.head) * tokens

    def mine(self, tokens: int) -> int:
        """Confidences, and exit states and hard tokens, of `tokens` tokens: one forward pass of block 1."""
        return self.shallow() * tokens

    def states_line(self, tokens: int, number_bytes: int, states: str, layer: int | None = None) -> str:
        """What states of a text take stored, and what it costs to make them anew whenever phase 2 reads them.

        Args:
            tokens: of the text.
            number_bytes: of a stored number.
            states: `stored`, `keys_values` or `online`: which is done.
            layer: whose they are, if not the exit's.
        """
        below, mib = self.exit_layer if layer is None else layer, number_bytes * tokens / 2**20
        ways = [f"{mib * self.dim:,.1f} MiB stored"]
        if above := self.exit_layer - below:
            more, spared = mib * (2 * self.dim + above * self.keys_values // self.dim), above * self.layer * tokens
            ways.append(f"{more:,.1f} MiB with keys and values and {spared:.3e} MACs a pass less")
        ways.append(f"{below * self.layer * tokens:.3e} MACs a pass to make them anew")
        done = {"stored": "they are stored", "keys_values": "all is stored", "online": "they are made anew"}[states]
        return f"states: {', or '.join(ways)}; {done}"

    def train_block2(self, hard_tokens: int, head_trains: bool, tokens: int = 0) -> int:
        """Training block 2 on stored states.

        Args:
            hard_tokens: tokens that pass block 2; each is seen alone, but for `sequence` context.
            head_trains: whether the head is trained too.
            tokens: tokens of the blocks they stand in, whose keys and values are projected in `sequence` context.
        """
        depth = self.num_layers - self.exit_layer
        head = (FORWARD_BACKWARD if head_trains else FROZEN_BACKWARD) * self.head
        if self.block2_context != "sequence":
            return (FORWARD_BACKWARD * depth * self.lone_layer + head) * hard_tokens
        trained = FORWARD_BACKWARD * self.own_layers * (self.layer - self.keys_values) + self.train_branches
        own = (trained + head) * hard_tokens
        made = self.block1 - self.branches * self.layer if self.online else 0
        return own + (FORWARD_BACKWARD * self.own_layers * self.keys_values + self.above_the_branch + made) * tokens

    @property
    def train_branches(self) -> int:
        """Training the branch layers on a hard token; of keys and values, which do not train, no gradient is formed."""
        matrices = self.layer - self.keys_values - self.attention
        if self.branch_rank:
            one = FROZEN_BACKWARD * matrices + FORWARD_BACKWARD * self.low_rank
        else:
            one = FORWARD_BACKWARD * matrices
        return self.branches * (one + FROZEN_BACKWARD * self.attention)

    @property
    def low_rank(self) -> int:
        """Changes of low rank beside a branch layer's matrices: queries, output, three of the MLP."""
        return self.branch_rank * (4 * self.dim + 3 * (self.dim + self.ffn_dim))

    @property
    def above_the_branch(self) -> int:
        """Block 1's layers that phase 2 runs over a token for their keys and values, and for its exit state."""
        if self.kept:
            return 0
        if self.own_layers or not self.branches:
            return self.branches * self.layer
        return (self.branches - 1) * self.layer + self.keys_values


def cascade_macs(model: Any, seq_len: int, shares: Sequence[float]) -> float:
    """Mean MACs of a token where so large shares of all tokens go through each block above the first.

    Every exit that a token comes to reads its logits, as max_prob does.

    Args:
        model: with two blocks or more, in `sequence` context.
        seq_len: tokens per sequence (T).
        shares: of the tokens, in [0, 1], one for each block above the first.
    """
    total = float(Ledger.of(model, seq_len).shallow())
    for block, share in zip(model.blocks, shares, strict=True):
        one = Ledger.of_block(model, block, seq_len)
        total += share * (one.block2 + one.head) + (1 - share) * one.kv_fill()
    return total
