"""What a training log says: one of ours, or one that a script of the contest printed.

    for log in read_logs(path): print(log.seed, log.val_bpb, log.lines["val_bpb"])

Nothing in a file can make this fail: what a log does not say is None. A file may be cut off, UTF-16, a capture of a
console, or hold several runs. The forms were read from the 3,900 logs of the contest's public pull requests.
"""

import bisect
import codecs
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import BadInput

MOST_BYTES = 64 << 20  # of a log: the largest public one has 4 MB
LONGEST_LINE = 2_000  # bytes of a line that are looked at, but for the summary


class Phase(NamedTuple):
    """A part of the evaluation, as the log names it."""

    name: str
    seconds: float
    line: int
    scored: bool  # did it end in a score? Else it is an adaptation


class Score(NamedTuple):
    """A line with a loss and a score."""

    name: str  # what stands before them
    loss: float | None  # nats per token
    bpb: float
    digits: int  # of the score, after the point
    seconds: float | None  # that this evaluation took
    line: int


class Log(NamedTuple):
    """What one run says of itself."""

    path: Path
    form: str  # ours | contest | json | pointer (of Git LFS) | empty | binary | other text
    first_line: int = 1  # of this run in its file
    seed: int | None = None
    world_size: int | None = None
    gpu: str | None = None
    gpus: int | None = None  # that nvidia-smi lists
    torch: str | None = None
    attention: str | None = None
    train_shards: int | None = None
    val_tokens: int | None = None  # of the validation set that is loaded
    val_bytes: int | None = None
    scored_tokens: int | None = None
    steps: int | None = None
    train_seconds: float | None = None  # at which the training stopped
    calibrate_seconds: float | None = None  # of reading text for Hessians
    generate_seconds: float | None = None  # of making such text with the model
    eval_seconds: float | None = None
    eval_note: str = ""  # how eval_seconds was found
    needed_seconds: float | None = None  # the part of eval_seconds that the score needs
    phases: tuple[Phase, ...] = ()
    code_bytes: int | None = None  # that the log counts
    raw_code_bytes: int | None = None  # before it was compressed, where the log counts it so
    model_bytes: int | None = None
    total_bytes: int | None = None
    other_totals: tuple[int, ...] = ()  # of variants beside the one that is submitted
    val_loss: float | None = None  # final
    val_bpb: float | None = None
    digits: int | None = None  # of val_bpb, after the point
    scores: tuple[Score, ...] = ()  # every one but those of steps and of progress
    code_sha256: str | None = None  # of the script, as the log states it
    source_sha256: str | None = None  # see source_hash(): of the source at the top of the log
    artifact_sha256: str | None = None
    settings: dict[str, str] | None = None
    settings_hash: str | None = None  # the same for every seed
    valid: str | None = None  # ours: yes or no
    reasons: tuple[str, ...] = ()
    eligible: str | None = None
    eligible_reasons: tuple[str, ...] = ()
    tested: str | None = None  # ours: yes, if the self-tests ran and passed
    documents_in_training: int | None = None  # ours: validation documents whose openings are training text
    doubled_path: str | None = None  # of the data, as in #2127
    prequant_line: int | None = None  # the first that says: trained on validation text before packing
    gates: dict[str, int] | None = None  # of n-grams: how often one that looks at the target was open
    passes: int | None = None  # over the validation text, where the log counts them
    temperature: float | None = None  # of the final softmax, where it is not 1
    selected_line: int | None = None  # the first that says: weights chosen by their score on validation text
    val_share: float | None = None  # of the validation documents that are scored
    tracebacks: int = 0
    mixed_line: int | None = None  # at which step or clock go back though no run begins there
    summaries: int = 0
    stated_seed: int | None = None  # ours: of the line of settings, where the summary has `seed`
    logged_steps: int | None = None  # of the last line of a step, where the summary has `steps`
    lines: dict[str, int] = {}  # {field: line that states it}

    @property
    def is_run(self):
        """Is this the log of a training or an evaluation?"""
        return self.steps is not None or self.val_bpb is not None or self.train_seconds is not None


# ---- the bytes of a file --------------------------------------------------------------------------------------------


def read_log(path):
    """The last run in a file."""
    return read_logs(path)[-1]


