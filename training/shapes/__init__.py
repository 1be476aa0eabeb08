"""The embedded data set: captioned pictures of simple shapes, drawn, worded and judged."""
