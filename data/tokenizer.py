"""The tokenizer of a data set: the sample that it learns from, training it, and checks of one that is given."""

import heapq
import io
import os
import re
from functools import lru_cache

import sentencepiece

import caseops
from common import READ_BYTES, BadInput
from processes import Bar, say, trainer
from sources import HASHES, Block, blocks, hashes, text_of

SPACE = "\u2581"  # what SentencePiece writes for a space


# ---- the sample -----------------------------------------------------------------------------------------------------


def scan_block(task):
    """Worker: (split hash, sample hash, text) of every document that has a text. The text is None where the sample hash
    is not below `limit`.
    """
    block, key, limit = task
    rows = []
    for where, raw in block.documents:
        text = text_of(block, where, raw, key)
        if text.strip():
            split, rank = hashes(text)
            rows.append((split, rank, text if rank < limit else None))
    return rows


def sample(job, workers):
    """Training documents for the tokenizer: those with the smallest hashes, up to a limit of bytes.

    Which they are depends neither on order nor on workers, and no more than the limit is ever held.
    """
    kept = []  # a heap of (-rank, split hash, text)
    size = 0  # bytes of the texts in it
    limit = HASHES
    seen = 0
    validation = set()  # split hashes
    most = job.sample_mb * 1e6
    progress = Bar("sample", job.total)

    def tasks():
        for block in blocks(job.files, limit=job.max_docs):
            yield block, job.text_key, limit  # the limit sinks while the heap fills

    for (block, *_), rows in workers.map(scan_block, tasks()):
        for split, rank, text in rows:
            seen += 1
            is_wanted = text is not None and rank < limit
            if seen <= job.val_docs:
                validation.add(split)
            elif split >= job.val_share and is_wanted:
                heapq.heappush(kept, (-rank, split, text))
                size += len(text.encode())
                while size > most and len(kept) > 1:
                    negative_rank, _, dropped = heapq.heappop(kept)
                    size -= len(dropped.encode())
                    limit = -negative_rank
        progress(block.read)
    progress.close()
    # A copy of a validation document will be dropped from training, so the tokenizer must not learn from it either.
    return [text for _, split, text in sorted(kept, reverse=True) if split not in validation]


# ---- training -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts, vocab_size, symbols=()):
    """A SentencePiece model with the contest's options. Lines are its sentences, so no document is too long. `symbols`
    are pieces of their own, with the first ids after the four controls.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
            normalization_rule_name="nmt_nfkc", pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
            user_defined_symbols=list(symbols), max_sentence_length=READ_BYTES, minloglevel=2)
    except RuntimeError as error:
        need = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        why = f"the characters of this text need at least {need.group(1)}" if need else "there is not enough text"
        raise BadInput(f"no tokenizer of {vocab_size} pieces: {why}; change --vocab-size or give more text") from None
    return model.getvalue()


def _sentences(texts):
    """The lines of texts, in pieces that SentencePiece takes."""
    longest = READ_BYTES // 8  # characters
    for text in texts:
        for line in text.replace("\0", " ").split("\n"):
            if line.strip():
                for begin in range(0, len(line), longest):
                    yield line[begin : begin + longest]


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_tokenizer(model, vocab_size, name):
    """The processor of a model with which the contest's byte table counts the bytes of a text; else BadInput.

    train_gpt.py says what is usable; more is asked of a tokenizer that this tool encodes with and proves.
    """
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise BadInput(f"{name}: not a SentencePiece model") from None
    fault = _fault(sp, vocab_size)
    if fault:
        raise BadInput(f"{name}: {fault}")
    return sp


def _fault(sp, vocab_size):
    """What is wrong with a tokenizer, or a false value."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    trainer_fault = trainer().tokenizer_fault(sp)
    if vocab_size not in (None, len(pieces)):
        return f"{len(pieces)} pieces, but --vocab-size is {vocab_size}; they must agree"
    if trainer_fault:
        return trainer_fault
    normal = sp.normalize(" a")
    if normal[:1] in (SPACE, " "):  # which decoding takes away
        return f"it makes {normal!r} of ' a'; train it with add_dummy_prefix=False and nmt_nfkc"
    if caseops.operator_ids(sp):
        for piece in pieces:
            if len(piece) > 1 and caseops.LITERAL.search(piece):
                return f"a case operator inside the piece {ascii(piece)}, it must be a token of its own"
    return None


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
    changed = sum(ids != normalised_ids for ids, normalised_ids in zip(sp.encode(texts), sp.encode(normalised)))
    if changed > max(1, len(texts) // 10):  # as in the proof
        raise BadInput(f"--tokenizer: {changed} of the first {len(texts)} documents have other tokens once "
                       "normalised: the normalisation changes its own texts; choose another tokenizer")


# ---- loading --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _load(path, stamp):
    return sentencepiece.SentencePieceProcessor(model_file=path)


def load(path):
    """The processor of a model file, read once a process unless the file changes."""
    return _load(str(path), os.stat(path).st_mtime_ns)
