"""The proof of a data set: what can be known from the shards alone, one line a check."""

import hashlib
import os
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

import caseops
from common import BOS, SHARD_HEADER_BYTES, BadInput, sha256
from processes import Bar, say, trainer
from shards import MODEL, SHARD, TOOL, file_table, list_all_shards, list_shards, read_manifest
from tokenizer import SPACE, load

SPAN = 2_000_000  # tokens in a unit of work
SEARCHED = 1 << 16  # tokens that are read at a time to find the next document
PREFIX = 64  # two documents that begin with the same 64 tokens count as copies
NOT_LETTERS = bytes(b for b in range(128) if not chr(b).isalnum())

# The published FineWeb validation set. Every tokenizer that normalises with nmt_nfkc counts the same bytes. The tokens
# of the two sp4096 exports are known only to the last full row, so those are recognised by bytes per token.
FINEWEB = dict(documents=50_000, bytes=151_080_891, tokens={1024: 62_021_846, 8192: 40_540_803},
               bytes_per_token={1024: (2.435930,), 4096: (3.319681, 3.319252), 8192: (3.726638,)},
               caseops_tokens={8192: 47_853_344})
CASEOPS = f"{caseops.NAME}_reserved"  # ends the names of its published CaseOps variants


# ---- copies of documents --------------------------------------------------------------------------------------------


def document_keys(ids, text):
    """Two fingerprints of a document: of its first tokens, and of its text without case, spaces and punctuation."""
    tokens = np.array(ids[:PREFIX], "<u2").tobytes()
    letters = text.casefold().encode().translate(None, NOT_LETTERS)
    return (hashlib.blake2b(tokens, digest_size=8).digest(), hashlib.blake2b(letters, digest_size=8).digest())


def key_array(keys):
    """Fingerprints as an array (documents, 2)."""
    return np.frombuffer(b"".join(chain.from_iterable(keys)), "<u8").reshape(-1, 2)


def find_copies(keys, known):
    """Which documents share a fingerprint with those whose sorted keys are `known`."""
    is_copy = np.zeros(len(keys), bool)
    for column, sorted_keys in zip(keys.T, known):
        if len(sorted_keys):
            places = np.minimum(np.searchsorted(sorted_keys, column), len(sorted_keys) - 1)
            is_copy |= sorted_keys[places] == column
    return is_copy


# ---- a check --------------------------------------------------------------------------------------------------------


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


# ---- the survey of a split: sums over its documents -----------------------------------------------------------------


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
    survey, index, begin, end = task
    sp = load(survey.model)
    vocab_size = len(survey.tables[0])
    name = Path(survey.paths[index]).name
    ids = _shard_values(survey.paths[index], begin, end)
    outside = ids >= vocab_size
    sums = Counter(tokens=len(ids), outside=int(outside.sum()))
    keys = []
    remarks = {}
    starts = np.flatnonzero(ids == BOS)
    if sums["outside"]:
        place = int(np.argmax(outside))
        offset = SHARD_HEADER_BYTES + 2 * (begin + place)
        remarks["outside"] = f" (token {ids[place]} at offset {offset} of {name})"
        return sums, key_array(keys), remarks
    if not len(starts):
        return sums, key_array(keys), remarks
    first = begin + int(starts[0])
    ids = np.concatenate([ids[starts[0] :], *_rest_of_document(survey.paths, index, end)])
    if ids.max() >= vocab_size:  # in the tail; the span where that token stands reports it
        return sums, key_array(keys), remarks
    cuts = [*(starts - starts[0]).tolist(), len(ids)]
    counts = caseops.byte_counts(ids, survey.tables, caseops.operator_ids(sp))
    charged = counts
    if survey.sidecar:
        charged = np.concatenate([*_following_values(survey.sidecar, index, first, len(ids))])
    # Where the sidecar is not exact: an operator or BOS that counts.
    is_wrong = charged != counts if survey.exact else (charged > 0) & (counts == 0)
    sizes = np.add.reduceat(counts, cuts[:-1]).tolist()
    is_wrong = np.logical_or.reduceat(is_wrong, cuts[:-1]).tolist()
    sums.update(documents=len(starts), bytes=int(charged.sum()))
    transform, invert = caseops.codec(sp)
    for number, size in enumerate(sizes):
        row = ids[cuts[number] + 1 : cuts[number + 1]].tolist()
        text = invert(sp.decode(row))
        length = len(text.encode())
        keys.append(document_keys(row, text))
        sums["decoded"] += length
        faults = {
            "unequal": length != size,
            "sidecar": is_wrong[number],
            "reencoded": survey.reencode and sp.encode(transform(text)) != row,
        }
        for fault, is_found in faults.items():
            if is_found:
                sums[fault] += 1
                remarks.setdefault(fault, f" (first at token {first + cuts[number]} of {name})")
    return sums, key_array(keys), remarks


