"""What holds for all tests."""

import signal

# Who runs a suite in the background of a shell has it ignored, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
