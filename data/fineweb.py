"""Downloads the published FineWeb shards and tokenizer of the contest, verifies every file, writes a manifest.

    python data/fineweb.py --variant sp1024 --train-shards 80        8 billion training tokens and all of validation
    python data/fineweb.py --variant sp8192 --train-shards 10 --check
    python data/fineweb.py --variant sp1024 --repo /mnt/mirror       from a folder with the same layout
    python data/fineweb.py --variant sp8192_lossless_caps_caseops_v1_reserved        CaseOps, with its byte sidecar

A file appears under its final name only after its header, length and tokens were checked, and validation only after its
documents, tokens and bytes are those of the contest. Files that were verified before are not fetched again.
"""

import contextlib
import errno
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))  # for common.py
sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and PYTHONSAFEPATH leave it out

import caseops
from common import BOS, READ_BYTES, ROOT, BadInput, Parser, sha256, whole
from prepare import check_folder
from processes import Bar, Stopped, Workers, hold_standard_streams, say, trainer
from proof import CASEOPS, FINEWEB, charged_bytes, check, fineweb_checks
from shards import MANIFEST, list_all_shards, locked, read_manifest, write_json
from tokenizer import check_tokenizer

TOOL = "fineweb 1"
PUBLISHED = {"sp1024": "willdepueoai/parameter-golf", "sp4096": "kevclark/parameter-golf",
             "sp8192": "kevclark/parameter-golf", f"sp8192_{CASEOPS}": "romeerp/parameter-golf-caseops-v1"}
COUNTED = 1 << 20  # tokens at a time
VARIANT = re.compile(r"sp(\d+)((?:_\w+)?)")
INSTEAD = "or make shards without a network: python data/prepare.py --source YOUR_TEXT --out DIR, or --source builtin"


class Folder:
    """A repository that is a folder on this machine."""

    def __init__(self, path):
        self.name = str(path)
        self.path = Path(path)

    def has(self, relative):
        return (self.path / relative).is_file()

    def fetch(self, relative):
        return self.path / relative, False  # copied, not linked: the folder belongs to somebody else


class Hub:
    """A dataset repository on the Hugging Face hub. Every failure becomes one line with what to do instead."""

    def __init__(self, name):
        self.name = name
        try:
            import huggingface_hub
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError:
            raise BadInput("this needs the package huggingface_hub: pip install huggingface_hub") from None
        huggingface_hub.utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()
        self.hub = huggingface_hub

    def _ask(self, question, *args, **more):
        errors = self.hub.errors
        try:
            return question(self.name, *args, repo_type="dataset", **more)
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            raise BadInput(f"--repo {self.name}: no such public dataset repository on the hub") from None
        except Exception as error:  # network errors have other types in every version of the hub library
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise BadInput(f"cannot reach {self.name} on the hub ({reason}): check the network and repeat the command, "
                           f"what is complete stays; {INSTEAD}") from None

    def has(self, relative):
        return self._ask(self.hub.file_exists, relative)  # one short request without retries, so it fails promptly

    def fetch(self, relative):
        return Path(self._ask(self.hub.hf_hub_download, relative, etag_timeout=10)).resolve(), True


