"""Take out of a Python file what nothing uses."""

import ast
from collections import defaultdict

from submission.edits import listing
from submission.known import arguments_of, attributes_by_name, is_docstring, is_pure, is_self, names_of


def prune(code, edits):
    """Take out what nothing uses."""
    live = Live(code)
    for statement in code.tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            prune_import(code, edits, statement, live.names)
        elif names_of(statement) and not live.names & {*names_of(statement)}:
            edits.remove(statement)
    for member in live.dead_members():
        edits.remove(member)
    for node in code.nodes:
        if isinstance(node, ast.FunctionDef):
            prune_locals(code, edits, node)


def prune_import(code, edits, statement, used):
    kept = [alias for alias in statement.names if (alias.asname or alias.name).partition(".")[0] in used]
    if not kept:
        edits.remove(statement)
    elif len(kept) < len(statement.names):
        names = ", ".join(map(ast.unparse, kept))
        edits.replace(code.begin(statement), code.end(statement), f"from {statement.module} import {names}")


class Live:
    """The names and attributes that are reached from what the module does when it is run."""

    def __init__(self, code):
        self.code = code
        self.names = set()
        self.attributes = set()
        self.definitions = defaultdict(list)
        self.classes = []
        self.done = set()
        self.waiting = []
        for statement in code.tree.body:
            for name in names_of(statement):
                self.definitions[name].append(statement)
            if not names_of(statement) and not isinstance(statement, (ast.Import, ast.ImportFrom)):
                self.waiting.append(statement)
        while self.waiting:
            self._visit(self.waiting.pop())
            self.waiting = self.waiting or [member for owner, member in self._others() if self._is_used(owner, member)]

    def _others(self):
        """(class, statement of it that is not reached)."""
        for owner in self.classes:
            for member in owner.body:
                if member not in self.done:
                    yield owner, member

    def dead_members(self):
        return [member for _, member in self._others() if not (is_docstring(member) or isinstance(member, ast.Pass))]

    def _is_used(self, owner, member):
        values = self.code.values
        names = names_of(member)
        if (owner.name, *names) in values.never:
            return False
        if not names or isinstance(member, ast.AnnAssign):
            is_constant = owner.name in values.settings and names and not isinstance(member.value, ast.Call)
            return not is_constant or names[0] in self.code.read_attributes
        return any(name in self.attributes or name.startswith("__") or values.is_used(owner.name, name)
                   for name in names)

    def _visit(self, node):
        if node in self.done:
            return
        self.done.add(node)
        parts = [node]
        if isinstance(node, ast.ClassDef):
            self.classes.append(node)
            parts = [*node.decorator_list, *node.bases, *node.keywords]
        for inner in (inner for part in parts for inner in ast.walk(part)):
            match inner:
                case ast.Name(ctx=ast.Load()) if not self.code.is_local(inner):
                    self._reach(inner.id)
                case ast.Global():
                    for name in inner.names:
                        self._reach(name)
                case ast.Attribute(ctx=ast.Load() | ast.Del()):
                    self.attributes.add(inner.attr)
                case ast.Call():
                    self.attributes.update(attributes_by_name(inner))
                case ast.Assign():  # an attribute that a subclass or a library reads
                    self.attributes.update(target.attr for target in inner.targets
                                           if isinstance(target, ast.Attribute) and not is_self(target.value))

    def _reach(self, name):
        if name not in self.names:
            self.names.add(name)
            self.waiting += self.definitions.get(name, ())


def prune_locals(code, edits, function):
    """Locals and attributes of self that are assigned and never read."""
    read = set()  # or of functions around this one
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            read.update(node.names)
    for node in code.own[function]:
        match node:
            case ast.Delete() if not {getattr(target, "id", None) for target in node.targets} & {None, *read}:
                edits.remove(node)
            case ast.Assign(targets=[target]) if is_unread(code, target, read):
                if is_pure(node.value):
                    edits.remove(node)
                elif isinstance(node.value, ast.Call):  # what it does is wanted, what it gives is not
                    edits.replace(code.begin(node), code.begin(node.value), "")


