"""A running average of the trained weights. Samples and the result are often better with it than with the last weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """A running average of the weights: a <- d a + (1 - d) w, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The average is sampled from and exported. While n is small, d is small too, so the average soon forgets the start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the weights after update number `done`, counted from 1."""
        decay = min(self.decay, (1 + done) / (10 + done))
        for name, p in self.parameters.items():
            self.average[name].lerp_(p, 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the `with`, the parameters hold the average; afterwards they are bit for bit what they were."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self.parameters.items():
            p.data, self.average[name] = self.average[name], p.data