def read_logs(path):
    """The runs in a file, at least one. BadInput if it cannot be read."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(raw) > MOST_BYTES:
        raise BadInput(f"{path}: over {MOST_BYTES:,} bytes, which no log of a run has")
    return parse(raw, path)


def parse(raw, path):
    """The runs in these bytes of a file."""
    body = as_utf8(raw)
    form = form_of(body)
    if form != "text":
        return [Log(path, form)]
    rows = body.splitlines()
    printed = []  # (number of the first line, hash) of each source
    for begin, end in list(sources(rows)):
        printed.append((begin + 1, source_hash(b"\n".join(rows[begin:end]))))
        rows[begin:end] = [b""] * (end - begin)
    lines = [Line(number, row, row[:LONGEST_LINE].lower()) for number, row in enumerate(rows, 1)]
    steps = steps_of(lines)
    cuts, breaks = restarts(lines, steps)
    runs = []
    for begin, end in itertools.pairwise([0, *cuts, len(lines)]):
        log = read_run(Part(lines[begin:end], [step for step in steps if begin < step.line <= end]), path)
        mixed_line = next((number for number in breaks if begin < number <= end), None)
        log = log._replace(source_sha256=source_of(log, printed), mixed_line=mixed_line)
        if not any(is_same_run(log, other) for other in runs):
            runs.append(log)
    return [log for log in runs if log.is_run] or runs[:1]


def as_utf8(raw):
    """The bytes of a text in UTF-8, whatever wrote it."""
    head = raw[:4096]
    encoding = None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif head[1::2].count(0) > len(head) // 3:
        encoding = "utf-16-le"
    if encoding:
        raw = raw.decode(encoding, "replace").encode("utf-8", "replace")
    return raw.removeprefix(codecs.BOM_UTF8)


def form_of(body):
    """What kind of file these bytes are, as far as their beginning tells."""
    head = body[:4096].lstrip()
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "pointer"
    if b"\0" in head:
        return "binary"
    if head[:1] in b"{[":
        try:
            json.loads(body)
            return "json"
        except (ValueError, RecursionError):
            pass
    return "text"


# ---- the source at the top ------------------------------------------------------------------------------------------

RULE = re.compile(rb"={40,}$")  # that the scripts print before and after their source
PYTHON = re.compile(rb"(?:import|from|def|class) \w")
FIRST_LINE = re.compile(rb"#|r?[\"']|import \w|from \w")
MAIN = re.compile(rb"if __name__ ?== ?[\"']__main__[\"']:")  # of the last statement
INDENTED = re.compile(rb"[ \t]+\S")
COMMENT = re.compile(rb"#|[ \t]*$")  # or a blank line


def sources(rows):
    """(begin, end) of each copy of the source, in lines: up to the last lines of a script, else up to the next rule."""
    starts = [number for number, row in enumerate(rows) if PYTHON.match(row)]
    mains = [number for number, row in enumerate(rows) if MAIN.match(row)]
    rules = [-1, *(number for number, row in enumerate(rows) if RULE.match(row))]
    at = 0
    for first in starts:
        if first < at:
            continue
        section = max(at, rules[bisect.bisect(rules, first) - 1] + 1)
        begin = next((number for number in range(section, first) if FIRST_LINE.match(rows[number])), first)
        if mains and mains[-1] >= first:
            end = end_of_script(rows, mains[bisect.bisect_left(mains, first)])
        elif rules[-1] > first:
            end = rules[bisect.bisect(rules, first)]
        else:
            return
        if bisect.bisect_left(starts, end) - bisect.bisect_left(starts, begin) >= 5:
            yield begin, end
        at = end


def end_of_script(rows, main):
    """The line below a script's last statement and the comments that follow it."""
    below = itertools.dropwhile(INDENTED.match, rows[main + 1 :])
    return len(rows) - len(list(itertools.dropwhile(COMMENT.match, below)))


def source_of(log, printed):
    """The hash of the source that was printed last before the steps of a run, or None."""
    place = log.lines.get("logged_steps") or log.lines.get("val_bpb", log.first_line)
    return next((digest for line, digest in reversed(printed) if line <= place), None)


def source_hash(source):
    """SHA-256 of a script without blanks at the ends of its lines, which consoles change."""
    lines = [line.rstrip() for line in source.strip().splitlines()]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


# ---- looking for lines ----------------------------------------------------------------------------------------------


class Line(NamedTuple):
    number: int  # in the file, from 1
    text: bytes  # as the file has it
    lower: bytes  # in lower case, and of a long line the beginning

    def group(self, match, number=1):
        """A group of a match in the line in lower case, as the file has it."""
        return self.text[slice(*match.span(number))]


def whole(text):
    """An integer such as 15,987,547."""
    return int(text.replace(b",", b"").replace(b"_", b""))


