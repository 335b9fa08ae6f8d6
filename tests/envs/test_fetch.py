"""Fetching calvin_env's assets: whole or not at all, from any server, and every failure in one line.

The failures run on a small made-up asset folder with its own manifest; the real files, where the reference folder has them, go through
a local server and file://.
"""

import errno
import gzip
import http.server
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from envs.calvin.original import fetch as fetching
from envs.calvin.original import manifest
from envs.calvin.original.fetch import FetchError, fetch
from envs.calvin.original.manifest import COMMIT, FileRecord, damage, loaded_files, required_files
from envs.calvin.scenes import asset_folder, fetched_assets, scene_named

FILES = {f"blocks/block_{number}.urdf": bytes([number]) * 3000 for number in range(5)}
LICENCES = {"LICENSE": b"do as you like", "data/franka_panda/LICENSE.txt": b"say who wrote it"}


def _record(content: bytes, folder: Path) -> FileRecord:
    path = folder / "content"
    path.write_bytes(content)
    return FileRecord.of(path)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A made-up manifest in the place of calvin_env's."""
    files = {path: _record(content, tmp_path) for path, content in FILES.items()}
    licences = {manifest.LICENCES[path]: _record(content, tmp_path) for path, content in LICENCES.items()}
    for module in (fetching, manifest):
        monkeypatch.setattr(module, "required_files", lambda: files)
        monkeypatch.setattr(module, "licence_files", lambda: licences)
    return files


def _archive(path: Path, change=lambda content: content, top: str = f"calvin_env-{COMMIT}") -> str:
    """The made-up assets as GitHub packs them, after `change` of {path: content}; returns a file:// address."""
    contents = {f"data/{name}": content for name, content in FILES.items()} | LICENCES | {"setup.py": b"not wanted"}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in change(contents).items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.as_uri()


def _hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_folder_appears_whole_with_licences_and_origin(small, tmp_path):
    seen = []
    assert fetch(tmp_path / "deep" / "got", _archive(tmp_path / "a.tar.gz"), lambda *figures: seen.append(figures))
    got = tmp_path / "deep" / "got"
    assert {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()} == {
        *FILES,
        *manifest.LICENCES.values(),
        "ORIGIN.json",
    }
    assert all((got / name).read_bytes() == content for name, content in FILES.items())
    assert not damage(got) and not _hidden(got.parent)
    assert seen == sorted(seen) and seen[-1][0] <= seen[-1][1] == (tmp_path / "a.tar.gz").stat().st_size


def test_what_is_there_and_right_is_kept(small, tmp_path):
    fetch(tmp_path / "got", _archive(tmp_path / "a.tar.gz"))
    assert not fetch(tmp_path / "got", "file:///no/such/archive")


def test_a_damaged_copy_of_ours_is_replaced(small, tmp_path):
    url = _archive(tmp_path / "a.tar.gz")
    fetch(tmp_path / "got", url)
    broken, gone = list(FILES)[:2]
    (tmp_path / "got" / broken).write_bytes(b"x")
    (tmp_path / "got" / gone).unlink()
    assert damage(tmp_path / "got") == manifest.Damage(missing=(gone,), different=(broken,))
    assert fetch(tmp_path / "got", url)
    assert not damage(tmp_path / "got") and not _hidden(tmp_path)


def test_a_folder_of_something_else_is_refused_and_kept(small, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "thesis.tex").write_text("precious")
    with pytest.raises(FetchError, match=r"something else, or a damaged copy: 5 missing \(blocks/block_0.urdf, ...\); nothing was touched"):
        fetch(tmp_path / "got", _archive(tmp_path / "a.tar.gz"))
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["thesis.tex"]
    with pytest.raises(FetchError, match="thesis.tex is a file; nothing was touched"):
        fetch(tmp_path / "got" / "thesis.tex", _archive(tmp_path / "a.tar.gz"))


