"""The original simulator behind the adapter: state for state what CalvinEnv does, quietly, and with errors that say what to do.

Tests that run the original are skipped where calvin_env is not installed; those of the adapter's own errors run everywhere.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from envs import calvin_official
from envs.calvin.env import CalvinEnv
from envs.calvin.tasks import completed_tasks
from envs.calvin_official import MODULES, OfficialCalvinEnv, installed_version, package_folder
from envs.spec import RGB_GRIPPER, RGB_STATIC, InvalidAction

ROOT = Path(__file__).parents[2]
TRACES = ("A0", "C0", "D0", "D2", "D4", "Dabs0")
STAY = np.array([0, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture(scope="session")
def assets(calvin_assets):
    """calvin_env's data folder, where there are both it and the package."""
    try:
        package_folder()
    except ImportError as error:
        pytest.skip(f"calvin_env cannot be run: {error}")
    return calvin_assets


@pytest.fixture
def make(assets):
    """Makes environments of both simulators, new ones each time: the original's first reset is the one that is defined."""
    made = []

    def build(kind, scene="D", **options):
        if kind is CalvinEnv:
            options["version"] = installed_version()
        made.append(kind(scene, assets=assets, **{"observe": "on_demand"} | options))
        return made[-1]

    yield build
    for env in made:
        env.close()


@pytest.fixture(scope="module")
def official(assets):
    """One that has been used already; for what does not depend on that."""
    env = OfficialCalvinEnv("D", assets=assets, observe="on_demand")
    env.reset(seed=0)
    yield env
    env.close()


def assert_same_states(one, other):
    for key in ("robot_obs", "scene_obs"):
        np.testing.assert_allclose(one[key], other[key], rtol=0, atol=1e-9)


def share_of_different_pixels(one, other):
    return (np.abs(one.astype(int) - other.astype(int)).max(axis=-1) > 2).mean()


@pytest.mark.parametrize("name", TRACES)
def test_states_equal_ours_and_the_recorded_ones_at_every_step(name, reference, make):
    trace = np.load(reference / f"calvin/trace_{name}.npz")
    options = {"action_space": "absolute" if trace["absolute"] else "relative"}
    scene = json.loads(str(trace["meta"]))["scene"]
    theirs, ours = make(OfficialCalvinEnv, scene, **options), make(CalvinEnv, scene, **options)
    start = {"robot_obs": trace["robot_obs_reset"], "scene_obs": trace["scene_obs_reset"]}
    states = [env.reset(options=start)[0] for env in (theirs, ours)]
    for step in range(len(trace["actions"]) + 1):
        assert_same_states(*states)
        assert_same_states(states[0], {key: trace[key][step] for key in ("robot_obs", "scene_obs")})
        if step < len(trace["actions"]):
            states = [env.step(trace["actions"][step])[0] for env in (theirs, ours)]


@pytest.mark.parametrize("scene", "ABCD")
def test_images_and_random_starts_are_those_of_ours(scene, make):
    theirs, ours = (make(kind, scene, observe="always", seed=3) for kind in (OfficialCalvinEnv, CalvinEnv))
    assert theirs.observation_space == ours.observation_space and theirs.action_space == ours.action_space
    assert theirs.renderer == ours.renderer
    observations = [env.reset()[0] for env in (theirs, ours)]
    for step in range(3):
        assert all(theirs.observation_space.contains(observation) for observation in observations)
        assert_same_states(*observations)
        for camera in (RGB_STATIC, RGB_GRIPPER):
            assert share_of_different_pixels(*(observation[camera] for observation in observations)) <= 0.01, (camera, step)
        observations = [env.step(np.array([0.5, 1, -1, 0, 0, 0.5, -1]))[0] for env in (theirs, ours)]
    np.testing.assert_array_equal(theirs.render(), observations[0][RGB_STATIC])


def test_demonstrations_succeed_at_the_recorded_step(reference, make):
    demos, states = np.load(reference / "calvin/demos.npz"), np.load(reference / "calvin/initial_states.npz")
    recorded = json.loads(str(demos["index"]))["tasks"]
    for name in ("open_drawer", "turn_on_lightbulb", "lift_pink_block_table"):
        entry, env = recorded[name], make(OfficialCalvinEnv)
        _, start = env.reset(options={key: states[key][entry["sequence"]] for key in ("robot_obs", "scene_obs")})
        (subtasks, solved_at), solved = (entry["subtasks"], entry["success_at_step"]), []
        for step, action in enumerate(demos[f"{name}/actions"], start=1):
            info = env.step(action)[4]
            if len(solved) < len(subtasks) and completed_tasks(start, info, among=[subtasks[len(solved)]]):
                solved.append(step)
                start = info
        assert solved == solved_at, name


