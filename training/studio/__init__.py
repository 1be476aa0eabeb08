"""A page of this machine to draw, edit, restore, compare and look into pictures by hand."""
