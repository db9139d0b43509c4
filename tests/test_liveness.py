"""No switch is dead: the table of settings itself says what is tried, so a new one without a case fails here.

Every field of the rooms Model, Training and Averaging is changed in a real training of six steps, eager and compiled;
every field of Quantisation and packing in an artifact of such a training, calibrated as its settings say; every field
of Evaluation in the score of one. Its case says where that has to show: in the losses, in the exported weights alone,
in the choice of weights, in what the artifact holds, in the score, or elsewhere for what is only about speed and
limits. Where a field waits for another one (`on`), its cases meet every condition; without any of them the run must be
bit for bit the one without the field, and Settings.idle() must name it.
"""

import contextlib
import functools
import io
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin
from unittest import mock

import pytest
import reference as ref
import torch
from runs import events

import train_gpt as tg
from train_gpt import Settings

PACKING, SCORING = "Quantisation and packing", "Evaluation"
ROOMS = ("Model", "Training", "Averaging", PACKING, SCORING)
FIELDS = {f.name: f for f in fields(Settings) if f.metadata["group"] in ROOMS}
BASE = """DEVICE=cpu COMPRESSOR=zlib FIT=off MATRIX_QUANT=gptq_lite EMBED_QUANT=gptq_lite WARMUP_STEPS=0 ITERATIONS=6 NUM_LAYERS=2 XSA_LAST_N=1 VE_LAYERS=1 TRAIN_SEQ_LEN=32
EVAL_SEQ_LEN=32 EVAL_STRIDE=0 TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=128 PARALLEL_START_LAYER=1 LOOP_START=0
LOOP_END=1
SWA_EVERY=1 SWA_START_SCALE=1 LAWA_FREQ=1 LAWA_K=2 HOLDOUT_TOKENS=300 GPTQ_CALIBRATION_TOKENS=512
VAL_TOKENS=700 TTT_CHUNK_TOKENS=128 TTT_BATCH_SEQS=2 TTT_EPOCHS=2 TTT_CHUNK_SIZE=8 TTT_GROUP_DOCS=4 TTT_LR=0.02
MIXER_MIN_TOKENS=0 NGRAM_ORDER=4 NGRAM_BUCKETS=5000 TOKEN_ORDER=3 AWQ_LITE_GROUP_SIZE=8""".split()


class Case(NamedTuple):
    value: str
    beside: str = ""  # the settings beside it, in the run it is compared with, too
    shows: Literal["loss", "weights", "choice", "artifact", "score"] = "loss"


def each(values, beside="", shows="loss"):
    return [Case(value, beside, shows) for value in values.split()]


def beside(value, *companions, shows="loss"):
    return [Case(value, companion, shows) for companion in companions]


WINDOWED = "ATTN_GATE=head", "ATTN_GATE=sparse", "SMEAR_GATE=scalar"
UNTIED = "TIE_EMBEDDINGS=0", "MTP_NUM_HEADS=1"
LANES = "PARALLEL_RESIDUAL=lanes", "PARALLEL_RESIDUAL=routed"
STAGES = "TRAIN_SEQ_SCHEDULE=16@0.3,32@1", "TRAIN_BATCH_SCHEDULE=128@0.3,256@1"
FIXED = "", "FIT=prune MATRIX_QUANT=rtn SIZE_LIMIT=30000", "MATRIX_QUANT=gptq"
EMBED_FIXED = "", "FIT=prune EMBED_QUANT=rtn SIZE_LIMIT=30000", "EMBED_QUANT=gptq"
ALLOCATE = "FIT=allocate MATRIX_QUANT=rtn EMBED_QUANT=rtn SIZE_LIMIT=25000"
FACTORS = "MATRIX_QUANT=gptq", "EMBED_QUANT=gptq"
SALIENT = "AWQ_LITE_GROUP_TOP_K=250 AWQ_LITE_GROUP_SIZE=1"
MOMENTS = *FACTORS, ALLOCATE, "LQER_RANK=2 MATRIX_BITS=3", SALIENT
# What either kind of fixed grid wakes: one of them alone, the other ternary.
EITHER = *(f"{one} EMBED_QUANT=ternary" for one in FIXED), *(f"{one} MATRIX_QUANT=ternary EMBED_BITS=6" for one in EMBED_FIXED)
GATED = "ATTN_GATE=head", "ATTN_GATE=dense", "ATTN_GATE=sparse"
packs = functools.partial(beside, shows="artifact")
TTT_BASE = "TTT=full", "TTT=before ALLOW_INVALID=1", "TTT=prequant ALLOW_INVALID=1"
PHASED = "TTT=lora_docs PHASED_TTT_PREFIX_DOCS=2"
STREAM, TTT_WEIGHTS, TTT_STEPS = ("", "TTT=lora", *TTT_BASE), (*TTT_BASE, PHASED), ("TTT=lora", *TTT_BASE, PHASED)
FIRST, LORA, DOCS = ("TTT=full", "TTT=lora"), ("TTT=lora", "TTT=lora_docs"), "TTT=lora_docs"
BACKOFF, HEDGE, HASHED = "MIXER=backoff", "MIXER=hedge", "MIXER=hashed ALLOW_INVALID=1"
MIXERS, TILT = (BACKOFF, HEDGE, HASHED), "TOKEN_BOOST=2"
COUNTING = *MIXERS, TILT
BESIDE_ALL = *(f"{lora} TTT_LORA_TARGETS={what}" for lora in ("TTT=lora", "TTT=lora_docs") for what in ("o", "attn", "mlp")),
scores = functools.partial(beside, shows="score")

