"""`submit.py specialise`: the trainer cut down to one record.

The settings of the record become constants, branches that they decide are folded, and what nothing reaches any more is
gone: classes, functions, settings, imports, tables. What stays keeps its comments and names. The losses, the artifact
and the score are those of the whole file with the same settings, to the bit.

Most of it is done by fold.py, which knows nothing of the trainer. This module says what is known of the trainer: which
settings stay open, of which values the others are, and what takes the place of the few functions that look at settings
by their names.
"""

import ast
import contextlib
import re
import shlex
import textwrap
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

from common import ROOT, BadInput, Parser, load_trainer, say, trainer_errors, write
from submission.edits import Edits, listing, tidy
from submission.fold import folded
from submission.known import Code, Impossible, Unknown, Values, is_docstring, method_of
from submission.pack import COMPRESSORS, minified, packed, read, settings_name
from submission.script import definitions

# What a run of a record may still choose: where it reads and writes, its seed, the machine, how long and how much, and
# speed. The record's value is their default.
OPEN = set("""
    run_id out_dir seed phases artifact train_log_every val_loss_every
    device dtype compile attention kernels
    data_path tokenizer_path val_tokens iterations max_wallclock_seconds gptq_reserve_seconds eval_batch_seqs
""".split())

# A record is one run, from its beginning to its end.
ONE_RUN = {"resume": "", "checkpoint_every": -1, "strict_env": False}

# So these are never called.
OF_CHECKPOINTS = {(owner, method) for owner, methods in {
    "Training": ("state", "load", "save"), "MuonAdam": ("named", "state_dict", "load_state_dict"),
    "Complement": ("state_dict", "load_state_dict"), "LateQAT": ("state_dict", "load_state_dict"),
    "Contamination": ("restore",)}.items() for method in methods}

# Functions of which a record's script only wants the result, and calls that it does not need: one run uses its folder,
# and its own artifacts have one size (what this script runs is trusted anyway).
WITHOUT_EFFECT = {
    "roles", "training_data", "read_sidecar", "has_case_operators", "VisitAdapters",
    "resources.callback(FolderLock(folder, rt).release)", "need_loadable(path, tensors)",
    'need_loadable("the artifact of this model", largest_entries(model, s))'}

# The functions that make other settings of a run's own, with replace(): `worlds` knows what each gives.
REPLACING = {"save_artifact", "contiguous_reader", "selftest_settings", "without_model_settings", "with_model_settings"}


# ---- what is known --------------------------------------------------------------------------------------------------


def worlds(trainer, s):
    """Every Settings that a run of the record may meet: its own, those of reports, of the self-test, of both."""
    found = []
    for tested in (s, trainer.selftest_settings(s)):
        plain = replace(tested, eval_stride=0, eval_docs=False, eval_context="window", ttt="off")
        for one in (tested, plain):
            found.append(one)
            if one.compressor == "auto":
                found.append(replace(one, compressor="rans"))
    return found


def guarded(trainer, s, open_names):
    """The settings, of which the open ones are Unknown."""
    class Guarded(trainer.Settings):
        def __getattribute__(self, name):
            if name in open_names:
                raise Unknown
            return super().__getattribute__(name)

    return Guarded(**{f.name: getattr(s, f.name) for f in fields(s)})


def has_case(s):
    """Is the record's text one with case operators (CaseOps), by the name of its folder or what is in it?"""
    return "caseops" in s.data_path or any(Path(s.data_path).glob("fineweb_val_bytes_*.bin"))


KnownVisit = namedtuple("KnownVisit", "form split push pop")  # of the trainer's Visit; not which block it is of

# Objects of a facet of the world, by their text alone or in a class; the settings are x.s, too.
OBJECTS = {"s": "settings", "settings": "settings", "Settings: self": "settings", "visit": "visit", "store": "store",
           "Store: self": "store", "self.stores[name]": "store", "f": "field"}


