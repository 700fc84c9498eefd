"""`python -m qlora` is the command `qlora`."""

import sys

from qlora.cli.main import console

sys.exit(console())
