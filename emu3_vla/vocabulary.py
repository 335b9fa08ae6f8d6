"""The compact vocabulary: which ids are text, actions, specials and vision codes.

One id space, in this order:

    text BPE ids | action ids | end of chunk | <pad> <bos> <eos> <begin of action> <begin of image NAME>... | vision codes

Ids before the vision codes are written one per trunk position and share one output head (`head_size` ids). A vision code stands in a
block of `block_size` × `block_size` codes, and one trunk position carries one block; with block_size 1 each code has its own.
End of chunk follows the action ids directly, so an action grammar's mask (vocab_size + 1 entries) is a slice of the head's logits.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FORMAT = "emu3-vla-compact-vocabulary"
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

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CompactVocabulary:
        """Read what `save` wrote. Raises FileNotFoundError or VocabularyError, naming the file."""
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: without it nobody knows which id means what")
        try:
            values = json.loads(path.read_text())
            if values.pop("format") != FORMAT:
                raise VocabularyError(f"{path} is not a vocabulary: its format is not {FORMAT!r}")
            images = tuple(ImageGrid(**grid) for grid in values.pop("images"))
            return cls(**values, images=images)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise VocabularyError(f"{path} is damaged or cut short: {type(error).__name__}: {error}") from error
