"""The commands: files under their names, paths printed, sentences as they were typed, and one line where something is wrong."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from emu3_vla import cli
from emu3_vla.pipelines import media


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    for name in ("static", "gripper"):
        media.write_picture(folder / f"{name}.png", random.integers(0, 256, (40, 60, 3)).astype(np.uint8))
    mask = np.zeros((40, 60, 3), np.uint8)
    mask[:20] = 255
    media.write_picture(folder / "mask.png", mask)
    media.write_film(folder / "film.mp4", random.integers(0, 256, (3, 32, 32, 3)).astype(np.uint8), 6.0)
    np.save(folder / "actions.npy", np.zeros((1, 10, 7)))
    return folder


@pytest.fixture
def run(tiny_checkpoint, tmp_path, capsys):
    def run(*argv: str) -> tuple[int, list[str], str]:
        """The exit code, what was printed line by line, and the errors."""
        code = cli.main([*argv, f"checkpoint={tiny_checkpoint}", f"output_dir={tmp_path / 'out'}"])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err

    run.folder = tmp_path / "out"
    return run


def _sizes(path) -> tuple[int, int, int]:
    """Frames, height, width."""
    with av.open(str(path)) as container:
        frames = [frame for frame in container.decode(video=0)]
    return len(frames), frames[0].height, frames[0].width


def test_generate_image(run):
    code, out, _ = run("generate", "image", "prompt=the drawer is open, [the door] is left.", "count=2", "seed=1")
    assert code == 0
    names = [f"{camera}_{number}.png" for number in (0, 1) for camera in ("rgb_static", "rgb_gripper")]
    assert out[-4:] == [str(run.folder / name) for name in names]
    assert [Image.open(run.folder / name).size for name in names[:2]] == [(128, 128), (96, 96)]
    assert sorted(path.name for path in run.folder.iterdir()) == sorted([*names, "run.json"]), "nothing temporary is left"
    assert json.loads((run.folder / "run.json").read_text())["config"]["prompt"] == "the drawer is open, [the door] is left."


def test_generate_with_emu3s_vocabulary(published_folder, tmp_path, capsys):
    common = (f"checkpoint={published_folder}", f"output_dir={tmp_path / 'out'}", "ratio=2:1", "area=128")
    assert cli.main(["generate", "image", "prompt=a cat", "guidance=3", "negative=blurry, ugly", *common]) == 0
    path = tmp_path / "out" / "image.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(path) and Image.open(path).size == (16, 8)


def test_generate_video(run):
    code, out, _ = run("generate", "video", "prompt=go left", "frames=3", "window=2", "kept=1")
    assert code == 0 and out[-1] == str(run.folder / "video.mp4") and _sizes(out[-1]) == (3, 128, 128)


def test_extend(run, files):
    code, out, _ = run("extend", f"{files}/film.mp4", "frames=2")
    assert code == 0 and _sizes(out[-1]) == (5, 128, 128)


def test_ask_and_describe(run, files):
    both = f"image=[{files}/static.png,{files}/gripper.png]"
    code, out, _ = run("ask", both, "question=how fast?", "longest=4")
    assert code == 0
    answer = json.loads((run.folder / "answer.json").read_text())
    assert answer["question"] == "how fast?" and out[-1] == str(run.folder / "answer.json")
    assert out[-2].startswith(answer["answer"].splitlines()[-1] if answer["answer"].strip() else "")
    assert ("cut short" in out[-2]) == (answer["finish"] == "length")
    (run.folder / "answer.json").unlink()
    (run.folder / "run.json").unlink()
    assert run("describe", both, "longest=4")[0] == 0 and json.loads((run.folder / "description.json").read_text())["description"]


def test_interleave(run):
    code, out, _ = run("interleave", "prompt=go left", "steps=2", "step_text=4")
    text = (run.folder / "steps.md").read_text()
    assert code == 0 and text.startswith("# go left") and out[-1] == str(run.folder / "steps.md")
    assert text.count("![step") == len(list(run.folder.glob("step_*.png"))) >= 1


def test_imagine(run, files):
    both = f"image=[{files}/static.png,{files}/gripper.png]"
    code, out, _ = run("imagine", both, "prompt=go left", f"actions={files}/actions.npy")
    assert code == 0
    assert [Image.open(path).size for path in out[-2:]] == [(256, 128), (192, 96)], "now, and after the chunk"


def test_complete(run, files):
    code, out, _ = run("complete", f"{files}/static.png", f"{files}/mask.png")
    assert code == 0 and Image.open(out[-1]).size == (128, 128)


def test_reconstruct(run, files):
    code, out, _ = run("reconstruct", f"{files}/static.png")
    assert code == 0 and "dB" in out[-2] and Image.open(out[-1]).size == (120, 40), "original and reconstruction"


def test_reconstruct_a_video(run, files):
    code, out, _ = run("reconstruct", f"video={files}/film.mp4", "camera=rgb_gripper")
    assert code == 0 and _sizes(out[-1]) == (3, 96, 192)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("generate",), "needs to know what: image or video"),
        (("generate", "picture"), "image or video, not 'picture'"),
        (("generate", "image"), "the prompt is empty"),
        (("generate", "image", "prompt=x", "ratio=16:9"), "its own sizes alone (rgb_static 128×128, rgb_gripper 96×96)"),
        (("generate", "image", "prompt=x", "negative=ugly"), "does nothing without guidance"),
        (("generate", "image", "prompt=x", "temperature=-1"), "temperature is -1.0"),
        (("generate", "image", "prompt=x", "engine=fast"), "engine='fast', expected one of ours, transformers, vllm"),
        (("generate", "video", "prompt=x", "frames=0"), "frames=0, expected at least 1"),
        (("extend", "frames=1"), "give what is to be continued once"),
        (("extend", "{files}/film.mp4", "shown=9"), "has 3 frames: 9 from number 0 on"),
        (("extend", "{files}/none.mp4"), "does not exist"),
        (("extend", "episodes=x"), "say with shown="),
        (("ask", "question=x"), "give the pictures once"),
        (("ask", "question=x", "image={files}/static.png"), "this checkpoint is shown 2 pictures at once (rgb_static, rgb_gripper), not"),
        (("ask", "question=x", "video={files}/film.mp4"), "not about a video"),
        (("ask", "image={files}/static.png"), "the question is empty"),
        (("ask", "question=x", "video={files}/film.mp4", "state={files}/actions.npy"), "and video= is asked about"),
        (("ask", "question=x", "image=[{files}/static.png,{files}/gripper.png]", "state={files}/none.npy"), "none.npy does not exist"),
        (("ask", "question=x", "image=[{files}/static.png,{files}/gripper.png]", "state={files}/mask.png"), "is no array of numbers"),
        (("ask", "question=x", "image=[{files}/static.png,{files}/gripper.png]", "state={files}/actions.npy"), "was not told its arm's"),
        (("describe", "{files}/actions.npy"), "is no picture that can be read"),
        (("imagine", "prompt=x", "image={files}/static.png"), "no actions are given"),
        (("imagine", "prompt=x", "image=[{files}/static.png,{files}/gripper.png]", "actions={files}/mask.png"), "is no array of numbers"),
        (("complete", "{files}/static.png"), "a picture and its mask are needed"),
        (("reconstruct", "{files}/static.png", "video=x"), "give one thing to be reconstructed"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, files, argv, message):
    code, _, errors = run(*(part.format(files=files) for part in argv))
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not run.folder.exists()
