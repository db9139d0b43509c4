"""`submit.py stats`: mean, spread and the one-sided test of a record, over seeds."""

import argparse
import json
import math
import re
import statistics
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from common import BadInput, Parser, need, positive, write_json
from submission import rules
from submission.entry import claims_of, number_of
from submission.logs import read_log
from submission.runs import complaints, read_run

HELP = """\
Mean, standard deviation and, against a record, the one-sided test of the README: better by 0.005 nats per token at
p < 0.01. Scores come from the folders of runs, a submission's folder, a pull request in the table of accepted records,
or are given as numbers in bits per byte.
"""
PUBLISHED = Path(__file__).with_name("published.json")
LN2 = math.log(2)
SAME_TOKENIZER = 1e-4  # relative difference of two numbers of bytes per token, up to which they are of one tokenizer


class Seed(NamedTuple):
    """The score of one seed."""

    name: str
    bpb: float  # bits per byte
    loss: float | None  # nats per token; None where it is not said


class Sample(NamedTuple):
    """The seeds of one configuration."""

    name: str
    source: str  # where the scores stand, in words
    seeds: tuple[Seed, ...]
    bytes_per_token: float | None  # None where neither losses nor a tokenizer are known

    @property
    def bpb(self):
        return [seed.bpb for seed in self.seeds]

    @property
    def losses(self):
        return [seed.loss for seed in self.seeds if seed.loss]

    @property
    def pull_request(self):
        """Its number where it is one of the published records, else None."""
        return int(self.name[1:]) if re.fullmatch(r"#\d+", self.name) else None


# ---- where scores come from -----------------------------------------------------------------------------------------


def sample(words, tokenizer=None):
    """The Sample that these arguments name: a pull request, numbers, a submission's folder, or folders of runs."""
    if len(words) > 1 or is_run(Path(words[0])):
        found = from_runs([read_run(word) for word in words])
    elif Path(words[0]).is_dir():
        found = from_folder(Path(words[0]))
    elif re.fullmatch(r"#?\d+|baseline", words[0]):
        found = from_table(words[0].removeprefix("#"))
    elif re.fullmatch(r"[\d.,\s]+", words[0]):
        found = from_numbers(words[0])
    else:
        raise BadInput(f"{words[0]}: no folder, pull request or list of scores such as 1.0565,1.0561; give one of them")
    return with_tokenizer(found, tokenizer) if tokenizer else found


def is_run(folder):
    """Is this the folder of a run, and not that of a submission with one log?"""
    return (folder / "train.log").is_file() and not (folder / "submission.json").is_file()


def from_runs(runs):
    """The scores of the trainer's own runs."""
    wrong = complaints(runs)
    if wrong:
        raise BadInput("\n".join(wrong))
    seeds = [Seed(str(run.seed), run.summary["val_bpb"], run.summary["val_loss"]) for run in runs]
    first = runs[0].summary
    name = ", ".join(str(run.folder) for run in runs)
    return Sample(name, "summary.json", tuple(seeds), first["val_bytes"] / first["val_tokens"])


def published():
    """{pull request: {tokenizer, val_bpb and val_loss by seed}} of the accepted records.

    The scores are those of the logs in the merged folders, and in the heads of #1120, #1529, #1953, #2014 and #2135.
    #1868 is its rerun, #1945 its commit 7006753: the runs that were accepted (#2146). #287, #315 and #414 are known
    by the best of their seeds.
    """
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def from_table(number):
    """An accepted record."""
    records = published()
    if number not in records:
        raise BadInput(f"#{number} is not in the table of accepted records: give its seeds' scores, such as "
                       f"1.0565,1.0561, or one of {', '.join(records)}")
    record = records[number]
    seeds = [Seed(seed, bpb, record["val_loss"][seed]) for seed, bpb in record["val_bpb"].items()]
    name = f"#{number}" if number.isdecimal() else number
    return Sample(name, f"logs of the pull request, {record['tokenizer']}", tuple(seeds), ratio(seeds))


