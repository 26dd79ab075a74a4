"""Image sets are read from the published files only; binarization and dequantization."""

import ast
import gzip
import hashlib
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from platformdirs import user_cache_dir
from scipy import stats
from torchvision import datasets

import oracles
import ppl_vae
from ppl_vae import PPCA, fit_closed_form
from ppl_vae.data.grey_values import Dequantization, binarize
from ppl_vae.data.images import MD5, SHA256, cache_folder, image_set

SHAPE = (4, 3)
COUNTS = {"train": 7, "t10k": 5}


def idx(values):
    """Bytes of an IDX file: see http://yann.lecun.com/exdb/mnist."""
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}i", *values.shape
    )
    return gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0)


def contents(name="MNIST"):
    """Small files in the published format, and the arrays in them."""
    rng, files, held = np.random.default_rng(len(name)), {}, {}
    for start, count in COUNTS.items():
        held[start] = rng.integers(256, size=(count, *SHAPE)), rng.integers(10, size=count)
        for kind, values in zip(("images-idx3", "labels-idx1"), held[start], strict=True):
            files[f"{start}-{kind}-ubyte.gz"] = idx(values)
    return files, held


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """No data anywhere: the environment variable is not set, and the cache is empty."""
    monkeypatch.delenv("PPL_VAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def publish(monkeypatch, folder, name="MNIST"):
    """Put small files into a folder as if they were the published ones; return their arrays."""
    files, held = contents(name)
    (folder / name / "raw").mkdir(parents=True)
    for file, data in files.items():
        (folder / name / "raw" / file).write_bytes(data)
        monkeypatch.setitem(MD5[name], file, hashlib.md5(data).hexdigest())
    return held


def listing(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize(("part", "start"), [("train", "train"), ("test", "t10k")])
def test_files_are_read_without_unpacking_to_disk(name, part, start, no_data, monkeypatch):
    source = no_data / "source"
    held = publish(monkeypatch, source, name)
    monkeypatch.setenv("PPL_VAE_DATA", str(source))
    before = listing(no_data)
    found = image_set(name, part)
    pixels, labels = held[start]
    assert np.array_equal(found.pixels.numpy(), pixels.reshape(len(pixels), -1))
    assert np.array_equal(found.labels.numpy(), labels)
    assert found.image_shape == (1, *SHAPE) and len(found) == len(pixels)
    assert found.x.dtype == torch.get_default_dtype()
    assert np.allclose(found.x.numpy() * 255, pixels.reshape(len(pixels), -1), atol=1e-4)
    assert repr(found) == f"{name}, {part}: {len(pixels)} images of 1 x 4 x 3, grey 0..255"
    assert listing(no_data) == before  # nothing is unpacked, there or in the cache


def test_the_environment_variable_precedes_the_cache(no_data, monkeypatch):
    publish(monkeypatch, no_data / "cache" / "ppl_vae")
    from_cache = image_set("MNIST", "test")
    assert cache_folder() == no_data / "cache" / "ppl_vae"
    assert len(image_set("MNIST", "test", cache=no_data / "cache" / "ppl_vae")) == 5
    with pytest.raises(FileNotFoundError, match=r"is not in .*elsewhere; give download=True"):
        image_set("MNIST", "test", cache=no_data / "elsewhere")
    monkeypatch.setenv("PPL_VAE_DATA", str(no_data / "source"))
    assert torch.equal(image_set("MNIST", "test").pixels, from_cache.pixels)
    raw = no_data / "source" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"source.*is damaged or another file: it has 7 bytes"):
        image_set("MNIST", "test")


def test_the_cache_folder_is_that_of_the_platform(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path(user_cache_dir("ppl_vae", appauthor=False))
    assert "ppl_vae" in cache_folder().parts


def test_damaged_files_raise(no_data, monkeypatch):
    publish(monkeypatch, no_data)
    path = no_data / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    for damaged in (data[:-4], data[:9], b"", data[:-1] + bytes([data[-1] ^ 1]), idx(np.ones(3))):
        path.write_bytes(damaged)
        message = f"is damaged or another file: it has {len(damaged)} bytes and checksum"
        with pytest.raises(ValueError, match=message):
            image_set("MNIST", cache=no_data)
        assert path.read_bytes() == damaged


def test_nothing_is_downloaded_unless_asked_for(no_data, monkeypatch):
    files, held = contents()
    asked = []

    def download_url(url, root, filename, md5):
        asked.append(url)
        if url.startswith("http://yann") or url.startswith("https://first"):
            raise RuntimeError("is down")
        Path(root, filename).write_bytes(files[url.rsplit("/", 1)[1]])

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["https://first/", "https://second/"])
    for file, data in files.items():
        monkeypatch.setitem(MD5["MNIST"], file, hashlib.md5(data).hexdigest())
    source = no_data / "source"
    source.mkdir()
    monkeypatch.setenv("PPL_VAE_DATA", str(source))
    where = "source nor in .*ppl_vae; give download=True, or set PPL_VAE_DATA"
    with pytest.raises(FileNotFoundError, match=f"MNIST/raw/train-images.* is not in .*{where}"):
        image_set("MNIST")
    assert not asked and not cache_folder().exists()
    found = image_set("MNIST", download=True)
    assert np.array_equal(found.labels.numpy(), held["train"][1])
    assert [url.split("/")[2] for url in asked] == ["first", "second"] * 2
    kept = sorted(p.name for p in (cache_folder() / "MNIST" / "raw").iterdir())
    assert kept == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert not list(source.iterdir())
    image_set("MNIST", download=True)
    assert len(asked) == 4  # once is enough


def test_a_failed_download_reports_why_and_leaves_no_file(no_data, monkeypatch):
    def download_url(url, root, filename, md5):
        Path(root, filename).write_bytes(b"half")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded: .*or corrupted"):
        image_set("MNIST", download=True)
    assert not list((cache_folder() / "MNIST" / "raw").iterdir())


def test_checksums_are_those_of_torchvision():
    for name, files in MD5.items():
        assert dict(getattr(datasets, name).resources) == files


def test_torchvision_is_imported_only_for_downloads():
    # Its import fails with another build of torch, which must not affect anything else.
    for path in Path(ppl_vae.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            m
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for m in (getattr(node, "module", None), *(a.name for a in node.names))
        }
        assert not any((name or "").startswith("torchvision") for name in names), path


# The fixed binarization


@pytest.fixture
def binarized(no_data, monkeypatch):
    """A small set, as if it were the published one, and its bits."""
    rng, bits = np.random.default_rng(0), {}
    for part in SHA256:
        bits[part] = rng.integers(2, size=(6, 784)).astype(np.uint8)
        text = "".join(" ".join(map(str, row)) + "\n" for row in bits[part])
        monkeypatch.setitem(SHA256, part, hashlib.sha256(text.encode()).hexdigest())
    folder = no_data / "BinarizedMNIST"
    folder.mkdir()
    packed = {part: np.packbits(values, axis=1) for part, values in bits.items()}
    np.savez_compressed(folder / "binarized_mnist.npz", **packed)
    return no_data, bits


def test_the_fixed_binarization_is_marked_as_sorted(binarized):
    folder, bits = binarized
    before = listing(folder)
    for part, values in bits.items():
        found = image_set("BinarizedMNIST", part, cache=folder)
        assert np.array_equal(found.x.numpy(), values) and found.labels is None
        assert (
            found.sorted == ("a prefix is not a random sample" in repr(found)) == (part == "test")
        )
    assert listing(folder) == before


def test_shuffling_keeps_images_and_labels_together(no_data, monkeypatch):
    publish(monkeypatch, no_data)
    found = image_set("MNIST", cache=no_data)
    before = torch.get_rng_state()
    shuffled = found.shuffled(seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = [
        sorted(
            (*row, label) for row, label in zip(s.pixels.tolist(), s.labels.tolist(), strict=True)
        )
        for s in (found, shuffled)
    ]
    assert pairs[0] == pairs[1] and not torch.equal(found.pixels, shuffled.pixels)
    assert torch.equal(shuffled.pixels, found.shuffled(seed=0).pixels)


def test_a_shuffled_set_is_not_marked_as_sorted(binarized):
    test = image_set("BinarizedMNIST", "test", cache=binarized[0])
    assert "sorted" not in repr(test.shuffled(seed=0)) and test.shuffled(seed=0).labels is None


def test_another_binarization_raises(binarized):
    folder, bits = binarized
    path = folder / "BinarizedMNIST" / "binarized_mnist.npz"
    data = path.read_bytes()
    for damaged in (data[:-30], data[:40], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"binarized_mnist.npz is damaged or another file"):
            image_set("BinarizedMNIST", cache=folder)
    np.savez(path, train=np.packbits(1 - bits["train"], axis=1))
    with pytest.raises(ValueError, match="it has 6 rows of 784 bits and checksum"):
        image_set("BinarizedMNIST", cache=folder)
    with pytest.raises(ValueError, match=r"is damaged or another file: .*valid"):
        image_set("BinarizedMNIST", "valid", cache=folder)
    with pytest.raises(FileNotFoundError, match="it cannot be downloaded: put it there"):
        image_set("BinarizedMNIST", cache=folder / "none", download=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("CIFAR",), "name must be one of 'MNIST', 'FashionMNIST', 'BinarizedMNIST'; got 'CIFAR'"),
        (("MNIST", "valid"), "part must be one of 'train', 'test'; got 'valid'"),
        (("BinarizedMNIST", "t10k"), "part must be one of 'train', 'valid', 'test'; got 't10k'"),
    ],
)
def test_unknown_sets_and_parts_raise(arguments, match):
    with pytest.raises(ValueError, match=match):
        image_set(*arguments)