CASES = {
    "num_layers": each("3"), "model_dim": each("48"), "num_heads": each("2"), "num_kv_heads": each("1 4"),
    "mlp_mult": each("2"), "leaky_slope": each("0 0.3"), "logit_softcap": each("1 0", "LOGIT_SOFTCAP=2"),
    "asym_logit_rescale": beside("1", *(f"{ttt} TTT_LR=0.2 LOGIT_SOFTCAP=3" for ttt in TTT_WEIGHTS),
                                 shows="score"),
    "tie_embeddings": each("0"), "embed_dim": each("8"), "tied_embed_init_std": each("0.02"), "qk_gain_init": each("3"),
    "rope_dims": each("0 8"), "rope_base": each("10"), "xsa_last_n": each("0 2"),
    "attn_gate": each("head dense sparse"), "gate_window": beside("5", *WINDOWED),
    "sparse_attn_gate_scale": each("0.5", "ATTN_GATE=sparse"), "value_residual": each("vrl pair sigmoid"),
    "ln_scale": each("0"), "resid_mix": each("0"), "skips": each("none sigmoid gated"),
    "skip_pairs": beside("1", *(f"NUM_LAYERS=4 SKIPS={kind}" for kind in ("linear", "sigmoid", "gated"))),
    "num_loops": each("1 2"), "loop_start": each("1", "NUM_LOOPS=1"), "loop_end": each("0", "NUM_LOOPS=1"),
    "loop_order": each("layer", "NUM_LOOPS=1"), "enable_looping_at": each("0 0.6", "NUM_LOOPS=1"),
    "parallel_residual": each("gptj lanes routed"),
    "parallel_start_layer": beside("0", "PARALLEL_RESIDUAL=gptj", *LANES),
    # Routed lanes are mirror images of each other until a skip reaches one of them.
    "parallel_first_skip": beside("lane0", *(f"{lanes} SKIPS={kind}" for lanes in LANES for kind in (
        "linear", "sigmoid", "gated"))),
    "parallel_final_lane": beside("learned", *(f"NUM_LAYERS=4 PARALLEL_START_LAYER=2 {lanes}" for lanes in LANES)),
    "smear_gate": each("none scalar"), "doc_mask": each("none attention"),
    "bigram_vocab_size": each("0 32"), "bigram_dim": each("8"),
    "trigram": each("1"), "trigram_vocab_size": each("64"), "trigram_dim": each("8", "TRIGRAM_VOCAB_SIZE=64"),
    "ve_dim": each("0 8"), "ve_layers": each("0 0,1"),

    "train_batch_tokens": each("512"), "train_batch_schedule": each("128@0.5,256@1"), "train_seq_len": each("16"),
    "train_seq_schedule": each("16@0.5,32@1"), "seq_change_warmup_steps": beside("3", *STAGES),
    "loader": each("coprime shuffled") + each("packed", "DOC_MASK=attention"), "lr_warmup_steps": each("3"),
    "warmdown_frac": each("0.9 0"), "warmdown_iters": each("5"),
    "warmdown_seconds": each("540", "MAX_WALLCLOCK_SECONDS=600"),
    "min_lr": [Case("0.5", "WARMDOWN_FRAC=0.9"), Case("0.5", "WARMDOWN_FRAC=0 WARMDOWN_ITERS=5"),
               Case("0.5", "WARMDOWN_FRAC=0 WARMDOWN_SECONDS=540 MAX_WALLCLOCK_SECONDS=600")],
    "matrix_optimizer": each("adamw"), "matrix_lr": each("0.05"), "scalar_lr": each("0.05"),
    "tied_embed_lr": each("0.02"), "embed_lr": each("0.1", "TIE_EMBEDDINGS=0"), "head_lr": beside("0.05", *UNTIED),
    "muon_momentum": each("0.5"), "muon_momentum_warmup_start": each("0.2"), "muon_momentum_warmup_steps": each("0 4"),
    "muon_backend_steps": each("2"), "newton_schulz": each("polar_express"), "muon_row_normalize": each("1"),
    "normuon": each("1"), "muon_beta2": each("0.5", "NORMUON=1"), "muon_wd": each("2"), "adam_wd": each("2"),
    "embed_wd": each("2"), "head_wd": beside("9", *UNTIED), "wd_taper_start_frac": each("0.3", "MUON_WD=2"),
    "wd_taper_final_mult": each("3", "MUON_WD=2 WD_TAPER_START_FRAC=0.3"), "beta1": each("0.5"), "beta2": each("0.5"),
    "matrix_betas": each("0.5,0.5", "MATRIX_OPTIMIZER=adamw"), "embed_betas": each("0.5,0.5"),
    "head_betas": beside("0.5,0.5", *UNTIED), "adam_eps": each("1e-4"), "grad_clip_norm": each("0.01 0"),
    "complement_alpha": each("0.5 1"), "mtp_num_heads": each("1 2"), "mtp_loss_weight": each("0.9", "MTP_NUM_HEADS=1"),

    "average": each("none swa lawa", "", "weights") + each("best", "EMA_DECAY=0.999", "weights"),
    "ema_decay": each("0.9", "", "weights") + each("0.9", "AVERAGE=best", "choice"),
    "ema_start_frac": each("0.5", "", "weights") + each("0.5", "AVERAGE=best", "choice"),
    "swa_every": each("2", "AVERAGE=swa", "weights") + each("2", "AVERAGE=best", "choice"),
    "swa_start_scale": each("0.5", "AVERAGE=swa", "weights") + each("0.5", "AVERAGE=best", "choice"),
    "lawa_freq": each("2", "AVERAGE=lawa", "weights") + each("2", "AVERAGE=best", "choice"),
    "lawa_k": each("3", "AVERAGE=lawa", "weights") + each("3", "AVERAGE=best", "choice"),
    "holdout_tokens": each("900", "AVERAGE=best", "choice"),

    "fit": packs("prune", "SIZE_LIMIT=20000") + packs("allocate", "MATRIX_QUANT=gptq EMBED_QUANT=rtn"),
    "matrix_quant": each("rtn gptq ternary", "", "artifact") + packs("gptq", ALLOCATE),
    "embed_quant": each("rtn gptq ternary", "", "artifact") + packs("gptq", ALLOCATE),
    "matrix_bits": packs("4", *FIXED) + packs("16", ""), "attn_bits": packs("4", *FIXED), "mlp_bits": packs("7", *FIXED),
    "layer_bits": packs("0@8,1@3", *FIXED), "matrix_clip_sigmas": packs("2.5", *FIXED),
    "attn_clip_sigmas": packs("2.5", *FIXED), "mlp_clip_sigmas": packs("2.5", *FIXED),
    "proj_bits": packs("4", *FIXED) + packs("16", ""), "clip_floor": packs("0.5", *EITHER),
    "awq_lite_group_top_k": packs("2", *EITHER), "awq_lite_bits": packs("7", "AWQ_LITE_GROUP_TOP_K=2"),
    "awq_lite_group_size": packs("16", "AWQ_LITE_GROUP_TOP_K=2"),
    "embed_bits": packs("5", *EMBED_FIXED) + packs("16", ""), "embed_clip_sigmas": packs("2.5", *EMBED_FIXED),
    "gate_bits": packs("4", *GATED), "prune_pct": packs("0.2", "", "MATRIX_QUANT=gptq", ALLOCATE),
    "gptq_damp": packs("0.5", *FACTORS), "gptq_act_order": packs("0", *FACTORS),
    "gptq_calibration": packs("generated", *MOMENTS), "gptq_calibration_tokens": packs("1024", *MOMENTS),
    "gptq_temperature": packs("5", "GPTQ_CALIBRATION=generated MATRIX_QUANT=gptq"), "lqer_rank": packs("2", "MATRIX_BITS=3"),
    "lqer_top_k": packs("1", "LQER_RANK=2 MATRIX_BITS=3"), "lqer_asym_group": packs("8", "LQER_RANK=2 MATRIX_BITS=3"),
    "late_qat_threshold": each("0.9", "WARMDOWN_FRAC=0.9"), "qat_rounding": each("soft", "LATE_QAT_THRESHOLD=0.9 WARMDOWN_FRAC=0.9"),
    "size_limit": packs("20000", "FIT=prune", ALLOCATE),

    "eval_seq_len": scores("16", ""), "eval_stride": scores("8", *STREAM), "eval_docs": scores("1", *STREAM),
    "eval_context": scores("cache", "", DOCS), "eval_temperature": scores("0.7", "", *LORA) + scores("0", ""),
    "ttt": each("full lora lora_docs", "", "score") + each("before prequant", "ALLOW_INVALID=1", "score"),
    "ttt_chunk_tokens": scores("256", *FIRST, *COUNTING),
    "ttt_epochs": scores("1", *TTT_STEPS), "ttt_batch_seqs": scores("1", *TTT_STEPS),
    "ttt_optimizer": scores("adamw", *TTT_WEIGHTS), "ttt_lr": scores("0.005", *TTT_WEIGHTS),
    "ttt_min_lr": scores("0.5", *TTT_STEPS),
    "ttt_momentum": scores("0", *TTT_WEIGHTS), "ttt_grad_clip": scores("0.01", *TTT_STEPS) + scores("0", "TTT=full"),
    "ttt_lr_mult_proj": scores("3", *TTT_WEIGHTS), "ttt_lr_mult_fc": scores("0.5", *TTT_WEIGHTS),
    "ttt_freeze_blocks": scores("1", *TTT_WEIGHTS) + scores("2", "TTT=full"),
    "ttt_freeze_embed": scores("1", *TTT_WEIGHTS),
    "ttt_train_scales": scores("1", *(f"{weights} TTT_FREEZE_BLOCKS=2" for weights in TTT_WEIGHTS)),
    "adaptive_lr_max": scores("3", *FIRST), "byte_weighted_ttt": scores("1", *TTT_STEPS),
    "polyak_decay": scores("0.5", *FIRST),
    "ttt_lora_rank": scores("2", *LORA), "ttt_lora_alpha": scores("32", *LORA), "ttt_lora_lr": scores("0.003", *LORA),
    "ttt_lora_targets": each("q k v o attn mlp head", "TTT=lora_docs", "score") + scores(
        "k,o,mlp", *LORA),
    "ttt_lora_scaled": scores("1", *BESIDE_ALL), "ttt_lora_a": scores("own", DOCS, f"{DOCS} TTT_WARM_START_A=1"),
    "ttt_beta1": scores("0", *LORA), "ttt_beta2": scores("0.999", *LORA), "ttt_wd": scores("2", *LORA),
    "ttt_chunk_size": scores("4", DOCS), "ttt_short_chunks": scores("2@8,4@24", DOCS),
    "ttt_warm_start_a": scores("1", DOCS),
    "ttt_group_docs": scores("1", f"{DOCS} TTT_WARM_START_A=1", f"{PHASED} TTT_LORA_A=own", *(f"{DOCS} {counting}" for counting in COUNTING)),
    "phased_ttt_prefix_docs": scores("2", DOCS),
    "phased_ttt_num_phases": scores("2", f"{DOCS} PHASED_TTT_PREFIX_DOCS=4"),
    "mixer": each("backoff hedge", "", "score") + scores("hashed", "ALLOW_INVALID=1"),
    "ngram_order": scores("2", *MIXERS[::2], f"{HEDGE} MIXER_EXPERTS=backoff"),
    "mixer_experts": each("unigram bigram trigram backoff", HEDGE, "score") + scores(
        "entropy", f"{HEDGE} ALLOW_INVALID=1"),
    "mixer_eta": scores("1", HEDGE), "mixer_min_tokens": scores("300", *MIXERS),
    "alpha_base": scores("0.4", BACKOFF, HASHED), "alpha_range": scores("0.1", BACKOFF, HASHED),
    "alpha_center": scores("6", BACKOFF, HASHED), "ngram_buckets": scores("300", HASHED),
    "min_count": scores("1", HASHED), "token_boost": scores("2", ""), "token_order": scores("2", TILT),
    "token_threshold": scores("0.3", TILT),
}
ELSEWHERE = {  # the fields that must not change what is learned, each with the test that says what they do change
    "iterations": "test_iterations_and_the_clock_end_the_run",
    "max_wallclock_seconds": "test_iterations_and_the_clock_end_the_run",
    "micro_batch_tokens": "test_micro_batches_are_smaller_and_more",
    "warmup_steps": "test_warm_up_steps_are_made_and_undone",
    "gptq_block_size": "test_the_block_size_changes_no_weight",
    "gptq_reserve_seconds": "test_the_reserve_ends_training_earlier_and_changes_nothing_else",
    "compressor": "test_the_compressor_changes_the_bytes_and_no_weight",
    "eval_batch_seqs": "test_batches_of_the_score_are_smaller_and_more",
    "ttt_batch_size": "test_batches_of_the_score_are_smaller_and_more",
    "allow_invalid": "test_permission_changes_no_score_that_needs_none",
    "selftest": "test_the_selftest_says_its_lines_and_changes_no_score",
}
ROWS = [(name, case) for name, cases in CASES.items() for case in cases]
NAMES = [f"{name}={case.value}{'+' if case.beside else ''}{case.beside}" for name, case in ROWS]


