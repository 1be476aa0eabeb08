"""Weights that torchvision and lpips publish as pickles alone: read by hash, and as tensors only. No other pickle is.

A file counts as torchvision's where its sha256 begins as the name it is published under says (8 digits), as one of
lpips' where all of it is that of version 0.1.4. Even then `weights_only` keeps the unpickler from calling anything.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from training.errors import CHECKPOINT, DATA, UserError
from training.files import file_sha256
from training.messages import rewrites, tell
from training.tensors import Pickled, load_tensors

if TYPE_CHECKING:
    from torch import Tensor

ADDRESS = "https://download.pytorch.org/models/"
FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
    "inception": "inception_v3_google-0cc3c7bd.pth",
}
HEADS = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    "squeeze": "4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
}
CONVERT = "import sys, torch, safetensors.torch as s; _, a, b = sys.argv; s.save_file(torch.load(a), b)"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that torchvision publishes. Raises UserError (code 3) for others."""
    import torch

    try:
        return load_tensors(path)
    except Pickled:
        known = {name.rpartition("-")[2].removesuffix(".pth") for name in FILES.values()}
        if file_sha256(path)[:8] not in known:
            reason = f"{path}: refusing to load a pickle file that is not one of torchvision's by its sha256"
            command = f"python -c '{CONVERT}' {shlex.quote(str(path))} weights.safetensors"
            hint = f"where you trust its source: {command}, and give that"
            raise UserError(reason, hint=hint, code=DATA) from None
    except UserError as problem:
        raise UserError(problem.what, hint="is this the right file?", code=DATA) from None
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as failure:  # a damaged file makes torch.load raise almost anything
        reason = f"{path}: not a file of weights ({type(failure).__name__})"
        raise UserError(reason, hint="download it again", code=DATA) from None


def standard_weights(net: str) -> dict[str, Tensor]:
    """torchvision's weights of LPIPS' backbone `net`, downloaded once. OSError where they are not to be had."""
    from torch import hub

    path = Path(hub.get_dir()) / "checkpoints" / FILES[net]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digits = FILES[net].rpartition("-")[2].removesuffix(".pth")
        tell(f"downloading {path}")
        hub.download_url_to_file(ADDRESS + FILES[net], str(path), hash_prefix=digits, progress=rewrites())
    return read_weights(path)  # torchvision's own reader unpickles what lies there, and anything in it


def check_heads(net: str) -> None:
    """Raises UserError where the linear layers of the lpips package, pickles, are not those of version 0.1.4."""
    import lpips

    file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    if not file.is_file() or file_sha256(file) != HEADS[net]:
        what = f"{file.name} of the lpips package is not that of version 0.1.4; it is a pickle, and is not read"
        raise UserError(what, hint="run: pip install --force-reinstall --no-deps lpips==0.1.4", code=CHECKPOINT)
