"""How we fit: one loop, and a recipe of about 40 lines for each way of fine-tuning.

settings.py -> folders.py -> data.py -> optim.py -> checkpoint.py -> loop.py -> recipes.py: each imports only from those
before it. muon.py is an optimizer for pretraining.
"""