def open_repository(name, variant):
    if name is None:
        if variant not in PUBLISHED:
            raise BadInput(f"--variant {variant}: published are {', '.join(PUBLISHED)}; others need --repo")
        name = PUBLISHED[variant]
    path = Path(name.removeprefix("file://"))
    if path.is_dir():
        return Folder(path)
    if name.startswith(("file:", "/", ".", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadInput(f"--repo {name}: no such folder, and not the name of a hub repository (OWNER/NAME)")
    return Hub(name)


def place(repository, relative, part):
    """Put a file of the repository under a temporary name: a link into the hub's cache where possible, else a copy."""
    source, may_link = repository.fetch(relative)
    part.unlink(missing_ok=True)
    if may_link:
        with contextlib.suppress(OSError):  # another file system
            os.link(source, part)
            return
    bar = Bar(part.name.strip(".").removesuffix(".part"), source.stat().st_size)
    with open(source, "rb") as old, open(part, "wb") as new:
        while piece := old.read(READ_BYTES):
            new.write(piece)
            bar(new.tell())
        os.fsync(new.fileno())
    bar.close()


class Download:
    """One variant: where its files come from, where they go, and what is known about those that are there."""

    def __init__(self, repository, variant, out, known):
        size, transform = VARIANT.fullmatch(variant).groups()
        self.repository = repository
        self.vocab_size = int(size)
        self.known = known
        self.folder = Path(out) / "datasets" / f"fineweb10B_{variant}"
        self.model = Path(out) / "tokenizers" / f"fineweb_{size}_bpe{transform}.model"
        self.manifest = read_manifest(self.folder) or dict(tokenizer={}, splits={}, shards=[])
        self.rows = {row["name"]: row for row in self.manifest["shards"]}

    def remote(self, path):
        """Where a file lies in the repository: below datasets/ in the contest's, at the root in others."""
        inside = f"{path.parent.name}/{path.name}"
        if path != self.model:
            inside = f"datasets/{inside}"
        for relative in (f"datasets/{inside}", inside):
            if self.repository.has(relative):
                return relative
        return None

    def verified(self, path):
        """True if the manifest knows this very file: a look at size and time, so repeating a command is quick."""
        row = self.manifest["tokenizer"] if path == self.model else self.rows.get(path.name)
        return bool(row) and path.is_file() and size_time(path) == row.get("size_time")

    def row(self, path, final):
        """The manifest's line on a shard; BadInput for a file that is not a whole shard of this vocabulary."""
        is_sidecar = "_val_bytes_" in final.name  # it holds counts of bytes, not tokens
        values = trainer().read_shard(path, None if is_sidecar else self.vocab_size)
        row = dict(name=final.name, tokens=len(values))
        if not is_sidecar:
            parts = (values[begin : begin + COUNTED] for begin in range(0, len(values), COUNTED))
            row["documents"] = sum(int((part == BOS).sum()) for part in parts)
        return dict(**row, sha256=sha256(path), size_time=size_time(path))

    def stage(self, path):
        """The file under a temporary name, or under its own if an interrupted run left it there complete."""
        if path.is_file() and path != self.model:
            with contextlib.suppress(trainer().BadInput):
                self.rows[path.name] = self.row(path, path)
                return path
        relative = self.remote(path)
        if relative is None:
            raise BadInput(f"{self.repository.name}: holds no {path.name} for {self.folder.name}")
        part = path.with_name(f".{path.name}.part")
        place(self.repository, relative, part)
        try:
            if path != self.model:
                self.rows[path.name] = self.row(part, path)
        except trainer().BadInput as error:
            part.unlink()
            why = str(error).removeprefix(f"{part}: ").partition("; ")[0]
            raise BadInput(f"{self.repository.name}: {relative} is damaged ({why}); mend it there") from None
        return part

    def validation(self):
        """Tokenizer, validation shards and their byte sidecars: they are proven together, then renamed together."""
        known = [self.folder / name for name in self.rows if "_val_" in name]
        if known and all(map(self.verified, [self.model, *known])):
            return
        val = [self.folder / "fineweb_val_000000.bin"]
        while self.remote(following := self.folder / f"fineweb_val_{len(val):06d}.bin"):
            val.append(following)
        sidecar = [path.with_name(path.name.replace("_val_", "_val_bytes_")) for path in val]
        if not self.remote(sidecar[0]):
            sidecar = []
        paths = [self.model, *val, *sidecar]
        parts = [self.stage(path) for path in paths]
        try:
            with open(parts[0], "rb") as file:
                sp = check_tokenizer(file.read(), self.vocab_size, f"{self.repository.name}: {self.model.name}")
            self.match(val, sidecar, caseops.operator_ids(sp))
            totals = {key: sum(self.rows[path.name][key] for path in val) for key in ("documents", "tokens")}
            tables = trainer().byte_tables(sp, self.vocab_size)
            val_parts = parts[1 : 1 + len(val)]
            sidecar_parts = parts[1 + len(val) :]
            totals["bytes"] = charged_bytes(trainer(), val_parts, tables, sidecar_parts)
            for result in fineweb_checks(self.folder, self.vocab_size, totals, self.known, bool(sidecar)):
                print(result, flush=True)
                if not result.ok:
                    raise BadInput(f"{self.repository.name}: not the published validation set ({str(result)[8:]})")
        except BadInput:
            for part in parts:
                part.unlink()
            raise
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
        self.manifest["tokenizer"] = dict(name=f"../../tokenizers/{self.model.name}", sha256=sha256(self.model),
                                          size_time=size_time(self.model))
        self.manifest["splits"]["val"] = totals

    def match(self, val, sidecar, operators):
        """BadInput unless a tokenizer with case operators, and no other, has a byte count for each validation token."""
        tokenizer = f"{self.repository.name}: {self.model.name}"
        if operators and not sidecar:
            raise BadInput(f"{tokenizer} has case operators, but there is no fineweb_val_bytes_000000.bin that counts "
                           "the bytes of the text; mend it there")
        if sidecar and not operators:
            raise BadInput(f"{tokenizer} has no case operators, but there is {sidecar[0].name}, which counts another "
                           "text; mend it there")
        for tokens, counts in zip(val, sidecar):
            token_count = self.rows[tokens.name]["tokens"]
            byte_counts = self.rows[counts.name]["tokens"]
            if byte_counts != token_count:
                raise BadInput(f"{self.repository.name}: {counts.name} has {byte_counts} byte counts for the "
                               f"{token_count} tokens of {tokens.name}; mend it there")

    def training(self, count):
        """The first `count` training shards, each renamed as soon as it is verified."""
        paths = [self.folder / f"fineweb_train_{i:06d}.bin" for i in range(count)]
        todo = [path for path in paths if not self.verified(path)]
        if todo and self.remote(todo[-1]) is None:  # better known before the first of many gigabytes
            have = next(i for i, path in enumerate(paths) if path in todo and self.remote(path) is None)
            raise BadInput(f"{self.repository.name}: holds {have} training shards of {self.folder.name}, "
                           f"--train-shards {count} are too many")
        for number, path in enumerate(todo, 1):
            os.replace(self.stage(path), path)
            say("train", shard=path.name, tokens=self.rows[path.name]["tokens"], ready=count - len(todo) + number)

    def finish(self):
        """The manifest of everything in the folder that was verified."""
        names = [path.name for _, _, path in list_all_shards(self.folder)]
        rows = [self.rows[name] for name in names if name in self.rows]
        train = [row for row in rows if "_train_" in row["name"]]
        splits = self.manifest["splits"]
        splits["train"] = {key: sum(row[key] for row in train) for key in ("documents", "tokens")}
        write_json(self.folder / MANIFEST, {**self.manifest, "tool": TOOL, "source": self.repository.name,
                                            "vocab_size": self.vocab_size, "shards": rows})
        say("done", out=self.folder, tokenizer=self.model, train_shards=len(train),
            val_tokens=splits["val"]["tokens"], val_bytes=splits["val"]["bytes"],
            train_tokens=splits["train"]["tokens"])


def size_time(path):
    """What shows at a glance that a file is still the same one."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


EXAMPLES = """examples:
  python data/fineweb.py --variant sp1024 --train-shards 80
      the contest's data: 50,000 validation documents, 80 shards of 100,000,000 training tokens (16 GB)
  python data/fineweb.py --variant sp8192 --train-shards 10 --check
      proves everything afterwards, as data/prepare.py --check does
  python data/fineweb.py --variant sp1024 --train-shards 1 --repo file:///mnt/mirror
      from a folder with datasets/fineweb10B_sp1024/ and tokenizers/
  python data/fineweb.py --variant sp8192_lossless_caps_caseops_v1_reserved --train-shards 80
      the CaseOps text of the contest (#1729): fineweb_val_bytes_*.bin holds the bytes of every validation token

Layout: OUT/datasets/fineweb10B_<variant>/fineweb_{val,train}_*.bin and OUT/tokenizers/fineweb_<V>_bpe.model, where
what follows sp<V> in the name of the variant stands before .model too.
An interrupted download continues with the same command.
exit codes: 0 complete; 1 --check found a fault, or stopped; 2 something given or published cannot be used"""


def parser():
    p = Parser(prog="fineweb.py", description=__doc__.splitlines()[0], epilog=EXAMPLES,
               formatter_class=RawDescriptionHelpFormatter)
    for name, default, kind, metavar, text in (
            ("variant", "sp1024", str, "SP", f"{', '.join(PUBLISHED)}; another with --repo (default: sp1024)"),
            ("train-shards", 80, whole(0), "N", "the first N training shards (default: 80)"),
            ("out", os.path.relpath(ROOT / "data"), Path, "DIR", "will hold datasets/ and tokenizers/ (default: data)"),
            ("repo", None, str, "REPO", "another hub repository (OWNER/NAME), a folder, or file:///FOLDER"),
            ("workers", None, whole(1), "N", "processes of --check (default: all cores)")):
        p.add_argument(f"--{name}", default=default, type=kind, metavar=metavar, help=text)
    p.add_argument("--check", action="store_true", help="prove all of it at the end: decode, count, compare")
    return p


def run(args, known):
    if not VARIANT.fullmatch(args.variant):
        raise BadInput(f"--variant {args.variant}: it looks like sp1024")
    check_folder("--out", args.out)
    job = Download(open_repository(args.repo, args.variant), args.variant, args.out, known)
    folders = (job.folder, job.model.parent)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(job.folder):
            job.validation()
            job.training(args.train_shards)
            job.finish()
    finally:
        for folder in folders:
            for part in folder.glob(".*.part"):
                part.unlink()
            with contextlib.suppress(OSError):  # nothing came: no empty folder that looks like a data set
                folder.rmdir()
    if args.check:
        with contextlib.closing(Workers(args.workers or os.cpu_count())) as workers:
            return 0 if check(job.folder, workers, known=known) else 1
    return 0


def main(argv=None, known=FINEWEB):
    hold_standard_streams()
    try:
        return run(parser().parse_args(argv), known)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, OSError, KeyboardInterrupt) as error:
        print(f"stopped: {str(error) or 'interrupted'}; the same command continues", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    sys.exit(main())
