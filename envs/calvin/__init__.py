"""CALVIN on PyBullet and Gymnasium: simulator, tasks, scenes, language, scripted expert.

Importing this package loads no simulator; `CalvinEnv` does on first use.
"""

from __future__ import annotations

__all__ = ["CalvinEnv"]


def __getattr__(name: str):
    if name == "CalvinEnv":
        from envs.calvin.env import CalvinEnv

        return CalvinEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
