"""The same properties on a GPU: close to float32 on the CPU, compiled equal to eager, every attention kernel against
its reference (with documents, too), every switch of training in a compiled run, the optimizer, the loaders, one whole
run, and a warm-up after which nothing is compiled and nothing has changed.

    python -m pytest tests/gpu          on a machine with CUDA; skipped elsewhere
"""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import reference as ref
import torch
from process import run_trainer

import test_liveness
import train_gpt as tg

DEVICE = "cuda"
KERNELS = ("fa3", "cudnn", "flash", "math")
# Heads of 64 channels as in the contest's models, which every kernel supports; otherwise small.
MIDDLE = dict(vocab_size=512, num_layers=3, model_dim=256, num_heads=4, num_kv_heads=2, mlp_mult=3, rope_dims=16,
              xsa_last_n=2, bigram_vocab_size=128,
              bigram_dim=64, ve_dim=32, ve_layers=(1, 2), train_seq_len=256, train_batch_tokens=1024,
              micro_batch_tokens=512, eval_seq_len=256,
              eval_stride=64, eval_batch_seqs=4, warmup_steps=2, iterations=10, max_wallclock_seconds=0,
              compressor="zlib", device=DEVICE, fit="off", matrix_quant="gptq_lite", embed_quant="gptq_lite")


def middle(**changes):
    return ref.parse({**MIDDLE, **changes})


@pytest.fixture(autouse=True)
def clean_state():
    """Compiled graphs and the global choice of attention backends do not leak from one test into the next."""
    backends = torch.backends.cuda
    names = ("cudnn", "flash", "mem_efficient", "math")
    asked = {"cudnn": backends.cudnn_sdp_enabled, "flash": backends.flash_sdp_enabled,
             "mem_efficient": backends.mem_efficient_sdp_enabled,
             "math": backends.math_sdp_enabled}
    before, precision = {name: asked[name]() for name in names}, torch.get_float32_matmul_precision()
    torch._dynamo.reset()
    yield
    for name in names:
        getattr(backends, f"enable_{name}_sdp")(before[name])
    torch.set_float32_matmul_precision(precision)
    torch._dynamo.reset()


def runtime(s):
    rt = tg.Runtime(s, env={})
    assert rt.device.type == DEVICE
    return rt


def pair(s, dtype, attend=None, seed=0, spread=0.08):
    """The same random weights on the CPU in float32 and on the GPU with activations of `dtype`."""
    cpu = ref.randomise(tg.GPT(s, init=False), seed, spread)
    gpu = ref.randomise(tg.GPT(s, dtype, attend, init=False), seed, spread).to(DEVICE)
    return cpu, gpu


def ids_of(s, rows, length, seed=0):
    ids = ref.tokens(s.vocab_size, rows, length + 1, seed=seed, bos=0.02)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def cosine(a, b):
    a, b = a.detach().double().cpu().flatten(), b.detach().double().cpu().flatten()
    return (a @ b / (a.norm() * b.norm()).clamp_min(1e-30)).item()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# --- model -----------------------------------------------------------------------------------------------------------


def test_float32_on_the_gpu_equals_the_cpu():
    s = middle(dtype="float32", compile="off")
    torch.set_float32_matmul_precision("highest")
    cpu, gpu = pair(s, torch.float32)
    x, y = ids_of(s, 2, 200)
    losses = cpu(x, y), gpu(x.to(DEVICE), y.to(DEVICE))
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(cpu.named_parameters(), gpu.named_parameters()):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-2, atol=1e-5 * max(a.grad.abs().max().item(), 1e-3),
                                   msg=lambda m: f"{name}: {m}")


def test_bfloat16_on_the_gpu_is_close_to_float32_on_the_cpu():
    s = middle(compile="off")
    rt = runtime(s)
    assert rt.dtype == torch.bfloat16
    cpu, gpu = pair(s, rt.dtype, tg.pick_attention(s, rt))
    x, y = ids_of(s, 2, 256)
    with torch.no_grad():
        a, b = cpu.logits(cpu.hidden(x)), gpu.logits(gpu.hidden(x.to(DEVICE))).cpu()
    assert b.dtype == torch.float32 and ((a - b).norm() / a.norm()).item() < 0.03
    losses = cpu(x, y), gpu(x.to(DEVICE), y.to(DEVICE))
    assert abs(losses[0].item() - losses[1].item()) < 0.01
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(cpu.named_parameters(), gpu.named_parameters()):
        assert b.grad.dtype == torch.float32 and torch.isfinite(b.grad).all(), name
        if a.numel() >= 64:
            assert cosine(a.grad, b.grad) > 0.98, name


def test_initial_weights_are_those_of_the_cpu():
    s = middle()
    here, there = tg.GPT(s).state_dict(), tg.GPT(s).to(DEVICE).state_dict()
    assert all(torch.equal(here[name], there[name].cpu()) for name in here)


@pytest.mark.parametrize("changes", [
    dict(), dict(num_kv_heads=4, xsa_last_n=0, skips="none", smear_gate="none", doc_mask="none", logit_softcap=0,
                 leaky_slope=0),
    dict(bigram_vocab_size=0, ve_dim=0, ve_layers=(), resid_mix=False, ln_scale=False, rope_dims=0, xsa_last_n=3),
    dict(attn_gate="sparse", smear_gate="scalar", value_residual="sigmoid", skips="gated", parallel_residual="routed",
         parallel_start_layer=1, parallel_first_skip="lane0", parallel_final_lane="learned", num_loops=1, loop_start=0,
         loop_end=1, embed_dim=64, asym_logit_rescale=True,
         trigram_vocab_size=64, trigram=True, tie_embeddings=False),
    dict(doc_mask="attention", attn_gate="dense", value_residual="pair", skips="sigmoid", parallel_residual="lanes",
         parallel_start_layer=2, num_loops=1, loop_start=1, loop_end=1, loop_order="layer", attention="math")])
