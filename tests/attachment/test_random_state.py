import random
from pathlib import Path

import numpy as np
import torch

from lightning_kd.attachment.random_state import random_state, set_random_state


def drawn() -> tuple[float, ...]:
    return float(torch.rand(())), random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())


def test_a_file_that_is_no_code_brings_back_what_is_drawn_next(tmp_path: Path) -> None:
    drawn()  # an odd number of gaussians: both generators keep the second one of a pair
    torch.save(random_state(), tmp_path / "state.pt")
    expected = drawn()
    assert drawn() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn() == expected
