"""`emu3-vla demo`: the shipped policy drives the simulated arm through a few chains, and everything is recorded.

emu3-vla demo
emu3-vla demo policy=expert 'chains=[0,1]'
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import policies
from eval.environment import EnvConfig
from eval.protocol import MAX_STEPS
from eval.provenance import policy_provenance
from eval.rollout import film
from eval.sequences import OFFICIAL_CHAINS, long_horizon_sequences


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Options of `emu3-vla demo`."""

    policy: str = policies.SHIPPED  # expert, zero, random, a shipped name, or a checkpoint folder
    env: EnvConfig = field(default_factory=EnvConfig)
    chains: tuple[int, ...] = (2, 3, 4)  # which of the 1000 official chains, each of five subtasks
    max_steps: int = MAX_STEPS  # control steps a subtask
    frame_stride: int = 2  # control steps from one recorded image to the next
    seed: int = 0  # of what the policy draws at random
    output_dir: str = ""

    def __post_init__(self):
        if not self.chains or not all(0 <= chain < OFFICIAL_CHAINS for chain in self.chains):
            raise ValueError(f"chains={list(self.chains)}, expected one or more numbers from 0 to {OFFICIAL_CHAINS - 1}")
        if len(set(self.chains)) < len(self.chains):
            raise ValueError(f"chains={list(self.chains)} names a chain twice")
        if self.max_steps < 1 or self.frame_stride < 1 or self.seed < 0:
            raise ValueError("max_steps and frame_stride must be at least 1, and seed at least 0")
        policy_provenance(self.policy)  # names an unknown policy or a damaged checkpoint now, not after hours


def main(config: DemoConfig) -> None:
    """Run the chains and say where the recording, the video, the numbers and the report are."""
    official = long_horizon_sequences()
    chains = [(index, official[index]) for index in config.chains]
    print(f"policy {config.policy} · scene {config.env.scene} · chains of five subtasks, each ended by its first failure")
    results = film(
        Path(config.output_dir),
        chains,
        chains_said=f"{'chains' if len(chains) > 1 else 'chain'} {', '.join(map(str, config.chains))} alone",
        policy=config.policy,
        env_config=config.env,
        annotations="",
        max_steps=config.max_steps,
        frame_stride=config.frame_stride,
        seed=config.seed,
        config=asdict(config),
    )
    if results:
        tried = sum(len(chain["attempts"]) for chain in results["chains"])
        print(f"{sum(chain['num_solved'] for chain in results['chains'])} of {tried} subtasks solved by the task oracle")
