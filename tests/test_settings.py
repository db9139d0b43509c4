"""Room 1, Settings: what a person types is either what happens or an answer that says what to type instead."""

import ast
import difflib
import itertools
import math
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import fields
from typing import Literal, get_args, get_origin

import pytest
import reference as ref
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from process import REPO, clean_env, run_trainer
from runs import SCRIPT, call, events, good, refused

import train_gpt
from train_gpt import BadInput, Settings

FIELDS = {f.name.upper(): f for f in fields(Settings)}
TREE = ast.parse(SCRIPT.read_text())


def complaints(*args, env=None):
    """What parse says against these arguments, a list of lines; empty if it accepts them."""
    try:
        Settings.parse(args, env or {})
    except BadInput as error:
        return str(error).splitlines()
    return []


def complaint(*args, env=None):
    """The single complaint about these arguments."""
    said = complaints(*args, env=env)
    assert len(said) == 1, said
    return said[0]


# Precedence


def test_each_source_overrides_the_one_before(tmp_path):
    (tmp_path / "one.env").write_text("MATRIX_LR=0.1 SCALAR_LR=0.1 TIED_EMBED_LR=0.1 MUON_WD=0.1\n")
    (tmp_path / "two.env").write_text("SCALAR_LR=0.2\nTIED_EMBED_LR=0.2\nMUON_WD=0.2\n")
    args = ["MUON_WD=0.4", f"@{tmp_path}/one.env", f"@{tmp_path}/two.env"]  # an argument wins wherever it stands
    s = Settings.parse(args, {"TIED_EMBED_LR": "0.3", "MUON_WD": "0.3"})
    assert (s.adam_wd, s.matrix_lr, s.scalar_lr, s.tied_embed_lr, s.muon_wd) == (Settings().adam_wd, 0.1, 0.2, 0.3, 0.4)
    assert Settings.parse(args[::-1], {}).scalar_lr == 0.1, "of two files the later one wins"


def test_the_real_command_obeys_the_order_and_its_settings_line_can_be_fed_back(toy, tmp_path):
    (tmp_path / "run.env").write_text("ITERATIONS=9 MATRIX_LR=0.5 SCALAR_LR=0.5\n")
    args = [*toy, f"@{tmp_path}/run.env", "MATRIX_LR=0.02", "ITERATIONS=1", "PHASES=train", "DEVICE=cpu", f"OUT_DIR={tmp_path}/out"]
    done = good(run_trainer(args, env={"SCALAR_LR": "0.03", "MATRIX_LR": "0.9"}))
    line = next(line for line in done.stdout.splitlines() if line.startswith("settings "))
    again = Settings.parse(shlex.split(line.removeprefix("settings ")))
    assert (again.iterations, again.matrix_lr, again.scalar_lr) == (1, 0.02, 0.03)
    assert again == Settings.parse(args, {"SCALAR_LR": "0.03"})
    (row,) = events(tmp_path / "out", "settings")
    assert row["settings_hash"] == again.sha256()


def test_a_settings_file_may_have_comments_quotes_several_a_line_and_be_a_record_folder(tmp_path):
    (tmp_path / "settings.env").write_text("# the record\nMATRIX_LR=0.03 SEED=7   # both tuned\n\nRUN_ID='two words'\nVE_LAYERS=1,2\n")
    for given_as in (tmp_path, tmp_path / "settings.env"):
        s = Settings.parse([f"@{given_as}"])
        assert (s.matrix_lr, s.seed, s.run_id, s.ve_layers) == (0.03, 7, "two words", (1, 2))


def test_files_are_strict_and_complaints_name_the_line(tmp_path):
    path = tmp_path / "bad.env"
    path.write_text("SEED=1\nMATRX_LR=0.1\nSEED=2\nSWA_ENABLED=1\njust words\n")
    said = complaints(f"@{path}")
    for number, words in ((2, "MATRIX_LR"), (3, "SEED is set twice"), (4, "SWA_ENABLED is no setting here: AVERAGE=swa"), (5, "'just' is not KEY=VALUE")):
        assert any(line.startswith(f"{path}:{number}: ") and words in line for line in said), (number, said)
    (tmp_path / "latin.env").write_bytes(b"RUN_ID=\xe9\n")
    (tmp_path / "quote.env").write_text("RUN_ID='open\n")
    for name, why in (("absent.env", "No such file"), ("latin.env", "UTF-8"), ("quote.env", "quotation")):
        assert why in complaint(f"@{tmp_path}/{name}"), name


# Names


@pytest.mark.parametrize("argument, words", [
    ("MATRX_LR=1", ("unknown setting MATRX_LR", "MATRIX_LR")),
    ("matrix_lr=1", ("unknown setting matrix_lr", "MATRIX_LR")),
    ("LEARNING_RATE=1", ("unknown setting LEARNING_RATE",)),
    ("QQQQQ=1", ("unknown setting QQQQQ", "--help")),
    ("=1", ("unknown setting",)),
    ("MATRIX_LR", ("'MATRIX_LR'", "KEY=VALUE")),
    ("--matrix_lr=1", ("--matrix_lr",)),
    ("VE_ENABLED=0", ("VE_ENABLED is no setting here: VE_DIM=0",)),
    ("TTT_NO_SUCH_SWITCH=1", ("unknown setting TTT_NO_SUCH_SWITCH",)),
])
def test_an_unknown_argument_is_answered_with_the_nearest_name(argument, words):
    said = complaint(argument)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("name, near", [("MATRIXLR", "MATRIX_LR"), ("MATRIX_LRS", "MATRIX_LR"), ("TRAIN_SEQLEN", "TRAIN_SEQ_LEN"),
                                        ("VAL_LOSS_EVRY", "VAL_LOSS_EVERY"), ("WARM_UP_STEPS", "WARMUP_STEPS")])
def test_a_near_miss_in_the_environment_is_an_error(name, near):
    said = complaint(env={name: "1"})
    assert name in said and near in said and "environment" in said


def test_every_name_with_a_letter_lost_is_caught_in_the_environment():
    missed = []
    for name in FIELDS:
        for i in range(len(name)):
            typo = name[:i] + name[i + 1:]
            if len(name) >= 6 and typo not in FIELDS and difflib.SequenceMatcher(None, typo, name).ratio() >= 0.85 and not complaints(env={typo: "1"}):
                missed.append(typo)
    assert not missed


RENAMED = train_gpt.other_names()


@pytest.mark.parametrize("answer", RENAMED.items(), ids=lambda pair: pair[0])
def test_a_renamed_setting_says_what_it_is_now(answer):
    name, now = answer
    assert name not in FIELDS
    for said in (complaint(f"{name}=1"), *([] if name in OF_OTHERS else [complaint(env={name: "1"})])):
        assert f"{name} is no setting here: {now}" in said
    for word in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b|\b[A-Z_]+(?==)", now):
        assert word in FIELDS, f"{name} is answered with {word}, which is no setting"