def test_compiled_equals_eager(changes):
    """Forward and backward of one fused graph; bfloat16 is rounded in other places, so close, not equal."""
    s = middle(**changes)
    rt = runtime(s)
    assert rt.compiled
    attend = tg.pick_attention(s, rt)
    x, y = (ids.to(DEVICE) for ids in ids_of(s, 2, 256))
    results = []
    for compiled in (False, True):
        model = pair(s, rt.dtype, attend)[1]
        function = rt.compile(model) if compiled else model
        loss = function(x, y)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (eager, gradients), (fused, others) = results
    assert abs(eager - fused) < 5e-3
    for name, gradient in gradients.items():
        if gradient.numel() >= 64:
            assert cosine(gradient, others[name]) > 0.99, name
            assert others[name].norm().item() == pytest.approx(gradient.norm().item(), rel=0.03), name


def test_compiled_float32_equals_eager_closely():
    """Without bfloat16's rounding the two must agree to many digits: no part is lost in the graph."""
    s = middle(dtype="float32")
    rt = runtime(s)
    torch.set_float32_matmul_precision("highest")
    attend = tg.pick_attention(s, rt)
    x, y = (ids.to(DEVICE) for ids in ids_of(s, 2, 128))
    eager, compiled = (pair(s, torch.float32, attend)[1] for _ in range(2))
    a, b = eager(x, y), rt.compile(compiled)(x, y)
    assert b.item() == pytest.approx(a.item(), rel=1e-5)
    a.backward(), b.backward()
    for (name, p), (_, q) in zip(eager.named_parameters(), compiled.named_parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-2, atol=1e-4 * max(p.grad.abs().max().item(), 1e-4),
                                   msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("switch", [dict(smear_gate="none"), dict(xsa_last_n=0), dict(doc_mask="none"),
                                    dict(ln_scale=False), dict(leaky_slope=0.1)])
def test_switches_are_alive_in_the_compiled_graph(switch):
    """The same weights, one switch changed: the compiled loss follows the eager one."""
    rt = runtime(middle())
    attend = tg.pick_attention(middle(), rt)
    x, y = (ids.to(DEVICE) for ids in ids_of(middle(), 2, 256))
    weights = pair(middle(), rt.dtype)[1].state_dict()
    losses = []
    for s in (middle(), middle(**switch)):
        model = tg.GPT(s, rt.dtype, attend, init=False).to(DEVICE)
        model.load_state_dict({name: tensor for name, tensor in weights.items() if name in model.state_dict()})
        with torch.no_grad():
            losses.append((model(x, y).item(), rt.compile(model)(x, y).item()))
        torch._dynamo.reset()
    (eager, fused), (other_eager, other_fused) = losses
    assert abs(other_eager - eager) > 1e-4
    assert abs((other_fused - fused) - (other_eager - eager)) < max(5e-3, 0.2 * abs(other_eager - eager))


# --- attention -------------------------------------------------------------------------------------------------------


def kernel(name, s, rt):
    try:
        return tg.pick_attention(tg.replace(s, attention=name), rt)
    except tg.BadInput as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("heads, channels, length", [((4, 2), 64, 256), ((8, 4), 64, 1000), ((4, 4), 128, 333),
                                                     ((6, 1), 64, 64), ((8, 8), 64, 1)])
def test_attention_kernels_equal_the_reference(name, heads, channels, length):
    """Forward and backward in bfloat16 against float32 on the same rounded inputs."""
    s = middle(num_heads=heads[0], num_kv_heads=heads[1], model_dim=heads[0] * channels)
    rt = runtime(s)
    attend = kernel(name, s, rt)
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(2, length, h, channels, generator=generator).bfloat16().to(DEVICE)
               for h in (heads[0], heads[1], heads[1])]
    weight = torch.randn(2, length, heads[0], channels, generator=generator).to(DEVICE)
    results = []
    for function, dtype in ((attend, torch.bfloat16), (tg.attend_reference, torch.float32)):
        leaves = [z.to(dtype).requires_grad_() for z in rounded]
        out = function(*leaves)
        assert out.shape == rounded[0].shape and out.dtype == dtype
        results.append([out.float(), *(g.float() for g in torch.autograd.grad((out.float() * weight).sum(), leaves))])
    for what, a, b in zip(("output", "dq", "dk", "dv"), *results):
        assert torch.isfinite(a).all(), what
        if b.norm() > 1e-6 * b.numel() ** 0.5:  # of one position, dq and dk are zero
            assert ((a - b).norm() / b.norm()).item() < 0.015, what


@pytest.mark.parametrize("name", KERNELS)
def test_attention_kernels_do_not_look_ahead(name):
    s = middle()
    rt = runtime(s)
    attend = kernel(name, s, rt)
    q, k, v = (torch.randn(1, 300, h, 64, device=DEVICE, dtype=torch.bfloat16) for h in (4, 2, 2))
    with torch.no_grad():
        before = attend(q, k, v)
        k[:, 150:], v[:, 150:] = 3.0, -7.0
        after = attend(q, k, v)
    assert torch.equal(before[:, :150], after[:, :150]) and not torch.equal(before[:, 150:], after[:, 150:])


def document_ranges(ids, longest):
    """(for a kernel of lengths, for one of masks) of ids (B, T)."""
    return tuple(tg.find_documents(ids.to(DEVICE), "attention", longest, varlen) for varlen in (True, False))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("heads, channels, rows, length, bos", [
    ((8, 4), 64, 1, 2048, 0.01), ((8, 8), 64, 2, 777, 0.05), ((4, 4), 128, 2, 256, 0.3), ((6, 1), 64, 3, 100, 0.0),
    ((8, 4), 64, 1, 64, 1.0)])
