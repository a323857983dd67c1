"""`python -m ordered_reduce.audit`. `ordered_reduce.audit` is the function; this file lends the command its name."""

import sys

from .checks import audit
from .operations import main

if __name__ == "__main__":
    main()
else:
    sys.modules[__name__] = audit   # so that `import ordered_reduce.audit` does not hide the function
