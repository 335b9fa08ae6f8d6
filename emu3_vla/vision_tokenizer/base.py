"""What every vision tokenizer is: pixels to a grid of codes from one codebook, and back.

    tokenizer = VisionTokenizer.from_pretrained(folder)     # config.json says which kind it is
    codes = tokenizer.encode(pixels)                        # (B, 3, H, W) -> (B, H / 8, W / 8)

Axes: B batch, T time (pixels), t time (codes), H W rows and columns of pixels, h w rows and columns of codes, D code dimensions,
N rows of a list of latents.
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from emu3_vla.vision_tokenizer.images import to_pixels
from emu3_vla.vision_tokenizer.padding import Padding, pad_to_multiple

if TYPE_CHECKING:
    from emu3_vla.vision_tokenizer.codebook import TrainingCodebook

KINDS = {
    "light": ("emu3_vla.vision_tokenizer.light", "LightTokenizer"),
    "emu3": ("emu3_vla.vision_tokenizer.emu3", "Emu3Tokenizer"),
}
# Folders of others name their kind in Transformers' way.
MODEL_TYPES = {"Emu3VisionVQ": "emu3", "emu3_vqgan": "emu3"}
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

# Resizing and arithmetic may leave the range by rounding; more than this is another scaling, such as [0, 255].
RANGE_TOLERANCE = 1e-2


class VisionTokenizerError(ValueError):
    """A tokenizer folder that is missing, damaged or of an unknown kind, or input that is not what it reads."""


class VisionTokenizer(nn.Module):
    """Base of the kinds. A kind fills in what stands below "what a kind fills in".

    kind: its name in config.json. codebook_size: number of codes. patch: pixels per code along a side. frames_per_code: in video.
    image_sizes: camera name → side in pixels at which that camera's images are read.
    """

    kind: str
    codebook_size: int
    patch: int
    frames_per_code: int = 1
    image_sizes: dict[str, int]

    # -- the contract

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes of images or video.

        pixels: float (B, 3, H, W) or (B, T, 3, H, W) in [-1, 1], H and W multiples of `patch`, T of `frames_per_code`; see `pad`.
        Returns int64 (B, h, w) or (B, t, h, w) in [0, codebook_size). Raises VisionTokenizerError.
        """
        self._check_pixels(pixels)
        latents = self.latents(pixels)
        return self.nearest(latents.flatten(0, -2)).view(latents.shape[:-1])

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Pixels of codes: int64 (B, h, w) or (B, t, h, w) -> float32 (B, 3, H, W) or (B, T, 3, H, W), about [-1, 1]."""
        self._check_codes(codes)
        return self.pixels(self.vectors(codes)).float()

    def pad(self, pixels: torch.Tensor) -> tuple[torch.Tensor, Padding]:
        """Images or video of any size and length, padded to what `encode` takes, and how to undo it on what `decode` gives."""
        return pad_to_multiple(pixels, self.patch, self.frames_per_code)

    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """Through the codes and back, at the size and length of the original: float32 as `pixels`."""
        padded, padding = self.pad(pixels)
        return padding.undo(self.decode(self.encode(padded)))

    def encode_camera(self, camera: str, images: np.ndarray) -> torch.Tensor:
        """Codes of camera images: uint8 (B, H, W, 3) -> int64 (B, h, w), at the size that this camera was trained at."""
        return self.encode(to_pixels(images, self.image_size(camera)).to(self.device))

    def image_size(self, camera: str) -> int:
        """Side in pixels at which `camera` is read. Raises VisionTokenizerError for a camera it was not trained on."""
        if not self.image_sizes:
            raise VisionTokenizerError(
                "this vision tokenizer states no size for any camera, as published ones do not: set its image_sizes, "
                "e.g. {'rgb_static': 200, 'rgb_gripper': 80}, and save_pretrained it into a folder of your own"
            )
        if camera not in self.image_sizes:
            raise VisionTokenizerError(
                f"this vision tokenizer knows no camera {camera!r}; it was trained on {', '.join(sorted(self.image_sizes))}"
            )
        return self.image_sizes[camera]

    def grid(self, camera: str) -> tuple[int, int]:
        """Rows and columns of codes of one image of `camera`."""
        side = self.image_size(camera) // self.patch
        return side, side

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def compile(self, **options: Any) -> None:
        """Compile the 2-D networks, where the time goes, with torch.compile(**options). The first call for each shape then takes long."""
        self.frame_features = torch.compile(self.frame_features, **options)
        self.frame_pixels = torch.compile(self.frame_pixels, **options)

    # -- folders

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VisionTokenizer:
        """The tokenizer in `folder`, in evaluation mode, on the CPU. Raises FileNotFoundError or VisionTokenizerError."""
        folder = Path(folder)
        config = _read_config(folder)
        kind = config.pop("kind", None) or MODEL_TYPES.get(config.get("model_type"))
        if kind not in KINDS:
            close = difflib.get_close_matches(str(kind), KINDS, n=1)
            raise VisionTokenizerError(
                f"{folder / CONFIG_FILE}: unknown kind {kind!r} of vision tokenizer"
                + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(KINDS)}")
            )
        module, name = KINDS[kind]
        tokenizer = getattr(importlib.import_module(module), name).from_config(config, where=str(folder / CONFIG_FILE))
        _load_weights(tokenizer, folder / WEIGHTS_FILE)
        return tokenizer.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder` (made if absent)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.weights().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps({"kind": self.kind} | self.config_dict(), indent=1) + "\n")

    # -- what a kind fills in

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str) -> VisionTokenizer:
        """An untrained tokenizer of config.json's values (without `kind`); `where` names the file in errors."""
        raise NotImplementedError

    def config_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """What model.safetensors holds."""
        return self.state_dict()

    def adapt_weights(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights read from a file under the names that `weights` gives; for kinds that others publish too."""
        return state

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Take over weights that have been checked against `weights`."""
        self.load_state_dict(state)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is quantised, with gradients: (B, 3, H, W) -> float32 (B, h, w, D); (B, T, 3, H, W) -> (B, t, h, w, D)."""
        raise NotImplementedError

    def nearest(self, latents_ND: torch.Tensor) -> torch.Tensor:
        """The code of each latent: float32 (N, D) -> int64 (N,)."""
        raise NotImplementedError

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Code vectors: int64 (...) -> (..., D)."""
        raise NotImplementedError

    def pixels(self, vectors: torch.Tensor) -> torch.Tensor:
        """Pixels of code vectors, with gradients: the shapes of `latents` backwards."""
        raise NotImplementedError

    def frame_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The 2-D half of the encoder, each frame alone: (N, 3, H, W) -> (N, C, h, w)."""
        raise NotImplementedError

    # -- for training

    def training_codebook(self) -> TrainingCodebook:
        """The codebook with what training needs; it shares its codes with the tokenizer."""
        raise NotImplementedError

    def residual_kernels(self) -> list[nn.Parameter]:
        """Kernels of the residual blocks of the 2-D network, which Muon may have."""
        raise NotImplementedError

    def decoder_parameters(self) -> list[nn.Parameter]:
        """All that stands behind the codes: what may change without any picture getting other codes."""
        raise NotImplementedError

    def last_layer(self) -> nn.Parameter:
        """The kernel that makes pixels; the weight of an adversarial loss is balanced there."""
        raise NotImplementedError

    # -- checks

    def _check_pixels(self, pixels: torch.Tensor) -> None:
        got = f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}"
        if not pixels.is_floating_point():
            raise VisionTokenizerError(f"{got}, expected floating point in [-1, 1]; images.to_pixels makes them of camera images")
        if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3:
            raise VisionTokenizerError(f"{got}, expected images (B, 3, H, W) or video (B, T, 3, H, W)")
        height, width = pixels.shape[-2:]
        if height % self.patch or width % self.patch or not pixels.numel():
            raise VisionTokenizerError(f"{got}, expected at least one image, H and W multiples of {self.patch}; resize it or use pad()")
        if pixels.ndim == 5 and pixels.shape[1] % self.frames_per_code:
            raise VisionTokenizerError(f"{got}, expected a multiple of {self.frames_per_code} frames; use pad()")
        low, high = (bound.item() for bound in torch.aminmax(pixels.detach()))
        if not (low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # NaN fails every comparison
            raise VisionTokenizerError(f"pixels lie in [{low:.3g}, {high:.3g}], expected [-1, 1] and no NaN; see images.to_pixels")

    def _check_codes(self, codes: torch.Tensor) -> None:
        got = f"codes are {codes.dtype} of shape {tuple(codes.shape)}"
        if codes.is_floating_point() or codes.dtype == torch.bool or codes.ndim not in (3, 4) or not codes.numel():
            raise VisionTokenizerError(f"{got}, expected at least one grid of integers (B, h, w) or (B, t, h, w)")
        low, high = codes.min().item(), codes.max().item()
        if low < 0 or high >= self.codebook_size:
            raise VisionTokenizerError(f"codes lie in [{low}, {high}], expected [0, {self.codebook_size})")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no vision tokenizer: {CONFIG_FILE} is missing")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise VisionTokenizerError(f"{path} is damaged or cut short: {error}") from error
    if not isinstance(config, dict):
        raise VisionTokenizerError(f"{path} holds {type(config).__name__}, expected a JSON object")
    return config


def _load_weights(tokenizer: VisionTokenizer, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no weights of a vision tokenizer: {path.name} is missing")
    try:
        state = tokenizer.adapt_weights(load_file(path))
    except SafetensorError as error:
        raise VisionTokenizerError(f"{path} is damaged or cut short: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in tokenizer.weights().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise VisionTokenizerError(
            f"{path} does not fit its {CONFIG_FILE}: {wrong} is {found.get(wrong, 'absent')}, expected {expected.get(wrong, 'absent')}"
        )
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise VisionTokenizerError(f"{path}: {broken[0]} holds NaN or infinity; the file is damaged or its training had diverged")
    tokenizer.load_weights(state)
