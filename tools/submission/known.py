"""What can be known of a Python program from its text: where its names come from, who calls its functions, and the
value of an expression where that is the same however the program runs.

    Values   what is known beyond the text; the facets of which more than one value is possible
    Code     a source, its syntax tree, and the value of its expressions
"""

import ast
import builtins
import contextlib
import itertools
import operator
from collections import defaultdict
from functools import cached_property

# Functions that change nothing; and what is called to know a value, or is one.
PURE_CALLS = set("""
    len min max any all sum abs isinstance hasattr getattr tuple list set dict sorted range enumerate zip str int float
    bool round partial Path format_value
""".split())
EVALUATED = {name: getattr(builtins, name) for name in "bool dict float int list range set str tuple".split()}
OPERATORS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b, ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Not: operator.not_, ast.USub: operator.neg,
}
# Methods that leave a list, dict or set as it is.
READING_METHODS = {"get", "items", "keys", "values", "index", "count", "copy"}
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
FUNCTIONS = (ast.FunctionDef, ast.Lambda)
HANDED_ON = (ast.Name, ast.Attribute, ast.arg)  # expressions of which the value comes from elsewhere
SIMPLE = (type(None), bool, int, float, str)
# What the trainer does without: a name that another function assigns, and assignments that nothing here looks for.
NOT_UNDERSTOOD = (ast.Global, ast.Nonlocal, ast.NamedExpr, ast.Match, ast.Await, ast.AsyncFunctionDef)


class Unknown(Exception):
    """The value of an expression is not known."""


class Circular(Unknown):
    """The value of an expression is defined by itself."""


class Needs(Exception):
    """The value of an expression depends on this facet of the world."""


class Impossible(Exception):
    """No program asks for this in such a world."""


class World(dict):
    """What is the case in some respects, the facets; asking for another one is a Needs."""

    def __missing__(self, facet):
        raise Needs(facet)


NOWHERE = World()


