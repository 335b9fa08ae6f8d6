"""`emu3-vla rollout`: one chain, filmed.

    emu3-vla rollout policy=expert chain=17
    emu3-vla rollout policy=outputs/train/3f2a91c0/policy 'tasks=[open_drawer,turn_on_led]'
    emu3-vla rollout --live                                     (and watch it in a Rerun viewer meanwhile; see eval/live.py)

Leaves recording.rrd (open it with `rerun recording.rrd`), rollout.mp4, results.json and report.html.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import policies
from envs.calvin.tasks import TASKS, check_task
from eval.chain import run_chain
from eval.environment import EnvConfig, PolicyOptions, load_policy
from eval.live import check_address, viewer_address, viewer_program
from eval.progress import LiveLine
from eval.protocol import MAX_STEPS, load_instructions, used_protocol
from eval.provenance import policy_provenance
from eval.results import REPORT_FILE, RESULTS_FILE, assemble, error_message, headline, named_by, write_json
from eval.sequences import OFFICIAL_CHAINS, Chain, is_possible, long_horizon_sequences
from policies.chunking import ChunkingOptions
from policies.safety import SafetyOptions

RECORDING_FILE, VIDEO_FILE = "recording.rrd", "rollout.mp4"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Options of `emu3-vla rollout`."""

    policy: str = policies.SHIPPED  # expert, zero, random, a shipped name, or a checkpoint folder
    policy_options: PolicyOptions = field(default_factory=PolicyOptions)
    env: EnvConfig = field(default_factory=EnvConfig)
    safety: SafetyOptions = field(default_factory=SafetyOptions)
    chunking: ChunkingOptions = field(default_factory=ChunkingOptions)
    chain: int = 0  # which of the 1000 official chains
    tasks: tuple[str, ...] = ()  # these instead, from the first official chain's start in which they are possible one after another
    max_steps: int = MAX_STEPS  # control steps a subtask
    annotations: str = ""  # CALVIN's new_playtable_validation.yaml; empty: our own validation sentences
    frame_stride: int = 2  # control steps from one recorded image to the next
    seed: int = 0  # of what the policy draws at random
    live: bool | str = False  # stream to a Rerun viewer as well: true for this machine's, or the address of another
    output_dir: str = ""

    def __post_init__(self):
        check_address(self.live)
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
        live=config.live,
        safety=config.safety,
        chunking=config.chunking,
        policy_options=config.policy_options,
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
    live: bool | str = False,
    safety: SafetyOptions | None = None,
    chunking: ChunkingOptions | None = None,
    policy_options: PolicyOptions | None = None,
) -> dict[str, Any] | None:
    """Run `chains` in this process, recording everything; write the four files, print where they are, and return the results.

    A folder that holds results already is left as it is (None is returned). Exits with 1 where a chain ended by an error; where one broke
    before its first image there is no video. live: see RolloutConfig. Raises ViewerUnavailable where there is no viewer to stream to.
    """
    if (folder / RESULTS_FILE).is_file():
        print(f"finished already; delete {folder} or choose another output_dir= to run it again")
        say_where(folder)
        return None
    from eval.recording import Recorder
    from eval.report import write_report
    from eval.video import VideoWriter
    from eval.watching import Camera, LiveSubtask, Watchers

    began, safety, chunking = time.perf_counter(), safety or SafetyOptions(), chunking or ChunkingOptions()
    viewer = viewer_address(live) if live else ""
    actor = load_policy(policy, env_config, policy_options, chunking)
    env, instructions = env_config.make(), load_instructions(annotations)
    camera, shared = Camera(), {"title": f"policy {policy}", "frame_stride": frame_stride}
    recorder = Recorder(folder / RECORDING_FILE, camera=camera, viewer=viewer, **shared)
    video = VideoWriter(folder / VIDEO_FILE, camera=camera, **shared)
    with closing(env), closing(recorder), closing(video), LiveLine() as line:
        watcher = Watchers(LiveSubtask(line, chains=len(chains), max_steps=max_steps), recorder, video)
        outcomes = [
            run_chain(env, actor, index, chain, instructions, max_steps=max_steps, seed=seed, watcher=watcher, safety=safety).to_json()
            for index, chain in chains
        ]
    used = used_protocol(
        chains=chains_said,
        max_steps=max_steps,
        tasks=len(TASKS),
        scene=env_config.scene,
        own_assets=env_config.own_assets,
        version=named_by(outcomes, "calvin_env"),
        own_sentences=not annotations,
        variants=safety.described() | chunking.described(),
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
    write_report(results, folder / REPORT_FILE, video=folder / VIDEO_FILE if video.frames else None, thumbnails=video.thumbnails)
    write_json(folder / RESULTS_FILE, results)  # last: it says that the run is finished
    print(headline(results))
    say_where(folder)
    if results["errors"]:
        raise SystemExit(error_message(results))
    return results


def say_where(folder: Path) -> None:
    """Print the files that there are and how to open them."""
    program = viewer_program()
    viewer = "rerun" if program is None or program == shutil.which("rerun") else os.path.relpath(program)
    for name, how in (
        (RECORDING_FILE, f"{viewer} {{path}}"),
        (VIDEO_FILE, "any video player"),
        (RESULTS_FILE, "the numbers"),
        (REPORT_FILE, "any browser, offline"),
    ):
        path = folder / name
        if path.is_file():
            print(f"{path}   ({how.format(path=path)})")
