"""Terms beside the shipped ones, in comparisons of `docs/results.md` without configurations.

    python benchmarks/other_terms.py omniglot_scores --seeds 0 1 2 --output omniglot_scores

Each row is a shipped configuration with another term; it is written into the folder that this is started in, and
`lightning-kd compare` goes on, with whatever else is given (`--trainer.max_epochs=1`). It needs LIGHTNING_KD_DATA.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kd import losses
from lightning_kd.cli import main
from lightning_kd.cli.configs import find


class OfItsClass(nn.Module):
    """MarginMSE in a batch, where a sample's first candidate is another one of its class; see `docs/retrieval.md`."""

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """Embeddings ``(B, D)`` of both, and labels ``(B,)``."""
        others = ~torch.eye(len(target), dtype=torch.bool, device=target.device)
        answers = (target[:, None] == target) & others
        order = (others.int() + answers.int()).argsort(dim=1, descending=True, stable=True)[:, :-1]  # itself is last
        student, teacher = (20 * F.normalize(x) @ F.normalize(x).T for x in (student, teacher))
        margins: Tensor = losses.MarginMSE()(student.gather(1, order), teacher.gather(1, order))
        return margins


def loss(name: str, inner: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a loss, around another one where it is given."""
    own = name if "." in name else f"lightning_kd.losses.{name}"
    return {"class_path": own, "init_args": ({"loss": inner} if inner else {}) | settings}


LISTWISE = loss("InBatch", loss("KD", temperature=1.0))
RELATIONS = loss("RKD", distance=1.0, angle=2.0)
MATRYOSHKA = loss("Matryoshka", RELATIONS, dims=[8, 64], whole_teacher=True)
OVER_CELLS = loss("Jointwise", loss("KD", temperature=0.1))
ABSOLUTE = loss("Jointwise", loss("torch.nn.L1Loss"))

ROWS: dict[str, tuple[str, dict[str, Any], float]] = {  # of which configuration, by which loss, with which weight
    "omniglot_infonce": ("omniglot_leaf", loss("InfoNCE"), 1.0),
    "omniglot_inbatch": ("omniglot_leaf", LISTWISE, 1.0),
    "omniglot_marginmse": ("omniglot_leaf", loss("InBatch", loss("MarginMSE")), 0.02),
    "omniglot_matryoshka": ("omniglot_rkd", MATRYOSHKA, 1.0),
    # As large as LEAF with 5: FitNet is the mean over the teacher's 64 numbers, LEAF their sum.
    "omniglot_fitnet": ("omniglot_leaf", loss("FitNet"), 320.0),
    "cranfield_infonce": ("cranfield_leaf", loss("InfoNCE"), 1.0),
    "cranfield_inbatch": ("cranfield_leaf", LISTWISE, 1.0),
    "cranfield_marginmse": ("cranfield_leaf", loss(f"{Path(__file__).stem}.OfItsClass"), 1.0),
    "cranfield_rkd": ("cranfield_leaf", RELATIONS, 1.0),
    "cranfield_pkt": ("cranfield_leaf", loss("PKT"), 10000.0),
    "cranfield_seed": ("cranfield_leaf", loss("SEED"), 1.0),
    "cranfield_matryoshka": ("cranfield_leaf", loss("Matryoshka", RELATIONS, dims=[48, 384], whole_teacher=True), 1.0),
    "face68_pose_heatmap_kd": ("face68_pose_heatmap", OVER_CELLS, 1.0),
    "face68_pose_squared": ("face68_pose_aloss", loss("Jointwise", loss("FitNet")), 30.0),
    "face68_pose_absolute": ("face68_pose_aloss", ABSOLUTE, 2.0),
}

COMPARISONS: dict[str, tuple[list[str], list[str]]] = {  # of which rows and shipped configurations, with which settings
    "omniglot_scores": (["omniglot_infonce", "omniglot_inbatch", "omniglot_marginmse"], []),
    "omniglot_matryoshka": (["omniglot_rkd", "omniglot_matryoshka"], ["--model.task.init_args.dims=[8]"]),
    "omniglot_projected": (["omniglot_fitnet"], ["--model.student.init_args.dim=32"]),
    "cranfield_scores": (["cranfield_infonce", "cranfield_inbatch", "cranfield_marginmse"], []),
    "cranfield_relations": (["cranfield_seed", "cranfield_rkd", "cranfield_pkt"], []),
    "cranfield_matryoshka": (["cranfield_rkd", "cranfield_matryoshka"], ["--model.task.init_args.dims=[48]"]),
    "face68_heatmap": (["face68_pose_heatmap", "face68_pose_heatmap_kd"], []),
    "face68_coordinates": (["face68_pose_aloss", "face68_pose_squared", "face68_pose_absolute"], []),
}


def written(name: str) -> str:
    """Write the configuration of a row, and return its file; a shipped one is its name."""
    if name not in ROWS:
        return name
    shipped, by, weight = ROWS[name]
    config: dict[str, Any] = yaml.safe_load(Path(find(shipped)).read_text(encoding="utf-8"))
    (term,) = config["model"]["terms"].values()
    config["model"]["terms"] = {name.rpartition("_")[2]: term | {"loss": by, "weight": weight}}
    file = Path(f"{name}.yaml")
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return f"./{file}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--output", required=True)
    given, options = parser.parse_known_args()
    names, settings = COMPARISONS[given.comparison]
    compare = ["compare", "--config", *map(written, names), "--seeds", *given.seeds, "--output", given.output]
    raise SystemExit(main([*compare, *settings, *options]))
