# docs: docs/sandbox.md
"""Runs model-written code, which is taken for hostile.

First a text becomes Python (`python_in`), then a problem's tests run against it (`run_tests`).
Tests are trusted and run in this process, code in another: `candidate` is a stub that sends
arguments to a worker and gets back plain values. No expected value is ever within the code's
reach, so an early exit, an always-equal object, a forged verdict or a walk through frames and
memory wins nothing. What the worker's programs can not do, and by which means of the platform,
stands at `Worker`; docs/sandbox.md has it as a table, with what is not protected.
"""

import array
import ast
import builtins
import collections
import contextlib
import ctypes
import datetime
import decimal
import dis
import errno
import fractions
import functools
import gc
import glob
import inspect
import itertools
import json
import keyword
import logging
import math
import os
import queue
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import symtable
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from typing import NamedTuple

# ========================================= syntax trees =========================================
PARSER = threading.RLock()


def parse(code, name="<unknown>"):
    """The syntax tree of `code`, one thread at a time. Threads that parse at once may get a
    SystemError: Python 3.11 counts the depth of a tree in one place for all, and a collection of
    garbage lets another thread go on (CPython, issue 106905)."""
    with PARSER:
        return ast.parse(code, name)


def syntax_tree(code):
    """(syntax tree, "") of `code`, or (None, the error in one line)."""
    quiet = "ignore", None, Warning, re.compile("<response>"), 0
    if quiet not in warnings.filters:  # to add a filter makes all warnings new, that were told
        warnings.filterwarnings("ignore", module="<response>")  # safe in threads, unlike a context
    try:
        return parse(code, "<response>"), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return None, f"{type(error).__name__}: {getattr(error, 'msg', error)}"


def parses(code):
    return syntax_tree(code)[0] is not None


def functions_of(tree):
    """The functions at the top level of a tree (or of None)."""
    return [node for node in (tree.body if tree else []) if isinstance(node, ast.FunctionDef)]


def definitions(tree, name):
    """All definitions of the function `name` at the top level of a tree (or of None)."""
    return [node for node in functions_of(tree) if node.name == name]


BLANK = r"[^\S\n]"  # white space within a line


def broken_definitions(code, name):
    """Texts of what look like definitions of `name` in code that does not parse."""
    pattern = rf"^def{BLANK}+{name}{BLANK}*\(.*(?:\n(?:[ \t].*)?)*"
    return re.findall(pattern, code, re.MULTILINE)


def is_defined(code, name):
    """Whether `code` defines function `name`; by its lines where it does not parse."""
    tree, _ = syntax_tree(code)
    return bool(definitions(tree, name) if tree else broken_definitions(code, name))


def returns_value(code, name):
    """Whether `code` defines function `name` with a `return` of a value; by its lines where it
    does not parse."""
    tree, _ = syntax_tree(code)
    if tree:
        nodes = [node for found in definitions(tree, name)[-1:] for node in ast.walk(found)]
        return any(isinstance(node, ast.Return) and node.value for node in nodes)
    value = re.compile(rf"(?:^{BLANK}|:){BLANK}*return\b{BLANK}*[^\s#;]", re.MULTILINE)
    return any(value.search(text) for text in broken_definitions(code, name))


def without_function(code, name):
    """`code` with blank lines where it defines `name`, or imports it and nothing else."""
    tree, _ = syntax_tree(code)
    imports = [
        node
        for node in (tree.body if tree else [])
        if isinstance(node, ast.ImportFrom) and all(alias.name == name for alias in node.names)
    ]
    lines = code.split("\n")
    for node in definitions(tree, name) + imports:
        decorators = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        first = min([node.lineno, *decorators]) - 1
        lines[first : node.end_lineno] = [""] * (node.end_lineno - first)
    return "\n".join(lines)


class Use(NamedTuple):
    """How a function uses another."""

    calls: bool
    wraps: bool  # it is no more than a call of it
    wastes: bool  # some call stands as a statement, its value thrown away


def use_of(function, name):
    """How a function's definition uses the function `name`, by its syntax tree."""

    def is_call(node):
        is_name = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return is_name and node.func.id == name

    docstring = ast.get_docstring(function) is not None
    match function.body[docstring:]:
        case [ast.Return(value)]:
            wraps = is_call(value)
        case [ast.Assign([ast.Name(made), *_], value), ast.Return(ast.Name(returned))]:
            wraps = is_call(value) and made == returned
        case [ast.AnnAssign(ast.Name(made), _, value), ast.Return(ast.Name(returned))]:
            wraps = is_call(value) and made == returned
        case _:
            wraps = False
    nodes = list(ast.walk(function))
    wastes = any(isinstance(node, ast.Expr) and is_call(node.value) for node in nodes)
    return Use(any(map(is_call, nodes)), wraps, wastes)


# =================================== Python in a model's text ===================================
THOUGHT = r"(?:think|thinking|thought|thoughts|reasoning)"
THOUGHT_ENDS = re.compile(
    rf"</{THOUGHT}>|\[/THINK\]|<\|channel\|>final<\|message\|>|<\|begin_of_solution\|>",
    re.IGNORECASE,
)
THOUGHT_BEGINS = re.compile(rf"<{THOUGHT}>|\[THINK\]", re.IGNORECASE)
SPECIAL_TOKEN = re.compile(r"<\|[^<>|\n]*\|>|<｜[^<>｜\n]*｜>|</?s>|<(?:eos|pad|end_of_turn)>")
# tags that models put around code in the place of a fence
CODE_TAG = re.compile(
    r"^[ \t]*(?:(?:<(?:code|python|pre)(?: [^<>\n]*)?>)+|\[PYTHON\])", re.IGNORECASE | re.MULTILINE
)
CODE_TAG_END = re.compile(
    r"(?:(?:</(?:code|python|pre)>)+|\[/PYTHON\])[ \t]*$", re.I | re.MULTILINE
)

PYTHON = frozenset("python py python3 py3 python2 ipython ipython3 pycon pyi sage".split())
OTHER_LANGUAGES = frozenset(
    """bash sh shell zsh fish console terminal cmd bat powershell ps1 shellsession text txt plain
    plaintext output out result results stdout log logs error traceback json yaml yml toml ini xml
    html css js javascript ts typescript java c cpp c++ cs csharp go rust ruby php swift kotlin sql
    r julia matlab lua perl scala haskell diff patch csv latex tex math mermaid dot makefile make
    dockerfile http""".split()
)
NESTING = frozenset(["markdown", "md"])
FENCE_LEAD = r"[ \t]*(?:(?:>|[-*+•]|\d+[.)])[ \t]*)*"  # indentation, quotes and list marks
FENCE = re.compile(rf"^(?P<lead>{FENCE_LEAD})(?P<mark>`{{3,}}|~{{3,}})[ \t]*(?P<label>[^`\n]*)$")
ONE_LINE_FENCE = re.compile(r"```([^`\n]+)```")
LABEL = re.compile(r"(?:python3?|py)(?:\b|(?=(?:def|class|import|from)\b))[ \t]*", re.I)
QUOTES_AS_FENCE = re.compile(
    r"^('''|\"\"\")(?:python3?|py)[ \t]*\n(.*?)^\1[ \t]*$", re.I | re.MULTILINE | re.DOTALL
)
BACKTICKS = re.compile(r"^`(?=(?:def|class|import|from|@))([^`]+)`[ \t]*$", re.MULTILINE)
ODD_MARGIN = re.compile(r"^[ \t]*[\u00a0\u200b\ufeff][ \t\u00a0\u200b\ufeff]*", re.MULTILINE)
PLAIN_SPACE = {0xA0: " ", 0x200B: "", 0xFEFF: ""}
GLUED_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?$", re.I)


class Block(NamedTuple):
    """A part of a text, as its fences divide it."""

    text: str
    label: str  # what the opening fence says, in lower case
    fenced: bool
    closed: bool


def python_in(text, wanted=()):
    """Python code of a model's text, as a careful reader would take it.

    wanted: the functions that were asked for. Of fenced blocks, those that parse and hold the last
    complete definition of a wanted function, or of a name that these read; no output, shell, usage
    or superseded draft. A block that does not parse stays if only it defines a wanted function.
    Without fences, the text without its lines of prose. Code that is indented as a whole is
    shifted to the left; thinking is no answer."""
    text = answer_of(text)
    blocks = split_blocks(text)
    if not any(block.fenced for block in blocks):
        return without_cut_end(unfenced_code(text), wanted)
    pieces = []
    for block, before in zip(blocks, [None, *blocks]):
        pieces += pieces_of(block, before, pieces, wanted)
    whole = "\n".join(block.text for block in blocks if block.fenced and is_python(block))
    if not all(is_complete(pieces, name) for name in wanted):
        tree, _ = syntax_tree(whole)  # a function in several blocks
        if tree and all(definitions(tree, name) for name in wanted):
            return whole
    return "\n\n".join(piece.code for piece in chosen(pieces, wanted))


