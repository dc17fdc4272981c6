"""What evaluate_routing decides and writes, for blocks that are compared with rivals instead of the yardstick.

dvc repro stages/extend/dvc.yaml:route
"""

from typing import cast

from lego.base.artifacts import derived_seed
from lego.base.harness import Stage, exit_cleanly, resolve_device
from lego.base.params import load_params
from lego.model.checkpoint import load_model
from lego.model.transformer import DeepSupervisionTransformer
from stages.evaluate_routing import answer, write_answers


def main() -> None:
    params = load_params()
    with Stage("extend/route", params.seed, params.train.threads):
        model = cast(DeepSupervisionTransformer, load_model("data/phase2"))
        seed = derived_seed(params.seed, "evaluate_routing")  # so that equal blocks have equal routers
        write_answers(model, answer(params, model, seed, resolve_device(params.train.device)))


if __name__ == "__main__":
    exit_cleanly(main)
