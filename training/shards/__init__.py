"""Tars of samples and their index, on disk or at an address."""
