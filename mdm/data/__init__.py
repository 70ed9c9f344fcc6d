"""The data of a run: raw samples to masked batches, the tokenizers that a model is spoken to in, and token shards."""
