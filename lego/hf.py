"""The routed model for transformers: after `import lego.hf`, AutoModelForCausalLM reads its folders."""

from lego.hub.export import LegoConfig, LegoForCausalLM, LegoModel, LegoOutput, model_card, save_routed, to_hf

__all__ = ["LegoConfig", "LegoForCausalLM", "LegoModel", "LegoOutput", "model_card", "save_routed", "to_hf"]