def _shard_values(path, begin, end, dtype=np.uint16):
    """The values [begin, end) of a shard."""
    return np.array(np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)[begin:end], dtype)


def _following_values(paths, index, begin, count):
    """`count` values from `begin` of one file on, which may continue in later files."""
    for path in paths[index:]:
        part = _shard_values(path, begin, begin + count, np.int64)
        yield part
        begin = 0
        count -= len(part)
        if not count:
            return


def _rest_of_document(paths, index, begin):
    """The tokens from `begin` of one shard to the next document, which may begin in a later shard."""
    for path in paths[index:]:
        ids = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES)
        for part_begin in range(begin, len(ids), SEARCHED):
            part = np.array(ids[part_begin : part_begin + SEARCHED])
            starts = np.flatnonzero(part == BOS)
            if len(starts):
                yield part[: starts[0]]
                return
            yield part
        begin = 0


def run_survey(survey, workers, known=None):
    """(sums, remarks, sorted keys) of a Survey. With `known`, the keys of the other split, copies are counted."""
    lengths = [(os.path.getsize(path) - SHARD_HEADER_BYTES) // 2 for path in survey.paths]
    tasks = ((survey, index, begin, min(begin + SPAN, length))
             for index, length in enumerate(lengths) for begin in range(0, length, SPAN))
    sums = Counter()
    remarks = {}
    keys = [np.zeros((0, 2), "<u8")]
    progress = Bar("proof", sum(lengths), "tokens")
    for _, (span_sums, span_keys, span_remarks) in workers.map(_span, tasks):
        if known is None:
            keys.append(span_keys)
        else:
            sums["copies"] += int(find_copies(span_keys, known).sum())
        sums.update(span_sums)
        remarks = {**span_remarks, **remarks}
        progress(sums["tokens"])
    progress.close()
    return sums, remarks, np.sort(np.concatenate(keys).T)


def charged_bytes(train_gpt, paths, tables, sidecar=()):
    """What train_gpt.py divides a score by: the sidecar where there is one, else its byte table on the tokens."""
    if sidecar:
        return sum(int(train_gpt.read_shard(path).sum(dtype=np.int64)) for path in sidecar)
    total = 0
    last = np.zeros(0, np.uint16)
    for path in paths:
        ids = train_gpt.read_shard(path)
        for begin in range(0, len(ids), SPAN):
            part = np.concatenate([last, ids[begin : begin + SPAN]])
            total += int(train_gpt.target_bytes(part, tables).sum(dtype=np.int64))
            last = part[-1:]
    return total


# ---- the checks -----------------------------------------------------------------------------------------------------


def _table_checks(sp, tables):
    """The byte table against a second reading of the rule: what a piece adds to a text when it stands alone."""
    wrong = 0
    for i, (base, lead, edge) in enumerate(zip(*tables)):
        piece = sp.id_to_piece(i)
        is_plain = not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))
        alone = 0
        if is_plain:
            alone = 1 if sp.is_byte(i) else len(piece.replace(SPACE, " ").encode())
        wrong_lead = lead and not piece.startswith(SPACE)
        if base + lead != alone or edge == is_plain or wrong_lead:
            wrong += 1
    yield same("tokenizer", "usable", trainer().tokenizer_fault(sp) or "usable")
    yield same("wrong entries in the byte table", 0, wrong)


