"""A recipe in several processes, on one machine or many: under torchrun, or as the workers of Ray Train."""
