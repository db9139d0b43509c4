"""Small sound folders of a submission, written by hand from the contest's rules: one in the form of the published
scripts, one in that of ours. A test plants a fault and sees what is found.

    folder = contest_folder(tmp_path)
    change(folder / "train_seed42.log", "seed:42", "seed:43")
"""

import hashlib
import json
import math
import statistics

RULE = "=" * 100
SEEDS = {1337: 1.12340123, 42: 1.12410456, 7: 1.12300789}  # bits per byte; their mean is 1.12350456
MODEL_BYTES = 15_900_000
TRAIN_MS = 599_950
EVAL_MS = 95_000
# sp1024 (rules.md 5.4): the baseline scores this many targets, of this many bytes.
TARGETS = 62_021_632
BYTES = 151_079_964

SCRIPT = '''\
"""A script that trains and scores nothing."""

import os
import sys

import numpy
import torch
import torch.nn.functional as F


class Settings:
    seed = int(os.environ.get("SEED", 1337))


def main():
    print(f"seed:{Settings.seed}", torch.__version__, numpy.__version__, F.__name__, sys.version)


if __name__ == "__main__":
    main()
'''


def loss_of(bpb, tokens=TARGETS, size=BYTES):
    """Nats per token of a score: bpb = loss / ln 2 * tokens / bytes."""
    return bpb * math.log(2) * size / tokens


def change(path, old, new):
    """Replace a text that is there, wherever it is there."""
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new))


def edit_json(folder, **fields):
    """Set fields of submission.json; None removes one."""
    path = folder / "submission.json"
    record = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}, indent=1))


def add_line(path, line, after):
    """Add a line below the first one that begins with `after`."""
    lines = path.read_text().splitlines()
    place = next(number for number, text in enumerate(lines) if text.startswith(after))
    lines.insert(place + 1, line)
    path.write_text("\n".join(lines) + "\n")


# ---- the form of the published scripts ------------------------------------------------------------------------------


