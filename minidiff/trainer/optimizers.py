"""The optimizer and its surroundings: learning rates, clipping, its state, averaged weights, how far they went."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minidiff.core.errors import SettingsError, WeightsError
from minidiff.draw.speed import needed
from minidiff.trainer.distributed import World
from minidiff.trainer.settings import TrainSettings

try:
    from minidiff.fast.adam8bit import LeanAdamW
except ModuleNotFoundError:  # the folder minidiff/fast was deleted: no optimizer is one of these
    LeanAdamW = type(None)  # type: ignore[assignment,misc]


def adamw(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with the settings' numbers: torch's, or ours where memory is short.

    torch's is the fused one: one pass over the numbers, where its other ways take ten, and a copy of all of them.
    `parameters` is a list on purpose: an iterator would be used up here, and leave nothing for clipping.
    """
    s, betas = settings, (settings.adam_beta1, settings.adam_beta2)
    if s.use_8bit_adam or s.bf16_weights or s.optimizer_in_backward:
        needed("one of --use_8bit_adam, --bf16_weights and --optimizer_in_backward")
        return LeanAdamW(
            parameters, s.learning_rate, betas, s.adam_epsilon, s.adam_weight_decay, eight_bit=s.use_8bit_adam, seed=s.seed
        )
    return torch.optim.AdamW(parameters, s.learning_rate, betas, s.adam_epsilon, s.adam_weight_decay, fused=True)


def to_bf16(parameters: Mapping[str, nn.Parameter]) -> None:
    """--bf16_weights: the trained weights become bf16, rounded to the nearest this once; one tensor after the other."""
    for p in parameters.values():
        p.data = p.data.to(torch.bfloat16)


def stepping_in_backward(optimizer: torch.optim.Optimizer, settings: TrainSettings, world: World) -> LeanAdamW | None:
    """The optimizer, if it shall step in the backward pass; else None. SettingsError where it cannot."""
    if not settings.optimizer_in_backward:
        return None
    if world.size > 1:
        raise SettingsError("--optimizer_in_backward is for one process: several would have to meet at every tensor.")
    if not isinstance(optimizer, LeanAdamW):
        raise SettingsError("--optimizer_in_backward: this task's own optimizer moves all tensors at once; leave the flag out.")
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
