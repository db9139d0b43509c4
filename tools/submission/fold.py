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
from collections import defaultdict

from submission.edits import Edits, dedented
from submission.known import Code, Unknown, bound, is_docstring, is_pure
from submission.prune import prune, prune_parameters

BLOCKS = ("body", "orelse", "finalbody")


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
        fold_node(code, edits, node)
        if isinstance(node, ast.FunctionDef):
            if ends_in_bare_return(node):
                edits.remove(node.body[-1])
            above = code.inherited(node, node.name)
            if above is not None and has_no_statement(node) and has_no_statement(above):
                edits.remove(node)
        for block in BLOCKS:
            fold_block(code, edits, getattr(node, block, None))


def ends_in_bare_return(function):
    last = function.body[-1]
    return isinstance(last, ast.Return) and last.value is None


def fold_node(code, edits, node):
    if isinstance(node, ast.If):
        fold_if(code, edits, node)
    elif isinstance(node, ast.IfExp):
        truth = code.truth(node.test)
        if truth is not None and is_pure(node.test):
            put(code, edits, node, node.body if truth else node.orelse)
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
    elif isinstance(node, ast.With):
        if is_pass(node.body) and all(map(does_nothing_around, node.items)):
            edits.remove(node)
    elif isinstance(node, ast.AugAssign):
        if isinstance(node.op, ast.Add) and is_empty(code, node.value):
            edits.remove(node)
    elif isinstance(node, ast.Dict):
        fold_table(code, edits, name_of_table(code, node), node)
    elif isinstance(node, ast.Expr):
        if does_nothing(code, node):
            edits.remove(node)
    elif isinstance(node, (ast.Call, ast.Subscript)):
        text = code.values.rewritten(node, code)
        if text is not None:
            edits.replace(code.begin(node), code.end(node), text)
        elif isinstance(node, ast.Call):
            given = given_back(code, node)
            if given is not None:
                put(code, edits, node, given)


def does_nothing_around(item):
    """Is this what `with` enters torch.no_grad() or the like?"""
    return ast.unparse(item) in ("torch.no_grad()", "torch.enable_grad()")


def name_of_table(code, node):
    """The constant of the module that this dict is, or the function that returns it; "" for any other dict."""
    parent = code.parents[node]
    if isinstance(parent, ast.Return):
        return code.function_of(node).name
    is_constant = isinstance(parent, ast.Assign) and code.parents[parent] is code.tree
    return parent.targets[0].id if is_constant else ""


def fold_table(code, edits, name, table):
    """Leave out the entries of a dict that nothing asks for."""
    wanted = code.values.table_keys(name)
    if wanted is None:
        return
    for key, value in zip(table.keys, table.values):
        if isinstance(key, ast.Constant) and key.value not in wanted and code.source[code.end(value)] == ",":
            first = edits.first_comment(key.lineno, key.col_offset)
            if first > table.lineno:
                edits.replace(code.begins[first - 1], code.begins[value.end_lineno], "")


def fold_block(code, edits, block):
    """What comes after a return never runs; a pass beside other statements says nothing, nor does a value that the next
    statement assigns anew.
    """
    if not isinstance(block, list):
        return
    for place, statement in enumerate(block):
        if leaves(statement):
            for unreachable in block[place + 1:]:
                edits.remove(unreachable)
            return
        if isinstance(statement, ast.Pass) and len(block) > 1:
            edits.remove(statement)
        if place + 1 < len(block) and is_overwritten(statement, block[place + 1]):
            edits.remove(statement)


def is_overwritten(statement, following):
    """Does a statement assign what the following one assigns anew?"""
    if not (isinstance(statement, ast.Assign) and isinstance(following, ast.Assign)):
        return False
    target = statement.targets[0]
    reads = {node.id for node in ast.walk(following.value) if isinstance(node, ast.Name)}
    again = isinstance(target, ast.Name) and [ast.dump(target)] == list(map(ast.dump, following.targets))
    return again and len(statement.targets) == 1 and target.id not in reads and is_pure(statement.value)


def leaves(statement):
    """Does nothing after this statement of a block ever run?"""
    if isinstance(statement, ast.If):
        return bool(statement.orelse) and leaves(statement.body[-1]) and leaves(statement.orelse[-1])
    return isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break))


def is_pass(block):
    return len(block) == 1 and isinstance(block[0], ast.Pass)


def is_empty(code, node):
    """Is this iterable known to be empty?"""
    if isinstance(node, (ast.GeneratorExp, ast.ListComp)):
        return is_empty(code, node.generators[0].iter)
    if code.values.is_empty(node, code):
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in ("items", "values", "keys"):
            return is_empty(code, node.func.value)
        if code.text(node.func) == "nn.ModuleList":
            return is_empty(code, node.args[0])
    if isinstance(node, ast.Call) and code.text(node.func) in ("enumerate", "zip", "reversed", "sorted"):
        return is_empty(code, node.args[0])
    if isinstance(node, ast.Dict) and not node.keys:
        return True
    try:
        value = code.known(node)
    except Unknown:
        return False
    return isinstance(value, (tuple, list, dict, set, range)) and not value


