"""The maths of diffusion: pure functions on tensors. No modules, no files, no state."""
