"""The report page: every figure, honest headlines, and no error in a real browser."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from emu3_vla.cli import UsageError, compose
from eval.charts import LABEL_APART, success_chart
from eval.published import ROWS
from eval.report import GALLERY_MOST, DifferentRules, ReportConfig, main, write_report
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
    assert text.count("<circle") == 5 and {path.name for path in tmp_path.iterdir()} == {"report.html"}


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


def strips(folder, chains, position=0, task="open_drawer"):
    """Pictures of failures, as an evaluation leaves them."""
    (folder / "failures").mkdir(exist_ok=True)
    for index in chains:
        picture = Image.new("RGB", (480, 160), (40 * (index % 6), 90, 160))
        picture.save(folder / "failures" / f"chain{index:04d}_{position + 1}_{task}.jpg")


def test_published_rows_add_up_and_name_their_source():
    for row in ROWS:
        assert row.source and row.trained_on in ("D", "ABC", "ABCD")
        if row.success_rate:
            assert sum(row.success_rate) == pytest.approx(row.average_length, abs=0.011)
            assert list(row.success_rate) == sorted(row.success_rate, reverse=True)


def test_published_rows_are_shown_beside_enough_chains_of_the_same_protocol(tmp_path):
    enough = page(tmp_path, results([chain(i, i % 6) for i in range(10)]))
    assert enough.count('class="published"') == len(ROWS) and "github.com/Robot-VLAs/RoboVLMs" in enough
    assert "no ranking" in enough and "ABC→D" in enough
    assert 'class="published"' not in page(tmp_path, results([chain(0, 3)]))
    other = results([chain(i, 1) for i in range(10)], protocol={"name": "CALVIN MTLC", "max_steps": 240})
    assert 'class="published"' not in page(tmp_path, other)


def test_single_tasks_have_a_rate_and_no_curve(tmp_path):
    chains = [chain(i, i % 2) | {"subtasks": ["open_drawer"]} for i in range(10)]
    for record in chains:
        record["attempts"] = record["attempts"][:1]
    text = page(tmp_path, results(chains, **summarise(chains, seed=0, length=1)))
    assert "50.0 %" in text and "of single subtasks solved" in text and "<polyline" not in text


def test_curve_has_its_points_where_the_rates_are():
    run = {"label": "this run", "name": "x", "color": "red", "results": results([chain(i, n) for i, n in enumerate((0, 5, 5, 5))])}
    chart = success_chart([run], ROWS[1:], 5)
    (line,) = chart["ours"]
    top, base = chart["grid"][-1]["y"], chart["base"]
    assert [point["y"] for point in line["points"]] == pytest.approx([base + 0.75 * (top - base)] * 5, abs=0.1)
    assert all(point["y_high"] < point["y"] < point["y_low"] for point in line["points"])
    heights = sorted(entry["label_y"] for entry in (*chart["ours"], *chart["published"]))
    assert min(np.diff(heights)) >= LABEL_APART - 0.2, "labels overlap"
    assert heights[-1] <= base


def test_failures_are_shown_for_as_many_tasks_as_possible_and_the_rest_counted(tmp_path):
    chains = [chain(i, 0) for i in range(GALLERY_MOST + 5)]
    chains[3]["attempts"][0]["task"] = "turn_on_led"
    strips(tmp_path, [i for i in range(len(chains)) if i != 3])
    strips(tmp_path, [3], task="turn_on_led")
    strips(tmp_path, [700])  # of a chain that these results do not hold
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "chain0003.rrd").touch()
    text = page(tmp_path, results(chains))
    assert text.count('class="failure"') == GALLERY_MOST and "5 more pictures are in the folder" in text
    assert text.count('href="recordings/chain0003.rrd"') == 1, "the only failure of its task is not among the first"
    assert "chain 700" not in text


def test_runs_side_by_side(tmp_path):
    text = page(tmp_path, results([chain(i, 5) for i in range(12)]), compare=[results([chain(i, 2) for i in range(12)], scene="A")])
    assert 'id="side-by-side"' in text and text.count('class="run"') == 2
    assert text.count("5.00") >= 2 and text.count("2.00") >= 2
    assert re.search(r'<tr><th>scene</th><td class="differs">D</td><td class="differs">A</td></tr>', text)


def test_results_of_another_protocol_are_refused_naming_the_field(tmp_path):
    other = results([chain(0, 1)], protocol={"name": "CALVIN LH-MTLC", "max_steps": 100})
    with pytest.raises(DifferentRules, match="protocol.max_steps is 360 here and 100"):
        page(tmp_path, results([chain(0, 1)]), compare=[other])
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_page_of_stored_results(tmp_path, capsys):
    for name, solved in (("a", 3), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results([chain(i, solved) for i in range(10)])))
    strips(tmp_path / "a", range(4), position=3)
    config = compose("report", [f"results={tmp_path / 'a'}", f"--compare={tmp_path / 'b'}", f"output_dir={tmp_path}"])
    assert config == ReportConfig(results=str(tmp_path / "a"), compare=(str(tmp_path / "b"),), output_dir=str(tmp_path))
    main(config)
    text = (tmp_path / "report.html").read_text()
    assert text.count('class="failure"') == 4 and text.count('class="run"') == 2 and "report.html" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no results"):
        main(ReportConfig(results=str(tmp_path / "c"), output_dir=str(tmp_path)))
    with pytest.raises(UsageError, match="names 4 results, expected at most 3"):
        compose("report", ["results=a", "compare=[b,c,d,e]"])


PROBE = """<script>addEventListener('load', () => {
  const box = name => document.querySelector(name)?.getBoundingClientRect() ?? {width: 0, height: 0};
  const drawn = name => box(name).width > 20 && box(name).height > 20;
  const wanted = ['#deviations', '#side-by-side', '#curve', '#positions', '#tasks', '#failures', '#chains', '#timing', '#facts'];
  const broken = [...document.images].filter(image => image.loading != 'lazy' && !image.naturalWidth).length;
  document.title = JSON.stringify({page: document.documentElement.scrollWidth, window: innerWidth,
    missing: wanted.filter(name => !drawn(name)), broken});
  document.body.dataset.probe = document.title;
})</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize("width", [420, 1400])
def test_a_browser_shows_every_figure_without_complaint(tmp_path, width):
    picture = np.zeros((240, 240, 3), np.uint8)
    thumbnail = {"chain": 0, "position": 0, "task": "open_drawer", "success": True, "image": picture}
    chains = [chain(i, i % 6) for i in range(30)]
    strips(tmp_path, [0, 6, 12])
    text = page(tmp_path, results(chains), thumbnails=[thumbnail], compare=[results(chains, scene="A")])
    (tmp_path / "probe.html").write_text(text.replace("</body>", PROBE + "</body>"))
    # A headless window is never narrower than 500 pixels; a frame in it is.
    outer = (
        f'<iframe src="probe.html" style="width:{width}px;height:900px"></iframe><script>onload = () => {{ document.body.dataset.probe = '
    )
    outer += "document.querySelector('iframe').contentDocument.body.dataset.probe }</script>"
    (tmp_path / "outer.html").write_text(f"<!DOCTYPE html><link rel=icon href=data:,><body>{outer}</body>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files", "--dump-dom"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,950", (tmp_path / "outer.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r'data-probe="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    assert seen["missing"] == [] and seen["broken"] == 0
    assert seen["window"] == width and seen["page"] <= width, "the page scrolls sideways"