def does_nothing(code, node):
    """Is this statement the call of a function that has nothing left in it, or that only has a result?"""
    call = node.value
    if is_empty(code, call) or code.values.is_idle(call, code):
        return True
    if not isinstance(call, ast.Call):
        return False
    if not all(map(is_pure, [*call.args, *(keyword.value for keyword in call.keywords)])):
        return False
    if code.text(call.func).startswith("super()."):
        above = code.inherited(code.function_of(call), call.func.attr)
        return above is not None and has_no_statement(above)
    if isinstance(call.func, ast.Name):
        return call.func.id in empty_functions(code) | code.values.without_effect
    return isinstance(call.func, ast.Attribute) and is_pure(call.func.value) and call.func.attr in empty_functions(code)


def given_back(code, call):
    """The argument or constant that a function of the module gives back and does nothing else, or None."""
    if not isinstance(call.func, ast.Name) or call.func.id not in code.giving_back():
        return None
    value = code.giving_back()[call.func.id]
    given = bound(code.definitions[call.func.id], call)
    parameter = getattr(value, "id", None)
    if given is None or not all(is_pure(value) for name, value in given.items() if name != parameter):
        return None
    return value if parameter is None else given.get(parameter)


LOOSE = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.Compare, ast.BinOp, ast.UnaryOp)


def put(code, edits, node, chosen):
    """A part of an expression takes the place of the whole, in parentheses only where it needs them."""
    begin, end = code.begin(node), code.end(node)
    text = code.text(chosen)
    inside_call = False
    if code.source[begin - 1] + code.source[end:end + 1] == "()":
        inside_call = not is_grouping(code, begin - 1)
        if not inside_call:
            begin, end = begin - 1, end + 1
    own_statement = isinstance(code.parents[node], (ast.Assign, ast.Return, ast.AnnAssign, ast.Expr, ast.keyword))
    needs_them = "\n" in text or isinstance(chosen, LOOSE) and not own_statement and not decides(code, node)
    if needs_them and not inside_call:
        text = f"({text})"
    edits.replace(begin, end, text)


def decides(code, node):
    """Is this the whole condition of a statement?"""
    parent = code.parents[node]
    return isinstance(parent, (ast.If, ast.While, ast.Assert)) and parent.test is node


def is_grouping(code, place):
    """Does this parenthesis only hold an expression together, and is it not that of a call?"""
    before = code.source[:place].rstrip(" ")
    word = re.search(r"\w*$", before)[0]
    return keyword.iskeyword(word) or not word and before[-1:] not in (")", "]", "}", '"', "'")


def fold_bool(code, edits, node):
    """Leave out operands that do not matter."""
    neutral = isinstance(node.op, ast.And)  # True in an `and`, False in an `or`
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
        return
    if len(kept) < 2:
        put(code, edits, node, kept[0] if kept else node.values[-1])
        return
    texts = [f"({code.text(operand)})" if isinstance(operand, (ast.BoolOp, ast.IfExp, ast.Lambda)) else
             code.text(operand) for operand in kept]
    text = (" and " if neutral else " or ").join(texts)
    if "\n" in text and code.source[code.begin(node) - 1] != "(":
        text = f"({text})"
    edits.replace(code.begin(node), code.end(node), text)


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
    """Decide an if, or an elif."""
    source = code.source
    is_elif = source[code.begin(node):].startswith("elif")
    truth = code.truth(node.test) if is_pure(node.test) else None
    indent = node.col_offset
    line_begin = code.begins[node.lineno - 1]
    line_end = code.begins[node.end_lineno]
    body_begin = code.end(node.test) + re.match(r"[\s)]*:[^\n]*\n", source[code.end(node.test):]).end()
    body_end = code.begins[node.body[-1].end_lineno]
    else_begin, else_text = rest_of(code, node, body_end)

    def become(text):
        edits.replace(line_begin, line_end, text)

    def vanish():
        if is_elif:
            become("")
        else:
            edits.remove(node)

    if truth is None:
        if is_pass(node.body) and is_pure(node.test) and not node.orelse:
            vanish()
        elif is_pass(node.body) and is_pure(node.test) and not is_elif and not starts_elif(code, node):
            become(f"{' ' * indent}if not ({code.text(node.test)}):\n{else_text}")
        elif node.orelse and is_pass(node.orelse):
            edits.replace(body_end, line_end, "")
    elif truth:
        body = source[body_begin:body_end]
        become(f"{' ' * indent}else:\n{body}" if is_elif else dedented(body, node.body[0].col_offset - indent))
    elif not node.orelse:
        vanish()
    elif starts_elif(code, node):
        text = source[else_begin:line_end]
        become(text if is_elif else text.replace("elif", "if", 1))
    elif is_elif:
        become(source[else_begin:line_end])
    else:
        become(dedented(else_text, node.orelse[0].col_offset - indent))


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
                bodies[node.name].append(has_no_statement(node))
        code.empty = {name for name, empty in bodies.items() if all(empty)}
    return code.empty


def has_no_statement(function):
    statements = [one for one in function.body if not is_docstring(one)]
    return (not statements or is_pass(statements)) and all(map(changes_nothing, function.decorator_list))


def changes_nothing(decorator):
    """Does a function with this decorator do what its statements do?"""
    return ast.unparse(decorator) == "torch.no_grad()"
