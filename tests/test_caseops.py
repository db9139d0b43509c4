"""CaseOps from text to score: the transform, the bytes of its tokens, and the data set that tools and trainer share."""

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference as ref
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from process import REPO
from runs import call, command, events, good, refused, summary
from toy import toy_documents, write_shard

import caseops
import fineweb
import prepare
import report
import train_gpt as tg
from reports.compressors import validation_text
from reports.facts import DEFAULT
from shards import list_shards
from tokenizer import load, train_tokenizer

V, FIRST, SHARD = 512, 40, 1500  # pieces, validation documents, tokens of a shard
NAME = "fineweb10B_sp512_lossless_caps_caseops_v1_reserved"
TITLE, UPPER, NEXT, ESCAPE = operators = "\ue001\ue002\ue003\ue004"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXT = st.text(st.one_of(
    st.sampled_from(operators + "aAbBzZiI .1\n"),
    st.sampled_from("\u2581 \t\u00a0\u200b\ufeff\ufb01\u00bd\uff21\u2122\u212a\u0130\u0301\u0307\u030c\u00e9\u00c9\u4e16\U0001f600\x00\x07"),
    st.characters(exclude_categories=["Cs"])), max_size=60)


# ---- a second implementation, one character at a time ------------------------------------------------------------------


def slow_encode(text):
    out, at = [], 0
    while at < len(text):
        run = at
        while run < len(text) and text[run].lower() in LETTERS and text[run].isascii():
            run += 1
        word = text[at:run]
        capital = [letter != letter.lower() for letter in word]
        if not word:
            out.append(ESCAPE * (text[at] in operators) + text[at])
            run = at + 1
        elif len(word) > 1 and all(capital):
            out.append(UPPER + word.lower())
        else:
            marks = [TITLE, *[NEXT] * len(word)]
            out += [mark * big + letter.lower() for mark, big, letter in zip(marks, capital, word)]
        at = run
    return "".join(out)


def slow_counts(sp, ids):
    """Bytes of each token of a document that begins with BOS, one token at a time."""
    out, escaped = [0], False
    for before, token in zip(ids, ids[1:]):
        piece = sp.id_to_piece(int(token))
        if sp.is_byte(int(token)):
            out.append(1)
        elif piece in tuple(operators) and not escaped:
            out.append(0)
        else:
            out.append(len(piece.replace("\u2581", " ").encode()) - (piece[0] == "\u2581" and before == ref.BOS))
        escaped = piece == ESCAPE and not escaped
    return out


def read(path):
    """Values of a shard or sidecar, by an independent reader of the format."""
    raw = path.read_bytes()
    words = np.frombuffer(raw, "<i4", 256)
    assert words[:2].tolist() == [20240520, 1] and not words[3:].any() and len(raw) == 1024 + 2 * words[2]
    return np.frombuffer(raw, "<u2", offset=1024).tolist()


# ---- the transform -----------------------------------------------------------------------------------------------------


@ref.tries(1000)
@given(TEXT)
@example(ESCAPE)
@example("A" + operators + "B")
@example("\u0130I\u0307 \uff21B A\u00e9B \u212aelvin")  # letters that are not ASCII stay, and end a run
def test_the_inverse_is_exact_and_the_transform_is_the_published_one(text):
    coded = caseops.encode(text)
    assert caseops.decode(coded) == text
    assert coded == slow_encode(text)
    assert not re.search("[A-Z]", coded)


def test_capitals_are_written_as_in_the_published_examples():
    for text, coded in {"The NASA Launch": f"{TITLE}the {UPPER}nasa {TITLE}launch",
                        "iPhone OpenAI": f"i{NEXT}phone {TITLE}open{NEXT}a{NEXT}i",
                        "I am A1": f"{TITLE}i am {TITLE}a1", "McDonald's": f"{TITLE}mc{NEXT}donald's", "": ""}.items():
        assert caseops.encode(text) == coded and caseops.decode(coded) == text


def test_long_runs_take_time_in_proportion_to_their_length():
    begin = time.process_time()
    for text in ("a" * 1_000_000, "a" * 1_000_000 + "B", "A" * 1_000_000, "aB" * 500_000, ESCAPE * 1_000_000):
        assert caseops.decode(caseops.encode(text)) == text
    assert time.process_time() - begin < 20


# ---- the bytes of a token ----------------------------------------------------------------------------------------------


