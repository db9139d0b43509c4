"""Cut a Python file down to what is left of it when some of its values are known.

`folded(source, values)` repeats two passes until neither finds anything:

    fold    a branch whose condition is known stays without the condition, or goes
    prune   a function, class, method, parameter, constant, import or local that nothing uses any more goes (prune.py)

Both find places in the syntax tree and edit the text there, so what stays keeps its comments, its names and its
layout. `values` is a Values of known.py: what is known of the program, beyond what the text itself says.
"""

import ast
import keyword
import re

from submission.edits import Edits, dedented
from submission.known import Code, Unknown, has_no_statement, is_pass, is_pure
from submission.prune import prune, prune_parameters


def folded(source, values, most_turns=200):
    """The source, cut down."""
    for _ in range(most_turns):
        code = Code(source, values)
        edits = Edits(code)
        fold(code, edits)
        prune(code, edits)
        prune_parameters(code, edits)
        if not edits.found:
            return source
        source = edits.applied()
    raise RuntimeError("the source is still changing")


def fold(code, edits):
    """Decide what is known."""
    for node in code.nodes:
        match node:
            case ast.If():
                fold_if(code, edits, node)
            case ast.IfExp():
                truth = code.truth(node.test)
                if truth is not None and is_pure(node.test):
                    put(code, edits, node, node.body if truth else node.orelse)
            case ast.BoolOp():
                fold_bool(code, edits, node)
            case ast.Dict():
                fold_table(code, edits, node)
            case ast.Call() | ast.Subscript():
                fold_call(code, edits, node)
            case ast.stmt() if is_idle(code, node):
                edits.remove(node)
    for block in code.blocks:
        fold_block(code, edits, block)


# ---- statements -----------------------------------------------------------------------------------------------------


def is_idle(code, node):
    """Does this statement do nothing?"""
    match node:
        case ast.While():
            return code.truth(node.test) is False
        case ast.For(orelse=[]):
            return is_empty(code, node.iter) or is_pass(node.body) and is_pure(node.iter)
        case ast.With():
            around = [ast.unparse(item) for item in node.items]
            return is_pass(node.body) and {*around} <= {"torch.no_grad()", "torch.enable_grad()"}
        case ast.AugAssign(op=ast.Add()):
            return is_empty(code, node.value)
        case ast.Expr():
            return is_idle_call(code, node.value)
        case ast.Return(value=None):  # at the end
            parent = code.parents[node]
            return isinstance(parent, ast.FunctionDef) and parent.body[-1] is node
        case ast.FunctionDef():
            above = code.inherited(node, node.name)
            return above is not None and has_no_statement(node) and has_no_statement(above)
    return False


def is_idle_call(code, call):
    """Is this the call of a function that has nothing left in it, or that only has a result?"""
    if is_empty(code, call) or code.text(call) in code.values.without_effect:
        return True
    if not (isinstance(call, ast.Call) and all(map(is_pure, (*call.args, *call.keywords)))):
        return False
    match call.func:
        case ast.Attribute(value=ast.Call(func=ast.Name("super")), attr=name):
            above = code.inherited(code.scopes[call], name)
            return above is not None and has_no_statement(above)
        case ast.Attribute(value=value, attr=name):
            return is_pure(value) and name in code.empty_functions
        case ast.Name(name):
            return name in code.empty_functions | code.values.without_effect
    return False


def is_empty(code, node):
    """Is this iterable known to be empty?"""
    match node:
        case ast.GeneratorExp() | ast.ListComp():
            return is_empty(code, node.generators[0].iter)
        case ast.Call(func=ast.Attribute(value=value, attr="items" | "values" | "keys")):
            return is_empty(code, value)
        case ast.Call(func=ast.Name("enumerate" | "zip" | "reversed" | "sorted") | ast.Attribute(attr="ModuleList")):
            return is_empty(code, node.args[0])
    try:
        value = code.known(node)
    except Unknown:
        return False
    return isinstance(value, (tuple, list, dict, set, range)) and not value


def fold_block(code, edits, block):
    """What comes after a return never runs, and a value that the next statement assigns anew says nothing."""
    for place, statement in enumerate(block):
        following = block[place + 1:]
        if leaves(statement):
            for unreachable in following:
                edits.remove(unreachable)
            return
        if following and is_overwritten(statement, following[0]):
            edits.remove(statement)


def leaves(statement):
    """Does nothing after this statement of a block ever run?"""
    if isinstance(statement, ast.If):
        return bool(statement.orelse) and leaves(statement.body[-1]) and leaves(statement.orelse[-1])
    return isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break))


def is_overwritten(statement, following):
    """Does a statement assign what the following one assigns anew?"""
    match statement, following:
        case ast.Assign(targets=[ast.Name(name)]), ast.Assign(targets=[ast.Name(again)]) if name == again:
            reads = {node.id for node in ast.walk(following.value) if isinstance(node, ast.Name)}
            return name not in reads and is_pure(statement.value)
    return False