# Runs


@dataclass
class Trained:
    """What a run left behind, unrounded."""

    s: Settings
    events: list = field(default_factory=list)
    micro: list = field(default_factory=list)  # micro-batches of each step
    norms: list = field(default_factory=list)  # of the gradient of each step, as the optimizer gets it
    weights: dict = field(default_factory=dict)  # to be exported
    temperature: float | None = None

    main = True

    def __call__(self, event, text=None, **values):
        self.events.append((event, values))

    def progress(self, *_):
        pass

    def of(self, event):
        return [values for name, values in self.events if name == event]

    @property
    def losses(self):
        return [row["train_loss"] for row in self.of("train")]

    @property
    def choice(self):
        return self.of("candidates")

    def same(self, other):
        """Bit for bit, as far as either goes."""
        return self.losses == other.losses and self.weights.keys() == other.weights.keys() and all(
            torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())


CACHE = {}


def trained(toy, *changes, backend=None):
    """tg.train with these settings: everything but validation, which no switch of training may depend on."""
    values = {pair.partition("=")[0]: pair for text in (*toy, *BASE, *changes) for pair in text.split()}
    key = (tuple(sorted(values.values())), backend)
    if key not in CACHE:
        CACHE[key] = _train(Settings.parse(list(values.values())), backend)
    return CACHE[key]