def mixed_documents(count, seed=7):
    """Documents in which a third of the words have capitals, with emoji, accents, control characters and operators."""
    rng, documents = random.Random(seed), []
    for number, text in enumerate(toy_documents(count, seed)):
        words = [rng.choice([str, str, str.title, str.upper, lambda w: w[:1] + w[1:].title()])(w) for w in text.split()]
        more = {2: " \u00c9t\u00e9 \U0001f600\U0001f680", 4: f" x{NEXT}Y{ESCAPE}{ESCAPE}Z", 6: " a\x07\x00B"}.get(number % 9, "")
        documents.append(f"{number} " + " ".join(words) + more)
    return documents


DOCUMENTS = mixed_documents(90)


@pytest.fixture(scope="session")
def sp():
    texts = [caseops.encode(text) for text in DOCUMENTS]
    return sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(texts, V, caseops.OPERATORS))


def test_operators_have_the_published_ids_and_the_byte_pieces_follow(sp):
    assert [sp.piece_to_id(operator) for operator in operators] == [4, 5, 6, 7] and sp.bos_id() == 1
    assert [i for i in range(V) if sp.is_byte(i)] == list(range(8, 264))
    assert sp.encode(f"a {TITLE}b", out_type=str)[1:3] == ["\u2581", TITLE], "an operator is never part of a larger piece"


@ref.tries(500)
@given(st.lists(TEXT, min_size=1, max_size=3))
@example([f"{ESCAPE}{ESCAPE}{TITLE}a", TITLE, "A"])
def test_the_bytes_of_the_tokens_are_those_of_the_document(sp, documents):
    tables, stream, slow = tg.byte_tables(sp, V), [], []
    for text in documents:
        ids = [ref.BOS, *sp.encode(caseops.encode(text))]
        stream, slow = stream + ids, slow + slow_counts(sp, ids)
        back = caseops.decode(sp.decode(ids[1:]))
        assert sum(slow_counts(sp, ids)) == len(back.encode())
        # A capital and an accent that normalisation would join stay two characters here: all else is the same text.
        if not any(a.isascii() and a.isupper() and unicodedata.category(b)[0] == "M" for a, b in zip(text, text[1:])):
            assert len(back.encode()) == len(sp.normalize(text).replace("\u2581", " ").encode())
    assert caseops.byte_counts(np.array(stream), tables, caseops.operator_ids(sp)).tolist() == slow


@ref.tries(300)
@given(st.data())
def test_counts_and_decoder_agree_on_streams_that_nobody_encoded(sp, data):
    """Operators anywhere, without their letters: what the decoder drops counts nothing, and what it keeps counts."""
    ids = data.draw(st.lists(st.one_of(st.integers(4, 7), st.integers(264, V - 1)), max_size=40))
    counts = caseops.byte_counts(np.array([ref.BOS, *ids]), tg.byte_tables(sp, V), caseops.operator_ids(sp))
    assert counts.sum() == len(caseops.decode(sp.decode(ids)).encode())


def test_the_plain_table_would_flatter_the_score(sp):
    ids = np.array([ref.BOS, *sp.encode(caseops.encode("The NASA iPhone"))])
    tables = tg.byte_tables(sp, V)
    assert caseops.byte_counts(ids, tables, (4, 5, 6, 7)).sum() == 15 == tg.target_bytes(ids, tables).sum() - 3 * 3


# ---- data/prepare.py --caseops -----------------------------------------------------------------------------------------