def _changed(**change: bytes):
    return lambda contents: {name: change.get(Path(name).stem, content) for name, content in contents.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(block_3=b"\7" * 3000), "block_3.urdf has not the SHA-256 of calvin_env's file at 797142c; nothing was kept"),
        (_changed(block_3=b"short"), "block_3.urdf is 5 bytes, expected 3000 bytes"),
        (
            lambda contents: {name: content for name, content in contents.items() if "block_3" not in name},
            "lacks 1 of 7 files .blocks/block_3",
        ),
        (lambda contents: {"../../evil": b"x"} | contents, "which leads out of the folder; the archive is not to be trusted"),
        (lambda contents: {}, "lacks 7 of 7 files"),
    ],
)
def test_wrong_archives_leave_nothing(change, message, small, tmp_path):
    (tmp_path / "at").mkdir()
    with pytest.raises(FetchError, match=message) as raised:
        fetch(tmp_path / "at" / "got", _archive(tmp_path / "a.tar.gz", change))
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "at").iterdir()) == []


def test_a_link_in_the_place_of_a_file_is_refused(small, tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"top/data/{next(iter(FILES))}")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(FetchError, match="block_0.urdf is no plain file"):
        fetch(tmp_path / "got", (tmp_path / "a.tar.gz").as_uri())
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_archive(share, small, tmp_path):
    noise = os.urandom(60000)  # before the files that are wanted, and not to be compressed
    whole = Path(_archive(tmp_path / "a.tar.gz", lambda contents: {"noise": noise} | contents).removeprefix("file://")).read_bytes()
    (tmp_path / "b.tar.gz").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(FetchError, match="ended early or was damaged on the way .*; run the same command again"):
        fetch(tmp_path / "got", (tmp_path / "b.tar.gz").as_uri())
    assert not (tmp_path / "got").exists() and not _hidden(tmp_path)


def test_a_page_instead_of_an_archive(small, tmp_path):
    (tmp_path / "a.tar.gz").write_text("<html>please log in</html>")
    with pytest.raises(FetchError, match="is not a gzip archive"):
        fetch(tmp_path / "got", (tmp_path / "a.tar.gz").as_uri())
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"no tar at all" * 1000))
    with pytest.raises(FetchError, match="ended early or was damaged"):
        fetch(tmp_path / "got", (tmp_path / "b.tar.gz").as_uri())


