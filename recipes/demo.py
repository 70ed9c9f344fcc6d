"""Open a page on which a trained model generates and edits whatever it knows, and every unmasking can be watched.

    mdm demo checkpoint=runs/quickstart
    mdm demo checkpoint=runs/quickstart port=8000 host=0.0.0.0

Needs gradio: pip install "trimodal-mdm[demo]".
"""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass, field

from omegaconf import MISSING

from mdm.config import UserError
from mdm.generation.defaults import Defaults
from mdm.hardware import check_hardware, hardware
from mdm.models.folder import load_model, model_folder
from mdm.pages import examples
from mdm.pages.demo import MAX_UPLOAD, Model
from mdm.pages.demo_page import build
from mdm.recipe import run_recipe
from mdm.training import record

CONFIG = "demo"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/demo.yaml` explains each."""

    checkpoint: str = MISSING
    trust: bool = False
    host: str = "127.0.0.1"
    port: int = 7860
    defaults: str | None = None
    captions: dict[str, str] = field(default_factory=dict)
    device: str = "auto"
    precision: str = "auto"


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before the model loads. Raises UserError."""
    check_hardware(cfg.device, cfg.precision)
    model_folder(cfg.checkpoint)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the demo needs gradio; install it with: pip install 'trimodal-mdm[demo]'")
    with socket.socket() as probe:
        try:
            probe.bind((cfg.host, cfg.port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port={cfg.port} of host={cfg.host} cannot be listened to ({error}); choose another") from error


def main(cfg: Settings) -> None:
    with hardware(cfg.device, cfg.precision) as hw:
        model, processor = load_model(cfg.checkpoint, hw.device)
        defaults = Defaults.beside(cfg.checkpoint, cfg.defaults)
        own = Model(model, processor, hw, defaults, examples.read(cfg.checkpoint, processor), record.of(cfg.checkpoint))
        page = build(own, cfg.checkpoint, cfg.captions)
        print(f"http://{cfg.host}:{cfg.port}  (Ctrl-C ends it)", flush=True)
        page.queue(max_size=32).launch(
            server_name=cfg.host, server_port=cfg.port, quiet=True, show_error=True, max_file_size=MAX_UPLOAD
        )


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
