"""Model folders: config.json with Hugging Face's field names, and model.safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveInt

from lego.base.artifacts import (
    ArtifactError,
    copy_tokenizer,
    read_checked,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from lego.base.digests import verify, way_back
from lego.model.exit_criteria import CRITERIA, LOGIT_CRITERIA, Criterion, StateCriterion, max_prob
from lego.model.gate import Gate
from lego.model.low_rank import folded_state
from lego.model.naming import ROUTED, config_of, from_llama, is_tied, model_of
from lego.model.transformer import BaseTransformer

CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
ROUTING = "routing.json"  # of more than two blocks
INDEX = "model.safetensors.index.json"  # of weights in several files, as transformers splits large ones


def save_model(model: BaseTransformer, folder: str | Path, tokenizer: str | Path | None = None) -> None:
    """Writes a model into an existing folder, with the files of a tokenizer folder beside it.

    Args:
        model: a StandardTransformer or DeepSupervisionTransformer; its generation_config goes with it.
        folder: where config.json and model.safetensors go.
        tokenizer: a folder in Hugging Face format whose files are copied.
    """
    folder = Path(folder)
    tensors = folded_state(model)
    if model.sizes["tie_embeddings"]:
        del tensors["output_head.weight"]  # the same storage as embedding.weight
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, config_of(model))
    if model.generation_config:
        write_json(folder / GENERATION, model.generation_config)
    if tokenizer:
        copy_tokenizer(tokenizer, folder)


def load_model(folder: str | Path) -> BaseTransformer:
    """Reads a model folder written by `save_model`, or by `lego.hf`; `load_routed` also reads how it routes.

    Raises:
        ArtifactError: a file is missing or damaged, or the weights do not fit the config.
    """
    folder = Path(folder)
    config, tensors = read_json(folder / CONFIG), read_weights(folder)
    if (kind := config.get("model_type", "lego")) != "lego":
        what = f"is of model_type {kind}, not lego; to extend a trained Llama set model.init_from"
        raise ArtifactError(f"{folder / CONFIG}: {what}")
    misfit = ArtifactError(f"{folder / WEIGHTS}: does not fit {CONFIG} beside it; {way_back(folder / WEIGHTS)}")
    try:
        if config["num_hidden_layers"] != sum(name.endswith(".input_layernorm.weight") for name in tensors):
            raise misfit
        if config["architectures"] == [ROUTED]:
            tensors = from_llama(tensors, config["num_hidden_layers"], config["exit_layer"])
        config["tie_word_embeddings"] = is_tied(tensors, config["tie_word_embeddings"])
        with torch.device("meta"):  # shapes without memory: a damaged size must not allocate what it says
            shapes = {name: tensor.shape for name, tensor in model_of(config).state_dict().items()}
        if config["tie_word_embeddings"] and "embedding.weight" in tensors:
            tensors["output_head.weight"] = tensors["embedding.weight"]
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise misfit
        model = model_of(config)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        if error is misfit:
            raise
        what = f"describes no model ({str(error).splitlines()[0]})"
        raise ArtifactError(f"{folder / CONFIG}: {what}; {way_back(folder / CONFIG)}") from None
    model.load_state_dict(tensors)
    if (folder / GENERATION).exists():
        found = read_json(folder / GENERATION)
        found.pop("transformers_version", None)  # in folders that transformers wrote
        model.generation_config = found
    return model


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, whether they lie in one file or in several.

    Raises:
        ArtifactError: a file is missing or damaged, or the index names one outside the folder.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return read_tensors(folder / WEIGHTS)
    placed = read_json(folder / INDEX, "weight_map")["weight_map"]
    files: list[Any] = list(placed.values()) if isinstance(placed, dict) else [None]
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise ArtifactError(f"{folder / INDEX}: weight_map must name files of this folder; save the model again")
    return {name: tensor for file in sorted({*files}) for name, tensor in read_tensors(folder / file).items()}


@dataclass(frozen=True)
class RoutedModel:
    """A model with how its tokens are routed: see RoutedDecoder.

    Of more than two blocks also the threshold of each exit but the last, and the gate of each but the first: see
    CascadeDecoder.
    """

    model: BaseTransformer
    threshold: float | None
    criterion: Criterion
    gate: Gate | None = None
    thresholds: list[float] | None = None
    gates: list[Gate] | None = None


class _Routing(BaseModel):
    model_config = ConfigDict(strict=True)
    thresholds: list[Annotated[float, Field(ge=0)]]
    gates: list[Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]] | None


def save_cascade(
    model: BaseTransformer,
    folder: str | Path,
    thresholds: Sequence[float],
    gates: Sequence[Gate] | None,
    tokenizer: str | Path | None = None,
) -> None:
    """Writes a model of any number of blocks and how it routes into an existing folder, for `load_routed`.

    Args:
        model: with two blocks or more.
        folder: see `save_model`.
        thresholds: of each exit but the last, for the criterion max_prob.
        gates: of each exit but the first; None where answers are not mixed.
        tokenizer: see `save_model`.
    """
    save_model(model, folder, tokenizer)
    weights = None if gates is None else [[float(gate.weight), float(gate.bias)] for gate in gates]
    write_json(Path(folder) / ROUTING, {"thresholds": list(thresholds), "gates": weights})


def _load_cascade(folder: Path, model: BaseTransformer) -> RoutedModel:
    found, count = read_checked(folder / ROUTING, _Routing), len(model.blocks)
    thresholds, weights = found["thresholds"], found["gates"]
    if len(thresholds) != count or len(weights or thresholds) != count:
        raise ArtifactError(f"{folder / ROUTING}: must have {count} thresholds, and as many gates or null")
    gates = None if weights is None else [Gate.at(*pair) for pair in weights]
    return RoutedModel(model, thresholds[0], max_prob, None, thresholds, gates)


def load_routed(folder: str | Path) -> RoutedModel:
    """Reads a model folder with its threshold, exit criterion and gate.

    Args:
        folder: written by `lego.hf`, such as data/routed; by `save_cascade`; or by `save_model`, which routes as it was
            mined.

    Raises:
        ArtifactError: see `load_model`, or the criterion or the gate is missing.
    """
    verify(folder)  # the tokenizer too, which is used beside the model
    model, config = load_model(folder), read_json(Path(folder) / CONFIG)
    if (Path(folder) / ROUTING).exists():
        return _load_cascade(Path(folder), model)
    if config["architectures"] != [ROUTED]:
        return RoutedModel(model, getattr(model, "routing_threshold", 0.0) or None, max_prob)
    name, threshold = str(config["exit_criterion"]), config["exit_threshold"]
    if name not in CRITERIA:
        raise ArtifactError(f"{folder}/{CONFIG}: exit_criterion must be one of {', '.join(CRITERIA)}, got {name}")
    if threshold is not None and not (isinstance(threshold, int | float) and 0 <= threshold < float("inf")):
        raise ArtifactError(
            f"{folder}/{CONFIG}: exit_threshold must be null or a number of at least 0, got {threshold}"
        )
    tensors = read_weights(Path(folder))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    gate = Gate.of(part("gate."), Path(folder) / WEIGHTS) if config.get("gated") else None
    if name in LOGIT_CRITERIA:
        return RoutedModel(model, threshold, LOGIT_CRITERIA[name], gate)
    found, reads = part("exit_criterion_module."), bool(config.get("exit_criterion_reads_logits", False))
    scorer = StateCriterion.of(found, model.sizes["dim"], Path(folder) / WEIGHTS, reads)
    return RoutedModel(model, threshold, scorer, gate)


def block1_sha256(model: BaseTransformer) -> str:
    """SHA-256 of the embedding, block 1's layers and the exit's norm: what thresholds of exit scores belong to.

    The head is left out, which `head: shared_trainable` moves.
    """
    digest, k = hashlib.sha256(), model.exit_layer
    modules = [model.embedding, *model.layers[: k - 1], model.layer(k)]
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Exit(BaseModel):
    model_config = ConfigDict(strict=True)
    block1_sha256: str
    threshold: Annotated[float, Field(ge=0, le=1)]
    hard_example_ratio: Annotated[float, Field(gt=0, lt=1)]
    split: Literal["calibration", "validation"]
    fit_tokens: PositiveInt


def load_exit(folder: str | Path, model: BaseTransformer) -> tuple[dict[str, Any], StateCriterion]:
    """What compute_threshold found of block 1's exit: threshold, split, fit_tokens; and the probe.

    Raises:
        ArtifactError: a file is missing or damaged, or it was made for another block 1.
    """
    folder = Path(folder)
    facts = read_checked(folder / "exit.json", _Exit)
    if facts["block1_sha256"] != block1_sha256(model):
        raise ArtifactError(f"{folder}: thresholds of another block 1; run dvc repro compute_threshold")
    return facts, StateCriterion.load(folder / "probe.safetensors", model.sizes["dim"])


def same_block1(block1: BaseTransformer, grown: BaseTransformer) -> bool:
    """Whether the grown model holds block 1, its exit included, bit for bit."""
    inside = grown.state_dict()
    return all(torch.equal(tensor.cpu(), inside[name].cpu()) for name, tensor in block1.state_dict().items())