class TrainerValues(Values):
    """What the record decides.

    `facts` are {expression: its value, or a function of the world}. An expression is written as in the text, or as
    `CLASS: text` or `FUNCTION: text` where it has this value only there, or `.name` for this attribute of any object.
    """

    module_calls = {"Attention": "self.attn", "MLP": "self.mlp", "Block": "block"}
    plain_records = frozenset(("Context", "TrainingGraph", "ValStream"))
    objects = {"model": "GPT"}
    settings = frozenset(("Settings",))

    def __init__(self, trainer, s, open_names):
        self.trainer = trainer
        visits = {KnownVisit(visit.form, visit.split, visit.push, None if visit.pop is None else 0)
                  for looping in {False, s.loops} for visit in trainer.layer_plan(s, looping)}
        with trainer.torch.device("meta"):
            model = trainer.GPT(s, init=False)
            stores = set(trainer.storage(model, s).values())
            update_rules = set(trainer.roles(trainer.Objective(model, s)).values())
        if s.awq_lite_group_top_k:
            stores |= {store._replace(codec="mixed") for store in stores if store.codec == "int"}
        compressors = {s.compressor}
        if s.compressor == "rans":
            compressors.add("lzma")
        elif s.compressor == "auto":
            compressors = {"rans", *trainer.COMPRESSORS}
        codecs = {store.codec for store in stores}
        if "grid" in codecs:
            codecs.add("wide")
        open_fields = [f for f in fields(s) if f.name in open_names]
        self.facets = {
            "compressor": sorted(compressors),
            "settings": [guarded(trainer, one, open_names) for one in worlds(trainer, s)],
            "visit": sorted(visits, key=repr),
            "store": sorted(stores, key=repr),
            "field": open_fields,
        }
        self.table_keys = {
            "NEWTON_SCHULZ": {s.newton_schulz}, "OPTIMIZERS": {s.matrix_optimizer, "adamw"}, "CODECS": codecs,
            "COMPRESSORS": compressors | {"zlib"},  # which packs the header
            "PACKAGES": compressors,
            "ALSO_CALLED": {"0"},
            "update_rules": update_rules,
        }
        self.without_effect = {*WITHOUT_EFFECT}
        self.never = OF_CHECKPOINTS | {("Settings", "rule")}
        if s.fit != "allocate":
            self.never.add(("Quantiser", "rate"))
        if not s.late_qat_threshold:
            self.never |= {("Quantiser", "steps"), ("Curvature", "to")}
            self.without_effect.add('self.register_module("fake_quant", None)')
        averages = {"none": (), "best": ("ema", "swa", "lawa")}.get(s.average, (s.average,))
        self.facts = {
            "compressor": lambda world: world["compressor"], "packed.compressor": lambda world: world["compressor"],
            "LISTS": trainer.LISTS, "LISTS.get(f.type)": lambda world: trainer.LISTS.get(world["field"].type),
            ".kinds": averages,
            "was_done": False,  # all steps, in an earlier run
            "run.s.idle()": {},  # a record's settings all have an effect
        }
        if not any(isinstance(f.default, (bool, tuple)) for f in open_fields):
            self.facts |= {"format_value: isinstance(value, bool)": False,
                           "format_value: isinstance(value, tuple)": False}
        if len(averages) == 1:
            self.facts["Average: kind"] = averages[0]
        if not s.mtp_num_heads:
            self.facts["self.mtp"] = ()
        if not trainer.wrappers(s):
            self.facts |= {"wrappers()": (), "isinstance(predictor, WrappingPredictor)": False}
        if not s.lqer_rank:
            self.facts |= {"entry.rank": 0, "Encoded: self.rank": 0}
        if not compressors & {*trainer.PACKAGES}:
            self.facts["PACKAGES.get(s.compressor, ())"] = ()
        if not has_case(s):  # but where the bytes are loaded, another tokenizer is still refused
            self.facts |= {".sidecar": False, "load_validation: sidecar": None,
                           "prove_bytes: has_case_operators(sp)": False}
        if s.doc_mask == "none":
            self.facts["_to_device: documents"] = None
        # What is None where a technique is off.
        writes_text = s.needs_curvature and s.gptq_calibration == "generated"
        self.absent = set()
        for is_on, names in (
                (s.ttt in ("lora", "lora_docs"), ("adapters", "adapter_weights")),
                (s.eval_context == "cache" or writes_text, ("past",)),
                (s.late_qat_threshold > 0, ("fake_quant",)),
                (s.doc_mask != "none", ("docs",)),
                (s.complement_alpha > 0, ("token_weights",)),
                (s.needs_curvature, ("curvature",))):
            if not is_on:
                self.absent.update(names)

    def value(self, node, world, code):
        text = code.text(node)
        owner, name = (code.text(node.value), node.attr) if isinstance(node, ast.Attribute) else (None, text)
        in_class = f"{code.class_of(node)}: "
        in_function = f"{code.function_of(node)}: "
        for key in (in_function + text, in_class + text, text, f".{name}"):
            if key in self.facts:
                fact = self.facts[key]
                return fact(world) if callable(fact) else fact
        if name in self.absent or owner in self.absent:
            return None
        is_settings = owner is not None and owner.endswith(".s")
        facet = "settings" if is_settings else OBJECTS.get(owner) or OBJECTS.get(f"{in_class}{owner}")
        if facet is None:
            raise Unknown
        if facet == "store" and name != "codec" and world["store"].codec == "float16":
            raise Impossible
        found = getattr(world[facet], name, Unknown)
        if found is Unknown or facet == "settings" and callable(found):
            raise Unknown
        return found

    def rewritten(self, node, code):
        """optional(None, x, ...) and add_adapter(x, None, ...) are x; the bound of a setting is a number."""
        match node:
            case (ast.Call(func=ast.Name("optional"), args=[module, otherwise, *_])
                  | ast.Call(func=ast.Name("add_adapter"), args=[otherwise, module, *_])):
                with contextlib.suppress(Unknown):
                    if code.known(module) is None:
                        return code.text(otherwise)
            case ast.Call(func=ast.Name("replace")):
                return without_unread(node, code)
            case ast.Subscript(value=ast.Attribute(attr="metadata"), slice=ast.Constant(key)):
                owner = re.fullmatch(r'Settings\.__dataclass_fields__\["(\w+)"\]\.metadata', code.text(node.value))
                return repr(self.trainer.Settings.__dataclass_fields__[owner[1]].metadata[key]) if owner else None
        return None

    def is_used(self, owner, name):
        """By a library, through a class that ours is made from."""
        bases = getattr(self.trainer, owner, object).__mro__
        return any(hasattr(base, name) for base in bases
                   if base.__module__ != self.trainer.__name__ and base is not object)


