"""`python -m runner`: the same command as `spantune`."""

import sys

from runner.cli import main

sys.exit(main(sys.argv[1:]))
