"""Token store and `tokenize`: what is written is what the tokenizers say, parallel and resumed runs agree, strangers are refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny_tokens

from action_tokenizer import ActionNormalizer
from emu3_vla.checkpoint import load
from emu3_vla.data.episodes import EpisodeStore
from emu3_vla.data.tokenize import TokenizeConfig, chunks_of, main, own_chunks
from emu3_vla.data.tokens import TokenStore, TokenStoreError
from emu3_vla.generation import seeing
from emu3_vla.vision_tokenizer import VisionTokenizerError
from emu3_vla.vision_tokenizer.emu3 import Emu3Config, Emu3Tokenizer
from emu3_vla.vision_tokenizer.light import LightConfig, LightTokenizer
from envs.spec import Episode
from policies.emu3 import Emu3Policy

HORIZON = 10
WORDINGS = {"open_drawer": ["open the drawer", "pull the drawer open"], "close_drawer": ["close the drawer"]}


def make_episode(seed: int, steps: int) -> Episode:
    random = np.random.default_rng(seed)
    actions = np.clip(np.cumsum(random.normal(0, 0.1, (steps, 7)), axis=0), -1, 1).astype(np.float32)
    actions[:, -1] = np.where(np.arange(steps) < steps // 2, 1, -1)
    frame_step = np.arange(0, steps, 5)
    imitate = np.ones(steps, bool)
    imitate[7:9] = False
    return Episode(
        task="open_drawer" if seed % 2 else "close_drawer",
        instruction="close the drawer",
        actions=actions,
        robot_obs=random.uniform(-0.3, 0.3, (steps, 15)),
        scene_obs=np.zeros((steps, 24)),
        imitate=imitate,
        frame_step=frame_step,
        rgb_static=random.integers(0, 256, (len(frame_step), 200, 200, 3), dtype=np.uint8),
        rgb_gripper=random.integers(0, 256, (len(frame_step), 84, 84, 3), dtype=np.uint8),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of two episodes, and an untrained vision tokenizer."""
    folder = tmp_path_factory.mktemp("tokenize")
    store = EpisodeStore.create(folder / "episodes", {"wordings": WORDINGS})
    for shard in range(3):
        store.write_shard(shard, [make_episode(2 * shard, 23), make_episode(2 * shard + 1, 31)])
    LightTokenizer(_small(codebook_size=32)).save_pretrained(folder / "vision")
    return folder


def _small(**options) -> LightConfig:
    return LightConfig(channels=(8, 8), encoder_blocks=(0, 0), decoder_blocks=(0, 0), **options)


def config_for(folder, name, **options) -> TokenizeConfig:
    options = {"workers": 1} | options
    return TokenizeConfig(
        episodes=str(folder / "episodes"), vision_tokenizer=str(folder / "vision"), output_dir=str(folder / name), **options
    )


@pytest.fixture(scope="module")
def tokens(folder):
    main(config_for(folder, "tokens"))
    return TokenStore.open(folder / "tokens")


def test_manifest_says_what_a_model_needs(tokens):
    metadata = tokens.metadata
    assert metadata["horizon"] == HORIZON and metadata["action_dim"] == 7 and metadata["codebook_size"] == 32
    assert metadata["grids"] == {"rgb_static": [16, 16], "rgb_gripper": [12, 12]}
    assert metadata["wordings"] == WORDINGS and metadata["shards"] == [0, 1, 2]
    assert metadata["source"]["totals"]["episodes"] == 6
    tokenizers = tokens.tokenizers()
    assert metadata["action_vocab_size"] == tokenizers.action.vocab_size
    assert metadata["text_vocab_size"] == tokenizers.text.vocab_size


