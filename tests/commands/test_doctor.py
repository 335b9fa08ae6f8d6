"""The doctor: what is sound is found sound, and each thing that can be wrong is found, told and survived."""

import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from emu3_vla.cli import UsageError, compose, main
from emu3_vla.commands import examinations
from emu3_vla.commands.doctor import DoctorConfig, _progress, examine
from emu3_vla.commands.examinations import EXPECTED_MS, GROUPS, NOTE, OK, PROBLEM, WARNING
from envs.calvin.images import golden
from envs.calvin.original.fetch import COMMIT
from envs.calvin.original.manifest import damage


def _options(tmp_path: Path, **options: str) -> dict[str, str]:
    return {"output_dir": str(tmp_path), "assets": "", "policy": ""} | options


def _examine(group: str, tmp_path: Path, patience_s: float = 300, **options: str) -> dict[str, examinations.Finding]:
    """The findings of a group in its own process, by check."""
    found = list(examine(group, _options(tmp_path, **options), tmp_path / "log", patience_s))
    assert len({finding.check for finding in found}) == len(found)
    return {finding.check: finding for finding in found}


# -- the whole command


def test_a_sound_installation(tmp_path, capsys):
    command = ["doctor", "preset=debug", f"output_dir={tmp_path / 'out'}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "doctor.json").read_text())
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert list(findings) == ["python", "packages", "extras", "emu3-vla", "threads", "scenes", "physics", "contact", "frames", "speed"]
    assert report["problem"] == 0 and all(findings[check]["level"] == OK for check in ("python", "packages", "scenes", "physics", "frames"))
    assert findings["packages"]["figures"]["versions"]["numpy"] == np.__version__
    assert set(findings["physics"]["figures"]) == set("ABCD") and len(findings["frames"]["figures"]) == 8
    assert findings["emu3-vla"]["figures"]["version"] == importlib.metadata.version("emu3-vla")
    assert "TinyRenderer" in findings["speed"]["figures"]["renderer"]
    assert all(0 < value < 5000 for value in findings["speed"]["figures"]["median_ms"].values())
    assert f"no problems, {report['warning'] or 'no'} warning" in said and str(tmp_path / "out" / "doctor.json") in said
    assert all(f"{finding['level']:8} {check}" in said for check, finding in findings.items())
    assert main(command) == 0  # a report of then: written anew


def test_shipped_policy_decides(tmp_path):
    found = _examine("model", tmp_path)
    assert list(found) == ["torch", "policy", "policy speed"]
    assert found["torch"].level == found["policy"].level == OK
    assert np.shape(found["policy"].figures["actions"]) == (10, 7)
    assert found["policy speed"].figures["median_ms"]["decision"] > 0


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "OSError: libtorch_cpu.so: cannot open shared object file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "killed by signal SIGILL (Illegal instruction)"),
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "ModuleNotFoundError: No module named 'torch'"),
        ("import sys; sys.exit(3)", "ended with code 3"),
    ],
)
def test_broken_torch_is_one_problem_among_the_findings(torch, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "checks=[model,installation]", f"output_dir={tmp_path / 'out'}"])
    assert stopped.value.code == 1
    report = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert [finding["check"] for finding in report["findings"]] == ["model", "python", "packages", "extras", "emu3-vla", "threads"]
    assert report["problem"] == 1 and report["findings"][0]["said"] == said
    out = capsys.readouterr().out
    assert f"problem  model        {said}\n" in out and "→ install again what is missing or broken: pip install" in out
    assert "1 problem, " in out


def test_a_group_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert _examine("model", tmp_path, patience_s=1)["model"].said == "no answer within 1 s"


