"""The routed model in transformers' classes; `lego.hf` registers them.

Block 1 is transformers' own Llama, run as Llama runs it, so that easy tokens have exactly its logits; what is above the
exit is in backbone.py.

Shapes: B sequences, Q new tokens, K of them with logits, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging

from lego.hub.backbone import LegoModel, LegoPreTrainedModel, as_tuple, with_attentions
from lego.hub.blocks import ManyBlocks
from lego.hub.calibration import each_batch, threshold_at
from lego.hub.configuration import LegoConfig
from lego.hub.llama_layers import Reading
from lego.model.exit_criteria import CRITERIA, LOGIT_CRITERIA, STATE_CRITERIA, StateCriterion
from lego.model.gate import Gate

logger = logging.get_logger(__name__)


@dataclass
class LegoOutput(CausalLMOutputWithPast):
    """Llama's output, with the score (B, K) and depth (B, K) of each token that has logits; None if all went deep."""

    exit_scores: Tensor | None = None
    went_deep: Tensor | None = None


class LegoForCausalLM(ManyBlocks, LegoPreTrainedModel, GenerationMixin):
    """A Llama with an exit: easy tokens leave there, hard tokens take the full depth.

    With `labels`, and in training, every token takes the full depth. The loss is its cross-entropy; in training the
    exit's has a share in it, so that fine-tuning does not leave the exit behind.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers has it
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: LegoConfig) -> None:
        super().__init__(config)
        self.model = LegoModel(config)
        self.exit_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.deep_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.own_head else None
        self.exit_criterion_module = None
        if config.exit_criterion in STATE_CRITERIA:
            reads = config.exit_criterion_reads_logits
            self.exit_criterion_module = StateCriterion(config.hidden_size, config.exit_criterion_width, reads)
        self.gate = Gate() if config.gated else None
        fitted = {"exit_criterion_module": self.exit_criterion_module, "gate": self.gate}
        # read as regular expressions that are searched for: "gate" alone would also mean every layer's gate_proj
        self._keep_in_fp32_modules_strict = {rf"^{name}\." for name, module in fitted.items() if module is not None}
        self.post_init()
        self.freeze_unread()

    @with_attentions
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> LegoOutput | tuple[Tensor, ...]:
        """As LlamaForCausalLM.forward; hidden states and attentions of tokens that left: see `Watched`.

        Raises:
            ValueError: see LegoModel.begin; or a routed model is to be exported, whose path depends on the tokens.
        """
        self._require_valid()
        exits, reading = self.model.begin(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs
        )
        every = torch.arange(exits.shape[1], device=exits.device)
        kept = every
        if isinstance(logits_to_keep, Tensor):
            kept = every[logits_to_keep]
        elif logits_to_keep:
            kept = every[-logits_to_keep:]
        everything = labels is not None or self.training or self.config.exit_threshold is None
        watching = reading.watched.anything  # then all tokens are routed
        logits, score, deep, last = self._read(exits, every if watching else kept, reading, everything)
        if watching:
            logits = logits[:, kept]
            score, deep = (None if part is None else part[:, kept] for part in (score, deep))
        states, attentions = reading.watched.outputs(last)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if self.training:
            loss, logits = self._with_exit(exits[:, kept], loss, logits, labels, kwargs)
        output = LegoOutput(loss, logits, reading.cache, states, attentions, score, deep)
        return output.to_tuple() if as_tuple(self.config, return_dict) else output

    def _read(
        self, h: Tensor, kept: Tensor, reading: Reading, everything: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Logits (B, K, V) of the tokens at `kept` (K,), each from its depth, with scores, depths and normed states."""
        gate = None if self.training else self.gate
        if everything:
            last = self.model.norm(self.model.above(h, kept, None, reading))
            deep_logits = (self.deep_head or self.lm_head)(last)
            if gate is not None:
                deep_logits = gate.mixed(self.lm_head(self.exit_norm(h[:, kept])), deep_logits).to(last.dtype)
            return deep_logits, None, None, last
        exits = h[:, kept]  # (B, K, D)
        normed = self.exit_norm(exits)
        score, logits = self._scores(exits, normed)
        deep = score < self.config.exit_threshold  # (B, K)
        states = self.model.above(h, kept, deep, reading)
        if logits is None and gate is not None:  # every token needs the exit's head then
            logits = self.lm_head(normed)
        if logits is None:
            logits = self._logits_of_both(normed, deep, states)
        elif deep.any():
            answers = self._deep_logits(states)
            logits[deep] = answers if gate is None else gate.mixed(logits[deep], answers).to(logits.dtype)
        if reading.watched.states is not None:
            normed = normed.clone()
            normed[deep] = self.model.norm(states)
        return logits, score, deep, normed

    def _scores(self, exits: Tensor, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (B, K) of exit states (B, K, D), and the exit's logits (B, K, V) where the criterion reads them."""
        fitted = self.exit_criterion_module
        if fitted is not None and not fitted.needs_logits:
            return fitted(exits), None
        logits = self.lm_head(normed)
        return (fitted or LOGIT_CRITERIA[self.config.exit_criterion])(exits, logits), logits

    def _logits_of_both(self, normed: Tensor, deep: Tensor, states: Tensor) -> Tensor:
        """Logits (B, K, V), one head a token: of exits (B, K, D), and of deep states (n, D) where deep (B, K).

        A shared head is evaluated on all rows at once, as the original's: with fewer rows it would round otherwise.
        """
        if self.deep_head is None:
            normed[deep] = self.model.norm(states)
            return self.lm_head(normed)
        easy = self.lm_head(normed[~deep])
        logits = easy.new_empty(*deep.shape, easy.shape[-1])
        logits[~deep], logits[deep] = easy, self._deep_logits(states)
        return logits

    def _deep_logits(self, h: Tensor) -> Tensor:
        return (self.deep_head or self.lm_head)(self.model.norm(h))

    def _with_exit(
        self, exits: Tensor, loss: Tensor | None, logits: Tensor, labels: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor]:
        """The loss with the exit's share, for exit states (B, K, D); without labels nothing teaches the exit."""
        weight, own = self.config.exit_loss_weight, (self.exit_norm.weight, self.lm_head.weight)
        if loss is not None and weight and (exits.requires_grad or any(w.requires_grad for w in own)):
            exit_logits = self.lm_head(self.exit_norm(exits))
            shallow = self.loss_function(logits=exit_logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            return (1 - weight) * loss + weight * shallow, logits
        if loss is None and any(w.requires_grad for w in own):
            logger.warning_once(
                "training without labels teaches the full depth alone and leaves the exit behind, where tokens leave; "
                "give labels, or call model.freeze_block1() first"
            )
        # nothing is added, but the exit's weights get a gradient: distributed training waits for one of each
        nothing = sum(0.0 * w.sum() for w in own if w.requires_grad)
        if self.config.begins_at < self.config.exit_layer and exits.requires_grad:  # nor may block 2 read exit states
            nothing = nothing + 0.0 * exits.sum()
        return None if loss is None else loss + nothing, logits + nothing

    def _require_valid(self) -> None:
        """Users set thresholds on a loaded model."""
        threshold, criterion = self.config.exit_threshold, self.config.exit_criterion
        self.config.validate_numbers()
        if criterion not in CRITERIA:
            raise ValueError(f"exit_criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
        if (criterion in STATE_CRITERIA) != (self.exit_criterion_module is not None):
            if criterion in STATE_CRITERIA:
                raise ValueError(f"exit_criterion {criterion} needs a model that was saved with it")
            raise ValueError(f"exit_criterion must be probe or gain in a model that was saved with it, got {criterion}")
        if threshold is not None and getattr(torch.compiler, "is_exporting", lambda: False)():
            raise ValueError(
                "a routed model cannot be exported: which layers run depends on the tokens; set "
                "model.config.exit_threshold = None first, which exports the full depth"
            )

    @torch.no_grad()
    def calibrate(self, batches: Tensor | Mapping[str, Any] | Iterable[Any], deep_share: float) -> float:
        """Sets `config.exit_threshold` so that a share of the tokens of a text goes deep, and returns it.

        Args:
            batches: token ids (B, T), a tokenizer's output, or several of either, such as a DataLoader; what its
                attention_mask hides is left out.
            deep_share: share of tokens that takes the full depth, in [0, 1].

        Raises:
            ValueError: there is no token, or a share outside its range.
        """
        self._require_valid()
        training, scores = self.training, []
        self.eval()
        try:
            for ids, mask in each_batch(batches):
                ids, mask = ids.to(self.device), None if mask is None else mask.to(self.device)
                nothing = {"output_attentions": False, "output_hidden_states": False}
                exits, _ = self.model.begin(ids, mask, None, None, None, False, nothing)
                score, _ = self._scores(exits, self.exit_norm(exits))  # (B, T)
                scores.append((score.flatten() if mask is None else score[mask.bool()]).float().cpu())
        finally:
            self.train(training)
        self.config.exit_threshold = threshold_at(scores, deep_share)
        return self.config.exit_threshold

    def freeze_block1(self) -> None:
        """Leaves embedding, block 1, its exit and its head as they are: training then moves block 2 alone."""
        block1 = [self.model.embed_tokens, *self.model.layers[: self.config.exit_layer], self.exit_norm, self.lm_head]
        for module in block1:
            module.requires_grad_(False)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: assistant_early_exit is asked for; lego.generate.generate_lossless is this model's own drafting.
        """
        if kwargs.get("assistant_early_exit") is not None:
            raise ValueError(
                "assistant_early_exit is not supported; lego.generate.generate_lossless drafts with block 1"
            )
        return super().generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as continuous batching is in every form.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching is not supported, since above the exit each query has its own mask; use generate "
            "with prompts padded on the left"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; block 2's own head is resized too."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.deep_head is not None and len(self.deep_head.weight) != len(embedding.weight):
            self.deep_head = self._get_resized_lm_head(self.deep_head, len(embedding.weight))
        return embedding
