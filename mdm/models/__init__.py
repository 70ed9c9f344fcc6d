"""The model, its sizes, the open models that become it, adapters, quantization, and what takes memory."""