class Values:
    """What is known of the program beyond its text. A subclass knows more."""

    facets = {}  # {facet: all values that it may have}; an expression is known if it has one value in all worlds
    module_calls = {}  # {class: the text of what is called, everywhere, where its forward() is meant}
    plain_records = frozenset()  # classes like NamedTuple of which only single fields are read, by their names
    without_effect = frozenset()  # functions of which only the result can be wanted, and whole calls that do nothing
    table_keys = {}  # {dict of the module, or function that returns one: the keys that anything asks for}
    objects = {}  # {last name of an expression: the class of the text that its object has}
    never = frozenset()  # (class, method) that nothing calls, though other objects have methods of its name
    settings = frozenset()  # classes of which a field with a constant is needed only where something reads its name

    def value(self, node, world, code):
        """The value of an expression of which the text does not say it; Unknown."""
        raise Unknown

    def rewritten(self, node, code):
        """Another text for this call or subscript, or None."""

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
        self.begins = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]  # of the lines
        self.parents = {}
        self.blocks = []  # lists of statements
        self.scopes = {}  # node: the innermost function or class around it
        self.nodes = []  # all of them, outer ones first
        self.own = defaultdict(list)  # function or class: its nodes without those of functions and classes inside
        self._link(self.tree, None)
        self.definitions = {node.name: node for node in self.tree.body if isinstance(node, DEFINITIONS)}
        self._names = {}
        self._memo = {}
        self._worlds = {}

    def _link(self, node, scope):
        if isinstance(node, NOT_UNDERSTOOD):
            raise RuntimeError(f"line {node.lineno} has syntax that specialise does not know: {type(node).__name__}")
        self.scopes[node] = scope
        self.nodes.append(node)
        self.own[scope].append(node)
        self.blocks += [part for _, part in ast.iter_fields(node)
                        if isinstance(part, list) and part and isinstance(part[0], ast.stmt)]
        inner = node if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else scope
        for child in ast.iter_child_nodes(node):
            self.parents[child] = node
            self._link(child, inner)

    def begin(self, node):
        return self.begins[node.lineno - 1] + node.col_offset

    def end(self, node):
        return self.begins[node.end_lineno - 1] + node.end_col_offset

    def text(self, node):
        return self.source[self.begin(node):self.end(node)]

    def around(self, node, kinds):
        """The functions or classes around a node, from the innermost one."""
        while (node := self.scopes[node]) is not None:
            if isinstance(node, kinds):
                yield node

    def class_of(self, node):
        """The name of the innermost class around a node, or None."""
        return next((scope.name for scope in self.around(node, ast.ClassDef)), None)

    def function_of(self, node):
        """The name of the innermost function around a node, or None."""
        return next((scope.name for scope in self.around(node, ast.FunctionDef)), None)

    # What a name stands for

    def values_in(self, scope):
        """{name: expression} of the names of a function, or None: the module. Of a name that it assigns once, as a
        simple statement, the expression; of a parameter its ast.arg; None of all others.
        """
        if scope not in self._names:
            found = {}
            for node in self.own[scope]:
                match node:
                    case ast.FunctionDef() | ast.ClassDef() | ast.ExceptHandler(name=str()):
                        found[node.name] = None
                    case ast.Delete():
                        continue
                for target in targets_of(node):
                    for name in names_in(target):
                        once = name not in found and isinstance(node, ast.Assign) and isinstance(target, ast.Name)
                        found[name] = node.value if once and not self._in_loop(node, scope) else None
            for argument in arguments_of(scope) if scope else ():
                found[argument.arg] = None if argument.arg in found else argument
            self._names[scope] = found
        return self._names[scope]

    def _in_loop(self, node, scope):
        """Inside a loop or a branch, where it may not have been assigned or not for the last time?"""
        while node is not scope and node is not self.tree:
            node = self.parents[node]
            if isinstance(node, (ast.For, ast.While, ast.If, ast.Try, ast.comprehension)):
                return True
        return False

    def is_local(self, node):
        """Is this a name of a function around it, and not of the module?"""
        return any(node.id in self.values_in(function) for function in self.around(node, FUNCTIONS))

    @cached_property
    def classes(self):
        return {name: node for name, node in self.definitions.items() if isinstance(node, ast.ClassDef)}

    def ancestors(self, name):
        """The names of a class and of all that it is made from."""
        bases = self.classes[name].bases if name in self.classes else ()
        return {name}.union(*(self.ancestors(base.id) for base in bases if isinstance(base, ast.Name)))

    def inherited(self, method, name):
        """The method of this name of the class from which that of `method` is made, or None."""
        owner = self.scopes[method]
        while isinstance(owner, ast.ClassDef) and len(owner.bases) == 1:
            owner = self.classes.get(getattr(owner.bases[0], "id", None))
            found = owner and method_of(owner, name)
            if found:
                return found
        return None

    @cached_property
    def attributes(self):
        """{name: [(class, expression)]} of all assignments to an attribute; the expression is None where it is not a
        simple one, and the class where it is not one of self.
        """
        found = defaultdict(list)
        for node in self.nodes:
            for target in targets_of(node):
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load):
                        of_self = is_self(part.value)
                        is_simple = of_self and isinstance(node, ast.Assign) and part is target
                        owner = self.class_of(node) if of_self else None
                        found[part.attr].append((owner, node.value if is_simple else None))
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    for name in names_of(member):
                        value = member.value if isinstance(member, ast.Assign) else None
                        found[name].append((node.name, value))
        return found

    @cached_property
    def called(self):
        """[(functions, their calls)] of the functions, constructors and methods of which all calls are in the text.
        Methods of one name are taken together.
        """
        calls = defaultdict(list)  # of a name; None for another use of it, which may call it anywhere
        for node in self.nodes:
            if isinstance(node, (ast.Name, ast.Attribute)):
                name = node.id if isinstance(node, ast.Name) else f".{node.attr}"
                parent = self.parents[node]
                if isinstance(parent, ast.Call) and parent.func is node:
                    calls[name].append(parent)
                elif isinstance(node, ast.Attribute) or not (self.is_local(node) or self._is_type(node)):
                    calls[name].append(None)
        found = [([node], calls[name]) for name, node in self.definitions.items()
                 if isinstance(node, ast.FunctionDef) and not node.decorator_list]
        methods = defaultdict(list)
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef) and isinstance(self.scopes[node], ast.ClassDef):
                methods[node.name].append(node)
        for name, functions in methods.items():
            if name == "__init__":
                found += [([one], self._constructing(self.class_of(one), calls)) for one in functions
                          if self.class_of(one) in self.classes]
            elif name == "forward":
                meant = {one: self.values.module_calls.get(self.class_of(one)) for one in functions}
                found += [([one], self.calls_of(text)) for one, text in meant.items() if text]
            elif not (name.startswith("__") or any(one.decorator_list or self.values.is_used(self.class_of(one), name)
                                                   for one in functions)):
                found.append((functions, calls["." + name]))
        return [(functions, those) for functions, those in found if those and None not in those]

    def _constructing(self, name, calls):
        """What calls the __init__ of a class: makes an object of it, or of a class that is made from it."""
        found = [*calls[name]]
        if len(self.classes[name].bases) > 1:
            found.append(None)
        for heir, node in self.classes.items():
            if name in [getattr(base, "id", None) for base in node.bases]:
                init = method_of(node, "__init__")
                if init is None:
                    found += self._constructing(heir, calls)
                else:
                    found += [call for call in self.calls_of("super().__init__") if self.scopes[call] is init]
        return found

    def calls_of(self, text):
        return [node for node in self.nodes if isinstance(node, ast.Call) and self.text(node.func) == text]

    def _is_type(self, node):
        """Is this name of a class an annotation, or what isinstance() asks for?"""
        parent = self.parents[node]
        while isinstance(parent, (ast.BinOp, ast.Subscript, ast.Tuple)):
            node, parent = parent, self.parents[parent]
        match parent:
            case ast.Compare() | ast.ClassDef() | ast.Call(func=ast.Name("isinstance")):
                return True
            case ast.AnnAssign() | ast.arg():
                return parent.annotation is node
        return False

    @cached_property
    def arguments(self):
        """{parameter: [expressions]}: what every call gives for it."""
        found = {}
        for functions, calls in self.called:
            for function in functions:
                given = [self.bound(function, call) for call in calls]
                for argument in self.parameters(function) if None not in given else ():
                    if all(argument.arg in values for values in given):
                        found[argument] = [values[argument.arg] for values in given]
        return found

    def parameters(self, function):
        """The parameters for which a call gives something: of a method, all but self."""
        return arguments_of(function)[isinstance(self.scopes[function], ast.ClassDef):]

    def bound(self, function, call):
        """{parameter: expression} of a call; None if it cannot be told."""
        args = function.args
        if args.vararg or args.kwarg or args.posonlyargs:
            return None
        names = [argument.arg for argument in self.parameters(function) if argument in args.args]
        if any(isinstance(argument, ast.Starred) for argument in call.args) or len(call.args) > len(names):
            return None
        given = dict(zip(reversed(names), reversed(args.defaults)))
        given |= {argument.arg: default for argument, default in zip(args.kwonlyargs, args.kw_defaults) if default}
        given |= dict(zip(names, call.args))
        given |= {keyword.arg: keyword.value for keyword in call.keywords}
        return None if None in given else given

    # What the file does not do

    @cached_property
    def read_attributes(self):
        """Names of all attributes that the file reads, or changes from what they were."""
        found = set()
        own = set()  # what replace() only makes another value of the same setting of
        for node in self.nodes:
            match node:
                case ast.Call(func=ast.Name("replace")):
                    own.update(inner for keyword in node.keywords for inner in ast.walk(keyword.value)
                               if isinstance(inner, ast.Attribute) and inner.attr == keyword.arg)
                case ast.Attribute():
                    if not isinstance(node.ctx, ast.Store) and node not in own:
                        found.add(node.attr)
                case ast.AugAssign(target=ast.Attribute()):
                    found.add(node.target.attr)
            found.update(attributes_by_name(node))
        return found

    @cached_property
    def empty_functions(self):
        """Names of functions and methods of which no definition has a statement left."""
        functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        return {function.name for function in functions} - {
            function.name for function in functions if not has_no_statement(function)}

    @cached_property
    def giving_back(self):
        """{function of the module: the parameter or constant that it returns, without doing anything else}."""
        found = {}
        for function in self.definitions.values():
            if isinstance(function, ast.FunctionDef) and not function.decorator_list:
                match [one for one in function.body if not is_docstring(one)]:
                    case [ast.Return(value=ast.Constant() as value)]:
                        found[function.name] = value
                    case [ast.Return(value=ast.Name() as value)] if self.is_local(value):
                        found[function.name] = value
        return found

    # The value of an expression

    def value(self, node, world):
        """The value of an expression in a world; Unknown, or Needs."""
        key = node, id(world)
        if key not in self._memo:
            self._memo[key] = Circular
            try:
                self._memo[key] = self._value(node, world)
            except (Circular, Needs, Impossible):
                del self._memo[key]
                raise
            except Unknown:
                self._memo[key] = Unknown
        found = self._memo[key]
        if found is Unknown or found is Circular:
            raise found
        return found

    def _value(self, node, world):
        try:
            return self._by_text(node, world)
        except (Needs, Impossible):
            raise
        except Circular:
            if isinstance(node, HANDED_ON):
                raise  # it says nothing new; what is made of itself may be anything
            raise Unknown from None
        except Exception:  # Unknown, or what the program itself would raise
            return self.values.value(node, world, self)

    def _by_text(self, node, world):
        match node:
            case ast.Constant():
                return node.value
            case ast.Tuple():
                return tuple(self.value(part, world) for part in node.elts)
            case ast.List():
                return [self.value(part, world) for part in node.elts]
            case ast.Dict() if None not in node.keys:
                return {self.value(key, world): self.value(value, world) for key, value in zip(node.keys, node.values)}
            case ast.UnaryOp():
                return OPERATORS[type(node.op)](self.value(node.operand, world))
            case ast.BinOp():
                return OPERATORS[type(node.op)](self.value(node.left, world), self.value(node.right, world))
            case ast.BoolOp():
                return self._bool(node, world)
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as how], comparators=[ast.Constant(None)]) if (
                    self.is_object(left)):
                return isinstance(how, ast.IsNot)
            case ast.Compare():
                sides = itertools.pairwise([node.left, *node.comparators])
                return all(OPERATORS[type(how)](self.value(left, world), self.value(right, world))
                           for how, (left, right) in zip(node.ops, sides))
            case ast.IfExp():
                return self.value(node.body if self.value(node.test, world) else node.orelse, world)
            case ast.Name():
                return self._name(node, world)
            case ast.Attribute(ctx=ast.Load()):
                return self._common(self._assigned(node), world)
            case ast.arg():
                return self._common(self.arguments[node], world)
            case ast.Call(func=ast.Name(), keywords=[]):
                return EVALUATED[node.func.id](*(self.value(argument, world) for argument in node.args))
        raise Unknown

    def _common(self, expressions, world):
        """The one simple value of all these expressions; one that only hands on what is asked for says nothing new."""
        values = []
        for expression in expressions:
            with contextlib.suppress(Circular):
                values.append(self.value(expression, world))
        value = only(values)
        if not isinstance(value, SIMPLE):
            raise Unknown
        return value

    def _bool(self, node, world):
        """One operand may decide, whatever the others are."""
        decides = isinstance(node.op, ast.Or)
        value = None
        some_unknown = False
        for operand in node.values:
            try:
                value = self.value(operand, world)
            except Unknown:
                some_unknown = True
                continue
            if bool(value) is decides:
                break
        if some_unknown and value is not decides:
            raise Unknown
        return value

    def is_object(self, node):
        """Is this an attribute of self that is always something made by a class, of the file or of torch.nn?"""
        if not (isinstance(node, ast.Attribute) and is_self(node.value)):
            return False
        made = [self.text(one.func) if isinstance(one, ast.Call) else "" for one in self._assigned(node)]
        return bool(made) and all(name in self.classes or name.startswith("nn.") for name in made)

    def _name(self, node, world):
        for scope in (*self.around(node, FUNCTIONS), None):
            names = self.values_in(scope)
            if node.id in names:
                if names[node.id] is None:
                    raise Unknown
                value = self.value(names[node.id], world)
                if isinstance(value, (list, dict, set)):  # it may be filled later
                    raise Unknown
                return value
        return EVALUATED[node.id]  # or a KeyError: unknown

    def _assigned(self, node):
        """The expressions that this attribute is assigned, or an empty list: they are not all known. Of self, they are
        those of its class and the classes made from it; of another object, all of them, if they are of one class.
        """
        assigned = self.attributes.get(node.attr, [])
        kind = self.class_of(node) if is_self(node.value) else None
        kind = kind or self.values.objects.get(self.text(node.value).rpartition(".")[2])
        if kind is not None:
            above = self.ancestors(kind)
            assigned = [(one, value) for one, value in assigned
                        if one is None or one in above or kind in self.ancestors(one)]
        elif isinstance(node.value, ast.Call) or len({one for one, _ in assigned}) > 1:
            return []
        if any(None in pair for pair in assigned):
            return []
        return [value for _, value in assigned]

    def outcomes(self, node, world=NOWHERE):
        """The value of an expression in every world that it can tell from others; Unknown."""
        try:
            yield self.value(node, world)
        except Needs as needs:
            key = id(world), *needs.args
            if key not in self._worlds:
                facet, = needs.args
                self._worlds[key] = [World(world | {facet: value}) for value in self.values.facets[facet]]
            for further in self._worlds[key]:
                yield from self.outcomes(node, further)
        except Impossible:
            pass

    def known(self, node):
        """The one value of an expression in all worlds; Unknown."""
        return only(self.outcomes(node))

    def truth(self, node):
        """True or False if that is so in all worlds, else None."""
        with contextlib.suppress(Unknown):
            return only(map(bool, self.outcomes(node)))
        decides = isinstance(getattr(node, "op", None), ast.Or)
        if isinstance(node, ast.BoolOp) and any(self.truth(operand) is decides for operand in node.values):
            return decides  # if only truth matters, a number, too
        return None


