"""Pictures that samples are compared with, from every kind of place."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.image_data import ImageData

LEVELS = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
EXPECTED = LEVELS.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
LABELS = np.array([0, 0, 1, 1, 1])


def encoded(levels):
    sink = io.BytesIO()
    Image.fromarray(levels).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(params=["folder", "npz", "npy", "parquet"])
def place(request, tmp_path):
    """The same five pictures at a place of each kind."""
    if request.param == "folder":
        for i, levels in enumerate(LEVELS):
            (tmp_path / "data" / "ab"[LABELS[i]]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(levels).save(tmp_path / "data" / "ab"[LABELS[i]] / f"{i}.png")
        return tmp_path / "data"
    path = tmp_path / f"data.{request.param}"
    if request.param == "npz":
        np.savez(path, LEVELS, LABELS)
    elif request.param == "npy":
        np.save(path, LEVELS)
    else:
        images = pa.array([{"bytes": encoded(levels), "path": None} for levels in LEVELS])
        pq.write_table(pa.table({"image": images, "label": LABELS}), path)
    return path


def test_pictures_are_read_in_order_with_their_labels(place):
    data = ImageData(str(place), (3, 8, 6))
    assert (len(data), data.shape, data.dtype) == (5, (5, 3, 8, 6), np.float32)
    np.testing.assert_allclose(np.asarray(data), EXPECTED, atol=1e-6)
    np.testing.assert_array_equal(data[1:3], np.asarray(data)[1:3])
    np.testing.assert_array_equal(data[np.array([4, 0])], np.asarray(data)[[4, 0]])
    assert data.labels.tolist() == ([0] * 5 if place.suffix == ".npy" else LABELS.tolist())


def test_what_is_there_and_its_size_are_the_identity(place):
    data = ImageData(str(place), (3, 8, 6))
    assert data.identity == ImageData(str(place), (3, 8, 6)).identity
    assert data.identity != ImageData(str(place), (3, 6, 8)).identity
    if place.is_dir():
        Image.fromarray(LEVELS[0]).save(place / "more.png")
        assert len(ImageData(str(place), (3, 8, 6))) == 6
    else:
        place.write_bytes(place.read_bytes() + b" ")
    if place.suffix != ".parquet" and place.suffix != ".npz":  # whose ends say what they hold
        assert data.identity != ImageData(str(place), (3, 8, 6)).identity


def test_other_sizes_are_cropped_about_the_middle_and_resized(tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    found = ImageData(str(tmp_path), (3, 4, 4))[:]
    np.testing.assert_allclose(found, 200 / 127.5 - 1, atol=1e-6)


def test_grey_and_coloured_pictures_become_what_samples_are(tmp_path):
    Image.fromarray(np.full((4, 4), 100, dtype=np.uint8)).save(tmp_path / "grey.png")
    colour = ImageData(str(tmp_path), (3, 4, 4))[:]
    grey = ImageData(str(tmp_path), (1, 4, 4))[:]
    assert colour.shape == (1, 3, 4, 4) and grey.shape == (1, 1, 4, 4)
    np.testing.assert_allclose(colour, 100 / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(grey, 100 / 127.5 - 1, atol=1e-6)


def test_what_holds_no_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no picture")
    np.save(tmp_path / "floats.npy", np.zeros((3, 4, 4, 3)))
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "other.parquet")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for name, why in (
        ("nowhere", "is no folder of pictures"), ("empty", "holds no picture"), ("bad", "x.png cannot be read as"),
        ("floats.npy", "must hold 8-bit pictures"), ("other.parquet", "has no column image, but picture"),
        ("cut.npz", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            ImageData(str(tmp_path / name), (3, 4, 4))
    with pytest.raises(ValueError, match="samples have shape \\(2,\\)"):
        ImageData(str(tmp_path / "empty"), (2,))