def test_attention_kernels_stay_in_documents(name, heads, channels, rows, length, bos):
    """Lengths or masks, forward and backward, against the reference with a mask; documents are cut at 256 tokens."""
    s = middle(num_heads=heads[0], num_kv_heads=heads[1], model_dim=heads[0] * channels, doc_mask="attention")
    rt = runtime(s)
    attend = kernel(name, s, rt)
    assert getattr(attend, "varlen", False) == (name in ("fa3", "flash"))
    lengths, masks = document_ranges(ref.tokens(512, rows, length, bos=bos), s.longest_sequence)
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(rows, length, h, channels, generator=generator).bfloat16().to(DEVICE)
               for h in (heads[0], heads[1], heads[1])]
    weight = torch.randn(rows, length, heads[0], channels, generator=generator).to(DEVICE)
    results = []
    for function, dtype, docs in ((attend, torch.bfloat16, lengths if getattr(attend, "varlen", False) else masks),
                                  (tg.attend_reference, torch.float32, masks)):
        leaves = [z.to(dtype).requires_grad_() for z in rounded]
        out = function(*leaves, docs)
        assert out.shape == rounded[0].shape and out.dtype == dtype
        results.append([out.float(), *(g.float() for g in torch.autograd.grad((out.float() * weight).sum(), leaves))])
    for what, a, b in zip(("output", "dq", "dk", "dv"), *results):
        assert torch.isfinite(a).all(), what
        if b.norm() > 1e-6 * b.numel() ** 0.5:  # of documents of one token, dq and dk are zero
            assert ((a - b).norm() / b.norm()).item() < 0.015, what
        else:
            assert a.norm() < 1e-2 * a.numel() ** 0.5, what


@pytest.mark.parametrize("name", KERNELS)
def test_attention_kernels_do_not_look_into_other_documents(name):
    s = middle(doc_mask="attention")
    rt = runtime(s)
    attend = kernel(name, s, rt)
    ids = torch.full((1, 256), 7)
    ids[0, [0, 100, 180]] = tg.BOS
    docs = document_ranges(ids, s.longest_sequence)[0 if getattr(attend, "varlen", False) else 1]
    q, k, v = (torch.randn(1, 256, h, 64, device=DEVICE, dtype=torch.bfloat16) for h in (4, 2, 2))
    with torch.no_grad():
        before = attend(q, k, v, docs)
        k[:, 100:180], v[:, 100:180] = 3.0, -7.0
        after = attend(q, k, v, docs)
    assert torch.equal(before[:, :100], after[:, :100]) and torch.equal(before[:, 180:], after[:, 180:])
    assert not torch.equal(before[:, 101:180], after[:, 101:180])