def contest_log(seed, bpb, script=SCRIPT, size=BYTES):
    """A log as late records of March have it: source, machine, steps, sizes, scores; `size` bytes are counted."""
    code_bytes = len(script.encode())
    loss = loss_of(bpb, size=size)
    rows = "\n".join(f"|   {gpu}  NVIDIA H100 80GB HBM3          On  |   00000000:0{gpu}:00.0 Off |                    0 |"
                     for gpu in range(8))
    steps = "\n".join(f"step:{step}/20000 train_loss:{8 - step / 2000:.4f} train_time:{step * 85}ms step_avg:85.00ms"
                      for step in (1, 2, 500, 1000, 4000, 7000))
    return f"""\
{script}
{RULE}
Running Python 3.12.3 (main, Nov  6 2025, 13:44:16) [GCC 13.3.0]
Running PyTorch 2.9.1+cu128
{rows}

{RULE}
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{TARGETS}
model_params:26993756
world_size:8 grad_accum_steps:1
attention_mode:gqa num_heads:8 num_kv_heads:4
tie_embeddings:True embed_lr:0.035 head_lr:0.0 matrix_lr:0.025 scalar_lr:0.025
train_batch_tokens:786432 train_seq_len:2048 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
seed:{seed}
{steps}
step:7058/20000 val_loss:{loss + 0.05:.4f} val_bpb:{bpb + 0.03:.4f} train_time:{TRAIN_MS}ms step_avg:85.00ms
stopping_early: wallclock_cap train_time:{TRAIN_MS}ms step:7058/20000
peak memory allocated: 20672 MiB reserved: 20718 MiB
Serialized model: 106178569 bytes
Code size: {code_bytes} bytes
Serialized model int6+lzma: {MODEL_BYTES} bytes
Total submission size int6+lzma: {MODEL_BYTES + code_bytes} bytes
final_int6_sliding_window val_loss:{loss:.4f} val_bpb:{bpb:.4f} stride:64 eval_time:{EVAL_MS}ms
final_int6_sliding_window_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""


def contest_record(script=SCRIPT, seeds=SEEDS, size=BYTES):
    total = MODEL_BYTES + len(script.encode())
    losses = {seed: loss_of(bpb, size=size) for seed, bpb in seeds.items()}
    return {
        "author": "A Person", "github_id": "person", "name": "A sound submission", "blurb": "Nothing new.",
        "date": "2026-04-01", "track": "10min_16mb", "val_bpb": statistics.fmean(seeds.values()),
        "val_loss": statistics.fmean(losses.values()), "val_bpb_std": statistics.stdev(seeds.values()), "seeds": [*seeds],
        "seed_results": {str(seed): {"val_bpb": bpb, "val_loss": losses[seed], "artifact_bytes": total}
                         for seed, bpb in seeds.items()},
        "bytes_total": total, "bytes_code": len(script.encode()), "hardware": "8xH100 80GB SXM", "p_value": 0.001}


def contest_folder(root, script=SCRIPT, seeds=SEEDS, size=BYTES):
    """A record of three seeds in which nothing is wrong, as long as `size` is the bytes of the text."""
    folder = root / "records/track_10min_16mb/2026-04-01_Sound"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# A sound submission\n")
    (folder / "train_gpt.py").write_text(script)
    (folder / "submission.json").write_text(json.dumps(contest_record(script, seeds, size), indent=1))
    for seed, bpb in seeds.items():
        (folder / f"train_seed{seed}.log").write_text(contest_log(seed, bpb, script, size))
    return folder


# ---- our form -------------------------------------------------------------------------------------------------------

SETTINGS = "DATA_PATH=data/datasets/fineweb10B_sp1024 MATRIX_LR=0.025"
MODEL = b"a model"


def our_summary(seed, bpb, script=SCRIPT, **facts):
    code_bytes = len(script.encode())
    return {
        "steps": 7058, "train_tokens": 5_550_637_056, "val_documents_in_training": 0, "code_bytes": code_bytes,
        "model_bytes": MODEL_BYTES, "total_bytes": MODEL_BYTES + code_bytes,
        "artifact_sha256": hashlib.sha256(MODEL).hexdigest(), "documents_decoded": 50_000, "val_bpb": bpb,
        "val_loss": loss_of(bpb), "val_tokens": TARGETS, "val_bytes": BYTES, "tested": "yes",
        "tests": ["flip", "prefix", "sum", "ends"], "valid": "yes", "reasons": [], "eligible": "yes",
        "eligible_reasons": [], "train_seconds": 590.0, "calibrate_seconds": 4.0, "export_seconds": 30.0,
        "eval_seconds": 95.0, "seed": seed, "world_size": 8, "device": "NVIDIA H100 80GB HBM3",
        "settings": f"{SETTINGS} SEED={seed}", "settings_hash": hashlib.sha256(SETTINGS.encode()).hexdigest(),
        "code_sha256": hashlib.sha256(script.encode()).hexdigest()} | facts


def our_log(summary, script=SCRIPT):
    """A log of train_gpt.py: source, then `event key:value`, and the summary last."""
    seed = summary["seed"]
    bpb = summary["val_bpb"]
    loss = summary["val_loss"]
    steps = "\n".join(f"step:{step} train_loss:{8 - step / 2000:.4f} train_time:{step * 83}ms step_avg:83.00ms"
                      for step in (1, 2, 500, 1000, 4000, 7000))
    return f"""\
{script}
{RULE}
Running Python 3.11.7 (main) [GCC 12.2.0]
Running PyTorch 2.9.1+cu128
{RULE}
run out_dir:logs/{seed} commit:0123456789ab changed_files:0 code_sha256:{summary["code_sha256"][:16]} torch:2.9.1+cu128 world_size:8
settings {SETTINGS} SEED={seed}
choice device:cuda reason:DEVICE=auto
choice attention:fa3 reason:ATTENTION=auto
val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=data/tokenizers/fineweb_1024_bpe.model
val_loader:shards pattern=data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{summary["val_tokens"]}
train_loader:dataset:fineweb10B_sp1024 train_shards:80 tokens:8000000000 order:shuffled
model_params:26993756
{steps}
step:7058 val_loss:{loss + 0.05:.4f} val_bpb:{bpb + 0.03:.4f} train_time:590000ms step_avg:83.59ms
stopping_early: wallclock_cap train_time:590000ms step:7058
calibrate source:train tokens:65536 seconds:4.000 reserved_seconds:9.000
artifact code_bytes:{summary["code_bytes"]} model_bytes:{summary["model_bytes"]} total_bytes:{summary["total_bytes"]} limit_bytes:16000000
Total submission size gptq+lzma: {summary["total_bytes"]} bytes
bytes documents_decoded:50000 share:1 wrong:0 val_tokens:{summary["val_tokens"]} val_bytes:{summary["val_bytes"]} counted_by:table
selftest test:flip ok:yes off_by:0 ranks:8
final_gptq_sliding_window val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:95000ms valid:{summary["valid"]} tested:yes
summary {json.dumps(summary)}
"""


def our_record(summaries, script=SCRIPT):
    """The submission.json of these runs."""
    first = summaries[0]
    return {
        "author": "A Person", "github_id": "person", "name": "A sound submission", "blurb": "Nothing new.",
        "date": "2026-04-01", "track": "10min_16mb",
        "val_bpb": statistics.fmean([summary["val_bpb"] for summary in summaries]),
        "val_loss": statistics.fmean([summary["val_loss"] for summary in summaries]),
        "seeds": [summary["seed"] for summary in summaries],
        "seed_results": {str(summary["seed"]): {"val_bpb": summary["val_bpb"], "val_loss": summary["val_loss"],
                                                "artifact_bytes": summary["total_bytes"]} for summary in summaries},
        "bytes_total": max(summary["total_bytes"] for summary in summaries), "bytes_code": first["code_bytes"],
        "hardware": "8 x NVIDIA H100 80GB HBM3", "world_size": 8, "val_bytes": first["val_bytes"],
        "val_tokens": first["val_tokens"], "code_sha256": first["code_sha256"],
        "config_sha256": first["settings_hash"], "p_value": 0.001}


def our_folder(root, script=SCRIPT, facts=None):
    """A record of three of our runs in which nothing is wrong. `facts`: {seed: what its summary says instead}."""
    folder = root / "records/track_10min_16mb/2026-04-01_Ours"
    folder.mkdir(parents=True)
    summaries = [our_summary(seed, bpb, script, **(facts or {}).get(seed, {})) for seed, bpb in SEEDS.items()]
    (folder / "README.md").write_text("# A sound submission\n")
    (folder / "train_gpt.py").write_text(script)
    (folder / "settings.env").write_text(SETTINGS.replace(" ", "\n") + "\n")
    (folder / "submission.json").write_text(json.dumps(our_record(summaries, script), indent=1))
    for (seed, _), summary in zip(SEEDS.items(), summaries):
        (folder / f"train_seed{seed}.log").write_text(our_log(summary, script))
    return folder
