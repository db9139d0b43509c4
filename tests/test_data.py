"""Shards, the training stream, the tokenizer, and bytes per token against decoding with real SentencePiece models."""

import hashlib
import json
import math
import random
import re
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import call, command, events, good, refused, summary
from toy import toy_documents, write_shard

import prepare
import train_gpt as tg


def shard_bytes(tokens=(1, 2, 3), magic=20240520, version=1, count=None):
    head = struct.pack("<3i", magic, version, len(tokens) if count is None else count).ljust(1024, b"\0")
    return head + struct.pack(f"<{len(tokens)}H", *tokens)


def rank_of(rank, world):
    return ref.Ranks(world).members[rank]


def stream_of(folder, shards, rt=None, **changes):
    for old in folder.glob("*.bin"):
        old.unlink()
    for i, shard in enumerate(shards):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", shard)
    s = ref.small(vocab_size=1000, train_seq_len=changes.pop("train_seq_len", 4),
                  train_batch_tokens=changes.pop("train_batch_tokens", 16),
                  data_path=folder, **changes)
    return tg.TokenStream(tg.find_shards(folder, "train"), s, rt or ref.alone())


# --- shards ----------------------------------------------------------------------------------------------------------


def test_read_shard_gives_the_tokens_read_only(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(shard_bytes((1, 0, 999, 65535)))
    tokens = tg.read_shard(path)
    assert tokens.tolist() == [1, 0, 999, 65535] and tokens.dtype == np.uint16
    with pytest.raises(ValueError):
        tokens[0] = 5
    assert tg.read_shard(path, 65536).tolist() == [1, 0, 999, 65535]


NOT_SHARDS = dict(
    empty=(b"", "magic"), one_byte=(b"\x08", "magic"), eleven_bytes=(shard_bytes()[:11], "magic"),
    magic=(shard_bytes(magic=20240521), r"offset 0.*20240520.*20240521"),
    version=(shard_bytes(version=2), r"offset 4.*1.*found 2"),
    cut=(shard_bytes()[:-1], r"offset 8.*1030.*1029"), padded=(shard_bytes() + b"\0\0", r"offset 8.*1030.*1032"),
    miscounted=(shard_bytes(count=4), r"1032.*1030"), only_words=(shard_bytes()[:12], "offset 8"),
    no_tokens=(shard_bytes(()), "no tokens"),
    negative=(shard_bytes(count=-1), "offset 8"),
    # 24 bytes = 1024 - 2 * 500
    negative_that_fits=(struct.pack("<3i", 20240520, 1, -500).ljust(24, b"\0"), "offset 8"),
    negative_that_fits_words=(struct.pack("<3i", 20240520, 1, -506), "offset 8"),
    big_endian=(struct.pack(">3i", 20240520, 1, 3).ljust(1030, b"\0"), "magic"))


@pytest.mark.parametrize("data, said", NOT_SHARDS.values(), ids=NOT_SHARDS)
def test_a_file_that_is_no_shard_is_named_with_offset_expected_and_found(tmp_path, data, said):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(data)
    with pytest.raises(tg.BadInput) as error:
        tg.read_shard(path)
    message = str(error.value)
    assert str(path) in message and re.search(said, message) and "\n" not in message


def test_an_unreadable_shard_is_named(tmp_path):
    for path in (tmp_path / "nothing.bin", tmp_path):
        with pytest.raises(tg.BadInput, match=re.escape(str(path))):
            tg.read_shard(path)


def test_a_token_outside_the_vocabulary_is_named_by_its_byte_offset(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(shard_bytes((1, 31, 32, 7, 40)))
    with pytest.raises(tg.BadInput, match=rf"{re.escape(str(path))}.*token 32 at offset 1028.*VOCAB_SIZE=32"):
        tg.read_shard(path, 32)
    assert len(tg.read_shard(path, 41)) == 5
    stream = stream_of(tmp_path, [range(1, 30), (1, 31, 999, 1000, 5)])  # training shards are checked as they are read
    with pytest.raises(tg.BadInput, match=r"fineweb_train_000001\.bin: token 1000 at offset 1030.*VOCAB_SIZE=1000"):
        for _ in range(4):
            stream.next()


def test_missing_shards_say_where_and_how_to_make_them(tmp_path):
    for folder, words in ((tmp_path / "fineweb10B_sp1024", "data/fineweb.py --variant sp1024"),
                          (tmp_path / "mine", "data/prepare.py")):
        for split in ("train", "val"):
            with pytest.raises(tg.BadInput) as error:
                tg.find_shards(folder, split)
            message = str(error.value)
            assert f"fineweb_{split}_*.bin" in message and str(folder) in message and words in message
            assert "\n" not in message


def test_shards_come_in_the_order_of_their_names(tmp_path):
    names = [f"fineweb_{split}_{i:06d}.bin" for split in ("val", "train") for i in range(12)]
    for name in random.Random(1).sample([*names, "other.bin", "fineweb_test_000000.bin"], len(names) + 2):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in tg.find_shards(tmp_path, "train")] == names[12:]
    assert [path.name for path in tg.find_shards(str(tmp_path), "val")] == names[:12]


def test_shards_without_leading_zeros_come_in_the_order_of_their_numbers(toy, tmp_path, capsys):
    """In every command: a stream that is cut into files 0 to 11 is the same with any names."""
    s = tg.Settings.parse(toy)
    val = np.concatenate([tg.read_shard(path) for path in tg.find_shards(s.data_path, "val")])
    train = np.concatenate([tg.read_shard(path) for path in tg.find_shards(s.data_path, "train")])
    scores = []
    for digits in (1, 6):
        folder = tmp_path / str(digits)
        folder.mkdir()
        (folder / "._fineweb_val_0.bin").write_bytes(b"macOS")  # never a shard
        (folder / "tokenizer.model").write_bytes(Path(s.data_path, "tokenizer.model").read_bytes())
        for split, ids in (("val", val), ("train", train)):
            for number, part in enumerate(np.array_split(ids, 12)):
                write_shard(folder / f"fineweb_{split}_{number:0{digits}d}.bin", part)
        done = good(call(command(toy, folder / "run", f"DATA_PATH={folder}", "ITERATIONS=1")))
        scores.append(summary(done)["val_bpb"])
        assert prepare.main(["--check", str(folder), "--workers", "1"]) == 0
    assert scores[0] == scores[1] and "fineweb_val_11.bin" in capsys.readouterr().out
    copies = {"fineweb_val_1 (1).bin": "no number of a shard", "fineweb_val_001.bin": "has the number of"}
    for name, said in copies.items():
        copy = tmp_path / "1" / name
        copy.write_bytes((tmp_path / "1" / "fineweb_val_1.bin").read_bytes())
        refused(call(command(toy, tmp_path / "no", f"DATA_PATH={tmp_path}/1")), 2, "fineweb_val_", said)
        assert prepare.main(["--check", str(tmp_path / "1"), "--workers", "1"]) == 1
        assert said in capsys.readouterr().out
        copy.unlink()


# --- the training stream ---------------------------------------------------------------------------------------------


@ref.tries(60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
       st.sampled_from([1, 2, 4]), st.integers(1, 3),
       st.integers(2, 5), st.integers(1, 6))
def test_batches_are_cuts_of_the_endless_stream_whatever_the_ranks(tmp_path_factory, sizes, world, rows, length,
                                                                   batches):
    """Global batch b holds targets b*N+1 .. (b+1)*N of the shards repeated for ever, in the order of the ranks."""
    folder, total, batch = tmp_path_factory.getbasetemp(), sum(sizes), 4 * rows * length
    text, ends = list(range(total)), np.cumsum([0, *sizes])
    shards = [text[a:b] for a, b in zip(ends, ends[1:])]
    endless = text * (batch * batches // total + 3)
    streams = [stream_of(folder, shards, rank_of(rank, world), train_seq_len=length, train_batch_tokens=batch,
                         micro_batch_tokens=2 * length)
               for rank in range(world)]
    for b in range(batches):
        parts = [stream.next() for stream in streams]
        x, y = (torch.cat([micro[side] for part in parts for micro in part]) for side in (0, 1))
        assert all(docs is None for part in parts for _, _, docs in part), "the model finds them itself"
        assert x.shape == y.shape == (4 * rows, length) and x.dtype == y.dtype == torch.int64
        assert x.flatten().tolist() == endless[b * batch : (b + 1) * batch]
        assert y.flatten().tolist() == endless[b * batch + 1 : (b + 1) * batch + 1]
        for part in parts:
            assert len({side.shape for x, y, _ in part for side in (x, y)}) == 1  # equal shapes: one graph
            assert all(micro[0].shape[0] <= 2 for micro in part)
        assert all(stream.position == (b + 1) * batch for stream in streams)
        assert streams[0].epoch == pytest.approx((b + 1) * batch / total)


def test_every_target_once_an_epoch(tmp_path):
    stream = stream_of(tmp_path, [range(17), range(17, 50), range(50, 64)])
    for _ in range(3):
        targets = torch.cat([y for _ in range(4) for _, y, _ in stream.next()])
        assert sorted(targets.flatten().tolist()) == list(range(64))


def test_the_position_is_the_whole_state(tmp_path):
    first, second = (stream_of(tmp_path, [range(37), range(37, 90)]) for _ in range(2))
    for _ in range(11):
        first.next()
    second.position = first.position
    for _ in range(5):
        assert all(torch.equal(a, b) for one, two in zip(first.next(), second.next()) for a, b in zip(one[:2], two[:2]))


def test_synthetic_batches_have_the_layout_of_real_ones(tmp_path):
    stream = stream_of(tmp_path, [range(500)], train_seq_len=8, train_batch_tokens=48, micro_batch_tokens=16)
    position = stream.position
    real, false = stream.next(), stream.synthetic(torch.Generator().manual_seed(0))
    assert stream.position == position + 48  # of the real one alone
    for (x, y, docs), (u, v, their) in zip(real, false, strict=True):
        assert docs is None and their is None
        for a, b in ((x, u), (y, v)):
            assert (a.shape, a.stride(), a.dtype, a.storage_offset()) == (b.shape, b.stride(), b.dtype,
                                                                          b.storage_offset())
        assert u.min() >= 0 and u.max() < 1000 and torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(u[:, 1:], v[:, :-1])


def test_batches_that_ranks_cannot_share_are_refused(tmp_path):
    with pytest.raises(tg.BadInput, match="TRAIN_BATCH_TOKENS=16.*4 sequences.*3 ranks"):
        stream_of(tmp_path, [range(100)], rank_of(0, 3))
    with pytest.raises(tg.BadInput, match="fewer than 2 tokens"):
        stream_of(tmp_path, [[5]])


@pytest.mark.parametrize("micro, rows", [(4, 1), (11, 2), (12, 3), (16, 4), (23, 4), (24, 6), (44, 6), (48, 12),
                                         (1000, 12)])
def test_micro_batches_are_as_large_as_the_limit_and_equal_parts_allow(tmp_path, micro, rows):
    stream = stream_of(tmp_path, [range(200)], train_batch_tokens=48, micro_batch_tokens=micro)  # 12 sequences of 4
    assert [len(x) for x, *_ in stream.next()] == [rows] * (12 // rows)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_the_toy_tokenizer_loads_with_its_hash(toy):
    s = tg.Settings.parse(toy)
    sp, path, sha256 = tg.load_tokenizer(s)
    assert sp.vocab_size() == s.vocab_size == 512 and path.name == "tokenizer.model"
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    named, _, _ = tg.load_tokenizer(tg.Settings.parse([*toy, "DATA_PATH=elsewhere", f"TOKENIZER_PATH={path}"]))
    assert named.vocab_size() == 512


def test_the_contests_place_for_a_tokenizer_is_found(toy, tmp_path):
    _, path, _ = tg.load_tokenizer(tg.Settings.parse(toy))
    folder = tmp_path / "datasets" / "fineweb10B_sp512"
    folder.mkdir(parents=True)
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_512_bpe.model").write_bytes(path.read_bytes())
    assert tg.load_tokenizer(tg.Settings.parse([*toy, f"DATA_PATH={folder}"]))[1].name == "fineweb_512_bpe.model"


def test_tokenizer_errors_name_the_path_and_both_sizes(toy, tmp_path):
    s = tg.Settings.parse([*toy, "VOCAB_SIZE=600"])
    with pytest.raises(tg.BadInput, match=r"tokenizer\.model has 512 pieces but VOCAB_SIZE=600"):
        tg.load_tokenizer(s)
    with pytest.raises(tg.BadInput, match=rf"no tokenizer at {re.escape(str(tmp_path))}"):
        tg.load_tokenizer(tg.Settings.parse([*toy, f"DATA_PATH={tmp_path}"]))
    with pytest.raises(tg.BadInput, match="no tokenizer at .*missing.model"):
        tg.load_tokenizer(tg.Settings.parse([*toy, f"TOKENIZER_PATH={tmp_path / 'missing.model'}"]))
    for junk in (b"not a model", b"", b"\x0a\xff\xff"):
        (tmp_path / "junk.model").write_bytes(junk)
        with pytest.raises(tg.BadInput, match=r"junk\.model") as error:
            tg.load_tokenizer(tg.Settings.parse([*toy, f"TOKENIZER_PATH={tmp_path / 'junk.model'}"]))
        assert "\n" not in str(error.value)


def make_tokenizer(path, texts, **options):
    """A SentencePiece model with the contest's options, but for these; written to `path`."""
    import sentencepiece

    contest = dict(model_type="bpe", vocab_size=420, byte_fallback=True, add_dummy_prefix=False,
                   pad_id=0, bos_id=1, eos_id=2, unk_id=3)
    more = dict(hard_vocab_limit=False, minloglevel=2, num_threads=1)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, **more, **{**contest, **options})
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def write_data(folder, sp, documents):
    """Shards of the documents beside the tokenizer of the folder: a fourth of them is validation."""
    cut = len(documents) // 4
    for split, part in (("val", documents[:cut]), ("train", documents[cut:])):
        ids = [token for text in part for token in (ref.BOS, *sp.encode(text))]
        write_shard(folder / f"fineweb_{split}_000000.bin", ids)
    return [f"DATA_PATH={folder}", f"VOCAB_SIZE={sp.vocab_size()}"]


# Where SentencePiece sees no space, it makes no piece for it.
LETTERS_ALONE = [text.replace(" ", "") for text in toy_documents(40)]
MISCOUNTING = dict(  # {make: (options, what both commands say)}
    letters=(dict(model_type="char"), "no piece for a single space"),
    words=(dict(model_type="word", vocab_size=900), "no piece for a single space"),
    words_and_a_space=(dict(model_type="word", vocab_size=900, user_defined_symbols=["\u2581"]), "use a BPE"),
    suffix=(dict(treat_whitespace_as_suffix=True), "a space inside the piece"),
    no_bytes=(dict(byte_fallback=False, vocab_size=160), "0 byte pieces instead of 256"),
    other_ids=(dict(bos_id=2, eos_id=1), "train it with bos_id=1"))


@pytest.mark.parametrize("make", MISCOUNTING)
def test_a_tokenizer_that_would_miscount_is_refused_by_trainer_and_check(toy, tmp_path, capsys, make):
    options, said = MISCOUNTING[make]
    documents = toy_documents(40)
    texts = LETTERS_ALONE if make == "letters" else documents
    sp = make_tokenizer(tmp_path / "tokenizer.model", texts, **options)
    data = write_data(tmp_path, sp, documents)
    refused(call(command(toy, tmp_path / "run", *data)), 2, tmp_path / "tokenizer.model", said)
    assert not (tmp_path / "run").exists()
    assert prepare.main(["--check", str(tmp_path), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAILED  tokenizer: ") and said in line for line in lines), lines
    source = tmp_path / "in.txt"
    source.write_text("\f".join(documents))
    words = ["--source", source, "--tokenizer", tmp_path / "tokenizer.model", "--out", tmp_path / "new"]
    assert prepare.main([*map(str, words), "--workers", "1"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_tokenizer_that_counts_right_is_usable_however_it_was_made(toy, tmp_path):
    """With a dummy prefix, unigram, of characters, with SentencePiece's own ids, with plain spaces."""
    import sentencepiece

    documents = toy_documents(40)
    makes = dict(prefix=dict(add_dummy_prefix=True), unigram=dict(model_type="unigram"),
                 chars=dict(model_type="char"), identity=dict(normalization_rule_name="identity"),
                 own_ids=dict(pad_id=-1, unk_id=0))
    for name, options in makes.items():
        sp = make_tokenizer(tmp_path / name, documents, **options)
        assert tg.tokenizer_fault(sp) == "", name
        tables = tg.byte_tables(sp, sp.vocab_size())
        for text in (*documents, "zq\U0001f9ff \U0001f9ff  xj "):
            ids = [ref.BOS, *sp.encode(text)]
            assert tg.target_bytes(ids, tables).sum() == len(re.sub(" +", " ", text).strip().encode()), name
    # A space that is not escaped (normalizer_spec.escape_whitespaces) needs no piece: it is the byte 0x20.
    letters = make_tokenizer(tmp_path / "letters", LETTERS_ALONE, model_type="char").serialized_model_proto()
    assert tg.tokenizer_fault(sentencepiece.SentencePieceProcessor(model_proto=letters))
    plain = sentencepiece.SentencePieceProcessor(model_proto=letters + b"\x1a\x02\x28\x00")
    assert tg.tokenizer_fault(plain) == ""
    tables = tg.byte_tables(plain, plain.vocab_size())
    assert tg.target_bytes([ref.BOS, *plain.encode("ta ko")], tables).sum() == 5


def test_a_score_says_where_its_bytes_are_those_of_another_text(toy, tmp_path):
    """Case folding and a user's own rules change the text more than the contest's normalisations do."""
    documents = [text.title() for text in toy_documents(90)]
    (tmp_path / "rules.tsv").write_text("54 68 65\t74\n")  # The -> t: no single character shows it
    makes = dict(contest={}, folded=dict(normalization_rule_name="nmt_nfkc_cf"),
                 rules=dict(normalization_rule_tsv=str(tmp_path / "rules.tsv")))
    for make, options in makes.items():
        (tmp_path / make).mkdir()
        sp = make_tokenizer(tmp_path / make / "tokenizer.model", documents, **options)
        data = write_data(tmp_path / make, sp, documents)
        run = good(call(command(toy, tmp_path / make / "run", *data, "ITERATIONS=1")))
        notes = [row["note"] for row in events(tmp_path / make / "run", "warning") if "tokenizer" in row]
        reasons = [reason for reason in summary(run)["eligible_reasons"] if "normalised" in reason]
        assert notes == reasons and len(notes) == (make != "contest")
        if notes:
            assert "bytes are those of the normalised text" in notes[0]
            said = {"folded": "'nmt_nfkc_cf' changes it (it writes 'a' for 'A')", "rules": "'user_defined'"}
            assert said[make] in notes[0]


def test_a_tokenizer_of_other_shards_is_refused_or_said(toy, tmp_path):
    """The manifest knows the tokenizer; without one, documents that get other tokens the second time do."""
    sp = make_tokenizer(tmp_path / "tokenizer.model", toy_documents(40, seed=3), vocab_size=420)
    make_tokenizer(tmp_path / "other.model", toy_documents(40, seed=4), vocab_size=420)
    data = write_data(tmp_path, sp, toy_documents(60))
    digest = hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
    for model, doubts in (("tokenizer", 0), ("other", 1)):
        data[2:] = [f"TOKENIZER_PATH={tmp_path}/{model}.model", "ITERATIONS=1"]
        run = good(call(command(toy, tmp_path / model, *data)))
        warnings = [row["note"] for row in events(tmp_path / model, "warning")]
        notes = [note for note in warnings if "another tokenizer" in note]
        reasons = [reason for reason in summary(run)["eligible_reasons"] if "another tokenizer" in reason]
        assert len(notes) == doubts and notes == reasons
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": {"sha256": digest}}))
    done = call(command(toy, tmp_path / "no", *data))
    refused(done, 2, f"{tmp_path}/other.model", digest[:12], "TOKENIZER_PATH")


# --- bytes per token -------------------------------------------------------------------------------------------------

SPECIAL = "été 世界 ﬁ ½ … \U0001f600 tab\tnl\n  spaces  \u00a0\u200b ▁literal е́ é Ａ０１"


@pytest.fixture(scope="module", params=["contest", "unigram", "prefix", "no_fallback", "unused"])
def sp(request, tmp_path_factory):
    """Tokenizers of several makes: the contest's options, a unigram model, with a dummy prefix, without byte pieces."""
    import sentencepiece

    options = dict(model_type="bpe", vocab_size=420, byte_fallback=True, add_dummy_prefix=False,
                   character_coverage=0.999, split_digits=True)
    options |= {"contest": {}, "unigram": dict(model_type="unigram", normalization_rule_name="identity"),
                "prefix": dict(add_dummy_prefix=True, user_defined_symbols=["<tag>", "▁<both>"],
                               control_symbols=["<ctl>"]),
                "no_fallback": dict(byte_fallback=False, vocab_size=160),
                "unused": dict(user_defined_symbols=["<idle>", "<spare>"])}[request.param]
    prefix = tmp_path_factory.mktemp("sp") / request.param
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([*toy_documents(40), SPECIAL]),
                                             model_prefix=str(prefix), pad_id=0, bos_id=1, eos_id=2,
                                             unk_id=3, hard_vocab_limit=False, minloglevel=2, num_threads=1, **options)
    proto = prefix.with_suffix(".model").read_bytes()
    if request.param == "unused":  # a piece's type is field 3 of its message: 4 user-defined, 5 unused
        proto, count = re.subn(rb"(<(?:idle|spare)>\x15.{4}\x18)\x04", lambda found: found[1] + b"\x05", proto,
                               flags=re.DOTALL)
        assert count == 2
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def slow_bytes(sp, ids):
    """The rule, target by target, on strings."""
    out = []
    for before, token in zip(ids, ids[1:]):
        piece, special = sp.id_to_piece(int(token)), lambda i: sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)
        if special(int(token)):
            out.append(0)
        elif sp.is_byte(int(token)):
            out.append(1)
        elif piece.startswith("▁"):
            out.append(len(piece[1:].encode("utf-8")) + (0 if special(int(before)) else 1))
        else:
            out.append(len(piece.encode("utf-8")))
    return out


def test_byte_tables_follow_the_rule_for_every_piece(sp):
    base, lead, edge = tg.byte_tables(sp, sp.vocab_size() + 7)
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        if i < 4:
            assert (base[i], lead[i], edge[i]) == (0, False, True), piece
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece):
            assert (base[i], lead[i], edge[i]) == (1, False, False), piece
        elif piece in ("<ctl>", "<idle>", "<spare>"):
            assert (base[i], lead[i], edge[i]) == (0, False, True)
        else:
            length = len(piece.removeprefix("▁").encode())
            assert (base[i], lead[i], edge[i]) == (length, piece.startswith("▁"), False), piece
    assert not base[-7:].any() and not lead[-7:].any() and edge[-7:].all()  # ids beyond the model
    assert {len(t) for t in tg.byte_tables(sp, 50)} == {50}


@ref.tries(300)
@given(st.lists(st.text(st.one_of(st.sampled_from(SPECIAL + "ptkbd gmnrls aeiou,. "),
                                  st.characters(exclude_categories=["Cs"])), max_size=40), max_size=4))
def test_counted_bytes_are_those_of_the_decoded_text(sp, texts):
    """The contest's proof of the denominator, document by document, and for the whole stream of several."""
    tables, stream = tg.byte_tables(sp, sp.vocab_size()), []
    for text in texts:
        ids = sp.encode(text)
        counted = tg.target_bytes([ref.BOS, *ids], tables)
        assert counted.tolist() == slow_bytes(sp, [ref.BOS, *ids])
        if sp.unk_id() not in ids:
            assert counted.sum() == len(sp.decode(ids).encode("utf-8"))
        stream += [ref.BOS, *ids]
    if stream:
        assert tg.target_bytes(np.array(stream, np.uint16), tables).tolist() == slow_bytes(sp, stream)


@ref.tries(100)
@given(st.data())
def test_counted_bytes_follow_the_rule_on_any_ids(sp, data):
    ids = data.draw(st.lists(st.integers(0, sp.vocab_size() - 1), min_size=1, max_size=60))
    assert tg.target_bytes(ids, tg.byte_tables(sp, sp.vocab_size())).tolist() == slow_bytes(sp, ids)


class Table(tg.Predictor):
    """A random distribution behind each token."""

    def __init__(self, vocab):
        self.logs = torch.from_numpy(np.random.default_rng(0).standard_normal((vocab, vocab))).log_softmax(-1)

    def predict(self, inputs, count=None):
        return self.logs[inputs.ids.gather(1, inputs.places)][:, :count]


ANYTHING = st.text(st.one_of(st.sampled_from(SPECIAL + "\0\x07\x1b\x85ptkbd gmnrls aeiou,. "),
                             st.characters(exclude_categories=["Cs"])), max_size=60)


@ref.tries(30)
@given(st.lists(ANYTHING, min_size=1, max_size=6), st.sampled_from([0, 3, 8]), st.booleans(),
       st.sampled_from(["window", "cache"]))
def test_bits_per_byte_are_those_of_the_decoded_documents_however_they_are_read(sp, texts, stride, docs, context):
    """From shards to score(): the logarithms of all tokens over the length of the text, each document decoded alone."""
    documents = [ids for ids in map(sp.encode, [*texts, "ta ko, mi"]) if sp.unk_id() not in ids]
    ids, vocab = [token for document in documents for token in (ref.BOS, *document)], sp.vocab_size()
    if len(ids) < 9:
        return
    s = ref.small(vocab_size=vocab, eval_seq_len=8, train_seq_len=8, eval_stride=stride, eval_docs=docs,
                  eval_context=context)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "fineweb_val_000000.bin", ids[:7])
        write_shard(Path(folder) / "fineweb_val_000001.bin", ids[7:])
        stream = tg.load_validation(tg.replace(s, data_path=folder), ref.alone(), sp)
    validity, predictor = tg.Validity(), Table(vocab)
    result = tg.score(predictor, tg.Reader(stream, s, ref.alone()), stream, ref.alone(), validity)
    nats = -predictor.logs[ids[:-1], ids[1:]].sum().item()
    size = sum(len(sp.decode(document).encode()) for document in documents)
    assert validity.reasons == [] and (result.tokens, result.bytes) == (len(ids) - 1, size)
    assert result.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-12)
    assert result.bpb == pytest.approx(nats / math.log(2) / max(size, 1), rel=1e-12)


# --- the validation stream -------------------------------------------------------------------------------------------


def test_the_validation_stream_is_every_shard_in_order_with_the_tail(toy, tmp_path):
    s = tg.Settings.parse(toy)
    sp, path, _ = tg.load_tokenizer(s)
    ids = [token for text in toy_documents(7, seed=3) for token in (ref.BOS, *sp.encode(text))]
    for i, (a, b) in enumerate(((0, 100), (100, 101), (101, len(ids)))):
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", ids[a:b])
    args = [*toy, f"DATA_PATH={tmp_path}", f"TOKENIZER_PATH={path}"]
    val = tg.load_validation(tg.Settings.parse(args), ref.alone(), sp)
    assert val.tokens.tolist() == ids and val.bytes.tolist() == slow_bytes(sp, ids) and val.whole
    for n, whole in ((100, False), (len(ids) - 2, False), (len(ids) - 1, True), (10**9, True)):
        cut = tg.load_validation(tg.Settings.parse([*args, f"VAL_TOKENS={n}"]), ref.alone(), sp)
        assert len(cut.bytes) == min(n, len(ids) - 1) == len(cut.tokens) - 1 and cut.whole == whole
        assert cut.bytes.tolist() == val.bytes[: len(cut.bytes)].tolist()
        assert cut.tokens.tolist() == ids[: len(cut.tokens)]
    with pytest.raises(tg.BadInput, match=rf"{len(ids) - 1} targets.*EVAL_SEQ_LEN={len(ids)}"):
        tg.load_validation(tg.Settings.parse([*args, f"EVAL_SEQ_LEN={len(ids)}"]), ref.alone(), sp)
    with pytest.raises(tg.BadInput, match="63 targets.*EVAL_SEQ_LEN=64"):
        tg.load_validation(tg.Settings.parse([*args, "VAL_TOKENS=63"]), ref.alone(), sp)
    write_shard(tmp_path / "fineweb_val_000003.bin", [600])
    with pytest.raises(tg.BadInput, match=r"fineweb_val_000003\.bin: token 600 at offset 1024"):
        tg.load_validation(tg.Settings.parse(args), ref.alone(), sp)


def check_bytes(toy, folder, manifest, whole=True):
    """The validity reasons of the toy's validation stream beside a manifest."""
    s = tg.Settings.parse(toy)
    sp, path, _ = tg.load_tokenizer(s)
    val = tg.load_validation(s, ref.alone(), sp)
    (folder / "manifest.json").write_bytes(manifest)
    run = SimpleNamespace(s=tg.Settings.parse([*toy, f"DATA_PATH={folder}"]), validity=tg.Validity(),
                          rt=ref.alone(), facts={}, log=lambda *_, **__: None)
    tg._check_bytes(run, sp, val._replace(whole=whole))
    return run.validity.reasons


MANIFESTS = dict(empty=b"", no_splits=b"{}", a_list=b"[]", a_number=b'{"splits": 3}', not_text=b"\xff",
                 words=b'{"splits": {"val": {"tokens": "x", "bytes": 1}}}',
                 infinite=b'{"splits": {"val": {"tokens": 1e999, "bytes": 1}}}',
                 deep=b"[" * 100_000)


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_broken_manifest_is_named(toy, tmp_path, content):
    with pytest.raises(tg.BadInput, match=r"manifest\.json"):
        check_bytes(toy, tmp_path, content)


def test_a_manifest_that_disagrees_makes_the_score_invalid(toy, tmp_path):
    s = tg.Settings.parse(toy)
    sp, *_ = tg.load_tokenizer(s)
    val = tg.load_validation(s, ref.alone(), sp)
    tokens, nbytes = len(val.tokens), int(val.bytes.sum())
    for more_tokens, more_bytes, whole, ok in ((0, 0, True, True), (0, 1, True, False), (1, 0, True, False),
                                               (0, 1, False, True)):
        manifest = json.dumps({"splits": {"val": {"tokens": tokens + more_tokens,
                                                  "bytes": nbytes + more_bytes}}}).encode()
        assert (check_bytes(toy, tmp_path, manifest, whole) == []) == ok
