"""Memory in huge pages: a fork copies a table of pages, and its end takes that down again.

Of a process that has imported torch, the table has 80,000 entries. To copy it takes longer than
many a rank's work. In huge pages it has 512 times fewer.
"""

import ctypes
import re
from pathlib import Path

HUGE = 1 << 21
MADV_COLLAPSE = 25  # Linux 6.1; whether huge pages are made by themselves does not matter


def collapse() -> None:
    """Have this process's memory in huge pages, where Linux does that: nothing depends on it."""
    try:
        maps, advise = Path("/proc/self/maps").read_text(), ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return
    # What is of no file and can be written.
    for first, last in re.findall(r"^(\w+)-(\w+) rw\S* \S+ \S+ 0 ", maps, re.MULTILINE):
        for begin in range(-(-int(first, 16) // HUGE) * HUGE, int(last, 16) - HUGE + 1, HUGE):
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(HUGE), MADV_COLLAPSE)
