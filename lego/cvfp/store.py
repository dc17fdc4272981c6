"""Networks from parameters, from plain state dicts, and in folders that stages hand each other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lego.base.artifacts import ArtifactError, read_json, read_tensors, write_json, write_tensors
from lego.base.digests import way_back
from lego.base.given import require_inside
from lego.cvfp.model import NewLLMResidual, Reader
from lego.cvfp.sections import CvfpParams, ModelParams, Phase1Params

GPT2 = "gpt2"  # its name on the hub
READER = "reader.safetensors"


class EmbeddingError(ArtifactError):
    """An embedding that cannot be loaded or does not fit; nothing else is put in its place."""


def build(model: ModelParams, phase1: Phase1Params, vocab_size: int, seed: int) -> NewLLMResidual:
    """A network with the parameters' sizes, initialized from a seed, its embedding as `model.embedding` says.

    Raises:
        EmbeddingError: the embedding cannot be loaded or is of another size.
    """
    torch.manual_seed(seed)
    network = bare(model, phase1, vocab_size)
    if model.embedding != "random_frozen":
        matrix = embedding_matrix(model.embedding_from or GPT2)
        if matrix.shape[1] != model.embed_dim or len(matrix) < vocab_size:
            raise EmbeddingError(
                f"stages/cvfp/params.yaml: model.embedding {model.embedding} is {tuple(matrix.shape)}, but the "
                f"tokenizer has {vocab_size} ids and model.embed_dim is {model.embed_dim}"
            )
        with torch.no_grad():
            network.token_embedding.weight.copy_(matrix[:vocab_size])
    return network


def bare(model: ModelParams, phase1: Phase1Params, vocab_size: int) -> NewLLMResidual:
    """A network with the parameters' sizes and nothing loaded."""
    return NewLLMResidual(**_arguments(model, phase1), vocab_size=vocab_size)


def _arguments(model: ModelParams, phase1: Phase1Params) -> dict[str, Any]:
    left_out = {"embedding", "embedding_from", "train_embedding"}
    of_phase1 = {key: getattr(phase1, key) for key in ("diversity", "normalize", "ema_momentum")}
    if phase1.objective == "predict":  # which keeps no statistics
        of_phase1["diversity"] = "none"
    return model.model_dump(exclude=left_out) | of_phase1


def embedding_matrix(name: str) -> Tensor:
    """The embedding matrix (V, e) of a model on the hub or in a folder, or the one matrix of a folder's safetensors.

    Raises:
        EmbeddingError: it cannot be loaded; a random one is used only where model.embedding is random_frozen.
    """
    folder = Path(name)
    try:
        if folder.is_dir() and not (folder / "config.json").exists():
            matrices = [
                tensor.float()
                for file in sorted(folder.glob("*.safetensors"))
                for tensor in read_tensors(file).values()
                if tensor.dim() == 2
            ]
            if len(matrices) != 1:
                raise EmbeddingError(f"it holds {len(matrices)} matrices and no config.json that says which it is")
            return matrices[0]
        from transformers import AutoModel

        require_inside(folder)
        model, told = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
        rows = model.get_input_embeddings().weight
        own = next(key for key, parameter in model.named_parameters() if parameter is rows)
        if own in told["missing_keys"]:  # transformers would have made it up
            raise EmbeddingError(f"its weights lack {own}")
        return rows.detach().float()
    except Exception as error:  # transformers raises many kinds; each means the same to the user
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise EmbeddingError(
            f"stages/cvfp/params.yaml: model.embedding {name} cannot be loaded ({reason}); name a folder in "
            "model.embedding_from, or set model.embedding: random_frozen"
        ) from None


