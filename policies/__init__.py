"""Policies: things that are told an instruction and answer observations with action chunks.

policy = policies.load("expert", scene="D")
policy = policies.load("outputs/train/3f2a91c0/policy")
policy = policies.load("my_package.my_module:MyPolicy", speed=2)
policy = policies.load("ws://127.0.0.1:8000")                  # one that `emu3-vla serve` serves
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from policies.base import Policy

__all__ = ["CHECKPOINTS", "CHECKPOINT_PARTS", "SHIPPED", "Policy", "checkpoint_folder", "is_address", "known_names", "load"]

BUILTIN = {
    # The expert is found by its dotted name, as a plug-in: this package imports no simulator.
    "expert": "envs.calvin.expert.policy:ExpertPolicy",
    "zero": "policies.simple:ZeroPolicy",
    "random": "policies.simple:RandomPolicy",
    "replay": "policies.simple:ReplayPolicy",
}
PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
CHECKPOINT_POLICY = "policies.emu3:Emu3Policy"
ADDRESS = re.compile(r"wss?://.+")
REMOTE_POLICY = "policies.client:RemotePolicy"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
SHIPPED = "calvin-d"
"""The policy that an evaluation runs when none is named."""

CHECKPOINT_PARTS = ("policy.yaml", "model", "vision_tokenizer", "text_tokenizer", "action_tokenizer", "normalizer.json")


def load(folder_or_name: str | Path, **options: Any) -> Policy:
    """A policy by name ("expert", "zero", "random", "replay", a shipped checkpoint), from a checkpoint folder, "module:Class", or served at
    "ws://host:port" (wss:// with TLS).

    options go to the policy's constructor. A name wins over a folder of the same name; write ./name for that folder.
    Raises ValueError for an unknown name (with the nearest known one) or option, for a folder that lacks a part of a checkpoint
    (naming it), and for a class that is not there.
    """
    name = str(folder_or_name)
    folder = checkpoint_folder(name)
    if is_address(name):
        constructor, arguments = _resolve(REMOTE_POLICY), (name,)
    elif folder is None:
        constructor, arguments = _resolve(BUILTIN.get(name, name)), ()
    else:
        _check_parts(folder)
        constructor, arguments = _resolve(CHECKPOINT_POLICY), (folder,)
    try:
        inspect.signature(constructor).bind(*arguments, **options)
    except TypeError as error:
        accepted = ", ".join(list(inspect.signature(constructor).parameters)[len(arguments) :]) or "none"
        raise ValueError(f"policy {name!r}: {error}; its options: {accepted}") from error
    return constructor(*arguments, **options)


def checkpoint_folder(folder_or_name: str | Path) -> Path | None:
    """The folder that `load` would read, or None for a policy that needs none. Raises ValueError for an unknown name."""
    name = str(folder_or_name)
    if name in BUILTIN or PLUG_IN.fullmatch(name) or is_address(name):
        return None
    if (CHECKPOINTS / name / CHECKPOINT_PARTS[0]).is_file() and Path(name).name == name:
        return CHECKPOINTS / name
    if Path(name).is_dir():
        return Path(name)
    known = known_names()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known names: {', '.join(known)}"
    raise ValueError(f"policy {name!r} is no known name and no folder{hint}")


def is_address(name: str) -> bool:
    """Whether `name` is where a policy is served: ws://host:port or wss://host:port."""
    return ADDRESS.fullmatch(name) is not None


def known_names() -> list[str]:
    """Builtin names and shipped checkpoints."""
    shipped = sorted(path.parent.name for path in CHECKPOINTS.glob(f"*/{CHECKPOINT_PARTS[0]}"))
    return [*BUILTIN, *shipped]


def _check_parts(folder: Path) -> None:
    missing = [part for part in CHECKPOINT_PARTS if not (folder / part).exists()]
    if missing:
        raise ValueError(
            f"{folder} is not a whole checkpoint: {missing[0]} is missing"
            + (f" (and {', '.join(missing[1:])})" if missing[1:] else "")
            + "; a checkpoint folder is what 'emu3-vla train' leaves in <output_dir>/policy"
        )


def _resolve(dotted: str) -> Any:
    module, name = dotted.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it needs is not
        raise ValueError(f"policy {dotted!r}: no module {error.name!r} (is its folder on PYTHONPATH?)") from error
    except AttributeError as error:
        raise ValueError(f"policy {dotted!r}: {error}") from error
