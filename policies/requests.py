"""What a client sends, read and checked: nothing reaches a policy that is not what it says. Needs numpy and msgpack alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.spec import CAMERAS, OBSERVATION
from policies import wire
from policies.codes import checked_codes
from policies.wire import InvalidRequest

MAX_TEXT = 2000  # characters of an instruction or a task
MAX_EXECUTED = 1000  # actions
CONTROL_KEYS = frozenset(
    {wire.PROMPT, wire.RESET, wire.SEED, wire.TASK, wire.BEGIN_CHAIN, wire.EXECUTED, wire.DEADLINE_MS, wire.CODES, wire.TOKENIZER}
)
"""What a request may hold beside the observation; see docs/serving.md."""


def read_request(
    message: bytes | str,
    *,
    requires: frozenset[str],
    keys: dict[str, str],
    tokenizer: dict[str, Any] | None,
    deadline_ms: float,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(control, observation) of a message: what it says under CONTROL_KEYS, DEADLINE_MS always, and the observation under our names.

    requires: observation keys that must be there, as an image or as its codes. keys: what a client calls them: our names. tokenizer: see
    policies.codes. deadline_ms: at most. Raises InvalidRequest or TokenizerMismatch.
    """
    if isinstance(message, str):
        raise InvalidRequest("a request is a binary message, msgpack; this was text")
    try:
        content = wire.unpack(message)
    except wire.WireError as error:
        raise InvalidRequest(str(error)) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InvalidRequest(f"a request is a map from names to values, not {type(content).__name__}")
    control, observation = _control(content, deadline_ms), _observation(content, keys)
    codes = checked_codes(content, tokenizer)
    theirs = {ours: name for name, ours in keys.items()}
    for name in sorted(requires):
        if name not in observation and name not in codes:
            also = f" (here also called {theirs[name]!r})" if name in theirs else ""
            raise InvalidRequest(f"the observation has no {name!r}{also}, which this policy requires")
    return control, observation | ({wire.CODES: codes, wire.TOKENIZER: content[wire.TOKENIZER]} if codes else {})


def _observation(content: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    observation: dict[str, Any] = {}
    for name, value in content.items():
        ours = keys.get(name, name)
        if ours in CONTROL_KEYS:
            continue
        if ours in observation:
            raise InvalidRequest(f"{ours!r} came twice, once under another name")
        observation[ours] = _checked_array(ours, value)
    return observation


def _control(content: dict[str, Any], deadline_ms: float) -> dict[str, Any]:
    """What a request says beside the observation, checked; DEADLINE_MS is always there."""
    control: dict[str, Any] = {}
    for name in (wire.PROMPT, wire.TASK):
        if name in content:
            control[name] = _checked(content, name, isinstance(content[name], str) and len(content[name]) <= MAX_TEXT, "a short string")
    for name in (wire.RESET, wire.BEGIN_CHAIN):
        if name in content:
            control[name] = bool(_checked(content, name, isinstance(content[name], bool | np.bool_), "true or false"))
    if content.get(wire.SEED) is not None:
        seed = content[wire.SEED]
        control[wire.SEED] = int(_checked(content, wire.SEED, _is_integer(seed) and 0 <= seed < 2**63, "an integer of 0 or more"))
    control[wire.DEADLINE_MS] = deadline_ms
    if wire.DEADLINE_MS in content:
        asked = content[wire.DEADLINE_MS]
        right = isinstance(asked, int | float) and not isinstance(asked, bool) and 0 < asked < float("inf")
        control[wire.DEADLINE_MS] = min(float(_checked(content, wire.DEADLINE_MS, right, "a time in ms above 0")), deadline_ms)
    if wire.EXECUTED in content:
        actions = content[wire.EXECUTED]
        fits = isinstance(actions, np.ndarray) and actions.dtype.kind == "f" and actions.ndim == 2 and len(actions) <= MAX_EXECUTED
        control[wire.EXECUTED] = _checked(content, wire.EXECUTED, fits and np.isfinite(actions).all(), "finite actions (n, 7)")
    return control


def _checked(content: dict[str, Any], name: str, fits: bool, expected: str) -> Any:
    if not fits:
        raise InvalidRequest(f"{name!r} is {wire.brief(content[name])}, expected {expected}")
    return content[name]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _checked_array(name: str, value: Any) -> Any:
    """A camera's or state's value. Sizes of images are free: a policy resizes them. What we do not know is the policy's to judge."""
    if name in CAMERAS:
        fits = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3 and value.size
        _checked({name: value}, name, fits, "an image, uint8 (H, W, 3), RGB")
    elif name in OBSERVATION:
        fits = isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.shape == OBSERVATION[name].shape
        _checked({name: value}, name, fits and np.isfinite(value).all(), f"finite numbers of shape {OBSERVATION[name].shape}")
        return value.astype(OBSERVATION[name].dtype)
    return value
