"""Cutting a text before it is tokenised does not change its first ids."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import MODELS, words
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import QWEN, byte_level, folder_of, sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GemmaConfig, LlamaConfig, MistralConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pyterrier_llmrerank.checkpoints.tokenizer import open_tokenizer
from pyterrier_llmrerank.engine import inputs, text_cuts
from pyterrier_llmrerank.engine.inputs import RankLLaMAInputs, token_ids
from pyterrier_llmrerank.engine.text_cuts import CUT, CUT_AT_MARKS, cut_after, places_to_cut

QWEN_3_5 = QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"^\s\p{L}\p{N}", r"^\s\p{L}\p{M}\p{N}")
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    + CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    + CONTRACTIONS
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RAW = PreTrainedTokenizerFast.from_pretrained(MODELS / "mistral_base")
PARTS = st.sampled_from(
    [
        *("panda", "pan", "a", "Coffee", "don't", "42", "1234567", "大熊猫", "na", "i\u0308", "ï", "\u0301", "\u0600"),
        *(
            "\u00a8",
            "\u037a",
            "ﷺ",
            "ﬁ",
            "Σ",
            "</s>",
            "<s>",
            "<|endoftext|>",
            "york",
            "new",
            "\U0001f600",
            *("。", "\uff0c", "、", "\uff01", "\uff1f", "\uff1b", "大。", "熊\uff0c"),
            "▁",
            "_",
            "-",
        ),
        *("!", "...", "\x1c", "\x85", "\u00a0", "\u3000", "\t", "\n", "\r\n", " ", "  ", "   ", " ", " "),
    ]
)
TEXTS = st.lists(PARTS | st.text(max_size=3), max_size=40).map("".join)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def with_model(normalizer: Any, pre_tokenizer: Any, added: AddedToken | None = None, **options: Any) -> Any:
    """The tiny tokenizer with other steps, other model options or an added token."""
    made = Tokenizer.from_str(RAW.backend_tokenizer.to_str())
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    for name, value in options.items():
        setattr(made.model, name, value)
    if added is not None:
        made.add_tokens([added])
    return fast(made)


def with_piece(*pieces: str) -> PreTrainedTokenizerFast:
    """A tokenizer with merges across a space."""
    vocabulary = {piece: number for number, piece in enumerate(["▁", "a", "b", *pieces])}
    merges = [("a", "▁"), ("▁", "a"), ("a▁", "b")]
    made = Tokenizer(models.BPE(vocabulary, [pair for pair in merges if "".join(pair) in vocabulary], unk_token="b"))
    made.normalizer = normalizers.Replace(" ", "▁")
    return fast(made)


@cache
def slow(folder: Path, config: type, settings: tuple = (), **options: Any) -> PreTrainedTokenizerBase:
    said = {"tokenizer_class": "LlamaTokenizer", **dict(settings)}
    return open_tokenizer(folder_of(folder, None, said, tokenizer__model=sentencepiece(**options)), config())


REPLACE, PREPEND = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
KINDS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "prepend and replace": lambda _: RAW,
    "metaspace": lambda _: with_model(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace that splits": lambda _: with_model(None, pre_tokenizers.Metaspace()),
    "gemma": lambda _: with_model(REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    "normalised": lambda _: with_model(normalizers.Sequence([normalizers.NFKC(), PREPEND, REPLACE]), None),
    "lowercase": lambda _: with_model(normalizers.Sequence([normalizers.Lowercase(), REPLACE]), None),
    "an added token": lambda _: with_model(REPLACE, None, AddedToken("panda", lstrip=True, rstrip=True)),
    "an added word": lambda _: with_model(REPLACE, None, AddedToken("new", single_word=True, normalized=True)),
    "gpt2": lambda _: fast(byte_level()),
    "qwen": lambda _: fast(byte_level(normalizers.NFC(), QWEN)),
    "llama 3": lambda _: fast(byte_level(None, LLAMA3)),
    "tekken": lambda _: fast(byte_level(normalizers.NFKD(), TEKKEN)),
    "o200k": lambda _: fast(byte_level(None, O200K)),
    "qwen 3.5": lambda _: fast(byte_level(normalizers.NFC(), QWEN_3_5)),
    "sentencepiece": lambda folder: slow(folder, MistralConfig),
    "sentencepiece, not legacy": lambda folder: slow(folder, LlamaConfig, (("legacy", False),)),
    "sentencepiece, unigram": lambda folder: slow(folder, MistralConfig, model_type="unigram"),
    "sentencepiece, fewer spaces": lambda folder: slow(folder, MistralConfig, remove_extra_whitespaces=True),
    "sentencepiece, no bytes": lambda folder: slow(folder, GemmaConfig, byte_fallback=False, add_dummy_prefix=False),
}

#: Tokenizers that part words from punctuation.
PARTS_WORDS = ("gpt2", "qwen", "llama 3", "tekken", "o200k", "qwen 3.5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedTokenizerBase]:
    return cache(lambda kind: KINDS[kind](tmp_path_factory.mktemp("tokenizer") / "m"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_does_not_change_the_ids_before_it(kind: str, made: Callable) -> None:
    tokenizer = made(kind)
    places = places_to_cut(tokenizer)
    assert places is (CUT_AT_MARKS if kind in PARTS_WORDS else CUT)

    @given(TEXTS)
    def check(text: str) -> None:
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        for cut in places.finditer(text):
            before = tokenizer(text[: cut.start() + 1], add_special_tokens=False)["input_ids"]
            assert whole[: len(before)] == before

    check()


NOT_CUT = {
    "a piece across a space": lambda: with_piece("a▁", "a▁b"),
    "no piece for a space": lambda: fast(Tokenizer(models.BPE({"a": 0, "b": 1}, [], unk_token="b", fuse_unk=True))),
    "tokens of several words": lambda: fast(byte_level(None, r"\p{N}")),
    "an unknown pattern": lambda: fast(byte_level(None, r"\p{L}+ \p{L}+|\s+|.")),
    "a pattern that looks ahead": lambda: fast(byte_level(None, r"\p{L}(?=.*4)|\p{L}+|\s+|.")),
    "an added token across a space": lambda: with_model(REPLACE, None, AddedToken("new york", normalized=False)),
    "whole texts that are tokens": lambda: with_model(REPLACE, None, ignore_merges=True),
    "chance": lambda: with_model(REPLACE, None, dropout=0.5),
    "a normalizer of its own": lambda: with_model(
        normalizers.Sequence([normalizers.Replace(Regex("[a-z] [a-z]"), "x"), REPLACE]), None
    ),
    "a pre-tokenizer of its own": lambda: with_model(REPLACE, pre_tokenizers.UnicodeScripts()),
    "spaces merged with the word before": lambda: with_model(None, pre_tokenizers.Split(" ", "merged_with_previous")),
}


@pytest.mark.parametrize("kind", NOT_CUT)
def test_texts_are_cut_only_where_ids_provably_stay(kind: str) -> None:
    tokenizer = NOT_CUT[kind]()
    assert places_to_cut(tokenizer) is None
    text = words(1, 400) + " new york 4"
    assert cut_after(tokenizer, text, 10) == len(text)
    if kind != "chance":
        assert token_ids(tokenizer, [text], 3) == [tokenizer(text, add_special_tokens=False)["input_ids"][:3]]


@pytest.mark.parametrize(
    ("kind", "text", "cut"),
    [
        ("a piece across a space", "a b", 1),
        ("an unknown pattern", "panda tide", 5),
        ("a pattern that looks ahead", "panda 4", 5),
        ("an added token across a space", "new york", 3),
        ("a normalizer of its own", "a b", 1),
    ],
)
def test_a_cut_would_change_ids_for_the_tokenizers_left_out(kind: str, text: str, cut: int) -> None:
    tokenizer = NOT_CUT[kind]()
    whole, before = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, text[:cut]))
    assert whole[: len(before)] != before


@pytest.mark.parametrize("kind", ["prepend and replace", "qwen", "sentencepiece"])
def test_a_limit_gives_the_first_ids_of_a_text(kind: str, made: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "CHARACTERS_AN_ID", 1)
    monkeypatch.setattr(inputs, "CHARACTERS_A_CALL", 20)
    tokenizer = made(kind)

    @given(st.lists(TEXTS, max_size=5), st.integers(1, 30))
    def check(texts: list[str], limit: int) -> None:
        wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert token_ids(tokenizer, texts, limit) == [ids[:limit] for ids in wanted]
        assert token_ids(tokenizer, texts) == wanted

    check()


class Watched:
    """A tokenizer that records how many characters each call gets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(sum(map(len, texts)))
        return self.tokenizer(texts, **options)


