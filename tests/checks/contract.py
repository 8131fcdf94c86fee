#!/usr/bin/env python3
"""Every public header starts with its contract (STYLE 5), and every public declaration says what it is.

1. A header begins with a block of '///' lines, then '#pragma once'.
2. In gate/, ops/, router/, adapter/, train/ and io/ the block holds these fields, in this order:

     Computes:     the equation (where it comes from: here, or under 'Source:')
     Parameters:   each with its shape; or as 'Reads:', 'Writes:', 'Adds to:'
     Errors:       what is refused, and what is true afterwards
     Cost:         flop, bytes, scratch
     Determinism:  what the bits depend on
     Example:      a file below examples/, tests/, bench/ or docs/ that exists, or code that stands in one that compiles

   Headers elsewhere may use the same labels, in the same order. Where there are views, shapes stand in [brackets].
3. Each class, concept, enum and function at namespace scope, outside `detail`, follows a '///' comment; an overload may
   rely on the one just before it, a name that the header's own block explains needs no second comment, and a
   customisation point's body (…_impl) does what the op's header says.
"""

import functools
import re
import sys

from sources import ROOT, blank, code_only, finish, headers, is_detail, room, shown

FIELDS = [("Computes", "Source"), ("Parameters", "Reads", "Writes", "Adds to", "Reads / Writes / Adds to"), ("Errors",), ("Cost",), ("Determinism",), ("Example",)]
NEED_FIELDS = {"gate", "ops", "router", "adapter", "train", "io"}
LABEL = re.compile(r"^/// ?(Computes|Source|Parameters|Reads / Writes / Adds to|Reads|Writes|Adds to|Errors|Cost|Determinism|Example):", re.M)
EXAMPLE_PATH = re.compile(r"\b(?:examples|tests|bench|docs)/[\w./-]*\w")


def contract_block(text):
    match = re.match(r"(?:///[^\n]*\n)+", text)
    return match[0] if match else ""


def fields(block):
    """[(label, text)] in the order of the block."""
    marks = list(LABEL.finditer(block))
    ends = [m.start() for m in marks[1:]] + [len(block)]
    return [(m[1], block[m.end():end]) for m, end in zip(marks, ends)]


def rank(label):
    return next(i for i, group in enumerate(FIELDS) if label in group)


def squeezed(code):
    """Code without comments, line ends and spaces."""
    return re.sub(r"\s|\\", "", re.sub(r"//[^\n]*", "", code))


@functools.cache
def compiled():
    """Everything that is compiled beside the library, squeezed."""
    files = (p for folder in ("examples", "tests", "bench") for p in sorted((ROOT / folder).rglob("*")))
    return "\n".join(squeezed(p.read_text()) for p in files if p.suffix in (".cpp", ".cu", ".hpp", ".cuh"))


def check_block(path, block):
    name = shown(path)
    if len(re.sub(r"[^\w]", "", block)) < 20:
        yield f"{name}:1: no contract: the header must begin with '///' lines that say what it is"
        return
    found = fields(block)
    ranks = [rank(label) for label, _ in found]
    if ranks != sorted(ranks):
        yield f"{name}:1: fields out of order: {', '.join(label for label, _ in found)}"
    if room(path) not in NEED_FIELDS or is_detail(path):
        return
    for i, group in enumerate(FIELDS):
        if i not in ranks:
            yield f"{name}:1: the contract lacks '{group[0]}:'" + (" (or 'Reads:', 'Writes:', 'Adds to:')" if group[0] == "Parameters" else "")
    for label, text in found:
        if not text.replace("/", "").strip():
            yield f"{name}:1: '{label}:' says nothing"
    for label, text in found:
        if label == "Example":
            paths = EXAMPLE_PATH.findall(text)
            if not paths and not all(squeezed(line) in compiled() for line in text.split("///") if line.strip()):
                yield f"{name}:1: 'Example:' names no file below examples/, tests/, bench/ or docs/, and its code is in none"
            for example in paths:
                if not (ROOT / example).exists():
                    yield f"{name}:1: 'Example:' names {example}, which does not exist"


OPENING = re.compile(r"\b(?:inline\s+)?namespace\b([^{;=]*)$|\bextern\s*$")
CLASS = re.compile(r"\b(?:class|struct|union|enum)\b(?:\s+(?:class|struct))?\s+(\w+)")
CONCEPT = re.compile(r"\bconcept\s+(\w+)")
FUNCTION = re.compile(r"(operator\s*(?:\(\)|[^\s\w(]+|\w+)|[~\w]+)\s*\($")


