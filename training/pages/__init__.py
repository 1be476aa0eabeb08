"""HTML pages of runs: what run folders hold, read and shown. Only the page is written."""