def run(*args):
    return prepare.main([str(a) for a in (*args, *(["--workers", 1] if "--workers" not in args else []))])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(folder of a finished data set with several validation shards, the arguments that made it)."""
    root = tmp_path_factory.mktemp("caseops")
    (root / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    args = ["--source", root / "in.jsonl", "--out", root / "out", "--vocab-size", V, "--val-docs", FIRST,
            "--shard-tokens", SHARD, "--caseops"]
    assert run(*args) == 0
    return root / "out", args


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def test_shards_and_sidecar_are_the_published_format(made):
    folder, _ = made
    sp = load(folder / "tokenizer.model")
    for split, documents in (("val", DOCUMENTS[:FIRST]), ("train", DOCUMENTS[FIRST:])):
        rows = [[ref.BOS, *sp.encode(slow_encode(text))] for text in documents]
        paths = list_shards(folder, split)
        assert [t for path in paths for t in read(path)] == sum(rows, []) and len(paths) > 2
        assert {len(read(path)) for path in paths[:-1]} == {SHARD}
        if split == "val":
            sidecar = [folder / path.name.replace("val", "val_bytes") for path in paths]
            assert [n for path in sidecar for n in read(path)] == [n for row in rows for n in slow_counts(sp, row)]
            assert [len(read(path)) for path in sidecar] == [len(read(path)) for path in paths]
    assert len(list(folder.glob("*bytes*"))) == len(sidecar) and not list(folder.glob(".*"))


def test_scores_of_plain_and_transformed_data_divide_by_the_same_bytes(made, tmp_path):
    folder, args = made
    plain = [tmp_path / "plain" if a == folder else a for a in args if a != "--caseops"]
    assert run(*plain) == 0
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (folder, tmp_path / "plain")]
    for key in ("documents", "bytes"):
        assert len({m["splits"]["val"][key] for m in manifests}) == len({m["splits"]["train"][key] for m in manifests}) == 1
    raw = sum(len(text.encode()) for text in DOCUMENTS[:FIRST])  # normalisation takes two control characters and a space
    assert 0 <= raw - manifests[0]["splits"]["val"]["bytes"] < 10
    assert manifests[0]["job"]["transform"] == "lossless_caps_caseops_v1" and "transform" not in manifests[1]["job"]
    names = {row["name"] for row in manifests[0]["shards"]}
    assert {path.name for path in list_shards(folder, "*")} == names, "the sidecar's SHA-256 is known too"


def test_output_does_not_depend_on_the_number_of_workers(made, tmp_path):
    args = [str(tmp_path / "two" if a == made[0] else a) for a in made[1]]
    done = subprocess.run([sys.executable, REPO / "data/prepare.py", *args, "--workers", "2"], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(made[0])


@pytest.mark.parametrize("at", [2, 4, 5, 6])
def test_a_job_killed_between_a_shard_and_its_sidecar_continues_to_the_same_bytes(at, made, tmp_path, capsys):
    args = [str(tmp_path if a == made[0] else a) for a in made[1]] + ["--workers", "1"]
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); import prepare; replace, left = os.replace, [int(sys.argv[2])]\n"
            "def counted(*paths):\n"
            "    replace(*paths); left[0] -= '.bin' in str(paths[1])\n"
            "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
            "os.replace = counted; prepare.main(sys.argv[3:])")
    killed = subprocess.run([sys.executable, "-c", code, REPO / "data", str(at), *args], timeout=60)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "manifest.json").exists()
    assert run(*args) == 0 and "continue split:" in capsys.readouterr().out
    assert contents(tmp_path) == contents(made[0])


def test_a_killed_job_that_lost_a_sidecar_begins_again(made, tmp_path, monkeypatch, capsys):
    args = [tmp_path if a == made[0] else a for a in made[1]]
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "finish", lambda *_: 0)  # everything is written, nothing proven
        assert run(*args) == 0
    (tmp_path / SIDECAR).unlink()
    assert run(*args) == 0 and "restart reason:" in capsys.readouterr().out
    assert contents(tmp_path) == contents(made[0])


def test_a_copy_of_a_validation_document_in_other_case_is_dropped(made, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, DOCUMENTS[0].upper()]))
    assert run("--source", source, "--out", tmp_path / "out", "--tokenizer", made[0] / "tokenizer.model", "--caseops",
               "--val-docs", FIRST) == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["train_docs_dropped"] == 1


def test_tokenizer_and_transform_must_belong_together(made, tmp_path, capsys):
    source, model = made[1][1], made[0] / "tokenizer.model"
    assert run("--source", source, "--out", tmp_path / "out", "--tokenizer", model) == 2
    assert "add --caseops" in capsys.readouterr().err
    for symbols, words in {(): "no case operators", (*operators, TITLE + "a"): "inside the piece '\\ue001a'"}.items():
        (tmp_path / "other.model").write_bytes(train_tokenizer(toy_documents(), V, symbols))
        assert run("--source", source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "other.model", "--caseops") == 2
        assert words in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_split_that_trains_on_validation_documents_is_refused(tmp_path, capsys):
    (tmp_path / "docs_selected.jsonl").write_text(json.dumps({"text": "one"}))
    assert run("--source", tmp_path / "docs_selected.jsonl", "--out", tmp_path / "out", "--val-docs", 10_000, "--caseops") == 2
    assert "--val-docs 50000" in capsys.readouterr().err and not (tmp_path / "out").exists()


SIDECAR = "fineweb_val_bytes_000001.bin"


def _edit(change):
    def damage(folder):
        counts, tokens = np.array(read(folder / SIDECAR)), np.array(read(folder / SIDECAR.replace("_bytes", "")))
        change(counts, tokens)
        write_shard(folder / SIDECAR, counts)
    return damage


def _shift(counts, tokens):
    """One byte moved to the next token: the sum of every document stays."""
    at = int(np.flatnonzero((counts[:-1] > 1) & (counts[1:] > 0))[0])
    counts[at:at + 2] += [-1, 1]


def _change(where, value):
    def change(counts, tokens):
        counts[np.flatnonzero(where(tokens))[0]] = value
    return _edit(change)


DAMAGE = {  # name: (damage, what --check says without a manifest)
    "one byte too many": (_edit(lambda counts, _: counts.__setitem__(100, counts[100] + 1)), "whose byte sidecar is wrong"),
    "one byte too few": (_edit(lambda counts, _: counts.__setitem__(counts.argmax(), 1)), "whose byte sidecar is wrong"),
    "shifted by a token": (_edit(_shift), "whose byte sidecar is wrong"),
    "an operator counts": (_change(lambda tokens: (tokens > 3) & (tokens < 8), 3), "whose byte sidecar is wrong"),
    "BOS counts": (_change(lambda tokens: tokens == 1, 1), "whose byte sidecar is wrong"),
    "cut": (lambda f: write_shard(f / SIDECAR, read(f / SIDECAR)[:-1]), f"bytes in the file {SIDECAR}"),
    "damaged": (lambda f: (f / SIDECAR).write_bytes((f / SIDECAR).read_bytes()[:-1]), f"shard: expected {SIDECAR}"),
    "one missing": (lambda f: (f / SIDECAR).unlink(), "a number is missing"),
    "all missing": (lambda f: [path.unlink() for path in f.glob("*bytes*")], "byte sidecars of the validation shards"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_check_finds_a_corrupted_sidecar(case, copy, capsys):
    damage, words = DAMAGE[case]
    assert run("--check", copy) == 0
    damage(copy)
    for expected in (f"SHA-256 of {SIDECAR}", words):
        capsys.readouterr()
        assert run("--check", copy) == 1
        failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
        assert any(expected in line for line in failed), failed
        (copy / "manifest.json").unlink(missing_ok=True)
    if "wrong" in words:  # the document is named by the place where it begins
        shard, token = re.search(r"first at token (\d+) of (\S+)\)", next(line for line in failed if words in line)).groups()[::-1]
        assert read(copy / shard)[int(token)] == ref.BOS


def test_check_finds_tokens_without_the_transform(copy, capsys):
    """Shards of plain text encoded by the CaseOps tokenizer, with a sidecar that fits them."""
    sp = load(copy / "tokenizer.model")
    ids = [t for text in DOCUMENTS[:FIRST] for t in (ref.BOS, *sp.encode(text))]
    for path in [*list_shards(copy, "val"), *list_shards(copy, "val_bytes"), copy / "manifest.json"]:
        path.unlink()
    write_shard(copy / "fineweb_val_000000.bin", ids)
    write_shard(copy / "fineweb_val_bytes_000000.bin", caseops.byte_counts(np.array(ids), tg.byte_tables(sp, V), (4, 5, 6, 7)))
    assert run("--check", copy) == 1
    assert "FAILED  val: documents of 40 whose text gives other tokens" in capsys.readouterr().out


# ---- train_gpt.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def validation(toy):
    """A function: the validation stream of a folder, and the tokenizer that goes with it."""
    def load(folder, *more):
        s = tg.Settings.parse([*toy, f"DATA_PATH={folder}", *more])
        processor, *_ = tg.load_tokenizer(s)
        return tg.load_validation(s, ref.alone(), processor), processor
    return load


def test_the_trainer_divides_by_the_sidecar(made, validation):
    folder, _ = made
    val, sp = validation(folder)
    ids, counts = ([n for path in list_shards(folder, kind) for n in read(path)] for kind in ("val", "val_bytes"))
    assert val.tokens.tolist() == ids and val.bytes.tolist() == counts[1:] and val.whole and val.sidecar
    assert val.bytes.sum() == sum(len(caseops.decode(sp.decode(sp.encode(slow_encode(text)))).encode()) for text in DOCUMENTS[:FIRST])
    cut, _ = validation(folder, "VAL_TOKENS=3000")
    assert cut.bytes.tolist() == counts[1:3001] and len(cut.tokens) == 3001
    assert [path.name for path in tg.find_shards(folder, "val")] == [path.name for path in list_shards(folder, "val")]


@pytest.fixture(scope="module")
def trained(made, toy, tmp_path_factory):
    """(folder, what it said) of a run on CaseOps data."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, good(call(command(toy, folder, f"DATA_PATH={made[0]}", "ITERATIONS=2")))