def answer_of(text):
    """A text without thinking and special tokens, with line ends of one kind."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    *_, start = [0, *(end.end() for end in THOUGHT_ENDS.finditer(text))]
    text = text[start:]
    if begin := THOUGHT_BEGINS.search(text):  # it never ends: no answer follows
        text = text[: begin.start()]
    text = SPECIAL_TOKEN.sub("", text)
    text = ODD_MARGIN.sub(lambda margin: margin[0].translate(PLAIN_SPACE), text)
    text = BACKTICKS.sub(r"\1", text)
    text = QUOTES_AS_FENCE.sub(r"```python\n\2```", text)
    if CODE_TAG.search(text):
        text = CODE_TAG.sub("```python\n", text)
        text = CODE_TAG_END.sub("\n```", text)
    return text


# -------------------------------------------- fences --------------------------------------------
def split_blocks(text):
    """The blocks of a text, fenced and not, in order."""
    lines = [part for line in text.split("\n") for part in unglued(line)]
    fences = [FENCE.match(line) for line in lines]
    blocks, part = [], []
    opening = None  # the fence of the block that `part` is in

    def finish(fenced, closed=True):
        block = "\n".join(part)
        if fenced or block.strip():
            label = language(opening["label"]) if opening else ""
            blocks.append(Block(block, label, fenced, closed))
        part.clear()

    for number, (line, fence) in enumerate(zip(lines, fences)):
        label = language(fence["label"]) if fence else ""
        if opening and fence and closes(fence, label, opening, part):
            finish(fenced=True)
            opening = None
            if not label:
                continue
        if opening:
            part.append(without_quote(line, opening["lead"]))
        elif not fence or in_string(part, lines[number + 1 :]):
            part.append(line)
        elif not label and is_stray(part, fences[number + 1 :]):
            part[:] = [unfenced_code("\n".join(part))]
            finish(fenced=True)
        else:
            finish(fenced=False)
            opening = fence
            if rest := code_after_label(fence["label"]):
                part.append(rest)
    finish(fenced=opening is not None, closed=False)
    return blocks


def unglued(line):
    """The lines of a line: fences that share it with text get one of their own."""
    if "```" not in line:
        return [line]
    for found in ONE_LINE_FENCE.finditer(line):
        code = without_label(found[1])
        if parses(code) and re.search(r"\b(?:def|class|import|lambda)\b", code):
            before, after = line[: found.start()], line[found.end() :]
            return [before, "```python", code, "```", *unglued(after)]
    glued = GLUED_FENCE.search(line.rstrip())
    before = line[: glued.start()] if glued else ""
    if before.strip(" \t`~>") and "```" not in before:
        return [before, glued[0]]
    return [line]


def language(label):
    """The language that a fence names: "python", "bash", ...; "" if it names none."""
    words = re.findall(r"[\w+#]+", label.lower())
    word = words[0] if words else ""
    if word in PYTHON or re.fullmatch(r"python[\d_]*", word):
        return "python"
    if word in OTHER_LANGUAGES or word in NESTING:
        return word
    return "other" if len(words) == 1 else ""  # several: a sentence after the fence


def without_label(text):
    """What stands in the line of an opening fence after the language, if that is Python."""
    text = text.strip()
    return text[label.end() :] if (label := LABEL.match(text)) else text


def code_after_label(label):
    """Code that stands in the line of its opening fence."""
    code = without_label(label)
    return code if re.match(r"(?:def|class|import|from|@)\b", code) and " " in code else ""


def open_string(part):
    """The quotes of a string that lines of code have begun and not ended, or ""."""
    text = "\n".join(part)
    return next((mark for mark in ('"""', "'''") if text.count(mark) % 2), "")


def in_string(part, later):
    """Whether what follows unfenced lines is within a string: one is begun, and ended later."""
    mark = open_string(part)
    return mark != "" and any(mark in line for line in later)


def closes(fence, label, opening, part):
    """Whether a fence ends the block of `opening`; a language begins the next one at once."""
    if fence["mark"][0] != opening["mark"][0] or open_string(part):
        return False
    if label:
        return label == "python" or label in OTHER_LANGUAGES
    return len(fence["mark"]) >= len(opening["mark"])


def is_stray(part, later):
    """Whether a fence without an opening one ends the text in `part`: that defines something, and
    no fence follows that would end the block which this one opens."""
    following = next((fence for fence in later if fence), None)
    closing = following is not None and not language(following["label"])
    code = unfenced_code("\n".join(part))
    return not closing and re.search(r"^(?:def|class)\b", code, re.MULTILINE) is not None


def without_quote(line, lead):
    """A line of a block whose fence stood in a quotation, without the quotation's mark."""
    return re.sub(r"^[ \t]*>[ \t]?", "", line) if ">" in lead else line


# ------------------------------------ blocks to take, or not ------------------------------------
WARNING_LENGTH = 200  # characters: the search takes time quadratic in them
WARNING = re.compile(
    r"(?:^|[.!?]\s+)\W*(?:avoid|wrong|incorrect|bad|never|do not|don['’]t)\b[^.!?\n]*:\W*\Z",
    re.I | re.MULTILINE,
)


class Piece(NamedTuple):
    """A block that may be part of the answer."""

    code: str
    tree: ast.Module | None  # None: it does not parse
    rank: int  # 0: of a Python or unnamed fence; 1: without a fence; 2: another language, a warning


def is_python(block):
    return block.label not in OTHER_LANGUAGES and block.label not in NESTING


def is_complete(pieces, name):
    return any(name in names_defined(piece, complete=True) for piece in pieces)


def is_warned_of(before):
    """Whether the text before a block ends with a sentence as "Avoid this:"."""
    if before is None or before.fenced:
        return False
    return WARNING.search(before.text.rstrip()[-WARNING_LENGTH:]) is not None


def pieces_of(block, before, earlier, wanted):
    """The pieces in a block: one, or none. before: the block before it, or None; earlier: the
    pieces before it."""
    if block.label in NESTING:
        return []
    if not block.fenced:
        code, rank = unfenced_code(block.text), 1
    else:
        other = block.label in OTHER_LANGUAGES or is_warned_of(before)
        code, rank = fenced_code(block), 2 if other else 0
    if block.fenced and not block.closed:
        whole = "\n".join(piece.code for piece in earlier if piece.tree)
        code = without_cut_end(code, wanted, whole)
    tree, _ = syntax_tree(code)
    if not code.strip() or (rank and not tree):
        return []
    return [Piece(code, tree, rank)]


def fenced_code(block):
    """Code of a fenced block: itself, or what is left when the marks of a Python session, a
    language's name in the first line or, without a closing fence, prose are gone."""
    text = block.text
    first, _, rest = text.strip("\n").partition("\n")
    if first.strip().lower() in PYTHON:
        text = rest
    tries = [text, shifted(text), session_code(text), without_drafts(shifted(text))]
    if not block.closed or not block.label:
        tries.append(unfenced_code(text))
    return next((code for code in tries if code is not None and parses(code)), shifted(text))


def shifted(code):
    """`code` moved left by the indentation of its first line; where only that line has none (it
    was stripped with the text), by what the others share."""
    lines = code.split("\n")
    first = next((line for line in lines if line.strip()), "")
    margin = first[: len(first) - len(first.lstrip())]
    if margin:
        return "\n".join(line.removeprefix(margin) for line in lines)
    if parses(code):
        return code
    rest = lines[lines.index(first) + 1 :]
    margins = {line[: len(line) - len(line.lstrip())] for line in rest if line.strip()}
    margin = min(margins, key=len, default="")
    moved = "\n".join([first, *(line.removeprefix(margin) for line in rest)])
    return moved if parses(moved) else code


def session_code(text):
    """Code of a Python session that defines something (>>> and ... gone, output too), or None."""
    marked = re.findall(r"^[ \t]*(?:>>>|\.\.\.)(?: (.*)|)$", text, re.MULTILINE)
    code = "\n".join(marked)
    return code if re.search(r"^(?:def|class)\b", code, re.MULTILINE) else None


def chosen(pieces, wanted):
    """The pieces that make up the answer, in order."""
    if not wanted or not any(provider(pieces, name) for name in wanted):
        first = [piece for piece in pieces if piece.rank == 0]
        good = [piece for piece in first if piece.tree]
        return good or first
    if len(pieces) == 1:
        return pieces
    taken, names, seen = [], list(wanted), set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        piece = provider(pieces, name)
        if piece and not any(piece is other for other in taken):
            taken.append(piece)
            names += functions_in(piece) | global_reads(piece)
    return [piece for piece in pieces if any(piece is other for other in taken)]


def provider(pieces, name):
    """The piece that defines `name`: the last complete function of the best rank; else what else
    binds it; else the last sketch of it; else a piece that would define it if it parsed."""

    def define(how, rank):
        return [piece for piece in pieces if piece.rank == rank and how(piece)]

    def function(piece):
        return complete(piece) and name in functions_in(piece)

    def complete(piece):
        return name in names_defined(piece, complete=True)

    def sketched(piece):
        return name in names_defined(piece, complete=False)

    def broken(piece):
        return piece.tree is None and broken_definitions(piece.code, name)

    for how, rank in itertools.product((function, complete, sketched, broken), range(3)):
        if found := define(how, rank):
            return found[-1]
    return None


