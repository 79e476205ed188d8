"""Finds files of weights by a path or a URL; downloads are cached, and hashes always verified."""

import hashlib
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlparse

from diffjax.errors import UserError
from diffjax.host.files import place_of

CACHE = "~/.cache/diffjax"
_SECONDS_TO_WAIT = 60.0


def find_weights(location: str, sha256: str, cache: str = CACHE) -> Path:
    """Finds a file, downloads it if need be, and verifies its hash.

    Args:
        location: a path, or a URL (`https://…`) that is downloaded to `cache` unless it is there
            already.
        sha256: hex digest that the file must have.
        cache: folder for downloads.

    Raises:
        UserError: the file does not exist, can't be downloaded, or has another hash.
    """
    fetched = "://" in location
    path = _fetched(location, sha256, place_of(cache)) if fetched else place_of(location)
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise UserError(f"can't read the weights {location}: {error.strerror}") from error
    _check(found, sha256, str(path))
    return path


def _fetched(address: str, sha256: str, folder: Path) -> Path:
    """Downloads a file unless it is cached, verifies its hash, and returns its path."""
    name = Path(unquote(urlparse(address).path)).name
    if not name:
        raise UserError(f"{address} names no file")
    # Files of one name but other contents live side by side.
    path = folder / f"{sha256[:8]}-{name}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=folder)
        try:
            with (
                os.fdopen(handle, "wb") as file,
                urllib.request.urlopen(address, timeout=_SECONDS_TO_WAIT) as source,
            ):
                shutil.copyfileobj(source, file)
            _check(sha256_of_file(Path(scratch)), sha256, address)
            os.replace(scratch, path)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't download {address}: {error}") from error
    return path


def sha256_of_file(path: Path) -> str:
    """The hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(found: str, sha256: str, name: str) -> None:
    if found != sha256.lower():
        raise UserError(
            f"{name} has sha256 {found}, not {sha256}: it is damaged or another file; "
            "to use it anyway, set sha256 to its hash"
        )
