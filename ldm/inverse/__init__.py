"""Inverse problems y = A x0 + sigma_y n: operators, measurements that wrap a denoiser, and posterior samplers."""
