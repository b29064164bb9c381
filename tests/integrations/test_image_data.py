"""IDX files, image batches and the image data modules."""

import gzip
import struct

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lossplug.errors import LossplugError
from lightning_lossplug.integrations import DigitsData, FashionMNISTData, IDXData, read_idx
from lightning_lossplug.integrations.data.images import ImageArrays
from lightning_lossplug.integrations.data.module import stratified_split


def idx_bytes(values, kind=8):
    header = bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.numpy().tobytes()


def write_idx(path, values):
    content = idx_bytes(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_set(folder, train=120, test=40, suffix=".gz"):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = (torch.arange(count) % 10).to(torch.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
    return folder


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), compressed=st.booleans(), seed=st.integers(0, 99))
def test_idx_round_trip(tmp_path_factory, shape, compressed, seed):
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path = tmp_path_factory.mktemp("idx") / ("x.gz" if compressed else "x")
    write_idx(path, values)
    read = read_idx(path)
    assert read.dtype == torch.uint8
    assert torch.equal(read, values)


WHOLE = idx_bytes(torch.arange(24, dtype=torch.uint8).reshape(4, 3, 2))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short", WHOLE[:-1], r"promises 24 values \(\[4, 3, 2\]\), the file has 23"),
        ("long", WHOLE + b"x", "promises 24 values .* the file has 25"),
        ("header", WHOLE[:9], "header is cut off"),
        ("empty", b"", "begins with nothing"),
        ("floats", idx_bytes(torch.zeros(2), kind=13), "begins with 00 00 0d 01"),
        ("png", b"\x89PNG\r\n\x1a\n", "not an IDX file of unsigned bytes: it begins with 89 50 4e 47"),
        ("no_dimension", bytes([0, 0, 8, 0, 5]), "begins with 00 00 08 00"),
        ("cut.gz", gzip.compress(WHOLE)[:-12], "gzip file is damaged or cut off"),
        ("plain.gz", WHOLE, "gzip file is damaged or cut off"),
    ],
)
def test_damaged_idx_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LossplugError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_missing_idx_file(tmp_path):
    with pytest.raises(LossplugError, match="no such file"):
        read_idx(tmp_path / "nothing")


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), part=st.floats(0, 1), seed=st.integers(0, 9))
def test_stratified_split_keeps_the_proportions(counts, part, seed):
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    first = round(part * len(labels))
    a, b = stratified_split(labels, [first, len(labels) - first], seed)
    assert sorted([*a.tolist(), *b.tolist()]) == list(range(len(labels)))
    for label, count in enumerate(counts):
        # a class's quantiles are 1 / count apart, the cut is at one place for all classes
        assert abs((labels[a] == label).sum().item() - count * first / len(labels)) <= 1 + count / len(labels)
    again, _ = stratified_split(labels, [first, len(labels) - first], seed)
    assert torch.equal(a, again)


def test_split_larger_than_the_data():
    with pytest.raises(LossplugError, match="there are 4"):
        stratified_split(torch.zeros(4), [3, 2], 0)


