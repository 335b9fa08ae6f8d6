"""Mappings: units, rotations, frames, grippers and pictures come out as envs.spec has them; what cannot be is a named error."""

import dataclasses
import importlib.resources

import numpy as np
import pytest
from arm_recordings import MAPPING, ForeignArm
from scipy.spatial.transform import Rotation

from emu3_vla.data.recordings import motion
from emu3_vla.data.recordings.mapped import MappedSource, fitted
from emu3_vla.data.recordings.mapping import CameraMap, MappingError, load_mapping, parse_mapping
from emu3_vla.data.recordings.recording import Column, Picture, Recording, RecordingError, Schema

PRESETS = sorted(path.name.removesuffix(".yaml") for path in (importlib.resources.files("configs") / "mappings").iterdir())


@dataclasses.dataclass
class Held:
    """A dataset of one episode in memory."""

    columns: dict[str, np.ndarray]
    cameras: dict[str, Picture]
    format = path = "held"
    losses = ()

    def __post_init__(self):
        columns = {name: Column(dtype=str(values.dtype), shape=values.shape[1:]) for name, values in self.columns.items()}
        self.schema = Schema(rate_hz=10, columns=columns, cameras=self.cameras)
        self.lengths = [len(next(iter(self.columns.values())))]
        self.told = [("go",)]

    def read(self, number: int) -> Recording:
        steps = self.lengths[0]
        pictures = {name: np.zeros((steps, size.height, size.width, 3), np.uint8) for name, size in self.cameras.items()}
        return Recording(
            where="the episode",
            columns=self.columns,
            instructions=("go",),
            instruction_of=np.zeros(steps, np.int64),
            frame_step=np.arange(steps),
            frames=lambda camera: iter([pictures[camera]]),
        )


def mapped(columns: dict[str, np.ndarray], text: str) -> MappedSource:
    cameras = "cameras: {rgb_static: {key: front}, rgb_gripper: {blank: true}}\n"
    return MappedSource(Held(columns, {"front": Picture(height=200, width=200)}), parse_mapping(cameras + text, "test"), "test")


def poses(steps: int = 9, seed: int = 0) -> tuple[np.ndarray, Rotation]:
    """A tool that points down and wanders: positions (T, 3) [m], orientations."""
    random = np.random.default_rng(seed)
    position = np.cumsum(random.normal(0, 0.005, (steps, 3)), axis=0)
    turns = Rotation.from_rotvec(random.normal(0, 0.02, (steps, 3)))
    orientation = [Rotation.from_euler("xyz", [3.0, 0.2, 0.4])]
    for turn in turns[1:]:
        orientation.append(turn * orientation[-1])
    return position, Rotation.concatenate(orientation)


STATE = "state: {position: {key: p, unit: m}, rotation: {key: r, form: quaternion_xyzw}}\n"
GRIPPER = "gripper: {key: g, open: 0, closed: 1}"


def own_motion(position, orientation) -> np.ndarray:
    """What leads from each pose to the next, in units of envs.spec; the last step stays."""
    euler = orientation.as_euler("xyz")
    turn = (np.diff(euler, axis=0) + np.pi) % (2 * np.pi) - np.pi
    moved = np.concatenate([np.diff(position, axis=0) / 0.02, turn / 0.05], axis=1)
    return np.concatenate([moved, np.zeros((1, 6))])


def test_every_way_of_giving_the_same_motion_gives_the_same_actions():
    position, orientation = poses()
    after, turned = motion.following(position, orientation)
    expected = own_motion(position, orientation)
    columns = {"p": position, "r": orientation.as_quat(), "g": (np.arange(9) % 2).astype(float)}
    world, tool = turned * orientation.inv(), orientation.inv() * turned
    given = {
        "executed": ({}, f"kind: executed, {GRIPPER}"),
        "absolute": (
            {"a": after * 1000, "b": np.roll(turned.as_quat(), 1, axis=1)},
            f"kind: absolute, position: {{key: a, unit: mm}}, rotation: {{key: b, form: quaternion_wxyz}}, {GRIPPER}",
        ),
        "degrees": (
            {"a": after * 100, "b": np.degrees(turned.as_euler("xyz"))},
            f"kind: absolute, position: {{key: a, unit: cm}}, rotation: {{key: b, unit: deg}}, {GRIPPER}",
        ),
        "previous": (
            {"a": after, "b": turned.as_rotvec()},
            f"kind: absolute, relative_to: previous, position: {{key: a}}, rotation: {{key: b, form: axis_angle}}, {GRIPPER}",
        ),
        "world": (
            {"a": (after - position) / 0.05, "b": world.as_rotvec() / 0.5},
            "kind: relative, position: {key: a, scale: 0.05, unit: m}, rotation: {key: b, scale: 0.5, form: axis_angle}, " + GRIPPER,
        ),
        "tool": (
            {"a": orientation.inv().apply(after - position), "b": tool.as_quat()},
            f"kind: relative, frame: tool, position: {{key: a}}, rotation: {{key: b, form: quaternion_xyzw}}, {GRIPPER}",
        ),
    }
    for name, (more, text) in given.items():
        source = mapped(columns | more, f"actions: {{{text}}}\n{STATE}")
        actions = source.read(0).columns["actions"]
        assert actions.dtype == np.float32 and np.array_equal(actions[:, 6], [1, -1] * 4 + [1])
        assert np.abs(actions[:, :6] - expected).max() < 1e-5, name


