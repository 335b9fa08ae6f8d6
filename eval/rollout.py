"""`emu3-vla rollout`: one chain, filmed.

    emu3-vla rollout policy=expert chain=17
    emu3-vla rollout policy=outputs/train/3f2a91c0/policy 'tasks=[open_drawer,turn_on_led]'

Leaves recording.rrd (open it with `rerun recording.rrd`), rollout.mp4, results.json and report.html.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import policies
from envs.calvin.tasks import TASKS, check_task
from eval.chain import run_chain
from eval.environment import OWN_SIMULATOR, EnvConfig, load_policy
from eval.progress import LiveLine
from eval.protocol import MAX_STEPS, load_instructions, used_protocol
from eval.provenance import policy_provenance
from eval.results import REPORT_FILE, RESULTS_FILE, assemble, error_message, headline, named_by, write_json
from eval.sequences import OFFICIAL_CHAINS, Chain, is_possible, long_horizon_sequences

RECORDING_FILE, VIDEO_FILE = "recording.rrd", "rollout.mp4"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Options of `emu3-vla rollout`."""

    policy: str = policies.SHIPPED  # expert, zero, random, a shipped name, or a checkpoint folder
    env: EnvConfig = field(default_factory=EnvConfig)
    chain: int = 0  # which of the 1000 official chains
    tasks: tuple[str, ...] = ()  # these instead, from the first official chain's start in which they are possible one after another
    max_steps: int = MAX_STEPS  # control steps a subtask
    annotations: str = ""  # CALVIN's new_playtable_validation.yaml; empty: our own validation sentences
    frame_stride: int = 2  # control steps from one recorded image to the next
    seed: int = 0  # of what the policy draws at random
    output_dir: str = ""

    def __post_init__(self):
        if not 0 <= self.chain < OFFICIAL_CHAINS:
            raise ValueError(f"chain={self.chain}, expected 0 to {OFFICIAL_CHAINS - 1}")
        if self.max_steps < 1 or self.frame_stride < 1 or self.seed < 0:
            raise ValueError("max_steps and frame_stride must be at least 1, and seed at least 0")
        policy_provenance(self.policy)  # names an unknown policy or a damaged checkpoint now, not after hours
        load_instructions(self.annotations)
        if self.tasks:
            chain_of(self.tasks)


def main(config: RolloutConfig) -> None:
    """Run and film the chain. Exits with 1 where it ended by an error."""
    if config.tasks:
        chosen, said = chain_of(config.tasks), f"the chain {' → '.join(config.tasks)}"
    else:
        chosen, said = (config.chain, long_horizon_sequences(config.chain + 1)[-1]), f"chain {config.chain} alone"
    film(
        Path(config.output_dir),
        [chosen],
        chains_said=said,
        policy=config.policy,
        env_config=config.env,
        annotations=config.annotations,
        max_steps=config.max_steps,
        frame_stride=config.frame_stride,
        seed=config.seed,
        config=asdict(config),
    )


def chain_of(tasks: Sequence[str]) -> tuple[int, Chain]:
    """A chain of these tasks: (index of the official chain whose start it has, chain).

    Raises ValueError for an unknown task, or where no official start allows them one after another.
    """
    for task in tasks:
        check_task(task)
    for index, (condition, _) in enumerate(long_horizon_sequences()):
        if is_possible(condition, tasks):
            return index, (condition, tuple(tasks))
    raise ValueError(
        f"tasks={list(tasks)}: no chain's initial state allows these one after another (is the drawer opened before it is closed?)"
    )


def film(
    folder: Path,
    chains: Sequence[tuple[int, Chain]],
    *,
    chains_said: str,
    policy: str,
    env_config: EnvConfig,
    annotations: str,
    max_steps: int,
    frame_stride: int,
    seed: int,
    config: dict[str, Any],
) -> dict[str, Any] | None:
    """Run `chains` in this process, recording everything; write the four files, print where they are, and return the results.

    A folder that holds results already is left as it is (None is returned). Exits with 1 where a chain ended by an error.
    Raises ValueError for the original simulator.
    """
    if env_config.simulator != OWN_SIMULATOR:
        raise ValueError(
            f"simulator={env_config.simulator} cannot be filmed: its bodies are not open to recordings; 'emu3-vla eval' scores in it"
        )
    if (folder / RESULTS_FILE).is_file():
        print(f"finished already; delete {folder} or choose another output_dir= to run it again")
        say_where(folder)
        return None
    from eval.recording import Recorder
    from eval.report import write_report
    from eval.video import VideoWriter
    from eval.watching import Camera, LiveSubtask, Watchers

    began = time.perf_counter()
    env, actor, instructions = env_config.make(), load_policy(policy, env_config), load_instructions(annotations)
    camera, shared = Camera(), {"title": f"policy {policy}", "frame_stride": frame_stride}
    recorder = Recorder(folder / RECORDING_FILE, camera=camera, **shared)
    video = VideoWriter(folder / VIDEO_FILE, camera=camera, **shared)
    with LiveLine() as line:
        watcher = Watchers(LiveSubtask(line, chains=len(chains), max_steps=max_steps), recorder, video)
        outcomes = [
            run_chain(env, actor, index, chain, instructions, max_steps=max_steps, seed=seed, watcher=watcher).to_json()
            for index, chain in chains
        ]
    env.close()
    recorder.close()
    video.close()
    used = used_protocol(
        chains=chains_said,
        max_steps=max_steps,
        tasks=len(TASKS),
        scene=env_config.scene,
        own_assets=env_config.own_assets,
        version=named_by(outcomes, "calvin_env"),
        own_sentences=not annotations,
    )
    results = assemble(
        outcomes,
        policy=policy,
        env=env_config,
        used=used,
        seed=seed,
        config=config,
        wall_s=time.perf_counter() - began,
        length=max(len(subtasks) for _, (_, subtasks) in chains),
    )
    write_report(results, folder / REPORT_FILE, video=folder / VIDEO_FILE, thumbnails=video.thumbnails)
    write_json(folder / RESULTS_FILE, results)  # last: it says that the run is finished
    print(headline(results))
    say_where(folder)
    if results["errors"]:
        raise SystemExit(error_message(results))
    return results


def say_where(folder: Path) -> None:
    """Print the four files and how to open them."""
    # Without the environment activated (as under make) the viewer is not on the path, but beside the interpreter.
    viewer = "rerun" if shutil.which("rerun") else os.path.relpath(Path(sys.executable).with_name("rerun"))
    for name, how in (
        (RECORDING_FILE, f"{viewer} {{path}}"),
        (VIDEO_FILE, "any video player"),
        (RESULTS_FILE, "the numbers"),
        (REPORT_FILE, "any browser, offline"),
    ):
        path = folder / name
        print(f"{path}   ({how.format(path=path)})")