def without_unread(node, code):
    """replace(settings, ...) without constants and what nothing reads; None if there is none of it."""
    living = {member.target.id for member in code.definitions["Settings"].body if isinstance(member, ast.AnnAssign)}
    living &= code.read_attributes
    kept = [keyword for keyword in node.keywords if keyword.arg is None or keyword.arg in living]
    if len(kept) == len(node.keywords):
        return None
    if not kept:
        return code.text(node.args[0])
    column = code.begin(node) - code.begins[node.lineno - 1]
    return listing("replace(", [code.text(part) for part in (node.args[0], *kept)], ")", column)


# ---- what takes the place of functions that look at settings by name ------------------------------------------------

REPLACED = {
    "opt": '''
def opt(group, default, doc, lo=None, hi=None, code=""):
    """A field of Settings: its default, its sentence in --help, its bounds. `code` names the
    function or class that a reader of the setting wants to see.
    """
    metadata = dict(group=group, doc=doc, lo=lo, hi=hi, code=code)
    return field(default=default, metadata=metadata)
''',
    "Settings.text": '''
    def text(self):
        """The record and the settings that were changed, as one line of KEY=VALUE."""
        pairs = dict(RECORD)
        for f in open_fields():
            name = f.name.upper()
            value = getattr(self, f.name)
            if name in RECORD or value != f.default:
                pairs[name] = format_value(value)
        return shlex.join(f"{name}={value}" for name, value in pairs.items())
''',
    "Settings.parse": '''
    @classmethod
    def parse(cls, args=(), env=None):
        """Settings from a list of KEY=VALUE, before a mapping of environment variables. A constant
        of this script keeps its value. Raises BadInput that lists every complaint, one a line.
        """
        known = {f.name.upper(): f for f in open_fields()}
        given = {name: text for name, text in (env or {}).items() if name in (*known, *RECORD)}
        complaints = [f"environment: {complaint}" for complaint in misspelt(env or {}, known)]
        for arg in args:
            name, equals, text = arg.partition("=")
            if not equals:
                complaints.append(f"argument: {arg!r} is not KEY=VALUE")
            given[name] = text
        values = {}
        for name, text in given.items():
            try:
                if name in known:
                    values[known[name].name] = parse_value(known[name], text)
                elif name not in RECORD:
                    raise ValueError("no setting of this script; see --help")
                elif text != RECORD[name]:
                    raise ValueError(f"{name} is a constant of this script: {RECORD[name]}")
            except ValueError as error:
                complaints.append(f"{name}={text}: {error}")
        settings = cls(**values)
        complaints += _conflicts(settings)
        if complaints:
            raise BadInput("\\n".join(complaints))
        return settings
''',
    "_why_not_env": '''
def misspelt(env, known):
    """What is to be said of environment variables that are nearly settings."""
    for name in env:
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near and name not in known:
            yield (f"{name} is not a setting; did you mean {near[0]}? (unset it if it is not meant "
                   "for this script)")
''',
    "_checked_header": '''
def _checked_header(text):
    """The header from JSON, its tables as TensorEntry and StreamEntry."""
    header = json.loads(text)
    tensors = [TensorEntry(name, tuple(shape), *how) for name, shape, *how in header["tensors"]]
    streams = [StreamEntry(*row) for row in header["streams"]]
    optional = {"temperature": 0, "reasons": []}
    return optional | header | {"tensors": tensors, "streams": streams}
''',
    "model_settings": '''
def model_settings(s):
    """{name: value as text} of the settings that define the model."""
    return {"SEED": str(s.seed), **MODEL}
''',
    "model_fields": '''
def open_fields():
    """The fields of Settings that a person may choose; the others are of the record."""
    return [f for f in fields(Settings) if f.metadata]
''',
    "without_model_settings": '''
def without_model_settings(s):
    """The settings with the default SEED, for an artifact to fill in."""
    return replace(s, seed=Settings.seed)
''',
    "with_model_settings": '''
def with_model_settings(given, texts, path):
    """`given` with the seed that an artifact states; the model must be this script's."""
    expected = model_settings(given)
    wrong = [name for name in expected if name != "SEED" and texts.get(name) != expected[name]]
    seed = texts.get("SEED", "")
    if wrong or not seed.isdecimal():
        raise BadInput(f"{path} is not of this record: {', '.join(wrong or ['SEED'])}")
    if given.seed not in (Settings.seed, int(seed)):
        raise BadInput(f"SEED={given.seed} contradicts {path}, which was made with {seed}")
    return replace(given, seed=int(seed))
''',
}

