"""Tokenizers make the ids that the code which made their vocabularies makes; what cannot be vouched for is refused."""

import io
import json
import shutil
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, words
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from pyterrier_llmrerank import MatroyshkaReranker, RankLLaMAReranker
from pyterrier_llmrerank.checkpoints.matroyshka_checkpoint import MatroyshkaCheckpoint
from pyterrier_llmrerank.checkpoints.rankllama_checkpoint import RankLLaMACheckpoint
from pyterrier_llmrerank.checkpoints.tokenizer import open_tokenizer, save_tokenizer

FULL, RAW = MODELS / "costwise_full", MODELS / "mistral_base"
BASE, ADAPTER = MODELS / "rankllama_base", MODELS / "rankllama_adapter"
TEXTS = [
    *(words(seed, 9) for seed in range(20)),
    *("", " ", "\n", " lead", "two  spaces ", "tab\tx", "a\n\nb 123", "\U0001f600 emoji", "nai\u0308ve e\u0301"),
    "▁x a▁b", "don't WE'LL", "query: 大熊猫", "document:  x", "\U0001f9ff",
]  # fmt: skip
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def sentencepiece(**options: object) -> bytes:
    """A tiny sentencepiece model, trained as Llama's was unless told otherwise."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    usual = {
        "vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    trainer.train(sentence_iterator=iter([words(i, 12) for i in range(300)]), model_writer=model, **usual | options)
    return model.getvalue()


def byte_level(normalizer: object = None, regex: str | None = None) -> Tokenizer:
    """A tiny tokenizer of merged bytes: GPT-2's kind, or with a regex Qwen's and Llama 3's."""
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    split = [] if regex is None else [pre_tokenizers.Split(Regex(regex), "isolated")]
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([*split, levels])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([words(i, 12) for i in range(300)], trainer)
    return made