def from_numbers(text):
    """Bits per byte as they were typed."""
    try:
        scores = [positive(word) for word in text.replace(",", " ").split()]
    except argparse.ArgumentTypeError as error:
        raise BadInput(f"{text}: {error}; give scores such as 1.0565,1.0561") from None
    seeds = [Seed(f"{number}.", score, None) for number, score in enumerate(scores, 1)]
    return Sample(text, "numbers", tuple(seeds), None)


def from_folder(folder):
    """A submission's folder: its submission.json, or its logs where that says nothing of single seeds."""
    fields = read_json(folder / "submission.json", parse_float=Decimal)
    claims = [(claim.seed, above_zero(claim.val_bpb), above_zero(claim.val_loss)) for claim in claims_of(fields)]
    claimed = [Seed(str(seed), bpb, loss) for seed, bpb, loss in claims if bpb]
    logs = [(path.stem, read_log(path)) for path in sorted(folder.glob("*.log"))]
    logged = [Seed(stem if log.seed is None else str(log.seed), log.val_bpb, log.val_loss)
              for stem, log in logs if log.val_bpb]
    logged = list(dict.fromkeys(logged))  # of copies one
    names = [seed.name for seed in logged]
    if not claimed and len(set(names)) < len(names):
        raise BadInput(f"{folder}: several logs are of one seed ({', '.join(names)}); give the scores themselves")
    seeds = claimed or logged
    if not seeds:
        raise BadInput(f"{folder}: neither submission.json nor a log has the score of a seed; give the scores, such as "
                       "1.0565,1.0561")
    return Sample(str(folder), "submission.json" if claimed else "logs", tuple(seeds),
                  ratio(seeds) or ratio_of_json(fields) or ratio(logged))


def read_json(path, **options):
    """The object in a JSON file; BadInput if it holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"), **options)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; give a submission's folder or runs such as logs/RUN_ID") from None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise BadInput(f"{path} is not a JSON object; correct it, or give the scores, such as 1.0565,1.0561")
    return fields


def above_zero(number):
    return float(number) if number and number > 0 else None


def ratio(seeds):
    """Bytes per token, which loss and score of a seed give: loss / (ln 2 x BPB). None without losses."""
    ratios = [seed.loss / (LN2 * seed.bpb) for seed in seeds if seed.loss]
    return statistics.median(ratios) if ratios else None


def ratio_of_json(fields):
    """Bytes per token by the totals or the means of submission.json; None if it has neither."""
    tokens, size, loss, bpb = (above_zero(number_of(fields, field))
                               for field in ("val_tokens", "val_bytes", "val_loss", "val_bpb"))
    if tokens and size:
        return size / tokens
    return loss / (LN2 * bpb) if loss and bpb else None


def with_tokenizer(found, name):
    """The Sample with the bytes per token of a published tokenizer, by its fingerprint (rules.TEXTS)."""
    known = {text.tokenizer: text.bytes_per_token for text in rules.TEXTS}
    if name not in known:
        raise BadInput(f"--tokenizer {name!r} is unknown; there is: {', '.join(known)}")
    if found.bytes_per_token and abs(found.bytes_per_token / known[name] - 1) > SAME_TOKENIZER:
        raise BadInput(f"--tokenizer {name} has {known[name]:.5f} bytes per token, but the losses of {found.name} say "
                       f"{found.bytes_per_token:.5f}: leave the option out")
    return found._replace(bytes_per_token=found.bytes_per_token or known[name])


# ---- the test -------------------------------------------------------------------------------------------------------


def mean(values):
    return statistics.mean(values) if values else None


def spread(values):
    """Standard deviation (n - 1); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


class Rule(NamedTuple):
    """How much better than the record before it a record has to be."""

    name: str
    margin: float  # nats per token
    p_value: float  # below this the test is passed


README = Rule("README", rules.MARGIN_NATS, rules.P_VALUE)
PRACTICE = Rule("practice since #1902", 0.0, rules.P_VALUE_LATE)


