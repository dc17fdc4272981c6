"""Phase 1, objective fixed_point: contexts that move little from one pass to the next, and differ from each other.

Iteration 0 is a sequential pass that trains nothing. Every later one computes the contexts anew, compares them with
those of the pass before and takes optimizer steps (specification, section 3): one for all tokens (`parallel`,
`sequential_batch`) or one a token (`sequential_online`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam

from lego.cvfp.losses import ZeroGradientError
from lego.cvfp.model import NewLLMResidual
from lego.cvfp.modes import TrainingPass
from lego.cvfp.passes import QUIET, Telling, parallel_pass, require_finite, sequential_pass
from lego.cvfp.sections import Phase1Params


@dataclass(frozen=True)
class Contexts:
    """Contexts (N, d) and the number of weight updates behind the weights that made them, the last row at least (B12).

    In `sequential_online` the weights change from row to row.
    """

    values: Tensor
    weights_version: int


@dataclass(frozen=True)
class Iteration:
    """One pass over the text: what came out of it, before its own last step."""

    number: int
    contexts: Contexts
    cvfp: float | None
    diversity: float | None
    converged: int
    updates: int
    skipped: int
    seconds: float

    def line(self, of: int) -> str:
        """As it is printed: numbers with their base."""
        n = len(self.contexts.values)
        if self.cvfp is None or self.diversity is None:
            return f"iteration {self.number + 1}/{of}: {n:,} tokens, no update, {self.seconds:.1f} s"
        return (
            f"iteration {self.number + 1}/{of}: CVFP MSE {self.cvfp:.6f}, diversity {self.diversity:.6f}, converged "
            f"{100 * self.converged / n:.1f}% ({self.converged}/{n} tokens), weight updates {self.updates}, "
            f"skipped {self.skipped}, {self.seconds:.1f} s"
        )


NEED_A_PAST = ("centroid_ema", "ema_target")  # diversities that are 0 for the very first context
LATEST = 2  # weight updates after which every loss must have had a gradient, if there are so many


@dataclass
class ContextTrainer:
    """Trains a network's blocks on one text.

    Args:
        model: everything but its embedding and head is trained; it is put into training mode.
        embeddings: of the tokens (N, e), computed once and without gradient.
        settings: section `phase1`.
        telling: what sequential passes print.

    Without `recompute_contexts`, `weights_before` holds the weights of before the last step: those that made the
    contexts which are returned.
    """

    model: NewLLMResidual
    embeddings: Tensor
    settings: Phase1Params
    telling: Telling = QUIET
    updates: int = 0
    skipped: int = 0
    made_with: int = 0  # updates behind the weights of the last forward pass
    weights_before: dict[str, Tensor] = field(default_factory=dict)
    _has_gradient: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.one_pass = TrainingPass(self.model, self.embeddings, self.settings, self.telling)
        self.model.train()
        blocks = [p for block in self.model.blocks for p in block.parameters()]
        self.parameters = [p for p in (*blocks, *self.model.embed_norm.parameters()) if p.requires_grad]
        self.optimizer = Adam(self.parameters, lr=self.settings.lr, fused=True)

    def iterations(self) -> Iterator[Iteration]:
        """Passes over the text, each with its contexts, until one of the stop rules or max_iterations ends them.

        Raises:
            NonFiniteContextError: a context is not finite.
            ZeroGradientError: a loss that counts has no gradient.
        """
        settings, start = self.settings, time.monotonic()
        previous = sequential_pass(self.model, self.embeddings, None, self.telling, "iteration 1")
        first = previous if settings.cvfp_target == "iteration0_fixed" else None
        rates = list[float]()
        yield Iteration(0, Contexts(previous, 0), None, None, 0, 0, 0, time.monotonic() - start)
        for number in range(1, settings.max_iterations):
            latest = self.iterate(number, previous, first)
            previous = latest.contexts.values
            yield latest
            rates.append(latest.converged / len(previous))
            if self.updates >= settings.min_updates and self._stops(rates):
                break
        self._require_all_trained()

    def iterate(self, number: int, previous: Tensor, first: Tensor | None = None) -> Iteration:
        """One pass and its optimizer steps.

        Args:
            number: of the pass, from 1, for the schedule of the rate.
            previous: contexts (N, d) of the pass before.
            first: of iteration 0, the target of `iteration0_fixed`; the others do not read it.

        Raises:
            ValueError: that target, and no `first`.
            NonFiniteContextError: a context is not finite.
            ZeroGradientError: a loss that counts has no gradient.
        """
        begun = time.monotonic()
        self.telling.begins(f"iteration {number + 1}/{self.settings.max_iterations}", len(self.embeddings))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._factor(number)
        target = first if self.settings.cvfp_target == "iteration0_fixed" else previous
        if target is None:
            raise ValueError("the target iteration0_fixed is the contexts of iteration 0; give them as `first`")
        contexts, cvfp, diversity = self.one_pass.run(number, previous, target, self._update)
        require_finite(contexts, f"iteration {number + 1}")
        distance = (contexts - previous).square().mean(dim=1)  # (N,)
        converged = int((distance < self.settings.convergence_threshold).sum())
        made, seconds = Contexts(contexts, self.made_with), time.monotonic() - begun
        return Iteration(number, made, cvfp, diversity, converged, self.updates, self.skipped, seconds)

    def final(self, last: Iteration) -> Contexts:
        """The contexts of the last iteration, computed once more with the weights as they are after its last step."""
        if not self.settings.recompute_contexts:
            return last.contexts
        before = last.contexts.values
        start = self.one_pass.start(before)
        values = parallel_pass(self.model, self.embeddings, before, start, self.settings.chunk_tokens)
        require_finite(values, "final pass")
        return Contexts(values, self.updates)

    def _stops(self, rates: list[float]) -> bool:
        if self.settings.early_stop and rates[-1] >= self.settings.min_converged_ratio:
            return True
        worse = [rate < max(rates) - self.settings.worse_margin for rate in rates[-2:]]
        return self.settings.stop_when_worse and len(rates) > 2 and all(worse)

    def _factor(self, number: int) -> float:
        if self.settings.lr_schedule == "constant":
            return 1.0
        passed = sum(number > last for last in self.settings.lr_steps)
        return self.settings.lr_step_factors[passed]

    def _update(
        self,
        cvfp: Tensor,
        diversity: Tensor,
        contexts: Tensor,
        backward: Callable[[Tensor], None] | None,
    ) -> None:
        """One optimizer step, unless loss or gradient is not finite, which is counted.

        Args:
            cvfp, diversity: the two terms.
            contexts: what they were computed from.
            backward: takes the loss's gradient in the contexts on to the weights, if they have no graph themselves.
        """
        # not lego.training.steps.run_epoch: contexts are handed on and kept, and a step that is not finite is skipped
        w = self.settings.dist_reg_weight
        loss, self.made_with, self.weights_before = (1 - w) * cvfp + w * diversity, self.updates, {}
        self.optimizer.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            self._require_gradients({"cvfp_target": cvfp, "diversity": diversity}, contexts)
        if torch.isfinite(loss) and loss.requires_grad:
            if backward is None:
                loss.backward()
            else:
                backward(torch.autograd.grad(loss, contexts)[0])
            norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.grad_clip)
            if torch.isfinite(norm):
                if not self.settings.recompute_contexts:
                    self.weights_before = {name: one.clone() for name, one in self.model.state_dict().items()}
                self.optimizer.step()
                self.updates += 1
                return
        self.skipped += 1

    def _require_gradients(self, terms: dict[str, Tensor], contexts: Tensor) -> None:
        """Refuses a term that counts and trains nothing: in its first steps, where it should.

        Asked of the contexts where the term is computed from them, as the way on to the weights is long; of the weights
        where it comes from the layers' own statistics.

        At the very first, the weights are those that made the target, so that the CVFP loss is 0 where every pass
        starts from 0; and two EMA kinds compare with what they have seen, which is nothing.
        """
        if self.updates > LATEST:
            return
        for name in self._waiting():
            term = terms[name]
            wanted = self.parameters if name == "diversity" and self.one_pass.from_statistics else [contexts]
            found = (
                torch.autograd.grad(term, wanted, retain_graph=True, allow_unused=True) if term.requires_grad else ()
            )
            if any(one is not None and bool((one != 0).any()) for one in found):
                self._has_gradient.add(name)
            elif self.updates == LATEST or (name == "diversity" and self.settings.diversity not in NEED_A_PAST):
                self._refuse(name)

    def _waiting(self) -> list[str]:
        """Terms that count and have had no gradient yet."""
        return [name for name, weight in self._weights().items() if weight and name not in self._has_gradient]

    def _weights(self) -> dict[str, float]:
        w = self.settings.dist_reg_weight
        return {"cvfp_target": 1 - w, "diversity": 0.0 if self.settings.diversity == "none" else w}

    def _refuse(self, name: str) -> None:
        kind = self.settings.diversity if name == "diversity" else self.settings.cvfp_target
        sentence = f"phase1.{name}: {kind} has weight {self._weights()[name]:g} and no gradient, so it trains nothing"
        if not self.settings.allow_zero_gradient_loss:
            raise ZeroGradientError(f"{sentence}; choose another, or set phase1.allow_zero_gradient_loss: true")
        warnings.warn(sentence, stacklevel=3)
        self._has_gradient.add(name)

    def _require_all_trained(self) -> None:
        """The same after the last pass, where passes were too few to tell before."""
        if self.updates:
            for name in self._waiting():
                self._refuse(name)