class Phrase(NamedTuple):
    """One way in which lines say something."""

    word: bytes  # in every such line, in lower case
    pattern: bytes  # of the line in lower case
    read: Callable | None = whole  # of the first group, as the file has it; None: the value is the number of the line
    last: bool = False  # of several such lines the last one counts, not the first


class Part:
    """The part of a file that is one run, and what was found in it so far."""

    def __init__(self, lines, steps):
        self.lines = lines
        self.steps = steps
        self.found = {}  # {field of Log: value}
        self.places = {}  # {field: number of the line that states it}

    def note(self, place, **values):
        self.found |= values
        self.places |= dict.fromkeys(values, place)

    def lines_with(self, word):
        return [line for line in self.lines if word in line.lower]

    def matches(self, phrase):
        """[(line, match)] of the lines that say this."""
        found = [(line, re.search(phrase.pattern, line.lower)) for line in self.lines_with(phrase.word)]
        return [(line, match) for line, match in found if match]

    def times(self, phrase):
        """{number of a line: seconds} of the lines that say this."""
        return {line.number: seconds_of(match) for line, match in self.matches(phrase)}


def name(text):
    return text.decode("utf-8", "replace").strip()


SECONDS = {b"ms": 0.001, b"s": 1.0, b"m": 60.0}


def seconds_of(match, group=1):
    """Seconds of a number and, in the next group, its unit."""
    return float(match[group]) * SECONDS.get(match[group + 1], 1.0)


NUMBER = rb"(\d{1,18}(?:\.\d{0,18})?)"
COUNT = rb"(\d[\d,_]{0,20})"

# ---- steps and runs -------------------------------------------------------------------------------------------------

# `step:4000/20000 val_loss:`, `step:34 train_loss:`, `4000/20000 val_loss:` with or without a time before it
STEP = re.compile(rb"(?:\bstep[:= ] ?|^s:|^(?:\[[^\]]{1,40}\]:? ?|[\dtz:.-]{8,40} |\d{1,6} )?(?=\d{1,9}/))"
                  rb"(\d{1,9})(?:/\d{1,9})?[ ,|]+(?:(?:train_|val_)?loss|tl|vl)\b")
STEP_CLOCK = re.compile(rb"\b(?:train_time|tt|t|time)[:=] ?" + NUMBER + rb"(ms|s|m)\b")
# What a run prints before its first step.
BEGINNINGS = (b"hyperparameters:", b"val_bpb:enabled", b"train_loader:", b"model_params", b"train_shards",
              b"running python", b"warmup_step", b"seed:", b"seed=", b"torch/distributed/run")


class Step(NamedTuple):
    line: int
    number: int
    seconds: float | None


def steps_of(lines):
    """The lines of steps, in order."""
    steps = []
    for line in lines:
        is_step = any(word in line.lower for word in (b"loss", b" tl:", b" vl:"))
        match = STEP.search(line.lower) if is_step else None
        if match:
            clock = STEP_CLOCK.search(line.lower, match.end())
            steps.append(Step(line.number, int(match[1]), seconds_of(clock) if clock else None))
    return steps


def goes_back(earlier, later):
    """Do two lines of steps that follow one another come from two runs? Times in minutes have one digit."""
    if later.number < earlier.number:
        return True
    if earlier.seconds is None or later.seconds is None:
        return False
    return later.seconds < 0.98 * earlier.seconds - 7.0


def restarts(lines, steps):
    """(places of the lines with which further runs begin in a file, numbers of those at which steps go back though no
    run begins).
    """
    cuts = []
    breaks = []
    for earlier, later in itertools.pairwise(steps):
        if not goes_back(earlier, later):
            continue
        between = [line.lower for line in lines[earlier.line - 1 : later.line - 1]]
        if any(line.startswith(b"resume step:") for line in between):
            continue  # the same run, continued from its checkpoint
        beginnings = [place for place, line in enumerate(between) if any(word in line for word in BEGINNINGS)]
        if beginnings:
            cuts.append(earlier.line - 1 + beginnings[0])
        else:
            breaks.append(later.line)
    return cuts, breaks


def is_same_run(log, other):
    """Is this the same run again, as where a console and a log file were joined?"""
    facts = ("seed", "steps", "train_seconds", "val_bpb", "total_bytes")
    return log.is_run and all(getattr(log, fact) == getattr(other, fact) for fact in facts)


