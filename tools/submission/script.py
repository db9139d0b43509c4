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
    nodes: tuple[ast.AST, ...]  # of its syntax tree
    imports: dict[str, int]  # {top-level module: line}, also of imports in functions
    strings: frozenset[str]  # every text in it


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
    nodes = tuple(ast.walk(tree))
    strings = frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return Script(source.decode("utf-8", "replace"), nodes, imports_of(nodes), strings)


def imports_of(nodes):
    """{top-level module: line} of what these nodes of a tree import."""
    found = {}
    for node in nodes:
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(name)):
                names = [name]
            case _:
                continue
        for name in names:
            found.setdefault(name.partition(".")[0], node.lineno)
    return found


def parse(source):
    """The syntax tree of Python source, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd escape in a foreign string
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def definitions(source):
    """The names of the functions and classes of Python source; none if it is no Python."""
    nodes = ast.walk(parse(source) or ast.Module())
    return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


# ---- packed scripts -------------------------------------------------------------------------------------------------


def unpacked(source, tree):
    """The script inside a self-extracting one, or None: its longest literal, or our comment, decoded."""
    if b"exec" not in source or b"decompress" not in source:
        return None
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                and isinstance(node.value, (str, bytes)) and len(node.value) >= 1000]
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


def by_brotli(data):
    import brotli

    try:
        return brotli.Decompressor().process(data, output_buffer_limit=MOST_SOURCE)
    except (brotli.error, TypeError):  # an old brotli knows no limit
        return None


RAW_LZMA = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2}]}
DECOMPRESS = (  # by any compressor in use, up to a length
    lambda data: lzma.LZMADecompressor().decompress(data, MOST_SOURCE),
    lambda data: lzma.LZMADecompressor(**RAW_LZMA).decompress(data, MOST_SOURCE),
    lambda data: zlib.decompressobj().decompress(data, MOST_SOURCE),
    lambda data: bz2.BZ2Decompressor().decompress(data, MOST_SOURCE),
    by_brotli)


def decompressed(decode, data):
    """Python source from encoded and compressed bytes; None if it is none."""
    try:
        data = decode(data)
    except (ValueError, OverflowError):
        return None
    for decompress in DECOMPRESS:
        try:
            inner = decompress(data)
        except (lzma.LZMAError, zlib.error, OSError, ValueError, EOFError, ImportError):
            continue
        if inner and len(inner) < MOST_SOURCE and parse(inner):
            return inner
    return None


# ---- looks ----------------------------------------------------------------------------------------------------------


NLL = re.compile(r"(?i)(?:^|_)(?:nll|ce|xent|loss(?:es)?)(?:$|_|\d)")
TARGET = re.compile(r"(?:^|_)(?:tgt|target|targets)(?:$|_)|^y(?:$|_)")
SCORES = re.compile(r"(?i)score|mix|lookup|prob|predict|blend|apply|eval")
UPDATES = re.compile(r"(?i)update|insert|build|observe|learn|add|prefill|train|init")


def has_name(node, pattern):
    """Does an expression read a name or an attribute of this pattern?"""
    names = (getattr(part, "id", None) or getattr(part, "attr", "") for part in ast.walk(node))
    return any(map(pattern.search, names))


def lower_of_two_losses(source):
    """Lines that take the lower of two losses for each token: torch.minimum(nll_a, nll_b) (#659)."""
    for node in source.nodes:
        match node:
            case ast.Call(func=ast.Name("minimum") | ast.Attribute(attr="minimum"), args=[one, other]):
                if has_name(one, NLL) and has_name(other, NLL):
                    yield node.lineno


def target_in_table_index(source):
    """Lines of a scoring function that hash the target into the index of a table: (context ^ (target * prime)) (#779).

    The update of a table may do so. Only functions whose name says that they score, and not that they update, count.
    """
    functions = [node for node in source.nodes if isinstance(node, ast.FunctionDef)]
    for function in functions:
        if SCORES.search(function.name) and not UPDATES.search(function.name):
            yield from (node.lineno for node in ast.walk(function) if hashes_target(node))


def hashes_target(node):
    """Is this an exclusive-or with a product of which the target is a factor?"""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitXor)):
        return False
    products = [part for part in ast.walk(node) if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mult)]
    return any(has_name(product, TARGET) for product in products)
