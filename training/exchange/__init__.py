"""Models of other programs, in and out: diffusers, Stable Diffusion's single files, LoRA files, graphs."""
