"""A simulated arm that behaves like a real one: commands arrive late, observations are old and noisy, and it stops when commands cease.

    arm = SimulatedArm(SimulatedArmOptions(realtime=True))

CALVIN's simulator behind the interface of envs.robot.Arm. In real time a thread moves it 30 times a second whatever the program does; in
virtual time it moves when `advance()` is called, as fast and as reproducibly as simulation.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from envs.calvin.env import CalvinEnv
from envs.robot import LATELY, PERIOD_S, ArmOverrun, ArmStopped, Observation, SimulatedArmOptions, at_wall, held_pose
from envs.spec import CAMERAS, GRIPPER_OPEN, MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD, ROBOT_OBS, check_action

UNIT = np.array([MAX_RELATIVE_POSITION_M] * 3 + [MAX_RELATIVE_ROTATION_RAD] * 3)
MOST_QUEUED = 3  # commands that wait at the arm for their period, beyond those still on their way
REACTION_SUBSTEPS = 8  # of physics, 1/240 s each: as far ahead as the arm's controller looks for its walls
_SAME_S = 1e-9  # virtual time is a sum of periods: what is due now may seem due a rounding later


class Period(NamedTuple):
    """One control period. sent: pose (6,) to which the arm is sent; commanded: by a command that came; tool: where it truly is, (6,).

    held: it holds still of its own accord, since no command came or a wall did, and `sent` is where.
    """

    time_s: float
    sent: np.ndarray
    commanded: bool
    tool: np.ndarray
    held: bool


class SimulatedArm:
    """See the module's text. env: a CalvinEnv with observe="on_demand", which this arm owns from now on. seed: of noise and jitter.

    log: every control period since `home`, the arm's own record.
    """

    name = "simulated"

    def __init__(self, options: SimulatedArmOptions | None = None, *, env: CalvinEnv | None = None, seed: int = 0):
        self.options = options or SimulatedArmOptions()
        self.env = CalvinEnv(observe="on_demand") if env is None else env
        self.version, self.renderer, self.simulation = self.env.version, self.env.renderer, self.env.simulation
        self.realtime = self.options.realtime
        self.seed, self._lock, self._closed = seed, threading.RLock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._began = False
        self._walls: tuple[np.ndarray, np.ndarray] | None = None  # low and high corner of where the tool may be [m]

    # -- the interface of envs.robot.Arm

    def home(self, options: dict[str, np.ndarray] | None = None) -> None:
        """Stand in the neutral pose, or in the state that `options` gives."""
        with self._lock:
            self._walls = self.simulation.watch = None
            self.env.reset(seed=self.seed, options=options)
            self._random = np.random.default_rng(self.seed)
            self._inbox: deque[tuple[float, np.ndarray]] = deque()
            self._seen: deque[tuple[float, Observation]] = deque()
            self._pictures: Observation = {}
            self._looks, self._stopped, self._held = False, "", True
            self._gripper, self._ticks, self._began = GRIPPER_OPEN, 0, True
            self._gripper = float(self.env.state()[ROBOT_OBS][-1])
            self.log: list[Period] = []
            self._lately = deque([self._target()], maxlen=LATELY)
            self.periods = self.idle_periods = 0
            self._started_s = time.monotonic()
            self._capture()
        if self.realtime and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="simulated arm", daemon=True)
            self._thread.start()

    def observe(self, images: bool = True) -> Observation:
        """See Arm. Images are rendered from the first time on that they are asked for."""
        with self._lock:
            self._require_home()
            if images and not self._looks:
                self._looks = True
                self._seen.clear()
                self._capture()
            self._forget()
            return dict(self._seen[0][1])

    def command(self, action: np.ndarray) -> None:
        """See Arm."""
        action = check_action(action)
        with self._lock:
            self._require_home()
            if self._stopped:
                raise ArmStopped(f"the arm was stopped{self._stopped}; home() releases it")
            now = self._now()
            behind = max(0, int(now / PERIOD_S) - self._ticks)  # periods that this machine still owes the simulation
            if sum(due <= now for due, _ in self._inbox) >= MOST_QUEUED + behind:
                raise ArmOverrun(f"{MOST_QUEUED} commands wait for their control period already; send one every {PERIOD_S * 1000:.1f} ms")
            self._inbox.append((now + self.options.command_delay_s, action))

    def stop(self) -> None:
        """See Arm."""
        with self._lock:
            if self._began and not self._closed.is_set():
                self._inbox.clear()
                self._stopped = self._stopped or " by its program"
                self._freeze()

    def confine(self, low_m: np.ndarray, high_m: np.ndarray) -> None:
        """See Arm. The tool is looked at in every substep of physics, 240 times a second."""
        with self._lock:
            self._require_home()
            self._walls, self._was = (np.array(low_m, np.float64), np.array(high_m, np.float64)), self._tool()
            self.simulation.watch = self._mind_walls

    def close(self) -> None:
        """See Arm."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.env.close()

    def sent(self) -> tuple[np.ndarray, bool]:
        """See Arm."""
        with self._lock:
            self._require_home()
            pose = self._target() + sum((action[:6] * UNIT for _, action in self._inbox), np.zeros(6))
            return pose, self._held and not self._inbox

    def info(self) -> dict[str, Any]:
        """What the task oracle reads: the truth, not what was measured."""
        with self._lock:
            return self.env.info()

    # -- time

    def advance(self) -> None:
        """One control period of virtual time. Raises ValueError for an arm that keeps to the clock on the wall."""
        if self.realtime:
            raise ValueError("this arm runs in real time; advance() is for virtual time (realtime=False)")
        with self._lock:
            self._require_home()
            self._tick()

    def _now(self) -> float:
        """Seconds since `home`."""
        return time.monotonic() - self._started_s if self.realtime else self._ticks * PERIOD_S

    def _run(self) -> None:
        """Real time: a machine that was busy elsewhere makes up for the periods it missed, as they would have gone."""
        while not self._closed.is_set():
            with self._lock:
                left_s = (self._ticks + 1) * PERIOD_S - self._now()
                if left_s <= 0:
                    self._tick()
            if left_s > 0:
                self._closed.wait(left_s)

    def _tick(self) -> None:
        """One control period: carry out the command that is due, or, without one, stand still: this is the arm's watchdog."""
        now = (self._ticks + 1) * PERIOD_S if self.realtime else self._now()
        arrived = bool(self._inbox) and self._inbox[0][0] <= now + _SAME_S
        if arrived:
            action = self._inbox.popleft()[1]
            self._gripper, self._held = float(action[-1]), False
        else:
            action = np.r_[np.zeros(6), self._gripper]
            if not self._held and not self._inbox:
                self._freeze()
        stopped = self._stopped
        self.env.step(action)
        if self._stopped and not stopped:  # in this period, at a wall
            self._inbox.clear()
            self._stay(self.env.state()[ROBOT_OBS][:6])  # and not where held_pose would have it: that it did not reach
        self._ticks += 1
        self.periods += 1
        self.idle_periods += not arrived
        self._lately.append(self._target())
        self.log.append(Period(now, self._target(), arrived, self.env.state()[ROBOT_OBS][:6], self._held))
        if not self.realtime or self._now() - now < PERIOD_S:  # no pictures of moments that are over
            self._capture(images=self._ticks % self.options.images_every == 0)

    def _mind_walls(self) -> None:
        """Protective stop: the joints are held as soon as the tool is about to pass a wall, wherever it was sent."""
        tool = self._tool()
        coming, self._was = tool + (tool - self._was) * REACTION_SUBSTEPS, tool
        if not self._stopped and (reason := at_wall(coming, self._walls)):
            self.simulation.hold()
            self._stopped = reason

    def _freeze(self) -> None:
        """Send the arm to where it is."""
        self._stay(held_pose(self.env.state()[ROBOT_OBS][:6], self._lately))

    def _stay(self, pose: np.ndarray) -> None:
        """Stand still at a pose (6,)."""
        self.simulation.target_position, self.simulation.target_euler = pose[:3].copy(), pose[3:].copy()
        self._held = True

    def _tool(self) -> np.ndarray:
        return np.array(self.simulation.tool_pose()[0])

    # -- what is seen

    def _capture(self, images: bool = True) -> None:
        """Look now; the observation arrives later. Between two pictures the last one is still there."""
        seen = self.env.observe() if self._looks and images else {**self._pictures, **self.env.state()}
        self._pictures = {key: array for key, array in seen.items() if key in CAMERAS}
        delay_s = self.options.observation_delay_s + self._random.uniform(0, self.options.observation_jitter_s)
        arrives = self._now() + delay_s
        if self._seen:  # observations do not overtake each other
            arrives = max(arrives, self._seen[-1][0])
        self._seen.append((arrives, seen | {ROBOT_OBS: self._measured(seen[ROBOT_OBS])}))
        self._forget()

    def _forget(self) -> None:
        """Keep the newest observation that has arrived, and those on their way."""
        while len(self._seen) > 1 and self._seen[1][0] <= self._now() + _SAME_S:
            self._seen.popleft()

    def _measured(self, robot_obs: np.ndarray) -> np.ndarray:
        measured = robot_obs + self._random.normal(0, 1, 15) * self._noise()
        measured[6] = max(0.0, measured[6])
        return measured

    def _noise(self) -> np.ndarray:
        """Standard deviation of each entry of robot_obs; the last is a command, which is known."""
        meters, radians = self.options.position_noise_m, self.options.angle_noise_rad
        return np.r_[[meters] * 3, [radians] * 3, meters, [radians] * 7, 0]

    def _target(self) -> np.ndarray:
        return np.r_[self.simulation.target_position, self.simulation.target_euler]

    def _require_home(self) -> None:
        if not self._began:
            raise ArmStopped("the arm has not been homed yet; call home() first")


