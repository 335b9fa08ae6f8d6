"""Download calvin_env's assets: the files of its `data/` folder that scenes A-D load, at one commit, each checked by SHA-256.

    fetch(fetched_assets())
    CalvinEnv("D", assets="calvin_env")

The folder appears whole or not at all: files are written beside it and renamed when every one of them is right. A run that was killed
leaves nothing but a hidden folder that the next one clears.
"""

from __future__ import annotations

import errno
import gzip
import http.client
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from envs.calvin.original.manifest import COMMIT, LICENCES, FileRecord, damage, licence_files, required_files

ARCHIVE_URL = f"https://github.com/mees/calvin_env/archive/{COMMIT}.tar.gz"
ARCHIVE_BYTES = 20_900_000
"""About the size of that archive: GitHub does not say it when it starts to send."""
ORIGIN_FILE = "ORIGIN.json"
"""Written beside the files: says where they are from, and that the folder is one that we made and may replace."""
SILENCE_S = 30

Progress = Callable[[int, int], None]
"""Told the bytes received so far and the bytes expected."""


class FetchError(ValueError):
    """The assets could not be fetched; the message says why and what to do. The target folder is as it was before."""


def fetched_bytes() -> int:
    """Bytes that the finished folder holds."""
    return sum(record.size for record in _wanted().values())


def fetch(folder: Path, url: str = ARCHIVE_URL, progress: Progress | None = None) -> bool:
    """Put calvin_env's assets into `folder`, and return whether anything had to be downloaded.

    url: of a .tar.gz with one top folder that holds `data/` and `LICENSE`, as GitHub's archives are (https, http or file).
    A folder whose files are right is kept as it is. One that an earlier fetch made and that is damaged now is replaced; any other is
    refused. Raises FetchError: not reachable, not found, no such archive, wrong content, no space, no permission.
    """
    folder = folder.expanduser().resolve()
    if folder.is_dir() and not damage(folder):
        return False
    _check_replaceable(folder)
    with _explained(url, folder), _workplace(folder) as workplace:
        _check_space(workplace)
        fresh = workplace / "fresh"
        fresh.mkdir()
        _download(url, fresh, progress or (lambda received, expected: None))
        (fresh / ORIGIN_FILE).write_text(json.dumps({"url": url, "commit": COMMIT, "licences": list(licence_files())}, indent=1))
        if folder.is_dir():
            folder.rename(workplace / "replaced")
        fresh.rename(folder)
    return True


def _wanted() -> dict[str, FileRecord]:
    return required_files() | licence_files()


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or folder.is_dir() and ((folder / ORIGIN_FILE).is_file() or not any(folder.iterdir())):
        return
    what = f"a folder of something else, or a damaged copy: {damage(folder)}" if folder.is_dir() else "a file"
    raise FetchError(f"{folder} is {what}; nothing was touched. Choose another folder, or move that one away yourself")


def _check_space(workplace: Path) -> None:
    needed, free = fetched_bytes(), shutil.disk_usage(workplace).free
    if free < needed:
        raise FetchError(f"{workplace.parent} has {free / 1e6:.1f} MB free, the assets need {needed / 1e6:.1f} MB; choose another folder")


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A hidden, empty folder beside `folder`, gone afterwards; what a killed run left there is cleared, a live one's is refused."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = folder.parent / f".{folder.name}.partial"
    workplace.mkdir(exist_ok=True)
    with _locked(workplace):
        _clear(workplace)
        try:
            yield workplace
        finally:
            shutil.rmtree(workplace, ignore_errors=True)


@contextmanager
def _locked(workplace: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: two fetches at once get in each other's way there, and one of them fails
        yield
        return
    handle = os.open(workplace, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        yield
    except BlockingIOError as error:
        raise FetchError(f"another process is fetching into {workplace.parent} now; wait until it has ended") from error
    finally:
        os.close(handle)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def _download(url: str, target: Path, progress: Progress) -> None:
    """Write the wanted files of the archive at `url` into `target`, reading no further than the last of them."""
    request = urllib.request.Request(url, headers={"User-Agent": "emu3-vla"})
    with urllib.request.urlopen(request, timeout=SILENCE_S) as response:
        counted = _Counted(response, int(response.headers.get("Content-Length") or ARCHIVE_BYTES), progress)
        with gzip.GzipFile(fileobj=counted) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as archive:
            _extract(archive, target, url)


def _extract(archive: tarfile.TarFile, target: Path, url: str) -> None:
    waiting = _wanted()
    for member in archive:
        place = _place(member, url)
        if place not in waiting:
            continue
        record = waiting.pop(place)
        if not member.isreg() or member.size != record.size:
            what = f"{member.size} bytes" if member.isreg() else "no plain file"
            raise FetchError(f"{url}: {member.name} is {what}, expected {record.size} bytes; this is not calvin_env at {COMMIT[:7]}")
        archive.extract(member.replace(name=place, deep=False), target, filter="data")
        if FileRecord.of(target / place) != record:
            raise FetchError(f"{url}: {member.name} has not the SHA-256 of calvin_env's file at {COMMIT[:7]}; nothing was kept")
        if not waiting:
            return
    raise FetchError(f"{url} lacks {len(waiting)} of {len(_wanted())} files ({next(iter(waiting))}); is it calvin_env at {COMMIT[:7]}?")


def _place(member: tarfile.TarInfo, url: str) -> str:
    """Where a member goes, relative to the target: its path without the top folder and `data/`. Raises FetchError for one that climbs."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        raise FetchError(f"{url} holds the path {member.name!r}, which leads out of the folder; the archive is not to be trusted")
    inside = PurePosixPath(*path.parts[1:])
    if inside.as_posix() in LICENCES:
        return LICENCES[inside.as_posix()]
    return PurePosixPath(*inside.parts[1:]).as_posix() if inside.parts[:1] == ("data",) else ""


class _Counted:
    """A response that tells how much of it was read."""

    def __init__(self, response: BinaryIO, expected: int, progress: Progress):
        self.response, self.expected, self.progress = response, expected, progress
        self.received = 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.response.read(size)
        self.received += len(chunk)
        self.progress(self.received, self.expected)
        return chunk


@contextmanager
def _explained(url: str, folder: Path) -> Iterator[None]:
    """Turn what can go wrong on the way into one FetchError that says what to do."""
    again = "run the same command again"
    try:
        yield
    except urllib.error.HTTPError as error:
        raise FetchError(f"{url}: the server answered {error.code} {error.reason}; is the address right?") from error
    except urllib.error.URLError as error:
        raise FetchError(f"cannot reach {url}: {error.reason}; is there a network? fetch_url= names another source") from error
    except gzip.BadGzipFile as error:
        raise FetchError(f"{url} is not a gzip archive, or was damaged on the way ({error}); {again}, or try another fetch_url=") from error
    except (EOFError, tarfile.TarError, zlib.error, http.client.HTTPException) as error:
        raise FetchError(f"{url} ended early or was damaged on the way ({error}); {again}") from error
    except (TimeoutError, ConnectionError) as error:
        raise FetchError(f"{url}: the connection was lost ({error}); {again}") from error
    except OSError as error:
        hint = "free some space or choose another folder" if error.errno == errno.ENOSPC else "choose another folder"
        raise FetchError(f"cannot write {folder}: {error.strerror}; {hint}") from error