# The published files themselves


@pytest.fixture
def source(monkeypatch, tmp_path):
    if "PPL_VAE_DATA" not in os.environ:
        pytest.skip("PPL_VAE_DATA is not set")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Path(os.environ["PPL_VAE_DATA"])


@pytest.mark.data
@pytest.mark.parametrize(("name", "mean"), [("MNIST", 0.1325), ("FashionMNIST", 0.2868)])
def test_the_published_images(name, mean, source):
    before = listing(source / name)
    found = image_set(name, "test")
    assert found.pixels.shape == (10_000, 784) and found.image_shape == (1, 28, 28)
    assert float(found.x.mean()) == pytest.approx(mean, abs=1e-4)
    assert (found.labels.bincount() > 890).all() and len(found.labels.bincount()) == 10
    assert listing(source / name) == before


@pytest.mark.data
def test_a_truncated_file_raises(source, tmp_path, monkeypatch):
    name = "MNIST/raw/t10k-images-idx3-ubyte.gz"
    (tmp_path / name).parent.mkdir(parents=True)
    data = (source / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"it has 824438 bytes and checksum .*9fb629c4189551a2"):
        image_set("MNIST", "test")


@pytest.mark.data
def test_the_published_binarization_agrees_with_mnist(source):
    fixed, grey = image_set("BinarizedMNIST", "test"), image_set("MNIST", "test")
    assert fixed.pixels.shape == (10_000, 784) and fixed.sorted
    by_class = grey.pixels[grey.labels.argsort(stable=True)]
    assert not (fixed.pixels[by_class == 0]).any() and fixed.pixels[by_class == 255].all()