# Everything that the five reference systems and the accepted records read from the environment. Published commands are
# replayed here: a switch is obeyed, answered with what it is now, or refused. SEED and DATA_PATH are not listed.
REFERENCE_SYSTEMS = """ADAM_EPS ADAM_WD ADAPTIVE_LR ADAPTIVE_LR_MAX ALPHA_BASE ALPHA_CENTER ALPHA_RANGE BETA1 BETA2
BIGRAM_DIM BIGRAM_VOCAB_SIZE BYTE_WEIGHTED_TTT CACHE_ALPHA CALIBRATE_TEMP CHECKPOINT_PATH COMPLEMENT_ALPHA COMPRESS_METHOD
CROWN_Q_LAMBDA DEPTH_RECURRENCE DEPTH_RECUR_LAYERS DEPTH_RECUR_PASSES DTG_ENABLED EMA_DECAY EMA_START_FRAC EMBED_LR EMBED_WD
EVAL_ONLY EVAL_SEQ_LEN EVAL_STRIDE EVAL_TEMPERATURE GATED_ATTENTION GPTQ_BLOCK_SIZE GPTQ_CALIB_BATCHES GPTQ_CALIB_SEQS
GRAD_CLIP_NORM HEAD_LR INT6_LAST_N ITERATIONS LATE_QAT_THRESHOLD LAWA_ENABLED LAWA_FREQ LAWA_K LEAKY_RELU LN_SCALE
LOGIT_SOFTCAP LR_FLOOR LR_WARMUP_STEPS MATRIX_LR MAX_WALLCLOCK_SECONDS MIN_COUNT MIXER_ETA MIXER_MIN_TOKENS MLP_MULT
MODEL_DIM MTP_LOSS_WEIGHT MTP_NUM_HEADS MUONEQ_R MUON_BACKEND_STEPS MUON_BETA2 MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START
MUON_MOMENTUM_WARMUP_STEPS MUON_WD NGRAM_BUCKETS NGRAM_ORDER NUM_HEADS NUM_KV_HEADS NUM_LAYERS PARALLEL_START_LAYER
POLYAK_DECAY PPM_ALPHA PRUNE_PCT QAT_ENABLED QK_GAIN_INIT QTTT RECUR_LAYERS RECUR_START_STEP ROPE_BASE ROPE_DIMS
SAVE_RESEARCH_DATA SCALAR_LR SDCLIP_ENABLED SDCLIP_K_INT6 SDCLIP_K_INT8 SIGMOID_SKIPS SKIP_SLIDING SKIP_SLIDING_WINDOW
SLOT_CAUSAL SLOT_DELTA_CLIP SLOT_ENABLED SLOT_FOCAL_TOKENS SLOT_LBFGS SLOT_LBFGS_HISTORY SLOT_LBFGS_MAX_ITER SLOT_LR
SLOT_STEPS SOFT_ROUND_QAT SOFT_ROUND_TEMP_END SOFT_ROUND_TEMP_START SWA_ENABLED SWA_EVERY TARGET_MB TIED_EMBED_INIT_STD
TIED_EMBED_LR TIE_EMBEDDINGS TORCH_COMPILE TRAIN_BATCH_TOKENS TRAIN_LOG_EVERY TRAIN_SEQ_LEN TRIGRAM TRIGRAM_DIM
TRIGRAM_VOCAB_SIZE TTT_BATCH_SEQS TTT_CHUNK_TOKENS TTT_ENABLED TTT_EPOCHS TTT_FREEZE_BLOCKS TTT_GRAD_CLIP TTT_LORA_LR
TTT_LORA_RANK TTT_LR TTT_LR_MULT_FC TTT_LR_MULT_PROJ TTT_MAX_CHUNKS TTT_MOMENTUM TTT_ONLY TTT_OPTIMIZER TTT_TEMPERATURE
TTT_USE_LORA USE_CACHE USE_HEDGE_MIXER USE_MIXER USE_POLYAK VALUE_RESIDUAL VAL_BATCH_SIZE VAL_LOSS_EVERY VE_DIM VE_ENABLED
VE_LAYERS VOCAB_SIZE VRL_ENABLED WARMDOWN_FRAC WARMDOWN_ITERS WARMUP_STEPS XSA_LAST_N""".split()
RECORDS = """ASYM_LOGIT_RESCALE ATTN_CLIP_SIGMAS ATTN_OUT_GATE_ENABLED AWQ_LITE_BITS AWQ_LITE_ENABLED AWQ_LITE_GROUP_SIZE
AWQ_LITE_GROUP_TOP_K CASEOPS_ENABLED COMPILE_SHAPE_WARMUP COMPRESSOR DATA_DIR EMA_ENABLED EMBEDDING_DIM EMBED_BITS EMBED_CLIP_SIGMAS ENABLE_LOOPING_AT EVAL_INCLUDE_TAIL
FORCE_STOP_STEP FUSED_CE_ENABLED GATED_ATTN_ENABLED GATED_ATTN_INIT_STD GATED_ATTN_QUANT_GATE GATE_WINDOW GLOBAL_TTT_EPOCHS
GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS LOOP_END LOOP_START LQER_ASYM_ENABLED LQER_ASYM_GROUP LQER_ENABLED
LEAKY_RELU_SQ_SLOPE LQER_FACTOR_BITS LQER_GAIN_SELECT LQER_GROUP_SIZE LQER_RANK LQER_TOP_K MATRIX_BITS
MATRIX_CLIP_SIGMAS MIN_LR MLP_CLIP_SIGMAS MUON_ROW_NORMALIZE NEGATIVE_SLOPE NGRAM_HINT_PRECOMPUTE_OUTSIDE NGRAM_TILT_ENABLED
NUM_LOOPS PARALLEL_FINAL_LANE PARALLEL_RESIDUAL_START PHASED_TTT_NUM_PHASES PHASED_TTT_PREFIX_DOCS PREQUANT_ONLY
ROPE_TRAIN_SEQ_LEN ROPE_YARN SEQ_CHANGE_WARMUP_STEPS SKIP_GATES_ENABLED SKYLIGHT_MUON SMEAR_GATE_BOS_FIX SMEAR_GATE_ENABLED
SPARSE_ATTN_GATE_ENABLED SPARSE_ATTN_GATE_INIT_STD SPARSE_ATTN_GATE_SCALE SPARSE_GATE_SCALE TOKEN_BOOST TOKEN_THRESHOLD
TRAIN_SEQ_SCHEDULE TRAIN_SEQ_SCHEDULE_MODE TTT_BATCH_SIZE TTT_CHUNK_SIZE TTT_EVAL_ONLY TTT_EVAL_SEQ_LEN TTT_GRAD_STEPS TTT_K_LORA TTT_LOCAL_LR_MULT
TTT_LORA_EMA_DECAY TTT_MASK TTT_SHORT_CHUNK_SIZE TTT_SHORT_DOC_LEN TTT_SHORT_SCORE_FIRST_ENABLED
TTT_SHORT_SCORE_FIRST_STEPS TTT_UPDATE_EVERY TTT_WARM_START_A TTT_WARM_START_MEAN TTT_WEIGHT_DECAY WD_TAPER_FINAL_MULT
WD_TAPER_START_FRAC""".split()
# A shell may have these for other programs, and neither changes what is trained or scored: they say where files go.
OF_OTHERS = {"CHECKPOINT_PATH", "SAVE_RESEARCH_DATA", "DATA_DIR"}
MISSPELT = {"SPARSE_GATE_SCALE"}  # another script's name for a setting that is here


@pytest.mark.parametrize("name", [*REFERENCE_SYSTEMS, *RECORDS])
def test_no_switch_of_a_published_script_is_silently_ignored(name):
    if name not in FIELDS:
        answers = [complaint(f"{name}=1")] + ([] if name in OF_OTHERS else [complaint(env={name: "1"})])
        assert all(name in said for said in answers), answers
        assert name in OF_OTHERS or not any("see --help" in said for said in answers), "no answer"


@pytest.mark.parametrize("name", [name for name in (*REFERENCE_SYSTEMS, *RECORDS)
                                  if name not in {*FIELDS, *RENAMED, *OF_OTHERS, *MISSPELT}])
