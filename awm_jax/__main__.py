"""``python -m awm_jax scan|purify``: see `awm_jax.command`."""

import sys

from awm_jax.command import main

if __name__ == "__main__":
    sys.exit(main())