def folder_of(path: Path, model: Path | None, settings: dict[str, object] | None, **files: bytes) -> Path:
    """Make a folder with these files in place of a tokenizer, and optionally with a model."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for file in model.iterdir() if model is not None else ():
        if "token" not in file.name:
            shutil.copy(file, path)
    if settings is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in files.items():
        (path / name.replace("__", ".")).write_bytes(content)
    return path


def ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


EMPTY = Tokenizer(models.BPE())
EMPTY.add_special_tokens(["<s>", "</s>"])
NAMED = {"tokenizer_class": "LlamaTokenizer", "sp_model_kwargs": {}, "pad_token": None, "add_bos_token": True}


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("model", [FULL, RAW, BASE])
def test_tokenizer_model_alone_is_run_by_sentencepiece(tmp_path: Path, model: Path, legacy: bool | None) -> None:
    """Slow tokenizers save such files, and so does the released Matroyshka training code."""
    vocabulary = sentencepiece()
    processor = sys.modules["sentencepiece"].SentencePieceProcessor(model_proto=vocabulary)
    folder = folder_of(tmp_path / "m", model, NAMED | {"legacy": legacy}, tokenizer__model=vocabulary)
    tokenizer = MatroyshkaCheckpoint(str(folder), (), None).tokenizer()
    assert ids(tokenizer) == processor.encode(TEXTS)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, None)
    save_tokenizer(tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "LlamaTokenizer"
    again = open_tokenizer(tmp_path / "saved", MistralConfig())
    assert ids(again) == processor.encode(TEXTS)
    assert again.bos_token_id == 1
    assert again("a</s>b")["input_ids"] == tokenizer("a</s>b")["input_ids"]


@pytest.mark.parametrize(
    ("named", "options", "config"),
    [
        ("GemmaTokenizer", {"add_dummy_prefix": False}, GemmaConfig),
        ("LlamaTokenizerFast", {"model_type": "unigram"}, MistralConfig),
        ("LlamaTokenizer", {"byte_fallback": False, "normalization_rule_name": "nmt_nfkc"}, LlamaConfig),
        ("CodeLlamaTokenizer", {"remove_extra_whitespaces": True}, LlamaConfig),
        ("LlamaTokenizer", {"user_defined_symbols": ["panda", "▁▁▁"]}, Qwen2Config),
        (None, {}, MistralConfig),
        (None, {}, LlamaConfig),
    ],
)
def test_the_settings_of_the_sentencepiece_model_are_followed(
    tmp_path: Path, named: str | None, options: dict, config: type
) -> None:
    vocabulary = sentencepiece(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    processor = sys.modules["sentencepiece"].SentencePieceProcessor(model_proto=vocabulary)
    settings = None if named is None else {"tokenizer_class": named}
    folder = folder_of(tmp_path / "m", None, settings, tokenizer__model=vocabulary)
    tokenizer = open_tokenizer(folder, config())
    assert ids(tokenizer) == processor.encode(TEXTS)
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<s>", "<unk>")


@pytest.mark.parametrize(("legacy", "space"), [(True, "▁"), (False, "")])
def test_text_after_a_special_token(tmp_path: Path, legacy: bool, space: str) -> None:
    """Like the slow Llama tokenizer, it adds a space only if it is legacy."""
    folder = folder_of(tmp_path / "m", None, NAMED | {"legacy": legacy}, tokenizer__model=sentencepiece())
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece())
    proto.normalizer_spec.add_dummy_prefix = False
    processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
    tokenizer = open_tokenizer(folder, MistralConfig())
    wanted = [*processor.encode("▁panda"), 2, *processor.encode(f"{space}tide"), 2, *processor.encode(f"{space} is")]
    assert tokenizer("panda</s>tide</s> is", add_special_tokens=False)["input_ids"] == wanted
    assert tokenizer("</s>tide", add_special_tokens=False)["input_ids"] == [2, *processor.encode(f"{space}tide")]


def test_scores_follow_sentencepieces_ids(tmp_path: Path) -> None:
    """The same vocabulary as tokenizer.json, with the settings of Llama 2 and Mistral, gives the same scores."""
    folder = folder_of(tmp_path / "m", FULL, NAMED, tokenizer__model=sentencepiece())
    pairs = [(words(seed, 4), words(seed + 9, 20)) for seed in range(6)]
    got = MatroyshkaReranker(folder, dtype="float32").compute_score(pairs)
    slow = open_tokenizer(folder, MistralConfig())
    merges = AutoTokenizer.from_pretrained(folder, config=LlamaConfig()).backend_tokenizer.model
    fast = Tokenizer(merges)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder, MistralConfig()).is_fast
    assert not slow.is_fast
    np.testing.assert_allclose(MatroyshkaReranker(folder, dtype="float32").compute_score(pairs), got, atol=1e-5)


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_tokenizer_json_is_taken_literally(tmp_path: Path, config: type, named: str) -> None:
    """The class named beside it has no effect; transformers would rebuild the tokenizer by its defaults."""
    for content in ((RAW / "tokenizer.json").read_bytes(), byte_level(normalizers.NFC(), QWEN).to_str().encode()):
        settings = {"tokenizer_class": named, "bos_token": None, "unk_token": None}
        folder = folder_of(tmp_path / "m", None, settings, tokenizer__json=content)
        wanted = Tokenizer.from_str(content.decode())
        tokenizer = open_tokenizer(folder, config())
        assert ids(tokenizer) == [wanted.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert tokenizer.bos_token is None


def test_the_first_token_may_be_its_classes(tmp_path: Path) -> None:
    """Llama's class adds ``<s>`` unless the files forbid it."""
    content = (RAW / "tokenizer.json").read_bytes()
    folder = folder_of(tmp_path / "m", None, {"tokenizer_class": "LlamaTokenizer"}, tokenizer__json=content)
    for config in (LlamaConfig(), MistralConfig(), Qwen2Config()):
        assert open_tokenizer(folder, config).bos_token_id == 1
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "</s>"}))
    assert open_tokenizer(folder, LlamaConfig()).bos_token_id == 2
    with pytest.raises(ValueError, match="has neither bos_token nor tokenizer_class"):
        open_tokenizer(folder_of(tmp_path / "m", None, None, tokenizer__json=content), LlamaConfig())


