"""How the cost of a step grows: with the teacher, the classes, the images and the number of terms.

A ResNet-18 learns from a ResNet-34, with the `Distillation` callback and alone, in turn; one thing is changed at a
time. Time and memory are measured as in `step_cost.py`.

    python benchmarks/scale.py --output benchmarks/results/scale
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import about
from _work import Work, classification
from step_cost import measure
from torchvision.models import resnet18, resnet34, resnet50, resnet101

BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]

GROWN: dict[str, dict[str, Callable[[], Work]]] = {
    "teacher": {
        make.__name__: lambda make=make: classification(batch_size=32, teacher=make)
        for make in (resnet18, resnet34, resnet50, resnet101)
    },
    "classes": {
        str(count): lambda count=count: classification(batch_size=32, classes=count)
        for count in (10, 100, 1000, 10_000)
    },
    "side of the images": {
        f"{side} px": lambda side=side: classification(side, batch_size=8) for side in (32, 64, 128, 224)
    },
    "terms": {
        str(1 + count): lambda count=count: classification(batch_size=32, hints=BLOCKS[len(BLOCKS) - count :])
        for count in (0, 1, 2, 4, 8)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="path of the figures, to which .json and .md are added")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    here = about() | {"steps": options.steps, "rounds": options.rounds}
    lines = [
        "| what grows | | student alone | distilled | x alone (range) | memory alone | memory beside |",
        "|---" * 7 + "|",
    ]
    found = {}
    for what, points in GROWN.items():
        for point, make in points.items():
            torch.manual_seed(0)
            rows = measure(
                make(), False, options.steps, options.rounds, ("student alone", "callback"), against="student alone"
            )
            found[f"{what}: {point}"] = rows
            alone, distilled = rows["student alone"], rows["callback"]
            lines.append(
                f"| {what} | {point} | {alone['seconds'] * 1e3:.0f} ms | {distilled['seconds'] * 1e3:.0f} ms "
                f"| {distilled['ratio']:.2f} ({distilled['ratio_min']:.2f} to {distilled['ratio_max']:.2f}) "
                f"| {alone['peak_bytes'] / 2**20:.0f} MiB "
                f"| {(distilled['peak_bytes'] - alone['peak_bytes']) / 2**20:.0f} MiB |"
            )
            print(lines[-1], flush=True)
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(here | {"points": found}, indent=1) + "\n")
        table = "\n".join(lines)
        options.output.with_suffix(".md").write_text(f"# How the cost of a step grows\n\n{here}\n\n{table}\n")


if __name__ == "__main__":
    main()