def is_sketch(function):
    """Whether a function has no body yet: a docstring, pass, ..., raise NotImplementedError."""

    def is_empty(node):
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        raised = names_read(node) if isinstance(node, ast.Raise) else set()
        refusal = bool(raised & {"NotImplemented", "NotImplementedError"})
        return constant or refusal or isinstance(node, ast.Pass)

    return all(map(is_empty, function.body))


def names_defined(piece, complete):
    """Names that the top level of a piece binds; if complete, without sketches of functions."""
    names = set()
    for node in piece.tree.body if piece.tree else []:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names |= set() if complete and is_sketch(node) else {node.name}
        elif isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            parts = ast.walk(node)
            names |= {
                n.id for n in parts if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }
    return names


def functions_in(piece):
    return {node.name for node in functions_of(piece.tree)}


def global_reads(piece):
    """Names that a piece reads and that are no locals of its functions."""
    try:
        tables = [symtable.symtable(piece.code, "<response>", "exec")] if piece.tree else []
    except (SyntaxError, RecursionError, MemoryError):
        return set()
    names, top = set(), tables[:1]
    for table in tables:
        tables += table.get_children()
        for symbol in table.get_symbols():
            free = symbol.is_global() or table in top
            if free and symbol.is_referenced() and not hasattr(builtins, symbol.get_name()):
                names.add(symbol.get_name())
    return names


# ------------------------------------- text without fences --------------------------------------
WORDS = re.compile(r"(?:[`*]*\w[\w'’-]*[`*]*[,;:.!?]*(?:\s+|$))+")  # with only spaces between
KEYWORDS = frozenset([*keyword.kwlist, "match", "case"])
BULLET = re.compile(r"^\s*(?:[-*>•]+|\d+[.)]|#{2,})\s+")
BOLD = re.compile(r"\*\*[^*\n]+\*\*:?(?![\w({\[])")  # at the start of a line no Python
TAG = re.compile(r"</?\w+>|(?:```|~~~).*|[-=_*]{3,}|`+")
ASSIGNMENT = re.compile(r"[\w.]+(?:\[.*?\])?(?:\s*,\s*[\w.]+)*\s*(?::[^=]*)?[-+*/|&%@]?=(?!=)")
SAME_LINE = re.compile(r"^[^\n:#'\"()]{1,60}:[ \t]+(?=(?:def|class)[ \t]+\w+)")
MARKED_DEF = re.compile(r"^(?:\s*(?:[-*•]|\d+[.)])[ \t]+)(?=def[ \t]+\w+[ \t]*\(.*:[ \t]*$)")
BOLD_DEF = re.compile(r"^\*\*((?:def|class)[ \t].*:)\*\*[ \t]*$")
QUOTATION = re.compile(r"(?:[ \t]*>(?!>)[^\n]*\n|[ \t]*\n)+")
INLINE_CODE = re.compile(r"^(\s*)(`{1,2})([^`]+)\2\s*$")


def is_prose(line):
    """Whether a line is natural language: a tag, a rule, a bold heading, a lone word, or two words
    in a row that no keyword explains."""
    text = BULLET.sub("", line).strip()
    if TAG.fullmatch(text) or BOLD.match(text):
        return True
    run = WORDS.match(text)
    words = run[0].split() if run else []
    if not words or words[0].strip("`*:") in KEYWORDS:
        return False
    whole = len(run[0]) == len(text)
    if whole and (text[-1] in ":.!?" or (len(words) == 1 and line.isalpha())):
        return True
    plain = [word.rstrip(",;:.!?") not in KEYWORDS for word in words]
    pairs = [plain[i] and plain[i + 1] for i in range(len(words) - 1)]
    return any(pair and word[-1] not in ",;:.!?" for pair, word in zip(pairs, words))


def unfenced_code(text):
    """Code of a text without fences: without its lines of prose, moved to the left margin."""
    if QUOTATION.fullmatch(text + "\n"):
        text = re.sub(r"^[ \t]*> ?", "", text, flags=re.MULTILINE)
    lines, quoted = [], False  # quoted: inside a string of several lines
    for line in text.split("\n"):
        if inline := INLINE_CODE.match(line):
            line = inline[1] + inline[3]
        if not quoted:
            line = BOLD_DEF.sub(r"\1", SAME_LINE.sub("", line))
            line = MARKED_DEF.sub(lambda mark: " " * len(mark[0]), line)
        if quoted or not is_prose(line):
            lines.append(line)
            quoted ^= (line.count('"""') + line.count("'''")) % 2 == 1
    code = shifted("\n".join(lines))
    if not parses(code):
        code = without_drafts(shifted(without_talk(code)))
    return without_idle(code)


def chunks(code):
    """The top-level statements of code that may not parse, as lists of lines."""
    found, quoted = [[]], False
    for line in code.split("\n"):
        continues = re.match(r"[\s)\]}#]|$|(?:else|elif|except|finally)\b", line)
        decorated = found[-1] and all(part.startswith("@") for part in found[-1])
        if not quoted and not continues and not decorated:
            found.append([])
        found[-1].append(line)
        quoted ^= (line.count('"""') + line.count("'''")) % 2 == 1
    return [chunk for chunk in found if chunk]


def is_talk(line):
    """Whether a line of code that does not parse is no Python, not even broken: it neither parses
    nor begins with a keyword nor assigns; or it is an item of a list."""
    text = line.strip()
    if not text or parses(text):
        return False
    if BULLET.match(line):
        return text.count("(") == text.count(")")
    word = re.match(r"\w*", line)[0]
    if word in KEYWORDS:  # a line of a sentence may begin with one
        return not text.endswith(":") and is_prose(text.removeprefix(word))
    return not (ASSIGNMENT.match(line) or re.match(r"[\s@)\]}#\"']", line))


def without_talk(code):
    kept = []
    for head, *body in chunks(code):
        multi_line_call = any(line.startswith((")", "]", "}")) for line in body)
        if not is_talk(head) or multi_line_call:
            kept.append(head)
        kept += [line for line in body if not (BULLET.match(line) and is_talk(line))]
    return "\n".join(kept)


def without_drafts(code):
    """`code` without definitions that do not parse where another of the same name does."""
    if parses(code):
        return code
    texts = ["\n".join(chunk) for chunk in chunks(code)]
    names = [re.match(r"(?:@.*\n)*def\s+(\w+)|", text)[1] for text in texts]
    whole = {name for name, text in zip(names, texts) if name and parses(text)}
    kept = [text for name, text in zip(names, texts) if name not in whole or parses(text)]
    return "\n".join(kept)


def without_cut_end(code, wanted, before=""):
    """`code`, the end of a text, without its last statement if the text was cut off in that: it
    does not parse, or is a function that the code before it ends with a `return` and it does not.
    What only it defines stays, if wanted."""
    *above, last = ["\n".join(chunk) for chunk in chunks(code)] or [""]
    above = "\n".join(above)
    name = "".join(re.findall(r"\A(?:@.*\n)*def\s+(\w+)", last))
    tree, _ = syntax_tree(f"{before}\n{above}")
    whole = definitions(tree, name)[-1:]
    if parses(last):
        again = definitions(syntax_tree(last)[0], name)
        both = whole and again
        cut = both and ends_with_value(whole[0].body) and not ends_with_value(again[-1].body)
    else:
        kept = functions_of(tree) and (whole or name not in wanted)
        cut = kept and not last.startswith("return")
    return above if cut else code


def ends_with_value(body):
    """Whether the statements of a function end with a `return` of a value, whatever happens."""
    match body[-1]:
        case ast.Return(value):
            return value is not None
        case ast.If(_, then, [_, *_] as otherwise):
            return ends_with_value(then) and ends_with_value(otherwise)
        case ast.With() | ast.Try() as block:
            return ends_with_value(block.body)
        case ast.While(ast.Constant()) | ast.Raise() | ast.Match():
            return True
    return False


def without_idle(code):
    """`code` without top-level statements that do nothing, or only in a sentence's place: "Time:
    O(n)" is Python too."""
    tree, _ = syntax_tree(code)
    if tree is None:
        return code
    known = names_defined(Piece(code, tree, 0), complete=False) | set(dir(builtins)) | {"aux"}

    def is_idle(node):
        if isinstance(node, ast.AnnAssign):  # "Input: n = 4"
            return node.value is None or getattr(node.target, "id", "").istitle()
        if isinstance(node, ast.Assign):  # "Sum = n(n+1)/2"
            calls = [part.func for part in ast.walk(node.value) if isinstance(part, ast.Call)]
            strange = any(isinstance(f, ast.Name) and f.id not in known for f in calls)
            return strange and getattr(node.targets[0], "id", "").istitle()
        if not isinstance(node, ast.Expr) or isinstance(node.value, ast.Constant):
            return False
        call = node.value
        if not isinstance(call, ast.Call):
            return not isinstance(call, (ast.Await, ast.Yield, ast.NamedExpr, ast.ListComp))
        return isinstance(call.func, ast.Name) and call.func.id not in known

    lines = code.split("\n")
    for node in tree.body:
        if is_idle(node):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


# ====================================== values that cross =======================================
class Record(tuple):
    """A named tuple of a program: a tuple whose fields have names."""

    def __getattr__(self, name):
        fields = vars(self).get("_fields", ())
        if name not in fields:
            raise AttributeError(name)
        return self[fields.index(name)]


