"""`emu3-vla doctor`: is this installation sound, and what is to be done where it is not?

    emu3-vla doctor
    emu3-vla doctor assets=path/to/calvin_env/data       # calvin_env's assets too: their files, states and looks
    emu3-vla doctor --fetch-assets                       # download those assets, then use env.assets=calvin_env
    emu3-vla doctor path/to/checkpoint                   # what a checkpoint is, of any layout, and what it lacks; nothing else is checked

Prints a line for each check and leaves doctor.json. The exit code is 1 where a problem was found, else 0. Works also where torch or
PyBullet do not: each group of checks runs in a process of its own.
"""

from __future__ import annotations

import difflib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emu3_vla.commands.examinations import GROUPS, PROBLEM, REINSTALL, WARNING, Finding

REPORT_FILE = "doctor.json"
PATIENCE_S = 300.0
"""A group that takes longer hangs."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Options of `emu3-vla doctor`."""

    assets: str = ""  # calvin_env's data/ folder to check as well, or calvin_env: the one that was fetched
    policy: str = ""  # checkpoint to try, a name or a folder; empty: the shipped one
    checks: tuple[str, ...] = ()  # groups to run: installation, simulator, egl, model, assets; empty: all, the last where assets= is given
    checkpoint: str = ""  # folder or Hugging Face name to describe instead, from its headers alone
    fetch_assets: bool | str = False  # download calvin_env's assets and check nothing: true, or the folder where to
    fetch_url: str = ""  # a .tar.gz of calvin_env (https://, http:// or file://); empty: GitHub's, at the pinned commit
    output_dir: str = ""

    def __post_init__(self):
        for name in self.checks:
            if name not in GROUPS:
                close = difflib.get_close_matches(name, GROUPS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"checks: {name!r} is none of {', '.join(GROUPS)}{hint}")
        if "assets" in self.checks and not self.assets:
            raise ValueError("checks=[assets] needs assets=: calvin_env's data/ folder, or calvin_env for the fetched one")
        if self.fetch_url and "://" not in self.fetch_url:
            raise ValueError(f"fetch_url={self.fetch_url!r} is no address; expected https://, http:// or file:///path/to/calvin_env.tar.gz")
        if self.fetch_url and not self.fetch_assets:
            raise ValueError("fetch_url= is for --fetch-assets, which is not given")

    @property
    def groups(self) -> tuple[str, ...]:
        """What is to be checked, in order."""
        return self.checks or tuple(name for name in GROUPS if name != "assets" or self.assets)


def main(config: DoctorConfig) -> None:
    """Check, or fetch the assets. Exits with 1 where a problem was found; raises envs.calvin.original.fetch.FetchError."""
    folder = Path(config.output_dir)
    if config.fetch_assets:
        _write(folder, fetch_assets(config))
        return
    if config.checkpoint:
        describe_checkpoint(config.checkpoint, folder)
        return
    began, findings = time.perf_counter(), []
    options = {"output_dir": str(folder), "assets": config.assets, "policy": config.policy}
    for group in config.groups:
        for finding in examine(group, options, folder / f"{group}.log"):
            findings.append(finding)
            print(_line(finding), flush=True)
    counts = {level: sum(finding.level == level for finding in findings) for level in (PROBLEM, WARNING)}
    seconds = time.perf_counter() - began
    _write(folder, counts | {"seconds": seconds, "findings": [asdict(finding) for finding in findings]})
    print(f"{_counted(counts[PROBLEM], PROBLEM)}, {_counted(counts[WARNING], WARNING)} in {seconds:.0f} s; figures: {folder / REPORT_FILE}")
    if counts[PROBLEM]:
        raise SystemExit(1)


def describe_checkpoint(path: str, folder: Path) -> None:
    """Print what a checkpoint is; exits with 1 where a part is missing or does not fit. Raises what emu3_vla.describe.describe raises."""
    from emu3_vla.describe import describe, lines  # here, because the other checks work without torch

    description = describe(path)
    print("\n".join(lines(description)))
    _write(folder, description)
    if description["missing"] or description["mismatched"]:
        raise SystemExit(1)


