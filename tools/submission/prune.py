"""Take out of a Python file what nothing uses."""

import ast

from submission.edits import listing
from submission.known import arguments_of, attributes_by_name, is_pure, is_self, names_of

IMPORTS = (ast.Import, ast.ImportFrom)


def prune(code, edits):
    """Take out what nothing uses."""
    live = Live(code)
    for _, statement in live.others():
        if isinstance(statement, IMPORTS):
            prune_import(code, edits, statement, live.names)
        else:
            edits.remove(statement)
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
    """The names, attributes and statements that are reached from what the module does when it is run."""

    def __init__(self, code):
        self.code = code
        self.names = set()
        self.attributes = set()
        self.statements = set()  # of the module and of its classes
        while found := [statement for owner, statement in self.others() if self._is_used(owner, statement)]:
            for statement in found:
                self._visit(statement)

    def others(self):
        """(class or None, statement) of what is not reached in the module and in living classes, and of all imports."""
        for statement in self.code.tree.body:
            if statement not in self.statements:
                yield None, statement
            elif isinstance(statement, ast.ClassDef):
                yield from ((statement, member) for member in statement.body if member not in self.statements)

    def _is_used(self, owner, statement):
        values = self.code.values
        names = names_of(statement)
        if not names:
            return not isinstance(statement, IMPORTS)
        if owner is None:
            return not self.names.isdisjoint(names)
        if (owner.name, names[0]) in values.never:
            return False
        if isinstance(statement, ast.AnnAssign):
            is_constant = owner.name in values.settings and not isinstance(statement.value, ast.Call)
            return not is_constant or names[0] in self.code.read_attributes
        return any(name in self.attributes or name.startswith("__") or values.is_used(owner.name, name)
                   for name in names)

    def _visit(self, statement):
        self.statements.add(statement)
        parts = [statement]
        if isinstance(statement, ast.ClassDef):  # its members wait for their own use
            parts = [*statement.decorator_list, *statement.bases, *statement.keywords]
        for inner in (inner for part in parts for inner in ast.walk(part)):
            match inner:
                case ast.Name(ctx=ast.Load()) if not self.code.is_local(inner):
                    self.names.add(inner.id)
                case ast.Attribute(ctx=ast.Load() | ast.Del()):
                    self.attributes.add(inner.attr)
                case ast.Call():
                    self.attributes.update(attributes_by_name(inner))
                case ast.Assign():  # an attribute that a subclass or a library reads
                    self.attributes.update(target.attr for target in inner.targets
                                           if isinstance(target, ast.Attribute) and not is_self(target.value))


def prune_locals(code, edits, function):
    """Locals and attributes of self that are assigned and never read."""
    read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
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
    nothing reads out of plain records and the calls that make one.
    """
    for record in code.classes.values():
        fields = {member.target.id: member for member in record.body if isinstance(member, ast.AnnAssign)}
        dead = fields.keys() - code.read_attributes
        if not dead or record.name not in code.values.plain_records:
            continue
        replacements = without_arguments(code, [*fields], code.calls_of(record.name), dead)
        if replacements is not None and edits.replace_all(replacements):
            for field in dead:
                edits.remove(fields[field])
    for functions, calls in code.called:
        signatures = {tuple(argument.arg for argument in arguments_of(function)) for function in functions}
        names = [argument.arg for argument in code.parameters(functions[0])]
        read = {node.id for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)}
        dead = {*names} - read
        if not dead or len(signatures) > 1 or any(len(one.args.args) < len(arguments_of(one)) for one in functions):
            continue
        replacements = without_arguments(code, names, calls, dead)
        if replacements is not None:
            edits.replace_all([*(without_parameters(code, function, dead) for function in functions), *replacements])


def without_parameters(code, function, dead):
    """(begin, end, text) of the head of a function without some of its parameters."""
    args = function.args
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
    texts = []
    for argument, default in zip(args.args, defaults):
        if argument.arg not in dead:
            texts.append(code.source[code.begin(argument):code.end(default or argument)])
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
