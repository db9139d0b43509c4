"""`submit.py folder`: from the runs of a configuration to the folder of a submission."""

import contextlib
import datetime
import json
import os
import re
import shlex
import tempfile
from pathlib import Path

from common import ROOT, BadInput, Parser, git, say, sha256
from submission import page, recipe, rules, stats
from submission.manifest import SETTINGS_FILE, Submission, fields_of, requirements
from submission.pack import minified
from submission.runs import complaints, read_run
from submission.script import definitions

HELP = """\
Write records/TRACK/YYYY-MM-DD_Name/ from the folders of finished runs, one for each seed: script, readable twin, logs,
settings.env, requirements.txt, submission.json and README.md. The folder is complete or absent. What a run does not
know is an option or a variable of the environment: --author or SUBMIT_AUTHOR, --github-id or SUBMIT_GITHUB_ID.
"""
TWIN = "train_gpt_human.py"


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments(argv):
    parser = Parser(prog="submit.py folder", description=HELP)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a finished run: logs/RUN_ID")
    parser.add_argument("--name", help="of the submission, in a few words")
    parser.add_argument("--blurb", help="what is new, in a paragraph; @FILE reads it from there")
    parser.add_argument("--author", default=os.environ.get("SUBMIT_AUTHOR"), help="default: $SUBMIT_AUTHOR")
    parser.add_argument("--github-id", default=os.environ.get("SUBMIT_GITHUB_ID"), help="default: $SUBMIT_GITHUB_ID")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD; default: today")
    parser.add_argument("--track", choices=[*rules.TRACKS],
                        help="default: record if every run could be one, else non-record")
    parser.add_argument("--draft", action="store_true", help="a record's folder of fewer than 3 seeds, which says so")
    parser.add_argument("--script", metavar="FILE", type=Path,
                        help="default: the file in logs/packed/, or train_gpt.py, whose SHA-256 the runs logged")
    parser.add_argument("--human", metavar="FILE",
                        help="readable source of a packed script; none leaves it out; default: SCRIPT_human.py, "
                             "train_gpt.py as it is or was at the runs' commit, or a file in logs/specialised/, "
                             "whichever is, when minified, what ran")
    parser.add_argument("--against", metavar="RECORD", help="the record to beat, as in submit.py stats: 2135")
    parser.add_argument("--requirement", metavar="NAME==VERSION", action="append", default=[],
                        help="version of a package that the script imports and the runs did not log")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "records", help="default: records/")
    return parser.parse_args(argv)


def run(args):
    submission = gather(args)
    folder = args.out / rules.TRACKS[submission.track] / folder_name(submission.person)
    write_folder(folder, files(submission))
    for reason in submission.obstacles:
        say("obstacle", reason=reason)
    if submission.track == "record" and not submission.comparison:
        say("warning", note="no test against a record: name it with --against")
    fields = submission.fields
    total = fields["bytes_total"]
    say("written", folder=folder, track=submission.track, seeds=len(submission.runs),
        val_bpb=f"{fields['val_bpb']:.8f}", bytes_total=total, margin_bytes=rules.SIZE_LIMIT - total)
    return 0


def gather(args):
    """The Submission; BadInput with a line for each thing that is wrong or missing."""
    runs = tuple(sorted(read_all(args.runs), key=lambda run: run.seed))
    person = person_of(args)
    could_be_record = all(run.summary["eligible"] == "yes" for run in runs)
    track = args.track or ("record" if could_be_record else "non-record")
    refuse([*missing(person), *complaints(runs), *refusals(runs, track, args)])
    script = find_script(runs, args.script)
    twin = find_twin(runs[0], script, args.human)
    experiment = experiment_of_runs(runs, script)
    settings = recipe.settings_of(experiment)
    sample = stats.from_runs(runs)
    comparison = stats.compare(sample, stats.sample([args.against])) if args.against else None
    submission = Submission(
        runs=runs, track=track, draft=args.draft and len(runs) < rules.LEAST_SEEDS, obstacles=obstacles(runs),
        script=script, twin=twin, is_packed=not is_source(script, runs[0]), experiment=experiment, settings=settings,
        changed=recipe.changed(settings), credits=recipe.credits(settings), sample=sample, comparison=comparison,
        person=person, requirements=requirements(runs[0], script, args.requirement))
    return submission._replace(fields=fields_of(submission))


