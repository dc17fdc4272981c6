"""Heads for other tasks on a routed model's layers, as transformers puts them on Llama's: always at full depth."""

from __future__ import annotations

from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from lego.hub.backbone import LegoPreTrainedModel


class LegoForSequenceClassification(GenericForSequenceClassification, LegoPreTrainedModel):
    """A score a sequence; reward models are such."""


class LegoForTokenClassification(GenericForTokenClassification, LegoPreTrainedModel):
    """A label a token."""


class LegoForQuestionAnswering(GenericForQuestionAnswering, LegoPreTrainedModel):
    """Where an answer begins and ends."""

    base_model_prefix = "model"
