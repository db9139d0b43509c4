"""Take out of a Python file what nothing uses."""

import ast
from collections import defaultdict

from submission.edits import listing
from submission.known import arguments_of, bound, is_docstring, is_pure, is_self, names_in, targets_of


def prune(code, edits):
    """Take out what nothing uses."""
    live = Live(code)
    for statement in code.tree.body:
        prune_statement(code, edits, statement, live)
    for node in code.nodes:
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if (node.name, id(statement)) in live.dead_members:
                    edits.remove(statement)
        if isinstance(node, ast.FunctionDef):
            prune_locals(code, edits, node)


def prune_statement(code, edits, statement, live):
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        if statement.name not in live.names:
            edits.remove(statement)
    elif isinstance(statement, (ast.Import, ast.ImportFrom)):
        prune_import(code, edits, statement, live.names)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        names = [name for target in targets_of(statement) for name in names_in(target)]
        if names and not live.names & set(names):
            edits.remove(statement)


def prune_import(code, edits, statement, used):
    kept = [alias for alias in statement.names if (alias.asname or alias.name).partition(".")[0] in used]
    if not kept:
        edits.remove(statement)
    elif len(kept) < len(statement.names):
        names = ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in kept)
        edits.replace(code.begin(statement), code.end(statement), f"from {statement.module} import {names}")


class Live:
    """The names and attributes that are reached from what the module does when it is run."""

    def __init__(self, code):
        self.code = code
        self.names = set()
        self.attributes = set()
        self.dead_members = set()
        self.definitions = defaultdict(list)
        roots = []
        for statement in code.tree.body:
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                self.definitions[statement.name].append(statement)
                continue
            names = [name for target in targets_of(statement) for name in names_in(target)]
            if isinstance(statement, (ast.Assign, ast.AnnAssign)) and names:
                for name in names:
                    self.definitions[name].append(statement)
            elif not isinstance(statement, (ast.Import, ast.ImportFrom)):
                roots.append(statement)
        self.waiting = roots
        self.classes = []
        self.done = set()
        self._reach()

    def _reach(self):
        while True:
            while self.waiting:
                self._visit(self.waiting.pop())
            for owner in self.classes:
                for member in owner.body:
                    if id(member) not in self.done and self._is_member_used(owner, member):
                        self.waiting.append(member)
            if not self.waiting:
                break
        for owner in self.classes:
            for member in owner.body:
                if id(member) not in self.done and not is_docstring(member) and not isinstance(member, ast.Pass):
                    self.dead_members.add((owner.name, id(member)))

    def _is_member_used(self, owner, member):
        said = self.code.values.is_member_used(owner, member, self.code)
        if said is not None:
            return said
        names = [name for target in targets_of(member) for name in names_in(target)]
        if isinstance(member, (ast.FunctionDef, ast.ClassDef)):
            names = [member.name]
        if not names or isinstance(member, ast.AnnAssign):
            return True
        return any(name in self.attributes or name.startswith("__") or self.code.values.is_used(owner.name, name)
                   for name in names)

    def _visit(self, node):
        if id(node) in self.done:
            return
        self.done.add(id(node))
        if isinstance(node, ast.ClassDef):
            self.classes.append(node)
            parts = [*node.decorator_list, *node.bases, *node.keywords]
        else:
            parts = [node]
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                    if not self.code.is_local(inner):
                        self._name(inner.id)
                elif isinstance(inner, ast.Attribute) and not isinstance(inner.ctx, ast.Store):
                    self.attributes.add(inner.attr)
                elif isinstance(inner, ast.Global):
                    for name in inner.names:
                        self._name(name)
                elif isinstance(inner, ast.Call):
                    self.attributes.update(named_attribute(inner))
                elif isinstance(inner, ast.Assign):  # an attribute that a subclass or a library reads
                    self.attributes.update(target.attr for target in inner.targets
                                           if isinstance(target, ast.Attribute) and not is_self(target.value))

    def _name(self, name):
        if name not in self.names:
            self.names.add(name)
            self.waiting += self.definitions.get(name, ())


def prune_locals(code, edits, function):
    """Locals, inner functions and attributes of self that are assigned and never read."""
    read = set()
    outer = set()  # names of functions around this one
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read.add(node.id)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            outer.update(node.names)
    for node in code.own[function]:
        if isinstance(node, ast.FunctionDef):
            if node.name not in read:
                edits.remove(node)
        elif isinstance(node, ast.Delete):
            if not {getattr(target, "id", None) for target in node.targets} & {None, *read, *outer}:
                edits.remove(node)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            unread = isinstance(target, ast.Name) and target.id not in read | outer
            unread = unread or is_dead_attribute(code, target)
            if unread and is_pure(node.value):
                edits.remove(node)
            elif unread and isinstance(node.value, ast.Call):  # what it does is wanted, what it gives is not
                edits.replace(code.begin(node), code.begin(node.value), "")