def test_a_switch_of_another_script_is_not_taken_for_a_misspelt_setting(name):
    for said in (complaint(env={name: "1"}), complaint(f"{name}=1")):
        assert "other contest scripts" in said


@pytest.mark.parametrize("pair, meant", [("COMPRESSOR=pergroup", "rans"), ("VALUE_RESIDUAL=0", "none"), ("TTT=0", "off")])
def test_a_value_of_a_published_script_is_answered_with_what_is_meant(pair, meant):
    assert f"did you mean {meant}?" in complaint(pair)


SHELL = """PATH HOME PWD OLDPWD USER LOGNAME SHELL SHLVL TERM TERM_PROGRAM TERM_PROGRAM_VERSION COLORTERM LANG LANGUAGE LC_ALL LC_CTYPE
LS_COLORS EDITOR PAGER LESS TZ TMPDIR TEMP DISPLAY HOSTNAME HOSTTYPE MAIL _ PS1 HISTSIZE XDG_RUNTIME_DIR XDG_SESSION_ID XDG_DATA_DIRS
XDG_CONFIG_HOME DBUS_SESSION_BUS_ADDRESS SSH_CLIENT SSH_CONNECTION SSH_TTY SSH_AUTH_SOCK TMUX TMUX_PANE STY VIRTUAL_ENV VIRTUAL_ENV_PROMPT
CONDA_DEFAULT_ENV CONDA_PREFIX CONDA_EXE CONDA_SHLVL PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE PIP_CACHE_DIR UV_CACHE_DIR
PYTEST_CURRENT_TEST CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_HOME CUDA_PATH CUDA_VERSION CUDA_LAUNCH_BLOCKING CUDA_DEVICE_MAX_CONNECTIONS
NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA NV_CUDA_LIB_VERSION LD_LIBRARY_PATH LIBRARY_PATH NCCL_DEBUG NCCL_VERSION
NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_SOCKET_IFNAME NCCL_NVLS_ENABLE NCCL_ASYNC_ERROR_HANDLING GLOO_SOCKET_IFNAME TORCH_HOME
TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_CUDA_ARCH_LIST TORCH_LOGS TORCHINDUCTOR_CACHE_DIR TORCHINDUCTOR_MIX_ORDER_REDUCTION TORCHELASTIC_RUN_ID
TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE PYTORCH_ALLOC_CONF
PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME
ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT NODE_RANK OMP_NUM_THREADS OMP_WAIT_POLICY MKL_NUM_THREADS OPENBLAS_NUM_THREADS KMP_AFFINITY
HF_HOME HF_TOKEN HF_HUB_OFFLINE HF_DATASETS_CACHE TRANSFORMERS_CACHE TOKENIZERS_PARALLELISM WANDB_API_KEY WANDB_MODE WANDB_PROJECT
SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_NNODES SLURM_JOB_NODELIST SLURM_ARRAY_TASK_ID SLURM_CPUS_ON_NODE SLURM_GPUS
OMPI_COMM_WORLD_RANK PMI_RANK SGE_TASK_ID LSB_JOBID PBS_JOBID JOB_ID KUBERNETES_SERVICE_HOST KUBERNETES_PORT POD_NAME
RUNPOD_POD_ID RUNPOD_GPU_COUNT RUNPOD_API_KEY RUNPOD_PUBLIC_IP RUNPOD_CPU_COUNT AWS_REGION AWS_PROFILE GOOGLE_APPLICATION_CREDENTIALS
AZUREML_RUN_ID MLFLOW_TRACKING_URI CI GITHUB_ACTIONS GITHUB_RUN_ID GITHUB_SHA GITHUB_WORKSPACE RUNNER_OS BUILD_ID BUILD_NUMBER
JUPYTER_SERVER_ROOT COLAB_GPU COLAB_RELEASE_TAG VSCODE_PID VSCODE_IPC_HOOK MODULEPATH LOADEDMODULES SYSTEMROOT COMSPEC HTTP_PROXY no_proxy
GLOBAL_RANK PARALLEL PARALLEL_SEQ PARALLEL_PID PARALLEL_TMP PARALLEL_JOBSLOT""".split()  # the last line: Lightning, GNU parallel


@pytest.mark.parametrize("strict", [{}, {"STRICT_ENV": "1"}], ids=["default", "STRICT_ENV=1"])
def test_an_ordinary_environment_raises_nothing(strict):
    env = dict.fromkeys(SHELL, "1") | strict
    assert complaints(env=env) == [] and train_gpt.doubtful_names(env) == []


DOUBTFUL = {"MODEL_LR": "1"}


def test_a_doubtful_name_in_the_environment_warns_in_the_log(toy, tmp_path):
    assert complaints(env=DOUBTFUL) == []
    done = good(call([*toy, "ITERATIONS=1", "PHASES=train", "DEVICE=cpu", f"OUT_DIR={tmp_path}"], env=DOUBTFUL))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning ")]
    assert "MODEL_LR" in line
    assert "MODEL_LR" in (tmp_path / "train.log").read_text().rpartition("=" * 100)[2]


def test_data_dir_of_other_scripts_is_answered_in_the_log_where_it_may_be_meant(toy, tmp_path, monkeypatch):
    """Too common in shells for an error, and too easily taken for DATA_PATH to be passed over."""
    assert complaints(env={"DATA_DIR": "x"}) == []
    done = good(call([*toy, "ITERATIONS=1", "PHASES=train", "DEVICE=cpu", f"OUT_DIR={tmp_path / 'given'}"], env={"DATA_DIR": "x"}))
    assert "DATA_DIR" not in done.stdout, "DATA_PATH is given"
    monkeypatch.setattr(Settings, "data_path", next(word for word in toy if word.startswith("DATA_PATH="))[10:])
    done = good(call([*toy, "ITERATIONS=1", "PHASES=train", "DEVICE=cpu", f"OUT_DIR={tmp_path / 'default'}"], env={"DATA_DIR": "x"}))
    assert "warning environment:DATA_DIR note:\"is not read: DATA_PATH, the folder of the shards\"" in done.stdout


@pytest.mark.parametrize("args, env", [
    ((), {"STRICT_ENV": "1"}), ((), {"STRICT_ENV": "true"}), (("STRICT_ENV=1",), {}), (("STRICT_ENV=true",), {}), (("@FILE",), {}),
    (("STRICT_ENV=1",), {"STRICT_ENV": "0"})])
def test_strict_env_makes_a_doubtful_name_an_error_wherever_it_is_set(args, env, tmp_path):
    (tmp_path / "strict.env").write_text("STRICT_ENV=1\n")
    args = [arg.replace("@FILE", f"@{tmp_path}/strict.env") for arg in args]
    assert "MODEL_LR" in complaint(*args, env={**DOUBTFUL, **env})


def test_strict_env_obeys_the_order_of_precedence_too():
    assert complaints("STRICT_ENV=0", env={**DOUBTFUL, "STRICT_ENV": "1"}) == []


# Values


