"""How we fit: one loop, and a recipe of about 40 lines for each way of fine-tuning.

settings.py -> folders.py -> data.py -> optim.py -> checkpoint.py -> loop.py -> recipes.py: each imports only from those
before it. adam8bit_kernel.py is adam8bit.py for a GPU, in Triton. muon.py is an optimizer for pretraining.
"""