def is_unread(code, target, read):
    """Is this a local, or an attribute of self, that nothing reads?"""
    match target:
        case ast.Name(name):
            return name not in read
        case ast.Attribute(value=ast.Name("self"), attr=name):
            return name not in code.read_attributes and not code.values.is_used(code.class_of(target), name)
    return False


# ---- parameters -----------------------------------------------------------------------------------------------------


def prune_parameters(code, edits):
    """Take parameters that no function of a name reads out of its definitions and all its calls; and fields that
    nothing reads out of plain records.
    """
    for node in code.tree.body:
        if isinstance(node, ast.ClassDef) and node.name in code.values.plain_records:
            prune_fields(code, edits, node)
    groups = defaultdict(list)
    for function in code.callers:
        is_alone = not isinstance(code.scopes[function], ast.ClassDef) or function.name in ("__init__", "forward")
        groups[function if is_alone else function.name].append(function)
    for functions in groups.values():
        prune_parameters_of(code, edits, functions)


def prune_fields(code, edits, record):
    """Take fields that nothing reads out of a class like NamedTuple and out of the calls that make one."""
    members = [member for member in record.body if isinstance(member, ast.AnnAssign)]
    names = [member.target.id for member in members]
    dead = [name for name in names if name not in code.read_attributes]
    calls = [node for node in code.nodes if isinstance(node, ast.Call) and code.text(node.func) == record.name]
    replacements = without_arguments(code, names, calls, dead)
    if dead and replacements is not None and edits.replace_all(replacements):
        for member in members:
            if member.target.id in dead:
                edits.remove(member)


def prune_parameters_of(code, edits, functions):
    """Take parameters that none of these functions reads out of all of them and of their calls."""
    signatures = {tuple(argument.arg for argument in arguments_of(function)) for function in functions}
    names = [argument.arg for argument in code.parameters(functions[0])]
    read = {node.id for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)}
    dead = [name for name in names if name not in read]
    if not dead or len(signatures) > 1 or any(len(one.args.args) < len(arguments_of(one)) for one in functions):
        return
    replacements = without_arguments(code, names, code.callers[functions[0]], dead)
    if replacements is not None:
        edits.replace_all([*(without_parameters(code, function, dead) for function in functions), *replacements])


def without_parameters(code, function, dead):
    """(begin, end, text) of the head of a function without some of its parameters."""
    args = function.args
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
    texts = []
    for argument, default in zip(args.args, defaults):
        if argument.arg not in dead:
            equals = " = " if argument.annotation else "="
            texts.append(code.text(argument) + (equals + code.text(default) if default else ""))
    begin = code.begin(function)
    body = code.begins[function.body[0].lineno - 1]
    end = code.source.rindex(":", begin, body) if function.returns is None else code.end(function.returns)
    result = f" -> {code.text(function.returns)}" if function.returns else ""
    return begin, end, listing(f"def {function.name}(", texts, ")" + result, function.col_offset)


def without_arguments(code, names, calls, dead):
    """[(begin, end, text)] of calls without what they give for dead ones of the parameters `names`; None if it cannot
    be told what one gives, or if that does something.
    """
    found = []
    for call in calls:
        given = [*zip(names, call.args), *((keyword.arg, keyword) for keyword in call.keywords)]
        is_told = not any(isinstance(part, ast.Starred) or name is None for name, part in given)
        if not is_told or not all(is_pure(part) for name, part in given if name in dead):
            return None
        # What stood behind a dead one keeps its place, since that has gone from the definition, too.
        texts = [code.text(part) for name, part in given if name not in dead]
        if len(texts) < len(given):
            begin = code.begin(call)
            column = begin - code.begins[call.lineno - 1]
            found.append((begin, code.end(call), listing(code.text(call.func) + "(", texts, ")", column)))
    return found
