"""What a training log says: one of ours, or one that a script of the contest printed.

    for log in read_logs(path): print(log.seed, log.val_bpb, log.lines["val_bpb"])

Nothing in a file can make this fail: what a log does not say is None. A file may be cut off, UTF-16, a capture of a
console, or hold several runs. The forms were read from the 3,900 logs of the contest's public pull requests.
"""

import bisect
import hashlib
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
    if form in ("pointer", "empty", "binary", "json"):
        return [Log(path, form)]
    printed, body = without_sources(body)
    text = Text(body)
    ends, breaks = restarts(text)
    runs = []
    begin = 0
    for end in [*ends, len(body)]:
        mixed_line = next((text.number(offset) for offset in breaks if begin <= offset < end), None)
        log = read_run(text, begin, end, path)
        log = log._replace(source_sha256=source_of(log, printed), mixed_line=mixed_line)
        if not any(same_run(log, other) for other in runs):
            runs.append(log)
        begin = end
    return [log for log in runs if log.is_run] or runs[:1]


def as_utf8(raw):
    """The bytes of a text with line feeds, whatever wrote it: UTF-16, carriage returns, a console."""
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"), (b"\xef\xbb\xbf", "utf-8")):
        if raw.startswith(mark):
            raw = raw[len(mark):].decode(encoding, "replace").encode("utf-8", "replace")
            break
    else:
        head = raw[:4096]
        if head[1::2].count(0) > len(head) // 3:
            raw = raw.decode("utf-16-le", "replace").encode("utf-8", "replace")
    return raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


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

RULE = re.compile(rb"^={40,}$", re.MULTILINE)  # that the scripts print before and after their source
PYTHON = re.compile(rb"^(?:import|from|def|class) \w", re.MULTILINE)
FIRST_LINE = re.compile(rb"^(?:#|r?[\"']|import \w|from \w)", re.MULTILINE)
LAST_LINES = re.compile(  # with the comments below them
    rb"^if __name__ ?== ?[\"']__main__[\"']:.*\n(?:[ \t]+\S.*\n?)*(?:#.*\n?|[ \t]*\n)*", re.MULTILINE)


def without_sources(body):
    """([(line, hash)] of each source that is printed, the log with these lines blank)."""
    printed = []
    parts = []
    at = 0
    for begin, end in sources(body):
        printed.append((body.count(b"\n", 0, begin) + 1, source_hash(body[begin:end])))
        parts += [body[at:begin], b"\n" * body.count(b"\n", begin, end)]
        at = end
    return printed, b"".join([*parts, body[at:]])


def source_of(log, printed):
    """The hash of the source that was printed last before the steps of a run, or None."""
    place = log.lines.get("logged_steps") or log.lines.get("val_bpb", log.first_line)
    before = [digest for line, digest in printed if line <= place]
    return before[-1] if before else None


def sources(body):
    """(begin, end) of each copy of the source: up to the last lines of a script, else up to the next rule."""
    rules = [(match.start(), match.end()) for match in RULE.finditer(body)]
    last_lines = [(match.start(), match.end()) for match in LAST_LINES.finditer(body)]
    at = 0
    for first in PYTHON.finditer(body):
        if first.start() < at:
            continue
        section = last_before(rules, first.start(), at)
        header = FIRST_LINE.search(body, section, first.start())
        begin = header.start() if header else first.start()
        end = end_of_source(rules, last_lines, first.start())
        if end is None:
            return
        if len(PYTHON.findall(body, begin, end)) >= 5:
            yield begin, end
        at = end


def last_before(spans, offset, default):
    """The end of the last span that begins before an offset."""
    number = bisect.bisect_left(spans, (offset,))
    return max(spans[number - 1][1], default) if number else default


def end_of_source(rules, last_lines, offset):
    """Where a source that has begun ends, or None."""
    number = bisect.bisect_left(last_lines, (offset,))
    if number < len(last_lines):
        return last_lines[number][1]
    number = bisect.bisect_left(rules, (offset,))
    return rules[number][0] if number < len(rules) else None


def source_hash(source):
    """SHA-256 of a script without blanks at the ends of its lines, which consoles change."""
    lines = [line.rstrip() for line in source.strip().splitlines()]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()


