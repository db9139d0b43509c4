"""Two general-purpose compressors on the text behind the validation shards, which give a score a scale."""

import contextlib
import hashlib
import json
import lzma
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import caseops
from common import BOS, ROOT, SHARD_HEADER_BYTES, SHARD_MAGIC, BadInput, write
from reports.reading import number

MOST_TEXT = 32_000_000  # bytes given to the compressors: brotli at its best takes about a minute for them


def find_tokenizer(settings, folder):
    """The tokenizer of a data set: the file that was named, or where the trainer looks for one. May be None."""
    if settings["TOKENIZER_PATH"]:
        places = [Path(settings["TOKENIZER_PATH"])]
    else:
        vocab = settings["VOCAB_SIZE"]
        variant = folder.name.partition(f"_sp{vocab}")[2]
        published = f"tokenizers/fineweb_{vocab}_bpe{variant}.model"
        places = [folder / "tokenizer.model", folder.parent.parent / published]
    for place in places:
        for path in (place, ROOT / place):
            if path.is_file():
                return path
    return None


def read_shards(paths, vocab_size):
    """The tokens of these shards, one after another."""
    ids = np.concatenate([np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES) for path in paths])
    foreign = any(np.fromfile(path, "<i4", 1)[0] != SHARD_MAGIC for path in paths)
    if foreign or ids.max() >= vocab_size:
        raise ValueError
    return ids


def validation_text(settings, tokenizer_sha256):
    """(text, whether it is complete): the scored validation documents, decoded, up to MOST_TEXT bytes."""
    import sentencepiece

    folder = Path(settings["DATA_PATH"])
    folder = folder if folder.is_dir() else ROOT / folder
    paths = list(folder.glob("fineweb_val_[0-9]*.bin"))
    paths.sort(key=lambda path: int(re.sub(r"\D", "", path.stem)))  # by number, with or without leading zeros
    tokenizer = find_tokenizer(settings, folder)
    if not paths:
        raise BadInput(f"validation shards of the run not found in {folder}")
    if tokenizer is None:
        raise BadInput(f"tokenizer of the run not found in {folder}")
    model = tokenizer.read_bytes()
    if tokenizer_sha256 and hashlib.sha256(model).hexdigest() != tokenizer_sha256:
        raise BadInput(f"{tokenizer} is no longer the tokenizer of the run")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = read_shards(paths, sp.vocab_size())
    except (RuntimeError, ValueError, OSError, IndexError):
        raise BadInput(f"the shards in {folder} or {tokenizer} cannot be read") from None
    limit = int(settings["VAL_TOKENS"])
    if 0 < limit < len(ids):
        ids = ids[: limit + 1]
    _, to_text = caseops.codec(sp)
    bounds = [0, *np.flatnonzero(ids == BOS).tolist(), len(ids)]
    documents = []
    size = 0
    for begin, end in zip(bounds, bounds[1:]):
        if size >= MOST_TEXT:
            break
        tokens = [token for token in ids[begin:end].tolist() if token != BOS]
        documents.append(to_text(sp.decode(tokens)).encode())
        size += len(documents[-1])
    complete = size <= MOST_TEXT and len(documents) == len(bounds) - 1
    return b"".join(documents)[:MOST_TEXT], complete


RESULT = ("text_bytes", "xz_bpb", "brotli_bpb")


def read_cache(path, source):
    """The result that an earlier report kept, if it is of the same text; else None."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        usable = kept["of"] == source and "whole" in kept and all(number(kept, key) for key in RESULT)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if usable else None


def bits_per_byte(data):
    """(xz -9e, brotli -q 11): compressed bits per byte of this text."""
    import brotli

    with ThreadPoolExecutor(2) as pool:  # both release the interpreter lock
        xz = pool.submit(lzma.compress, data, preset=9 | lzma.PRESET_EXTREME)
        br = pool.submit(brotli.compress, data, quality=11, lgwin=24)
        return tuple(8 * len(job.result()) / len(data) for job in (xz, br))


def compressors(run_dir, settings, tokenizer_sha256, val_bytes):
    """The scores of xz -9e and brotli -q 11 on the validation text, or a note that says why there are none."""
    cache = run_dir / "compressors.json"
    source = [tokenizer_sha256, val_bytes]
    if kept := read_cache(cache, source):
        return kept
    try:
        data, complete = validation_text(settings, tokenizer_sha256)
    except BadInput as error:
        return {"note": str(error)}
    if not data:
        return {"note": "the validation text is empty"}
    # Published CaseOps shards count the text before normalisation, which differs a little.
    comparable = complete and settings["VAL_TOKENS"] == "0" and val_bytes
    if comparable and abs(val_bytes / len(data) - 1) > 1e-4:
        sizes = f"{len(data):,} bytes, scored were {val_bytes:,}"
        return {"note": f"the shards are no longer those of the run: {sizes}"}
    if len(data) > 4_000_000:
        seconds = len(data) // 500_000
        print(f"compressing {len(data):,} bytes with xz and brotli, about {seconds} s, once ...",
              file=sys.stderr, flush=True)
    xz, br = bits_per_byte(data)
    result = {"of": source, "whole": complete, "text_bytes": len(data), "xz_bpb": xz, "brotli_bpb": br}
    if val_bytes is not None:  # else the run may still be going on
        with contextlib.suppress(BadInput):  # a run in a read-only folder can be reported too
            write(cache, f"{json.dumps(result)}\n".encode())
    return result