def test_info_is_laid_out_like_ours(make):
    layouts = []
    for kind in (OfficialCalvinEnv, CalvinEnv):
        info = make(kind).reset(seed=0)[1]
        layouts.append({part: {group: set(entries) for group, entries in info[part].items() if isinstance(entries, dict)} for part in info})
        assert set(info["robot_info"]) >= {"tcp_pos", "tcp_orn", "gripper_opening_width", "arm_joint_states", "contacts", "uid"}
    assert layouts[0] == layouts[1]


def test_joint_actions_where_the_installed_version_has_them(make):
    if installed_version() == "1431a46":
        with pytest.raises(ValueError, match="needs calvin_env 797142c; the installed one, 1431a46, has no joint control"):
            make(OfficialCalvinEnv, action_space="joint")
        return
    theirs, ours = (make(kind, action_space="joint") for kind in (OfficialCalvinEnv, CalvinEnv))
    states = [env.reset(seed=1)[0] for env in (theirs, ours)]
    goal = np.r_[states[0]["robot_obs"][7:14], -1]
    goal[0] += 0.1
    for _ in range(20):
        assert_same_states(*states)
        states = [env.step(goal)[0] for env in (theirs, ours)]
    assert states[0]["robot_obs"][7] == pytest.approx(goal[0], abs=5e-3)


def test_the_callers_action_is_left_as_it_was(official):
    action = np.array([0.1, -0.2, 0.3, 0.4, 0.5, -0.6, 1.0])
    official.step(action)
    np.testing.assert_array_equal(action, [0.1, -0.2, 0.3, 0.4, 0.5, -0.6, 1.0])


def test_two_in_one_process_leave_each_other_alone(make):
    first = make(OfficialCalvinEnv, seed=7)
    alone = first.reset()[0], first.observe()
    second = make(OfficialCalvinEnv, seed=7)
    assert_same_states(alone[0], second.reset()[0])
    for _ in range(10):
        second.step(np.array([1, 1, 1, 0, 0, 0, -1.0]))
    seen = first.observe()
    np.testing.assert_array_equal(seen[RGB_STATIC], alone[1][RGB_STATIC])
    assert_same_states(seen, alone[0])
    second.close()
    first.step(STAY)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"shape \(6,\), expected \(7,\)"),
        ([0, 0, np.nan, 0, 0, 0, 1], "NaN or infinite"),
        ([0, 0, 1.5, 0, 0, 0, 1], r"leaves \[-1, 1\]"),
        ([0, 0, 0, 0, 0, 0, 0.5], "exactly -1"),
    ],
)
def test_a_bad_action_is_named_and_moves_nothing(official, action, message):
    before = official.state()
    with pytest.raises(InvalidAction, match=message):
        official.step(action)
    assert_same_states(official.state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robot_obs": np.zeros(14)}, r"robot_obs has shape \(14,\), expected \(15,\)"),
        ({"scene_obs": np.full(24, np.nan)}, "scene_obs has a NaN"),
        ({"scene_obs": np.full(24, 0.5)}, "bulb and LED at .*, expected 0 or 1"),
        ({"scene": np.zeros(24)}, "unknown reset option 'scene'; known: robot_obs, scene_obs"),
    ],
)
def test_bad_reset_states_are_named(official, options, message):
    before = official.state()
    with pytest.raises(ValueError, match=message):
        official.reset(options=options)
    assert_same_states(official.state(), before)


def test_use_before_reset_and_after_close_is_named(make):
    env = make(OfficialCalvinEnv)
    with pytest.raises(ResetNeeded, match="call reset"):
        env.step(STAY)
    env.reset(seed=0)
    env.close()
    env.close()
    for use in (env.reset, env.state, env.observe, env.info, env.render, lambda: env.step(STAY)):
        with pytest.raises(ClosedEnvironmentError, match="OfficialCalvinEnv has been closed"):
            use()


