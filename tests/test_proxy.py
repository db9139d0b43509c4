"""The proxies: as many steps and tokens a parameter as the full run, by the settings themselves, and a run that says it
is no record; and the table of effects in records/proxy.md against the ablation that it is made of."""

import re
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from process import REPO
from runs import call, good, summary

import train_gpt as tg

RECORDS = REPO / "records"
STEPS, BATCH, PARAMETERS = 7188, 786_432, 26_993_756  # the log of #1311, whose model is that of the defaults
FULL = 209.414  # tokens a parameter: 7,188 * 786,432 / 26,993,756

each = pytest.mark.parametrize("name", ["proxy", "proxy-cpu"])


def settings(name):
    return tg.Settings.parse([f"@{RECORDS}/{name}.env"])


def parameters(s):
    with torch.device("meta"):
        return sum(p.numel() for p in tg.GPT(s, init=False).parameters())


def comments(name):
    """The text of the file's comments."""
    lines = (RECORDS / f"{name}.env").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def numbers(pattern, text):
    """The numbers in the groups of a pattern."""
    return [float(group.replace(",", "")) for group in re.search(pattern, text).groups()]


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_full_run():
    assert parameters(tg.Settings()) == PARAMETERS and tg.Settings().train_batch_tokens == BATCH
    assert STEPS * BATCH / PARAMETERS == pytest.approx(FULL, abs=0.001)


@each
def test_as_many_steps_and_tokens_a_parameter_as_the_full_run(name):
    s = settings(name)
    assert s.iterations == STEPS and not s.max_wallclock_seconds, "steps end it, whatever the machine"
    assert s.iterations * s.train_batch_tokens / parameters(s) == pytest.approx(FULL, rel=0.1)
    assert s.idle() == {}


@each
def test_the_comments_say_what_the_settings_are(name):
    s, text = settings(name), comments(name)
    tokens = s.iterations * s.train_batch_tokens
    line = r": ([\d,]+) steps x ([\d,]+) tokens / ([\d,]+) parameters = ([\d.]+) tokens a parameter"
    full = numbers(f"Full run{line}", text)
    here = numbers(f"Here{line}, ([\\d,]+) tokens in all", text)
    assert full == [STEPS, BATCH, PARAMETERS, 209.4]
    assert here == [s.iterations, s.train_batch_tokens, parameters(s), round(tokens / parameters(s), 1), tokens]
    speed, minutes = numbers(r"At ([\d,]+) tokens/s they take ([\d.]+) minutes", text)
    assert minutes == round(tokens / speed / 60, 1) and minutes < 25


@each
def test_what_is_counted_in_steps_stays(name):
    """So that a rate, a decay or a warm-up that is tried here means the same there."""
    s, full = settings(name), tg.Settings()
    for field in ("ema_decay", "muon_momentum", "muon_momentum_warmup_start", "muon_momentum_warmup_steps", "muon_wd",
                  "warmdown_frac", "warmdown_iters", "lr_warmup_steps", "matrix_lr", "scalar_lr", "tied_embed_lr",
                  "adam_wd", "embed_wd", "beta1", "beta2", "average", "grad_clip_norm"):
        assert getattr(s, field) == getattr(full, field), field


def test_proportions():
    gpu, cpu, full = settings("proxy"), settings("proxy-cpu"), tg.Settings()
    assert gpu.head_dim == full.head_dim and gpu.num_layers == full.num_layers
    assert cpu.train_seq_len / cpu.model_dim == full.train_seq_len / full.model_dim
    assert min(cpu.rope_dims, cpu.head_dim) == full.rope_dims
    for s in (gpu, cpu):
        assert s.num_heads / s.num_kv_heads == full.num_heads / full.num_kv_heads
        assert s.mlp_mult == full.mlp_mult
        assert s.bigram_dim / s.model_dim == s.ve_dim / s.model_dim == full.ve_dim / full.model_dim
        assert s.train_batch_tokens % (2 * s.train_seq_len) == 0, "whole sequences for two processes"


def test_a_run_of_the_proxy_says_that_it_is_no_record(toy, tmp_path):
    data = next(word for word in toy if word.startswith("DATA_PATH="))
    done = good(call([f"@{RECORDS}/proxy-cpu.env", data, "ITERATIONS=2", "VAL_TOKENS=1000", "DEVICE=cpu", f"OUT_DIR={tmp_path}"]))
    found = summary(done)
    assert found["valid"] == "yes" and found["eligible"] == "no" and found["params"] == parameters(settings("proxy-cpu"))
    assert any("not 8 x H100" in reason for reason in found["eligible_reasons"])


