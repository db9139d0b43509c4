"""Text -> tokenizer -> shards, with proofs: makes a data set that train_gpt.py reads, in the contest's own format.

    python data/prepare.py --source builtin                       no download: the documentation on this machine
    python data/prepare.py --source my.txt more/ --out data/datasets/mine --vocab-size 1024
    python data/prepare.py --source my.txt --out data/datasets/mine_caseops --caseops
    python data/prepare.py --check data/datasets/mine             proves any data set again, from its shards alone

The stream of documents is read once for the tokenizer's sample, once for validation, once for training. One process
reads, all cores parse and encode, results come back in order: the bytes written do not depend on --workers, and memory
does not depend on the size of the input. train_gpt.py owns the shard reader and the byte table; both are taken from
there, in the parent process only, because importing it imports torch.
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import heapq
import importlib.metadata
import importlib.util
import inspect
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import sentencepiece
    import zstandard
except ImportError as missing:
    sys.exit(f"error: this needs the package {missing.name}: pip install -r requirements.txt")

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # python -P and PYTHONSAFEPATH leave it out
    sys.path.insert(0, HERE)

import caseops

ROOT = Path(__file__).resolve().parent.parent
TOOL = "prepare 1"  # part of every manifest: change it when the same input would give other bytes
MAGIC, VERSION, HEADER = 20240520, 1, 1024  # a shard: 256 little-endian int32 (these, the count, zeros), uint16 tokens
BOS = 1  # begins every document; there is no end-of-document token
PREFIX = 64  # two documents that begin with the same so many tokens count as copies
READ, BLOCK, LONG = 1 << 20, 1 << 19, 100_000  # bytes: of a read, of a unit of work, of the longest document in a .txt
SPAN = 2_000_000  # tokens in a unit of work of the proof
EVERY = 1 << 64  # the hashes of texts lie below
START = (0, 0, 1, 0)  # where the first document begins: file, byte offset, line, number in the stream
SPACE = "\u2581"  # what SentencePiece writes for a space
NOT_LETTERS = bytes(b for b in range(128) if not chr(b).isalnum())
SEPARATOR = re.compile(rb"\f|<\|endoftext\|>")
SHARD = re.compile(r"fineweb_(val|val_bytes|train)_(\d+)\.bin")
STATE, MANIFEST, MODEL, BUILTIN = ".prepare.json", "manifest.json", "tokenizer.model", "builtin.jsonl.zst"
RESTART, MOVING = ".restart", ".restart_moving"  # folders in --out: what --restart makes, and has made

# The published FineWeb validation set. Every tokenizer that normalises with nmt_nfkc counts the same bytes. The tokens
# of the two sp4096 exports are known only to the last full row, so those are recognised by bytes per token.
FINEWEB = dict(documents=50_000, bytes=151_080_891, tokens={1024: 62_021_846, 8192: 40_540_803},
               bytes_per_token={1024: (2.435930,), 4096: (3.319681, 3.319252), 8192: (3.726638,)},
               caseops_tokens={8192: 47_853_344})
CASEOPS = f"{caseops.NAME}_reserved"  # ends the names of its published CaseOps variants
DOCUMENTS, TOO_FEW = "docs_selected.jsonl", 10_000  # its text; a split of it that cost many a record (#2127)


class BadInput(Exception):
    """What a user gave cannot be used. The message is one line that names the cause and the fix; exit code 2."""


class Stopped(Exception):
    """The work ended early through no fault of the input; what is finished stays."""


def say(event, **facts):
    print(event, *(f"{key}:{value}" for key, value in facts.items()), flush=True)


def trainer():
    """train_gpt.py, the one definition of the shard format and of the byte table."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    try:
        import train_gpt
    except ImportError as error:
        raise BadInput(f"the proof needs train_gpt.py and torch ({error}): pip install -r requirements.txt") from None
    return train_gpt


