"""The builtin text: English prose from the documentation that this Python installation carries, without a download."""

import ast
import contextlib
import gc
import hashlib
import importlib.metadata
import inspect
import json
import re
import sysconfig
import warnings
from pathlib import Path

import zstandard

from common import ROOT, BadInput
from processes import Bar, say
from proof import NOT_LETTERS
from shards import atomic
from sources import hashes

REQUIREMENTS = ("torch", "numpy", "sentencepiece", "zstandard", "brotli")
FILES_TOGETHER = 40  # in a unit of work
LONGEST = 6000  # characters of a document, or a paragraph more
SHORTEST = 500  # characters of the last document of a file

# Folders that hold no documentation.
NOT_DOCS = {"test", "tests", "testing", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo",
            "__pycache__"}
DOC_FILES = re.compile(r"(docs?(_\w+)?|topics)\.py$")  # documentation as data: _torch_docs.py, pydoc's topics.py
LONG_STRING = 200  # characters; of a string in such a file that is documentation
TRIPLE = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
COMMENTS = re.compile(r"#(?: .*)?\n(?:[ \t]*#(?: .*)?\n)+")

# What tells English prose.
COMMON = set("""the of a an to and is in that it for be as are with this by on or if not can will from which at when has
    have you used use using returns return but may into its than only also must should was were all any does do been one
    other such their they there these then how we so no""".split())
NOT_PROSE = re.compile(r"copyright|licen[sc]ed? under|all rights reserved|redistribution|warranty|noqa|pylint|mypy|TODO"
                       r"|[{}\\$]", re.IGNORECASE)
# (what a paragraph with it contains, pattern, replacement)
MARKUP = [(mark, re.compile(pattern), plain) for mark, pattern, plain in (
    (":`", r":[\w:+.-]+:`(?:[^`<]*<)?[~!]?([^`<>]*)>?`", r"\1"),  # :class:`~torch.Tensor`
    ("`_", r"`([^`<]+?)\s*<[^`>]+>`__?", r"\1"),  # `text <address>`_
    ("`", r"``?([^`]+)``?_{0,2}", r"\1"),  # ``code``
    ("**", r"\*\*([^*]+)\*\*", r"\1"),
    ("]_", r"\[[\w*]+\]_", ""),
    ("http", r"https?://\S+", ""),
)]
ADMONITION = re.compile(r"\.\. (?:note|warning|versionadded|versionchanged|deprecated|seealso|tip|important)::\s*")
FIELD = re.compile(r"(?::\w+(?: [^:]+)?:|\*{0,2}\w+(?: \([^)]*\))?:(?=\s)|[-*+•] |\d+[.)] )\s*")  # ":param x:"
TYPED = re.compile(r"\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)* : |[A-Z]\w*(?: \w+)?:$")  # "axis : int, optional" and "Args:"
SENTENCE = re.compile(r"(?<=[.!?:;]) ")
UNDERLINE = re.compile(r"[-=~^\"'*#+_.|: ]{3,}")
LONGEST_TERM = 30  # characters of a term above its definition


# ---- files ----------------------------------------------------------------------------------------------------------


def packages():
    """The distributions, by name, that the requirements of this repository pull in here."""
    file = ROOT / "requirements.txt"
    todo = file.read_text(encoding="utf-8").splitlines() if file.is_file() else list(REQUIREMENTS)
    distributions = {}
    while todo:
        requirement = todo.pop()
        match = re.match(r"[A-Za-z0-9][\w.-]*", requirement)
        is_optional = "extra ==" in requirement
        if not match or is_optional:
            continue
        name = re.sub(r"[-_.]+", "-", match.group()).lower()
        if name not in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                distributions[name] = importlib.metadata.distribution(name)
                todo += distributions[name].requires or []
    return dict(sorted(distributions.items()))


def python_files():
    """(name, path) of the sources of the standard library and of the packages, in the order of the names."""
    library = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(library): path for path in library.rglob("*.py")}
    yield from sorted((f"python/{name.as_posix()}", path) for name, path in names.items()
                      if not NOT_DOCS & set(name.parts))
    for package in packages().values():
        sources = [file for file in package.files or () if file.suffix == ".py" and not NOT_DOCS & set(file.parts)]
        yield from sorted((file.as_posix(), Path(file.locate())) for file in sources)


# ---- docstrings -----------------------------------------------------------------------------------------------------


def docstrings(source):
    """The docstrings in the order of the source."""
    todo = [ast.parse(source)]
    while todo:
        node = todo.pop()
        has_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if has_docstring and node.body:
            first = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value
        inner = []
        for field in ("body", "orelse", "handlers", "finalbody"):
            inner += [statement for statement in getattr(node, field, ()) if hasattr(statement, "body")]
        todo += reversed(inner)


def long_strings(source):
    """Every long string of a file that holds documentation as data."""
    for node in ast.walk(ast.parse(source)):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and len(node.value) > LONG_STRING:
            yield node.value


def comments(source):
    """The text of every block of comments."""
    for block in COMMENTS.findall(source):
        yield re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE)


# ---- prose ----------------------------------------------------------------------------------------------------------


class Paragraphs:
    """Collects the lines of running text into paragraphs."""

    def __init__(self):
        self.done = []
        self.lines = []  # of the paragraph that is open

    def end(self):
        if self.lines:
            self.done.append(" ".join(self.lines))
            self.lines = []


