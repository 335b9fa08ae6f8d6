"""Run by LeRobot's own interpreter: record a dataset through LeRobot, and write down what was recorded.

    <python with lerobot> tests/data/lerobot_writer.py <dataset folder> <given.npz>

One camera is a video, the other lies in the rows as images.
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FRONT, STILL = "observation.images.front", "observation.images.still"
LENGTHS, TASKS = (12, 17), ("open it", "close it")


def main(folder: str, output: str) -> None:
    numbers = {"dtype": "float32", "shape": (6,), "names": [f"motor_{index}" for index in range(6)]}
    picture = {"shape": (64, 96, 3), "names": ["height", "width", "channels"]}
    features = {"action": numbers, "observation.state": numbers, FRONT: picture | {"dtype": "video"}, STILL: picture | {"dtype": "image"}}
    dataset = LeRobotDataset.create("tests/theirs", fps=15, features=features, root=folder)
    random, given = np.random.default_rng(0), {name: [] for name in features}
    down, across = np.mgrid[:64, :96]
    for length, task in zip(LENGTHS, TASKS, strict=True):
        for step in range(length):
            image = np.stack([60 + down, 40 + across, 120 + 0 * down], axis=2).astype(np.uint8)
            image[20:34, 3 * step : 3 * step + 14] = (220, 60, 40)
            frame = {"action": random.normal(size=6).astype(np.float32), "observation.state": random.normal(size=6).astype(np.float32)}
            frame |= {FRONT: image, STILL: image}
            for name, value in frame.items():
                given[name].append(value)
            try:
                dataset.add_frame({**frame, "task": task})
            except (TypeError, ValueError):  # 0.3 takes the task beside the frame
                dataset.add_frame(frame, task=task)
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()
    np.savez(output, **{name: np.stack(values) for name, values in given.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