def test_findings_before_a_death_are_kept_and_noise_is_not_taken_for_them(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    text = """
        import os
        os.write(1, b"printed by a C library\\n"); print("printed by Python")
        __version__, ones = "9.9", lambda *size, device: __import__("numpy").ones(size)
        class cuda: device_count = lambda: 0
        class version: cuda = None
        get_num_threads = lambda: 1
    """
    (tmp_path / "torch" / "__init__.py").write_text("\n".join(line.strip() for line in text.splitlines()))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = _examine("model", tmp_path)
    assert list(found) == ["torch", "model"]
    assert found["torch"].level == OK and found["torch"].said.startswith("9.9 for the CPU")
    assert found["model"].level == PROBLEM
    assert "printed by a C library" in (tmp_path / "log").read_text() and "printed by Python" in (tmp_path / "log").read_text()


# -- single checks


def test_python_and_packages():
    assert examinations._python(">=3.11").level == OK
    old = examinations._python(">=99")
    assert old.level == PROBLEM and ">=99 is required" in old.said and "newer Python" in old.advice
    right, wrong, missing = Requirement("numpy>=2.0"), Requirement("scipy<1.0"), Requirement("no-such-thing")
    assert examinations._packages([right]).level == OK
    finding = examinations._packages([right, wrong, missing])
    assert finding.level == PROBLEM and "numpy" not in finding.said
    assert "scipy is " in finding.said and "<1.0 is required; no-such-thing is not installed" in finding.said
    assert finding.figures["versions"]["no-such-thing"] is None


def test_extras():
    finding = examinations._extras({"here": [Requirement("numpy")], "away": [Requirement("numpy"), Requirement("no-such-thing")]})
    assert finding.level == NOTE and "here installed, away not installed" in finding.said
    assert finding.figures["here"] is True and finding.figures["away"] is False


def test_threads_and_cores(tmp_path):
    assert examinations._threads(4, {}).level == OK
    assert examinations._threads(4, {"OMP_NUM_THREADS": "4"}).level == OK
    finding = examinations._threads(2, {"OMP_NUM_THREADS": "8"})
    assert finding.level == WARNING and "2 cores; OMP_NUM_THREADS=8" in finding.said and "OMP_NUM_THREADS=1" in finding.advice
    unlimited = examinations.cores(tmp_path / "none")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert examinations.cores(tmp_path / "cpu.max") == 0.5 < unlimited
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert examinations.cores(tmp_path / "cpu.max") == unlimited >= 1


def _difference(**change) -> golden.Difference:
    return golden.Difference(**({"length_m": 0.0, "angle_rad": 0.0, "flags": False, "equal": True} | change))


def test_physics():
    assert "to the last bit" in examinations._physics({"A": _difference()}).said
    close = examinations._physics({"A": _difference(), "B": _difference(length_m=1e-4, equal=False)})
    assert close.level == OK and "up to 0.1 mm" in close.said
    for change in ({"length_m": 2e-3}, {"angle_rad": 0.02}, {"flags": True}):
        finding = examinations._physics({"A": _difference(), "B": _difference(equal=False, **change)})
        assert finding.level == PROBLEM and "in scene B: up to" in finding.said and finding.advice
        assert not finding.figures["B"]["equal"]
    assert examinations._contact({"A": _difference()}).level == OK
    far = examinations._contact({"A": _difference(length_m=0.123, equal=False)})
    assert far.level == NOTE and "up to 123 mm" in far.said


def test_frames_that_differ_are_saved_beside_the_recorded_ones(tmp_path):
    frames = {camera: golden.recorded_frame("D", camera) for camera in golden.CAMERAS}
    states = golden.recorded_states()["own"]["D"]
    observed = golden.Observed(free=states["free"], contact=states["contact"], frames=frames)
    assert examinations._frames("own", {"D": observed}, tmp_path).level == OK and not list(tmp_path.iterdir())
    changed = frames["rgb_gripper"].copy()
    changed[:2] = 255 - changed[:2]  # 2 of 84 rows
    finding = examinations._frames(
        "own", {"D": golden.Observed(**vars(observed) | {"frames": frames | {"rgb_gripper": changed}})}, tmp_path
    )
    image = tmp_path / "difference_own_D_rgb_gripper.png"
    assert finding.level == PROBLEM and f"scene D rgb_gripper 2.4% (see {image})" in finding.said
    assert finding.figures == {"D rgb_static": 0.0, "D rgb_gripper": pytest.approx(2 / 84)}
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


def test_speed_is_judged_by_the_order_of_magnitude():
    assert examinations._speed("speed", {"step": 9 * EXPECTED_MS["step"]}).level == OK
    slow = examinations._speed("speed", {"step": 11 * EXPECTED_MS["step"], "reset": 1.0})
    assert slow.level == WARNING and "more than 10 times what is to be expected of step" in slow.said and "OMP_NUM_THREADS=1" in slow.advice


class _Decides:
    """A policy that decides on what it is given."""

    def __init__(self, actions):
        self.actions = np.asarray(actions, np.float32)

    def reset(self, instruction):
        pass

    def infer(self, observation):
        return {"actions": self.actions}


@pytest.mark.parametrize(
    ("actions", "level"),
    [
        (np.zeros((10, 7)), OK),
        (np.full((10, 7), np.nan), PROBLEM),
        (np.full((10, 7), 1.5), PROBLEM),
        (np.zeros((10, 6)), PROBLEM),
        (np.zeros(7), PROBLEM),
    ],
)
def test_actions_that_cannot_be_executed(actions, level, monkeypatch):
    monkeypatch.setattr("policies.load", lambda name: _Decides(actions))
    finding = next(iter(examinations._policy("some")))
    assert finding.level == level and finding.said.startswith("some ")


def test_a_checkpoint_that_lacks_a_part(tmp_path):
    finding = _examine("model", tmp_path, policy=str(tmp_path))["model"]
    assert finding.level == PROBLEM and "is not a whole checkpoint: policy.yaml is missing" in finding.said


def test_absence_of_egl_is_no_problem_and_its_renderer_is_named(monkeypatch):
    from envs.calvin import simulation
    from envs.calvin.images.cameras import RendererUnavailable

    class WithEgl:
        renderer = "PyBullet EGL: some vendor"

        def __init__(self, *arguments, renderer):
            assert renderer == "egl"

        def render_static(self):
            self.drawn = True

        def close(self):
            assert self.drawn

    def without(*arguments, renderer):
        raise RendererUnavailable("no libEGL.so.1")

    monkeypatch.setattr(simulation, "Simulation", WithEgl)
    (finding,) = examinations.egl({})
    assert finding.level == OK and finding.said == "PyBullet EGL: some vendor" and finding.figures["available"]
    monkeypatch.setattr(simulation, "Simulation", without)
    (finding,) = examinations.egl({})
    assert finding.level == NOTE and "no libEGL.so.1" in finding.said and not finding.figures["available"]


def test_egl_here_is_there_or_not_but_no_problem(tmp_path):
    (finding,) = _examine("egl", tmp_path).values()
    assert finding.level in (OK, NOTE), finding.said


# -- calvin_env's assets


def test_calvins_assets(calvin_assets, tmp_path):
    found = _examine("assets", tmp_path, assets=str(calvin_assets))
    assert [(check, finding.level) for check, finding in found.items() if check != "contact"] == [
        ("files", OK),
        ("scenes", OK),
        ("physics", OK),
        ("frames", OK),
    ]
    assert "the 119 files are those of calvin_env 797142c" in found["files"].said


def test_damaged_assets_are_named_and_seen(calvin_assets, tmp_path):
    folder = tmp_path / "calvin_env" / "data"
    shutil.copytree(calvin_assets, folder)
    for path in (folder / "calvin_table_D").rglob("*"):
        path.chmod(0o755)
    (folder / "calvin_table_D/textures").chmod(0o755)
    wood = folder / "calvin_table_D/textures/dark_wood.png"
    shutil.copy(folder / "calvin_table_B/textures/light_wood.png", wood)
    found = _examine("assets", tmp_path, assets=str(folder))
    assert found["files"].level == PROBLEM and found["files"].figures["different"] == ["calvin_table_D/textures/dark_wood.png"]
    assert "1 not those of calvin_env (calvin_table_D/textures/dark_wood.png)" in found["files"].said
    assert found["frames"].level == PROBLEM and "scene D rgb_static" in found["frames"].said and "scene A" not in found["frames"].said
    assert (tmp_path / "difference_calvin_env_D_rgb_static.png").is_file()
    wood.unlink()
    (finding,) = _examine("assets", tmp_path, assets=str(folder)).values()
    assert finding.level == PROBLEM and "1 missing (calvin_table_D/textures/dark_wood.png)" in finding.said
    assert "doctor --fetch-assets" in finding.advice
    (finding,) = _examine("assets", tmp_path, assets=str(folder.parent)).values()
    assert f"you mean assets={folder}" in finding.advice


def test_assets_that_are_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EMU3_VLA_CACHE", str(tmp_path / "cache"))
    for assets, folder in ((str(tmp_path / "nowhere"), tmp_path / "nowhere"), ("calvin_env", tmp_path / "cache" / "calvin_env")):
        (finding,) = examinations.assets(_options(tmp_path, assets=assets))
        assert finding.level == PROBLEM and f"{folder} is not a folder" in finding.said and "doctor --fetch-assets" in finding.advice


# -- options


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], False),
        (["fetch_assets=true"], True),
        (["--fetch-assets"], True),
        (["--fetch-assets=/data/calvin_env"], "/data/calvin_env"),
        (["fetch_assets=/data/calvin_env"], "/data/calvin_env"),
    ],
)
def test_both_spellings_of_fetching(overrides, wanted):
    assert compose("doctor", overrides).fetch_assets == wanted


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--fetch-asets"], "unknown option 'fetch_asets' of 'emu3-vla doctor'; did you mean 'fetch_assets'?"),
        (["checks=[simulater]"], "'simulater' is none of installation, .*; did you mean 'simulator'?"),
        (["checks=[assets]"], "needs assets="),
        (["fetch_url=file:///x.tar.gz"], "is for --fetch-assets, which is not given"),
        (["--fetch-assets", "fetch_url=/x.tar.gz"], "is no address; expected https://, http:// or file:///path"),
    ],
)
def test_wrong_options_are_said(overrides, message):
    with pytest.raises(UsageError, match=message):
        compose("doctor", overrides)