def read_all(folders):
    """All runs; BadInput with a line for each that cannot be used."""
    runs = []
    wrong = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except BadInput as error:
            wrong.append(str(error))
    refuse(wrong)
    return runs


def refuse(reasons):
    """BadInput with these lines, if there are any."""
    if reasons:
        raise BadInput("\n".join(reasons))


# ---- what is refused ------------------------------------------------------------------------------------------------


def person_of(args):
    """{field: text} of what only a person knows."""
    blurb = args.blurb
    if blurb and blurb.startswith("@"):
        try:
            blurb = Path(blurb[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--blurb {blurb}: cannot be read ({error})") from None
    return {"author": args.author, "github_id": (args.github_id or "").removeprefix("@"), "name": args.name,
            "blurb": (blurb or "").strip(), "date": args.date}


def missing(person):
    """A line for all that a person has to say and did not, and one for a date or name that cannot name a folder."""
    absent = [f"--{key.replace('_', '-')}" for key, text in person.items() if not text]
    if absent:
        yield f"not given: {', '.join(absent)}; a run cannot know them"
    if not is_date(person["date"]):
        yield f"--date {person['date']}: not a date such as 2026-04-30"
    elif person["name"] and not rules.FOLDER_NAME.fullmatch(folder_name(person)):
        yield f"--name {person['name']!r}: the folder's name needs a letter or digit of it"


def is_date(text):
    """Is this a day of the calendar, as YYYY-MM-DD?"""
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(text).isoformat() == text
    return False


def folder_name(person):
    """YYYY-MM-DD_Name: letters, digits and -+._ of the name, the rest as underscores."""
    words = re.sub(r"[^A-Za-z0-9.+-]+", "_", person["name"]).strip("_.+-")
    return f"{person['date']}_{words}"


def obstacles(runs):
    """Why these runs can be no record, each reason once, with its seeds where it is not that of all."""
    seeds = {}
    for run in runs:
        for reason in [*run.summary["eligible_reasons"], *run.summary["reasons"]]:
            seeds.setdefault(reason, []).append(run.seed)
    return tuple(reason if len(found) == len(runs) else f"{reason} (seed {', '.join(map(str, found))})"
                 for reason, found in seeds.items())


def refusals(runs, track, args):
    """Why these runs are too large, or not of this track."""
    for run in runs:
        summary = run.summary
        total = summary["total_bytes"]
        if total > rules.SIZE_LIMIT:
            yield (f"{run.folder}: {total} bytes, {total - rules.SIZE_LIMIT} over the limit of {rules.SIZE_LIMIT}; "
                   "make it fit with FIT=allocate or prune, or train with a script packed by tools/submit.py")
        if summary["valid"] != "yes" and args.track != "non-record":
            yield (f"{run.folder}: the score is not valid ({'; '.join(summary['reasons'])}); --track non-record "
                   "takes it and says so")
        elif summary["eligible"] != "yes" and track == "record":
            yield (f"{run.folder}: no record ({'; '.join(summary['eligible_reasons'])}); --track non-record takes "
                   "it and says so")
    if track == "record" and len(runs) < rules.LEAST_SEEDS and not args.draft:
        yield (f"{len(runs)} seed(s), and a record needs {rules.LEAST_SEEDS}: run more; --draft makes a folder that "
               "says what is missing")


# ---- script and twin ------------------------------------------------------------------------------------------------


def find_script(runs, given):
    """The file that ran: its SHA-256 is the runs' code_sha256."""
    wanted = runs[0].summary["code_sha256"]
    places = [given] if given else [*sorted((ROOT / "logs/packed").glob("*.py")), ROOT / "train_gpt.py"]
    for place in places:
        try:
            found = sha256(place)
        except OSError as error:
            raise BadInput(f"{place}: cannot be read ({error.strerror})") from None
        if found == wanted:
            return place
    if given:
        raise BadInput(f"--script {given} is not what ran: its SHA-256 is {found}, the runs' {wanted}")
    commit = runs[0].header.get("commit")
    raise BadInput(f"neither train_gpt.py nor a script in logs/packed/ has the SHA-256 of the runs, {wanted}: name the "
                   f"file that ran (commit {commit}) with --script")


def experiment_of_runs(runs, script):
    """What the script makes of the runs' settings; BadInput if that is not what ran."""
    summary = runs[0].summary
    experiment = recipe.experiment_of(script, recipe.script_words(shlex.split(summary["settings"])))
    if experiment.settings_hash != summary["settings_hash"]:
        raise BadInput(f"{script} makes other settings of the log of {runs[0].folder} (hash "
                       f"{experiment.settings_hash[:12]}, the run's {summary['settings_hash'][:12]}): name the script "
                       "that ran with --script")
    return experiment


def is_source(script, of_run):
    """Is the script, as it lies on disk, the source that Python saw?"""
    text = script.read_bytes().decode("utf-8", "replace")
    return text.rstrip("\n") == of_run.source.rstrip("\n")


def find_twin(of_run, script, given):
    """The readable source of a packed script, or None where it needs none or none is wanted."""
    if is_source(script, of_run) or given == "none":
        return None
    wanted = of_run.source.rstrip("\n")
    names = definitions(wanted)  # which packing keeps
    for place, source in twins(of_run, script, given):
        source = with_preset_of(of_run, source)
        if definitions(source) == names and minified(source, place).decode().rstrip("\n") == wanted:
            return source
    if given:
        raise BadInput(f"--human {given}: minified, it is not the source at the top of {of_run.folder}/train.log; give "
                       "the file that was packed, or none")
    raise BadInput(f"the readable source of {script} is not known: give the file that was packed with --human, or "
                   "--human none to leave it out")


def twins(of_run, script, given):
    """(place, source) of files that may be the readable source."""
    if given:
        try:
            yield given, Path(given).read_bytes()
        except OSError as error:
            raise BadInput(f"--human {given}: cannot be read ({error.strerror}); give a file, or none") from None
        return
    specialised = sorted((ROOT / "logs/specialised").glob("*/train_gpt.py"))
    for place in (script.with_name(f"{script.stem}_human.py"), ROOT / "train_gpt.py", *specialised):
        if place.is_file():
            yield place, place.read_bytes()
    commit = of_run.header.get("commit", "")
    source = git("show", f"{commit}:train_gpt.py")
    if source:
        yield f"train_gpt.py of commit {commit}", f"{source}\n".encode()


PRESET = re.compile(rb"^PRESET ?= ?(.*)$", re.MULTILINE)  # settings of a copy of the trainer, which pack writes


def with_preset_of(of_run, source):
    """The source with the preset of the one that ran."""
    preset = PRESET.search(of_run.source.encode())
    return PRESET.sub(lambda _: b"PRESET = " + preset[1].strip(), source, count=1) if preset else source


# ---- the files ------------------------------------------------------------------------------------------------------


def files(submission):
    """{name: bytes} of the folder."""
    fields = submission.fields
    heading = f"{fields['name']}: val_bpb {fields['val_bpb']:.5f}, seeds {', '.join(map(str, fields['seeds']))}"
    portable = [setting for setting in submission.changed  # without paths that exist on the runs' machine only
                if not (setting.name in recipe.PATHS and setting.value.startswith("/"))]
    required = [f"# beside {' '.join(page.base_packages(submission))}", *submission.requirements, ""]
    contents = {
        "README.md": page.page(submission).encode(),
        "submission.json": (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode(),
        "train_gpt.py": submission.script.read_bytes(),
        SETTINGS_FILE: recipe.settings_file(portable, heading).encode(),
        "requirements.txt": "\n".join(required).encode()}
    if submission.twin is not None:
        contents[TWIN] = submission.twin
    return contents | {f"train_seed{run.seed}.log": run.log for run in submission.runs}


def write_folder(folder, contents):
    """Write all files beside their place and put the folder there at once: it is complete or absent."""
    if folder.exists() or folder.is_symlink():
        raise BadInput(f"{folder} exists; remove it, or give another --name, --date or --out")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".", suffix=".part") as part:
            complete = Path(part, folder.name)
            complete.mkdir()
            for name, content in contents.items():
                (complete / name).write_bytes(content)
            complete.rename(folder)
    except OSError as error:
        raise BadInput(f"{folder} cannot be written ({error.strerror})") from None
