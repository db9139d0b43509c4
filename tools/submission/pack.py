"""`submit.py pack`: a script minified, compressed and self-extracting."""

import ast
import base64
import hashlib
import importlib
import lzma
from pathlib import Path
from unittest import mock

from common import ROOT, BadInput, Parser, load_trainer, need, say, trainer_errors, write
from submission.script import definitions

HELP_ENDS = "\nThe rooms"  # of a docstring: --help shows what comes before
WORTH_AN_IMPORT = 2_000  # bytes
LIMIT = 16_000_000

# What the packed file does before the script begins. What runs comes from memory, and so does the source that inspect,
# Triton and tracebacks read, until something clears linecache, as the compiler may; then they find the file in the
# temporary folder. Every process writes that file, so what was there is never trusted; it is complete or absent; in a
# folder that only its user can write, else in a new one; and not needed to run, should the disk be full.
# __file__ remains the packed file, so what counts the code counts that; tracebacks and the log show the unpacked
# source.
WRAPPER = """
import MODULE, hashlib, linecache, os, tempfile
packed = open(__file__, "rb").read().split(b"\\n#")[1]
s = MODULE.decompress(DECODED)
p = name = hashlib.sha256(s).hexdigest()[:16] + ".py"
try:
    folder = f"{tempfile.gettempdir()}/train_gpt-{os.getuid()}"
    os.makedirs(folder, 0o700, exist_ok=True)
    found = os.lstat(folder)
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
        folder = tempfile.mkdtemp()
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
        part.write(s)
    os.replace(part.name, f"{folder}/{name}")
    p = f"{folder}/{name}"
except OSError:
    pass
linecache.cache[p] = len(s), None, [line + "\\n" for line in s.decode().split("\\n")], p
"""
RUN = "exec(compile(s,p,'exec'))"  # apart, since where it stands the minifier renames nothing
FIRST_LINE = {True: "#", False: "#coding:L1 "}  # by --text; Latin-1 gives every byte a meaning
MAKER = "made by tools/submit.py pack"
FORBIDDEN = {ord("\0"), ord("\n"), ord("\r")}  # bytes that a comment cannot hold


# ---- minify ---------------------------------------------------------------------------------------------------------


def minified(source, path):
    """The same program without comments, docstrings and long local names.

    Kept: annotations, which dataclass, NamedTuple, Triton and custom operators read; the names of globals, functions
    and classes, which messages, tracebacks and importers use; and every parameter by its name: python-minifier would
    copy it into a shorter one, which holds tensors for longer than the script means to, and which Triton takes for no
    constant.
    """
    python_minifier = need("minifying", "python_minifier")
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise BadInput(f"{path}:{line}: not Python ({error.args[0]})") from None
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} - {"self", "cls"}
    # A Python >= 3.12 would write f-strings that 3.10 and 3.11 cannot read.
    f_string = importlib.import_module("python_minifier.f_string").OuterFString
    begin = f_string.__init__
    with mock.patch.object(f_string, "__init__", lambda self, node, pep701: begin(self, node, pep701=False)):
        small = python_minifier.minify(
            source, remove_literal_statements=True, remove_annotations=False, hoist_literals=False,
            preserve_locals=sorted(parameters | definitions(source)))
    docstring = ast.get_docstring(tree, clean=False)
    if docstring:  # of the module: --help prints its beginning
        small = f"{docstring.partition(HELP_ENDS)[0]!r}\n{small}"
    return small.encode()


# ---- pack -----------------------------------------------------------------------------------------------------------


def compress_lzma(data):
    """The smallest .xz stream of what the filter's parameters give; it ends in a checksum."""
    options = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "nice_len": 273, "lp": 0, "pb": 0}
    streams = [lzma.compress(data, check=lzma.CHECK_CRC32, filters=[options | {"lc": lc}]) for lc in range(5)]
    return min(streams, key=len)


def compress_brotli(data):
    brotli = need("packing", "brotli", "-r requirements.txt")
    streams = [brotli.compress(data, mode=mode, lgwin=24) for mode in (brotli.MODE_GENERIC, brotli.MODE_TEXT)]
    return min(streams, key=len)


COMPRESSORS = {"lzma": compress_lzma, "brotli": compress_brotli}


def as_comment(data):
    """(data as bytes that a comment may hold, the expression that undoes it).

    A comment holds any byte except NUL and the ends of a line. Each block of a fixed length is its key, then its bytes
    exclusive-or the key, which makes none of the three; the length is the greatest for which every block has a key.
    """
    for size in range(600, 1, -1):  # up to 85 there is always a key
        blocks = [data[begin : begin + size - 1] for begin in range(0, len(data), size - 1)]
        keys = [find_key(block) for block in blocks]
        if None not in keys:
            break
    masked = b"".join(bytes([key, *(byte ^ key for byte in block)]) for key, block in zip(keys, blocks, strict=True))
    return masked, f"bytes(byte ^ packed[i // {size} * {size}] for i, byte in enumerate(packed) if i % {size})"