def strip_templates(head):
    """The declaration without its template<...> and requires prefixes, and without attributes."""
    head = re.sub(r"\[\[.*?\]\]", lambda m: blank(m), head, flags=re.S)
    while True:
        match = re.match(r"\s*template\s*<", head)
        if not match:
            return head
        depth, i = 1, match.end()
        while i < len(head) and depth:
            depth += {"<": 1, ">": -1}.get(head[i], 0)
            i += 1
        head = " " * i + head[i:]
        clause = re.match(r"\s*requires\b[^\n]*\n", head)
        if clause:
            head = " " * clause.end() + head[clause.end():]


def named(head):
    """('class' | 'concept' | 'function', name) of a declaration's text, or None for what needs no comment."""
    concept = CONCEPT.search(head)
    if concept:
        return "concept", concept[1]
    plain = strip_templates(head).strip()
    if not plain or re.match(r"(using|typedef|static_assert|friend|extern|namespace|template|#)\b", plain):
        return None
    if re.match(r"(?:alignas\s*\([^)]*\)\s*)?(?:class|struct|union|enum)\b", plain) and "(" not in plain.split("{")[0].replace("alignas(", ""):
        match = CLASS.search(plain)
        if not match or "<" in plain[match.end():].split(":")[0]:  # a specialisation is its primary's business
            return None
        return "class", match[1]
    paren = plain.find("(")
    equal = plain.find("=")
    if paren < 0 or (0 <= equal < paren and "operator" not in plain[:paren]):
        return None
    match = FUNCTION.search(plain[:paren + 1])
    if not match:
        return None
    return "function", re.sub(r"\s+", "", match[1])


def declarations(code):
    """Yields (position, text, has_body) of each declaration at namespace scope outside detail and anonymous ones."""
    stack = []  # True: a public namespace; False: anything else
    start, i = 0, 0
    while i < len(code):
        c = code[i]
        public = all(stack)
        if c == "{":
            head = code[start:i]
            space = re.search(r"\bnamespace\b([^;{}=()]*)$", head)
            if space:
                name = re.sub(r"\binline\b", "", space[1]).strip()
                stack.append(bool(name) and "detail" not in name.split("::"))
            else:
                if public:
                    yield start, head, True
                stack.append(False)
            start = i + 1
        elif c == "}":
            if stack:
                stack.pop()
            start = i + 1
        elif c == ";":
            if public:
                yield start, code[start:i], False
            start = i + 1
        i += 1


def check_declarations(path, text, block):
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", blank, code_only(text), flags=re.M)
    lines = text.splitlines()
    previous = None
    for start, head, has_body in declarations(code):
        what = named(head)
        if what is None:
            if head.strip():
                previous = None
            continue
        kind, name = what
        if name.endswith("_impl"):
            continue
        if kind == "class" and not has_body:  # a forward declaration
            continue
        first = start + len(head) - len(head.lstrip())
        line = text.count("\n", 0, first)
        above = lines[line - 1].strip() if line > 0 else ""
        documented = above.startswith("///") or re.search(rf"(?<!\w){re.escape(name)}(?!\w)", block) or previous == name
        previous = name if documented else None
        if not documented:
            yield f"{shown(path)}:{line + 1}: {kind} {name} has no '///' comment"


def main():
    problems, count = [], 0
    for path in headers():
        text = path.read_text()
        block = contract_block(text)
        problems += check_block(path, block)
        if not re.match(r"\s*#pragma once\n", text[len(block):]):
            problems.append(f"{shown(path)}:1: the contract must be followed by '#pragma once'")
        views = room(path) in NEED_FIELDS and re.search(r"\b(Matrix|Vector)View<", code_only(text))
        if views and not re.search(r"//[^\n]*\[[^\]\n]+\]", text):
            problems.append(f"{shown(path)}:1: views, and no comment that shows a shape in [brackets]")
        if not is_detail(path):
            problems += check_declarations(path, text, block)
        count += 1
    if count == 0:
        problems.append("no header found below include/loramix")
    return finish(problems, f"{count} headers: each starts with its contract, each public declaration is explained")


if __name__ == "__main__":
    sys.exit(main())