def examine(group: str, options: dict[str, str], log: Path, patience_s: float = PATIENCE_S) -> Iterator[Finding]:
    """The findings of one group, as they come from its own process; its death is one more. `log` keeps what it printed besides."""
    command = [sys.executable, "-P", "-m", "emu3_vla.commands.examinations", group, json.dumps(options)]
    began = time.monotonic()
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        timer = threading.Timer(patience_s, child.kill)
        timer.start()
        try:
            for line in child.stdout:
                yield Finding(**json.loads(line))
            code = child.wait()
        finally:
            timer.cancel()
            child.kill()  # interrupted: nobody reads it any more
    if code:
        yield _death(group, code, log, patience_s if time.monotonic() - began >= patience_s else None)


def _death(group: str, code: int, log: Path, late_s: float | None) -> Finding:
    """What to say of a group whose process did not end well."""
    lines = log.read_text(errors="replace").strip().splitlines()
    if late_s is not None:
        said = f"no answer within {late_s:g} s"
    elif code < 0:
        said = f"killed by signal {signal.Signals(-code).name} ({signal.strsignal(-code)})"
    else:
        said = lines[-1] if lines else f"ended with code {code}"
    advice = f"{REINSTALL}; what was printed besides: {log}"
    return Finding(check=group, level=PROBLEM, said=said, advice=advice, figures={"code": code})


def _line(finding: Finding) -> str:
    advice = f"\n{'':22}→ {finding.advice}" if finding.advice else ""
    return f"{finding.level:8} {finding.check:12} {finding.said}{advice}"


def _counted(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _write(folder: Path, report: dict[str, Any]) -> None:
    """A report is of this moment: the same command writes it anew."""
    temporary = folder / f"{REPORT_FILE}.tmp"
    temporary.write_text(json.dumps(report, indent=1, default=str) + "\n")
    temporary.rename(folder / REPORT_FILE)


# -- fetching


def fetch_assets(config: DoctorConfig) -> dict[str, Any]:
    """Download calvin_env's assets and say how to use them. Returns what was done. Raises envs.calvin.original.fetch.FetchError."""
    from envs.calvin.original.fetch import ARCHIVE_BYTES, ARCHIVE_URL, fetch, fetched_bytes
    from envs.calvin.original.manifest import COMMIT, required_files
    from envs.calvin.scenes import FETCHED_ASSETS, fetched_assets
    from eval.progress import LiveLine

    default = config.fetch_assets is True
    folder = (fetched_assets() if default else Path(str(config.fetch_assets))).expanduser().resolve()
    url = config.fetch_url or ARCHIVE_URL
    sizes = f"about {ARCHIVE_BYTES / 1e6:.0f} MB to download, {fetched_bytes() / 1e6:.0f} MB on disk"
    print(f"calvin_env's assets at commit {COMMIT[:7]}: {sizes}")
    print("licences: MIT (calvin_env, © 2021 Oier Mees) and Apache-2.0 (franka_panda); the texts are kept with the files")
    print(f"from {url}\ninto {folder}", flush=True)
    with LiveLine() as line:
        began = time.monotonic()
        downloaded = fetch(folder, url, lambda received, expected: line.show(_progress(received, expected, time.monotonic() - began)))
    print(f"{'downloaded' if downloaded else 'there already'}: {len(required_files())} files, each of the expected SHA-256")
    option = FETCHED_ASSETS if default else str(folder)
    print(f"{folder}   (env.assets={option}; 'emu3-vla doctor assets={option}' checks states and images too)")
    return {"fetched": {"folder": str(folder), "url": url, "commit": COMMIT, "downloaded": downloaded}}


def _progress(received: int, expected: int, seconds: float) -> str:
    from eval.progress import duration

    said = f"{received / 1e6:.1f} of about {expected / 1e6:.1f} MB"
    if seconds < 1:  # too early for a rate
        return said
    rate = received / seconds
    return f"{said} · {rate / 1e6:.1f} MB/s · {duration(max(expected - received, 0) / max(rate, 1.0))} left"
