"""Finding a Rerun viewer to stream to: one that listens already, or a new one on this machine's screen.

emu3-vla rollout --live                                        this machine's viewer, opened where none is
emu3-vla rollout live=rerun+http://192.168.0.7:9876/proxy      a viewer elsewhere (start it there with `rerun`)
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

SCHEMES = ("rerun", "rerun+http", "rerun+https")
PORT = 9876  # Rerun's default
LOCAL = f"rerun+http://127.0.0.1:{PORT}/proxy"
CONNECT_S = 3.0
REMEDY = (
    "start `rerun` on a machine with a screen and give its address (live=rerun+http://<host>:9876/proxy), or leave live out and open "
    "the recording afterwards"
)


class ViewerUnavailable(ValueError):
    """No Rerun viewer can be reached or started. The message says why and what to do."""


def check_address(live: bool | str) -> None:
    """Raises ValueError for an address that cannot be a viewer's."""
    if isinstance(live, bool):
        return
    parts = urlsplit(live)
    try:
        known = parts.scheme in SCHEMES and parts.hostname is not None and parts.port is not None
    except ValueError:  # a port that is no number
        known = False
    if not known:
        raise ValueError(f"live={live}: expected true, false or a viewer's address such as {LOCAL}")


def viewer_address(live: bool | str) -> str:
    """The address to stream to. True: this machine's viewer, which is opened where none listens; else the address itself.

    Raises ViewerUnavailable where nothing listens there, or no viewer can be opened.
    """
    check_address(live)
    if isinstance(live, str):
        if not _listens(live):
            raise ViewerUnavailable(f"no Rerun viewer answers at live={live}; {REMEDY}")
        return live
    if not _listens(LOCAL):
        _open_viewer()
    return LOCAL


def viewer_program() -> str | None:
    """Path of the `rerun` program, also where the environment that it lies in is not activated; None where it is not installed."""
    beside = Path(sys.executable).with_name("rerun")
    return shutil.which("rerun") or (str(beside) if beside.is_file() else None)


def _open_viewer() -> None:
    program = viewer_program()
    if program is None:
        raise ViewerUnavailable(f"the viewer's program `rerun` is not installed here (pip install rerun-sdk); {REMEDY}")
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ViewerUnavailable(f"a Rerun viewer needs a screen, and neither DISPLAY nor WAYLAND_DISPLAY is set; {REMEDY}")
    import rerun as rr

    try:
        rr.spawn(port=PORT, connect=False, executable_path=program)
    except RuntimeError as error:
        raise ViewerUnavailable(f"the Rerun viewer could not be started ({str(error).splitlines()[0]}); {REMEDY}") from error
    if not _listens(LOCAL):  # Rerun tells a viewer that ended at once from one that runs by a warning alone
        raise ViewerUnavailable(f"{program} was started but does not listen on port {PORT}: its own words are above; {REMEDY}")


def _listens(address: str) -> bool:
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
