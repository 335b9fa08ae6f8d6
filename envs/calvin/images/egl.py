"""PyBullet's OpenGL renderer through EGL: images from a graphics card, without a screen.

On a machine without a card Mesa draws the same on the CPU, more slowly than TinyRenderer does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pybullet as pb

PLUGIN, ENTRY = "eglRenderer", "_eglRendererPlugin"
PROBE = f"import sys, pybullet as pb; sys.exit(pb.loadPlugin(sys.argv[1], {ENTRY!r}, physicsClientId=pb.connect(pb.DIRECT)) < 0)"
PROBE_TIMEOUT_S = 120
REMEDY = (
    "It needs libEGL and a driver for it: on Debian or Ubuntu `apt-get install libegl1` and the graphics card's driver, or "
    "`libgl1-mesa-dri` to draw on the CPU. renderer='tiny' needs nothing."
)


class RendererUnavailable(RuntimeError):
    """A renderer that this machine cannot run. The message says what is missing and what to do."""


def load_egl(client: int) -> str:
    """Let OpenGL draw this client's images from now on; returns vendor, renderer and version as the driver names them.

    To be called before anything is loaded into the client. Raises RendererUnavailable where there is no EGL.
    """
    path = _plugin()
    _probe(path)
    with captured() as output:
        if pb.loadPlugin(path, ENTRY, physicsClientId=client) < 0:
            raise RendererUnavailable(f"PyBullet could not load its EGL plugin {path}. {REMEDY}")
    facts = dict(line.split("=", 1) for line in output[0].splitlines() if line.startswith("GL_") and "=" in line)
    missing = {"GL_VENDOR", "GL_RENDERER", "GL_VERSION"} - set(facts)
    if missing:
        raise RendererUnavailable(f"the EGL driver did not name itself ({', '.join(sorted(missing))} missing in {output[0]!r}). {REMEDY}")
    return f"PyBullet EGL: {facts['GL_VENDOR']}, {facts['GL_RENDERER']}, {facts['GL_VERSION']}"


def _plugin() -> str:
    spec = importlib.util.find_spec(PLUGIN)
    if spec is None or spec.origin is None:
        raise RendererUnavailable(f"this build of PyBullet has no {PLUGIN} module (there is one for Linux). Use renderer='tiny'.")
    return spec.origin


@functools.cache
def _probe(path: str) -> None:
    """Load the plugin in another process first: where there is no EGL, it ends its process."""
    probe = subprocess.run([sys.executable, "-c", PROBE, path], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    if probe.returncode:
        said = [line for line in probe.stderr.splitlines() if "build time" not in line and "device choice: -1" not in line]
        raise RendererUnavailable(f"PyBullet's EGL renderer does not start here ({'; '.join(said) or 'it says nothing'}). {REMEDY}")


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """What C code writes to standard output inside: a list that holds it as one text afterwards. Standard error is dropped.

    The plugin talks through C's stdio, past sys.stdout. Not for two threads at once.
    """
    libc, output = ctypes.CDLL(None), []
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file, open(os.devnull, "wb") as nothing:
        _flush(libc)
        os.dup2(file.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        try:
            yield output
        finally:
            _flush(libc)
            for copy, original in zip(saved, (1, 2), strict=True):
                os.dup2(copy, original)
                os.close(copy)
            file.seek(0)
            output.append(file.read().decode(errors="replace"))


def _flush(libc: ctypes.CDLL) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    libc.fflush(None)
