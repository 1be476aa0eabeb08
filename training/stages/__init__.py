"""The trainings: what each supplies to the loop, and the way from flags to a finished run."""