def test_only_the_beginning_of_a_long_text_is_tokenised() -> None:
    long = [words(seed, 3_000) * 8 for seed in range(4)]
    watched = Watched(RAW)
    got = RankLLaMAInputs()(watched, [("panda", text) for text in [*long, "short"]])
    assert [ids.body for ids in got] == [
        [1, *RAW(text, add_special_tokens=False)["input_ids"][:164]] for text in [*long, "short"]
    ]
    assert min(map(len, long)) > 100_000
    assert sum(watched.calls) < 5 * 2_000
    assert [ids.passage_truncated for ids in got] == [True] * 4 + [False]


class Letters:
    """A tokenizer with an id per character, and no description of its steps."""

    added_tokens_decoder: ClassVar[dict[int, AddedToken]] = {}

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        self.calls.append(list(map(len, texts)))
        return {"input_ids": [list(map(ord, text)) for text in texts]}


def test_long_texts_that_cannot_be_cut_go_into_calls_of_limited_size() -> None:
    tokenizer, texts = Letters(), ["a b" * 300_000, "panda", "b c" * 50_000, "c" * 1_200_000, "tide"]
    assert token_ids(tokenizer, texts, 4) == [list(map(ord, text[:4])) for text in texts]
    assert tokenizer.calls == [[900_000, 5], [150_000], [1_200_000], [4]]


def test_a_tokenizer_is_examined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(text_cuts, "places_to_cut", lambda tokenizer: asked.append(tokenizer) or CUT)
    tokenizer = fast(byte_level())
    for _ in range(3):
        assert cut_after(tokenizer, "panda tide coffee", 7) == 10
        assert cut_after(tokenizer, "panda tide", 99) == 10
    assert asked == [tokenizer]


def test_a_long_text_without_spaces_is_cut_at_its_marks() -> None:
    tokenizer, text = fast(byte_level(None, QWEN)), "大熊猫吃竹子。" * 5_000
    assert cut_after(tokenizer, text, 1_000) == text.index("。", 1_000)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"][:50]
    watched = Watched(tokenizer)
    assert token_ids(watched, [text], 50) == [wanted]
    assert sum(watched.calls) < 10_000


def test_an_added_token_may_span_a_mark() -> None:
    tokenizer = fast(byte_level(None, QWEN))
    tokenizer.add_tokens([AddedToken("熊。", normalized=False)])
    assert places_to_cut(tokenizer) is CUT
