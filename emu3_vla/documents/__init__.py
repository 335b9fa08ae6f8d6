"""Documents: text, images, videos and action chunks in one stream of ids.

A document is a list of typed segments. `write` turns it into ids and `parse` turns ids back; `lay_out` and `collate` put it over the
positions of a model's trunk, with targets and loss weights; `pack` puts several into a row, none of which is cut or sees another. All of
them take either vocabulary:

Emu3's stream, with its own sizes and ends (see emu3_vla/documents/stream.py):

    <bos> text <begin image> 64*64 <image token> (codes of a row <eol>)... <eof> <end image> <begin action> ids <end action> <eos>

A compact one, where the name of an image says its size and every chunk follows its images:

    <bos> instruction <begin image static> codes <begin image gripper> codes <begin action> action ids <end of chunk>
"""

from emu3_vla.documents.layout import (
    IGNORE,
    LENGTH_MULTIPLE,
    NOTHING,
    SAID,
    Batch,
    BlockContext,
    Layout,
    collate,
    lay_out,
    length_of,
    pack,
    plan_rows,
)
from emu3_vla.documents.prompts import Prompts, generation_grid, without_text
from emu3_vla.documents.segments import (
    ActionChunk,
    Begin,
    DocumentError,
    End,
    Image,
    OpenAction,
    OpenImage,
    OpenReasoning,
    OpenVideo,
    Reasoning,
    Segment,
    Text,
    Video,
    from_blocks,
    to_blocks,
)
from emu3_vla.documents.spans import Spans
from emu3_vla.documents.stream import MalformedDocument, parse, write
from emu3_vla.documents.weights import KINDS, PRESETS, LossWeights

__all__ = [
    "IGNORE",
    "KINDS",
    "LENGTH_MULTIPLE",
    "NOTHING",
    "PRESETS",
    "SAID",
    "ActionChunk",
    "Batch",
    "Begin",
    "BlockContext",
    "DocumentError",
    "End",
    "Image",
    "Layout",
    "LossWeights",
    "MalformedDocument",
    "OpenAction",
    "OpenImage",
    "OpenReasoning",
    "OpenVideo",
    "Prompts",
    "Reasoning",
    "Segment",
    "Spans",
    "Text",
    "Video",
    "collate",
    "from_blocks",
    "generation_grid",
    "lay_out",
    "length_of",
    "pack",
    "parse",
    "plan_rows",
    "to_blocks",
    "without_text",
    "write",
]