@pytest.mark.parametrize("pair, words", [
    ("NORMUON=2", ["0 or 1"]), ("NORMUON=yes", ["0 or 1"]), ("NORMUON=", ["0 or 1"]),
    ("SMEAR_GATE=1", ["one of none, channel, scalar"]), ("SMEAR_GATE=chanel", ["did you mean channel?"]),
    ("TRAIN_SEQ_SCHEDULE=1024", ["size@fraction", "1024@0.1,2048@1"]), ("TRAIN_SEQ_SCHEDULE=1024@", ["size@fraction"]),
    ("TRAIN_SEQ_SCHEDULE=@1", ["size@fraction"]), ("TRAIN_SEQ_SCHEDULE=1024:0.1", ["size@fraction"]),
    ("TRAIN_BATCH_SCHEDULE=1e5@1", ["size@fraction"]), ("TRAIN_BATCH_SCHEDULE=8@1@1", ["size@fraction"]),
    ("MATRIX_BETAS=0.9;0.95", ["0.9,0.99"]), ("EMBED_BETAS=high,low", ["0.9,0.99"]), ("HEAD_BETAS=,", ["0.9,0.99"]),
    ("NUM_LAYERS=2.5", ["whole number"]), ("NUM_LAYERS=1e1", ["whole number"]), ("NUM_LAYERS=", ["whole number"]),
    ("NUM_LAYERS=nan", ["whole number"]), ("NUM_LAYERS=0", ["between 1 and 256"]), ("NUM_LAYERS=257", ["between 1 and 256"]),
    ("ITERATIONS=-1", ["at least 0"]), ("ITERATIONS=1" + 400 * "0", []),
    ("MATRIX_LR=fast", ["a number"]), ("MATRIX_LR=", ["a number"]), ("MATRIX_LR=0,025", ["a number"]),
    ("MATRIX_LR=nan", ["at least 0"]), ("MATRIX_LR=inf", ["at least 0"]), ("MATRIX_LR=-0.1", ["at least 0"]),
    ("MUON_MOMENTUM=nan", ["between 0 and 0.9999"]), ("MUON_MOMENTUM=1", ["between 0 and 0.9999"]), ("MUON_MOMENTUM=-inf", ["between"]),
    ("COMPRESSOR=ztsd", ["one of", "zstd", "did you mean zstd?"]), ("COMPRESSOR=7z", ["one of", "brotli"]), ("COMPRESSOR=", ["one of"]),
    ("AVERAGE=EMA", ["one of", "ema"]), ("VE_LAYERS=9,x", ["9,10"]), ("VE_LAYERS=1,,2", ["9,10"]), ("VE_LAYERS=1.5", ["9,10"]),
    ("SEED=1" + 30 * "0", []), ("SEED=-1", ["at least 0"]),
    ("LAYER_BITS=8", ["number@number", "0@8,10@8"]), ("LAYER_BITS=0@", ["number@number"]), ("LAYER_BITS=0@6.5", ["number@number"]),
    ("TTT_SHORT_CHUNKS=256:8", ["number@number"]), ("TTT_SHORT_CHUNKS=8", ["number@number"]), ("TTT_SHORT_CHUNKS=8@256;24@2000", ["number@number"]),
    ("TTT=1", ["one of off, full, lora, lora_docs, before, prequant"]), ("TTT=lora_doc", ["did you mean lora_docs?"]), ("EVAL_CONTEXT=kv", ["one of window, cache"]),
    ("MIXER=back_off", ["did you mean backoff?"]), ("EVAL_TEMPERATURE=-1", ["between 0 and 10"]), ("ADAPTIVE_LR_MAX=0", ["between 0.01 and 100"]),
    ("TTT_LORA_TARGETS=", ["q,k,v,o,attn,mlp,head", "each once"]), ("TTT_LORA_TARGETS=q,,v", ["each once"]), ("TTT_LORA_TARGETS=Q,V", ["each once"]),
    ("TTT_LORA_TARGETS=q,q", ["each once"]), ("MIXER_EXPERTS=", ["unigram,bigram,trigram,backoff,entropy"]), ("MIXER_EXPERTS=bigram,4gram", ["each once"]),
    ("FIT=1", ["one of off, prune, allocate"]), ("MATRIX_QUANT=gptq-lite", ["one of", "did you mean gptq_lite?"]),
], ids=lambda value: str(value)[:24] if isinstance(value, str) else "")
def test_a_bad_value_is_named_with_what_would_be_right(pair, words):
    for said in (complaint(pair), complaint(env=dict([pair.split("=", 1)]))):
        assert said.startswith(pair[:200] + ":") or pair[:20] in said, said
        assert all(word in said for word in words), said


def test_every_number_is_accepted_at_its_bounds_and_refused_beyond():
    for name, f in FIELDS.items():
        lo, hi = f.metadata["lo"], f.metadata["hi"]
        assert (lo is None) == (f.type not in (int, float)), f"{name}: a number without a lower bound"
        for bound, beyond in ((lo, -1), (hi, 1)):
            if bound is None:
                continue
            outside = bound + beyond if f.type is int else math.nextafter(bound, beyond * math.inf)
            assert train_gpt.parse_value(f, repr(bound)) == bound
            assert any(line.startswith(f"{name}={outside!r}: ") for line in complaints(f"{name}={outside!r}")), (name, outside)


def test_every_setting_has_a_default_of_its_type_within_its_bounds_and_a_sentence():
    assert complaints(*(f"{name}={train_gpt.format_value(f.default)}" for name, f in FIELDS.items() if f.default != "")) == []
    for name, f in FIELDS.items():
        kind = str if get_origin(f.type) is Literal else tuple if get_origin(f.type) is tuple else f.type
        assert type(f.default) is kind, name
        assert get_origin(f.type) is not Literal or f.default in get_args(f.type), name
        assert f.metadata["doc"].strip(), name
        assert name == name.upper() and f.name == f.name.lower()


CONFLICTS = [
    ("MODEL_DIM=100", "NUM_HEADS=8"), ("NUM_KV_HEADS=3", "NUM_HEADS=8"), ("ROPE_DIMS=7", "MODEL_DIM/NUM_HEADS=64"), ("ROPE_DIMS=66", "MODEL_DIM/NUM_HEADS=64"),
    ("MLP_MULT=2.7182", "MODEL_DIM=512"), ("XSA_LAST_N=12", "NUM_LAYERS=11"), ("VE_LAYERS=11", "NUM_LAYERS-1=10"), ("VE_LAYERS=-1", "NUM_LAYERS-1=10"),
    ("VE_DIM=64 VE_LAYERS=", "VE_LAYERS"), ("TRAIN_BATCH_TOKENS=1000", "TRAIN_SEQ_LEN=2048"), ("MICRO_BATCH_TOKENS=1024", "TRAIN_SEQ_LEN=2048"),
    ("EVAL_STRIDE=4096", "EVAL_SEQ_LEN=2048"), ("ITERATIONS=0 MAX_WALLCLOCK_SECONDS=0",), ("WARMDOWN_ITERS=100 WARMDOWN_FRAC=0.3",),
    ("PHASES=eval", "ARTIFACT="), ("ARTIFACT=model.pg", "PHASES=all"), ("BIGRAM_VOCAB_SIZE=1",), ("MATRIX_BITS=9",), ("EMBED_BITS=15",),
    ("TRIGRAM_VOCAB_SIZE=1",), ("LOADER=packed", "DOC_MASK=attention inputs"),
    ("COMPLEMENT_ALPHA=0.5 VOCAB_SIZE=20000", "16384"), ("MATRIX_BETAS=0.9",), ("EMBED_BETAS=0.9,1.0",), ("HEAD_BETAS=0.9,0.95,0.99",),
    ("MATRIX_BETAS=-0.1,0.9",), ("WARMDOWN_SECONDS=9.0 WARMDOWN_FRAC=0.3",), ("WARMDOWN_SECONDS=9.0 WARMDOWN_ITERS=30",),
    ("MTP_NUM_HEADS=4 TRAIN_SEQ_LEN=4",), ("TRAIN_SEQ_SCHEDULE=1024@0.5,2048@0.5",), ("TRAIN_SEQ_SCHEDULE=1024@0.5,2048@0.9",),
    ("TRAIN_SEQ_SCHEDULE=1024@0.5,2048@0.4,512@1.0",), ("TRAIN_SEQ_SCHEDULE=1024@0.0,2048@1.0",), ("TRAIN_SEQ_SCHEDULE=1@1.0",),
    ("ATTN_BITS=9",), ("MLP_BITS=1",), ("GATE_BITS=12",), ("LAYER_BITS=10@9",), ("LAYER_BITS=3@0",), ("LAYER_BITS=11@8", "NUM_LAYERS-1=10"),
    ("LAYER_BITS=-1@8", "NUM_LAYERS-1=10"), ("LAYER_BITS=2@8,2@4", "twice"), ("TRAIN_BATCH_SCHEDULE=2048@0.5,4096@2.0",), ("TRAIN_BATCH_SCHEDULE=0@0.5,4096@1.0",), ("TRAIN_SEQ_SCHEDULE=-8@0.5,2048@1.0",),
    ("TTT_SHORT_CHUNKS=0@256", "positive"), ("TTT_SHORT_CHUNKS=-8@256", "positive")]
