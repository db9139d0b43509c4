"""Text -> tokenizer -> shards, with proofs: makes a data set that train_gpt.py reads, in the contest's own format.

    python data/prepare.py --source builtin                       no download: the documentation on this machine
    python data/prepare.py --source my.txt more/ --out data/datasets/mine --vocab-size 1024
    python data/prepare.py --source my.txt --out data/datasets/mine_caseops --caseops
    python data/prepare.py --check data/datasets/mine             proves any data set again, from its shards alone

The stream of documents is read once for the tokenizer's sample, once for validation, once for training. One process
reads, all cores parse and encode, results come back in order: the bytes written do not depend on --workers, and memory
does not depend on the size of the input. train_gpt.py owns the shard reader and the byte table; both are taken from
there, in the parent process only, because importing it imports torch.

In reading order: sources.py (files -> documents), builtin_text.py, tokenizer.py, this file (documents -> shards, the
command line), shards.py (their files), proof.py; processes.py holds what all of them use.
"""

import contextlib
import hashlib
import importlib.util
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
    import sentencepiece  # noqa: F401 - tokenizer.py needs it
    import zstandard  # noqa: F401 - sources.py needs it
except ImportError as missing:
    sys.exit(f"error: this needs the package {missing.name}: pip install -r requirements.txt")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))  # for common.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

import caseops
from builtin_text import packages, write_builtin
from common import BOS, ROOT, SHARD_HEADER_BYTES, BadInput, Parser, positive, sha256, whole
from processes import Bar, Stopped, Workers, hold_standard_streams, say, trainer
from proof import Survey, check, document_keys, find_copies, key_array, prove, run_survey
from shards import (
    MANIFEST,
    MODEL,
    TOOL,
    ShardWriter,
    atomic,
    file_table,
    list_shards,
    locked,
    read_json,
    read_manifest,
    write_json,
)
from sources import HASHES, START, blocks, find_sources, hashes, text_of
from tokenizer import SPACE, check_tokenizer, load, sample, train_tokenizer, try_tokenizer

STATE = ".prepare.json"  # of a job that is not finished
BUILTIN = "builtin.jsonl.zst"
RESTART = ".restart"  # folder in --out: what --restart makes
MOVING = ".restart_moving"  # the same, when it is complete and takes the place of the old set
DOCUMENTS = "docs_selected.jsonl"  # the text of FineWeb
TOO_FEW = 10_000  # validation documents of it; this split cost many a record (#2127)


# ---- the job --------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What to make of what. `description` says it in the manifest: equal descriptions mean equal shards."""

    out: Path
    files: list
    vocab_size: int
    tokenizer: bytes | None
    val_docs: int  # the first documents are validation; 0: by hash
    val_share: int  # documents with a split hash below are validation; 0: the first ones
    shard_tokens: int
    max_docs: int | None
    text_key: str
    sample_mb: float
    caseops: bool
    description: dict

    @property
    def total(self):
        return sum(path.stat().st_size for path in self.files)


def describe_files(files):
    """What decides whether the inputs are still the same: names, sizes and times, not 100 GB of content."""
    digest = hashlib.sha256()
    total = 0
    for path in files:
        state = path.stat()
        total += state.st_size
        digest.update(f"{path.name}\t{state.st_size}\t{state.st_mtime_ns}\n".encode())
    return dict(files=len(files), bytes=total, first=files[0].name, names_sizes_times=digest.hexdigest()[:16])


