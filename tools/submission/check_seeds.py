"""CK-SEEDS, CK-HASH, CK-STAT, and CK-FOLDER where submission.json meets the logs: does each number come from a run, of
one script and one configuration?
"""

import itertools
import math
import re
import statistics
from collections import Counter

from common import sha256
from submission import rules
from submission.entry import decimals, number_of, numbers_in_name, seed_in_name, seed_of, states
from submission.findings import Finding, OfLog, error, note, refused, unknown, warning
from submission.logs import configuration, is_final, says_the_same, source_hash

# ---- submission.json against the logs -------------------------------------------------------------------------------


def claimed_score(entry, run, log):
    """Is the score that submission.json has of a seed one that its log has?"""
    score = run.score
    stated = run.claim.val_bpb
    text = f"seed {run.seed} has val_bpb {stated}"
    if stated is None:
        return
    if score is None:
        yield OfLog("unknown", "CK-FOLDER", f"{text}, and its log has no final score")
    elif not states(score, stated):
        off = abs(score.bpb - float(stated))
        text += f" in {entry.record_file}, its log {score.bpb:.8f} ({off:.2g} off)"
        yield OfLog(by_distance(off, [run]), "CK-FOLDER", text, score.line)
    elif not is_final(score):
        text += f", the log's {score.name!r}, which is not of the packed model"
        yield OfLog("warning", "CK-FOLDER", text, score.line)
    elif log.val_bpb is not None and abs(score.bpb - log.val_bpb) > 1e-4:
        text += f", the log's {score.name!r}; its last score is {log.val_bpb:.8f}"
        yield OfLog("note", "CK-FOLDER", text, score.line)


SMALL = 1e-4  # bits per byte: #1945 was accepted with a mean that was 3.3e-6 off


def by_distance(off, runs):
    """A score that is a little off is a question, in our own logs an error."""
    ours = any(run.log and run.log.form == "ours" for run in runs)
    return "error" if ours or off > SMALL else "warning"


def check_scores(entry):
    """The headline is the mean over the seeds, as far as it has digits; of the logs, or of rounded claims."""
    stated = number_of(entry.record or {}, "val_bpb")
    if stated is None or not entry.runs:
        return
    claims = [float(run.claim.val_bpb) for run in entry.runs if run.claim.val_bpb is not None]
    values = [run.bpb for run in entry.runs]
    if None not in values:
        yield from check_loss(entry)
    elif claims:
        values = claims
    else:
        yield unknown("CK-FOLDER", f"val_bpb is {stated}, and not every seed has a log with a score", entry.record_file)
        return
    tolerance = max(0.51 * 10 ** -decimals(stated), 1e-6)
    mean = statistics.fmean(values)
    off = abs(float(stated) - mean)
    same = [value for value in values if abs(float(stated) - value) <= tolerance]
    if off <= tolerance or claims and abs(float(stated) - statistics.fmean(claims)) <= tolerance:
        return
    if same:
        which = "the best" if same[0] == min(values) else "one"
        yield warning("CK-FOLDER", f"val_bpb is {stated}, {which} of {len(values)} seeds; their mean is {mean:.8f}",
                      entry.record_file)
    elif is_mean_of_others(entry, float(stated), tolerance):
        yield note("CK-FOLDER", f"val_bpb is {stated}, the mean of other lines of the logs than the last; that is "
                   f"{mean:.8f}", entry.record_file)
    else:
        logged = f"the mean of {len(values)} seeds is {mean:.8f}" if len(values) > 1 else f"the log has {mean:.8f}"
        text = f"val_bpb is {stated}, and {logged} ({off:.2g} off)"
        yield Finding(by_distance(off, entry.runs), "CK-FOLDER", text, entry.record_file)


def is_finer(other, score):
    return other.digits > score.digits and says_the_same(other, score)


MOST_COMBINATIONS = 20_000