# (arguments, words of the answer) where the answer is about a derived value, or the switch itself is not worth repeating.
DERIVED_CONFLICTS = [
    ("LOADER=packed DOC_MASK=none", "LOADER=packed DOC_MASK=attention none"), ("GATE_WINDOW=513 SMEAR_GATE=scalar", "GATE_WINDOW=513 MODEL_DIM=512"), ("GATE_WINDOW=513 ATTN_GATE=head", "GATE_WINDOW=513 MODEL_DIM=512"),
    ("GATE_WINDOW=513 ATTN_GATE=sparse", "GATE_WINDOW=513 MODEL_DIM=512"), ("NUM_LOOPS=1 LOOP_START=6", "LOOP_START=6 LOOP_END=5"),
    ("NUM_LOOPS=1 LOOP_END=11", "LOOP_START=3 LOOP_END=11 0..10"), ("PARALLEL_RESIDUAL=gptj PARALLEL_START_LAYER=11", "PARALLEL_START_LAYER=11 NUM_LAYERS=11"),
    ("PARALLEL_RESIDUAL=lanes NUM_LAYERS=7 VE_LAYERS=5", "PARALLEL_START_LAYER=7 NUM_LAYERS=7"),
    ("PARALLEL_RESIDUAL=routed NUM_LAYERS=7 VE_LAYERS=5", "PARALLEL_START_LAYER=7 NUM_LAYERS=7"),
    ("TRAIN_BATCH_SCHEDULE=3000@1", "TRAIN_BATCH_TOKENS=3000 TRAIN_SEQ_LEN=2048 stage"),
    ("TRAIN_SEQ_SCHEDULE=1000@1", "TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=1000 stage"),
    ("TRAIN_SEQ_SCHEDULE=131072@1", "MICRO_BATCH_TOKENS=98304 TRAIN_SEQ_LEN=131072 stage"),
    ("TRAIN_SEQ_SCHEDULE=4@0.5,2048@1 MTP_NUM_HEADS=5", "MTP_NUM_HEADS=5 TRAIN_SEQ_LEN=4 stage"),
    ("LOADER=shuffled TRAIN_SEQ_SCHEDULE=1536@0.5,2048@1", "LOADER=shuffled TRAIN_SEQ_SCHEDULE 1536 2048"),
    ("LOADER=coprime TRAIN_SEQ_SCHEDULE=1536@0.5,2048@1", "LOADER=coprime TRAIN_SEQ_SCHEDULE 1536 2048"),
    ("WARMDOWN_SECONDS=9 MAX_WALLCLOCK_SECONDS=0", "WARMDOWN_SECONDS=9.0 MAX_WALLCLOCK_SECONDS 0"),
    ("AVERAGE=best HOLDOUT_TOKENS=2048", "HOLDOUT_TOKENS=2048 EVAL_SEQ_LEN=2048"),
    ("TTT=prequant ALLOW_INVALID=1 PHASES=eval ARTIFACT=model.pg", "TTT=prequant PHASES=eval"),
    ("TTT=lora_docs TTT_CHUNK_SIZE=4096", "TTT_CHUNK_SIZE=4096 EVAL_SEQ_LEN=2048"),
    ("TTT=lora_docs TTT_SHORT_CHUNKS=8@256,4096@9999", "TTT_SHORT_CHUNKS=8@256,4096@9999 EVAL_SEQ_LEN=2048"),
    ("TTT=full TTT_FREEZE_BLOCKS=11 TTT_FREEZE_EMBED=1", "TTT_FREEZE_BLOCKS=11 NUM_LAYERS=11 TTT_FREEZE_EMBED=1"),
    ("TTT=lora_docs PHASED_TTT_PREFIX_DOCS=2 PHASED_TTT_NUM_PHASES=3", "PHASED_TTT_PREFIX_DOCS=2 PHASED_TTT_NUM_PHASES=3"),
    *((f"{name}={method}", f"FIT=allocate {name} {method}") for name in ("MATRIX_QUANT", "EMBED_QUANT") for method in ("gptq_lite", "ternary"))]


@pytest.mark.parametrize("args, words", DERIVED_CONFLICTS, ids=lambda text: text.replace(" ", "+"))
def test_a_derived_conflict_is_answered_with_the_values_that_clash(args, words):
    said = complaints(*args.split())
    assert any(all(word in line for word in words.split()) for line in said), said


def test_a_window_or_a_loop_that_nothing_uses_may_be_anything():
    for idle in ("GATE_WINDOW=4000", "LOOP_END=200", "LOOP_START=9", "PARALLEL_START_LAYER=100", "HOLDOUT_TOKENS=2", "VE_DIM=0 VE_LAYERS=99",
                 "TTT_CHUNK_SIZE=4096", "TTT_FREEZE_BLOCKS=99 TTT_FREEZE_EMBED=1", "PHASED_TTT_NUM_PHASES=3"):
        assert complaints(*idle.split()) == [], idle


def test_a_learned_merge_of_a_last_layer_alone_is_refused_only_where_the_lanes_are_equal():
    alone = "NUM_LAYERS=4 XSA_LAST_N=4 VE_LAYERS=3 PARALLEL_RESIDUAL=routed PARALLEL_START_LAYER=3 PARALLEL_FINAL_LANE=learned"
    (said,) = complaints(*alone.split())
    assert "two equal lanes" in said
    assert complaints(*alone.split(), "PARALLEL_FIRST_SKIP=lane0") == [], "a skip enters one of them"


@pytest.mark.parametrize("case", CONFLICTS, ids=lambda case: case[0])
def test_an_impossible_combination_names_both_settings_and_both_values(case):
    said, words = complaints(*case[0].split()), [word.rstrip("=") for word in " ".join(case).split()]
    assert any(all(word in line for word in words) for line in said), said


INVALID = {  # what breaks a condition of a true code length, and the condition
    "TTT=before": "C3", "TTT=prequant": "C3", "MIXER=hashed": "C2", "MIXER=hedge MIXER_EXPERTS=entropy": "C2",
    "MIXER=hedge MIXER_EXPERTS=unigram,entropy,backoff": "C2"}


@pytest.mark.parametrize("args, condition", INVALID.items(), ids=lambda text: text.replace(" ", "+"))
def test_what_breaks_a_rule_runs_only_where_that_is_allowed(args, condition):
    said = complaint(*args.split())
    assert all(words in said for words in (args.split()[-1].partition(",")[0][:10], condition, "ALLOW_INVALID=1")), said
    assert complaints(*args.split(), "ALLOW_INVALID=1") == []
    assert Settings.parse([*args.split(), "ALLOW_INVALID=1"]).idle() == {}


