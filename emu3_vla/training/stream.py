"""The order in which episodes become training documents: a pure function of (seed, step), so a resumed run sees the same data.

An *anchor* is a frame at which a document may start. Each epoch visits every anchor once, in a new order; a document takes the chunks
from there on, and one of its task's wordings. Documents of a *pool* of several steps are sorted by length before they are cut into
batches, so little of a batch is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from emu3_vla.documents import ActionChunk, Batch, Image, Segment, Text, collate, length_of
from emu3_vla.vocabulary import CompactVocabulary
from envs.spec import RGB_GRIPPER, RGB_STATIC

POOL_STEPS = 16


class TokenizedEpisode(Protocol):
    """What this module reads of an episode of a token store. F frames.

    static_codes: integers (F, rows, columns). gripper_codes: likewise. frame_step: int (F,), ascending control steps.
    action_ids: F lists of the ids of the chunk that starts at that frame. chunk_imitate: bool (F,).
    """

    task: str
    static_codes: np.ndarray
    gripper_codes: np.ndarray
    frame_step: np.ndarray
    action_ids: Sequence[Sequence[int]]
    chunk_imitate: np.ndarray


@dataclass(frozen=True)
class _Anchor:
    episode: int
    frames: tuple[int, ...]  # of the document's chunks


class DocumentStream:
    """Documents of a set of episodes.

    wordings: sentences of each task. encode: sentence to text ids. chunks: K, most chunks in a document. horizon: control steps from
    one chunk to the next. batch_size: documents a step, over all processes. Raises ValueError where an episode's task has no wording.
    """

    def __init__(
        self,
        episodes: Sequence[TokenizedEpisode],
        *,
        vocabulary: CompactVocabulary,
        wordings: Mapping[str, Sequence[str]],
        encode: Callable[[str], Sequence[int]],
        chunks: int,
        horizon: int,
        batch_size: int,
        seed: int,
    ):
        self._episodes, self._vocabulary = episodes, vocabulary
        self._batch_size, self._seed = batch_size, seed
        self._texts = _encoded_wordings(episodes, wordings, encode)
        self._anchors = [
            _Anchor(number, frames) for number, episode in enumerate(episodes) for frames in _documents_of(episode, chunks, horizon)
        ]
        if not self._anchors:
            raise ValueError("the token store's episodes hold no frame at all, so there is nothing to train on")
        self._lengths = np.array([length_of(self._chunk_segments(anchor), vocabulary) for anchor in self._anchors])

    def __len__(self) -> int:
        """Documents in an epoch."""
        return len(self._anchors)

    def batch(self, step: int, rank: int = 0, processes: int = 1) -> Batch:
        """This process's part of the batch of `step`. Neighbours in length go to different processes, so all take equally long."""
        drawn = self._plan(step)[rank::processes]
        return collate([self._document(anchor, wording) for anchor, wording in drawn], self._vocabulary)

    def fixed(self, count: int) -> list[Batch]:
        """Up to `count` documents spread over the episodes, each task's first wording, in batches; for validation."""
        chosen = np.unique(np.linspace(0, len(self._anchors) - 1, min(count, len(self._anchors))).round().astype(int))
        chosen = chosen[np.argsort(self._lengths[chosen], kind="stable")]
        groups = [chosen[start : start + self._batch_size] for start in range(0, len(chosen), self._batch_size)]
        return [collate([self._document(int(anchor), 0) for anchor in group], self._vocabulary) for group in groups]

    def _plan(self, step: int) -> list[tuple[int, int]]:
        """(anchor, wording) of every document of the batch of `step`."""
        pool, slot = divmod(step, POOL_STEPS)
        first = pool * POOL_STEPS * self._batch_size
        anchors = self._anchors_between(first, first + POOL_STEPS * self._batch_size)
        random = np.random.default_rng((self._seed, 1, pool))
        draws = random.random(len(anchors))
        texts = [self._texts[self._episodes[self._anchors[anchor].episode].task] for anchor in anchors]
        wordings = [int(draw * len(text)) for draw, text in zip(draws, texts, strict=True)]
        lengths = self._lengths[anchors] + [len(text[wording]) for text, wording in zip(texts, wordings, strict=True)]
        by_length = np.argsort(lengths, kind="stable").reshape(POOL_STEPS, self._batch_size)
        row = by_length[random.permutation(POOL_STEPS)[slot]]
        return [(int(anchors[index]), wordings[index]) for index in row]

    def _anchors_between(self, first: int, last: int) -> np.ndarray:
        """Anchors numbered first .. last - 1 of the endless sequence of shuffled epochs."""
        count = len(self._anchors)
        epochs = range(first // count, (last - 1) // count + 1)
        shuffled = [np.random.default_rng((self._seed, 0, epoch)).permutation(count) for epoch in epochs]
        start = first - epochs[0] * count
        return np.concatenate(shuffled)[start : start + last - first]

    def _document(self, number: int, wording: int) -> list[Segment]:
        anchor = self._anchors[number]
        text = self._texts[self._episodes[anchor.episode].task][wording]
        return [Text(text), *self._chunk_segments(anchor)]

    def _chunk_segments(self, anchor: _Anchor) -> list[Segment]:
        episode, segments = self._episodes[anchor.episode], []
        for frame in anchor.frames:
            segments += [
                Image(RGB_STATIC, episode.static_codes[frame]),
                Image(RGB_GRIPPER, episode.gripper_codes[frame]),
                ActionChunk(episode.action_ids[frame], supervised=bool(episode.chunk_imitate[frame])),
            ]
        return segments


def _documents_of(episode: TokenizedEpisode, chunks: int, horizon: int) -> list[tuple[int, ...]]:
    """Frames of the document that starts at each frame: up to `chunks` of them, `horizon` control steps apart."""
    frame_of = {int(step): frame for frame, step in enumerate(episode.frame_step)}
    documents = []
    for step, frame in frame_of.items():
        frames = [frame]
        while len(frames) < chunks and (step := step + horizon) in frame_of:
            frames.append(frame_of[step])
        # A document without a supervised chunk teaches nothing about acting.
        if any(episode.chunk_imitate[frame] for frame in frames):
            documents.append(tuple(frames))
    return documents


def _encoded_wordings(
    episodes: Sequence[TokenizedEpisode], wordings: Mapping[str, Sequence[str]], encode: Callable[[str], Sequence[int]]
) -> dict[str, list[Sequence[int]]]:
    texts = {}
    for task in sorted({episode.task for episode in episodes}):
        if not wordings.get(task):
            raise ValueError(f"the token store has episodes of {task!r} but no wording of it; tokenize a store that has")
        texts[task] = [encode(sentence) for sentence in wordings[task]]
    return texts