def is_mean_of_others(entry, stated, tolerance):
    """Is this the mean of one score of each seed, of whichever of its logs and lines?"""
    choices = []
    for run in entry.runs:
        lines = [score for log in entry.logs if seed_of(log) == run.seed for score in log.scores if is_final(score)]
        exact = [score for score in lines if not any(is_finer(other, score) for other in lines)]
        choices.append(sorted({score.bpb for score in exact}))
    if not all(choices) or math.prod(map(len, choices)) > MOST_COMBINATIONS:
        return False
    return any(abs(statistics.fmean(scores) - stated) <= tolerance for scores in itertools.product(*choices))


def check_loss(entry):
    stated = number_of(entry.record, "val_loss")
    losses = [run.loss for run in entry.runs]
    if stated is None or None in losses:
        return
    mean = statistics.fmean(losses)
    tolerance = max(0.51 * 10 ** -decimals(stated), 2e-6)
    if min(abs(float(stated) - value) for value in (*losses, mean)) > tolerance:
        yield warning("CK-FOLDER", f"val_loss is {stated}, and the mean of the logs {mean:.8f}", entry.record_file)


FIELDS_OF_LOGS = {"val_tokens": "val_tokens", "val_bytes": "val_bytes", "code_sha256": "code_sha256",
                  "config_sha256": "settings_hash", "world_size": "world_size"}


def check_fields(entry):
    """Further fields of submission.json that a log states."""
    for field, fact in FIELDS_OF_LOGS.items():
        stated = (entry.record or {}).get(field)
        for run in entry.runs:
            logged = getattr(run.log, fact, None)
            if None not in (stated, logged) and stated != logged:
                yield error("CK-FOLDER", f"{field} is {stated}, and the log of seed {run.seed} has {logged}",
                            entry.record_file)
                break


def claimed_size(entry, run, log):
    """The size that submission.json has of a seed."""
    stated = run.claim.bytes
    if stated and log.total_bytes and stated != log.total_bytes:
        text = f"seed {run.seed} has {stated:,} bytes in {entry.record_file}, its log {log.total_bytes:,}"
        yield OfLog("warning", "CK-SIZE", text, "total_bytes", "size", abs(stated - log.total_bytes))


# ---- CK-SEEDS -------------------------------------------------------------------------------------------------------


def check_seeds(entry):
    """Three different seeds, each with its log (R13; #2124, #2139)."""
    for seed, count in Counter(run.seed for run in entry.runs).items():
        if count > 1 and seed is not None:
            yield error("CK-SEEDS", f"seed {seed} is named {count} times", entry.record_file or "")
    for run in entry.runs:
        if run.log is None:
            yield Finding(refused(entry, "warning"), "CK-SEEDS", f"seed {run.seed} of {entry.record_file} has no log")
    distinct = {run.seed if run.log.seed is None else run.log.seed for run in entry.runs if run.log}
    if entry.track == "record" and entry.logs and len(distinct) < rules.LEAST_SEEDS:
        which = ", ".join(sorted("unknown" if seed is None else str(seed) for seed in distinct)) or "none"
        yield error("CK-SEEDS", f"{len(distinct)} seed(s) with a log ({which}); a record needs {rules.LEAST_SEEDS}")
    used = [id(log) for run in entry.runs for log in (run.log, run.training) if log]
    again = Counter(log.seed for log in entry.logs if id(log) not in used and log.seed in distinct)
    if again:
        which = ", ".join(f"{seed} in {count} more" for seed, count in again.items())
        yield note("CK-SEEDS", f"further logs of seeds that count: {which}; say in the README what they are")


def is_misnamed(log):
    named = seed_in_name(log.path)
    return None not in (named, log.seed) and log.seed not in numbers_in_name(log.path)


