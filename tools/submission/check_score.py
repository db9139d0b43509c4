"""CK-BYTES, CK-COVER, CK-OVERLAP and the four conditions of #1017 (CK-ORDER, CK-FLIP, CK-SUM, CK-VALOPEN): is the score
that of the validation text, and was that text unseen?
"""

import math
from typing import NamedTuple

from submission import rules, script
from submission.entry import decimals, number_of
from submission.findings import OfSeed, error, note, placed, unknown, warning, worst

# ---- CK-BYTES -------------------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Bytes per token, as a loss in nats per token and a score in bits per byte give it."""

    value: float
    tolerance: float  # relative, by the digits of the two

    def is_of(self, text):
        return abs(self.value / text.bytes_per_token - 1) <= self.tolerance


def ratio_of(loss, bpb, digits):
    rounding = 0.5 * 10**-digits * (1 / loss + 1 / bpb)
    return Ratio(loss / (math.log(2) * bpb), rounding + rules.BYTES_TOLERANCE)


def ratio_of_run(run):
    """(Ratio, line) of a run, from its log or what submission.json says of it; (None, None) if neither has a loss."""
    if run.log and run.loss and run.bpb:
        return ratio_of(run.loss, run.bpb, run.score.digits if run.score else 8), run.score and run.score.line
    claim = run.claim
    if claim and claim.val_bpb and claim.val_loss:
        digits = min(decimals(claim.val_bpb), decimals(claim.val_loss))
        return ratio_of(float(claim.val_loss), float(claim.val_bpb), digits), None
    return None, None


def ratio_of_record(entry):
    loss = number_of(entry.record or {}, "val_loss")
    bpb = number_of(entry.record or {}, "val_bpb")
    if not loss or not bpb or loss < 0 or bpb < 0:
        return None
    return ratio_of(float(loss), float(bpb), min(decimals(loss), decimals(bpb)))


def check_bytes(entry):
    """What the score divides by. That does not depend on the model, so that a wrong count shows (section 5.4 of
    the fingerprints in rules.TEXTS).
    """
    rows = []
    known = 0
    for run in entry.runs:
        ratio, line = ratio_of_run(run)
        if ratio is None or not 0 < ratio.value < 1e6:
            continue
        known += 1
        log = run.log
        place = entry.relative(log.path) if log else entry.record_file
        if log and log.form == "ours" and log.val_bytes and log.val_tokens:
            found = our_bytes(entry, run, ratio, place)
        else:
            found = foreign_bytes(entry, run, ratio, place, line)
        rows += found
    yield from worst(rows)
    if known:
        return
    ratio = ratio_of_record(entry)
    if ratio is None:
        yield unknown("CK-BYTES", "nothing gives a loss beside the score, so that the bytes are not known")
    elif not looks_published(ratio):
        yield warning("CK-BYTES", f"val_loss and val_bpb give {ratio.value:.4f} bytes per token, which no published "
                      "tokenizer has", entry.record_file)


def looks_published(ratio):
    """Has a published tokenizer about these bytes per token? Known errors are of 4 % and more."""
    return any(abs(ratio.value / text.bytes_per_token - 1) <= max(ratio.tolerance, 1e-3) for text in rules.TEXTS)


HARMLESS_GAIN = 1e-3  # relative: where fewer bytes are counted the score only suffers


def is_per_byte(ratio):
    """Do loss and score say the same, in nats and in bits?"""
    return abs(ratio.value - 1) < 1e-3


