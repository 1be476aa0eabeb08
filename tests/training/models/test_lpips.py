"""LPIPS with weights by file: the values of the lpips package with the same weights; other files are refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lpips
import pytest
import torch
import torchvision

from training.errors import UserError
from training.models.lpips import load_distance, load_perceptual
from training.tensors import save_tensors

BUILDERS = {"alex": "alexnet", "squeeze": "squeezenet1_1", "vgg": "vgg16"}  # the names of torchvision
pytestmark = pytest.mark.filterwarnings("ignore")  # torchvision's, of the flags that lpips gives it


def features(net: str) -> Any:
    """The convolutions of a seeded torchvision network, as `features` of a module."""
    torch.manual_seed(5)
    return torch.nn.ModuleDict({"features": getattr(torchvision.models, BUILDERS[net])().features})


def written(backbone: torch.nn.Module, path: Path) -> str:
    """`path` with the weights of `backbone`, as torchvision's own files name them."""
    save_tensors(path, backbone.state_dict())
    return str(path)


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
def test_weights_by_file(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backbone's from the file, the linear layers' from the package."""
    backbone = features(net)
    ours = load_perceptual(net, "standard", written(backbone, tmp_path / "weights.safetensors"))
    monkeypatch.setattr(torchvision.models, BUILDERS[net], lambda **_: backbone)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)  # cuts up the network that it is given
    x_hat, images = (torch.rand(2, 3, 40, 40) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        expected = theirs(x_hat, images).flatten()
    torch.testing.assert_close(ours(x_hat, images), expected, rtol=1e-5, atol=1e-7)
    assert (expected > 1e-5).all()
    random = load_perceptual(net, "random")
    assert not torch.allclose(random(x_hat, images), expected, rtol=0.01)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    squeeze = written(features("squeeze"), tmp_path / "squeeze.safetensors")
    with pytest.raises(UserError, match=r"squeeze.safetensors: lacks features\..*: another network\?") as e:
        load_perceptual("alex", "standard", squeeze)
    assert e.value.code == 3 and "torchvision's weights of that network" in e.value.hint
    shapes = {name: value[..., :1] for name, value in features("alex").state_dict().items()}
    save_tensors(tmp_path / "shapes.safetensors", {f"features.{name}": value for name, value in shapes.items()})
    with pytest.raises(UserError, match=r"lacks features\.0\.weight of shape \(64, 3, 11, 11\)"):
        load_perceptual("alex", "standard", str(tmp_path / "shapes.safetensors"))
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(UserError, match="text.pth: not a safetensors file") as e:
        load_perceptual("alex", "standard", str(tmp_path / "text.pth"))
    assert e.value.code == 3
    with pytest.raises(UserError, match="no such file") as e:
        load_perceptual("alex", "standard", str(tmp_path / "none.pth"))
    assert e.value.code == 3


class Pictures(list[Any]):
    """Pictures in no buckets."""

    sizes = ()


@pytest.mark.parametrize(("side", "net", "hint"), [
    (24, "alex", "--lpips-net vgg or squeeze, or leave --lpips out"), (12, "vgg", "leave --lpips out"),
])  # fmt: skip
def test_one_rule_for_what_is_too_small(side: int, net: str, hint: str) -> None:
    """That of training: pictures that a run could train with can be measured with the same network."""
    pictures: Any = Pictures([SimpleNamespace(data=torch.zeros(1, 3, side, 2 * side, dtype=torch.uint8))])
    with pytest.raises(UserError, match=f"the pictures are {2 * side}x{side}, LPIPS on {net} needs") as caught:
        load_distance(Namespace(lpips="random", lpips_net=net), pictures, torch.device("cpu"))
    assert caught.value.hint == hint
    if side == 24:
        network = load_distance(Namespace(lpips="random", lpips_net="vgg"), pictures, torch.device("cpu"))
        assert network is not None and network(torch.zeros(1, 3, 24, 24), torch.ones(1, 3, 24, 24)).isfinite().all()
