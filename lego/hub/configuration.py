"""The configuration of a routed model in transformers' classes; `lego.hf` registers it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.utils import CONFIG_NAME

from lego.hub.standalone import AUTO_MAP, STANDALONE, standalone_code
from lego.model.exit_criteria import CRITERIA, STATE_CRITERIA
from lego.model.stack import BLOCK2_CONTEXTS

OF_WEIGHTS = (
    "num_hidden_layers",
    "exit_layer",
    "block2_context",
    "own_head",
    "exit_criterion_width",
    "exit_criterion_reads_logits",
    "gated",
    "branch_layer",
)
"""Fields that the weights were trained with: another value runs, and answers nonsense."""
DEFAULTS = {"branch_layer": None, "gated": False, "exit_criterion_reads_logits": False}
"""Of those that older folders do not have."""


@strict
class LegoConfig(LlamaConfig):
    """Llama's configuration with an exit.

    Args:
        exit_layer: last layer of block 1, from 1.
        exit_threshold: score from which a token leaves at the exit: 0.0 is block 1 alone, above 1 always deep; None
            switches routing off. One number, a tensor's or NumPy's too.
        exit_criterion: max_prob, margin or entropy of the exit's logits, or probe or gain of the exit state.
        exit_criterion_width: hidden width of probe or gain; 0 = linear.
        exit_criterion_reads_logits: gain is told the largest of the exit's logits beside its state.
        block2_context: what a token sees above the exit: sequence, token or full (see DeepSupervisionTransformer).
        branch_layer: layer whose output block 2 begins at; None = exit_layer (see DeepSupervisionTransformer).
        own_head: block 2 has an output head of its own.
        gated: tokens that went deep are answered by a mixture of both exits (see lego.model.gate); not in training.
        trained_context: longest sequence it was trained on; None if that is not known.
        exit_loss_weight: share of the exit in the training loss, in [0, 1]; the full depth has the rest.
        auto_map: classes of the code that lies in the model's folder, as transformers names them.

    Raises:
        ValueError: a value outside its range.
    """

    model_type = "lego"
    keys_to_ignore_at_inference = ["past_key_values", "exit_scores", "went_deep"]  # noqa: RUF012 - by Trainer.predict
    exit_layer: int = 1
    exit_threshold: Any = None
    exit_criterion: str = "max_prob"
    exit_criterion_width: int = 0
    exit_criterion_reads_logits: bool = False
    block2_context: str = "sequence"
    branch_layer: int | None = None
    own_head: bool = False
    gated: bool = False
    trained_context: int | None = None
    exit_loss_weight: Any = 0.5
    auto_map: dict[str, Any] = field(default_factory=dict)  # TRL reads it whether it is set or not

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, as_number(value) if name in ("exit_threshold", "exit_loss_weight") else value)

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        """As in transformers, with the code that loads the model where this package is not installed.

        `save_pretrained` comes by here after it has noted what lies in the folder and before it uploads what is new.
        """
        if (file := Path(json_file_path)).name == CONFIG_NAME:
            self.auto_map = dict(AUTO_MAP)
            (file.parent / STANDALONE).write_text(standalone_code(), encoding="utf-8")
        super().to_json_file(json_file_path, use_diff)

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if not 1 <= self.exit_layer <= self.num_hidden_layers:
            raise ValueError(f"exit_layer must be in 1..{self.num_hidden_layers}, got {self.exit_layer}")
        self.validate_numbers()
        if self.exit_criterion_width < 0:
            raise ValueError(f"exit_criterion_width must be at least 0, got {self.exit_criterion_width}")
        if self.exit_criterion not in CRITERIA:
            raise ValueError(f"exit_criterion must be one of {', '.join(CRITERIA)}, got {self.exit_criterion!r}")
        if self.branch_layer is not None and type(self.branch_layer) is not int:
            raise ValueError(f"branch_layer must be a whole number or null, got {self.branch_layer!r}")
        least = max(0, 2 * self.exit_layer - self.num_hidden_layers)
        if not least <= self.begins_at <= self.exit_layer:
            raise ValueError(f"branch_layer must be in {least}..{self.exit_layer}, got {self.branch_layer}")
        if self.begins_at < self.exit_layer and self.block2_context != "sequence":
            raise ValueError(f"branch_layer needs block2_context sequence, got {self.block2_context!r}")
        if self.block2_context not in BLOCK2_CONTEXTS:
            raise ValueError(f"block2_context must be one of {', '.join(BLOCK2_CONTEXTS)}, got {self.block2_context!r}")

    @property
    def begins_at(self) -> int:
        """Layer whose output block 2 begins at."""
        return self.exit_layer if self.branch_layer is None else self.branch_layer

    def validate_numbers(self) -> None:
        """Checks what users set on a loaded model.

        Raises:
            ValueError: a threshold or weight outside its range.
        """
        threshold, weight = self.exit_threshold, self.exit_loss_weight
        if threshold is not None and not (isinstance(threshold, float) and 0 <= threshold < math.inf):  # NaN is not
            raise ValueError(f"exit_threshold must be None or at least 0.0, got {threshold!r}; give one number")
        if not (isinstance(weight, float) and 0 <= weight <= 1):
            raise ValueError(f"exit_loss_weight must be in [0, 1], got {weight!r}; give one number")


def as_number(value: Any) -> Any:
    """A float for an int, and for what holds one number, such as a tensor or a NumPy scalar; else the value itself."""
    if getattr(value, "size", None) is not None and hasattr(value, "item"):
        count = value.numel() if hasattr(value, "numel") else value.size
        value = value.item() if count == 1 else value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def refuse_other_weights(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses a configuration with which a model's weights would answer nonsense.

    Args:
        saved: fields of its config.json.
        asked: fields that a caller wants, all or a few.

    Raises:
        ValueError: they contradict what was saved.
    """
    for name in (*OF_WEIGHTS, "exit_criterion"):
        before = saved.get(name, DEFAULTS.get(name))
        now = asked.get(name, before)
        if name == "exit_criterion" and not {before, now} & set(STATE_CRITERIA):
            continue  # read from the exit's logits, with which any model can
        if (before is not None or name in DEFAULTS) and now != before:
            raise ValueError(
                f"{name} is {before!r} in this model's weights and cannot be {now!r}; leave {name} as it is saved"
            )
