"""A tiny token store whose actions follow from its pictures and its instruction, so that a model can learn them in seconds."""

import shutil
from pathlib import Path

import numpy as np
import small_emu3
import torch

from action_tokenizer import ActionNormalizer, FastTokenizer
from emu3_vla.data.tokens import ACTION, NORMALIZER, TEXT, VISION, Asked, TokenizedEpisode, TokenStore
from emu3_vla.number_words import NumberWords, StateWords
from emu3_vla.text import TextTokenizer
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer
from emu3_vla.vocabulary import CODEBOOK_SIZE
from envs.spec import RGB_GRIPPER, RGB_STATIC

HORIZON, SPACING, FRAMES = 10, 5, 9
WORDINGS = {"left": ["go left", "move to the left"], "right": ["go right", "move to the right"]}
SPEEDS = ("stands.", "goes.", "runs.", "flies.")
STATE = StateWords(("x", "width"), (0.0, 0.0), (1.0, 0.08), bins=8)
SCENE = NumberWords.within({"speed": (0.0, 4.0), "missing": (0.0, 4.0), "odd": (0.0, 1.0)}, bins=4)
LIGHT = LightConfig(codebook_size=32, channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0))


def tiny_store(
    folder: Path,
    shards: int = 4,
    episodes_per_shard: int = 10,
    asked: bool = False,
    questions: str = "tiny_tokens:nobody",
    about=None,
    felt: bool = False,
) -> TokenStore:
    """Write the store and return it. asked: with one question about every frame, or those of `questions`: about(speed) -> pairs. felt: with
    the arm's state, and what there is to see, which say the speed too."""
    said = [sentence for speed in range(len(SPEEDS)) for pair in about(speed) for sentence in pair] if about else []
    about = about or (lambda speed: [("how fast?", SPEEDS[speed])])
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    LightTokenizer(LIGHT).eval().save_pretrained(folder / VISION)
    recorded = [[_episode(random) for _ in range(episodes_per_shard)] for _ in range(shards)]
    normalizer = ActionNormalizer.fit(np.concatenate([episode["chunks"] for shard in recorded for episode in shard]))
    normalizer.save(folder / NORMALIZER)
    chunks = np.concatenate([normalizer.normalize(episode["chunks"]) for shard in recorded for episode in shard])
    action = FastTokenizer.fit(chunks, scale=10, vocab_size=300)
    action.save_pretrained(folder / ACTION)
    own = [sentence for task in WORDINGS.values() for sentence in task]
    words = [*STATE.words, *SCENE.words] if felt else []
    text = TextTokenizer.fit([*own, *SPEEDS, *said], vocab_size=400 if said else 280, words=words)
    text.save_pretrained(folder / TEXT)
    metadata = {
        "horizon": HORIZON,
        "action_dim": 7,
        "grids": {RGB_STATIC: [16, 16], RGB_GRIPPER: [12, 12]},
        "codebook_size": LIGHT.codebook_size,
        "action_vocab_size": action.vocab_size,
        "text_vocab_size": text.vocab_size,
        "wordings": WORDINGS,
        "questions": questions if asked else "",
        "shards": list(range(shards)),
        **({"state": STATE.fields(), "scene": SCENE.fields(), "scene_by": "tiny_tokens:nobody"} if felt else {}),
        "source": {"totals": {"episodes": shards * episodes_per_shard}},
    }
    store = TokenStore.create(folder, metadata)
    for index, shard in enumerate(recorded):
        encode = text.encode if asked else None
        store.write_shard(index, [_tokenized(episode, index, action, normalizer, encode, about, felt) for episode in shard])
    return store


