"""The record folders: each is the published system, by a table that was written from the publications and not from the
settings files; each can be read by somebody who has only its README; each runs small with every technique on,
evaluation included, and ends with the verdict that its README states."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest
import reference as ref
import torch
from process import REPO, clean_env, run_trainer
from runs import call, events, good, losses

import records
import shrink
import submit
import train_gpt as tg

RECORDS = REPO / "records"
FOLDERS = sorted(path for path in RECORDS.glob("*/*/") if path.is_dir())

# ---- what was published ---------------------------------------------------------------------------------------------

PLAIN = dict(eval_context="window", eval_seq_len=2048, eval_stride=64, eval_docs=False, eval_temperature=1, ttt="off",
             mixer="off", token_boost=0)
BODY = dict(PLAIN, num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4, leaky_slope=0.5, embed_dim=0,
            logit_softcap=30, tie_embeddings=True, tied_embed_init_std=0.005, rope_dims=16, ln_scale=True,
            resid_mix=True, trigram_vocab_size=0, value_residual="none", train_batch_tokens=786_432, train_seq_len=2048,
            warmup_steps=20, iterations=20_000, lr_warmup_steps=0, complement_alpha=0, mtp_num_heads=0,
            matrix_optimizer="muon", muon_momentum=0.99, muon_momentum_warmup_start=0.92,
            muon_momentum_warmup_steps=1500, normuon=False, beta1=0.9, beta2=0.95, adam_eps=1e-8, grad_clip_norm=0.3,
            average="ema", ema_start_frac=0, min_lr=0, matrix_bits=6, embed_bits=8,
            val_loss_every=4000, train_log_every=500, fit="off", late_qat_threshold=0, gate_bits=16,
            lqer_rank=0, prune_pct=0)
EARLY = dict(BODY, clip_floor=1, proj_bits=16, vocab_size=1024, mlp_mult=3, qk_gain_init=1.5, rope_base=10_000 * 2 ** (8 / 7), xsa_last_n=4,
             bigram_vocab_size=2048, bigram_dim=128, trigram=False, smear_gate="channel", doc_mask="inputs",
             ve_dim=128, ve_layers=(9, 10), attn_gate="none", skips="linear", num_loops=0, parallel_residual="none",
             loader="sequential", matrix_lr=0.025, muon_wd=0.04, muon_backend_steps=5, newton_schulz="classic",
             muon_row_normalize=False, tied_embed_lr=0.035, embed_wd=0.04, scalar_lr=0.025, adam_wd=0.04,
             warmdown_iters=3500, max_wallclock_seconds=600, ema_decay=0.997, matrix_quant="gptq_lite",
             embed_quant="rtn", embed_clip_sigmas=0)
LATE = dict(BODY, vocab_size=8192, mlp_mult=4, xsa_last_n=11, bigram_vocab_size=0, loop_start=3, loop_end=5,
            loop_order="range", muon_wd=0.095, muon_row_normalize=True, tied_embed_lr=0.03, scalar_lr=0.02,
            adam_wd=0.02, ema_decay=0.9965, max_wallclock_seconds=600, matrix_quant="gptq", matrix_clip_sigmas=12.85,
            gptq_damp=0.01)
PACKED = dict(embed_quant="gptq", gptq_calibration="train")
LOOPS = dict(ve_dim=0, skips="gated", num_loops=2, enable_looping_at=0.35, rope_base=10_000, muon_backend_steps=5,
             embed_wd=0.085)
# Training of the weights in evaluation; chunk by chunk, behind the score.
WEIGHTS = dict(ttt_min_lr=0, ttt_grad_clip=1, ttt_lr_mult_proj=1, ttt_lr_mult_fc=1, ttt_freeze_blocks=0,
               ttt_freeze_embed=False, byte_weighted_ttt=False)
ADAMW = dict(WEIGHTS, ttt_optimizer="adamw", ttt_lr=5e-4)
SGD = dict(WEIGHTS, ttt_optimizer="sgd", ttt_momentum=0.9)
CHUNKS = dict(ttt="full", ttt_chunk_tokens=32_768, ttt_batch_seqs=32, ttt_epochs=3, adaptive_lr_max=1, polyak_decay=0)
NGRAMS = dict(polyak_decay=0.998, adaptive_lr_max=3, byte_weighted_ttt=True, ttt_train_scales=True,
              mixer_min_tokens=10_000)
# Adapters of each document, and phases of all weights: without what reads the text as one.
CASEOPS = {name: value for name, value in LATE.items() if name not in ("eval_stride", "eval_docs")} | dict(
    SGD, **LOOPS, **PACKED) | dict(
    smear_gate="scalar", gate_window=12, doc_mask="attention", qk_gain_init=5.0, attn_gate="sparse",
    sparse_attn_gate_scale=0.5, parallel_residual="routed", parallel_start_layer=8, parallel_final_lane="mean",
    parallel_first_skip="lane0", ttt_lora_scaled=True, ttt_lora_a="own",
    loader="packed", micro_batch_tokens=98_304, muon_momentum=0.97, newton_schulz="polar_express", beta2=0.99,
    warmdown_frac=0.85, min_lr=0.1, gptq_reserve_seconds=0.5, embed_bits=7, attn_clip_sigmas=13, mlp_clip_sigmas=11.5,
    embed_clip_sigmas=14, lqer_rank=4, lqer_top_k=3, compressor="rans", ttt="lora_docs", ttt_chunk_size=48,
    ttt_batch_size=64, ttt_lora_rank=80, ttt_lora_alpha=144, ttt_beta1=0, ttt_beta2=0.99, ttt_warm_start_a=True,
    ttt_group_docs=8 * 64, phased_ttt_prefix_docs=2500, ttt_epochs=1, ttt_lr=0.001)
# Two caps of the logits, and AWQ-lite.
V21 = dict(CASEOPS, matrix_lr=0.026, val_loss_every=0, gate_bits=8, lqer_asym_group=64,
           gptq_calibration_tokens=16 * 98_304, gptq_reserve_seconds=4, asym_logit_rescale=True,
           awq_lite_group_top_k=1, awq_lite_bits=8, awq_lite_group_size=64, ttt_wd=0.5)
LONG = dict(V21, qk_gain_init=5.25, ttt_lora_targets=("k", "attn", "mlp", "head"), ttt_lora_lr=0.75 * 1e-4)
BASELINE = {name: value for name, value in BODY.items() if name not in ("ema_start_frac", "gate_bits")} | dict(
    clip_floor=1, vocab_size=1024, num_layers=9, mlp_mult=2, leaky_slope=0, qk_gain_init=1.5, ln_scale=False, rope_dims=64,
    rope_base=10_000, bigram_vocab_size=0, smear_gate="none", ve_dim=0, doc_mask="none", xsa_last_n=0, skips="linear",
    num_loops=0, parallel_residual="none", attn_gate="none", matrix_lr=0.04, muon_wd=0, muon_backend_steps=5,
    newton_schulz="classic", muon_row_normalize=False, muon_momentum=0.95, muon_momentum_warmup_start=0.85,
    muon_momentum_warmup_steps=500, tied_embed_lr=0.05, embed_wd=0, scalar_lr=0.04, adam_wd=0, grad_clip_norm=0,
    train_batch_tokens=524_288, train_seq_len=1024, loader="sequential", max_wallclock_seconds=600, warmdown_iters=1200, train_log_every=50,
    val_loss_every=200, average="none", matrix_bits=8, matrix_quant="rtn", matrix_clip_sigmas=0, embed_quant="rtn",
    embed_clip_sigmas=0, compressor="zlib", eval_seq_len=1024, eval_stride=0)


class Published(NamedTuple):
    pull_request: int  # 0: none
    parameters: int
    score: str
    breaks: str  # the condition of #1017, "" for a valid score
    settings: dict


PUBLISHED = {
    "2026-03-17_NaiveBaseline": Published(0, 17_059_912, "1.2244", "", BASELINE),
    "2026-03-23_11L-CosineTTT": Published(518, 26_993_756, "1.0622", "C3", dict(
        EARLY, **ADAMW, compressor="zstd", allow_invalid=True) | dict(
        ttt="before", ttt_epochs=50, ttt_batch_seqs=8 * 32, ttt_lr_mult_proj=3, ttt_lr_mult_fc=0.5)),
    "2026-04-03_11L_LeakyReLU2_EMA_LZMA_Int6": Published(1311, 26_993_756, "1.1303", "", dict(
        EARLY, lr_warmup_steps=50, iterations=12_000, eval_stride=16, val_loss_every=2000, train_log_every=200,
        compressor="lzma", eval_temperature=0.9)),
    "2026-03-28_ComplementaryBackoff_NgramMixer": Published(1033, 26_993_766, "0.4311", "C2", dict(
        EARLY, **ADAMW, value_residual="vrl", complement_alpha=0.5, compressor="lzma", allow_invalid=True) | CHUNKS
        | NGRAMS | dict(eval_temperature=0.98, ttt_freeze_blocks=9, mixer="hashed", ngram_order=10, ngram_buckets=2**22,
                        min_count=2, alpha_base=0.2, alpha_range=0.55, alpha_center=3)),
    "2026-03-27_SGD_TTT_HedgeMixer_PerLayerLR_1.0450": Published(967, 33_317_980, "1.0450", "C2", dict(
        EARLY, **SGD, num_kv_heads=8, mlp_mult=3.5, xsa_last_n=11, bigram_vocab_size=6144, max_wallclock_seconds=582,
        matrix_bits=5, matrix_quant="gptq", matrix_clip_sigmas=0, prune_pct=0.03, gptq_calibration="train",
        gptq_calibration_tokens=128 * 2048, gptq_damp=0.01, compressor="zstd", allow_invalid=True) | CHUNKS | NGRAMS
        | dict(ttt_lr=0.002, ttt_epochs=4, ttt_lr_mult_proj=3, ttt_lr_mult_fc=0.5, ttt_freeze_blocks=10,
               ttt_freeze_embed=True, mixer="hedge", mixer_experts=("unigram", "bigram", "trigram", "entropy"),
               mixer_eta=0.1)),
    "2026-04-11_SP8192_PreQuantTTT_CompiledTTT": Published(1539, 36_311_132, "1.0587", "C3", dict(
        LATE, **ADAMW, clip_floor=1, proj_bits=16, parallel_first_skip="both",
        qk_gain_init=5.25, rope_base=10_000 * 2 ** (8 / 7), smear_gate="channel", doc_mask="inputs",
        ve_dim=44, ve_layers=(9, 10), attn_gate="none", skips="linear", skip_pairs=5, num_loops=1,
        enable_looping_at=3000 * 0.1002 / 600,  # it loops from step 3,000, with 100.2 ms a step before
        parallel_residual="lanes", parallel_start_layer=7, parallel_final_lane="learned", loader="sequential",
        matrix_lr=0.022, muon_backend_steps=4, newton_schulz="polar_express", embed_wd=0.095, warmdown_frac=0.72,
        embed_quant="rtn", embed_clip_sigmas=20, gptq_calibration="generated", gptq_calibration_tokens=32 * 2048,
        gptq_temperature=0.8, size_limit=int(15.22 * 2**20), compressor="brotli", allow_invalid=True) | dict(
        gptq_damp=0.02, fit="prune", ttt="prequant", ttt_epochs=6, ttt_batch_seqs=32, ttt_min_lr=0.1)),
    "2026-03-23_LeakyReLU_LegalTTT_ParallelMuon": Published(549, 26_928_220, "1.1194", "", dict(
        EARLY, **SGD, bigram_vocab_size=1536, iterations=9000, compressor="lzma", ttt_lr=0.002) | CHUNKS),
    "2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT": Published(1493, 35_944_536, "1.0810", "", dict(
        LATE, **LOOPS, **SGD, qk_gain_init=5.25, smear_gate="none", doc_mask="none", attn_gate="none",
        parallel_residual="gptj", parallel_start_layer=7, loader="shuffled", matrix_lr=0.022, newton_schulz="classic",
        warmdown_frac=0.72, gptq_reserve_seconds=12, **PACKED, embed_clip_sigmas=20,
        gptq_calibration_tokens=64 * 98_304, compressor="brotli", ttt_lr=0.005) | CHUNKS),
    "2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611": Published(1855, 35_945_671, "1.0611", "", dict(
        CASEOPS, matrix_lr=0.026, val_loss_every=0, gate_bits=8, lqer_asym_group=64,
        gptq_calibration_tokens=16 * 98_304, ttt_lora_targets=("q", "k", "v", "attn", "mlp", "head"), ttt_lora_lr=1e-4,
        ttt_wd=0.5, phased_ttt_num_phases=3, ttt_batch_seqs=32_768 // 2048)),
    "2026-04-30_V19_PR1908_AsymLogit_WD2": Published(1945, 35_945_673, "1.0594", "", dict(
        V21, ttt_lora_targets=("q", "k", "v", "attn", "mlp", "head"), ttt_lora_lr=1e-4, phased_ttt_num_phases=3,
        ttt_batch_seqs=32_768 // 2048)),
    "2026-04-30_LongCtx_NoQV_QK525_on_1945_1.0586": Published(1953, 35_945_673, "1.0586", "", dict(
        LONG, eval_seq_len=2560, phased_ttt_num_phases=3, ttt_batch_seqs=32_768 // 2560)),
    "2026-04-30_SP8192_CaseOps_Progressive3k_ShortDocTTT": Published(2014, 35_945_673, "1.0576", "", {
        name: value for name, value in LONG.items() if name != "train_seq_len"} | dict(
        train_seq_schedule=((1024, 0.1), (2048, 0.7), (3072, 1.0)), seq_change_warmup_steps=32, eval_seq_len=3072,
        ttt_batch_size=24, ttt_group_docs=8 * 24, ttt_short_chunks=((8, 256), (24, 2000)), phased_ttt_num_phases=1,
        ttt_batch_seqs=32_768 // 3072)),
    "2026-05-01_SP8192_PR2130Base_Calib32": Published(2135, 35_945_673, "1.0565", "", dict(
        CASEOPS, asym_logit_rescale=True, matrix_lr=0.028, gate_bits=16, lqer_asym_group=32, gptq_calibration_tokens=32 * 98_304,
        eval_seq_len=2560, ttt_lora_targets=("q", "v", "attn", "mlp", "head"), ttt_lora_lr=8e-5, ttt_wd=2,
        phased_ttt_num_phases=1, ttt_batch_seqs=32_768 // 2560, token_boost=2.625, token_order=16,
        token_threshold=0.8)),
}
ACCEPTED = {0, 549, 1493, 1855, 1945, 1953, 2014, 2135}
# The valid twins: what each does otherwise: what makes the original invalid, or breaks a limit; "-": not named.
TWINS = {
    518: dict(TTT="full", TTT_CHUNK_TOKENS="32768", TTT_EPOCHS="3", FIT="prune", ALLOW_INVALID="-"),
    1539: dict(TTT="full", TTT_CHUNK_TOKENS="32768", ALLOW_INVALID="-"),
    967: dict(MIXER_EXPERTS="unigram,bigram,trigram", ALLOW_INVALID="-"),
    1033: dict(MIXER="backoff", NGRAM_BUCKETS="-", MIN_COUNT="-", EVAL_TEMPERATURE="0", ALLOW_INVALID="-"),
}
UNUSED = dict(ADAPTIVE_LR_MAX="1", POLYAK_DECAY="0")  # what TTT=full offers and such a twin leaves off
for name, one in [*PUBLISHED.items()]:
    if one.breaks:
        PUBLISHED[f"{name}_ValidTwin"] = one._replace(score="", breaks="", settings={})


def published(folder):
    return PUBLISHED[folder.name]


def original(folder):
    """The record of which this folder is the twin, or None."""
    name = folder.name.removesuffix("_ValidTwin")
    return folder.parent / name if name != folder.name else None


def settings(folder, *more):
    return tg.Settings.parse([f"@{folder}", *more])


def pairs(path):
    """{setting: text} that a file names, read without the trainer."""
    words = [word for line in path.read_text().splitlines() for word in line.partition("#")[0].split()]
    named = dict(word.split("=", 1) for word in words)
    assert len(named) == len(words)
    return named


def parameters(s):
    with torch.device("meta"):
        return dict(tg.GPT(s, init=False).named_parameters())


def count(parameters):
    return sum(p.numel() for p in parameters.values())


def over(folders):
    def name(folder):
        known = PUBLISHED.get(folder.name)
        return f"{known.pull_request}{'-twin' * bool(original(folder))}" if known else folder.name

    return pytest.mark.parametrize("folder", folders, ids=name)


each = over(FOLDERS)
TWIN_FOLDERS = [folder for folder in FOLDERS if original(folder)]
ORIGINALS = [folder for folder in FOLDERS if not original(folder)]


# ---- the folders ----------------------------------------------------------------------------------------------------


def test_every_folder_is_in_the_table_and_lies_in_its_track():
    assert {folder.name for folder in FOLDERS} == set(PUBLISHED)
    for folder in FOLDERS:
        accepted = published(folder).pull_request in ACCEPTED
        assert folder.parent.name == ("track_10min_16mb" if accepted else "track_non_record_16mb")
        assert {"settings.env", "README.md"} <= {path.name for path in folder.iterdir()} <= {
            "settings.env", "README.md", "small.env"}


@over(ORIGINALS)
def test_settings_are_the_published_ones(folder):
    """All of them are named in the file, so that no default that changes later can change the record."""
    table, names, s = published(folder).settings, pairs(folder / "settings.env"), settings(folder)
    assert {name.lower() for name in names} == {*table, "data_path"}, (
        "settings.env and the table in tests/test_records.py name different settings; a setting that no record knows is "
        "left out of both, and its default is off")
    variant = "_lossless_caps_caseops_v1_reserved" if s.ttt == "lora_docs" else ""
    assert s.data_path == f"data/datasets/fineweb10B_sp{s.vocab_size}{variant}"
    for name, value in table.items():
        found = getattr(s, name)
        # Rounded values: the rotary base to 6 digits, where recurrence sets in to 3.
        assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


@over(TWIN_FOLDERS)
def test_a_twin_differs_only_in_what_makes_the_original_invalid(folder):
    a, b = pairs(original(folder) / "settings.env"), pairs(folder / "settings.env")
    different = {name: b.get(name, "-") for name in {**a, **b} if a.get(name) != b.get(name)}
    declared = TWINS[published(folder).pull_request]
    assert different == {**declared, **(UNUSED if "TTT" in declared else {})}
    rows = re.findall(r"^\| `([A-Z_]+)` \| [^|]+ \| ([^|]+) \| [^|]+ \|$", (folder / "README.md").read_text(), re.M)
    assert {name: value.replace(" ", "") for name, value in rows} == declared


@each
def test_what_is_invalid_must_be_allowed_and_nothing_else_is(folder):
    broken, file = published(folder).breaks, folder / "settings.env"
    assert pairs(file).get("ALLOW_INVALID") == ("1" if broken else None)
    words = [f"{name}={value}" for name, value in pairs(file).items() if name != "ALLOW_INVALID"]
    if broken:
        with pytest.raises(tg.BadInput, match=rf"\({broken}; #{published(folder).pull_request}\): ALLOW_INVALID=1"):
            tg.Settings.parse(words)
    else:
        assert tg.Settings.parse(words) == settings(folder)


def test_settings_are_strict(tmp_path):
    text = (FOLDERS[0] / "settings.env").read_text()
    (tmp_path / "settings.env").write_text(text.replace("MATRIX_LR=", "MATRX_LR="))
    with pytest.raises(tg.BadInput, match="unknown setting MATRX_LR; did you mean MATRIX_LR"):
        settings(tmp_path)


@each
def test_settings_have_no_neighbour_that_does_nothing(folder):
    assert settings(folder).idle() == {}


@each
def test_exact_number_of_parameters(folder):
    exact = published(folder).parameters
    assert count(parameters(settings(folder))) == exact, (
        "a published model has another number of parameters: a new parameter has to be off by default")
    assert f"**{exact:,} parameters**" in " ".join((folder / "README.md").read_text().split())


@each
def test_readme(folder):
    number, _, score, broken, _ = published(folder)
    text, twin = (folder / "README.md").read_text(), original(folder)
    words = " ".join(text.split())
    first = f"Valid twin of #{number}" if twin else f"#{number}" if number else "Upstream"
    assert re.match(rf"# {first}: \w[^\n]+\n\nIn short: \w", text)
    assert "## Published, not measured here" in text and "have not been run on 8xH100" in words
    if twin:
        assert f"(../{twin.name}/)" in text and "| score | none" in text
    else:
        assert f"| score | {score} BPB" in text and ("**not valid**" in text) == bool(broken)
        assert ("valid, accepted" in text) == (number in ACCEPTED)
        assert (f"({folder.name}_ValidTwin/)" in text.replace("../", "")) == bool(broken)
        deviations = text.partition("## Deviations")[2]
        assert deviations.count("\n- ") >= 5 and "- Packing" in deviations
    met = dict(re.findall(r"^\| (C[1-4]|[\d,]+ bytes|600 s of \w+)\b[^|]* \| ([^|]+) \|", text, re.M))
    assert met.keys() == {"C1", "C2", "C3", "C4", "16,000,000 bytes", "600 s of training", "600 s of evaluation"}
    assert (met.get(broken) == "**no**") == bool(broken)
    assert broken or {met[condition] for condition in ("C1", "C2", "C3", "C4")} == {"yes"}
    place = folder.relative_to(REPO).as_posix()
    for command in (f"bash run.sh {place}\n", f"bash run.sh {place} --small\n", f"\\\n    @{place}\n",
                    "torchrun --standalone --nproc_per_node=8 train_gpt.py ",
                    f"data/fineweb.py --variant {settings(folder).data_path.partition('fineweb10B_')[2]} "):
        assert command in text
    measured = " ".join(text.partition("## Measured here")[2].partition("\n## ")[0].split())
    assert re.search(r"of commit [0-9a-f]{7,12}\b", measured) and "seed 1337" in measured
    assert measured_score(folder)[1] == ("not valid" if broken else "valid")


def measured_score(folder):
    """(BPB, verdict) of the small version that the README reports."""
    (found,) = re.findall(r"\| score \| \*\*([\d.]+) BPB, ((?:not )?valid)\*\* \|", (folder / "README.md").read_text())
    return found


def test_index_has_one_row_per_folder():
    text = generated("index")
    row = (r"^\| ([^|]+) \| \[[^]]+\]\(([^)]+)/\) \| ([\d,]+) \| [^|]+ \| ([\d.]+|-)[^|]* \| ([\d,]+|-) \| (yes|no) \| "
           r"([^|]+) \| ([\d.]+) \|$")
    rows = re.findall(row, text, re.M)
    found = {link: what for what, link, *_ in rows}
    assert len(rows) == len(found) == text.count("](track_")
    for what, link, parameters, score, size, valid, breaks, small in rows:
        number, exact, published_score, broken, _ = published(folder := RECORDS / link)
        assert what == (f"twin of #{number}" if original(folder) else f"#{number}" if number else "upstream")
        assert (parameters, score) == (f"{exact:,}", published_score or "-") and valid == ("no" if broken else "yes")
        conditions = [word for word in breaks.split(", ") if re.fullmatch(r"C\d", word)]
        assert bool(conditions) == bool(broken) and {broken} >= set(conditions) - {"C1"}  # C1 falls with C3
        assert small == measured_score(folder)[0]
        assert size == "-" if original(folder) else f"| submission | {size} bytes" in (folder / "README.md").read_text()
    assert found.keys() == {folder.relative_to(RECORDS).as_posix() for folder in FOLDERS}


# ---- the tables of records/README.md, which tools/records.py makes --------------------------------------------------


def generated(name):
    """The text of a table of records/README.md."""
    return (RECORDS / "README.md").read_text().partition(f"<!-- {name}: ")[2].partition(f"<!-- end of {name} ")[0]


def cells(name):
    """(head, rows) of a table."""
    lines = [line[2:-2].split(" | ") for line in generated(name).splitlines() if line.startswith("| ")]
    return lines[0], lines[1:]


def test_the_tables_are_those_of_the_folders(capsys):
    assert records.main(["--check"]) == 0, capsys.readouterr().out


def test_published_scores_are_the_means_of_their_seeds():
    head, rows = cells("figures")
    places = [head.index(name) for name in ("reported BPB", "of each seed", "standard deviation")]
    several = 0
    for row in rows:
        score, seeds, deviation = (row[place] for place in places)
        values = [float(word) for word in seeds.split(", ") if word != "-"]
        several += len(values) > 1
        if values:
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            assert mean == pytest.approx(float(score), abs=6e-5)
            assert variance ** 0.5 == pytest.approx(float(deviation), abs=6e-6)
    assert several == sum(published(folder).pull_request not in (0, 518) for folder in ORIGINALS)


OFF = (0, False, (), "none", "off")


def test_the_matrix_of_techniques_has_what_was_published():
    """Each cell against the table that was written from the publications; empty where that says off."""
    head, rows = cells("techniques")
    table = {row[1].strip("`").lower(): dict(zip(head, row, strict=True)) for row in rows}
    seen = set()
    for folder in ORIGINALS:
        number, _, _, _, values = published(folder)
        column = f"#{number}" if number else "upstream"
        for name in table.keys() & values.keys() - {"eval_temperature", "warmdown_frac"}:
            cell, value = table[name][column].strip(), values[name]
            if value in OFF:
                assert cell == "", (column, name)
            else:
                read = tg.parse_value(tg.Settings.__dataclass_fields__[name], "1" if cell == "yes" else cell)
                assert read == value, (column, name)
            seen.add(name)
    assert len(seen) > 30
    assert table["warmdown_frac"]["#549"].strip() == "3500 steps" and table["warmdown_frac"]["#1855"].strip() == "0.85"
    assert [table["eval_temperature"][column].strip() for column in ("#1311", "#1033", "#1033 twin", "#549")] == [
        "0.9", "0.98", "0", ""]
    assert table["mixer"]["#1033"].strip() == "hashed" and table["mixer"]["#1033 twin"].strip() == "backoff"
    assert table["matrix_clip_sigmas"]["#549"].strip() == ""  # waits for nothing, and is 0
    assert "trigram_vocab_size" not in table and "`TRIGRAM_VOCAB_SIZE`" in generated("techniques")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of records/ that the tool reads and writes."""
    copy = tmp_path / "records"
    shutil.copytree(RECORDS, copy)
    monkeypatch.setattr(records, "RECORDS", copy)
    return copy