def foreign_bytes(entry, run, ratio, place, line):
    tokens = run.log.val_tokens if run.log else None
    text = rules.text_of(tokens) if tokens else None
    if text:
        off = ratio.value / text.bytes_per_token - 1
        if is_per_byte(ratio) and text.tokenizer != "byte260":
            what = f"the loss of seed {run.seed} is in nats per byte, so that the bytes per token are not known"
            yield OfSeed("per byte", run.seed, 0, unknown("CK-BYTES", what, place, line))
        elif not ratio.is_of(text):
            right = f", and is {run.bpb * (1 + off):.4f} with the right ones" if run.bpb else ""
            what = (f"loss and score give {ratio.value:.4f} bytes per token, where {text.tokenizer} has "
                    f"{text.bytes_per_token:.4f}: the score divides by {off:+.2%} bytes{right}, unless the two are of "
                    "different predictions")
            say = error if off > HARMLESS_GAIN else warning
            yield OfSeed("ratio", run.seed, abs(off), say("CK-BYTES", what, place, line))
    elif tokens:
        total = tokens * ratio.value
        off = total / rules.VAL_BYTES - 1
        if off > max(ratio.tolerance, 3 * rules.BYTES_TOLERANCE):
            say = error if entry.track == "record" else warning
            what = (f"{tokens:,} tokens of {ratio.value:.4f} bytes are {total:,.0f} bytes, and the validation text has "
                    f"{rules.VAL_BYTES:,} ({off:+.2%}): too many are counted, or it is another text")
            yield OfSeed("total", run.seed, abs(off), say("CK-BYTES", what, place, line))
    elif not looks_published(ratio):
        what = (f"{ratio.value:.4f} bytes per token, which no published tokenizer has, and the log does not say how "
                "many tokens there are")
        yield OfSeed("unknown ratio", run.seed, 0, warning("CK-BYTES", what, place, line))


def our_bytes(entry, run, ratio, place):
    """Our logs state the bytes: they have to give the score, and for a record they are FineWeb's."""
    log = run.log
    stated = log.val_bytes / log.val_tokens
    line = log.lines.get("val_bytes")
    if abs(ratio.value / stated - 1) > ratio.tolerance:
        what = (f"loss and score give {ratio.value:.6f} bytes per token, and the log counts {log.val_bytes:,} bytes of "
                f"{log.val_tokens:,} tokens, {stated:.6f}")
        yield OfSeed("ratio", run.seed, 0, error("CK-BYTES", what, place, line))
    if abs(log.val_bytes / rules.VAL_BYTES - 1) > rules.BYTES_TOLERANCE:
        say = error if entry.track == "record" else note
        what = (f"the score is of {log.val_bytes:,} bytes, and the contest's validation text has "
                f"{rules.VAL_BYTES:,}: it does not compare with others")
        yield OfSeed("text", run.seed, 0, say("CK-BYTES", what, place, line))


# ---- CK-COVER -------------------------------------------------------------------------------------------------------


LARGEST_TOKENS = min(text.targets for text in rules.TEXTS)  # of the published tokenizer with the largest ones


def check_cover(entry):
    """Is all of the validation text scored (R7, #50)?"""
    rows = []
    for run in entry.runs:
        if run.log:
            rows += placed(coverage(entry, run), entry.relative(run.log.path))
    yield from worst(rows)


def coverage(entry, run):
    log = run.log
    say = error if entry.track == "record" else note
    tokens = log.val_tokens
    line = log.lines.get("val_tokens")
    if tokens is None:
        text = f"the log of seed {run.seed} does not say how many tokens it validates on"
        yield OfSeed("none", run.seed, 0, unknown("CK-COVER", text))
        return
    if log.form != "ours" and rules.text_of(tokens) is None:
        ratio, _ = ratio_of_run(run)
        share = tokens / (0.6 * LARGEST_TOKENS)  # larger vocabularies have fewer tokens
        if ratio and not is_per_byte(ratio):
            share = tokens * ratio.value / rules.VAL_BYTES
        if share < 0.99:
            text = f"{tokens:,} tokens are validated on, about {share:.1%} of the text"
            yield OfSeed("part", run.seed, 1 - share, say("CK-COVER", text, line=line))
    if log.val_share is not None and log.val_share < 1:
        text = f"val_doc_fraction is {log.val_share:g}: not all validation documents are scored"
        yield OfSeed("share", run.seed, 1 - log.val_share, say("CK-COVER", text, line=log.lines.get("val_share")))
    if log.scored_tokens and log.scored_tokens < 0.99 * tokens:
        text = f"{log.scored_tokens:,} tokens are scored of {tokens:,}"
        yield OfSeed("scored", run.seed, 0, warning("CK-COVER", text, line=log.lines.get("scored_tokens")))