def test_codes_and_chunks_are_the_tokenizers_own(tokens):
    episodes, tokenizers = tokens.episodes(), tokens.tokenizers()
    assert [episode.shard for episode in episodes] == [0, 0, 1, 1, 2, 2]
    for seed, episode in enumerate(episodes):
        original = make_episode(seed, 31 if seed % 2 else 23)
        assert (episode.task, episode.instruction) == (original.task, original.instruction)
        assert np.array_equal(episode.frame_step, original.frame_step)
        for camera, codes in (("rgb_static", episode.static_codes), ("rgb_gripper", episode.gripper_codes)):
            one_by_one = [tokenizers.vision.encode_camera(camera, image[None]).numpy()[0] for image in getattr(original, camera)]
            assert codes.dtype == np.uint16 and np.mean(codes == np.stack(one_by_one)) > 0.999
        decoded = tokenizers.normalizer.denormalize(tokenizers.action.decode(episode.action_ids, horizon=HORIZON, action_dim=7))
        expected = chunks_of(original.actions, original.frame_step, HORIZON)
        assert np.abs(decoded - expected).max() < 0.25 and np.abs(decoded - expected).mean() < 0.05


def test_chunks_end_in_zero_motion_with_the_last_gripper():
    actions = np.arange(21, dtype=np.float32).reshape(3, 7)
    chunks = chunks_of(actions, np.array([0, 2]), 4)
    assert np.array_equal(chunks[0, :3], actions) and np.array_equal(chunks[1, 0], actions[2])
    assert np.array_equal(chunks[1, 1:, :6], np.zeros((3, 6))) and np.all(chunks[:, -1, 6] == actions[-1, 6])


def test_a_chunk_is_own_if_every_action_in_it_is():
    imitate = np.array([1, 1, 0, 1, 1, 1], bool)
    assert own_chunks(imitate, np.arange(6), 3).tolist() == [False, False, False, True, True, True]