@pytest.mark.parametrize("name", KERNELS)
def test_one_graph_serves_any_number_of_documents(name):
    """Lengths are another tensor in every batch; a graph for each would be compiled for the whole run."""
    s = middle(num_layers=2, ve_layers=(1,), doc_mask="attention")
    rt = runtime(s)
    attend = kernel(name, s, rt)
    losses, model = [], pair(s, rt.dtype, attend)[1]
    other = pair(s, torch.float32, tg.attend_reference)[1]
    function, seen = rt.compile(model), graphs()
    for i, bos in enumerate((0.02, 0.3, 0.0, 0.1, 1.0)):
        ids = ref.tokens(512, 2, 257, seed=i, bos=bos).to(DEVICE)
        x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        docs = model.find_documents(x, 256)
        if docs.cu_seqlens is not None:
            torch._dynamo.maybe_mark_dynamic(docs.cu_seqlens, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            loss = function(x, y, docs)
        loss.backward()
        losses.append((loss.item(), other(x, y).item()))
    assert graphs() - seen <= 2, "one, or one more for a single document"
    assert max(abs(a - b) for a, b in losses) < 0.01, losses


@pytest.mark.parametrize("name", KERNELS)
def test_the_model_trains_with_every_kernel(name):
    """Compiled, with each kernel that can be picked here: loss and gradients of the model with the reference."""
    s = middle(num_layers=2, ve_layers=(1,))
    rt = runtime(s)
    attend = kernel(name, s, rt)
    x, y = (ids.to(DEVICE) for ids in ids_of(s, 2, 256))
    results = []
    for function in (attend, tg.attend_reference):
        model = pair(s, rt.dtype, function)[1]
        loss = (rt.compile(model) if function is attend else model)(x, y)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    assert abs(results[0][0] - results[1][0]) < 5e-3
    assert all(cosine(a, b) > 0.98 for a, b in zip(results[0][1], results[1][1]) if a.numel() >= 64)


def test_auto_takes_a_fast_kernel_and_names_what_it_passed_over():
    s = middle()
    rt = runtime(s)
    tg.pick_attention(s, rt)
    name, choice, reason = rt.choices[-1]
    assert name == "attention" and choice in KERNELS
    assert choice != "math" or all(f"{other}: " in reason for other in ("fa3", "cudnn", "flash"))
    assert choice == "fa3" or "fa3: " in reason


def test_float32_falls_back_to_math_with_a_reason_or_not_at_all():
    s = middle(dtype="float32")
    rt = runtime(s)
    tg.pick_attention(s, rt)
    assert rt.choices[-1][1] == "math" and "bfloat16" in rt.choices[-1][2]
    with pytest.raises(tg.BadInput, match="KERNELS=require.*bfloat16"):
        tg.pick_attention(tg.replace(s, kernels="require"), rt)


# --- optimizer -------------------------------------------------------------------------------------------------------


def test_muon_adam_on_the_gpu_is_that_of_the_cpu():
    """AdamW to float32 rounding; Muon's direction to what bfloat16 Newton-Schulz leaves."""
    s = middle(grad_clip_norm=0.5)
    rt, cpu_rt = runtime(s), ref.alone()
    cpu, gpu = pair(s, torch.float32)
    optimizers = tg.MuonAdam(cpu, s, cpu_rt), tg.MuonAdam(gpu, s, rt)
    table = tg.roles(cpu)
    for step in range(4):
        before = {name: p.detach().clone() for name, p in cpu.named_parameters()}
        shared = {name: p.detach().cpu().clone() for name, p in gpu.named_parameters()}
        for i, name in enumerate(sorted(before)):
            gradient = torch.randn(before[name].shape, generator=torch.Generator().manual_seed(100 * step + i))
            for model in (cpu, gpu):
                dict(model.named_parameters())[name].grad.copy_(gradient)
        for optimizer in optimizers:
            optimizer.step(1.0 - 0.2 * step, 0.9)
        for (name, a), (_, b) in zip(cpu.named_parameters(), gpu.named_parameters()):
            if table[name] == "matrix":
                moved, moved_there = a.detach() - before[name], b.detach().cpu() - shared[name]
                assert cosine(moved, moved_there) > 0.99, (name, step)
                assert moved_there.norm().item() == pytest.approx(moved.norm().item(), rel=0.05), (name, step)
            else:
                torch.testing.assert_close(b.detach().cpu(), a.detach(), rtol=1e-4, atol=1e-6,
                                           msg=lambda m: f"{name} at {step}: {m}")


@pytest.mark.parametrize("coefficients, normalise", [("classic", False), ("classic", True), ("polar_express", False)])
@pytest.mark.parametrize("rows, cols", [(256, 256), (1536, 512), (512, 1536), (512, 128)])
def test_newton_schulz_in_bfloat16(rows, cols, coefficients, normalise):
    g = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0))
    exact = tg.newton_schulz(g.double(), 5, coefficients, normalise, torch.float64)
    rounded = tg.newton_schulz(g.to(DEVICE), 5, coefficients, normalise, torch.bfloat16)
    assert torch.isfinite(rounded).all() and ((rounded.double().cpu() - exact).norm() / exact.norm()).item() < 0.05
    if rows != cols and coefficients == "classic":
        singular = torch.linalg.svdvals(rounded.float().cpu())
        assert singular.min() > 0.5 and singular.max() < 1.35


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def begin(toy, tmp_path):
    """begin(words) -> a run on the GPU before its first step: (run, model, training, validation stream)."""
    def build(*words, folder="run"):
        s = tg.Settings.parse([*toy, f"DEVICE={DEVICE}", "WARMUP_STEPS=2", "MODEL_DIM=128", "NUM_HEADS=2",
                               "NUM_KV_HEADS=1", "TRAIN_SEQ_LEN=128", "TRAIN_BATCH_TOKENS=1024",
                               "MICRO_BATCH_TOKENS=256", "EVAL_SEQ_LEN=128", "EVAL_BATCH_SEQS=4", "ITERATIONS=8",
                               "COMPRESSOR=zlib", f"OUT_DIR={tmp_path / folder}", *words])
        rt = tg.Runtime(s, env={})
        run = tg.Run(s, rt, tmp_path / folder, tg.pick_attention(s, rt))
        sp, *_ = tg.load_tokenizer(s)
        with run.validity.reporting():
            val = tg.load_validation(s, rt, sp)
        model = tg.GPT(s, rt.dtype, run.attend).to(rt.device)
        return run, model, tg.Training(run, model), val
    return build


def one_step(state):
    """A step as in the train loop; returns its loss."""
    state.enter(0.5)
    micro = state.stream.next(*state.run.s.stages[state.stage][1:])
    assert len(micro) > 2
    state.optimizer.zero_grad()
    total = state.backward(micro).item()
    state.optimizer.step(1.0, 0.9)
    return total


def counted(monkeypatch):
    """Graphs before and after the steps of the train loop, which fail if anything is compiled again."""
    counts, steps = [], tg._train_steps

    def wrapped(*args):
        counts.append(graphs())
        with torch._dynamo.config.patch(error_on_recompile=True):
            result = steps(*args)
        counts.append(graphs())
        return result

    monkeypatch.setattr(tg, "_train_steps", wrapped)
    return counts


def test_the_warm_up_leaves_no_trace(begin):
    run, model, state, _ = begin("NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "NORMUON=1", "MTP_NUM_HEADS=1")
    before = {name: tensor.clone() for name, tensor in state.objective.state_dict().items()}
    cuda_rng, cpu_rng = torch.cuda.get_rng_state(), torch.get_rng_state()
    state.warm_up()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.objective.state_dict().items())
    assert state.optimizer.t == 0 and state.stream.position == 0 and state.step == 0
    assert not any(tensor.any() for bank in state.optimizer.banks for tensor in bank.state)
    assert torch.equal(torch.get_rng_state(), cpu_rng) and torch.equal(torch.cuda.get_rng_state(), cuda_rng)


def test_nothing_is_compiled_after_the_warm_up(begin):
    """Neither by real batches nor by a report in between; a recompilation would cost half a minute of the ten."""
    run, model, state, val = begin()
    predictor = tg.ModelPredictor(model, run.rt)
    state.warm_up()
    synthetic = tg.ValStream(torch.zeros_like(val.tokens[: run.s.eval_seq_len + 1]), val.bytes[: run.s.eval_seq_len],
                             False)
    tg.report_score(run, predictor, synthetic)
    compiled = graphs()
    assert compiled > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        first = one_step(state)
        report = tg.report_score(run, predictor, val)
        losses = [one_step(state) for _ in range(4)]
        again = tg.report_score(run, predictor, val)
    assert graphs() == compiled
    assert losses[-1] < first and again.loss < report.loss and not run.validity.reasons


