"""What trackers get beside the numbers, where they have a place for it: tables of completions, and the picture.

accelerate's trackers have no common interface for these; wandb's and TensorBoard's are known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from safe_train.run.tokens import spread

MOST = 32  # completions of a step

Rows = Sequence[Mapping[str, Any]]


def send_samples(trackers: Iterable[Any], rows: Rows, reward_B: Tensor, step: int) -> None:
    """Completions from the lowest reward to the highest, as a table."""
    names = [name for name in (rows[0] if rows else {}) if name != "step"]
    cells = [[cell(rows[i][name]) for name in names] for i in spread(reward_B, MOST)]
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.log_table("samples", columns=names, data=cells, step=step)
        elif tracker.name == "tensorboard":
            tracker.log({"samples": markdown([names, ["---"] * len(names), *cells])}, step=step)


def send_picture(trackers: Iterable[Any], path: Path, step: int) -> None:
    from matplotlib.image import imread

    image = imread(path)[..., :3]  # without its opacity, which TensorBoard takes for an error
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.log_images({"report": [image]}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({"report": image[None]}, step=step, dataformats="NHWC")


def cell(value: Any) -> Any:
    """A number, or text: a table's column has one type."""
    return value if isinstance(value, (int, float, str)) or value is None else str(value)


def markdown(lines: Iterable[Sequence[Any]]) -> str:
    def plain(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

    return "\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines)
