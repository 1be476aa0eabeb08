"""The comparisons of the suite. A new one is a `Case` in a module here, which lists it in its `CASES`."""

from ldm.families import members

# As they are told; kinds that are not named here come after.
ORDER = ("dit", "pixart", "unet", "autoencoder", "encode", "decode", "light", "latents", "loop", "sampling",
         "memory-dit", "memory-unet", "memory-autoencoder", "startup")  # fmt: skip
CASES = members(__name__, "CASES", ORDER)

__all__ = ["CASES"]
