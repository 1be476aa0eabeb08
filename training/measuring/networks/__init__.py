"""The networks that pictures are measured in, one kind a file."""