def arrays(count=6, size=28, **options):
    images = torch.randint(0, 256, (count, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return ImageArrays(images, torch.arange(count), **{"white": 255.0, "mean": 0.25, "std": 0.5, **options})


def test_batch_is_normalised_and_resized():
    data = arrays(img_size=40, channels=3)
    x, y = data.__getitems__([4, 1])
    assert x.shape == (2, 3, 40, 40)
    assert x.dtype == torch.float32
    assert y.tolist() == [4, 1]
    pixels = data.images[[4, 1]].float()[:, None] / 255
    wanted = (F.interpolate(pixels, size=(40, 40), mode="bilinear", antialias=True) - 0.25) / 0.5
    torch.testing.assert_close(x, wanted.repeat(1, 3, 1, 1))
    torch.testing.assert_close(data[4][0], x[0])


def test_stored_images_are_not_written_to():
    data = arrays(shift=3, flip=True)
    before = data.images.clone()
    data.__getitems__([0, 1, 2])
    assert torch.equal(data.images, before)


def test_augmentation_is_a_shift_and_a_flip():
    data = arrays(count=64, shift=3, flip=True, mean=0.0, std=1.0, with_index=True)
    x, _, index = data.__getitems__(list(range(64)))
    found = set()
    for image, original in zip(x[:, 0], data.images, strict=True):
        padded = F.pad(original.float() / 255, (3, 3, 3, 3))
        views = {
            (top, left, flip): padded[top : top + 28, left : left + 28].flip(1)
            if flip
            else padded[top : top + 28, left : left + 28]
            for top in range(7)
            for left in range(7)
            for flip in (False, True)
        }
        matches = [key for key, view in views.items() if torch.allclose(view, image)]
        assert len(matches) == 1
        found.add(matches[0])
    assert {flip for _, _, flip in found} == {False, True}
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(7))
    assert index.tolist() == list(range(64))


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    data = arrays(count=30, shift=3, flip=True)
    whole = data.__getitems__(list(range(30)))[0]
    torch.manual_seed(123)
    assert torch.equal(data.__getitems__([7, 29])[0], whole[[7, 29]])
    data.set_epoch(1)
    assert not torch.equal(data.__getitems__(list(range(30)))[0], whole)
    other = arrays(count=30, shift=3, flip=True, seed=1)
    assert not torch.equal(other.__getitems__(list(range(30)))[0], whole)


def test_digits_are_split_without_overlap():
    data = DigitsData(img_size=16, channels=3, batch_size=32)
    data.setup("fit")
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [1257, 270, 270]
    images = torch.cat([part.images for part in parts])
    assert len(images) == 1797
    for part in parts:
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.01
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (32, 3, 16, 16)
    assert y.dtype == torch.int64
    assert len(data.train_dataloader()) == 39
    assert sum(len(y) for _, y in data.test_dataloader()) == 270
    small = DigitsData(train_limit=100)
    small.setup("fit")
    assert torch.bincount(small.train_set.labels).tolist() == pytest.approx([10] * 10, abs=2)


def test_digits_are_normalised():
    data = DigitsData()
    data.setup("fit")
    x = torch.cat(
        [part.__getitems__(list(range(len(part))))[0] for part in (data.train_set, data.val_set, data.test_set)]
    )
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder_in_each_layout(tmp_path, below, suffix):
    write_set(tmp_path / below, suffix=suffix)
    data = FashionMNISTData(root=str(tmp_path), val_split=20, batch_size=10, img_size=32)
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [100, 20, 40]
    assert torch.bincount(data.val_set.labels).tolist() == [2] * 10
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (10, 1, 32, 32)
    assert len(y) == 10


def test_idx_options(tmp_path):
    write_set(tmp_path)
    data = IDXData(str(tmp_path), val_split=0.25, train_limit=50, augment=True, with_index=True, batch_size=5)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (50, 30)
    assert torch.bincount(data.train_set.labels).tolist() == [5] * 10
    assert (data.train_set.shift, data.val_set.shift, data.train_set.flip) == (3, 0, False)
    assert len(next(iter(data.train_dataloader()))) == 3
    smaller = IDXData(str(tmp_path), val_split=30, train_limit=7)
    smaller.setup("fit")
    assert torch.equal(smaller.val_set.images, data.val_set.images)


def test_idx_folder_errors(tmp_path):
    with pytest.raises(LossplugError, match="no such folder"):
        IDXData(str(tmp_path / "nothing")).setup("fit")
    with pytest.raises(LossplugError, match="holds no train-images"):
        IDXData(str(tmp_path)).setup("fit")
    write_set(tmp_path / "A" / "raw")
    write_set(tmp_path / "B" / "raw")
    with pytest.raises(LossplugError, match="2 folders below it hold IDX files"):
        IDXData(str(tmp_path)).setup("fit")
    (tmp_path / "A" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(LossplugError, match="no t10k-labels-idx1-ubyte and no"):
        IDXData(str(tmp_path / "A"), val_split=10).setup("fit")
    write_idx(tmp_path / "A" / "raw" / "train-labels-idx1-ubyte.gz", torch.zeros(119, dtype=torch.uint8))
    with pytest.raises(LossplugError, match="120 images but 119 labels"):
        IDXData(str(tmp_path / "A"), val_split=10).setup("fit")
    with pytest.raises(LossplugError, match="there are 120"):
        IDXData(str(tmp_path / "B"), val_split=121, train_limit=0).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"channels": 2}, "channels is 2"), ({"img_size": 0}, "img_size is 0"), ({"batch_size": 0}, "batch_size is 0")],
)
def test_bad_options(options, message):
    with pytest.raises(LossplugError, match=message):
        DigitsData(**options).setup("fit")


def test_fashion_mnist_names_the_debian_package(monkeypatch, tmp_path):
    from lightning_lossplug.integrations.data import mnist

    monkeypatch.setattr(mnist, "DEBIAN_FASHION_MNIST", tmp_path / "nothing")
    with pytest.raises(LossplugError, match="Debian package dataset-fashion-mnist"):
        FashionMNISTData()