class Different(Exception):
    """A loss that is not the expected one."""


@dataclass
class Compared(Trained):
    """A run that ends at the first loss that differs from those expected."""

    expected: list = field(default_factory=list)

    def __call__(self, event, text=None, **values):
        super().__call__(event, text, **values)
        if event == "train" and self.losses != self.expected[: len(self.losses)]:
            raise Different


def differs(toy, changes, losses):
    """Has a training with these settings other losses? It goes no further than to the first one."""
    values = {pair.partition("=")[0]: pair for pair in (*toy, *BASE, *changes)}
    s = Settings.parse(list(values.values()))
    try:
        return _train(s, None, Compared(s, expected=losses)).losses != losses
    except Different:
        return True


def _run(s, result):
    """A run without files, whose log is `result`."""
    run, rt = tg.Run.__new__(tg.Run), tg.Runtime(s, {})
    run.s, run.rt, run.attend, run.log, run.source = s, rt, tg.pick_attention(s, rt), result, b""
    run.out_dir = Path(os.devnull) / "run"  # in which no file can be made
    run.clock, run.validity, run.facts = tg.Clock(), tg.Validity(), {}
    return run


def _train(s, backend, result=None):
    result = result or Trained(s)
    run = _run(s, result)
    rt = run.rt
    if backend:
        rt.compiled = True
        rt.compile = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    model, backward = tg.GPT(s, rt.dtype, run.attend).to(rt.device), tg.Training.backward

    def counted(self, micro):
        result.micro.append(len(micro))
        loss = backward(self, micro)
        result.norms.append(torch.stack([bank.grad.norm() for bank in self.optimizer.banks]).norm().item())
        return loss

    with mock.patch.object(tg, "report_score", lambda *_: tg.Score(0.0, 0.0, 0, 0)), \
            mock.patch.object(tg, "keep_weights", lambda *_: None), mock.patch.object(tg.Training, "backward", counted):
        tg.train(run, model, tg.ValStream(torch.zeros(99, dtype=torch.int32), torch.ones(98), False))
    result.weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    result.temperature = model.temperature
    return result


def packed(toy, *changes):
    """(bytes, weights) of an artifact with these settings. What only packs shares one training."""
    pairs = [pair for text in changes for pair in text.split()]
    s = Settings.parse(list({pair.partition("=")[0]: pair for text in (*toy, *BASE, *pairs) for pair in text.split()}.values()))
    rounds = s.late_qat_threshold > 0
    trains = [pair for pair in pairs if rounds or FIELDS[pair.partition("=")[0].lower()].metadata["group"] != PACKING]
    key = "packed", s
    if key not in CACHE:
        run, weights = _run(s, Trained(s)), trained(toy, *trains).weights
        model = tg.GPT(s, attend=run.attend)
        model.load_state_dict(weights)
        curvature = _curvature(run, model) if s.needs_curvature else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pg"
            tg.save_artifact(path, model, s, curvature=curvature)
            loaded = tg.load_artifact(path, s)[1]
            CACHE[key] = Trained(s, weights={name: p.detach() for name, p in loaded.named_parameters()}), path.read_bytes()
    return CACHE[key]


@dataclass
class Scored:
    """What a run that trains, packs and scores says in the end."""

    s: Settings
    loss: float
    calls: int  # of the predictor
    reasons: list
    events: list


def scored(toy, *changes):
    """A whole run but for its training, which those that only score share."""
    pairs = [pair for text in changes for pair in text.split()]
    s = Settings.parse(list({pair.partition("=")[0]: pair for pair in (*toy, *BASE, *pairs)}.values()))
    key = "scored", s
    if key not in CACHE:
        only = {"VAL_TOKENS", *(name.upper() for name, f in FIELDS.items() if f.metadata["group"] == SCORING)}
        trains = [pair for pair in pairs if pair == "EVAL_TEMPERATURE=0" or pair.partition("=")[0] not in only]
        CACHE[key] = _score(s, trained(toy, *trains))
    return CACHE[key]


def _score(s, before):
    runs, calls, inner = [], [], tg.ModelPredictor._run

    def train(run, model, val):
        model.load_state_dict(before.weights)
        model.temperature = before.temperature

    def counted(self, *args):
        calls.append(args[0].shape)
        return inner(self, *args)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.object(tg, "train", train), mock.patch.object(tg, "log_header", lambda *_: None), \
            mock.patch.object(tg, "summarise", runs.append), mock.patch.object(tg.ModelPredictor, "_run", counted):
        tg.run_phases(tg.replace(s, out_dir=folder), [])
        said = events(folder)
    return Scored(s, runs[0].facts["val_loss"], len(calls), runs[0].validity.reasons, said)


def _curvature(run, model):
    """Of calibrate(), which few of the settings say anything about."""
    s = run.s
    key = "moments", s.gptq_calibration, s.gptq_calibration_tokens, s.gptq_temperature, s.attn_gate, s.late_qat_threshold
    if key not in CACHE:
        CACHE[key] = tg.Training(run, model).calibrate()
    return CACHE[key]


