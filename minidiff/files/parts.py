"""One module's adapter as the tensors that files hold, and as `LoRAWeights`.

    down            A: (r, in), or (r, in, kh, kw) for a convolution
    up              B: (out, r) or (out, r, 1, 1)
    mid             LoCon in Tucker's form only: (r, r, kh, kw), between a down and an up of 1 x 1
    alpha           kohya's scale · r, one number
    magnitude       peft's DoRA: (out,), for convolutions (1, out, 1, 1)
    dora_scale      LyCORIS' DoRA: (out, 1[, 1, 1]), or in older files (1, in[, 1, 1])

The two ways to write DoRA's magnitude collide at (1, n, 1, 1), so a part is never read under the other's name.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.core.errors import AdapterError
from minidiff.core.lora import LoRAWeights
from minidiff.files.peft_config import alpha_of
from minidiff.files.weights import WEIGHT_DTYPES, TensorInfo, is_finite

Shape = tuple[int, ...]

# --- reading -----------------------------------------------------------------------------------------------------------


def check_parts(where: str, parts: Mapping[str, TensorInfo]) -> None:
    """AdapterError unless a module's tensors are whole, and fit each other; `where` begins the message."""
    if "down" not in parts or "up" not in parts:
        there = ", ".join(f"{info.key} {info.shape}" for info in parts.values())
        raise AdapterError(f"{where} has {there} and not the other half: the file is incomplete. Get it again.")
    if odd := [info for part, info in parts.items() if part != "alpha" and info.dtype not in WEIGHT_DTYPES]:
        raise AdapterError(f"{where}: {odd[0].key} is of type {odd[0].dtype}; a LoRA is of floating-point numbers.")
    down, up = parts["down"].shape, parts["up"].shape
    shapes = f"down is {down}, up is {up}"
    if len(down) not in (2, 4) or flat(up) != up[:2] or not all(down + up):
        raise AdapterError(f"{where}: odd shapes: {shapes}; they should be (r, in) or (r, in, kh, kw), and (out, r).")
    if "mid" in parts:
        mid = parts["mid"].shape
        if len(mid) != 4 or mid[:2] != (up[1], down[0]) or flat(down) != down[:2] or not all(mid):
            raise AdapterError(f"{where}: the kernel between down and up does not fit them: it is {mid}, {shapes}.")
    elif down[0] != up[1]:
        raise AdapterError(f"{where}: the ranks differ: {shapes}. The file is damaged; get it again.")
    if "alpha" in parts and parts["alpha"].shape not in ((), (1,)):
        raise AdapterError(f"{where}: alpha has the shape {parts['alpha'].shape}; it should be one number.")
    if "magnitude" in parts and "dora_scale" in parts:
        raise AdapterError(f"{where} has two magnitudes: {parts['magnitude'].key} and {parts['dora_scale'].key}.")


def flat(shape: Shape) -> Shape:
    """(out, in) for 1 x 1 convolutions too, which files hold with four axes or with two."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def changed_shape(parts: Mapping[str, TensorInfo]) -> Shape:
    """The shape of the W that a module's tensors change, `flat`."""
    kernel = parts.get("mid", parts["down"]).shape[2:]
    return flat((parts["up"].shape[0], parts["down"].shape[1], *kernel))


def weights_of(where: str, parts: Mapping[str, Tensor], scale: float) -> LoRAWeights:
    """One module in minidiff's form, fp32."""
    A, B = parts["down"].float(), parts["up"].float().flatten(1)
    if "mid" in parts:  # ΔW_oi = U_or M_rs V_si: the kernel M joins the way down V, exactly
        A = torch.einsum("rshw,si->rihw", parts["mid"].float(), A.flatten(1))
    weights = LoRAWeights(A.contiguous(), B, scale)
    rows, columns = (len(B), 1, *[1] * (A.ndim - 2)), (1, A.shape[1], *[1] * (A.ndim - 2))
    if "magnitude" in parts:
        return replace(weights, magnitude=shaped(where, parts["magnitude"], rows))
    if "dora_scale" in parts:
        m = parts["dora_scale"]
        by_columns = m.shape[:2] == columns[:2] and m.shape[0] != len(B)
        return replace(weights, magnitude=shaped(where, m, columns if by_columns else rows))
    return weights


def shaped(where: str, m: Tensor, shape: Shape) -> Tensor:
    if m.numel() != max(shape):
        raise AdapterError(f"{where}: DoRA's magnitude is {tuple(m.shape)}; for this layer it should be {shape}.")
    return m.float().reshape(shape)


def fitted(weights: LoRAWeights, W: Tensor) -> LoRAWeights:
    """With as many axes as W has: a 1 x 1 convolution in a file may be a linear layer in the model, and the other way."""

    def axes_of_W(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:2], *tensor.shape[2 : W.ndim], *[1] * (W.ndim - tensor.ndim))

    m = weights.magnitude
    return replace(weights, A=axes_of_W(weights.A), magnitude=None if m is None else axes_of_W(m))


# --- writing -----------------------------------------------------------------------------------------------------------


def parts_of(name: str, weights: LoRAWeights, dialect: str, torch_dtype: torch.dtype) -> dict[str, Tensor]:
    """One module as the tensors of a dialect that is written: "diffusers", "kohya" or "peft"."""
    A, B, m = weights.A, weights.B, weights.magnitude
    parts = {"down": A, "up": B.reshape(*B.shape, *[1] * (A.ndim - 2))}
    if m is not None:
        if dialect == "kohya":
            parts["dora_scale"] = m
        elif m.shape[0] != len(B):
            raise AdapterError(
                f"{name}: its DoRA measures the columns of W, and {dialect} knows only rows. "
                f"Write it in the kohya style, or bake it into the model: minidiff merge bake."
            )
        else:
            parts["magnitude"] = m.flatten() if A.ndim == 2 else m.reshape(1, -1, 1, 1)
    parts = {part: tensor.to(torch_dtype) for part, tensor in parts.items()}
    if bad := [part for part, tensor in parts.items() if not is_finite(tensor)]:
        advice = "write it as fp32 or bf16" if torch_dtype == torch.float16 else "its weight is too large"
        raise AdapterError(f"{name}: its {bad[0]} has numbers that are not finite as {torch_dtype}; {advice}.")
    if dialect == "kohya":
        alpha = torch.tensor(float(alpha_of(weights)))
        rounded = alpha.to(torch_dtype)
        parts["alpha"] = rounded if rounded == alpha else alpha  # a rounded alpha would be another strength
    return parts