def test_groups_that_are_run():
    everything = tuple(GROUPS)
    assert DoctorConfig().groups == everything[:-1] and everything[-1] == "assets"
    assert DoctorConfig(assets="x").groups == everything
    assert DoctorConfig(checks=("egl",)).groups == ("egl",)


# -- fetching


def _archive(reference: Path, path: Path) -> str:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(reference / "calvin_data" / "LICENSE.calvin_env", f"calvin_env-{COMMIT}/LICENSE")
        archive.add(reference / "calvin_data" / "data", f"calvin_env-{COMMIT}/data")
    return path.as_uri()


def test_fetching_by_the_command(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMU3_VLA_CACHE", str(tmp_path / "cache"))
    url = _archive(reference, tmp_path / "a.tar.gz")
    assert main(["doctor", "--fetch-assets", f"fetch_url={url}", f"output_dir={tmp_path / 'one'}"]) == 0
    said, folder = capsys.readouterr().out, tmp_path / "cache" / "calvin_env"
    assert not damage(folder) and (folder / "LICENSE").is_file()
    assert said.index("MIT (calvin_env, © 2021 Oier Mees) and Apache-2.0") < said.index("downloaded: 119 files")
    assert "21 MB to download, 14 MB on disk" in said and said.strip().splitlines()[-1].startswith(f"{folder}   (env.assets=calvin_env;")
    assert json.loads((tmp_path / "one" / "doctor.json").read_text())["fetched"]["downloaded"] is True
    command = ["doctor", f"--fetch-assets={folder}", "fetch_url=file:///nowhere.tar.gz", f"output_dir={tmp_path / 'two'}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "there already: 119 files" in said and f"(env.assets={folder};" in said


def test_a_failed_fetch_is_one_line_and_leaves_nothing(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("top/data/blocks/block_red_big.urdf")
        member.size = 731
        archive.addfile(member, io.BytesIO(bytes(731)))
    url, out = (tmp_path / "a.tar.gz").as_uri(), tmp_path / "out"
    assert main(["doctor", f"--fetch-assets={tmp_path / 'got'}", f"fetch_url={url}", f"output_dir={out}"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emu3-vla: ")]
    assert len(lines) == 1 and "block_red_big.urdf has not the SHA-256 of calvin_env's file" in lines[0]
    assert not (tmp_path / "got").exists() and not out.exists()


def test_progress_tells_rate_and_time_left():
    assert _progress(1_000_000, 21_000_000, 0.2) == "1.0 of about 21.0 MB"
    assert _progress(10_000_000, 20_000_000, 5.0) == "10.0 of about 20.0 MB · 2.0 MB/s · 0:05 left"
    assert _progress(25_000_000, 20_000_000, 5.0).endswith("· 0:00 left")


def test_importing_the_doctor_loads_nothing_that_may_be_broken():
    code = (
        "import sys, emu3_vla.commands.doctor; "
        "loaded = {'torch', 'pybullet', 'numpy', 'gymnasium', 'rich', 'transformers'} & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