def test_two_workers_and_a_resumed_run_give_the_same_store(folder, tokens):
    main(config_for(folder, "parallel", workers=2))
    shutil.rmtree(folder / "parallel" / "shards" / "00001.zarr")
    with pytest.raises(TokenStoreError, match="unfinished: 1 of 3 shards"):
        TokenStore.open(folder / "parallel").episodes()
    main(config_for(folder, "parallel", workers=2))
    for path in sorted(tokens.path.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (folder / "parallel" / path.relative_to(tokens.path)).read_bytes(), path.name


def test_without_wordings_a_task_is_what_its_episodes_were_told(folder, tmp_path):
    store = EpisodeStore.create(tmp_path / "told", {"wordings": {"open_drawer": ["open it"]}})
    told = [dataclasses.replace(make_episode(2 * seed, 23), instruction=f"shut it, {seed}") for seed in (0, 1, 0)]
    store.write_shard(0, [*told, make_episode(1, 23)])
    main(dataclasses.replace(config_for(folder, "x"), episodes=str(store.path), output_dir=str(tmp_path / "out")))
    wordings = TokenStore.open(tmp_path / "out").metadata["wordings"]
    assert wordings == {"open_drawer": ["open it"], "close_drawer": ["shut it, 0", "shut it, 1"]}


def test_split_is_by_whole_shards(tokens):
    train, held_out = tokens.split(0.3)
    assert {episode.shard for episode in held_out} == {1} and {episode.shard for episode in train} == {0, 2}


def test_several_stores_become_one(folder, tokens, tmp_path):
    second = EpisodeStore.create(tmp_path / "second", {"wordings": {"open_drawer": ["open it"]}})
    for shard in (0, 4):
        second.write_shard(shard, [make_episode(11 + shard, 23)])
    config = dataclasses.replace(
        config_for(folder, "x"), episodes=(str(folder / "episodes"), str(second.path)), output_dir=str(tmp_path / "out")
    )
    main(config)
    both = TokenStore.open(tmp_path / "out")
    assert both.metadata["shards"] == [0, 1, 2, 3, 7] and both.metadata["shard_groups"] == [[0, 1, 2], [3, 7]]
    assert both.metadata["wordings"]["open_drawer"] == ["open the drawer", "pull the drawer open", "open it"]
    assert both.metadata["source"]["totals"]["episodes"] == 8
    codes = both.tokenizers().vision.encode_camera("rgb_static", make_episode(15, 23).rgb_static)
    assert np.mean(both.read_shard(7)[0].static_codes == codes.numpy()) > 0.999
    train, held_out = both.split(0.3)  # each store on its own, as train-tokenizer splits them
    assert sorted({episode.shard for episode in held_out}) == [1, 3] and sorted({episode.shard for episode in train}) == [0, 2, 7]


class Asker:
    """Asks how many numbers of a state lie below 1."""

    def __init__(self, scene: str):
        self.scene = scene

    def about(self, robot_obs, scene_obs):
        return [("which scene?", f"{self.scene}."), ("how many?", f"{int((robot_obs < 1).sum())}.")]

    @staticmethod
    def sentences():
        return ["which scene?", "how many?", "15.", "X."]


def test_questions_are_asked_about_every_frame(folder, tmp_path):
    store = EpisodeStore.create(tmp_path / "episodes", {"wordings": WORDINGS, "scene": "X"})
    store.write_shard(0, [make_episode(0, 23), make_episode(1, 31)])
    config = TokenizeConfig(
        episodes=str(store.path),
        vision_tokenizer=str(folder / "vision"),
        output_dir=str(tmp_path / "asked"),
        workers=1,
        questions="test_tokenize:Asker",
    )
    main(config)
    tokens = TokenStore.open(tmp_path / "asked")
    text = tokens.tokenizers().text
    for episode in tokens.episodes():
        for frame in range(len(episode.frame_step)):
            spoken = [text.decode(ids) for question in (0, 1) for ids in episode.asked.pair(frame, question)]
            assert spoken == ["which scene?", "X.", "how many?", "15."]


def test_questions_that_cannot_be_asked_are_refused_before_work_begins(folder):
    with pytest.raises(ValueError, match="does not say which scene it shows; tokenize it without questions"):
        main(config_for(folder, "refused", questions="test_tokenize:Asker"))
    with pytest.raises(ValueError, match="questions is 'nobody', expected module:Class"):
        config_for(folder, "refused", questions="nobody")


def test_emu3_tokenizes_too_and_must_know_the_cameras(folder, tmp_path):
    tiny = Emu3Config(codebook_size=64, base_channels=32, channel_multiplier=(1, 1), residual_blocks=1, attention_levels=(1,))
    tokenizer = Emu3Tokenizer.from_sizes(dataclasses.replace(tiny, image_sizes={"rgb_static": 32, "rgb_gripper": 16})).eval()
    tokenizer.save_pretrained(tmp_path / "vision")
    config = dataclasses.replace(config_for(folder, "x"), vision_tokenizer=str(tmp_path / "vision"), output_dir=str(tmp_path / "out"))
    main(config)
    store = TokenStore.open(tmp_path / "out")
    assert store.metadata["grids"] == {"rgb_static": [16, 16], "rgb_gripper": [8, 8]} and store.metadata["codebook_size"] == 64
    expected = tokenizer.encode_camera("rgb_static", make_episode(0, 23).rgb_static).numpy()
    assert np.mean(store.read_shard(0)[0].static_codes == expected) > 0.99
    tokenizer.image_sizes = {}
    tokenizer.save_pretrained(tmp_path / "sizeless")
    with pytest.raises(VisionTokenizerError, match="states no size for any camera, .* set its image_sizes"):
        main(dataclasses.replace(config, vision_tokenizer=str(tmp_path / "sizeless"), output_dir=str(tmp_path / "other")))


def test_tokenizers_can_be_given(folder, tokens):
    parts = {name: str(tokens.path / name) for name in ("action_tokenizer", "text_tokenizer")}
    main(config_for(folder, "given", normalizer=str(tokens.path / "normalizer.json"), **parts))
    given = TokenStore.open(folder / "given")
    assert given.metadata["hashes"] == tokens.metadata["hashes"]
    assert [e.action_ids for e in given.episodes()] == [e.action_ids for e in tokens.episodes()]


def test_another_tokenizers_store_is_refused_by_name(folder, tokens, tmp_path):
    LightTokenizer(_small(codebook_size=16)).save_pretrained(tmp_path / "other")
    config = dataclasses.replace(config_for(folder, "tokens"), vision_tokenizer=str(tmp_path / "other"))
    with pytest.raises(TokenStoreError, match="written by another vision_tokenizer .* than the one given now"):
        main(config)
    shutil.copytree(tokens.path, tmp_path / "edited")
    normalizer = ActionNormalizer.load(tmp_path / "edited" / "normalizer.json")
    dataclasses.replace(normalizer, half_range=normalizer.half_range * 2).save(tmp_path / "edited" / "normalizer.json")
    with pytest.raises(TokenStoreError, match="written by another normalizer.json"):
        TokenStore.open(tmp_path / "edited")
    shutil.rmtree(tmp_path / "edited" / "text_tokenizer")
    with pytest.raises(TokenStoreError, match="lacks text_tokenizer"):
        TokenStore.open(tmp_path / "edited")


def test_a_grown_episode_store_is_refused(folder, tokens, tmp_path):
    shutil.copytree(folder / "episodes", tmp_path / "episodes")
    EpisodeStore.open(tmp_path / "episodes").write_shard(3, [make_episode(9, 12)])
    config = dataclasses.replace(config_for(folder, "tokens"), episodes=str(tmp_path / "episodes"))
    with pytest.raises(ValueError, match="has 4 shards now and had 3"):
        main(config)


def test_errors_are_named(folder, tokens, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokens.json"):
        TokenStore.open(folder)
    with pytest.raises(ValueError, match="belong together"):
        config_for(folder, "x", action_tokenizer="somewhere")
    with pytest.raises(FileNotFoundError, match="vision_tokenizer=.*nowhere does not exist"):
        main(dataclasses.replace(config_for(folder, "x"), vision_tokenizer=str(tmp_path / "nowhere")))
    store = EpisodeStore.create(tmp_path / "mute", {})
    store.write_shard(0, [dataclasses.replace(make_episode(0, 23), instruction=" ")])
    with pytest.raises(ValueError, match="episode 0 has no instruction, and the store has no wordings of its task 'close_drawer'"):
        main(dataclasses.replace(config_for(folder, "y"), episodes=str(store.path)))
    shutil.copytree(tokens.path, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "tokens.json").read_text())
    (tmp_path / "old" / "tokens.json").write_text(json.dumps(manifest | {"schema": 0}))
    with pytest.raises(TokenStoreError, match="has schema 0"):
        TokenStore.open(tmp_path / "old")


def test_the_state_of_the_arm_in_words(folder):
    main(config_for(folder, "felt", state=("x", "yaw", "width")))
    store, source = TokenStore.open(folder / "felt"), EpisodeStore.open(folder / "episodes")
    words, text = store.state_words, store.tokenizers().text
    assert words.names == ("x", "yaw", "width")
    for tokenized, episode in zip(store.read_shard(1), source.read_shard(1), strict=True):
        np.testing.assert_array_equal(tokenized.state_FS, words.numbers(episode.robot_obs[episode.frame_step]))
    assert words.spelled(text.encode).single_ids() is not None
    assert text.vocab_size == store.metadata["text_vocab_size"] > 3 * words.bins


def test_states_that_no_word_stands_for(folder, tmp_path):
    main(config_for(folder, "felt_too", state=("x",)))
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "felt_too", damaged)
    manifest = json.loads((damaged / "tokens.json").read_text())
    manifest["metadata"]["state"]["bins"] = 3
    (damaged / "tokens.json").write_text(json.dumps(manifest))
    with pytest.raises(TokenStoreError, match="expected \\(frames, 1\\) below 3"):
        TokenStore.open(damaged).read_shard(0)


