"""The physics of one CALVIN scene: PyBullet calls in calvin_env's order, so that states agree to the last bit.

Contact amplifies a difference of 1e-9 rad to millimetres within 120 steps, so the order of loading, of motor commands and of resets
is part of the contract here; do not rearrange it for looks.

Source: calvin_env 797142c and 1431a46, `robot/robot.py`, `robot/mixed_ik.py`, `scene/play_table_scene.py`, `scene/objects/*.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pybullet as pb

from envs.calvin import scenes
from envs.calvin.images.cameras import Cameras
from envs.calvin.loading.collision_urdf import collision_urdf
from envs.calvin.loading.robot_urdf import robot_urdf
from envs.calvin.randomization import Look
from envs.calvin.scenes import Scene
from envs.spec import MAX_RELATIVE_POSITION_M, MAX_RELATIVE_ROTATION_RAD, PHYSICS_HZ

ARM_JOINTS = range(7)
FINGER_JOINTS = (9, 11)
TCP_LINK = 15
FINGER_OPEN_M = 0.04
ARM_FORCE_N, ARM_VELOCITY = 200.0, 2
GRIPPER_CLOSE_FORCE_N, GRIPPER_OPEN_FORCE_N, GRIPPER_VELOCITY = 200, 2.0, 1
FIXTURE_FORCE_N = 4
JOINT_LOW_RAD = np.array((-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973))
JOINT_HIGH_RAD = np.array((2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973))
NULL_SPACE_DOF = 9
REST_POSE = [*scenes.NEUTRAL_JOINTS_RAD, FINGER_OPEN_M, FINGER_OPEN_M]
PINNED, HEAD = "1431a46", "797142c"
LOADING_SEED = 0


class Simulation:
    """One PyBullet world holding one scene.

    After construction and after `fresh()` it is in the state of a newly started process, whatever was simulated before.
    renderer: one of `cameras.RENDERERS`. watch: called after every substep of physics, where an arm's own controller looks at itself.
    """

    watch: Callable[[], None] | None = None

    def __init__(self, scene: Scene, folder: Path, version: str, renderer: str = "tiny"):
        self.scene, self.folder, self.version = scene, folder, version
        self.own_assets = folder == scenes.OWN_ASSETS
        self.cameras = Cameras(self, renderer)
        self.client = pb.connect(pb.DIRECT)
        if self.client < 0:
            raise RuntimeError("PyBullet gave no physics client; too many simulators in one process?")
        self._load()

    def close(self) -> None:
        """Release the physics client and the cameras. Harmless when done twice."""
        self.cameras.close()
        if self.client >= 0 and pb.isConnected(self.client):
            pb.disconnect(self.client)
        self.client = -1

    # -- loading, in calvin_env's order

    def _load(self) -> None:
        # Blocks are born at random poses; where leaves a trace in the contact order, so it is calvin_env's own seed, always.
        rng = np.random.default_rng(LOADING_SEED)
        client = {"physicsClientId": self.client}
        pb.setTimeStep(1.0 / PHYSICS_HZ, **client)
        pb.resetSimulation(**client)  # calvin_env's other engine parameters do not outlive the reset that follows them, so they are not set
        pb.setGravity(0, 0, -9.8, **client)
        self._load_robot()
        self.blocks = {}
        for name, urdf in self.scene.blocks.items():
            position, orientation = self.sample_block_pose(rng)
            self.blocks[name] = self._urdf(urdf, position, orientation, scenes.GLOBAL_SCALING)
        self._load_table()
        self.plane = self._urdf(scenes.PLANE_URDF)
        self.body_names = {self.robot: "robot", self.pedestal: "pedestal", self.table: "table", self.plane: "plane"} | {
            uid: name for name, uid in self.blocks.items()
        }
        self.cameras.reset()
        self.gripper_command = 1
        self.button_on = self.button_was_pressed = self.switch_on = False
        self.lights = dict.fromkeys(scenes.LIGHT_LINKS, 0)
        self.used = False

    def _urdf(self, name: str, position=(0, 0, 0), orientation=(0, 0, 0, 1), scaling: float = 1.0, fixed: bool = False) -> int:
        path = collision_urdf(robot_urdf(self.folder, name), scaling)  # what is only seen is on the cameras' stage
        return pb.loadURDF(path, position, orientation, globalScaling=scaling, useFixedBase=fixed, physicsClientId=self.client)

    def _load_robot(self) -> None:
        self.robot = self._urdf(scenes.ROBOT_URDF, scenes.ROBOT_BASE_POSITION, fixed=True)
        self.pedestal = pb.createMultiBody(physicsClientId=self.client)  # to be seen only, but it has a number
        gear = pb.createConstraint(
            self.robot,
            FINGER_JOINTS[0],
            self.robot,
            FINGER_JOINTS[1],
            jointType=pb.JOINT_GEAR,
            jointAxis=[1, 0, 0],
            parentFramePosition=[0, 0, 0],
            childFramePosition=[0, 0, 0],
            physicsClientId=self.client,
        )
        pb.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50, physicsClientId=self.client)
        self.reset_robot(np.array(scenes.NEUTRAL_JOINTS_RAD), 2 * FINGER_OPEN_M)

    def _load_table(self) -> None:
        self.table = self._urdf(self.scene.table_urdf, scaling=scenes.GLOBAL_SCALING)
        joints = range(pb.getNumJoints(self.table, physicsClientId=self.client))
        infos = [pb.getJointInfo(self.table, joint, physicsClientId=self.client) for joint in joints]
        self.table_joints = {info[1].decode(): info[0] for info in infos}
        self.table_links = {info[12].decode(): info[0] for info in infos} | {"base_link": -1}
        self.joint_limits = {info[1].decode(): (info[8], info[9]) for info in infos}
        for joint in (scenes.SLIDE, scenes.DRAWER):
            self._motor(joint, pb.VELOCITY_CONTROL)
        self._motor(scenes.BUTTON, pb.POSITION_CONTROL, targetPosition=0)
        self._motor(scenes.SWITCH, pb.VELOCITY_CONTROL)

    def _motor(self, joint: str, mode: int, **target) -> None:
        pb.setJointMotorControl2(
            self.table, self.table_joints[joint], controlMode=mode, force=FIXTURE_FORCE_N, physicsClientId=self.client, **target
        )

    # -- resets

    def fresh(self) -> None:
        """Back to the state of a new process.

        Loads everything again: PyBullet's own saved states leave the contact caches of what was simulated before (blocks end up
        0.1 mm apart, and a jam amplifies that to centimetres).
        """
        if self.used:
            self._load()
        self.used = True

    def reset_scene(self, scene_obs: np.ndarray) -> None:
        """Fixtures, lights and blocks from scene_obs (24,), as recorded."""
        for joint, value in zip((scenes.SLIDE, scenes.DRAWER), scene_obs[:2], strict=True):
            self._set_fixture(joint, value)
        if self.version == HEAD:
            self._reset_lights(scene_obs)
        self._set_fixture(scenes.BUTTON, scene_obs[2])
        self.button_on = self.version == HEAD and bool(self.lights[scenes.LED])
        self._set_fixture(scenes.SWITCH, scene_obs[3])
        self.switch_on = False
        if self.version == PINNED:
            self._reset_lights(scene_obs)
        for uid, pose in zip(self.blocks.values(), scene_obs[6:].reshape(-1, 6), strict=True):
            self._place(uid, pose[:3], pb.getQuaternionFromEuler(pose[3:]))

    def _reset_lights(self, scene_obs: np.ndarray) -> None:
        for light, state in zip((scenes.LIGHTBULB, scenes.LED), scene_obs[4:6], strict=True):
            self._set_light(light, int(state))

    def reset_scene_randomly(self, rng: np.random.Generator, attempts: int = 1000) -> None:
        """Fixtures to zero, lights off, blocks drawn until no two touch. Raises RuntimeError when `attempts` were not enough."""
        self.reset_scene(np.zeros(6 + 6 * len(self.blocks)))
        for _ in range(attempts):
            for uid in self.blocks.values():
                self._place(uid, *self.sample_block_pose(rng))
            pb.stepSimulation(physicsClientId=self.client)
            uids = list(self.blocks.values())
            pairs = [(a, b) for i, a in enumerate(uids) for b in uids[i + 1 :]]
            if not any(pb.getContactPoints(bodyA=a, bodyB=b, physicsClientId=self.client) for a, b in pairs):
                return
        raise RuntimeError(f"could not place the blocks of scene {self.scene.name} without contact in {attempts} attempts")

    def sample_block_pose(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A position [m] on a random surface and a quaternion with random yaw."""
        surface = rng.choice(list(self.scene.surfaces))
        low, high = self.scene.surfaces[surface]
        position = rng.uniform(low, high)
        return position, np.array(pb.getQuaternionFromEuler(rng.uniform([0, 0, -np.pi], [0, 0, np.pi])))

    def reset_robot(self, joints_rad: np.ndarray, gripper_width_m: float) -> None:
        """Joints and finger width at rest there; the tool pose that results becomes the target of relative actions."""
        for joint, value in zip(ARM_JOINTS, joints_rad, strict=True):
            pb.resetJointState(self.robot, joint, value, physicsClientId=self.client)
            self._arm_motor(joint, value)
        for joint in FINGER_JOINTS:
            pb.resetJointState(self.robot, joint, gripper_width_m / 2, physicsClientId=self.client)
            self._finger_motor(joint, gripper_width_m / 2, GRIPPER_CLOSE_FORCE_N)
        position, euler = self.tool_pose()
        self.target_position, self.target_euler = np.array(position), np.array(euler)

    def _set_fixture(self, joint: str, value: float) -> None:
        pb.resetJointState(self.table, self.table_joints[joint], value, physicsClientId=self.client)

    def _place(self, uid: int, position, orientation) -> None:
        pb.resetBasePositionAndOrientation(uid, position, orientation, physicsClientId=self.client)

    # -- control

    def relative_target(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance the persistent target by a relative action (unit 0.02 m, 0.05 rad); return position [m] and Euler angles [rad]."""
        self.target_position += action[:3] * MAX_RELATIVE_POSITION_M
        self.target_euler += action[3:6] * MAX_RELATIVE_ROTATION_RAD
        return self.target_position, self.target_euler

    def inverse_kinematics(self, position_m: np.ndarray, euler_rad: np.ndarray) -> np.ndarray:
        """Seven joint angles [rad] for a tool pose in the world frame, from the present joints, clipped to the arm's limits."""
        solution = pb.calculateInverseKinematics(
            self.robot,
            TCP_LINK,
            position_m,
            pb.getQuaternionFromEuler(euler_rad),
            [-7] * NULL_SPACE_DOF,
            [7] * NULL_SPACE_DOF,
            [7] * NULL_SPACE_DOF,
            REST_POSE,
            physicsClientId=self.client,
        )
        return np.clip(solution[:7], JOINT_LOW_RAD, JOINT_HIGH_RAD)

    def command(self, joints_rad: np.ndarray, gripper: int) -> None:
        """Set the motors' targets: seven joint angles, and the gripper (+1 opens softly, -1 closes firmly)."""
        self.gripper_command = gripper
        for joint, value in zip(ARM_JOINTS, joints_rad, strict=True):
            self._arm_motor(joint, value)
        goal, force = (FINGER_OPEN_M, GRIPPER_OPEN_FORCE_N) if gripper == 1 else (0.0, GRIPPER_CLOSE_FORCE_N)
        for joint in FINGER_JOINTS:
            self._finger_motor(joint, goal, force)

    def hold(self) -> None:
        """Let the arm's motors keep the joints where they are, whatever they were commanded."""
        for joint, (angle_rad, *_) in zip(ARM_JOINTS, pb.getJointStates(self.robot, ARM_JOINTS, physicsClientId=self.client), strict=True):
            self._arm_motor(joint, angle_rad)

    def _arm_motor(self, joint: int, target_rad: float) -> None:
        self._drive(joint, target_rad, ARM_FORCE_N, ARM_VELOCITY)

    def _finger_motor(self, joint: int, target_m: float, force: float) -> None:
        self._drive(joint, target_m, force, GRIPPER_VELOCITY)

    def _drive(self, joint: int, target: float, force: float, velocity: float) -> None:
        pb.setJointMotorControl2(
            bodyIndex=self.robot,
            jointIndex=joint,
            controlMode=pb.POSITION_CONTROL,
            force=force,
            targetPosition=target,
            maxVelocity=velocity,
            physicsClientId=self.client,
        )

    def substep(self, count: int = 1) -> None:
        """Advance physics by `count` steps of 1/240 s."""
        for _ in range(count):
            pb.stepSimulation(physicsClientId=self.client)
            if self.watch is not None:
                self.watch()

    def update_lights(self) -> None:
        """Once per control step: the button toggles the LED on its rising edge, the switch's level is the bulb."""
        pressed = self.fixture(scenes.BUTTON) > sum(self.joint_limits[scenes.BUTTON]) / 2
        if pressed and not self.button_was_pressed:
            self.button_on = not self.button_on
            self._set_light(scenes.LED, int(self.button_on))
        self.button_was_pressed = pressed
        switched = self.fixture(scenes.SWITCH) > sum(self.joint_limits[scenes.SWITCH]) / 2
        if switched != self.switch_on:
            self._set_light(scenes.LIGHTBULB, int(switched))
        self.switch_on = switched

    def _set_light(self, light: str, state: int) -> None:
        if state not in (0, 1):
            raise ValueError(f"{light} state is {state}, expected 0 or 1")
        self.lights[light] = state

    # -- reading

    def fixture(self, joint: str) -> float:
        """Position of a table joint [m]."""
        return float(pb.getJointState(self.table, self.table_joints[joint], physicsClientId=self.client)[0])

    def tool_pose(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """World position [m] and Euler angles [rad] of the tool centre."""
        position, orientation = pb.getLinkState(self.robot, TCP_LINK, physicsClientId=self.client)[:2]
        return position, pb.getEulerFromQuaternion(orientation)

    def robot_obs(self) -> np.ndarray:
        """float64 (15,), as envs.spec.OBSERVATION describes."""
        position, euler = self.tool_pose()
        states = pb.getJointStates(self.robot, (*ARM_JOINTS, *FINGER_JOINTS), physicsClientId=self.client)
        *joints, left, right = (state[0] for state in states)
        return np.array([*position, *euler, left + right, *joints, self.gripper_command])

    def scene_obs(self) -> np.ndarray:
        """float64 (24,), as envs.spec.OBSERVATION describes."""
        values = [self.fixture(joint) for joint in (scenes.SLIDE, scenes.DRAWER, scenes.BUTTON, scenes.SWITCH)]
        values += [self.lights[scenes.LIGHTBULB], self.lights[scenes.LED]]
        for uid in self.blocks.values():
            position, orientation = pb.getBasePositionAndOrientation(uid, physicsClientId=self.client)
            values += [*position, *pb.getEulerFromQuaternion(orientation)]
        return np.array(values, dtype=np.float64)

    def robot_info(self) -> dict:
        """Robot part of calvin_env's info."""
        observation = self.robot_obs()
        return {
            "tcp_pos": tuple(observation[:3]),
            "tcp_orn": tuple(observation[3:6]),
            "gripper_opening_width": float(observation[6]),
            "arm_joint_states": observation[7:14].tolist(),
            "gripper_action": self.gripper_command,
            "uid": self.robot,
            "contacts": pb.getContactPoints(bodyA=self.robot, physicsClientId=self.client),
        }

    def scene_info(self) -> dict:
        """Scene part of calvin_env's info; what the task oracle reads."""
        table_contacts = pb.getContactPoints(bodyA=self.table, physicsClientId=self.client)
        return {
            "fixed_objects": {"table": {"uid": self.table, "links": dict(self.table_links), "contacts": table_contacts}},
            "movable_objects": {name: self._block_info(uid) for name, uid in self.blocks.items()},
            "doors": {joint: {"current_state": self.fixture(joint)} for joint in (scenes.SLIDE, scenes.DRAWER)},
            "buttons": {scenes.BUTTON: {"joint_state": self.fixture(scenes.BUTTON), "logical_state": int(self.button_on)}},
            "switches": {scenes.SWITCH: {"joint_state": self.fixture(scenes.SWITCH), "logical_state": int(self.switch_on)}},
            "lights": {light: {"logical_state": state} for light, state in self.lights.items()},
        }

    def _block_info(self, uid: int) -> dict:
        position, orientation = pb.getBasePositionAndOrientation(uid, physicsClientId=self.client)
        linear, angular = pb.getBaseVelocity(uid, physicsClientId=self.client)
        return {
            "current_pos": position,
            "current_orn": orientation,
            "current_lin_vel": linear,
            "current_ang_vel": angular,
            "contacts": pb.getContactPoints(bodyA=uid, physicsClientId=self.client),
            "uid": uid,
        }

    # -- images

    @property
    def renderer(self) -> str:
        """What draws the images, vendor included."""
        return self.cameras.renderer

    def set_look(self, look: Look) -> None:
        """See the scene so until the next `fresh()`. States do not change. Raises ValueError for anything but a `Look`."""
        self.cameras.set_look(look)

    def render_static(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (200, 200, 3) and depth float64 (200, 200) [m] from the static camera."""
        return self.cameras.static()

    def render_gripper(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (84, 84, 3) and depth float64 (84, 84) [m] from the wrist camera."""
        return self.cameras.gripper()

    # -- bodies, for drawing elsewhere

    def visual_shapes(self) -> list[dict]:
        """What is to be seen, once: per shape its body, link, geometry (PyBullet's type), file, dimensions, RGBA and pose in the link.

        `dimensions` are metres (boxes: full sides; cylinders: length, radius; meshes: scale). The order is that of `visual_poses()`.
        """
        return self.cameras.stage.visual_shapes()

    def visual_poses(self, shapes: list[dict]) -> np.ndarray:
        """World poses of those shapes now: float64 (N, 7), position [m] and quaternion (x, y, z, w)."""
        poses = np.empty((len(shapes), 7))
        for row, shape in enumerate(shapes):
            position, orientation = self._link_pose(shape["uid"], shape["link"])
            poses[row, :3], poses[row, 3:] = pb.multiplyTransforms(position, orientation, shape["position"], shape["quaternion"])
        return poses

    def _link_pose(self, uid: int, link: int):
        if link >= 0:
            return pb.getLinkState(uid, link, physicsClientId=self.client)[4:6]
        position, orientation = pb.getBasePositionAndOrientation(uid, physicsClientId=self.client)
        inertial = pb.getDynamicsInfo(uid, -1, physicsClientId=self.client)[3:5]
        return pb.multiplyTransforms(position, orientation, *pb.invertTransform(*inertial))