# ---- looking for lines ----------------------------------------------------------------------------------------------


class Text:
    """A log as bytes, in which lines are found by a word."""

    def __init__(self, body):
        self.body = body
        self.lower = body.lower()
        self.ends = [match.start() for match in re.finditer(rb"\n", body)]

    def lines_with(self, word, begin, end):
        """(offset, line in lower case) of each line between these offsets that holds the word."""
        at = self.lower.find(word, begin, end)
        while at >= 0:
            start = self.lower.rfind(b"\n", 0, at) + 1
            stop = self.lower.find(b"\n", at)
            if stop < 0:
                stop = len(self.lower)
            yield start, self.lower[start : min(stop, start + LONGEST_LINE)]
            at = self.lower.find(word, stop, end)

    def original(self, offset, length):
        """The bytes at an offset as the file has them, as text."""
        return self.body[offset : offset + length].decode("utf-8", "replace")

    def line_from(self, offset):
        """The whole rest of the line at an offset, as the file has it."""
        stop = self.body.find(b"\n", offset)
        return self.body[offset:] if stop < 0 else self.body[offset:stop]

    def number(self, offset):
        """The number of the line at this offset, from 1."""
        return bisect.bisect_left(self.ends, offset) + 1


def whole(text):
    """An integer such as 15,987,547."""
    return int(text.replace(b",", b"").replace(b"_", b""))


def real(text):
    return float(text)


def milliseconds(text):
    return float(text) / 1000


NUMBER = rb"(\d{1,18}(?:\.\d{0,18})?)"
COUNT = rb"(\d[\d,_]{0,20})"

# ---- steps and runs -------------------------------------------------------------------------------------------------

# `step:4000/20000 val_loss:`, `step:34 train_loss:`, `4000/20000 val_loss:` with or without a time before it
STEP = re.compile(rb"(?:\bstep[:= ] ?|^s:|^(?:\[[^\]]{1,40}\]:? ?|[\dtz:.-]{8,40} |\d{1,6} )?(?=\d{1,9}/))"
                  rb"(\d{1,9})(?:/\d{1,9})?[ ,|]+(?:(?:train_|val_)?loss|tl|vl)\b")
STEP_CLOCK = re.compile(rb"\b(?:train_time|tt|t|time)[:=] ?" + NUMBER + rb"(ms|s|m)\b")
SECONDS = {b"ms": 0.001, b"s": 1.0, b"m": 60.0}
# What a run prints before its first step.
BEGINNINGS = (b"hyperparameters:", b"val_bpb:enabled", b"train_loader:", b"model_params", b"train_shards",
              b"running python", b"warmup_step", b"seed:", b"seed=", b"torch/distributed/run")


class Step(NamedTuple):
    offset: int
    number: int
    seconds: float | None


def steps_of(text, begin, end):
    """The lines of steps, in order."""
    found = {}
    for word in (b"loss", b" tl:", b" vl:"):
        for offset, line in text.lines_with(word, begin, end):
            match = STEP.search(line) if offset not in found else None
            if match is None:
                continue
            clock = STEP_CLOCK.search(line, match.end())
            seconds = seconds_of(clock, 1) if clock else None
            found[offset] = Step(offset, int(match.group(1)), seconds)
    return [found[offset] for offset in sorted(found)]


def seconds_of(match, group):
    """Seconds of a number and, in the next group, its unit."""
    return float(match.group(group)) * SECONDS.get(match.group(group + 1), 1.0)


def goes_back(earlier, later):
    """Do two lines of steps that follow one another come from two runs? Times in minutes have one digit."""
    if later.number < earlier.number:
        return True
    if earlier.seconds is None or later.seconds is None:
        return False
    return later.seconds < 0.98 * earlier.seconds - 7.0


def restarts(text):
    """(offsets at which further runs begin in a file, offsets of steps that go back though no run begins)."""
    steps = steps_of(text, 0, len(text.body))
    cuts = []
    breaks = []
    for earlier, later in zip(steps, steps[1:]):
        if not goes_back(earlier, later):
            continue
        if text.lower.find(b"\nresume step:", earlier.offset, later.offset) >= 0:
            continue  # the same run, continued from its checkpoint
        places = [text.lower.find(word, earlier.offset, later.offset) for word in BEGINNINGS]
        places = [place for place in places if place >= 0]
        if places:
            cuts.append(text.lower.rfind(b"\n", 0, min(places)) + 1)
        else:
            breaks.append(later.offset)
    return cuts, breaks


