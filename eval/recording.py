"""A rollout as a Rerun recording: cameras, arm and scene in 3-D, joints, actions, instruction and events on one timeline.

Entities:
  world/<body>/<link>            meshes, with a Transform3D a frame
  world/tool_path                where the tool has been during this subtask
  camera/static, camera/gripper  JPEG images
  robot/joint_1 … joint_7 [rad], robot/gripper_width [m]
  imagined/static, imagined/gripper   what the policy expected the cameras to see, at the moment for which it expected it
  action/<component>/commanded, action/<component>/executed   in action units (0.02 m, 0.05 rad); executed is what the tool did
  chunk/predicted, chunk/executed     (steps, 7), in action units: a whole decision, and what the tool did while it was carried out; both
                                 stand at the step of the decision. A chunk that was cut short is executed as far as it went
  world/said/<thing>             where the policy says that a thing is, as a box with its name
  said/<number>                  every number that the policy says of the scene
  chunk/coefficients (frequencies, 7), chunk/entropy   DCT coefficients, and entropy of each token [nats], of that decision
  policy/<stage>_ms, policy/entropy (mean), policy/entropy_max, policy/clamped
  safety/<dimension>             by how much the guard changed an action, where it did
  instruction                    a document, and events: a log of chains, subtasks, what the task oracle saw, clamped actions, and
                                 every intervention of the safety guard
Timelines: step (control steps since the recording began) and time (step / 30 s).

What the policy does not answer (see policies.base.Policy.infer) is not there. The original simulator's bodies are not open to recordings:
of it there is no `world`. Needs rerun-sdk. Opens arranged: the blueprint is inside.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rerun as rr
import rerun.blueprint as rrb

from envs.calvin.scenes import LED, LIGHT_LINKS, LIGHT_OFF_RGBA, LIGHT_ON_RGBA, LIGHTBULB
from envs.calvin.tasks import completed_tasks
from envs.spec import (
    ACTION_COMPONENTS,
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
from policies.safety import SafetyEvent

if TYPE_CHECKING:
    from envs.calvin import CalvinEnv

APPLICATION = "emu3-vla"
COMPONENTS = ACTION_COMPONENTS
FINGERS_OPEN_M = 0.08
JPEG_QUALITY = 85
SAID_HALF_SIZE_M = (0.05, 0.025, 0.025)
SAID_COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "pink": (255, 0, 255)}
CAMERA_ENTITIES = {RGB_STATIC: "static", RGB_GRIPPER: "gripper"}
_MOVED = 1e-6


class Recorder(Watcher):
    """Writes one .rrd file; a watcher of any number of chains, in one after another.

    frame_stride: images and poses are recorded at every that many control steps, and at the last of each subtask; plots at each.
    viewer: address of a viewer (see eval.live) that is sent the same at once; one that goes away costs the file nothing.
    The file appears under its name when `close()` was called.
    """

    def __init__(self, path: Path, *, title: str, camera: Camera, frame_stride: int = 2, viewer: str = ""):
        self.path, self.temporary = path, path.with_name(path.name + ".part")
        self.frame_stride, self.camera, self.viewer, self.step = frame_stride, camera, viewer, 0
        self.stream = rr.RecordingStream(APPLICATION)
        sinks = [rr.FileSink(self.temporary), *([rr.GrpcSink(viewer)] if viewer else [])]
        self.stream.set_sinks(*sinks, default_blueprint=blueprint())
        self.stream.send_recording_name(title)
        self.shapes: list[dict[str, Any]] | None = None
        self.path_of_tool: list[np.ndarray] = []
        self.start_info: dict[str, Any] = {}
        self.reported: set[str] = set()
        self.decision_step = 0
        self.executed: list[np.ndarray] = []  # what the tool did since the last decision
        self.imagines = False
        self.imagined: dict[str, np.ndarray] = {}
        self.imagined_for = -1  # the step at which that is to be seen

    def close(self, *, keep: bool = True) -> None:
        """Finish the file and give it its name; or drop it, and what an earlier run left under that name."""
        try:
            self.stream.flush()
        except RuntimeError as error:
            if not self.viewer:
                raise
            print(f"emu3-vla: the viewer was lost ({error}); {self.path.name} is whole without it", file=sys.stderr)
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
        self.env, self.path_of_tool = env, []
        self._at(self.step)
        self._event(f"chain {index} begins: {' → '.join(subtasks)}", rr.TextLogLevel.INFO)
        self._frame(env)

    def subtask_begins(self, position: int, attempt: Attempt) -> None:
        self.path_of_tool = self.path_of_tool[-1:]
        self.start_info, self.reported = self.env.info(), set()
        self._at(self.step)
        self._log(
            "instruction",
            rr.TextDocument(f"# {attempt.instruction}\n\nsubtask {position + 1}: `{attempt.task}`", media_type="text/markdown"),
        )
        self._event(f"subtask {position + 1} begins: {attempt.task} “{attempt.instruction}”", rr.TextLogLevel.INFO)

    def decided(self, answer: dict[str, Any]) -> None:
        self._log_executed_chunk()
        self.decision_step = self.step
        self._at(self.step)
        actions = np.asarray(answer["actions"], dtype=np.float32)
        self._log("chunk/predicted", rr.Tensor(actions, dim_names=("step", "component")))
        for stage, seconds in answer.get("timing_s", {}).items():
            self._log(f"policy/{stage}_ms", rr.Scalars(1000 * float(seconds)))
        if len(answer.get("entropy", ())):
            self._log("policy/entropy", rr.Scalars(float(np.mean(answer["entropy"]))))
            self._log("policy/entropy_max", rr.Scalars(float(np.max(answer["entropy"]))))
            self._log("chunk/entropy", rr.BarChart(np.asarray(answer["entropy"], dtype=np.float32)))
        if "coefficients" in answer:
            coefficients = np.asarray(answer["coefficients"], dtype=np.float32)
            self._log("chunk/coefficients", rr.Tensor(coefficients, dim_names=("frequency", "component")))
        if "clipped" in answer:
            self._log("policy/clamped", rr.Scalars(float(answer["clipped"])))
            if answer["clipped"]:
                self._event(f"{answer['clipped']} of the chunk's {actions.size} values clamped", rr.TextLogLevel.WARN)
        self._say(answer.get("scene", {}))
        self._expect(answer.get("imagined", {}), self.step + len(actions))

    def guarded(self, events: list[SafetyEvent]) -> None:
        self._at(self.step)
        for event in events:
            self._event(f"{event}", rr.TextLogLevel.WARN)
            if event.given is not None:
                self._log(f"safety/{event.dimension}", rr.Scalars(event.given - event.asked))

    def stepped(self, env: CalvinEnv, action: np.ndarray, before: np.ndarray, attempt: Attempt) -> None:
        self.step += 1
        self._at(self.step)
        after = env.state()[ROBOT_OBS]
        self.executed.append(executed_action(before, after))
        for name, commanded, executed in zip(COMPONENTS, action, self.executed[-1], strict=True):
            self._log(f"action/{name}/commanded", rr.Scalars(float(commanded)))
            self._log(f"action/{name}/executed", rr.Scalars(float(executed)))
        for joint, angle in enumerate(after[7:14], 1):
            self._log(f"robot/joint_{joint}", rr.Scalars(float(angle)))
        self._log("robot/gripper_width", rr.Scalars(float(after[6])))
        self._log_oracle(env, attempt)
        due = self.step == self.imagined_for
        if attempt.steps % self.frame_stride == 0 or attempt.success or due:
            self._frame(env)
        if due:
            for key, picture in self.imagined.items():
                self._log(f"imagined/{CAMERA_ENTITIES[key]}", rr.Image(picture).compress(jpeg_quality=JPEG_QUALITY))

    def subtask_ends(self, position: int, attempt: Attempt) -> None:
        self._log_executed_chunk()
        self.imagined_for = -1  # the chunk was cut short: what it was to lead to is not what is seen then
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

    def _log_executed_chunk(self) -> None:
        if self.executed:
            self._at(self.decision_step)
            self._log("chunk/executed", rr.Tensor(np.array(self.executed, dtype=np.float32), dim_names=("step", "component")))
            self.executed = []

    def _log_oracle(self, env: CalvinEnv, attempt: Attempt) -> None:
        judge = getattr(env, "completed", completed_tasks)
        for task in sorted(judge(self.start_info, env.info()) - self.reported):
            self.reported.add(task)
            asked = "" if task == attempt.task else ", which was not asked for"
            self._event(f"the oracle reports {task}{asked}", rr.TextLogLevel.INFO)

    def _say(self, scene: dict[str, float]) -> None:
        for name, value in scene.items():
            self._log(f"said/{name}", rr.Scalars(value))
        tool = self.env.state()[ROBOT_OBS] if scene else np.zeros(15)
        for thing in dict.fromkeys(name.removesuffix("_right") for name in scene if name.endswith("_right")):
            way = [scene.get(f"{thing}_{side}") for side in ("right", "forward", "up")]
            if None not in way:
                place = tool[:3] + np.array(way)
                turned = rr.RotationAxisAngle(axis=(0, 0, 1), radians=tool[5] + scene.get(f"{thing}_turn", 0.0))
                box = rr.Boxes3D(half_sizes=[SAID_HALF_SIZE_M], labels=[thing], colors=[SAID_COLORS.get(thing, (255, 255, 255))])
                self._log(f"world/said/{thing}", box, rr.Transform3D(translation=place, rotation=turned))

    def _expect(self, imagined: dict[str, np.ndarray], step: int) -> None:
        unknown = sorted(set(imagined) - set(CAMERA_ENTITIES))
        if unknown:
            raise ValueError(f"the policy imagined {unknown[0]!r}, expected cameras among {', '.join(CAMERA_ENTITIES)}")
        if imagined and not self.imagines:
            self.imagines = True
            self.stream.send_blueprint(blueprint(imagines=True))
        self.imagined, self.imagined_for = imagined, step if imagined else -1

    def _log_shapes(self, env: CalvinEnv) -> None:
        if not hasattr(env, "simulation"):  # the original simulator
            self.shapes, self.light_entity = [], {}
            return
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
        for key, name in CAMERA_ENTITIES.items():
            self._log(f"camera/{name}", rr.Image(observation[key]).compress(jpeg_quality=JPEG_QUALITY))
        if self.shapes:
            self._log_scene(env, observation)

    def _log_scene(self, env: CalvinEnv, observation: dict[str, np.ndarray]) -> None:
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


def blueprint(*, imagines: bool = False) -> rrb.Blueprint:
    """How the recording opens: scene and cameras on top, plots below, instruction and events at the side.

    imagines: whether there are views of what the policy imagined, each beside what its camera saw.
    """
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
        rrb.Vertical(
            rrb.Horizontal(
                rrb.TensorView(name="Chunk as predicted", origin="chunk/predicted"),
                rrb.TensorView(name="Chunk as executed", origin="chunk/executed"),
                rrb.TensorView(name="DCT coefficients", origin="chunk/coefficients"),
            ),
            rrb.BarChartView(name="Entropy of each token [nats]", origin="chunk/entropy"),
            row_shares=[2, 1],
            name="Decision",
        ),
        rrb.Vertical(
            rrb.TimeSeriesView(name="Token entropy [nats]", contents=["policy/entropy", "policy/entropy_max"]),
            rrb.TimeSeriesView(
                name="Decision time [ms], clamped values", contents=["policy/**", "- policy/entropy", "- policy/entropy_max"]
            ),
            name="Policy",
        ),
        rrb.TimeSeriesView(name="What the policy says of the scene", contents=["said/**"]),
    )
    views = rrb.Horizontal(
        rrb.Spatial3DView(name="Scene", origin="world"),
        rrb.Grid(*(view for name in CAMERA_ENTITIES.values() for view in _camera_views(name, imagines)), grid_columns=1 + imagines),
        rrb.Vertical(
            rrb.TextDocumentView(name="Instruction", origin="instruction"),
            rrb.TextLogView(name="Events", origin="events"),
            row_shares=[1, 2],
        ),
        column_shares=[4, 3 if imagines else 2, 2],
    )
    return rrb.Blueprint(
        rrb.Vertical(views, plots, row_shares=[3, 2]),
        rrb.TimePanel(state="collapsed", timeline="time"),
        rrb.SelectionPanel(state="collapsed"),
        rrb.BlueprintPanel(state="collapsed"),
    )


def _camera_views(name: str, imagines: bool) -> list[rrb.Spatial2DView]:
    views = [rrb.Spatial2DView(name=f"{name.capitalize()} camera", origin=f"camera/{name}")]
    return [*views, rrb.Spatial2DView(name=f"{name.capitalize()} as imagined", origin=f"imagined/{name}")] if imagines else views


def _entity_names(shapes: list[dict[str, Any]]) -> list[str]:
    """One entity a shape; links with several shapes number them."""
    names: list[str] = []
    for shape in shapes:
        name = f"world/{shape['body']}/{re.sub(r'[^A-Za-z0-9_]', '_', shape['link_name'])}"
        taken = sum(known == name or known.startswith(f"{name}/") for known in names)
        names.append(f"{name}/{taken}" if taken else name)
    return names
