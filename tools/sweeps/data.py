"""The text that a run's score depends on, known by its content."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import SHARD_HEADER_BYTES, sha256, trainer_errors, write
from sweeps.work import read_json
from train_gpt import find_shards, list_shards, tokenizer_paths


def digest(*values):
    """A short hash of values that JSON knows."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def files_of(settings):
    """(training shards, the other files that a score depends on); BadInput if shards are missing."""
    folder = settings.data_path
    with trainer_errors():
        train = find_shards(folder, "train")
        others = [*find_shards(folder, "val"), *list_shards(folder, "val_bytes")]
    others += [path for path in tokenizer_paths(settings) if path.is_file()][:1]
    return train, others


class Texts:
    """Hashes of files by their content, kept in a file: gigabytes are read once, and again when a file has another size
    or time.
    """

    def __init__(self, store):
        self.store = store
        self.known = read_json(store) or {}  # {path: [bytes, time, hash]}
        self.found = {}  # {places: facts}, for this command

    def facts(self, settings):
        """Name, size and identity of the text of a run; BadInput if it is not there."""
        places = settings.data_path, settings.tokenizer_path, settings.vocab_size
        if places not in self.found:
            train, others = files_of(settings)
            self.found[places] = {
                "name": Path(settings.data_path).name,
                "train_tokens": sum(shard.stat().st_size - SHARD_HEADER_BYTES for shard in train) // 2,
                "sha256": digest(self._hashes(train), self._hashes(others)),
            }
        return self.found[places]

    def _hashes(self, paths):
        states = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
        new = [name for name, state in states.items() if self.known.get(name, [])[:2] != state]
        with ThreadPoolExecutor() as pool:
            for name, content in zip(new, pool.map(sha256, new)):
                self.known[name] = [*states[name], content]
        if new:
            write(self.store, json.dumps(self.known).encode())
        return [self.known[name][2] for name in states]