def _shard_checks(files, train_gpt):
    """Names, format and numbering of the shard files."""
    folders = {split: path.parent for split, _, path in files}
    for split, folder in folders.items():
        try:
            train_gpt.list_shards(folder, split)
        except train_gpt.BadInput as error:
            yield Check(f"{split}: files that train_gpt.py reads", "numbered shards", str(error), False)
    for split, number, path in files:
        digits = len(SHARD.fullmatch(path.name).group(2))  # leading zeros, or none
        name = f"fineweb_{split}_{number:0{digits}d}.bin"
        try:
            train_gpt.read_shard(path)
            yield same("shard", name, path.name, "" if name == path.name else " (a number is missing)")
        except train_gpt.BadInput as error:
            yield Check("shard", name, str(error).removeprefix(f"{path}: ").partition("; ")[0], False)


def _sidecar_checks(folder, has_operators):
    """One byte sidecar for every validation shard of a CaseOps tokenizer, with as many values; none otherwise."""
    val = list_shards(folder, "val")
    sidecar = list_shards(folder, "val_bytes")
    if has_operators or sidecar:
        yield same("byte sidecars of the validation shards", len(val) if has_operators else 0, len(sidecar),
                   "" if has_operators else " (the tokenizer has no case operators)")
    for tokens, counts in zip(val, sidecar):
        size = tokens.stat().st_size
        if counts.stat().st_size != size:
            yield same(f"bytes in the file {counts.name}", size, counts.stat().st_size)


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
    if folder.name != f"fineweb10B_sp{vocab_size}":
        return
    if tokens := known["tokens"].get(vocab_size):
        yield same("FineWeb validation tokens", tokens, sums["tokens"])
    if ratios := known["bytes_per_token"].get(vocab_size):
        ratio = sums["bytes"] / max(sums["tokens"] - 1, 1)
        yield Check("FineWeb bytes per token", " or ".join(f"{known_ratio:.6f}" for known_ratio in ratios),
                    f"{ratio:.6f}", any(abs(ratio / known_ratio - 1) < 1e-5 for known_ratio in ratios))