def test_copied_actions_are_the_same_bytes():
    actions = np.random.default_rng(0).uniform(-1, 1, (9, 7)).astype(np.float32)
    source = mapped({"a": actions, "s": np.ones((9, 15))}, "actions: {kind: copy, key: a}\nstate: {key: s}")
    assert source.read(0).columns["actions"].tobytes() == actions.tobytes() and source.read_uncut(0)[1].max() == 0
    assert [loss for loss in source.losses if "(keep)" in loss] == []


def test_long_steps_are_cut_and_counted_or_refused():
    columns = {"a": np.full((9, 3), 0.03), "b": np.zeros((9, 3)), "g": np.zeros(9)}
    text = f"actions: {{kind: relative, position: {{key: a}}, rotation: {{key: b}}, {GRIPPER}}}"
    source = mapped(columns, text)
    assert np.array_equal(source.read(0).columns["actions"][0], [1, 1, 1, 0, 0, 0, 1]) and np.isclose(source.read_uncut(0)[1][0, 0], 0.5)
    with pytest.raises(RecordingError, match=r"the episode: entry 0 of the action is 1\.500 at step 0, outside \[-1, 1\]; raise"):
        mapped(columns, text[:-1] + ", clip: false}").read(0)
    wider = mapped(columns, text[:-1] + ", clip: false, position_unit_m: 0.04}").read(0)
    assert np.allclose(wider.columns["actions"][0, :3], 0.75)
    units = mapped(columns, text[:-1] + ", position_unit_m: 0.04}").schema.about
    assert units == {"actions": {"kind": "tool", "position_unit_m": 0.04, "rotation_unit_rad": 0.05}} and source.schema.about == {}


def test_joints_become_how_far_they_go():
    columns = {"q": np.degrees(np.linspace(0, 1, 54).reshape(9, 6)), "g": np.arange(9.0) * 12}
    columns["t"] = columns["q"] + np.degrees(0.04)
    text = "actions: {kind: joints, joints: {key: t, unit: deg, entries: [0, 1, 2, 3, 4]}, gripper: {key: g, open: 100, closed: 0}}\n"
    read = mapped(columns, text + "state: {joints: {key: q, unit: deg, entries: [0, 1, 2, 3, 4]}}").read(0)
    assert np.allclose(read.columns["actions"][:, :6], [0.8] * 5 + [0]) and read.columns["actions"][:, 6].tolist() == [-1] * 5 + [1] * 4
    assert np.allclose(read.columns["robot_obs"][:, 7:12], np.radians(columns["q"][:, :5]))
    with pytest.raises(MappingError, match="kind joints needs state.joints, as many as actions.joints"):
        mapped(columns, text).read(0)


def test_where_euler_angles_are_not_defined_is_an_error():
    position, _ = poses()
    columns = {"p": position, "r": Rotation.from_euler("xyz", [[0, np.pi / 2 - 0.001, 0]] * 9).as_quat(), "g": np.zeros(9)}
    with pytest.raises(RecordingError, match=r"the episode: at step 0 the tool is pitched by 89\.9°, where Euler angles are not defined"):
        mapped(columns, f"actions: {{kind: executed, {GRIPPER}}}\n{STATE}").read(0)
    columns["r"][3] = 0
    with pytest.raises(RecordingError, match="the quaternion of step 3 is .* expected length 1"):
        mapped(columns, f"actions: {{kind: executed, {GRIPPER}}}\n{STATE}").read(0)
    with pytest.raises(MappingError, match="need the tool's pose before the step: map state.position and state.rotation"):
        mapped(columns, f"actions: {{kind: executed, {GRIPPER}}}\n").read(0)