def test_a_run_is_valid_and_says_what_it_divided_by(made, trained):
    said, split = summary(trained[1]), json.loads((made[0] / "manifest.json").read_text())["splits"]["val"]
    assert said["valid"] == "yes", said["reasons"]
    assert (said["val_bytes"], said["val_tokens"] + 1) == (split["bytes"], split["tokens"])
    assert said["val_bpb"] == pytest.approx(said["val_loss"] * said["val_tokens"] / said["val_bytes"] / math.log(2))
    (line,) = events(trained[0], "bytes")
    assert line["counted_by"] == "sidecar" and line["wrong"] == 0 and line["documents_decoded"] == FIRST


def test_a_report_compresses_the_text_with_its_capitals(made, trained, capsys):
    assert report.main([str(trained[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compressors"]["text_bytes"] == found["val_bytes"]
    (tokenizer,) = events(trained[0], "tokenizer")
    text = validation_text({**DEFAULT, "DATA_PATH": str(made[0])}, tokenizer)[0].decode()
    assert text[:100] == DOCUMENTS[0][:100] and DOCUMENTS[1][:100] in text


SPOILED = {  # name: (damage, words of the error)
    "no sidecar": (lambda f: [path.unlink() for path in f.glob("*bytes*")], ["case operators", "fineweb_val_bytes_*.bin", "--caseops"]),
    "one missing": (lambda f: (f / SIDECAR).unlink(), ["expected one", "6 validation shards", "found 5"]),
    "one too many": (lambda f: write_shard(f / "fineweb_val_bytes_000007.bin", [1]), ["expected one", "found 7"]),
    "shorter": (lambda f: write_shard(f / SIDECAR, [0] * (SHARD - 1)), [SIDECAR, "expected 1500 byte counts", "found 1499"]),
    "of another shard": (lambda f: write_shard(f / SIDECAR, read(f / "fineweb_val_bytes_000000.bin")), [SIDECAR, "BOS", "offset"]),
    "a BOS of one byte": (_change(lambda tokens: tokens == 1, 1), [SIDECAR, "expected 0 bytes", "found 1"]),
    "not a shard": (lambda f: (f / SIDECAR).write_bytes(b"x" * 3000), [SIDECAR, "magic", "found"]),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_sidecar_that_does_not_fit_is_refused_before_training(case, copy, toy, tmp_path):
    damage, words = SPOILED[case]
    damage(copy)
    refused(call(command(toy, tmp_path / "run", f"DATA_PATH={copy}")), 2, *words)


def reasons(val, sp, folder):
    """Why a score on this validation stream would not be valid."""
    checked = SimpleNamespace(s=SimpleNamespace(data_path=folder), validity=tg.Validity(), rt=ref.alone(), facts={},
                              log=lambda *_, **__: None)
    tg._check_bytes(checked, sp, val)
    return checked.validity.reasons


def test_a_sidecar_that_counts_the_operators_makes_the_score_invalid(made, validation, tmp_path):
    """As some submissions did (#2071, #2138), without a manifest that could contradict."""
    val, sp = validation(made[0])
    assert reasons(val, sp, tmp_path) == []
    table = tg.target_bytes(val.tokens.numpy(), tg.byte_tables(sp, V)).astype(np.int32)
    (reason,) = reasons(val._replace(bytes=tg.torch.from_numpy(table)), sp, tmp_path)
    decoded = val.bytes.sum().item()  # by the sidecar of the same text
    assert f"bytes: the decoded documents have {decoded} bytes, and their targets are charged {table.sum()} by the byte sidecar" == reason
    some = val.bytes.clone()  # a published sidecar counts before normalisation: here and there a byte more or less
    some[val.tokens[1:].argmax()] += 1
    assert reasons(val._replace(bytes=some), sp, tmp_path) == []
    assert "the manifest says" in reasons(val._replace(bytes=some), sp, made[0])[0]


# ---- data/fineweb.py ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(made, tmp_path):
    """(a repository in the published layout, its folder of shards, the constants of its validation set)."""
    root = tmp_path / "mirror"
    folder = root / "datasets" / "datasets" / NAME
    folder.mkdir(parents=True)
    for path in made[0].glob("*.bin"):
        shutil.copy(path, folder)
    (root / "datasets" / "tokenizers").mkdir()
    shutil.copy(made[0] / "tokenizer.model", root / "datasets" / "tokenizers" / f"{NAME.replace('10B_sp512', '_512_bpe')}.model")
    split = json.loads((made[0] / "manifest.json").read_text())["splits"]["val"]
    return root, folder, dict(documents=FIRST, bytes=split["bytes"], tokens={V: 7}, bytes_per_token={V: (7.0,)},
                              caseops_tokens={V: split["tokens"]})


def fetch(mirror, out, *args, known=None):
    variant = NAME.removeprefix("fineweb10B_")
    return fineweb.main(["--variant", variant, "--train-shards", "2", "--out", str(out), "--repo", str(mirror[0]), *args],
                        known=known or mirror[2])


def test_the_published_variant_arrives_with_its_sidecar_and_trains(mirror, validation, tmp_path, capsys):
    out = tmp_path / "out"
    assert fetch(mirror, out, "--check", "--workers", "1") == 0
    assert "FAILED" not in (said := capsys.readouterr().out) and "FineWeb validation bytes in the sidecar" in said
    folder = out / "datasets" / NAME
    for path in [*mirror[1].glob("*val*"), *mirror[1].glob("*train_00000[01]*")]:
        assert (folder / path.name).read_bytes() == path.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {row["name"] for row in manifest["shards"]} == {path.name for path in folder.glob("*.bin")}
    assert manifest["splits"]["val"]["bytes"] == mirror[2]["bytes"]
    val, _ = validation(folder)  # the tokenizer of the variant is found by the folder's name
    assert val.sidecar and val.bytes.sum() == mirror[2]["bytes"]


def test_a_sidecar_of_the_text_before_normalisation_is_accepted(mirror, validation, tmp_path, capsys):
    path, tokens = mirror[1] / SIDECAR, read(mirror[1] / SIDECAR.replace("_bytes", ""))
    counts = read(path)
    at = next(i for i, (count, token) in enumerate(zip(counts, tokens)) if count and token > 300)
    counts[at] += 1  # such as the second of two spaces
    write_shard(path, counts)
    assert fetch(mirror, tmp_path / "out", "--check", "--workers", "1") == 0
    val, _ = validation(tmp_path / "out" / "datasets" / NAME)
    assert val.bytes.sum() == mirror[2]["bytes"] + 1


def test_check_finds_an_operator_that_counts_though_the_sum_is_right(mirror, tmp_path, capsys):
    tokens, counts = np.array(read(mirror[1] / SIDECAR.replace("_bytes", ""))), np.array(read(mirror[1] / SIDECAR))
    counts[np.flatnonzero(tokens == 4)[0]] += 1
    counts[counts.argmax()] -= 1
    write_shard(mirror[1] / SIDECAR, counts)
    assert fetch(mirror, tmp_path / "out", "--check", "--workers", "1") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED  ")]
    assert len(failed) == 1 and "whose byte sidecar is wrong: expected 0, found 1 (first at token" in failed[0]


def _counts_operators(folder):
    tokens, counts = np.array(read(folder / SIDECAR.replace("_bytes", ""))), np.array(read(folder / SIDECAR))
    counts[(tokens > 3) & (tokens < 8)] = 3
    write_shard(folder / SIDECAR, counts)


@pytest.mark.parametrize("damage, words", [
    (lambda f: [path.unlink() for path in f.glob("*bytes*")], "there is no fineweb_val_bytes_000000.bin"),
    (lambda f: (f / SIDECAR).unlink(), f"holds no {SIDECAR}"),
    (lambda f: write_shard(f / SIDECAR, [0] * (SHARD - 1)), "1499 byte counts for the 1500 tokens"),
    (lambda f: (f / SIDECAR).write_bytes(b"x"), f"{SIDECAR} is damaged"),
    (_counts_operators, "FineWeb validation bytes in the sidecar")])
def test_a_published_sidecar_that_does_not_fit_is_named_and_nothing_stays(damage, words, mirror, tmp_path, capsys):
    damage(mirror[1])
    assert fetch(mirror, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "datasets" / NAME).exists()


def test_a_variant_with_too_few_validation_documents_is_refused(mirror, tmp_path, capsys):
    """Such as the data sets that were made with 10,000 documents (#2127)."""
    assert fetch(mirror, tmp_path / "out", known={**mirror[2], "documents": 100}) == 2
    assert "expected 100, found 40" in capsys.readouterr().err

