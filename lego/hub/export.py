"""The routed model for transformers: after `import lego.hf`, AutoModelForCausalLM reads its folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lego.base.artifacts import copy_tokenizer, read_json, write_json, write_text
from lego.hub.backbone import LegoModel
from lego.hub.configuration import LegoConfig
from lego.hub.heads import LegoForQuestionAnswering, LegoForSequenceClassification, LegoForTokenClassification
from lego.hub.modeling import LegoForCausalLM, LegoOutput
from lego.hub.standalone import STANDALONE
from lego.model.exit_criteria import STATE_CRITERIA, StateCriterion
from lego.model.gate import Gate
from lego.model.low_rank import folded_state
from lego.model.naming import TOKEN_IDS, config_of, to_llama
from lego.model.transformer import DeepSupervisionTransformer

CARD_KEYS = ("ppl", "shallow_ppl", "deep_ppl", "bits_per_byte", "acc", "shallow_ratio", "flops_ratio")

__all__ = ["LegoConfig", "LegoForCausalLM", "LegoModel", "LegoOutput", "model_card", "save_routed", "to_hf"]


def to_hf(
    model: DeepSupervisionTransformer,
    threshold: float | None,
    criterion: str = "max_prob",
    scorer: StateCriterion | None = None,
    gate: Gate | None = None,
    **fields: Any,
) -> LegoForCausalLM:
    """The same model with its routing as a transformers model, in float32.

    Args:
        model: with two blocks.
        threshold: as LegoConfig.exit_threshold.
        criterion: as LegoConfig.exit_criterion.
        scorer: the fitted criterion where it is probe or gain.
        gate: mixes both exits in the answers of tokens that went deep.
        **fields: further fields of the configuration, such as eos_token_id; what they leave open of where it stops
            and how it samples is as the model's generation_config says.

    Raises:
        ValueError: a fitted criterion is missing, or the model has more than two blocks.
    """
    if criterion in STATE_CRITERIA and scorer is None:
        raise ValueError(f"exit_criterion {criterion} needs its fitted weights")
    if len(model.blocks) > 1:
        raise ValueError(f"transformers' classes have two blocks so far, the model has {len(model.blocks) + 1}")
    known = config_of(model)
    if known["trained_context"]:
        known["max_position_embeddings"] = known["trained_context"]
    for field in ("architectures", "model_type", "routing_threshold"):
        del known[field]
    given = model.generation_config
    fields = {name: given.get(name) for name in TOKEN_IDS} | fields  # Llama's own defaults are another vocabulary's
    routing: dict[str, Any] = {"exit_threshold": threshold, "exit_criterion": criterion}
    if scorer is not None:
        reads = scorer.needs_logits
        routing |= {"exit_criterion_width": scorer.width, "exit_criterion_reads_logits": reads}
    config = LegoConfig(**known | fields, **routing, gated=gate is not None)
    converted = LegoForCausalLM(config)
    converted.generation_config.update(**given | {name: fields[name] for name in TOKEN_IDS})
    tensors = to_llama(folded_state(model), model.num_layers, model.exit_layer)
    if scorer is not None and converted.exit_criterion_module is not None:
        tensors |= {f"exit_criterion_module.{name}": tensor for name, tensor in scorer.state_dict().items()}
    if gate is not None:
        tensors |= {f"gate.{name}": tensor for name, tensor in gate.state_dict().items()}
    converted.load_state_dict({name: tensor.cpu() for name, tensor in tensors.items()})
    return converted.eval()


def model_card(model: LegoForCausalLM, metrics: Mapping[str, Any]) -> str:
    """README.md of a model folder: what it is, how it is loaded, what was measured on test text.

    Args:
        model: with its routing.
        metrics: as in metrics/details/ashem.json.
    """
    config = model.config
    threshold = "none: always deep" if config.exit_threshold is None else f"{config.exit_threshold:.6g}"
    rows = "".join(f"| {key} | {metrics[key]:.4f} |\n" for key in CARD_KEYS if metrics.get(key) is not None)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [lego, early-exit]
---

# A language model with an exit

{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}. After layer
{config.exit_layer} a token whose exit score ({config.exit_criterion}) is at least the threshold
({threshold}) leaves; the others take the full depth. Block 2 learned from the tokens that block 1
found hard (ASHEM).

With the package lego installed:

```python
import lego.hf  # registers the classes
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("data/routed")
tokenizer = AutoTokenizer.from_pretrained("data/routed")
```

Without it, with transformers 5 alone: the folder brings its code, {STANDALONE}, which then runs.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("data/routed", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("data/routed", trust_remote_code=True)
```

Either way:

```python
print(tokenizer.decode(model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=64)[0]))
model.config.exit_threshold = None  # always deep; 0.0 is block 1 alone
model.calibrate(tokenizer("some text", return_tensors="pt"), deep_share=0.5)  # half of such text goes deep
```

| on test text | |
|---|---|
{rows}"""


def save_routed(model: LegoForCausalLM, folder: str | Path, tokenizer: str | Path, card: str) -> None:
    """Writes what users load into an existing folder: model, generation settings, tokenizer and model card.

    Args:
        model: its generation_config is written too.
        folder: for `AutoModelForCausalLM.from_pretrained` after `import lego.hf`, and for `lego.load_routed`.
        tokenizer: a folder in Hugging Face format; a model that lies in it is not copied.
        card: text of README.md.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(folder)
    model.save_pretrained(str(folder))
    copy_tokenizer(tokenizer, folder)
    _complete_tokenizer(folder / "tokenizer_config.json", model.config.trained_context)
    write_text(folder / "README.md", card)


def _complete_tokenizer(file: Path, context: int | None) -> None:
    """Lets a tokenizer pad, with end-of-text where it has nothing else, and know the trained context."""
    if file.exists():
        settings = read_json(file)
        if settings.get("pad_token") is None and settings.get("eos_token") is not None:
            settings["pad_token"] = settings["eos_token"]
        if context is not None:
            settings["model_max_length"] = context
        write_json(file, settings)


AutoConfig.register("lego", LegoConfig)
AutoModel.register(LegoConfig, LegoModel)
AutoModelForCausalLM.register(LegoConfig, LegoForCausalLM)
AutoModelForSequenceClassification.register(LegoConfig, LegoForSequenceClassification)
AutoModelForTokenClassification.register(LegoConfig, LegoForTokenClassification)
AutoModelForQuestionAnswering.register(LegoConfig, LegoForQuestionAnswering)
