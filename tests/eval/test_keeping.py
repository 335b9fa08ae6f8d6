"""What an evaluation keeps beside its numbers: pictures of failures, recordings, and a stream to a viewer."""

import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rerun.chunk import RrdReader

from emu3_vla.cli import UsageError, compose
from envs.calvin import CalvinEnv
from envs.spec import RGB_STATIC
from eval import live
from eval.chain import run_chain
from eval.gallery import FRAME_SIZE, FRAMES, failures_in
from eval.keeping import Keep, keeping_watcher
from eval.live import ViewerUnavailable, viewer_address
from eval.protocol import load_instructions
from eval.recording import Recorder
from eval.rollout import RolloutConfig, chain_of, main
from eval.run import EvalConfig, EvalOptions
from eval.run import main as evaluate
from eval.watching import Camera
from policies.simple import ZeroPolicy

STEPS = 40


class Imagining(ZeroPolicy):
    """Stays where it is, in chunks of ten, and says all that a policy can say."""

    def infer(self, observation):
        actions = np.tile(super().infer(observation)["actions"], (10, 1))
        return {
            "actions": actions,
            "entropy": [0.5, 1.5],
            "coefficients": np.arange(70).reshape(10, 7),
            "clipped": 3,
            "scene": {"led": 1.0, "red_right": 0.1, "red_forward": -0.1, "red_up": 0.4, "red_turn": 0.5, "blue_right": 0.0},
            "imagined": {RGB_STATIC: np.full((200, 200, 3), 90, np.uint8)},
        }


@pytest.fixture(scope="module")
def env():
    return CalvinEnv("D", observe="on_demand")


def run(env, policy, watcher, tasks=("open_drawer",), max_steps=STEPS):
    index, chain = chain_of(tasks)
    return run_chain(env, policy, index, chain, load_instructions(), max_steps=max_steps, seed=0, watcher=watcher)


def contents(path):
    """Rows by entity, and (step, text) of the events."""
    rows, events = Counter(), []
    for chunk in RrdReader(str(path)).stream():
        rows[chunk.entity_path] += chunk.num_rows
        if chunk.entity_path == "/events":
            table = chunk.to_record_batch()
            (name,) = [name for name in table.schema.names if name.endswith("TextLog:text")]
            events += [(step, text[0]) for step, text in zip(table["step"].to_pylist(), table[name].to_pylist(), strict=True)]
    return rows, sorted(events)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """One chain that fails at once (chain 0), in a worker of its own."""
    folder = tmp_path_factory.mktemp("evaluation")
    options = EvalOptions(num_sequences=1, workers=1, max_steps=STEPS, record="failures")
    evaluate(EvalConfig(policy="zero", eval=options, output_dir=str(folder)))
    return folder


def test_an_evaluation_keeps_pictures_and_a_recording_of_a_failure(evaluation):
    (failure,) = failures_in(evaluation / "failures")
    assert (failure.chain, failure.position) == (0, 0)
    # 40 steps have the end and one second before it in them, but not two.
    assert Image.open(failure.path).size == (2 * FRAME_SIZE, FRAME_SIZE)
    assert [path.name for path in (evaluation / "recordings").iterdir()] == ["chain0000.rrd"]
    rows, events = contents(evaluation / "recordings" / "chain0000.rrd")
    assert rows["/chunk/executed"] == rows["/chunk/predicted"] == STEPS
    assert [step for step, text in events if "not solved" in text] == [STEPS]


def test_its_report_shows_them(evaluation):
    page = (evaluation / "report.html").read_text()
    assert page.count('class="failure"') == 1 and 'href="recordings/chain0000.rrd"' in page


def test_a_chain_that_runs_again_replaces_what_was_kept(env, tmp_path):
    keep = Keep(folder=str(tmp_path), max_steps=70, record="failures")
    run(env, ZeroPolicy(), keeping_watcher(keep), max_steps=70)
    (failure,) = failures_in(tmp_path / "failures")
    assert Image.open(failure.path).size == (FRAMES * FRAME_SIZE, FRAME_SIZE)
    from policies import load

    result = run(
        env, load("expert", scene="D"), keeping_watcher(Keep(folder=str(tmp_path), max_steps=360, record="failures")), max_steps=360
    )
    assert result.num_solved == 1
    assert failures_in(tmp_path / "failures") == [] and list((tmp_path / "recordings").iterdir()) == []


def test_solved_chains_are_recorded_when_all_are_asked_for(env, tmp_path):
    from policies import load

    keep = Keep(folder=str(tmp_path), max_steps=360, record="all")
    run(env, load("expert", scene="D"), keeping_watcher(keep), tasks=("turn_on_led",), max_steps=360)
    assert len(list((tmp_path / "recordings").glob("*.rrd"))) == 1


def test_pictures_change_no_result(env, tmp_path):
    alone = run(env, ZeroPolicy(), None).to_json()
    kept = run(env, ZeroPolicy(), keeping_watcher(Keep(folder=str(tmp_path), max_steps=STEPS, record="all"))).to_json()
    for record in (alone, kept):
        del record["seconds"]
        for attempt in record["attempts"]:
            del attempt["seconds"], attempt["policy_seconds"]
    assert alone == kept


def test_an_unknown_choice_of_recordings_is_refused():
    with pytest.raises(UsageError, match="did you mean 'failures'"):
        compose("eval", ["policy=zero", "eval.record=failure"])