def same_run(log, other):
    """Is this the same run again, as where a console and a log file were joined?"""
    facts = ("seed", "steps", "train_seconds", "val_bpb", "total_bytes")
    mine = [getattr(log, fact) for fact in facts]
    theirs = [getattr(other, fact) for fact in facts]
    return mine == theirs and log.is_run


# ---- single facts ---------------------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """A value that a line states."""

    field: str
    word: bytes  # in every such line, in lower case
    pattern: re.Pattern  # its first group is the value
    read: Callable = whole
    last: bool = False  # the last such line counts, not the first


def fact(field, word, pattern, read=whole, last=False):
    return Fact(field, word, re.compile(pattern), read, last)


def name(text):
    return text.decode("utf-8", "replace").strip()


SCORED_TOKENS = rb"\b(?:target_tokens|scored_tokens|tokens_scored|total_targets|subset)[:=] ?" + COUNT
FACTS = (  # of several for a field, the first that is found counts
    fact("seed", b"seed", rb"^(?:.{0,120}[ \]:])?seed ?[:=] ?(\d{1,12})\b"),
    fact("seed", b"s:", rb"^s:(\d{1,12})$"),  # this and `ws:`, `tl:`, `vl:` are of #1033 and its relatives
    fact("world_size", b"world", rb"\bworld[_ ]size ?[:=] ?(\d{1,6})\b"),
    fact("world_size", b"ws:", rb"\bws:(\d{1,6})\b"),
    fact("torch", b"pytorch", rb"\brunning pytorch (\S{3,40})", name),
    fact("torch", b"torch", rb"\b(?:py)?torch(?:_version)?[:=] ?v?(\d\.\d+\.\d\S{0,20})", name),
    fact("attention", b"attention:", rb"^choice attention:(\w+)", name),
    fact("attention", b"attention_backend", rb"\battention_backend[:=] ?(\S{1,60})", name),
    fact("attention", b"flash_attn", rb"\b(flash_attn_3|flash_attn_interface)\b", name),
    fact("attention", b"sdp_backends", rb"\bsdp_backends:(.{1,80})", name),
    fact("train_shards", b"train_shards", rb"\btrain_shards ?[:=] ?(\d{1,9})\b"),
    fact("train_shards", b"train:", rb"^train:\S+ shards:(\d{1,9})\b"),
    fact("val_tokens", b"tokens", rb"\bval_loader:.*\btokens:" + COUNT),
    fact("val_tokens", b"val_tokens", rb"\bval_tokens ?[:=] ?" + COUNT),
    fact("val_tokens", b"validation tokens", rb"\bvalidation tokens: ?" + COUNT),
    fact("val_tokens", b"fineweb_val_", rb"^val:\S+ n:" + COUNT),
    fact("val_bytes", b"val_bytes", rb"\bval_bytes ?[:=] ?" + COUNT, last=True),
    fact("scored_tokens", b"tokens", SCORED_TOKENS, last=True),
    fact("steps", b"stopping_early", rb"\bstep: ?(\d{1,9})\b"),
    fact("train_seconds", b"stopping_early", rb"\btrain_time[^:]{0,40}: ?" + NUMBER + rb"ms\b", milliseconds),
    fact("train_seconds", b"training complete in", rb"\btraining complete in " + NUMBER + rb" ?s\b", real),
    fact("train_seconds", b"training_seconds", rb"\btraining_seconds: ?" + NUMBER, real),
    fact("raw_code_bytes", b"uncompressed", rb"\bcode size \(uncompressed\): ?" + COUNT),
    fact("code_bytes", b"compressed", rb"\bcode size \(compressed\): ?" + COUNT),
    fact("code_bytes", b"code size", rb"\bcode size: ?" + COUNT + rb" ?b"),
    fact("code_bytes", b"code", rb"\bcode(?:_bytes)?[:=] ?(\d[\d,]{3,9})b?\b", last=True),
    fact("passes", b"pass 2", rb"\bpass (2) done\b"),
    fact("temperature", b"temperature", rb"\b(?:eval_|ttt_| |^)temperature[:=] ?(0\.\d{1,6}|1\.\d{1,6})\b", real),
    fact("temperature", b"optimal_t:", rb"\boptimal_t:" + NUMBER, real),
    fact("val_share", b"val_doc_fraction", rb"\bval_doc_fraction ?[:=] ?" + NUMBER, real),
)
GATE = re.compile(rb"\b(within_gate|word_gate|agree2plus)[=:](\d{1,12})\b")
GPU_ROW = re.compile(rb"^\|? +(\d+) +nvidia ([a-z0-9][\w .-]{1,30}?) +(?:on|off) *\|")
GPU_NAME = re.compile(rb"\b(h100|h200|b200|a100|gb10|l40s?|v100|t4|mi300x|rtx[ -]?(?:pro )?\d{4})\b")
DOUBLED_PATH = re.compile(rb"(\S*datasets/datasets/\S*)")
SELECTED = re.compile(rb"\b(?:best_averaging|best_model|using best|selected):? ?\w+.{0,20}\b(?:val_)?bpb|\bbest_model:")
PREQUANT = re.compile(rb"\b(?:pre_?quant_ttt: ?(?:epoch|done)|post-prequant-ttt )")
TTT_EPOCH = re.compile(rb"\bttt(?!_burst)\w{0,20}[: ] ?epoch[: ]\d+/\d+")  # ttt_burst replays training text (#589)


