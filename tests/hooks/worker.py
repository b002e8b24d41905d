"""A worker of pytest-xdist, called as Python is: it is forked from the server of processes under test.

python worker.py SOCKET -u -c CODE
"""

from __future__ import annotations

import sys

import forking

if __name__ == "__main__":
    _, server, unbuffered, *words = sys.argv
    forking.end_as_a_fork(server, words)
