"""What the blocks add up to: model, builders, generation pipelines, checkpoints and the `mdm` command."""

import logging
import warnings

import components as components  # its switch for run-time shape checks covers mdm too

__version__ = "0.1.0"

# torchao 0.15 says at import that it skips its C++ extensions under a newer torch; what this library uses of it does not
# need them.
logging.getLogger("torchao").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*Skipping import of cpp extensions.*")