class Match:
    """What a test may ask of a program's `re.Match`; like that, it is equal to itself alone."""

    def __init__(self, string, spans, names):
        self.string, self.spans, self.names = string, spans, names

    def span(self, group=0):
        return self.spans[self.names.get(group, group)]

    def start(self, group=0):
        return self.span(group)[0]

    def end(self, group=0):
        return self.span(group)[1]

    def __getitem__(self, group):
        start, end = self.span(group)
        return None if start < 0 else self.string[start:end]

    def group(self, *groups):
        found = tuple(self[group] for group in groups or (0,))
        return found if len(found) > 1 else found[0]

    def groups(self, default=None):
        found = [self[group] for group in range(1, len(self.spans))]
        return tuple(default if text is None else text for text in found)

    def groupdict(self, default=None):
        return {name: default if self[name] is None else self[name] for name in self.names}


class CannotPass(BaseException):
    """A value is none that may cross. No `except Exception` of a program or test catches it."""


class Wire:
    """How values cross: as JSON in which each value names its kind, one message a line.

    Both sides run this code, and neither evaluates or unpickles anything. What the trusted side
    gets is rebuilt from plain data as exactly a builtin, or a data class of the standard library:
    no method of the program's comes with it. What it may cost is bounded: the bytes of a message,
    its depth, equal hashes, digits. A subclass crosses as its base, and an iterator as one over
    the list of what it yields, which equals no list, as in one process.
    """

    LIMIT = 1 << 20  # bytes of a message
    DEPTH = 100  # containers within each other
    COLLISIONS = 100  # equal hashes: a set of many takes quadratic time, here or in a test
    DIGITS = 10_000  # of a Fraction or Decimal, exponent included: their arithmetic is slow

    @staticmethod
    def read_fraction(text):
        if len(text) > Wire.DIGITS:
            raise ValueError("cannot pass so long a Fraction")
        top, bottom = text.split("/")
        return fractions.Fraction(int(top, 16), int(bottom, 16))

    @staticmethod
    def read_decimal(text):
        if len(text) > Wire.DIGITS:
            raise ValueError("cannot pass so long a Decimal")
        value = decimal.Decimal(text)
        if value.is_finite() and abs(value.adjusted()) > Wire.DIGITS:
            raise ValueError("cannot pass so long a Decimal")
        return value

    @staticmethod
    def read_timedelta(text):
        days, seconds, microseconds = map(int, text.split(","))
        return datetime.timedelta(days, seconds, microseconds)

    @staticmethod
    def hashable(values):
        """`values`, to be hashed by a set or dict; ValueError if many have the same hash."""
        values = list(values)
        if len(values) > Wire.COLLISIONS + len(set(map(hash, values))):
            raise ValueError("cannot pass so many equal hashes")
        return values

    @staticmethod
    def read_dict(pairs):
        Wire.hashable(key for key, _ in pairs)
        return dict(pairs)

    @staticmethod
    def read_range(items):
        """The range of these items; sent item by item, it can not be longer than its message."""
        step = items[1] - items[0] if len(items) > 1 else 1
        values = range(items[0], items[-1] + step, step) if items else range(0)
        if len(values) != len(items) or list(values) != items:
            raise ValueError("no range")
        return values

    @staticmethod
    def read_counter(pairs):
        counts = collections.Counter()
        dict.update(counts, Wire.read_dict(pairs))
        return counts

    @staticmethod
    def read_defaultdict(parts):
        factories = {
            kind.__name__: kind for kind in (int, float, str, list, set, dict, tuple, bool)
        }
        return collections.defaultdict(factories.get(parts[0]), Wire.read_dict(parts[1:]))

    @staticmethod
    def read_record(parts):
        fields, *values = parts
        record = Record(values)
        record._fields = tuple(fields)
        return record

    @staticmethod
    def read_match(parts):
        string, names, *spans = parts
        return Match(string, [(int(start), int(end)) for start, end in spans], dict(names))

    @staticmethod
    def type_name(cls):
        if Wire.TYPES.get(cls.__name__) is not cls:
            raise CannotPass("cannot pass a class of its own")
        return cls.__name__

    @staticmethod
    def letter_of(value):
        """The kind of a value; CannotPass."""
        cls = type(value)  # what it is, not what its `__class__` says
        if cls in Wire.LETTERS:
            return Wire.LETTERS[cls]
        if issubclass(cls, tuple) and hasattr(cls, "_fields"):
            return Wire.LETTERS[Record]
        for kind, letter in Wire.LETTERS.items():
            if issubclass(cls, kind):
                return letter
        name = "class of its own" if cls.__module__ == "program" else cls.__name__
        raise CannotPass(f"cannot pass a {name}")

    @staticmethod
    def encode(value, depth=DEPTH):
        """JSON tree of a value; CannotPass if it is none of the kinds, too deep or too long."""
        if value is None or isinstance(value, (bool, float)):
            return value
        if depth == 0:
            raise CannotPass("cannot pass so deep a value")
        letter = Wire.letter_of(value)
        if letter in Wire.ATOMS:
            return letter + Wire.ATOMS[letter][1](value)
        parts = Wire.CONTAINERS[letter][1](value)
        # An iterator may have no end; more items than this, at 4 bytes or more, can not pass
        items = itertools.islice(parts, Wire.LIMIT // 4)
        return [letter, *(Wire.encode(item, depth - 1) for item in items)]

    @staticmethod
    def decode(tree, hashes, depth=DEPTH + 1):
        """Value of an untrusted tree, of the kinds above; an Exception if `encode` writes no such.
        `hashes` gets those of its atoms, by their text."""
        if tree is None or isinstance(tree, (bool, float)):
            return tree
        if depth == 0:
            raise ValueError("cannot pass so deep a value")
        if isinstance(tree, str):
            value = Wire.ATOMS[tree[0]][2](tree[1:])
            hashes[tree] = hash(value)
            return value
        items = [Wire.decode(item, hashes, depth - 1) for item in tree[1:]]
        return Wire.CONTAINERS[tree[0]][2](items)

    @staticmethod
    def mutable(args, kwargs):
        """The arguments that a call may change in place."""
        kinds = (list, dict, set, bytearray, collections.deque)
        return [value for value in (*args, *kwargs.values()) if isinstance(value, kinds)]

    @staticmethod
    def pack(*message):
        """The line of a message; CannotPass."""
        line = json.dumps(Wire.encode(message), separators=(",", ":")).encode() + b"\n"
        if len(line) > Wire.LIMIT:
            raise CannotPass(f"cannot pass a value of {len(line)} bytes")
        return line

    @staticmethod
    def receive(sock, deadline=None):
        """The next message; TimeoutError at the deadline (monotonic seconds), or an Exception."""
        data = b""
        while not data.endswith(b"\n"):
            if deadline:  # for the message as a whole: a slow drip gains no time
                sock.settimeout(max(1e-6, deadline - time.monotonic()))
            part = sock.recv(1 << 16)
            data += part
            if not part or len(data) > Wire.LIMIT:
                raise EOFError
        hashes = {}
        message = Wire.decode(json.loads(data, parse_int=str), hashes)
        Wire.hashable(hashes.values())
        return message

    TYPES = {
        kind.__name__: kind
        for kind in (bool, bytes, complex, dict, float, int, list, set, str, tuple, type(None))
    }
    # kinds by their letter: (class, how it is taken apart, how it is built of untrusted parts);
    # a subclass stands before its base
    ATOMS = {
        "s": (str, str.__str__, str),
        "i": (int, hex, lambda text: int(text, 16)),
        "b": (bytes, bytes.hex, bytes.fromhex),
        "c": (complex, complex.__repr__, complex),
        "F": (fractions.Fraction, lambda x: f"{x.numerator:x}/{x.denominator:x}", read_fraction),
        "D": (decimal.Decimal, decimal.Decimal.__str__, read_decimal),
        "W": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
        "Y": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
        "h": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
        "p": (
            datetime.timedelta,
            lambda x: f"{x.days},{x.seconds},{x.microseconds}",
            read_timedelta,
        ),
        "T": (type, lambda x: Wire.type_name(x), lambda name: Wire.TYPES[name]),
    }
    CONTAINERS = {
        "l": (list, list.__iter__, list),
        "N": (Record, lambda x: (x._fields, *x), read_record),
        "t": (tuple, tuple.__iter__, tuple),
        "O": (
            collections.OrderedDict,
            collections.OrderedDict.items,
            lambda pairs: collections.OrderedDict(Wire.read_dict(pairs)),
        ),
        "C": (collections.Counter, dict.items, read_counter),
        "E": (
            collections.defaultdict,
            lambda x: (getattr(x.default_factory, "__name__", ""), *dict.items(x)),
            read_defaultdict,
        ),
        "d": (dict, dict.items, read_dict),
        "S": (set, set.__iter__, lambda items: set(Wire.hashable(items))),
        "f": (frozenset, frozenset.__iter__, lambda items: frozenset(Wire.hashable(items))),
        "q": (
            collections.deque,
            lambda x: (x.maxlen, *x),
            lambda parts: collections.deque(parts[1:], parts[0]),
        ),
        "y": (bytearray, lambda x: [bytes(x)], lambda parts: bytearray(b"".join(parts))),
        "a": (
            array.array,
            lambda x: (x.typecode, *x),
            lambda parts: array.array(parts[0], parts[1:]),
        ),
        "r": (range, range.__iter__, read_range),
        "k": (type({}.keys()), iter, lambda keys: dict.fromkeys(Wire.hashable(keys)).keys()),
        "v": (type({}.values()), iter, lambda values: dict(enumerate(values)).values()),
        "x": (type({}.items()), iter, lambda pairs: Wire.read_dict(pairs).items()),
        "m": (re.Match, lambda x: (x.string, dict(x.re.groupindex), *x.regs), read_match),
        "I": (collections.abc.Iterator, iter, iter),
    }
    LETTERS = {
        **{kind: letter for letter, (kind, _, _) in ATOMS.items()},
        **{kind: letter for letter, (kind, _, _) in CONTAINERS.items()},
    }


# ========================================= the far side =========================================
class Kernel:
    """Numbers of Linux' interface, by their names in its headers."""

    # namespaces: unshare, clone
    CLONE_NEWNS = 0x00020000
    CLONE_NEWIPC = 0x08000000
    CLONE_NEWUSER = 0x10000000
    CLONE_NEWPID = 0x20000000
    CLONE_NEWNET = 0x40000000
    # mount, umount2, mount_setattr
    MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
    MNT_DETACH = 2
    MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
    AT_FDCWD = -100
    AT_RECURSIVE = 0x8000
    # prctl
    PR_SET_PDEATHSIG = 1
    PR_SET_DUMPABLE = 4
    PR_SET_SECCOMP = 22
    PR_SET_CHILD_SUBREAPER = 36
    PR_SET_NO_NEW_PRIVS = 38
    # capset
    LINUX_CAPABILITY_VERSION_3 = 0x20080522
    # system calls with one number on every machine, and no function in the C library
    SYS_MOUNT_SETATTR = 442
    SYS_LANDLOCK_CREATE_RULESET = 444
    SYS_LANDLOCK_ADD_RULE = 445
    SYS_LANDLOCK_RESTRICT_SELF = 446
    # Landlock
    LANDLOCK_CREATE_RULESET_VERSION = 1
    LANDLOCK_RULE_PATH_BENEATH = 1
    ACCESS_FS_EXECUTE, ACCESS_FS_READ_FILE, ACCESS_FS_READ_DIR = 0x1, 0x4, 0x8
    ACCESS_FS_V1, ACCESS_FS_V3 = 0x1FFF, 0x7FFF  # all rights to files that a version knows
    ACCESS_NET_BIND_TCP, ACCESS_NET_CONNECT_TCP = 0x1, 0x2  # from version 4
    SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 0x1, 0x2  # from version 6
    # seccomp, and the steps of its filters
    SECCOMP_MODE_FILTER = 2
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x50000
    BPF_LOAD, BPF_RETURN = 0x20, 0x06
    BPF_JUMP_EQUAL, BPF_JUMP_AT_LEAST, BPF_JUMP_ANY_BIT = 0x15, 0x35, 0x45
    DATA_NUMBER, DATA_ARCHITECTURE, DATA_FIRST_ARGUMENT = 0, 4, 16  # where in seccomp_data
    X32_SYSCALL_BIT = 0x40000000
    AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
    SYS_CLONE = {"x86_64": 56, "aarch64": 220}
    SYS_CLONE3 = 435
    # System calls that a program does not get, since they escape the rlimits, outlive a program or
    # reach another: (x86_64, aarch64).
    REFUSED = {
        "add_key": (248, 217),
        "bpf": (321, 280),
        "io_uring_setup": (425, 425),
        "keyctl": (250, 219),
        "kill": (62, 129),
        "memfd_create": (319, 279),
        "mq_open": (240, 180),
        "msgget": (68, 186),
        "perf_event_open": (298, 241),
        "pidfd_getfd": (438, 438),
        "pidfd_send_signal": (424, 424),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "ptrace": (101, 117),
        "request_key": (249, 218),
        "rt_sigqueueinfo": (129, 138),
        "rt_tgsigqueueinfo": (297, 240),
        "semget": (64, 190),
        "setns": (308, 268),
        "shmget": (29, 194),
        "socket": (41, 198),
        "tgkill": (234, 131),
        "tkill": (200, 130),
        "unshare": (272, 97),
        "userfaultfd": (323, 282),
    }


class Worker:
    """A zygote, warm and trusted, that forks hostile programs, which answer calls over a socket.

    They get the source of `FAR_SIDE`, and nothing else of this file: no task, test or expected
    value is in memory that they can walk. A program sees the Python library and a memory disk of
    its own; no network, no other process, no environment.
    """

    RLIMITS = {
        "AS": 512 << 20,  # bytes of memory
        "CPU": 20,  # seconds
        "NOFILE": 64,
        "NPROC": 24,
        "CORE": 0,
        "MEMLOCK": 0,
    }
    DISK = 8 << 20  # bytes of a file; the disk holds twice that
    NOBODY = 65534
    UNUSED_UIDS = 0x70000000  # the first of 2 ** 24 user ids that nobody has
    LAST_DESCRIPTOR = 1024

    def attempt(self, function, *args):
        """Does what a platform may refuse."""
        with contextlib.suppress(OSError, ValueError):
            function(*args)

    def call(self, name, *args):
        """Result of a function of Linux' C library; OSError if it fails."""
        result = getattr(self.libc, name)(*args) if self.libc else -1
        if result < 0:
            raise OSError(ctypes.get_errno(), name)
        return result

    def serve(self, caged):
        """Runs one program after the other until the parent closes the socket or dies. With
        `caged` in namespaces of its own, or OSError."""
        control = socket.socket(fileno=0)
        self.prepare(caged)
        if caged:
            self.hide()
        protections = {
            "namespaces (a network, processes and a disk of its own)": caged,
            "Landlock (hidden files)": caged or self.landlock > 0,
            "seccomp (no sockets, signals, keys, shared memory)": self.filter,
            "rlimits (memory)": self.libc,
        }
        missing = [name for name, there in protections.items() if not there]
        control.sendall(b"+" + ", ".join(missing).encode())
        gc.freeze()
        while descriptors := socket.recv_fds(control, 1, 1)[1]:
            program = self.fork(*descriptors)
            os.close(descriptors[0])
            control.recv(1)
            self.kill(program)
            control.sendall(b".")

    def prepare(self, caged):
        """Finds out what the platform has."""
        self.caged = caged
        self.libraries = [f"{sys.base_prefix}/lib", *glob.glob("/lib*"), *glob.glob("/usr/lib*")]
        self.libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self.landlock = self.landlock_version() if self.libc else 0
        self.filter = self.seccomp_filter() if self.libc else None
        # to be killed before the training is, where memory runs out
        self.attempt(Path("/proc/self/oom_score_adj").write_text, "1000")
        # orphans of programs become children of this process
        self.attempt(self.call, "prctl", Kernel.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # not there if caged: then the kernel kills them all
        self.children = Path(f"/proc/self/task/{os.getpid()}/children")

    def fork(self, descriptor):
        """Process id of a new program that talks over the descriptor."""
        if self.caged:  # the child is the first process of a new namespace
            self.call("unshare", Kernel.CLONE_NEWPID)
        if program := os.fork():
            if self.caged:
                self.call("setns", self.pids, 0)
            return program
        os.dup2(1, 0)
        os.dup2(descriptor, 3)
        os.closerange(4, self.LAST_DESCRIPTOR)
        self.confine()
        self.run(socket.socket(fileno=3))

    def kill(self, program):
        """Ends a program and all that it started; returns when nothing is left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                orphans = self.children.read_text().split() if self.children.exists() else [program]
                for pid in (-program, *map(int, orphans)):
                    self.attempt(os.kill, pid, signal.SIGKILL)
                os.wait()

    def hide(self):
        """Namespaces without a network or other processes, with a root that holds the libraries,
        read-only, and no more."""
        if uid := os.geteuid():  # in a user namespace: all capabilities inside, none outside
            gid = os.getegid()
            self.call("unshare", Kernel.CLONE_NEWUSER)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
            Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        kinds = Kernel.CLONE_NEWNS | Kernel.CLONE_NEWNET | Kernel.CLONE_NEWPID
        self.call("unshare", kinds)
        if os.fork():  # the child is the first process of its namespace: with it all programs end
            os.wait()
            os._exit(0)
        self.call("prctl", Kernel.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self.pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
        self.change_root()

    def change_root(self):
        """Builds the new root at /proc, a place that exists and holds no library."""
        self.call("mount", None, b"/", None, Kernel.MS_REC | Kernel.MS_PRIVATE, None)
        self.call("mount", b"tmpfs", b"/proc", b"tmpfs", 0, b"mode=755")
        for path in self.libraries:
            inside = f"/proc{path}"
            os.makedirs(inside, exist_ok=True)
            flags = Kernel.MS_REC | Kernel.MS_BIND
            self.call("mount", path.encode(), inside.encode(), None, flags, None)
        os.mkdir("/proc/tmp")
        locks = Kernel.MOUNT_ATTR_RDONLY | Kernel.MOUNT_ATTR_NOSUID | Kernel.MOUNT_ATTR_NODEV
        attributes = struct.pack("4Q", locks, 0, 0, 0)
        where = Kernel.AT_FDCWD, b"/proc", Kernel.AT_RECURSIVE
        self.call("syscall", Kernel.SYS_MOUNT_SETATTR, *where, attributes, len(attributes))
        os.chdir("/proc")
        self.call("pivot_root", b".", b".")
        self.call("umount2", b".", Kernel.MNT_DETACH)  # the old root

    def confine(self):
        """The limits and locks of one program, and of all that it starts."""
        os.setsid()
        if self.caged:
            self.call("unshare", Kernel.CLONE_NEWNS | Kernel.CLONE_NEWIPC)
            size = f"size={2 * self.DISK},nr_inodes=4k,mode=1777".encode()
            flags = Kernel.MS_NOSUID | Kernel.MS_NODEV
            self.call("mount", b"tmpfs", b"/tmp", b"tmpfs", flags, size)
        os.chdir("/tmp" if self.caged else "/")
        self.drop_user()
        limits = {**self.RLIMITS, "FSIZE": self.DISK if self.caged else 0}
        for name, value in limits.items():
            number = getattr(resource, f"RLIMIT_{name}")
            self.attempt(resource.setrlimit, number, (value, value))
        for option, value in (
            (Kernel.PR_SET_PDEATHSIG, signal.SIGKILL),
            (Kernel.PR_SET_DUMPABLE, 0),
            (Kernel.PR_SET_NO_NEW_PRIVS, 1),
        ):
            self.attempt(self.call, "prctl", option, value, 0, 0, 0)
        if self.landlock > 0:
            self.lock_files()
        header = (ctypes.c_uint32 * 2)(Kernel.LINUX_CAPABILITY_VERSION_3, 0)
        self.attempt(self.call, "capset", header, (ctypes.c_uint32 * 6)())
        if self.filter:
            steps = struct.pack("HP", len(self.filter) // 8, ctypes.addressof(self.filter))
            self.call("prctl", Kernel.PR_SET_SECCOMP, Kernel.SECCOMP_MODE_FILTER, steps, 0, 0)

    def drop_user(self):
        """Root becomes a user that nobody else is, or at least nobody."""
        unused = self.UNUSED_UIDS + random.getrandbits(24)
        for uid in (unused, self.NOBODY):
            self.attempt(os.setgroups, [])
            self.attempt(os.setregid, uid, uid)
            self.attempt(os.setreuid, uid, uid)

    def landlock_version(self):
        flag = Kernel.LANDLOCK_CREATE_RULESET_VERSION
        return self.libc.syscall(Kernel.SYS_LANDLOCK_CREATE_RULESET, None, 0, flag)

    def lock_files(self):
        """May read libraries and write to its disk; no TCP, no signals, no trace of others."""
        rights = Kernel.ACCESS_FS_V1 if self.landlock < 3 else Kernel.ACCESS_FS_V3
        read = Kernel.ACCESS_FS_EXECUTE | Kernel.ACCESS_FS_READ_FILE | Kernel.ACCESS_FS_READ_DIR
        net = Kernel.ACCESS_NET_BIND_TCP | Kernel.ACCESS_NET_CONNECT_TCP
        scope = Kernel.SCOPE_ABSTRACT_UNIX_SOCKET | Kernel.SCOPE_SIGNAL
        net *= self.landlock >= 4
        scope *= self.landlock >= 6
        ruleset = struct.pack("3Q", rights, net, scope)
        create = Kernel.SYS_LANDLOCK_CREATE_RULESET
        rules = self.call("syscall", create, ruleset, len(ruleset), 0)
        allowed = dict.fromkeys(self.libraries, read)
        if self.caged:
            allowed["/tmp"] = rights
        for path, access in allowed.items():
            if os.path.exists(path):
                rule = struct.pack("=Qi", access, os.open(path, os.O_RDONLY))
                kind = Kernel.LANDLOCK_RULE_PATH_BENEATH
                self.call("syscall", Kernel.SYS_LANDLOCK_ADD_RULE, rules, kind, rule, 0)
        self.call("syscall", Kernel.SYS_LANDLOCK_RESTRICT_SELF, rules, 0)

    def seccomp_filter(self):
        """The steps of the filter, 8 bytes each; None if the kernel or machine has no filters."""
        machine = os.uname().machine
        if machine not in Kernel.AUDIT_ARCH or sys.maxsize < 1 << 32:
            return None
        probe = self.libc.prctl(Kernel.PR_SET_SECCOMP, Kernel.SECCOMP_MODE_FILTER, None, 0, 0)
        if probe == 0 or ctypes.get_errno() != errno.EFAULT:
            return None
        column = list(Kernel.AUDIT_ARCH).index(machine)
        refused = [numbers[column] for numbers in Kernel.REFUSED.values()]

        # a step: operation, steps to skip if true, steps to skip if not, operand
        allow = Kernel.BPF_RETURN, 0, 0, Kernel.SECCOMP_RET_ALLOW
        refuse = Kernel.BPF_RETURN, 0, 0, Kernel.SECCOMP_RET_ERRNO | errno.EPERM
        unknown = Kernel.BPF_RETURN, 0, 0, Kernel.SECCOMP_RET_ERRNO | errno.ENOSYS
        steps = [
            (Kernel.BPF_LOAD, 0, 0, Kernel.DATA_ARCHITECTURE),
            (Kernel.BPF_JUMP_EQUAL, 1, 0, Kernel.AUDIT_ARCH[machine]),
            refuse,
            (Kernel.BPF_LOAD, 0, 0, Kernel.DATA_NUMBER),
            (Kernel.BPF_JUMP_AT_LEAST, 0, 1, Kernel.X32_SYSCALL_BIT),
            refuse,
            # clone3 hides its flags in memory: without it the C library takes clone
            (Kernel.BPF_JUMP_EQUAL, 0, 1, Kernel.SYS_CLONE3),
            unknown,
        ]
        for number in refused:
            steps += [(Kernel.BPF_JUMP_EQUAL, 0, 1, number), refuse]
        steps += [  # clone, but for new user namespaces
            (Kernel.BPF_JUMP_EQUAL, 0, 2, Kernel.SYS_CLONE[machine]),
            (Kernel.BPF_LOAD, 0, 0, Kernel.DATA_FIRST_ARGUMENT),
            (Kernel.BPF_JUMP_ANY_BIT, 1, 0, Kernel.CLONE_NEWUSER),
            allow,
            refuse,
        ]
        return ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *s) for s in steps))

    def run(self, sock):
        """A program: the first message loads it, each other one is a call."""
        sock.sendall(b"+")
        random.seed(0)  # so that a program that draws has the same verdict each time
        self.answer(sock, self.load)
        while True:
            self.answer(sock, self.entry)

    def load(self, source, entry):
        module = types.ModuleType("program")
        sys.modules["program"] = module
        tree = ast.parse(source)
        # imports from __future__ may stand in any part of the source
        tree.body.sort(key=lambda node: getattr(node, "module", "") != "__future__")
        exec(compile(tree, "<program>", "exec", optimize=0), vars(module))
        self.entry = getattr(module, entry)

    def answer(self, sock, function):
        """Receives the arguments of a call and sends what came of it: the number of the question;
        builtin classes of the exception ([]: there was none; None: the value can not pass); the
        value, or the message; the mutable arguments as the call left them."""
        nonce, args, kwargs = Wire.receive(sock)
        mutable = Wire.mutable(args, kwargs)
        try:
            line = Wire.pack(nonce, [], function(*args, **kwargs), mutable)
        except CannotPass as error:
            line = Wire.pack(nonce, None, str(error), [])
        except BaseException as error:
            kinds = [cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins"]
            line = Wire.pack(nonce, kinds, str(error)[:500], [])
        sock.sendall(line)


FAR_SIDE = Record, Match, CannotPass, Wire, Kernel, Worker
# what these need, and what programs often import: they have it at once
FAR_MODULES = (
    *("array", "ast", "bisect", "collections", "collections.abc", "contextlib", "copy", "ctypes"),
    *("datetime", "decimal", "errno", "fractions", "functools", "gc", "glob", "hashlib", "heapq"),
    *("itertools", "json", "math", "operator", "os", "random", "re", "resource", "signal"),
    *("socket", "statistics", "string", "struct", "sys", "time", "types", "typing"),
)


def far_side_source(caged):
    """The program that the zygote is."""
    with PARSER:  # to find a class it is parsed
        classes = "\n\n".join(map(inspect.getsource, FAR_SIDE))
    modules = f"import sys\ndel sys.path[0]\nimport {', '.join(FAR_MODULES)}\n"
    return f"{modules}from pathlib import Path\n\n{classes}\n\nWorker().serve({caged})\n"


# ======================================= the trusted side =======================================
class SandboxFailure(BaseException):
    """No answer: a timeout, a crash, an exit, a value that cannot pass. No `except Exception` of a
    test catches it."""


class Sandbox:
    """A zygote and a program of it: what `candidate` is in the tests."""

    pool = queue.LifoQueue()  # one for each core; a thread takes one for a program
    warn = staticmethod(functools.cache(logging.getLogger("sandbox").warning))
    patience = 30  # seconds for the zygote, which is trusted, and slow where the machine is
    share = 0.9  # of the program's time left for one call: a hang leaves some to other tests
    hangs = 3  # calls without an end, then no more
    control = None  # socket to the zygote, which ends with this process in whatever way that ends

    def open(self, source, entry, call_seconds, seconds):
        """Prepares for a program, which starts with its first call."""
        self.source, self.entry = source, entry
        self.call_seconds, self.end = call_seconds, time.monotonic() + seconds
        self.sock, self.sandbox_error, self.timeouts = None, False, 0
        self.fault = ""  # why a call of this test had no answer
        self.broken = ""  # why no further call can have one
        self.got = []  # the last answer, if there was one
        self.answered = False  # whether a call of this test had one
        self.raised = set()  # names of the classes of exceptions that its calls raised
        self.changes = []  # (argument, what a call made of it)

    def start(self):
        """A new process that has loaded the program; sets `broken` if there cannot be one."""
        ready = False
        begin = time.monotonic()
        try:
            if not self.has_zygote():
                self.spawn()
            self.sock, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self.control, [b"+"], [theirs.fileno()])
            self.sock.settimeout(self.patience)
            ready = self.sock.recv(1) == b"+"
            self.end += time.monotonic() - begin  # the zygote's time is not the program's
            self.ask((self.source, self.entry), {})
        except (Exception, SandboxFailure, CannotPass) as error:
            self.broken = one_line(error)
            self.sandbox_error |= self.control is None or not ready

    def has_zygote(self):
        alive = self.control is not None and self.owner == os.getpid()
        return alive and self.process.poll() is None

    def spawn(self, caged=True):
        """A new zygote; without namespaces where the platform refuses them."""
        self.control = None
        control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-B", "-c", far_side_source(caged)],
                env={"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        control.settimeout(self.patience)
        hello = control.recv(4096).decode()
        if not hello:
            control.close()
            self.process.wait()
            if not caged:
                raise OSError("the sandbox does not start")
            return self.spawn(caged=False)  # from nothing: a cage may have been refused half-way
        if missing := hello[1:]:
            self.warn("sandbox: this platform lacks, against model-written code: %s", missing)
        self.control, self.owner = control, os.getpid()

    def stop(self):
        """Ends the program with all that it started; returns when nothing of it is left."""
        if not self.sock:
            return
        control, sock, self.control, self.sock = self.control, self.sock, None, None
        with sock, contextlib.suppress(OSError):  # closed last: an end of file wakes the program
            control.sendall(b"-")
            self.control = control if control.recv(1) else None
        if self.control is None:
            self.sandbox_error = True
            self.process.kill()  # it may hang, and all of its programs end with it
            self.process.wait()

    def __call__(self, *args, **kwargs):
        self.got = []
        if not self.sock and not self.broken:
            self.start()
        if self.broken:
            self.fault = self.broken
            raise SandboxFailure(self.fault)
        value = self.ask(args, kwargs)
        self.got, self.answered = [value], True
        return value

    def ask(self, args, kwargs):
        """The program's answer; its exception, or SandboxFailure, is raised."""
        try:
            kind, value, changed = self.exchange(args, kwargs)
        except Exception as error:  # no answer, or none of this program's protocol
            self.stop()
            self.timeouts += isinstance(error, TimeoutError)
            self.fault = "crash" if isinstance(error, (OSError, EOFError)) else one_line(error)
            if isinstance(error, TimeoutError):
                self.fault = "timeout"
            if self.timeouts > self.hangs or time.monotonic() > self.end:
                self.broken = self.fault
            raise SandboxFailure(self.fault) from None
        if kind and issubclass(kind, Exception):
            self.raised |= {cls.__name__ for cls in kind.__mro__}
            raise kind(value)
        if kind:  # an exit, or a value that can not pass: the program is there for the next test
            name = "" if kind is SandboxFailure else f"{kind.__name__}: "
            self.fault = one_line(SandboxFailure(f"{name}{value}"))
            raise SandboxFailure(self.fault)
        self.changes += zip(Wire.mutable(args, kwargs), changed)
        if value is None:  # a call made for what it changes
            self.settle()
        return value

    def exchange(self, args, kwargs):
        """(class of the exception or None, value or message, changed arguments) of a call."""
        now = time.monotonic()
        deadline = now + min(self.call_seconds, self.share * (self.end - now))
        nonce = os.urandom(8)  # what was sent before the question is no answer to it
        line = Wire.pack(nonce, args, kwargs)
        self.sock.settimeout(max(1e-6, deadline - now))
        self.sock.sendall(line)
        echo, kinds, value, changed = Wire.receive(self.sock, deadline)
        if echo != nonce:
            raise EOFError
        if kinds == []:
            return None, value, changed
        kind = SandboxFailure if kinds is None else self.exception_class(kinds)
        if not isinstance(value, str):
            raise EOFError
        kind(value)  # takes a message
        return kind, value, []

    def exception_class(self, names):
        """The nearest builtin class that takes one message; not StopIteration, which would end a
        loop of the test."""
        odd = "Stop|Unicode.+Error|.*Group"
        kind = getattr(builtins, next(name for name in names if not re.match(odd, name)))
        if not issubclass(kind, BaseException):
            raise EOFError
        return kind

    def settle(self):
        """Changes the tests' lists, dicts and sets as calls changed theirs.

        After a statement, so that no value is held against what its own call made of an argument,
        or after a call without a value."""
        for old, new in self.changes:
            if isinstance(old, type(new)) and old != new:
                old.clear()
                (old.update if isinstance(old, (dict, set)) else old.extend)(new)
        self.changes = []


for _core in getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0):
    Sandbox.pool.put(Sandbox())


def one_line(error):
    """An exception as one line of printable text, whatever its message holds."""
    text = ""
    with contextlib.suppress(Exception):  # an int too long to print
        text = str(error)[:1000]
    text = "".join(char if char.isprintable() else " " for char in text)
    name = "" if isinstance(error, (SandboxFailure, CannotPass)) else f"{type(error).__name__}: "
    return " ".join(f"{name}{text}".split())[:200].rstrip(": ")


# ========================================== the tests ===========================================
class Step(NamedTuple):
    """A top-level statement of a problem's tests."""

    code: types.CodeType
    reads: set  # names of the tests' space
    stores: set
    makes: set  # that it stores, or changes with the candidate's help: gone if it fails
    source: str  # if it is within `check` and asserts, else ""
    is_test: bool
    expects: set  # names of the exceptions that it, or a function of the tests, waits for


class Plan(NamedTuple):
    """A problem's tests, taken apart."""

    head: str  # source before the stub
    candidate: str  # what `check` calls the function
    around: list  # steps outside of `check`
    check: list  # steps of `check`


def names_read(node):
    """Names that a node reads, but for the parameters of a function."""
    names = {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    if isinstance(node, ast.FunctionDef):
        names -= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
    return names


def names_made(nodes, alone):
    """Names that statements make or change, given that the candidate takes part in them.

    An element or attribute that is set changes its object, a method's call its receiver; a call
    that is a statement of its own (`alone`) is made for what it does to its arguments."""
    made = set()
    for node in itertools.chain.from_iterable(map(ast.walk, nodes)):
        changed = []
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            changed = [node.value]
        elif alone and isinstance(node, ast.Call):
            changed = [*node.args, *(keyword.value for keyword in node.keywords)]
            if isinstance(node.func, ast.Attribute):
                changed.append(node.func.value)
        made |= {part.id for part in changed if isinstance(part, ast.Name)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
        if isinstance(node, (ast.ExceptHandler, ast.MatchAs)) and node.name:
            made.add(node.name)
    return made


def is_assertion(node, asserting):
    """Whether a node asserts: by itself, by a function that does, or as a library's assertions."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        return name in asserting or name == "raises" or name.lower().startswith("assert")
    return isinstance(node, ast.Assert)


def asserts(node, asserting):
    return any(is_assertion(part, asserting) for part in ast.walk(node))


def exceptions_expected(nodes, asserting):
    """Names of the exceptions that `except` clauses and assertions such as `raises` wait for. A
    clause for all exceptions waits for none: a failed assert is one too."""
    names = set()
    for node in itertools.chain.from_iterable(map(ast.walk, nodes)):
        if isinstance(node, ast.ExceptHandler) and node.type:
            names |= names_read(node.type) - {"Exception", "BaseException"}
        elif isinstance(node, ast.Call) and is_assertion(node, asserting):
            names |= names_read(node)
    return names


class Reach:
    """Which statements reach the candidate: by its name, or by what was made from it."""

    def __init__(self, names, functions):
        self.names, self.asserting = set(names), set()
        for _ in functions:  # as often as one may call another
            for function in functions:
                if names_read(function) & self.names:
                    self.names.add(function.name)
                if asserts(function, self.asserting):
                    self.asserting.add(function.name)

    def follow(self, statement, decided=False):
        """(names that the statement makes from the candidate, whether it is a test).

        decided: whether a block around it hangs on the candidate, so that all in it does."""
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return {statement.name} & self.names, False
        blocks = ast.stmt, ast.ExceptHandler, ast.match_case
        inner = [node for node in ast.iter_child_nodes(statement) if isinstance(node, blocks)]
        head = [statement]
        if inner:
            head = [node for node in ast.iter_child_nodes(statement) if node not in inner]
        reads = set().union(*map(names_read, head))
        asserting_head = any(asserts(node, self.asserting) for node in head)
        raises = isinstance(statement, ast.With) and asserting_head
        if isinstance(statement, ast.Try) or raises:  # what it does then hangs on its body
            reads |= names_read(statement)
        decided = decided or bool(reads & self.names)
        alone = isinstance(statement, ast.Expr)
        made = names_made(head, alone) if decided else set()
        if isinstance(statement, ast.ExceptHandler) and decided and statement.name:
            made.add(statement.name)
        self.names |= made
        test = decided and asserting_head
        for node in inner:
            more, holds = self.follow(node, decided)
            made, test = made | more, test or holds
        return made, test


def names_in(code, simple=frozenset()):
    """(names of the tests' space that a code object reads, names that it stores), with all within
    it. simple: names that are only read, which saves taking the code apart."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    if not inner and simple.issuperset(code.co_names):
        return set(code.co_names), set()
    names = {"LOAD": set(), "STORE": set(), "IMPORT": set()}
    for operation in dis.get_instructions(code):
        kind, _, what = operation.opname.partition("_")
        if what in ("NAME", "GLOBAL") and kind in names:
            names[kind].add(operation.argval)
        elif what == "STAR":
            names["STORE"].add("*")
    reads, stores = names["LOAD"], names["STORE"]
    for part in inner:
        more_reads, more_stores = names_in(part)
        reads, stores = reads | more_reads, stores | more_stores
    return reads, stores


def is_check(node):
    return isinstance(node, ast.FunctionDef) and node.name == "check"


def head_of(prompt, entry):
    """What a prompt has before its stub of the function `entry`: imports and helpers."""
    found = re.search(rf"^def\s+{entry}\b", prompt, re.MULTILINE)
    return prompt[: found.start()] if found else ""


def take_apart(prompt, entry, test):
    """(head, candidate, statements around `check`, statements of `check`); ValueError."""
    head = head_of(prompt, entry)
    around = parse(head).body + parse(test).body
    checks = [node for node in around if is_check(node)]
    if not checks or not checks[-1].args.args:
        raise ValueError("no check(candidate)")
    body = itertools.takewhile(lambda node: not isinstance(node, ast.Return), checks[-1].body)
    candidate = checks[-1].args.args[0].arg
    return head, candidate, [node for node in around if not is_check(node)], list(body)


@functools.lru_cache(4096)
def plan(prompt, entry, test):
    """The Plan of a problem; ValueError or SyntaxError."""
    head, candidate, around, body = take_apart(prompt, entry, test)
    functions = [node for node in (*around, *body) if isinstance(node, ast.FunctionDef)]
    reach = Reach({entry, candidate}, functions)

    def step(node, inside):
        module = ast.Module([node], [])
        code = compile(module, "<test>", "exec", dont_inherit=True, optimize=0)
        reads, stores = names_in(code, simple=frozenset([entry, candidate]))
        made, test = reach.follow(node)
        reach.names -= stores - made  # made anew, of something else
        source = ast.unparse(node) if inside and asserts(node, reach.asserting) else ""
        expects = exceptions_expected([node, *functions], reach.asserting)
        return Step(
            code, reads, stores, stores | made, source, is_test=test and inside, expects=expects
        )

    around = [step(node, inside=False) for node in around]
    return Plan(head, candidate, around, [step(node, inside=True) for node in body])


def tests_of(prompt, entry, test):
    """Sources of the tests of a problem; ValueError or SyntaxError."""
    return [step.source for step in plan(prompt, entry, test).check if step.is_test]


def without_broken_tests(prompt, entry, test):
    """(`test` without the asserts that are broken in themselves, [(source, name)] of those).

    Broken is what reads a name that neither prompt nor test defines, by itself or through a
    statement before it."""
    _, candidate, around, check = plan(prompt, entry, test)
    steps = [*around, *check]
    given = {*dir(builtins), *TEST_NAMES, entry, candidate, "__name__"}
    if any("*" in step.stores for step in steps):
        return test, []  # who knows what an import of all defines
    missing = dict.fromkeys(range(len(steps)), "")  # by step: a name that is not there
    count = -1
    while count != sum(map(bool, missing.values())):  # what a broken step defines is missing too
        count = sum(map(bool, missing.values()))
        defined = given.union(*(steps[k].stores for k, name in missing.items() if not name))
        missing = {k: min(step.reads - defined, default="") for k, step in enumerate(steps)}
    left_out = {
        step.source: missing[k] for k, step in enumerate(steps) if step.source and missing[k]
    }
    if not left_out:
        return test, []
    tree = parse(test)
    body = [node for node in tree.body if is_check(node)][-1]
    body.body = [node for node in body.body if ast.unparse(node) not in left_out] or [ast.Pass()]
    return ast.unparse(tree), list(left_out.items())


TEST_NAMES = {"math": math}  # what tests may use without an import


class Tests:
    """The run of a problem's tests against one program, on the trusted side."""

    def __init__(self, sandbox):
        self.sandbox = sandbox
        # is `random` in the tests: their verdict neither moves nor takes the global state
        self.dice = random.Random(0)
        self.dice.Random = random.Random
        self.builtins = {**vars(builtins), "__import__": self.load_module}
        self.made_of_answers = set()  # names in the tests' space

    def load_module(self, name, *rest):
        return self.dice if name == "random" else __import__(name, *rest)

    def failure(self, step, space):
        """Why a step failed, in one line; "" if it did not."""
        sandbox = self.sandbox
        sandbox.fault, sandbox.got = "", []
        sandbox.answered, sandbox.raised = False, set()
        try:
            sandbox.settle()
            exec(step.code, space)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            for name in step.makes:
                space.pop(name, None)  # so that no later test takes an older value for this one's
            self.made_of_answers -= step.makes
            return sandbox.fault or self.reason(error)
        answered = sandbox.answered or sandbox.raised & step.expects
        if answered or step.reads & self.made_of_answers:
            self.made_of_answers |= step.makes
        else:
            self.made_of_answers -= step.stores
            if step.is_test:
                return sandbox.fault or "the candidate was not called, or gave no answer"
        return sandbox.fault  # even if the test caught it

    def reason(self, error):
        if isinstance(error, AssertionError) and self.sandbox.got:
            value = self.sandbox.got[0]
            with contextlib.suppress(ValueError):  # an int too long to print
                error = AssertionError(f"got {show(value)}")
        return one_line(error)


def show(value):
    """A value's `repr`, without the addresses of objects."""
    if isinstance(value, (collections.abc.Iterator, Match)):
        return "an iterator" if isinstance(value, collections.abc.Iterator) else "a match"
    return repr(value)


def run_tests(problem, aux, main, call_seconds=math.inf, seconds=10.0):
    """Tests model-written code: the prompt's imports and helpers, then `aux`, then `main`.

    problem: prompt, entry_point, test (HumanEval's form). aux, main: sources of agent 0 and 1.
    A test is a top-level statement of `check` that asserts something and reaches the candidate:
    by its name, the entry point's, or a variable or function made from them. All others are
    set-up. Statements run here, on the trusted side, in order; only calls of the candidate go to
    the worker and only plain values come back. No test passes without an answer of the candidate,
    or an exception that the test names. The program has `seconds`, a call at most `call_seconds`
    and nine tenths of what is left.
    Returns `passed` and `total` tests, `failures` [(source, error)], the first `error` ("": none),
    `seconds`, `sandbox_error` (the sandbox itself failed). ValueError or SyntaxError for a
    malformed problem, nothing for any program.
    """
    entry = problem["entry_point"]
    head, candidate, around, check = plan(problem["prompt"], entry, problem["test"])
    sandbox = Sandbox.pool.get()
    begin = time.monotonic()
    try:
        sandbox.open(f"{head}\n{aux}\n{main}\n", entry, call_seconds, seconds)
        tests = Tests(sandbox)
        space = {**TEST_NAMES, "__name__": "tests", "__builtins__": tests.builtins, entry: sandbox}
        for step in around:
            tests.failure(step, space)
        # a copy: names of `check` are not names of the helpers around it
        space = {**space, candidate: sandbox}
        results = [(step, tests.failure(step, space)) for step in check]
    finally:
        try:
            sandbox.stop()
        finally:  # or the pool runs dry, and a later program waits for ever
            sandbox_error = sandbox.sandbox_error  # before another thread has the sandbox
            Sandbox.pool.put(sandbox)
    results = [(step.source, error) for step, error in results if step.is_test]
    failures = [(source, error) for source, error in results if error]
    return {
        "passed": len(results) - len(failures),
        "total": len(results),
        "failures": failures,
        "error": failures[0][1] if failures else "",
        "seconds": time.monotonic() - begin,
        "sandbox_error": sandbox_error,
    }
