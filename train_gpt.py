"""One file that trains, averages, quantises, packs, reloads and scores a small GPT for the Parameter Golf contest:
the lowest bits per byte (BPB) whose code + compressed weights fit in 16,000,000 bytes.

    bash run.sh                                                     the demo: sets everything up, trains, scores
    torchrun --standalone --nproc_per_node=8 train_gpt.py           the real thing
    python train_gpt.py @records/small.env MATRIX_LR=0.03 SEED=7    settings: default < @file < environment < KEY=VALUE
    python train_gpt.py --help                                      every setting with its default and a sentence

The rooms of this file, in reading order
     1 Settings      one frozen dataclass: the field is the environment variable; settings from outside
     2 Model parts   norm, Linear, tables, rotary, SmearGate, n-gram hash, value embedding, gates, attention, MLP
     3 Model         skips, parallel lanes, layer plan, Block, GPT, the training objective, roles
     4 Runtime       device, dtype, ranks
     5 Optimizer     orthogonalisation, MuonAdam for 1..N ranks, schedules, complementary weights, weight averages
     6 Data          shards, tokenizer and bytes per token, training stream, validation stream
     7 Quantisation  calibration, rounding, GPTQ, LQER, codecs, allocation, pruning, late QAT
     8 Entropy coder of integer codes
     9 Artifact      container, compressors, save, load, size
    10 Evaluation    windows and the one score loop: the definition of the metric
    11 Validity      the ledger, the examiner, the proof of the bytes, the self-test
    12 Predictors    what is scored: the model, test-time training, n-grams, the tilt
    13 Invalid originals, whose score is not valid
    14 Kernels       fused kernels beside their reference, and who was chosen
    15 Run           clock, console, log, folder, signals
    16 Training      the steps, checkpoints, the training phase
    17 Phases        export, evaluate, summarise, main

Axes: B sequences, T positions, D model width, H query heads, K key/value heads, C channels of a head, V vocabulary.
"#N" is pull request or issue N of openai/parameter-golf.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import io
import json
import linecache
import lzma
import math
import os
import platform
import shlex
import signal
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial, reduce
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

if __name__ == "__main__":
    # The number of a closed standard stream goes to the next file that is opened, which then gets our prints.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number: this one
    # Before torch: OpenMP threads that spin while waiting make a shared CPU 5-11x slower, and torch 2.10-2.12 fuse
    # reductions of this architecture badly (+6 ms a step; pytorch PR 179494). Both can be overridden from outside.
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends quietly; main() takes over
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

SIZE_LIMIT = 16_000_000  # bytes of code + artifact: decimal, as the contest counts
NORM_EPS = 1.1920929e-07  # explicit: eps=None means another number in other torch versions
BOS = 1  # begins every document of the contest's shards; there is no end-of-document token


class BadInput(Exception):
    """What a user gave cannot be used. The message is one line that names the cause and the fix; exit code 2."""


class Stopped(Exception):
    """The run ends before its time: what happened, and the exit code."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


# --------------------------------------------------------------------------------------------------
# 1 Settings: one frozen dataclass. The field matrix_lr is the environment variable MATRIX_LR.
# --------------------------------------------------------------------------------------------------

Layers = tuple[int, ...]  # "9,10"; an empty value means none
Betas = tuple[float, ...]  # "0.9,0.95"; empty: BETA1,BETA2
Stages = tuple[tuple[int, float], ...]  # "1024@0.1,2048@1": a size, and the fraction of the run up to which it holds
Widths = tuple[tuple[int, int], ...]  # "0@8,10@8": a layer, and the bits of its matrices
Names = tuple[str, ...]  # "q,v,head"; an empty value means none
LISTS = {Layers: "layers", Betas: "two numbers", Stages: "size@fraction, ...", Widths: "number@number, ...",  # for --help
         Names: "names"}


def opt(room, default, doc, lo=None, hi=None, on=""):
    """`on`: the settings without which this one does nothing, as "ve_dim" or "average=swa|best"; a comma means or, an &
    (which binds tighter) and. Where such a setting waits for another itself, this one waits for both.
    """
    return field(default=default, metadata=dict(room=room, doc=doc, lo=lo, hi=hi, on=on))


# What many settings wait for.
GATES, SKIPS = "attn_gate=head|sparse,smear_gate=scalar", "skips=linear|sigmoid|gated"
MUON, HEADS = "matrix_optimizer=muon", "tie_embeddings=False,mtp_num_heads"
STAGES, LANES = "train_seq_schedule,train_batch_schedule", "parallel_residual=lanes|routed"
LANES_SKIPS = f"{LANES}&{SKIPS}"
FIXED, EMBED_FIXED = "fit=off|prune&matrix_quant=rtn|gptq_lite|gptq", "fit=off|prune&embed_quant=rtn|gptq_lite|gptq"
FULL_TTT, LORA, DOCS_TTT = "ttt=full|before|prequant,phased_ttt_prefix_docs", "ttt=lora|lora_docs", "ttt=lora_docs"
BASE_TTT, STREAM = "ttt=full|before|prequant", "off|full|lora|before|prequant"
COUNTS, STEPS_TTT = "mixer=backoff|hedge|hashed", BASE_TTT + "|lora,phased_ttt_prefix_docs"
LEARNS, GROUPS = f"ttt=full|lora,{COUNTS},token_boost", f"ttt_warm_start_a,{DOCS_TTT}&{COUNTS},{DOCS_TTT}&token_boost"
GPTQ = "matrix_quant=gptq,embed_quant=gptq"
MOMENTS = GPTQ + ",fit=allocate,lqer_rank,awq_lite_group_top_k"
_run, _data, _model, _train, _average, _pack, _eval = (partial(opt, room) for room in (
    "Run", "Data", "Model", "Training", "Averaging", "Quantisation and packing", "Evaluation"))


@dataclass(frozen=True)
class Settings:
    """Everything a person chooses. MATRIX_LR in a command is the field matrix_lr; derived values are properties."""

    run_id: str = _run("", "name of the run; empty: date, time, settings hash and seed")
    out_dir: str = _run("", "folder for everything the run writes; empty: logs/RUN_ID")
    seed: int = _run(1337, "seed of the initial weights", 0)
    phases: Literal["all", "train", "eval"] = _run("all", "train: stop after the artifact; eval: only score ARTIFACT")
    artifact: str = _run("", "artifact that PHASES=eval scores")
    resume: str = _run("", "auto: newest whole checkpoint of OUT_DIR, if any; or a checkpoint file")
    checkpoint_every: int = _run(0, "steps between checkpoints; 0: only when interrupted", 0)
    train_log_every: int = _run(200, "steps between train lines in the log", 1)
    val_loss_every: int = _run(1000, "steps between validations, outside the clock; 0: only at the end", 0)
    device: Literal["auto", "cuda", "cpu"] = _run("auto", "auto: CUDA where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = _run("auto", "of activations; auto: bfloat16 on CUDA, else float32")
    compile: Literal["auto", "on", "off"] = _run("auto", "torch.compile; auto: on CUDA only")
    attention: Literal["auto", "fa3", "cudnn", "flash", "math"] = _run("auto", "auto: the first that passes a check")
    kernels: Literal["auto", "off", "require"] = _run("auto", "fused kernels; off: reference; require: no fallback")
    strict_env: bool = _run(False, "a doubtful name in the environment is an error, not a warning")

    data_path: str = _data("data/datasets/fineweb10B_sp1024", "folder with fineweb_train_*.bin and fineweb_val_*.bin")
    tokenizer_path: str = _data("", "SentencePiece model; empty: DATA_PATH/tokenizer.model, else the contest's place")
    vocab_size: int = _data(1024, "vocabulary of tokenizer and shards", 8, 65536)
    val_tokens: int = _data(0, "score only the first N validation targets (never record-eligible); 0: all", 0)

    num_layers: int = _model(11, "physical transformer blocks", 1, 256)
    model_dim: int = _model(512, "width of the residual stream", 8, 16384)
    num_heads: int = _model(8, "query heads", 1, 512)
    num_kv_heads: int = _model(4, "key/value heads (grouped-query attention)", 1, 512)
    mlp_mult: float = _model(3.0, "hidden width of the MLP as a multiple of MODEL_DIM", 0.25, 16)
    leaky_slope: float = _model(0.5, "MLP activation leaky_relu(x, slope)^2; 0 is ReLU^2 (#549)", 0, 1)
    logit_softcap: float = _model(30.0, "logits = cap * tanh(logits / cap); 0: no cap", 0)
    asym_logit_rescale: bool = _model(
        False, "a cap for positive and one for negative logits, equal until test-time training of the weights (#1923)",
        on=FULL_TTT)
    tie_embeddings: bool = _model(True, "the token table is also the head; 0: a head of its own, zero at first")
    embed_dim: int = _model(0, "width of the token table, projected to MODEL_DIM (factorised); 0: MODEL_DIM", 0, 16384)
    tied_embed_init_std: float = _model(0.005, "initial standard deviation of the token table", 0)
    qk_gain_init: float = _model(1.5, "initial learned gain of the normalised queries, per head", 0)
    rope_dims: int = _model(16, "channels of a head that rotate with position; the rest carry no position", 0, 1024)
    rope_base: float = _model(22081.8, "rotary base at every length: 10000 * 2^(8/7), the NTK rule at 2048", 1,
                              on="rope_dims")
    xsa_last_n: int = _model(4, "exclusive self-attention on the last N layers (#265)", 0, 256)
    attn_gate: Literal["none", "head", "dense", "sparse"] = _model("none", "gate on each head (#1667, #1736, #1787)")
    gate_window: int = _model(12, "channels such gates read", 1, 16384, on=GATES)
    sparse_attn_gate_scale: float = _model(1.0, "factor inside the sparse gate's sigmoid", 0, on="attn_gate=sparse")
    value_residual: Literal["none", "vrl", "pair", "sigmoid"] = _model("none", "layer 0's values in later layers")
    ln_scale: bool = _model(True, "scale the normed input of layer i by 1/sqrt(i+1)")
    resid_mix: bool = _model(True, "each block starts from a learned mix of the stream and the first embedding")
    skips: Literal["none", "linear", "sigmoid", "gated"] = _model("linear", "U-Net skips (sigmoid #1539, gated #1394)")
    skip_pairs: int = _model(0, "most skips; 0: half the visits of the longest plan", 0, 256, on=SKIPS)
    num_loops: int = _model(0, "depth recurrence: further passes over layers LOOP_START..LOOP_END (#1394)", 0, 16)
    loop_start: int = _model(3, "first layer of the loop", 0, 255, on="num_loops")
    loop_end: int = _model(5, "last layer of the loop", 0, 255, on="num_loops")
    loop_order: Literal["range", "layer"] = _model("range", "3,4,3,4 or (#1033) 3,3,4,4", on="num_loops")
    enable_looping_at: float = _model(0.35, "fraction of the run from which it loops", 0, 0.999, on="num_loops")
    parallel_residual: Literal["none", "gptj", "lanes", "routed"] = _model(
        "none", "attention beside MLP: on one stream (#1412), on two lanes (#1539), with learned routing (#1529)")
    parallel_start_layer: int = _model(7, "from this layer on", 0, 255, on=LANES + "|gptj")
    parallel_first_skip: Literal["both", "lane0"] = _model(
        "both", "the lanes part after the U-Net skip of their first layer (#1529), or before it: lane 0 alone gets it (#1855)",
        on=LANES_SKIPS)
    parallel_final_lane: Literal["mean", "learned"] = _model("mean", "merge of the two lanes", on=LANES)
    smear_gate: Literal["none", "channel", "scalar"] = _model(
        "channel", "mix of each embedding with the previous one: a gate per channel, or one from 12 features (#1667)")
    doc_mask: Literal["none", "inputs", "attention"] = _model(
        "inputs", "what stops at BOS: nothing; SmearGate and n-gram hash (#1855); attention, too (#1530)")
    bigram_vocab_size: int = _model(2048, "rows of the hashed bigram table; 0: off", 0, 2**24)
    bigram_dim: int = _model(128, "width of the bigram table", 1, 16384, on="bigram_vocab_size")
    trigram: bool = _model(False, "add the hashed trigram's row of the bigram table (#1539)", on="bigram_vocab_size")
    trigram_vocab_size: int = _model(0, "rows of a hashed trigram table of its own (#1311); 0: off", 0, 2**24)
    trigram_dim: int = _model(128, "width of the trigram table", 1, 16384, on="trigram_vocab_size")
    ve_dim: int = _model(128, "width of the value embedding table; 0: off", 0, 16384)
    ve_layers: Layers = _model((9, 10), "layers whose values get the value embedding", on="ve_dim")

    iterations: int = _train(20000, "stop after N steps; 0: no limit", 0)
    max_wallclock_seconds: float = _train(600.0, "stop before the training clock passes this; 0: no limit", 0)
    train_batch_tokens: int = _train(786432, "tokens of a step over all ranks", 1)
    train_batch_schedule: Stages = _train((), "such as 196608@0.2,786432@1; replaces TRAIN_BATCH_TOKENS")
    train_seq_len: int = _train(2048, "length of a training sequence", 2, 2**20)
    train_seq_schedule: Stages = _train((), "such as 1024@0.1,2048@1 (#2014); replaces TRAIN_SEQ_LEN")
    seq_change_warmup_steps: int = _train(0, "steps over which the learning rate rises in a new stage", 0, on=STAGES)
    micro_batch_tokens: int = _train(98304, "most tokens forwarded at once on a rank, or in a packed row", 1)
    loader: Literal["sequential", "coprime", "shuffled", "packed"] = _train(
        "sequential", "the stream in order; blocks by coprime strides (#1060), shuffled (#1394); documents (#1530)")
    warmup_steps: int = _train(3, "steps on synthetic tokens that compile everything and are undone", 0)
    lr_warmup_steps: int = _train(0, "steps over which the learning rate rises from 0", 0)
    warmdown_frac: float = _train(0.5, "last fraction of the run in which the learning rate falls linearly", 0, 1)
    warmdown_iters: int = _train(0, "the same in (estimated) steps; replaces WARMDOWN_FRAC when > 0", 0)
    warmdown_seconds: float = _train(0.0, "the same in seconds; replaces WARMDOWN_FRAC when > 0", 0)
    min_lr: float = _train(0.0, "floor of the warmdown as a fraction of the peak", 0, 1,
                           on="warmdown_frac,warmdown_iters,warmdown_seconds")
    matrix_optimizer: Literal["muon", "adamw"] = _train("muon", "of the matrices")
    matrix_lr: float = _train(0.025, "learning rate of the matrices", 0)
    scalar_lr: float = _train(0.025, "learning rate of gains, gates and scales (AdamW)", 0)
    tied_embed_lr: float = _train(0.035, "learning rate of the embedding tables (AdamW)", 0, on="tie_embeddings")
    embed_lr: float = _train(0.6, "the same without TIE_EMBEDDINGS", 0, on="tie_embeddings=False")
    head_lr: float = _train(0.008, "learning rate of an untied head and of MTP heads (AdamW)", 0, on=HEADS)
    muon_momentum: float = _train(0.99, "momentum of Muon (Nesterov)", 0, 0.9999, on=MUON)
    muon_momentum_warmup_start: float = _train(0.92, "momentum at the first step", 0, 0.9999,
                                               on="muon_momentum_warmup_steps")
    muon_momentum_warmup_steps: int = _train(1500, "steps over which it rises to MUON_MOMENTUM", 0, on=MUON)
    muon_backend_steps: int = _train(5, "Newton-Schulz iterations", 1, 20, on=MUON)
    newton_schulz: Literal["classic", "polar_express"] = _train("classic", "coefficients of the iterations", on=MUON)
    muon_row_normalize: bool = _train(False, "MuonEq-R: rows of the update to norm 1 before them (#1285)", on=MUON)
    normuon: bool = _train(False, "NorMuon: rows scaled by their second moment after them", on=MUON)
    muon_beta2: float = _train(0.95, "decay of NorMuon's second moment", 0, 0.99999, on="normuon")
    muon_wd: float = _train(0.04, "decoupled weight decay of the matrices", 0)
    adam_wd: float = _train(0.04, "decoupled weight decay of gains, gates and scales", 0)
    embed_wd: float = _train(0.04, "decoupled weight decay of the embedding tables", 0)
    head_wd: float = _train(0.0, "decoupled weight decay of an untied head and of MTP heads", 0, on=HEADS)
    wd_taper_start_frac: float = _train(0.0, "fraction of the run from which MUON_WD changes (#1729); 0: off", 0, 0.999)
    wd_taper_final_mult: float = _train(0.5, "multiple of itself at which it ends", 0, 10, on="wd_taper_start_frac")
    beta1: float = _train(0.9, "AdamW, first moment", 0, 0.9999)
    beta2: float = _train(0.95, "AdamW, second moment", 0, 0.99999)
    matrix_betas: Betas = _train((), "both for the matrices; empty: BETA1,BETA2", on="matrix_optimizer=adamw")
    embed_betas: Betas = _train((), "both for the embedding tables; empty: BETA1,BETA2")
    head_betas: Betas = _train((), "both for an untied head and MTP heads", on=HEADS)
    adam_eps: float = _train(1e-8, "AdamW, added to the root of the second moment", 1e-20)
    grad_clip_norm: float = _train(0.3, "clip the global gradient (all ranks, all parameters) to this norm; 0: off", 0)
    complement_alpha: float = _train(0.0, "weigh tokens less that bigram counts predict (#1033); 0: off", 0, 1)
    mtp_num_heads: int = _train(0, "heads that predict further tokens in training and are not exported; 0: off", 0, 16)
    mtp_loss_weight: float = _train(0.2, "weight of their mean loss", 0, on="mtp_num_heads")

    average: Literal["none", "ema", "swa", "lawa", "best"] = _average(
        "ema", "exported: last weights; running mean; mean of all or the last snapshots; best on held-out training")
    ema_decay: float = _average(0.997, "decay of the exponential average, per step", 0, 0.999999, on="average=ema|best")
    ema_start_frac: float = _average(0.0, "fraction of the run at which it starts", 0, 0.999, on="average=ema|best")
    swa_every: int = _average(50, "steps between snapshots", 1, on="average=swa|best")
    swa_start_scale: float = _average(0.2, "taken below this fraction of the peak learning rate", 0, 1,
                                      on="average=swa|best")
    lawa_freq: int = _average(100, "steps between snapshots", 1, on="average=lawa|best")
    lawa_k: int = _average(10, "snapshots that are averaged, the last ones", 1, 100, on="average=lawa|best")
    holdout_tokens: int = _average(2**20, "end of the training stream that is not trained on, but chooses the best",
                                   2, on="average=best")

    fit: Literal["off", "prune", "allocate"] = _pack(
        "allocate", "to SIZE_LIMIT: not; zero the cheapest codes; choose every step of the grid by what its error costs")
    matrix_quant: Literal["rtn", "gptq_lite", "gptq", "ternary"] = _pack(
        "gptq", "to nearest, clipped at the row's maximum or best percentile; errors fed forward; -1, 0, 1 (BitNet)")
    matrix_bits: int = _pack(6, "bits of a matrix weight: 2 to 8, or 16 for float16", 2, 16, on=FIXED)
    attn_bits: int = _pack(0, "the same of q, k, v, o; 0: MATRIX_BITS", 0, 16, on=FIXED)
    mlp_bits: int = _pack(0, "the same of the MLP; 0: MATRIX_BITS", 0, 16, on=FIXED)
    layer_bits: Widths = _pack((), "the same of whole layers, such as 0@8,10@8; goes before the others", on=FIXED)
    matrix_clip_sigmas: float = _pack(0.0, "clip rows at so many standard deviations (SDClip, #1394); 0: as MATRIX_QUANT",
                                      0, 100, on=FIXED)
    attn_clip_sigmas: float = _pack(0.0, "the same of q, k, v, o; 0: MATRIX_CLIP_SIGMAS", 0, 100, on=FIXED)
    mlp_clip_sigmas: float = _pack(0.0, "the same of the MLP; 0: MATRIX_CLIP_SIGMAS", 0, 100, on=FIXED)
    embed_quant: Literal["rtn", "gptq_lite", "gptq", "ternary"] = _pack("gptq", "MATRIX_QUANT of embedding tables")
    embed_bits: int = _pack(8, "bits of an embedding weight: 2 to 8, or 16", 2, 16, on=EMBED_FIXED)
    embed_clip_sigmas: float = _pack(0.0, "MATRIX_CLIP_SIGMAS of embedding tables", 0, 100, on=EMBED_FIXED)
    gate_bits: int = _pack(16, "bits of a gate's weight, by row (#1736): 2 to 8, or 16", 2, 16,
                           on="attn_gate=head|dense|sparse")
    proj_bits: int = _pack(0, "bits of matrices outside the layers: projections of n-gram, value and token tables; 0: "
                           "MATRIX_BITS", 0, 16, on=FIXED)
    clip_floor: float = _pack(0.0, "rows are clipped at this magnitude or more: 1 in the early records (#414)", 0, 100,
                              on=f"{FIXED},{EMBED_FIXED}")
    awq_lite_group_top_k: int = _pack(0, "groups of columns, the most salient ones, that get AWQ_LITE_BITS (#1908); 0: off",
                                      0, 1000, on=f"{FIXED},{EMBED_FIXED}")
    awq_lite_bits: int = _pack(8, "bits of a salient group", 3, 8, on="awq_lite_group_top_k")
    awq_lite_group_size: int = _pack(64, "neighbouring columns of a salient group", 1, 2**16, on="awq_lite_group_top_k")
    prune_pct: float = _pack(0.0, "share of each quantised tensor, its smallest weights, that become 0 (#967)", 0, 0.99)
    gptq_damp: float = _pack(0.01, "share of the mean of a Hessian's diagonal that is added to it", 1e-6, 10, on=GPTQ)
    gptq_act_order: bool = _pack(True, "columns by falling diagonal of the Hessian", on=GPTQ)
    gptq_block_size: int = _pack(128, "columns whose errors are fed forward together (speed only)", 1, 2**16, on=GPTQ)
    gptq_calibration: Literal["train", "generated"] = _pack(
        "train", "text of the Hessians: further training text, or what the model writes (#1019)", on=MOMENTS)
    gptq_calibration_tokens: int = _pack(2**20, "at least so many tokens of it, in whole steps", 1, on=MOMENTS)
    gptq_temperature: float = _pack(0.8, "of the text that the model writes", 0.01, 10, on="gptq_calibration=generated")
    gptq_reserve_seconds: float = _pack(0.0, "kept of MAX_WALLCLOCK_SECONDS for that; 0: as it took in warm-up", 0,
                                        on=MOMENTS)
    lqer_rank: int = _pack(0, "rank of a low-rank correction of the worst tensors (LQER, #1797); 0: off", 0, 256)
    lqer_top_k: int = _pack(3, "how many tensors get one, if it helps", 1, 1000, on="lqer_rank")
    lqer_asym_group: int = _pack(64, "weights of its second factor that share a step", 1, 2**16, on="lqer_rank")
    late_qat_threshold: float = _pack(0.0, "train on rounded weights below this fraction of the peak learning rate; 0: off",
                                      0, 1)
    qat_rounding: Literal["ste", "soft"] = _pack(
        "ste", "straight through; or a step that steepens to one (#967)", on="late_qat_threshold")
    compressor: Literal["auto", "rans", "brotli", "zstd", "lzma", "zlib"] = _pack(
        "rans", "rans: the codes by our entropy coder, the rest by lzma; auto: the smallest of all, per stream")
    size_limit: int = _pack(SIZE_LIMIT, "most bytes of code + artifact; beyond it: scored, but exit code 3", 1, SIZE_LIMIT)

    eval_seq_len: int = _eval(2048, "length of an evaluation window", 2, 2**20)
    eval_stride: int = _eval(64, "step of the sliding window; 0: contiguous windows", 0, on="eval_context=window&ttt=" + STREAM)
    eval_batch_seqs: int = _eval(32, "rows a rank scores at once (changes speed, never the score)", 1)
    eval_docs: bool = _eval(False, "each document is read on its own: nothing before its BOS is seen", on="ttt=" + STREAM)
    eval_context: Literal["window", "cache"] = _eval(
        "window", "each window anew; or keys and values are kept, and every token sees the EVAL_SEQ_LEN up to itself")
    eval_temperature: float = _eval(1.0, "divides the logits; 0: fitted on training text, in the training clock", 0, 10)
    ttt: Literal["off", "full", "lora", "lora_docs", "before", "prequant"] = _eval(
        "off", "test-time training: on scored chunks (#549), the same by adapters, adapters a document (#1530); invalid: "
        "before scoring (#518), before quantisation (#1539)")
    ttt_chunk_tokens: int = _eval(32768, "targets scored before anything learns from them", 1, on=LEARNS)
    ttt_epochs: int = _eval(3, "passes over a chunk (TTT=before and prequant: over all; phases: the documents so far)", 1,
                            on=STEPS_TTT)
    ttt_batch_seqs: int = _eval(32, "sequences of EVAL_SEQ_LEN a gradient step, over all ranks", 1, on=STEPS_TTT)
    ttt_optimizer: Literal["sgd", "adamw"] = _eval("sgd", "of the weights themselves", on=FULL_TTT)
    ttt_lr: float = _eval(0.002, "its learning rate, falling by a cosine over the chunks", 0, on=FULL_TTT)
    ttt_min_lr: float = _eval(0.0, "where it ends, as a fraction", 0, 1, on=STEPS_TTT)
    ttt_momentum: float = _eval(0.9, "momentum of SGD", 0, 0.9999, on="ttt_optimizer=sgd")
    ttt_grad_clip: float = _eval(1.0, "clip the global gradient to this norm; 0: off", 0, on=STEPS_TTT)
    ttt_lr_mult_proj: float = _eval(1.0, "multiple of TTT_LR for o and the MLP's down (#518)", 0, on=FULL_TTT)
    ttt_lr_mult_fc: float = _eval(1.0, "multiple of TTT_LR for the MLP's up", 0, on=FULL_TTT)
    ttt_freeze_blocks: int = _eval(0, "first blocks that do not learn", 0, 256, on=FULL_TTT)
    ttt_freeze_embed: bool = _eval(False, "embedding tables and head do not learn (#967)", on=FULL_TTT)
    ttt_train_scales: bool = _eval(False, "gains and scales of frozen blocks learn all the same (#967)",
                                   on="ttt_freeze_blocks")
    adaptive_lr_max: float = _eval(1.0, "multiple to which learning rates rise over the first 30 % (#967)", 0.01, 100,
                                   on="ttt=full|lora")
    byte_weighted_ttt: bool = _eval(False, "tokens weigh as many as they have bytes (#967)", on=STEPS_TTT)
    polyak_decay: float = _eval(0.0, "score with a running mean of what TTT learns (#967); 0: off", 0, 0.999999,
                                on="ttt=full|lora")
    ttt_lora_rank: int = _eval(8, "rank of the adapters", 1, 1024, on=LORA)
    ttt_lora_alpha: float = _eval(0.0, "their product counts alpha / rank times; 0: once", 0, on=LORA)
    ttt_lora_targets: Names = _eval(("q", "v", "head"), "what gets one: q, k, v, o, attn, mlp, head; attn: the whole "
                                    "attention, from its input (#1530)", on=LORA)
    ttt_lora_scaled: bool = _eval(False, "adapters beside o, attn and mlp pass attn_scale and mlp_scale (#1530)",
                                  on="ttt_lora_targets=o|attn|mlp")
    ttt_lora_a: Literal["shared", "own"] = _eval(
        "shared", "all documents begin with one A; or each place of TTT_GROUP_DOCS has its own, drawn anew after a phase "
        "(#1530)", on=DOCS_TTT)
    ttt_lora_lr: float = _eval(0.01, "their learning rate (AdamW)", 0, on=LORA)
    ttt_beta1: float = _eval(0.9, "their first moment", 0, 0.9999, on=LORA)
    ttt_beta2: float = _eval(0.95, "their second moment", 0, 0.99999, on=LORA)
    ttt_wd: float = _eval(0.0, "their decoupled weight decay", 0, on=LORA)
    ttt_chunk_size: int = _eval(48, "targets of a document between two steps of its adapters", 1, 2**20, on=DOCS_TTT)
    ttt_short_chunks: Widths = _eval((), "the same where a document begins, such as 8@256,24@2000: size@up to there",
                                     on=DOCS_TTT)
    ttt_batch_size: int = _eval(64, "documents a rank reads side by side (speed only)", 1, 4096, on=DOCS_TTT)
    ttt_warm_start_a: bool = _eval(
        False, "A begins where those of the last TTT_GROUP_DOCS ended: at their mean, or with TTT_LORA_A=own at that of the "
        "same place (#1767)", on=DOCS_TTT)
    ttt_group_docs: int = _eval(512, "documents, over all ranks, before anything else learns from them", 1, on=GROUPS)
    phased_ttt_prefix_docs: int = _eval(0, "documents, longest first, after which TTT_LR trains the weights (#1610)", 0,
                                        on=DOCS_TTT)
    phased_ttt_num_phases: int = _eval(1, "phases in which they are reached (#1626)", 1, 100,
                                       on="phased_ttt_prefix_docs")
    mixer: Literal["off", "backoff", "hedge", "hashed"] = _eval(
        "off", "n-gram counts of the scored text: all orders, at a weight by entropy; experts weighed by their record "
        "(#967); invalid: hashes of the target (#1033)")
    ngram_order: int = _eval(10, "longest n-gram", 2, 64, on=COUNTS)
    mixer_experts: Names = _eval(("unigram", "bigram", "trigram"), "experts beside the model: unigram, bigram, trigram, "
                                 "backoff; invalid: entropy", on="mixer=hedge")
    mixer_eta: float = _eval(0.1, "by how much an expert's mean nats of a chunk lower its log weight", 0, on="mixer=hedge")
    mixer_min_tokens: int = _eval(10000, "scored targets before counts are asked", 0, on=COUNTS)
    alpha_base: float = _eval(0.2, "weight of the counts where the model is certain", 0, 1, on="mixer=backoff|hashed")
    alpha_range: float = _eval(0.55, "what is added where it is not: times sigmoid(2 (entropy - ALPHA_CENTER))", 0, 1,
                               on="mixer=backoff|hashed")
    alpha_center: float = _eval(3.0, "entropy in nats at which half of it is added", 0, on="mixer=backoff|hashed")
    ngram_buckets: int = _eval(4194304, "buckets of a hashed table", 2, 2**30, on="mixer=hashed")
    min_count: int = _eval(2, "occurrences of a bucket before it is believed", 1, on="mixer=hashed")
    token_boost: float = _eval(0.0, "token-only tilt (#1514): logit added to the likely next token after TOKEN_ORDER-1 "
                               "equal ones; 0: off", 0, 50)
    token_order: int = _eval(16, "n-gram order of the tilt", 2, 64, on="token_boost")
    token_threshold: float = _eval(0.8, "share of the occurrences that the next token must have", 0, 1, on="token_boost")
    allow_invalid: bool = _eval(False, "let techniques run whose score is not valid, and say so everywhere")
    selftest: bool = _eval(True, "test the predictor that scored, a line for each test; a record needs it")

    @property
    def head_dim(self):
        return self.model_dim // self.num_heads

    @property
    def loops(self):
        return self.num_loops > 0

    @property
    def mlp_hidden(self):
        return round(self.mlp_mult * self.model_dim)

    @property
    def needs_moments(self):
        """Is anything about the artifact decided by what the loss feels?"""
        widths = [self.matrix_bits, self.attn_bits, self.mlp_bits, self.proj_bits, *(b for _, b in self.layer_bits)]
        rounded = self.matrix_quant == "gptq" and not {*widths} <= {0, 16} or (
            self.embed_quant == "gptq" and self.embed_bits != 16)
        return self.fit == "allocate" or self.lqer_rank > 0 or self.awq_lite_group_top_k > 0 or rounded

    @property
    def format(self):
        """Of the matrices, for names of scores."""
        return "allocated" if self.fit == "allocate" else ("ternary" if self.matrix_quant == "ternary" else
                                                           f"int{self.matrix_bits}")

    @property
    def stages(self):
        """[(until, sequence length, tokens of a step)]: the two schedules merged; `until` is a fraction of the run."""
        lengths = self.train_seq_schedule or ((self.train_seq_len, 1.0),)
        batches = self.train_batch_schedule or ((self.train_batch_tokens, 1.0),)
        return [(until, *(next((size for size, end in table if until <= end), table[-1][0])
                          for table in (lengths, batches)))
                for until in sorted({end for _, end in (*lengths, *batches)})]

    @property
    def longest_row(self):
        """Most positions of a row that the model meets."""
        packed = min(self.micro_batch_tokens, max(tokens for *_, tokens in self.stages))
        return max(packed if self.loader == "packed" else 0, self.longest_sequence)

    @property
    def longest_sequence(self):
        """Most tokens that attention joins: where rows are longer, documents are cut."""
        return max(self.eval_seq_len, *(length for _, length, _ in self.stages))

    def idle(self):
        """{changed setting: what it waits for}: settings without effect, such as VE_LAYERS while VE_DIM=0."""
        return {f.name.upper(): _conditions(f.metadata["on"]) for f in fields(self)
                if getattr(self, f.name) != f.default and not self.holds(f.metadata["on"])}

    def holds(self, rule):
        """Is one of the conditions of an `on` rule met, and what that one waits for? An empty rule holds."""
        def met(name, equals, values):
            value = getattr(self, name)
            found = {*value} if isinstance(value, tuple) else {str(value)}  # of a list, one of its words will do
            return (bool(found & {*values.split("|")}) if equals else bool(value)) and self.holds(self.rule(name))

        return not rule or any(all(met(*one.partition("=")) for one in part.split("&")) for part in rule.split(","))

    @classmethod
    def parse(cls, args=(), env=None):
        """Settings from a list of KEY=VALUE or @file and a mapping of environment variables.

        Files and arguments are strict: an unknown name is an error. In the environment a near miss is one (a shell has
        variables of its own; see doubtful_names). Raises BadInput that lists every complaint, one a line.
        """
        known = {f.name.upper(): f for f in fields(cls)}
        complaints, values, wrong = [], {}, set()
        from_env = {name: value for name, value in (env or {}).items() if name in known}
        from_files, from_args = {}, {}
        for arg in args:
            source = from_files if arg.startswith("@") else from_args
            for where, pair in _file_pairs(arg[1:], complaints) if arg.startswith("@") else [("argument", arg)]:
                name, equals, value = pair.partition("=")
                if not equals:
                    complaints.append(f"{where}: {pair!r} is not KEY=VALUE (or @file)")
                elif name not in known:
                    complaints.append(f"{where}: {_unknown(name, known)}")
                else:
                    source[name] = value
        given = {**from_files, **from_env, **from_args}
        for name, text in given.items():
            try:
                values[known[name].name] = _convert(known[name], text)
            except ValueError as error:
                complaints.append(f"{name}={text}: {error}")
                wrong.add(name)
        settings = cls(**values)
        for name in env or {}:
            if name not in known and (why := _why_not_env(name, known, settings.strict_env)):
                complaints.append(f"environment: {why}")
        # A conflict with a setting whose value is wrong would be about its default, which nobody asked for.
        complaints += [c for c in _conflicts(settings, set(values)) if not any(name in c for name in wrong)]
        if complaints:
            raise BadInput("\n".join(complaints))
        return settings

    @classmethod
    def rule(cls, name):
        return cls.__dataclass_fields__[name].metadata["on"]

    def text(self):
        """The settings that were changed, as one line of KEY=VALUE that parse accepts."""
        return " ".join(shlex.quote(f"{f.name.upper()}={_show(getattr(self, f.name))}")
                        for f in fields(self) if getattr(self, f.name) != f.default)

    def experiment(self):
        """{name: value as text} of every setting outside the room Run: equal for the runs of one experiment."""
        return {f.name.upper(): _show(getattr(self, f.name)) for f in fields(self) if f.metadata["room"] != "Run"}

    def sha256(self):
        """Hash of experiment(), whatever the seed."""
        return hashlib.sha256("\n".join(f"{k}={v}" for k, v in self.experiment().items())
                              .encode("utf-8", "surrogateescape")).hexdigest()

    @classmethod
    def help(cls):
        lines, room = [__doc__.split("\nThe rooms")[0]], None
        for f in fields(cls):
            if f.metadata["room"] != room:
                room = f.metadata["room"]
                lines.append(f"\n{room}")
            choice = get_origin(f.type) is Literal
            kind = "|".join(get_args(f.type)) if choice else LISTS.get(f.type) or f.type.__name__
            name, on = f"{f.name.upper()}={_show(f.default) or '(empty)'}", f.metadata["on"]
            lines.append(f"  {name:<42} {f.metadata['doc']}  [{kind}]" + (f" with {_conditions(on)}" if on else ""))
        return "\n".join(lines)


# ---- conditions: what a setting waits for --------------------------------------------------------


def _conditions(rule):
    """An `on` rule as one would type it: AVERAGE=swa|best, VE_DIM, or NORMUON with MATRIX_OPTIMIZER=muon."""
    def typed(name, equals, values):
        further = Settings.rule(name)
        return name.upper() + equals + {"False": "0"}.get(values, values) + (
            f" with {_conditions(further)}" if further else "")

    return " or ".join(" and ".join(typed(*one.partition("=")) for one in part.split("&")) for part in rule.split(","))


# ---- values as text ------------------------------------------------------------------------------


def _show(value):
    if isinstance(value, bool):
        return str(int(value))
    return ",".join("@".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value) if isinstance(
        value, tuple) else str(value)


def _convert(f, text):
    """The value of one setting; ValueError says what would be right."""
    kind, lo, hi = f.type, f.metadata["lo"], f.metadata["hi"]
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            near = [meant for meant in get_args(kind) if meant in {"0": ("none", "off"), "pergroup": ("rans",)}.get(text, ())]
            near = near or difflib.get_close_matches(text, get_args(kind), 1, 0.5)
            raise ValueError(f"one of {', '.join(get_args(kind))}" + (f" (did you mean {near[0]}?)" if near else ""))
        return text
    if kind is bool:
        if text not in ("0", "1", "true", "false"):
            raise ValueError("0 or 1")
        return text in ("1", "true")
    if kind in LISTS:
        read, example = {Layers: (int, "layer numbers separated by commas, such as 9,10"),
                         Betas: (float, "numbers separated by commas, such as 0.9,0.99"),
                         Stages: (_pair(float), "size@fraction separated by commas, such as 1024@0.1,2048@1"),
                         Widths: (_pair(int), "number@number separated by commas, such as 0@8,10@8"),
                         Names: (str, "names separated by commas")}[kind]
        try:
            return tuple(read(part) for part in text.split(",")) if text else ()
        except ValueError:
            raise ValueError(example) from None
    if kind is str:
        return text
    try:
        value = int(text.replace("_", "")) if kind is int else float(text)
    except ValueError:
        raise ValueError("a whole number" if kind is int else "a number") from None
    most = (2**63 - 1 if kind is int else 1e30) if hi is None else hi  # what torch can hold
    if not lo <= value <= most:  # also false for nan
        raise ValueError(f"between {lo} and {hi}" if hi is not None else f"at least {lo}, and at most {most}")
    return value


def _pair(second):
    def read(text):
        a, _, b = text.partition("@")
        return int(a), second(b)

    return read


# ---- impossible combinations ---------------------------------------------------------------------


def _conflicts(s, given):
    """Impossible combinations, each naming both settings and their values."""
    bad = []

    def need(ok, text):
        if not ok:
            bad.append(text)

    need(s.model_dim % s.num_heads == 0, f"MODEL_DIM={s.model_dim} is not a multiple of NUM_HEADS={s.num_heads}")
    need(s.num_heads % s.num_kv_heads == 0,
         f"NUM_HEADS={s.num_heads} is not a multiple of NUM_KV_HEADS={s.num_kv_heads}")
    need(s.rope_dims % 2 == 0 and s.rope_dims <= s.head_dim,
         f"ROPE_DIMS={s.rope_dims} must be even and at most MODEL_DIM/NUM_HEADS={s.head_dim}")
    need(abs(s.mlp_mult * s.model_dim - s.mlp_hidden) < 1e-6,
         f"MLP_MULT={s.mlp_mult} times MODEL_DIM={s.model_dim} is not a whole number")
    need(s.xsa_last_n <= s.num_layers, f"XSA_LAST_N={s.xsa_last_n} exceeds NUM_LAYERS={s.num_layers}")
    need(not s.ve_dim or all(0 <= i < s.num_layers for i in s.ve_layers),
         f"VE_LAYERS={','.join(map(str, s.ve_layers))} names a layer outside 0..NUM_LAYERS-1={s.num_layers - 1}")
    need(not s.ve_dim or s.ve_layers, f"VE_DIM={s.ve_dim} but VE_LAYERS is empty; VE_DIM=0 turns them off")
    for name in ("bigram_vocab_size", "trigram_vocab_size"):
        need(getattr(s, name) != 1, f"{name.upper()}=1 leaves no bucket beside the reserved one; 0 turns it off")
    need(s.gate_window <= s.model_dim or not s.holds(s.rule("gate_window")),
         f"GATE_WINDOW={s.gate_window} exceeds MODEL_DIM={s.model_dim}")
    need(not s.num_loops or s.loop_start <= s.loop_end < s.num_layers,
         f"LOOP_START={s.loop_start} LOOP_END={s.loop_end} is no range of layers 0..{s.num_layers - 1}")
    need(s.parallel_residual == "none" or s.parallel_start_layer < s.num_layers,
         f"PARALLEL_START_LAYER={s.parallel_start_layer}: there is no such layer (NUM_LAYERS={s.num_layers})")
    need(s.parallel_residual != "routed" or s.parallel_final_lane != "learned" or s.parallel_start_layer !=
         s.num_layers - 1 or s.loops and s.loop_end == s.num_layers - 1,
         f"PARALLEL_FINAL_LANE=learned learns nothing from PARALLEL_START_LAYER={s.parallel_start_layer}: the last "
         "layer alone leaves two equal lanes; mean is the same")
    need(s.parallel_first_skip == "both" or not s.holds(LANES_SKIPS) or any(
        visit.split and visit.pop is not None for looping in (False, s.loops) for visit in layer_plan(s, looping)),
         f"PARALLEL_FIRST_SKIP=lane0 changes nothing: no skip enters where the lanes part, PARALLEL_START_LAYER="
         f"{s.parallel_start_layer}")
    need(not s.asym_logit_rescale or s.logit_softcap, "ASYM_LOGIT_RESCALE=1 rescales the cap of LOGIT_SOFTCAP, which is 0")
    need(s.loader != "packed" or s.doc_mask == "attention",
         f"LOADER=packed puts many documents in a row: it needs DOC_MASK=attention, not {s.doc_mask}")
    need(not s.complement_alpha or s.vocab_size <= 16384,
         f"COMPLEMENT_ALPHA={s.complement_alpha} counts pairs of tokens: VOCAB_SIZE={s.vocab_size} exceeds 16384")
    for name in ("train_seq_schedule", "train_batch_schedule"):
        table = getattr(s, name)
        ends = [end for _, end in table]
        need(not table or sorted(set(ends)) == ends and ends[0] > 0 and ends[-1] == 1 and
             all(size >= (2 if "seq" in name else 1) for size, _ in table),
             f"{name.upper()}={_show(table)}: sizes, at fractions of the run that rise to 1")
    lengths = [length for _, length, _ in s.stages]
    longest, where = max(lengths), " in a stage" if s.train_seq_schedule or s.train_batch_schedule else ""
    for _, length, tokens in s.stages:
        need(length and tokens % length == 0,
             f"TRAIN_BATCH_TOKENS={tokens} is not a multiple of TRAIN_SEQ_LEN={length}{where}")
        need(s.micro_batch_tokens >= length,
             f"MICRO_BATCH_TOKENS={s.micro_batch_tokens} is less than one sequence, TRAIN_SEQ_LEN={length}{where}")
        need(s.loader not in ("coprime", "shuffled") or length and longest % length == 0,
             f"LOADER={s.loader} deals out blocks of the longest sequence: {longest} of TRAIN_SEQ_SCHEDULE is no "
             f"multiple of {length}")
    need(s.mtp_num_heads < min(lengths),
         f"MTP_NUM_HEADS={s.mtp_num_heads} look beyond the end of TRAIN_SEQ_LEN={min(lengths)}{where}")
    for name in ("matrix_betas", "embed_betas", "head_betas"):
        betas = getattr(s, name)
        need(not betas or len(betas) == 2 and all(0 <= b < 1 for b in betas),
             f"{name.upper()}={_show(betas)}: two numbers from 0 to below 1, such as 0.9,0.99")
    need(s.eval_stride <= s.eval_seq_len, f"EVAL_STRIDE={s.eval_stride} exceeds EVAL_SEQ_LEN={s.eval_seq_len}")
    need(s.iterations or s.max_wallclock_seconds, "ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0: this run never ends")
    said = [f"{name.upper()}={_show(getattr(s, name))}" for name in ("warmdown_iters", "warmdown_frac",
            "warmdown_seconds") if getattr(s, name) and name in given]
    need(len(said) <= 1, f"{' and '.join(said)} say the same; make all but one of them 0")
    need(not s.warmdown_seconds or s.max_wallclock_seconds,
         f"WARMDOWN_SECONDS={s.warmdown_seconds} counts back from MAX_WALLCLOCK_SECONDS, which is 0")
    need(s.average != "best" or s.holdout_tokens > s.eval_seq_len,
         f"HOLDOUT_TOKENS={s.holdout_tokens} is less than a window of EVAL_SEQ_LEN={s.eval_seq_len}")
    need(s.resume != "auto" or s.run_id or s.out_dir, "RESUME=auto needs the RUN_ID or OUT_DIR to go on with")
    need((s.phases == "eval") == bool(s.artifact), f"PHASES={s.phases} and ARTIFACT={s.artifact or '(empty)'}: "
         "PHASES=eval needs an ARTIFACT, and nothing else reads one")
    _packing_conflicts(s, need)
    _evaluation_conflicts(s, need)
    return bad


def _packing_conflicts(s, need):
    """The part of _conflicts that is about quantisation and packing."""
    widths = [(name.upper(), getattr(s, name)) for name in ("matrix_bits", "attn_bits", "mlp_bits", "proj_bits",
                                                            "embed_bits", "gate_bits")]
    for name, bits in [*widths, *((f"LAYER_BITS={_show(s.layer_bits)}", bits) for _, bits in s.layer_bits)]:
        need(2 <= bits <= 8 or bits == 16 or not bits and name in ("ATTN_BITS", "MLP_BITS", "PROJ_BITS"),
             f"{name if '=' in name else f'{name}={bits}'}: bits are 2 to 8, or 16")
    layers = [layer for layer, _ in s.layer_bits]
    need(len(set(layers)) == len(layers) and all(0 <= layer < s.num_layers for layer in layers),
         f"LAYER_BITS={_show(s.layer_bits)} names a layer twice, or one outside 0..NUM_LAYERS-1={s.num_layers - 1}")
    need(not s.awq_lite_group_top_k or s.awq_lite_group_size <= s.model_dim, f"AWQ_LITE_GROUP_SIZE={s.awq_lite_group_size} "
         f"exceeds MODEL_DIM={s.model_dim}: no matrix has such a group of columns")
    for name in ("matrix_quant", "embed_quant"):
        need(s.fit != "allocate" or getattr(s, name) in ("rtn", "gptq"), f"FIT=allocate chooses the grid, so "
             f"{name.upper()} says only how to round to it: rtn or gptq, not {getattr(s, name)}")
    packages = {"auto": ("zstandard", "brotli"), "zstd": ("zstandard",), "brotli": ("brotli",)}
    for package in packages.get(s.compressor, ()):
        need(importlib.util.find_spec(package), f"COMPRESSOR={s.compressor} needs {package}: pip install {package}")


def _evaluation_conflicts(s, need):
    """The part of _conflicts that is about evaluation."""
    invalid = [(s.ttt == "before", "TTT=before trains on the text before scoring it (C3; #518)"),
               (s.ttt == "prequant", "TTT=prequant trains on the text before scoring it (C3; #1539)"),
               (s.mixer == "hashed", "MIXER=hashed looks targets up in a hash of themselves (C2; #1033)"),
               (s.mixer == "hedge" and "entropy" in s.mixer_experts, "MIXER_EXPERTS=entropy is no distribution (C2; #967)")]
    for used, why in invalid:
        need(not used or s.allow_invalid, f"{why}: ALLOW_INVALID=1 runs it, and calls the score invalid")
    need(s.ttt != "prequant" or s.phases != "eval", "TTT=prequant happens before the artifact, and PHASES=eval after it")
    need(not s.holds(s.rule("alpha_range")) or s.alpha_base + s.alpha_range < 1 + 1e-12,
         f"ALPHA_BASE={s.alpha_base} and ALPHA_RANGE={s.alpha_range} come to more than 1, which is all the weight there is")
    for name, known in (("ttt_lora_targets", ("q", "k", "v", "o", "attn", "mlp", "head")),
                        ("mixer_experts", ("unigram", "bigram", "trigram", "backoff", "entropy"))):
        names = getattr(s, name)
        need(names and len(set(names)) == len(names) and set(names) <= set(known),
             f"{name.upper()}={_show(names)}: some of {','.join(known)}, each once")
    need(s.ttt != "lora_docs" or max([s.ttt_chunk_size, *(size for size, _ in s.ttt_short_chunks)]) <= s.eval_seq_len,
         f"TTT_CHUNK_SIZE={s.ttt_chunk_size} TTT_SHORT_CHUNKS={_show(s.ttt_short_chunks)}: no chunk may exceed "
         f"EVAL_SEQ_LEN={s.eval_seq_len}")
    need(all(size > 0 for size, _ in s.ttt_short_chunks), f"TTT_SHORT_CHUNKS={_show(s.ttt_short_chunks)}: sizes are positive")
    need(not s.holds(s.rule("ttt_freeze_blocks")) or s.ttt_freeze_blocks < s.num_layers or not s.ttt_freeze_embed,
         f"TTT_FREEZE_BLOCKS={s.ttt_freeze_blocks} of NUM_LAYERS={s.num_layers} and TTT_FREEZE_EMBED=1 leave hardly "
         "anything to learn")
    need(not s.phased_ttt_prefix_docs or s.phased_ttt_num_phases <= s.phased_ttt_prefix_docs,
         f"PHASED_TTT_NUM_PHASES={s.phased_ttt_num_phases} exceeds PHASED_TTT_PREFIX_DOCS={s.phased_ttt_prefix_docs}")


# ---- settings from outside: files, environment, names of other scripts ---------------------------


def _file_pairs(path, complaints):
    """(where, KEY=VALUE) of each assignment in a settings file, or in settings.env of a record folder."""
    path = Path(path) / "settings.env" if Path(path).is_dir() else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        lines = os.fsdecode(text.encode()).splitlines()  # as arguments are decoded: a path may have an accent
    except (OSError, UnicodeDecodeError) as error:
        complaints.append(f"@{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})")
        return
    seen = set()
    for number, line in enumerate(lines, 1):
        try:
            parts = shlex.split(line, comments=True)
        except ValueError as error:
            complaints.append(f"{path}:{number}: {error}")
            continue
        for pair in parts:
            if (name := pair.partition("=")[0]) in seen:
                complaints.append(f"{path}:{number}: {name} is set twice in this file")
            seen.add(name)
            yield f"{path}:{number}", pair


def _unknown(name, known):
    if name in RENAMED:
        return f"{name} is now {RENAMED[name]}"
    if name.startswith(FOREIGN):
        return f"{name} is a switch of other contest scripts; this one does not have it"
    near = difflib.get_close_matches(name.upper(), known, 1, 0.6)
    return f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _why_not_env(name, known, strict):
    """Why an environment variable that is no setting cannot be let pass, or None."""
    if name.startswith(ELSEWHERE) and name not in RENAMED or name in ELSEWHERE:
        return None
    if name in RENAMED or name.startswith(FOREIGN):  # before the near misses: TTT_EVAL_SEQ_LEN is none of EVAL_SEQ_LEN
        return _unknown(name, known)
    if near := difflib.get_close_matches(name, known, 1, 0.85):
        return f"{name} is not a setting; did you mean {near[0]}? (unset it if it is not meant for this script)"
    return f"{name} looks like a setting but is none (STRICT_ENV=1)" if strict and doubtful_names([name]) else None


def doubtful_names(env):
    """Names in the environment that are made only of words of our settings, such as MODEL_LR, but are no setting."""
    known = {f.name.upper() for f in fields(Settings)}
    words = {word for name in known for word in name.split("_")}
    return sorted(name for name in env if name not in known and "_" in name and not name.startswith(ELSEWHERE)
                  and words.issuperset(name.split("_")))


# How names begin that other programs read or set: OMP_NUM_THREADS is near MTP_NUM_HEADS, torchrun sets GROUP_RANK.
ELSEWHERE = ("OMP_", "MKL_", "NCCL_", "CUDA_", "TORCH", "PARALLEL_SEQ", "GROUP_RANK", "DATA_DIR")
# How the names of the contest's other techniques begin: they are meant for a trainer, and not read here.
FOREIGN = tuple("""
    AGREE_ CACHE_ALPHA CALIBRATE_TEMP CROWN_Q DTG_ GATED_ATTN_ NGRAM_HINT PPM_ALPHA PREQUANT_ QTTT ROPE_YARN SKYLIGHT_ SLOT_
    SOFT_ROUND SPARSE_ATTN_GATE_INIT TTT_GRAD_STEPS TTT_HASH TTT_LORA_EMA TTT_MAX_CHUNKS TTT_UPDATE_EVERY
    TTT_WARM_START_MEAN USE_CACHE WITHIN_ WORD_""".split())
# Names of published commands that mean something else here: the answer is what to write instead.
RENAMED = {
    "VE_ENABLED": "VE_DIM=0 turns value embeddings off", "EMA_ENABLED": "AVERAGE=ema",
    "SWA_ENABLED": "AVERAGE=swa (beside EMA it did nothing in #549)",
    "TORCH_COMPILE": "COMPILE", "VAL_BATCH_SIZE": "EVAL_BATCH_SEQS", "LR_FLOOR": "MIN_LR", "NO_COMPILE": "COMPILE=off",
    "LEAKY_RELU": "LEAKY_SLOPE", "NEGATIVE_SLOPE": "LEAKY_SLOPE", "LEAKY_RELU_SQ_SLOPE": "LEAKY_SLOPE",
    "COMPRESS_METHOD": "COMPRESSOR", "DATA_DIR": "DATA_PATH, the folder of the shards", "FORCE_STOP_STEP": "ITERATIONS",
    "FUSED_CE_ENABLED": "KERNELS; the loss is the same", "SKYLIGHT_MUON": "NORMUON (0 is NORMUON=0)",
    "TRAIN_SEQ_SCHEDULE_MODE": "TRAIN_SEQ_SCHEDULE, of the clock, or of ITERATIONS where that ends the run first",
    "SMEAR_GATE_ENABLED": "SMEAR_GATE=scalar", "EVAL_ONLY": "PHASES=eval ARTIFACT=file", "EMBEDDING_DIM": "EMBED_DIM",
    "ROPE_TRAIN_SEQ_LEN": "ROPE_BASE, the base in force at every length", "VRL_ENABLED": "VALUE_RESIDUAL=vrl",
    "ATTN_OUT_GATE_ENABLED": "ATTN_GATE=head", "GATED_ATTN_ENABLED": "ATTN_GATE=dense",
    "GATED_ATTENTION": "ATTN_GATE=dense", "SPARSE_ATTN_GATE_ENABLED": "ATTN_GATE=sparse",
    "SKIP_GATES_ENABLED": "SKIPS=gated", "SIGMOID_SKIPS": "SKIPS=sigmoid", "SMEAR_GATE_BOS_FIX": "DOC_MASK=inputs",
    "RECUR_LAYERS": "NUM_LOOPS=1 LOOP_START=first LOOP_END=last", "DEPTH_RECURRENCE": "NUM_LOOPS=1 LOOP_ORDER=layer",
    "DEPTH_RECUR_LAYERS": "LOOP_START, LOOP_END with LOOP_ORDER=layer", "DEPTH_RECUR_PASSES": "NUM_LOOPS (one less)",
    "RECUR_START_STEP": "ENABLE_LOOPING_AT, a fraction of the run", "MUONEQ_R": "MUON_ROW_NORMALIZE",
    "PARALLEL_RESIDUAL_START": "PARALLEL_RESIDUAL=gptj PARALLEL_START_LAYER", "LAWA_ENABLED": "AVERAGE=lawa",
    "COMPILE_SHAPE_WARMUP": "WARMUP_STEPS, which compiles every stage", "LATE_QAT": "LATE_QAT_THRESHOLD",
    "QAT_ENABLED": "LATE_QAT_THRESHOLD", "SOFT_ROUND_QAT": "QAT_ROUNDING=soft", "SDCLIP_ENABLED": "MATRIX_CLIP_SIGMAS",
    "SDCLIP_K_INT6": "MATRIX_CLIP_SIGMAS", "SDCLIP_K_INT8": "EMBED_CLIP_SIGMAS", "INT6_LAST_N": "LAYER_BITS",
    "TARGET_MB": "SIZE_LIMIT, in bytes, with FIT=prune or allocate", "GATED_ATTN_QUANT_GATE": "GATE_BITS=8",
    "GPTQ_CALIBRATION_BATCHES": "GPTQ_CALIBRATION_TOKENS, of all ranks together",
    "GPTQ_CALIB_BATCHES": "GPTQ_CALIBRATION_TOKENS, of all ranks together",
    "GPTQ_CALIB_SEQS": "GPTQ_CALIBRATION_TOKENS with GPTQ_CALIBRATION=generated", "LQER_ENABLED": "LQER_RANK=4",
    "LQER_ASYM_ENABLED": "LQER_RANK, whose factors always have 2 and 4 bits",
    "LQER_FACTOR_BITS": "LQER_RANK, whose factors always have 2 and 4 bits",
    "LQER_GAIN_SELECT": "LQER_TOP_K, which always goes by what the loss feels",
    "LQER_GROUP_SIZE": "LQER_ASYM_GROUP", "AWQ_LITE_ENABLED": "AWQ_LITE_GROUP_TOP_K=1 (0: off)",
    "TTT_ENABLED": "TTT=full, or TTT=lora_docs with adapters of each document", "TTT_USE_LORA": "TTT=lora",
    "TTT_LORA_ENABLED": "TTT=lora_docs",
    "TTT_EVAL_SEQ_LEN": "EVAL_SEQ_LEN", "TTT_TEMPERATURE": "EVAL_TEMPERATURE",
    "TTT_EVAL_ONLY": "PHASES=eval ARTIFACT=file", "TTT_ONLY": "PHASES=eval ARTIFACT=file", "TTT_MASK": "TTT_LORA_TARGETS",
    **{f"TTT_{what}_LORA": f"TTT_LORA_TARGETS with {name}" for what, name in (
        ("Q", "q"), ("K", "k"), ("V", "v"), ("O", "attn"), ("MLP", "mlp"), ("LM_HEAD", "head"))},
    "TTT_LOCAL_LR_MULT": "TTT_LORA_LR, times it", "TTT_WEIGHT_DECAY": "TTT_WD",
    **dict.fromkeys(("TTT_SHORT_SCORE_FIRST_ENABLED", "TTT_SHORT_SCORE_FIRST_STEPS", "TTT_SHORT_CHUNK_SIZE",
                     "TTT_SHORT_DOC_LEN"), "TTT_SHORT_CHUNKS such as 8@256,24@2000, by the place in a document"),
    "PREQUANT_TTT_ENABLED": "TTT=prequant",
    "PREQUANT_TTT_EPOCHS": "TTT_EPOCHS", "PREQUANT_TTT_LR": "TTT_LR", "PHASED_TTT_ENABLED": "PHASED_TTT_PREFIX_DOCS",
    "GLOBAL_TTT_LR": "TTT_LR", "GLOBAL_TTT_EPOCHS": "TTT_EPOCHS", "GLOBAL_TTT_MOMENTUM": "TTT_MOMENTUM",
    "GLOBAL_TTT_GRAD_CLIP": "TTT_GRAD_CLIP", "GLOBAL_TTT_BATCH_SEQS": "TTT_BATCH_SEQS", "ADAPTIVE_LR": "ADAPTIVE_LR_MAX",
    "USE_POLYAK": "POLYAK_DECAY", "USE_MIXER": "MIXER=hedge", "USE_HEDGE_MIXER": "MIXER=backoff (#1033's is hashed)",
    "SKIP_SLIDING": "EVAL_STRIDE=0", "SKIP_SLIDING_WINDOW": "EVAL_STRIDE=0",
    "EVAL_INCLUDE_TAIL": "what always happens: the tail is scored",
    "CASEOPS_ENABLED": "DATA_PATH: shards with a byte sidecar are CaseOps", "NGRAM_TILT_ENABLED": "TOKEN_BOOST",
}


# --------------------------------------------------------------------------------------------------
# 2 Model parts
# Every module that creates a parameter states its role; optimizer, codec and compression group are tables over roles.
# Weights are fp32 masters, cast to the activation dtype where they are used; there is no autocast.
# --------------------------------------------------------------------------------------------------


class Docs(NamedTuple):
    """Where documents begin. One object for everything that must not look across a boundary."""

    first: Tensor  # (B, T) bool: this token begins a document
    mask: Tensor | None = None  # (B, 1, T, T) bool: who sees whom, for attention kernels that take a mask
    cu: Tensor | None = None  # (segments + 1,) int32: their starts in the flattened batch, for those that take lengths


def find_documents(ids, mode, longest=0, varlen=False):
    """What BOS says about ids (B, T), or None with DOC_MASK=none. With "attention" also who sees whom: documents, cut
    every `longest` tokens (0: not), as lengths for a `varlen` kernel (waits for the device) or as a mask.
    """
    if mode == "none":
        return None
    first = ids == BOS
    if mode == "inputs":
        return Docs(first)
    at = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    since = at - torch.where(first, at, 0).cummax(1).values  # the row's start begins a segment, too
    cut = (since % longest if longest else since) == 0
    if varlen:
        starts = cut.flatten().nonzero().squeeze(1)
        return Docs(first, cu=F.pad(starts, (0, 1), value=ids.numel()).int())
    segment = cut.cumsum(1)
    return Docs(first, mask=(segment[:, :, None] == segment[:, None]).tril()[:, None])


class Slot(NamedTuple):
    """Adapters of one visit to a block: functions whose result is added beside its linear layers, or None."""

    q: Callable | None = None
    k: Callable | None = None
    v: Callable | None = None
    o: Callable | None = None  # from the attention's output, as the layer o
    attn: Callable | None = None  # beside the whole attention, from its normed input (#1530)
    mlp: Callable | None = None  # beside the whole MLP, from its normed input
    scaled: bool = False  # the last three pass attn_scale or mlp_scale, as what they stand beside does (#1530)


class Past(NamedTuple):
    """What a forward sees of the text before its tokens, as Cache kept it."""

    ids: Tensor  # (B, 3 at most) the last tokens, which SmearGate and the n-gram hashes read
    rope: tuple[Tensor, Tensor]  # of the new tokens' positions
    seen: Tensor  # (B or 1, T, S + T) bool: who sees whom of the S kept keys and the T new ones
    kept: list  # [(k, v)] of each visit, (B, S, K, C); k rotated
    new: list  # those of the new tokens, filled by the forward


class Context(NamedTuple):
    """What every block sees beside the residual stream."""

    x0: Tensor  # (B, T, D) the stream as it entered the first block
    rope: tuple[Tensor, Tensor]  # cos, sin: (T, rope_dims / 2)
    docs: Docs | None
    ve: Tensor | None  # (B, T, K*C) value embedding
    first_v: list  # the values of layer 0, once it has made them
    past: Past | None = None


def norm(x):
    """RMSNorm over the last axis without a learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def at_least_float32(x):
    """x in float32; float64, in which the self-test computes, stays."""
    return x if x.dtype == torch.float64 else x.float()


def through(module, x, *args):
    """An optional stage: absent modules pass x on."""
    return x if module is None else module(x, *args)


def add_adapter(y, adapter, x, scale=None):
    """y with an adapter's contribution computed from x, times `scale`; nothing reaches the graph when there is none."""
    if adapter is None:
        return y
    return y + (adapter(x) if scale is None else scale.to(x.dtype) * adapter(x))


class FakeQuant(nn.Module):
    """Late QAT: a weight (R, C) as the artifact would hold it, at the exporter's `step` (R, C or 1) and range -top..top.

    "ste": the gradient passes straight through. "soft" (#967): steps that are smooth, and steepen with `sharpness`.
    """

    def __init__(self, weight, top, soft):
        super().__init__()
        self.top, self.soft = top, soft
        self.register_buffer("step", weight.new_ones(len(weight), 1), persistent=False)
        self.register_buffer("sharpness", weight.new_ones(()), persistent=False)

    def forward(self, weight):
        at = weight / self.step
        if not self.soft:
            return weight + (at.round().clamp(-self.top, self.top) * self.step - weight).detach()
        low = at.floor().detach()
        rise = torch.tanh(self.sharpness * (at - low - 0.5)) / torch.tanh(self.sharpness / 2)
        return (low + 0.5 + 0.5 * rise).clamp(-self.top, self.top) * self.step


class Linear(nn.Module):
    """y = x W^T, W (out, in); no bias anywhere. `scale` (out,) multiplies the rows of W instead of the output: the
    same map, but its gradient comes from dW and not from a reduction over all tokens of the batch.
    """

    def __init__(self, inputs, outputs, zero=False, role="matrix"):
        super().__init__()
        self.zero, self.role, self.weight = zero, role, nn.Parameter(torch.empty(outputs, inputs))
        self.register_module("fake_quant", None)  # FakeQuant, while late QAT is on; a plain attribute would be traced a third time

    def init(self, generator):
        nn.init.zeros_(self.weight) if self.zero else nn.init.orthogonal_(self.weight, generator=generator)

    def forward(self, x, scale=None):
        weight = through(self.fake_quant, self.weight)
        weight = weight if scale is None else scale[:, None] * weight
        return F.linear(x, weight.to(x.dtype))


class Table(nn.Module):
    """Rows looked up by id."""

    role = "embed"

    def __init__(self, rows, width, std):
        super().__init__()
        self.std, self.weight = std, nn.Parameter(torch.empty(rows, width))
        self.register_module("fake_quant", None)

    def init(self, generator):
        nn.init.normal_(self.weight, std=self.std, generator=generator) if self.std else nn.init.zeros_(self.weight)

    def forward(self, ids, dtype):
        return F.embedding(ids, through(self.fake_quant, self.weight)).to(dtype)


def rotary_tables(positions, dims, base):
    """cos and sin (T, dims/2) of position * base^(-2j/dims) for positions (T,), in float64."""
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device) / max(dims, 1))
    angle = positions.double()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Partial RoPE (#315): the first 2n channels of x (B, T, H, C) turn by minus the angle, half against half."""
    n = cos.size(-1)
    if n == 0:
        return x
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x.split((n, n, x.size(-1) - 2 * n), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def xsa(y, v):
    """Exclusive self-attention (#265): y (B, T, H, C) less its component along the token's own value v (B, T, K, C)."""
    groups = y.unflatten(2, (v.size(2), -1))
    v = v.unsqueeze(3)
    share = (groups * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return (groups - share * v).flatten(2, 3)


class SmearGate(nn.Module):
    """SmearGate: (1 - g) x[t] + g x[t-1] per channel, g = sigmoid(gate); g = 0 where a document begins (#1855)."""

    role = "scalar"

    def __init__(self, dim):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

    def init(self, generator):
        nn.init.zeros_(self.gate)

    def forward(self, x, docs):
        gate = self.gate.sigmoid().to(x.dtype)
        if docs is not None:
            gate = gate * ~docs.first[..., None]
        return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), gate.expand_as(x))


class ScalarSmearGate(nn.Module):
    """The later SmearGate (#1667): x[t] + lambda sigmoid(w . x[t, :window]) x[t-1], before the first norm."""

    role = "scalar"

    def __init__(self, window):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(window)), nn.Parameter(torch.empty(()))

    def init(self, generator):
        nn.init.zeros_(self.weight), nn.init.zeros_(self.scale)

    def forward(self, x, docs):
        gate = self.scale.to(x.dtype) * (x[..., : len(self.weight)] @ self.weight.to(x.dtype)).sigmoid()
        if docs is not None:
            gate = gate * ~docs.first
        return x + gate[..., None] * F.pad(x[:, :-1], (0, 0, 1, 0))


# Factors of this token, the one before, ...; a second row serves where the first has not enough predecessors.
BIGRAM, SHARED_TRIGRAM = ((36313, 27191),), ((36313, 27191, 51497),)
TRIGRAM = ((48271, 36313, 27191), (36313, 27191))


def hash_ngrams(ids, hashes, buckets, docs):
    """Hash of each token and its predecessors (B, T): the products, xored, modulo `buckets`. Where a predecessor is
    missing - at the row's start, and with `docs` at a document's - the next of `hashes`, in the end `buckets` itself.
    """
    factors, width = hashes[0], ids.size(1)
    n = min(len(factors) - 1, width)
    bucket = factors[0] * ids[:, n:]
    for back in range(1, n + 1):
        bucket = bucket ^ factors[back] * ids[:, n - back : width - back]
    bucket = F.pad(bucket % buckets, (n, 0), value=buckets)
    for back in range(n if docs is not None else 0):
        bucket = bucket.masked_fill(F.pad(docs.first[:, : width - back], (back, 0)), buckets)
    if hashes[1:]:
        bucket = torch.where(bucket == buckets, hash_ngrams(ids, hashes[1:], buckets, docs), bucket)
    return bucket


class BigramHash(nn.Module):
    """Embedding of the hashed bigram or trigram: a zero table whose last row stands for "no predecessor", projected.

    Several n-grams add rows of the same table (TRIGRAM, #1539).
    """

    role = "scalar"

    def __init__(self, rows, width, dim, scale, *ngrams):
        super().__init__()
        self.buckets, self.ngrams, self.start = rows - 1, ngrams, scale
        self.table = Table(rows, width, std=0)
        self.proj = Linear(width, dim) if width != dim else None
        self.scale = nn.Parameter(torch.empty(()))

    def init(self, generator):
        nn.init.constant_(self.scale, self.start)

    def forward(self, ids, docs, dtype):
        rows = sum(self.table(hash_ngrams(ids, n, self.buckets, docs), dtype) for n in self.ngrams)
        return self.scale.to(dtype) * through(self.proj, rows)


class ValueEmbedding(nn.Module):
    """A second, narrow token table whose projection is added to the values of some layers (#374)."""

    role = "scalar"

    def __init__(self, vocab, width, kv_dim):
        super().__init__()
        self.table, self.proj = Table(vocab, width, std=0.01), Linear(width, kv_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def init(self, generator):
        nn.init.constant_(self.scale, 0.1)

    def forward(self, ids, dtype):
        return self.scale.to(dtype) * self.proj(self.table(ids, dtype))


class ValueResidual(nn.Module):
    """The values v of a later layer with those of layer 0, v0: "vrl" v + c v0 (#1033), "pair" a v0 + b v (#1311),
    "sigmoid" v + sigmoid(c) v0 (#1539).
    """

    role = "scalar"

    def __init__(self, kind):
        super().__init__()
        self.kind, self.mix = kind, nn.Parameter(torch.empty(2 if kind == "pair" else ()))

    def init(self, generator):
        nn.init.constant_(self.mix, 0.5 if self.kind == "pair" else 0.0)

    def forward(self, v, v0):
        mix = self.mix.to(v.dtype)
        if self.kind == "pair":
            return mix[0] * v0 + mix[1] * v
        return v + (mix if self.kind == "vrl" else mix.sigmoid()) * v0


class HeadGate(nn.Module):
    """Factor per head, from the normed input x: "head" 2 sigmoid(W x[:window]) (#1667), "dense" sigmoid(W x) (#1736),
    "sparse" sigmoid(scale W x[:window]) (#1787).
    """

    role = "gate"

    def __init__(self, s):
        super().__init__()
        self.dense, self.top = s.attn_gate == "dense", 2.0 if s.attn_gate == "head" else 1.0
        self.scale = s.sparse_attn_gate_scale if s.attn_gate == "sparse" else 1.0
        self.weight = nn.Parameter(torch.empty(s.num_heads, s.model_dim if self.dense else s.gate_window))

    def init(self, generator):
        nn.init.normal_(self.weight, std=0.01, generator=generator) if self.dense else nn.init.zeros_(self.weight)

    def forward(self, x):
        """x (B, T, D) -> (B, T, H, 1)."""
        inner = F.linear(x[..., : self.weight.size(1)], self.weight.to(x.dtype))
        return (self.top * (self.scale * inner).sigmoid())[..., None]


class Attention(nn.Module):
    """Causal grouped-query attention with QK norm, query gain, partial RoPE, value embedding and residual, XSA and head
    gates. The only one.
    """

    role = "scalar"

    def __init__(self, s, layer, attend):
        super().__init__()
        self.head_dim, self.attend, self.xsa = s.head_dim, attend, layer >= s.num_layers - s.xsa_last_n
        kv_dim = s.num_kv_heads * s.head_dim
        self.q, self.o = Linear(s.model_dim, s.model_dim), Linear(s.model_dim, s.model_dim, zero=True)
        self.k, self.v = Linear(s.model_dim, kv_dim), Linear(s.model_dim, kv_dim)
        self.gain_init, self.q_gain = s.qk_gain_init, nn.Parameter(torch.empty(s.num_heads))
        self.ve_scale = nn.Parameter(torch.empty(())) if s.ve_dim and layer in s.ve_layers else None
        self.residual = ValueResidual(s.value_residual) if s.value_residual != "none" and layer else None
        self.before_ve = s.value_residual == "vrl"  # what layer 0 hands on
        self.gate = HeadGate(s) if s.attn_gate != "none" else None

    def init(self, generator):
        nn.init.constant_(self.q_gain, self.gain_init)
        if self.ve_scale is not None:
            nn.init.ones_(self.ve_scale)

    def values(self, x, context, adapter):
        """(B, T, K*C)."""
        v = plain = add_adapter(self.v(x), adapter, x)
        if self.ve_scale is not None:
            v = v + self.ve_scale.to(x.dtype) * context.ve
        if not context.first_v:
            context.first_v.append(plain if self.before_ve else v)
        return v if self.residual is None else self.residual(v, context.first_v[0])

    def forward(self, x, scale, context, slot):
        """x (B, T, D) normed -> (B, T, D), its channels multiplied by `scale` (D,)."""
        q, k, v = add_adapter(self.q(x), slot.q, x), add_adapter(self.k(x), slot.k, x), self.values(x, context, slot.v)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q, k, v))
        q = rotate(norm(q), *context.rope) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(norm(k), *context.rope)
        y = self.attend(q, k, v, context.docs) if context.past is None else attend_past(q, k, v, context.past)
        y = xsa(y, v) if self.xsa else y
        y = (y if self.gate is None else y * self.gate(x)).flatten(2)
        adapter_scale = scale if slot.scaled else None
        return add_adapter(add_adapter(self.o(y, scale), slot.o, y, adapter_scale), slot.attn, x, adapter_scale)


class MLP(nn.Module):
    """down(leaky_relu(up(x), slope)^2)."""

    def __init__(self, s):
        super().__init__()
        self.slope = s.leaky_slope
        self.up, self.down = Linear(s.model_dim, s.mlp_hidden), Linear(s.mlp_hidden, s.model_dim, zero=True)

    def forward(self, x, scale, slot):
        y = self.down(F.leaky_relu(self.up(x), self.slope).square(), scale)
        return add_adapter(y, slot.mlp, x, scale if slot.scaled else None)


class LogitCaps(nn.Module):
    """Soft caps of the logits: one of positive, one of negative ones (#1923). As published, they begin equal and are in no
    optimizer of the training: what moves them is training of the weights at test time.
    """

    role = "cap"

    def __init__(self, cap):
        super().__init__()
        self.start, self.caps = cap, nn.Parameter(torch.empty(2), requires_grad=False)

    def init(self, generator):
        nn.init.constant_(self.caps, self.start)

    def forward(self, logits):
        """The cap of each."""
        return torch.where(logits > 0, self.caps[0], self.caps[1])


# --------------------------------------------------------------------------------------------------
# 3 Model
# --------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """U-Net skips onto the stream x: "linear" x + w kept, "sigmoid" x + sigmoid(w) kept (#1539), "gated"
    g x + (1 - g) w kept, g = sigmoid(gate) (#1394); per channel, one row a pair.
    """

    role = "scalar"

    def __init__(self, kind, pairs, dim):
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.empty(pairs, dim))
        self.gate = nn.Parameter(torch.empty(pairs, dim)) if kind == "gated" else None

    def init(self, generator):
        nn.init.constant_(self.weight, 2.2 if self.kind == "sigmoid" else 1.0)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(self, x, kept, pair):
        weight = self.weight[pair].to(x.dtype)
        if self.gate is None:
            return x + (weight.sigmoid() if self.kind == "sigmoid" else weight) * kept
        return torch.lerp(weight * kept, x, self.gate[pair].sigmoid().to(x.dtype).expand_as(x))


class ParallelLanes(nn.Module):
    """Two residual lanes (#1539, #1529): attention writes lane 0, the MLP lane 1; "routed": both write both, with
    learned weights, r lane + p a + q m. Merged at the end by their mean or a learned m lane0 + (1 - m) lane1.
    Every layer has its row of weights, as published; those below PARALLEL_START_LAYER rest.
    """

    role = "scalar"

    def __init__(self, s):
        super().__init__()
        routed = s.parallel_residual == "routed"
        self.keep = nn.Parameter(torch.empty(s.num_layers, 2)) if routed else None  # [layer, lane]
        self.write = nn.Parameter(torch.empty(s.num_layers, 2, 2)) if routed else None  # [layer, attention | MLP, lane]
        self.merge = nn.Parameter(torch.empty(())) if s.parallel_final_lane == "learned" else None

    def init(self, generator):
        if self.keep is not None:
            nn.init.constant_(self.keep, 1.1), nn.init.ones_(self.write)
        if self.merge is not None:
            nn.init.constant_(self.merge, 0.5)

    def route(self, lanes, attended, fed, layer):
        keep, write = self.keep[layer].to(fed.dtype), self.write[layer].to(fed.dtype)
        return tuple(keep[j] * lanes[j] + write[0, j] * attended + write[1, j] * fed for j in (0, 1))

    def forward(self, lanes):
        share = 0.5 if self.merge is None else self.merge.to(lanes[0].dtype)
        return share * lanes[0] + (1 - share) * lanes[1]


class Visit(NamedTuple):
    """One application of a block. The forward is a loop over visits; skips, recurrence and lanes are data."""

    block: int
    push: bool  # keep the stream after it, for a later skip
    pop: int | None  # before it, take back the stream kept last, with this skip's weights
    parallel: bool  # attention and MLP side by side
    split: Literal["", "before_skip", "after_skip"] = ""  # here the stream becomes two lanes


def layer_plan(s, looping):
    """The visits of one forward. U-Net: of the first half the last `pairs` push, the second half pops, last in first
    out; a loop in range order is unrolled before the halves are taken (#1394), one that repeats each layer keeps the
    pairs of the plain order, popping before the first pass and pushing after the last (#1033).
    """
    passes = s.num_loops if looping else 0
    loop = range(s.loop_start, s.loop_end + 1)
    order = list(range(s.num_layers))
    if s.loop_order == "range" and passes:
        order[s.loop_end + 1 : s.loop_end + 1] = [*loop] * passes
    half = len(order) // 2
    pairs = 0 if s.skips == "none" else min(half, s.skip_pairs or half)
    start = s.parallel_start_layer if s.parallel_residual != "none" else s.num_layers
    plan = []
    for j, i in enumerate(order):
        parallel = i >= start or s.parallel_residual != "gptj" and any(k >= start for k in order[:j])
        visit = Visit(i, half - pairs <= j < half, j - half if half <= j < half + pairs else None, parallel)
        again = passes if s.loop_order == "layer" and i in loop else 0
        plan += [visit._replace(push=visit.push and not k, pop=visit.pop if k == again else None)
                 for k in range(again, -1, -1)]
    first = next((j for j, visit in enumerate(plan) if visit.parallel), None)
    if first is not None and s.parallel_residual in ("lanes", "routed"):
        plan[first] = plan[first]._replace(split="before_skip" if s.parallel_first_skip == "lane0" else "after_skip")
    return plan


class Block(nn.Module):
    role = "scalar"

    def __init__(self, s, layer, attend):
        super().__init__()
        self.layer, self.ln_scale = layer, (layer + 1) ** -0.5 if s.ln_scale else 1.0
        self.attn, self.mlp = Attention(s, layer, attend), MLP(s)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.empty(s.model_dim)), nn.Parameter(torch.empty(s.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(2, s.model_dim)) if s.resid_mix else None

    def init(self, generator):
        nn.init.ones_(self.attn_scale), nn.init.ones_(self.mlp_scale)
        if self.resid_mix is not None:
            nn.init.ones_(self.resid_mix[0]), nn.init.zeros_(self.resid_mix[1])

    def forward(self, lanes, context, slot, parallel=False, route=None):
        """Attention reads and writes the first lane, the MLP the last; with one lane that is the ordinary block, or
        with `parallel` GPT-J's. `route` (routed lanes) decides what is kept and written instead, of the unmixed lane.
        """
        x = lanes[0]
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * context.x0
        attended = self.attn(norm(x) * self.ln_scale, self.attn_scale, context, slot)
        if len(lanes) == 1:
            y = x + attended
            return (y + self._feed(x if parallel else y, slot),)
        fed = self._feed(lanes[1], slot)
        if route is not None:
            return route(lanes, attended, fed, self.layer)
        return x + attended, lanes[1] + fed

    def _feed(self, x, slot):
        return self.mlp(norm(x) * self.ln_scale, self.mlp_scale, slot)


class GPT(nn.Module):
    """The model. hidden -> logits -> loss is the only forward: training, scoring and adaptation call it.

    GPT(settings) has the initial weights of SEED, equal on every device and rank; init=False leaves them to be loaded.
    `attend` is the attention kernel (room 14), `dtype` that of activations. It loops, if NUM_LOOPS says so, unless
    `looping` is set to False; no graph is built anew for that, if warm-up has seen both.
    """

    def __init__(self, s, dtype=torch.float32, attend=None, init=True):
        super().__init__()
        self.dtype, self.softcap, self.doc_mask, self.looping = dtype, s.logit_softcap, s.doc_mask, s.loops
        self.temperature = None  # of its predictions, once fitted (EVAL_TEMPERATURE=0)
        self.reasons = []  # why no score of these weights is valid: what was found while they were trained
        attend, width = attend or attend_sdpa, s.embed_dim or s.model_dim
        self.varlen = getattr(attend, "varlen", False)
        self.embed = Table(s.vocab_size, width, s.tied_embed_init_std)  # tied: also the head
        self.embed_proj = Linear(width, s.model_dim) if s.embed_dim else None
        self.head_proj = Linear(s.model_dim, width) if s.embed_dim else None
        self.head = None if s.tie_embeddings else Linear(width, s.vocab_size, zero=True, role="head")
        ngrams = (BIGRAM, SHARED_TRIGRAM) if s.trigram else (BIGRAM,)
        self.bigram = BigramHash(s.bigram_vocab_size, s.bigram_dim, s.model_dim, 0.05,
                                *ngrams) if s.bigram_vocab_size else None
        self.trigram = BigramHash(s.trigram_vocab_size, s.trigram_dim, s.model_dim, 0.03,
                                 TRIGRAM) if s.trigram_vocab_size else None
        self.early_smear = ScalarSmearGate(s.gate_window) if s.smear_gate == "scalar" else None
        self.smear = SmearGate(s.model_dim) if s.smear_gate == "channel" else None
        self.value_embed = ValueEmbedding(s.vocab_size, s.ve_dim, s.num_kv_heads * s.head_dim) if s.ve_dim else None
        self.blocks = nn.ModuleList(Block(s, i, attend) for i in range(s.num_layers))
        self.lanes = ParallelLanes(s) if s.parallel_residual in ("lanes", "routed") else None
        self.caps = LogitCaps(s.logit_softcap) if s.asym_logit_rescale else None
        self.plans = layer_plan(s, False), layer_plan(s, True)
        pairs = max(sum(visit.pop is not None for visit in plan) for plan in self.plans)
        self.skips = Skips(s.skips, pairs, s.model_dim) if pairs else None
        # Buffers built before the first call: a lazily grown cache would recompile the graph.
        self.rope = s.rope_dims, s.rope_base
        for name, table in zip(("cos", "sin"), rotary_tables(torch.arange(s.longest_row), *self.rope)):
            self.register_buffer(name, table.float(), persistent=False)
        if init:
            generator = torch.Generator().manual_seed(s.seed)
            with torch.no_grad():
                for module in self.modules():
                    if hasattr(module, "init"):
                        module.init(generator)

    @property
    def plan(self):
        return self.plans[1] if self.looping else self.plans[0]  # dynamo of torch 2.9 indexes by no bool

    def find_documents(self, ids, longest=0):
        """Docs of ids (B, T) as this model's DOC_MASK and attention kernel want them."""
        return find_documents(ids, self.doc_mask, longest, self.varlen)

    def docs_outside_graph(self, ids):
        """Docs of ids that a graph cannot make, because how many documents there are is in the data; None if it can."""
        if not self.varlen:
            return None
        docs = self.find_documents(ids)
        torch._dynamo.maybe_mark_dynamic(docs.cu, 0)
        return docs

    def hidden(self, ids, docs=None, adapters=None, past=None):
        """ids (B, T) -> normed final states (B, T, D). docs defaults to what BOS says, unless DOC_MASK=none. With a
        past, ids go on with its text.
        """
        new, text = ids.size(1), ids if past is None else torch.cat((past.ids, ids), 1)
        if docs is None:  # who sees whom is in the past, where there is one
            docs = self.find_documents(ids) if past is None or self.doc_mask == "none" else find_documents(text, "inputs")
        x = through(self.embed_proj, self.embed(text, self.dtype))
        for table in (self.bigram, self.trigram):
            x = x if table is None else x + table(text, docs, self.dtype)
        x = through(self.smear, norm(through(self.early_smear, x, docs)), docs)[:, -new:]
        ve = self.value_embed(ids, self.dtype) if self.value_embed is not None else None
        rope = (self.cos[:new], self.sin[:new]) if past is None else past.rope
        context = Context(x, rope, docs, ve, [], past)
        route = self.lanes.route if self.lanes is not None and self.lanes.keep is not None else None
        lanes, kept = (x,), []
        for j, visit in enumerate(self.plan):
            if visit.split == "before_skip":
                lanes = 2 * lanes
            if visit.pop is not None:
                lanes = (self.skips(lanes[0], kept.pop(), visit.pop), *lanes[1:])
            if visit.split == "after_skip":
                lanes = 2 * lanes
            slot = adapters.slots[j] if adapters is not None else Slot()
            lanes = self.blocks[visit.block](lanes, context, slot, visit.parallel, route)
            if visit.push:
                kept.append(lanes[0])
        return norm(self.lanes(lanes) if len(lanes) == 2 else lanes[0])

    def logits(self, hidden, adapters=None, head=None):
        """hidden (..., D) -> float32 logits (..., V), soft-capped; `head`: another head's weight (V, width)."""
        if head is None:
            module = self.embed if self.head is None else self.head
            head = through(module.fake_quant, module.weight)
        logits = F.linear(through(self.head_proj, hidden), head.to(hidden.dtype))
        logits = add_adapter(logits, adapters.head if adapters is not None else None, hidden)
        logits = at_least_float32(logits)
        cap = self.cap_of(logits)
        return cap * torch.tanh(logits / cap) if self.softcap else logits

    def cap_of(self, logits):
        """Soft cap: a number, or one for each of the logits."""
        return self.softcap if self.caps is None else self.caps(logits)

    def loss(self, hidden, targets, adapters=None, head=None, reduction="mean"):
        """Cross entropy in nats of targets (B, T): the mean over all tokens, or (B, T) with reduction="none"."""
        logits = self.logits(hidden, adapters, head)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(targets)

    def forward(self, ids, targets, docs=None, adapters=None, reduction="mean"):
        return self.loss(self.hidden(ids, docs, adapters), targets, adapters, None, reduction)


class Cache:
    """Keys and values of the text so far: rows that go on token by token, each token seeing the `width` up to itself.

    A forward reads past(ids) and leaves its own keys there; only commit() takes them in, so that it can be repeated.
    """

    def __init__(self, model, rows, width):
        self.model, self.width, self.at, self.kept = model, width, 0, None
        device = model.embed.weight.device
        self.ids = torch.empty(rows, 0, dtype=torch.int64, device=device)
        self.where = torch.full((width,), -width, device=device)  # position of each kept key, far back where none is
        self.doc = torch.zeros(rows, width, dtype=torch.int64, device=device)  # and the number of its document

    def past(self, ids):
        """What hidden(ids, past=...) needs to go on with ids (B, T), at most `width` tokens."""
        model, new = self.model, torch.arange(self.at, self.at + ids.size(1), device=ids.device)
        where = torch.cat((self.where, new)) if self.at else new
        seen = ((where <= new[:, None]) & (where > new[:, None] - self.width))[None]
        if model.doc_mask == "attention":
            doc = self._documents(ids)
            seen = seen & (doc[:, -len(new):, None] == doc[:, None])
        rope = tuple(table.to(model.cos.dtype) for table in rotary_tables(new, *model.rope))
        return Past(self.ids, rope, seen, self.kept or [(None, None)] * len(model.plan), [])

    def _documents(self, ids):
        new = (ids == BOS).cumsum(1)
        return torch.cat((self.doc, new + self.doc.amax(1, keepdim=True)), 1) if self.at else new

    def commit(self, ids, new):
        """Go on behind ids, whose keys and values are `new`."""
        at = torch.arange(self.at, self.at + ids.size(1), device=ids.device)
        slots, self.at = at % self.width, self.at + len(at)
        if self.kept is None:
            self.kept = [tuple(z.new_zeros(len(z), self.width, *z.shape[2:]) for z in pair) for pair in new]
        self.doc[:, slots] = self._documents(ids)[:, -len(at):]
        self.where[slots] = at
        for old, pair in zip(self.kept, new):
            for z, part in zip(old, pair):
                z[:, slots] = part.detach()
        last = torch.cat((self.ids, ids), 1)[:, -3:]
        self.ids = last.clone(memory_format=torch.contiguous_format)  # one layout, one graph

    def advance(self, ids):
        """States (B, T, D) of the model on the next ids, which are taken in."""
        past = self.past(ids)
        hidden = self.model.hidden(ids, past=past)
        self.commit(ids, past.new)
        return hidden

    def narrow(self, rows):
        """Go on with the first rows only."""
        self.ids, self.doc = self.ids[:rows], self.doc[:rows]
        self.kept = self.kept and [tuple(z[:rows] for z in pair) for pair in self.kept]


class Objective(nn.Module):
    """What training minimises: the model's loss, each token weighted (complementary training), and that of heads which
    predict the tokens after the next (MTP). Those heads live here and not in the model: no artifact ever has them.
    """

    def __init__(self, model, s):
        super().__init__()
        self.model, self.mtp_weight = model, s.mtp_loss_weight
        width = s.embed_dim or s.model_dim
        self.mtp = nn.ModuleList(Linear(width, s.vocab_size, zero=True, role="head") for _ in range(s.mtp_num_heads))
        with torch.no_grad():
            for head in self.mtp:
                head.init(None)

    def forward(self, ids, targets, docs=None, weights=None):
        hidden = self.model.hidden(ids, docs)
        loss = self.model.loss(hidden, targets) if weights is None else (
            weights * self.model.loss(hidden, targets, reduction="none")).mean()
        for ahead, head in enumerate(self.mtp, 1):
            further = self.model.loss(hidden[:, :-ahead], targets[:, ahead:], head=head.weight)
            loss = loss + self.mtp_weight / len(self.mtp) * further
        return loss


def roles(model):
    """{parameter name: role}; a module that creates parameters without stating their role is an error."""
    table = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if not isinstance(getattr(module, "role", None), str):
                raise TypeError(f"{type(module).__name__} creates the parameter {full} but states no role")
            table[full] = module.role
    return table


# --------------------------------------------------------------------------------------------------
# 4 Runtime: device, dtype, ranks
# --------------------------------------------------------------------------------------------------


class Runtime:
    """Where the run happens, and why: device, dtype, ranks. Every automatic choice leaves a (name, choice, reason)."""

    def __init__(self, settings, env=None):
        env = os.environ if env is None else env
        ranks = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        self.rank, self.world, self.local = (int(env.get(name, default)) for name, default in ranks)
        self.choices = []
        cuda = torch.cuda.is_available()
        if settings.device == "cuda" and not cuda:
            raise BadInput("DEVICE=cuda but torch sees no CUDA device; use DEVICE=cpu, or a CUDA build of torch")
        use_cuda = cuda and settings.device != "cpu"
        if use_cuda and self.local >= torch.cuda.device_count():
            raise BadInput(f"local rank {self.local} has no GPU ({torch.cuda.device_count()}); lower --nproc_per_node")
        self.device = torch.device("cuda", self.local) if use_cuda else torch.device("cpu")
        count = torch.cuda.device_count() if cuda else "no"
        self.choose("device", self.device_name(), f"DEVICE={settings.device}, torch sees {count} CUDA device(s)")
        auto_dtype = "bfloat16" if use_cuda else "float32"
        self.dtype = getattr(torch, auto_dtype if settings.dtype == "auto" else settings.dtype)
        # A CPU without bf16 instructions runs bf16 8-15 times slower than fp32, so it is never chosen for it.
        self.choose("dtype", str(self.dtype).removeprefix("torch."), f"DTYPE={settings.dtype}")
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and use_cuda)
        self.choose("compile", "on" if self.compiled else "off", f"COMPILE={settings.compile}")
        if self.compiled:  # importing the compiler costs a second, and 3 % of each eager step
            torch._dynamo.config.recompile_limit = 64  # of one function: stages, loops, ways of scoring
        if use_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
            free, total = torch.cuda.mem_get_info()
            if free < 0.9 * total:
                self.choose("gpu_memory", f"{free >> 20}MiB_free", f"of {total >> 20} MiB: another process is here")
        self.control = None
        if self.world > 1:
            dist.init_process_group("nccl" if use_cuda else "gloo", device_id=self.device if use_cuda else None)
            # Clock and stop flags travel on the CPU, so agreeing on them never waits for the GPU.
            self.control = dist.new_group(backend="gloo") if use_cuda else dist.group.WORLD
        self._events = deque()

    def choose(self, name, choice, reason):
        self.choices.append((name, choice, reason))

    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def compile(self, function):
        """One fixed shape per graph; every graph a run will use is compiled in warm-up."""
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiled else function

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def throttle(self, depth=2):
        """Let the CPU run at most `depth` steps ahead of the GPU: the queue stays full, the clock stays honest."""
        if self.device.type == "cuda":
            self._events.append(torch.cuda.Event())
            self._events[-1].record()
            if len(self._events) > depth:
                self._events.popleft().synchronize()
        return len(self._events)

    def to_cpu(self, tensor):
        """A copy on the CPU, whole once throttle() has passed this step: reading it never waits for later work."""
        if self.device.type == "cpu":
            return tensor
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def max(self, *values):
        """The maximum over ranks of each number, equal on all ranks."""
        if self.world == 1:
            return values
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.control)
        return tuple(numbers.tolist())

    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, value):
        """Rank 0's (picklable) value on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value):
        """The (picklable) value of every rank, on all ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def peak_memory_mib(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) >> 20
        try:
            import resource
        except ImportError:  # not a Unix
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)

    def close(self):
        self.control = None  # a group that is still referred to when Python ends may abort the process
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# 5 Optimizer
# --------------------------------------------------------------------------------------------------

# Coefficients a, b, c of X <- a X + (b A + c A A) X, A = X X^T, one row an iteration, the last for all further ones.
NEWTON_SCHULZ = {
    "classic": ((3.4445, -4.7750, 2.0315),),  # Keller Jordan's Muon
    "polar_express": ((8.156554524902461, -22.48329292557795, 15.878769915207462),  # arXiv 2505.16932
                      (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                      (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                      (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                      (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}


def newton_schulz(update, steps, coefficients="classic", row_normalize=False, dtype=torch.float32):
    """Push the singular values of each matrix of a batch (N, rows, cols) towards 1; with row_normalize, rows - of the
    update as stored, not of its transpose - have norm 1 before that (MuonEq-R, #1285).
    """
    x = update.to(dtype)
    if row_normalize:
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    rows = NEWTON_SCHULZ[coefficients]
    for i in range(steps):
        a, b, c = rows[min(i, len(rows) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def normuon(update, moment, beta2):
    """NorMuon (arXiv 2510.05491): divide each row by the root of its running mean square `moment` (N, rows, 1), which
    is updated in place. The norm of each matrix is kept, so learning rates mean the same with and without it.
    """
    update = update.float()
    moment.lerp_(update.square().mean(-1, keepdim=True), 1 - beta2)
    scaled = update / (moment.sqrt() + 1e-10)
    return scaled * (update.norm(dim=(-2, -1), keepdim=True) / (scaled.norm(dim=(-2, -1), keepdim=True) + 1e-10))


def adamw(weight, grad, mean, square, t, lr, wd, betas, eps):
    """AdamW (arXiv 1711.05101), step number t from 1, with bias correction, decoupled decay first. All in place."""
    beta1, beta2 = betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)
    weight.mul_(1 - lr * wd).addcdiv_(mean, root, value=-lr / (1 - beta1**t))


# torch 2.14 renamed these two, and warns about the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class UpdateRule(NamedTuple):
    """How the parameters of a role are optimised."""

    kind: Literal["muon", "adam"]
    lr: float
    wd: float
    betas: Betas  # AdamW


def update_rules(s):
    betas, embed_lr = (s.beta1, s.beta2), s.tied_embed_lr if s.tie_embeddings else s.embed_lr
    matrix = "muon" if s.matrix_optimizer == "muon" else "adam"
    return {"matrix": UpdateRule(matrix, s.matrix_lr, s.muon_wd, s.matrix_betas or betas),
            "embed": UpdateRule("adam", embed_lr, s.embed_wd, s.embed_betas or betas),
            "head": UpdateRule("adam", s.head_lr, s.head_wd, s.head_betas or betas),
            "gate": UpdateRule("adam", s.scalar_lr, s.adam_wd, betas),
            "cap": UpdateRule("adam", 0.0, 0.0, betas),
            "scalar": UpdateRule("adam", s.scalar_lr, s.adam_wd, betas)}


class Bank:
    """Parameters of equal treatment in one tensor, of which they and their gradients are views: a bank is updated,
    reduced and averaged by single operations. Muon: one bank a shape, (matrices padded to a multiple of ranks, rows,
    cols), of which each rank orthogonalises its share. Adam: one flat bank a role, each parameter aligned to 256 bytes.
    """

    def __init__(self, role, treatment, entries, rt, neurons=False):
        self.role, (self.kind, self.lr, self.wd, self.betas) = role, treatment
        self.names, params = [name for name, _ in entries], [param for _, param in entries]
        self.shapes = [param.shape for param in params]
        if self.kind == "muon":
            self.share = -(-len(params) // rt.world)
            whole = (self.share * rt.world, *params[0].shape)
            self.mine = slice(rt.rank * self.share, (rt.rank + 1) * self.share)
        else:
            self.starts = np.cumsum([0] + [-(-p.numel() // 64) * 64 for p in params]).tolist()
            whole, self.mine = (self.starts[-1],), slice(None)
        device = params[0].device
        self.weight, self.grad = torch.zeros(whole, device=device), torch.zeros(whole, device=device)
        share = self.weight[self.mine]
        self.state = [torch.zeros_like(share)] + ([torch.zeros_like(share)] if self.kind == "adam" else
                                                  [torch.zeros_like(share[..., :1])] if neurons else [])
        for param, weight, grad in zip(params, self.views(self.weight), self.views(self.grad)):
            weight.copy_(param.data)
            param.data, param.grad = weight, grad

    def views(self, bank):
        """The parameters' parts of a tensor shaped like the bank."""
        if self.kind == "muon":
            return [bank[i] for i in range(len(self.names))]
        return [bank[a:][: shape.numel()].view(shape) for a, shape in zip(self.starts, self.shapes)]


class MuonAdam:
    """Muon for matrices, AdamW for the rest, on 1..N ranks; it owns all communication, there is no DDP wrapper.

    step(): reduce-scatter the matrix banks and all-reduce the flat ones, clip the global gradient, orthogonalise this
    rank's share and start gathering it, run AdamW meanwhile, apply. State is saved by parameter name, for any ranks.
    Momentum and second moments are fp32, on every number of ranks.
    """

    def __init__(self, model, s, rt):
        self.s, self.rt, self.t = s, rt, 0
        table, params = update_rules(s), dict(model.named_parameters())
        groups = {}
        for name, role in roles(model).items():
            if role not in table:
                raise KeyError(f"no treatment for role {role} of {name}")
            shape = tuple(params[name].shape) if table[role].kind == "muon" else ()
            groups.setdefault((role, shape), []).append((name, params[name]))
        order = sorted(groups, key=lambda g: -sum(p.numel() for _, p in groups[g]))  # largest first
        self.banks = [Bank(role, table[role], groups[role, shape], rt, s.normuon) for role, shape in order]
        self.table = {role: (len(names), sum(params[n].numel() for n in names), table[role]) for role in table
                      if (names := [n for (r, _), group in groups.items() if r == role for n, _ in group])}
        owned = sorted(name for bank in self.banks for name in bank.names)
        assert owned == sorted(params), "every parameter has exactly one owner"
        dtype = torch.bfloat16 if rt.device.type == "cuda" else torch.float32
        self.orthogonalise = rt.compile(partial(newton_schulz, steps=s.muon_backend_steps, dtype=dtype,
                                                coefficients=s.newton_schulz, row_normalize=s.muon_row_normalize))

    def zero_grad(self):
        for bank in self.banks:
            bank.grad.zero_()

    def _reduce(self):
        """Average the gradients over ranks. Returns each bank's gradient as this rank updates it."""
        if self.rt.world == 1:
            return [bank.grad for bank in self.banks]
        shares, works = [], []
        for bank in self.banks:
            if bank.kind == "muon":
                shares.append(torch.empty_like(bank.grad[bank.mine]))
                works.append(reduce_scatter(shares[-1], bank.grad, async_op=True))
            else:
                shares.append(bank.grad)
                works.append(dist.all_reduce(bank.grad, async_op=True))
        for work, share in zip(works, shares):
            work.wait()
            share.div_(self.rt.world)
        return shares

    def _clip(self, grads):
        """Scale the global gradient to a norm of at most GRAD_CLIP_NORM, without the host waiting for the device."""
        if not self.s.grad_clip_norm:
            return
        square = {"muon": torch.zeros((), device=self.rt.device), "adam": torch.zeros((), device=self.rt.device)}
        for bank, grad in zip(self.banks, grads):
            square[bank.kind] += grad.square().sum()
        norm = (self.rt.sum(square["muon"]) + square["adam"]).sqrt()  # matrices are shared out
        factor = (self.s.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor)

    @torch.no_grad()
    def step(self, lr_scale, momentum, wd_scale=1.0):
        """One update from the accumulated gradients: lr_scale multiplies every learning rate, wd_scale MUON_WD."""
        self.t += 1
        grads = self._reduce()
        self._clip(grads)
        pending = []
        for bank, grad in zip(self.banks, grads):
            if bank.kind == "muon":
                buffer = bank.state[0].mul_(momentum).add_(grad)
                update = self.orthogonalise(grad.add_(buffer, alpha=momentum))
                if self.s.normuon:
                    update = normuon(update, bank.state[1], self.s.muon_beta2)
                pending.append((bank, *self._gather(update)))
        for bank, grad in zip(self.banks, grads):
            if bank.kind == "adam":
                adamw(bank.weight, grad, *bank.state, self.t, bank.lr * lr_scale,
                      bank.wd * (wd_scale if bank.role == "matrix" else 1.0), bank.betas, self.s.adam_eps)
        for bank, update, work in pending:
            if work is not None:
                work.wait()
            lr = bank.lr * lr_scale
            rows, cols = bank.weight.shape[1:]
            bank.weight.mul_(1 - lr * bank.wd * wd_scale).add_(update, alpha=-lr * max(1.0, rows / cols) ** 0.5)

    def _gather(self, update):
        if self.rt.world == 1:
            return update, None
        whole = torch.empty(self.rt.world * update.size(0), *update.shape[1:], dtype=update.dtype, device=update.device)
        return whole, all_gather(whole, update.contiguous(), async_op=True)

    def named(self, tensors):
        """{parameter name: part} of tensors shaped like the banks."""
        pairs = zip(self.banks, tensors)
        return {name: view for bank, tensor in pairs for name, view in zip(bank.names, bank.views(tensor))}

    def _whole(self):
        """Optimizer state with every rank's share: a list of per-bank lists shaped like the banks."""
        return [[self._gather_now(t) for t in b.state] if b.kind == "muon" else b.state for b in self.banks]

    def _gather_now(self, share):
        whole, work = self._gather(share)
        if work is not None:
            work.wait()
        return whole

    def state_dict(self):
        """{"t": step, name: [state tensors]} on the CPU; collective: all ranks call it."""
        state = {"t": self.t}
        for bank, tensors in zip(self.banks, self._whole()):
            for parts in zip(bank.names, *(bank.views(t) for t in tensors)):
                state[parts[0]] = [part.cpu().clone() for part in parts[1:]]
        return state

    def load_state_dict(self, state):
        self.t = state["t"]
        for bank in self.banks:
            for i, share in enumerate(bank.state):
                whole = share.new_zeros(bank.weight.size(0), *share.shape[1:])
                for name, view in zip(bank.names, bank.views(whole)):
                    view.copy_(state[name][i])
                share.copy_(whole[bank.mine])


# ---- schedules -----------------------------------------------------------------------------------


def lr_scale(s, progress, step, total_steps, since_stage=None, seconds=None):
    """Multiplier of every learning rate at progress in [0, 1]: linear warm-up, 1, a line to 0 that stops at MIN_LR.

    total_steps: of the run, as far as known; only WARMDOWN_ITERS needs it. since_stage: steps since a stage began.
    seconds: of the run, where that is not MAX_WALLCLOCK_SECONDS.
    """
    warmup = min((step + 1) / s.lr_warmup_steps, 1.0) if s.lr_warmup_steps else 1.0
    if since_stage is not None and s.seq_change_warmup_steps:
        warmup *= min((since_stage + 1) / s.seq_change_warmup_steps, 1.0)
    return warmup * warmdown(s, progress, total_steps, seconds)


def warmdown(s, progress, total_steps, seconds=None):
    """The part of lr_scale that falls."""
    length = s.warmdown_frac
    if s.warmdown_iters:
        length = min(s.warmdown_iters / max(total_steps, 1), 1.0)
    elif s.warmdown_seconds:
        length = min(s.warmdown_seconds / (seconds or s.max_wallclock_seconds), 1.0)
    return max(min((1 - progress) / length, 1.0) if length else 1.0, s.min_lr)


def wd_scale(s, progress):
    """Multiplier of MUON_WD: 1 up to WD_TAPER_START_FRAC, then linear to WD_TAPER_FINAL_MULT (#1729)."""
    start = s.wd_taper_start_frac
    return 1 + (s.wd_taper_final_mult - 1) * max(progress - start, 0.0) / (1 - start) if start else 1.0


def momentum_at(s, step):
    """Momentum of Muon: linear from its start value over the first steps."""
    part = min(step / s.muon_momentum_warmup_steps, 1.0) if s.muon_momentum_warmup_steps else 1.0
    return s.muon_momentum_warmup_start + (s.muon_momentum - s.muon_momentum_warmup_start) * part


# ---- complementary training ----------------------------------------------------------------------


class Complement:
    """Complementary training (#1033): a token that bigram counts predict with p = C[a, b] / (N[a] + 1) weighs
    max(1 - COMPLEMENT_ALPHA p, 0.1), over the mean weight of the step. The counts are of all earlier steps and ranks,
    so they do not depend on ranks or micro-batches, and int64: float32 stops counting at 2^24.
    """

    def __init__(self, s, rt):
        self.alpha, self.vocab, self.rt = s.complement_alpha, s.vocab_size, rt
        self.pairs = torch.zeros(s.vocab_size**2, dtype=torch.int64, device=rt.device)
        self.count = torch.zeros(s.vocab_size, dtype=torch.int64, device=rt.device)

    def weights(self, micro):
        """[(B, T) weights] for a step's [(ids, targets, ...)], of mean 1 over all ranks."""
        raw = [1 - self.alpha * self.pairs[x * self.vocab + y] / (self.count[x] + 1.0) for x, y, *_ in micro]
        raw = [w.clamp_min(0.1) for w in raw]
        mean = self.rt.sum(torch.stack([w.double().sum() for w in raw]).sum()) / (
            self.rt.world * sum(w.numel() for w in raw))
        return [(w / mean).float() for w in raw]

    def observe(self, micro):
        """Count a step that has been trained on."""
        pairs = torch.cat([(x * self.vocab + y).flatten() for x, y, *_ in micro])
        if self.rt.world > 1:
            mine, pairs = pairs, pairs.new_empty(self.rt.world * len(pairs))
            all_gather(pairs, mine)
        self.count_pairs(pairs, torch.ones_like(pairs))

    def count_pairs(self, pairs, times):
        self.pairs.index_add_(0, pairs, times)
        self.count.index_add_(0, pairs // self.vocab, times)

    def state_dict(self):
        """Pairs that occurred, and how often; the same on all ranks."""
        pairs = self.pairs.nonzero().squeeze(1)
        return {"pairs": pairs.cpu(), "times": self.pairs[pairs].cpu()}

    def load_state_dict(self, state):
        self.pairs.zero_(), self.count.zero_()
        self.count_pairs(state["pairs"].to(self.rt.device), state["times"].to(self.rt.device))


# ---- weight averages -----------------------------------------------------------------------------


class Average:
    """Candidates for the exported weights, in fp32: bf16 would swallow the small steps of a slow average (#1699).

    `taken` holds per kind a list of snapshots shaped like the banks: for "ema" the running mean, for "swa" the sum of
    `count` snapshots, for "lawa" the last LAWA_K.
    """

    def __init__(self, s, banks):
        self.s, self.banks, self.snapshots, self.count = s, banks, {}, 0
        self.begun = 0  # the step whose weights EMA began with; 0: the initial weights
        self.kinds = {"none": (), "best": ("ema", "swa", "lawa")}.get(s.average, (s.average,))

    def start(self):
        """Before the first step: an average that runs from the beginning starts at the initial weights."""
        if "ema" in self.kinds and self.s.ema_start_frac == 0:
            self.snapshots["ema"] = [self.copy()]

    def copy(self):
        return [bank.weight.clone() for bank in self.banks]

    @torch.no_grad()
    def update(self, step, progress, scale):
        """After optimizer step number `step` (from 1), begun at `progress` with learning-rate scale `scale`."""
        s = self.s
        if "ema" in self.kinds and progress >= s.ema_start_frac:
            if "ema" in self.snapshots:
                for mean, bank in zip(self.snapshots["ema"][0], self.banks):
                    mean.lerp_(bank.weight, 1 - s.ema_decay)
            else:
                self.snapshots["ema"], self.begun = [self.copy()], step
        if "swa" in self.kinds and scale < s.swa_start_scale and step % s.swa_every == 0:
            sums = self.snapshots.setdefault("swa", [[torch.zeros_like(bank.weight) for bank in self.banks]])[0]
            for total, bank in zip(sums, self.banks):
                total.add_(bank.weight)
            self.count += 1
        if "lawa" in self.kinds and step % s.lawa_freq == 0:
            self.snapshots["lawa"] = [*self.snapshots.get("lawa", []), self.copy()][-s.lawa_k :]

    def mean(self, kind):
        """The average of a kind, shaped like the banks, or None if nothing was ever taken."""
        if kind not in self.snapshots:
            return None
        count = self.count if kind == "swa" else len(self.snapshots[kind])
        return [sum(parts) / count for parts in zip(*self.snapshots[kind])]

    @torch.no_grad()
    def apply(self, weights):
        """Replace the weights by these."""
        for bank, weight in zip(self.banks, weights):
            bank.weight.copy_(weight)


# --------------------------------------------------------------------------------------------------
# 6 Data
# --------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 1024  # 256 little-endian int32 words, then uint16 tokens
SPACE = "\u2581"  # what SentencePiece writes for a space
SPACED_TEXTS = "a b", "zq\U0001f9ff \U0001f9ff xj"  # in any vocabulary, and in none
# Characters that NFKC leaves alone and that case folding, or a rule of a user's own, may change.
LETTERS = "".join(map(chr, range(33, 127))) + "\xc9\xdf\u03a3\u042f"
CONTEST_NORMALISATIONS = "identity", "nfkc", "nmt_nfkc"  # nmt_nfkc, or less
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"  # of a CaseOps tokenizer (#1729); the last one escapes the others
FINEWEB_VAL_BYTES = 151_080_891  # of the 50,000 validation documents, whatever the tokenizer (rules of the contest)


# ---- shards --------------------------------------------------------------------------------------


def read_shard(path, vocab_size=None):
    """Tokens of a shard as a read-only uint16 memory map. BadInput for anything that is not the contest's format;
    with vocab_size also for a token outside the vocabulary.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    words = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    for offset, what, found, expected in ((0, "magic", words[0], SHARD_MAGIC), (4, "version", words[1], SHARD_VERSION),
                                          (8, "length in bytes", size, SHARD_HEADER + 2 * max(words[2], 0))):
        if found != expected:
            raise BadInput(f"{path}: not a token shard: {what} (offset {offset}) should be {expected}, found {found}; "
                           "make it again with data/prepare.py or data/fineweb.py")
    if words[2] == 0:
        raise BadInput(f"{path}: the shard holds no tokens (offset 8)")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER, shape=(words[2],))
    if vocab_size is not None:
        check_tokens(tokens, vocab_size, path, 0)
    return tokens


def check_tokens(tokens, vocab_size, path, start):
    """BadInput if a token is outside the vocabulary; `start` is the index in the shard of tokens[0]."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise BadInput(f"{path}: token {int(tokens[at])} at offset {SHARD_HEADER + 2 * (start + at)} is outside "
                       f"VOCAB_SIZE={vocab_size}; these shards belong to another tokenizer")


def list_shards(folder, split):
    """Shards of a split in the order of their numbers, with or without leading zeros; BadInput for copies."""
    paths = {}
    for path in sorted(Path(folder).glob(f"fineweb_{split}_[0-9]*.bin")):
        number = path.stem.removeprefix(f"fineweb_{split}_")
        if not number.isdecimal():
            raise BadInput(f"{path}: {number!r} is no number of a shard; move the file away, or rename it")
        if int(number) in paths:
            raise BadInput(f"{path}: has the number of {paths[int(number)].name}; move one of them away")
        paths[int(number)] = path
    return [paths[number] for number in sorted(paths)]


def find_shards(folder, split):
    """The shards of a split, at least one."""
    paths = list_shards(folder, split)
    if not paths:
        variant = Path(folder).name.removeprefix("fineweb10B_")
        fix = (f"python data/fineweb.py --variant {variant} --train-shards 80" if "fineweb10B_" in str(folder)
               else f"python data/prepare.py --source YOUR_TEXT --out {folder}")
        raise BadInput(f"no fineweb_{split}_*.bin in DATA_PATH={folder}; make them with: {fix}"
                       "   (or, with no download: python data/prepare.py --source builtin)")
    return paths


# ---- tokenizer and bytes -------------------------------------------------------------------------


def load_tokenizer(s):
    """(SentencePiece processor, path, SHA-256) for the settings' shards."""
    try:
        import sentencepiece
    except ImportError:
        raise BadInput("tokenizers need the package sentencepiece: pip install sentencepiece") from None
    folder = Path(s.data_path)
    variant = folder.name.partition(f"_sp{s.vocab_size}")[2]  # of fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
    places = [Path(s.tokenizer_path)] if s.tokenizer_path else [
        folder / "tokenizer.model", folder.parent.parent / "tokenizers" / f"fineweb_{s.vocab_size}_bpe{variant}.model"]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise BadInput(f"no tokenizer at {' or '.join(map(str, places))}; set TOKENIZER_PATH, or make one with "
                       "data/prepare.py or data/fineweb.py")
    try:
        data = path.read_bytes()  # of a path that is not UTF-8, too
        sp = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError) as error:
        raise BadInput(f"{path} is not a SentencePiece model ({str(error).splitlines()[0][:80]})") from None
    if sp.vocab_size() != s.vocab_size:
        raise BadInput(f"{path} has {sp.vocab_size()} pieces but VOCAB_SIZE={s.vocab_size}; make them equal")
    if fault := tokenizer_fault(sp):
        raise BadInput(f"{path}: {fault}")
    digest = hashlib.sha256(data).hexdigest()
    made_with = manifest_tokenizer(folder)
    if made_with not in (None, digest):
        raise BadInput(f"{path} (SHA-256 {digest[:12]}) is not the tokenizer of the shards in {folder} "
                       f"(manifest: {made_with[:12]}); set TOKENIZER_PATH")
    return sp, path, digest


def manifest_tokenizer(folder):
    """SHA-256 of the tokenizer that a data set was made with, by its manifest; None where that is unknown."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        digest = manifest["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # _check_bytes names a broken one
        return None
    return digest if isinstance(digest, str) else None


def foreign_tokens(sp, stream):
    """What suggests that validation shards are of another tokenizer, in words; "" if nothing does.

    A wrong tokenizer of the right size decodes them to a text that is nobody's, whose bytes it counts right.
    """
    ids = stream.tokens[:200_000].cpu().numpy()
    starts = np.flatnonzero(ids == BOS)[:101]
    documents = [ids[a + 1 : b].tolist() for a, b in zip(starts, starts[1:])]
    encoded = [sp.encode(sp.decode(document)) for document in documents]
    other = sum(one != two for one, two in zip(documents, encoded))
    if other <= max(1, len(documents) // 10):  # normalising twice changes a text now and then
        return ""
    return (f"{other} of {len(documents)} validation documents, decoded and encoded again, have other "
            "tokens: they seem to be of another tokenizer")


def tokenizer_fault(sp):
    """Why the byte table would miscount the texts of a SentencePiece processor, with the fix; "" if not.

    Asked by the trainer and by data/prepare.py. Control pieces count nothing: only the id of BOS matters.
    """
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    if sp.bos_id() != BOS:
        ids = sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()
        return f"pad, bos, eos and unk are {ids}, but documents begin with {BOS}; train it with bos_id={BOS}"
    byte_pieces = sum(sp.is_byte(i) for i in range(len(pieces)))
    if byte_pieces != 256:
        return f"{byte_pieces} byte pieces instead of 256, so some text is lost; train it with byte_fallback"
    escapes_spaces = SPACE in sp.normalize("a b")
    if escapes_spaces and sp.is_unknown(sp.piece_to_id(SPACE)):
        return "no piece for a single space (U+2581), so it would count 3 bytes; use a tokenizer that has it"
    inside = next((piece for piece in pieces if SPACE in piece[1:]), None)
    if inside:
        return (f"a space inside the piece {inside[:20]!r}, but the byte table knows it in front only; use a "
                "tokenizer without such pieces")
    # A model of words spells an unknown word in bytes, with the 3 bytes of U+2581 in front.
    tables = byte_tables(sp, len(pieces))
    for text in SPACED_TEXTS:
        size = len(sp.normalize(text).replace(SPACE, " ").removeprefix(" ").encode())
        counted = int(target_bytes([BOS, *sp.encode(text)], tables).sum())
        if counted != size:
            return f"{text!r} has {size} bytes, its tokens count {counted}; use a BPE, unigram or char model"
    return ""


def text_changes(sp):
    """How a tokenizer changes texts more than the contest's do (NFKC, runs of spaces); "" if not."""
    spec = protobuf_fields(protobuf_fields(sp.serialized_model_proto()).get(3, b""))
    # Without a table of characters nothing changes, whatever the name.
    name = spec.get(1, b"")[:40].decode(errors="replace") if spec.get(2) else "identity"
    written = {c: sp.normalize(c).removeprefix(SPACE) for c in LETTERS}
    changed = [c for c in LETTERS if written[c] != c]
    if name in CONTEST_NORMALISATIONS and not changed:
        return ""
    example = f" (it writes {written[changed[0]]!r} for {changed[0]!r})" if changed else ""
    return f"bytes are those of the normalised text: the normalisation {name!r} changes it{example}"


def protobuf_fields(message):
    """{number: value} of a protobuf message: numbers as int, all else as bytes; of repeats the last."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while message[at] >= 128:
            value |= (message[at] & 127) << shift
            shift += 7
            at += 1
        at += 1
        return value | message[at - 1] << shift

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found[number] = varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        found[number] = message[at : at + size]
        at += size
    return found


def byte_tables(sp, vocab_size):
    """The contest's byte rule as tables over the vocabulary: (bytes of the piece, has a leading space, is a boundary).

    A leading space costs one byte more unless the token before is a boundary (control, unknown or unused piece).
    """
    base, lead, edge = np.zeros(vocab_size, np.int16), np.zeros(vocab_size, bool), np.ones(vocab_size, bool)
    for i in range(min(sp.vocab_size(), vocab_size)):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            base[i] = 1
            continue
        piece = sp.id_to_piece(i)
        lead[i] = piece.startswith("\u2581")
        base[i] = len(piece[int(lead[i]):].encode())
    return base, lead, edge


def target_bytes(ids, tables):
    """Bytes charged to each target ids[1:], int16: what the score divides by."""
    base, lead, edge = tables
    ids = np.asarray(ids)
    return base[ids[1:]] + (lead[ids[1:]] & ~edge[ids[:-1]]).astype(np.int16)


def has_case_operators(sp):
    """Whether this is a CaseOps tokenizer, whose shards hold a transformed text."""
    return not any(sp.is_unknown(sp.piece_to_id(operator)) for operator in CASE_OPERATORS)


def read_sidecar(paths):
    """Bytes of the text behind each token of the validation shards, (N,) int32, from the files that CaseOps data has
    beside them (#1729); None where there are none.
    """
    expected = [Path(path).with_name(Path(path).name.replace("_val_", "_val_bytes_")) for path in paths]
    found = list_shards(expected[0].parent, "val_bytes")
    again = "make or fetch the data set again with data/prepare.py --caseops or data/fineweb.py"
    if found and found != expected:
        raise BadInput(f"{expected[0].parent}: expected one fineweb_val_bytes_*.bin for each of the {len(expected)} "
                       f"validation shards, found {len(found)}: {', '.join(p.name for p in found[:3])}; {again}")
    for path, counts in zip(paths, found):
        ids, values = read_shard(path), read_shard(counts)
        if len(ids) != len(values):
            raise BadInput(f"{counts}: expected {len(ids)} byte counts, one for each token of {Path(path).name}, "
                           f"found {len(values)}; {again}")
        if (wrong := (ids == BOS) & (values > 0)).any():
            at = int(np.argmax(wrong))
            raise BadInput(f"{counts}: expected 0 bytes for the BOS token at offset {SHARD_HEADER + 2 * at}, found "
                           f"{int(values[at])}: it belongs to another shard; {again}")
    return np.concatenate([read_shard(path) for path in found]).astype(np.int32) if found else None


# ---- training stream -----------------------------------------------------------------------------


def merge_short_shards(lengths, least):
    """Lengths of the parts that blocks are dealt from: the shards, but one shorter than `least` is joined to
    the next ones until it is long enough, at the end to the one before.
    """
    parts, joined = [], 0
    for length in lengths:
        joined += length
        if joined >= least:
            parts.append(joined)
            joined = 0
    if joined and parts:
        parts[-1] += joined
    elif joined:
        parts = [joined]
    return parts


def shuffled_order(counts, rng, chunk=None):
    """Every block of every shard once, as (shard, block), in random order (#1394)."""
    blocks = np.stack([np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])], 1)
    return blocks[rng.permutation(len(blocks))]


def coprime_order(counts, rng, chunk):
    """Every block of every shard once, as (shard, block), in the manner of #1060: a shard is walked by a stride that is
    coprime to its number of blocks; each `chunk` of blocks mixes 8 to 64 shards, drawn with probability proportional
    to what is left in them to the power of 0.9 to 0.5, the mixture growing over 1,800 chunks.
    """
    def stride(n):
        return next(s for s in rng.permutation(np.arange(1, n)) if math.gcd(int(s), n) == 1) if n > 1 else 1

    walks = [(int(rng.integers(n)) + stride(n) * np.arange(n)) % n if n else np.arange(0) for n in counts]
    counts, used, order = np.array(counts), np.zeros(len(counts), int), []
    while (left := counts - used).any():
        part = min(len(order) / 1800, 1.0)
        weight = left ** (0.9 - 0.4 * part) * (left > 0)
        mix = min(round(8 + 56 * part), int((left > 0).sum()), chunk)
        chosen = rng.choice(len(counts), mix, replace=False, p=weight / weight.sum())
        share = 1 + rng.multinomial(chunk - mix, weight[chosen] / weight[chosen].sum())
        rows = []
        for shard, take in zip(chosen, np.minimum(share, left[chosen])):
            rows.append(np.stack([np.full(take, shard), walks[shard][used[shard] : used[shard] + take]], 1))
            used[shard] += take
        order.append(rng.permutation(np.concatenate(rows)))
    return np.concatenate(order)


class Contamination:
    """Which documents of a text occur in another one: those whose first PREFIX tokens do, behind a BOS there, too."""

    PREFIX = 64  # as for data/prepare.py, which leaves out such training documents
    POWERS = np.array([pow(6364136223846793005, i, 1 << 64) for i in range(1, PREFIX + 1)], np.uint64)

    def __init__(self, tokens):
        self.keys = np.unique(self._keys(tokens))
        self.met = np.zeros(len(self.keys), bool)

    def _keys(self, tokens):
        begins = np.flatnonzero(tokens == BOS) + 1
        begins = begins[begins + self.PREFIX <= len(tokens)]
        openings = tokens[begins[:, None] + np.arange(self.PREFIX)].astype(np.uint64)
        openings = openings[(openings != BOS).all(1)]  # shorter documents say too little
        return (openings * self.POWERS).sum(1, dtype=np.uint64)

    def look(self, tokens):
        if len(self.keys):
            keys = self._keys(tokens)
            at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            self.met[at[self.keys[at] == keys]] = True

    def found(self, rt):
        """Keys of the openings that any rank has met. Collective."""
        met = rt.sum(torch.from_numpy(self.met.astype(np.int32)).to(rt.device)) > 0
        return self.keys[met.cpu().numpy()]

    def restore(self, keys):
        """Those of an earlier part of the run."""
        self.met |= np.isin(self.keys, keys)


class TokenStream:
    """Training batches; each target is used at most once an epoch. LOADER says in which order:

    sequential: cut one after the other from the concatenated shards; packed: the same, a micro-batch as one long row
    whose documents do not see each other; shuffled, coprime: blocks of the longest training sequence, reordered each
    epoch; a shard that is too short for a block is joined to the next. The whole state is `position`: a batch
    depends on the settings only, any number of ranks sees the same stream, a checkpoint is a number. A thread
    reads the next batch while this one is trained on.
    """

    def __init__(self, paths, s, rt, documents=None):
        self.paths, self.s, self.rt, self.position, self.documents = paths, s, rt, 0, documents
        self.copies = Contamination(np.empty(0, np.uint16))  # of validation documents; looked for in all that is read
        self.shards = [read_shard(path) for path in paths]
        self.hold_out(s.holdout_tokens if s.average == "best" else 0)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        for _, length, tokens in s.stages:
            if tokens // length % rt.world:
                raise BadInput(f"TRAIN_BATCH_TOKENS={tokens} is {tokens // length} sequences of TRAIN_SEQ_LEN="
                               f"{length}, which {rt.world} ranks cannot share evenly")
            if (share := self.rows(length, tokens))[0] % share[1]:
                raise BadInput(f"LOADER=packed makes rows of {share[1] * length} tokens, but {rt.world} ranks have "
                               f"{share[0] * length} each; MICRO_BATCH_TOKENS={share[0] * length} makes them fit")
        self.block = max(length for _, length, _ in s.stages)
        self.lengths = merge_short_shards([len(shard) for shard in self.shards], self.block + 1)
        self.counts = [(length - 1) // self.block for length in self.lengths]
        if self.ends[-1] < 2:
            raise BadInput(f"{paths[0]}: the training stream holds fewer than 2 tokens")
        if self.reordered and not sum(self.counts):
            raise BadInput(f"{paths[0]}: LOADER={s.loader} deals out blocks, but the shards hold fewer than "
                           f"the {self.block + 1} tokens of one; shorten the sequences, or prepare more text")
        self.total = sum(self.counts) * self.block if self.reordered else int(self.ends[-1])
        self._orders, self._thread, self._ahead = {}, ThreadPoolExecutor(1, "loader"), (None, None)

    @property
    def reordered(self):
        return self.s.loader in ("shuffled", "coprime")

    @property
    def epoch(self):
        return self.position / self.total

    def hold_out(self, count):
        """Set the end of the stream aside: `held` is not trained on."""
        held = []
        while count > 0 and self.shards:
            shard = self.shards.pop()
            start = max(len(shard) - count, 0)
            held.insert(0, shard[start:])
            check_tokens(held[0], self.s.vocab_size, self.paths[len(self.shards)], start)
            count -= len(held[0])
            if len(shard) > len(held[0]):
                self.shards.append(shard[: -len(held[0])])
        if not self.shards:
            raise BadInput(f"HOLDOUT_TOKENS={self.s.holdout_tokens} leaves nothing to train on")
        self.held = np.concatenate(held) if held else np.empty(0, np.uint16)

    def rows(self, length, tokens):
        """(rows of a rank, rows of a micro-batch): equal shapes, so that one graph serves."""
        rows = tokens // length // self.rt.world
        shared = tokens // length if self.s.loader == "packed" else rows  # a packed row is the same for any ranks
        most = max(1, min(shared, self.s.micro_batch_tokens // length))
        return rows, max(n for n in range(1, most + 1) if shared % n == 0)

    def read(self, start, count):
        """`count` tokens from `start`, wrapping at the end of the stream."""
        out, filled = np.empty(count, np.uint16), 0
        while filled < count:
            at = (start + filled) % int(self.ends[-1])
            i = int(np.searchsorted(self.ends, at, side="right"))
            offset = at - (int(self.ends[i - 1]) if i else 0)
            part = self.shards[i][offset : offset + count - filled]
            check_tokens(part, self.s.vocab_size, self.paths[i], offset)
            out[filled : filled + len(part)] = part
            filled += len(part)
        self.copies.look(out)
        return out

    def _starts(self, epoch):
        """Where the blocks of an epoch start in the concatenated shards, in their order."""
        if epoch not in self._orders:
            rng = np.random.default_rng([self.s.seed, epoch])
            phases = [int(rng.integers((length - 1) % self.block + 1)) for length in self.lengths]
            chunk = max(self.s.stages[-1][2] // self.block, 1)
            shard, block = (shuffled_order if self.s.loader == "shuffled" else coprime_order)(self.counts, rng, chunk).T
            firsts = np.cumsum([0, *self.lengths[:-1]]) + phases
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}  # a batch spans two at most
            self._orders[epoch] = firsts[shard] + block * self.block
        return self._orders[epoch]

    def sequence(self, position, length):
        """The `length` + 1 tokens of the training sequence at a position of the reordered stream."""
        epoch, at = divmod(position, self.total)
        return self.read(int(self._starts(epoch)[at // self.block]) + at % self.block, length + 1)

    def next(self, length=None, tokens=None):
        """This rank's part of the next batch: micro-batches [(x, y, docs)], x and y (rows, length) int64; docs None
        where the model can tell them from x. Without arguments the batch of the first stage.
        """
        length, tokens = length or self.s.stages[0][1], tokens or self.s.stages[0][2]
        # A stage may begin inside a block of the one before.
        start = -(-self.position // length) * length if self.reordered else self.position
        (key, future), wanted = self._ahead, (start, length, tokens)
        ready = (future if key == wanted else self._thread.submit(self._read_batch, *wanted)).result()
        self.position = start + tokens
        following = (self.position, length, tokens)
        self._ahead = following, self._thread.submit(self._read_batch, *following)
        return self._to_device(*ready)

    def _read_batch(self, start, length, tokens):
        """On the CPU, pinned where there is a GPU; called by the thread."""
        rows, micro_rows = self.rows(length, tokens)
        first = start + self.rt.rank * rows * length
        if self.reordered:
            batch = np.stack([self.sequence(first + i * length, length) for i in range(rows)])
        else:
            width = micro_rows * length if self.s.loader == "packed" else length
            span = self.read(first, rows * length + 1)
            batch = np.lib.stride_tricks.sliding_window_view(span, width + 1)[::width]
        return self._pinned(torch.from_numpy(batch.astype(np.int32)), length, micro_rows)

    def synthetic(self, generator, length=None, tokens=None):
        """A batch of random tokens in exactly the memory layout of a real one, so that it compiles the same graph."""
        length, tokens = length or self.s.stages[0][1], tokens or self.s.stages[0][2]
        rows, micro_rows = self.rows(length, tokens)
        shape = (rows // micro_rows, micro_rows * length + 1) if self.s.loader == "packed" else (rows, length + 1)
        batch = torch.randint(self.s.vocab_size, shape, dtype=torch.int32, generator=generator)
        return self._to_device(*self._pinned(batch, length, micro_rows))

    def _pinned(self, batch, length, micro_rows):
        """(tokens of each micro-batch, their docs): lengths for a varlen kernel are counted where nothing waits."""
        parts = batch.split(1 if self.s.loader == "packed" else micro_rows)
        docs = [self.documents(part[:, :-1], length) if self.documents else None for part in parts]
        if self.rt.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
            docs = [d and Docs(*(z if z is None else z.pin_memory() for z in d)) for d in docs]
        return parts, docs

    def _to_device(self, parts, docs):
        parts = [part.to(self.rt.device, non_blocking=True).long() for part in parts]
        docs = [d and Docs(*(z if z is None else z.to(self.rt.device, non_blocking=True) for z in d)) for d in docs]
        for d in docs if self.rt.compiled else ():
            if d and d.cu is not None:
                torch._dynamo.maybe_mark_dynamic(d.cu, 0)  # one graph for any number of documents
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous(), d) for part, d in zip(parts, docs)]


# ---- validation stream ---------------------------------------------------------------------------


class ValStream(NamedTuple):
    """The validation text: every token after the first is a target."""

    tokens: Tensor  # (N + 1,) int32 on the device
    bytes: Tensor  # (N,) int16 or int32: bytes charged to each target
    whole: bool  # False where VAL_TOKENS cut it
    sidecar: bool = False  # the bytes are those of fineweb_val_bytes_*.bin, not of the byte table


def load_validation(s, rt, sp):
    """All validation shards in order, with the bytes of each target: counted from the ids alone, before any scoring,
    or given by a sidecar. BadInput where case operators have none: the table would count 3 bytes for each.
    """
    paths = find_shards(s.data_path, "val")
    ids = np.concatenate([read_shard(path, s.vocab_size) for path in paths])
    whole = not s.val_tokens or s.val_tokens >= len(ids) - 1
    ids = ids if whole else ids[: s.val_tokens + 1]
    if len(ids) - 1 < s.eval_seq_len:
        raise BadInput(f"the validation stream has {len(ids) - 1} targets, fewer than one window of "
                       f"EVAL_SEQ_LEN={s.eval_seq_len}; shorten it, or prepare more validation text")
    given = read_sidecar(paths)
    if given is None and has_case_operators(sp):
        raise BadInput(f"{s.data_path}: the tokenizer has case operators, which are no bytes of the text, but there is "
                       "no fineweb_val_bytes_*.bin; make it with data/prepare.py --caseops, or use data/fineweb.py")
    counted = target_bytes(ids, byte_tables(sp, s.vocab_size)) if given is None else given[1 : len(ids)]
    ids, counted = torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(counted)
    return ValStream(ids.to(rt.device), counted.to(rt.device), whole, given is not None)


# --------------------------------------------------------------------------------------------------
# 7 Quantisation
# Weights become integers ("codes") times step sizes. Calibration measures how much the loss rises
# with an error in each weight; GPTQ, FIT=allocate, AWQ-lite and LQER go by that. Quantiser puts it
# all together.
# --------------------------------------------------------------------------------------------------


# ---- calibration: how sensitive the loss is to an error in each weight ---------------------------


class Moments(NamedTuple):
    """How sensitive the loss is to an error E (R, C) in one weight, by its second-order term: the
    loss rises by half the sum over rows r of gain[r] E[r] hessian E[r]^T, in nats a token. This is
    the Fisher information as a Kronecker product (K-FAC, arXiv 1503.05671) whose second factor is
    diagonal.
    """

    # (C, C) mean of x x^T over tokens and visits of its layer; x: what the weight multiplies
    hessian: Tensor
    # (R,) squared gradient of a token's loss at each output, summed over visits
    gain: Tensor
    # for a head: logit variance per unit of E[r] hessian E[r]^T
    logits: float = 0.0
    # (C,) mean square of each column of x; None for a table whose rows are looked up
    inputs: Tensor | None = None

    def to(self, device):
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in self]
        return Moments(*moved)

    def loss(self, error):
        """Nats a token by which an error (R, C) of the weight raises the loss."""
        return 0.5 * (self.gain @ ((error @ self.hessian) * error).sum(1)).item()


class MomentMeter:
    """Sums for Moments over texts, by hooks on the one forward. The labels are those of the text:
    sampling them from the model, as theory wants, gave the same artifact to 0.2 % of its bytes.
    """

    def __init__(self, model):
        self.model = model
        self.tokens = 0
        self.hessian = {}  # {parameter: (C, C) sum of x x^T}
        self.gain = {}  # {parameter: (R,) sum of squared gradients}
        self.inputs = {}  # {parameter: number of x in its Hessian}
        self._owner = {}  # {parameter: whose Hessian is its own}: q, k and v read one tensor
        self._last_input = None
        self._last_owner = None
        self._features = None  # output of head_proj, where the model has one

    @contextlib.contextmanager
    def _watching(self):
        """Hooks on every Linear and Table. Hidden states need gradients meanwhile, which the
        tables give them; matrices need none.
        """
        hooks = []
        trained = [param for param in self.model.parameters() if param.requires_grad]
        for name, module in self.model.named_modules():
            if isinstance(module, Linear):
                watch = self._watch_linear
            elif isinstance(module, Table):
                watch = self._watch_table
            else:
                continue
            hooks.append(module.register_forward_hook(partial(watch, f"{name}.weight")))
            module.weight.requires_grad_(isinstance(module, Table))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for param in trained:
                param.requires_grad_(True)
                if param.grad is not None:
                    param.grad.zero_()
            self._last_input = None
            self._last_owner = None
            self._features = None

    def _add(self, sums, name, value):
        sums[name] = sums[name].add_(value) if name in sums else value

    def _watch_linear(self, name, module, args, output):
        """args: the input x of the matrix and, where its rows are scaled, their scale."""
        x = args[0]
        scale = args[1] if len(args) > 1 else None
        if x is not self._last_input:
            flat = x.detach().flatten(0, -2).float()
            self._add(self.hessian, name, flat.mT @ flat)
            self.inputs[name] = self.inputs.get(name, 0) + len(flat)
            self._last_input = x
            self._last_owner = name
        self._owner[name] = self._last_owner
        if module is self.model.head_proj:
            self._features = output.detach()

        def backward(gradient):
            square = gradient.flatten(0, -2).float().square().sum(0)
            if scale is not None:
                square = square * scale.detach().float().square()
            self._add(self.gain, name, square)

        output.register_hook(backward)

    def _watch_table(self, name, module, args, output):
        """A table: an error in a row counts once for each lookup, each time through the gradient
        at the output.
        """
        lookups = torch.bincount(args[0].flatten(), minlength=module.weight.size(0))
        self._add(self.gain, name, lookups.float())
        self._owner[name] = name

        def backward(gradient):
            flat = gradient.flatten(0, -2).float()
            self._add(self.hessian, name, flat.mT @ flat)

        output.register_hook(backward)

    def observe(self, ids, targets):
        """Add the text ids, targets (B, T): one forward and one backward."""
        self._features = None
        with self._watching(), torch.enable_grad():
            hidden = self.model.hidden(ids)
            logits = self.model.logits(hidden)
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
            features = hidden if self._features is None else self._features
            self._add_head(features.detach().flatten(0, -2).float(), logits.detach())
        self.tokens += targets.numel()

    @torch.no_grad()
    def _add_head(self, features, logits):
        """The head's gain is known in closed form: p (1 - p) for each logit before its cap."""
        p = logits.softmax(-1)
        slope = 1.0
        if self.model.softcap:
            slope = 1 - (logits / self.model.cap_of(logits)).square()
        self._add(self.gain, "head", (p * (1 - p) * slope**2).flatten(0, -2).sum(0))
        self._add(self.hessian, "head", features.mT @ features)

    def moments(self, rt):
        """{parameter: Moments} over the texts of all ranks."""
        tokens = rt.sum(torch.tensor(float(self.tokens), device=rt.device))
        for sums in (self.hessian, self.gain):
            for name in sorted(sums):
                rt.sum(sums[name]).div_(tokens)
        for name, inputs in self.inputs.items():  # mean over visits, their errors unrelated
            self.hessian[name].div_(inputs / self.tokens)

        moments = {}
        for name, owner in self._owner.items():
            hessian = self.hessian[owner]
            moments[name] = Moments(hessian, self.gain[name], inputs=hessian.diagonal())
        for name, module in self.model.named_modules():
            if isinstance(module, Table):
                moments[f"{name}.weight"] = self._of_table(moments[f"{name}.weight"], tokens)

        hessian = self.hessian.pop("head")
        head = Moments(hessian, self.gain.pop("head"), 1.0, hessian.diagonal())
        if self.model.head is not None:
            moments["head.weight"] = head
        else:
            moments["embed.weight"] = self._of_tied_table(moments["embed.weight"], head)
        return moments

    def _of_table(self, table, tokens):
        """The gain of a row is how often it is looked up. Half a lookup more keeps rows that this
        text lacks.
        """
        lookups = table.gain
        return Moments(table.hessian / lookups.sum().clamp_min(1e-30), lookups + 0.5 / tokens)

    def _of_tied_table(self, table, head):
        """A tied table is looked up and multiplied with. It gets one Hessian for both uses, their
        mean by weight; the gain of a row is that of both.
        """
        uses = table, head
        gains = [use.gain * use.hessian.trace() for use in uses]
        total = sum(gains)
        weights = [gain.sum() / total.sum() for gain in gains]
        shares = [w * use.hessian / use.hessian.trace() for w, use in zip(weights, uses)]
        hessian = sum(shares)
        return Moments(hessian, total, head.hessian.trace().item(), head.inputs)


def generate(model, rows, length, temperature, seed, world=1, rank=0):
    """Text (rows / world, length + 1) that the model writes: BOS, then tokens drawn at a
    temperature. The random numbers are drawn for the rows of all ranks together, so the text of a
    row does not depend on the number of ranks.
    """
    device = model.embed.weight.device
    rows = -(-rows // world)  # of this rank
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(rows * world, length, generator=generator)
    chances = chances[rank * rows : (rank + 1) * rows].to(device)
    ids = torch.full((rows, length + 1), BOS, device=device)
    state = Cache(model, rows, length)
    with torch.no_grad():
        for t in range(length):
            logits = model.logits(state.advance(ids[:, t : t + 1])[:, -1])
            cumulative = (logits / temperature).softmax(-1).cumsum(-1)
            chance = chances[:, t : t + 1] * cumulative[:, -1:]
            drawn = torch.searchsorted(cumulative, chance, right=True).squeeze(1)
            ids[:, t + 1] = drawn.clamp_max(logits.size(-1) - 1)
    return ids


# ---- how each parameter is stored ----------------------------------------------------------------


class Store(NamedTuple):
    """How a parameter is stored.

    "float16"; "int": integers times a step size per row; "mixed": the same, with finer steps in
    the columns that AWQ-lite chooses; "grid": integers times a step size per row and column, which
    FIT=allocate chooses.
    """

    codec: Literal["float16", "int", "mixed", "grid"]
    bits: int = 16
    method: str = ""
    sigmas: float = 0.0  # clip of a row, in standard deviations of it; 0: `method` chooses
    floor: float = 0.0  # least clip of a row

    @property
    def top(self):
        """Largest code."""
        if self.codec == "grid":
            return WIDEST
        if self.method == "ternary":
            return 1
        return largest_code(self.bits)


def largest_code(bits):
    return 2 ** (bits - 1) - 1


def storage(model, s):
    """{parameter: Store}, by role and, for matrices, by layer and kind."""
    stores = {}
    for name, role in roles(model).items():
        store = Store("float16")
        if role == "matrix":
            bits, sigmas = matrix_precision(name, s)
            store = integer_store(bits, s.matrix_quant, sigmas, s)
        elif role in ("embed", "head"):
            store = integer_store(s.embed_bits, s.embed_quant, s.embed_clip_sigmas, s)
        elif role == "gate" and s.gate_bits < 16:
            store = Store("int", s.gate_bits, "rtn")
        stores[name] = store
    return stores


def matrix_precision(name, s):
    """(bits, clip in standard deviations) of a matrix: LAYER_BITS before ATTN_BITS or MLP_BITS
    before MATRIX_BITS.
    """
    words = name.split(".")
    if words[0] != "blocks":
        return s.proj_bits or s.matrix_bits, s.matrix_clip_sigmas
    _, layer, kind, *_ = words  # blocks.LAYER.attn.q.weight
    kinds = {"attn": (s.attn_bits, s.attn_clip_sigmas), "mlp": (s.mlp_bits, s.mlp_clip_sigmas)}
    bits, sigmas = kinds[kind]
    bits = dict(s.layer_bits).get(int(layer), bits or s.matrix_bits)
    return bits, sigmas or s.matrix_clip_sigmas


def integer_store(bits, method, sigmas, s):
    """Store of a matrix or a table of tokens."""
    if s.fit == "allocate":
        return Store("grid", 8, method)
    if method == "ternary":
        bits = 2
    if bits == 16:
        return Store("float16")
    return Store("int", bits, method, sigmas, s.clip_floor)


# ---- rounding to a step size per row -------------------------------------------------------------

# The smallest float16: keeps an all-zero row decodable without ever clipping a real one.
SCALE_FLOOR = 2.0**-24
SMALLEST_NORMAL = 2.0**-14  # of float16; below it numbers are multiples of SCALE_FLOOR
CLIP_PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def round_to_grid(weight, step, top):
    """Integers from -top to top nearest to weight / step."""
    return (weight / step).round().clamp(-top, top)


def row_scales(rows, bits, method, sigmas=0.0, floor=0.0):
    """float16 step size of each row of (N, M). Integers reach from -top to top, so a step size
    clips at top times it.

    "ternary": the mean magnitude of the row (arXiv 2402.17764). Else, if `sigmas` is given, the
    clip is that multiple of the row's standard deviation (SDClip, #1394). Else "rtn" clips at the
    largest magnitude; "gptq_lite" (#414) and "gptq" at the percentile of least squared error, for
    every row by itself. No row but a ternary one is clipped below `floor`.
    """
    top = largest_code(bits)
    if method == "ternary":
        return half_steps(rows.abs().mean(1), SCALE_FLOOR)
    least = max(SCALE_FLOOR, floor / top)
    if sigmas:
        deviation = rows.std(1, correction=min(rows.size(1) - 1, 1))
        return half_steps(sigmas * deviation / top, least)
    if method == "rtn":
        return half_steps(rows.abs().amax(1) / top, least)
    return best_percentile_scales(rows, top, least)


def half_steps(steps, least):
    """Step sizes in float16, none below `least`. Where float16 is coarse they are rounded up, so
    that nothing is clipped.
    """
    steps = steps.clamp_min(least)
    rounded_up = (steps / SCALE_FLOOR).ceil() * SCALE_FLOOR
    return torch.where(steps < SMALLEST_NORMAL, rounded_up, steps).half()


def best_percentile_scales(rows, top, least):
    """Step size of each row whose clip, one of CLIP_PERCENTILES of its magnitudes, has the least
    squared error (#414).
    """
    ordered = rows.abs().sort(dim=1).values
    best = None
    for percentile in CLIP_PERCENTILES:
        place = percentile * (rows.size(1) - 1)  # interpolated linearly, as in quantile()
        low = ordered[:, math.floor(place)]
        high = ordered[:, math.ceil(place)]
        clip = low + (high - low) * (place - math.floor(place))
        scale = half_steps(clip / top, least)
        step = scale.float()[:, None]
        error = (rows - round_to_grid(rows, step, top) * step).square().sum(1)
        if best is None:
            best_error, best = error, scale
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


# ---- GPTQ, AWQ-lite, LQER ------------------------------------------------------------------------


def factor_hessian(moments, damp, act_order):
    """(order (C,), U (C, C) float32) for gptq(): the columns in the order of rounding, and the
    upper triangular U whose U^T U is the inverse of the damped Hessian in that order. With
    act_order, columns of large diagonal come first.

    U comes from one Cholesky factor of the reversed Hessian and its inverse.
    """
    hessian = moments.hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal <= 0] = 1.0  # an input that is always zero: its weight does not matter
    diagonal += damp * diagonal.mean()
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    else:
        order = torch.arange(len(diagonal), device=diagonal.device)
    lower, failed = torch.linalg.cholesky_ex(hessian[order][:, order].flip(0, 1))
    if failed or not lower.isfinite().all():
        raise Stopped("a Hessian is not positive definite; raise GPTQ_DAMP, or "
                      "GPTQ_CALIBRATION_TOKENS", 4)
    identity = torch.eye(len(order), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return order, inverse.flip(0, 1).float()


@torch.no_grad()
def gptq(weights, steps, top, orders, factors, block):
    """Codes int16 (N, R, C) of weights (N, R, C) by GPTQ (arXiv 2210.17323): columns are rounded
    one after the other, and those that are left make up for the error of each as well as they can.

    steps (N, R, C or 1); no code is beyond `top`, a number or (N, 1, C). orders (N, C) and factors
    (N, C, C) are of factor_hessian(). Errors reach the columns of later blocks once a block.
    """
    def columns(values):  # (N, C, R) in the order of rounding: a column is contiguous
        return values.mT.gather(1, orders[:, :, None].expand(-1, -1, values.size(1)))

    w = columns(weights)
    step_per_column = steps.size(2) > 1
    steps = columns(steps) if step_per_column else steps.mT
    tops = columns(top) if isinstance(top, Tensor) else None
    codes = torch.empty_like(w, dtype=torch.int16)
    for begin in range(0, w.size(1), block):
        end = min(begin + block, w.size(1))
        block_w = w[:, begin:end]
        errors = torch.empty_like(block_w)
        for j in range(end - begin):
            column = begin + j
            step = steps[:, column if step_per_column else 0]
            code = round_to_grid(block_w[:, j], step, top if tops is None else tops[:, column])
            codes[:, column] = code
            pivot = factors[:, column, column, None]
            torch.div(block_w[:, j] - code * step, pivot, out=errors[:, j])
            later = factors[:, column, column + 1 : end, None]
            block_w[:, j + 1 :].addcmul_(later, errors[:, j : j + 1], value=-1)
        w[:, end:] -= factors[:, begin:end, end:].mT @ errors
    in_place = torch.empty_like(codes).scatter_(1, orders[:, :, None].expand_as(codes), codes)
    return in_place.mT.contiguous()


def awq_lite_groups(weights, inputs, size, count):
    """{name: first columns} of the `count` groups of `size` columns with the largest saliency
    (AWQ-lite, #1908).

    The saliency of a column is its root mean square input times its mean magnitude, that of a
    group the sum over its columns. weights {name: (R, C)}, inputs {name: (C,) mean squares}.
    """
    groups = []
    for name, weight in weights.items():
        saliency = inputs[name].double().sqrt() * weight.double().abs().mean(0)
        whole_groups = saliency[: len(saliency) // size * size].view(-1, size)
        for i, value in enumerate(whole_groups.sum(1).tolist()):
            groups.append((value, name, i * size))
    groups.sort(key=itemgetter(0), reverse=True)
    chosen = {}
    for _, name, start in groups[:count]:
        chosen.setdefault(name, []).append(start)
    return chosen


LQER_GAIN_FLOOR = 1e-6  # of the mean gain: rows are divided by its root
LQER_DAMP = 1e-3  # of the mean diagonal of the Hessian, for its Cholesky factor
LQER_RIDGE = 1e-9  # of the trace, for the normal equations of B


def lqer(error, hessian, gain, rank, group):
    """Parts of a correction A B of error (R, C): LQER (arXiv 2402.02446) with the step sizes of
    #1797.

    A (R, rank): the largest singular vectors of the error, weighted by the loss's sensitivity; 2
    bits (-2..1), one step size. B (rank, C): the best one for that A as it is stored; 4 bits
    (-8..7), a step size for `group` weights.
    """
    row_weight = gain.double().clamp_min(LQER_GAIN_FLOOR * gain.mean().item()).sqrt()[:, None]
    damped = hessian.double().clone()
    damped.diagonal().add_(LQER_DAMP * damped.diagonal().mean() + 1e-30)
    weighted = row_weight * error.double()

    u, sizes, _ = torch.linalg.svd(weighted @ torch.linalg.cholesky(damped), full_matrices=False)
    a = u[:, :rank] / row_weight * sizes[:rank]
    a_step = (a.abs().amax() / 1.5).clamp_min(SCALE_FLOOR).reshape(1).half()
    a_codes = (a / a_step.double()).round().clamp(-2, 1)

    stored = row_weight * a_codes * a_step.double()
    normal = stored.mT @ stored
    normal.diagonal().add_(LQER_RIDGE * normal.trace() + 1e-30)
    b = torch.linalg.solve(normal, stored.mT @ weighted).flatten()
    padded = F.pad(b, (0, -len(b) % group)).view(-1, group)
    b_steps = (padded.abs().amax(1) / 7.5).clamp_min(SCALE_FLOOR).half()
    b_codes = (padded / b_steps.double()[:, None]).round().clamp(-8, 7).flatten()[: len(b)]
    return {"a": a_codes.to(torch.int8), "a_step": a_step,
            "b": b_codes.to(torch.int8).view(rank, -1), "b_step": b_steps}


# ---- codecs --------------------------------------------------------------------------------------

BYTE = 127  # largest code of one byte; -128 is none
# Largest code of a grid: q + 127 over, a byte each. Few weights need `over`, so it costs little.
WIDEST = BYTE + BYTE * BYTE
# Rounded once: float32 powers differ between machines.
QUARTERS = (2.0 ** (np.arange(4) / 4)).astype(np.float32)


def quarter_octaves(exponents):
    """2^(e/4) of int8 exponents, float32, to the bit the same on every machine."""
    e = exponents.numpy().astype(np.int32)
    return torch.from_numpy(np.ldexp(QUARTERS[e & 3], e >> 2))


def decode_int(parts, shape):
    step = parts["scale"].float()[:, None]
    return (parts["q"].float() * step).view(shape)


def decode_mixed(parts, shape):
    fine = parts["fine"].float()[:, None]
    coarse = parts["scale"].float()[:, None]
    step = torch.where(parts["salient"] != 0, fine, coarse)
    return (parts["q"].float() * step).view(shape)


def decode_grid(parts, shape):
    codes = parts["q"].float()
    if "over" in parts:
        codes = codes + BYTE * parts["over"].float()
    row = parts["unit"] * quarter_octaves(parts["row"])
    column = quarter_octaves(parts["col"])
    return (codes * row[:, None] * column).view(shape)


def decode_float16(parts, shape):
    return parts["half"].float().view(shape)


def per_tensor(shape):
    return 1


def per_row(shape):
    return shape[0]


def per_column(shape):
    return math.prod(shape[1:])


def per_weight(shape):
    return math.prod(shape)


class CodecPart(NamedTuple):
    """One array of an encoded parameter."""

    dtype: type
    count: Callable  # its numbers, for the shape of the parameter


class Codec(NamedTuple):
    """A way to store a parameter: how its parts become weights, and what they are."""

    decode: Callable  # (parts, shape) -> float32 weights
    parts: dict[str, CodecPart]


INT = {"q": CodecPart(np.int8, per_weight), "scale": CodecPart(np.float16, per_row)}
MIXED = INT | {"fine": CodecPart(np.float16, per_row), "salient": CodecPart(np.int8, per_column)}
GRID = {"q": CodecPart(np.int8, per_weight), "row": CodecPart(np.int8, per_row),
        "col": CodecPart(np.int8, per_column), "unit": CodecPart(np.float32, per_tensor)}
WIDE = GRID | {"over": CodecPart(np.int8, per_weight)}
CODECS = {
    "int": Codec(decode_int, INT),
    "mixed": Codec(decode_mixed, MIXED),
    "grid": Codec(decode_grid, GRID),
    "wide": Codec(decode_grid, WIDE),
    "float16": Codec(decode_float16, {"half": CodecPart(np.float16, per_weight)}),
}
# Parts of a low-rank correction (lqer), beside those of any codec; their counts are for (shape,
# rank, group).
CORRECTION = {
    "a": CodecPart(np.int8, lambda shape, rank, group: rank * per_row(shape)),
    "a_step": CodecPart(np.float16, lambda shape, rank, group: 1),
    "b": CodecPart(np.int8, lambda shape, rank, group: rank * per_column(shape)),
    "b_step": CodecPart(np.float16,
                        lambda shape, rank, group: -(-rank * per_column(shape) // group)),
}


class Encoded(NamedTuple):
    """A parameter as the artifact holds it."""

    codec: str
    bits: int
    rank: int  # of its correction, or 0
    group: int  # weights of B that share a step size
    parts: dict[str, Tensor]

    def decode(self, shape):
        """float32 weights of a shape."""
        weight = CODECS[self.codec].decode(self.parts, shape)
        if not self.rank:
            return weight
        a = self.parts["a"].float().view(shape[0], self.rank) * self.parts["a_step"].float()
        b_codes = self.parts["b"].float().flatten()
        b_steps = self.parts["b_step"].float().repeat_interleave(self.group)[: len(b_codes)]
        b = (b_codes * b_steps).view(self.rank, -1)
        for k in range(self.rank):  # summed in one order everywhere
            weight = weight + a[:, k, None] * b[k]
        return weight


def _to_cpu(parts):
    return {name: part.cpu() for name, part in parts.items()}


# ---- allocation: FIT=allocate --------------------------------------------------------------------

# How many bits does each weight deserve? Rounding at a step size d makes an error of variance
# d^2 / 12, so a weight of sensitivity h costs the loss h d^2 / 24 nats a token. Half the step size
# is one bit more and a quarter of that cost. If two weights cost differently, a bit moved from the
# cheaper to the dearer one lowers the sum, at equal bytes. So in the best allocation every weight
# costs the same: d = spacing / sqrt(h), a cost of spacing^2 / 24 each. Rate-distortion theory calls
# this reverse water-filling; fixed bits, with clips by the spread of a row, miss it. Large weights
# then get large codes, and the entropy coder makes few bits of the many small ones. One number is
# left to choose, the spacing:
#     allocation_grid   the step sizes of a matrix at a spacing, stored in a byte a row and column
#     Quantiser.rate    the bytes to expect of a spacing; spacing_for() is its inverse
#     allocate          tries artifacts until one fills the size limit

LOGIT_NOISE = 0.1  # most variance of a logit that rounding may make; 0.03 and 0.3 were worse
# Of the mean: what calibration never saw gets at most 1,000 times the usual step size.
SENSITIVITY_FLOOR = 1e-6
# Bounds of the exponents, in quarter octaves, which keep them in a byte. By the floor they are 40
# at most, and of n rows or columns none is below -2 log2(n); only rows of absurdly large weights
# come near their bound.
LARGEST_COLUMN = 60
LARGEST_ROW = 120


def step_exponents(sensitivity):
    """Step sizes proportional to 1 / sqrt(sensitivity), as quarter octaves: 0 for the mean."""
    relative = sensitivity / sensitivity.mean().clamp_min(1e-30)
    return (-2 * relative.clamp_min(SENSITIVITY_FLOOR).log2()).round()


def allocation_grid(weight, moments, pivots, spacing):
    """Parts of a grid for weight (R, C): step[r, c] = spacing / sqrt(gain[r] pivot[c]), to the
    nearest quarter octave.

    The pivots (C,) are what an error in a column costs once later columns make up for it
    (Quantiser.pivots). The rows of a head are finer where rounding would move a logit by more than
    LOGIT_NOISE: a token that is never likely has next to no gain, but it would become likely.
    Without this, the token table cost three times the loss. A row whose codes would be beyond
    WIDEST gets larger step sizes.
    """
    gain = moments.gain.float()
    pivots = pivots.float()
    # A row's error has variance spacing^2 / (12 gain pivot[c]) in column c. Over all columns that
    # makes a variance of the logit of logits * C * spacing^2 / (12 gain).
    gain = gain.clamp_min(moments.logits * len(pivots) * spacing**2 / (12 * LOGIT_NOISE))
    unit = spacing / (gain.mean() * pivots.mean()).sqrt().clamp_min(1e-30)
    row = step_exponents(gain)
    column = step_exponents(pivots).clamp(-LARGEST_COLUMN, LARGEST_COLUMN)
    largest = (weight.abs() / 2 ** (column / 4)).amax(1) / unit  # code of each row at exponent 0
    least_row = (4 * (largest / WIDEST).clamp_min(1e-30).log2()).ceil()
    row = torch.maximum(row, least_row).clamp(-LARGEST_ROW, LARGEST_ROW)
    return {"row": row.to(torch.int8), "col": column.to(torch.int8), "unit": unit.reshape(1)}


RATE_STEP = 1 / 16
RATE_OCTAVES = np.arange(-24, 40, RATE_STEP)  # log2 of a spread in units of the step size


@cache
def gaussian_entropy():
    """(log2 of the spread, bits): the entropy of a Gaussian rounded to whole numbers."""
    octaves = np.arange(-4, 7, RATE_STEP)
    edges = np.arange(-1023.5, 1024)
    root = math.sqrt(2)
    bits = []
    for octave in octaves:
        spread = 2**octave
        near = [edge for edge in edges if abs(edge) < 10 * spread + 1]
        p = np.diff([0.5 * (1 + math.erf(edge / spread / root)) for edge in near])
        p = p[p > 0]
        bits.append(float(-(p * np.log2(p)).sum()))
    return np.array([-40, *octaves]), np.array([0, *bits])


def allocate(quantiser, packed_of, room, log):
    """The artifact (Packed) at the spacing that fills `room` bytes to within 5,000, or at the
    finest that means anything. Bytes follow Quantiser.rate() up to a factor, which each try
    corrects.
    """
    finest = math.sqrt(24e-5 / max(quantiser.quantised, 1))  # all rounding costs 1e-5 nats a token
    too_fine, fits = finest, math.inf  # spacings that made too many bytes, and few enough
    factor, best = 1.0, None
    for attempt in range(1, 11):
        spacing = quantiser.spacing_for(room - 2500, factor, too_fine, fits)
        packed = packed_of(quantiser.encode(spacing))
        log("allocate", attempt=attempt, spacing=spacing,
            expected_loss=quantiser.quantised * spacing**2 / 24,
            bytes=packed.size, room_bytes=room)
        if packed.size <= room:
            best, fits = packed, spacing
            if packed.size >= room - 5000 or spacing <= 1.001 * finest:
                break
        else:
            too_fine = spacing
            if best is None:
                best = packed
        factor = packed.size / quantiser.rate(spacing)
    return best


# ---- the quantiser: from weights to codes --------------------------------------------------------


class Grids(NamedTuple):
    """The quantisation grids of N parameters of one shape."""

    parts: list[dict[str, Tensor]]  # for each, what the artifact stores of its grid
    steps: Tensor  # (N, R, C or 1): the step sizes that this means


class Quantiser:
    """The parameters of a model as its settings store them. `moments` are of calibrate(); settings
    that need none do without.

        quantiser = Quantiser(model, s, moments)
        encoded = quantiser.encode(spacing)    # {parameter: Encoded}; spacing: for FIT=allocate
        steps = quantiser.steps(spacing)       # {parameter: step sizes}, for late QAT

    Parameters of one shape and Store are rounded together. What does not depend on the spacing is
    done once.
    """

    def __init__(self, model, s, moments=None):
        self.s = s
        self.moments = moments
        self.stores = storage(model, s)
        self.weights = {name: param.detach().float() for name, param in model.named_parameters()}
        self.factors = {}  # {identity of a Hessian: factor_hessian() of it}
        self._spread = None
        self._check_moments()
        self.salient = self._salient_columns() if s.awq_lite_group_top_k and moments else {}
        for name in self.salient:
            self.stores[name] = self.stores[name]._replace(codec="mixed")
        self._check_weights()
        self.groups = {}  # {(shape, Store): parameters}
        self.quantised = 0  # weights that are not float16
        for name, store in self.stores.items():
            if store.codec == "float16":
                continue
            weight = self._pruned(self.weights[name])
            self.weights[name] = weight
            self.groups.setdefault((weight.shape, store), []).append(name)
            self.quantised += weight.numel()

    def _check_weights(self):
        for name in self.stores:
            if not self.weights[name].isfinite().all():
                raise Stopped(f"{name} is not finite; no artifact was written", 4)

    def _check_moments(self):
        """Moments that are nan or infinite would make an artifact of nan, or an error with a
        misleading cause.
        """
        for name, moments in (self.moments or {}).items():
            finite = moments.hessian.isfinite().all() and moments.gain.isfinite().all()
            if finite and math.isfinite(moments.logits):
                continue
            weight = self.weights[name]
            if not weight.isfinite().all():
                why = "it is not finite itself"
            elif not weight.any():
                why = "it is all zero, so nothing that it does is felt"
            else:
                why = "an activation or a gradient overflowed, or all are zero"
            raise Stopped(f"calibration moments of {name} are nan or infinite: {why}; no artifact "
                          "was made", 4)

    def _pruned(self, weight):
        """The weight with the PRUNE_PCT of smallest magnitude set to zero."""
        count = int(self.s.prune_pct * weight.numel())
        if not count:
            return weight
        threshold = weight.abs().flatten().kthvalue(count).values
        return weight.where(weight.abs() > threshold, 0.0)

    # What the moments say.

    def _salient_columns(self):
        """{parameter: (C,) which of its columns AWQ-lite stores in AWQ_LITE_BITS}."""
        s = self.s
        weights, inputs = {}, {}
        for name, store in self.stores.items():
            moments = self.moments.get(name)
            scaled = store.codec == "int" and store.method != "ternary"
            gains_bits = scaled and store.bits < s.awq_lite_bits
            if gains_bits and moments and moments.inputs is not None:
                weights[name] = self.weights[name]
                inputs[name] = moments.inputs
        groups = awq_lite_groups(weights, inputs, s.awq_lite_group_size, s.awq_lite_group_top_k)
        columns = {}
        for name, starts in groups.items():
            weight = weights[name]
            columns[name] = torch.zeros(weight.size(1), dtype=torch.bool, device=weight.device)
            for start in starts:
                columns[name][start : start + s.awq_lite_group_size] = True
        return columns

    def factor(self, name):
        """factor_hessian() of a parameter's Hessian, once for q, k and v, which share theirs."""
        if self.moments is None:
            raise ValueError(f"{name} is to be stored by its Hessian, but there are no moments")
        moments = self.moments[name]
        key = id(moments.hessian)
        if key not in self.factors:
            try:
                self.factors[key] = factor_hessian(moments, self.s.gptq_damp, self.s.gptq_act_order)
            except Stopped as error:
                raise Stopped(f"{name}: {error}", error.code) from None
        return self.factors[key]

    def pivots(self, name):
        """(C,) what an error in each column costs. With GPTQ, after later columns have made up for
        it as they can: then it is the conditional variance of the column's input, the square of a
        pivot of the Cholesky factor.
        """
        if self.stores[name].method == "rtn":
            return self.moments[name].hessian.diagonal().clamp_min(1e-30)
        order, factor = self.factor(name)
        pivots = factor.diagonal().square().reciprocal()
        return torch.empty_like(pivots).scatter_(0, order, pivots)

    # FIT=allocate: bytes at a spacing, and back.

    def rate(self, spacing):
        """Bytes of the codes at a spacing, were each weight Gaussian with the spread of its row
        and column.
        """
        if self._spread is None:
            self._spread = np.zeros(len(RATE_OCTAVES))
            for (_, store), names in self.groups.items():
                if store.codec == "grid":
                    for name in names:
                        self._spread += self._spread_of(name)
        bits = np.interp(RATE_OCTAVES - math.log2(spacing), *gaussian_entropy())
        return float(self._spread @ bits) / 8

    def _spread_of(self, name):
        """Numbers of weights by log2 of their spread in units of the step size at a spacing of 1:
        RATE_OCTAVES.
        """
        square = self.weights[name].double().square()
        local = square.mean(1, keepdim=True) * square.mean(0) / square.mean().clamp_min(1e-60)
        relative = local * self.moments[name].gain.double()[:, None] * self.pivots(name).double()
        bins = (relative.clamp_min(1e-60).log2() / 2 - RATE_OCTAVES[0]) / RATE_STEP
        bins = bins.round().clamp(0, len(RATE_OCTAVES) - 1).int().flatten().cpu().numpy()
        return np.bincount(bins, minlength=len(RATE_OCTAVES))

    def spacing_for(self, size, factor=1.0, finest=0.0, coarsest=math.inf):
        """The spacing at which factor * rate() is `size` bytes, by bisection between bounds."""
        low = math.log(min(max(finest, 1e-12), 1e6))
        high = math.log(min(max(coarsest, 1e-12), 1e6))
        for _ in range(40):
            middle = (low + high) / 2
            if factor * self.rate(math.exp(middle)) > size:
                low = middle
            else:
                high = middle
        return math.exp(high)

    # Grids: the step size of each weight.

    def _grids(self, names, store, spacing):
        """Grids of parameters of one shape and Store."""
        weights = torch.stack([self.weights[name] for name in names])
        if store.codec == "int":
            return self._row_grids(weights, store)
        if store.codec == "mixed":
            return self._mixed_grids(names, weights, store)
        return self._allocated_grids(names, weights, spacing)

    def _row_scales(self, weights, bits, store):
        """(N, R): row_scales() of weights (N, R, C)."""
        rows = weights.flatten(0, 1)
        scales = row_scales(rows, bits, store.method, store.sigmas, store.floor)
        return scales.view(len(weights), -1)

    def _row_grids(self, weights, store):
        scales = self._row_scales(weights, store.bits, store)
        return Grids([{"scale": scale} for scale in scales], scales.float()[:, :, None])

    def _mixed_grids(self, names, weights, store):
        scales = self._row_scales(weights, store.bits, store)
        fine_scales = self._row_scales(weights, self.s.awq_lite_bits, store)
        salient = self._salient(names)
        parts = []
        for scale, fine, columns in zip(scales, fine_scales, salient[:, 0]):
            parts.append({"scale": scale, "fine": fine, "salient": columns.to(torch.int8)})
        steps = torch.where(salient, fine_scales.float()[:, :, None], scales.float()[:, :, None])
        return Grids(parts, steps)

    def _salient(self, names):
        """(N, 1, C): which columns AWQ-lite stores in more bits."""
        return torch.stack([self.salient[name] for name in names])[:, None]

    def _allocated_grids(self, names, weights, spacing):
        ones = torch.ones(weights.shape[1:], dtype=torch.int8)
        parts, steps = [], []
        for name in names:
            weight, moments = self.weights[name], self.moments[name]
            grid = allocation_grid(weight, moments, self.pivots(name), spacing)
            parts.append(_to_cpu(grid))
            steps.append(decode_grid({**parts[-1], "q": ones}, ones.shape))
        return Grids(parts, torch.stack(steps).to(weights.device))

    def steps(self, spacing=None):
        """{parameter: its step sizes (R, 1) or (R, C)}: what weights will be rounded to."""
        steps = {}
        for (_, store), names in self.groups.items():
            steps.update(zip(names, self._grids(names, store, spacing).steps))
        return steps

    # Codes.

    def encode(self, spacing=None):
        """{parameter: Encoded}, in the model's order."""
        encoded = {}
        for (_, store), names in self.groups.items():
            grids = self._grids(names, store, spacing)
            codes = self._round(names, store, grids.steps)
            for name, tensor_codes, parts in zip(names, codes, grids.parts):
                encoded[name] = self._encoded(store, parts, tensor_codes)
        if self.s.lqer_rank:
            self._add_lqer(encoded)
        for name, store in self.stores.items():
            if store.codec == "float16":
                half = self.weights[name].half()
                encoded[name] = Encoded("float16", 16, 0, 0, _to_cpu({"half": half}))
        return {name: encoded[name] for name in self.stores}

    def _round(self, names, store, steps):
        """Codes int16 (N, R, C) of parameters at step sizes (N, R, C or 1), by GPTQ or to the
        nearest.
        """
        weights = torch.stack([self.weights[name] for name in names])
        top = store.top
        if store.codec == "mixed":
            top = torch.where(self._salient(names), largest_code(self.s.awq_lite_bits), top)
        if self.s.prune_pct:  # zero whatever GPTQ feeds into them: it would undo the pruning (#967)
            steps = steps.where(weights != 0, 1e30)
        if store.method != "gptq":
            return round_to_grid(weights, steps, top).to(torch.int16)
        orders, factors = (torch.stack(tensors) for tensors in zip(*map(self.factor, names)))
        alive = torch.stack([self.moments[name].hessian.diagonal() > 0 for name in names])[:, None]
        return gptq(weights * alive, steps, top, orders, factors, self.s.gptq_block_size)

    def _encoded(self, store, grid_parts, codes):
        """A parameter with codes int16 (R, C): those beyond a byte are split in q + 127 over."""
        codec = store.codec
        over = codes.sign() * ((codes.abs() - 1).clamp_min(0) // BYTE)
        parts = grid_parts | {"q": (codes - BYTE * over).to(torch.int8)}
        if over.any():
            codec = "wide"
            parts["over"] = over.to(torch.int8)
        return Encoded(codec, store.bits, 0, 0, _to_cpu(parts))

    def _add_lqer(self, encoded):
        """LQER for the LQER_TOP_K parameters whose error costs most, where it lowers that cost. By
        the plain norm of errors it would always be the largest tensors (#1797).
        """
        def error_of(name, candidate):
            weight = self.weights[name]
            return weight - candidate.decode(weight.shape).to(self.moments[name].hessian.device)

        costs = {}
        for name, candidate in encoded.items():
            if name in self.moments:  # a gate has none
                costs[name] = self.moments[name].loss(error_of(name, candidate))
        group = self.s.lqer_asym_group
        for name in sorted(costs, key=costs.get)[-self.s.lqer_top_k :]:
            moments = self.moments[name]
            error = error_of(name, encoded[name])
            rank = min(self.s.lqer_rank, *error.shape)
            correction = _to_cpu(lqer(error, moments.hessian, moments.gain, rank, group))
            parts = encoded[name].parts | correction
            corrected = encoded[name]._replace(rank=rank, group=group, parts=parts)
            if moments.loss(error_of(name, corrected)) < costs[name]:
                encoded[name] = corrected


# ---- pruning: FIT=prune --------------------------------------------------------------------------

PRUNABLE = ("int", "mixed")  # codecs of which codes are dropped


def ones_in(codes):
    """Which codes are 1 or -1."""
    return codes.abs() == 1


def without_cheapest(encoded, count):
    """Encoded tensors with `count` of their codes 1 and -1 set to 0: those of the smallest step
    sizes (#1019, #1539).
    """
    places = {}  # of the ones, in each tensor's flattened codes
    steps = []
    for name, tensor in encoded.items():
        if tensor.codec not in PRUNABLE:
            continue
        codes = tensor.parts["q"]
        places[name] = ones_in(codes).flatten().nonzero().squeeze(1)
        parts = tensor.parts | {"q": torch.ones_like(codes)}
        step = CODECS[tensor.codec].decode(parts, codes.shape)
        steps.append(step.flatten()[places[name]])
    cheap = torch.zeros(sum(map(len, steps)), dtype=torch.bool)
    cheap[torch.cat(steps).argsort(stable=True)[:count]] = True

    pruned = dict(encoded)
    cheap_by_tensor = cheap.split([len(ones) for ones in places.values()])
    for (name, ones), drop in zip(places.items(), cheap_by_tensor):
        parts = encoded[name].parts
        codes = parts["q"].clone()
        codes.view(-1)[ones[drop]] = 0
        pruned[name] = encoded[name]._replace(parts=parts | {"q": codes})
    return pruned


def prune_to_fit(encoded, packed_of, room, log):
    """The artifact (Packed) with few of its cheapest codes dropped (without_cheapest) that fits
    `room` bytes, by regula falsi; with all of them dropped, if even that is too large.
    """
    whole = packed_of(encoded)
    if whole.size <= room:
        log("prune", dropped=0, bytes=whole.size, room_bytes=room)
        return whole
    too_few, too_few_size = 0, whole.size
    codes = [tensor.parts["q"] for tensor in encoded.values() if tensor.codec in PRUNABLE]
    enough = sum(int(ones_in(tensor_codes).sum()) for tensor_codes in codes)
    best = packed_of(without_cheapest(encoded, enough))
    tries = 8 if best.size <= room else 0
    for _ in range(tries):
        if best.size >= room - 2000 or enough - too_few <= 1:
            break
        excess = too_few_size - room + 500
        count = too_few + round((enough - too_few) * excess / (too_few_size - best.size))
        count = min(max(count, too_few + 1), enough - 1)
        packed = packed_of(without_cheapest(encoded, count))
        if packed.size <= room:
            enough, best = count, packed
        else:
            too_few, too_few_size = count, packed.size
    log("prune", dropped=enough, bytes=best.size, room_bytes=room)
    return best


# ---- late QAT ------------------------------------------------------------------------------------

SCALE_REFRESH_STEPS = 10  # optimizer steps after which late QAT's scales follow the weights
SHARPEST = 16  # sharpness of soft rounding at the end of training; it begins at 1


class LateQAT:
    """Late quantisation-aware training: from LATE_QAT_THRESHOLD on, the forward sees weights as
    the artifact will hold them, rounded to the exporter's own grid (FakeQuant). Scales follow the
    weights every 10 optimizer steps; the grid of FIT=allocate is chosen once, after a calibration
    of its own.
    """

    def __init__(self, model, s):
        self.model = model
        self.s = s
        self.begun = None  # optimizer step at which it began
        self.on = False
        self.moments = None  # of FIT=allocate
        stores = storage(model, s)
        self.modules = {}
        self.grids = {}
        for name, module in model.named_modules():
            name = f"{name}.weight"
            if isinstance(module, (Linear, Table)) and stores[name].codec != "float16":
                grid = FakeQuant(module.weight, stores[name].top, s.qat_rounding == "soft")
                if s.fit == "allocate":
                    grid.step = torch.ones_like(module.weight.data)
                self.modules[name] = module
                self.grids[name] = grid.to(module.weight.device)

    def switch(self, on):
        """Round, or do not: two graphs of the same model, both compiled in warm-up."""
        if on != self.on:
            for name, module in self.modules.items():
                module.fake_quant = self.grids[name] if on else None
            self.on = on

    def enter(self, run, training, progress):
        """Called before each optimizer step on rounded weights; progress from 0 to 1 sharpens soft
        rounding.
        """
        allocating = self.s.fit == "allocate"
        if self.begun is None:
            self.begun = training.step
            run.log("late_qat", step=training.step, tensors=len(self.grids),
                    rounding=self.s.qat_rounding)
            if allocating:
                self._allocate(run, training)
        if not allocating and (training.step - self.begun) % SCALE_REFRESH_STEPS == 0:
            self._set(Quantiser(self.model, self.s).steps())
        if self.s.qat_rounding == "soft":
            for grid in self.grids.values():
                grid.sharpness.fill_(1 + (SHARPEST - 1) * progress)
        self.switch(True)

    def _allocate(self, run, training):
        """Choose the grid of FIT=allocate. The export uses the same moments: another grid would
        undo what was learned.
        """
        self.moments = training.calibrate()
        try:
            quantiser = Quantiser(self.model, self.s, self.moments)
            spacing = quantiser.spacing_for(self.s.size_limit - len(run.source))
        except Stopped:
            self.begun = None
            self.moments = None
            training.save()  # the steps so far are worth keeping
            raise
        self._set(quantiser.steps(spacing))

    def _set(self, steps):
        for name, grid in self.grids.items():
            grid.step.copy_(steps[name])

    def state_dict(self):
        moments = self.moments
        if moments:
            moments = {name: tuple(values.to("cpu")) for name, values in moments.items()}
        steps = {name: grid.step.cpu() for name, grid in self.grids.items()}
        return {"begun": self.begun, "steps": steps, "moments": moments}

    def load_state_dict(self, state):
        self.begun = state["begun"]
        self._set(state["steps"])
        if state["moments"]:
            device = self.model.embed.weight.device
            self.moments = {}
            for name, values in state["moments"].items():
                self.moments[name] = Moments(*values).to(device)


# --------------------------------------------------------------------------------------------------
# 8 Entropy coder of integer codes
# Interleaved rANS (Duda 2013, Giesen 2014), one stream over all matrices.
#
# An entropy coder writes what it expects with probability p in log2(1/p) bits. rANS comes within a
# fraction of a percent of that, so all depends on the probabilities. Those of a code are learned
# from the earlier codes of its bucket, and its bucket is the magnitude expected of it
# (code_context): the mean of its column so far, times how much larger than expected its row has
# been so far. Rows that are like the one above, as of tokens never seen, are coded as differences
# from it. Encoder and decoder visit the codes in one order (walk_codes) and learn the same on the
# way: only codes are stored. All that the decoder depends on is integers: a last bit that differs
# between machines would end the stream.
# --------------------------------------------------------------------------------------------------

PRECISION = 13  # frequencies of a bucket sum to 2^PRECISION
# A coder state is never below this between codes; it gives or takes 16 bits at a time.
STATE_LOW = 1 << 16
# -128 as a byte, which is no code: the true one, too rare to have a frequency, is stored as it is.
ESCAPE = 128

BUCKETS = 48  # bucket k expects magnitudes of 2^(k/4 - 5)
# Magnitudes are counted in 1/256 and their logarithms in 1/16 of an octave, so that all are
# integers.
MAGNITUDE_BITS = 8
LOG_OF_1 = 16 * MAGNITUDE_BITS
LOG_OF_BUCKET_0 = LOG_OF_1 - 16 * 5
LOGS_PER_BUCKET = 4

# What is expected at the beginning, which the first codes soon outweigh.
PRIOR_CODES = 64  # a matrix begins as if 64 codes of magnitude 1/2 had come before,
PRIOR_ROWS = 4  # a column as if 4 rows of the matrix's mean,
PRIOR_COLUMNS = 8  # a row as if 8 columns of what is expected
EARLIER_CODES = 128  # the codes of earlier groups are worth 128 codes in each bucket
FIRST_LESSON = 1024  # codes after which frequencies are first learned; later after a quarter more
LEAST_PIECE = 128  # rows of a matrix that are coded one after the other, at least


@cache
def log2_table():
    """floor(16 log2(x + 1)) for x < 2^15."""
    return np.array([((x + 1) ** 16).bit_length() - 1 for x in range(1 << 15)])


def integer_log2(x):
    """16 log2(x + 1) of integers, rounded down; at most that of 2^15 - 1."""
    table = log2_table()
    return table[np.minimum(x, len(table) - 1)]


@cache
def prior_counts():
    """About 20 codes for each bucket to begin with, in 1/4096 (BUCKETS, 256): nearly normal, with
    heavier tails. A code v has (1 + v^2 / (20 m^2 + 2))^-8 at a mean magnitude m = 2^(k/4 - 5).
    """
    rows = []
    for k in range(BUCKETS):
        width = 20 * math.isqrt(1 << k + 2) + 4096  # 20 m^2 + 2, in 1/2048
        bell = [(width << 16) ** 8 // (width + 2048 * v * v) ** 8 for v in range(ESCAPE)]
        total = 2 * sum(bell) - bell[0]
        half = [80_000 * density // total + 1 for density in bell]
        escape = 1600
        rows.append([*half, escape, *half[:0:-1]])
    return np.array(rows)


def code_frequencies(counts):
    """Counts of code bytes (BUCKETS, 256) -> integers that sum to 2^PRECISION in each bucket; 0:
    use ESCAPE.
    """
    weights = counts << 2
    weights[1:] += counts[:-1]  # neighbours learn from each other
    weights[:-1] += counts[1:]
    cumulative = ((weights << 10) + prior_counts()).cumsum(1)  # in 1/4096 of a count
    slots = (1 << PRECISION) - 1  # one is left for ESCAPE
    frequencies = np.diff(cumulative * slots // cumulative[:, -1:], axis=1, prepend=0)
    frequencies[:, ESCAPE] += 1
    return frequencies


class CodeCounts:
    """How often each code came in each bucket. The coder learns its frequencies from that, again
    and again.
    """

    def __init__(self, coder):
        self.coder = coder
        self.counts = np.zeros((BUCKETS, 256), np.int64)
        coder.learn(code_frequencies(self.counts))

    def begin_group(self):
        total = self.counts.sum(1, keepdims=True)
        self.counts = self.counts * EARLIER_CODES // total.clip(EARLIER_CODES)
        self.known = 0  # codes of the group that are counted
        self.pending = []
        self.pending_codes = 0

    def add(self, buckets, differences, last):
        """Codes, as differences from their base; last: the group ends with them."""
        self.pending.append((buckets << 8 | differences.view(np.uint8)).ravel())
        self.pending_codes += differences.size
        if last or self.pending_codes >= max(FIRST_LESSON, self.known // 4):
            seen = np.bincount(np.concatenate(self.pending), minlength=self.counts.size)
            self.counts += seen.reshape(self.counts.shape)
            self.coder.learn(code_frequencies(self.counts))
            self.known += self.pending_codes
            self.pending = []
            self.pending_codes = 0


class RowState:
    """What is known of one row of every piece (N, pieces, C) of a group, as its codes are visited
    from left to right.

    column_sums (N, 1, C): of the magnitudes of the `rows_seen` rows before; above (N, pieces, C):
    codes of the row above.
    """

    def __init__(self, column_sums, rows_seen, above):
        columns = column_sums.shape[2]
        total = column_sums.sum(2, keepdims=True) << MAGNITUDE_BITS
        prior_total = PRIOR_CODES << MAGNITUDE_BITS - 1
        mean = (total + prior_total) // (rows_seen * columns + PRIOR_CODES)
        expected = ((column_sums << MAGNITUDE_BITS) + PRIOR_ROWS * mean) // (rows_seen + PRIOR_ROWS)
        expected_before = expected.cumsum(2) - expected + PRIOR_COLUMNS * mean
        # (N, 1, C): the logarithm of a column's expected magnitude; the sum of those before it
        self.log_expected = log2_table()[expected]
        self.expected_before = np.maximum(expected_before, 1)
        # (N, pieces, 1): sums of |code| and |code - above| so far
        self.magnitude = np.repeat(PRIOR_COLUMNS * mean, above.shape[1], 1)
        self.change = self.magnitude
        self.above = above

    def add(self, codes, start):
        """Codes (N, pieces, width) of the columns from `start` on."""
        above = self.above[:, :, start : start + codes.shape[2]]
        change = np.abs(np.subtract(codes, above, dtype=np.int16)).sum(2, keepdims=True)
        magnitude = np.abs(codes).sum(2, keepdims=True, dtype=np.int64)
        self.change = self.change + (change << MAGNITUDE_BITS)
        self.magnitude = self.magnitude + (magnitude << MAGNITUDE_BITS)


def code_context(row, start, stop):
    """(buckets, base) of the codes in columns start to stop of a RowState: what predicts them.
    They are coded as differences from base, 0 or the row above.
    """
    ratio = (row.magnitude << MAGNITUDE_BITS) // row.expected_before[:, :, start : start + 1]
    log_magnitude = row.log_expected[:, :, start:stop] + (integer_log2(ratio) - LOG_OF_1)
    base = 0
    like_above = 4 * row.change < 3 * row.magnitude
    if like_above.any():
        base = row.above[:, :, start:stop] * like_above
        mean_change = row.change // (start + PRIOR_COLUMNS)
        log_magnitude = np.where(like_above, integer_log2(mean_change), log_magnitude)
    buckets = (log_magnitude - LOG_OF_BUCKET_0) // LOGS_PER_BUCKET
    return np.minimum(np.maximum(buckets, 0), BUCKETS - 1), base


def piece_shape(shape, state_count):
    """(rows of a piece, columns that are coded at once) for N matrices (N, R, C).

    All N matrices are coded side by side, and of each all pieces: a chunk is `width` columns of
    one row of every piece, about one code for each coder state. Pieces and width are in the
    proportion of rows and columns.
    """
    matrices, rows, columns = shape
    codes = max(1, state_count // matrices)  # of a matrix in a chunk
    pieces = min(rows // LEAST_PIECE, math.isqrt(codes * rows // columns))
    height = -(-rows // max(1, pieces))
    pieces = -(-rows // height)
    width = min(columns, max(1, codes // pieces))
    return height, width


def walk_codes(groups, coder):
    """Visit all codes of groups (N, R, C), as both sides do. The coder's code() stores, or fills
    in, codes (N, pieces, width) as differences from base, given their buckets; its learn() takes
    new frequencies.
    """
    counts = CodeCounts(coder)
    for group in groups:
        matrices, rows, columns = group.shape
        height, width = piece_shape(group.shape, coder.state_count)
        counts.begin_group()
        column_sums = np.zeros((matrices, 1, columns), np.int64)
        rows_seen = 0
        above = np.zeros((matrices, -(-rows // height), columns), np.int8)
        for t in range(height):
            codes = group[:, t::height]  # (N, pieces, C): row t of every piece, if it is that long
            row = RowState(column_sums, rows_seen, above[:, : codes.shape[1]])
            for start in range(0, columns, width):
                stop = start + width
                chunk = codes[:, :, start:stop]
                buckets, base = code_context(row, start, stop)
                coder.code(buckets, chunk, base)
                row.add(chunk, start)
                last = t == height - 1 and stop >= columns
                counts.add(buckets, chunk - base, last)
            above = codes
            rows_seen += codes.shape[1]
            column_sums += np.abs(codes).sum(1, keepdims=True, dtype=np.int64)


def _checksum(groups):
    """Of the codes, not of the bytes that hold them: proves that this machine decodes as the other
    one encoded.
    """
    checksum = 0
    for group in groups:
        checksum = zlib.crc32(np.ascontiguousarray(group), checksum)
    return checksum


def _state_count(shapes):
    """Number of interleaved coder states. Each costs 3 bytes and saves time."""
    codes = sum(math.prod(shape) for shape in shapes)
    return 8 + math.isqrt(codes) // 12


class CodeWriter:
    """Notes the codes that walk_codes() visits, and encodes at the end: rANS goes from the last
    code to the first, so that decoding goes forwards.
    """

    def __init__(self, state_count):
        self.state_count = state_count
        # frequency << 16 | first slot of up to state_count codes, which are coded at once
        self.batches = []
        self.escaped = []

    def learn(self, frequencies):
        starts = frequencies.cumsum(1) - frequencies
        self.table = (frequencies << 16 | starts).astype(np.uint32).ravel()

    def code(self, buckets, codes, base):
        rows = buckets.ravel() << 8
        symbols = (codes - base).view(np.uint8).ravel()
        entries = self.table.take(rows | symbols)
        escaped = (entries < 1 << 16) | (symbols == ESCAPE)  # no frequency, or none of a code
        if escaped.any():
            entries[escaped] = self.table[rows[escaped] | ESCAPE]
            self.escaped.append(codes.ravel()[escaped].tobytes())
        for i in range(0, len(entries), self.state_count):
            self.batches.append(entries[i : i + self.state_count])

    def finish(self, checksum):
        states = np.full(self.state_count, STATE_LOW, np.uint32)
        words = []
        for entries in reversed(self.batches):
            x = states[: len(entries)]  # a view: the states change with it
            frequency = entries >> 16
            start = entries & 0xFFFF
            full = np.flatnonzero(x >> 32 - PRECISION >= frequency)
            words.append(x[full].astype("<u2"))
            x[full] >>= 16
            # (x // frequency << PRECISION) + x % frequency + start
            x += x // frequency * ((1 << PRECISION) - frequency) + start
        escaped = b"".join(self.escaped)
        head = struct.pack("<II", checksum, len(escaped))
        return b"".join([head, states.astype("<u4"), escaped, *reversed(words)])


class CodeReader:
    """Fills in the codes that walk_codes() visits, from the bytes of a CodeWriter; refuses what no
    CodeWriter wrote.
    """

    def __init__(self, data, state_count, where):
        self.state_count = state_count
        self.where = where
        head = 8 + 4 * state_count
        self.check(len(data) >= head, "too short")
        self.checksum, escaped_bytes = struct.unpack_from("<II", data)
        end = head + escaped_bytes
        self.check(len(data) >= end and (len(data) - end) % 2 == 0, "too short")
        self.states = np.frombuffer(data, "<u4", state_count, 8).astype(np.uint32)
        self.escaped = np.frombuffer(data[head:end], np.int8)
        self.next_escape = 0
        self.words = np.frombuffer(data[end:], "<u2").astype(np.uint32)
        self.next_word = 0
        self.bytes = np.tile(np.arange(256, dtype=np.uint8), BUCKETS)
        self.slots = np.tile(np.arange(1 << PRECISION, dtype=np.uint32), BUCKETS)

    def check(self, condition, what):
        if not condition:
            raise BadInput(f"{self.where}: coded weights are corrupt ({what})")

    def learn(self, frequencies):
        """Tables over the slots of all buckets: the symbol of each, and frequency << 16 | slot -
        first slot of it.
        """
        widths = frequencies.ravel().astype(np.uint32)
        starts = (frequencies.cumsum(1) - frequencies).ravel().astype(np.uint32)
        self.symbols = np.repeat(self.bytes, widths)
        self.entries = np.repeat((widths << 16) - starts, widths) + self.slots

    def code(self, buckets, codes, base):
        first_slots = buckets.ravel() << PRECISION
        symbols = np.empty(codes.size, np.uint8)
        for i in range(0, codes.size, self.state_count):
            x = self.states[: codes.size - i]  # a view: the states change with it
            slots = (x & (1 << PRECISION) - 1) + first_slots[i : i + self.state_count]
            symbols[i : i + self.state_count] = self.symbols.take(slots)
            entries = self.entries.take(slots)
            x >>= PRECISION
            x *= entries >> 16
            x += entries & 0xFFFF
            low = np.flatnonzero(x < STATE_LOW)
            words = self.words[self.next_word : self.next_word + len(low)]
            self.check(len(words) == len(low), "too short")
            x[low] = x[low] << 16 | words
            self.next_word += len(low)
        codes[...] = symbols.view(np.int8).reshape(codes.shape) + base
        escaped = symbols.reshape(codes.shape) == ESCAPE
        if escaped.any():
            codes[escaped] = self.take_escaped(np.count_nonzero(escaped))
        self.check(codes.min() > -128, "a code of -128")

    def take_escaped(self, count):
        values = self.escaped[self.next_escape : self.next_escape + count]
        self.check(len(values) == count, "too few escapes")
        self.next_escape += count
        return values

    def finish(self, checksum):
        all_read = self.next_word == len(self.words) and self.next_escape == len(self.escaped)
        self.check(all_read, "too long")
        self.check((self.states == STATE_LOW).all() and checksum == self.checksum, "checksum")


def encode_codes(groups):
    """int8 arrays (N, R, C), N matrices of a kind each, of codes -127..127 -> bytes."""
    if any(group.min() == -128 for group in groups):
        raise ValueError("-128 is no code")
    writer = CodeWriter(_state_count([group.shape for group in groups]))
    walk_codes(groups, writer)
    return writer.finish(_checksum(groups))


def decode_codes(data, shapes, where):
    """The arrays (N, R, C) of these shapes that encode_codes() was given; `where` begins the
    message if it fails.
    """
    groups = [np.empty(shape, np.int8) for shape in shapes]
    reader = CodeReader(data, _state_count(shapes), where)
    walk_codes(groups, reader)
    reader.finish(_checksum(groups))
    return groups


# --------------------------------------------------------------------------------------------------
# 9 Artifact
# magic | version, packed and raw header length, header checksum | header (zlib, JSON) | streams.
# No pickle: loading a hostile file can fail, but not execute, nor allocate beyond sizes checked
# against the model.
#
# save_artifact   Quantiser -> Encoded -> pack (a stream for each kind of part) -> write_atomic
# load_artifact   read_artifact (checked alone) -> artifact_settings (checked against the model)
#                 -> parts of each tensor -> weights
# --------------------------------------------------------------------------------------------------

MAGIC = b"PGOLF\r\n\x1a"
ARTIFACT_VERSION = 1
PREFIX = struct.Struct("<8sHIII")  # magic, version, packed and raw header length, header checksum
MAX_HEADER = 1 << 22
MAX_VALUE = 2000  # characters of a setting in the header
# Bytes that loading may need at once: that of about 140 M weights. 16,000,000 bytes are 128 M
# bits.
MAX_LOADED = 1 << 30
MAX_CORRECTION_WORK = 1 << 33  # multiplications of all low-rank corrections, some ten seconds
MAX_RANK = Settings.__dataclass_fields__["lqer_rank"].metadata["hi"]
MAX_GROUP = Settings.__dataclass_fields__["lqer_asym_group"].metadata["hi"]


# ---- files ---------------------------------------------------------------------------------------


def brief(value, most=80):
    """What a file says, for a message: printable, and cut."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def need_number(what, value, kind, least, most):
    """The number, if it is of this type and between these bounds (nan never is); else ValueError.
    """
    if type(value) is not kind or not least <= value <= most:
        raise ValueError(f"{what} is {brief(value, 30)}, not {kind.__name__} from {least} to {most}")
    return value


def need_reasons(reasons):
    """ValueError unless these are reasons why a score is not valid, as brief() leaves them."""
    def is_text(reason):
        return type(reason) is str and reason == brief(reason, MAX_VALUE)

    if type(reasons) is not list or not all(map(is_text, reasons)):
        raise ValueError(f"reasons is {brief(reasons, 30)}, not a list of texts")


def read_file(path):
    """Bytes of a regular file: a device or a pipe may never end."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise BadInput(f"{path}: cannot be read (it is not a regular file)")
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def write_atomic(path, chunks):
    """Complete under its name, or not there at all: temporary name, fsync, rename. Returns the
    SHA-256 of the bytes.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise BadInput(f"{path} cannot be written ({error.strerror}); nothing under that name was "
                       "changed") from None
    return digest.hexdigest()


# ---- compressors ---------------------------------------------------------------------------------


class Compressor(NamedTuple):
    """A general compressor of bytes. A missing package is an error that names it, never another
    choice.
    """

    compress: Callable  # (bytes) -> bytes
    decompress: Callable  # (bytes, most) -> bytes, `most` of them at most


def _zstd(data):
    import zstandard
    return zstandard.ZstdCompressor(level=22).compress(data)


def _unzstd(data, most):
    import zstandard
    try:
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data).read(most)
    except zstandard.ZstdError as error:
        raise ValueError(error) from None


def _lzma(data):
    return lzma.compress(data, check=lzma.CHECK_NONE, preset=9 | lzma.PRESET_EXTREME)


def _unlzma(data, most):
    return lzma.LZMADecompressor(memlimit=1 << 28).decompress(data, max_length=most)


def _brotli(data):
    import brotli
    return brotli.compress(data, quality=11, lgwin=24)


def _unbrotli(data, most):
    import brotli
    try:
        return brotli.Decompressor().process(data, output_buffer_limit=most)
    except brotli.error as error:
        raise ValueError(error) from None


def _zlib(data):
    return zlib.compress(data, 9)


def _unzlib(data, most):
    return zlib.decompressobj().decompress(data, most)


COMPRESSORS = {
    "zstd": Compressor(_zstd, _unzstd),
    "lzma": Compressor(_lzma, _unlzma),
    "brotli": Compressor(_brotli, _unbrotli),
    "zlib": Compressor(_zlib, _unzlib),
}


def decompress(name, data, size, where):
    """Exactly `size` bytes; never produces much more."""
    try:
        out = COMPRESSORS[name].decompress(data, size + 1)
    except ImportError as error:
        raise BadInput(f"{where}: packed with {name}, which needs {error.name}: "
                       f"pip install {error.name}") from None
    except (ValueError, EOFError, MemoryError, zlib.error, lzma.LZMAError) as error:
        raise BadInput(f"{where}: {name} data is corrupt ({str(error)[:80]})") from None
    if len(out) != size:
        amount = "more" if len(out) > size else "fewer"
        raise BadInput(f"{where}: unpacks to {amount} than the expected {size} bytes")
    return out


def _planes(array):
    """float16 as all low bytes, then all high bytes: exponents compress, mantissas do not."""
    return np.ascontiguousarray(array.view(np.uint8).reshape(-1, array.itemsize).T).tobytes()


def _unplanes(data, dtype):
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).ravel()


# ---- tables of the header ------------------------------------------------------------------------

CODED = ("q", "over")  # streams of integer matrices, which COMPRESSOR=rans codes


class TensorEntry(NamedTuple):
    """A line of the header's table of tensors: how a parameter is stored (Encoded)."""

    name: str
    shape: tuple[int, ...]
    codec: str
    bits: int
    rank: int
    group: int

    @property
    def matrix(self):
        """(rows, columns), the axes after the first taken as one."""
        return self.shape[0], math.prod(self.shape[1:])


class StreamEntry(NamedTuple):
    """A line of the header's table of streams."""

    stream: str
    compressor: str
    size: int  # unpacked
    length: int  # in the file
    checksum: int  # CRC-32 of those bytes


class StreamPart(NamedTuple):
    """The place of one part of one tensor in a stream; places follow each other."""

    tensor: str
    part: str
    dtype: type
    shape: tuple[int, ...]

    @property
    def count(self):
        return math.prod(self.shape)

    @property
    def bytes(self):
        return np.dtype(self.dtype).itemsize * self.count


def tensor_entries(encoded, shapes):
    """The table of tensors of {parameter: Encoded} with their shapes."""
    return [TensorEntry(name, shapes[name], tensor.codec, tensor.bits, tensor.rank, tensor.group)
            for name, tensor in encoded.items()]


def stream_layout(tensors):
    """{stream: [StreamPart]} of a table of tensors: a stream for each kind of part. In that of the
    codes equal kinds of matrix (all q, all k, ...) lie together.
    """
    streams = {}
    for entry in tensors:
        for part, (dtype, count) in CODECS[entry.codec].parts.items():
            shape = entry.matrix if part in CODED else (count(entry.shape),)
            streams.setdefault(part, []).append(StreamPart(entry.name, part, dtype, shape))
        if entry.rank:
            for part, (dtype, count) in CORRECTION.items():
                shape = (count(entry.shape, entry.rank, entry.group),)
                streams.setdefault(part, []).append(StreamPart(entry.name, part, dtype, shape))
    for stream in CODED:
        if stream in streams:
            streams[stream] = _kinds_together(streams[stream])
    return streams


def _kinds_together(parts):
    kinds = [_kind(part.tensor) for part in parts]
    return sorted(parts, key=lambda part: kinds.index(_kind(part.tensor)))


def raw_sizes(tensors):
    """{stream: its bytes, unpacked} of a table of tensors."""
    layout = stream_layout(tensors)
    return {stream: sum(part.bytes for part in parts) for stream, parts in layout.items()}


def _kind(name):
    """The name of a tensor without the number of its layer."""
    return ".".join(word for word in name.split(".") if not word.isdigit())


def code_groups(parts):
    """[(number, rows, columns)]: runs of matrices of one kind and shape in a stream of codes."""
    runs = []
    for part in parts:
        key = (_kind(part.tensor), *part.shape)
        if not runs or runs[-1][0] != key:
            runs.append([key, 0])
        runs[-1][1] += 1
    return [(number, rows, columns) for (_, rows, columns), number in runs]


def model_fields():
    """The settings that define the model, stored in the artifact; SEED among them, from which
    adapters start.
    """
    others = ("vocab_size", "seed")
    return [f for f in fields(Settings) if f.metadata["room"] == "Model" or f.name in others]


# ---- save ----------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """An artifact, before it is written."""

    encoded: dict[str, Encoded]
    chunks: list[bytes]
    streams: list[dict]  # what each compressor made of each stream

    @property
    def size(self):
        return sum(map(len, self.chunks))


def save_artifact(path, model, s, tokenizer_sha256="", log=None, moments=None, room=None):
    """Quantise, pack and write the model -> {"bytes", "sha256", "compressor"}. The file is
    complete or absent.

    `moments`: of calibrate(), where the settings need them; `room`: bytes that FIT may fill
    (default: SIZE_LIMIT).
    """
    if log is None:
        log = no_log
    if room is None:
        room = s.size_limit
    header = artifact_header(model, tokenizer_sha256, s)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    quantiser = Quantiser(model, s, moments)
    # Tries need not wait for every compressor.
    s_of_tries = replace(s, compressor="rans") if s.compressor == "auto" else s

    def packed_of(encoded):
        for name, tensor in encoded.items():
            if not all(part.isfinite().all() for part in tensor.parts.values()):
                raise Stopped(f"{name} is too large for float16; no artifact was written", 4)
        return pack(encoded, shapes, s_of_tries, header)

    if s.fit == "allocate":
        packed = allocate(quantiser, packed_of, room, log)
    elif s.fit == "prune":
        packed = prune_to_fit(quantiser.encode(), packed_of, room, log)
    else:
        packed = packed_of(quantiser.encode())
    if s.compressor == "auto":
        packed = pack(packed.encoded, shapes, s, header)
    for row in packed.streams:
        log("pack", **row)
    used = "+".join(sorted({row["chosen"] for row in packed.streams}))
    return {"bytes": packed.size, "sha256": write_atomic(path, packed.chunks), "compressor": used}


def no_log(*_, **__):
    pass


def artifact_header(model, tokenizer_sha256, s):
    """The header of an artifact but for its tables."""
    settings = {f.name.upper(): _show(getattr(s, f.name)) for f in model_fields()}
    header = {
        "settings": settings,
        "looping": model.looping,  # a loop that training never reached stays off
        "tokenizer_sha256": tokenizer_sha256,
    }
    if model.temperature:
        header["temperature"] = model.temperature
    if model.reasons:
        header["reasons"] = model.reasons
    return header


def pack(encoded, shapes, s, header):
    """The artifact of encoded parameters of some shapes -> Packed."""
    tensors = tensor_entries(encoded, shapes)
    streams, payload, report = [], [], []
    for stream, parts in stream_layout(tensors).items():
        candidates = candidate_compressors(stream, s.compressor)
        with ThreadPoolExecutor(len(candidates)) as pool:
            results = pool.map(partial(pack_stream, parts, encoded), candidates)
            packed = dict(zip(candidates, results))
        lengths = {name: len(data) for name, data in packed.items()}
        chosen = min(lengths, key=lengths.get)
        data = packed[chosen]
        raw_bytes = sum(part.bytes for part in parts)
        streams.append(StreamEntry(stream, chosen, raw_bytes, len(data), zlib.crc32(data)))
        payload.append(data)
        by_name = {f"{name}_bytes": length for name, length in lengths.items()}
        report.append({"stream": stream, "raw_bytes": raw_bytes, **by_name, "chosen": chosen})
    tables = {"tensors": tensors, "streams": streams}
    raw_header = json.dumps({**header, **tables}, separators=(",", ":")).encode()
    packed_header = zlib.compress(raw_header, 9)
    checksum = zlib.crc32(packed_header)
    prefix = PREFIX.pack(MAGIC, ARTIFACT_VERSION, len(packed_header), len(raw_header), checksum)
    return Packed(encoded, [prefix, packed_header, *payload], report)


def candidate_compressors(stream, compressor):
    """The compressors that COMPRESSOR=compressor tries on a stream; the smallest result is stored.
    """
    if compressor == "auto":
        return ["rans", *COMPRESSORS] if stream in CODED else [*COMPRESSORS]
    if compressor == "rans" and stream not in CODED:
        return ["lzma"]
    return [compressor]


def pack_stream(parts, encoded, compressor):
    """Bytes of the stream of these StreamParts, packed."""
    arrays = [encoded[part.tensor].parts[part.part].numpy().ravel() for part in parts]
    values = np.concatenate(arrays)
    if compressor != "rans":
        return COMPRESSORS[compressor].compress(_planes(values))
    shapes = code_groups(parts)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    groups = np.split(values, ends[:-1])
    return encode_codes([group.reshape(shape) for group, shape in zip(groups, shapes)])


# ---- read and check ------------------------------------------------------------------------------


class PackedStream(NamedTuple):
    """A stream as the file holds it."""

    compressor: str
    data: bytes
    size: int  # unpacked


class ArtifactFile(NamedTuple):
    """An artifact that was read."""

    header: dict  # of _checked_header()
    streams: dict[str, PackedStream]


# What the wrong JSON can raise in _checked_header().
UNUSABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


def read_artifact(path, data=None):
    """The file as ArtifactFile: all that can be checked without a model is checked.

    `data`: the file's bytes, where they are at hand.
    """
    if data is None:
        data = read_file(path)
    if len(data) < PREFIX.size or data[:8] != MAGIC:
        raise BadInput(f"{path}: not an artifact of this script (offset 0: found {data[:8]!r}, "
                       f"expected {MAGIC!r})")
    _, version, packed_length, raw_length, checksum = PREFIX.unpack_from(data)
    if version != ARTIFACT_VERSION:
        raise BadInput(f"{path}: artifact version {version} (offset 8), this script reads version "
                       f"{ARTIFACT_VERSION}")
    header_end = PREFIX.size + packed_length
    body = data[PREFIX.size : header_end]
    whole = len(body) == packed_length and zlib.crc32(body) == checksum
    if not whole or raw_length > MAX_HEADER:
        raise BadInput(f"{path}: truncated or corrupt header (offset {PREFIX.size}: {len(body)} of "
                       f"{packed_length} bytes)")
    try:
        header = _checked_header(decompress("zlib", body, raw_length, f"{path}: header"))
    except UNUSABLE as error:
        name = type(error).__name__
        raise BadInput(f"{path}: unusable header ({name}: {brief(error)})") from None
    return ArtifactFile(header, _split_streams(path, data, header_end, header["streams"]))


def _split_streams(path, data, begin, entries):
    """{stream: PackedStream}: the bytes from `begin` on, divided as the header's table of streams
    says.
    """
    expected = begin + sum(entry.length for entry in entries)
    if expected != len(data):
        raise BadInput(f"{path}: truncated or padded: {len(data)} bytes, expected {expected}")
    streams = {}
    for entry in entries:
        end = begin + entry.length
        body = data[begin:end]
        if zlib.crc32(body) != entry.checksum:
            raise BadInput(f"{path}: stream {entry.stream} is corrupt (checksum of offset {begin} "
                           f"to {end})")
        streams[entry.stream] = PackedStream(entry.compressor, body, entry.size)
        begin = end
    return streams


def _checked_header(text):
    """The header from JSON, its tables as TensorEntry and StreamEntry. An error means that
    save_artifact() did not write it; whether it is that of a model is still to be seen.
    """
    header = json.loads(text, parse_constant=_no_number, object_pairs_hook=_no_name_twice)
    required = {"settings", "looping", "tokenizer_sha256", "tensors", "streams"}
    if set(header) - {"temperature", "reasons"} != required:
        raise ValueError(f"its fields are {', '.join(sorted(header))}")
    for name, value in header["settings"].items():
        if type(value) is not str or len(value) > MAX_VALUE:
            raise ValueError(f"{brief(name, 30)} is no text of at most {MAX_VALUE} characters")
    unknown = set(header["settings"]) - {f.name.upper() for f in model_fields()}
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    if type(header["looping"]) is not bool:
        raise ValueError("looping is not true or false")
    temperature = header.setdefault("temperature", 0)
    if type(temperature) not in (int, float) or not 0 <= temperature <= 10:
        raise ValueError("temperature is no number from 0 to 10")
    need_reasons(header.setdefault("reasons", []))
    digest = bytes.fromhex(header["tokenizer_sha256"])
    if len(digest) not in (0, 32):
        raise ValueError("tokenizer_sha256 is no SHA-256")
    header["tokenizer_sha256"] = digest.hex()
    header["tensors"] = [_tensor_entry(*row) for row in header["tensors"]]
    header["streams"] = [_stream_entry(*row) for row in header["streams"]]
    names = [entry.stream for entry in header["streams"]]
    if len(set(names)) != len(names):
        raise ValueError("a stream is listed twice")
    return header


def _no_number(word):
    raise ValueError(f"{word} is not JSON")


def _no_name_twice(pairs):
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name comes twice")
    return dict(pairs)


def _tensor_entry(name, shape, codec, bits, rank, group):
    """A line of the table of tensors, checked."""
    if codec not in CODECS:
        raise ValueError(f"unknown codec {brief(codec, 30)}")
    shape = tuple(need_number("shape", size, int, 1, MAX_LOADED) for size in shape)
    if len(shape) < 2 and codec != "float16":
        raise ValueError(f"{codec} stores matrices")
    if rank:
        if codec == "float16":
            raise ValueError("a correction of float16")
        need_number("rank", rank, int, 1, min(shape[0], per_column(shape), MAX_RANK))
        need_number("group", group, int, 1, MAX_GROUP)
    need_number("rank", rank, int, 0, MAX_RANK)
    need_number("group", group, int, 0, MAX_GROUP)
    need_number("bits", bits, int, 1, 16)
    return TensorEntry(str(name), shape, codec, bits, rank, group)


def _stream_entry(stream, compressor, size, length, checksum):
    """A line of the table of streams, checked."""
    known = {part for codec in CODECS.values() for part in codec.parts} | set(CORRECTION)
    if stream not in known:
        raise ValueError(f"unknown stream {brief(stream, 30)}")
    coded = compressor == "rans" and stream in CODED
    if compressor not in COMPRESSORS and not coded:
        raise ValueError(f"unknown compressor {brief(compressor, 30)} of {stream}")
    need_number("size", size, int, 0, MAX_LOADED)
    need_number("length", length, int, 0, MAX_LOADED)
    need_number("checksum", checksum, int, 0, 2**32 - 1)
    return StreamEntry(stream, compressor, size, length, checksum)


# ---- what loading takes, and what model an artifact is of ----------------------------------------


def loading_bytes(tensors):
    """Most memory that loading a table of tensors takes: the weights in float32; their parts three
    times (unpacked, in order, tensor by tensor), which is enough for the entropy coder; four
    copies of the largest tensor, while it is decoded.
    """
    counts = [math.prod(entry.shape) for entry in tensors]
    return 4 * sum(counts) + 3 * sum(raw_sizes(tensors).values()) + 16 * max(counts)


def need_loadable(what, tensors):
    """BadInput if a table of tensors takes too much memory or time to load, whatever is in a
    stream.
    """
    counts = [math.prod(entry.shape) for entry in tensors]
    needed = loading_bytes(tensors)
    if needed > MAX_LOADED:
        raise BadInput(f"{what}: {sum(counts)} parameters in these codecs need {needed >> 20} MiB "
                       f"to be loaded, the limit is {MAX_LOADED >> 20}; make the model smaller")
    work = sum(count * entry.rank for count, entry in zip(counts, tensors))
    if work > MAX_CORRECTION_WORK:
        raise BadInput(f"{what}: low-rank corrections of that many weights take too long to load; "
                       "lower LQER_RANK or LQER_TOP_K")


def largest_rows(model, s):
    """The table of tensors (TensorEntry) of the largest artifact that these settings can make of a
    model.
    """
    widest = {"grid": "wide"}
    if s.awq_lite_group_top_k:
        widest["int"] = "mixed"
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    entries = []
    for name, store in storage(model, s).items():
        codec = widest.get(store.codec, store.codec)
        entries.append(TensorEntry(name, shapes[name], codec, store.bits, 0, 0))
    entries.sort(key=lambda entry: math.prod(entry.shape), reverse=True)
    corrections = s.lqer_top_k if s.lqer_rank else 0
    for i, entry in enumerate(entries):
        if corrections and entry.codec != "float16":
            rank = min(s.lqer_rank, *entry.shape)
            entries[i] = entry._replace(rank=rank, group=s.lqer_asym_group)
            corrections -= 1
    return entries


def artifact_settings(path, header, given):
    """What defines the model from the artifact, the rest from `given`, which must not contradict
    it.

    BadInput, too, if the header is not that of such a model, or the model is too large to be
    loaded. Nothing of its size is allocated.
    """
    try:
        words = [f"{name}={value}" for name, value in header["settings"].items()]
        words += ["TRAIN_SEQ_LEN=2", "TRAIN_BATCH_TOKENS=2", "COMPRESSOR=zlib"]
        stored = Settings.parse(words)
    except BadInput as error:
        first = brief(str(error).splitlines()[0], 150)
        raise BadInput(f"{path}: its settings cannot be used here: {first}") from None
    for f in model_fields():
        given_value = getattr(given, f.name)
        stored_value = getattr(stored, f.name)
        if given_value not in (f.default, stored_value):
            raise BadInput(f"{f.name.upper()}={brief(_show(given_value))} contradicts {path}, which "
                           f"was made with {brief(_show(stored_value))}")
    s = replace(given, **{f.name: getattr(stored, f.name) for f in model_fields()})

    with torch.device("meta"):
        skeleton = GPT(s, init=False)
    tensors = header["tensors"]
    shapes = [(name, tuple(weight.shape)) for name, weight in skeleton.named_parameters()]
    if [(entry.name, entry.shape) for entry in tensors] != shapes:
        raise BadInput(f"{path}: its tensors are not those of its settings")
    if raw_sizes(tensors) != {entry.stream: entry.size for entry in header["streams"]}:
        raise BadInput(f"{path}: stream sizes do not add up to its tensors")
    need_loadable(path, tensors)
    return s


# ---- load ----------------------------------------------------------------------------------------


@torch.no_grad()
def load_artifact(path, settings=None, dtype=torch.float32, attend=None, device="cpu", data=None):
    """-> (settings, model). The file fits a model of its settings before anything of that size is
    made.
    """
    header, streams = read_artifact(path, data)
    s = artifact_settings(path, header, settings or Settings())
    parts = _unpacked(path, header["tensors"], streams)
    model = GPT(s, dtype, attend, init=False)
    weights = dict(model.named_parameters())
    for entry in header["tensors"]:  # one after the other: not all of it is in memory twice
        encoded = Encoded(entry.codec, entry.bits, entry.rank, entry.group, parts.pop(entry.name))
        weight = encoded.decode(entry.shape)
        if not weight.isfinite().all():
            raise BadInput(f"{path}: holds values that are not finite ({entry.name})")
        weights[entry.name].copy_(weight)
    model.looping = s.loops and header["looping"]
    model.temperature = float(header["temperature"]) or None
    model.reasons = header["reasons"]
    return s, model.to(device)


def _unpacked(path, tensors, streams):
    """{tensor: {part: array as a Tensor}} from the streams of an ArtifactFile."""
    unpacked = {entry.name: {} for entry in tensors}
    for stream, parts in stream_layout(tensors).items():
        values = _unpack_stream(f"{path}: stream {stream}", parts, streams[stream])
        begin = 0
        for place in parts:
            end = begin + place.count
            array = torch.from_numpy(values[begin:end].copy())
            unpacked[place.tensor][place.part] = array.view(place.shape)
            begin = end
    return unpacked


def _unpack_stream(where, parts, packed):
    """The values (count,) of a PackedStream, whose StreamParts are known."""
    if packed.compressor == "rans":
        groups = decode_codes(packed.data, code_groups(parts), where)
        return np.concatenate([group.ravel() for group in groups])
    raw = decompress(packed.compressor, packed.data, packed.size, where)
    return _unplanes(raw, parts[0].dtype)


# --------------------------------------------------------------------------------------------------
# 10 Evaluation: the definition of the metric
# bits per byte = sum of nats / (ln 2 * sum of bytes), over the same targets, every target of the stream exactly once.
# Target i of a stream is its token i + 1, to be predicted after token i.
# --------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a predictor knows of a chunk: rows of text, and the places after which a token is to be predicted."""

    ids: Tensor  # (B, T) tokens
    places: Tensor  # (B, K) neighbouring positions in ids, after each of which a token is to be predicted
    recent: Tensor  # (B, h + K) the tokens up to each place, and the h before the first; -1 before the row begins
    turn: int | None = None  # None: rows on their own; 0: rows that begin; n: the first B rows of turn n - 1 continue


class Chunk(NamedTuple):
    """Rows that are scored together. Only `inputs` is given to predict()."""

    inputs: Inputs
    targets: Tensor  # (B, K) the tokens after those places
    index: Tensor  # (B, K) their numbers among the targets of the stream; -1 where a row or a place is only padding
    continuing: int = 0  # number of leading rows that continue in the next chunk


class Part(NamedTuple):
    """What is scored before anything may learn from it."""

    number: int
    total: int  # parts of the text
    ranges: np.ndarray  # (n, 2) its targets [a, b), in the order in which they are read
    chunks: Iterable[Chunk]  # those of this rank


def document_ranges(stream):
    """(n, 2) targets [a, b) of each document: what follows its BOS, up to and with the next BOS."""
    starts = (stream.tokens[1:-1] == BOS).nonzero().squeeze(1).cpu().numpy() + 1
    edges = np.concatenate(([0], starts, [len(stream.bytes)]))
    return np.stack((edges[:-1], edges[1:]), 1)


def sliding_windows(rows, length, stride=0):
    """(starts, lengths, keeps) of windows over rows (n, 2) of targets [a, b): the first of a row scores all of its
    targets, each later one begins `stride` further on and scores its last `stride`, the final one what is left. Every
    target once; and what it is predicted from does not depend on where the row ends, which comes after it.
    """
    stride, (a, b) = stride or length, rows.T
    count = 1 + np.maximum(-(-(b - a - length) // stride), 0)
    row = np.repeat(np.arange(len(a)), count)
    j = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    start = a[row] + j * stride
    lengths = np.minimum(length, b[row] - start)
    return start, lengths, np.where(j == 0, lengths, lengths - (length - stride))


SIZES = 4  # to which windows of documents are padded: few graphs, and less than a quarter in vain
CACHE_STEP, CACHE_SEGMENT = 256, 32  # tokens of a forward with kept keys; windows of the stream read by one row


def parts_of(batch):
    """To so many rows a batch shrinks while its rows end: rows of about one length end together, and a size more would
    save FineWeb 3 % of the forwards, for a graph of each width.
    """
    return batch, -(-batch // 4)


class Reader:
    """How a stream is read: in parts, and they in this rank's chunks. Settings decide, and never the number of ranks.

    unit: targets of a part; 0: all, for a predictor that does not learn. history: h of Inputs.recent. of: number of parts
    of the text that this one is the beginning of.
    """

    def __init__(self, stream, s, rt, unit=0, history=0, of=0):
        self.stream, self.s, self.rt, self.history, self.of = stream, s, rt, history, of
        self.by_document = s.eval_docs or s.ttt == "lora_docs"
        self.rows = document_ranges(stream) if self.by_document else np.array([[0, len(stream.bytes)]])
        self.grain = max(s.eval_seq_len // SIZES, 1) if self.by_document else s.eval_seq_len
        self.learning, self.unit, self.forwarded = unit > 0, unit or len(stream.bytes), 0  # forwarded: tokens so far

    def __iter__(self):
        """The parts. A chunk may be asked for once the parts before it have been scored."""
        s = self.s
        plan = list(self._adapted_documents() if s.ttt == "lora_docs" else self._lanes_by_part()
                    if s.eval_context == "cache" else self._windows_by_part())
        for number, (ranges, chunks) in enumerate(plan):
            yield Part(number, max(len(plan), self.of), np.asarray(ranges), chunks)

    def shapes(self):
        """[(rows, tokens, places, step)] of every chunk that may come: what a compiled predictor has graphs for."""
        s, length, grain = self.s, self.s.eval_seq_len, self.grain
        sizes = sorted({min(n, length) for n in range(grain, length + grain, grain)})
        if s.ttt != "lora_docs" and s.eval_context == "window":
            return [*((s.eval_batch_seqs, size, size, None) for size in sizes),
                    (s.eval_batch_seqs, length, s.eval_stride or length, None)]
        docs = s.ttt == "lora_docs"
        batch, found = s.ttt_batch_size if docs else s.eval_batch_seqs, set()
        begun = [(0, batch), *((1, rows) for rows in parts_of(batch))]
        for size in [s.ttt_chunk_size, *(size for size, _ in s.ttt_short_chunks)] if docs else [min(CACHE_STEP, length)]:
            grain = max(length // SIZES, size)
            wide = {min(n, length) for n in range(grain, length + grain, grain)} if s.eval_context == "window" else {size}
            found |= {(rows, tokens, size, step) for tokens in wide for step, rows in begun}
        return sorted(found | {(rows, tokens, 1, step) for rows, tokens, _, step in found if not self.by_document},
                      key=lambda shape: (shape[3], -shape[0]))

    def _windows_by_part(self):
        start, length, keep = sliding_windows(self.rows, self.s.eval_seq_len, self.s.eval_stride)
        done = np.cumsum(keep)
        cuts = np.flatnonzero(np.diff((done - keep) // self.unit)) + 1
        for some in np.split(np.arange(len(start)), cuts):
            yield [[done[some[0]] - keep[some[0]], done[some[-1]]]], self._windows(start[some], length[some], keep[some])

    def _windows(self, start, length, keep):
        """Chunks of windows, those of about one length together."""
        s, rt = self.s, self.rt
        whole = keep == length
        size = np.where(whole, np.minimum(-(-length // self.grain) * self.grain, s.eval_seq_len), s.eval_seq_len)
        order, dealt = np.lexsort((start, size, whole)), 0
        kinds = np.stack((whole, size))[:, order]
        for group in np.split(order, np.flatnonzero((np.diff(kinds) != 0).any(0)) + 1):
            width = int(size[group[0]] if whole[group[0]] else s.eval_stride or s.eval_seq_len)
            for i in range(0, len(group), s.eval_batch_seqs):
                rows = group[i : i + s.eval_batch_seqs]
                if dealt % rt.world == rt.rank:
                    stop = start[rows] + length[rows]
                    yield self._cut(start[rows], stop, stop - keep[rows], int(size[rows[0]]), width, s.eval_batch_seqs)
                dealt += 1

    def _lanes_by_part(self):
        """Rows whose keys are kept: documents, or segments of the stream that first read the window before them."""
        s, n = self.s, len(self.stream.bytes)
        if self.by_document:
            done = np.cumsum(self.rows[:, 1] - self.rows[:, 0])
            parts = np.split(self.rows, np.flatnonzero(np.diff((done - 1) // self.unit)) + 1)
        else:
            edges = [*range(0, n, self.unit), n]
            parts = [[[a, b]] for a, b in zip(edges, edges[1:])]
        for rows in parts:
            rows = np.asarray(rows)
            if self.by_document:
                lanes = rows[:, [0, 0, 1]]
            else:
                (a, b), most = rows[0], CACHE_SEGMENT * s.eval_seq_len
                first = np.arange(a, b, min(most, max(self.unit // 16, s.eval_seq_len)))
                lanes = np.stack((np.maximum(first - s.eval_seq_len, 0), first, np.append(first[1:], b)), 1)
            yield [[rows[0, 0], rows[-1, 1]]], self._lanes(lanes, min(CACHE_STEP, s.eval_seq_len), s.eval_batch_seqs)

    def _adapted_documents(self):
        """Documents, longest first, in groups between which something is learnt from all of them."""
        s, length = self.s, self.rows[:, 1] - self.rows[:, 0]
        order = np.argsort(-length, kind="stable")
        groups = range(0, len(order), s.ttt_group_docs) if self.learning else ()
        edges = sorted(edge for edge in {0, len(order), *groups, *phase_ends(s)} if edge <= len(order))
        window = s.eval_seq_len if s.eval_context == "window" else 0
        for a, b in zip(edges, edges[1:]):
            rows = self.rows[order[a:b]]
            yield rows, self._lanes(rows[:, [0, 0, 1]], s.ttt_chunk_size, s.ttt_batch_size, window, s.ttt_short_chunks)

    def _lanes(self, lanes, size, batch, window=0, early=()):
        """Chunks of rows that go on for `size` tokens at a time, or fewer early on: (begin, first scored target, end) each.
        With a window they come with the text before them, as much of it as fits.
        """
        rt = self.rt
        lanes = lanes[np.argsort(lanes[:, 0] - lanes[:, 2], kind="stable")][rt.rank :: rt.world]
        for i in range(0, len(lanes), batch):
            (begin, first, end), at, step = lanes[i : i + batch].T, 0, 0
            while rows := int((begin + at < end).sum()):
                some = next((short for short, until in sorted(early, key=itemgetter(1)) if at < until), size)
                start = begin[:rows] + at
                stop, scored = np.minimum(start + some, end[:rows]), np.maximum(first[:rows], start)
                wide, width = some, some if (scored < stop).any() else 1  # nothing to score, little for the head to do
                if window:
                    grain = max(window // SIZES, some)
                    wide = min(-(-(at + some) // grain) * grain, window)
                    start = np.maximum(begin[:rows], start + some - window)
                pad = next(n for n in reversed(parts_of(batch)) if n >= rows) if step else batch
                yield self._cut(start, stop, scored, wide, width, pad, step, int((stop < end[:rows]).sum()))
                at, step = at + some, step + 1

    def _cut(self, start, stop, first, size, width, rows, step=None, more=0):
        """Chunk of the tokens [start, stop), padded to `size`; of at most `width` targets from `first` on.

        After its end a row shows its own text again: nothing that comes later, and nothing that tells where it ends.
        """
        device, tokens, end = self.rt.device, self.stream.tokens, len(self.stream.tokens) - 1
        origin = self.rows[np.searchsorted(self.rows[:, 0], start, side="right") - 1, 0]
        pad = rows - len(start) if self.rt.compiled else 0  # one shape, one graph
        edges = np.pad(np.stack((start, stop, first, origin)), ((0, 0), (0, pad)))
        start, stop, first, origin = torch.from_numpy(edges).to(device)[..., None].unbind()
        self.forwarded += start.numel() * size

        def shown(place):
            again = start + (place - start) % (stop - start).clamp(min=1)
            return tokens[torch.where(place < stop, place, again).clamp(0, end)].long()

        place = first + torch.arange(-self.history, width, device=device)
        run = torch.where(place >= origin, shown(place), -1)
        place = place[:, self.history :]
        take = (place - start).clamp(0, size - 1)
        x = shown(start + torch.arange(size, device=device))
        targets = tokens[(start + take + 1).clamp(max=end)].long()
        return Chunk(Inputs(x, take, run, step), targets, torch.where(place < stop, place, -1), more)


def reader_for(predictor, stream, s, rt, of=0):
    """The stream as a predictor reads it: in parts if it learns from them."""
    return Reader(stream, s, rt, s.ttt_chunk_tokens if predictor.learns else 0, predictor.history, of)


def contiguous_reader(stream, s, rt):
    """The stream in windows that do not overlap, read by the model alone: how scores are reported on the way."""
    return Reader(stream, replace(s, eval_stride=0, eval_docs=False, eval_context="window", ttt="off"), rt)


def scoring_name(s):
    """How a stream is read and by what it is scored, in a word."""
    how = "cache" if s.eval_context == "cache" else "contiguous" if s.eval_stride in (0, s.eval_seq_len) else "sliding_window"
    how = f"documents_{how}" if s.eval_docs else "" if s.ttt == "lora_docs" else how
    words = [how, f"ttt_{s.ttt}" * (s.ttt != "off"), s.mixer * (s.mixer != "off"), "tilt" * (s.token_boost > 0)]
    return "_".join(word for word in words if word)


class Score(NamedTuple):
    loss: float  # nats per token
    bpb: float
    tokens: int
    bytes: int


def score(predictor, parts, stream, rt, validity, log=None, check_every=64, nats=None, spied=None):
    """The only scoring loop: predict, add to float64 meters, mark the targets, and only then let the predictor learn:
    from its own chunk, and from a part once every rank has scored its share of it.

    Breaks of the rules go to `validity`: a target scored twice or never, or another one than the text's; nats below 0; a
    part that was learnt from before it was scored; and what the Examiner finds. learn() gets a copy of the text that holds
    what has been scored and nothing else: it can neither read nor change the rest. `nats` (N,) float64 gets what each
    target cost, on every rank; the rows of `spied` {target: (V,) zeros} the distribution that was there for some.
    """
    length, done, began = len(stream.bytes), 0, time.monotonic()
    seen = torch.zeros(length + 1, dtype=torch.uint8, device=rt.device)  # the last one is for padding
    meters = torch.zeros(4, dtype=torch.float64, device=rt.device)  # nats, tokens, bytes, targets that are another text's
    lowest = torch.zeros((), dtype=torch.float64, device=rt.device)
    examiner = Examiner(predictor, check_every)
    if predictor.learns:
        known = stream._replace(tokens=torch.zeros_like(stream.tokens), bytes=torch.zeros_like(stream.bytes))
    for part in parts:
        for chunk in part.chunks:
            live, where = chunk.index >= 0, chunk.index.clamp(min=0)
            examiner.ask(chunk)
            for target, row in (spied or {}).items():
                if (hit := chunk.index == target).any():
                    row += predictor.predict(chunk.inputs)[hit][0].double().exp()
            nll = torch.where(live, predictor.nll(chunk.inputs, chunk.targets).double(), 0.0)
            foreign = chunk.targets != stream.tokens[where + 1]
            foreign |= chunk.inputs.ids.gather(1, chunk.inputs.places) != stream.tokens[where]
            meters += torch.stack((nll.sum(), live.sum(), (stream.bytes[where] * live).sum(), (foreign & live).sum()))
            lowest = torch.minimum(lowest, nll.min())
            marks = torch.where(live, where, length).flatten()
            seen.index_add_(0, marks, torch.ones_like(marks, dtype=torch.uint8))
            if nats is not None:
                nats[where[live]] = nll[live]
            examiner.compare(chunk, nll)
            predictor.observe(chunk)
            done += nll.numel() * rt.world
            if log:
                log.progress("scoring", min(done, length), length, f"{done / (time.monotonic() - began):,.0f} tokens/s")
        if predictor.learns:
            scored = rt.sum(torch.cat([seen[a:b] for a, b in part.ranges.tolist()])) > 0
            validity.need(bool(scored.all()), f"C3 order: of a part of {len(scored)} targets {int(scored.sum())} had been "
                          "scored when it was learnt from")
            for a, b in part.ranges.tolist():
                known.tokens[a : b + 1], known.bytes[a:b] = stream.tokens[a : b + 1], stream.bytes[a:b]
            predictor.learn(part, known)
    total, tokens, nbytes, foreign = rt.sum(meters).tolist()
    for record in (nats, *(spied or {}).values()):
        if record is not None:
            rt.sum(record)
    seen = rt.sum(seen)[:length]
    twice, never = int((seen > 1).sum()), int((seen == 0).sum())
    below, = rt.max(0.0 if lowest.isnan() else -lowest.item())  # nan is in the total, too
    examiner.report(rt, validity, log)
    validity.need(not twice and not never and tokens == length,
                  f"C4 coverage: {twice} targets scored more than once, {never} never")
    validity.need(not foreign, f"C4 coverage: {foreign:.0f} targets, or the tokens before them, are not those of the text")
    validity.need(below < TOLERANCE, f"C2 normalisation: nats of {-below:.1e}, which are below 0")
    validity.need(math.isfinite(total), "the score is not finite")
    return Score(total / max(tokens, 1), total / math.log(2) / max(nbytes, 1), int(tokens), int(nbytes))


# --------------------------------------------------------------------------------------------------
# 11 Validity: is the score that of a true code?
# --------------------------------------------------------------------------------------------------

EARLY = "C3: validation shards opened before the artifact was frozen"


class Validity:
    """The ledger behind `valid` (a true code length: C1-C4 of #1017) and `eligible` (could be a record)."""

    def __init__(self):
        self.reasons, self.eligible_reasons = [], []
        self.tests = {}  # of the self-test: did it pass?
        self.frozen = self._reporting = self._loading = self._evaluating = False
        self._files = {}  # {(device, inode): split} of the shards

    def need(self, ok, reason):
        if not ok and reason not in self.reasons:
            self.reasons.append(reason)

    def need_for_record(self, ok, reason):
        if not ok:
            self.eligible_reasons.append(reason)

    def verdict(self):
        """What every line with a score carries."""
        return {"valid": "no", "reasons": list(self.reasons)} if self.reasons else {"valid": "yes"}

    def share(self, rt):
        """What one rank has found is known to all from here on. Collective."""
        reasons, eligible_reasons = zip(*rt.gather((self.reasons, self.eligible_reasons)))
        self.reasons = list(dict.fromkeys(chain.from_iterable(reasons)))
        self.eligible_reasons = list(dict.fromkeys(chain.from_iterable(eligible_reasons)))

    def to_keep(self, rt):
        """The reasons of all ranks, as a file may hold them. Collective."""
        self.share(rt)
        return [brief(reason, MAX_VALUE) for reason in self.reasons]

    def restore(self, reasons):
        """Those that were kept."""
        for reason in reasons:
            self.need(False, reason)

    @contextlib.contextmanager
    def report(self):
        """A score that nothing learns from: the only use of validation text before the artifact is frozen."""
        self._reporting = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._reporting = False

    @contextlib.contextmanager
    def loading(self):
        """The one reading of the validation shards: for reports, or after the artifact is frozen."""
        self.opened("val")
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    @contextlib.contextmanager
    def evaluation(self):
        """Network connections meanwhile are noted, whoever makes them."""
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    @contextlib.contextmanager
    def watch(self, folder):
        """Shards of this folder that are opened when they must not be are noted, whoever opens them and by whatever name:
        a link has the device and inode of its file. What compiled code opens is not seen.
        """
        for split in ("train", "val"):
            for path in Path(folder).glob(f"fineweb_{split}_*.bin"):
                with contextlib.suppress(OSError):
                    self._files[_inode(path)] = split
        _install_audit()
        _watching.append(self)
        try:
            yield
        finally:
            _watching.remove(self)

    def audit(self, event, args):
        if event == "socket.connect" and self._evaluating and isinstance(args[1], tuple):
            self.need(False, f"the evaluation opened a network connection to {args[1][0]}")
        if event != "open" or not isinstance(args[0], (str, bytes)):
            return
        split = None
        with contextlib.suppress(OSError, ValueError):  # a file that is not there
            split = self._files.get(_inode(args[0]))
        if split == "train":
            self.opened("train")
        elif split == "val" and not self._loading:
            self.need(self.frozen, EARLY)
            self.need(not self.frozen, "C1: validation shards were opened again while they were scored")

    def freeze(self):
        """The artifact's hash is logged: from here on validation text may be read, training text may not."""
        self.frozen = True

    def opened(self, split):
        if split == "train":
            self.need(not self.frozen, "training shards were read after the artifact was frozen")
        else:
            self.need(self.frozen or self._reporting, EARLY)


_watching = []  # the ledgers of runs that are on


@cache
def _install_audit():
    """Once: a hook stays for ever."""
    def hook(event, args):
        for validity in _watching:
            validity.audit(event, args)

    sys.addaudithook(hook)


def _inode(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


# ---- while it is scored --------------------------------------------------------------------------

LOOK = 8  # neighbouring places of each row that are looked at
TOLERANCE = 2e-5  # in log, at those places: worth 0.00001 BPB at most; honest runs are at 5e-7


class Examiner:
    """Looks at some chunks of a scoring, at places which nobody can know beforehand: does each distribution sum to 1, does
    nll() say the same, and does it stay as it is whatever comes later in its row? (C2, C2, C1)

    The places are drawn anew in each run, half of them at the end of what a row scores.
    """

    def __init__(self, predictor, every):
        self.predictor, self.every, self.chunks = predictor, every, 0
        self.random = np.random.default_rng()  # from the system's entropy
        self.sums, self.off, self.changed = [], 0.0, 0.0
        self.asked = None

    def ask(self, chunk):
        """Before a chunk is scored: predict() may be called at any time, but observe() follows on nll()."""
        self.asked = None
        due = self.every and self.random.random() < max(2 / (self.chunks + 2), 1 / self.every)
        self.chunks += 1
        if due:
            self._ask(chunk)

    def _ask(self, chunk):
        inputs = chunk.inputs
        live = chunk.index.cpu().numpy() >= 0
        width = live.shape[1]
        history = inputs.recent.size(1) - width
        count = min(LOOK, width)
        end = self._last_places(live)
        begin = np.maximum(end - LOOK + 1, 0)
        # The first `count` places are those that are looked at. As many as ever are asked for: one shape, one graph.
        places = np.minimum(begin + np.arange(width), width - 1)
        span = np.minimum(begin + np.arange(history + width), history + width - 1)
        looked = np.take_along_axis(live, places, 1)[:, :count] & (places[:, :count] <= end)

        places, span, end, looked = (torch.from_numpy(z).to(chunk.index.device) for z in (places, span, end, looked))
        asked = inputs._replace(places=inputs.places.gather(1, places), recent=inputs.recent.gather(1, span))
        log_probs = self.predictor.predict(asked, count)
        vocab = log_probs.size(-1)
        later = torch.arange(inputs.ids.size(1), device=end.device) > inputs.places.gather(1, end)
        changed = asked._replace(ids=torch.where(later, self._noise(asked.ids, vocab), asked.ids),
                                 recent=torch.where(span > history + end, self._noise(asked.recent, vocab), asked.recent))
        others = self.predictor.predict(changed, count)
        change = torch.where(log_probs == others, 0.0, log_probs.clamp(min=-30) - others.clamp(min=-30)).abs()
        self.changed = max(self.changed, _or_infinite(torch.where(looked[..., None], change, 0.0).max()))
        self.asked = log_probs.clone(), places[:, :count], looked

    def _last_places(self, live):
        """(B, 1): of each row one of the places that it scores, or, half of the time, the last of them."""
        anywhere = np.where(live, self.random.random(live.shape), -1.0).argmax(1)
        last = np.where(live, np.arange(live.shape[1]), 0).max(1)
        return np.where(self.random.random(len(live)) < 0.5, anywhere, last)[:, None]

    def _noise(self, like, vocab):
        return torch.from_numpy(self.random.integers(vocab, size=like.shape)).to(like.device)

    def compare(self, chunk, nll):
        """After it was scored at `nll` (B, K)."""
        if self.asked is None:
            return
        log_probs, places, looked = self.asked
        sums = log_probs.double().logsumexp(-1)
        of_targets = log_probs.gather(-1, chunk.targets.gather(1, places)[..., None]).squeeze(-1)
        off = torch.maximum(sums.abs(), (of_targets + nll.gather(1, places)).abs())
        self.off = max(self.off, _or_infinite(torch.where(looked, off, 0.0).max()))
        self.sums += sums[looked].exp().tolist()

    def report(self, rt, validity, log):
        """What was found on all ranks."""
        off, changed, largest = rt.max(self.off, self.changed, max(self.sums, default=0.0))
        if log:
            log("normalisation", positions=len(self.sums) * rt.world, worst_log=off, largest_sum=largest,
                mean_sum=sum(self.sums) / max(len(self.sums), 1), changed_by_later=changed)
        validity.need(off < TOLERANCE, f"C2 normalisation: off by {off:.1e} in log on sampled positions")
        validity.need(changed < TOLERANCE, f"C1 causality: what comes later in its row changes a prediction by {changed:.1e}"
                      " in log on sampled positions")


def _or_infinite(value):
    """A number that is not finite is the largest of all: max() lets nan pass."""
    value = float(value)
    return value if math.isfinite(value) else math.inf


def fingerprint(model):
    """SHA-256 of everything in a model that a forward could read: parameters, buffers, other attributes."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (list, tuple, dict)):
            digest.update(str(len(value)).encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        elif isinstance(value, (str, int, float, type(None))):
            digest.update(repr(value).encode())

    for name, module in model.named_modules():
        add(name)
        add({key: value for key, value in vars(module).items() if key != "_modules"})
    return digest.hexdigest()


def text_sha256(stream):
    """SHA-256 of a text's tokens as the shards hold them: uint16, little-endian, one shard after the other."""
    return hashlib.sha256(stream.tokens.cpu().numpy().astype("<u2").tobytes()).hexdigest()


# ---- the denominator -----------------------------------------------------------------------------


def _cased_length(text):
    """Bytes of what a CaseOps text (#1729) stands for: without its operators, but with those that one escapes."""
    escape = CASE_OPERATORS[-1]
    escaped = text.count(escape) - text.count(escape + escape)
    return len(text.encode()) - 3 * (sum(map(text.count, CASE_OPERATORS)) - escaped)


def prove_bytes(sp, stream, rt):
    """Decode all of the validation text, each rank a share of its documents, and compare their length with the bytes:
    (documents, wrong ones, share of the targets that were compared).

    Where VAL_TOKENS cuts the last document, pieces of a single byte may be left of a character; each of them is one byte.
    CaseOps documents are compared all together and may differ by 0.1 %, because published sidecars count the text before
    normalisation; operators that count would be 9 %.
    """
    ids, counted = stream.tokens.cpu().numpy(), stream.bytes.cpu().numpy()
    edges = np.unique([0, *np.flatnonzero(ids == BOS), len(ids)])
    documents = list(zip(edges.tolist(), edges[1:].tolist()))[rt.rank :: rt.world]
    found = np.zeros(5)  # documents, wrong ones, targets, bytes charged, bytes of case-restored text
    cased = has_case_operators(sp)
    for i in range(0, len(documents), 256):
        batch = documents[i : i + 256]
        texts, sums = [], []
        for begin, end in batch:
            first, stop = max(begin - 1, 0), end  # with the BOS as a target, which must count nothing
            while end == len(ids) and not stream.whole and stop > begin + 1 and sp.is_byte(int(ids[stop - 1])):
                stop -= 1
            texts.append(ids[begin + (ids[begin] == BOS) : stop].tolist())
            charged = int(counted[first : end - 1].sum(dtype=np.int64)) - (end - stop)
            opening = 0 if ids[begin] == BOS else len(sp.decode([int(ids[begin])]).encode())  # is no target
            sums.append(charged + opening)
            found[2] += end - 1 - first
        texts = sp.decode(texts)
        found[0] += len(batch)
        found[1] += sum(len(text.encode()) != total for text, total in zip(texts, sums))
        found[3] += sum(sums)
        found[4] += sum(map(_cased_length, texts)) if cased else 0
    count, wrong, targets, charged, size = rt.sum(torch.from_numpy(found).to(rt.device)).tolist()
    if cased:
        wrong = count * (abs(charged - size) > 1e-3 * size)
    return int(count), int(wrong), targets / max(len(counted), 1)


def _check_bytes(run, sp, val):
    """The denominator against all decoded documents, and against the totals of whoever made the shards; returns it."""
    documents, wrong, share = prove_bytes(sp, val, run.rt)
    counted = int(val.bytes.sum())
    by = "sidecar" if val.sidecar else "table"
    changes, foreign = text_changes(sp), foreign_tokens(sp, val)
    run.validity.need_for_record(not changes, changes)
    run.validity.need_for_record(not foreign, foreign)
    if foreign:
        run.log("warning", note=foreign)
    run.validity.need(not wrong, f"bytes: {wrong} of {documents} decoded documents differ from the byte {by}")
    run.validity.need(share == 1, f"bytes: {share:.1%} of the text was compared with what it decodes to, not all of it")
    run.facts.update(documents_decoded=documents, decoded_share=round(share, 6))
    run.log("bytes", documents_decoded=documents, share=share, wrong=wrong, val_tokens=len(val.bytes), val_bytes=counted,
            bytes_per_token=round(counted / len(val.bytes), 6), counted_by=by)
    path = Path(run.s.data_path) / "manifest.json"
    if not path.is_file() or not val.whole:
        return counted
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]
        stated = int(split["tokens"]) - 1, int(split["bytes"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{path}: not a manifest of data/prepare.py ({type(error).__name__}: {error})") from None
    run.validity.need((len(val.bytes), counted) == stated,
                      f"bytes: {len(val.bytes)} targets, {counted} bytes; the manifest says {stated[0]}, {stated[1]}")
    return counted


# ---- the self-test -------------------------------------------------------------------------------


def code_tests(nats, ids, vocab, flips, cuts, sums, said=None, ends=()):
    """{test: by how much it fails}: is nats(ids (N + 1,)) -> (N,) what a code of #1017 costs?

    flip (C1): nats before target t do not change with what comes from t on. prefix (C3, C4): nor when the text ends
    there; `cuts` are where windows and parts end. sum (C2, and whatever looks at the target first): the nats of all tokens
    that could be target t, each scored as if it were, make a distribution; a token follows it, so that a row of text shows
    the target to who looks ahead. Where the predictor says(ids, t) (V,) which, that must sum to 1, and a sample of tokens
    must cost what it says. ends (C1): nor do nats change with where a document ends later: `ends` moves BOS tokens,
    (from, to), to an earlier place.
    """
    def most(errors):
        return torch.stack(list(errors)).abs().max().item()  # nan stays nan: max() lets it pass

    whole, generator, worst = nats(ids), torch.Generator().manual_seed(0), {}
    other = torch.randint(vocab - 1, ids.shape, generator=generator).to(ids)
    other = torch.where(ids == BOS, BOS, other + (other >= BOS))  # where documents begin is left as it is
    worst["flip"] = most((nats(torch.cat((ids[: t + 1], other[t + 1 :])))[:t] - whole[:t]).abs().max() for t in flips)
    worst["prefix"] = most((nats(ids[: t + 1]) - whole[:t]).abs().max() for t in cuts)
    errors = []
    for t in sums:
        some = range(vocab) if said is None else torch.randperm(vocab, generator=generator)[:2].tolist()
        found = torch.stack([nats(torch.cat((ids[: t + 1], ids.new_tensor([v]), ids[t + 2 : t + 3])))[t] for v in some])
        if said is None:
            errors.append(found.neg().exp().sum() - 1)
        else:
            p = said(ids[: t + 3], t)
            errors += [p.sum() - 1, (found + p[list(some)].log()).abs().max()]
    worst["sum"] = most(errors)
    moved = []
    for end, earlier in ends:
        text = ids.clone()
        text[end], text[earlier] = ids[earlier], BOS
        moved.append((nats(text)[: earlier - 1] - whole[: earlier - 1]).abs().max())
    return worst | ({"ends": most(moved)} if moved else {})


SELFTEST_TOLERANCE = 1e-6  # nats
SELFTESTS = {"flip": "C1 causality", "ends": "C1 causality", "prefix": "C3 order", "sum": "C2 normalisation",
             "ranks": "the score depends on ranks"}


def selftest(run, s, path, data, val):
    """Is what scored a code? code_tests() with its settings, but for sizes, in float64 and uncompiled, on the beginning of
    the validation text, whose documents are made to get shorter; and the same on one rank as on all. A line each.

    Float64, because learning multiplies rounding: float32 with TTT_LORA_LR=0.3 was off by 0.05. What the run's own kernels
    do at its own lengths, pick_attention() and the Examiner look at.
    """
    n, rt = min(s.eval_seq_len, 8), copy(run.rt)
    rt.compiled, rt.dtype = False, torch.float64
    alone = copy(rt)
    alone.rank, alone.world = 0, 1
    s = replace(s, eval_seq_len=n, eval_stride=n // 2 if 0 < s.eval_stride < s.eval_seq_len else 0, eval_batch_seqs=2,
                ttt_chunk_tokens=3 * n, ttt_batch_seqs=min(s.ttt_batch_seqs, 3), ttt_epochs=min(s.ttt_epochs, 2),
                ttt_chunk_size=min(s.ttt_chunk_size, n // 2), ttt_short_chunks=(), ttt_batch_size=2, ttt_group_docs=2,
                phased_ttt_prefix_docs=min(s.phased_ttt_prefix_docs, 2), phased_ttt_num_phases=1, mixer_min_tokens=0,
                ngram_buckets=min(s.ngram_buckets, 64))
    model = load_artifact(path, s, torch.float64, attend_reference, rt.device, data)[1].double()
    shift = n // 4  # by which ends of documents are moved; their order by length stays
    lengths = [4 * n, 3 * n, 2 * n, 2 * n, n, shift + 1]  # the ends of the first ones are ends of windows and parts, too
    ids = val.tokens.repeat(-(-(sum(lengths) + 1) // len(val.tokens)))[: sum(lengths) + 1].long()
    ids[ids == BOS] = BOS + 1
    ids[[0, *np.cumsum(lengths)[:-1]]] = BOS
    before = adaptation_of_weights(model, s, rt) if s.ttt == "before" else None
    predictors = {where: make_predictor(model, s, where, len(ids), s.eval_temperature or model.temperature)
                  for where in (rt, alone)}

    def nats(ids, where=rt, spied=None):
        stream = ValStream(ids.int(), torch.ones(len(ids) - 1, dtype=torch.int16, device=ids.device), False)
        predictor, found = predictors[where], torch.zeros(len(ids) - 1, dtype=torch.float64, device=ids.device)
        predictor.reset()
        if before:
            before.reset()
            before.fit(stream, np.arange(len(found)), 1, partial(cosine, s))
        score(predictor, reader_for(predictor, stream, s, where, of=8), stream, where, Validity(), None, 0, found, spied)
        return found

    def said(ids, t):
        spied = {t: torch.zeros(s.vocab_size, dtype=torch.float64, device=ids.device)}
        nats(ids, spied=spied)
        return spied[t]

    with run.clock.phase("selftest"):
        ends = [(end, end - shift) for end in (7 * n, 12 * n)] if shift else ()
        worst = code_tests(nats, ids, s.vocab_size, (5 * n + 3, 11 * n), (4 * n, 9 * n), (7 * n + 3, 9 * n), said, ends)
        if rt.world > 1:
            worst["ranks"] = (nats(ids) - nats(ids, alone)).abs().max().item()
    for name, error in worst.items():
        good = run.validity.tests[name] = error < SELFTEST_TOLERANCE  # nan is not
        run.log("selftest", test=name, ok="yes" if good else "no", off_by=error, ranks=rt.world)
        run.validity.need(good, f"{SELFTESTS[name]}: the {name} test is off by {error:.1e}")


# --------------------------------------------------------------------------------------------------
# 12 Predictors: what is scored. They compose: mixtures and the tilt take another predictor as their base.
# --------------------------------------------------------------------------------------------------


class Predictor:
    """predict() is given inputs and never targets; observe() gets a chunk after it was scored, learn() a part after all
    ranks have scored theirs. What these two do changes only what is predicted next; reset() undoes it.
    """

    invalid = ""  # the condition that it breaks
    learns = False  # has it a use for learn()?
    history = 0  # tokens that it reads before a place, of Inputs.recent
    adaptation = adapters = flat = None  # what learns at test time: Adaptation; Adapters, and their tensor

    def predict(self, inputs, most=None):
        """Log-probabilities (B, K, V) of the token after each of the K places, or of the first `most` of them."""
        raise NotImplementedError

    def nll(self, inputs, targets):
        """Nats (B, K) of targets. May be computed by a shorter way where tests prove it equal."""
        return -self.predict(inputs).gather(-1, targets[..., None]).squeeze(-1)

    def observe(self, chunk):
        """Go on behind a chunk of this rank that was scored."""

    def learn(self, part, stream):
        """Learn from the targets part.ranges of the stream, which are scored; the same on all ranks. The stream is a copy
        that holds what has been scored so far, and zeros for the rest.
        """

    def reset(self):
        """Forget everything but the artifact."""

    def rehearse(self, stream):
        """Compile what learn() will call, on a synthetic text."""


def nats_of(logits, targets):
    """(B, K) from logits (B, K, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


class ModelPredictor(Predictor):
    """The model as it is in the artifact. Only the scored places meet the head, in float32 (bfloat16 logits cost 0.0005
    BPB and more, #1923). With a `width`, rows that go on keep their keys and values (Cache).
    """

    def __init__(self, model, rt, temperature=1.0, width=0):
        self.model, self.rt, self.temperature, self.width = model, rt, temperature, width
        self.cache, self.new, self._forward = None, [], rt.compile(self._run)

    def _run(self, x, docs, take, past, flat):
        """-> (logits (B, K, V), keys and values of x)."""
        past, adapters = past and Past(*past, []), flat if flat is None else self.adapters.of(flat)
        hidden = self.model.hidden(x, docs, adapters, past)
        hidden = hidden.gather(1, take[..., None].expand(*take.shape, hidden.size(-1)))
        return self.model.logits(at_least_float32(hidden), adapters) / self.temperature, past and past.new

    def logits(self, inputs):
        x, past = inputs.ids, None
        if inputs.turn is not None and self.width:
            if inputs.turn == 0:
                self.cache = Cache(self.model, len(x), self.width)
            self.cache.narrow(len(x))
            past = self.cache.past(x)[:-1]
        docs = self.model.docs_outside_graph(x) if past is None else None
        logits, self.new = self._forward(x, docs, inputs.places, past, self.flat)
        return logits

    @torch.no_grad()
    def predict(self, inputs, most=None):
        return F.log_softmax(self.logits(inputs)[:, :most], dim=-1)

    @torch.no_grad()
    def nll(self, inputs, targets):
        return nats_of(self.logits(inputs), targets)

    def observe(self, chunk):
        if self.new:
            self.cache.commit(chunk.inputs.ids, self.new)

    def reset(self):
        self.cache, self.new = None, []


# ---- test-time training --------------------------------------------------------------------------


class Adaptation:
    """Gradient steps on scored text. A step has TTT_BATCH_SEQS sequences over all ranks: the same on any number of them.

    groups: of parameters, as `optimizer` (of torch.optim) takes them; adapters() is for the model's forward, if given.
    """

    def __init__(self, model, groups, optimizer, s, rt, adapters=lambda: None):
        self.model, self.groups, self.make, self.s, self.rt, self.adapters = model, groups, optimizer, s, rt, adapters
        self.params = [param for group in groups for param in group["params"]]
        self.first = [param.detach().clone() for param in self.params]
        self._loss = rt.compile(self._weighted_loss)
        self.reset()

    def reset(self):
        self.put(self.first)
        self.renew()

    def renew(self):
        """Begin with an optimizer that remembers nothing."""
        self.optimizer = self.make([dict(group) for group in self.groups])

    @torch.no_grad()
    def put(self, values):
        for param, value in zip(self.params, values):
            param.copy_(value)

    def _weighted_loss(self, x, y, weight, docs):
        adapters = self.adapters()
        return (weight * nats_of(self.model.logits(at_least_float32(self.model.hidden(x, docs, adapters)), adapters), y)).sum()

    def fit(self, stream, targets, epochs, scale, after=lambda: None):
        """Learn targets (n,) of the stream, in this order, in sequences of EVAL_SEQ_LEN; scale(progress) is that of the
        learning rates; after() is called behind each step.
        """
        s, world, length = self.s, self.rt.world, self.s.eval_seq_len
        rows = np.pad(targets, (0, -len(targets) % length), constant_values=-1).reshape(-1, length)
        batches = [rows[i : i + s.ttt_batch_seqs] for i in range(0, len(rows), s.ttt_batch_seqs)]
        whole = -(-len(batches[0]) // world) * world
        for step in range(epochs * len(batches)):
            some = batches[step % len(batches)]
            some = np.pad(some, ((0, whole - len(some)), (0, 0)), constant_values=-1)
            self._step(stream, torch.from_numpy(some).to(self.rt.device), scale(step / (epochs * len(batches))))
            after()

    def _step(self, stream, targets, scale):
        s, rt, index = self.s, self.rt, targets.clamp(min=0)
        weight = (targets >= 0) * (stream.bytes[index] if s.byte_weighted_ttt else torch.ones_like(index))
        weight = weight / weight.sum().clamp(min=1)
        rows = [z[rt.rank :: rt.world] for z in (stream.tokens[index].long(), stream.tokens[index + 1].long(), weight)]
        most = max(s.micro_batch_tokens // s.eval_seq_len, 1)
        size = max(n for n in range(1, most + 1) if len(rows[0]) % n == 0)  # one shape, one graph
        for x, y, part in zip(*(z.split(size) for z in rows)):
            self._loss(x, y, part, self.model.docs_outside_graph(x)).backward()
        if rt.world > 1:
            grads = rt.sum(torch.cat([param.grad.flatten() for param in self.params]))
            for param, grad in zip(self.params, grads.split([param.numel() for param in self.params])):
                param.grad.copy_(grad.view_as(param))
        if s.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.params, s.ttt_grad_clip)
        for group, given in zip(self.optimizer.param_groups, self.groups):
            group["lr"] = given["lr"] * scale
        self.optimizer.step()
        self.optimizer.zero_grad()


def adaptation_of_weights(model, s, rt):
    """Adaptation of what TTT_FREEZE_* leave, at TTT_LR times TTT_LR_MULT_*. The rest needs no gradient any more."""
    table, special, groups = roles(model), {}, {}
    for block in model.blocks:
        special |= {block.attn.o.weight: s.ttt_lr_mult_proj, block.mlp.down.weight: s.ttt_lr_mult_proj,
                    block.mlp.up.weight: s.ttt_lr_mult_fc}
    frozen = {param for block in model.blocks[: s.ttt_freeze_blocks] for param in block.parameters()}
    for name, param in model.named_parameters():
        fixed = param in frozen and not (s.ttt_train_scales and table[name] == "scalar")
        fixed = fixed or s.ttt_freeze_embed and table[name] in ("embed", "head")
        param.requires_grad_(not fixed)
        if not fixed:
            groups.setdefault(special.get(param, 1.0), []).append(param)
    optimizer = (partial(torch.optim.SGD, momentum=s.ttt_momentum) if s.ttt_optimizer == "sgd" else
                 partial(torch.optim.AdamW, weight_decay=0.0))
    groups = [dict(params=params, lr=s.ttt_lr * multiple) for multiple, params in groups.items()]
    return Adaptation(model, groups, optimizer, s, rt)


def phase_ends(s):
    """Numbers of documents after which the weights learn (PHASED_TTT_*)."""
    n = s.phased_ttt_num_phases
    return {round(s.phased_ttt_prefix_docs * i / n) for i in range(1, n + 1)} if s.phased_ttt_prefix_docs else set()


def cosine(s, progress):
    """From 1 to TTT_MIN_LR."""
    return s.ttt_min_lr + (1 - s.ttt_min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class ScoreFirst(ModelPredictor):
    """Score-first test-time training: a part is scored, then learnt, but for the last. TTT=full: the weights (#549);
    TTT=lora: adapters that stay for the whole stream (#1033). With POLYAK_DECAY their running mean is what scores.
    """

    learns = True

    def __init__(self, model, s, rt, temperature=1.0, width=0):
        super().__init__(model, rt, temperature, width)
        self.s = s
        if s.ttt == "full":
            self.adaptation = adaptation_of_weights(model, s, rt)
        else:
            self.adapters = Adapters(model.requires_grad_(False), s)
            self.flat = self.adapters.start().requires_grad_()
            self.adaptation = Adaptation(
                model, [dict(params=[self.flat], lr=s.ttt_lora_lr)], partial(torch.optim.AdamW, eps=1e-10, betas=(
                    s.ttt_beta1, s.ttt_beta2), weight_decay=s.ttt_wd), s, rt, lambda: self.adapters.of(self.flat))
        self.reset()

    def reset(self):
        super().reset()
        self.adaptation.reset()
        self.raw, self.mean = self.adaptation.first, [value.clone() for value in self.adaptation.first]

    def rehearse(self, stream):
        self.adaptation.fit(stream, np.arange(len(stream.bytes)), 1, lambda _: 0.0)

    def learn(self, part, stream):
        s, adaptation, progress = self.s, self.adaptation, part.number / max(part.total - 1, 1)
        if part.number + 1 == part.total:
            return
        scale = cosine(s, progress) * (1 + (s.adaptive_lr_max - 1) * min(progress / 0.3, 1))
        (a, b), = part.ranges
        if s.polyak_decay:
            adaptation.put(self.raw)
        adaptation.fit(stream, np.arange(a, b), s.ttt_epochs, lambda _: scale, self._average)
        if s.polyak_decay:
            self.raw = [param.detach().clone() for param in adaptation.params]
            adaptation.put(self.mean)

    @torch.no_grad()
    def _average(self):
        for mean, param in zip(self.mean, self.adaptation.params if self.s.polyak_decay else ()):
            mean.lerp_(param, 1 - self.s.polyak_decay)


class AdapterSet(NamedTuple):
    """Adapters as the forward takes them."""

    slots: list[Slot]  # of each visit
    head: Callable | None


def lora(a, b, scale, x):
    """scale B A x for A (R, r, in), B (R, out, r), x (B, T, in); R is B, or 1 for all rows."""
    return (x @ a.mT * scale) @ b.mT


class Adapters:
    """Low-rank adapters (LoRA, arXiv 2106.09685) of each visit of the plan, in a flat tensor with a row for each text."""

    def __init__(self, model, s):
        self.rank, self.scale = s.ttt_lora_rank, (s.ttt_lora_alpha or s.ttt_lora_rank) / s.ttt_lora_rank
        self.seed, self.visits, self.scaled = s.seed, len(model.plan), s.ttt_lora_scaled
        self.weight, self.dtype = model.embed.weight, model.dtype
        dim, narrow = s.model_dim, s.num_kv_heads * s.head_dim
        outputs = {"q": dim, "k": narrow, "v": narrow, "o": dim, "attn": dim, "mlp": dim, "head": s.vocab_size}
        self.shapes = [(visit, what, dim, outputs[what]) for visit in (*range(self.visits), None)
                       for what in s.ttt_lora_targets if (what == "head") == (visit is None)]  # None: behind all visits
        self.sizes = [size for _, _, inputs, outputs in self.shapes for size in (self.rank * inputs, outputs * self.rank)]
        self.is_a = torch.cat([torch.full((size,), i % 2 == 0) for i, size in enumerate(self.sizes)]).to(self.weight.device)

    def start(self, *draw):
        """(1, P): A uniform within 1 / sqrt(inputs), B zero, so that nothing is added at first. Other numbers `draw` are
        another draw; each is the same on every device.
        """
        seed = int(np.random.SeedSequence((self.seed, *draw)).generate_state(1)[0]) if draw else self.seed
        generator, parts = torch.Generator().manual_seed(seed), []
        for _, _, inputs, outputs in self.shapes:
            a = (2 * torch.rand(self.rank * inputs, generator=generator) - 1) * inputs**-0.5
            parts += [a, torch.zeros(outputs * self.rank)]
        return torch.cat(parts)[None].to(self.weight)

    def of(self, flat):
        """AdapterSet of rows (R, P), in the model's dtype, but for the head in float32."""
        n = 2 * sum(visit is not None for visit, *_ in self.shapes)
        body, head = flat.split((sum(self.sizes[:n]), sum(self.sizes[n:])), 1)
        parts = [*body.to(self.dtype).split(self.sizes[:n], 1), *(head.split(self.sizes[n:], 1) if self.sizes[n:] else ())]
        maps = [partial(lora, a.view(-1, self.rank, inputs), b.view(-1, outputs, self.rank), self.scale)
                for a, b, (_, _, inputs, outputs) in zip(parts[::2], parts[1::2], self.shapes)]
        slots = [{"scaled": self.scaled} for _ in range(self.visits)]
        for (visit, what, *_), each in zip(self.shapes, maps):
            if visit is not None:
                slots[visit][what] = each
        return AdapterSet([Slot(**slot) for slot in slots], maps[-1] if self.shapes[-1][0] is None else None)


class DocumentAdapters(ModelPredictor):
    """Adapters of each document on its own (#77, #1530): scored a chunk at a time, and after each one step of AdamW on
    it; documents side by side never meet. With kept keys (EVAL_CONTEXT=cache) each token is forwarded once and its
    gradient ends where its chunk began; with windows, all of the window is forwarded again and again.

    TTT_WARM_START_A: A of later documents begins at the mean of those with which the group before ended, or with
    TTT_LORA_A=own where A of the document at the same place of it did (#1767: in the same row of a rank's batch, which
    is the same where all ranks are equally fast). PHASED_TTT_PREFIX_DOCS: at the end of each phase the weights learn
    from all documents so far (#1610), and every own A is drawn anew.
    """

    def __init__(self, model, s, rt, temperature=1.0):
        super().__init__(model, rt, temperature, s.eval_seq_len if s.eval_context == "cache" else 0)
        self.s, self.phases = s, s.phased_ttt_prefix_docs > 0
        self.learns = s.ttt_warm_start_a or self.phases
        self.adapters = Adapters(model, s)
        self.adaptation = adaptation_of_weights(model, s, rt) if self.phases else None
        self.reset()

    def reset(self):
        super().reset()
        self.start, self.read = self.adapters.start(), []
        self.ended = torch.zeros(self.start.size(1) + 1, dtype=torch.float64, device=self.start.device)  # sum, count
        self.batch, self.draw, self.places = 0, 0, {}  # of a group; of TTT_LORA_A=own: number, {place: (P,) so far}
        if self.phases:
            self.adaptation.reset()
        self.model.requires_grad_(False)

    def _begin(self, rows):
        """(rows, P) of the next documents of this rank."""
        s, rt = self.s, self.rt
        if s.ttt_lora_a == "shared":
            return self.start.expand(rows, -1).clone()
        places = [(self.batch * s.ttt_batch_size + row) * rt.world + rt.rank for row in range(rows)]
        new = [place for place in places if place not in self.places]
        kept = self.places | {place: self.adapters.start(self.draw, place)[0] for place in new}
        weight = torch.stack([kept[place] for place in places]) * self.adapters.is_a
        if s.ttt_warm_start_a:
            self.places |= dict(zip(places, weight))  # views, which go on learning
        return weight

    def rehearse(self, stream):
        if self.phases:
            self._train(stream, np.arange(len(stream.bytes)), 1)

    def _train(self, stream, targets, epochs):
        for param in self.adaptation.params:
            param.requires_grad_(True)
        self.adaptation.renew()
        self.adaptation.fit(stream, targets, epochs, partial(cosine, self.s))
        self.model.requires_grad_(False)

    @torch.enable_grad()
    def logits(self, inputs):
        rows = len(inputs.ids)
        if inputs.turn == 0:
            weight = self._begin(rows)
            self.state = [weight, torch.zeros_like(weight), torch.zeros_like(weight)]
        self.state = [z[:rows] for z in self.state]
        self.flat = self.state[0].detach().requires_grad_()
        self.said = super().logits(inputs)
        return self.said.detach()

    def observe(self, chunk):
        s, n, live = self.s, chunk.continuing, chunk.index >= 0
        super().observe(chunk)
        self.batch += chunk.inputs.turn == 0
        if n:
            nll = (nats_of(self.said, chunk.targets) * live).sum(1) / live.sum(1).clamp(min=1)
            grad, = torch.autograd.grad(nll[:n].sum(), self.flat)
            weight, mean, square = (z[:n] for z in self.state)
            betas, step = (s.ttt_beta1, s.ttt_beta2), chunk.inputs.turn + 1
            adamw(weight, grad[:n], mean, square, step, s.ttt_lora_lr, s.ttt_wd, betas, 1e-10)
        if s.ttt_warm_start_a and s.ttt_lora_a == "shared":
            done = live.any(1).double()
            done[:n] = 0
            self.ended += torch.cat((done @ self.state[0].double(), done.sum()[None]))

    def learn(self, part, stream):
        s = self.s
        if s.ttt_warm_start_a and (count := self.rt.sum(self.ended)[-1]) > 0:
            self.start = torch.where(self.adapters.is_a, (self.ended[:-1] / count).to(self.start), self.start)
        self.ended.zero_()
        self.read.append(part.ranges)
        self.batch, self.draw = 0, self.draw + (not s.ttt_warm_start_a)
        if self.phases and sum(map(len, self.read)) in phase_ends(s):
            self.places, self.draw = {}, self.draw + 1
            self._train(stream, np.concatenate([np.arange(a, b) for a, b in np.concatenate(self.read)]), s.ttt_epochs)


def log_adaptation(run, model, predictor):
    """What test-time training may change, and what it may not."""
    while isinstance(predictor, WrappingPredictor):
        predictor = predictor.base
    if predictor.adapters:
        run.log("ttt_adapters", parameters=sum(predictor.adapters.sizes), beside=run.s.ttt_lora_targets,
                rank=run.s.ttt_lora_rank, of_each="document" if run.s.ttt == "lora_docs" else "stream")
    if predictor.adaptation and predictor.adaptation.params[0] is not predictor.flat:
        log_trainable(run, model, predictor.adaptation)


def log_trainable(run, model, adaptation):
    learns = set(adaptation.params)
    blocks = [sum(p.numel() for p in block.parameters() if p in learns) for block in model.blocks]
    total, count = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in learns)
    run.log("ttt_trainable", parameters=count, frozen=total - count, by_block=blocks, outside_blocks=count - sum(blocks))


# ---- n-grams of the scored text ------------------------------------------------------------------


class HashTable:
    """Open hash table on the device: slots of int64 keys >= 0, `most` of which have room. Vectorised, with no order that
    matters but which of several new keys gets a slot first, and nothing that is computed from slots depends on that.
    """

    def __init__(self, most, device):
        self.bits = max(int(1.5 * most).bit_length(), 8)
        self.keys = torch.zeros(1 << self.bits, dtype=torch.int64, device=device)  # key + 1; 0: free

    def __len__(self):
        return len(self.keys)

    def probe(self, keys, add=False):
        """Slots of keys (n,); -1 where one is not there, unless `add` puts it there."""
        found = at = keys * -7046029254386353131 >> (64 - self.bits) & (1 << self.bits) - 1
        key, place = keys + 1, None  # of the keys that are still looked for
        while len(at):
            there = self.keys.index_select(0, at)
            if add and len(free := (there == 0).nonzero().squeeze(1)):
                some = at.index_select(0, free)
                self.keys.index_copy_(0, some, key.index_select(0, free))  # of several that want the slot one gets it
                there.index_copy_(0, free, self.keys.index_select(0, some))
            miss = (there != key).nonzero().squeeze(1)
            place, key = miss if place is None else place.index_select(0, miss), key.index_select(0, miss)
            at = torch.where(there.index_select(0, miss) == 0, -1, (at.index_select(0, miss) + 1) % len(self.keys))
            found.index_copy_(0, place, at)
            if not add:
                on = (at >= 0).nonzero().squeeze(1)
                at, key, place = (z.index_select(0, on) for z in (at, key, place))
        return found


class NgramCounts:
    """How often each n-gram of up to `order` tokens occurred, exactly: a trie whose nodes have (parent, token) as key, so
    no two n-grams share a count; `most` n-grams have room.

    The node of a single token is its number; longer ones follow, vocab + slot; -1 is none, the last is the root. Texts
    that are counted together are kept apart by the token `vocab`.
    """

    def __init__(self, vocab, order, most, device):
        self.vocab, self.order, self.table = vocab, order, HashTable(most, device)
        self.count = torch.zeros(vocab + 1 + len(self.table) + 1, dtype=torch.int32, device=device)
        self.fan = torch.zeros(len(self.count), dtype=torch.int64, device=device)  # tokens after it + 2^32 different ones

    def reset(self):
        self.table.keys.zero_(), self.count.zero_(), self.fan.zero_()

    @property
    def root(self):
        return len(self.count) - 1

    def _children(self, nodes, tokens, add=False):
        slots = self.table.probe(nodes * (self.vocab + 1) + tokens, add)
        return torch.where(slots < 0, -1, slots + self.vocab + 1)

    def find(self, nodes, tokens):
        """Nodes one token longer, of the same shape; -1 where there is none."""
        found, some = torch.full_like(nodes, -1), ((nodes >= 0) & (tokens >= 0)).flatten().nonzero().squeeze(1)
        pairs = (z.reshape(-1).index_select(0, some) for z in (nodes, tokens))
        found.view(-1).index_copy_(0, some, self._children(*pairs))
        return found

    def walk(self, run):
        """[nodes (B, L) of the last 1, 2, ..., order tokens at each place of run (B, L)]."""
        nodes = [run]
        while len(nodes) < self.order:
            nodes.append(self.find(F.pad(nodes[-1][:, :-1], (1, 0), value=-1), run))
        return nodes

    def add(self, run, new):
        """Count the n-grams that end at the places `new` (n,) of run (L,), the last token of which keeps texts apart."""
        fresh = torch.zeros_like(run, dtype=torch.bool).index_fill_(0, new, True)
        ends = (run < self.vocab).nonzero().squeeze(1)  # where the n-grams so far end
        nodes = run.index_select(0, ends)
        parents = torch.full_like(nodes, self.root)
        for n in range(self.order):
            if n:  # one token longer, but for what would span two texts
                tokens = run.index_select(0, ends + 1)
                inside = (tokens < self.vocab).nonzero().squeeze(1)
                parents, tokens, ends = (z.index_select(0, inside) for z in (nodes, tokens, ends + 1))
                nodes = self._children(parents, tokens, add=True)
            now = fresh.index_select(0, ends).nonzero().squeeze(1)
            self._count(nodes.index_select(0, now), parents.index_select(0, now))

    def _count(self, nodes, parents):
        """One more of each node, the last token of which follows on its parent."""
        one, step = torch.ones(len(nodes), dtype=torch.int32, device=nodes.device), torch.ones_like(nodes)
        first = (self.count.index_select(0, nodes) == 0).nonzero().squeeze(1)
        some = nodes.index_select(0, first)
        mark = torch.arange(1, len(first) + 1, dtype=torch.int32, device=nodes.device)
        self.count.index_copy_(0, some, mark)  # of several equal ones, one stays
        once = (self.count.index_select(0, some) == mark).nonzero().squeeze(1)
        one[first[once]] -= mark[once]
        step[first[once]] += 1 << 32
        self.count.index_add_(0, nodes, one)
        self.fan.index_add_(0, parents, step)

    def probability(self, contexts, grams):
        """[p (...)] of orders 1, 2, ...: nodes of the contexts of 0, 1, ... tokens, and those of them with the token that
        is asked for. Each order takes DISCOUNT off its counts and gives that mass to the order below, down to 1 / V
        (interpolated absolute discounting), so that every one sums to 1 over the tokens.
        """
        p, found = torch.full(grams[0].shape, 1 / self.vocab, dtype=torch.float64, device=grams[0].device), []
        for context, gram in zip(contexts, grams):
            fan = torch.where(context < 0, 0, self.fan[context])
            total, kinds = (fan & (1 << 32) - 1).double(), (fan >> 32).double()
            count = torch.where(gram < 0, 0, self.count[gram]).double()
            p = torch.where(total > 0, ((count - DISCOUNT).clamp(min=0) + DISCOUNT * kinds * p) / total.clamp(min=1), p)
            found.append(p)
        return found


DISCOUNT = 0.9  # of 0.5, 0.6, ..., 0.9 and Witten-Bell the best for English of 1,024 pieces
ORDERS = {"unigram": 1, "bigram": 2, "trigram": 3}  # of MIXER_EXPERTS; backoff has NGRAM_ORDER


class WrappingPredictor(Predictor):
    """A predictor that changes what another one says."""

    learns = True

    def __init__(self, base, s, rt):
        self.base, self.s, self.rt, self.invalid = base, s, rt, base.invalid

    def observe(self, chunk):
        self.base.observe(chunk)

    def learn(self, part, stream):
        self.base.learn(part, stream)

    def reset(self):
        self.base.reset()

    def rehearse(self, stream):
        self.base.rehearse(stream)


def scored_text(part, stream, back, s):
    """(the scored text of a part (L,), places of it that are new): each range behind up to `back` tokens before its first
    target; but documents that are read in another order (TTT=lora_docs) alone. They are kept apart by the token VOCAB_SIZE.
    """
    pieces, new, at = [], [], 0
    edge = stream.tokens.new_full((1,), s.vocab_size)
    for a, b in part.ranges.tolist():
        start = a if s.ttt == "lora_docs" else max(a + 1 - back, 0)
        pieces += [stream.tokens[start : b + 1], edge]
        new.append(torch.arange(at + a + 1 - start, at + b + 1 - start, device=edge.device))
        at += b + 2 - start
    return torch.cat(pieces).long(), torch.cat(new)


def ngram_weight(s, said):
    """Weight of the n-grams (B, K): it rises with the model's entropy (#1033)."""
    entropy = -(said.exp() * said).sum(-1).double()
    return s.alpha_base + s.alpha_range * torch.sigmoid(2 * (entropy - s.alpha_center))


class NgramMixture(WrappingPredictor):
    """The model beside n-grams that are counted in the scored text, each a distribution. MIXER=backoff: the longest order,
    at a weight that rises with the model's entropy (#1033, made normal). MIXER=hedge: MIXER_EXPERTS by their record: at the
    end of a part each log weight falls by MIXER_ETA times its expert's mean nats, over all ranks (#967, made normal).

    #967's expert "entropy" says exp(-H) of every token, H the model's entropy, and so far more than 1 in all.
    """

    def __init__(self, base, s, rt, targets):
        super().__init__(base, s, rt)
        self.names = ("backoff",) if s.mixer == "backoff" else s.mixer_experts
        order = max((ORDERS.get(name, s.ngram_order) for name in self.names if name != "entropy"), default=1)
        self.counts = NgramCounts(s.vocab_size, order, targets * (order - 1), rt.device)
        self.history = max(order - 2, base.history)
        if "entropy" in self.names:
            self.invalid = "C2 normalisation: MIXER_EXPERTS=entropy is no distribution (#967)"
        self.reset()

    def reset(self):
        super().reset()
        self.counts.reset()
        self.seen, self.weights = 0, torch.zeros(1 + len(self.names), dtype=torch.float64, device=self.rt.device)
        self.weights[0] = 2.0  # the model's
        self.nats = torch.zeros(len(self.weights) + 1, dtype=torch.float64, device=self.rt.device)  # and how many targets

    def _mix(self, said, own, contexts, grams):
        """(log-probability (B, K, ...) of tokens of which the model says `own`, that of each expert): `said` is all that the
        model says (B, K, V).
        """
        orders, more = self.counts.probability(contexts, grams), (1,) * (own.dim() - 2)
        entropy = (said.exp() * said).sum(-1).double().view(*said.shape[:2], *more)
        experts = torch.stack([own.double(), *(entropy.expand_as(own) if name == "entropy" else orders[
            ORDERS.get(name, self.s.ngram_order) - 1].log() for name in self.names)])
        if self.s.mixer == "hedge":
            weights = self.weights.log_softmax(0).view(-1, 1, 1, *more)
        else:
            alpha = ngram_weight(self.s, said).view(*said.shape[:2], *more)
            weights = torch.stack((torch.log1p(-alpha), alpha.log()))
        return (experts + weights).logsumexp(0), experts

    def _contexts(self, nodes, h, k):
        root = torch.full_like(nodes[0][:, h : h + k], self.counts.root)
        return [root, *(node[:, h : h + k] for node in nodes[: self.counts.order - 1])]

    @torch.no_grad()
    def predict(self, inputs, most=None):
        said = self.base.predict(inputs, most)
        if self.seen < self.s.mixer_min_tokens:
            return said
        contexts = self._contexts(self.counts.walk(inputs.recent), inputs.recent.size(1) - inputs.places.size(1), said.size(1))
        everyone = torch.arange(said.size(-1), device=said.device).expand(said.shape)
        contexts = [node[..., None].expand(said.shape) for node in contexts]
        grams = [everyone, *(self.counts.find(node, everyone) for node in contexts[1:])]
        return self._mix(said, said, contexts, grams)[0]

    @torch.no_grad()
    def nll(self, inputs, targets):
        said, k = self.base.predict(inputs), inputs.places.size(1)
        own, self.experts = said.gather(-1, targets[..., None]).squeeze(-1), None
        if self.seen < self.s.mixer_min_tokens:
            return -own
        h = inputs.recent.size(1) - k
        nodes = self.counts.walk(torch.cat((inputs.recent[:, : h + 1], targets), 1))
        mixed, self.experts = self._mix(said, own, self._contexts(nodes, h, k), [node[:, h + 1 :] for node in nodes])
        return -mixed

    def observe(self, chunk):
        if self.experts is not None:
            live = chunk.index >= 0
            self.nats[:-1] -= (self.experts * live).flatten(1).sum(1)
            self.nats[-1] += live.sum()
        super().observe(chunk)

    def learn(self, part, stream):
        super().learn(part, stream)
        nats = self.rt.sum(self.nats)
        if self.s.mixer == "hedge" and nats[-1] > 0:
            self.weights -= self.s.mixer_eta * nats[:-1] / nats[-1]
        nats.zero_()
        self.counts.add(*scored_text(part, stream, self.counts.order - 1, self.s))
        self.seen += int(np.diff(part.ranges).sum())


# ---- token-only tilt -----------------------------------------------------------------------------


class Followers:
    """What followed on each context, a key of 62 bits: how often any token did, and which one most often."""

    PACK = 17  # bits below the count in `best`: more than a token has

    def __init__(self, most, device):
        self.used = 0  # an upper bound of the keys in the table: that of contexts and of contexts with a token
        self._make(HashTable(2 * most, device))

    def _make(self, table):
        self.table, self.count = table, torch.zeros(len(table), dtype=torch.int64, device=table.keys.device)
        self.best = torch.zeros_like(self.count)  # of a context: the most that a token followed, << PACK, + that token

    def reset(self):
        self.table.keys.zero_(), self.count.zero_(), self.best.zero_()
        self.used = 0

    def _pairs(self, contexts, tokens):
        return mix_bits(contexts + (tokens + 1) * -4417276706812531889) | 1 << 62

    def _make_room(self, more):
        """Double the table until so many keys more fit."""
        self.used += more
        while 1.5 * self.used > len(self.table):
            old, count, best = self.table, self.count, self.best
            kept = old.keys.nonzero().squeeze(1)
            self._make(HashTable(len(old), old.keys.device))
            slots = self.table.probe(old.keys[kept] - 1, add=True)
            self.count[slots], self.best[slots] = count[kept], best[kept]

    def add(self, contexts, tokens, elsewhere=0):
        """Tokens (n,) followed on contexts (n,), and `elsewhere` so many times on the same ones."""
        self._make_room(2 * len(contexts))
        slots, pairs = (self.table.probe(keys, add=True) for keys in (contexts, self._pairs(contexts, tokens)))
        one = torch.ones_like(slots)
        self.count.index_add_(0, slots, one).index_add_(0, pairs, one)
        self.best.scatter_reduce_(0, slots, (self.count[pairs] + elsewhere << self.PACK) + tokens, "amax")

    def times(self, contexts, tokens):
        """How often each token followed on its context."""
        slots = self.table.probe(self._pairs(contexts, tokens))
        return torch.where(slots < 0, 0, self.count[slots])

    def look(self, contexts):
        """(how often anything followed, `best`) of contexts, zeros where nothing did."""
        slots = self.table.probe(contexts)
        return (torch.where(slots < 0, 0, values[slots]) for values in (self.count, self.best))


def mix_bits(keys):
    """62 bits that look random, of int64 keys."""
    return (keys ^ keys >> 29) * -4658895280553007687 >> 2 & (1 << 62) - 1


class Tilt(WrappingPredictor):
    """Token-only tilt (#1145, #1514): the token that followed most often on the last TOKEN_ORDER - 1, if it did in at least
    TOKEN_THRESHOLD of the cases, is the hint, and p'(v) = p(v) e^(TOKEN_BOOST [v = hint]) / Z with Z = 1 + p(hint)
    (e^TOKEN_BOOST - 1). Whatever the hint, that sums to 1, so contexts may go by a hash.

    It knows the parts before, and of a row that goes on (a document, kept keys) the chunks of its own that were scored.
    """

    def __init__(self, base, s, rt, targets):
        super().__init__(base, s, rt)
        self.context, self.history = s.token_order - 1, max(s.token_order - 2, base.history)
        self.text, self.row = Followers(targets, rt.device), Followers(256, rt.device)
        powers = [pow(6364136223846793005, i, 2**64) for i in range(self.context)]
        self.powers = torch.tensor(powers, dtype=torch.uint64).view(torch.int64).to(rt.device)

    def reset(self):
        super().reset()
        self.text.reset(), self.row.reset()

    def _hashes(self, run):
        """Key of the last `context` tokens at each place of run (..., L) from the context-th on."""
        return mix_bits(((run.unfold(-1, self.context, 1) + 1) * self.powers).sum(-1))

    def _contexts(self, inputs):
        """(keys (B, K) of what precedes each place, the same with the row's number, is it all there?)."""
        run = inputs.recent[:, inputs.recent.size(1) - inputs.places.size(1) - self.context + 1 :]
        keys, number = self._hashes(run), torch.arange(1, 1 + len(run), device=run.device)[:, None]
        return keys, mix_bits(keys + number * -7046029254386353131), (run.unfold(-1, self.context, 1) >= 0).all(-1)

    def _hints(self, inputs):
        """(B, K), -1 where there is none."""
        keys, own, known = self._contexts(inputs)
        total, best = self.text.look(keys.flatten())
        if inputs.turn:  # what the row has added to a context's best token is in its own best
            here, its_best = self.row.look(own.flatten())
            total, best = total + here, torch.maximum(best, its_best)
        share = (best >> Followers.PACK).double() / total.clamp(min=1)
        sure = known.flatten() & (total > 0) & (share >= self.s.token_threshold)
        return torch.where(sure, best & (1 << Followers.PACK) - 1, -1).view_as(keys)

    @torch.no_grad()
    def predict(self, inputs, most=None):
        said, hints = self.base.predict(inputs, most), self._hints(inputs)[:, :most, None]
        boost = (hints >= 0) * self.s.token_boost
        hints = hints.clamp(min=0)
        share = said.gather(-1, hints).exp() * torch.expm1(boost)
        return (said - torch.log1p(share)).scatter_add(-1, hints, boost.to(said.dtype))

    def observe(self, chunk):
        super().observe(chunk)
        step = chunk.inputs.turn
        if step == 0:
            self.row.reset()
        if step is not None:
            keys, own, known = self._contexts(chunk.inputs)
            keys, own, tokens = (z[known & (chunk.index >= 0)] for z in (keys, own, chunk.targets))
            self.row.add(own, tokens, self.text.times(keys, tokens))

    def learn(self, part, stream):
        super().learn(part, stream)
        self.row.reset()
        run, new = scored_text(part, stream, self.context, self.s)
        new = new[new >= self.context]
        if len(new):
            self.text.add(self._hashes(run)[new - self.context], run[new])


# ---- composition ---------------------------------------------------------------------------------


def make_predictor(model, s, rt, targets, temperature=1.0):
    """What the settings say is to be scored, over a stream of so many targets."""
    width = s.eval_seq_len if s.eval_context == "cache" else 0
    if s.ttt == "lora_docs":
        predictor = DocumentAdapters(model, s, rt, temperature)
    elif s.ttt in ("full", "lora"):
        predictor = ScoreFirst(model, s, rt, temperature, width)
    else:
        predictor = ModelPredictor(model, rt, temperature, width)
    predictor = Tilt(predictor, s, rt, targets) if s.token_boost else predictor
    if s.mixer != "off":
        predictor = HashedMixture(predictor, s, rt) if s.mixer == "hashed" else NgramMixture(predictor, s, rt, targets)
    return predictor


# --------------------------------------------------------------------------------------------------
# 13 Invalid originals: techniques of the reference systems whose score is not valid. No valid run comes here.
# --------------------------------------------------------------------------------------------------


def train_on_validation(run, model, stream):
    """TTT=prequant (#1539) and TTT=before (#518): steps on the whole validation text before any of it is scored. What is
    reported afterwards is a training loss, and no score; it is here so that this can be measured.
    """
    s, rt = run.s, run.rt
    run.validity.need(False, f"C3 order: TTT={s.ttt} trains on the validation text before it is scored")
    with run.clock.phase("eval"), run.validity.report(), torch.enable_grad():
        adaptation = adaptation_of_weights(model, s, rt)
        log_trainable(run, model, adaptation)
        adaptation.fit(stream, np.arange(len(stream.bytes)), s.ttt_epochs, partial(cosine, s))
    model.requires_grad_(True)


class HashedMixture(WrappingPredictor):
    """The mixer of #1033 as published: the share of the target among what a context's bucket saw, both found by hashes, of
    the longest order whose context's bucket has MIN_COUNT; no sum is ever 1, and with full buckets each is nearly V.
    """

    PRIMES = 36313, 27191, 51647, 81929, 131071, 174763, 233017

    def __init__(self, base, s, rt):
        super().__init__(base, s, rt)
        self.invalid = "C2 normalisation: MIXER=hashed looks the target up in a hash of itself (#1033)"
        self.history = max(s.ngram_order - 2, base.history)
        self.counts = torch.zeros(2, s.ngram_order + 1, s.ngram_buckets, dtype=torch.int32, device=rt.device)
        self.single = torch.zeros(s.vocab_size + 1, dtype=torch.int64, device=rt.device)
        self.reset()

    def reset(self):
        super().reset()
        self.counts.zero_(), self.single.zero_()
        self.seen = 0

    def _context(self, run, n):
        """Hash of the n - 1 tokens that end at each place of run (..., L), from the (n - 1)-th on."""
        spans = run.unfold(-1, n - 1, 1) * torch.tensor([self.PRIMES[i % 7] for i in range(n - 1)], device=run.device)
        return reduce(torch.bitwise_xor, spans.unbind(-1))

    def _full(self, context, tokens, n):
        return (context ^ tokens * self.PRIMES[(n - 1) % 7]) % self.s.ngram_buckets

    def _share(self, run, k, tokens):
        """"p" (B, K, ...) of tokens, each at its own key."""
        vocab, left, p = self.s.vocab_size, torch.ones_like(tokens, dtype=torch.bool), None
        p = (self.single[tokens] + 0.5) / (self.seen + 0.5 * vocab)
        for n in range(self.s.ngram_order, 1, -1):
            some = run[:, run.size(1) - k - n + 2 :]
            context = self._context(some, n).view(*some.shape[:1], k, *(1,) * (tokens.dim() - 2))
            there = (some.unfold(-1, n - 1, 1) >= 0).all(-1).view(context.shape)
            before = self.counts[0, n][context % self.s.ngram_buckets]
            use = left & there & (before >= self.s.min_count)
            both = torch.minimum(self.counts[1, n][self._full(context, tokens, n)], before)
            p, left = torch.where(use, both / before.clamp(min=1).double(), p.double()), left & ~use
        return p

    def _mixed(self, inputs, said, own, tokens):
        alpha, k = ngram_weight(self.s, said).view(*said.shape[:2], *(1,) * (own.dim() - 2)), inputs.places.size(1)
        p = self._share(inputs.recent[:, : inputs.recent.size(1) - k + own.size(1)], own.size(1), tokens)
        return torch.log(((1 - alpha) * own.double().exp() + alpha * p).clamp(min=1e-12))

    @torch.no_grad()
    def predict(self, inputs, most=None):
        said = self.base.predict(inputs, most)
        everyone = torch.arange(said.size(-1), device=said.device).expand(said.shape)
        return said if self.seen < self.s.mixer_min_tokens else self._mixed(inputs, said, said, everyone)

    @torch.no_grad()
    def nll(self, inputs, targets):
        said = self.base.predict(inputs)
        own = said.gather(-1, targets[..., None]).squeeze(-1)
        return -(own if self.seen < self.s.mixer_min_tokens else self._mixed(inputs, said, own, targets))

    def learn(self, part, stream):
        super().learn(part, stream)
        run, new = scored_text(part, stream, self.s.ngram_order - 1, self.s)
        one = torch.ones_like(new, dtype=torch.int32)
        self.single.index_add_(0, run[new], one.long())
        for n in range(2, self.s.ngram_order + 1):
            at = new[new >= n - 1]
            if not len(at):
                break
            context = self._context(run, n)[at - n + 1]
            self.counts[0, n].index_add_(0, context % self.s.ngram_buckets, one[: len(at)])
            self.counts[1, n].index_add_(0, self._full(context, run[at], n), one[: len(at)])
        self.seen += len(new)


# --------------------------------------------------------------------------------------------------
# 14 Kernels: each fused kernel beside its reference, same signature
# --------------------------------------------------------------------------------------------------


def attend_sdpa(q, k, v, docs=None):
    """Causal attention, q (B, T, H, C), k and v (B, T, K, C) -> (B, T, H, C); query head j reads kv head j * K // H.

    docs with a mask confines it to documents.
    """
    q, k, v, mask = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), docs.mask if docs is not None else None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                          enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def attend_fa3(q, k, v, docs=None, *, kernel):
    """The same by FlashAttention-3 (Hopper); `kernel` is flash_attn_interface.flash_attn_func."""
    out = kernel(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def attend_varlen(q, k, v, docs, *, kernel, longest):
    """The same within documents of at most `longest` tokens; `kernel` takes (q, k, v, cu, longest) of (B * T, ., C)."""
    out = kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), docs.cu, longest)
    return (out[0] if isinstance(out, tuple) else out).view_as(q)


def attend_reference(q, k, v, docs=None):
    """The same, written out."""
    causal = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).tril()
    return attend_seen(q, k, v, causal if docs is None or docs.mask is None else docs.mask)


def attend_seen(q, k, v, seen):
    """The same, of any queries q (B, R, H, C) to the keys that `seen` (..., R, S) says."""
    k, v = (z.repeat_interleave(q.size(2) // z.size(2), dim=2) for z in (k, v))
    scores = torch.einsum("brhc,bshc->bhrs", q, k) * q.size(-1) ** -0.5
    return torch.einsum("bhrs,bshc->brhc", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def attend_past(q, k, v, past):
    """The same, confined to what past.seen says, of new positions q, k, v to kept keys and each other."""
    keys, values = (new if old is None else torch.cat((old, new), 1)
                    for old, new in zip(past.kept[len(past.new)], (k, v)))
    past.new.append((k, v))
    scores = torch.einsum("btkgc,bskc->bkgts", q.unflatten(2, (k.size(2), -1)), keys) * q.size(-1) ** -0.5
    share = scores.masked_fill(~past.seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgts,bskc->btkgc", share, values).flatten(2, 3)


def _set_sdpa(*names):
    """Let PyTorch's attention use only these CUDA backends; the slow math one is never a silent last resort."""
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(name in names)


MASKED_ROW = 16384  # longest packed row for which the square of its length is still a mask


def _why_not(name, s, rt):
    """Why an attention kernel cannot be used here, or None."""
    if name == "fa3":
        if s.kernels == "off":
            return "KERNELS=off"
        if rt.device.type != "cuda" or torch.cuda.get_device_capability(rt.device)[0] != 9:
            return "needs a Hopper GPU"
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "package flash_attn_interface is not installed"
    if name in ("cudnn", "flash") and rt.device.type == "cpu":
        return "needs a GPU"
    if s.doc_mask == "attention":
        if name == "cudnn":
            return "takes no document lengths"
        if name == "flash" and importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        if name == "math" and s.loader == "packed" and s.longest_row > MASKED_ROW:
            return f"rows of LOADER=packed have {s.longest_row} tokens, masks at most {MASKED_ROW} (MICRO_BATCH_TOKENS)"
    if name in ("fa3", "cudnn", "flash") and rt.dtype != torch.bfloat16:
        return "needs bfloat16"
    if name == "cudnn" and (torch.backends.cudnn.version() or 0) < 91501:
        return f"cuDNN {torch.backends.cudnn.version()} is older than 9.15.1, whose attention gave wrong results"
    return None


def pick_attention(s, rt):
    """The attention function of this run: the first of FA3, cuDNN, flash, math that agrees with the reference.

    What was passed over, and why, is said in one line; with ATTENTION=name or KERNELS=require a fallback is an error.
    """
    wanted = ("fa3", "cudnn", "flash", "math") if s.attention == "auto" else (s.attention,)
    passed = []
    for name in wanted:
        reason = _why_not(name, s, rt)
        if reason is None:
            if rt.device.type == "cuda":
                _set_sdpa(*{"fa3": (), "math": ("math", "mem_efficient")}.get(name, (name,)))
            attend, reason = _attention_function(name, s)
            reason = reason or _attention_error(attend, s, rt)
            if reason is None:
                rt.choose("attention", name, "; ".join(passed) or f"ATTENTION={s.attention}")
                break
        passed.append(f"{name}: {reason}")
    else:
        raise BadInput(f"ATTENTION={s.attention} cannot be used: {'; '.join(passed)}")
    if s.kernels == "require" and passed:
        raise BadInput(f"KERNELS=require, but attention would fall back to {name} ({'; '.join(passed)}); "
                       f"KERNELS=auto allows that, ATTENTION={name} asks for it")
    return attend


def _attention_function(name, s):
    """(the function, None) or (None, why it cannot be imported). `varlen` says that it wants Docs with lengths."""
    masked = s.doc_mask == "attention"
    if name == "fa3":
        try:
            import flash_attn_interface as fa3
        except (ImportError, OSError) as error:
            return None, f"flash_attn_interface cannot be imported ({str(error).partition(chr(10))[0][:80]})"
        if not masked:
            return partial(attend_fa3, kernel=fa3.flash_attn_func), None

        def kernel(q, k, v, cu, longest):
            return fa3.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    elif name == "flash" and masked:
        from torch.nn.attention.varlen import varlen_attn
        takes = inspect.signature(varlen_attn).parameters
        options = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}  # its first name
        options |= {"enable_gqa": True} if "enable_gqa" in takes else {}

        def kernel(q, k, v, cu, longest):
            return varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    else:
        return attend_sdpa, None
    attend = partial(attend_varlen, kernel=kernel, longest=s.longest_sequence)
    attend.varlen = True
    return attend, None


def _attention_error(attend, s, rt):
    """What is wrong with an attention kernel at the lengths of training and evaluation, or None."""
    lengths = {128, s.eval_seq_len, s.longest_row, *(length for _, length, _ in s.stages)}
    for length in sorted(lengths):
        if error := _attention_error_at(attend, s, rt, length):
            return f"{error} at {length} tokens"
    return None


def _attention_error_at(attend, s, rt, length):
    """Run the kernel forward and backward on the run's head shape, and compare some queries with attention written out in
    float32: at the edges of row and documents and of kernels' blocks, and elsewhere.
    """
    generator, rows = torch.Generator().manual_seed(length), 2 if length <= 4096 else 1
    heads = s.num_heads, s.num_kv_heads, s.num_kv_heads
    inputs = [torch.randn(rows, length, count, s.head_dim, generator=generator) for count in heads]
    begins = {0, length // 3, length // 3 + 1} | set(torch.randint(length, (3,), generator=generator).tolist())
    ids = torch.zeros(rows, length, dtype=torch.int64)
    ids[:, sorted(begins)] = BOS
    queries = {0, length - 1, *torch.randint(length, (40,), generator=generator).tolist()}
    queries |= {edge + i for edge in (*begins, 64, 128, 256) for i in (-1, 0) if 0 <= edge + i < length}
    queries = torch.tensor(sorted(queries), device=rt.device)
    place = torch.arange(length, device=rt.device)
    begin = torch.zeros_like(place)
    if s.doc_mask == "attention":
        first = torch.where(ids[0].to(rt.device) == BOS, place, 0).cummax(0).values
        begin = place - (place - first) % s.longest_sequence
    seen = (place <= queries[:, None]) & (place >= begin[queries][:, None])

    def reference(q, k, v):
        return attend_seen(q[:, queries], k, v, seen)

    def kernel(q, k, v):
        docs = find_documents(ids.to(rt.device), s.doc_mask, s.longest_sequence, getattr(attend, "varlen", False))
        return attend(q, k, v, docs)[:, queries]

    results = []
    for function, dtype in ((kernel, rt.dtype), (reference, torch.float32)):
        leaves = [z.to(rt.device, rt.dtype).to(dtype).requires_grad_() for z in inputs]  # both from the same numbers
        try:
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
        except Exception as error:  # whatever a foreign kernel can come up with: it is passed over, and that is said
            return f"fails ({type(error).__name__}: {str(error).partition(chr(10))[0][:80]})"
    worst = [(a.float() - b).norm() / b.norm() for a, b in zip(*results)]  # nan stays nan
    out, expected = results[0][0].float(), results[1][0]
    worst.append(((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max() / 4)  # of one head at one place
    worst = torch.stack(worst).max().item()
    allowed = 2e-2 if rt.dtype == torch.bfloat16 else 2e-3 if rt.device.type == "cuda" else 1e-4  # CUDA float32 is TF32
    return None if worst < allowed else f"differs from the reference by {worst:.1e}"


# --------------------------------------------------------------------------------------------------
# 15 Run: clock, console, log, folder, signals
# --------------------------------------------------------------------------------------------------


class Clock:
    """The phase ledger: wall seconds per phase, each second charged to the innermost phase only."""

    def __init__(self, sync=lambda: None):
        self.seconds, self._sync, self._phase, self._since = {}, sync, "setup", time.monotonic()

    def __getitem__(self, phase):
        """Seconds so far, without waiting for the device."""
        return self.seconds.get(phase, 0.0) + (time.monotonic() - self._since if phase == self._phase else 0.0)

    def _enter(self, phase):
        self._sync()
        now, outer = time.monotonic(), self._phase
        self.seconds[outer] = self.seconds.get(outer, 0.0) + now - self._since
        self._phase, self._since = phase, now
        return outer

    @contextlib.contextmanager
    def phase(self, name):
        outer = self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)


class Console:
    """Standard output or error, which may go away while the run goes on: a pipe without reader, a full disk,
    a closed terminal. From then on text for it is dropped; `lost` says why.
    """

    def __init__(self, stream):
        self.lost = "" if stream else "it was closed at the start"
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")

    def __getattr__(self, name):  # encoding, fileno, buffer, ...
        return getattr(self._stream, name)

    def write(self, text):
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # an accent in a path, a terminal that knows ASCII only
            known = self._stream.encoding
            self.write(text.encode(known, "backslashreplace").decode(known))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def isatty(self):
        return not self.lost and self._stream.isatty()

    def _lose(self, error):
        self.lost = self.lost or getattr(error, "strerror", None) or str(error)
        # What the stream still holds goes nowhere. When Python ends, that would make the exit code 120.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_console():
    """Prints of the block, of Python's warnings, too, never end the run."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class Log:
    """train.log, metrics.jsonl and the console, written by rank 0, flushed line by line.

    A line is `event key:value ...`; the contest's own forms are given as text. metrics.jsonl gets every event as JSON.
    """

    def __init__(self, out_dir, main, append=False):
        self.main, self._files, self._bar, self._told = main, [], False, False
        if main:
            self._files = [_open_log(Path(out_dir) / name, append) for name in ("train.log", "metrics.jsonl")]

    def __call__(self, event, text=None, **values):
        if text is None:
            text = " ".join([event] + [f"{key}:{_word(value)}" for key, value in values.items()])
        self.line(text)
        self._write(1, to_json({"event": event, **values}))
        lost = getattr(sys.stdout, "lost", "")
        if lost and self.main and not self._told:
            self._told = True
            self("warning", note=f"the console is gone ({lost}); the files of the run go on")

    def line(self, text, console=True):
        text = readable(text)
        self._write(0, text)
        if self.main and console:
            print(("\r\x1b[K" if self._bar else "") + text, flush=True)
            self._bar = False

    def _write(self, which, text):
        if not self._files or self._files[which] is None:
            return
        try:
            self._files[which].write(text + "\n")
            self._files[which].flush()
        except OSError as error:  # a full disk must not end the training; the console still gets every line
            self._files[which] = None
            print(f"warning: log file closed: {error.strerror}", file=sys.stderr, flush=True)

    def progress(self, what, done, total, rate):
        """A bar on a terminal, nothing elsewhere. `rate` is text."""
        if not self.main or not sys.stdout.isatty():
            return
        full = int(24 * min(done / total, 1.0))
        print(f"\r\x1b[K{what} [{'#' * full}{'.' * (24 - full)}] {done / total:4.0%} {rate}", end="", flush=True)
        self._bar = True


def readable(text):
    """Text that UTF-8 can hold: bytes of a path that are not UTF-8 become \\xNN, in every locale."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair, from a file that says \ud800
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def to_json(values, indent=None):
    """JSON that every reader takes: a number that is not finite becomes null, text is readable()."""
    return json.dumps(_plain(values), indent=indent)


def _plain(value):
    if isinstance(value, dict):
        return {readable(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    return readable(str(value))


def _word(value):
    if isinstance(value, (tuple, list)):
        return ",".join(map(_word, value))
    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    return "_".join(text.split())


def _began(metrics):
    """Did a run get as far as a result? One that stopped at its input may be repeated in its folder."""
    with contextlib.suppress(OSError), open(metrics, encoding="utf-8", errors="replace") as lines:
        return any(line.startswith(('{"event": "train"', '{"event": "final"')) for line in lines)
    return False


def _open_log(path, append):
    if path.exists() and not append and _began(path.with_name("metrics.jsonl")):
        raise BadInput(f"{path} belongs to an earlier run: choose another RUN_ID or OUT_DIR, or RESUME=auto to go on")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); choose another OUT_DIR") from None


def make_folder(s):
    """The folder of the run: the one that settings name, or a new one that no other run can get."""
    named = s.out_dir or (s.run_id and Path("logs") / s.run_id)
    name = Path(named or Path("logs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{s.sha256()[:8]}-seed{s.seed}")
    folder, tries = name, 1
    try:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=bool(named))
                return folder
            except FileExistsError:
                if named:  # a file
                    raise
                tries += 1
                folder = name.with_name(f"{name.name}-{tries}")
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another OUT_DIR") from None


LOCK_FILE = "run.lock"  # lies in OUT_DIR while a run uses it, and names its process


class FolderLock:
    """A folder belongs to one run: a lock that the kernel releases when the process ends, however it ends."""

    def __init__(self, folder, rt):
        """BadInput if another run has the folder. Where files cannot be locked, a line of the log says so."""
        self._path, self._file, held = folder / LOCK_FILE, None, False
        try:
            while not held:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                self._lock(rt)
                held = self._is_there()
                if not held:  # its run ended after we opened the file, and removed it
                    os.close(self._file)
            os.ftruncate(self._file, 0)
        except OSError as error:
            reason = error.strerror
            raise BadInput(f"{self._path} cannot be written ({reason}); choose another OUT_DIR") from None
        with contextlib.suppress(OSError):  # a full disk
            os.write(self._file, f"process {os.getpid()} on {platform.node()}".encode())
        # We are alone here: what a killed run had begun to write is nobody's.
        self.remove_parts()

    def _lock(self, rt):
        try:
            import fcntl
        except ImportError:
            rt.choose("folder_lock", "none", "no fcntl: do not start two runs in one OUT_DIR")
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # over NFS the second
            holder = os.pread(self._file, 100, 0).decode("utf-8", "replace") or "of unknown process"
            os.close(self._file)
            raise BadInput(f"OUT_DIR={self._path.parent} is in use by another run ({holder}); "
                           "wait until it ends, or choose another RUN_ID or OUT_DIR") from None
        except OSError as error:
            rt.choose("folder_lock", "none", f"{error.strerror}: do not start two runs in one OUT_DIR")

    def _is_there(self):
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def remove_parts(self):
        """Files of write_atomic() that a signal cut short."""
        for name in ("model.pg.part", "summary.json.part", "checkpoint_*.pt.part"):
            for part in self._path.parent.glob(name):
                with contextlib.suppress(OSError):
                    part.unlink()

    def release(self):
        self.remove_parts()
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)


class Interrupted(KeyboardInterrupt):
    """A signal ends the run. Like Ctrl-C, no `except Exception` stops it."""


class Interrupt:
    """SIGTERM, SIGHUP and Ctrl-C. The train loop reads `signal` between its steps, so that it can save; a second
    Ctrl-C is immediate. The phases around it have saved what they need: `at_once`, Interrupted is raised.
    """

    def __init__(self, at_once=False):
        self.signal, self.at_once = 0, at_once
        self.over = False  # the run is complete: a signal changes nothing any more

    def _note(self, number, frame):
        if self.over:
            return
        again, self.signal = self.signal, self.signal or number
        unwinding = sys.exc_info()[0] is not None  # of another rank that is gone, say: that must end in order
        if self.at_once and not unwinding:
            raise Interrupted
        if again and number == signal.SIGINT and not self.at_once:
            raise KeyboardInterrupt

    def check(self):
        """End here, if a signal came where it could not be raised."""
        if self.signal:
            raise Interrupted

    def __enter__(self):
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note)
        return self

    def __exit__(self, kind, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal and kind is None and not self.at_once:  # it came after the last look: for those around
            signal.raise_signal(self.signal)


class Run:
    """What the phases of one run share; `facts` end in the summary."""

    def __init__(self, s, rt, out_dir, attend):
        self.s, self.rt, self.out_dir, self.attend = s, rt, out_dir, attend
        self.source = Path(__file__).read_bytes()  # once: what is counted and hashed is what runs, edited since or not
        self.log = Log(out_dir, rt.rank == 0, append=bool(s.resume))
        self.clock, self.validity, self.facts, self.too_large = Clock(rt.sync), Validity(), {}, ""
        self.kept = ""  # what an end from now on leaves behind, and how to go on from there
        self.last_checkpoint = None  # of the end of training, until nothing can lose the weights any more


def open_run(s, rt, attend):
    """(Run, its FolderLock or None). Rank 0 takes the folder; if it cannot, all ranks raise its BadInput."""
    run = lock = folder = None
    refusal = ""
    if rt.rank == 0:
        try:
            folder = make_folder(s)
            lock = FolderLock(folder, rt)
            run = Run(s, rt, folder, attend)
        except BadInput as error:
            refusal = str(error)
    folder, refusal = rt.broadcast((folder, refusal))
    if refusal:
        if lock:
            lock.release()
        raise BadInput(refusal)
    return run or Run(s, rt, folder, attend), lock


# --------------------------------------------------------------------------------------------------
# 16 Training
# --------------------------------------------------------------------------------------------------

CALIBRATION_MICRO_TOKENS = 16384  # forwarded at once: a backward pass that is not compiled takes much memory
TEMPERATURE_TOKENS = 16384


def calibration_steps(s):
    """Steps of the training stream that hold GPTQ_CALIBRATION_TOKENS."""
    return -(-s.gptq_calibration_tokens // s.stages[-1][2])


def calibration_rows(s):
    """Sequences of generated text that do."""
    return -(-s.gptq_calibration_tokens // s.stages[-1][1])


class Training:
    """What a training run changes from step to step: all of it, and nothing else, is in a checkpoint. What has been
    found against the run is part of that.
    """

    YOUNGER = {"data": None, "done": False, "average_begun": 0, "reasons": [],  # what older checkpoints do not have
               "copies": torch.empty(0, dtype=torch.int64)}

    def __init__(self, run, model):
        s, rt = run.s, run.rt
        self.run, self.model, self.step, self.tokens, self.stage, self.stage_start = run, model, 0, 0, 0, 0
        self.objective = Objective(model, s).to(rt.device)
        self.step_loss = rt.compile(self.objective)
        self.optimizer = MuonAdam(self.objective, s, rt)
        given = model.find_documents if model.varlen or s.loader == "packed" else None  # else the graph finds them itself
        self.stream = TokenStream(find_shards(s.data_path, "train"), s, rt, given)
        self.average = Average(s, self.optimizer.banks)
        self.complement = Complement(s, rt) if s.complement_alpha else None
        self.qat = LateQAT(model, s) if s.late_qat_threshold else None
        self.data = training_data(s)
        self.reserve = 0.0  # seconds of the training clock kept for calibration
        self.done = False  # all steps were made

    def enter(self, progress, falling=1.0):
        """What progress switches on: the stage of length and batch, depth recurrence, and, once the learning rate has
        fallen to LATE_QAT_THRESHOLD, training on rounded weights.
        """
        s = self.run.s
        stage = next(i for i, (until, _, _) in enumerate(s.stages) if progress < until or until == 1)
        if stage != self.stage:
            self.stage, self.stage_start = stage, self.step
        self.model.looping = s.loops and progress >= s.enable_looping_at
        if self.qat and (self.qat.begun is not None or falling < s.late_qat_threshold):
            self.qat.enter(self.run, self, 1 - falling / s.late_qat_threshold)

    def plans(self):
        """[(stage, looping, rounded)] that the run will meet, if it lasts."""
        s, begin, met = self.run.s, 0.0, []
        switch = s.enable_looping_at if s.loops else 1.0
        # Where the warmdown is in steps or seconds, rounding may begin anywhere.
        late = 1 - s.late_qat_threshold * (1.0 if s.warmdown_iters or s.warmdown_seconds else s.warmdown_frac)
        for stage, (until, _, _) in enumerate(s.stages):
            loops = [False] * (begin < switch) + [True] * (until > switch)
            met += [(stage, loop, False) for loop in loops]
            met += [(stage, loop, True) for loop in loops if self.qat and (until if loop else min(until, switch)) > late]
            begin = until
        return met

    def backward(self, micro):
        """Gradients of a step's micro-batches; this rank's mean loss."""
        weights = self.complement.weights(micro) if self.complement else [None] * len(micro)
        total = torch.zeros((), device=self.run.rt.device)
        for (x, y, docs), weight in zip(micro, weights):
            loss = self.step_loss(x, y, docs, weight) / len(micro)
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self):
        """Compile every graph that the run will use on synthetic tokens through the real step, then undo all of it."""
        s, rt, banks = self.run.s, self.run.rt, self.optimizer.banks
        before, generator = self.average.copy(), torch.Generator().manual_seed(s.seed)
        for stage, self.model.looping, rounded in self.plans():
            if self.qat:
                self.qat.switch(rounded)
            for _ in range(s.warmup_steps):
                self.optimizer.zero_grad()
                try:
                    self.backward(self.stream.synthetic(generator, *s.stages[stage][1:])[:2])
                    self.optimizer.step(1.0, s.muon_momentum)
                except RuntimeError as error:
                    if not rt.compiled or isinstance(error, torch.OutOfMemoryError):
                        raise
                    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
                    raise BadInput(f"torch.compile failed ({reason}); COMPILE=off runs without it") from error
        self.average.apply(before)
        for bank in banks:
            for tensor in bank.state:
                tensor.zero_()
        self.optimizer.t, self.model.looping = 0, s.loops
        if self.qat:
            self.qat.switch(False)

    def measure_reserve(self):
        """How long calibration will take, from a second try at it on synthetic tokens; the first is all set-up."""
        s, rt = self.run.s, self.run.rt
        generator, (_, length, tokens) = torch.Generator().manual_seed(s.seed), s.stages[-1]
        for _ in range(2):
            rt.sync()
            began, meter = time.monotonic(), MomentMeter(self.model)
            if s.gptq_calibration == "generated":
                part = max(length // 32, 1)
                generate(self.model, calibration_rows(s) // rt.world + 1, part, s.gptq_temperature, s.seed)
                rt.sync()
                began -= (time.monotonic() - began) * (length / part - 1)
            once, micro = time.monotonic(), self.stream.synthetic(generator, length, tokens)
            self._meter_step(meter, micro[:1], length)
            rt.sync()
            seconds = once - began + (time.monotonic() - once) * len(micro) * calibration_steps(s)
        return rt.max(1.1 * seconds)[0]

    def _meter_step(self, meter, micro, length):
        for ids, targets, _ in micro:
            rows = max(CALIBRATION_MICRO_TOKENS // length, 1)
            for x, y in zip(ids.view(-1, length).split(rows), targets.view(-1, length).split(rows)):
                meter.observe(x, y)

    def calibrate(self):
        """{parameter: Moments} of the model as it is, inside the training clock: from the next steps of the training
        stream, or from text that the model writes itself.
        """
        s, rt, run, meter = self.run.s, self.run.rt, self.run, MomentMeter(self.model)
        _, length, tokens = s.stages[self.stage]
        with run.clock.phase("calibrate"):
            if s.gptq_calibration == "generated":
                text = generate(self.model, calibration_rows(s), length, s.gptq_temperature, s.seed, rt.world, rt.rank)
                self._meter_step(meter, [(text[:, :-1].contiguous(), text[:, 1:].contiguous(), None)], length)
            else:
                run.validity.opened("train")
                for _ in range(calibration_steps(s)):
                    self._meter_step(meter, _next_batch(run, self, length, tokens), length)
            moments = meter.moments(rt)
        run.log("calibrate", source=s.gptq_calibration, tokens=int(rt.sum(torch.tensor(meter.tokens, device=rt.device))),
                seconds=round(run.clock["calibrate"], 3), reserved_seconds=round(self.reserve, 3))
        return moments

    @torch.no_grad()
    def fit_temperature(self):
        """The divisor of the logits at which further training text costs least, by Newton's method on its inverse: rows of
        the next step, evenly spaced over all ranks, so that it does not depend on their number.
        """
        run, (_, length, tokens) = self.run, self.run.s.stages[self.stage]
        with run.clock.phase("calibrate"):
            run.validity.opened("train")
            rows = [(x[i : i + 1], y[i : i + 1], docs if len(x) == 1 else None)
                    for x, y, docs in _next_batch(run, self, length, tokens) for i in range(len(x))]
            count = len(rows) * run.rt.world
            some = min(max(TEMPERATURE_TOKENS // rows[0][0].size(1), 1), count)
            taken = {i * count // some for i in range(some)}
            states, y = [rows[0][0].new_empty(0, run.s.model_dim, dtype=self.model.dtype)], [rows[0][1][0, :0]]
            for i, (x, targets, docs) in enumerate(rows, len(rows) * run.rt.rank):
                if i in taken:
                    states.append(self.model.hidden(x, docs)[0, :TEMPERATURE_TOKENS])
                    y.append(targets[0, :TEMPERATURE_TOKENS])
            logits, y, inverse = self.model.logits(torch.cat(states).float()).double(), torch.cat(y)[:, None], 1.0
            for _ in range(8):
                share = (inverse * logits).softmax(-1)
                mean = (share * logits).sum(-1)
                slope = (mean - logits.gather(-1, y).squeeze(-1)).sum()
                bend = ((share * logits.square()).sum(-1) - mean.square()).sum()
                slope, bend = run.rt.sum(torch.stack((slope, bend))).tolist()
                inverse = min(max(inverse - slope / max(bend, 1e-9), 0.2), 5.0)
        read, = run.rt.sum(torch.tensor([float(len(y))], dtype=torch.float64, device=run.rt.device)).tolist()
        run.log("temperature", fitted=1 / inverse, tokens=int(read))
        return round(1 / inverse, 4)

    def save(self):
        """Write a checkpoint, outside the training clock, by parameter name; the last two are kept. Collective.

        One that cannot be written (full disk) is a line in the log: the run and the older checkpoints are worth more.
        Returns whether it was written.
        """
        with self.run.clock.phase("checkpoint"):
            return self._save()

    def state(self):
        """What a checkpoint holds, by parameter name, on the CPU. Collective."""
        run, weights = self.run, [bank.weight for bank in self.optimizer.banks]

        def by_name(tensors):
            return {name: part.cpu().clone() for name, part in self.optimizer.named(tensors).items()}

        settings = {name: value for name, value in identity(run).items() if name not in PLACES}
        average = {kind: [by_name(one) for one in taken] for kind, taken in self.average.snapshots.items()}
        return {"step": self.step, "tokens": self.tokens,
                "stage": (self.stage, self.stage_start, self.model.looping),
                "settings": settings, "data": self.data,
                "position": self.stream.position, "rng": torch.get_rng_state(),
                "seconds": dict(run.clock.seconds), "weights": by_name(weights),
                "average": average, "average_count": self.average.count,
                "complement": self.complement.state_dict() if self.complement else None,
                "qat": self.qat.state_dict() if self.qat else None, "reserve": self.reserve,
                "optimizer": self.optimizer.state_dict(), "done": self.done, "average_begun": self.average.begun,
                "reasons": run.validity.to_keep(run.rt),
                "copies": torch.from_numpy(self.stream.copies.found(run.rt).view(np.int64))}

    def _save(self):
        run, state = self.run, self.state()
        if run.rt.rank:
            return True
        buffer = io.BytesIO(CHECKPOINT_MAGIC)
        buffer.seek(0, io.SEEK_END)
        torch.save(state, buffer)
        data, path = buffer.getvalue(), run.out_dir / f"checkpoint_{self.step:07d}.pt"
        try:
            write_atomic(path, [data, hashlib.sha256(data).digest()])
        except BadInput as error:
            run.log("checkpoint_failed", step=self.step, reason=str(error))
            return False
        run.log("checkpoint", step=self.step, file=path.name, bytes=len(data) + 32)
        for old in checkpoints(run.out_dir)[2:]:
            old.unlink()
        return True

    def check(self, state, fresh):
        """ValueError, naming the field, unless load() can take this state: it has the form of `fresh`, the
        state of a training that has not begun, and its numbers are possible ones. Nothing is changed.
        """
        s, sizes = self.run.s, [tokens for _, _, tokens in self.run.s.stages]
        state = {**self.YOUNGER, **state}
        need_names("the checkpoint", state, fresh)
        for name in ("stage", "weights", "optimizer", "rng"):
            need_like(name, state[name], fresh[name])
        step = need_number("step", state["step"], int, 0, s.iterations or MOST_STEPS)
        need_number("optimizer t", state["optimizer"]["t"], int, step, step)
        stage, since, looping = state["stage"]
        need_number("stage", stage, int, 0, len(sizes) - 1)
        need_number("beginning of the stage", since, int, 0, step)
        if looping and not s.loops:
            raise ValueError("stage says that the model loops, but NUM_LOOPS=0")
        tokens = need_number("tokens", state["tokens"], int, step * min(sizes), step * max(sizes))
        # Calibration reads ahead, and each stage begins at a multiple of its length.
        ahead = calibration_steps(s) * max(sizes) + (len(sizes) + 1) * s.longest_sequence
        need_number("position", state["position"], int, tokens, tokens + ahead)
        need_number("reserve", state["reserve"], float, 0, MOST_SECONDS)
        need_names("seconds", state["seconds"])
        for phase, seconds in state["seconds"].items():
            need_number(f"seconds of {brief(phase, 20)}", seconds, float, 0, MOST_SECONDS)
        for name, moments in state["optimizer"].items():
            if name != "t" and any((second < 0).any() for second in moments[1:]):
                raise ValueError(f"optimizer {name} has a negative second moment")
        try:
            torch.Generator().set_state(state["rng"])
        except RuntimeError:
            raise ValueError("rng is not the state of a generator") from None
        need_like("done", state["done"], False)
        need_number("average_begun", state["average_begun"], int, 0, step)
        need_reasons(state["reasons"])
        need_like("copies", state["copies"], torch.empty(_length(state["copies"]), dtype=torch.int64))
        self._check_average(state, fresh["weights"])
        self._check_complement(state["complement"])
        self._check_qat(state["qat"], fresh["qat"], step)

    def _check_average(self, state, weights):
        kinds, s = self.average.kinds, self.run.s
        most = {"ema": 1, "swa": 1, "lawa": s.lawa_k}
        need_names("average", state["average"])
        for kind, snapshots in state["average"].items():
            if kind not in kinds:
                raise ValueError(f"average has {brief(kind, 20)}, which AVERAGE={s.average} does not take")
            if type(snapshots) is not list or not 1 <= len(snapshots) <= most[kind]:
                raise ValueError(f"average {kind} is no list of at most {most[kind]} snapshots")
            need_like(f"average {kind}", snapshots, [weights] * len(snapshots))
        if "ema" in kinds and not s.ema_start_frac and "ema" not in state["average"]:
            raise ValueError("average has no ema, which is taken from the first step on")
        swa = "swa" in state["average"]
        need_number("average_count", state["average_count"], int, int(swa), state["step"] if swa else 0)

    def _check_complement(self, state):
        if self.complement is None:
            need_like("complement", state, None)
            return
        need_names("complement", state, ("pairs", "times"))
        pairs, times = state["pairs"], state["times"]
        counts = torch.empty(_length(pairs), dtype=torch.int64)
        need_like("complement", state, {"pairs": counts, "times": counts})
        outside = len(pairs) and (pairs[0] < 0 or pairs[-1] >= self.complement.vocab**2)
        if outside or (pairs.diff() < 1).any():
            raise ValueError("complement pairs are not rising pairs of tokens of the vocabulary")
        if (times < 1).any():
            raise ValueError("complement times has a pair that never occurred")

    def _check_qat(self, state, fresh, step):
        if self.qat is None:
            need_like("qat", state, None)
            return
        need_names("qat", state, fresh)
        need_like("qat steps", state["steps"], fresh["steps"])
        for name, steps in state["steps"].items():
            if (steps <= 0).any():
                raise ValueError(f"qat steps {name} are not positive")
        if state["begun"] is not None:
            need_number("qat begun", state["begun"], int, 0, step)
        if state["begun"] is None or self.run.s.fit != "allocate":
            need_like("qat moments", state["moments"], None)
            return
        modules = {f"{name}.weight": module for name, module in self.model.named_modules()
                   if isinstance(module, (Linear, Table))}
        need_names("qat moments", state["moments"], modules)
        for name, moments in state["moments"].items():
            rows, columns = modules[name].weight.shape
            felt = torch.empty(columns, columns), torch.empty(rows), 0.0
            inputs = None if type(moments) is tuple and moments[-1] is None else torch.empty(columns)
            need_like(f"qat moments {name}", moments, (*felt, inputs))

    @torch.no_grad()
    def load(self, state):
        """Go on from the state of a checkpoint, which check() has found to be one of this run."""
        state = {**self.YOUNGER, **state}
        self.step, self.stream.position, self.average.count = state["step"], state["position"], state["average_count"]
        self.tokens, (self.stage, self.stage_start, self.model.looping) = state["tokens"], state["stage"]

        def read(tensors, parts):
            for name, view in self.optimizer.named(tensors).items():
                view.copy_(parts[name])
            return tensors

        self.average.snapshots = {kind: [read(self.average.copy(), parts) for parts in taken]
                              for kind, taken in state["average"].items()}
        read([bank.weight for bank in self.optimizer.banks], state["weights"])
        if self.complement:
            self.complement.load_state_dict(state["complement"])
        if self.qat:
            self.qat.load_state_dict(state["qat"])
        self.reserve = state["reserve"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.run.clock.seconds.update({k: v for k, v in state["seconds"].items() if k != "setup"})
        torch.set_rng_state(state["rng"])
        self.done = state["done"]
        self.average.begun = state["average_begun"]
        self.stream.copies.restore(state["copies"].numpy().view(np.uint64))
        self.run.validity.restore(state["reasons"])


# ---- checkpoints ---------------------------------------------------------------------------------

MOST_STEPS, MOST_SECONDS = 2**53, 1e9  # of any run


def _length(vector):
    """Its length, if it is one; else 0."""
    return len(vector) if isinstance(vector, Tensor) and vector.ndim == 1 else 0


def need_names(what, found, names=None):
    """ValueError unless this is a dict with these names, or with any that are text."""
    if type(found) is not dict or not all(type(name) is str for name in found):
        raise ValueError(f"{what} is {_form(found)}, not a dict of names")
    for name in names or ():
        if name not in found:
            raise ValueError(f"{what} has no {name}")
    for name in found:
        if names is not None and name not in names:
            raise ValueError(f"{what} has an unknown {brief(name, 60)}")


def need_like(what, found, like):
    """ValueError unless `found` has types, names, lengths, dtypes and shapes of `like`, and is finite."""
    if type(found) is not type(like) or _form(found) != _form(like):
        raise ValueError(f"{what} is {_form(found)}, not {_form(like)}")
    if isinstance(like, Tensor):
        if found.is_floating_point() and not found.isfinite().all():
            raise ValueError(f"{what} has values that are not finite")
    elif isinstance(like, dict):
        need_names(what, found, like)
        for name in like:
            need_like(f"{what} {name}", found[name], like[name])
    elif isinstance(like, (list, tuple)):
        for one, other in zip(found, like):
            need_like(what, one, other)
    elif isinstance(like, float) and not math.isfinite(found):
        raise ValueError(f"{what} is {found}")


def _form(value):
    """What need_like() compares, in words."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        ordinary = type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
        dtype = str(value.dtype).removeprefix("torch.")
        return brief(f"{'' if ordinary else f'special {kind} '}{dtype} {tuple(value.shape)}", 60)
    return f"{kind} of {len(value)}" if isinstance(value, (list, tuple)) else kind


PLACES = ("DATA_PATH", "TOKENIZER_PATH")  # a checkpoint knows its data by what they hold, wherever they lie
HEAD_TOKENS = 64  # of each shard that tell it from others; one that was repaired further in is the same


def identity(run):
    """{setting: value as text} that must be equal for a checkpoint to be gone on with."""
    return {**run.s.experiment(), "SEED": str(run.s.seed), "DTYPE": str(run.rt.dtype).removeprefix("torch.")}


def training_data(s):
    """{"shards", "tokens", "sha256"} of the training shards; hashed are the length and the head of each."""
    digest, tokens, paths = hashlib.sha256(), 0, find_shards(s.data_path, "train")
    for path in paths:
        shard = read_shard(path)
        tokens += len(shard)
        digest.update(struct.pack("<q", len(shard)) + shard[:HEAD_TOKENS].tobytes())
    return {"shards": len(paths), "tokens": tokens, "sha256": digest.hexdigest()}


def need_same_run(path, run, state, data):
    """BadInput if the state of a checkpoint is that of other settings, or of other data than `data` of
    training_data(). Settings may be younger than the checkpoint.
    """
    mine, theirs, defaults = identity(run), state["settings"], Settings().experiment()
    if "data" in state:
        for name in PLACES:
            del mine[name]
    values = {name: theirs.get(name, defaults.get(name)) for name in {**mine, **theirs}}
    if different := [f"{name}={value}" for name, value in values.items() if value != mine.get(name)]:
        raise BadInput(f"{path}: the checkpoint has other settings: {brief(' '.join(different), 120)}; "
                       "repeat them, or take another RUN_ID")
    if state.get("data", data) != data:
        raise BadInput(f"{path}: the checkpoint has other data ({_data_in_words(state['data'])}) than "
                       f"DATA_PATH ({_data_in_words(data)}); set it right, or take another RUN_ID")


def _data_in_words(data):
    tokens, sha256 = brief(data["tokens"], 20), brief(data["sha256"], 64)[:12]
    return f"{brief(data['shards'], 20)} shards, {tokens} tokens, SHA-256 {sha256}"


CHECKPOINT_MAGIC = b"PGOLF checkpoint 2\n"


def checkpoints(out_dir):
    """Checkpoints of a run, newest first."""
    return sorted(Path(out_dir).glob("checkpoint_*.pt"), reverse=True)


def read_checkpoint(path):
    """Bytes of a whole checkpoint, or BadInput that says what is wrong with the file."""
    data = read_file(path)
    if not data.startswith(CHECKPOINT_MAGIC) or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise BadInput(f"{path}: not a whole checkpoint of this script (its beginning or its checksum is wrong)")
    return data[len(CHECKPOINT_MAGIC) : -32]


def checkpoint_state(path, data):
    """The state in the bytes of read_checkpoint(); BadInput if there is none, or none that says of which run
    it is. Nothing is executed, and no more is unpacked than the file has bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
        if any(record.compress_type for record in records) or sum(r.file_size for r in records) > len(data):
            raise ValueError("it is compressed")
        state = _unpickled(data)
        need_names("the checkpoint", state)
        need_names("settings", state.get("settings"))
        for name, value in state["settings"].items():
            need_like(f"settings {brief(name, 60)}", value, "")
        if "data" in state:
            need_like("data", state["data"], {"shards": 0, "tokens": 0, "sha256": ""})
    except Exception as error:  # torch says whatever it likes of a file that is broken inside
        raise BadInput(f"{path}: not a checkpoint of this script ({type(error).__name__}: "
                       f"{brief(str(error).strip().partition(chr(10))[0], 120)})") from None
    return state


def _unpickled(data):
    """What torch.save wrote: tensors and plain values. Its warnings are not for a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def checkpoint_to_resume(run, training):
    """The state to go on from, found to be one of this run, or None. Changes nothing of the run. Collective.

    RESUME=file must be usable. RESUME=auto takes the newest checkpoint that is; each that is not gets a line.
    Other settings are an error in both. Rank 0's disk counts, and what it finds ends all ranks alike.
    """
    paths = checkpoints(run.out_dir) if run.s.resume == "auto" else [Path(run.s.resume)] if run.s.resume else []
    found, problem = None, ""
    if run.rt.broadcast(bool(paths)):
        fresh = training.state()
        try:
            found = _newest_usable(run, training, fresh, paths) if run.rt.rank == 0 else None
        except BadInput as error:
            problem = str(error)
    found, problem = run.rt.broadcast((found, problem))
    if problem:
        raise BadInput(problem)
    if found is None and run.s.resume:
        run.log("started_anew", reason=f"no whole checkpoint in {run.out_dir}")
    return None if found is None else _unpickled(found)


def _newest_usable(run, training, fresh, paths):
    """Bytes of the first of these checkpoints that can be used, or None."""
    for path in paths:
        try:
            data = read_checkpoint(path)
            state = checkpoint_state(path, data)
        except BadInput as error:
            if run.s.resume != "auto":
                raise
            run.log("checkpoint_skipped", reason=str(error))
            continue
        need_same_run(path, run, state, training.data)
        try:
            training.check(state, fresh)
            return data
        except ValueError as error:
            reason = f"{path}: its content is not that of this run ({brief(error, 150)})"
        if run.s.resume != "auto":
            raise BadInput(f"{reason}; take another checkpoint, or start anew")
        run.log("checkpoint_skipped", reason=reason)
    return None


# ---- the training phase --------------------------------------------------------------------------


def report_score(run, predictor, stream):
    """Contiguous score of the validation stream as a report that nothing learns from."""
    s, rt = run.s, run.rt
    with run.clock.phase("validate"), run.validity.report():
        before = fingerprint(predictor.model)
        result = score(predictor, contiguous_reader(stream, s, rt), stream, rt, run.validity)
        run.validity.need(fingerprint(predictor.model) == before, "C3: a report on the validation text changed the model")
    return result


def train(run, model, val):
    """The training phase: leaves the weights to export in the model. Returns their Moments, where settings need them."""
    s, rt, log = run.s, run.rt, run.log
    need_loadable("the artifact of this model", largest_rows(model, s))
    training = Training(run, model)
    copies = training.stream.copies = Contamination(val.tokens.cpu().numpy())
    copies.look(training.stream.held)
    state = checkpoint_to_resume(run, training)  # before minutes are spent on warm-up
    for role, (tensors, count, how) in training.optimizer.table.items():
        log("optimizer", role=role, tensors=tensors, parameters=count, **how._asdict())
    name, shards, tokens = Path(s.data_path).name, len(training.stream.paths), int(training.stream.ends[-1])
    log("train_loader", f"train_loader:dataset:{name} train_shards:{shards} tokens:{tokens} order:{s.loader}",
        dataset=name, train_shards=shards, tokens=tokens, order=s.loader, held_out=len(training.stream.held))
    predictor = ModelPredictor(model, rt)
    if s.warmup_steps:
        with run.clock.phase("warmup"):
            training.warm_up()
            if rt.compiled:  # the scoring graphs too, on synthetic tokens
                tokens = torch.zeros_like(val.tokens[: s.eval_seq_len + 1])
                for model.looping in sorted({looping for _, looping, _ in training.plans()}):  # ends as the run will
                    report_score(run, predictor, ValStream(tokens, val.bytes[: s.eval_seq_len], False))
        log("warmup", steps=s.warmup_steps, graphs=len(training.plans()), seconds=round(run.clock["warmup"], 2))
    if s.needs_moments and s.max_wallclock_seconds:
        with run.clock.phase("warmup"):
            training.reserve = s.gptq_reserve_seconds or training.measure_reserve()
        log("reserve", seconds=round(training.reserve, 3))
    training.average.start()
    if state:
        training.load(state)
        del state
        log("resume", step=training.step, train_seconds=round(run.clock["train"], 3))
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rt.device)
    was_done = training.done
    with Interrupt() as interrupt:
        with run.clock.phase("train"):
            lowest = _train_steps(run, training, predictor, val, interrupt)
        training.done = True
        keep_weights(run, training)
    if not was_done:
        _report_never_reached(run, training, lowest)
    kind, weights = _choose_average(run, training, predictor)
    if kind == "ema":
        _report_young_average(run, training)
    if weights is not None:
        training.average.apply(weights)
        result = report_score(run, predictor, val)
        log("eval", name=f"{kind}_weights", val_loss=result.loss, val_bpb=result.bpb)
    peak = rt.peak_memory_mib()
    run.facts.update(steps=training.step, train_tokens=training.tokens, peak_memory_mib=peak, weights=kind,
                     epochs=round(training.stream.epoch, 4))
    log("peak_memory", f"peak memory allocated: {peak} MiB", mib=peak)
    model.temperature = training.fit_temperature() if s.eval_temperature == 0 else None
    learned = training.qat and training.qat.moments
    moments = learned or (training.calibrate() if s.needs_moments else None)
    _check_copies(run, copies)
    model.reasons = run.validity.to_keep(rt)
    return moments


def _check_copies(run, copies):
    """Validation documents in the training text. FineWeb was deduplicated within each crawl only, so that a few openings
    are in both; 20 % were in the folders of #2127.
    """
    count = len(copies.found(run.rt))
    documents = len(copies.keys)
    run.facts.update(val_documents_in_training=count)
    run.validity.need(count <= max(documents // 100, 1),
                      f"C3: {count} of {documents} validation documents begin as some did that were trained on, with the "
                      f"same {copies.PREFIX} tokens")


def keep_weights(run, training):
    """The trained weights are on disk before anything else is tried with them, until the run is over."""
    if not training.save():
        run.kept = "the trained weights could not be kept: no checkpoint could be written"
        return
    run.last_checkpoint = run.out_dir / f"checkpoint_{training.step:07d}.pt"
    run.kept = f"the trained weights are kept, go on with RESUME=auto OUT_DIR={run.out_dir}"


def _report_young_average(run, training):
    """An average that began a short while ago is still what it began with."""
    average, decay = training.average, run.s.ema_decay
    steps = training.step - average.begun
    share = decay**steps
    if share <= 0.01:
        return
    what = f"the weights after step {average.begun}" if average.begun else "the initial weights"
    lower = math.floor(1e4 * 0.01 ** (1 / max(steps, 1))) / 1e4
    run.log("young_average", ema_decay=decay, steps=steps, share=share,
            note=f"{share:.1%} of the exported average is {what}, {decay}**{steps}; "
                 f"more steps, EMA_DECAY={lower} or AVERAGE=none make that less")


def _choose_average(run, training, predictor):
    """(its name, weights to export in place of the last ones, or None). AVERAGE=best is decided by the loss on the
    end of the *training* stream, on the training side of the ledger; validation text has no say.
    """
    s, rt, average = run.s, run.rt, training.average
    candidates = {kind: average.mean(kind) for kind in average.kinds}
    for kind in [kind for kind, weights in candidates.items() if weights is None]:
        del candidates[kind]
        if s.average != "best":
            run.log("never_reached", what=f"AVERAGE={kind}", consequence="the last weights are exported")
    if s.average != "best":
        return next(iter(candidates.items()), ("last", None))
    run.validity.opened("train")
    held = torch.from_numpy(training.stream.held.astype(np.int32)).to(rt.device)
    stream = ValStream(held, torch.ones(len(held) - 1, dtype=torch.int16, device=rt.device), False)
    losses, candidates = {}, {"last": average.copy(), **candidates}
    with run.clock.phase("calibrate"), torch.no_grad():
        for kind, weights in candidates.items():
            average.apply(weights)
            losses[kind] = score(predictor, contiguous_reader(stream, s, rt), stream, rt, Validity()).loss
    best = min(losses, key=losses.get)
    run.log("candidates", chosen=best, held_out_tokens=len(held) - 1, **{f"{k}_loss": v for k, v in losses.items()})
    return best, candidates[best]


def _train_steps(run, training, predictor, val, interrupt):
    """Steps until the clock or ITERATIONS says stop; returns the lowest learning-rate scale that was used."""
    s, rt, log, clock = run.s, run.rt, run.log, run.clock
    losses, lowest, first, marks = deque(), 1.0, training.step, deque(maxlen=20)
    limit = max(s.max_wallclock_seconds - training.reserve, 0.0)
    if s.max_wallclock_seconds and not limit:
        lower = "gptq_reserve_seconds" if s.gptq_reserve_seconds else "gptq_calibration_tokens"
        raise BadInput(f"calibration will take {training.reserve:.1f} s of MAX_WALLCLOCK_SECONDS="
                       f"{s.max_wallclock_seconds}; lower {lower.upper()}={getattr(s, lower)}")
    while True:
        # Rank 0's clock decides for all; a step is begun only if, as slow as the slowest of late, it ends in time.
        elapsed, stop = rt.max(clock["train"] if rt.rank == 0 else 0.0, interrupt.signal)
        step = training.step
        marks.append(elapsed)
        pace = max((b - a for a, b in zip(marks, list(marks)[1:])), default=0.0)
        by_time = elapsed / limit if limit else 0.0
        by_step = step / s.iterations if s.iterations else 0.0
        progress = min(max(by_time, by_step), 1.0)
        out_of_time = limit and elapsed + pace * (1 + len(losses)) > limit
        done = by_step >= 1 or out_of_time or training.done
        if stop:
            break
        if done or (s.val_loss_every and step % s.val_loss_every == 0 and step > first):
            if training.qat:  # what is scored is the weights themselves
                training.qat.switch(False)
            log_step(run, "val", step, report_score(run, predictor, val))
        if done:
            break
        # A run that ends by the clock has as many steps as fit at this pace; WARMDOWN_ITERS is measured against it.
        steps = step / by_time if by_time > by_step else s.iterations
        training.enter(progress, warmdown(s, progress, steps, limit))
        since = step - training.stage_start if training.stage else None
        scale = lr_scale(s, progress, step, steps, since, limit)
        lowest = min(lowest, scale)
        losses.append(_train_step(run, training, progress, scale))
        in_flight = rt.throttle()
        every = s.checkpoint_every and training.step % s.checkpoint_every == 0
        if every:
            rt.sync()
        while len(losses) > (0 if every else in_flight):
            _check_loss(run, *losses.popleft())
        if every:
            training.save()
        log.progress("training", progress, 1.0, f"step {training.step} {1e3 * pace:.0f} ms/step "
                     f"ETA {elapsed * (1 - progress) / max(progress, 1e-9):.0f} s")
    rt.sync()
    if training.qat:
        training.qat.switch(False)
    while losses:
        _check_loss(run, *losses.popleft())
    if stop := int(rt.max(interrupt.signal)[0]):
        saved = training.save()
        then = f"go on with RESUME=auto OUT_DIR={run.out_dir}" if saved else "no checkpoint could be written"
        raise Stopped(f"interrupted by {signal.Signals(stop).name} after step {step}; {then}", 128 + stop)
    if by_step < 1:
        log("stopping_early", f"stopping_early: wallclock_cap train_time:{1e3 * elapsed:.0f}ms "
            f"step:{step}/{s.iterations}", step=step)
    return lowest


def _next_batch(run, training, length, tokens):
    """The next batch; or, if a rank meets a token outside the vocabulary deep in a shard, the end of the run on all
    ranks together, for which what was trained so far is kept.
    """
    stream, error = training.stream, None
    position = stream.position
    try:
        micro = stream.next(length, tokens)
    except BadInput as found:
        error = found
    if any(run.rt.max(error is not None)):
        stream.position = position  # that of the checkpoint, on the ranks that could read, too
        training.save()
        raise error or Stopped("another rank cannot read its part of the training data", 2)
    return micro


def _train_step(run, training, progress, scale):
    """One optimizer step; returns (its number, this rank's mean loss on its way to the CPU)."""
    s, rt, stream = run.s, run.rt, training.stream
    run.validity.opened("train")
    epoch, (_, length, tokens) = int(stream.epoch), s.stages[training.stage]
    micro = _next_batch(run, training, length, tokens)
    training.optimizer.zero_grad()
    loss = training.backward(micro)
    training.optimizer.step(scale, momentum_at(s, training.step), wd_scale(s, progress))
    training.step, training.tokens = training.step + 1, training.tokens + tokens
    training.average.update(training.step, progress, scale)
    if training.complement:
        training.complement.observe(micro)
    if training.step <= 10 or training.step % s.train_log_every == 0:
        log_step(run, "train", training.step, rt.sum(loss.clone()).item() / rt.world, scale, training.tokens)
    if int(stream.epoch) > epoch:
        run.log("epoch", number=int(stream.epoch), step=training.step, note="the training stream starts again")
    return training.step, rt.to_cpu(loss)


def log_step(run, event, step, result, scale=None, tokens=0):
    """The contest's line for a training loss or a validation score."""
    ms, of = 1e3 * run.clock["train"], run.s.iterations
    times = f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"
    if event == "val":
        text = f"step:{step}/{of} val_loss:{result.loss:.4f} val_bpb:{result.bpb:.4f} {times}"
        run.log(event, text, step=step, val_loss=result.loss, val_bpb=result.bpb, train_time_ms=ms)
    else:
        rate = tokens / max(ms / 1e3, 1e-9)
        run.log(event, f"step:{step}/{of} train_loss:{result:.4f} {times}",
                step=step, train_loss=result, train_time_ms=ms, lr_scale=scale, tokens_per_second=rate)


def _check_loss(run, step, loss):
    if math.isfinite(loss.item()):
        return
    # The loss of a step judges the weights that the step before left: a checkpoint of those is bad, too.
    bad = [path for path in checkpoints(run.out_dir) if path.name >= f"checkpoint_{step - 1:07d}.pt"]
    for path in bad if run.rt.rank == 0 else ():
        path.rename(path.with_suffix(".bad"))
    last = next((path.name for path in checkpoints(run.out_dir) if path not in bad), "none")
    raise Stopped(f"the loss is not finite at step {step}; last good checkpoint: {last}", 4)


def _report_never_reached(run, training, lowest):
    """A scheduled event that did not happen is said, not left to be found in the result (#1798)."""
    s, step, stages = run.s, training.step, run.s.stages
    falls, muon = s.warmdown_frac or s.warmdown_iters or s.warmdown_seconds, s.matrix_optimizer == "muon"
    ended = f"it ended at {momentum_at(s, step):.4f}"
    events = [("MUON_MOMENTUM", muon and step < s.muon_momentum_warmup_steps, ended),
              ("warmdown", falls and lowest >= 1, "the learning rate never fell"),
              ("LR_WARMUP_STEPS", step < s.lr_warmup_steps, "the learning rate never reached its peak"),
              ("LATE_QAT_THRESHOLD", training.qat and training.qat.begun is None, "no step was on rounded weights"),
              ("ENABLE_LOOPING_AT", s.loops and not training.model.looping, "the exported model does not loop"),
              ("stage", training.stage + 1 < len(stages), f"it ended in number {training.stage + 1} of {len(stages)}")]
    for what, missed, consequence in events:
        if missed:
            run.log("never_reached", what=what, consequence=consequence)


# --------------------------------------------------------------------------------------------------
# 17 Phases: export, evaluate, summarise, main
# --------------------------------------------------------------------------------------------------


def export(run, model, tokenizer_sha256, moments=None):
    """Write the artifact, account for every byte of the submission; returns the artifact's path."""
    s, path, code_bytes = run.s, run.out_dir / "model.pg", len(run.source)
    info = failed = None
    with run.clock.phase("export"):
        try:
            if run.rt.rank == 0:
                room = s.size_limit - code_bytes
                info = save_artifact(path, model, s, tokenizer_sha256, run.log, moments, room)
        except BadInput as error:
            failed = str(error), 2
        except Stopped as error:
            failed = str(error), error.code
    info, failed = run.rt.broadcast((info, failed))
    if failed:  # on all ranks: one that waited for the artifact would die of that
        raise Stopped(*failed)
    run.kept = f"the artifact is kept, go on with PHASES=eval ARTIFACT={path}"
    if run.last_checkpoint:
        run.kept += f" or RESUME=auto OUT_DIR={run.out_dir}"
    total = code_bytes + info["bytes"]
    run.facts.update(code_bytes=code_bytes, model_bytes=info["bytes"], total_bytes=total,
                     artifact_sha256=info["sha256"], compressor=info["compressor"])
    run.log("artifact", code_bytes=code_bytes, model_bytes=info["bytes"], total_bytes=total, limit_bytes=s.size_limit,
            margin_bytes=s.size_limit - total, sha256=info["sha256"], file=path)
    kind = f"{s.format}+{info['compressor']}"
    run.log("submission_size", f"Total submission size {kind}: {total} bytes", total_bytes=total)
    if total > s.size_limit:  # it is scored all the same, as the contest's scripts do
        run.validity.need_for_record(False, f"{total} bytes, the limit is {s.size_limit}")
        run.too_large = (f"code {code_bytes} + artifact {info['bytes']} = {total} bytes, {total - s.size_limit} over the "
                         f"limit of {s.size_limit}; {path} was kept. FIT=allocate or prune, or a trainer packed by "
                         "tools/submit.py, makes it fit")
        run.log("warning", note=run.too_large)
    return path


def evaluate(run, path):
    """Load the artifact that was written, and nothing else, and score it."""
    s, rt = run.s, run.rt
    with run.clock.phase("eval"), run.validity.evaluation():
        data = rt.broadcast(read_file(path) if rt.rank == 0 else None)  # over nodes, only rank 0's disk has the file
        found = hashlib.sha256(data).hexdigest()
        run.validity.need(found == run.facts.setdefault("artifact_sha256", found), "the artifact changed after it was written")
        stored = read_artifact(path, data)[0]["tokenizer_sha256"]
        s = replace(s, **{f.name: f.default for f in model_fields()})  # the model is what the file says, alone
        s, model = load_artifact(path, s, rt.dtype, run.attend, rt.device, data)
        run.validity.restore(model.reasons)
        loaded = fingerprint(model)
        if s.eval_temperature == 0 and model.temperature is None:
            raise BadInput(f"EVAL_TEMPERATURE=0, but {path} was written without a fitted one; train with it, or give it")
        sp, _, tokenizer_sha256 = load_tokenizer(s)
        if stored and stored != tokenizer_sha256:
            raise BadInput(f"{path} was trained with another tokenizer (SHA-256 {stored[:12]}, this one "
                           f"{tokenizer_sha256[:12]}); set TOKENIZER_PATH")
        with run.validity.loading():
            val = load_validation(s, rt, sp)
        text, proved = text_sha256(val), _check_bytes(run, sp, val)
        predictor = make_predictor(model, s, rt, len(val.bytes), s.eval_temperature or model.temperature)
        if scoring_name(s) != "contiguous":  # comparable with the scores before quantisation: what packing cost
            plain = predictor if type(predictor) is ModelPredictor and predictor.temperature == 1 else ModelPredictor(model, rt)
            result = report_score(run, plain, val)
            run.log("eval", name=f"{s.format}_contiguous", val_loss=result.loss, val_bpb=result.bpb,
                    **run.validity.verdict())
        if s.ttt == "before":
            train_on_validation(run, model, val)
        run.validity.need(not predictor.invalid, predictor.invalid)
        log_adaptation(run, model, predictor)
        reader = reader_for(predictor, val, s, rt)
        graphs = warm_up_scoring(run, predictor, reader) if rt.compiled else 0
        predictor.reset()
        run.validity.need(s.ttt == "before" or fingerprint(model) == loaded, "C3: the model was changed before it was scored")
        result = score(predictor, reader, val, rt, run.validity, run.log)
        run.validity.need(result.bytes == proved, f"bytes: {result.bytes} were scored, {proved} had been proved")
        run.validity.need(text_sha256(val) == text, "the text changed while it was scored")
        forwarded, = rt.sum(torch.tensor([float(reader.forwarded)], dtype=torch.float64, device=rt.device)).tolist()
        recompiled = graphs_so_far() - graphs if rt.compiled else 0
        unchanged = rt.broadcast(path.is_file() and hashlib.sha256(read_file(path)).hexdigest() == found if rt.rank == 0 else None)
        run.validity.need(unchanged, "the artifact changed while it was scored")
    if s.selftest:
        selftest(run, s, path, data, val)
    tested = "yes" if run.validity.tests and all(run.validity.tests.values()) else "no"
    run.validity.need_for_record(s.selftest, "the self-test was left out: SELFTEST=0")
    run.validity.share(rt)
    name = f"{s.format}_{scoring_name(s)}"
    verdict = run.validity.verdict() | {"tested": tested}
    run.log("final", f"final_{name} val_loss:{result.loss:.8f} val_bpb:{result.bpb:.8f} eval_time:"
            f"{1e3 * run.clock['eval']:.0f}ms " + " ".join(f"{key}:{_word(value)}" for key, value in verdict.items()),
            name=name, val_loss=result.loss, val_bpb=result.bpb, **verdict)
    run.facts.update(val_bpb=result.bpb, val_loss=result.loss, val_tokens=result.tokens, val_bytes=result.bytes,
                     predictor=name, params=sum(p.numel() for p in model.parameters()), recompiles=recompiled,
                     tested=tested, tests=list(run.validity.tests), val_sha256=text, forwarded_per_token=round(forwarded / result.tokens, 4))
    documents = len(document_ranges(val))
    run.validity.need_for_record(val.whole and documents == 50_000 and abs(result.bytes / FINEWEB_VAL_BYTES - 1) < 1e-4,
                                 f"{result.bytes} validation bytes in {documents} documents; FineWeb's 50,000 documents: "
                                 f"{FINEWEB_VAL_BYTES}")


def graphs_so_far():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def warm_up_scoring(run, predictor, reader):
    """Compile every graph of a scoring on synthetic tokens; returns how many there are in all so far. The limit of an
    evaluation includes this.
    """
    s, device, vocab, began = reader.s, run.rt.device, reader.s.vocab_size, time.monotonic()  # as the artifact has them
    generator = torch.Generator().manual_seed(s.seed)

    def tokens(*shape):
        return torch.randint(vocab, shape, generator=generator).to(device)

    for rows, size, places, step in reader.shapes():
        take = torch.arange(size - places, size, device=device).repeat(rows, 1)  # laid out as the reader's
        inputs = Inputs(tokens(rows, size), take, tokens(rows, predictor.history + places), step)
        chunk = Chunk(inputs, tokens(rows, places), take, rows)
        predictor.nll(inputs, chunk.targets)
        predictor.observe(chunk)
    if predictor.learns:
        count = min(s.ttt_chunk_tokens, len(reader.stream.bytes))
        predictor.rehearse(ValStream(tokens(count + 1).int(), torch.ones(count, dtype=torch.int16, device=device), False))
    predictor.reset()
    run.rt.sync()
    graphs = graphs_so_far()
    run.log("warmup_scoring", graphs=graphs, seconds=round(time.monotonic() - began, 2))
    return graphs


def summarise(run):
    """The last line of log and console: everything a table, a plot or submission.json needs."""
    s, rt, facts, validity = run.s, run.rt, run.facts, run.validity
    validity.share(rt)
    phases = ("train", "calibrate", "export", "eval", "validate", "warmup", "selftest")
    seconds = {f"{name}_seconds": round(run.clock.seconds.get(name, 0.0), 3) for name in phases}
    need, spent = validity.need_for_record, seconds["train_seconds"] + seconds["calibrate_seconds"]
    need("steps" in facts, "not trained in this run")
    need(spent < 600, f"training took {spent:.1f} s, the limit is 600")
    need(seconds["eval_seconds"] < 600, f"evaluation took {seconds['eval_seconds']:.1f} s, the limit is 600")
    need(rt.world == 8 and "H100" in rt.device_name(), f"hardware {rt.world} x {rt.device_name()}, not 8 x H100")
    need("val_bpb" in facts, "not scored in this run")
    need(not validity.reasons, "the score is not valid")
    summary = {**facts, "valid": "yes" if "val_bpb" in facts and not validity.reasons else "no",
               "reasons": validity.reasons, "eligible": "no" if validity.eligible_reasons else "yes",
               "eligible_reasons": validity.eligible_reasons, **seconds, "seed": s.seed, "world_size": rt.world,
               "device": rt.device_name(), "data": Path(s.data_path).name, "settings": s.text(),
               "settings_hash": s.sha256(), "run_id": run.out_dir.name,
               "code_sha256": hashlib.sha256(run.source).hexdigest()}
    try:
        if rt.rank == 0:
            write_atomic(run.out_dir / "summary.json", [to_json(summary, indent=1).encode()])
    except BadInput as error:
        run.log("warning", note=str(error))
    run.log("summary", f"summary {to_json(summary)}", **summary)


def log_header(run, argv):
    """What a reader years later needs: source, commit, versions, device, settings, every automatic choice."""
    log = run.log
    if not log.main:
        return

    def output(*words):
        try:
            folder = Path(__file__).resolve().parent
            done = subprocess.run(words, capture_output=True, timeout=20, cwd=folder,
                                  encoding="utf-8", errors="replace")
            return done.stdout.strip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            return ""

    rule, versions = "=" * 100, f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}"
    running = "".join(linecache.getlines(log_header.__code__.co_filename))  # not __file__, which may be packed
    for text in (running, rule, versions, output("nvidia-smi"), rule):
        log.line(text, console=False)
    log("run", out_dir=run.out_dir, commit=output("git", "rev-parse", "--short=12", "HEAD") or "none",
        changed_files=len(output("git", "status", "--porcelain").splitlines()),
        code_sha256=hashlib.sha256(run.source).hexdigest()[:16], torch=torch.__version__, numpy=np.__version__,
        threads=torch.get_num_threads(), world_size=run.rt.world, command=shlex.join(argv))
    log("settings", f"settings {run.s.text()}".strip(), settings=run.s.text(), settings_hash=run.s.sha256())
    for name, choice, reason in run.rt.choices:
        log("choice", **{name: choice}, reason=reason)
    for name, rule in run.s.idle().items():
        log("warning", setting=name, note=f"has no effect without {rule}")
    for name in doubtful_names(os.environ):
        log("warning", environment=name, note="looks like a setting but is none; STRICT_ENV=1 makes that an error")


def run_phases(s, argv, interrupt=None):
    """Settings to summary, in the order in which data flows; inputs are looked at before anything is built.
    Whatever ends it before its time is the last line of its log. `interrupt`: the Interrupt that is in force.
    """
    if s.artifact:
        s = artifact_settings(s.artifact, read_artifact(s.artifact)[0], s)
    try:
        sp, tokenizer_path, tokenizer_sha256 = load_tokenizer(s)
        for split in ("train", "val") if s.phases != "eval" else ("val",):
            find_shards(s.data_path, split)
    except BadInput as error:
        hint = f". {s.artifact} does not hold the DATA_PATH of its run: repeat that, or its settings file" if s.artifact else ""
        raise BadInput(f"{error}{hint}") from None
    rt, run, held = Runtime(s), None, contextlib.ExitStack()
    held.callback(rt.close)
    interrupt = interrupt or Interrupt()
    try:
        attend = pick_attention(s, rt)
        run, lock = open_run(s, rt, attend)
        if lock:
            held.callback(lock.release)
        log, path = run.log, Path(s.artifact)
        held.enter_context(run.validity.watch(s.data_path))
        log_header(run, argv)
        log("tokenizer", f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={tokenizer_path}",
            path=tokenizer_path, sha256=tokenizer_sha256)
        if changes := text_changes(sp):
            log("warning", tokenizer=tokenizer_path.name, note=changes)
        if s.phases != "eval":
            with run.validity.report(), run.validity.loading():
                val = load_validation(s, rt, sp)
            pattern = f"{s.data_path}/fineweb_val_*.bin"
            log("val_loader", f"val_loader:shards pattern={pattern} tokens:{len(val.bytes)}", tokens=len(val.bytes))
            model = GPT(s, rt.dtype, attend).to(rt.device)
            count = sum(p.numel() for p in model.parameters())
            log("model_params", f"model_params:{count}", params=count)
            moments = train(run, model, val)
            if s.ttt == "prequant":
                train_on_validation(run, model, val)
            path = export(run, model, tokenizer_sha256, moments)
            del model, val, moments  # nothing but the file goes on from here
        interrupt.check()
        run.validity.freeze()
        if s.phases != "train":
            evaluate(run, path)
            interrupt.check()
        summarise(run)
        interrupt.over = True
        if run.last_checkpoint and rt.rank == 0 and not s.checkpoint_every and not run.too_large:
            run.last_checkpoint.unlink(missing_ok=True)
    except BaseException as error:
        ended = _end_of(run, error, interrupt)
        if run:
            known = isinstance(ended, (BadInput, Stopped))
            reason = str(ended) if known else f"{type(ended).__name__} {ended}"
            run.log.line(f"ended reason:{_word(reason)}", console=False)
        if ended is error:
            raise
        raise ended from None
    finally:
        held.close()
    if run.too_large:
        raise Stopped(run.too_large, 3)


def _end_of(run, error, interrupt):
    """The error that ends the run, or, if a signal does, Stopped; with what is kept and how to go on."""
    kept = run.kept if run else ""
    known = isinstance(error, (BadInput, Stopped))
    if interrupt.signal and not known:  # Interrupted, or what a rank meets when another one is gone
        name = signal.Signals(interrupt.signal).name
        kept = kept or "the same command starts again"
        return Stopped(f"interrupted by {name}; {kept}", 128 + interrupt.signal)
    if known and kept:
        return Stopped(f"{error}; {kept}", getattr(error, "code", 2))
    return error


def main(argv):
    """Returns the exit code: 0 done, 2 bad input, 3 artifact too large, 4 not finite, 128 + signal that ended it.
    A console that goes away changes neither the run nor the code.
    """
    with guarded_console():
        if {"--help", "-h"} & set(argv):
            print(Settings.help())
            return 0
        rank, settings, message, code = os.environ.get("RANK", "0"), None, "", 0
        with Interrupt(at_once=True) as interrupt:
            try:
                settings = Settings.parse(argv, os.environ)
                run_phases(settings, argv, interrupt)
            except (BadInput, Stopped) as error:
                message, code = str(error), getattr(error, "code", 2)
            except KeyboardInterrupt:
                message, code = "interrupted", 128 + (interrupt.signal or signal.SIGINT)
        # All ranks have the same wrong settings: one says so.
        for line in message.splitlines() if settings or rank == "0" else ():
            line = f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}"
            print(readable(line), file=sys.stderr, flush=True)
        return code


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:  # under torchrun the traceback of the rank that failed first is the one to show
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    code = main(sys.argv[1:])
    for late in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # nothing is left that they could save
        signal.signal(getattr(signal, late), signal.SIG_IGN)
    sys.exit(code)
