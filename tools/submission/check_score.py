"""CK-BYTES, CK-COVER, CK-OVERLAP and the four conditions of #1017 (CK-ORDER, CK-FLIP, CK-SUM, CK-VALOPEN): is the score
that of the validation text, and was that text unseen?
"""

import math
from typing import NamedTuple

from submission import rules, script
from submission.entry import decimals, number_of
from submission.findings import OfLog, error, refused, unknown, warning

# ---- CK-BYTES -------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Bytes per token, as a loss in nats per token and a score in bits per byte give it."""

    value: float
    tolerance: float  # relative, by the digits of the two


def ratio_of(loss, bpb, digits):
    rounding = 0.5 * 10**-digits * (1 / loss + 1 / bpb)
    return Ratio(loss / (math.log(2) * bpb), rounding + rules.BYTES_TOLERANCE)


def ratio_of_run(run):
    """The Ratio of a run, from its log or what submission.json says of it; None if neither has a loss."""
    if run.log and run.loss and run.bpb:
        return ratio_of(run.loss, run.bpb, run.score.digits if run.score else 8)
    claim = run.claim
    if claim.val_bpb and claim.val_loss:
        digits = min(decimals(claim.val_bpb), decimals(claim.val_loss))
        return ratio_of(float(claim.val_loss), float(claim.val_bpb), digits)
    return None


def is_known(ratio):
    return ratio is not None and 0 < ratio.value < 1e6


def check_bytes(entry):
    """What the means divide by, where no seed says it."""
    if any(is_known(ratio_of_run(run)) for run in entry.runs):
        return
    loss = number_of(entry.record or {}, "val_loss")
    bpb = number_of(entry.record or {}, "val_bpb")
    if not loss or not bpb or loss < 0 or bpb < 0:
        yield unknown("CK-BYTES", "nothing gives a loss beside the score, so that the bytes are not known")
        return
    ratio = ratio_of(float(loss), float(bpb), min(decimals(loss), decimals(bpb)))
    if not looks_published(ratio):
        yield warning("CK-BYTES", f"val_loss and val_bpb give {ratio.value:.4f} bytes per token, which no published "
                      "tokenizer has", entry.record_file)


def looks_published(ratio):
    """Has a published tokenizer about these bytes per token? Known errors are of 4 % and more."""
    return any(abs(ratio.value / text.bytes_per_token - 1) <= max(ratio.tolerance, 1e-3) for text in rules.TEXTS)


HARMLESS_GAIN = 1e-3  # relative: where fewer bytes are counted the score only suffers


def is_per_byte(ratio):
    """Do loss and score say the same, in nats and in bits?"""
    return abs(ratio.value - 1) < 1e-3


def bytes_of_seed(entry, run, log):
    """What the score divides by. That does not depend on the model, so that a wrong count shows (section 5.4 of
    the fingerprints in rules.TEXTS).
    """
    ratio = ratio_of_run(run)
    if not is_known(ratio):
        return
    if log and log.form == "ours" and log.val_bytes and log.val_tokens:
        yield from our_bytes(entry, log, ratio)
        return
    line = run.score.line if log and run.loss and run.bpb and run.score else None
    tokens = log.val_tokens if log else None
    text = rules.text_of(tokens) if tokens else None
    if text:
        off = ratio.value / text.bytes_per_token - 1
        if is_per_byte(ratio) and text.tokenizer != "byte260":
            what = f"the loss of seed {run.seed} is in nats per byte, so that the bytes per token are not known"
            yield OfLog("unknown", "CK-BYTES", what, line, "per byte")
        elif abs(off) > ratio.tolerance:
            right = f", and is {run.bpb * (1 + off):.4f} with the right ones" if run.bpb else ""
            what = (f"loss and score give {ratio.value:.4f} bytes per token, where {text.tokenizer} has "
                    f"{text.bytes_per_token:.4f}: the score divides by {off:+.2%} bytes{right}, unless the two are of "
                    "different predictions")
            severity = "error" if off > HARMLESS_GAIN else "warning"
            yield OfLog(severity, "CK-BYTES", what, line, "ratio", abs(off))
    elif tokens:
        total = tokens * ratio.value
        off = total / rules.VAL_BYTES - 1
        if off > max(ratio.tolerance, 3 * rules.BYTES_TOLERANCE):
            what = (f"{tokens:,} tokens of {ratio.value:.4f} bytes are {total:,.0f} bytes, and the validation text has "
                    f"{rules.VAL_BYTES:,} ({off:+.2%}): too many are counted, or it is another text")
            yield OfLog(refused(entry, "warning"), "CK-BYTES", what, line, "total", abs(off))
    elif not looks_published(ratio):
        what = (f"{ratio.value:.4f} bytes per token, which no published tokenizer has, and the log does not say how "
                "many tokens there are")
        yield OfLog("warning", "CK-BYTES", what, line, "unknown ratio")