def test_what_breaks_no_rule_needs_no_permission():
    for args in ("TTT=full", "TTT=lora", "TTT=lora_docs", "MIXER=backoff", "MIXER=hedge", "MIXER=hedge MIXER_EXPERTS=backoff", "TOKEN_BOOST=2",
                 "MIXER_EXPERTS=entropy", "EVAL_TEMPERATURE=0", "EVAL_CONTEXT=cache EVAL_DOCS=1"):
        assert complaints(*args.split()) == [], args


def test_resume_auto_needs_to_know_what_to_resume():
    said = complaint("RESUME=auto")
    assert "RUN_ID" in said and "OUT_DIR" in said
    assert not complaints("RESUME=auto", "RUN_ID=x") and not complaints("RESUME=auto", "OUT_DIR=x")
    assert "keeps no checkpoints" in complaint("RESUME=auto", "RUN_ID=x", "CHECKPOINT_EVERY=-1")


def test_either_kind_of_warmdown_can_be_chosen_alone():
    for args in (["WARMDOWN_ITERS=100"], ["WARMDOWN_FRAC=0.3"], ["WARMDOWN_ITERS=100", "WARMDOWN_FRAC=0"], ["WARMDOWN_SECONDS=100"],
                 ["WARMDOWN_SECONDS=100", "WARMDOWN_ITERS=0", "WARMDOWN_FRAC=0"]):
        assert complaints(*args) == []


# Values of several parts


def test_a_schedule_is_sizes_up_to_fractions_of_the_run():
    s = Settings.parse(["TRAIN_SEQ_SCHEDULE=1024@0.1,2048@1"])
    assert s.train_seq_schedule == ((1024, 0.1), (2048, 1.0)) and s.stages == [(0.1, 1024, 786432), (1.0, 2048, 786432)]
    s = Settings.parse(["TRAIN_SEQ_SCHEDULE=512@0.25,1024@.5,2048@1", "TRAIN_BATCH_SCHEDULE=98304@5e-1,196608@1.0"])
    assert s.stages == [(0.25, 512, 98304), (0.5, 1024, 98304), (1.0, 2048, 196608)]
    assert Settings().stages == [(1.0, 2048, 786432)]
    assert Settings.parse(["TRAIN_SEQ_SCHEDULE=", "TRAIN_BATCH_SCHEDULE="]) == Settings(), "an empty one is none"


@given(st.data())
@settings(max_examples=60)
def test_the_stages_are_what_both_schedules_say_at_every_progress(data):
    """The two are merged: at any progress the stage has the length and the batch that each says by itself."""
    def schedule(sizes):
        ends = sorted(data.draw(st.sets(st.integers(1, 9), max_size=3)))
        return tuple((data.draw(st.sampled_from(sizes)), end / 10) for end in ends) + ((sizes[0], 1.0),)

    lengths, batches = schedule([64, 128, 256]), schedule([1024, 2048, 4096])
    s = Settings(train_seq_schedule=lengths, train_batch_schedule=batches)
    assert complaints(*shlex.split(s.text())) == []
    for progress in [i / 100 for i in range(100)]:
        length, tokens = (next(size for size, end in table if progress < end) for table in (lengths, batches))
        assert next(stage[1:] for stage in s.stages if progress < stage[0]) == (length, tokens)


def test_betas_are_two_numbers_or_those_of_all():
    s = Settings.parse(["MATRIX_OPTIMIZER=adamw", "MATRIX_BETAS=0.8,0.99", "EMBED_BETAS=0,0", "BETA1=0.7"])
    table = train_gpt.update_rules(s)
    assert table["matrix"].betas == (0.8, 0.99) and table["embed"].betas == (0.0, 0.0)
    assert table["head"].betas == table["scalar"].betas == table["gate"].betas == (0.7, 0.95)


# Settings that wait for another


RULES = {name: f.metadata["on"] for name, f in FIELDS.items() if f.metadata["on"]}


def other_value(f):
    """A valid value of a field that is not its default."""
    if get_origin(f.type) is Literal:
        return next(choice for choice in get_args(f.type) if choice != f.default)
    if f.type is bool:
        return not f.default
    if get_origin(f.type) is tuple:
        return {train_gpt.Layers: (1,), train_gpt.Betas: (0.5, 0.5), train_gpt.Schedule: ((64, 1.0),), train_gpt.IntPairs: ((0, 4),),
                train_gpt.Names: f.default[:1]}[f.type]
    return f.metadata["lo"] if f.default != f.metadata["lo"] else f.metadata["hi"] or f.default + 1


def test_a_rule_is_read_as_its_grammar_says():
    condition = train_gpt.Condition
    assert train_gpt.parse_rule("") == ()
    assert train_gpt.parse_rule("ve_dim") == ((condition("ve_dim"),),)
    assert train_gpt.parse_rule("average=swa|best,ttt!=off&mixer") == (
        (condition("average", ("swa", "best")),), (condition("ttt", ("off",), True), condition("mixer")))
    rope, words = condition("rope_dims"), condition("ttt_lora_targets", ("o", "mlp"))
    assert [rope.holds(value) for value in (0, 16, (), (1,), "")] == [False, True, False, True, False]
    assert [words.holds(value) for value in ((), ("q",), ("q", "mlp"))] == [False, False, True]
    assert [condition("fit", ("off", "prune"), True).holds(value) for value in ("off", "allocate")] == [False, True]
    assert [condition("tie_embeddings", ("0",)).holds(value) for value in (True, False)] == [False, True]


@pytest.mark.parametrize("name, rule", RULES.items(), ids=list(RULES))
def test_a_rule_names_settings_and_values_that_exist(name, rule):
    for condition in sum(rule, ()):
        f = FIELDS[condition.setting.upper()]
        assert not condition.values or set(condition.values) < set(ref.typed_choices(f)), condition
        assert f.name != name.lower()


def wrong_value(other, values):
    f = FIELDS[other.upper()]
    if f.type is train_gpt.Names:
        return ("q",)
    if not values:
        return type(f.default)()
    return train_gpt.parse_value(f, next(choice for choice in ref.typed_choices(f) if choice not in values))


def right_values(other, values):
    f = FIELDS[other.upper()]
    if f.type is train_gpt.Names:
        return [("q", value) for value in values]
    return [train_gpt.parse_value(f, value) for value in values] or [f.default or other_value(f)]


def waited_for(others):
    """{field: value} with which settings are not idle: for each one the first alternative of its rule."""
    rules = [RULES[name.upper()] for name in others if name.upper() in RULES]
    first = {other: right_values(other, values)[0] for rule in rules for other, values in ref.alternatives(rule)[0]}
    return {**waited_for(first), **first} if first else {}


def said_of(rule):
    """How many alternatives the words for a rule have, those that its own conditions wait for included."""
    return sum(max(said_of(RULES.get(condition.setting.upper(), ())) or 1 for condition in part) for part in rule)


