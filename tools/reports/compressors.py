"""Two general-purpose compressors on the text behind the validation shards, which give a score a scale."""

import contextlib
import hashlib
import lzma
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import caseops
from common import BOS, ROOT, SHARD_HEADER_BYTES, SHARD_MAGIC, BadInput, parsed, write_json

MOST_TEXT = 32_000_000  # bytes given to the compressors: brotli at its best takes about a minute for them


def validation_text(settings, tokenizer):
    """(text, whether it is complete): the scored validation documents, decoded, up to MOST_TEXT bytes. `tokenizer` is
    the event with its path and SHA-256.
    """
    import sentencepiece

    # Relative paths start where the run was started, or at the repository.
    folder, model_file = (path if path.exists() else ROOT / path
                          for path in (Path(settings["DATA_PATH"]), Path(str(tokenizer.get("path")))))
    paths = list(folder.glob("fineweb_val_[0-9]*.bin"))
    paths.sort(key=lambda path: int(re.sub(r"\D", "", path.stem)))  # by number, with or without leading zeros
    if not paths:
        raise BadInput(f"validation shards of the run not found in {folder}")
    if not model_file.is_file():
        raise BadInput(f"tokenizer of the run not found at {model_file}")
    model = model_file.read_bytes()
    if hashlib.sha256(model).hexdigest() != tokenizer.get("sha256"):
        raise BadInput(f"{model_file} is no longer the tokenizer of the run")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = np.concatenate([np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES) for path in paths])
        if ids.max() >= sp.vocab_size() or any(np.fromfile(path, "<i4", 1)[0] != SHARD_MAGIC for path in paths):
            raise ValueError
    except (RuntimeError, ValueError, OSError, IndexError):
        raise BadInput(f"the shards in {folder} or {model_file} cannot be read") from None
    if settings["VAL_TOKENS"]:
        ids = ids[: settings["VAL_TOKENS"] + 1]
    _, to_text = caseops.codec(sp)
    data = bytearray()
    for document in np.split(ids, np.flatnonzero(ids == BOS)):
        if len(data) >= MOST_TEXT:
            return bytes(data[:MOST_TEXT]), False
        data += to_text(sp.decode(document[document != BOS].tolist())).encode()
    return bytes(data[:MOST_TEXT]), len(data) <= MOST_TEXT


def compressors(run_dir, settings, tokenizer, val_bytes):
    """The scores of xz -9e and brotli -q 11 on the validation text, or a note that says why there are none."""
    import brotli

    cache = run_dir / "compressors.json"
    source = [tokenizer.get("sha256"), val_bytes]
    kept = parsed(cache.read_text(encoding="utf-8", errors="replace")) if cache.is_file() else {}
    if kept.get("of") == source:
        return kept
    try:
        data, complete = validation_text(settings, tokenizer)
    except BadInput as error:
        return {"note": str(error)}
    if not data:
        return {"note": "the validation text is empty"}
    # Published CaseOps shards count the text before normalisation, which differs a little.
    comparable = complete and not settings["VAL_TOKENS"] and val_bytes
    if comparable and abs(val_bytes / len(data) - 1) > 1e-4:
        return {"note": f"the shards are no longer those of the run: {len(data):,} bytes, scored were {val_bytes:,}"}
    if len(data) > 4_000_000:
        print(f"compressing {len(data):,} bytes with xz and brotli, about {len(data) // 500_000} s, once ...",
              file=sys.stderr, flush=True)
    with ThreadPoolExecutor(2) as pool:  # both release the interpreter lock
        xz = pool.submit(lzma.compress, data, preset=9 | lzma.PRESET_EXTREME)
        br = pool.submit(brotli.compress, data, quality=11, lgwin=24)
        xz_bpb, brotli_bpb = (8 * len(job.result()) / len(data) for job in (xz, br))
    result = {"of": source, "whole": complete, "text_bytes": len(data), "xz_bpb": xz_bpb, "brotli_bpb": brotli_bpb}
    if val_bytes is not None:  # else the run may still be going on
        with contextlib.suppress(BadInput):  # a run in a read-only folder can be reported too
            write_json(cache, result)
    return result