class Part:
    """The part of a file that is one run, and what was found in it so far."""

    def __init__(self, text, begin, end):
        self.text = text
        self.begin = begin
        self.end = end
        self.found = {}  # {field of Log: value}
        self.lines = {}  # {field: number of the line that states it}

    def lines_with(self, word, until=None):
        return self.text.lines_with(word, self.begin, self.end if until is None else until)

    def note(self, field, value, offset):
        self.found[field] = value
        self.lines[field] = self.text.number(offset)


def read_run(text, begin, end, path):
    """What the part of a file between two offsets says."""
    part = Part(text, begin, end)
    read_facts(part)
    read_steps(part)
    read_gpu(part)
    read_signs(part)
    read_sizes(part)
    read_calibration(part)
    read_evaluation(part)
    form = "contest"
    if any(line.startswith(b"run out_dir:") for _, line in part.lines_with(b"run out_dir:")):
        form = "ours"
    else:
        read_settings(part)
    read_summary(part)
    return Log(path, form, text.number(begin), **part.found, lines=part.lines)


def read_facts(part):
    for row in FACTS:
        if row.field in part.found:
            continue
        for offset, line in part.lines_with(row.word):
            match = row.pattern.search(line)
            if match:
                part.note(row.field, row.read(match.group(1)), offset)
                if not row.last:
                    break


def read_steps(part):
    steps = steps_of(part.text, part.begin, part.end)
    if not steps:
        return
    part.note("logged_steps", steps[-1].number, steps[-1].offset)
    if "steps" not in part.found:
        part.note("steps", steps[-1].number, steps[-1].offset)
    if "train_seconds" not in part.found:
        timed = [step for step in steps if step.seconds is not None]
        if timed:
            part.note("train_seconds", timed[-1].seconds, timed[-1].offset)


def read_gpu(part):
    rows = {}  # by index, since nvidia-smi may be printed twice
    for offset, line in part.lines_with(b"nvidia "):
        match = GPU_ROW.search(line)
        if match:
            rows[match.group(1)] = (part.text.original(offset + match.start(2), len(match.group(2))), offset)
    if rows:
        model, offset = next(iter(rows.values()))
        part.note("gpu", model, offset)
        part.note("gpus", len(rows), offset)
        return
    for word in (b"gpu", b"device", b"nvidia"):
        for offset, line in part.lines_with(word):
            match = GPU_NAME.search(line)
            if match:
                part.note("gpu", name(match.group(1)).upper(), offset)
                return


