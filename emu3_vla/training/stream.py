"""The order in which episodes become training documents: a pure function of (seed, step), so a resumed run sees the same data.

An *anchor* is a frame at which a document may start. Each epoch visits every anchor once, in a new order. A document that acts takes the
chunks from there on, and one of its task's wordings; one that is asked takes the images of that frame, and some of the questions about
them with their answers, which are what is supervised. Documents of a *pool* of several steps are sorted by length before they are cut into
batches, so little of a batch is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Protocol

import numpy as np

from emu3_vla.data.tokens import Asked
from emu3_vla.documents import ActionChunk, Batch, Image, Segment, Text, collate, forms, length_of
from emu3_vla.number_words import SpelledNumbers
from emu3_vla.vocabulary import CompactVocabulary
from envs.spec import RGB_GRIPPER, RGB_STATIC

POOL_STEPS = 16
FELT = 0.7
"""Share of the documents that are asked in which the arm's state is said: with it, the place of what is seen is all there is to find."""


class TokenizedEpisode(Protocol):
    """What this module reads of an episode of a token store. F frames.

    static_codes: integers (F, rows, columns). gripper_codes: likewise. frame_step: int (F,), ascending control steps.
    action_ids: F lists of the ids of the chunk that starts at that frame. chunk_imitate: bool (F,). asked, state_FS, scene_FS: see
    data.tokens.
    """

    task: str
    static_codes: np.ndarray
    gripper_codes: np.ndarray
    frame_step: np.ndarray
    action_ids: Sequence[Sequence[int]]
    chunk_imitate: np.ndarray
    asked: Asked | None
    state_FS: np.ndarray | None
    scene_FS: np.ndarray | None


@dataclass(frozen=True)
class _Draw:
    """One document: an anchor's number; which of the task's wordings, or which questions are asked instead of acting."""

    anchor: int
    wording: int = 0
    questions: tuple[int, ...] = ()
    felt: bool = False  # whether the arm's state is said before the questions
    seen: bool = False  # whether what there is to see is said before each chunk's actions


@dataclass(frozen=True)
class _Anchor:
    episode: int
    frames: tuple[int, ...]  # of the document's chunks


