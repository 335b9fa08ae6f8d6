"""Vocabularies: which ids are text, actions, specials and vision codes.

CompactVocabulary is for models that train on a laptop. One id space, in this order:

    text BPE ids | action ids | end of chunk | <pad> <bos> <eos> <begin of action> <begin of image NAME>... | vision codes

End of chunk follows the action ids directly, so an action grammar's mask (vocab_size + 1 entries) is a slice of the head's logits.

Emu3Vocabulary is that of the published weights, id for id:

    text BPE ids, the last of them action ids counted downwards | <pad> and 207 further specials | <image token> <image start>
    <image end> | vision codes

In both, vision codes come last, and all ids before them are written one per trunk position. A vision code stands in a block of
`block_size` × `block_size` codes, and one trunk position carries one block. Ids of blocks have a head of their own, so the output head
has `head_size` ids: all but the vision codes. Emu3's own vocabulary with block_size 1 is Emu3: its one head writes the codes too.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "emu3-vla-compact-vocabulary"
EMU3_FORMAT = "emu3-vla-emu3-vocabulary"
_SPECIALS = ("pad", "bos", "eos", "begin_action")


class VocabularyError(ValueError):
    """A vocabulary that cannot be, or a vocabulary file that is missing, damaged or foreign."""


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """One kind of image in the stream: what it is called, and how many rows and columns of codes it has."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True, kw_only=True)
class CompactVocabulary:
    """All ids follow from these five. `images`: in the order in which a chunk of an episode shows them. Raises VocabularyError."""

    text_size: int
    action_size: int  # ids of the action tokenizer, end of chunk not counted
    codebook_size: int
    images: tuple[ImageGrid, ...]
    block_size: int

    def __post_init__(self):
        for name in ("text_size", "action_size", "codebook_size", "block_size"):
            if getattr(self, name) < 1:
                raise VocabularyError(f"vocabulary: {name} is {getattr(self, name)}, expected at least 1")
        names = [grid.name for grid in self.images]
        if not names or len(set(names)) != len(names):
            raise VocabularyError(f"vocabulary: images are named {names}, expected at least one, each with its own name")
        for grid in self.images:
            if grid.rows < 1 or grid.columns < 1 or grid.rows % self.block_size or grid.columns % self.block_size:
                raise VocabularyError(
                    f"vocabulary: image {grid.name!r} has {grid.rows}×{grid.columns} codes, "
                    f"expected multiples of block_size={self.block_size}"
                )

    @property
    def action_start(self) -> int:
        return self.text_size

    @property
    def end_of_chunk(self) -> int:
        return self.text_size + self.action_size

    @property
    def pad(self) -> int:
        return self.end_of_chunk + 1

    @property
    def bos(self) -> int:
        return self.end_of_chunk + 2

    @property
    def eos(self) -> int:
        return self.end_of_chunk + 3

    @property
    def begin_action(self) -> int:
        return self.end_of_chunk + 4

    @property
    def head_size(self) -> int:
        """Number of ids that are written one per position: all but the vision codes."""
        return self.end_of_chunk + 1 + len(_SPECIALS) + len(self.images)

    @property
    def vision_start(self) -> int:
        return self.head_size

    @property
    def size(self) -> int:
        return self.head_size + self.codebook_size

    @property
    def codes_per_block(self) -> int:
        return self.block_size**2

    def begin_image(self, name: str) -> int:
        """The id that opens an image of this name. Raises VocabularyError for an unknown name."""
        return self.begin_action + 1 + self._index(name)

    def grid(self, name: str) -> ImageGrid:
        """Rows and columns of this image. Raises VocabularyError for an unknown name."""
        return self.images[self._index(name)]

    def blocks(self, name: str) -> int:
        """Number of blocks, which is the number of trunk positions, of one image of this name."""
        grid = self.grid(name)
        return grid.rows * grid.columns // self.codes_per_block

    def places(self, name: str) -> range:
        """Numbers of this image's block places; every place of every image has its own number in [0, num_places)."""
        start = self._place_starts[self._index(name)]
        return range(start, start + self.blocks(name))

    @property
    def num_places(self) -> int:
        return sum(self.blocks(grid.name) for grid in self.images)

    @cached_property
    def _place_starts(self) -> list[int]:
        counts = [self.blocks(grid.name) for grid in self.images]
        return [sum(counts[:index]) for index in range(len(counts))]

    def _index(self, name: str) -> int:
        names = [grid.name for grid in self.images]
        if name not in names:
            raise VocabularyError(f"this vocabulary has no image {name!r}; it has {', '.join(names)}")
        return names.index(name)

    @property
    def vision_in_head(self) -> bool:
        """Whether codes are written through the output head, one per position. Here they always stand in blocks."""
        return False

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Which ids may stand in text: bool, of the shape of `ids`."""
        return (ids >= 0) & (ids < self.text_size)

    def is_action(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are action ids, end of chunk not among them: bool, of the shape of `ids`."""
        return (ids >= self.action_start) & (ids < self.end_of_chunk)

    def from_actions(self, tokens: np.ndarray) -> np.ndarray:
        """Ids of the action tokenizer as ids of this vocabulary."""
        return tokens + self.action_start

    def to_actions(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `from_actions`."""
        return ids - self.action_start

    def describe(self, index: int) -> str:
        """What an id is, in words, for messages."""
        if index in (named := {getattr(self, name): name.replace("_", " ") for name in ("end_of_chunk", *_SPECIALS)}):
            return f"{index} (<{named[index]}>)"
        if self.begin_action < index < self.head_size:
            return f"{index} (<begin image {self.images[index - self.begin_action - 1].name}>)"
        return f"{index} ({_plain_kind(self, index)})"

    def save(self, path: Path) -> None:
        """Write as JSON."""
        _write(path, FORMAT, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> CompactVocabulary:
        """Read what `save` wrote. Raises FileNotFoundError or VocabularyError, naming the file."""
        return _load(path, {FORMAT: _compact_of})


TEXT_SIZE = 151_643
"""Ids of Qwen's BPE, which Emu3 uses."""

_EXTRA = TEXT_SIZE + 3  # <|extra_0|>; before it <|endoftext|>, <|im_start|>, <|im_end|>
_NUM_EXTRA = 205

SPECIALS: dict[str, int] = {
    name: index
    for index, name in enumerate(
        (
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *(f"<|extra_{number}|>" for number in range(_NUM_EXTRA)),
            "<|image token|>",
            "<|image start|>",
            "<|image end|>",
        ),
        start=TEXT_SIZE,
    )
}
"""Names and ids of Emu3's specials, the vision codes left out: those are "<|visual token 000000|>" and on, from VISION_START.

Source: baaivision/Emu3 emu3/mllm/tokenization_emu3.py; what the extras mean for actions: baaivision/UniVLA, same file.
"""

VISION_START = TEXT_SIZE + len(SPECIALS)
CODEBOOK_SIZE = 32_768


@dataclass(frozen=True, kw_only=True)
class Emu3Vocabulary:
    """Emu3's ids, with UniVLA's for actions. Raises VocabularyError.

    Images and videos say their own size in the stream, so none is listed here. Action id a is text id 151642 - a; only its place, between
    begin of action and end of chunk, tells it from text. The defaults are the published model with FAST's published tokenizer.
    Source: see SPECIALS; actions as in UniVLA train/datasets.py.
    """

    action_size: int = 2048  # ids of the action tokenizer, end of chunk not counted; 0: no actions
    block_size: int = 1

    text_size = TEXT_SIZE
    codebook_size = CODEBOOK_SIZE
    vision_start = VISION_START
    size = VISION_START + CODEBOOK_SIZE

    pad = SPECIALS["<|endoftext|>"]
    bos = SPECIALS["<|extra_203|>"]
    eos = SPECIALS["<|extra_204|>"]
    begin_action = SPECIALS["<|extra_198|>"]
    end_of_chunk = SPECIALS["<|extra_199|>"]
    begin_reasoning = SPECIALS["<|extra_196|>"]
    end_of_reasoning = SPECIALS["<|extra_197|>"]
    end_of_line = SPECIALS["<|extra_200|>"]
    end_of_frame = SPECIALS["<|extra_201|>"]
    begin_codes = SPECIALS["<|image token|>"]  # after the size, before the first code
    end_of_image = SPECIALS["<|image end|>"]
    digit_zero, times = 15, 9  # text ids of "0" and "*"; the digits follow each other

    def __post_init__(self):
        if not 0 <= self.action_size <= self.text_size:
            raise VocabularyError(f"vocabulary: action_size is {self.action_size}, expected 0 to {self.text_size}")
        if self.block_size < 1:
            raise VocabularyError(f"vocabulary: block_size is {self.block_size}, expected at least 1")

    @property
    def last_action(self) -> int:
        """The id of action id 0; the others count down from it."""
        return self.text_size - 1

    @property
    def vision_in_head(self) -> bool:
        """Whether codes are written through the output head, one per position, as Emu3 does."""
        return self.block_size == 1

    @property
    def head_size(self) -> int:
        """Number of ids that the output head writes: all, or all but the vision codes where these stand in blocks."""
        return self.size if self.vision_in_head else self.vision_start

    @property
    def codes_per_block(self) -> int:
        return self.block_size**2

    @property
    def num_places(self) -> int:
        """Blocks are not told apart by their place: the ends of lines and frames in the stream say where they stand."""
        return 1

    def begin_image(self, name: str = "") -> int:
        """The id that opens an image or a video, whatever its name."""
        return SPECIALS["<|image start|>"]

    def is_text(self, ids: np.ndarray) -> np.ndarray:
        """Which ids may stand in text: bool, of the shape of `ids`. The specials that no form uses may (they are Qwen's chat marks)."""
        return _EMU3_IS_TEXT[np.clip(ids, -1, VISION_START)]

    def is_action(self, ids: np.ndarray) -> np.ndarray:
        """Which ids can be action ids: bool, of the shape of `ids`. The same ids are text elsewhere."""
        return (ids <= self.last_action) & (ids > self.last_action - self.action_size)

    def from_actions(self, tokens: np.ndarray) -> np.ndarray:
        """Ids of the action tokenizer as ids of this vocabulary."""
        return self.last_action - tokens

    def to_actions(self, ids: np.ndarray) -> np.ndarray:
        """The inverse of `from_actions`."""
        return self.last_action - ids

    def describe(self, index: int) -> str:
        """What an id is, in words, for messages."""
        return f"{index} ({_EMU3_NAMES.get(index) or _plain_kind(self, index)})"

    def save(self, path: Path) -> None:
        """Write as JSON. The ids themselves are constants; the file says which vocabulary it is, and its two choices."""
        _write(path, EMU3_FORMAT, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Emu3Vocabulary:
        """Read what `save` wrote. Raises FileNotFoundError or VocabularyError, naming the file."""
        return _load(path, {EMU3_FORMAT: lambda values: cls(**values)})


Vocabulary = CompactVocabulary | Emu3Vocabulary


def load_vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary of either kind. Raises FileNotFoundError or VocabularyError, naming the file."""
    return _load(path, {FORMAT: _compact_of, EMU3_FORMAT: lambda values: Emu3Vocabulary(**values)})


_EMU3_USED = ("pad", "bos", "eos", "begin_action", "end_of_chunk", "begin_reasoning", "end_of_reasoning")
_EMU3_USED += ("end_of_line", "end_of_frame", "begin_codes", "end_of_image")
_EMU3_NAMES = {index: name for name, index in SPECIALS.items()}
_EMU3_NAMES |= {getattr(Emu3Vocabulary, name): f"<{name.replace('_', ' ')}>" for name in _EMU3_USED}
_EMU3_NAMES |= {SPECIALS["<|image start|>"]: "<begin image>"}

# One entry per id up to the vision codes, one for those (False), and one, reached by -1, for negative numbers (False).
_EMU3_IS_TEXT = np.zeros(VISION_START + 2, bool)
_EMU3_IS_TEXT[:VISION_START] = True
_EMU3_IS_TEXT[[getattr(Emu3Vocabulary, name) for name in _EMU3_USED] + [SPECIALS["<|image start|>"]]] = False


def _plain_kind(vocabulary: Vocabulary, index: int) -> str:
    if vocabulary.vision_start <= index < vocabulary.size:
        return f"vision code {index - vocabulary.vision_start}"
    if 0 <= index < vocabulary.text_size:
        return "text"
    if 0 <= index < vocabulary.vision_start:
        return f"action id {vocabulary.to_actions(index)}"
    return f"no id of this vocabulary, which has {vocabulary.size}"


def _write(path: Path, format: str, values: dict[str, Any]) -> None:
    path.write_text(json.dumps({"format": format} | values, indent=1) + "\n")


def _load(path: Path, makers: dict[str, Any]) -> Any:
    """A vocabulary of one of the given formats."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: without it nobody knows which id means what")
    try:
        values = json.loads(path.read_text())
        if (found := values.pop("format")) not in makers:
            raise VocabularyError(
                f"{path} is not a vocabulary of the expected kind: its format is {found!r}, expected {' or '.join(makers)}"
            )
        return makers[found](values)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise VocabularyError(f"{path} is damaged or cut short: {type(error).__name__}: {error}") from error


def _compact_of(values: dict[str, Any]) -> CompactVocabulary:
    return CompactVocabulary(**values | {"images": tuple(ImageGrid(**grid) for grid in values["images"])})