def read_signs(part):
    """What a reviewer looks for: data with validation text in it, validation text used before it may be, errors."""
    for offset, line in part.lines_with(b"datasets/datasets/"):
        match = DOUBLED_PATH.search(line)
        part.note("doubled_path", part.text.original(offset + match.start(1), len(match.group(1))), offset)
        break
    for offset, line in part.lines_with(b"quant"):
        if PREQUANT.search(line):
            part.note("prequant_line", part.text.number(offset), offset)
            break
    packed = [offset for offset, line in part.lines_with(b"serialized model") if b"+" in line]
    for offset, line in part.lines_with(b"ttt", until=max(packed, default=part.begin)):
        if TTT_EPOCH.search(line):
            part.note("prequant_line", part.text.number(offset), offset)
            break
    for offset, line in part.lines_with(b"best_"):
        if SELECTED.search(line):
            part.note("selected_line", part.text.number(offset), offset)
            break
    for offset, line in part.lines_with(b"within_gate"):
        part.note("gates", {name(key): int(count) for key, count in GATE.findall(line)}, offset)
    tracebacks = list(part.lines_with(b"traceback (most recent call last)"))
    if tracebacks:
        part.note("tracebacks", len(tracebacks), tracebacks[-1][0])


# ---- sizes ----------------------------------------------------------------------------------------------------------

TOTAL = re.compile(rb"\btotal submission(?: size)? ?([^:\n]{0,40}?) ?: ?" + COUNT + rb" ?bytes")
MODEL = re.compile(rb"\bserialized model ?([^:\n]{0,40}?) ?: ?" + COUNT + rb" ?bytes")
OTHER_TOTALS = (  # of scripts that do not keep the baseline's words
    (b"total_bytes", re.compile(rb"\btotal_bytes: ?" + COUNT)),
    (b"total_submission", re.compile(rb"\btotal_submission=" + COUNT)),
    (b"total:", re.compile(rb"\bcode(?:_bytes)?:" + COUNT + rb" (?:model:" + COUNT + rb" )?total:" + COUNT)),
    (b"total:", re.compile(rb"^total:" + COUNT + rb"b$")),
    (b"final_submission_bytes", re.compile(rb"final_submission_bytes: ?" + COUNT)),
    (b", total:", re.compile(rb"\bbytes, total: ?" + COUNT + rb" bytes")),
    (b"submission size", re.compile(rb"\bsubmission size: ?" + COUNT + rb" bytes")),
    (b"artifact size", re.compile(rb"\bartifact size: +" + COUNT + rb" bytes")),
    (b"artifact:", re.compile(rb"\bartifact: ?" + COUNT + rb" ?b(?:ytes)?\b")),
    (b"artifact_bytes", re.compile(rb"\bartifact_bytes(?: total)?\"?: +" + COUNT)),
)
UNPACKED = re.compile(rb"raw|fp\d|bf\d|float|uncompressed")
PACKED_LIMIT = 30_000_000  # bytes: a total above it is of the model before it was packed


def read_sizes(part):
    """The size of what is submitted. Scripts print it for variants too (an int8 one beside the int6 one), and the
    baseline for the unpacked model, without a name; the smallest is taken to be the submission.
    """
    totals = []
    for offset, line in part.lines_with(b"total submission"):
        for match in TOTAL.finditer(line):
            totals.append((whole(match.group(2)), match.group(1), offset))
    named = [total for total in totals if total[1] and not UNPACKED.match(total[1])]
    packed = named or [total for total in totals if total[0] < PACKED_LIMIT]
    if not packed:
        packed = other_totals(part)
    models = []
    for offset, line in part.lines_with(b"serialized model"):
        for match in MODEL.finditer(line):
            if match.group(1):
                models.append((whole(match.group(2)), offset))
    if packed:
        total, _, offset = min(packed)
        part.note("total_bytes", total, offset)
        part.note("other_totals", tuple(sorted({other[0] for other in packed} - {total})), offset)
        fitting = [model for model in models if model[0] <= total]
        models = fitting[-1:] or models
        if fitting and "code_bytes" in part.found:
            exact = [model for model in fitting if model[0] + part.found["code_bytes"] == total]
            models = exact[-1:] or models
    if models:
        size, offset = min(models)
        part.note("model_bytes", size, offset)


