"""Data: sources of samples, and the torchdata.nodes pipeline that mixes, packs, batches and masks them.

sources.py    local folders, JSONL and Hugging Face datasets
reading.py    lines, text, images and audio, one function each    bad.py  a sample that cannot be used
digits.py     scanned digits (scikit-learn)              speech.py  spoken words (espeak-ng)
reference.py  the language reference inside CPython      the three sources of the quickstart
nodes.py      shuffle, stream, pack, mix, micro-batches
"""
