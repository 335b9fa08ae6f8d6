"""Region completion: the codes under a mask are written anew, all others stay.

    job = Completion(vocabulary, Image("rgb_static", codes), missing)
    request = Request(prompt=job.prompt([Text(...)]), grammar=job.grammar, sampling=...)
    codes = job.codes(engine.generate([request])[0].items)

What is known is shown first, then the rest is written from its edge inwards (emu3_vla.documents.orders.completion_order), so the model
sees everything around the region. It should have been trained on images in such orders: `Image(..., order=completion_order(mask))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emu3_vla.documents import Image, OpenImage, Segment, from_blocks, to_blocks, write
from emu3_vla.documents.orders import completion_order
from emu3_vla.generation.grammar import Block, Grammar, GrammarError, Item
from emu3_vla.generation.items import items_of
from emu3_vla.generation.pieces import image_codes
from emu3_vla.vocabulary import Vocabulary


class Completion:
    """image: what is known, with any codes under the mask. missing: bool (rows, columns), true where codes shall be written; of a block,
    all codes are written if one is missing. order: of the missing places. Raises GrammarError, DocumentError.
    """

    def __init__(self, vocabulary: Vocabulary, image: Image, missing: np.ndarray, order: str = "spiral"):
        missing, self._codes = np.asarray(missing), np.asarray(image.codes)
        if missing.shape != self._codes.shape:
            raise GrammarError(f"the mask has shape {missing.shape}, but the image has {self._codes.shape} codes")
        write([image], vocabulary)  # raises for codes and sizes that cannot be
        self._vocabulary, self._size, self._name = vocabulary, vocabulary.block_size, image.name
        rows, columns = self._codes.shape
        self._blocks = to_blocks(self._codes, self._size)
        if missing.dtype == bool:
            missing = to_blocks(missing, self._size).any(1).reshape(rows // self._size, columns // self._size)
        self.order = completion_order(missing, order)
        self._known = int((~missing).sum())
        self.grammar = Grammar(self._piece(rows, columns))

    def prompt(self, before: Sequence[Segment]) -> list[Item]:
        """The prompt: segments that come before the image, its beginning, and what is known of it."""
        rows, columns = self._codes.shape
        opened = [*before, OpenImage(self._name, rows, columns)]
        items = items_of(opened, self._vocabulary, self._vocabulary.head_size)
        if self._vocabulary.vision_in_head:
            return items  # the grammar leaves no choice about known codes; they are written without the model
        places = self._vocabulary.places(self._name)
        known = self.order[: self._known].tolist()
        return items + [Block(places[place], tuple(self._blocks[place].tolist())) for place in known]

    def codes(self, items: Sequence[Item]) -> np.ndarray:
        """The whole image, int64 (rows, columns), from what the request wrote."""
        blocks = self._blocks.astype(np.int64)
        if self._vocabulary.vision_in_head:
            written = [item - self._vocabulary.vision_start for item in items if item >= self._vocabulary.vision_start]
            blocks[self.order] = np.array(written)[:, None]
        else:
            blocks[self.order[self._known :]] = [item.codes for item in items]
        return from_blocks(blocks, *self._codes.shape)

    def _piece(self, rows: int, columns: int):
        vocabulary = self._vocabulary
        if vocabulary.vision_in_head:
            given = np.where(np.arange(rows * columns) < self._known, self._blocks[self.order, 0], -1)
            return image_codes(vocabulary, rows, columns, given=given.reshape(rows, columns))
        places = np.asarray(vocabulary.places(self._name))
        return image_codes(vocabulary, rows, columns, self._name, places=places[self.order[self._known :]])