# (old, new), each of which the trainer has exactly once.
EDITS = (
    ("""            if about["on"]:
                line += f" with {describe_rule(about['on'])}"
""", ""),
    ("""        return {f.name.upper(): format_value(getattr(self, f.name)) for f in chosen}
""", """        return RECORD | {f.name.upper(): format_value(getattr(self, f.name)) for f in chosen}
"""),
    ("""        preset = cls.parse()
""", ""),
    ("""            value = format_value(getattr(preset, f.name))
            setting = f"{f.name.upper()}={value or '(empty)'}"
""", """            setting = f"{f.name.upper()}={format_value(f.default) or '(empty)'}"
"""),
    ("Settings: default < preset of this copy < @file < environment < KEY=VALUE.",
     "Settings: default < environment < KEY=VALUE."),
    ("""    for name in doubtful_names(os.environ):
        log("warning", environment=name,
            note="looks like a setting but is none; STRICT_ENV=1 makes that an error")
    for name in COMMON:
        if name in os.environ and run.s.data_path == Settings.data_path:  # it may be meant
            log("warning", environment=name, note=f"is not read: {other_names()[name]}")
""", ""),
    ("    python train_gpt.py @records/small.env MATRIX_LR=0.03 SEED=7    with other settings\n",
     "    python train_gpt.py DATA_PATH=... SEED=7                        with other settings\n"),
    ("""choose another RUN_ID or OUT_DIR, or "
                       "RESUME=auto to continue it")
""", """choose another RUN_ID or "
                       "OUT_DIR")
"""),
    ('''Rank 0 takes the folder, until the ExitStack `resources` is closed; if it cannot,
    all ranks raise its BadInput.
    """''', '''Rank 0 makes the folder; if it cannot, all ranks raise its BadInput."""'''),
)

# Where the record's text has no case operators, nothing reads a sidecar.
WITHOUT_CASE = ("""but there is no fineweb_val_bytes_*.bin; make it with "
                       "data/prepare.py --caseops, or use data/fineweb.py")
""", """and this record has none; give its DATA_PATH")
""")


def edited(source, old, new):
    if source.count(old) != 1:
        raise RuntimeError(f"train_gpt.py has changed: specialise looks for this once, and it is there "
                           f"{source.count(old)} times: {old}")
    return source.replace(old, new)


