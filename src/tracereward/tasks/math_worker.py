"""The process in which math-verify runs: one JSON pair a line on stdin, `true` or `false` a line on stdout.

Started by `answers.math_verify_equal` as a script, never imported by the package. A separate process is the only way
to stop a comparison that hangs inside one big-integer operation (`5^(5^(5^5))`): signals are not delivered there, and
not at all outside the main thread, which is why math-verify's own time limits (alarms) are switched off by the zeros
below. The process ends by itself when its stdin closes.
"""

import json
import logging
import signal
import sys

from math_verify import parse, verify

# math-verify logs every expression that it cannot read; here that is an ordinary "not equal".
logging.disable(logging.CRITICAL)
# Ctrl-C reaches the whole process group; the parent decides.
signal.signal(signal.SIGINT, signal.SIG_IGN)

for line in sys.stdin:
    answer, gold = (parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in json.loads(line))
    # verify() is not symmetric: the gold answer comes first.
    print(json.dumps(bool(verify(gold, answer, timeout_seconds=0))), flush=True)
