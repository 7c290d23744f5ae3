"""The noise schedule: its published numbers, the forward process, and what the network's output means."""

import pytest
import torch

from minidiff.core.config import NoiseConfig
from minidiff.core.errors import WeightsError
from minidiff.core.grids import SAMPLERS
from minidiff.core.schedule import NoiseSchedule, add_noise, read_output, training_target, zero_terminal_snr
from minidiff.files.folder import config_values, read_config, sampler_of, scheduler_values

SCHEDULE = NoiseSchedule.from_config(NoiseConfig())
T_ALL = torch.arange(1000)


def latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_numbers_of_sd15():
    a_bar, sigmas = SCHEDULE.alphas_cumprod, SCHEDULE.sigmas
    assert a_bar.shape == sigmas.shape == (1000,)
    assert a_bar.dtype == sigmas.dtype == torch.float32
    assert a_bar[0].item() == pytest.approx(0.99914998, abs=1e-8)
    assert a_bar[999].item() == pytest.approx(0.00466010, abs=1e-8)
    assert sigmas[0].item() == pytest.approx(0.0291675, abs=1e-7)
    assert sigmas[999].item() == pytest.approx(14.6146469, abs=2e-6)  # fp64 would give 14.6146412


def test_linear_betas_and_other_lengths():
    schedule = NoiseSchedule.from_config(NoiseConfig(10, 0.1, 0.1, "linear"))
    torch.testing.assert_close(schedule.alphas_cumprod, 0.9 ** torch.arange(1.0, 11.0))


@pytest.mark.parametrize("wrong", [{"beta_schedule": "cosine"}, {"prediction_type": "v-prediction"}])
def test_unknown_settings_are_refused(wrong):
    with pytest.raises(WeightsError, match=next(iter(wrong))):
        read_config(NoiseConfig, wrong, "here.json")


def test_add_noise_ddpm_eq4():
    """DDPM eq. 4 in closed form is what T steps of DDPM eq. 2 give: same mean, same variance."""
    mean, variance = 1.0, 0.0
    a_bar = SCHEDULE.alphas_cumprod.double()
    alphas = a_bar / torch.cat([torch.ones(1, dtype=torch.float64), a_bar[:-1]])
    for t, alpha in enumerate(alphas.tolist()):
        mean, variance = alpha**0.5 * mean, alpha * variance + 1 - alpha  # DDPM eq. 2
        if t in (0, 499, 999):
            one, zero, at = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([t])
            assert add_noise(SCHEDULE, one, zero, at).item() == pytest.approx(mean, rel=1e-5)
            assert add_noise(SCHEDULE, zero, one, at).item() ** 2 == pytest.approx(variance, rel=1e-5)


def test_add_noise_takes_each_sample_at_its_own_time():
    x0, noise, t = latents(3, 4, 2, 2), latents(3, 4, 2, 2, seed=1), torch.tensor([0, 500, 999])
    together = add_noise(SCHEDULE, x0, noise, t)
    for i in range(3):
        assert torch.equal(together[i : i + 1], add_noise(SCHEDULE, x0[i : i + 1], noise[i : i + 1], t[i : i + 1]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_noise_is_computed_in_fp32(dtype):
    """The fp16 trap: with a_bar cast to fp16 first, 1 - a_bar[0] is 15 % wrong, and the noise at t = 0 is 7 % too strong."""
    noise = torch.ones(1, 1, 1, 1, dtype=dtype)
    x_t = add_noise(SCHEDULE, torch.zeros_like(noise), noise, torch.tensor([0]))
    assert x_t.dtype == dtype
    a_bar = SCHEDULE.alphas_cumprod[0]
    assert x_t.item() == (1 - a_bar).sqrt().to(dtype).item()
    trap = (1 - a_bar.half()).item() / (1 - a_bar).item()
    assert (trap, trap**0.5) == (pytest.approx(1.15, abs=0.005), pytest.approx(1.07, abs=0.005))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_v_target_keeps_the_dtype(dtype):
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction"))
    x0 = latents(2, 4, 2, 2).to(dtype)
    target = training_target(schedule, x0, x0, torch.tensor([3, 900]))
    assert target.dtype == dtype
    assert target.shape == x0.shape


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_read_output_undoes_add_noise(prediction):
    """DDPM eq. 15 for eps, 2202.00512 appendix D for v: a perfect answer gives back x0 and eps at every timestep."""
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type=prediction))
    x0, noise = latents(1000, 1, 2, 2).double(), latents(1000, 1, 2, 2, seed=1).double()
    x_t = add_noise(schedule, x0, noise, T_ALL)
    a_bar = schedule.alphas_cumprod.view(-1, 1, 1, 1)
    got_x0, got_eps = read_output(training_target(schedule, x0, noise, T_ALL), x_t, a_bar, prediction)
    # not 1e-15: the square roots are taken of the fp32 table, in fp32
    torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_eps, noise, rtol=0, atol=1e-5)


