"""The files of a data set: shards in the contest's format, the manifest, and files that are complete or absent."""

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path

from common import SHARD_HEADER_BYTES, BadInput, sha256, shard_header

TOOL = "prepare 1"  # part of every manifest: change it when the same input would give other bytes
SHARD = re.compile(r"fineweb_(val|val_bytes|train)_(\d+)\.bin")
SPLITS = ("val", "val_bytes", "train")  # "val_bytes": the bytes of each validation token, a sidecar of "val"
MANIFEST = "manifest.json"
MODEL = "tokenizer.model"


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


@contextlib.contextmanager
def locked(folder):
    """One writer a folder: two would take turns overwriting each other's shards."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BadInput(f"{folder}: another process is writing here; wait for it, or choose another --out") from None
    finally:
        os.close(handle)


# ---- shards ---------------------------------------------------------------------------------------------------------


def list_shards(folder, split):
    """The shards of a split ("*": of all of SPLITS) in the order of their numbers."""
    numbers = {}
    for path in Path(folder).glob("fineweb_*.bin"):
        match = SHARD.fullmatch(path.name)
        if match and split in ("*", match.group(1)):
            numbers[path] = int(match.group(2))
    return sorted(numbers, key=lambda path: (numbers[path], path.name))


def list_all_shards(folder):
    """(split, number in the split, path) of every shard, split by split."""
    return [(split, number, path) for split in SPLITS for number, path in enumerate(list_shards(folder, split))]


def count_tokens(path):
    """Tokens in a shard, by the size of the file."""
    return (path.stat().st_size - SHARD_HEADER_BYTES) // 2


def file_table(folder, workers):
    """Name, tokens and SHA-256 of every shard and sidecar."""
    paths = [path for _, _, path in list_all_shards(folder)]
    return [dict(name=path.name, tokens=count_tokens(path), sha256=digest)
            for path, digest in workers.map(sha256, paths)]


class ShardWriter:
    """The shards of one split: full ones, then a shorter last one, each complete under its name or absent. Of several
    names ("val" and its sidecar "val_bytes") each gets a column, and their shards end at the same tokens.
    """

    def __init__(self, folder, names, size, index):
        self.folder = folder
        self.names = names
        self.size = size  # tokens of a full shard
        self.index = index  # number of the next shard
        self.count = 0  # tokens in the open shard
        self.files = []
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.__exit__(*error)

    def write(self, *columns):
        """Yields n whenever a shard is finished by the first n of these tokens."""
        done = 0
        while done < len(columns[0]):
            if not self.files:
                self.open()
            end = min(done + self.size - self.count, len(columns[0]))
            for file, column in zip(self.files, columns):
                file.write(column[done:end].astype("<u2", copy=False).tobytes())
            self.count += end - done
            done = end
            if self.count == self.size:
                self.finish()
                yield done

    def open(self):
        for name in self.names:
            path = self.folder / f"fineweb_{name}_{self.index:06d}.bin"
            self.files.append(self.stack.enter_context(atomic(path)))
        for file in self.files:
            file.write(bytes(SHARD_HEADER_BYTES))

    def finish(self):
        """Complete the open shard, if there is one."""
        if not self.files:
            return
        for file in self.files:
            file.seek(0)
            file.write(shard_header(self.count))
        self.stack.close()
        self.count = 0
        self.files = []
        self.index += 1