def our_bytes(entry, log, ratio):
    """Our logs state the bytes: they have to give the score, and for a record they are FineWeb's."""
    stated = log.val_bytes / log.val_tokens
    if abs(ratio.value / stated - 1) > ratio.tolerance:
        what = (f"loss and score give {ratio.value:.6f} bytes per token, and the log counts {log.val_bytes:,} bytes of "
                f"{log.val_tokens:,} tokens, {stated:.6f}")
        yield OfLog("error", "CK-BYTES", what, "val_bytes", "ratio")
    if abs(log.val_bytes / rules.VAL_BYTES - 1) > rules.BYTES_TOLERANCE:
        what = (f"the score is of {log.val_bytes:,} bytes, and the contest's validation text has "
                f"{rules.VAL_BYTES:,}: it does not compare with others")
        yield OfLog(refused(entry), "CK-BYTES", what, "val_bytes", "text")


# ---- CK-COVER -------------------------------------------------------------------------------------------------------


LARGEST_TOKENS = min(text.targets for text in rules.TEXTS)  # of the published tokenizer with the largest ones


def coverage(entry, run, log):
    """Is all of the validation text scored (R7, #50)?"""
    tokens = log.val_tokens
    if tokens is None:
        text = f"the log of seed {run.seed} does not say how many tokens it validates on"
        yield OfLog("unknown", "CK-COVER", text, kind="none")
        return
    if log.form != "ours" and rules.text_of(tokens) is None:
        ratio = ratio_of_run(run)
        share = tokens / (0.6 * LARGEST_TOKENS)  # larger vocabularies have fewer tokens
        if ratio and not is_per_byte(ratio):
            share = tokens * ratio.value / rules.VAL_BYTES
        if share < 0.99:
            text = f"{tokens:,} tokens are validated on, about {share:.1%} of the text"
            yield OfLog(refused(entry), "CK-COVER", text, "val_tokens", "part", 1 - share)
    if log.val_share is not None and log.val_share < 1:
        text = f"val_doc_fraction is {log.val_share:g}: not all validation documents are scored"
        yield OfLog(refused(entry), "CK-COVER", text, "val_share", "share", 1 - log.val_share)
    if log.scored_tokens and log.scored_tokens < 0.99 * tokens:
        text = f"{log.scored_tokens:,} tokens are scored of {tokens:,}"
        yield OfLog("warning", "CK-COVER", text, "scored_tokens", "scored")


# ---- CK-OVERLAP -----------------------------------------------------------------------------------------------------


def overlap(entry, run, log):
    """Signs that validation documents were trained on (#2127)."""
    if log.train_shards in rules.OVERLAP_SHARDS:
        text = (f"train_shards: {log.train_shards}, as the data of #2127, which trains on 40,000 of the 50,000 "
                "validation documents")
        yield OfLog("error", "CK-OVERLAP", text, "train_shards", "shards")
    if log.doubled_path:
        path = log.doubled_path if len(log.doubled_path) < 60 else f"...{log.doubled_path[-57:]}"
        text = f"{path} has the doubled path of the data in #2127; say with which --val-docs it was made"
        yield OfLog("warning", "CK-OVERLAP", text, "doubled_path", "path")
    copies = log.documents_in_training
    if copies:
        text = f"{copies:,.0f} validation documents begin as documents that were trained on"
        severity = "note" if log.valid == "yes" else "error"
        yield OfLog(severity, "CK-OVERLAP", text, "documents_in_training", "copies", copies)
    elif log.form == "ours" and copies is None and log.val_bpb is not None:
        text = f"the log of seed {run.seed} does not say whether validation text was trained on"
        yield OfLog("unknown", "CK-OVERLAP", text, kind="none")


# ---- the verdict of our own logs ------------------------------------------------------------------------------------

REASONS = (  # how our reasons begin
    ("C1", "CK-FLIP"), ("C2", "CK-SUM"), ("C4", "CK-COVER"), ("C3: validation shards", "CK-VALOPEN"),
    ("C3", "CK-ORDER"), ("training shards", "CK-TRAINOPEN"), ("the evaluation opened", "CK-NET"))
OBSTACLES = (("not trained", "CK-TRAINTIME"), ("not scored", "CK-COVER"))  # how those of a record do
CHECKED = ("the score is not valid", "training took", "evaluation took", "hardware")  # by checks of their own


def rule_of(text, table):
    """The rule that a reason or obstacle of our log is about."""
    if "validation documents begin" in text:
        return "CK-OVERLAP"
    return next((rule for start, rule in table if text.startswith(start)), "CK-ORDER")


