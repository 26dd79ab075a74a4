"""Image sets by name, read from the published gzip or npz files after a checksum test.

Files are searched in the folder that the environment variable ``PPL_VAE_DATA`` names, which is
never written to, and then in a cache. Nothing is downloaded without ``download=True``.
"""

import gzip
import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from platformdirs import user_cache_path
from torch import Tensor

from ppl_vae.core.files import atomic_file
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_option

DATA_VARIABLE = "PPL_VAE_DATA"
"""The environment variable that names a folder of data sets."""


@dataclass(frozen=True, repr=False)
class Images:
    """One part of an image set.

    Attributes:
        name, part: name of the set, and which part of it.
        pixels: (N, D), grey values 0..``largest``, one flat row per image.
        labels: a class for each image; None if the set has none.
        image_shape: (C, H, W), with D = C H W.
        largest: the largest possible grey value; 1 for binary images.
        sorted: whether the images are sorted by class, so that a prefix is not a random sample.
    """

    name: str
    part: str
    pixels: UInt8[Tensor, "N D"]
    labels: Int[Tensor, " N"] | None
    image_shape: tuple[int, int, int]
    largest: int
    sorted: bool = False

    @property
    def x(self) -> Float[Tensor, "N D"]:
        """The images in torch's default dtype, grey values divided by the largest, in 0..1."""
        return self.pixels.to(torch.get_default_dtype()) / self.largest

    def __len__(self) -> int:
        return len(self.pixels)

    def shuffled(self, seed: int | None = None) -> "Images":
        """The same images in a random order."""
        with seeded(seed):
            order = torch.randperm(len(self))
        labels = None if self.labels is None else self.labels[order]
        return replace(self, pixels=self.pixels[order], labels=labels, sorted=False)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.image_shape))
        text = f"{self.name}, {self.part}: {len(self)} images of {size}, grey 0..{self.largest}"
        if not self.sorted:
            return text
        return f"{text}; sorted by class: a prefix is not a random sample, use shuffled(seed)"


def image_set(
    name: str,
    part: str = "train",
    *,
    cache: str | Path | None = None,
    download: bool = False,
) -> Images:
    """Load one part of an image set.

    ``"MNIST"`` and ``"FashionMNIST"`` have the parts ``"train"`` (60,000) and ``"test"``
    (10,000), read from the published files ``<folder>/<name>/raw/*.gz``. ``"BinarizedMNIST"``, the
    fixed binarization, has ``"train"`` (50,000), ``"valid"`` and ``"test"`` (10,000 each), read
    from ``<folder>/BinarizedMNIST/binarized_mnist.npz``, which holds ``numpy.packbits(x, axis=1)``
    for each part. Its test images are sorted by class.

    Args:
        name: one of ``IMAGE_SETS``.
        part: name of the part.
        cache: the folder that is searched after the one that ``PPL_VAE_DATA`` names, and that
            files are downloaded to; by default the user's cache folder.
        download: whether torchvision downloads files that are in neither folder.

    Raises:
        FileNotFoundError: if a file is in neither folder, and ``download`` is false or fails.
        ValueError: if there is no such set or part; if the checksum of a file is wrong.

    References:
        LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition
        (1998); Xiao, Rasul, Vollgraf: Fashion-MNIST (2017); Salakhutdinov, Murray: On the
        quantitative analysis of deep belief networks (2008); Larochelle, Murray: The neural
        autoregressive distribution estimator (2011): the fixed binarization.
    """
    read = IMAGE_SETS[check_option("name", name, IMAGE_SETS)]
    folder = cache_folder() if cache is None else Path(cache)
    return read(part, partial(_find_file, cache=folder, download=download))


def cache_folder() -> Path:
    """The cache folder of this package on this platform; it need not exist."""
    return user_cache_path("ppl_vae", appauthor=False)


