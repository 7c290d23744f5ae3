"""The textbook: Stable Diffusion and its fine-tuning, in plain PyTorch. It imports nothing else of minidiff."""
