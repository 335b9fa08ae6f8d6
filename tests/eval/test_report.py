"""The report page: every figure, honest headlines, and no error in a real browser."""

import shutil
import subprocess

import numpy as np
import pytest

from eval.report import write_report
from eval.results import headline
from eval.statistics import summarise

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def chain(index, solved, error=None):
    attempts = [
        {"task": "open_drawer", "success": i < solved, "steps": 40, "decisions": 4, "happened": [] if i < solved else ["move_slider_left"]}
        for i in range(min(solved + 1, 5))
    ]
    return {
        "index": index,
        "subtasks": ["open_drawer"] * 5,
        "num_solved": solved,
        "steps": 40 * len(attempts),
        "seconds": 1.5,
        "attempts": attempts,
        "error": error,
    }


def results(chains, **changes):
    return {
        "policy": "a<b>",
        "protocol": {"name": "CALVIN LH-MTLC", "max_steps": 360},
        "deviations": ["the first 3 of the 1000 chains"],
        "simulator": "emu3-vla",
        "scene": "D",
        "assets": "own",
        "calvin_env": "1431a46",
        "renderer": "PyBullet TinyRenderer (CPU)",
        "seed": 0,
        "git_commit": None,
        "versions": {"python": "3.11"},
        "timing": {"steps": 1, "steps_per_s_and_worker": 2.0, "decisions": 3, "decision_ms": None, "chain_s": 4.0, "wall_s": 5.0},
        "num_sequences": len(chains),
        "chains": chains,
        **summarise(chains, seed=0),
        **changes,
    }


def page(tmp_path, content, **options):
    write_report(content, tmp_path / "report.html", **options)
    return (tmp_path / "report.html").read_text()


def test_page_shows_figures_and_escapes_names(tmp_path):
    chains = [chain(i, n) for i, n in enumerate((0, 1, 5, 5, 3, 2, 2, 4, 1, 0))]
    text = page(tmp_path, results(chains))
    assert "2.30" in text and "95 % interval" in text and "a&lt;b&gt;" in text and "a<b>" not in text
    assert "move slider left (8)" in text and "not run from a git checkout" in text
    assert text.count("<rect") == 5 and {path.name for path in tmp_path.iterdir()} == {"report.html"}


def test_few_chains_have_no_interval_in_the_headline(tmp_path):
    few = results([chain(0, 3)])
    assert "too few chains for an interval" in page(tmp_path, few)
    assert headline(few).startswith("average length 3.000 (1 chain; too few for an interval; simulator emu3-vla); deviates from CALVIN")


def test_official_results_have_no_deviation_in_the_headline(tmp_path):
    official = results([chain(i, 3) for i in range(10)], deviations=[])
    assert "deviat" not in headline(official) and 'id="deviations"' not in page(tmp_path, official)


def test_errors_are_told_apart(tmp_path):
    broken = {"type": "InvalidAction", "message": "a NaN <here>"}
    text = page(tmp_path, results([chain(0, 2), chain(1, 0, error=broken)]))
    assert "1 broken by an error" in text and "InvalidAction: a NaN &lt;here&gt;" in text
    nothing = results([chain(1, 0, error=broken)])
    assert "no score" in page(tmp_path, nothing) and headline(nothing) == "no chain was scored: all 1 ended by an error"


def test_large_videos_are_linked_and_small_ones_embedded(tmp_path, monkeypatch):
    (tmp_path / "rollout.mp4").write_bytes(b"x" * 100)
    assert 'src="data:video/mp4;base64,' in page(tmp_path, results([chain(0, 1)]), video=tmp_path / "rollout.mp4")
    monkeypatch.setattr("eval.report.EMBED_LIMIT_BYTES", 10)
    assert 'src="rollout.mp4"' in page(tmp_path, results([chain(0, 1)]), video=tmp_path / "rollout.mp4")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize("width", [390, 1400])
def test_a_browser_shows_it_without_complaint(tmp_path, width):
    picture = np.zeros((240, 240, 3), np.uint8)
    thumbnail = {"chain": 0, "position": 0, "task": "open_drawer", "success": True, "image": picture}
    page(tmp_path, results([chain(i, i % 6) for i in range(30)]), thumbnails=[thumbnail])
    # A page wider than its window scrolls sideways; the title says so after a moment.
    probe = "<script>addEventListener('load',()=>{document.title='width '+document.documentElement.scrollWidth+' of '+innerWidth})</script>"
    target = tmp_path / "probe.html"
    target.write_text((tmp_path / "report.html").read_text().replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", f"--window-size={width},900"]
    done = subprocess.run([BROWSER, *options, target.as_uri()], capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    shown, window = done.stdout.split("<title>width ")[1].split("</title>")[0].split(" of ")
    assert int(shown) <= int(window)
