"""Run by LeRobot's own interpreter: read a dataset through LeRobot and write down what it gives.

<python with lerobot> tests/data/lerobot_reader.py <dataset folder> <output.npz>
"""

import importlib.metadata
import sys

import numpy as np

try:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
except ModuleNotFoundError:  # older than 0.3
    from lerobot.common.datasets.lerobot_dataset import LeRobotDataset


def main(folder: str, output: str) -> None:
    dataset = LeRobotDataset("tests/written", root=folder, video_backend="pyav")
    items = [dataset[index] for index in range(len(dataset))]
    found = {"version": importlib.metadata.version("lerobot"), "fps": dataset.fps, "episodes": dataset.num_episodes}
    found["task"] = np.array([item["task"] for item in items])
    for key in dataset.features:
        if dataset.features[key]["dtype"] in ("video", "image"):
            pictures = np.stack([item[key].numpy() for item in items])
            found[key] = (pictures * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
        else:
            found[key] = np.stack([np.asarray(item[key]) for item in items])
    found |= {f"mean/{key}": np.asarray(dataset.meta.stats[key]["mean"]) for key in dataset.meta.stats}
    np.savez(output, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
