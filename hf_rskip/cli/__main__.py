"""`python -m hf_rskip.cli`: like the console script, it imports nothing from the current folder."""

import os
import sys

from .main import main

if sys.path[0] in ("", os.getcwd()) and not sys.flags.safe_path:
    del sys.path[0]  # the current folder, added by `-m`
sys.exit(main())
