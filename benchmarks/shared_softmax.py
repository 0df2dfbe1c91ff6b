"""What two terms on one pair of logits would save if they shared their softmaxes, beside the step that they are in.

`KD` and `DKD` both need the logarithm of the softmax of the student's logits and of the teacher's, at one temperature.
Sharing would save one of the two forwards on each side, and one backward on the student's. In turn, by processor time.

    python benchmarks/shared_softmax.py --classes 1000 --batch-size 256
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _user import sgd
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet18

from lightning_kd import functional

TEMPERATURE = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    shape = options.batch_size, options.classes
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape)
    images, target = torch.randn(options.batch_size, 3, 32, 32), torch.randint(options.classes, shape[:1])
    student = resnet18(num_classes=options.classes)
    optimizer, gradient = sgd(student.parameters()), torch.randn(shape)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(student(images), target).backward()
        optimizer.step()

    def terms() -> None:
        kd: Tensor = functional.kd(s, t, temperature=TEMPERATURE)
        (kd + functional.dkd(s, t, target, temperature=TEMPERATURE)).backward()

    def saved() -> None:
        with torch.no_grad():
            (t / TEMPERATURE).log_softmax(1)
        (s / TEMPERATURE).log_softmax(1).backward(gradient)

    measured: dict[str, Callable[[], None]] = {
        "step of the student alone, ResNet-18 at 32 px": step,
        "KD and DKD, forward and backward": terms,
        "of it in both": saved,
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    for warming in [True] + [False] * options.rounds:
        for name, run in measured.items():
            repeated = 1 if run is step else 20
            begun = time.process_time()
            for _ in range(repeated):
                run()
            if not warming:
                times[name].append((time.process_time() - begun) / repeated)
    steps = times[next(iter(measured))]
    for name, each in times.items():
        shares = [100 * part / whole for part, whole in zip(each, steps, strict=True)]
        print(
            f"{name:46} {1e3 * statistics.median(each):8.2f} ms   {statistics.median(shares):7.2f} % of the step "
            f"({min(shares):.2f} to {max(shares):.2f})"
        )


if __name__ == "__main__":
    main()
