"""``python -m benchmarks.paper``."""

import sys

from .main import main

sys.exit(main())
