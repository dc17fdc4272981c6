"""What tests of routing share: models with random weights in every context, and text by recomputing."""

from __future__ import annotations

import torch

from lego import DeepSupervisionTransformer
from tests.conftest import VOCAB

BRANCHED = {"branch": 1, "second pass": 0}  # layer at which block 2 begins; the latter has no new layers
CONTEXTS = ["full", "token", "sequence", *BRANCHED]


def random_model(context: str, vocab: int = VOCAB, **sizes) -> DeepSupervisionTransformer:
    torch.manual_seed(3)
    shape = {"block2_context": context}
    if context in BRANCHED:
        shape = {"block2_context": "sequence", "branch_layer": BRANCHED[context]}
    model = DeepSupervisionTransformer(vocab, 32, 4, 4, exit_layer=2, **shape, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


MODELS = {
    (context, heads): random_model(context, num_kv_heads=heads, own_head=heads == 2)
    for context in CONTEXTS
    for heads in (2, 4)
}


def greedy_by_recomputing(model, prompt: list[int], count: int, threshold: float | None) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        x = torch.tensor([ids])
        logits = model(x) if threshold is None else model.route(x, model.exit_layer, threshold)[0]
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]