STAGES = ("TRAIN_SEQ_SCHEDULE=64@0.3,128@1", "TRAIN_BATCH_SCHEDULE=512@0.6,1024@1")
LOOP = ("NUM_LOOPS=1", "LOOP_START=1", "LOOP_END=2", "ENABLE_LOOPING_AT=0.5")
PACKED = ("LOADER=packed", "DOC_MASK=attention", "MICRO_BATCH_TOKENS=512", "TRAIN_BATCH_TOKENS=1024")


@pytest.mark.parametrize("words", [
    (), STAGES, LOOP, STAGES + LOOP, PACKED, PACKED + ("ATTENTION=math",), ("DOC_MASK=attention",),
    LOOP + ("LOADER=coprime", "COMPLEMENT_ALPHA=0.5", "MTP_NUM_HEADS=2", "NORMUON=1", "NEWTON_SCHULZ=polar_express"),
    ("AVERAGE=best", "HOLDOUT_TOKENS=600", "SWA_EVERY=1", "SWA_START_SCALE=1", "LAWA_FREQ=1", "LOADER=shuffled")],
    ids=lambda words: "+".join(word.partition("=")[0] for word in words) or "default")
def test_the_whole_loop_compiles_only_in_its_warm_up(begin, monkeypatch, words):
    """Through stages, the start of recurrence, batches of any number of documents, and validation between steps."""
    run, model, state, val = begin("VAL_LOSS_EVERY=3", "TRAIN_LOG_EVERY=1", *words)
    counts = counted(monkeypatch)
    tg.train(run, model, val)
    assert counts[0] == counts[1] > 0
    rows = [json.loads(line) for line in (run.out_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if row["event"] == "train"]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses) and losses[-1] < losses[0]
    missed = {row["what"] for row in rows if row["event"] == "never_reached"}
    assert not missed & {"ENABLE_LOOPING_AT", "stage"}


@pytest.mark.parametrize("words", [PACKED, PACKED + ("ATTENTION=math",), ("DOC_MASK=attention",)],
                         ids=["packed", "packed_mask", "masked"])
def test_documents_on_the_gpu_train_as_on_the_cpu(begin, words):
    run, model, state, _ = begin(*words)
    _, _, other, _ = begin(*words, "DEVICE=cpu", folder="cpu")

    def step(one):
        one.optimizer.zero_grad()
        loss = one.backward(one.stream.next())
        one.optimizer.step(0.3, 0.9)
        return loss.item()

    curves = [[step(one) for _ in range(4)] for one in (state, other)]
    np.testing.assert_allclose(*curves, atol=0.03)


@pytest.mark.parametrize("rows", test_liveness.SHARED, ids=range(len(test_liveness.SHARED)))
def test_every_switch_of_training_in_a_compiled_run(toy, rows):
    """All that the liveness tests flip: compiled in bfloat16 here, eagerly in float32 on the CPU, six steps each.

    In bfloat16 on a CPU these runs stay within 0.006 of float32; kernels of another order of summation are given 0.03.
    """
    words = test_liveness.written(test_liveness.pairs_of(*rows))
    cpu = test_liveness.trained(toy, *words)
    gpu = test_liveness.trained(toy, *words, f"DEVICE={DEVICE}")
    assert len(gpu.losses) == 6 and gpu.micro == cpu.micro
    np.testing.assert_allclose(gpu.losses, cpu.losses, atol=0.03)
    assert gpu.weights.keys() == cpu.weights.keys()
    assert all(torch.isfinite(weight).all() for weight in gpu.weights.values())


def test_two_runs_have_the_same_losses(begin):
    """Kernels that accumulate in any order differ in the last bits; the curve is the same."""
    run, model, state, _ = begin()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    curves = []
    for _ in range(2):
        model.load_state_dict(weights)
        state.stream.position, state.optimizer.t = 0, 0
        for bank in state.optimizer.banks:
            for tensor in bank.state:
                tensor.zero_()
        curves.append([one_step(state) for _ in range(5)])
    np.testing.assert_allclose(curves[0], curves[1], atol=0.02)


def test_the_state_of_a_gpu_run_goes_on_on_the_cpu(begin, monkeypatch):
    """A checkpoint holds the same numbers wherever it was written: the next steps have the losses of the GPU."""
    words = ("NORMUON=1", "COMPLEMENT_ALPHA=0.5", "AVERAGE=best", "HOLDOUT_TOKENS=600", "LAWA_FREQ=1", "DTYPE=float32")
    run, model, state, _ = begin(*words)
    _, _, other, _ = begin(*words, "DEVICE=cpu", folder="cpu")
    state.average.start()
    saved = []
    monkeypatch.setattr(tg, "write_atomic", lambda path, chunks: saved.append(b"".join(chunks)))
    for _ in range(3):
        with run.clock.charge("train"):
            tg._train_step(run, state, 0.1, 0.3)
    state._save()
    data = saved[-1][len(tg.CHECKPOINT_MAGIC) : -32]
    other.load(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    assert other.step == 3 and other.stream.position == state.stream.position
    for name, kept in state.optimizer.state_dict().items():
        if name != "t":
            assert all(torch.equal(a, b) for a, b in zip(kept, other.optimizer.state_dict()[name])), name
    losses = [tg._train_step(one.run, one, 0.2, 0.3)[1] for one in (state, other)]
    run.rt.sync()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=0.01)


