"""What a training step reads: whole batches by slot, whichever process reads them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.images import Images
from training.data.latents import Latents, finite
from training.data.loader import stream
from training.data.order import Batches, DataOrder, Slot
from training.data.samples import Batch
from training.errors import UserError
from training.shards.index import write_index
from training.shards.reading import ShardSet
from training.shards.writing import ShardWriter


def pack(folder: Path, fields: list[dict[str, bytes]], summary: dict[str, object], kind: str = "images") -> ShardSet:
    folder.mkdir()
    writer = ShardWriter(folder, "train")
    for i, field in enumerate(fields):
        writer.add(f"{i:04d}", field)
    write_index(folder, writer.finish(), summary, kind)  # type: ignore[arg-type]
    return ShardSet(folder)


def png(size: tuple[int, int], value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def slots(count: int, epoch: int = 0) -> list[Slot]:
    return [Slot(i, epoch, epoch * count + i) for i in range(count)]


def test_images(shapes: Path) -> None:
    shards = ShardSet(shapes)
    batch = Images(shards).__getitems__(slots(5))
    assert batch.data.shape == (5, 3, 32, 32) and batch.data.dtype == torch.uint8
    assert batch.slots.tolist() == [0, 1, 2, 3, 4]
    for i in range(5):
        theirs = np.asarray(Image.open(io.BytesIO(shards.read_field(i, "png"))).convert("RGB"))
        assert np.array_equal(batch.data[i].permute(1, 2, 0).numpy(), theirs)


class Placed(list[int]):
    """A split in shards of these sizes, at an address where there is a window."""

    def __init__(self, sizes: list[int], window: int) -> None:
        super().__init__(range(sum(sizes)))
        self.shards = SimpleNamespace(windows=(tuple(sizes), window) if window else ((), 0), buckets={})


@pytest.mark.parametrize(
    ("sizes", "window", "count", "places"),
    [
        ([5, 5], 0, 0, range(10)),
        ([5, 5], 0, 10, range(10)),
        ([5, 5], 0, 11, range(10)),
        ([5, 5], 0, 4, [0, 2, 5, 7]),
        ([5, 5], 0, 1, [0]),
        ([2] * 8, 2, 4, [0, 1, 8, 9]),  # two shards, far apart
        ([2] * 8, 2, 3, [0, 1, 8]),
        ([2] * 8, 2, 6, [0, 1, 4, 5, 10, 11]),  # more are asked for than two shards hold
        ([2] * 8, 2, 0, range(16)),
        ([4], 2, 2, [0, 2]),
    ],
)
def test_a_part_of_a_split_lies_evenly_over_it(
    sizes: list[int], window: int, count: int, places: Sequence[int]
) -> None:
    """A folder lies class after class; of shards at an address, each of which is fetched, few are looked into."""
    assert list(Images.evenly(Placed(sizes, window), count)) == list(places)  # type: ignore[arg-type]


def test_a_part_of_a_split_in_classes_has_all_of_them() -> None:
    """156 pictures of 20 classes, one class after another: the first 64 are of 9."""
    classes = [number for number in range(20) for _ in range(8 if number < 16 else 7)]
    places = Images.evenly(Placed([156], 0), 64)  # type: ignore[arg-type]
    assert {classes[place] for place in places} == set(range(20)) and len(set(places)) == 64


def test_flips_are_keyed_by_seed_epoch_and_sample(shapes: Path) -> None:
    shards = ShardSet(shapes)
    plain = Images(shards).__getitems__(slots(96)).data

    def mirrored(seed: int, epoch: int, order: list[int]) -> dict[int, bool]:
        chosen = [slots(96, epoch)[i] for i in order]
        data = Images(shards, flip=True, seed=seed).__getitems__(chosen).data
        for image, slot in zip(data, chosen, strict=True):
            assert any(torch.equal(image, way) for way in (plain[slot.index], plain[slot.index].flip(-1)))
        return {s.index: not torch.equal(image, plain[s.index]) for image, s in zip(data, chosen, strict=True)}

    first = mirrored(0, 0, list(range(96)))
    assert 25 < sum(first.values()) < 71
    assert mirrored(0, 0, list(reversed(range(96)))) == first
    assert mirrored(0, 1, list(range(96))) != first != mirrored(1, 0, list(range(96)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_does_not_depend_on_workers(shapes: Path, workers: int) -> None:
    images = Images(ShardSet(shapes), flip=True, seed=3)
    batches = Batches(DataOrder(96, 20, 3), 5, 2, 1, 2, 1, 7)
    read = list(stream(images, batches, workers))
    assert len(read) == 12
    for batch, wanted in zip(read, batches, strict=True):
        expected = images.__getitems__(wanted)
        assert torch.equal(batch.data, expected.data) and torch.equal(batch.slots, expected.slots)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_keeps_its_code_and_hint_across_processes(tmp_path: Path, workers: int) -> None:
    shards = pack(tmp_path / "x", [{"png": png((32, 32))}, {"png": b"no picture"}], {})
    with pytest.raises(UserError, match="0001: not a readable picture") as caught:
        list(stream(Images(shards, on_bad_data="error"), Batches(DataOrder(2, 2, 0), 2, 1, 0, 1, 0, 1), workers))
    assert caught.value.code == 3 and "verify" in caught.value.hint and "Traceback" not in caught.value.what


def test_pictures_of_several_sizes(tmp_path: Path) -> None:
    shards = pack(tmp_path / "x", [{"png": png((32, 32))}, {"png": png((40, 32))}], {})
    with pytest.raises(UserError, match=r"different sizes in one batch \(32x32, 40x32\)"):
        Images(shards).__getitems__(slots(2))


def test_images_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hold no pictures") as caught:
        Images(pack(tmp_path / "x", [{"txt": b"a"}], {}))
    assert caught.value.code == 3


def latent(value: float, captions: list[str], dtype: str = "float16") -> dict[str, bytes]:
    moments = np.full((4, 2, 2), value, dtype)
    return {
        "moments.npy": npy(moments),
        "mirror.npy": npy(-moments),
        "json": json.dumps({"captions": captions}).encode(),
    }


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents(tmp_path: Path, dtype: str) -> None:
    fields = [latent(i + 1, [f"{i} a", f"{i} b"], dtype) for i in range(40)]
    shards = pack(tmp_path / "x", fields, {"latent": {"shape": [4, 2, 2], "dtype": dtype}}, "latents")
    batch: Batch = Latents(shards).__getitems__(slots(40))
    assert batch.data.dtype == torch.float32 and batch.text is None
    assert torch.equal(batch.data, torch.arange(1.0, 41).view(40, 1, 1, 1).expand(40, 4, 2, 2))
    assert 8 < sum(c.endswith("b") for c in batch.captions) < 32  # one of its captions, each time
    assert all(c.startswith(f"{i} ") for i, c in enumerate(batch.captions))
    assert Latents(shards).__getitems__(slots(40, 1)).captions != batch.captions
    signs = Latents(shards, flip=True).__getitems__(slots(40)).data[:, 0, 0, 0].sign()
    assert 8 < (signs < 0).sum() < 32


def test_latents_that_do_not_fit(tmp_path: Path, shapes: Path) -> None:
    with pytest.raises(UserError, match="hold no latents") as caught:
        Latents(ShardSet(shapes))
    assert "encode_latents.py" in caught.value.hint and caught.value.code == 3
    plain = {name: data for name, data in latent(1, ["a"]).items() if name != "mirror.npy"}
    shards = pack(tmp_path / "x", [plain], {"latent": {"shape": [4, 2, 2], "dtype": "float16"}}, "latents")
    with pytest.raises(UserError, match="no mirrored images") as caught:
        Latents(shards, flip=True)
    assert "--flip" in caught.value.hint


LATENT = {"latent": {"shape": [2, 1, 1], "dtype": "float32", "picture": [8, 8]}, "encoder": "e"}


def with_hints(folder: Path, **more: bytes) -> ShardSet:
    """Three latents of a number each, with the edges of 10 times that number; mirrored ones are negative."""
    rows = []
    for n in (1.0, 2.0, 3.0):
        fields = {"moments.npy": npy(np.full((2, 1, 1), n, np.float32)), "json": b'{"captions": ["x"]}'}
        fields |= {"extra-edges.npy": npy(np.full((1, 4, 4), 10 * n, np.float16))}
        fields |= {"mirror.npy": npy(np.full((2, 1, 1), -n, np.float32))}
        rows.append({**fields, **more})
    return pack(folder, rows, LATENT, "latents")


def test_further_fields_are_handed_on(tmp_path: Path) -> None:
    """By name, in float32, each its own sample's: the mirrored one beside mirrored latents."""
    batch = Latents(with_hints(tmp_path / "plain")).__getitems__(slots(3)[::-1])
    edges = batch.extras["edges"]
    assert list(batch.extras) == ["edges"] and edges.dtype == torch.float32 and edges.shape == (3, 1, 4, 4)
    assert torch.equal(edges[:, 0, 0, 0], 10 * batch.data[:, 0, 0, 0])
    mirrored = npy(np.full((1, 4, 4), -7.0, np.float16))
    both = Latents(with_hints(tmp_path / "both", **{"mirror-edges.npy": mirrored}), flip=True)
    found = both.__getitems__([Slot(i % 3, i // 3, i) for i in range(30)])
    turned = found.data[:, 0, 0, 0] < 0
    assert 0 < turned.sum() < 30 and torch.equal(found.extras["edges"][:, 0, 0, 0] == -7, turned)


def test_pictures_among_further_fields_come_in_0_to_1(tmp_path: Path) -> None:
    """uint8 is a picture; the same numbers of another type stay what they are."""
    values = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3)
    for kind, wanted in ((np.uint8, [0.0, 0.2, 1.0]), (np.int64, [0.0, 51.0, 255.0])):
        more = {f"{field}.npy": npy(values.astype(kind)) for field in ("extra-image", "mirror-image", "mirror-edges")}
        for flip in (False, True):
            data = Latents(with_hints(tmp_path / f"{np.dtype(kind)}{flip}", **more), flip=flip)
            image = data.__getitems__([Slot(i % 3, 0, i) for i in range(9)]).extras["image"]
            assert image.dtype == torch.float32 and image.shape == (9, 1, 1, 3)
            assert torch.equal(image, torch.tensor(wanted).expand(9, 1, 1, 3))


def test_further_fields_that_are_not_sound(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no mirrored edges"):
        Latents(with_hints(tmp_path / "half"), flip=True)
    for name, data in {"bytes": b"no array", "nan": npy(np.full((1, 4, 4), np.nan))}.items():
        shards = with_hints(tmp_path / name, **{"extra-edges.npy": data})
        with pytest.raises(UserError, match="extra-edges.npy"):
            Latents(shards, on_bad_data="error").__getitems__(slots(1))


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_numbers_are_finite_as_numpy_says(dtype: str) -> None:
    """The largest of each sign, the smallest, and zero are; infinities and NaN of either sign are not."""
    largest = np.finfo(dtype).max
    sound = np.array([largest, -largest, np.finfo(dtype).smallest_subnormal, 0, -0.0], dtype)
    assert finite(sound)
    for value in (np.inf, -np.inf, np.nan, -np.nan):
        for place in range(len(sound)):
            broken = sound.copy()
            broken[place] = value
            assert not finite(broken)
