"""Pictures from a trained run: requests, what steers them, the drawing itself, and drawing the same again."""