@pytest.mark.parametrize("loader", ["sequential", "coprime", "shuffled", "packed"])
def test_prefetched_batches_are_pinned_and_arrive_whole(begin, loader):
    """With a GPU that lags behind, so that a copy that nobody waits for would be seen."""
    words = PACKED if loader == "packed" else (f"LOADER={loader}",)
    _, _, state, _ = begin(*words)
    _, _, other, _ = begin(*words, "DEVICE=cpu", folder="cpu")
    stream, plain = state.stream, other.stream
    seen = []
    for _ in range(6):
        torch.cuda._sleep(20_000_000)
        seen.append(stream.next())
        parts, docs = stream._ahead[1].result()
        assert all(part.is_pinned() and part.dtype == torch.int32 for part in parts), "the next batch waits, pinned"
        assert all(z is None or z.is_pinned() for d in docs if d for z in d)
    for batch in seen:
        for (x, y, docs), (a, b, _) in zip(batch, plain.next(), strict=True):
            assert x.device.type == DEVICE and x.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
            assert torch.equal(x.cpu(), a) and torch.equal(y.cpu(), b)
            if docs is not None and docs.cu_seqlens is not None:
                begins = (docs.cu_seqlens[:-1].long().cpu())
                assert docs.cu_seqlens.dtype == torch.int32 and docs.cu_seqlens[-1].item() == x.numel()
                assert set(np.flatnonzero(a.flatten() == tg.BOS)) <= set(begins.tolist())
                assert docs.cu_seqlens.diff().max() <= state.run.s.train_seq_len


@pytest.mark.parametrize("every", [1, 3])
def test_losses_are_read_only_when_the_gpu_has_made_them(begin, monkeypatch, every):
    """With a GPU that lags behind, and pinned memory full of NaN to be read by whoever does not wait."""
    run, model, state, val = begin(f"CHECKPOINT_EVERY={every}", "ITERATIONS=14", "TRAIN_LOG_EVERY=1000")
    poison = [torch.full((), math.nan).pin_memory() for _ in range(64)]
    fetch = run.rt.fetch

    def slow_fetch(tensor):
        torch.cuda._sleep(100_000_000)  # some 50 ms of GPU time before the copy
        return fetch(tensor)

    monkeypatch.setattr(run.rt, "fetch", slow_fetch)
    del poison
    with run.clock.charge("train"), tg.Interrupt() as interrupt:
        tg._train_steps(run, state, tg.ModelPredictor(model, run.rt), val, interrupt)
    assert state.step == 14 and tg.checkpoints(run.out_dir)


def test_the_cpu_runs_at_most_two_steps_ahead():
    rt = runtime(middle())
    for _ in range(5):
        torch.cuda._sleep(20_000_000)
        ahead = rt.throttle()
    assert ahead == 2
    value = rt.to_cpu(torch.full((), 7.0, device=DEVICE))
    rt.sync()
    assert value.device.type == "cpu" and value.item() == 7.0


# --- score, artifact -------------------------------------------------------------------------------------------------


def test_the_score_on_the_gpu_is_that_of_the_cpu():
    s = middle(dtype="float32")
    rt = runtime(s)
    torch.set_float32_matmul_precision("highest")
    cpu, gpu = pair(s, torch.float32, tg.pick_attention(s, rt))
    ids = ref.tokens(s.vocab_size, 1500, bos=0.02)
    counted = torch.from_numpy(np.random.default_rng(0).integers(0, 9, 1499).astype(np.int16))
    results = []
    for model, at, batch in ((cpu, ref.alone(), 3), (gpu, rt, 4)):
        validity = tg.Validity()
        stream = tg.ValStream(ids.int().to(at.device), counted.to(at.device), True)
        parts = tg.Reader(stream, replace(s, eval_batch_seqs=batch), at)
        results.append(tg.score(tg.ModelPredictor(model, at), parts, stream, at, validity))
        assert validity.reasons == []
    assert results[0][2:] == results[1][2:] == (1499, int(counted.sum()))
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert results[1].bpb == pytest.approx(results[0].bpb, rel=1e-5)


@pytest.mark.parametrize("stride", [0, 64])
def test_the_fused_score_in_bfloat16_is_normalised_and_close(stride):
    s = middle()
    rt = runtime(s)
    cpu, gpu = pair(s, rt.dtype, tg.pick_attention(s, rt))
    ids = ref.tokens(s.vocab_size, 1100, bos=0.02)
    losses = []
    for model, at in ((cpu, ref.alone()), (gpu, rt)):
        validity = tg.Validity()
        stream = tg.ValStream(ids.int().to(at.device), torch.ones(1099, dtype=torch.int16, device=at.device), True)
        losses.append(tg.score(tg.ModelPredictor(model, at), tg.Reader(stream, replace(s, eval_stride=stride), at), stream,
                               at, validity, check_every=1).loss)
        assert validity.reasons == []
    assert abs(losses[0] - losses[1]) < 5e-3


READINGS = {
    "window": {}, "cache": dict(eval_context="cache"), "documents": dict(eval_docs=True),
    "full": dict(ttt="full", ttt_lr=0.01, ttt_epochs=2, ttt_batch_seqs=2),
    "adamw": dict(ttt="full", ttt_optimizer="adamw", ttt_lr=0.001, polyak_decay=0.5, byte_weighted_ttt=True),
    "lora": dict(ttt="lora", ttt_lora_lr=0.01, ttt_lora_targets=("q", "k", "v", "o", "mlp", "head")),
    "lora_docs": dict(ttt="lora_docs", eval_context="cache", ttt_batch_size=4, ttt_lora_targets=("k", "o", "mlp", "head")),
    "phases": dict(ttt="lora_docs", eval_context="window", ttt_batch_size=4, ttt_warm_start_a=True, ttt_group_docs=4,
                   phased_ttt_prefix_docs=4),
    "as published": dict(ttt="lora_docs", eval_context="window", ttt_batch_size=4, ttt_warm_start_a=True, ttt_group_docs=4,
                         ttt_lora_a="own", ttt_lora_scaled=True, ttt_lora_targets=("q", "attn", "mlp", "head"),
                         phased_ttt_prefix_docs=4, token_boost=2.0, token_order=3),
    "backoff": dict(mixer="backoff", mixer_min_tokens=0), "tilt": dict(token_boost=2.0, token_order=3),
    "hedge": dict(mixer="hedge", mixer_min_tokens=0, mixer_experts=("unigram", "bigram", "trigram", "backoff")),
}


