"""`python -m fluxlab.attribution +exp=<name> objective=<name>`: the command of `fluxlab.learning.attribute`."""

import sys

from fluxlab.learning.attribute import main

if __name__ == "__main__":
    sys.exit(main())
