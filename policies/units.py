"""A policy whose actions mean something else than the arm's: converted, or refused by name. Needs numpy alone.

policy = in_units(policies.load(folder))        # its actions are now those of envs.spec, or ActionUnitsMismatch says why they cannot be
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.spec import COMMITTED_ACTIONS, ActionUnits
from policies.base import Policy

ARM = ActionUnits()


class ActionUnitsMismatch(ValueError):
    """A policy's actions are of another kind, rate or size than the arm can carry out."""


def units_of(policy: Policy) -> ActionUnits:
    """What an action of 1 is for that policy: what it says, or what everything here takes."""
    return getattr(policy, "action_units", ARM)


def in_units(policy: Policy, arm: ActionUnits = ARM) -> Policy:
    """The policy with its actions in the arm's units: itself where they are, `Converted` where its steps are the smaller ones.

    Raises ActionUnitsMismatch for another kind or rate, and for steps that are larger: the largest of them would not be carried out.
    """
    units = units_of(policy)
    if units == arm:
        return policy
    if units.kind != arm.kind:
        raise ActionUnitsMismatch(f"{_told(policy)}, and the arm takes {arm}; this policy needs an arm that moves {units.kind}")
    if units.rate_hz != arm.rate_hz:
        raise ActionUnitsMismatch(
            f"{_told(policy)}, and the arm takes {arm}: the motion would be {arm.rate_hz / units.rate_hz:.3g} times as fast as it was "
            f"shown; train on recordings of {arm.rate_hz:g} Hz"
        )
    if units.position_unit_m > arm.position_unit_m or units.rotation_unit_rad > arm.rotation_unit_rad:
        raise ActionUnitsMismatch(
            f"{_told(policy)}, and the arm takes at most {arm}; convert the recordings with position_unit_m={arm.position_unit_m:g} and "
            f"rotation_unit_rad={arm.rotation_unit_rad:g} or less, and train again"
        )
    return Converted(policy, units, arm)


class Converted:
    """A policy that is asked, and answers, in the arm's units. What it does besides acting is the policy's own."""

    def __init__(self, policy: Policy, units: ActionUnits, arm: ActionUnits):
        self.policy, self.name, self.requires, self.action_units = policy, policy.name, policy.requires, arm
        shares = units.position_unit_m / arm.position_unit_m, units.rotation_unit_rad / arm.rotation_unit_rad
        self._factor = np.r_[np.repeat(shares, 3), 1.0]  # of its actions, to the arm's

    def __getattr__(self, name: str) -> Any:
        # Several decisions at once would pass by the conversion.
        if name in ("policy", "sessions", "infer_many"):
            raise AttributeError(name)
        return getattr(self.policy, name)

    def reset(self, instruction: str, **options: Any) -> None:
        """See policies.base.Policy."""
        self.policy.reset(instruction, **options)

    def infer(self, observation: dict[str, np.ndarray]) -> dict[str, Any]:
        """See policies.base.Policy."""
        if observation.get(COMMITTED_ACTIONS) is not None:
            observation = observation | {COMMITTED_ACTIONS: np.asarray(observation[COMMITTED_ACTIONS]) / self._factor}
        answer = self.policy.infer(observation)
        return answer | {"actions": (np.asarray(answer["actions"]) * self._factor).astype(np.float32)}

    def executed(self, action: np.ndarray) -> None:
        """An action that the arm made, in its units; see policies.client."""
        told = getattr(self.policy, "executed", None)
        if told is not None:
            told(np.asarray(action) / self._factor)


def _told(policy: Policy) -> str:
    return f"the actions of policy {policy.name} are {units_of(policy)}"
