"""The toy data set: made-up text, a tokenizer of 512 pieces, shards, and the settings of the smallest run on them."""

import random
import struct

SHARD_MAGIC, SHARD_VERSION, BOS = 20240520, 1, 1

# The smallest run that still goes through every part of the default model and every phase: about 1 s after the imports.
TOY = """VOCAB_SIZE=512 NUM_LAYERS=4 MODEL_DIM=32 NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=4 XSA_LAST_N=2 VE_LAYERS=2,3
VE_DIM=16 BIGRAM_VOCAB_SIZE=64 BIGRAM_DIM=16 TRAIN_SEQ_LEN=64 EVAL_SEQ_LEN=64 EVAL_STRIDE=32 TRAIN_BATCH_TOKENS=512
ITERATIONS=5 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1 VAL_LOSS_EVERY=0 MUON_MOMENTUM_WARMUP_STEPS=2
EMA_DECAY=0.5 FIT=off MATRIX_QUANT=gptq_lite EMBED_QUANT=gptq_lite SELFTEST=0""".split()


def write_shard(path, tokens):
    """A shard in the contest's format: 256 little-endian int32 (magic, version, number of tokens), uint16 tokens. Put in
    place as a whole: what is there may still be mapped by a loader that reads ahead.
    """
    tokens = list(map(int, tokens))
    header = struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, len(tokens)).ljust(1024, b"\0")
    new = path.with_name(path.name + ".new")
    new.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))
    new.replace(path)


def toy_documents(count=90, seed=7):
    """Documents of made-up words with some regularity to learn, about 330 bytes each; a few need byte pieces."""
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "ptkbdgmnrls" for vowel in "aeiou"]
    words = ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 3))) for _ in range(150)]
    documents = []
    for number in range(count):
        at, text = rng.randrange(150), []
        for _ in range(60):
            at = (3 * at + rng.randrange(4)) % 150  # each word has four possible successors: about 2 bits a word
            text.append(words[at] + rng.choice(["", "", "", ",", "."]))
        documents.append(" ".join(text) + (" \u00e9t\u00e9 \u4e16 \U0001f600" if number % 10 == 3 else ""))
    return documents


def train_tokenizer(documents, path):
    """A BPE tokenizer of 512 pieces for these documents, written to `path` (NAME.model) and returned."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(path.with_suffix("")), model_type="bpe",
        vocab_size=512, byte_fallback=True, add_dummy_prefix=False, character_coverage=0.999,
        split_digits=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, num_threads=1,
        minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert sp.vocab_size() == 512
    return sp


def make_toy(folder):
    """Tokenizer, one validation shard and two training shards in `folder`; returns the settings that train on them."""
    documents = toy_documents()
    sp = train_tokenizer(documents, folder / "tokenizer.model")
    for name, first, end in (("val_000000", 0, 20), ("train_000000", 20, 50), ("train_000001", 50, None)):
        tokens = [token for text in documents[first:end] for token in (BOS, *sp.encode(text))]
        write_shard(folder / f"fineweb_{name}.bin", tokens)
    return [f"DATA_PATH={folder}", *TOY]
