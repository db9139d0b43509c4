"""What can be known of a Python program from its text: where its names come from, who calls its functions, and the
value of an expression where that is the same however the program runs.

    Values   what is known beyond the text; the facets of which more than one value is possible
    Code     a source, its syntax tree, and the value of its expressions
"""

import ast
import builtins
import contextlib
from collections import Counter, defaultdict

# Functions that change nothing; and those of them that are called to know a value.
PURE_CALLS = set("""
    len min max any all sum abs isinstance hasattr getattr tuple list set dict sorted range enumerate zip str int float
    bool round partial Path format_value
""".split())
EVALUATED = {name: getattr(builtins, name) for name in """
    len min max any all sum abs tuple list set sorted range str int float bool round dict frozenset
""".split()}
TYPES = {name: EVALUATED[name] for name in ("tuple", "list", "set", "str", "int", "float", "bool", "dict")}
OPERATORS = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b, ast.IsNot: lambda a, b: a is not b, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b, ast.FloorDiv: lambda a, b: a // b, ast.Mod: lambda a, b: a % b,
    ast.Not: lambda a: not a, ast.USub: lambda a: -a,
}
# Methods that leave a list, dict or set as it is.
READING_METHODS = {"get", "items", "keys", "values", "index", "count", "copy"}
READING = (ast.Compare, ast.For, ast.comprehension, ast.BinOp, ast.UnaryOp, ast.Starred, ast.If)
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

    def name(self, node, world, code):
        """The value of an ast.Name of which the text does not say it; Unknown."""
        raise Unknown

    def attribute(self, node, world, code):
        """The value of an ast.Attribute; Unknown."""
        raise Unknown

    def call(self, node, world, code):
        """The value of an ast.Call; Unknown."""
        raise Unknown

    def class_of_object(self, node, code):
        """The name of the class of the text that the object of this expression has, or None."""

    def is_idle(self, node, code):
        """Has this call, a statement, no effect that anything asks for?"""
        return False

    module_calls = {}  # {class: the text of what is called, everywhere, where its forward() is meant}
    plain_records = frozenset()  # classes like NamedTuple of which only single fields are read, by their names

    def rewritten(self, node, code):
        """Another text for this expression, or None."""

    without_effect = frozenset()  # names of functions of which only the result can be wanted

    def table_keys(self, name):
        """The keys that anything asks for of this dict of the module, or of that which this function returns; None: all
        of them.
        """

    def is_empty(self, node, code):
        """Is this iterable always empty, whatever the text says?"""
        return False

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
        self.nodes = []  # all of them, outer ones first
        self.own = defaultdict(list)  # function or class: its nodes without those of functions and classes inside
        self._bound_names = {}
        self._link()
        self.definitions = {node.name: node for node in self.tree.body
                            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        self.nonlocals = [node for node in self.nodes if isinstance(node, ast.Nonlocal)]
        self.constants = self._module_constants()
        self.changing = self._changing_names()
        self.families = self._families()
        self.locals = {}  # function: {name: the expression of its only assignment}
        self.attributes = self._attribute_assignments()
        self.callers = self._callers()
        self.arguments = self._arguments()
        self.read = None  # the attributes that are read, once somebody asks (prune.read_attributes)
        self.empty = None  # the functions with nothing left in them (fold.empty_functions)
        self._memo = {}
        self._giving_back = None
        self.nowhere = World({})
        self._worlds = {}

    def _link(self):
        stack = [(self.tree, None)]
        while stack:
            node, scope = stack.pop()
            self.scopes[node] = scope
            self.nodes.append(node)
            self.own[scope].append(node)
            inner = node if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else scope
            children = list(ast.iter_child_nodes(node))
            for child in children:
                self.parents[child] = node
            stack += [(child, inner) for child in reversed(children)]

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

    def is_local(self, node):
        """Is this a name of a function around it, and not of the module?"""
        function = self.function_of(node)
        while function is not None:
            if function not in self._bound_names:
                names = set(arguments_of(function))
                other = set()  # of functions around, or of the module
                for one in self.own[function]:
                    names.update(name for target in targets_of(one) for name in names_in(target))
                    if isinstance(one, (ast.Global, ast.Nonlocal)):
                        other.update(one.names)
                self._bound_names[function] = names - other
            if node.id in self._bound_names[function]:
                return True
            function = self.function_of(function)
        return False

    # What a name stands for

    def _module_constants(self):
        """{name: expression} of names that the module assigns once and nothing else does."""
        counts = Counter()
        found = {}
        for node in self.nodes:
            if isinstance(node, ast.Global):
                counts.update(node.names * 2)
        for statement in self.tree.body:
            has_statements = isinstance(statement, (ast.If, ast.Try, ast.With, ast.For))
            for inner in ast.walk(statement) if has_statements else [statement]:
                for target in targets_of(inner):
                    if isinstance(target, ast.Name):
                        counts[target.id] += 1
                        found[target.id] = getattr(inner, "value", None)
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                counts[statement.name] += 2
        return {name: value for name, value in found.items() if counts[name] == 1 and value is not None}

    def _changing_names(self):
        """Names of which a use may change the object: nothing is known of a list, dict or set of such a name."""
        return {node.id for node in self.nodes
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and not self._only_reads(node)}

    def _only_reads(self, node):
        """Does this use of a name leave a list, dict or set as it is, and give it to nobody?"""
        parent = self.parents[node]
        if isinstance(parent, ast.Attribute):
            return parent.attr in READING_METHODS and self._is_called(parent)
        if isinstance(parent, ast.Subscript):
            return parent.slice is node or isinstance(parent.ctx, ast.Load)
        if isinstance(parent, ast.Call):
            return isinstance(parent.func, ast.Name) and parent.func.id in PURE_CALLS
        return isinstance(parent, READING)

    def _families(self):
        """{class: the names of all classes that it is made from, or that are made from it, in the text}."""
        classes = {node.name: node for node in self.nodes if isinstance(node, ast.ClassDef)}
        above = {}
        for name in classes:
            found = [name]
            for one in found:  # grows
                bases = classes[one].bases if one in classes else ()
                found += [base.id for base in bases if isinstance(base, ast.Name) and base.id not in found]
            above[name] = set(found) & set(classes)
        return {name: above[name] | {other for other in classes if name in above[other]} for name in classes}

    def inherited(self, method, name):
        """The method of this name of the class from which that of `method` is made, or None."""
        owner = self.scopes[method]
        while isinstance(owner, ast.ClassDef) and len(owner.bases) == 1:
            owner = self.definitions.get(getattr(owner.bases[0], "id", None))
            for member in owner.body if owner else ():
                if isinstance(member, ast.FunctionDef) and member.name == name:
                    return member
        return None

    def giving_back(self):
        """{function of the module: the parameter or constant that it returns, without doing anything else}."""
        if self._giving_back is None:
            self._giving_back = {}
            for function in self.tree.body:
                if isinstance(function, ast.FunctionDef) and not function.decorator_list:
                    body = [one for one in function.body if not is_docstring(one)]
                    value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
                    is_parameter = isinstance(value, ast.Name) and value.id in arguments_of(function)
                    if is_parameter or isinstance(value, ast.Constant):
                        self._giving_back[function.name] = value
        return self._giving_back

    def local_values(self, function):
        """{name: expression} of the names that a function assigns once, as a simple statement; None: it has the name,
        but not so.
        """
        if function not in self.locals:
            found = {}
            for node in self.own[function]:
                for target in [] if isinstance(node, ast.Delete) else targets_of(node):
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
            for node in self.nonlocals:
                found.update(dict.fromkeys(name for name in node.names if name in found))
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
        simple one, and the class where it is not one of self.
        """
        found = defaultdict(list)
        for node in self.nodes:
            for target in targets_of(node):
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, (ast.Store, ast.Del)):
                        simple = isinstance(node, ast.Assign) and part is target
                        of_self = isinstance(part.value, ast.Name) and part.value.id == "self"
                        owner = self.class_of(node) if of_self else None
                        found[part.attr].append((owner, node.value if simple and of_self else None))
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
        calls = defaultdict(list)
        escaped = set()
        for node in self.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls[node.func.id].append(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                calls["." + node.func.attr].append(node)
            elif isinstance(node, ast.Name) and not self._is_called(node) and not self.is_local(node):
                escaped.add(node.id)
            elif isinstance(node, ast.Attribute) and not self._is_called(node):
                escaped.add("." + node.attr)
        found = {}
        for name, function in functions.items():
            if calls[name] and name not in escaped:
                found[function] = calls[name]
        for function, made in self._constructors(calls):
            if made:
                found[function] = made
        for function in methods["forward"]:
            called = self.values.module_calls.get(self.scopes[function].name)
            if called:
                found[function] = [node for node in self.nodes
                                   if isinstance(node, ast.Call) and self.text(node.func) == called]
        for name, definitions in methods.items():
            plain = all(not one.decorator_list and not self.values.is_used(self.scopes[one].name, name)
                        for one in definitions)
            if plain and calls["." + name] and "." + name not in escaped and not name.startswith("__"):
                for function in definitions:
                    found[function] = calls["." + name]
        return found

    def _constructors(self, calls):
        """[(__init__, its calls)] of the classes that are only made by name."""
        classes = {name: node for name, node in self.definitions.items() if isinstance(node, ast.ClassDef)}
        # One that is handed on may be called anywhere.
        handed_on = {node.id for node in self.nodes if isinstance(node, ast.Name) and node.id in classes
                     and not (self._is_called(node) or self._is_type(node))}
        inits = {}
        for name, node in classes.items():
            for member in node.body:
                if getattr(member, "name", "") == "__init__":
                    inits[name] = member
        below = defaultdict(list)  # {class: those that are made from it}
        for name, node in classes.items():
            for base in node.bases:
                below[getattr(base, "id", None)].append(name)

        def calls_of(name):
            """Those that make an object of this class, as far as its __init__ sees them; None: not all are known."""
            if name in handed_on or len(classes[name].bases) > 1:
                return None
            found = [*calls[name]]
            for other in below[name]:
                more = self._calls_of_super(inits[other]) if other in inits else calls_of(other)
                if more is None:
                    return None
                found += more
            return found

        return [(init, calls_of(name)) for name, init in inits.items()]

    def _calls_of_super(self, init):
        """The calls super().__init__(...) in a constructor."""
        calls = [node for node in self.own[init] if isinstance(node, ast.Call)]
        return [call for call in calls if self.text(call.func) == "super().__init__"]

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
        return isinstance(parent, (ast.Compare, ast.ClassDef)) or (
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
            except Circular:
                # What is only handed on says nothing new; what is made of itself may be anything.
                if isinstance(node, (ast.Name, ast.Attribute, list)):
                    del self._memo[key]
                    raise
                self._memo[key] = Unknown
            except (Needs, Impossible):
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
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {self.value(key, world): self.value(value, world) for key, value in zip(node.keys, node.values)}
        if isinstance(node, ast.UnaryOp):
            return OPERATORS[type(node.op)](self.value(node.operand, world))
        if isinstance(node, ast.BoolOp):
            return self._bool(node, world)
        if isinstance(node, ast.Compare):
            if asks_for_none(node) and self.is_object(node.left):
                return isinstance(node.ops[0], ast.IsNot)
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

    def is_object(self, node):
        """Is this an attribute of self that is always something made by a class?"""
        if not (isinstance(node, ast.Attribute) and is_self(node.value)):
            return False
        made = self._assigned(node)
        return bool(made) and all(isinstance(one, ast.Call) and self._is_class(one.func) for one in made)

    def _is_class(self, node):
        """Does this name a class of the file, or one of torch.nn?"""
        if isinstance(node, ast.Name):
            return isinstance(self.definitions.get(node.id), ast.ClassDef)
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nn"

    def _name(self, node, world):
        try:
            return self._name_in_text(node, world)
        except Circular:
            raise
        except (Unknown, KeyError):
            return self.values.name(node, world, self)

    def _name_in_text(self, node, world):
        function = self.function_of(node)
        while function is not None:
            known = self.local_values(function)
            if node.id in known:
                if known[node.id] is None:
                    raise Unknown
                value = self.value(known[node.id], world)
                if isinstance(value, (list, dict, set)):  # it may be filled later
                    raise Unknown
                return value
            function = self.function_of(function)
        if node.id not in self.constants:
            return TYPES[node.id]  # or a KeyError: unknown
        value = self.value(self.constants[node.id], world)
        if isinstance(value, (list, dict, set)) and node.id in self.changing:
            raise Unknown
        return value

    def _attribute(self, node, world):
        try:
            return self.values.attribute(node, world, self)
        except Unknown:
            pass
        assigned = self._assigned(node)
        if isinstance(node.ctx, ast.Load) and assigned:
            value = only(self._not_circular(assigned, world))
            if isinstance(value, SIMPLE):
                return value
        raise Unknown

    def _assigned(self, node):
        """The expressions that this attribute is assigned, or an empty list: they are not all known. Of self, they are
        those of its class and the classes made from it; of another object, all of them, if they are of one class.
        """
        assigned = self.attributes.get(node.attr, [])
        owner = self.class_of(node)
        kind = self.values.class_of_object(node.value, self)
        if is_self(node.value) and owner is not None:
            kind = owner.name
        if kind is not None:
            family = self.families[kind]
            assigned = [(one, value) for one, value in assigned if one is None or one.name in family]
        elif isinstance(node.value, ast.Call) or len({one for one, _ in assigned}) > 1:
            return []
        if any(one is None or value is None for one, value in assigned):
            return []
        return [value for _, value in assigned]

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
            pass
        if isinstance(node, ast.BoolOp):  # one operand may decide, whatever the others are
            decides = isinstance(node.op, ast.Or)
            if any(self.truth(operand) is decides for operand in node.values):
                return decides
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


def asks_for_none(node):
    """Is this comparison `... is None` or `... is not None`?"""
    single = len(node.ops) == 1 and isinstance(node.ops[0], (ast.Is, ast.IsNot))
    return single and isinstance(node.comparators[0], ast.Constant) and node.comparators[0].value is None


def is_pure(node):
    """Does evaluating this change nothing and raise nothing that matters?"""
    for part in ast.walk(node):
        if isinstance(part, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)):
            return False
        if isinstance(part, ast.Call):
            by_name = isinstance(part.func, ast.Name) and part.func.id in PURE_CALLS
            if not by_name and not (isinstance(part.func, ast.Attribute) and part.func.attr in READING_METHODS):
                return False
    return True


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"