def scored_on(s, model, at, ids):
    """(nats of each target, reasons) by what s says."""
    stream = tg.ValStream(ids.int().to(at.device), torch.ones(len(ids) - 1, dtype=torch.int16, device=at.device), True)
    predictor, validity = tg.make_predictor(model, s, at, len(ids)), tg.Validity()
    nats = torch.zeros(len(ids) - 1, dtype=torch.float64, device=at.device)
    reader = tg.reader_for(predictor, stream, s, at)
    tg.score(predictor, reader, stream, at, validity, check_every=4, nats=nats)
    return nats.cpu(), validity.reasons


@pytest.mark.parametrize("name", READINGS)
def test_every_predictor_scores_on_the_gpu_as_on_the_cpu(name):
    """In float32, eager; a text that repeats itself, so that there is something to learn."""
    s = middle(dtype="float32", compile="off", ttt_chunk_tokens=512, **READINGS[name])
    rt = runtime(s)
    torch.set_float32_matmul_precision("highest")
    ids = ref.tokens(s.vocab_size, 700, bos=0.02).repeat(2)
    cpu, gpu = pair(s, torch.float32, tg.pick_attention(s, rt))
    (here, reasons), (there, others) = scored_on(s, cpu, ref.alone(), ids), scored_on(s, gpu, rt, ids)
    assert reasons == others == []
    assert (here - there).abs().max() < 0.02 and here.mean().item() == pytest.approx(there.mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", READINGS)
def test_no_predictor_is_compiled_after_its_rehearsal(toy, tmp_path, name):
    """A whole evaluation in bfloat16: valid, no graph beyond those of the warm-up, tested by itself."""
    words = [f"{key.upper()}={tg.format_value(value)}" for key, value in READINGS[name].items()]
    made = run_trainer([*toy, f"DEVICE={DEVICE}", "ITERATIONS=5", "COMPRESSOR=zlib", "PHASES=train", f"OUT_DIR={tmp_path / 'a'}"],
                       timeout=900)
    assert made.returncode == 0, made.stderr[-2000:]
    done = run_trainer([*toy, f"DEVICE={DEVICE}", "PHASES=eval", f"ARTIFACT={tmp_path / 'a' / 'model.pg'}", "SELFTEST=1",
                        "TTT_CHUNK_TOKENS=512", f"OUT_DIR={tmp_path / 'b'}", *words], timeout=900)
    summary = summary_of(done)
    assert summary["valid"] == "yes" and summary["recompiles"] == 0, summary
    assert done.stdout.count("ok:yes") == 3 and "ok:no" not in done.stdout


def test_the_artifact_of_a_gpu_model_is_that_of_its_cpu_copy(tmp_path):
    s = middle()
    cpu, gpu = pair(s, torch.bfloat16)
    tg.save_artifact(tmp_path / "cpu.pg", cpu, s)
    tg.save_artifact(tmp_path / "gpu.pg", gpu, s)
    _, here = tg.load_artifact(tmp_path / "cpu.pg", s)
    _, there = tg.load_artifact(tmp_path / "gpu.pg", s, torch.bfloat16, None, DEVICE)
    for (name, a), (_, b), weight in zip(here.named_parameters(), there.named_parameters(), cpu.parameters()):
        assert b.device.type == DEVICE and b.dtype == torch.float32
        step = weight.abs().max().item() / 31  # a tie may be rounded the other way
        assert (a - b.cpu()).abs().max().item() <= 1.01 * step
        assert ((a - b.cpu()).abs() > 1e-6).float().mean().item() < 1e-3, name
    x, y = (ids.to(DEVICE) for ids in ids_of(s, 1, 64))
    with torch.no_grad():
        assert torch.isfinite(there(x, y))


# --- curvature and quantisation ----------------------------------------------------------------------------------------


def curvature_of(model, s, rt, rows=8):
    meter = tg.CurvatureMeter(model)
    x, y = ids_of(s, rows, 256)
    meter.observe(x.to(rt.device), y.to(rt.device))
    return meter.curvature(rt)


@pytest.mark.parametrize("switches", [{}, dict(doc_mask="attention", num_loops=1, loop_start=1, loop_end=2)])
def test_moments_in_bfloat16_are_those_of_float32(switches):
    s = middle(**switches)
    rt = runtime(s)
    cpu, gpu = pair(s, rt.dtype, tg.pick_attention(s, rt))
    wanted, found = curvature_of(cpu, s, ref.alone()), curvature_of(gpu, s, rt)
    assert wanted.keys() == found.keys()
    for name in wanted:
        for a, b in zip(wanted[name][:2], found[name]):
            assert b.device.type == DEVICE and cosine(a, b) > 0.98, name
            assert b.double().sum().item() == pytest.approx(a.double().sum().item(), rel=0.2), name
    assert all(p.requires_grad for p in gpu.parameters())


@pytest.mark.parametrize("switches", [dict(fit="allocate"), dict(matrix_clip_sigmas=12.85, lqer_rank=2),
                                      dict(matrix_clip_sigmas=12.85, awq_lite_group_top_k=2, clip_floor=0.1, proj_bits=4),
                                      dict(fit="prune", size_limit=120_000)])
def test_gptq_on_the_gpu_is_as_good_as_on_the_cpu(switches, tmp_path):
    """Ties and the order of sums may decide a code otherwise, and later columns then make up for it."""
    s = middle(matrix_quant="gptq", embed_quant="gptq", **switches)
    cpu, gpu = pair(s, torch.float32)
    curvature = curvature_of(cpu, s, ref.alone())
    there = {name: one.to(DEVICE) for name, one in curvature.items()}
    room = 300_000 if s.fit == "allocate" else s.size_limit
    sizes = [tg.save_artifact(tmp_path / name, model, s, "", None, known, room)["bytes"]
             for name, model, known in (("cpu.pg", cpu, curvature), ("gpu.pg", gpu, there))]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    felt = []
    for name in ("cpu.pg", "gpu.pg"):
        stored, total = dict(tg.load_artifact(tmp_path / name)[1].named_parameters()), 0.0
        for key, (hessian, gain, *_) in curvature.items():
            error = (dict(cpu.named_parameters())[key] - stored[key]).detach().double()
            total += (gain.double() @ ((error @ hessian.double()) * error).sum(1)).item()
        felt.append(total)
    assert felt[1] == pytest.approx(felt[0], rel=0.05)


def test_text_that_the_model_writes_on_the_gpu():
    s = middle()
    rt = runtime(s)
    _, gpu = pair(s, rt.dtype, tg.pick_attention(s, rt))
    text = tg.generate(gpu, 4, 64, 1.0, 0)
    assert text.shape == (4, 65) and text.device.type == DEVICE and (text[:, 0] == tg.BOS).all()
    assert (text >= 0).all() and (text < s.vocab_size).all() and len(text[:, 1:].unique()) > 20
    with torch.no_grad():
        cache = tg.KVCache(gpu, 4, 64)
        steps = torch.cat([cache.advance(text[:, t : t + 1]) for t in range(64)], 1)
        assert cosine(steps, gpu.hidden(text[:, :64])) > 0.999


def test_late_qat_changes_a_compiled_run_and_compiles_nothing_in_it(toy, tmp_path):
    """Losses part at the step at which it begins; the 2-bit grid is too coarse to go unnoticed."""
    losses = {}
    for threshold in ("0", "0.5"):
        done = run_trainer([*toy, f"DEVICE={DEVICE}", "COMPRESSOR=zlib", "ITERATIONS=12", "TRAIN_LOG_EVERY=1", "WARMDOWN_FRAC=1",
                            "MATRIX_BITS=2", "EMBED_BITS=3", f"LATE_QAT_THRESHOLD={threshold}", f"OUT_DIR={tmp_path / threshold}"],
                           env={"TORCH_LOGS": "recompiles"}, timeout=900)
        assert summary_of(done)["valid"] == "yes"
        events = [json.loads(line) for line in (tmp_path / threshold / "metrics.jsonl").read_text().splitlines()]
        losses[threshold] = [event["train_loss"] for event in events if event["event"] == "train"]
    begun = next(event["step"] for event in events if event["event"] == "late_qat")
    assert 5 <= begun <= 7
    assert losses["0"][:begun] == pytest.approx(losses["0.5"][:begun], rel=1e-3)
    assert max(abs(a - b) for a, b in zip(losses["0"][begun:], losses["0.5"][begun:])) > 0.01


# --- the whole run ---------------------------------------------------------------------------------------------------


def summary_of(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1].removeprefix("summary "))


