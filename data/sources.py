"""Reading text: source files -> documents -> blocks, which are the units of work.

Where a document begins (`where`) is (file, byte offset, line, number in the stream). A job that was killed continues
from there.
"""

import hashlib
import json
import os
import re
import zlib
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import zstandard

from common import READ_BYTES, BadInput
from processes import say

BLOCK_BYTES = 1 << 19  # of a unit of work
LONGEST = 100_000  # bytes of a document in a .txt
START = (0, 0, 1, 0)  # where the first document begins
SEPARATOR = re.compile(rb"\f|<\|endoftext\|>")
LONGEST_SEPARATOR = 16  # bytes, or a little more
HASHES = 1 << 64  # the hashes of texts lie below


# ---- files ----------------------------------------------------------------------------------------------------------


def _kind(path):
    """ "txt" or "jsonl", by the name of a file; None of any other kind."""
    match = re.search(r"\.(txt|jsonl)(\.gz|\.zst)?$", path.name)
    return match and match.group(1)


def _unreadable(error):
    raise BadInput(f"{error.filename}: cannot be read ({error.strerror})")


def _files_inside(folder):
    """The text files in a folder, in the folders in it and in those that are linked there, sorted by path.

    Nothing is read twice, however many links lead to it. What is left out is said.
    """
    candidates = []
    folders_to_read = [folder]
    folders_read = set()
    while folders_to_read:
        for place, folders, names in os.walk(folders_to_read.pop(0), onerror=_unreadable):
            place = Path(place)
            state = place.stat()
            identity = state.st_dev, state.st_ino
            if identity in folders_read:
                folders.clear()
                continue
            folders_read.add(identity)
            folders_to_read += sorted(place / name for name in folders if (place / name).is_symlink())
            candidates += [place / name for name in names if _kind(place / name)]
    files = {}
    for path in sorted(candidates, key=lambda path: (path.is_symlink(), path)):
        if path.name.startswith("._"):
            say("skipped", file=path, reason="resource_fork_of_macOS")
        elif not path.is_file():
            say("skipped", file=path, reason="link_to_nothing" if path.is_symlink() else "not_a_file")
        else:
            files.setdefault(path.resolve(), path)
    return sorted(files.values())


def find_sources(sources):
    """The files of the sources, in the order that fixes the order of the documents."""
    files = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = _files_inside(source)
            if not inside:
                raise BadInput(f"{source}: no .txt or .jsonl file in this folder (.gz and .zst of them are read too)")
            files += inside
        elif not source.exists():
            raise BadInput(f"{source}: no such file or folder")
        elif not _kind(source):
            raise BadInput(f"{source}: unknown kind of file; use .txt or .jsonl, plain or with .gz or .zst")
        else:
            files.append(source)
    for path in files:
        if not os.access(path, os.R_OK):
            raise BadInput(f"{path}: no permission to read it")
    return files


# ---- bytes ----------------------------------------------------------------------------------------------------------


DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}


def _pieces(path, file, skip):
    """Decompressed pieces of a file from byte `skip` on. One that ends early is an error, not a short text."""
    if path.suffix in DECOMPRESSORS:
        yield from _decompressed(path, file, skip)
        return
    file.seek(skip)
    while piece := file.read(READ_BYTES):
        yield piece


