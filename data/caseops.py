"""CaseOps, a lossless case transform (#1729): words in lower case, operators in front that say what was a capital.

    encode("The NASA iPhone") == "\\ue001the \\ue002nasa i\\ue003phone"
    decode(encode(text)) == text    for any text

A tokenizer trained on such text spends no pieces on case variants of a word. The operators are its user-defined
symbols, so each is one token, which normalisation leaves alone. They stand for no bytes of the text: without
`byte_counts` a score would divide by 3 bytes more for each of them.
"""

import re

import numpy as np

NAME = "lossless_caps_caseops_v1"  # of the transform, as published
OPERATORS = TITLE, UPPER, NEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"  # in the order of their token ids
FROM_CAPITAL, CAPITAL = re.compile("[A-Z][A-Za-z]*"), re.compile("[A-Z]")
LITERAL = re.compile(f"[{''.join(OPERATORS)}]")
OPERATED = re.compile(f"{ESCAPE}(.?)|{UPPER}([a-z]*)|[{TITLE}{NEXT}]([a-z]?)", re.DOTALL)


def _operate(match):
    """The operators of a run of letters from its first capital on; `encode` lowers the letters."""
    letters, at = match.group(), match.start()
    if at and "a" <= match.string[at - 1] <= "z":
        return CAPITAL.sub(rf"{NEXT}\g<0>", letters)
    if letters.istitle():  # also a single capital
        return TITLE + letters
    if letters.isupper():
        return UPPER + letters
    return TITLE + letters[0] + CAPITAL.sub(rf"{NEXT}\g<0>", letters[1:])


def encode(text):
    """The text with every run of ASCII letters in lower case: a capital first letter, the only one or not, is told by
    TITLE before it, a run of two or more capitals by UPPER, every other capital by NEXT before it. An operator that is
    in the text already is escaped; everything else stays as it is.
    """
    text = FROM_CAPITAL.sub(_operate, LITERAL.sub(rf"{ESCAPE}\g<0>", text))
    return text.encode("utf-8", "surrogatepass").lower().decode("utf-8", "surrogatepass")  # of bytes: ASCII alone


def decode(text):
    """The inverse of `encode`. In a text that `encode` never makes, an operator without its letter means nothing."""
    return OPERATED.sub(lambda match: match[1] or (match[2] or match[3] or "").upper(), text)


def operator_ids(sp):
    """Ids of the operators in the vocabulary of a CaseOps tokenizer; None for any other SentencePiece processor."""
    ids = tuple(map(sp.piece_to_id, OPERATORS))
    return None if any(map(sp.is_unknown, ids)) else ids


def codec(sp):
    """(encode, decode) between a document and the text that this tokenizer takes: the identity if it is a plain one."""
    return (encode, decode) if operator_ids(sp) else (str, str)


def byte_counts(ids, tables, operators=None):
    """Bytes of the document that each token of a stream stands for, (N,) int64; the first token counts 0.

    `tables` are those of train_gpt.byte_tables, `operators` the ids of a CaseOps tokenizer: they count 0, unless
    escaped, and a letter its 1 byte in either case. So the sum over a document is the length in UTF-8 of
    decode(sp.decode(ids)): of its normalised text, as the contest counts for every tokenizer. Bytes that normalisation
    took away (a second space) no token has to predict, and none counts them.
    """
    (base, lead, edge), counts = tables, np.zeros(len(ids), np.int64)
    counts[1:] = base[ids[1:]] + (lead[ids[1:]] & ~edge[ids[:-1]])
    if operators:
        index, escaped = np.arange(len(ids)), np.zeros(len(ids), bool)
        row = index - np.maximum.accumulate(np.where(ids == operators[-1], -1, index))  # escapes in a row, up to here
        escaped[1:] = row[:-1] % 2 == 1
        counts[np.isin(ids, operators) & ~escaped] = 0
    return counts
