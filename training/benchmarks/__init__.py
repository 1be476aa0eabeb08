"""What this costs beside others: each module declares its `flags` and prints its numbers in `run`."""
