"""Spoken words with transcripts: espeak-ng says them in many voices, rates and pitches.

The voices are split, so that a test clip is spoken by a voice never heard in training. espeak-ng is used as a shared library
(the `espeakng-loader` wheel), through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import tempfile
from typing import Any, Literal

import numpy as np

from components.data.digits import WORDS
from components.resampling import resample

SAMPLE_RATE = 8000
VOICES = {  # espeak's American voice in its variants; variants of one name stay in one split
    "train": (
        "m1 m2 m3 m4 m5 f1 f2 f3 klatt4 klatt5 adam antonio Andy Alicia Michael Lee Mario Marco Alex Annie announcer aunty "
        "belinda boris Andrea ed gustave iven2 iven3 john kaukovalta marcelo miguel norbert pablo pedro quincy robert sandro"
    ),
    "judge": (
        "m6 m7 f4 klatt6 benjamin david Jacky Mike rob shelby travis Henrique ian Hugo Storm Tweaky grandma fast Nguyen Diogo "
        "RicishayMax robosoft6 Gene2"
    ),
    "test": "m8 f5 linda steph edward max paul michel Denis zac grandpa anika",
}
RATES = (160, 190, 220)  # words a minute
PITCHES = (35, 50, 65)  # espeak's scale of 0..100


def spoken_words(
    split: Literal["train", "judge", "test"],
    caption: str = "a spoken {}",
    max_seconds: float = 0.52,
    voices: int | None = None,
) -> list[dict[str, Any]]:
    """Samples `{"text": caption, "audio": float waveform at 8 kHz, "label": 0..9, "voice": name, "sample_rate": 8000}`.

    Every clip peaks at 0.7, without the silence around the word; clips longer than `max_seconds` are left out.

    voices: only the first of the split's; None is all
    """
    if split not in VOICES:
        raise ValueError(f"spoken_words: split {split!r} is not one of {', '.join(VOICES)}")
    return [
        {
            "text": caption.format(WORDS[label]),
            "audio": audio.copy(),
            "label": label,
            "voice": voice,
            "sample_rate": SAMPLE_RATE,
        }
        for voice, label, audio in _clips(split, voices)
        if len(audio) <= max_seconds * SAMPLE_RATE
    ]


@functools.cache
def _clips(split: str, voices: int | None) -> list[tuple[str, int, np.ndarray]]:
    """Voice, label and waveform of every clip of a split: said once in a process, which takes many seconds."""
    espeak = Espeak()
    clips = []
    for voice in VOICES[split].split()[:voices]:
        espeak.set_voice(f"en-us+{voice}")
        for rate in RATES:
            for pitch in PITCHES:
                clips += [(voice, label, trim(espeak.say(word, rate, pitch))) for label, word in enumerate(WORDS)]
    return clips


def trim(audio: np.ndarray, peak: float = 0.7, threshold: float = 0.01, frame: int = 80) -> np.ndarray:
    """The waveform scaled to `peak`, without the silence (frames of an RMS under `threshold`) at both ends."""
    audio = audio * (peak / max(np.abs(audio).max(), 1e-6))
    frames = audio[: len(audio) // frame * frame].reshape(-1, frame)
    loud = np.flatnonzero(np.sqrt((frames**2).mean(axis=1)) > threshold)
    return audio[loud[0] * frame : (loud[-1] + 1) * frame] if len(loud) else audio


class Espeak:
    """The espeak-ng library, asked for samples instead of sound."""

    AUDIO_OUTPUT_SYNCHRONOUS = 2  # samples go to the callback, inside the call
    CHARS_UTF8 = 1
    RATE, PITCH = 1, 3

    def __init__(self) -> None:
        import espeakng_loader

        # The synthesiser keeps state that what was said before colours; a copy of the library has its own, always fresh.
        with tempfile.TemporaryDirectory() as folder:
            self.library: ctypes.CDLL = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), folder))
        data = espeakng_loader.get_data_path().encode()
        self.sample_rate: int = self.library.espeak_Initialize(self.AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0)
        if self.sample_rate <= 0:
            raise RuntimeError("espeak-ng could not be initialised from its data folder")

    def set_voice(self, name: str) -> None:
        """Who speaks from now on. It reads files, so set it once for many words. Raises ValueError for an unknown voice."""
        if self.library.espeak_SetVoiceByName(name.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {name!r}")

    def say(self, text: str, rate: int, pitch: int) -> np.ndarray:
        """The waveform of a text, float32 in [-1, 1] at 8 kHz."""
        self.library.espeak_SetParameter(self.RATE, rate, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        chunks: list[np.ndarray] = []

        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        def receive(samples, count, events):  # called by the library, samples None at the end
            if samples and count:
                chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self.library.espeak_SetSynthCallback(receive)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # breathy voices add noise: the same clip in every process
        raw = text.encode() + b"\0"
        self.library.espeak_Synth(raw, len(raw), 0, 1, 0, self.CHARS_UTF8, None, None)
        wave = np.concatenate(chunks).astype(np.float32) / 32768
        return resample(wave, self.sample_rate, SAMPLE_RATE)
