"""Text that every machine with CPython has: docstrings, help topics, licence and some code of the standard library.

Knows nothing of tokens or models. The same library and seed give the same documents in the same order, each once.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import random
import re
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pando.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
END = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END)
STANDARD_LIBRARY = Path(os.__file__).parent

# Tests, tables, bundled third-party packages, and build settings that name folders of one machine.
_SKIPPED = frozenset({
    "__pycache__", "__phello__", "_bundled", "distutils", "encodings", "idlelib", "lib2to3", "msilib", "pydoc_data",
    "site-packages", "test", "tests", "turtledemo",
})  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "_osx_support", "_aix_support", "config-")
# Modules written in C carry their documentation in the interpreter and in no source file.
_COMPILED = (
    "array", "binascii", "builtins", "cmath", "errno", "faulthandler", "gc", "itertools", "marshal", "math",
    "select", "sys", "time", "unicodedata", "zlib", "_asyncio", "_bisect", "_collections", "_csv", "_datetime",
    "_functools", "_heapq", "_io", "_json", "_operator", "_random", "_socket", "_sqlite3", "_struct", "_thread",
    "_weakref",
)  # fmt: skip
_SHORTEST_DOC, _LONGEST_ANSWER, _LONGEST_FILE = 24, 1600, 60_000
_CODE_BYTES = 1_500_000

_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant for Python programmers. Answer from the documentation.",
    "You answer questions about the Python standard library in plain English.",
    "You are a concise assistant. Give short answers.",
)
_SHORT_QUESTIONS = (
    "What does {name} do?", "What is {name}?", "In one sentence, what is {name} for?", "Tell me about {name}.",
    "what does {name} do",
)  # fmt: skip
_LONG_QUESTIONS = (
    "Explain {name}.", "Show me the documentation of {name}.", "How do I use {name}?", "Describe {name} in detail.",
)  # fmt: skip
_SIGNATURE_QUESTIONS = ("What are the arguments of {name}?", "How is {name} called?")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus; `kind` is prose, chat or code."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A documented name: `signature` is empty for modules and where the source gives none."""

    name: str
    signature: str
    doc: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


def gather(library: Path, seed: int) -> list[Document]:
    """All documents of a folder of Python sources, prose first; the interpreter's own for the standard library.

    Raises `ConfigError` where the folder has no documented source.
    """
    sources = list(_sources(library))
    modules = [entries for name, text in sources if (entries := _documented(name, text))]
    if library == STANDARD_LIBRARY:
        modules += [entries for name in _COMPILED if (entries := _compiled(name))]
    if not modules:
        raise ConfigError(f"no documented Python source in {library}")
    rng = random.Random(seed)
    topics = _topics(library)
    documents = [Document("prose", text) for text in topics.values()]
    documents += [Document("prose", text) for text in _licences(library)]
    documents += [Document("prose", _page(entries)) for entries in modules]
    documents += _chats(modules, topics, rng)
    documents += _code([text for _, text in sources])
    return _distinct(documents)