def read_run(part, path):
    """What the lines of one run say."""
    read_facts(part)
    read_signs(part)
    read_sizes(part)
    read_calibration(part)
    read_evaluation(part)
    is_ours = any(line.lower.startswith(b"run out_dir:") for line in part.lines)
    if not is_ours:
        read_settings(part)
    read_summary(part)
    return Log(path, "ours" if is_ours else "contest", part.lines[0].number, **part.found, lines=part.places)


# ---- single facts ---------------------------------------------------------------------------------------------------


def milliseconds(text):
    return float(text) / 1000


def gpu(text):
    return name(text).upper()


def gates(text):
    """{name: how often it was open}."""
    found = re.findall(rb"\b(within_gate|word_gate|agree2plus)[=:](\d{1,12})\b", text.lower())
    return {name(key): int(count) for key, count in found}


SCORED_TOKENS = rb"\b(?:target_tokens|scored_tokens|tokens_scored|total_targets|subset)[:=] ?" + COUNT
GPU_NAME = rb"\b(h100|h200|b200|a100|gb10|l40s?|v100|t4|mi300x|rtx[ -]?(?:pro )?\d{4})\b"
SELECTED = rb"\b(?:best_averaging|best_model|using best|selected):? ?\w+.{0,20}\b(?:val_)?bpb|\bbest_model:"
FACTS = (  # of several for a field, the first that is found counts
    ("seed", Phrase(b"seed", rb"^(?:.{0,120}[ \]:])?seed ?[:=] ?(\d{1,12})\b")),
    ("seed", Phrase(b"s:", rb"^s:(\d{1,12})$")),  # this and `ws:`, `tl:`, `vl:` are of #1033 and its relatives
    ("world_size", Phrase(b"world", rb"\bworld[_ ]size ?[:=] ?(\d{1,6})\b")),
    ("world_size", Phrase(b"ws:", rb"\bws:(\d{1,6})\b")),
    ("gpu", Phrase(b"gpu", GPU_NAME, gpu)),
    ("gpu", Phrase(b"device", GPU_NAME, gpu)),
    ("gpu", Phrase(b"nvidia", GPU_NAME, gpu)),
    ("torch", Phrase(b"pytorch", rb"\brunning pytorch (\S{3,40})", name)),
    ("torch", Phrase(b"torch", rb"\b(?:py)?torch(?:_version)?[:=] ?v?(\d\.\d+\.\d\S{0,20})", name)),
    ("attention", Phrase(b"attention:", rb"^choice attention:(\w+)", name)),
    ("attention", Phrase(b"attention_backend", rb"\battention_backend[:=] ?(\S{1,60})", name)),
    ("attention", Phrase(b"flash_attn", rb"\b(flash_attn_3|flash_attn_interface)\b", name)),
    ("attention", Phrase(b"sdp_backends", rb"\bsdp_backends:(.{1,80})", name)),
    ("train_shards", Phrase(b"train_shards", rb"\btrain_shards ?[:=] ?(\d{1,9})\b")),
    ("train_shards", Phrase(b"train:", rb"^train:\S+ shards:(\d{1,9})\b")),
    ("val_tokens", Phrase(b"tokens", rb"\bval_loader:.*\btokens:" + COUNT)),
    ("val_tokens", Phrase(b"val_tokens", rb"\bval_tokens ?[:=] ?" + COUNT)),
    ("val_tokens", Phrase(b"validation tokens", rb"\bvalidation tokens: ?" + COUNT)),
    ("val_tokens", Phrase(b"fineweb_val_", rb"^val:\S+ n:" + COUNT)),
    ("val_bytes", Phrase(b"val_bytes", rb"\bval_bytes ?[:=] ?" + COUNT, last=True)),
    ("scored_tokens", Phrase(b"tokens", SCORED_TOKENS, last=True)),
    ("steps", Phrase(b"stopping_early", rb"\bstep: ?(\d{1,9})\b")),
    ("train_seconds", Phrase(b"stopping_early", rb"\btrain_time[^:]{0,40}: ?" + NUMBER + rb"ms\b", milliseconds)),
    ("train_seconds", Phrase(b"training complete in", rb"\btraining complete in " + NUMBER + rb" ?s\b", float)),
    ("train_seconds", Phrase(b"training_seconds", rb"\btraining_seconds: ?" + NUMBER, float)),
    ("raw_code_bytes", Phrase(b"uncompressed", rb"\bcode size \(uncompressed\): ?" + COUNT)),
    ("code_bytes", Phrase(b"compressed", rb"\bcode size \(compressed\): ?" + COUNT)),
    ("code_bytes", Phrase(b"code size", rb"\bcode size: ?" + COUNT + rb" ?b")),
    ("code_bytes", Phrase(b"code", rb"\bcode(?:_bytes)?[:=] ?(\d[\d,]{3,9})b?\b", last=True)),
    ("passes", Phrase(b"pass 2", rb"\bpass (2) done\b")),
    ("temperature", Phrase(b"temperature", rb"\b(?:eval_|ttt_| |^)temperature[:=] ?(0\.\d{1,6}|1\.\d{1,6})\b", float)),
    ("temperature", Phrase(b"optimal_t:", rb"\boptimal_t:" + NUMBER, float)),
    ("val_share", Phrase(b"val_doc_fraction", rb"\bval_doc_fraction ?[:=] ?" + NUMBER, float)),
    # What a reviewer looks for: data with validation text in it, validation text that is used before it may be.
    ("doubled_path", Phrase(b"datasets/datasets/", rb"(\S*datasets/datasets/\S*)", name)),
    ("prequant_line", Phrase(b"quant", rb"\b(?:pre_?quant_ttt: ?(?:epoch|done)|post-prequant-ttt )", None)),
    ("selected_line", Phrase(b"best_", SELECTED, None)),
    ("gates", Phrase(b"within_gate", rb"(.*within_gate.*)", gates, last=True)),
)
GPU_ROW = Phrase(b"nvidia ", rb"^\|? +(\d+) +nvidia ([a-z0-9][\w .-]{1,30}?) +(?:on|off) *\|")
# An epoch over the validation text; ttt_burst replays training text (#589).
TTT_EPOCH = Phrase(b"ttt", rb"\bttt(?!_burst)\w{0,20}[: ] ?epoch[: ]\d+/\d+")