def test_missing_assets_are_named(assets, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        OfficialCalvinEnv(assets=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="incomplete for scene D: no franka_panda"):
        OfficialCalvinEnv(assets=tmp_path)


QUIET = """
import sys
import pybullet  # says its build time, whoever imports it
from envs.calvin_official import OfficialCalvinEnv
sys.stderr.flush()
print("begins", flush=True)
print("begins", file=sys.stderr, flush=True)
hook = sys.excepthook
env = OfficialCalvinEnv("D", assets=sys.argv[1], observe="on_demand")
env.reset(seed=0)
env.step([0, 0, 0, 0, 0, 0, 1])
env.close()
assert sys.excepthook is hook
print(env.version)
"""


def test_outside_a_git_checkout_it_runs_and_prints_nothing(assets, tmp_path):
    package = shutil.copytree(package_folder(), tmp_path / "copied" / "calvin_env")
    path = os.pathsep.join((str(package.parent), str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"PYTHONPATH": path, "PATH": "", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(assets)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("begins\n")[1] == f"{installed_version()}\n"
    assert done.stderr.split("begins\n")[1] == ""


def test_an_evaluation_runs_in_it_and_says_so(assets, tmp_path):
    from eval.environment import EnvConfig
    from eval.run import EvalConfig, EvalOptions, main

    env = EnvConfig(simulator="calvin_env", assets=str(assets))
    main(EvalConfig(policy="expert", env=env, eval=EvalOptions(num_sequences=1, workers=1), output_dir=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["simulator"] == "calvin_env" and results["calvin_env"] == installed_version()
    assert results["renderer"] == "PyBullet TinyRenderer (CPU)" and results["chains"][0]["calvin_env"] == installed_version()
    assert results["average_length"] >= 1
    assert "simulator calvin_env" in (tmp_path / "report.html").read_text()


# -- without the original


def package_at(folder, monkeypatch, names=()):
    """A package calvin_env that Python finds in `folder` and nowhere else, with these files, all empty."""
    for name in names:
        path = folder / "calvin_env" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "calvin_env"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "__editable__" not in repr(finder)])


def test_a_missing_package_names_its_installation(tmp_path, monkeypatch):
    package_at(tmp_path, monkeypatch)
    with pytest.raises(ImportError, match=r"calvin_env, is not installed: pip install 'emu3-vla\[calvin\]'"):
        OfficialCalvinEnv()


def test_a_folder_that_hides_the_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "calvin_env").mkdir()
    package_at(tmp_path, monkeypatch)
    with pytest.raises(ImportError, match=f"takes the folder {tmp_path}/calvin_env for the package calvin_env: work in another folder"):
        OfficialCalvinEnv()


def test_an_incomplete_installation_is_named(tmp_path, monkeypatch):
    package_at(tmp_path, monkeypatch, ["__init__.py"])
    with pytest.raises(ImportError, match=r"incomplete: no camera/camera.py. Commit 1431a46 installs completely only from a checkout"):
        OfficialCalvinEnv()


def test_a_dependency_that_is_missing_is_named(tmp_path, calvin_assets):
    for name in ("__init__.py", *MODULES):
        (tmp_path / "calvin_env" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "calvin_env" / name).touch()
    (tmp_path / "calvin_env/envs/play_table_env.py").write_text("import no_such_dependency\n")
    code = "import sys; from envs.calvin_official import OfficialCalvinEnv; OfficialCalvinEnv(assets=sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", code, str(calvin_assets)], env=environment, capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: the package calvin_env in {tmp_path}/calvin_env cannot be imported: No module named 'no_such_d")


def test_other_code_than_the_two_commits_is_an_unknown_version(tmp_path, monkeypatch):
    package_at(tmp_path, monkeypatch, ["__init__.py", *MODULES])
    first = installed_version()
    (tmp_path / "calvin_env/robot/robot.py").write_text("changed")
    assert first.startswith("unknown (sha256 ") and installed_version() not in (first, *calvin_official.VERSIONS.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scene": "E"}, "unknown scene 'E'"),
        ({"observe": "allways"}, "did you mean 'always'"),
        ({"action_space": "relativ"}, "did you mean 'relative'"),
        ({"render_mode": "human"}, "render_mode='human' is not one of rgb_array"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        OfficialCalvinEnv(**options)
