"""What holds for all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A shell starts what it runs in the background deaf to interrupts, and so would be everything that
# the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else the machine does.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
