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

from lego.base.params import ParamsError
from lego.base.progress import track
from lego.cvfp.losses import BATCH, ZeroGradientError, cvfp_loss
from lego.cvfp.model import NewLLMResidual
from lego.cvfp.passes import QUIET, Telling, chunks, parallel_pass, require_finite, sequential_pass, shifted
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
        if len(self.embeddings) < 2:
            raise ParamsError(f"phase 1 needs at least 2 tokens, got {len(self.embeddings)}")
        chunked = self.settings.mode == "parallel" and len(self.embeddings) > self.settings.chunk_tokens
        if chunked and self._from_statistics:
            raise ParamsError(
                f"phase1.chunk_tokens must be at least {len(self.embeddings)} for diversity {self.settings.diversity}, "
                "whose statistics need all tokens at once"
            )
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
        contexts, cvfp, diversity = self._pass(number, previous, target)
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
        values = parallel_pass(self.model, self.embeddings, before, self._start(before), self.settings.chunk_tokens)
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

    def _start(self, previous: Tensor) -> Tensor:
        """The context before the first token: that after the last one of the pass before, or 0 (B3)."""
        return torch.zeros_like(previous[-1]) if self.settings.start_context == "zero" else previous[-1].detach()

    def _pass(self, number: int, previous: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
        """Contexts (N, d) as they were before the pass's last step, and both terms of its loss."""
        match self.settings.mode:
            case "parallel":
                return self._parallel(previous, target)
            case "sequential_batch":
                return self._sequential_batch(number, previous, target)
            case _:
                return self._online(number, previous, target)

    def _noise(self, starts: Tensor) -> Tensor | None:
        """How far the other starts of the target two_view are from these (n, d); None for the other targets."""
        two = self.settings.cvfp_target == "two_view"
        return self.settings.two_view_noise * torch.randn_like(starts) if two else None

    @staticmethod
    def _views(starts: Tensor, noise: Tensor | None, part: slice = slice(None)) -> list[Tensor]:
        """Start contexts (n, d) of a part of the text, and before them those with noise, if there is any."""
        return [starts] if noise is None else [starts + noise[part], starts]

    def _first_views(self, previous: Tensor) -> list[Tensor]:
        """Those of the first token (1, d)."""
        start = self._start(previous)[None]
        return self._views(start, self._noise(start))

    def _step(self, views: list[Tensor], token: Tensor) -> list[Tensor]:
        """The next context of each view; the last call is that of the starts themselves, of which statistics are."""
        return [self.model.next_context(context=view, token=token) for view in views]

    def _parallel(self, previous: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
        start, noise = self._start(previous), self._noise(previous)

        def forward(part: slice) -> Tensor:
            views = self._step(self._views(shifted(previous, start, part), noise, part), self.embeddings[part])
            return torch.stack(views) if len(views) > 1 else views[0][None]  # (views, n, d)

        def losses(views: Tensor) -> tuple[Tensor, Tensor]:  # the last view is from the starts themselves
            return self._losses(views[-1], views[0] if len(views) > 1 else target)

        n, chunk = len(self.embeddings), self.settings.chunk_tokens
        if n <= chunk:
            views = forward(slice(0, n))
            cvfp, diversity = losses(views)
            self._update(cvfp, diversity, views)
        else:  # first all contexts, then the loss and its gradient in them, then chunk by chunk that of the weights
            parts = chunks(n, chunk)
            views = previous.new_empty(1 if noise is None else 2, n, previous.shape[1])
            with torch.no_grad():
                for part in track(parts, len(parts), "contexts", "chunk"):
                    views[:, part] = forward(part)
            views.requires_grad_()
            cvfp, diversity = losses(views)
            self._update(cvfp, diversity, views, lambda gradient: self._backward(forward, parts, gradient))
        return views[-1].detach(), cvfp.item(), diversity.item()

    @staticmethod
    def _backward(forward: Callable[[slice], Tensor], parts: list[slice], gradient: Tensor) -> None:
        for part in track(parts, len(parts), "gradient", "chunk"):
            forward(part).backward(gradient[:, part])

    def _sequential_batch(self, number: int, previous: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
        views, made, terms = self._first_views(previous), list[Tensor](), list[Tensor]()
        n, length = len(self.embeddings), self.settings.bptt_len
        for index in self.telling.tokens(n, f"iteration {number + 1}"):
            if index % length == 0:
                views = [view.detach() for view in views]
            views = self._step(views, self.embeddings[index : index + 1])
            made.append(torch.stack(views))  # (views, 1, d)
            if self._from_statistics:
                terms.append(self.model.get_distribution_loss(views[-1]))
        contexts = torch.cat(made, dim=1).detach().requires_grad_()  # (views, N, d)
        cvfp, diversity = self._losses(contexts[-1], contexts[0] if len(views) > 1 else target, terms)

        def backward(gradient: Tensor) -> None:  # window by window, as one call for all tokens is long and silent
            each = gradient.new_tensor(self.settings.dist_reg_weight / n)  # of the loss in a token's own term
            windows = chunks(n, length)
            for part in track(windows, len(windows), "gradient", "window"):
                own = [term for term in terms[part] if term.requires_grad]  # that of ema_buffer has no gradient
                torch.autograd.backward([*made[part], *own], [*gradient[:, part].split(1, 1), *[each] * len(own)])

        self._update(cvfp, diversity, contexts, backward)
        return contexts[-1].detach(), cvfp.item(), diversity.item()

    def _online(self, number: int, previous: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
        views = self._first_views(previous)
        rows, waiting, totals = list[Tensor](), list[tuple[Tensor, Tensor]](), [0.0, 0.0]
        n = len(self.embeddings)
        for index in self.telling.tokens(n, f"iteration {number + 1}"):
            views = self._step(views, self.embeddings[index : index + 1])
            rows.append(views[-1].detach())
            waiting.append(self._losses(views[-1], views[0] if len(views) > 1 else target[index : index + 1]))
            if (index + 1) % self.settings.bptt_len == 0 or index + 1 == n:
                cvfp, diversity = (torch.stack(terms).mean() for terms in zip(*waiting, strict=True))
                self._update(cvfp, diversity, views[-1])
                for place, term in enumerate((cvfp, diversity)):
                    totals[place] += term.item() * len(waiting) / n
                waiting, views = [], [view.detach() for view in views]
        return torch.cat(rows), totals[0], totals[1]

    @property
    def _from_statistics(self) -> bool:
        return self.settings.diversity not in (*BATCH, "none")

    def _losses(self, contexts: Tensor, target: Tensor, terms: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        cvfp = cvfp_loss(contexts, target)
        if terms:
            return cvfp, torch.stack(terms).mean()
        return cvfp, self.model.get_distribution_loss(contexts)

    def _update(
        self,
        cvfp: Tensor,
        diversity: Tensor,
        contexts: Tensor,
        backward: Callable[[Tensor], None] | None = None,
    ) -> None:
        """One optimizer step, unless loss or gradient is not finite, which is counted.

        Args:
            cvfp, diversity: the two terms.
            contexts: what they were computed from.
            backward: takes the loss's gradient in the contexts on to the weights, if they have no graph themselves.
        """
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
            wanted = self.parameters if name == "diversity" and self._from_statistics else [contexts]
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
