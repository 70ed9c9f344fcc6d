"""What a model will see: samples of a config's own data, beside what their codes say of them.

mdm validate pretrain --config my.yaml --look look        look/0000_given.png, look/0000.png, ...
"""

from __future__ import annotations

from pathlib import Path

from mdm.config import UserError
from mdm.pages.media import drawn, image_grid, next_number, save_outputs
from mdm.training.reach import Trial


def write_look(folder: Path, trial: Trial) -> str:
    """Writes the samples that a trial drew, as they come from their source and as their codes decode; says where.

    Raises UserError where nothing was drawn, or it cannot be written.
    """
    processor = trial.processor
    known = [] if processor is None else list(processor.tokenizers)
    drawn_samples = {key: samples for key, samples in trial.drawn.items() if any(m in s for s in samples for m in known)}
    if processor is None or not drawn_samples:
        raise UserError("--look: the config has no samples that its tokenizers take")
    told, first = [], next_number(folder)
    for key, samples in drawn_samples.items():
        own = [{m: s[m] for m in known if m in s} for s in samples]
        back = [{m: processor.decode(m, processor.encode(m, raw)) for m, raw in s.items()} for s in own]
        save_outputs(folder, processor, own, back, first)
        above, below = ([picture for s in side for picture in drawn(processor, s)] for side in (own, back))
        if above:
            image_grid([*above, *below], len(above), scale=4).save(folder / f"{key}.png")
        told.append(f"{key}.png" if above else f"{first:04d} to {first + len(own) - 1:04d} ({key})")
        first += len(own)
    return f"Look at {folder}: {', '.join(told)}; above (or NAME_given) as it is drawn, below (NAME) as its codes say it"
