"""The commands of emu3_vla.pipelines: generate image, generate video, extend, ask, describe, interleave, imagine, complete, reconstruct.

    emu3-vla generate image prompt="the drawer is open, the light bulb is on."
    emu3-vla generate image checkpoint=BAAI/Emu3-Gen prompt="a shiba inu" ratio=16:9 guidance=3 device=cuda dtype=bfloat16
    emu3-vla ask episodes=outputs/episodes episode=3 frame=10 question="is the drawer open?"

Pictures come from files, or from a stored moment of an episode store, which holds what all cameras saw. Each command writes into
output_dir, files whole or not at all, and prints their paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import policies
from emu3_vla import pipelines
from emu3_vla.data.episodes import EpisodeStore, write_text_atomic
from emu3_vla.generation.engines import ENGINES
from emu3_vla.generation.sampling import Sampling
from emu3_vla.pipelines import Decoding, PipelineError, Pipelines, asking, filming, interleaving, media
from emu3_vla.pipelines.drawing import DRAWN
from emu3_vla.vision_tokenizer.images import resize
from envs.spec import CAMERAS, ROBOT_OBS

DTYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
NO_STATE = "none"
RATE_HZ = 6.0
"""Frames a second of a video: the shipped checkpoint's training saw one frame of five control steps, of which there are 30 a second."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Which checkpoint, where, and by which engine."""

    checkpoint: str = policies.SHIPPED  # a shipped name, a folder, or a Hugging Face name
    vision_tokenizer: str = ""  # folder of one, for a checkpoint of another layout that keeps it apart
    text_tokenizer: str = ""  # likewise, a folder or *.tiktoken file
    form: str = ""  # of questions: trained or published; empty: as the checkpoint says
    engine: str = "ours"  # or transformers or vllm; see docs/generation.md
    compile: bool = False  # steps through torch.compile; on a GPU
    int8_draft: bool = False  # with parallel=: guesses of a copy of the trunk in int8; the same result, on a CPU sooner
    device: str = "cpu"
    dtype: str = ""  # float32 or bfloat16, of the decoder; empty: as it is stored
    threads: int = 1  # of tensor operations
    output_dir: str = ""

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}, expected one of {', '.join(ENGINES)}")
        if self.form not in ("", *pipelines.FORMS):
            raise ValueError(f"form={self.form!r}, expected one of {', '.join(pipelines.FORMS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}, expected float32 or bfloat16")
        if self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class DecodingOptions(CheckpointOptions):
    """How ids are chosen; see emu3_vla.generation.sampling. The defaults are greedy."""

    SENTENCES: ClassVar[tuple[str, ...]] = ("prompt", "question", "negative")

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    guidance: float = 1.0  # scale of classifier-free guidance; 1: none; Emu3's published pictures are drawn with 3
    negative: str = ""  # a prompt that guidance moves away from; empty: the null prompt
    parallel: int = 0  # guesses verified at once: the same result, sooner on some machines; 0: one id at a time
    lossy: int = 0  # rounds after which these guesses count as right: sooner, and another result; 0: never
    samples: int = 1  # of what is filmed or foreseen, drawn at temperature=; the one nearest to all is kept

    def __post_init__(self):
        super().__post_init__()
        Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        self.decoding()

    def decoding(self) -> Decoding:
        return Decoding(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            guidance=self.guidance,
            negative=self.negative,
            parallel=self.parallel,
            lossy=self.lossy,
            samples=self.samples,
        )


