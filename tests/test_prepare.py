"""data/prepare.py: text -> tokenizer -> shards with proofs. Most cases run the real command line in this process."""

import gzip
import json
import os
import random
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import builtin_text
import fineweb
import prepare
import processes
import proof
import shards
import sources
import tokenizer
from common import sha256

REPO = Path(__file__).resolve().parent.parent
SCRIPT = REPO / "data" / "prepare.py"
V = 400


def make_documents(count, seed=1, words=70):
    rng = random.Random(seed)
    known = ["".join(rng.choice("ptkbdgmnrls") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))) for _ in range(400)]
    ends = ["", "", "", ",", ".", "\n", " 42", " caf\u00e9", " \u4e16\u754c"]
    return [f"{number} " + " ".join(rng.choice(known) + rng.choice(ends) for _ in range(words)) for number in range(count)]


DOCUMENTS = make_documents(120)


def write_jsonl(path, documents, **more):
    path.write_text("".join(json.dumps({"text": d, **more}) + "\n" for d in documents), encoding="utf-8")
    return path


def run(*args, **options):
    """The exit code of the command line, run in this process."""
    return prepare.main([str(a) for a in (*args, *(["--workers", 1] if "--workers" not in args else []))], **options)


def command(*args, **options):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, timeout=120, **options)


def read_tokens(path):
    """Tokens of a shard by an independent reader of the format."""
    raw = path.read_bytes()
    words = struct.unpack("<256i", raw[:1024])
    assert words[:2] == (20240520, 1) and not any(words[3:]) and len(raw) == 1024 + 2 * words[2]
    return list(struct.unpack(f"<{words[2]}H", raw[1024:]))


def write_tokens(path, tokens):
    path.write_bytes(struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}H", *tokens))


