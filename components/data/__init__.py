"""Data: sources of samples, and the torchdata.nodes pipeline that mixes, packs, batches and masks them.

sources.py    local folders and Hugging Face datasets
digits.py     scanned digits (scikit-learn)              speech.py  spoken words (espeak-ng)
reference.py  the language reference inside CPython      the three sources of the quickstart
nodes.py      shuffle, stream, pack, mix, micro-batches
"""
