"""The modes of phase 1: a pass that trains takes all tokens at once, or one after another.

`parallel` and `sequential_batch` take one optimizer step a pass, `sequential_online` one every bptt_len tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lego.base.parameter_files import ParamsError
from lego.base.progress import track
from lego.cvfp.losses import BATCH, cvfp_loss
from lego.cvfp.model import NewLLMResidual
from lego.cvfp.passes import Telling, chunks, shifted
from lego.cvfp.sections import Phase1Params

Update = Callable[[Tensor, Tensor, Tensor, Callable[[Tensor], None] | None], None]
"""Takes an optimizer step, as `ContextTrainer` does: CVFP loss, diversity, the contexts they were computed from, and
what takes the loss's gradient in these on to the weights, if they have no graph themselves."""


@dataclass(frozen=True)
class TrainingPass:
    """A pass over one text that computes its contexts and their loss, and says when a step is due.

    Args:
        model: whose blocks make contexts.
        embeddings: of the tokens (N, e).
        settings: section `phase1`.
        telling: what sequential passes print.
    """

    model: NewLLMResidual
    embeddings: Tensor
    settings: Phase1Params
    telling: Telling

    def __post_init__(self) -> None:
        if len(self.embeddings) < 2:
            raise ParamsError(f"phase 1 needs at least 2 tokens, got {len(self.embeddings)}")
        chunked = self.settings.mode == "parallel" and len(self.embeddings) > self.settings.chunk_tokens
        if chunked and self.from_statistics:
            raise ParamsError(
                f"phase1.chunk_tokens must be at least {len(self.embeddings)} for diversity {self.settings.diversity}, "
                "whose statistics need all tokens at once"
            )

    @property
    def from_statistics(self) -> bool:
        """Whether the layers' own statistics give the diversity, and not the contexts of a pass."""
        return self.settings.diversity not in (*BATCH, "none")

    def start(self, previous: Tensor) -> Tensor:
        """The context before the first token: that after the last one of the pass before, or 0 (B3)."""
        return torch.zeros_like(previous[-1]) if self.settings.start_context == "zero" else previous[-1].detach()

    def run(self, number: int, previous: Tensor, target: Tensor, update: Update) -> tuple[Tensor, float, float]:
        """Contexts (N, d) as they were before the pass's last step, and both terms of its loss.

        Args:
            number: of the pass, from 1.
            previous: contexts (N, d) of the pass before.
            target: of the CVFP loss (N, d); two_view has its own.
            update: takes a step.
        """
        match self.settings.mode:
            case "parallel":
                return self._parallel(previous, target, update)
            case "sequential_batch":
                return self._sequential_batch(number, previous, target, update)
            case _:
                return self._online(number, previous, target, update)

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
        start = self.start(previous)[None]
        return self._views(start, self._noise(start))

    def _step(self, views: list[Tensor], token: Tensor) -> list[Tensor]:
        """The next context of each view; the last call is that of the starts themselves, of which statistics are."""
        return [self.model.next_context(context=view, token=token) for view in views]

    def _parallel(self, previous: Tensor, target: Tensor, update: Update) -> tuple[Tensor, float, float]:
        start, noise = self.start(previous), self._noise(previous)

        def forward(part: slice) -> Tensor:
            views = self._step(self._views(shifted(previous, start, part), noise, part), self.embeddings[part])
            return torch.stack(views) if len(views) > 1 else views[0][None]  # (views, n, d)

        def losses(views: Tensor) -> tuple[Tensor, Tensor]:  # the last view is from the starts themselves
            return self._losses(views[-1], views[0] if len(views) > 1 else target)

        n, chunk = len(self.embeddings), self.settings.chunk_tokens
        if n <= chunk:
            views = forward(slice(0, n))
            cvfp, diversity = losses(views)
            update(cvfp, diversity, views, None)
        else:  # first all contexts, then the loss and its gradient in them, then chunk by chunk that of the weights
            parts = chunks(n, chunk)
            views = previous.new_empty(1 if noise is None else 2, n, previous.shape[1])
            with torch.no_grad():
                for part in track(parts, len(parts), "contexts", "chunk"):
                    views[:, part] = forward(part)
            views.requires_grad_()
            cvfp, diversity = losses(views)
            update(cvfp, diversity, views, lambda gradient: self._backward(forward, parts, gradient))
        return views[-1].detach(), cvfp.item(), diversity.item()

    @staticmethod
    def _backward(forward: Callable[[slice], Tensor], parts: list[slice], gradient: Tensor) -> None:
        for part in track(parts, len(parts), "gradient", "chunk"):
            forward(part).backward(gradient[:, part])

    def _sequential_batch(
        self, number: int, previous: Tensor, target: Tensor, update: Update
    ) -> tuple[Tensor, float, float]:
        views, made, terms = self._first_views(previous), list[Tensor](), list[Tensor]()
        n, length = len(self.embeddings), self.settings.bptt_len
        for index in self.telling.tokens(n, f"iteration {number + 1}"):
            if index % length == 0:
                views = [view.detach() for view in views]
            views = self._step(views, self.embeddings[index : index + 1])
            made.append(torch.stack(views))  # (views, 1, d)
            if self.from_statistics:
                terms.append(self.model.get_distribution_loss(views[-1]))
        contexts = torch.cat(made, dim=1).detach().requires_grad_()  # (views, N, d)
        cvfp, diversity = self._losses(contexts[-1], contexts[0] if len(views) > 1 else target, terms)

        def backward(gradient: Tensor) -> None:  # window by window, as one call for all tokens is long and silent
            each = gradient.new_tensor(self.settings.dist_reg_weight / n)  # of the loss in a token's own term
            windows = chunks(n, length)
            for part in track(windows, len(windows), "gradient", "window"):
                own = [term for term in terms[part] if term.requires_grad]  # that of ema_buffer has no gradient
                torch.autograd.backward([*made[part], *own], [*gradient[:, part].split(1, 1), *[each] * len(own)])

        update(cvfp, diversity, contexts, backward)
        return contexts[-1].detach(), cvfp.item(), diversity.item()

    def _online(self, number: int, previous: Tensor, target: Tensor, update: Update) -> tuple[Tensor, float, float]:
        views = self._first_views(previous)
        rows, waiting, totals = list[Tensor](), list[tuple[Tensor, Tensor]](), [0.0, 0.0]
        n = len(self.embeddings)
        for index in self.telling.tokens(n, f"iteration {number + 1}"):
            views = self._step(views, self.embeddings[index : index + 1])
            rows.append(views[-1].detach())
            waiting.append(self._losses(views[-1], views[0] if len(views) > 1 else target[index : index + 1]))
            if (index + 1) % self.settings.bptt_len == 0 or index + 1 == n:
                cvfp, diversity = (torch.stack(terms).mean() for terms in zip(*waiting, strict=True))
                update(cvfp, diversity, views[-1], None)
                for place, term in enumerate((cvfp, diversity)):
                    totals[place] += term.item() * len(waiting) / n
                waiting, views = [], [view.detach() for view in views]
        return torch.cat(rows), totals[0], totals[1]

    def _losses(self, contexts: Tensor, target: Tensor, terms: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        cvfp = cvfp_loss(contexts, target)
        if terms:
            return cvfp, torch.stack(terms).mean()
        return cvfp, self.model.get_distribution_loss(contexts)
