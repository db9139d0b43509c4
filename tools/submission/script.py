"""The script of a submission without running it: unpacked, parsed, and looked at."""

import ast
import base64
import bz2
import lzma
import re
import warnings
import zlib
from typing import NamedTuple

MOST_SOURCE = 8 << 20  # bytes of an unpacked script


def is_pointer(source):
    """Is this what Git LFS leaves in place of a file?"""
    return source.lstrip().startswith(b"version https://git-lfs")


class Script(NamedTuple):
    """A script after unpacking."""

    text: str
    tree: ast.Module
    imports: dict[str, int]  # {top-level module: line}, also of imports in functions
    strings: frozenset[str]  # every text in it
    functions: tuple[ast.FunctionDef, ...]
    minimums: tuple[ast.Call, ...]  # calls of minimum()


def read(source):
    """The Script of these bytes, or None if they are no Python."""
    tree = None
    for _ in range(3):  # a packed script may hold a packed one
        tree = parse(source)
        inner = unpacked(source, tree) if tree else None
        if inner is None:
            break
        source = inner
    if tree is None:
        return None
    imports = {}
    strings = set()
    functions = []
    minimums = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                strings.add(node.value)
        elif isinstance(node, ast.FunctionDef):
            functions.append(node)
        elif isinstance(node, ast.Call):
            if called(node) == "minimum":
                minimums.append(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in imported(node):
                imports.setdefault(name.partition(".")[0], node.lineno)
    text = source.decode("utf-8", "replace")
    return Script(text, tree, imports, frozenset(strings), tuple(functions), tuple(minimums))


def imported(node):
    """The modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.module else []


def parse(source):
    """The syntax tree of Python source, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd escape in a foreign string
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# ---- packed scripts -------------------------------------------------------------------------------------------------


def unpacked(source, tree):
    """The script inside a self-extracting one, or None: its longest literal, or our comment, decoded."""
    if b"exec" not in source or b"decompress" not in source:
        return None
    literals = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)) and len(node.value) >= 1000:
            literals.append(node.value)
    for literal in sorted(literals, key=len, reverse=True)[:2]:
        data = literal.encode("latin-1", "replace") if isinstance(literal, str) else literal
        for decode in (base64.b85decode, base64.a85decode, base64.b64decode, bytes):
            inner = decompressed(decode, data)
            if inner:
                return inner
    return unpacked_comment(source)


def unpacked_comment(source):
    """What tools/submit.py pack keeps in its last line: base85, or blocks of a key and bytes exclusive-or that key."""
    head, mark, comment = source.rpartition(b"\n#")
    if not mark or len(comment) < 100:
        return None
    inner = decompressed(base64.b85decode, comment)
    sizes = {int(size) for size in re.findall(rb"%\s?(\d{1,3})\b", head) if int(size) > 1}
    for size in () if inner else sizes:
        blocks = [comment[begin : begin + size] for begin in range(0, len(comment), size)]
        data = b"".join(bytes(byte ^ block[0] for byte in block[1:]) for block in blocks)
        inner = inner or decompressed(bytes, data)
    return inner


def decompressed(decode, data):
    """Python source from encoded and compressed bytes, by any compressor in use; None if it is none."""
    try:
        data = decode(data)
    except (ValueError, OverflowError):
        return None
    for decompress in (by_lzma, by_raw_lzma, by_zlib, by_bz2, by_brotli):
        try:
            inner = decompress(data)
        except (lzma.LZMAError, zlib.error, OSError, ValueError, EOFError, ImportError):
            continue
        if inner and len(inner) < MOST_SOURCE and parse(inner):
            return inner
    return None


def by_lzma(data):
    return lzma.LZMADecompressor().decompress(data, MOST_SOURCE)


def by_raw_lzma(data):
    filters = [{"id": lzma.FILTER_LZMA2}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data, MOST_SOURCE)


def by_zlib(data):
    return zlib.decompressobj().decompress(data, MOST_SOURCE)


def by_bz2(data):
    return bz2.BZ2Decompressor().decompress(data, MOST_SOURCE)


def by_brotli(data):
    import brotli

    try:
        return brotli.Decompressor().process(data, output_buffer_limit=MOST_SOURCE)
    except (brotli.error, TypeError):
        return None


# ---- looks ----------------------------------------------------------------------------------------------------------


def called(node):
    """The last name of what a call calls: minimum for torch.minimum()."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return getattr(node.func, "id", "")


NLL = re.compile(r"(?i)(?:^|_)(?:nll|ce|xent|loss(?:es)?)(?:$|_|\d)")
TARGET = re.compile(r"(?:^|_)(?:tgt|target|targets)(?:$|_)|^y(?:$|_)")
SCORES = re.compile(r"(?i)score|mix|lookup|prob|predict|blend|apply|eval")
UPDATES = re.compile(r"(?i)update|insert|build|observe|learn|add|prefill|train|init")


def names_in(node):
    """The names that an expression reads, its attributes too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def lower_of_two_losses(source):
    """Lines that take the lower of two losses for each token: torch.minimum(nll_a, nll_b) (#659)."""
    for node in source.minimums:
        is_loss = [any(NLL.search(name) for name in names_in(argument)) for argument in node.args]
        if len(is_loss) == 2 and all(is_loss):
            yield node.lineno


def target_in_table_index(source):
    """Lines of a scoring function that hash the target into the index of a table: (context ^ (target * prime)) (#779).

    The update of a table may do so. Only functions whose name says that they score, and not that they update, count.
    """
    if "^" not in source.text:
        return
    for function in source.functions:
        if not SCORES.search(function.name) or UPDATES.search(function.name):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor) and hashes_target(node):
                yield node.lineno


def hashes_target(node):
    """Is a side of this exclusive-or a product with the target?"""
    for part in ast.walk(node):
        is_product = isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult)
        if is_product and any(TARGET.search(name) for name in names_in(part)):
            return True
    return False