def render(turns: Iterable[Turn]) -> str:
    """A chat as the model sees it: what the chat template of the checkpoint writes for the same messages."""
    return "".join(f"<|{turn.role}|>\n{turn.content}{END}\n" for turn in turns)


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """Module name and text of every source that is meant to be read, in order of their paths."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if any(part in _SKIPPED or part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        yield ".".join(parts).removesuffix(".py").removesuffix(".__init__"), text


def _documented(module: str, text: str) -> list[Entry]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    return list(_entries(tree, module))


def _entries(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[Entry]:
    doc = ast.get_docstring(node) or ""
    if len(doc) >= _SHORTEST_DOC:
        yield Entry(name, _signature(node), doc)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(child, f"{name}.{child.name}")


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{node.name}({ast.unparse(node.args)})"
    return ""


def _compiled(module: str) -> list[Entry]:
    try:
        root = importlib.import_module(module)
    except ImportError:
        return []
    return list(_members(root, module.removeprefix("_")))


def _members(root: types.ModuleType, module: str) -> Iterator[Entry]:
    for name, member in sorted(vars(root).items()):
        if name.startswith("_") or not (inspect.isbuiltin(member) or inspect.isclass(member)):
            continue
        yield from _described(f"{module}.{name}", member)
        if inspect.isclass(member):
            for attribute, method in sorted(vars(member).items()):
                if not attribute.startswith("__"):
                    yield from _described(f"{module}.{name}.{attribute}", method)


def _described(name: str, member: object) -> Iterator[Entry]:
    doc = inspect.getdoc(member) if getattr(member, "__doc__", None) else None
    if doc is not None and len(doc) >= _SHORTEST_DOC:
        signature = getattr(member, "__text_signature__", None) or ""
        yield Entry(name, re.sub(r"\$\w+(, )?", "", signature), doc)


def _topics(library: Path) -> dict[str, str]:
    """The help topics of `pydoc`, read without running the file."""
    path = library / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            found: dict[str, str] = ast.literal_eval(node.value)
            return {name: textwrap.dedent(text).strip() for name, text in sorted(found.items())}
    return {}


def _licences(library: Path) -> list[str]:
    return [path.read_text("utf-8").strip() for path in sorted(library.glob("LICENSE*")) if path.is_file()]


def _page(entries: list[Entry]) -> str:
    return "\n\n".join(f"{entry.name}{_arguments(entry)}\n\n{entry.doc}" for entry in entries)


def _arguments(entry: Entry) -> str:
    return entry.signature[entry.signature.find("(") :] if "(" in entry.signature else ""


def _chats(modules: list[list[Entry]], topics: dict[str, str], rng: random.Random) -> Iterator[Document]:
    for topic, text in topics.items():
        question = rng.choice(_LONG_QUESTIONS).format(name=f"the topic {topic.lower()}")
        yield Document("chat", render([*_system(rng, ""), Turn("user", question), Turn("assistant", _cut(text))]))
    for entries in modules:
        page = _page(entries)
        for entry in entries:
            turns = [*_system(rng, page), *_exchange(entry, rng)]
            while rng.random() < 0.3:
                turns += _exchange(rng.choice(entries), rng)
            yield Document("chat", render(turns))


def _system(rng: random.Random, page: str) -> list[Turn]:
    """No system prompt, a short one, or now and then a long one that holds the page the answer comes from."""
    draw = rng.random()
    if draw < 0.35:
        return []
    prompt = rng.choice(_SYSTEM_PROMPTS)
    if draw > 0.95 and page:
        prompt += "\n\n" + page[: rng.choice((1_500, 4_000, 8_000))]
    return [Turn("system", prompt)]


def _exchange(entry: Entry, rng: random.Random) -> list[Turn]:
    draw = rng.random()
    if draw < 0.1 and _arguments(entry):
        question, answer = rng.choice(_SIGNATURE_QUESTIONS), f"{entry.name}{_arguments(entry)}"
    elif draw < 0.6:
        question, answer = rng.choice(_SHORT_QUESTIONS), " ".join(entry.doc.split("\n\n")[0].split())
    else:
        question, answer = rng.choice(_LONG_QUESTIONS), _cut(entry.doc)
    return [Turn("user", question.format(name=entry.name)), Turn("assistant", answer)]


def _cut(text: str) -> str:
    """Whole paragraphs of a text, as many as an answer may hold and always the first."""
    kept: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if kept and size + len(paragraph) > _LONGEST_ANSWER:
            break
        kept.append(paragraph)
        size += len(paragraph) + 2
    return "\n\n".join(kept).strip()


def _code(sources: list[str]) -> Iterator[Document]:
    """The best commented sources first, until the share of code is filled."""
    left = _CODE_BYTES
    for text in sorted(sources, key=_comment_share, reverse=True):
        if 400 < len(text) < _LONGEST_FILE and left > 0:
            left -= len(text)
            yield Document("code", text.strip())


def _comment_share(text: str) -> float:
    lines = text.splitlines()
    return sum(line.lstrip().startswith("#") for line in lines) / max(len(lines), 20)


def _distinct(documents: Iterable[Document]) -> list[Document]:
    return list({document.text: document for document in documents}.values())