def texts_in(folder, split):
    """The documents of a split, decoded, over all its shards."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    stream = [t for path in sorted(folder.glob(f"fineweb_{split}_??????.bin")) for t in read_tokens(path)]
    edges = [i for i, t in enumerate(stream) if t == 1] + [len(stream)]
    return [sp.decode(stream[a + 1:b]) for a, b in zip(edges, edges[1:])]


def normal(text):
    return re.sub(r"\s+", " ", text).strip()


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A finished data set with several shards, the input it came from, and its arguments."""
    folder = tmp_path_factory.mktemp("prepared")
    source = write_jsonl(folder / "in.jsonl", DOCUMENTS)
    args = ["--source", source, "--out", folder / "out", "--vocab-size", V, "--val-docs", 7, "--shard-tokens", 3000]
    assert run(*args) == 0
    return folder / "out", source, args


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the finished data set, to be damaged."""
    for name, content in files_of(base[0]).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


# ---- what is written --------------------------------------------------------------------------------------------------


def test_shards_are_byte_for_byte_the_contests_format(base):
    out, *_ = base
    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    written = {}
    for split, documents in (("val", DOCUMENTS[:7]), ("train", DOCUMENTS[7:])):
        stream = [t for d in documents for t in (1, *sp.encode(d))]
        for number, begin in enumerate(range(0, len(stream), 3000)):
            part = stream[begin:begin + 3000]
            header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
            written[f"fineweb_{split}_{number:06d}.bin"] = header + struct.pack(f"<{len(part)}H", *part)
    assert len(written) > 4, "documents should straddle shards"
    assert {name: raw for name, raw in files_of(out).items() if name.endswith(".bin")} == written
    assert set(files_of(out)) == {*written, "tokenizer.model", "manifest.json"}, "nothing else may be left behind"


def test_manifest_states_totals_hashes_and_origin(base):
    out, *_ = base
    manifest = json.loads((out / "manifest.json").read_text())
    sp = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    for split, documents in (("val", DOCUMENTS[:7]), ("train", DOCUMENTS[7:])):
        assert manifest["splits"][split] == {
            "documents": len(documents), "tokens": sum(1 + len(sp.encode(d)) for d in documents),
            "bytes": sum(len(sp.normalize(d).replace("\u2581", " ").encode()) for d in documents)}
    for row in manifest["shards"]:
        assert row["tokens"] == len(read_tokens(out / row["name"])) and row["sha256"] == sha256(out / row["name"])
    assert manifest["vocab_size"] == V and manifest["tool"] == shards.TOOL and manifest["train_docs_dropped"] == 0
    assert manifest["tokenizer"]["sha256"] == sha256(out / "tokenizer.model")
    assert manifest["job"]["source"]["first"] == "in.jsonl" and all("found" in row for row in manifest["proof"])


def test_tokenizer_has_the_contests_properties(base):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(base[0] / "tokenizer.model"))
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), sp.vocab_size()) == (0, 1, 2, 3, V)
    assert sum(sp.is_byte(i) for i in range(V)) == 256 and sp.encode("a  b\u00a0\ufb01") == sp.encode("a b fi")
    assert [sp.id_to_piece(i) for i in sp.encode("12")[-2:]] == ["1", "2"], "digits stay apart"


@pytest.mark.parametrize("split", ["--val-docs", "--val-fraction"])
def test_tokenizer_learns_from_training_documents_only(split, tmp_path):
    # The letters of validation would become pieces if it were seen: the greek text is in validation documents only.
    greek = "\u03b1\u03b2\u03b3\u03b4\u03b5 \u03b6\u03b7\u03b8\u03b9 " * 300
    greek = next(text for n in range(99) if sources.hashes(text := f"{greek} {n}")[0] < sources.HASHES // 10)
    source = write_jsonl(tmp_path / "in.jsonl", [greek, *DOCUMENTS, greek])
    args = [split, 1 if split == "--val-docs" else 0.1]
    assert run("--source", source, "--out", tmp_path / "out", "--vocab-size", V, *args) == 0
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert not any("\u03b1" in sp.id_to_piece(i) for i in range(V))
    dropped = json.loads((tmp_path / "out" / "manifest.json").read_text())["train_docs_dropped"]
    assert dropped == (split == "--val-docs"), "by hash both copies are in validation"


def test_tokenizer_sample_is_bounded_and_does_not_depend_on_the_order(tmp_path, capsys):
    models = []
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        source = write_jsonl(tmp_path / "in.jsonl", documents)
        out = tmp_path / f"out{len(models)}"
        assert run("--source", source, "--out", out, "--vocab-size", V, "--tokenizer-sample-mb", 0.03) == 0
        size = int(re.search(r"tokenizer documents:\d+ bytes:(\d+)", capsys.readouterr().out).group(1))
        assert 25_000 < size <= 30_000
        models.append((out / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


def test_output_does_not_depend_on_the_number_of_workers(base, tmp_path):
    _, source, args = base
    done = command(*[tmp_path / "two" if a == base[0] else a for a in args], "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "two") == files_of(base[0])


def test_split_by_hash_does_not_depend_on_the_order(tmp_path):
    found = []
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", documents)
        assert run("--source", source, "--out", tmp_path / name, "--vocab-size", V, "--val-fraction", 0.2) == 0
        found.append((texts_in(tmp_path / name, "val"), texts_in(tmp_path / name, "train")))
        assert sorted(found[-1][0] + found[-1][1]) == sorted(map(normal, DOCUMENTS))
    assert sorted(found[0][0]) == sorted(found[1][0]) and 10 < len(found[0][0]) < 40
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()


def test_a_given_tokenizer_is_copied_and_decides_the_vocabulary(base, tmp_path):
    model = base[0] / "tokenizer.model"
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS[:30])
    assert run("--source", source, "--out", tmp_path / "out", "--tokenizer", model, "--val-docs", 3, "--max-docs", 20) == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert texts_in(tmp_path / "out", "train") == [normal(d) for d in DOCUMENTS[3:20]]


# ---- sources ----------------------------------------------------------------------------------------------------------


def _source_folder(tmp):
    (tmp / "deep").mkdir()
    write_jsonl(tmp / "a.jsonl", DOCUMENTS[:10])
    (tmp / "b.txt").write_text(DOCUMENTS[10])
    (tmp / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"\f".join(d.encode() for d in DOCUMENTS[11:40])))
    (tmp / "notes.md").write_text("not read")
    return [tmp]


def _zst_of_two_frames(tmp):
    lines = [json.dumps({"body": d}).encode() + b"\n" for d in DOCUMENTS[:40]]
    packed = [zstandard.ZstdCompressor().compress(b"".join(part)) for part in (lines[:25], lines[25:])]
    (tmp / "a.jsonl.zst").write_bytes(b"".join(packed))
    return [tmp / "a.jsonl.zst", "--text-key", "body"]


def _text_files(tmp):
    (tmp / "a.txt").write_text("\f".join(DOCUMENTS[:20]))
    (tmp / "b.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(
        "\ufeff".encode() + "\n<|endoftext|>\n".join(DOCUMENTS[20:40]).encode() + b"<|endoftext|>\n \n"))
    return [tmp / "a.txt", tmp / "b.txt.zst"]


def _gz_with_blank_lines(tmp):
    lines = "\r\n\r\n".join(json.dumps({"text": d}, ensure_ascii=False) for d in DOCUMENTS[:40])
    (tmp / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines.encode() + b'\n{"text": " \\n"}'))
    return [tmp / "a.jsonl.gz"]


@pytest.mark.parametrize("make", [_source_folder, _zst_of_two_frames, _text_files, _gz_with_blank_lines])
def test_every_kind_of_source_gives_the_same_documents(make, base, tmp_path):
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    out = tmp_path / "out"
    assert run("--source", *source, "--out", out, "--tokenizer", base[0] / "tokenizer.model", "--val-docs", 4) == 0
    assert texts_in(out, "val") + texts_in(out, "train") == [normal(d) for d in DOCUMENTS[:40]]
    assert json.loads((out / "manifest.json").read_text())["empty_docs_skipped"] == (make is _gz_with_blank_lines)


def _padded_gzip(folder):
    lines = [json.dumps({"text": d}).encode() + b"\n" for d in DOCUMENTS[:40]]
    parts = [gzip.compress(b"".join(part)) for part in (lines[:25], lines[25:])]
    (folder / "a.jsonl.gz").write_bytes(bytes(100_000).join([*parts, b""]))  # more zeros than one read


def _linked_folders(folder):
    """A folder elsewhere that is linked twice and links back, a link to a file, a fork, a dead link."""
    other = folder.parent / "other"
    other.mkdir()
    write_jsonl(folder / "a.jsonl", DOCUMENTS[:20])
    write_jsonl(other / "b.jsonl", DOCUMENTS[20:40])
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / "linked").symlink_to(other)
    (folder / "linked_too").symlink_to(other)
    (other / "back").symlink_to(folder)
    (folder / "._a.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / "gone.jsonl").symlink_to("nothing.jsonl")


@pytest.mark.parametrize("make", [_padded_gzip, _linked_folders])
def test_every_document_of_an_odd_source_is_read_once(make, base, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    out = tmp_path / "out"
    model = base[0] / "tokenizer.model"
    assert run("--source", folder, "--out", out, "--tokenizer", model, "--val-docs", 4) == 0
    assert texts_in(out, "val") + texts_in(out, "train") == [normal(d) for d in DOCUMENTS[:40]]
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped ")]
    if make is _linked_folders:
        assert skipped == [f"skipped file:{folder}/._a.jsonl reason:resource_fork_of_macOS",
                           f"skipped file:{folder}/gone.jsonl reason:link_to_nothing"]
    else:
        assert skipped == []


def test_a_long_text_is_cut_at_paragraphs(base, tmp_path):
    paragraphs = make_documents(900, seed=3)
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    out = tmp_path / "out"
    assert run("--source", tmp_path / "a.txt", "--out", out, "--tokenizer", base[0] / "tokenizer.model", "--val-docs", 1) == 0
    found = texts_in(out, "val") + texts_in(out, "train")
    assert len(found) > 4 and all(len(t.encode()) <= 100_000 for t in found)
    assert " ".join(found) == normal(" ".join(paragraphs))
    assert all(any(t.startswith(normal(p)) for p in paragraphs) for t in found), "every part begins with a paragraph"


def test_text_without_any_break_is_cut_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("\u4e16" * 120_000)
    parts = [raw.decode() for _, raw, _ in sources.documents([tmp_path / "a.txt"], sources.START)]
    assert "".join(parts) == "\u4e16" * 120_000 and all(len(p.encode()) <= 100_000 for p in parts)


# ---- errors -----------------------------------------------------------------------------------------------------------


def _bytes_file(name, content):
    def make(tmp):
        (tmp / name).write_bytes(content)
        return ["--source", tmp / name]
    return make


GOOD = b"".join(json.dumps({"text": d}).encode() + b"\n" for d in DOCUMENTS[:30])
PACKED = zstandard.ZstdCompressor(write_checksum=True).compress(GOOD)
GZIPPED, DEEP = gzip.compress(GOOD), b"[" * 100_000
ERRORS = {
    "no such path": (lambda tmp: ["--source", tmp / "none.txt"], ["none.txt", "no such file"]),
    "empty folder": (lambda tmp: ["--source", tmp], ["no .txt or .jsonl"]),
    "unknown kind": (_bytes_file("a.csv", b"x"), ["a.csv", ".jsonl"]),
    "no documents": (_bytes_file("a.jsonl", b"\n\n"), ["too few documents"]),
    "one document": (_bytes_file("a.txt", DOCUMENTS[0].encode()), ["too few documents", "--val-docs"]),
    "bad JSON": (_bytes_file("a.jsonl", GOOD + b'{"text": \n'), ["a.jsonl:31", "not JSON"]),
    "no text key": (_bytes_file("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n'), ["a.jsonl:31", "'text'", "body, id", "--text-key"]),
    "not an object": (_bytes_file("a.jsonl", b"[1]\n"), ["a.jsonl:1", "list"]),
    "null for a text": (_bytes_file("a.jsonl", GOOD + b'{"text": null}\n'), ["a.jsonl:31", "'text' is null"]),
    "a list": (_bytes_file("a.jsonl", GOOD + b'{"text": [1]}\n'), ["a.jsonl:31", "'text' is a list"]),
    "nested too deeply": (_bytes_file("a.jsonl", GOOD + DEEP + b"\n"), ["a.jsonl:31", "nested too deeply"]),
    "deep in a field": (_bytes_file("a.jsonl", GOOD + b'{"x": ' + DEEP), ["a.jsonl:31", "nested too deeply"]),
    "zeros before gzip": (_bytes_file("a.jsonl.gz", bytes(9) + GZIPPED), ["a.jsonl.gz", "corrupt"]),
    "text behind gzip": (_bytes_file("a.jsonl.gz", GZIPPED + b"\0 text"), ["a.jsonl.gz", "corrupt"]),
    "zeros behind zstd": (_bytes_file("a.jsonl.zst", PACKED + bytes(9)), ["a.jsonl.zst", "corrupt"]),
    "not UTF-8": (_bytes_file("a.txt", DOCUMENTS[0].encode() + b"\xff\xfe"), [f"byte {len(DOCUMENTS[0].encode()):,}", "0xff", "UTF-8"]),
    "half a surrogate": (_bytes_file("a.jsonl", GOOD + b'{"text": "ab\\ud800"}\n'), ["a.jsonl:31", "surrogate"]),
    "cut zstd": (_bytes_file("a.jsonl.zst", PACKED[:-200]), ["a.jsonl.zst", "ends in the middle"]),
    "corrupt zstd": (_bytes_file("a.jsonl.zst", PACKED[:-3] + b"abc"), ["a.jsonl.zst", "corrupt"]),
    "cut gzip": (_bytes_file("a.jsonl.gz", gzip.compress(GOOD)[:-100]), ["a.jsonl.gz", "ends in the middle"]),
    "vocabulary too large": (lambda tmp: [*_bytes_file("a.jsonl", GOOD)(tmp), "--vocab-size", 70000], ["70000", "65536"]),
    "vocabulary too small": (lambda tmp: [*_bytes_file("a.jsonl", GOOD)(tmp), "--vocab-size", 270], ["270", "need at least"]),
    "text too short": (lambda tmp: [*_bytes_file("a.txt", b"a b\fb c\fc d")(tmp), "--val-docs", 1], ["must agree", "more text"]),
    "all in validation": (lambda tmp: [*_bytes_file("a.jsonl", GOOD)(tmp), "--val-docs", 30], ["too few documents for training"]),
    "no spaces": (_bytes_file("a.txt", b"\f".join(d.replace(" ", "").encode() for d in DOCUMENTS)), ["single space"]),
    "not a tokenizer": (lambda tmp: [*_bytes_file("a.jsonl", GOOD)(tmp), "--tokenizer", tmp / "a.jsonl"], ["not a SentencePiece"]),
    "mixed with builtin": (lambda tmp: ["--source", "builtin", tmp], ["stands alone"]),
    "negative number": (lambda tmp: [*_bytes_file("a.jsonl", GOOD)(tmp), "--shard-tokens", -5], ["--shard-tokens: '-5'", "at least 1"]),
    "a word for a number": (lambda tmp: ["--source", tmp, "--val-docs", "few"], ["--val-docs: 'few'", "whole number"]),
    "a word for a share": (lambda tmp: ["--source", tmp, "--val-fraction", "half"], ["--val-fraction: 'half'", "above 0"]),
    "all for a share": (lambda tmp: [*_bytes_file("a.jsonl", GOOD)(tmp), "--val-fraction", 1], ["between 0 and 1"]),
    "no text at all": (lambda tmp: [], ["--source", "--help"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, capsys):
    make, words = ERRORS[case]
    (tmp_path / "in").mkdir()
    out = tmp_path / "out"
    args = make(tmp_path / "in")
    assert run(*args, "--out", out, *([] if "--vocab-size" in args else ["--vocab-size", 350])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not out.exists()


def test_an_output_that_is_a_file_is_named_and_stays(base, tmp_path, capsys):
    file = tmp_path / "precious.txt"
    file.write_text("mine")
    for out, more in ((file, []), (file / "deeper", []), (file, ["--restart"])):
        assert run("--source", base[1], "--out", out, *more) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --out {out}: {file} is not a folder") and error.count("\n") == 1
        assert fineweb.main(["--out", str(out)]) == 2 and capsys.readouterr().err == error
    assert file.read_text() == "mine" and [*tmp_path.iterdir()] == [file]


def test_closed_standard_streams_change_nothing(base, tmp_path):
    """Their numbers must not go to shards, into which warnings of libraries would be written."""
    words = [tmp_path / "out" if a == base[0] else a for a in base[2]]
    line = shlex.join([sys.executable, str(SCRIPT), *map(str, words), "--workers", "2"])
    assert subprocess.run(["bash", "-c", f"{line} 2>&-"], timeout=60).returncode == 0
    assert files_of(tmp_path / "out") == files_of(base[0])
    for script, option in (("prepare.py", "--source"), ("fineweb.py", "--repo")):
        line = shlex.join([sys.executable, str(SCRIPT.with_name(script)), option, str(tmp_path / "none.txt")])
        assert subprocess.run(["bash", "-c", f"{line} <&- >&- 2>&-"], timeout=60).returncode == 2


def test_tokenizers_that_would_miscount_are_refused(tmp_path, capsys):
    wrong = {"byte pieces": dict(byte_fallback=False), "pad, bos": dict(bos_id=2, eos_id=1), "' a'": dict(add_dummy_prefix=True),
             "must agree": dict(vocab_size=333)}
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS[:40])
    for message, change in wrong.items():
        options = dict(vocab_size=V, byte_fallback=True, add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(DOCUMENTS), model_prefix=str(tmp_path / "t"),
                                                 model_type="bpe", minloglevel=2, **{**options, **change})
        assert run("--source", source, "--out", tmp_path / "o", "--tokenizer", tmp_path / "t.model", "--vocab-size", V) == 2
        assert message in capsys.readouterr().err


def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, capsys):
    (tmp_path / "rule.tsv").write_text("61\t62\n")  # decodes every a as b
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_prefix=str(tmp_path / "t"), model_type="bpe", vocab_size=V, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, byte_fallback=True, add_dummy_prefix=False, minloglevel=2, denormalization_rule_tsv=str(tmp_path / "rule.tsv"))
    source = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS[:40])
    assert run("--source", source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "t.model") == 2
    error = capsys.readouterr().err
    assert "in.jsonl:" in error and "does not give back" in error and error.count("\n") == 1


def test_a_tokenizer_that_changes_its_own_texts_is_refused_before_all_is_encoded(tmp_path, capsys):
    """A rule that rewrites what it wrote; case folding, which does not, only has to be said."""
    options = dict(model_type="bpe", vocab_size=V, pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=True,
                   add_dummy_prefix=False, minloglevel=2)
    (tmp_path / "rule.tsv").write_text("6B\t74\n74\t70\n")  # k becomes t, t becomes p
    rules = dict(own=dict(normalization_rule_tsv=str(tmp_path / "rule.tsv")),
                 folds=dict(normalization_rule_name="nmt_nfkc_cf"))
    for name, rule in rules.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS), model_prefix=str(tmp_path / name), **options, **rule)
    source = write_jsonl(tmp_path / "in.jsonl", [text.title() for text in DOCUMENTS[:40]])
    args = ["--source", source, "--out", tmp_path / "out", "--val-docs", 3, "--tokenizer"]
    assert run(*args, tmp_path / "own.model") == 2
    out, error = capsys.readouterr()
    assert "of the first 40 documents" in error and "normalisation" in error and error.count("\n") == 1
    assert "val documents" not in out and not (tmp_path / "out").exists()
    assert run(*args, tmp_path / "folds.model") == 0
    assert "warning note:bytes_are_those_of_the_normalised_text" in capsys.readouterr().out


def test_help_names_every_option_and_shows_examples():
    text = prepare.parser().format_help()
    assert all(action.help for action in prepare.parser()._actions)
    assert "examples:" in text and "--source builtin" in text and "exit codes" in text
    assert command("--help").returncode == 0 and command().returncode == 2


HELP = """
import os, runpy, sys
import numpy, sentencepiece, torch  # once for all scripts
for script in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        sys.argv[:] = [script, "--help"]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)
        except BaseException as error:
            print(script, repr(error), file=sys.stderr)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", script, code, flush=True)