@pytest.mark.data
def test_files_may_be_in_the_cache(source, monkeypatch, tmp_path):
    raw = tmp_path / "ppl_vae" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(source / "MNIST" / "raw" / f"t10k-{kind}-ubyte.gz", raw)
    monkeypatch.delenv("PPL_VAE_DATA")
    assert len(image_set("MNIST", "test")) == 10_000


# Stochastic binarization


def test_binarized_entries_have_the_given_probabilities():
    p = torch.tensor([[0.0, 0.2, 0.5, 0.9, 1.0]]).expand(20_000, -1)
    binary = binarize(p, torch.Generator().manual_seed(0))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    for column, probability in zip(binary.T, p[0].tolist(), strict=True):
        test = stats.binomtest(int(column.sum()), len(column), probability)
        assert test.pvalue > oracles.FAILURE_RATE
    assert not binary[:, 0].any() and binary[:, 4].all()
    again = binarize(p.numpy(), torch.Generator().manual_seed(0))
    assert torch.equal(binary, again)


def test_binarize_keeps_missing_values_and_checks_probabilities():
    x = torch.tensor([[0.3, torch.nan], [torch.nan, 1.0]])
    binary = binarize(x, torch.Generator().manual_seed(0))
    assert torch.equal(binary.isnan(), x.isnan()) and binary[1, 1] == 1
    with pytest.raises(ValueError, match=r"x has 2 entries outside 0\.\.1, which are not prob"):
        binarize(torch.tensor([[0.5, -0.1, 1.1]]))


# Uniform dequantization


def grey_table():
    mixed = torch.from_numpy(oracles.simulate_ppca((16, 8), 1, 90, 7, seed=0))
    return ((mixed - mixed.min()) / (mixed.max() - mixed.min()) * 255).round()


