"""`python -m dist_ema` is `dist-ema`."""

import sys

from dist_ema.cli import main

sys.exit(main())
