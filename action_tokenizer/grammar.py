"""Which action tokens may come next: an automaton whose every path decodes to exactly T×A coefficients.

    grammar = tokenizer.grammar(horizon=10, action_dim=7)
    state = grammar.start()
    while not grammar.is_finished(state):
        mask = grammar.mask(state)             # bool (V + 1,); the last entry is "end of chunk"
        state = grammar.advance(state, choose(logits, mask))

A state is one integer: how many coefficients are owed, and which half-read character is pending (`bytelevel.Pending`). From the tables
`mask_rows[row_of_state[states]]` is a batch of masks, and `advance_many` its transition, so both run as gathers on any device.

Legend: V ids, P pending characters (0 is "none"), S states, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from action_tokenizer import bytelevel
from action_tokenizer.errors import ActionTokenizerError, MalformedActionTokens


@dataclass(frozen=True)
class Transitions:
    """What each id does, whatever is owed.

    completed: int32 (P, V), coefficients that the id completes; -1 where it may not follow.
    pending: int32 (P, V), what is pending after it. left: int32 (P,), bytes by which each pending character is short.
    """

    completed: np.ndarray
    pending: np.ndarray
    left: np.ndarray


def byte_transitions(token_bytes: list[bytes], lowest: int, highest: int) -> Transitions:
    """Transitions of byte-level tokens. lowest, highest: the permitted code points, inclusive."""
    pendings, rows = [bytelevel.START], []
    for pending in pendings:  # grows while it is walked
        row = [_read(token, pending, lowest, highest) for token in token_bytes]
        pendings += dict.fromkeys(after for after, _ in row if after is not None and after not in pendings)
        rows.append(row)
    numbers = {pending: number for number, pending in enumerate(pendings)} | {None: 0}
    return Transitions(
        completed=np.array([[count for _, count in row] for row in rows], np.int32),
        pending=np.array([[numbers[after] for after, _ in row] for row in rows], np.int32),
        left=np.array([pending.left for pending in pendings], np.int32),
    )


def single_transitions(vocab_size: int) -> Transitions:
    """Transitions of tokenizers that write one id per coefficient."""
    return Transitions(np.ones((1, vocab_size), np.int32), np.zeros((1, vocab_size), np.int32), np.zeros(1, np.int32))


class ActionGrammar:
    """The automaton for chunks of one shape. Immutable.

    vocab_size: V. end_id: V, the index of "end of chunk" in masks. num_states: S. mask_rows: bool (R, V + 1), read-only.
    row_of_state: int32 (S,). transitions: see Transitions. A finished sequence permits "end of chunk" for ever, which lets batches pad.
    """

    def __init__(self, transitions: Transitions, *, horizon: int, action_dim: int):
        self.transitions, self.horizon, self.action_dim = transitions, horizon, action_dim
        self.coefficients = horizon * action_dim
        self._pendings, self.vocab_size = transitions.completed.shape
        self.end_id = self.vocab_size
        self.num_states = (self.coefficients + 1) * self._pendings + 1
        self._finished = self.num_states - 1
        self._alive = _alive(transitions, self.coefficients)
        if not self._alive[self.coefficients, 0]:
            raise ActionTokenizerError(f"no sequence of these ids holds exactly {horizon}×{action_dim} coefficients")
        self.mask_rows, self.row_of_state = self._masks()
        self.mask_rows.flags.writeable = self.row_of_state.flags.writeable = False

    def start(self) -> int:
        """The state before the first id."""
        return self.coefficients * self._pendings

    def mask(self, state: int) -> np.ndarray:
        """What may come next: bool (V + 1,), read-only; the last entry is "end of chunk"."""
        return self.mask_rows[self.row_of_state[state]]

    def masks(self, states: np.ndarray) -> np.ndarray:
        """`mask` of many states: integers (B,) to bool (B, V + 1)."""
        return self.mask_rows[self.row_of_state[states]]

    def advance(self, state: int, index: int) -> int:
        """The state after `index`. Raises MalformedActionTokens if it may not come next."""
        if not 0 <= index <= self.end_id or not self.mask_rows[self.row_of_state[state], index]:
            raise self._refusal(state, index, chunk=0, position=-1)
        if index == self.end_id:
            return self._finished
        owed, pending = divmod(state, self._pendings)
        completed = self.transitions.completed[pending, index]
        return int((owed - completed) * self._pendings + self.transitions.pending[pending, index])

    def advance_many(self, states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """`advance` of many sequences: integers (B,) and (B,) to int64 (B,). Raises MalformedActionTokens for the first bad one."""
        states, ids = np.asarray(states), np.asarray(ids)
        known = (ids >= 0) & (ids <= self.end_id)
        permitted = known & self.mask_rows[self.row_of_state[states], np.where(known, ids, 0)]
        if not permitted.all():
            chunk = int(np.argmin(permitted))
            raise self._refusal(int(states[chunk]), int(ids[chunk]), chunk=chunk, position=-1)
        owed, pending = np.divmod(states, self._pendings)
        token = np.minimum(ids, self.vocab_size - 1)
        pending = np.minimum(pending, self._pendings - 1)
        after = (owed - self.transitions.completed[pending, token]) * self._pendings + self.transitions.pending[pending, token]
        return np.where(ids == self.end_id, self._finished, after).astype(np.int64)

    def allowed(self, prefix_ids: Sequence[int]) -> np.ndarray:
        """What may follow `prefix_ids`: bool (V + 1,). Raises MalformedActionTokens for a prefix that the grammar does not permit."""
        state = self.start()
        for position, index in enumerate(prefix_ids):
            try:
                state = self.advance(state, index)
            except MalformedActionTokens:
                raise self._refusal(state, index, chunk=0, position=position) from None
        return self.mask(state)

    def owed(self, state: int) -> int:
        """Coefficients still to come, a half-read one included."""
        return 0 if state == self._finished else int(state) // self._pendings

    def is_finished(self, state: int) -> bool:
        """Whether the chunk is whole: only "end of chunk" may come, or has come."""
        return state in (0, self._finished)

    def _refusal(self, state: int, index: int, *, chunk: int, position: int) -> MalformedActionTokens:
        owed = self.owed(state)
        half = " and half a character is pending" if state != self._finished and state % self._pendings else ""
        name = "end of chunk" if index == self.end_id else f"id {index}"
        place = f"position {position}" if position >= 0 else f"sequence {chunk}"
        return MalformedActionTokens(
            f"{place}: {name} may not come where {owed} of {self.coefficients} coefficients are owed{half}",
            chunk=chunk, position=position, expected=self.coefficients, actual=self.coefficients - owed,
        )  # fmt: skip

    def _masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct masks and which of them each state has. Far from the end all states of one pending character share a mask."""
        rows, row_of_state, known = [], np.zeros(self.num_states, np.int32), {}
        reach = int(self.transitions.completed.max())
        for owed in range(self.coefficients + 1):
            # A mask depends on the pending character and on where the next `reach` coefficients can end.
            window = self._alive[max(0, owed - reach) : owed + 1].tobytes()
            for pending in range(self._pendings):
                key = (pending, window)
                if key not in known:
                    known[key] = len(rows)
                    rows.append(self._mask_row(owed, pending))
                row_of_state[owed * self._pendings + pending] = known[key]
        finished = np.zeros(self.vocab_size + 1, bool)
        finished[self.end_id] = True
        row_of_state[self._finished] = len(rows)
        return np.array([*rows, finished]), row_of_state

    def _mask_row(self, owed: int, pending: int) -> np.ndarray:
        completed = self.transitions.completed[pending]
        fits = (completed >= 0) & (completed <= owed)
        alive = self._alive[np.where(fits, owed - completed, 0), self.transitions.pending[pending]]
        return np.append(fits & alive, owed == 0 and pending == 0)


