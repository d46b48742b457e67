"""Fashion-MNIST and MNIST as uint8 tensors in memory, and batches as a function of (seed, step).

60,000 + 10,000 images of 28 x 28 fit into 55 MB, so there is no loader, no worker and no queue: a batch is an index.
The network sees x / 127.5 - 1 in [-1, 1]; to_uint8 is its inverse and rounds.

The four files are looked for in the folder $LDM_DATA alone, if it is set; else in this order: data/ in the project; the
system's /usr/share/datasets; torchvision's download. Where there is none, the subset that ships with the package does:
10,000 + 2,000 images of Fashion-MNIST (the first 1,000 and 200 of each class), 4,000 + 1,000 of MNIST. Every file's
checksum is verified.
"""

import gzip
import hashlib
import os
import socket
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

CLASSES = {
    "fashion-mnist": ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                      "Ankle boot"),
    "mnist": tuple("0123456789"),
}
FILES = {"train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
         "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")}
SOURCES = {"fashion-mnist": datasets.FashionMNIST, "mnist": datasets.MNIST}  # torchvision's addresses and MD5 sums
ASSETS = Path(__file__).parent / "assets"

# SHA-256 of the unpacked contents: repacked copies (Debian's, for one) have other gzip files around the same bytes.
CONTENTS = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}
SUBSETS = {
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "d33512cfdc636a0d8972818e6659995be209a88891df7fa2109d7895922c8985",
        "train-labels-idx1-ubyte.gz": "620cb8e3b9348037c5ff9a07b02d773ab165330e072dfd19e0d21c59f8042dcf",
        "t10k-images-idx3-ubyte.gz": "15a92dd1e9b16ea361928086e77df4dfa890c255c00b5a8c8162c1040ce8eef1",
        "t10k-labels-idx1-ubyte.gz": "234596aeb6eb48133ec99a62541f90bc0728c9559a681f1e0638037462458f2c",
    },
    "mnist": {
        "train-images-idx3-ubyte.gz": "f7fc79d1910d94e370217945ff37b1984980f0418e427c2a5f9f929e0705c977",
        "train-labels-idx1-ubyte.gz": "9e9ecb8ff4ddc76244e95bddc2a2ac9136832e8cf72e2fc9ea18ace9c3d5c7fd",
        "t10k-images-idx3-ubyte.gz": "53e8a35f0344f41c24be425bc3fb6c8665520130289c0fca047f8136ba8ba502",
        "t10k-labels-idx1-ubyte.gz": "d6d5cd907c6a59432c286a98f67d1dfc33a1baf2ff2524bed5b6225269a6ac88",
    },
}


class DataError(ValueError):
    """A data file is missing, truncated or altered; the message names it and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """images (N, 1, 28, 28) uint8, labels (N,) int64."""

    images: Tensor
    labels: Tensor
    name: str
    source: str  # where it was found, in words
    sha256: str  # of the images' bytes

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES[self.name]

    def __len__(self) -> int:
        return len(self.images)


def load(name: str = "fashion-mnist", split: str = "train", download: bool = True) -> Dataset:
    """Read one split from the first place that has it; ValueError for an unknown name, DataError for a bad file."""
    if name not in CLASSES or split not in FILES:
        raise ValueError(f"unknown data set or split {name!r}, {split!r}: choose from {', '.join(CLASSES)}; "
                         f"{', '.join(FILES)}")
    folder, source = find(name, download)
    image_file, label_file = (read(folder / file, name) for file in FILES[split])
    if len(image_file) != len(label_file):
        raise DataError(f"{folder} holds {len(image_file)} {split} images of {name} but {len(label_file)} labels: "
                        f"its files come from different copies. Put the {' and '.join(FILES[split])} of one copy there.")
    images = torch.from_numpy(image_file).unsqueeze(1)  # (N, 1, 28, 28)
    return Dataset(images, torch.from_numpy(label_file).long(), name, source,
                   hashlib.sha256(image_file.tobytes()).hexdigest())


def find(name: str, download: bool = True) -> tuple[Path, str]:
    """(folder that holds the four files, in words where that is)."""
    wanted = [file for files in FILES.values() for file in files]

    def holds(folder: Path) -> bool:
        return all((folder / file).is_file() for file in wanted)

    if chosen := os.environ.get("LDM_DATA"):
        for folder in (Path(chosen) / name, Path(chosen)):
            if holds(folder):
                return folder, f"LDM_DATA, {folder}"
        raise DataError(f"LDM_DATA is {chosen}, but {name} is not there: expected {', '.join(wanted)} "
                        f"in it or in {name}/ below it. Put them there, or unset LDM_DATA.")
    cache = cache_folder() / name
    for folder in (cache, Path("/usr/share/datasets") / name):
        if holds(folder):
            return folder, f"{folder}"
    if download and fetch(name, cache):
        return cache, f"{cache}"
    return ASSETS / f"{name}-subset", "the subset that ships with the package: no full copy was found (README, Data)"


def cache_folder() -> Path:
    """data/ beside the package in a clone of the project, else a folder in the user's cache."""
    project = Path(__file__).parent.parent
    return project / "data" if (project / "pyproject.toml").is_file() else Path.home() / ".cache" / "ldm_minimal"