@dataclass(frozen=True, kw_only=True)
class DrawnOptions(DecodingOptions):
    """Drawn at random, not the likeliest."""

    prompt: str = ""  # what there is to see, or what happens
    ratio: str = ""  # width:height, for a checkpoint whose vocabulary has any size
    area: int = 0  # pixels, about; likewise
    temperature: float = DRAWN.temperature
    top_k: int = DRAWN.top_k

    def __post_init__(self):
        super().__post_init__()
        if not self.prompt.strip():
            raise ValueError('the prompt is empty; say in words what there is to see: prompt="..."')


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where pictures come from: files, or a moment of an episode store."""

    image: str | tuple[str, ...] = ()  # picture files, one of each of the checkpoint's cameras
    episodes: str = ""  # an episode store instead
    episode: int = 0  # number of the episode in it
    frame: int = 0  # number of the stored frame

    @property
    def images(self) -> tuple[str, ...]:
        return (self.image,) if isinstance(self.image, str) else tuple(self.image)

    def check_source(self, *others: str) -> None:
        """Raise PipelineError unless there is one source. others: further ones that are given, or empty."""
        if sum(map(bool, (self.images, self.episodes, *others))) != 1:
            raise PipelineError(
                "give the pictures once: image= files, or episodes= (with episode= and frame=), or another source of the command"
            )

    def pictures(self) -> pipelines.base.Pictures:
        """What is to be looked at."""
        if self.episodes:
            return {name: frames[0] for name, frames in media.read_moments(self.episodes, self.episode, [self.frame]).items()}
        return [media.read_picture(path) for path in self.images]

    def columns(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Of the stored episode. See data.episodes.EpisodeStore.read_columns."""
        store, before = EpisodeStore.open(self.episodes), 0
        for shard in store.shard_indices():
            count = len(store.records(shard))
            if self.episode < before + count:
                return store.read_columns(shard, names)[self.episode - before]
            before += count
        raise PipelineError(f"{self.episodes} has {before} episodes, so none with number {self.episode}")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(DrawnOptions):
    """Options of `emu3-vla generate image`."""

    count: int = 1  # drawings

    def main(self) -> None:
        with _opened(self) as model:
            drawings = model.draw(self.prompt, count=self.count, ratio=self.ratio, area=self.area, decoding=self.decoding())
        for number, drawing in enumerate(drawings):
            for name, picture in drawing.items():
                _made(media.write_picture(Path(self.output_dir) / f"{name}{f'_{number}' if self.count > 1 else ''}.png", picture))


@dataclass(frozen=True, kw_only=True)
class VideoConfig(DrawnOptions):
    """Options of `emu3-vla generate video`."""

    frames: int = 16
    rate_hz: float = RATE_HZ
    window: int = filming.WINDOW  # frames of codes that the model has before it at once
    kept: int = filming.KEPT  # of them, frames that are shown when the window moves on

    def main(self) -> None:
        with _opened(self) as model:
            shape = {"ratio": self.ratio, "area": self.area, "window": self.window, "kept": self.kept}
            frames = model.film(self.prompt, frames=self.frames, decoding=self.decoding(), **shape)
        _made(media.write_film(Path(self.output_dir) / "video.mp4", frames, self.rate_hz))


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(DecodingOptions):
    """Options of `emu3-vla extend`. The video that is made shows what was given and then what was added."""

    video: str = ""  # a video file
    episodes: str = ""  # an episode store instead: frames 0 to shown - 1 of an episode
    episode: int = 0
    shown: int = 0  # frames that are given, from the first on; 0: all of the video
    prompt: str = ""  # what happens, such as the instruction
    frames: int = 16  # to add
    rate_hz: float = RATE_HZ
    window: int = filming.WINDOW
    kept: int = filming.KEPT

    def __post_init__(self):
        super().__post_init__()
        if bool(self.video) == bool(self.episodes):
            raise PipelineError("give what is to be continued once: video= or episodes=")
        if self.episodes and self.shown < 1:
            raise PipelineError("say with shown= how many of the episode's frames are given")

    def main(self) -> None:
        with _opened(self) as model:
            if self.episodes:
                camera = filming.camera_of(model)
                if camera not in CAMERAS:
                    raise PipelineError(f"an episode store has the frames of {', '.join(CAMERAS)}, but the checkpoint has no such camera")
                shown = media.read_moments(self.episodes, self.episode, range(self.shown))[camera]
            else:
                shown = media.read_frames(self.video, count=self.shown)
            options = {"text": self.prompt, "window": self.window, "kept": self.kept, "decoding": self.decoding()}
            added = model.extend(shown, frames=self.frames, **options)
        before = resize(shown, added.shape[1:3]).permute(0, 2, 3, 1).numpy()
        _made(media.write_film(Path(self.output_dir) / "extended.mp4", np.concatenate([before, added]), self.rate_hz))


@dataclass(frozen=True, kw_only=True)
class AskConfig(DecodingOptions, Source):
    """Options of `emu3-vla ask`."""

    question: str = ""
    state: str = ""  # file of numpy (*.npy) with robot_obs of the moment, (15,); of a stored moment its own, or "none" for pictures alone
    video: str = ""  # a video file, for Emu3's published weights
    frames: int = 0  # of the video, from the first on; 0: all
    every: int = 1  # one frame of so many
    longest: int = asking.LONGEST  # text ids of the answer, at most

    def __post_init__(self):
        super().__post_init__()
        if not self.question.strip():
            raise PipelineError('the question is empty; ask in words: question="..."')
        self.check_source(self.video)
        if self.state and self.video:
            raise PipelineError(f"state={self.state} is of the moment of pictures, and video= is asked about; leave one of them out")

    def main(self) -> None:
        with _opened(self, bar=False) as model:
            options = {"longest": self.longest, "decoding": self.decoding()}
            if self.video:
                options["frames"] = media.read_frames(self.video, count=self.frames, every=self.every)
            else:
                options["pictures"], options["state"] = self.pictures(), self._state(model)
            _tell(self, model.ask(self.question, **options), {"question": self.question}, "answer")

    def _state(self, model: Pipelines) -> np.ndarray | None:
        """robot_obs of the moment, where it is known and the checkpoint is told it."""
        if self.state and self.state != NO_STATE:
            return _read_array(self.state, "state", pipelines.WrongState)
        if self.state or not self.episodes or model.published or model.state_words is None:
            return None
        columns = self.columns((ROBOT_OBS, "frame_step"))
        return columns[ROBOT_OBS][columns["frame_step"][self.frame]]