@pytest.mark.parametrize("step", [1.0, 1 / 255, 0.5])
def test_log_p_is_in_the_units_of_the_given_data(step):
    levels = grey_table()
    dequantization, given = Dequantization(step=step), levels * step
    y = dequantization.apply(given, torch.Generator().manual_seed(0))
    noise = y * 256 - levels
    assert noise.min() > 0 and noise.max() < 1
    assert stats.kstest(noise.flatten().numpy(), "uniform").pvalue > oracles.FAILURE_RATE
    ppca = PPCA.like(y, 2, seed=0)
    fit_closed_form(ppca, y)
    ours = ppca.log_likelihood(y).detach() + dequantization.log_jacobian(given)
    # The oracle gets the noisy data in their own units, without any transformation.
    noisy = ((levels + noise) * step).numpy()
    values, _ = oracles.sample_spectrum(noisy)
    expected = oracles.closed_form_log_likelihood(values, 2)
    assert float(ours.mean()) == pytest.approx(expected, abs=1e-8)


def test_scaling_by_255_lowers_log_p_by_log_255_per_dimension():
    levels = grey_table()
    found = []
    for step in (1.0, 1 / 255):
        dequantization = Dequantization(step=step)
        y = dequantization.apply(levels * step, torch.Generator().manual_seed(0))
        ppca = PPCA.like(y, 2, seed=0)
        fit_closed_form(ppca, y)
        found.append(ppca.log_likelihood(y).detach() + dequantization.log_jacobian(levels * step))
    assert (found[1] - found[0] - 7 * np.log(255)).abs().max() < 1e-8


def test_the_dequantized_density_bounds_the_probability_of_levels():
    # P(k) = integral of p(k + u) over u >= exp of the mean of log p(k + u).
    dequantization, rng = Dequantization(levels=4, step=1.0), torch.Generator().manual_seed(0)
    density = stats.beta(2, 3)
    for k in range(4):
        x = torch.full((20_000, 1), float(k), dtype=torch.float64)
        y = dequantization.apply(x, rng)
        log_p = torch.from_numpy(
            density.logpdf(y.numpy())
        ).flatten() + dequantization.log_jacobian(x)
        mass = density.cdf((k + 1) / 4) - density.cdf(k / 4)
        error = oracles.z_limit(8) * float(log_p.exp().std()) / len(x) ** 0.5
        assert float(log_p.exp().mean()) == pytest.approx(mass, abs=error)
        assert float(log_p.mean()) <= np.log(mass) + error


@pytest.mark.parametrize("levels", [2, 5, 16, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_undo_recovers_grey_values(levels, dtype):
    dequantization = Dequantization(levels=levels, step=1 / (levels - 1))
    level = torch.randint(levels, (2000, 100), generator=torch.Generator().manual_seed(0))
    x = level.to(dtype) / (levels - 1)
    y = dequantization.apply(x, torch.Generator().manual_seed(1))
    assert y.dtype == dtype and y.min() > 0 and y.max() < 1
    assert (dequantization.undo(y) - x).abs().max() < 1e-6


def test_missing_values_do_not_count_in_the_jacobian():
    x = grey_table() / 255
    x[0, :3] = torch.nan
    dequantization = Dequantization()
    y = dequantization.apply(x, torch.Generator().manual_seed(0))
    assert torch.equal(y.isnan(), x.isnan())
    expected = -np.array([4, *[7] * 89]) * np.log(256 / 255)
    assert np.allclose(dequantization.log_jacobian(x).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "x", "match"),
    [
        ({}, [[0.3, 1.0]], r"x has 1 entries that are not among the 256 grey values 0\.\.1 in"),
        ({}, [[-1 / 255, 256 / 255]], "x has 2 entries that are not among the 256 grey values"),
        (
            {"step": 1.0},
            [[0.5, 3.0]],
            r"x has 1 entries .* 0\.\.255 in steps of 1; give the",
        ),
        ({"levels": 1}, [[0.0]], "levels must be a whole number >= 2; got 1"),
        ({"step": 0.0}, [[0.0]], "step must be positive; got 0"),
    ],
)
def test_values_that_are_not_grey_levels_raise(arguments, x, match):
    with pytest.raises(ValueError, match=match):
        Dequantization(**arguments).apply(torch.tensor(x))
