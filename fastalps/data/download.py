"""Fetching the official files of MNIST and Fashion-MNIST, when asked to."""

from __future__ import annotations

import hashlib
import http.client
import logging
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastalps.errors import UserError
from fastalps.files import atomic_path, make_folder

_TIMEOUT_SECONDS = 30

logger = logging.getLogger("fastalps")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set: its official name, size in bytes and SHA-256."""

    name: str
    size: int
    sha256: str


MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_FILES = (
    RemoteFile(
        "train-images-idx3-ubyte.gz",
        9912422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    RemoteFile(
        "train-labels-idx1-ubyte.gz",
        28881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    RemoteFile(
        "t10k-images-idx3-ubyte.gz",
        1648877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    RemoteFile(
        "t10k-labels-idx1-ubyte.gz",
        4542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)

FASHION_MNIST_MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
FASHION_MNIST_FILES = (
    RemoteFile(
        "train-images-idx3-ubyte.gz",
        26421880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    RemoteFile(
        "train-labels-idx1-ubyte.gz",
        29515,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    RemoteFile(
        "t10k-images-idx3-ubyte.gz",
        4422102,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    RemoteFile(
        "t10k-labels-idx1-ubyte.gz",
        5148,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)


def fetch(file: RemoteFile, mirrors: Sequence[str], folder: Path) -> None:
    """Downloads `file` into `folder` from the first mirror that has it intact.

    The file appears under its name only once its size and SHA-256 are right. Raises UserError when
    no mirror serves it or the folder cannot be written to.
    """
    make_folder(folder)
    failures = []
    for mirror in mirrors:
        url = mirror + file.name
        logger.info("downloading %s", url)
        try:
            data = _get(url, file)
        except (OSError, http.client.HTTPException, _Altered) as error:
            failures.append(f"{url}: {error}")
            continue
        with atomic_path(folder / file.name) as temporary:
            temporary.write_bytes(data)
        return
    reasons = "; ".join(" ".join(failure.split()) for failure in failures)
    raise UserError(
        f"cannot download {file.name} ({reasons}); get it elsewhere and put it in {folder}"
    )


class _Altered(Exception):
    """What a mirror sent is not the official file."""


def _get(url: str, file: RemoteFile) -> bytes:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
        data: bytes = response.read(file.size + 1)
    if len(data) != file.size:
        raise _Altered(f"{'more' if len(data) > file.size else 'less'} than {file.size} bytes")
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise _Altered(f"SHA-256 {digest} instead of {file.sha256}")
    return data
