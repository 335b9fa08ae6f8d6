"""Token stores behind a URL that fsspec knows: s3://, gs://, https://, memory://, ...

The manifest and the tokenizers are copied once into a cache on this machine, since every library reads them as files; shards are read
where they are. What a scheme needs (s3fs, gcsfs, ...) and its credentials are fsspec's matter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import fsspec

CACHE_VARIABLE = "EMU3_VLA_CACHE"


def is_url(path: str | Path) -> bool:
    """Whether this names a place that fsspec reads, and no folder here."""
    return "://" in str(path)


@dataclass(frozen=True)
class UrlPath:
    """A place behind a URL, as far as stores need one."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, part: str) -> UrlPath:
        return UrlPath(f"{self.url.rstrip('/')}/{part}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    def exists(self) -> bool:
        files, path = fsspec.url_to_fs(self.url)
        return files.exists(path)

    def is_file(self) -> bool:
        files, path = fsspec.url_to_fs(self.url)
        return files.isfile(path)

    def names(self) -> list[str]:
        """Names of what lies in this folder; none where it is absent."""
        files, path = fsspec.url_to_fs(self.url)
        return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in files.ls(path, detail=False)] if files.isdir(path) else []


def mirror(url: str, manifest: str, parts: tuple[str, ...]) -> Path:
    """A folder on this machine with the manifest and these files or folders of the store at `url`, whole or not at all.

    One manifest has one folder, in $EMU3_VLA_CACHE or ~/.cache/emu3-vla. Raises FileNotFoundError where the manifest or a part is missing.
    """
    files, root = fsspec.url_to_fs(url.rstrip("/"))
    if not files.isfile(f"{root}/{manifest}"):
        raise FileNotFoundError(f"{url} holds no {manifest}; expected the URL of a finished token store")
    content = files.cat_file(f"{root}/{manifest}")
    cache = Path(os.environ.get(CACHE_VARIABLE, "~/.cache/emu3-vla")).expanduser()
    folder = cache / hashlib.sha256(content).hexdigest()[:24]
    if folder.exists():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / manifest).write_bytes(content)
    for part in parts:
        if not files.exists(f"{root}/{part}"):
            raise FileNotFoundError(f"{url} lacks {part}; copy the whole token store again")
        files.get(f"{root}/{part}", str(temporary / part), recursive=True)
    try:
        temporary.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
    return folder
