"""Many CALVIN environments at once, through Gymnasium's vector API.

    vector = make_vector(4, scene="D", observe="on_demand", seed=0)
    observations, infos = vector.reset()
    observations, rewards, terminations, truncations, infos = vector.step(actions)     # (4, 7)
    images = vector.call("observe")                                                    # one full observation each, when wanted
    completed_tasks(start_info, info_of(infos, 2))

Each environment gives the same numbers as one alone. Nothing resets by itself: CALVIN's episodes have no end.

With workers="async" each environment has a process of its own, started afresh ("spawn"), so a script that makes one needs the usual
`if __name__ == "__main__":`. Workers run on one thread each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from envs.calvin import contract
from envs.calvin.snapshot import Snapshot
from envs.spec import InvalidAction

WORKERS = ("async", "sync")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def make_vector(num_envs: int, *, workers: str = "async", seed: int | None = None, **options: Any) -> VectorEnv:
    """`num_envs` CalvinEnv with the same options, in processes of their own ("async") or one after another in this one ("sync").

    seed: environment i's first reset uses seed + i; `reset(seed=s)` seeds them s, s + 1, ... as Gymnasium does, or takes a list.
    options: CalvinEnv's. `reset(options={"robot_obs": (N, 15), "scene_obs": (N, 24)})` gives each environment its own state;
    {"reset_mask": bool (N,)} beside it leaves the others as they are. `restore_each(snapshots)` is CalvinEnv.restore for all.

    Raises ValueError for an unknown option. Bad actions and states are refused before any environment has moved.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
        raise ValueError(f"num_envs={num_envs!r} is not a positive integer")
    contract.choose("workers", workers, WORKERS)
    seed = contract.check_seed(seed)
    seeds = [None if seed is None else seed + index for index in range(num_envs)]
    makers = [partial(_make_one, index, seed=seeds[index], **options) for index in range(num_envs)]
    if workers == "sync":
        vector = _Sync(makers, autoreset_mode=AutoresetMode.DISABLED)
    else:
        with _one_thread():
            vector = _Async(makers, autoreset_mode=AutoresetMode.DISABLED, context="spawn")
    vector.action_mode = vector.get_attr("action_mode")[0]
    return vector


def info_of(infos: dict[str, Any], index: int) -> dict[str, Any]:
    """The info of one environment out of a vector environment's, as that environment returned it; empty if it was not reset."""
    info = {}
    for key, value in infos.items():
        present = infos.get(f"_{key}")
        if present is None or not present[index]:  # Gymnasium's own masks have no mask
            continue
        if isinstance(value, dict):
            info[key] = info_of(value, index)
        else:
            info[key] = value[index].item() if isinstance(value[index], np.generic) else value[index]
    return info


class _Row(gymnasium.Wrapper):
    """One environment of a vector: it takes its own row of what is given for all."""

    def __init__(self, env: gymnasium.Env, index: int):
        super().__init__(env)
        self.index = index

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        return self.env.reset(seed=seed, options=options and {key: states[self.index] for key, states in options.items()})

    def restore_row(self, snapshots: Sequence[Snapshot]):
        return self.env.restore(snapshots[self.index])


def _make_one(index: int, **options: Any) -> _Row:
    from envs.calvin.env import CalvinEnv

    return _Row(CalvinEnv(**options), index)


class _Checked:
    """Refuses bad input before any of it is sent: an exception in one worker would end them all."""

    action_mode: str

    def reset(self, *, seed=None, options=None):
        seeds = [contract.check_seed(each) for each in seed] if isinstance(seed, (list, tuple)) else contract.check_seed(seed)
        return super().reset(seed=seeds, options=self._check_options(options))

    def step(self, actions):
        if not hasattr(actions, "__len__") or isinstance(actions, str) or len(actions) != self.num_envs:
            raise InvalidAction(f"actions are {actions!r}, expected one for each of {self.num_envs} environments")
        for index, action in enumerate(actions):
            try:
                contract.check_action_in(self.action_mode, action)
            except InvalidAction as error:
                raise InvalidAction(f"environment {index}: {error}") from error
        return super().step(actions)

    def restore_each(self, snapshots: Sequence[Snapshot]) -> tuple:
        """Each environment goes on from its own snapshot; a tuple of their (observation, info)."""
        if len(snapshots) != self.num_envs:
            raise ValueError(f"got {len(snapshots)} snapshots for {self.num_envs} environments")
        return self.call("restore_row", snapshots)

    def _check_options(self, options: Any) -> dict[str, Any] | None:
        if options is None:
            return None
        if not isinstance(options, Mapping):
            raise ValueError(f"reset options are a {type(options).__name__}, expected a dict or None")
        states = {key: value for key, value in options.items() if key != "reset_mask"}
        for key, rows in states.items():
            if not hasattr(rows, "__len__") or len(rows) != self.num_envs:
                raise ValueError(f"reset option {key} needs one state for each of {self.num_envs} environments, got shape {np.shape(rows)}")
        for index in range(self.num_envs):
            contract.check_states({key: rows[index] for key, rows in states.items()})
        return dict(options)


class _Async(_Checked, AsyncVectorEnv):
    pass


class _Sync(_Checked, SyncVectorEnv):
    pass


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started in here run on one thread each: libraries read these variables when they are loaded."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
