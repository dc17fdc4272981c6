"""The whole system: see, settle, look at the settling, answer or abstain (specification, 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lego.satipatthana.augment import Augmenter
from lego.satipatthana.dynamics import Drunk, Meta, Sati, Vicara, Vitakka, settle
from lego.satipatthana.introspect import View, Vipassana
from lego.satipatthana.log import SantanaLog
from lego.satipatthana.nets import Adapter, Decoder, Reconstruction, auxiliary
from lego.satipatthana.sections import SatipatthanaParams


@dataclass(frozen=True)
class Thought:
    """What samatha makes of inputs: latents and states (B, d), the way, the encoded inputs and how noisy they are."""

    latent: Tensor
    state: Tensor
    log: SantanaLog
    severity: Tensor
    pair: tuple[Tensor, Tensor]
    meta: Meta
    encoded: Tensor


@dataclass(frozen=True)
class Output:
    """What the system answers: the output (B, C), and everything it rests on."""

    output: Tensor
    s_star: Tensor
    v_ctx: Tensor
    trust: Tensor
    conformity: Tensor | None
    confidence: Tensor | None
    log: SantanaLog
    steps: Tensor
    severity: Tensor
    known: Tensor
    recon_error: Tensor
    features: Tensor


class Satipatthana(nn.Module):
    """Adapter, probes, the loop, introspection and decoder.

    Args:
        shape: of one input.
        outputs: classes, or values of a regression.
        params: all of them; sizes and forms are read.

    Raises:
        ValueError: an adapter that does not fit the inputs.
    """

    def __init__(self, shape: tuple[int, ...], outputs: int, params: SatipatthanaParams) -> None:
        super().__init__()
        dim, heads = params.system.dim, params.heads
        self.params, self.shape, self.outputs = params, shape, outputs
        # in the order of the stages, so that what a later one begins with cannot change what an earlier one began with
        self.adapter = Adapter(shape, dim, params.adapter)
        self.adapter_recon = Reconstruction(shape, dim, heads.recon_hidden)
        self.augmenter = Augmenter(params.augmenter)
        self.vitakka = Vitakka(dim, params.vitakka)
        self.vicara = Vicara(dim, params.vitakka.n_probes, params.vicara)
        self.sati = Sati(params.sati)
        self.samatha_recon = Reconstruction(shape, dim, heads.recon_hidden)
        self.aux = auxiliary(dim, heads.aux_hidden, outputs) if params.system.guided else None
        self.vipassana = Vipassana(dim, params.vipassana)
        self.decoder = None
        if params.task.job != "anomaly":
            context_dim = self.vipassana.context_dim
            self.decoder = Decoder(dim, context_dim, outputs, heads.decoder_hidden, heads.output_activation)

    def samatha(
        self,
        x: Tensor,
        noise_level: float = 0.0,
        drunk: bool = False,
        generator: torch.Generator | None = None,
        max_steps: int | None = None,
        rests: bool = True,
    ) -> Thought:
        """Augments, encodes, and lets the state settle.

        Args:
            x: inputs (B, *shape).
            noise_level: of the augmenter, in [0, 1].
            drunk: whether the loop is damaged; then a generator is needed.
            generator: of noise and damage.
            max_steps: default samatha.max_steps.
            rests: whether the stop rule counts; else every row takes all steps.

        Raises:
            ValueError: drunk without a generator.
        """
        settings = self.params.samatha
        encoded, severity = self.augmenter(x, noise_level, generator)
        damage = None
        if drunk:
            if generator is None:
                raise ValueError("a drunk run needs a generator")
            damage = Drunk(settings, generator)
            with shaken(self.adapter, settings.drunk_dropout_min, generator):
                latent = self.adapter(encoded)
        else:
            latent = self.adapter(encoded)
        start, meta = self.vitakka(latent)
        sati = self.sati if rests else Sati(self.params.sati.model_copy(update={"kind": "fixed"}))
        found = settle(start, latent, meta, self.vicara, sati, max_steps or settings.max_steps, damage)
        return Thought(latent, found.state, found.log, severity, found.pair, meta, encoded)

    def recon_error(self, state: Tensor, encoded: Tensor) -> Tensor:
        """Mean squared error (B, 1) of the reconstruction of the inputs that were encoded: the one function (R-4.4)."""
        return (self.samatha_recon(state) - encoded).square().flatten(1).mean(dim=1, keepdim=True)

    def look(self, thought: Thought, state: Tensor | None = None) -> tuple[View, Tensor]:
        """Introspection of a thought, or of its log with other states (B, d); and reconstruction errors (B, 1)."""
        state = thought.state if state is None else state
        error = self.recon_error(state, thought.encoded)
        return self.view(state, thought.log, error), error

    def view(self, state: Tensor, log: SantanaLog, recon_error: Tensor) -> View:
        """Introspection of states (B, d) that are shown with a log, and of their reconstruction errors (B, 1)."""
        return self.vipassana(state, log, self.vitakka.read(), recon_error, self.params.samatha.max_steps)

    @torch.no_grad()
    def forward(self, x: Tensor, max_steps: int | None = None, rests: bool = True) -> Output:
        """Answers and trust for inputs (B, *shape), deterministic, in evaluation mode whatever the mode was.

        In the job anomaly there is no decoder, and the answer is 1 - trust (B, 1).

        Raises:
            ValueError: inputs of another shape, or that are not finite.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"inputs must be (rows, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if not bool((finite := torch.isfinite(x.flatten(1)).all(dim=1)).all()):
            raise ValueError(f"row {int((~finite).nonzero()[0])} has a feature that is not a finite number")
        with evaluation(self):
            thought = self.samatha(x, max_steps=max_steps, rests=rests)
            view, error = self.look(thought)
            return Output(
                output=1 - view.trust if self.decoder is None else self.decoder(thought.state, view.context),
                s_star=thought.state,
                v_ctx=view.context,
                trust=view.trust,
                conformity=_score(view.conformity_logit),
                confidence=_score(view.confidence_logit),
                log=thought.log,
                steps=thought.log.steps,
                severity=thought.severity,
                known=thought.meta.gate_open,
                recon_error=error,
                features=view.features,
            )

    def predict(self, x: Tensor, reject_below: float) -> tuple[Tensor, Tensor, Tensor]:
        """Answers (B, C), whether each is accepted (B,), and trust (B, 1); below the threshold the system abstains."""
        found = self(x)
        return found.output, found.trust[:, 0] >= reject_below, found.trust