class Test(NamedTuple):
    """One-sided: is the mean of our losses lower than that of theirs by more than the margin?"""

    rule: Rule
    t: float  # negative where ours are lower than the margin asks
    df: float
    p: float
    missing: float  # nats per token, by which the mean of ours has to be lower at this spread; below 0: to spare
    needed: float  # that mean

    @property
    def passed(self):
        return self.p < self.rule.p_value


def test(ours, theirs, rule):
    """The Test of two lists of losses in nats per token: Welch's, or Student's against a single number."""
    stats = need("the test", "scipy").stats
    if len(theirs) > 1:
        shifted = [loss - rule.margin for loss in theirs]
        found = stats.ttest_ind(ours, shifted, equal_var=False, alternative="less")
    else:
        found = stats.ttest_1samp([loss - theirs[0] + rule.margin for loss in ours], 0, alternative="less")
    missing = float(found.confidence_interval(1 - rule.p_value).high)
    needed = statistics.mean(ours) - missing
    return Test(rule, float(found.statistic), float(found.df), float(found.pvalue), missing, needed)


class Comparison(NamedTuple):
    """Our seeds against those of a record."""

    record: Sample
    unit: str  # how theirs became nats per token, in words
    better_bpb: float  # means: theirs - ours
    better_nats: float
    tests: tuple[Test, ...]
    no_test: str = ""  # why there is none


def compare(ours, record):
    """The Comparison of two Samples, in nats per token of our tokenizer."""
    if not ours.bytes_per_token:
        raise BadInput(f"{ours.name} says nothing of its tokenizer, and a test needs nats per token: name it with "
                       f"--tokenizer, one of {', '.join(dict.fromkeys(text.tokenizer for text in rules.TEXTS))}")
    losses = losses_at(ours, ours.bytes_per_token)
    their_losses = losses_at(record, ours.bytes_per_token)
    no_test = ""
    if len(losses) < 2:
        no_test = "one seed has no spread, and a record needs three"
    elif len(set(losses)) == 1 and len(set(their_losses)) == 1:
        no_test = "the seeds do not differ at all"
    tests = () if no_test else tuple(test(losses, their_losses, rule) for rule in (README, PRACTICE))
    return Comparison(record, unit_of(ours, record), mean(record.bpb) - mean(ours.bpb),
                      mean(their_losses) - mean(losses), tests, no_test)


def losses_at(found, bytes_per_token):
    """Losses in nats per token of a tokenizer with these bytes per token: as printed where they are of that one, else
    BPB x ln 2 x bytes per token.
    """
    if same_tokenizer(found.bytes_per_token, bytes_per_token) and len(found.losses) == len(found.seeds):
        return found.losses
    return [bpb * LN2 * bytes_per_token for bpb in found.bpb]


def same_tokenizer(one, other):
    return bool(one and other) and abs(one / other - 1) < SAME_TOKENIZER


def unit_of(ours, record):
    """What a nat per token is here, and how the record's scores became such."""
    unit = f"nats per token of {ours.bytes_per_token:.5f} bytes"
    if same_tokenizer(ours.bytes_per_token, record.bytes_per_token):
        return f"{unit}, the record's own"
    theirs = "of which no tokenizer is known"
    if record.bytes_per_token:
        theirs = f"whose own tokens have {record.bytes_per_token:.5f} bytes"
    return f"{unit}; the record, {theirs}, by BPB x ln 2 x {ours.bytes_per_token:.5f}"


# ---- what is printed ------------------------------------------------------------------------------------------------


