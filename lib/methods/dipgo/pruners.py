"""Pruners: small networks that give each gate its logits of reusing and of computing (section 3.3)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def evenly(steps: int) -> np.ndarray:
    """Give scores of steps, (T, 1), in (0, 1], above any threshold of which the steps lie about evenly: 1 is the first.

    Each next step is the (last) one farthest from all that are kept already, and from the end.
    """
    scores, kept, left = np.ones(steps), [0, steps], list(range(1, steps))
    for place in range(len(left)):
        farthest = max(left, key=lambda step: (min(abs(step - other) for other in kept), step))
        scores[farthest] = 1 - (place + 1) / steps
        kept.append(farthest)
        left.remove(farthest)
    return scores[:, None]


class Pruner(nn.Module):
    """Gives each gate the logits of reusing and of computing; they begin at (0, 1), which computes.

    Parameters
    ----------
    kind : "table" (a pair of logits a cell), "queries" (a learnt query a cell and a head of its own), or "encoder"
        (queries with step and block embeddings that attend to each other within a step before the heads)
    steps, groups : int, T and the gates of a column
    width : int, of the queries
    seed : int, of queries and heads
    start : (T, 1) or (T, groups), in [0, 1]
        The order to begin in, such as `evenly`'s: computing begins between 1 and 2.
    """

    def __init__(self, kind: str, steps: int, groups: int, width: int = 64, seed: int = 0,
                 start: np.ndarray | None = None):
        if kind not in ("table", "queries", "encoder"):
            raise ValueError(f"pruner {kind!r}: must be one of table, queries, encoder")
        super().__init__()
        self.kind, self.shape = kind, (steps, groups)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator))

        bias = torch.tensor([0.0, 1.0]).repeat(steps, groups, 1)
        if start is not None:
            bias[..., 1] += torch.from_numpy(start)
        self.bias = nn.Parameter(bias)
        if kind == "table":
            return
        self.queries = normal(steps, groups, width, scale=1.0)
        self.hidden = normal(steps, groups, width, width, scale=width**-0.5)
        self.output = nn.Parameter(torch.zeros(steps, groups, width, 2))
        if kind == "encoder":
            self.of_step, self.of_block = normal(steps, 1, width, scale=1.0), normal(1, groups, width, scale=1.0)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)

    def forward(self) -> Tensor:
        """Give the logits, (T, groups, 2), float32: reuse, compute."""
        if self.kind == "table":
            return self.bias
        queries = self.queries
        if self.kind == "encoder":
            queries = self.encoder(queries + self.of_step + self.of_block)
        hidden = torch.relu(torch.einsum("tbi,tbij->tbj", queries, self.hidden))
        return self.bias + torch.einsum("tbj,tbjk->tbk", hidden, self.output)

    def scores(self) -> np.ndarray:
        """Give the probabilities to compute, (T, groups)."""
        with torch.no_grad():
            return self().softmax(dim=-1)[..., 1].numpy()


def likely(scores: np.ndarray) -> np.ndarray:
    """Say which gates are on where computing is likelier than not (the paper's rule)."""
    return scores > 0.5


def straight_through(logits: Tensor, on: Callable[[np.ndarray], np.ndarray] = likely) -> Tensor:
    """Give hard gates, (T, groups), whose gradient is that of the probability to compute (section 3.3).

    Parameters
    ----------
    logits : Tensor, (T, groups, 2)
    on : callable(probabilities) -> bool, both (T, groups): which gates are on
    """
    soft = logits.softmax(dim=-1)[..., 1]
    return torch.from_numpy(on(soft.detach().numpy())).float() + (soft - soft.detach())
