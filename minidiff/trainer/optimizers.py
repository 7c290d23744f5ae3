"""The optimizer and its surroundings: learning rates, clipping, its state, averaged weights, how far they went."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from minidiff.core.errors import WeightsError
from minidiff.fast.adam8bit import LeanAdamW
from minidiff.trainer.settings import TrainSettings


def adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with the settings' numbers: torch's, or ours where memory is short.

    torch's is the fused one: one pass over the numbers, where its other ways take ten, and a copy of all of them.
    `parameters` is a list on purpose: an iterator would be used up here, and leave nothing for clipping.
    """
    s, betas = settings, (settings.adam_beta1, settings.adam_beta2)
    if s.use_8bit_adam or s.bf16_weights or s.optimizer_in_backward:
        return LeanAdamW(
            parameters, s.learning_rate, betas, s.adam_epsilon, s.adam_weight_decay, eight_bit=s.use_8bit_adam, seed=s.seed
        )
    return torch.optim.AdamW(parameters, s.learning_rate, betas, s.adam_epsilon, s.adam_weight_decay, fused=True)


def to_bf16(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
    """--bf16_weights: what is trained becomes bf16, rounded to the nearest this once; in place, one tensor after the other.

    Checked here and not with the other settings: full fine-tuning loads the base as if --mixed_precision were "no".
    """
    computes = settings.mixed_precision == "bf16"
    settings.need(computes, "bf16_weights", "needs --mixed_precision bf16: the forward pass has the weights' format")
    for p in parameters.values():
        p.data = p.data.to(torch.bfloat16)


def lr_factor(done: int, total: int, settings: TrainSettings) -> float:
    """What the learning rate is multiplied by, in [0, 1], for the update after `done` of `total` updates; a pure function.

    Warm-up goes 0, 1/w, 2/w, …, as in diffusers. A linear or cosine rate would reach zero after the last update.
    """
    warmup = settings.lr_warmup_steps
    if done < warmup:
        return done / warmup
    part = min((done - warmup) / max(total - warmup, 1), 1.0)  # of the way from the end of warm-up to the end
    if settings.lr_scheduler == "linear":
        return 1.0 - part
    if settings.lr_scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * part))
    return 1.0


def unscaled(parameters: list[nn.Parameter], scale: float) -> list[Tensor]:
    """All gradients that there are, divided in place by what the loss was multiplied with."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    for gradient in gradients if scale != 1.0 else []:
        gradient.div_(scale)
    return gradients


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients by min(1, max_norm / norm) (Pascanu et al. 2013, algorithm 1); returns the norm before.

    A norm that is not finite leaves them as they are, so that the culprit can be named.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if math.isfinite(value := float(norm)):  # a GPU is waited for once
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


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
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        p = parameters.get(number)
        if p is None or (tensor.shape, tensor.dtype) not in state_kinds(optimizer, p, name):
            raise WeightsError(f"the optimizer's {key}, {tuple(tensor.shape)}, belongs to nothing that this task trains")
        state.setdefault(p, {})[name] = tensor.to(p.device) if tensor.ndim or fused else tensor  # ours counts steps on the CPU
    if isinstance(optimizer, LeanAdamW):
        for p, values in state.items():
            if lost := optimizer.kinds(p).keys() - values.keys():
                raise WeightsError(f"the optimizer's state is without {min(lost)} of a tensor that this task trains")
    optimizer.state.update(state)


def state_kinds(optimizer: torch.optim.Optimizer, p: nn.Parameter, name: str) -> list[tuple[torch.Size, torch.dtype]]:
    """The shape and dtype that `name` may have in the state of `p`."""
    if isinstance(optimizer, LeanAdamW):
        return [kind for known, kind in optimizer.kinds(p).items() if known == name]
    return [(torch.Size(), torch.float32), (p.shape, torch.float32)]


class EMA:
    """A running average of the weights: a <- d a + (1 - d) w, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The average is what is sampled from and exported. While n is small, d is too, so that the start is soon forgotten.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Take in the weights after update number `done`, counted from 1."""
        decay = min(self.decay, (1 + done) / (10 + done))
        for name, p in self.parameters.items():
            self.average[name].lerp_(p, 1.0 - decay)

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Go on from a saved average."""
        for name, a in self.average.items():
            a.copy_(average[name])

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


class Movement:
    """How far the weights have gone since the start, seen in a few numbers of each tensor: a copy of all would be dear."""

    NUMBERS = 1000  # of each tensor, evenly spread; a smaller one is kept whole

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.start = {name: self._some(p).clone() for name, p in parameters.items()}

    def rms(self) -> float:
        """Root of the mean squared change, over the numbers kept."""
        changes = torch.cat([(self._some(p) - self.start[name]).float() for name, p in self.parameters.items()])
        return changes.square().mean().sqrt().item()

    def still(self) -> list[str]:
        """The tensors of which no number kept has changed: they learned nothing."""
        return [name for name, p in self.parameters.items() if torch.equal(self._some(p), self.start[name])]

    def _some(self, p: nn.Parameter) -> Tensor:
        return p.detach().flatten()[:: max(1, p.numel() // self.NUMBERS)]
