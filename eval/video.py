"""A rollout as an MP4: static camera large, gripper camera and subtasks beside it, instruction, step and success written on it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from envs.spec import CONTROL_HZ, RGB_GRIPPER, RGB_STATIC
from eval.chain import Attempt, Watcher
from eval.watching import Camera

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

VIEW, SIDE, BAR = 600, 216, 72  # static camera, column beside it, bar below it [pixels]
WIDTH, HEIGHT = VIEW + SIDE, VIEW + BAR
MARGIN = 12
INSET = SIDE - 2 * MARGIN
ROW = 26
CODECS = ("libx264", "mpeg4")
PAPER, INK, FAINT = (18, 20, 24), (240, 240, 236), (150, 154, 160)
GREEN, RED, AMBER = (64, 200, 120), (232, 86, 76), (240, 176, 64)
SHOW_OUTCOME_S = 0.8


class VideoWriter(Watcher):
    """Writes one MP4 over any number of chains, in real time: a frame every `frame_stride` control steps.

    The file appears under its name when `close()` was called, unless there was not one frame. `thumbnails` are small images (uint8 RGB)
    of how each subtask ended, with the subtask's position and outcome. Raises ValueError where PyAV has no MPEG-4 encoder.
    """

    def __init__(self, path: Path, *, title: str, camera: Camera, frame_stride: int = 2):
        self.path, self.temporary = path, path.with_name(path.stem + ".part" + path.suffix)
        self.frame_stride, self.title, self.camera = frame_stride, title, camera
        self.rate = Fraction(CONTROL_HZ, frame_stride)
        codec = next((name for name in CODECS if name in av.codecs_available), None)
        if codec is None:
            raise ValueError(f"this PyAV ({av.__version__}) has none of the encoders {', '.join(CODECS)}; install another build of av")
        self.container = av.open(str(self.temporary), "w")
        options = {"crf": "23", "preset": "veryfast"} if codec == "libx264" else {"qscale": "4"}
        self.stream = self.container.add_stream(codec, rate=self.rate, options=options)
        self.stream.width, self.stream.height, self.stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        self.fonts = {size: ImageFont.load_default(size) for size in (14, 20)}
        self.thumbnails: list[dict] = []
        self.frames = 0

    def close(self) -> None:
        """Finish the file and give it its name. Without a frame there is no file: an encoder that never began cannot be finished."""
        if not self.frames:
            self.container.close()
            self.temporary.unlink(missing_ok=True)
            return
        for packet in self.stream.encode():
            self.container.mux(packet)
        self.container.close()
        self.temporary.replace(self.path)

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        self.env, self.chain, self.subtasks, self.position = env, index, subtasks, 0
        self.outcomes: list[bool] = []

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        self.position = position
        self._draw(attempt)

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        if attempt.steps % self.frame_stride == 0 and not attempt.success:
            self._draw(attempt)

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        self.outcomes.append(attempt.success)
        picture = self._draw(attempt, verdict="solved" if attempt.success else "not solved", repeat=round(SHOW_OUTCOME_S * self.rate))
        small = picture.crop((0, 0, VIEW, VIEW)).resize((240, 240), Image.Resampling.LANCZOS)
        self.thumbnails.append(
            {"chain": self.chain, "position": position, "task": attempt.task, "success": attempt.success, "image": np.asarray(small)}
        )

    def _draw(self, attempt: Attempt, verdict: str = "", repeat: int = 1) -> Image.Image:
        observation = self.camera.observe(self.env)
        picture = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        picture.paste(_enlarged(observation[RGB_STATIC], VIEW), (0, 0))
        picture.paste(_enlarged(observation[RGB_GRIPPER], INSET), (VIEW + MARGIN, MARGIN))
        draw = ImageDraw.Draw(picture)
        self._write_subtasks(draw)
        self._write_bar(draw, attempt)
        if verdict:
            self._write_verdict(draw, verdict, GREEN if attempt.success else RED)
        frame = av.VideoFrame.from_image(picture)
        for _ in range(repeat):
            frame.pts = self.frames
            frame.time_base = 1 / self.rate
            self.frames += 1
            for packet in self.stream.encode(frame):
                self.container.mux(packet)
        return picture

    def _write_subtasks(self, draw: ImageDraw.ImageDraw) -> None:
        for position, task in enumerate(self.subtasks):
            top = INSET + 3 * MARGIN + ROW * position
            box = (VIEW + MARGIN, top + 3, VIEW + MARGIN + 12, top + 15)
            if position < len(self.outcomes):
                draw.ellipse(box, fill=GREEN if self.outcomes[position] else RED)
            else:
                draw.ellipse(box, outline=AMBER if position == self.position else FAINT, width=2)
            color = INK if position == self.position else FAINT
            draw.text((VIEW + MARGIN + 20, top), task.replace("_", " "), font=self.fonts[14], fill=color)

    def _write_bar(self, draw: ImageDraw.ImageDraw, attempt: Attempt) -> None:
        draw.text((MARGIN, VIEW + 10), f"“{attempt.instruction}”", font=self._fitting(draw, attempt.instruction), fill=INK)
        status = f"{self.title} · chain {self.chain} · subtask {self.position + 1} of {len(self.subtasks)} · step {attempt.steps}"
        draw.text((MARGIN, VIEW + 44), status, font=self.fonts[14], fill=FAINT)

    def _fitting(self, draw: ImageDraw.ImageDraw, sentence: str) -> ImageFont.FreeTypeFont:
        wide = draw.textlength(f"“{sentence}”", font=self.fonts[20]) > WIDTH - 2 * MARGIN
        return self.fonts[14 if wide else 20]

    def _write_verdict(self, draw: ImageDraw.ImageDraw, verdict: str, color: tuple[int, int, int]) -> None:
        width = draw.textlength(verdict, font=self.fonts[20])
        draw.rounded_rectangle((MARGIN, MARGIN, MARGIN + width + 24, MARGIN + 36), radius=8, fill=color)
        draw.text((MARGIN + 12, MARGIN + 6), verdict, font=self.fonts[20], fill=PAPER)


def _enlarged(pixels: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