# ---- which effects kept their sign ----------------------------------------------------------------------------------


class Effect(NamedTuple):
    """Change of BPB over the seeds."""

    mean: float
    least: float
    most: float

    def minus(self, other):
        return Effect(self.mean - other.mean, self.least - other.most, self.most - other.least)

    def __str__(self):
        return f"{self.mean:+.4f} ({self.least:+.4f} .. {self.most:+.4f})"


SIGNS = "Which effects kept their sign"
NOTHING = Effect(0, 0, 0)
LEAST = 0.003  # BPB: records/ablation.md says that less is nothing


def ablation():
    """({technique: Effect} of the embedded text, the same of the development corpus)."""
    tables = []
    for section in (RECORDS / "ablation.md").read_text().split("## On the development corpus"):
        found = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([-+.\d]+) \(([-+.\d]+) \.\. ([-+.\d]+)\) \|", section, re.M)
        tables.append({technique: Effect(*map(float, values)) for technique, *values in found})
    return tables


def of_row(row, table):
    """The effect that a row of the table of signs names: of a technique, of its opposite, or of one against another."""
    if row.endswith(", reversed"):
        return NOTHING.minus(table[row.removesuffix(", reversed")])
    if " less " in row:
        one, other = row.split(" less ")
        return table[one].minus(table[other])
    return table[row]


def verdict(published, effect):
    seen = abs(effect.mean) >= LEAST and not effect.least <= 0 <= effect.most
    if published.startswith("none"):
        return "only here" if seen else "same"
    if not seen:
        return "none seen"
    return "same" if published[0] == f"{effect.mean:+}"[0] else "opposite"


def section(title):
    return (RECORDS / "proxy.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def table_rows(text, count):
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if len(row) == count][1:]


def test_effects_are_those_of_the_ablation():
    embedded, corpus = ablation()
    assert len(embedded) == len(corpus) > 55
    rows = table_rows(section(SIGNS), 7)
    assert len(rows) > 30
    for technique, published, row, *found in rows:
        effects = [of_row(row, table) for table in (embedded, corpus)]
        want = []
        for effect in effects:
            want += [str(effect), verdict(published, effect)]
        assert found == want, f"{technique}: write | {' | '.join(want)} |"
        assert re.match(r"[-+]|none", published) and re.search(r"#\d+", published)


def test_the_summary_counts_its_table():
    text = section(SIGNS)
    counts = Counter()
    for _, published, _, _, one, _, other in table_rows(text, 7):
        if not published.startswith("none"):
            counts["all"] += 1
            counts["both"] += (one, other) == ("same", "same")
            counts["one"] += "same" in (one, other)
            counts["unseen"] += one == other == "none seen"
            counts["opposite"] += "opposite" in (one, other)
    words = " ".join(text.split())
    said = numbers(r"Of (\d+) effects that were published with a sign, (\d+) keep it on at least one of the two texts \((\d+) on "
                   r"both\), (\d+) are below what the ablation sees, and (\d+) are opposite on one or both", words)
    assert said == [counts[name] for name in ("all", "one", "both", "unseen", "opposite")]


def test_effects_of_packing_and_evaluation_are_those_of_their_pages():
    rows = table_rows(section(SIGNS), 5)
    assert len(rows) >= 7
    for technique, published, measured, source, kept in rows:
        change, after, before = map(float, re.match(r"([-+]\d\.\d+) \((\d\.\d+) from (\d\.\d+)\)", measured).groups())
        assert change == pytest.approx(after - before, abs=1e-9), technique
        page = (RECORDS / re.search(r"\((\w+\.md)\)", source)[1]).read_text()
        assert re.search(rf"\+?{after}\b", page) and re.search(rf"\+?{before}\b", page), technique
        same = "same" if published[0] == f"{change:+}"[0] else "opposite"
        assert kept == ("none seen" if "two trainings" in source and abs(change) < LEAST else same), technique
    kept = [row[-1] for row in rows]
    assert f"{kept.count('same')} of the {len(rows)} of packing and evaluation" in " ".join(section(SIGNS).split())