# ---- the settings ---------------------------------------------------------------------------------------------------


def with_record(source, trainer, s, name, open_names):
    """The source in which the settings of the record are constants."""
    for old, new in EDITS if has_case(s) else (*EDITS, WITHOUT_CASE):
        source = edited(source, old, new)
    source = edited(source, preset_line(source), record_tables(trainer, s, name, open_names))
    for owner in ("cls", "self", "Settings"):
        source = source.replace(f"in fields({owner})", "in open_fields()")
    edits = Edits(Code(source, Values()))
    replace_functions(edits)
    fix_settings(edits, trainer, s, open_names)
    decide_conflicts(edits, trainer, s, open_names)
    return edits.applied()


def preset_line(source):
    return next(line for line in source.splitlines(keepends=True) if line.startswith("PRESET = "))


def record_tables(trainer, s, name, open_names):
    """MODEL and RECORD as text: all constants, and what the record chooses of the settings that stay open."""
    model = [f for f in trainer.model_fields() if f.name != "seed"]
    others = []
    for f in fields(s):
        is_fixed = f.name not in open_names and f.metadata["group"] != "Run" and s.holds(f.metadata["on"])
        is_changed = f.name in open_names and getattr(s, f.name) != f.default
        if f not in model and (is_fixed or is_changed):
            others.append(f)

    def pairs(chosen):
        text = shlex.join(f"{f.name.upper()}={trainer.format_value(getattr(s, f.name))}" for f in chosen)
        return textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    ", break_long_words=False,
                             break_on_hyphens=False)

    return f'''
# This file is {name}, to which tools/submit.py specialise has cut down the trainer.
# Its settings are constants, here as text and in Settings as values; a few can still be chosen.


def read_pairs(text):
    """{{name: value}} of KEY=VALUE ..."""
    return dict(pair.split("=", 1) for pair in shlex.split(text))


MODEL = read_pairs("""
{pairs(model)}
""")
RECORD = MODEL | read_pairs("""
{pairs(others)}
""")
'''.lstrip("\n")


def replace_functions(edits):
    code = edits.code
    for qualified, text in REPLACED.items():
        owner, _, method = qualified.partition(".")
        node = method_of(code.classes[owner], method) if method else code.definitions[owner]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        edits.replace(code.begins[first - 1], code.begins[node.end_lineno], text.lstrip("\n"))


def fix_settings(edits, trainer, s, open_names):
    """Give the open fields of Settings the record's values as defaults; make all others constants of the class, or
    fields of which no person chooses the value, where reports and the self-test need others.
    """
    code = edits.code
    all_worlds = worlds(trainer, s)
    varied = {f.name for f in fields(s) if any(getattr(one, f.name) != getattr(s, f.name) for one in all_worlds)}
    for node in code.definitions["Settings"].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name, value = node.target.id, getattr(s, node.target.id)
        if name in open_names:
            call = node.value
            kept = [keyword for keyword in call.keywords if keyword.arg != "on"]
            pieces = textwrap.wrap(ast.literal_eval(call.args[1]), 86, drop_whitespace=False)
            doc = "\n        ".join(f'"{piece}"' for piece in pieces)
            texts = [literal(value), doc, *(code.text(part) for part in (*call.args[2:], *kept))]
            head = f"{name}: {code.text(node.annotation)} = {code.text(call.func)}("
            text = listing(head, texts, ")", 4, indent=8)
        else:
            doc = ast.literal_eval(node.value.args[1])
            annotation = f": {code.text(node.annotation)}" if name in varied else ""
            text = f"{name}{annotation} = {literal(value)}  # {doc}"
            if len(text) > 96:
                comment = textwrap.fill(doc, 96, initial_indent="# ", subsequent_indent="    # ")
                text = f"{comment}\n    {name}{annotation} = {literal(value)}"
        edits.replace(code.begin(node), code.end(node), text)


def literal(value):
    """The value as Python, in the quotes of the trainer."""
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')


