"""One file that trains, averages, quantises, packs, reloads and scores a small GPT for the
Parameter Golf contest: the lowest bits per byte (BPB) that a file of code and compressed weights
can reach in 16,000,000 bytes.

    bash run.sh                                                     the demo: set up, train, score
    torchrun --standalone --nproc_per_node=8 train_gpt.py           the real thing
    python train_gpt.py @records/small.env MATRIX_LR=0.03 SEED=7    with other settings
    python train_gpt.py --help                                      every setting in a sentence

Settings: default < preset of this copy < @file < environment < KEY=VALUE.

The rooms of this file, in reading order
     1 Settings         one frozen dataclass: the field is the environment variable
     2 Model parts      norm, Linear, tables, rotary, gates, n-gram hash, attention, MLP
     3 Model            skips, parallel lanes, layer plan, Block, GPT, objective, roles
     4 Runtime          device, dtype, ranks
     5 Optimizer        Muon and AdamW on 1..N ranks, schedules, weight averages
     6 Data             shards, tokenizer and bytes, training and validation stream
     7 Quantisation     calibration, rounding, GPTQ, LQER, codecs, allocation, late QAT
     8 Entropy coder    of integer codes
     9 Artifact         container, compressors, save, load, size
    10 Evaluation       windows and the one score loop: the definition of the metric
    11 Validity         ledger, examiner, proof of the bytes, self-test
    12 Predictors       what is scored: the model, test-time training, n-grams, the tilt
    13 Invalid originals   techniques of published runs that break the rules
    14 Kernels          attention kernels beside their reference, and the choice of one
    15 Run              clock, console, log, folder, signals
    16 Training         the steps, checkpoints, the training phase
    17 Phases           export, evaluate, summarise, main

Techniques: the setting that turns each one on, and its function or class
    U-Net skips                       SKIPS                   Skips
    depth recurrence                  NUM_LOOPS               depth_recurrence
    parallel lanes                    PARALLEL_RESIDUAL       ParallelLanes
    exclusive self-attention (XSA)    XSA_LAST_N              xsa
    partial RoPE                      ROPE_DIMS               rotate
    LeakyReLU^2                       LEAKY_SLOPE             MLP
    gates on heads                    ATTN_GATE               HeadGate
    value residual                    VALUE_RESIDUAL          ValueResidual
    value embedding                   VE_DIM                  ValueEmbedding
    SmearGate                         SMEAR_GATE              SmearGate
    BigramHash                        BIGRAM_VOCAB_SIZE       BigramHash
    soft caps of the logits           LOGIT_SOFTCAP           GPT.logits
    document mask                     DOC_MASK                find_documents
    multi-token prediction (MTP)      MTP_NUM_HEADS           Objective
    Muon                              MATRIX_OPTIMIZER        MuonAdam
    Newton-Schulz, Polar Express      NEWTON_SCHULZ           newton_schulz
    NorMuon                           NORMUON                 normuon
    warmdown                          WARMDOWN_FRAC           warmdown
    weight decay taper                WD_TAPER_START_FRAC     wd_scale
    complementary training            COMPLEMENT_ALPHA        Complement
    EMA, SWA, LAWA                    AVERAGE                 Average
    EMA start                         EMA_START_FRAC          Average.ema_start
    coprime strides, packing          LOADER                  TokenStream
    GPTQ                              MATRIX_QUANT            gptq
    act-order                         GPTQ_ACT_ORDER          factor_hessian
    SDClip                            MATRIX_CLIP_SIGMAS      row_scales
    AWQ-lite                          AWQ_LITE_GROUP_TOP_K    awq_lite_groups
    LQER                              LQER_RANK               lqer
    calibration on generated text     GPTQ_CALIBRATION        generate
    allocation of bits                FIT                     allocate
    late QAT                          LATE_QAT_THRESHOLD      LateQAT
    soft rounding                     QAT_ROUNDING            FakeQuant
    entropy coder (rANS)              COMPRESSOR              encode_codes
    coder context                     COMPRESSOR              coder_context
    sliding windows                   EVAL_STRIDE             sliding_windows
    kept keys and values              EVAL_CONTEXT            KVCache
    fitted temperature                EVAL_TEMPERATURE        Training.fit_temperature
    score-first TTT                   TTT                     ScoreFirst
    document adapters                 TTT                     DocumentAdapters
    low-rank adapters (LoRA)          TTT_LORA_RANK           Adapters
    phased TTT                        PHASED_TTT_PREFIX_DOCS  ttt_phase_ends
    n-gram backoff                    MIXER                   BackoffMixture
    hedge of n-gram experts           MIXER                   HedgeMixture
    token-only tilt                   TOKEN_BOOST             Tilt
    self-test of the score            SELFTEST                selftest

Axes: B sequences, T positions, D model width, H query heads, K key/value heads, C channels of a
head, V vocabulary. Rooms 7 to 9: N matrices, R rows, C columns; their codes are integer weights.
Rooms 10 to 13: M places of a row, N targets. "#N" is pull request or issue N of
openai/parameter-golf.
"""

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import linecache
import lzma
import math
import os
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
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
from itertools import chain, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

if __name__ == "__main__":
    # If stdout is closed, the next open() would get its number and our prints would land in that
    # file: open the null device there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # This takes the lowest free number, which is the closed one's.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Ctrl-C during the imports ends quietly; main() takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if importlib.util.find_spec("torch") is None:
        print("error: torch is not installed: bash run.sh setup, then .venv/bin/python",
              file=sys.stderr)
        sys.exit(2)
    # Before torch: OpenMP threads that spin while waiting make a shared CPU 5-11x slower, and torch
    # 2.10-2.12 fuse reductions of this architecture badly (+6 ms a step; pytorch PR 179494). Both
    # can be overridden from outside.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PRESET = ""  # KEY=VALUE ...: settings of this copy of the file, written by tools/submit.py pack
CONTEST_LIMIT = 16_000_000  # bytes of code + artifact: decimal, as the contest counts
NORM_EPS = 1.1920929e-07  # explicit: eps=None means another number in other torch versions
BOS = 1  # begins every document of the contest's shards; there is no end-of-document token


class BadInput(Exception):
    """What a user gave cannot be used. Each line of the message names one cause and its fix; exit
    code 2.
    """


class Stopped(Exception):
    """The run ends before its time: what happened, and the exit code."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


def ceil_div(total, size):
    """How many parts of this size hold the total."""
    return -(-total // size)


# --------------------------------------------------------------------------------------------------
# 1 Settings: one frozen dataclass. The field matrix_lr is the environment variable MATRIX_LR.
# --------------------------------------------------------------------------------------------------

Layers = tuple[int, ...]  # "9,10"; an empty value means none
Betas = tuple[float, ...]  # "0.9,0.95"; empty: BETA1,BETA2
# "1024@0.1,2048@1": size@fraction of the run up to which it holds
Schedule = tuple[tuple[int, float], ...]
IntPairs = tuple[tuple[int, int], ...]  # "0@8,10@8": layer@bits, or chunk size@position
Names = tuple[str, ...]  # "q,v,head"; an empty value means none
LISTS = {  # how --help names them
    Layers: "layers",
    Betas: "two numbers",
    Schedule: "size@fraction, ...",
    IntPairs: "number@number, ...",
    Names: "names",
}


class Condition(NamedTuple):
    """One condition of an `on` rule, such as ve_dim, average=swa|best or ttt!=lora_docs."""

    setting: str  # the field
    values: tuple[str, ...] = ()  # as text; none: the setting is neither 0 nor empty
    negated: bool = False  # none of the values

    def holds(self, value):
        if not self.values:
            return bool(value)
        text = format_value(value).removesuffix(".0")  # the number 0.0 is "0" in a rule
        words = set(value) if isinstance(value, tuple) else {text}
        met = bool(words & set(self.values))  # of a list, one of its words is enough
        return met != self.negated


def parse_rule(text):
    """((Condition, ...), ...) of an `on` rule: one tuple for each alternative."""
    alternatives = []
    for alternative in text.split(",") if text else ():
        conditions = []
        for condition in alternative.split("&"):
            setting, equals, values = condition.partition("=")
            negated = setting.endswith("!")
            words = tuple(values.split("|")) if equals else ()
            conditions.append(Condition(setting.removesuffix("!"), words, negated))
        alternatives.append(tuple(conditions))
    return tuple(alternatives)


def opt(group, default, doc, lo=None, hi=None, on="", code=""):
    """A field of Settings: its default, its sentence in --help, its bounds.

    `code` names the function or class that a reader of the setting wants to see. `on` is the rule
    without which the setting does nothing:

        rule        = alternative {"," alternative}    one of them must hold
        alternative = condition {"&" condition}        all of them must hold
        condition   = setting                          it is neither 0 nor empty
                    | setting "=" value {"|" value}    it has one of these values
                    | setting "!=" value {"|" value}   it has none of them

    Where a condition's setting waits for a rule of its own, that rule must hold, too.
    """
    metadata = dict(group=group, doc=doc, lo=lo, hi=hi, on=parse_rule(on), code=code)
    return field(default=default, metadata=metadata)


# Rules that several settings share; come back here where `on=` names one.
GATE_OF_A_WINDOW = "attn_gate=head|sparse,smear_gate=scalar"
SKIPPING = "skips!=none"
TWO_LANES = "parallel_residual=lanes|routed"
TWO_LANES_SKIPPING = f"{TWO_LANES}&{SKIPPING}"
MUON = "matrix_optimizer=muon"
ADAMW_MATRICES = "matrix_optimizer=adamw"
SEPARATE_HEADS = "tie_embeddings=0,mtp_num_heads"
STAGED = "train_seq_schedule,train_batch_schedule"
FALLING_LR = "warmdown_frac,warmdown_iters,warmdown_seconds"
FIXED_GRID = "fit!=allocate&matrix_quant!=ternary"
FIXED_EMBED_GRID = "fit!=allocate&embed_quant!=ternary"
ANY_FIXED_GRID = f"{FIXED_GRID},{FIXED_EMBED_GRID}"
GPTQ = "matrix_quant=gptq,embed_quant=gptq"
# What calibration serves. needs_curvature looks at the bits, too: it says whether it takes place.
CALIBRATED = f"{GPTQ},fit=allocate,lqer_rank,awq_lite_group_top_k"
RESERVED = f"{CALIBRATED},eval_temperature=0,average=best"
ONE_STREAM = "ttt!=lora_docs"
WINDOWS = f"eval_context=window&{ONE_STREAM}"
STREAM_TTT = "ttt=full|lora"
DOCS_TTT = "ttt=lora_docs"
ADAPTERS = "ttt=lora|lora_docs"
WEIGHTS_TTT = "ttt=full|before|prequant,phased_ttt_prefix_docs"
BATCHED_TTT = "ttt=full|before|prequant|lora,phased_ttt_prefix_docs"
NGRAMS = "mixer!=off"
LEARNS_BY_CHUNK = f"{STREAM_TTT},{NGRAMS},token_boost"
LEARNS_BY_GROUP = (f"ttt_warm_start_a,{DOCS_TTT}&{NGRAMS},{DOCS_TTT}&token_boost,"
                   "phased_ttt_prefix_docs&ttt_lora_a=own")
ENTROPY_WEIGHT = "mixer=backoff|hashed"

_run = partial(opt, "Run")
_data = partial(opt, "Data")
_model = partial(opt, "Model")
_train = partial(opt, "Training")
_average = partial(opt, "Averaging")
_pack = partial(opt, "Quantisation and packing")
_eval = partial(opt, "Evaluation")


class Stage(NamedTuple):
    """Length and batch of the training up to a fraction of the run."""

    until: float
    length: int  # of a sequence
    tokens: int  # of a step, over all ranks


@dataclass(frozen=True)
class Settings:
    """Everything a person chooses. MATRIX_LR in a command is the field matrix_lr; derived values
    are properties.
    """

    run_id: str = _run("", "name of the run; empty: date, time, settings hash and seed")
    out_dir: str = _run(
        "", "folder for everything the run writes; empty: logs/RUN_ID", code="make_folder")
    seed: int = _run(
        1337, "seed of the initial weights, the order of the training text and all that is drawn",
        0)
    phases: Literal["all", "train", "eval"] = _run(
        "all", "train: stop after the artifact; eval: only score ARTIFACT", code="run_phases")
    artifact: str = _run("", "artifact that PHASES=eval scores", code="load_artifact")
    resume: str = _run(
        "", "auto: newest whole checkpoint of OUT_DIR, if any; or a checkpoint file, which after the "
        "last step is packed and scored as the settings now say",
        code="checkpoint_to_resume")
    checkpoint_every: int = _run(
        0, "steps between checkpoints; 0: only when interrupted, and at the end of training; -1: "
        "none at all",
        -1, code="Training.save")
    train_log_every: int = _run(200, "steps between train lines in the log", 1, code="log_loss")
    val_loss_every: int = _run(
        1000, "steps between validations, outside the clock; 0: only at the end",
        0, code="report_score")
    device: Literal["auto", "cuda", "cpu"] = _run(
        "auto", "where to compute; auto: CUDA where there is one", code="Runtime")
    dtype: Literal["auto", "float32", "bfloat16"] = _run(
        "auto", "type of the activations; auto: bfloat16 on CUDA, else float32", code="Runtime")
    compile: Literal["auto", "on", "off"] = _run(
        "auto", "torch.compile; auto: on CUDA only", code="Runtime.compile")
    attention: Literal["auto", "fa3", "cudnn", "flash", "math"] = _run(
        "auto", "attention kernel; auto: the first that passes a check", code="pick_attention")
    kernels: Literal["auto", "off", "require"] = _run(
        "auto", "fused kernels; off: only those of torch; require: a fallback is an error",
        code="pick_attention")
    strict_env: bool = _run(
        False, "a doubtful name in the environment is an error, not a warning",
        code="doubtful_names")

    data_path: str = _data(
        "data/datasets/fineweb10B_sp1024", "folder with fineweb_train_*.bin and fineweb_val_*.bin",
        code="find_shards")
    tokenizer_path: str = _data(
        "", "SentencePiece model; empty: DATA_PATH/tokenizer.model, else the contest's place",
        code="load_tokenizer")
    vocab_size: int = _data(1024, "vocabulary of tokenizer and shards", 8, 65536)
    val_tokens: int = _data(
        0, "score only the first N validation targets (never record-eligible); 0: all",
        0, code="load_validation")

    num_layers: int = _model(11, "physical transformer blocks", 1, 256, code="layer_plan")
    model_dim: int = _model(512, "width of the residual stream", 8, 16384)
    num_heads: int = _model(8, "query heads", 1, 512, code="Attention")
    num_kv_heads: int = _model(
        4, "key/value heads (grouped-query attention)", 1, 512, code="Attention")
    mlp_mult: float = _model(
        3.0, "hidden width of the MLP as a multiple of MODEL_DIM", 0.25, 16, code="MLP")
    leaky_slope: float = _model(
        0.5, "MLP activation leaky_relu(x, slope)^2; 0 is ReLU^2 (#549)", 0, 1, code="MLP")
    logit_softcap: float = _model(
        30.0, "logits = cap * tanh(logits / cap); 0: no cap", 0, code="GPT.logits")
    asym_logit_rescale: bool = _model(
        False, "one cap for positive and one for negative logits, which test-time training of the "
        "weights moves apart (#1923)",
        on=WEIGHTS_TTT, code="LogitCaps")
    tie_embeddings: bool = _model(
        True, "the token table is also the head; 0: a head of its own, which begins at zero",
        code="GPT")
    embed_dim: int = _model(
        0, "width of a factorised token table, which is projected to MODEL_DIM; 0: MODEL_DIM",
        0, 16384, code="GPT")
    tied_embed_init_std: float = _model(
        0.005, "initial standard deviation of the token table", 0, code="Embedding")
    qk_gain_init: float = _model(
        1.5, "initial gain of the normalised queries, learned for each head", 0, code="Attention")
    rope_dims: int = _model(
        16, "channels of a head that rotate with position (partial RoPE); the others carry none",
        0, 1024, code="rotate")
    rope_base: float = _model(
        22081.8, "rotary base at every length: 10000 * 2^(8/7), the NTK rule at 2048",
        1, on="rope_dims", code="rotary_tables")
    xsa_last_n: int = _model(
        4, "exclusive self-attention (XSA) on the last N layers (#265)", 0, 256, code="xsa")
    attn_gate: Literal["none", "head", "dense", "sparse"] = _model(
        "none", "gate on the output of each head (head #1667, dense #1736, sparse #1787)",
        code="HeadGate")
    gate_window: int = _model(
        12, "channels that ATTN_GATE=head|sparse and SMEAR_GATE=scalar read",
        1, 16384, on=GATE_OF_A_WINDOW, code="HeadGate")
    sparse_attn_gate_scale: float = _model(
        1.0, "factor inside the sigmoid of ATTN_GATE=sparse",
        0, on="attn_gate=sparse", code="HeadGate")
    value_residual: Literal["none", "vrl", "pair", "sigmoid"] = _model(
        "none", "add layer 0's values to those of later layers (vrl #1033, pair #1311, sigmoid "
        "#1539)",
        code="ValueResidual")
    ln_scale: bool = _model(True, "scale the normed input of layer i by 1/sqrt(i+1)", code="Block")
    resid_mix: bool = _model(
        True, "each block starts from a learned mix of the stream and the first embedding",
        code="Block")
    skips: Literal["none", "linear", "sigmoid", "gated"] = _model(
        "linear", "U-Net skips (sigmoid #1539, gated #1394)", code="Skips")
    skip_pairs: int = _model(
        0, "largest number of U-Net skips; 0: half the visits of the longest plan",
        0, 256, on=SKIPPING, code="layer_plan")
    num_loops: int = _model(
        0, "depth recurrence: further passes over layers LOOP_START..LOOP_END (#1394)",
        0, 16, code="depth_recurrence")
    loop_start: int = _model(3, "depth recurrence: first layer of the loop", 0, 255, on="num_loops")
    loop_end: int = _model(5, "depth recurrence: last layer of the loop", 0, 255, on="num_loops")
    loop_order: Literal["range", "layer"] = _model(
        "range", "depth recurrence: visit the loop as 3,4,5,3,4,5 or, layer by layer, as "
        "3,3,4,4,5,5 (layer, #1033)",
        on="num_loops", code="depth_recurrence")
    enable_looping_at: float = _model(
        0.35, "depth recurrence: fraction of the run after which it is on",
        0, 0.999, on="num_loops", code="Training.enter")
    parallel_residual: Literal["none", "gptj", "lanes", "routed"] = _model(
        "none", "attention next to the MLP: on one stream (gptj, #1412), on two parallel lanes "
        "(lanes, #1539), on two lanes with learned routing (routed, #1529)",
        code="ParallelLanes")
    parallel_start_layer: int = _model(
        7, "first layer of PARALLEL_RESIDUAL",
        0, 255, on="parallel_residual!=none", code="layer_plan")
    parallel_first_skip: Literal["both", "lane0"] = _model(
        "both", "the U-Net skip of the first layer with two lanes enters both (#1529), or lane 0 "
        "alone (lane0, #1855)",
        on=TWO_LANES_SKIPPING, code="layer_plan")
    parallel_final_lane: Literal["mean", "learned"] = _model(
        "mean", "how the two lanes are merged after the last layer",
        on=TWO_LANES, code="ParallelLanes")
    smear_gate: Literal["none", "channel", "scalar"] = _model(
        "channel", "SmearGate, a mix of each embedding with the one before: a gate for each "
        "channel, or one computed from GATE_WINDOW channels (scalar, #1667)",
        code="SmearGate")
    doc_mask: Literal["none", "inputs", "attention"] = _model(
        "inputs", "what stops at the beginning of a document: nothing; SmearGate and n-gram hash "
        "(inputs, #1855); attention, too (attention, #1530)",
        code="find_documents")
    bigram_vocab_size: int = _model(
        2048, "BigramHash: rows of the hashed bigram table; 0: off", 0, 2**24, code="BigramHash")
    bigram_dim: int = _model(
        128, "BigramHash: width of the bigram table",
        1, 16384, on="bigram_vocab_size", code="BigramHash")
    trigram: bool = _model(
        False, "BigramHash: add the row of the hashed trigram in the same table (#1539)",
        on="bigram_vocab_size", code="hash_ngrams")
    trigram_vocab_size: int = _model(
        0, "rows of a hashed trigram table of its own (#1311); 0: off", 0, 2**24, code="BigramHash")
    trigram_dim: int = _model(
        128, "width of that trigram table", 1, 16384, on="trigram_vocab_size", code="BigramHash")
    ve_dim: int = _model(
        128, "width of the value embedding table; 0: off", 0, 16384, code="ValueEmbedding")
    ve_layers: Layers = _model(
        (9, 10), "layers whose values get the value embedding",
        on="ve_dim", code="Attention.project_values")

    iterations: int = _train(20000, "stop after N steps; 0: no limit", 0)
    max_wallclock_seconds: float = _train(
        600.0, "stop before the training clock passes this; 0: no limit", 0, code="Clock")
    train_batch_tokens: int = _train(786432, "tokens of a step over all ranks", 1)
    train_batch_schedule: Schedule = _train(
        (), "tokens of a step in stages, such as 196608@0.2,786432@1; replaces TRAIN_BATCH_TOKENS",
        code="Settings.stages")
    train_seq_len: int = _train(2048, "length of a training sequence", 2, 2**20)
    train_seq_schedule: Schedule = _train(
        (), "length of a training sequence in stages, such as 1024@0.1,2048@1 (#2014); replaces "
        "TRAIN_SEQ_LEN",
        code="Settings.stages")
    seq_change_warmup_steps: int = _train(
        0, "steps over which the learning rate rises again in a new stage",
        0, on=STAGED, code="lr_scale")
    micro_batch_tokens: int = _train(
        98304, "largest number of tokens that a rank forwards at once, or of a packed row",
        1, code="TokenStream")
    loader: Literal["sequential", "coprime", "shuffled", "packed"] = _train(
        "sequential", "order of the training text: as it is; blocks by coprime strides (coprime, "
        "#1060); shuffled blocks (shuffled, #1394); in order, in long rows whose documents do not "
        "see each other (packed, #1530)",
        code="TokenStream")
    warmup_steps: int = _train(
        3, "steps on synthetic tokens that compile everything and are undone",
        0, code="Training.warm_up")
    lr_warmup_steps: int = _train(
        0, "steps over which the learning rate rises from 0", 0, code="lr_scale")
    warmdown_frac: float = _train(
        0.5, "last fraction of the run in which the learning rate falls linearly",
        0, 1, code="warmdown")
    warmdown_iters: int = _train(
        0, "length of the warmdown in (estimated) steps; replaces WARMDOWN_FRAC when > 0",
        0, code="warmdown")
    warmdown_seconds: float = _train(
        0.0, "length of the warmdown in seconds; replaces WARMDOWN_FRAC when > 0",
        0, code="warmdown")
    min_lr: float = _train(
        0.0, "floor of the warmdown as a fraction of the peak learning rate",
        0, 1, on=FALLING_LR, code="warmdown")
    matrix_optimizer: Literal["muon", "adamw"] = _train(
        "muon", "optimizer of the matrices", code="update_rules")
    matrix_lr: float = _train(0.025, "learning rate of the matrices", 0, code="update_rules")
    scalar_lr: float = _train(
        0.025, "learning rate of gains, gates and scales (AdamW)", 0, code="update_rules")
    tied_embed_lr: float = _train(
        0.035, "learning rate of the embedding tables (AdamW) with TIE_EMBEDDINGS=1",
        0, on="tie_embeddings", code="update_rules")
    embed_lr: float = _train(
        0.6, "learning rate of the embedding tables (AdamW) with TIE_EMBEDDINGS=0",
        0, on="tie_embeddings=0", code="update_rules")
    head_lr: float = _train(
        0.008, "learning rate of an untied head and of MTP heads (AdamW)",
        0, on=SEPARATE_HEADS, code="update_rules")
    muon_momentum: float = _train(
        0.99, "Nesterov momentum of Muon", 0, 0.9999, on=MUON, code="MuonAdam")
    muon_momentum_warmup_start: float = _train(
        0.92, "momentum of Muon at the first step",
        0, 0.9999, on="muon_momentum_warmup_steps", code="momentum_at")
    muon_momentum_warmup_steps: int = _train(
        1500, "steps over which the momentum rises to MUON_MOMENTUM",
        0, on=MUON, code="momentum_at")
    muon_backend_steps: int = _train(
        5, "Newton-Schulz iterations of Muon", 1, 20, on=MUON, code="newton_schulz")
    newton_schulz: Literal["classic", "polar_express"] = _train(
        "classic", "coefficients of the Newton-Schulz iterations", on=MUON, code="newton_schulz")
    muon_row_normalize: bool = _train(
        False, "MuonEq-R: rows of the update get norm 1 before the Newton-Schulz iterations "
        "(#1285)",
        on=MUON, code="newton_schulz")
    normuon: bool = _train(
        False, "NorMuon: each row of the update is divided by the root of its running mean square, "
        "after the Newton-Schulz iterations",
        on=MUON, code="normuon")
    muon_beta2: float = _train(
        0.95, "decay of NorMuon's second moment", 0, 0.99999, on="normuon", code="normuon")
    muon_wd: float = _train(0.04, "decoupled weight decay of the matrices", 0, code="update_rules")
    adam_wd: float = _train(
        0.04, "decoupled weight decay of gains, gates and scales", 0, code="update_rules")
    embed_wd: float = _train(
        0.04, "decoupled weight decay of the embedding tables", 0, code="update_rules")
    head_wd: float = _train(
        0.0, "decoupled weight decay of an untied head and of MTP heads",
        0, on=SEPARATE_HEADS, code="update_rules")
    wd_taper_start_frac: float = _train(
        0.0, "fraction of the run after which MUON_WD changes (#1729); 0: off",
        0, 0.999, code="wd_scale")
    wd_taper_final_mult: float = _train(
        0.5, "multiple of MUON_WD at the end of the run",
        0, 10, on="wd_taper_start_frac", code="wd_scale")
    beta1: float = _train(0.9, "decay of AdamW's first moment", 0, 0.9999, code="adamw")
    beta2: float = _train(0.95, "decay of AdamW's second moment", 0, 0.99999, code="adamw")
    matrix_betas: Betas = _train(
        (), "AdamW's two decays for the matrices; empty: BETA1,BETA2",
        on=ADAMW_MATRICES, code="update_rules")
    embed_betas: Betas = _train(
        (), "AdamW's two decays for the embedding tables; empty: BETA1,BETA2", code="update_rules")
    head_betas: Betas = _train(
        (), "AdamW's two decays for an untied head and MTP heads; empty: BETA1,BETA2",
        on=SEPARATE_HEADS, code="update_rules")
    adam_eps: float = _train(
        1e-8, "AdamW: added to the root of the second moment", 1e-20, code="adamw")
    grad_clip_norm: float = _train(
        0.3, "clip the global gradient (all ranks, all parameters) to this norm; 0: off",
        0, code="MuonAdam")
    complement_alpha: float = _train(
        0.0, "complementary training: tokens that bigram counts predict weigh less (#1033); 0: off",
        0, 1, code="Complement")
    mtp_num_heads: int = _train(
        0, "multi-token prediction (MTP): heads that predict further tokens in training and are "
        "not exported; 0: off",
        0, 16, code="Objective")
    mtp_loss_weight: float = _train(
        0.2, "weight of the mean loss of the MTP heads", 0, on="mtp_num_heads", code="Objective")

    average: Literal["none", "ema", "swa", "lawa", "best"] = _average(
        "ema", "weights that are exported: the last; a running mean (ema); the mean of all "
        "snapshots (swa) or of the last ones (lawa); the best of these on held-out training text",
        code="Average")
    ema_decay: float = _average(
        0.997, "EMA: decay of the running mean, per step",
        0, 0.999999, on="average=ema|best", code="Average")
    ema_start_frac: float = _average(
        0.0, "EMA start: fraction of the run; 0: from the initial weights",
        0, 0.999, on="average=ema|best", code="Average.ema_start")
    swa_every: int = _average(
        50, "SWA: steps between snapshots", 1, on="average=swa|best", code="Average")
    swa_start_scale: float = _average(
        0.2, "SWA: snapshots are taken once the warmdown is below this fraction of the peak "
        "learning rate",
        0, 1, on="average=swa|best", code="Average")
    lawa_freq: int = _average(
        100, "LAWA: steps between snapshots", 1, on="average=lawa|best", code="Average")
    lawa_k: int = _average(
        10, "LAWA: number of last snapshots that are averaged",
        1, 100, on="average=lawa|best", code="Average")
    holdout_tokens: int = _average(
        2**20, "tokens at the end of the training stream that choose the best average and are not "
        "trained on",
        2, on="average=best", code="TokenStream.hold_out")

    fit: Literal["off", "prune", "allocate"] = _pack(
        "allocate", "how the artifact is fitted to SIZE_LIMIT: not at all; by zeroing the cheapest "
        "codes; by allocation of bits: every step size by what its error costs",
        code="allocate")
    matrix_quant: Literal["rtn", "gptq_lite", "gptq", "ternary"] = _pack(
        "gptq", "rounding of the matrices: to nearest, clipped at the row's maximum (rtn) or best "
        "percentile (gptq_lite); errors fed forward (gptq); to -1, 0, 1 (ternary, BitNet)",
        code="gptq")
    matrix_bits: int = _pack(
        6, "bits of a matrix weight: 2 to 8, or 16 for float16",
        2, 16, on=FIXED_GRID, code="storage")
    attn_bits: int = _pack(
        0, "bits of a weight of q, k, v, o; 0: MATRIX_BITS", 0, 16, on=FIXED_GRID, code="storage")
    mlp_bits: int = _pack(
        0, "bits of a weight of the MLP; 0: MATRIX_BITS", 0, 16, on=FIXED_GRID, code="storage")
    layer_bits: IntPairs = _pack(
        (), "bits of whole layers, such as 0@8,10@8; goes before ATTN_BITS and MLP_BITS",
        on=FIXED_GRID, code="storage")
    matrix_clip_sigmas: float = _pack(
        0.0, "SDClip: clip rows of matrices at this number of standard deviations (#1394); 0: as "
        "MATRIX_QUANT does",
        0, 100, on=FIXED_GRID, code="row_scales")
    attn_clip_sigmas: float = _pack(
        0.0, "SDClip of q, k, v, o; 0: MATRIX_CLIP_SIGMAS",
        0, 100, on=FIXED_GRID, code="row_scales")
    mlp_clip_sigmas: float = _pack(
        0.0, "SDClip of the MLP; 0: MATRIX_CLIP_SIGMAS", 0, 100, on=FIXED_GRID, code="row_scales")
    embed_quant: Literal["rtn", "gptq_lite", "gptq", "ternary"] = _pack(
        "gptq", "rounding of the embedding tables, as MATRIX_QUANT", code="gptq")
    embed_bits: int = _pack(
        8, "bits of an embedding weight: 2 to 8, or 16", 2, 16, on=FIXED_EMBED_GRID, code="storage")
    embed_clip_sigmas: float = _pack(
        0.0, "SDClip of the embedding tables; 0: as EMBED_QUANT does",
        0, 100, on=FIXED_EMBED_GRID, code="row_scales")
    gate_bits: int = _pack(
        16, "bits of a weight of ATTN_GATE, by row (#1736): 2 to 8, or 16",
        2, 16, on="attn_gate!=none", code="storage")
    proj_bits: int = _pack(
        0, "bits of matrices outside the layers: projections of n-gram, value and token tables; 0: "
        "MATRIX_BITS",
        0, 16, on=FIXED_GRID, code="storage")
    clip_floor: float = _pack(
        0.0, "least magnitude at which a row is clipped: 1 in the early records (#414)",
        0, 100, on=ANY_FIXED_GRID, code="row_scales")
    awq_lite_group_top_k: int = _pack(
        0, "AWQ-lite: number of groups of columns, the most salient ones, that get AWQ_LITE_BITS "
        "(#1908); 0: off",
        0, 1000, on=ANY_FIXED_GRID, code="awq_lite_groups")
    awq_lite_bits: int = _pack(
        8, "AWQ-lite: bits of a salient group",
        3, 8, on="awq_lite_group_top_k", code="awq_lite_groups")
    awq_lite_group_size: int = _pack(
        64, "AWQ-lite: neighbouring columns of a salient group",
        1, 2**16, on="awq_lite_group_top_k", code="awq_lite_groups")
    prune_pct: float = _pack(
        0.0, "share of each quantised tensor, its smallest weights, that becomes 0 before "
        "rounding; 0.1: a tenth (#967)",
        0, 0.99, code="Quantiser")
    gptq_damp: float = _pack(
        0.01, "GPTQ: share of the mean of a Hessian's diagonal that is added to it",
        1e-6, 10, on=GPTQ, code="factor_hessian")
    gptq_act_order: bool = _pack(
        True, "GPTQ act-order: round columns in the order of the Hessian's falling diagonal",
        on=GPTQ, code="factor_hessian")
    gptq_block_size: int = _pack(
        128, "GPTQ: columns whose errors are fed forward together (speed only)",
        1, 2**16, on=GPTQ, code="gptq")
    gptq_calibration: Literal["train", "generated"] = _pack(
        "train", "text of the calibration: further training text, or text that the model writes "
        "(generated, #1019)",
        on=CALIBRATED, code="generate")
    gptq_calibration_tokens: int = _pack(
        2**20, "tokens of the calibration text, rounded up to whole training steps",
        1, on=CALIBRATED, code="Training.calibrate")
    gptq_temperature: float = _pack(
        0.8, "temperature of the calibration text that the model writes",
        0.01, 10, on="gptq_calibration=generated", code="generate")
    gptq_reserve_seconds: float = _pack(
        0.0, "seconds of MAX_WALLCLOCK_SECONDS that are kept for the calibration; 0: as measured "
        "in warm-up",
        0, on=RESERVED, code="Training.measure_reserve")
    lqer_rank: int = _pack(
        0, "LQER: rank of a low-rank correction of the worst tensors (#1797); 0: off",
        0, 256, code="lqer")
    lqer_top_k: int = _pack(
        3, "LQER: number of tensors that get a correction, if it helps",
        1, 1000, on="lqer_rank", code="lqer")
    lqer_asym_group: int = _pack(
        64, "LQER: weights of the second factor that share a step size",
        1, 2**16, on="lqer_rank", code="lqer")
    late_qat_threshold: float = _pack(
        0.0, "late QAT: train on rounded weights below this fraction of the peak learning rate; 0: "
        "off",
        0, 1, code="LateQAT")
    qat_rounding: Literal["ste", "soft"] = _pack(
        "ste", "late QAT: gradients pass the rounding straight through (ste), or a smooth step "
        "that steepens (soft, #967)",
        on="late_qat_threshold", code="FakeQuant")
    compressor: Literal["auto", "rans", "brotli", "zstd", "lzma", "zlib"] = _pack(
        "rans", "compressor; rans: the codes by our entropy coder and its coder context, the rest "
        "by lzma; auto: the smallest for each stream",
        code="encode_codes")
    size_limit: int = _pack(
        CONTEST_LIMIT, "most bytes of code + artifact; beyond it: scored, but exit code 3",
        1, CONTEST_LIMIT, code="export")

    eval_seq_len: int = _eval(
        2048, "length of an evaluation window", 2, 2**20, code="sliding_windows")
    eval_stride: int = _eval(
        64, "sliding windows: tokens from one to the next; 0: contiguous windows",
        0, on=WINDOWS, code="sliding_windows")
    eval_batch_seqs: int = _eval(
        32, "rows that a rank scores at once (changes speed, never the score)", 1, code="Reader")
    eval_docs: bool = _eval(
        False, "each document is read on its own: nothing before its BOS is seen",
        on=ONE_STREAM, code="Reader")
    eval_context: Literal["window", "cache"] = _eval(
        "window", "what a token sees: a window that is forwarded anew; or kept keys and values, so "
        "that every token sees the EVAL_SEQ_LEN up to itself",
        code="KVCache")
    eval_temperature: float = _eval(
        1.0, "divisor of the logits; 0: fitted on training text, in the training clock",
        0, 10, code="Training.fit_temperature")
    ttt: Literal["off", "full", "lora", "lora_docs", "before", "prequant"] = _eval(
        "off", "test-time training: of the weights on scored chunks (full, #549), of adapters on "
        "scored chunks (lora), of document adapters (lora_docs, #1530); invalid: before scoring "
        "(before, #518), before quantisation (prequant, #1539)",
        code="make_predictor")
    ttt_chunk_tokens: int = _eval(
        32768, "targets that are scored before anything learns from them",
        1, on=LEARNS_BY_CHUNK, code="Reader")
    ttt_epochs: int = _eval(
        3, "TTT: passes over a chunk (over the whole text with TTT=before|prequant, over the "
        "documents so far in phased TTT)",
        1, on=BATCHED_TTT, code="Adaptation.fit")
    ttt_batch_seqs: int = _eval(
        32, "TTT: sequences of EVAL_SEQ_LEN in a gradient step, over all ranks",
        1, on=BATCHED_TTT, code="Adaptation.fit")
    ttt_optimizer: Literal["sgd", "adamw"] = _eval(
        "sgd", "TTT: optimizer of the weights", on=WEIGHTS_TTT, code="adaptation_of_weights")
    ttt_lr: float = _eval(
        0.002, "TTT: learning rate of the weights, which falls by a cosine over the chunks, or in "
        "phased TTT over the steps of each phase",
        0, on=WEIGHTS_TTT, code="adaptation_of_weights")
    ttt_min_lr: float = _eval(
        0.0, "TTT: final learning rate as a fraction of the first",
        0, 1, on=BATCHED_TTT, code="ttt_lr_scale")
    ttt_momentum: float = _eval(
        0.9, "TTT: momentum of SGD",
        0, 0.9999, on="ttt_optimizer=sgd", code="adaptation_of_weights")
    ttt_grad_clip: float = _eval(
        1.0, "TTT: clip the global gradient to this norm; 0: off",
        0, on=BATCHED_TTT, code="Adaptation")
    ttt_lr_mult_proj: float = _eval(
        1.0, "TTT: multiple of TTT_LR for o and the MLP's down (#518)",
        0, on=WEIGHTS_TTT, code="adaptation_of_weights")
    ttt_lr_mult_fc: float = _eval(
        1.0, "TTT: multiple of TTT_LR for the MLP's up (#518)",
        0, on=WEIGHTS_TTT, code="adaptation_of_weights")
    ttt_freeze_blocks: int = _eval(
        0, "TTT: number of first blocks that do not learn",
        0, 256, on=WEIGHTS_TTT, code="adaptation_of_weights")
    ttt_freeze_embed: bool = _eval(
        False, "TTT: embedding tables and head do not learn (#967)",
        on=WEIGHTS_TTT, code="adaptation_of_weights")
    ttt_train_scales: bool = _eval(
        False, "TTT: gains and scales of frozen blocks learn all the same (#967)",
        on="ttt_freeze_blocks", code="adaptation_of_weights")
    adaptive_lr_max: float = _eval(
        1.0, "TTT: multiple to which learning rates rise over the first 30 % of the chunks (#967)",
        0.01, 100, on=STREAM_TTT, code="ScoreFirst")
    byte_weighted_ttt: bool = _eval(
        False, "TTT: tokens weigh as much as they have bytes (#967)",
        on=BATCHED_TTT, code="Adaptation")
    polyak_decay: float = _eval(
        0.0, "TTT: score with a running mean of what is learned (#967); 0: off",
        0, 0.999999, on=STREAM_TTT, code="ScoreFirst")
    ttt_lora_rank: int = _eval(8, "adapters: rank", 1, 1024, on=ADAPTERS, code="Adapters")
    ttt_lora_alpha: float = _eval(
        0.0, "adapters: the product B A is scaled by alpha / rank; 0: not scaled",
        0, on=ADAPTERS, code="lora")
    ttt_lora_targets: Names = _eval(
        ("q", "v", "head"),
        "adapters: what gets one, of q, k, v, o, attn, mlp, head; attn: the whole attention, from "
        "its input (#1530)",
        on=ADAPTERS, code="Adapters")
    ttt_lora_scaled: bool = _eval(
        False, "adapters of o, attn and mlp are multiplied by attn_scale or mlp_scale, as the "
        "layers are (#1530)",
        on="ttt_lora_targets=o|attn|mlp", code="add_adapter")
    ttt_lora_a: Literal["shared", "own"] = _eval(
        "shared", "adapters: all documents begin with one A; or each place of TTT_GROUP_DOCS has "
        "its own, drawn anew after a phase of phased TTT (own, #1530)",
        on=DOCS_TTT, code="DocumentAdapters")
    ttt_lora_lr: float = _eval(
        0.01, "adapters: learning rate of AdamW", 0, on=ADAPTERS, code="DocumentAdapters")
    ttt_beta1: float = _eval(
        0.9, "adapters: decay of AdamW's first moment", 0, 0.9999, on=ADAPTERS, code="adamw")
    ttt_beta2: float = _eval(
        0.95, "adapters: decay of AdamW's second moment", 0, 0.99999, on=ADAPTERS, code="adamw")
    ttt_wd: float = _eval(0.0, "adapters: decoupled weight decay", 0, on=ADAPTERS, code="adamw")
    ttt_chunk_size: int = _eval(
        48, "TTT=lora_docs: targets of a document between two steps of its adapters",
        1, 2**20, on=DOCS_TTT, code="Reader")
    ttt_short_chunks: IntPairs = _eval(
        (), "adapters: fewer targets between two steps where a document begins, such as "
        "8@256,24@2000: size@place up to which it holds",
        on=DOCS_TTT, code="Reader")
    ttt_batch_size: int = _eval(
        64, "documents that a rank reads side by side (speed only)",
        1, 4096, on=DOCS_TTT, code="Reader")
    ttt_warm_start_a: bool = _eval(
        False, "adapters: A begins at the mean of those with which the last TTT_GROUP_DOCS "
        "documents ended, or with TTT_LORA_A=own where that of the same place did (#1767)",
        on=DOCS_TTT, code="DocumentAdapters")
    ttt_group_docs: int = _eval(
        512, "documents, over all ranks, that are scored before n-grams, the tilt or a warm start "
        "learn from them; with phased TTT, own starts (TTT_LORA_A) are drawn anew after them",
        1, on=LEARNS_BY_GROUP, code="Reader")
    phased_ttt_prefix_docs: int = _eval(
        0, "phased TTT: number of documents, the longest ones, from which the weights learn "
        "(#1610); 0: off",
        0, on=DOCS_TTT, code="ttt_phase_ends")
    phased_ttt_num_phases: int = _eval(
        1, "phased TTT: phases in which those documents are reached (#1626)",
        1, 100, on="phased_ttt_prefix_docs", code="ttt_phase_ends")
    mixer: Literal["off", "backoff", "hedge", "hashed"] = _eval(
        "off", "n-grams counted in the scored text: n-gram backoff over all orders, weighted by "
        "the model's entropy; experts weighed by their record (hedge, #967); invalid: hashes of "
        "the target (hashed, #1033)",
        code="NgramMixture")
    ngram_order: int = _eval(10, "longest n-gram of MIXER", 2, 64, on=NGRAMS, code="NgramCounts")
    mixer_experts: Names = _eval(
        ("unigram", "bigram", "trigram"),
        "experts next to the model: unigram, bigram, trigram, backoff; invalid: entropy",
        on="mixer=hedge", code="NgramMixture")
    mixer_eta: float = _eval(
        0.1, "learning rate of the hedge: an expert's log weight falls by this times its mean loss",
        0, on="mixer=hedge", code="NgramMixture")
    mixer_min_tokens: int = _eval(
        10000, "targets that are scored before n-grams are used", 0, on=NGRAMS, code="NgramMixture")
    alpha_base: float = _eval(
        0.2, "weight of the n-grams where the model is certain",
        0, 1, on=ENTROPY_WEIGHT, code="ngram_weight")
    alpha_range: float = _eval(
        0.55, "added to ALPHA_BASE where the model is not certain: times sigmoid(2 (entropy - "
        "ALPHA_CENTER))",
        0, 1, on=ENTROPY_WEIGHT, code="ngram_weight")
    alpha_center: float = _eval(
        3.0, "entropy in nats at which half of ALPHA_RANGE is added",
        0, on=ENTROPY_WEIGHT, code="ngram_weight")
    ngram_buckets: int = _eval(
        4194304, "buckets of a table of MIXER=hashed",
        2, 2**30, on="mixer=hashed", code="HashedMixture")
    min_count: int = _eval(
        2, "occurrences of a bucket before MIXER=hashed believes it",
        1, on="mixer=hashed", code="HashedMixture")
    token_boost: float = _eval(
        0.0, "token-only tilt (#1514): logit added to the likely next token after TOKEN_ORDER-1 "
        "equal ones; 0: off",
        0, 50, code="Tilt")
    token_order: int = _eval(
        16, "token-only tilt: order of its n-grams", 2, 64, on="token_boost", code="Tilt")
    token_threshold: float = _eval(
        0.8, "token-only tilt: least share of the occurrences that the next token must have",
        0, 1, on="token_boost", code="Tilt")
    allow_invalid: bool = _eval(
        False, "let techniques run whose score is not valid, and say so everywhere",
        code="Validity")
    selftest: bool = _eval(
        True, "test the predictor that scored, a line for each test; a record needs it",
        code="selftest")

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
    def needs_curvature(self):
        """Does anything about the artifact depend on calibration (Curvature)?"""
        all_bits = [self.matrix_bits, self.attn_bits, self.mlp_bits, self.proj_bits]
        all_bits += [bits for _, bits in self.layer_bits]
        rounds_matrices = any(bits not in (0, 16) for bits in all_bits)  # 0: as MATRIX_BITS says
        matrices_by_gptq = self.matrix_quant == "gptq" and rounds_matrices
        tables_by_gptq = self.embed_quant == "gptq" and self.embed_bits != 16
        chooses = self.fit == "allocate" or self.lqer_rank > 0 or self.awq_lite_group_top_k > 0
        return chooses or matrices_by_gptq or tables_by_gptq

    @property
    def needs_reserve(self):
        """Does anything after the last step take a part of the training clock?"""
        return self.needs_curvature or self.eval_temperature == 0 or self.average == "best"

    @property
    def format(self):
        """How matrices are stored, for names of scores."""
        if self.fit == "allocate":
            return "allocated"
        if self.matrix_quant == "ternary":
            return "ternary"
        return "float16" if self.matrix_bits == 16 else f"int{self.matrix_bits}"

    @property
    def stages(self):
        """[Stage]: both schedules merged."""
        if not self.train_seq_schedule and not self.train_batch_schedule:
            return [Stage(1.0, self.train_seq_len, self.train_batch_tokens)]
        lengths = self.train_seq_schedule or ((self.train_seq_len, 1.0),)
        batches = self.train_batch_schedule or ((self.train_batch_tokens, 1.0),)

        def value_at(schedule, fraction):
            for value, end in schedule:
                if fraction <= end:
                    return value
            return schedule[-1][0]

        ends = sorted({end for _, end in (*lengths, *batches)})
        return [Stage(end, value_at(lengths, end), value_at(batches, end)) for end in ends]

    @property
    def longest_row(self):
        """Length of the longest row that the model ever meets."""
        if self.loader != "packed":
            return self.longest_sequence
        largest_step = max(stage.tokens for stage in self.stages)
        packed_row = min(self.micro_batch_tokens, largest_step)
        return max(packed_row, self.longest_sequence)

    @property
    def longest_sequence(self):
        """Longest span that attention covers; longer documents are cut."""
        return max(self.eval_seq_len, *(stage.length for stage in self.stages))

    @property
    def keeps_checkpoints(self):
        """May a run that ended early be continued?"""
        return self.checkpoint_every >= 0

    @property
    def trains_before_scoring(self):
        """Does the loaded model train on the text that it then scores? Invalid: see room 13."""
        return self.ttt == "before"

    @property
    def trains_before_packing(self):
        """Does the trained model train on that text before it is packed? Invalid: see room 13."""
        return self.ttt == "prequant"

    def idle(self):
        """{changed setting: what it waits for}: settings without effect, such as VE_LAYERS while
        VE_DIM=0.
        """
        waiting = {}
        for f in fields(self):
            changed = getattr(self, f.name) != f.default
            if changed and not self.holds(f.metadata["on"]):
                waiting[f.name.upper()] = describe_rule(f.metadata["on"])
        return waiting

    def holds(self, rule):
        """Does an `on` rule (see opt) hold? holds(rule("ve_layers")): has VE_LAYERS an effect?

        One alternative must hold, each of whose settings has an effect itself. An empty rule
        holds.
        """
        def met(condition):
            value = getattr(self, condition.setting)
            return condition.holds(value) and self.holds(self.rule(condition.setting))

        return not rule or any(all(map(met, alternative)) for alternative in rule)

    @classmethod
    def rule(cls, name):
        """The `on` rule of a field."""
        return cls.__dataclass_fields__[name].metadata["on"]

    @classmethod
    def parse(cls, args=(), env=None, preset=PRESET):
        """Settings from a list of KEY=VALUE or @file, a mapping of environment variables, and a
        text of KEY=VALUE below both.

        Files and arguments are strict: an unknown name is an error. In the environment a near miss
        is one (a shell has variables of its own; see doubtful_names). Raises BadInput that lists
        every complaint, one a line.
        """
        known = {f.name.upper(): f for f in fields(cls)}
        complaints = []
        from_files = dict(word.split("=", 1) for word in shlex.split(preset))
        from_args = {}
        for arg in args:
            is_file = arg.startswith("@")
            pairs = _file_pairs(arg[1:], complaints) if is_file else [("argument", arg)]
            for where, pair in pairs:
                name, equals, value = pair.partition("=")
                if not equals:
                    complaints.append(f"{where}: {pair!r} is not KEY=VALUE (or @file)")
                elif name not in known:
                    complaints.append(f"{where}: {_unknown(name, known)}")
                elif is_file:
                    from_files[name] = value
                else:
                    from_args[name] = value
        env = env or {}
        from_env = {name: value for name, value in env.items() if name in known}

        values = {}
        wrong = []
        for name, text in {**from_files, **from_env, **from_args}.items():
            try:
                values[known[name].name] = parse_value(known[name], text)
            except ValueError as error:
                complaints.append(f"{name}={text}: {error}")
                wrong.append(name)
        settings = cls(**values)
        for name in env:
            problem = None if name in known else _why_not_env(name, known, settings.strict_env)
            if problem:
                complaints.append(f"environment: {problem}")
        # A conflict with a setting whose value is wrong would be about its default, which nobody
        # asked for.
        for conflict in _conflicts(settings, given=set(values)):
            if not any(re.search(rf"\b{name}\b", conflict) for name in wrong):
                complaints.append(conflict)
        if complaints:
            raise BadInput("\n".join(complaints))
        return settings

    def text(self):
        """The settings that were changed, as one line of KEY=VALUE that parse accepts."""
        pairs = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                pairs.append(shlex.quote(f"{f.name.upper()}={format_value(value)}"))
        return " ".join(pairs)

    def experiment(self, until="eval"):
        """{name: value as text} of every setting outside the group Run: equal for the runs of
        one experiment. `until` leaves out what is read only later: "train" has what the trained
        weights depend on, "export" what the artifact depends on.
        """
        chosen = [f for f in fields(self)
                  if f.metadata["group"] != "Run" and not self._is_read_after(until, f)]
        return {f.name.upper(): format_value(getattr(self, f.name)) for f in chosen}

    def _is_read_after(self, phase, f):
        """Is this field first read after the last step ("train"), or after packing ("export")?"""
        if f.metadata["group"] == "Quantisation and packing":
            trains_on_codes = self.late_qat_threshold > 0 or f.name == "late_qat_threshold"
            return phase == "train" and not trains_on_codes
        if f.metadata["group"] != "Evaluation":
            return False
        if phase == "train":
            # Packed rows are cut into spans as long as the longest window.
            return not (f.name == "eval_seq_len" and self.loader == "packed")
        fits = self.eval_temperature == 0 and f.name == "eval_temperature"
        chooses = self.average == "best" and f.name == "eval_seq_len"
        return phase == "export" and not (fits or chooses or self.trains_before_packing)

    def sha256(self):
        """Hash of experiment(), the same for every seed."""
        lines = [f"{name}={value}" for name, value in self.experiment().items()]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    @classmethod
    def help(cls):
        lines = [__doc__.split("\nThe rooms")[0]]
        group = None
        preset = cls.parse()
        for f in fields(cls):
            about = f.metadata
            if about["group"] != group:
                group = about["group"]
                lines.append(f"\n{group}")
            if get_origin(f.type) is Literal:
                kind = "|".join(get_args(f.type))
            else:
                kind = LISTS.get(f.type) or f.type.__name__
            if about["lo"] is not None:
                kind += f" {about['lo']}..{'' if about['hi'] is None else about['hi']}"
            value = format_value(getattr(preset, f.name))
            setting = f"{f.name.upper()}={value or '(empty)'}"
            line = f"  {setting:<42} {about['doc']}  [{kind}]"
            if about["on"]:
                line += f" with {describe_rule(about['on'])}"
            if about["code"]:
                line += f" -> {about['code']}"
            lines.append(line)
        return "\n".join(lines)


def describe_rule(rule):
    """An `on` rule as a user would type it: AVERAGE=swa|best, VE_DIM, or NORMUON with
    MATRIX_OPTIMIZER=muon.
    """
    def describe(condition):
        text = condition.setting.upper()
        if condition.values:
            text += ("!=" if condition.negated else "=") + "|".join(condition.values)
        further = Settings.rule(condition.setting)
        return f"{text} with {describe_rule(further)}" if further else text

    return " or ".join(" and ".join(map(describe, alternative)) for alternative in rule)


# ---- values as text ------------------------------------------------------------------------------


def format_value(value):
    """A value as a user types it: 1 for True, 1024@0.1,2048@1 for stages."""
    if isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, tuple):
        return str(value)
    parts = []
    for part in value:
        words = part if isinstance(part, tuple) else (part,)
        parts.append("@".join(map(str, words)))
    return ",".join(parts)


def parse_value(f, text):
    """The value of the setting of field f; ValueError says what would be right."""
    if get_origin(f.type) is Literal:
        return _parse_choice(get_args(f.type), text)
    if f.type is bool:
        if text not in ("0", "1", "true", "false"):
            raise ValueError("0 or 1")
        return text in ("1", "true")
    if f.type in LISTS:
        return _parse_list(f.type, text)
    if f.type is str:
        return text
    return _parse_number(f.type, text, f.metadata["lo"], f.metadata["hi"])


# A choice of other scripts: what it may mean here.
ALSO_CALLED = {"0": ("none", "off"), "pergroup": ("rans",)}


def _parse_choice(choices, text):
    if text in choices:
        return text
    meant = [choice for choice in choices if choice in ALSO_CALLED.get(text, ())]
    near = meant or difflib.get_close_matches(text, choices, 1, 0.5)
    advice = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"one of {', '.join(choices)}{advice}")


def _parse_list(kind, text):
    read, example = {
        Layers: (int, "layer numbers separated by commas, such as 9,10"),
        Betas: (float, "numbers separated by commas, such as 0.9,0.99"),
        Schedule: (_pair_reader(float),
                   "size@fraction separated by commas, such as 1024@0.1,2048@1"),
        IntPairs: (_pair_reader(int), "number@number separated by commas, such as 0@8,10@8"),
        Names: (str, "names separated by commas"),
    }[kind]
    try:
        return tuple(read(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(example) from None


def _pair_reader(second):
    def read(text):
        before, _, after = text.partition("@")
        return int(before), second(after)

    return read


def _parse_number(kind, text, lo, hi):
    whole = kind is int
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ValueError("a whole number" if whole else "a number") from None
    largest = 2**63 - 1 if whole else 1e30  # float32 holds it, and its products with small numbers
    most = largest if hi is None else hi
    if not lo <= value <= most:  # also false for nan
        if hi is None:
            raise ValueError(f"at least {lo}, and at most {most}")
        raise ValueError(f"between {lo} and {hi}")
    return value


# ---- impossible combinations ---------------------------------------------------------------------


def _conflicts(s, given):
    """Impossible combinations, in words that name the settings and their values; `given`: fields
    that were set.
    """
    conflicts = []
    _model_conflicts(s, conflicts.append)
    _training_conflicts(s, given, conflicts.append)
    _run_conflicts(s, conflicts.append)
    _packing_conflicts(s, conflicts.append)
    _missing_packages(s, conflicts.append)
    _evaluation_conflicts(s, conflicts.append)
    return conflicts


def _model_conflicts(s, complain):
    if s.model_dim % s.num_heads:
        complain(f"MODEL_DIM={s.model_dim} is not a multiple of NUM_HEADS={s.num_heads}")
    if s.num_heads % s.num_kv_heads:
        complain(f"NUM_HEADS={s.num_heads} is not a multiple of NUM_KV_HEADS={s.num_kv_heads}")
    if s.rope_dims % 2 or s.rope_dims > s.head_dim:
        complain(f"ROPE_DIMS={s.rope_dims} must be even and at most "
                 f"MODEL_DIM/NUM_HEADS={s.head_dim}")
    if abs(s.mlp_mult * s.model_dim - s.mlp_hidden) >= 1e-6:
        complain(f"MLP_MULT={s.mlp_mult} times MODEL_DIM={s.model_dim} is not a whole number")
    if s.xsa_last_n > s.num_layers:
        complain(f"XSA_LAST_N={s.xsa_last_n} exceeds NUM_LAYERS={s.num_layers}")
    if s.ve_dim and not all(0 <= layer < s.num_layers for layer in s.ve_layers):
        complain(f"VE_LAYERS={format_value(s.ve_layers)} names a layer outside "
                 f"0..NUM_LAYERS-1={s.num_layers - 1}")
    if s.ve_dim and not s.ve_layers:
        complain(f"VE_DIM={s.ve_dim} but VE_LAYERS is empty; VE_DIM=0 turns them off")
    for name in ("bigram_vocab_size", "trigram_vocab_size"):
        if getattr(s, name) == 1:
            complain(f"{name.upper()}=1 leaves no bucket beside the reserved one; 0 turns it off")
    if s.gate_window > s.model_dim and s.holds(s.rule("gate_window")):
        complain(f"GATE_WINDOW={s.gate_window} exceeds MODEL_DIM={s.model_dim}")
    if s.loops and not s.loop_start <= s.loop_end < s.num_layers:
        complain(f"LOOP_START={s.loop_start} LOOP_END={s.loop_end} is no range of layers "
                 f"0..{s.num_layers - 1}")
    if s.asym_logit_rescale and not s.logit_softcap:
        complain("ASYM_LOGIT_RESCALE=1 rescales the cap of LOGIT_SOFTCAP, which is 0")
    _lane_conflicts(s, complain)


def _lane_conflicts(s, complain):
    """PARALLEL_*: what would learn or change nothing."""
    if s.parallel_residual == "none":
        return
    if s.parallel_start_layer >= s.num_layers:
        complain(f"PARALLEL_START_LAYER={s.parallel_start_layer}: there is no such layer "
                 f"(NUM_LAYERS={s.num_layers})")
    last_layer = s.num_layers - 1
    visits = [*layer_plan(s, looping=False), *layer_plan(s, looping=s.loops)]
    pops_at_split = any(visit.split and visit.pop is not None for visit in visits)
    visited_again = s.loops and s.loop_end == last_layer
    last_layer_alone = s.parallel_start_layer == last_layer and not visited_again
    skip_tells_lanes_apart = s.parallel_first_skip == "lane0" and pops_at_split
    learned_merge = s.parallel_residual == "routed" and s.parallel_final_lane == "learned"
    if learned_merge and last_layer_alone and not skip_tells_lanes_apart:
        complain("PARALLEL_FINAL_LANE=learned learns nothing from "
                 f"PARALLEL_START_LAYER={s.parallel_start_layer}: the last layer alone leaves two "
                 "equal lanes; mean is the same")
    lane0 = s.parallel_first_skip == "lane0" and s.holds(parse_rule(TWO_LANES_SKIPPING))
    if lane0 and not pops_at_split:
        complain("PARALLEL_FIRST_SKIP=lane0 changes nothing: no skip enters where the lanes part, "
                 f"PARALLEL_START_LAYER={s.parallel_start_layer}")


def _training_conflicts(s, given, complain):
    if s.loader == "packed" and s.doc_mask != "attention":
        complain("LOADER=packed puts many documents in a row: it needs DOC_MASK=attention, not "
                 f"{s.doc_mask}")
    if s.complement_alpha and s.vocab_size > 16384:
        complain(f"COMPLEMENT_ALPHA={s.complement_alpha} counts pairs of tokens: "
                 f"VOCAB_SIZE={s.vocab_size} exceeds 16384")
    _stage_conflicts(s, complain)
    for name in ("matrix_betas", "embed_betas", "head_betas"):
        betas = getattr(s, name)
        two_decays = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        if betas and not two_decays:
            complain(f"{name.upper()}={format_value(betas)}: two numbers from 0 to below 1, such "
                     "as 0.9,0.99")
    warmdowns = [name for name in ("warmdown_iters", "warmdown_frac", "warmdown_seconds")
                 if getattr(s, name) and name in given]
    if len(warmdowns) > 1:
        pairs = [f"{name.upper()}={format_value(getattr(s, name))}" for name in warmdowns]
        complain(f"{' and '.join(pairs)} say the same; make all but one of them 0")
    if s.warmdown_seconds and not s.max_wallclock_seconds:
        complain(f"WARMDOWN_SECONDS={s.warmdown_seconds} counts back from MAX_WALLCLOCK_SECONDS, "
                 "which is 0")
    if s.average == "best" and s.holdout_tokens <= s.eval_seq_len:
        complain(f"HOLDOUT_TOKENS={s.holdout_tokens} is less than a window of "
                 f"EVAL_SEQ_LEN={s.eval_seq_len}")


def _stage_conflicts(s, complain):
    """Lengths and batches of training, in each stage."""
    for name, least in (("train_seq_schedule", 2), ("train_batch_schedule", 1)):
        schedule = getattr(s, name)
        ends = [end for _, end in schedule]
        rising = sorted(set(ends)) == ends
        sizes_fit = all(size >= least for size, _ in schedule)
        if schedule and not (rising and ends[0] > 0 and ends[-1] == 1 and sizes_fit):
            complain(f"{name.upper()}={format_value(schedule)}: sizes, at fractions of the run "
                     "that rise to 1")
    lengths = [stage.length for stage in s.stages]
    where = " in a stage" if s.train_seq_schedule or s.train_batch_schedule else ""
    for _, length, tokens in s.stages:
        if not length or tokens % length:
            complain(f"TRAIN_BATCH_TOKENS={tokens} is not a multiple of "
                     f"TRAIN_SEQ_LEN={length}{where}")
        if s.micro_batch_tokens < length:
            complain(f"MICRO_BATCH_TOKENS={s.micro_batch_tokens} is less than one sequence, "
                     f"TRAIN_SEQ_LEN={length}{where}")
        deals_blocks = s.loader in ("coprime", "shuffled")
        if deals_blocks and (not length or max(lengths) % length):
            complain(f"LOADER={s.loader} deals out blocks of the longest sequence: {max(lengths)} "
                     f"of TRAIN_SEQ_SCHEDULE is no multiple of {length}")
    if s.mtp_num_heads >= min(lengths):
        complain(f"MTP_NUM_HEADS={s.mtp_num_heads} look beyond the end of "
                 f"TRAIN_SEQ_LEN={min(lengths)}{where}")


def _run_conflicts(s, complain):
    if not s.iterations and not s.max_wallclock_seconds:
        complain("ITERATIONS=0 and MAX_WALLCLOCK_SECONDS=0: this run never ends")
    if s.resume == "auto" and not (s.run_id or s.out_dir):
        complain("RESUME=auto needs the RUN_ID or OUT_DIR of the run to continue")
    if s.resume and not s.keeps_checkpoints:
        complain(f"RESUME={s.resume} and CHECKPOINT_EVERY={s.checkpoint_every}: a run that keeps "
                 "no checkpoints is not continued")
    if (s.phases == "eval") != bool(s.artifact):
        complain(f"PHASES={s.phases} and ARTIFACT={s.artifact or '(empty)'}: PHASES=eval needs an "
                 "ARTIFACT, and nothing else reads one")


def _packing_conflicts(s, complain):
    for name in ("matrix_bits", "attn_bits", "mlp_bits", "proj_bits", "embed_bits", "gate_bits"):
        bits = getattr(s, name)
        falls_back = bits == 0 and name in ("attn_bits", "mlp_bits", "proj_bits")
        if not _storable(bits) and not falls_back:
            complain(f"{name.upper()}={bits}: bits are 2 to 8, or 16")
    layer_bits = f"LAYER_BITS={format_value(s.layer_bits)}"
    for _, bits in s.layer_bits:
        if not _storable(bits):
            complain(f"{layer_bits}: bits are 2 to 8, or 16")
    layers = [layer for layer, _ in s.layer_bits]
    if len(set(layers)) < len(layers) or not all(0 <= layer < s.num_layers for layer in layers):
        complain(f"{layer_bits} names a layer twice, or one outside "
                 f"0..NUM_LAYERS-1={s.num_layers - 1}")
    if s.awq_lite_group_top_k and s.awq_lite_group_size > s.model_dim:
        complain(f"AWQ_LITE_GROUP_SIZE={s.awq_lite_group_size} exceeds MODEL_DIM={s.model_dim}, "
                 "the columns of most matrices")
    for name in ("matrix_quant", "embed_quant"):
        method = getattr(s, name)
        if s.fit == "allocate" and method not in ("rtn", "gptq"):
            complain(f"FIT=allocate chooses the grid, so {name.upper()} says only how to round to "
                     f"it: rtn or gptq, not {method}")


# What a COMPRESSOR needs beyond Python.
PACKAGES = {"auto": ("zstandard", "brotli"), "zstd": ("zstandard",), "brotli": ("brotli",)}


def _missing_packages(s, complain):
    for package in PACKAGES.get(s.compressor, ()):
        if not importlib.util.find_spec(package):
            complain(f"COMPRESSOR={s.compressor} needs {package}: pip install {package}")
        elif package == "brotli" and not _unpacks_within_bounds():
            complain(f"COMPRESSOR={s.compressor} needs brotli 1.2 or later: pip install -U brotli")


def _unpacks_within_bounds():
    """Does the installed brotli know a limit of its output, as version 1.2 and later do?"""
    import brotli
    major, minor = brotli.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (1, 2)


def _storable(bits):
    return 2 <= bits <= 8 or bits == 16


# Settings whose score is not valid (room 13), and the condition that they break (C1 to C4, room
# 11).
INVALID = {
    "ttt=before": "TTT=before trains on the text before scoring it (C3; #518)",
    "ttt=prequant": "TTT=prequant trains on the text before scoring it (C3; #1539)",
    "mixer=hashed": "MIXER=hashed looks targets up in a hash of themselves (C2; #1033)",
    "mixer=hedge&mixer_experts=entropy": "MIXER_EXPERTS=entropy is no distribution (C2; #967)",
}


def _evaluation_conflicts(s, complain):
    for rule, why in INVALID.items():
        if s.holds(parse_rule(rule)) and not s.allow_invalid:
            complain(f"{why}: ALLOW_INVALID=1 runs it, and calls the score invalid")
    if s.eval_stride > s.eval_seq_len:
        complain(f"EVAL_STRIDE={s.eval_stride} exceeds EVAL_SEQ_LEN={s.eval_seq_len}")
    if s.trains_before_packing and s.phases == "eval":
        complain("TTT=prequant happens before the artifact, and PHASES=eval after it")
    if s.alpha_base + s.alpha_range >= 1 + 1e-12 and s.holds(s.rule("alpha_range")):
        complain(f"ALPHA_BASE={s.alpha_base} and ALPHA_RANGE={s.alpha_range} come to more than 1, "
                 "which is all the weight there is")
    known = {"ttt_lora_targets": ("q", "k", "v", "o", "attn", "mlp", "head"),
             "mixer_experts": ("unigram", "bigram", "trigram", "backoff", "entropy")}
    for setting, words in known.items():
        names = getattr(s, setting)
        named_twice = len(set(names)) < len(names)
        if not names or named_twice or not set(names) <= set(words):
            complain(f"{setting.upper()}={format_value(names)}: some of {','.join(words)}, each "
                     "once")
    _adaptation_conflicts(s, complain)


def _adaptation_conflicts(s, complain):
    short_chunks = f"TTT_SHORT_CHUNKS={format_value(s.ttt_short_chunks)}"
    short_sizes = [size for size, _ in s.ttt_short_chunks]
    if s.ttt == "lora_docs" and max(s.ttt_chunk_size, *short_sizes, 0) > s.eval_seq_len:
        complain(f"TTT_CHUNK_SIZE={s.ttt_chunk_size} {short_chunks}: no chunk may exceed "
                 f"EVAL_SEQ_LEN={s.eval_seq_len}")
    if not all(size > 0 for size in short_sizes):
        complain(f"{short_chunks}: sizes are positive")
    all_blocks_frozen = s.ttt_freeze_blocks >= s.num_layers and s.holds(s.rule("ttt_freeze_blocks"))
    if all_blocks_frozen and s.ttt_freeze_embed:
        complain(f"TTT_FREEZE_BLOCKS={s.ttt_freeze_blocks} of NUM_LAYERS={s.num_layers} and "
                 "TTT_FREEZE_EMBED=1 leave hardly anything to learn")
    if s.phased_ttt_prefix_docs and s.phased_ttt_num_phases > s.phased_ttt_prefix_docs:
        complain(f"PHASED_TTT_NUM_PHASES={s.phased_ttt_num_phases} exceeds "
                 f"PHASED_TTT_PREFIX_DOCS={s.phased_ttt_prefix_docs}")


# ---- settings from outside: files, environment, names of other scripts ---------------------------


def _file_pairs(path, complaints):
    """(where, KEY=VALUE) of each assignment in a settings file, or in settings.env of a record
    folder.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "settings.env"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        complaints.append(f"@{path}: cannot be read ({reason})")
        return
    # Decoded like sys.argv, so that a path with an accent is the same in a file and as an argument.
    lines = os.fsdecode(text.encode()).splitlines()
    seen = set()
    for number, line in enumerate(lines, 1):
        try:
            pairs = shlex.split(line, comments=True)
        except ValueError as error:
            complaints.append(f"{path}:{number}: {error}")
            continue
        for pair in pairs:
            name = pair.partition("=")[0]
            if name in seen:
                complaints.append(f"{path}:{number}: {name} is set twice in this file")
            seen.add(name)
            yield f"{path}:{number}", pair


def _unknown(name, known):
    """What is to be said of a name that is no setting."""
    renamed = other_names()
    if name in renamed:
        return f"{name} is no setting here: {renamed[name]}"
    if name.startswith(FOREIGN):
        return f"{name} is a switch of other contest scripts; this one does not have it"
    near = difflib.get_close_matches(name.upper(), known, 1, 0.6)
    return f"unknown setting {name}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _why_not_env(name, known, strict):
    """The complaint about an environment variable that is no setting; None if it is harmless."""
    if name in COMMON:
        return None
    # Before others' names: TORCH_COMPILE is one of those. Before the spelling: TTT_EVAL_SEQ_LEN is
    # no misspelt EVAL_SEQ_LEN.
    if name in other_names() or name.startswith(FOREIGN):
        return _unknown(name, known)
    if name.startswith(ELSEWHERE):
        return None
    near = difflib.get_close_matches(name, known, 1, 0.85)
    if near:
        return (f"{name} is not a setting; did you mean {near[0]}? (unset it if it is not meant "
                "for this script)")
    if strict and doubtful_names([name]):
        return f"{name} looks like a setting but is none (STRICT_ENV=1)"
    return None


def doubtful_names(env):
    """Names in the environment that are made only of words of our settings, such as MODEL_LR, but
    are no setting.
    """
    known = {f.name.upper() for f in fields(Settings)}
    words = {word for name in known for word in name.split("_")}

    def doubtful(name):
        several_words = "_" in name and words.issuperset(name.split("_"))
        known_elsewhere = name in COMMON or name.startswith(ELSEWHERE)
        return several_words and name not in known and not known_elsewhere

    return sorted(filter(doubtful, env))


# Beginnings of names that other programs read or set: OMP_NUM_THREADS is near MTP_NUM_HEADS,
# torchrun sets GROUP_RANK, PARALLEL_SEQ is GNU parallel's.
ELSEWHERE = ("OMP_", "MKL_", "NCCL_", "CUDA_", "TORCH", "PARALLEL_SEQ", "GROUP_RANK")
# Common in shells, so no error: the log says that the trainer does not read it.
COMMON = ("DATA_DIR",)
# How the names of the contest's other techniques begin: they are meant for a trainer, and not read
# here.
FOREIGN = tuple("""
    AGREE_ CACHE_ALPHA CALIBRATE_TEMP CROWN_Q DTG_ GATED_ATTN_ NGRAM_HINT PPM_ALPHA PREQUANT_
    QTTT ROPE_YARN SKYLIGHT_ SLOT_ SOFT_ROUND SPARSE_ATTN_GATE_INIT TTT_GRAD_STEPS TTT_HASH
    TTT_LORA_EMA TTT_MAX_CHUNKS TTT_UPDATE_EVERY TTT_WARM_START_MEAN USE_CACHE WITHIN_ WORD_
""".split())

# Settings of other published scripts that have another name here, and what to write instead.
OTHER_NAMES = """
    VE_ENABLED: VE_DIM=0 turns value embeddings off
    EMA_ENABLED: AVERAGE=ema
    SWA_ENABLED: AVERAGE=swa (beside EMA it did nothing in #549)
    TORCH_COMPILE: COMPILE
    VAL_BATCH_SIZE: EVAL_BATCH_SEQS
    LR_FLOOR: MIN_LR
    NO_COMPILE: COMPILE=off
    LEAKY_RELU NEGATIVE_SLOPE LEAKY_RELU_SQ_SLOPE: LEAKY_SLOPE
    COMPRESS_METHOD: COMPRESSOR
    DATA_DIR: DATA_PATH, the folder of the shards
    FORCE_STOP_STEP: ITERATIONS
    FUSED_CE_ENABLED: KERNELS; the loss is the same
    SKYLIGHT_MUON: NORMUON (0 is NORMUON=0)
    TRAIN_SEQ_SCHEDULE_MODE: TRAIN_SEQ_SCHEDULE, whose fractions are of the clock or of ITERATIONS
    SMEAR_GATE_ENABLED: SMEAR_GATE=scalar
    EVAL_ONLY TTT_EVAL_ONLY TTT_ONLY: PHASES=eval ARTIFACT=file
    EMBEDDING_DIM: EMBED_DIM
    ROPE_TRAIN_SEQ_LEN: ROPE_BASE, the base in force at every length
    VRL_ENABLED: VALUE_RESIDUAL=vrl
    ATTN_OUT_GATE_ENABLED: ATTN_GATE=head
    GATED_ATTN_ENABLED GATED_ATTENTION: ATTN_GATE=dense
    SPARSE_ATTN_GATE_ENABLED: ATTN_GATE=sparse
    SKIP_GATES_ENABLED: SKIPS=gated
    SIGMOID_SKIPS: SKIPS=sigmoid
    SMEAR_GATE_BOS_FIX: DOC_MASK=inputs
    RECUR_LAYERS: NUM_LOOPS=1 LOOP_START=first LOOP_END=last
    DEPTH_RECURRENCE: NUM_LOOPS=1 LOOP_ORDER=layer
    DEPTH_RECUR_LAYERS: LOOP_START, LOOP_END with LOOP_ORDER=layer
    DEPTH_RECUR_PASSES: NUM_LOOPS (one less)
    RECUR_START_STEP: ENABLE_LOOPING_AT, a fraction of the run
    MUONEQ_R: MUON_ROW_NORMALIZE
    PARALLEL_RESIDUAL_START: PARALLEL_RESIDUAL=gptj PARALLEL_START_LAYER
    LAWA_ENABLED: AVERAGE=lawa
    COMPILE_SHAPE_WARMUP: WARMUP_STEPS, which compiles every stage
    LATE_QAT QAT_ENABLED: LATE_QAT_THRESHOLD
    SOFT_ROUND_QAT: QAT_ROUNDING=soft
    SDCLIP_ENABLED SDCLIP_K_INT6: MATRIX_CLIP_SIGMAS
    SDCLIP_K_INT8: EMBED_CLIP_SIGMAS
    INT6_LAST_N: LAYER_BITS
    TARGET_MB: SIZE_LIMIT, in bytes, with FIT=prune or allocate
    GATED_ATTN_QUANT_GATE: GATE_BITS=8
    GPTQ_CALIBRATION_BATCHES GPTQ_CALIB_BATCHES: GPTQ_CALIBRATION_TOKENS, of all ranks together
    GPTQ_CALIB_SEQS: GPTQ_CALIBRATION_TOKENS with GPTQ_CALIBRATION=generated
    LQER_ENABLED: LQER_RANK=4
    LQER_ASYM_ENABLED LQER_FACTOR_BITS: LQER_RANK, whose factors always have 2 and 4 bits
    LQER_GAIN_SELECT: LQER_TOP_K, which always goes by what the loss feels
    LQER_GROUP_SIZE: LQER_ASYM_GROUP
    AWQ_LITE_ENABLED: AWQ_LITE_GROUP_TOP_K=1 (0: off)
    TTT_ENABLED: TTT=full, or TTT=lora_docs with adapters of each document
    TTT_USE_LORA: TTT=lora
    TTT_LORA_ENABLED: TTT=lora_docs
    TTT_EVAL_SEQ_LEN: EVAL_SEQ_LEN
    TTT_TEMPERATURE: EVAL_TEMPERATURE
    TTT_MASK: TTT_LORA_TARGETS
    TTT_Q_LORA: TTT_LORA_TARGETS with q
    TTT_K_LORA: TTT_LORA_TARGETS with k
    TTT_V_LORA: TTT_LORA_TARGETS with v
    TTT_O_LORA: TTT_LORA_TARGETS with attn
    TTT_MLP_LORA: TTT_LORA_TARGETS with mlp
    TTT_LM_HEAD_LORA: TTT_LORA_TARGETS with head
    TTT_LOCAL_LR_MULT: TTT_LORA_LR, times it
    TTT_WEIGHT_DECAY: TTT_WD
    TTT_SHORT_SCORE_FIRST_ENABLED TTT_SHORT_SCORE_FIRST_STEPS: TTT_SHORT_CHUNKS such as 8@256
    TTT_SHORT_CHUNK_SIZE TTT_SHORT_DOC_LEN: TTT_SHORT_CHUNKS such as 8@256,24@2000
    PREQUANT_TTT_ENABLED: TTT=prequant
    PREQUANT_TTT_EPOCHS GLOBAL_TTT_EPOCHS: TTT_EPOCHS
    PREQUANT_TTT_LR GLOBAL_TTT_LR: TTT_LR
    PHASED_TTT_ENABLED: PHASED_TTT_PREFIX_DOCS
    GLOBAL_TTT_MOMENTUM: TTT_MOMENTUM
    GLOBAL_TTT_GRAD_CLIP: TTT_GRAD_CLIP
    GLOBAL_TTT_BATCH_SEQS: TTT_BATCH_SEQS
    ADAPTIVE_LR: ADAPTIVE_LR_MAX
    USE_POLYAK: POLYAK_DECAY
    USE_MIXER: MIXER=hedge
    USE_HEDGE_MIXER: MIXER=backoff (as #1033 computed it: MIXER=hashed, which is invalid)
    SKIP_SLIDING SKIP_SLIDING_WINDOW: EVAL_STRIDE=0
    EVAL_INCLUDE_TAIL: what always happens: the tail is scored
    CASEOPS_ENABLED: DATA_PATH: shards with a byte sidecar are CaseOps
    NGRAM_TILT_ENABLED: TOKEN_BOOST
"""


@cache
def other_names():
    """{name of a published command: what to write instead}, from OTHER_NAMES."""
    answers = {}
    for line in OTHER_NAMES.strip().splitlines():
        names, _, answer = line.partition(": ")
        answers.update(dict.fromkeys(names.split(), answer))
    return answers


# --------------------------------------------------------------------------------------------------
# 2 Model parts
# Every module that creates a parameter states its role; optimizer, codec and compression group are
# tables over roles. Weights are fp32 masters, cast to the activation dtype where they are used;
# there is no autocast.
# --------------------------------------------------------------------------------------------------


class Docs(NamedTuple):
    """Where documents begin. One object for everything that must not look across a boundary."""

    first: Tensor  # (B, T) bool: this token begins a document
    mask: Tensor | None = None  # (B, 1, T, T) bool: [query, key], for kernels that take a mask
    # (segments + 1,) int32: start of each segment in the flattened batch, then its tokens in all
    cu_seqlens: Tensor | None = None


def find_documents(ids, mode, longest=0, varlen=False):
    """Docs of ids (B, T) with DOC_MASK=`mode`; None for "none".

    "inputs": only where documents begin. "attention": also the segments in which attention stays.
    A segment is a document, or a piece of `longest` tokens of it (0: documents stay whole). The
    text before the first BOS of a row counts as a document.
    A `varlen` kernel gets where segments start (cu_seqlens), and the host waits for the device to
    find that; others get a mask.
    """
    if mode == "none":
        return None
    is_bos = ids == BOS
    if mode == "inputs":
        return Docs(is_bos)
    position = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    document_start = torch.where(is_bos, position, 0).cummax(1).values  # of each token's document
    position_in_segment = position - document_start
    if longest:
        position_in_segment = position_in_segment % longest
    begins_segment = position_in_segment == 0
    if varlen:
        starts = begins_segment.flatten().nonzero().squeeze(1)
        return Docs(is_bos, cu_seqlens=F.pad(starts, (0, 1), value=ids.numel()).int())
    segment = begins_segment.cumsum(1)  # number of each token's segment in its row
    same_segment = segment[:, :, None] == segment[:, None]
    causal = same_segment.tril()
    return Docs(is_bos, mask=causal[:, None])  # one mask for all heads


class VisitAdapters(NamedTuple):
    """Adapters of one visit to a block: functions whose output is added to a layer's, or None."""

    q: Callable | None = None
    k: Callable | None = None
    v: Callable | None = None
    o: Callable | None = None  # from the attention's output, which is the input of the layer o
    attn: Callable | None = None  # added to the whole attention, from its normed input (#1530)
    mlp: Callable | None = None  # added to the whole MLP, from its normed input
    scaled: bool = False  # o, attn, mlp are multiplied by attn_scale or mlp_scale (#1530)


class Past(NamedTuple):
    """The text before the tokens of a forward, as KVCache kept it."""

    ids: Tensor  # (B, at most 3) its last tokens, which SmearGate and the n-gram hashes read
    rope: tuple[Tensor, Tensor]  # cos, sin of the new tokens' positions
    mask: Tensor  # (B or 1, T, S + T) bool: [new token, key], of S kept keys and the T new ones
    kv: list  # [(keys, values)] of each visit, (B, S, K, C), keys rotated; (None, None) if empty
    new_kv: list  # [(keys, values)] of the new tokens: each visit of the forward appends its own


class Context(NamedTuple):
    """What every block sees in addition to the residual stream."""

    x0: Tensor  # (B, T, D) the stream as it entered the first block
    rope: tuple[Tensor, Tensor]  # cos, sin: (T, rope_dims / 2)
    docs: Docs | None
    value_embedding: Tensor | None  # (B, T, K*C)
    first_values: list  # [values of layer 0], filled by that layer
    past: Past | None = None


def norm(x):
    """RMSNorm over the last axis without a learned weight."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def at_least_float32(x):
    """x in float32; float64, in which the self-test computes, stays."""
    return x if x.dtype == torch.float64 else x.float()


def optional(module, x, *args):
    """module(x, *args); x if the module is None: a part of the model that a setting turned off."""
    return x if module is None else module(x, *args)


def add_adapter(y, adapter, x, scale=None):
    """y + scale * adapter(x); scale=None means 1. Without an adapter y itself: the graph has no
    trace of it.
    """
    if adapter is None:
        return y
    if scale is None:
        return y + adapter(x)
    return y + scale.to(x.dtype) * adapter(x)


class FakeQuant(nn.Module):
    """Late QAT: a weight (R, C) as the artifact would hold it.

    The exporter's grid has the step size `step`, (R, C) or (R, 1), and the range -top..top.
    QAT_ROUNDING "ste": the gradient passes straight through, everywhere; "soft" (#967): smooth
    steps, steeper with more `sharpness`, and no gradient beyond the range.
    """

    def __init__(self, weight, top, soft):
        super().__init__()
        self.top = top
        self.soft = soft
        self.register_buffer("step", weight.new_ones(len(weight), 1), persistent=False)
        self.register_buffer("sharpness", weight.new_ones(()), persistent=False)

    def forward(self, weight):
        code = weight / self.step  # not rounded yet
        if not self.soft:
            quantised = code.round().clamp(-self.top, self.top) * self.step
            return weight + (quantised - weight).detach()
        lower = code.floor().detach()
        rise = torch.tanh(self.sharpness * (code - lower - 0.5)) / torch.tanh(self.sharpness / 2)
        soft_code = lower + 0.5 + 0.5 * rise
        return soft_code.clamp(-self.top, self.top) * self.step


class Linear(nn.Module):
    """y = x W^T, W (out, in); no bias anywhere.

    `scale` (out,) multiplies the rows of W instead of the output: the same map, but its gradient
    comes from dW and not from a reduction over all tokens of the batch.
    """

    def __init__(self, inputs, outputs, zero=False, role="matrix"):
        super().__init__()
        self.zero = zero
        self.role = role
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        # FakeQuant, while late QAT is on. Registered: as a plain attribute, None and then a module,
        # it would make dynamo trace the graph once more.
        self.register_module("fake_quant", None)

    def init(self, generator):
        if self.zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.orthogonal_(self.weight, generator=generator)

    def forward(self, x, scale=None):
        weight = optional(self.fake_quant, self.weight)
        if scale is not None:
            weight = scale[:, None] * weight
        return F.linear(x, weight.to(x.dtype))


class Embedding(nn.Module):
    """A table of vectors (rows, width), looked up by id; `std` of the initial values, 0: zeros."""

    role = "embed"

    def __init__(self, rows, width, std):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.register_module("fake_quant", None)

    def init(self, generator):
        if self.std:
            nn.init.normal_(self.weight, std=self.std, generator=generator)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, ids, dtype):
        return F.embedding(ids, optional(self.fake_quant, self.weight)).to(dtype)


def rotary_tables(positions, dims, base):
    """cos and sin (T, dims/2) of position * base^(-2j/dims) for positions (T,), in float64."""
    even = torch.arange(0, dims, 2, dtype=torch.float64, device=positions.device)  # 2j
    frequency = base ** (-even / dims) if dims else even
    angle = positions.double()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Partial RoPE (#315): the first 2n channels of x (B, T, H, C) turn by minus the angle.

    Channel j turns with channel n + j.
    """
    n = cos.size(-1)
    if n == 0:
        return x
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x.split((n, n, x.size(-1) - 2 * n), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def xsa(y, v):
    """Exclusive self-attention (#265): attention's output y (B, T, H, C) minus its component along
    the token's own value v (B, T, K, C).
    """
    groups = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H / K, C)
    v = v.unsqueeze(3)
    share = (groups * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return (groups - share * v).flatten(2, 3)


class SmearGate(nn.Module):
    """SmearGate: (1 - g) x[t] + g x[t-1] per channel, g = sigmoid(gate).

    g = 0 where a document begins (#1855).
    """

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
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return torch.lerp(x, previous, gate.expand_as(x))


class ScalarSmearGate(nn.Module):
    """The SmearGate of #1667, before the first norm: x[t] + lambda sigmoid(w . x[t, :window])
    x[t-1].
    """

    role = "scalar"

    def __init__(self, window):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(window))
        self.scale = nn.Parameter(torch.empty(()))

    def init(self, generator):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.scale)

    def forward(self, x, docs):
        inner = x[..., : len(self.weight)] @ self.weight.to(x.dtype)
        gate = self.scale.to(x.dtype) * inner.sigmoid()
        if docs is not None:
            gate = gate * ~docs.first
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        return x + gate[..., None] * previous


# Factors of this token, of the one before, ... in the hash of an n-gram. The second set serves
# where a token has too few predecessors for the first.
BIGRAM = ((36313, 27191),)  # #518
SHARED_TRIGRAM = ((36313, 27191, 51497),)  # in the table of the bigrams (#1539)
TRIGRAM = ((48271, 36313, 27191), (36313, 27191))  # in a table of its own (#1311)


def hash_ngrams(ids, factor_sets, buckets, docs):
    """Bucket (B, T) of the n-gram that ends at each token, by the first set f of factors:

        (f[0] id[t] ^ f[1] id[t - 1] ^ ...) % buckets

    The first tokens of the row, and with `docs` of each document, have too few predecessors for
    that. They get the bucket of the next set, of a shorter n-gram; without one, bucket `buckets`.
    """
    factors, *shorter = factor_sets
    predecessors = len(factors) - 1
    width = ids.size(1)

    def earlier(values, back):
        """(B, T) what stands `back` tokens earlier, or zeros."""
        return F.pad(values, (back, 0))[:, :width]

    bucket = factors[0] * ids
    for back in range(1, predecessors + 1):
        bucket = bucket ^ factors[back] * earlier(ids, back)
    too_few = (torch.arange(width, device=ids.device) < predecessors).expand_as(ids)
    if docs is not None:
        for back in range(predecessors):
            too_few = too_few | earlier(docs.first, back)
    instead = hash_ngrams(ids, shorter, buckets, docs) if shorter else buckets
    return torch.where(too_few, instead, bucket % buckets)


class BigramHash(nn.Module):
    """Embedding of the hashed bigram that ends at a token, projected to the model's width.

    It serves trigrams, too: `ngrams` are some of BIGRAM, SHARED_TRIGRAM and TRIGRAM, and each adds
    a row of the one table (#1539). The table starts at zero. Its last row means "no predecessor".
    """

    role = "scalar"

    def __init__(self, rows, width, dim, scale, *ngrams):
        super().__init__()
        self.buckets = rows - 1
        self.ngrams = ngrams
        self.initial_scale = scale
        self.table = Embedding(rows, width, std=0)
        self.proj = Linear(width, dim) if width != dim else None
        self.scale = nn.Parameter(torch.empty(()))

    def init(self, generator):
        nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, ids, docs, dtype):
        vectors = 0
        for factor_sets in self.ngrams:
            buckets = hash_ngrams(ids, factor_sets, self.buckets, docs)
            vectors = vectors + self.table(buckets, dtype)
        return self.scale.to(dtype) * optional(self.proj, vectors)


class ValueEmbedding(nn.Module):
    """A second, narrow token table, projected and added to the values of some layers (#374)."""

    role = "scalar"

    def __init__(self, vocab, width, kv_dim):
        super().__init__()
        self.table = Embedding(vocab, width, std=0.01)
        self.proj = Linear(width, kv_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def init(self, generator):
        nn.init.constant_(self.scale, 0.1)

    def forward(self, ids, dtype):
        return self.scale.to(dtype) * self.proj(self.table(ids, dtype))


class ValueResidual(nn.Module):
    """The values v of a later layer mixed with those of layer 0, v0.

    "vrl": v + c v0 (#1033); "pair": a v0 + b v (#1311); "sigmoid": v + sigmoid(c) v0 (#1539).
    """

    role = "scalar"

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.mix = nn.Parameter(torch.empty(2 if kind == "pair" else ()))

    def init(self, generator):
        nn.init.constant_(self.mix, 0.5 if self.kind == "pair" else 0.0)

    def forward(self, v, v0):
        mix = self.mix.to(v.dtype)
        if self.kind == "pair":
            return mix[0] * v0 + mix[1] * v
        if self.kind == "sigmoid":
            mix = mix.sigmoid()
        return v + mix * v0


class HeadGate(nn.Module):
    """Factor of each head's output, from attention's normed input x.

    "head": 2 sigmoid(W x[:window]) (#1667); "dense": sigmoid(W x) (#1736);
    "sparse": sigmoid(scale W x[:window]) (#1787).
    """

    role = "gate"

    def __init__(self, s):
        super().__init__()
        self.dense = s.attn_gate == "dense"
        self.top = 2.0 if s.attn_gate == "head" else 1.0
        self.scale = s.sparse_attn_gate_scale if s.attn_gate == "sparse" else 1.0
        features = s.model_dim if self.dense else s.gate_window
        self.weight = nn.Parameter(torch.empty(s.num_heads, features))

    def init(self, generator):
        if self.dense:
            nn.init.normal_(self.weight, std=0.01, generator=generator)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, x):
        """x (B, T, D) -> (B, T, H, 1)."""
        inner = F.linear(x[..., : self.weight.size(1)], self.weight.to(x.dtype))
        return (self.top * (self.scale * inner).sigmoid())[..., None]


class Attention(nn.Module):
    """Causal grouped-query attention with QK norm, query gain, partial RoPE, value embedding and
    residual, XSA and head gates. The kernel is `attend`.
    """

    role = "scalar"

    def __init__(self, s, layer, attend):
        super().__init__()
        kv_dim = s.num_kv_heads * s.head_dim
        self.head_dim = s.head_dim
        self.attend = attend  # the kernel (room 14)
        self.xsa = s.xsa_last_n > 0 and layer >= s.num_layers - s.xsa_last_n
        # The order of the weights here is their order in SEED's random numbers and in artifacts.
        self.q = Linear(s.model_dim, s.model_dim)
        self.o = Linear(s.model_dim, s.model_dim, zero=True)
        self.k = Linear(s.model_dim, kv_dim)
        self.v = Linear(s.model_dim, kv_dim)
        self.initial_gain = s.qk_gain_init
        self.q_gain = nn.Parameter(torch.empty(s.num_heads))
        has_value_embedding = s.ve_dim and layer in s.ve_layers
        self.ve_scale = nn.Parameter(torch.empty(())) if has_value_embedding else None
        has_value_residual = s.value_residual != "none" and layer > 0
        self.residual = ValueResidual(s.value_residual) if has_value_residual else None
        self.residual_before_ve = s.value_residual == "vrl"  # v0 is without its value embedding
        self.gate = HeadGate(s) if s.attn_gate != "none" else None

    def init(self, generator):
        nn.init.constant_(self.q_gain, self.initial_gain)
        if self.ve_scale is not None:
            nn.init.ones_(self.ve_scale)

    def project_values(self, x, context, adapter):
        """Values (B, T, K*C) with value embedding and residual. The first layer leaves its own in
        context.first_values.
        """
        projected = add_adapter(self.v(x), adapter, x)
        v = projected
        if self.ve_scale is not None:
            v = v + self.ve_scale.to(x.dtype) * context.value_embedding
        if not context.first_values:
            context.first_values.append(projected if self.residual_before_ve else v)
        return v if self.residual is None else self.residual(v, context.first_values[0])

    def forward(self, x, scale, context, adapters):
        """x (B, T, D) normed -> (B, T, D), its channels multiplied by `scale` (D,)."""
        q = add_adapter(self.q(x), adapters.q, x)
        k = add_adapter(self.k(x), adapters.k, x)
        v = self.project_values(x, context, adapters.v)
        q, k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (q, k, v))
        q = rotate(norm(q), *context.rope) * self.q_gain.to(x.dtype)[:, None]
        k = rotate(norm(k), *context.rope)
        y = (self.attend(q, k, v, context.docs) if context.past is None
             else attend_past(q, k, v, context.past))
        if self.xsa:
            y = xsa(y, v)
        if self.gate is not None:
            y = y * self.gate(x)
        y = y.flatten(2)
        adapter_scale = scale if adapters.scaled else None
        out = add_adapter(self.o(y, scale), adapters.o, y, adapter_scale)
        return add_adapter(out, adapters.attn, x, adapter_scale)


class MLP(nn.Module):
    """down(leaky_relu(up(x), slope)^2)."""

    def __init__(self, s):
        super().__init__()
        self.slope = s.leaky_slope
        self.up = Linear(s.model_dim, s.mlp_hidden)
        self.down = Linear(s.mlp_hidden, s.model_dim, zero=True)

    def forward(self, x, scale, adapters):
        """x (B, T, D) normed -> (B, T, D), its channels multiplied by `scale` (D,)."""
        y = self.down(F.leaky_relu(self.up(x), self.slope).square(), scale)
        return add_adapter(y, adapters.mlp, x, scale if adapters.scaled else None)


class LogitCaps(nn.Module):
    """Asymmetric soft caps: one of positive, one of negative logits (#1923). As published, they
    begin equal, and training leaves them so: only training of the weights at test time moves them.
    """

    role = "cap"

    def __init__(self, cap):
        super().__init__()
        self.initial_cap = cap
        self.caps = nn.Parameter(torch.empty(2), requires_grad=False)

    def init(self, generator):
        nn.init.constant_(self.caps, self.initial_cap)

    def forward(self, logits):
        """The cap of each logit."""
        return torch.where(logits > 0, self.caps[0], self.caps[1])


# --------------------------------------------------------------------------------------------------
# 3 Model
# --------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """U-Net skips: a stream kept earlier is added to the stream x, by weights of each pair.

    "linear": x + w kept; "sigmoid": x + sigmoid(w) kept (#1539);
    "gated": g x + (1 - g) w kept, g = sigmoid(gate) (#1394).
    """

    role = "scalar"

    def __init__(self, kind, pairs, dim):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(pairs, dim))
        self.gate = nn.Parameter(torch.empty(pairs, dim)) if kind == "gated" else None

    def init(self, generator):
        nn.init.constant_(self.weight, 2.2 if self.kind == "sigmoid" else 1.0)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(self, x, kept, pair):
        weight = self.weight[pair].to(x.dtype)
        if self.kind == "gated":
            gate = self.gate[pair].sigmoid().to(x.dtype)
            return torch.lerp(weight * kept, x, gate.expand_as(x))
        if self.kind == "sigmoid":
            weight = weight.sigmoid()
        return x + weight * kept


class ParallelLanes(nn.Module):
    """Two parallel lanes of the residual: attention reads lane 0, the MLP lane 1.

    "lanes" (#1539): each writes the lane that it reads. "routed" (#1529): both write both lanes,
    with learned weights: keep * lane + write * attention + write' * MLP. At the end the lanes are
    merged by their mean or a learned m * lane0 + (1 - m) * lane1. Every layer has its row of
    weights, as published; that of a layer which never meets two lanes is not used.
    """

    role = "scalar"

    def __init__(self, s):
        super().__init__()
        routed = s.parallel_residual == "routed"
        learned_merge = s.parallel_final_lane == "learned"
        # keep[layer, lane], write[layer, attention | MLP, lane]
        self.keep = nn.Parameter(torch.empty(s.num_layers, 2)) if routed else None
        self.write = nn.Parameter(torch.empty(s.num_layers, 2, 2)) if routed else None
        self.merge = nn.Parameter(torch.empty(())) if learned_merge else None

    def init(self, generator):
        if self.keep is not None:
            nn.init.constant_(self.keep, 1.1)
            nn.init.ones_(self.write)
        if self.merge is not None:
            nn.init.constant_(self.merge, 0.5)

    def route(self, lanes, attended, fed, layer):
        """Both lanes after a layer whose attention gave `attended` and whose MLP gave `fed`."""
        keep = self.keep[layer].to(fed.dtype)
        write = self.write[layer].to(fed.dtype)
        return tuple(
            keep[lane] * lanes[lane] + write[0, lane] * attended + write[1, lane] * fed
            for lane in (0, 1))

    def forward(self, lanes):
        """The two lanes merged into one."""
        share = 0.5 if self.merge is None else self.merge.to(lanes[0].dtype)
        return share * lanes[0] + (1 - share) * lanes[1]


class Visit(NamedTuple):
    """One application of a block. The forward loops over visits, so skips and lanes are data."""

    block: int
    # Of the residual. serial: the MLP reads what attention wrote. gptj: both read the one stream.
    # lanes, routed: they read a lane each, see ParallelLanes.
    form: Literal["serial", "gptj", "lanes", "routed"]
    push: bool  # after the block, keep the stream for a later skip
    pop: int | None  # before the block, add the stream kept last, by this row of skip weights
    split: Literal["", "before_skip", "after_skip"] = ""  # here one stream becomes two lanes


def depth_recurrence(s, looping):
    """[(layer, times)] in the order of the forward: the layer is applied `times` times in a row.

    LOOP_ORDER=range repeats the looped layers together, 3 4 5 3 4 5 (#1394); LOOP_ORDER=layer
    repeats each of them, 3 3 4 4 5 5 (#1033).
    """
    layers = list(range(s.num_layers))
    if not (looping and s.loops):
        return [(layer, 1) for layer in layers]
    passes = 1 + s.num_loops
    if s.loop_order == "range":
        loop = layers[s.loop_start : s.loop_end + 1]
        unrolled = layers[: s.loop_start] + passes * loop + layers[s.loop_end + 1 :]
        return [(layer, 1) for layer in unrolled]
    return [(layer, passes if s.loop_start <= layer <= s.loop_end else 1) for layer in layers]


def layer_plan(s, looping):
    """The visits of one forward.

    U-Net skips pair the end of the first half with the start of the second, last in, first out. A
    loop in range order is unrolled before the halves are taken (#1394). One that repeats each
    layer keeps the pairs of the plain order: it pops before a layer's first pass and pushes after
    its last (#1033).
    """
    layers = depth_recurrence(s, looping)
    half = len(layers) // 2
    pairs = 0 if s.skips == "none" else min(half, s.skip_pairs or half)
    two_lanes = s.parallel_residual in ("lanes", "routed")
    split = "before_skip" if s.parallel_first_skip == "lane0" else "after_skip"
    # Two lanes stay apart to the end, even if a loop returns to layers below PARALLEL_START_LAYER.
    parted = False
    plan = []
    for index, (layer, times) in enumerate(layers):
        parallel = s.parallel_residual != "none" and layer >= s.parallel_start_layer
        form = s.parallel_residual if parallel or parted else "serial"
        pushes = half - pairs <= index < half
        pops = half <= index < half + pairs
        for repeat in range(times):
            first = repeat == 0
            last = repeat == times - 1
            push = pushes and last
            pop = index - half if pops and first else None
            parts_here = two_lanes and parallel and not parted
            parted = parted or parts_here
            plan.append(Visit(layer, form, push, pop, split if parts_here else ""))
    return plan


class Block(nn.Module):
    """Attention and MLP of one layer, and how the residual stream takes what they give."""

    role = "scalar"

    def __init__(self, s, layer, attend):
        super().__init__()
        self.layer = layer
        self.ln_scale = (layer + 1) ** -0.5 if s.ln_scale else 1.0
        self.attn = Attention(s, layer, attend)
        self.mlp = MLP(s)
        self.attn_scale = nn.Parameter(torch.empty(s.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(s.model_dim))
        self.resid_mix = nn.Parameter(torch.empty(2, s.model_dim)) if s.resid_mix else None

    def init(self, generator):
        nn.init.ones_(self.attn_scale)
        nn.init.ones_(self.mlp_scale)
        if self.resid_mix is not None:
            nn.init.ones_(self.resid_mix[0])
            nn.init.zeros_(self.resid_mix[1])

    def forward(self, streams, context, adapters, form, parallel_lanes):
        """Residual streams before this layer -> those after it: (x,), or two lanes, each (B, T, D).
        form: see Visit.
        """

        def attention(x):
            return self.attn(norm(x) * self.ln_scale, self.attn_scale, context, adapters)

        def mlp(x):
            return self.mlp(norm(x) * self.ln_scale, self.mlp_scale, adapters)

        x = streams[0]
        if self.resid_mix is not None:
            mix = self.resid_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * context.x0
        if form == "serial":  # the MLP reads what attention wrote
            x = x + attention(x)
            x = x + mlp(x)
            return (x,)
        if form == "gptj":  # both read the same stream (#1412)
            x = x + attention(x) + mlp(x)
            return (x,)
        attended = attention(x)  # two lanes: attention reads lane 0, the MLP lane 1
        fed = mlp(streams[1])
        if form == "lanes":
            return x + attended, streams[1] + fed
        # "routed": what is kept of lane 0 is the lane before resid_mix.
        return parallel_lanes.route(streams, attended, fed, self.layer)


class GPT(nn.Module):
    """The model. hidden -> logits -> loss is the only forward: of training, scoring, adaptation.

    GPT(settings) has the initial weights of SEED, equal on every device and rank; init=False
    leaves them to be loaded. `attend` is the attention kernel (room 14), `dtype` that of
    activations. With NUM_LOOPS it loops, unless `looping` is set to False; that builds no new
    graph if warm-up has seen both.
    """

    def __init__(self, s, dtype=torch.float32, attend=None, init=True):
        super().__init__()
        attend = attend or attend_sdpa
        self.dtype = dtype
        self.varlen = getattr(attend, "varlen", False)
        self.softcap = s.logit_softcap
        self.doc_mask = s.doc_mask
        self.looping = s.loops
        self.temperature = None  # of its predictions, once fitted (EVAL_TEMPERATURE=0)
        self.reasons = []  # found in training: why no score of these weights is valid
        # The order of the weights here is their order in SEED's random numbers and in artifacts.
        width = s.embed_dim or s.model_dim
        self.embed = Embedding(s.vocab_size, width, s.tied_embed_init_std)  # tied: also the head
        self.embed_proj = Linear(width, s.model_dim) if s.embed_dim else None
        self.head_proj = Linear(s.model_dim, width) if s.embed_dim else None
        self.head = None
        if not s.tie_embeddings:
            self.head = Linear(width, s.vocab_size, zero=True, role="head")
        self.bigram = None
        if s.bigram_vocab_size:
            ngrams = (BIGRAM, SHARED_TRIGRAM) if s.trigram else (BIGRAM,)
            self.bigram = BigramHash(s.bigram_vocab_size, s.bigram_dim, s.model_dim, 0.05, *ngrams)
        self.trigram = None
        if s.trigram_vocab_size:
            rows = s.trigram_vocab_size
            self.trigram = BigramHash(rows, s.trigram_dim, s.model_dim, 0.03, TRIGRAM)
        self.early_smear = ScalarSmearGate(s.gate_window) if s.smear_gate == "scalar" else None
        self.smear = SmearGate(s.model_dim) if s.smear_gate == "channel" else None
        kv_dim = s.num_kv_heads * s.head_dim
        self.value_embed = ValueEmbedding(s.vocab_size, s.ve_dim, kv_dim) if s.ve_dim else None
        self.blocks = nn.ModuleList(Block(s, layer, attend) for layer in range(s.num_layers))
        two_lanes = s.parallel_residual in ("lanes", "routed")
        self.lanes = ParallelLanes(s) if two_lanes else None
        self.caps = LogitCaps(s.logit_softcap) if s.asym_logit_rescale else None
        self.plans = layer_plan(s, False), layer_plan(s, True)
        pairs = max(sum(visit.pop is not None for visit in plan) for plan in self.plans)
        self.skips = Skips(s.skips, pairs, s.model_dim) if pairs else None
        # Buffers built before the first call: a lazily grown cache would recompile the graph.
        self.rope = s.rope_dims, s.rope_base
        cos, sin = rotary_tables(torch.arange(s.longest_row), *self.rope)
        self.register_buffer("cos", cos.float(), persistent=False)
        self.register_buffer("sin", sin.float(), persistent=False)
        if init:
            self.init_weights(s.seed)

    @torch.no_grad()
    def init_weights(self, seed):
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if hasattr(module, "init"):
                module.init(generator)

    @property
    def plan(self):
        """The visits of one forward."""
        # Not plans[self.looping]: dynamo of torch 2.9 indexes by no bool.
        return self.plans[1] if self.looping else self.plans[0]

    def find_documents(self, ids, longest=0):
        """Docs of ids (B, T) as this model's DOC_MASK and attention kernel need them."""
        return find_documents(ids, self.doc_mask, longest, self.varlen)

    def docs_outside_graph(self, ids):
        """Docs for a varlen kernel, made before the graph, since their shape depends on the data;
        None where the graph makes them itself.
        """
        if not self.varlen:
            return None
        docs = self.find_documents(ids)
        torch._dynamo.maybe_mark_dynamic(docs.cu_seqlens, 0)
        return docs

    def embed_tokens(self, text, docs):
        """The first block's input (B, T, D): token and BigramHash embeddings, with ScalarSmearGate
        before the norm or SmearGate after it.
        """
        x = optional(self.embed_proj, self.embed(text, self.dtype))
        if self.bigram is not None:
            x = x + self.bigram(text, docs, self.dtype)
        if self.trigram is not None:
            x = x + self.trigram(text, docs, self.dtype)
        x = norm(optional(self.early_smear, x, docs))
        return optional(self.smear, x, docs)

    def hidden(self, ids, docs=None, adapters=None, past=None):
        """ids (B, T) -> normed final states (B, T, D). With a `past`, ids continue its text.

        docs None: found here, at each BOS, unless DOC_MASK=none.
        """
        length = ids.size(1)
        if past is None:
            text = ids
            rope = self.cos[:length], self.sin[:length]
            if docs is None:
                docs = self.find_documents(text)
        else:
            text = torch.cat((past.ids, ids), 1)
            rope = past.rope
            if docs is None and self.doc_mask != "none":
                docs = find_documents(text, "inputs")  # past.mask keeps attention in its document
        x = self.embed_tokens(text, docs)[:, -length:]
        value_embedding = None if self.value_embed is None else self.value_embed(ids, self.dtype)
        context = Context(x, rope, docs, value_embedding, first_values=[], past=past)
        streams = (x,)  # one, or two lanes
        kept = []  # the streams that U-Net skips take back
        for j, visit in enumerate(self.plan):
            if visit.split == "before_skip":
                streams = (streams[0], streams[0])
            if visit.pop is not None:
                streams = (self.skips(streams[0], kept.pop(), visit.pop), *streams[1:])
            if visit.split == "after_skip":
                streams = (streams[0], streams[0])
            visit_adapters = VisitAdapters() if adapters is None else adapters.slots[j]
            block = self.blocks[visit.block]
            streams = block(streams, context, visit_adapters, visit.form, self.lanes)
            if visit.push:
                kept.append(streams[0])
        return norm(streams[0] if self.lanes is None else self.lanes(streams))

    def logits(self, hidden, adapters=None, head=None):
        """hidden (..., D) -> float32 logits (..., V), soft-capped.

        `head`: the weight (V, width) of another head than the model's.
        """
        if head is None:
            module = self.embed if self.head is None else self.head
            head = optional(module.fake_quant, module.weight)
        logits = F.linear(optional(self.head_proj, hidden), head.to(hidden.dtype))
        if adapters is not None:
            logits = add_adapter(logits, adapters.head, hidden)
        logits = at_least_float32(logits)
        if not self.softcap:
            return logits
        cap = self.cap_of(logits)
        return cap * torch.tanh(logits / cap)

    def cap_of(self, logits):
        """Soft cap: one number, or with ASYM_LOGIT_RESCALE a cap of each logit."""
        return self.softcap if self.caps is None else self.caps(logits)

    def loss(self, hidden, targets, adapters=None, head=None, reduction="mean"):
        """Cross entropy in nats of targets (B, T): the mean, or (B, T) with reduction="none"."""
        logits = self.logits(hidden, adapters, head)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(targets)

    def forward(self, ids, targets, docs=None, adapters=None, reduction="mean"):
        hidden = self.hidden(ids, docs, adapters)
        return self.loss(hidden, targets, adapters, reduction=reduction)


class KVCache:
    """Keys and values of the text so far, for rows of text that continue token by token. Each
    token sees the `width` tokens up to itself.

    A ring buffer: the token at position p is in slot p % width. A forward reads past(ids) and
    leaves its own keys and values there; only commit() takes them in, so a forward can be
    repeated.
    """

    def __init__(self, model, rows, width):
        device = model.embed.weight.device
        self.model = model
        self.width = width
        self.length = 0  # tokens so far
        self.kv = None  # [(keys, values)] of each visit, (B, width, K, C), after the first commit
        self.last_ids = torch.empty(rows, 0, dtype=torch.int64, device=device)
        # Of each slot: its position (too far back to be seen if it is empty), and the number of
        # its document.
        self.positions = torch.full((width,), -width, device=device)
        self.documents = torch.zeros(rows, width, dtype=torch.int64, device=device)

    def past(self, ids):
        """The Past for hidden() on ids (B, T), at most `width` tokens that continue the text."""
        model = self.model
        new = torch.arange(self.length, self.length + ids.size(1), device=ids.device)
        positions = torch.cat((self.positions, new)) if self.length else new
        causal = positions <= new[:, None]
        near = positions > new[:, None] - self.width
        mask = (causal & near)[None]
        if model.doc_mask == "attention":
            documents = self._documents(ids)
            mask = mask & (documents[:, -len(new):, None] == documents[:, None])
        rope = tuple(table.to(model.cos.dtype) for table in rotary_tables(new, *model.rope))
        kv = self.kv or [(None, None)] * len(model.plan)
        return Past(self.last_ids, rope, mask, kv, new_kv=[])

    def _documents(self, ids):
        """Number of the document of each key: of the slots, if any was filled, and of ids."""
        new = (ids == BOS).cumsum(1)
        if self.length == 0:
            return new
        return torch.cat((self.documents, new + self.documents.amax(1, keepdim=True)), 1)

    def commit(self, ids, new_kv):
        """Take in ids, whose keys and values are `new_kv`: now they are part of the text."""
        positions = torch.arange(self.length, self.length + ids.size(1), device=ids.device)
        slots = positions % self.width
        if self.kv is None:
            self.kv = [(self._empty(keys), self._empty(values)) for keys, values in new_kv]
        self.documents[:, slots] = self._documents(ids)[:, -len(positions):]
        self.length += len(positions)
        self.positions[slots] = positions
        for (keys, values), (new_keys, new_values) in zip(self.kv, new_kv, strict=True):
            keys[:, slots] = new_keys.detach()
            values[:, slots] = new_values.detach()
        # SmearGate reads the embedding of the token before, whose trigram reads two more.
        last_ids = torch.cat((self.last_ids, ids), 1)[:, -3:]
        # One layout, one graph.
        self.last_ids = last_ids.clone(memory_format=torch.contiguous_format)

    def _empty(self, new):
        """Slots (B, width, K, C) for keys or values like `new` (B, T, K, C)."""
        return new.new_zeros(len(new), self.width, *new.shape[2:])

    def advance(self, ids):
        """States (B, T, D) of the model on the next ids, which are taken in."""
        past = self.past(ids)
        hidden = self.model.hidden(ids, past=past)
        self.commit(ids, past.new_kv)
        return hidden

    def narrow(self, rows):
        """Keep the first `rows` rows only: the text of the others has ended."""
        self.last_ids = self.last_ids[:rows]
        self.documents = self.documents[:rows]
        if self.kv is not None:
            self.kv = [(keys[:rows], values[:rows]) for keys, values in self.kv]


class Objective(nn.Module):
    """What training minimises: the model's loss, with weights of tokens (complementary training),
    plus that of heads that predict the tokens after the next (multi-token prediction, MTP).

    Those heads are here and not in the model: no artifact ever has them.
    """

    def __init__(self, model, s):
        super().__init__()
        self.model = model
        self.mtp_weight = s.mtp_loss_weight
        width = s.embed_dim or s.model_dim
        self.mtp = nn.ModuleList(
            Linear(width, s.vocab_size, zero=True, role="head") for _ in range(s.mtp_num_heads))
        with torch.no_grad():
            for head in self.mtp:
                head.init(None)

    def forward(self, ids, targets, docs=None, token_weights=None):
        hidden = self.model.hidden(ids, docs)
        if token_weights is None:
            loss = self.model.loss(hidden, targets)
        else:
            loss = (token_weights * self.model.loss(hidden, targets, reduction="none")).mean()
        for ahead, head in enumerate(self.mtp, 1):
            mtp_loss = self.model.loss(hidden[:, :-ahead], targets[:, ahead:], head=head.weight)
            loss = loss + self.mtp_weight / len(self.mtp) * mtp_loss
        return loss


def roles(model):
    """{parameter name: role}. A module with parameters that states no role is a TypeError."""
    table = {}
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            if not isinstance(getattr(module, "role", None), str):
                creator = type(module).__name__
                raise TypeError(f"{creator} creates the parameter {full_name} but states no role")
            table[full_name] = module.role
    return table


# --------------------------------------------------------------------------------------------------
# 4 Runtime: device, dtype, ranks
# --------------------------------------------------------------------------------------------------


class Runtime:
    """Where the run happens, and why: device, dtype, ranks.

    Every automatic choice leaves a (name, choice, reason) in `choices`.
    """

    def __init__(self, settings, env=None):
        env = os.environ if env is None else env
        self.rank = int(env.get("RANK", 0))
        self.world = int(env.get("WORLD_SIZE", 1))
        self.local = int(env.get("LOCAL_RANK", 0))
        self.choices = []
        cuda = torch.cuda.is_available()
        if settings.device == "cuda" and not cuda:
            raise BadInput("DEVICE=cuda but torch sees no CUDA device; use DEVICE=cpu, "
                           "or a CUDA build of torch")
        use_cuda = cuda and settings.device != "cpu"
        count = torch.cuda.device_count() if cuda else 0
        if use_cuda and self.local >= count:
            raise BadInput(f"local rank {self.local} has no GPU ({count}); lower --nproc_per_node")
        self.device = torch.device("cuda", self.local) if use_cuda else torch.device("cpu")
        reason = f"DEVICE={settings.device}, torch sees {count or 'no'} CUDA device(s)"
        self.choose("device", self.device_name(), reason)
        # A CPU without bf16 instructions runs bf16 8-15 times slower than fp32.
        auto_dtype = "bfloat16" if use_cuda else "float32"
        self.dtype = getattr(torch, auto_dtype if settings.dtype == "auto" else settings.dtype)
        reason = f"DTYPE={settings.dtype}"
        if use_cuda:
            torch.set_float32_matmul_precision("high")
            reason += ", products of float32 matrices in TF32"
        self.choose("dtype", str(self.dtype).removeprefix("torch."), reason)
        self.compiled = settings.compile == "on" or (settings.compile == "auto" and use_cuda)
        self.choose("compile", "on" if self.compiled else "off", f"COMPILE={settings.compile}")
        # Untouched without it: torch._dynamo takes a second to import and slows eager steps by 3 %.
        if self.compiled:
            # Graphs of one function: stages, loops, ways of scoring.
            torch._dynamo.config.recompile_limit = 64
        if use_cuda:
            torch.cuda.set_device(self.device)
            free, total = torch.cuda.mem_get_info()
            if free < 0.9 * total:
                reason = f"of {total >> 20} MiB: another process is here"
                self.choose("gpu_memory", f"{free >> 20}MiB_free", reason)
        self.control = None
        if self.world > 1:
            backend = "nccl" if use_cuda else "gloo"
            if not dist.is_initialized():  # runs may take turns in one process
                dist.init_process_group(backend, device_id=self.device if use_cuda else None)
            # Clock and stop flags travel on the CPU, so agreeing on them never waits for the GPU.
            self.control = dist.new_group(backend="gloo") if use_cuda else dist.group.WORLD
        self._events = deque()

    def choose(self, name, choice, reason):
        self.choices.append((name, choice, reason))

    def device_name(self):
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def compile(self, function):
        """The function compiled, a graph for each shape that it meets, all of them in warm-up; with
        COMPILE=off the function itself.
        """
        if not self.compiled:
            return function
        return torch.compile(function, dynamic=False, fullgraph=True)

    def sync(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def throttle(self, depth=2):
        """Let the CPU run at most `depth` steps ahead of the GPU: the queue stays full and the
        clock honest. Returns the number of steps ahead.
        """
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._events.append(event)
            if len(self._events) > depth:
                self._events.popleft().synchronize()
        return len(self._events)

    def to_cpu(self, tensor):
        """A tensor on its way to the CPU, complete once throttle() has passed this step: to read it
        never waits for later work. On the CPU the tensor itself.
        """
        if self.device.type == "cpu":
            return tensor
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def max(self, *values):
        """A tuple: the maximum over ranks of each number, equal on all ranks."""
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak >> 20 if sys.platform == "darwin" else peak >> 10  # macOS: bytes, Linux: KiB

    def close(self):
        # A group that is still referred to when Python ends may abort the process.
        self.control = None
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# 5 Optimizer
# A new optimizer of matrices is an update function, the shapes of its state, an entry of OPTIMIZERS
# and a choice of MATRIX_OPTIMIZER.
# --------------------------------------------------------------------------------------------------

# Coefficients a, b, c of X <- a X + (b A + c A A) X, A = X X^T. One row an iteration; the last row
# serves all further iterations.
NEWTON_SCHULZ = {
    "classic": ((3.4445, -4.7750, 2.0315),),  # Keller Jordan's Muon
    # arXiv 2505.16932, without its safety factor of 1.02 on the norm, as in #1787
    "polar_express": ((8.156554524902461, -22.48329292557795, 15.878769915207462),
                      (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                      (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                      (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                      (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
}


def newton_schulz(update, steps, coefficients="classic", row_normalize=False, dtype=torch.float32):
    """Push the singular values of each matrix of a batch (N, rows, cols) towards 1.

    row_normalize: first give each row norm 1 (MuonEq-R, #1285), each row of the matrix as stored:
    the iteration transposes a matrix of more rows than columns only after that.
    """
    x = update.to(dtype)
    if row_normalize:
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    table = NEWTON_SCHULZ[coefficients]
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b A + c A A
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x


def normuon(update, moment, beta2):
    """NorMuon (arXiv 2510.05491): divide each row by the root of its running mean square.

    `moment` (N, rows, 1) is that mean square; it is updated in place. The norm of each matrix is
    kept, so that learning rates mean the same with and without NorMuon.
    """
    update = update.float()
    moment.lerp_(update.square().mean(-1, keepdim=True), 1 - beta2)
    # No bias correction: it is one factor for all rows, and the norm is restored below.
    scaled = update / (moment.sqrt() + 1e-10)
    norm_before = update.norm(dim=(-2, -1), keepdim=True)
    norm_after = scaled.norm(dim=(-2, -1), keepdim=True)
    return scaled * (norm_before / (norm_after + 1e-10))


def adamw(weight, grad, mean, square, t, lr, wd, betas, eps):
    """AdamW (arXiv 1711.05101), step t from 1, with bias correction. In place, decay first."""
    beta1, beta2 = betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = square.sqrt().div_((1 - beta2**t) ** 0.5).add_(eps)
    weight.mul_(1 - lr * wd).addcdiv_(mean, root, value=-lr / (1 - beta1**t))


# ---- update functions ----------------------------------------------------------------------------
# update(weight, grad, state, step) gets the tensors of a flat bank, or this rank's share of a
# stacked one. It keeps what it needs in `state`, may overwrite `grad`, and returns an Update. Where
# the bank is flat, it may change `weight` itself instead and return None.


class OptimizerStep(NamedTuple):
    """What an update function knows of an optimizer step, apart from a bank's tensors."""

    s: Settings
    t: int  # number of the step, from 1
    lr: float  # after its schedule
    wd: float  # after its schedule
    betas: Betas
    momentum: float  # of Muon, after its schedule
    orthogonalise: Callable  # newton_schulz with the options of the settings, compiled


class Update(NamedTuple):
    """A change of weights: weight <- (1 - decay) weight - rate direction."""

    direction: Tensor
    rate: float
    decay: float


def muon(weight, grad, state, step):
    """Muon by Keller Jordan, for matrices (N, rows, cols): orthogonalised Nesterov momentum.

    NORMUON evens out the rows after that. Matrices with more rows than columns get a larger rate.
    """
    buffer = state[0].mul_(step.momentum).add_(grad)
    nesterov = grad.add_(buffer, alpha=step.momentum)
    direction = step.orthogonalise(nesterov)
    if step.s.normuon:
        direction = normuon(direction, state[1], step.s.muon_beta2)
    rows, cols = grad.shape[1:]
    scale = max(1.0, rows / cols) ** 0.5
    return Update(direction, rate=step.lr * scale, decay=step.lr * step.wd)


def muon_state(weight, s):
    """Shapes of Muon's state: the momentum; with NORMUON also the mean square of each row."""
    if s.normuon:
        return [weight.shape, weight[..., :1].shape]
    return [weight.shape]


def adamw_of_bank(weight, grad, state, step):
    """AdamW for a flat bank, in place: one fused operation, no tensor for the update."""
    mean, square = state
    adamw(weight, grad, mean, square, step.t, step.lr, step.wd, step.betas, step.s.adam_eps)


class Optimizer(NamedTuple):
    """An update function, the state that it keeps, and the layout of its banks (see Bank)."""

    update: Callable
    # state(weight, settings) -> the shapes of its tensors; in a flat bank they are the weight's
    state: Callable
    layout: Literal["stacked", "flat"]


OPTIMIZERS = {
    "muon": Optimizer(muon, muon_state, "stacked"),
    "adamw": Optimizer(adamw_of_bank, lambda weight, s: [weight.shape, weight.shape], "flat"),
}


class UpdateRule(NamedTuple):
    """How the parameters of a role are optimised."""

    kind: str  # of OPTIMIZERS
    lr: float
    wd: float
    betas: Betas  # AdamW


def update_rules(s):
    """{role: UpdateRule} of the settings."""
    betas = (s.beta1, s.beta2)
    embed_lr = s.tied_embed_lr if s.tie_embeddings else s.embed_lr
    matrix_betas = s.matrix_betas or betas
    return {"matrix": UpdateRule(s.matrix_optimizer, s.matrix_lr, s.muon_wd, matrix_betas),
            "embed": UpdateRule("adamw", embed_lr, s.embed_wd, s.embed_betas or betas),
            "head": UpdateRule("adamw", s.head_lr, s.head_wd, s.head_betas or betas),
            "gate": UpdateRule("adamw", s.scalar_lr, s.adam_wd, betas),
            "cap": UpdateRule("adamw", 0.0, 0.0, betas),
            "scalar": UpdateRule("adamw", s.scalar_lr, s.adam_wd, betas)}


# ---- banks and ranks -----------------------------------------------------------------------------

# torch 2.14 renamed these two, and warns about the old names.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

FLAT_ALIGNMENT = 64  # float32 numbers, 256 bytes: where a parameter may begin in a flat bank


class Bank:
    """Parameters of one role as views of one tensor, and their gradients of another: a bank is
    updated, reduced and averaged by single operations. The views must stay: clear gradients
    with zero_grad() of the optimizer, not with the module's, which drops them.

    A bank has one of two layouts.

    stacked: the matrices of one shape, (N, rows, cols), N padded to a multiple of the ranks. Each
    rank updates its share of the matrices and has the state of that share alone.
    flat: parameters of any shapes, one after the other. Every rank updates all of them.
    """

    def __init__(self, role, rule, named_params, s, rt):
        self.role = role
        self.rule = rule
        self.optimizer = OPTIMIZERS[rule.kind]
        self.stacked = self.optimizer.layout == "stacked"
        self.names = [name for name, _ in named_params]
        params = [param for _, param in named_params]
        self.shapes = [param.shape for param in params]
        if self.stacked:
            matrices_per_rank = ceil_div(len(params), rt.world)
            size = (matrices_per_rank * rt.world, *self.shapes[0])
            begin = rt.rank * matrices_per_rank
            self.share = slice(begin, begin + matrices_per_rank)
        else:
            self.starts = [0]
            for shape in self.shapes:
                padded = ceil_div(shape.numel(), FLAT_ALIGNMENT) * FLAT_ALIGNMENT
                self.starts.append(self.starts[-1] + padded)
            size = (self.starts[-1],)
            self.share = slice(None)
        self.weight = torch.zeros(size, device=params[0].device)
        self.grad = torch.zeros(size, device=params[0].device)
        state_shapes = self.optimizer.state(self.weight[self.share], s)
        self.state = [self.weight.new_zeros(shape) for shape in state_shapes]
        for param, weight, grad in zip(params, self.views(self.weight), self.views(self.grad)):
            weight.copy_(param.data)
            param.data = weight
            param.grad = grad

    def views(self, tensor):
        """The parts of a tensor shaped like the bank, one for each parameter, in its shape."""
        if self.stacked:
            return [tensor[i] for i in range(len(self.names))]
        parts = []
        for start, shape in zip(self.starts, self.shapes):
            parts.append(tensor[start : start + shape.numel()].view(shape))
        return parts

    def apply(self, update):
        """Change all weights of the bank; the direction of the update has the bank's shape."""
        self.weight.mul_(1 - update.decay).add_(update.direction, alpha=-update.rate)


class MuonAdam:
    """The optimizer of a training run: Muon for matrices, AdamW for the rest (see update_rules),
    on 1..N ranks. It owns all communication; there is no DDP wrapper.

    step() reduce-scatters the gradients of stacked banks and all-reduces those of flat ones. It
    clips the global gradient. It computes the updates of this rank's matrices, starts to gather
    those of all ranks, updates the flat banks meanwhile, and then applies what was gathered.
    The state is fp32. It is saved by parameter name and can be loaded by any number of ranks.
    """

    def __init__(self, model, s, rt):
        self.s = s
        self.rt = rt
        self.t = 0  # steps made
        rules = update_rules(s)
        params = dict(model.named_parameters())
        names_of_role = {role: [] for role in rules}
        groups = {}  # {(role, shape of a stacked matrix): [(name, parameter)]}, a bank each
        for name, role in roles(model).items():
            if role not in rules:
                raise KeyError(f"no update rule for role {role} of {name}")
            names_of_role[role].append(name)
            stacked = OPTIMIZERS[rules[role].kind].layout == "stacked"
            shape = tuple(params[name].shape) if stacked else ()
            groups.setdefault((role, shape), []).append((name, params[name]))

        def size(group):
            return sum(param.numel() for _, param in groups[group])

        self.banks = []  # the largest first: its communication takes longest
        for group in sorted(groups, key=size, reverse=True):
            role, _ = group
            self.banks.append(Bank(role, rules[role], groups[group], s, rt))
        owned = sorted(name for bank in self.banks for name in bank.names)
        assert owned == sorted(params), "every parameter has exactly one owner"
        self.table = {}  # for the log: {role: (tensors, parameters, UpdateRule)}
        for role, names in names_of_role.items():
            if names:
                count = sum(params[name].numel() for name in names)
                self.table[role] = (len(names), count, rules[role])
        # Not DTYPE: the iteration needs no more than bf16 has, and tensor cores multiply that fast.
        dtype = torch.bfloat16 if rt.device.type == "cuda" else torch.float32
        self.orthogonalise = rt.compile(partial(
            newton_schulz, steps=s.muon_backend_steps, dtype=dtype, coefficients=s.newton_schulz,
            row_normalize=s.muon_row_normalize))

    def zero_grad(self):
        for bank in self.banks:
            bank.grad.zero_()

    @torch.no_grad()
    def step(self, lr_scale, momentum, wd_scale=1.0):
        """Update all weights from the accumulated gradients.

        lr_scale multiplies every learning rate, wd_scale the weight decay of matrices (MUON_WD).
        """
        self.t += 1
        grads = self._reduce()
        self._clip(grads)
        gathering = []
        for bank, grad in zip(self.banks, grads):
            if bank.stacked:
                update = self._update(bank, grad, lr_scale, momentum, wd_scale)
                direction, work = self._start_gather(update.direction)
                gathering.append((bank, update._replace(direction=direction), work))
        for bank, grad in zip(self.banks, grads):
            if not bank.stacked:
                update = self._update(bank, grad, lr_scale, momentum, wd_scale)
                if update is not None:
                    bank.apply(update)
        for bank, update, work in gathering:
            if work is not None:
                work.wait()
            bank.apply(update)

    def _reduce(self):
        """Average the gradients over ranks. Returns them; of stacked banks this rank's share."""
        if self.rt.world == 1:
            return [bank.grad for bank in self.banks]
        grads = []
        works = []
        for bank in self.banks:
            if bank.stacked:
                grad = torch.empty_like(bank.grad[bank.share])
                works.append(reduce_scatter(grad, bank.grad, async_op=True))
            else:
                grad = bank.grad
                works.append(dist.all_reduce(grad, async_op=True))
            grads.append(grad)
        for work, grad in zip(works, grads):
            work.wait()
            grad.div_(self.rt.world)
        return grads

    def _clip(self, grads):
        """Scale the global gradient to a norm of at most GRAD_CLIP_NORM.

        The host does not wait for the device.
        """
        if not self.s.grad_clip_norm:
            return
        stacked_square = torch.zeros((), device=self.rt.device)
        flat_square = torch.zeros((), device=self.rt.device)
        for bank, grad in zip(self.banks, grads):
            if bank.stacked:
                stacked_square += grad.square().sum()
            else:
                flat_square += grad.square().sum()
        # A rank has a share of the stacked gradients, but all of the flat ones.
        norm = (self.rt.sum(stacked_square) + flat_square).sqrt()
        factor = (self.s.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor)

    def _update(self, bank, grad, lr_scale, momentum, wd_scale):
        """The Update of a bank, or None if its update function has changed the weights."""
        lr = bank.rule.lr * lr_scale
        wd = bank.rule.wd
        if bank.role == "matrix":
            wd *= wd_scale
        step = OptimizerStep(self.s, self.t, lr, wd, bank.rule.betas, momentum, self.orthogonalise)
        return bank.optimizer.update(bank.weight[bank.share], grad, bank.state, step)

    def _start_gather(self, share):
        """(all ranks' shares as one tensor, the work to wait for before it is read, or None)."""
        if self.rt.world == 1:
            return share, None
        shape = (self.rt.world * share.size(0), *share.shape[1:])
        gathered = torch.empty(shape, dtype=share.dtype, device=share.device)
        return gathered, all_gather(gathered, share.contiguous(), async_op=True)

    def _gather(self, share):
        gathered, work = self._start_gather(share)
        if work is not None:
            work.wait()
        return gathered

    def named(self, tensors):
        """{parameter name: part} of tensors shaped like the banks."""
        parts = {}
        for bank, tensor in zip(self.banks, tensors):
            parts.update(zip(bank.names, bank.views(tensor)))
        return parts

    def state_dict(self):
        """{"t": step, name: [state tensors]} on the CPU. Collective: all ranks call it."""
        state = {"t": self.t}
        for bank in self.banks:
            tensors = bank.state
            if bank.stacked:
                tensors = [self._gather(share) for share in bank.state]
            for name in bank.names:
                state[name] = []
            for tensor in tensors:
                for name, part in zip(bank.names, bank.views(tensor)):
                    state[name].append(part.cpu().clone())
        return state

    def load_state_dict(self, state):
        self.t = state["t"]
        for bank in self.banks:
            for i, share in enumerate(bank.state):
                all_shares = share.new_zeros(bank.weight.size(0), *share.shape[1:])
                for name, part in zip(bank.names, bank.views(all_shares)):
                    part.copy_(state[name][i])
                share.copy_(all_shares[bank.share])


# ---- schedules -----------------------------------------------------------------------------------


def lr_scale(s, progress, step, total_steps, since_stage=None, seconds=None):
    """Multiplier of every learning rate: linear warm-up, then 1, then the warmdown.

    progress: of the run, in [0, 1]. step: from 0. total_steps: of the run, as far as known; only
    WARMDOWN_ITERS needs it. since_stage: steps since a stage of TRAIN_SEQ_SCHEDULE or
    TRAIN_BATCH_SCHEDULE began, None in the first. seconds: of the run, where that is not
    MAX_WALLCLOCK_SECONDS.
    """
    scale = warmdown(s, progress, total_steps, seconds)
    warmup = 1.0
    if s.lr_warmup_steps:
        warmup = min((step + 1) / s.lr_warmup_steps, 1.0)
    if since_stage is not None and s.seq_change_warmup_steps:
        warmup *= min((since_stage + 1) / s.seq_change_warmup_steps, 1.0)
    return warmup * scale


def warmdown(s, progress, total_steps, seconds=None):
    """The part of lr_scale that falls: 1, then linear to 0 at the end of the run, but not below
    MIN_LR.
    """
    length = s.warmdown_frac  # as a fraction of the run
    if s.warmdown_iters:
        length = min(s.warmdown_iters / max(total_steps, 1), 1.0)
    elif s.warmdown_seconds:
        length = min(s.warmdown_seconds / (seconds or s.max_wallclock_seconds), 1.0)
    if not length:
        return 1.0
    return max(min((1 - progress) / length, 1.0), s.min_lr)


def wd_scale(s, progress):
    """Multiplier of MUON_WD (#1729): 1, from WD_TAPER_START_FRAC linear to WD_TAPER_FINAL_MULT."""
    start = s.wd_taper_start_frac
    if not start:
        return 1
    return 1 + (s.wd_taper_final_mult - 1) * max(progress - start, 0.0) / (1 - start)


def momentum_at(s, step):
    """Momentum of Muon: it rises linearly to MUON_MOMENTUM over the first steps. step: from 0."""
    fraction = 1.0
    if s.muon_momentum_warmup_steps:
        fraction = min(step / s.muon_momentum_warmup_steps, 1.0)
    start = s.muon_momentum_warmup_start
    return start + (s.muon_momentum - start) * fraction


# ---- complementary training ----------------------------------------------------------------------


class Complement:
    """Complementary training (#1033): tokens that bigram counts predict weigh less in the loss.

    A token b after a has bigram probability p = C[a, b] / (N[a] + 1). It weighs
    max(1 - COMPLEMENT_ALPHA p, 0.1), divided by the mean weight of the step. The counts are of
    all earlier steps and ranks, so they do not depend on ranks or micro-batches. They are int64:
    float32 stops counting at 2^24.
    """

    def __init__(self, s, rt):
        self.alpha = s.complement_alpha
        self.vocab = s.vocab_size
        self.rt = rt
        # C[a, b], at a * vocab + b
        self.pair_counts = torch.zeros(s.vocab_size**2, dtype=torch.int64, device=rt.device)
        # N[a]
        self.token_counts = torch.zeros(s.vocab_size, dtype=torch.int64, device=rt.device)

    def weights(self, micro):
        """[(B, T) weights] for a step's micro-batches [(ids, targets, ...)], of mean 1."""
        weights = []
        for ids, targets, *_ in micro:
            seen = self.pair_counts[ids * self.vocab + targets]
            raw = 1 - self.alpha * seen / (self.token_counts[ids] + 1.0)
            weights.append(raw.clamp_min(0.1))
        total = self.rt.sum(torch.stack([weight.double().sum() for weight in weights]).sum())
        mean = total / (self.rt.world * sum(weight.numel() for weight in weights))
        return [(weight / mean).float() for weight in weights]

    def observe(self, micro):
        """Count the tokens of a step that has been trained on."""
        pairs = torch.cat([(ids * self.vocab + targets).flatten() for ids, targets, *_ in micro])
        if self.rt.world > 1:
            pairs_of_ranks = pairs.new_empty(self.rt.world * len(pairs))
            all_gather(pairs_of_ranks, pairs)
            pairs = pairs_of_ranks
        self.count_pairs(pairs, torch.ones_like(pairs))

    def count_pairs(self, pairs, times):
        self.pair_counts.index_add_(0, pairs, times)
        self.token_counts.index_add_(0, pairs // self.vocab, times)

    def state_dict(self):
        """Pairs that occurred, and how often; the same on all ranks."""
        pairs = self.pair_counts.nonzero().squeeze(1)
        return {"pairs": pairs.cpu(), "times": self.pair_counts[pairs].cpu()}

    def load_state_dict(self, state):
        self.pair_counts.zero_()
        self.token_counts.zero_()
        self.count_pairs(state["pairs"].to(self.rt.device), state["times"].to(self.rt.device))


# ---- weight averages -----------------------------------------------------------------------------


class Average:
    """Averages of the weights over the run, candidates for export. fp32: bf16 would swallow the
    small steps of a slow average (#1699).

    `kept` holds for each kind a list of weights, each a list of tensors shaped like the
    banks: for "ema" the exponential moving average, for "swa" the sum of `swa_count` snapshots, for
    "lawa" the last LAWA_K snapshots.
    """

    def __init__(self, s, banks):
        self.s = s
        self.banks = banks
        self.kept = {}
        self.swa_count = 0
        self.ema_begun = 0  # the step whose weights it began with; 0: the initial weights
        self.kinds = (s.average,)
        if s.average == "none":
            self.kinds = ()
        if s.average == "best":
            self.kinds = ("ema", "swa", "lawa")

    def start(self):
        """Before the first step: an EMA over the whole run starts at the initial weights."""
        if "ema" in self.kinds and self.s.ema_start_frac == 0:
            self.ema_start(0)

    def current(self):
        """A copy of the weights as they are."""
        return [bank.weight.clone() for bank in self.banks]

    @torch.no_grad()
    def update(self, step, progress, falling):
        """Call it after each optimizer step.

        step: its number, from 1. progress: of the run, when the step began. falling: warmdown() of
        the step; not lr_scale(), which is small in a warm-up, too.
        """
        s = self.s
        if "ema" in self.kinds and progress >= s.ema_start_frac:
            if "ema" in self.kept:
                self.ema()
            else:
                self.ema_start(step)
        if "swa" in self.kinds and falling < s.swa_start_scale and step % s.swa_every == 0:
            self.swa()
        if "lawa" in self.kinds and step % s.lawa_freq == 0:
            self.lawa()

    def ema_start(self, step):
        """Begin the exponential moving average with the weights after a step."""
        self.kept["ema"] = [self.current()]
        self.ema_begun = step

    def ema(self):
        """Move the exponential moving average towards the weights."""
        averages = self.kept["ema"][0]
        for average, bank in zip(averages, self.banks):
            average.lerp_(bank.weight, 1 - self.s.ema_decay)

    def swa(self):
        """Stochastic weight averaging: add the weights to the sum of snapshots."""
        if "swa" not in self.kept:
            self.kept["swa"] = [[torch.zeros_like(bank.weight) for bank in self.banks]]
        sums = self.kept["swa"][0]
        for total, bank in zip(sums, self.banks):
            total.add_(bank.weight)
        self.swa_count += 1

    def lawa(self):
        """Latest weight averaging: keep the weights as the newest of LAWA_K snapshots."""
        snapshots = [*self.kept.get("lawa", []), self.current()]
        self.kept["lawa"] = snapshots[-self.s.lawa_k :]

    def mean(self, kind):
        """The average of a kind, shaped like the banks, or None if it never began."""
        if kind not in self.kept:
            return None
        snapshots = self.kept[kind]
        count = self.swa_count if kind == "swa" else len(snapshots)
        return [sum(tensors) / count for tensors in zip(*snapshots)]

    @torch.no_grad()
    def apply(self, weights):
        """Replace the weights of the model by `weights`, shaped like the banks."""
        for bank, weight in zip(self.banks, weights):
            bank.weight.copy_(weight)


# --------------------------------------------------------------------------------------------------
# 6 Data
# --------------------------------------------------------------------------------------------------

# A shard: a header of 256 little-endian int32 words, then uint16 tokens.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER = 1024  # bytes
# Bytes of FineWeb's 50,000 validation documents, with any tokenizer (rules of the contest).
FINEWEB_VAL_BYTES = 151_080_891

SPACE = "\u2581"  # what SentencePiece writes for a space
# Probes of tokenizer_fault(): a text of common characters, and one with a character that no
# vocabulary has.
PROBE_TEXTS = ("a b", "zq\U0001f9ff \U0001f9ff xj")
# Characters that NFKC leaves alone and that case folding, or a rule of a user's own, may change.
PROBE_CHARACTERS = "".join(map(chr, range(33, 127))) + "\xc9\xdf\u03a3\u042f"
# Normalisations that change a text no more than the contest's own, nmt_nfkc.
CONTEST_NORMALISATIONS = ("identity", "nfkc", "nmt_nfkc")
# The operators of a CaseOps tokenizer (#1729); the last one escapes the others.
CASE_OPERATORS = "\ue001\ue002\ue003\ue004"


# ---- shards --------------------------------------------------------------------------------------


def read_shard(path, vocab_size=None):
    """Tokens of a shard as a read-only uint16 memory map.

    BadInput for anything that is not the contest's format; with vocab_size also for a token
    outside the vocabulary.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    magic = version = count = 0  # where the file is too short: it fails as one of a wrong magic
    if len(head) == 12:
        magic, version, count = struct.unpack("<3i", head)
    expected_size = SHARD_HEADER + 2 * max(count, 0)
    checks = ((0, "magic", magic, SHARD_MAGIC), (4, "version", version, SHARD_VERSION),
              (8, "length in bytes", size, expected_size))
    for offset, quantity, found, expected in checks:
        if found != expected:
            raise BadInput(f"{path}: not a token shard: {quantity} (offset {offset}) should be "
                           f"{expected}, found {found}; make it again with data/prepare.py or "
                           "data/fineweb.py")
    if count == 0:
        raise BadInput(f"{path}: the shard holds no tokens (offset 8)")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER, shape=(count,))
    if vocab_size is not None:
        check_tokens(tokens, vocab_size, path, 0)
    return tokens


def check_tokens(tokens, vocab_size, path, start):
    """BadInput for a token outside the vocabulary; tokens[0] is number `start` of the shard."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        i = int(np.argmax(tokens >= vocab_size))
        offset = SHARD_HEADER + 2 * (start + i)
        raise BadInput(f"{path}: token {int(tokens[i])} at offset {offset} is outside "
                       f"VOCAB_SIZE={vocab_size}; these shards belong to another tokenizer")


def list_shards(folder, split):
    """Shards of a split in the order of their numbers, with or without leading zeros.

    BadInput for a file whose name has no valid number, or the number of another file (a copy).
    """
    paths = {}
    for path in sorted(Path(folder).glob(f"fineweb_{split}_[0-9]*.bin")):
        digits = path.stem.removeprefix(f"fineweb_{split}_")
        if not digits.isdecimal():
            raise BadInput(f"{path}: {digits!r} is no number of a shard; move the file away, or "
                           "rename it")
        number = int(digits)
        if number in paths:
            raise BadInput(f"{path}: has the number of {paths[number].name}; "
                           "move one of them away")
        paths[number] = path
    return [paths[number] for number in sorted(paths)]


def find_shards(folder, split):
    """The shards of a split. BadInput, with the command that makes them, if there are none."""
    paths = list_shards(folder, split)
    if paths:
        return paths
    if "fineweb10B_" in str(folder):
        variant = Path(folder).name.removeprefix("fineweb10B_")
        fix = f"python data/fineweb.py --variant {variant} --train-shards 80"
    else:
        fix = f"python data/prepare.py --source YOUR_TEXT --out {folder}"
    raise BadInput(f"no fineweb_{split}_*.bin in DATA_PATH={folder}; make them with: {fix}"
                   "   (or, with no download: python data/prepare.py --source builtin)")


# ---- tokenizer and bytes -------------------------------------------------------------------------


def load_tokenizer(s):
    """(SentencePiece processor, path, SHA-256) for the settings' shards."""
    try:
        import sentencepiece
    except ImportError:
        raise BadInput("tokenizers need the package sentencepiece: "
                       "pip install sentencepiece") from None
    folder = Path(s.data_path)
    candidates = tokenizer_paths(s)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        names = " or ".join(map(str, candidates))
        raise BadInput(f"no tokenizer at {names}; set TOKENIZER_PATH, or make one with "
                       "data/prepare.py or data/fineweb.py")
    try:
        model = path.read_bytes()  # SentencePiece cannot open a path that is not UTF-8; Python can
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0][:80]
        raise BadInput(f"{path} is not a SentencePiece model ({reason})") from None
    if sp.vocab_size() != s.vocab_size:
        raise BadInput(f"{path} has {sp.vocab_size()} pieces but VOCAB_SIZE={s.vocab_size}; "
                       "make them equal")
    fault = tokenizer_fault(sp)
    if fault:
        raise BadInput(f"{path}: {fault}")
    digest = hashlib.sha256(model).hexdigest()
    made_with = manifest_tokenizer(folder)
    if made_with is not None and made_with != digest:
        raise BadInput(f"{path} (SHA-256 {digest[:12]}) is not the tokenizer of the shards in "
                       f"{folder} (manifest: {made_with[:12]}); set TOKENIZER_PATH")
    return sp, path, digest


def tokenizer_paths(s):
    """Where the tokenizer may be: TOKENIZER_PATH alone, or our place and that of the contest.

    In the contest's layout, shards in datasets/fineweb10B_sp8192_VARIANT belong to
    tokenizers/fineweb_8192_bpe_VARIANT.model.
    """
    if s.tokenizer_path:
        return [Path(s.tokenizer_path)]
    folder = Path(s.data_path)
    # The variant is "" or such as _lossless_caps_caseops_v1_reserved.
    _, _, variant = folder.name.partition(f"_sp{s.vocab_size}")
    contest_folder = folder.parent.parent / "tokenizers"
    contest_path = contest_folder / f"fineweb_{s.vocab_size}_bpe{variant}.model"
    return [folder / "tokenizer.model", contest_path]


def manifest_tokenizer(folder):
    """SHA-256 of the tokenizer of a data set, by its manifest; None where that is unknown."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        digest = manifest["tokenizer"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # _check_bytes names a broken manifest
    if not isinstance(digest, str):
        return None
    return digest


def foreign_tokens(sp, stream):
    """A sentence if another tokenizer seems to have made the validation shards, else "". Looks at
    the first 100 documents that are complete within 200,000 tokens.

    A wrong tokenizer of the right size decodes them to a text that nobody wrote, and counts the
    bytes of that text correctly. But encoding that text again gives other tokens.
    """
    ids = stream.tokens[:200_000].cpu().numpy()
    starts = np.flatnonzero(ids == BOS)[:101]
    documents = [ids[start + 1 : end].tolist() for start, end in zip(starts, starts[1:])]
    changed = 0
    for document in documents:
        if sp.encode(sp.decode(document)) != document:
            changed += 1
    if changed <= max(1, len(documents) // 10):  # normalising twice changes a text now and then
        return ""
    return (f"{changed} of {len(documents)} validation documents, decoded and encoded again, have "
            "other tokens: they seem to be of another tokenizer")


def tokenizer_fault(sp):
    """Why the byte table would miscount text that this tokenizer encoded, and the fix; "" if not.

    Both the trainer and data/prepare.py ask this. Pad, eos and unk may have any id: control pieces
    count no bytes. Only BOS must be where the shards have it.
    """
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    if sp.bos_id() != BOS:
        ids = (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id())
        return (f"pad, bos, eos and unk are {ids}, but documents begin with {BOS}; "
                f"train it with bos_id={BOS}")
    byte_pieces = sum(sp.is_byte(i) for i in range(len(pieces)))
    if byte_pieces != 256:
        return (f"{byte_pieces} byte pieces instead of 256, so some text is lost; "
                "train it with byte_fallback")
    escapes_spaces = SPACE in sp.normalize("a b")
    if escapes_spaces and sp.is_unknown(sp.piece_to_id(SPACE)):
        return ("no piece for a single space (U+2581), so it would count 3 bytes; "
                "use a tokenizer that has it")
    for piece in pieces:
        if SPACE in piece[1:]:
            return (f"a space inside the piece {piece[:20]!r}, but the byte table knows it in "
                    "front only; use a tokenizer without such pieces")
    tables = byte_tables(sp, len(pieces))
    for text in PROBE_TEXTS:
        # A model of words fails here: it spells an unknown word in bytes, U+2581 in front included.
        normalised = sp.normalize(text).replace(SPACE, " ").removeprefix(" ")
        size = len(normalised.encode())
        counted = int(target_bytes([BOS, *sp.encode(text)], tables).sum())
        if counted != size:
            return (f"{text!r} has {size} bytes, its tokens count {counted}; "
                    "use a BPE, unigram or char model")
    return ""


def text_changes(sp):
    """How a tokenizer changes texts more than the contest's tokenizers do, which normalise by NFKC
    and merge runs of spaces; "" if it does not.
    """
    normaliser_field, name_field, characters_field = 3, 1, 2  # of sentencepiece_model.proto
    spec = protobuf_fields(protobuf_fields(sp.serialized_model_proto()).get(normaliser_field, b""))
    name = "identity"  # without a table of characters nothing changes, whatever the name says
    if spec.get(characters_field):
        name = spec.get(name_field, b"")[:40].decode(errors="replace")
    written = {letter: sp.normalize(letter).removeprefix(SPACE) for letter in PROBE_CHARACTERS}
    changed = [letter for letter in PROBE_CHARACTERS if written[letter] != letter]
    if name in CONTEST_NORMALISATIONS and not changed:
        return ""
    example = ""
    if changed:
        example = f" (it writes {written[changed[0]]!r} for {changed[0]!r})"
    return (f"bytes are those of the normalised text: the normalisation {name!r} "
            f"changes it{example}")


def protobuf_fields(message):
    """{field number: value} of a protobuf message: varints as int, all else as bytes.

    Of a repeated field it is the last value.
    """
    values = {}
    position = 0
    while position < len(message):
        tag, position = read_varint(message, position)
        number, wire_type = divmod(tag, 8)
        if wire_type == 0:
            values[number], position = read_varint(message, position)
            continue
        if wire_type == 1:
            size = 8
        elif wire_type == 5:
            size = 4
        else:
            size, position = read_varint(message, position)
        values[number] = message[position : position + size]
        position += size
    return values


def read_varint(message, position):
    """(number at a position of a protobuf message, position after it): 7 bits a byte."""
    value = 0
    shift = 0
    while message[position] >= 128:  # the highest bit says that another byte follows
        value |= (message[position] & 127) << shift
        shift += 7
        position += 1
    return value | message[position] << shift, position + 1


def byte_tables(sp, vocab_size):
    """The contest's byte rule as three tables over the vocabulary: (bytes of the piece without
    its leading space, whether it has a leading space, whether it is a boundary).

    A leading space costs one byte more unless the token before is a boundary (a control, unknown
    or unused piece).
    """
    piece_bytes = np.zeros(vocab_size, np.int16)
    leading_space = np.zeros(vocab_size, bool)
    boundary = np.ones(vocab_size, bool)
    for i in range(min(sp.vocab_size(), vocab_size)):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        boundary[i] = False
        if sp.is_byte(i):
            piece_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        leading_space[i] = piece.startswith(SPACE)
        piece_bytes[i] = len(piece.removeprefix(SPACE).encode())
    return piece_bytes, leading_space, boundary


def target_bytes(ids, tables):
    """Bytes charged to each target ids[1:], int16: what the score divides by."""
    piece_bytes, leading_space, boundary = tables
    ids = np.asarray(ids)
    targets = ids[1:]
    tokens_before = ids[:-1]
    space_counts = leading_space[targets] & ~boundary[tokens_before]
    return piece_bytes[targets] + space_counts.astype(np.int16)


def has_case_operators(sp):
    """Whether this is a CaseOps tokenizer, whose shards hold a transformed text."""
    return not any(sp.is_unknown(sp.piece_to_id(operator)) for operator in CASE_OPERATORS)


def read_sidecar(paths):
    """Number of bytes of the text that each token of the validation shards stands for, (N,) int32.

    CaseOps data (#1729) has a file fineweb_val_bytes_*.bin for each shard; None for other data.
    """
    expected_paths = []
    for path in map(Path, paths):
        expected_paths.append(path.with_name(path.name.replace("_val_", "_val_bytes_")))
    folder = expected_paths[0].parent
    byte_paths = list_shards(folder, "val_bytes")
    if not byte_paths:
        return None
    fix = "make or fetch the data set again with data/prepare.py --caseops or data/fineweb.py"
    if byte_paths != expected_paths:
        names = ", ".join(path.name for path in byte_paths[:3])
        raise BadInput(f"{folder}: expected one fineweb_val_bytes_*.bin for each of the "
                       f"{len(paths)} validation shards, found {len(byte_paths)}: {names}; {fix}")
    sidecar = []
    for path, byte_path in zip(paths, byte_paths):
        ids = read_shard(path)
        counts = read_shard(byte_path)
        if len(ids) != len(counts):
            raise BadInput(f"{byte_path}: expected {len(ids)} byte counts, one for each token of "
                           f"{Path(path).name}, found {len(counts)}; {fix}")
        wrong = (ids == BOS) & (counts > 0)
        if wrong.any():
            i = int(np.argmax(wrong))
            offset = SHARD_HEADER + 2 * i
            raise BadInput(f"{byte_path}: expected 0 bytes for the BOS token at offset {offset}, "
                           f"found {int(counts[i])}: it belongs to another shard; {fix}")
        sidecar.append(counts)
    return np.concatenate(sidecar).astype(np.int32)


# ---- training stream -----------------------------------------------------------------------------


def merge_short_shards(lengths, minimum):
    """Lengths of the shards after those shorter than `minimum` were joined to their neighbours.

    A short shard is joined to the next ones until it is long enough, at the end to the one before.
    """
    merged = []
    pending = 0
    for length in lengths:
        pending += length
        if pending >= minimum:
            merged.append(pending)
            pending = 0
    if pending and merged:
        merged[-1] += pending
    elif pending:
        merged = [pending]
    return merged


def shuffled_order(counts, rng, batch_blocks=None):
    """Every block of every shard once, as rows (shard, block), in random order (#1394).

    counts: the number of blocks of each shard. batch_blocks: not used.
    """
    shards = np.repeat(np.arange(len(counts)), counts)
    blocks = np.concatenate([np.arange(count) for count in counts])
    pairs = np.stack([shards, blocks], 1)
    return pairs[rng.permutation(len(pairs))]


def coprime_order(counts, rng, batch_blocks):
    """Every block of every shard once, as rows (shard, block), in the manner of #1060.

    counts: the number of blocks of each shard, which is walked in the order of coprime_walk().
    The walks are mixed batch by batch, of `batch_blocks` blocks each; near the end a batch may be
    shorter. A shard's weight is a power of the number of its blocks that are left. A batch first
    draws distinct shards by weight and takes one block of each; its other blocks are shared out
    among these, by weight. Over the first 1,800 batches, the number of shards rises from 8 to 64,
    and the power falls from 0.9 to 0.5.
    """
    walks = [coprime_walk(count, rng) for count in counts]
    counts = np.array(counts)
    left = counts.copy()
    batches = []
    while left.any():
        progress = min(len(batches) / 1800, 1.0)
        power = 0.9 - 0.4 * progress
        weight = left**power
        shards = min(round(8 + 56 * progress), np.count_nonzero(left), batch_blocks)
        drawn = rng.choice(len(counts), shards, replace=False, p=weight / weight.sum())
        shares = weight[drawn] / weight[drawn].sum()
        takes = 1 + rng.multinomial(batch_blocks - shards, shares)
        takes = np.minimum(takes, left[drawn])
        batch = []
        for shard, take in zip(drawn, takes):
            begin = counts[shard] - left[shard]
            for block in walks[shard][begin : begin + take]:
                batch.append((shard, block))
        left[drawn] -= takes
        batches.append(rng.permutation(batch))
    return np.concatenate(batches)


def coprime_walk(count, rng):
    """The blocks 0 to count - 1, from a random start by a random stride coprime to `count`."""
    if count == 0:
        return np.arange(0)
    start = int(rng.integers(count))
    stride = 1
    if count > 1:
        strides = rng.permutation(np.arange(1, count))
        stride = next(n for n in strides if math.gcd(int(n), count) == 1)
    return (start + stride * np.arange(count)) % count


class Contamination:
    """Which documents of one text, at least PREFIX tokens long, begin in spans of another text.

    A document does if its opening stands there: its first PREFIX tokens after a BOS. The span need
    not show all of them, only the BOS and one token: this is strict, for one token that was trained
    on counts. Where spans show only later text of a document, it is not found. Openings are
    compared by a hash of 64 bits.
    """

    PREFIX = 64  # as for data/prepare.py, which leaves out such training documents
    # Of Knuth's multiplier for 64 bits.
    POWERS = np.array([pow(6364136223846793005, power, 1 << 64) for power in range(1, PREFIX + 1)],
                      np.uint64)

    def __init__(self, tokens):
        self.keys = np.unique(self._keys(tokens, self._starts(tokens)))
        self.met = np.zeros(len(self.keys), bool)

    def _starts(self, tokens):
        """Where documents begin: after each BOS, except one at the very end."""
        return np.flatnonzero(tokens[:-1] == BOS) + 1

    def _keys(self, tokens, starts):
        """Hashes of the openings at `starts` of a text: polynomials in the tokens, modulo 2^64."""
        starts = starts[starts + self.PREFIX <= len(tokens)]
        openings = tokens[starts[:, None] + np.arange(self.PREFIX)].astype(np.uint64)
        openings = openings[(openings != BOS).all(1)]  # shorter documents say too little
        return (openings * self.POWERS).sum(1, dtype=np.uint64)

    def find(self, tokens, text_after=None):
        """Numbers of the documents that begin in these tokens.

        text_after: function (count) -> the tokens that follow these, for an opening that goes
        beyond them.
        """
        starts = self._starts(tokens)
        if not len(self.keys) or not len(starts):
            return []
        if text_after and starts[-1] + self.PREFIX > len(tokens):
            tokens = np.concatenate((tokens, text_after(self.PREFIX)))
        keys = self._keys(tokens, starts)
        slots = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return slots[self.keys[slots] == keys].tolist()

    def note(self, documents):
        """These were trained on."""
        self.met[documents] = True

    def found(self, rt):
        """Keys of the documents that any rank has met. Collective."""
        met = rt.sum(torch.from_numpy(self.met.astype(np.int32)).to(rt.device)) > 0
        return self.keys[met.cpu().numpy()]

    def restore(self, keys):
        """Note documents that the run had met before it was resumed."""
        self.met |= np.isin(self.keys, keys)


class BatchRequest(NamedTuple):
    """A batch over all ranks: tokens from a position of the stream, in sequences of `length`."""

    position: int
    length: int
    tokens: int


class ReadAhead(NamedTuple):
    """The batch that the thread reads while another one is trained on."""

    request: BatchRequest | None
    batch: object  # a future of what _read_batch returns


class TokenStream:
    """Training batches. Each target is used at most once an epoch.

    LOADER says in which order.
    sequential: sequences are cut one after the other from the concatenated shards.
    packed: the same, but a micro-batch is one long row whose documents do not see each other.
    shuffled, coprime: the shards are cut into blocks of the longest training sequence, and the
    blocks are reordered each epoch. A shard that is too short for a block is joined to the next.

    The whole state is `position`, a number of tokens. A batch depends only on that and on the
    settings, so any number of ranks sees the same stream. A thread reads the next batch while this
    one is trained on.

    `find_documents` is a function (ids, length) -> Docs of a micro-batch, or None where the model
    finds documents itself.
    """

    def __init__(self, paths, s, rt, find_documents=None):
        self.paths = paths
        self.s = s
        self.rt = rt
        self.find_documents = find_documents
        self.position = 0
        # Validation documents that are looked for in every batch; train() sets them.
        self.copies = Contamination(np.empty(0, np.uint16))
        self.packed = s.loader == "packed"
        self.reordered = s.loader in ("shuffled", "coprime")
        self.shards = [read_shard(path) for path in paths]
        self.held = np.empty(0, np.uint16)
        if s.average == "best":
            self.hold_out(s.holdout_tokens)
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.check_stages()
        if self.ends[-1] < 2:
            raise BadInput(f"{paths[0]}: the training stream holds fewer than 2 tokens")
        self.total = int(self.ends[-1])  # tokens of an epoch
        if self.reordered:
            self.cut_into_blocks()
        self._orders = {}
        self._thread = ThreadPoolExecutor(1, "loader")
        self._ahead = ReadAhead(None, None)
        self._found = []  # numbers of validation documents in the batch that is being read

    @property
    def epoch(self):
        return self.position / self.total

    def cut_into_blocks(self):
        """The blocks of the shards, which LOADER=shuffled|coprime reorders."""
        self.block = max(stage.length for stage in self.s.stages)  # tokens of a block
        self.lengths = merge_short_shards([len(shard) for shard in self.shards], self.block + 1)
        self.counts = [(length - 1) // self.block for length in self.lengths]  # of blocks
        if not sum(self.counts):
            raise BadInput(f"{self.paths[0]}: LOADER={self.s.loader} deals out blocks, but the "
                           f"shards hold fewer than the {self.block + 1} tokens of one; shorten "
                           "the sequences, or prepare more text")
        self.total = sum(self.counts) * self.block

    def hold_out(self, count):
        """Set the last `count` tokens of the stream aside in `held`: they are not trained on."""
        tails = []
        while count > 0 and self.shards:
            shard = self.shards.pop()
            start = max(len(shard) - count, 0)
            tail = shard[start:]
            check_tokens(tail, self.s.vocab_size, self.paths[len(self.shards)], start)
            tails.insert(0, tail)
            count -= len(tail)
            if start > 0:
                self.shards.append(shard[:start])
        if not self.shards:
            raise BadInput(f"HOLDOUT_TOKENS={self.s.holdout_tokens} leaves nothing to train on")
        self.held = np.concatenate(tails)

    def check_stages(self):
        """BadInput if the ranks cannot share the batches of a stage evenly."""
        world = self.rt.world
        for _, length, tokens in self.s.stages:
            sequences = tokens // length
            if sequences % world:
                raise BadInput(f"TRAIN_BATCH_TOKENS={tokens} is {sequences} sequences of "
                               f"TRAIN_SEQ_LEN={length}, which {world} ranks cannot share evenly")
            on_rank, in_micro_batch = self.split_batch(length, tokens)
            if self.packed and on_rank % in_micro_batch:
                row_tokens = in_micro_batch * length
                rank_tokens = on_rank * length
                raise BadInput(f"LOADER=packed makes rows of {row_tokens} tokens, but {world} "
                               f"ranks have {rank_tokens} each; MICRO_BATCH_TOKENS={rank_tokens} "
                               "makes them fit")

    def split_batch(self, length, tokens):
        """(sequences of a batch on a rank, sequences of a micro-batch).

        All micro-batches have one shape, so that one graph serves.
        """
        on_rank = tokens // length // self.rt.world
        # A packed row is the same for any number of ranks, so it must divide the whole batch.
        divided = tokens // length if self.packed else on_rank
        limit = max(1, min(divided, self.s.micro_batch_tokens // length))
        in_micro_batch = max(n for n in range(1, limit + 1) if divided % n == 0)
        return on_rank, in_micro_batch

    def read(self, start, count):
        """`count` tokens of the concatenated shards from `start`, beginning again at their end.

        BadInput for a token outside the vocabulary. Copies of validation documents are found.
        """
        tokens = self._text(start, count, self.s.vocab_size)
        self._found += self.copies.find(tokens, partial(self._text, start + count))
        return tokens

    def _text(self, start, count, vocab_size=None):
        """The tokens that read() returns; checked if vocab_size is given."""
        tokens = np.empty(count, np.uint16)
        filled = 0
        while filled < count:
            index = (start + filled) % int(self.ends[-1])
            number = int(np.searchsorted(self.ends, index, side="right"))
            shard = self.shards[number]
            offset = index - int(self.ends[number]) + len(shard)
            span = shard[offset : offset + count - filled]
            if vocab_size is not None:
                check_tokens(span, vocab_size, self.paths[number], offset)
            tokens[filled : filled + len(span)] = span
            filled += len(span)
        return tokens

    def _block_starts(self, epoch):
        """Where the blocks of an epoch start in the concatenated shards, in their new order."""
        if epoch not in self._orders:
            rng = np.random.default_rng([self.s.seed, epoch])
            # Whole blocks leave some tokens over. Each epoch skips another number in front.
            spare = [(length - 1) % self.block for length in self.lengths]
            skipped = [int(rng.integers(count + 1)) for count in spare]
            # Of the last stage, which is the longest as a rule.
            batch_blocks = max(self.s.stages[-1].tokens // self.block, 1)
            reorder = shuffled_order if self.s.loader == "shuffled" else coprime_order
            shard, block = reorder(self.counts, rng, batch_blocks).T
            shard_starts = np.cumsum([0, *self.lengths[:-1]]) + skipped
            for other in list(self._orders):
                if other != epoch - 1:  # a batch spans two epochs, if it is not longer than one
                    del self._orders[other]
            self._orders[epoch] = shard_starts[shard] + block * self.block
        return self._orders[epoch]

    def sequence(self, position, length):
        """The `length` + 1 tokens of the sequence at a position of the reordered stream."""
        epoch, position_in_epoch = divmod(position, self.total)
        block, offset = divmod(position_in_epoch, self.block)
        start = int(self._block_starts(epoch)[block])
        return self.read(start + offset, length + 1)

    def next(self, length=None, tokens=None):
        """This rank's share of the next batch, as micro-batches [(x, y, docs)].

        x and y are (sequences, length) int64, packed (1, sequences * length). docs is None where
        the model finds documents itself. Without arguments: the batch of the first stage.
        """
        stage = self.s.stages[0]
        request = self._request(length or stage.length, tokens or stage.tokens)
        ahead = self._ahead
        if ahead.request != request:
            ahead = self._read_ahead(request)
        micro_batches, docs, documents = ahead.batch.result()
        self.copies.note(documents)
        self.position = request.position + request.tokens
        self._ahead = self._read_ahead(request._replace(position=self.position))
        return self._to_device(micro_batches, docs)

    def prefetch(self, length, tokens):
        """Read the next batch before the clock runs: the first order of the blocks of many shards
        takes seconds. An error is left to next().

        A signal must not be raised in here: it could cut the start of the thread in half, and
        Python would wait for that thread for ever.
        """
        self._ahead = self._read_ahead(self._request(length, tokens))
        self._ahead.batch.exception()

    def _request(self, length, tokens):
        position = self.position
        if self.reordered:
            # A new stage may have another length: no sequence may cross the end of a block.
            position = ceil_div(position, length) * length
        return BatchRequest(position, length, tokens)

    def _read_ahead(self, request):
        return ReadAhead(request, self._thread.submit(self._read_batch, request))

    def _read_batch(self, request):
        """(tokens, Docs as of _prepare, numbers of validation documents) of this rank's share of a
        batch; called by the thread.
        """
        self._found = []
        position, length, tokens = request
        on_rank, in_micro_batch = self.split_batch(length, tokens)
        begin = position + self.rt.rank * on_rank * length
        if self.reordered:
            sequences = [self.sequence(begin + i * length, length) for i in range(on_rank)]
            batch = np.stack(sequences)
        else:
            width = in_micro_batch * length if self.packed else length
            span = self.read(begin, on_rank * length + 1)
            # Rows of width + 1 tokens: the last target of a row is the first input of the next.
            batch = np.lib.stride_tricks.sliding_window_view(span, width + 1)[::width]
        ids = torch.from_numpy(batch.astype(np.int32))
        return *self._prepare(ids, length, in_micro_batch), self._found

    def synthetic(self, generator, length=None, tokens=None):
        """A batch of random tokens, laid out like a real one: it compiles the same graph."""
        length = length or self.s.stages[0].length
        tokens = tokens or self.s.stages[0].tokens
        on_rank, in_micro_batch = self.split_batch(length, tokens)
        shape = (on_rank, length + 1)
        if self.packed:
            shape = (on_rank // in_micro_batch, in_micro_batch * length + 1)
        batch = torch.randint(self.s.vocab_size, shape, dtype=torch.int32, generator=generator)
        return self._to_device(*self._prepare(batch, length, in_micro_batch))

    def _prepare(self, batch, length, in_micro_batch):
        """(tokens of each micro-batch, Docs of each or None) on the CPU, pinned for a GPU.

        Where documents start is found here for a varlen kernel: nothing waits for it.
        """
        micro_batches = batch.split(1 if self.packed else in_micro_batch)
        docs = [None] * len(micro_batches)
        if self.find_documents:
            docs = [self.find_documents(tokens[:, :-1], length) for tokens in micro_batches]
        if self.rt.device.type == "cuda":
            micro_batches = [tokens.pin_memory() for tokens in micro_batches]
            docs = [map_docs(Tensor.pin_memory, documents) for documents in docs]
        return micro_batches, docs

    def _to_device(self, micro_batches, docs):
        """Micro-batches [(x, y, docs)] on the device, without waiting for the copies."""
        def move(tensor):
            return tensor.to(self.rt.device, non_blocking=True)

        on_device = []
        for tokens, documents in zip(micro_batches, docs):
            tokens = move(tokens).long()
            documents = map_docs(move, documents)
            varlen = documents is not None and documents.cu_seqlens is not None
            if varlen and self.rt.compiled:
                # One graph serves any number of documents.
                torch._dynamo.maybe_mark_dynamic(documents.cu_seqlens, 0)
            x = tokens[:, :-1].contiguous()
            y = tokens[:, 1:].contiguous()
            on_device.append((x, y, documents))
        return on_device


def map_docs(function, docs):
    """Docs with a function applied to each of its tensors; None stays None."""
    if docs is None:
        return None
    return Docs(*(None if tensor is None else function(tensor) for tensor in docs))


# ---- validation stream ---------------------------------------------------------------------------


class ValStream(NamedTuple):
    """The validation text: every token after the first is a target."""

    tokens: Tensor  # (N + 1,) int32 on the device
    bytes: Tensor  # (N,) int16 or int32: bytes charged to each target
    whole: bool  # False where VAL_TOKENS cut it
    sidecar: bool = False  # the bytes are those of fineweb_val_bytes_*.bin, not of the byte table


def unmeasured_text(tokens):
    """ValStream of tokens (N + 1,) whose bytes do not matter: one for each target."""
    one_byte_each = torch.ones(len(tokens) - 1, dtype=torch.int16, device=tokens.device)
    return ValStream(tokens, one_byte_each, False)


def load_validation(s, rt, sp):
    """All validation shards in order, with the bytes of each target.

    The bytes are counted from the ids alone, before any scoring, or given by a sidecar. BadInput
    for a tokenizer with case operators whose data has no sidecar: the byte table would count 3
    bytes for each operator.
    """
    paths = find_shards(s.data_path, "val")
    ids = np.concatenate([read_shard(path, s.vocab_size) for path in paths])
    whole = not s.val_tokens or s.val_tokens >= len(ids) - 1
    if not whole:
        ids = ids[: s.val_tokens + 1]
    if len(ids) - 1 < s.eval_seq_len:
        raise BadInput(f"the validation stream has {len(ids) - 1} targets, fewer than one window "
                       f"of EVAL_SEQ_LEN={s.eval_seq_len}; shorten it, or prepare more validation "
                       "text")
    sidecar = read_sidecar(paths)
    if sidecar is not None:
        counts = sidecar[1 : len(ids)]
    elif has_case_operators(sp):
        raise BadInput(f"{s.data_path}: the tokenizer has case operators, which are no bytes of "
                       "the text, but there is no fineweb_val_bytes_*.bin; make it with "
                       "data/prepare.py --caseops, or use data/fineweb.py")
    else:
        counts = target_bytes(ids, byte_tables(sp, s.vocab_size))
    tokens = torch.from_numpy(ids.astype(np.int32)).to(rt.device)
    return ValStream(tokens, torch.from_numpy(counts).to(rt.device), whole, sidecar is not None)


# --------------------------------------------------------------------------------------------------
# 7 Quantisation
# Weights become integers ("codes") times step sizes. Calibration measures how much the loss rises
# with an error in each weight; GPTQ, FIT=allocate, AWQ-lite and LQER go by that. Quantiser puts it
# all together.
# --------------------------------------------------------------------------------------------------


# ---- calibration: how sensitive the loss is to an error in each weight ---------------------------


class Curvature(NamedTuple):
    """How sensitive the loss is to an error E (R, C) in one weight, by its second-order term: the
    loss rises by half the sum over rows r of gain[r] E[r] hessian E[r]^T, in nats a token. This is
    the Fisher information as a Kronecker product (K-FAC, arXiv 1503.05671) whose second factor is
    diagonal.
    """

    # (C, C). Matrix: mean of x x^T over tokens and visits of its layer, x what it multiplies.
    # Table: mean of g g^T over lookups, g the gradient of the loss at its output.
    hessian: Tensor
    # (R,). Matrix: squared gradient of a token's loss at each output, summed over visits.
    # Table: lookups of each row, for a token.
    gain: Tensor
    # Of a head: the variance of logit r is this times E[r] hessian E[r]^T. 0: it is no head.
    logits: float = 0.0
    # (C,) mean square of each column of x; None for a table that is only looked up.
    input_squares: Tensor | None = None

    def to(self, device):
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in self]
        return Curvature(*moved)

    def loss(self, error):
        """Nats a token by which an error (R, C) of the weight raises the loss."""
        return 0.5 * (self.gain @ ((error @ self.hessian) * error).sum(1)).item()


class CurvatureMeter:
    """Sums over texts that give the Curvature, by hooks on the one forward. The labels are those of
    the text: sampling them from the model, as theory wants, gave the same artifact to 0.2 % of its
    bytes.
    """

    def __init__(self, model):
        self.model = model
        self.tokens = 0
        self.hessian = {}  # {parameter: (C, C) sum of x x^T}
        self.gain = {}  # {parameter: (R,) sum of squared gradients}
        self.input_counts = {}  # {parameter: number of x in its Hessian}
        self._hessian_of = {}  # {parameter: the one that has its Hessian}: q, k and v read one x
        self._last_input = None
        self._last_name = None  # the parameter that multiplied it first
        self._features = None  # output of head_proj, where the model has one

    @contextlib.contextmanager
    def _watching(self):
        """Hooks on every Linear and Embedding. Only the tables require gradients meanwhile: that is
        enough for gradients at every output, and none of a matrix is computed.
        """
        hooks = []
        if self.model.head_proj is not None:
            hooks.append(self.model.head_proj.register_forward_hook(self._note_features))
        required = [(param, param.requires_grad) for param in self.model.parameters()]
        for name, module in self.model.named_modules():
            if isinstance(module, Linear):
                watch = self._watch_linear
            elif isinstance(module, Embedding):
                watch = self._watch_table
            else:
                continue
            hooks.append(module.register_forward_hook(partial(watch, f"{name}.weight")))
            module.weight.requires_grad_(isinstance(module, Embedding))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for param, requires_grad in required:
                param.requires_grad_(requires_grad)
                # Between steps those of training are zero.
                if not requires_grad:
                    param.grad = None
                elif param.grad is not None:
                    param.grad.zero_()
            self._last_input = None
            self._last_name = None
            self._features = None

    def _add(self, sums, name, value):
        sums[name] = sums[name].add_(value) if name in sums else value

    def _watch_linear(self, name, module, args, output):
        """args: the input x of the matrix and, where its rows are scaled, their scale."""
        x = args[0]
        scale = args[1] if len(args) > 1 else None
        if x is not self._last_input:  # q, k and v get one tensor, one after the other
            flat = x.detach().flatten(0, -2).float()
            self._add(self.hessian, name, flat.mT @ flat)
            self.input_counts[name] = self.input_counts.get(name, 0) + len(flat)
            self._last_input = x
            self._last_name = name
        self._hessian_of[name] = self._last_name

        def backward(gradient):
            square = gradient.flatten(0, -2).float().square().sum(0)
            if scale is not None:
                square = square * scale.detach().float().square()
            self._add(self.gain, name, square)

        output.register_hook(backward)

    def _note_features(self, module, args, output):
        self._features = output

    def _watch_table(self, name, module, args, output):
        """A table: an error in a row counts once for each lookup, each time through the gradient
        at the output.
        """
        lookups = torch.bincount(args[0].flatten(), minlength=module.weight.size(0))
        self._add(self.gain, name, lookups.float())
        self._hessian_of[name] = name

        def backward(gradient):
            flat = gradient.flatten(0, -2).float()
            self._add(self.hessian, name, flat.mT @ flat)

        output.register_hook(backward)

    def observe(self, ids, targets):
        """Add the text ids, targets (B, T): one forward and one backward."""
        with self._watching(), torch.enable_grad():
            hidden = self.model.hidden(ids)
            logits = self.model.logits(hidden)
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
            features = hidden
            if self.model.head_proj is not None:
                features = self._features
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

    def curvature(self, rt):
        """{parameter: Curvature} over the texts of all ranks. Divides its own sums: call it once.
        """
        # Sums over tokens become means.
        tokens = rt.sum(torch.tensor(float(self.tokens), device=rt.device))
        for sums in (self.hessian, self.gain):
            for name in sorted(sums):  # in one order on all ranks
                rt.sum(sums[name]).div_(tokens)
        # The gain stays a sum over visits, so the Hessian becomes a mean over them: the loss is
        # taken as 1/2 (sum of gains) E (mean Hessian) E^T, as if the two were independent.
        for name, count in self.input_counts.items():
            visits = count / self.tokens
            self.hessian[name].div_(visits)

        modules = self.model.named_modules()
        tables = {f"{name}.weight" for name, module in modules if isinstance(module, Embedding)}
        curvature = {}
        for name, source in self._hessian_of.items():
            hessian = self.hessian[source]
            gain = self.gain[name]
            if name in tables:
                curvature[name] = self._of_table(hessian, gain, tokens)
            else:
                curvature[name] = Curvature(hessian, gain, input_squares=hessian.diagonal())

        hessian = self.hessian["head"]
        head = Curvature(hessian, self.gain["head"], logits=1.0, input_squares=hessian.diagonal())
        if self.model.head is not None:
            curvature["head.weight"] = head
        else:
            curvature["embed.weight"] = self._of_tied_table(curvature["embed.weight"], head)
        return curvature

    def _of_table(self, hessian, lookups, tokens):
        """The gain of a row is how often it is looked up, for a token. Half a lookup more keeps
        rows that this text lacks.
        """
        hessian_of_a_lookup = hessian / lookups.sum().clamp_min(1e-30)
        return Curvature(hessian_of_a_lookup, lookups + 0.5 / tokens)

    def _of_tied_table(self, table, head):
        """A tied table is looked up and multiplied with. The cost of a use is gain * trace. The
        one Hessian is the mean of both uses, each scaled to trace 1 and weighted by its cost. The
        gain of a row is the sum of its costs.
        """
        uses = table, head
        row_costs = [use.gain * use.hessian.trace() for use in uses]
        gain = sum(row_costs)
        use_weights = [cost.sum() / gain.sum() for cost in row_costs]
        hessian = sum(
            [w * use.hessian / use.hessian.trace() for w, use in zip(use_weights, uses)])
        return Curvature(hessian, gain, head.hessian.trace().item(), head.input_squares)


def generate(model, rows, length, temperature, seed, world=1, rank=0, width=None):
    """Text (rows / world rounded up, length + 1) that the model writes: BOS, then tokens drawn at a
    temperature. The random numbers are drawn for the rows of all ranks together, so the text of a
    row does not depend on the number of ranks. Each token sees `width` tokens, or all of them.
    """
    device = model.embed.weight.device
    rows = ceil_div(rows, world)  # of this rank
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(rows * world, length, generator=generator)
    chances = chances[rank * rows : (rank + 1) * rows].to(device)
    ids = torch.full((rows, length + 1), BOS, device=device)
    state = KVCache(model, rows, width or length)
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

# The smallest float16: the least step size, so that a row of zeros is not divided by 0.
SCALE_FLOOR = 2.0**-24
SMALLEST_NORMAL = 2.0**-14  # of float16; below it numbers are multiples of SCALE_FLOOR
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def round_to_grid(weight, step, top):
    """Integers from -top to top nearest to weight / step."""
    return (weight / step).round().clamp(-top, top)


def row_scales(rows, bits, method, sigmas=0.0, floor=0.0):
    """float16 step size of each row of (R, C). Integers reach from -top to top, so a step size
    clips at top times it.

    "ternary": the mean magnitude of the row (arXiv 2402.17764). Else, if `sigmas` is given, the
    clip is that multiple of the row's standard deviation (SDClip, #1394). Else "rtn" clips at the
    largest magnitude; "gptq_lite" (#414) and "gptq" at the percentile of least squared error, for
    every row by itself. No row but a ternary one is clipped below `floor`.
    """
    top = largest_code(bits)
    if method == "ternary":
        return float16_steps(rows.abs().mean(1), SCALE_FLOOR)
    least = max(SCALE_FLOOR, floor / top)
    if method != "rtn" and not sigmas:
        return best_percentile_scales(rows, top, least)
    if sigmas:
        deviation = rows.std(1, correction=min(rows.size(1) - 1, 1))
        return float16_steps(sigmas * deviation / top, least)
    return float16_steps(rows.abs().amax(1) / top, least)


def float16_steps(steps, least):
    """Step sizes in float16, none below `least`. Where float16 is coarse they are rounded up, so
    that nothing is clipped.
    """
    steps = steps.clamp_min(least)
    rounded_up = (steps / SCALE_FLOOR).ceil() * SCALE_FLOOR
    return torch.where(steps < SMALLEST_NORMAL, rounded_up, steps).half()


def best_percentile_scales(rows, top, least):
    """Step size of each row whose clip, one of CLIP_QUANTILES of its magnitudes, has the least
    squared error (#414).
    """
    ordered = rows.abs().sort(dim=1).values
    best = None
    for percentile in CLIP_QUANTILES:
        place = percentile * (rows.size(1) - 1)  # interpolated linearly, as in quantile()
        low = ordered[:, math.floor(place)]
        high = ordered[:, math.ceil(place)]
        clip = low + (high - low) * (place - math.floor(place))
        scale = float16_steps(clip / top, least)
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


def factor_hessian(curvature, damp, act_order):
    """(order (C,), U (C, C) float32) for gptq(): the columns in the order of rounding, and the
    upper triangular U whose U^T U is the inverse of the damped Hessian in that order. With
    act_order, columns of large diagonal come first.

    The weights of an input that is always zero do not matter, but the Hessian needs an inverse:
    its diagonal becomes the mean of the others, which changes neither their damping nor their U.

    With the columns reversed, H = L L^T by one Cholesky factor, and U = L^-1 reversed.
    """
    hessian = curvature.hessian.double().clone()
    diagonal = hessian.diagonal()  # a view: what changes it changes the Hessian
    unused = diagonal <= 0
    diagonal[unused] = 1.0 if unused.all() else diagonal[~unused].mean()
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
    in_model_order = torch.empty_like(codes).scatter_(1, orders[:, :, None].expand_as(codes), codes)
    return in_model_order.mT.contiguous()


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
    """Arrays of a correction A B of error (R, C): LQER (arXiv 2402.02446) with the step sizes of
    #1797.

    A (R, rank): the largest singular vectors of the error, weighted by the loss's sensitivity; 2
    bits (-2..1), one step size. B (rank, C): the best one for that A as it is stored, whatever the
    Hessian; 4 bits (-8..7), a step size for `group` weights. The largest magnitude becomes 1.5 or
    7.5 steps, half way between those of the two ends.
    """
    row_weight = gain.double().clamp_min(LQER_GAIN_FLOOR * gain.mean().item()).sqrt()[:, None]
    damped = hessian.double().clone()
    damped.diagonal().add_(LQER_DAMP * damped.diagonal().mean() + 1e-30)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not lower.isfinite().all():
        raise Stopped("a Hessian is not positive definite for LQER; raise GPTQ_CALIBRATION_TOKENS, "
                      "or LQER_RANK=0", 4)
    weighted = row_weight * error.double()

    u, sizes, _ = torch.linalg.svd(weighted @ lower, full_matrices=False)
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

BYTE_TOP = 127  # largest code that one byte holds; -128 is not a code
# Largest code of codec "wide": q + 127 * over, with q and over of one byte each. Few weights need
# `over`, so it costs little.
WIDEST = BYTE_TOP + BYTE_TOP * BYTE_TOP
# Rounded once: float32 powers differ between machines.
QUARTERS = (2.0 ** (np.arange(4) / 4)).astype(np.float32)


def quarter_octaves(exponents):
    """2^(e/4) of int8 exponents, float32, to the bit the same on every machine."""
    e = exponents.numpy().astype(np.int32)
    return torch.from_numpy(np.ldexp(QUARTERS[e & 3], e >> 2))


def decode_int(arrays, shape):
    step = arrays["scale"].float()[:, None]
    return (arrays["q"].float() * step).view(shape)


def decode_mixed(arrays, shape):
    fine = arrays["fine"].float()[:, None]
    coarse = arrays["scale"].float()[:, None]
    step = torch.where(arrays["salient"] != 0, fine, coarse)
    return (arrays["q"].float() * step).view(shape)


def decode_grid(arrays, shape):
    codes = arrays["q"].float()
    if "over" in arrays:
        codes = codes + BYTE_TOP * arrays["over"].float()
    row = arrays["unit"] * quarter_octaves(arrays["row"])
    column = quarter_octaves(arrays["col"])
    return (codes * row[:, None] * column).view(shape)


def decode_float16(arrays, shape):
    return arrays["half"].float().view(shape)


def per_tensor(shape):
    return 1


def per_row(shape):
    return shape[0]


def per_column(shape):
    return math.prod(shape[1:])


def per_weight(shape):
    return math.prod(shape)


class ArrayFormat(NamedTuple):
    """What an array of an encoded parameter is made of."""

    dtype: type
    # (shape of the parameter) -> how many numbers it has; in CORRECTION (shape, rank, group) -> ...
    count: Callable


class Codec(NamedTuple):
    """A way to store a parameter: how its arrays become weights, and what they are."""

    decode: Callable  # (arrays, shape) -> float32 weights
    arrays: dict[str, ArrayFormat]


INT = {"q": ArrayFormat(np.int8, per_weight), "scale": ArrayFormat(np.float16, per_row)}
MIXED = INT | {"fine": ArrayFormat(np.float16, per_row),
               "salient": ArrayFormat(np.int8, per_column)}
GRID = {"q": ArrayFormat(np.int8, per_weight), "row": ArrayFormat(np.int8, per_row),
        "col": ArrayFormat(np.int8, per_column), "unit": ArrayFormat(np.float32, per_tensor)}
WIDE = GRID | {"over": ArrayFormat(np.int8, per_weight)}
CODECS = {
    "int": Codec(decode_int, INT),
    "mixed": Codec(decode_mixed, MIXED),
    "grid": Codec(decode_grid, GRID),
    "wide": Codec(decode_grid, WIDE),
    "float16": Codec(decode_float16, {"half": ArrayFormat(np.float16, per_weight)}),
}
# Arrays of a low-rank correction (lqer), beside those of any codec; their counts are for (shape,
# rank, group).
CORRECTION = {
    "a": ArrayFormat(np.int8, lambda shape, rank, group: rank * per_row(shape)),
    "a_step": ArrayFormat(np.float16, lambda shape, rank, group: 1),
    "b": ArrayFormat(np.int8, lambda shape, rank, group: rank * per_column(shape)),
    "b_step": ArrayFormat(np.float16,
                          lambda shape, rank, group: ceil_div(rank * per_column(shape), group)),
}


class Encoded(NamedTuple):
    """A parameter as the artifact holds it."""

    codec: str
    bits: int
    rank: int  # of its correction, or 0
    group: int  # weights of B that share a step size
    arrays: dict[str, Tensor]

    def decode(self, shape):
        """float32 weights of a shape."""
        weight = CODECS[self.codec].decode(self.arrays, shape)
        if not self.rank:
            return weight
        a = self.arrays["a"].float().view(shape[0], self.rank) * self.arrays["a_step"].float()
        b_codes = self.arrays["b"].float().flatten()
        b_steps = self.arrays["b_step"].float().repeat_interleave(self.group)[: len(b_codes)]
        b = (b_codes * b_steps).view(self.rank, -1)
        for k in range(self.rank):  # summed in one order everywhere
            weight = weight + a[:, k, None] * b[k]
        return weight


def _to_cpu(arrays):
    return {name: array.cpu() for name, array in arrays.items()}


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

MAX_LOGIT_VARIANCE = 0.1  # of a logit, by rounding; 0.03 and 0.3 were worse
# Of the mean: what calibration never saw gets at most 1,000 times the usual step size.
SENSITIVITY_FLOOR = 1e-6
# Bounds of the exponents, in quarter octaves, which keep them in a byte. SENSITIVITY_FLOOR keeps
# exponents below 40. No sensitivity exceeds n times the mean of n, so none is below -2 log2(n).
# Only rows of absurdly large weights come near their bound.
LARGEST_COLUMN = 60
LARGEST_ROW = 120


def step_exponents(sensitivity):
    """Step sizes proportional to 1 / sqrt(sensitivity), as quarter octaves: 0 for the mean."""
    relative = sensitivity / sensitivity.mean().clamp_min(1e-30)
    return (-2 * relative.clamp_min(SENSITIVITY_FLOOR).log2()).round()


def allocation_grid(weight, curvature, pivots, spacing):
    """Parts of a grid for weight (R, C): step[r, c] = spacing / sqrt(gain[r] pivot[c]), to the
    nearest quarter octave.

    The pivots (C,) are what an error in a column costs once later columns make up for it
    (Quantiser.pivots). A rare token has almost no gain, so its row of a head would be rounded so
    coarsely that the token became likely: the variance of its logit is kept below
    MAX_LOGIT_VARIANCE. Without this bound, rounding the token table cost three times as much loss.
    A row whose codes would be beyond WIDEST gets larger step sizes.
    """
    gain = curvature.gain.float()
    pivots = pivots.float()
    # A row's error has variance spacing^2 / (12 gain pivot[c]) in column c. Summed over the
    # columns, the variance of its logit is curvature.logits * C * spacing^2 / (12 gain).
    gain = gain.clamp_min(curvature.logits * len(pivots) * spacing**2 / (12 * MAX_LOGIT_VARIANCE))
    unit = spacing / (gain.mean() * pivots.mean()).sqrt().clamp_min(1e-30)
    row = step_exponents(gain)
    column = step_exponents(pivots).clamp(-LARGEST_COLUMN, LARGEST_COLUMN)
    largest = (weight.abs() / 2 ** (column / 4)).amax(1) / unit  # code of each row at exponent 0
    least_row = (4 * (largest / WIDEST).clamp_min(1e-30).log2()).ceil()
    row = torch.maximum(row, least_row).clamp(-LARGEST_ROW, LARGEST_ROW)
    return {"row": row.to(torch.int8), "col": column.to(torch.int8), "unit": unit.reshape(1)}


RATE_STEP = 1 / 16
RATE_OCTAVES = np.arange(-24, 40, RATE_STEP)  # log2 of a spread in units of the step size

FIT_SLACK = 2000  # bytes of the budget that may stay empty, with FIT=allocate and FIT=prune
FIT_MARGIN = 500  # bytes below the budget that a try aims at
LEAST_LOSS = 1e-5  # nats a token of all rounding together: finer step sizes would gain nothing


def allocate(quantiser, packed_of, budget, log):
    """Allocation of bits: the artifact (Packed) that fills `budget` bytes to within FIT_SLACK, or
    the one at the finest spacing that means anything; if none fits, the smallest that was tried.

    An artifact has more bytes than Quantiser.rate() says, but about as many more at one spacing as
    at the next. So each try moves the rate by the bytes that the last one missed its aim by, or to
    the middle of the bracket, if that would leave it.
    """
    finest = math.sqrt(24 * LEAST_LOSS / max(quantiser.quantised, 1))
    largest = int(quantiser.rate(finest))
    fitting = -1  # the largest rate at which the artifact was small enough
    too_large = largest + 1  # the smallest at which it was not
    rate = budget - FIT_MARGIN
    best = None
    for attempt in range(1, 11):
        rate = min(max(rate, 0), largest)
        if not fitting < rate < too_large:
            rate = (fitting + too_large) // 2
        spacing = quantiser.spacing_for(rate)
        packed = packed_of(quantiser.encode(spacing))
        log("allocate", attempt=attempt, spacing=spacing,
            expected_loss=quantiser.quantised * spacing**2 / 24,
            bytes=packed.size, room_bytes=budget)
        if packed.size <= budget:
            best = packed
            fitting = rate
        else:
            too_large = rate
            if best is None or budget < packed.size < best.size:
                best = packed
        filled = budget - FIT_SLACK <= packed.size <= budget
        if filled or too_large - fitting == 1:
            break
        rate += budget - FIT_MARGIN - packed.size
    return best


# ---- the quantiser: from weights to codes --------------------------------------------------------


class Grids(NamedTuple):
    """The quantisation grids of N parameters of one shape."""

    arrays: list[dict[str, Tensor]]  # for each, what the artifact stores of its grid
    steps: Tensor  # (N, R, C or 1): the step sizes that this means


class Quantiser:
    """The parameters of a model as its settings store them. `curvature` is of calibrate(); settings
    that need none do without.

        quantiser = Quantiser(model, s, curvature)
        encoded = quantiser.encode(spacing)    # {parameter: Encoded}; spacing: for FIT=allocate
        steps = quantiser.steps(spacing)       # {parameter: step sizes}, for late QAT

    Parameters of one shape and Store are rounded together. What does not depend on the spacing is
    done once.
    """

    def __init__(self, model, s, curvature=None):
        self.s = s
        self.curvature = curvature
        self.stores = storage(model, s)
        self.weights = {name: param.detach().float() for name, param in model.named_parameters()}
        self.factors = {}  # {identity of a Hessian: factor_hessian() of it}
        self._spread_histogram = None
        self._check_curvature()
        # Late QAT asks for steps without a curvature, and so without AWQ-lite.
        if s.awq_lite_group_top_k and curvature:
            self.salient = self._salient_columns()
            for name in self.salient:
                self.stores[name] = self.stores[name]._replace(codec="mixed")
        self._check_weights()
        self.groups = {}  # {(shape, Store): parameters}
        for name, store in self.stores.items():
            if store.codec == "float16":
                continue
            if s.prune_pct:
                self.weights[name] = self._pruned(self.weights[name])
            weight = self.weights[name]
            self.groups.setdefault((weight.shape, store), []).append(name)

    @property
    def quantised(self):
        """Number of weights that are not float16."""
        return sum(self.weights[name].numel() for names in self.groups.values() for name in names)

    def _check_weights(self):
        finite = torch.stack([self.weights[name].isfinite().all() for name in self.stores])
        for name, is_finite in zip(self.stores, finite.tolist()):  # one wait for the device
            if not is_finite:
                raise Stopped(f"{name} is not finite; no artifact was written", 4)

    def _check_curvature(self):
        """A curvature that is nan or infinite would make an artifact of nan, or an error with a
        misleading cause.
        """
        for name, curvature in (self.curvature or {}).items():
            finite = curvature.hessian.isfinite().all() and curvature.gain.isfinite().all()
            if finite and math.isfinite(curvature.logits):
                continue
            weight = self.weights[name]
            if not weight.isfinite().all():
                why = "it is not finite itself"
            elif not weight.any():
                why = "it is all zero, so nothing that it does is felt"
            else:
                why = "an activation or a gradient overflowed, or all are zero"
            raise Stopped(f"calibration: the curvature of {name} is nan or infinite: {why}; no "
                          "artifact was made", 4)

    def _pruned(self, weight):
        """The weight with the PRUNE_PCT of smallest magnitude set to zero."""
        count = int(self.s.prune_pct * weight.numel())
        if not count:
            return weight
        threshold = weight.abs().flatten().kthvalue(count).values
        return weight.where(weight.abs() > threshold, 0.0)

    # What the curvature says.

    def _salient_columns(self):
        """{parameter: (C,) which of its columns AWQ-lite stores in AWQ_LITE_BITS}."""
        s = self.s
        weights, inputs = {}, {}
        for name, store in self.stores.items():
            curvature = self.curvature.get(name)
            scaled = store.codec == "int" and store.method != "ternary"
            gains_bits = scaled and store.bits < s.awq_lite_bits
            if gains_bits and curvature and curvature.input_squares is not None:
                weights[name] = self.weights[name]
                inputs[name] = curvature.input_squares
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
        if self.curvature is None:
            raise ValueError(f"{name} is to be stored by its Hessian, but there is no curvature")
        curvature = self.curvature[name]
        key = id(curvature.hessian)
        if key not in self.factors:
            try:
                self.factors[key] = factor_hessian(
                    curvature, self.s.gptq_damp, self.s.gptq_act_order)
            except Stopped as error:
                raise Stopped(f"{name}: {error}", error.code) from None
        return self.factors[key]

    def pivots(self, name):
        """(C,) what an error in each column costs. With GPTQ, after later columns have made up for
        it as they can: then it is the conditional variance of the column's input, the square of a
        pivot of the Cholesky factor.
        """
        if self.stores[name].method == "rtn":
            return self.curvature[name].hessian.diagonal().clamp_min(1e-30)
        order, factor = self.factor(name)
        pivots = factor.diagonal().square().reciprocal()
        return torch.empty_like(pivots).scatter_(0, order, pivots)

    # FIT=allocate: bytes at a spacing, and back.

    def rate(self, spacing):
        """Bytes of the codes at a spacing, were each weight Gaussian with the spread of its row
        and column: log2(2 pi e (spread / step)^2) / 2 bits. That holds for small steps; log2(1 +
        ...) keeps the bits of large ones positive.
        """
        if self._spread_histogram is None:
            self._spread_histogram = np.zeros(len(RATE_OCTAVES))
            for (_, store), names in self.groups.items():
                if store.codec == "grid":
                    for name in names:
                        self._spread_histogram += self._spread_of(name)
        square = 4 ** (RATE_OCTAVES - math.log2(spacing))
        bits = np.log2(1 + 2 * math.pi * math.e * square) / 2
        return float(self._spread_histogram @ bits) / 8

    def _spread_of(self, name):
        """Numbers of weights whose log2(spread / step size), at a spacing of 1, is the nearest to
        each of RATE_OCTAVES.
        """
        square = self.weights[name].double().square()
        variance = square.mean(1, keepdim=True) * square.mean(0) / square.mean().clamp_min(1e-60)
        gain = self.curvature[name].gain.double()[:, None]
        relative = variance * gain * self.pivots(name).double()
        bins = (relative.clamp_min(1e-60).log2() / 2 - RATE_OCTAVES[0]) / RATE_STEP
        bins = bins.round().clamp(0, len(RATE_OCTAVES) - 1).int().flatten().cpu().numpy()
        return np.bincount(bins, minlength=len(RATE_OCTAVES))

    def spacing_for(self, size):
        """The spacing at which rate() is `size` bytes, by bisection of its logarithm."""
        low = math.log(1e-12)
        high = math.log(1e6)
        for _ in range(40):
            middle = (low + high) / 2
            if self.rate(math.exp(middle)) > size:
                low = middle
            else:
                high = middle
        return math.exp(high)

    # Grids: the step size of each weight.

    def _grids(self, names, store, spacing):
        """Grids of parameters of one shape and Store."""
        weights = torch.stack([self.weights[name] for name in names])
        if store.codec == "grid":
            return self._allocated_grids(names, weights, spacing)
        if store.codec == "mixed":
            return self._mixed_grids(names, weights, store)
        return self._row_grids(weights, store)

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
        arrays = []
        for scale, fine, columns in zip(scales, fine_scales, salient[:, 0]):
            arrays.append({"scale": scale, "fine": fine, "salient": columns.to(torch.int8)})
        steps = torch.where(salient, fine_scales.float()[:, :, None], scales.float()[:, :, None])
        return Grids(arrays, steps)

    def _salient(self, names):
        """(N, 1, C): which columns AWQ-lite stores in more bits."""
        return torch.stack([self.salient[name] for name in names])[:, None]

    def _allocated_grids(self, names, weights, spacing):
        ones = torch.ones(weights.shape[1:], dtype=torch.int8)
        arrays, steps = [], []
        for name in names:
            weight, curvature = self.weights[name], self.curvature[name]
            grid = allocation_grid(weight, curvature, self.pivots(name), spacing)
            arrays.append(_to_cpu(grid))
            steps.append(decode_grid({**arrays[-1], "q": ones}, ones.shape))
        return Grids(arrays, torch.stack(steps).to(weights.device))

    def steps(self, spacing=None):
        """{parameter: its step sizes (R, 1) or (R, C)}: what weights will be rounded to."""
        steps = {}
        for (_, store), names in self.groups.items():
            steps.update(zip(names, self._grids(names, store, spacing).steps))
        return steps

    # Codes.

    def encode(self, spacing=None):
        """{parameter: Encoded}, in the model's order."""
        if self.s.awq_lite_group_top_k and not self.curvature:
            raise ValueError("AWQ-lite chooses columns by the curvature, and there is none")
        encoded = {}
        for (_, store), names in self.groups.items():
            grids = self._grids(names, store, spacing)
            codes = self._round(names, store, grids.steps)
            for name, tensor_codes, arrays in zip(names, codes, grids.arrays):
                encoded[name] = self._encoded(store, arrays, tensor_codes)
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
        if self.s.prune_pct:
            # At a huge step size pruned weights stay 0 whatever error GPTQ feeds into them (#967).
            steps = steps.where(weights != 0, 1e30)
        if store.method != "gptq":
            return round_to_grid(weights, steps, top).to(torch.int16)
        orders, factors = (torch.stack(tensors) for tensors in zip(*map(self.factor, names)))
        diagonals = torch.stack([self.curvature[name].hessian.diagonal() for name in names])
        alive = diagonals[:, None] > 0  # an input that is always zero: 0 is the cheapest code
        return gptq(weights * alive, steps, top, orders, factors, self.s.gptq_block_size)

    def _encoded(self, store, grid_arrays, codes):
        """A parameter with codes int16 (R, C). Codes of a grid that are beyond a byte are split
        into q + 127 * over, and the codec becomes "wide".
        """
        codec = store.codec
        if store.codec == "grid":
            over = codes.sign() * ((codes.abs() - 1).clamp_min(0) // BYTE_TOP)
            codes = codes - BYTE_TOP * over
            if over.any():
                codec = "wide"
                grid_arrays = grid_arrays | {"over": over.to(torch.int8)}
        arrays = grid_arrays | {"q": codes.to(torch.int8)}
        return Encoded(codec, store.bits, 0, 0, _to_cpu(arrays))

    def _add_lqer(self, encoded):
        """LQER for the LQER_TOP_K parameters whose error costs most, where it lowers that cost. By
        the plain norm of errors it would always be the largest tensors (#1797).
        """
        def error_of(name, candidate):
            weight = self.weights[name]
            return weight - candidate.decode(weight.shape).to(self.curvature[name].hessian.device)

        costs = {}
        for name, candidate in encoded.items():
            if name in self.curvature:  # a gate has none
                costs[name] = self.curvature[name].loss(error_of(name, candidate))
        group = self.s.lqer_asym_group
        for name in sorted(costs, key=costs.get)[-self.s.lqer_top_k :]:
            curvature = self.curvature[name]
            error = error_of(name, encoded[name])
            rank = min(self.s.lqer_rank, *error.shape)
            correction = _to_cpu(lqer(error, curvature.hessian, curvature.gain, rank, group))
            arrays = encoded[name].arrays | correction
            corrected = encoded[name]._replace(rank=rank, group=group, arrays=arrays)
            if curvature.loss(error_of(name, corrected)) < costs[name]:
                encoded[name] = corrected


# ---- pruning: FIT=prune --------------------------------------------------------------------------

PRUNABLE = ("int", "mixed")  # codecs of which codes are dropped


def is_unit_code(codes):
    """Where codes are 1 or -1."""
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
        codes = tensor.arrays["q"]
        places[name] = is_unit_code(codes).flatten().nonzero().squeeze(1)
        arrays = tensor.arrays | {"q": torch.ones_like(codes)}
        step = CODECS[tensor.codec].decode(arrays, codes.shape)
        steps.append(step.flatten()[places[name]])
    cheap = torch.zeros(sum(map(len, steps)), dtype=torch.bool)
    cheap[torch.cat(steps).argsort(stable=True)[:count]] = True

    pruned = dict(encoded)
    cheap_by_tensor = cheap.split([len(ones) for ones in places.values()])
    for (name, ones), drop in zip(places.items(), cheap_by_tensor):
        arrays = encoded[name].arrays
        codes = arrays["q"].clone()
        codes.view(-1)[ones[drop]] = 0
        pruned[name] = encoded[name]._replace(arrays=arrays | {"q": codes})
    return pruned


def prune_to_fit(encoded, packed_of, budget, log):
    """The artifact (Packed) that fits `budget` bytes with about as few of its cheapest codes
    dropped (without_cheapest) as it takes, by regula falsi; with all of them dropped, if that is
    too large.
    """
    whole = packed_of(encoded)
    if whole.size <= budget:
        log("prune", dropped=0, bytes=whole.size, room_bytes=budget)
        return whole
    too_few, too_few_size = 0, whole.size
    codes = [tensor.arrays["q"] for tensor in encoded.values() if tensor.codec in PRUNABLE]
    enough = sum(int(is_unit_code(tensor_codes).sum()) for tensor_codes in codes)
    if not enough:  # float16 alone
        log("prune", dropped=0, bytes=whole.size, room_bytes=budget)
        return whole
    best = packed_of(without_cheapest(encoded, enough))
    tries = 8 if best.size <= budget else 0
    for _ in range(tries):
        if best.size >= budget - FIT_SLACK or enough - too_few <= 1:
            break
        excess = too_few_size - budget + FIT_MARGIN
        count = too_few + round((enough - too_few) * excess / (too_few_size - best.size))
        count = min(max(count, too_few + 1), enough - 1)
        packed = packed_of(without_cheapest(encoded, count))
        if packed.size <= budget:
            enough, best = count, packed
        else:
            too_few, too_few_size = count, packed.size
    log("prune", dropped=enough, bytes=best.size, room_bytes=budget)
    return best


# ---- late QAT ------------------------------------------------------------------------------------

SCALE_REFRESH_STEPS = 10  # optimizer steps after which late QAT's scales follow the weights
SHARPEST = 16  # sharpness of soft rounding at the end of training; it begins at 1


class LateQAT:
    """Late quantisation-aware training: from LATE_QAT_THRESHOLD on, the forward sees weights as
    the artifact will hold them, rounded to the exporter's own grid (FakeQuant). Scales follow the
    weights every 10 optimizer steps; the grid of FIT=allocate is chosen once, after a calibration
    of its own, at the spacing that is expected to fit. The finer columns of AWQ-lite and what
    PRUNE_PCT sets to zero are not imitated.
    """

    def __init__(self, model, s):
        self.model = model
        self.s = s
        self.begun = None  # optimizer step at which it began
        self.on = False
        self.curvature = None  # of FIT=allocate
        stores = storage(model, s)
        self.modules = {}
        self.fake_quants = {}
        for name, module in model.named_modules():
            name = f"{name}.weight"
            if isinstance(module, (Linear, Embedding)) and stores[name].codec != "float16":
                fake_quant = FakeQuant(module.weight, stores[name].top, s.qat_rounding == "soft")
                if s.fit == "allocate":
                    fake_quant.step = torch.ones_like(module.weight.data)
                self.modules[name] = module
                self.fake_quants[name] = fake_quant.to(module.weight.device)

    def switch(self, on):
        """Round, or do not: two graphs of the same model, both compiled in warm-up."""
        if on != self.on:
            for name, module in self.modules.items():
                module.fake_quant = self.fake_quants[name] if on else None
            self.on = on

    def enter(self, run, training, progress):
        """Called before each optimizer step on rounded weights; progress from 0 to 1 sharpens soft
        rounding.
        """
        allocating = self.s.fit == "allocate"
        if self.begun is None:
            self.begun = training.step
            run.log("late_qat", step=training.step, tensors=len(self.fake_quants),
                    rounding=self.s.qat_rounding)
            if allocating:
                self._allocate(run, training)
        if not allocating and (training.step - self.begun) % SCALE_REFRESH_STEPS == 0:
            self._set(Quantiser(self.model, self.s).steps())
        if self.s.qat_rounding == "soft":
            for fake_quant in self.fake_quants.values():
                fake_quant.sharpness.fill_(1 + (SHARPEST - 1) * progress)
        self.switch(True)

    def _allocate(self, run, training):
        """Choose the grid of FIT=allocate. The export uses the same curvature, so that the step
        sizes of weights keep their proportions; its spacing fits the bytes anew.
        """
        self.curvature = training.calibrate()
        try:
            quantiser = Quantiser(self.model, self.s, self.curvature)
            spacing = quantiser.spacing_for(self.s.size_limit - len(run.source))
        except Stopped:
            self.begun = None
            self.curvature = None
            training.save()  # the steps so far are worth keeping
            raise
        self._set(quantiser.steps(spacing))

    def _set(self, steps):
        for name, fake_quant in self.fake_quants.items():
            fake_quant.step.copy_(steps[name])

    def state_dict(self):
        curvature = self.curvature
        if curvature:
            curvature = {name: tuple(values.to("cpu")) for name, values in curvature.items()}
        steps = {name: fake_quant.step.cpu() for name, fake_quant in self.fake_quants.items()}
        return {"begun": self.begun, "steps": steps, "moments": curvature}

    def load_state_dict(self, state):
        self.begun = state["begun"]
        self._set(state["steps"])
        if state["moments"]:
            device = self.model.embed.weight.device
            self.curvature = {}
            for name, values in state["moments"].items():
                self.curvature[name] = Curvature(*values).to(device)


# --------------------------------------------------------------------------------------------------
# 8 Entropy coder of integer codes
# Interleaved rANS (Duda 2013, Giesen 2014), one stream over all matrices.
#
# An entropy coder writes what it expects with probability p in log2(1/p) bits. rANS comes within a
# fraction of a percent of that, so all depends on the probabilities. Those of a code are learned
# from the earlier codes of its bucket, and its bucket is the magnitude expected of it
# (coder_context): the mean of its column so far, times how much larger than expected its row has
# been so far. Rows that are like the one above, as of tokens never seen, are coded as differences
# from it. Encoder and decoder visit the codes in one order (walk_codes) and learn the same on the
# way: only codes are stored. All that the decoder depends on is integers: a last bit that differs
# between machines would end the stream.
# --------------------------------------------------------------------------------------------------

PRECISION = 13  # frequencies of a bucket sum to 2^PRECISION
# A coder state is never below this between codes; it gives or takes 16 bits at a time.
STATE_LOW = 1 << 16
# The byte of -128, which is never a code. It stands for a code that is too rare to have a
# frequency; that code itself is stored beside the words of the coder.
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
        # 20 m^2 + 2, times 2048: 2048 m^2 is the root of 2^(k + 2).
        width = 20 * math.isqrt(1 << (k + 2)) + 4096
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
    """What predicts the codes of one row of every piece (N, pieces, C) of a group, as they are
    visited from left to right. All sums are of magnitudes, in 1/256.

    A code's magnitude is expected to be the mean of its column in the rows before, times how much
    larger than expected its row has been so far. Few codes say little, so each sum begins with a
    prior (PRIOR_CODES, PRIOR_ROWS, PRIOR_COLUMNS).

    column_sums (N, 1, C): magnitudes of the `rows_seen` rows before. above (N, pieces, C): codes
    of the row above.
    """

    def __init__(self, column_sums, rows_seen, above):
        columns = column_sums.shape[2]
        column_sums = column_sums << MAGNITUDE_BITS
        prior_sum = PRIOR_CODES << (MAGNITUDE_BITS - 1)
        matrix_sum = column_sums.sum(2, keepdims=True) + prior_sum
        mean = matrix_sum // (rows_seen * columns + PRIOR_CODES)
        expected = (column_sums + PRIOR_ROWS * mean) // (rows_seen + PRIOR_ROWS)
        prior = PRIOR_COLUMNS * mean
        expected_before = prior + expected.cumsum(2) - expected
        self.above = above
        # (N, 1, C): logarithm of the mean of each column
        self.log_expected = integer_log2(expected)
        # (N, 1, C): what `magnitude` is expected to be when a column is reached; at least 1
        self.expected_before = np.maximum(expected_before, 1)
        # (N, pieces, 1): the prior and the sum of |code| so far
        self.magnitude = np.repeat(prior, above.shape[1], 1)
        # (N, pieces, 1): the prior and the sum of |code - above| so far
        self.change = self.magnitude

    def add(self, codes, start):
        """Count codes (N, pieces, width) of the columns from `start` on."""
        above = self.above[:, :, start : start + codes.shape[2]]
        change = np.abs(np.subtract(codes, above, dtype=np.int16)).sum(2, keepdims=True)
        magnitude = np.abs(codes).sum(2, keepdims=True, dtype=np.int64)
        self.change = self.change + (change << MAGNITUDE_BITS)
        self.magnitude = self.magnitude + (magnitude << MAGNITUDE_BITS)


def coder_context(row, start, stop):
    """(buckets, base) of the codes in columns start to stop of a RowState.

    A code is coded as its difference from base. The base is the row above where the row so far
    differs from that by less than 3/4 of its own magnitude, else 0. The bucket tells the magnitude
    that is expected of the difference.
    """
    ratio = (row.magnitude << MAGNITUDE_BITS) // row.expected_before[:, :, start : start + 1]
    log_ratio = integer_log2(ratio) - LOG_OF_1
    log_magnitude = row.log_expected[:, :, start:stop] + log_ratio
    base = 0
    like_above = 4 * row.change < 3 * row.magnitude
    if like_above.any():
        base = np.where(like_above, row.above[:, :, start:stop], np.int8(0))
        mean_change = row.change // (start + PRIOR_COLUMNS)
        log_magnitude = np.where(like_above, integer_log2(mean_change), log_magnitude)
    buckets = (log_magnitude - LOG_OF_BUCKET_0) // LOGS_PER_BUCKET
    return np.minimum(np.maximum(buckets, 0), BUCKETS - 1), base


def piece_shape(shape, state_count):
    """(rows of a piece, columns that are coded at once) for N matrices (N, R, C).

    A matrix is cut into pieces of neighbouring rows. All N matrices are coded side by side, and of
    each all pieces: `width` columns of one row of every piece at once, about one code for each
    coder state. Pieces and width are in the proportion of rows and columns.
    """
    matrices, rows, columns = shape
    codes = max(1, state_count // matrices)  # of a matrix that are coded at once
    pieces = min(rows // LEAST_PIECE, math.isqrt(codes * rows // columns))
    height = ceil_div(rows, max(1, pieces))
    pieces = ceil_div(rows, height)
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
        above = np.zeros((matrices, ceil_div(rows, height), columns), np.int8)
        for t in range(height):
            rows_t = group[:, t::height]  # (N, pieces, C): row t of every piece that is that long
            row = RowState(column_sums, rows_seen, above[:, : rows_t.shape[1]])
            for start in range(0, columns, width):
                stop = start + width
                codes = rows_t[:, :, start:stop]
                buckets, base = coder_context(row, start, stop)
                coder.code(buckets, codes, base)
                row.add(codes, start)
                last = t == height - 1 and stop >= columns
                counts.add(buckets, codes - base, last)
            above = rows_t
            rows_seen += rows_t.shape[1]
            column_sums += np.abs(rows_t).sum(1, keepdims=True, dtype=np.int64)


def _checksum(groups):
    """Of the codes, not of the bytes that hold them: proves that this machine decodes as the other
    one encoded.
    """
    checksum = 0
    for group in groups:
        checksum = zlib.crc32(np.ascontiguousarray(group), checksum)
    return checksum


def _state_count(shapes):
    """Number of interleaved coder states. Each lets more codes be coded at once, and costs the 4
    bytes of its last value; about one of them is information.
    """
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
            full = np.flatnonzero((x >> (32 - PRECISION)) >= frequency)
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
            slots = (x & ((1 << PRECISION) - 1)) + first_slots[i : i + self.state_count]
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
# save_artifact   Quantiser -> Encoded -> pack (a stream for each kind of array) -> write_atomic
# load_artifact   read_artifact (checked alone) -> artifact_settings (checked against the model)
#                 -> arrays of each tensor -> weights
# --------------------------------------------------------------------------------------------------

MAGIC = b"PGOLF\r\n\x1a"
ARTIFACT_VERSION = 1
PREFIX = struct.Struct("<8sHIII")  # magic, version, packed and raw header length, header checksum
MAX_HEADER = 1 << 22
MAX_VALUE = 2000  # characters of a setting in the header
# Bytes that loading may need at once: those of about 140 M weights, more than 16 MB have bits.
MAX_LOADED = 1 << 30
MAX_CORRECTION_WORK = 1 << 33  # multiplications of all low-rank corrections, some ten seconds
MAX_RANK = Settings.__dataclass_fields__["lqer_rank"].metadata["hi"]
MAX_GROUP = Settings.__dataclass_fields__["lqer_asym_group"].metadata["hi"]


# ---- files ---------------------------------------------------------------------------------------


def read_file(path):
    """Bytes of a regular file: a device or a pipe may never end."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise BadInput(f"{path}: cannot be read (it is not a regular file)")
        return Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def write_atomic(path, buffers):
    """Complete under its name, or not there at all: temporary name, fsync, rename. Returns the
    SHA-256 of the bytes.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for buffer in buffers:
                file.write(buffer)
                digest.update(buffer)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
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
    """All first bytes of the numbers, then all second bytes, ...: of float16, the exponents
    compress and the mantissas do not.
    """
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


class StreamArray(NamedTuple):
    """The place of one array of one tensor in a stream; places follow each other."""

    tensor: str
    stream: str
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
    """{stream: [StreamArray]} of a table of tensors: a stream for each kind of array. In that of
    the codes equal kinds of matrix (all q, all k, ...) lie together.
    """
    streams = {}
    for entry in tensors:
        for stream, (dtype, count) in CODECS[entry.codec].arrays.items():
            shape = entry.matrix if stream in CODED else (count(entry.shape),)
            streams.setdefault(stream, []).append(StreamArray(entry.name, stream, dtype, shape))
        if entry.rank:
            for stream, (dtype, count) in CORRECTION.items():
                shape = (count(entry.shape, entry.rank, entry.group),)
                streams.setdefault(stream, []).append(StreamArray(entry.name, stream, dtype, shape))
    for stream in CODED:
        if stream in streams:
            streams[stream] = _kinds_together(streams[stream])
    return streams


def _kinds_together(arrays):
    kinds = [_kind(array.tensor) for array in arrays]
    return sorted(arrays, key=lambda array: kinds.index(_kind(array.tensor)))


def raw_sizes(tensors):
    """{stream: its bytes, unpacked} of a table of tensors."""
    layout = stream_layout(tensors)
    return {stream: sum(array.bytes for array in arrays) for stream, arrays in layout.items()}


def _kind(name):
    """The name of a tensor without the number of its layer."""
    return ".".join(word for word in name.split(".") if not word.isdigit())


def code_groups(arrays):
    """[(number, rows, columns)]: runs of matrices of one kind and shape in a stream of codes."""
    runs = []
    for array in arrays:
        key = (_kind(array.tensor), *array.shape)
        if not runs or runs[-1][0] != key:
            runs.append([key, 0])
        runs[-1][1] += 1
    return [(number, rows, columns) for (_, rows, columns), number in runs]


def model_fields():
    """The settings that define the model, stored in the artifact; SEED among them, from which
    adapters start.
    """
    others = ("vocab_size", "seed")
    return [f for f in fields(Settings) if f.metadata["group"] == "Model" or f.name in others]


def model_settings(s):
    """{name: value as text} of the settings that define the model."""
    return {f.name.upper(): format_value(getattr(s, f.name)) for f in model_fields()}


# ---- save ----------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """An artifact, before it is written."""

    encoded: dict[str, Encoded]
    buffers: list[bytes]  # the file, in order
    streams: list[dict]  # what each compressor made of each stream

    @property
    def size(self):
        return sum(map(len, self.buffers))


def save_artifact(path, model, s, tokenizer_sha256="", log=None, curvature=None, budget=None):
    """Quantise, pack and write the model -> {"bytes", "sha256", "compressor", "role_bytes"}. The
    file is complete or absent.

    `curvature`: of calibrate(), where the settings need them; `budget`: bytes that FIT may fill
    (default: SIZE_LIMIT).
    """
    if log is None:
        log = no_log
    if s.fit != "off" and budget is None:
        budget = s.size_limit
    header = artifact_header(model, tokenizer_sha256, s)
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    quantiser = Quantiser(model, s, curvature)
    # Tries need not wait for every compressor.
    s_of_tries = replace(s, compressor="rans") if s.compressor == "auto" else s

    def packed_of(encoded):
        for name, tensor in encoded.items():
            if not all(array.isfinite().all() for array in tensor.arrays.values()):
                raise Stopped(f"{name} is too large for float16; no artifact was written", 4)
        return pack(encoded, shapes, s_of_tries, header)

    if s.fit == "allocate":
        packed = allocate(quantiser, packed_of, budget, log)
    elif s.fit == "prune":
        packed = prune_to_fit(quantiser.encode(), packed_of, budget, log)
    else:
        packed = packed_of(quantiser.encode())
    if s.compressor == "auto":
        packed = pack(packed.encoded, shapes, s, header)
    for row in packed.streams:
        log("pack", **row)
    used = "+".join(sorted({row["chosen"] for row in packed.streams}))
    return {"bytes": packed.size, "sha256": write_atomic(path, packed.buffers), "compressor": used,
            "role_bytes": role_bytes(packed, shapes, roles(model))}


def role_bytes(packed, shapes, role_of):
    """{role: its bytes of an artifact}, the largest first, and what is left for the header.

    A stream holds arrays of several tensors and is packed as one. Each of them is given a share in
    proportion to its bytes before packing.
    """
    shares = dict.fromkeys(role_of.values(), 0.0)
    layout = stream_layout(tensor_entries(packed.encoded, shapes))
    for row in packed.streams:
        length = row[f"{row['chosen']}_bytes"]
        for array in layout[row["stream"]]:
            shares[role_of[array.tensor]] += length * array.bytes / max(row["raw_bytes"], 1)
    sizes = {role: round(shares[role]) for role in sorted(shares, key=shares.get, reverse=True)}
    return {**sizes, "header": packed.size - sum(sizes.values())}


def no_log(*_, **__):
    pass


def artifact_header(model, tokenizer_sha256, s):
    """The header of an artifact without its tables."""
    header = {
        "settings": model_settings(s),
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
    for stream, arrays in stream_layout(tensors).items():
        candidates = candidate_compressors(stream, s.compressor)
        with ThreadPoolExecutor(len(candidates)) as pool:
            results = pool.map(partial(pack_stream, arrays, encoded), candidates)
            packed = dict(zip(candidates, results))
        lengths = {name: len(data) for name, data in packed.items()}
        chosen = min(lengths, key=lengths.get)
        data = packed[chosen]
        raw_bytes = sum(array.bytes for array in arrays)
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


def pack_stream(arrays, encoded, compressor):
    """Bytes of the stream of these StreamArrays, packed."""
    values = [encoded[array.tensor].arrays[array.stream].numpy().ravel() for array in arrays]
    values = np.concatenate(values)
    if compressor != "rans":
        return COMPRESSORS[compressor].compress(_planes(values))
    shapes = code_groups(arrays)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    groups = np.split(values, ends[:-1])
    return encode_codes([group.reshape(shape) for group, shape in zip(groups, shapes)])


# ---- read and check ------------------------------------------------------------------------------


def brief(value, most=80):
    """What a file says, for a message: printable, and cut."""
    text = "".join(c if c.isprintable() else "?" for c in str(value)[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def need_number(what, value, kind, least, most):
    """The number, if it is of this type and between these bounds (nan never is); else ValueError.
    """
    if type(value) is not kind or not least <= value <= most:
        raise ValueError(f"{what} is {brief(value, 30)}, not {kind.__name__} from {least} to "
                         f"{most}")
    return value


def need_texts(what, texts):
    """ValueError unless this is a list of texts, such as reasons, as brief() leaves them."""
    def is_text(text):
        return type(text) is str and text == brief(text, MAX_VALUE)

    if type(texts) is not list or not all(map(is_text, texts)):
        raise ValueError(f"{what} is {brief(texts, 30)}, not a list of texts")


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
    if whole and raw_length > MAX_HEADER:
        raise BadInput(f"{path}: unusable header ({raw_length} bytes, at most {MAX_HEADER})")
    if not whole:
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
    unknown = set(header["settings"]) - set(model_settings(Settings()))
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}")
    if type(header["looping"]) is not bool:
        raise ValueError("looping is not true or false")
    temperature = header.setdefault("temperature", 0)
    if type(temperature) not in (int, float) or not 0 <= temperature <= 10:
        raise ValueError("temperature is no number from 0 to 10")
    need_texts("reasons", header.setdefault("reasons", []))
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
    known = {name for codec in CODECS.values() for name in codec.arrays} | set(CORRECTION)
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
    """Most memory that loading a table of tensors takes: the weights in float32; their arrays three
    times (unpacked, in order, tensor by tensor), which is enough for the entropy coder; four
    copies of the largest tensor, while it is decoded.
    """
    counts = [math.prod(entry.shape) for entry in tensors]
    return 4 * sum(counts) + 3 * sum(raw_sizes(tensors).values()) + 16 * max(counts)


def correction_work(entry):
    """Multiplications of decoding the low-rank correction of a TensorEntry."""
    return math.prod(entry.shape) * entry.rank


def need_loadable(what, tensors):
    """BadInput if a table of tensors takes too much memory or time to load, whatever is in a
    stream.
    """
    counts = [math.prod(entry.shape) for entry in tensors]
    needed = loading_bytes(tensors)
    if needed > MAX_LOADED:
        raise BadInput(f"{what}: {sum(counts)} parameters in these codecs need {needed >> 20} MiB "
                       f"to be loaded, the limit is {MAX_LOADED >> 20}; make the model smaller")
    if sum(map(correction_work, tensors)) > MAX_CORRECTION_WORK:
        raise BadInput(f"{what}: low-rank corrections of that many weights take too long to load; "
                       "lower LQER_RANK or LQER_TOP_K")


def largest_entries(model, s):
    """The table of tensors (TensorEntry) of the largest artifact that settings can make of a model.

    Which tensors LQER will correct is known after the training only. Those are assumed whose
    corrections take most memory, and those whose corrections take most time.
    """
    widest = {"grid": "wide"}
    if s.awq_lite_group_top_k:
        widest["int"] = "mixed"
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    plain = []
    corrected = []
    for name, store in storage(model, s).items():
        codec = widest.get(store.codec, store.codec)
        entry = TensorEntry(name, shapes[name], codec, store.bits, 0, 0)
        plain.append(entry)
        if s.lqer_rank and codec != "float16":
            rank = min(s.lqer_rank, *entry.shape)
            corrected.append(entry._replace(rank=rank, group=s.lqer_asym_group))

    def correction_bytes(entry):
        return loading_bytes([entry]) - loading_bytes([entry._replace(rank=0)])

    worst = {}
    for cost in (correction_bytes, correction_work):
        for entry in sorted(corrected, key=cost)[-s.lqer_top_k :]:
            worst[entry.name] = entry
    return [worst.get(entry.name, entry) for entry in plain]


def artifact_settings(path, header, given):
    """What defines the model from the artifact, the rest from `given`, which must not contradict
    it. A setting that has its default in `given` gives way.

    BadInput, too, if the header is not that of such a model, or the model is too large to be
    loaded. Nothing of its size is allocated.
    """
    s = with_model_settings(given, header["settings"], path)
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


def without_model_settings(s):
    """The settings with the defaults of what defines the model, for an artifact to fill in."""
    return replace(s, **{f.name: f.default for f in model_fields()})


def with_model_settings(given, texts, path):
    """`given` with the model settings that an artifact states, {name: text}."""
    try:
        words = [f"{name}={value}" for name, value in texts.items()]
        # These contradict no model and need no package.
        words += ["TRAIN_SEQ_LEN=2", "TRAIN_BATCH_TOKENS=2", "COMPRESSOR=zlib"]
        stored = Settings.parse(words, preset="")
    except BadInput as error:
        first = brief(str(error).splitlines()[0], 150)
        raise BadInput(f"{path}: its settings cannot be used here: {first}") from None
    for f in model_fields():
        given_value = getattr(given, f.name)
        stored_value = getattr(stored, f.name)
        if given_value not in (f.default, stored_value):
            raise BadInput(f"{f.name.upper()}={brief(format_value(given_value))} contradicts "
                           f"{path}, which was made with {brief(format_value(stored_value))}")
    return replace(given, **{f.name: getattr(stored, f.name) for f in model_fields()})


# ---- load ----------------------------------------------------------------------------------------


@torch.no_grad()
def load_artifact(path, settings=None, dtype=torch.float32, attend=None, device="cpu", data=None):
    """-> (settings, model). The file fits a model of its settings before anything of that size is
    made.
    """
    header, streams = read_artifact(path, data)
    s = artifact_settings(path, header, settings or Settings())
    arrays = _unpacked(path, header["tensors"], streams)
    model = GPT(s, dtype, attend, init=False)
    weights = dict(model.named_parameters())
    for entry in header["tensors"]:  # one after the other: not all of it is in memory twice
        encoded = Encoded(entry.codec, entry.bits, entry.rank, entry.group, arrays.pop(entry.name))
        weight = encoded.decode(entry.shape)
        if not weight.isfinite().all():
            raise BadInput(f"{path}: holds values that are not finite ({entry.name})")
        weights[entry.name].copy_(weight)
    model.looping = s.loops and header["looping"]
    model.temperature = float(header["temperature"]) or None
    model.reasons = header["reasons"]
    return s, model.to(device)


def _unpacked(path, tensors, streams):
    """{tensor: {stream: array}} from the streams of an ArtifactFile."""
    unpacked = {entry.name: {} for entry in tensors}
    for stream, arrays in stream_layout(tensors).items():
        values = _unpack_stream(f"{path}: stream {stream}", arrays, streams[stream])
        begin = 0
        for place in arrays:
            end = begin + place.count
            array = torch.from_numpy(values[begin:end].copy())
            unpacked[place.tensor][place.stream] = array.view(place.shape)
            begin = end
    return unpacked


def _unpack_stream(where, arrays, packed):
    """The values (count,) of a PackedStream, whose StreamArrays are known."""
    if packed.compressor == "rans":
        groups = decode_codes(packed.data, code_groups(arrays), where)
        return np.concatenate([group.ravel() for group in groups])
    raw = decompress(packed.compressor, packed.data, packed.size, where)
    return _unplanes(raw, arrays[0].dtype)


# --------------------------------------------------------------------------------------------------
# 10 Evaluation: the definition of the metric
# Bits per byte = sum of nats / (ln 2 * sum of bytes), over all targets of the stream, each once.
# Target i of a stream is its token i + 1. It is predicted after token i.
#
# A part is what is scored before a predictor learns from it (TTT_CHUNK_TOKENS). A row is a stretch
# of text that is read at once, or in turns of a few tokens (TTT_CHUNK_SIZE). A chunk is a batch of
# rows.
# --------------------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a predictor knows of a chunk: rows of text, and places after which it predicts."""

    ids: Tensor  # (B, T) tokens
    places: Tensor  # (B, M) neighbouring positions in ids; a token is predicted after each of them
    recent: Tensor  # (B, h + M) tokens up to each place, and h before the first; -1: there is none
    # None: the rows stand alone. 0: rows begin. n > 0: the first B rows of the last one, continued.
    turn: int | None = None

    @property
    def history(self):
        """h, which is also the column of `recent` that holds the first place."""
        return self.recent.size(1) - self.places.size(1)


class Chunk(NamedTuple):
    """A batch of rows that are scored together. Only `inputs` is given to predict()."""

    inputs: Inputs
    targets: Tensor  # (B, M) the tokens after those places
    index: Tensor  # (B, M) their numbers among the targets of the stream; -1: the place is padding
    continuing: int = 0  # number of leading rows that continue in the next chunk


class Part(NamedTuple):
    """A span of targets. All of it is scored before any predictor learns from it."""

    number: int
    total: int  # parts of the text
    ranges: np.ndarray  # (n, 2) its targets [a, b), in the order in which they are read
    chunks: Iterable[Chunk]  # those of this rank


# ---- how a text is read --------------------------------------------------------------------------

WINDOW_WIDTHS = 4  # to which windows of documents are padded: few graphs, little padding
CACHE_STEP = 256  # tokens that a row reads in a turn where keys are kept (EVAL_CONTEXT=cache)
CACHE_SEGMENT = 32  # most windows of the stream that one row reads where keys are kept
CACHE_ROWS = 16  # rows that share a part of the stream there, if it has as many windows


class Windows(NamedTuple):
    """Windows of a stream. Each array has an entry for each window."""

    start: np.ndarray  # its first token
    length: np.ndarray  # its tokens
    scored: np.ndarray  # number of targets that it scores: its last ones


class TextRows(NamedTuple):
    """Rows of text that are read turn by turn. Each array has an entry for each row."""

    begin: np.ndarray  # first token that is read
    first: np.ndarray  # first target that is scored
    end: np.ndarray  # end of the row: it reads the tokens [begin, end)

    def take(self, index):
        """The rows at an index: numbers, a slice or a mask."""
        return TextRows(self.begin[index], self.first[index], self.end[index])


class ChunkShape(NamedTuple):
    """A compiled predictor has a graph for each of these."""

    rows: int
    tokens: int  # of a row
    places: int  # of a row
    turn: int | None  # None: the rows stand alone; 0: rows begin; 1: rows continue


class Cut(NamedTuple):
    """Where the text of a chunk stands in the stream. Each array has an entry for each row.

    A row shows the tokens [start, stop) and scores the targets [first, stop).
    """

    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    rows: int  # to which a compiled chunk is padded
    tokens: int  # to which a row is padded
    places: int  # to which the targets of a row are padded
    turn: int | None = None  # Inputs.turn
    continuing: int = 0  # Chunk.continuing

    @property
    def shape(self):
        turn = self.turn
        if turn is not None:
            turn = min(turn, 1)
        return ChunkShape(self.rows, self.tokens, self.places, turn)


class PlannedPart(NamedTuple):
    """A Part before its tensors are made."""

    ranges: np.ndarray  # Part.ranges
    cuts: Iterable[Cut]  # those of this rank


def document_ranges(stream):
    """(n, 2) targets [a, b) of each document: the tokens after its BOS, with the next BOS."""
    starts = (stream.tokens[1:-1] == BOS).nonzero().squeeze(1).cpu().numpy() + 1
    edges = np.concatenate(([0], starts, [len(stream.bytes)]))
    return np.stack((edges[:-1], edges[1:]), 1)


def sliding_windows(ranges, length, stride=0):
    """Windows that score every target of ranges (n, 2) once. Each range [a, b) has its own.

    The first window of a range scores all of its targets. Each later one begins `stride` tokens
    (0: `length`) later and scores its last `stride` targets; the final one scores what is left.
    Where a range ends is in the future: it never decides what a target is predicted from.
    """
    stride = stride or length
    begin, end = ranges.T
    count = 1 + np.maximum(ceil_div(end - begin - length, stride), 0)  # windows of each range
    first_window = np.cumsum(count) - count  # of each range
    source = np.repeat(np.arange(len(ranges)), count)  # the range of each window
    number = np.arange(len(source)) - first_window[source]  # of each window within its range
    start = begin[source] + number * stride
    lengths = np.minimum(length, end[source] - start)
    overlap = length - stride
    scored = np.where(number == 0, lengths, lengths - overlap)
    return Windows(start, lengths, scored)


def padded_width(tokens, longest, least=1):
    """Width to which a row is padded: a multiple of longest / 4, or of `least` if that is more."""
    unit = max(longest // WINDOW_WIDTHS, least)
    return np.minimum(ceil_div(tokens, unit) * unit, longest)


def padded_rows(rows, batch):
    """Number of rows to which a batch is padded: a full batch, or a quarter of it.

    A batch shrinks as its documents end, but documents of similar length end together. A third
    size would save 3 % of the forwards on FineWeb and cost one more graph of each width.
    """
    quarter = ceil_div(batch, 4)
    return quarter if rows <= quarter else batch


def equal_neighbours(keys):
    """Split the indices of keys (n, ...) where a key changes: [indices of equal neighbours]."""
    changes = keys[1:] != keys[:-1]
    if keys.ndim > 1:
        changes = changes.any(1)
    return np.split(np.arange(len(keys)), np.flatnonzero(changes) + 1)


class Reader:
    """The order in which a stream is read. Iterating gives its parts, with this rank's chunks.

    There are three ways to read a text:
        windows        each row is a window of the stream, or of a document (EVAL_DOCS)
        kept keys      EVAL_CONTEXT=cache: each row is a document (EVAL_DOCS), or a segment of the
                       stream, and is read CACHE_STEP tokens a turn
        own adapters   TTT=lora_docs: each row is a document, read TTT_CHUNK_SIZE tokens a turn
    Settings choose the way. The number of ranks only decides which rank reads which rows.

    The plan of a text is a list of Cuts. A chunk is made from its cut when it is asked for.

    part_size: targets of a part; 0: one part, for a predictor that does not learn.
    history: h of Inputs.recent.
    total_parts: parts of the full text, if this stream is only its beginning.
    """

    def __init__(self, stream, s, rt, part_size=0, history=0, total_parts=0):
        self.stream = stream
        self.s = s
        self.rt = rt
        self.history = history
        self.total_parts = total_parts
        self.learning = part_size > 0
        self.part_size = part_size or len(stream.bytes)
        self.adapted = s.ttt == "lora_docs"
        self.batch = s.ttt_batch_size if self.adapted else s.eval_batch_seqs
        self.by_document = s.eval_docs or self.adapted
        if self.by_document:
            self.ranges = document_ranges(stream)
        else:
            self.ranges = np.array([[0, len(stream.bytes)]])
        self.forwarded = 0  # tokens of all chunks so far, with padding

    def __iter__(self):
        """The parts. Ask for a part's chunks only after the parts before it are scored."""
        plan = list(self._plan())
        total = max(len(plan), self.total_parts)
        for number, (ranges, cuts) in enumerate(plan):
            yield Part(number, total, ranges, map(self._chunk, cuts))

    def shapes(self):
        """[ChunkShape] of this rank's chunks, when compiled. Rows that begin come first."""
        shapes = {cut.shape for part in self._plan() for cut in part.cuts}

        def order(shape):
            return shape.turn or 0, -shape.rows, shape.tokens, shape.places

        return sorted(shapes, key=order)

    def _plan(self):
        """The PlannedParts of the text."""
        if self.adapted:
            return self._adapted_parts()
        if self.s.eval_context == "cache":
            return self._cached_parts()
        return self._window_parts()

    # Windows

    def _window_parts(self):
        """Parts of complete windows: a window belongs to the part of its first target."""
        windows = sliding_windows(self.ranges, self.s.eval_seq_len, self.s.eval_stride)
        end = np.cumsum(windows.scored)  # windows score the targets in order
        begin = end - windows.scored
        for part in equal_neighbours(begin // self.part_size):
            ranges = np.array([[begin[part[0]], end[part[-1]]]])
            windows_of_part = Windows(*(values[part] for values in windows))
            yield PlannedPart(ranges, self._window_cuts(windows_of_part))

    def _window_cuts(self, windows):
        """Cuts of windows. Windows of similar length share a chunk; ranks take chunks in turn."""
        s = self.s
        opening = windows.scored == windows.length  # the first window of a range scores all of it
        width = np.full_like(windows.length, s.eval_seq_len)
        if self.by_document:
            width = np.where(opening, padded_width(windows.length, s.eval_seq_len), width)
        order = np.lexsort((windows.start, width, opening))
        start, length, scored = (values[order] for values in windows)
        stop = start + length
        first = stop - scored
        width = width[order]
        opening = opening[order]
        batches = []
        for group in equal_neighbours(np.stack((opening, width), 1)):
            end = group[-1] + 1
            for i in range(group[0], end, self.batch):
                batches.append(slice(i, min(i + self.batch, end)))
        for batch in batches[self.rt.rank :: self.rt.world]:
            tokens = int(width[batch.start])
            places = s.eval_stride or s.eval_seq_len
            if opening[batch.start]:
                places = tokens
            yield Cut(start[batch], stop[batch], first[batch], self.batch, tokens, places)

    # Rows that are read turn by turn

    def _cached_parts(self):
        """Parts of complete documents, by where a document ends; or spans of the stream."""
        if self.by_document:
            begin, end = self.ranges.T
            for part in equal_neighbours((end - 1) // self.part_size):
                rows = TextRows(begin[part], begin[part], end[part])
                ranges = np.array([[begin[part[0]], end[part[-1]]]])
                yield PlannedPart(ranges, self._row_cuts(rows))
            return
        length = len(self.stream.bytes)
        for begin in range(0, length, self.part_size):
            end = min(begin + self.part_size, length)
            rows = self._segments(begin, end)
            yield PlannedPart(np.array([[begin, end]]), self._row_cuts(rows))

    def _segments(self, begin, end):
        """TextRows of a span of the stream. Each is a segment that first reads the window before,
        3 % of its work if it is long. A part of a few windows has shorter ones, CACHE_ROWS or more
        of them, which are read side by side.
        """
        window = self.s.eval_seq_len
        length = min(CACHE_SEGMENT * window, max(self.part_size // CACHE_ROWS, window))
        first = np.arange(begin, end, length)
        return TextRows(np.maximum(first - window, 0), first, np.append(first[1:], end))

    def _adapted_parts(self):
        """Parts of documents, the longest first: an order by length alone, which is known before
        anything is scored, and which #2135 and the merged records before it use. A part ends where
        something learns from it: after TTT_GROUP_DOCS documents, and at the end of a phase
        (PHASED_TTT_*).
        """
        begin, end = self.ranges.T
        longest_first = np.argsort(begin - end, kind="stable")
        count = len(longest_first)
        edges = {0, count} | ttt_phase_ends(self.s)
        if self.learning:
            edges |= set(range(0, count, self.s.ttt_group_docs))
        edges = sorted(edge for edge in edges if edge <= count)
        for a, b in zip(edges, edges[1:]):
            part = longest_first[a:b]
            rows = TextRows(begin[part], begin[part], end[part])
            yield PlannedPart(self.ranges[part], self._row_cuts(rows))

    def _row_cuts(self, rows):
        """Cuts of TextRows, the longest first, dealt to the ranks, in batches."""
        longest_first = np.argsort(rows.begin - rows.end, kind="stable")
        dealt = longest_first[self.rt.rank :: self.rt.world]
        for i in range(0, len(dealt), self.batch):
            batch = dealt[i : i + self.batch]
            yield from self._turns(rows.take(batch))

    def _turns(self, rows):
        """Cuts of a batch of TextRows, the longest first: one for each turn, until all have ended.

        In a turn each row reads its next `size` tokens. Rows that have ended are left out.
        """
        s = self.s
        longest = rows.end[0] - rows.begin[0]
        turn = 0
        read = 0  # tokens of each row that earlier turns have read
        while read < longest:
            size = self._turn_size(read)
            rows = rows.take(rows.begin + read < rows.end)
            start = rows.begin + read
            stop = np.minimum(start + size, rows.end)
            first = np.maximum(rows.first, start)
            tokens = size
            shown_from = start
            if self.adapted and s.eval_context == "window":
                # No keys are kept, so a row shows its earlier text again: as much of it as fits.
                tokens = int(padded_width(read + size, s.eval_seq_len, size))
                shown_from = np.maximum(rows.begin, start + size - s.eval_seq_len)
            places = size
            if not (first < stop).any():  # nothing is scored: little work for the head
                places = 1
            batch = self.batch
            if turn > 0:
                batch = padded_rows(len(start), self.batch)
            continuing = np.count_nonzero(stop < rows.end)  # the leading rows: they are the longest
            yield Cut(shown_from, stop, first, batch, tokens, places, turn, continuing)
            read += size
            turn += 1

    def _turn_size(self, read):
        """Tokens that a row reads in a turn, after the `read` tokens of the turns before."""
        s = self.s
        if s.eval_context == "cache" and not self.adapted:
            return min(CACHE_STEP, s.eval_seq_len)
        for size, until in sorted(s.ttt_short_chunks, key=itemgetter(1)):
            if read < until:
                return size
        return s.ttt_chunk_size

    # Tensors

    def _chunk(self, cut):
        """The Chunk of a cut.

        After its end a row shows its own text again. So it shows nothing that comes later, and
        nothing tells where it ends.
        """
        device = self.rt.device
        tokens = self.stream.tokens
        last_token = len(tokens) - 1
        source = np.searchsorted(self.ranges[:, 0], cut.start, side="right") - 1
        edges = np.stack((cut.start, cut.stop, cut.first, self.ranges[source, 0]))
        if self.rt.compiled:  # one shape, one graph
            edges = np.pad(edges, ((0, 0), (0, cut.rows - len(cut.start))))
        start, stop, first, origin = torch.from_numpy(edges).to(device)[..., None].unbind()
        self.forwarded += start.numel() * cut.tokens

        def shown(position):
            again = start + (position - start) % (stop - start).clamp(min=1)
            position = torch.where(position < stop, position, again)
            return tokens[position.clamp(0, last_token)].long()

        ids = shown(start + torch.arange(cut.tokens, device=device))
        # Target i is predicted after token i, so this is a number of both.
        position = first + torch.arange(-self.history, cut.places, device=device)
        recent = torch.where(position >= origin, shown(position), -1)
        target = position[:, self.history :]
        places = (target - start).clamp(0, cut.tokens - 1)
        targets = tokens[(start + places + 1).clamp(max=last_token)].long()
        index = torch.where(target < stop, target, -1)
        return Chunk(Inputs(ids, places, recent, cut.turn), targets, index, cut.continuing)


def reader_for(predictor, stream, s, rt, total_parts=0):
    """The stream as a predictor reads it: in parts if it learns from them."""
    part_size = s.ttt_chunk_tokens if predictor.learns else 0
    return Reader(stream, s, rt, part_size, predictor.history, total_parts)


def contiguous_reader(stream, s, rt):
    """The stream in windows that do not overlap, for the model alone: for reports during a run."""
    plain = replace(s, eval_stride=0, eval_docs=False, eval_context="window", ttt="off")
    return Reader(stream, plain, rt)


def scoring_name(s):
    """How a text is read and what scores it, in a word: documents_sliding_window_ttt_full, say."""
    reading = "sliding_window"
    if s.eval_context == "cache":
        reading = "cache"
    elif s.eval_stride in (0, s.eval_seq_len):
        reading = "contiguous"
    words = []
    if s.eval_docs:
        words.append(f"documents_{reading}")
    elif s.ttt != "lora_docs":
        words.append(reading)
    if s.ttt != "off":
        words.append(f"ttt_{s.ttt}")
    words += reversed([word for word, _ in wrappers(s)])
    return "_".join(words)


# ---- the score -----------------------------------------------------------------------------------


class Score(NamedTuple):
    loss: float  # nats per token
    bpb: float
    tokens: int
    bytes: int


def score(predictor, parts, stream, rt, validity, log=None, check_every=64, nats=None,
          distributions=None):
    """The only scoring loop -> Score.

    A chunk is predicted and its cost is counted; only then may the predictor see its targets. When
    all ranks have scored a part, the predictor may learn from it. learn() gets a copy of the text
    that holds what has been scored and nothing else: it can neither read nor change the rest.

    validity: gets a reason for every broken rule.
    check_every: the Examiner looks at about one chunk in this many; 0: at none.
    nats: (N,) float64 zeros that get the cost of each target, on all ranks.
    distributions: {target: (V,) float64 zeros} that get the probabilities of all tokens there.
    """
    began = time.monotonic()
    length = len(stream.bytes)
    meters = Meters(stream, rt)
    examiner = Examiner(predictor, check_every)
    distributions = distributions or {}
    places = 0  # of all ranks, with padding
    if predictor.learns:
        zeros = dict(tokens=torch.zeros_like(stream.tokens), bytes=torch.zeros_like(stream.bytes))
        scored_stream = stream._replace(**zeros)
    for part in parts:
        for chunk in part.chunks:
            examiner.before(chunk)
            add_distributions(distributions, predictor, chunk)
            nll = predictor.nll(chunk.inputs, chunk.targets).double()
            live = chunk.index >= 0
            nll = torch.where(live, nll, 0.0)
            meters.add(chunk, nll)
            if nats is not None:
                nats[chunk.index[live]] = nll[live]
            examiner.after(chunk, nll)
            predictor.observe(chunk)
            places += nll.numel() * rt.world
            if log:
                speed = places / (time.monotonic() - began)
                log.progress("scoring", min(places, length), length, f"{speed:,.0f} tokens/s")
        if predictor.learns:
            scored = meters.scored(part.ranges)
            validity.need(bool(scored.all()), f"C3 order: only {int(scored.sum())} of the "
                          f"{len(scored)} targets of a part had been scored when the predictor "
                          "learnt from it")
            for a, b in part.ranges.tolist():
                scored_stream.tokens[a : b + 1] = stream.tokens[a : b + 1]
                scored_stream.bytes[a:b] = stream.bytes[a:b]
            predictor.learn(part, scored_stream)

    total, tokens, nbytes, foreign = rt.sum(meters.sums).tolist()
    twice, never = meters.coverage()
    below_zero = meters.below_zero()
    if nats is not None:
        rt.sum(nats)
    for probabilities in distributions.values():
        rt.sum(probabilities)

    examiner.judge(rt, validity, log)
    each_once = not twice and not never and tokens == length
    validity.need(each_once, f"C4 coverage: {twice} targets scored more than once, {never} never")
    validity.need(not foreign, f"C4 coverage: {foreign:.0f} targets, or the tokens before them, "
                  "are not those of the text")
    validity.need(below_zero < TOLERANCE, f"C2 normalisation: nats of {-below_zero:.1e}, "
                  "which are below 0")
    validity.need(math.isfinite(total), "the score is not finite")
    loss = total / max(tokens, 1)
    bpb = total / math.log(2) / max(nbytes, 1)
    return Score(loss, bpb, int(tokens), int(nbytes))


class Meters:
    """What score() counts, in float64 and on the device, so that no chunk waits for a GPU."""

    def __init__(self, stream, rt):
        self.stream = stream
        self.rt = rt
        # nats, tokens, bytes, and targets that are another text's
        self.sums = torch.zeros(4, dtype=torch.float64, device=rt.device)
        # the smaller of 0 and the nats of the cheapest target
        self.lowest = torch.zeros((), dtype=torch.float64, device=rt.device)
        # (N + 1,) how often this rank has scored each target; the last entry counts padding
        self.times = torch.zeros(len(stream.bytes) + 1, dtype=torch.uint8, device=rt.device)

    def add(self, chunk, nll):
        """Count a chunk whose targets cost nll (B, M), which is 0 for padding."""
        text = self.stream.tokens
        live = chunk.index >= 0
        target = chunk.index.clamp(min=0)
        foreign = chunk.targets != text[target + 1]
        foreign |= chunk.inputs.ids.gather(1, chunk.inputs.places) != text[target]
        nbytes = self.stream.bytes[target] * live
        self.sums += torch.stack((nll.sum(), live.sum(), nbytes.sum(), (foreign & live).sum()))
        self.lowest = torch.minimum(self.lowest, nll.min())
        marks = torch.where(live, target, len(self.times) - 1).flatten()
        self.times.index_add_(0, marks, torch.ones_like(marks, dtype=torch.uint8))

    def scored(self, ranges):
        """(n,) of each target in ranges: has a rank scored it? Collective."""
        times = torch.cat([self.times[a:b] for a, b in ranges.tolist()])
        return self.rt.sum(times) > 0

    def coverage(self):
        """(targets scored more than once, targets never scored) by all ranks. Collective, once."""
        times = self.rt.sum(self.times)[:-1]
        return int((times > 1).sum()), int((times == 0).sum())

    def below_zero(self):
        """How far the lowest nats of all ranks are below 0. Nan shows in the total. Collective."""
        below = 0.0
        if not self.lowest.isnan():
            below = -self.lowest.item()
        return self.rt.max(below)[0]


def add_distributions(distributions, predictor, chunk):
    """Note what predict() says at those targets of {target: (V,) zeros} that are in this chunk."""
    for target, probabilities in distributions.items():
        places = chunk.index == target
        if places.any():
            probabilities += predictor.predict(chunk.inputs)[places][0].double().exp()


# --------------------------------------------------------------------------------------------------
# 11 Validity: is the score the length of a real, decodable compression of the text?
# It is if the four conditions of #1017 are kept:
#   C1 causality      a prediction depends on the text before its target, and on nothing later
#   C2 normalisation  the probabilities of all tokens sum to 1
#   C3 order          nothing learns from a target before it is scored
#   C4 coverage       every target is scored exactly once
# --------------------------------------------------------------------------------------------------

# ---- the ledger ----------------------------------------------------------------------------------

OPENED_EARLY = "C3: validation shards opened before the artifact was frozen"
OPENED_AGAIN = "C1: validation shards were opened again while they were scored"


class Validity:
    """The ledger of a run: why its score is not valid, and why it could not be a record."""

    def __init__(self):
        self.reasons = []  # why the score is no true code length (C1 to C4)
        self.obstacles = []  # why it could not be a record ("eligible_reasons" of the summary)
        self.tests = {}  # {name of a self-test: did it pass?}
        self.frozen = False  # the artifact is written: see freeze()
        self._reporting = False
        self._loading = False
        self._evaluating = False
        self._files = {}  # {(device, inode): split} of the shards

    def need(self, ok, reason):
        """Unless `ok`, the score is not valid for this reason."""
        if not ok and reason not in self.reasons:
            self.reasons.append(reason)

    def need_for_record(self, ok, obstacle):
        """Unless `ok`, this is an obstacle to a record."""
        if not ok:
            self.obstacles.append(obstacle)

    def verdict(self):
        """What every line with a score carries."""
        if self.reasons:
            return {"valid": "no", "reasons": list(self.reasons)}
        return {"valid": "yes"}

    def share(self, rt):
        """Merge what the ledgers of all ranks say, so that all say the same. Collective."""
        reasons, obstacles = zip(*rt.gather((self.reasons, self.obstacles)))
        self.reasons = list(dict.fromkeys(chain.from_iterable(reasons)))
        self.obstacles = list(dict.fromkeys(chain.from_iterable(obstacles)))

    def to_keep(self, rt):
        """The reasons of all ranks, as an artifact or a checkpoint holds them. Collective."""
        self.share(rt)
        return [brief(reason, MAX_VALUE) for reason in self.reasons]

    def restore(self, reasons):
        """Add the reasons of an artifact or a checkpoint."""
        for reason in reasons:
            self.need(False, reason)

    # What is opened when

    @contextlib.contextmanager
    def reporting(self):
        """While a score is only reported, and nothing learns from it. Before freeze() this is the
        only use of validation text.
        """
        self._reporting = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._reporting = False

    @contextlib.contextmanager
    def loading(self):
        """While the validation shards are read: for reports, or after freeze() to be scored."""
        self.opened("val")
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    @contextlib.contextmanager
    def evaluation(self):
        """While the artifact is scored: a network connection that Python code of this process makes
        is a reason.
        """
        self._evaluating = True
        try:
            yield
        finally:
            self._evaluating = False

    @contextlib.contextmanager
    def watch(self, folder):
        """While a run lasts: a shard of the folder that is opened at the wrong time is a reason,
        whoever opens it and by whatever name. A link has the device and inode of its file. What
        compiled code opens is not seen.
        """
        for split in ("train", "val"):
            for path in Path(folder).glob(f"fineweb_{split}_*.bin"):
                with contextlib.suppress(OSError):
                    self._files[_inode(path)] = split
        _install_audit()
        _watching_ledgers.append(self)
        try:
            yield
        finally:
            _watching_ledgers.remove(self)

    def audit(self, event, args):
        """An event that Python reports (sys.addaudithook) while this ledger watches."""
        # The address of a network socket is a tuple; that of a socket on this machine is a path.
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
            self.need(False, OPENED_AGAIN if self.frozen else OPENED_EARLY)

    def freeze(self):
        """The artifact is written: now validation text may be read, and training text not."""
        self.frozen = True

    def opened(self, split):
        """Shards of a split are opened: is this the time for it?"""
        if split == "train":
            self.need(not self.frozen, "training shards were read after the artifact was frozen")
        else:
            self.need(self.frozen or self._reporting, OPENED_EARLY)


_watching_ledgers = []  # those of the runs in this process that watch


@cache
def _install_audit():
    """Let the ledgers hear the audit events of Python. Once: a hook cannot be removed."""
    def hook(event, args):
        for validity in _watching_ledgers:
            validity.audit(event, args)

    sys.addaudithook(hook)


def _inode(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


# ---- while a text is scored ----------------------------------------------------------------------

LOOK = 8  # neighbouring places of each row that are looked at
LEAST_LOG = -30  # lower log-probabilities are taken to be equal
# In log, at those places: worth 0.00001 BPB at most. Honest runs are at 5e-7 (records/validity.md).
TOLERANCE = 2e-5


class Sample(NamedTuple):
    """What the Examiner looks at in a chunk: L <= LOOK neighbouring places of each row."""

    columns: Tensor  # (B, L) which of the M places of its row
    looked: Tensor  # (B, L) is it looked at? A row may score fewer than L
    log_probs: Tensor  # (B, L, V) what is predicted there


class Examiner:
    """Looks at some chunks while they are scored, at places that nobody can know beforehand:
        C1   does the distribution stay as it is when the text after the place changes?
        C2   does it sum to 1?
        C2   does nll() charge what predict() says?
    Chunks and places are drawn anew in each run. Half of the places are the last of their row: they
    have the longest context, and what is wrong only there would seldom be drawn.
    """

    def __init__(self, predictor, every):
        self.predictor = predictor
        self.every = every  # about one chunk in this many is looked at, and more at first; 0: none
        self.random = np.random.default_rng()  # from the system's entropy
        self.chunks = 0  # so far
        self.sums = []  # of all probabilities, at each place
        self.off = 0.0  # largest error of such a sum, or of nll(), in log
        self.changed = 0.0  # largest change of a probability by later text, in log
        self.sample = None  # of the chunk that is being scored; None: it is not looked at

    def before(self, chunk):
        """Before a chunk is scored: draw whether to look at it, and call predict().

        predict() comes first because observe() expects that nll() was called last.
        """
        self.sample = None
        if not self.every:
            return
        chance = max(2 / (self.chunks + 2), 1 / self.every)
        self.chunks += 1
        if self.random.random() < chance:
            self.sample = self._look(chunk)

    def after(self, chunk, nll):
        """After a chunk was scored at nll (B, M): compare that with what predict() said. (C2)"""
        if self.sample is None:
            return
        columns, looked, log_probs = self.sample
        log_sums = log_probs.double().logsumexp(-1)
        targets = chunk.targets.gather(1, columns)
        log_p = log_probs.gather(-1, targets[..., None]).squeeze(-1)
        off = torch.maximum(log_sums.abs(), (log_p + nll.gather(1, columns)).abs())
        off = torch.where(looked, off, 0.0)
        self.off = max(self.off, _or_infinite(off.max()))
        self.sums += log_sums[looked].exp().tolist()

    def _look(self, chunk):
        """The Sample of a chunk: in each row, up to LOOK places that end with a drawn one.

        What is predicted there must not change when the text after the drawn place does. (C1)
        """
        last = self._draw_columns(chunk.index)
        first = (last - LOOK + 1).clamp(min=0)
        count = min(LOOK, chunk.index.size(1))
        columns = first + torch.arange(count, device=first.device)
        looked = (columns <= last) & (chunk.index.gather(1, columns) >= 0)

        log_probs = self.predictor.predict(begin_at(chunk.inputs, first), count)
        log_probs = log_probs.clone()  # the next prediction may be written to the same tensor
        changed = self._change_later_text(chunk.inputs, last, log_probs.size(-1))
        others = self.predictor.predict(begin_at(changed, first), count)
        change = (log_probs.clamp(min=LEAST_LOG) - others.clamp(min=LEAST_LOG)).abs()
        change = torch.where(looked[..., None], change, 0.0)
        self.changed = max(self.changed, _or_infinite(change.max()))
        return Sample(columns, looked, log_probs)

    def _draw_columns(self, index):
        """(B, 1) columns of Chunk.index (B, M): a place that each row scores, half of the time its
        last one.
        """
        is_scored = index.cpu().numpy() >= 0
        anywhere = np.where(is_scored, self.random.random(is_scored.shape), -1.0).argmax(1)
        last = np.where(is_scored, np.arange(is_scored.shape[1]), 0).max(1)
        drawn = np.where(self.random.random(len(is_scored)) < 0.5, anywhere, last)
        return torch.from_numpy(drawn).to(index.device)[:, None]

    def _change_later_text(self, inputs, column, vocab):
        """Inputs with random tokens after the place in this column (B, 1) of each row."""
        ids = inputs.ids
        recent = inputs.recent
        positions = torch.arange(ids.size(1), device=ids.device)
        later_ids = positions > inputs.places.gather(1, column)
        columns = torch.arange(recent.size(1), device=recent.device)
        later_recent = columns > inputs.history + column
        return inputs._replace(ids=self._with_noise(ids, later_ids, vocab),
                               recent=self._with_noise(recent, later_recent, vocab))

    def _with_noise(self, tokens, where, vocab):
        """The tokens (B, T), with random ones `where` (B, T) says so."""
        noise = torch.from_numpy(self.random.integers(vocab, size=tokens.shape)).to(tokens.device)
        return torch.where(where, noise, tokens)

    def judge(self, rt, validity, log):
        """Log the errors of all ranks; those above TOLERANCE are reasons. Collective."""
        off, changed, largest_sum = rt.max(self.off, self.changed, max(self.sums, default=0.0))
        totals = torch.tensor([len(self.sums), sum(self.sums)], dtype=torch.float64)
        positions, total = rt.sum(totals.to(rt.device)).tolist()
        if log:
            log("normalisation", positions=int(positions), worst_log=off,
                largest_sum=largest_sum, mean_sum=total / max(positions, 1),
                changed_by_later=changed)
        validity.need(off < TOLERANCE,
                      f"C2 normalisation: off by {off:.1e} in log on sampled positions")
        validity.need(changed < TOLERANCE, "C1 causality: what comes later in its row changes a "
                      f"prediction by {changed:.1e} in log on sampled positions")


def begin_at(inputs, first):
    """Inputs whose places begin with the one in column `first` (B, 1) of each row.

    There are as many as before, because compiled predictors have graphs for that number. The last
    one is repeated.
    """
    def shifted(values):
        columns = first + torch.arange(values.size(1), device=values.device)
        return values.gather(1, columns.clamp(max=values.size(1) - 1))

    return inputs._replace(places=shifted(inputs.places), recent=shifted(inputs.recent))


def _or_infinite(value):
    """The value as a float, and infinity for nan, which max() would ignore."""
    value = float(value)
    return value if math.isfinite(value) else math.inf


# ---- what must not change meanwhile --------------------------------------------------------------


def fingerprint(model):
    """SHA-256 of what a forward could read in a model: the tensors, arrays, numbers and texts
    among its parameters, buffers and attributes, and in dicts, lists, tuples and sets of them.
    Functions and other objects are left out, with all that they hold.
    """
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray):
            digest.update(str((value.dtype, value.shape)).encode())
            digest.update(value.tobytes())
        elif isinstance(value, dict):
            add(tuple(value.items()))
        elif isinstance(value, (set, frozenset)):
            add(sorted(map(repr, value)))
        elif isinstance(value, (list, tuple)):
            digest.update(str(len(value)).encode())
            for item in value:
                add(item)
        elif isinstance(value, (str, bytes, int, float, type(None))):
            digest.update(repr(value).encode())

    for name, module in model.named_modules():
        add(name)
        add({key: value for key, value in vars(module).items() if key != "_modules"})
    return digest.hexdigest()


def text_sha256(stream):
    """SHA-256 of a text's tokens as the shards hold them, in order: uint16, little-endian."""
    return hashlib.sha256(stream.tokens.cpu().numpy().astype("<u2").tobytes()).hexdigest()


# ---- the denominator -----------------------------------------------------------------------------


class ByteProof(NamedTuple):
    """What prove_bytes() found, on all ranks."""

    documents: int
    wrong: int  # documents whose text has another length than their targets are charged
    share: float  # of the targets that were compared
    charged: int  # bytes of all documents, as their targets are charged
    decoded: int  # bytes of all decoded documents


class DocumentBytes(NamedTuple):
    """A document that is to be decoded."""

    ids: list[int]  # of its text, without BOS
    charged: int  # bytes that its targets are charged
    target_count: int


def prove_bytes(sp, stream, rt):
    """Decode the full validation text, and compare the length of each document with its bytes
    -> ByteProof. Each rank decodes a share of the documents.

    CaseOps documents are compared all together and may differ by 0.1 %, because published sidecars
    count the text before normalisation; operators that count would be 9 %.
    """
    ids = stream.tokens.cpu().numpy()
    counted = stream.bytes.cpu().numpy()
    edges = np.unique([0, *np.flatnonzero(ids == BOS), len(ids)]).tolist()
    spans = list(zip(edges, edges[1:]))[rt.rank :: rt.world]
    cased = has_case_operators(sp)
    count = wrong = target_count = charged = decoded = 0
    for i in range(0, len(spans), 256):
        batch = [_document_bytes(sp, stream, ids, counted, *span) for span in spans[i : i + 256]]
        texts = sp.decode([document.ids for document in batch])
        count += len(batch)
        for document, text in zip(batch, texts):
            target_count += document.target_count
            charged += document.charged
            length = _cased_length(text) if cased else len(text.encode())
            decoded += length
            if length != document.charged and not cased:
                wrong += 1
    sums = torch.tensor([count, wrong, target_count, charged, decoded], dtype=torch.float64)
    count, wrong, target_count, charged, decoded = rt.sum(sums.to(rt.device)).tolist()
    if cased and abs(charged - decoded) > 1e-3 * decoded:
        wrong = count
    share = target_count / max(len(counted), 1)
    return ByteProof(int(count), int(wrong), share, int(charged), int(decoded))


def _document_bytes(sp, stream, ids, counted, begin, end):
    """DocumentBytes of the tokens [begin, end) of the stream.

    Where VAL_TOKENS cuts the last document, some pieces of a character may be left at its end.
    They cannot be decoded; each of them is one byte.
    """
    first = max(begin - 1, 0)  # the BOS is a target, too, and must count nothing
    stop = end
    if end == len(ids) and not stream.whole:
        while stop > begin + 1 and sp.is_byte(int(ids[stop - 1])):
            stop -= 1
    charged = int(counted[first : end - 1].sum(dtype=np.int64)) - (end - stop)
    start = begin
    if ids[begin] == BOS:
        start += 1
    else:  # the stream begins within a document: its first token is no target
        charged += len(sp.decode([int(ids[begin])]).encode())
    return DocumentBytes(ids[start:stop].tolist(), charged, end - 1 - first)


def _cased_length(text):
    """Bytes of the text that a CaseOps text (#1729) stands for. The case operators, 3 bytes each,
    are not in it, except where one follows the escape, the last of CASE_OPERATORS. "\ue001the" has
    6 bytes and stands for "The": 3.
    """
    escape = CASE_OPERATORS[-1]
    escaped = text.count(escape) - text.count(escape + escape)
    operators = sum(map(text.count, CASE_OPERATORS))
    return len(text.encode()) - 3 * (operators - escaped)


def _check_bytes(run, sp, val):
    """Prove the denominator of the score, the bytes of all targets, and return it. It must be the
    length of the decoded documents, and what the manifest of the shards says.
    """
    proof = prove_bytes(sp, val, run.rt)
    total = int(val.bytes.sum())
    counted_by = "sidecar" if val.sidecar else "table"
    changes = text_changes(sp)
    foreign = foreign_tokens(sp, val)
    run.validity.need_for_record(not changes, changes)
    run.validity.need_for_record(not foreign, foreign)
    if foreign:
        run.log("warning", note=foreign)
    differing = f"{proof.wrong} of {proof.documents} decoded documents differ from"
    if has_case_operators(sp):
        differing = (f"the decoded documents have {proof.decoded} bytes, and their targets are "
                     f"charged {proof.charged} by")
    run.validity.need(not proof.wrong, f"bytes: {differing} the byte {counted_by}")
    run.validity.need(proof.share == 1, f"bytes: {proof.share:.1%} of the text was compared with "
                      "what it decodes to, not all of it")
    run.facts.update(documents_decoded=proof.documents, decoded_share=round(proof.share, 6))
    target_count = len(val.bytes)
    run.log("bytes", documents_decoded=proof.documents, share=proof.share, wrong=proof.wrong,
            val_tokens=target_count, val_bytes=total,
            bytes_per_token=round(total / target_count, 6),
            counted_by=counted_by)
    path = Path(run.s.data_path) / "manifest.json"
    if val.whole and path.is_file():
        stated = _manifest_totals(path)
        run.validity.need((target_count, total) == stated, f"bytes: {target_count} targets, "
                          f"{total} bytes; the manifest says {stated[0]}, {stated[1]}")
    return total


def _manifest_totals(path):
    """(targets, bytes) of the validation text, by the manifest of data/prepare.py."""
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"]["val"]
        return int(split["tokens"]) - 1, int(split["bytes"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadInput(f"{path}: not a manifest of data/prepare.py ({reason})") from None


# ---- the self-test -------------------------------------------------------------------------------
# The black-box tests of #1017 only call nats(ids (N + 1,)) -> (N,): the costs of a text's targets.

SELFTEST_TOLERANCE = 1e-6  # nats
SELFTESTS = {  # what is wrong where a test fails
    "flip": "C1 causality",
    "ends": "C1 causality",
    "prefix": "C3 order",
    "sum": "C2 normalisation",
    "ranks": "the score depends on ranks",
}


def code_tests(nats, ids, vocab, flips, cuts, sums, distribution=None, ends=()):
    """{name of a test: its largest error, or nan}: 0, up to rounding, if nats() is a code length.

    Tests are made in the text `ids`, at places t: flips, cuts, sums; and ends (see ends_test).
    distribution(ids, t) (V,), if given, is what the predictor says at target t of a text.
    """
    expected = nats(ids)
    generator = torch.Generator().manual_seed(0)
    errors = {"flip": flip_test(nats, ids, expected, vocab, flips, generator)}
    errors["prefix"] = prefix_test(nats, ids, expected, cuts)
    errors["sum"] = sum_test(nats, ids, vocab, sums, distribution, generator)
    if ends:
        errors["ends"] = ends_test(nats, ids, expected, ends)
    return errors


def flip_test(nats, ids, expected, vocab, places, generator):
    """C1: the cost of targets before t does not change when target t and all after it do.

    Only BOS tokens stay, so that documents begin where they did.
    """
    other = torch.randint(vocab - 1, ids.shape, generator=generator).to(ids)
    other = torch.where(ids == BOS, BOS, other + (other >= BOS))
    errors = []
    for t in places:
        text = torch.cat((ids[: t + 1], other[t + 1 :]))
        errors.append(nats(text)[:t] - expected[:t])
    return largest(errors)


def prefix_test(nats, ids, expected, places):
    """C3, C4: the cost of targets before t does not change when the text ends with them.

    Whoever learns from a text before scoring it fails. So does whoever reads it twice.
    """
    return largest([nats(ids[: t + 1])[:t] - expected[:t] for t in places])


def sum_test(nats, ids, vocab, places, distribution, generator):
    """C2: put every token of the vocabulary at target t; what they cost must be a distribution.

    Whoever looks at the target before predicting it fails. One token follows the target, so that
    its row shows it to whoever looks ahead. Where the predictor can tell its distribution, that
    must sum to 1, and a sample of two tokens must cost what it says.
    """
    errors = []
    for t in places:
        tokens = list(range(vocab))
        if distribution is not None:
            tokens = torch.randperm(vocab, generator=generator)[:2].tolist()
        costs = []
        for token in tokens:
            text = torch.cat((ids[: t + 1], ids.new_tensor([token]), ids[t + 2 : t + 3]))
            costs.append(nats(text)[t])
        costs = torch.stack(costs)
        if distribution is None:
            errors.append(costs.neg().exp().sum() - 1)
        else:
            probabilities = distribution(ids[: t + 3], t)
            errors.append(probabilities.sum() - 1)
            errors.append(costs + probabilities[tokens].log())
    return largest(errors)


def ends_test(nats, ids, expected, ends):
    """C1: the cost of targets before the end of a document does not change when it ends earlier.

    ends: (end, earlier), where a BOS token stands and where it is moved to.
    """
    errors = []
    for end, earlier in ends:
        text = ids.clone()
        text[end] = ids[earlier]
        text[earlier] = BOS
        before = earlier - 1
        errors.append(nats(text)[:before] - expected[:before])
    return largest(errors)


def largest(errors):
    """Largest absolute value in a list of tensors. Nan stays nan; Python's max() would lose it."""
    return torch.stack([error.abs().max() for error in errors]).max().item()


def selftest(run, s, path, data, val):
    """Test the predictor that scored: code_tests(), and the same costs on one rank as on all. Each
    test is a line of the log, and a reason if it fails.

    The predictor has the settings of the run with smaller sizes, in float64 and not compiled.
    Learning multiplies rounding: float32 with TTT_LORA_LR=0.3 was off by 0.05. pick_attention()
    and the Examiner look at the run's own kernels at its own lengths.
    """
    s = selftest_settings(s)
    rt = copy(run.rt)
    rt.compiled = False
    rt.dtype = torch.float64
    alone = copy(rt)
    alone.rank = 0
    alone.world = 1
    window = s.eval_seq_len
    shift = window // 4  # ends of documents are moved by it; their order by length stays
    # All documents but the last end where windows end; after 9 and 12 windows a part ends, too.
    ids = selftest_text(val, [4 * window, 3 * window, 2 * window, 2 * window, window, shift + 1])
    model = load_artifact(path, s, torch.float64, attend_reference, rt.device, data)[1].double()
    temperature = s.eval_temperature or model.temperature
    adaptation = None
    if s.trains_before_scoring:
        adaptation = adaptation_of_weights(model, s, rt)
    predictors = {}
    for runtime in (rt, alone):
        predictors[runtime] = make_predictor(model, s, runtime, len(ids), temperature)

    def nats(ids, runtime=rt, distributions=None):
        predictor = predictors[runtime]
        predictor.reset()
        stream = unmeasured_text(ids.int())
        costs = torch.zeros(len(ids) - 1, dtype=torch.float64, device=ids.device)
        if adaptation:
            adaptation.reset()
            fit_whole_text(adaptation, stream, 1, s)
        reader = reader_for(predictor, stream, s, runtime, total_parts=8)
        score(predictor, reader, stream, runtime, Validity(), check_every=0, nats=costs,
              distributions=distributions)
        return costs

    def distribution(ids, t):
        probabilities = torch.zeros(s.vocab_size, dtype=torch.float64, device=ids.device)
        nats(ids, distributions={t: probabilities})
        return probabilities

    with run.clock.charge("selftest"):
        ends = []
        if shift > 0:
            ends = [(end, end - shift) for end in (7 * window, 12 * window)]
        errors = code_tests(
            nats, ids, s.vocab_size, flips=(5 * window + 3, 11 * window),
            cuts=(4 * window, 9 * window), sums=(7 * window + 3, 9 * window),
            distribution=distribution, ends=ends)
        if rt.world > 1:
            errors["ranks"] = largest([nats(ids) - nats(ids, alone)])
    for name, error in errors.items():
        passed = error < SELFTEST_TOLERANCE  # nan does not
        run.validity.tests[name] = passed
        run.log("selftest", test=name, ok="yes" if passed else "no", off_by=error, ranks=rt.world)
        run.validity.need(passed, f"{SELFTESTS[name]}: the {name} test is off by {error:.1e}")


def selftest_settings(s):
    """Settings with sizes so small that the six documents of the self-test, 12 windows and a few
    tokens, make several parts and groups, and that the tilt gives hints: no context of
    TOKEN_ORDER=16 comes twice in them.
    """
    window = min(s.eval_seq_len, 8)
    stride = 0
    if 0 < s.eval_stride < s.eval_seq_len:
        stride = window // 2
    return replace(
        s, eval_seq_len=window, eval_stride=stride, eval_batch_seqs=2, ttt_chunk_tokens=3 * window,
        ttt_batch_seqs=min(s.ttt_batch_seqs, 3), ttt_epochs=min(s.ttt_epochs, 2),
        ttt_chunk_size=min(s.ttt_chunk_size, window // 2), ttt_short_chunks=(), ttt_batch_size=2,
        ttt_group_docs=2, phased_ttt_prefix_docs=min(s.phased_ttt_prefix_docs, 2),
        phased_ttt_num_phases=1, mixer_min_tokens=0, ngram_buckets=min(s.ngram_buckets, 64),
        token_order=2, token_threshold=min(s.token_threshold, 0.5))


def selftest_text(val, lengths):
    """(N + 1,) tokens from the beginning of the validation text, in documents of these lengths. A
    text that is too short is repeated.
    """
    count = sum(lengths) + 1
    repeats = ceil_div(count, len(val.tokens))
    ids = val.tokens.repeat(repeats)[:count].long()
    ids[ids == BOS] = BOS + 1
    starts = [0, *np.cumsum(lengths)[:-1]]
    ids[starts] = BOS
    return ids


# --------------------------------------------------------------------------------------------------
# 12 Predictors: what is scored. Mixtures and the tilt take another predictor as their base.
# Axes: B rows, M places of a row, V tokens; R rows of P weights of adapters; E experts, L tokens of
# a text.
# --------------------------------------------------------------------------------------------------


class Predictor:
    """Predicts each token of a text from the tokens before it.

    predict() gets inputs and never targets, and may be called at any time before nll() of the same
    chunk. observe() follows that nll(), and learn() gets a part after all ranks have scored theirs.
    These two change only what is predicted next, and reset() undoes them.
    """

    invalid_reason = ""  # the condition of a valid score that it breaks
    learns = False  # does learn() do anything?
    history = 0  # how many tokens before the first place Inputs.recent must hold
    adaptation = None  # an Adaptation, where gradient steps on scored text change the predictions
    adapters = None  # Adapters, where there are low-rank adapters beside the model
    adapter_weights = None  # (R, P) the weights of these adapters
    log = None  # of the run, where it is scored in one: phases are logged as they end

    def predict(self, inputs, count=None):
        """Log-probabilities (B, M, V) after each of the M places, or after the first `count`."""
        raise NotImplementedError

    def nll(self, inputs, targets):
        """Nats (B, M) of the targets. A shorter way needs a test that it is equal."""
        return -self.predict(inputs).gather(-1, targets[..., None]).squeeze(-1)

    def observe(self, chunk):
        """Take in the chunk of this rank that nll() was just called for."""

    def learn(self, part, stream):
        """Learn from the targets part.ranges of the stream, which are scored.

        All ranks learn the same. The stream is a copy that holds what has been scored so far, and
        zeros for the rest.
        """

    def reset(self):
        """Forget everything but the artifact."""

    def rehearse(self, stream):
        """Compile what learn() will call, on a synthetic text. Call reset() afterwards."""


def nats_of(logits, targets):
    """Nats (B, M) of the targets, from logits (B, M, V)."""
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view(targets.shape)


class ModelPredictor(Predictor):
    """The model as it is in the artifact.

    Only the scored places meet the head, in float32: bfloat16 logits cost 0.0005 BPB and more
    (#1923). With `kept_tokens` (EVAL_CONTEXT=cache) rows that continue keep the keys and values of
    that many tokens, their last, in a KVCache.
    """

    def __init__(self, model, rt, temperature=1.0, kept_tokens=0):
        self.model = model
        self.rt = rt
        self.temperature = temperature
        self.kept_tokens = kept_tokens
        self.cache = None
        self.new_keys = None  # keys and values of the last forward; the cache takes them in later
        self._forward = rt.compile(self._run)

    def _run(self, ids, docs, places, past, adapter_weights):
        """Logits (B, M, V) of the places; with a past, also the keys and values of the ids. This
        gets compiled.
        """
        adapters = None
        if adapter_weights is not None:
            adapters = self.adapters.of(adapter_weights)
        if past is not None:
            past = Past(*past, [])
        hidden = self.model.hidden(ids, docs, adapters, past)
        hidden = hidden.gather(1, places[..., None].expand(*places.shape, hidden.size(-1)))
        logits = self.model.logits(at_least_float32(hidden), adapters) / self.temperature
        return logits if past is None else (logits, past.new_kv)

    def logits(self, inputs):
        """(B, M, V) of the places."""
        if self.kept_tokens and inputs.turn is not None:
            past = self._cached_past(inputs)
            logits, self.new_keys = self._forward(
                inputs.ids, None, inputs.places, past, self.adapter_weights)
            return logits
        self.new_keys = None
        docs = self.model.docs_outside_graph(inputs.ids)
        return self._forward(inputs.ids, docs, inputs.places, None, self.adapter_weights)

    def _cached_past(self, inputs):
        """The fields of Past but `new_kv`, a list that the forward fills: it is made in _run(), so
        that a graph does not change what it is given.
        """
        rows = len(inputs.ids)
        if inputs.turn == 0:
            self.cache = KVCache(self.model, rows, self.kept_tokens)
        self.cache.narrow(rows)  # the last rows may have ended
        return self.cache.past(inputs.ids)[:-1]

    @torch.no_grad()
    def predict(self, inputs, count=None):
        return F.log_softmax(self.logits(inputs)[:, :count], dim=-1)

    @torch.no_grad()
    def nll(self, inputs, targets):
        return nats_of(self.logits(inputs), targets)

    def observe(self, chunk):
        if self.new_keys:
            self.cache.commit(chunk.inputs.ids, self.new_keys)

    def reset(self):
        self.cache = None
        self.new_keys = None


# ---- test-time training --------------------------------------------------------------------------


class Adaptation:
    """Gradient steps on scored text, which change the model's weights or its adapters.

    A step takes TTT_BATCH_SEQS sequences over all ranks: it is the same on any number of them.

    param_groups: as torch.optim takes them. make_optimizer: makes an optimizer of such groups.
    make_adapters: makes the adapters for the model's forward; None: the model's weights learn.
    """

    def __init__(self, model, param_groups, make_optimizer, s, rt, make_adapters=None):
        self.model = model
        self.param_groups = param_groups
        self.make_optimizer = make_optimizer
        self.s = s
        self.rt = rt
        self.make_adapters = make_adapters
        self.params = [param for group in param_groups for param in group["params"]]
        self.start = [param.detach().clone() for param in self.params]
        self._loss = rt.compile(self._weighted_loss)
        self.reset()

    def reset(self):
        self.put(self.start)
        self.renew()

    def renew(self):
        """Begin with an optimizer that remembers nothing."""
        self.optimizer = self.make_optimizer([dict(group) for group in self.param_groups])

    @torch.no_grad()
    def put(self, values):
        """Set the parameters to these values."""
        for param, value in zip(self.params, values):
            param.copy_(value)

    def _weighted_loss(self, ids, targets, weights, docs):
        adapters = self.make_adapters() if self.make_adapters else None
        hidden = self.model.hidden(ids, docs, adapters)
        logits = self.model.logits(at_least_float32(hidden), adapters)
        return (weights * nats_of(logits, targets)).sum()

    def fit(self, stream, targets, epochs, lr_scale, after_step=lambda: None):
        """Learn the targets (n,) of the stream `epochs` times, in this order.

        A sequence has EVAL_SEQ_LEN targets. lr_scale(progress), of progress in [0, 1), multiplies
        the learning rates. after_step() is called after each step.
        """
        s = self.s
        world = self.rt.world
        padding = -len(targets) % s.eval_seq_len
        rows = np.pad(targets, (0, padding), constant_values=-1).reshape(-1, s.eval_seq_len)
        batches = [rows[i : i + s.ttt_batch_seqs] for i in range(0, len(rows), s.ttt_batch_seqs)]
        # Every batch has as many, divisible by the ranks.
        batch_rows = ceil_div(len(batches[0]), world) * world
        steps = epochs * len(batches)
        for step in range(steps):
            batch = batches[step % len(batches)]
            batch = np.pad(batch, ((0, batch_rows - len(batch)), (0, 0)), constant_values=-1)
            self._step(stream, torch.from_numpy(batch).to(self.rt.device), lr_scale(step / steps))
            after_step()

    def _step(self, stream, targets, lr_scale):
        """One step on targets (rows, EVAL_SEQ_LEN) of the stream; -1 is none."""
        self._backward(stream, targets)
        if self.rt.world > 1:
            self._sum_gradients()
        if self.s.ttt_grad_clip:
            nn.utils.clip_grad_norm_(self.params, self.s.ttt_grad_clip)
        for group, given in zip(self.optimizer.param_groups, self.param_groups):
            group["lr"] = given["lr"] * lr_scale
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self, stream, targets):
        """Gradients of the mean loss of the targets, summed over the rows of this rank."""
        s = self.s
        rt = self.rt
        index = targets.clamp(min=0)
        weights = (targets >= 0).long()
        if s.byte_weighted_ttt:
            weights = weights * stream.bytes[index]
        weights = weights / weights.sum().clamp(min=1)

        rows = slice(rt.rank, None, rt.world)
        ids = stream.tokens[index].long()[rows]
        next_ids = stream.tokens[index + 1].long()[rows]
        weights = weights[rows]
        micro_rows = self._micro_batch_rows(len(ids))
        micro_batches = zip(*(z.split(micro_rows) for z in (ids, next_ids, weights)))
        for x, y, weight in micro_batches:
            self._loss(x, y, weight, self.model.docs_outside_graph(x)).backward()

    def _micro_batch_rows(self, rows):
        """As many rows as MICRO_BATCH_TOKENS allow and as divide all: one shape, one graph."""
        allowed = max(self.s.micro_batch_tokens // self.s.eval_seq_len, 1)
        return max(n for n in range(1, allowed + 1) if rows % n == 0)

    def _sum_gradients(self):
        """Over the ranks, in one message. What the forward did not touch has no gradient on any."""
        params = [param for param in self.params if param.grad is not None]
        grads = self.rt.sum(torch.cat([param.grad.flatten() for param in params]))
        sizes = [param.numel() for param in params]
        for param, grad in zip(params, grads.split(sizes)):
            param.grad.copy_(grad.view_as(param))


def adaptation_of_weights(model, s, rt):
    """Adaptation of the model's weights, except for those that TTT_FREEZE_* freezes.

    The learning rates are TTT_LR times TTT_LR_MULT_*. Frozen weights need no gradient from now on.
    """
    multiples = {}
    for block in model.blocks:
        multiples[block.attn.o.weight] = s.ttt_lr_mult_proj
        multiples[block.mlp.down.weight] = s.ttt_lr_mult_proj
        multiples[block.mlp.up.weight] = s.ttt_lr_mult_fc
    params_by_multiple = {}
    frozen = set()
    if s.ttt_freeze_blocks or s.ttt_freeze_embed:
        frozen = frozen_in_ttt(model, s)
    for name, param in model.named_parameters():
        param.requires_grad_(name not in frozen)
        if name not in frozen:
            params_by_multiple.setdefault(multiples.get(param, 1.0), []).append(param)
    param_groups = [dict(params=params, lr=s.ttt_lr * multiple)
                    for multiple, params in params_by_multiple.items()]
    if s.ttt_optimizer == "sgd":
        make_optimizer = partial(torch.optim.SGD, momentum=s.ttt_momentum)
    else:
        make_optimizer = partial(torch.optim.AdamW, weight_decay=0.0)
    return Adaptation(model, param_groups, make_optimizer, s, rt)


def frozen_in_ttt(model, s):
    """Names of the parameters that TTT_FREEZE_BLOCKS and TTT_FREEZE_EMBED leave as they are."""
    role_of = roles(model)
    frozen_blocks = model.blocks[: s.ttt_freeze_blocks]
    in_frozen_blocks = {param for block in frozen_blocks for param in block.parameters()}
    frozen = set()
    for name, param in model.named_parameters():
        learns_anyway = s.ttt_train_scales and role_of[name] == "scalar"
        if param in in_frozen_blocks and not learns_anyway:
            frozen.add(name)
        if s.ttt_freeze_embed and role_of[name] in ("embed", "head"):
            frozen.add(name)
    return frozen


def ttt_phase_ends(s):
    """Numbers of documents after which a phase of phased TTT ends and the weights learn (#1626)."""
    if not s.phased_ttt_prefix_docs:
        return set()
    phases = s.phased_ttt_num_phases
    return {round(s.phased_ttt_prefix_docs * phase / phases) for phase in range(1, phases + 1)}


def ttt_lr_scale(s, progress):
    """Scale of the learning rates of test-time training: half a cosine from 1 to TTT_MIN_LR."""
    return s.ttt_min_lr + (1 - s.ttt_min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class ScoreFirst(ModelPredictor):
    """Score-first test-time training: each part is scored and then learnt, except for the last.

    TTT=full: the model's weights learn (#549). TTT=lora: adapters learn, one set for the whole
    stream (#1033). With POLYAK_DECAY the running mean of what learns is what scores.
    """

    learns = True

    def __init__(self, model, s, rt, temperature=1.0, kept_tokens=0):
        super().__init__(model, rt, temperature, kept_tokens)
        self.s = s
        if s.ttt == "full":
            self.adaptation = adaptation_of_weights(model, s, rt)
        else:
            model.requires_grad_(False)
            self.adapters = Adapters(model, s)
            self.adapter_weights = self.adapters.start().requires_grad_()
            self.adaptation = self._adaptation_of_adapters()
        self.reset()

    def _adaptation_of_adapters(self):
        s = self.s
        param_groups = [dict(params=[self.adapter_weights], lr=s.ttt_lora_lr)]
        make_optimizer = partial(torch.optim.AdamW, eps=ADAPTER_EPS,
                                 betas=(s.ttt_beta1, s.ttt_beta2), weight_decay=s.ttt_wd)
        return Adaptation(self.model, param_groups, make_optimizer, s, self.rt,
                          lambda: self.adapters.of(self.adapter_weights))

    def reset(self):
        super().reset()
        self.adaptation.reset()
        # With POLYAK_DECAY the weights that learn are put aside while their running mean scores.
        self.learnt = self.adaptation.start
        self.mean = [value.clone() for value in self.adaptation.start]

    def rehearse(self, stream):
        self.adaptation.fit(stream, np.arange(len(stream.bytes)), 1, lambda progress: 0.0)

    def learn(self, part, stream):
        s = self.s
        adaptation = self.adaptation
        if part.number + 1 == part.total:
            return
        progress = part.number / max(part.total - 1, 1)
        warmup = min(progress / 0.3, 1)
        lr_scale = ttt_lr_scale(s, progress) * (1 + (s.adaptive_lr_max - 1) * warmup)
        begin, end = part.ranges[0]
        targets = np.arange(begin, end)
        if not s.polyak_decay:
            adaptation.fit(stream, targets, s.ttt_epochs, lambda _: lr_scale)
            return
        adaptation.put(self.learnt)
        adaptation.fit(stream, targets, s.ttt_epochs, lambda _: lr_scale, self._average)
        self.learnt = [param.detach().clone() for param in adaptation.params]
        adaptation.put(self.mean)

    @torch.no_grad()
    def _average(self):
        for mean, param in zip(self.mean, self.adaptation.params):
            mean.lerp_(param, 1 - self.s.polyak_decay)


ADAPTER_EPS = 1e-10  # of AdamW for adapters


class AdapterSet(NamedTuple):
    """Adapters as the forward takes them."""

    slots: list[VisitAdapters]  # of each visit
    head: Callable | None


class AdapterShape(NamedTuple):
    """Where an adapter stands, and the widths of what it reads and adds."""

    visit: int | None  # to a block; None: the head, after all visits
    target: str  # of TTT_LORA_TARGETS
    inputs: int
    outputs: int


def lora(a, b, scale, x):
    """scale * B A x, for A = a (R, r, in), B = b (R, out, r), x (rows, T, in); R is 1 or rows."""
    return (x @ a.mT * scale) @ b.mT


class Adapters:
    """Low-rank adapters (LoRA, arXiv 2106.09685) of each visit of the plan, without their weights.

    The predictors keep the weights, a tensor (R, P): a row for each text, and in it A and B of
    each adapter in turn.
    """

    def __init__(self, model, s):
        self.rank = s.ttt_lora_rank
        self.scale = (s.ttt_lora_alpha or s.ttt_lora_rank) / s.ttt_lora_rank
        self.seed = s.seed
        self.visits = len(model.plan)
        self.scaled = s.ttt_lora_scaled
        self.weight = model.embed.weight  # whose device and dtype the adapters' weights have
        self.dtype = model.dtype
        dim = s.model_dim
        kv_dim = s.num_kv_heads * s.head_dim
        outputs = {"q": dim, "k": kv_dim, "v": kv_dim, "o": dim, "attn": dim, "mlp": dim}
        self.shapes = []
        for visit in range(self.visits):
            for target in s.ttt_lora_targets:
                if target != "head":
                    self.shapes.append(AdapterShape(visit, target, dim, outputs[target]))
        self.body_tensors = 2 * len(self.shapes)  # A and B of all but the head
        if "head" in s.ttt_lora_targets:
            self.shapes.append(AdapterShape(None, "head", dim, s.vocab_size))
        self.sizes = []  # of A, B, A, B, ...
        for shape in self.shapes:
            self.sizes += [self.rank * shape.inputs, shape.outputs * self.rank]
        is_a = [torch.full((size,), i % 2 == 0) for i, size in enumerate(self.sizes)]
        self.is_a = torch.cat(is_a).to(self.weight.device)  # (P,) bool

    def start(self, *draw):
        """Weights (1, P) with which adapters begin. They add nothing, because B is zero.

        A is uniform within 1 / sqrt(inputs). Other numbers `draw` give another draw. A draw is the
        same on every device.
        """
        seed = self.seed
        if draw:
            seed = int(np.random.SeedSequence((self.seed, *draw)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        tensors = []
        for shape in self.shapes:
            uniform = torch.rand(self.rank * shape.inputs, generator=generator)
            a = (2 * uniform - 1) * shape.inputs**-0.5
            b = torch.zeros(shape.outputs * self.rank)
            tensors += [a, b]
        return torch.cat(tensors)[None].to(self.weight)

    def of(self, weights):
        """AdapterSet of weights (R, P): the head's in float32, the others in the model's dtype."""
        body_sizes = self.sizes[: self.body_tensors]
        head_sizes = self.sizes[self.body_tensors :]
        body, head = weights.split((sum(body_sizes), sum(head_sizes)), 1)
        tensors = [*body.to(self.dtype).split(body_sizes, 1)]
        if head_sizes:
            tensors += head.split(head_sizes, 1)
        head_adapter = None
        by_visit = [{} for _ in range(self.visits)]
        for shape, a, b in zip(self.shapes, tensors[::2], tensors[1::2]):
            a = a.view(-1, self.rank, shape.inputs)
            b = b.view(-1, shape.outputs, self.rank)
            adapter = partial(lora, a, b, self.scale)
            if shape.visit is None:
                head_adapter = adapter
            else:
                by_visit[shape.visit][shape.target] = adapter
        slots = [VisitAdapters(**adapters, scaled=self.scaled) for adapters in by_visit]
        return AdapterSet(slots, head_adapter)


class LearningRows(NamedTuple):
    """Adapters that learn, and AdamW's moments of them. Each is (R, P), a row for each text."""

    weights: Tensor
    mean: Tensor
    square: Tensor

    def first(self, count):
        """The first rows. They share memory with these."""
        return LearningRows(*(values[:count] for values in self))


class DocumentAdapters(ModelPredictor):
    """Adapters of each document (TTT=lora_docs, #77, #1530).

    A document is read TTT_CHUNK_SIZE tokens a turn. After each turn its adapters take one step of
    AdamW on the targets of that turn. Documents that are read together never meet: each has its own
    row of weights. With EVAL_CONTEXT=cache each token is forwarded once, and its gradient ends
    where its turn began. With windows the window is forwarded in each turn.

    The Reader gives the documents in groups, each of them a Part, the longest first. A rank reads
    its share of a group in batches of TTT_BATCH_SIZE rows, a document a row. Rows whose document
    has ended drop out, from the last one on. Three kinds of state follow from this:

    - of the batch: the LearningRows;
    - of the group: how many batches have ended, and for a warm start the sum of the weights with
      which adapters ended, and their number;
    - of the text: the weights with which adapters begin, and which documents were read.

    With which weights the adapters of a document begin:

    - TTT_LORA_A=shared: all with the same draw. TTT_WARM_START_A: A is the mean of those that
      ended in the last group.
    - TTT_LORA_A=own: A is drawn for each seat, anew for each group. The seat of a document is its
      number in its group. TTT_WARM_START_A: A is where the last document in the same seat ended.
      (#1767 has a start for each row of a rank's batch, which is the same where all ranks are
      equally fast.)

    Phased TTT (PHASED_TTT_*): where a phase of it ends, the model's weights learn from all
    documents so far (#1610), and every own A is drawn anew.
    """

    def __init__(self, model, s, rt, temperature=1.0, kept_tokens=0):
        super().__init__(model, rt, temperature, kept_tokens)
        self.s = s
        self.phased = s.phased_ttt_prefix_docs > 0
        self.learns = s.ttt_warm_start_a or self.phased
        self.adapters = Adapters(model, s)
        if self.phased:
            self.adaptation = adaptation_of_weights(model, s, rt)
        self.reset()

    def reset(self):
        super().reset()
        # Of the text.
        self.start = self.adapters.start()  # (1, P), for all documents
        self.draw = 0  # number of the draw of own starts
        self.seats = {}  # {seat: (P,) weights with which the last document there ended}
        self.document_groups = []  # ranges of the documents of each group
        # Of the group.
        self.batches = 0  # that have ended
        if self.s.ttt_lora_a == "shared":
            size = self.start.size(1) + 1
            device = self.start.device
            self.ended_sum_and_count = torch.zeros(size, dtype=torch.float64, device=device)
        # Of the batch.
        self.rows = None  # LearningRows
        if self.phased:
            self.adaptation.reset()
        self.model.requires_grad_(False)

    # A turn: predict, and take a step on the targets after they were scored.

    @torch.enable_grad()  # nll() is without, but the step in observe() needs this graph
    def logits(self, inputs):
        rows = len(inputs.ids)
        if inputs.turn == 0:
            weights = self._begin(rows)
            self.rows = LearningRows(
                weights, torch.zeros_like(weights), torch.zeros_like(weights))
        self.rows = self.rows.first(rows)
        self.adapter_weights = self.rows.weights.detach().requires_grad_()
        self.last_logits = super().logits(inputs)  # with their graph, for observe()
        return self.last_logits.detach()

    def observe(self, chunk):
        super().observe(chunk)
        if chunk.continuing:
            self._step(chunk)
        if self.s.ttt_warm_start_a:
            self._note_ended(chunk)
        if not chunk.continuing:
            self.batches += 1

    def _step(self, chunk):
        """A step of AdamW on the chunk, of the rows that continue."""
        s = self.s
        is_scored = chunk.index >= 0
        nats = nats_of(self.last_logits, chunk.targets)
        loss = (nats * is_scored).sum(1) / is_scored.sum(1).clamp(min=1)
        loss = loss[: chunk.continuing].sum()
        grad = torch.autograd.grad(loss, self.adapter_weights)[0]
        weights, mean, square = self.rows.first(chunk.continuing)
        adamw(weights, grad[: chunk.continuing], mean, square, chunk.inputs.turn + 1,
              s.ttt_lora_lr, s.ttt_wd, (s.ttt_beta1, s.ttt_beta2), ADAPTER_EPS)

    def _note_ended(self, chunk):
        """Keep what a warm start needs of the documents that end with this chunk."""
        weights = self.rows.weights
        # A padding row scores nothing and learns nothing: its A is still where its seat began.
        if self.s.ttt_lora_a == "own":
            ended = slice(chunk.continuing, None)
            self.seats.update(zip(self._seats(len(weights))[ended], weights[ended]))
            return
        ends = (chunk.index >= 0).any(1).double()
        ends[: chunk.continuing] = 0
        self.ended_sum_and_count += torch.cat((ends @ weights.double(), ends.sum()[None]))

    # Where adapters begin.

    def _begin(self, rows):
        """Weights (rows, P) with which the adapters of this rank's next documents begin."""
        if self.s.ttt_lora_a == "shared":
            return self.start.expand(rows, -1).clone()
        starts = torch.stack([self._own_start(seat) for seat in self._seats(rows)])
        return starts * self.adapters.is_a  # B begins with zeros

    def _seats(self, rows):
        """Seats of the documents in the rows of this rank's batch."""
        first = self.batches * self.s.ttt_batch_size
        return [(first + row) * self.rt.world + self.rt.rank for row in range(rows)]

    def _own_start(self, seat):
        """(P,): where the last document in this seat ended, or a draw. Without TTT_WARM_START_A
        each document needs a draw: 15 ms of a CPU core for #2135's 5.9 million weights.
        """
        if seat in self.seats:
            return self.seats[seat]
        return self.adapters.start(self.draw, seat)[0]

    # The end of a group, and of a phase of phased TTT.

    def learn(self, part, stream):
        s = self.s
        if not s.ttt_warm_start_a:
            self.draw += 1
        elif s.ttt_lora_a == "shared":
            self._warm_start()
            self.ended_sum_and_count.zero_()
        self.batches = 0
        self.document_groups.append(part.ranges)
        documents = sum(map(len, self.document_groups))
        is_last = part.number + 1 == part.total  # nothing is scored after it
        if self.phased and documents in ttt_phase_ends(s) and not is_last:
            self._end_ttt_phase(stream)

    def _warm_start(self):
        """A begins at the mean over the adapters that ended in this group, on all ranks."""
        self.rt.sum(self.ended_sum_and_count)
        total = self.ended_sum_and_count[:-1]
        count = self.ended_sum_and_count[-1]
        if count > 0:
            mean = (total / count).to(self.start)
            self.start = torch.where(self.adapters.is_a, mean, self.start)

    def _end_ttt_phase(self, stream):
        """The weights learn from all documents so far, and own starts are drawn anew."""
        self.seats = {}
        self.draw += 1
        documents = np.concatenate(self.document_groups)
        targets = np.concatenate([np.arange(begin, end) for begin, end in documents])
        self._train_weights(stream, targets, self.s.ttt_epochs)
        if self.log:
            self.log("ttt_phase", documents=len(documents), targets=len(targets))

    def _train_weights(self, stream, targets, epochs):
        for param in self.adaptation.params:
            param.requires_grad_(True)
        self.adaptation.renew()
        self.adaptation.fit(stream, targets, epochs, partial(ttt_lr_scale, self.s))
        self.model.requires_grad_(False)

    def rehearse(self, stream):
        if self.phased:
            self._train_weights(stream, np.arange(len(stream.bytes)), 1)


def log_adaptation(run, model, predictor, documents):
    """Log what test-time training may change, and what it may not, and give the predictor the log,
    in which phased TTT notes its phases. documents: how many the text has.
    """
    while isinstance(predictor, WrappingPredictor):
        predictor = predictor.base
    if predictor.adapters:
        of_each = "document" if run.s.ttt == "lora_docs" else "stream"
        run.log("ttt_adapters", parameters=sum(predictor.adapters.sizes),
                beside=run.s.ttt_lora_targets, rank=run.s.ttt_lora_rank, of_each=of_each)
    predictor.log = run.log
    if run.s.phased_ttt_prefix_docs > documents:
        run.log("warning", note=f"PHASED_TTT_PREFIX_DOCS={run.s.phased_ttt_prefix_docs} exceeds "
                f"the {documents} documents of the text: phases that end beyond them do not happen")
    adaptation = predictor.adaptation
    if adaptation and not adaptation.make_adapters:
        log_trainable(run, model, adaptation)


def log_trainable(run, model, adaptation):
    """Log how many of the model's parameters an adaptation changes, and where they are."""
    trainable = set(adaptation.params)
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trainable)
    by_block = []
    for block in model.blocks:
        by_block.append(sum(p.numel() for p in block.parameters() if p in trainable))
    run.log("ttt_trainable", parameters=count, frozen=total - count, by_block=by_block,
            outside_blocks=count - sum(by_block))


# ---- n-grams of the scored text ------------------------------------------------------------------

# Odd constants of 64 bits, as int64. A product with one of them spreads a number over its upper
# bits.
GOLDEN = -7046029254386353131  # 2^64 / golden ratio
PCG = 6364136223846793005  # multiplier of Knuth's MMIX and of PCG
SPLITMIX = -4658895280553007687  # of SplitMix64
XXHASH = -4417276706812531889  # the second prime of xxHash64


class HashTable:
    """A set of int64 keys >= 0 on the device. Each key has a slot, a number below len(table).

    The search for a key begins at the slot that its hash says. While another key is there, it moves
    to the next slot (open addressing, linear probing). It ends at the key, or at a free slot: then
    the key is not in the table, and can be added there.

    There is space for `capacity` keys; a search in a full table would never end. The device decides
    which of several new keys gets a slot first. Nothing that is computed from slots depends on
    that.
    """

    def __init__(self, capacity, device):
        self.bits = max(int(1.5 * capacity).bit_length(), 8)
        # At each slot its key + 1, or 0 where it is free.
        self.contents = torch.zeros(1 << self.bits, dtype=torch.int64, device=device)

    def __len__(self):
        return len(self.contents)

    def reset(self):
        self.contents.zero_()

    def probe(self, keys, add=False):
        """Slots of keys (n,). A key that is not in the table gets -1, or with `add` a slot.

        All keys are searched at once: each round looks at one slot for every key that is left.
        """
        slots = torch.full_like(keys, -1)
        # Of each key that is left: its index, what its slot stores, the slot to look at.
        index = torch.arange(len(keys), device=keys.device)
        wanted = keys + 1
        slot_mask = len(self.contents) - 1
        slot = (keys * GOLDEN >> (64 - self.bits)) & slot_mask
        while len(index):
            stored = self.contents.index_select(0, slot)
            if add:
                self._take_free_slots(slot, wanted, stored)
            slots.index_copy_(0, index, torch.where(stored == wanted, slot, -1))
            met_another = (stored != wanted) & (stored > 0)
            left = met_another.nonzero().squeeze(1)
            index = index.index_select(0, left)
            wanted = wanted.index_select(0, left)
            slot = (slot.index_select(0, left) + 1) & slot_mask
        return slots

    def _take_free_slots(self, slots, wanted, stored):
        """Store what is wanted at slots (n,) that are free, and update what is `stored` there.

        Of several keys that want the same slot one gets it.
        """
        free = (stored == 0).nonzero().squeeze(1)
        if len(free):
            free_slots = slots.index_select(0, free)
            self.contents.index_copy_(0, free_slots, wanted.index_select(0, free))
            stored.index_copy_(0, free, self.contents.index_select(0, free_slots))


DISCOUNT = 0.9  # of 0.5, 0.6, ..., 0.9 and Witten-Bell the best for English of 1,024 pieces


class NgramCounts:
    """How often each n-gram of up to `order` tokens occurred, exactly.

    The n-grams are the nodes of a trie. The node of the tokens (a, b, c) is the child by c of the
    node of (a, b), whose parent is the node of (a), whose parent is the root. A HashTable holds
    the children: its keys are pairs (parent, token), so no two n-grams share a count. All places
    of a text walk down the trie together, a token a round.

    A node is a number: that of one token is the token; that of a longer n-gram is vocab + 1 + its
    slot in the table; the root is the last number; -1 is no node.

    There is space for `capacity` n-grams of two tokens and more. Each takes 30 to 60 bytes: with
    NGRAM_ORDER=10, FineWeb's 62 million targets of 1,024 pieces take 21 GB. Texts that are counted
    together are kept apart by the token `vocab`.
    """

    def __init__(self, vocab, order, capacity, device):
        self.vocab = vocab
        self.order = order
        self.capacity = capacity
        self.used = 0  # most n-grams that the table may hold by now, known without the device
        self.table = HashTable(capacity, device)
        nodes = vocab + 1 + len(self.table) + 1
        # Of each n-gram: how often it occurred, how many tokens came after it, and how many
        # different ones.
        self.count = torch.zeros(nodes, dtype=torch.int32, device=device)
        self.tokens_after = torch.zeros_like(self.count)
        self.types_after = torch.zeros_like(self.count)

    def reset(self):
        self.used = 0
        self.table.reset()
        self.count.zero_()
        self.tokens_after.zero_()
        self.types_after.zero_()

    @property
    def root(self):
        return len(self.count) - 1

    def _children(self, nodes, tokens, add=False):
        """Nodes one token longer; -1 where there is none, unless `add` makes it."""
        slots = self.table.probe(nodes * (self.vocab + 1) + tokens, add)
        return torch.where(slots < 0, -1, slots + self.vocab + 1)

    def find(self, nodes, tokens):
        """Nodes one token longer, of the same shape; -1 for what is not there, and after -1."""
        children = torch.full_like(nodes, -1)
        given = ((nodes >= 0) & (tokens >= 0)).flatten().nonzero().squeeze(1)
        nodes = nodes.reshape(-1).index_select(0, given)
        tokens = tokens.reshape(-1).index_select(0, given)
        children.view(-1).index_copy_(0, given, self._children(nodes, tokens))
        return children

    def walk(self, text):
        """[nodes (B, L) of the last 1, 2, ..., order tokens at each place of text (B, L)]."""
        nodes = [text]
        while len(nodes) < self.order:
            end_one_earlier = F.pad(nodes[-1][:, :-1], (1, 0), value=-1)
            nodes.append(self.find(end_one_earlier, text))
        return nodes

    def add(self, text, new):
        """Count the n-grams that end at places `new` (n,) of text (L,). It ends with `vocab`.

        ValueError if there might not be space for them.
        """
        most = len(new) * (self.order - 1)
        if self.used + most > self.capacity:  # a text that was counted before adds less
            self.used = int(self.table.contents.count_nonzero())
        self.used += most
        if self.used > self.capacity:
            raise ValueError(f"{self.used} n-grams, but there is space for {self.capacity}")
        is_new = torch.zeros_like(text, dtype=torch.bool).index_fill_(0, new, True)
        ends = (text < self.vocab).nonzero().squeeze(1)  # places at which the n-grams so far end
        nodes = text.index_select(0, ends)
        parents = torch.full_like(nodes, self.root)
        self._count_new(is_new, ends, nodes, parents)
        for _ in range(1, self.order):  # one token longer, except for what would span two texts
            tokens = text.index_select(0, ends + 1)
            inside = (tokens < self.vocab).nonzero().squeeze(1)
            tokens = tokens.index_select(0, inside)
            ends = (ends + 1).index_select(0, inside)
            parents = nodes.index_select(0, inside)
            nodes = self._children(parents, tokens, add=True)
            self._count_new(is_new, ends, nodes, parents)

    def _count_new(self, is_new, ends, nodes, parents):
        """Count the nodes (n,) that end at new places, and their last tokens after the parents."""
        counted = is_new.index_select(0, ends).nonzero().squeeze(1)
        nodes = nodes.index_select(0, counted)
        parents = parents.index_select(0, counted)
        first = self._first_occurrences(nodes)
        ones = torch.ones(len(nodes), dtype=torch.int32, device=nodes.device)
        self.count.index_add_(0, nodes, ones)
        self.tokens_after.index_add_(0, parents, ones)
        self.types_after.index_add_(0, parents.index_select(0, first), ones[: len(first)])

    def _first_occurrences(self, nodes):
        """Indices into nodes (n,): of each node that has no count yet, one index.

        self.count serves as scratch: every index is written to the node's count, and of equal nodes
        one index stays, the one that reads itself.
        """
        uncounted = (self.count.index_select(0, nodes) == 0).nonzero().squeeze(1)
        their_nodes = nodes.index_select(0, uncounted)
        marks = torch.arange(1, len(uncounted) + 1, dtype=torch.int32, device=nodes.device)
        self.count.index_copy_(0, their_nodes, marks)
        stayed = (self.count.index_select(0, their_nodes) == marks).nonzero().squeeze(1)
        self.count.index_fill_(0, their_nodes, 0)
        return uncounted.index_select(0, stayed)

    def backoff_probabilities(self, contexts, grams):
        """[p (...) float64 of a token after its context, by orders 1, 2, ...].

        contexts: nodes of the 0, 1, ... tokens before. grams: nodes of these contexts and the
        token. Each order is a distribution over all tokens.

        Each order takes DISCOUNT off its counts and gives that mass to the order below it, down to
        1 / vocab (interpolated absolute discounting). Where a context never occurred, the order
        below answers.
        """
        p = torch.full(grams[0].shape, 1 / self.vocab, dtype=torch.float64, device=grams[0].device)
        by_order = []
        for context, gram in zip(contexts, grams):
            count = torch.where(gram < 0, 0, self.count[gram]).double()
            total = torch.where(context < 0, 0, self.tokens_after[context]).double()
            types = torch.where(context < 0, 0, self.types_after[context]).double()
            kept = (count - DISCOUNT).clamp(min=0)
            interpolated = (kept + DISCOUNT * types * p) / total.clamp(min=1)
            p = torch.where(total > 0, interpolated, p)
            by_order.append(p)
        return by_order


class WrappingPredictor(Predictor):
    """A predictor that changes the predictions of another one, its base.

    A subclass overrides predict(), which asks the base, and may override the other methods, which
    call super(). wrappers() says when it is used. target_count: of the stream.

    It learns, so the text is read in parts that its base alone may not need, and a base that begins
    anew with each part may predict otherwise: scores with and without a wrapper are not paired.
    """

    learns = True

    def __init__(self, base, s, rt, target_count=0):
        self.base = base
        self.s = s
        self.rt = rt
        self.invalid_reason = base.invalid_reason
        self.history = base.history

    def observe(self, chunk):
        self.base.observe(chunk)

    def learn(self, part, stream):
        self.base.learn(part, stream)

    def reset(self):
        self.base.reset()

    def rehearse(self, stream):
        self.base.rehearse(stream)


def scored_text(part, stream, back, s):
    """(text (L,), new): the scored text of a part, and the places in it that nobody has counted.

    A range of the part comes with up to `back` tokens before it, which are counted already. With
    TTT=lora_docs it is a document and comes alone. The token VOCAB_SIZE follows on each range.
    """
    separator = stream.tokens.new_full((1,), s.vocab_size)
    pieces = []
    new = []
    length = 0  # of the pieces so far
    for begin, end in part.ranges.tolist():
        # The targets [begin, end) are the tokens [begin + 1, end + 1) of the stream.
        first = begin if s.ttt == "lora_docs" else max(begin + 1 - back, 0)
        pieces += [stream.tokens[first : end + 1], separator]
        shift = length - first  # from a place in the stream to the same one in the text
        new.append(torch.arange(begin + 1 + shift, end + 1 + shift, device=separator.device))
        length += end + 1 - first + 1
    return torch.cat(pieces).long(), torch.cat(new)


def entropy_of(log_probs):
    """Entropy (B, M) in nats of log-probabilities (B, M, V)."""
    return -(log_probs.exp() * log_probs).sum(-1).double()


def ngram_weight(s, log_probs):
    """Weight (B, M) of the n-grams (#1033): it rises with the entropy of the model's log_probs."""
    above_center = entropy_of(log_probs) - s.alpha_center
    return s.alpha_base + s.alpha_range * torch.sigmoid(2 * above_center)


def every_token(log_probs):
    """Tokens (B, M, V) that log_probs (B, M, V) are the log-probabilities of."""
    return torch.arange(log_probs.size(-1), device=log_probs.device).expand(log_probs.shape)


def with_dims_of(values, like):
    """values (..., B, M) as (..., B, M, 1, ...), to meet a tensor like (B, M, ...)."""
    return values.view(*values.shape, *(1,) * (like.dim() - 2))


class NgramMixture(WrappingPredictor):
    """The base mixed with E experts, which are n-grams of one order, counted in the scored text.

    Base and experts are distributions, and so is their mixture. _log_weights() of a subclass says
    what each of them weighs. names: of the experts, as in MIXER_EXPERTS.

    An n-gram `gram` is its `context`, all tokens but the last, and that token. Both are nodes of
    `counts`.
    """

    def __init__(self, base, s, rt, target_count, names):
        super().__init__(base, s, rt, target_count)
        self.orders = [self._order(name) for name in names]
        order = max(self.orders, default=1)
        self.counts = NgramCounts(s.vocab_size, order, target_count * (order - 1), rt.device)
        # A context is order - 1 tokens: that at the place, and order - 2 before it.
        self.history = max(self.history, order - 2)
        self.reset()

    def _order(self, name):
        return dict(unigram=1, bigram=2, trigram=3, backoff=self.s.ngram_order)[name]

    def _log_weights(self, log_probs):
        """Of base and experts, (1 + E, B or 1, M or 1). log_probs (B, M, V): those of the base."""
        raise NotImplementedError

    def reset(self):
        super().reset()
        self.counts.reset()
        self.counted = 0  # targets
        self.target_log_probs = None  # (1 + E, B, M) of base and experts, in the last nll()

    @torch.no_grad()
    def predict(self, inputs, count=None):
        log_probs = self.base.predict(inputs, count)
        if self.counted < self.s.mixer_min_tokens:
            return log_probs
        nodes = self.counts.walk(inputs.recent)
        contexts = self._contexts(nodes, inputs.history, log_probs.size(1))
        contexts = [context[..., None].expand(log_probs.shape) for context in contexts]
        tokens = every_token(log_probs)
        grams = [tokens, *(self.counts.find(context, tokens) for context in contexts[1:])]
        return self._mix(self._all_log_probs(log_probs, log_probs, contexts, grams), log_probs)

    @torch.no_grad()
    def nll(self, inputs, targets):
        log_probs = self.base.predict(inputs)
        base_log_probs = log_probs.gather(-1, targets[..., None]).squeeze(-1)
        self.target_log_probs = None
        if self.counted < self.s.mixer_min_tokens:
            return -base_log_probs
        contexts, grams = self.nodes_of_targets(inputs, targets)
        self.target_log_probs = self._all_log_probs(log_probs, base_log_probs, contexts, grams)
        return -self._mix(self.target_log_probs, log_probs)

    def _contexts(self, nodes, first, places):
        """[nodes (B, M)], element n: node of the last n tokens at each place; n = 0 is the root.
        They are columns of walk()'s nodes, from `first` on.
        """
        columns = [of_length[:, first : first + places] for of_length in nodes]
        root = torch.full_like(columns[0], self.counts.root)
        return [root, *columns[: self.counts.order - 1]]

    def nodes_of_targets(self, inputs, targets):
        """(contexts, grams) of targets (B, M), as backoff_probabilities() takes them."""
        first = inputs.history
        up_to_first = inputs.recent[:, : first + 1]
        nodes = self.counts.walk(torch.cat((up_to_first, targets), 1))
        grams = [of_length[:, first + 1 :] for of_length in nodes]
        return self._contexts(nodes, first, targets.size(1)), grams

    def _all_log_probs(self, log_probs, base_log_probs, contexts, grams):
        """Log-probabilities (1 + E, B, M, ...) of tokens: the base's and those of each expert."""
        by_order = self.counts.backoff_probabilities(contexts, grams)
        expert_log_probs = [by_order[order - 1].log() for order in self.orders]
        return torch.stack([base_log_probs.double(), *expert_log_probs])

    def _mix(self, all_log_probs, log_probs):
        """Log-probabilities (B, M, ...) of the mixture."""
        log_weights = with_dims_of(self._log_weights(log_probs), all_log_probs[0])
        return (all_log_probs + log_weights).logsumexp(0)

    def learn(self, part, stream):
        super().learn(part, stream)
        text, new = scored_text(part, stream, self.counts.order - 1, self.s)
        self.counts.add(text, new)
        self.counted += len(new)


class BackoffMixture(NgramMixture):
    """MIXER=backoff: n-grams of NGRAM_ORDER at a weight that rises with the model's entropy.

    HashedMixture is #1033's original, which is not normalised.
    """

    def __init__(self, base, s, rt, target_count):
        super().__init__(base, s, rt, target_count, ("backoff",))

    def _log_weights(self, log_probs):
        alpha = ngram_weight(self.s, log_probs)
        return torch.stack((torch.log1p(-alpha), alpha.log()))


class HedgeMixture(NgramMixture):
    """MIXER=hedge: the model and MIXER_EXPERTS, weighted by their losses so far (#967).

    At the end of each part the log weight of each falls by MIXER_ETA times its mean nats, over all
    ranks. EntropyMixture is the original, whose expert "entropy" is not normalised.
    """

    MODEL_WEIGHT = 2.0  # log weight with which the model begins; the experts begin at 0

    def __init__(self, base, s, rt, target_count):
        super().__init__(base, s, rt, target_count, s.mixer_experts)

    def reset(self):
        super().reset()
        device = self.rt.device
        count = 1 + len(self.orders)
        self.log_weights = torch.zeros(count, dtype=torch.float64, device=device)
        self.log_weights[0] = self.MODEL_WEIGHT
        # Of the part: the nats of base and experts, and at last the number of targets.
        self.nats_and_count = torch.zeros(count + 1, dtype=torch.float64, device=device)

    def _log_weights(self, log_probs):
        return self.log_weights.log_softmax(0).view(-1, 1, 1)

    def observe(self, chunk):
        if self.target_log_probs is not None:
            is_scored = chunk.index >= 0
            self.nats_and_count[:-1] -= (self.target_log_probs * is_scored).flatten(1).sum(1)
            self.nats_and_count[-1] += is_scored.sum()
        super().observe(chunk)

    def learn(self, part, stream):
        super().learn(part, stream)
        self.rt.sum(self.nats_and_count)
        target_count = self.nats_and_count[-1]
        if target_count > 0:
            self.log_weights -= self.s.mixer_eta * self.nats_and_count[:-1] / target_count
        self.nats_and_count.zero_()


# ---- token-only tilt -----------------------------------------------------------------------------


class Followers:
    """What followed on each context: how often any token did, and which token most often.

    Both are kept by the slots of a HashTable. Its keys are contexts, hashes of 62 bits, and pairs
    of a context and a token, hashes of 62 bits with bit 62 set.
    """

    TOKEN_BITS = 17  # lower bits of `best`: more than a token has
    TOKEN_MASK = (1 << TOKEN_BITS) - 1

    def __init__(self, capacity, device):
        self.used = 0  # an upper bound of the number of keys in the table
        self._use(HashTable(2 * capacity, device))

    def _use(self, table):
        self.table = table
        self.count = torch.zeros(len(table), dtype=torch.int64, device=table.contents.device)
        # Of a context: (times << TOKEN_BITS) | token of the token that followed most often.
        self.best = torch.zeros_like(self.count)

    def reset(self):
        self.table.reset()
        self.count.zero_()
        self.best.zero_()
        self.used = 0

    def _pairs(self, contexts, tokens):
        """Keys of contexts and the tokens after them."""
        return mix_bits(contexts + (tokens + 1) * XXHASH) | PAIR_BIT

    def _make_room(self, more):
        """Double the table until `more` keys fit in."""
        self.used += more
        while 1.5 * self.used > len(self.table):
            old = copy(self)
            kept = old.table.contents.nonzero().squeeze(1)
            # HashTable adds half and rounds up, so this doubles.
            self._use(HashTable(len(old.table), old.count.device))
            slots = self.table.probe(old.table.contents[kept] - 1, add=True)
            self.count[slots] = old.count[kept]
            self.best[slots] = old.best[kept]

    def add(self, contexts, tokens, elsewhere=0):
        """Count that tokens (n,) followed on contexts (n,).

        elsewhere (n,): how often the token followed on the context in another table. `best`
        includes it.
        """
        self._make_room(2 * len(contexts))
        context_slots = self.table.probe(contexts, add=True)
        pair_slots = self.table.probe(self._pairs(contexts, tokens), add=True)
        ones = torch.ones_like(context_slots)
        self.count.index_add_(0, context_slots, ones)
        self.count.index_add_(0, pair_slots, ones)
        times = self.count[pair_slots] + elsewhere
        self.best.scatter_reduce_(0, context_slots, (times << self.TOKEN_BITS) | tokens, "amax")

    def times(self, contexts, tokens):
        """How often each token followed on its context."""
        slots = self.table.probe(self._pairs(contexts, tokens))
        return torch.where(slots < 0, 0, self.count[slots])

    def look_up(self, contexts):
        """(how often anything followed, `best`) of contexts; zeros where nothing did."""
        slots = self.table.probe(contexts)
        absent = slots < 0
        return torch.where(absent, 0, self.count[slots]), torch.where(absent, 0, self.best[slots])


PAIR_BIT = 1 << 62  # a hash has the bits below


def mix_bits(keys):
    """62 bits that look random, of int64 keys."""
    return ((keys ^ (keys >> 29)) * SPLITMIX >> 2) & (PAIR_BIT - 1)


class Tilt(WrappingPredictor):
    """Token-only tilt (#1145, #1514): one token, the hint, gets a higher probability.

    The hint is the token that followed most often on the last TOKEN_ORDER - 1 tokens, if it did in
    at least TOKEN_THRESHOLD of the cases. With it

        p'(v) = p(v) e^(TOKEN_BOOST [v = hint]) / Z,  Z = 1 + p(hint) (e^TOKEN_BOOST - 1).

    That sums to 1 whatever the hint is, so contexts may be found by a hash.

    Counts come from the scored parts. A row that continues (a document, kept keys) also counts its
    own earlier turns.
    """

    def __init__(self, base, s, rt, target_count):
        super().__init__(base, s, rt, target_count)
        self.context_length = s.token_order - 1  # tokens
        self.history = max(self.history, self.context_length - 1)
        self.text_followers = Followers(target_count, rt.device)
        self.row_followers = Followers(256, rt.device)  # whose contexts hold the row's number
        powers = [pow(PCG, i, 2**64) for i in range(self.context_length)]
        self.powers = torch.tensor(powers, dtype=torch.uint64).view(torch.int64).to(rt.device)

    def reset(self):
        super().reset()
        self.text_followers.reset()
        self.row_followers.reset()

    def _hashes(self, text):
        """Keys of the contexts that end at each place of text (..., L), if it is long enough."""
        return mix_bits(((text.unfold(-1, self.context_length, 1) + 1) * self.powers).sum(-1))

    def _contexts(self, inputs):
        """Of each place (B, M): (key of its context, key in row_followers, is it complete?)."""
        recent = inputs.recent[:, inputs.history - self.context_length + 1 :]
        keys = self._hashes(recent)
        numbers = torch.arange(1, 1 + len(recent), device=recent.device)[:, None]
        row_keys = mix_bits(keys + numbers * GOLDEN)
        complete = (recent.unfold(-1, self.context_length, 1) >= 0).all(-1)
        return keys, row_keys, complete

    def _hints(self, inputs):
        """Hints (B, M), -1 where there is none."""
        keys, row_keys, complete = self._contexts(inputs)
        total, best = self.text_followers.look_up(keys.flatten())
        if inputs.turn:
            row_total, row_best = self.row_followers.look_up(row_keys.flatten())
            total = total + row_total
            best = torch.maximum(best, row_best)  # row_best includes the text's counts (observe)
        times = best >> Followers.TOKEN_BITS
        token = best & Followers.TOKEN_MASK
        often_enough = times.double() / total.clamp(min=1) >= self.s.token_threshold
        sure = complete.flatten() & (total > 0) & often_enough
        return torch.where(sure, token, -1).view_as(keys)

    @torch.no_grad()
    def predict(self, inputs, count=None):
        log_probs = self.base.predict(inputs, count)
        hints = self._hints(inputs)[:, :count, None]
        boost = (hints >= 0) * self.s.token_boost
        hints = hints.clamp(min=0)
        added = log_probs.gather(-1, hints).exp() * torch.expm1(boost)  # Z - 1
        return (log_probs - torch.log1p(added)).scatter_add(-1, hints, boost.to(log_probs.dtype))

    def observe(self, chunk):
        super().observe(chunk)
        turn = chunk.inputs.turn
        if turn is None:
            return
        if turn == 0:
            self.row_followers.reset()
        keys, row_keys, complete = self._contexts(chunk.inputs)
        is_scored = complete & (chunk.index >= 0)
        tokens = chunk.targets[is_scored]
        in_text = self.text_followers.times(keys[is_scored], tokens)
        self.row_followers.add(row_keys[is_scored], tokens, in_text)

    def learn(self, part, stream):
        super().learn(part, stream)
        self.row_followers.reset()
        text, new = scored_text(part, stream, self.context_length, self.s)
        new = new[new >= self.context_length]
        if len(new):
            # A context over the end of a range holds the token VOCAB_SIZE: nobody will look it up.
            self.text_followers.add(self._hashes(text)[new - self.context_length], text[new])


# ---- composition ---------------------------------------------------------------------------------


def make_predictor(model, s, rt, target_count, temperature=1.0):
    """The predictor that the settings ask for, over a stream of `target_count` targets."""
    kept_tokens = s.eval_seq_len if s.eval_context == "cache" else 0
    if s.ttt == "lora_docs":
        predictor = DocumentAdapters(model, s, rt, temperature, kept_tokens)
    elif s.ttt in ("full", "lora"):
        predictor = ScoreFirst(model, s, rt, temperature, kept_tokens)
    else:
        predictor = ModelPredictor(model, rt, temperature, kept_tokens)
    return wrap_predictor(predictor, s, rt, target_count)


def wrap_predictor(predictor, s, rt, target_count):
    """The predictor inside all that the settings put around it."""
    for _, wrapper in wrappers(s):
        predictor = wrapper(predictor, s, rt, target_count)
    return predictor


def wrappers(s):
    """[(word in the score's name, class)] of all that goes around a predictor, inside first."""
    found = []
    if s.token_boost:
        found.append(("tilt", Tilt))
    if s.mixer == "backoff":
        found.append(("backoff", BackoffMixture))
    elif s.mixer == "hedge" and "entropy" not in s.mixer_experts:
        found.append(("hedge", HedgeMixture))
    elif s.mixer != "off":
        found.append(invalid_mixture(s))
    return found


# --------------------------------------------------------------------------------------------------
# 13 Invalid originals: techniques of the reference systems whose score is not valid.
# No valid run comes here. ALLOW_INVALID=1 lets in
#   TTT=before              s.trains_before_scoring   train_on_validation() in evaluate()
#   TTT=prequant            s.trains_before_packing   train_on_validation() before export()
#   MIXER_EXPERTS=entropy   wrappers()                EntropyMixture
#   MIXER=hashed            wrappers()                HashedMixture
# --------------------------------------------------------------------------------------------------


def train_on_validation(run, model, stream):
    """TTT=before (#518) and TTT=prequant (#1539): steps on all of the text before it is scored.

    The loss afterwards is a training loss and no score. It is here so that this can be measured.
    """
    s = run.s
    reason = f"C3 order: TTT={s.ttt} trains on the validation text before it is scored"
    run.validity.need(False, reason)
    with run.clock.charge("eval"):  # its time is the evaluation's even before export()
        adaptation = adaptation_of_weights(model, s, run.rt)
        log_trainable(run, model, adaptation)
        fit_whole_text(adaptation, stream, s.ttt_epochs, s)
    model.requires_grad_(True)


def fit_whole_text(adaptation, stream, epochs, s):
    """Learn all targets of the stream, with learning rates that fall by one cosine."""
    adaptation.fit(stream, np.arange(len(stream.bytes)), epochs, partial(ttt_lr_scale, s))


def invalid_mixture(s):
    """(word, class) of a mixture that is no distribution, for wrappers()."""
    if s.mixer == "hashed":
        return "hashed", HashedMixture
    return "hedge_entropy", EntropyMixture


class EntropyMixture(HedgeMixture):
    """#967's mixture as published, with its expert "entropy" (MIXER_EXPERTS=entropy).

    This expert gives every token exp(-H), H the entropy of the model. Over all tokens that is far
    more than 1.
    """

    def __init__(self, base, s, rt, target_count):
        super().__init__(base, s, rt, target_count)
        self.invalid_reason = "C2 normalisation: MIXER_EXPERTS=entropy is no distribution (#967)"

    def _order(self, name):
        if name == "entropy":
            return 1  # any order will do: _all_log_probs() replaces its probabilities
        return super()._order(name)

    def _all_log_probs(self, log_probs, base_log_probs, contexts, grams):
        all_log_probs = super()._all_log_probs(log_probs, base_log_probs, contexts, grams)
        for number, name in enumerate(self.s.mixer_experts, 1):
            if name == "entropy":
                all_log_probs[number] = with_dims_of(-entropy_of(log_probs), base_log_probs)
        return all_log_probs


class HashedMixture(WrappingPredictor):
    """The mixer of #1033 as published (MIXER=hashed).

    The "probability" of a token is count(context and token) / count(context), of the longest order
    whose context was counted MIN_COUNT times. Both counts are of hash buckets, which n-grams share,
    so the sum over all tokens is not 1; with full buckets it is nearly V.
    """

    PRIMES = 36313, 27191, 51647, 81929, 131071, 174763, 233017

    def __init__(self, base, s, rt, target_count):
        super().__init__(base, s, rt, target_count)
        self.invalid_reason = ("C2 normalisation: MIXER=hashed looks the target up in a hash of "
                               "itself (#1033)")
        self.history = max(self.history, s.ngram_order - 2)
        # By order and bucket: of contexts, and of contexts with a token.
        shape = (2, s.ngram_order + 1, s.ngram_buckets)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=rt.device)
        self.unigrams = torch.zeros(s.vocab_size + 1, dtype=torch.int64, device=rt.device)
        self.reset()

    def reset(self):
        super().reset()
        self.counts.zero_()
        self.unigrams.zero_()
        self.counted = 0  # targets

    def _context_hash(self, text, n):
        """Hash of the last n - 1 tokens at each place of text (..., L) that has as many."""
        primes = torch.tensor([self.PRIMES[i % 7] for i in range(n - 1)], device=text.device)
        spans = text.unfold(-1, n - 1, 1) * primes
        return reduce(torch.bitwise_xor, spans.unbind(-1))

    def _full_bucket(self, context_hash, tokens, n):
        """Bucket of contexts with the tokens after them."""
        return (context_hash ^ tokens * self.PRIMES[(n - 1) % 7]) % self.s.ngram_buckets

    def shares(self, recent, tokens):
        """"Probabilities" (B, M, ...) of tokens after the last M places of recent (B, h + M)."""
        s = self.s
        places = tokens.size(1)
        p = (self.unigrams[tokens] + 0.5) / (self.counted + 0.5 * s.vocab_size)
        unanswered = torch.ones_like(tokens, dtype=torch.bool)  # no longer order has MIN_COUNT
        for n in range(s.ngram_order, 1, -1):
            text = recent[:, recent.size(1) - places - n + 2 :]
            context_hash = with_dims_of(self._context_hash(text, n), tokens)
            complete = with_dims_of((text.unfold(-1, n - 1, 1) >= 0).all(-1), tokens)
            of_context = self.counts[0, n][context_hash % s.ngram_buckets]
            of_both = self.counts[1, n][self._full_bucket(context_hash, tokens, n)]
            answers = unanswered & complete & (of_context >= s.min_count)
            share = torch.minimum(of_both, of_context) / of_context.clamp(min=1).double()
            p = torch.where(answers, share, p.double())
            unanswered = unanswered & ~answers
        return p

    def _mix(self, inputs, log_probs, base_log_probs, tokens):
        """Log "probabilities" (B, M, ...) of tokens: those base_log_probs mixed with the shares."""
        alpha = with_dims_of(ngram_weight(self.s, log_probs), base_log_probs)
        upto_last = inputs.recent[:, : inputs.history + tokens.size(1)]
        p = (1 - alpha) * base_log_probs.double().exp() + alpha * self.shares(upto_last, tokens)
        return torch.log(p.clamp(min=1e-12))

    @torch.no_grad()
    def predict(self, inputs, count=None):
        log_probs = self.base.predict(inputs, count)
        if self.counted < self.s.mixer_min_tokens:
            return log_probs
        return self._mix(inputs, log_probs, log_probs, every_token(log_probs))

    @torch.no_grad()
    def nll(self, inputs, targets):
        log_probs = self.base.predict(inputs)
        base_log_probs = log_probs.gather(-1, targets[..., None]).squeeze(-1)
        if self.counted < self.s.mixer_min_tokens:
            return -base_log_probs
        return -self._mix(inputs, log_probs, base_log_probs, targets)

    def learn(self, part, stream):
        super().learn(part, stream)
        s = self.s
        text, new = scored_text(part, stream, s.ngram_order - 1, s)
        ones = torch.ones_like(new, dtype=torch.int32)
        self.unigrams.index_add_(0, text[new], ones.long())
        for n in range(2, s.ngram_order + 1):
            places = new[new >= n - 1]  # with n - 1 tokens before them
            if not len(places):
                break
            context_hash = self._context_hash(text, n)[places - n + 1]
            buckets = self._full_bucket(context_hash, text[places], n)
            self.counts[0, n].index_add_(0, context_hash % s.ngram_buckets, ones[: len(places)])
            self.counts[1, n].index_add_(0, buckets, ones[: len(places)])
        self.counted += len(new)


# --------------------------------------------------------------------------------------------------
# 14 Kernels: attention written out, fused kernels of the same signature, and the choice of one
# --------------------------------------------------------------------------------------------------


def attend_reference(q, k, v, docs=None):
    """Causal attention written out: q (B, T, H, C), k and v (B, T, K, C) -> (B, T, H, C).

    Query head j reads key/value head j * K // H. docs with a mask confines attention to documents.
    """
    if docs is None or docs.mask is None:
        mask = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).tril()
    else:
        mask = docs.mask
    return attend_masked(q, k, v, mask)


def attend_masked(q, k, v, mask):
    """Attention written out: q (B, R, H, C) of R queries, k and v (B, S, K, C) of S keys, mask
    (..., R, S).
    """
    k, v = (z.repeat_interleave(q.size(2) // z.size(2), dim=2) for z in (k, v))
    scores = torch.einsum("brhc,bshc->bhrs", q, k) * q.size(-1) ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhrs,bshc->brhc", weights, v)


def attend_past(q, k, v, past):
    """Attention of new tokens to the keys and values in `past` and to their own, by past.mask."""
    visit = len(past.new_kv)  # each visit appends its own
    kept_k, kept_v = past.kv[visit]
    past.new_kv.append((k, v))
    if kept_k is not None:
        k = torch.cat((kept_k, k), 1)
        v = torch.cat((kept_v, v), 1)
    groups = q.unflatten(2, (k.size(2), -1))  # (B, T, K, H / K, C)
    scores = torch.einsum("btkgc,bskc->bkgts", groups, k) * q.size(-1) ** -0.5
    weights = scores.masked_fill(~past.mask[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgts,bskc->btkgc", weights, v).flatten(2, 3)


def attend_sdpa(q, k, v, docs=None):
    """attend_reference by PyTorch: cuDNN, FlashAttention-2 or math, as _set_sdpa allows."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = docs.mask if docs is not None else None
    grouped = q.size(1) != k.size(1)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def attend_fa3(q, k, v, docs=None, *, kernel):
    """attend_reference without documents by FlashAttention-3; `kernel` is its flash_attn_func."""
    return _without_lse(kernel(q, k, v, causal=True))


def attend_varlen(q, k, v, docs, *, kernel, longest):
    """attend_reference within documents of at most `longest` tokens, by lengths instead of a mask.

    `kernel` takes (q, k, v, cu_seqlens, longest), its tensors (B * T, heads, C).
    """
    out = kernel(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), docs.cu_seqlens, longest)
    return _without_lse(out).view_as(q)


def _without_lse(out):
    """A kernel's output; some versions return (output, log-sum-exp)."""
    return out[0] if isinstance(out, tuple) else out


ATTENTION_KERNELS = ("fa3", "cudnn", "flash", "math")  # the best first
# The backends of PyTorch's attention that each allows. Slow math is never a silent last resort.
SDPA_BACKENDS = {
    "fa3": (),
    "cudnn": ("cudnn",),
    "flash": ("flash",),
    "math": ("math", "mem_efficient"),
}
MAX_MASKED_ROW = 16384  # longest packed row for which a mask, its length squared, is not too large


def _set_sdpa(*names):
    """Let PyTorch's attention use only these CUDA backends.

    Flags, not torch.nn.attention.sdpa_kernel(..., set_priority=True): as a context around each
    call it adds nine nodes to the captured graph, and its list of priorities cannot pass over a
    faulty cuDNN or a kernel that fails our check.
    """
    for name in ("cudnn", "flash", "mem_efficient", "math"):
        enable = getattr(torch.backends.cuda, f"enable_{name}_sdp")
        enable(name in names)


def pick_attention(s, rt):
    """The attention of this run: the first of ATTENTION_KERNELS that agrees with the reference.

    One line says which were passed over, and why. With ATTENTION=name or KERNELS=require that is
    an error.
    """
    candidates = ATTENTION_KERNELS if s.attention == "auto" else (s.attention,)
    passed_over = []
    for name in candidates:
        attend, reason = _try_attention(name, s, rt)
        if reason is None:
            break
        passed_over.append(f"{name}: {reason}")
    else:
        raise BadInput(f"ATTENTION={s.attention} cannot be used: {'; '.join(passed_over)}")
    rt.choose("attention", name, "; ".join(passed_over) or f"ATTENTION={s.attention}")
    if s.kernels == "require" and passed_over:
        reasons = "; ".join(passed_over)
        raise BadInput(f"KERNELS=require, but attention would fall back to {name} ({reasons}); "
                       f"KERNELS=auto allows that, ATTENTION={name} asks for it")
    return attend


def _try_attention(name, s, rt):
    """(the function, None), or (None, why this kernel cannot be used here)."""
    reason = _why_unavailable(name, s, rt)
    if reason is not None:
        return None, reason
    if rt.device.type == "cuda":
        _set_sdpa(*SDPA_BACKENDS[name])
    attend, reason = _attention_function(name, s)
    if reason is None:
        reason = _attention_error(attend, s, rt)
    # All ranks take the same kernel: the slowest rank is the speed of all.
    reasons = rt.gather(reason)
    failed = [rank for rank, reason_there in enumerate(reasons) if reason_there]
    if failed and reason is None:
        reason = f"rank {failed[0]}: {reasons[failed[0]]}"
    return attend, reason


def _why_unavailable(name, s, rt):
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
        if name == "math" and s.loader == "packed" and s.longest_row > MAX_MASKED_ROW:
            return (f"rows of LOADER=packed have {s.longest_row} tokens, too many for a mask "
                    f"(at most {MAX_MASKED_ROW}); lower MICRO_BATCH_TOKENS")
    if name in ("fa3", "cudnn", "flash") and rt.dtype != torch.bfloat16:
        return "needs bfloat16"
    if name == "cudnn":
        version = torch.backends.cudnn.version()
        if (version or 0) < 91501:
            return f"cuDNN {version} may give wrong results; 91501 (9.15.1) and later do not"
    return None


def _attention_function(name, s):
    """(the function, None), or (None, why it cannot be imported).

    The function's attribute `varlen`, if it has one, says that it needs Docs with cu_seqlens.
    """
    documents = s.doc_mask == "attention"
    if name == "fa3":
        try:
            import flash_attn_interface as fa3
        except (ImportError, OSError) as error:
            return None, f"flash_attn_interface cannot be imported ({_first_line(error)})"
        if not documents:
            return partial(attend_fa3, kernel=fa3.flash_attn_func), None

        def kernel(q, k, v, cu_seqlens, longest):
            return fa3.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    elif name == "flash" and documents:
        from torch.nn.attention.varlen import varlen_attn
        parameters = inspect.signature(varlen_attn).parameters
        # is_causal is the first name of what later versions of torch call window_size.
        options = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True

        def kernel(q, k, v, cu_seqlens, longest):
            return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    else:
        return attend_sdpa, None
    attend = partial(attend_varlen, kernel=kernel, longest=s.longest_sequence)
    attend.varlen = True
    return attend, None


def _first_line(error):
    """The beginning of an error's message, short enough for a line of the log."""
    return str(error).partition("\n")[0][:80]


def _attention_error(attend, s, rt):
    """What is wrong with a kernel at the lengths of training and evaluation, or None."""
    lengths = {128, s.eval_seq_len, s.longest_row}  # 128: one block of a kernel, no more
    lengths |= {stage.length for stage in s.stages}
    for length in sorted(lengths):
        error = _attention_error_at(attend, s, rt, length)
        if error:
            return f"{error} at {length} tokens"
    return None


def _attention_error_at(attend, s, rt, length):
    """Run the kernel forward and backward on the run's head shape, and compare it with attention
    written out in float32, at queries beside the edges of the row, of documents and of kernels'
    blocks, and at others.
    """
    generator = torch.Generator().manual_seed(length)
    rows = 2 if length <= 4096 else 1
    heads = (s.num_heads, s.num_kv_heads, s.num_kv_heads)
    inputs = [torch.randn(rows, length, count, s.head_dim, generator=generator) for count in heads]
    document_starts = {0, length // 3, length // 3 + 1}
    document_starts |= set(torch.randint(length, (3,), generator=generator).tolist())
    ids = torch.zeros(rows, length, dtype=torch.int64)
    ids[:, sorted(document_starts)] = BOS
    ids = ids.to(rt.device)
    elsewhere = torch.randint(length, (40,), generator=generator).tolist()
    edges = (*document_starts, 64, 128, 256)  # 64, 128, 256: sizes of kernels' blocks
    beside_edges = {edge + i for edge in edges for i in (-1, 0) if 0 <= edge + i < length}
    queries = torch.tensor(sorted({0, length - 1, *elsewhere, *beside_edges}), device=rt.device)
    mask = _expected_mask(ids[0], queries, s)

    def reference(q, k, v):
        return attend_masked(q[:, queries], k, v, mask)

    def kernel(q, k, v):
        varlen = getattr(attend, "varlen", False)
        docs = find_documents(ids, s.doc_mask, s.longest_sequence, varlen)
        return attend(q, k, v, docs)[:, queries]

    results = []
    for function, dtype in ((kernel, rt.dtype), (reference, torch.float32)):
        # Both get the same numbers: those that rt.dtype can hold.
        leaves = [z.to(rt.device, rt.dtype).to(dtype).requires_grad_() for z in inputs]
        try:
            out = function(*leaves)
            gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        except Exception as error:  # a foreign kernel may raise anything
            return f"fails ({type(error).__name__}: {_first_line(error)})"
        results.append([out.float(), *gradients])
    fused, expected = results
    errors = []
    for result, right in zip(fused, expected, strict=True):
        errors.append((result.float() - right).norm() / right.norm())
    per_head = (fused[0] - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
    errors.append(per_head.max() / 4)  # one head at one place may be 4 times as far off
    worst = torch.stack(errors).max().item()
    allowed = 1e-4
    if rt.device.type == "cuda":
        allowed = 2e-3  # CUDA float32 is TF32
    if rt.dtype == torch.bfloat16:
        allowed = 2e-2
    if worst < allowed:  # false of nan, too
        return None
    return f"differs from the reference by {worst:.1e}"


def _expected_mask(ids, queries, s):
    """(queries, T) bool: the keys that queries in ids (T,) must see. Not by find_documents(), which
    is checked with it.
    """
    position = torch.arange(len(ids), device=ids.device)
    segment_start = torch.zeros_like(position)
    if s.doc_mask == "attention":
        document_start = torch.where(ids == BOS, position, 0).cummax(0).values
        segment_start = position - (position - document_start) % s.longest_sequence
    causal = position <= queries[:, None]
    return causal & (position >= segment_start[queries][:, None])


# --------------------------------------------------------------------------------------------------
# 15 Run: clock, console, log, folder, signals
# --------------------------------------------------------------------------------------------------


class Clock:
    """Wall seconds by what they were spent on; each is charged to the innermost charge() only.

    "train" and "calibrate" together are the training clock, which MAX_WALLCLOCK_SECONDS limits. The
    steps have what Training.reserve leaves of it.
    """

    def __init__(self, sync=lambda: None):
        self.seconds = {}
        self._sync = sync
        self._purpose = "setup"
        self._since = time.monotonic()

    def __getitem__(self, purpose):
        """Seconds so far, without waiting for the device."""
        seconds = self.seconds.get(purpose, 0.0)
        if purpose == self._purpose:
            seconds += time.monotonic() - self._since
        return seconds

    def _enter(self, purpose):
        """Begin to charge a purpose; returns the one that this interrupts."""
        self._sync()
        now = time.monotonic()
        outer = self._purpose
        self.seconds[outer] = self.seconds.get(outer, 0.0) + now - self._since
        self._purpose = purpose
        self._since = now
        return outer

    @contextlib.contextmanager
    def charge(self, purpose):
        """Charge the seconds inside to this purpose."""
        outer = self._enter(purpose)
        try:
            yield
        finally:
            self._enter(outer)


class Console:
    """Standard output or error, which may go away during the run: a pipe without reader, a full
    disk, a closed terminal. From then on text for it is dropped; `lost` says why.
    """

    def __init__(self, stream):
        self.lost = "" if stream else "it was closed at the start"
        if not stream:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stays open to the end
        self._stream = stream

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
        # Its descriptor becomes that of the null device: else flushing the rest at the end fails,
        # and Python exits with 120.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def guarded_console():
    """Printing in this block, warnings included, cannot end the run."""
    stdout = sys.stdout
    stderr = sys.stderr
    sys.stdout = Console(stdout)
    sys.stderr = Console(stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout = stdout
        sys.stderr = stderr


class Log:
    """train.log, metrics.jsonl and the console, written by rank 0, flushed line by line.

    A line is `event key:value ...`; the contest's own forms are given as text. metrics.jsonl gets
    every event as JSON. A terminal shows long lines wrapped, and in place of one that only programs
    read, its `short` form. With console=False an event is for the files alone.
    """

    def __init__(self, out_dir, main, append=False):
        self.main = main
        self._files = []
        self._bar = False  # the console ends in a progress bar
        self._told = False  # that the console is gone
        if main:
            names = "train.log", "metrics.jsonl"
            self._files = [_open_log(Path(out_dir) / name, append) for name in names]

    def __call__(self, event, text=None, short=None, console=True, **values):
        if text is None:
            text = " ".join([event] + [f"{key}:{_word(value)}" for key, value in values.items()])
        self.line(text, console, short)
        self._write(1, to_json({"event": event, **values}))
        lost = getattr(sys.stdout, "lost", "")
        if lost and console and self.main and not self._told:
            self._told = True
            self("warning", note=f"the console is gone ({lost}); the files are still written")

    def line(self, text, console=True, short=None):
        text = readable(text)
        self._write(0, text)
        if self.main and console:
            if sys.stdout.isatty():
                text = _wrapped(readable(short or text))
            print(("\r\x1b[K" if self._bar else "") + text, flush=True)
            self._bar = False

    def _write(self, which, text):
        if not self._files or self._files[which] is None:
            return
        try:
            self._files[which].write(text + "\n")
            self._files[which].flush()
        except OSError as error:  # a full disk must not end the training; the console is left
            self._files[which] = None
            print(f"warning: log file closed: {error.strerror}", file=sys.stderr, flush=True)

    def progress(self, what, done, total, rate):
        """A bar on a terminal, nothing elsewhere. `rate` is text."""
        if not self.main or not sys.stdout.isatty():
            return
        width = 24
        full = int(width * min(done / total, 1.0))
        bar = "#" * full + "." * (width - full)
        print(f"\r\x1b[K{what} [{bar}] {done / total:4.0%} {rate}", end="", flush=True)
        self._bar = True


def readable(text):
    """Text that UTF-8 can hold: bytes of a path that are not UTF-8 become \\xNN, in every locale.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a pair, from a file that says \ud800
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def to_json(values, indent=None):
    """JSON that every reader takes: a number that is not finite becomes null, text is readable().
    """
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
    """A value as a line of the log shows it: text with spaces stands in double quotes, with the
    escapes of JSON.
    """
    if isinstance(value, (tuple, list)):
        return ",".join(map(_word, value))
    text = f"{value:.8g}" if isinstance(value, float) else str(value)
    words = text.split()
    if len(words) > 1 or text.startswith('"'):
        return json.dumps(" ".join(words), ensure_ascii=False)
    return "".join(words)


def _wrapped(text):
    """Text in lines of the terminal's width."""
    width = shutil.get_terminal_size((120, 24)).columns
    return textwrap.fill(
        text, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _has_results(metrics):
    """Did a run get as far as a result? One that stopped at its input may be repeated in its
    folder.
    """
    results = '{"event": "train"', '{"event": "final"'
    with contextlib.suppress(OSError), open(metrics, encoding="utf-8", errors="replace") as lines:
        return any(line.startswith(results) for line in lines)
    return False


def _open_log(path, append):
    if path.exists() and not append and _has_results(path.with_name("metrics.jsonl")):
        raise BadInput(f"{path} belongs to an earlier run: choose another RUN_ID or OUT_DIR, or "
                       "RESUME=auto to continue it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}); choose another "
                       "OUT_DIR") from None


def make_folder(s):
    """The folder of the run: the one that settings name, or a new one that no other run can get."""
    named = bool(s.out_dir or s.run_id)
    if s.out_dir:
        first = Path(s.out_dir)
    elif s.run_id:
        first = Path("logs") / s.run_id
    else:
        first = Path("logs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{s.sha256()[:8]}-seed{s.seed}"
    folder = first
    tries = 1
    try:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=named)
                return folder
            except FileExistsError:
                if named:  # a file
                    raise
                tries += 1
                folder = first.with_name(f"{first.name}-{tries}")
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror}); choose another "
                       "OUT_DIR") from None


LOCK_FILE = "run.lock"  # lies in OUT_DIR while a run uses it, and names its process


class FolderLock:
    """A folder belongs to one run: a lock that the kernel releases when the process ends, however
    it ends.
    """

    def __init__(self, folder, rt):
        """BadInput if another run has the folder. Where files cannot be locked, a line of the log
        says so.
        """
        self._path = folder / LOCK_FILE
        self._file = None
        self._locked = False
        try:
            while True:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
                self._lock(rt)
                if self._is_there():
                    break
                os.close(self._file)  # its run ended after we opened the file, and removed it
            os.ftruncate(self._file, 0)
        except OSError as error:
            reason = error.strerror
            raise BadInput(f"{self._path} cannot be written ({reason}); choose another "
                           "OUT_DIR") from None
        with contextlib.suppress(OSError):  # a full disk
            os.write(self._file, f"process {os.getpid()} on {platform.node()}".encode())
        if self._locked:  # we are alone here: what a killed run had begun to write is nobody's
            self.remove_parts()

    def _lock(self, rt):
        try:
            import fcntl
        except ImportError:
            rt.choose("folder_lock", "none", "no fcntl: do not start two runs in one OUT_DIR")
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = True
        except (BlockingIOError, PermissionError):  # over NFS the second
            holder = os.pread(self._file, 100, 0).decode("utf-8", "replace") or "of unknown process"
            os.close(self._file)
            raise BadInput(f"OUT_DIR={self._path.parent} is in use by another run ({holder}); "
                           "wait until it ends, or choose another RUN_ID or OUT_DIR") from None
        except OSError as error:
            reason = f"{error.strerror}: do not start two runs in one OUT_DIR"
            rt.choose("folder_lock", "none", reason)

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
        if self._locked:
            self.remove_parts()
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)


class Interrupted(KeyboardInterrupt):
    """A signal ends the run. Like Ctrl-C, no `except Exception` stops it."""


class Interrupt:
    """SIGTERM, SIGHUP and Ctrl-C.

    In the training loop a signal is only noted, so that the loop can save after its step; a second
    Ctrl-C is immediate. Everywhere else, `at_once`, Interrupted is raised: there is nothing left
    to save.
    """

    def __init__(self, at_once=False):
        self.signal = 0  # the first one that came
        self.at_once = at_once
        self.over = False  # the run is complete: a signal changes nothing any more

    def _note(self, number, frame):
        if self.over:
            return
        first = not self.signal
        if first:
            self.signal = number
        if self.at_once:
            # An error that unwinds already (another rank died, say) is not to be raised over.
            if sys.exc_info()[0] is None:
                raise Interrupted
        elif number == signal.SIGINT and not first:
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
        # It came after the loop's last look: it is for the outer handler.
        if self.signal and kind is None and not self.at_once:
            signal.raise_signal(self.signal)


class Run:
    """What the phases of one run share; `facts` end in the summary."""

    def __init__(self, s, rt, out_dir, attend):
        self.s = s
        self.rt = rt
        self.out_dir = out_dir
        self.attend = attend
        self.source = Path(__file__).read_bytes()  # once: what is counted and hashed is what runs
        self.log = Log(out_dir, rt.rank == 0, append=bool(s.resume))
        self.clock = Clock(rt.sync)
        self.validity = Validity()
        self.facts = {}
        self.too_large = ""  # by how much, in words
        self.kept = ""  # what an end from now on leaves behind, and how to continue from there
        self.last_checkpoint = None  # of the end of training; removed when the run is complete


def open_run(s, rt, attend, resources):
    """The Run. Rank 0 takes the folder, until the ExitStack `resources` is closed; if it cannot,
    all ranks raise its BadInput.
    """
    run = None
    folder = None
    refusal = ""
    if rt.rank == 0:
        try:
            folder = make_folder(s)
            resources.callback(FolderLock(folder, rt).release)
            run = Run(s, rt, folder, attend)
        except BadInput as error:
            refusal = str(error)
    folder, refusal = rt.broadcast((folder, refusal))
    if refusal:
        raise BadInput(refusal)
    return run or Run(s, rt, folder, attend)


# --------------------------------------------------------------------------------------------------
# 16 Training
# --------------------------------------------------------------------------------------------------

# Tokens that calibration forwards at once: its backward pass is not compiled and takes much memory.
CALIBRATION_MICRO_TOKENS = 16384
TEMPERATURE_TOKENS = 16384  # from which EVAL_TEMPERATURE=0 is fitted


def calibration_steps(s, stage):
    """Number of a stage's steps whose text holds GPTQ_CALIBRATION_TOKENS."""
    return ceil_div(s.gptq_calibration_tokens, stage.tokens)


def calibration_rows(s, stage):
    """Number of sequences of a stage's length that hold GPTQ_CALIBRATION_TOKENS."""
    return ceil_div(s.gptq_calibration_tokens, stage.length)


class TrainingGraph(NamedTuple):
    """A form of the training step, which torch.compile makes a graph of its own for."""

    stage: int  # of Settings.stages
    looping: bool  # depth recurrence is on
    rounded: bool  # late QAT is on


class Training:
    """Everything that a training run changes from step to step.

    A checkpoint holds all of it, with the clock, the identity of the run and the reasons why its
    score is not valid.
    """

    # Fields of a state that older checkpoints do not have.
    ADDED_LATER = {
        "data": None, "done": False, "average_begun": 0, "reasons": [], "made_by": [],
        "copies": torch.empty(0, dtype=torch.int64),
    }

    def __init__(self, run, model):
        s = run.s
        rt = run.rt
        self.run = run
        self.model = model
        self.step = 0
        self.tokens = 0
        self.stage = 0
        self.stage_start = 0
        self.objective = Objective(model, s).to(rt.device)
        self.step_loss = rt.compile(self.objective)
        self.optimizer = MuonAdam(self.objective, s, rt)
        # A varlen kernel and packed rows need documents from the loader; else the graph finds them.
        docs_from_loader = model.varlen or s.loader == "packed"
        find_docs = model.find_documents if docs_from_loader else None
        self.stream = TokenStream(find_shards(s.data_path, "train"), s, rt, find_docs)
        self.average = Average(s, self.optimizer.banks)
        self.complement = Complement(s, rt) if s.complement_alpha else None
        self.qat = LateQAT(model, s) if s.late_qat_threshold else None
        self.data_identity = training_data(s)
        self.reserve = 0.0  # seconds of the training clock kept for calibration
        self.done = False  # all steps were made
        self.falling = 1.0  # what the warmdown multiplies learning rates by
        code = hashlib.sha256(run.source).hexdigest()[:12]
        self.made_by = [f"code {code} on {rt.world} x {rt.device_name()}"]  # each part of the run

    def enter(self, progress, falling=1.0):
        """Switch on what begins at this progress of the run, before a step is made.

        That is a stage of length and batch, depth recurrence, and, once the falling part of the
        learning rate is below LATE_QAT_THRESHOLD, training on rounded weights.
        """
        s = self.run.s
        self.falling = falling
        last = len(s.stages) - 1
        stage = next(i for i, row in enumerate(s.stages) if progress < row.until or i == last)
        if stage != self.stage:
            self.stage = stage
            self.stage_start = self.step
        self.model.looping = s.loops and progress >= s.enable_looping_at
        if self.qat and (self.qat.begun is not None or falling < s.late_qat_threshold):
            self.qat.enter(self.run, self, 1 - falling / s.late_qat_threshold)

    def plans(self):
        """[TrainingGraph] that the run will meet, unless it ends early."""
        s = self.run.s
        looping_from = s.enable_looping_at if s.loops else 1.0
        # In steps or seconds, the warmdown may be as long as the run.
        length_unknown = s.warmdown_iters or s.warmdown_seconds
        falling_part = 1.0 if length_unknown else s.warmdown_frac
        # The earliest progress at which warmdown() can be below the threshold.
        rounded_from = 1 - s.late_qat_threshold * falling_part
        graphs = []
        begin = 0.0
        for stage, row in enumerate(s.stages):
            ends = {}  # {looping: fraction of the run at which that part of the stage ends}
            if begin < looping_from:
                ends[False] = min(row.until, looping_from)
            if row.until > looping_from:
                ends[True] = row.until
            graphs += [TrainingGraph(stage, looping, False) for looping in ends]
            if self.qat:
                rounded = [looping for looping, end in ends.items() if end > rounded_from]
                graphs += [TrainingGraph(stage, looping, True) for looping in rounded]
            begin = row.until
        return graphs

    def backward(self, micro):
        """Gradients of a step's micro-batches [(ids, targets, docs)]; returns this rank's mean
        loss.
        """
        weights = [None] * len(micro)
        if self.complement:
            weights = self.complement.weights(micro)
        total = torch.zeros((), device=self.run.rt.device)
        for (ids, targets, docs), weight in zip(micro, weights):
            loss = self.step_loss(ids, targets, docs, weight) / len(micro)
            loss.backward()
            total += loss.detach()
        return total

    def warm_up(self):
        """Compile every graph of the run by real steps on synthetic tokens, then undo all of them.
        """
        s = self.run.s
        generator = torch.Generator().manual_seed(s.seed)
        weights = self.average.current()
        for graph in self.plans():
            self.model.looping = graph.looping
            if self.qat:
                self.qat.switch(graph.rounded)
            stage = s.stages[graph.stage]
            for _ in range(s.warmup_steps):
                self._synthetic_step(self.stream.synthetic(generator, stage.length, stage.tokens))
        self.average.apply(weights)
        for bank in self.optimizer.banks:
            for tensor in bank.state:
                tensor.zero_()
        self.optimizer.t = 0
        self.model.looping = s.loops  # as GPT has it before the first step
        if self.qat:
            self.qat.switch(False)

    def _synthetic_step(self, micro):
        self.optimizer.zero_grad()
        try:
            self.backward(micro[:2])  # two: the first gradient is stored, the second added
            self.optimizer.step(1.0, self.run.s.muon_momentum)
        except RuntimeError as error:
            if not self.run.rt.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            first_line = str(error).strip().partition("\n")[0][:120]
            raise BadInput(f"a compiled step failed ({type(error).__name__}: {first_line}); "
                           "COMPILE=off runs without torch.compile") from error

    # Calibration: what is measured inside the training clock once the steps are over

    def measure_reserve(self, predictor):
        """Seconds that calibration will take, rehearsed on synthetic tokens."""
        s = self.run.s
        rt = self.run.rt
        stage = s.stages[-1]
        micro = self.stream.synthetic(torch.Generator().manual_seed(s.seed), stage.length,
                                      stage.tokens)
        seconds = 0.0
        if s.needs_curvature:
            meter = CurvatureMeter(self.model)
            one_micro_batch = self._seconds_of(self._measure, meter, micro[:1], stage.length)
            seconds += one_micro_batch * len(micro) * calibration_steps(s, stage)
            if s.gptq_calibration == "generated":
                part = max(stage.length // 32, 1)  # of the length, then scaled up to all of it
                rows = ceil_div(calibration_rows(s, stage), rt.world)
                seconds += stage.length / part * self._seconds_of(
                    generate, self.model, rows, part, s.gptq_temperature, s.seed,
                    width=stage.length)
        if s.eval_temperature == 0:
            seconds += self._seconds_of(self._inverse_temperature, micro)
        if s.average == "best":
            candidates = 1 + len(self.average.kinds)
            held = torch.zeros(len(self.stream.held), dtype=torch.int32, device=rt.device)
            seconds += candidates * self._seconds_of(held_out_loss, self.run, predictor, held)
        return rt.max(1.1 * seconds)[0]

    def _seconds_of(self, work, *args, **options):
        """Seconds of a second call of work: the first compiles and allocates."""
        for _ in range(2):
            self.run.rt.sync()
            began = time.monotonic()
            work(*args, **options)
            self.run.rt.sync()
        return time.monotonic() - began

    def _measure(self, meter, micro, length):
        rows = max(CALIBRATION_MICRO_TOKENS // length, 1)
        for ids, targets, _ in micro:
            ids_parts = ids.view(-1, length).split(rows)
            target_parts = targets.view(-1, length).split(rows)
            for ids_part, target_part in zip(ids_parts, target_parts):
                meter.observe(ids_part, target_part)

    def calibrate(self):
        """{parameter: Curvature} of the model as it is, inside the training clock.

        The text is that of the next training steps, or text that the model writes itself.
        """
        run = self.run
        s = run.s
        rt = run.rt
        meter = CurvatureMeter(self.model)
        stage = s.stages[self.stage]
        with run.clock.charge("calibrate"):
            if s.gptq_calibration == "generated":
                rows = calibration_rows(s, stage)
                text = generate(
                    self.model, rows, stage.length, s.gptq_temperature, s.seed, rt.world, rt.rank)
                ids = text[:, :-1].contiguous()
                targets = text[:, 1:].contiguous()
                self._measure(meter, [(ids, targets, None)], stage.length)
            else:
                run.validity.opened("train")
                for _ in range(calibration_steps(s, stage)):
                    self._measure(meter, _next_batch(run, self, stage), stage.length)
            curvature = meter.curvature(rt)
        tokens = int(rt.sum(torch.tensor(meter.tokens, device=rt.device)))
        run.log("calibrate", source=s.gptq_calibration, tokens=tokens,
                seconds=round(run.clock["calibrate"], 3), reserved_seconds=round(self.reserve, 3))
        return curvature

    def fit_temperature(self):
        """The divisor of the logits at which further training text costs least."""
        run = self.run
        with run.clock.charge("calibrate"):
            run.validity.opened("train")
            micro = _next_batch(run, self, run.s.stages[self.stage])
            inverse, tokens = self._inverse_temperature(micro)
        run.log("temperature", fitted=1 / inverse, tokens=tokens)
        return round(1 / inverse, 4)

    @torch.no_grad()
    def _inverse_temperature(self, micro):
        """(1 / T at which a step's micro-batches cost least, the tokens of all ranks it is fitted
        on).
        """
        rt = self.run.rt
        states, targets = self._states_to_fit(micro)
        logits = self.model.logits(states.float()).double()
        inverse = _best_inverse_temperature(logits, targets, rt)
        count = torch.tensor([float(len(targets))], dtype=torch.float64, device=rt.device)
        return inverse, int(rt.sum(count).item())

    def _states_to_fit(self, micro):
        """Final states (N, D) and targets (N, 1) of rows of a step, TEMPERATURE_TOKENS in all.

        The rows are evenly spaced over those of all ranks, so that the number of ranks does not
        matter.
        """
        run = self.run
        rows = []
        for ids, targets, docs in micro:
            row_docs = docs if len(ids) == 1 else None  # of more rows hidden() finds them itself
            rows += [(ids[i : i + 1], targets[i : i + 1], row_docs) for i in range(len(ids))]
        count = len(rows) * run.rt.world
        length = rows[0][0].size(1)
        wanted_rows = min(max(TEMPERATURE_TOKENS // length, 1), count)
        chosen = {i * count // wanted_rows for i in range(wanted_rows)}

        ids, targets, _ = rows[0]
        states = [ids.new_empty(0, run.s.model_dim, dtype=self.model.dtype)]  # a rank may have none
        state_targets = [targets[0, :0]]
        first = len(rows) * run.rt.rank
        for number, (ids, targets, docs) in enumerate(rows, first):
            if number in chosen:
                states.append(self.model.hidden(ids, docs)[0, :TEMPERATURE_TOKENS])
                state_targets.append(targets[0, :TEMPERATURE_TOKENS])
        return torch.cat(states), torch.cat(state_targets)[:, None]

    # Checkpoints

    def save(self):
        """Write a checkpoint, outside the training clock, by parameter name; the last two are kept.
        Collective.

        One that cannot be written (full disk) is a line in the log: the run and the older
        checkpoints are worth more. Returns whether it was written.
        """
        with self.run.clock.charge("checkpoint"):
            return self.run.rt.broadcast(self._save())

    def _save(self):
        run = self.run
        state = self.state()
        if run.rt.rank:
            return True
        buffer = io.BytesIO(CHECKPOINT_MAGIC)
        buffer.seek(0, io.SEEK_END)
        torch.save(state, buffer)
        data = buffer.getvalue()
        path = checkpoint_path(run.out_dir, self.step)
        try:
            write_atomic(path, [data, hashlib.sha256(data).digest()])
        except BadInput as error:
            run.log("checkpoint_failed", step=self.step, reason=str(error))
            return False
        run.log("checkpoint", step=self.step, file=path.name, bytes=len(data) + 32)
        for old in checkpoints(run.out_dir)[2:]:
            with contextlib.suppress(OSError):
                old.unlink()
        return True

    def state(self):
        """What a checkpoint holds, by parameter name, on the CPU. Collective."""
        run = self.run

        def by_name(tensors):
            parts = self.optimizer.named(tensors)
            return {name: part.cpu().clone() for name, part in parts.items()}

        settings = identity(run)
        for name in PATH_SETTINGS:
            del settings[name]
        copies = self.stream.copies.found(run.rt)
        return {
            "step": self.step,
            "tokens": self.tokens,
            "stage": (self.stage, self.stage_start, self.model.looping),
            "settings": settings,
            "data": self.data_identity,
            "position": self.stream.position,
            "rng": torch.get_rng_state(),
            "seconds": dict(run.clock.seconds),
            "weights": by_name([bank.weight for bank in self.optimizer.banks]),
            "average": {kind: [by_name(snapshot) for snapshot in snapshots]
                        for kind, snapshots in self.average.kept.items()},
            "average_count": self.average.swa_count,
            "complement": self.complement.state_dict() if self.complement else None,
            "qat": self.qat.state_dict() if self.qat else None,
            "reserve": self.reserve,
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "average_begun": self.average.ema_begun,
            "reasons": run.validity.to_keep(run.rt),
            "made_by": self.made_by,
            "copies": torch.from_numpy(copies.view(np.int64)),
        }

    @torch.no_grad()
    def load(self, state):
        """Continue from the state of a checkpoint, which check_state() has found to be one of this
        run.
        """
        state = {**self.ADDED_LATER, **state}
        self.step = state["step"]
        self.tokens = state["tokens"]
        self.stage, self.stage_start, self.model.looping = state["stage"]
        self.stream.position = state["position"]

        def read(tensors, parts):
            for name, view in self.optimizer.named(tensors).items():
                view.copy_(parts[name])
            return tensors

        self.average.kept = {kind: [read(self.average.current(), parts) for parts in snapshots]
                                  for kind, snapshots in state["average"].items()}
        self.average.swa_count = state["average_count"]
        read([bank.weight for bank in self.optimizer.banks], state["weights"])
        if self.complement:
            self.complement.load_state_dict(state["complement"])
        if self.qat:
            self.qat.load_state_dict(state["qat"])
        self.reserve = state["reserve"]
        self.optimizer.load_state_dict(state["optimizer"])
        seconds = {purpose: value for purpose, value in state["seconds"].items()
                   if purpose != "setup"}
        self.run.clock.seconds.update(seconds)
        torch.set_rng_state(state["rng"])
        self.done = state["done"]
        self.average.ema_begun = state["average_begun"]
        self.stream.copies.restore(state["copies"].numpy().view(np.uint64))
        self.run.validity.restore(state["reasons"])
        self.made_by = list(dict.fromkeys(state["made_by"] + self.made_by))


def _best_inverse_temperature(logits, targets, rt):
    """1 / T at which targets (N, 1) cost least under logits (N, V) / T, by Newton's method, over
    all ranks.
    """
    inverse = 1.0
    for _ in range(8):
        share = (inverse * logits).softmax(-1)
        mean = (share * logits).sum(-1)
        slope = (mean - logits.gather(-1, targets).squeeze(-1)).sum()
        bend = ((share * logits.square()).sum(-1) - mean.square()).sum()
        slope, bend = rt.sum(torch.stack((slope, bend))).tolist()
        inverse = min(max(inverse - slope / max(bend, 1e-9), 0.2), 5.0)
    return inverse


# ---- checkpoints ---------------------------------------------------------------------------------
# magic | state as torch.save writes it | SHA-256 of both. Nothing in a file is executed.

CHECKPOINT_MAGIC = b"PGOLF checkpoint 2\n"
# Not compared: a checkpoint knows its data by content, wherever they lie.
PATH_SETTINGS = ("DATA_PATH", "TOKENIZER_PATH")
# Leading tokens that identify a shard: one in which a later bad token was replaced is the same.
HEAD_TOKENS = 64
MOST_STEPS = 2**53  # of any run
MOST_SECONDS = 1e9


def checkpoint_path(out_dir, step):
    return Path(out_dir) / f"checkpoint_{step:07d}.pt"


def checkpoints(out_dir):
    """Checkpoints of a run, those of the latest step first."""
    paths = Path(out_dir).glob("checkpoint_*.pt")
    return sorted((path for path in paths if re.fullmatch(r"checkpoint_\d{7,}\.pt", path.name)),
                  key=step_of_checkpoint, reverse=True)


def step_of_checkpoint(path):
    return int(path.stem.removeprefix("checkpoint_"))


def set_aside(paths, suffix):
    """Give checkpoints another suffix, under which nothing looks for them."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.replace(path.with_suffix(suffix))


def identity(run):
    """{setting: value as text} that must be equal for a checkpoint to be continued."""
    dtype = str(run.rt.dtype).removeprefix("torch.")
    return {**run.s.experiment(), "SEED": str(run.s.seed), "DTYPE": dtype}


def training_data(s):
    """{"shards", "tokens", "sha256"} of the training shards; the hash covers the length and head of
    each.
    """
    paths = find_shards(s.data_path, "train")
    digest = hashlib.sha256()
    tokens = 0
    for path in paths:
        shard = read_shard(path)
        tokens += len(shard)
        digest.update(struct.pack("<q", len(shard)) + shard[:HEAD_TOKENS].tobytes())
    return {"shards": len(paths), "tokens": tokens, "sha256": digest.hexdigest()}


def checkpoint_to_resume(run, training):
    """The state to continue from, found to be one of this run, or None. Changes nothing of the run.
    Collective.

    RESUME=file must be usable. RESUME=auto takes the newest checkpoint that is; each that is not
    gets a line. Other settings are an error in both. Rank 0's disk counts, and what it finds ends
    all ranks alike.
    """
    paths = []
    if run.s.resume == "auto":
        paths = checkpoints(run.out_dir)
    elif run.s.resume:
        paths = [Path(run.s.resume)]
    data = None
    problem = ""
    if run.rt.broadcast(bool(paths)):
        fresh = training.state()
        try:
            if run.rt.rank == 0:
                data = _newest_usable(run, training, fresh, paths)
        except BadInput as error:
            problem = str(error)
    data, problem = run.rt.broadcast((data, problem))
    if problem:
        raise BadInput(problem)
    if data is None:
        if run.s.resume:
            run.log("started_anew", reason=f"no whole checkpoint in {run.out_dir}")
        return None
    return _unpickled(data)


def _newest_usable(run, training, fresh, paths):
    """Bytes of the first of these checkpoints that can be used, or None."""
    must_be_usable = run.s.resume != "auto"
    for path in paths:
        try:
            data = read_checkpoint(path)
            state = checkpoint_state(path, data)
        except BadInput as error:
            if must_be_usable:
                raise
            run.log("checkpoint_skipped", reason=str(error))
            continue
        need_same_run(path, run, state, training.data_identity)
        try:
            check_state(training, state, fresh)
            return data
        except ValueError as error:
            reason = f"{path}: its content is not that of this run ({brief(error, 150)})"
        if must_be_usable:
            raise BadInput(f"{reason}; take another checkpoint, or start anew")
        run.log("checkpoint_skipped", reason=reason)
    return None


def read_checkpoint(path):
    """Bytes of a whole checkpoint, or BadInput that says what is wrong with the file."""
    data = read_file(path)
    body, digest = data[:-32], data[-32:]
    if not data.startswith(CHECKPOINT_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise BadInput(f"{path}: not a whole checkpoint of this script (its beginning or its "
                       "checksum is wrong)")
    return body[len(CHECKPOINT_MAGIC) :]


def checkpoint_state(path, data):
    """The state in the bytes of read_checkpoint(); BadInput if there is none, or none that says of
    which run it is.

    Nothing is executed, and no more is unpacked than the file has bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
        unpacked = sum(record.file_size for record in records)
        if any(record.compress_type for record in records) or unpacked > len(data):
            raise ValueError("it is compressed")
        state = _unpickled(data)
        need_names("the checkpoint", state)
        need_names("settings", state.get("settings"))
        for name, value in state["settings"].items():
            need_like(f"settings {brief(name, 60)}", value, "")
        if "data" in state:
            need_like("data", state["data"], {"shards": 0, "tokens": 0, "sha256": ""})
    except Exception as error:  # torch says whatever it likes of a file that is broken inside
        first_line = str(error).strip().partition("\n")[0]
        raise BadInput(f"{path}: not a checkpoint of this script ({type(error).__name__}: "
                       f"{brief(first_line, 120)})") from None
    return state


def _unpickled(data):
    """What torch.save wrote: tensors and plain values. Its warnings are not for a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def need_same_run(path, run, state, data):
    """BadInput if the state of a checkpoint is that of other settings, or of other data than
    `data`.

    A setting that the checkpoint does not know counts as its default. After the last step, those
    that are read later may be others: the weights are packed and scored anew. `data`:
    training_data().
    """
    ours = identity(run)
    theirs = state["settings"]
    defaults = Settings().experiment()
    if "data" in state:
        for name in PATH_SETTINGS:
            del ours[name]
    read_later = set()
    if state.get("done"):
        read_later = run.s.experiment().keys() - run.s.experiment("train").keys()
    different = []
    for name in {**ours, **theirs}:
        value = theirs.get(name, defaults.get(name))
        if value != ours.get(name) and name not in read_later:
            different.append(f"{name}={value}")
    if different:
        raise BadInput(f"{path}: the checkpoint has other settings: "
                       f"{brief(' '.join(different), 120)}; repeat them, or take another RUN_ID")
    if state.get("data", data) != data:
        raise BadInput(f"{path}: the checkpoint has other data ({_data_in_words(state['data'])}) "
                       f"than DATA_PATH ({_data_in_words(data)}); set it right, or take another "
                       "RUN_ID")


def _data_in_words(data):
    shards = brief(data["shards"], 20)
    tokens = brief(data["tokens"], 20)
    sha256 = brief(data["sha256"], 64)[:12]
    return f"{shards} shards, {tokens} tokens, SHA-256 {sha256}"


def check_state(training, state, fresh):
    """ValueError, naming the field, unless training.load() can take this state. Nothing is changed.

    It must have the form of `fresh`, the state of a training that has not begun, and possible
    numbers.
    """
    s = training.run.s
    state = {**Training.ADDED_LATER, **state}
    need_names("the checkpoint", state, fresh)
    for name in ("stage", "weights", "optimizer", "rng"):
        need_like(name, state[name], fresh[name])
    step = need_number("step", state["step"], int, 0, s.iterations or MOST_STEPS)
    need_number("optimizer t", state["optimizer"]["t"], int, step, step)
    _check_position(s, state)
    need_number("reserve", state["reserve"], float, 0, MOST_SECONDS)
    need_names("seconds", state["seconds"])
    for purpose, seconds in state["seconds"].items():
        need_number(f"seconds of {brief(purpose, 20)}", seconds, float, 0, MOST_SECONDS)
    for name, moments in state["optimizer"].items():
        if name != "t" and any((second < 0).any() for second in moments[1:]):
            raise ValueError(f"optimizer {name} has a negative second moment")
    try:
        torch.Generator().set_state(state["rng"])
    except RuntimeError:
        raise ValueError("rng is not the state of a generator") from None
    need_like("done", state["done"], False)
    need_number("average_begun", state["average_begun"], int, 0, step)
    need_texts("reasons", state["reasons"])
    need_texts("made_by", state["made_by"])
    need_like("copies", state["copies"], torch.empty(_length(state["copies"]), dtype=torch.int64))
    _check_average(training.average, s, state, fresh["weights"])
    _check_complement(training.complement, state["complement"])
    _check_qat(training, state["qat"], fresh["qat"], step)


def _check_position(s, state):
    """Stage, tokens and place in the stream, which follow from the number of steps."""
    step = state["step"]
    batches = [stage.tokens for stage in s.stages]
    stage, stage_start, looping = state["stage"]
    need_number("stage", stage, int, 0, len(batches) - 1)
    need_number("beginning of the stage", stage_start, int, 0, step)
    if looping and not s.loops:
        raise ValueError("stage says that the model loops, but NUM_LOOPS=0")
    tokens = need_number("tokens", state["tokens"], int, step * min(batches), step * max(batches))
    # Calibration reads ahead, and each stage begins at a multiple of its length.
    most_steps = max(calibration_steps(s, stage) for stage in s.stages)
    read_ahead = most_steps * max(batches)
    rounded_up = (len(batches) + 1) * s.longest_sequence
    need_number("position", state["position"], int, tokens, tokens + read_ahead + rounded_up)


def _check_average(average, s, state, weights):
    most = {"ema": 1, "swa": 1, "lawa": s.lawa_k}
    need_names("average", state["average"])
    for kind, snapshots in state["average"].items():
        if kind not in average.kinds:
            raise ValueError(f"average has {brief(kind, 20)}, which AVERAGE={s.average} does not "
                             "take")
        if type(snapshots) is not list or not 1 <= len(snapshots) <= most[kind]:
            raise ValueError(f"average {kind} is no list of at most {most[kind]} snapshots")
        need_like(f"average {kind}", snapshots, [weights] * len(snapshots))
    ema_from_start = "ema" in average.kinds and not s.ema_start_frac
    if ema_from_start and "ema" not in state["average"]:
        raise ValueError("average has no ema, which is taken from the first step on")
    if "swa" in state["average"]:
        need_number("average_count", state["average_count"], int, 1, state["step"])
    else:
        need_number("average_count", state["average_count"], int, 0, 0)


def _check_complement(complement, state):
    if complement is None:
        need_like("complement", state, None)
        return
    need_names("complement", state, ("pairs", "times"))
    pairs = state["pairs"]
    times = state["times"]
    counts = torch.empty(_length(pairs), dtype=torch.int64)
    need_like("complement", state, {"pairs": counts, "times": counts})
    outside = len(pairs) and (pairs[0] < 0 or pairs[-1] >= complement.vocab**2)
    if outside or (pairs.diff() < 1).any():
        raise ValueError("complement pairs are not rising pairs of tokens of the vocabulary")
    if (times < 1).any():
        raise ValueError("complement times has a pair that never occurred")


def _check_qat(training, state, fresh, step):
    if training.qat is None:
        need_like("qat", state, None)
        return
    need_names("qat", state, fresh)
    need_like("qat steps", state["steps"], fresh["steps"])
    for name, step_sizes in state["steps"].items():
        if (step_sizes <= 0).any():
            raise ValueError(f"qat steps {name} are not positive")
    if state["begun"] is not None:
        need_number("qat begun", state["begun"], int, 0, step)
    if state["begun"] is None or training.run.s.fit != "allocate":
        need_like("qat moments", state["moments"], None)
        return
    modules = {f"{name}.weight": module for name, module in training.model.named_modules()
               if isinstance(module, (Linear, Embedding))}
    need_names("qat moments", state["moments"], modules)
    for name, curvature in state["moments"].items():
        rows, columns = modules[name].weight.shape
        hessian = torch.empty(columns, columns)
        gain = torch.empty(rows)
        looked_up = type(curvature) is tuple and curvature[-1] is None
        inputs = None if looked_up else torch.empty(columns)
        need_like(f"qat moments {name}", curvature, (hessian, gain, 0.0, inputs))


def _length(vector):
    """The length of a one-dimensional tensor; of anything else 0."""
    return len(vector) if isinstance(vector, Tensor) and vector.ndim == 1 else 0


def need_names(what, value, names=None):
    """ValueError unless the value is a dict with these names, or with any that are text."""
    if type(value) is not dict or not all(type(name) is str for name in value):
        raise ValueError(f"{what} is {_form(value)}, not a dict of names")
    for name in names or ():
        if name not in value:
            raise ValueError(f"{what} has no {name}")
    for name in value:
        if names is not None and name not in names:
            raise ValueError(f"{what} has an unknown {brief(name, 60)}")


def need_like(what, value, like):
    """ValueError unless the value has types, names, lengths, dtypes and shapes of `like`, and is
    finite.
    """
    if type(value) is not type(like) or _form(value) != _form(like):
        raise ValueError(f"{what} is {_form(value)}, not {_form(like)}")
    if isinstance(like, Tensor):
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{what} has values that are not finite")
    elif isinstance(like, dict):
        need_names(what, value, like)
        for name in like:
            need_like(f"{what} {name}", value[name], like[name])
    elif isinstance(like, (list, tuple)):
        for item, like_item in zip(value, like):
            need_like(what, item, like_item)
    elif isinstance(like, float) and not math.isfinite(value):
        raise ValueError(f"{what} is {value}")


def _form(value):
    """What need_like() compares, in words."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        on_cpu = value.layout == torch.strided and value.device.type == "cpu"
        special = "" if type(value) is Tensor and on_cpu else f"special {kind} "
        dtype = str(value.dtype).removeprefix("torch.")
        return brief(f"{special}{dtype} {tuple(value.shape)}", 60)
    return f"{kind} of {len(value)}" if isinstance(value, (list, tuple)) else kind


# ---- the training phase --------------------------------------------------------------------------


def report_score(run, predictor, stream):
    """Contiguous score of the validation stream as a report that nothing learns from."""
    s = run.s
    rt = run.rt
    with run.clock.charge("validate"), run.validity.reporting():
        before = fingerprint(predictor.model)
        result = score(predictor, contiguous_reader(stream, s, rt), stream, rt, run.validity)
        run.validity.need(
            fingerprint(predictor.model) == before,
            "C3: a report on the validation text changed the model")
    return result


def train(run, model, val):
    """The training phase: leaves the weights to export in the model.

    Returns {parameter: Curvature} of them, or None where the settings need none.
    """
    s = run.s
    rt = run.rt
    log = run.log
    need_loadable("the artifact of this model", largest_entries(model, s))
    training = Training(run, model)
    copies = training.stream.copies = Contamination(val.tokens.cpu().numpy())
    if s.average == "best":
        copies.note(copies.find(training.stream.held))
    state = None
    if s.resume:
        state = checkpoint_to_resume(run, training)  # before minutes are spent on warm-up
    _log_training(run, training)
    predictor = ModelPredictor(model, rt)
    _warm_up(run, training, predictor, val, state)
    training.average.start()
    if state:
        training.load(state)
        log("resume", step=training.step, train_seconds=round(run.clock["train"], 3))
    del state
    if s.keeps_checkpoints:
        _set_aside_later(run, training.step)
    if rt.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(rt.device)
    was_done = training.done
    with Interrupt() as interrupt:
        if not was_done:
            stage = s.stages[training.stage]
            training.stream.prefetch(stage.length, stage.tokens)
        with run.clock.charge("train"):
            _train_steps(run, training, predictor, val, interrupt)
        training.done = True
        if s.keeps_checkpoints:
            keep_weights(run, training)
    if not was_done:
        _report_never_reached(run, training)

    exported = "last"
    if s.average != "none":
        exported = _export_average(run, training, predictor, val)
    peak = rt.peak_memory_mib()
    run.facts.update(
        steps=training.step, train_tokens=training.tokens, peak_memory_mib=peak, weights=exported,
        epochs=round(training.stream.epoch, 4))
    log("peak_memory", f"peak memory allocated: {peak} MiB", mib=peak)

    run.validity.need_for_record(
        len(training.made_by) == 1, f"trained in parts, by {' and by '.join(training.made_by)}")
    model.temperature = training.fit_temperature() if s.eval_temperature == 0 else None
    curvature = None
    if training.qat and training.qat.curvature:
        curvature = training.qat.curvature
    elif s.needs_curvature:
        curvature = training.calibrate()
    _check_copies(run, copies)
    model.reasons = run.validity.to_keep(rt)
    return curvature


def _set_aside_later(run, step):
    """Checkpoints of later steps than this are of a run that is not continued: RESUME=auto must not
    take one of them once this run has written its own.
    """
    if run.rt.rank:
        return
    later = [path for path in checkpoints(run.out_dir) if step_of_checkpoint(path) > step]
    if later:
        set_aside(later, ".abandoned")
        run.log("checkpoint_abandoned", files=[path.name for path in later],
                note=f"the run continues from step {step}; each was renamed to .abandoned")


def _log_training(run, training):
    for role, (tensors, parameters, rule) in training.optimizer.table.items():
        run.log("optimizer", role=role, tensors=tensors, parameters=parameters, **rule._asdict())
    stream = training.stream
    name = Path(run.s.data_path).name
    shards = len(stream.paths)
    tokens = int(stream.ends[-1])
    text = f"train_loader:dataset:{name} train_shards:{shards} tokens:{tokens} order:{run.s.loader}"
    run.log("train_loader", text, dataset=name, train_shards=shards, tokens=tokens,
            order=run.s.loader, held_out=len(stream.held))


def _warm_up(run, training, predictor, val, state):
    """Compile every graph of training and of its reports, and measure how long calibration takes,
    unless `state` of a checkpoint says that.
    """
    s = run.s
    clock = run.clock
    if s.warmup_steps:
        with clock.charge("warmup"):
            training.warm_up()
            if run.rt.compiled:
                _warm_up_reports(run, training, predictor, val)
        run.log("warmup", steps=s.warmup_steps, graphs=len(training.plans()),
                seconds=round(clock["warmup"], 2))
    if s.needs_reserve and s.max_wallclock_seconds and not state:
        with clock.charge("warmup"):
            training.reserve = s.gptq_reserve_seconds or training.measure_reserve(predictor)
        run.log("reserve", seconds=round(training.reserve, 3))


def _warm_up_reports(run, training, predictor, val):
    """Compile the graphs of report_score() on synthetic tokens."""
    length = run.s.eval_seq_len
    tokens = torch.zeros_like(val.tokens[: length + 1])
    stream = ValStream(tokens, val.bytes[:length], False)
    # False before True: the flag stays as the run will end.
    for looping in sorted({graph.looping for graph in training.plans()}):
        training.model.looping = looping
        report_score(run, predictor, stream)


def _check_copies(run, copies):
    """Unless few validation documents are in the training text, the score is not valid.

    FineWeb was deduplicated within each crawl only, so that a few openings are in both; 20 % were
    in the folders of #2127.
    """
    count = len(copies.found(run.rt))
    documents = len(copies.keys)
    run.facts.update(val_documents_in_training=count)
    run.validity.need(
        count <= max(documents // 100, 1),
        f"C3: {count} of {documents} validation documents begin as some did that were trained on, "
        f"with the same {copies.PREFIX} tokens")


def keep_weights(run, training):
    """Write the trained weights to a checkpoint, before anything else is tried with them; when the
    run is complete, run_phases() removes it.
    """
    if not training.save():
        run.kept = "the trained weights could not be kept: no checkpoint could be written"
        return
    run.last_checkpoint = checkpoint_path(run.out_dir, training.step)
    run.kept = ("the trained weights are kept, the same command continues with "
                f"RESUME=auto OUT_DIR={run.out_dir}")


def _report_young_average(run, training):
    """An average that began a short while ago is still what it began with."""
    average = training.average
    decay = run.s.ema_decay
    steps = training.step - average.ema_begun
    share = decay**steps
    if share <= 0.01:
        return
    first = "the initial weights"
    if average.ema_begun:
        first = f"the weights after step {average.ema_begun}"
    enough = 0.01 ** (1 / max(steps, 1))
    lower = math.floor(1e4 * enough) / 1e4
    run.log("young_average", ema_decay=decay, steps=steps, share=share,
            note=f"{share:.1%} of the exported average is {first}, {decay}**{steps}; "
                 f"more steps, EMA_DECAY={lower} or AVERAGE=none make that less")


def _export_average(run, training, predictor, val):
    """Put the chosen average into the model, in place of the last weights, and report its score.
    Returns its name.
    """
    kind, weights = _choose_average(run, training, predictor)
    if kind == "ema":
        _report_young_average(run, training)
    if weights is not None:
        training.average.apply(weights)
        result = report_score(run, predictor, val)
        run.log("eval", name=f"{kind}_weights", val_loss=result.loss, val_bpb=result.bpb)
    return kind


def _choose_average(run, training, predictor):
    """(name of the average, weights to export in place of the last ones, or None).

    AVERAGE=best is decided by the loss on the end of the *training* stream, on the training side of
    the ledger; validation text has no say.
    """
    average = training.average
    candidates = {}
    for kind in average.kinds:
        weights = average.mean(kind)
        if weights is not None:
            candidates[kind] = weights
        elif run.s.average != "best":
            run.log("never_reached", what=f"AVERAGE={kind}",
                    consequence="the last weights are exported")
    if run.s.average == "best":
        return _best_average(run, training, predictor, {"last": average.current(), **candidates})
    return next(iter(candidates.items()), ("last", None))


def _best_average(run, training, predictor, candidates):
    """(name, weights) of the candidate with the lowest loss on the held-out end of the training
    stream.
    """
    run.validity.opened("train")
    held = torch.from_numpy(training.stream.held.astype(np.int32)).to(run.rt.device)
    losses = {}
    with run.clock.charge("calibrate"):
        for kind, weights in candidates.items():
            training.average.apply(weights)
            losses[kind] = held_out_loss(run, predictor, held)
    best = min(losses, key=losses.get)
    run.log("candidates", chosen=best, held_out_tokens=len(held) - 1,
            **{f"{kind}_loss": loss for kind, loss in losses.items()})
    return best, candidates[best]


@torch.no_grad()
def held_out_loss(run, predictor, held):
    """Contiguous loss in nats on training text (T,) that was not trained on."""
    stream = unmeasured_text(held)
    reader = contiguous_reader(stream, run.s, run.rt)
    return score(predictor, reader, stream, run.rt, Validity()).loss


def _seconds_to_train(run, training):
    """Seconds of MAX_WALLCLOCK_SECONDS that are left for steps; 0: no limit."""
    s = run.s
    if not training.reserve:
        return s.max_wallclock_seconds
    limit = max(s.max_wallclock_seconds - training.reserve, 0.0)
    if s.max_wallclock_seconds and not limit:
        advice = "raise it"
        if s.gptq_reserve_seconds:
            advice = f"lower GPTQ_RESERVE_SECONDS={s.gptq_reserve_seconds}"
        elif s.needs_curvature:
            advice = f"lower GPTQ_CALIBRATION_TOKENS={s.gptq_calibration_tokens}"
        raise BadInput(f"calibration will take {training.reserve:.1f} s of MAX_WALLCLOCK_SECONDS="
                       f"{s.max_wallclock_seconds}; {advice}")
    if limit < training.reserve:
        run.log("warning", note=f"calibration takes more of MAX_WALLCLOCK_SECONDS="
                                f"{s.max_wallclock_seconds} than the {limit:.1f} s of the steps")
    return limit


class Pace:
    """How far the steps are, by ITERATIONS or by the clock, whichever is further, and how fast."""

    def __init__(self, s, limit):
        self.s = s
        self.limit = limit  # seconds that there are for steps; 0: no limit
        self.step = 0
        self.elapsed = 0.0  # seconds of the training clock
        self.progress = 0.0  # fraction of the run
        self.marks = deque(maxlen=20)  # the clock at the last steps

    def update(self, step, elapsed):
        """Call it before each step: the number of steps that were made, and the training clock."""
        self.step = step
        self.elapsed = elapsed
        self.marks.append(elapsed)
        self.progress = min(max(self.by_time, self.by_step), 1.0)

    @property
    def by_time(self):
        return self.elapsed / self.limit if self.limit else 0.0

    @property
    def by_step(self):
        return self.step / self.s.iterations if self.s.iterations else 0.0

    @property
    def step_seconds(self):
        """Seconds of the slowest of the last steps."""
        return max((later - earlier for earlier, later in pairwise(self.marks)), default=0.0)

    @property
    def total_steps(self):
        """Steps of the run: if the clock ends it, as many as fit at the pace so far (0: none was
        made yet).
        """
        return self.step / self.by_time if self.by_time > self.by_step else self.s.iterations

    def is_over(self, in_flight):
        """Are all steps made, or would one that begins now end too late?

        in_flight: number of steps that the device has not finished.
        """
        late = self.elapsed + self.step_seconds * (1 + in_flight) > self.limit
        return self.by_step >= 1 or bool(self.limit and late)

    def eta(self):
        """Seconds until the steps are over."""
        return self.elapsed * (1 - self.progress) / max(self.progress, 1e-9)


class LossCheck:
    """Looks at the loss of each step once the device has finished it: the host never waits."""

    def __init__(self):
        self.waiting = deque()  # (step, its loss on the way to the CPU)
        self.bad_step = math.inf  # the first whose loss was not finite

    def look(self, in_flight=0):
        """At all steps but the last `in_flight`."""
        while len(self.waiting) > in_flight:
            step, loss = self.waiting.popleft()
            if not math.isfinite(loss.item()):
                self.bad_step = min(self.bad_step, step)


def _train_steps(run, training, predictor, val, interrupt):
    """Steps until the clock or ITERATIONS says stop."""
    s = run.s
    rt = run.rt
    pace = Pace(s, _seconds_to_train(run, training))
    losses = LossCheck()
    first_step = training.step
    while True:
        # Rank 0's clock decides for all, and so does the first bad step of any rank, which is minus
        # the maximum of -bad_step.
        elapsed = run.clock["train"] if rt.rank == 0 else 0.0
        elapsed, stop, minus_bad_step = rt.max(elapsed, interrupt.signal, -losses.bad_step)
        _need_finite(run, -minus_bad_step)
        if stop:
            break
        step = training.step
        pace.update(step, elapsed)
        done = training.done or pace.is_over(len(losses.waiting))
        due = s.val_loss_every and step % s.val_loss_every == 0 and step > first_step
        if done or due:
            if training.qat:  # what is scored is the weights themselves
                training.qat.switch(False)
            log_score(run, step, report_score(run, predictor, val))
        if done:
            break

        falling = warmdown(s, pace.progress, pace.total_steps, pace.limit)
        training.enter(pace.progress, falling)
        since_stage = step - training.stage_start if training.stage else None
        scale = lr_scale(s, pace.progress, step, pace.total_steps, since_stage, pace.limit)
        losses.waiting.append(_train_step(run, training, pace.progress, scale))
        losses.look(rt.throttle())
        if s.checkpoint_every > 0 and training.step % s.checkpoint_every == 0:
            _finish_steps(run, losses)
            training.save()
        run.log.progress(
            "training", pace.progress, 1.0,
            f"step {training.step} {1e3 * pace.step_seconds:.0f} ms/step ETA {pace.eta():.0f} s")
    if training.qat:
        training.qat.switch(False)
    _finish_steps(run, losses)
    stop = int(rt.max(interrupt.signal)[0])
    if stop:
        then = "no checkpoint was written"
        if s.keeps_checkpoints and training.save():
            then = f"the same command continues with RESUME=auto OUT_DIR={run.out_dir}"
        name = signal.Signals(stop).name
        raise Stopped(f"interrupted by {name} after step {training.step}; {then}", 128 + stop)
    if pace.by_step < 1:
        times = f"train_time:{1e3 * elapsed:.0f}ms {step_of(s, step)}"
        run.log("stopping_early", f"stopping_early: wallclock_cap {times}", step=step)


def _finish_steps(run, losses):
    """Wait for the device, and look at every loss. Collective."""
    run.rt.sync()
    losses.look()
    _need_finite(run, -run.rt.max(-losses.bad_step)[0])


def _next_batch(run, training, stage):
    """The next batch of a stage; or the end of the run on all ranks together.

    It ends if a rank meets a token outside the vocabulary deep in a shard. What was trained so far
    is kept.
    """
    stream = training.stream
    position = stream.position
    problem = None
    try:
        micro = stream.next(stage.length, stage.tokens)
    except BadInput as error:
        problem = error
    if any(run.rt.max(problem is not None)):
        stream.position = position  # that of the checkpoint, on the ranks that could read, too
        if run.s.keeps_checkpoints:
            training.save()
        raise problem or Stopped("another rank cannot read its part of the training data", 2)
    return micro


def _train_step(run, training, progress, scale):
    """One optimizer step; returns (its number, this rank's mean loss on its way to the CPU)."""
    s = run.s
    rt = run.rt
    stream = training.stream
    run.validity.opened("train")
    epoch = int(stream.epoch)
    stage = s.stages[training.stage]
    micro = _next_batch(run, training, stage)
    training.optimizer.zero_grad()
    loss = training.backward(micro)
    training.optimizer.step(scale, momentum_at(s, training.step), wd_scale(s, progress))
    training.step += 1
    training.tokens += stage.tokens
    training.average.update(training.step, progress, training.falling)
    if training.complement:
        training.complement.observe(micro)
    if training.step <= 10 or training.step % s.train_log_every == 0:
        mean = rt.sum(loss.clone()).item() / rt.world
        log_loss(run, training.step, mean, scale, training.tokens)
    if int(stream.epoch) > epoch:
        run.log("epoch", number=int(stream.epoch), step=training.step,
                note="the training stream starts again")
    return training.step, rt.to_cpu(loss)


def step_of(s, step):
    """The contest's `step:N/M`, or `step:N` where the clock alone ends the run."""
    return f"step:{step}/{s.iterations}" if s.iterations else f"step:{step}"


def log_score(run, step, result):
    """The contest's line for a validation score."""
    ms = 1e3 * run.clock["train"]
    text = (f"{step_of(run.s, step)} val_loss:{result.loss:.4f} val_bpb:{result.bpb:.4f} "
            f"{_step_times(ms, step)}")
    run.log("val", text, step=step, val_loss=result.loss, val_bpb=result.bpb, train_time_ms=ms)


def log_loss(run, step, loss, scale, tokens):
    """The contest's line for a training loss."""
    ms = 1e3 * run.clock["train"]
    text = f"{step_of(run.s, step)} train_loss:{loss:.4f} {_step_times(ms, step)}"
    run.log("train", text, step=step, train_loss=loss, train_time_ms=ms, lr_scale=scale,
            tokens_per_second=tokens / max(ms / 1e3, 1e-9))


def _step_times(ms, step):
    return f"train_time:{ms:.0f}ms step_avg:{ms / max(step, 1):.2f}ms"


def _need_finite(run, bad_step):
    """End the run on all ranks if the loss of a step was not finite on one of them; inf: of none.
    """
    if bad_step == math.inf:
        return
    step = int(bad_step)
    last = _last_good_checkpoint(run, step) if run.s.keeps_checkpoints else "none"
    raise Stopped(f"the loss is not finite at step {step}; last good checkpoint: {last}", 4)


def _last_good_checkpoint(run, bad_step):
    """Name of the last checkpoint before a bad step; later ones are set aside. The loss of a step
    judges the weights that the step before left: a checkpoint of those is bad, too.
    """
    paths = checkpoints(run.out_dir)
    good = [path for path in paths if step_of_checkpoint(path) < bad_step - 1]
    if run.rt.rank == 0:
        set_aside(paths[: len(paths) - len(good)], ".bad")
    return good[0].name if good else "none"


def _report_never_reached(run, training):
    """A scheduled event that did not happen is said, not left to be found in the result (#1798)."""
    s = run.s
    step = training.step

    def report(what, consequence):
        run.log("never_reached", what=what, consequence=consequence)

    if s.matrix_optimizer == "muon" and step < s.muon_momentum_warmup_steps:
        report("MUON_MOMENTUM", f"it ended at {momentum_at(s, step):.4f}")
    falls = s.warmdown_frac or s.warmdown_iters or s.warmdown_seconds
    if falls and training.falling >= 1:
        report("warmdown", "the learning rate never fell")
    if step < s.lr_warmup_steps:
        report("LR_WARMUP_STEPS", "the learning rate never reached its peak")
    if training.qat and training.qat.begun is None:
        report("LATE_QAT_THRESHOLD", "no step was on rounded weights")
    if s.loops and not training.model.looping:
        report("ENABLE_LOOPING_AT", "the exported model does not loop")
    if training.stage + 1 < len(s.stages):
        report("stage", f"it ended in number {training.stage + 1} of {len(s.stages)}")


# --------------------------------------------------------------------------------------------------
# 17 Phases: export, evaluate, summarise, main
# --------------------------------------------------------------------------------------------------


def export(run, model, tokenizer_sha256, curvature=None):
    """Write the artifact, account for every byte of the submission; returns the artifact's path."""
    s = run.s
    path = run.out_dir / "model.pg"
    code_bytes = len(run.source)
    info = None
    failed = None  # (message, exit code)
    with run.clock.charge("export"):
        try:
            if run.rt.rank == 0:
                budget = s.size_limit - code_bytes
                info = save_artifact(path, model, s, tokenizer_sha256, run.log, curvature, budget)
        except BadInput as error:
            failed = str(error), 2
        except Stopped as error:
            failed = str(error), error.code
    info, failed = run.rt.broadcast((info, failed))
    if failed:  # on all ranks: one that waited for the artifact would die of that
        raise Stopped(*failed)
    run.kept = f"the artifact is kept, continue with PHASES=eval ARTIFACT={path}"
    if run.last_checkpoint:
        run.kept += f" or RESUME=auto OUT_DIR={run.out_dir}"

    model_bytes = info["bytes"]
    compressor = info["compressor"]
    total = code_bytes + model_bytes
    run.facts.update(
        code_bytes=code_bytes, model_bytes=model_bytes, total_bytes=total,
        artifact_sha256=info["sha256"], compressor=compressor)
    run.log("artifact", code_bytes=code_bytes, model_bytes=model_bytes, total_bytes=total,
            limit_bytes=s.size_limit, margin_bytes=s.size_limit - total, sha256=info["sha256"],
            file=path)
    run.log("role_bytes", **info["role_bytes"])
    text = f"Total submission size {s.format}+{compressor}: {total} bytes"
    run.log("submission_size", text, total_bytes=total)
    if total > s.size_limit:  # it is scored all the same, as the contest's scripts do
        run.validity.need_for_record(False, f"{total} bytes, the limit is {s.size_limit}")
        run.too_large = (
            f"code {code_bytes} + artifact {model_bytes} = {total} bytes, "
            f"{total - s.size_limit} over the limit of {s.size_limit}; {path} was kept. "
            "FIT=allocate or prune, or a trainer packed by tools/submit.py, makes it fit")
        run.log("warning", note=run.too_large)
    return path


def evaluate(run, path):
    """Load the artifact that was written, and nothing else, and score it."""
    rt = run.rt
    validity = run.validity
    with run.clock.charge("eval"), validity.evaluation():
        # Over nodes, only rank 0's disk has the file.
        data = rt.broadcast(read_file(path) if rt.rank == 0 else None)
        artifact_sha256 = hashlib.sha256(data).hexdigest()
        if "artifact_sha256" in run.facts:  # not with PHASES=eval
            unchanged = run.facts["artifact_sha256"] == artifact_sha256
            validity.need(unchanged, "the artifact changed after it was written")
        run.facts["artifact_sha256"] = artifact_sha256
        s, model = _load_to_score(run, path, data)
        loaded = fingerprint(model)
        sp = _tokenizer_of(path, data, s)
        with validity.loading():
            val = load_validation(s, rt, sp)
        text = text_sha256(val)
        proved_bytes = _check_bytes(run, sp, val)
        temperature = s.eval_temperature or model.temperature
        predictor = make_predictor(model, s, rt, len(val.bytes), temperature)
        _report_packed(run, s, model, predictor, val)
        if s.trains_before_scoring:
            train_on_validation(run, model, val)
        validity.need(not predictor.invalid_reason, predictor.invalid_reason)
        reader = reader_for(predictor, val, s, rt)
        log_adaptation(run, model, predictor, len(reader.ranges))
        graphs = warm_up_scoring(run, predictor, reader) if rt.compiled else 0
        predictor.reset()
        unchanged = s.trains_before_scoring or fingerprint(model) == loaded
        validity.need(unchanged, "C3: the model was changed before it was scored")

        result = score(predictor, reader, val, rt, validity, run.log)

        validity.need(
            result.bytes == proved_bytes,
            f"bytes: {result.bytes} were scored, {proved_bytes} had been proved")
        validity.need(text_sha256(val) == text, "the text changed while it was scored")
        read = torch.tensor([float(reader.forwarded)], dtype=torch.float64, device=rt.device)
        forwarded = rt.sum(read).item()
        recompiled = graphs_so_far() - graphs if rt.compiled else 0
        file_unchanged = rt.broadcast(_has_sha256(path, artifact_sha256) if rt.rank == 0 else None)
        validity.need(file_unchanged, "the artifact changed while it was scored")
    if s.selftest:
        selftest(run, s, path, data, val)
    tests = validity.tests
    tested = "yes" if tests and all(tests.values()) else "no"
    validity.need_for_record(s.selftest, "the self-test was left out: SELFTEST=0")
    validity.share(rt)
    name = f"{s.format}_{scoring_name(s)}"
    _log_final(run, name, result, validity.verdict() | {"tested": tested})
    run.facts.update(
        val_bpb=result.bpb, val_loss=result.loss, val_tokens=result.tokens, val_bytes=result.bytes,
        predictor=name, params=sum(param.numel() for param in model.parameters()),
        recompiles=recompiled, tested=tested, tests=list(tests), val_sha256=text,
        forwarded_per_token=round(forwarded / result.tokens, 4))
    _need_fineweb(validity, val, result)


def _load_to_score(run, path, data):
    """(settings, model) of the artifact: the model is what the file says, alone."""
    s = without_model_settings(run.s)
    s, model = load_artifact(path, s, run.rt.dtype, run.attend, run.rt.device, data)
    run.validity.restore(model.reasons)
    if s.eval_temperature == 0 and model.temperature is None:
        raise BadInput(f"EVAL_TEMPERATURE=0, but {path} was written without a fitted one; train "
                       "with it, or give it")
    return s, model


def _tokenizer_of(path, data, s):
    """The tokenizer with which the artifact's model was trained, or BadInput."""
    stored = read_artifact(path, data)[0]["tokenizer_sha256"]
    sp, _, tokenizer_sha256 = load_tokenizer(s)
    if stored and stored != tokenizer_sha256:
        raise BadInput(f"{path} was trained with another tokenizer (SHA-256 {stored[:12]}, this "
                       f"one {tokenizer_sha256[:12]}); set TOKENIZER_PATH")
    return sp


def _report_packed(run, s, model, predictor, val):
    """The contiguous score of the packed model: next to the one before packing, it is what packing
    cost.
    """
    if scoring_name(s) == "contiguous":
        return
    is_model_alone = type(predictor) is ModelPredictor and predictor.temperature == 1
    plain = predictor if is_model_alone else ModelPredictor(model, run.rt)
    result = report_score(run, plain, val)
    run.log("eval", name=f"{s.format}_contiguous", val_loss=result.loss, val_bpb=result.bpb,
            **run.validity.verdict())


def _has_sha256(path, expected):
    return path.is_file() and hashlib.sha256(read_file(path)).hexdigest() == expected


def _log_final(run, name, result, verdict):
    """The contest's line of the final score, with the verdict."""
    ms = 1e3 * run.clock["eval"]
    words = " ".join(f"{key}:{_word(value)}" for key, value in verdict.items())
    score_text = f"val_loss:{result.loss:.8f} val_bpb:{result.bpb:.8f} eval_time:{ms:.0f}ms"
    run.log("final", f"final_{name} {score_text} {words}", name=name, val_loss=result.loss,
            val_bpb=result.bpb, **verdict)


def _need_fineweb(validity, val, result):
    """A record is scored on the whole validation set of FineWeb."""
    documents = len(document_ranges(val))
    right_bytes = abs(result.bytes / FINEWEB_VAL_BYTES - 1) < 1e-4
    validity.need_for_record(
        val.whole and documents == 50_000 and right_bytes,
        f"{result.bytes} validation bytes in {documents} documents; FineWeb's 50,000 documents: "
        f"{FINEWEB_VAL_BYTES}")


def graphs_so_far():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def warm_up_scoring(run, predictor, reader):
    """Compile every graph of a scoring on synthetic tokens; returns how many there are in all so
    far.

    The limit of an evaluation includes this.
    """
    began = time.monotonic()
    s = reader.s  # as the artifact has them
    device = run.rt.device
    generator = torch.Generator().manual_seed(s.seed)

    def tokens(*shape):
        return torch.randint(s.vocab_size, shape, generator=generator).to(device)

    for rows, length, width, turn in reader.shapes():
        # Laid out as the reader's.
        places = torch.arange(length - width, length, device=device).repeat(rows, 1)
        recent = tokens(rows, predictor.history + width)
        inputs = Inputs(tokens(rows, length), places, recent, turn)
        chunk = Chunk(inputs, tokens(rows, width), places, rows)
        predictor.nll(inputs, chunk.targets)
        predictor.observe(chunk)
    if predictor.learns:
        count = min(s.ttt_chunk_tokens, len(reader.stream.bytes))
        predictor.rehearse(unmeasured_text(tokens(count + 1).int()))
    predictor.reset()
    run.rt.sync()
    graphs = graphs_so_far()
    run.log("warmup_scoring", graphs=graphs, seconds=round(time.monotonic() - began, 2))
    return graphs


def summarise(run):
    """The last line of log and console: everything a table, a plot or submission.json needs.

    A terminal shows the name of its file instead.
    """
    s = run.s
    rt = run.rt
    validity = run.validity
    validity.share(rt)
    purposes = ("train", "calibrate", "export", "eval", "validate", "warmup", "selftest")
    seconds = {f"{name}_seconds": round(run.clock.seconds.get(name, 0.0), 3) for name in purposes}
    _need_record(run, seconds)
    scored = "val_bpb" in run.facts
    summary = {
        **run.facts,
        "valid": "yes" if scored and not validity.reasons else "no",
        "reasons": validity.reasons,
        "eligible": "no" if validity.obstacles else "yes",
        "eligible_reasons": validity.obstacles,
        **seconds,
        "seed": s.seed,
        "world_size": rt.world,
        "device": rt.device_name(),
        "data": Path(s.data_path).name,
        "settings": s.text(),
        "settings_hash": s.sha256(),
        "run_id": run.out_dir.name,
        "code_sha256": hashlib.sha256(run.source).hexdigest(),
    }
    path = run.out_dir / "summary.json"
    try:
        if rt.rank == 0:
            write_atomic(path, [to_json(summary, indent=1).encode()])
    except BadInput as error:
        run.log("warning", note=str(error))
    short = f"summary file:{_word(path)}"
    run.log("summary", f"summary {to_json(summary)}", short=short, **summary)


def _need_record(run, seconds):
    """What a record of the contest needs beside a valid score: trained here, in time, on its
    hardware.
    """
    rt = run.rt
    need = run.validity.need_for_record
    train_seconds = seconds["train_seconds"] + seconds["calibrate_seconds"]
    eval_seconds = seconds["eval_seconds"]
    need("steps" in run.facts, "not trained in this run")
    need(train_seconds < 600, f"training took {train_seconds:.1f} s, the limit is 600")
    need(eval_seconds < 600, f"evaluation took {eval_seconds:.1f} s, the limit is 600")
    on_8_h100 = rt.world == 8 and "H100" in rt.device_name()
    need(on_8_h100, f"hardware {rt.world} x {rt.device_name()}, not 8 x H100")
    need("val_bpb" in run.facts, "not scored in this run")
    need(not run.validity.reasons, "the score is not valid")


# Beside torch and numpy.
LOGGED_PACKAGES = "sentencepiece", "zstandard", "brotli", "triton", "flash_attn_3"


def package_versions():
    """NAME==VERSION of each package that this file may import and that is installed."""
    versions = []
    for name in LOGGED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name}=={importlib.metadata.version(name)}")
    return versions


def log_header(run, argv):
    """What a reader years later needs: source, commit, versions, device, settings, every automatic
    choice.
    """
    log = run.log
    if not log.main:
        return
    # not __file__, which may be packed
    running = "".join(linecache.getlines(log_header.__code__.co_filename))
    versions = f"Running Python {sys.version}\nRunning PyTorch {torch.__version__}"
    rule = "=" * 100
    for text in (running, rule, versions, _output_of("nvidia-smi"), rule):
        log.line(text, console=False)
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD") or "none"
    changed_files = len(_output_of("git", "status", "--porcelain").splitlines())
    log("run", out_dir=run.out_dir, commit=commit, changed_files=changed_files,
        code_sha256=hashlib.sha256(run.source).hexdigest()[:16], torch=torch.__version__,
        numpy=np.__version__, cuda=torch.version.cuda or "none", packages=package_versions(),
        threads=torch.get_num_threads(), world_size=run.rt.world, seed=run.s.seed,
        command=shlex.join(argv))
    settings = run.s.text()
    log("settings", f"settings {settings}".strip(), settings=settings, settings_hash=run.s.sha256())
    for name, choice, reason in run.rt.choices:
        log("choice", **{name: choice}, reason=reason)
    for name, rule in run.s.idle().items():
        log("warning", setting=name, note=f"has no effect without {rule}")
    for name in doubtful_names(os.environ):
        log("warning", environment=name,
            note="looks like a setting but is none; STRICT_ENV=1 makes that an error")
    for name in COMMON:
        if name in os.environ and run.s.data_path == Settings.data_path:  # it may be meant
            log("warning", environment=name, note=f"is not read: {other_names()[name]}")


def _output_of(*command):
    """What a command prints, run in the folder of this file; "" if it fails or is not there."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, cwd=folder,
                              encoding="utf-8", errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def run_phases(s, argv, interrupt=None):
    """Settings to summary, in the order in which data flows; inputs are looked at before anything
    is built.

    If it ends early, the reason is the last line of its log; metrics.jsonl has the exit code, too.
    `interrupt`: the Interrupt that is in force.
    """
    if s.artifact:
        s = artifact_settings(s.artifact, read_artifact(s.artifact)[0], s)
    tokenizer = _look_at_inputs(s)
    rt = Runtime(s)
    run = None
    resources = contextlib.ExitStack()
    resources.callback(rt.close)
    interrupt = interrupt or Interrupt()
    try:
        attend = pick_attention(s, rt)
        run = open_run(s, rt, attend, resources)
        resources.enter_context(run.validity.watch(s.data_path))
        log_header(run, argv)
        if s.phases == "eval":
            _log_tokenizer(run, tokenizer)
            path = Path(s.artifact)
        else:
            path = _train_and_export(run, tokenizer)
        interrupt.check()
        run.validity.freeze()
        if s.phases != "train":
            evaluate(run, path)
            interrupt.check()
        summarise(run)
        interrupt.over = True
        # Of an artifact that is too large, another one can be made from the checkpoint.
        is_kept = s.checkpoint_every > 0 or run.too_large
        if run.last_checkpoint and not is_kept and rt.rank == 0:
            run.last_checkpoint.unlink(missing_ok=True)
    except BaseException as error:
        ended = _end_of(run, error, interrupt)
        if run:
            known = isinstance(ended, (BadInput, Stopped))
            reason = str(ended) if known else f"{type(ended).__name__} {ended}"
            text = f"ended reason:{_word(reason)}"
            code = exit_code(ended, interrupt)
            run.log("ended", text, console=False, reason=reason, exit_code=code)
        if ended is error:
            raise
        raise ended from None
    finally:
        resources.close()
    if run.too_large:
        raise Stopped(run.too_large, 3)


def _look_at_inputs(s):
    """The tokenizer; BadInput if that, or a shard that the phases need, is missing. Shards come
    first: their message has the command that makes both.
    """
    splits = ("val",) if s.phases == "eval" else ("train", "val")
    try:
        for split in splits:
            find_shards(s.data_path, split)
        tokenizer = load_tokenizer(s)
    except BadInput as error:
        hint = ""
        if s.artifact:
            hint = (f". {s.artifact} does not hold the DATA_PATH of its run: repeat that, or its "
                    "settings file")
        raise BadInput(f"{error}{hint}") from None
    return tokenizer


def _log_tokenizer(run, tokenizer):
    sp, path, sha256 = tokenizer
    text = f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={path}"
    run.log("tokenizer", text, path=path, sha256=sha256)
    changes = text_changes(sp)
    if changes:
        run.log("warning", tokenizer=path.name, note=changes)


def _train_and_export(run, tokenizer):
    """Train a model and write it. Returns the path of the file: all that later phases get."""
    s = run.s
    rt = run.rt
    _log_tokenizer(run, tokenizer)
    sp, _, tokenizer_sha256 = tokenizer
    with run.validity.reporting(), run.validity.loading():
        val = load_validation(s, rt, sp)
    targets = len(val.bytes)
    text = f"val_loader:shards pattern={s.data_path}/fineweb_val_*.bin tokens:{targets}"
    run.log("val_loader", text, tokens=targets)
    model = GPT(s, rt.dtype, run.attend).to(rt.device)
    params = sum(param.numel() for param in model.parameters())
    run.log("model_params", f"model_params:{params}", params=params)
    curvature = train(run, model, val)
    if s.trains_before_packing:
        train_on_validation(run, model, val)
    return export(run, model, tokenizer_sha256, curvature)


def _end_of(run, error, interrupt):
    """The error that ends the run, or, if a signal does, Stopped; with what is kept and how to
    continue.
    """
    kept = run.kept if run else ""
    known = isinstance(error, (BadInput, Stopped))
    if interrupt.signal and not known:  # Interrupted, or what a rank meets when another one is gone
        name = signal.Signals(interrupt.signal).name
        kept = kept or "the same command starts again"
        return Stopped(f"interrupted by {name}; {kept}", 128 + interrupt.signal)
    if known and kept:
        return Stopped(f"{error}; {kept}", getattr(error, "code", 2))
    return error


def exit_code(error, interrupt):
    """The exit code of a run that this error ends; 1 is Python's own, with a traceback."""
    if isinstance(error, (BadInput, Stopped)):
        return getattr(error, "code", 2)
    if isinstance(error, KeyboardInterrupt):
        return 128 + (interrupt.signal or signal.SIGINT)
    return 1


def main(argv):
    """Returns the exit code: 0 done, 2 bad input, 3 artifact too large, 4 not finite, 128 + signal
    that ended it.

    A console that goes away changes neither the run nor the code.
    """
    with guarded_console():
        if {"--help", "-h"} & set(argv):
            print(Settings.help())
            return 0
        rank = os.environ.get("RANK", "0")
        settings = None
        message = ""
        code = 0
        with Interrupt(at_once=True) as interrupt:
            try:
                settings = Settings.parse(argv, os.environ)
                run_phases(settings, argv, interrupt)
            except (BadInput, Stopped) as error:
                message = str(error)
                code = exit_code(error, interrupt)
            except KeyboardInterrupt as error:
                message = "interrupted"
                code = exit_code(error, interrupt)
        # All ranks have the same wrong settings: one says so.
        if settings or rank == "0":
            who = "error" if rank == "0" else f"error (rank {rank})"
            for line in message.splitlines():
                print(readable(f"{who}: {line}"), file=sys.stderr, flush=True)
        return code


if __name__ == "__main__":
    # under torchrun the traceback of the rank that failed first is the one to show
    if "LOCAL_RANK" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    code = main(sys.argv[1:])
    # A signal from here on has nothing to save.
    for late in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, late), signal.SIG_IGN)
    if "LOCAL_RANK" in os.environ:
        # All is written. On a busy machine the threads of torch's process groups may abort a rank
        # that ends as Python processes do ("terminate called without ...", torch 2.13).
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