def _paragraphs(text):
    """The running text of a docstring: no doctests, code, tables, headings, types of parameters."""
    paragraphs = Paragraphs()
    inside = None  # of what is left out: "fence", "doctest" or "block"
    block_indent = 0  # a block is all lines that are indented by more
    indent = 0
    for line in inspect.cleandoc(text).splitlines():
        words = line.strip()
        indent_before = indent
        indent = len(line) - len(line.lstrip())
        if inside == "fence":
            if words.startswith("```"):
                inside = None
            continue
        if inside == "doctest":
            if not words:
                inside = None
            continue
        if inside == "block" and (not words or indent > block_indent):
            indent = indent_before
            continue
        inside = None
        if words.startswith("```"):
            inside = "fence"
        elif words.startswith((">>>", "In [")):
            inside = "doctest"
        elif words.startswith(".. "):
            paragraphs.end()
            if note := ADMONITION.match(words):
                paragraphs.lines.append(words[note.end() :])
            else:
                inside = "block"
                block_indent = indent
            continue
        elif words.endswith("::"):
            inside = "block"
            block_indent = indent
            paragraphs.lines.append(words[:-2])
        elif UNDERLINE.fullmatch(words):
            if len(paragraphs.lines) == 1:  # a heading
                paragraphs.lines = []
        elif words and words.count("|") < 2 and not TYPED.match(words):
            field = FIELD.match(words)
            if field:
                paragraphs.end()
                words = words[field.end() :]
            elif _is_term(paragraphs.lines) and indent > indent_before:
                paragraphs.lines = []
            paragraphs.lines.append(words)
            continue
        paragraphs.end()
    paragraphs.end()
    return paragraphs.done


def _is_term(lines):
    """Whether these lines may be a term above its definition."""
    return len(lines) == 1 and len(lines[0]) < LONGEST_TERM


def prose(text):
    """The English paragraphs of a docstring, without markup."""
    for paragraph in _paragraphs(text):
        is_short = paragraph.count(" ") < 7
        if is_short or NOT_PROSE.search(paragraph):
            continue
        for mark, pattern, plain in MARKUP:
            if mark in paragraph:
                paragraph = pattern.sub(plain, paragraph)
        paragraph = " ".join(paragraph.split())
        if _is_english(paragraph):
            yield paragraph


def _is_english(paragraph):
    words = re.findall(r"[a-z']+", paragraph.lower())
    if len(words) < 8 or not paragraph[0].isalpha():
        return False
    letters = sum(map(len, words)) + paragraph.count(" ")
    common_words = sum(word in COMMON for word in words)
    return letters > 0.9 * len(paragraph) and common_words >= len(words) / 4


def _sentence_keys(paragraph):
    """What makes two sentences one: their letters."""
    keys = []
    for sentence in SENTENCE.split(paragraph.lower()):
        letters = sentence.encode().translate(None, NOT_LETTERS + b"0123456789")
        keys.append(hashlib.blake2b(letters, digest_size=8).digest())
    return keys


def docs_of_files(files):
    """Worker: [(name, [(paragraph, sentence keys)])] of a list of Python files. They are parsed, never imported."""
    gc.disable()  # syntax trees are many small objects, with no cycles worth looking for
    warnings.simplefilter("ignore")  # odd escapes in other people's sources
    docs = []
    for name, path in files:
        try:
            texts = list(_texts_of_file(name, path.read_bytes().decode("utf-8")))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        docs.append((name, [(paragraph, _sentence_keys(paragraph)) for text in texts for paragraph in prose(text)]))
    gc.enable()
    return docs


def _texts_of_file(name, source):
    """Documentation and comments of a source. Parsing it takes time, so files with few docstrings are not parsed."""
    if DOC_FILES.search(name):
        yield from long_strings(source)
    elif sum(match.end() - match.start() for match in TRIPLE.finditer(source)) > len(source) / 10:
        yield from docstrings(source)
    yield from comments(source)


# ---- documents ------------------------------------------------------------------------------------------------------


def builtin_documents(workers):
    """(name, text): the prose of a module, of a part of it, or of several small modules of a package; nothing twice."""
    files = list(python_files())
    tasks = (files[begin : begin + FILES_TOGETHER] for begin in range(0, len(files), FILES_TOGETHER))
    seen = set()  # sentence keys
    held = []  # paragraphs
    size = 0  # characters of them
    package = None
    done = 0
    progress = Bar("collect", len(files), "files")
    for task, docs in workers.map(docs_of_files, tasks):
        for name, paragraphs in docs:
            if package != name.split("/")[0]:
                package = name.split("/")[0]
                held = []
                size = 0
            for number, (text, keys) in enumerate(paragraphs, 1):
                new = sum(key not in seen for key in keys)
                seen.update(keys)
                if 2 * new > len(keys):
                    held.append(text)
                    size += len(text) + 1
                is_last = number == len(paragraphs)
                if size > (SHORTEST if is_last else LONGEST):
                    yield name, "\n".join(held)
                    held = []
                    size = 0
        done += len(task)
        progress(done)
    progress.close()


def write_builtin(path, workers):
    """The builtin text as .jsonl.zst, in an order that mixes the packages."""
    rows = sorted((hashes(text), name, text) for name, text in builtin_documents(workers))
    if not rows:
        raise BadInput("no documentation found in this Python installation; give --source a text of your own")
    with atomic(path) as file, zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as out:
        for _, name, text in rows:
            out.write(json.dumps(dict(text=text, source=name), ensure_ascii=False).encode() + b"\n")
    say("builtin", documents=len(rows), bytes=sum(len(text.encode()) for *_, text in rows))
