"""Data: sources of samples, and the torchdata.nodes pipeline that mixes, packs, batches and masks them.

sources.py    local folders, JSONL and Hugging Face datasets (hub.py)
indexed.py    samples that are read when they are drawn
reading.py    lines and text      images.py  images      clips.py      audio      bad.py  a sample that cannot be used
digits.py     scanned digits (scikit-learn)              speech.py     spoken words (espeak-ng)
reference.py  the language reference inside CPython      the three sources of the quickstart
pairs.py      spoken beside handwritten digits           shards.py     samples tokenized once
endless.py    shuffle, stream                            nodes.py      pack, mix, micro-batches
"""
