"""Vocabularies and random documents for the tests of documents."""

import numpy as np
from hypothesis import strategies as st

from emu3_vla.documents import ActionChunk, Begin, End, Image, Reasoning, Segment, Text, Video
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, ImageGrid, Vocabulary

IMAGES = (ImageGrid(name="static", rows=8, columns=4), ImageGrid(name="gripper", rows=4, columns=4))


def compact(block_size: int) -> CompactVocabulary:
    return CompactVocabulary(text_size=30, action_size=20, codebook_size=64, images=IMAGES, block_size=block_size)


VOCABULARIES = {
    "emu3, m=1": Emu3Vocabulary(),
    "emu3, m=4": Emu3Vocabulary(block_size=4),
    "compact, m=1": compact(1),
    "compact, m=4": compact(4),
}


@st.composite
def documents(draw: st.DrawFn, vocabulary: Vocabulary) -> list[Segment]:
    """Segments in an order that can be, no two texts in a row: parsing gives the same again."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    is_emu3 = isinstance(vocabulary, Emu3Vocabulary)
    kinds = draw(st.lists(st.sampled_from(["text", "image", "action", *(["video", "reasoning"] if is_emu3 else [])]), max_size=6))
    kinds = [kind for number, kind in enumerate(kinds) if not number or (kind, kinds[number - 1]) != ("text", "text")]
    middle = [_segment(kind, random, vocabulary) for kind in kinds]
    document = [Begin()] * draw(st.booleans()) + middle + [End()] * draw(st.booleans())
    if document and isinstance(document[-1], End) and draw(st.booleans()):
        document += [Begin(), Text(random.integers(0, 20, 3)), End()]
    return document


def _segment(kind: str, random: np.random.Generator, vocabulary: Vocabulary) -> Segment:
    count = int(random.integers(1, 6))
    if kind == "text":
        return Text(random.integers(0, vocabulary.text_size, count))
    if kind == "reasoning":
        return Reasoning(random.integers(0, vocabulary.text_size, count))
    if kind == "action":
        return ActionChunk(random.integers(0, vocabulary.action_size, count))
    if isinstance(vocabulary, CompactVocabulary):
        grid = vocabulary.images[random.integers(len(vocabulary.images))]
        return Image(grid.name, random.integers(0, vocabulary.codebook_size, (grid.rows, grid.columns)))
    rows, columns = random.integers(1, 5, 2) * vocabulary.block_size
    if kind == "image":
        return Image("", random.integers(0, vocabulary.codebook_size, (rows, columns)))
    codes = random.integers(0, vocabulary.codebook_size, (count, rows, columns))
    return Video(codes, frames=count + int(random.integers(0, 3)))