@pytest.fixture(autouse=True, scope="module")
def many_graphs():
    """One cache of graphs for all runs here: a graph is traced again only where a switch really makes another."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6):
        yield
    CACHE.clear()
    torch._dynamo.reset()


@pytest.fixture
def fresh(monkeypatch):
    """Nothing from earlier runs, and nothing for later ones."""
    monkeypatch.setattr(f"{__name__}.CACHE", {})


# The check


def flip(name, case):
    return case.beside, f"{name.upper()}={case.value}"


def alive(toy, name, case):
    """The switch changes what its case says, and nothing that comes before."""
    if case.shows == "artifact":
        (plain, _), (changed, _) = packed(toy, case.beside), packed(toy, *flip(name, case))
    elif case.shows == "score":
        plain, changed = scored(toy, case.beside), scored(toy, *flip(name, case))
    else:
        plain, changed = trained(toy, case.beside), trained(toy, *flip(name, case))
    change = " ".join(flip(name, case)).strip()
    assert getattr(plain.s, name) != getattr(changed.s, name), f"{change} is what the run has without it"
    assert name.upper() not in changed.s.idle(), changed.s.idle()
    if case.shows == "artifact":
        apart = max((changed.weights[n] - w).abs().max().item() for n, w in plain.weights.items())
        assert apart > 1e-5, f"{change}: the weights of the artifact differ by {apart}"
        return
    if case.shows == "score":
        far = abs(plain.loss - changed.loss)
        assert far > 1e-5, f"{change}: the scores differ by {far}"
        return
    assert len(plain.losses) == len(changed.losses) == 6
    far = max(abs(a - b) for a, b in zip(plain.losses, changed.losses))
    if case.shows == "loss":
        assert far > 2e-6, f"{change}: the losses differ by {far}"
        return
    assert far == 0, f"{change}: an average must not disturb the training"
    if case.shows == "choice":
        assert plain.choice and changed.choice and plain.choice != changed.choice, f"{change}: the same choice"
    else:
        apart = max((changed.weights[n] - w).abs().max().item() for n, w in plain.weights.items())
        assert apart > 1e-5, f"{change}: the exported weights differ by {apart}"


@pytest.mark.parametrize("name, case", ROWS, ids=NAMES)
def test_a_switch_changes_what_it_should(toy, name, case):
    alive(toy, name, case)


def all_that_is_read_later(toy):
    """Words that change every setting that is read after the last step, as far as they go together."""
    words = {}
    for name, cases in CASES.items():
        value, companions, _ = cases[0]
        more = dict(pair.split("=", 1) for pair in [*companions.split(), f"{name.upper()}={value}"])
        rooms = {FIELDS[key.lower()].metadata["group"] for key in more}
        if not rooms <= {PACKING, SCORING} or name in ("late_qat_threshold", "qat_rounding"):
            continue
        together = words | {key: text for key, text in more.items() if key not in words}
        with contextlib.suppress(tg.BadInput):
            Settings.parse([*toy, *BASE, *(f"{key}={text}" for key, text in together.items())])
            words = together
    return words


def test_what_is_read_after_the_last_step_changes_no_weight(toy):
    """Settings.experiment("train") leaves out only what the trained weights do not depend on."""
    words = all_that_is_read_later(toy)
    assert len(words) > 75
    plain, changed = trained(toy), trained(toy, *(f"{key}={text}" for key, text in words.items()))
    assert not words.keys() & changed.s.experiment("train").keys()
    assert plain.same(changed) and len(plain.losses) == 6


def test_phases_of_an_experiment():
    """What each phase reads, by settings that make it read more."""
    def names(phase, *words):
        return Settings.parse(words).experiment(phase).keys()

    everything = names("eval")
    training, packing = names("train"), names("export")
    assert training < packing < everything
    assert {"MATRIX_LR", "DATA_PATH", "AVERAGE", "LATE_QAT_THRESHOLD"} <= training
    assert {"MATRIX_BITS", "GPTQ_CALIBRATION", "SIZE_LIMIT", "COMPRESSOR"} <= packing - training
    assert {"EVAL_STRIDE", "TTT", "MIXER", "EVAL_TEMPERATURE", "SELFTEST"} <= everything - packing
    late_qat = names("train", "LATE_QAT_THRESHOLD=0.2")
    assert late_qat == packing
    assert names("train", "LOADER=packed", "DOC_MASK=attention") == training | {"EVAL_SEQ_LEN"}
    assert names("export", "EVAL_TEMPERATURE=0") == packing | {"EVAL_TEMPERATURE"}
    assert names("export", "AVERAGE=best", "HOLDOUT_TOKENS=9999") == packing | {"EVAL_SEQ_LEN"}
    assert names("export", "TTT=prequant", "ALLOW_INVALID=1") == everything


# Compiled: capturing a graph takes a second, so many switches share one run. Which can: no two may set the same field,
# none may be idle beside the others, and of those that replace each other only one can be seen.
REPLACE = [{"train_batch_tokens", "train_batch_schedule"}, {"train_seq_len", "train_seq_schedule"},
           {"warmdown_frac", "warmdown_iters", "warmdown_seconds"}, {"muon_momentum_warmup_start",
           "muon_momentum_warmup_steps"}, {"wd_taper_start_frac", "muon_wd", "wd_taper_final_mult"}]
IN_THE_GRAPH = {name for name, f in FIELDS.items() if f.metadata["group"] == "Model"} | {
    "matrix_optimizer", "muon_backend_steps", "newton_schulz", "muon_row_normalize", "loader", "complement_alpha",
    "mtp_num_heads", "mtp_loss_weight", "late_qat_threshold", "qat_rounding"}


def pairs_of(*rows):
    """{field: value} of runs that have all these cases, or None where they cannot be had together."""
    flips, together = {}, {}
    for name, case in rows:
        for pair in case.beside.split():
            other, _, value = pair.partition("=")
            if together.setdefault(other.lower(), value) != value and other.lower() != name:
                return None
        replaced = set().union(*(names - {name} for names in REPLACE if name in names))
        if flips.setdefault(name, case.value) != case.value or replaced & set(flips):
            return None
    own = {name for name, case in rows if f"{name.upper()}=" in case.beside}
    return None if set(flips) & set(together) - own else together | flips


def shared_runs():
    """[rows] that can be tried in one run, each value once."""
    runs, rows = [], [(name, case) for name, case in reversed(ROWS) if case.shows not in ("artifact", "score")]
    for row in {(name, case.value): (name, case) for name, case in rows}.values():
        runs.append(next((rows for rows in runs if fits(pairs_of(*rows, row), [*rows, row])), None) or [])
        runs[-1].append(row)
        runs = [rows for i, rows in enumerate(runs) if not any(rows is other for other in runs[:i])]
    return runs


def fits(values, rows):
    try:
        s = values and Settings.parse([*BASE, *(f"{name.upper()}={value}" for name, value in values.items())])
    except tg.BadInput:
        return False
    return bool(s) and not {name.upper() for name, _ in rows} & set(s.idle())


SHARED = shared_runs()


def written(values):
    return [f"{name.upper()}={value}" for name, value in values.items()]


@pytest.mark.parametrize("rows", SHARED, ids=range(len(SHARED)))
def test_switches_do_the_same_in_the_compiled_graph(toy, rows):
    """What is alive eagerly is alive compiled if both give the same numbers; eagerly each is alive among the others.

    The graph is captured whole as for a GPU and then run without code generation, so the numbers are nearly the same.
    """
    values = pairs_of(*rows)
    eager = trained(toy, *written(values))
    compiled = trained(toy, *written(values), backend="eager")
    assert len(eager.losses) == 6 and compiled.losses == pytest.approx(eager.losses, rel=1e-6)
    assert all(torch.allclose(compiled.weights[n], w, rtol=1e-4, atol=1e-6) for n, w in eager.weights.items())
    for name, case in rows if len(rows) > 1 else ():
        if name in IN_THE_GRAPH:
            without = {n: v for n, v in values.items() if n != name} | dict(
                (p.partition("=")[0].lower(), p.partition("=")[2]) for p in case.beside.split())
            assert differs(toy, written(without), eager.losses), f"{name} is not seen among the others"


# The table


def advised_case(name):
    """A line for CASES, to begin with: other values of a setting, and its first condition if that is not met."""
    f, base = FIELDS[name], Settings.parse(BASE)
    if get_origin(f.type) is Literal:
        values = " ".join(choice for choice in get_args(f.type) if choice != getattr(base, name))
    elif f.type is bool:
        values = str(int(not f.default))
    else:
        values = "another value"
    condition = ""
    if f.metadata["on"] and not base.holds(f.metadata["on"]):
        (other, values_that_wake), *_ = ref.alternatives(f.metadata["on"])[0]
        condition = f"{other.upper()}={values_that_wake[0] if values_that_wake else 'a value that is not 0'}"
    shows = {PACKING: "artifact", SCORING: "score", "Averaging": "weights"}.get(f.metadata["group"], "loss")
    return f'"{name}": each("{values}", "{condition}", "{shows}"),'


def test_every_field_of_training_has_a_case():
    missing = sorted(set(FIELDS) - set(CASES) - set(ELSEWHERE))
    assert not missing, (
        f"nothing proves that {', '.join(map(str.upper, missing))} changes anything. Add to CASES in "
        f"tests/test_liveness.py:\n    " + "\n    ".join(map(advised_case, missing)) +
        "\nor, for a setting that is only about speed or limits, add it to ELSEWHERE with the test of what it changes")
    gone = sorted((set(CASES) | set(ELSEWHERE)) - set(FIELDS))
    assert not gone, f"Settings has no {', '.join(gone)}: remove the lines from CASES or ELSEWHERE"
    unknown = sorted(set(ELSEWHERE.values()) - set(globals()))
    assert not unknown, f"ELSEWHERE names tests that are not in tests/test_liveness.py: {unknown}"


def test_a_setting_without_a_case_is_named_with_the_line_to_add(monkeypatch):
    for name, line in (("newton_schulz", '"newton_schulz": each("polar_express", "", "loss"),'),
                       ("embed_bits", '"embed_bits": each("another value", "", "artifact"),'),
                       ("ttt_warm_start_a", '"ttt_warm_start_a": each("1", "TTT=lora_docs", "score"),')):
        with monkeypatch.context() as patch, pytest.raises(AssertionError) as error:
            patch.delitem(CASES, name)
            test_every_field_of_training_has_a_case()
        assert f"nothing proves that {name.upper()} changes" in str(error.value) and line in str(error.value)


def test_every_choice_is_tried():
    base = Settings.parse(BASE)
    for name, f in FIELDS.items():
        if name in ELSEWHERE:
            continue
        if get_origin(f.type) is Literal:
            tried = {case.value for case in CASES[name]} | {getattr(base, name)}
            untried = set(get_args(f.type)) - tried
            assert not untried, f"{name.upper()}: CASES in tests/test_liveness.py tries no {', '.join(untried)}"
            assert tried <= set(get_args(f.type)), f"{name.upper()}: CASES tries what is no choice"
        elif f.type is bool:
            only = not f.default
            assert {tg.parse_value(f, case.value) for case in CASES[name]} == {only}, (
                f"{name.upper()}: CASES in tests/test_liveness.py has to try {int(only)}")


WAITING = [name for name, f in FIELDS.items() if f.metadata["on"]]


@pytest.mark.parametrize("name", [name for name in WAITING if name not in ELSEWHERE])
def test_every_condition_that_wakes_a_setting_is_tried(name):
    rule, runs = FIELDS[name].metadata["on"], [Settings.parse([*BASE, *case.beside.split()]) for case in CASES[name]]
    for alternative, conditions in zip(rule, ref.alternatives(rule)):
        alone = [s for s in runs if s.holds((alternative,)) and sum(s.holds((other,)) for other in rule) == 1]
        for other, values in conditions:
            for value in values:
                met = [s for s in alone if value in tg.format_value(getattr(s, other)).split(",")]
                assert met, f"no case wakes {name.upper()} by {other.upper()}={value} alone: add one to CASES[{name!r}]"
            assert alone, f"no case wakes {name.upper()} by {other.upper()} alone: add one to CASES[{name!r}]"


OFF = {"none": "none", bool: "0", int: "0", float: "0", tuple: ""}


def unmet(name):
    """Settings under each of which none of a field's conditions holds: of those joined by & one is not met."""
    alternatives = ref.alternatives(FIELDS[name].metadata["on"])
    for which in range(max(map(len, alternatives))):
        pairs = []
        for conditions in alternatives:
            other, values = conditions[min(which, len(conditions) - 1)]
            f = FIELDS[other]
            if values:
                off = next(value for value in ref.typed_choices(f) if value not in values)
            else:
                off = OFF[get_origin(f.type) or f.type]
            pairs.append(f"{other.upper()}={off}")
        if "FIT=allocate" in pairs:
            pairs += [f"{kind}_QUANT=gptq" for kind in ("MATRIX", "EMBED")]
        yield " ".join(pairs)


