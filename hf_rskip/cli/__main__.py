"""`python -m hf_rskip.cli`, which is to import what the console script does: nothing of the current folder."""

import os
import sys

from .main import main

if sys.path[0] in ("", os.getcwd()) and not sys.flags.safe_path:
    del sys.path[0]  # that `-m` has put there
sys.exit(main())
