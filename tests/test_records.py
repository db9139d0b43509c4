"""The record folders: each is the published system, by a table that was written from the publications and not from the
settings files; each can be read by somebody who has only its README; each runs small with every technique on."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO, clean_env
from runs import call, good

import train_gpt as tg

RECORDS = REPO / "records"
FOLDERS = sorted(path for path in RECORDS.glob("*/*/") if path.is_dir())

# ---- what was published ---------------------------------------------------------------------------------------------

BODY = dict(num_layers=11, model_dim=512, num_heads=8, num_kv_heads=4, leaky_slope=0.5, embed_dim=0, logit_softcap=30,
            tie_embeddings=True, tied_embed_init_std=0.005, rope_dims=16, ln_scale=True, resid_mix=True,
            trigram_vocab_size=0, value_residual="none", train_batch_tokens=786_432, train_seq_len=2048,
            warmup_steps=20, iterations=20_000, lr_warmup_steps=0, complement_alpha=0, mtp_num_heads=0,
            matrix_optimizer="muon", muon_momentum=0.99, muon_momentum_warmup_start=0.92,
            muon_momentum_warmup_steps=1500, normuon=False, beta1=0.9, beta2=0.95, adam_eps=1e-8, grad_clip_norm=0.3,
            average="ema", ema_start_frac=0, min_lr=0, matrix_bits=6, embed_bits=8, eval_seq_len=2048, eval_stride=64,
            val_loss_every=4000, train_log_every=500, fit="off", late_qat_threshold=0, gate_bits=16,
            lqer_rank=0, prune_pct=0)
EARLY = dict(BODY, vocab_size=1024, mlp_mult=3, qk_gain_init=1.5, rope_base=10_000 * 2 ** (8 / 7), xsa_last_n=4,
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

# folder: (pull request, parameters, published BPB, is that score valid, settings)
PUBLISHED = {
    "2026-03-23_11L-CosineTTT": (518, 26_993_756, "1.0622", False, dict(EARLY, compressor="zstd")),
    "2026-04-03_11L_LeakyReLU2_EMA_LZMA_Int6": (1311, 26_993_756, "1.1303", True, dict(
        EARLY, lr_warmup_steps=50, iterations=12_000, eval_stride=16, val_loss_every=2000, train_log_every=200,
        compressor="lzma")),
    "2026-03-28_ComplementaryBackoff_NgramMixer": (1033, 26_993_766, "0.4311", False, dict(
        EARLY, value_residual="vrl", complement_alpha=0.5, compressor="lzma")),
    "2026-03-27_SGD_TTT_HedgeMixer_PerLayerLR_1.0450": (967, 33_317_980, "1.0450", False, dict(
        EARLY, num_kv_heads=8, mlp_mult=3.5, xsa_last_n=11, bigram_vocab_size=6144, max_wallclock_seconds=582,
        matrix_bits=5, matrix_quant="gptq", matrix_clip_sigmas=0, prune_pct=0.03, gptq_calibration="train",
        gptq_calibration_tokens=128 * 2048, gptq_damp=0.01, compressor="zstd")),
    "2026-04-11_SP8192_PreQuantTTT_CompiledTTT": (1539, 36_311_132, "1.0587", False, dict(
        LATE, qk_gain_init=5.25, rope_base=10_000 * 2 ** (8 / 7), smear_gate="channel", doc_mask="inputs", ve_dim=44,
        ve_layers=(9, 10), attn_gate="none", skips="linear", skip_pairs=5, num_loops=1,
        enable_looping_at=3000 * 0.1002 / 600,  # it loops from step 3,000, with 100.2 ms a step before
        parallel_residual="lanes", parallel_start_layer=7, parallel_final_lane="learned", loader="sequential",
        matrix_lr=0.022, muon_backend_steps=4, newton_schulz="polar_express", embed_wd=0.095, warmdown_frac=0.72,
        embed_quant="rtn", embed_clip_sigmas=20, gptq_calibration="generated", gptq_calibration_tokens=32 * 2048,
        gptq_temperature=0.8, gptq_damp=0.02, fit="prune", size_limit=int(15.22 * 2**20), compressor="brotli")),
    "2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT": (1493, 35_944_536, "1.0810", True, dict(
        LATE, **LOOPS, qk_gain_init=5.25, smear_gate="none", doc_mask="none", attn_gate="none",
        parallel_residual="gptj", parallel_start_layer=7, loader="shuffled", matrix_lr=0.022, newton_schulz="classic",
        warmdown_frac=0.72, gptq_reserve_seconds=12, **PACKED, embed_clip_sigmas=20,
        gptq_calibration_tokens=64 * 98_304, compressor="brotli")),
    "2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611": (1855, 35_945_671, "1.0611", True, dict(
        {name: value for name, value in LATE.items() if name != "train_log_every"}, **LOOPS, qk_gain_init=5.0,
        smear_gate="scalar", gate_window=12, doc_mask="attention", attn_gate="sparse", sparse_attn_gate_scale=0.5,
        parallel_residual="routed", parallel_start_layer=8, parallel_final_lane="mean", loader="packed",
        micro_batch_tokens=98_304, matrix_lr=0.026, muon_momentum=0.97, newton_schulz="polar_express", beta2=0.99,
        warmdown_frac=0.85, min_lr=0.1, gptq_reserve_seconds=0.5, embed_bits=7, val_loss_every=0, **PACKED,
        attn_clip_sigmas=13, mlp_clip_sigmas=11.5, embed_clip_sigmas=14, gate_bits=8, lqer_rank=4, lqer_top_k=3,
        lqer_asym_group=64, gptq_calibration_tokens=16 * 98_304, compressor="rans")),
}
ACCEPTED = {1493, 1855}


def published(folder):
    return PUBLISHED[folder.name]


def settings(folder, *more):
    return tg.Settings.parse([f"@{folder}", *more])


def named(path):
    """The settings that a file names, read without the trainer."""
    words = [word for line in path.read_text().splitlines() for word in line.partition("#")[0].split()]
    return [word.partition("=")[0].lower() for word in words]


def parameters(s):
    with torch.device("meta"):
        return dict(tg.GPT(s, init=False).named_parameters())


def count(parameters):
    return sum(p.numel() for p in parameters.values())


def over(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda f: str(PUBLISHED.get(f.name, [f.name])[0]))


each = over(FOLDERS)


# ---- the folders ----------------------------------------------------------------------------------------------------


def test_every_folder_is_in_the_table_and_lies_in_its_track():
    assert {folder.name for folder in FOLDERS} == set(PUBLISHED)
    for folder in FOLDERS:
        accepted = published(folder)[0] in ACCEPTED
        assert folder.parent.name == ("track_10min_16mb" if accepted else "track_non_record_16mb")
        assert {path.name for path in folder.iterdir()} >= {"settings.env", "README.md"}


@each
def test_settings_are_the_published_ones(folder):
    """All of them are named in the file, so that no default that changes later can change the record."""
    _, _, _, _, table = published(folder)
    names, s = named(folder / "settings.env"), settings(folder)
    assert len(names) == len(set(names)) and set(names) == {*table, "data_path"}
    assert s.data_path == f"data/datasets/fineweb10B_sp{s.vocab_size}"
    for name, value in table.items():
        found = getattr(s, name)
        # Rounded values: the rotary base to 6 digits, where recurrence sets in to 3.
        assert found == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


@each
def test_settings_have_no_neighbour_that_does_nothing(folder):
    assert settings(folder).idle() == {}


@each
def test_exact_number_of_parameters(folder):
    _, exact, _, _, _ = published(folder)
    assert count(parameters(settings(folder))) == exact
    assert f"**{exact:,} parameters**" in " ".join((folder / "README.md").read_text().split())


@each
def test_readme(folder):
    number, _, score, valid, _ = published(folder)
    text = (folder / "README.md").read_text()
    assert re.match(rf"# #{number}: \w", text)
    assert "published, not measured here" in text.lower() and "have not been run on 8xH100" in " ".join(text.split())
    assert f"| score | {score} BPB" in text and ("**not valid**" in text) != valid
    assert ("valid, accepted" in text) == (number in ACCEPTED)
    place = folder.relative_to(REPO).as_posix()
    for command in (f"bash run.sh {place}\n", f"bash run.sh {place} --small\n", f"\\\n    @{place}\n",
                    "torchrun --standalone --nproc_per_node=8 train_gpt.py "):
        assert command in text
    deviations = text.partition("## Deviations")[2]
    assert deviations.count("\n- ") >= 5 and "Packing" in deviations


def test_index_has_one_row_per_folder():
    text = (RECORDS / "README.md").read_text()
    row = r"^\| #(\d+) \| \[[^]]+\]\(([^)]+)\) \| ([\d,]+) \| .* \| ([\d.]+),.* \| (yes|no|a proper)\b"
    rows = re.findall(row, text, re.M)
    found = {link: (int(number), int(exact.replace(",", "")), score, valid != "no")
             for number, link, exact, score, valid in rows}
    assert len(rows) == len(found)
    assert found == {f"{folder.relative_to(RECORDS).as_posix()}/": published(folder)[:4] for folder in FOLDERS}


# ---- small ----------------------------------------------------------------------------------------------------------

SHRINK = RECORDS / "shrink.env"
# Sizes, and what is counted in steps. Nothing here switches a technique on or off, or moves it to another layer.
SIZES = {"data_path", "vocab_size", "model_dim", "rope_dims", "train_seq_len", "eval_seq_len", "eval_stride",
         "train_batch_tokens", "micro_batch_tokens", "max_wallclock_seconds", "iterations", "warmup_steps",
         "warmdown_iters", "warmdown_seconds", "muon_momentum", "muon_momentum_warmup_steps", "ema_decay",
         "train_log_every", "val_loss_every", "gptq_reserve_seconds"}
# Seconds instead of minutes, on the data of the tests; three steps are enough for every loop to set in.
TINY = """VOCAB_SIZE=512 MODEL_DIM=32 TRAIN_SEQ_LEN=64 EVAL_SEQ_LEN=64 EVAL_STRIDE=32 TRAIN_BATCH_TOKENS=256
VAL_TOKENS=2000 MICRO_BATCH_TOKENS=128 ITERATIONS=3 MAX_WALLCLOCK_SECONDS=0 MUON_MOMENTUM_WARMUP_STEPS=2
LR_WARMUP_STEPS=0 COMPRESSOR=zlib DEVICE=cpu""".split()


def tiny(folder):
    """TINY, and as little text for GPTQ where a record has it."""
    return [*TINY, *(["GPTQ_CALIBRATION_TOKENS=512"] if settings(folder).needs_moments else [])]


def test_shrink_changes_sizes_only():
    assert set(named(SHRINK)) == SIZES


@each
def test_small_keeps_every_technique(folder):
    """The same visits of the same layers, and every parameter of the record by name: only the shapes are smaller."""
    full, small = settings(folder), settings(folder, f"@{SHRINK}")
    assert small.idle() == {}
    for looping in {False, full.loops}:
        assert tg.layer_plan(small, looping) == tg.layer_plan(full, looping)
    big, little = parameters(full), parameters(small)
    assert list(big) == list(little) and count(little) < count(big) / 20
    assert all(a.ndim == b.ndim and a.numel() >= b.numel() for a, b in zip(big.values(), little.values()))
    assert small.num_heads / small.num_kv_heads == full.num_heads / full.num_kv_heads
    assert small.rope_dims / small.head_dim == full.rope_dims / full.head_dim


@each
def test_small_keeps_the_share_of_the_run_in_which_the_learning_rate_falls(folder):
    """3,500 of the some 7,000 steps that the early systems make are half of the run, whatever its length."""
    full, small = settings(folder), settings(folder, f"@{SHRINK}")
    middle = tg.lr_scale(full, 0.75, 5000, 7000)
    assert tg.lr_scale(small, 0.75, 150, 200) == pytest.approx(middle)



def events(out_dir, name):
    lines = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


def check_small_run(folder, out_dir, args):
    """The run had the record's techniques, reached all of them, and ended with a valid score of its artifact."""
    wanted = settings(folder, f"@{SHRINK}", *args)
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["valid"] == "yes" and summary["steps"] == 3 and 0 < summary["val_bpb"] < 5
    assert summary["params"] == count(parameters(wanted))
    ran = tg.Settings.parse(shlex.split(summary["settings"]))
    assert ran.sha256() == wanted.sha256()  # every setting but those of the room Run
    assert not [event for event in events(out_dir, "never_reached") if event["what"] != "warmdown"]
    assert not [event for event in events(out_dir, "warning") if "setting" in event]
    assert tg.load_artifact(out_dir / "model.pg")[1].looping == wanted.loops


THROUGH_RUN_SH = [folder for folder in FOLDERS if PUBLISHED.get(folder.name, [0])[0] in (1855, 1539)]


@over(THROUGH_RUN_SH)
def test_run_sh_record_small(folder, toy, tmp_path):
    """The newcomer's command on a copy of the repository, with the trainer, the settings and the report as they are."""
    root, out_dir = tmp_path / "repository", tmp_path / "out"
    for name in ("records", "tools"):
        shutil.copytree(REPO / name, root / name)
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


@over([folder for folder in FOLDERS if folder not in THROUGH_RUN_SH])
def test_every_other_record_small(folder, toy, tmp_path):
    args = [*tiny(folder), toy[0]]
    good(call([f"@{folder}", f"@{SHRINK}", *args, f"OUT_DIR={tmp_path}"]))
    check_small_run(folder, tmp_path, args)