def hold_standard_streams():
    """Put something that swallows everything in the place of a closed standard stream (2>&-); else the next
    file to be opened, such as a shard, would get its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


class Bar:
    """Progress with rate and time left: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, label, total, unit="B"):
        self.label, self.total, self.unit = label, max(total, 1), unit
        self.tty, self.begin = sys.stderr.isatty(), time.monotonic()
        self.first, self.last = None, self.begin

    def __call__(self, done):
        now = time.monotonic()
        self.first = done if self.first is None else self.first  # a resumed job did not do the first part just now
        if now - self.last < (0.1 if self.tty else 10):
            return
        self.last, share = now, min(done / self.total, 1)
        rate = max(done - self.first, 1) / (now - self.begin)
        left, power = int((self.total - done) / rate), 2 if rate > 1e6 else rate > 1e3
        speed = f"{rate / 1000 ** power:.1f} {' kM'[power].strip()}{self.unit}/s"
        text = f"{self.label} {share:4.0%}  {speed}  {left // 60}:{left % 60:02d} left"
        fill = int(share * 30)
        print(f"\r\033[K{'━' * fill}{'─' * (30 - fill)} {text}" if self.tty else text, file=sys.stderr,
              end="" if self.tty else "\n", flush=True)

    def close(self):
        if self.tty:
            print("\r\033[K", file=sys.stderr, end="", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# 1 Processes and files
# ---------------------------------------------------------------------------------------------------------------------


def _become_worker(parent):
    """A worker leaves Ctrl-C to its parent, and ends soon after it however the parent ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(0.3)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """Ordered, bounded map over processes. They are spawned, not forked, so they never hold torch, threads or files."""

    def __init__(self, count):
        self.count, self.pool = count, None
        if count > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(count, context, _become_worker, (os.getpid(),))

    def map(self, function, tasks):
        """(task, result) in the order of the tasks. A reader that is ahead has to wait, so memory stays flat."""
        if self.pool is None:
            yield from ((task, function(task)) for task in tasks)
            return
        waiting = deque()
        try:
            for task in chain(tasks, [None]):
                if task is not None:
                    waiting.append((task, self.pool.submit(function, task)))
                while waiting and (task is None or len(waiting) > 2 * self.count):
                    done, future = waiting.popleft()
                    yield done, future.result()
        except BrokenProcessPool:
            raise Stopped("a worker process was killed (out of memory? use fewer --workers)") from None
        finally:
            for _, future in waiting:
                future.cancel()

    def close(self):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears under its name complete and on disk, or not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path, value):
    with atomic(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def read_json(path):
    """The value in a file that this tool wrote, or None where there is no such file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not readable ({error}); remove it, or begin again with --restart") from None


def read_manifest(folder):
    """What is known about the data set in a folder, or None."""
    manifest = read_json(folder / MANIFEST)
    if manifest is not None and not {"tool", "tokenizer", "splits", "shards"} <= set(manifest):
        raise BadInput(f"{folder / MANIFEST}: not a manifest of prepare.py or fineweb.py; move it away")
    return manifest


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(READ):
            digest.update(piece)
    return digest.hexdigest()


def shards(folder, split):
    """The shards of a split by number; of "val_bytes" the byte sidecars of validation; of "*" all of them."""
    numbers = {}
    for path in Path(folder).glob(f"fineweb_{split}_[0-9]*.bin"):
        if name := SHARD.fullmatch(path.name):
            numbers[path] = int(name.group(2))
    return sorted(numbers, key=lambda path: (numbers[path], path.name))


@contextlib.contextmanager
def locked(folder):
    """One writer a folder: two would take turns overwriting each other's shards."""
    try:
        import fcntl
    except ImportError:  # not a Unix: nothing to lock with
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BadInput(f"{folder}: another process is writing here; wait for it, or choose another --out") from None
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# 2 Reading: sources -> documents -> blocks
# ---------------------------------------------------------------------------------------------------------------------


def _kind(path):
    match = re.search(r"\.(txt|jsonl)(\.gz|\.zst)?$", path.name)
    return match and match.group(1)


def _unreadable(error):
    raise BadInput(f"{error.filename}: cannot be read ({error.strerror})")


def _files_inside(folder):
    """The text files in a folder, in the folders in it and in those that are linked there, sorted by path.

    Nothing is read twice, however many links lead to it. What is left out is said.
    """
    found, links, known = [], [folder], set()
    while links:
        for place, folders, names in os.walk(links.pop(0), onerror=_unreadable):
            place = Path(place)
            state = place.stat()
            if (state.st_dev, state.st_ino) in known:
                folders.clear()
                continue
            known.add((state.st_dev, state.st_ino))
            links += sorted(place / name for name in folders if (place / name).is_symlink())
            found += [place / name for name in names if _kind(place / name)]
    once = {}
    for path in sorted(found, key=lambda path: (path.is_symlink(), path)):
        if path.name.startswith("._"):
            say("skipped", file=path, reason="resource_fork_of_macOS")
        elif not path.is_file():
            say("skipped", file=path, reason="link_to_nothing" if path.is_symlink() else "not_a_file")
        else:
            once.setdefault(path.resolve(), path)
    return sorted(once.values())


def find_sources(sources):
    """The files behind the sources, in the order that fixes the order of the documents."""
    found = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = _files_inside(source)
            if not inside:
                raise BadInput(f"{source}: no .txt or .jsonl file in this folder (.gz and .zst of them are read too)")
            found += inside
        elif not source.exists():
            raise BadInput(f"{source}: no such file or folder")
        elif not _kind(source):
            raise BadInput(f"{source}: unknown kind of file; use .txt or .jsonl, plain or with .gz or .zst")
        else:
            found.append(source)
    if locked_out := [p for p in found if not os.access(p, os.R_OK)]:
        raise BadInput(f"{locked_out[0]}: no permission to read it")
    return found


def _pieces(path, file, skip):
    """Decompressed pieces of a file from byte `skip` on. One that ends early is an error, not a short text."""
    make = {".gz": lambda: zlib.decompressobj(31),
            ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()}.get(path.suffix)
    if make is None:
        file.seek(skip)
        yield from iter(lambda: file.read(READ), b"")
        return
    frame, padded = None, False
    try:
        while data := file.read(READ // 16):
            while data:
                if frame is None and padded:  # gzip allows zeros behind a stream, zstd does not
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                frame = frame or make()
                piece = frame.decompress(data)
                if len(piece) > skip:
                    yield piece[skip:]
                skip = max(skip - len(piece), 0)
                data = frame.unused_data if frame.eof else b""
                padded = path.suffix == ".gz"
                frame = None if frame.eof else frame
    except (zlib.error, zstandard.ZstdError) as error:
        at = file.tell()
        raise BadInput(f"{path}: corrupt near compressed byte {at:,} ({error}); fetch or compress it again") from None
    if frame is not None:
        raise BadInput(f"{path}: ends in the middle of its compressed data; fetch or compress it again")


def _json_lines(pieces, offset, line):
    rest = b""
    for piece in chain(pieces, [None]):
        lines = (rest + (piece or b"")).split(b"\n")
        rest = b"" if piece is None else lines.pop()
        for raw in lines:
            if raw and not raw.isspace():
                yield offset, line, raw
            offset, line = offset + len(raw) + 1, line + 1


def _text_documents(pieces, offset, line):
    """Documents end at a form feed or <|endoftext|>, and in a longer text at the last paragraph before 100,000 bytes.

    Where one ends depends only on the bytes after its beginning, so a resumed job cuts at the same places."""
    buffer, at = b"", 0
    for piece in chain(pieces, [None]):
        buffer, offset, at = buffer[at:] + (piece or b""), offset + at, 0
        while at < len(buffer):
            match = SEPARATOR.search(buffer, at, at + LONG + 16)
            if match:
                cut, step = match.start(), match.end()
            elif len(buffer) > at + LONG + 16:
                cut = step = _paragraph_end(buffer, at)
            elif piece is None:
                cut = step = len(buffer)
            else:
                break
            if buffer[at:cut].strip():
                yield offset + at, line, buffer[at:cut]
            at = step


def _paragraph_end(buffer, at):
    for mark in (b"\n\n", b"\n", b" "):
        if (cut := buffer.rfind(mark, at + LONG // 2, at + LONG)) > 0:
            return cut + len(mark)
    cut = at + LONG
    while buffer[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return cut


class Block(NamedTuple):
    """A unit of work: documents as (where, raw bytes), the paths they came from, and the bytes read so far, on disk."""

    documents: list
    names: dict
    read: int


def documents(files, start):
    """(where, raw bytes, bytes read on disk) of every document from `start` on."""
    first, offset, line, number = start
    before = sum(f.stat().st_size for f in files[:first])
    for index in range(first, len(files)):
        path, split = files[index], _json_lines if _kind(files[index]) == "jsonl" else _text_documents
        with open(path, "rb") as file:
            for at, row, raw in split(_pieces(path, file, offset), offset, line):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if at == 0 else raw
                yield (index, at, row, number), raw, before + file.tell()
                number += 1
        before, offset, line = before + path.stat().st_size, 0, 1


def blocks(files, start=START, limit=None, after=-1):
    """The documents numbered `after` + 1 to `limit` - 1, about half a megabyte at a time."""
    held, size, read = [], 0, 0
    for where, raw, read in documents(files, start):
        if limit is not None and where[3] >= limit:
            break
        if where[3] > after:
            held.append((where, raw))
            size += len(raw)
        if size >= BLOCK:
            yield Block(held, {w[0]: str(files[w[0]]) for w, _ in held}, read)
            held, size = [], 0
    if held:
        yield Block(held, {w[0]: str(files[w[0]]) for w, _ in held}, read)


def _json_kind(value):
    """What a value is in the words of JSON."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def text_of(block, where, raw, key):
    """The text of one raw document."""
    path, line = block.names[where[0]], where[2]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, at = raw[error.start], where[1] + error.start
        raise BadInput(f"{path}: not UTF-8 at byte {at:,} (0x{byte:02x}); convert the file to UTF-8") from None
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
        has = f"fields {names}" if names else "no fields"
        raise BadInput(f"{path}:{line}: no text under {key!r} (the line has {has}); name the field by --text-key")
    if not isinstance(row[key], str):
        kind = _json_kind(row[key])
        raise BadInput(f"{path}:{line}: {key!r} is {kind}, not a text; mend or remove the line")
    if b"\\u" in raw:  # only an escape can make half a surrogate pair
        try:
            row[key].encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"{path}:{line}: half a surrogate pair at character {error.start}; mend the line") from None
    return row[key]


# ---------------------------------------------------------------------------------------------------------------------
# 3 Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def _hashes(text):
    """Two independent numbers below EVERY: one chooses the split of a document, one the tokenizer's sample."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def scan_block(task):
    """Worker: (split hash, sample hash, text) of every document that has a text; None for a text not wanted now."""
    block, key, limit = task
    texts = (text_of(block, where, raw, key) for where, raw in block.documents)
    hashed = ((*_hashes(text), text) for text in texts if text.strip())
    return [(split, rank, text if rank < limit else None) for split, rank, text in hashed]


def sample(job, workers):
    """Training documents for the tokenizer: those with the smallest hashes, up to a limit of bytes.

    Which they are depends neither on order nor on workers, and no more than the limit is ever held."""
    kept, size, limit, seen, val, progress = [], 0, EVERY, 0, set(), Bar("sample", job.total)

    def tasks():
        for block in blocks(job.files, limit=job.max_docs):
            yield block, job.text_key, limit  # the limit sinks while the heap fills

    for (block, *_), found in workers.map(scan_block, tasks()):
        for split, rank, text in found:
            seen += 1
            if seen <= job.val_docs:
                val.add(split)
            elif split >= job.val_share and text is not None and rank < limit:
                heapq.heappush(kept, (-rank, split, text))
                size += len(text.encode())
                while size > job.sample_mb * 1e6 and len(kept) > 1:
                    rank, _, text = heapq.heappop(kept)
                    size, limit = size - len(text.encode()), -rank
        progress(block.read)
    progress.close()
    # A copy of a validation document will be dropped from training, so the tokenizer must not learn from it either.
    return [text for _, split, text in sorted(kept, reverse=True) if split not in val]


def train_tokenizer(texts, vocab_size, symbols=()):
    """A SentencePiece model with the contest's options. Lines are its sentences, so no document is too long. `symbols`
    are pieces of their own, with the first ids after the four controls."""
    lines = (line for text in texts for line in text.replace("\0", " ").split("\n") if line.strip())
    sentences, model = (line[i:i + READ // 8] for line in lines for i in range(0, len(line), READ // 8)), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
            normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
            user_defined_symbols=list(symbols), max_sentence_length=READ, minloglevel=2)
    except RuntimeError as error:
        need = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        why = f"the characters of this text need at least {need.group(1)}" if need else "there is not enough text"
        raise BadInput(f"no tokenizer of {vocab_size} pieces: {why}; change --vocab-size or give more text") from None
    return model.getvalue()


def check_tokenizer(model, vocab_size, name):
    """The processor of a model with which the contest's byte table counts the bytes of a text; else BadInput.

    train_gpt.py says what is usable; more is asked of a tokenizer that this tool encodes with and proves."""
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise BadInput(f"{name}: not a SentencePiece model") from None
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    operators = caseops.operator_ids(sp)
    mixed = [p for p in pieces if len(p) > 1 and caseops.LITERAL.search(p)] if operators else []
    fault = trainer().tokenizer_fault(sp)
    if vocab_size not in (None, len(pieces)):
        fault = f"{len(pieces)} pieces, but --vocab-size is {vocab_size}; they must agree"
    elif not fault and sp.normalize(" a")[:1] in (SPACE, " "):  # which decoding takes away
        fault = f"it makes {sp.normalize(' a')!r} of ' a'; train it with add_dummy_prefix=False and nmt_nfkc"
    elif not fault and mixed:
        fault = f"a case operator inside the piece {ascii(mixed[0])}, it must be a token of its own"
    if fault:
        raise BadInput(f"{name}: {fault}")
    return sp


@lru_cache(maxsize=2)
def _load(path, stamp):
    return sentencepiece.SentencePieceProcessor(model_file=path)


def load(path):
    """The processor of a model file, read once a process unless the file changes."""
    return _load(str(path), os.stat(path).st_mtime_ns)


def document_keys(ids, text):
    """Two fingerprints of a document: of its first tokens, and of its text without case, spaces and punctuation."""
    return (hashlib.blake2b(np.array(ids[:PREFIX], "<u2").tobytes(), digest_size=8).digest(),
            hashlib.blake2b(text.casefold().encode().translate(None, NOT_LETTERS), digest_size=8).digest())


def _key_array(keys):
    return np.frombuffer(b"".join(chain.from_iterable(keys)), "<u8").reshape(-1, 2)


def _copies(keys, known):
    """Which documents share a fingerprint with those whose sorted keys are `known`."""
    found = np.zeros(len(keys), bool)
    for column, old in zip(keys.T, known):
        if len(old):
            found |= old[np.minimum(np.searchsorted(old, column), len(old) - 1)] == column
    return found


# ---------------------------------------------------------------------------------------------------------------------
# 4 Encoding: blocks -> tokens -> shards
# ---------------------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    columns: tuple  # of uint16: every document with its BOS and, where a sidecar is wanted, the bytes of each token
    lengths: np.ndarray  # tokens of each document
    keys: np.ndarray  # (documents, 2) uint64
    index: np.ndarray  # which documents of the block these are
    empty: np.ndarray  # which have no text


def encode_block(task):
    """Worker: the documents of a block whose hash lies in [low, high), as tokens and, where byte tables are given, the
    bytes of these. Each document is decoded again, as a proof."""
    block, key, model, low, high, tables = task
    sp, index, texts, empty, keys = load(model), [], [], [], []
    transform, invert = caseops.codec(sp)
    for i, (where, raw) in enumerate(block.documents):
        text = text_of(block, where, raw, key)
        if not text.strip():
            empty.append(i)
        elif (low, high) == (0, EVERY) or low <= _hashes(text)[0] < high:
            index.append(i)
            texts.append(text)
    taken = list(map(transform, texts))
    ids = sp.encode(taken, num_threads=1) if taken else []
    for i, text, take, row in zip(index, texts, taken, ids):
        keys.append(document_keys(row, invert(decoded := sp.decode(row))))
        if invert(take) != text or decoded != sp.normalize(take).replace(SPACE, " "):
            path, at, line = block.names[block.documents[i][0][0]], *block.documents[i][0][1:3]
            raise BadInput(f"{path}:{line}: the tokenizer does not give back the document at byte {at:,}, so its bytes "
                           "could not be counted; choose another tokenizer")
    lengths = np.array([len(row) + 1 for row in ids], np.int64)
    tokens = np.fromiter(chain.from_iterable(chain((BOS,), row) for row in ids), np.uint16, int(lengths.sum()))
    sidecar = [caseops.byte_counts(tokens, tables, caseops.operator_ids(sp)).astype(np.uint16)] if tables else []
    return Encoded((tokens, *sidecar), lengths, _key_array(keys), np.array(index, np.int64), np.array(empty, np.int64))


class ShardWriter:
    """The shards of one split: full ones, then a shorter last one, each complete under its name or absent. Of several
    names ("val" and its sidecar "val_bytes") each gets a column, and their shards end at the same tokens."""

    def __init__(self, folder, names, size, index):
        self.folder, self.names, self.size, self.index = folder, names, size, index
        self.count, self.files, self.stack = 0, [], contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)

    def write(self, *columns):
        """Yields n whenever a shard is finished by the first n of these tokens."""
        done = 0
        while done < len(columns[0]):
            if not self.files:
                paths = (self.folder / f"fineweb_{name}_{self.index:06d}.bin" for name in self.names)
                self.files = [self.stack.enter_context(atomic(path)) for path in paths]
                for file in self.files:
                    file.write(bytes(HEADER))
            parts = [column[done:done + self.size - self.count] for column in columns]
            for file, part in zip(self.files, parts):
                file.write(part.astype("<u2", copy=False).tobytes())
            self.count, done = self.count + len(parts[0]), done + len(parts[0])
            if self.count == self.size:
                self.finish()
                yield done

    def finish(self):
        for file in self.files:
            file.seek(0)
            file.write(np.array([MAGIC, VERSION, self.count], "<i4").tobytes())
        if self.files:
            self.stack.close()
            self.count, self.files, self.index = 0, [], self.index + 1


def fresh_state(job):
    """What a killed job needs to continue: all before `cursor`, and `skip` tokens after it, is in finished shards."""
    counts = "val_documents val_tokens train_documents train_tokens train_docs_dropped empty_docs_skipped"
    return dict(job=job.description, split="val", cursor=START, after=-1, skip=0, shards=dict(val=0, train=0),
                counts=dict.fromkeys(counts.split(), 0))


def too_few(job, purpose, found):
    return BadInput(f"too few documents for {purpose}: found {found:,} (validation: {job.description['validation']}); "
                    "give more text, or another --val-docs or --val-fraction")


def encode(job, workers, state, split, val_keys=None):
    """Writes the shards of a split from where the state stands. Training drops copies of validation documents."""
    low, high = (0, job.val_share or EVERY) if split == "val" else (job.val_share, EVERY)
    counts, skip, last, progress = state["counts"], state["skip"], None, Bar(split, job.total)
    source, names, tables = blocks(job.files, tuple(state["cursor"]), job.max_docs, state["after"]), [split], None
    if split == "val" and job.caseops:
        names, tables = [split, "val_bytes"], trainer().byte_tables(load(job.out / MODEL), job.vocab_size)
    tasks = ((block, job.text_key, str(job.out / MODEL), low, high, tables) for block in source)
    with ShardWriter(job.out, names, job.shard_tokens, state["shards"][split]) as writer:
        for (block, *_), got in workers.map(encode_block, tasks):
            before, keep, empty = dict(counts), np.ones(len(got.lengths), bool), len(got.empty)
            room = job.val_docs - counts["val_documents"]
            if split == "train":
                keep = ~_copies(got.keys, val_keys)
                counts["train_docs_dropped"] += int((~keep).sum())
            elif job.val_docs and len(keep) >= room:
                keep[room:], last = False, block.documents[got.index[room - 1]][0]
                empty = int((got.empty < got.index[room - 1]).sum())
            columns = [column[np.repeat(keep, got.lengths)] for column in got.columns]
            counts[f"{split}_documents"] += int(keep.sum())
            counts[f"{split}_tokens"] += len(columns[0])
            counts["empty_docs_skipped"] += empty if split == "train" or job.val_docs else 0
            for done in writer.write(*(column[skip:] for column in columns)):
                state["shards"][split] = writer.index
                here = dict(cursor=block.documents[0][0], skip=skip + done, counts=before)
                write_json(job.out / STATE, {**state, **here})
            skip = max(skip - len(columns[0]), 0)
            progress(block.read)
            if last:
                break
        writer.finish()
    progress.close()
    found = counts[f"{split}_documents"]
    if not found or split == "val" and found < job.val_docs:
        raise too_few(job, "validation" if split == "val" else "training", found)
    state["shards"][split] = writer.index
    state.update(split="train" if split == "val" else "done", skip=0, cursor=last or START)
    state.update(after=last[3] if last else -1)
    write_json(job.out / STATE, state)
    say(split, documents=found, tokens=counts[f"{split}_tokens"], shards=writer.index)


# ---------------------------------------------------------------------------------------------------------------------
# 5 Proof: what can be known from the shards alone
# ---------------------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One line of a proof."""

    name: str
    expected: object
    found: object
    ok: bool
    note: str = ""

    def __str__(self):
        expected, found = (f"{v:,}" if type(v) is int else str(v) for v in (self.expected, self.found))
        return f"{'ok' if self.ok else 'FAILED':<6}  {self.name}: expected {expected}, found {found}{self.note}"


def same(name, expected, found, note=""):
    return Check(name, expected, found, expected == found, note)


def at_most(name, limit, found, note=""):
    return Check(name, f"at most {limit:,}", found, found <= limit, note)


class Survey(NamedTuple):
    """What the proof of a split reads: files in order, and what it takes to understand them."""

    paths: list  # of the shards of a split
    model: str
    tables: tuple  # those of train_gpt.byte_tables
    reencode: bool = False
    sidecar: list = ()  # the files with the bytes of each token, if there are any
    exact: bool = True  # False: the sidecar counts the text before normalisation, as published ones do


def _span(task):
    """Worker: sums, keys and remarks on the documents that begin in tokens [begin, end) of one shard."""
    of, index, begin, end = task
    sp, base, name = load(of.model), of.tables[0], Path(of.paths[index]).name
    transform, invert = caseops.codec(sp)
    ids = np.array(np.memmap(of.paths[index], "<u2", "r", HEADER)[begin:end])
    sums, keys, notes = Counter(tokens=len(ids), outside=int((ids >= len(base)).sum())), [], {}
    starts = np.flatnonzero(ids == BOS)
    if sums["outside"]:
        at = int(np.argmax(ids >= len(base)))
        notes["outside"] = f" (token {ids[at]} at offset {HEADER + 2 * (begin + at)} of {name})"
    elif len(starts):
        ids, first = np.concatenate([ids[starts[0]:], *_rest(of.paths, index, end)]), begin + int(starts[0])
        cuts = [*(starts - starts[0]).tolist(), len(ids)]
        if ids.max() >= len(base):  # in the tail; the span where that token stands reports it
            return sums, _key_array(keys), notes
        counts = caseops.byte_counts(ids, of.tables, caseops.operator_ids(sp))
        charged = np.concatenate([*_values(of.sidecar, index, first, len(ids))]) if of.sidecar else counts
        wrong = charged != counts if of.exact else (charged > 0) & (counts == 0)  # an operator or BOS that counts
        sizes, wrong = np.add.reduceat(counts, cuts[:-1]), np.logical_or.reduceat(wrong, cuts[:-1])
        sums.update(documents=len(starts), bytes=int(charged.sum()))
        for low, high, size, sidecar in zip(cuts, cuts[1:], sizes.tolist(), wrong.tolist()):
            row = ids[low + 1:high].tolist()
            text = invert(sp.decode(row))
            keys.append(document_keys(row, text))
            sums["decoded"] += (length := len(text.encode()))
            faults = dict(unequal=length != size, sidecar=sidecar,
                          reencoded=of.reencode and sp.encode(transform(text)) != row)
            for fault in (f for f, found in faults.items() if found):
                sums[fault] += 1
                notes.setdefault(fault, f" (first at token {first + low} of {name})")
    return sums, _key_array(keys), notes


def _values(paths, index, at, count):
    """`count` values from `at` of one file on, which may go on in later files."""
    for path in paths[index:]:
        part = np.array(np.memmap(path, "<u2", "r", HEADER)[at:at + count], np.int64)
        yield part
        at, count = 0, count - len(part)
        if not count:
            return


def _rest(paths, index, at):
    """The tokens from `at` of one shard to the next document, which may begin in a later shard."""
    for path in paths[index:]:
        ids = np.memmap(path, "<u2", "r", HEADER)
        for begin in range(at, len(ids), 1 << 16):
            part = np.array(ids[begin:begin + (1 << 16)])
            if len(stop := np.flatnonzero(part == BOS)):
                yield part[:stop[0]]
                return
            yield part
        at = 0


def survey(of, workers, known=None):
    """(sums, remarks, sorted keys) of a Survey. With `known`, the keys of the other split, copies are counted."""
    lengths = [(os.path.getsize(p) - HEADER) // 2 for p in of.paths]
    tasks = ((of, i, at, min(at + SPAN, n)) for i, n in enumerate(lengths) for at in range(0, n, SPAN))
    sums, notes, keys, progress = Counter(), {}, [np.zeros((0, 2), "<u8")], Bar("proof", sum(lengths), "tokens")
    for _, (some, found, why) in workers.map(_span, tasks):
        if known is None:
            keys.append(found)
        else:
            sums["copies"] += int(_copies(found, known).sum())
        sums.update(some)
        notes = {**why, **notes}
        progress(sums["tokens"])
    progress.close()
    return sums, notes, np.sort(np.concatenate(keys).T)


def _table_checks(sp, tables):
    """The byte table against a second reading of the rule: what a piece adds to a text when it stands alone."""
    size, wrong = sp.vocab_size(), 0
    for i, (base, lead, edge) in enumerate(zip(*tables)):
        plain = not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))
        alone = 0 if not plain else 1 if sp.is_byte(i) else len(sp.id_to_piece(i).replace(SPACE, " ").encode())
        wrong += base + lead != alone or edge == plain or (lead and not sp.id_to_piece(i).startswith(SPACE))
    yield same("tokenizer", "usable", trainer().tokenizer_fault(sp) or "usable")
    yield same("wrong entries in the byte table", 0, int(wrong))


def _shard_checks(paths, train_gpt):
    """Names, format and numbering of the shard files."""
    folders = {split: path.parent for split, _, path in paths}
    for split in folders:
        try:
            train_gpt.list_shards(folders[split], split)
        except train_gpt.BadInput as error:
            yield Check(f"{split}: files that train_gpt.py reads", "numbered shards", str(error), False)
    for split, number, path in paths:
        digits = len(SHARD.fullmatch(path.name).group(2))  # leading zeros, or none
        name = f"fineweb_{split}_{number:0{digits}d}.bin"
        try:
            train_gpt.read_shard(path)
            yield same("shard", name, path.name, "" if name == path.name else " (a number is missing)")
        except train_gpt.BadInput as error:
            yield Check("shard", name, str(error).removeprefix(f"{path}: ").partition("; ")[0], False)


def _sidecar_checks(folder, case):
    """One byte sidecar beside every validation shard of a CaseOps tokenizer, with as many values; none otherwise."""
    val, sidecar = shards(folder, "val"), shards(folder, "val_bytes")
    if case or sidecar:
        yield same("byte sidecars of the validation shards", len(val) if case else 0, len(sidecar),
                   "" if case else " (the tokenizer has no case operators)")
    for one, other in zip(val, sidecar):
        if one.stat().st_size != other.stat().st_size:
            yield same(f"bytes in the file {other.name}", one.stat().st_size, other.stat().st_size)


def fineweb_checks(folder, vocab_size, sums, known, sidecar):
    """A published FineWeb folder against the constants of its validation set."""
    yield same("FineWeb validation documents", known["documents"], sums["documents"])
    if sidecar:  # the published one counts the documents before normalisation, which are 151,080,645 bytes (#1729)
        yield Check("FineWeb validation bytes in the sidecar", f"{known['bytes']:,} within 0.01%", sums["bytes"],
                    abs(sums["bytes"] / known["bytes"] - 1) < 1e-4)
        tokens = known["caseops_tokens"].get(vocab_size)
        if tokens and folder.name == f"fineweb10B_sp{vocab_size}_{CASEOPS}":
            yield same("FineWeb validation tokens", tokens, sums["tokens"])
        return
    yield same("FineWeb validation bytes", known["bytes"], sums["bytes"])
    if folder.name == f"fineweb10B_sp{vocab_size}":
        if tokens := known["tokens"].get(vocab_size):
            yield same("FineWeb validation tokens", tokens, sums["tokens"])
        if ratios := known["bytes_per_token"].get(vocab_size):
            found = sums["bytes"] / max(sums["tokens"] - 1, 1)
            yield Check("FineWeb bytes per token", " or ".join(f"{r:.6f}" for r in ratios), f"{found:.6f}",
                        any(abs(found / r - 1) < 1e-5 for r in ratios))


def prove(folder, model, workers, expected=None, fineweb=None):
    """Yields the checks of a data set and, last, its totals {split: {documents, tokens, bytes}}.

    `expected` holds totals counted elsewhere, such as while encoding; `fineweb` the constants of the published
    validation set where this should be it."""
    train_gpt, sp, totals, keys = trainer(), load(model), {}, None
    tables, case = train_gpt.byte_tables(sp, sp.vocab_size()), caseops.operator_ids(sp)
    paths = [(split, i, p) for split in ("val", "val_bytes", "train") for i, p in enumerate(shards(folder, split))]
    yield from _table_checks(sp, tables)
    file_checks = [*_shard_checks(paths, train_gpt), *_sidecar_checks(folder, case)]
    yield from file_checks
    if not all(c.ok for c in file_checks):  # the rest would read garbage
        return
    for split in (s for s in ("val", "train") if shards(folder, s)):
        files, sidecar = shards(folder, split), shards(folder, "val_bytes") if split == "val" else []
        of = Survey(files, str(model), tables, split == "val", sidecar, exact=not fineweb)
        sums, notes, found = survey(of, workers, keys)
        keys = found if keys is None else keys
        yield same(f"{split}: tokens outside the vocabulary of {len(tables[0]):,}", 0, sums["outside"],
                   notes.get("outside", ""))
        if sums["outside"]:
            return
        totals[split] = {k: sums[k] for k in ("documents", "tokens", "bytes")}
        yield same(f"{split}: first token", BOS, int(train_gpt.read_shard(files[0])[0]))
        for name, count in (expected or {}).get(split, {}).items():
            yield same(f"{split}: {name}", count, sums[name])
        many = f"of {sums['documents']:,}"
        yield same(f"{split}: documents {many} whose decoded bytes differ from the byte table", 0, sums["unequal"],
                   notes.get("unequal", ""))
        if sidecar:
            yield same(f"val: documents {many} whose byte sidecar is wrong", 0, sums["sidecar"],
                       notes.get("sidecar", ""))
            share = 1e-4 if fineweb else 0  # published sidecars count the documents before normalisation
            yield Check("val: bytes in the sidecar", f"{sums['decoded']:,} within {share:.2%}", sums["bytes"],
                        abs(sums["bytes"] - sums["decoded"]) <= share * sums["decoded"])
        if split == "val":
            charged = charged_bytes(train_gpt, files, tables, sidecar)
            yield same("val: bytes that train_gpt.py charges", sums["bytes"], charged)
            # Normalising twice rarely changes a text (a ligature before an accent); a wrong tokenizer changes them all.
            yield at_most(f"val: documents {many} whose text gives other tokens", max(1, sums["documents"] // 10),
                          sums["reencoded"], notes.get("reencoded", ""))
            if fineweb:
                yield from fineweb_checks(folder, len(tables[0]), sums, fineweb, bool(sidecar))
        else:
            # FineWeb was deduplicated within each crawl only, so the published set may hold some copies; ours must not.
            yield at_most("train: copies of validation documents", totals["val"]["documents"] // 100 if fineweb else 0,
                          sums["copies"])
    yield totals


def charged_bytes(train_gpt, paths, tables, sidecar=()):
    """What train_gpt.py divides a score by: the sidecar where there is one, else its byte table on the tokens."""
    if sidecar:
        return sum(int(train_gpt.read_shard(path).sum(dtype=np.int64)) for path in sidecar)
    total, last = 0, np.zeros(0, np.uint16)
    for path in paths:
        ids = train_gpt.read_shard(path)
        for begin in range(0, len(ids), SPAN):
            part = np.concatenate([last, ids[begin:begin + SPAN]])
            total, last = total + int(train_gpt.target_bytes(part, tables).sum(dtype=np.int64)), part[-1:]
    return total


def file_table(folder, workers):
    """Name, tokens and SHA-256 of every shard and sidecar."""
    paths = [path for split in ("val", "val_bytes", "train") for path in shards(folder, split)]
    return [dict(name=p.name, tokens=(p.stat().st_size - HEADER) // 2, sha256=digest)
            for p, digest in workers.map(sha256, paths)]


def find_tokenizer(folder, vocab_size=None):
    """Where the tokenizer of a data set is: beside its shards, or in the contest's layout."""
    if (folder / MODEL).is_file():
        return folder / MODEL
    size, variant = re.search(r"(?:_sp(\d+)(.*))?$", folder.name).groups("")
    name = f"fineweb_{vocab_size or size or '*'}_bpe{variant}.model"
    found = list(folder.parent.parent.glob(f"tokenizers/{name}"))
    if len(found) != 1:
        what = f"{'more than one' if found else 'no'} ../../tokenizers/{name}"
        raise BadInput(f"{folder}: no {MODEL} and {what}; give --tokenizer FILE")
    return found[0]


def check(folder, workers, tokenizer=None, vocab_size=None, known=FINEWEB):
    """`--check`: prints a line for each check of any data set, ours or published. True if all hold."""
    folder = Path(folder).resolve()
    if not shards(folder, "val"):
        raise BadInput(f"{folder}: no fineweb_val_*.bin here; --check takes the folder of a data set")
    model = Path(tokenizer) if tokenizer else find_tokenizer(folder, vocab_size)
    try:
        load(model)
    except (OSError, RuntimeError):
        raise BadInput(f"{model}: no such file, or not a SentencePiece model") from None
    manifest, results = read_manifest(folder), []
    say("check", folder=folder.name, tokenizer=model.name, manifest="yes" if manifest else "no")

    def report(result):
        results.append(result)
        print(result, flush=True)

    if manifest:
        report(same("SHA-256 of the tokenizer", manifest["tokenizer"]["sha256"], sha256(model)))
        tables = manifest["shards"], file_table(folder, workers)
        old, new = ({row["name"]: row["sha256"] for row in rows} for rows in tables)
        for name in sorted({*old, *new}):
            report(same(f"SHA-256 of {name}", old.get(name, "no such file"), new.get(name, "no such file")))
    published = folder.name.startswith("fineweb10B_") and (manifest or {}).get("tool") != TOOL
    for result in prove(folder, model, workers, manifest and manifest["splits"], known if published else None):
        if isinstance(result, Check):
            report(result)
    failed = sum(not r.ok for r in results)
    print(f"FAILED: {failed} of {len(results)} checks" if failed else f"all {len(results)} checks ok", flush=True)
    return not failed


# ---------------------------------------------------------------------------------------------------------------------
# 6 Builtin text: the documentation that is on this machine already
# ---------------------------------------------------------------------------------------------------------------------

REQUIREMENTS = ("torch", "numpy", "sentencepiece", "zstandard", "brotli")
NOT_DOCS = set("test tests testing site-packages dist-packages idlelib lib2to3 turtledemo __pycache__".split())
DOC_FILES = re.compile(r"(docs?(_\w+)?|topics)\.py$")  # documentation as data: _torch_docs.py, pydoc's topics.py
TRIPLE = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
COMMENTS = re.compile(r"#(?: .*)?\n(?:[ \t]*#(?: .*)?\n)+")
COMMON = set("""the of a an to and is in that it for be as are with this by on or if not can will from which at when has
    have you used use using returns return but may into its than only also must should was were all any does do been one
    other such their they there these then how we so no""".split())
NOT_PROSE = re.compile(r"copyright|licen[sc]ed? under|all rights reserved|redistribution|warranty|noqa|pylint|mypy|TODO"
                       r"|[{}\\$]", re.IGNORECASE)
MARKUP = [(mark, re.compile(pattern), plain) for mark, pattern, plain in (
    (":`", r":[\w:+.-]+:`(?:[^`<]*<)?[~!]?([^`<>]*)>?`", r"\1"),  # :class:`~torch.Tensor`
    ("`_", r"`([^`<]+?)\s*<[^`>]+>`__?", r"\1"), ("`", r"``?([^`]+)``?_{0,2}", r"\1"),  # `text <address>`_, ``code``
    ("**", r"\*\*([^*]+)\*\*", r"\1"), ("]_", r"\[[\w*]+\]_", ""), ("http", r"https?://\S+", ""))]
ADMONITION = re.compile(r"\.\. (?:note|warning|versionadded|versionchanged|deprecated|seealso|tip|important)::\s*")
FIELD = re.compile(r"(?::\w+(?: [^:]+)?:|\*{0,2}\w+(?: \([^)]*\))?:(?=\s)|[-*+•] |\d+[.)] )\s*")  # ":param x:"
TYPED = re.compile(r"\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)* : |[A-Z]\w*(?: \w+)?:$")  # "axis : int, optional" and "Args:"
SENTENCE = re.compile(r"(?<=[.!?:;]) ")
UNDERLINE = re.compile(r"[-=~^\"'*#+_.|: ]{3,}")


def packages():
    """The distributions, by name, that the requirements of this repository pull in here."""
    file, found = ROOT / "requirements.txt", {}
    todo = file.read_text(encoding="utf-8").splitlines() if file.is_file() else list(REQUIREMENTS)
    while todo:
        line = todo.pop()
        name = re.match(r"[A-Za-z0-9][\w.-]*", line)
        key = name and re.sub(r"[-_.]+", "-", name.group()).lower()
        if key and key not in found and "extra ==" not in line:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[key] = importlib.metadata.distribution(key)
                todo += found[key].requires or []
    return dict(sorted(found.items()))


def python_files():
    """(name, path) of the sources of the standard library and of the packages, in the order of the names."""
    library = Path(sysconfig.get_path("stdlib"))
    inside = ((p.relative_to(library), p) for p in library.rglob("*.py"))
    yield from sorted((f"python/{name.as_posix()}", path) for name, path in inside if not NOT_DOCS & set(name.parts))
    for package in packages().values():
        sources = (f for f in package.files or () if f.suffix == ".py" and not NOT_DOCS & set(f.parts))
        yield from sorted((f.as_posix(), Path(f.locate())) for f in sources)


def _strings(source, everything):
    """The docstrings in the order of the source; every long string of a file that holds documentation as data."""
    todo = [ast.parse(source)]
    if everything:
        strings = (n.value for n in ast.walk(todo[0]) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        yield from (s for s in strings if len(s) > 200)
        return
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value
        inner = (s for f in ("body", "orelse", "handlers", "finalbody") for s in getattr(node, f, ()))
        todo += reversed([s for s in inner if hasattr(s, "body")])


def _paragraphs(text):
    """The running text of a docstring: no doctests, code, tables, headings, types of parameters."""
    out, held, skip, indent = [], [], None, 0

    def flush():
        if held:
            out.append(" ".join(held))
            held.clear()

    for line in inspect.cleandoc(text).splitlines():
        words, before, indent = line.strip(), indent, len(line) - len(line.lstrip())
        if skip in ("fence", "doctest"):
            skip = None if (words.startswith("```") if skip == "fence" else not words) else skip
            continue
        if skip is not None and (not words or indent > skip):
            indent = before
            continue
        skip = None
        if words.startswith(("```", ">>>", "In [")):
            skip = "fence" if words[0] == "`" else "doctest"
        elif words.startswith(".. "):
            flush()
            if note := ADMONITION.match(words):
                held.append(words[note.end():])
            else:
                skip = indent
            continue
        elif words.endswith("::"):
            skip = indent
            held.append(words[:-2])
        elif UNDERLINE.fullmatch(words):
            held[:] = held if len(held) > 1 else []  # a lone line above is a heading
        elif words and words.count("|") < 2 and not TYPED.match(words):
            if field := FIELD.match(words):
                flush()
            elif len(held) == 1 and indent > before and len(held[0]) < 30:
                held.clear()  # a term above its definition
            held.append(words[field.end():] if field else words)
            continue
        flush()
    flush()
    return out


def _prose(text):
    """The English paragraphs of a docstring, without markup."""
    for paragraph in _paragraphs(text):
        if paragraph.count(" ") < 7 or NOT_PROSE.search(paragraph):
            continue
        for mark, pattern, plain in MARKUP:
            if mark in paragraph:
                paragraph = pattern.sub(plain, paragraph)
        paragraph = " ".join(paragraph.split())
        words = re.findall(r"[a-z']+", paragraph.lower())
        letters = sum(map(len, words)) + paragraph.count(" ")
        if (len(words) >= 8 and paragraph[0].isalpha() and letters > 0.9 * len(paragraph)
                and sum(map(COMMON.__contains__, words)) >= len(words) / 4):
            yield paragraph


def _sentence_keys(paragraph):
    """What makes two sentences one: their letters."""
    plain = (s.encode().translate(None, NOT_LETTERS + b"0123456789") for s in SENTENCE.split(paragraph.lower()))
    return [hashlib.blake2b(p, digest_size=8).digest() for p in plain]


def docs_of_files(files):
    """Worker: [(name, [(paragraph, sentence keys)])] of some Python files. They are parsed, never imported."""
    gc.disable()  # syntax trees are many small objects, with no cycles worth looking for
    warnings.simplefilter("ignore")  # odd escapes in other people's sources
    out = []
    for name, path in files:
        try:
            source = path.read_bytes().decode("utf-8")
            data = DOC_FILES.search(name)
            worth = data or sum(m.end() - m.start() for m in TRIPLE.finditer(source)) > len(source) / 10
            texts = list(_strings(source, data)) if worth else []
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        texts += (re.sub(r"^[ \t]*# ?", "", block, flags=re.MULTILINE) for block in COMMENTS.findall(source))
        out.append((name, [(p, _sentence_keys(p)) for text in texts for p in _prose(text)]))
    gc.enable()
    return out


def builtin_documents(workers):
    """(name, text): the prose of a module, of a part of it, or of several small modules of a package; nothing twice."""
    files, seen, held, size, package, done = list(python_files()), set(), [], 0, None, 0
    progress = Bar("collect", len(files), "files")
    for task, found in workers.map(docs_of_files, (files[i:i + 40] for i in range(0, len(files), 40))):
        for name, paragraphs in found:
            if package != (package := name.split("/")[0]):
                held, size = [], 0
            for number, (text, keys) in enumerate(paragraphs, 1):
                if 2 * sum(key not in seen for key in keys) > len(keys):
                    held.append(text)
                    size += len(text) + 1
                seen.update(keys)
                if size > (500 if number == len(paragraphs) else 6000):
                    yield name, "\n".join(held)
                    held, size = [], 0
        done += len(task)
        progress(done)
    progress.close()


def write_builtin(path, workers):
    """The builtin text as .jsonl.zst, in an order that mixes the packages."""
    rows = sorted((_hashes(text), name, text) for name, text in builtin_documents(workers))
    if not rows:
        raise BadInput("no documentation found in this Python installation; give --source a text of your own")
    with atomic(path) as file, zstandard.ZstdCompressor(level=6).stream_writer(file, closefd=False) as out:
        for _, name, text in rows:
            out.write(json.dumps(dict(text=text, source=name), ensure_ascii=False).encode() + b"\n")
    say("builtin", documents=len(rows), bytes=sum(len(text.encode()) for *_, text in rows))


# ---------------------------------------------------------------------------------------------------------------------
# 7 The whole job, and the command line
# ---------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What to make of what. `description` says it in the manifest: equal descriptions mean equal shards."""

    out: Path
    files: list
    vocab_size: int
    tokenizer: bytes | None
    val_docs: int
    val_share: int
    shard_tokens: int
    max_docs: int | None
    text_key: str
    sample_mb: float
    caseops: bool
    description: dict

    @property
    def total(self):
        return sum(f.stat().st_size for f in self.files)


def describe_files(files):
    """What decides whether the inputs are still the same: names, sizes and times, not 100 GB of content."""
    digest, sizes = hashlib.sha256(), []
    for path in files:
        sizes.append(path.stat().st_size)
        digest.update(f"{path.name}\t{sizes[-1]}\t{path.stat().st_mtime_ns}\n".encode())
    return dict(files=len(files), bytes=sum(sizes), first=files[0].name, names_sizes_times=digest.hexdigest()[:16])


def check_folder(option, folder):
    """BadInput if a folder that is to be made cannot be one."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise BadInput(f"{option} {folder}: {place} is not a folder; choose another {option}")
            return


def make_job(args):
    """The job that the arguments ask for; BadInput for whatever can be known to be wrong before any work."""
    builtin = args.source == ["builtin"]
    if "builtin" in args.source and not builtin:
        raise BadInput("--source builtin stands alone; put other text into a data set of its own")
    for name in ("shard_tokens", "tokenizer_sample_mb", "max_docs", "val_docs", "workers"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be positive")
    share = 0.05 if args.val_fraction is None else args.val_fraction
    if not 0 < share < 1:
        raise BadInput(f"--val-fraction {share}: must lie between 0 and 1")
    vocab_size, model = 1024 if args.vocab_size is None else args.vocab_size, None
    if args.tokenizer:
        if not Path(args.tokenizer).is_file():
            raise BadInput(f"--tokenizer {args.tokenizer}: no such file")
        model = Path(args.tokenizer).read_bytes()
        sp = check_tokenizer(model, args.vocab_size, args.tokenizer)
        vocab_size = sp.vocab_size()
        if bool(caseops.operator_ids(sp)) != args.caseops:
            raise BadInput(f"{args.tokenizer}: " + ("has no case operators; leave out --caseops" if args.caseops else
                                                    "has case operators; add --caseops"))
    if not 0 < vocab_size <= 1 << 16:
        raise BadInput(f"--vocab-size {vocab_size}: a token is stored in 16 bits, so it must lie between 1 and 65536")
    if args.out is None and not builtin:
        raise BadInput("--out is missing: say where the data set goes, for example --out data/datasets/mine")
    if importlib.util.find_spec("torch") is None:  # better now than before the proof, after hours of encoding
        raise BadInput("the proof at the end needs torch: pip install -r requirements.txt")
    out = Path(args.out or os.path.relpath(ROOT / f"data/datasets/builtin_sp{vocab_size}{'_caseops' * args.caseops}"))
    check_folder("--out", out)
    files = [out / BUILTIN] if builtin else find_sources(args.source)
    if args.val_docs == TOO_FEW and files[0].name.startswith(DOCUMENTS):
        raise BadInput(f"--val-docs {TOO_FEW} of {DOCUMENTS}: the contest's validation set is the first 50000, and "
                       "40000 of these would be trained on; use --val-docs 50000")
    versions = dict(python=sys.version.split()[0], **{k: d.version for k, d in packages().items()}) if builtin else None
    description = dict(
        tool=TOOL, source=dict(builtin=versions) if builtin else describe_files(files), vocab_size=vocab_size,
        tokenizer=hashlib.sha256(model).hexdigest() if model else f"trained on {args.tokenizer_sample_mb:g} MB",
        validation=f"first {args.val_docs} documents" if args.val_docs else f"{share:g} of the documents by hash",
        shard_tokens=args.shard_tokens, max_docs=args.max_docs, text_key=args.text_key,
        **(dict(transform=caseops.NAME) if args.caseops else {}))
    return Job(out, files, vocab_size, model, args.val_docs or 0, 0 if args.val_docs else int(share * EVERY),
               args.shard_tokens, args.max_docs, args.text_key, args.tokenizer_sample_mb, args.caseops, description)


def finished(job):
    """True if the data set is there and complete. BadInput if the folder holds another one: nothing is overwritten."""
    manifest = read_manifest(job.out)
    if manifest is None:
        if shards(job.out, "*") and not (job.out / STATE).exists():
            raise BadInput(f"{job.out}: holds shards that this tool did not make; choose another --out")
        return False
    old, new = manifest.get("job", {}), job.description
    change = ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k))
    files = {job.out / row["name"]: HEADER + 2 * row["tokens"] for row in manifest["shards"]}
    lost = [path.name for path, size in files.items() if not path.is_file() or path.stat().st_size != size]
    if lost or change and not change.startswith("source {'builtin'"):
        fault = f"an incomplete data set ({lost[0]} is missing or cut)" if lost else f"another data set ({change})"
        raise BadInput(f"{job.out}: holds {fault}; --restart replaces it, or choose another --out")
    say("complete", out=job.out, **{f"{s}_{k}": v for s, row in manifest["splits"].items() for k, v in row.items()},
        **(dict(note="made_with_other_package_versions,_kept;_--restart_makes_it_again") if change else {}))
    if (job.out / RESTART).exists():
        say("unfinished", folder=job.out / RESTART, note="--restart_continues_it;_remove_it_to_keep_this_set")
    return True


def discard(folder):
    """Removes what this tool wrote, and only that."""
    own = (folder / name for name in (MANIFEST, MODEL, BUILTIN, STATE))
    for path in [*folder.glob(".*.part"), *shards(folder, "*"), *own]:
        path.unlink(missing_ok=True)


def replacement(job):
    """The job of --restart: it makes the new set in a folder inside, so the old one stays until the proof."""
    new = job.out / RESTART
    files = [new / BUILTIN] if job.files == [job.out / BUILTIN] else job.files
    new.mkdir(exist_ok=True)
    return job._replace(out=new, files=files)


def replace_old(folder):
    """Puts a new set that --restart made and proved in the place of the old one, or goes on with that."""
    new, moving = folder / RESTART, folder / MOVING
    if (new / MANIFEST).exists():
        discard(folder)
        os.replace(new, moving)  # from here on what lies in the folder is new, too
    if moving.exists():
        for path in sorted(moving.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest last
            os.replace(path, folder / path.name)
        moving.rmdir()


def resume(job):
    """The state of an earlier, killed run of the same job, or a fresh one."""
    state = read_json(job.out / STATE)
    if state is not None:
        files = {**state["shards"], **({"val_bytes": state["shards"]["val"]} if job.caseops else {})}
        if state["job"] == job.description and all(len(shards(job.out, s)) >= n for s, n in files.items()):
            for path in job.out.glob(".*.part"):
                path.unlink()
            say("continue", split=state["split"], finished_shards=sum(state["shards"].values()))
            return state
        say("restart", reason="the_unfinished_job_here_had_other_arguments_or_inputs")
    discard(job.out)
    state = fresh_state(job)
    write_json(job.out / STATE, state)
    return state


def try_tokenizer(job):
    """Try a given tokenizer on the first documents: the proof would find its faults after all is encoded.

    BadInput if normalised texts have other tokens; a line if it changes more than the contest's tokenizers.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=job.tokenizer)
    if changes := trainer().text_changes(sp):
        say("warning", note=changes.replace(" ", "_"))
    transform, _ = caseops.codec(sp)
    block = next(blocks(job.files, limit=job.max_docs), Block([], {}, 0))
    texts = [transform(text_of(block, where, raw, job.text_key)) for where, raw in block.documents]
    normalised = [sp.normalize(text).replace(SPACE, " ") for text in texts]
    changed = sum(one != two for one, two in zip(sp.encode(texts), sp.encode(normalised)))
    if changed > max(1, len(texts) // 10):  # as in the proof
        raise BadInput(f"--tokenizer: {changed} of the first {len(texts)} documents have other tokens once "
                       "normalised: the normalisation changes its own texts; choose another tokenizer")


def make_shards(job, workers, state):
    """Text -> tokenizer -> validation -> training; each step is skipped if an earlier, killed run finished it."""
    if not job.files[0].exists():
        write_builtin(job.files[0], workers)
    say("prepare", files=len(job.files), bytes=job.total, vocab_size=job.vocab_size, workers=workers.count,
        validation=job.description["validation"].replace(" ", "_"))
    if not (job.out / MODEL).exists():
        model = job.tokenizer
        if model is not None:
            try_tokenizer(job)
        else:
            texts = sample(job, workers)
            if not texts:
                raise too_few(job, "training", 0)
            symbols = caseops.OPERATORS if job.caseops else ()
            model = train_tokenizer(map(caseops.encode, texts) if symbols else texts, job.vocab_size, symbols)
            say("tokenizer", documents=len(texts), bytes=sum(len(t.encode()) for t in texts))
            check_tokenizer(model, job.vocab_size, "the tokenizer trained on this text (give more text)")
        with atomic(job.out / MODEL) as file:
            file.write(model)
    if state["split"] == "val":
        encode(job, workers, state, "val")
    if state["split"] == "train":
        blank = [np.zeros(job.vocab_size, dtype) for dtype in (np.int16, bool, bool)]  # only the keys are wanted here
        known = survey(Survey(shards(job.out, "val"), str(job.out / MODEL), blank), workers)[2]
        encode(job, workers, state, "train", known)


def finish(job, workers, counts):
    """The proof, and the manifest if it holds. The exit code."""
    expected = {s: {k: counts[f"{s}_{k}"] for k in ("documents", "tokens")} for s in ("val", "train")}
    *results, totals = prove(job.out, job.out / MODEL, workers, expected)
    for result in results:
        print(result, flush=True)
    if not isinstance(totals, dict) or not all(r.ok for r in results):
        print("FAILED: the proof does not hold, so no manifest was written", flush=True)
        return 1
    write_json(job.out / MANIFEST, dict(
        tool=TOOL, job=job.description, vocab_size=job.vocab_size, splits=totals,
        bytes_per_token=round(totals["val"]["bytes"] / (totals["val"]["tokens"] - 1), 6),
        train_docs_dropped=counts["train_docs_dropped"], empty_docs_skipped=counts["empty_docs_skipped"],
        tokenizer=dict(name=MODEL, sha256=sha256(job.out / MODEL)), shards=file_table(job.out, workers),
        proof=[dict(check=r.name, expected=r.expected, found=r.found) for r in results]))
    (job.out / STATE).unlink()
    return 0


EXAMPLES = """examples:
  python data/prepare.py --source builtin
      no download: the documentation of Python and of the required packages -> data/datasets/builtin_sp1024
  python data/prepare.py --source book.txt articles/ --out data/datasets/mine --vocab-size 1024
      trains a tokenizer, keeps 5 % of the documents for validation, writes shards, proves them
  python data/prepare.py --source docs_selected.jsonl --out data/datasets/docs_sp2048 --vocab-size 2048 --val-docs 50000
      the split of the contest: the first 50,000 documents
  python data/prepare.py --source book.txt --out data/datasets/mine_caseops --caseops
      the same text in lower case with operators for the capitals, and the bytes of every validation token beside it
  python data/prepare.py --source more.jsonl.zst --out data/datasets/more --tokenizer data/datasets/mine/tokenizer.model
  python data/prepare.py --check data/datasets/mine
      proves a data set again from its shards; published shards too

A .txt file is one document; a form feed or <|endoftext|> separates documents, and a longer text is cut at a paragraph
before every 100,000 bytes. A killed job continues with the same command. See data/README.md.
exit codes: 0 made, complete or proven; 1 a check FAILED, or stopped; 2 something given cannot be used"""


def parser():
    p = argparse.ArgumentParser(prog="prepare.py", description=__doc__.splitlines()[0], epilog=EXAMPLES,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    job, split = p.add_mutually_exclusive_group(required=True), p.add_mutually_exclusive_group()
    job.add_argument("--source", nargs="+", metavar="SRC",
                     help=".txt or .jsonl files, plain, .gz or .zst; folders of them; or the word builtin")
    job.add_argument("--check", metavar="DIR", help="prove the data set in DIR from its shards; changes nothing")
    p.add_argument("--out", metavar="DIR", help="where the data set goes (builtin: data/datasets/builtin_sp1024)")
    p.add_argument("--vocab-size", type=int, metavar="V",
                   help="pieces of the tokenizer, at most 65536 (default: 1024, or those of --tokenizer)")
    p.add_argument("--tokenizer", metavar="FILE", help="use this SentencePiece .model instead of training one")
    p.add_argument("--caseops", action="store_true",
                   help="write capitals as operators before words in lower case (#1729), without loss")
    split.add_argument("--val-docs", type=int, metavar="N", help="validate on the first N documents, as in the contest")
    split.add_argument("--val-fraction", type=float, metavar="F",
                       help="validation is this share of the documents, chosen by a hash of their text (default: 0.05)")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                   help="tokens of a full shard (default: 100000000)")
    p.add_argument("--workers", type=int, metavar="N",
                   help="processes; the output does not depend on their number (default: all cores)")
    p.add_argument("--max-docs", type=int, metavar="N", help="stop after the first N documents of the stream")
    p.add_argument("--text-key", default="text", metavar="KEY",
                   help="field of a .jsonl line that holds the text (default: text)")
    p.add_argument("--tokenizer-sample-mb", type=float, default=50, metavar="M",
                   help="train the tokenizer on at most so much text, held in memory (default: 50)")
    p.add_argument("--restart", action="store_true",
                   help="make the set again; what is in --out stays until the new one is proven")
    return p


def run(args):
    begin, cores = time.monotonic(), getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    count = args.workers or len(cores)
    if args.check:
        with contextlib.closing(Workers(count)) as workers:
            return 0 if check(args.check, workers, args.tokenizer, args.vocab_size) else 1
    job = make_job(args)
    out = job.out
    half_replaced = (out / MOVING).exists() or (out / RESTART / MANIFEST).exists()
    if not args.restart and not half_replaced and finished(job):
        return 0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made ({error.strerror})") from None
    with locked(out), contextlib.closing(Workers(count)) as workers:
        replace_old(out)
        if args.restart:
            job = replacement(job)
        elif finished(job):
            return 0
        state = resume(job)
        try:
            make_shards(job, workers, state)
        except BadInput:
            discard(job.out)
            for folder in dict.fromkeys((job.out, out)):
                with contextlib.suppress(OSError):  # unless something else is in there
                    folder.rmdir()
            raise
        if finish(job, workers, state["counts"]):
            return 1
        replace_old(out)
    say("done", out=out, train_docs_dropped=state["counts"]["train_docs_dropped"],
        seconds=f"{time.monotonic() - begin:.1f}")
    return 0


def main(argv=None):
    hold_standard_streams()
    args = parser().parse_args(argv)
    try:
        return run(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, OSError, KeyboardInterrupt) as error:
        more = "" if args.check else "; the same command continues from the last finished shard"
        print(f"stopped: {str(error) or 'interrupted'}{more}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    sys.exit(main())
