"""Worker process for math-verify: reads one JSON pair per line from stdin, writes `true` or `false` per line to stdout.

`answers.math_verify_equal` starts it as a script; the package never imports it. Only a separate process can stop a
comparison that hangs inside one big-integer operation (`5^(5^(5^5))`): signals are not delivered there, and never
outside the main thread. So math-verify's own timeouts (alarms) are disabled by the zeros below. The process exits when
its stdin closes.
"""

import json
import logging
import signal
import sys

from math_verify import parse, verify

# math-verify logs every expression that it cannot parse; here that just means "not equal".
logging.disable(logging.CRITICAL)
# Ctrl-C reaches the entire process group; the parent handles it.
signal.signal(signal.SIGINT, signal.SIG_IGN)

for line in sys.stdin:
    answer, gold = (parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in json.loads(line))
    # verify() is not symmetric: the gold answer comes first.
    print(json.dumps(bool(verify(gold, answer, timeout_seconds=0))), flush=True)