# ---- CK-OVERLAP -----------------------------------------------------------------------------------------------------


def check_overlap(entry):
    """Signs that validation documents were trained on (#2127)."""
    rows = []
    for run in entry.runs:
        if run.training:
            rows += placed(overlap(run), entry.relative(run.training.path))
    yield from worst(rows)


def overlap(run):
    log = run.training
    if log.train_shards in rules.OVERLAP_SHARDS:
        text = (f"train_shards: {log.train_shards}, as the data of #2127, which trains on 40,000 of the 50,000 "
                "validation documents")
        yield OfSeed("shards", run.seed, 0, error("CK-OVERLAP", text, line=log.lines.get("train_shards")))
    if log.doubled_path:
        path = log.doubled_path if len(log.doubled_path) < 60 else f"...{log.doubled_path[-57:]}"
        text = f"{path} has the doubled path of the data in #2127; say with which --val-docs it was made"
        yield OfSeed("path", run.seed, 0, warning("CK-OVERLAP", text, line=log.lines.get("doubled_path")))
    copies = log.documents_in_training
    if copies:
        say = note if log.valid == "yes" else error
        text = f"{copies:,.0f} validation documents begin as documents that were trained on"
        line = log.lines.get("documents_in_training")
        yield OfSeed("copies", run.seed, copies, say("CK-OVERLAP", text, line=line))
    elif log.form == "ours" and copies is None and log.val_bpb is not None:
        text = f"the log of seed {run.seed} does not say whether validation text was trained on"
        yield OfSeed("none", run.seed, 0, unknown("CK-OVERLAP", text))


# ---- the verdict of our own logs ------------------------------------------------------------------------------------

REASONS = (  # how our reasons begin
    ("C1", "CK-FLIP"), ("C2", "CK-SUM"), ("C4", "CK-COVER"), ("C3: validation shards", "CK-VALOPEN"),
    ("C3", "CK-ORDER"), ("training shards", "CK-TRAINOPEN"), ("the evaluation opened", "CK-NET"))
OBSTACLES = (("not trained", "CK-TRAINTIME"), ("not scored", "CK-COVER"))


def rule_of(text, table):
    """The rule that a reason or obstacle of our log is about."""
    if "validation documents begin" in text:
        return "CK-OVERLAP"
    return next((rule for start, rule in table if text.startswith(start)), "CK-ORDER")


def check_verdict(entry):
    """The four conditions, which our own runs test while they score."""
    rows = []
    foreign = []
    for run in entry.runs:
        log = run.log
        if log is None or log.form != "ours":
            foreign.append(run)
            continue
        place = entry.relative(log.path)
        line = log.lines.get("valid")
        if log.valid is None:
            text = f"the log of seed {run.seed} has no verdict: its run did not come to its end"
            rows.append(OfSeed("none", run.seed, 0, error("CK-ORDER", text, place)))
        elif log.valid != "yes":
            for reason in log.reasons or ("no reason is given",):
                finding = error(rule_of(reason, REASONS), f"valid:{log.valid}, {reason}", place, line)
                rows.append(OfSeed(reason, run.seed, 0, finding))
        if log.valid and log.tested != "yes":
            text = f"the self-tests of seed {run.seed} did not all run and pass (SELFTEST=0?)"
            rows.append(OfSeed("untested", run.seed, 0, unknown("CK-FLIP", text, place, line)))
        for obstacle in obstacles(log):
            say = error if entry.track == "record" else note
            finding = say(rule_of(obstacle, OBSTACLES), f"eligible:no, {obstacle}", place, line)
            rows.append(OfSeed(obstacle, run.seed, 0, finding))
    yield from worst(rows)
    if foreign:
        yield unknown("CK-FLIP", "CK-ORDER, CK-FLIP, CK-SUM, CK-PREFIX, CK-VALOPEN, CK-TRAINOPEN and CK-NET take the "
                      "run itself: files do not prove them for a foreign script")