def read_facts(part):
    for step in part.steps:
        if step.seconds is not None:
            part.note(step.line, train_seconds=step.seconds)
    for step in part.steps[-1:]:
        part.note(step.line, logged_steps=step.number, steps=step.number)
    known = set()
    for field, phrase in FACTS:
        found = [] if field in known else part.matches(phrase)
        if found:
            line, match = found[-1 if phrase.last else 0]
            value = phrase.read(line.group(match)) if phrase.read else line.number
            part.note(line.number, **{field: value})
            known.add(field)


def read_signs(part):
    """The rows of nvidia-smi, epochs over the validation text before the model is packed, and errors."""
    rows = {match[1]: (line, match) for line, match in part.matches(GPU_ROW)}  # by index: they may be printed twice
    if rows:
        line, match = next(iter(rows.values()))
        part.note(line.number, gpu=name(line.group(match, 2)), gpus=len(rows))
    packed = [line.number for line in part.lines_with(b"serialized model") if b"+" in line.lower]
    before = [line.number for line, _ in part.matches(TTT_EPOCH) if packed and line.number < packed[-1]]
    if before:
        part.note(before[0], prequant_line=before[0])
    tracebacks = part.lines_with(b"traceback (most recent call last)")
    if tracebacks:
        part.note(tracebacks[-1].number, tracebacks=len(tracebacks))


# ---- sizes ----------------------------------------------------------------------------------------------------------

TOTAL = Phrase(b"total submission", rb"\btotal submission(?: size)? ?([^:\n]{0,40}?) ?: ?" + COUNT + rb" ?bytes")
MODEL = Phrase(b"serialized model", rb"\bserialized model ?([^:\n]{0,40}?) ?: ?" + COUNT + rb" ?bytes")
OTHER_TOTALS = (  # of scripts that do not keep the baseline's words
    Phrase(b"total_bytes", rb"\btotal_bytes: ?" + COUNT),
    Phrase(b"total_submission", rb"\btotal_submission=" + COUNT),
    Phrase(b"total:", rb"\bcode(?:_bytes)?:" + COUNT + rb" (?:model:" + COUNT + rb" )?total:" + COUNT),
    Phrase(b"total:", rb"^total:" + COUNT + rb"b$"),
    Phrase(b"final_submission_bytes", rb"final_submission_bytes: ?" + COUNT),
    Phrase(b", total:", rb"\bbytes, total: ?" + COUNT + rb" bytes"),
    Phrase(b"submission size", rb"\bsubmission size: ?" + COUNT + rb" bytes"),
    Phrase(b"artifact size", rb"\bartifact size: +" + COUNT + rb" bytes"),
    Phrase(b"artifact:", rb"\bartifact: ?" + COUNT + rb" ?b(?:ytes)?\b"),
    Phrase(b"artifact_bytes", rb"\bartifact_bytes(?: total)?\"?: +" + COUNT),
)
UNPACKED = re.compile(rb"raw|fp\d|bf\d|float|uncompressed")
PACKED_LIMIT = 30_000_000  # bytes: a total above it is of the model before it was packed


