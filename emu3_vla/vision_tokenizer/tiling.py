"""Large images in overlapping tiles, so that memory grows with the tile and not with the image.

A tokenizer's attention and norms look at the whole image, so tiles give other codes than one pass does: similar ones, taken
from the tile in which a position lies farthest from an inner edge. Decoding blends the tiles where they overlap.
"""

from __future__ import annotations

import torch

from emu3_vla.vision_tokenizer.base import VisionTokenizer, VisionTokenizerError


def encode_tiled(tokenizer: VisionTokenizer, pixels: torch.Tensor, tile: int = 512, overlap: int = 128) -> torch.Tensor:
    """Codes of images or video, tile by tile: shapes as `VisionTokenizer.encode`. tile, overlap: pixels, multiples of the patch."""
    _check(tokenizer, tile, overlap)
    patch = tokenizer.patch
    height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    codes, trust = None, torch.full((height, width), -1)
    for top, bottom, left, right in _tiles(height, width, tile // patch, overlap // patch):
        part = tokenizer.encode(pixels[..., top * patch : bottom * patch, left * patch : right * patch])
        if codes is None:
            codes = part.new_zeros(*part.shape[:-2], height, width)
        inner = _distance_to_cut(top, bottom, height)[:, None].minimum(_distance_to_cut(left, right, width)[None])
        better = inner > trust[top:bottom, left:right]
        trust[top:bottom, left:right][better] = inner[better]
        codes[..., top:bottom, left:right][..., better] = part[..., better]
    return codes


def decode_tiled(tokenizer: VisionTokenizer, codes: torch.Tensor, tile: int = 512, overlap: int = 128) -> torch.Tensor:
    """Pixels of codes, tile by tile, blended where tiles overlap: shapes as `VisionTokenizer.decode`."""
    _check(tokenizer, tile, overlap)
    patch = tokenizer.patch
    height, width = codes.shape[-2:]
    total, weights = None, torch.zeros(height * patch, width * patch)
    for top, bottom, left, right in _tiles(height, width, tile // patch, overlap // patch):
        part = tokenizer.decode(codes[..., top:bottom, left:right])
        if total is None:
            total = part.new_zeros(*part.shape[:-2], height * patch, width * patch)
        ramps = (_ramp(top, bottom, height, patch, overlap), _ramp(left, right, width, patch, overlap))
        weight = ramps[0][:, None] * ramps[1][None]
        window = slice(top * patch, bottom * patch), slice(left * patch, right * patch)
        total[..., window[0], window[1]] += part * weight.to(part)
        weights[window] += weight
    return total / weights.to(total)


def _check(tokenizer: VisionTokenizer, tile: int, overlap: int) -> None:
    patch = tokenizer.patch
    if tile % patch or overlap % patch or not 0 <= overlap < tile:
        raise VisionTokenizerError(f"tile={tile}, overlap={overlap}: expected multiples of {patch} with 0 <= overlap < tile")


def _tiles(height: int, width: int, tile: int, overlap: int):
    """(top, bottom, left, right) of tiles that cover a grid, in codes; the last of each direction is moved back inside."""
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            yield top, min(top + tile, height), left, min(left + tile, width)


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _distance_to_cut(start: int, end: int, length: int) -> torch.Tensor:
    """How far each position lies from where the tile was cut out; the image's own border is no cut."""
    position = torch.arange(end - start)
    far = torch.full_like(position, length)
    before = position if start > 0 else far
    behind = position.flip(0) if end < length else far
    return before.minimum(behind)


def _ramp(start: int, end: int, length: int, patch: int, overlap: int) -> torch.Tensor:
    """Weight of each pixel of a tile: 1, falling to the edges that were cut."""
    distance = _distance_to_cut(start * patch, end * patch, length * patch) + 1.0
    return (distance / (overlap + 1)).clamp(max=1.0)
