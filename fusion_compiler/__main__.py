"""`python -m fusion_compiler`."""

import sys

from .cli import main

sys.exit(main())
