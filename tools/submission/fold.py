"""Cut a Python file down to what is left of it when some of its values are known.

`folded(source, values)` repeats two passes until neither finds anything:

    fold    a branch whose condition is known stays without the condition, or goes
    prune   a function, class, method, constant, import or local that nothing uses any more goes

Both find places in the syntax tree and edit the text there, so what stays keeps its comments, its names and its
layout. `values` is a Values: what is known of the program, beyond what the text itself says.
"""

import ast
import builtins
import contextlib
import re
from collections import Counter, defaultdict

PURE_CALLS = {"len", "min", "max", "any", "all", "sum", "abs", "isinstance", "hasattr", "getattr", "tuple", "list", "set",
              "dict", "sorted", "range", "enumerate", "zip", "str", "int", "float", "bool", "round", "partial", "Path"}
EVALUATED = {name: getattr(builtins, name) for name in
             ("len", "min", "max", "any", "all", "sum", "abs", "tuple", "list", "set", "sorted", "range", "str", "int",
              "float", "bool", "round", "dict", "frozenset")}
OPERATORS = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b, ast.Mod: lambda a, b: a % b,
    ast.Not: lambda a: not a, ast.USub: lambda a: -a,
}
BLOCKS = ("body", "orelse", "finalbody")
FUNCTIONS = (ast.FunctionDef, ast.Lambda)
SIMPLE = (type(None), bool, int, float, str)


class Unknown(Exception):
    """The value of an expression is not known."""


class Circular(Unknown):
    """The value of an expression is defined by itself."""


class Needs(Exception):
    """The value of an expression depends on this facet of the world."""


class Impossible(Exception):
    """No program asks for this in such a world."""


class World:
    """What is the case in some respects, the facets; asking for another one is a Needs."""

    def __init__(self, chosen):
        self.chosen = chosen

    def __getitem__(self, facet):
        if facet not in self.chosen:
            raise Needs(facet)
        return self.chosen[facet]


class Values:
    """What is known of the program beyond its text. A subclass knows more."""

    facets = {}  # {facet: all values that it may have}; an expression is known if it has one value in all worlds

    def name(self, name, world):
        """The value of a name that the text does not define; Unknown."""
        raise Unknown

    def attribute(self, node, world, code):
        """The value of an ast.Attribute; Unknown."""
        raise Unknown

    def call(self, node, world, code):
        """The value of an ast.Call; Unknown."""
        raise Unknown

    def rewritten(self, node, code):
        """Another text for this expression, or None."""

    def table_keys(self, name):
        """The keys of this dict of the module that anything asks for, or None: all of them."""

    def is_member_used(self, owner, member, code):
        """Is this statement of a class needed? None: as the text says."""

    def is_used(self, owner, name):
        """Is this method or constant of a class used by something outside of the text?"""
        return False


# ---- the text and its tree ------------------------------------------------------------------------------------------