def other_totals(part):
    for word, pattern in OTHER_TOTALS:
        rows = []
        for offset, line in part.lines_with(word):
            match = pattern.search(line)
            if match:
                rows.append((whole(match.groups()[-1]), b"", offset))
        if rows:
            return rows
    return []


# ---- clocks and scores ----------------------------------------------------------------------------------------------

# Each family says the same time in its own words; a log has one of them, or repeats it in two.
CALIBRATION = tuple(re.compile(pattern) for pattern in (
    rb"\bgptq: ?collected \d+ hessians\b.{0,30}? in " + NUMBER + rb"(s)\b",
    rb"\bhessians collected\b.{0,40}?(?:time|elapsed| in)[= ]" + NUMBER + rb"(s)\b",
    rb"\bgptq:(?:loop-aware )?calibrated \d+ layers in " + NUMBER + rb"(s)\b",
    rb"\bgptq:calibration done in " + NUMBER + rb"(ms)\b",
    rb"\bcollected hessians for \d+ layers (?:in |\()" + NUMBER + rb"(s)\b",
    rb"\bgptq:done layers=\d+ time=" + NUMBER + rb"(ms)\b",
    rb"^calibrate source:\S+ tokens:\d+ seconds:" + NUMBER + rb"()",
))
GENERATION = re.compile(rb"\b(?:gptq|trinity):generated \d+ seq(?:uence)?s in " + NUMBER + rb"(ms|s)\b")
ADAPTATION = re.compile(  # an evaluation's own times that no score carries
    rb"\b([a-z_]*(?:ttt|slot)[a-z_0-9]*): ?(?:(?:total_)?(?:done|elapsed|completed|time|total)\b)[^\n]{0,60}?"
    rb"(?:elapsed=|time[=:]|total_time[=:]| in |elapsed:)? ?" + NUMBER + rb"(ms|s)\b")
OUTSIDE = re.compile(rb"precompute\w*outside\w* elapsed=" + NUMBER + rb"(s)\b")
TOTAL_EVAL = re.compile(rb"\btotal_eval_(?:time|wallclock): ?" + NUMBER + rb"(s)\b")
SCORE = re.compile(rb"^(.{0,200}?)\b(?:val_loss|vl)[:=] ?(\d{1,9}\.\d{1,18})[ ,;|]{1,3}(?:val_)?bpb[:=] ?"
                   rb"(\d{1,9}\.\d{1,18})(.*)")
SCORE_TIME = re.compile(rb"\b(?:eval_time|eval|time|elapsed|t)[:=] ?" + NUMBER + rb"(ms|s)\b")
ONLY_BPB = re.compile(rb"\b(\w{0,40}?)bpb\w{0,20}(?: ?\([^)\n]{1,20}\))? ?[:=] {0,12}(\d{1,9}\.\d{1,18})")
LONGEST_LABEL = 200
# Of the weights before they were packed, of a part of the text, or of something that is not the submission.
NOT_FINAL = re.compile(rb"diag|pre.?quant|post.?(?:ema|swa|average)|pre.?ttt|raw|candidate|(?:swa|ema)[_ ](?:eval|bpb)|"
                       rb"^ema\b|weights|\bbest|baseline|post_train|sweep|search|ablation")
PROGRESS = re.compile(rb"epoch|chunk|batch|progress|running|rank:|\d/\d|%")  # a line while something is scored


def read_calibration(part):
    families = {}
    for word in (b"hessian", b"calibrat", b"gptq:done"):
        for offset, line in part.lines_with(word):
            for number, pattern in enumerate(CALIBRATION):
                match = pattern.search(line)
                if match:
                    families.setdefault(number, {})[offset] = seconds_of(match, 1)
    if families:
        longest = max(families.values(), key=lambda family: sum(family.values()))
        part.note("calibrate_seconds", sum(longest.values()), max(longest))
    generated = {}
    for offset, line in part.lines_with(b"generated"):
        match = GENERATION.search(line)
        if match:
            generated[offset] = seconds_of(match, 1)
    if generated:
        part.note("generate_seconds", sum(generated.values()), max(generated))


