"""C*: the context after each token, under the weights of phase 1 and from start 0 -> data/cvfp/contexts.

dvc repro stages/cvfp/dvc.yaml:build_contexts          (python -m stages.cvfp.build_contexts)
"""

from lego.base.artifacts import atomic_folder, write_json, write_tensors
from lego.base.harness import Stage, exit_cleanly
from lego.cvfp.run import MADE_OF, settled, weights_digest
from lego.cvfp.sections import load
from lego.cvfp.store import load_network
from lego.cvfp.text import read_text_ids


def main() -> None:
    params = load()
    with Stage("cvfp/build_contexts", params.seed, params.threads) as stage:
        text = read_text_ids("data/cvfp/tokens")
        model, _, facts = load_network("data/cvfp/phase1")
        found = settled(model, text, params.contexts, params.progress)
        with atomic_folder("data/cvfp/contexts") as folder:
            for split, one in found.items():
                write_tensors(folder / f"{split}.safetensors", {"contexts": one.contexts})
            write_json(folder / MADE_OF, text.digests() | {"network": weights_digest(model)})
        metrics = {
            f"{split}_{key}": getattr(one, key) for split, one in found.items() for key in ("sweeps", "residual")
        }
        write_json("metrics/cvfp/build_contexts.json", metrics | {"weights_version": facts["weights_version"]})
        stage.record |= {"counts": {"tokens": sum(len(one.contexts) for one in found.values())}}


if __name__ == "__main__":
    exit_cleanly(main)