@dataclass(frozen=True, kw_only=True)
class DescribeConfig(DecodingOptions, Source):
    """Options of `emu3-vla describe`."""

    longest: int = asking.LONGEST

    def __post_init__(self):
        super().__post_init__()
        self.check_source()

    def main(self) -> None:
        with _opened(self, bar=False) as model:
            _tell(self, model.describe(self.pictures(), longest=self.longest, decoding=self.decoding()), {}, "description")


@dataclass(frozen=True, kw_only=True)
class InterleaveConfig(DrawnOptions):
    """Options of `emu3-vla interleave`."""

    steps: int = interleaving.STEPS  # at most
    step_text: int = interleaving.STEP_TEXT  # text ids of each, at most

    def main(self) -> None:
        folder, lines = Path(self.output_dir), [f"# {self.prompt}", ""]
        with _opened(self) as model:
            shape = {"ratio": self.ratio, "area": self.area}
            steps = model.interleave(self.prompt, steps=self.steps, step_text=self.step_text, decoding=self.decoding(), **shape)
            for number, step in enumerate(steps, start=1):
                path = media.write_picture(folder / f"step_{number}.png", step.picture)
                lines += [f"{number}. {step.text}", "", f"![step {number}]({path.name})", ""]
        write_text_atomic(folder / "steps.md", "\n".join(lines))
        print("\n".join(line for line in lines if line and not line.startswith("!")))
        _made(folder / "steps.md")