def find_key(block):
    """The smallest byte that a comment may hold and whose exclusive-or with the block is such bytes, too; or None."""
    present = set(block)
    wrong = FORBIDDEN | {byte ^ forbidden for byte in present for forbidden in FORBIDDEN}
    return min(set(range(256)) - wrong, default=None)


def packed(source, module, text):
    """The self-extracting file: wrapper, then the compressed source as a comment on the last line."""
    payload = COMPRESSORS[module](source)
    wrapper = WRAPPER.replace("MODULE", module)
    if text:
        data = base64.b85encode(payload)
        decoded = "base64.b85decode(packed)"
        wrapper = wrapper.replace("import ", "import base64, ", 1)
    else:
        data, decoded = as_comment(payload)
    wrapper = wrapper.replace("DECODED", decoded)
    minify = need("packing", "python_minifier").minify
    wrapper = minify(wrapper, rename_globals=True, preserve_globals=["s", "p"], hoist_literals=False)
    return f"{FIRST_LINE[text]}{MAKER}\n{wrapper}\n{RUN}\n#".encode() + data


def arguments(argv):
    parser = Parser(prog="submit.py pack", description="Make a script small and self-extracting.")
    parser.add_argument("--script", metavar="FILE", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument("--settings", metavar="RECORD|FILE",
                        help="a record's folder or a settings file: what the packed script runs by itself; its "
                             "readable source is written beside it, as train_gpt_human.py")
    parser.add_argument("--specialise", action="store_true", help="cut the script down to these settings first")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: logs/packed/ and the name of the script")
    parser.add_argument("--compressor", choices=["auto", *COMPRESSORS], default="auto",
                        help="auto: lzma, which Python has, unless brotli, which the packed file then has to import, "
                             "saves over 2,000 bytes")
    parser.add_argument("--text", action="store_true",
                        help="ASCII (base85) in place of bytes in a Latin-1 comment: a quarter larger, for what "
                             "accepts only text")
    return parser.parse_args(argv)


def run(args):
    out = args.out or ROOT / "logs/packed" / args.script.name
    source = read(args.script)
    if out.suffix != ".py":
        raise BadInput(f"--out {out}: the name must end in .py")
    if out.exists() and out.samefile(args.script):
        raise BadInput(f"--out {out} is the script itself")
    if args.specialise and not args.settings:
        raise BadInput("--specialise needs the --settings to which it cuts the script down")
    if args.settings:
        source = with_settings(source, args.settings, args.specialise)
    small = minified(source, args.script)
    say("minified", script=args.script, raw_bytes=len(source), minified_bytes=len(small),
        sha256=hashlib.sha256(small).hexdigest()[:16])
    files = {}
    for name in COMPRESSORS:
        files[name] = packed(small, name, args.text)
        say("packed", compressor=name, encoding="base85" if args.text else "bytes", packed_bytes=len(files[name]))
    chosen = args.compressor
    if chosen == "auto":
        saved = len(files["lzma"]) - len(files["brotli"])
        chosen = "brotli" if saved > WORTH_AN_IMPORT else "lzma"
    write(out, files[chosen])
    if args.settings:  # what a reviewer reads; the trainer itself can be read where it is
        write(out.with_name(f"{out.stem}_human.py"), source)
    say("written", file=out, compressor=chosen, bytes=len(files[chosen]), saved_bytes=len(source) - len(files[chosen]),
        of_limit=f"{len(files[chosen]) / LIMIT:.4%}", sha256=hashlib.sha256(files[chosen]).hexdigest())
    return 0


def settings_name(path):
    """The name of a record's folder, or of a settings file."""
    return Path(path.removesuffix("settings.env")).name.removesuffix(".env")


def with_settings(source, path, specialise):
    """The trainer's source that runs these settings by itself: they are its preset, or it is cut down to them."""
    from submission.specialise import preset_line, specialised

    with trainer_errors():
        s = load_trainer().Settings.parse([f"@{path}"])
    text = source.decode()
    try:
        line = preset_line(text)
    except StopIteration:
        raise BadInput("--settings: the script has no PRESET; it is not this repository's trainer") from None
    if specialise:
        return specialised(text, s, settings_name(path)).encode()
    return text.replace(line, f"PRESET = {s.text()!r}\n", 1).encode()


def read(path):
    try:
        source = path.read_bytes()
        first = source.decode().partition("\n")[0]
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: cannot be read (not UTF-8 text)") from None
    if first.endswith(MAKER):
        raise BadInput(f"{path}: packed already; give the readable script")
    return source
