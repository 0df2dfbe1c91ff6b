"""The Cranfield collection: abstracts on aerodynamics, questions, and which abstracts answer them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_kd.data.splits import SplitDataModule
from lightning_kd.extras import late_import
from lightning_kd.models.text_embedder import tokenized, tokenizer_of
from lightning_kd.paths import data_root, expand_path

HELD = 100
"""Documents that are not trained on."""

WORST = 5
"""Grade of a document that is of no interest; the best is 1."""


class Text(NamedTuple):
    """A text, the number of its document (-1 for a query), the documents that answer it, and how well: their gains."""

    text: str
    number: int
    relevant: Sequence[int] = ()
    gains: Sequence[int] = ()


class Texts(Dataset[Text]):
    """Texts in memory."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts

    @property
    def names(self) -> list[str]:
        """What a person reads."""
        return [each.text for each in self.texts]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Text:
        """One text."""
        return self.texts[index]


class Cranfield(SplitDataModule):
    """1,398 abstracts and 225 questions in the test; to train on, titles and sentences of abstracts, and no judgment.

    Training batches are ``((ids, mask), numbers)``: titles and sentences, and the numbers of their documents, two texts
    of each, so that a loss of pairs has something to learn, too. In the test they are ``((ids, mask), numbers,
    relevant, gains)``, with -1 as the number of a question. The abstracts are those of the test; the questions and what
    answers them are seen in the test alone. For validation the titles of 100 documents that are not trained on are to
    find the texts of these.

    Documents 471 and 995 are empty and left out; the one judgment of them counts as missed. A judgment is the
    question's place in its file, 1 to 225, and not its own number; -1 is "not relevant", every other value is taken as
    relevant. By the collection's own ``cranqrel.readme`` 1 is a complete answer and 4 of minimum interest, so that the
    gain is 5 - grade. (Some libraries read the values the other way round.)

    Args:
        tokenizer: Folder, Python package or hub's name of the model whose tokenizer it is.
        root: Folder that holds ``cranfield/``; default: ``$LIGHTNING_KD_DATA``, else ``../shared/data``.
        batch_size: Texts in a batch.
        max_length: Tokens of a text at most; what is behind is not read.
        limit: Train on so many texts of the collection's first documents; all unless given.
        num_workers: Processes that load.

    Raises:
        FileNotFoundError: Without the files.
        ModuleNotFoundError: Without transformers or pytorch-metric-learning.

    Source: Cleverdon, The Cranfield tests on index language devices, 1967.
    """

    def __init__(
        self,
        tokenizer: str,
        root: str | None = None,
        batch_size: int = 64,
        max_length: int = 128,
        limit: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, self._batch)
        self.root = Path(expand_path(root)) if root else data_root()
        self.tokenizer = tokenizer_of(tokenizer)
        self.max_length = max_length
        self.limit = limit

    def setup(self, stage: str) -> None:
        """Read the collection."""
        if self.splits:
            return
        documents = {i: d for i, d in enumerate(self._records("cran.all.1400"), 1) if d.get("W", "").strip()}
        questions = [record["W"] for record in self._records("cran.qry")]
        answers, gains = defaultdict(list), defaultdict(list)
        for line in self._file("cranqrel").read_text().splitlines():
            question, document, grade = map(int, line.split())
            if grade != -1:
                answers[question].append(document)
                gains[question].append(WORST - grade)
        whole = [Text(d["W"], i) for i, d in documents.items()]
        asked = [Text(q, -1, answers[i], gains[i]) for i, q in enumerate(questions, 1)]
        self.splits["test"] = Texts([*whole, *asked])
        held = list(documents)[-HELD:]
        titles = [Text(documents[i]["T"], -1, [i], [1]) for i in held]
        self.splits["val"] = Texts([*(Text(_body(documents[i]), i) for i in held), *titles])
        pieces = [
            Text(piece, i)
            for i, d in documents.items()
            if i not in held
            for piece in (d["T"], *re.split(r"\s\.\s+", _body(d)))
            if len(piece.split()) > 3
        ]
        self.splits["train"] = Texts(pieces[: self.limit])

    def _file(self, name: str) -> Path:
        file = self.root / "cranfield" / name
        if not file.is_file():
            raise FileNotFoundError(
                f"no collection at {file}: set LIGHTNING_KD_DATA (or --data.init_args.root) to the folder that holds "
                f"cranfield/{name}"
            )
        return file

    def _records(self, name: str) -> list[dict[str, str]]:
        """The fields of each record, by their letters."""
        records = re.split(r"^\.I .*\n", self._file(name).read_text(), flags=re.M)[1:]
        fields = (re.split(r"^\.([A-Z])\s*\n", record, flags=re.M)[1:] for record in records)
        return [{k: " ".join(v.split()) for k, v in zip(f[::2], f[1::2], strict=True)} for f in fields]

    def _batch(self, texts: Sequence[Text]) -> tuple[Any, ...]:
        inputs = tokenized(self.tokenizer, [each.text for each in texts], self.max_length)
        numbers = torch.tensor([each.number for each in texts])
        if self.trainer is not None and self.trainer.training:
            return inputs, numbers
        most = max(len(each.relevant) for split in self.splits.values() for each in split.texts)  # type: ignore[attr-defined]
        relevant = _padded([each.relevant for each in texts], most, -1)
        return inputs, numbers, relevant, _padded([each.gains for each in texts], most, 0)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches with two texts of each of their documents."""
        samplers = late_import("pytorch_metric_learning.samplers", "pytorch-metric-learning", "retrieval")
        split = self.splits["train"]
        numbers = [each.number for each in split.texts]  # type: ignore[attr-defined]
        known, needed = len(set(numbers)), self.batch_size // 2
        if known < needed:
            raise ValueError(
                f"limit={self.limit} leaves texts of {known} documents, and a batch of batch_size={self.batch_size} is "
                f"of {needed}. Raise limit, or lower batch_size"
            )
        sampler = samplers.MPerClassSampler(numbers, 2, self.batch_size, length_before_new_iter=len(numbers))
        return DataLoader(
            split, self.batch_size, sampler=sampler, drop_last=True, num_workers=self.num_workers,
            collate_fn=self._collate, persistent_workers=self.num_workers > 0,
        )  # fmt: skip


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def _body(document: dict[str, str]) -> str:
    """The text without the title, which it begins with."""
    return document["W"].removeprefix(document["T"]).strip()
