"""Trust as an exit criterion of ASHEM's routed model, beside the others -> metrics/satipatthana/ashem/bridge.json.

dvc repro stages/satipatthana/ashem/dvc.yaml          (python -m stages.satipatthana.bridge)

Inputs are exit states of calibration text, the same tokens that ASHEM's fitted criteria learn from; the task is whether
block 1's best guess is right. Thresholds come from the rest of that text, numbers from test text.
"""

from typing import cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lego.artifacts import derived_seed, read_json, write_json
from lego.batches import split_batches
from lego.blocks import PackedBlocks
from lego.calibration import quality_lines, router_quality
from lego.checkpoint import load_exit, load_model
from lego.cost import Ledger
from lego.criteria import features
from lego.evaluation import Route, TokenTable, token_table
from lego.exits import quantile_threshold
from lego.harness import Stage, StageError, exit_cleanly
from lego.params import Params, load_params
from lego.satipatthana.curriculum import STAGES, advance, begin
from lego.satipatthana.sections import WRITTEN, SatipatthanaParams, load, with_profile
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.tasks import Split, Task
from lego.transformer import DeepSupervisionTransformer

CLASSES = ["wrong", "right"]
OF_ALL = ("max_prob", "margin", "entropy", "probe", "gain")  # ASHEM's own, whose numbers evaluate_routing wrote


class TrustCriterion:
    """(exit states (n, D), logits) -> score (n,) of a system that was trained on such states.

    Args:
        system: its input is a normalised exit state (D,).
        answers: the decoder's probability that block 1 is right, instead of trust.
    """

    needs_logits = False

    def __init__(self, system: Satipatthana, answers: bool = False) -> None:
        self.system, self.answers = system, answers

    def __call__(self, exit_states: Tensor, logits: Tensor | None = None) -> Tensor:
        if not len(exit_states):
            return exit_states.new_zeros(0)
        found = self.system(features(exit_states))
        return found.output.softmax(dim=1)[:, 1] if self.answers else found.trust[:, 0]

    def macs(self, states: Tensor) -> int:
        """Multiply-accumulates of one token, measured on exit states (n, D)."""
        with FlopCounterMode(display=False) as counter:
            self(states)
        return round(counter.get_total_flops() / 2 / len(states))


def task_of(states: Tensor, right: Tensor, rows: int, seed: int) -> Task:
    """A task of `rows` tokens drawn from exit states (n, D) and whether block 1 was right (n,).

    Raises:
        StageError: there are fewer tokens, or all are of one class.
    """
    if len(states) < rows:
        raise StageError(
            f"stages/satipatthana/params.yaml: bridge.rows is {rows}, but there are {len(states)} fitted tokens of "
            "calibration text; lower it, or raise data.max_calibration_tokens in params.yaml"
        )
    places = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:rows]
    x, y = features(states[places]), right[places].long()
    if len(y.unique()) < 2:
        raise StageError("block 1 is right on all fitted tokens or on none; there is nothing to tell apart")
    held = rows // 8  # for validation, and as many for test
    sizes = (rows - 2 * held, held, held)
    parts = [Split(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    return Task(parts[0], parts[1], parts[2], outside={}, classes=CLASSES)


def train(task: Task, params: SatipatthanaParams) -> Satipatthana:
    """One seed through all four stages."""
    system = begin(task, params, 0)
    for number in STAGES:
        history = advance(system, number, task, params, 0)
        print(f"stage {number}: " + ", ".join(f"{name} {value:.4f}" for name, value in history[-1].items()), flush=True)
    return system.eval().requires_grad_(False)


def thresholds(table: TokenTable, fit_tokens: int, ratio: float, names: list[str]) -> dict[str, float]:
    """Scores below which a share `ratio` of the tokens lies that nothing was fitted on."""
    return {name: quantile_threshold(torch.from_numpy(table.score(name)[fit_tokens:]), ratio) for name in names}


def fitted_tokens(model: DeepSupervisionTransformer, root: Params, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Exit states (n, D) of the first tokens of a split, and whether block 1 was right (n,)."""
    states: list[Tensor] = []
    share = count / PackedBlocks("data/tokens", split).tokens
    first = split_batches("data/tokens", split, root.evaluation.batch_size, (0.0, share))
    table = token_table(model, first, "cpu", on_states=lambda found, _: states.append(found))
    return torch.cat(states), torch.from_numpy(table.right_shallow)


def main() -> None:
    params, root = load(), load_params()
    params = with_profile(params, "bridge")
    with Stage("satipatthana/ashem/bridge", params.seed, params.threads) as stage:
        model = cast(DeepSupervisionTransformer, load_model("data/phase2"))
        facts, _ = load_exit("data/exit", model)
        split, fit_tokens = facts["split"], facts["fit_tokens"]
        states, right = fitted_tokens(model, root, split, fit_tokens)
        task = task_of(states, right, params.bridge.rows, derived_seed(params.seed, "bridge"))
        system = train(task, params)
        criteria = {"trust": TrustCriterion(system), "answer": TrustCriterion(system, answers=True)}
        size, ratio = root.evaluation.batch_size, root.routing.hard_ratio
        ratio = facts["hard_example_ratio"] if ratio is None else ratio
        rest = token_table(model, split_batches("data/tokens", split, size), "cpu", criteria)
        cut = thresholds(rest, fit_tokens, ratio, list(criteria))
        test = split_batches("data/tokens", "test", size)
        table, ledger = token_table(model, test, "cpu", criteria), Ledger.of(model, test.blocks.seq_len)
        quality = {
            name: router_quality(table, Route(name, cut[name], one.macs(states[:256])), ledger)
            for name, one in criteria.items()
        }
        others = read_json("metrics/criteria.json", "test")["test"]
        quality |= {name: others[name] for name in OF_ALL}
        macs = criteria["trust"].macs(states[:256])
        print("\n".join(["exit criteria on test text:", *quality_lines(quality)]))
        print(f"trust takes {macs:,} MACs a token, one of the {ledger.num_layers} layers {ledger.layer:,}")
        write_json("metrics/satipatthana/ashem/bridge.json", quality | {"trust_macs": macs, "rows": len(task.train)})
        stage.record |= {"counts": {"tokens": len(table.nll_deep)}}


if __name__ == "__main__":
    exit_cleanly(main, WRITTEN)
