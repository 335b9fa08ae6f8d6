"""Which simulator an evaluation runs in."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import policies
from envs.calvin.scenes import asset_folder, scene_named
from envs.robot import Arm, RobotEnv, SimulatedArmOptions
from policies.base import Policy
from policies.chunking import ChunkedPolicy, ChunkingOptions
from policies.units import in_units

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv
    from envs.calvin_official import OfficialCalvinEnv

OWN_ASSETS_NAME = "own low-polygon"
OWN_SIMULATOR, ORIGINAL, ROBOT = SIMULATORS = ("emu3-vla", "calvin_env", "robot")
SIMULATED_ARM = "simulated"
DEFAULT_RENDERER = "tiny"
RENDERERS = (DEFAULT_RENDERER, "egl")
DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The simulator: checked when it is written down, not when the first worker starts."""

    simulator: str = OWN_SIMULATOR  # emu3-vla; calvin_env: the original, where it is installed; or robot: an arm, see `arm`
    scene: str = "D"  # A, B, C or D
    assets: str = ""  # calvin_env's data/ folder; empty: our own low-polygon scenes (simulator=calvin_env: its installation's data/)
    version: str = ""  # calvin_env commit whose behaviour is followed, 1431a46 (default) or 797142c; simulator=calvin_env: the one required
    renderer: str = DEFAULT_RENDERER  # tiny (on the CPU) or egl (on the GPU)
    arm: str = SIMULATED_ARM  # simulator=robot: simulated, or "my_package.my_module:make_arm" that returns an envs.robot.Arm
    simulated_arm: SimulatedArmOptions = field(default_factory=SimulatedArmOptions)

    def __post_init__(self):
        choose("env.simulator", self.simulator, SIMULATORS)
        choose("env.renderer", self.renderer, RENDERERS)
        if self.arm != SIMULATED_ARM and (self.simulator != ROBOT or not DOTTED.fullmatch(self.arm)):
            raise ValueError(
                f"env.arm={self.arm}: expected {SIMULATED_ARM} or package.module:function, together with env.simulator={ROBOT}"
            )
        scene = scene_named(self.scene)
        if self.simulator == ORIGINAL:
            self._check_original()
        else:
            asset_folder(scene, self.assets or None)

    @property
    def own_assets(self) -> bool:
        """Whether the scenes are our own low-polygon ones."""
        return self.simulator != ORIGINAL and not self.assets

    @property
    def realtime(self) -> bool:
        """Whether time goes on while a policy decides."""
        return self.simulator == ROBOT and (self.arm != SIMULATED_ARM or self.simulated_arm.realtime)

    @property
    def assets_name(self) -> str:
        """What results call the assets."""
        return OWN_ASSETS_NAME if self.own_assets else self.assets or "those of the installed calvin_env"

    def make(self, camera_jitter: float = 0.0) -> CalvinEnv | OfficialCalvinEnv | RobotEnv:
        """A simulator that renders only when asked to. camera_jitter: of its cameras, drawn at each reset; for our own simulator alone."""
        if self.simulator == ROBOT and self.arm != SIMULATED_ARM:
            return RobotEnv(made_arm(self.arm), scene=self.scene)
        with _quiet_import():
            from envs.calvin.env import CalvinEnv

        shared: dict[str, Any] = {"scene": self.scene, "assets": self.assets or None, "observe": "on_demand"}
        if camera_jitter:
            from envs.calvin.randomization import Randomization

            self.check_variants(camera_jitter)
            shared["randomization"] = Randomization(camera_jitter=camera_jitter)
        if self.simulator == ORIGINAL:
            from envs.calvin_official import OfficialCalvinEnv

            return OfficialCalvinEnv(**shared)
        if self.version:
            shared["version"] = self.version
        if self.renderer != DEFAULT_RENDERER:
            shared["renderer"] = self.renderer
        env = CalvinEnv(**shared)
        if self.simulator != ROBOT:
            return env
        from envs.simulated_arm import SimulatedArm

        return RobotEnv(SimulatedArm(self.simulated_arm, env=env), scene=self.scene)

    def check_variants(self, camera_jitter: float) -> None:
        """Raises ValueError for a variant that this simulator does not have."""
        if camera_jitter and (self.simulator == ORIGINAL or self.arm != SIMULATED_ARM):
            raise ValueError(
                f"eval.variant=camera_jitter is not for env.simulator={self.simulator}: its cameras stand where its configuration puts them"
            )

    def _check_original(self) -> None:
        with _quiet_import():
            from envs.calvin_official import installed_version, official_assets

        if self.renderer != DEFAULT_RENDERER:
            raise ValueError(f"env.renderer={self.renderer} is not for env.simulator={ORIGINAL}, which draws with {DEFAULT_RENDERER} here")
        try:
            installed = installed_version()
        except ImportError as error:
            raise ValueError(f"env.simulator={ORIGINAL}: {error}") from error
        if self.version not in ("", installed):
            raise ValueError(
                f"env.version={self.version} is required, but the installed calvin_env is {installed}; install that one, or leave "
                "env.version out to run in the one that is there"
            )
        official_assets(self.assets or None, scene_named(self.scene))


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What the policy is made with instead of its own defaults. A policy that has no such option refuses it, naming those it has."""

    history: int | None = None  # past chunks that are shown to a checkpoint
    temperature: float | None = None  # of the action ids that it draws; 0 takes the likeliest
    device: str | None = None  # cpu, cuda, cuda:1
    dtype: str | None = None  # float32 or bfloat16
    int8_draft: bool | None = None  # speculative decoding: a copy in int8 guesses; the same action ids, on a CPU sooner
    lossy: int | None = None  # rounds after which guesses at action ids count as right: sooner, and other ids

    def given(self) -> dict[str, Any]:
        """Those that are not left to the policy."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_policy(name: str, env: EnvConfig, options: PolicyOptions | None = None, chunking: ChunkingOptions | None = None) -> Policy:
    """The policy called `name`, in the units of every simulator and arm here; a policy with privileged knowledge of the scene is told which
    one it is. chunking: how it acts. Raises ActionUnitsMismatch, and what policies.load raises."""
    policy = in_units(loaded(name, env, options))
    return policy if chunking is None or chunking.plain else ChunkedPolicy(policy, chunking, realtime=env.realtime)


def loaded(name: str, env: EnvConfig, options: PolicyOptions | None = None) -> Policy:
    """The same as it is, in its own units: to be served, since an arm elsewhere may take them."""
    told: dict[str, Any] = {"scene": env.scene} if name == "expert" else {}
    return policies.load(name, **told, **(options.given() if options else {}))


def made_arm(dotted: str) -> Arm:
    """What the function called `dotted` returns. Raises ValueError where there is no such function."""
    module, name = dotted.split(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it needs is not
        raise ValueError(f"env.arm={dotted}: no module {error.name!r} (is its folder on PYTHONPATH?)") from error
    except AttributeError as error:
        if hasattr(sys.modules.get(module), name):
            raise  # it is there, and failed
        raise ValueError(f"env.arm={dotted}: {error}") from error


def choose(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError where `value` is not among `known`."""
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        raise ValueError(f"{option}={value} is not one of {', '.join(known)}" + (f"; did you mean {close[0]!r}?" if close else ""))


@contextmanager
def _quiet_import() -> Iterator[None]:
    """PyBullet prints its build time to standard error, from C, when it is imported, which breaks progress lines."""
    if "pybullet" in sys.modules:
        yield
        return
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
