"""The routed model in transformers' classes; `lego.hf` registers them.

Block 1 is transformers' own Llama, run as Llama runs it, so that easy tokens have exactly its logits. Above the exit,
keys and values come from the exit states (ashem section 5, kv_source exit): only tokens whose logits are asked for
and that are hard are computed there.

Shapes: B sequences, Q new tokens, K of them with logits, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel, LlamaRMSNorm

from lego.hub.configuration import LegoConfig
from lego.hub.llama_layers import Reading, alone, over_exits, whole
from lego.model.exit_criteria import LOGIT_CRITERIA, STATE_CRITERIA, StateCriterion


@dataclass
class LegoOutput(CausalLMOutputWithPast):
    """Llama's output, with the score (B, K) and depth (B, K) of each token that has logits; None if all went deep."""

    exit_scores: Tensor | None = None
    went_deep: Tensor | None = None


class LegoForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """A Llama with an exit: easy tokens leave there, hard tokens take the full depth.

    With `labels`, and in training, every token takes the full depth, and the loss is its cross-entropy.
    """

    config_class = LegoConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers has it
    _keep_in_fp32_modules_strict = {"exit_criterion_module"}  # noqa: RUF012
    _supports_flash_attn = False  # above the exit each query has its own mask
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    def __init__(self, config: LegoConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.exit_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.deep_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if config.own_head else None
        reads_state = config.exit_criterion in STATE_CRITERIA
        self.exit_criterion_module = (
            StateCriterion(config.hidden_size, config.exit_criterion_width) if reads_state else None
        )
        self.post_init()

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
        """As LlamaForCausalLM.forward, without hidden states and attentions: tokens differ in their depth.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, or the configuration was changed to one that
                cannot be.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.pop("output_hidden_states", False) or kwargs.pop("output_attentions", False):
            raise ValueError("hidden states and attentions are not returned: tokens differ in their depth")
        self._require_valid()
        h = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        seen = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(h.shape[1], device=h.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.model.rotary_emb(h, position_ids=position_ids)
        reading = Reading(mask, rotary, past_key_values, seen, self.config._attn_implementation, kwargs)
        for layer in self.model.layers[: self.config.exit_layer]:
            h = whole(layer, h, reading)  # (B, Q, D)
        kept = torch.arange(h.shape[1], device=h.device)
        if isinstance(logits_to_keep, Tensor):
            kept = kept[logits_to_keep]
        elif logits_to_keep:
            kept = kept[-logits_to_keep:]
        everything = labels is not None or self.training or self.config.exit_threshold is None
        logits, score, deep = self._read(h, kept, reading, everything)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = LegoOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, exit_scores=score, went_deep=deep
        )
        plain = return_dict is False or (return_dict is None and not self.config.return_dict)
        return output.to_tuple() if plain else output

    def _read(
        self, h: Tensor, kept: Tensor, reading: Reading, everything: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits (B, K, V) of the tokens at `kept` (K,), each from its depth, with scores and depths."""
        if everything:
            return self._deep_logits(self._above(h, kept, None, reading)), None, None
        exits = h[:, kept]  # (B, K, D)
        normed = self.exit_norm(exits)
        if self.exit_criterion_module is None:
            logits = self.lm_head(normed)
            score = LOGIT_CRITERIA[self.config.exit_criterion](exits, logits)
            deep = score < self.config.exit_threshold  # (B, K)
        else:
            logits, score = None, self.exit_criterion_module(exits)
            deep = score < self.config.exit_threshold
        states = self._above(h, kept, deep, reading)
        if logits is None:
            logits = self._logits_of_both(normed, deep, states)
        elif deep.any():
            logits[deep] = self._deep_logits(states)
        return logits, score, deep

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

    def _above(self, exits: Tensor, kept: Tensor, deep: Tensor | None, reading: Reading) -> Tensor:
        """States of the kept tokens (B, K, D) above block 2, or (n, D) of those marked in deep (B, K).

        Every layer's cache takes in every token.
        """
        layers, context = self.model.layers[self.config.exit_layer :], self.config.block2_context
        if context == "sequence":
            return self._over_exit_states(exits, kept, deep, reading)
        if context == "token":
            x = exits[:, kept] if deep is None else exits[:, kept][deep]
            for layer in layers:
                if self.training and layer.gradient_checkpointing:
                    x = layer._gradient_checkpointing_func(alone, layer, x)
                else:
                    x = alone(layer, x)
            return x
        h = exits
        for layer in layers:
            h = whole(layer, h, reading)
        return h[:, kept] if deep is None else h[:, kept][deep]

    def _over_exit_states(self, exits: Tensor, kept: Tensor, deep: Tensor | None, reading: Reading) -> Tensor:
        if deep is None:
            rows, taken = kept.expand(len(exits), -1), None  # (B, K)
        else:
            counts = deep.sum(dim=1)
            order = deep.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
            rows = kept[order]  # (B, H), H the longest count
            taken = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
        x = exits.gather(1, rows.unsqueeze(-1).expand(-1, -1, exits.shape[-1]))  # (B, H, D)
        mask, rotary = reading.mask, reading.rotary_of(rows)
        if deep is not None or len(kept) < exits.shape[1]:
            mask = reading.mask_of(rows)
        for layer in self.model.layers[self.config.exit_layer :]:
            if self.training and layer.gradient_checkpointing:
                x = layer._gradient_checkpointing_func(over_exits, layer, x, exits, mask, rotary, reading)
            else:
                x = over_exits(layer, x, exits, mask, rotary, reading)
        return x if taken is None else x[taken]

    def _require_valid(self) -> None:
        """Users set thresholds on a loaded model."""
        threshold, criterion = self.config.exit_threshold, self.config.exit_criterion
        if threshold is not None and not (isinstance(threshold, int | float) and threshold >= 0):  # NaN is not
            raise ValueError(f"exit_threshold must be None or at least 0.0, got {threshold}")
        if (criterion in STATE_CRITERIA) != (self.exit_criterion_module is not None):
            raise ValueError(f"exit_criterion {criterion} needs a model that was saved with it")

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

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; block 2's own head is resized too."""
        embedding = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if self.deep_head is not None and len(self.deep_head.weight) != len(embedding.weight):
            self.deep_head = self._get_resized_lm_head(self.deep_head, len(embedding.weight))
        return embedding
