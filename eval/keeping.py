"""What an evaluation keeps of each chain beside its numbers: pictures of failures always, recordings on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.chain import Attempt, ChainResult, Watcher
from eval.gallery import FAILURES_FOLDER, FailurePictures
from eval.watching import Camera, Watchers
from policies.safety import SafetyEvent

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

RECORDINGS_FOLDER = "recordings"
RECORD_NONE, RECORD_FAILURES, RECORD_ALL = RECORD_CHOICES = ("none", "failures", "all")


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What is kept, and where. It goes to the workers, wherever they run: `folder` must be theirs too."""

    folder: str  # the evaluation's output folder
    max_steps: int  # control steps a subtask
    record: str = RECORD_NONE  # a Rerun recording of no chain, of those with an unsolved subtask or an error, or of all
    title: str = ""  # of the recordings


def keeping_watcher(keep: Keep | None, *others: Watcher) -> Watcher:
    """`others`, and the watchers that do what `keep` says (nothing where it is None), as one."""
    if keep is None:
        return Watchers(*others)
    watchers = [*others, FailurePictures(Path(keep.folder) / FAILURES_FOLDER, max_steps=keep.max_steps)]
    if keep.record != RECORD_NONE:
        folder, failures_only = Path(keep.folder) / RECORDINGS_FOLDER, keep.record == RECORD_FAILURES
        watchers.append(ChainRecordings(folder, failures_only=failures_only, title=keep.title))
    return Watchers(*watchers)


def recording_name(chain: int) -> str:
    """File name of a chain's recording."""
    return f"chain{chain:04d}.rrd"


class ChainRecordings(Watcher):
    """One Rerun recording a chain. failures_only: that of a chain with all subtasks solved is dropped again when it ends."""

    def __init__(self, folder: Path, *, failures_only: bool, title: str):
        self.folder, self.failures_only, self.title = folder, failures_only, title
        self.recorder = None

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        from eval.recording import Recorder  # rerun takes long to import, and most evaluations record nothing

        self.folder.mkdir(parents=True, exist_ok=True)
        self.recorder = Recorder(self.folder / recording_name(index), title=f"{self.title} · chain {index}", camera=Camera())
        self.recorder.chain_begins(env, index, subtasks)

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        self.recorder.subtask_begins(position, attempt)

    def decided(self, answer: dict) -> None:
        self.recorder.decided(answer)

    def guarded(self, events: list[SafetyEvent]) -> None:
        self.recorder.guarded(events)

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        self.recorder.stepped(env, action, before, attempt)

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        self.recorder.subtask_ends(position, attempt)

    def chain_ends(self, result: ChainResult) -> None:
        if self.recorder is None:  # it broke before it began
            return
        recorder, self.recorder = self.recorder, None
        recorder.chain_ends(result)
        solved = result.error is None and result.num_solved == len(result.subtasks)
        recorder.close(keep=not (self.failures_only and solved))