def log_of_seed(entry, run, log):
    """Does the log of a seed say that seed, and a score?"""
    if None not in (run.seed, log.seed) and run.seed != log.seed and not is_misnamed(log):
        text = f"the score of seed {run.seed} of {entry.record_file} is in a log of seed {log.seed}"
        yield OfLog("error", "CK-SEEDS", text, "seed")
    if log.val_bpb is None and log.tracebacks:
        text = f"the log of seed {run.seed} ends in an error and has no final score"
        yield OfLog("error", "CK-SEEDS", text, "tracebacks")
    elif log.val_bpb is None:
        yield OfLog("warning", "CK-SEEDS", f"the log of seed {run.seed} has no final score")


def one_run(entry, run, log):
    """A log is of one run, from its first step to its score, and of the seed that its name says."""
    if is_misnamed(log):
        named = seed_in_name(log.path)
        severity = "error" if named in {run.seed for run in entry.runs} else "warning"  # it may be the number of a run
        yield OfLog(severity, "CK-SEEDS", f"is a run of seed {log.seed}, and its name says {named}", "seed")
    if log.mixed_line:
        severity = "error" if log.form == "ours" else "warning"
        text = "steps or clock go back here, and no run begins: lines of two runs"
        yield OfLog(severity, "CK-SEEDS", text, log.mixed_line)
    if log.summaries > 1:
        yield OfLog("error", "CK-SEEDS", f"has {log.summaries} summaries: lines of two runs", "summaries")
    if log.stated_seed is not None and log.seed != log.stated_seed:
        text = f"its header says seed {log.stated_seed}, its summary {log.seed}: lines of two runs"
        yield OfLog("error", "CK-SEEDS", text, "seed")
    if log.summaries and None not in (log.logged_steps, log.steps) and log.logged_steps > log.steps:
        text = f"has step {log.logged_steps}, and its summary ends at step {log.steps}: lines of two runs"
        yield OfLog("error", "CK-SEEDS", text, "steps")


def odd_ones_out(entry, field):
    """(the common value, [(value, run)] of the runs whose log states another one)."""
    stated = [(getattr(run.training, field, None), run) for run in entry.runs]
    stated = [(value, run) for value, run in stated if value is not None]
    commonest = Counter(value for value, _ in stated).most_common(1)
    common = commonest[0][0] if commonest else None
    return common, [(value, run) for value, run in stated if value != common]


def check_same_code(entry):
    """One script for all seeds. Texts of foreign logs may differ in what changes nothing, so that a reviewer asks."""
    for field, what, say in (("code_sha256", "hash", error), ("source_sha256", "source", warning),
                             ("code_bytes", "bytes", warning)):
        common, odd = odd_ones_out(entry, field)
        for value, run in odd:
            place = entry.relative(run.training.path)
            yield say("CK-SEEDS", f"seed {run.seed} ran another script than the others: {what} {short(value)}, theirs "
                      f"{short(common)}", place, run.training.lines.get(field))
        if odd:
            return


def short(value):
    return f"{value:,}" if isinstance(value, int) else str(value)[:12]


def check_same_settings(entry):
    """One configuration for all seeds (#2124)."""
    common, odd = odd_ones_out(entry, "settings_hash")
    usual = next((run.training.settings for run in entry.runs
                  if run.training and run.training.settings_hash == common), None)
    for _, run in odd:
        log = run.training
        changes = differences(usual or {}, log.settings or {})
        shown = ", ".join(changes[:4]) + (f" and {len(changes) - 4} more" if len(changes) > 4 else "")
        only_names = all("absent" in change for change in changes)
        say = warning if only_names and log.form != "ours" else error
        yield say("CK-SEEDS", f"seed {run.seed} has other settings than the others: {shown or 'their hashes differ'}",
                  entry.relative(log.path), log.lines.get("settings"))


def differences(usual, other):
    """Texts such as `matrix_lr 0.02 -> 0.03`."""
    usual = configuration(usual)
    other = configuration(other)
    changed = [key for key in sorted({*usual, *other}) if usual.get(key) != other.get(key)]
    return [f"{key} {usual.get(key, 'absent')} -> {other.get(key, 'absent')}" for key in changed]