CHECKED = ("the score is not valid", "training took", "evaluation took", "hardware")  # by checks of their own


def obstacles(log):
    """Why a run of ours could not be a record, as far as no other check looks at it."""
    if log.eligible == "no":
        for obstacle in log.eligible_reasons:
            if not obstacle.startswith(CHECKED) and "validation bytes" not in obstacle:
                yield obstacle


# ---- breaches that show ---------------------------------------------------------------------------------------------

HONEST_LEVEL = 1.0  # bits per byte: no audited score is below 1.0565 (#2135)
SUSPECTS = (  # (in the name of the line with the score, rule, why it is one)
    ("slot", "CK-ORDER", "SLOT fits to the tokens that it scores (#1240)"),
    ("ppm", "CK-SUM", "a mixture with byte-level PPM is no distribution over tokens (#2083)"),
    ("ngram", "CK-SUM", "hashed n-gram mixtures were closed as no distribution over tokens (#779)"),
    ("hedge", "CK-SUM", "experts that give all tokens one number make no distribution (#745)"))


def check_breaches(entry):
    """What logs and script show of breaches that the organisers have ruled on, where it is certain."""
    rows = []
    for run in entry.runs:
        for log in {id(log): log for log in (run.log, run.training) if log}.values():
            place = entry.relative(log.path)
            for row in (*breaches_of_log(run, log), *(breaches_of_score(run) if log is run.log else ())):
                rows.append(row._replace(finding=row.finding._replace(file=place)))
    yield from worst(rows)
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


def breaches_of_log(run, log):
    if log.prequant_line:
        text = "trains on validation text before the model is packed and scored (#677, #1972)"
        yield OfSeed("prequant", run.seed, 0, error("CK-VALOPEN", text, line=log.prequant_line))
    gates = {name: count for name, count in (log.gates or {}).items() if count}
    if gates:
        counts = ", ".join(f"{name}={count:,}" for name, count in gates.items())
        text = f"n-gram gates that look at the target were open: {counts} (#1420, #2018)"
        yield OfSeed("gates", run.seed, sum(gates.values()), error("CK-FLIP", text, line=log.lines.get("gates")))
    if log.passes:
        text = "scores the text in two passes (#846)"
        yield OfSeed("passes", run.seed, 0, error("CK-COVER", text, line=log.lines.get("passes")))
    if log.temperature not in (None, 1.0):
        text = f"temperature {log.temperature:g}: it must not have been chosen on validation text (#991)"
        yield OfSeed("temperature", run.seed, 0, warning("CK-VALOPEN", text, line=log.lines.get("temperature")))
    if log.selected_line:
        text = "weights are chosen by their score on validation text (#1311, #2098)"
        yield OfSeed("selected", run.seed, 0, warning("CK-VALOPEN", text, line=log.selected_line))


def breaches_of_score(run):
    """What the line with the score says of how it was made."""
    score = run.score
    if score is None:
        return
    label = score.name.lower()
    for word, rule, why in SUSPECTS:
        if word in label:
            yield OfSeed(word, run.seed, 0, warning(rule, f"the score is of {score.name!r}: {why}", line=score.line))
    long = [phase for phase in run.log.phases if phase.seconds > 5]
    scored = [phase for phase in long if phase.scored and abs(phase.line - score.line) <= 3]
    adapted = [phase for phase in long if not phase.scored and phase.line < score.line]
    is_adaptive = any(word in label for word in ("ttt", "lora", "slot", "adapt", "legal"))
    if adapted and scored and not is_adaptive and max(phase.line for phase in scored) > adapted[-1].line:
        seconds = sum(phase.seconds for phase in adapted)
        text = f"adapts to validation text for {seconds:,.0f} s and scores it afterwards, in {scored[-1].name} (#518)"
        yield OfSeed("adapted", run.seed, 0, error("CK-ORDER", text, line=adapted[0].line))