def read_scores(part):
    """[(Score, offset)] of every line with a score but those of steps and of progress."""
    scores = []
    for offset, line in part.lines_with(b"bpb"):
        if STEP.search(line) or PROGRESS.search(line[:LONGEST_LABEL].partition(b"bpb")[0]):
            continue
        match = SCORE.search(line)
        if match:
            loss = float(match.group(2))
            found = [(match.group(1), match.group(3))]
        else:
            loss = None
            found = [(first_word(line) + b" " + match.group(1), match.group(2)) for match in ONLY_BPB.finditer(line)]
        time = SCORE_TIME.search(line)
        seconds = seconds_of(time, 1) if time else None
        for label, bpb in found:
            digits = len(bpb.partition(b".")[2])
            label = name(label).removesuffix(" val_").strip(" :|[]_")
            scores.append((Score(label, loss, float(bpb), digits, seconds, part.text.number(offset)), offset))
    return scores


def first_word(line):
    return line.split(None, 1)[0][:LONGEST_LABEL]


def is_final(score):
    return not NOT_FINAL.search(score.name.encode())


def final_score(scores):
    """The last (Score, offset) of the submission; of lines that say the same, the one with the most digits."""
    finals = [(score, offset) for score, offset in scores if is_final(score)]
    with_loss = [(score, offset) for score, offset in finals if score.loss is not None]
    finals = with_loss or finals
    if not finals:
        return None
    last = finals[-1][0]
    same = [(score, offset) for score, offset in finals if says_the_same(score, last)]
    return max(same, key=lambda row: (row[0].digits, row[1]))


def says_the_same(score, other):
    digits = min(score.digits, other.digits)
    return abs(score.bpb - other.bpb) <= 0.6 * 10**-digits


def read_evaluation(part):
    """The final score, and the seconds of the evaluation: the log's own total, or the sum of its phases, of which some
    may be diagnostics that the score does not need.
    """
    scores = read_scores(part)
    part.note("scores", tuple(score for score, _ in scores), part.begin)
    final = final_score(scores)
    if final:
        score, offset = final
        part.note("val_bpb", score.bpb, offset)
        part.note("digits", score.digits, offset)
        if score.loss is not None:
            part.note("val_loss", score.loss, offset)
    timed = read_phases(part, scores)
    phases = distinct([timed[offset] for offset in sorted(timed)])
    part.note("phases", tuple(phases), part.begin)
    outside = sum(seconds for _, seconds in times(part, b"outside", OUTSIDE))
    totals = times(part, b"total_eval_", TOTAL_EVAL)
    if totals:
        offset, seconds = totals[-1]
        extra = f" and {outside:.1f} s before its timer" if outside else ""
        note_evaluation(part, seconds + outside, seconds + outside, f"total_eval_time{extra}", offset)
    elif phases:
        total = sum(phase.seconds for phase in phases)
        summands = " + ".join(f"{phase.name} {phase.seconds:.1f}" for phase in phases)
        note_evaluation(part, total + outside, needed(phases, final) + outside, summands, max(timed))


def note_evaluation(part, seconds, needed_seconds, summands, offset):
    part.note("eval_seconds", seconds, offset)
    part.note("needed_seconds", needed_seconds, offset)
    part.note("eval_note", summands, offset)


def times(part, word, pattern):
    """[(offset, seconds)] of the lines with a word that a pattern matches."""
    found = []
    for offset, line in part.lines_with(word):
        match = pattern.search(line)
        if match:
            found.append((offset, seconds_of(match, 1)))
    return found


def read_phases(part, scores):
    """{offset: Phase} of final scores with a time, and of adaptations."""
    timed = {}
    for score, offset in scores:
        if score.seconds is not None and is_final(score) and offset not in timed:
            timed[offset] = Phase(score.name, score.seconds, score.line, True)
    for word in (b"ttt", b"slot"):
        for offset, line in part.lines_with(word):
            match = ADAPTATION.search(line)
            if match and offset not in timed:
                timed[offset] = Phase(name(match.group(1)), seconds_of(match, 2), part.text.number(offset), False)
    return timed