class Seer:
    """Sees how many joints lie left of zero."""

    bins = 15
    powers: ClassVar = {"height": 0.5}
    limits: ClassVar = {"left": (0.0, 15.0), "height": (-0.5, 0.5)}

    def __init__(self, scene: str):
        assert scene == "X"

    def of(self, robot_obs, scene_obs):
        return [(robot_obs < 0).sum(), robot_obs[2]]


def test_what_there_is_to_see_in_words(folder, tmp_path):
    store = EpisodeStore.create(tmp_path / "episodes", {"wordings": WORDINGS, "scene": "X"})
    store.write_shard(0, [make_episode(0, 23), make_episode(1, 31)])
    main(
        TokenizeConfig(
            episodes=str(store.path),
            vision_tokenizer=str(folder / "vision"),
            output_dir=str(tmp_path / "seen"),
            workers=1,
            scene="test_tokenize:Seer",
        )
    )
    tokens = TokenStore.open(tmp_path / "seen")
    assert tokens.scene_words.names == ("left", "height") and tokens.state_words is None
    for tokenized, episode in zip(tokens.read_shard(0), store.read_shard(0), strict=True):
        left = (episode.robot_obs[episode.frame_step] < 0).sum(axis=1)
        np.testing.assert_array_equal(tokenized.scene_FS[:, 0], left.clip(0, 14))
    with pytest.raises(ValueError, match="does not say which scene it shows; tokenize it without scene"):
        main(config_for(folder, "unseen", scene="test_tokenize:Seer"))