# -- a server


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the folder; /cut promises more than it sends, /silent sends no end."""

    def do_GET(self):
        if self.path not in ("/cut", "/silent"):
            return super().do_GET()
        content = (Path(self.directory) / "a.tar.gz").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:150])
        self.wfile.flush()
        if self.path == "/silent":
            self.server.enough.wait(30)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """Address of a local server of `tmp_path`/served."""
    served = tmp_path / "served"
    served.mkdir()
    handler = lambda *arguments: _Handler(*arguments, directory=str(served))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.enough = threading.Event()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.enough.set()
        running.shutdown()


def test_over_http(small, server, tmp_path):
    _archive(tmp_path / "served" / "a.tar.gz")
    assert fetch(tmp_path / "got", f"{server}/a.tar.gz")
    assert not damage(tmp_path / "got")


def test_not_found_cut_and_silent_servers(small, server, tmp_path, monkeypatch):
    _archive(tmp_path / "served" / "a.tar.gz")
    with pytest.raises(FetchError, match="the server answered 404 .*; is the address right"):
        fetch(tmp_path / "got", f"{server}/b.tar.gz")
    with pytest.raises(FetchError, match="ended early or was damaged on the way"):
        fetch(tmp_path / "got", f"{server}/cut")
    monkeypatch.setattr(fetching, "SILENCE_S", 0.3)
    with pytest.raises(FetchError, match="the connection was lost .timed out.; run the same command again"):
        fetch(tmp_path / "got", f"{server}/silent")
    assert not (tmp_path / "got").exists() and not _hidden(tmp_path)


def test_no_network_and_no_such_file(small, tmp_path):
    with pytest.raises(FetchError, match=r"cannot reach http://127.0.0.1:9/a.tar.gz: .*refused.*fetch_url= names another source"):
        fetch(tmp_path / "got", "http://127.0.0.1:9/a.tar.gz")
    with pytest.raises(FetchError, match="cannot reach file:///no/such/a.tar.gz: .*No such file"):
        fetch(tmp_path / "got", "file:///no/such/a.tar.gz")


# -- the disk


def test_too_little_space_is_said_before_the_download(small, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match="has 0.0 MB free, the assets need 0.0 MB; choose another folder"):
        fetch(tmp_path / "got", "http://127.0.0.1:9/never-asked")
    assert not (tmp_path / "got").exists() and not _hidden(tmp_path)


def test_a_write_that_fails(small, tmp_path):
    """The kernel refuses files of more than 2000 bytes: the same road as a full disk, with another number."""
    url = _archive(tmp_path / "a.tar.gz")
    (tmp_path / "at").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(FetchError, match=f"cannot write .*got: {os.strerror(errno.EFBIG)}; choose another folder"):
            fetch(tmp_path / "at" / "got", url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "at").iterdir()) == []


def test_a_file_where_a_folder_should_be(small, tmp_path):
    (tmp_path / "at").write_text("a file")
    with pytest.raises(FetchError, match="cannot write .*got: .*; choose another folder"):
        fetch(tmp_path / "at" / "got", _archive(tmp_path / "a.tar.gz"))


# -- kills and two at once

SLOW_FETCH = """
import sys, time
from pathlib import Path
from envs.calvin.original.fetch import fetch
fetch(Path(sys.argv[1]), sys.argv[2], lambda received, expected: (print(received, flush=True), time.sleep(0.2)))
"""


@pytest.fixture
def real_archive(reference, tmp_path_factory) -> str:
    """calvin_env's own assets, packed as GitHub packs them; a file:// address."""
    path = tmp_path_factory.mktemp("archive") / "calvin_env.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(reference / "calvin_data" / "LICENSE.calvin_env", f"calvin_env-{COMMIT}/LICENSE")
        archive.add(reference / "calvin_data" / "data", f"calvin_env-{COMMIT}/data")
    return path.as_uri()


def test_a_killed_fetch_leaves_no_folder_and_the_next_one_starts_over(real_archive, tmp_path):
    command = [sys.executable, "-c", SLOW_FETCH, str(tmp_path / "got"), real_archive]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as running:
        while not list((tmp_path).glob(".got.partial/fresh/*/*")):
            assert running.poll() is None
            time.sleep(0.01)
        with pytest.raises(FetchError, match="another process is fetching into .* now"):
            fetch(tmp_path / "got", real_archive)
        running.kill()
    assert _hidden(tmp_path) and not (tmp_path / "got").exists()
    assert fetch(tmp_path / "got", real_archive)
    assert not damage(tmp_path / "got") and not _hidden(tmp_path)


def test_the_real_files_agree_with_the_manifest(calvin_assets, real_archive, tmp_path):
    assert not damage(calvin_assets)
    assert loaded_files(calvin_assets.resolve()) == list(required_files())
    fetch(tmp_path / "got", real_archive)
    assert not damage(tmp_path / "got")
    assert all(asset_folder(scene_named(name), tmp_path / "got") for name in "ABCD")


# -- the short name


def test_calvin_env_is_short_for_the_fetched_folder(small, tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_VLA_CACHE", str(tmp_path / "cache"))
    assert fetched_assets() == tmp_path / "cache" / "calvin_env"
    with pytest.raises(FileNotFoundError, match="not in .*calvin_env yet; 'emu3-vla doctor --fetch-assets' downloads them"):
        asset_folder(scene_named("D"), "calvin_env")
    fetch(fetched_assets(), _archive(tmp_path / "a.tar.gz"))
    for name in scene_named("D").files:
        (fetched_assets() / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched_assets() / name).touch()
    assert asset_folder(scene_named("D"), "calvin_env") == fetched_assets()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("EMU3_VLA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetched_assets() == tmp_path / "emu3-vla" / "calvin_env"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fetched_assets() == tmp_path / "home" / ".cache" / "emu3-vla" / "calvin_env"