def is_dead_attribute(code, target):
    """Is this an attribute of self that nothing in the file reads?"""
    if not (isinstance(target, ast.Attribute) and is_self(target.value)):
        return False
    owner = code.class_of(target)
    return target.attr not in read_attributes(code) and not (owner and code.values.is_used(owner.name, target.attr))


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
        groups[function.name if isinstance(code.scopes[function], ast.ClassDef) else function].append(function)
    for functions in groups.values():
        if functions[0].name in ("__init__", "forward"):
            for function in functions:
                prune_parameters_of(code, edits, [function])
        else:
            prune_parameters_of(code, edits, functions)


def prune_fields(code, edits, record):
    """Take fields that nothing reads out of a class like NamedTuple and out of the calls that make one."""
    members = [member for member in record.body if isinstance(member, ast.AnnAssign)]
    names = [member.target.id for member in members]
    dead = [member for member in members if member.target.id not in read_attributes(code)]
    dead_names = [member.target.id for member in dead]
    calls = [node for node in code.nodes
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == record.name]
    replacements = []
    for call in calls:
        given = dict(zip(names, call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
        if None in given or not all(is_pure(given[name]) for name in dead_names if name in given):
            return
        replacements.append(without_arguments(code, names, call, dead_names))
    if dead and edits.replace_all([one for one in replacements if one]):
        for member in dead:
            edits.remove(member)


def prune_parameters_of(code, edits, functions):
    is_method = isinstance(code.scopes[functions[0]], ast.ClassDef)
    signatures = {tuple(arguments_of(function)) for function in functions}
    if len(signatures) > 1:
        return
    names = arguments_of(functions[0])[is_method:]
    read = {node.id for function in functions for node in ast.walk(function)
            if isinstance(node, ast.Name)}
    dead = [name for name in names if name not in read]
    if not dead or any(function.args.vararg or function.args.kwarg for function in functions):
        return
    replacements = []
    for function in functions:
        replacements.append(without_parameters(code, function, dead))
    for call in code.callers[functions[0]]:
        given = bound(functions[0], call, is_method)
        if given is None or not all(is_pure(given[name]) for name in dead if name in given):
            return
        changed = without_arguments(code, names, call, dead)
        if changed:
            replacements.append(changed)
    edits.replace_all(replacements)


def without_parameters(code, function, dead):
    """(begin, end, text) of the head of a function without some of its parameters."""
    args = function.args
    first_default = len(args.args) - len(args.defaults)
    parts = []
    for place, argument in enumerate(args.args):
        default = args.defaults[place - first_default] if place >= first_default else None
        parts.append((argument, default))
    if args.kwonlyargs:
        parts.append((None, None))
        parts += zip(args.kwonlyargs, args.kw_defaults)
    texts = []
    for argument, default in parts:
        if argument is None:
            texts.append("*")
        elif argument.arg not in dead:
            text = code.text(argument)
            spaced = " = " if argument.annotation else "="
            texts.append(text + (spaced + code.text(default) if default else ""))
    if texts and texts[-1] == "*":
        texts.pop()
    begin = code.begin(function)
    body = code.begins[function.body[0].lineno - 1]
    end = code.source.rindex(":", begin, body) if function.returns is None else code.end(function.returns)
    result = f" -> {code.text(function.returns)}" if function.returns else ""
    return begin, end, listing(f"def {function.name}(", texts, ")" + result, function.col_offset)


def without_arguments(code, names, call, dead):
    """(begin, end, text) of a call of a function with parameters `names` without what it gives for the dead ones; None
    if it gives nothing for them.
    """
    kept = [argument for argument, name in zip(call.args, names) if name not in dead]
    keywords = [keyword for keyword in call.keywords if keyword.arg not in dead]
    if len(kept) == len(call.args) and len(keywords) == len(call.keywords):
        return None
    # What stood behind a dead one keeps its place, since that has gone from the definition, too.
    texts = [code.text(part) for part in (*kept, *keywords)]
    begin = code.begin(call)
    column = begin - code.begins[call.lineno - 1]
    return begin, code.end(call), listing(code.text(call.func) + "(", texts, ")", column)


def read_attributes(code):
    """Names of all attributes that the file reads, or changes from what they were."""
    if code.read is None:
        code.read = set()
        own = set()  # what replace() only makes another value of the same setting of
        for node in code.nodes:
            if isinstance(node, ast.Call) and code.text(node.func) == "replace":
                own.update(inner for keyword in node.keywords for inner in ast.walk(keyword.value)
                           if isinstance(inner, ast.Attribute) and inner.attr == keyword.arg)
        for node in code.nodes:
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
                if node not in own:
                    code.read.add(node.attr)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
                code.read.add(node.target.attr)
            else:
                code.read.update(named_attribute(node))
    return code.read


def named_attribute(node):
    """{the attribute that getattr, hasattr or setattr asks for by a literal}; empty for any other node."""
    by_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if by_name and node.func.id in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant):
        return {node.args[1].value}
    return set()
