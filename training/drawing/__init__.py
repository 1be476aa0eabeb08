"""Pictures from captions: what is asked for, how it is drawn, and how it is drawn again."""
