"""Runs the blocks of a page, which come as JSON on stdin, in order and in this directory.

Python's share one namespace; each of bash is a shell of its own, as a reader's next line would be.
Stops at the first that fails, with its line.
"""

import contextlib
import doctest
import io
import json
import subprocess
import sys
import time
import traceback


def run_python(block, page, namespace):
    printed = io.StringIO()
    code = compile("\n" * (block["line"] - 1) + block["text"], page, "exec")
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    except Exception:
        traceback.print_exc()
        sys.exit(f"{page}:{block['line']}: this block failed")
    print(printed.getvalue(), end="", flush=True)
    want, got = block["output"], printed.getvalue()
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if want is not None and not doctest.OutputChecker().check_output(want, got, options):
        sys.exit(f"{page}:{block['line']}: the page says\n{want}\nand this was printed\n{got}")


def main():
    page, blocks = json.load(sys.stdin)
    namespace = {"__name__": "__main__"}
    for block in blocks:
        began = time.monotonic()
        if block["language"] == "python":
            run_python(block, page, namespace)
        else:
            status = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block["text"]], check=False
            ).returncode
            if status:
                sys.exit(f"{page}:{block['line']}: status {status} of\n{block['text']}")
        print(f"[{page}:{block['line']} {time.monotonic() - began:.1f} s]", flush=True)


if __name__ == "__main__":
    main()
