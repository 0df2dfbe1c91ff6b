"""What was found for questions, as tables that a person reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lightning_kd.drawing import spread
from lightning_kd.metrics.retrieval import search

RIGHT = "✓"
"""Stands before what was judged to answer."""


def answers(
    texts: Sequence[str],
    numbers: Tensor,
    relevant: Sequence[Collection[int]],
    searches: Mapping[str, tuple[Tensor, Tensor]],
    count: int = 4,
    k: int = 3,
    length: int = 60,
) -> str:
    """Return tables in Markdown of what was found for some questions, evenly spread over those that were judged.

    Args:
        texts: Of documents and questions, N in any order.
        numbers: ``(N,)``, the documents', and -1 for a question.
        relevant: Of each text the numbers of the documents that answer it; those of a document are not read.
        searches: By name the embeddings ``(N, D)`` of whoever asks, and those of whoever made the index.
        count: Questions.
        k: Documents that are shown of each search, best first.
        length: Letters that are shown of a document at most.

    Example:
        >>> texts, numbers = ["birds fly", "fish swim", "who swims"], torch.tensor([0, 1, -1])
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]])
        >>> print(answers(texts, numbers, [(), (), (1,)], {"teacher": (embeddings, embeddings)}, k=2))
        **who swims** (1 of 2 documents answers it)
        <BLANKLINE>
        | found by | 1 | 2 |
        |---|---|---|
        | teacher | ✓ fish swim | birds fly |
    """
    numbers = numbers.cpu()
    (documents,) = torch.nonzero(numbers >= 0, as_tuple=True)
    asked = [i for i in torch.nonzero(numbers < 0).flatten().tolist() if relevant[i]]
    chosen = [asked[place] for place in spread(len(asked), count)]
    k = min(k, len(documents))
    found = {
        name: documents[search(queries.cpu()[chosen].float(), items.cpu()[documents].float(), k)].tolist()
        for name, (queries, items) in searches.items()
    }
    tables = []
    for place, question in enumerate(chosen):
        right = relevant[question]
        does = "answers" if len(right) == 1 else "answer"
        lines = [f"**{_cell(texts[question])}** ({len(right)} of {len(documents)} documents {does} it)", ""]
        lines += [f"| found by | {' | '.join(str(rank) for rank in range(1, k + 1))} |", "|---" * (k + 1) + "|"]
        for name, of_each in found.items():
            shown = [
                f"{RIGHT} " * (int(numbers[i]) in right) + _cell(_shortened(texts[i], length)) for i in of_each[place]
            ]
            lines.append(f"| {' | '.join([_cell(name), *shown])} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _shortened(text: str, length: int) -> str:
    """Return the first words of a text."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length].rpartition(' ')[0] or text[:length]} …"
