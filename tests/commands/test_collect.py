"""Collecting is resumable: a run that was killed and run again leaves what an uninterrupted one does."""

import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from emu3_vla import cli
from emu3_vla.commands import collect
from emu3_vla.commands.collect import CollectConfig
from emu3_vla.data.episodes import EpisodeStore
from envs.calvin.tasks import TASKS
from eval.environment import EnvConfig
from eval.sequences import is_possible

OPTIONS = ("preset=debug", "shards=3", "workers=1", "demonstration.frame_stride=20")


def _contents(folder) -> list:
    store = EpisodeStore.open(folder)
    return [
        (episode.task, episode.instruction, episode.actions.tobytes(), episode.scene_obs.tobytes(), episode.rgb_static.tobytes())
        for index in store.shard_indices()
        for episode in store.read_shard(index)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect") / "whole"
    assert cli.main(["collect", *OPTIONS, f"output_dir={folder}"]) == 0
    return folder


def test_killed_and_run_again_equals_one_run(whole, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "emu3_vla.cli", "collect", *OPTIONS, f"output_dir={folder}"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "shards/00000.zarr").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(["pkill", "-KILL", "-g", str(process.pid)], check=False)
    assert len(EpisodeStore.open(folder).shard_indices()) < 3
    assert cli.main(["collect", *OPTIONS, f"output_dir={folder}"]) == 0
    assert _contents(folder) == _contents(whole)


def test_store_says_what_it_holds(whole):
    store = EpisodeStore.open(whole)
    totals = store.totals()
    assert totals.shards == 3 and totals.episodes >= 3
    episode = store.read_shard(0)[0]
    assert episode.instruction in store.metadata["wordings"][episode.task]
    assert np.all(np.diff(episode.frame_step) <= 20)


@pytest.mark.parametrize("scene", ["A", "B", "C"])
def test_other_scenes_are_collected(scene, tmp_path):
    options = ("preset=debug", "shards=1", "workers=1", "demonstration.frame_stride=20", f"env.scene={scene}")
    assert cli.main(["collect", *options, f"output_dir={tmp_path}"]) == 0
    store = EpisodeStore.open(tmp_path)
    assert (store.metadata["scene"], store.metadata["assets"], store.metadata["calvin_env_version"]) == (scene, "own", "1431a46")
    assert store.totals().episodes >= 1


def test_balanced_chains_are_possible_and_even():
    random, counts = np.random.default_rng(0), Counter()
    for _ in range(60):
        condition, tasks = collect._draw_balanced_chain(random, 8, counts)
        assert len(tasks) == 8 and is_possible(condition, tasks)
    assert set(counts) == set(TASKS) and sum(counts.values()) == 480
    even = 480 / len(TASKS)
    rare = ("lift_red_block_drawer", "lift_blue_block_drawer", "lift_pink_block_drawer", "push_into_drawer", "unstack_block")
    assert max(counts.values()) < 2.5 * even  # what is held must be put somewhere
    assert all(counts[task] > even / 2 for task in TASKS if task not in rare) and all(counts[task] >= 3 for task in rare), counts
    with pytest.raises(ValueError, match="chain_length=8: the benchmark's chains have 5 tasks"):
        CollectConfig(chain_length=8)


def test_a_balanced_store(tmp_path):
    options = ("preset=debug", "shards=1", "workers=1", "demonstration.frame_stride=20", "balanced=true", "chain_length=3")
    assert cli.main(["collect", *options, f"output_dir={tmp_path}"]) == 0
    assert 1 <= EpisodeStore.open(tmp_path).totals().episodes <= 3


def test_a_policy_may_drive_first(tmp_path):
    options = ("preset=debug", "shards=1", "workers=1", "driver=random", "demonstration.driven_probability=1")
    assert cli.main(["collect", *options, "demonstration.driven_steps=[15,20]", f"output_dir={tmp_path}"]) == 0
    store = EpisodeStore.open(tmp_path)
    assert store.metadata["driver"] == "random"
    for episode in store.read_shard(0):
        assert not episode.imitate[:15].any() and episode.imitate[20:].all() and episode.imitate.any()
    with pytest.raises(ValueError, match="policy 'randm' is no known name"):
        CollectConfig(driver="randm")


def test_the_original_simulator_is_refused():
    with pytest.raises(ValueError, match="collect with emu3-vla"):
        CollectConfig(env=_original())


def _original():
    """As an EnvConfig that names the original simulator, which need not be installed for this."""
    config = EnvConfig()
    object.__setattr__(config, "simulator", "calvin_env")
    return config
