"""`emu3-vla tokenize`: episode stores into one token store.

    emu3-vla tokenize episodes=outputs/collect/first vision_tokenizer=outputs/tokenizer/vision_tokenizer output_dir=outputs/tokens
    emu3-vla tokenize 'episodes=[outputs/scene_a,outputs/scene_b]' vision_tokenizer=... output_dir=...
    emu3-vla tokenize episodes=outputs/mine checkpoint=calvin-d output_dir=...      # in the ids of a checkpoint, to fine-tune it

`questions=envs.calvin.questions:Questions` also writes questions about every frame with their answers, for joint training: any class by its
dotted name, made with the episode store's scene, with `about(robot_obs, scene_obs)` -> pairs of sentences and `sentences()`.

`scene=envs.calvin.scene_numbers:SceneNumbers` writes what there is to see in numbers, which a policy that is trained with `scene_fraction`
says before it acts: any class with `limits`, `powers`, `bins` and `of(robot_obs, scene_obs)` -> numbers. `scene=checkpoint` writes what the
checkpoint itself says that it sees: recordings of a real arm know no more, and a policy that says so goes on saying it when it is trained
further.

Action and text tokenizers that are not given are fitted on the episodes. Worker processes take a shard each; shards that are there are
skipped, so the same command goes on after a kill. Shards keep their numbers; those of a second store follow behind the first one's last.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from action_tokenizer import ActionNormalizer, FastTokenizer
from emu3_vla.data.episodes import RATE, EpisodeStore
from emu3_vla.data.tokens import (
    ACTION,
    MANIFEST,
    NORMALIZER,
    TEXT,
    VISION,
    Asked,
    TokenizedEpisode,
    Tokenizers,
    TokenStore,
    content_hash,
)
from emu3_vla.documents import Image
from emu3_vla.number_words import NumberWords, StateWords, check_entries
from emu3_vla.text import TextTokenizer
from envs.spec import ACTION_DIM, CAMERAS, CONTROL_HZ, RGB_GRIPPER, RGB_STATIC, ActionUnits, Episode

if TYPE_CHECKING:
    from emu3_vla.checkpoint import PolicySettings
    from emu3_vla.generation.seeing import Seer

# One thread encodes this many frames fastest: more no longer fit the caches.
ENCODE_BATCH = 8
SEEN_BATCH = 16
"""Frames of which a checkpoint says at once what it sees."""
# Codes are stored in two bytes.
CODE_LIMIT = 2**16
BY_CHECKPOINT = "checkpoint"
"""As `scene`: the checkpoint itself says what there is to see, so that one that is trained further goes on saying it."""
PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Raises ValueError for values that cannot work."""

    episodes: str | tuple[str, ...]  # folder of an episode store, or a list of them
    vision_tokenizer: str = ""  # folder, such as train-tokenizer leaves; of either kind, with image_sizes in its config.json
    checkpoint: str = ""  # takes all tokenizers from this checkpoint, a folder or a shipped name, and how it says the arm's state
    output_dir: str = ""
    action_tokenizer: str = ""  # folder of a FAST tokenizer; empty: fit on the episodes, with a normaliser
    normalizer: str = ""  # normalizer.json that goes with action_tokenizer
    text_tokenizer: str = ""  # folder; empty: fit on the store's wordings
    horizon: int = 10  # control steps of a chunk
    action_range: str = "minmax"  # of a fitted normaliser: minmax, quantile or meanstd; see action_tokenizer.ActionNormalizer
    action_scale: float = 7.0  # of a fitted FAST: larger is finer and longer
    action_vocab_size: int = 1024
    text_vocab_size: int = 1024  # at most, without the words of `state` and `scene`
    state: tuple[str, ...] = ()  # entries of the arm's state that are said before its actions: x, y, z, roll, pitch, yaw, width
    scene: str = ""  # "module:Class" that says in numbers what there is to see, or "checkpoint": what that one sees; empty: nobody does
    questions: str = ""  # "module:Class" that asks about the frames and answers; empty: nobody asks
    workers: int = 2  # processes, one thread each

    def __post_init__(self):
        for name in ("horizon", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.checkpoint:
            self._take_from_checkpoint()
        if not self.vision_tokenizer:
            raise ValueError("vision_tokenizer names no folder; give one, or the checkpoint whose tokenizers are to be used")
        if bool(self.action_tokenizer) != bool(self.normalizer):
            raise ValueError("action_tokenizer and normalizer belong together: give both, or neither to have both fitted")
        for name, example in (("questions", "envs.calvin.questions:Questions"), ("scene", "envs.calvin.scene_numbers:SceneNumbers")):
            if (dotted := getattr(self, name)) and not PLUG_IN.fullmatch(dotted) and not (name == "scene" and dotted == BY_CHECKPOINT):
                raise ValueError(f"{name} is {dotted!r}, expected module:Class, such as {example}")
        if self.scene == BY_CHECKPOINT and not (self.settings and self.settings.scene):
            raise ValueError(
                f"scene={BY_CHECKPOINT}, but checkpoint={self.checkpoint or repr('')} says nothing of what it sees before it acts; leave "
                "scene out, or name a checkpoint that was trained with scene_fraction"
            )
        if self.state:
            check_entries(self.state)
        if not self.stores:
            raise ValueError("episodes names no episode store")

    @property
    def folder(self) -> Path | None:
        """The checkpoint's."""
        from emu3_vla.checkpoint.hub import find_folder

        return find_folder(self.checkpoint) if self.checkpoint else None

    @property
    def settings(self) -> PolicySettings | None:
        """The checkpoint's: how it says the arm's state, and what it sees."""
        from emu3_vla.checkpoint import POLICY, read_policy

        return read_policy(self.folder / POLICY) if self.checkpoint else None

    def _take_from_checkpoint(self) -> None:
        from emu3_vla.checkpoint import ACTION, NORMALIZER, TEXT, VISION

        folder = self.folder
        parts = {"vision_tokenizer": VISION, "action_tokenizer": ACTION, "normalizer": NORMALIZER, "text_tokenizer": TEXT}
        for option, part in parts.items():
            path = str(folder / part)
            if getattr(self, option) not in ("", path):
                raise ValueError(f"{option}={getattr(self, option)} and checkpoint={self.checkpoint} both name one; leave either out")
            object.__setattr__(self, option, path)
        if self.state:
            raise ValueError(f"state={','.join(self.state)}, but checkpoint={self.checkpoint} decides how the state is said; leave it out")
        horizon = self.settings.horizon
        if self.horizon != horizon:
            raise ValueError(f"horizon={self.horizon}, but the chunks of checkpoint={self.checkpoint} have {horizon} control steps")

    @property
    def stores(self) -> tuple[str, ...]:
        return (self.episodes,) if isinstance(self.episodes, str) else tuple(self.episodes)


class Questioner(Protocol):
    """Made with the name of a scene; asks about a moment in it and answers. The first answer says what there is to see: a caption."""

    def about(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> list[tuple[str, str]]: ...

    @staticmethod
    def sentences() -> list[str]: ...


class Viewer(Protocol):
    """Made with the name of a scene; says what there is to see at a moment: numbers within `limits`, in that order, cut into `bins`
    with those `powers`; see NumberWords. One that tells places from the tool may have `relative`, number -> entry of the arm's state."""

    limits: Mapping[str, tuple[float, float]]
    powers: Mapping[str, float]
    bins: int

    def of(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> np.ndarray: ...


def questioner(dotted: str) -> type[Questioner]:
    """The class of that name. Raises ValueError where there is none."""
    return _plug_in("questions", dotted)


def viewer(dotted: str) -> type[Viewer]:
    """The class of that name. Raises ValueError where there is none."""
    return _plug_in("scene", dotted)


def _plug_in(option: str, dotted: str) -> type:
    module, name = dotted.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{option}={dotted}: {error}") from error


class Sources:
    """Episode stores in a fixed order. shards: number in the token store → (store, its own number); groups: these numbers by store."""

    def __init__(self, paths: Sequence[str]):
        """Raises FileNotFoundError or EpisodeStoreError for a folder that is no episode store."""
        self.stores = [EpisodeStore.open(path) for path in paths]
        self.shards: dict[int, tuple[EpisodeStore, int]] = {}
        self.groups: list[list[int]] = []
        for store in self.stores:
            first = max(self.shards) + 1 if self.shards else 0
            numbered = {first + index: (store, index) for index in store.shard_indices()}
            self.shards |= numbered
            self.groups.append(list(numbered))

    def __str__(self) -> str:
        return ", ".join(str(store.path) for store in self.stores)

    def columns(self, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """Those arrays of every episode."""
        return [columns for store, index in self.shards.values() for columns in store.read_columns(index, names)]

    def wordings(self) -> dict[str, list[str]]:
        """Sentences of each task: every store's, each once. Of a task that a store gives none for, what its episodes were told.

        Raises ValueError where such an episode was told nothing.
        """
        joined: dict[str, list[str]] = {}
        for store in self.stores:
            given = store.metadata.get("wordings", {})
            for task, sentences in (given | _instructions(store, without=given)).items():
                joined[task] = list(dict.fromkeys([*joined.get(task, []), *sentences]))
        return joined

    def units(self) -> ActionUnits:
        """What the stores' actions mean. Raises ValueError where they do not all mean the same."""
        each = [ActionUnits(**store.metadata.get("actions", {}), rate_hz=store.metadata.get(RATE, CONTROL_HZ)) for store in self.stores]
        for store, units in zip(self.stores, each, strict=True):
            if units != each[0]:
                raise ValueError(
                    f"the actions of {store.path} are {units}, those of {self.stores[0].path} {each[0]}: as ids they would mean the same; "
                    "convert them with the same position_unit_m and rotation_unit_rad, from recordings of one rate"
                )
        return each[0]

    def totals(self) -> dict[str, Any]:
        """As episodes.Totals, over all stores."""
        each = [vars(store.totals()) for store in self.stores]
        tasks = sum((Counter(totals["tasks"]) for totals in each), Counter())
        counted = {name: sum(totals[name] for totals in each) for name in ("shards", "episodes", "steps", "frames")}
        return counted | {"tasks": dict(sorted(tasks.items()))}


def _instructions(store: EpisodeStore, without: dict[str, Any]) -> dict[str, list[str]]:
    """Instructions of the episodes of each task that is not in `without`."""
    told: dict[str, list[str]] = {}
    for index in store.shard_indices():
        for number, record in enumerate(store.records(index)):
            if record["task"] in without:
                continue
            if not record["instruction"].strip():
                raise ValueError(
                    f"{store.shard_path(index)}: episode {number} has no instruction, and the store has no wordings of its task "
                    f"{record['task']!r}; a policy is told what to do: give the instruction when converting"
                )
            told.setdefault(record["task"], []).append(record["instruction"])
    return told


def main(config: TokenizeConfig) -> None:
    """Write the missing shards of the token store in output_dir. Prints its folder."""
    sources = Sources(config.stores)
    _require_scenes(config, sources)
    store = _open_or_start(config, sources)
    if store.missing_shards():
        _write_missing(config, sources, store)
    print(store.path)


def _write_missing(config: TokenizeConfig, sources: Sources, store: TokenStore) -> None:
    """Shards that are not there yet, in worker processes, with a live bar."""
    missing = store.missing_shards()
    columns = (
        TextColumn("tokenize"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards · {task.fields[frames]} frames"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # for the workers
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, context.Pool(min(config.workers, len(missing))) as pool:
        total = len(store.metadata["shards"])
        bar = progress.add_task("", total=total, completed=total - len(missing), frames=0)
        checkpoint = str(config.folder) if config.scene == BY_CHECKPOINT else ""
        jobs = [(str(sources.shards[number][0].path), sources.shards[number][1], str(store.path), number, checkpoint) for number in missing]
        for frames in pool.imap_unordered(_tokenize_shard, jobs):
            progress.update(bar, advance=1, frames=progress.tasks[bar].fields["frames"] + frames)


def chunks_of(actions: np.ndarray, starts: np.ndarray, horizon: int) -> np.ndarray:
    """Chunks (F, horizon, 7) of actions (T, 7) at steps `starts` (F,); past the end zero motion with the last gripper command."""
    rest = np.zeros((horizon, actions.shape[1]), actions.dtype)
    rest[:, -1] = actions[-1, -1]
    return _windows(np.concatenate([actions, rest]), starts, horizon)


def own_chunks(imitate: np.ndarray, starts: np.ndarray, horizon: int) -> np.ndarray:
    """bool (F,): whether all actions of the chunk at each start are the demonstrator's own; the padding counts as own."""
    return _windows(np.concatenate([imitate, np.ones(horizon, bool)]), starts, horizon).all(axis=1)


def _windows(values: np.ndarray, starts: np.ndarray, horizon: int) -> np.ndarray:
    return values[np.asarray(starts)[:, None] + np.arange(horizon)]


def tokenize_episode(
    episode: Episode,
    shard: int,
    tokenizers: Tokenizers,
    horizon: int,
    asker: Questioner | None = None,
    state_words: StateWords | None = None,
    seeing: Callable[[Episode, TokenizedEpisode], np.ndarray] | None = None,
) -> TokenizedEpisode:
    """All frames of one episode, the chunk that begins at each, what `asker` asks about it, and the arm's state and what there is to see as
    bins of words. seeing: gives these bins of every frame, (F, S)."""
    chunks = tokenizers.normalizer.normalize(chunks_of(episode.actions, episode.frame_step, horizon))
    tokenized = TokenizedEpisode(
        task=episode.task,
        instruction=episode.instruction,
        shard=shard,
        static_codes=_codes(tokenizers, RGB_STATIC, episode.rgb_static),
        gripper_codes=_codes(tokenizers, RGB_GRIPPER, episode.rgb_gripper),
        frame_step=episode.frame_step,
        action_ids=tokenizers.action.encode(chunks) if len(chunks) else [],
        chunk_imitate=own_chunks(episode.imitate, episode.frame_step, horizon),
        asked=_asked(episode, tokenizers, asker) if asker else None,
        state_FS=state_words.numbers(episode.robot_obs[episode.frame_step]) if state_words else None,
    )
    return replace(tokenized, scene_FS=seeing(episode, tokenized)) if seeing else tokenized


def _asked(episode: Episode, tokenizers: Tokenizers, asker: Questioner) -> Asked:
    encode, frames = tokenizers.text.encode, []
    for step in episode.frame_step:
        pairs = asker.about(episode.robot_obs[step], episode.scene_obs[step])
        frames.append([(encode(question), encode(answer)) for question, answer in pairs])
    return Asked.of(frames)


def _known(viewer: Viewer, words: NumberWords, episode: Episode, _: TokenizedEpisode) -> np.ndarray:
    """What a viewer knows of every frame from the recorded states: bins (F, S)."""
    moments = [viewer.of(episode.robot_obs[step], episode.scene_obs[step]) for step in episode.frame_step]
    return words.numbers(np.array(moments).reshape(-1, len(words.names)))


def _believed(checkpoint: str, _: Episode, episode: TokenizedEpisode) -> np.ndarray:
    """What the checkpoint says that it sees in every frame: bins (F, S)."""
    seer, parts = _seer(checkpoint), []
    for at in range(0, len(episode.frame_step), SEEN_BATCH):
        rows = slice(at, at + SEEN_BATCH)
        looks = [
            [Image(RGB_STATIC, static), Image(RGB_GRIPPER, gripper)]
            for static, gripper in zip(episode.static_codes[rows], episode.gripper_codes[rows], strict=True)
        ]
        parts.append(seer.see(episode.instruction, looks, None if episode.state_FS is None else episode.state_FS[rows]))
    return np.concatenate(parts)


@cache  # once a worker
def _seer(checkpoint: str) -> Seer:
    from emu3_vla.checkpoint import load
    from emu3_vla.generation.seeing import Seer

    return Seer(load(checkpoint))


def _codes(tokenizers: Tokenizers, camera: str, images: np.ndarray) -> np.ndarray:
    """Codes of (F, H, W, 3) images: uint16 (F, h, w)."""
    codes = np.zeros((len(images), *tokenizers.vision.grid(camera)), np.uint16)
    for start in range(0, len(images), ENCODE_BATCH):
        rows = slice(start, start + ENCODE_BATCH)
        codes[rows] = tokenizers.vision.encode_camera(camera, images[rows]).numpy()
    return codes


def _tokenize_shard(job: tuple[str, int, str, int, str]) -> int:
    """Tokenize shard `index` of an episode store as shard `number` of a token store; returns its number of frames."""
    import torch

    torch.set_num_threads(1)
    episodes, index, output, number, checkpoint = job
    store, tokenizers = _opened(output)
    horizon = store.metadata["horizon"]
    source, dotted = EpisodeStore.open(episodes), store.metadata.get("questions", "")
    asker = questioner(dotted)(source.metadata["scene"]) if dotted else None
    by, seeing = store.metadata.get("scene_by", ""), None
    if by == BY_CHECKPOINT:
        seeing = partial(_believed, checkpoint)
    elif by:
        seeing = partial(_known, viewer(by)(source.metadata["scene"]), store.scene_words)
    tokenized = [
        tokenize_episode(episode, number, tokenizers, horizon, asker, store.state_words, seeing) for episode in source.read_shard(index)
    ]
    store.write_shard(number, tokenized)
    return sum(len(episode.frame_step) for episode in tokenized)


@cache  # once a worker, not once a shard
def _opened(output: str) -> tuple[TokenStore, Tokenizers]:
    store = TokenStore.open(output)
    return store, store.tokenizers()


def _open_or_start(config: TokenizeConfig, sources: Sources) -> TokenStore:
    """The store in output_dir: the one that is there if the same tokenizers wrote it, or a new one, tokenizers and all."""
    output = Path(config.output_dir)
    given = {VISION: config.vision_tokenizer, ACTION: config.action_tokenizer, TEXT: config.text_tokenizer}
    given = {name: Path(path) for name, path in (given | {NORMALIZER: config.normalizer}).items() if path}
    for name, path in given.items():
        if not path.exists():
            raise FileNotFoundError(f"{name.removesuffix('.json')}={path} does not exist")
    if (output / MANIFEST).exists():
        store = TokenStore.open(output)
        store.require_hashes({name: content_hash(path) for name, path in given.items()}, "the one given now")
        _require_same_shards(store, sources)
        return store
    output.mkdir(parents=True, exist_ok=True)
    for name, path in given.items():
        _copy(path, output / name)
    if ACTION not in given:
        _fit_action_tokenizer(config, sources, output)
    state_words = _state_words(config, sources)
    scene_words = _scene_words(config)
    if TEXT not in given:
        words = [word for said in (state_words, scene_words) if said for word in said.words]
        text = TextTokenizer.fit(_sentences(config, sources), vocab_size=config.text_vocab_size, words=words)
        text.save_pretrained(output / TEXT)
    said = {"state": state_words.fields()} if state_words else {}
    if scene_words:
        said |= {"scene": scene_words.fields(), "scene_by": config.scene}
    return TokenStore.create(output, _metadata(config, sources, output) | said)


def _scene_words(config: TokenizeConfig) -> NumberWords | None:
    """How what there is to see is said: as its viewer wants it."""
    if not config.scene:
        return None
    if config.scene == BY_CHECKPOINT:
        return NumberWords.of(config.settings.scene)
    kind = viewer(config.scene)
    return NumberWords.within(kind.limits, kind.bins, kind.powers, getattr(kind, "relative", None))


def _state_words(config: TokenizeConfig, sources: Sources) -> StateWords | None:
    """How the arm's state is said: as the checkpoint says it, or over the range that the episodes have."""
    if config.settings:
        fields = config.settings.state
        return StateWords.of(fields) if fields else None
    if not config.state:
        return None
    columns = sources.columns(("robot_obs", "frame_step"))
    if not columns:
        raise ValueError(f"{sources} holds no episode; collect some before tokenizing")
    return StateWords.fit(np.concatenate([episode["robot_obs"] for episode in columns]), config.state)


def _require_scenes(config: TokenizeConfig, sources: Sources) -> None:
    """Each scene, and that it can be asked about, before a worker asks."""
    for option, find in (("questions", questioner), ("scene", viewer)):
        dotted = getattr(config, option)
        for store in sources.stores if dotted and dotted != BY_CHECKPOINT else ():
            if "scene" not in store.metadata:
                raise ValueError(f"{option}={dotted}: {store.path} does not say which scene it shows; tokenize it without {option}")
            find(dotted)(store.metadata["scene"])


def _require_same_shards(store: TokenStore, sources: Sources) -> None:
    if store.metadata["shards"] != list(sources.shards):
        raise ValueError(
            f"{sources} has {len(sources.shards)} shards now and had {len(store.metadata['shards'])} when {store.path} "
            "was started; tokenize into a new folder"
        )


def _metadata(config: TokenizeConfig, sources: Sources, output: Path) -> dict:
    tokenizers = TokenStore(output, {}).tokenizers()
    if tokenizers.vision.codebook_size > CODE_LIMIT:
        raise ValueError(f"{config.vision_tokenizer} has {tokenizers.vision.codebook_size} codes, expected at most {CODE_LIMIT}")
    return {
        "horizon": config.horizon,
        "action_dim": ACTION_DIM,
        "actions": asdict(sources.units()),
        "grids": {camera: list(tokenizers.vision.grid(camera)) for camera in CAMERAS},
        "codebook_size": tokenizers.vision.codebook_size,
        "action_vocab_size": tokenizers.action.vocab_size,
        "text_vocab_size": tokenizers.text.vocab_size,
        "wordings": sources.wordings(),
        "questions": config.questions,
        "shards": list(sources.shards),
        "shard_groups": sources.groups,
        "source": {
            "episodes": list(config.stores),
            "metadata": json.loads(json.dumps([store.metadata for store in sources.stores])),
            "totals": sources.totals(),
        },
    }


def _fit_action_tokenizer(config: TokenizeConfig, sources: Sources, output: Path) -> None:
    """The normaliser on the demonstrator's own actions, FAST on every chunk that will have to be written."""
    episodes = sources.columns(("actions", "imitate", "frame_step"))
    if not episodes:
        raise ValueError(f"{sources} holds no episode; collect some before tokenizing")
    own = np.concatenate([columns["actions"][columns["imitate"]] for columns in episodes])
    normalizer = ActionNormalizer.fit(own, mode=config.action_range)
    chunks = np.concatenate([chunks_of(c["actions"], c["frame_step"], config.horizon) for c in episodes])
    tokenizer = FastTokenizer.fit(normalizer.normalize(chunks), scale=config.action_scale, vocab_size=config.action_vocab_size)
    tokenizer.save_pretrained(output / ACTION)
    normalizer.save(output / NORMALIZER)


def _sentences(config: TokenizeConfig, sources: Sources) -> Sequence[str]:
    """Every sentence of the stores' wordings, and of questions and answers. Raises ValueError where there is none."""
    sentences = [sentence for wordings in sources.wordings().values() for sentence in wordings]
    if not sentences:
        raise ValueError(f"{sources} holds no episode and no wordings, so no text tokenizer can be fitted; give text_tokenizer=")
    return [*sentences, *(questioner(config.questions).sentences() if config.questions else ())]


def _copy(source: Path, target: Path) -> None:
    """Copy a tokenizer, whole or not at all; an earlier, interrupted attempt's copy is replaced."""
    temporary = target.with_name(f".{target.name}.tmp")
    for path in (temporary, target):
        if path.is_dir():
            shutil.rmtree(path)
    if source.is_dir():
        shutil.copytree(source, temporary)
    else:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
