"""`accelerate launch ... -m engines.shimmed COMMAND ...` is `-m softrl COMMAND ...` on CPUs, see `cpu_shim`."""

import sys

from engines import cpu_shim

if __name__ == "__main__":
    cpu_shim.install()
    from softrl.cli import main

    sys.exit(main())