@pytest.mark.parametrize("name, rule", RULES.items(), ids=list(RULES))
def test_a_setting_is_idle_until_one_of_its_conditions_holds(name, rule):
    f = FIELDS[name]
    changed, parts = {f.name: other_value(f)}, ref.alternatives(rule)
    off = {other: wrong_value(other, values) for part in parts for other, values in part}
    said = Settings(**off, **changed).idle()[name]
    for condition in re.split(" or | and | with ", said):  # in the words in which it can be typed
        other, equals, values = condition.replace("!=", "=").partition("=")
        assert other in FIELDS and (not equals or not any(other in line and "one of" in line for value in values.split("|")
                                                          for line in complaints(f"{other}={value}")))
    assert len(said.split(" or ")) == said_of(rule) and set(Settings(**off, **changed).idle()) <= {name, *map(str.upper, off)}
    assert f.name not in {n.lower() for n in Settings(**off).idle()}, "left at its default it is not worth a word"
    for part in parts:
        for met in itertools.product(*(right_values(*one) for one in part)):
            on = dict(zip((other for other, _ in part), met))
            on = {**waited_for(on), **on}
            assert name not in Settings(**off | on, **changed).idle(), on
            for other, _ in part if len(part) > 1 else ():
                assert name in Settings(**off | on | {other: off[other]}, **changed).idle(), f"{other} is one of several conditions"


def test_a_setting_waits_for_what_its_condition_waits_for():
    changed = dict(muon_beta2=0.9, muon_momentum_warmup_start=0.5, normuon=True)
    without = Settings(matrix_optimizer="adamw", **changed).idle()
    assert without == {"MUON_BETA2": "NORMUON with MATRIX_OPTIMIZER=muon", "NORMUON": "MATRIX_OPTIMIZER=muon",
                       "MUON_MOMENTUM_WARMUP_START": "MUON_MOMENTUM_WARMUP_STEPS with MATRIX_OPTIMIZER=muon"}
    assert Settings(**changed).idle() == {}
    assert list(Settings(**changed, muon_momentum_warmup_steps=0).idle()) == ["MUON_MOMENTUM_WARMUP_START"]


def test_an_idle_setting_is_a_warning_in_the_log_and_not_an_error(toy, tmp_path):
    done = good(call([*toy, "ITERATIONS=1", "PHASES=train", "DEVICE=cpu", "LOOP_END=1", "HEAD_LR=0.1", f"OUT_DIR={tmp_path}"]))
    said = {row["setting"]: row["note"] for row in events(tmp_path, "warning")}
    assert said.keys() == {"LOOP_END", "HEAD_LR"} and "NUM_LOOPS" in said["LOOP_END"]
    assert "TIE_EMBEDDINGS=0 or MTP_NUM_HEADS" in said["HEAD_LR"] and done.stdout.count("has no effect") == 2


# All at once


def test_every_complaint_is_made_at_once_before_anything_else_happens(tmp_path):
    (tmp_path / "run.env").write_text("NUMLAYERS=3\n")
    args = [f"@{tmp_path}/run.env", "COMPRESSOR=ztsd", "BANANA=1", "NUM_LAYERS=2.5", "DATA_PATH=/no/such/place", f"OUT_DIR={tmp_path}/out"]
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_trainer(args, env={"MATRX_LR": "1", "SWA_ENABLED": "1", "QAT_ENABLED": "1"}, cwd=tmp_path)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 5  # CPU seconds: other jobs may slow the clock
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and all(line.startswith("error: ") for line in lines), done
    for words in ("run.env:1", "COMPRESSOR=ztsd", "BANANA", "NUM_LAYERS=2.5", "MATRX_LR", "SWA_ENABLED is no setting", "QAT_ENABLED"):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert len(lines) == 7 and not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()


def test_a_bad_value_does_not_hide_a_conflict_between_other_settings():
    said = complaints("MATRIX_LR=abc", "NUM_HEADS=7", "EVAL_STRIDE=4096", "BANANA=1")
    for word in ("MATRIX_LR=abc", "NUM_HEADS=7", "EVAL_STRIDE=4096", "BANANA"):
        assert any(word in line for line in said), (word, said)


def test_a_bad_value_does_not_raise_a_conflict_with_the_default_in_its_place():
    assert len(complaints("NUM_LAYERS=abc", "VE_LAYERS=15", "XSA_LAST_N=15")) == 1


# Round trip


def _value(f):
    """Any valid value of a field by itself."""
    lo, hi = f.metadata["lo"], f.metadata["hi"]
    if get_origin(f.type) is Literal:
        return st.sampled_from(get_args(f.type))
    if f.type is bool:
        return st.booleans()
    if f.type is int:
        return st.integers(lo, hi if hi is not None else 2**31)
    if f.type is float:
        return st.floats(lo, hi if hi is not None else 1e9, allow_nan=False, allow_infinity=False)
    if f.type is str:
        return st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
    if f.type is train_gpt.Schedule:
        return st.lists(st.tuples(st.integers(2, 4096), st.floats(0.01, 0.99)), max_size=2, unique_by=lambda stage: stage[1]).flatmap(
            lambda table: st.sampled_from([(), (*sorted(table, key=lambda stage: stage[1]), (2048, 1.0))]))
    if f.type is train_gpt.IntPairs:
        return st.lists(st.tuples(st.integers(0, 10), st.integers(2, 8)), max_size=3, unique_by=lambda pair: pair[0]).map(tuple)
    if f.type is train_gpt.Betas:
        return st.one_of(st.just(()), st.tuples(*2 * [st.floats(0, 0.999)]))
    if f.type is train_gpt.Names:
        known = {"ttt_lora_targets": "q k v o mlp head", "mixer_experts": "unigram bigram trigram backoff entropy"}[f.name].split()
        return st.lists(st.sampled_from(known), min_size=1, unique=True).map(tuple)
    return st.lists(st.integers(0, 10), max_size=4).map(tuple)


@st.composite
def valid_settings(draw):
    """Random settings that parse accepts: a random subset changed, with the known dependencies drawn together."""
    values = {}
    if draw(st.booleans()):
        head, kv, group, layers = 2 * draw(st.integers(1, 64)), draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
        values = dict(num_heads=kv * group, num_kv_heads=kv, model_dim=max(8, head * kv * group), num_layers=layers, mlp_mult=float(draw(st.integers(1, 16))),
                      rope_dims=2 * draw(st.integers(0, head // 2)), xsa_last_n=draw(st.integers(0, layers)),
                      ve_layers=tuple(draw(st.lists(st.integers(0, layers - 1), min_size=1, max_size=3))))
        length = draw(st.integers(2, 4096))
        values |= dict(train_seq_len=length, train_batch_tokens=length * draw(st.integers(1, 64)), micro_batch_tokens=draw(st.integers(length, 10 * length)))
        values["eval_seq_len"] = draw(st.integers(2, 4096))
        values["eval_stride"] = draw(st.integers(0, values["eval_seq_len"]))
    for name in draw(st.lists(st.sampled_from(sorted(set(FIELDS) - {name.upper() for name in values})), max_size=12, unique=True)):
        values[name.lower()] = draw(_value(FIELDS[name]))
    s = Settings(**values)
    assume(not complaints(*shlex.split(s.text())))
    return s


slow_generation = settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])


@slow_generation
@given(valid_settings())
def test_settings_survive_being_written_and_read(tmp_path_factory, s):
    assert Settings.parse(shlex.split(s.text())) == s
    path = tmp_path_factory.getbasetemp() / "round.env"
    path.write_text(s.text() + "\n", encoding="utf-8")
    assert Settings.parse([f"@{path}"]) == s
    assert Settings.parse([], dict(pair.split("=", 1) for pair in shlex.split(s.text()))) == s
    assert len(s.text().splitlines()) <= 1


@slow_generation
@given(valid_settings(), st.data())
def test_the_hash_ignores_the_room_run_and_nothing_else(s, data):
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    other = data.draw(_value(FIELDS[name]))
    assume(other != getattr(s, name.lower()))
    changed = Settings(**{f.name: getattr(s, f.name) for f in fields(s)} | {name.lower(): other})
    assert (changed.sha256() == s.sha256()) == (FIELDS[name].metadata["group"] == "Run")