def verdict(entry, run, log):
    """The four conditions, which our own runs test while they score."""
    if log.form != "ours":
        return
    if log.valid is None:
        text = f"the log of seed {run.seed} has no verdict: its run did not come to its end"
        yield OfLog("error", "CK-ORDER", text, kind="none")
    elif log.valid != "yes":
        for reason in log.reasons or ("no reason is given",):
            yield OfLog("error", rule_of(reason, REASONS), f"valid:{log.valid}, {reason}", "valid", reason)
    if log.valid and log.tested != "yes":
        text = f"the self-tests of seed {run.seed} did not all run and pass (SELFTEST=0?)"
        yield OfLog("unknown", "CK-FLIP", text, "valid", "untested")
    for obstacle in log.eligible_reasons if log.eligible == "no" else ():
        if not obstacle.startswith(CHECKED) and "validation bytes" not in obstacle:
            yield OfLog(refused(entry), rule_of(obstacle, OBSTACLES), f"eligible:no, {obstacle}", "valid", obstacle)


def check_foreign(entry):
    if any(run.log is None or run.log.form != "ours" for run in entry.runs):
        yield unknown("CK-FLIP", "CK-ORDER, CK-FLIP, CK-SUM, CK-PREFIX, CK-VALOPEN, CK-TRAINOPEN and CK-NET take the "
                      "run itself: files do not prove them for a foreign script")


# ---- breaches that show ---------------------------------------------------------------------------------------------

HONEST_LEVEL = 1.0  # bits per byte: no audited score is below 1.0565 (#2135)
SUSPECTS = (  # (in the name of the line with the score, rule, why it is one)
    ("slot", "CK-ORDER", "SLOT fits to the tokens that it scores (#1240)"),
    ("ppm", "CK-SUM", "a mixture with byte-level PPM is no distribution over tokens (#2083)"),
    ("ngram", "CK-SUM", "hashed n-gram mixtures were closed as no distribution over tokens (#779)"),
    ("hedge", "CK-SUM", "experts that give all tokens one number make no distribution (#745)"))


SIGNS = (  # (field of Log, severity, rule, what is wrong where it has a value)
    ("prequant_line", "error", "CK-VALOPEN",
     "trains on validation text before the model is packed and scored (#677, #1972)"),
    ("passes", "error", "CK-COVER", "scores the text in two passes (#846)"),
    ("selected_line", "warning", "CK-VALOPEN", "weights are chosen by their score on validation text (#1311, #2098)"))


def breaches(entry, run, log):
    """What logs show of breaches that the organisers have ruled on, where it is certain."""
    for field, severity, rule, text in SIGNS:
        if getattr(log, field) is not None:
            yield OfLog(severity, rule, text, field, field)
    if log.temperature not in (None, 1.0):
        text = f"temperature {log.temperature:g}: it must not have been chosen on validation text (#991)"
        yield OfLog("warning", "CK-VALOPEN", text, "temperature", "temperature")
    gates = {name: count for name, count in (log.gates or {}).items() if count}
    if gates:
        counts = ", ".join(f"{name}={count:,}" for name, count in gates.items())
        text = f"n-gram gates that look at the target were open: {counts} (#1420, #2018)"
        yield OfLog("error", "CK-FLIP", text, "gates", "gates", sum(gates.values()))
    if run.score and log is run.log:
        yield from breaches_of_score(run.score, log)


def breaches_of_score(score, log):
    """What the line with the score says of how it was made."""
    label = score.name.lower()
    for word, rule, why in SUSPECTS:
        if word in label:
            yield OfLog("warning", rule, f"the score is of {score.name!r}: {why}", score.line, word)
    long = [phase for phase in log.phases if phase.seconds > 5]
    scored = [phase for phase in long if phase.scored and abs(phase.line - score.line) <= 3]
    adapted = [phase for phase in long if not phase.scored and phase.line < score.line]
    is_adaptive = any(word in label for word in ("ttt", "lora", "slot", "adapt", "legal"))
    if adapted and scored and not is_adaptive and max(phase.line for phase in scored) > adapted[-1].line:
        seconds = sum(phase.seconds for phase in adapted)
        text = f"adapts to validation text for {seconds:,.0f} s and scores it afterwards, in {scored[-1].name} (#518)"
        yield OfLog("error", "CK-ORDER", text, adapted[0].line, "adapted")


def check_script(entry):
    """What the script shows of them."""
    if entry.source is None:
        return
    scores = [run.bpb for run in entry.runs if run.bpb]
    is_low = bool(scores) and min(scores) < HONEST_LEVEL
    for line in sorted(script.target_in_table_index(entry.source))[:1]:
        say = error if is_low else warning
        where = f", and the score is {min(scores):.4f}" if is_low else "; say whether that is on"
        yield say("CK-SUM", "hashes the target into the index of a table where it scores, which makes no distribution "
                  f"over tokens (#779){where}", entry.script.name, line)
    for line in sorted(script.lower_of_two_losses(entry.source))[:1]:
        yield error("CK-SUM", "takes the lower of two losses of a token, which makes no distribution (#659)",
                    entry.script.name, line)
