"""Published results on CALVIN's long-horizon chains, to be shown beside ours: calvin_env's scene D, policies trained on CALVIN's data.

Only what the named source prints; the sources are public, at the commit given where they are repositories.
"""

from __future__ import annotations

from dataclasses import dataclass

ROBOVLMS = "RoboVLMs, README (github.com/Robot-VLAs/RoboVLMs, 8adc1d2)"
UNIVLA = "UniVLA, README (github.com/baaivision/UniVLA, fbde41b)"
FLOWER = "FLOWER, results table (intuitive-robots.github.io/flower_vla)"
SIMULATOR = "calvin_env"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published row. success_rate: shares of chains with the first 1 to 5 subtasks solved; None where the source prints none."""

    method: str
    trained_on: str  # CALVIN's splits: D, ABC or ABCD, by the scenes that they were recorded in
    average_length: float
    success_rate: tuple[float, ...] | None
    source: str


ROWS = tuple(
    Published(method=method, trained_on=trained_on, average_length=average, success_rate=rates, source=source)
    for method, trained_on, average, rates, source in (
        ("UniVLA", "ABCD", 4.63, None, UNIVLA),
        ("KosMos (RoboVLMs)", "ABCD", 4.49, (0.967, 0.930, 0.899, 0.865, 0.826), ROBOVLMS),
        ("KosMos (RoboVLMs)", "ABC", 4.25, (0.980, 0.936, 0.854, 0.778, 0.704), ROBOVLMS),
        ("GR-1", "ABCD", 4.21, (0.949, 0.896, 0.844, 0.789, 0.731), ROBOVLMS),
        ("MDT", "D", 3.72, (0.937, 0.845, 0.741, 0.644, 0.556), FLOWER),
        ("GR-1", "ABC", 3.06, (0.854, 0.712, 0.596, 0.497, 0.401), ROBOVLMS),
        ("HULC", "ABCD", 3.06, (0.889, 0.733, 0.587, 0.475, 0.383), ROBOVLMS),
        ("HULC", "ABC", 0.67, (0.418, 0.165, 0.057, 0.019, 0.011), ROBOVLMS),
    )
)
