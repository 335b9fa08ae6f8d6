"""CALVIN on PyBullet and Gymnasium: simulator, tasks, scenes, language, scripted expert.

    import gymnasium, envs.calvin
    env = gymnasium.make("emu3_vla/Calvin-v0", scene="A")     # or envs.calvin.CalvinEnv(scene="A")
    vector = envs.calvin.make_vector(4, scene="A")

Importing this package registers the environment and loads no simulator; making one does.
"""

from __future__ import annotations

import importlib

import gymnasium

ENV_ID = "emu3_vla/Calvin-v0"

gymnasium.register(ENV_ID, entry_point="envs.calvin.env:CalvinEnv")

_HOMES = {
    "CalvinEnv": "envs.calvin.env",
    "Randomization": "envs.calvin.randomization",
    "Snapshot": "envs.calvin.snapshot",
    "info_of": "envs.calvin.vector",
    "make_vector": "envs.calvin.vector",
}
__all__ = ["ENV_ID", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