def emu3_store(folder: Path, codebook_size: int = CODEBOOK_SIZE) -> TokenStore:
    """A store in Emu3's own ids: its form of text tokenizer, and as many codes."""
    plain = tiny_store(folder / "plain", shards=2, episodes_per_shard=1)
    target = folder / "emu3"
    (target / TEXT).mkdir(parents=True)
    small_emu3.write_tiktoken(target / TEXT)
    shutil.copytree(plain.path / ACTION, target / ACTION)
    shutil.copyfile(plain.path / NORMALIZER, target / NORMALIZER)
    sizes = {RGB_STATIC: 32, RGB_GRIPPER: 32}
    config = LightConfig(codebook_size=codebook_size, channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0), image_sizes=sizes)
    LightTokenizer(config).eval().save_pretrained(target / VISION)
    metadata = {name: value for name, value in plain.metadata.items() if name != "hashes"}
    metadata |= {"text_vocab_size": 151_643, "codebook_size": codebook_size, "grids": {RGB_STATIC: [4, 4], RGB_GRIPPER: [4, 4]}}
    store = TokenStore.create(target, metadata)
    for index in (0, 1):
        (episode,) = plain.read_shard(index)
        random = np.random.default_rng(index)
        codes = {name: random.integers(0, codebook_size, (9, 4, 4)).astype(np.uint16) for name in ("static_codes", "gripper_codes")}
        store.write_shard(index, [TokenizedEpisode(**{**vars(episode), **codes})])
    return store


def _episode(random: np.random.Generator) -> dict:
    """One motion per frame: its speed is what the picture shows, its direction what the instruction says."""
    task = random.choice(list(WORDINGS))
    speeds = random.integers(0, 4, FRAMES)
    sign = 1 if task == "right" else -1
    chunks = np.zeros((FRAMES, HORIZON, 7), np.float32)
    chunks[:, :, 0] = sign * (0.1 + 0.2 * speeds[:, None]) * np.linspace(0.5, 1, HORIZON)
    chunks[:, :, 1] = 0.2 * np.where(speeds % 2, 1, -1)[:, None]
    chunks[:, :, 6] = np.where(speeds > 1, 1, -1)[:, None]
    return {"task": task, "speeds": speeds, "chunks": chunks, "noise": random.integers(0, 2, (FRAMES, 16, 16))}


def state_of(speed: int) -> np.ndarray:
    """The arm's state that goes with a speed."""
    robot_obs = np.zeros(15)
    robot_obs[[0, 6]] = speed / 4, 0.01
    return robot_obs


def _tokenized(
    episode: dict, shard: int, action: FastTokenizer, normalizer: ActionNormalizer, encode, about, felt: bool
) -> TokenizedEpisode:
    static = (8 * episode["speeds"][:, None, None] + episode["noise"]).astype(np.uint16)
    return TokenizedEpisode(
        task=episode["task"],
        instruction=WORDINGS[episode["task"]][0],
        shard=shard,
        static_codes=static,
        gripper_codes=static[:, :12, :12].copy(),
        frame_step=np.arange(FRAMES) * SPACING,
        action_ids=action.encode(normalizer.normalize(episode["chunks"])),
        chunk_imitate=np.arange(FRAMES) != 3,
        asked=Asked.of([[tuple(map(encode, pair)) for pair in about(speed)] for speed in episode["speeds"]]) if encode else None,
        state_FS=np.stack([STATE.numbers(state_of(speed)) for speed in episode["speeds"]]) if felt else None,
        scene_FS=np.stack([SCENE.numbers([speed, 3 - speed, speed % 2]) for speed in episode["speeds"]]) if felt else None,
    )


def train(tokens: Path, output: Path, **options) -> Path:
    """Train a tiny model and return its checkpoint folder."""
    from emu3_vla.training.loop import main

    main(config(tokens, output, **options))
    return output / "policy"


def config(tokens: Path, output: Path, **options):
    """A TrainConfig that runs in seconds."""
    from emu3_vla.training.loop import ModelSizes, OptimizerConfig, TrainConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    small = ModelSizes(**sizes, code_dim=8, depth_size=32, depth_layers=1, depth_heads=2)
    values = {"batch_size": 8, "validation_documents": 16, "validate_every": 4, "checkpoint_every": 2, "log_every": 1}
    values |= {"optimizer": OptimizerConfig(warmup_steps=2), "model": small, "validation_fraction": 0.25}
    return TrainConfig(tokens=str(tokens), output_dir=str(output), **(values | options))
