"""``python -m qmpvcpu``: the command line without its script."""

import sys

from qmpvcpu.cli import main

sys.exit(main())