def fetch(name: str, folder: Path) -> bool:
    """Download the four files with torchvision; False when there is no network or nowhere to write."""
    timeout, source = socket.getdefaulttimeout(), SOURCES[name]
    socket.setdefaulttimeout(10)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=folder) as part:  # what has its own name in `folder` is complete
            for file, md5 in source.resources:
                for mirror in () if (folder / file).is_file() else source.mirrors:
                    try:
                        datasets.utils.download_url(mirror + file, part, file, md5)
                        os.replace(Path(part) / file, folder / file)
                        break
                    except (OSError, RuntimeError, HTTPException):
                        continue
                if not (folder / file).is_file():
                    return False
        return True
    except OSError:
        return False
    finally:
        socket.setdefaulttimeout(timeout)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def read(path: Path, name: str) -> np.ndarray:
    """One idx file -> array of uint8. DataError names the file if it is truncated, altered or not what it says."""
    remedy = "Delete it and fetch it again, or point LDM_DATA at a good copy."
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}). {remedy}") from None
    if hashlib.sha256(content).hexdigest() not in (CONTENTS[name].get(path.name), SUBSETS[name].get(path.name)):
        raise DataError(f"{path} is not the {name} file of that name: its checksum does not fit. {remedy}")
    rank = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def to_float(images: Tensor) -> Tensor:
    """uint8 0 ... 255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8, clamped and rounded to nearest (truncation would darken an image by half a level)."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def batch_index(step: int, batch: int, n: int, seed: int) -> Tensor:
    """(batch,) indices of the images of step `step`: a fresh order each epoch, every image once, nothing carried along.

    The last n % batch images of an epoch's order are left out; another order leaves out others.
    """
    if not 0 < batch <= n:
        raise ValueError(f"batch must be between 1 and the {n} images there are, got {batch}")
    epoch, place = divmod(step, n // batch)
    return _order(n, seed, epoch)[place * batch : (place + 1) * batch].clone()


def class_ids(classes, name: str = "fashion-mnist") -> Tensor:
    """Names or ids (a name, an id, a list of either, a tensor) -> (N,) int64. ValueError lists the valid names."""
    known = CLASSES[name]
    if isinstance(classes, Tensor):
        classes = classes.reshape(-1).tolist()
    elif isinstance(classes, str) or not isinstance(classes, Iterable):
        classes = [classes]
    lookup = {part.lower(): i for i in range(len(known)) for part in (known[i], *known[i].split("/"))}
    ids = []
    for one in classes:
        number = lookup.get(one.strip().lower()) if isinstance(one, str) else one
        if isinstance(one, str) and number is None and one.strip().isdecimal():
            number = int(one)
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or not 0 <= number < len(known):
            raise ValueError(f"unknown class {one!r}: choose from {', '.join(known)} or 0 ... {len(known) - 1}")
        ids.append(int(number))
    return torch.tensor(ids, dtype=torch.long)