def build(shape: tuple[int, ...], outputs: int, params: SatipatthanaParams, train: Tensor, seed: int) -> Satipatthana:
    """A fresh system from a seed, whose noise is in units of the train inputs' deviation."""
    torch.manual_seed(seed)
    system = Satipatthana(shape, outputs, params)
    system.augmenter.scale.copy_(train.std())
    return system


def _score(logit: Tensor | None) -> Tensor | None:
    return None if logit is None else torch.sigmoid(logit)[:, None]


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    """Each part has the mode after it that it had before."""
    modes = {one: one.training for one in module.modules()}
    try:
        yield
    finally:
        for one, training in modes.items():
            one.training = training


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and after it the modes that each part had."""
    with _modes_kept(module):
        module.eval()
        yield


@contextmanager
def shaken(module: nn.Module, minimum: float, generator: torch.Generator) -> Iterator[None]:
    """Dropout at twice its rate, at least `minimum`, inside alone and with draws of its own (R-6.2)."""
    rates = {one: one.p for one in module.modules() if isinstance(one, nn.Dropout)}
    with _modes_kept(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        try:
            for one in module.modules():  # layers too: in evaluation mode their fast path would pass by their dropout
                if isinstance(one, nn.Dropout | nn.TransformerEncoderLayer):
                    one.training = True
            for drop, rate in rates.items():
                drop.p = max(2 * rate, minimum)
            yield
        finally:
            for drop, rate in rates.items():
                drop.p = rate