def prove(folder, model, workers, expected=None, fineweb=None):
    """Yields the checks of a data set and, last, its totals {split: {documents, tokens, bytes}}.

    `expected` holds totals counted elsewhere, such as while encoding; `fineweb` the constants of the published
    validation set where this should be it.
    """
    train_gpt = trainer()
    sp = load(model)
    tables = train_gpt.byte_tables(sp, sp.vocab_size())
    vocab_size = len(tables[0])
    yield from _table_checks(sp, tables)
    file_checks = [*_shard_checks(list_all_shards(folder), train_gpt),
                   *_sidecar_checks(folder, caseops.operator_ids(sp))]
    yield from file_checks
    if not all(check.ok for check in file_checks):  # the rest would read garbage
        return
    totals = {}
    val_keys = None
    for split in ("val", "train"):
        files = list_shards(folder, split)
        if not files:
            continue
        sidecar = list_shards(folder, "val_bytes") if split == "val" else []
        survey = Survey(files, str(model), tables, split == "val", sidecar, exact=not fineweb)
        sums, remarks, keys = run_survey(survey, workers, val_keys)
        if val_keys is None:
            val_keys = keys
        yield same(f"{split}: tokens outside the vocabulary of {vocab_size:,}", 0, sums["outside"],
                   remarks.get("outside", ""))
        if sums["outside"]:
            return
        totals[split] = {name: sums[name] for name in ("documents", "tokens", "bytes")}
        yield same(f"{split}: first token", BOS, int(train_gpt.read_shard(files[0])[0]))
        for name, count in (expected or {}).get(split, {}).items():
            yield same(f"{split}: {name}", count, sums[name])
        yield same(f"{split}: documents of {sums['documents']:,} whose decoded bytes differ from the byte table", 0,
                   sums["unequal"], remarks.get("unequal", ""))
        if sidecar:
            yield from _sidecar_sums(sums, remarks, fineweb)
        if split == "val":
            yield same("val: bytes that train_gpt.py charges", sums["bytes"],
                       charged_bytes(train_gpt, files, tables, sidecar))
            # Normalising twice rarely changes a text (a ligature before an accent); a wrong tokenizer changes them all.
            yield at_most(f"val: documents of {sums['documents']:,} whose text gives other tokens",
                          max(1, sums["documents"] // 10), sums["reencoded"], remarks.get("reencoded", ""))
            if fineweb:
                yield from fineweb_checks(folder, vocab_size, sums, fineweb, bool(sidecar))
        else:
            # FineWeb was deduplicated within each crawl only, so the published set may hold some copies; ours must not.
            most_copies = totals["val"]["documents"] // 100 if fineweb else 0
            yield at_most("train: copies of validation documents", most_copies, sums["copies"])
    yield totals


def _sidecar_sums(sums, remarks, fineweb):
    """The checks of the bytes in the sidecars. Published ones count the documents before normalisation."""
    yield same(f"val: documents of {sums['documents']:,} whose byte sidecar is wrong", 0, sums["sidecar"],
               remarks.get("sidecar", ""))
    share = 1e-4 if fineweb else 0
    yield Check("val: bytes in the sidecar", f"{sums['decoded']:,} within {share:.2%}", sums["bytes"],
                abs(sums["bytes"] - sums["decoded"]) <= share * sums["decoded"])


# ---- --check --------------------------------------------------------------------------------------------------------


def find_tokenizer(folder, vocab_size=None):
    """Where the tokenizer of a data set is: in its folder, or in the contest's layout."""
    if (folder / MODEL).is_file():
        return folder / MODEL
    size, variant = re.search(r"(?:_sp(\d+)(.*))?$", folder.name).groups("")
    name = f"fineweb_{vocab_size or size or '*'}_bpe{variant}.model"
    models = list(folder.parent.parent.glob(f"tokenizers/{name}"))
    if len(models) != 1:
        what = f"{'more than one' if models else 'no'} ../../tokenizers/{name}"
        raise BadInput(f"{folder}: no {MODEL} and {what}; give --tokenizer FILE")
    return models[0]


def check(folder, workers, tokenizer=None, vocab_size=None, known=FINEWEB):
    """`--check`: prints a line for each check of any data set, ours or published. True if all hold."""
    folder = Path(folder).resolve()
    if not list_shards(folder, "val"):
        raise BadInput(f"{folder}: no fineweb_val_*.bin here; --check takes the folder of a data set")
    model = Path(tokenizer) if tokenizer else find_tokenizer(folder, vocab_size)
    try:
        load(model)
    except (OSError, RuntimeError):
        raise BadInput(f"{model}: no such file, or not a SentencePiece model") from None
    manifest = read_manifest(folder)
    say("check", folder=folder.name, tokenizer=model.name, manifest="yes" if manifest else "no")
    tool = manifest["tool"] if manifest else None
    totals = manifest["splits"] if manifest else None
    is_published = folder.name.startswith("fineweb10B_") and tool != TOOL
    results = []
    for result in chain(_hash_checks(folder, manifest, model, workers) if manifest else (),
                        prove(folder, model, workers, totals, known if is_published else None)):
        if isinstance(result, Check):
            results.append(result)
            print(result, flush=True)
    failed = sum(not result.ok for result in results)
    print(f"FAILED: {failed} of {len(results)} checks" if failed else f"all {len(results)} checks ok", flush=True)
    return not failed


def _hash_checks(folder, manifest, model, workers):
    """The files against the hashes in the manifest."""
    yield same("SHA-256 of the tokenizer", manifest["tokenizer"]["sha256"], sha256(model))
    stated = {row["name"]: row["sha256"] for row in manifest["shards"]}
    present = {row["name"]: row["sha256"] for row in file_table(folder, workers)}
    for name in sorted({*stated, *present}):
        yield same(f"SHA-256 of {name}", stated.get(name, "no such file"), present.get(name, "no such file"))
