"""Pictures as pixels: decoding, grids, strips, pages."""