def decide_conflicts(edits, trainer, s, open_names):
    """Take out the complaints about impossible combinations that the record decides: each statement of a function
    `_..._conflicts` is run with its settings; one that asks for no open setting and does not complain goes.
    """
    def complain(text):
        raise BadInput(f"the record cannot be: {text}")

    for function in edits.code.definitions.values():
        if function.name == "_conflicts" or not function.name.endswith("_conflicts"):
            continue
        names_there = {**vars(trainer), "s": guarded(trainer, s, open_names), "complain": complain, "given": set()}
        for statement in function.body:
            if is_docstring(statement):
                continue
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return):
                if eval(compile(ast.Expression(statement.test), function.name, "eval"), names_there):
                    break
                continue
            try:
                exec(compile(ast.Module([statement], []), function.name, "exec"), names_there)
            except Unknown:
                continue
            if not isinstance(statement, ast.Assign):
                edits.remove(statement)


# ---- the rest of the text -------------------------------------------------------------------------------------------


NOTHING = r"(?:(?:#(?! ----).*)?\n)*"  # blank lines and comments
EMPTY_HEADINGS = (  # of sections, and then of rooms
    re.compile(rf"^# ---- .* -+\n{NOTHING}(?=# ----|\Z)", re.M),
    re.compile(rf"^# -{{90,}}\n# .*\n(?:#.*\n)*?# -{{90,}}\n{NOTHING}(?=# -{{90,}}\n|\Z)", re.M),
    # Lines of comment in a class, between blank ones, after which the class ends or another such line comes.
    re.compile(r"^    # [^\n]*\n\n+(?=\S|    # [^\n]*\n\n)", re.M))


def without_empty_headings(source):
    """Without headings under which nothing stands but comments."""
    for heading in EMPTY_HEADINGS:
        source = heading.sub("", source)
    return tidy(source)


def fitting_docstring(source):
    """The docstring of the file with the rooms and techniques that are left."""
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    rooms = re.findall(r"^# +(\d+) \w", source, re.M)
    defined = definitions(source)
    kept = []
    for line in docstring.splitlines():
        room = re.match(r" {4}(?: (\d)|(\d\d)) \S", line)
        technique = re.match(r" {4}(\S.*?) {2,}[A-Z0-9_]+ +(\w[\w.]*)$", line)
        is_gone = room and room[room.lastindex] not in rooms or technique and technique[2].split(".")[-1] not in defined
        if not is_gone:
            kept.append(line)
    return source.replace(docstring, "\n".join(kept), 1)


def with_living_code_names(source):
    """Settings whose `code` names something that is left."""
    defined = definitions(source)
    return re.sub(r',\s*code="([\w.]+)"', lambda found: found[0] if found[1].split(".")[-1] in defined else "", source)


# ---- the command ----------------------------------------------------------------------------------------------------


def specialised(source, s, name):
    """The source of the trainer cut down to the record with these settings."""
    trainer = load_trainer()
    s = replace(s, **ONE_RUN)
    open_names = {f.name for f in fields(s)
                  if f.name in OPEN and (f.metadata["group"] == "Run" or s.holds(f.metadata["on"]))}
    unknown = {*replacing_functions(source)} - REPLACING
    if unknown:
        raise RuntimeError(f"specialise does not know which settings {', '.join(unknown)} makes")
    source = with_record(source, trainer, s, name, open_names)
    source = folded(source, TrainerValues(trainer, s, open_names))
    source = without_empty_headings(with_living_code_names(source))
    return fitting_docstring(source)


def replacing_functions(source):
    """Names of the functions that call replace() on settings."""
    for function in ast.parse(source).body:
        called = {getattr(node.func, "id", "") for node in ast.walk(function) if isinstance(node, ast.Call)}
        if "replace" in called:
            yield function.name


def arguments(argv):
    parser = Parser(prog="submit.py specialise", description="Cut the trainer down to one record.")
    parser.add_argument("record", metavar="RECORD", help="a record's folder, or a settings file")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="settings that are changed")
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, help="default: logs/specialised/NAME/train_gpt.py")
    return parser.parse_args(argv)


def run(args):
    name = settings_name(args.record)
    with trainer_errors():
        s = load_trainer().Settings.parse([f"@{args.record.removeprefix('@')}", *args.changes])
    path = ROOT / "train_gpt.py"
    source = read(path)
    small = specialised(source.decode(), s, name).encode()
    out = args.out or ROOT / "logs/specialised" / name / "train_gpt.py"
    write(out, small)
    mini = minified(small, path)
    say("whole", lines=source.count(b"\n"), bytes=len(source))
    say("specialised", lines=small.count(b"\n"), bytes=len(small), minified_bytes=len(mini),
        packed_bytes=min(len(packed(mini, module, False)) for module in COMPRESSORS))
    say("written", file=out)
    return 0