class Code:
    """A source with its tree, and what can be said of its names."""

    def __init__(self, source, values):
        self.source = source
        self.values = values
        self.tree = ast.parse(source)
        self.begins = [0]  # of the lines, in bytes
        for line in source.splitlines(keepends=True):
            self.begins.append(self.begins[-1] + len(line))
        self.parents = {}
        self.scopes = {}  # node: the innermost function or class around it
        self._link(self.tree, None)
        self.constants = self._module_constants()
        self.locals = {}  # function: {name: the expression of its only assignment}
        self.attributes = self._attribute_assignments()
        self.callers = self._callers()
        self.arguments = self._arguments()
        self._memo = {}
        self.nowhere = World({})
        self._worlds = {}

    def _link(self, node, scope):
        stack = [(self.tree, None)]
        while stack:
            node, scope = stack.pop()
            self.scopes[node] = scope
            inner = node if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else scope
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node
                stack.append((child, inner))

    def begin(self, node):
        return self.begins[node.lineno - 1] + node.col_offset

    def end(self, node):
        return self.begins[node.end_lineno - 1] + node.end_col_offset

    def text(self, node):
        return self.source[self.begin(node):self.end(node)]

    def function_of(self, node):
        """The innermost function around a node, or None."""
        scope = self.scopes[node]
        while scope is not None and not isinstance(scope, FUNCTIONS):
            scope = self.scopes[scope]
        return scope

    def class_of(self, node):
        """The innermost class around a node, or None."""
        scope = self.scopes[node]
        while scope is not None and not isinstance(scope, ast.ClassDef):
            scope = self.scopes[scope]
        return scope

    # What a name stands for

    def _module_constants(self):
        """{name: expression} of names that the module assigns once and nothing else does."""
        counts = Counter()
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Global):
                counts.update(node.names * 2)
        for statement in self.tree.body:
            for inner in ast.walk(statement) if isinstance(statement, (ast.If, ast.Try, ast.With, ast.For)) else [statement]:
                for target in targets_of(inner):
                    if isinstance(target, ast.Name):
                        counts[target.id] += 1
                        found[target.id] = getattr(inner, "value", None)
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                counts[statement.name] += 2
        return {name: value for name, value in found.items() if counts[name] == 1 and value is not None}

    def local_values(self, function):
        """{name: expression} of the names that a function assigns once, as a simple statement; None: it has the name,
        but not so.
        """
        if function not in self.locals:
            found = {}
            for node in own_nodes(function):
                for target in targets_of(node):
                    for name in names_in(target):
                        once = name not in found and isinstance(node, ast.Assign) and isinstance(target, ast.Name)
                        found[name] = node.value if once and not self._in_loop(node, function) else None
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    found[node.name] = None
                if isinstance(node, (ast.Nonlocal, ast.Global)):
                    found.update(dict.fromkeys(node.names))
                if isinstance(node, ast.ExceptHandler) and node.name:
                    found[node.name] = None
            # A function inside may assign it, too.
            for node in ast.walk(function):
                if isinstance(node, ast.Nonlocal):
                    found.update(dict.fromkeys(node.names))
            for argument in arguments_of(function):
                found[argument] = None if argument in found else self.arguments.get((function, argument))
            self.locals[function] = found
        return self.locals[function]

    def _in_loop(self, node, function):
        """Inside a loop or a branch, where it may not have been assigned or not for the last time?"""
        while node is not function:
            node = self.parents[node]
            if isinstance(node, (ast.For, ast.While, ast.If, ast.Try, ast.comprehension)):
                return True
        return False

    def _attribute_assignments(self):
        """{name: [(class, expression)]} of all assignments to an attribute; the expression is None where it is not a
        simple one, or not of self.
        """
        found = defaultdict(list)
        for node in ast.walk(self.tree):
            for target in targets_of(node):
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, (ast.Store, ast.Del)):
                        simple = isinstance(node, ast.Assign) and part is target
                        of_self = isinstance(part.value, ast.Name) and part.value.id == "self"
                        found[part.attr].append((self.class_of(node), node.value if simple and of_self else None))
            if isinstance(node, ast.ClassDef):
                for statement in node.body:
                    if isinstance(statement, ast.AnnAssign):
                        found[statement.target.id].append((node, None))
                    elif isinstance(statement, ast.FunctionDef):
                        found[statement.name].append((node, None))
                    elif isinstance(statement, ast.Assign):
                        for target in statement.targets:
                            for name in names_in(target):
                                found[name].append((node, statement.value))
        return found

    def _callers(self):
        """{function: its calls} of the functions, constructors and methods of which all calls are in the text. Methods
        of one name are taken together.
        """
        functions = {}
        methods = defaultdict(list)
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef):
                        methods[member.name].append(member)
        constructors = self._constructors()
        calls = defaultdict(list)
        escaped = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls[node.func.id].append(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                calls["." + node.func.attr].append(node)
            elif isinstance(node, ast.Name) and not self._is_called(node):
                escaped.add(node.id)
            elif isinstance(node, ast.Attribute) and not self._is_called(node):
                escaped.add("." + node.attr)
        found = {}
        for name, function in functions.items():
            if calls[name] and name not in escaped:
                found[function] = calls[name]
        for name, function in constructors.items():
            if calls[name]:
                found[function] = calls[name]
        for name, definitions in methods.items():
            plain = all(not one.decorator_list and not self.values.is_used(self.scopes[one].name, name)
                        for one in definitions)
            if plain and calls["." + name] and "." + name not in escaped and not name.startswith("__"):
                for function in definitions:
                    found[function] = calls["." + name]
        return found

    def _constructors(self):
        """{class: its __init__} of the classes of which no other class is made."""
        bases = {base.id for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)
                 for base in node.bases if isinstance(base, ast.Name)}
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name not in bases:
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                        found[node.name] = member
        # One that is handed on may be called anywhere.
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id in found and not self._is_called(node) and not self._is_type(node):
                del found[node.id]
        return found

    def _is_called(self, node):
        parent = self.parents[node]
        return isinstance(parent, ast.Call) and parent.func is node

    def _is_type(self, node):
        """Is this name of a class an annotation, or what isinstance() asks for?"""
        parent = self.parents[node]
        while isinstance(parent, (ast.BinOp, ast.Subscript, ast.Tuple)):
            node, parent = parent, self.parents[parent]
        if isinstance(parent, ast.Call):
            return isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
        return isinstance(parent, ast.Compare) or (
            isinstance(parent, (ast.AnnAssign, ast.arg)) and parent.annotation is node)

    def _arguments(self):
        """{(function, parameter): [expressions]}: what every call gives for it."""
        found = {}
        for function, calls in self.callers.items():
            is_method = isinstance(self.scopes[function], ast.ClassDef)
            given = [bound(function, call, is_method) for call in calls]
            if None not in given:
                for argument in arguments_of(function)[is_method:]:
                    if all(argument in values for values in given):
                        found[function, argument] = [values[argument] for values in given]
        return found

    # The value of an expression

    def value(self, node, world):
        """The value of an expression in a world; Unknown, or Needs."""
        key = node if not isinstance(node, list) else id(node), id(world)
        if key not in self._memo:
            self._memo[key] = Circular
            try:
                self._memo[key] = self._value(node, world)
            except (Circular, Needs, Impossible):
                del self._memo[key]
                raise
            except Exception:  # Unknown, or what the program itself would raise
                self._memo[key] = Unknown
        found = self._memo[key]
        if found is Unknown or found is Circular:
            raise found
        return found

    def _value(self, node, world):
        if isinstance(node, list):  # of a parameter: what each call gives
            value = only(self._not_circular(node, world))
            if not isinstance(value, SIMPLE):
                raise Unknown
            return value
        if node is None:
            raise Unknown
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            parts = [self.value(part, world) for part in node.elts]
            return {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)](parts)
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](self.value(node.operand, world))
        if isinstance(node, ast.BoolOp):
            return self._bool(node, world)
        if isinstance(node, ast.Compare):
            left = self.value(node.left, world)
            for operator, right in zip(node.ops, node.comparators):
                right = self.value(right, world)
                if not OPERATORS[type(operator)](left, right):
                    return False
                left = right
            return True
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](self.value(node.left, world), self.value(node.right, world))
        if isinstance(node, ast.IfExp):
            return self.value(node.body if self.value(node.test, world) else node.orelse, world)
        if isinstance(node, ast.Name):
            return self._name(node, world)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, world)
        if isinstance(node, ast.Call):
            return self._call(node, world)
        raise Unknown

    def _not_circular(self, expressions, world):
        """Values of these expressions; one that only hands on what is asked for says nothing new."""
        for expression in expressions:
            with contextlib.suppress(Circular):
                yield self.value(expression, world)

    def _bool(self, node, world):
        """One known operand may decide, whatever the others are."""
        decides = isinstance(node.op, ast.Or)
        value = None
        unknown = False
        for operand in node.values:
            try:
                value = self.value(operand, world)
            except Unknown:
                unknown = True
                continue
            if bool(value) == decides:
                if unknown and not isinstance(value, bool):
                    raise Unknown
                return value
        if unknown:
            raise Unknown
        return value

    def _name(self, node, world):
        function = self.function_of(node)
        while function is not None:
            known = self.local_values(function)
            if node.id in known:
                if known[node.id] is None:
                    return self.values.name(node, world)
                value = self.value(known[node.id], world)
                if isinstance(value, (list, dict, set)):  # it may be filled later
                    raise Unknown
                return value
            function = self.function_of(function)
        if node.id in self.constants:
            return self.value(self.constants[node.id], world)
        return self.values.name(node, world)

    def _attribute(self, node, world):
        try:
            return self.values.attribute(node, world, self)
        except Unknown:
            pass
        assigned = self.attributes.get(node.attr, [])
        if isinstance(node.ctx, ast.Load) and assigned and self._is_own(node, assigned):
            value = only(self._not_circular([expression for _, expression in assigned], world))
            if isinstance(value, SIMPLE):
                return value
        raise Unknown

    def _is_own(self, node, assigned):
        """Is this an attribute that only one class of the file has, and is it one of an object of ours?"""
        if any(expression is None or owner is None for owner, expression in assigned):
            return False
        return len({owner for owner, _ in assigned}) == 1 and not isinstance(node.value, ast.Call)

    def _call(self, node, world):
        try:
            return self.values.call(node, world, self)
        except Unknown:
            pass
        if isinstance(node.func, ast.Name) and node.func.id in EVALUATED and not node.keywords:
            return EVALUATED[node.func.id](*(self.value(argument, world) for argument in node.args))
        raise Unknown

    def outcomes(self, node):
        """The value of an expression in every world that it can tell from others; Unknown."""
        waiting = [self.nowhere]
        while waiting:
            world = waiting.pop()
            try:
                yield self.value(node, world)
            except Needs as needs:
                facet = needs.args[0]
                key = id(world), facet
                if key not in self._worlds:
                    self._worlds[key] = [World(world.chosen | {facet: value}) for value in self.values.facets[facet]]
                waiting += self._worlds[key]
            except Impossible:
                continue

    def known(self, node):
        """The one value of an expression in all worlds; Unknown."""
        return only(self.outcomes(node))

    def truth(self, node):
        """True or False if that is so in all worlds, else None."""
        try:
            return only(map(bool, self.outcomes(node)))
        except Unknown:
            return None