@pytest.mark.parametrize(
    "change,message",
    [
        (("key: observation.images.front", "kay: observation.images.front"), "unknown key 'cameras.rgb_static.kay'; did you mean 'key'"),
        (("kind: absolute", "kindd: absolute"), "unknown key 'actions.kindd'; did you mean 'kind'"),
        (("unit: mm", "unit: inch"), "actions.position: unit 'inch', expected one of m, cm, mm, rad, deg"),
        (("open: 1, closed: 0}\nstate", "open: 1, closed: 1}\nstate"), "actions.gripper: open and closed are both 1.0"),
        (("kind: absolute", "kind: relativ"), r"actions.kind: Input should be 'copy', 'relative', .* \(got 'relativ'\)"),
        (("kind: absolute", "kind: joints"), "kind joints needs joints"),
        (("rgb_gripper", "rgb_wrist"), "cameras are rgb_static, rgb_wrist, expected exactly rgb_static, rgb_gripper"),
        (("{key: observation.images.wrist}", "{}"), "cameras.rgb_gripper: give a camera's key, or blank: true"),
        (("cameras:", "cameras: ["), "is no YAML"),
        (("state:", "stat:"), "unknown key 'stat'; did you mean 'state'"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_named(change, message):
    assert change[0] in MAPPING
    with pytest.raises(MappingError, match=f"mapping mine.*{message}"):
        parse_mapping(MAPPING.replace(*change, 1), "mine")


def test_a_mapping_for_another_dataset_is_named():
    arm = ForeignArm()
    arm.path = "arm"
    for change, message in (
        (
            ("key: action, entries: [0", "key: actoin, entries: [0"),
            "actions.position.key is 'actoin', which is no column of arm; did you mean 'action'?",
        ),
        (("observation.images.wrist", "wrist"), "cameras.rgb_gripper.key is 'wrist', which is no camera of arm"),
    ):
        with pytest.raises(MappingError, match=message):
            MappedSource(_source(arm), parse_mapping(MAPPING.replace(*change), "mine"), "mine")
    with pytest.raises(MappingError, match=r"foreign episode 0: actions.gripper: 'action' has 7 entries, the mapping takes \[9\]"):
        MappedSource(
            _source(arm),
            parse_mapping(MAPPING.replace("entries: [6], open: 1, closed: 0}\nstate", "entries: [9], open: 1, closed: 0}\nstate"), "mine"),
            "mine",
        ).read(0)


def _source(arm: ForeignArm):
    arm.format, arm.path, arm.losses = "foreign", "arm", []
    return arm


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_what_they_say(name):
    """Each preset reads a dataset that has just the keys that it names."""
    mapping = load_mapping(name)[0]
    position, orientation = poses()
    columns: dict[str, np.ndarray] = {}
    for owner in (mapping.actions, mapping.state):
        for part in ("position", "rotation", "joints", "gripper"):
            if piece := getattr(owner, part):
                held = columns.setdefault(piece.key, np.zeros((9, 8), np.float32))
                values = {"position": position, "joints": np.zeros((9, 7)), "gripper": np.ones((9, 1))}.get(part)
                if part == "rotation":
                    values = {"euler_xyz": orientation.as_euler("xyz"), "axis_angle": orientation.as_rotvec()}.get(
                        piece.form, orientation.as_quat()
                    )
                entries = piece.entries or tuple(range(values.shape[1]))
                held[:, list(entries)] = values[:, : len(entries)]
                if piece.entries is None:
                    columns[piece.key] = held[:, : values.shape[1] if part != "gripper" else 1]
    for key, width in ((mapping.actions.key, 7), (mapping.state.key, 15), (mapping.scene_obs, 24)):
        if key:
            columns[key] = np.zeros((9, width))
    if mapping.imitate:
        columns[mapping.imitate] = np.ones(9, bool)
    for key in mapping.keep if isinstance(mapping.keep, tuple) else ():
        columns.setdefault(key, np.zeros((9, 7)))
    cameras = {camera.key: Picture(height=180, width=320) for camera in mapping.cameras.values() if camera.key}
    source = MappedSource(Held(columns, cameras), mapping, name)
    recording = source.read(0)
    assert recording.columns["actions"].shape == (9, 7) and np.isfinite(recording.columns["actions"]).all()
    assert next(recording.frames("rgb_static")).shape[1:] == (200, 200, 3) and next(recording.frames("rgb_gripper")).shape[1:] == (
        84,
        84,
        3,
    )


def test_pictures_are_cut_turned_and_fitted():
    block = np.zeros((2, 60, 100, 3), np.uint8)
    block[:, :, 20:80] = (10, 200, 30)  # the middle 60 columns
    size = Picture(height=30, width=30)
    cropped = fitted(block, CameraMap(key="a"), size)
    assert cropped.shape == (2, 30, 30, 3) and (cropped[:, :, 2:-2] == (10, 200, 30)).all()
    stretched = fitted(block, CameraMap(key="a", fit="stretch"), size)
    assert (stretched[:, :, 0] == 0).all() and (stretched[:, :, 15] == (10, 200, 30)).all()
    padded = fitted(block, CameraMap(key="a", fit="pad"), size)
    assert (padded[:, :6] == 0).all() and (padded[:, 15, 15] == (10, 200, 30)).all()
    exact = fitted(block, CameraMap(key="a", crop=(20, 0, 60, 60)), Picture(height=60, width=60))
    assert np.array_equal(exact, block[:, :, 20:80])
    block[:, 0, 0] = 255
    turned = fitted(block, CameraMap(key="a", rotate=90), Picture(height=100, width=60))
    assert (turned[:, 99, 0] == 255).all()  # anticlockwise: the upper left corner comes down
    with pytest.raises(MappingError, match=r"crop \[50, 0, 60, 60\] leaves the picture of 100×60"):
        fitted(block, CameraMap(key="a", crop=(50, 0, 60, 60)), size)
