"""`python -m spantune`: the same command as `spantune`."""

import sys

from spantune import main

sys.exit(main())
