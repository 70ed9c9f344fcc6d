"""What the blocks add up to: models, data, training, generation, evaluation, studies, pages, and the `mdm` command.

    from mdm import generate, load_model

    model, processor = load_model("runs/quickstart")
    generate(model, processor, "text_to_image", [{"text": "a handwritten seven"}]).outputs[0]["image"].save("seven.png")

What people import is named here, and loaded when it is used: `import mdm` alone takes no torch.
"""

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

import components as components  # its switch for run-time shape checks covers mdm too

if TYPE_CHECKING:
    from mdm.data.processor import Processor as Processor
    from mdm.generation.generate import generate as generate
    from mdm.hub import push as push
    from mdm.models import builders as builders
    from mdm.models.folder import load_model as load_model
    from mdm.models.transformer import ModelConfig as ModelConfig

__version__ = "0.1.0"
__all__ = ["ModelConfig", "Processor", "builders", "generate", "load_model", "push"]

_HOMES = {
    "ModelConfig": "mdm.models.transformer",
    "Processor": "mdm.data.processor",
    "builders": "mdm.models.builders",
    "generate": "mdm.generation.generate",
    "load_model": "mdm.models.folder",
    "push": "mdm.hub",
}

# torchao 0.15 says at import that it skips its C++ extensions under a newer torch; what this library uses of it does not
# need them.
logging.getLogger("torchao").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*Skipping import of cpp extensions.*")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mdm' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "builders" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