class DocumentStream:
    """Documents of a set of episodes.

    wordings: sentences of each task. encode: sentence to text ids. chunks: K, most chunks in a document. horizon: control steps from
    one chunk to the next. batch_size: documents a step, over all processes. asked_fraction: share of the documents that are asked
    `questions` questions each. states: how the arm's state is said, before each chunk's actions and in FELT of the documents
    that are asked; none: it is not. scenes: how what there is to see is said, as a target behind the state, in `scene_fraction` of the
    documents that act, and where it is above 0 in those that are asked with the state. Raises ValueError where an episode's task has no
    wording, or questions or scenes are wanted and there are none.
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
        asked_fraction: float = 0.0,
        questions: int = 6,
        states: SpelledNumbers | None = None,
        scenes: SpelledNumbers | None = None,
        scene_fraction: float = 0.0,
    ):
        need_scenes(scene_fraction, scenes)
        if asked_fraction and not all(episode.asked for episode in episodes):
            raise ValueError(
                f"asked_fraction={asked_fraction}, but the token store holds no questions; "
                "tokenize with questions=envs.calvin.questions:Questions"
            )
        self._asked_fraction, self._questions = asked_fraction, questions
        self._episodes, self._vocabulary = episodes, vocabulary
        self._states, self._scenes, self._scene_fraction = states, scenes, scene_fraction
        self._batch_size, self._seed = batch_size, seed
        self._texts = encoded_wordings(episodes, wordings, encode)
        self._anchors = [
            _Anchor(number, frames) for number, episode in enumerate(episodes) for frames in documents_of(episode, chunks, horizon)
        ]
        if not self._anchors:
            raise ValueError("the token store's episodes hold no frame at all, so there is nothing to train on")
        self._lengths = np.array([length_of(self._chunk_segments(anchor), vocabulary) for anchor in self._anchors])
        self._planned: tuple[int, list[list[_Draw]]] = (-1, [])  # the pool that was planned last

    def __len__(self) -> int:
        """Documents in an epoch."""
        return len(self._anchors)

    def epochs(self, steps: int) -> float:
        """How often so many steps visit every anchor."""
        return steps * self._batch_size / len(self._anchors)

    @property
    def mean_length(self) -> float:
        """Positions of a document that acts, on average over an epoch."""
        texts = {task: sum(map(len, wordings)) / len(wordings) for task, wordings in self._texts.items()}
        return float(self._lengths.mean() + sum(texts[self._episode_of(anchor).task] for anchor in range(len(self))) / len(self))

    def batch(self, step: int, rank: int = 0, processes: int = 1) -> Batch:
        """This process's part of the batch of `step`. Neighbours in length go to different processes, so all take equally long."""
        drawn = self._plan(step)[rank::processes]
        return collate([self._document(draw) for draw in drawn], self._vocabulary)

    def fixed(self, count: int) -> list[Batch]:
        """Up to `count` documents that act, spread over the episodes, each task's first wording, in batches; for validation.

        Where questions are trained on, the same frames are asked too.
        """
        chosen = np.unique(np.linspace(0, len(self._anchors) - 1, min(count, len(self._anchors))).round().astype(int))
        chosen = chosen[np.argsort(self._lengths[chosen], kind="stable")]
        groups = [chosen[start : start + self._batch_size] for start in range(0, len(chosen), self._batch_size)]
        draws = [[_Draw(int(anchor), seen=self._scene_fraction > 0) for anchor in group] for group in groups]
        if self._asked_fraction:
            random = np.random.default_rng((self._seed, 2))
            draws += [[replace(draw, questions=self._some_questions(draw.anchor, random), seen=False) for draw in group] for group in draws]
        return [collate([self._document(draw) for draw in group], self._vocabulary) for group in draws]

    def shown(self, count: int) -> dict[str, list[Segment]]:
        """Up to `count` documents that act, by name, of all tasks in turn, always the same: for people to look at.

        Where questions are trained on, the same frames are asked too.
        """
        places = [(self._episodes[anchor.episode], anchor.frames) for anchor in self._anchors]
        chosen = of_all_tasks(places, count, self._seed)
        documents = {f"act/{number}": self._document(_Draw(anchor)) for number, anchor in enumerate(chosen)}
        if self._asked_fraction:
            random = np.random.default_rng((self._seed, 4))
            asked = [_Draw(anchor, questions=self._some_questions(anchor, random)) for anchor in chosen]
            documents |= {f"ask/{number}": self._document(draw) for number, draw in enumerate(asked)}
        return documents

    def _plan(self, step: int) -> list[_Draw]:
        """Every document of the batch of `step`."""
        pool, slot = divmod(step, POOL_STEPS)
        if self._planned[0] != pool:
            self._planned = pool, self._plan_pool(pool)
        return self._planned[1][slot]

    def _plan_pool(self, pool: int) -> list[list[_Draw]]:
        """Every document of each batch of a pool."""
        first = pool * POOL_STEPS * self._batch_size
        anchors = numbers_between(first, first + POOL_STEPS * self._batch_size, len(self._anchors), (self._seed, 0))
        random = np.random.default_rng((self._seed, 1, pool))
        numbers = random.random(len(anchors))
        draws = [self._draw(int(anchor), float(number), random) for anchor, number in zip(anchors, numbers, strict=True)]
        by_length = np.argsort([self._length(draw) for draw in draws], kind="stable").reshape(POOL_STEPS, self._batch_size)
        return [[draws[index] for index in by_length[row]] for row in random.permutation(POOL_STEPS)]

    def _draw(self, anchor: int, number: float, random: np.random.Generator) -> _Draw:
        """A document at an anchor. number: in [0, 1), decides on wording or questions."""
        if number < self._asked_fraction:
            questions = self._some_questions(anchor, random)
            return _Draw(anchor, questions=questions, felt=self._states is not None and bool(random.random() < FELT))
        share = (number - self._asked_fraction) / (1 - self._asked_fraction)
        seen = self._scene_fraction > 0 and bool(random.random() < self._scene_fraction)
        return _Draw(anchor, wording=int(share * len(self._texts_of(anchor))), seen=seen)

    def _some_questions(self, anchor: int, random: np.random.Generator) -> tuple[int, ...]:
        count = self._episode_of(anchor).asked.lengths_FQ2.shape[1]
        return tuple(int(question) for question in random.permutation(count)[: self._questions])

    def _length(self, draw: _Draw) -> int:
        if draw.questions:
            return length_of(self._asked_segments(draw), self._vocabulary)
        length = int(self._lengths[draw.anchor]) + len(self._texts_of(draw.anchor)[draw.wording])
        return length + (self._scenes.most_ids * len(self._anchors[draw.anchor].frames) if draw.seen else 0)

    def _episode_of(self, anchor: int) -> TokenizedEpisode:
        return self._episodes[self._anchors[anchor].episode]

    def _texts_of(self, anchor: int) -> list[list[int]]:
        """Text ids of the wordings of an anchor's task."""
        return self._texts[self._episode_of(anchor).task]

    def _document(self, draw: _Draw) -> list[Segment]:
        if draw.questions:
            return self._asked_segments(draw)
        instruction = Text(self._texts_of(draw.anchor)[draw.wording], supervised=False)
        return [instruction, *self._chunk_segments(self._anchors[draw.anchor], draw.seen)]

    def _asked_segments(self, draw: _Draw) -> list[Segment]:
        episode, frame = self._episode_of(draw.anchor), self._anchors[draw.anchor].frames[0]
        look = images_of(episode, frame, supervised=False)
        if draw.felt:
            look += felt_and_seen(episode, frame, self._states, self._scenes if self._scene_fraction else None)
        return forms.asked(look, asked_texts(episode, frame, draw.questions))

    def _chunk_segments(self, anchor: _Anchor, seen: bool = False) -> list[Segment]:
        episode = self._episodes[anchor.episode]
        chunks = [ActionChunk(episode.action_ids[frame], supervised=bool(episode.chunk_imitate[frame])) for frame in anchor.frames]
        return forms.acted([], [self._look(episode, frame, seen) for frame in anchor.frames], chunks)

    def _look(self, episode: TokenizedEpisode, frame: int, seen: bool) -> list[Segment]:
        """What stands before a chunk's actions."""
        return look_at(episode, frame, self._states, self._scenes if seen else None)