def test_a_changed_folder_changes_the_tables(copied, capsys):
    readme = copied / "README.md"
    before = readme.read_text()
    folder = copied / FOLDERS[0].relative_to(RECORDS)
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("**2.4926 BPB", "**2.4321 BPB"))
    assert records.main(["--check"]) == 1 and readme.read_text() == before
    out = capsys.readouterr().out
    assert "2.4321" in out and "2.4926" in out and "python tools/records.py" in out
    assert records.main([]) == 0 and readme.read_text() == before.replace("2.4926", "2.4321")
    assert records.main(["--check"]) == 0
    (folder / "settings.env").write_text((folder / "settings.env").read_text().replace("VE_DIM=0", "VE_DIM=96 VE_LAYERS=7"))
    assert records.main(["--check"]) == 1 and "96" in capsys.readouterr().out


@pytest.mark.parametrize("missing, said", [
    ("# Upstream: ", "title"), ("In short: ", "In short"), ("**17,059,912 parameters**", "parameters"),
    ("## Measured here", "Measured here"), ("| score | 1.2244 BPB", "row '| score |'"), ("one seed", "score and seeds"),
    ("of commit c80cc1f", "of commit"), ("| expected model | ", "expected model"), ("15,815,847 bytes", "number of bytes")])
def test_a_readme_that_lacks_something_is_named(copied, capsys, missing, said):
    before = (copied / "README.md").read_text()
    readme = copied / FOLDERS[0].relative_to(RECORDS) / "README.md"
    assert missing in readme.read_text()
    readme.write_text(readme.read_text().replace(missing, "something else "))
    assert records.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {readme}: ") and said in error and error.count("\n") == 1
    assert (copied / "README.md").read_text() == before


