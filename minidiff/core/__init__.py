"""The textbook: Stable Diffusion and its fine-tuning, in plain PyTorch. It imports nothing else of minidiff. The reading order:

What the network is
    config              the sizes of the networks
    attention           attention, eq. 1; the transformer through which the prompt enters the picture
    blocks              convolutions: the ResBlock, one step down, one step up, the timestep as numbers
    unet                the denoiser, as a picture of itself
    controlnet          a second way down, for a picture as condition
    vae                 the autoencoder between pictures and latents
    text                prompt -> ids -> (B, 77, D)

From noise to a picture
    schedule            how much noise there is at time t
    samplers            eleven rules: one step from a noisy latent to a less noisy one
    grids               which timesteps and noise levels each sampler visits
    guidance            ask the network with and without the prompt
    generate            the three stations: text, denoising, picture

How it learns
    losses              the squared error, DreamBooth's second term, min-SNR weights
    lora                W + scale B A beside one layer; DoRA
    inject              adapters in a whole model, and out again
    textual_inversion   the vector of a new word
    ip_adapter          a picture as a prompt: a cross-attention of its own beside the text's
    train               the loop
    recipes             the ways of fine-tuning, side by side: what moves
    errors, rng         one kind of error; randomness without state
"""