# ---- CK-HASH --------------------------------------------------------------------------------------------------------


def check_models(entry):
    """The model that was scored is that of the folder."""
    artifacts = {run.training.artifact_sha256 for run in entry.runs if run.training} - {None}
    for file in entry.files:
        if artifacts and file.name.endswith(".pg") and not file.is_link and sha256(file.path) not in artifacts:
            yield error("CK-HASH", "is the model of none of the runs", file.name)


def script_of_seed(entry, run, log):
    """Did a run use the script of the folder?"""
    if not entry.script:
        return
    name = entry.script.name
    counted = log.raw_code_bytes or log.code_bytes
    if log.code_sha256:
        digest = sha256(entry.script.path)
        if not digest.startswith(log.code_sha256):
            text = f"seed {run.seed} ran code {log.code_sha256[:12]}, and {name} is {digest[:12]}"
            yield OfLog("error", "CK-HASH", text, "code_sha256", "hash")
    elif log.source_sha256:
        if log.source_sha256 not in source_hashes(entry):
            text = f"the source at the top of the log of seed {run.seed} is not that of {name}"
            yield OfLog("warning", "CK-HASH", text, kind="source")
    elif log.code_bytes and entry.script.size not in (log.code_bytes, log.raw_code_bytes):
        text = f"seed {run.seed} counted a script of {counted:,} bytes, and {name} has {entry.script.size:,}"
        yield OfLog("warning", "CK-HASH", text, "code_bytes", "bytes", abs(counted - entry.script.size))
    else:
        severity = "note" if log.code_bytes else "unknown"
        text = f"the log of seed {run.seed} has neither source nor hash of its script"
        yield OfLog(severity, "CK-HASH", text, kind="none")


def source_hashes(entry):
    """Hashes of the scripts at the top of the folder, also unpacked: a readable twin may be what ran."""
    scripts = [file for file in entry.files if re.fullmatch(r"[^/]+\.py", file.name) and not file.is_link]
    digests = {source_hash(file.path.read_bytes()) for file in scripts}
    if entry.source:
        digests.add(source_hash(entry.source.text.encode("utf-8", "replace")))
    return digests


# ---- CK-STAT --------------------------------------------------------------------------------------------------------


def check_statistics(entry):
    scores = [run.bpb for run in entry.runs if run.bpb is not None]
    if len(scores) >= 2:
        spread = statistics.stdev(scores)
        if spread > rules.SUSPECT_STD:
            yield warning("CK-STAT", f"the scores of {len(scores)} seeds have a standard deviation of {spread:.4f}, "
                          f"those of honest runs 0.0002 to {rules.USUAL_STD:.4f}")
        stated = number_of(entry.record or {}, "val_bpb_std")
        if stated is not None and len(scores) == len(entry.runs):
            # Over n - 1 or n, from scores that may have been rounded.
            tolerance = max(0.6 * 10 ** -decimals(stated), 0.1 * spread) + 1e-6
            if min(abs(float(stated) - value) for value in (spread, statistics.pstdev(scores))) > tolerance:
                yield warning("CK-STAT", f"val_bpb_std is {stated}, and that of the logs {spread:.8f}",
                              entry.record_file)
    if entry.track != "record":
        return
    p_value = number_of(entry.record or {}, "p_value")
    if p_value is None:
        yield unknown("CK-STAT", "no p_value: which record it beats, and how surely, the files do not say; see "
                      "submit.py stats", entry.record_file or "")
    elif p_value > rules.P_VALUE:
        yield warning("CK-STAT", f"p_value is {float(p_value):.3g}; the README asks for {rules.P_VALUE}, and late rows "
                      f"had up to {rules.P_VALUE_LATE}", entry.record_file)
