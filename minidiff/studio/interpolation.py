"""The way from one latent to another: straight, or around the sphere that noise lives on.

| in the code | in the papers                                                                                       |
|-------------|-----------------------------------------------------------------------------------------------------|
| `a`, `b`    | q1, q2: unit quaternions with Shoemake, here whole latents, each as one long vector                 |
| `t`         | u, from 0 (a) to 1 (b)                                                                              |
| `angle`     | theta, between the two                                                                              |

Why not straight? Noise of n numbers is about √n long, always. Halfway along the straight line between two noises it is
√(n/2) long: the network has never seen noise as weak as that, and draws fog. The arc keeps the length.
Shapes: B pictures, … anything.
"""

import torch
from torch import Tensor

from minidiff.core.errors import SettingsError

PARALLEL = 1e-4  # radians: below, arc and line agree to 1e-9 of their length, and at 0 the arc is 0 / 0
OPPOSITE = 1e-3  # radians from half a turn: every way round is as short as any other


def lerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b: the straight line, from exactly a at t = 0 to exactly b at t = 1. Any two equal shapes."""
    check(a, b, t)
    return a if t == 0 else b if t == 1 else (1 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b: the arc (Shoemake, "Animating Rotation with Quaternion Curves",
    SIGGRAPH 1985, section 3.3), at an even speed; exactly a at t = 0 and b at t = 1.

    a, b (B, …): each picture is one vector and has its own angle θ. Where the two are equally long, all between them is
    as long. SettingsError for vectors that point opposite ways, or nowhere.
    """
    check(a, b, t)
    if t in (0, 1):
        return a if t == 0 else b
    angle = angle_between(a, b)  # (B, 1, …), fp64
    near = angle < PARALLEL
    sine = torch.where(near, 1.0, angle.sin())
    of_a = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)  # Shoemake 1985, section 3.3
    of_b = torch.where(near, t, (t * angle).sin() / sine)
    return of_a.to(a.dtype) * a + of_b.to(a.dtype) * b


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle of each pair of vectors in radians, (B, 1, …) in fp64.

    2 atan2(|u - v|, |u + v|) for unit vectors u, v (Kahan, "How Futile are Mindless Assessments of Roundoff", 2006,
    section 12): exact for small angles too, where the arc cosine has lost half of its digits.
    """
    u, v = (x.double().flatten(1) for x in (a, b))
    lengths = [x.norm(dim=1, keepdim=True) for x in (u, v)]
    if not all((length > 0).all() and length.isfinite().all() for length in lengths):
        raise SettingsError("slerp: one of the two is zero or not finite, so it points nowhere; give two noises.")
    u, v = u / lengths[0], v / lengths[1]
    angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    if (angle > torch.pi - OPPOSITE).any():
        raise SettingsError("slerp: the two point opposite ways, and no way round is the shortest; take another seed.")
    return angle.reshape(-1, *[1] * (a.ndim - 1))


def check(a: Tensor, b: Tensor, t: float) -> None:
    """Two equal shapes, and a place between them."""
    if a.shape != b.shape:
        raise SettingsError(f"no way leads from {tuple(a.shape)} to {tuple(b.shape)}: the shapes differ.")
    if not 0 <= t <= 1:
        raise SettingsError(f"t is {t}; the way goes from 0 to 1.")
