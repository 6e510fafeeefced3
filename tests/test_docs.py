"""Run the snippets and commands of the README, CONTRIBUTING and the pages, on tiny models in place of real ones."""

from __future__ import annotations

import ast
import contextlib
import doctest
import html
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ir_datasets
import pandas as pd
import pyterrier as pt
import pytest
import torch
import yaml
from conftest import MODELS, collection, frame
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from typer.main import get_command

import pyterrier_llmrerank
from pyterrier_llmrerank import LLMReranker, MatroyshkaReranker
from pyterrier_llmrerank.checkpoints import bundled
from pyterrier_llmrerank.cli import app, main
from pyterrier_llmrerank.training.commands import parse

ROOT = Path(__file__).parent.parent
PAGES = Path(pyterrier_llmrerank.__file__).parent / "pt_docs"
TEXTS = [*sorted(PAGES.glob("*.rst")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """The code blocks of a page in a language, each with the number of its first line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: list[tuple[int, list[str]]] = []
    inside, margin = False, ""
    for number, line in enumerate(lines, start=1):
        if path.suffix == ".md":
            if line.startswith("```"):
                inside = line == f"```{language}"
                if inside:
                    found.append((number + 1, []))
            elif inside:
                found[-1][1].append(line)
        elif line.strip() == f".. code-block:: {language}":
            inside, margin = True, ""
            found.append((number + 1, []))
        elif inside and line and not line.startswith(margin or " "):
            inside = False
        elif inside:  # an option of the directive holds a line, so that numbers stay true
            margin = margin or " " * (len(line) - len(line.lstrip()))
            found[-1][1].append("" if line.startswith(f"{margin}:") else line.removeprefix(margin))
    return [(number, "\n".join(code)) for number, code in found]


# -- the pages


def test_pages_build_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs Sphinx: pip install sphinx")
    settings = Path(__file__).parent / "docs"
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(settings), str(PAGES), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    public = {*pyterrier_llmrerank.__all__, *(f"training.{n}" for n in pyterrier_llmrerank.training.__all__)}
    assert {name for name in public if f'id="pyterrier_llmrerank.{name}"' not in reference} == set()
    assert "RankLLaMAReranker(model='castorini/" in html.unescape(re.sub("<[^>]*>", "", reference))  # its own arguments


def test_pages_build_in_pyterriers_documentation(tmp_path: Path) -> None:
    """Its index of guides has ours, and the reference of a class links to the guides about it."""
    pytest.importorskip("sphinx", reason="needs Sphinx: pip install sphinx")
    if not os.environ.get("PYTERRIER_DOCS"):
        pytest.skip("needs the docs folder of a clone of PyTerrier: set PYTERRIER_DOCS to it")
    settings = Path(__file__).parent / "docs"
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(settings), str(PAGES), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    titles = re.findall(r"^\.\. how-to:: (.*)", (PAGES / "how-to.rst").read_text(encoding="utf-8"), re.MULTILINE)
    guides = (tmp_path / "how-tos.html").read_text(encoding="utf-8")
    assert len(titles) >= 5
    assert [title for title in titles if title not in guides] == []
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert re.search(r"See also.{,200}How do I make an LLM reranker cheaper", reference, re.DOTALL)


def test_version_authors_and_citations_agree() -> None:
    assert importlib.metadata.version("pyterrier-llmrerank") == pyterrier_llmrerank.__version__
    citation = yaml.safe_load((PAGES / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pyterrier_llmrerank.__version__
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["license"] == PROJECT["license"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == pyterrier_llmrerank.__version__
    bibtex = "".join(code for _, code in blocks(PAGES / "citing.rst", "bibtex"))
    assert f"{{{pyterrier_llmrerank.__version__}}}" in bibtex
    for work in citation["references"]:
        assert re.sub(r"\W", "", work["title"]) in re.sub(r"\W", "", bibtex)
        assert all(f"{a['given-names']} {a['family-names']}" in bibtex.replace("\n ", "") for a in work["authors"])


def test_module_map_names_every_module() -> None:
    package = Path(pyterrier_llmrerank.__file__).parent
    modules = {path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py")}
    modules = {name for name in modules if not name.endswith(("__init__", "__main__"))}
    room, named = "", set()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Module map")[2].partition("\n## ")[0]
    for line in text.splitlines():
        if title := re.match(r"\| (?:`(\w+/)`|module) \|", line):
            room = title[1] or ""
        elif line.startswith("| `"):
            named |= {room + name for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert named == modules


#: The rooms from the lowest up: none imports one above it.
ROOMS = [
    {"errors", "values", "value_semantics"},
    {"options", "shapes", "frames", "checkpoints"},
    {"engine"},
    {"runs", "training", "scores", "replicas", "merged_models"},
    {"reranker"},
    {"features"},
    {"matroyshka", "rankllama"},
    {"sweep"},
    {"tuning"},
    {"cli_options", "cli"},
]


def test_imports_point_down() -> None:
    package = Path(pyterrier_llmrerank.__file__).parent
    height = {name: number for number, room in enumerate(ROOMS) for name in room}
    upward = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        own = height.get(place.parts[0].removesuffix(".py"), len(ROOMS))
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        for_types = {id(node) for block in blocks for node in ast.walk(block)}  # these import nothing at run time
        for node in ast.walk(tree):
            if id(node) in for_types:
                continue
            if isinstance(node, ast.ImportFrom) and node.level:
                parents = place.parent.parts[: len(place.parent.parts) - node.level + 1]
                whole = [*parents, *(node.module or "").split(".")] if node.module else [*parents]
                found = whole[:1] or [alias.name for alias in node.names]
                upward += [f"{place}:{node.lineno} {name}" for name in found if height.get(name, 0) > own]
    assert upward == []


# -- Python


class Everything(pt.Transformer):
    """A first stage that retrieves all documents for each query."""

    def transform(self, topics: pd.DataFrame) -> pd.DataFrame:
        found = frame(1, 6)[["docno", "score"]]
        return pt.model.add_ranks(topics[["qid", "query"]].merge(found, how="cross"))


def dataset(name: str) -> Any:
    """Return a small dataset under the name of a real one."""
    assert name.removeprefix("irds:") in ir_datasets.registry

    def text_loader(fields: str | list[str] = "text") -> pt.Transformer:
        texts = frame(1, 6).assign(title="Pandas", url="https://example.org")
        wanted = texts[["docno", *([fields] if isinstance(fields, str) else fields)]]
        return pt.apply.generic(lambda results: results.merge(wanted, on="docno"))

    topics = frame(3, 1)[["qid", "query"]]
    qrels = pd.DataFrame({"qid": topics["qid"], "docno": "d1", "label": 1})
    return SimpleNamespace(get_topics=lambda: topics, get_qrels=lambda: qrels, text_loader=text_loader)


def write_adapter(folder: Path, base: Path, config: PretrainedConfig, score: bool = False) -> None:
    """Write a random adapter for a base: RankLLaMA's if it has a score head, else Matroyshka's."""
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "task_type": "SEQ_CLS" if score else "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    settings |= {"base_model_name_or_path": str(base), "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    width = config.hidden_size
    tensors = {"base_model.model.score.weight": torch.randn(1, width)} if score else {}
    for layer in range(config.num_hidden_layers):
        module = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, config.num_attention_heads * config.head_dim)
        tensors[f"{module}.lora_B.weight"] = torch.randn(width, 2)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with the model names of the pages: as deep as the real models, but tiny and untrained."""
    home = tmp_path_factory.mktemp("world")
    config = AutoConfig.from_pretrained(MODELS / "mistral_deep")
    config.num_hidden_layers = 30  # as the small model has
    base = home / "mistralai" / "Mistral-7B-v0.1"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(MODELS / "mistral_deep").save_pretrained(base)
    layer_wise = MatroyshkaReranker.untrained(str(base), start_layer=4, dtype="float32")
    layer_wise.save(home / "BAAI" / "Matroyshka-ReRanker-passage", merged=True)
    for name in ("meta-llama/Llama-2-7b-hf", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        shutil.copytree(base, home / name)
    shutil.copytree(base, home / "BASE")
    compensation = "BAAI/Matroyshka-ReRanker-passage/compensate/layer/full"
    own = ["distilled", "layer", "token2", "token4"]
    own += ["result_self_distillation", "result_compensation_token_compress_ratio_2"]
    for adapter in (*own, compensation, "matroyshka-smollm2-135m"):
        write_adapter(home / adapter, base, config)
    for adapter in ("castorini/rankllama-v1-7b-lora-passage", "castorini/rankllama-v1-7b-lora-doc"):
        write_adapter(home / adapter, Path("meta-llama/Llama-2-7b-hf"), config, score=True)
    write_adapter(home / "rankllama-smollm2-135m", Path("smollm2-135m"), config, score=True)
    for kind in ("matroyshka", "rankllama"):
        shutil.copy(bundled.MODELS / f"{kind}-smollm2-135m" / "reranker.json", home / f"{kind}-smollm2-135m")
    collection(home / "vaswani", run="bm25")
    return home


@pytest.fixture
def in_world(world: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate folder with the models, in which no hub, Java or real data is needed."""
    tmp_path = tmp_path_factory.mktemp("page")  # it outlives the test: rerankers of later tests share these weights
    for path in (*world.iterdir(), ROOT / "examples"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "pyterrier_llmrerank.checkpoints.bundled.base_file", lambda: "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    monkeypatch.setattr(bundled, "MODELS", world)
    monkeypatch.setattr(pt, "get_dataset", dataset)
    push = inspect.signature(LLMReranker.push_to_hub)
    monkeypatch.setattr(LLMReranker, "push_to_hub", lambda *args, **options: push.bind(*args, **options))
    monkeypatch.setattr(
        pt.Artifact, "from_hf", lambda name: SimpleNamespace(bm25=lambda *, num_results: Everything() % num_results)
    )
    return tmp_path


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run(path: Path, in_world: Path) -> None:
    """Run the blocks of a page in order, in one session; a traceback shows the page's name and line."""
    names: dict[str, Any] = {}
    for number, code in blocks(path, "python"):
        tree = ast.increment_lineno(ast.parse(code), number - 1)
        exec(compile(tree, str(path), "exec"), names)


def test_readme_shows_the_scores_of_the_small_model(smollm2: str) -> None:
    """The first block, on the real model, prints the first output."""
    code, shown = (blocks(ROOT / "README.md", language)[0][1] for language in ("python", "text"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip("\n") == shown


def test_readme_shows_the_table_of_its_experiment(in_world: Path) -> None:
    """On tiny models, which print the same systems, and the same value of BM25."""
    (_, first), (_, experiment) = blocks(ROOT / "README.md", "python")[:2]
    names: dict[str, Any] = {}
    exec(first, names)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(experiment, names)
    table = [line.rsplit(maxsplit=1) for line in printed.getvalue().splitlines()]
    shown = [line.rsplit(maxsplit=1) for line in blocks(ROOT / "README.md", "text")[1][1].splitlines()]
    assert [name.strip() for name, _ in table] == [name.strip() for name, _ in shown]
    assert table[:2] == [[name, value] for name, value in shown[:2]]


def test_docstring_examples_give_the_results_shown(in_world: Path) -> None:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(pyterrier_llmrerank.__path__, "pyterrier_llmrerank.")
        if not module.name.endswith("__main__")
    ]
    results = [doctest.testmod(module, verbose=False) for module in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 15


# -- the shell


def commands(path: Path) -> Iterator[list[str]]:
    """The commands of a page, split into words."""
    for language in ("bash", "console"):
        for _, code in blocks(path, language):
            yield from words_of(code)


def words_of(code: str) -> Iterator[list[str]]:
    """The commands of a block, split into words."""
    for line in code.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


def test_readme_commands_run(in_world: Path) -> None:
    """They need no files but those of the project, and of the lines before."""
    ours = [words[1:] for words in commands(ROOT / "README.md") if words[0] == "llmrerank"]
    assert [main(words) for words in ours] == [0, 0, 0, 0]


def test_the_job_array_gives_the_run_of_one_job(in_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tasks of the Slurm script one by one, then the command that joins their outputs."""
    script, submission = (
        code for _, code in blocks(PAGES / "command-line.rst", "bash") if "#SBATCH" in code or "sbatch" in code
    )
    monkeypatch.setattr("pyterrier_llmrerank.engine.scoring.CHUNK", 3)
    rows = frame(20, 2).rename(columns={"qid": "query_id", "docno": "docid"})
    rows.to_json("rerank.jsonl.gz", orient="records", lines=True)
    (last,) = re.findall(r"#SBATCH --array=1-(\d+)", script)
    for task in range(1, int(last) + 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        ((_, *words),) = words_of(os.path.expandvars(script))
        assert main(words) == 0
        assert os.path.getsize(f"run.{task}.txt") > 0
    subprocess.run(["bash", "-c", submission.partition("&&")[2]], check=True)
    at = words.index("--shard")
    words[at : at + 2] = []
    words[words.index("--output") + 1] = "whole.txt"
    assert main(words) == 0
    assert Path("run.txt").read_bytes() == Path("whole.txt").read_bytes()


TYPED = [(path.name, words) for path in TEXTS for words in commands(path)]


@pytest.mark.parametrize("words", [words for _, words in TYPED], ids=[f"{n}: {' '.join(w)[:60]}" for n, w in TYPED])
def test_shell_commands_parse(words: list[str]) -> None:
    if words[0] == "llmrerank":
        parse_command(words[1:])
    elif words[:3] == ["python", "-m", "sphinx"]:
        assert [word for word in words[3:] if "/" in word and not (ROOT / word).is_dir()] == []
    elif words[0] in ("torchrun", "python") and "-m" in words:
        at = words.index("-m")
        assert words[at + 1] == "pyterrier_llmrerank"
        parse_command(words[at + 2 :])
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "python":
        script = ROOT / words[1]
        source = script.read_text(encoding="utf-8")
        assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source] == []
    elif words[0] == "pip":
        for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
            assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"])
    elif words[0] == "pytest":
        assert [word for word in words[1:] if word.endswith(".py") and not (ROOT / word).is_file()] == []
    elif words[0] == "curl":
        json.loads(words[words.index("-d") + 1])
    else:
        assert words[0] in ("cat", "mypy", "ruff", "sbatch", "vllm")


def parse_command(words: list[str]) -> None:
    """Parse a command of the package without running it."""
    if words[0] != "train":
        command: Any = get_command(app)
        while hasattr(command, "commands"):
            name, *words = words
            command = command.commands[name]
        command.make_context(name, words)
        return
    _, recipe, *options = words
    if "--deepspeed" in options:  # a package that is not among the tests' needs
        at = options.index("--deepspeed")
        assert (ROOT / options[at + 1]).is_file()
        del options[at : at + 2]
    parse(recipe, [*options, "--use_cpu"])