def fold_table(code, edits, table):
    """Leave out what nothing asks for of a dict: a constant of the module, or what a function returns."""
    match code.parents[table]:
        case ast.Assign(targets=[ast.Name(name)]) as constant if constant in code.tree.body:
            wanted = code.values.table_keys.get(name)
        case ast.Return():
            wanted = code.values.table_keys.get(code.function_of(table))
        case _:
            return
    for key, value in zip(table.keys, table.values) if wanted is not None else ():
        if isinstance(key, ast.Constant) and key.value not in wanted and code.source[code.end(value)] == ",":
            first = edits.first_comment(key.lineno, key.col_offset)
            if first > table.lineno:
                edits.replace(code.begins[first - 1], code.begins[value.end_lineno], "")


def fold_if(code, edits, node):
    """Decide an if, or an elif."""
    truth = False if is_pass(node.body) and not node.orelse else code.truth(node.test)
    if truth is None or not is_pure(node.test):
        return
    source, indent = code.source, node.col_offset
    begin, end = code.begins[node.lineno - 1], code.begins[node.end_lineno]
    body_begin = re.compile(r"[\s)]*:[^\n]*\n").match(source, code.end(node.test)).end()
    body_end = code.begins[node.body[-1].end_lineno]
    other = re.compile(rf"^ {{{indent}}}(?:elif|else:[^\n]*\n)", re.M).search(source, body_end, end)
    body, rest = source[body_begin:body_end], source[other.start():end] if other else ""
    is_elif = source.startswith("elif", code.begin(node))
    if truth:
        text = f"{' ' * indent}else:\n{body}" if is_elif else dedented(body, node.body[0].col_offset - indent)
    elif is_elif:
        text = rest
    elif not rest:
        edits.remove(node)
        return
    elif rest.lstrip().startswith("elif"):
        text = rest.replace("elif", "if", 1)
    else:
        text = dedented(source[other.end():end], node.orelse[0].col_offset - indent)
    edits.replace(begin, end, text)


# ---- expressions ----------------------------------------------------------------------------------------------------


LOOSE = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.Compare, ast.BinOp, ast.UnaryOp)


def put(code, edits, node, chosen):
    """A part of an expression takes the place of the whole, in parentheses only where it needs them."""
    begin, end = code.begin(node), code.end(node)
    text = code.text(chosen)
    is_held = code.source[begin - 1] + code.source[end:end + 1] == "()"
    if is_held and is_grouping(code, begin - 1):
        begin, end = begin - 1, end + 1
        is_held = False
    is_loose = isinstance(chosen, LOOSE) and not isinstance(code.parents[node], (ast.stmt, ast.keyword))
    edits.replace(begin, end, f"({text})" if not is_held and (is_loose or "\n" in text) else text)


def is_grouping(code, place):
    """Does this parenthesis only hold an expression together, and is it not that of a call?"""
    before = code.source[:place].rstrip(" ")
    word = re.search(r"\w*$", before)[0]
    return keyword.iskeyword(word) or not word and before[-1:] not in (")", "]", "}", '"', "'")


def fold_bool(code, edits, node):
    """Leave out operands that do not matter."""
    neutral = isinstance(node.op, ast.And)  # True in an `and`, False in an `or`
    kept = []
    for operand in node.values:
        truth = code.truth(operand) if is_pure(operand) else None
        if truth is neutral and (operand is not node.values[-1] or is_condition(code, node)):
            continue
        kept.append(operand)
        if truth is (not neutral):  # it decides: nothing after it is looked at
            break
    if len(kept) == len(node.values):
        return
    if len(kept) < 2:
        put(code, edits, node, kept[0] if kept else node.values[-1])
        return
    texts = [f"({code.text(operand)})" if isinstance(operand, (ast.BoolOp, ast.IfExp, ast.Lambda)) else
             code.text(operand) for operand in kept]
    edits.replace(code.begin(node), code.end(node), (" and " if neutral else " or ").join(texts))


def is_condition(code, node):
    """Does only the truth of this expression matter?"""
    parent = code.parents[node]
    is_negated = isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.Not)
    return is_negated or getattr(parent, "test", None) is node


def fold_call(code, edits, node):
    """What the values have in place of a call or subscript, or what the function that is called only gives back."""
    text = code.values.rewritten(node, code)
    if text is not None:
        edits.replace(code.begin(node), code.end(node), text)
        return
    name = getattr(getattr(node, "func", None), "id", None)
    if name not in code.giving_back:
        return
    value = code.giving_back[name]
    given = code.bound(code.definitions[name], node)
    parameter = getattr(value, "id", None)
    if given is not None and all(is_pure(one) for other, one in given.items() if other != parameter):
        put(code, edits, node, given[parameter] if parameter else value)
