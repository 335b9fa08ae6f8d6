"""What `emu3-vla doctor` looks at. Each group runs in a process of its own, so that one that crashes says so and harms no other:

    python -m emu3_vla.commands.examinations simulator '{"output_dir": "/tmp"}'

prints one JSON object a line, a `Finding` each. Everything that may be broken is imported inside the group that looks at it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
REINSTALL = "install again what is missing or broken: pip install -c constraints.txt -e . (in the checkout)"

EXPECTED_MS = {"step": 1.0, "both images": 6.0, "reset": 14.0, "oracle": 0.6, "decision": 90.0}
"""Medians on one core of an AMD EPYC server, own assets, scene D; `oracle` asks for all 34 tasks, `decision` is the shipped policy's."""
SLOW = 10
"""Times the expected: less is a slower machine, more is something wrong."""
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report: what was looked at, how it is, and what to do about it; `figures` for the JSON file."""

    check: str
    level: str
    said: str
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


Findings = Iterator[Finding]
Options = dict[str, str]
"""output_dir; assets: calvin_env's data folder or ""; policy: a checkpoint's name or folder."""


# -- installation: needs the standard library and `packaging`


def installation(options: Options) -> Findings:
    """Python, packages, extras, cores and threads."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        ours = metadata.metadata("emu3-vla")
    except metadata.PackageNotFoundError:
        yield Finding(check="packages", level=PROBLEM, said="emu3-vla itself is not installed here", advice=REINSTALL)
    else:
        requirements = [Requirement(line) for line in ours.get_all("Requires-Dist") or []]
        yield _python(ours["Requires-Python"])
        yield _packages([one for one in requirements if _applies(one, "")])
        yield _extras({extra: [one for one in requirements if _applies(one, extra)] for extra in ours.get_all("Provides-Extra") or []})
        yield _ourselves(ours["Version"])
    yield _threads(cores(), os.environ)


def _python(required: str) -> Finding:
    import platform

    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    figures = {"version": version, "executable": sys.executable, "platform": platform.platform(), "processor": processor()}
    if SpecifierSet(required).contains(version, prereleases=True):
        return Finding(check="python", level=OK, said=f"{version} at {sys.executable}", figures=figures)
    said = f"{version} at {sys.executable}, {required} is required"
    return Finding(check="python", level=PROBLEM, said=said, advice="make a virtual environment with a newer Python", figures=figures)


