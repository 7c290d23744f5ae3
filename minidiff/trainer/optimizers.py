"""The optimizer that the settings ask for, its state as tensors for a checkpoint, and a running average of what it makes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minidiff.core.errors import WeightsError
from minidiff.draw.speed import needed
from minidiff.trainer.settings import TrainSettings


def adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with the settings' numbers: torch's, or ours where memory is short.

    torch's is the fused one: one pass over the numbers, where its other ways take ten, and a copy of all of them.
    """
    s = settings
    numbers = s.learning_rate, (s.adam_beta1, s.adam_beta2), s.adam_epsilon, s.adam_weight_decay
    if s.use_8bit_adam or s.optimizer_in_backward:
        needed("--use_8bit_adam and --optimizer_in_backward")
        from minidiff.fast.adam8bit import LeanAdamW  # only now: the folder minidiff/fast may have been deleted

        return LeanAdamW(parameters, *numbers, eight_bit=s.use_8bit_adam)
    return torch.optim.AdamW(parameters, *numbers, fused=True)


RATES = {"text_encoder": "text_encoder_lr", "word": "learning_rate_embedding"}  # what is trained -> the flag of its own rate


def optimizer_of(trainable: dict[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """`adamw` for all that is trained, with a rate of its own for what has one."""
    rates = {start: rate for start, flag in RATES.items() if (rate := getattr(settings, flag, None))}
    optimizer = adamw([p for name, p in trainable.items() if not name.startswith(tuple(rates))], settings)
    for start, rate in rates.items():
        optimizer.add_param_group({"params": [p for name, p in trainable.items() if name.startswith(start)], "lr": rate})
    return optimizer


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by "<parameter number>.<name>". All its other numbers follow from the settings."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, values in state.items() for name, tensor in values.items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse. WeightsError for a tensor that belongs to none of this optimizer's parameters.

    (torch's own `load_state_dict` would make floats of 8-bit codes.)
    """
    parameters = {str(i): p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        p = parameters.get(number)
        fits = p is not None and tensor.dtype == torch.float32 and tensor.shape in (torch.Size(), p.shape)
        if p is not None and hasattr(optimizer, "kinds"):  # ours
            fits = optimizer.kinds(p).get(name) == (tensor.shape, tensor.dtype)
        if p is None or not fits:
            raise WeightsError(f"the optimizer's {key}, {tuple(tensor.shape)}, belongs to nothing that this task trains")
        optimizer.state[p][name] = tensor.to(p.device) if tensor.ndim or fused else tensor  # ours counts steps on the CPU


class EMA:
    """A running average of the weights: a <- d a + (1 - d) w, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    Samples and the result are often better with it than with the last weights. While n is small, d is small too, so the
    average soon forgets the start.
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
