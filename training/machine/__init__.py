"""Processes, devices, memory, signals, and faults made on purpose."""