def _applies(requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _packages(required: list) -> Finding:
    """Compare installed versions with what our metadata asks for (pyproject.toml as it was when we were installed)."""
    wrong = [said for said in map(_wrong, required) if said]
    figures = {"versions": {one.name: _installed(one.name) for one in required}}
    if wrong:
        return Finding(check="packages", level=PROBLEM, said="; ".join(wrong), advice=REINSTALL, figures=figures)
    return Finding(check="packages", level=OK, said=f"{len(required)} installed, in the versions that are required", figures=figures)


def _installed(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wrong(requirement) -> str:
    """What is wrong with the installed version, or nothing."""
    version = _installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, {requirement.specifier} is required"


def _extras(required: dict[str, list]) -> Finding:
    """What is optional: the extras of our metadata, and the original simulator, which has other ways to get there."""
    from importlib.util import find_spec

    there = {extra: not any(map(_wrong, ones)) for extra, ones in required.items()}
    there["the original simulator (calvin_env)"] = find_spec("calvin_env") is not None
    said = ", ".join(f"{name} {'installed' if is_there else 'not installed'}" for name, is_there in there.items())
    return Finding(check="extras", level=NOTE, said=f"optional: {said}", figures=there)


def _ourselves(version: str) -> Finding:
    from eval.provenance import git_commit

    commit, folder = git_commit(), Path(__file__).parents[2]
    said = f"{version} in {folder}, " + (f"commit {commit}" if commit else "not a git checkout")
    return Finding(check="emu3-vla", level=OK, said=said, figures={"version": version, "folder": str(folder), "git_commit": commit})


def _threads(available: float, settings) -> Finding:
    chosen = {name: settings[name] for name in THREAD_SETTINGS if name in settings}
    figures = {"cores": available, **chosen}
    said = f"{available:g} cores; " + (", ".join(f"{name}={value}" for name, value in chosen.items()) or "no thread count is set")
    if any(value.isdigit() and int(value) > max(1, available) for value in chosen.values()):
        advice = "threads that wait for a core make each other slow: export OMP_NUM_THREADS=1, or as many as there are cores"
        return Finding(check="threads", level=WARNING, said=said, advice=advice, figures=figures)
    return Finding(check="threads", level=OK, said=said, figures=figures)


def cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use: those of the machine, of its affinity, or of its container's quota, whichever is least."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            count = min(count, int(quota) / int(period))
    return count


def processor() -> str:
    """The processor's name as Linux gives it, or what Python knows."""
    import platform

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# -- simulator


def simulator(options: Options) -> Findings:
    """Our own scenes: do they load, behave and look as recorded, and how fast."""
    yield from _goldens("own", None, Path(options["output_dir"]))
    yield _loop_times()


def assets(options: Options) -> Findings:
    """calvin_env's assets in the folder `assets`: the files, and then what the scenes are like with them."""
    from envs.calvin.original.manifest import COMMIT, damage, required_files
    from envs.calvin.scenes import FETCHED_ASSETS, fetched_assets

    folder = fetched_assets() if options["assets"] == FETCHED_ASSETS else Path(options["assets"])
    advice = "'emu3-vla doctor --fetch-assets' downloads a good copy"
    if not folder.is_dir():
        yield Finding(check="files", level=PROBLEM, said=f"{folder} is not a folder", advice=advice)
        return
    if (folder / "data" / "calvin_table_D").is_dir():
        advice = f"you mean assets={folder / 'data'}"
    wrong = damage(folder)
    if wrong:
        figures = {"folder": str(folder), "commit": COMMIT} | asdict(wrong)
        yield Finding(check="files", level=PROBLEM, said=f"{folder}: {wrong}", advice=advice, figures=figures)
    else:
        said = f"{folder}: the {len(required_files())} files are those of calvin_env {COMMIT[:7]}"
        yield Finding(check="files", level=OK, said=said, figures={"folder": str(folder), "commit": COMMIT})
    if not wrong.missing:
        yield from _goldens("calvin_env", folder, Path(options["output_dir"]))


def _goldens(kind: str, folder: Path | None, output_dir: Path) -> Findings:
    from envs.calvin.images import golden

    began = time.perf_counter()
    observed = {scene: golden.observe(scene, folder) for scene in golden.SCENES}
    seconds = time.perf_counter() - began
    said = f"{', '.join(observed)} load and run"
    yield Finding(check="scenes", level=OK, said=said, figures={"seconds": seconds, "assets": str(folder) if folder else kind})
    recorded = golden.recorded_states()[kind]
    yield _physics({scene: golden.difference(one.free, recorded[scene]["free"]) for scene, one in observed.items()})
    yield _contact({scene: golden.difference(one.contact, recorded[scene]["contact"]) for scene, one in observed.items()})
    yield _frames(kind, observed, output_dir)


def _physics(differences: dict[str, Any]) -> Finding:
    """Judge the states of the free sequence, {scene: golden.Difference}."""
    largest_mm, largest_mrad, figures = _largest(differences)
    wrong = [scene for scene, one in differences.items() if not one.within_tolerance]
    if wrong:
        said = f"states differ from the recorded ones in scene {', '.join(wrong)}: up to {largest_mm:.3g} mm and {largest_mrad:.3g} mrad"
        advice = "results are not comparable with others'; is pybullet the required version, and are envs/calvin/assets unchanged?"
        return Finding(check="physics", level=PROBLEM, said=said, advice=advice, figures=figures)
    if all(one.equal for one in differences.values()):
        said = "states equal the recorded ones to the last bit (difference 0 mm)"
    else:
        said = f"states agree with the recorded ones: up to {largest_mm:.3g} mm and {largest_mrad:.3g} mrad apart"
    return Finding(check="physics", level=OK, said=said, figures=figures)


def _contact(differences: dict[str, Any]) -> Finding:
    largest_mm, largest_mrad, figures = _largest(differences)
    if all(one.equal for one in differences.values()):
        return Finding(check="contact", level=OK, said="pushing blocks ends in the recorded states to the last bit", figures=figures)
    said = (
        f"pushing blocks ends up to {largest_mm:.3g} mm from the recorded states: this machine rounds differently, and contact amplifies "
        "it; single episodes differ from other machines', averages do not"
    )
    return Finding(check="contact", level=NOTE, said=said, figures=figures)


def _largest(differences: dict[str, Any]) -> tuple[float, float, dict[str, Any]]:
    """The largest length [mm] and angle [mrad], and all of them for the JSON file."""
    figures = {
        scene: {"length_mm": 1e3 * one.length_m, "angle_mrad": 1e3 * one.angle_rad, "flags": one.flags, "equal": one.equal}
        for scene, one in differences.items()
    }
    values = figures.values()
    return max(one["length_mm"] for one in values), max(one["angle_mrad"] for one in values), figures


def _frames(kind: str, observed: dict[str, Any], output_dir: Path) -> Finding:
    """Judge both cameras in every scene, {scene: golden.Observed}; images of what differs go into `output_dir`."""
    from envs.calvin.images import golden

    figures, wrong = {}, []
    for scene, one in observed.items():
        for camera, frame, recorded in golden.comparable_frames(scene, one, kind):
            share = figures[f"{scene} {camera}"] = golden.share_off(frame, recorded)
            if share > golden.PIXELS_OFF_TOLERANCE:
                path = output_dir / f"difference_{kind}_{scene}_{camera}.png"
                golden.difference_image(frame, recorded).save(path)
                wrong.append(f"scene {scene} {camera} {share:.1%} (see {path})")
    pixels = "pixels" if kind == golden.OWN else f"block means ({', '.join(f'{side} px' for side in golden.MEAN_PIXELS.values())})"
    off = f"{pixels} off by more than {golden.PIXEL_TOLERANCE}/255"
    if wrong:
        advice = "a policy sees other images than it was trained on; are pybullet and the assets those that are required?"
        return Finding(check="frames", level=PROBLEM, said=f"{off}: {'; '.join(wrong)}", advice=advice, figures=figures)
    said = f"{len(figures)} recorded frames: at most {max(figures.values()):.2%} of {off}"
    return Finding(check="frames", level=OK, said=said, figures=figures)


def _loop_times() -> Finding:
    import numpy as np

    from envs.calvin.env import CalvinEnv
    from envs.calvin.images import golden
    from envs.calvin.tasks import completed_tasks

    env = CalvinEnv("D", observe="on_demand")
    start = env.reset(options=golden.start_state())[1]
    there, back = np.array([1, 1, 1, 0.5, 0.5, 0.5, 1]), np.array([-1, -1, -1, -0.5, -0.5, -0.5, 1])
    times_s: dict[str, list[float]] = {"step": [], "both images": [], "oracle": [], "reset": []}
    for index in range(40):
        info = _timed(times_s["step"], env.step, back if index % 2 else there)[4]
        if index % 4 == 0:
            _timed(times_s["both images"], env.observe)
            _timed(times_s["oracle"], completed_tasks, start, info)
    for _ in range(5):
        _timed(times_s["reset"], lambda: env.reset(options=golden.start_state()))
    env.close()
    return _speed("speed", {name: 1e3 * statistics.median(values) for name, values in times_s.items()}, {"renderer": env.renderer})


def _timed(seconds: list[float], function: Callable, *arguments):
    began = time.perf_counter()
    result = function(*arguments)
    seconds.append(time.perf_counter() - began)
    return result


def _speed(check: str, medians_ms: dict[str, float], figures: dict[str, Any] | None = None) -> Finding:
    """Compare medians with EXPECTED_MS by the order of magnitude."""
    said = ", ".join(f"{name} {value:.3g} ms" for name, value in medians_ms.items())
    figures = {"median_ms": medians_ms, "expected_ms": {name: EXPECTED_MS[name] for name in medians_ms}} | (figures or {})
    slow = [f"{name} (about {EXPECTED_MS[name]:g} ms)" for name, value in medians_ms.items() if value > SLOW * EXPECTED_MS[name]]
    if slow:
        said = f"{said}: more than {SLOW} times what is to be expected of {', '.join(slow)}"
        advice = "is the machine busy? otherwise export OMP_NUM_THREADS=1: thread pools of several processes hinder each other"
        return Finding(check=check, level=WARNING, said=said, advice=advice, figures=figures)
    return Finding(check=check, level=OK, said=said, figures=figures)


def egl(options: Options) -> Findings:
    """Whether images can be drawn by OpenGL. Nothing needs it: its absence is no fault."""
    from envs.calvin.images.cameras import RendererUnavailable
    from envs.calvin.scenes import OWN_ASSETS, scene_named
    from envs.calvin.simulation import PINNED, Simulation

    try:
        simulation = Simulation(scene_named("D"), OWN_ASSETS, PINNED, renderer="egl")
    except RendererUnavailable as error:
        said = f"not available, images are drawn on the CPU ({error})"
        yield Finding(check="egl", level=NOTE, said=said, figures={"available": False, "reason": str(error)})
        return
    simulation.render_static()
    yield Finding(check="egl", level=OK, said=simulation.renderer, figures={"available": True, "renderer": simulation.renderer})
    simulation.close()


# -- model


def model(options: Options) -> Findings:
    """torch, and the policy's first decisions."""
    yield from _torch()
    yield from _policy(options["policy"])


def _torch() -> Findings:
    import torch

    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names = {device: processor() if device == "cpu" else torch.cuda.get_device_name(device) for device in devices}
    figures = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": names, "threads": torch.get_num_threads()}
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    said = f"{torch.__version__} {built}; {torch.get_num_threads()} threads; {', '.join(devices)}"
    broken = [device for device in devices if float((torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum()) != 64**3]
    if broken:
        said += f"; a product of two matrices of ones is wrong on {', '.join(broken)}"
        yield Finding(check="torch", level=PROBLEM, said=said, advice="reinstall torch for this machine", figures=figures)
    else:
        yield Finding(check="torch", level=OK, said=said, figures=figures)


def _policy(name: str) -> Findings:
    import numpy as np

    import policies
    from envs.calvin.env import CalvinEnv
    from envs.calvin.images import golden
    from envs.spec import ACTION_DIM

    name = name or policies.SHIPPED
    began = time.perf_counter()
    policy = policies.load(name)
    load_s = time.perf_counter() - began
    env = CalvinEnv("D", observe="on_demand")
    env.reset(options=golden.start_state())
    observation = env.observe()
    env.close()
    times_s: list[float] = []
    for _ in range(5):
        policy.reset("open the drawer")
        actions = _timed(times_s, policy.infer, observation)["actions"]
    said = f"{name} loads in {load_s:.1f} s and decides on {len(actions)} actions"
    figures = {"policy": name, "load_s": load_s, "first_decision_ms": 1e3 * times_s[0], "actions": actions.tolist()}
    if actions.shape[1:] != (ACTION_DIM,) or not np.isfinite(actions).all() or np.abs(actions).max() > 1:
        said = f"{name} decides on actions that cannot be executed: shape {actions.shape}, from {actions.min()} to {actions.max()}"
        yield Finding(
            check="policy", level=PROBLEM, said=said, advice="is the checkpoint damaged? fetch or train it again", figures=figures
        )
        return
    yield Finding(check="policy", level=OK, said=said, figures=figures)
    yield _speed("policy speed", {"decision": 1e3 * statistics.median(times_s[1:])})


GROUPS: dict[str, Callable[[Options], Findings]] = {
    "installation": installation,
    "simulator": simulator,
    "egl": egl,
    "model": model,
    "assets": assets,
}


def main(group: str, options: Options) -> None:
    """Print the findings of one group as they come. What libraries print meanwhile, from C too, goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for finding in GROUPS[group](options):
            print(json.dumps(asdict(finding)), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
