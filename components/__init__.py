"""Building blocks for masked diffusion on any modalities: each module is importable alone.

`MDM_TYPECHECK=1` checks every annotated shape and type of `components` and `mdm` at run time (jaxtyping with beartype).
It is off by default: it then costs nothing, and torch.compile sees plain functions.
"""

import os
import sys

if os.environ.get("MDM_TYPECHECK") == "1":
    from components.typecheck import install

    install(["components", "mdm"])

from components.namesakes import say as _say

_say(sys.path[0] or ".")  # the folder of the script that is run