def test_v_is_the_velocity_on_the_circle():
    """2202.00512, appendix D: with sqrt(a_bar) = cos phi, v is d x_t / d phi, and x_t = x0 cos phi + eps sin phi."""
    phi = 0.7
    a_bar = torch.cos(torch.tensor(phi)).item() ** 2
    x0, eps = latents(1, 1, 3, 3), latents(1, 1, 3, 3, seed=1)
    x_t = torch.autograd.functional.jvp(
        lambda angle: x0 * angle.cos() + eps * angle.sin(), torch.tensor(phi), torch.tensor(1.0)
    )
    got_x0, got_eps = read_output(x_t[1], x_t[0], a_bar, "v_prediction")
    torch.testing.assert_close(got_x0, x0)
    torch.testing.assert_close(got_eps, eps)


# ------------------------------------------------------------------------------------------------------------- zero SNR


def test_zero_terminal_snr_algorithm1():
    """2305.08891: sqrt(a_bar) shifted to end at 0 and stretched to begin where it did; training and sampling see that."""
    schedule = NoiseSchedule.from_config(NoiseConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True))
    before, after = SCHEDULE.alphas_cumprod.sqrt(), schedule.alphas_cumprod.sqrt()
    assert after[999] == 0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-6)
    expected = (before - before[999]) * before[0] / (before[0] - before[999])
    torch.testing.assert_close(after, expected, rtol=2e-5, atol=1e-6)
    assert schedule.sigmas[999].item() == pytest.approx(4096, rel=1e-6)  # of a_bar = 2^-24
    torch.testing.assert_close(schedule.sigmas[:999], ((1 - after[:999] ** 2) / after[:999] ** 2).sqrt())
    x0, noise = latents(1, 1, 2, 2), latents(1, 1, 2, 2, seed=1)
    assert torch.equal(add_noise(schedule, x0, noise, torch.tensor([999])), noise)
    assert torch.equal(training_target(schedule, x0, noise, torch.tensor([999])), -x0)


def test_zero_terminal_snr_of_betas():
    betas = zero_terminal_snr(torch.full((10,), 0.1))
    assert betas[0].item() == pytest.approx(0.1) and betas[-1] == 1 and ((betas > 0) & (betas <= 1)).all()


def test_zero_snr_needs_v_prediction():
    with pytest.raises(WeightsError, match="here.json.*needs v_prediction"):
        read_config(NoiseConfig, {"rescale_betas_zero_snr": True}, "here.json")


# ------------------------------------------------------------------------------------------------- scheduler_config.json


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_file_names_the_sampler_and_back(sampler, recwarn):
    values = scheduler_values(NoiseConfig(prediction_type="v_prediction", use_karras_sigmas=True), sampler)
    assert sampler_of(values, "here.json") == sampler
    assert read_config(NoiseConfig, values, "here.json").use_karras_sigmas
    assert not recwarn
    if sampler == "pndm":
        assert values["skip_prk_steps"]


def test_what_is_off_is_not_written():
    values = config_values(NoiseConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True), "DDIMScheduler")
    assert values["rescale_betas_zero_snr"] and "use_karras_sigmas" not in values
    assert read_config(NoiseConfig, values, "") == NoiseConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)


@pytest.mark.parametrize(
    ("values", "sampler", "said"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpm++_2m", "solver_order is 3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "dpm++_2m", "algorithm_type"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}, "dpm++_2m_sde", "algorithm_type"),
        ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}, "unipc", "final_sigmas_type"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "euler", "use_beta_sigmas is True"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0}, "euler", "sigma_max is 700"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "ddim", "thresholding is True"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 100}, "lcm", "original_inference_steps is 100"),
        ({"_class_name": "KDPM2DiscreteScheduler"}, "ddim", "KDPM2DiscreteScheduler is not among"),
    ],
    ids=str,
)
def test_other_pictures_are_announced(values, sampler, said):
    with pytest.warns(UserWarning, match=f"here.json: .*{said}"):
        assert sampler_of(values, "here.json") == sampler


def test_usual_settings_are_not_announced(recwarn):
    usual = {"solver_order": 2, "solver_type": "midpoint", "thresholding": False, "lower_order_final": True}
    assert sampler_of({"_class_name": "DPMSolverMultistepScheduler", **usual}, "") == "dpm++_2m"
    assert sampler_of({"_class_name": "UniPCMultistepScheduler", **usual}, "") == "unipc"
    assert sampler_of({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "") == sampler_of({}, "") == "pndm"
    assert not recwarn
