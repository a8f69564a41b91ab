"""`python -m posttrain` is the `posttrain` command."""

import sys

from posttrain import main

sys.exit(main.main())
