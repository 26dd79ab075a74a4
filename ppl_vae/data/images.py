"""Image sets by name: read from gzip or npz where they lie, their checksums looked at.

They are looked for in the folder that ``PPL_VAE_DATA`` names, which is never written to, and then
in a cache. Nothing is downloaded unless that is asked for.
"""

import gzip
import hashlib
import io
import math
import os
import sys
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
from torch import Tensor

from ppl_vae.core.files import whole_file
from ppl_vae.core.state import seeded
from ppl_vae.core.validation import check_option

DATA = "PPL_VAE_DATA"
"""The environment variable that names a folder of data sets."""


@dataclass(frozen=True, repr=False)
class Images:
    """One part of an image set.

    Attributes:
        name, part: of which set, and which part.
        pixels: (N, D), grey values 0..``largest``, one flat row an image.
        labels: a class for each image; None if the set has none.
        image_shape: (C, H, W), with D = C H W.
        largest: the largest grey value there can be; 1 for binary images.
        sorted: whether the images stand class by class: a prefix is then no sample of them.
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
        """The images in 0..1, in torch's default dtype: grey values over the largest."""
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
        return f"{text}; sorted by class: a prefix is no sample, take one of shuffled(seed)"


def image_set(
    name: str,
    part: str = "train",
    *,
    cache: str | Path | None = None,
    download: bool = False,
) -> Images:
    """An image set, or one part of it.

    ``"MNIST"`` and ``"FashionMNIST"`` have the parts ``"train"`` (60,000) and ``"test"``
    (10,000); files ``<folder>/<name>/raw/*.gz`` as they are published. ``"BinarizedMNIST"``, the
    fixed binarization, has ``"train"`` (50,000), ``"valid"`` and ``"test"`` (10,000 each), in
    ``<folder>/BinarizedMNIST/binarized_mnist.npz``: of each part ``numpy.packbits(x, axis=1)``.
    Its test images are sorted by class.

    Args:
        name: one of ``IMAGE_SETS``.
        part: which part.
        cache: the folder to look in after the one that ``PPL_VAE_DATA`` names, and to download
            to; by default one of the user's, see :func:`cache_folder`.
        download: whether to download what is in neither, through torchvision.

    Raises:
        FileNotFoundError: if a file is in neither and is not to be, or cannot be, downloaded.
        ValueError: if there is no such set or part; if a file is not the published one.

    References:
        LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition
        (1998); Xiao, Rasul, Vollgraf: Fashion-MNIST (2017); Salakhutdinov, Murray: On the
        quantitative analysis of deep belief networks (2008); Larochelle, Murray: The neural
        autoregressive distribution estimator (2011), of the fixed binarization.
    """
    read = IMAGE_SETS[check_option("name", name, IMAGE_SETS)]
    folder = cache_folder() if cache is None else Path(cache)
    return read(part, partial(_found, cache=folder, download=download))


def cache_folder() -> Path:
    """Where a user's caches are on this platform, and in it ours; nothing is made."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "ppl_vae"


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
"""Of the published files, as torchvision expects them."""
SHA256 = {
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
"""Of the published ``binarized_mnist_<part>.amat``."""
PARTS = {"train": "train", "test": "t10k"}

Find = Callable[..., Path]
"""Of a set's name, a file's path in its folder and a function that downloads it: its path."""


def _found(
    name: str, file: str, fetch: Callable[[Path], None] | None, *, cache: Path, download: bool
) -> Path:
    folders = [Path(os.environ[DATA])] if os.environ.get(DATA) else []
    for folder in (*folders, cache):
        if (folder / name / file).is_file():
            return folder / name / file
    path = cache / name / file
    places = " nor in ".join(str(folder) for folder in (*folders, cache))
    if not download or fetch is None:
        way = (
            "give download=True" if fetch is not None else "it cannot be downloaded: put it there"
        )
        raise FileNotFoundError(f"{name}/{file} is not in {places}; {way}, or set {DATA}")
    fetch(path)
    return path


def _read_idx_set(name: str, part: str, find: Find) -> Images:
    start = PARTS[check_option("part", part, PARTS)]
    images, labels = (
        _read_idx(name, f"{start}-{kind}-ubyte.gz", find)
        for kind in ("images-idx3", "labels-idx1")
    )
    shape = (1, *images.shape[1:])
    pixels = torch.from_numpy(images.reshape(len(images), -1))
    return Images(name, part, pixels, torch.from_numpy(labels.astype(np.int64)), shape, 255)


def _read_idx(name: str, file: str, find: Find) -> np.ndarray:
    """An IDX file: two zeros, type 8 (bytes), the number of dimensions, the sizes, the bytes."""
    path = find(name, f"raw/{file}", partial(_download, name, file))
    data = path.read_bytes()
    _check(path, hashlib.md5(data).hexdigest(), MD5[name][file], f"{len(data)} bytes")
    content = gzip.decompress(data)
    dims = content[3]
    sizes = np.frombuffer(content, ">i4", dims, 4)
    return np.frombuffer(content, np.uint8, math.prod(sizes), 4 + 4 * dims).reshape(sizes).copy()


def _check(path: Path, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path} is damaged or another file: of {what}, its checksum is {found}, that of the "
            f"published one {expected}. Delete it, and read again with download=True or from "
            f"another {DATA}"
        )


def _download(name: str, file: str, path: Path) -> None:
    # torchvision needs a build of torch that fits its own: imported only where it is used.
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    mirrors, reasons = getattr(datasets, name).mirrors, []
    for mirror in mirrors:
        try:
            with whole_file(path) as temporary:
                folder, partial_name = str(temporary.parent), temporary.name
                download_url(f"{mirror}{file}", folder, partial_name, MD5[name][file])
            return
        except (OSError, RuntimeError) as error:  # the next mirror may be up
            reasons.append(f"{mirror}: {error}")
    raise FileNotFoundError(f"{name}/raw/{file} could not be downloaded: {'; '.join(reasons)}")


def _read_binarized(part: str, find: Find) -> Images:
    check_option("part", part, SHA256)
    path = find("BinarizedMNIST", "binarized_mnist.npz", None)
    try:
        with np.load(io.BytesIO(path.read_bytes())) as packed:
            bits = np.unpackbits(packed[part], axis=1)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or another file: {error}") from error
    rows = f"{len(bits)} rows of {bits.shape[1]} bits"
    _check(path, hashlib.sha256(_as_published(bits)).hexdigest(), SHA256[part], rows)
    shape = (1, 28, 28)
    return Images("BinarizedMNIST", part, torch.from_numpy(bits), None, shape, 1, part == "test")


def _as_published(bits: np.ndarray) -> bytes:
    """Rows of zeros and ones as text: digits with a space between, and a line's end."""
    text = np.full((len(bits), 2 * bits.shape[1]), ord(" "), np.uint8)
    text[:, ::2] = bits + ord("0")
    text[:, -1:] = ord("\n")
    return text.tobytes()


IMAGE_SETS: Mapping[str, Callable[[str, Any], Images]] = {
    **{name: partial(_read_idx_set, name) for name in MD5},
    "BinarizedMNIST": _read_binarized,
}
