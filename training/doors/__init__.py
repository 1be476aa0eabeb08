"""The command line, one module a verb: flags in, then a call into the rooms below.

`scripts/` opens these doors from a checkout, the installed commands from anywhere.
"""
