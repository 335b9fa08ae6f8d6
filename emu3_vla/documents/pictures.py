"""Images and videos as ids, and back, in the form of each vocabulary; see emu3_vla/documents/stream.py for what the forms are."""

from __future__ import annotations

from typing import NoReturn, Protocol

import numpy as np

from emu3_vla.documents.orders import inverse, permutation
from emu3_vla.documents.segments import DocumentError, Image, OpenImage, OpenVideo, Segment, Video, from_blocks, to_blocks
from emu3_vla.vocabulary import CompactVocabulary, Emu3Vocabulary, Vocabulary

MAX_DIGITS = 6
"""Of a row, column or frame count: beyond any picture, and products of three still fit 64 bits."""


class Reader(Protocol):
    """What reading a picture needs of the position in a stream."""

    ids: np.ndarray
    at: int
    image_ends: np.ndarray  # positions of the ids that end images
    order: str | np.ndarray  # in which images are written

    @property
    def next(self) -> int | None: ...

    @property
    def open_here(self) -> bool: ...

    def take(self, index: int) -> None: ...

    def rows(self, count: int, width: int, closing: int | None) -> np.ndarray: ...

    def fail(self, position: int, expected: str) -> NoReturn: ...


class CompactPictures:
    """Images whose names say their sizes."""

    def __init__(self, vocabulary: CompactVocabulary):
        self._vocabulary = vocabulary

    def spell(self, segment: Segment) -> np.ndarray:
        vocabulary = self._vocabulary
        if isinstance(segment, Image):
            codes = self._checked(segment)
            blocks = in_order(segment, to_blocks(codes, vocabulary.block_size), vocabulary.block_size)
            return np.concatenate([[vocabulary.begin_image(segment.name)], blocks.ravel() + vocabulary.vision_start])
        if isinstance(segment, OpenImage):
            grid = vocabulary.grid(segment.name)
            if (segment.rows, segment.columns) != (grid.rows, grid.columns):
                raise DocumentError(f"image {segment.name!r} is {grid.rows}×{grid.columns}, not {segment.rows}×{segment.columns}")
            return np.array([vocabulary.begin_image(segment.name)])
        raise DocumentError(f"a compact vocabulary writes no {type(segment).__name__}; write the frames of a video as images")

    def length(self, segment: Segment) -> tuple[int, int]:
        return 1, self._vocabulary.blocks(segment.name) * self._vocabulary.codes_per_block if isinstance(segment, Image) else 0

    def read(self, reader: Reader) -> Segment | None:
        vocabulary = self._vocabulary
        number = reader.next - vocabulary.begin_action - 1
        if not 0 <= number < len(vocabulary.images):
            return None
        grid = vocabulary.images[number]
        reader.at += 1
        if reader.open_here:
            return OpenImage(grid.name, grid.rows, grid.columns)
        codes = reader.rows(1, grid.rows * grid.columns, closing=None)
        return read_image(grid.name, codes, grid.rows, grid.columns, vocabulary.block_size, reader.order)

    def _checked(self, image: Image) -> np.ndarray:
        grid = self._vocabulary.grid(image.name)
        codes = np.asarray(image.codes)
        if codes.shape != (grid.rows, grid.columns):
            raise DocumentError(f"image {image.name!r} has codes of shape {codes.shape}, expected ({grid.rows}, {grid.columns})")
        return _checked_codes(codes, f"image {image.name!r}", self._vocabulary)