@pytest.mark.parametrize("named", ["MyTokenizer", "InternLM2Tokenizer", "MistralCommonBackend", ["x"]])
def test_a_class_that_transformers_lacks_is_refused_if_no_first_token_is_named(tmp_path: Path, named: object) -> None:
    content = (RAW / "tokenizer.json").read_bytes()
    folder = folder_of(tmp_path / "m", None, {"tokenizer_class": named}, tokenizer__json=content)
    with pytest.raises(ValueError, match="which transformers does not have, and no bos_token is named"):
        open_tokenizer(folder, LlamaConfig())
    settings = {"tokenizer_class": named if isinstance(named, str) else "x", "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert open_tokenizer(folder, LlamaConfig()).bos_token is None


def test_the_model_type_names_the_class_if_no_file_does(tmp_path: Path) -> None:
    """openai-community/gpt2 is such a model: its settings hold only a length."""
    tokenizer = byte_level(None, None)
    folder = folder_of(tmp_path / "m", None, {"model_max_length": 1024}, tokenizer__json=tokenizer.to_str().encode())
    expected = GPT2Tokenizer.from_pretrained(folder)
    opened = open_tokenizer(folder, GPT2Config())
    assert opened.bos_token == expected.bos_token == "<|endoftext|>"
    with pytest.raises(ValueError, match="has neither bos_token nor tokenizer_class"):
        open_tokenizer(folder, MistralConfig())


def test_merges_are_not_dropped_at_random(tmp_path: Path) -> None:
    content = json.loads((RAW / "tokenizer.json").read_text())
    with_dropout = {**content, "model": {**content["model"], "dropout": 0.9}}
    settings = {"bos_token": "<s>"}
    folders = [
        folder_of(tmp_path / name, None, settings, tokenizer__json=json.dumps(value).encode())
        for name, value in {"without": content, "with": with_dropout}.items()
    ]
    text = "panda coffee volcano tide train glacier"
    expected, opened = (open_tokenizer(folder, LlamaConfig()) for folder in folders)
    for _ in range(5):
        assert opened(text)["input_ids"] == expected(text)["input_ids"]


@pytest.mark.parametrize(
    ("named", "normalizer", "regex", "config"),
    [
        ("GPT2Tokenizer", None, None, OPTConfig),
        ("GPT2Tokenizer", None, None, MistralConfig),
        ("Qwen2TokenizerFast", normalizers.NFC(), QWEN, Qwen2Config),
        ("Qwen2Tokenizer", normalizers.NFC(), QWEN, LlamaConfig),
    ],
)
def test_vocab_and_merges_are_opened_by_the_class_that_is_named(
    tmp_path: Path, named: str, normalizer: object, regex: str | None, config: type
) -> None:
    wanted = byte_level(normalizer, regex)
    folder = folder_of(tmp_path / "m", None, {"tokenizer_class": named, "bos_token": None})
    wanted.model.save(str(folder))
    assert ids(open_tokenizer(folder, config())) == [wanted.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("model", [FULL, RAW])
@pytest.mark.parametrize("missing", ["tokenizer.json", "all", "merges.txt"])
def test_no_vocabulary_is_no_tokenizer(tmp_path: Path, model: Path, missing: str) -> None:
    """transformers would make three tokens of a configuration alone, and single bytes of missing merges."""
    folder = folder_of(tmp_path / "m", model, None if missing == "all" else NAMED)
    if missing == "merges.txt":
        byte_level().model.save(str(folder))
        (folder / "merges.txt").unlink()
    with pytest.raises(
        ValueError, match=r"no usable tokenizer in .*m: it has no vocabulary; expected tokenizer\.json, tok"
    ):
        MatroyshkaReranker(folder).compute_score(("a", "b"))


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({"tokenizer__model": b"bGxhbWE= 0\n"}, {}, r"tokenizer\.model is not a sentencepiece model; expected one, or"),
        ({"tokenizer__model": b""}, {}, r"tokenizer\.model is not a sentencepiece model"),
        ({"tokenizer__model": None}, {"tokenizer_class": "XGLMTokenizer"}, "tokenizer_class is 'XGLMTokenizer'.*json"),
        ({"tokenizer__model": None}, {"tokenizer_class": ["x"]}, "tokenizer_class is .*must be LlamaTokenizer or"),
        ({"tokenizer__model": None}, {"sp_model_kwargs": {"alpha": 1}}, r"sp_model_kwargs is \{'alpha': 1\}"),
        ({"vocab__json": b"{}", "merges__txt": b""}, {}, r"and with vocab\.json and merges\.txt alone it must be GPT2"),
        ({"tokenizer__json": EMPTY.to_str().encode()}, {}, r"vocabulary in tokenizer\.json has special tokens only"),
    ],
)  # fmt: skip
def test_a_tokenizer_whose_ids_are_uncertain_is_refused(
    tmp_path: Path, files: dict[str, bytes | None], settings: dict, message: str
) -> None:
    if "tokenizer__model" in files:
        pytest.importorskip("sentencepiece")
    contents = {name: sentencepiece() if content is None else content for name, content in files.items()}
    folder = folder_of(tmp_path / "m", FULL, NAMED | settings, **contents)
    with pytest.raises(ValueError, match=f"model='.*m': no usable tokenizer in .*{message}") as info:
        MatroyshkaReranker(folder).compute_score(("a", "b"))
    assert "tiktoken" not in str(info.value).lower()


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    folder = folder_of(tmp_path / "m", FULL, NAMED, tokenizer__model=b"whatever it holds")
    monkeypatch.setattr(f"pyterrier_llmrerank.checkpoints.tokenizer.is_{package}_available", lambda: False)
    with pytest.raises(
        ImportError, match=r"model='.*m': reading .*tokenizer\.model needs .*llmrerank\[sentencepiece\]"
    ):
        MatroyshkaReranker(folder).compute_score(("a", "b"))


