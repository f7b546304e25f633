import gzip
import struct

import numpy as np
import pytest
import torch

from quantize.training import data
from quantize.training.data import (
    DataError,
    ImageBatches,
    TextBatches,
    compression_baselines,
    load_images,
    load_text,
)


@pytest.fixture(scope="module")
def library():
    return load_text()


def write_idx(path, values, *, zipped=False):
    values = np.asarray(values, dtype=np.uint8)
    content = (
        bytes([0, 0, 8, values.ndim])
        + struct.pack(f">{values.ndim}I", *values.shape)
        + values.tobytes()
    )
    path.write_bytes(gzip.compress(content) if zipped else content)


def mnist_like(folder, *, zipped=False):
    random = np.random.default_rng(0)
    end = ".gz" if zipped else ""
    for prefix, count in (("train", 20), ("t10k", 5)):
        write_idx(
            folder / f"{prefix}-images-idx3-ubyte{end}",
            random.integers(0, 256, (count, 6, 5)),
            zipped=zipped,
        )
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{end}", np.arange(count) % 10, zipped=zipped)


def test_default_text_is_large_and_split_by_whole_files(library):
    """The default text has about 10 MB, holds out 3 to 4% of it, and no file is on both sides."""
    total = len(library.train) + len(library.validation)
    assert total > 8_000_000
    assert 0.03 < len(library.validation) / total <= 0.04
    assert not set(library.train_files) & set(library.validation_files)
    assert library.train.dtype == library.validation.dtype == torch.uint8
    assert not any(
        "test" in name.split("/")[:-1] for name in library.train_files + library.validation_files
    )


def test_default_text_is_deterministic(library):
    """Two loads give the same description, hashes included."""
    assert load_text().describe() == library.describe()


def test_held_out_bytes_are_those_of_the_named_files(tmp_path):
    """Validation is the concatenation of the files that it names, and training of the others."""
    contents = {f"{i:02}.txt": f"file {i}\n".encode() * (i + 1) for i in range(60)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    text = load_text([tmp_path])
    for tensor, names in ((text.train, text.train_files), (text.validation, text.validation_files)):
        assert tensor.numpy().tobytes() == b"".join(contents[name.split("/")[1]] for name in names)
    assert 0 < len(text.validation) <= 0.04 * sum(map(len, contents.values()))


def test_split_does_not_depend_on_the_order_given(tmp_path):
    """The same files named in another order give the same split."""
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.txt")
        paths[-1].write_bytes(bytes([65 + i]) * 100)
    assert (
        load_text(paths).describe()["validation_sha256"]
        == load_text(paths[::-1]).describe()["validation_sha256"]
    )


def test_single_file_holds_out_its_last_lines(tmp_path):
    """One file is cut at a line, and nothing is lost."""
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    text = load_text([path])
    joined = text.train.numpy().tobytes() + text.validation.numpy().tobytes()
    assert joined == path.read_bytes()
    assert text.train.numpy().tobytes().endswith(b"\n")


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "binary", "empty folder", "hidden only", "one byte", "none"]
)
def test_unusable_text_is_refused_in_one_line(tmp_path, kind):
    """Missing, empty, binary files and folders without a usable file are named in a one-line
    DataError.
    """
    path = tmp_path / "given"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "binary":
        path.write_bytes(b"a\0b")
    elif kind == "one byte":
        path.write_bytes(b"a")
    elif kind in ("empty folder", "hidden only"):
        path.mkdir()
        (path / ".hidden").write_bytes(b"text")
        (path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError) as error:
        load_text([] if kind == "none" else [path])
    assert "\n" not in str(error.value)
    assert kind == "none" or "given" in str(error.value)


def test_batches_are_a_function_of_seed_step_and_rank():
    """Any step can be asked for in any order and gives the same windows; another seed gives
    others.
    """
    text = torch.arange(20_000).remainder(251).to(torch.uint8)
    batches = TextBatches(text, batch=4, length=32, seed=1)
    expected = [batches(step) for step in range(400)]
    again = TextBatches(text, batch=4, length=32, seed=1)
    for step in (399, 0, 160, 157):
        assert torch.equal(again(step)[0], expected[step][0])
    assert not torch.equal(TextBatches(text, batch=4, length=32, seed=2)(0)[0], expected[0][0])
    ids, targets = expected[3]
    assert ids.shape == targets.shape == (4, 32)
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_an_epoch_visits_every_window_once():
    """Within one pass no two windows overlap."""
    text = torch.arange(256).repeat_interleave(8).to(torch.uint8)
    batches = TextBatches(text, batch=1, length=8)
    seen = [int(batches(step)[0][0, 0]) for step in range(254)]
    assert len(set(seen)) == 254