def test_what_a_checkpoint_says_that_it_sees(folder, tmp_path, tiny_checkpoint):
    """Frame by frame what it would say before it acts, in its own words, of recordings that know nothing of the scene."""
    store = EpisodeStore.create(tmp_path / "episodes", {"wordings": WORDINGS, "scene": "X"})
    for shard in range(2):
        store.write_shard(shard, [make_episode(2 * shard, 23), make_episode(2 * shard + 1, 31)])
    made = {"episodes": str(store.path), "workers": 1}
    seen = TokenizeConfig(
        vision_tokenizer=str(folder / "vision"), output_dir=str(tmp_path / "seen"), scene="test_tokenize:Seer", state=("x",), **made
    )
    main(seen)
    policy = tiny_tokens.train(tmp_path / "seen", tmp_path / "run", steps=2, validation_fraction=0.5, scene_fraction=0.5)
    main(TokenizeConfig(checkpoint=str(policy), output_dir=str(tmp_path / "again"), scene="checkpoint", **made))

    tokens, acting = TokenStore.open(tmp_path / "again"), Emu3Policy(policy)
    assert tokens.metadata["scene"] == TokenStore.open(tmp_path / "seen").metadata["scene"]
    tokenized, episode = tokens.read_shard(1)[1], store.read_shard(1)[1]
    assert tokenized.scene_FS.shape == (len(episode.frame_step), 2)
    for frame, step in enumerate(episode.frame_step):
        acting.reset(episode.instruction)
        looked = {"rgb_static": episode.rgb_static[frame], "rgb_gripper": episode.rgb_gripper[frame], "robot_obs": episode.robot_obs[step]}
        acting.infer(looked)
        np.testing.assert_array_equal(tokenized.scene_FS[frame], acting._alone.scene)
    with pytest.raises(ValueError, match="scene=checkpoint, but checkpoint=.* says nothing of what it sees"):
        TokenizeConfig(checkpoint=str(tiny_checkpoint), scene="checkpoint", **made)
    with pytest.raises(ValueError, match="says nothing of what it sees before it acts"):
        seeing.Seer(load(tiny_checkpoint))


def test_an_entry_that_no_arm_has():
    with pytest.raises(ValueError, match="has no 'elbow'"):
        TokenizeConfig(episodes="a", vision_tokenizer="b", state=("elbow",))


def test_a_checkpoint_brings_its_tokenizers(tmp_path):
    config = TokenizeConfig(episodes="x", checkpoint="calvin-d")
    folder = Path(config.vision_tokenizer).parent
    assert (folder / "policy.yaml").is_file() and folder.name == "calvin-d"
    assert [Path(path).name for path in (config.action_tokenizer, config.normalizer, config.text_tokenizer)] == [
        "action_tokenizer",
        "normalizer.json",
        "text_tokenizer",
    ]
    assert dataclasses.replace(config, output_dir="y").vision_tokenizer == config.vision_tokenizer
    with pytest.raises(ValueError, match="text_tokenizer=mine and checkpoint=calvin-d both name one; leave either out"):
        TokenizeConfig(episodes="x", checkpoint="calvin-d", text_tokenizer="mine")
    with pytest.raises(ValueError, match="horizon=8, but the chunks of checkpoint=calvin-d have 10 control steps"):
        TokenizeConfig(episodes="x", checkpoint="calvin-d", horizon=8)
    with pytest.raises(ValueError, match="vision_tokenizer names no folder; give one, or the checkpoint"):
        TokenizeConfig(episodes="x")
    with pytest.raises(FileNotFoundError, match="calvin-e is not a folder"):
        TokenizeConfig(episodes="x", checkpoint="calvin-e")
