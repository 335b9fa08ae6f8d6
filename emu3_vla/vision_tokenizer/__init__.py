"""Vision tokenizers: images and video to grids of codes from one codebook, and back."""

from emu3_vla.vision_tokenizer.base import VisionTokenizer, VisionTokenizerError
from emu3_vla.vision_tokenizer.images import to_images, to_pixels

__all__ = ["VisionTokenizer", "VisionTokenizerError", "to_images", "to_pixels"]
