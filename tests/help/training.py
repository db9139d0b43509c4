"""The training phase in this process, on a few hundred tokens that can be learned: what optimizer, schedules and
averages do in a real run, at the price of a hundredth of a second a step.

    s = ref.small(**text(tmp_path), average="swa")
    weights, rows = trained(s, tmp_path / "run")     the exported weights, the events of the log
"""

import contextlib
import io

import numpy as np
import reference as ref
import torch
from runs import events
from toy import write_shard

import train_gpt as tg

VOCAB = ref.SMALL["vocab_size"]


def walk(count, seed=0, bos=0.1):
    """Tokens each of which has two likely successors, cut into documents."""
    rng, ids = np.random.default_rng(seed), [1]
    for fresh, step in zip(rng.random(count - 1) < bos, rng.integers(1, 3, count - 1)):
        ids.append(1 if fresh else int(2 + (5 * ids[-1] + step) % (VOCAB - 2)))
    return ids


def text(folder, tokens=None):
    """Training shards of these tokens, in two parts; the setting that finds them."""
    folder.mkdir(exist_ok=True)
    tokens = walk(1500) if tokens is None else tokens
    for i, part in enumerate((tokens[:700], tokens[700:])):
        write_shard(folder / f"fineweb_train_{i:06d}.bin", part)
    return dict(data_path=str(folder), device="cpu", val_loss_every=0)


def validation(seed=99, targets=48):
    return tg.ValStream(torch.tensor(walk(targets + 1, seed), dtype=torch.int32),
                        torch.ones(targets, dtype=torch.int16), True)


def begun(s, rt, out_dir):
    """(run, training) before the first step, from random weights: what is zero at first hides what reads it."""
    run = tg.Run(s, rt, out_dir, tg.attend_sdpa)
    model = ref.randomise(tg.GPT(s, attend=run.attend), spread=0.2)
    return run, tg.Training(run, model)


def trained(s, out_dir, val=None):
    """Train from random weights: ({name: exported weight}, events)."""
    rt = tg.Runtime(s, {})
    model = ref.randomise(tg.GPT(s, attend=tg.attend_sdpa), spread=0.2)
    with contextlib.redirect_stdout(io.StringIO()):
        tg.train(tg.Run(s, rt, out_dir, tg.attend_sdpa), model, validation() if val is None else val)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, events(out_dir)


def captured_whole(monkeypatch):
    """Let the next compiled run be traced with no code generated, and end where it is traced again while the clock runs.
    Returns a list that will hold the number of graphs before the steps and behind them.
    """
    compiler, steps, counts = torch.compile, tg._train_steps, []
    monkeypatch.setattr(tg.torch, "compile", lambda function, **words: compiler(function, **words, backend="eager"))

    def graphs(*args):
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        with torch._dynamo.config.patch(error_on_recompile=True):
            result = steps(*args)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(tg, "_train_steps", graphs)
    torch._dynamo.reset()
    return counts


def scales(rows):
    """Learning-rate scale of each step in the log, which holds at least the first ten."""
    return [row["lr_scale"] for row in rows if row["event"] == "train"]