def test_a_value_written_in_another_way_is_the_same_setting():
    assert Settings.parse(["MLP_MULT=3", "TRAIN_BATCH_TOKENS=786_432", "LN_SCALE=true"]) == Settings()


# The help, and what is read where


def test_help_lists_every_setting_once_with_its_default_and_needs_nothing(tmp_path):
    (tmp_path / "train_gpt.py").write_text(SCRIPT.read_text())
    done = run_trainer(["--help", "BANANA=1"], env={"MATRX_LR": "1"}, script=tmp_path / "train_gpt.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for name, f in FIELDS.items():
        lines = [line for line in done.stdout.splitlines() if re.match(rf"\s+{name}=", line)]
        assert len(lines) == 1, name
        shown = train_gpt.format_value(f.default) or "(empty)"
        assert lines[0].split()[0] == f"{name}={shown}" and f.metadata["doc"] in lines[0]
        assert all(choice in lines[0] for choice in get_args(f.type) if isinstance(choice, str))
        lo, hi = f.metadata["lo"], f.metadata["hi"]
        assert lo is None or f"[{f.type.__name__} {lo}..{'' if hi is None else hi}]" in lines[0], "its bounds"
    assert [line for line in done.stdout.splitlines() if line in {f.metadata["group"] for f in FIELDS.values()}] == \
        list(dict.fromkeys(f.metadata["group"] for f in FIELDS.values())), "each group once, in order"
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.py"]


def code_at(name):
    """What a dotted name of the trainer stands for, or None."""
    place = train_gpt
    for word in name.split("."):
        place = getattr(place, word, None)
    return place


def test_the_code_of_every_setting_is_there():
    lost = {name: f.metadata["code"] for name, f in FIELDS.items() if f.metadata["code"] and not code_at(f.metadata["code"])}
    assert not lost, "settings whose opt(code=...) names no function or class of train_gpt.py"


def test_the_table_of_techniques_names_settings_and_their_code():
    table = train_gpt.__doc__.partition("\nTechniques")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [line.rsplit(maxsplit=2) for line in table]
    assert len(rows) > 40 and len({technique for technique, _, _ in rows}) == len(rows)
    for technique, setting, code in rows:
        assert setting in FIELDS, f"{technique}: {setting} is no setting"
        assert code_at(code), f"{technique}: there is no {code}"


FIELD_NAMES = ["XSA", "BigramHash", "SmearGate", "depth recurrence", "parallel lanes", "Newton-Schulz", "NorMuon", "EMA start",
               "act-order", "coder context", "allocation", "LQER", "sliding windows", "document adapters", "backoff", "phases"]


@pytest.mark.parametrize("technique", FIELD_NAMES)
def test_one_search_finds_setting_code_and_test_of_a_technique(technique):
    """By the name that the field uses, in the singular and however its words are joined."""
    words = re.sub(r"[ -]|(?<=[a-z])(?=[A-Z])", "[ _-]?", technique.removesuffix("s"))
    search = re.compile(words, re.I)
    settings_found = [name for name, f in FIELDS.items() if search.search(f"{name} {f.metadata['doc']}")]
    names = [getattr(node, "arg", None) or getattr(node, "name", "") for node in ast.walk(TREE)
             if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.arg))]  # of functions, classes and arguments
    code = [name for name in names if search.search(name)]
    tests = [path.name for path in (REPO / "tests").glob("test_*.py") if re.search(f"def test_.*({words})", path.read_text(), re.I)]
    assert settings_found and code and tests, f"{technique}: {settings_found} {code} {tests}"


def _settings_class():
    return next(node for node in TREE.body if isinstance(node, ast.ClassDef) and node.name == "Settings")


def test_every_setting_is_read_by_the_program():
    own = _settings_class()
    properties = [node for node in own.body if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "property" for d in node.decorator_list)]
    outside = [node for top in TREE.body if top is not own for node in ast.walk(top)] + [node for p in properties for node in ast.walk(p)]
    read = {node.attr for node in outside if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    dead = {f.name for f in fields(Settings)} - read - {"strict_env"}  # that one is about the parsing itself
    assert not dead, f"nothing outside Settings reads {', '.join(sorted(dead))}: use it where it acts, or remove it"
    unread = sorted({p.name for p in properties} - read)
    assert not unread, f"nothing reads the derived values {', '.join(unread)} of Settings: remove them"


def test_the_environment_is_read_in_few_places():
    """Settings.parse is given the environment by main; Runtime reads what torchrun sets; the log names what looks like a setting."""
    places = set()

    def walk(node, inside):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inside = [*inside, node.name]
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb", "putenv"):
            places.add(".".join(inside) or "the module")
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(TREE, [])
    assert places <= {"the module", "Runtime.__init__", "main", "log_header"}, places
    for node in TREE.body:  # at module level only under `if __name__ == "__main__"`
        if any(isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv") for n in ast.walk(node)) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


IMPORT = """
import os, sys, signal, builtins
ABSENT = {"triton", "flash_attn", "flash_attn_interface", "zstandard", "brotli", "sentencepiece"}

class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch, numpy
state = lambda: (dict(os.environ), sorted(os.listdir(".")), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], torch.get_num_threads(),
                 torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.cuda.is_initialized(), torch.backends.cuda.flash_sdp_enabled(),
                 torch.get_float32_matmul_precision(), torch.distributed.is_initialized())
before = state()
import train_gpt
assert state() == before, (before, state())
assert not torch.cuda.is_initialized()
assert not ABSENT & {name.partition(".")[0] for name in sys.modules}
model = train_gpt.GPT(train_gpt.Settings.parse("NUM_LAYERS=2 MODEL_DIM=16 NUM_HEADS=2 NUM_KV_HEADS=1 ROPE_DIMS=4 XSA_LAST_N=1 VE_DIM=0 VOCAB_SIZE=64 COMPRESSOR=zlib".split()))
ids = torch.zeros(1, 8, dtype=torch.long)
assert torch.isfinite(model(ids, ids))
for choice, package in (("auto", "zstandard"), ("zstd", "zstandard"), ("brotli", "brotli")):
    try:
        train_gpt.Settings.parse([f"COMPRESSOR={choice}"])
        raise SystemExit(f"COMPRESSOR={choice} was accepted without its package")
    except train_gpt.BadInput as error:
        assert f"pip install {package}" in str(error), error
"""


def test_importing_does_nothing_and_needs_only_torch_and_numpy(tmp_path):
    done = subprocess.run([sys.executable, "-c", IMPORT], env=clean_env({"PYTHONPATH": str(REPO), "MATRX_LR": "1", "RANK": "3"}), cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == "" and not list(tmp_path.iterdir())


def test_a_missing_tokenizer_package_is_named_with_the_command_that_installs_it(toy, tmp_path):
    start = ("import sys; sys.argv[0] = 'train_gpt.py'\nclass No:\n def find_spec(self, name, *_):\n"
             "  if name == 'sentencepiece': raise ModuleNotFoundError(\"No module named 'sentencepiece'\", name=name)\n"
             f"sys.meta_path.insert(0, No())\nimport train_gpt\nsys.exit(train_gpt.main({[*toy, 'DEVICE=cpu', f'OUT_DIR={tmp_path}/out']!r}))")
    done = subprocess.run([sys.executable, "-c", start], env=clean_env({"PYTHONPATH": str(REPO)}), capture_output=True, text=True, timeout=60)
    refused(done, 2, "sentencepiece", "pip install")