def only(values):
    """The one value that all of these are; Unknown."""
    found = list(values)
    if not found or any(type(value) is not type(found[0]) or value != found[0] for value in found[1:]):
        raise Unknown
    return found[0]


# ---- single nodes ---------------------------------------------------------------------------------------------------


def targets_of(node):
    """What a statement or expression assigns to."""
    match node:
        case ast.Assign() | ast.Delete():
            return node.targets
        case ast.AnnAssign() | ast.AugAssign() | ast.For() | ast.comprehension():
            return [node.target]
        case ast.withitem(optional_vars=ast.expr()):
            return [node.optional_vars]
    return []


def method_of(owner, name):
    """The method of a class with this name, or None."""
    return next((one for one in owner.body if isinstance(one, ast.FunctionDef) and one.name == name), None)


def names_in(target):
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]


def names_of(statement):
    """The names that a definition, or an assignment, makes."""
    match statement:
        case ast.FunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign() | ast.AnnAssign():
            return [name for target in targets_of(statement) for name in names_in(target)]
    return []


def arguments_of(function):
    args = function.args
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]


def is_pure(node):
    """Does evaluating this change nothing and raise nothing that matters?"""
    for part in ast.walk(node):
        match part:
            case ast.Call(func=ast.Name(name)) if name in PURE_CALLS:
                continue
            case ast.Call(func=ast.Attribute(attr=name)) if name in READING_METHODS:
                continue
            case ast.Call() | ast.Yield() | ast.YieldFrom():
                return False
    return True


def attributes_by_name(node):
    """The attribute that getattr, hasattr or setattr asks for by a literal; nothing for any other node."""
    match node:
        case ast.Call(func=ast.Name("getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
            return [name]
    return []


def is_pass(block):
    return len(block) == 1 and isinstance(block[0], ast.Pass)


def has_no_statement(function):
    """Does a function do nothing, by its statements and decorators?"""
    statements = [one for one in function.body if not is_docstring(one)]
    decorators = map(ast.unparse, function.decorator_list)
    return (not statements or is_pass(statements)) and all(text == "torch.no_grad()" for text in decorators)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"
