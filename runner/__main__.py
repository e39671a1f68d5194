"""`python -m runner`: the same command as `spantune`."""

import sys

from runner.cli.command import main

sys.exit(main(sys.argv[1:]))