@dataclass(frozen=True, kw_only=True)
class ImagineConfig(DecodingOptions, Source):
    """Options of `emu3-vla imagine`. Each picture made shows one camera: now, and after each chunk; of a stored episode's own actions
    below it what was really seen, black where nothing was stored.
    """

    prompt: str = ""  # the instruction
    actions: str = ""  # file of numpy (*.npy): (T, A), or (N, T, A) for chunks one after another; empty: those of the stored episode
    chunks: int = 1  # of the stored episode's actions

    def __post_init__(self):
        super().__post_init__()
        self.check_source()
        if not self.prompt.strip():
            raise PipelineError('the instruction is empty; say in words what the arm is about: prompt="..."')
        if not self.actions and not self.episodes:
            raise PipelineError("no actions are given: name a file with actions=, or a stored episode with episodes=")
        if self.chunks < 1:
            raise PipelineError(f"chunks is {self.chunks}, expected at least 1")

    def main(self) -> None:
        with _opened(self) as model:
            pictures, steps = self.pictures(), None
            if self.actions:
                actions = _read_array(self.actions, "actions", pipelines.WrongActions)
            else:
                actions, steps = self._stored(model)
            looks = model.imagine(self.prompt, pictures, actions, decoding=self.decoding())
        named = (
            pictures if isinstance(pictures, dict) else {grid.name: picture for grid, picture in zip(model.cameras, pictures, strict=True)}
        )
        for camera, now in named.items():
            side = looks[0][camera].shape[0]
            strip = [resize(now[None], side)[0].permute(1, 2, 0).numpy(), *(look[camera] for look in looks)]
            rows = [np.concatenate(strip, axis=1)]
            if steps is not None:
                rows.append(np.concatenate([strip[0], *self._seen(steps, camera, side)], axis=1))
            _made(media.write_picture(Path(self.output_dir) / f"imagined_{camera}.png", np.concatenate(rows)))

    def _stored(self, model: Pipelines) -> tuple[np.ndarray, list[int]]:
        """The episode's own actions from the frame on, (N, T, A), and the control steps after each chunk."""
        horizon = model.actions[2].horizon
        columns = self.columns(("actions", "frame_step"))
        first = int(columns["frame_step"][self.frame])
        actions = columns["actions"][first : first + self.chunks * horizon]
        if len(actions) < self.chunks * horizon:
            raise PipelineError(
                f"episode {self.episode} has {len(actions)} actions from frame {self.frame} on, expected {self.chunks} chunks of "
                f"{horizon}; choose an earlier frame= or fewer chunks="
            )
        return actions.reshape(self.chunks, horizon, -1), [first + horizon * number for number in range(1, self.chunks + 1)]

    def _seen(self, steps: Sequence[int], camera: str, side: int) -> Iterator[np.ndarray]:
        """What the camera saw at these control steps, black where no frame was stored."""
        frame_of = {int(step): number for number, step in enumerate(self.columns(("frame_step",))["frame_step"])}
        for step in steps:
            if step in frame_of:
                seen = media.read_moments(self.episodes, self.episode, [frame_of[step]])[camera]
                yield resize(seen, side)[0].permute(1, 2, 0).numpy()
            else:
                yield np.zeros((side, side, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class CompleteConfig(DecodingOptions):
    """Options of `emu3-vla complete`."""

    image: str = ""  # a picture file
    mask: str = ""  # a picture of the same size, white where to draw
    camera: str = ""  # whose picture it is; empty: the checkpoint's first
    prompt: str = ""  # what there is to see
    temperature: float = DRAWN.temperature
    top_k: int = DRAWN.top_k

    def __post_init__(self):
        super().__post_init__()
        if not self.image or not self.mask:
            raise PipelineError("a picture and its mask are needed: image= and mask=")

    def main(self) -> None:
        with _opened(self) as model:
            picture, mask = media.read_picture(self.image), media.read_mask(self.mask)
            whole = model.complete(picture, mask, caption=self.prompt, camera=self.camera, decoding=self.decoding())
        _made(media.write_picture(Path(self.output_dir) / "completed.png", whole))


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(CheckpointOptions):
    """Options of `emu3-vla reconstruct`. What is made shows the original on the left, the reconstruction on the right."""

    image: str = ""  # a picture file
    video: str = ""  # a video file instead
    frames: int = 0  # of the video, from the first on; 0: all
    camera: str = ""  # read it at the size at which the checkpoint reads this camera; empty: at its own size
    rate_hz: float = RATE_HZ

    def __post_init__(self):
        super().__post_init__()
        if bool(self.image) == bool(self.video):
            raise PipelineError("give one thing to be reconstructed: image= or video=")

    def main(self) -> None:
        with _opened(self) as model:
            given = media.read_picture(self.image) if self.image else media.read_frames(self.video, count=self.frames)
            made = model.reconstruct(given, camera=self.camera)
        beside = np.concatenate([made.original, made.reconstructed], axis=-2)
        print(f"{made.codes.size} codes, PSNR {made.psnr_db:.2f} dB")
        if self.image:
            _made(media.write_picture(Path(self.output_dir) / "reconstructed.png", beside))
        else:
            _made(media.write_film(Path(self.output_dir) / "reconstructed.mp4", beside, self.rate_hz))


def main(config) -> None:
    """Run the command that the configuration is of. Raises what its pipeline raises."""
    config.main()


@contextmanager
def _opened(config: CheckpointOptions, *, bar: bool = True) -> Iterator[Pipelines]:
    """The checkpoint, with a progress bar over what it writes."""
    torch.set_num_threads(config.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not bar) as progress:
        task = progress.add_task("ids", total=None)
        yield pipelines.load(
            config.checkpoint,
            device=config.device,
            dtype=DTYPES[config.dtype],
            vision_tokenizer=config.vision_tokenizer or None,
            text_tokenizer=config.text_tokenizer or None,
            engine=config.engine,
            compile=config.compile,
            int8_draft=config.int8_draft,
            form=config.form,
            say=progress.console.print,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _tell(config: DecodingOptions, stream: pipelines.TextStream, about: dict[str, str], what: str) -> None:
    """Print a text as it comes, and keep it."""
    for piece in stream:
        print(piece, end="", flush=True)
    print("" if stream.finish != "length" else f" … (cut short: longest={config.longest})")
    path = Path(config.output_dir) / f"{what}.json"
    write_text_atomic(path, json.dumps(about | {what: stream.text, "finish": stream.finish}, indent=1) + "\n")
    _made(path)


def _read_array(path: str, option: str, refused: type[PipelineError]) -> np.ndarray:
    if not Path(path).is_file():
        raise refused(f"{option}={path} does not exist, expected a file of numpy.save")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise refused(f"{option}={path} is no array of numbers that numpy.save wrote: {error}") from error


def _made(path: Path) -> None:
    print(path)