MD5 = {
    "MNIST": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
"""MD5 checksums of the published files, which torchvision uses too."""
SHA256 = {
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
"""SHA-256 checksums of the published files ``binarized_mnist_<part>.amat``."""
PARTS = {"train": "train", "test": "t10k"}
"""File name prefix of each part."""

FindFile = Callable[..., Path]
"""A function that maps the name of a set, the path of a file within its folder and a function that
downloads the file to the path of the file."""


def _find_file(
    name: str, file: str, fetch: Callable[[Path], None] | None, *, cache: Path, download: bool
) -> Path:
    folders = [Path(os.environ[DATA_VARIABLE])] if os.environ.get(DATA_VARIABLE) else []
    for folder in (*folders, cache):
        if (folder / name / file).is_file():
            return folder / name / file
    path = cache / name / file
    places = " nor in ".join(str(folder) for folder in (*folders, cache))
    if not download or fetch is None:
        remedy = "give download=True" if fetch else "it cannot be downloaded: put it there"
        raise FileNotFoundError(
            f"{name}/{file} is not in {places}; {remedy}, or set {DATA_VARIABLE}"
        )
    fetch(path)
    return path


def _read_idx_set(name: str, part: str, find: FindFile) -> Images:
    prefix = PARTS[check_option("part", part, PARTS)]
    images, labels = (
        _read_idx(name, f"{prefix}-{kind}-ubyte.gz", find)
        for kind in ("images-idx3", "labels-idx1")
    )
    shape = (1, *images.shape[1:])
    pixels = torch.from_numpy(images.reshape(len(images), -1))
    return Images(name, part, pixels, torch.from_numpy(labels.astype(np.int64)), shape, 255)


def _read_idx(name: str, file: str, find: FindFile) -> np.ndarray:
    """Read an IDX file: two zeros, type 8 (bytes), number of dimensions, sizes, bytes."""
    path = find(name, f"raw/{file}", partial(_download, name, file))
    data = path.read_bytes()
    _check_checksum(path, hashlib.md5(data).hexdigest(), MD5[name][file], f"{len(data)} bytes")
    content = gzip.decompress(data)
    dims = content[3]
    sizes = np.frombuffer(content, ">i4", dims, 4)
    return np.frombuffer(content, np.uint8, math.prod(sizes), 4 + 4 * dims).reshape(sizes).copy()


def _check_checksum(path: Path, found: str, expected: str, content: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path} is damaged or another file: it has {content} and checksum {found}, but the "
            f"published file has {expected}. Delete it, and read again with download=True or from "
            f"another {DATA_VARIABLE}"
        )


def _download(name: str, file: str, path: Path) -> None:
    # torchvision needs a matching build of torch, so it is imported only where it is used.
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    mirrors, reasons = getattr(datasets, name).mirrors, []
    for mirror in mirrors:
        try:
            with atomic_file(path) as temporary:
                folder, partial_name = str(temporary.parent), temporary.name
                download_url(f"{mirror}{file}", folder, partial_name, MD5[name][file])
            return
        except (OSError, RuntimeError) as error:  # the next mirror may be up
            reasons.append(f"{mirror}: {error}")
    raise FileNotFoundError(f"{name}/raw/{file} could not be downloaded: {'; '.join(reasons)}")


def _read_binarized(part: str, find: FindFile) -> Images:
    check_option("part", part, SHA256)
    path = find("BinarizedMNIST", "binarized_mnist.npz", None)
    try:
        with np.load(io.BytesIO(path.read_bytes())) as packed:
            bits = np.unpackbits(packed[part], axis=1)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or another file: {error}") from error
    rows = f"{len(bits)} rows of {bits.shape[1]} bits"
    _check_checksum(path, hashlib.sha256(_as_published(bits)).hexdigest(), SHA256[part], rows)
    shape = (1, 28, 28)
    return Images("BinarizedMNIST", part, torch.from_numpy(bits), None, shape, 1, part == "test")


def _as_published(bits: np.ndarray) -> bytes:
    """Encode rows of zeros and ones as text: digits separated by spaces, one line per row."""
    text = np.full((len(bits), 2 * bits.shape[1]), ord(" "), np.uint8)
    text[:, ::2] = bits + ord("0")
    text[:, -1:] = ord("\n")
    return text.tobytes()


IMAGE_SETS: Mapping[str, Callable[[str, Any], Images]] = {
    **{name: partial(_read_idx_set, name) for name in MD5},
    "BinarizedMNIST": _read_binarized,
}
