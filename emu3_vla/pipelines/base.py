"""What all paths share: the checkpoint with its parts, pictures to codes and back, and the engine.

Axes: T frames, H W rows and columns of pixels, F frames of codes, h w rows and columns of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from emu3_vla.checkpoint import ACTION, NORMALIZER, POLICY, TEXT, VISION, VOCABULARY, Checkpoint
from emu3_vla.checkpoint.layouts import UNIVLA
from emu3_vla.data.tokenize import ENCODE_BATCH
from emu3_vla.documents import Begin, Image, Segment, Text
from emu3_vla.generation.drafts import repeat_last
from emu3_vla.generation.engine import PromptTooLong
from emu3_vla.generation.engines import GeneratingEngine, open_engine
from emu3_vla.generation.grammar import Grammar, Item
from emu3_vla.generation.items import Prompt, ids_of, items_of
from emu3_vla.generation.pieces import Piece, numbers
from emu3_vla.generation.requests import INT8, Event, Parallel, Request
from emu3_vla.generation.sampling import Guidance, Sampling
from emu3_vla.number_words import NumberWords, NumberWordsError, SpelledNumbers, StateWords
from emu3_vla.pipelines.errors import LacksPart, PipelineError, WrongFrames, WrongPictures, WrongSize, WrongState
from emu3_vla.vision_tokenizer import VisionTokenizer
from emu3_vla.vision_tokenizer.images import from_bytes, resize, to_images
from emu3_vla.vocabulary import CompactVocabulary, ImageGrid
from envs.spec import CAMERAS, ROBOT_OBS

IMAGE = "image"
"""What a picture is called where the checkpoint has no cameras."""
LEAST_PIXELS, MOST_PIXELS = 512**2, 1024**2
"""Between which a picture of any size is brought before Emu3's published weights see it. Source: baaivision/Emu3's image processor."""
CAPACITY_STEP = 256
TRAINED, PUBLISHED = FORMS = ("trained", "published")
"""Questions as our training asks them, or in the chat form of Emu3's published weights; see docs/pipelines.md."""