class Emu3Pictures:
    """Images and videos that say their sizes."""

    def __init__(self, vocabulary: Emu3Vocabulary):
        self._vocabulary = vocabulary

    def spell(self, segment: Segment) -> np.ndarray:
        vocabulary, ends = self._vocabulary, [self._vocabulary.end_of_image]
        match segment:
            case Image():
                codes = self._checked(segment.codes, 2, "image")
                blocks = in_order(segment, to_blocks(codes, vocabulary.block_size), vocabulary.block_size)
                rows = self._rows(blocks.reshape(len(codes) // vocabulary.block_size, -1), vocabulary.end_of_line)
                return np.concatenate([self._header(*codes.shape), rows, [vocabulary.end_of_frame], ends])
            case OpenImage():
                self._check_sizes((segment.rows, segment.columns), "image")
                return self._header(segment.rows, segment.columns)
            case Video() | OpenVideo():
                return np.concatenate([*self._film(segment), *([ends] if isinstance(segment, Video) else [])])
        raise DocumentError(f"a document cannot hold {type(segment).__name__}")

    def length(self, segment: Segment) -> tuple[int, int]:
        match segment:
            case Image():
                rows, columns = np.shape(segment.codes)
                return self._header_length(rows, columns) + rows // self._vocabulary.block_size + 2, rows * columns
            case OpenImage():
                return self._header_length(segment.rows, segment.columns), 0
        shown, rows, columns = np.shape(segment.codes)
        return self._header_length(segment.frames, rows, columns) + shown + isinstance(segment, Video), shown * rows * columns

    def read(self, reader: Reader) -> Segment | None:
        vocabulary, start = self._vocabulary, reader.at
        if reader.next != vocabulary.begin_image():
            return None
        reader.at += 1
        *frames, rows, columns = self._read_sizes(reader)
        if rows % vocabulary.block_size or columns % vocabulary.block_size:
            reader.fail(start + 1, f"rows and columns that are multiples of block_size={vocabulary.block_size}, not {rows}×{columns}")
        if frames:
            return self._read_film(reader, frames[0], rows, columns)
        if reader.open_here:
            return OpenImage("", rows, columns)
        lines = reader.rows(rows // vocabulary.block_size, columns * vocabulary.block_size, vocabulary.end_of_line)
        reader.take(vocabulary.end_of_frame)
        reader.take(vocabulary.end_of_image)
        return read_image("", lines, rows, columns, vocabulary.block_size, reader.order)

    def _film(self, film: Video | OpenVideo) -> list[np.ndarray]:
        """Header and frames."""
        codes = self._checked(film.codes, 3, "video")
        shown = len(codes)
        if shown > film.frames or (isinstance(film, Video) and not shown):
            raise DocumentError(
                f"a video of {film.frames} frames shows {shown}, expected 1 to {film.frames}, or none where it is left open"
            )
        frames = to_blocks(codes, self._vocabulary.block_size).reshape(shown, codes[0].size if shown else 0)
        return [self._header(film.frames, *codes.shape[1:]), self._rows(frames, self._vocabulary.end_of_frame)]

    def _read_film(self, reader: Reader, frames: int, rows: int, columns: int) -> Video | OpenVideo:
        """Frames up to the end of the image, or of an open prompt; at most as many as were announced."""
        ends = reader.image_ends
        after = np.searchsorted(ends, reader.at)
        is_open = after == len(ends)
        span = (len(reader.ids) if is_open else int(ends[after])) - reader.at
        shown = min(frames, -(-span // (rows * columns + 1)))
        if not shown and not reader.open_here:
            reader.fail(reader.at, "a vision code of the first frame")
        codes = reader.rows(shown, rows * columns, self._vocabulary.end_of_frame)
        codes = from_blocks(codes.reshape(shown, -1 if shown else 0, self._vocabulary.codes_per_block), rows, columns)
        if reader.open_here:
            return OpenVideo(frames, codes)
        reader.take(self._vocabulary.end_of_image)
        return Video(codes, frames)

    def _rows(self, codes: np.ndarray, closing: int) -> np.ndarray:
        """Codes (rows, width) as ids, each row with the id that closes it: int64 (rows × (width + 1),)."""
        ids = np.empty((codes.shape[0], codes.shape[1] + 1), np.int64)
        np.add(codes, self._vocabulary.vision_start, out=ids[:, :-1])
        ids[:, -1] = closing
        return ids.ravel()

    def _header(self, *sizes: int) -> np.ndarray:
        ids = [self._vocabulary.begin_image()]
        for size in sizes:
            if not 0 < size < 10**MAX_DIGITS:
                raise DocumentError(f"a picture has sizes {'*'.join(map(str, sizes))}, expected each from 1 to {10**MAX_DIGITS - 1}")
            ids += [self._vocabulary.digit_zero + digit for digit in _digits(size)] + [self._vocabulary.times]
        ids[-1] = self._vocabulary.begin_codes
        return np.array(ids)

    def _header_length(self, *sizes: int) -> int:
        return 1 + sum(len(_digits(size)) + 1 for size in sizes)

    def _read_sizes(self, reader: Reader) -> list[int]:
        """Two sizes, or three, and the id after them."""
        vocabulary, sizes = self._vocabulary, []
        while True:
            first_digit = reader.at
            sizes.append(self._read_number(reader))
            digits = reader.at - first_digit
            if reader.next == vocabulary.begin_codes and len(sizes) > 1:
                reader.at += 1
                return sizes
            if reader.next != vocabulary.times or len(sizes) == 3:
                may_be = {"a digit": digits < MAX_DIGITS, "'*'": len(sizes) < 3, "<begin codes>": len(sizes) > 1}
                reader.fail(reader.at, f"{' or '.join(what for what, may in may_be.items() if may)} in the size of a picture")
            reader.at += 1

    def _read_number(self, reader: Reader) -> int:
        number = 0
        for place in range(MAX_DIGITS):
            digit = -1 if reader.next is None else reader.next - self._vocabulary.digit_zero
            if not (0 if place else 1) <= digit <= 9:
                break
            number = 10 * number + digit
            reader.at += 1
        if not number:
            reader.fail(reader.at, "a digit from 1 to 9, which begins the size of a picture")
        return number

    def _checked(self, codes: np.ndarray, axes: int, what: str) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != axes:
            raise DocumentError(f"{what} has codes of shape {codes.shape}, expected {axes} axes")
        self._check_sizes(codes.shape[-2:], what)
        return _checked_codes(codes, what, self._vocabulary)

    def _check_sizes(self, sizes: tuple[int, int], what: str) -> None:
        block = self._vocabulary.block_size
        if min(sizes) < 1 or sizes[0] % block or sizes[1] % block:
            raise DocumentError(f"{what} has {sizes[0]}×{sizes[1]} codes, expected at least 1, and multiples of block_size={block}")


def in_order(image: Image, blocks: np.ndarray, block_size: int) -> np.ndarray:
    """What belongs to each block of an image, one after another along the first axis, in the order in which it is written."""
    if isinstance(image.order, str) and image.order == "raster":
        return blocks
    rows, columns = np.shape(image.codes)
    return blocks[permutation(image.order, rows // block_size, columns // block_size)]


def read_image(name: str, codes: np.ndarray, rows: int, columns: int, block_size: int, order: str | np.ndarray) -> Image:
    """The image whose codes were written in this order."""
    blocks = codes.reshape(-1, block_size**2)
    if not isinstance(order, str) or order != "raster":
        blocks = blocks[inverse(permutation(order, rows // block_size, columns // block_size))]
    return Image(name, from_blocks(blocks, rows, columns), order=order)


def pictures_of(vocabulary: Vocabulary) -> CompactPictures | Emu3Pictures:
    """How this vocabulary writes images and videos."""
    return CompactPictures(vocabulary) if isinstance(vocabulary, CompactVocabulary) else Emu3Pictures(vocabulary)


def _digits(number: int) -> list[int]:
    """Decimal digits, the highest first."""
    digits = []
    while number:
        number, digit = divmod(number, 10)
        digits.append(digit)
    return digits[::-1]


def _checked_codes(codes: np.ndarray, what: str, vocabulary: Vocabulary) -> np.ndarray:
    """Codes as int64, within the codebook."""
    if codes.dtype.kind not in "iu":
        raise DocumentError(f"{what} has codes of type {codes.dtype}, expected integers")
    if codes.size and (codes.min() < 0 or codes.max() >= vocabulary.codebook_size):
        raise DocumentError(
            f"{what} has codes in [{codes.min()}, {codes.max()}], expected [0, {vocabulary.codebook_size}): "
            "they come from another vision tokenizer"
        )
    return codes.astype(np.int64)