@pytest.mark.parametrize("name, off", [(name, off) for name in WAITING if name != "gptq_reserve_seconds" for off in unmet(name)])
def test_a_setting_whose_condition_is_not_met_is_named_and_changes_not_one_bit(toy, name, off):
    """So what `on` says is the truth: no less (the cases above) and no more than these conditions."""
    value = f"{name.upper()}={CASES[name][0].value if name in CASES else 7}"
    if FIELDS[name].metadata["group"] == PACKING:
        (plain, before), (idle, after) = packed(toy, off), packed(toy, off, value)
        assert before == after
    elif FIELDS[name].metadata["group"] == SCORING or name == "asym_logit_rescale":  # two parameters more, all the same
        plain, idle = scored(toy, off), scored(toy, off, value)
        assert name.upper() in idle.s.idle() and idle.loss == plain.loss
        return
    else:
        plain, idle = trained(toy, off), trained(toy, off, value)
    assert getattr(plain.s, name) != getattr(idle.s, name)
    assert name.upper() in idle.s.idle() and idle.same(plain)


COMPANY = {  # ways to score, and what has no effect there though idle() does not go so far as to say it
    "TTT=full": (), "TTT=before ALLOW_INVALID=1": (), DOCS: (), f"{DOCS} TTT_WARM_START_A=1": (), PHASED: (),
    f"{DOCS} {BACKOFF}": ("ttt_chunk_tokens",), f"{DOCS} {TILT}": ("ttt_chunk_tokens",), HASHED: (),
    HEDGE: ("ngram_order",), f"{HEDGE} MIXER_EXPERTS=backoff": (),
}