def only(values):
    """The one value that all of these are; Unknown."""
    found = list(values)
    if not found:
        raise Unknown
    first = found[0]
    if any(type(value) is not type(first) or value != first for value in found[1:]):
        raise Unknown
    return first


def targets_of(node):
    """What a statement or expression assigns to."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        return node.targets
    if isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For, ast.comprehension, ast.NamedExpr)):
        return [node.target]
    if isinstance(node, ast.withitem) and node.optional_vars:
        return [node.optional_vars]
    return []


def names_in(target):
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]


def arguments_of(function):
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    return [argument.arg for argument in every]


def own_nodes(function):
    """The nodes of a function without those of functions inside it."""
    body = function.body if isinstance(function.body, list) else [function.body]
    stack = list(body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            stack.extend(ast.iter_child_nodes(node))


def bound(function, call, is_method=False):
    """{parameter: expression} of a call; None if it cannot be told."""
    args = function.args
    if args.vararg or args.kwarg or args.posonlyargs:
        return None
    names = [argument.arg for argument in args.args][is_method:]
    if any(isinstance(argument, ast.Starred) for argument in call.args) or len(call.args) > len(names):
        return None
    given = dict(zip(reversed(names), reversed(args.defaults)))
    given |= {argument.arg: default for argument, default in zip(args.kwonlyargs, args.kw_defaults) if default}
    given |= dict(zip(names, call.args))
    for keyword in call.keywords:
        if keyword.arg is None:
            return None
        given[keyword.arg] = keyword.value
    return given


def is_pure(node):
    """Does evaluating this change nothing and raise nothing that matters?"""
    for part in ast.walk(node):
        if isinstance(part, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
            return False
        if isinstance(part, ast.Call) and not (isinstance(part.func, ast.Name) and part.func.id in PURE_CALLS):
            return False
    return True


# ---- edits ----------------------------------------------------------------------------------------------------------


class Edits:
    """Replacements in a text. One that overlaps an earlier one waits for the next turn."""

    def __init__(self, code):
        self.code = code
        self.found = []
        self.emptied = defaultdict(set)  # (parent, block): statements that go

    def replace(self, begin, end, text):
        return self.replace_all([(begin, end, text)])

    def replace_all(self, replacements):
        """All of these, or none; were any made?"""
        spans = [(begin, end) for begin, end, _ in (*self.found, *replacements)]
        spans.sort()
        if any(later < end for (_, end), (later, _) in zip(spans, spans[1:])):
            return False
        self.found += replacements
        return True

    def remove(self, statement):
        """Take out a statement with the comment lines that stand directly above it."""
        code = self.code
        parent = code.parents[statement]
        block = next(name for name in ("body", "orelse", "finalbody", "handlers")
                     if statement in getattr(parent, name, ()))
        siblings = getattr(parent, block)
        first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", ()))])
        begin = code.begins[self._with_comments(first, statement.col_offset) - 1]
        end = code.begins[statement.end_lineno]
        gone = self.emptied[parent, block]
        stays = ""
        if len(gone) + 1 == len(siblings) and not isinstance(parent, ast.Module):
            stays = " " * statement.col_offset + "pass\n"
        if self.replace(begin, end, stays):
            gone.add(statement)

    def _with_comments(self, line, indent):
        """The first of the comment lines directly above a line; headings of sections do not belong to it."""
        lines = self.code.source.splitlines()
        while line > 1:
            above = lines[line - 2]
            is_comment = above.startswith(" " * indent + "#") and not above.lstrip().startswith("# ---")
            if not is_comment or self._is_title(lines, line - 2, indent):
                break
            line -= 1
        return line

    def _is_title(self, lines, index, indent):
        """Is this comment a title inside a class: a line of its own between blank ones?"""
        after = lines[index + 1] if index + 1 < len(lines) else ""
        return not after.strip()

    def applied(self):
        text = self.code.source
        for begin, end, new in sorted(self.found, reverse=True):
            text = text[:begin] + new + text[end:]
        return tidy(text)


def tidy(text):
    """No blank line where a block begins, one inside a block, two outside."""
    result = []
    blank = 0
    for line in text.splitlines():
        if not line.strip():
            blank += 1
            continue
        if blank and result:
            before = result[-1]
            opens = before.rstrip().endswith(":") and len(line) - len(line.lstrip()) > len(before) - len(before.lstrip())
            most = 0 if opens and not before.lstrip().startswith("#") else 1 if line.startswith((" ", ")", "]", "}")) else 2
            result += [""] * min(blank, most)
        blank = 0
        result.append(line.rstrip())
    return "\n".join(result) + "\n"


def dedented(text, by):
    """Lines with `by` blanks less before them."""
    lines = text.splitlines(keepends=True)
    return "".join(line[by:] if not line[:by].strip() else line.lstrip() for line in lines)


# ---- fold -----------------------------------------------------------------------------------------------------------


def fold(code, edits):
    """Decide what is known."""
    stack = [code.tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If):
            if fold_if(code, edits, node):
                continue
        elif isinstance(node, ast.IfExp):
            truth = code.truth(node.test)
            if truth is not None and is_pure(node.test):
                chosen = node.body if truth else node.orelse
                edits.replace(code.begin(node), code.end(node), in_parentheses(code, node, chosen))
                continue
        elif isinstance(node, ast.BoolOp):
            if fold_bool(code, edits, node):
                continue
        elif isinstance(node, ast.While):
            if code.truth(node.test) is False:
                edits.remove(node)
                continue
        elif isinstance(node, ast.Assert):
            if code.truth(node.test) is True:
                edits.remove(node)
                continue
        elif isinstance(node, ast.For):
            if is_empty(code, node.iter) and not node.orelse or is_pass(node.body) and is_pure(node.iter) and not node.orelse:
                edits.remove(node)
                continue
        elif isinstance(node, ast.Assign) and fold_table(code, edits, node):
            continue
        elif isinstance(node, ast.Expr) and does_nothing(code, node):
            edits.remove(node)
            continue
        if isinstance(node, ast.expr):
            text = code.values.rewritten(node, code)
            if text is not None:
                edits.replace(code.begin(node), code.end(node), text)
                continue
        for block in BLOCKS:
            fold_block(code, edits, getattr(node, block, None))
        stack.extend(ast.iter_child_nodes(node))


def fold_table(code, edits, node):
    """Leave out the entries of a dict of the module that nothing asks for."""
    target = node.targets[0]
    if not (isinstance(target, ast.Name) and isinstance(node.value, ast.Dict) and code.parents[node] is code.tree):
        return False
    wanted = code.values.table_keys(target.id)
    if wanted is None:
        return False
    found = False
    for key, value in zip(node.value.keys, node.value.values):
        if isinstance(key, ast.Constant) and key.value not in wanted:
            first = edits._with_comments(key.lineno, key.col_offset)
            if first > node.lineno:
                found = edits.replace(code.begins[first - 1], code.begins[value.end_lineno], "")
    return found


def fold_block(code, edits, block):
    """What comes after a return never runs; a pass beside other statements says nothing."""
    if not isinstance(block, list):
        return
    for place, statement in enumerate(block):
        if leaves(statement):
            for unreachable in block[place + 1:]:
                edits.remove(unreachable)
            return
        if isinstance(statement, ast.Pass) and len(block) > 1:
            edits.remove(statement)


def leaves(statement):
    """Does nothing after this statement of a block ever run?"""
    if isinstance(statement, ast.If):
        return bool(statement.orelse) and leaves(statement.body[-1]) and leaves(statement.orelse[-1])
    return isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break))


def is_pass(block):
    return len(block) == 1 and isinstance(block[0], ast.Pass)


def is_empty(code, node):
    """Is this iterable known to be empty?"""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("items", "values", "keys"):
        node = node.func.value
    if isinstance(node, ast.Dict) and not node.keys:
        return True
    try:
        value = code.known(node)
    except Unknown:
        return False
    return isinstance(value, (tuple, list, dict, set, range)) and not value


def does_nothing(code, node):
    """Is this statement the call of a function that has nothing left in it?"""
    call = node.value
    if not isinstance(call, ast.Call) or not all(map(is_pure, call.args)) or not all(is_pure(k.value) for k in call.keywords):
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id in empty_functions(code)
    return isinstance(call.func, ast.Attribute) and is_pure(call.func.value) and call.func.attr in empty_functions(code)


def empty_functions(code):
    """Names of functions and methods of which every definition has no statement left."""
    if not hasattr(code, "_empty"):
        bodies = defaultdict(list)
        for node in ast.walk(code.tree):
            if isinstance(node, ast.FunctionDef):
                statements = [one for one in node.body if not is_docstring(one)]
                empty = not statements or is_pass(statements)
                bodies[node.name].append(empty and not node.decorator_list)
        code._empty = {name for name, empty in bodies.items() if all(empty)}
    return code._empty


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def in_parentheses(code, node, chosen):
    """The text of a part of an expression that takes the place of the whole, so that it still means the same."""
    text = code.text(chosen)
    around = code.source[code.begin(node) - 1: code.begin(node)] + code.source[code.end(node): code.end(node) + 1]
    loose = isinstance(chosen, (ast.IfExp, ast.BoolOp, ast.Lambda, ast.Compare, ast.BinOp, ast.UnaryOp))
    own_statement = isinstance(code.parents[node], (ast.Assign, ast.Return, ast.AnnAssign, ast.Expr, ast.keyword))
    if "\n" in text and around != "()" or loose and not own_statement and around != "()":
        return f"({text})"
    return text


def fold_bool(code, edits, node):
    """Leave out operands that do not matter."""
    neutral = isinstance(node.op, ast.And)  # True in an and, False in an or
    kept = []
    for place, operand in enumerate(node.values):
        truth = code.truth(operand) if is_pure(operand) else None
        last = place == len(node.values) - 1
        if truth is neutral and (not last or is_condition(code, node)):
            continue
        kept.append(operand)
        if truth is (not neutral):  # it decides: nothing after it is looked at
            break
    if len(kept) == len(node.values):
        return False
    if not kept:
        kept = [node.values[-1]]
    word = " and " if neutral else " or "
    texts = [code.text(operand) if len(kept) == 1 or not isinstance(operand, (ast.BoolOp, ast.IfExp, ast.Lambda))
             else f"({code.text(operand)})" for operand in kept]
    text = word.join(texts)
    multiline = "\n" in text
    around = code.source[code.begin(node) - 1: code.begin(node)]
    if len(kept) == 1 and isinstance(kept[0], (ast.BoolOp, ast.IfExp, ast.Compare)) or multiline or "\n" in code.text(node):
        free = is_condition(code, node) or isinstance(code.parents[node], (ast.Assign, ast.Return, ast.keyword))
        if (multiline or not free) and around != "(":
            text = f"({text})"
    edits.replace(code.begin(node), code.end(node), text)
    return True


def is_condition(code, node):
    """Does only the truth of this expression matter?"""
    parent = code.parents[node]
    if isinstance(parent, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        return parent.test is node
    if isinstance(parent, ast.comprehension):
        return node in parent.ifs
    if isinstance(parent, ast.UnaryOp):
        return isinstance(parent.op, ast.Not)
    if isinstance(parent, ast.BoolOp):
        return is_condition(code, parent)
    return False


def fold_if(code, edits, node):
    """Decide an if, or an elif. Is there nothing left to do inside it in this turn?"""
    source = code.source
    is_elif = source[code.begin(node):].startswith("elif")
    truth = code.truth(node.test) if is_pure(node.test) else None
    indent = node.col_offset
    line_begin = code.begins[node.lineno - 1]
    line_end = code.begins[node.end_lineno]
    body_begin = code.end(node.test) + re.match(r"[\s)]*:[^\n]*\n", source[code.end(node.test):]).end()
    body_end = code.begins[node.body[-1].end_lineno]
    else_begin, else_text = rest_of(code, node, body_end)
    if truth is None:
        if is_pass(node.body) and is_pure(node.test):
            if not node.orelse:
                if is_elif:
                    edits.replace(line_begin, line_end, "")
                else:
                    edits.remove(node)
                return True
            if not is_elif and not starts_elif(code, node):
                test = code.text(node.test)
                edits.replace(line_begin, line_end, f"{' ' * indent}if not ({test}):\n{else_text}")
                return True
        if node.orelse and is_pass(node.orelse):
            edits.replace(body_end, line_end, "")
        return False
    if truth:
        body = source[body_begin:body_end]
        if is_elif:
            edits.replace(line_begin, line_end, f"{' ' * indent}else:\n{body}")
        else:
            edits.replace(line_begin, line_end, dedented(body, node.body[0].col_offset - indent))
        return True
    if not node.orelse:
        if is_elif:
            edits.replace(line_begin, line_end, "")
        else:
            edits.remove(node)
        return True
    if starts_elif(code, node):
        text = source[else_begin:line_end]
        if not is_elif:
            text = text.replace("elif", "if", 1)
        edits.replace(line_begin, line_end, text)
    elif is_elif:
        edits.replace(line_begin, line_end, source[else_begin:line_end])
    else:
        edits.replace(line_begin, line_end, dedented(else_text, node.orelse[0].col_offset - indent))
    return True


def starts_elif(code, node):
    """Is the other branch of this if an elif?"""
    other = node.orelse[0]
    return isinstance(other, ast.If) and code.source[code.begin(other):].startswith("elif")


def rest_of(code, node, body_end):
    """(where the other branch begins, the lines inside its else)."""
    if not node.orelse:
        return body_end, ""
    if starts_elif(code, node):
        begin = code.begins[node.orelse[0].lineno - 1]
        return begin, ""
    line_end = code.begins[node.end_lineno]
    found = re.compile(r"^ *else:[^\n]*\n", re.M).search(code.source, body_end, line_end)
    return found.start(), code.source[found.end():line_end]


# ---- prune ----------------------------------------------------------------------------------------------------------


def prune(code, edits):
    """Take out what nothing uses."""
    live = Live(code)
    for statement in code.tree.body:
        prune_statement(code, edits, statement, live)
    for node in ast.walk(code.tree):
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
        return any(name in self.attributes or self.code.values.is_used(owner.name, name) for name in names)

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
                    self._name(inner.id)
                elif isinstance(inner, ast.Attribute) and not isinstance(inner.ctx, ast.Store):
                    self.attributes.add(inner.attr)
                elif isinstance(inner, ast.Global):
                    for name in inner.names:
                        self._name(name)
                elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in (
                        "getattr", "hasattr", "setattr") and isinstance(inner.args[1], ast.Constant):
                    self.attributes.add(inner.args[1].value)
                elif isinstance(inner, ast.Assign):  # an attribute that a subclass or a library reads
                    self.attributes.update(target.attr for target in inner.targets
                                           if isinstance(target, ast.Attribute) and not is_self(target.value))

    def _name(self, name):
        if name not in self.names:
            self.names.add(name)
            self.waiting += self.definitions.get(name, ())


# ---- parameters -----------------------------------------------------------------------------------------------------


def prune_parameters(code, edits):
    """Take parameters that no function of a name reads out of its definitions and all its calls."""
    groups = defaultdict(list)
    for function in code.callers:
        groups[function.name if isinstance(code.scopes[function], ast.ClassDef) else function].append(function)
    for functions in groups.values():
        if functions[0].name == "__init__":
            for function in functions:
                prune_parameters_of(code, edits, [function])
        else:
            prune_parameters_of(code, edits, functions)


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
        changed = without_arguments(code, functions[0], call, dead, is_method)
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


def without_arguments(code, function, call, dead, is_method):
    """(begin, end, text) of a call without what it gives for some parameters; None if it gives nothing for them."""
    names = [argument.arg for argument in function.args.args][is_method:]
    kept = [argument for argument, name in zip(call.args, names) if name not in dead]
    keywords = [keyword for keyword in call.keywords if keyword.arg not in dead]
    if len(kept) == len(call.args) and len(keywords) == len(call.keywords):
        return None
    # What stood behind a dead one keeps its place, since that has gone from the definition, too.
    texts = [code.text(part) for part in (*kept, *keywords)]
    begin = code.begin(call)
    column = begin - code.begins[call.lineno - 1]
    return begin, code.end(call), listing(code.text(call.func) + "(", texts, ")", column)


def listing(head, parts, tail, column, width=100):
    """head + parts + tail in as few lines of at most `width` columns as there must be."""
    line = head + ", ".join(parts) + tail
    last = head.rpartition("\n")[2]
    start = (column if "\n" not in head else 0) + len(last)
    if "\n" in line or column + len(line) + 1 <= width:
        return line
    lines = [head]
    length = start
    for place, part in enumerate(parts):
        text = part + (", " if place < len(parts) - 1 else tail)
        if length + len(text.rstrip()) > width and length > start:
            lines[-1] = lines[-1].rstrip()
            lines.append(" " * start)
            length = start
        lines[-1] += text
        length += len(text)
    return "\n".join(lines)


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


def prune_locals(code, edits, function):
    """Locals, inner functions and attributes of self that are assigned and never read."""
    read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)}
    outer = {name for node in ast.walk(function) if isinstance(node, (ast.Global, ast.Nonlocal)) for name in node.names}
    for node in own_nodes(function):
        if isinstance(node, ast.FunctionDef):
            if node.name not in read:
                edits.remove(node)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            unread = isinstance(target, ast.Name) and target.id not in read | outer
            unread = unread or is_dead_attribute(code, target)
            if unread and is_pure(node.value):
                edits.remove(node)
            elif unread and isinstance(node.value, ast.Call):  # what it does is wanted, what it gives is not
                edits.replace(code.begin(node), code.begin(node.value), "")


def read_attributes(code):
    """Names of all attributes that the file reads, or changes from what they were."""
    if not hasattr(code, "_read"):
        code._read = set()
        for node in ast.walk(code.tree):
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
                code._read.add(node.attr)
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Attribute):
                code._read.add(node.target.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
                if isinstance(node.args[1], ast.Constant):
                    code._read.add(node.args[1].value)
    return code._read


def is_dead_attribute(code, target):
    """Is this an attribute of self that nothing in the file reads?"""
    if not (isinstance(target, ast.Attribute) and is_self(target.value)):
        return False
    owner = code.class_of(target)
    return target.attr not in read_attributes(code) and not (owner and code.values.is_used(owner.name, target.attr))


# ---- all of it ------------------------------------------------------------------------------------------------------


def folded(source, values, most_turns=200):
    """The source, cut down."""
    for _ in range(most_turns):
        code = Code(source, values)
        edits = Edits(code)
        fold(code, edits)
        if not edits.found:
            prune(code, edits)
        if not edits.found:
            prune_parameters(code, edits)
        if not edits.found:
            return source
        source = edits.applied()
    raise RuntimeError("the source is still changing")
