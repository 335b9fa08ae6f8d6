"""Kinds of documents that one episode store teaches, each made from an anchor: an episode and some of its frames.

    text        instruction, and what there is to see
    draw        what there is to see, then both images            (caption → image)
    describe    both images, then what there is to see            (image → caption)
    film        instruction, then one camera's frames in time, without actions
    world       instruction, images, actions, the images after them, actions, ...   (the future is what is predicted)
    ask         both images, questions and answers; in most of them behind the images the arm's state, where it is known, and what there
                is to see, in number words, where the model says that before it acts
    act         instruction, images, actions, ...                 (the policy's documents)
    interleave  instruction, then moments in order: what there is to see, and its picture

What there is to see is the answer to the first question that the token store holds about a frame; see emu3_vla.data.tokenize.Questioner.
With `scene_first` the pictures of draw, film, world and interleave that the model is to make are foretold: before them it says in number
words where the arm will be and what there will be to see, and draws what it said. Where things go is then learnt as words, which a small
model learns soon, and how they look from any of these documents.
Texts, images and actions are supervised unless they are given when the model works; a stage's loss says which kinds of tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emu3_vla.documents import ActionChunk, End, Image, Segment, Text, forms
from emu3_vla.number_words import SpelledNumbers
from emu3_vla.training.stream import FELT, TokenizedEpisode, asked_texts, documents_of, felt_and_seen, images_of, look_at, need_scenes, said
from emu3_vla.vocabulary import Emu3Vocabulary, Vocabulary
from envs.spec import RGB_STATIC

CAPTION = 0
"""Number of the question whose answer describes a frame."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What documents are made of.

    texts: ids of each task's wordings. horizon: control steps of a chunk. chunks, moments, questions: most of each in a document.
    states: how the arm's state is said before each chunk of `act`, where it is. scenes: how what there is to see is said behind it, as a
    target, in `scene_fraction` of those documents. scene_first: both are said before pictures, too; scene_asked: and before questions.
    """

    episodes: Sequence[TokenizedEpisode]
    texts: Mapping[str, Sequence[Sequence[int]]]
    vocabulary: Vocabulary
    horizon: int
    chunks: int
    moments: int
    questions: int
    states: SpelledNumbers | None = None
    scenes: SpelledNumbers | None = None
    scene_fraction: float = 0.0
    scene_first: bool = False
    scene_asked: bool = False

    def __post_init__(self):
        need_scenes(self.scene_fraction, self.scenes)
        if self.scene_first and (self.scenes is None or isinstance(self.vocabulary, Emu3Vocabulary)):
            raise ValueError(
                "scene_first=true says before a picture what it will show: it needs a token store that knows it (tokenize with "
                "scene=envs.calvin.scene_numbers:SceneNumbers) and pictures in blocks, which Emu3's own vocabulary has not; "
                "or give scene_first=false"
            )


@dataclass(frozen=True)
class Anchor:
    """What a document is about: numbers of an episode and of some of its frames."""

    episode: int
    frames: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """frames: of each document that an episode can give. write: a document. needs_questions: whether frames must have some."""

    frames: Callable[[Material, TokenizedEpisode], list[tuple[int, ...]]]
    write: Callable[[Material, TokenizedEpisode, tuple[int, ...], np.random.Generator], list[Segment]]
    needs_questions: bool = False


def anchors_of(name: str, material: Material) -> list[Anchor]:
    """Every anchor of documents of this kind. Raises ValueError where the token store cannot give any, saying what it lacks."""
    kind = KINDS[name]
    if kind.needs_questions and not all(episode.asked for episode in material.episodes):
        raise ValueError(
            f"mixture.{name} needs questions about the frames, and the token store holds none; tokenize with questions=module:Class"
        )
    anchors = [Anchor(number, frames) for number, episode in enumerate(material.episodes) for frames in kind.frames(material, episode)]
    if not anchors:
        raise ValueError(f"mixture.{name}: none of the {len(material.episodes)} episodes gives such a document; they are too short for it")
    return anchors


def write(name: str, material: Material, anchor: Anchor, random: np.random.Generator) -> list[Segment]:
    """The document of this kind at an anchor. random: decides on wordings and questions."""
    return KINDS[name].write(material, material.episodes[anchor.episode], anchor.frames, random)


def _each_frame(material: Material, episode: TokenizedEpisode) -> list[tuple[int, ...]]:
    return [(frame,) for frame in range(len(episode.frame_step))]


def _runs(material: Material, episode: TokenizedEpisode) -> list[tuple[int, ...]]:
    """Neighbouring frames, up to `moments`, from each frame on that has a neighbour."""
    count = len(episode.frame_step)
    return [tuple(range(first, min(first + material.moments, count))) for first in range(count - 1)]


def _spread(material: Material, episode: TokenizedEpisode) -> list[tuple[int, ...]]:
    """Frames from each one on to the last, evenly apart."""
    last = len(episode.frame_step) - 1
    spread = [np.unique(np.linspace(first, last, material.moments).round().astype(int)) for first in range(last)]
    return [tuple(frames.tolist()) for frames in spread]


def _acted(material: Material, episode: TokenizedEpisode) -> list[tuple[int, ...]]:
    return documents_of(episode, material.chunks, material.horizon)


def _consequences(material: Material, episode: TokenizedEpisode) -> list[tuple[int, ...]]:
    """Frames a chunk apart, disturbed or not: what happens is true of both."""
    frames = documents_of(episode, material.chunks, material.horizon, disturbed=True)
    return [each for each in frames if len(each) > 1]


def _text(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    caption = [_caption(episode, frames[0])] if episode.asked else []
    return [_instruction(material, episode, random), *caption, End()]


def _draw(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    look = [*_foretold(material, episode, frames[0]), *images_of(episode, frames[0])]
    return [*forms.captioned([_caption(episode, frames[0])], look), End()]


def _describe(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    return [*forms.described(images_of(episode, frames[0]), [_caption(episode, frames[0])]), End()]


def _film(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    instruction, codes = _instruction(material, episode, random), episode.static_codes[list(frames)]
    # The first frames may be given; of those nothing is said.
    given = int(random.integers(len(frames))) if material.scene_first else len(frames)
    foretold = [[] if number < given else _foretold(material, episode, frame) for number, frame in enumerate(frames)]
    return [*forms.filmed([instruction], codes, material.vocabulary, RGB_STATIC, foretold), End()]


def _world(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    instruction = _instruction(material, episode, random, supervised=False)
    now, *later = frames
    after = [[*_foretold(material, episode, frame), *images_of(episode, frame)] for frame in later]
    looks = [images_of(episode, now, supervised=False), *after]
    chunks = [ActionChunk(episode.action_ids[frame], supervised=False) for frame in frames[:-1]]
    return [*forms.acted([instruction], looks, chunks), End()]


def _ask(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    questions = random.permutation(episode.asked.lengths_FQ2.shape[1])[: material.questions]
    look = images_of(episode, frames[0], supervised=False)
    if material.states and random.random() < FELT:
        look += felt_and_seen(episode, frames[0], material.states, material.scenes if material.scene_asked else None)
    return forms.asked(look, asked_texts(episode, frames[0], questions))


def _act(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    instruction = _instruction(material, episode, random, supervised=False)
    scenes = material.scenes if material.scene_fraction and random.random() < material.scene_fraction else None
    looks = [look_at(episode, frame, material.states, scenes) for frame in frames]
    chunks = [ActionChunk(episode.action_ids[frame], supervised=bool(episode.chunk_imitate[frame])) for frame in frames]
    return forms.acted([instruction], looks, chunks)


def _interleave(material: Material, episode: TokenizedEpisode, frames: tuple[int, ...], random: np.random.Generator) -> list[Segment]:
    moments = [
        [_caption(episode, frame), *_foretold(material, episode, frame), Image(RGB_STATIC, episode.static_codes[frame])] for frame in frames
    ]
    return [*forms.interleaved([_instruction(material, episode, random)], moments), End()]


def _instruction(material: Material, episode: TokenizedEpisode, random: np.random.Generator, supervised: bool = True) -> Text:
    wordings = material.texts[episode.task]
    return Text(wordings[random.integers(len(wordings))], supervised=supervised)


def _foretold(material: Material, episode: TokenizedEpisode, frame: int) -> list[Segment]:
    """What pictures will show, in number words; nothing where that is not said before them."""
    if not material.scene_first:
        return []
    return [*said(material.states, episode.state_FS, frame), *said(material.scenes, episode.scene_FS, frame)]


def _caption(episode: TokenizedEpisode, frame: int) -> Text:
    return Text(episode.asked.pair(frame, CAPTION)[1])


PICTURED = frozenset({"draw", "film", "world", "interleave"})
"""Kinds whose pictures may be foretold."""

KINDS: dict[str, Kind] = {
    "text": Kind(_each_frame, _text),
    "draw": Kind(_each_frame, _draw, needs_questions=True),
    "describe": Kind(_each_frame, _describe, needs_questions=True),
    "film": Kind(_runs, _film),
    "world": Kind(_consequences, _world),
    "ask": Kind(_each_frame, _ask, needs_questions=True),
    "act": Kind(_acted, _act),
    "interleave": Kind(_spread, _interleave, needs_questions=True),
}
