"""A rollout as a Rerun recording: cameras, arm and scene in 3-D, joints, actions, instruction and events on one timeline.

Entities:
  world/<body>/<link>            meshes, with a Transform3D a frame
  world/tool_path                where the tool has been during this subtask
  camera/static, camera/gripper  JPEG images
  robot/joint_1 … joint_7 [rad], robot/gripper_width [m]
  action/<component>/commanded, action/<component>/executed   in action units (0.02 m, 0.05 rad); executed is what the tool did
  policy/decision_ms, policy/<stage>_ms, policy/entropy
  instruction                    a document, and events: a log of chains and subtasks
Timelines: step (control steps since the recording began) and time (step / 30 s).

Needs rerun-sdk. Opens arranged: the blueprint is inside.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rerun as rr
import rerun.blueprint as rrb

from envs.calvin.scenes import LED, LIGHT_LINKS, LIGHT_OFF_RGBA, LIGHT_ON_RGBA, LIGHTBULB
from envs.spec import (
    CONTROL_HZ,
    MAX_RELATIVE_POSITION_M,
    MAX_RELATIVE_ROTATION_RAD,
    RGB_GRIPPER,
    RGB_STATIC,
    ROBOT_OBS,
    SCENE_OBS,
)
from eval.chain import Attempt, ChainResult, Watcher
from eval.meshes import PLANE, mesh_of
from eval.watching import Camera

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

APPLICATION = "emu3-vla"
COMPONENTS = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
FINGERS_OPEN_M = 0.08
JPEG_QUALITY = 85
_MOVED = 1e-6


class Recorder(Watcher):
    """Writes one .rrd file; a watcher of any number of chains, in one after another.

    frame_stride: images and poses are recorded at every that many control steps, and at the last of each subtask; plots at each.
    The file appears under its name when `close()` was called.
    """

    def __init__(self, path: Path, *, title: str, camera: Camera, frame_stride: int = 2):
        self.path, self.temporary = path, path.with_name(path.name + ".part")
        self.frame_stride, self.camera, self.step = frame_stride, camera, 0
        self.stream = rr.RecordingStream(APPLICATION)
        self.stream.save(self.temporary, default_blueprint=blueprint())
        self.stream.send_recording_name(title)
        self.shapes: list[dict[str, Any]] | None = None
        self.path_of_tool: list[np.ndarray] = []

    def close(self, *, keep: bool = True) -> None:
        """Finish the file and give it its name; or drop it, and what an earlier run left under that name."""
        self.stream.flush()
        self.stream.disconnect()
        if keep:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink()
            self.path.unlink(missing_ok=True)

    # -- a chain goes by

    def chain_begins(self, env: CalvinEnv, index: int, subtasks: tuple[str, ...]) -> None:
        if self.shapes is None:
            self._log_shapes(env)
        self.path_of_tool = []
        self._at(self.step)
        self._event(f"chain {index} begins: {' → '.join(subtasks)}", rr.TextLogLevel.INFO)
        self._frame(env)

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        self.path_of_tool = self.path_of_tool[-1:]
        self._at(self.step)
        self._log(
            "instruction",
            rr.TextDocument(f"# {attempt.instruction}\n\nsubtask {position + 1}: `{attempt.task}`", media_type="text/markdown"),
        )
        self._event(f"subtask {position + 1} begins: {attempt.task} “{attempt.instruction}”", rr.TextLogLevel.INFO)

    def decided(self, answer: dict[str, Any]) -> None:
        self._at(self.step)
        for stage, seconds in answer.get("timing_s", {}).items():
            self._log(f"policy/{stage}_ms", rr.Scalars(1000 * float(seconds)))
        if "entropy" in answer:
            self._log("policy/entropy", rr.Scalars(float(np.mean(answer["entropy"]))))

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        self.step += 1
        self._at(self.step)
        after = env.state()[ROBOT_OBS]
        for name, commanded, executed in zip(COMPONENTS, action, executed_action(before, after), strict=True):
            self._log(f"action/{name}/commanded", rr.Scalars(float(commanded)))
            self._log(f"action/{name}/executed", rr.Scalars(float(executed)))
        for joint, angle in enumerate(after[7:14], 1):
            self._log(f"robot/joint_{joint}", rr.Scalars(float(angle)))
        self._log("robot/gripper_width", rr.Scalars(float(after[6])))
        if attempt.steps % self.frame_stride == 0 or attempt.success:
            self._frame(env)

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        self._at(self.step)
        if attempt.success:
            self._event(f"subtask {position + 1} solved after {attempt.steps} steps: {attempt.task}", rr.TextLogLevel.INFO)
        else:
            instead = f"; the oracle saw {', '.join(attempt.happened)}" if attempt.happened else ""
            self._event(f"subtask {position + 1} not solved in {attempt.steps} steps: {attempt.task}{instead}", rr.TextLogLevel.WARN)

    def chain_ends(self, result: ChainResult) -> None:
        self._at(self.step)
        if result.error:
            self._event(f"chain {result.index} broke: {result.error['type']}: {result.error['message']}", rr.TextLogLevel.ERROR)
        else:
            self._event(f"chain {result.index} ends: {result.num_solved} of {len(result.subtasks)} solved", rr.TextLogLevel.INFO)

    # -- logging

    def _log(self, entity: str, *what: Any, static: bool = False) -> None:
        self.stream.log(entity, *what, static=static)

    def _at(self, step: int) -> None:
        self.stream.set_time("step", sequence=step)
        self.stream.set_time("time", duration=step / CONTROL_HZ)

    def _event(self, text: str, level: str) -> None:
        self._log("events", rr.TextLog(text, level=level))

    def _log_shapes(self, env: CalvinEnv) -> None:
        # The ground plane is 200 m wide (and invisible in our own assets): it would only get in the viewer's way.
        self.shapes = [shape for shape in env.simulation.visual_shapes() if shape["body"] != "plane" and shape["geometry"] != PLANE]
        self.entities = _entity_names(self.shapes)
        self.poses = np.full((len(self.shapes), 7), np.nan)
        self.lights: dict[str, bool | None] = {}
        self._log("world", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
        light_links = {link: light for light, link in LIGHT_LINKS.items()}
        for entity, shape in zip(self.entities, self.shapes, strict=True):
            mesh = mesh_of(shape)
            light = light_links.get(shape["link_name"]) if shape["body"] == "table" else None
            if light:
                self.lights[light] = None
            # A light changes colour, and what is static cannot.
            color = None if light else (np.array(shape["rgba"]) * 255).astype(np.uint8)
            geometry = rr.Mesh3D(
                vertex_positions=mesh.positions,
                vertex_normals=mesh.normals,
                vertex_texcoords=mesh.texcoords,
                albedo_texture=mesh.texture,
                albedo_factor=color,
            )
            self._log(entity, geometry, static=True)
        self.light_entity = {
            light_links[shape["link_name"]]: entity
            for entity, shape in zip(self.entities, self.shapes, strict=True)
            if shape["body"] == "table" and shape["link_name"] in light_links
        }

    def _frame(self, env: CalvinEnv) -> None:
        observation = self.camera.observe(env)
        for entity, key in (("camera/static", RGB_STATIC), ("camera/gripper", RGB_GRIPPER)):
            self._log(entity, rr.Image(observation[key]).compress(jpeg_quality=JPEG_QUALITY))
        poses = env.simulation.visual_poses(self.shapes)
        moved = ~(np.abs(poses - self.poses).max(axis=1) < _MOVED)
        for row in np.flatnonzero(moved):
            self._log(self.entities[row], rr.Transform3D(translation=poses[row, :3], quaternion=poses[row, 3:]))
        self.poses[moved] = poses[moved]
        self.path_of_tool.append(observation[ROBOT_OBS][:3])
        self._log("world/tool_path", rr.LineStrips3D([self.path_of_tool], radii=0.001, colors=(255, 140, 0)))
        self._log_lights(observation[SCENE_OBS])

    def _log_lights(self, scene_obs: np.ndarray) -> None:
        for light, entity in self.light_entity.items():
            lit = bool(scene_obs[{LIGHTBULB: 4, LED: 5}[light]])
            if lit != self.lights[light]:
                rgba = LIGHT_ON_RGBA[light] if lit else LIGHT_OFF_RGBA
                self._log(entity, rr.Mesh3D.from_fields(albedo_factor=[int(255 * channel) for channel in rgba]))
                self.lights[light] = lit


def executed_action(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """What the tool did in one control step, in action units: (7,).

    before, after: robot_obs (15,). Motion of the tool over 0.02 m and 0.05 rad (differences of Euler angles, as the relative action adds
    them, taken the short way round); the last entry is how far the fingers are open, from -1 (shut) to +1 (wide).
    """
    turn = (after[3:6] - before[3:6] + np.pi) % (2 * np.pi) - np.pi
    moved = (after[:3] - before[:3]) / MAX_RELATIVE_POSITION_M
    return np.concatenate([moved, turn / MAX_RELATIVE_ROTATION_RAD, [2 * after[6] / FINGERS_OPEN_M - 1]])


def blueprint() -> rrb.Blueprint:
    """How the recording opens: scene and cameras on top, plots below, instruction and events at the side."""
    actions = [
        rrb.TimeSeriesView(name=name, contents=[f"action/{name}/**"], plot_legend=rrb.PlotLegend(visible=index == 0))
        for index, name in enumerate(COMPONENTS)
    ]
    plots = rrb.Tabs(
        rrb.Grid(*actions, name="Actions: commanded and executed", grid_columns=4),
        rrb.Vertical(
            rrb.TimeSeriesView(name="Joints [rad]", contents=[f"robot/joint_{joint}" for joint in range(1, 8)]),
            rrb.TimeSeriesView(name="Gripper width [m]", contents=["robot/gripper_width"]),
            name="Joints",
        ),
        rrb.TimeSeriesView(name="Policy", contents=["policy/**"]),
    )
    views = rrb.Horizontal(
        rrb.Spatial3DView(name="Scene", origin="world"),
        rrb.Vertical(
            rrb.Spatial2DView(name="Static camera", origin="camera/static"),
            rrb.Spatial2DView(name="Gripper camera", origin="camera/gripper"),
        ),
        rrb.Vertical(
            rrb.TextDocumentView(name="Instruction", origin="instruction"),
            rrb.TextLogView(name="Events", origin="events"),
            row_shares=[1, 2],
        ),
        column_shares=[4, 2, 2],
    )
    return rrb.Blueprint(
        rrb.Vertical(views, plots, row_shares=[3, 2]),
        rrb.TimePanel(state="collapsed", timeline="time"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.BlueprintPanel(state="collapsed"),
    )


def _entity_names(shapes: list[dict[str, Any]]) -> list[str]:
    """One entity a shape; links with several shapes number them."""
    names: list[str] = []
    for shape in shapes:
        name = f"world/{shape['body']}/{re.sub(r'[^A-Za-z0-9_]', '_', shape['link_name'])}"
        taken = sum(known == name or known.startswith(f"{name}/") for known in names)
        names.append(f"{name}/{taken}" if taken else name)
    return names