@pytest.mark.parametrize("beside, known", COMPANY.items(), ids=COMPANY)
def test_idle_says_the_truth_beside_any_way_to_score(toy, beside, known):
    """All settings that it names change nothing together, and each of the others something."""
    beside += " VAL_TOKENS=400 TTT_CHUNK_TOKENS=64 TTT_GROUP_DOCS=2 ALLOW_INVALID=1"
    plain, named, dead = scored(toy, beside), [], []
    for name, cases in CASES.items():
        if not FIELDS[name].metadata["on"] or FIELDS[name].metadata["group"] != SCORING or name in known:
            continue
        read, values = functools.partial(tg.parse_value, FIELDS[name]), [*(case.value for case in cases), "0"]
        value = next(value for value in values if read(value) != getattr(plain.s, name))
        change = f"{name.upper()}={value}"
        if name.upper() in tg.replace(plain.s, **{name: read(value)}).idle():
            named.append(change)
        elif abs(scored(toy, beside, change).loss - plain.loss) < 1e-6:
            dead.append(name)
    idle = scored(toy, beside, *named)
    assert not dead and idle.loss == plain.loss
    assert {change.partition("=")[0] for change in named} <= idle.s.idle().keys()


# What is only about speed and limits


def test_iterations_and_the_clock_end_the_run(toy):
    assert [len(trained(toy, f"ITERATIONS={n}").losses) for n in (4, 6, 9)] == [4, 6, 9]
    assert trained(toy, "MAX_WALLCLOCK_SECONDS=1e-9").micro == []
    assert trained(toy, "MAX_WALLCLOCK_SECONDS=1e9").same(trained(toy)), "a limit that is far away changes nothing"


@pytest.mark.parametrize("tokens, parts", [(256, 1), (64, 4), (32, 8)])
def test_micro_batches_are_smaller_and_more(toy, tokens, parts):
    plain, changed = trained(toy), trained(toy, f"MICRO_BATCH_TOKENS={tokens}")
    assert set(plain.micro) == {2} and set(changed.micro) == {parts}
    assert changed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert changed.norms == pytest.approx(plain.norms, rel=1e-4), "their gradients are averaged, not summed"


@pytest.mark.parametrize("beside", [*FACTORS, ALLOCATE])
def test_the_block_size_changes_no_weight(toy, beside):
    (plain, before), (changed, after) = packed(toy, beside), packed(toy, beside, "GPTQ_BLOCK_SIZE=7")
    near = [(changed.weights[n] != w).float().mean().item() for n, w in plain.weights.items()]
    assert max(near) < 0.02, "but for what is next to a tie"
    assert ("GPTQ_BLOCK_SIZE" in changed.s.idle()) == (beside == ALLOCATE) and (before == after or beside != ALLOCATE)


def test_the_reserve_ends_training_earlier_and_changes_nothing_else(toy, monkeypatch):
    """Kept of the clock: a run of 600 seconds that keeps 599.99999999 for its calibration makes no step; one second, all."""
    steps = [len(trained(toy, "MATRIX_QUANT=gptq MAX_WALLCLOCK_SECONDS=600", f"GPTQ_RESERVE_SECONDS={seconds}").micro)
             for seconds in (1, 599.99999999)]
    assert steps == [6, 0]
    idle = trained(toy, "MAX_WALLCLOCK_SECONDS=600 GPTQ_RESERVE_SECONDS=599.99999999")
    assert idle.same(trained(toy, "MAX_WALLCLOCK_SECONDS=600")) and "GPTQ_RESERVE_SECONDS" in idle.s.idle()


@pytest.mark.parametrize("beside", ["", ALLOCATE.replace("25000", "10000000")])
def test_the_compressor_changes_the_bytes_and_no_weight(toy, beside):
    found = [packed(toy, beside, f"COMPRESSOR={name}") for name in ("zlib", "lzma", "zstd", "brotli", "rans")]
    assert all(one.same(found[0][0]) for one, _ in found) and len({data for _, data in found}) == 5


@pytest.mark.parametrize("changes", ["", "NUM_LOOPS=1", "NORMUON=1 MTP_NUM_HEADS=1 COMPLEMENT_ALPHA=0.5",
                                     "TRAIN_SEQ_SCHEDULE=16@0.5,32@1", "LOADER=coprime MATRIX_OPTIMIZER=adamw"])
def test_warm_up_steps_are_made_and_undone(toy, changes):
    plain, warm = trained(toy, changes), trained(toy, changes, "WARMUP_STEPS=2")
    assert warm.same(plain)
    assert len(warm.micro) == len(plain.micro) + 2 * warm.of("warmup")[0]["graphs"] and not plain.of("warmup")


@pytest.mark.parametrize("name, values, beside", [
    ("eval_batch_seqs", (1, 3, 32), ("", "EVAL_STRIDE=8", "EVAL_DOCS=1 EVAL_CONTEXT=cache", "TTT=full",
                                     f"{HEDGE} EVAL_STRIDE=8")),
    ("ttt_batch_size", (1, 2, 64), (DOCS, f"{DOCS} EVAL_CONTEXT=cache TTT_WARM_START_A=1", f"{PHASED} {HEDGE}"))])
def test_batches_of_the_score_are_smaller_and_more(toy, name, values, beside, monkeypatch):
    monkeypatch.setattr(tg.Examiner, "_look", lambda *_: None)  # it calls the predictor as often as chance has it
    for changes in beside:
        runs = [scored(toy, changes, f"{name.upper()}={value}") for value in values]
        assert all(run.loss == pytest.approx(runs[0].loss, rel=1e-5) for run in runs)
        assert runs[0].calls > runs[1].calls > runs[2].calls


