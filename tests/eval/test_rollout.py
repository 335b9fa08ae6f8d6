"""A filmed rollout: recording, video, results and report, read back."""

import json
import re
from collections import Counter

import av
import numpy as np
import pytest
from rerun.chunk import RrdReader

from emu3_vla.cli import UsageError, compose
from eval.environment import EnvConfig
from eval.meshes import box, cylinder, load_mesh
from eval.recording import COMPONENTS, executed_action
from eval.rollout import RolloutConfig, chain_of, main

STRIDE = 4
FILES = {"recording.rrd", "rollout.mp4", "results.json", "report.html"}


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    main(RolloutConfig(policy="expert", tasks=("turn_on_led", "turn_on_lightbulb"), frame_stride=STRIDE, output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def steps(rollout):
    return [attempt["steps"] for attempt in json.loads((rollout / "results.json").read_text())["chains"][0]["attempts"]]


def chunks(rollout):
    return list(RrdReader(str(rollout / "recording.rrd")).stream())


def column(rollout, entity, component):
    """All logged values of one component, with their steps, in order."""
    rows = []
    for chunk in chunks(rollout):
        if chunk.entity_path == entity and not chunk.is_static:
            table = chunk.to_record_batch()
            (name,) = [name for name in table.schema.names if name.endswith(component)]
            rows += zip(table["step"].to_pylist(), table[name].to_pylist(), strict=True)
    return sorted((step, value) for step, value in rows if value is not None)


def test_what_a_policy_is_made_with_is_an_option(tmp_path):
    config = compose("rollout", ["policy=zero", "policy_options.history=1", f"output_dir={tmp_path}"])
    assert config.policy_options.given() == {"history": 1}
    with pytest.raises(ValueError, match="its options: none"):
        main(config)
    assert not list(tmp_path.iterdir())


def test_four_files_and_no_leavings(rollout):
    assert {path.name for path in rollout.iterdir()} == FILES


def test_recording_has_every_entity_with_a_row_a_step(rollout, steps):
    rows = Counter()
    for chunk in chunks(rollout):
        rows[chunk.entity_path, chunk.is_static] += chunk.num_rows
    frames = 1 + sum(n // STRIDE + (n % STRIDE != 0) for n in steps)  # both solved: the last step is a frame too
    for name in COMPONENTS:
        assert rows[f"/action/{name}/commanded", False] == rows[f"/action/{name}/executed", False] == sum(steps)
    for joint in range(1, 8):
        assert rows[f"/robot/joint_{joint}", False] == sum(steps)
    assert rows["/robot/gripper_width", False] == sum(steps)
    assert rows["/camera/static", False] == rows["/camera/gripper", False] == frames
    assert rows["/world/robot/panda_link7", False] == frames
    assert rows["/world/table/base", False] == 1, "what never moves is placed once"
    assert rows["/world/table/led_link", False] == 3, "a pose, then dark, then lit"
    assert rows["/instruction", False] == 2
    assert rows["/events", False] == 2 * 3 + 2, "each subtask begins, is reported by the oracle and is solved; the chain begins and ends"
    meshes = {entity for (entity, static), _ in rows.items() if static and entity.startswith("/world/")}
    assert {"/world/robot/panda_hand", "/world/table/drawer_link", "/world/block_red/base", "/world/pedestal/base"} <= meshes


def test_recording_opens_arranged(rollout):
    reader = RrdReader(str(rollout / "recording.rrd"))
    assert len(reader.recordings()) == 1 and len(reader.blueprints()) == 1


def test_events_and_instructions_are_on_the_timeline(rollout, steps):
    texts = [(step, value[0]) for step, value in column(rollout, "/events", "TextLog:text")]
    assert [step for step, _ in texts] == [0, 0, *[steps[0]] * 3, *[sum(steps)] * 3]
    assert sum("solved after" in text for _, text in texts) == 2
    assert {text for _, text in texts if "oracle" in text} == {"the oracle reports turn_on_led", "the oracle reports turn_on_lightbulb"}
    assert [step for step, _ in column(rollout, "/instruction", "TextDocument:text")] == [0, steps[0]]


def test_executed_motion_follows_commands(rollout, steps):
    commanded = np.array([value[0] for _, value in column(rollout, "/action/dz/commanded", "Scalars:scalars")])
    executed = np.array([value[0] for _, value in column(rollout, "/action/dz/executed", "Scalars:scalars")])
    assert len(commanded) == sum(steps)
    # The arm lags, but over a subtask it goes where it is sent (away from contact).
    half = steps[0] // 2
    assert abs(commanded[:half].sum() - executed[:half].sum()) < 2.0


def test_executed_action_by_hand():
    before, after = np.zeros(15), np.zeros(15)
    after[:3], after[3:6], after[6] = (0.02, -0.01, 0), (0.05, 0, 0), 0.08
    np.testing.assert_allclose(executed_action(before, after), [1, -0.5, 0, 1, 0, 0, 1])
    before[3], after[3], after[6] = np.pi - 0.02, -np.pi + 0.03, 0
    np.testing.assert_allclose(executed_action(before, after)[[3, 6]], [1, -1])


def test_video_is_as_long_as_the_rollout(rollout, steps):
    with av.open(str(rollout / "rollout.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert frames[0].shape == (672, 816, 3)
    shown = 2 * (1 + round(0.8 * 30 / STRIDE)) + sum((n - 1) // STRIDE for n in steps)
    assert len(frames) == shown
    assert np.abs(frames[0].astype(int) - frames[-1]).mean() > 1, "nothing moves"


def test_results_say_what_was_run(rollout):
    results = json.loads((rollout / "results.json").read_text())
    assert results["average_length"] == 2.0 and results["success_rate"] == [1.0, 1.0]
    assert any("turn_on_led → turn_on_lightbulb" in deviation for deviation in results["deviations"])


def test_report_stands_alone(rollout):
    page = (rollout / "report.html").read_text()
    assert "Not the official protocol" in page and "with deviations" in page
    for figure in ("<svg", 'id="positions"', 'id="tasks"', 'id="chains"', 'id="timing"', 'id="facts"', "<video", "PyBullet TinyRenderer"):
        assert figure in page
    assert page.count("data:image/jpeg;base64,") == 2
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources and all(source.startswith("data:") for source in sources)


def test_finished_rollouts_are_left_alone(rollout, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in rollout.iterdir()}
    main(RolloutConfig(policy="expert", tasks=("turn_on_led", "turn_on_lightbulb"), frame_stride=STRIDE, output_dir=str(rollout)))
    assert {path.name: path.stat().st_mtime_ns for path in rollout.iterdir()} == before
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["chain=1000"], "expected 0 to 999"),
        (["tasks=[opn_drawer]"], "did you mean 'open_drawer'"),
        (["tasks=[open_drawer,open_drawer]"], "no chain's initial state allows these"),
        (["frame_stride=0"], "at least 1"),
    ],
)
def test_wrong_options_are_said(overrides, message):
    with pytest.raises(UsageError, match=message):
        compose("rollout", ["policy=zero", *overrides])


def test_chosen_tasks_start_where_they_are_possible():
    index, (condition, tasks) = chain_of(["close_drawer", "open_drawer"])
    assert condition["drawer"] == "open" and tasks == ("close_drawer", "open_drawer")


def test_box_and_cylinder_are_closed_and_sized():
    for mesh, volume in ((box(np.array([0.1, 0.2, 0.3])), 0.006), (cylinder(length_m=0.5, radius_m=0.1), np.pi * 0.005)):
        a, b, c = mesh.positions.reshape(-1, 3, 3).transpose(1, 0, 2).astype(np.float64)
        assert np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6 == pytest.approx(volume, rel=0.02)
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-5)


def test_obj_indices_of_every_form(tmp_path):
    square = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nvn 0 0 1\n"
    for name, face in (
        ("plain", "f 1 2 3 4"),
        ("negative", "f -4 -3 -2 -1"),
        ("normals", "f 1//1 2//1 3//1 4//1"),
        ("all", "f 1/1/1 2/2/1 3/3/1 4/4/1"),
    ):
        (tmp_path / f"{name}.obj").write_text(square + face + "\n")
        mesh = load_mesh(tmp_path / f"{name}.obj", np.ones(3) * 2)
        np.testing.assert_allclose(mesh.positions, 2 * np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]]))
        np.testing.assert_allclose(mesh.normals, np.tile([0, 0, 1], (6, 1)))
    with pytest.raises(ValueError, match="holds no faces"):
        (tmp_path / "empty.obj").write_text("v 0 0 0\n")
        load_mesh(tmp_path / "empty.obj", np.ones(3))
    with pytest.raises(ValueError, match="not a whole binary STL"):
        (tmp_path / "cut.stl").write_bytes(b"\0" * 90)
        load_mesh(tmp_path / "cut.stl", np.ones(3))
    with pytest.raises(ValueError, match="cannot read .dae"):
        load_mesh(tmp_path / "x.dae", np.ones(3))


def test_visual_shapes_are_the_same_whoever_draws():
    from envs.calvin import CalvinEnv
    from envs.calvin.images.egl import RendererUnavailable

    plain = CalvinEnv("D", observe="on_demand")
    try:
        opengl = CalvinEnv("D", observe="on_demand", renderer="egl")
    except RendererUnavailable as error:
        pytest.skip(str(error))
    plain.reset(seed=1), opengl.reset(seed=1)
    shapes = opengl.simulation.visual_shapes()
    assert shapes == plain.simulation.visual_shapes()
    np.testing.assert_array_equal(opengl.simulation.visual_poses(shapes), plain.simulation.visual_poses(shapes))


def test_unknown_scene_of_the_environment_is_refused():
    with pytest.raises(ValueError, match="unknown scene 'Q'"):
        EnvConfig(scene="Q")