def check_folder(option, folder):
    """BadInput if a folder that is to be made cannot be one."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise BadInput(f"{option} {folder}: {place} is not a folder; choose another {option}")
            return


def make_job(args):
    """The job that the arguments ask for; BadInput for whatever can be known to be wrong before any work."""
    is_builtin = args.source == ["builtin"]
    if "builtin" in args.source and not is_builtin:
        raise BadInput("--source builtin stands alone; put other text into a data set of its own")
    share = 0.05 if args.val_fraction is None else args.val_fraction
    if share >= 1:
        raise BadInput(f"--val-fraction {share}: must lie between 0 and 1")
    vocab_size = 1024 if args.vocab_size is None else args.vocab_size
    model = None
    if args.tokenizer:
        model, vocab_size = read_tokenizer(args)
    if vocab_size > 1 << 16:
        raise BadInput(f"--vocab-size {vocab_size}: a token is stored in 16 bits, so it must lie between 1 and 65536")
    if args.out is None and not is_builtin:
        raise BadInput("--out is missing: say where the data set goes, for example --out data/datasets/mine")
    if importlib.util.find_spec("torch") is None:  # better now than before the proof, after hours of encoding
        raise BadInput("the proof at the end needs torch: pip install -r requirements.txt")
    suffix = "_caseops" if args.caseops else ""
    out = Path(args.out or os.path.relpath(ROOT / f"data/datasets/builtin_sp{vocab_size}{suffix}"))
    check_folder("--out", out)
    files = [out / BUILTIN] if is_builtin else find_sources(args.source)
    if args.val_docs == TOO_FEW and files[0].name.startswith(DOCUMENTS):
        raise BadInput(f"--val-docs {TOO_FEW} of {DOCUMENTS}: the contest's validation set is the first 50000, and "
                       "40000 of these would be trained on; use --val-docs 50000")
    description = dict(
        tool=TOOL,
        source=dict(builtin=versions()) if is_builtin else describe_files(files),
        vocab_size=vocab_size,
        tokenizer=hashlib.sha256(model).hexdigest() if model else f"trained on {args.tokenizer_sample_mb:g} MB",
        validation=f"first {args.val_docs} documents" if args.val_docs else f"{share:g} of the documents by hash",
        shard_tokens=args.shard_tokens,
        max_docs=args.max_docs,
        text_key=args.text_key,
    )
    if args.caseops:
        description["transform"] = caseops.NAME
    return Job(out, files, vocab_size, model, args.val_docs or 0, 0 if args.val_docs else int(share * HASHES),
               args.shard_tokens, args.max_docs, args.text_key, args.tokenizer_sample_mb, args.caseops, description)


def read_tokenizer(args):
    """(model, vocabulary size) of --tokenizer."""
    if not Path(args.tokenizer).is_file():
        raise BadInput(f"--tokenizer {args.tokenizer}: no such file")
    model = Path(args.tokenizer).read_bytes()
    sp = check_tokenizer(model, args.vocab_size, args.tokenizer)
    has_operators = bool(caseops.operator_ids(sp))
    if args.caseops and not has_operators:
        raise BadInput(f"{args.tokenizer}: has no case operators; leave out --caseops")
    if has_operators and not args.caseops:
        raise BadInput(f"{args.tokenizer}: has case operators; add --caseops")
    return model, sp.vocab_size()


def versions():
    """What decides the builtin text: the versions of Python and of the packages."""
    return dict(python=sys.version.split()[0], **{name: package.version for name, package in packages().items()})


# ---- what is in the folder already ----------------------------------------------------------------------------------


def finished(job):
    """True if the data set is there and complete. BadInput if the folder holds another one: nothing is overwritten."""
    manifest = read_manifest(job.out)
    if manifest is None:
        if list_shards(job.out, "*") and not (job.out / STATE).exists():
            raise BadInput(f"{job.out}: holds shards that this tool did not make; choose another --out")
        return False
    change = describe_change(manifest.get("job", {}), job.description)
    lost = lost_files(job.out, manifest)
    is_other_job = change and not change.startswith("source {'builtin'")
    if lost or is_other_job:
        fault = f"an incomplete data set ({lost[0]} is missing or cut)" if lost else f"another data set ({change})"
        raise BadInput(f"{job.out}: holds {fault}; --restart replaces it, or choose another --out")
    facts = {f"{split}_{name}": count for split, row in manifest["splits"].items() for name, count in row.items()}
    if change:
        facts["note"] = "made_with_other_package_versions,_kept;_--restart_makes_it_again"
    say("complete", out=job.out, **facts)
    if (job.out / RESTART).exists():
        say("unfinished", folder=job.out / RESTART, note="--restart_continues_it;_remove_it_to_keep_this_set")
    return True


def describe_change(old, new):
    """What differs between two descriptions of jobs."""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)


def lost_files(folder, manifest):
    """Shards of a manifest that are missing or have another size."""
    lost = []
    for row in manifest["shards"]:
        path = folder / row["name"]
        size = SHARD_HEADER_BYTES + 2 * row["tokens"]
        if not path.is_file() or path.stat().st_size != size:
            lost.append(row["name"])
    return lost


def discard(folder):
    """Removes what this tool wrote, and only that."""
    own = (folder / name for name in (MANIFEST, MODEL, BUILTIN, STATE))
    for path in [*folder.glob(".*.part"), *list_shards(folder, "*"), *own]:
        path.unlink(missing_ok=True)


def replacement(job):
    """The job of --restart: it makes the new set in a folder inside, so the old one stays until the proof."""
    new = job.out / RESTART
    files = [new / BUILTIN] if job.files == [job.out / BUILTIN] else job.files
    new.mkdir(exist_ok=True)
    return job._replace(out=new, files=files)


def replace_old(folder):
    """Puts a new set that --restart made and proved in the place of the old one, or continues with that."""
    new = folder / RESTART
    moving = folder / MOVING
    if (new / MANIFEST).exists():
        discard(folder)
        os.replace(new, moving)  # from here on what lies in the folder is new, too
    if moving.exists():
        for path in sorted(moving.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest last
            os.replace(path, folder / path.name)
        moving.rmdir()


def fresh_state(job):
    """What a killed job needs to continue: all before `cursor`, and `skip` tokens after it, is in finished shards."""
    counts = ("val_documents", "val_tokens", "train_documents", "train_tokens", "train_docs_dropped",
              "empty_docs_skipped")
    return dict(job=job.description, split="val", cursor=START, after=-1, skip=0, shards=dict(val=0, train=0),
                counts=dict.fromkeys(counts, 0))


def resume(job):
    """The state of an earlier, killed run of the same job, or a fresh one."""
    state = read_json(job.out / STATE)
    if state is not None:
        if state["job"] == job.description and has_finished_shards(job, state):
            for path in job.out.glob(".*.part"):
                path.unlink()
            say("continue", split=state["split"], finished_shards=sum(state["shards"].values()))
            return state
        say("restart", reason="the_unfinished_job_here_had_other_arguments_or_inputs")
    discard(job.out)
    state = fresh_state(job)
    write_json(job.out / STATE, state)
    return state


def has_finished_shards(job, state):
    """Whether the shards are there that the state says are finished."""
    finished_shards = dict(state["shards"])
    if job.caseops:
        finished_shards["val_bytes"] = state["shards"]["val"]
    return all(len(list_shards(job.out, split)) >= count for split, count in finished_shards.items())


# ---- encoding: blocks -> tokens -> shards ---------------------------------------------------------------------------


class Encoded(NamedTuple):
    """The documents of a block that belong to a split."""

    columns: tuple  # of uint16: every document with its BOS and, where a sidecar is wanted, the bytes of each token
    lengths: np.ndarray  # tokens of each document
    keys: np.ndarray  # (documents, 2) uint64
    index: np.ndarray  # which documents of the block these are
    empty: np.ndarray  # which have no text


def encode_block(task):
    """Worker: the documents of a block whose hash lies in [low, high), as tokens and, where byte tables are given, the
    bytes of these. Each document is decoded again, as a proof.
    """
    block, key, model, low, high, tables = task
    sp = load(model)
    transform, invert = caseops.codec(sp)
    is_all = (low, high) == (0, HASHES)
    index = []
    texts = []
    empty = []
    for i, (where, raw) in enumerate(block.documents):
        text = text_of(block, where, raw, key)
        if not text.strip():
            empty.append(i)
        elif is_all or low <= hashes(text)[0] < high:
            index.append(i)
            texts.append(text)
    transformed = [transform(text) for text in texts]
    ids = sp.encode(transformed, num_threads=1) if texts else []
    keys = []
    for i, text, sent, row in zip(index, texts, transformed, ids, strict=True):
        decoded = sp.decode(row)
        keys.append(document_keys(row, invert(decoded)))
        is_lossless = invert(sent) == text and decoded == sp.normalize(sent).replace(SPACE, " ")
        if not is_lossless:
            (file, byte, line, _), _ = block.documents[i]
            raise BadInput(f"{block.names[file]}:{line}: the tokenizer does not give back the document at byte "
                           f"{byte:,}, so its bytes could not be counted; choose another tokenizer")
    lengths = np.array([len(row) + 1 for row in ids], np.int64)
    stream = chain.from_iterable(chain((BOS,), row) for row in ids)
    columns = [np.fromiter(stream, np.uint16, int(lengths.sum()))]
    if tables:
        counts = caseops.byte_counts(columns[0], tables, caseops.operator_ids(sp))
        columns.append(counts.astype(np.uint16))
    return Encoded(tuple(columns), lengths, key_array(keys), np.array(index, np.int64), np.array(empty, np.int64))


def too_few(job, purpose, count):
    return BadInput(f"too few documents for {purpose}: found {count:,} (validation: {job.description['validation']}); "
                    "give more text, or another --val-docs or --val-fraction")


def encode(job, workers, state, split, val_keys=None):
    """Writes the shards of a split from where the state stands. Training drops copies of validation documents."""
    counts = state["counts"]
    skip = state["skip"]
    last = None  # where the last validation document begins, if they are the first ones
    progress = Bar(split, job.total)
    tasks, names = encoding_tasks(job, state, split)
    with ShardWriter(job.out, names, job.shard_tokens, state["shards"][split]) as writer:
        for (block, *_), encoded in workers.map(encode_block, tasks):
            counts_before = dict(counts)
            keep = np.ones(len(encoded.lengths), bool)
            empty = len(encoded.empty)
            room = job.val_docs - counts["val_documents"]
            if split == "train":
                keep = ~find_copies(encoded.keys, val_keys)
                counts["train_docs_dropped"] += int((~keep).sum())
            elif job.val_docs and len(keep) >= room:
                keep[room:] = False
                last_index = encoded.index[room - 1]
                last, _ = block.documents[last_index]
                empty = int((encoded.empty < last_index).sum())
            columns = [column[np.repeat(keep, encoded.lengths)] for column in encoded.columns]
            counts[f"{split}_documents"] += int(keep.sum())
            counts[f"{split}_tokens"] += len(columns[0])
            if split == "train" or job.val_docs:  # by hash, training meets the same empty documents again
                counts["empty_docs_skipped"] += empty
            for done in writer.write(*(column[skip:] for column in columns)):
                state["shards"][split] = writer.index
                here = dict(cursor=block.documents[0][0], skip=skip + done, counts=counts_before)
                write_json(job.out / STATE, {**state, **here})
            skip = max(skip - len(columns[0]), 0)
            progress(block.read)
            if last:
                break
        writer.finish()
    progress.close()
    documents = counts[f"{split}_documents"]
    if split == "val" and documents < max(job.val_docs, 1):
        raise too_few(job, "validation", documents)
    if not documents:
        raise too_few(job, "training", documents)
    state["shards"][split] = writer.index
    state["split"] = "train" if split == "val" else "done"
    state["skip"] = 0
    state["cursor"] = last or START
    state["after"] = last[3] if last else -1
    write_json(job.out / STATE, state)
    say(split, documents=documents, tokens=counts[f"{split}_tokens"], shards=writer.index)


def encoding_tasks(job, state, split):
    """(tasks of encode_block, names of the columns that they give)."""
    model = job.out / MODEL
    names = [split]
    tables = None
    if split == "val" and job.caseops:
        names = [split, "val_bytes"]
        tables = trainer().byte_tables(load(model), job.vocab_size)
    low, high = job.val_share, HASHES
    if split == "val":
        low, high = 0, job.val_share or HASHES
    source = blocks(job.files, tuple(state["cursor"]), job.max_docs, state["after"])
    return ((block, job.text_key, str(model), low, high, tables) for block in source), names


# ---- the whole job --------------------------------------------------------------------------------------------------


def make_shards(job, workers, state):
    """Text -> tokenizer -> validation -> training; each step is skipped if an earlier, killed run finished it."""
    if not job.files[0].exists():
        write_builtin(job.files[0], workers)
    say("prepare", files=len(job.files), bytes=job.total, vocab_size=job.vocab_size, workers=workers.count,
        validation=job.description["validation"].replace(" ", "_"))
    model = job.out / MODEL
    if not model.exists():
        content = make_tokenizer(job, workers)
        with atomic(model) as file:
            file.write(content)
    if state["split"] == "val":
        encode(job, workers, state, "val")
    if state["split"] == "train":
        blank = [np.zeros(job.vocab_size, dtype) for dtype in (np.int16, bool, bool)]  # only the keys are wanted here
        _, _, val_keys = run_survey(Survey(list_shards(job.out, "val"), str(model), blank), workers)
        encode(job, workers, state, "train", val_keys)


def make_tokenizer(job, workers):
    """The given tokenizer, or one that is trained on the text."""
    if job.tokenizer is not None:
        try_tokenizer(job)
        return job.tokenizer
    texts = sample(job, workers)
    if not texts:
        raise too_few(job, "training", 0)
    if job.caseops:
        model = train_tokenizer(map(caseops.encode, texts), job.vocab_size, caseops.OPERATORS)
    else:
        model = train_tokenizer(texts, job.vocab_size)
    say("tokenizer", documents=len(texts), bytes=sum(len(text.encode()) for text in texts))
    check_tokenizer(model, job.vocab_size, "the tokenizer trained on this text (give more text)")
    return model


def finish(job, workers, counts):
    """The proof, and the manifest if it holds. The exit code."""
    model = job.out / MODEL
    expected = {split: {name: counts[f"{split}_{name}"] for name in ("documents", "tokens")}
                for split in ("val", "train")}
    *results, totals = prove(job.out, model, workers, expected)
    for result in results:
        print(result, flush=True)
    is_complete = isinstance(totals, dict)
    if not is_complete or not all(result.ok for result in results):
        print("FAILED: the proof does not hold, so no manifest was written", flush=True)
        return 1
    write_json(job.out / MANIFEST, dict(
        tool=TOOL,
        job=job.description,
        vocab_size=job.vocab_size,
        splits=totals,
        bytes_per_token=round(totals["val"]["bytes"] / (totals["val"]["tokens"] - 1), 6),
        train_docs_dropped=counts["train_docs_dropped"],
        empty_docs_skipped=counts["empty_docs_skipped"],
        tokenizer=dict(name=MODEL, sha256=sha256(model)),
        shards=file_table(job.out, workers),
        proof=[dict(check=result.name, expected=result.expected, found=result.found) for result in results],
    ))
    (job.out / STATE).unlink()
    return 0


# ---- the command line -----------------------------------------------------------------------------------------------


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
    p = Parser(prog="prepare.py", description=__doc__.splitlines()[0], epilog=EXAMPLES,
               formatter_class=RawDescriptionHelpFormatter)
    job, split = p.add_mutually_exclusive_group(required=True), p.add_mutually_exclusive_group()
    job.add_argument("--source", nargs="+", metavar="SRC",
                     help=".txt or .jsonl files, plain, .gz or .zst; folders of them; or the word builtin")
    job.add_argument("--check", metavar="DIR", help="prove the data set in DIR from its shards; changes nothing")
    p.add_argument("--out", metavar="DIR", help="where the data set goes (builtin: data/datasets/builtin_sp1024)")
    p.add_argument("--vocab-size", type=whole(1), metavar="V",
                   help="pieces of the tokenizer, at most 65536 (default: 1024, or those of --tokenizer)")
    p.add_argument("--tokenizer", metavar="FILE", help="use this SentencePiece .model instead of training one")
    p.add_argument("--caseops", action="store_true",
                   help="write capitals as operators before words in lower case (#1729), without loss")
    split.add_argument("--val-docs", type=whole(1), metavar="N",
                       help="validate on the first N documents, as in the contest")
    split.add_argument("--val-fraction", type=positive, metavar="F",
                       help="validation is this share of the documents, chosen by a hash of their text (default: 0.05)")
    p.add_argument("--shard-tokens", type=whole(1), default=100_000_000, metavar="N",
                   help="tokens of a full shard (default: 100000000)")
    p.add_argument("--workers", type=whole(1), metavar="N",
                   help="processes; the output does not depend on their number (default: all cores)")
    p.add_argument("--max-docs", type=whole(1), metavar="N", help="stop after the first N documents of the stream")
    p.add_argument("--text-key", default="text", metavar="KEY",
                   help="field of a .jsonl line that holds the text (default: text)")
    p.add_argument("--tokenizer-sample-mb", type=positive, default=50, metavar="M",
                   help="train the tokenizer on at most so much text, held in memory (default: 50)")
    p.add_argument("--restart", action="store_true",
                   help="make the set again; what is in --out stays until the new one is proven")
    return p


def run(args):
    begin = time.monotonic()
    count = args.workers or count_cores()
    if args.check:
        with contextlib.closing(Workers(count)) as workers:
            return 0 if check(args.check, workers, args.tokenizer, args.vocab_size) else 1
    job = make_job(args)
    out = job.out
    is_half_replaced = (out / MOVING).exists() or (out / RESTART / MANIFEST).exists()
    if not args.restart and not is_half_replaced and finished(job):
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


def count_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main(argv=None):
    hold_standard_streams()
    args = None
    try:
        args = parser().parse_args(argv)
        return run(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, OSError, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        can_continue = args and not args.check
        how_to_continue = "; the same command continues from the last finished shard" if can_continue else ""
        print(f"stopped: {reason}{how_to_continue}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    sys.exit(main())