def facts(ours, comparison=None):
    """Everything that is printed, as JSON has it."""
    result = {
        "name": ours.name, "source": ours.source,
        "seeds": {seed.name: {"val_bpb": seed.bpb, "val_loss": seed.loss} for seed in ours.seeds},
        "val_bpb": mean(ours.bpb), "val_bpb_std": spread(ours.bpb), "val_loss": mean(ours.losses),
        "val_loss_std": spread(ours.losses), "bytes_per_token": ours.bytes_per_token,
        "suspect_spread": is_suspect(ours)}
    if comparison:
        record = comparison.record
        tests = {found.rule.name: {
            "margin_nats": found.rule.margin, "p_below": found.rule.p_value, "t": found.t, "df": found.df, "p": found.p,
            "passed": found.passed, "needed_val_loss": found.needed} for found in comparison.tests}
        result["against"] = {
            "name": record.name, "val_bpb": {seed.name: seed.bpb for seed in record.seeds}, "unit": comparison.unit,
            "better_bpb": comparison.better_bpb, "better_nats": comparison.better_nats, "tests": tests,
            "no_test": comparison.no_test}
    return result


def is_suspect(found):
    """Do the seeds lie ten times as far apart as those of honest runs?"""
    deviation = spread(found.bpb)
    return deviation is not None and deviation > rules.SUSPECT_STD


def lines(ours, comparison=None):
    """The report, line by line."""
    yield f"{ours.name} ({ours.source})"
    yield from seed_table(ours)
    if is_suspect(ours):
        yield (f"warning: the seeds' std of {spread(ours.bpb):.4f} BPB is over {rules.SUSPECT_STD}: honest runs have "
               f"0.0002 to {rules.USUAL_STD} (#967 had 0.012); look at each of them")
    if comparison:
        yield ""
        yield from comparison_lines(ours, comparison)


def seed_table(ours):
    """A row for each seed, then mean and std."""
    rows = [*ours.seeds, Seed("mean", mean(ours.bpb), mean(ours.losses))]
    if len(ours.seeds) > 1:
        rows.append(Seed("std", spread(ours.bpb), spread(ours.losses)))
    yield f"  {'seed':<8}{'val_bpb':>12}{'val_loss':>12}"
    for name, bpb, loss in rows:
        yield f"  {name:<8}{bpb:>12.8f}{'' if loss is None else f'{loss:>12.8f}'}".rstrip()


def comparison_lines(ours, comparison):
    """The verdicts, in words."""
    record = comparison.record
    deviation = f", std {spread(record.bpb):.8f}" if len(record.seeds) > 1 else ""
    yield f"Against {record.name} ({record.source}): {mean(record.bpb):.8f} BPB, {len(record.seeds)} seed(s){deviation}"
    yield f"  in {comparison.unit}"
    word = "better" if comparison.better_nats > 0 else "worse"
    yield f"  {word} by {abs(comparison.better_bpb):.5f} BPB, {abs(comparison.better_nats):.5f} nats per token"
    if comparison.no_test:
        yield f"  no test: {comparison.no_test}"
    kind = "Welch's" if len(record.seeds) > 1 else "Student's, against one number:"
    for rule, t, df, p, missing, _ in comparison.tests:
        is_passed = p < rule.p_value
        asked = f"better by {rule.margin} nats per token" if rule.margin else "better"
        yield f"  {rule.name}: {asked}, p < {rule.p_value}? {'yes' if is_passed else 'no'}"
        amount = f"{abs(missing):.5f} nats ({abs(missing) / (LN2 * ours.bytes_per_token):.5f} BPB)"
        remark = f"{amount} to spare" if is_passed else f"at this spread the mean has to be {amount} lower"
        yield f"    {kind} t {t:.3f}, df {df:.2f}, p {p:.4g}; {remark}"


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="submit.py stats", description=HELP)
    parser.add_argument("seeds", metavar="DIR|RUN", nargs="+",
                        help="a submission's folder, the folders of runs, a pull request, or scores: 1.0565,1.0561")
    parser.add_argument("--against", metavar="RECORD", help="the same, of the record to beat: 2135")
    parser.add_argument("--tokenizer", metavar="NAME", help="of the scores, where nothing says it: sp8192")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same facts there")
    return parser.parse_args(argv)


def run(args):
    ours = sample(args.seeds, args.tokenizer)
    comparison = compare(ours, sample([args.against])) if args.against else None
    if args.json:
        write_json(args.json, facts(ours, comparison), indent=1)
    print("\n".join(lines(ours, comparison)), flush=True)
    return 0
