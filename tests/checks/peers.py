#!/usr/bin/env python3
"""Every test that docs/peers.md names exists, and every test that is named after a peer's defect stands there.

A row is `| number | defect | tests |`; tests are `file: "name"`, several apart by `; `, or a reason after a dash.
"""

import re
import sys

from sources import ROOT, finish, shown

PAGE = ROOT / "docs" / "peers.md"
ROW = re.compile(r"^\| (\d+\.\d+) \| (.+?) \| (.+) \|$", re.M)
NAMED = re.compile(r'`([\w/.]+)`: "([^"]+)"')
TEST = re.compile(r'TEST_CASE(?:_TEMPLATE(?:_DEFINE)?)?\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)')
PEER = re.compile(r"PEERS \d|defect|\w#\d")  # how names of such tests look
USERS = 26  # requests and bugs of section 3


def tests_of(path):
    return ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', m[1])) for m in TEST.finditer(path.read_text())]


def main():
    problems, rows, listed = [], [], set()
    for match in ROW.finditer(PAGE.read_text()):
        number, _, tests = match.groups()
        rows.append(number)
        if tests.startswith("– "):
            continue
        found = NAMED.findall(tests)
        if not found or NAMED.sub("", tests).strip("; "):
            problems.append(f"{shown(PAGE)}: {number}: neither tests nor a reason: {tests}")
        for file, name in found:
            path = ROOT / "tests" / file
            listed.add((file, name))
            if not path.is_file():
                problems.append(f"{shown(PAGE)}: {number}: no file tests/{file}")
            elif path.name.endswith((".cpp", ".cu")) and path.parent.name != "compile":
                if tests_of(path).count(name) != 1:
                    problems.append(f'{shown(PAGE)}: {number}: tests/{file} has no test "{name}", or more than one')
            elif name not in path.read_text():
                problems.append(f'{shown(PAGE)}: {number}: tests/{file} does not say "{name}"')
    for number in range(1, USERS + 1):
        if f"3.{number}" not in rows:
            problems.append(f"{shown(PAGE)}: no row 3.{number}")
    for path in sorted((ROOT / "tests").rglob("*.c*")):
        file = str(path.relative_to(ROOT / "tests"))
        if path.suffix not in (".cpp", ".cu"):
            continue
        for name in tests_of(path):
            if (path.parent.name == "peers" or PEER.search(name)) and (file, name) not in listed:
                problems.append(f'{shown(PAGE)}: does not list tests/{file}: "{name}"')
    return finish(problems, f"{len(rows)} defects; {len(listed)} tests, all there")


if __name__ == "__main__":
    sys.exit(main())