def test_a_whole_run_on_the_gpu(toy, tmp_path):
    """Compiled in bfloat16, eager in bfloat16, and float32 on the CPU: three times the same experiment."""
    extra = ["ITERATIONS=40", "MATRIX_LR=0.01", "SCALAR_LR=0.01", "TIED_EMBED_LR=0.01", "COMPRESSOR=zlib",
             "TRAIN_LOG_EVERY=10"]
    runs = {}
    for name, where in (("compiled", [f"DEVICE={DEVICE}"]), ("eager", [f"DEVICE={DEVICE}", "COMPILE=off"]),
                        ("cpu", ["DEVICE=cpu"])):
        done = run_trainer([*toy, *extra, *where, f"OUT_DIR={tmp_path / name}"], timeout=900)
        runs[name] = summary_of(done)
        assert runs[name]["valid"] == "yes" and runs[name]["steps"] == 40, runs[name]["reasons"]
        assert (tmp_path / name / "model.pg").stat().st_size == runs[name]["model_bytes"]
    # of a uniform guess
    first = math.log2(math.e) * math.log(512) * runs["cpu"]["val_tokens"] / runs["cpu"]["val_bytes"]
    assert runs["cpu"]["val_bpb"] < 0.9 * first
    for name in ("compiled", "eager"):
        assert runs[name]["device"] == torch.cuda.get_device_name(0)
        assert runs[name]["val_bpb"] == pytest.approx(runs["cpu"]["val_bpb"], rel=0.02), name
        assert (runs[name]["val_tokens"], runs[name]["val_bytes"]) == (runs["cpu"]["val_tokens"],
                                                                       runs["cpu"]["val_bytes"])
    assert runs["compiled"]["settings_hash"] == runs["cpu"]["settings_hash"] and runs["compiled"]["peak_memory_mib"] > 0
    text = (tmp_path / "compiled" / "train.log").read_text()
    assert "choice attention:" in text and "choice compile:on" in text and "choice dtype:bfloat16" in text


def test_the_artifact_of_the_gpu_scores_the_same_on_the_cpu(toy, tmp_path):
    done = summary_of(run_trainer([*toy, f"DEVICE={DEVICE}", "COMPILE=off", "COMPRESSOR=zlib",
                                   f"OUT_DIR={tmp_path / 'a'}"], timeout=600))
    again = summary_of(run_trainer([*toy, "DEVICE=cpu", "PHASES=eval", f"ARTIFACT={tmp_path / 'a' / 'model.pg'}",
                                    f"OUT_DIR={tmp_path / 'b'}"], timeout=600))
    assert again["val_bpb"] == pytest.approx(done["val_bpb"], rel=5e-3) and again["val_bytes"] == done["val_bytes"]


def test_a_device_that_does_not_exist_is_named():
    with pytest.raises(tg.BadInput, match="local rank 99"):
        tg.Runtime(middle(), env={"LOCAL_RANK": "99"})
