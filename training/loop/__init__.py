"""The one training loop, and what it keeps: averages, optimisers, validation, watchdogs, state."""
