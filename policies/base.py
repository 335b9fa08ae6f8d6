"""What every policy is: told an instruction once, then asked for actions again and again."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Policy(Protocol):
    """Something that acts.

    A policy may also have `begin_chain()`, which is called before the first subtask after the arm was put elsewhere: a policy that carries
    a belief about the arm from one subtask to the next drops it there. Chains must not depend on those that ran before them.
    `end_chain()`, where there is one, is called when a chain is over. `prepare()`, where there is one, may be called between two decisions,
    where the arm moves and nobody waits: what it computes ahead makes the next decision quicker and no different.

    requires: the observation keys that `infer` reads (see envs.spec.OBSERVATION); images are rendered only for a policy that
    asks for them. name: what results and recordings call it.
    """

    name: str
    requires: frozenset[str]

    def reset(self, instruction: str, *, task: str | None = None, seed: int | None = None) -> None:
        """Start a subtask.

        instruction: a sentence. task: the benchmark's name of the subtask, for privileged policies (the scripted expert) alone.
        seed: of whatever the policy draws at random during this subtask; the same seed gives the same actions.
        Raises ValueError for an empty instruction.
        """
        ...

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """Decide.

        observation: the keys of `requires`, and where the arm moves meanwhile envs.spec.COMMITTED_ACTIONS (n, 7), with which the chunk is
        to begin; a policy may leave that alone, and says "committed": n and "join_gap" (see policies.emu3) where it did not.
        Returns {"actions": float32 (T, 7), ...}: T >= 1 actions to execute in order, at 30 Hz, before the next call. Further
        keys are for recordings: "timing_s" {stage: seconds}; "token_ids"; "entropy", nats per id; "coefficients" (F, 7), DCT
        coefficients of the chunk, lowest frequency first; "clipped", how many values were clamped; "scene" {name: number}, what the policy
        says that it sees (a thing lies <thing>_right, _forward, _up [m] of the tool along the world's axes, its heading <thing>_turn [rad]
        from the tool's); "imagined" {camera's
        observation key: uint8 (H, W, 3)}, what the policy expects the cameras to see once all T actions were executed.
        Raises a named error rather than returning a stand-in for a decision that failed.
        """
        ...
