"""Push a trained model to the Hugging Face hub, with a card written from its run: data, settings, figures.

    mdm run push checkpoint=runs/quickstart repo=me/tiny-trimodal
    mdm run push checkpoint=runs/quickstart repo=builtin:quickstart      puts it into the library itself, in bfloat16

`card=true` prints the card and pushes nothing. Anybody loads it back as checkpoint=hub:me/tiny-trimodal.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from mdm.config import UserError
from mdm.hub import model_card, pack, push
from mdm.models.builtin import PREFIX
from mdm.models.folder import model_folder
from mdm.recipe import run_recipe

CONFIG = "push"


@dataclass
class Settings:
    """The keys of the config; `recipes/configs/push.yaml` explains each."""

    checkpoint: str = MISSING
    repo: str = MISSING
    license: str = "apache-2.0"
    private: bool = True
    about: str = ""
    card: bool = False


def validate(cfg: Settings) -> None:
    """Everything that can be known to be wrong before anything is sent. Raises UserError."""
    model_folder(cfg.checkpoint)
    if cfg.repo.startswith(PREFIX):
        if cfg.checkpoint.startswith(PREFIX) or not cfg.repo.removeprefix(PREFIX).isidentifier():
            raise UserError(f"repo: {cfg.repo} takes a run's model, under a name like builtin:quickstart; got {cfg.checkpoint}")
    elif cfg.repo.count("/") != 1 or not all(cfg.repo.split("/")):
        raise UserError(f"repo: expected OWNER/NAME, got {cfg.repo!r}")


def main(cfg: Settings) -> None:
    if cfg.card:
        print(model_card(cfg.checkpoint, cfg.repo, cfg.license, cfg.about))
    elif cfg.repo.startswith(PREFIX):
        print(f"Written to {pack(cfg.checkpoint, cfg.repo, cfg.license, cfg.about)}")
    else:
        print(f"Pushed: {push(cfg.checkpoint, cfg.repo, cfg.license, cfg.private, cfg.about)}")


if __name__ == "__main__":
    run_recipe(Settings, validate, main, CONFIG)
