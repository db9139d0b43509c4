"""tools/submission/fold.py: a program that is cut down says what it said before, and has nothing left that it does not
use. (What is left of the trainer is in test_records.py and .ci/records.py.)"""

import ast
import contextlib
import io
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.fold import folded
from submission.known import Unknown, Values


class Given(Values):
    """`s.NAME` has these values."""

    def __init__(self, **values):
        self.values = values

    def value(self, node, world, code):
        match node:
            case ast.Attribute(value=ast.Name("s"), attr=name) if name in self.values:
                return self.values[name]
        raise Unknown


def printed(source, **values):
    """What a program prints."""
    class S:
        pass

    for name, value in values.items():
        setattr(S, name, value)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "program", "exec"), {"s": S, "__name__": "program"})
    return out.getvalue()


CASES = {
    # name: (program, what is known of s, words that must be gone, words that must stay)
    "if": ("if s.on:\n    # why\n    print(1)\nelse:\n    print(2)\n", dict(on=True), "if else 2", "why"),
    "elif": ("def f(x):\n    if x:\n        return 1\n    elif s.on:\n        return 2\n    else:\n        return 3\n"
             "print(f(0), f(1))\n", dict(on=True), "elif 3", "return"),
    "elif that never is": ("def f(x):\n    if s.on:\n        return 1\n    elif x:\n        return 2\n    return 3\n"
                           "print(f(0), f(1))\n", dict(on=False), "elif s.on", "2 3"),
    "what only the branch used": ("import os\n\n# of g\nLIMIT = 3\n\ndef g():\n    return LIMIT\n\nif s.on:\n    print(g(), os)\n"
                                  "print(0)\n", dict(on=False), "os LIMIT of g def", "0"),
    "a local": ("def f(x):\n    wide = s.width > 3\n    if wide:\n        return x + 1\n    return -x\nprint(f(2))\n",
                dict(width=4), "wide -x", "return x"),
    "what gives back what it gets": ("def f(x, y):\n    if s.on:\n        x += y\n    return x\nprint(f(2, 3))\n", dict(on=False),
                                     "def f(2, 3 y", "2"),
    "what does nothing around": (
        "class A:\n    def see(self):\n        \"\"\"Look.\"\"\"\n\nclass B(A):\n    def see(self):\n        if s.on:\n"
        "            print(1)\n\nclass C(B):\n    def see(self):\n        super().see()\n        print(2)\n\nC().see()\nB().see()\n",
        dict(on=False), "super().see()", "print(2) pass"),
    "a value that is assigned twice": ("def f():\n    x = 1\n    if s.on:\n        x = 2\n    return [x]\nprint(f())\n",
                                       dict(on=True), "1", "x = 2"),
    "a list that is always empty": (
        "def f():\n    found = [1]\n    if s.on:\n        found += [x for x in range(s.n)]\n    return found\nprint(f())\n",
        dict(on=True, n=0), "range +=", "[1]"),
    "one operand decides": ("def f(x):\n    if x is None and s.n:\n        return 1\n    return [2]\nprint(f(None))\n", dict(n=0), "if 1",
                            "return [2]"),
    "a list is filled later": ("def f():\n    found = []\n    found.append(1)\n    for x in found:\n        print(x)\nf()\n", {},
                               "", "found"),
    "a list of the module is filled later": (
        "FOUND = []\n\ndef f():\n    FOUND.append(1)\n\nf()\nfor x in FOUND:\n    print(x)\nprint(0)\n", {}, "", "for FOUND"),
    "a list of the module is filled by another": (
        "FOUND = []\n\ndef f(where):\n    where.append(1)\n\nf(FOUND)\nif FOUND:\n    print(1)\nprint(0)\n", {}, "", "if FOUND"),
    "an attribute of two classes": (
        "class A:\n    def __init__(self):\n        self.extra = None\n\n    def run(self):\n        if self.extra is not None:\n"
        "            print('extra')\n        print('A')\n\nclass B:\n    def __init__(self, x):\n        self.extra = x\n\n"
        "    def run(self):\n        print(self.extra)\n\nA().run()\nB(input).run()\n", {}, "print('extra')", "print('A') self.extra"),
    "an attribute that somebody else sets": (
        "class A:\n    def __init__(self):\n        self.extra = None\n\n    def run(self):\n        if self.extra is not None:\n"
        "            print('extra')\n        print('A')\n\na = A()\na.extra = 1\na.run()\n", {}, "", "print('extra')"),
    "an attribute that a subclass sets": (
        "class A:\n    extra = None\n\n    def run(self):\n        if self.extra is not None:\n            print('extra')\n"
        "        print('A')\n\nclass B(A):\n    def __init__(self):\n        self.extra = 1\n\nA().run()\nB().run()\n", {}, "",
        "print('extra')"),
    "a parameter": ("def f(x, deep=False):\n    if deep:\n        return 2 * x\n    return [x]\nprint(f(1), f(2, deep=s.deep))\n",
                    dict(deep=False), "deep deep:", "f(2)"),
    "a parameter that is handed on": (
        "def f(n, deep):\n    if deep:\n        print('deep')\n    if n:\n        f(n - 1, deep)\n    print(n)\nf(2, s.deep)\n",
        dict(deep=False), "print('deep')", "f(n - 1"),
    "a parameter of which calls differ": ("def f(deep):\n    if deep:\n        print(1)\n    print(2)\nf(True)\nf(False)\n", {}, "",
                                          "if deep"),
    "an attribute": ("class A:\n    def __init__(self):\n        self.extra = 1 if s.on else None\n\n    def run(self):\n"
                     "        if self.extra is not None:\n            print('extra')\n        print('run')\n\nA().run()\n",
                     dict(on=False), "extra", "run"),
    "an attribute that changes": ("class A:\n    def __init__(self):\n        self.n = 0\n\n    def run(self):\n        self.n += 1\n"
                                  "        if self.n:\n            print(self.n)\n\nA().run()\n", {}, "", "if self.n"),
    "a method that nobody calls": ("class A:\n    def run(self):\n        print(1)\n\n    # never\n    def other(self):\n"
                                   "        print(2)\n\nA().run()\n", {}, "other never", "run"),
    "and, or": ("def f(x):\n    return [(s.on and x) or (s.off and 1 / x)]\nprint(f(3))\n", dict(on=True, off=False), "s.off 1 /",
                "return"),
    "after a return": ("def f():\n    if s.on:\n        return [1]\n    print(2)\n    return 3\nprint(f())\n", dict(on=True),
                       "print(2) 3", "return [1]"),
    "a function that returns a constant": ("def f(x):\n    if s.on:\n        return 'a'\n    return x\nprint(f(2))\n", dict(on=True),
                                           "def x", "print('a')"),
    "a field that nobody reads": ("class A:\n    def __init__(self, n):\n        self.n = n\n        self.sum = 0\n\n    def run(self):\n"
                                  "        self.sum = self.n\n        if s.on:\n            print(self.sum)\n        print(self.n)\n\n"
                                  "A(2).run()\n", dict(on=False), "self.sum", "print(self.n)"),
    "a function that does nothing any more": ("def report():\n    if s.on:\n        print(1)\n\nreport()\nprint(2)\n",
                                              dict(on=False), "report", "2"),
    "a result that nobody wants": ("def f():\n    print(1)\n    return 2\n\ndef g():\n    x = f()\n    if s.on:\n        print(x)\n\n"
                                   "g()\n", dict(on=False), "x =", "f()"),
    "a line that is too long to stay": (
        "def f(first_parameter, second_parameter, third_parameter, fourth_parameter, unread_parameter):\n"
        "    return first_parameter + second_parameter + third_parameter + fourth_parameter\n"
        "print(f(1000000000000000000000, 2000000000000000000000, 3000000000000000000000, 400000000000000000, 5))\n", {},
        "unread", "fourth"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_program_says_what_it_said(case):
    source, known, gone, stays = CASES[case]
    cut = folded(source, Given(**known))
    assert printed(cut, **known) == printed(source, **known) != ""
    for word in gone.split():
        assert word not in cut.split(), cut
    assert all(word in cut for word in stays.split()), cut
    assert folded(cut, Given(**known)) == cut
    assert all(len(line) <= 100 or line in source for line in cut.splitlines())


def test_comments_layout_and_names_stay():
    source = textwrap.dedent('''
        """What it is."""

        # ---- first ----

        TABLE = {  # of squares
            1: 1,
            2: 4,
        }


        def f(x):
            """The square, or more."""
            # A reason.
            if s.on:
                # Another one,
                # of two lines.
                x = (x +
                     1)
            return TABLE[x]  # looked up


        print(f(1))
    ''').lstrip()
    cut = folded(source, Given(on=True))
    assert cut == source.replace("    if s.on:\n", "").replace(
        "        # Another one,\n        # of two lines.\n        x = (x +\n             1)\n",
        "    # Another one,\n    # of two lines.\n    x = (x +\n         1)\n")


CONDITIONS = st.recursive(
    st.sampled_from(["s.a", "s.b", "x", "y", "s.n > 2", "x is None", "s.n == 3"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda text: f"(not {text})"),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} if {parts[1]} else {parts[2]})")),
    max_leaves=6)


@st.composite
def blocks(draw, depth=0):
    """Lines of a function body that prints where it comes along."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["print", "if", "else", "elif", "for", "set"] if depth < 3 else ["print"]))
        mark = draw(st.integers(0, 99))
        if kind == "print":
            lines.append(f"print({mark}, {draw(CONDITIONS)})")
        elif kind == "set":
            lines.append(f"y = {draw(CONDITIONS)}")
        elif kind == "for":
            lines += [f"for i in range({draw(st.integers(0, 2))}):", *indented(draw(blocks(depth + 1)))]
        else:
            lines += [f"if {draw(CONDITIONS)}:", *indented(draw(blocks(depth + 1)))]
            if kind == "elif":
                lines += [f"elif {draw(CONDITIONS)}:", *indented(draw(blocks(depth + 1)))]
            if kind != "if":
                lines += ["else:", *indented(draw(blocks(depth + 1)))]
    return lines


def indented(lines):
    return [f"    {line}" for line in lines]


@given(body=blocks(), a=st.booleans(), b=st.sampled_from([None, 0, "word"]), n=st.integers(0, 4))
def test_any_program_says_what_it_said(body, a, b, n):
    calls = "".join(f"f({x}, {y})\n" for x in (0, 1, None) for y in (0, 2))
    source = f"def f(x, y):\n{chr(10).join(indented(body))}\n{calls}"
    known = dict(a=a, b=b, n=n)
    cut = folded(source, Given(**known))
    assert printed(cut, **known) == printed(source, **known)