Picture = np.ndarray
Pictures = Picture | Sequence[Picture] | Mapping[str, Picture]
"""uint8 (H, W, 3) RGB: one, several in the order of the checkpoint's cameras, or by the cameras' names."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How ids are chosen; see emu3_vla.generation.sampling. Raises SamplingError, RequestError when it is used."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    guidance: float = 1.0  # scale of classifier-free guidance; 1: none
    negative: str = ""  # what guidance moves away from; empty: the null prompt
    parallel: int = 0  # guesses verified at once, which changes nothing but the time; 0: one id at a time
    lossy: int = 0  # rounds after which these guesses count as right: sooner, and not what the model would have written; 0: never
    samples: int = 1  # that are drawn, of which the one nearest to all is kept; of films, foresight and answers alone

    def __post_init__(self):
        if self.negative and self.guidance == 1:
            raise PipelineError(f"negative={self.negative!r} does nothing without guidance; set guidance above 1")
        if self.lossy and not self.parallel:
            raise PipelineError(f"lossy={self.lossy} is of guesses, and parallel=0 makes none; set parallel to the most at once")


@dataclass(frozen=True)
class Written:
    """What a request wrote. finish: as in emu3_vla.generation.requests.Event."""

    items: list[Item]
    finish: str


class PipelineBase:
    """See emu3_vla.pipelines.Pipelines.

    engine, compile, int8_draft: see emu3_vla.generation.engines; it is the draft's guesses that `Decoding.parallel` then verifies. rows:
    sequences at once, at most. form: one of FORMS; empty: "trained" for what our `emu3-vla train` left, "published" for all else. say: is
    told in a sentence where a picture is resized. progress: is told, while something is written, how many ids of how many are done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        engine: str = "ours",
        compile: bool = False,
        int8_draft: bool = False,
        rows: int = 8,
        form: str = "",
        say: Callable[[str], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ):
        if checkpoint.vocabulary is None:
            raise LacksPart(f"{checkpoint.folder} has no {VOCABULARY}: nobody knows which of its ids are text and which are pictures")
        if rows < 1:
            raise PipelineError(f"rows is {rows}, expected at least 1")
        if form not in ("", *FORMS):
            raise PipelineError(f"form={form!r}, expected one of {', '.join(FORMS)}, or nothing to let the checkpoint say")
        self.checkpoint, self.vocabulary = checkpoint, checkpoint.vocabulary
        self.progress = progress or (lambda _done, _total: None)
        self._say, self._said = say or (lambda _: None), set()
        self.published = (form or (TRAINED if checkpoint.provenance.get("command") == "train" else PUBLISHED)) == PUBLISHED
        self._engine_name, self._options, self._most_rows = engine, {"compile": compile, "int8_draft": int8_draft}, rows
        self._engine: tuple[int, int, GeneratingEngine] | None = None  # rows, capacity

    # -- parts of the checkpoint

    @property
    def vision(self) -> VisionTokenizer:
        return self._part(self.checkpoint.vision_tokenizer, VISION)

    @property
    def text(self):
        return self._part(self.checkpoint.text_tokenizer, TEXT)

    @cached_property
    def number_ids(self) -> tuple[int, ...]:
        """Text ids that stand for numbers alone: what a policy is told of its arm, and what it says that it sees. No words for people."""
        spelled = [words.single_ids() for words in (self.state_words, self.scene_words) if words]
        return tuple(index for ids in spelled if ids is not None for index in ids.flatten().tolist())

    @cached_property
    def foretold(self) -> tuple[Piece, ...]:
        """Grammar of what the model says before pictures of what they will show; empty where it was not trained to."""
        settings = self.checkpoint.policy
        if settings is None or not settings.scene_first:
            return ()
        return tuple(self._written(words) for words in (self.state_words, self.scene_words) if words)

    @cached_property
    def seen(self) -> tuple[Piece, ...]:
        """Grammar of what the model says, behind pictures and its arm's state, that it sees; empty where it was not trained to."""
        return (self._written(self.scene_words),) if self.scene_words else ()

    @cached_property
    def state_words(self) -> SpelledNumbers | None:
        """How the arm's state is said, where the policy is told it."""
        settings = self.checkpoint.policy
        return StateWords.of(settings.state).spelled(self.text.encode) if settings and settings.state else None

    @cached_property
    def scene_words(self) -> SpelledNumbers | None:
        """How what there is to see is said, where the policy says it."""
        settings = self.checkpoint.policy
        return NumberWords.of(settings.scene).spelled(self.text.encode) if settings and settings.scene else None

    def _written(self, words: SpelledNumbers) -> Piece:
        ids_SB = words.single_ids()
        if ids_SB is None:
            raise LacksPart(
                f"{self.checkpoint.folder} says {', '.join(words.words.names)} in number words, which its text tokenizer has not as ids"
            )
        return numbers(self.vocabulary, ids_SB)

    @property
    def actions(self):
        """Action tokenizer, normaliser, and the shape of a chunk."""
        found = self.checkpoint
        tokenizer, normalizer = self._part(found.action_tokenizer, ACTION), self._part(found.normalizer, NORMALIZER)
        return tokenizer, normalizer, self._part(found.policy, POLICY)

    @property
    def codes_clips(self) -> bool:
        """Whether a code of a video stands for several frames in time. Our training and UniVLA's code every frame as an image."""
        return self.published and self.checkpoint.layout != UNIVLA.name and self.vision.frames_per_code > 1

    @property
    def context(self) -> int:
        """Positions of prompt and answer that the model was made for."""
        return self.checkpoint.model.config.max_position_embeddings

    @cached_property
    def cameras(self) -> tuple[ImageGrid, ...]:
        """The pictures that the checkpoint knows by name, in the order of the stream; none where any picture will do."""
        if isinstance(self.vocabulary, CompactVocabulary):
            return self.vocabulary.images
        sizes = self.vision.image_sizes
        return tuple(
            ImageGrid(name=name, rows=rows, columns=columns)
            for name in CAMERAS
            if name in sizes
            for rows, columns in [self.vision.grid(name)]
        )

    def _part(self, part, name: str):
        if part is None:
            raise LacksPart(f"{self.checkpoint.folder} has no {name}, which this needs")
        return part

    # -- in and out

    def texts(self, sentence: str, what: str = "") -> list[Text]:
        """The sentence as a segment; none for an empty one, or PipelineError if `what` names one that is needed."""
        if what and not sentence.strip():
            raise PipelineError(f"the {what} is empty; say it in words")
        ids = self.text.encode(sentence)
        return [Text(ids)] if len(ids) else []

    def look(self, pictures: Pictures) -> list[Image]:
        """Pictures as the checkpoint is shown them. Raises WrongPictures, WrongSize, LacksPart."""
        if not self.cameras:
            given = list(pictures.values()) if isinstance(pictures, Mapping) else [pictures] if _is_one(pictures) else list(pictures)
            if not given:
                raise WrongPictures("there is no picture to look at; expected at least one")
            return [Image("", self.code(picture, "")) for picture in given]
        names = [grid.name for grid in self.cameras]
        if not isinstance(pictures, Mapping):
            pictures = dict(enumerate([pictures] if _is_one(pictures) else pictures))
            if len(pictures) != len(names):
                raise WrongPictures(
                    f"this checkpoint is shown {len(names)} pictures at once ({', '.join(names)}), not {len(pictures)}"
                )
            pictures = dict(zip(names, pictures.values(), strict=True))
        if sorted(pictures) != sorted(names):
            raise WrongPictures(f"pictures of {', '.join(sorted(pictures))} were given; this checkpoint is shown {', '.join(names)}")
        return [Image(name, self.code(pictures[name], name)) for name in names]

    def felt(self, state: np.ndarray) -> Text:
        """The arm's state as the checkpoint is told it. state: robot_obs, float (15,). Raises WrongState, LacksPart."""
        if self.state_words is None:
            raise WrongState(f"{self.checkpoint.folder} was not told its arm's state in training; ask without state")
        try:
            return Text(self.state_words.ids(self.state_words.words.numbers(np.asarray(state, np.float64))))
        except (NumberWordsError, TypeError, ValueError) as error:
            raise WrongState(
                f"state is expected to be {ROBOT_OBS} of the moment of the pictures, in metres and radians; or ask without: {error}"
            ) from error

    def code(self, picture: Picture, camera: str) -> np.ndarray:
        """Codes of a picture: int64 (h, w). camera: "" for a checkpoint without; then a picture keeps its shape, about."""
        return self.code_frames(checked_picture(picture)[None], camera)[0]

    def code_frames(self, frames: np.ndarray, camera: str, *, clips: bool = False) -> np.ndarray:
        """Codes of uint8 (T, H, W, 3): int64 (F, h, w). clips: several frames a code."""
        height, width = self.read_size(frames.shape[1], frames.shape[2], camera)
        if (height, width) != frames.shape[1:3]:
            name = camera or "pictures of that shape"
            self._tell(f"{frames.shape[2]}×{frames.shape[1]} pixels are resized to {width}×{height}, at which this checkpoint reads {name}")
        return self._encoded(resize(np.ascontiguousarray(frames), (height, width)), clips)

    def read_size(self, height: int, width: int, camera: str) -> tuple[int, int]:
        """Rows and columns of pixels at which a picture of this size is read."""
        if camera:
            side = self.vision.image_size(camera)
            return side, side
        return fitted_size(height, width, self.vision.patch)

    def pixels(self, codes: np.ndarray, *, clips: bool = False) -> np.ndarray:
        """The inverse of `code_frames`, at the codes' own size: int64 (F, h, w) -> uint8 (T, H, W, 3)."""
        whole = torch.from_numpy(np.asarray(codes).astype(np.int64)).to(self.vision.device)
        if clips:
            return to_images(self.vision.decode(whole[None])[0])
        return np.concatenate([to_images(self.vision.decode(part)) for part in whole.split(ENCODE_BATCH)])

    def shown(self, images: Sequence[Image]) -> dict[str, Picture]:
        """Images as pictures by name."""
        return {image.name or IMAGE: self.pixels(image.codes[None])[0] for image in images}

    def _tell(self, sentence: str) -> None:
        """Say it, once."""
        if sentence not in self._said:
            self._said.add(sentence)
            self._say(sentence)

    def _encoded(self, frames: torch.Tensor, clips: bool) -> np.ndarray:
        """frames: uint8 (T, 3, H, W)."""
        if clips:
            return self.vision.encode(from_bytes(frames)[None].to(self.vision.device))[0].cpu().numpy()
        parts = [self.vision.encode(from_bytes(part).to(self.vision.device)) for part in frames.split(ENCODE_BATCH)]
        return torch.cat(parts).cpu().numpy()

    # -- writing

    def request(
        self,
        prompt_of: Callable[[list[Text]], Prompt],
        text: list[Text],
        grammar: Grammar,
        decoding: Decoding,
        *,
        number: int = 0,
        longest: int | None = None,
    ) -> Request:
        """A request for the document that `prompt_of` makes of a text; guidance moves away from the one that it makes of `negative`.

        number: of the request among several, which draw differently.
        """
        if decoding.samples != 1:
            raise PipelineError(f"samples={decoding.samples} is of films, of what actions lead to, and of answers; here leave it at 1")
        sampling = Sampling(temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p, seed=decoding.seed + number)
        guided = {}
        if decoding.guidance != 1:
            negative = prompt_of(self.texts(decoding.negative))
            guided = {"guidance": Guidance(scale=decoding.guidance), "negative": begun(negative)}
        draft = INT8 if self._options["int8_draft"] else repeat_last
        parallel = Parallel(window=decoding.parallel, draft=draft, lossy=decoding.lossy or None) if decoding.parallel else None
        return Request(prompt=begun(prompt_of(text)), grammar=grammar, sampling=sampling, longest=longest, parallel=parallel, **guided)

    def run(self, requests: Sequence[Request], *, done: int = 0, total: int | None = None) -> list[Written]:
        """What each request writes. done, total: ids before these requests, and with all of them and those that will follow."""
        items: list[list[Item]] = [[] for _ in requests]
        finishes = [""] * len(requests)
        total = total or sum(_most(request) or 0 for request in requests)
        for event in self.events(requests):
            items[event.number] += event.items
            finishes[event.number] = event.finish or ""
            done += len(event.items)
            self.progress(done, max(done, total))
        return [Written(own, finish) for own, finish in zip(items, finishes, strict=True)]

    def events(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Items as they come; of an engine that does not stream, all at once. Raises PromptTooLong before anything is written."""
        engine = self._engine_for(requests)
        if hasattr(engine, "stream"):
            return engine.stream(requests)
        return (Event(number, result.items, result.finish) for number, result in enumerate(engine.generate(requests)))

    def stream_ids(self, written: Written) -> list[int]:
        return ids_of(written.items, self.vocabulary)

    def _engine_for(self, requests: Sequence[Request]) -> GeneratingEngine:
        """An engine that these fit into: the one that is there, or a larger one."""
        needed = max(self._positions(request) for request in requests)
        rows = sum(1 if request.guidance is None else 2 for request in requests)
        rows = min(rows, max(self._most_rows, 2 if any(request.guidance for request in requests) else 1))
        if self._engine is None or self._engine[0] < rows or self._engine[1] < needed:
            capacity = min(self.context, -(-needed // CAPACITY_STEP) * CAPACITY_STEP)
            if self._engine is not None:
                rows, capacity = max(rows, self._engine[0]), max(capacity, self._engine[1])
                self._engine = None  # its memory goes before the next one's comes
            engine = open_engine(self._engine_name, self.checkpoint, rows=rows, capacity=capacity, **self._options)
            self._engine = (rows, capacity, engine)
        return self._engine[2]

    def _positions(self, request: Request) -> int:
        """Of a request's prompt and what may follow it. Raises PromptTooLong where the context has fewer."""
        prompts = [request.prompt] if request.negative is None else [request.prompt, request.negative]
        prompt = max(len(items_of(one, self.vocabulary, self.vocabulary.head_size)) for one in prompts)
        most = _most(request) or 1
        if prompt + most > self.context + 1:
            raise PromptTooLong(
                f"a prompt of {prompt} positions and up to {most} to be written behind it do not fit this checkpoint's context of "
                f"{self.context}: shorten the text, or ask for less or smaller pictures"
            )
        return prompt + most


def begun(prompt: Prompt) -> Prompt:
    """The prompt with a begin of document; one that holds items has it already."""
    return [Begin(), *prompt] if not len(prompt) or isinstance(prompt[0], Segment) and not isinstance(prompt[0], Begin) else prompt


def checked_picture(picture: Picture) -> Picture:
    """The picture, if it is uint8 (H, W, 3) with at least a pixel. Raises WrongPictures, WrongSize."""
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise WrongPictures(f"a picture is {picture.dtype} of shape {picture.shape}, expected uint8 (H, W, 3) in RGB")
    if not picture.size:
        raise WrongSize(f"a picture of {picture.shape[1]}×{picture.shape[0]} pixels has nothing on it")
    return picture


def checked_frames(frames: np.ndarray, multiple: int = 1) -> np.ndarray:
    """Frames, if they are uint8 (T, H, W, 3), T a multiple and at least one. Raises WrongFrames, WrongPictures, WrongSize."""
    frames = np.asarray(frames)
    if frames.ndim != 4 or not len(frames) or len(frames) % multiple:
        raise WrongFrames(
            f"frames have shape {frames.shape}, expected uint8 (T, H, W, 3) with at least one frame"
            + (f", and T a multiple of {multiple}, which this checkpoint codes together" if multiple > 1 else "")
        )
    checked_picture(frames[0])
    return frames


def fitted_size(height: int, width: int, patch: int, least: int = LEAST_PIXELS, most: int = MOST_PIXELS) -> tuple[int, int]:
    """Rows and columns in multiples of `patch`, about the same shape, with an area between `least` and `most` pixels. Raises WrongSize."""
    if min(height, width) < 1 or max(height, width) > 100 * min(height, width):
        raise WrongSize(f"a picture of {width}×{height} pixels cannot be read: expected sides that differ by less than 100 times")
    scale = min(1.0, (most / (height * width)) ** 0.5) if height * width > least else (least / (height * width)) ** 0.5
    return tuple(max(patch, round(side * scale / patch) * patch) for side in (height, width))


def _is_one(pictures: Pictures) -> bool:
    return isinstance(pictures, np.ndarray) and pictures.ndim <= 3


def _most(request: Request) -> int | None:
    """Items that a request writes at most, where that is known."""
    return min((most for most in (request.grammar.longest, request.longest) if most is not None), default=None)
