"""`emu3-vla collect`: the scripted expert's episodes, with disturbances, into an episode store.

    emu3-vla collect output_dir=outputs/episodes shards=64
    emu3-vla collect output_dir=outputs/relieved shards=64 seed=1 driver=outputs/train/policy      # the policy drives first (DAgger)

Episodes come in chains like the benchmark's: a random symbolic state, five tasks that are possible one after another, the arm left where
the last task ended. So the starts that a policy will meet are the starts that it is shown. In such chains some tasks are over ten times as
frequent as others; with `balanced=true` each next task is drawn from those that are possible, the rarest so far above all.
Every shard depends on (seed, its number) alone.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import policies
from envs.calvin.expert.demonstrate import DemonstrationConfig
from eval.environment import OWN_SIMULATOR, EnvConfig
from eval.sequences import CHAIN_LENGTH
from policies.units import in_units

MIN_BLOCK_DISTANCE_M = 0.10


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Options of `emu3-vla collect`."""

    env: EnvConfig = field(default_factory=EnvConfig)
    """Scene, assets and version; the simulator is our own."""
    shards: int = 64
    """Shards to write."""
    chains_per_shard: int = 16
    """Chains in one shard."""
    chain_length: int = 5
    """Tasks of a chain."""
    balanced: bool = False
    """Draw the tasks so that all become about equally frequent, in place of the benchmark's chains."""
    random_pose_probability: float = 0.5
    """Share of chains whose table blocks lie anywhere on the table; the others lie near the benchmark's spots."""
    arm_noise_rad: float = 0.05
    """Standard deviation of the joints' start around the neutral pose, for half of the chains."""
    tasks: tuple[str, ...] = ()
    """Record these tasks alone (others of a chain are played but not kept); empty for all 34."""
    demonstration: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    driver: str = ""
    """A policy (name or checkpoint folder) that acts at the beginning of `demonstration.driven_probability` of the episodes, until the
    expert relieves it. Empty: nobody."""
    workers: int = 2
    """Simulator processes, one thread each."""
    seed: int = 0
    output_dir: str = ""

    def __post_init__(self):
        if self.driver:
            policies.checkpoint_folder(self.driver)
        for name in ("shards", "chains_per_shard", "chain_length", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.chain_length != CHAIN_LENGTH and not self.balanced:
            raise ValueError(
                f"chain_length={self.chain_length}: the benchmark's chains have {CHAIN_LENGTH} tasks; others need balanced=true"
            )
        if self.env.simulator != OWN_SIMULATOR:
            raise ValueError(
                f"env.simulator={self.env.simulator}: its resets keep traces of earlier chains, so a shard would not depend on its seed "
                f"alone; collect with {OWN_SIMULATOR}"
            )


def main(config: CollectConfig) -> None:
    """Write the missing shards of the store in `output_dir`."""
    from emu3_vla.data.episodes import EpisodeStore
    from envs.calvin.language import training_wordings
    from envs.calvin.simulation import PINNED
    from envs.calvin.tasks import check_task

    wanted = [check_task(task) for task in config.tasks]
    wordings = {task: list(sentences) for task, sentences in training_wordings().items() if not wanted or task in wanted}
    metadata = {
        "scene": config.env.scene,
        "assets": config.env.assets or "own",
        "calvin_env_version": config.env.version or PINNED,
        "seed": config.seed,
        "frame_stride": config.demonstration.frame_stride,
        "acceleration": config.demonstration.acceleration,
        "chains_per_shard": config.chains_per_shard,
        "chain_length": config.chain_length,
        "balanced": config.balanced,
        "wordings": wordings,
    } | ({"driver": config.driver} if config.driver else {})
    store = EpisodeStore.create(Path(config.output_dir), metadata)
    missing = [index for index in range(config.shards) if not store.has_shard(index)]
    columns = (
        TextColumn("collect"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards · {task.fields[episodes]} episodes · {task.fields[failed]} failed attempts"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, context.Pool(min(config.workers, max(1, len(missing))), initializer=_one_thread) as pool:
        bar = progress.add_task("", total=config.shards, completed=config.shards - len(missing), episodes=len(store), failed=0)
        jobs = [(config, index) for index in missing]
        for episodes, failed in pool.imap_unordered(_collect_shard, jobs):
            row = progress.tasks[bar].fields
            progress.update(bar, advance=1, episodes=row["episodes"] + episodes, failed=row["failed"] + failed)
    totals = store.totals()
    print(f"{totals.episodes} episodes, {totals.steps} steps, {totals.frames} frames of each camera: {store.path}")


def _one_thread() -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _collect_shard(job: tuple[CollectConfig, int]) -> tuple[int, int]:
    """Play and write one shard; returns (episodes kept, attempts that failed)."""
    from emu3_vla.data.episodes import EpisodeStore
    from envs.calvin.expert.policy import ExpertPolicy

    config, index = job
    rng = np.random.default_rng([config.seed, index])
    env = config.env.make()
    expert, driver = ExpertPolicy(config.env.scene, config.demonstration.acceleration), _driver(config.driver)
    episodes, failed, played, counts = [], 0, 0, Counter()
    while played < config.chains_per_shard or not episodes:  # a shard holds at least one episode, however rare its tasks are
        kept, finished = _play_chain(env, expert, driver, rng, config, counts)
        episodes += kept
        failed += not finished
        played += 1
    env.close()
    EpisodeStore.open(Path(config.output_dir)).write_shard(index, episodes)
    return len(episodes), failed


@cache
def _driver(name: str):
    """The driving policy of this process, or None."""
    return in_units(policies.load(name)) if name else None


def _play_chain(env, expert, driver, rng: np.random.Generator, config: CollectConfig, counts: Counter) -> tuple[list, bool]:
    """Episodes of one chain, up to the first task that the expert fails; and whether it failed none."""
    from envs.calvin.expert.demonstrate import demonstrate
    from envs.calvin.language import training_wordings

    condition, chain = _draw_balanced_chain(rng, config.chain_length, counts) if config.balanced else draw_chain(rng)
    robot_obs, scene_obs = varied_initial_state(condition, env.scene, rng, config)
    env.reset(options={"robot_obs": robot_obs, "scene_obs": scene_obs})
    expert.begin_chain()
    kept = []
    for task in chain:
        instruction = str(rng.choice(training_wordings()[task]))
        episode = demonstrate(env, expert, task, instruction, rng, config.demonstration, driver)
        if episode is None:
            return kept, False
        if (not config.tasks or task in config.tasks) and episode.imitate.any():
            kept.append(episode)
    return kept, True


def draw_chain(rng: np.random.Generator) -> tuple[dict, tuple[str, ...]]:
    """A random initial condition and five tasks that are possible one after another from it."""
    from envs.calvin.tasks import TASKS
    from eval.sequences import initial_conditions, is_valid_chain

    conditions = list(initial_conditions())
    condition = conditions[rng.integers(len(conditions))]
    while True:
        tasks = tuple(TASKS[i] for i in rng.permutation(len(TASKS))[:5])
        if is_valid_chain(condition, tasks):
            return condition, tasks


def _draw_balanced_chain(rng: np.random.Generator, length: int, counts: Counter) -> tuple[dict, tuple[str, ...]]:
    """A random initial condition and tasks that are possible one after another from it, preferring those that `counts` has few of.

    Adds the tasks to `counts`.
    """
    from envs.calvin.tasks import TASKS
    from eval.sequences import initial_conditions, states_after

    conditions = list(initial_conditions())
    condition = conditions[rng.integers(len(conditions))]
    states, tasks = [condition], []
    for _ in range(length):
        following = {task: after for task in TASKS if (after := states_after(states, task))}
        names = list(following)
        weights = np.array([1.0 / (1 + counts[name]) ** 2 for name in names])
        task = names[rng.choice(len(names), p=weights / weights.sum())]
        states = following[task]
        tasks.append(task)
        counts[task] += 1
    return condition, tuple(tasks)


def varied_initial_state(condition: dict, scene, rng: np.random.Generator, config: CollectConfig) -> tuple[np.ndarray, np.ndarray]:
    """The benchmark's state for `condition`, with blocks and arm varied."""
    from eval.sequences import initial_state

    robot_obs, scene_obs = initial_state(condition, scene.name)
    blocks = scene_obs[6:].reshape(-1, 6)
    on_table = [row for row, name in enumerate(scene.blocks) if condition[f"{name.removeprefix('block_')}_block"] == "table"]
    if rng.random() < config.random_pose_probability:
        _scatter(blocks, on_table, scene.surfaces["table"], rng)
    else:
        blocks[on_table, :2] += rng.uniform(-0.015, 0.015, (len(on_table), 2))
    blocks[:, 5] = rng.uniform(3 / 8 * np.pi, 5 / 8 * np.pi, len(blocks))
    if rng.random() < 0.5:
        robot_obs[7:14] += rng.normal(0, config.arm_noise_rad, 7)
    return robot_obs, scene_obs


def _scatter(blocks: np.ndarray, rows: list[int], surface, rng: np.random.Generator) -> None:
    """Put those blocks anywhere on the surface, apart from each other; writes into `blocks` (B, 6)."""
    low, high = np.array(surface)
    while True:
        blocks[rows, :2] = rng.uniform(low[:2], high[:2], (len(rows), 2))
        gaps = [np.linalg.norm(blocks[a, :2] - blocks[b, :2]) for i, a in enumerate(rows) for b in rows[i + 1 :]]
        if all(gap > MIN_BLOCK_DISTANCE_M for gap in gaps):
            return
