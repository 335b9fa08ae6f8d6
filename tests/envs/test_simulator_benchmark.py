"""The benchmark of the simulator measures what it says."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "simulator.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("simulator_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_original_assets_their_part_is_left_out(benchmark):
    baseline, plays = benchmark.loops(None)
    figures = benchmark.measure(plays, rounds=2)
    assert baseline == ""
    assert all(value > 0 for value in figures.values())
    assert not any("original" in name or "published" in name for name in figures)
    assert figures["own, step without images"] < figures["own, on demand"] < figures["own, both images every step"]
    assert list(benchmark.ratios(figures)) == ["oracle, % of our step without images"]


def test_ratios_are_to_the_published_loop(benchmark, calvin_assets, monkeypatch):
    monkeypatch.setattr(benchmark, "ACTIONS", benchmark.ACTIONS[:10])
    baseline, plays = benchmark.loops(calvin_assets)
    assert "calvin_env" in baseline
    figures = benchmark.measure(plays, rounds=1)
    ratios = benchmark.ratios(figures)
    assert ratios["own, on demand, times the published loop"] == figures["published loop"] / figures["own, on demand"] > 5
    assert figures["published loop"] > figures["original, both images every step"]


def test_bursts_look_as_often_as_they_say(benchmark):
    looks = []
    env = benchmark.CalvinEnv("D", observe="on_demand")
    play = benchmark.burst(env, 10, looks.append)
    looks.clear()
    assert play() > 0
    assert len(looks) == benchmark.BURST // 10
    env.close()
