"""No switch is dead: the table of settings itself says what is tried, so a new one without a case fails here.

Every field of the rooms Model, Training and Averaging is changed in a real training of six steps, eager and compiled;
every field of Quantisation and packing in an artifact of such a training, calibrated as its settings say. Its case says
where that has to show: in the losses, in the exported weights alone, in the choice of weights, in what the artifact
holds, or elsewhere for what is only about speed and limits. Where a field waits for another one (`on`), its cases meet every
condition; without any of them the run must be bit for bit the one without the field, and Settings.idle() must name it.
"""

import functools
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin
from unittest import mock

import pytest
import torch

import train_gpt as tg
from train_gpt import Settings

PACKING = "Quantisation and packing"
ROOMS = ("Model", "Training", "Averaging", PACKING)
FIELDS = {f.name: f for f in fields(Settings) if f.metadata["room"] in ROOMS}
BASE = """DEVICE=cpu COMPRESSOR=zlib FIT=off MATRIX_QUANT=gptq_lite EMBED_QUANT=gptq_lite WARMUP_STEPS=0 ITERATIONS=6 NUM_LAYERS=2 XSA_LAST_N=1 VE_LAYERS=1 TRAIN_SEQ_LEN=32
EVAL_SEQ_LEN=32 EVAL_STRIDE=0 TRAIN_BATCH_TOKENS=256 MICRO_BATCH_TOKENS=128 PARALLEL_START_LAYER=1 LOOP_START=0
LOOP_END=1
SWA_EVERY=1 SWA_START_SCALE=1 LAWA_FREQ=1 LAWA_K=2 HOLDOUT_TOKENS=300 GPTQ_CALIBRATION_TOKENS=512""".split()


class Case(NamedTuple):
    value: str
    beside: str = ""  # the settings beside it, in the run it is compared with, too
    shows: Literal["loss", "weights", "choice", "artifact"] = "loss"


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
MOMENTS = *FACTORS, ALLOCATE, "LQER_RANK=2 MATRIX_BITS=3"
GATED = "ATTN_GATE=head", "ATTN_GATE=dense", "ATTN_GATE=sparse"
packs = functools.partial(beside, shows="artifact")

