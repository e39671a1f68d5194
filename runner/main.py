"""The script that `deepspeed runner/main.py JOB.toml` starts on each rank: finds the code, then
hands over to `cli`."""

import sys
from pathlib import Path

# A script gets its own folder first on the path, where our file names could shadow libraries; we
# want the checkout, so that a checkout always runs its own code, installed or not.
CHECKOUT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(CHECKOUT), str(CHECKOUT / "kernels")]

from runner.utils import ranks, signals

if ranks.is_launched():
    signals.listen(signals.exit_early)  # even reading the command takes a third of a second
    signals.follow_launcher()

from runner.cli.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
