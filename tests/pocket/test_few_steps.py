"""The student that draws in few steps: its loss against hand computation and an exact teacher, and one update to a file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidiff.core.config import NoiseConfig
from minidiff.core.samplers import lcm_boundary
from minidiff.core.schedule import NoiseSchedule, a_bar_of, add_noise
from minidiff.core.train import Batch
from minidiff.draw.pipeline import StableDiffusionPipeline
from minidiff.files.lora_file import read_lora
from minidiff.pocket import few_steps, pretrain
from minidiff.pocket.few_steps import GRID, HUBER, consistency_loss, end_of_curve, teacher_step
from minidiff.pocket.settings import PretrainSettings

POCKET = Path(__file__).parents[2] / "checkpoints" / "pocket"
SCHEDULE = NoiseSchedule.from_config(NoiseConfig())


def batch(t: list[int]) -> Batch:
    draws = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, len(t), 4, 2, 2, generator=draws)
    return {"latents": z, "noise": noise, "t": torch.tensor(t), "guidance": torch.full((len(t),), 5.0)}


def knows(z: Tensor, schedule: NoiseSchedule) -> few_steps.Network:
    """The exact network where z is the only latent in the world: its eps leads from any x_t to z."""

    def network(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        a_bar = a_bar_of(schedule, t, x)
        return (x - a_bar.sqrt() * z.repeat(len(x) // len(z), 1, 1, 1)) / (1 - a_bar).sqrt()

    return network


def test_an_exact_teacher_and_student_agree() -> None:
    """All points of a curve have the same end, z: so the loss is 0, at every neighbouring pair but the last."""
    data, text = batch([39, 199, 599, 999]), torch.zeros(4, 77, 8)
    network = knows(data["latents"], SCHEDULE)
    assert consistency_loss(network, network, SCHEDULE, data, text, text) < 1e-6
    worse = consistency_loss(lambda x, t, text: 0.9 * network(x, t, text), network, SCHEDULE, data, text, text)
    assert worse > 1e-3


def test_teacher_step_is_ddim_with_guidance() -> None:
    """From x_t to the x_s of the same z and noise, if the network knows both; and guidance goes past the prompt's answer."""
    data, text = batch([199, 999]), torch.zeros(2, 77, 8)
    x_t, s = add_noise(SCHEDULE, data["latents"], data["noise"], data["t"]), data["t"] - GRID
    x_s = teacher_step(knows(data["latents"], SCHEDULE), SCHEDULE, x_t, data["t"], s, torch.cat([text, text]), data["guidance"])
    torch.testing.assert_close(x_s, add_noise(SCHEDULE, data["latents"], data["noise"], s), atol=2e-5, rtol=1e-4)

    def network(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return text[:, :1, :1, None].expand_as(x)  # 0 without a prompt, 1 with it

    guided = teacher_step(network, SCHEDULE, x_t, data["t"], s, torch.cat([text, text + 1]), data["guidance"])
    a_t, a_s = a_bar_of(SCHEDULE, data["t"], x_t), a_bar_of(SCHEDULE, s, x_t)
    expected = a_s.sqrt() * (x_t - (1 - a_t).sqrt() * 5) / a_t.sqrt() + (1 - a_s).sqrt() * 5
    torch.testing.assert_close(guided, expected)


def test_lcm_eq9_boundary() -> None:
    """At t = 0 the end of the curve is the point itself, whatever the network says; at large t it is the predicted x0."""
    assert lcm_boundary(0) == (1.0, 0.0)
    x = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    end = end_of_curve(lambda x, t, text: 100 * x, SCHEDULE, x, torch.tensor([0, 0]), torch.zeros(2, 77, 8))
    torch.testing.assert_close(end, x)


def test_consistency_loss_2310_14189_section_3_3_by_hand() -> None:
    """√(d² + c²) - c of the two ends, for a student that always answers 0."""
    data, text = batch([19, 499]), torch.zeros(2, 77, 8)
    teacher = knows(data["latents"], SCHEDULE)

    def zero(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return torch.zeros_like(x)

    ends = []
    for t in (data["t"], data["t"] - GRID + torch.tensor([1, 0])):  # 19 goes to 0, not to -1
        x = add_noise(SCHEDULE, data["latents"], data["noise"], t)
        skip, out = (torch.tensor(c).view(-1, 1, 1, 1) for c in zip(*(lcm_boundary(float(one)) for one in t)))
        ends.append(skip * x + out * x / a_bar_of(SCHEDULE, t, x).sqrt())
    expected = (((ends[0] - ends[1]) ** 2 + HUBER**2) ** 0.5 - HUBER).mean()
    torch.testing.assert_close(consistency_loss(zero, teacher, SCHEDULE, data, text, text), expected, atol=1e-5, rtol=1e-4)


def test_one_update_of_the_student_is_a_file_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, loss = [], few_steps.consistency_loss

    def watched(student: few_steps.Network, teacher: few_steps.Network, *rest: object) -> Tensor:
        x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.zeros(1, 77, 128)
        assert torch.equal(student(x, t, text), teacher(x, t, text))  # at birth they are the same network
        losses.append(loss(student, teacher, *rest))  # type: ignore[arg-type]
        return losses[-1]

    monkeypatch.setattr(few_steps, "consistency_loss", watched)
    settings = PretrainSettings(str(tmp_path), ("world", "latents", "student"), init_from=str(POCKET), device="cpu",
                                pictures=4, student_steps=1, student_batch=2)  # fmt: skip
    pretrain.pretrain(settings)
    file = read_lora(tmp_path / "student")
    assert file.dialect == "kohya" and len(losses) == 1 and set(file.ranks.values()) == {few_steps.RANK}
    pipe = StableDiffusionPipeline.from_pretrained(POCKET)
    pipe.load_lora_weights(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red dog", sampler="lcm", num_inference_steps=2, guidance_scale=1.0, seed=0).images[0].size == (128, 128)
