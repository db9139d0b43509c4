"""Cut a Python file down to what is left of it when some of its values are known.

`folded(source, values)` repeats two passes until neither finds anything:

    fold    a branch whose condition is known stays without the condition, or goes
    prune   a function, class, method, parameter, constant, import or local that nothing uses any more goes (prune.py)

Both find places in the syntax tree and edit the text there, so what stays keeps its comments, its names and its
layout. `values` is a Values of known.py: what is known of the program, beyond what the text itself says.
"""

import ast
import re
from collections import defaultdict

from submission.edits import Edits, dedented
from submission.known import Code, Unknown, is_docstring, is_pure
from submission.prune import prune, prune_parameters

BLOCKS = ("body", "orelse", "finalbody")


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


def fold(code, edits):
    """Decide what is known."""
    for node in code.nodes:
        fold_node(code, edits, node)
        for block in BLOCKS:
            fold_block(code, edits, getattr(node, block, None))


def fold_node(code, edits, node):
    if isinstance(node, ast.If):
        fold_if(code, edits, node)
    elif isinstance(node, ast.IfExp):
        truth = code.truth(node.test)
        if truth is not None and is_pure(node.test):
            chosen = node.body if truth else node.orelse
            edits.replace(code.begin(node), code.end(node), in_parentheses(code, node, chosen))
    elif isinstance(node, ast.BoolOp):
        fold_bool(code, edits, node)
    elif isinstance(node, ast.While):
        if code.truth(node.test) is False:
            edits.remove(node)
    elif isinstance(node, ast.Assert):
        if code.truth(node.test) is True:
            edits.remove(node)
    elif isinstance(node, ast.For):
        does_nothing_each_time = is_pass(node.body) and is_pure(node.iter)
        if not node.orelse and (does_nothing_each_time or is_empty(code, node.iter)):
            edits.remove(node)
    elif isinstance(node, ast.Assign):
        fold_table(code, edits, node)
    elif isinstance(node, ast.Expr):
        if does_nothing(code, node):
            edits.remove(node)
    elif isinstance(node, (ast.Call, ast.Subscript)):
        text = code.values.rewritten(node, code)
        if text is not None:
            edits.replace(code.begin(node), code.end(node), text)


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
            first = edits.first_comment(key.lineno, key.col_offset)
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
    of_dict = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if of_dict and node.func.attr in ("items", "values", "keys"):
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
    if not isinstance(call, ast.Call):
        return False
    if not all(map(is_pure, [*call.args, *(keyword.value for keyword in call.keywords)])):
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id in empty_functions(code)
    return isinstance(call.func, ast.Attribute) and is_pure(call.func.value) and call.func.attr in empty_functions(code)


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
    is_looser = len(kept) == 1 and isinstance(kept[0], (ast.BoolOp, ast.IfExp, ast.Compare))
    if is_looser or multiline or "\n" in code.text(node):
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


def empty_functions(code):
    """Names of functions and methods of which every definition has no statement left."""
    if code.empty is None:
        bodies = defaultdict(list)
        for node in code.nodes:
            if isinstance(node, ast.FunctionDef):
                statements = [one for one in node.body if not is_docstring(one)]
                empty = not statements or is_pass(statements)
                bodies[node.name].append(empty and not node.decorator_list)
        code.empty = {name for name, empty in bodies.items() if all(empty)}
    return code.empty