def _decompressed(path, file, skip):
    """_pieces() of a compressed file, which may be several streams, one after the other."""
    stream = None
    may_be_padded = False  # gzip allows zeros after a stream, zstd does not
    try:
        while data := file.read(READ_BYTES // 16):
            while data:
                if stream is None and may_be_padded:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                if stream is None:
                    stream = DECOMPRESSORS[path.suffix]()
                piece = stream.decompress(data)
                if len(piece) > skip:
                    yield piece[skip:]
                skip = max(skip - len(piece), 0)
                may_be_padded = path.suffix == ".gz"
                data = b""
                if stream.eof:
                    data = stream.unused_data
                    stream = None
    except (zlib.error, zstandard.ZstdError) as error:
        byte = file.tell()
        raise BadInput(f"{path}: corrupt near compressed byte {byte:,} ({error}); "
                       "fetch or compress it again") from None
    if stream is not None:
        raise BadInput(f"{path}: ends in the middle of its compressed data; fetch or compress it again")


# ---- documents ------------------------------------------------------------------------------------------------------


def _json_lines(pieces, offset, line):
    """(byte offset, line, raw document) of each line that is not blank."""
    rest = b""
    for piece in chain(pieces, [None]):
        is_end = piece is None
        lines = (rest + (piece or b"")).split(b"\n")
        rest = b"" if is_end else lines.pop()
        for raw in lines:
            if raw and not raw.isspace():
                yield offset, line, raw
            offset += len(raw) + 1
            line += 1


def _text_documents(pieces, offset, line):
    """(byte offset, line, raw document). Documents end at a form feed or <|endoftext|>, and in a longer text at the
    last paragraph before 100,000 bytes.

    Where one ends depends only on the bytes after its beginning, so a resumed job cuts at the same places.
    """
    buffer = b""
    begin = 0
    for piece in chain(pieces, [None]):
        is_end = piece is None
        buffer = buffer[begin:] + (piece or b"")
        offset += begin
        begin = 0
        while begin < len(buffer):
            most = begin + LONGEST + LONGEST_SEPARATOR
            match = SEPARATOR.search(buffer, begin, most)
            if match:
                end, following = match.start(), match.end()
            elif len(buffer) > most:
                end = following = _paragraph_end(buffer, begin)
            elif is_end:
                end = following = len(buffer)
            else:
                break
            if buffer[begin:end].strip():
                yield offset + begin, line, buffer[begin:end]
            begin = following


def _paragraph_end(buffer, begin):
    """Where to cut a text: after a paragraph, else a line, else a word, else a character."""
    for mark in (b"\n\n", b"\n", b" "):
        place = buffer.rfind(mark, begin + LONGEST // 2, begin + LONGEST)
        if place > 0:
            return place + len(mark)
    place = begin + LONGEST
    while buffer[place] & 0xC0 == 0x80:  # inside a character
        place -= 1
    return place


def documents(files, start):
    """(where, raw bytes, bytes read on disk) of every document from `start` on."""
    first, offset, line, number = start
    bytes_before = sum(path.stat().st_size for path in files[:first])
    for index in range(first, len(files)):
        path = files[index]
        split = _json_lines if _kind(path) == "jsonl" else _text_documents
        with open(path, "rb") as file:
            for byte, row, raw in split(_pieces(path, file, offset), offset, line):
                if byte == 0:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                yield (index, byte, row, number), raw, bytes_before + file.tell()
                number += 1
        bytes_before += path.stat().st_size
        offset = 0
        line = 1


class Block(NamedTuple):
    """A unit of work."""

    documents: list  # (where, raw bytes)
    names: dict  # {file: its path}
    read: int  # bytes read on disk so far


def blocks(files, start=START, limit=None, after=-1):
    """The documents numbered `after` + 1 to `limit` - 1, about half a megabyte at a time."""
    def make_block(held, read):
        return Block(held, {where[0]: str(files[where[0]]) for where, _ in held}, read)

    held = []
    size = 0
    read = 0
    for where, raw, read in documents(files, start):
        number = where[3]
        if limit is not None and number >= limit:
            break
        if number > after:
            held.append((where, raw))
            size += len(raw)
        if size >= BLOCK_BYTES:
            yield make_block(held, read)
            held = []
            size = 0
    if held:
        yield make_block(held, read)


# ---- texts ----------------------------------------------------------------------------------------------------------


def text_of(block, where, raw, key):
    """The text of one raw document."""
    path = block.names[where[0]]
    line = where[2]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = where[1] + error.start
        raise BadInput(f"{path}: not UTF-8 at byte {byte:,} (0x{raw[error.start]:02x}); "
                       "convert the file to UTF-8") from None
    if _kind(Path(path)) == "txt":
        return text
    try:
        row = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{path}:{line}: not JSON ({error}); every line must be one JSON object") from None
    except RecursionError:
        raise BadInput(f"{path}:{line}: nested too deeply; mend or remove the line") from None
    if not isinstance(row, dict):
        raise BadInput(f"{path}:{line}: {_json_kind(row)}; every line must be one JSON object")
    if key not in row:
        names = ", ".join(repr(name[:20])[1:-1] for name in sorted(row)[:6])
        fields = f"fields {names}" if names else "no fields"
        raise BadInput(f"{path}:{line}: no text under {key!r} (the line has {fields}); name the field by --text-key")
    if not isinstance(row[key], str):
        kind = _json_kind(row[key])
        raise BadInput(f"{path}:{line}: {key!r} is {kind}, not a text; mend or remove the line")
    if b"\\u" in raw:  # only an escape can make half a surrogate pair
        try:
            row[key].encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{path}:{line}: half a surrogate pair at character {error.start}; mend the line") from None
    return row[key]


JSON_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}


def _json_kind(value):
    """What a value is in the words of JSON."""
    if value is None:
        return "null"
    return JSON_KINDS.get(type(value), "an object")


def hashes(text):
    """Two independent numbers below HASHES: one chooses the split of a document, one the tokenizer's sample."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