CASES = {
    "num_layers": each("3"), "model_dim": each("48"), "num_heads": each("2"), "num_kv_heads": each("1 4"),
    "mlp_mult": each("2"), "leaky_slope": each("0 0.3"), "logit_softcap": each("1 0", "LOGIT_SOFTCAP=2"),
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
    "embed_bits": packs("5", *EMBED_FIXED) + packs("16", ""), "embed_clip_sigmas": packs("2.5", *EMBED_FIXED),
    "gate_bits": packs("4", *GATED), "prune_pct": packs("0.2", "", "MATRIX_QUANT=gptq", ALLOCATE),
    "gptq_damp": packs("0.5", *FACTORS), "gptq_act_order": packs("0", *FACTORS),
    "gptq_calibration": packs("generated", *MOMENTS), "gptq_calibration_tokens": packs("1024", *MOMENTS),
    "gptq_temperature": packs("5", "GPTQ_CALIBRATION=generated MATRIX_QUANT=gptq"), "lqer_rank": packs("2", "MATRIX_BITS=3"),
    "lqer_top_k": packs("1", "LQER_RANK=2 MATRIX_BITS=3"), "lqer_asym_group": packs("8", "LQER_RANK=2 MATRIX_BITS=3"),
    "late_qat_threshold": each("0.9", "WARMDOWN_FRAC=0.9"), "qat_rounding": each("soft", "LATE_QAT_THRESHOLD=0.9 WARMDOWN_FRAC=0.9"),
    "size_limit": packs("20000", "FIT=prune", ALLOCATE),
}
ELSEWHERE = {  # the fields that must not change what is learned, each with the test that says what they do change
    "iterations": "test_iterations_and_the_clock_end_the_run",
    "max_wallclock_seconds": "test_iterations_and_the_clock_end_the_run",
    "micro_batch_tokens": "test_micro_batches_are_smaller_and_more",
    "warmup_steps": "test_warm_up_steps_are_made_and_undone",
    "gptq_block_size": "test_the_block_size_changes_no_weight",
    "gptq_reserve_seconds": "test_the_reserve_ends_training_earlier_and_changes_nothing_else",
    "compressor": "test_the_compressor_changes_the_bytes_and_no_weight",
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
    weights: dict = field(default_factory=dict)  # to be exported

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


def _run(s, result):
    """A run without files, whose log is `result`."""
    run, rt = tg.Run.__new__(tg.Run), tg.Runtime(s, {})
    run.s, run.rt, run.out_dir, run.attend, run.log, run.source = s, rt, Path("nowhere"), tg.pick_attention(s, rt), result, b""
    run.clock, run.validity, run.facts = tg.Clock(), tg.Validity(), {}
    return run


def _train(s, backend):
    result = Trained(s)
    run = _run(s, result)
    rt = run.rt
    if backend:
        rt.compiled = True
        rt.compile = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    model, backward = tg.GPT(s, rt.dtype, run.attend).to(rt.device), tg.Training.backward

    def counted(self, micro):
        result.micro.append(len(micro))
        return backward(self, micro)

    with mock.patch.object(tg, "report_score", lambda *_: tg.Score(0.0, 0.0, 0, 0)), \
            mock.patch.object(tg.Training, "backward", counted):
        tg.train(run, model, tg.ValStream(torch.zeros(99, dtype=torch.int32), torch.ones(98), False))
    result.weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return result


def packed(toy, *changes):
    """(bytes, weights) of an artifact with these settings. What only packs shares one training."""
    pairs = [pair for text in changes for pair in text.split()]
    s = Settings.parse(list({pair.partition("=")[0]: pair for text in (*toy, *BASE, *pairs) for pair in text.split()}.values()))
    rounds = s.late_qat_threshold > 0
    trains = [pair for pair in pairs if rounds or FIELDS[pair.partition("=")[0].lower()].metadata["room"] != PACKING]
    key = "packed", s
    if key not in CACHE:
        run, weights = _run(s, Trained(s)), trained(toy, *trains).weights
        model = tg.GPT(s, attend=run.attend)
        model.load_state_dict(weights)
        moments = _moments(run, model) if s.needs_moments else None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pg"
            tg.save_artifact(path, model, s, moments=moments)
            loaded = tg.load_artifact(path, s)[1]
            CACHE[key] = Trained(s, weights={name: p.detach() for name, p in loaded.named_parameters()}), path.read_bytes()
    return CACHE[key]


def _moments(run, model):
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
    else:
        plain, changed = trained(toy, case.beside), trained(toy, *flip(name, case))
    assert getattr(plain.s, name) != getattr(changed.s, name), "the case changes nothing to begin with"
    assert name.upper() not in changed.s.idle(), changed.s.idle()
    if case.shows == "artifact":
        apart = max((changed.weights[n] - w).abs().max().item() for n, w in plain.weights.items())
        assert apart > 1e-5, f"the weights of the artifact differ by {apart}"
        return
    assert len(plain.losses) == len(changed.losses) == 6
    far = max(abs(a - b) for a, b in zip(plain.losses, changed.losses))
    if case.shows == "loss":
        assert far > 2e-6, f"the losses differ by {far}"
        return
    assert far == 0, "an average must not disturb the training"
    if case.shows == "choice":
        assert plain.choice and changed.choice and plain.choice != changed.choice
    else:
        apart = max((changed.weights[n] - w).abs().max().item() for n, w in plain.weights.items())
        assert apart > 1e-5, f"the exported weights differ by {apart}"


@pytest.mark.parametrize("name, case", ROWS, ids=NAMES)
def test_a_switch_changes_what_it_should(toy, name, case):
    alive(toy, name, case)


# Compiled: capturing a graph takes a second, so many switches share one run. Which can: no two may set the same field,
# none may be idle beside the others, and of those that replace each other only one can be seen.
REPLACE = [{"train_batch_tokens", "train_batch_schedule"}, {"train_seq_len", "train_seq_schedule"},
           {"warmdown_frac", "warmdown_iters", "warmdown_seconds"}, {"muon_momentum_warmup_start",
           "muon_momentum_warmup_steps"}, {"wd_taper_start_frac", "muon_wd", "wd_taper_final_mult"}]
IN_THE_GRAPH = {name for name, f in FIELDS.items() if f.metadata["room"] == "Model"} | {
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
    runs = []
    for row in {(name, case.value): (name, case) for name, case in reversed(ROWS) if case.shows != "artifact"}.values():
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
            assert trained(toy, *written(without)).losses != eager.losses, f"{name} is not seen among the others"


# The table


def test_every_field_of_training_has_a_case():
    assert not set(FIELDS) - set(CASES) - set(ELSEWHERE), "settings that nothing proves alive"
    assert not (set(CASES) | set(ELSEWHERE)) - set(FIELDS), "cases of settings that are gone"
    assert set(ELSEWHERE.values()) <= set(globals())


def test_every_choice_is_tried():
    base = Settings.parse(BASE)
    for name, f in FIELDS.items():
        if name in ELSEWHERE:
            continue
        if get_origin(f.type) is Literal:
            tried = {case.value for case in CASES[name]} | {getattr(base, name)}
            assert tried == set(get_args(f.type)), name
        elif f.type is bool:
            assert {tg._convert(f, case.value) for case in CASES[name]} == {not f.default}, name


def conditions(part):
    """[(field, value or None for anything but 0)] of one part of an `on` rule, whose conditions are joined by &."""
    for condition in part.split("&"):
        name, equals, values = condition.partition("=")
        yield from ((name, value) for value in values.split("|")) if equals else [(name, None)]


WAITING = [name for name, f in FIELDS.items() if f.metadata["on"]]


@pytest.mark.parametrize("name", [name for name in WAITING if name not in ELSEWHERE])
def test_every_condition_that_wakes_a_setting_is_tried(name):
    runs, parts = [Settings.parse([*BASE, *case.beside.split()]) for case in CASES[name]], FIELDS[name].metadata["on"].split(",")
    for part in parts:
        for other, value in conditions(part):
            met = [s for s in runs if s.holds(part) and (value is None or str(getattr(s, other)) == value)]
            alone = [s for s in met if sum(map(s.holds, parts)) == 1]
            assert alone, f"no case wakes {name} by {other}={value} alone"


OFF = {"none": "none", bool: "0", int: "0", float: "0", tuple: ""}


def unmet(name):
    """Settings under each of which none of a field's conditions holds: of those joined by & one is not met."""
    parts = [part.split("&") for part in FIELDS[name].metadata["on"].split(",")]
    for which in range(max(map(len, parts))):
        pairs = []
        for part in parts:
            other, equals, values = part[min(which, len(part) - 1)].partition("=")
            f, values = FIELDS[other], values.split("|")
            if not equals:
                pairs.append(f"{other.upper()}={OFF[get_origin(f.type) or f.type]}")
            elif f.type is bool:
                pairs.append(f"{other.upper()}={int('True' not in values)}")
            else:
                pairs.append(f"{other.upper()}={next(v for v in get_args(f.type) if v not in values)}")
        if "FIT=allocate" in pairs:
            pairs += [f"{kind}_QUANT=gptq" for kind in ("MATRIX", "EMBED")]
        yield " ".join(pairs)


@pytest.mark.parametrize("name, off", [(name, off) for name in WAITING if name != "gptq_reserve_seconds" for off in unmet(name)])
def test_a_setting_whose_condition_is_not_met_is_named_and_changes_not_one_bit(toy, name, off):
    """So what `on` says is the truth: no less (the cases above) and no more than these conditions."""
    value = f"{name.upper()}={CASES[name][0].value if name in CASES else 7}"
    if FIELDS[name].metadata["room"] == PACKING:
        (plain, before), (idle, after) = packed(toy, off), packed(toy, off, value)
        assert before == after
    else:
        plain, idle = trained(toy, off), trained(toy, off, value)
    assert getattr(plain.s, name) != getattr(idle.s, name)
    assert name.upper() in idle.s.idle() and idle.same(plain)


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


# This check finds what is dead

DEAD = {
    "xsa_last_n": ("exclude_self", lambda y, v: y),
    "skips": ("Skips.forward", lambda self, x, kept, pair: x),
    "smear_gate": ("Smear.forward", lambda self, x, docs: x),
    "value_residual": ("ValueResidual.forward", lambda self, v, v0: v),
    "attn_gate": ("HeadGate.forward", lambda self, x: x.new_ones(*x.shape[:2], len(self.weight), 1)),
    "num_loops": ("GPT.plan", property(lambda self: self.plans[0])),
    "normuon": ("scale_neurons", lambda update, moment, beta2: update),
    "wd_taper_start_frac": ("wd_scale", lambda s, progress: 1.0),
    "min_lr": ("lr_scale", lambda s, *_: 1.0),
    "complement_alpha": ("Complement.weights", lambda self, micro: [torch.ones(x.shape) for x, *_ in micro]),
    "ema_decay": ("Average.mean", lambda self, kind: None),
    "lawa_k": ("Average.apply", lambda self, weights: None),
    "grad_clip_norm": ("MuonAdam._clip", lambda self, grads: None),
    "loader": ("TokenStream.sequence", lambda self, position, length: self.read(position, length + 1)),
    "late_qat_threshold": ("LateQAT.switch", lambda self, on: None),
    "qat_rounding": ("Grid.forward", lambda self, weight: weight),
    "lqer_rank": ("Quantiser._correct", lambda self, done: None),
    "size_limit": ("allocate", lambda quantiser, packed_of, *_: packed_of(quantiser.encode(1e-3))),
    "gptq_act_order": ("factorise", lambda moments, damp, act_order, true=tg.factorise: true(moments, damp, True)),
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
    assert len(eager.losses) == 3 and compiled.losses == pytest.approx(eager.losses, rel=1e-5)
