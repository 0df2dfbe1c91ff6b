"""What a step costs with several processes: a teacher in each, and nothing sent on its account.

As in `scale.py` a ResNet-18 learns from a ResNet-34, with the `Distillation` callback and alone, in turn; here with DDP
in as many processes as told, each with a batch of its own and one thread. Times are the clock's, since processes wait
for each other: have a core or a GPU for each, and nothing else running.

    python benchmarks/ranks.py --ranks 1 2 --output benchmarks/results/ranks.json
"""

import argparse
import json
import logging
import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
from _machine import about
from _work import classification
from step_cost import measure

WAYS = ("student alone", "callback")


def one(rank: int, ranks: int, port: int, options: argparse.Namespace, file: Path) -> None:
    """Measure in one of the processes, as torchrun would start it."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": port}
    os.environ.update({key: str(value) for key, value in given.items()})
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    work = classification(64, batch_size=options.batch_size)
    rows = measure(work, False, options.steps, options.rounds, WAYS, against=WAYS[0])
    if rank == 0:
        file.write_text(json.dumps(about() | {"rows": rows}, indent=1) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Start them, and put together what the first of each wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    print("| ranks | student alone | distilled | x alone (range) | memory beside, each |\n" + "|---" * 5 + "|")
    found = {}
    for ranks in options.ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(one, (ranks, port, options, options.output), nprocs=ranks)
        found[str(ranks)] = json.loads(options.output.read_text())
        alone, distilled = (found[str(ranks)]["rows"][way] for way in WAYS)
        print(
            f"| {ranks} | {alone['seconds'] * 1e3:.0f} ms | {distilled['seconds'] * 1e3:.0f} ms "
            f"| {distilled['ratio']:.2f} ({distilled['ratio_min']:.2f} to {distilled['ratio_max']:.2f}) "
            f"| {(distilled['peak_bytes'] - alone['peak_bytes']) / 2**20:.0f} MiB |",
            flush=True,
        )
    options.output.write_text(json.dumps({"batch_size": options.batch_size, "ranks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