class Size(NamedTuple):
    bytes: int
    name: bytes
    line: int


def sizes(part, phrase):
    """The Sizes that lines state: in the last group of each match the bytes, in the first one of what."""
    return [Size(whole(match.groups()[-1]), match[1], line.number) for line in part.lines_with(phrase.word)
            for match in re.finditer(phrase.pattern, line.lower)]


def read_sizes(part):
    """The size of what is submitted. Scripts print it for variants too (an int8 one beside the int6 one), and the
    baseline for the unpacked model, without a name; the smallest is taken to be the submission.
    """
    totals = sizes(part, TOTAL)
    packed = [size for size in totals if size.name and not UNPACKED.match(size.name)]
    packed = packed or [size for size in totals if size.bytes < PACKED_LIMIT]
    packed = packed or next(filter(None, (sizes(part, phrase) for phrase in OTHER_TOTALS)), [])
    models = [size for size in sizes(part, MODEL) if size.name]
    if packed:
        total = min(packed)
        others = {size.bytes for size in packed} - {total.bytes}
        part.note(total.line, total_bytes=total.bytes, other_totals=tuple(sorted(others)))
        fitting = [size for size in models if size.bytes <= total.bytes]
        exact = [size for size in fitting if total.bytes - size.bytes == part.found.get("code_bytes")]
        models = exact[-1:] or fitting[-1:] or models
    if models:
        model = min(models)
        part.note(model.line, model_bytes=model.bytes)


# ---- clocks and scores ----------------------------------------------------------------------------------------------

# Each family says the same time in its own words; a log has one of them, or repeats it in two.
CALIBRATION = (
    Phrase(b"hessian", rb"\bgptq: ?collected \d+ hessians\b.{0,30}? in " + NUMBER + rb"(s)\b"),
    Phrase(b"hessian", rb"\bhessians collected\b.{0,40}?(?:time|elapsed| in)[= ]" + NUMBER + rb"(s)\b"),
    Phrase(b"calibrat", rb"\bgptq:(?:loop-aware )?calibrated \d+ layers in " + NUMBER + rb"(s)\b"),
    Phrase(b"calibrat", rb"\bgptq:calibration done in " + NUMBER + rb"(ms)\b"),
    Phrase(b"hessian", rb"\bcollected hessians for \d+ layers (?:in |\()" + NUMBER + rb"(s)\b"),
    Phrase(b"gptq:done", rb"\bgptq:done layers=\d+ time=" + NUMBER + rb"(ms)\b"),
    Phrase(b"calibrat", rb"^calibrate source:\S+ tokens:\d+ seconds:" + NUMBER + rb"()"),
)
GENERATION = Phrase(b"generated", rb"\b(?:gptq|trinity):generated \d+ seq(?:uence)?s in " + NUMBER + rb"(ms|s)\b")
OUTSIDE = Phrase(b"outside", rb"precompute\w*outside\w* elapsed=" + NUMBER + rb"(s)\b")
TOTAL_EVAL = Phrase(b"total_eval_", rb"\btotal_eval_(?:time|wallclock): ?" + NUMBER + rb"(s)\b")
ADAPTATIONS = tuple(Phrase(word, (  # an evaluation's own times that no score carries
    rb"\b([a-z_]*(?:ttt|slot)[a-z_0-9]*): ?(?:(?:total_)?(?:done|elapsed|completed|time|total)\b)[^\n]{0,60}?"
    rb"(?:elapsed=|time[=:]|total_time[=:]| in |elapsed:)? ?" + NUMBER + rb"(ms|s)\b")) for word in (b"ttt", b"slot"))
SCORE = re.compile(rb"^(.{0,200}?)\b(?:val_loss|vl)[:=] ?(\d{1,9}\.\d{1,18})[ ,;|]{1,3}(?:val_)?bpb[:=] ?"
                   rb"(\d{1,9}\.\d{1,18})")