def test_permission_changes_no_score_that_needs_none(toy):
    for changes in ("", "TTT=full", HEDGE):
        plain, allowed = scored(toy, changes), scored(toy, changes, "ALLOW_INVALID=1")
        assert allowed.loss == plain.loss and allowed.reasons == plain.reasons == []
    for changes in (TTT_BASE[1], HASHED):
        assert scored(toy, changes).reasons
        with pytest.raises(tg.BadInput, match="ALLOW_INVALID=1"):
            scored(toy, changes.replace("ALLOW_INVALID=1", "ALLOW_INVALID=0"))


@pytest.mark.parametrize("changes", ["", "TTT=lora", f"{DOCS} {HEDGE} {TILT}", HASHED])
def test_the_selftest_says_its_lines_and_changes_no_score(toy, changes):
    plain, tested = scored(toy, changes), scored(toy, changes, "SELFTEST=1")
    said = {event["test"]: event["ok"] for event in tested.events if event["event"] == "selftest"}
    assert said == {"flip": "yes", "prefix": "yes", "sum": "no" if changes == HASHED else "yes", "ends": "yes"}
    assert tested.loss == plain.loss and not any(event["event"] == "selftest" for event in plain.events)
    assert bool(tested.reasons) == (changes == HASHED)


# This check finds what is dead

DEAD = {
    "xsa_last_n": ("xsa", lambda y, v: y),
    "skips": ("Skips.forward", lambda self, x, kept, pair: x),
    "smear_gate": ("SmearGate.forward", lambda self, x, docs: x),
    "value_residual": ("ValueResidual.forward", lambda self, v, v0: v),
    "attn_gate": ("HeadGate.forward", lambda self, x: x.new_ones(*x.shape[:2], len(self.weight), 1)),
    "num_loops": ("GPT.plan", property(lambda self: self.plans[0])),
    "normuon": ("normuon", lambda update, moment, beta2: update),
    "wd_taper_start_frac": ("wd_scale", lambda s, progress: 1.0),
    "min_lr": ("lr_scale", lambda s, *_: 1.0),
    "complement_alpha": ("Complement.weights", lambda self, micro: [torch.ones(x.shape) for x, *_ in micro]),
    "ema_decay": ("Average.mean", lambda self, kind: None),
    "lawa_k": ("Average.apply", lambda self, weights: None),
    "grad_clip_norm": ("MuonAdam._clip", lambda self, grads: None),
    "loader": ("TokenStream.sequence", lambda self, position, length: self.read(position, length + 1)),
    "late_qat_threshold": ("LateQAT.switch", lambda self, on: None),
    "qat_rounding": ("FakeQuant.forward", lambda self, weight: weight),
    "lqer_rank": ("Quantiser._add_lqer", lambda self, done: None),
    "size_limit": ("allocate", lambda quantiser, packed_of, *_: packed_of(quantiser.encode(1e-3))),
    "token_boost": ("Tilt._hints", lambda self, inputs: torch.full_like(inputs.places, -1)),
    "alpha_base": ("ngram_weight", lambda s, log_probs: torch.full(log_probs.shape[:2], 0.5, dtype=torch.float64)),
    "ttt_min_lr": ("ttt_lr_scale", lambda s, progress: 1.0),
    "ttt_lora_alpha": ("lora", lambda a, b, scale, x, true=tg.lora: true(a, b, 1.0, x)),
    "ttt_warm_start_a": ("DocumentAdapters.learn", lambda self, part, stream: None),
    "phased_ttt_prefix_docs": ("DocumentAdapters._train_weights", lambda self, stream, targets, epochs: None),
    "parallel_first_skip": ("layer_plan", lambda s, looping, true=tg.layer_plan: [
        visit._replace(split=visit.split and "after_skip") for visit in true(s, looping)]),
    "asym_logit_rescale": ("GPT.cap_of", lambda self, logits: self.softcap),
    "awq_lite_group_top_k": ("awq_lite_groups", lambda weights, inputs, size, count: {}),
    "ttt_lora_scaled": ("add_adapter", lambda y, adapter, x, scale=None: y if adapter is None else y + adapter(x)),
    "ttt_lora_a": ("DocumentAdapters._begin", lambda self, rows: self.start.expand(rows, -1).clone()),
    "gptq_act_order": ("factor_hessian", lambda curvature, damp, act_order, true=tg.factor_hessian: true(curvature, damp, True)),
}


@pytest.mark.parametrize("name", DEAD)
def test_a_technique_that_does_nothing_is_found(toy, monkeypatch, fresh, name):
    """With its code cut out, each of these checks has to fail; the same code left alone passes it above."""
    where, nothing = DEAD[name]
    owner, _, attribute = where.rpartition(".")
    monkeypatch.setattr(getattr(tg, owner) if owner else tg, attribute, nothing)
    with pytest.raises(AssertionError, match="differ by 0|differ by [0-9.]+e-"):
        for case in CASES[name]:
            if not (name in ("smear_gate", "skips") and case.value != "none"):
                alive(toy, name, case)


def test_a_switch_that_is_lost_in_the_graph_is_found(toy, monkeypatch, fresh):
    """The mistake of published scripts: a flag that tracing froze, alive eagerly and dead compiled."""
    plan = tg.GPT.plan.fget
    monkeypatch.setattr(tg.GPT, "plan", property(
        lambda self: self.plans[0] if torch.compiler.is_compiling() else plan(self)))
    (case,) = [case for case in CASES["num_loops"] if case.value == "1"]
    alive(toy, "num_loops", case)
    with pytest.raises(AssertionError):
        test_switches_do_the_same_in_the_compiled_graph(toy, [("num_loops", case)])


@pytest.mark.slow
def test_generated_code_learns_the_same(toy):
    """A few techniques at once through the real compiler: the losses are the eager ones up to rounding."""
    changes = ("NUM_LAYERS=1 ITERATIONS=3 VE_LAYERS=0 LOOP_END=0 ATTN_GATE=sparse PARALLEL_RESIDUAL=routed "
               "PARALLEL_START_LAYER=0 SMEAR_GATE=scalar TRIGRAM=1 MTP_NUM_HEADS=1 COMPLEMENT_ALPHA=0.5 "
               "MATRIX_OPTIMIZER=adamw")
    eager, compiled = trained(toy, changes), trained(toy, changes, backend="inductor")
    # 1.2e-5 on a CPU whose vectors have another width than those of the others
    assert len(eager.losses) == 3 and compiled.losses == pytest.approx(eager.losses, rel=3e-5)
