"""Pictures and videos through the vision tokenizer and back: what a model can know of them at best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from emu3_vla.pipelines.base import PipelineBase, checked_frames, checked_picture
from emu3_vla.pipelines.errors import WrongPictures
from emu3_vla.vision_tokenizer.images import from_bytes, resize, to_images
from emu3_vla.vision_tokenizer.losses import psnr


@dataclass(frozen=True)
class Reconstruction:
    """original, reconstructed: uint8 (T, H, W, 3), or (H, W, 3) of a picture. codes: int64 (F, h, w), or (h, w). psnr_db: over all."""

    original: np.ndarray
    reconstructed: np.ndarray
    codes: np.ndarray
    psnr_db: float


def reconstruct(pipeline: PipelineBase, media: np.ndarray, *, camera: str = "") -> Reconstruction:
    """Encode a picture, uint8 (H, W, 3), or a video, uint8 (T, H, W, 3), and decode it again.

    camera: resize to the size at which the checkpoint reads this camera; by default the size stays as it is, padded to whole codes.
    Raises WrongPictures, WrongFrames, WrongSize, LacksPart, and VisionTokenizerError for a camera that the tokenizer does not know.
    """
    vision, is_video = pipeline.vision, np.ndim(media) == 4
    frames = checked_frames(media) if is_video else checked_picture(media)[None]
    if camera and camera not in vision.image_sizes:
        raise WrongPictures(
            f"camera={camera!r}, expected one of {', '.join(vision.image_sizes) or 'none: this tokenizer knows no cameras'}"
        )
    size = (vision.image_size(camera),) * 2 if camera else frames.shape[1:3]
    pixels = from_bytes(resize(np.ascontiguousarray(frames), size))
    # Where a code spans frames the video goes as a whole; else frame by frame, which needs no more memory than a picture.
    as_clip = is_video and vision.frames_per_code > 1
    parts = [pixels[None]] if as_clip else pixels.split(1)
    codes, decoded = [], []
    for number, part in enumerate(parts, start=1):
        padded, padding = vision.pad(part.to(vision.device))
        codes.append(vision.encode(padded))
        decoded.append(padding.undo(vision.decode(codes[-1])).cpu())
        pipeline.progress(number, len(parts))
    whole, of = torch.cat(decoded), torch.cat(codes).cpu().numpy()
    whole, of = (whole[0], of[0]) if as_clip else (whole, of)
    pictures = to_images(pixels), to_images(whole)
    if not is_video:
        pictures, of = (pictures[0][0], pictures[1][0]), of[0]
    return Reconstruction(*pictures, of, psnr(whole, pixels))