def need_scenes(scene_fraction: float, scenes: SpelledNumbers | None) -> None:
    """Raises ValueError where a scene is to be said of which nothing is known."""
    if scene_fraction and scenes is None:
        raise ValueError(
            f"scene_fraction={scene_fraction}, but the token store does not say what there is to see; "
            "tokenize with scene=envs.calvin.scene_numbers:SceneNumbers"
        )


def images_of(episode: TokenizedEpisode, frame: int, supervised: bool = True) -> list[Image]:
    """What both cameras show at a frame."""
    static, gripper = episode.static_codes[frame], episode.gripper_codes[frame]
    return [Image(RGB_STATIC, static, supervised=supervised), Image(RGB_GRIPPER, gripper, supervised=supervised)]


def look_at(episode: TokenizedEpisode, frame: int, states: SpelledNumbers | None, scenes: SpelledNumbers | None) -> list[Segment]:
    """What stands before a chunk's actions: both images, and where they are said, the arm's state and what there is to see."""
    return [*images_of(episode, frame), *felt_and_seen(episode, frame, states, scenes)]


def felt_and_seen(episode: TokenizedEpisode, frame: int, states: SpelledNumbers | None, scenes: SpelledNumbers | None) -> list[Segment]:
    """What stands behind the images, where it is said: the arm's state, which is given, and what there is to see, which is learnt."""
    return [*said(states, episode.state_FS, frame, supervised=False), *said(scenes, episode.scene_FS, frame)]


def asked_texts(episode: TokenizedEpisode, frame: int, questions: Iterable[int]) -> list[Text]:
    """Questions about a frame, by number, each with its answer, which alone is supervised."""
    pairs = [episode.asked.pair(frame, int(question)) for question in questions]
    return [text for asked, answer in pairs for text in (Text(asked, supervised=False), Text(answer))]


def said(spelled: SpelledNumbers | None, numbers_FS: np.ndarray | None, frame: int, supervised: bool = True) -> list[Segment]:
    """The numbers at a frame as a segment, where they are said."""
    return [Text(spelled.ids(numbers_FS[frame]), supervised=supervised)] if spelled else []


def documents_of(episode: TokenizedEpisode, chunks: int, horizon: int, disturbed: bool = False) -> list[tuple[int, ...]]:
    """Frames of the document that starts at each frame: up to `chunks` of them, `horizon` control steps apart.

    disturbed: also those of which the demonstrator chose no chunk.
    """
    frame_of = {int(step): frame for frame, step in enumerate(episode.frame_step)}
    documents = []
    for step, frame in frame_of.items():
        frames = [frame]
        while len(frames) < chunks and (step := step + horizon) in frame_of:
            frames.append(frame_of[step])
        # A document without a supervised chunk teaches nothing about acting.
        if disturbed or any(episode.chunk_imitate[frame] for frame in frames):
            documents.append(tuple(frames))
    return documents


def of_all_tasks(places: Sequence[tuple[TokenizedEpisode, tuple[int, ...]]], count: int, seed: int) -> list[int]:
    """Up to `count` of these documents (episode and frames of each), one of each task in turn; their numbers.

    They are among the longest, and where there are some, among those whose last chunk but one, before the last images, is demonstrated.
    """
    most = max(len(frames) for _, frames in places)
    longest = [number for number, (_, frames) in enumerate(places) if len(frames) == most]
    before_last = max(0, most - 2)
    demonstrated = [number for number in longest if places[number][0].chunk_imitate[places[number][1][before_last]]]
    by_task: dict[str, list[int]] = {}
    for number in np.random.default_rng((seed, 5)).permutation(demonstrated or longest).tolist():
        by_task.setdefault(places[number][0].task, []).append(number)
    turns = [number for turn in zip_longest(*(by_task[task] for task in sorted(by_task))) for number in turn if number is not None]
    return turns[:count]


def numbers_between(first: int, last: int, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Entries first .. last - 1 of an endless sequence: 0 .. count - 1 shuffled, and shuffled again, by seeds (*key, epoch)."""
    epochs = range(first // count, (last - 1) // count + 1)
    shuffled = [np.random.default_rng((*key, epoch)).permutation(count) for epoch in epochs]
    start = first - epochs[0] * count
    return np.concatenate(shuffled)[start : start + last - first]


def encoded_wordings(
    episodes: Sequence[TokenizedEpisode], wordings: Mapping[str, Sequence[str]], encode: Callable[[str], Sequence[int]]
) -> dict[str, list[Sequence[int]]]:
    """Ids of the wordings of every task that occurs. Raises ValueError where one has none."""
    texts = {}
    for task in sorted({episode.task for episode in episodes}):
        if not wordings.get(task):
            raise ValueError(f"the token store has episodes of {task!r} but no wording of it; tokenize a store that has")
        texts[task] = [encode(sentence) for sentence in wordings[task]]
    return texts