def test_a_submission_is_no_published_system(copied):
    """tools/submit.py may have made one beside them."""
    folder = copied / "track_10min_16mb/2026-12-01_Mine"
    folder.mkdir()
    for name in ("settings.env", "README.md", "submission.json"):
        (folder / name).write_text("")
    assert records.main(["--check"]) == 0


def test_other_input_that_cannot_be_used(copied, capsys):
    folder = copied / FOLDERS[0].relative_to(RECORDS)
    settings_file = folder / "settings.env"
    text = settings_file.read_text()
    settings_file.write_text(text.replace("MATRIX_LR=", "MATRX_LR="))
    assert records.main([]) == 2 and "did you mean MATRIX_LR" in capsys.readouterr().err
    settings_file.write_text(text)
    index = copied / "README.md"
    index.write_text(index.read_text().replace("<!-- end of bytes -->", ""))
    assert records.main([]) == 2 and "<!-- end of bytes -->" in capsys.readouterr().err
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("| C2: a distribution over all tokens | yes | softmax |", "| C2: a distribution over all tokens | yes |"))
    assert records.main([]) == 2 and "has 2 cells, not 3" in capsys.readouterr().err
    assert records.main(["--chek"]) == 2 and "records.py --help" in capsys.readouterr().err


# ---- what it weighs -------------------------------------------------------------------------------------------------