def from_weights(weights: dict[str, Tensor], settings: CvfpParams) -> NewLLMResidual:
    """A network with given weights, named as `lego.cvfp.model` says; sizes follow from them.

    Args:
        weights: state dict of plain tensors; head (0) and statistics may be missing.
        settings: what the weights do not say: mix, update, losses.

    Raises:
        ArtifactError: a name is unknown or missing, or a shape does not fit.
    """
    try:
        vocab_size, embed_dim = weights["token_embedding.weight"].shape
        hidden_dim = weights["blocks.0.layers.0.fnn.weight"].shape[0]
    except KeyError as error:
        raise ArtifactError(f"the weights lack {error.args[0]}; lego.cvfp.model lists the names") from None
    sizes = {
        "context_dim": hidden_dim - embed_dim,
        "embed_dim": embed_dim,
        "hidden_dim": hidden_dim,
        "layer_structure": _structure(weights, "blocks"),
        "token_structure": _structure(weights, "token_blocks"),
    }
    network = NewLLMResidual(**_arguments(settings.model, settings.phase1) | sizes, vocab_size=vocab_size)
    own = network.state_dict()
    optional = {name: own[name] for name in own if name.startswith("token_output.") or ".statistics." in name}
    try:
        network.load_state_dict(optional | weights)
    except RuntimeError as error:
        raise ArtifactError(f"the weights do not fit: {' '.join(str(error).split())}") from None
    return network


def _structure(weights: dict[str, Tensor], blocks: str) -> list[int]:
    pattern = re.compile(rf"{blocks}\.(\d+)\.layers\.(\d+)\.")
    numbers = sorted({(int(found[1]), int(found[2])) for name in weights if (found := pattern.match(name))})
    return [sum(one == block for one, _ in numbers) for block in sorted({block for block, _ in numbers})]


def save(network: NewLLMResidual, settings: CvfpParams, folder: Path, **facts: Any) -> None:
    """Writes weights and configuration into an existing folder."""
    write_tensors(folder / "model.safetensors", network.state_dict())
    sizes = {"vocab_size": network.vocab_size, "parameters": json.loads(settings.model_dump_json())}
    write_json(folder / "config.json", sizes | facts)


def save_reader(reader: Reader | None, folder: Path) -> None:
    """Writes what phase 2's head starts from beside the network, if there is one."""
    if reader is not None:
        write_tensors(folder / READER, {"weight": reader.weight, "bias": reader.bias})


def load_reader(folder: str | Path) -> Reader | None:
    """What `save_reader` wrote, if anything.

    Raises:
        ArtifactError: the file is damaged.
    """
    file = Path(folder) / READER
    if not file.exists():
        return None
    tensors = read_tensors(file)
    if set(tensors) != {"weight", "bias"}:
        raise ArtifactError(f"{file}: is not as it was written; {way_back(file)}")
    return Reader(**tensors)


def load_network(folder: str | Path) -> tuple[NewLLMResidual, CvfpParams, dict[str, Any]]:
    """The network, the parameters it was made with, and the facts that were saved with it.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    folder = Path(folder)
    facts = read_json(folder / "config.json", "vocab_size", "parameters")
    try:
        settings = CvfpParams.model_validate(facts["parameters"])
    except ValueError:
        what = f"is not as it was written; {way_back(folder / 'config.json')}"
        raise ArtifactError(f"{folder}/config.json: {what}") from None
    network = bare(settings.model, settings.phase1, facts["vocab_size"])
    try:
        network.load_state_dict(read_tensors(folder / "model.safetensors"))
    except RuntimeError:
        what = f"does not fit config.json; {way_back(folder)}"
        raise ArtifactError(f"{folder}/model.safetensors: {what}") from None
    return network.eval(), settings, facts


def parameter_counts(network: NewLLMResidual) -> dict[str, int]:
    """Parameters by part: embedding, contexts (blocks and embed_norm), tokens (token blocks) and head."""

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    return {
        "embedding": count(network.token_embedding),
        "contexts": count(*network.blocks, network.embed_norm),
        "tokens": count(*network.token_blocks),
        "head": count(network.token_output),
    }
