"""A routed model without its heads, in transformers' classes: block 1 as Llama runs it, and block 2 above it.

Above the exit, keys and values come from the exit states (ashem section 5, kv_source exit), those of branch layers from
block 1 (section 8): only tokens whose states are asked for and that are hard are computed there.

Shapes: B sequences, Q new tokens, K of them whose states are asked for, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lego.hub.configuration import OF_WEIGHTS, LegoConfig, refuse_other_weights
from lego.hub.llama_layers import Reading, Watched, alone, over_block1, over_exits, repeated, whole

Forward = TypeVar("Forward", bound=Callable[..., Any])
OF_LAYERS = re.compile(r"(^|\.)layers\.\d")
NEEDED = re.compile(rf"{OF_LAYERS.pattern}|^gate\.|^exit_criterion_module\.")  # weights that no model begins without
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def asked_for(name: str, config: LegoConfig, kwargs: dict[str, Any]) -> Any:
    """What forward's arguments say of an output, or else the configuration."""
    return getattr(config, name, False) if kwargs.get(name) is None else kwargs[name]


def with_attentions(forward: Forward) -> Forward:
    """Runs a forward that is asked for attentions in eager attention: no other has them."""

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.config._attn_implementation
        if before == "eager" or not asked_for("output_attentions", self.config, kwargs):
            return forward(self, *args, **kwargs)
        self.config._attn_implementation = "eager"
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.config._attn_implementation = before

    return run  # type: ignore[return-value]


class LegoPreTrainedModel(LlamaPreTrainedModel):
    """What all routed models share: what they support, and that saved weights keep their configuration."""

    config_class = LegoConfig
    _supports_flash_attn = False  # above the exit each query has its own mask
    _supports_flex_attn = False
    _can_compile_fullgraph = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: a field is asked for with which the saved weights cannot run.
        """
        asked = kwargs if config is None else vars(config) if isinstance(config, LegoConfig) else {}
        if pretrained_model_name_or_path is not None and asked:
            where = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
            saved, _ = LegoConfig.get_config_dict(pretrained_model_name_or_path, **where)
            if saved.get("model_type") == "lego":
                refuse_other_weights(saved, asked)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, config=config, output_loading_info=True, **kwargs
        )
        lacking = [name for name in info["missing_keys"] if NEEDED.search(name)]
        if wrong := sorted(lacking + [name for name in info["unexpected_keys"] if OF_LAYERS.search(name)]):
            raise ValueError(
                f"{pretrained_model_name_or_path}: {wrong[0]} is in its weights and not in its config.json, or the "
                "other way round; take both from where the model was saved"
            )
        model.freeze_unread()  # reading makes every weight a trained one
        return (model, info) if wants_info else model

    def freeze_unread(self) -> None:
        """Takes the weights that no loss reaches out of training: distributed training would wait for them."""
        model = self.base_model
        if self.config.block2_context == "token":  # attention over one key asks for neither query nor key
            for layer in model.layers[self.config.exit_layer :]:
                layer.self_attn.q_proj.requires_grad_(False)
                layer.self_attn.k_proj.requires_grad_(False)
        for name in ("exit_criterion_module", "gate"):
            if getattr(self, name, None) is not None:
                getattr(self, name).requires_grad_(False)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers; weights of an earlier save in another number of files, which could be read first, go."""
        before = _written(folder := Path(save_directory))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process and None not in (after := _written(folder)).values():
            for file, when in after.items():
                if when == before[file]:
                    file.unlink()


def _written(folder: Path) -> dict[Path, int | None]:
    """When a folder's weights, and the list of them where they lie in several files, were written."""
    files = (folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME)
    return {file: file.stat().st_mtime_ns if file.exists() else None for file in files}