def _read(token: bytes, pending: bytelevel.Pending, lowest: int, highest: int) -> tuple[bytelevel.Pending | None, int]:
    """What is pending after `token`, and how many characters it completed; (None, -1) if it may not follow. Empty tokens never may."""
    count = 0 if token else -1
    for byte in token:
        result = bytelevel.step(pending, byte, lowest, highest)
        if result is None:
            return None, -1
        pending, count = result[0], count + result[1]
    return (pending, count) if token else (None, -1)


def _alive(transitions: Transitions, coefficients: int) -> np.ndarray:
    """From which (owed, pending) the end can be reached: bool (coefficients + 1, P). Worked backwards from "nothing owed"."""
    alive = np.zeros((coefficients + 1, len(transitions.left)), bool)
    alive[0, 0] = True
    steps = []
    for completed, after in zip(transitions.completed, transitions.pending, strict=True):
        steps.append(np.unique(np.stack([completed, after])[:, completed >= 0], axis=1))
    # An id that completes nothing leads to a character with fewer bytes to come, or from "none" to some; so this order suffices.
    order = sorted(range(len(transitions.left)), key=lambda number: (number == 0, transitions.left[number]))
    for owed in range(1, coefficients + 1):
        for number in order:
            completed, after = steps[number]
            fits = completed <= owed
            alive[owed, number] = alive[owed - completed[fits], after[fits]].any()
    return alive
