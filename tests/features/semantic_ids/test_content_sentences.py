"""Sentence encoders: what is asked of the library, and what is said where it is not there.

Where the library is not installed, a module with its two calls stands in for it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.dataset import Dataset
from features.semantic_ids.config import TextPart
from features.semantic_ids.content import Content, sentences
from features.semantic_ids.errors import SidsError
from tests.features.semantic_ids.content_logs import by_id, dataset, everything, histories, silent

INSTALLED = importlib.util.find_spec("sentence_transformers") is not None
COLUMNS = {"title": {"kind": "text"}, "body": {"kind": "text"}, "genre": {}}


class LetterModel:
    """Letters counted: a vector that a test can work out."""

    def __init__(self, name: str) -> None:
        if name == "nowhere":
            raise OSError("no such\n model")
        self.letters = "abcdefgh\n " if name == "letters" else "hgfedcba\n "

    def encode(self, texts: list[str], **options: Any) -> Any:
        assert options == {"batch_size": sentences.BATCH, "convert_to_numpy": True, "show_progress_bar": False}
        return np.array([[text.count(letter) for letter in self.letters] for text in texts], np.float64)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = SimpleNamespace(SentenceTransformer=LetterModel)
    monkeypatch.setitem(sys.modules, "sentence_transformers", stand_in)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    table = pa.table(
        {
            "item": [100, 101, 102, 103, 104],
            "title": ["a bad cab", "", None, " \t", "feed"],
            "body": ["face", "head", None, "", None],
            "genre": ["a", "b", None, "a", "a"],
        }
    )
    events = histories({1: [100, 101, 102, 103, 104]})
    return dataset(tmp_path_factory.mktemp("made"), events, items=table, columns={"item": COLUMNS})


def part(model: str = "letters", columns: tuple[str, ...] = ("item.title", "item.body")) -> TextPart:
    return TextPart(columns=list(columns), encoder="sentence_transformers", model=model)


@pytest.mark.usefixtures("library")
def test_the_text_columns_of_an_item_are_lines_of_one_text(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = sentences.fit(part(), made, 0, silent)
    found = by_id(fitted.open(made), made)
    texts = {100: "a bad cab\nface", 101: "head", 104: "feed"}
    assert {item for item, vector in found.items() if vector.any()} == set(texts)
    for item, text in texts.items():
        assert found[item].tolist() == LetterModel("letters").encode([text], **OPTIONS)[0].tolist()
    monkeypatch.setattr(sentences, "_CHUNK", 2)
    read = fitted.open(made)
    np.testing.assert_array_equal(everything(read, made), list(found.values()))
    assert read(np.array([], np.int64)).shape == (0, 10)


OPTIONS: dict[str, Any] = {"batch_size": sentences.BATCH, "convert_to_numpy": True, "show_progress_bar": False}


@pytest.mark.usefixtures("library")
def test_a_model_that_has_changed_is_noticed(made: Dataset) -> None:
    state = Content.fit([part()], made, 0, silent).state()
    again = Content.load([part()], state)
    assert everything(again.open(made), made).any()
    with pytest.raises(SidsError, match=r"model 'reversed' is not the one the codebook was fitted with"):
        Content.load([part("reversed")], state).open(made)


@pytest.mark.usefixtures("library")
def test_a_model_that_is_not_there_is_refused(made: Dataset) -> None:
    with pytest.raises(SidsError, match=r"model 'nowhere' cannot be loaded \(no such model\); name a folder"):
        Content.fit([part("nowhere")], made, 0, silent)


def test_only_text_is_read(made: Dataset) -> None:
    with pytest.raises(SidsError, match=r"'item.genre' is categorical.* of kind text; .*item.body \(text\)"):
        Content.fit([part(columns=("item.title", "item.genre"))], made, 0, silent)


def test_without_the_library_the_message_says_how_to_get_it(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None  # what makes Python say that there is no such module
    monkeypatch.setitem(sys.modules, "sentence_transformers", missing)
    with pytest.raises(
        SidsError, match=r"not installed \(sentence_transformers\): pip install -e '\.\[text\]', or use"
    ):
        Content.fit([part()], made, 0, silent)


if INSTALLED:  # an optional extra: where it is missing there is nothing to hold the stand-in against

    def test_the_library_itself_gives_the_vectors(made: Dataset, tmp_path: Path) -> None:
        """A random model of a few words, saved to a folder: no download."""
        library: ModuleType = importlib.import_module("sentence_transformers")
        static = importlib.import_module("sentence_transformers.models").StaticEmbedding
        tokenizers = importlib.import_module("tokenizers")
        words = {"[UNK]": 0, "bad": 1, "head": 2, "feed": 3}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        library.SentenceTransformer(modules=[static(tokenizer, embedding_dim=8)]).save(str(tmp_path / "model"))
        fitted = sentences.fit(part(str(tmp_path / "model")), made, 0, silent)
        found = by_id(fitted.open(made), made)
        expected = library.SentenceTransformer(str(tmp_path / "model")).encode(["head"])[0]
        np.testing.assert_allclose(found[101], expected, atol=1e-6)
        assert not found[102].any()
