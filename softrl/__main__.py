"""`python -m softrl`, which is also what `accelerate launch -m softrl train ...` starts."""

import sys

from softrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
