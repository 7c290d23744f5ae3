"""The pipeline: from prompts, pictures and masks to pictures, with the names that diffusers uses."""