SCORE_TIME = re.compile(rb"\b(?:eval_time|eval|time|elapsed|t)[:=] ?" + NUMBER + rb"(ms|s)\b")
ONLY_BPB = re.compile(rb"\b(\w{0,40}?)bpb\w{0,20}(?: ?\([^)\n]{1,20}\))? ?[:=] {0,12}(\d{1,9}\.\d{1,18})")
LONGEST_LABEL = 200
# Of the weights before they were packed, of a part of the text, or of something that is not the submission.
NOT_FINAL = re.compile(rb"diag|pre.?quant|post.?(?:ema|swa|average)|pre.?ttt|raw|candidate|(?:swa|ema)[_ ](?:eval|bpb)|"
                       rb"^ema\b|weights|\bbest|baseline|post_train|sweep|search|ablation")
PROGRESS = re.compile(rb"epoch|chunk|batch|progress|running|rank:|\d/\d|%")  # a line while something is scored


def read_calibration(part):
    families = [part.times(phrase) for phrase in CALIBRATION]
    longest = max(families, key=lambda times: sum(times.values()))
    if longest:
        part.note(max(longest), calibrate_seconds=sum(longest.values()))
    generated = part.times(GENERATION)
    if generated:
        part.note(max(generated), generate_seconds=sum(generated.values()))


def read_scores(part):
    """The Score of every line with one but those of steps and of progress."""
    steps = {step.line for step in part.steps}
    scores = []
    for line in part.lines_with(b"bpb"):
        text = line.lower
        if line.number in steps or PROGRESS.search(text[:LONGEST_LABEL].partition(b"bpb")[0]):
            continue
        match = SCORE.search(text)
        if match:
            found = [match.groups()]
        else:
            first_word = text.split(None, 1)[0][:LONGEST_LABEL]
            found = [(first_word + b" " + match[1], None, match[2]) for match in ONLY_BPB.finditer(text)]
        time = SCORE_TIME.search(text)
        for label, loss, bpb in found:
            label = name(label).removesuffix(" val_").strip(" :|[]_")
            scores.append(Score(label, float(loss) if loss else None, float(bpb), len(bpb.partition(b".")[2]),
                                seconds_of(time) if time else None, line.number))
    return scores


def is_final(score):
    return not NOT_FINAL.search(score.name.encode())


def final_score(scores):
    """The last Score of the submission; of lines that say the same, the one with the most digits; None without any."""
    finals = [score for score in scores if is_final(score)]
    finals = [score for score in finals if score.loss is not None] or finals
    same = [score for score in finals if says_the_same(score, finals[-1])]
    return max(same, key=lambda score: (score.digits, score.line), default=None)


def says_the_same(score, other):
    digits = min(score.digits, other.digits)
    return abs(score.bpb - other.bpb) <= 0.6 * 10**-digits


def read_evaluation(part):
    """The final score, and the seconds of the evaluation: the log's own total, or the sum of its phases, of which some
    may be diagnostics that the score does not need.
    """
    scores = read_scores(part)
    final = final_score(scores)
    if final:
        part.note(final.line, val_bpb=final.bpb, val_loss=final.loss, digits=final.digits)
    timed = read_phases(part, scores)
    phases = distinct(timed)
    part.note(part.lines[0].number, scores=tuple(scores), phases=tuple(phases))
    outside = sum(part.times(OUTSIDE).values())
    totals = part.times(TOTAL_EVAL)
    if totals:
        place = max(totals)
        total = needed = totals[place]
        note = f"total_eval_time and {outside:.1f} s before its timer" if outside else "total_eval_time"
    elif phases:
        place = timed[-1].line
        total = sum(phase.seconds for phase in phases)
        needed = needed_seconds(phases, final)
        note = " + ".join(f"{phase.name} {phase.seconds:.1f}" for phase in phases)
    else:
        return
    part.note(place, eval_seconds=total + outside, needed_seconds=needed + outside, eval_note=note)


def read_phases(part, scores):
    """The Phases of a run in order: final scores with a time, and adaptations."""
    timed = {}
    for score in scores:
        if score.seconds is not None and is_final(score):
            timed.setdefault(score.line, Phase(score.name, score.seconds, score.line, True))
    for phrase in ADAPTATIONS:
        for line, match in part.matches(phrase):
            timed.setdefault(line.number, Phase(name(match[1]), seconds_of(match, 2), line.number, False))
    return [timed[number] for number in sorted(timed)]


def distinct(phases):
    """The phases without those that are said twice: `ttt:done elapsed=293.2s`, then `legal_ttt eval_time:293430ms`."""
    kept = []
    for phase in phases:
        if kept and abs(kept[-1].seconds - phase.seconds) <= 0.01 * phase.seconds + 1.0:
            kept[-1] = phase
        else:
            kept.append(phase)
    return kept


