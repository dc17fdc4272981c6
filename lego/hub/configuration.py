"""The configuration of a routed model in transformers' classes; `lego.hf` registers it."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from lego.model.exit_criteria import CRITERIA
from lego.model.stack import BLOCK2_CONTEXTS


@strict
class LegoConfig(LlamaConfig):
    """Llama's configuration with an exit.

    Args:
        exit_layer: last layer of block 1, from 1.
        exit_threshold: score from which a token leaves at the exit: 0.0 is block 1 alone, above 1 always deep; None
            switches routing off.
        exit_criterion: max_prob, margin or entropy of the exit's logits, or probe or gain of the exit state.
        exit_criterion_width: hidden width of probe or gain; 0 = linear.
        block2_context: what a token sees above the exit: sequence, token or full (see DeepSupervisionTransformer).
        own_head: block 2 has an output head of its own.
        trained_context: longest sequence it was trained on; None if that is not known.

    Raises:
        ValueError: a value outside its range.
    """

    model_type = "lego"
    exit_layer: int = 1
    exit_threshold: float | None = None
    exit_criterion: str = "max_prob"
    exit_criterion_width: int = 0
    block2_context: str = "sequence"
    own_head: bool = False
    trained_context: int | None = None

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if not 1 <= self.exit_layer <= self.num_hidden_layers:
            raise ValueError(f"exit_layer must be in 1..{self.num_hidden_layers}, got {self.exit_layer}")
        if self.exit_threshold is not None and not self.exit_threshold >= 0:
            raise ValueError(f"exit_threshold must be None or at least 0.0, got {self.exit_threshold}")
        if self.exit_criterion not in CRITERIA:
            raise ValueError(f"exit_criterion must be one of {', '.join(CRITERIA)}, got {self.exit_criterion!r}")
        if self.block2_context not in BLOCK2_CONTEXTS:
            raise ValueError(f"block2_context must be one of {', '.join(BLOCK2_CONTEXTS)}, got {self.block2_context!r}")
