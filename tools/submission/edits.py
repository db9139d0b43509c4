"""Edits of a source in the places that its syntax tree names; all else keeps its layout."""


class Edits:
    """Replacements in a text. One that overlaps an earlier one waits for the next turn."""

    def __init__(self, code):
        self.code = code
        self.lines = code.source.splitlines()
        self.found = []
        self.block_of = {statement: block for block in code.blocks for statement in block}
        self.gone = set()  # statements

    def replace(self, begin, end, text):
        return self.replace_all([(begin, end, text)])

    def replace_all(self, replacements):
        """All of these, or none; were any made?"""
        spans = sorted((begin, end) for begin, end, _ in (*self.found, *replacements))
        if any(later < end for (_, end), (later, _) in zip(spans, spans[1:])):
            return False
        self.found += replacements
        return True

    def remove(self, statement):
        """Take out a statement with the comment lines that stand directly above it."""
        code = self.code
        first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", ()))])
        begin = code.begins[self.first_comment(first, statement.col_offset) - 1]
        block = self.block_of[statement]
        needs_pass = block is not code.tree.body and all(one in self.gone for one in block if one is not statement)
        stays = " " * statement.col_offset + "pass\n" if needs_pass else ""
        if self.replace(begin, code.begins[statement.end_lineno], stays):
            self.gone.add(statement)

    def first_comment(self, line, indent):
        """The first of the comment lines directly above a line; headings of sections do not belong to it."""
        while line > 1:
            above = self.lines[line - 2]
            if not above.startswith(" " * indent + "#") or above.lstrip().startswith("# ---"):
                break
            line -= 1
        return line

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
            is_deeper = len(line) - len(line.lstrip()) > len(before) - len(before.lstrip())
            opens_block = before.endswith(":") and is_deeper and not before.lstrip().startswith("#")
            most = 1 if line.startswith((" ", ")", "]", "}")) else 2
            result += [""] * (0 if opens_block else min(blank, most))
        blank = 0
        result.append(line.rstrip())
    return "\n".join(result) + "\n"


def dedented(text, by):
    """Lines with `by` blanks less before them."""
    lines = text.splitlines(keepends=True)
    return "".join(line[by:] if not line[:by].strip() else line.lstrip() for line in lines)


def listing(head, parts, tail, column, indent=None, width=100):
    """head + parts + tail in as few lines of at most `width` columns as there must be; further ones begin below the
    first part, or with `indent` all parts stand in lines of their own.
    """
    line = head + ", ".join(parts) + tail
    if "\n" in line and indent is None or "\n" not in line and column + len(line) + 1 <= width:
        return line
    lines = [head] if indent is None else [head, " " * indent]
    start = length = column + len(head) if indent is None else indent
    for text in [*(f"{part}, " for part in parts[:-1]), parts[-1] + tail]:
        if (length + len(text.rstrip()) > width or "\n" in text) and length > start:
            lines[-1] = lines[-1].rstrip()
            lines.append(" " * start)
            length = start
        lines[-1] += text
        length += len(text) if "\n" not in text else width
    return "\n".join(lines)