def weights(folder):
    """{what: (bytes, remark)} of the README's table."""
    section = (folder / "README.md").read_text().partition("## What it weighs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w ]+) \| ([\d,]+) bytes \| ([^|]+) \|$", section, re.M)
    return {what: (int(size.replace(",", "")), remark) for what, size, remark in rows}, section


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """{which: its bytes} as they count today."""
    out = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    done = subprocess.run([sys.executable, "tools/submit.py", "pack", "--out", str(out)], cwd=REPO, env=clean_env(),
                          capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {"readable": (REPO / "train_gpt.py").stat().st_size, "packed": out.stat().st_size}


def verdict(total):
    return "fits" if total <= tg.CONTEST_LIMIT else f"over by {total - tg.CONTEST_LIMIT:,}"


@each
def test_the_command_that_is_said_to_fit_fits(folder, trainers):
    """The published model with the code that is counted here, against the limit."""
    table, section = weights(folder)
    model, s = table["expected model"][0], settings(folder)
    fitted = s.fit != "off"
    for which, size in trainers.items():
        stated = table[f"{which} trainer"][0]
        assert abs(stated - size) < 0.02 * size, (
            f"train_gpt.py has changed its size. {folder.relative_to(REPO)}/README.md, What it weighs: write\n"
            f"| {which} trainer | {size:,} bytes | ... |\n"
            f"| with the {which} trainer | {model + size:,} bytes | {verdict(model + size)} |")
        total, remark = table[f"with the {which} trainer"]
        assert total == model + stated, f"with the {which} trainer: {model} + {stated} bytes are {model + stated:,}"
        assert remark == verdict(total), f"with the {which} trainer: write {verdict(total)!r}"
    fits = {which: table[f"with the {which} trainer"][0] <= tg.CONTEST_LIMIT for which in trainers}
    command = section.partition("```")[2].partition("```")[0]
    assert ("tools/submit.py pack" in command) == (not fits["readable"])
    assert ("FIT=prune" in command) == (not fits["packed"] and not fitted)
    assert folder.relative_to(REPO).as_posix() in command
    assert ("eligible:no" in section) == (not fits["readable"] and not fitted), "what the plain command ends with"
    if not original(folder):
        whole = re.search(r"\| submission \| ([\d,]+) bytes", (folder / "README.md").read_text())[1]
        assert int(whole.replace(",", "")) == model + table["published code"][0]


# ---- the model ------------------------------------------------------------------------------------------------------


@each
def test_the_model_is_that_of_the_specification(folder):
    """Logits, eager, with random weights and adapters in every position, as independent loops in float64 have them."""
    s = tg.Settings.parse([*small(folder), *tiny(folder), "TTT=lora_docs", "TTT_LORA_TARGETS=q,k,v,o,attn,mlp,head",
                           "TTT_LORA_RANK=2", "TTT_LORA_ALPHA=3", "ALLOW_INVALID=1"])
    model, ids = ref.double(s, 1, 0.3), ref.tokens(s.vocab_size, 1, 9, seed=2)
    parameters = ref.arrays(model)
    for model.looping in sorted({False, s.loops}):
        adapters = tg.Adapters(model, s)
        adapters.visits, adapters.dtype = len(model.plan), torch.float64
        flat = torch.randn(1, sum(adapters.sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 0.2
        given = adapters.of(flat)
        pairs = {(visit, what): [z[0].double().numpy() for z in getattr(slot, what).args[:2]]
                 for visit, slot in enumerate(given.slots) for what in ("q", "k", "v", "o", "attn", "mlp")}
        pairs[None, "head"] = [z[0].double().numpy() for z in given.head.args[:2]]
        low = ref.Adapters(pairs, 1.5, s.ttt_lora_scaled)
        with torch.no_grad():
            for one, other in ((None, ref.Adapters()), (given, low)):
                got = model.logits(model.hidden(ids, adapters=one), one)[0].double().numpy()
                want = ref.forward(parameters, s, ids[0].tolist(), model.looping, longest=s.longest_sequence, low=other)[1]
                assert abs(got - want).max() < 1e-5 * max(abs(want).max(), 1)


def test_where_parallel_lanes_part_is_seen_in_the_logits():
    """What two records had wrong, and the reference with them."""
    for folder in ORIGINALS:
        if published(folder).settings.get("parallel_first_skip") != "lane0":
            continue
        args, ids = [*small(folder), *tiny(folder)], torch.arange(2, 11)[None]
        logits = []
        for skip in ("lane0", "both"):
            model = ref.double(tg.Settings.parse([*args, f"PARALLEL_FIRST_SKIP={skip}"]), 1, 0.3)
            with torch.no_grad():
                logits.append(model.logits(model.hidden(ids)))
        assert (logits[0] - logits[1]).abs().max() > 0.01


# ---- small ----------------------------------------------------------------------------------------------------------

# Sizes, and what is counted in steps. Nothing here switches a technique on or off, or moves it to another layer.
SIZES = {"data_path", "vocab_size", "val_tokens", "model_dim", "rope_dims", "train_seq_len", "eval_seq_len",
         "eval_stride", "train_batch_tokens", "micro_batch_tokens", "max_wallclock_seconds", "iterations",
         "warmup_steps",
         "warmdown_iters", "warmdown_seconds", "muon_momentum", "muon_momentum_warmup_steps", "ema_decay",
         "train_log_every", "val_loss_every", "gptq_calibration_tokens", "gptq_reserve_seconds", "awq_lite_group_size", "ttt_chunk_tokens",
         "ttt_batch_seqs", "mixer_min_tokens", "ngram_buckets", "ttt_lora_rank", "ttt_lora_alpha", "ttt_batch_size",
         "ttt_group_docs", "phased_ttt_prefix_docs"}
OWN = SIZES | {"warmdown_frac", "ttt_epochs", "train_seq_schedule", "seq_change_warmup_steps", "ttt_short_chunks"}  # small.env
# Seconds instead of minutes, on the data of the tests; three steps are enough for every loop to set in.
TINY = """VOCAB_SIZE=512 MODEL_DIM=32 TRAIN_SEQ_LEN=64 EVAL_SEQ_LEN=64 TRAIN_BATCH_TOKENS=256 VAL_TOKENS=1200
MICRO_BATCH_TOKENS=128 ITERATIONS=3 MAX_WALLCLOCK_SECONDS=0 LR_WARMUP_STEPS=0 DEVICE=cpu""".split()
TINY_WHERE_ON = dict(COMPRESSOR="zlib", MUON_MOMENTUM_WARMUP_STEPS=2, GPTQ_CALIBRATION_TOKENS=512, TTT_CHUNK_TOKENS=300,
                     MIXER_MIN_TOKENS=300, AWQ_LITE_GROUP_SIZE=8, TRAIN_SEQ_SCHEDULE="32@0.1,64@1", TTT_LORA_RANK=2, TTT_LORA_ALPHA=3.6, TTT_EPOCHS=2, NGRAM_BUCKETS=64)


def tiny(folder):
    """TINY, and of the rest what the record uses."""
    given = pairs(folder / "settings.env")
    rope = [] if settings(folder).rope_dims < 64 else ["ROPE_DIMS=4"]
    return [*TINY, *rope, *(f"{name}={value}" for name, value in TINY_WHERE_ON.items() if name in given)]


def small(folder, *more):
    """The arguments with which run.sh --small calls the trainer."""
    sizes = shrink.sizes([f"@{folder}", *more])
    return [f"@{folder}", *(f"{name}={value}" for name, value in sizes.items()), *more]


def test_small_changes_sizes_only():
    assert {name.lower() for name in pairs(shrink.SHRINK)} == SIZES
    for path in RECORDS.glob("*/*/small.env"):
        assert {name.lower() for name in pairs(path)} <= OWN


@each
def test_small_keeps_every_technique(folder):
    """The same visits of the same layers, and every parameter of the record by name: only the shapes are smaller."""
    full, little = settings(folder), tg.Settings.parse(small(folder))
    assert little.idle() == {}
    changed = {f.name for f in fields(tg.Settings) if getattr(full, f.name) != getattr(little, f.name)}
    assert changed <= OWN, f"--small changes {changed - OWN}: no size by SIZES in tests/test_records.py"
    for looping in {False, full.loops}:
        assert tg.layer_plan(little, looping) == tg.layer_plan(full, looping)
    big, short = parameters(full), parameters(little)
    assert list(big) == list(short) and count(short) < count(big) / 20
    assert all(a.ndim == b.ndim and a.numel() >= b.numel() for a, b in zip(big.values(), short.values()))
    assert little.num_heads / little.num_kv_heads == full.num_heads / full.num_kv_heads
    assert little.rope_dims / little.head_dim == full.rope_dims / full.head_dim
    assert (little.eval_seq_len > little.train_seq_len) == (full.eval_seq_len > full.train_seq_len)
    assert (little.data_path.endswith("_caseops")) == ("caseops" in full.data_path)
    assert little.ttt_lora_alpha / little.ttt_lora_rank == full.ttt_lora_alpha / full.ttt_lora_rank


@each
def test_small_keeps_what_is_in_parts_in_parts(folder):
    """Chunks, groups and phases come several times, n-grams are asked, buckets get as full as the published ones."""
    s = tg.Settings.parse(small(folder))
    if s.ttt == "full":
        assert s.val_tokens >= 8 * s.ttt_chunk_tokens > 8 * s.eval_seq_len
    if s.mixer != "off":
        assert s.val_tokens >= 8 * s.mixer_min_tokens
    if s.mixer == "hashed":  # 62 million tokens in 2^22 buckets
        assert s.val_tokens / s.ngram_buckets == pytest.approx(62_021_632 / 2**22, rel=0.1)
    if s.ttt == "lora_docs":
        assert s.phased_ttt_num_phases <= s.phased_ttt_prefix_docs < s.ttt_group_docs < 8
    if s.ttt in ("before", "prequant"):
        assert s.val_tokens / s.eval_seq_len >= 4 * s.ttt_batch_seqs


@each
def test_small_keeps_the_share_of_the_run_in_which_the_learning_rate_falls(folder):
    """3,500 of the some 7,000 steps that the early systems make are half of the run, whatever its length; 1,200 of the
    13,780 of the baseline less than a tenth.
    """
    full, little = settings(folder), tg.Settings.parse(small(folder))
    steps = 7000 if published(folder).pull_request else 13_780
    for part in (0.25, 0.75, 0.96):
        middle = tg.lr_scale(full, part, 5000, steps)
        assert tg.lr_scale(little, part, 150, 200) == pytest.approx(middle, abs=0.02)


def test_a_size_gives_way_to_the_record_the_environment_and_the_command(tmp_path):
    (tmp_path / "settings.env").write_text("EVAL_STRIDE=0 PHASED_TTT_PREFIX_DOCS=0 TTT=full MIXER=off AVERAGE=none\n"
                                           "FIT=off MATRIX_QUANT=rtn EMBED_QUANT=rtn\n")
    mine = f"@{tmp_path}"
    sizes = shrink.sizes([mine])
    assert sizes["MODEL_DIM"] == "64" and sizes["TTT_CHUNK_TOKENS"] == "1024"
    assert not {"EVAL_STRIDE", "PHASED_TTT_PREFIX_DOCS", "GPTQ_CALIBRATION_TOKENS", "EMA_DECAY", "MIXER_MIN_TOKENS",
                "TTT_LORA_RANK"} & sizes.keys()
    assert "MIXER_MIN_TOKENS" in shrink.sizes([mine, "MIXER=hedge"])  # what the command adds gets its size, too
    assert "TRAIN_SEQ_LEN" not in shrink.sizes([mine], {"TRAIN_SEQ_LEN": "64"})
    (tmp_path / "small.env").write_text("MODEL_DIM=32 # enough\nTTT_EPOCHS=1\n")
    own = {**sizes, "MODEL_DIM": "32", "TTT_EPOCHS": "1"}
    assert shrink.sizes([mine]) == shrink.sizes([f"{mine}/settings.env"]) == own


def test_sizes_as_a_command(tmp_path):
    def call(*args):
        return subprocess.run([sys.executable, str(REPO / "tools/shrink.py"), *args], env=clean_env(), text=True,
                              capture_output=True, timeout=60, check=False)

    given = f"@{FOLDERS[0]}", "EVAL_SEQ_LEN=32"
    done = call(*given)
    assert done.returncode == 0 and done.stderr == ""
    assert dict(line.split("=") for line in done.stdout.splitlines()) == shrink.sizes(given)
    done = call(f"@{FOLDERS[0]}", "MATRX_LR=1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: argument: unknown setting MATRX_LR; did you mean MATRIX_LR?\n"


def check_small_run(folder, out_dir, args):
    """The run had the record's techniques, reached all of them, and ended with a score and the verdict."""
    wanted, broken = tg.Settings.parse(small(folder, *args)), published(folder).breaks
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["valid"] == ("no" if broken else "yes") and bool(broken) == bool(summary["reasons"])
    assert not broken or any(reason.startswith(broken) for reason in summary["reasons"])  # a self-test finds more
    assert summary["steps"] == 3 and 0 < summary["val_bpb"] < 5
    assert summary["params"] == count(parameters(wanted))
    ran = tg.Settings.parse(shlex.split(summary["settings"]))
    assert ran.sha256() == wanted.sha256()  # every setting but those of the room Run
    assert not [event for event in events(out_dir, "never_reached") if event["what"] != "warmdown"]
    assert not [event for event in events(out_dir, "warning") if "setting" in event]
    assert tg.load_artifact(out_dir / "model.pg")[1].looping == wanted.loops


THROUGH_RUN_SH = [folder for folder in ORIGINALS if published(folder).pull_request in (1855, 1539)]


@over(THROUGH_RUN_SH)
def test_run_sh_record_small(folder, toy, tmp_path):
    """The newcomer's command on a copy of the repository, with the trainer, the settings and the report as they are."""
    root, out_dir = tmp_path / "repository", tmp_path / "out"
    for name in ("records", "tools", "data"):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("datasets", "tokenizers"))
    for name in ("run.sh", "train_gpt.py"):
        shutil.copy(REPO / name, root / name)
    (root / "requirements.txt").write_text("# nothing to install\n")
    args = [*tiny(folder), toy[0]]
    command = ["bash", "run.sh", folder.relative_to(REPO).as_posix(), "--small", f"OUT_DIR={out_dir}", *args]
    done = subprocess.run(command, cwd=root, env=clean_env({"VENV": sys.prefix}), stdin=subprocess.DEVNULL, timeout=300,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"\nRun {out_dir}: finished\n" in done.stdout
    check_small_run(folder, out_dir, args)


# Between them they have most techniques; .ci/records.py runs all records twice, at their small sizes.
CUT_DOWN = [folder for folder in FOLDERS if folder.name in (
    "2026-03-17_NaiveBaseline", "2026-04-30_V19_PR1908_AsymLogit_WD2",
    "2026-03-27_SGD_TTT_HedgeMixer_PerLayerLR_1.0450")]
SAME = ("artifact_sha256", "val_bpb", "val_loss", "val_tokens", "val_bytes", "valid", "tested", "steps", "params")


@over(CUT_DOWN)
def test_the_trainer_cut_down_to_a_record_is_that_record(folder, toy, tmp_path):
    """Alone in a folder: the same losses, artifact, score and verdict; what is fixed is refused; nothing is undefined."""
    args = [*small(folder)[1:], *tiny(folder), toy[0]]
    script = tmp_path / "cut/train_gpt.py"
    assert submit.main(["specialise", str(folder), *args, "-o", str(script)]) == 0
    lines, whole = (path.read_text().count("\n") for path in (script, REPO / "train_gpt.py"))
    assert lines < (0.5 if "Baseline" in folder.name else 0.66) * whole
    # Nothing that makes a score invalid is lost, but what only predictors that learn can break.
    lost = conditions(REPO / "train_gpt.py") - conditions(script)
    assert all("when the predictor learnt from it" in condition for condition in lost)
    lint = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(script)]
    done = subprocess.run(lint, capture_output=True, text=True, check=False, env=clean_env())
    assert done.returncode == 0, done.stdout
    good(call([f"@{folder}", *args, f"OUT_DIR={tmp_path}/whole"]))
    good(run_trainer(["OUT_DIR=out"], cwd=script.parent, script=script))
    found = [json.loads((out / "summary.json").read_text()) for out in (tmp_path / "whole", script.parent / "out")]
    # Positions for the sums of an invalid mixture are drawn anew each time.
    whole_reasons, reasons = ([re.sub(r"off by \S+|[0-9.]+ for the mean.*", "", reason) for reason in summary.pop("reasons")
                               if "sampled" not in reason] for summary in found)
    assert reasons == whole_reasons
    assert {name: found[1].get(name) for name in SAME} == {name: found[0].get(name) for name in SAME}
    assert losses(tmp_path / "whole") == losses(script.parent / "out") != []
    done = run_trainer(["MODEL_DIM=64", "OUT_DIR=other"], cwd=script.parent, script=script)
    assert done.returncode == 2 and "MODEL_DIM is a constant of this script" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "DATA_PATH=" in good(run_trainer(["--help"], cwd=script.parent, script=script)).stdout
    watches(script, toy[0].partition("=")[2])


def conditions(script):
    """What the ledger is asked for in a script: the texts of its reasons and obstacles."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("need"):
            words = [part.value for part in ast.walk(node.args[-1]) if isinstance(part, ast.Constant)]
            found.add(" ".join(word for word in words if isinstance(word, str)))
    return found


def watches(script, data):
    """The ledger of this script still hears who opens a shard when."""
    spec = importlib.util.spec_from_file_location("cut", script)
    cut = importlib.util.module_from_spec(spec)
    sys.modules["cut"] = cut  # where dataclasses look
    spec.loader.exec_module(cut)
    ledger = cut.Validity()
    with ledger.watch(data):
        next(Path(data).glob("fineweb_val_*.bin")).read_bytes()
    assert ledger.reasons == [cut.OPENED_EARLY]


@over([folder for folder in FOLDERS if folder not in THROUGH_RUN_SH])
def test_every_other_record_small(folder, toy, tmp_path):
    args = [*tiny(folder), toy[0], "SELFTEST=0"]  # .ci/records.py tests all of them, run.sh two here
    good(call([*small(folder, *args), f"OUT_DIR={tmp_path}"]))
    check_small_run(folder, tmp_path, args)