class LegoModel(LegoPreTrainedModel, LlamaModel):
    """The layers without a head. Called by itself it takes every token to the full depth: exits need a head."""

    _keys_to_ignore_on_load_unexpected = ("^exit_norm", "^deep_head", "^exit_criterion_module", "^gate")

    def __init__(self, config: LegoConfig) -> None:
        super().__init__(config)
        for layer in self.layers[config.exit_layer : 2 * config.exit_layer - config.begins_at]:
            del layer.self_attn.k_proj, layer.self_attn.v_proj  # it runs on those of the layer that it repeats
        self.built = {name: getattr(config, name) for name in OF_WEIGHTS}
        self.freeze_unread()

    @with_attentions
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """As LlamaModel.forward: full-depth states (B, Q, D), normed; raises as `begin`."""
        exits, reading = self.begin(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs
        )
        h = self.norm(self.above(exits, torch.arange(exits.shape[1], device=exits.device), None, reading))
        states, attentions = reading.watched.outputs(h)
        output = BaseModelOutputWithPast(h, reading.cache, states, attentions)
        return output.to_tuple() if as_tuple(self.config, return_dict) else output

    def begin(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Reading]:
        """Exit states (B, Q, D) of the new tokens, and what the layers above them are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as in LlamaModel.
            kwargs: further arguments of forward.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, or the configuration was changed to one that
                cannot be.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        refuse_other_weights(self.built, vars(self.config))
        watched = self._asked(kwargs)
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
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
        rotary = self.rotary_emb(h, position_ids=position_ids)
        reading = Reading(mask, rotary, past_key_values, seen, self.config._attn_implementation, watched, kwargs)
        watched.add_state(h)
        for number, layer in enumerate(self.layers[: self.config.exit_layer], 1):
            run = repeated if number > self.config.begins_at else whole
            h = run(layer, h, reading)  # (B, Q, D)
            watched.add_state(h)
        return h, reading

    def _asked(self, kwargs: dict[str, Any]) -> Watched:
        """Takes `output_hidden_states` and `output_attentions` out of forward's arguments, or from the config."""
        asked = {}
        for name in ("output_hidden_states", "output_attentions"):
            asked[name] = asked_for(name, self.config, kwargs)
            kwargs.pop(name, None)
        states, chosen = asked["output_hidden_states"], None
        if not isinstance(states, bool | None):  # newer transformers: numbers of states
            chosen = (states,) if isinstance(states, int) else tuple(states)
        return Watched([] if states else None, [] if asked["output_attentions"] else None, chosen)

    def above(self, exits: Tensor, kept: Tensor, deep: Tensor | None, reading: Reading) -> Tensor:
        """States of the kept tokens (B, K, D) above block 2, or (n, D) of those marked in deep (B, K).

        Every layer's cache takes in every token. Who watches keeps all tokens.
        """
        layers, context, watched = self.layers[self.config.exit_layer :], self.config.block2_context, reading.watched
        if context == "sequence":
            return self._over_exit_states(exits, kept, deep, reading)
        if context == "token":
            x = exits[:, kept] if deep is None else exits[:, kept][deep]
            for layer in layers:
                if self.training and layer.gradient_checkpointing:
                    x = layer._gradient_checkpointing_func(alone, layer, x)
                else:
                    x = alone(layer, x)
                watched.add_above(exits, deep, x)
                if watched.attentions is not None:
                    own = reading.own_weights()
                    watched.add_weights(deep, own if deep is None else own.transpose(1, 2)[deep])
            return x
        h = exits
        for layer in layers:
            h = whole(layer, h, reading)
            watched.add_above(exits, deep, h if deep is None or not watched.anything else h[deep])
            if watched.attentions is not None and deep is not None:  # the layer has put all tokens' there
                watched.add_weights(deep, watched.attentions.pop().transpose(1, 2)[deep])
        return h[:, kept] if deep is None else h[:, kept][deep]

    def _over_exit_states(self, exits: Tensor, kept: Tensor, deep: Tensor | None, reading: Reading) -> Tensor:
        if deep is None:
            rows, taken = kept.expand(exits.shape[0], -1), None  # (B, K)
        else:
            counts = deep.sum(dim=1)
            order = deep.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
            rows = kept[order]  # (B, H), H the longest count
            taken = torch.arange(rows.shape[1], device=rows.device) < counts[:, None]
        start = reading.below[0][0] if reading.below else exits
        x = start.gather(1, rows.unsqueeze(-1).expand(-1, -1, exits.shape[-1]))  # (B, H, D)
        mask, rotary = reading.mask, reading.rotary_of(rows)
        if deep is not None or kept.shape[0] < exits.shape[1]:
            mask = reading.mask_of(rows)
        k, branches = self.config.exit_layer, len(reading.below)
        for number, layer in enumerate(self.layers[k:]):
            run: Callable[..., tuple[Tensor, Tensor | None]] = over_exits
            source: tuple[Any, ...] = (exits,)
            if number < branches:
                below, found = reading.below[number]
                run, source = over_block1, (below, self.layers[k - branches + number], found)
            if self.training and layer.gradient_checkpointing:
                x, weights = layer._gradient_checkpointing_func(run, layer, x, *source, mask, rotary, reading)
            else:
                x, weights = run(layer, x, *source, mask, rotary, reading)
            reading.watched.add_above(exits, deep, x if taken is None else x[taken])
            if weights is not None and taken is not None:
                weights = weights.transpose(1, 2)[taken]  # (n, heads, S)
            reading.watched.add_weights(deep, weights)
        return x if taken is None else x[taken]


def as_tuple(config: LegoConfig, return_dict: bool | None) -> bool:
    return return_dict is False or (return_dict is None and not config.return_dict)
