"""What the network is: modules and nothing else. No files are read here, and no diffusion maths is done.

attention.py  softmax(q kᵀ / √d) v, and the layer around it
tiled.py      the same in tiles, in plain PyTorch: the algorithm to read
flash*.py     the same as Triton kernels, forward and backward; imported only when used
blocks.py     the bricks: time embedding, ResBlock, transformer block, down- and upsampling
layers.py     convolutions and linears: frozen ones keep nothing, and may be stored in fewer bits
lean.py       norms and other operations that keep less for the backward pass, and give the same numbers
cpu.py        how a CPU computes convolutions and linears fast
unet.py       the denoiser
vae.py        the autoencoder between pictures and latents
prompt.py     the prompt language: weights, BREAK, LoRA tags
text.py       CLIP's text tower: prompt -> (B, 77 k, D)
tokens.py     how CLIP splits a prompt, to look at
"""