"""


def test_every_script_starts_where_python_leaves_its_folder_out(tmp_path):
    """PYTHONSAFEPATH and python -P: a script has to find the modules beside it by itself."""
    files = [*REPO.glob("data/*.py"), *REPO.glob("tools/*.py")]
    scripts = [str(path) for path in files if "__main__" in path.read_text()]
    assert len(scripts) >= 7
    safe = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", HELP, *scripts], cwd=tmp_path, env=safe, timeout=120,
                          capture_output=True, text=True)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended ")]
    assert ended == [f"ended {script} 0" for script in scripts], done.stderr


# ---- resuming ---------------------------------------------------------------------------------------------------------

def kill(args, at, early=False, moving_to=None):
    """A job in a child of this process, which dies by SIGKILL at the `at`-th JSON file that it writes, or at
    the `at`-th file that it moves into a folder: before the file is there (`early`), or after."""
    child = os.fork()
    if child == 0:
        write, move, left = prepare.write_json, os.replace, at

        def die_at(work, *args):
            nonlocal left
            left -= 1
            if left == 0 and early:
                os.kill(os.getpid(), signal.SIGKILL)
            work(*args)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def replace(old, new):
            die_at(move, old, new) if Path(new).parent == moving_to else move(old, new)

        if moving_to is None:
            prepare.write_json = lambda *args: die_at(write, *args)
        else:
            os.replace = replace
        try:
            prepare.main([str(a) for a in args])
        finally:
            os._exit(99)  # it should not come here
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("at, early", [(1, False), (2, True), (2, False), (3, True), (5, True), (7, False)])
def test_a_job_killed_anywhere_continues_to_the_same_bytes(at, early, base, tmp_path, capsys):
    args = [str(tmp_path if a == base[0] else a) for a in base[2]] + ["--workers", "1"]
    kill(args, at, early)
    if at == 5:  # and once more, a shard later
        kill(args, 1)
    assert not (tmp_path / "manifest.json").exists()
    assert run(*args) == 0
    assert "continue split:" in capsys.readouterr().out
    assert files_of(tmp_path) == files_of(base[0])


def test_a_killed_job_finds_its_place_in_a_long_compressed_text(base, tmp_path):
    raw = "\n".join(make_documents(3000, seed=8)).encode()
    (tmp_path / "in.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(raw))
    args = ["--source", tmp_path / "in.txt.zst", "--tokenizer", base[0] / "tokenizer.model", "--shard-tokens", 70_000, "--val-docs", 2]
    killed = [str(a) for a in (*args, "--out", tmp_path / "killed", "--workers", 1)]
    kill(killed, 9)
    assert json.loads((tmp_path / "killed" / prepare.STATE).read_text())["cursor"][1] > 600_000
    assert run(*args, "--out", tmp_path / "killed") == 0 and run(*args, "--out", tmp_path / "whole") == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_the_reader_does_not_run_ahead_of_the_workers():
    workers, read = processes.Workers(2), 0

    def tasks():
        nonlocal read
        for read in range(1, 101):
            yield [0] * read

    for done, (_, result) in enumerate(workers.map(len, tasks()), 1):
        assert result == done and read - done <= 4
    workers.close()
    assert done == 100


def test_sigkill_in_the_middle_leaves_whole_shards_and_no_workers(tmp_path, base, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", make_documents(6000, seed=5))
    args = ["--source", source, "--tokenizer", base[0] / "tokenizer.model", "--shard-tokens", 50_000, "--val-docs", 100]
    job = subprocess.Popen([sys.executable, str(SCRIPT), *map(str, args), "--out", str(tmp_path / "killed"), "--workers", "2"],
                           stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not len(list((tmp_path / "killed").glob("fineweb_train_*.bin"))) >= 3:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.005)
    job.kill()
    job.wait()
    for path in sorted((tmp_path / "killed").glob("fineweb_*.bin")):
        read_tokens(path)
    with pytest.raises(ProcessLookupError):  # the workers end too: soon the process group is empty
        while time.monotonic() < deadline:
            os.killpg(job.pid, 0)
            time.sleep(0.05)
    assert run(*args, "--out", tmp_path / "killed") == 0 and "continue split:train" in capsys.readouterr().out
    assert run(*args, "--out", tmp_path / "whole") == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_stops_with_one_line_and_the_job_continues(base, tmp_path, capsys):
    args = [str(tmp_path if a == base[0] else a) for a in base[2]] + ["--workers", "1"]
    kill(args, 1)  # leaves a job that has only begun ...
    (tmp_path / "tokenizer.model").write_bytes((base[0] / "tokenizer.model").read_bytes())  # ... and has its large file
    code = (f"import resource, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import prepare\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (6500, 6500)); sys.exit(prepare.main({args!r}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("stopped: ") and done.stderr.count("\n") == 1, done.stderr
    assert "continues" in done.stderr and not list(tmp_path.glob(".*.part"))
    for path in tmp_path.glob("fineweb_*.bin"):
        read_tokens(path)
    assert run(*args) == 0 and "continue split:" in capsys.readouterr().out
    assert files_of(tmp_path) == files_of(base[0])


def test_a_finished_data_set_is_kept(base, tmp_path, capsys, copy):
    args = [copy if a == base[0] else a for a in base[2]]
    assert run(*args) == 0 and "complete" in capsys.readouterr().out
    assert run(*args, "--max-docs", 50) == 2
    assert "max_docs None -> 50" in (error := capsys.readouterr().err) and "--restart" in error
    (copy / "fineweb_train_000001.bin").unlink()
    assert run(*args) == 2 and "fineweb_train_000001.bin" in capsys.readouterr().err
    assert run(*args, "--max-docs", 50, "--restart") == 0
    assert json.loads((copy / "manifest.json").read_text())["splits"]["train"]["documents"] == 43


def test_restart_keeps_the_old_set_until_the_new_one_is_proven(base, copy, tmp_path, capsys):
    old = files_of(copy)
    args = [copy if a == base[0] else a for a in base[2]] + ["--restart", "--shard-tokens", 2000]
    broken = write_jsonl(tmp_path.parent / "broken.jsonl", DOCUMENTS)
    broken.write_text(broken.read_text() + "{")  # the last line of all
    assert run(*[broken if a == base[1] else a for a in args]) == 2
    assert "not JSON" in capsys.readouterr().err
    assert files_of(copy) == old and set(old) == {path.name for path in copy.iterdir()}
    kill([*args, "--workers", 1], 4)
    assert files_of(copy) == old and run("--check", copy) == 0
    assert run(*base[2][:2], "--out", copy, *base[2][4:]) == 0  # without --restart: the old set
    assert "complete" in (said := capsys.readouterr().out) and "unfinished folder:" in said
    assert run(*args) == 0 and "continue split:" in capsys.readouterr().out
    new = files_of(copy)
    assert {path.name for path in copy.iterdir()} == set(new) and len(new) > len(old)
    assert run(*args[:-3], *args[-2:]) == 0 and "complete" in capsys.readouterr().out
    assert len(read_tokens(copy / "fineweb_train_000000.bin")) == 2000


@pytest.mark.parametrize("at, early", [(1, True), (1, False), (3, False)])
def test_a_restart_killed_while_it_replaces_the_old_set_goes_on(at, early, base, copy, capsys):
    args = [copy if a == base[0] else a for a in base[2]] + ["--max-docs", 60]
    kill([*args, "--restart", "--workers", 1], at, early, moving_to=copy)
    assert run(*args) == 0 and "complete" in capsys.readouterr().out
    assert run("--check", copy) == 0 and len(texts_in(copy, "train")) == 53
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_an_unfinished_job_with_other_arguments_begins_again(base, tmp_path, capsys):
    args = [str(tmp_path if a == base[0] else a) for a in base[2]] + ["--workers", "1"]
    kill(args, 4)
    assert run(*args, "--max-docs", 60) == 0
    assert "restart reason:" in capsys.readouterr().out and len(texts_in(tmp_path, "train")) == 53


def test_foreign_shards_are_not_touched(base, tmp_path, capsys):
    (tmp_path / "fineweb_val_000000.bin").write_bytes(b"precious")
    assert run(*[tmp_path if a == base[0] else a for a in base[2]]) == 2
    assert "did not make" in capsys.readouterr().err and files_of(tmp_path) == {"fineweb_val_000000.bin": b"precious"}


def test_two_writers_of_one_folder_are_refused(base, tmp_path, capsys):
    with shards.locked(tmp_path):
        assert run(*[tmp_path if a == base[0] else a for a in base[2]]) == 2
    assert "another process" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_input(base, tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import prepare; prepare.finish = lambda *a: 0\n"
            "prepare.trainer(); open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here\n"
            "prepare.main(sys.argv[2:]); print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1])")
    text, peak = "\n".join(make_documents(4000, seed=9)) + "\n", []
    for copies in (1, 8):
        path = tmp_path / f"{copies}.txt"
        path.write_text("".join(str(n) + text for n in range(copies)))
        args = ["--source", path, "--out", tmp_path / str(copies), "--tokenizer", base[0] / "tokenizer.model", "--workers", 1,
                "--val-docs", 2]
        done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), *map(str, args)], capture_output=True, text=True)
        peak.append(int(done.stdout.split()[-1]) / 1024)
    assert path.stat().st_size > 15e6
    assert peak[1] - peak[0] < 8, f"peak memory {peak} MB"


# ---- train and validation do not overlap --------------------------------------------------------------------------------


def test_copies_of_validation_documents_are_dropped_from_training(base, tmp_path):
    val, rest = DOCUMENTS[:6], DOCUMENTS[20:60]
    same_text, shouted = val[1], val[2].upper().replace(",", " ;").replace(".", "!")
    same_beginning = val[3] + " and then it goes on quite differently"
    source = write_jsonl(tmp_path / "in.jsonl", [*val, *rest[:20], same_text, shouted, same_beginning, *rest[20:]])
    out = tmp_path / "out"
    assert run("--source", source, "--out", out, "--tokenizer", base[0] / "tokenizer.model", "--val-docs", 6) == 0
    assert texts_in(out, "train") == [normal(d) for d in rest]
    assert json.loads((out / "manifest.json").read_text())["train_docs_dropped"] == 3


# ---- the proof --------------------------------------------------------------------------------------------------------


def test_check_repeats_the_proof(base, capsys):
    assert run("--check", base[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "manifest:yes" in lines[0] and re.fullmatch(r"all \d+ checks ok", lines[-1])
    assert all(line.startswith("ok ") and ": expected " in line and ", found " in line for line in lines[1:-1])
    done = command("--check", base[0], "--workers", 2)
    assert done.returncode == 0 and done.stdout.splitlines() == lines, done.stderr


def _change(name, edit):
    def damage(folder):
        tokens = read_tokens(folder / name)
        write_tokens(folder / name, edit(tokens, folder))
    return damage


def _swap(tokens, folder):
    tokens[100], tokens[200] = tokens[200], tokens[100]
    return tokens


def _append_validation(tokens, folder):
    val = read_tokens(folder / "fineweb_val_000000.bin")
    return tokens + val[:val.index(1, 1)]


def _spaced(folder):
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return next(i for i in range(V) if sp.id_to_piece(i)[:1] == tokenizer.SPACE and len(sp.id_to_piece(i)) > 1)


def _header(offset, value):
    def damage(folder):
        path = folder / "fineweb_train_000001.bin"
        raw = bytearray(path.read_bytes())
        struct.pack_into("<i", raw, offset, value)
        path.write_bytes(raw)
    return damage


def _other_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(tokenizer.train_tokenizer(make_documents(100, seed=77), V))


LAST, VAL = "fineweb_train_000005.bin", "fineweb_val_000000.bin"
DAMAGE = {  # name: (damage, with the manifest, without it); None: only the manifest can show it
    "two tokens swapped": (_change("fineweb_train_000000.bin", _swap), "SHA-256 of fineweb_train_000000.bin", None),
    "token changed in validation": (_change(VAL, lambda t, _: [*t[:50], (t[50] - 200) % 100 + 259, *t[51:]]), "SHA-256 of", None),
    "space after BOS": (_change(VAL, lambda t, f: [*t, 1, *[_spaced(f)] * 2]), "val: documents", None),  # it is not counted
    "split character": (_change(VAL, lambda t, _: [*t, 4 + 0xE4]), "val: tokens", "differ from the byte table"),
    "validation document in training": (_change(LAST, _append_validation), "train: documents", "copies of validation"),
    "token outside the vocabulary": (_change(LAST, lambda t, _: [*t[:-1], V]), "SHA-256", f"outside the vocabulary of {V}"),
    "no BOS at all": (_change(VAL, lambda t, _: [x if x != 1 else 300 for x in t]), "val: documents", "val: first token"),
    "no BOS at the start": (_change(VAL, lambda t, _: t[1:]), "val: documents", "val: first token"),
    "magic": (_header(0, 20240521), "SHA-256", "magic"),
    "version": (_header(4, 2), "SHA-256", "version"),
    "count": (_header(8, 2999), "SHA-256", "length"),
    "missing shard": (lambda f: (f / "fineweb_train_000002.bin").unlink(), "found no such file", "a number is missing"),
    "other tokenizer": (_other_tokenizer, "SHA-256 of the tokenizer", "gives other tokens"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_check_finds_damage(case, copy, capsys):
    damage, with_manifest, without = DAMAGE[case]
    damage(copy)
    for expected in (with_manifest, without):
        failed = run("--check", copy)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
        assert failed == (expected is not None) and (not expected or any(expected in line for line in lines)), lines
        (copy / "manifest.json").unlink(missing_ok=True)


def test_check_of_unusable_input_is_an_error(base, tmp_path, copy, capsys):
    (tmp_path / "empty").mkdir()
    assert run("--check", tmp_path / "empty") == 2 and "--check" in capsys.readouterr().err
    (copy / "tokenizer.model").unlink()
    assert run("--check", copy) == 2 and "--tokenizer" in capsys.readouterr().err
    assert run("--check", copy, "--tokenizer", base[1]) == 2 and "SentencePiece" in capsys.readouterr().err
    (copy / "manifest.json").write_text('{"datasets": []}')
    assert run("--check", copy, "--tokenizer", base[0] / "tokenizer.model") == 2 and "not a manifest" in capsys.readouterr().err


@pytest.mark.parametrize("entry, change", [(0, 1), (1, True), (2, True)])
def test_proof_fails_with_a_corrupted_byte_table(entry, change, base, tmp_path, monkeypatch, capsys):
    import train_gpt

    honest = train_gpt.byte_tables

    def corrupted(sp, vocab_size):
        tables = honest(sp, vocab_size)
        piece = next(i for i in sp.encode(DOCUMENTS[0]) if not tables[1][i])
        tables[entry][piece] = tables[entry][piece] + change if entry == 0 else change
        return tables

    monkeypatch.setattr(train_gpt, "byte_tables", corrupted)
    args = [tmp_path if a == base[0] else a for a in base[2]]
    assert run(*args) == 1 and not (tmp_path / "manifest.json").exists()
    out = capsys.readouterr().out
    assert "FAILED  wrong entries in the byte table: expected 0, found 1" in out
    monkeypatch.undo()
    assert run(*args) == 0, "the shards are there: only the proof is repeated"
    assert "continue split:done" in capsys.readouterr().out


def test_fineweb_constants_are_checked(base, tmp_path, capsys):
    folder = tmp_path / "datasets" / f"fineweb10B_sp{V}"
    (tmp_path / "tokenizers").mkdir()
    folder.mkdir(parents=True)
    for name, content in files_of(base[0]).items():
        target = tmp_path / "tokenizers" / f"fineweb_{V}_bpe.model" if name == "tokenizer.model" else folder / name
        target.write_bytes(content)
    totals = json.loads((folder / "manifest.json").read_text())["splits"]["val"]
    (folder / "manifest.json").unlink()
    ratio = totals["bytes"] / (totals["tokens"] - 1)
    known = dict(documents=7, bytes=totals["bytes"], tokens={V: totals["tokens"]}, bytes_per_token={V: (1.0, round(ratio, 6))})
    workers = processes.Workers(1)
    assert proof.check(folder, workers, known=known)
    out = capsys.readouterr().out
    assert out.count("ok      FineWeb") == 4 and f"tokenizer:fineweb_{V}_bpe.model" in out
    for change in (dict(documents=8), dict(bytes=totals["bytes"] + 1), dict(tokens={V: 5}), dict(bytes_per_token={V: (ratio * 1.001,)})):
        assert not proof.check(folder, workers, known={**known, **change})
        assert capsys.readouterr().out.count("FAILED  FineWeb") == 1
    # A plain tokenizer needs no sidecar: whoever counts by one counts something that cannot be proven.
    write_tokens(folder / "fineweb_val_bytes_000000.bin", [0] * totals["tokens"])
    assert not proof.check(folder, workers, known=known)
    assert "has no case operators" in capsys.readouterr().out
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    assert not proof.check(folder, workers), "these are not the 50,000 documents of FineWeb"


TRICKY = st.text(st.one_of(
    st.characters(blacklist_categories=("Cs",)),
    st.sampled_from("\u2581 \n\t\u00a0\u200b\ufeff\ufb01\u00bd\uff21\u2026\u0301e\u0130\u03a3\u2047\ufffd\x00\x07<>s/0x41")), max_size=60)


@settings(max_examples=300)
@given(documents=st.lists(TRICKY, min_size=1, max_size=5))
def test_byte_accounting_holds_for_any_unicode_text(documents, base):
    import train_gpt

    model = str(base[0] / "tokenizer.model")
    sp = tokenizer.load(model)
    rows = [(("f", 0, 1, i), json.dumps({"text": d}).encode()) for i, d in enumerate(documents)]
    block = sources.Block([((0, 0, 1, i), raw) for i, (_, raw) in enumerate(rows)], {0: "a.jsonl"}, 0)
    got = prepare.encode_block((block, "text", model, 0, sources.HASHES, None))  # raises if one cannot be given back
    kept = [d for d in documents if d.strip()]
    assert len(got.lengths) == len(kept) and len(got.empty) == len(documents) - len(kept)
    tables = train_gpt.byte_tables(sp, V)
    (tokens,) = got.columns
    charged = train_gpt.target_bytes(tokens, tables).sum() if len(tokens) else 0
    assert charged == sum(len(sp.normalize(d).replace("\u2581", " ").encode()) for d in kept)


# ---- the text that needs no download ------------------------------------------------------------------------------------


BUILTIN = ("--source", "builtin", "--tokenizer-sample-mb", "1")  # a tokenizer of little text: its text is tested


@pytest.fixture(scope="session")
def builtin(tmp_path_factory):
    out = tmp_path_factory.mktemp("builtin") / "set"
    done = command(*BUILTIN, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_builtin_is_megabytes_of_english_prose(builtin):
    splits = json.loads((builtin / "manifest.json").read_text())["splits"]
    assert splits["val"]["bytes"] + splits["train"]["bytes"] > 8e6
    assert splits["val"]["bytes"] > 3e5 and 0.03 < splits["val"]["documents"] / splits["train"]["documents"] < 0.08
    documents = texts_in(builtin, "val")
    assert all(400 < len(d) < 20_000 for d in documents) and sum(map(len, documents)) / len(documents) > 1000
    text = " ".join(documents)
    words = re.findall(r"[a-z]+", text.lower())
    assert sum(w in ("the", "of", "to", "a", "is", "and", "in") for w in words) > 0.15 * len(words)
    assert ">>>" not in text and "Copyright" not in text and "```" not in text
    assert sum(c.isalpha() or c == " " for c in text) > 0.9 * len(text)


def test_builtin_does_not_repeat_validation_in_training(builtin):
    def shingles(texts):
        return [" ".join(words[i:i + 12]) for t in texts for words in [t.lower().split()] for i in range(0, len(words) - 12, 6)]

    train = texts_in(builtin, "train")
    seen = {" ".join(words[i:i + 12]) for t in train for words in [t.lower().split()] for i in range(len(words) - 12)}
    found = shingles(texts_in(builtin, "val"))
    assert sum(s in seen for s in found) < 0.03 * len(found)


def test_builtin_a_second_time_answers_at_once_without_torch(builtin):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import prepare\n"
            "print(prepare.main(sys.argv[2:]), 'torch' in sys.modules)")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(SCRIPT.parent), *BUILTIN, "--out", str(builtin)], capture_output=True, text=True)
    assert done.stdout.startswith("complete") and done.stdout.splitlines()[-1] == "0 False"
    assert time.monotonic() - begin < 2


def test_builtin_reads_only_what_the_requirements_pull_in():
    names = set(builtin_text.packages())
    assert {"torch", "numpy", "sympy", "zstandard"} <= names and not {"pytest", "hypothesis", "matplotlib"} & names


def test_docstrings_become_prose():
    source = '''"""Compute the weighted mean of the values that are given by the caller, ignoring those that are missing.

    Parameters
    ----------
    x : array_like, optional
        The values to average, of any shape that can be turned into an array by the library.

    Args:
        weights (list): How much each of the values counts in the mean, in the same order as they are.

    Examples
    --------
    >>> mean([1, 2])
    1.5

    This is what :class:`~torch.Tensor` users would expect from it, and it is ``fast`` in most of the cases::

        x = mean(values)

    =====  =====
    a      b
    =====  =====

    Copyright 2020 by the authors of the library, who licensed it under the terms of some licence.
    """
    '''
    assert list(builtin_text.prose(next(builtin_text.docstrings(source)))) == [
        "Compute the weighted mean of the values that are given by the caller, ignoring those that are missing.",
        "The values to average, of any shape that can be turned into an array by the library.",
        "How much each of the values counts in the mean, in the same order as they are.",
        "This is what torch.Tensor users would expect from it, and it is fast in most of the cases"]