def needed_seconds(phases, final):
    """Seconds of the phases that end in the final score: its own, and adaptations that have no score themselves."""
    if final is None:
        return 0.0
    own = [phase.seconds for phase in phases if phase.scored and abs(phase.line - final.line) <= 3]
    adapted = [phase.seconds for phase in phases if not phase.scored and phase.line < final.line]
    return max(own, default=0.0) + sum(adapted)


# ---- settings and our summary ---------------------------------------------------------------------------------------

PAIR = re.compile(rb"^[^\n]{0,60}?  ([a-z][a-z0-9_]{1,60}): ?(.{0,200})$")
WORDS = re.compile(rb"([a-z][a-z0-9_]{1,40}):(\S{1,80})")
BASELINE_WORDS = (b"model_params:", b"attention_mode:", b"tie_embeddings:", b"train_batch_tokens:", b"world_size:")
# Differ between the runs of one configuration: what names a run and its files, and the machine.
OF_A_RUN = re.compile(r"(?:^|_)(?:seed|run_id|path|paths|dir|files?|logfile|rank|process|device|name|tag|out)(?:$|_)|"
                      r"^(?:world_size|grad_accum_steps|distributed)$")


def configuration(settings):
    """The settings that all runs of one configuration share."""
    return {key: value for key, value in settings.items() if not OF_A_RUN.search(key.lower()) and " at 0x" not in value}


def settings_hash(settings):
    """SHA-256 of a configuration."""
    kept = sorted(configuration(settings).items())
    return hashlib.sha256(repr(kept).encode("utf-8", "replace")).hexdigest()


def read_settings(part):
    """Settings as late scripts list them below a heading, else as the baseline says them in a few lines."""
    pairs = []
    for line in part.lines_with(b"hyperparameters:")[:1]:
        place = line.number
        below = part.lines[place - part.lines[0].number + 1 :]
        matches = itertools.takewhile(bool, (PAIR.match(line.lower) for line in below))
        pairs = [match.groups() for match in matches]
    if len({key for key, _ in pairs}) < 5:
        pairs = []
        for word in BASELINE_WORDS:
            for line in part.lines_with(word)[:1]:
                place = line.number
                pairs += WORDS.findall(line.lower)
    if pairs:
        settings = {name(key): name(value) for key, value in pairs}
        part.note(place, settings=settings, settings_hash=settings_hash(settings))


def number(value):
    """A number if it is of a size that such a number can have, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e18 else None


def text(value):
    return value if isinstance(value, str) else None


def texts(value):
    return tuple(" ".join(str(item).split()) for item in value) if isinstance(value, list) else None


def pairs_of(value):
    """{NAME: value} of a line NAME=value NAME=value."""
    if not isinstance(value, str):
        return None
    try:
        pairs = shlex.split(value)
    except ValueError:
        pairs = value.split()
    return dict(pair.partition("=")[::2] for pair in pairs)


SUMMARY = {  # {field of Log: (its key in our summary, what reads the value)}
    **{key: (key, number) for key in (
        "seed", "world_size", "val_tokens", "val_bytes", "steps", "train_seconds", "calibrate_seconds", "eval_seconds",
        "code_bytes", "model_bytes", "total_bytes", "val_loss", "val_bpb")},
    **{key: (key, text) for key in (
        "code_sha256", "artifact_sha256", "settings_hash", "valid", "eligible", "tested")},
    "reasons": ("reasons", texts), "eligible_reasons": ("eligible_reasons", texts), "settings": ("settings", pairs_of),
    "gpu": ("device", text), "gpus": ("world_size", number), "needed_seconds": ("eval_seconds", number),
    "documents_in_training": ("val_documents_in_training", number)}


def read_summary(part):
    """Our last line, which is exact; it stands above what was read from the lines before."""
    found = ((line.number, summary_in(line.text)) for line in part.lines)
    summaries = [(place, summary) for place, summary in found if summary is not None]
    if not summaries:
        return
    place, summary = summaries[-1]
    values = {field: read(summary.get(key)) for field, (key, read) in SUMMARY.items()}
    values = {field: value for field, value in values.items() if value is not None}
    if "eval_seconds" in values:
        values["eval_note"] = "eval_seconds of the summary"
    if "val_bpb" in values:
        values["digits"] = 8
    part.found["stated_seed"] = part.found.get("seed")
    part.note(place, summaries=len(summaries), **values)


def summary_in(line):
    """The JSON object behind the word `summary` that begins a line, or None."""
    try:
        value = json.loads(line.removeprefix(b"summary ")) if line.startswith(b"summary {") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
