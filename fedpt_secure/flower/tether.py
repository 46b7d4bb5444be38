"""Start a program that dies with its parent, `kill -9` of the parent included: `tether.py PARENT PROGRAM ARGUMENTS...`.

Run by itself, without the package, so that it costs milliseconds. A `preexec_fn` would do the same between fork and
exec, where a process with threads can deadlock.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execv(program[0], program)  # noqa: S606 - what to start is this package's own choice


if __name__ == "__main__":
    _main()
