#!/usr/bin/env python3
"""pair.py NAME.ko.EXT -- COMPILER FLAGS...: NAME.ok.EXT compiles; NAME.ko.EXT fails with the sentence it expects."""

import os
import pathlib
import re
import subprocess
import sys


def compile_one(command, path):
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return done.returncode, done.stdout + done.stderr


def main():
    ko, command = pathlib.Path(sys.argv[1]), sys.argv[3:]
    ok = ko.with_name(ko.name.replace(".ko.", ".ok."))
    expect = re.match(r"// expect: (.+)", ko.read_text())
    if not expect:
        return f"{ko}: the first line must be '// expect: <part of the message>'"
    if not ok.exists():
        return f"{ok}: missing; without a twin that compiles the failure proves nothing"
    code, text = compile_one(command, ok)
    if code != 0:
        return f"{ok} must compile:\n{text}"
    code, text = compile_one(command, ko)
    if code == 0:
        return f"{ko} compiled; it must fail with: {expect[1]}"
    wanted = " ".join(expect[1].split())
    if wanted not in " ".join(text.split()):
        return f"{ko} fails without saying: {wanted}\nIt says:\n{text}"
    return None


if __name__ == "__main__":
    sys.exit(main())