def test_all_that_a_policy_says_is_recorded(env, tmp_path):
    recorder = Recorder(tmp_path / "a.rrd", title="a", camera=Camera(), frame_stride=7)
    run(env, Imagining(), recorder)
    recorder.close()
    rows, events = contents(tmp_path / "a.rrd")
    decisions = STEPS // 10
    for entity in ("predicted", "executed", "coefficients", "entropy"):
        assert rows[f"/chunk/{entity}"] == decisions, entity
    assert rows["/policy/entropy"] == rows["/policy/entropy_max"] == rows["/policy/clamped"] == decisions
    assert sum("3 of the chunk's 70 values clamped" in text for _, text in events) == decisions
    assert rows["/said/led"] == rows["/said/blue_right"] == rows["/world/said/red"] == decisions
    assert rows["/world/said/blue"] == 0, "nobody said where that is"
    assert rows["/imagined/static"] == decisions and rows["/imagined/gripper"] == 0
    # Each imagined frame has a real one beside it: every 7th step, every 10th, and the first.
    assert rows["/camera/static"] == 1 + len({*range(7, STEPS + 1, 7), *range(10, STEPS + 1, 10)})


def test_what_no_camera_sees_cannot_be_imagined(env, tmp_path):
    class Wrong(Imagining):
        def infer(self, observation):
            return super().infer(observation) | {"imagined": {"rgb_top": np.zeros((2, 2, 3), np.uint8)}}

    recorder = Recorder(tmp_path / "a.rrd", title="a", camera=Camera())
    error = run(env, Wrong(), recorder).error
    recorder.close()
    assert error["type"] == "ValueError" and "imagined 'rgb_top', expected cameras among rgb_static, rgb_gripper" in error["message"]


def test_a_simulator_without_open_bodies_is_recorded_without_its_world(env, tmp_path):
    class Closed:
        """As the original simulator looks to a recording."""

        def __init__(self):
            self.scene, self.renderer, self.version = env.scene, env.renderer, env.version
            self.reset, self.step, self.observe = env.reset, env.step, env.observe
            self.state, self.info, self.render = env.state, env.info, env.render

    recorder = Recorder(tmp_path / "a.rrd", title="a", camera=Camera())
    assert run(Closed(), ZeroPolicy(), recorder).error is None
    recorder.close()
    rows, _ = contents(tmp_path / "a.rrd")
    assert rows["/camera/static"] > 1 and not any(entity.startswith("/world") for entity in rows)


def test_a_chain_that_breaks_before_its_first_image_says_why(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no such state")

    monkeypatch.setattr("eval.chain.initial_state", broken)
    with pytest.raises(SystemExit, match="ValueError: no such state"):
        main(RolloutConfig(policy="zero", tasks=("open_drawer",), max_steps=2, output_dir=str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"recording.rrd", "results.json", "report.html"}


# -- live


@pytest.fixture
def viewer(tmp_path):
    """A headless viewer that writes what it is sent to a file: (process, address, file)."""
    import rerun_cli

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, file = Path(rerun_cli.__file__).with_name("rerun"), tmp_path / "viewer.rrd"
    if not program.is_file():
        pytest.skip("rerun-sdk was installed without its viewer")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, "--port", str(port), "--save", file], **quiet)
    address = f"rerun+http://127.0.0.1:{port}/proxy"
    for _ in range(150):
        if live._listens(address):
            break
        time.sleep(0.1)
    yield process, address, file
    process.terminate()
    process.wait()


@pytest.mark.filterwarnings("ignore:RRD file has no footer")
def test_a_rollout_is_streamed_to_a_viewer(viewer, tmp_path):
    process, address, file = viewer
    folder = tmp_path / "rollout"
    folder.mkdir()
    main(RolloutConfig(policy="zero", tasks=("open_drawer",), max_steps=10, live=address, output_dir=str(folder)))
    time.sleep(1)
    process.terminate()
    process.wait()
    sent, kept = contents(file), contents(folder / "recording.rrd")
    assert sent[1] == kept[1] and len(kept[1]) == 4
    assert sent[0]["/camera/static"] == kept[0]["/camera/static"] == 6


def test_a_viewer_that_goes_away_costs_the_recording_nothing(viewer, env, tmp_path, capsys):
    process, address, _ = viewer
    recorder = Recorder(tmp_path / "a.rrd", title="a", camera=Camera(), viewer=address)
    process.kill()
    process.wait()
    run(env, ZeroPolicy(), recorder, max_steps=10)
    recorder.close()
    rows, _ = contents(tmp_path / "a.rrd")
    assert rows["/camera/static"] == 6 and "the viewer was lost" in capsys.readouterr().err


def test_where_no_viewer_can_be_is_said(monkeypatch):
    monkeypatch.setattr(live, "_listens", lambda address: False)
    with pytest.raises(ViewerUnavailable, match=r"no Rerun viewer answers at live=rerun\+http://host:1/proxy; start `rerun`"):
        viewer_address("rerun+http://host:1/proxy")
    monkeypatch.setattr(live.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ViewerUnavailable, match="needs a screen, and neither DISPLAY nor WAYLAND_DISPLAY is set"):
        viewer_address(True)
    monkeypatch.setattr(live, "viewer_program", lambda: None)
    with pytest.raises(ViewerUnavailable, match="is not installed here"):
        viewer_address(True)


def test_live_is_a_flag_or_an_address():
    assert compose("rollout", ["policy=zero", "--live"]).live is True
    assert compose("rollout", ["policy=zero", "--live=rerun+http://a:9876/proxy"]).live == "rerun+http://a:9876/proxy"
    with pytest.raises(UsageError, match="live=a:b: expected true, false or a viewer's address"):
        compose("rollout", ["policy=zero", "--live='a:b'"])
