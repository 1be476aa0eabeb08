"""Configs, their families of kinds, and the command line. Free of torch."""