def distinct(phases):
    """The phases without those that are said twice: `ttt:done elapsed=293.2s`, then `legal_ttt eval_time:293430ms`."""
    kept = []
    for phase in phases:
        if kept and abs(kept[-1].seconds - phase.seconds) <= 0.01 * phase.seconds + 1.0:
            kept[-1] = phase
        else:
            kept.append(phase)
    return kept


def needed(phases, final):
    """Seconds of the phases that end in the final score: its own, and adaptations that have no score themselves."""
    if final is None:
        return 0.0
    score = final[0]
    own = [phase for phase in phases if phase.scored and abs(phase.line - score.line) <= 3]
    adapted = [phase.seconds for phase in phases if not phase.scored and phase.line < score.line]
    return max((phase.seconds for phase in own), default=0.0) + sum(adapted)


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
    """Settings as late scripts list them, else as the baseline says them in a few lines."""
    settings = {}
    place = part.begin
    for offset, _ in part.lines_with(b"hyperparameters:"):
        settings = listed_settings(part, offset)
        place = offset
        break
    if len(settings) < 5:
        settings = {}
        for word in BASELINE_WORDS:
            for offset, line in part.lines_with(word):
                settings.update((name(key), name(value)) for key, value in WORDS.findall(line))
                place = offset
                break
    if settings:
        part.note("settings", settings, place)
        part.note("settings_hash", settings_hash(settings), place)


def listed_settings(part, offset):
    """The `  key: value` lines below the line at this offset."""
    settings = {}
    at = offset + len(part.text.line_from(offset)) + 1
    while at < part.end:
        line = part.text.line_from(at)
        match = PAIR.match(line[:LONGEST_LINE].lower())
        if not match:
            break
        settings[name(match.group(1))] = name(match.group(2))
        at += len(line) + 1
    return settings


SUMMARY_FIELDS = ("seed", "world_size", "val_tokens", "val_bytes", "steps", "train_seconds", "calibrate_seconds",
                  "eval_seconds", "code_bytes", "model_bytes", "total_bytes", "val_loss", "val_bpb")
SUMMARY_TEXTS = ("code_sha256", "artifact_sha256", "settings_hash", "valid", "eligible", "tested")


def read_summary(part):
    """Our last line, which is exact; it stands above what was read from the lines before."""
    summaries = []
    for offset, line in part.lines_with(b"summary {"):
        value = parse_summary(part.text.line_from(offset)) if line.startswith(b"summary {") else None
        if value is not None:
            summaries.append((offset, value))
    if not summaries:
        return
    place, summary = summaries[-1]
    part.note("summaries", len(summaries), place)
    if "seed" in part.found:
        part.found["stated_seed"] = part.found["seed"]
    for key in SUMMARY_FIELDS:
        value = finite(summary, key)
        if value is not None:
            part.note(key, value, place)
    for key in SUMMARY_TEXTS:
        if isinstance(summary.get(key), str):
            part.note(key, summary[key], place)
    for key in ("reasons", "eligible_reasons"):
        value = summary.get(key)
        if isinstance(value, list):
            part.note(key, tuple(" ".join(str(item).split()) for item in value), place)
    for field, key in (("gpus", "world_size"), ("needed_seconds", "eval_seconds"),
                       ("documents_in_training", "val_documents_in_training")):
        value = finite(summary, key)
        if value is not None:
            part.note(field, value, place)
    if finite(summary, "eval_seconds") is not None:
        part.note("eval_note", "eval_seconds of the summary", place)
    if finite(summary, "val_bpb") is not None:
        part.note("digits", 8, place)
    if isinstance(summary.get("device"), str):
        part.note("gpu", summary["device"], place)
    if isinstance(summary.get("settings"), str):
        part.note("settings", split_settings(summary["settings"]), place)


def parse_summary(line):
    """The JSON object behind the word `summary`, or None."""
    try:
        value = json.loads(line.removeprefix(b"summary "))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def split_settings(text):
    """{NAME: value} of a line NAME=value NAME=value."""
    try:
        pairs = shlex.split(text)
    except ValueError:
        pairs = text.split()
    return dict(pair.partition("=")[::2] for pair in pairs)


def finite(mapping, key):
    """The number under this key if it is of a size that such a number can have, or None."""
    value = mapping.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e18 else None