def test_an_adapters_tokenizer_counts_only_with_its_vocabulary(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    shutil.copy(BASE / "tokenizer_config.json", tmp_path / "adapter")
    pair = (words(1, 4), words(2, 9))
    with_settings = RankLLaMAReranker(tmp_path / "adapter", base_model=BASE, dtype="float32")
    plain = RankLLaMAReranker(ADAPTER, base_model=BASE, dtype="float32")
    assert with_settings.compute_score(pair) == plain.compute_score(pair)
    (tmp_path / "adapter" / "tokenizer.model").write_bytes(sentencepiece())
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(NAMED))
    assert len(RankLLaMACheckpoint(str(tmp_path / "adapter"), str(BASE)).tokenizer()) == 400


def test_a_saved_adapter_has_the_tokenizer_that_scored_and_nothing_of_another(tmp_path: Path) -> None:
    shutil.copytree(ADAPTER, tmp_path / "adapter")
    for name, said in (("special_tokens_map", {"bos_token": "</s>"}), ("added_tokens", {"panda": 5})):
        (tmp_path / "adapter" / f"{name}.json").write_text(json.dumps(said))
    before = RankLLaMAReranker(tmp_path / "adapter", base_model=BASE, dtype="float32")
    before.save(tmp_path / "saved")
    after = RankLLaMAReranker(tmp_path / "saved", base_model=BASE, dtype="float32")
    assert after.tokenizer.bos_token == "<s>"
    pair = (words(1, 4), "a panda")
    assert after.compute_score(pair) == before.compute_score(pair)


@pytest.fixture
def reranker() -> MatroyshkaReranker:
    return MatroyshkaReranker(str(FULL), dtype="float32", cutoff=2)


def test_changes_of_the_public_tokenizer_change_no_score(reranker: MatroyshkaReranker) -> None:
    pairs = [(words(seed, 5), words(seed + 50, 30)) for seed in range(4)]
    before = reranker.compute_score(pairs)
    tokenizer = reranker.tokenizer
    assert reranker.tokenizer is tokenizer
    tokenizer.add_tokens(["panda", "tide"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.bos_token = "</s>"
    tokenizer(["a", "b c"], padding="max_length", max_length=99, truncation=True)
    np.testing.assert_array_equal(reranker.compute_score(pairs), before)
    np.testing.assert_array_equal(reranker.at(cutoff=3).at(cutoff=2).compute_score(pairs), before)


def test_scores_stand_while_a_thread_pads_with_the_public_tokenizer(reranker: MatroyshkaReranker) -> None:
    rows = [(words(seed, 5), words(seed + 50, 30)) for seed in range(8)]
    before, tokenizer, done = reranker.compute_score(rows), reranker.tokenizer, threading.Event()

    def pad() -> None:
        while not done.is_set():
            tokenizer(["a", "b c d e"], padding="max_length", max_length=64)
            tokenizer(["a", "b c d e"], truncation=True, max_length=3)

    thread = threading.Thread(target=pad)
    thread.start()
    try:
        for _ in range(20):
            np.testing.assert_array_equal(reranker.compute_score(rows), before)
    finally:
        done.set()
        thread.join()


def test_the_public_tokenizer_cuts_windows(reranker: MatroyshkaReranker, tmp_path: Path) -> None:
    """A sentencepiece tokenizer is copied, too, though it has no method for that."""
    folder = folder_of(tmp_path / "m", FULL, NAMED, tokenizer__model=sentencepiece())
    for tokenizer in (reranker.tokenizer, MatroyshkaReranker(folder).tokenizer):
        text = words(3, 20)
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)).strip() == text


def test_a_pointer_beside_the_vocabulary_that_is_used_does_no_harm(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    folder = tmp_path / "m"
    shutil.copytree(MODELS / "costwise_full", folder)
    expected = MatroyshkaReranker(folder, dtype="float32").compute_score(("panda", "coffee"))
    (folder / "tokenizer.model").write_bytes(pointer)
    assert MatroyshkaReranker(folder, dtype="float32").compute_score(("panda", "coffee")) == expected
    (folder / "tokenizer.json").write_bytes(pointer)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*Git"):
        MatroyshkaReranker(folder, dtype="float32").compute_score(("panda", "coffee"))
