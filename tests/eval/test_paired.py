"""Paired statistics against scipy, and comparisons that are refused."""

import copy
import json

import numpy as np
import pytest
from scipy import stats

from emu3_vla.cli import main as command_line
from eval.compare import NotComparable, compare
from eval.environment import EnvConfig
from eval.paired import holm, paired_bootstrap, sign_test
from eval.protocol import used_protocol
from eval.results import UnreadableResults, assemble, read_results
from eval.sequences import long_horizon_sequences


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (3, 9), (10, 10), (25, 7), (1, 0)])
def test_sign_test_agrees_with_scipy(wins, losses):
    assert sign_test(wins, losses) == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_sign_test_edges():
    assert sign_test(0, 0) == 1.0
    with pytest.raises(ValueError, match="counts are at least 0"):
        sign_test(-1, 2)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_paired_bootstrap_uses_the_pairs():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, 200)
    low, high = paired_bootstrap(a, a + 1, seed=0)
    assert (low, high) == (1.0, 1.0), "every chain differs by one, however much chains differ from each other"
    b = np.clip(a + rng.integers(-1, 3, 200), 0, 5)
    expected = stats.bootstrap((b - a,), np.mean, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose(paired_bootstrap(a, b, seed=0), expected, atol=0.03)
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_bootstrap([1], [1, 2], seed=0)


def results(solved, policy="p", error_at=()):
    chains = []
    for index, ((condition, subtasks), number) in enumerate(zip(long_horizon_sequences(len(solved)), solved, strict=True)):
        attempts = [
            dict(task=task, success=i < number, steps=10, decisions=1, policy_seconds=0.0, happened=[])
            for i, task in enumerate(subtasks[: number + 1])
        ]
        error = {"type": "E", "message": "broke"} if index in error_at else None
        chains.append(
            dict(index=index, initial_state=condition, subtasks=list(subtasks), num_solved=number, steps=10 * len(attempts))
            | dict(seconds=1.0, attempts=attempts, renderer="tiny", calvin_env="1431a46", error=error)
        )
    used = used_protocol(chains=len(solved), max_steps=360, tasks=34, scene="D", own_assets=True, version="1431a46", own_sentences=True)
    return assemble(chains, policy="zero", env=EnvConfig(), used=used, seed=0, config={}, wall_s=1.0) | {"policy": policy}


def test_comparison_by_hand():
    found = compare(results([0, 1, 5, 2], "a"), results([1, 1, 4, 5, 3], "b"))
    average = found["average_length"]
    assert (found["pairs"], found["only"]) == (4, {"a": 0, "b": 1})
    assert (average["a"], average["b"], average["difference"]) == (2.0, 2.75, 0.75)
    assert (average["wins"], average["losses"], average["ci95"]) == (2, 1, None)
    assert average["p"] == sign_test(2, 1)
    row = found["per_position"]["5"]
    assert (row["only_a"], row["only_b"], row["difference"]) == (1, 1, 0.0)
    assert sum(row["difference"] for row in found["per_position"].values()) == pytest.approx(0.75)
    assert sum(row["pairs"] for row in found["per_task"].values()) == 1 + 2 + 5 + 3


def test_chains_with_errors_are_no_pairs():
    found = compare(results([0, 1, 5]), results([1, 1, 4], error_at=(0,)))
    assert (found["pairs"], found["errors"]["b"]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.update(scene="B"), "scene is 'D' in a and 'B' in b"),
        (lambda r: r.update(simulator="calvin_env"), "simulator"),
        (lambda r: r.update(renderer="egl"), "renderer"),
        (lambda r: r["protocol"].update(max_steps=200), "protocol.max_steps is 360 in a and 200 in b"),
        (lambda r: r["protocol"].update(assets="calvin_env data/"), "protocol.assets"),
        (lambda r: r["protocol"].update(name="CALVIN MTLC"), "protocol.name"),
        (lambda r: r["protocol"].update(variants={"pushes": "often"}), "protocol.variants"),
        (lambda r: r["chains"][1].update(subtasks=["open_drawer"] * 5), "chains, number 1: subtasks"),
    ],
)
def test_unlike_results_are_refused_by_field(change, field):
    other = copy.deepcopy(results([1, 2]))
    change(other)
    with pytest.raises(NotComparable, match=field):
        compare(results([1, 2]), other)


def test_seeds_matter_where_variants_draw_from_them():
    a, b = results([1, 2]), results([2, 2]) | {"seed": 1}
    assert compare(a, b)["pairs"] == 2
    for side in (a, b):
        side["protocol"] = side["protocol"] | {"variants": {"pushes": "often"}}
    with pytest.raises(NotComparable, match="seed is 0 in a and 1 in b"):
        compare(a, b)


def test_nothing_in_common_is_refused():
    with pytest.raises(NotComparable, match="no chain was scored in both: 0 in a, 2 in b"):
        compare(results([1, 2], error_at=(0, 1)), results([1, 2]))


def test_unreadable_results_are_named(tmp_path, capsys):
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match="no results"):
        read_results(path)
    path.write_text("{")
    with pytest.raises(UnreadableResults, match="is not JSON"):
        read_results(tmp_path)
    path.write_text("[]")
    with pytest.raises(UnreadableResults, match="'policy' is missing"):
        read_results(path)
    assert command_line(["compare", f"a={path}", f"b={path}", f"output_dir={tmp_path / 'out'}"]) == 2
    assert "'policy' is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(average_length=4.0), "its average_length is 4.0, but its chains make 1.5"),
        (lambda r: r.update(success_rate=[1.0, 1.0, 0, 0, 0]), "its sum of success_rate is 2.0"),
        (lambda r: r["chains"][0].update(steps=5), "chain 0 states steps 5, but its attempts make 20"),
        (lambda r: r["chains"][0].update(num_solved=5), "chain 0 states num_solved 5, but its attempts make 1"),
        (lambda r: r.update(scored=3), "2 chains, 3 scored, but lists 2, 2 of them scored"),
        (lambda r: r.update(chains=[{}]), "its chains are not those of an evaluation"),
    ],
)
def test_figures_that_do_not_add_up_are_refused(tmp_path, change, said):
    wrong = results([1, 2])
    change(wrong)
    (tmp_path / "results.json").write_text(json.dumps(wrong))
    with pytest.raises(UnreadableResults, match=said):
        read_results(tmp_path)


def test_command_writes_and_prints(tmp_path, capsys):
    for name, solved in (("a", [0, 1] * 6), ("b", [1, 5] * 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results(solved, name)))
    assert command_line(["compare", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", f"output_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "average length 0.500 → 3.000: +2.500 (95 % interval" in printed
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    low, high = written["average_length"]["ci95"]
    assert 1 < low < 2.5 < high < 4