def test_two_ranks_share_the_windows_of_a_double_batch():
    """Rank 0 and 1 with batch 3 see together what one rank with batch 6 sees."""
    text = torch.arange(9_000).remainder(251).to(torch.uint8)
    whole = TextBatches(text, batch=6, length=16)(5)[0]
    parts = [TextBatches(text, batch=3, length=16, rank=rank, world=2)(5)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_first_steps_may_see_shorter_windows():
    """Before `short_steps`, a step sees twice as many windows of half the length; from there on
    nothing differs.
    """
    text = torch.arange(9_000).remainder(251).to(torch.uint8)
    plain, staged = (TextBatches(text, batch=3, length=16, short_steps=short) for short in (0, 10))
    assert staged(9)[0].shape == (6, 8)
    assert torch.equal(staged(10)[0], plain(10)[0])


def test_text_shorter_than_a_window_is_refused():
    """Training bytes that do not fill two windows give a DataError that names both lengths."""
    with pytest.raises(DataError, match=r"100 bytes .* windows of 256"):
        TextBatches(torch.zeros(100, dtype=torch.uint8), batch=1, length=256)


def test_compression_baselines_count_bits_per_byte(library):
    """Random bytes need 8 bits each, and the held-out source less than 2.3."""
    noise = bytes(np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8))
    assert 7.9 < min(compression_baselines(noise).values()) < 8.1
    found = compression_baselines(library.validation)
    assert found["xz -9e"] < found["gzip -9"] < 2.3


def test_digits_are_split_once_and_for_all():
    """A fifth of the 1797 digits is held out, values are 0..1, and every class is on both sides;
    the bits are those that scikit-learn's own reader gives.
    """
    images = load_images()
    assert images.describe()["validation_sha256"].startswith("68a636b9dff3cae3")
    assert images.validation_images.shape == (359, 1, 8, 8)
    assert images.train_images.shape == (1438, 1, 8, 8)
    assert images.train_images.min() == 0 and images.train_images.max() == 1
    assert len(images.train_labels.unique()) == len(images.validation_labels.unique()) == 10
    assert load_images().describe() == images.describe()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folders_are_read(tmp_path, zipped):
    """A folder of the MNIST family, gzipped or not, gives its images scaled to 0..1."""
    mnist_like(tmp_path, zipped=zipped)
    images = load_images(tmp_path)
    assert images.train_images.shape == (20, 1, 6, 5) and images.validation_images.shape == (
        5,
        1,
        6,
        5,
    )
    assert images.classes == 10
    expected = np.random.default_rng(0).integers(0, 256, (20, 6, 5)).astype(np.uint8)
    assert torch.equal(images.train_images[:, 0], torch.from_numpy(expected).float() / 255)


@pytest.mark.parametrize(
    "kind", ["absent", "empty", "no labels", "truncated", "foreign", "bad gzip", "other count"]
)
def test_unusable_images_are_refused_in_one_line(tmp_path, kind):
    """Folders with missing, damaged or contradictory IDX files give a one-line DataError."""
    folder = tmp_path / "images"
    if kind != "absent":
        folder.mkdir()
    if kind not in ("absent", "empty"):
        mnist_like(folder)
        images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
        if kind == "no labels":
            labels.unlink()
        elif kind == "truncated":
            images.write_bytes(images.read_bytes()[:-1])
        elif kind == "foreign":
            images.write_bytes(b"PNG" * 10)
        elif kind == "bad gzip":
            images.write_bytes(gzip.compress(images.read_bytes())[:-20])
        elif kind == "other count":
            write_idx(labels, [1, 2, 3])
    with pytest.raises(DataError) as error:
        load_images(folder)
    assert "\n" not in str(error.value)


def test_every_cut_of_an_idx_file_is_refused(tmp_path):
    """No truncation of an IDX file is read as a smaller one."""
    path = tmp_path / "x"
    write_idx(path, np.ones((3, 4, 2)))
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError):
            data.read_idx(path)


def test_image_batches_cover_the_set():
    """One pass over the digits shows every training image once."""
    images = load_images()
    batches = ImageBatches(images, batch=2)
    labels = torch.cat([batches(step)[1] for step in range(719)])
    assert torch.equal(labels.bincount(), images.train_labels.bincount())
